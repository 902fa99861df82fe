"""A climate record as a model sees it: fields at evenly spaced times, and the parts to train, validate and test on.

    fields = open_fields("era5.nc", variables=["t2m"])
    parts = splits(fields, train="1979/2015", val="2016/2017", test="2018")
    fields.read([parts["train"].start])                                          # [1, C, H, W], physical units

``apps.vit.data.field_files`` says which files are understood, ``apps.vit.data.statistics`` what is learnt from the training part, and
``apps.vit.data.samples`` makes pairs of input and target.
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

STATIC = (  # variables that some records repeat at every time; taken as static if the first and the last field agree
    *(
        "lsm",
        "land_sea_mask",
        "orog",
        "orography",
        "z_sfc",
        "geopotential_at_surface",
        "slt",
        "soil_type",
    ),
    *(
        "cvl",
        "cvh",
        "low_vegetation_cover",
        "high_vegetation_cover",
        "sdor",
        "standard_deviation_of_orography",
    ),
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
        sources: Sequence[FieldFile],
        channels: Sequence[str],
        static: "dict[str, np.ndarray]",
        given: "tuple[np.ndarray | None, np.ndarray | None]" = (None, None),
    ):
        self._sources = list(sources)
        self._starts = np.cumsum([0, *(len(s.times) for s in sources)])
        self.channels = tuple(channels)
        self.grid = sources[0].grid
        self.times = np.concatenate([s.times for s in sources])
        self.step_hours = self._step()
        self.units = {name: sources[0].channels[name].units for name in channels}
        self.long_names = {name: sources[0].channels[name].long_name for name in channels}
        self.static = static
        self.given_mean, self.given_std = given
        names = [s.file.name for s in sources]
        files = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}, {len(names)} files"
        self.source = f"{sources[0].title} ({files})" if sources[0].title else files

    def __len__(self) -> int:
        return len(self.times)

    def read(self, indices: "Sequence[int] | np.ndarray") -> np.ndarray:
        """[n, C, H, W] float32 at these times, in this order, in physical units, north to south.

        Raises ValueError for an index outside the record, and for a file that cannot be read."""
        wanted = np.atleast_1d(np.asarray(indices, np.int64))
        if bad := [int(i) for i in wanted if not 0 <= i < len(self)]:
            raise ValueError(
                f"index {bad[0]} is not one of the record's times 0..{len(self) - 1} ({self.source})."
            )
        unique, inverse = np.unique(wanted, return_inverse=True)
        out = np.empty((len(unique), len(self.channels), *self.grid.shape), np.float32)
        files = np.searchsorted(self._starts, unique, "right") - 1
        jumps = np.flatnonzero((np.diff(unique) != 1) | (np.diff(files) != 0)) + 1
        for a, b in itertools.pairwise([0, *jumps.tolist(), len(unique)]):
            if a < b:
                first = int(unique[a] - self._starts[files[a]])
                out[a:b] = self._sources[files[a]].read(self.channels, slice(first, first + b - a))
        return out if np.array_equal(unique, wanted) else out[inverse]

    @cached_property
    def identity(self) -> str:
        """sha256 of channels, grid, times and the sizes of the files: equal on all ranks and for a copy of the files.

        Of a Zarr store, looks at each chunk's size: let one rank ask."""
        sha = hashlib.sha256("\n".join(self.channels).encode())
        for array in (self.grid.lat, self.grid.lon, self.times.astype(np.int64)):
            sha.update(f"{array.shape}".encode() + array.tobytes())
        sha.update(str([s.size(self.channels) for s in self._sources]).encode())
        return sha.hexdigest()

    def _step(self) -> int:
        """Hours between times; ValueError where they are not all the same."""
        if len(self.times) < 2:
            raise ValueError(
                f"{self._sources[0].file}: a record needs two times at least, but there is {len(self.times)}."
            )
        gaps = np.diff(self.times).astype(np.int64)
        for wrong, what in ((gaps == 0, "occurs twice"), (gaps < 0, "comes after a later time")):
            if wrong.any():
                at = int(wrong.argmax()) + 1
                raise ValueError(
                    f"{self._file(at)}: time {self.times[at]} {what}; times must ascend: remove or sort them."
                )
        lengths, counts = np.unique(gaps, return_counts=True)
        step = int(lengths[counts.argmax()])
        if len(lengths) > 1:
            at = int((gaps != step).argmax())
            raise ValueError(
                f"{self._file(at + 1)}: times are unevenly spaced: {gaps[at] / 3600:g} h from {self.times[at]} to "
                f"{self.times[at + 1]}, but {step / 3600:g} h elsewhere; fill the gap, or open the parts as records of their own."
            )
        if step % 3600:
            raise ValueError(
                f"{self._file(0)}: times are {step / 3600:g} h apart; only whole hours are read: resample it."
            )
        return step // 3600

    def _file(self, index: int) -> Path:
        return self._sources[int(np.searchsorted(self._starts, index, "right")) - 1].file


def open_fields(
    path_or_paths: "str | Path | Sequence[str | Path]",
    *,
    variables: "Sequence[str] | None" = None,
    levels: "Sequence[float] | None" = None,
    channel_names: "Sequence[str] | None" = None,
) -> Fields:
    """One record from a file, several that follow each other in time, a folder, a glob, or a Zarr store.  Reads no fields yet.

    Args:
        path_or_paths: NetCDF (.nc), Zarr (.zarr), or HDF5 (.h5) as ``apps.vit.data.field_files`` describes them.  A file without time adds
            static fields.
        variables: channels in this order, by their variable ("z": all its levels) or their own name ("z500"); None: all.
        levels: of 3-D variables, hPa; None: all.
        channel_names: of HDF5 files, which often hold none.

    Raises:
        ValueError: one line that names the file: it cannot be read, has no time, a time missing or twice, an irregular grid,
            or differs from the others in grid, channels or units; or an argument: a name that is not there."""
    files = find_files(path_or_paths)
    hdf5 = [file for file in files if file.suffix in HDF5 and file.is_file()]
    if channel_names is not None and not hdf5:
        raise ValueError(
            f"channel_names={list(channel_names)} is for HDF5 files, and {files[0]} is none; use variables."
        )
    opened: list[FieldFile] = [
        Hdf5File(file, channel_names) if file in hdf5 else XarrayFile(file) for file in files
    ]
    sources = sorted((s for s in opened if len(s.times)), key=lambda s: s.times[0])
    if not sources:
        raise ValueError(
            f"{files[0]}: it has no times; name a file with fields that change in time."
        )
    first = sources[0]
    for source in opened:
        _expect_same_grid(first, source)
    static: dict[str, np.ndarray] = {}
    for source in opened:
        static = {**source.statics(), **static}
    repeated = {} if variables is not None else _repeated(sources)
    channels = [name for name in _select(first, variables, levels, static) if name not in repeated]
    if not channels:
        raise ValueError(
            f"{first.file}: no variable has time, latitude and longitude; name another file."
        )
    for source in sources[1:]:
        _expect_same_channels(first, source, channels)
    return Fields(
        sources,
        channels,
        {**static, **repeated},
        _given(first, channels) if first.file in hdf5 else (None, None),
    )


def _select(
    first: FieldFile,
    variables: "Sequence[str] | None",
    levels: "Sequence[float] | None",
    static: "dict[str, np.ndarray]",
) -> list[str]:
    """The channels that are asked for, or all."""
    known = first.channels
    if refused := [v for v in first.refused if variables is None or v in variables]:
        raise ValueError(
            f"{first.file}: {refused[0]} {first.refused[refused[0]]}, or leave it out with variables."
        )
    asked = list(known) if variables is None else list(variables)
    if levels is not None:
        there = sorted({c.hpa for c in known.values() if c.hpa is not None})
        if missing := [level for level in levels if level not in there]:
            text = ", ".join(f"{level:g}" for level in there) or "none"
            raise ValueError(f"levels: {missing[0]:g} hPa is not in {first.file}; it has {text}.")
    chosen: list[str] = []
    for name in asked:
        found = [
            n for n, c in known.items() if name == n or (name == c.variable and name != "fields")
        ]
        if not found:
            hint = " (it is static: it comes along without being named)" if name in static else ""
            raise ValueError(
                f"variables: {name!r} is not a channel of {first.file}{hint}; it has {', '.join(known)}."
            )
        wanted = [
            n for n in found if levels is None or known[n].hpa is None or known[n].hpa in levels
        ]
        if not wanted and variables is not None:
            raise ValueError(
                f"variables: {name!r} is at none of levels={list(levels or ())}; leave out one or the other."
            )
        chosen += [n for n in wanted if n not in chosen]
    return chosen


def _repeated(sources: list[FieldFile]) -> dict[str, np.ndarray]:
    """Known static variables that have a time nevertheless, and do not change from the first time to the last."""
    found = {}
    last = len(sources[-1].times) - 1
    for name in STATIC:
        if all(name in s.channels for s in sources):
            before = sources[0].read([name], slice(0, 1))[0, 0]
            after = sources[-1].read([name], slice(last, last + 1))[0, 0]
            if np.array_equal(before, after, equal_nan=True):
                found[name] = before
    return found


def _expect_same_grid(first: FieldFile, other: FieldFile) -> None:
    for kind in ("lat", "lon"):
        a, b = getattr(first.grid, kind), getattr(other.grid, kind)
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=1e-4):
            raise ValueError(
                f"{other.file}: its grid differs from that of {first.file} ({kind}: {len(b)} from {b[0]:g} to {b[-1]:g}, not "
                f"{len(a)} from {a[0]:g} to {a[-1]:g}); bring all files to one grid."
            )


def _expect_same_channels(first: FieldFile, other: FieldFile, channels: list[str]) -> None:
    for name in channels:
        if name not in other.channels:
            raise ValueError(
                f"{other.file}: {name} of {first.file} is not in it (it has {', '.join(other.channels) or 'no channel'}); files "
                f"must hold the same variables and follow each other in time: merge those of different variables first."
            )
        if (a := first.channels[name].units) != (b := other.channels[name].units):
            raise ValueError(
                f"{other.file}: {name} is in {b!r}, but in {a!r} in {first.file}; bring all files to one unit."
            )


def _given(first: FieldFile, channels: list[str]) -> "tuple[np.ndarray | None, np.ndarray | None]":
    """[C] float64 of global_means.npy and global_stds.npy in the files' folder, in stats/ in it, or beside it."""
    folder = first.file.parent

    def load(name: str) -> "np.ndarray | None":
        places = (folder, folder / "stats", folder.parent, folder.parent / "stats")
        file = next((place / name for place in places if (place / name).is_file()), None)
        if file is None:
            return None
        with reading(file):
            values = np.load(file, allow_pickle=False).astype(np.float64).ravel()
        if len(values) != len(first.channels):
            raise ValueError(
                f"{file}: it holds {len(values)} values, but {first.file} has {len(first.channels)} channels."
            )
        by_name = dict(zip(first.channels, values, strict=True))
        return np.array([by_name[name] for name in channels])

    return load("global_means.npy"), load("global_stds.npy")


def expect_finite(fields: Fields, indices: np.ndarray, values: np.ndarray) -> None:
    """ValueError if a value of [n, C, H, W] at these times is missing: names the channel, the first time, and how many points."""
    if np.isfinite(values).all():
        return
    missing = ~np.isfinite(values)
    i, c = (int(at) for at in np.argwhere(missing.any((2, 3)))[0])
    raise ValueError(
        f"{fields.source}: channel {fields.channels[c]} is missing (or infinite) at {missing[i, c].sum()} of {missing[i, c].size} "
        f"points at {fields.times[indices[i]]}; leave the channel out with --variables, or fill it."
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
    fields: Fields, train: "str | None" = None, val: "str | None" = None, test: "str | None" = None
) -> dict[str, Split]:
    """The parts of a record by name.  All None: the first 70 % of the times, the next 15 %, the rest.

    Each is "start/stop", or one period.  An end is an index ("0/504": 504 is not part of it), or an ISO date or time.  A stop
    that is a year, month or day includes all of it ("1979/2015" ends with 2015); one with a time of day is not part of it.  A
    number of four digits is a year where that range names a year of the record, and an index elsewhere; "02015" is an index.

    Raises ValueError, which names the part and what the record spans: an empty or backwards range, one that is not in the
    record, ranges that overlap, or only some of the three."""
    given = {"train": train, "val": val, "test": test}
    if all(text is None for text in given.values()):
        a, b = (len(fields) * percent // 100 for percent in (70, 85))
        found = {
            "train": Split(0, a, "train"),
            "val": Split(a, b, "val"),
            "test": Split(b, len(fields), "test"),
        }
        if not all(len(split) for split in found.values()):
            raise ValueError(
                f"train, val and test cannot be made of a record that spans {_span(fields)}; open a longer one."
            )
        return found
    if missing := [name for name, text in given.items() if text is None]:
        raise ValueError(f"{missing[0]} is not given; give all of train, val and test, or none.")
    found = {name: _range(fields, name, str(text)) for name, text in given.items()}
    for one, other in itertools.combinations(found.values(), 2):
        if one.start < other.stop and other.start < one.stop:
            raise ValueError(
                f"{one.name}={given[one.name]!r} and {other.name}={given[other.name]!r} overlap at "
                f"{fields.times[max(one.start, other.start)]}; part them (the record spans {_span(fields)})."
            )
    return found


def _range(fields: Fields, name: str, text: str) -> Split:
    ends = [end.strip() for end in text.split("/")]
    if len(ends) > 2 or not all(ends):
        raise ValueError(
            f"{name}={text!r} must be START/STOP of indices or dates, such as 0/504 or 1979/2015."
        )
    if len(ends) == 1 and ends[0].isdigit() and len(ends[0]) != 4:
        raise ValueError(f"{name}={text!r} is one index; name START/STOP, such as 0/504.")
    years = {str(year) for year in fields.times.astype("datetime64[Y]")}
    of_years = bool(years & set(ends))
    start = _end(fields, name, text, ends[0], of_years, is_stop=False)
    stop = _end(fields, name, text, ends[-1], of_years, is_stop=True)
    if start >= stop:
        raise ValueError(
            f"{name}={text!r} is empty or backwards (indices {start}/{stop}); the record spans {_span(fields)}."
        )
    return Split(start, stop, name)


def _end(fields: Fields, name: str, text: str, end: str, of_years: bool, *, is_stop: bool) -> int:
    """The index of one end of a range."""
    outside = ValueError(
        f"{name}={text!r}: {end} is outside the record, which spans {_span(fields)}; name a part of it."
    )
    if end.isdigit() and not (len(end) == 4 and of_years):
        if int(end) > len(fields) - (not is_stop):
            raise outside
        return int(end)
    if not re.match(r"\d{4}($|-)", end):
        raise ValueError(
            f"{name}={text!r}: {end!r} is no index and no ISO date; write 504, 1979, 1979-01-31 or 1979-01-31T06."
        )
    try:
        date = np.datetime64(end.removesuffix("Z"))
    except ValueError:
        raise ValueError(
            f"{name}={text!r}: {end!r} is no date; write 1979, 1979-01, 1979-01-31 or 1979-01-31T06."
        ) from None
    begins, length = date.astype(SECONDS), np.timedelta64(fields.step_hours, "h")
    if np.datetime_data(date.dtype)[0] in "YMD":
        ends = (date + 1).astype(SECONDS)
        if begins > fields.times[-1] or ends <= fields.times[0]:
            raise outside
        return int(np.searchsorted(fields.times, ends if is_stop else begins))
    if begins < fields.times[0] or begins > fields.times[-1] + (
        length if is_stop else np.timedelta64(0, "s")
    ):
        raise outside
    return int(np.searchsorted(fields.times, begins))


def _span(fields: Fields) -> str:
    return f"0/{len(fields)} ({fields.times[0]} to {fields.times[-1]}, every {fields.step_hours} h)"
