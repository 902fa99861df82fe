"""Ring attention: keys and values travel from neighbour to neighbour, and so do their gradients.

Paper: Liu et al., Ring Attention with Blockwise Transformers (arXiv 2310.01889).

Forward   step s = 0 ... N-1: attend own queries to the block of kv that is here, that of rank (r -
          s) mod N, and meanwhile send it to rank r + 1 and receive the next one from rank r - 1;
          merge.
Backward  the same round of kv; the gradient of a block begins at the first rank that it visits and
          follows it one step behind, each rank adding its share (fp32), until the last one sends it
          home.

Messages  forward N-1 send_recv; backward 2 (N-1).
Bytes     with f = B (S/N) 2Hkv D elements of one rank's kv: forward (N-1) f e; backward (N-1) f (e
          + a), e bytes an input element and a (4, or 8 for fp64) an accumulated one.
Memory    2 remote blocks of kv: the one that is attended to and sent on, and the one that arrives;
          backward also 2 of their gradients.
Masks     causal and bidirectional, any layout; blocks that the mask empties travel all the same.

Differs from the paper: half of the own block's heads are differentiated last, while the last
gradients are on their way home. This is the plain ring: nothing is left out of a message, and a
causal call needs a balanced layout (zigzag) to be worthwhile.
"""

from collections import Counter

import torch

from ..comm import Pending
from ..merge import OnlineSoftmax, acc_dtype
from ..plan import Plan
from .sizes import Messages, PerDirection, Sizes


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    online = OnlineSoftmax(q)
    kv = torch.stack([k, v])
    for step in range(plan.group.world_size):
        next_kv = _pass_on(kv, step, plan) if step < plan.group.world_size - 1 else None
        plan.attend(online, q, kv[0], kv[1], plan.local_runs, plan.runs(_owner(step, plan)))
        if next_kv is not None:
            kv = next_kv.wait()
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
    acc, last_step = acc_dtype(q.dtype), plan.group.world_size - 1
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    local_dkv = torch.zeros((2, *k.shape), dtype=acc, device=q.device)
    kv = torch.stack([k, v])
    arriving_dkv: Pending | None = None
    for step in range(plan.group.world_size):
        next_kv = _pass_on(kv, step, plan) if step < last_step else None
        if step == 0:
            plan.attend_own_backward(0, dq, local_dkv, dout, q, k, v, out, lse)
        else:
            k_runs = plan.runs(_owner(step, plan))
            dk, dv = plan.attend_backward(
                dq, dout, q, kv[0], kv[1], out, lse, plan.local_runs, k_runs
            )
            if arriving_dkv is None:  # this rank is the first that the block visits
                dkv = torch.zeros(kv.shape, dtype=acc, device=q.device)
            else:
                dkv = arriving_dkv.wait()
            dkv[0] += dk
            dkv[1] += dv
            arriving_dkv = _pass_on(dkv, step, plan)
        if next_kv is not None:
            kv = next_kv.wait()
    plan.attend_own_backward(1, dq, local_dkv, dout, q, k, v, out, lse)
    if arriving_dkv is not None:
        local_dkv += arriving_dkv.wait()
    return dq, local_dkv[0], local_dkv[1]


def _owner(step: int, plan: Plan) -> int:
    """The rank whose block is here at this step."""
    return (plan.group.rank - step) % plan.group.world_size


def _pass_on(block: torch.Tensor, step: int, plan: Plan) -> Pending:
    """Sends a block [2, B, rows, Hkv, D] of this step's owner to the next rank, and receives the
    one of the next step's."""
    group = plan.group
    rows = plan.sharding.size(_owner(step + 1, plan))
    pending = plan.transport.send_recv(
        block,
        dst=(group.rank + 1) % group.world_size,
        src=(group.rank - 1) % group.world_size,
        shape=(*block.shape[:2], rows, *block.shape[3:]),
    )
    if not plan.overlap:
        pending.wait()
    return pending


def bytes_sent(s: Sizes) -> PerDirection:
    sent_elements = (s.N - 1) * s.block * s.kv_elements
    return PerDirection(sent_elements * s.itemsize, sent_elements * (s.itemsize + s.acc))


def messages(s: Sizes) -> Messages:
    return Messages(Counter(send_recv=s.N - 1), Counter(send_recv=2 * (s.N - 1)))


def received_bytes(s: Sizes, overlap: bool) -> PerDirection:
    blocks = min(2, s.N - 1)
    gradient_block = s.block * s.kv_elements * s.acc
    return PerDirection(blocks * s.kv_block, blocks * (s.kv_block + gradient_block))
