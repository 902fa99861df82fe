"""A rank without peers: messages are counted, and nothing arrives.

The schedule of any rank of any number of ranks runs in one process: what it posts, what it sends,
what it costs the host.  Received tensors hold whatever their memory held.  Pass it to
``attention(group=...)`` with check=False, since there is nobody to compare the call with.
"""

from dataclasses import dataclass

import torch

from .group import Group
from .transport import Transport


@dataclass(frozen=True)
class FakeTransport(Transport):
    """Sends to nobody."""

    @classmethod
    def of_rank(cls, rank: int, world_size: int) -> "FakeTransport":
        """Rank `rank` of `world_size` ranks that do not exist."""
        return cls(Group.without_peers(rank, world_size))

    def _broadcast(self, x: torch.Tensor, src: int) -> None:
        pass

    def _reduce(self, x: torch.Tensor, dst: int) -> None:
        pass

    def _all_reduce_max(self, x: torch.Tensor) -> None:
        pass

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> None:
        pass

    def _all_to_all(
        self,
        out: torch.Tensor,
        message: torch.Tensor,
        incoming: list[int],
        outgoing: list[int],
    ) -> None:
        pass

    def _send_recv(self, x: torch.Tensor, dst: int, out: torch.Tensor, src: int) -> None:
        pass
