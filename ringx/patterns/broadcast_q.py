"""ringX1 (bidirectional) and ringX2 (causal): queries are broadcast, keys and values stay; partial
outputs are reduced.

Paper: Yin et al., RingX (SC25), X1 and X2, with overlap X1o and X2o; the reduction is tree
attention's (Shyam et al., arXiv 2408.04093).

Forward   for each owner: broadcast q; every rank attends it to its own keys; all-reduce the maximum
          of the lse, then one reduce to the owner of (numerator, denominator) = (exp(lse - max)
          out, exp(lse - max)) in fp32; out = numerator / denominator, lse = max + log denominator.
Backward  moves kv, as ringX4 does: it needs fewer bytes than moving q, dout and dq.

Messages  forward N broadcasts + N all-reduces + N reduces; backward N broadcasts + N reduces.
Bytes     with T = B S H elements, each sent by N-1 of N ranks: forward (N-1)/N T (D e + (D + 1) a +
          2 a), e bytes an input element and a (4, or 8 for fp64) an accumulated one; backward as
          ringX4.
Memory    2 remote blocks of q with overlap, 1 without; 2 partial outputs in fp32.
Masks     causal and bidirectional, any layout.

What ringX2 reduces.  Compute: a rank skips the tiles that the mask empties, about half of all
pairs; with the contiguous layout the first rank is left with the keys that all N owners see, the
last with its own, while zigzag gives every rank the same work, hence that recommendation.  Bytes:
only what no other rank needs stays at home, 1/N of the queries and of the kv (zigzag 1/2N), because
a broadcast reaches all ranks or none.  ringX1 called with causal=True does the same: the two names
are one pattern here.

Differs from the paper: numerator and denominator travel in one message; the maximum and the reduce
of one owner fly while the next one's block is computed; ringX2 does not reduce dq, which never
leaves its rank.
"""

from collections import Counter

import torch

from ..comm import Pending, Transport
from ..comm.streams import broadcast_stream
from ..layout import clip
from ..merge import OnlineSoftmax, acc_dtype, rows
from ..plan import Plan
from . import broadcast_kv
from .broadcast_kv import backward
from .sizes import Messages, PerDirection, Sizes

__all__ = ["backward", "bytes_sent", "forward", "messages", "received_bytes"]

Result = tuple[torch.Tensor, torch.Tensor]  # out [B, S, H, D], lse [B, H, S]


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> Result:
    group = plan.group
    sent_rows = [plan.queries_to_send(dst) for dst in range(group.world_size)]
    local_rows = sent_rows[group.rank]
    shapes = [(q.shape[0], r.stop - r.start, *q.shape[2:]) for r in sent_rows]
    stream = broadcast_stream(plan.transport, q[:, local_rows].contiguous(), shapes, plan.overlap)
    own = plan.attend(OnlineSoftmax(q), q, k, v, plan.local_runs, plan.local_runs)

    pipeline = _ReductionPipeline(plan.transport)
    for dst, q_dst in stream:
        if dst == group.rank:
            pipeline.advance(_PartialResult(own.out[:, local_rows], own.lse[:, :, local_rows], dst))
        else:
            q_runs = clip(plan.runs(dst), sent_rows[dst])
            part = plan.attend(OnlineSoftmax(q_dst), q_dst, k, v, q_runs, plan.local_runs)
            pipeline.advance(_PartialResult(part.out, part.lse, dst))
        if not plan.overlap:
            pipeline.drain()
    pipeline.drain()
    if pipeline.own_result is None:
        return own.out, own.lse
    if local_rows.start == 0:
        return pipeline.own_result
    merged_out, merged_lse = pipeline.own_result
    out = own.out.to(merged_out.dtype, copy=True)
    lse = own.lse.clone()
    out[:, local_rows] = merged_out
    lse[:, :, local_rows] = merged_lse
    return out, lse


class _PartialResult:
    """This rank's share of one owner's result, on its way to the owner."""

    def __init__(self, out: torch.Tensor, lse: torch.Tensor, dst: int):
        self.dst = dst
        self._out: torch.Tensor | None = out
        self._lse = lse.to(acc_dtype(out.dtype))
        self._maximum: Pending
        self._peak: torch.Tensor
        self._total: Pending

    def start_maximum(self, transport: Transport) -> None:
        """Step 1: the all-reduce of the maximum of the lse."""
        self._maximum = transport.all_reduce_max(self._lse.clone())

    def start_sum(self, transport: Transport) -> None:
        """Step 2: the reduce of (numerator, denominator) to the owner."""
        assert self._out is not None
        self._peak = self._maximum.wait()
        weight = rows((self._lse - self._peak).exp())
        message = torch.cat([self._out * weight, weight], -1)
        self._out = None  # frees it
        del weight
        self._total = transport.reduce(message, self.dst)

    def wait(self) -> None:
        """Step 3 on a rank that is not the owner."""
        self._total.wait()

    def finish(self) -> Result:
        """Step 3 on the owner: (out, lse)."""
        total = self._total.wait()
        numerator, denominator = total[..., :-1], total[..., -1:]
        lse = self._peak + denominator.squeeze(-1).transpose(1, 2).log()
        return numerator / denominator, lse


class _ReductionPipeline:
    """Partial results of successive owners, each one step further at every ``advance``, so that the
    collectives of one owner are in flight while the next one's block is computed."""

    def __init__(self, transport: Transport):
        self._transport = transport
        self._in_maximum: _PartialResult | None = None
        self._in_sum: _PartialResult | None = None
        self.own_result: Result | None = None

    def advance(self, newest: _PartialResult | None = None) -> None:
        """Finishes the oldest result, begins the sum of the one after it and the maximum of the
        newest."""
        if self._in_sum is not None:
            if self._in_sum.dst == self._transport.group.rank:
                self.own_result = self._in_sum.finish()
            else:
                self._in_sum.wait()
        if self._in_maximum is not None:
            self._in_maximum.start_sum(self._transport)
        if newest is not None:
            newest.start_maximum(self._transport)
        self._in_sum, self._in_maximum = self._in_maximum, newest

    def drain(self) -> None:
        """Finishes all."""
        self.advance()
        self.advance()


def bytes_sent(s: Sizes) -> PerDirection:
    per_token = s.q_row + s.B * s.H * ((s.D + 1) + 2) * s.acc
    forward_bytes = s.needed_elsewhere * (s.N - 1) / s.N * per_token
    return PerDirection(forward_bytes, broadcast_kv.bytes_sent(s).backward)


def messages(s: Sizes) -> Messages:
    owners = s.owners
    return Messages(
        Counter(broadcast=owners, all_reduce=owners, reduce=owners),
        broadcast_kv.messages(s).backward,
    )


def received_bytes(s: Sizes, overlap: bool) -> PerDirection:
    blocks = min(2 if overlap else 1, s.owners)
    return PerDirection(blocks * s.q_block, broadcast_kv.received_bytes(s, overlap).backward)
