"""Overlap: messages are in flight while blocks are computed, forward and backward; without it each
is waited for at once.

Launch: python -m pytest test/core/test_overlap.py
"""

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run

import ringx
from ringx.comm import RecordingTransport, connect
from ringx.comm.recording import Event
from ringx.kernels import cpu

WORLD, ROWS = 4, 8
ALGORITHMS = ringx.algorithms()


def messages_of(algorithm, causal=False):
    """({collective: count} of the forward, of the backward)"""
    return ALGORITHMS[algorithm].messages(1, WORLD * ROWS, 1, 1, 4, WORLD, 4, causal)


STREAMS = [name for name in ALGORITHMS if "broadcast" in messages_of(name).forward]
MOVE_QUERIES = [name for name in STREAMS if "reduce" in messages_of(name).forward]
REDUCE = [name for name in ALGORITHMS if "reduce" in messages_of(name).backward]


@pytest.fixture
def events(monkeypatch):
    """{rank: its Events, and ("compute", owners of the queries, owners of the keys) among them}."""
    logs = {rank: [] for rank in range(WORLD)}

    def spy_on(name, first_operand):
        original = getattr(cpu, name)

        def wrapper(*args, **kwargs):
            q, k = args[first_operand : first_operand + 2]
            logs[dist.get_rank()].append(("compute", owners(q), owners(k)))
            return original(*args, **kwargs)

        monkeypatch.setattr(cpu, name, wrapper)

    spy_on("forward", 0)
    spy_on("backward", 1)  # after dout
    return logs


def owners(x):
    """Each rank's blocks hold its own number, so that a kernel call shows whose block it
    computes."""
    return tuple(sorted(set(x[0, :, 0, 0].long().tolist())))


def step(rank, algorithm, overlap, logs):
    """(events of the forward, of the backward)"""
    q, k, v = (torch.full((1, ROWS, 1, 4), float(rank), requires_grad=True) for _ in range(3))
    transport = RecordingTransport.over(connect(None), logs[rank])
    out = ringx.attention(
        q, k, v, group=transport, algorithm=algorithm, overlap=overlap, check=False
    )
    forward = list(logs[rank])
    logs[rank].clear()
    out.sum().backward()
    return forward, list(logs[rank])


def is_compute(event):
    return event[0] == "compute"


def computed_at(log, rank, operand):
    """{owner of the remote block: where in the log it is computed}"""
    own_block = ("compute", (rank,), (rank,))
    return {
        event[operand][0]: i
        for i, event in enumerate(log)
        if is_compute(event) and event != own_block
    }


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_own_block_is_computed_while_the_first_message_is_in_flight(algorithm, events):
    for rank, logs in enumerate(run(WORLD, step, algorithm, True, events)):
        for log in logs:
            own = log.index(("compute", (rank,), (rank,)))
            waits = [i for i, event in enumerate(log) if event[0] == "wait"]
            assert log[0][0] == "post" and own < waits[0], log


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_overlap_every_message_is_waited_for_at_once(algorithm, events):
    for logs in run(WORLD, step, algorithm, False, events):
        for log in logs:
            for i, event in enumerate(log):
                if event[0] == "post":
                    assert log[i + 1] == event._replace(action="wait"), log


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("overlap", [True, False])
def test_every_message_is_waited_for_and_none_more_often_than_posted(algorithm, overlap, events):
    for logs in run(WORLD, step, algorithm, overlap, events):
        for log, expected in zip(logs, messages_of(algorithm), strict=True):
            posts = sorted(event[1:] for event in log if event[0] == "post")
            waits = sorted(event[1:] for event in log if event[0] == "wait")
            assert posts == waits and len(posts) == sum(expected.values())


@pytest.mark.parametrize("algorithm", STREAMS)
@pytest.mark.parametrize("overlap", [True, False])
def test_the_next_broadcast_is_posted_before_a_block_is_computed(algorithm, overlap, events):
    for rank, (forward, backward) in enumerate(run(WORLD, step, algorithm, overlap, events)):
        moved = 1 if algorithm in MOVE_QUERIES else 2  # operand of a compute entry: queries, keys
        for log, operand in ((forward, moved), (backward, 2)):
            posted = {
                event.peer: i for i, event in enumerate(log) if event[:2] == ("post", "broadcast")
            }
            computed = computed_at(log, rank, operand)
            assert sorted(posted) == list(range(WORLD))
            early = [posted[o + 1] < computed[o] for o in range(WORLD - 1) if o != rank]
            assert all(early) if overlap else not any(early), (rank, log)


@pytest.mark.parametrize("algorithm", REDUCE)
def test_a_reduce_is_in_flight_while_the_next_block_is_computed(algorithm, events):
    """Waiting for an owner's reduce comes after the next owner's block."""
    for rank, (_, backward) in enumerate(run(WORLD, step, algorithm, True, events)):
        for owner in range(WORLD - 1):
            if owner + 1 == rank:
                continue
            posted = backward.index(Event("post", "reduce", owner))
            waited = backward.index(Event("wait", "reduce", owner))
            computed = [i for i, event in enumerate(backward) if is_compute(event) and i > posted]
            assert computed and waited > computed[0]


@pytest.mark.parametrize("overlap", [True, False])
def test_ringx3_computes_all_remote_blocks_in_one_call(overlap, events):
    for rank, logs in enumerate(run(WORLD, step, "ringx3", overlap, events)):
        others = tuple(r for r in range(WORLD) if r != rank)
        for log in logs:
            computed = [event[2] for event in log if is_compute(event)]
            assert computed[:2] == [(rank,), others]


def test_ring_sends_a_block_on_while_it_is_computed(events):
    for rank, (forward, _) in enumerate(run(WORLD, step, "ring", True, events)):
        kinds = [event[0] for event in forward]
        assert kinds == ["post", "compute", "wait"] * (WORLD - 1) + ["compute"]
        visited = [event[2][0] for event in forward if is_compute(event)]
        assert visited == [(rank - s) % WORLD for s in range(WORLD)]
        assert {event.peer for event in forward if event[0] == "post"} == {(rank + 1) % WORLD}
