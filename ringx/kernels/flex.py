"""PyTorch's flex_attention: any band; compiled by Triton on CUDA and ROCm, forward only on CPU.

flex_attention offers no backward with a given lse, so each tile's forward is done again under
autograd and differentiated through both of its results.  With this tile's (out_i, lse_i), the
global (out, lse) and delta = rowsum(dout * out):

    w = exp(lse_i - lse)        out = sum_i w_i out_i,    lse = log sum_i exp lse_i
    dout_i = w dout             dlse_i = w (rowsum(dout * out_i) - delta)

Facts that shape the calls (torch 2.8 to 2.13):

- The decoding kernel for few queries has limits of its own on heads and head sizes, so it is
  switched off.
- On CPU, where it is not fused, 16-bit scores are rounded, so fp32 is computed there.
- `return_lse` became `return_aux`.

The GPU side is untested on hardware when written; the algebra is tested with a differentiable
stand-in.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..merge import rows
from . import gpu
from .protocol import Band, CausalAlignment, KernelRequest

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

causal_alignment: CausalAlignment = "any"
_BLOCK = 128  # rows and keys of a block of the mask


def unsupported_reason(request: KernelRequest) -> str | None:
    if request.device.type == "cpu":
        if request.grad:
            return "on cpu it has no backward; it is for inference only there"
        return None
    if request.head_dim < 16:
        return f"its head size is at least 16, not {request.head_dim}"
    dtypes = (*gpu.HALF_PRECISION, torch.float32)
    if reason := gpu.unsupported_reason(request, nvidia=(8, 0), rocm=True, dtypes=dtypes):
        return reason
    try:
        import triton  # noqa: F401
    except ImportError:
        return "it needs Triton, which is not installed"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    device = q.device
    dtype = q.dtype
    if device.type == "cpu" and dtype in gpu.HALF_PRECISION:
        dtype = torch.float32
    operands = [x.transpose(1, 2).to(dtype) for x in (q, k, v)]
    if not torch.is_grad_enabled():  # on CPU it refuses inputs that require_grad even then
        operands = [x.detach() for x in operands]
    block_mask = None
    if band != (None, None):
        block_mask = _block_mask(q.shape[1], k.shape[1], band, device)
    flex_attention, lse_option = _flex_attention(device.type)
    out, lse = flex_attention(
        *operands,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        **lse_option,
    )
    return out.transpose(1, 2).to(q.dtype), getattr(lse, "lse", lse)


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
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        tile_out, tile_lse = forward(*leaves, band=band, scale=scale)
    with torch.no_grad():
        # Rows without keys in this tile: -inf - -inf may be nan.
        weight = (tile_lse - lse).exp().masked_fill(tile_lse == -torch.inf, 0.0)
        dout = dout.to(lse.dtype)
        tile_dout = rows(weight) * dout
        delta_difference = (dout * tile_out).sum(-1) - (dout * out).sum(-1)
        tile_dlse = weight * delta_difference.transpose(1, 2)
    dq, dk, dv = torch.autograd.grad(
        (tile_out, tile_lse), leaves, (tile_dout.to(q.dtype), tile_dlse)
    )
    return dq, dk, dv


@functools.lru_cache(maxsize=2)
def _flex_attention(device_type: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function, compiled for GPUs, and the keyword argument with which it returns lse."""
    from torch.nn.attention import flex_attention as flex

    function: Callable[..., Any] = flex.flex_attention
    if "return_aux" in inspect.signature(function).parameters:
        lse_option: dict[str, Any] = {"return_aux": flex.AuxRequest(lse=True)}
    else:
        lse_option = {"return_lse": True}
    if device_type != "cpu":
        function = torch.compile(function)
    return function, lse_option


@functools.lru_cache(maxsize=64)  # a training step needs the same few masks again and again
def _block_mask(row_count: int, key_count: int, band: Band, device: torch.device) -> "BlockMask":
    """The band as blocks of which all, some or no pairs are visible.

    The blocks follow from the offsets j - i at their corners; ``create_block_mask`` would go
    through all row_count x key_count pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    lo = -row_count if band[0] is None else band[0]
    hi = key_count if band[1] is None else band[1]
    first_row = torch.arange(0, row_count, _BLOCK)
    first_key = torch.arange(0, key_count, _BLOCK)
    last_row = (first_row + _BLOCK - 1).clamp(max=row_count - 1)
    last_key = (first_key + _BLOCK - 1).clamp(max=key_count - 1)
    smallest_offset = first_key - last_row[:, None]
    largest_offset = last_key - first_row[:, None]
    visible_in_part = (largest_offset >= lo) & (smallest_offset <= hi)
    visible_in_full = (smallest_offset >= lo) & (largest_offset <= hi)
    # A tensor, so that another band needs no other compiled kernel.
    bounds = torch.tensor([lo, hi], device=device)

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key - row >= bounds[0]) & (key - row <= bounds[1])

    partial_count, partial_order = _count_and_order(visible_in_part & ~visible_in_full, device)
    full_count, full_order = _count_and_order(visible_in_full, device)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_order,
        full_count,
        full_order,
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(row_count, key_count),
    )


def _count_and_order(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row of blocks: how many are set, and the block numbers, those that are set first."""
    count = blocks.sum(-1).to(torch.int32)
    order = blocks.to(torch.int32).argsort(stable=True, dim=-1, descending=True).to(torch.int32)
    return count[None, None].to(device), order[None, None].to(device)
