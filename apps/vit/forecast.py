"""Forecasts of a trained ViT on any number of ranks, also from its own forecasts (a roll-out).

Shapes: n initial times, L leads, C channels of the record, Cin channels of the model's input,
fields of H x W points.  `t0s` are initial times, as indices of the record's times.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

import ringx
from apps.common.engine import fill_parameters
from apps.common.weights import ReadWeight
from ringx.launch.mesh import Mesh

from .config import Config
from .data.samples import Samples
from .forecast_scores import ForecastScores
from .model import ViT
from .parallel import Attend


class Forecaster:
    """A whole model on each rank; the tokens of a field are split over the ranks of a cp group.

    Args:
        config: that of the run, with the sizes of its data.
        weights: (name, shape) -> the full tensor of a parameter.
        mesh: the ranks.
        device: where the model computes.
        dtype: of its parameters and activations."""

    def __init__(
        self,
        config: Config,
        weights: ReadWeight,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._patches = config.model.patch_grid()
        self._leads = len(config.data.lead_hours())
        self._mesh = mesh
        self._device = device
        self._dtype = dtype
        self._attend = Attend(config, mesh)
        model = ViT.empty(config.model, self._attend, dtype=dtype).to_empty(device=device)
        self._model = model.requires_grad_(False)
        fill_parameters(self._model, weights)
        self._positions = ringx.positions(
            self._patches.tokens, group=mesh.cp, layout=self._attend.layout
        )

    @torch.no_grad()
    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """The predicted targets [n, L, C, H, W] float32 of `inputs` [n, Cin, H, W].

        Collective over the cp group: all of its ranks give the same inputs and get the same
        result."""
        x = self._patches.patchify(torch.from_numpy(inputs), self._positions)
        x = x.to(self._device, self._dtype)
        local_out = self._model(x, self._positions.to(self._device))
        self._attend.check = False  # calls that differ between ranks would differ in the first one
        out = ringx.unshard(local_out, group=self._mesh.cp, layout=self._attend.layout)
        fields = self._patches.unpatchify(out).unflatten(1, (self._leads, -1))
        return fields.float().cpu().numpy()


def forecast(
    forecaster: Forecaster,
    samples: Samples,
    scores: ForecastScores,
    t0s: np.ndarray,
    saved_t0s: np.ndarray,
    *,
    batch: int,
    rollout: tuple[int, ...],
    scores_here: bool,
    advance: Callable[[int], None],
) -> dict[int, np.ndarray]:
    """Forecasts from the initial times `t0s`; returns {t0: [L, C, H, W]} of those in `saved_t0s`.

    Args:
        scores: to which the forecasts are added where `scores_here`.
        batch: how many initial times are computed at once.
        rollout: leads in hours, multiples of the model's first, that it reaches by taking its own
            forecasts as inputs.
        advance: called with the number of initial times that have been completed."""
    saved: dict[int, np.ndarray] = {}
    for start in range(0, len(t0s), batch):
        batch_t0s = t0s[start : start + batch]
        seen = samples.seen(batch_t0s)
        predicted = forecaster(samples.inputs_of(seen, batch_t0s))
        forecasts = samples.ahead_of(seen[:, 0], batch_t0s, predicted)
        if scores_here:
            scores.add_simple_forecasts(batch_t0s)
            for i, lead in enumerate(samples.leads):
                scores.add("model", lead, forecasts[:, i], batch_t0s)
        for i, t0 in enumerate(batch_t0s):
            if t0 in saved_t0s:
                saved[int(t0)] = forecasts[i]
        rolled_out = roll_out(forecaster, samples, forecasts[:, 0], batch_t0s)
        for lead, (state, state_t0s) in zip(rollout, rolled_out, strict=False):
            if scores_here:
                scores.add("roll-out", lead, state, state_t0s)
        advance(len(batch_t0s))
    return saved


def roll_out(
    forecaster: Forecaster, samples: Samples, first_forecast: np.ndarray, t0s: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Forecasts [n, C, H, W] one, two, ... times the model's first lead ahead, with their t0s [n].

    The first of them is `first_forecast`; each later one takes those before it as inputs.  Inputs
    include what is known of a time, and that is known within the record alone: an initial time is
    dropped where its next inputs would lie behind the record's end; without any, this ends."""
    lag = samples.leads[0] // samples.fields.step_hours
    history = [hours // samples.leads[0] for hours in samples.history]  # in steps of the roll-out
    states = [samples.fields.read(t0s), first_forecast]  # at t0s, t0s + lag, t0s + 2 lag, ...
    while True:
        yield states[-1], t0s
        step = len(states) - 1
        in_record = t0s + step * lag < len(samples.fields)
        if not in_record.any():
            return
        t0s = t0s[in_record]
        states = [state[in_record] for state in states]
        now = t0s + step * lag
        seen = [states[step]]
        for back in history:
            if back <= step:
                seen.append(states[step - back])
            else:
                seen.append(samples.fields.read(now - back * lag))
        predicted = forecaster(samples.inputs_of(np.stack(seen, 1), now))
        states.append(samples.ahead_of(states[step], now, predicted)[:, 0])


def rollout_leads(rollout: int, first_lead: int) -> tuple[int, ...]:
    """The leads in hours that a roll-out to `rollout` hours reaches; none for 0.

    Raises:
        ValueError: `rollout` is not a multiple of the model's first lead."""
    if rollout % first_lead:
        raise ValueError(
            f"--rollout {rollout} must be a multiple of the model's first lead, {first_lead} h."
        )
    return tuple(range(first_lead, rollout + 1, first_lead))


def initial_times(samples: Samples, lead: int, inside: bool = False) -> np.ndarray:
    """[n] t0s whose valid time lies in the part; with `inside`, only those that lie in it, too."""
    lag = lead // samples.fields.step_hours
    history = max(samples.history, default=0) // samples.fields.step_hours
    earliest = samples.split.start if inside else samples.split.start - lag
    return np.arange(max(earliest, history), samples.split.stop - lag)
