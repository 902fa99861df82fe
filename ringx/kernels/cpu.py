"""PyTorch's (aten's) flash attention for CPUs: fp64, fp32, bf16, fp16; any head size.

Facts that shape the calls:

- Causal is aligned top-left.
- Empty operands kill the process (tiles are never empty).
- The last dimension must have stride 1; otherwise results are NaN.
- The backward wants lse contiguous, and dout and out in q's dtype.
- Before torch 2.9 grouped heads are read out of bounds, so they are repeated there.
"""

import torch
from torch import Tensor

from ..merge import acc_dtype
from .heads import fold_heads, repeat_heads
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "top-left"
_TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_HAS_GROUPED_HEADS = _TORCH_VERSION >= (2, 9)
_aten_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_aten_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported_reason(request: KernelRequest) -> str | None:
    if request.device.type == "cpu":
        return None
    return f"it runs on cpu tensors, these are on {request.device.type}"


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    is_causal = band[1] is not None
    k = _match_heads(k, q)
    v = _match_heads(v, q)
    out, lse = _aten_forward(_bhsd(q), _bhsd(k), _bhsd(v), 0.0, is_causal, scale=scale)
    return out.transpose(1, 2), lse


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
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    is_causal = band[1] is not None
    dq, dk, dv = _aten_backward(
        _bhsd(dout),
        _bhsd(q),
        _bhsd(_match_heads(k, q)),
        _bhsd(_match_heads(v, q)),
        _bhsd(out),
        lse.to(acc_dtype(q.dtype)).contiguous(),
        0.0,
        is_causal,
        scale=scale,
    )
    return (
        dq.transpose(1, 2),
        fold_heads(dk.transpose(1, 2), k),
        fold_heads(dv.transpose(1, 2), v),
    )


def _match_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with as many heads as q, where this version of torch needs it."""
    return x if _HAS_GROUPED_HEADS else repeat_heads(x, q.shape[2])


def _bhsd(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D], with stride 1 in the last dimension."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.transpose(1, 2)
