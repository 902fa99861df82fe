"""Overlap: the next collective is posted before the current block is computed, forward and backward; read from events."""

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run

import ringx
from ringx.kernels import cpu

pytestmark = pytest.mark.fast

WORLD, ROWS = 4, 8


@pytest.fixture
def events(monkeypatch):
    """{rank: [("post", collective, root), ("compute", whose block), ...]} of all ranks."""
    seen = {r: [] for r in range(WORLD)}

    def spy_on(owner, name, note):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            seen[dist.get_rank()].append(note(*args, **kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("broadcast", "reduce"):
        spy_on(dist, name, lambda x, root, *a, name=name, **k: ("post", name, root))
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    spy_on(dist, gather, lambda *a, **k: ("post", "all_gather", None))
    spy_on(dist, "all_to_all_single", lambda *a, **k: ("post", "all_to_all", None))
    # each rank's blocks hold its own number, so that a kernel call shows whose block it computes
    spy_on(cpu, "fwd", lambda q, k, v, **kw: ("compute", owners(q), owners(k)))
    spy_on(cpu, "bwd", lambda dout, q, k, *a, **kw: ("compute", owners(q), owners(k)))
    return seen


def owners(x):
    return tuple(sorted(set(x[0, :, 0, 0].long().tolist())))


def step(rank, algorithm, overlap, seen):
    q, k, v = (torch.full((1, ROWS, 1, 4), float(rank), requires_grad=True) for _ in range(3))
    out = ringx.attention(q, k, v, algorithm=algorithm, overlap=overlap, check=False)
    forward = list(seen[rank])
    seen[rank].clear()
    out.sum().backward()
    return forward, list(seen[rank])


def order(log, rank, moves):
    """For each owner but the last: is the next owner's broadcast posted before this owner's block is computed?"""
    which = 1 if moves == "q" else 2
    at = {("post", e[2]): i for i, e in enumerate(log) if e[:2] == ("post", "broadcast")}
    computed = {
        e[which][0]: i
        for i, e in enumerate(log)
        if e[0] == "compute" and e[1:] != ((rank,), (rank,))
    }
    assert sorted(o for _, o in at) == list(range(WORLD))
    return (
        [at["post", o + 1] < computed[o] for o in range(WORLD - 1) if o != rank],
        at["post", 0],
        computed,
        log,
    )


@pytest.mark.parametrize("algorithm", ["ringx1", "ringx2", "ringx4"])
@pytest.mark.parametrize("overlap", [True, False])
def test_broadcasts(algorithm, overlap, events):
    for rank, (forward, backward) in enumerate(run(WORLD, step, algorithm, overlap, events)):
        for log, moves in ((forward, "q" if algorithm != "ringx4" else "kv"), (backward, "kv")):
            before, first_post, _, _ = order(log, rank, moves)
            assert all(before) if overlap else not any(before), (rank, log)
            own = log.index(("compute", (rank,), (rank,)))
            assert (first_post < own) is overlap, "the own block hides the first broadcast"


@pytest.mark.parametrize("algorithm", ["ringx1", "ringx4"])
def test_reduces_fly_while_the_next_block_is_computed(algorithm, events):
    """Waiting for an owner's reduce comes after the next owner's block: without overlap each is waited for at once."""
    waits = []
    original = ringx.comm.Pending.wait

    def wait(self):
        if self._work is not None and "reduce to" in self._step:
            waits.append(
                (dist.get_rank(), int(self._step.split()[-1]), len(events[dist.get_rank()]))
            )
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringx.comm.Pending, "wait", wait)
        logs = run(WORLD, step, algorithm, True, events)
    for rank, (_, backward) in enumerate(logs):
        posts = {e[2]: i for i, e in enumerate(backward) if e[:2] == ("post", "reduce")}
        for owner in range(WORLD - 1):
            waited = [n for r, o, n in waits if (r, o) == (rank, owner)][-1]  # the backward's
            computed = [i for i, e in enumerate(backward) if e[0] == "compute" and i > posts[owner]]
            if owner + 1 != rank:
                assert computed
                assert waited > computed[0]


@pytest.mark.parametrize("overlap", [True, False])
def test_all_gather(overlap, events):
    for rank, (forward, backward) in enumerate(run(WORLD, step, "ringx3", overlap, events)):
        others = tuple(r for r in range(WORLD) if r != rank)
        for log in (forward, backward):
            kinds = [e[1] if e[0] == "post" else e[2] for e in log]
            assert kinds[:3] == ["all_gather", (rank,), others], (
                "own block first, then one call for all the others"
            )


def test_all_gather_waits_first_without_overlap(monkeypatch):
    """With overlap the own block is computed between posting the gather and waiting for it."""
    log = {r: [] for r in range(WORLD)}
    wait, fwd = ringx.comm.Pending.wait, cpu.fwd

    def spy_wait(self):
        if self._work is not None:
            log[dist.get_rank()].append("wait")
        return wait(self)

    def spy_fwd(*args, **kwargs):
        log[dist.get_rank()].append("compute")
        return fwd(*args, **kwargs)

    monkeypatch.setattr(ringx.comm.Pending, "wait", spy_wait)
    monkeypatch.setattr(cpu, "fwd", spy_fwd)

    def forward(rank, overlap):
        log[rank].clear()
        ringx.attention(
            *(torch.ones(1, ROWS, 1, 4) for _ in range(3)), overlap=overlap, check=False
        )
        return list(log[rank])

    assert run(WORLD, forward, True) == [["compute", "wait", "compute"]] * WORLD
    assert run(WORLD, forward, False) == [["wait", "compute", "compute"]] * WORLD
