"""FlashAttention-3 (module flash_attn_interface, built from flash-attention's hopper folder; NVIDIA Hopper).

Its forward and backward below autograd are called by name.  3.0.0b1 insists on the arguments of features not used here (new
keys, pages, rotary ...), which are switched off with None; it takes `window_size` and `causal`, later versions
window_size_left and window_size_right, and `is_causal` in the backward.  dq, dk and dv are written in place.  Causal is aligned
bottom-right; grouped heads are supported; head sizes must be multiples of 8, up to 256.

Untested on hardware when written; test/standins.py has the signatures that the calls are tested against.
"""

import torch

from . import gpu
from .protocol import Band, KernelRequest

causal = "bottom-right"
_PACKAGE = ("FlashAttention-3", "flash_attn_interface")
_MUST = ("q", "k", "v", "softmax_scale", "window_size|window_size_left")
_fwd = gpu.Function(
    *_PACKAGE, "_flash_attn_forward", (*_MUST, "causal"), op="flash_attn_3::_flash_attn_forward"
)
_bwd = gpu.Function(
    *_PACKAGE,
    "_flash_attn_backward",
    (*_MUST, "causal|is_causal", "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"),
    op="flash_attn_3::_flash_attn_backward",
)
_OFF = {"window_size": (-1, -1), "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}


def unsupported_reason(need: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(need, nvidia=(9, 0), rocm=False):
        return reason
    found = gpu.capability(need.device)
    if found and found[0] != 9:
        return f"it is made for Hopper (compute capability 9.0), this GPU has {found[0]}.{found[1]}"
    return _fwd.missing() or _bwd.missing()


def fwd(q, k, v, *, band: Band, scale: float):
    q_, k_, v_ = gpu.pad(q, k, v)
    out, lse, *_ = _fwd(q=q_, k=k_, v=v_, softmax_scale=scale, causal=band[1] is not None, **_OFF)
    return gpu.unpad(out, q), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = False):
    dout_, q_, k_, v_, out_ = gpu.pad(dout, q, k, v, out)
    grads = {f"d{name}": torch.empty_like(x) for name, x in (("q", q_), ("k", k_), ("v", v_))}
    _bwd(
        dout=dout_, q=q_, k=k_, v=v_, out=out_, softmax_lse=lse.contiguous(), **grads,
        softmax_scale=scale, causal=band[1] is not None, is_causal=band[1] is not None, deterministic=deterministic, **_OFF,
    )  # fmt: skip
    return tuple(gpu.unpad(g, q) for g in grads.values())
