"""Transports and their table: every message does what its name says on each of them, is counted,
and explains its failure.

Launch: python -m pytest test/core/test_comm.py
"""

import copy
import dataclasses
import itertools
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from helpers.oracle import full_attention, problem
from helpers.ranks import run

import ringx
from ringx.api import plan_call
from ringx.comm import (
    COLLECTIVES,
    FakeTransport,
    Group,
    PeerError,
    Pending,
    RecordingTransport,
    ThreadExchange,
    ThreadTransport,
    Transport,
    connect,
    phase,
    traffic,
)
from ringx.comm.collectives import of_operator

pytestmark = pytest.mark.fast
ALGORITHMS = ringx.algorithms()


def on_threads(world_size, call):
    """[call(transport) of every rank], the ranks being threads that share memory."""
    exchange = ThreadExchange(world_size, timeout=30)
    results = [None] * world_size

    def main(rank):
        try:
            transport = ThreadTransport(Group.without_peers(rank, world_size), exchange)
            results[rank] = call(transport)
        except BaseException as error:
            results[rank] = error
            exchange.abort()
            raise

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def on_gloo(world_size, call):
    return run(world_size, lambda rank: call(connect(None)))


def recorded_on_gloo(world_size, call):
    return run(world_size, lambda rank: call(RecordingTransport.over(connect(None), [])))


def every_message(transport):
    """The result of each kind of message, from inputs that are the rank's number and its
    position."""
    rank, n = transport.group.rank, transport.group.world_size
    x = torch.arange(6.0).view(2, 3) + 10 * rank
    parts = [torch.full((rank + 1,), float(10 * rank + dst)) for dst in range(n)]
    incoming = [src + 1 for src in range(n)]
    following, previous = (rank + 1) % n, (rank - 1) % n
    reduced = transport.reduce(x.clone(), n - 1).wait()
    return {
        "broadcast": transport.broadcast(x.clone(), n - 1).wait(),
        "reduce": reduced if rank == n - 1 else None,
        "all_reduce": transport.all_reduce_max(x.clone()).wait(),
        "all_gather": transport.all_gather(x).wait(),
        "all_to_all": transport.all_to_all(parts, incoming).wait(),
        "send_recv": transport.send_recv(x, following, previous, x.shape).wait(),
    }


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("ranks", [on_gloo, recorded_on_gloo, on_threads])
def test_every_message_brings_what_its_name_says(ranks, n):
    base = torch.arange(6.0).view(2, 3)
    for rank, got in enumerate(ranks(n, every_message)):
        parts = [torch.full((src + 1,), float(10 * src + rank)) for src in range(n)]
        expected = {
            "broadcast": base + 10 * (n - 1),
            "reduce": n * base + 10 * sum(range(n)),
            "all_reduce": base + 10 * (n - 1),
            "all_gather": torch.stack([base + 10 * r for r in range(n)]),
            "all_to_all": torch.cat(parts),
            "send_recv": base + 10 * ((rank - 1) % n),
        }
        assert set(expected) == set(got) == set(COLLECTIVES) - {"reduce_scatter"}
        for name, value in expected.items():
            if got[name] is not None:
                torch.testing.assert_close(got[name], value, msg=f"{name} on rank {rank}")


def test_a_lone_rank_gets_its_own_at_once_and_sends_nothing():
    x = torch.ones(2, 3)
    transport = connect(None)
    with traffic() as sent:
        assert transport.broadcast(x, 0).wait() is x
        assert transport.all_gather(x).wait().shape == (1, 2, 3)
        assert transport.send_recv(x, 0, 0, x.shape).wait() is x
    assert not sent.forward


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_patterns_are_exact_on_ranks_that_are_threads_without_any_backend(algorithm):
    """The transport of GPU checks: forward and backward of each pattern against full attention."""
    n, p = 3, problem(25)
    layout = ringx.Sharding(25, n, "zigzag")
    want = full_attention(p, causal=True)

    def attend(transport):
        where = layout.positions(transport.group.rank)
        q, k, v, dout = (x[:, where] for x in (p.q, p.k, p.v, p.dout))
        plan = plan_call(
            q.clone().requires_grad_(),
            k,
            v,
            transport=transport,
            algorithm=algorithm,
            causal=True,
            layout=layout,
            scale=None,
            kernel="auto",
            overlap=True,
            deterministic=False,
        )
        module = ALGORITHMS[algorithm].module
        with torch.no_grad():
            out, lse = module.forward(q, k, v, plan)
            dq, dk, dv = module.backward(dout, q, k, v, out, lse, plan)
        return where, {"out": out, "dq": dq, "dk": dk, "dv": dv}

    for where, got in on_threads(n, attend):
        for name, value in got.items():
            torch.testing.assert_close(value, want[name][:, where], rtol=1e-10, atol=1e-10)


# ---- what is sent: closed forms of the registry


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("overlap", [True, False])
def test_messages_of_any_number_of_ranks_are_those_of_the_registry(algorithm, overlap):
    """Every rank of N, one after another without peers: the mean number of messages, and the mean
    of the bytes."""
    for n, layout, causal in itertools.product((1, 2, 5, 16), ringx.layout.LAYOUTS, (True, False)):
        sizes = dict(B=1, S=4 * n, H=2, Hkv=2, D=8, N=n, itemsize=4, causal=causal, layout=layout)
        row = ALGORITHMS[algorithm]
        total = {"forward": 0.0, "backward": 0.0}
        for rank in range(n):
            counted = counted_alone(rank, n, algorithm, overlap, layout, causal)
            expected = row.messages(**sizes)
            assert +counted.forward_messages == +expected.forward, (n, layout, causal)
            assert +counted.backward_messages == +expected.backward, (n, layout, causal)
            total["forward"] += sum(counted.forward.values())
            total["backward"] += sum(counted.backward.values())
        forward, backward = row.bytes(**sizes)
        assert total["forward"] / n == pytest.approx(forward)
        assert total["backward"] / n == pytest.approx(backward)


def counted_alone(rank, n, algorithm, overlap, layout, causal):
    """What rank `rank` of n sends in a forward and a backward, by its own account."""
    transport = FakeTransport.of_rank(rank, n)
    q, k, v = (torch.zeros(1, 4, 2, 8) for _ in range(3))
    plan = plan_call(
        q.clone().requires_grad_(),
        k,
        v,
        transport=transport,
        algorithm=algorithm,
        causal=causal,
        layout=layout,
        scale=None,
        kernel="auto",
        overlap=overlap,
        deterministic=False,
    )
    module = ALGORITHMS[algorithm].module
    with traffic() as counted, torch.no_grad():
        with phase(algorithm, "forward"):
            module.forward(q, k, v, plan)
        with phase(algorithm, "backward"):
            lse = torch.zeros(1, 2, 4)
            module.backward(q, q, k, v, q, lse, plan)
    return counted


def test_every_message_of_a_pattern_is_a_row_and_a_row_without_a_method_is_named():
    rows = set(COLLECTIVES)
    methods = {name for name in rows if hasattr(Transport, name)} | {"all_reduce"}
    assert hasattr(Transport, "all_reduce_max")
    assert rows - methods == {"reduce_scatter"}  # trainers use it, no pattern does
    for algorithm in ALGORITHMS.values():
        messages = algorithm.messages(1, 8, 2, 2, 8, 2, 4, False)
        assert set(messages.forward) | set(messages.backward) <= methods


def test_bytes_that_are_whole_are_integers():
    assert isinstance(COLLECTIVES["all_gather"].sent_bytes(1024, 3), int)
    assert COLLECTIVES["broadcast"].sent_bytes(1024, 3) == 1024 * 2 / 3


def test_ranks_without_a_process_group_cannot_be_compared():
    q = torch.ones(1, 4, 2, 8)
    with pytest.raises(ValueError, match="pass check=False"):
        ringx.attention(q, q, q, group=FakeTransport.of_rank(1, 4))
    assert ringx.attention(q, q, q, group=FakeTransport.of_rank(1, 4), check=False).shape == q.shape
    where = ringx.positions(16, group=FakeTransport.of_rank(1, 4))
    assert where.tolist() == ringx.Sharding(16, 4).positions(1).tolist()


def test_a_rank_without_a_process_group_is_told_its_own_mistake_first():
    q = torch.ones(1, 4, 2, 8)
    with pytest.raises(ValueError, match="algorithm='rings' is unknown"):
        ringx.attention(q, q, q, group=FakeTransport.of_rank(1, 4), algorithm="rings")


def test_ranks_that_are_threads_are_counted_together():
    """Every message of every thread is in the one block that is open: none is lost."""
    world_size, messages = 4, 50

    def send_many(transport):
        for _ in range(messages):
            transport.all_gather(torch.zeros(8)).wait()

    with traffic() as counted:
        on_threads(world_size, send_many)
    assert counted.forward_messages == {"all_gather": world_size * messages}
    assert counted.forward == {"all_gather": world_size * messages * 32 * (world_size - 1)}


def test_an_algorithm_is_data():
    """It can be sent to another process, copied, and turned into a dictionary."""
    for algorithm in ALGORITHMS.values():
        assert pickle.loads(pickle.dumps(algorithm)) == algorithm == copy.deepcopy(algorithm)
        assert dataclasses.asdict(algorithm)["pattern"] == algorithm.pattern


def test_the_table_knows_torchs_operators():
    names = {
        "allgather_into_tensor_": "all_gather",
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "reduce_": "reduce",
        "allreduce_": "all_reduce",
        "alltoall_base_": "all_to_all",
        "broadcast_": "broadcast",
        "send": "send_recv",
        "recv_": "send_recv",
    }
    for operator, name in names.items():
        assert of_operator(operator).name == name
    assert of_operator("barrier") is None


# ---- errors


@pytest.mark.parametrize("where", ["post", "wait"])
@pytest.mark.parametrize(
    ("raised", "explained"),
    [
        (RuntimeError("Connection closed by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (NotImplementedError("this backend has no such operation"), False),
        (torch.OutOfMemoryError("out of memory"), False),
        (ValueError("a wrong argument"), False),
        (RuntimeError("Invalid scalar type"), False),  # what gloo says of float8
    ],
)
def test_only_errors_of_the_transport_blame_a_peer(where, raised, explained):
    def fail():
        raise raised

    class FailingWork:
        wait = staticmethod(fail)

    def attempt():
        post = fail if where == "post" else FailingWork
        Pending(Group.without_peers(1, 2), "broadcast from rank 0", post, torch.ones(1)).wait()

    if explained:
        with pytest.raises(PeerError, match="broadcast from rank 0 failed on rank 1 of 2"):
            attempt()
    else:
        with pytest.raises(type(raised), match=str(raised)) as error:
            attempt()
        assert error.value is raised


def test_what_gloo_cannot_do_is_no_dead_peer():
    def reduce_float8(rank):
        x = torch.ones(4).to(torch.float8_e4m3fn)
        with pytest.raises(RuntimeError, match="Invalid scalar type") as error:
            connect(None).reduce(x, 0).wait()
        return isinstance(error.value, PeerError)

    assert run(2, reduce_float8) == [False, False]
