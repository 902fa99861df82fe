"""FlashAttention-4 (package flash-attn-4, module flash_attn.cute; NVIDIA Hopper and Blackwell).

The package's forward and backward below autograd are called by name; windows are off where they are
not given.  The forward returns out and lse first (lse only on request), the backward returns dq, dk
and dv first.

Causal is aligned bottom-right; grouped heads are supported; head sizes must be multiples of 8, up
to 256 on Hopper, on Blackwell up to 128 or 256.  Early versions and compute capability 12 have no
deterministic backward.

Untested on hardware when written; test/helpers/standins.py has the signatures that the calls are
tested against.
"""

from torch import Tensor

from . import gpu
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "bottom-right"
_REQUIRED = ("q", "k", "v", "softmax_scale", "causal")
_package_forward = gpu.PackageFunction(
    package="flash-attn-4",
    module="flash_attn.cute.interface",
    name="_flash_attn_fwd",
    required=(*_REQUIRED, "return_lse"),
)
_package_backward = gpu.PackageFunction(
    package="flash-attn-4",
    module="flash_attn.cute.interface",
    name="_flash_attn_bwd",
    required=(*_REQUIRED, "dout", "out", "lse"),
)


def unsupported_reason(request: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(request, nvidia=(9, 0), rocm=False):
        return reason
    major, _ = gpu.capability(request.device) or (9, 0)
    if major > 9 and 128 < request.head_dim != 256:
        return f"its head size on this GPU is at most 128, or 256, not {request.head_dim}"
    if reason := _package_forward.unsupported_reason() or _package_backward.unsupported_reason():
        return reason
    needs_deterministic_backward = request.deterministic and request.grad
    if needs_deterministic_backward and not _has_deterministic_backward(major):
        return "its backward is not deterministic on this GPU or in this version"
    return None


def _has_deterministic_backward(major_capability: int) -> bool:
    return major_capability != 12 and "deterministic" in _package_backward.parameters()


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    q_padded, k_padded, v_padded = gpu.pad(q, k, v)
    out, lse, *_ = _package_forward(
        q=q_padded,
        k=k_padded,
        v=v_padded,
        softmax_scale=scale,
        causal=band[1] is not None,
        return_lse=True,
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
    dq, dk, dv, *_ = _package_backward(
        q=q_padded,
        k=k_padded,
        v=v_padded,
        out=out_padded,
        dout=dout_padded,
        lse=lse.contiguous(),
        softmax_scale=scale,
        causal=band[1] is not None,
        deterministic=deterministic,
    )
    return gpu.unpad(dq, q), gpu.unpad(dk, q), gpu.unpad(dv, q)
