"""The learning rate at each step."""

import math


def warmup_cosine(step: int, *, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Learning rate of step 0, 1, ..., steps-1: `warmup` linear steps from peak/warmup to `peak`, then half a cosine down
    to floor * peak at the last step.  A run no longer than its warm-up ends on the way up."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup + 1) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
