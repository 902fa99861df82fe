"""Output projection and cross-entropy, one chunk of tokens at a time.

The vocabulary may be cut over tp ranks.  torch's loss_parallel needs the logits of all tokens, and
torch's chunked losses know no cut vocabulary; hence this code.

With logits z = W x of one token, over the vocabulary:

    loss = log sum_v exp z_v - z_label        d loss / d z = softmax(z) - onehot(label)

The gradient of a chunk is formed as soon as its logits exist, and the logits are thrown away: they
are computed once, and what is kept is dx [T, C] and dW [V, C].  Cut over tp ranks, each rank has
some rows of W.  Maximum, sum of exponentials and the label's logit are reduced over them (three
numbers a token); dx is each rank's own part of a sum, dW is complete.

Shapes: B sequences, S tokens of each, T tokens in a row, C = dim, V vocabulary, V_local of it here.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate

IGNORE = -100  # a label that carries no loss


def gather_sequence(x: Tensor) -> Tensor:
    """[B, S, C] of this rank's whole part of the sequence.

    Under tp, x is cut over its ranks by tokens (sequence parallel)."""
    if not isinstance(x, DTensor):
        return x
    whole = x.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])  # each rank's gradient is a part of the sum


def head_logits(x: Tensor, head: Tensor) -> Tensor:
    """The logits of each token, whole on every tp rank.

    Args:
        x: [B, S, C].
        head: [V, C], the output projection, possibly cut over tp.

    Returns:
        [B, S, V]."""
    weight, group = _local_rows(head)
    dtype = _compute_dtype(x)
    logits = x.to(dtype) @ weight.to(dtype).T
    if group is None:
        return logits
    return _gather_vocabulary(logits, group)


def head_loss(x: Tensor, head: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    """The sum over tokens of their cross-entropy, differentiable; the same on every tp rank.

    Args:
        x: [B, S, C].
        head: [V, C], the output projection, possibly cut over tp.
        labels: [B, S].  IGNORE is skipped; any other one that is not in the vocabulary makes the
            sum NaN (raising an error would have to wait for the GPU).
        chunk: tokens whose logits exist at once.

    Returns:
        a scalar, fp32 at least."""
    weight, group = _local_rows(head)
    dtype = _compute_dtype(x)
    tokens = x.flatten(0, 1).to(dtype)
    return _HeadLoss.apply(tokens, weight.to(dtype), labels.flatten(), chunk, group)


@torch.no_grad()
def token_losses(x: Tensor, head: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    """[B, S]: each token's cross-entropy, without gradient; 0 where the label is IGNORE.

    The arguments are those of ``head_loss``."""
    weight, group = _local_rows(head)
    dtype = _compute_dtype(x)
    weight = weight.to(dtype)
    x_chunks = x.flatten(0, 1).to(dtype).split(chunk)
    label_chunks = labels.flatten().split(chunk)
    losses = [
        _chunk_loss(x_chunk, weight, label_chunk, group).losses
        for x_chunk, label_chunk in zip(x_chunks, label_chunks, strict=True)
    ]
    return torch.cat(losses).view(labels.shape)


class _HeadLoss(torch.autograd.Function):
    """The sum of the losses; the gradients are formed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        group: "dist.ProcessGroup | None",
    ) -> Tensor:
        accumulator_dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulator_dtype, device=x.device)
        dx = dw = None
        if any(ctx.needs_input_grad[:2]):
            dx = torch.empty_like(x)
            dw = torch.zeros(weight.shape, dtype=accumulator_dtype, device=x.device)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            result = _chunk_loss(x[rows], weight, labels[rows], group)
            total += result.losses.sum()
            if dx is None or dw is None:
                continue
            dz = _logits_gradient(result).to(x.dtype)
            torch.mm(dz, weight, out=dx[rows])
            dw += (dz.T @ x[rows]).to(dw.dtype)
        if dx is not None:
            ctx.save_for_backward(dx, dw)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return dx * dtotal.to(dx.dtype), (dw * dtotal).to(ctx.weight_dtype), None, None, None


class _ChunkLoss(NamedTuple):
    """The loss of T tokens, and what their gradient needs."""

    losses: Tensor  # [T]
    probabilities: Tensor  # [T, V_local]
    local_labels: Tensor  # [T], the label's column in `probabilities`, where it is there
    is_local: Tensor  # [T], whether the label is in this rank's part of the vocabulary
    counts: Tensor  # [T], whether the token has a loss


def _chunk_loss(
    x: Tensor, weight: Tensor, labels: Tensor, group: "dist.ProcessGroup | None"
) -> _ChunkLoss:
    """The loss of the tokens x [T, C] with the labels [T].

    There is one buffer [T, V_local]: what is not needed any more is overwritten."""
    vocab_local = weight.shape[0]
    vocab = vocab_local
    first = 0  # this rank's first row of the vocabulary
    if group is not None:
        vocab = vocab_local * dist.get_world_size(group)
        first = dist.get_rank(group) * vocab_local
    counts = labels != IGNORE
    is_local = counts & (labels >= first) & (labels < first + vocab_local)
    local_labels = (labels - first).masked_fill(~is_local, 0)

    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    maximum = logits.amax(1)
    if group is not None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    logits.sub_(maximum[:, None])
    label_logits = logits.gather(1, local_labels[:, None])[:, 0].where(is_local, 0.0)
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(1), label_logits])
    if group is not None:
        dist.all_reduce(sums, group=group)
    exp_sums, label_logits = sums

    is_wrong = counts & ((labels < 0) | (labels >= vocab))
    losses = (exp_sums.log() - label_logits).where(counts, 0.0).masked_fill(is_wrong, torch.nan)
    probabilities = exponentials.div_(exp_sums[:, None])
    return _ChunkLoss(losses, probabilities, local_labels, is_local, counts)


def _logits_gradient(chunk: _ChunkLoss) -> Tensor:
    """[T, V_local]: softmax(z) - onehot(label), in the buffer of the probabilities."""
    dz = chunk.probabilities
    rows = torch.arange(len(dz), device=dz.device)
    dz[rows, chunk.local_labels] -= chunk.is_local.to(dz.dtype)
    return dz.mul_(chunk.counts[:, None])


def _local_rows(head: Tensor) -> tuple[Tensor, "dist.ProcessGroup | None"]:
    """(this rank's rows of the head, the tp group): a DTensor is cut by rows, in rank order."""
    if isinstance(head, DTensor):
        return head.to_local(), head.device_mesh.get_group()
    return head, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast multiplies, where it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _gather_vocabulary(logits: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """[..., V_local] of each rank -> [..., V] on all of them."""
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, -1)
