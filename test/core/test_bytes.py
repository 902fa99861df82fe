"""Bytes: counted equals the closed form, and our counter equals one at the dispatcher."""

import itertools
from collections import Counter

import pytest
import torch
from helpers.exact import LAYOUTS
from helpers.oracle import problem
from helpers.ranks import run

import ringx
from ringx.api import SeesInside

B, H, HKV, D = 2, 4, 2, 8


class C10dBytes(SeesInside):
    """Counts what c10d operators send, from their own arguments, with the definitions of
    ``ringx.comm``."""

    def __init__(self, world: int):
        super().__init__()
        self.world, self.sent = world, Counter()

    def see(self, func, args, kwargs):
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **kwargs)

    def _count(self, name: str, args) -> None:
        n = self.world

        def size(x) -> int:
            tensors = x if isinstance(x, (list, tuple)) else [x]
            return sum(t.numel() * t.element_size() for t in tensors)

        if name in ("broadcast_", "reduce_"):
            self.sent[name.strip("_")] += size(args[0]) * (n - 1) / n
        elif name == "allreduce_":
            self.sent["all_reduce"] += 2 * size(args[0]) * (n - 1) / n
        elif name in ("_allgather_base_", "allgather_into_tensor_", "allgather_single_"):
            self.sent["all_gather"] += size(args[1]) * (n - 1)
        elif name in ("alltoall_base_", "alltoall_single_"):
            splits = args[4]  # (output, input, group, output splits, input splits)
            mine = splits[torch.distributed.get_rank()] * args[1].element_size()
            self.sent["all_to_all"] += size(args[1]) - mine
        elif "reduce_scatter" in name:
            self.sent["reduce_scatter"] += size(args[1]) * (n - 1) / n
        elif name == "send":
            self.sent["send_recv"] += size(args[0])
        elif name != "recv_":  # what a peer's send has counted
            raise AssertionError(f"an operator that this counter does not know: {name}")


def measure(rank, world, p, algorithm, layout, causal, overlap=True):
    where = ringx.positions(p.q.shape[1], layout=layout)
    q, k, v = (x[:, where].clone().requires_grad_() for x in p[:3])
    with ringx.comm.traffic() as t:
        with C10dBytes(world) as forward:
            out = ringx.attention(
                q,
                k,
                v,
                algorithm=algorithm,
                causal=causal,
                layout=layout,
                overlap=overlap,
                check=False,
            )
        with C10dBytes(world) as backward:
            out.backward(p.dout[:, where])
    for ours, theirs in ((t.forward, forward.sent), (t.backward, backward.sent)):
        assert ours == pytest.approx(theirs)
    return sum(t.forward.values()), sum(t.backward.values())


@pytest.mark.parametrize(
    "world, dtype",
    [
        pytest.param(1, torch.bfloat16, marks=pytest.mark.fast),
        pytest.param(2, torch.float64, marks=pytest.mark.fast),
        (4, torch.bfloat16),
        # a dtype changes nothing but the size of an element
        *(
            pytest.param(world, dtype, marks=pytest.mark.slow)
            for world, dtype in (
                (1, torch.float64),
                (2, torch.bfloat16),
                (4, torch.float64),
                (8, torch.bfloat16),
                (8, torch.float64),
            )
        ),
    ],
)
@pytest.mark.parametrize("algorithm", ringx.algorithms())
def test_counted_equals_closed_form(algorithm, world, dtype):
    seqlen = 8 * world
    p = problem(seqlen, B=B, H=H, Hkv=HKV, D=D, dtype=dtype)
    cases = list(itertools.product(LAYOUTS, (False, True)))

    def on_rank(rank):
        return [measure(rank, world, p, algorithm, layout, causal) for layout, causal in cases]

    for (layout, causal), *got in zip(cases, *run(world, on_rank), strict=True):
        want = ringx.algorithms()[algorithm].bytes(
            B, seqlen, H, HKV, D, world, dtype.itemsize, causal, layout=layout
        )
        for i in (0, 1):
            assert sum(g[i] for g in got) / world == pytest.approx(want[i], rel=1e-12), (
                layout,
                causal,
            )


@pytest.mark.fast
def test_closed_forms_equal_the_published_table():
    """Bidirectional, bf16: P(6e+12L) and 12Pf for X1, 4Pf for X3 and X4 forward, 12Pf for X4
    backward (our X3 backward: 8Pf)."""
    N, S = 8, 1024
    P, e, f, L = N - 1, B * (S // N) * H * D, B * (S // N) * HKV * D, B * (S // N) * H
    a = ringx.algorithms()
    forms = {name: a[name].bytes(B, S, H, HKV, D, N, 2, False) for name in a}
    assert forms["ringx1"] == forms["ringx2"] == (P * (6 * e + 12 * L), 12 * P * f)
    assert forms["ringx3"] == (4 * P * f, 8 * P * f)
    assert forms["ringx4"] == (4 * P * f, 12 * P * f)


def test_overlap_sends_the_same_bytes():
    p = problem(32, B=B, H=H, Hkv=HKV, D=D)
    for algorithm in ringx.algorithms():
        on, off = (
            run(4, measure, 4, p, algorithm, "zigzag", True, overlap) for overlap in (True, False)
        )
        assert on == off


@pytest.mark.fast
def test_a_padded_gather_is_counted_as_sent():
    """Uneven shards: the all-gather's equal sizes force padding, which is counted."""
    p = problem(33, B=B, H=H, Hkv=HKV, D=D)
    got = run(4, measure, 4, p, "ringx3", ringx.Sharding(33, 4), False)
    assert {g[0] for g in got} == {3 * 9 * 2 * B * HKV * D * 8}


@pytest.mark.fast
def test_traffic_of_one_rank_and_outside_counts_nothing():
    p = problem(16)

    def on_rank(rank):
        with ringx.comm.traffic() as outer:
            with ringx.comm.traffic() as inner:
                ringx.attention(*(ringx.shard(x) for x in p[:3]))
            first = sum(inner.forward.values())
            ringx.attention(*(ringx.shard(x) for x in p[:3]))
        assert sum(inner.forward.values()) == first
        assert sum(outer.forward.values()) == 2 * first > 0
        assert not outer.backward

    run(2, on_rank)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"S": 12}, "S=12 does not give 8 equal"),
        ({"N": 0}, "N=0"),
        ({"itemsize": 2.0}, "itemsize"),
        ({"layout": "zig"}, "zigzag"),
    ],
)
def test_closed_form_refuses(change, message):
    sizes = dict(B=1, S=64, H=4, Hkv=4, D=8, N=8, itemsize=2, causal=True) | change
    with pytest.raises(ValueError, match=message):
        ringx.algorithms()["ringx3"].bytes(**sizes)
