"""A climate record as a model sees it: fields at evenly spaced times, and its parts.

    fields = open_fields("era5.nc", variables=["t2m"])
    parts = splits(fields, train="1979/2015", val="2016/2017", test="2018")
    fields.read([parts["train"].start])  # [1, C, H, W], physical units

``apps.vit.data.field_files`` says which files are understood, ``apps.vit.data.statistics`` what is
learnt from the training part, and ``apps.vit.data.samples`` makes pairs of input and target.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .field_files import HDF5, SECONDS, FieldFile, Grid, Hdf5File, XarrayFile, find_files, reading

__all__ = ["Fields", "Grid", "Split", "expect_finite", "open_fields", "splits"]

# Variables that some records repeat at every time.  They are taken as static where the first and
# the last field agree.
STATIC = (
    "lsm",
    "land_sea_mask",
    "orog",
    "orography",
    "z_sfc",
    "geopotential_at_surface",
    "slt",
    "soil_type",
    "cvl",
    "cvh",
    "low_vegetation_cover",
    "high_vegetation_cover",
    "sdor",
    "standard_deviation_of_orography",
)


class Fields:
    """A record: the same channels on one grid at evenly spaced times.  Made by ``open_fields``.

    Attributes:
        channels: their names.
        grid: the points.
        times: [T] datetime64[s], ascending by `step_hours`.
        step_hours: whole hours.
        units, long_names: of each channel; units "" where the files do not say.
        static: [H, W] float32 by name: what does not depend on time.
        given_mean, given_std: [C] float64 that lay beside HDF5 files, or None.
        source: what it is, for people."""

    def __init__(
        self,
        files: Sequence[FieldFile],
        channels: Sequence[str],
        static: dict[str, np.ndarray],
        given_mean: np.ndarray | None = None,
        given_std: np.ndarray | None = None,
    ):
        first = files[0]
        self._files = list(files)
        self._starts = np.cumsum([0, *(len(file.times) for file in files)])
        self.channels = tuple(channels)
        self.grid = first.grid
        self.times = np.concatenate([file.times for file in files])
        self.step_hours = self._find_step()
        self.units = {name: first.channels[name].units for name in channels}
        self.long_names = {name: first.channels[name].long_name for name in channels}
        self.static = static
        self.given_mean = given_mean
        self.given_std = given_std
        self.source = self._describe_source()

    def __len__(self) -> int:
        return len(self.times)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n, C, H, W] float32 at these times, in this order.

        They are in physical units, from north to south.

        Raises:
            ValueError: an index outside the record, or a file that cannot be read."""
        wanted = np.atleast_1d(np.asarray(indices, np.int64))
        outside = [int(i) for i in wanted if not 0 <= i < len(self)]
        if outside:
            raise ValueError(
                f"index {outside[0]} is not one of the record's times 0..{len(self) - 1} "
                f"({self.source})."
            )
        unique, inverse = np.unique(wanted, return_inverse=True)
        out = np.empty((len(unique), len(self.channels), *self.grid.shape), np.float32)
        files = np.searchsorted(self._starts, unique, "right") - 1
        # Runs of consecutive times in one file are read at once.
        new_run = (np.diff(unique) != 1) | (np.diff(files) != 0)
        bounds = [0, *(np.flatnonzero(new_run) + 1).tolist(), len(unique)]
        for begin, end in itertools.pairwise(bounds):
            if begin == end:  # no index at all
                continue
            file = files[begin]
            first = int(unique[begin] - self._starts[file])
            rows = slice(first, first + end - begin)
            out[begin:end] = self._files[file].read(self.channels, rows)
        return out if np.array_equal(unique, wanted) else out[inverse]

    @cached_property
    def identity(self) -> str:
        """sha256 of channels, grid, times and the sizes of the files.

        It is equal on all ranks and for a copy of the files.  Of a Zarr store the size of every
        chunk is looked up, so that one rank alone should do it."""
        sha = hashlib.sha256("\n".join(self.channels).encode())
        for array in (self.grid.lat, self.grid.lon, self.times.astype(np.int64)):
            sha.update(f"{array.shape}".encode() + array.tobytes())
        sha.update(str([file.size(self.channels) for file in self._files]).encode())
        return sha.hexdigest()

    def _describe_source(self) -> str:
        first, last = self._files[0], self._files[-1]
        files = first.file.name
        if len(self._files) > 1:
            files = f"{files} .. {last.file.name}, {len(self._files)} files"
        return f"{first.title} ({files})" if first.title else files

    def _find_step(self) -> int:
        """Hours between times; ValueError where they are not all the same."""
        if len(self.times) < 2:
            raise ValueError(
                f"{self._files[0].file}: a record needs two times at least, but there is "
                f"{len(self.times)}."
            )
        gaps = np.diff(self.times).astype(np.int64)
        self._expect_ascending(gaps)
        lengths, counts = np.unique(gaps, return_counts=True)
        step = int(lengths[counts.argmax()])
        if len(lengths) > 1:
            i = int((gaps != step).argmax())
            raise ValueError(
                f"{self._file_of(i + 1)}: times are unevenly spaced: {gaps[i] / 3600:g} h from "
                f"{self.times[i]} to {self.times[i + 1]}, but {step / 3600:g} h elsewhere; "
                "fill the gap, or open the parts as records of their own."
            )
        if step % 3600:
            raise ValueError(
                f"{self._file_of(0)}: times are {step / 3600:g} h apart; only whole hours are "
                "read: resample it."
            )
        return step // 3600

    def _expect_ascending(self, gaps: np.ndarray) -> None:
        """ValueError where a gap between times is not positive."""
        for wrong, problem in (
            (gaps == 0, "occurs twice"),
            (gaps < 0, "comes after a later time"),
        ):
            if wrong.any():
                i = int(wrong.argmax()) + 1
                raise ValueError(
                    f"{self._file_of(i)}: time {self.times[i]} {problem}; times must ascend: "
                    "remove or sort them."
                )

    def _file_of(self, index: int) -> Path:
        """The file that holds a time."""
        return self._files[int(np.searchsorted(self._starts, index, "right")) - 1].file


# ---- opening


def open_fields(
    path_or_paths: str | Path | Sequence[str | Path],
    *,
    variables: Sequence[str] | None = None,
    levels: Sequence[float] | None = None,
    channel_names: Sequence[str] | None = None,
) -> Fields:
    """One record from files that follow each other in time.  Reads no fields yet.

    Args:
        path_or_paths: a file, several, a folder, a glob, or a Zarr store: NetCDF (.nc), Zarr
            (.zarr), or HDF5 (.h5) as ``apps.vit.data.field_files`` describes them.  A file
            without time adds static fields.
        variables: channels in this order, by their variable ("z": all its levels) or their own
            name ("z500"); None: all.
        levels: of 3-D variables, hPa; None: all.
        channel_names: of HDF5 files, which often hold none.

    Raises:
        ValueError: one line that names the file: it cannot be read, has no time, a time missing
            or twice, an irregular grid, or differs from the others in grid, channels or units; or
            an argument: a name that is not there."""
    opened = _open_files(find_files(path_or_paths), channel_names)
    files = _files_with_times(opened)
    first = files[0]
    for file in opened:
        _expect_same_grid(first, file)
    static = _statics(opened)
    repeated = _repeated_statics(files) if variables is None else {}
    selected = _select(first, variables, levels, static)
    channels = [name for name in selected if name not in repeated]
    if not channels:
        raise ValueError(
            f"{first.file}: no variable has time, latitude and longitude; name another file."
        )
    for file in files[1:]:
        _expect_same_channels(first, file, channels)
    given_mean = _values_beside(first, "global_means.npy", channels)
    given_std = _values_beside(first, "global_stds.npy", channels)
    return Fields(files, channels, {**static, **repeated}, given_mean, given_std)


def _open_files(paths: list[Path], channel_names: Sequence[str] | None) -> list[FieldFile]:
    hdf5 = [path for path in paths if path.suffix in HDF5 and path.is_file()]
    if channel_names is not None and not hdf5:
        raise ValueError(
            f"channel_names={list(channel_names)} is for HDF5 files, and {paths[0]} is none; "
            "use variables."
        )
    return [Hdf5File(path, channel_names) if path in hdf5 else XarrayFile(path) for path in paths]


def _files_with_times(opened: list[FieldFile]) -> list[FieldFile]:
    """The files that hold times, earliest first; ValueError if there is none."""
    with_times = [file for file in opened if len(file.times)]
    if not with_times:
        raise ValueError(
            f"{opened[0].file}: it has no times; name a file with fields that change in time."
        )
    return sorted(with_times, key=_first_time)


def _first_time(file: FieldFile) -> np.datetime64:
    return file.times[0]


def _statics(opened: list[FieldFile]) -> dict[str, np.ndarray]:
    """[H, W] of each variable without time, from the first file that holds it."""
    static: dict[str, np.ndarray] = {}
    for file in opened:
        static = {**file.statics(), **static}
    return static


def _select(
    first: FieldFile,
    variables: Sequence[str] | None,
    levels: Sequence[float] | None,
    static: dict[str, np.ndarray],
) -> list[str]:
    """The channels that `variables` and `levels` name, or all."""
    _expect_not_refused(first, variables)
    if levels is not None:
        _expect_levels(first, levels)
    if variables is None:
        return _at_levels(first, list(first.channels), levels)
    selected: list[str] = []
    for name in variables:
        matching = _channels_named(first, name, static)
        at_levels = _at_levels(first, matching, levels)
        if not at_levels:
            raise ValueError(
                f"variables: {name!r} is at none of levels={list(levels or ())}; "
                "leave out one or the other."
            )
        selected += [channel for channel in at_levels if channel not in selected]
    return selected


def _expect_not_refused(first: FieldFile, variables: Sequence[str] | None) -> None:
    """ValueError for a variable that is asked for, but cannot be channels."""
    for name, reason in first.refused.items():
        if variables is None or name in variables:
            raise ValueError(f"{first.file}: {name} {reason}, or leave it out with variables.")


def _expect_levels(first: FieldFile, levels: Sequence[float]) -> None:
    known = sorted({c.hpa for c in first.channels.values() if c.hpa is not None})
    missing = [level for level in levels if level not in known]
    if missing:
        text = ", ".join(f"{level:g}" for level in known) or "none"
        raise ValueError(f"levels: {missing[0]:g} hPa is not in {first.file}; it has {text}.")


def _channels_named(first: FieldFile, name: str, static: dict[str, np.ndarray]) -> list[str]:
    """The channels of a name, its own or that of its variable; ValueError if there is none."""
    matching = [channel for channel in first.channels if _is_named(first, channel, name)]
    if not matching:
        hint = " (it is static: it comes along without being named)" if name in static else ""
        raise ValueError(
            f"variables: {name!r} is not a channel of {first.file}{hint}; "
            f"it has {', '.join(first.channels)}."
        )
    return matching


def _is_named(file: FieldFile, channel: str, name: str) -> bool:
    """Whether `name` is the channel's own name or that of its variable."""
    if name == channel:
        return True
    # "fields" is the variable of every channel of an HDF5 file.
    return name == file.channels[channel].variable and name != "fields"


def _at_levels(file: FieldFile, channels: list[str], levels: Sequence[float] | None) -> list[str]:
    """Those of the channels that lie at one of the levels, or at none of their own."""
    if levels is None:
        return channels
    at_levels = []
    for channel in channels:
        hpa = file.channels[channel].hpa
        if hpa is None or hpa in levels:
            at_levels.append(channel)
    return at_levels


def _repeated_statics(files: list[FieldFile]) -> dict[str, np.ndarray]:
    """Known static variables that have a time, but do not change from the first to the last."""
    repeated = {}
    last = len(files[-1].times) - 1
    for name in STATIC:
        if not all(name in file.channels for file in files):
            continue
        before = files[0].read([name], slice(0, 1))[0, 0]
        after = files[-1].read([name], slice(last, last + 1))[0, 0]
        if np.array_equal(before, after, equal_nan=True):
            repeated[name] = before
    return repeated


def _expect_same_grid(first: FieldFile, other: FieldFile) -> None:
    for kind in ("lat", "lon"):
        expected = getattr(first.grid, kind)
        values = getattr(other.grid, kind)
        if values.shape != expected.shape or not np.allclose(expected, values, rtol=0, atol=1e-4):
            raise ValueError(
                f"{other.file}: its grid differs from that of {first.file} "
                f"({kind}: {_range_of(values)}, not {_range_of(expected)}); "
                "bring all files to one grid."
            )


def _range_of(values: np.ndarray) -> str:
    """How many coordinates there are, and from where to where they go."""
    return f"{len(values)} from {values[0]:g} to {values[-1]:g}"


def _expect_same_channels(first: FieldFile, other: FieldFile, channels: list[str]) -> None:
    for name in channels:
        if name not in other.channels:
            known = ", ".join(other.channels) or "no channel"
            raise ValueError(
                f"{other.file}: {name} of {first.file} is not in it (it has {known}); files must "
                "hold the same variables and follow each other in time: merge those of different "
                "variables first."
            )
        units, expected = other.channels[name].units, first.channels[name].units
        if units != expected:
            raise ValueError(
                f"{other.file}: {name} is in {units!r}, but in {expected!r} in {first.file}; "
                "bring all files to one unit."
            )


def _values_beside(first: FieldFile, name: str, channels: list[str]) -> np.ndarray | None:
    """[C] float64 of an .npy file in the record's folder, in stats/ in it, or beside it.

    Only records in HDF5 have such files."""
    if not isinstance(first, Hdf5File):
        return None
    folder = first.file.parent
    places = (folder, folder / "stats", folder.parent, folder.parent / "stats")
    file = next((place / name for place in places if (place / name).is_file()), None)
    if file is None:
        return None
    with reading(file):
        values = np.load(file, allow_pickle=False).astype(np.float64).ravel()
    if len(values) != len(first.channels):
        raise ValueError(
            f"{file}: it holds {len(values)} values, but {first.file} has "
            f"{len(first.channels)} channels."
        )
    by_name = dict(zip(first.channels, values, strict=True))
    return np.array([by_name[channel] for channel in channels])


def expect_finite(fields: Fields, indices: np.ndarray, values: np.ndarray) -> None:
    """Checks that no value of [n, C, H, W] at these times is missing or infinite.

    Raises:
        ValueError: one is; names the channel, the first time, and how many points."""
    missing = ~np.isfinite(values)
    if not missing.any():
        return
    time_index, channel_index = np.argwhere(missing.any((2, 3)))[0]
    points = missing[time_index, channel_index]
    raise ValueError(
        f"{fields.source}: channel {fields.channels[channel_index]} is missing (or infinite) at "
        f"{points.sum()} of {points.size} points at {fields.times[indices[time_index]]}; "
        "leave the channel out with --variables, or fill it."
    )


# ---- parts of the time


@dataclass(frozen=True)
class Split:
    """The times start <= index < stop of a record."""

    start: int
    stop: int
    name: str = "split"

    def __len__(self) -> int:
        return self.stop - self.start


def splits(
    fields: Fields, train: str | None = None, val: str | None = None, test: str | None = None
) -> dict[str, Split]:
    """The parts of a record by name.

    All None: the first 70 % of the times, the next 15 %, the rest.  Otherwise each is
    "start/stop", or one period.  An end is an index ("0/504": 504 is not part of it), or an ISO
    date or time.  A stop that is a year, month or day includes all of it ("1979/2015" ends with
    2015); one with a time of day is not part of it.  A number of four digits is a year where that
    range names a year of the record, and an index elsewhere; "02015" is an index.

    Raises:
        ValueError: names the part and what the record spans: an empty or backwards range, one
            that is not in the record, ranges that overlap, or only some of the three."""
    texts = {"train": train, "val": val, "test": test}
    given = {name: text for name, text in texts.items() if text is not None}
    if not given:
        return _default_splits(fields)
    for name in texts:
        if name not in given:
            raise ValueError(f"{name} is not given; give all of train, val and test, or none.")
    parts = {name: _range(fields, name, text) for name, text in given.items()}
    for first, second in itertools.combinations(parts.values(), 2):
        if first.start < second.stop and second.start < first.stop:
            first_text = f"{first.name}={given[first.name]!r}"
            second_text = f"{second.name}={given[second.name]!r}"
            raise ValueError(
                f"{first_text} and {second_text} overlap at "
                f"{fields.times[max(first.start, second.start)]}; part them (the record spans "
                f"{_span(fields)})."
            )
    return parts


def _default_splits(fields: Fields) -> dict[str, Split]:
    train_stop = len(fields) * 70 // 100
    val_stop = len(fields) * 85 // 100
    parts = {
        "train": Split(0, train_stop, "train"),
        "val": Split(train_stop, val_stop, "val"),
        "test": Split(val_stop, len(fields), "test"),
    }
    if not all(len(part) for part in parts.values()):
        raise ValueError(
            f"train, val and test cannot be made of a record that spans {_span(fields)}; "
            "open a longer one."
        )
    return parts


def _range(fields: Fields, name: str, text: str) -> Split:
    """The part that a text describes."""
    ends = [end.strip() for end in text.split("/")]
    if len(ends) > 2 or not all(ends):
        raise ValueError(
            f"{name}={text!r} must be START/STOP of indices or dates, such as 0/504 or 1979/2015."
        )
    if len(ends) == 1 and ends[0].isdigit() and len(ends[0]) != 4:
        raise ValueError(f"{name}={text!r} is one index; name START/STOP, such as 0/504.")
    years = {str(year) for year in fields.times.astype("datetime64[Y]")}
    of_years = bool(years & set(ends))
    argument = f"{name}={text!r}"
    start = _end(fields, argument, ends[0], of_years=of_years, is_stop=False)
    stop = _end(fields, argument, ends[-1], of_years=of_years, is_stop=True)
    if start >= stop:
        raise ValueError(
            f"{name}={text!r} is empty or backwards (indices {start}/{stop}); the record spans "
            f"{_span(fields)}."
        )
    return Split(start, stop, name)


def _end(fields: Fields, argument: str, text: str, *, of_years: bool, is_stop: bool) -> int:
    """The index of one end of a range, which is an index or a date."""
    if text.isdigit() and not (len(text) == 4 and of_years):
        index = int(text)
        largest = len(fields) if is_stop else len(fields) - 1
        inside = index <= largest
    else:
        index, inside = _date_end(fields, _parse_date(argument, text), is_stop)
    if not inside:
        raise ValueError(
            f"{argument}: {text} is outside the record, which spans {_span(fields)}; "
            "name a part of it."
        )
    return index


def _parse_date(argument: str, text: str) -> np.datetime64:
    if not re.match(r"\d{4}($|-)", text):
        raise ValueError(
            f"{argument}: {text!r} is no index and no ISO date; write 504, 1979, 1979-01-31 or "
            "1979-01-31T06."
        )
    try:
        return np.datetime64(text.removesuffix("Z"))
    except ValueError:
        raise ValueError(
            f"{argument}: {text!r} is no date; write 1979, 1979-01, 1979-01-31 or 1979-01-31T06."
        ) from None


def _date_end(fields: Fields, date: np.datetime64, is_stop: bool) -> tuple[int, bool]:
    """The index of an end that is a date or a time, and whether it lies inside the record."""
    begin = date.astype(SECONDS)
    first, last = fields.times[0], fields.times[-1]
    if np.datetime_data(date.dtype)[0] in "YMD":
        end = (date + 1).astype(SECONDS)
        inside = begin <= last and end > first
        return int(np.searchsorted(fields.times, end if is_stop else begin)), inside
    if is_stop:  # it may be the time after the last one
        last = last + np.timedelta64(fields.step_hours, "h")
    return int(np.searchsorted(fields.times, begin)), first <= begin <= last


def _span(fields: Fields) -> str:
    return f"0/{len(fields)} ({fields.times[0]} to {fields.times[-1]}, every {fields.step_hours} h)"
