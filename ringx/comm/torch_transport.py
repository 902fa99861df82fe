"""Messages through torch.distributed: gloo, NCCL (RCCL on ROCm)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .group import Group
from .transport import Transport, Work

# renamed in torch 2.13
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def connect(group: "dist.ProcessGroup | Group | Transport | None") -> Transport:
    """The transport of a process group, as ``Group.of`` understands it; a transport stays as it
    is."""
    if isinstance(group, Transport):
        return group
    return TorchTransport(Group.of(group))


@dataclass(frozen=True)
class TorchTransport(Transport):
    """The real one."""

    def _global(self, rank: int) -> int:
        return self.group.global_ranks[rank]

    def _broadcast(self, x: torch.Tensor, src: int) -> Work | None:
        return dist.broadcast(x, self._global(src), group=self.group.pg, async_op=True)

    def _reduce(self, x: torch.Tensor, dst: int) -> Work | None:
        return dist.reduce(x, self._global(dst), group=self.group.pg, async_op=True)

    def _all_reduce_max(self, x: torch.Tensor) -> Work | None:
        return dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group.pg, async_op=True)

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Work | None:
        return all_gather_single(out.view(-1), x.view(-1), group=self.group.pg, async_op=True)

    def _all_to_all(
        self,
        out: torch.Tensor,
        message: torch.Tensor,
        incoming: list[int],
        outgoing: list[int],
    ) -> Work | None:
        return dist.all_to_all_single(
            out, message, incoming, outgoing, group=self.group.pg, async_op=True
        )

    def _send_recv(self, x: torch.Tensor, dst: int, out: torch.Tensor, src: int) -> Work | None:
        pg = self.group.pg
        send = dist.P2POp(dist.isend, x, self._global(dst), group=pg)
        receive = dist.P2POp(dist.irecv, out, self._global(src), group=pg)
        return _AllOf(dist.batch_isend_irecv([send, receive]))  # batched: NCCL's could deadlock


class _AllOf:
    """Several works as one."""

    def __init__(self, works: list[dist.Work]):
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
