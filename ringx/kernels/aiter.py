"""AMD's AI tensor engine (package amd-aiter; ROCm): CK and assembly kernels for MI300 and later.

Its forward and backward below autograd are called by name (`bias` and others came and went by version; the backward is wrapped
as an operator, whose schema has its argument names).  dq, dk and dv are written in place.  Causal is documented as bottom-right,
but the assembly kernels align top-left, so only Sq == Sk is asked of it.  Grouped heads are supported; head sizes must be
multiples of 8, up to 256.

Untested on hardware when written; test/standins.py has the signatures that the calls are tested against.
"""

import torch

from . import gpu
from .protocol import Band, KernelRequest

causal = "square"
_PACKAGE = ("amd-aiter", "aiter.ops.mha")
_MUST = ("q", "k", "v", "softmax_scale", "causal")
_fwd = gpu.Function(
    *_PACKAGE, "_flash_attn_forward", (*_MUST, "return_lse"), op="aiter::_flash_attn_forward"
)
_bwd = gpu.Function(
    *_PACKAGE,
    "_flash_attn_backward",
    (*_MUST, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"),
    op="aiter::_flash_attn_backward",
)
_OFF = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "sink_size": 0,
    "return_softmax": False,
}


def unsupported_reason(need: KernelRequest) -> str | None:
    return gpu.unsupported_reason(need, nvidia=None, rocm=True) or _fwd.missing() or _bwd.missing()


def fwd(q, k, v, *, band: Band, scale: float):
    q_, k_, v_ = gpu.pad(q, k, v)
    out, lse, *_ = _fwd(
        q=q_, k=k_, v=v_, softmax_scale=scale, causal=band[1] is not None, return_lse=True, **_OFF
    )
    return gpu.unpad(out, q), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = False):
    dout_, q_, k_, v_, out_ = gpu.pad(dout, q, k, v, out)
    grads = {f"d{name}": torch.empty_like(x) for name, x in (("q", q_), ("k", k_), ("v", v_))}
    _bwd(
        dout=dout_, q=q_, k=k_, v=v_, out=out_, softmax_lse=lse.contiguous(), **grads,
        softmax_scale=scale, causal=band[1] is not None, deterministic=deterministic, **_OFF,
    )  # fmt: skip
    return tuple(gpu.unpad(g, q) for g in grads.values())
