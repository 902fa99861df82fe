"""ringx.launch.mesh: every rank has its place, whatever the order of the axes.

pytest test/launch/test_mesh.py
"""

import itertools

import pytest
import torch.distributed as dist
from helpers.ranks import run

from ringx.launch.mesh import ORDERS, Mesh, Shape


def place(rank: int, shape: Shape) -> dict[str, int]:
    """Indices of a rank by counting: the leftmost axis varies fastest."""
    at = {}
    for axis in shape.order.split("-"):
        size = getattr(shape, axis)
        at[axis], rank = rank % size, rank // size
    return at


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "sizes, replicate",
    [
        pytest.param((2, 2, 2), 1, marks=pytest.mark.fast),
        ((2, 1, 4), 2),
        pytest.param((3, 2, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 2, 3), 3, marks=pytest.mark.slow),
    ],
)
def test_groups_are_those_counted_by_hand(sizes, replicate, order):
    shape = Shape(*sizes, replicate=replicate, order=order)
    places = [place(r, shape) for r in range(shape.world_size)]

    def rank(r):
        mesh = Mesh.make(shape)
        ranks = dist.get_process_group_ranks
        shards = mesh.shard_mesh["fsdp"] if replicate > 1 else mesh.shard_mesh
        tp = mesh.device_mesh["tp"].get_group()
        assert shards.get_local_rank() == dist.get_rank(
            shards.get_group()
        )  # else FSDP2 would gather in another order
        return (
            (mesh.cp_rank, mesh.tp_rank, mesh.dp_rank),
            ranks(mesh.cp),
            ranks(tp),
            ranks(mesh.data),
            ranks(shards.get_group()),
        )

    per = shape.dp // replicate
    for r, (at, cp, tp, data, shards) in enumerate(run(shape.world_size, rank)):
        me = places[r]
        assert at == (me["cp"], me["tp"], me["dp"])

        def like(*axes, me=me):
            return [i for i, p in enumerate(places) if all(p[a] == me[a] for a in axes)]

        assert (
            sorted(cp) == like("tp", "dp")
            and sorted(tp) == like("cp", "dp")
            and sorted(data) == like("tp")
        )
        assert sorted(shards) == [
            i for i in like("tp") if places[i]["dp"] // per == me["dp"] // per
        ]


def test_cp_is_counted_along_its_group():
    """Rank i of the cp group holds the i-th part of the sequence."""

    def rank(_, shape):
        mesh = Mesh.make(shape)
        return mesh.cp_rank, dist.get_rank(mesh.cp)

    for order in ORDERS:
        assert all(at == in_group for at, in_group in run(6, rank, Shape(3, 2, 1, order=order)))


@pytest.mark.fast
def test_axes_left_open_take_what_is_left():
    assert Shape.fit(8) == Shape(8, 1, 1)
    assert Shape.fit(8, cp=2) == Shape(2, 1, 4)
    assert Shape.fit(8, tp=2) == Shape(4, 2, 1)
    assert Shape.fit(8, dp=2, tp=2) == Shape(2, 2, 2)
    assert Shape.fit(1) == Shape()


@pytest.mark.fast
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Shape.fit(8, cp=3), "cp=3 x tp=1 x dp=2 is 6 ranks, but there are 8"),
        (lambda: Shape.fit(4, cp=8), "is 8 ranks, but there are 4"),
        (lambda: Shape.fit(4, cp=2, tp=2, dp=2), "is 8 ranks, but there are 4"),
        (lambda: Shape(0), "cp=0 must be an integer of at least 1"),
        (lambda: Shape(dp=3, replicate=2), "replicate=2 must divide dp=3"),
        (lambda: Shape(order="cp-tp"), "order='cp-tp' must name cp, tp and dp once each"),
        (lambda: Mesh.make(Shape(2)), "is 2 ranks, but there are 1"),
    ],
)
def test_shapes_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.fast
def test_the_rank_map_names_every_rank():
    for order, shape in itertools.product(ORDERS, [(2, 2, 3)]):
        text = Shape(*shape, order=order).describe()
        fast = {"cp": 2, "tp": 2, "dp": 3}[order[:2]]
        assert all(f"= ranks {start}..{start + fast - 1}" in text for start in range(0, 12, fast))
    assert "and 4080 more groups" in Shape(1, 1, 4096, order="cp-tp-dp").describe()
    assert max(map(len, Shape(128, 1, 32).describe().splitlines())) <= 100
