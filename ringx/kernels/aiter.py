"""AMD's AI tensor engine (package amd-aiter; ROCm): CK and assembly kernels for MI300 and later.

The package's forward and backward below autograd are called by name (`bias` and other arguments
came and went by version; the backward is wrapped as an operator, whose schema has its argument
names).  dq, dk and dv are written in place.

Causal is documented as bottom-right, but the assembly kernels align top-left, so only Sq == Sk is
asked of it.  Grouped heads are supported; head sizes must be multiples of 8, up to 256.

Untested on hardware when written; test/helpers/standins.py has the signatures that the calls are
tested against.
"""

import torch
from torch import Tensor

from . import gpu
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "square"
_REQUIRED = ("q", "k", "v", "softmax_scale", "causal")
_package_forward = gpu.PackageFunction(
    package="amd-aiter",
    module="aiter.ops.mha",
    name="_flash_attn_forward",
    required=(*_REQUIRED, "return_lse"),
    operator="aiter::_flash_attn_forward",
)
_package_backward = gpu.PackageFunction(
    package="amd-aiter",
    module="aiter.ops.mha",
    name="_flash_attn_backward",
    required=(*_REQUIRED, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"),
    operator="aiter::_flash_attn_backward",
)
_UNUSED_FEATURES = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "sink_size": 0,
    "return_softmax": False,
}


def unsupported_reason(request: KernelRequest) -> str | None:
    return (
        gpu.unsupported_reason(request, nvidia=None, rocm=True)
        or _package_forward.unsupported_reason()
        or _package_backward.unsupported_reason()
    )


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    q_padded, k_padded, v_padded = gpu.pad(q, k, v)
    out, lse, *_ = _package_forward(
        q=q_padded,
        k=k_padded,
        v=v_padded,
        softmax_scale=scale,
        causal=band[1] is not None,
        return_lse=True,
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
        causal=band[1] is not None,
        deterministic=deterministic,
        **_UNUSED_FEATURES,
    )
    return gpu.unpad(dq, q), gpu.unpad(dk, q), gpu.unpad(dv, q)
