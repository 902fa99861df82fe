"""aten's flash attention for CPUs: fp64, fp32, bf16, fp16; any head size; GQA without copies.

Facts that shape the calls (torch 2.13): causal is aligned top-left; empty operands kill the process (tiles are never empty);
the last dimension must have stride 1 (otherwise NaN); bwd wants lse contiguous and dout and out in q's dtype.
"""

import torch

from ..merge import acc_dtype
from . import Band, Need

causal = "top-left"
_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refuses(need: Need) -> str | None:
    return None if need.device.type == "cpu" else f"it runs on cpu tensors, these are on {need.device.type}"


def fwd(q, k, v, *, band: Band, scale: float):
    out, lse = _fwd(*(_bhsd(x) for x in (q, k, v)), 0.0, band[1] is not None, scale=scale)
    return out.transpose(1, 2), lse


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = True):
    lse = lse.to(acc_dtype(q.dtype)).contiguous()
    grads = _bwd(*(_bhsd(x) for x in (dout, q, k, v, out)), lse, 0.0, band[1] is not None, scale=scale)
    return tuple(g.transpose(1, 2) for g in grads)


def _bhsd(x):
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
