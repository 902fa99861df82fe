"""What is learnt from the training part of a record: the scales of its fields, its climatology, and how anomalies decay.

Two passes over the training times, in pieces: the decay of anomalies needs the climatology first.  Sums are float64.
"""

import contextlib
import hashlib
import os
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import fields as names_of
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import Fields, Split, expect_finite
from .field_files import SECONDS

VERSION = 2  # of the file
PIECE = 2**26  # bytes of float64 that are worked on at once, or one time
TWO_YEARS = 2 * 365 * 24  # hours

Watch = Callable[[int, int], None]  # told how many times were read, and of how many


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one training part, for C channels and L leads.  All points count alike, whatever their area."""

    channels: tuple[str, ...]
    leads: tuple[int, ...]  # hours
    mean: np.ndarray  # [C] float64, over all times and points
    std: np.ndarray  # [C] float64, the same
    std_change: np.ndarray  # [L, C] float64: standard deviation of x(t + lead) - x(t)
    slots: np.ndarray  # [K] int64: the times of day that occur, seconds since 0 UTC
    climate: (
        np.ndarray
    )  # [M, K, C, H, W] float32: means by time of day; M = 12: by month, too; M = 1: of all times
    damping: (
        np.ndarray
    )  # [L, C] float64: r of a(t + lead) ~ r a(t), for anomalies a of all points together
    damping_map: np.ndarray  # [L, C, H, W] float32: the same point by point
    std_damped: (
        np.ndarray
    )  # [L, C] float64: root mean square of what the damping leaves, a(t + lead) - r a(t)
    identity: str  # sha256 of the record, the part and the leads

    def climatology(self, times: np.ndarray) -> np.ndarray:
        """[n, C, H, W] float32: what is usual at these times (datetime64).

        The mean of the time of day; with M = 12 interpolated linearly between the middles of the two nearest months.
        Raises ValueError for a time of day that did not occur in training."""
        times = np.atleast_1d(np.asarray(times)).astype(SECONDS)
        slot = _slot(times, self.slots)
        if len(self.climate) == 1:
            return self.climate[0][slot]
        before, after, weight = _months(times)
        w = weight.astype(np.float32)[:, None, None, None]
        return (1 - w) * self.climate[before, slot] + w * self.climate[after, slot]

    def lead_index(self, lead: int) -> int:
        """Where a lead (hours) lies in `leads`; ValueError if it does not."""
        if lead not in self.leads:
            raise ValueError(
                f"lead {lead} h is not in the statistics, which have {', '.join(map(str, self.leads))} h."
            )
        return self.leads.index(lead)


def statistics(
    fields: Fields,
    split: Split,
    leads: Sequence[int],
    *,
    cache: "Path | None",
    progress: "Watch | None" = None,
) -> Statistics:
    """The statistics of the times of `split`, for changes over `leads` hours within it.

    The climatology is by time of day; from two years of training on, by month and time of day.  The damping is the least
    squares slope through the origin, r = sum a(t) a(t + lead) / sum a(t)^2 over all t with t + lead in the part (Wilks,
    Statistical Methods in the Atmospheric Sciences, 9.3.1: the lag autocorrelation, as of a first-order autoregression); 0
    where anomalies are.

    Args:
        leads: hours, multiples of the record's step.
        cache: folder of a file with the result, named after record, part and leads; None: no file.
        progress: told of each piece; None: a bar at a terminal.

    Raises:
        ValueError: a lead that does not fit step or part, missing values, a channel that is constant, or a time of day that
            the record has and the part has not.  OSError: the cache cannot be written."""
    steps = lead_steps(fields, leads)
    for lead, lag in zip(leads, steps, strict=True):
        expect_room(split, lag, lead)
    identity = _identity(fields, split, leads)
    file = None if cache is None else Path(cache) / f"statistics-{identity[:20]}.npz"
    if file is not None and (found := _load(file, identity)) is not None:
        return found
    with _bar(2 * len(split)) if progress is None else contextlib.nullcontext(progress) as watch:
        made = _make(fields, split, tuple(leads), steps, identity, watch)
    if file is not None:
        _save(file, made)
    return made


def lead_steps(fields: Fields, leads: Sequence[int], what: str = "leads") -> list[int]:
    """Each lead in steps of the record.  ValueError for none, one twice, and one that is no positive multiple of the step."""
    if not len(leads):
        raise ValueError(f"{what} is empty; name one or more, in hours.")
    for i, lead in enumerate(leads):
        if lead <= 0 or lead % fields.step_hours:
            raise ValueError(
                f"{what}: {lead} h is no positive multiple of the record's step, {fields.step_hours} h; choose another."
            )
        if lead in leads[:i]:
            raise ValueError(f"{what}: {lead} h is there twice; name it once.")
    return [int(lead) // fields.step_hours for lead in leads]


def expect_room(split: Split, lag: int, lead: int, history: int = 0) -> None:
    """ValueError if no time of the part is followed, within it, by one `lag` steps later: a lead and a history, in hours."""
    if len(split) <= lag:
        seen = f" and a history of {history} h" if history else ""
        raise ValueError(
            f"{split.name} has {len(split)} times ({split.start}/{split.stop}), too few for a lead of {lead} h{seen}, which takes "
            f"{lag + 1}; make it longer, or {'these' if history else 'the leads'} shorter."
        )


# ---- making


def _make(
    fields: Fields,
    split: Split,
    leads: tuple[int, ...],
    steps: list[int],
    identity: str,
    watch: Watch,
) -> Statistics:
    height, width = fields.grid.shape
    shape = (len(fields.channels), height, width)
    times = fields.times[split.start : split.stop]
    slots = np.unique(_seconds_of_day(fields.times))
    months = 12 if len(split) * fields.step_hours >= TWO_YEARS else 1
    month, slot = _groups(times, months), _slot(times, slots)
    _expect_all_groups(fields, split, month, slot, months, slots)

    values, changes = _Moments(shape[0]), [_Moments(shape[0]) for _ in steps]
    sums = np.zeros((months, len(slots), *shape))
    done = 0
    for piece in _pieces(fields, split, max(steps)):
        expect_finite(fields, split.start + piece.at + np.arange(len(piece.new)), piece.new)
        values.add(piece.new)
        for lag, change in zip(steps, changes, strict=True):
            later, earlier = piece.pairs(lag)
            if len(later):
                change.add(later - earlier)
        for i, x in enumerate(piece.new, piece.at):
            sums[month[i], slot[i]] += x
        done += len(piece.new)
        watch(done, 2 * len(split))
    counts = np.zeros((months, len(slots)))
    np.add.at(counts, (month, slot), 1)
    climate = sums / counts[:, :, None, None, None]
    mean, std, std_change = (
        values.mean,
        values.std(),
        np.stack([change.std() for change in changes]),
    )
    _expect_varied(fields, split, mean, std, std_change)

    partial = Statistics(
        *(fields.channels, leads, mean, std, std_change, slots, climate.astype(np.float32)),
        *(np.empty(0), np.empty(0), np.empty(0), identity),
    )
    products, squares, after = np.zeros((3, len(steps), *shape))
    for piece in _pieces(fields, split, max(steps)):
        anomalies = piece.less(partial.climatology(times[piece.first : piece.at + len(piece.new)]))
        for i, lag in enumerate(steps):
            later, earlier = anomalies.pairs(lag)
            products[i] += (later * earlier).sum(0)
            squares[i] += (earlier * earlier).sum(0)
            after[i] += (later * later).sum(0)
        done += len(piece.new)
        watch(done, 2 * len(split))
    damping = _ratio(products.sum((2, 3)), squares.sum((2, 3)))
    left = after.sum((2, 3)) - damping * products.sum((2, 3))  # of a least squares fit
    pairs = height * width * (len(split) - np.array(steps))[:, None]
    return Statistics(
        *(fields.channels, leads, mean, std, std_change, slots, partial.climate),
        *(
            damping,
            _ratio(products, squares).astype(np.float32),
            np.sqrt(np.maximum(left, 0) / pairs),
            identity,
        ),
    )


@dataclass(frozen=True)
class _Piece:
    """Some times of the part and those before them, as far as the longest lead reaches."""

    first: int  # of `values`, counted from the part's start
    at: int  # of the new ones
    values: np.ndarray  # [n, C, H, W] float64

    @property
    def new(self) -> np.ndarray:
        return self.values[self.at - self.first :]

    def pairs(self, lag: int) -> tuple[np.ndarray, np.ndarray]:
        """The new times that have one `lag` steps before them in the part, and those."""
        begin = max(self.at - self.first, lag)
        return self.values[begin:], self.values[begin - lag : max(len(self.values) - lag, 0)]

    def less(self, climatology: np.ndarray) -> "_Piece":
        return _Piece(self.first, self.at, self.values - climatology)


def _pieces(fields: Fields, split: Split, reach: int) -> Iterator[_Piece]:
    height, width = fields.grid.shape
    size = max(1, PIECE // (8 * len(fields.channels) * height * width))
    before = np.empty((0, len(fields.channels), height, width), np.float32)
    for at in range(0, len(split), size):
        new = fields.read(range(split.start + at, min(split.start + at + size, split.stop)))
        both = np.concatenate([before, new])
        yield _Piece(at - len(before), at, both.astype(np.float64))
        before = both[-reach:]


class _Moments:
    """Mean and variance per channel of what comes in pieces: Chan, Golub and LeVeque 1983, The American Statistician 37."""

    def __init__(self, channels: int):
        self.count, self.mean, self._squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, values: np.ndarray) -> None:
        """[n, C, H, W] float64."""
        count = values.size // values.shape[1]
        mean = values.mean((0, 2, 3))
        squares = np.square(values - mean[:, None, None]).sum((0, 2, 3))
        apart, total = mean - self.mean, self.count + count
        self._squares += squares + apart**2 * self.count * count / total
        self.mean = self.mean + apart * count / total
        self.count = total

    def std(self) -> np.ndarray:
        return np.sqrt(self._squares / self.count)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


# ---- groups of times


def _seconds_of_day(times: np.ndarray) -> np.ndarray:
    return (times - times.astype("datetime64[D]")).astype(np.int64)


def _slot(times: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """[n]: the index of each time's time of day."""
    seconds = _seconds_of_day(times)
    at = np.minimum(np.searchsorted(slots, seconds), len(slots) - 1)
    if (strange := slots[at] != seconds).any():
        known = ", ".join(f"{s // 3600:02d}:{s // 60 % 60:02d}" for s in slots)
        raise ValueError(
            f"time {times[strange][0]}: the climatology has no such time of day, but {known} UTC."
        )
    return at


def _groups(times: np.ndarray, months: int) -> np.ndarray:
    """[n]: the month 0..11 of each time; 0 where months are not told apart."""
    return (
        times.astype("datetime64[M]").astype(np.int64) % 12
        if months == 12
        else np.zeros(len(times), np.int64)
    )


def _months(times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The months 0..11 whose middles lie before and after each time, and the weight of the latter."""
    month = times.astype("datetime64[M]")
    first = month - (times < _middle(month)).astype(np.int64)
    weight = (times - _middle(first)) / (_middle(first + 1) - _middle(first))
    return first.astype(np.int64) % 12, (first + 1).astype(np.int64) % 12, weight


def _middle(month: np.ndarray) -> np.ndarray:
    begin, end = month.astype(SECONDS), (month + 1).astype(SECONDS)
    return begin + (end - begin) // 2


def _expect_all_groups(
    fields: Fields,
    split: Split,
    month: np.ndarray,
    slot: np.ndarray,
    months: int,
    slots: np.ndarray,
) -> None:
    seen = np.zeros((months, len(slots)), bool)
    seen[month, slot] = True
    if not seen.all():
        m, k = np.argwhere(~seen)[0]
        of_month = f" in month {m + 1}" if months == 12 else ""
        raise ValueError(
            f"{split.name} ({split.start}/{split.stop}) has no time at {slots[k] // 3600:02d}:{slots[k] // 60 % 60:02d} UTC"
            f"{of_month}, but the record has; make {split.name} longer."
        )


def _expect_varied(
    fields: Fields, split: Split, mean: np.ndarray, std: np.ndarray, std_change: np.ndarray
) -> None:
    for c, name in enumerate(fields.channels):
        if std[c] <= 1e-9 * abs(mean[c]):  # float32 resolves 1e-7
            raise ValueError(
                f"channel {name} is {mean[c]:g} everywhere in {split.name}; leave it out with --variables."
            )
        if (std_change[:, c] == 0).any():
            raise ValueError(
                f"channel {name} does not change in time in {split.name}; leave it out with --variables."
            )


# ---- the file


def _identity(fields: Fields, split: Split, leads: Sequence[int]) -> str:
    text = f"{VERSION} {fields.identity} {split.start} {split.stop} {[int(lead) for lead in leads]}"
    return hashlib.sha256(text.encode()).hexdigest()


def _save(file: Path, made: Statistics) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("xb") as f:
            contents: dict[str, Any] = {
                field.name: np.asarray(getattr(made, field.name)) for field in names_of(made)
            }
            np.savez(f, **contents)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def _load(file: Path, identity: str) -> "Statistics | None":
    """What the file holds; None if it is not there or broken, which is said."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            found = {field.name: stored[field.name] for field in names_of(Statistics)}
        if str(found["identity"]) != identity:
            raise ValueError("it is of another record")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        print(
            f"{file} is broken ({e}); its statistics are made again.", file=sys.stderr, flush=True
        )
        return None
    found["channels"] = tuple(str(name) for name in found["channels"])
    found["leads"] = tuple(int(lead) for lead in found["leads"])
    found["identity"] = identity
    return Statistics(**found)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Watch]:
    """A bar at a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("statistics of the training times", total=total)
        yield lambda done, _: bar.update(task, completed=done)
