"""Pairs of input and target.

The input is the state and what is known of the time and the place; the target is how the state
then changes.
"""

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
DAY = 24  # hours
YEAR = 365.2425 * 86400  # seconds


class Samples:
    """The samples of one part of a record.

    A sample is named by the index of its initial time t0 in the record.

    Inputs, all float32, in this order (``input_names``):
        each channel at t0, less its mean, divided by its standard deviation;
        its change since each time of `history`, divided by the standard deviation of such changes;
        time_of_day: sine and cosine of the local solar time at t0 (UTC + longitude / 15 degrees an
            hour);
        time_of_year: sine and cosine of the time since the year began; left out where the record
            is shorter than 60 days;
        latitude: its sine;
        static: each static field, less its mean, divided by its standard deviation (0 where it is
            constant);
        climatology: normalised as the channels, of each lead's valid time and then of t0.

    Targets: what a simple forecast, `base`, leaves to be forecast, divided by its size in training:
        none: x(t0 + lead) less the channel's mean, as it is common;
        persistence: x(t0 + lead) - x(t0);
        damped, the damped anomaly: a(t0 + lead) - r a(t0), where a is the anomaly and r is
            ``Statistics.damping``.

    Args:
        fields, split, statistics: the record, its part, and the statistics of its training part.
        leads: hours, each among the statistics'.
        inputs: names from above besides the channels; their order does not matter.
        where: "inside": all times of a sample lie in the part, to train and to validate;
            "valid": the valid time lies in the part, t0 and what was before it anywhere in the
            record, to score (``starts``).
        history: hours before t0 whose fields are seen too, each among the statistics' leads.
        base: "none", "persistence" or "damped" (the damped anomaly).

    Attributes:
        scale: [L, C] float64: the size of the targets in physical units.
        input_names: of the Cin inputs.

    Raises:
        ValueError: an unknown name, leads that the statistics lack, statistics of other channels
            or another grid, a static field with missing values, or a part that is too short for a
            lead."""

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
        _expect_known(inputs, where)
        _expect_statistics_of(fields, statistics)
        if "static" in inputs and not fields.static:
            raise ValueError(
                f"inputs: 'static' is asked for, but {fields.source} has no static fields; "
                "leave it out."
            )
        self.fields = fields
        self.split = split
        self.statistics = statistics
        self.where = where
        self.leads = tuple(int(lead) for lead in leads)
        self._lead_steps = lead_steps(fields, self.leads)
        self.history = tuple(int(hours) for hours in history)
        self._history_steps = lead_steps(fields, self.history, "history") if history else []
        self.base = require_name(base, BASES, "base")
        self._set_scales()
        self._static = np.empty((0, *fields.grid.shape), np.float32)
        if "static" in inputs:
            self._static = _standardised(fields)
        self.inputs = _useful_inputs(fields, inputs)
        self.input_names = self._input_names()
        self._inside = np.empty(0, np.int64)  # initial times with where="inside"
        if where == "inside":
            self._set_inside()
        else:
            for lead in self.leads:
                self.starts(lead)

    def _set_scales(self) -> None:
        """Sets what normalises targets and the changes since the times of `history`."""
        statistics = self.statistics
        indices = [statistics.lead_index(lead) for lead in self.leads]
        if self.base == "none":
            sizes = np.broadcast_to(statistics.std, statistics.std_change.shape)
        elif self.base == "persistence":
            sizes = statistics.std_change
        else:
            sizes = statistics.std_damped
        self.scale = sizes[indices]
        exact = self.scale <= 1e-6 * statistics.std
        if exact.any():
            name = self.fields.channels[int(exact.any(0).argmax())]
            raise ValueError(
                f"base={self.base!r}: it forecasts {name} without an error in training; "
                "leave it out with --variables."
            )
        self._scale = self.scale.astype(np.float32)[:, :, None, None]
        self._damping = statistics.damping[indices]
        changes = statistics.std_change[[statistics.lead_index(hours) for hours in self.history]]
        self._change_scale = changes.astype(np.float32)[:, :, None, None]

    def _set_inside(self) -> None:
        longest_lead = max(self._lead_steps)
        before = self._longest_history
        expect_room(
            self.split, longest_lead + before, max(self.leads), max(self.history, default=0)
        )
        self._inside = np.arange(self.split.start + before, self.split.stop - longest_lead)

    @property
    def _longest_history(self) -> int:
        """In steps; 0 where nothing but t0 is seen."""
        return max(self._history_steps, default=0)

    def __len__(self) -> int:
        """How many samples an epoch has: initial times with where="inside"."""
        return len(self._expect_inside())

    def starts(self, lead: int) -> np.ndarray:
        """[n] int64: initial times t0, ascending.

        where="valid": t0 + lead lies in the part, and t0 in the record.  where="inside": as
        ``__len__`` counts, whatever the lead.

        Raises:
            ValueError: there is none, or the lead is not one of `leads`."""
        if lead not in self.leads:
            known = ", ".join(map(str, self.leads))
            raise ValueError(f"lead {lead} h is not one of these samples' leads: {known} h.")
        if self.where == "inside":
            return self._inside.copy()
        steps = self._lead_steps[self.leads.index(lead)]
        first = max(self.split.start - steps, self._longest_history)
        starts = np.arange(first, self.split.stop - steps)
        if not len(starts):
            raise ValueError(
                f"{self.split.name} ({self.split.start}/{self.split.stop}) ends before a lead of "
                f"{lead} h ({steps} steps) from the record's first time with all that is seen; "
                "move it, or take a shorter lead."
            )
        return starts

    def get(self, t0s: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [n, Cin, H, W] and targets [n, L, C, H, W], float32.

        Where a valid time lies behind the record's end, which only where="valid" allows, targets
        are NaN.

        Raises:
            ValueError: a t0 that is no sample, or missing values in the fields; names channel and
                time."""
        t0s = self._expect_starts(t0s)
        seen, later = self._read(t0s)
        targets = (later - self._simple_forecast(seen[:, 0], t0s)) / self._scale
        return self.inputs_of(seen, t0s), targets

    def seen(self, t0s: np.ndarray) -> np.ndarray:
        """[n, 1 + len(history), C, H, W]: the fields at t0 and at each time of `history`.

        They are in physical units, as they were.

        Raises:
            ValueError: missing values; names channel and time."""
        indices = self._seen_times(t0s).ravel()
        values = self.fields.read(indices)
        expect_finite(self.fields, indices, values)
        return values.reshape(len(t0s), -1, *values.shape[1:])

    def inputs_of(self, seen: np.ndarray, t0s: np.ndarray) -> np.ndarray:
        """[n, Cin, H, W] float32: the inputs at these times where ``seen`` returned `seen`."""
        changes = (seen[:, :1] - seen[:, 1:]) / self._change_scale
        changes = changes.reshape(len(t0s), -1, *self.fields.grid.shape)
        parts = [self._normalised(seen[:, 0]), changes]
        for name in self.inputs:
            parts += self._input(name, t0s)
        return np.concatenate(parts, 1, dtype=np.float32)

    def to_fields(self, prediction: np.ndarray, t0s: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n, L, C, H, W] float32 in physical units: the inverse of a target.

        Args:
            prediction: [n, L, C, H, W]: what is predicted of the targets.
            t0s: [n]: their initial times."""
        t0s = self._expect_starts(t0s)
        shape = (len(t0s), len(self.leads), len(self.fields.channels), *self.fields.grid.shape)
        if prediction.shape != shape:
            raise ValueError(
                f"prediction has shape {prediction.shape}, but for {len(t0s)} initial times it "
                f"must be {shape}."
            )
        return self.ahead_of(self.fields.read(t0s), t0s, prediction)

    def ahead_of(self, now: np.ndarray, t0s: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """[n, L, C, H, W] float32: the fields that a prediction of the targets means.

        Args:
            now: [n, C, H, W]: the fields at t0.
            t0s: [n].
            prediction: [n, L, C, H, W]."""
        left = prediction.astype(np.float32, copy=False) * self._scale
        return self._simple_forecast(now, t0s) + left

    def _simple_forecast(self, now: np.ndarray, t0s: np.ndarray) -> np.ndarray:
        """[n, L, C, H, W], or what broadcasts to it: the forecast of `base`."""
        if self.base == "none":
            return self.statistics.mean.astype(np.float32)[:, None, None]
        if self.base == "persistence":
            return now[:, None]
        usual = self._climatology(t0s)
        forecasts = []
        for lead, damping in zip(self.leads, self._damping, strict=True):
            usual_later = self._climatology(t0s, lead)
            forecasts.append(damped_anomaly(now, usual, usual_later, damping))
        return np.stack(forecasts, 1).astype(np.float32, copy=False)

    def _climatology(self, t0s: np.ndarray, hours: int = 0) -> np.ndarray:
        """[n, C, H, W] float32: what is usual so many hours after each t0."""
        return self.statistics.climatology(self.fields.times[t0s] + np.timedelta64(hours, "h"))

    def _seen_times(self, t0s: np.ndarray) -> np.ndarray:
        """[n, 1 + len(history)]: the indices of the times that are seen."""
        return t0s[:, None] - np.array([0, *self._history_steps])

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """[len] int64: the initial times in the order of an epoch.

        The order follows from seed, epoch and the number of samples alone."""
        starts = self._expect_inside()
        return starts[_permutation(len(starts), seed, epoch)]

    def rows(self, step: int, global_batch: int, seed: int) -> np.ndarray:
        """[global_batch] int64: the initial times of a step.

        Row r of step s is sample s * global_batch + r of all epochs' orders in a row: a function
        of the step alone, so that a run that goes on reads what it would have read, on whatever
        ranks."""
        if step < 0 or global_batch < 1:
            raise ValueError(
                f"step={step} must be at least 0, and global_batch={global_batch} at least 1."
            )
        places = step * global_batch + np.arange(global_batch)
        epochs, within = np.divmod(places, len(self))
        parts = [self.order(int(e), seed)[within[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _expect_inside(self) -> np.ndarray:
        """The initial times in order; ValueError with where="valid"."""
        if self.where != "inside":
            raise ValueError(
                f"where={self.where!r} has no order of samples; take starts(lead), or "
                "where='inside'."
            )
        return self._inside

    def _expect_starts(self, t0s: Sequence[int] | np.ndarray) -> np.ndarray:
        """The initial times as an array; ValueError for one that is no sample."""
        t0s = np.atleast_1d(np.asarray(t0s, np.int64))
        first, stop = self._longest_history, len(self.fields)
        if self.where == "inside":
            first, stop = int(self._inside[0]), int(self._inside[-1]) + 1
        outside = [int(t0) for t0 in t0s if not first <= t0 < stop]
        if outside:
            raise ValueError(
                f"t0={outside[0]} is no initial time of {self.split.name}; they are "
                f"{first}..{stop - 1}."
            )
        return t0s

    def _read(self, t0s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The result of ``seen``, and [n, L, C, H, W] at the valid times.

        Each time is read once."""
        past = self._seen_times(t0s)
        valid = t0s[:, None] + np.array(self._lead_steps)
        in_record = valid < len(self.fields)
        indices = np.unique(np.concatenate([past.ravel(), valid[in_record]]))
        values = self.fields.read(indices)
        expect_finite(self.fields, indices, values)
        later = np.full((*valid.shape, *values.shape[1:]), np.nan, np.float32)
        later[in_record] = values[np.searchsorted(indices, valid[in_record])]
        return values[np.searchsorted(indices, past)], later

    def _normalised(self, values: np.ndarray) -> np.ndarray:
        """[..., C, H, W] in physical units -> mean 0, standard deviation 1 in training."""
        mean = self.statistics.mean.astype(np.float32)[:, None, None]
        std = self.statistics.std.astype(np.float32)[:, None, None]
        return (values - mean) / std

    def _input(self, name: str, t0s: np.ndarray) -> list[np.ndarray]:
        """The fields of one of `inputs`, each [n, ..., H, W]."""
        grid, times = self.fields.grid, self.fields.times[t0s]
        shape = (len(t0s), 1, *grid.shape)
        if name == "time_of_day":
            utc = (times - times.astype("datetime64[D]")).astype(np.int64)[:, None] / 3600
            hours = utc + grid.lon / 15  # [n, W]
            angle = hours[:, None, None, :] * (2 * np.pi / DAY)
            return [np.broadcast_to(wave(angle), shape) for wave in (np.sin, np.cos)]
        if name == "time_of_year":
            seconds = (times - times.astype("datetime64[Y]")).astype(np.int64)
            angle = seconds[:, None, None, None] * (2 * np.pi / YEAR)
            return [np.broadcast_to(wave(angle), shape) for wave in (np.sin, np.cos)]
        if name == "latitude":
            return [np.broadcast_to(np.sin(np.deg2rad(grid.lat))[:, None], shape)]
        if name == "static":
            return [np.broadcast_to(self._static, (len(t0s), *self._static.shape))]
        assert name == "climatology"
        return [self._normalised(self._climatology(t0s, hours)) for hours in (*self.leads, 0)]

    def _input_names(self) -> tuple[str, ...]:
        channels = self.fields.channels
        names = list(channels)
        for hours in self.history:
            names += [f"{channel} since -{hours}h" for channel in channels]
        for name in self.inputs:
            names += self._names_of_input(name)
        return tuple(names)

    def _names_of_input(self, name: str) -> list[str]:
        """The names of the fields that ``_input`` makes, in its order."""
        channels = self.fields.channels
        if name in ("time_of_day", "time_of_year"):
            return [f"{name}:sin", f"{name}:cos"]
        if name == "latitude":
            return ["latitude:sin"]
        if name == "static":
            return [f"static:{field}" for field in self.fields.static]
        assert name == "climatology"
        names = []
        for lead in self.leads:
            names += [f"climatology:{channel}+{lead}h" for channel in channels]
        names += [f"climatology:{channel}" for channel in channels]
        return names


def _expect_known(inputs: Sequence[str], where: str) -> None:
    """ValueError for an unknown name."""
    for name in inputs:
        if name not in INPUTS:
            raise ValueError(f"inputs: {name!r} is unknown; known: {', '.join(INPUTS)}.")
    if where not in WHERE:
        raise ValueError(f"where={where!r} is unknown; known: {', '.join(WHERE)}.")


def _useful_inputs(fields: Fields, inputs: Sequence[str]) -> tuple[str, ...]:
    """The inputs in the order of INPUTS, without the time of year in a short record."""
    useful = [name for name in INPUTS if name in inputs]
    if len(fields) * fields.step_hours < SHORT and "time_of_year" in useful:
        useful.remove("time_of_year")
    return tuple(useful)


def _expect_statistics_of(fields: Fields, statistics: Statistics) -> None:
    """ValueError where the statistics are of other channels or another grid."""
    points = statistics.climate.shape[-2:]
    if statistics.channels != fields.channels or points != fields.grid.shape:
        raise ValueError(
            f"statistics are of {', '.join(statistics.channels)} on {points} points, but the "
            f"record has {', '.join(fields.channels)} on {fields.grid.shape}; make them of this "
            "record."
        )


def _standardised(fields: Fields) -> np.ndarray:
    """[S, H, W] float32 of the static fields; ValueError where one has missing values."""
    standardised = []
    for name, field in fields.static.items():
        missing = int((~np.isfinite(field)).sum())
        if missing:
            raise ValueError(
                f"static field {name} is missing at {missing} of {field.size} points; fill it, or "
                "leave out 'static'."
            )
        values = field.astype(np.float64)
        values -= values.mean()
        std = values.std()
        constant = std <= 1e-9 * np.abs(field).max()
        standardised.append(np.zeros_like(values) if constant else values / std)
    return np.stack(standardised).astype(np.float32)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4]
    # RandomState's stream is frozen (NEP 19): the same order with every release of numpy
    return np.random.RandomState(int.from_bytes(mixed, "big")).permutation(count)
