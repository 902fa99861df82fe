"""cuDNN attention through PyTorch (NVIDIA, Ampere and later).

LauncherInfo that shape the calls (schemas of torch 2.8 to 2.13): causal is only offered for Sq == Sk; grouped heads are supported; head
sizes are multiples of 8 up to 128 (padded; larger ones depend on cuDNN's version and the GPU); a single key is not supported:
those tiles are computed by their definition.  PyTorch remembers cuDNN's plans by the layout of q, k and v alone, so out and
dout must always be laid out as q is: all are contiguous.  lse is [B, H, S] or [B, H, S, 1] by version, and the backward wants
what the forward gives.  There is no deterministic backward.

Untested on hardware when written; the calls are checked against the operators' schemas.
"""

import functools

import torch

from . import gpu, reference
from .protocol import Band, KernelRequest
from .sdpa_flash import seeds

causal = "square"
_fwd = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_bwd = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def unsupported_reason(need: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(need, nvidia=(8, 0), rocm=False, head_dim=128):
        return reason
    if (torch.backends.cudnn.version() or 0) < 90000:
        return "it needs cuDNN 9"
    if need.deterministic and need.grad:
        return "its backward is not deterministic"
    return None


def fwd(q, k, v, *, band: Band, scale: float):
    if k.shape[1] == 1:
        return reference.fwd(q, k, v, band=band, scale=scale)
    out, lse, *_ = _call(q, k, v, band[1] is not None, scale)
    return gpu.unpad(out.transpose(1, 2), q), lse.reshape(lse.shape[:3])


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = False):
    if k.shape[1] == 1:
        return reference.bwd(dout, q, k, v, out, lse, band=band, scale=scale)
    operands = [x.transpose(1, 2) for x in gpu.pad(dout, q, k, v, out)]
    lse = lse.contiguous()
    if _lse_dims(q.device, q.dtype) == 4:
        lse = lse.unsqueeze(-1)
    seed, offset = seeds(q.device)
    grads = _bwd(
        *operands, lse, seed, offset, None, None, None, q.shape[1], k.shape[1], 0.0, band[1] is not None, scale=scale
    )  # fmt: skip
    return tuple(gpu.unpad(g.transpose(1, 2), q) for g in grads)


def _call(q, k, v, is_causal: bool, scale: float):
    return _fwd(
        *(x.transpose(1, 2) for x in gpu.pad(q, k, v)),
        None,
        True,
        0.0,
        is_causal,
        False,
        scale=scale,
    )


@functools.lru_cache(maxsize=8)
def _lse_dims(device: torch.device, dtype: torch.dtype) -> int:
    """Whether this PyTorch's lse has a last dimension of one: asked of the operator itself."""
    q = torch.zeros(1, 64, 1, 64, device=device, dtype=dtype)
    return _call(q, q, q, False, 1.0)[1].dim()
