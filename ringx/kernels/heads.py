"""Grouped heads for kernels without them: query head h uses key/value head h // (H / Hkv)."""

from torch import Tensor

from ..merge import acc_dtype


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, Hkv, D] -> [B, S, heads, D]."""
    kv_heads = x.shape[2]
    if kv_heads == heads:
        return x
    return x.repeat_interleave(heads // kv_heads, dim=2)


def fold_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """The adjoint of ``repeat_heads``: [B, S, H, D] -> like `like`, [B, S, Hkv, D].

    The gradients of each group of heads are added in fp32 (fp64 for fp64).
    """
    kv_heads = like.shape[2]
    if gradient.shape[2] == kv_heads:
        return gradient.to(like.dtype)
    grouped = gradient.unflatten(2, (kv_heads, -1))
    return grouped.sum(3, dtype=acc_dtype(gradient.dtype)).to(like.dtype)
