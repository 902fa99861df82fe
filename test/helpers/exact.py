"""Runs an algorithm on the ranks of a group and compares it with full attention.

Used under pytest, torchrun and srun alike.
"""

import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from helpers.oracle import Problem, full_attention, problem, relative
from helpers.ranks import run

import ringx

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LAYOUTS = ("contiguous", "zigzag", "striped")
NAMES = ("out", "lse", "dq", "dk", "dv")
WORLDS = [
    *(pytest.param(world, marks=pytest.mark.fast) for world in (1, 2, 3)),
    pytest.param(4, marks=pytest.mark.slow),
]


def gather(x: torch.Tensor, index: torch.Tensor, dim: int, world: int) -> torch.Tensor:
    """The global tensor from every rank's rows, put together without ringx."""
    parts: list = [None] * world
    if world > 1:
        dist.all_gather_object(parts, (x, index))
    else:
        parts = [(x, index)]
    rows, where = torch.cat([p[0] for p in parts], dim), torch.cat([p[1] for p in parts])
    return rows.index_select(dim, where.argsort())


def outputs(rank: int, p: Problem, with_dlse=False, **options) -> dict[str, torch.Tensor]:
    """Global out, lse, dq, dk, dv of ``ringx.attention(**options)``, called on each rank's part."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    layout = options.setdefault("layout", ringx.Sharding(p.q.shape[1], world, "zigzag"))
    where = ringx.positions(p.q.shape[1], layout=layout)
    q, k, v = (x[:, where].clone().requires_grad_() for x in p[:3])
    out, lse = ringx.attention(q, k, v, return_lse=True, **options)
    torch.autograd.backward(
        (out, lse) if with_dlse else out,
        (p.dout[:, where], p.dlse[:, :, where]) if with_dlse else p.dout[:, where],
    )
    got = zip(NAMES, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=True)
    return {name: gather(x, where, 2 if name == "lse" else 1, world) for name, x in got}


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: relative(got[name], want[name]) for name in NAMES}


def check(rank: int, algorithm: str) -> int:
    """Every layout, mask and overlap in fp64, for equal and prime lengths; the number of cases."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    cases = 0
    for seqlen, causal in itertools.product((8 * world, 53), (False, True)):
        p = problem(seqlen)
        want = full_attention(p, causal=causal)
        for layout, overlap in itertools.product(LAYOUTS, (True, False)):
            sharding = ringx.Sharding(seqlen, world, layout)
            got = outputs(
                rank, p, algorithm=algorithm, causal=causal, layout=sharding, overlap=overlap
            )
            for name, error in errors(got, want).items():
                assert error < LIMIT[torch.float64], (
                    algorithm,
                    seqlen,
                    causal,
                    layout,
                    overlap,
                    name,
                    error,
                )
            cases += 1
    return cases


def under_pytest(algorithm: str, world: int) -> None:
    assert run(world, check, algorithm) == [24] * world


def main(algorithm: str) -> None:
    """As a program: on the ranks that torchrun, srun or mpirun started, or alone."""
    world = ringx.launch.init()
    cases = check(world.rank, algorithm)
    if world.rank == 0:
        print(
            f"{algorithm}: {cases} cases on {world.world_size} ranks equal full attention in fp64"
        )
    ringx.launch.shutdown()
    sys.exit(0)
