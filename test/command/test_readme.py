"""The README's Python runs as it stands, on real ranks, and does what it says."""

import re

import pytest
import torch
from helpers.oracle import Problem, full_attention, relative
from helpers.paths import ROOT

import ringx

pytestmark = pytest.mark.fast

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def interface(world: ringx.launch.World, source: str) -> dict:
    names: dict = {}
    exec(source, names)
    kept = {name: names[name].detach() for name in ("whole", "lse", "where")}
    return kept | {"tokens": names["uneven"].size(world.rank)}


def model(world: ringx.launch.World, source: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    names: dict = {}
    exec(source, names)
    parts = [p.grad for name in ("embed", "layer", "head") for p in names[name].parameters()]
    for x in (loss := names["loss"].detach(), *parts):
        if world.world_size > 1:
            torch.distributed.all_reduce(x)
    return loss, parts


def test_there_are_two_blocks():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("nproc", [1, 2])
def test_interface(nproc):
    ranks = ringx.launch.run(interface, nproc, BLOCKS[0])
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, heads, 16) for heads in (8, 2, 2))
    expected = full_attention(Problem(q, k, v, q, torch.zeros(1, 8, 64)), causal=True)
    assert sum(r["tokens"] for r in ranks) == 61
    for r in ranks:
        assert relative(r["whole"], expected["out"]) < 1e-5
        assert relative(r["lse"], expected["lse"][:, :, r["where"]]) < 1e-5


def test_model():
    """Two ranks' loss and gradients, summed, are those of one process."""
    ((loss, grads),) = ringx.launch.run(model, 1, BLOCKS[1])
    for loss2, grads2 in ringx.launch.run(model, 2, BLOCKS[1]):
        torch.testing.assert_close(loss2, loss)
        for a, b in zip(grads2, grads, strict=True):
            assert relative(a, b) < 1e-5
