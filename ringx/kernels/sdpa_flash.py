"""PyTorch's own flash attention, with its lse (FlashAttention-2 on NVIDIA, AOTriton on ROCm).

Facts that shape the calls (schemas of torch 2.8 to 2.13):

- [B, H, S, D] views of [B, S, H, D] tensors are taken as they are.
- Grouped heads are supported both ways; head sizes must be multiples of 8.
- lse [B, H, S] is read as a bare pointer, hence contiguous.
- Causal is aligned bottom-right on NVIDIA and refused by ROCm's backward unless Sq == Sk, hence
  "square".
- The seeds are only read with dropout.
- ROCm's backward ignores the deterministic switch.

Untested on hardware when written; the calls are checked against the operators' schemas.
"""

import torch
from torch import Tensor

from . import gpu
from .protocol import Band, CausalAlignment, KernelRequest

causal_alignment: CausalAlignment = "square"
_aten_forward = torch.ops.aten._scaled_dot_product_flash_attention.default
_aten_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # compute capabilities


def unsupported_reason(request: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(request, nvidia=(8, 0), rocm=True):
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has no flash attention"
    if not request.grad:
        return None
    if request.deterministic and gpu.on_rocm():
        return "its backward on ROCm does not promise to be deterministic"
    if 192 < request.head_dim <= 224 and gpu.capability(request.device) in _SMALL_SHARED_MEMORY:
        return f"its backward on this GPU has no head size of {request.head_dim}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    operands = [x.transpose(1, 2) for x in gpu.pad(q, k, v)]
    is_causal = band[1] is not None
    out, lse, *_ = _aten_forward(
        *operands,
        0.0,  # dropout_p
        is_causal,
        False,  # return_debug_mask
        scale=scale,
    )
    return gpu.unpad(out.transpose(1, 2), q), lse


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
    operands = [x.transpose(1, 2) for x in gpu.pad(dout, q, k, v, out)]
    is_causal = band[1] is not None
    seed, offset = unused_seeds(q.device)
    with gpu.deterministic_algorithms(deterministic):
        gradients = _aten_backward(
            *operands,
            lse.contiguous(),
            None,  # cum_seq_q
            None,  # cum_seq_k
            q.shape[1],  # max_q
            k.shape[1],  # max_k
            0.0,  # dropout_p
            is_causal,
            seed,
            offset,
            scale=scale,
        )
    dq, dk, dv = (gpu.unpad(gradient.transpose(1, 2), q) for gradient in gradients)
    return dq, dk, dv


def unused_seeds(device: torch.device) -> tuple[Tensor, Tensor]:
    """The random seed and offset of dropout, in the form that the forward returns.

    They are not read without dropout, but they must be tensors.
    """
    if gpu.on_rocm():
        seed = torch.zeros((), dtype=torch.int64, device=device)
        return seed, torch.zeros((), dtype=torch.int64, device=device)
    seed = torch.zeros(2, dtype=torch.uint64, device=device)
    return seed, torch.zeros((), dtype=torch.uint64, device=device)
