"""ringX1 (bidirectional) and ringX2 (causal): queries are broadcast, keys and values stay; partial outputs are reduced.

Paper: Yin et al., RingX (SC25), X1 and X2, with overlap X1o and X2o; the reduction is tree attention's (Shyam et al.,
arXiv 2408.04093).

Forward   for each owner: broadcast q; every rank attends it to its own keys; all-reduce the maximum of the lse, then one
          reduce to the owner of (numerator, denominator) = (exp(lse - max) out, exp(lse - max)) in fp32;
          out = numerator / denominator, lse = max + log denominator.
Backward  moves kv, as ringX4 does: it needs fewer bytes than moving q, dout and dq.

Messages  forward N broadcasts + N all-reduces + N reduces; backward N broadcasts + N reduces.
Bytes     with T = B S H elements, each sent by N-1 of N ranks: forward (N-1)/N T (D e + (D + 1) a + 2 a), e bytes an input
          element and a (4, or 8 for fp64) an accumulated one; backward as ringX4.
Memory    2 remote blocks of q with overlap, 1 without; 2 partial outputs in fp32.
Masks     causal and bidirectional, any layout.

What ringX2 reduces.  Compute: a rank skips the tiles that the mask empties, about half of all pairs; with the contiguous layout
the first rank is left with the keys that all N owners see, the last with its own, while zigzag gives every rank the same work,
hence that recommendation.  Bytes: only what no other rank needs stays at home, 1/N of the queries and of the kv (zigzag 1/2N),
because a broadcast reaches all ranks or none.  ringX1 called with causal=True does the same: the two names are one pattern here.

Differs from the paper: numerator and denominator travel in one message; the maximum and the reduce of one owner fly while the
next one's block is computed; ringX2 does not reduce dq, which never leaves its rank.
"""

from itertools import chain, repeat

import torch

from .. import comm
from ..layout import clip
from ..merge import OnlineSoftmax, acc_dtype, rows
from .broadcast_kv import backward
from .broadcast_kv import bytes_sent as _bcast_kv_bytes

__all__ = ["backward", "bytes_sent", "forward"]


def forward(q, k, v, plan):
    group, me = plan.group, plan.group.rank
    sent = [plan.queries_to_send(dst) for dst in range(group.world_size)]
    shapes = [(q.shape[0], r.stop - r.start, *q.shape[2:]) for r in sent]
    stream = comm.broadcasts(q[:, sent[me]].contiguous(), shapes, group, plan.overlap)
    own = plan.attend(OnlineSoftmax(q), q, k, v, plan.mine, plan.mine)

    travelling, home = [], None
    last_rounds = repeat(
        (None, q), 2 if plan.overlap else 0
    )  # bring home what the last two blocks left on its way
    for dst, q_dst in chain(stream, last_rounds):
        if dst == me:
            travelling.append(_go_home(own.out[:, sent[me]], own.lse[:, :, sent[me]], dst, group))
        elif dst is not None:
            part = plan.attend(
                OnlineSoftmax(q_dst), q_dst, k, v, clip(plan.runs(dst), sent[dst]), plan.mine
            )
            travelling.append(_go_home(part.out, part.lse, dst, group))
        for _ in range(1 if plan.overlap else 3):
            for job in travelling:
                home = next(job, None) or home
        travelling = travelling[-2:]
    if home is None:
        return own.out, own.lse
    if sent[me].start == 0:
        return home
    out, lse = own.out.to(home[0].dtype, copy=True), own.lse.clone()
    out[:, sent[me]], lse[:, :, sent[me]] = home
    return out, lse


def _go_home(out, lse, dst, group):
    """The way of one owner's partial result in three steps, one at each ``next``, so that the collectives of one owner fly while
    others are computed: start the all-reduce; start the reduce; wait for it and yield (out, lse) on the owner."""
    lse = lse.to(acc_dtype(out.dtype))
    maximum = comm.all_reduce_max(lse.clone(), group)
    yield
    peak = maximum.wait()
    weight = rows((lse - peak).exp())
    message = torch.cat([out * weight, weight], -1)
    del out, lse, weight
    sum_ = comm.reduce(message, dst, group)
    yield
    total = sum_.wait()
    num, den = total[..., :-1], total[..., -1:]
    yield (num / den, peak + den.squeeze(-1).transpose(1, 2).log()) if dst == group.rank else None


def bytes_sent(s):
    per_token = s.q_row + s.B * s.H * ((s.D + 1) + 2) * s.acc
    return s.others * (s.N - 1) / s.N * per_token, _bcast_kv_bytes(s)[1]
