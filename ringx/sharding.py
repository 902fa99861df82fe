"""shard, unshard, positions: between the global sequence and this rank's tokens."""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from . import comm
from .comm import Group
from .layout import Sharding, resolve_local_sharding, resolve_sharding


def positions(
    seqlen: int, *, group: "dist.ProcessGroup | None" = None, layout: "str | Sharding" = "zigzag"
) -> torch.Tensor:
    """[S_local] int64 on the CPU: the global position of each of this rank's tokens, for RoPE, labels and masks.

    `seqlen` is the global length.  Local, no communication.  Raises ValueError if the layout cannot hold the sequence."""
    peers = Group.of(group)
    return _bind(layout, peers, seqlen).positions(peers.rank)


def shard(
    x: torch.Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    dim: int = 1,
    layout: "str | Sharding" = "zigzag",
) -> torch.Tensor:
    """This rank's tokens of a global `x` (the same on every rank), in layout order, along `dim`.

    Local, no communication.  Its gradient is that of indexing: zero at the tokens of other ranks, so the sum over ranks of the
    gradients is the gradient of the sum of the ranks' losses."""
    peers = Group.of(group)
    dim = _check(x, dim)
    index = _bind(layout, peers, x.shape[dim]).positions(peers.rank).to(x.device)
    return x.index_select(dim, index)


def unshard(
    x: torch.Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    dim: int = 1,
    layout: "str | Sharding" = "zigzag",
) -> torch.Tensor:
    """The inverse of ``shard``: the global tensor, on every rank.  Collective (one all-gather; backward one all-to-all).

    The gradient is that of the *sum* over ranks of their losses: each token's owner gets the sum of the gradients that all
    ranks have for it.  Where every rank computes the same loss from the result, divide it by the number of ranks."""
    peers = Group.of(group)
    dim = _check(x, dim)
    sharding = resolve_local_sharding(layout, peers.world_size, peers.rank, x.shape[dim])
    return _Unshard.apply(x, peers, dim, sharding)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group: Group, dim: int, sharding: Sharding):
        ctx.args = group, dim, sharding
        sizes = [sharding.size(r) for r in range(group.world_size)]
        first = x.movedim(dim, 0)
        padded = first.new_zeros((max(sizes), *first.shape[1:]))
        padded[: first.shape[0]] = first
        with comm.phase("unshard", "forward"):
            everyone = comm.all_gather(padded, group).wait()
        out = first.new_empty((sharding.seqlen, *first.shape[1:]))
        for rank, size in enumerate(sizes):
            out[sharding.positions(rank).to(x.device)] = everyone[rank, :size]
        return out.movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        group, dim, sharding = ctx.args
        first = dout.movedim(dim, 0)
        parts = [first[sharding.positions(r).to(dout.device)] for r in range(group.world_size)]
        mine = parts[group.rank].numel()
        with comm.phase("unshard", "backward"):
            came = comm.all_to_all(parts, [mine] * group.world_size, group).wait()
        wide = torch.float32 if dout.dtype in (torch.float16, torch.bfloat16) else dout.dtype
        dx = came.view(group.world_size, *parts[group.rank].shape).sum(0, dtype=wide).to(dout.dtype)
        return dx.movedim(0, dim).contiguous(), None, None, None


def _check(x: torch.Tensor, dim: int) -> int:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}.")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim={dim!r} must be an integer.")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is not a dimension of x, whose shape is {tuple(x.shape)}.")
    return dim % x.dim()


def _bind(layout: "str | Sharding", group: Group, seqlen: int) -> Sharding:
    sharding = resolve_sharding(layout, group.world_size, seqlen)
    if sharding.seqlen != seqlen:
        raise ValueError(
            f"layout is a Sharding of {sharding.seqlen} tokens, but the sequence has {seqlen}."
        )
    return sharding
