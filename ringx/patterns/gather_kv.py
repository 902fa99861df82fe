"""ringX3: one all-gather of keys and values; their gradients go home in one all-to-all.

Paper: Yin et al., RingX (SC25), X3 (causal, balanced) and X3b (bidirectional); the same pattern as Llama 3's context
parallelism (arXiv 2407.21783).

Forward   all-gather kv, the own block meanwhile; sort what came by position; attend each run of own queries to the prefix of
          keys that it sees, one kernel call each.
Backward  all-gather kv again, half of the own block's heads meanwhile; differentiate the rest; each rank's dkv goes home in
          the input dtype, only the keys this rank sees, the other half meanwhile; it is summed there in fp32.

Messages  forward 1 all-gather; backward 1 all-gather + 1 all-to-all.
Bytes     with f = B (S/N) 2Hkv D e bytes of one rank's kv: forward (N-1) f; backward (N-1) f + (N-1) f c, where c is the share
          of other ranks' keys that a rank sees: 1 bidirectional; causal 3/4 zigzag, 1/2 contiguous, just under 1 striped.
Memory    O(S): all ranks' kv as gathered and once more sorted; backward also dkv of all keys.
Masks     causal and bidirectional, any layout (striped keys cannot be sorted into bands: one call per rank there).

Differs from the paper: at most two kernel calls for all remote blocks instead of N-1 with a merge each; dkv by all-to-all and a
local fp32 sum, half the bytes of an fp32 reduce-scatter, without its rounding in 16 bit, and without what the mask empties.
"""

import torch

from .. import comm
from ..layout import clip, pack
from ..merge import OnlineSoftmax, acc_dtype


def forward(q, k, v, plan):
    acc, arriving = OnlineSoftmax(q), _gather(k, v, plan)
    plan.attend(acc, q, k, v, plan.mine, plan.mine)
    others = _others(plan)
    if others:
        plan.attend(
            acc, q, *_sorted(arriving.wait(), others), plan.mine, pack([run for _, run in others])
        )
    return acc.out, acc.lse


def backward(dout, q, k, v, out, lse, plan):
    acc, group = acc_dtype(q.dtype), plan.group
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    dkv = torch.zeros((2, *k.shape), dtype=acc, device=q.device)
    arriving = _gather(k, v, plan)
    plan.attend_own_backward(0, dq, dkv, dout, q, k, v, out, lse)
    if group.world_size == 1:
        return dq, *dkv
    others, gathered = _others(plan), arriving.wait()
    grads = ()
    if others:
        runs = pack([run for _, run in others])
        grads = plan.attend_backward(
            dq, dout, q, *_sorted(gathered, others), out, lse, plan.mine, runs
        )
    del gathered, arriving
    flying = comm.all_to_all(
        _by_owner(grads, others, k, group.world_size), _incoming(k, plan), group
    )
    del grads
    if not plan.overlap:
        flying.wait()
    plan.attend_own_backward(1, dq, dkv, dout, q, k, v, out, lse)
    for src, part in enumerate(flying.wait().split(_incoming(k, plan))):
        if part.numel():
            rows = plan.visible_keys(group.rank, src)
            dkv[:, :, rows] += part.view(2, k.shape[0], rows.stop, *k.shape[2:])
    return dq, *dkv


def _gather(k, v, plan):
    """[N, 2, B, rows, Hkv, D]; shards shorter than the longest are padded to it, as an all-gather wants."""
    longest = max(
        plan.sharding.size(0),
        plan.sharding.size(plan.group.world_size - 1),
        *map(plan.sharding.size, range(plan.group.world_size)),
    )
    kv = torch.stack([k, v])
    if k.shape[1] < longest:
        kv = torch.nn.functional.pad(kv, (0, 0, 0, 0, 0, longest - k.shape[1]))
    pending = comm.all_gather(kv, plan.group)
    if not plan.overlap:
        pending.wait()
    return pending


def _others(plan):
    """[(rank, run)] of the keys of other ranks that this one sees, by ascending position."""
    me = plan.group.rank
    runs = [
        (src, run)
        for src in range(plan.group.world_size)
        if src != me
        for run in clip(plan.runs(src), plan.visible_keys(src, me))
    ]
    return sorted(runs, key=lambda x: x[1].start)


def _sorted(gathered, others):
    """k, v [B, keys, Hkv, D] of those runs, in that order."""
    return tuple(
        torch.cat([gathered[src, i][:, run.at : run.at + run.length] for src, run in others], dim=1)
        for i in (0, 1)
    )


def _by_owner(grads, others, k, world):
    """The inverse of _sorted: one message for each rank, [2, B, keys of it that are seen here, Hkv, D] in k's dtype."""
    parts: list[tuple[list, list]] = [([], []) for _ in range(world)]
    at = 0
    for src, run in others:
        for part, grad in zip(parts[src], grads, strict=True):
            part.append(grad[:, at : at + run.length])
        at += run.length
    return [
        torch.stack([torch.cat(p, dim=1) for p in part]).to(k.dtype) if part[0] else k.new_empty(0)
        for part in parts
    ]


def _incoming(k, plan):
    """Elements of dkv that each rank sends here."""
    me, row = plan.group.rank, 2 * k.shape[0] * k.shape[2] * k.shape[3]
    return [
        0 if src == me else plan.visible_keys(me, src).stop * row
        for src in range(plan.group.world_size)
    ]


def bytes_sent(s):
    gathered = (s.N - 1) * s.S / s.N * s.kv_elements * s.itemsize
    return gathered, gathered + s.pairs * s.kv_elements * s.itemsize
