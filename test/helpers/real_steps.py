"""What a real training step of an app holds and sends, for tests of its estimate."""

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.ranks import run

import ringx
from ringx.launch.mesh import Mesh, Shape
from ringx.measure.peak import Lifetimes

MakeBatch = Callable[[Any, int, int], tuple[torch.Tensor, ...]]


def measure_step(
    rank: int, config: Any, shape: Shape, parallel: ModuleType, make_batch: MakeBatch, tokens: int
) -> tuple[int, float, float]:
    """(peak of the second step, bytes of attention forward, backward), by tensors that have memory.

    ``parallel`` is apps.gpt.parallel or apps.vit.parallel, ``make_batch(config, samples, tokens)``
    makes the engine's arguments for that many tokens of a rank, ``tokens`` a sample has.
    """
    mesh = Mesh.make(shape)
    attend = parallel.Attend(config, mesh)
    _, samples, passes = config.plan_batch(shape)
    watch = Lifetimes()
    engine = parallel.build(
        config, mesh, attend, weights=lambda name, size: torch.full(size, 0.01), allocating=watch
    )
    attend.check = False
    with watch:
        batch = make_batch(config, samples, attend.layout.size(mesh.cp_rank))
        for _ in range(2):
            gc.collect()
            watch.peak = watch.now
            with ringx.comm.traffic() as traffic:
                for i in range(passes):
                    with engine.accumulate(last=i == passes - 1):
                        loss = engine(*batch) / tokens
                        engine.backward(loss)
                engine.step(1e-3, 1.0)
                engine.sum(loss.detach())
    return watch.peak, sum(traffic.forward.values()), sum(traffic.backward.values())


def measured_steps(
    config: Any, shape: Shape, parallel: ModuleType, make_batch: MakeBatch, tokens: int
) -> list[tuple[int, float, float]]:
    """``measure_step`` of every rank."""
    arguments = (config, shape, parallel, make_batch, tokens)
    if shape.world_size == 1:
        return [measure_step(0, *arguments)]
    return run(shape.world_size, measure_step, *arguments)


def expect_estimated(estimate: Any, measured: tuple[int, float, float]) -> None:
    """The peak is within 3 % of the measured one, and the bytes of attention are equal."""
    peak, *sent = measured
    assert estimate.memory.peak == pytest.approx(peak, rel=0.03)
    estimated = [
        sum(estimate.sent.get(f"attention {direction}", {}).values())
        for direction in ("forward", "backward")
    ]
    assert estimated == pytest.approx(sent)
