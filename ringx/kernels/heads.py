"""Grouped heads for kernels without them: query head h uses key/value head h // (H / Hkv)."""

import torch

from ..merge import acc_dtype


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, S, Hkv, D] -> [B, S, heads, D]."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def fold_heads(dx: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The adjoint of repeat_heads; added up in fp32 (fp64 for fp64)."""
    if dx.shape[2] == like.shape[2]:
        return dx.to(like.dtype)
    return dx.unflatten(2, (like.shape[2], -1)).sum(3, dtype=acc_dtype(dx.dtype)).to(like.dtype)
