"""shard, unshard, positions: between the global sequence and this rank's tokens."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from . import comm
from .comm import Group, Transport
from .layout import Sharding, resolve_local_sharding, resolve_sharding


def positions(
    seqlen: int, *, group: "dist.ProcessGroup | None" = None, layout: "str | Sharding" = "zigzag"
) -> torch.Tensor:
    """[S_local] int64 on the CPU: the global position of each of this rank's tokens, for RoPE,
    labels and masks.

    `seqlen` is the global length.  Local, no communication.  Raises ValueError if the layout cannot
    hold the sequence."""
    own_group = comm.connect(group).group
    return _resolve(layout, own_group, seqlen).positions(own_group.rank)


def shard(
    x: torch.Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    dim: int = 1,
    layout: "str | Sharding" = "zigzag",
) -> torch.Tensor:
    """This rank's tokens of a global `x` (the same on every rank), in layout order, along `dim`.

    Local, no communication.  Its gradient is that of indexing: zero at the tokens of other ranks,
    so the sum over ranks of the gradients is the gradient of the sum of the ranks' losses."""
    own_group = comm.connect(group).group
    dim = _check(x, dim)
    index = _resolve(layout, own_group, x.shape[dim]).positions(own_group.rank)
    return x.index_select(dim, index.to(x.device))


def unshard(
    x: torch.Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    dim: int = 1,
    layout: "str | Sharding" = "zigzag",
) -> torch.Tensor:
    """The inverse of ``shard``: the global tensor, on every rank.  Collective (one all-gather;
    backward one all-to-all).

    The gradient is that of the *sum* over ranks of their losses: each token's owner gets the sum of
    the gradients that all ranks have for it.  Where every rank computes the same loss from the
    result, divide it by the number of ranks."""
    transport = comm.connect(group)
    dim = _check(x, dim)
    sharding = resolve_local_sharding(
        layout, transport.group.world_size, transport.group.rank, x.shape[dim]
    )
    return _Unshard.apply(x, transport, dim, sharding)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, transport: Transport, dim: int, sharding: Sharding
    ) -> torch.Tensor:
        ctx.arguments = transport, dim, sharding
        sizes = [sharding.size(rank) for rank in range(transport.group.world_size)]
        tokens_first = x.movedim(dim, 0)
        padded = tokens_first.new_zeros((max(sizes), *tokens_first.shape[1:]))
        padded[: tokens_first.shape[0]] = tokens_first
        with comm.phase("unshard", "forward"):
            gathered = transport.all_gather(padded).wait()
        out = tokens_first.new_empty((sharding.seqlen, *tokens_first.shape[1:]))
        for rank, size in enumerate(sizes):
            out[sharding.positions(rank).to(x.device)] = gathered[rank, :size]
        return out.movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        transport, dim, sharding = ctx.arguments
        rank, world_size = transport.group.rank, transport.group.world_size
        tokens_first = dout.movedim(dim, 0)
        parts = [tokens_first[sharding.positions(r).to(dout.device)] for r in range(world_size)]
        incoming = [parts[rank].numel()] * world_size
        with comm.phase("unshard", "backward"):
            received = transport.all_to_all(parts, incoming).wait()
        wide = torch.float32 if dout.dtype in (torch.float16, torch.bfloat16) else dout.dtype
        dx = received.view(world_size, *parts[rank].shape).sum(0, dtype=wide).to(dout.dtype)
        return dx.movedim(0, dim).contiguous(), None, None, None


def _check(x: torch.Tensor, dim: int) -> int:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}.")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim={dim!r} must be an integer.")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is not a dimension of x, whose shape is {tuple(x.shape)}.")
    return dim % x.dim()


def _resolve(layout: "str | Sharding", group: Group, seqlen: int) -> Sharding:
    sharding = resolve_sharding(layout, group.world_size, seqlen)
    if sharding.seqlen != seqlen:
        raise ValueError(
            f"layout is a Sharding of {sharding.seqlen} tokens, but the sequence has {seqlen}."
        )
    return sharding
