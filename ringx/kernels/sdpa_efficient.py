"""PyTorch's memory-efficient attention (CUTLASS on NVIDIA, AOTriton on ROCm).

It also computes in fp32, and on GPUs before Ampere.

Facts that shape the calls (schemas of torch 2.8 to 2.13):

- Causal is aligned top-left (CausalFromTopLeft).
- There are no grouped heads, so keys and values are repeated, and their gradients added in fp32.
- Head sizes are padded to multiples of 8.
- On NVIDIA lse comes in rows of a multiple of 32 (the backward's block), filled with +inf, so that
  exp(s - lse) of rows that do not exist is zero: the backward is given the same.
- `out` and `dout` are read with the strides of contiguous [B, S, H, D] tensors.
- The backward splits keys, and adds their parts in any order, unless deterministic algorithms are
  switched on.

Untested on hardware when written; the calls are checked against the operators' schemas.
"""

import torch
from torch import Tensor

from . import gpu
from .heads import fold_heads, repeat_heads
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "top-left"
_aten_forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
_aten_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_LSE_BLOCK = 32


def unsupported_reason(request: KernelRequest) -> str | None:
    reason = gpu.unsupported_reason(
        request,
        nvidia=(8, 0) if request.dtype == torch.bfloat16 else (5, 0),
        rocm=True,
        dtypes=(*gpu.HALF_PRECISION, torch.float32),
        max_head_dim=512,
    )
    if reason:
        return reason
    if request.deterministic and request.grad and gpu.on_rocm():
        return "its backward on ROCm does not promise to be deterministic"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    is_causal = band[1] is not None
    out, lse, *_ = _aten_forward(
        *_operands(q, k, v, heads=q.shape[2]),
        None,  # attn_bias
        True,  # compute_log_sumexp
        0.0,  # dropout_p
        is_causal,
        scale=scale,
    )
    return gpu.unpad(out.transpose(1, 2), q), lse.narrow(2, 0, q.shape[1])


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
    dout_padded, q_padded, k_padded, v_padded, out_padded = _operands(
        dout, q, k, v, out, heads=q.shape[2]
    )
    is_causal = band[1] is not None
    if not gpu.on_rocm():
        missing_rows = -lse.shape[-1] % _LSE_BLOCK
        lse = torch.nn.functional.pad(lse, (0, missing_rows), value=torch.inf)
    unused_seed = torch.zeros((), dtype=torch.int64, device=q.device)  # only read with dropout
    with gpu.deterministic_algorithms(deterministic):
        dq, dk, dv, _ = _aten_backward(
            dout_padded,
            q_padded,
            k_padded,
            v_padded,
            None,  # attn_bias
            out_padded,
            lse.contiguous(),
            unused_seed,
            unused_seed,  # the offset
            0.0,  # dropout_p
            [True, True, True, False],  # gradients of q, k and v, not of attn_bias
            is_causal,
            scale=scale,
        )
    dq = gpu.unpad(dq.transpose(1, 2), q)
    dk = gpu.unpad(dk.transpose(1, 2), q)
    dv = gpu.unpad(dv.transpose(1, 2), q)
    return dq, fold_heads(dk, k), fold_heads(dv, v)


def _operands(*tensors: Tensor, heads: int) -> list[Tensor]:
    """[B, S, Hkv or H, D] -> [B, heads, S, D], padded."""
    return [repeat_heads(x, heads).transpose(1, 2) for x in gpu.pad(*tensors)]
