"""The steps of a training run, whatever is trained."""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .config import Training
from .engine import Engine
from .flops import Flops, peak_flops
from .loader import Loader
from .parallel import Attend
from .schedule import rate

Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class StepWork(Generic[T]):
    """What the steps of a run do, as an app says it."""

    read: Callable[
        [int], T
    ]  # this rank's data of a step; called ahead of time, by a thread: no communication
    parts: Callable[
        [T], list[tuple]
    ]  # cut into passes: of each, what the model is called with to return the sum of its losses
    count: int  # how many losses the samples of a step have, over all ranks: what the sum is divided by
    tokens: int  # of a step, over all ranks
    flops: Flops  # per token
    validate: Callable[
        [], dict[str, float]
    ]  # what is added to a step's record after a validation; on every rank


def run_steps(
    c: Training,
    engine: Engine,
    attend: Attend,
    work: StepWork[T],
    *,
    first: int = 0,
    on_step: Callable[[Record], None] = lambda record: None,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Steps first, first + 1, ... of the run; every rank calls it with the same arguments.

    on_step is called after each step with its record, before_step(step) before it and once after the last (step = steps): the
    place to save and to stop.

    Raises:
        FloatingPointError: loss or gradient is not finite; nothing of that step is to be saved."""
    flops, peak = work.flops, peak_flops(engine.device)
    with Loader(work.read, first, c.steps) as data:
        for step in range(first, c.steps):
            before_step(step)
            began = time.perf_counter()
            attend.check = step == first  # wrong calls would be wrong in the first step already
            loss = torch.zeros((), dtype=torch.float64, device=engine.device)
            parts = work.parts(next(data))
            for i, part in enumerate(parts):
                with engine.accumulate(last=i == len(parts) - 1):
                    mine = (
                        engine(*part) / work.count
                    )  # what this rank's tokens add to the batch's loss
                    engine.backward(mine)
                loss += mine.detach()
            lr = rate(
                c.schedule,
                step,
                steps=c.steps,
                peak=c.lr,
                warmup=c.warmup,
                decay=c.decay,
                floor=c.floor,
            )
            norm = float(engine.step(lr, c.clip))
            record: Record = {
                "step": step,
                "loss": float(engine.sum(loss)),
                "grad_norm": norm,
                "lr": lr,
            }
            seconds = (
                time.perf_counter() - began
            )  # the sums above waited for the slowest rank and the device
            per_rank = work.tokens / seconds / engine.mesh.shape.world_size
            record |= {
                "tokens": (step + 1) * work.tokens,
                "tokens_per_s": work.tokens / seconds,
                "seconds": seconds,
                "data_wait_share": data.waited / seconds,
                "peak_memory_bytes": _peak_memory(engine.device),
                "tflops_per_rank_full": flops.full * per_rank / 1e12,
                "tflops_per_rank_causal": flops.causal * per_rank / 1e12,
                "mfu_full": flops.full * per_rank / peak if peak else None,
                "mfu_causal": flops.causal * per_rank / peak if peak else None,
            }
            if not math.isfinite(record["loss"] + norm):
                raise FloatingPointError(
                    f"step {step}: loss {record['loss']}, gradient norm {norm}; lower --lr?"
                )
            if c.val_every and ((step + 1) % c.val_every == 0 or step + 1 == c.steps):
                record |= work.validate()
            on_step(record)
        before_step(c.steps)


def _peak_memory(device: torch.device) -> int:
    """Of this rank, bytes: allocated on its GPU; on a CPU, where torch counts nothing, resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
