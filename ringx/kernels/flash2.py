"""FlashAttention-2 (package flash-attn 2.4 and later; CUDA, and ROCm through CK or Triton).

Its forward and backward below autograd are called by name.  They differ by version: `window_size` became window_size_left and
window_size_right in 2.7, where the functions also became custom operators; softcap came in 2.6; the forward returned 8 values
before 2.7, 4 since; the backward writes dq, dk and dv in place in all.  Causal is aligned bottom-right since 2.1.  Grouped heads
are supported; head sizes must be multiples of 8, up to 256; lse is read as a bare pointer.

Untested on hardware when written; test/standins.py has the signatures that the calls are tested against.
"""

import torch

from . import gpu
from .protocol import Band, KernelRequest

causal = "bottom-right"
_PACKAGE = ("flash-attn", "flash_attn.flash_attn_interface")
_MUST = ("q", "k", "v", "softmax_scale", "causal", "window_size|window_size_left")
_fwd = gpu.Function(*_PACKAGE, "_flash_attn_forward", _MUST, op="flash_attn::_flash_attn_forward")
_bwd = gpu.Function(
    *_PACKAGE,
    "_flash_attn_backward",
    (*_MUST, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"),
    op="flash_attn::_flash_attn_backward",
)
_OFF = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "return_softmax": False,
}


def unsupported_reason(need: KernelRequest) -> str | None:
    return (
        gpu.unsupported_reason(need, nvidia=(8, 0), rocm=True) or _fwd.missing() or _bwd.missing()
    )


def fwd(q, k, v, *, band: Band, scale: float):
    q_, k_, v_ = gpu.pad(q, k, v)
    result = _fwd(q=q_, k=k_, v=v_, softmax_scale=scale, causal=band[1] is not None, **_OFF)
    out, lse = (result[4], result[5]) if len(result) == 8 else (result[0], result[1])
    return gpu.unpad(out, q), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = False):
    dout_, q_, k_, v_, out_ = gpu.pad(dout, q, k, v, out)
    grads = {f"d{name}": torch.empty_like(x) for name, x in (("q", q_), ("k", k_), ("v", v_))}
    _bwd(
        dout=dout_, q=q_, k=k_, v=v_, out=out_, softmax_lse=lse.contiguous(), **grads,
        softmax_scale=scale, causal=band[1] is not None, deterministic=deterministic, **_OFF,
    )  # fmt: skip
    return tuple(gpu.unpad(g, q) for g in grads.values())
