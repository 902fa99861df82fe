"""Forecasts of a trained ViT on any number of ranks, also from its own forecasts (a roll-out), scored as they are made."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

import ringx
from apps.common.engine import fill_parameters
from ringx.launch.mesh import Mesh

from .config import Config
from .data.samples import Samples
from .forecast_scores import ForecastScores
from .model import ViT
from .parallel import Attend


class Forecaster:
    """A whole model on each rank, whose tokens are cut over the cp group.

    Args:
        config: of the run, with the sizes of its data.
        weights: (name, shape) -> a parameter."""

    def __init__(
        self,
        config: Config,
        weights: Callable,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._patches, self._mesh, self._device, self._dtype = (
            config.model.patches(),
            mesh,
            device,
            dtype,
        )
        self._attend = Attend(config, mesh)
        self._model = (
            ViT.empty(config.model, self._attend, dtype=dtype)
            .to_empty(device=device)
            .requires_grad_(False)
        )
        fill_parameters(self._model, weights)
        self._places = ringx.positions(
            self._patches.tokens, group=mesh.cp, layout=self._attend.layout
        )
        self._leads = len(config.data.lead_hours())

    @torch.no_grad()
    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """[n, Cin, H, W] -> the predicted changes [n, L, C, H, W] float32; every rank of the cp group has the same, and calls it
        with the same."""
        x = self._patches.cut(torch.from_numpy(inputs), self._places).to(self._device, self._dtype)
        out = self._model(x, self._places.to(self._device))
        self._attend.check = False  # wrong calls would be wrong in the first one already
        whole = ringx.unshard(out, group=self._mesh.cp, layout=self._attend.layout)
        return self._patches.join(whole).unflatten(1, (self._leads, -1)).float().cpu().numpy()


def forecast(
    forecaster: Forecaster,
    samples: Samples,
    scored: ForecastScores,
    t0s: np.ndarray,
    saved: np.ndarray,
    *,
    batch: int,
    rollout: tuple[int, ...],
    scores_here: bool,
    tick: Callable[[int], None],
) -> dict[int, np.ndarray]:
    """Forecasts from the initial times `t0s`, and scores them where `scores_here`; {t0: [L, C, H, W]} of those in `saved`.

    rollout: leads, multiples of the model's first, that it reaches by taking its own forecasts as inputs."""
    kept: dict[int, np.ndarray] = {}
    for i in range(0, len(t0s), batch):
        some = t0s[i : i + batch]
        seen = samples.seen(some)
        ahead = samples.ahead_of(seen[:, 0], some, forecaster(samples.inputs_of(seen, some)))
        if scores_here:
            scored.add_simple(some)
            for j, lead in enumerate(samples.leads):
                scored.add("model", lead, ahead[:, j], some)
        kept |= {int(t): ahead[k] for k, t in enumerate(some) if t in saved}
        for lead, (state, began) in zip(
            rollout, roll_out(forecaster, samples, ahead[:, 0], some), strict=False
        ):
            if scores_here:
                scored.add("roll-out", lead, state, began)
        tick(len(some))
    return kept


def roll_out(
    forecaster: Forecaster, samples: Samples, state: np.ndarray, t0s: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(forecast [n, C, H, W], its initial times [n]) one, two, three ... of the model's first leads ahead, of which `state` is the
    first: each takes those before it as inputs.  Ends where the record does: what is known of a time is known within it."""
    lag = samples.leads[0] // samples.fields.step_hours
    back = [hours // samples.leads[0] for hours in samples.history]
    states = [samples.fields.read(t0s), state]  # at t0s, t0s + lag, ...
    while True:
        yield states[-1], t0s
        k = len(states) - 1
        there = t0s + k * lag < len(samples.fields)
        if not there.any():
            return
        t0s, states = t0s[there], [x[there] for x in states]
        now = t0s + k * lag
        past = [states[k - b] if b <= k else samples.fields.read(now - b * lag) for b in back]
        inputs = samples.inputs_of(np.stack([states[k], *past], 1), now)
        states.append(samples.ahead_of(states[k], now, forecaster(inputs))[:, 0])


def rollout_leads(rollout: int, lead: int) -> tuple[int, ...]:
    """The leads that a roll-out to `rollout` hours reaches; none for 0."""
    if rollout % lead:
        raise ValueError(
            f"--rollout {rollout} must be a multiple of the model's first lead, {lead} h."
        )
    return tuple(range(lead, rollout + 1, lead))


def initial_times(samples: Samples, lead: int, inside: bool = False) -> np.ndarray:
    """Initial times whose valid time lies in the part; with `inside`, only those in the part."""
    lag, back = (
        hours // samples.fields.step_hours for hours in (lead, max(samples.history, default=0))
    )
    return np.arange(
        max(samples.split.start - (0 if inside else lag), back), samples.split.stop - lag
    )
