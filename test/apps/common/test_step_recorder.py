"""The estimate's recorder: what each kind of message sends, and what attention receives.

The estimates of whole steps are tested with the apps, whose real runs they must equal.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from apps.common.estimate import _alone, _StepRecorder
from ringx.comm.collectives import COLLECTIVES
from ringx.launch.mesh import Mesh, Shape

pytestmark = pytest.mark.fast

RANKS, RANK = 4, 1
SIZE = 4 * 24  # bytes of the message: 24 numbers in fp32


def record(call: Callable[[torch.Tensor], object]) -> _StepRecorder:
    """What is seen of call(message) inside attention, by rank 1 of 4."""
    with _alone(RANKS, RANK):
        recorder = _StepRecorder(Mesh.make(Shape(cp=RANKS)))
        with FakeTensorMode(), recorder:
            recorder.stage = "attention forward"
            call(torch.zeros(24))
    return recorder


def exchange_with_neighbours(message: torch.Tensor) -> None:
    received = torch.empty_like(message)
    works = [dist.isend(message, RANK + 1), dist.irecv(received, RANK - 1)]
    for work in works:
        work.wait()


def reduce_scatter(message: torch.Tensor) -> None:
    dist.reduce_scatter_tensor(message.new_empty(24 // RANKS), message)


def all_gather(message: torch.Tensor) -> None:
    dist.all_gather_into_tensor(message.new_empty(24 * RANKS), message)


def all_to_all(message: torch.Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(message), message)


# For each row of the table: how it is called, and the bytes that this rank receives as they are.
CALLS: dict[str, tuple[Callable[[torch.Tensor], object], int]] = {
    "broadcast": (lambda message: dist.broadcast(message, 0), SIZE),
    "reduce": (lambda message: dist.reduce(message, 0), 0),
    "all_reduce": (dist.all_reduce, 0),
    "all_gather": (all_gather, SIZE * RANKS),
    "reduce_scatter": (reduce_scatter, 0),
    "all_to_all": (all_to_all, SIZE),
    "send_recv": (exchange_with_neighbours, SIZE),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_each_collective_sends_what_the_table_says(name):
    call, received = CALLS[name]
    recorder = record(call)
    sent = COLLECTIVES[name].sent_bytes(SIZE, RANKS)
    assert recorder.sent == {"attention forward": {name: sent}}
    assert recorder.remote_peak == received


def test_a_message_to_one_rank_is_sent_once_and_not_received():
    recorder = record(lambda message: dist.isend(message, RANK + 1))
    assert recorder.sent_bytes() == {"attention forward": {"send_recv": SIZE}}
    assert recorder.remote_peak == 0


def test_received_messages_count_until_they_are_freed():
    def receive_from_three(message: torch.Tensor) -> None:
        first, second = torch.empty_like(message), torch.empty_like(message)
        dist.recv(first, 0)
        dist.recv(second, 2)
        del first
        third = torch.empty_like(message)
        dist.recv(third, 3)

    recorder = record(receive_from_three)
    assert recorder.sent_bytes() == {}
    assert recorder.remote_peak == 2 * SIZE


@pytest.mark.parametrize("splits", [(0, 24, 0, 0), (6, 0, 12, 6), (1, 2, 3, 18)])
def test_an_all_to_all_of_unequal_parts_is_exact(splits):
    def exchange(message: torch.Tensor) -> None:
        received = message.new_empty(4 * splits[RANK])
        dist.all_to_all_single(received, message, [splits[RANK]] * RANKS, list(splits))

    sent = record(exchange).sent["attention forward"]["all_to_all"]
    assert sent == pytest.approx(4 * (24 - splits[RANK]))


def test_an_all_to_all_of_a_list_of_tensors_sends_all_but_its_own():
    def exchange(message: torch.Tensor) -> None:
        parts = list(message.split([2, 4, 8, 10]))
        dist.all_to_all([torch.empty(4) for _ in range(RANKS)], parts)

    assert record(exchange).sent["attention forward"]["all_to_all"] == pytest.approx(4 * 20)


def test_an_unknown_collective_is_refused():
    with pytest.raises(NotImplementedError, match="scatter_ is not known here"):
        record(lambda message: dist.scatter(message, None, src=0))
