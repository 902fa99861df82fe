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
    """What the steps of a run do, as an app defines it."""

    # This rank's data of a step.  Called ahead of time, by a thread: no communication.
    read: Callable[[int], T]
    # The data cut into passes: of each, what the model is called with to return a sum of losses.
    parts: Callable[[T], list[tuple]]
    # How many losses the samples of a step have, over all ranks: what the sum is divided by.
    count: int
    tokens: int  # of a step, over all ranks
    flops: Flops  # per token
    # What is added to a step's record after a validation; on every rank.
    validate: Callable[[], dict[str, float]]


def run_steps(
    train: Training,
    engine: Engine,
    attend: Attend,
    work: StepWork[T],
    *,
    first: int = 0,
    on_step: Callable[[Record], None] = lambda record: None,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Steps first, first + 1, ... of the run; every rank calls it with the same arguments.

    on_step is called after each step with its record, before_step(step) before it and once after
    the last (step = steps): the place to save and to stop.

    Raises:
        FloatingPointError: loss or gradient is not finite; nothing of that step is to be saved."""
    with Loader(work.read, first, train.steps) as data:
        for step in range(first, train.steps):
            before_step(step)
            began = time.perf_counter()
            attend.check = step == first  # wrong calls would be wrong in the first step already
            loss = _forward_and_backward(engine, work.parts(next(data)), work.count)
            lr = _learning_rate(train, step)
            norm = float(engine.step(lr, train.clip))
            record: Record = {
                "step": step,
                "loss": float(engine.sum(loss)),
                "grad_norm": norm,
                "lr": lr,
            }
            # The sums above waited for the slowest rank and the device.
            seconds = time.perf_counter() - began
            record.update(_throughput(step, seconds, data.waited, engine, work))
            if not math.isfinite(record["loss"] + norm):
                raise FloatingPointError(
                    f"step {step}: loss {record['loss']}, gradient norm {norm}; lower --lr?"
                )
            if train.val_every and ((step + 1) % train.val_every == 0 or step + 1 == train.steps):
                record.update(work.validate())
            on_step(record)
        before_step(train.steps)


def _forward_and_backward(engine: Engine, parts: list[tuple], count: int) -> torch.Tensor:
    """What this rank's tokens add to the loss of the whole batch; fp64."""
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for i, part in enumerate(parts):
        with engine.accumulate(last=i == len(parts) - 1):
            loss = engine(*part) / count
            engine.backward(loss)
        total += loss.detach()
    return total


def _learning_rate(train: Training, step: int) -> float:
    return rate(
        train.schedule,
        step,
        steps=train.steps,
        peak=train.lr,
        warmup=train.warmup,
        decay=train.decay,
        floor=train.floor,
    )


def _throughput(step: int, seconds: float, waited: float, engine: Engine, work: StepWork) -> Record:
    """What a step's record holds of its speed and memory.

    waited: seconds of the step in which no data was there."""
    per_rank = work.tokens / seconds / engine.mesh.shape.world_size  # tokens/s
    flops = work.flops
    peak = peak_flops(engine.device)
    return {
        "tokens": (step + 1) * work.tokens,
        "tokens_per_s": work.tokens / seconds,
        "seconds": seconds,
        "data_wait_share": waited / seconds,
        "peak_memory_bytes": _peak_memory(engine.device),
        "tflops_per_rank_full": flops.full * per_rank / 1e12,
        "tflops_per_rank_causal": flops.causal * per_rank / 1e12,
        "mfu_full": flops.full * per_rank / peak if peak else None,
        "mfu_causal": flops.causal * per_rank / peak if peak else None,
    }


def _peak_memory(device: torch.device) -> int:
    """Of this rank, bytes: allocated on its GPU; resident in the process on a CPU.

    On a CPU torch counts nothing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
