"""FlashAttention-4 (package flash-attn-4, module flash_attn.cute; NVIDIA Hopper and Blackwell).

Its forward and backward below autograd are called by name; windows are off where they are not given.  The forward returns
out and lse first (and lse only when asked), the backward takes and writes dq, dk and dv.  Causal is aligned bottom-right; grouped
heads are supported; head sizes must be multiples of 8, up to 256 on Hopper, on Blackwell up to 128 or 256.  Early versions and
compute capability 12 have no deterministic backward.

Untested on hardware when written; test/standins.py has the signatures that the calls are tested against.
"""

from . import gpu
from .protocol import Band, KernelRequest

causal = "bottom-right"
_PACKAGE = ("flash-attn-4", "flash_attn.cute.interface")
_MUST = ("q", "k", "v", "softmax_scale", "causal")
_fwd = gpu.Function(*_PACKAGE, "_flash_attn_fwd", (*_MUST, "return_lse"))
_bwd = gpu.Function(*_PACKAGE, "_flash_attn_bwd", (*_MUST, "dout", "out", "lse"))


def unsupported_reason(need: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(need, nvidia=(9, 0), rocm=False):
        return reason
    major = (gpu.capability(need.device) or (9, 0))[0]
    if major > 9 and 128 < need.head_dim != 256:
        return f"its head size on this GPU is at most 128, or 256, not {need.head_dim}"
    if reason := _fwd.missing() or _bwd.missing():
        return reason
    if (
        need.deterministic
        and need.grad
        and (major == 12 or "deterministic" not in _bwd.parameters())
    ):
        return "its backward is not deterministic on this GPU or in this version"
    return None


def fwd(q, k, v, *, band: Band, scale: float):
    q_, k_, v_ = gpu.pad(q, k, v)
    out, lse, *_ = _fwd(
        q=q_, k=k_, v=v_, softmax_scale=scale, causal=band[1] is not None, return_lse=True
    )
    return gpu.unpad(out, q), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = False):
    dout_, q_, k_, v_, out_ = gpu.pad(dout, q, k, v, out)
    grads = _bwd(
        q=q_, k=k_, v=v_, out=out_, dout=dout_, lse=lse.contiguous(), softmax_scale=scale, causal=band[1] is not None,
        deterministic=deterministic,
    )[:3]  # fmt: skip
    return tuple(gpu.unpad(g, q) for g in grads)
