"""The table of what ranks can say to each other: names, how torch calls them, and how many bytes
each sends.

Whatever counts, measures, plans or plots communication iterates over COLLECTIVES.  A new kind of
message is a row here, a method of ``Transport`` with its hook, and a measurement in ``ringx
bench-comm``.  reduce_scatter, which trainers use and no pattern does, has no method.

Bytes.  `sent(N)` is what a rank sends under a bandwidth-optimal implementation on N ranks, the mean
over ranks, per byte of the collective's *size* as nccl-tests defines it (its doc/PERFORMANCE.md):
the message for broadcast, reduce, all_reduce and send_recv; the result for all_gather; what each
rank hands over for reduce_scatter and all_to_all.

    broadcast, reduce            (N-1)/N     a pipeline in which N-1 of the N ranks send it once
    all_reduce                   2 (N-1)/N   reduce-scatter + all-gather
    all_gather                   (N-1)/N     each rank's N-th of the result reaches the N-1 others
    reduce_scatter, all_to_all   (N-1)/N     all but the own part (of unequal parts: exactly that)
    send_recv                    1           one message to one rank

`bus(N)` is nccl-tests' factor from size / time to "bus bandwidth", which is comparable with a
link's whatever N is.  What a backend really puts on the wire differs by a factor of its own (gloo's
reduce sends 1.1 to 2.3 times as much): ``ringx bench-comm`` measures it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Share = Fraction | int  # int where it does not depend on N: files then hold a whole number


@dataclass(frozen=True)
class Collective:
    """One row of the table; send_recv, a message from rank to rank, is one of them."""

    name: str  # in records and in what ``comm.traffic`` counts
    title: str  # for people and profiles
    operators: tuple[str, ...]  # parts of the names of torch's operators, without underscores
    sent_share: Callable[[int], Share]  # N -> bytes that a rank sends / size
    bus_factor: Callable[[int], Share]  # N -> bus bandwidth / (size / time)
    size_is_result: bool = False  # its size is that of the result, N times the message
    benchmark: str = ""  # its name in ``ringx bench-comm``, where it differs

    @property
    def benchmark_name(self) -> str:
        return self.benchmark or self.name

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends / size."""
        return _as_number(self.sent_share(world_size))

    def bus(self, world_size: int) -> float:
        """Bus bandwidth / (size / time)."""
        return _as_number(self.bus_factor(world_size))

    def size(self, message: int, world_size: int) -> int:
        """The size, of what one rank hands over in bytes."""
        return message * world_size if self.size_is_result else message

    def sent_bytes(self, message: int, world_size: int) -> float:
        """Bytes that a rank sends (mean over ranks) when each hands over `message` bytes; an int
        where it is a whole number."""
        sent = self.size(message, world_size) * self.sent_share(world_size)
        return int(sent) if sent.denominator == 1 else float(sent)


def _as_number(share: Share) -> float:
    return share if isinstance(share, int) else float(share)


def _one(world_size: int) -> Share:
    return 1


def _share_of_others(world_size: int) -> Share:
    return Fraction(world_size - 1, world_size)


def _twice_the_share(world_size: int) -> Share:
    return 2 * _share_of_others(world_size)


_ROWS = (
    Collective(
        name="broadcast",
        title="broadcast",
        operators=("broadcast",),
        sent_share=_share_of_others,
        bus_factor=_one,
    ),
    Collective(
        name="reduce",
        title="reduce",
        operators=("reduce",),
        sent_share=_share_of_others,
        bus_factor=_one,
    ),
    Collective(
        name="all_reduce",
        title="all-reduce",
        operators=("allreduce",),
        sent_share=_twice_the_share,
        bus_factor=_twice_the_share,
    ),
    Collective(
        name="all_gather",
        title="all-gather",
        size_is_result=True,
        operators=("allgather",),
        sent_share=_share_of_others,
        bus_factor=_share_of_others,
    ),
    Collective(
        name="reduce_scatter",
        title="reduce-scatter",
        operators=("reducescatter",),
        sent_share=_share_of_others,
        bus_factor=_share_of_others,
    ),
    Collective(
        name="all_to_all",
        title="all-to-all",
        operators=("alltoall",),
        sent_share=_share_of_others,
        bus_factor=_share_of_others,
    ),
    Collective(
        name="send_recv",
        title="send/receive",
        operators=("send", "recv"),
        sent_share=_one,
        bus_factor=_one,
        # every rank sends to the next one and receives from the one before, as the pattern `ring`
        benchmark="ring",
    ),
)
COLLECTIVES = {row.name: row for row in _ROWS}
BENCHMARKS = {row.benchmark_name: row for row in _ROWS}


def of_operator(operator: str) -> Collective | None:
    """The row of an operator of torch ("allgather_into_tensor_", "send", ...); None if it is none
    of them.  The receiving half of send_recv is one, too."""
    plain = operator.replace("_", "")
    matches = [
        (len(part), row) for row in _ROWS for part in row.operators if plain.startswith(part)
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None
