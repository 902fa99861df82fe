"""Pairs of input and target: the state and what is known of the time and the place, and how the state then changes."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ringx.checks import require_name

from ..scores import damped_anomaly
from .dataset import Fields, Split, expect_finite
from .statistics import Statistics, expect_room, lead_steps

INPUTS = ("time_of_day", "time_of_year", "latitude", "static", "climatology")
BASES = ("none", "persistence", "damped")
WHERE = ("inside", "valid")
DEFAULT_INPUTS = ("time_of_day", "time_of_year", "latitude", "climatology")
SHORT = 60 * 24  # hours: in a shorter record the time of year is a trend, and nothing to learn from
YEAR = 365.2425 * 86400  # seconds


class Samples:
    """The samples of one part of a record.  A sample is named by the index of its initial time t0 in the record.

    Inputs, all float32, in this order (``input_names``):
        each channel at t0, less its mean, divided by its standard deviation;
        its change since each time of `history`, divided by the standard deviation of such changes;
        time_of_day: sine and cosine of the local solar time at t0 (UTC + longitude / 15 degrees an hour);
        time_of_year: sine and cosine of the time since the year began; left out where the record is shorter than 60 days;
        latitude: its sine;
        static: each static field, less its mean, divided by its standard deviation (0 where it is constant);
        climatology: normalised as the channels, of each lead's valid time and then of t0.
    Targets: what a simple forecast, `base`, leaves to be forecast, divided by its size in training: x(t0 + lead) less the
    channel's mean, as it is common, for none; x(t0 + lead) - x(t0) for persistence; a(t0 + lead) - r a(t0) for the damped
    anomaly, where a is the anomaly and r ``Statistics.damping``.

    Args:
        fields, split, statistics: the record, its part, and the statistics of its training part.
        leads: hours, each among the statistics'.
        inputs: names from above besides the channels; their order does not matter.
        history: hours before t0 whose fields are seen too, each among the statistics' leads.
        base: "none", "persistence" or "damped" (the damped anomaly).
        where: "inside": all times of a sample lie in the part, to train and to validate;
            "valid": the valid time lies in the part, t0 and what was before it anywhere in the record, to score (``starts``).

    Raises:
        ValueError: an unknown name, leads that the statistics lack, statistics of other channels or another grid, a static
            field with missing values, or a part that is too short for a lead."""

    def __init__(
        self,
        fields: Fields,
        split: Split,
        statistics: Statistics,
        leads: Sequence[int],
        inputs: Sequence[str] = DEFAULT_INPUTS,
        where: str = "inside",
        history: Sequence[int] = (),
        base: str = "persistence",
    ):
        if unknown := [name for name in inputs if name not in INPUTS]:
            raise ValueError(f"inputs: {unknown[0]!r} is unknown; known: {', '.join(INPUTS)}.")
        if where not in WHERE:
            raise ValueError(f"where={where!r} is unknown; known: {', '.join(WHERE)}.")
        if (
            statistics.channels != fields.channels
            or statistics.climate.shape[-2:] != fields.grid.shape
        ):
            raise ValueError(
                f"statistics are of {', '.join(statistics.channels)} on {statistics.climate.shape[-2:]} points, but the record has "
                f"{', '.join(fields.channels)} on {fields.grid.shape}; make them of this record."
            )
        if "static" in inputs and not fields.static:
            raise ValueError(
                f"inputs: 'static' is asked for, but {fields.source} has no static fields; leave it out."
            )
        self.fields, self.split, self.statistics, self.where = fields, split, statistics, where
        self.leads = tuple(int(lead) for lead in leads)
        self._steps = lead_steps(fields, self.leads)
        self.history = tuple(int(hours) for hours in history)
        self._back = lead_steps(fields, self.history, "history") if history else []
        self.base = require_name(base, BASES, "base")
        at = [statistics.lead_index(lead) for lead in self.leads]
        sizes = {
            "none": np.broadcast_to(statistics.std, statistics.std_change.shape),
            "persistence": statistics.std_change,
        }
        self.scale = sizes.get(self.base, statistics.std_damped)[at]  # [L, C]
        if (exact := self.scale <= 1e-6 * statistics.std).any():
            name = fields.channels[int(exact.any(0).argmax())]
            raise ValueError(
                f"base={base!r}: it forecasts {name} without an error in training; leave it out with --variables."
            )
        self._scale = self.scale.astype(np.float32)[:, :, None, None]
        self._damping = statistics.damping[at]
        changes = statistics.std_change[[statistics.lead_index(hours) for hours in self.history]]
        self._changes = changes.astype(np.float32)[:, :, None, None]
        self._static = (
            _standardised(fields)
            if "static" in inputs
            else np.empty((0, *fields.grid.shape), np.float32)
        )
        long_enough = len(fields) * fields.step_hours >= SHORT
        self.inputs = tuple(
            name for name in INPUTS if name in inputs and (name != "time_of_year" or long_enough)
        )
        self.input_names = self._names()
        if where == "inside":
            back, hours = max(self._back, default=0), max(self.history, default=0)
            expect_room(split, max(self._steps) + back, max(self.leads), hours)
            self._inside = np.arange(split.start + back, split.stop - max(self._steps))
        else:
            for lead in self.leads:
                self.starts(lead)

    def __len__(self) -> int:
        """How many samples an epoch has: initial times with where="inside"."""
        return len(self._expect_inside())

    def starts(self, lead: int) -> np.ndarray:
        """[n] int64: initial times t0, ascending.

        where="valid": t0 + lead lies in the part, and t0 in the record.  where="inside": as ``__len__`` counts, whatever the
        lead.  Raises ValueError if there is none, or the lead is not one of `leads`."""
        if lead not in self.leads:
            raise ValueError(
                f"lead {lead} h is not one of these samples' leads: {', '.join(map(str, self.leads))} h."
            )
        if self.where == "inside":
            return self._inside.copy()
        lag = self._steps[self.leads.index(lead)]
        found = np.arange(
            max(self.split.start - lag, max(self._back, default=0)), self.split.stop - lag
        )
        if not len(found):
            raise ValueError(
                f"{self.split.name} ({self.split.start}/{self.split.stop}) ends before a lead of {lead} h ({lag} steps) from the "
                f"record's first time with all that is seen; move it, or take a shorter lead."
            )
        return found

    def get(self, t0s: "Sequence[int] | np.ndarray") -> tuple[np.ndarray, np.ndarray]:
        """(inputs [n, Cin, H, W], targets [n, L, C, H, W]), float32.  Where a valid time lies behind the record's end, which
        only where="valid" allows, targets are NaN.

        Raises ValueError for a t0 that is no sample, and for missing values in the fields, with channel and time."""
        t0s = self._expect_starts(t0s)
        seen, later = self._read(t0s)
        return self.inputs_of(seen, t0s), (later - self._simple(seen[:, 0], t0s)) / self._scale

    def seen(self, t0s: np.ndarray) -> np.ndarray:
        """[n, 1 + len(history), C, H, W] in physical units: the fields at t0 and at each time of `history`, as they were.

        Raises ValueError for missing values, with channel and time."""
        indices = self._past(t0s).ravel()
        values = self.fields.read(indices)
        expect_finite(self.fields, indices, values)
        return values.reshape(len(t0s), -1, *values.shape[1:])

    def inputs_of(self, seen: np.ndarray, t0s: np.ndarray) -> np.ndarray:
        """[n, Cin, H, W] float32: the inputs at these times if that was `seen` (see there)."""
        changes = ((seen[:, :1] - seen[:, 1:]) / self._changes).reshape(
            len(t0s), -1, *self.fields.grid.shape
        )
        return np.concatenate(
            [self._normalised(seen[:, 0]), changes, *self._extras(t0s)], 1, dtype=np.float32
        )

    def to_fields(self, prediction: np.ndarray, t0s: "Sequence[int] | np.ndarray") -> np.ndarray:
        """[n, L, C, H, W] float32 in physical units, from what is predicted of the targets: the inverse of a target."""
        t0s = self._expect_starts(t0s)
        shape = (len(t0s), len(self.leads), len(self.fields.channels), *self.fields.grid.shape)
        if prediction.shape != shape:
            raise ValueError(
                f"prediction has shape {prediction.shape}, but for {len(t0s)} initial times it must be {shape}."
            )
        return self.ahead_of(self.fields.read(t0s), t0s, prediction)

    def ahead_of(self, now: np.ndarray, t0s: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """[n, L, C, H, W] float32: what a prediction of that shape means where the fields at t0 are `now` [n, C, H, W]."""
        return self._simple(now, t0s) + prediction.astype(np.float32, copy=False) * self._scale

    def _simple(self, now: np.ndarray, t0s: np.ndarray) -> np.ndarray:
        """[n, L, C, H, W], or what broadcasts to it: the simple forecast."""
        if self.base == "none":
            return self.statistics.mean.astype(np.float32)[:, None, None]
        if self.base == "persistence":
            return now[:, None]
        usual = self._usual(t0s)
        ahead = [
            damped_anomaly(now, usual, self._usual(t0s, lead), r)
            for lead, r in zip(self.leads, self._damping, strict=True)
        ]
        return np.stack(ahead, 1).astype(np.float32, copy=False)

    def _usual(self, t0s: np.ndarray, hours: int = 0) -> np.ndarray:
        """[n, C, H, W] float32: the climatology, so many hours later."""
        return self.statistics.climatology(self.fields.times[t0s] + np.timedelta64(hours, "h"))

    def _past(self, t0s: np.ndarray) -> np.ndarray:
        """[n, 1 + len(history)]: the times that are seen."""
        return t0s[:, None] - np.array([0, *self._back])

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """[len] int64: the initial times in the order of an epoch, which follows from seed, epoch and their number alone."""
        starts = self._expect_inside()
        return starts[_permutation(len(starts), seed, epoch)]

    def rows(self, step: int, global_batch: int, seed: int) -> np.ndarray:
        """[global_batch] int64: the initial times of a step.

        Row r of step s is sample s * global_batch + r of all epochs' orders in a row: a function of the step alone, so that
        a run that goes on reads what it would have read, on whatever ranks."""
        if step < 0 or global_batch < 1:
            raise ValueError(
                f"step={step} must be at least 0, and global_batch={global_batch} at least 1."
            )
        places = step * global_batch + np.arange(global_batch)
        epochs, within = np.divmod(places, len(self))
        return np.concatenate(
            [self.order(int(e), seed)[within[epochs == e]] for e in np.unique(epochs)]
        )

    def _expect_inside(self) -> np.ndarray:
        if self.where != "inside":
            raise ValueError(
                f"where={self.where!r} has no order of samples; take starts(lead), or where='inside'."
            )
        return self._inside

    def _expect_starts(self, t0s: "Sequence[int] | np.ndarray") -> np.ndarray:
        t0s = np.atleast_1d(np.asarray(t0s, np.int64))
        first, stop = max(self._back, default=0), len(self.fields)
        if self.where == "inside":
            first, stop = int(self._inside[0]), int(self._inside[-1]) + 1
        if bad := [int(t) for t in t0s if not first <= t < stop]:
            raise ValueError(
                f"t0={bad[0]} is no initial time of {self.split.name}; they are {first}..{stop - 1}."
            )
        return t0s

    def _read(self, t0s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is seen (see there), and [n, L, C, H, W] at the valid times; each time is read once."""
        past, valid = self._past(t0s), t0s[:, None] + np.array(self._steps)
        there = valid < len(self.fields)
        indices = np.unique(np.concatenate([past.ravel(), valid[there]]))
        values = self.fields.read(indices)
        expect_finite(self.fields, indices, values)
        later = np.full((*valid.shape, *values.shape[1:]), np.nan, np.float32)
        later[there] = values[np.searchsorted(indices, valid[there])]
        return values[np.searchsorted(indices, past)], later

    def _normalised(self, values: np.ndarray) -> np.ndarray:
        """[..., C, H, W] in physical units -> mean 0, standard deviation 1 in training."""
        mean, std = (
            v.astype(np.float32)[:, None, None] for v in (self.statistics.mean, self.statistics.std)
        )
        return (values - mean) / std

    def _extras(self, t0s: np.ndarray) -> list[np.ndarray]:
        """[n, ..., H, W] of each of `inputs`."""
        grid, times, n = self.fields.grid, self.fields.times[t0s], len(t0s)
        shape = (n, 1, *grid.shape)
        out: list[np.ndarray] = []
        for name in self.inputs:
            if name == "time_of_day":
                hours = (times - times.astype("datetime64[D]")).astype(np.int64)[
                    :, None
                ] / 3600 + grid.lon / 15  # [n, W]
                angle = hours[:, None, None, :] * (2 * np.pi / 24)
                out += [np.broadcast_to(f(angle), shape) for f in (np.sin, np.cos)]
            elif name == "time_of_year":
                angle = (times - times.astype("datetime64[Y]")).astype(np.int64)[
                    :, None, None, None
                ] * (2 * np.pi / YEAR)
                out += [np.broadcast_to(f(angle), shape) for f in (np.sin, np.cos)]
            elif name == "latitude":
                out.append(np.broadcast_to(np.sin(np.deg2rad(grid.lat))[:, None], shape))
            elif name == "static":
                out.append(np.broadcast_to(self._static, (n, *self._static.shape)))
            else:
                out += [self._normalised(self._usual(t0s, hours)) for hours in (*self.leads, 0)]
        return out

    def _names(self) -> tuple[str, ...]:
        channels = self.fields.channels
        names = [*channels, *(f"{c} since -{hours}h" for hours in self.history for c in channels)]
        for name in self.inputs:
            if name in ("time_of_day", "time_of_year"):
                names += [f"{name}:sin", f"{name}:cos"]
            elif name == "latitude":
                names.append("latitude:sin")
            elif name == "static":
                names += [f"static:{field}" for field in self.fields.static]
            else:
                names += [f"climatology:{c}+{lead}h" for lead in self.leads for c in channels]
                names += [f"climatology:{c}" for c in channels]
        return tuple(names)


def _standardised(fields: Fields) -> np.ndarray:
    """[S, H, W] float32 of the static fields; ValueError where one has missing values."""
    out = []
    for name, field in fields.static.items():
        if missing := int((~np.isfinite(field)).sum()):
            raise ValueError(
                f"static field {name} is missing at {missing} of {field.size} points; fill it, or leave out 'static'."
            )
        values = field.astype(np.float64)
        values -= values.mean()
        std = values.std()
        out.append(values / std if std > 1e-9 * np.abs(field).max() else np.zeros_like(values))
    return np.stack(out).astype(np.float32)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4]
    # RandomState's stream is frozen (NEP 19): the same order with every release of numpy
    return np.random.RandomState(int.from_bytes(mixed, "big")).permutation(count)
