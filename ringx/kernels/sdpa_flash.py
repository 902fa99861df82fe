"""PyTorch's own flash attention (FlashAttention-2 on NVIDIA, AOTriton on ROCm) with its log-sum-exp.

LauncherInfo that shape the calls (schemas of torch 2.8 to 2.13): [B, H, S, D] views of [B, S, H, D] tensors are taken as they are;
grouped heads are supported both ways; head sizes must be multiples of 8; lse [B, H, S] is read as a bare pointer, hence
contiguous; causal is aligned bottom-right on NVIDIA and refused by ROCm's backward unless Sq == Sk, hence "square".  The
seeds are only read with dropout.  ROCm's backward ignores the deterministic switch.

Untested on hardware when written; the calls are checked against the operators' schemas.
"""

import torch

from . import gpu
from .protocol import Band, KernelRequest

causal = "square"
_fwd = torch.ops.aten._scaled_dot_product_flash_attention.default
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


def unsupported_reason(need: KernelRequest) -> str | None:
    if reason := gpu.unsupported_reason(need, nvidia=(8, 0), rocm=True):
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has no flash attention"
    if need.deterministic and need.grad and gpu.on_rocm():
        return "its backward on ROCm does not promise to be deterministic"
    if (
        need.grad
        and 192 < need.head_dim <= 224
        and gpu.capability(need.device) in _SMALL_SHARED_MEMORY
    ):
        return f"its backward on this GPU has no head size of {need.head_dim}"
    return None


def fwd(q, k, v, *, band: Band, scale: float):
    out, lse, *_ = _fwd(
        *(x.transpose(1, 2) for x in gpu.pad(q, k, v)), 0.0, band[1] is not None, False, scale=scale
    )
    return gpu.unpad(out.transpose(1, 2), q), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = False):
    operands = [x.transpose(1, 2) for x in gpu.pad(dout, q, k, v, out)]
    seed, offset = seeds(q.device)
    with gpu.deterministic_algorithms(deterministic):
        grads = _bwd(
            *operands,
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            band[1] is not None,
            seed,
            offset,
            scale=scale,
        )
    return tuple(gpu.unpad(g.transpose(1, 2), q) for g in grads)


def seeds(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors in the form of what the forward would have returned: not used without dropout, but they must be tensors."""
    if gpu.on_rocm():
        return torch.zeros((), dtype=torch.int64, device=device), torch.zeros(
            (), dtype=torch.int64, device=device
        )
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros(
        (), dtype=torch.uint64, device=device
    )
