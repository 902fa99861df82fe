"""ringX3: one all-gather of keys and values; their gradients go home in one all-to-all.

Paper: Yin et al., RingX (SC25), X3 (causal, balanced) and X3b (bidirectional); the same pattern as
Llama 3's context parallelism (arXiv 2407.21783).

Forward   all-gather kv, the own block meanwhile; sort what came by position; attend each run of own
          queries to the prefix of keys that it sees, one kernel call each.
Backward  all-gather kv again, half of the own block's heads meanwhile; differentiate the rest; each
          rank's dkv goes home in the input dtype, only the keys this rank sees, the other half
          meanwhile; it is summed there in fp32.

Messages  forward 1 all-gather; backward 1 all-gather + 1 all-to-all.
Bytes     with f = B (S/N) 2Hkv D e bytes of one rank's kv: forward (N-1) f; backward (N-1) f +
          (N-1) f c, where c is the share of other ranks' keys that a rank sees: 1 bidirectional;
          causal 3/4 zigzag, 1/2 contiguous, just under 1 striped.
Memory    O(S): all ranks' kv as gathered and once more sorted; backward also dkv of all keys.
Masks     causal and bidirectional, any layout (striped keys cannot be sorted into bands: one call
          per rank there).

Differs from the paper: at most two kernel calls for all remote blocks instead of N-1 with a merge
each; dkv by all-to-all and a local fp32 sum, half the bytes of an fp32 reduce-scatter, without its
rounding in 16 bit, and without what the mask empties.
"""

from collections import Counter

import torch

from ..comm import Pending
from ..layout import TokenRange, clip, pack
from ..merge import OnlineSoftmax, acc_dtype
from ..plan import Plan
from .sizes import Messages, PerDirection, Sizes

RemoteRun = tuple[int, TokenRange]  # (rank, tokens that it holds)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    online = OnlineSoftmax(q)
    gathering = _gather(k, v, plan)
    plan.attend(online, q, k, v, plan.local_runs, plan.local_runs)
    remote = _visible_remote_runs(plan)
    if remote:
        sorted_k, sorted_v = _sorted_by_position(gathering.wait(), remote)
        k_runs = pack([run for _, run in remote])
        plan.attend(online, q, sorted_k, sorted_v, plan.local_runs, k_runs)
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
    acc, group = acc_dtype(q.dtype), plan.group
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    local_dkv = torch.zeros((2, *k.shape), dtype=acc, device=q.device)
    gathering = _gather(k, v, plan)
    plan.attend_own_backward(0, dq, local_dkv, dout, q, k, v, out, lse)
    if group.world_size == 1:
        return dq, local_dkv[0], local_dkv[1]

    remote, gathered = _visible_remote_runs(plan), gathering.wait()
    grads: tuple[torch.Tensor, ...] = ()
    if remote:
        sorted_k, sorted_v = _sorted_by_position(gathered, remote)
        k_runs = pack([run for _, run in remote])
        grads = plan.attend_backward(
            dq, dout, q, sorted_k, sorted_v, out, lse, plan.local_runs, k_runs
        )
        del sorted_k, sorted_v
    del gathered, gathering

    incoming = _incoming_elements(k, plan)
    going_home = plan.transport.all_to_all(
        _split_by_owner(grads, remote, k, group.world_size), incoming
    )
    del grads
    if not plan.overlap:
        going_home.wait()
    plan.attend_own_backward(1, dq, local_dkv, dout, q, k, v, out, lse)
    for src, part in enumerate(going_home.wait().split(incoming)):
        if part.numel():
            rows = plan.visible_keys(group.rank, by=src)
            local_dkv[:, :, rows] += part.view(2, k.shape[0], rows.stop, *k.shape[2:])
    return dq, local_dkv[0], local_dkv[1]


def _gather(k: torch.Tensor, v: torch.Tensor, plan: Plan) -> Pending:
    """[N, 2, B, rows, Hkv, D]; shards shorter than the longest are padded to it, as an all-gather
    wants."""
    longest = max(plan.sharding.size(rank) for rank in range(plan.group.world_size))
    kv = torch.stack([k, v])
    if k.shape[1] < longest:
        kv = torch.nn.functional.pad(kv, (0, 0, 0, 0, 0, longest - k.shape[1]))
    gathering = plan.transport.all_gather(kv)
    if not plan.overlap:
        gathering.wait()
    return gathering


def _visible_remote_runs(plan: Plan) -> list[RemoteRun]:
    """The keys of other ranks that this one sees, by ascending position."""
    rank = plan.group.rank
    remote: list[RemoteRun] = []
    for src in range(plan.group.world_size):
        if src != rank:
            visible = clip(plan.runs(src), plan.visible_keys(src, by=rank))
            remote.extend((src, run) for run in visible)
    return sorted(remote, key=lambda pair: pair[1].start)


def _sorted_by_position(
    gathered: torch.Tensor, remote: list[RemoteRun]
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [B, keys, Hkv, D] of those runs, in that order."""
    k = [gathered[src, 0][:, run.at : run.at + run.length] for src, run in remote]
    v = [gathered[src, 1][:, run.at : run.at + run.length] for src, run in remote]
    return torch.cat(k, dim=1), torch.cat(v, dim=1)


def _split_by_owner(
    grads: tuple[torch.Tensor, ...], remote: list[RemoteRun], k: torch.Tensor, world_size: int
) -> list[torch.Tensor]:
    """The inverse of _sorted_by_position: one message for each rank, [2, B, keys of it that are
    seen here, Hkv, D] in k's dtype, empty where none is."""
    dk_of: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    dv_of: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    start = 0
    for src, run in remote:
        dk, dv = grads
        dk_of[src].append(dk[:, start : start + run.length])
        dv_of[src].append(dv[:, start : start + run.length])
        start += run.length
    messages = []
    for dk_parts, dv_parts in zip(dk_of, dv_of, strict=True):
        if dk_parts:
            dkv = torch.stack([torch.cat(dk_parts, dim=1), torch.cat(dv_parts, dim=1)])
            messages.append(dkv.to(k.dtype))
        else:
            messages.append(k.new_empty(0))
    return messages


def _incoming_elements(k: torch.Tensor, plan: Plan) -> list[int]:
    """Elements of dkv that each rank sends here."""
    rank = plan.group.rank
    elements_per_token = 2 * k.shape[0] * k.shape[2] * k.shape[3]
    incoming = []
    for src in range(plan.group.world_size):
        tokens = 0 if src == rank else plan.visible_keys(rank, by=src).stop
        incoming.append(tokens * elements_per_token)
    return incoming


def bytes_sent(s: Sizes) -> PerDirection:
    gathered = (s.N - 1) * s.block * s.kv_elements * s.itemsize
    return PerDirection(gathered, gathered + s.remote_keys_seen * s.kv_elements * s.itemsize)


def messages(s: Sizes) -> Messages:
    once = 1 if s.N > 1 else 0
    return Messages(Counter(all_gather=once), Counter(all_gather=once, all_to_all=once))


def received_bytes(s: Sizes, overlap: bool) -> PerDirection:
    gathered = s.N * s.kv_block if s.N > 1 else 0.0
    return PerDirection(gathered, gathered)
