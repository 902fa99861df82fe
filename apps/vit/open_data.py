"""Opens the record that a configuration asks for, splits it into parts and makes samples."""

import os
from dataclasses import replace
from pathlib import Path

import ringx
from ringx.launch import World

from .config import Config, DataConfig
from .data.dataset import Fields, Split, open_fields, splits
from .data.samples import INPUTS, SHORT, Samples
from .data.statistics import Statistics

STATISTICS = "statistics"  # the folder of a run that keeps them


def default_folder() -> Path:
    """Where a simulated record is kept: $XDG_CACHE_HOME/ringx, by default ~/.cache/ringx."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringx"


def data_path(data: "str | None") -> str:
    """What --data names, or the default record, which is simulated where it does not exist yet."""
    if data:
        return data
    from apps.vit.data.simulate import default_record

    return str(default_record(default_folder()))


def open_record(path: str, config: DataConfig) -> Fields:
    """The fields that a configuration asks for.

    Args:
        path: as --data: a file, a folder, a pattern, or several with commas between.
        config: variables, levels and names of channels.

    Raises:
        ValueError: the record cannot be used; one line for the user."""
    levels = _words(config.levels)
    try:
        pressure_levels = [int(word) for word in levels] if levels else None
    except ValueError:
        raise ValueError(
            f"levels={config.levels!r} must be whole numbers of hPa, such as 500,850."
        ) from None
    return open_fields(
        _words(path) or path,
        variables=_words(config.variables),
        levels=pressure_levels,
        channel_names=_words(config.channel_names),
    )


def _words(text: str) -> "list[str] | None":
    """The words of a list with commas; None for an empty text."""
    if not text:
        return None
    return [word.strip() for word in text.split(",")]


def open_same_record(path: str, config: DataConfig, identity: str, world: World) -> Fields:
    """``open_record`` on every rank.

    Args:
        identity: of the record that rank 0 has opened.

    Raises:
        ValueError: on all ranks, if one of them sees other data than rank 0."""
    try:
        fields = open_record(path, config)
        local_identity = fields.identity
    except ValueError as error:  # the node of this rank may not have the files
        local_identity = str(error)
    identities = ringx.launch.gather(local_identity, world)
    for rank, other in enumerate(identities):
        if other != identity:
            raise ValueError(
                f"--data {path}: rank {rank} sees other data than rank 0: {other}; put it where "
                f"all nodes see the same."
            )
    return fields


def split_record(fields: Fields, config: DataConfig) -> dict[str, Split]:
    """The record's parts "train", "val" and "test"."""
    try:
        return splits(
            fields,
            config.train_times or None,
            config.val_times or None,
            config.test_times or None,
        )
    except ValueError as error:
        raise ValueError(f"--train-times, --val-times, --test-times: {error}") from None


def make_samples(
    fields: Fields,
    config: DataConfig,
    statistics: Statistics,
    part: str,
    where: str = "inside",
) -> Samples:
    """The samples of a part, "train", "val" or "test"; the other arguments are as of Samples."""
    inputs = config.input_names()
    if inputs is None:
        inputs = tuple(name for name in INPUTS if name != "static" or fields.static)
    return Samples(
        fields,
        split_record(fields, config)[part],
        statistics,
        leads=config.lead_hours(),
        inputs=inputs,
        where=where,
        history=config.history_hours(),
        base=config.base,
    )


def with_data_sizes(config: Config, fields: Fields, samples: Samples) -> Config:
    """The configuration with the data's grid and channels in its model."""
    height, width = fields.grid.shape
    model = replace(
        config.model,
        height=height,
        width=width,
        periodic=bool(fields.grid.periodic),
        in_channels=len(samples.input_names),
        out_channels=len(fields.channels) * len(samples.leads),
    )
    return replace(config, model=model)


def with_expected_data_sizes(config: Config, data: "str | None") -> Config:
    """``with_data_sizes`` for an estimate: the values of `data` are not read.

    Without `data`, the sizes are those of the default record, which need not exist."""
    if data:
        record = open_record(data, config.data)
        height, width = record.grid.shape
        periodic = bool(record.grid.periodic)
        channels, static = len(record.channels), len(record.static)
        is_long = len(record) * record.step_hours >= SHORT
    else:
        height, width = 32, 64
        periodic = True
        channels, static = 3, 1
        is_long = True
    leads = len(config.data.lead_hours())
    history = len(config.data.history_hours())
    input_channels = {
        "time_of_day": 2,
        "time_of_year": 2 if is_long else 0,
        "latitude": 1,
        "static": static,
        "climatology": channels * (leads + 1),
    }
    names = config.data.input_names() or tuple(input_channels)
    besides_fields = sum(input_channels[name] for name in names)
    model = replace(
        config.model,
        height=height,
        width=width,
        periodic=periodic,
        in_channels=channels * (1 + history) + besides_fields,
        out_channels=channels * leads,
    )
    return replace(config, model=model)
