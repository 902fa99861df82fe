"""cuDNN attention through PyTorch (NVIDIA, Ampere and later).

Facts that shape the calls (schemas of torch 2.8 to 2.13):

- Causal is only offered for Sq == Sk; grouped heads are supported.
- Head sizes are multiples of 8 up to 128 (padded; larger ones depend on cuDNN's version and the
  GPU).
- A single key is not supported: those tiles are computed by the ``reference`` kernel.
- PyTorch remembers cuDNN's plans by the layout of q, k and v alone, so out and dout must always be
  laid out as q is: all are contiguous.
- lse is [B, H, S] or [B, H, S, 1] by version, and the backward wants what the forward gives.
- There is no deterministic backward.

Untested on hardware when written; the calls are checked against the operators' schemas.
"""

import functools

import torch
from torch import Tensor

from . import gpu, reference
from .protocol import Band, CausalAlignment, KernelRequest
from .sdpa_flash import unused_seeds

causal_alignment: CausalAlignment = "square"
_aten_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_aten_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def unsupported_reason(request: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(request, nvidia=(8, 0), rocm=False, max_head_dim=128):
        return reason
    if (torch.backends.cudnn.version() or 0) < 90000:
        return "it needs cuDNN 9"
    if request.deterministic and request.grad:
        return "its backward is not deterministic"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    if k.shape[1] == 1:
        return reference.forward(q, k, v, band=band, scale=scale)
    out, lse, *_ = _call_forward(q, k, v, is_causal=band[1] is not None, scale=scale)
    return gpu.unpad(out.transpose(1, 2), q), lse.reshape(lse.shape[:3])


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
    if k.shape[1] == 1:
        return reference.backward(dout, q, k, v, out, lse, band=band, scale=scale)
    operands = [x.transpose(1, 2) for x in gpu.pad(dout, q, k, v, out)]
    is_causal = band[1] is not None
    lse = lse.contiguous()
    if _lse_dimensions(q.device, q.dtype) == 4:
        lse = lse.unsqueeze(-1)
    seed, offset = unused_seeds(q.device)
    gradients = _aten_backward(
        *operands,
        lse,
        seed,
        offset,
        None,  # attn_bias
        None,  # cum_seq_q
        None,  # cum_seq_k
        q.shape[1],  # max_q
        k.shape[1],  # max_k
        0.0,  # dropout_p
        is_causal,
        scale=scale,
    )
    dq, dk, dv = (gpu.unpad(gradient.transpose(1, 2), q) for gradient in gradients)
    return dq, dk, dv


def _call_forward(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple:
    """out [B, H, S, D], lse, and more, as the operator returns them."""
    operands = [x.transpose(1, 2) for x in gpu.pad(q, k, v)]
    return _aten_forward(
        *operands,
        None,  # attn_bias
        True,  # compute_log_sumexp
        0.0,  # dropout_p
        is_causal,
        False,  # return_debug_mask
        scale=scale,
    )


@functools.lru_cache(maxsize=8)
def _lse_dimensions(device: torch.device, dtype: torch.dtype) -> int:
    """4 if this PyTorch's lse has a last dimension of one, otherwise 3, as a call shows."""
    x = torch.zeros(1, 64, 1, 64, device=device, dtype=dtype)
    _, lse, *_ = _call_forward(x, x, x, is_causal=False, scale=1.0)
    return lse.dim()
