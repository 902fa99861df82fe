"""PyTorch's flex_attention: any band; compiled by Triton on CUDA and ROCm, forward only (and unfused) on CPU.

flex_attention offers no backward with a given lse, so each tile's forward is done again under autograd and differentiated
through both of its results.  With this tile's (out_i, lse_i), the global (out, lse) and delta = rowsum(dout * out):

    w = exp(lse_i - lse)        out = sum_i w_i out_i,    lse = log sum_i exp lse_i
    dout_i = w dout             dlse_i = w (rowsum(dout * out_i) - delta)

LauncherInfo that shape the calls (torch 2.8 to 2.13): the decoding kernel for few queries has limits of its own on heads and head
sizes, so it is switched off; on CPU 16-bit scores are rounded, so fp32 is computed there; `return_lse` became `return_aux`.

The GPU side is untested on hardware when written; the algebra is tested with a differentiable stand-in.
"""

import functools
import inspect

import torch

from ..merge import rows
from . import gpu
from .protocol import Band, KernelRequest

causal = "any"
_BLOCK = 128


def unsupported_reason(need: KernelRequest) -> str | None:
    if need.device.type == "cpu":
        return "on cpu it has no backward; it is for inference only there" if need.grad else None
    if need.head_dim < 16:
        return f"its head size is at least 16, not {need.head_dim}"
    if reason := gpu.unsupported_reason(
        need, nvidia=(8, 0), rocm=True, dtypes=(*gpu.HALF, torch.float32)
    ):
        return reason
    try:
        import triton  # noqa: F401
    except ImportError:
        return "it needs Triton, which is not installed"
    return None


def fwd(q, k, v, *, band: Band, scale: float):
    dtype = q.dtype
    if q.device.type == "cpu" and q.dtype in gpu.HALF:
        dtype = torch.float32
    if not torch.is_grad_enabled():  # on CPU it refuses whatever requires_grad even then
        q, k, v = q.detach(), k.detach(), v.detach()
    q_, k_, v_ = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    mask = None if band == (None, None) else _mask(q.shape[1], k.shape[1], band, q.device)
    attend, asks = _flex(q.device.type)
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    out, lse = attend(
        q_, k_, v_, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options, **asks
    )
    return out.transpose(1, 2).to(q.dtype), getattr(lse, "lse", lse)


def bwd(dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool = True):
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out_i, lse_i = fwd(*leaves, band=band, scale=scale)
    with torch.no_grad():
        w = (
            (lse_i - lse).exp().masked_fill(lse_i == -torch.inf, 0.0)
        )  # rows without keys here: -inf - -inf is nan
        wide = dout.to(lse.dtype)
        dout_i = rows(w) * wide
        dlse_i = w * ((wide * out_i).sum(-1) - (wide * out).sum(-1)).transpose(1, 2)
    return torch.autograd.grad((out_i, lse_i), leaves, (dout_i.to(q.dtype), dlse_i))


@functools.lru_cache(maxsize=2)
def _flex(device: str):
    """The function, compiled for GPUs, and how it is asked for lse."""
    from torch.nn.attention import flex_attention as flex

    if "return_aux" in inspect.signature(flex.flex_attention).parameters:
        asks: dict = {"return_aux": flex.AuxRequest(lse=True)}
    else:
        asks = {"return_lse": True}
    return (flex.flex_attention if device == "cpu" else torch.compile(flex.flex_attention)), asks


@functools.lru_cache(maxsize=64)  # a training step asks for the same few masks again and again
def _mask(m: int, n: int, band: Band, device: torch.device):
    """The band's blocks by arithmetic on their corners: ``create_block_mask`` would go through all m x n pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    lo, hi = (-m if band[0] is None else band[0]), (n if band[1] is None else band[1])
    first_row, first_key = torch.arange(0, m, _BLOCK), torch.arange(0, n, _BLOCK)
    last_row, last_key = (
        (first_row + _BLOCK - 1).clamp(max=m - 1),
        (first_key + _BLOCK - 1).clamp(max=n - 1),
    )
    least, most = (
        first_key - last_row[:, None],
        last_key - first_row[:, None],
    )  # of j - i in each block
    some = (most >= lo) & (least <= hi)
    full = (least >= lo) & (most <= hi)
    bounds = torch.tensor(
        [lo, hi], device=device
    )  # as a tensor, so that other bands need no other compiled kernel

    def visible(b, h, i, j):
        return (j - i >= bounds[0]) & (j - i <= bounds[1])

    count, order = _ordered(some & ~full, device)
    full_count, full_order = _ordered(full, device)
    return BlockMask.from_kv_blocks(
        count,
        order,
        full_count,
        full_order,
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(m, n),
    )


def _ordered(blocks: torch.Tensor, device: torch.device):
    """How many blocks of each row of blocks, and which (those first)."""
    count, order = (
        blocks.sum(-1),
        blocks.to(torch.int32).argsort(stable=True, dim=-1, descending=True),
    )
    return count.to(torch.int32)[None, None].to(device), order.to(torch.int32)[None, None].to(
        device
    )
