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

What ringX2 reduces.  Compute: a rank skips the tiles that the mask empties, (N-1)/2N of the pairs; with the contiguous layout the
last rank still has work for all N owners, with zigzag all ranks have (N+1)/2N of it, hence that recommendation.  Bytes: only what no
rank needs stays home, 1/N of the queries and of the kv (zigzag 1/2N), because a broadcast reaches all ranks or none.  The same
holds for ringX1 called with causal=True: the two names are one pattern here.

Differs from the paper: numerator and denominator travel in one message; the maximum and the reduce of one owner fly while the
next one's block is computed; ringX2 does not reduce dq, which never leaves its rank.
"""

import torch

from .. import comm
from ..layout import clip
from ..merge import Partial, acc_dtype, rows
from .bcast_kv import backward
from .bcast_kv import bytes_sent as _bcast_kv_bytes

__all__ = ["backward", "bytes_sent", "forward"]


def forward(q, k, v, plan):
    group, me = plan.group, plan.group.rank
    sent = [plan.queries_sent(dst) for dst in range(group.world)]
    shapes = [(q.shape[0], r.stop - r.start, *q.shape[2:]) for r in sent]
    stream = comm.broadcasts(q[:, sent[me]].contiguous(), shapes, group, plan.overlap)
    own = plan.attend(Partial(q), q, k, v, plan.mine, plan.mine)

    def send_home(dst, part_out, part_lse, peak):
        peak = peak.wait()
        weight = (part_lse - peak).exp()
        message = torch.cat([part_out * rows(weight), rows(weight)], -1)
        return peak, comm.reduce(message.to(peak.dtype), dst, group)

    home, before, flying = None, None, None
    for dst, q_dst in stream:
        if dst == me:
            out, lse = own.out[:, sent[me]], own.lse[:, :, sent[me]]
        else:
            part = plan.attend(Partial(q_dst), q_dst, k, v, clip(plan.runs(dst), sent[dst]), plan.mine)
            out, lse = part.out, part.lse
        peak = comm.all_reduce_max(lse.to(acc_dtype(q.dtype), copy=True).contiguous(), group)
        before, now = (dst, out, lse, peak), before
        if not plan.overlap:
            before, now = None, before
        if now:
            home, flying = _post(now, send_home, home, flying, me)
            if not plan.overlap:
                flying.wait()
    if before:
        home, flying = _post(before, send_home, home, flying, me)
    if flying:
        flying.wait()
    if home is None:
        return own.out, own.lse
    peak, message = home[0], home[1].wait()
    num, den = message[..., :-1], message[..., -1:]
    if sent[me].start == 0:
        return num / den, peak + den.squeeze(-1).transpose(1, 2).log()
    out, lse = own.out.to(num.dtype), own.lse.clone()
    out[:, sent[me]] = num / den
    lse[:, :, sent[me]] = peak + den.squeeze(-1).transpose(1, 2).log()
    return out, lse


def _post(job, send_home, home, flying, me):
    """Reduce one owner's partial result, at most one other on its way at that time."""
    dst, *rest = job
    message = send_home(dst, *rest)
    if flying:
        flying.wait()
    return (message if dst == me else home), message[1]


def bytes_sent(s):
    per_token = s.q_row + s.B * s.H * ((s.D + 1) + 2) * s.acc
    return s.others * (s.N - 1) / s.N * per_token, _bcast_kv_bytes(s)[1]
