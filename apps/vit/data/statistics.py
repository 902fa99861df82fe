"""What is learnt from the training part of a record: scales, climatology, and decay of anomalies.

The training times are read twice, in pieces, because the decay of anomalies needs the climatology
first.  Sums are float64.
"""

import contextlib
import hashlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import fields as names_of
from pathlib import Path
from typing import Any

import numpy as np

from ringx.files import write_file

from .dataset import Fields, Split, expect_finite
from .field_files import SECONDS

VERSION = 2  # of the file
PIECE = 2**26  # bytes of float64 that are worked on at once, or one time
TWO_YEARS = 2 * 365 * 24  # hours

# Is called with how many times were read, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one training part, for C channels and L leads.

    All points count alike, whatever their area.

    Attributes:
        channels: C names.
        leads: L, in hours.
        mean, std: [C] float64, over all times and points.
        std_change: [L, C] float64: standard deviation of x(t + lead) - x(t).
        slots: [K] int64: the times of day that occur, seconds since 0 UTC.
        climate: [M, K, C, H, W] float32: means by time of day; by month, too, where M = 12; of
            all times where M = 1.
        damping: [L, C] float64: r of a(t + lead) ~ r a(t), for anomalies a of all points together.
        damping_map: [L, C, H, W] float32: the same point by point.
        std_damped: [L, C] float64: root mean square of what the damping leaves,
            a(t + lead) - r a(t).
        identity: sha256 of the record, the part and the leads."""

    channels: tuple[str, ...]
    leads: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    std_change: np.ndarray
    slots: np.ndarray
    climate: np.ndarray
    damping: np.ndarray
    damping_map: np.ndarray
    std_damped: np.ndarray
    identity: str

    def climatology(self, times: np.ndarray) -> np.ndarray:
        """[n, C, H, W] float32: what is usual at these times (datetime64).

        The mean of the time of day; with M = 12 it is interpolated linearly between the middles
        of the two nearest months.

        Raises:
            ValueError: a time of day that did not occur in training."""
        return _climatology(self.climate, self.slots, times)

    def lead_index(self, lead: int) -> int:
        """Where a lead (hours) lies in `leads`; ValueError if it does not."""
        if lead not in self.leads:
            known = ", ".join(map(str, self.leads))
            raise ValueError(f"lead {lead} h is not in the statistics, which have {known} h.")
        return self.leads.index(lead)


def statistics(
    fields: Fields,
    split: Split,
    leads: Sequence[int],
    *,
    cache: Path | None,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics of the times of `split`, for changes over `leads` hours within it.

    The climatology is by time of day; from two years of training on, by month and time of day.
    The damping is the least squares slope through the origin, r = sum a(t) a(t + lead) / sum
    a(t)^2 over all t with t + lead in the part (Wilks, Statistical Methods in the Atmospheric
    Sciences, 9.3.1: the lag autocorrelation, as of a first-order autoregression); 0 where all
    anomalies are 0.

    Args:
        leads: hours, multiples of the record's step.
        cache: folder of a file with the result, named after record, part and leads; None: no file.
        progress: called after each piece; None: a bar at a terminal.

    Raises:
        ValueError: a lead that does not fit step or part, missing values, a channel that is
            constant, or a time of day that the record has and the part has not.
        OSError: the cache cannot be written."""
    lags = lead_steps(fields, leads)
    for lead, lag in zip(leads, lags, strict=True):
        expect_room(split, lag, lead)
    identity = _identity(fields, split, leads)
    file = None if cache is None else Path(cache) / f"statistics-{identity[:20]}.npz"
    if file is not None:
        cached = _load(file, identity)
        if cached is not None:
            return cached
    if progress is None:
        with _progress_bar(2 * len(split)) as show:
            made = _compute(fields, split, tuple(leads), lags, identity, show)
    else:
        made = _compute(fields, split, tuple(leads), lags, identity, progress)
    if file is not None:
        _save(file, made)
    return made


def lead_steps(fields: Fields, leads: Sequence[int], what: str = "leads") -> list[int]:
    """Each lead in steps of the record.

    Raises:
        ValueError: there is none, one is there twice, or one is no positive multiple of the step;
            `what` names the argument."""
    if not len(leads):
        raise ValueError(f"{what} is empty; name one or more, in hours.")
    for i, lead in enumerate(leads):
        if lead <= 0 or lead % fields.step_hours:
            raise ValueError(
                f"{what}: {lead} h is no positive multiple of the record's step, "
                f"{fields.step_hours} h; choose another."
            )
        if lead in leads[:i]:
            raise ValueError(f"{what}: {lead} h is there twice; name it once.")
    return [int(lead) // fields.step_hours for lead in leads]


def expect_room(split: Split, lag: int, lead: int, history: int = 0) -> None:
    """Checks that the part holds a time and the one `lag` steps later.

    Args:
        lag: lead and history in steps.
        lead, history: the same in hours, for the message.

    Raises:
        ValueError: it does not."""
    if len(split) > lag:
        return
    with_history = f" and a history of {history} h" if history else ""
    shorten = "these" if history else "the leads"
    raise ValueError(
        f"{split.name} has {len(split)} times ({split.start}/{split.stop}), too few for a lead of "
        f"{lead} h{with_history}, which takes {lag + 1}; make it longer, or {shorten} shorter."
    )


# ---- computing


def _compute(
    fields: Fields,
    split: Split,
    leads: tuple[int, ...],
    lags: list[int],
    identity: str,
    progress: Progress,
) -> Statistics:
    """The statistics, in two passes over the times; `progress` counts both."""
    groups = _Groups.of(fields, split)
    total = 2 * len(split)

    def first_pass(done: int) -> None:
        progress(done, total)

    def second_pass(done: int) -> None:
        progress(len(split) + done, total)

    values, changes, climate = _scales_and_climate(fields, split, lags, groups, first_pass)
    mean, std = values.mean, values.std()
    std_change = np.stack([change.std() for change in changes])
    _expect_varied(fields, split, mean, std, std_change)
    damping, damping_map, std_damped = _damping(
        fields, split, lags, climate, groups.slots, second_pass
    )
    return Statistics(
        channels=fields.channels,
        leads=leads,
        mean=mean,
        std=std,
        std_change=std_change,
        slots=groups.slots,
        climate=climate,
        damping=damping,
        damping_map=damping_map,
        std_damped=std_damped,
        identity=identity,
    )


def _scales_and_climate(
    fields: Fields,
    split: Split,
    lags: list[int],
    groups: "_Groups",
    progress: Callable[[int], None],
) -> "tuple[_Moments, list[_Moments], np.ndarray]":
    """The first pass: moments of the fields and of their changes, and [M, K, C, H, W] float32."""
    channels = len(fields.channels)
    values = _Moments(channels)
    changes = [_Moments(channels) for _ in lags]
    sums = np.zeros((*groups.shape, channels, *fields.grid.shape))
    for piece in _pieces(fields, split, max(lags)):
        indices = split.start + piece.new_start + np.arange(len(piece.new))
        expect_finite(fields, indices, piece.new)
        values.add(piece.new)
        for lag, change in zip(lags, changes, strict=True):
            later, earlier = piece.pairs(lag)
            if len(later):
                change.add(later - earlier)
        for time_index, values_of_time in enumerate(piece.new, piece.new_start):
            sums[groups.month[time_index], groups.slot[time_index]] += values_of_time
        progress(piece.stop)
    climate = sums / groups.counts()[:, :, None, None, None]
    return values, changes, climate.astype(np.float32)


def _damping(
    fields: Fields,
    split: Split,
    lags: list[int],
    climate: np.ndarray,
    slots: np.ndarray,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The second pass: `damping`, `damping_map` and `std_damped` of ``Statistics``."""
    height, width = fields.grid.shape
    times = fields.times[split.start : split.stop]
    sums = np.zeros((3, len(lags), len(fields.channels), height, width))
    products, squares_earlier, squares_later = sums
    for piece in _pieces(fields, split, max(lags)):
        usual = _climatology(climate, slots, times[piece.start : piece.stop])
        anomalies = piece.minus(usual)
        for i, lag in enumerate(lags):
            later, earlier = anomalies.pairs(lag)
            products[i] += (later * earlier).sum(0)
            squares_earlier[i] += (earlier * earlier).sum(0)
            squares_later[i] += (later * later).sum(0)
        progress(piece.stop)
    damping = _ratio(products.sum((2, 3)), squares_earlier.sum((2, 3)))
    damping_map = _ratio(products, squares_earlier).astype(np.float32)
    # The sum of squares that a least squares fit leaves.
    left = squares_later.sum((2, 3)) - damping * products.sum((2, 3))
    pairs = height * width * (len(split) - np.array(lags))[:, None]
    return damping, damping_map, np.sqrt(np.maximum(left, 0) / pairs)


@dataclass(frozen=True)
class _Piece:
    """Some times of the part, and those before them as far as the longest lead reaches.

    Attributes:
        start: the first time of `values`, counted from the part's start.
        new_start: the first time that was in no piece before, counted in the same way.
        values: [n, C, H, W] float64."""

    start: int
    new_start: int
    values: np.ndarray

    @property
    def stop(self) -> int:
        """The time after the last one, counted from the part's start."""
        return self.start + len(self.values)

    @property
    def new(self) -> np.ndarray:
        return self.values[self.new_start - self.start :]

    def pairs(self, lag: int) -> tuple[np.ndarray, np.ndarray]:
        """The new times that have one `lag` steps before them in the part, and those."""
        begin = max(self.new_start - self.start, lag)
        return self.values[begin:], self.values[begin - lag : max(len(self.values) - lag, 0)]

    def minus(self, climatology: np.ndarray) -> "_Piece":
        return _Piece(self.start, self.new_start, self.values - climatology)


def _pieces(fields: Fields, split: Split, longest_lag: int) -> Iterator[_Piece]:
    """The times of the part in order, about PIECE bytes at a time."""
    channels, (height, width) = len(fields.channels), fields.grid.shape
    size = max(1, PIECE // (8 * channels * height * width))
    before = np.empty((0, channels, height, width), np.float32)
    for new_start in range(0, len(split), size):
        first = split.start + new_start
        new = fields.read(range(first, min(first + size, split.stop)))
        values = np.concatenate([before, new])
        yield _Piece(new_start - len(before), new_start, values.astype(np.float64))
        before = values[-longest_lag:]


class _Moments:
    """Mean and variance per channel of values that come in pieces.

    Chan, Golub and LeVeque 1983, The American Statistician 37."""

    def __init__(self, channels: int):
        self.count = 0
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)

    def add(self, values: np.ndarray) -> None:
        """[n, C, H, W] float64."""
        count = values.size // values.shape[1]
        mean = values.mean((0, 2, 3))
        squares = np.square(values - mean[:, None, None]).sum((0, 2, 3))
        difference = mean - self.mean
        total = self.count + count
        self._squares += squares + difference**2 * self.count * count / total
        self.mean = self.mean + difference * count / total
        self.count = total

    def std(self) -> np.ndarray:
        return np.sqrt(self._squares / self.count)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, and 0 where the denominator is 0."""
    zeros = np.zeros_like(numerator)
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


# ---- groups of times


@dataclass(frozen=True)
class _Groups:
    """The group of the climatology, month and time of day, to which each time of a part belongs.

    Attributes:
        month: [n] of 0..11, or 0 where months are not told apart.
        slot: [n]: indices into `slots`.
        months: M, 12 or 1.
        slots: [K]: seconds since 0 UTC."""

    month: np.ndarray
    slot: np.ndarray
    months: int
    slots: np.ndarray

    @classmethod
    def of(cls, fields: Fields, split: Split) -> "_Groups":
        """ValueError where the part has no time of a group that the record has."""
        times = fields.times[split.start : split.stop]
        slots = np.unique(_seconds_of_day(fields.times))
        month = np.zeros(len(times), np.int64)
        months = 1
        if len(split) * fields.step_hours >= TWO_YEARS:
            month = times.astype("datetime64[M]").astype(np.int64) % 12
            months = 12
        groups = cls(month, _slot(times, slots), months, slots)
        groups._expect_all(split)
        return groups

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.months, len(self.slots)

    def counts(self) -> np.ndarray:
        """[M, K] float64: how many times each group has."""
        counts = np.zeros(self.shape)
        np.add.at(counts, (self.month, self.slot), 1)
        return counts

    def _expect_all(self, split: Split) -> None:
        empty = self.counts() == 0
        if empty.any():
            month, slot = np.argwhere(empty)[0]
            of_month = f" in month {month + 1}" if self.months == 12 else ""
            raise ValueError(
                f"{split.name} ({split.start}/{split.stop}) has no time at "
                f"{_clock(self.slots[slot])} UTC{of_month}, but the record has; "
                f"make {split.name} longer."
            )


def _climatology(climate: np.ndarray, slots: np.ndarray, times: np.ndarray) -> np.ndarray:
    """``Statistics.climatology`` of its `climate` and `slots`."""
    times = np.atleast_1d(np.asarray(times)).astype(SECONDS)
    slot = _slot(times, slots)
    if len(climate) == 1:
        return climate[0][slot]
    before, after, weight = _nearest_months(times)
    weight = weight.astype(np.float32)[:, None, None, None]
    return (1 - weight) * climate[before, slot] + weight * climate[after, slot]


def _seconds_of_day(times: np.ndarray) -> np.ndarray:
    return (times - times.astype("datetime64[D]")).astype(np.int64)


def _slot(times: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """[n]: the index of each time's time of day; ValueError where it is none of the slots."""
    seconds = _seconds_of_day(times)
    indices = np.minimum(np.searchsorted(slots, seconds), len(slots) - 1)
    unknown = slots[indices] != seconds
    if unknown.any():
        known = ", ".join(_clock(slot) for slot in slots)
        raise ValueError(
            f"time {times[unknown][0]}: the climatology has no such time of day, but {known} UTC."
        )
    return indices


def _clock(seconds: int) -> str:
    """Hours and minutes of a time of day, as 06:00."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}"


def _nearest_months(times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The months 0..11 whose middles lie before and after each time; the weight of the latter."""
    month = times.astype("datetime64[M]")
    first = month - (times < _middle(month)).astype(np.int64)
    weight = (times - _middle(first)) / (_middle(first + 1) - _middle(first))
    return first.astype(np.int64) % 12, (first + 1).astype(np.int64) % 12, weight


def _middle(month: np.ndarray) -> np.ndarray:
    begin, end = month.astype(SECONDS), (month + 1).astype(SECONDS)
    return begin + (end - begin) // 2


def _expect_varied(
    fields: Fields, split: Split, mean: np.ndarray, std: np.ndarray, std_change: np.ndarray
) -> None:
    """ValueError for a channel that is constant in space and time, or in time."""
    for index, name in enumerate(fields.channels):
        if std[index] <= 1e-9 * abs(mean[index]):  # float32 resolves 1e-7
            raise ValueError(
                f"channel {name} is {mean[index]:g} everywhere in {split.name}; "
                "leave it out with --variables."
            )
        if (std_change[:, index] == 0).any():
            raise ValueError(
                f"channel {name} does not change in time in {split.name}; "
                "leave it out with --variables."
            )


# ---- the file


def _identity(fields: Fields, split: Split, leads: Sequence[int]) -> str:
    text = f"{VERSION} {fields.identity} {split.start} {split.stop} {[int(lead) for lead in leads]}"
    return hashlib.sha256(text.encode()).hexdigest()


def _save(file: Path, made: Statistics) -> None:
    contents: dict[str, Any] = {
        field.name: np.asarray(getattr(made, field.name)) for field in names_of(made)
    }

    def fill(aside: Path) -> None:
        with aside.open("xb") as f:
            np.savez(f, **contents)

    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, fill, replace=True)


def _load(file: Path, identity: str) -> Statistics | None:
    """What the file holds; None if it is not there, or broken, which a line on stderr reports."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            contents = {field.name: stored[field.name] for field in names_of(Statistics)}
        if str(contents["identity"]) != identity:
            raise ValueError("it is of another record")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        print(
            f"{file} is broken ({e}); its statistics are made again.", file=sys.stderr, flush=True
        )
        return None
    contents["channels"] = tuple(str(name) for name in contents["channels"])
    contents["leads"] = tuple(int(lead) for lead in contents["leads"])
    contents["identity"] = identity
    return Statistics(**contents)


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Progress]:
    """A bar at a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("statistics of the training times", total=total)

        def show(done: int, _: int) -> None:
            bar.update(task, completed=done)

        yield show
