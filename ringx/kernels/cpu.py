"""aten's flash attention for CPUs: fp64, fp32, bf16, fp16; any head size.

LauncherInfo that shape the calls: causal is aligned top-left; empty operands kill the process (tiles are never empty); the last dimension
must have stride 1 (otherwise NaN); bwd wants lse contiguous and dout and out in q's dtype; before torch 2.9 grouped heads are
read out of bounds, so they are repeated there.
"""

import torch

from ..merge import acc_dtype
from .heads import fold_heads, repeat_heads
from .protocol import Band, KernelRequest

causal = "top-left"
_HAS_GQA = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 9)
_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported_reason(need: KernelRequest) -> str | None:
    return (
        None
        if need.device.type == "cpu"
        else f"it runs on cpu tensors, these are on {need.device.type}"
    )


def fwd(q, k, v, *, band: Band, scale: float):
    k, v = _grouped(k, q), _grouped(v, q)
    out, lse = _fwd(*(_bhsd(x) for x in (q, k, v)), 0.0, band[1] is not None, scale=scale)
    return out.transpose(1, 2), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = True):
    lse = lse.to(acc_dtype(q.dtype)).contiguous()
    operands = (_bhsd(x) for x in (dout, q, _grouped(k, q), _grouped(v, q), out))
    dq, dk, dv = (
        g.transpose(1, 2) for g in _bwd(*operands, lse, 0.0, band[1] is not None, scale=scale)
    )
    return dq, fold_heads(dk, k), fold_heads(dv, v)


def _grouped(x, q):
    return x if _HAS_GQA else repeat_heads(x, q.shape[2])


def _bhsd(x):
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
