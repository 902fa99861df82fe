"""The learning rate at each step, by the name of its schedule."""

import math
from collections.abc import Callable

from ringx.checks import require_name


def warmup_cosine(step: int, *, steps: int, peak: float, warmup: int, floor: float) -> float:
    """The learning rate of step 0, 1, ..., steps-1.

    `warmup` linear steps from peak/warmup to `peak`, then half a cosine down to floor * peak at the
    last step.  A run no longer than its warm-up ends on the way up."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup + 1) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def wsd(step: int, *, steps: int, peak: float, warmup: int, decay: int, floor: float) -> float:
    """Warmup, stable, decay: learning rate of step 0, 1, ..., steps-1.

    `warmup` linear steps from peak/warmup to `peak`; then `peak`; in the last `decay` steps a
    straight line down to floor * peak at the last one.  Until the decay begins nothing depends on
    `steps`: such a run can be prolonged.  (Hu et al., MiniCPM, arXiv 2404.06395; the linear decay
    of Hägele et al., arXiv 2405.18392.)

    Raises:
        ValueError: warm-up and decay together are longer than the run."""
    if warmup + decay > steps:
        raise ValueError(
            f"warmup={warmup} and decay={decay} together are longer than steps={steps}; "
            "shorten one of them."
        )
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - (steps - decay) + 1) / max(1, decay)  # 0 before the decay, 1 at the last step
    return peak * (1 - (1 - floor) * min(max(done, 0.0), 1.0))


def _cosine(step: int, *, steps: int, peak: float, warmup: int, decay: int, floor: float) -> float:
    """Warm-up and half a cosine: ``warmup_cosine``."""
    if decay:
        raise ValueError(
            f"decay={decay} is for schedule 'wsd'; 'cosine' decays from its warm-up to its end: "
            "leave decay at 0."
        )
    return warmup_cosine(step, steps=steps, peak=peak, warmup=warmup, floor=floor)


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": _cosine, "wsd": wsd}


def rate(
    name: str, step: int, *, steps: int, peak: float, warmup: int, decay: int, floor: float
) -> float:
    """The learning rate of a step by schedule `name`, one of SCHEDULES.

    Args:
        step: 0, 1, ..., steps-1.
        steps: the run's length.
        peak: the highest learning rate, greater than 0.
        warmup: steps of linear warm-up; 0: none.
        decay: steps of decay at the end, of "wsd" (0: none, whatever `floor`); "cosine" takes none
            but 0.
        floor: last rate / peak, from 0 to 1.

    Raises:
        ValueError: an unknown name, or a number out of range."""
    require_name(name, SCHEDULES, "schedule")
    for parameter, value, least in (
        ("step", step, 0),
        ("steps", steps, 1),
        ("warmup", warmup, 0),
        ("decay", decay, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{parameter}={value!r} must be an integer of at least {least}.")
    if step >= steps:
        raise ValueError(f"step={step} is beyond the last of steps={steps}; prolong the run.")
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"peak={peak!r} must be a number greater than 0.")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor!r} must be from 0 to 1.")
    return SCHEDULES[name](step, steps=steps, peak=peak, warmup=warmup, decay=decay, floor=floor)
