"""Gradients where every rank holds all parameters and a part of the tokens.

Each rank's loss is (sum over its own tokens) / (number of tokens in the *whole* batch).  The loss of the batch is then the
sum over ranks, and so is the gradient of every parameter, whichever tokens it saw: embeddings and final norm too.
Nothing is averaged: a mean over ranks would divide the gradient by their number.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from ringx.comm import Group

BUCKET = 32 * 2**20  # elements reduced in one message


@torch.no_grad()
def sum_gradients(params: Iterable[torch.nn.Parameter], group: Group) -> None:
    """Replace each gradient by its sum over the ranks.  Collective; a parameter that this rank did not use counts as zero."""
    grads = []
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    if group.world == 1:
        return
    for bucket in _buckets(grads):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat, group=group.pg)
        for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(part.view_as(g))


def _buckets(grads: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbouring gradients of one dtype and device, up to BUCKET elements together."""
    bucket: list[torch.Tensor] = []
    size = 0
    for g in grads:
        if bucket and (size + g.numel() > BUCKET or (g.dtype, g.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(g)
        size += g.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def clip_gradients(params: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a global L2 norm of at most `max_norm` (0: leave them); returns the norm before, a scalar.

    After ``sum_gradients`` every rank holds the whole gradient: the norm is the true one and needs no communication."""
    grads = [p.grad for p in params if p.grad is not None]
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in grads]).norm()
    if max_norm > 0:
        factor = (max_norm / norm.clamp(min=torch.finfo(wide).tiny)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor.to(g.dtype))
    return norm


def sum_over(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over ranks of x (overwritten), on every rank."""
    if group.world > 1:
        dist.all_reduce(x, group=group.pg)
    return x


@torch.no_grad()
def differing(tensors: Mapping[str, torch.Tensor], group: Group) -> list[str]:
    """Names of the tensors that are not bitwise the same on all ranks (by a 64-bit sum of their bits).  Collective."""
    if group.world == 1 or not tensors:
        return []
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.detach().contiguous().view(words[t.element_size()]).to(torch.int64).sum() for t in tensors.values()]
    low = torch.stack(sums)
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group.pg)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group.pg)
    return [name for name, same in zip(tensors, (low == high).tolist(), strict=True) if not same]
