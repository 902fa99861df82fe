"""Plain einsum attention for any device, dtype and band; it holds the [Sq, Sk] scores in full.

The other kernels are compared with it, so it is written from the definition.  16-bit inputs are
computed in fp32.
"""

import torch
from torch import Tensor

from ..merge import acc_dtype
from .heads import fold_heads, repeat_heads
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "any"


def unsupported_reason(request: KernelRequest) -> str | None:
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(_widen(q), _widen(k), band, scale)
    lse = scores.logsumexp(-1)
    # Rows without keys: every probability is exp(-inf) = 0.
    probabilities = (scores - _finite(lse).unsqueeze(-1)).exp()
    values = repeat_heads(_widen(v), q.shape[2])
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, values).to(q.dtype), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    band: Band,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[2]
    queries = _widen(q)
    keys = _widen(k)
    dout = _widen(dout)
    probabilities = (_scores(queries, keys, band, scale) - _finite(lse).unsqueeze(-1)).exp()
    dprobabilities = torch.einsum("bqhd,bkhd->bhqk", dout, repeat_heads(_widen(v), heads))
    delta = (dout * _widen(out)).sum(-1).transpose(1, 2).unsqueeze(-1)
    dscores = probabilities * (dprobabilities - delta) * scale
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, repeat_heads(keys, heads))
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, queries)
    dv = torch.einsum("bhqk,bqhd->bkhd", probabilities, dout)
    return dq.to(q.dtype), fold_heads(dk, k), fold_heads(dv, v)


def _widen(x: Tensor) -> Tensor:
    return x.to(acc_dtype(x.dtype))


def _finite(lse: Tensor) -> Tensor:
    """Zero for rows without keys, whose lse is -inf: -inf - -inf would be nan."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _scores(q: Tensor, k: Tensor, band: Band, scale: float) -> Tensor:
    """[B, H, Sq, Sk]: the scaled scores, -inf outside the band."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, repeat_heads(k, q.shape[2])) * scale
    lo, hi = band
    if lo is None and hi is None:
        return scores
    rows, keys = scores.shape[-2:]
    row = torch.arange(rows, device=scores.device).unsqueeze(1)
    offset = torch.arange(keys, device=scores.device) - row  # j - i
    hidden = torch.zeros((rows, keys), dtype=torch.bool, device=scores.device)
    if lo is not None:
        hidden |= offset < lo
    if hi is not None:
        hidden |= offset > hi
    return scores.masked_fill(hidden, -torch.inf)
