"""Ranks that are threads of one process and hand each other tensors in its memory.

For many ranks on one GPU, which cannot hold several NCCL ranks: patterns run as they are, and every
message is a copy on the device.  All ranks of a group share one ThreadExchange.  Messages have
arrived when they are posted: nothing overlaps.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch

from .transport import Transport


class ThreadExchange:
    """A meeting point of `world_size` threads: what each hands in is seen by all once all have
    handed in."""

    def __init__(self, world_size: int, timeout: float = 300.0):
        """`timeout`: seconds that a thread waits for the others; then threading.BrokenBarrierError
        is raised on all."""
        self._slots: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size, timeout=timeout)

    def swap(self, rank: int, x: Any) -> list[Any]:
        """What every rank handed in, by rank.  To be followed by ``finish`` when it has been
        read."""
        self._slots[rank] = x
        self._barrier.wait()
        return list(self._slots)

    def finish(self) -> None:
        """Waits until all have read: only then may a rank write to what it handed in."""
        self._barrier.wait()

    def abort(self) -> None:
        """A rank failed: nobody waits for it."""
        self._barrier.abort()


@dataclass(frozen=True)
class ThreadTransport(Transport):
    """One rank's side of a ThreadExchange."""

    exchange: ThreadExchange

    def _broadcast(self, x: torch.Tensor, src: int) -> None:
        received = self.exchange.swap(self.group.rank, x)
        if self.group.rank != src:
            x.copy_(received[src])
        self.exchange.finish()

    def _reduce(self, x: torch.Tensor, dst: int) -> None:
        received = self.exchange.swap(self.group.rank, x)
        total = torch.stack(received).sum(0) if self.group.rank == dst else None
        self.exchange.finish()
        if total is None:
            x.fill_(torch.nan)  # lost, as with gloo
        else:
            x.copy_(total)

    def _all_reduce_max(self, x: torch.Tensor) -> None:
        received = self.exchange.swap(self.group.rank, x)
        maximum = torch.stack(received).amax(0)
        self.exchange.finish()
        x.copy_(maximum)

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> None:
        torch.stack(self.exchange.swap(self.group.rank, x), out=out)
        self.exchange.finish()

    def _all_to_all(
        self,
        out: torch.Tensor,
        message: torch.Tensor,
        incoming: list[int],
        outgoing: list[int],
    ) -> None:
        received = self.exchange.swap(self.group.rank, message.split(outgoing))
        torch.cat([parts[self.group.rank] for parts in received], out=out)
        self.exchange.finish()

    def _send_recv(self, x: torch.Tensor, dst: int, out: torch.Tensor, src: int) -> None:
        out.copy_(self.exchange.swap(self.group.rank, x)[src])
        self.exchange.finish()
