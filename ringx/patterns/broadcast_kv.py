"""ringX4: every rank's keys and values are broadcast in turn; their gradients are reduced to their owner.

Paper: Yin et al., RingX (SC25), X4 and, with overlap, X4o; also the backward of X1 and X2.

Forward   for each owner: broadcast kv; attend own queries to it; merge.
Backward  for each owner: broadcast kv; differentiate own tile; reduce dkv (fp32) to the owner.

Messages  forward N broadcasts; backward N broadcasts + N reduces.
Bytes     with T = B S 2Hkv D elements of kv in all, each sent by N-1 of N ranks: forward T (N-1)/N e, backward
          T (N-1)/N (e + a), e bytes an input element and a (4, or 8 for fp64) an accumulated one.
Memory    2 remote blocks of kv with overlap, 1 without; backward also 2 blocks of fp32 dkv on their way home.
Masks     causal and bidirectional, any layout.

Differs from the paper: the own block is computed first, while the first broadcast is on its way; in a causal call the tokens
that no other rank sees are not sent (contiguous 1/N of all, zigzag 1/2N); the backward's reduces overlap too, and half of the
own block's heads are kept for the last one's way home; all of the message that is reduced is written (the original reduces a
half-filled buffer).
"""

import torch

from .. import comm
from ..layout import clip
from ..merge import OnlineSoftmax, acc_dtype


def forward(q, k, v, plan):
    acc, me = OnlineSoftmax(q), plan.group.rank
    stream = _stream(k, v, plan)
    plan.attend(acc, q, k, v, plan.mine, plan.mine)
    for src, kv in stream:
        if src != me:
            plan.attend(acc, q, *kv, plan.mine, clip(plan.runs(src), plan.keys_to_send(src)))
    return acc.out, acc.lse


def backward(dout, q, k, v, out, lse, plan):
    acc, me = acc_dtype(q.dtype), plan.group.rank
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    dkv = torch.zeros((2, *k.shape), dtype=acc, device=q.device)
    stream = _stream(k, v, plan)
    plan.attend_own_backward(0, dq, dkv, dout, q, k, v, out, lse)
    home, flying = None, None
    for src, kv in stream:
        part = torch.zeros(
            kv.shape, dtype=acc, device=q.device
        )  # the owner sends none: what it has stays in its dkv
        if src != me:
            runs = clip(plan.runs(src), plan.keys_to_send(src))
            part[0], part[1] = plan.attend_backward(dq, dout, q, *kv, out, lse, plan.mine, runs)
        if flying:
            flying.wait()
        flying = comm.reduce(part, src, plan.group)
        if src == me:
            home = flying
        if not plan.overlap:
            flying.wait()
    plan.attend_own_backward(1, dq, dkv, dout, q, k, v, out, lse)
    if home is not None:
        dkv[:, :, plan.keys_to_send(me)] += home.wait()
    if flying:
        flying.wait()
    return dq, *dkv


def _stream(k, v, plan):
    rows = [plan.keys_to_send(src) for src in range(plan.group.world_size)]
    mine = rows[plan.group.rank]
    shapes = [(2, k.shape[0], r.stop - r.start, *k.shape[2:]) for r in rows]
    return comm.broadcasts(torch.stack([k[:, mine], v[:, mine]]), shapes, plan.group, plan.overlap)


def bytes_sent(s):
    sent = s.others * (s.N - 1) / s.N * s.kv_elements
    return sent * s.itemsize, sent * (s.itemsize + s.acc)
