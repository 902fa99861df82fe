"""FlashAttention-2 (package flash-attn 2.4 and later; CUDA, and ROCm through CK or Triton).

The package's forward and backward below autograd are called by name.  They differ by version:

- `window_size` became window_size_left and window_size_right in 2.7, where the functions also
  became custom operators.
- softcap came in 2.6.
- The forward returned 8 values before 2.7, and returns 4 since.
- The backward writes dq, dk and dv in place in all versions.

Causal is aligned bottom-right since 2.1.  Grouped heads are supported; head sizes must be multiples
of 8, up to 256; lse is read as a bare pointer.

Untested on hardware when written; test/helpers/standins.py has the signatures that the calls are
tested against.
"""

import torch
from torch import Tensor

from . import gpu
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "bottom-right"
_REQUIRED = ("q", "k", "v", "softmax_scale", "causal", "window_size|window_size_left")
_package_forward = gpu.PackageFunction(
    package="flash-attn",
    module="flash_attn.flash_attn_interface",
    name="_flash_attn_forward",
    required=_REQUIRED,
    operator="flash_attn::_flash_attn_forward",
)
_package_backward = gpu.PackageFunction(
    package="flash-attn",
    module="flash_attn.flash_attn_interface",
    name="_flash_attn_backward",
    required=(*_REQUIRED, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"),
    operator="flash_attn::_flash_attn_backward",
)
_UNUSED_FEATURES = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "return_softmax": False,
}


def unsupported_reason(request: KernelRequest) -> str | None:
    return (
        gpu.unsupported_reason(request, nvidia=(8, 0), rocm=True)
        or _package_forward.unsupported_reason()
        or _package_backward.unsupported_reason()
    )


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    q_padded, k_padded, v_padded = gpu.pad(q, k, v)
    results = _package_forward(
        q=q_padded,
        k=k_padded,
        v=v_padded,
        softmax_scale=scale,
        causal=band[1] is not None,
        **_UNUSED_FEATURES,
    )
    if len(results) == 8:  # before 2.7
        out, lse = results[4], results[5]
    else:
        out, lse = results[0], results[1]
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
