"""Plain einsum attention: any device, any dtype, any band; the [Sq, Sk] scores are held in full.

The yardstick of all other kernels, hence written from the definition.  16-bit inputs are computed in fp32.
"""

import torch

from ..merge import acc_dtype
from .heads import fold_heads, repeat_heads
from .protocol import Band, KernelRequest

causal = "any"


def unsupported_reason(need: KernelRequest) -> str | None:
    return None


def fwd(q, k, v, *, band: Band, scale: float):
    q_, k_, v_ = (_wide(x) for x in (q, k, v))
    s = _scores(q_, k_, band, scale)
    lse = s.logsumexp(-1)
    p = (s - _finite(lse).unsqueeze(-1)).exp()  # rows without keys: all exp(-inf) = 0
    return torch.einsum("bhqk,bkhd->bqhd", p, repeat_heads(v_, q.shape[2])).to(q.dtype), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = True):
    dout_, q_, k_, v_, out_ = (_wide(x) for x in (dout, q, k, v, out))
    p = (_scores(q_, k_, band, scale) - _finite(lse).unsqueeze(-1)).exp()
    dp = torch.einsum("bqhd,bkhd->bhqk", dout_, repeat_heads(v_, q.shape[2]))
    delta = (dout_ * out_).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (dp - delta) * scale
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, repeat_heads(k_, q.shape[2]))
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, q_)
    dv = torch.einsum("bhqk,bqhd->bkhd", p, dout_)
    return dq.to(q.dtype), fold_heads(dk, k), fold_heads(dv, v)


def _wide(x):
    return x.to(acc_dtype(x.dtype))


def _finite(lse):
    """Rows without keys subtract 0 rather than -inf."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _scores(q, k, band: Band, scale: float):
    s = torch.einsum("bqhd,bkhd->bhqk", q, repeat_heads(k, q.shape[2])) * scale
    lo, hi = band
    if lo is not None or hi is not None:
        m, n = s.shape[-2:]
        ahead = torch.arange(n, device=s.device) - torch.arange(m, device=s.device).unsqueeze(
            1
        )  # j - i
        hidden = torch.zeros((m, n), dtype=torch.bool, device=s.device)
        if lo is not None:
            hidden |= ahead < lo
        if hi is not None:
            hidden |= ahead > hi
        s = s.masked_fill(hidden, -torch.inf)
    return s
