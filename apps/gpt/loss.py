"""The output projection and the cross-entropy, one chunk of tokens at a time, with the vocabulary cut over tp ranks or not.

Own code: torch's loss_parallel wants the logits of all tokens, torch's chunked losses know no cut vocabulary.

With logits z = W x of one token, over the vocabulary:  loss = log sum_v exp z_v - z_label,  d loss / d z = softmax(z) - onehot.
The gradient of a chunk is formed as soon as its logits exist and thrown away with them: they are computed once, and what is kept
is dx [T, C] and dW.  Cut over tp ranks, each has some rows of W; maximum, sum of exponentials and the label's logit are summed
over them (three numbers a token), dx is each rank's own part of a sum, dW is complete.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate

IGNORE = -100  # a label that carries no loss


def gather_sequence(x: Tensor) -> Tensor:
    """[B, S, C] of this rank's whole part of the sequence: under tp, x is cut over its ranks (sequence parallel)."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate()]).to_local(
        grad_placements=[Partial()]
    )  # each rank's gradient is a part


def head_logits(x: Tensor, head: Tensor) -> Tensor:
    """x [B, S, C] @ head [vocab, C]^T -> [B, S, vocab], whole on every tp rank."""
    weight, group = _local(head)
    logits = x.to(_compute_dtype(x)) @ weight.to(_compute_dtype(x)).T
    return logits if group is None else _gather_last(logits, group)


def head_loss(x: Tensor, head: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    """The sum over tokens of the cross-entropy of x [B, S, C] @ head [vocab, C]^T against labels [B, S], in fp32 at least; IGNORE
    is skipped, and any other label that is not in the vocabulary makes it NaN (to look for one would wait for the GPU).  The same
    on every tp rank."""
    weight, group = _local(head)
    dtype = _compute_dtype(x)
    return _HeadLoss.apply(
        x.flatten(0, 1).to(dtype), weight.to(dtype), labels.flatten(), chunk, group
    )


@torch.no_grad()
def token_losses(x: Tensor, head: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    """[B, S]: each token's cross-entropy, without gradient; 0 where the label is IGNORE."""
    weight, group = _local(head)
    dtype = _compute_dtype(x)
    flat, weight = x.flatten(0, 1).to(dtype), weight.to(dtype)
    parts = [
        _chunk(a, weight, b, group)[0]
        for a, b in zip(flat.split(chunk), labels.flatten().split(chunk), strict=True)
    ]
    return torch.cat(parts).view(labels.shape)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, chunk: int, group):
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        want = any(ctx.needs_input_grad[:2])
        dx = torch.empty_like(x) if want else None
        dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if want else None
        for at in range(0, len(x), chunk):
            rows = slice(at, at + chunk)
            losses, p, local, mine, counts = _chunk(x[rows], weight, labels[rows], group)
            total += losses.sum()
            if dx is None or dw is None:
                continue
            p[torch.arange(len(p), device=p.device), local] -= mine.to(p.dtype)
            dz = p.mul_(counts[:, None]).to(x.dtype)
            torch.mm(dz, weight, out=dx[rows])
            dw += dz.T @ x[rows] if dw.dtype == x.dtype else (dz.T @ x[rows]).to(dw.dtype)
        if want:
            ctx.save_for_backward(dx, dw)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        dx, dw = ctx.saved_tensors
        return dx * dtotal.to(dx.dtype), (dw * dtotal).to(ctx.dtype), None, None, None


def _chunk(
    x: Tensor, weight: Tensor, labels: Tensor, group
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses [T], probabilities of this rank's vocabulary [T, V/tp], each label's column there, whether it is there, whether it
    counts).  One buffer of [T, V/tp]: what is not needed any more is overwritten."""
    z = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    first = 0 if group is None else dist.get_rank(group) * weight.shape[0]
    counts = labels != IGNORE
    mine = counts & (labels >= first) & (labels < first + weight.shape[0])
    local = (labels - first).masked_fill(~mine, 0)
    top = z.amax(1)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    z.sub_(top[:, None])
    chosen = z.gather(1, local[:, None])[:, 0].where(mine, 0.0)
    sums = torch.stack([z.exp_().sum(1), chosen])
    if group is not None:
        dist.all_reduce(sums, group=group)
    vocab = weight.shape[0] * (1 if group is None else dist.get_world_size(group))
    losses = (
        (sums[0].log() - sums[1])
        .where(counts, 0.0)
        .masked_fill(counts & ((labels < 0) | (labels >= vocab)), torch.nan)
    )
    return losses, z.div_(sums[0][:, None]), local, mine, counts


def _local(head: Tensor) -> tuple[Tensor, "dist.ProcessGroup | None"]:
    """(this rank's rows of the head, the tp group): a DTensor is cut by rows, in rank order."""
    return (
        (head.to_local(), head.device_mesh.get_group())
        if isinstance(head, DTensor)
        else (head, None)
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _gather_last(x: Tensor, group) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, -1)
