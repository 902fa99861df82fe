"""The data that a configuration asks for: its record opened, split into parts, and made into samples."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ringx
from ringx.launch import World

from .config import Config, DataConfig
from .data.dataset import Fields, open_fields, splits
from .data.samples import INPUTS, SHORT, Samples
from .data.statistics import Statistics

STATISTICS = "statistics"  # the folder in a run


def default_folder() -> Path:
    """Where data that is made on the spot is kept: $XDG_CACHE_HOME/ringx, by default ~/.cache/ringx."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringx"


def data_path(data: "str | None") -> str:
    """What --data names, or the default record, which is made where it is not there yet."""
    if data:
        return data
    from apps.vit.data.simulate import default_record

    return str(default_record(default_folder()))


def open_record(path: str, c: DataConfig) -> Fields:
    """The fields that a configuration asks for.  ValueError with one line for the user."""

    def words(text: str) -> "list[str] | None":
        return [w.strip() for w in text.split(",")] if text else None

    levels = words(c.levels)
    try:
        wanted = [int(x) for x in levels] if levels else None
    except ValueError:
        raise ValueError(
            f"levels={c.levels!r} must be whole numbers of hPa, such as 500,850."
        ) from None
    return open_fields(
        words(path) or path,
        variables=words(c.variables),
        levels=wanted,
        channel_names=words(c.channel_names),
    )


def open_same_record(path: str, c: DataConfig, identity: str, world: World) -> Fields:
    """``open_record`` on every rank; ValueError on all of them if one sees other data than that of rank 0."""
    try:
        fields = open_record(path, c)
        mine = fields.identity
    except ValueError as e:  # another node may not see the files
        mine = str(e)
    seen = ringx.launch.gather(mine, world)
    if others := [rank for rank, there in enumerate(seen) if there != identity]:
        raise ValueError(
            f"--data {path}: rank {others[0]} sees other data than rank 0: {seen[others[0]]}; put it where all nodes see the same."
        )
    return fields


def make_samples(
    fields: Fields, c: DataConfig, made: Statistics, part: str, where: str = "inside"
) -> Samples:
    """The samples of the part "train", "val" or "test"."""
    split = split_record(fields, c)[part]
    inputs = c.input_names()
    if inputs is None:
        inputs = tuple(name for name in INPUTS if name != "static" or fields.static)
    return Samples(fields, split, made, c.lead_hours(), inputs, where, c.history_hours(), c.base)


def split_record(fields: Fields, c: DataConfig) -> dict[str, Any]:
    try:
        return splits(fields, c.train_times or None, c.val_times or None, c.test_times or None)
    except ValueError as e:
        raise ValueError(f"--train-times, --val-times, --test-times: {e}") from None


def with_data_sizes(config: Config, fields: Fields, samples: Samples) -> Config:
    """With the data's grid and channels in the model."""
    height, width = fields.grid.shape
    channels = len(fields.channels) * len(samples.leads)
    sizes: dict[str, Any] = {
        "height": height,
        "width": width,
        "periodic": bool(fields.grid.periodic),
    }
    sizes |= {"in_channels": len(samples.input_names), "out_channels": channels}
    return replace(config, model=replace(config.model, **sizes))


def with_expected_data_sizes(config: Config, data: "str | None") -> Config:
    """With the sizes of the data, whose values nobody looks at."""
    if not data:
        height, width, fields, static = 32, 64, 3, 1  # of the default record
        periodic, year = True, 2
    else:
        record = open_record(data, config.data)
        (height, width), fields, static = (
            record.grid.shape,
            len(record.channels),
            len(record.static),
        )
        periodic = bool(record.grid.periodic)
        year = 2 if len(record) * record.step_hours >= SHORT else 0
    ahead = len(config.data.lead_hours())
    past = fields * len(config.data.history_hours())
    extra = {
        "time_of_day": 2,
        "time_of_year": year,
        "latitude": 1,
        "static": static,
        "climatology": fields * (ahead + 1),
    }
    seen = config.data.input_names() or tuple(extra)
    sizes: dict[str, Any] = {
        "height": height,
        "width": width,
        "periodic": periodic,
        "out_channels": fields * ahead,
    }
    return replace(
        config,
        model=replace(
            config.model, in_channels=fields + past + sum(extra[n] for n in seen), **sizes
        ),
    )
