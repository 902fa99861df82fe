"""PyTorch's memory-efficient attention (CUTLASS on NVIDIA, AOTriton on ROCm): also fp32, and GPUs before Ampere.

LauncherInfo that shape the calls (schemas of torch 2.8 to 2.13): causal is aligned top-left (CausalFromTopLeft); no grouped heads, so
keys and values are repeated and their gradients added up in fp32; head sizes are padded to multiples of 8.  On NVIDIA lse comes
in rows of a multiple of 32 (the backward's block), filled with +inf, so that exp(s - lse) of rows that do not exist is zero:
the backward is given the same.  `out` and `dout` are read with the strides of contiguous [B, S, H, D] tensors.
The backward splits keys, and adds them up in any order, unless deterministic algorithms are switched on.

Untested on hardware when written; the calls are checked against the operators' schemas.
"""

import torch

from . import gpu
from .heads import fold_heads, repeat_heads
from .protocol import Band, KernelRequest

causal = "top-left"
_fwd = torch.ops.aten._scaled_dot_product_efficient_attention.default
_bwd = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_LSE_ROWS = 32


def unsupported_reason(need: KernelRequest) -> str | None:
    bf16 = need.dtype == torch.bfloat16
    if reason := gpu.unsupported_reason(
        need,
        nvidia=(8, 0) if bf16 else (5, 0),
        rocm=True,
        dtypes=(*gpu.HALF, torch.float32),
        head_dim=512,
    ):
        return reason
    if need.deterministic and need.grad and gpu.on_rocm():
        return "its backward on ROCm does not promise to be deterministic"
    return None


def fwd(q, k, v, *, band: Band, scale: float):
    out, lse, *_ = _fwd(
        *_operands(q, k, v, heads=q.shape[2]), None, True, 0.0, band[1] is not None, scale=scale
    )
    return gpu.unpad(out.transpose(1, 2), q), lse.narrow(2, 0, q.shape[1])


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = False):
    dout_, q_, k_, v_, out_ = _operands(dout, q, k, v, out, heads=q.shape[2])
    if not gpu.on_rocm():
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _LSE_ROWS), value=torch.inf)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # only read with dropout
    wanted = [True, True, True, False]
    with gpu.deterministic_algorithms(deterministic):
        dq, dk, dv, _ = _bwd(
            dout_,
            q_,
            k_,
            v_,
            None,
            out_,
            lse.contiguous(),
            seed,
            seed,
            0.0,
            wanted,
            band[1] is not None,
            scale=scale,
        )
    dq, dk, dv = (gpu.unpad(g.transpose(1, 2), q) for g in (dq, dk, dv))
    return dq, fold_heads(dk, k), fold_heads(dv, v)


def _operands(*xs, heads: int):
    return [repeat_heads(x, heads).transpose(1, 2) for x in gpu.pad(*xs)]
