"""FlashAttention-3 (module flash_attn_interface, from flash-attention's hopper folder; Hopper).

The package's forward and backward below autograd are called by name.  Version 3.0.0b1 insists on
the arguments of features that are not used here (new keys, pages, rotary ...), which are None; it
takes `window_size` and `causal`.  Later versions take window_size_left and window_size_right, and
`is_causal` in the backward.  dq, dk and dv are written in place.

Causal is aligned bottom-right; grouped heads are supported; head sizes must be multiples of 8, up
to 256.

Untested on hardware when written; test/helpers/standins.py has the signatures that the calls are
tested against.
"""

import torch
from torch import Tensor

from . import gpu
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "bottom-right"
_REQUIRED = ("q", "k", "v", "softmax_scale", "window_size|window_size_left")
_REQUIRED_BY_BACKWARD = (
    "causal|is_causal",
    "dout",
    "out",
    "softmax_lse",
    "dq",
    "dk",
    "dv",
    "deterministic",
)
_package_forward = gpu.PackageFunction(
    package="FlashAttention-3",
    module="flash_attn_interface",
    name="_flash_attn_forward",
    required=(*_REQUIRED, "causal"),
    operator="flash_attn_3::_flash_attn_forward",
)
_package_backward = gpu.PackageFunction(
    package="FlashAttention-3",
    module="flash_attn_interface",
    name="_flash_attn_backward",
    required=(*_REQUIRED, *_REQUIRED_BY_BACKWARD),
    operator="flash_attn_3::_flash_attn_backward",
)
_UNUSED_FEATURES = {
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
}


def unsupported_reason(request: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(request, nvidia=(9, 0), rocm=False):
        return reason
    capability = gpu.capability(request.device)
    if capability and capability[0] != 9:
        return (
            "it is made for Hopper (compute capability 9.0), "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    return _package_forward.unsupported_reason() or _package_backward.unsupported_reason()


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    q_padded, k_padded, v_padded = gpu.pad(q, k, v)
    out, lse, *_ = _package_forward(
        q=q_padded,
        k=k_padded,
        v=v_padded,
        softmax_scale=scale,
        causal=band[1] is not None,
        **_UNUSED_FEATURES,
    )
    return gpu.unpad(out, q), lse


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
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dout_padded, q_padded, k_padded, v_padded, out_padded = gpu.pad(dout, q, k, v, out)
    dq = torch.empty_like(q_padded)
    dk = torch.empty_like(k_padded)
    dv = torch.empty_like(v_padded)
    is_causal = band[1] is not None
    _package_backward(
        dout=dout_padded,
        q=q_padded,
        k=k_padded,
        v=v_padded,
        out=out_padded,
        softmax_lse=lse.contiguous(),
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=scale,
        causal=is_causal,
        is_causal=is_causal,
        deterministic=deterministic,
        **_UNUSED_FEATURES,
    )
    return gpu.unpad(dq, q), gpu.unpad(dk, q), gpu.unpad(dv, q)
