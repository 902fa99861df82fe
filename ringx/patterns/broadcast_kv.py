"""ringX4: every rank's keys and values are broadcast in turn; their gradients are reduced to their
owner.

Paper: Yin et al., RingX (SC25), X4 and, with overlap, X4o; also the backward of X1 and X2.

Forward   for each owner: broadcast kv; attend own queries to it; merge.
Backward  for each owner: broadcast kv; differentiate own tile; reduce dkv (fp32) to the owner.

Messages  forward N broadcasts; backward N broadcasts + N reduces.
Bytes     with T = B S 2Hkv D elements of kv in all, each sent by N-1 of N ranks: forward T (N-1)/N
          e, backward T (N-1)/N (e + a), e bytes an input element and a (4, or 8 for fp64) an
          accumulated one.
Memory    2 remote blocks of kv with overlap, 1 without; backward also 2 blocks of fp32 dkv on their
          way home.
Masks     causal and bidirectional, any layout.

Differs from the paper: the own block is computed first, while the first broadcast is on its way; in
a causal call the tokens that no other rank sees are not sent (contiguous 1/N of all, zigzag 1/2N);
the backward's reduces overlap too, and half of the own block's heads are kept for the last one's
way home; all of the message that is reduced is written (the original reduces a half-filled buffer).
"""

from collections import Counter
from collections.abc import Iterator

import torch

from ..comm import Pending
from ..comm.streams import broadcast_stream
from ..layout import clip
from ..merge import OnlineSoftmax, acc_dtype
from ..plan import Plan
from .sizes import Messages, PerDirection, Sizes


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    online = OnlineSoftmax(q)
    stream = _stream(k, v, plan)
    plan.attend(online, q, k, v, plan.local_runs, plan.local_runs)
    for src, kv in stream:
        if src != plan.group.rank:
            k_runs = clip(plan.runs(src), plan.keys_to_send(src))
            plan.attend(online, q, kv[0], kv[1], plan.local_runs, k_runs)
    return online.out, online.lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    acc, rank = acc_dtype(q.dtype), plan.group.rank
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    local_dkv = torch.zeros((2, *k.shape), dtype=acc, device=q.device)
    stream = _stream(k, v, plan)
    plan.attend_own_backward(0, dq, local_dkv, dout, q, k, v, out, lse)
    own_sum: Pending | None = None  # of what all ranks have for this rank's keys
    in_flight: Pending | None = None
    for src, kv in stream:
        # the owner contributes zeros: what it has stays in local_dkv
        dkv = torch.zeros(kv.shape, dtype=acc, device=q.device)
        if src != rank:
            k_runs = clip(plan.runs(src), plan.keys_to_send(src))
            dkv[0], dkv[1] = plan.attend_backward(
                dq, dout, q, kv[0], kv[1], out, lse, plan.local_runs, k_runs
            )
        if in_flight is not None:
            in_flight.wait()
        in_flight = plan.transport.reduce(dkv, src)
        if src == rank:
            own_sum = in_flight
        if not plan.overlap:
            in_flight.wait()
    plan.attend_own_backward(1, dq, local_dkv, dout, q, k, v, out, lse)
    if own_sum is not None:
        local_dkv[:, :, plan.keys_to_send(rank)] += own_sum.wait()
    if in_flight is not None:
        in_flight.wait()
    return dq, local_dkv[0], local_dkv[1]


def _stream(k: torch.Tensor, v: torch.Tensor, plan: Plan) -> Iterator[tuple[int, torch.Tensor]]:
    """(owner, its kv [2, B, rows, Hkv, D] that other ranks see) of every rank that has any."""
    rows = [plan.keys_to_send(src) for src in range(plan.group.world_size)]
    shapes = [(2, k.shape[0], r.stop - r.start, *k.shape[2:]) for r in rows]
    local_rows = rows[plan.group.rank]
    local_kv = torch.stack([k[:, local_rows], v[:, local_rows]])
    return broadcast_stream(plan.transport, local_kv, shapes, plan.overlap)


def bytes_sent(s: Sizes) -> PerDirection:
    sent_elements = s.needed_elsewhere * (s.N - 1) / s.N * s.kv_elements
    return PerDirection(sent_elements * s.itemsize, sent_elements * (s.itemsize + s.acc))


def messages(s: Sizes) -> Messages:
    return Messages(Counter(broadcast=s.owners), Counter(broadcast=s.owners, reduce=s.owners))


def received_bytes(s: Sizes, overlap: bool) -> PerDirection:
    blocks = min(2 if overlap else 1, s.owners)
    return PerDirection(blocks * s.kv_block, blocks * s.kv_block)
