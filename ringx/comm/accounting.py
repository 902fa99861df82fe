"""Bytes that ranks send, counted, and the algorithm and direction that they are sent for.

``traffic`` counts what a rank sends under a bandwidth-optimal implementation of each collective:
the definitions are in ``ringx.comm.collectives``.  Small control messages (``check=True``) are not
counted.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.profiler import record_function

from .group import Group


@dataclass
class Traffic:
    """What this rank sent inside one ``traffic()`` block, forward and backward apart: {collective:
    bytes}, and {collective: how many of them it took part in}."""

    forward: Counter = field(default_factory=Counter)
    backward: Counter = field(default_factory=Counter)
    forward_messages: Counter = field(default_factory=Counter)
    backward_messages: Counter = field(default_factory=Counter)
    rank: int = 0  # global

    def count(self, direction: str, collective: str, sent: float) -> None:
        """Adds one message of "forward" or "backward" that sends so many bytes."""
        sent_bytes, messages = {
            "forward": (self.forward, self.forward_messages),
            "backward": (self.backward, self.backward_messages),
        }[direction]
        sent_bytes[collective] += sent  # type: ignore[assignment]
        messages[collective] += 1


class Phase(NamedTuple):
    """What the messages of this thread are sent for."""

    name: str  # the algorithm
    direction: str  # "forward", "backward" or "check"


_open_blocks: list[Traffic] = []  # of all ranks of this process, which may be threads
_counting = threading.Lock()
_thread = threading.local()


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what this rank sends while the block runs (definitions: ``ringx.comm.collectives``).

    >>> with ringx.comm.traffic() as t:
    ...     ringx.attention(q, k, v).sum().backward()
    >>> t.forward, t.backward
    (Counter({'all_gather': 524288}), Counter({'all_gather': 524288, 'all_to_all': 393216}))
    """
    block = Traffic(rank=Group.of(None).global_rank)
    _open_blocks.append(block)
    try:
        yield block
    finally:
        _open_blocks[:] = [other for other in _open_blocks if other is not block]


@contextlib.contextmanager
def phase(name: str, direction: str) -> Iterator[None]:
    """Messages inside belong to this algorithm's "forward" or "backward": for accounting, error
    messages and profiles, where the ranges read "ringx4 backward" and "ringx4 backward: post (or
    wait for) broadcast from rank 1"."""
    outer = current_phase()
    _thread.phase = Phase(name, direction)
    try:
        with record_function(f"{name} {direction}"):
            yield
    finally:
        _thread.phase = outer


def current_phase() -> Phase | None:
    """The innermost ``phase`` of this thread; None outside of all."""
    return getattr(_thread, "phase", None)


def count(group: Group, collective: str, sent: float) -> None:
    """Adds a message of this rank to every ``traffic()`` block that is open on it.  Outside of a
    phase it is a forward's."""
    now = current_phase()
    direction = now.direction if now else "forward"
    with _counting:
        for block in _open_blocks:
            if block.rank == group.global_rank:
                block.count(direction, collective, sent)
