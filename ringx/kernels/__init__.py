"""Local attention kernels: one file each, one protocol, and the choice among them.

A kernel computes attention of q against k, v on one device, with the log-sum-exp, and its gradient given the global
output and log-sum-exp.  Nothing falls back silently: a kernel that cannot do what is asked says why.
"""

import importlib
from typing import Literal, NamedTuple, Protocol

import torch

from ..checks import require_name
from ..tiles import Tile

Band = tuple[int | None, int | None]


class KernelRequest(NamedTuple):
    """What a call asks of a kernel."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    heads: int = 1
    kv_heads: int = 1
    grad: bool = True
    deterministic: bool = False


class Kernel(Protocol):
    """What each module of this package offers.  q, dout, out [B, Sq, H, D], k and v [B, Sk, Hkv, D], none of them empty;
    lse [B, H, Sq] in fp32 (fp64 for fp64), natural logarithm.

    `band` = (lo, hi): key row j is visible to query row i iff lo <= j - i <= hi (None: unbounded).  `causal` names the
    bands that a kernel can do; `cut` brings every tile to that form:

        "any"           every band
        "top-left"      (None, None), and (None, 0) with Sk <= Sq
        "bottom-right"  (None, None), and (None, Sk - Sq) with Sk >= Sq
        "square"        (None, None), and (None, 0) with Sk == Sq

    bwd takes `lse` and `out` of the whole row (all keys, all ranks).  `out` only forms delta = rowsum(dout * out).  (The
    design study passed delta; every fused kernel there is wants `out`, so this interface passes that, and ``merge.absorb_dlse``
    makes an `out` for any delta.)
    """

    causal: Literal["any", "top-left", "bottom-right", "square"]

    def unsupported_reason(self, need: KernelRequest) -> str | None:
        """Why this kernel cannot do it here, in a few words; None if it can."""

    def fwd(self, q, k, v, *, band: Band, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """-> out like q, lse."""

    def bwd(
        self, dout, q, k, v, out, lse, *, band: Band, scale: float, deterministic: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> dq, dk, dv, like q, k, v."""


KERNELS = {
    "flash4": "FlashAttention-4 (package flash-attn-4; NVIDIA Hopper and Blackwell)",
    "flash3": "FlashAttention-3 (package flash_attn_interface; NVIDIA Hopper)",
    "flash2": "FlashAttention-2 (package flash-attn; CUDA and ROCm)",
    "aiter": "AMD's AI tensor engine (package amd-aiter; ROCm)",
    "sdpa_flash": "PyTorch's own flash attention (CUDA and ROCm)",
    "sdpa_cudnn": "cuDNN attention through PyTorch (NVIDIA)",
    "sdpa_efficient": "PyTorch's memory-efficient attention (CUDA and ROCm; also fp32)",
    "cpu": "PyTorch's flash attention for CPUs",
    "flex": "PyTorch's flex_attention (CUDA and ROCm; forward only on CPU)",
    "reference": "plain einsum on any device; holds the score matrix",
}  # in the order in which "auto" prefers them


def load(name: str) -> Kernel:
    """The kernel of that name (its file is imported now, optional packages by its ``unsupported_reason``)."""
    return importlib.import_module(f"{__name__}.{require_name(name, KERNELS, 'kernel')}")  # type: ignore[return-value]


def unsupported_reason(name: str, need: KernelRequest) -> str | None:
    """Why kernel `name` cannot serve `need` here; None if it can."""
    return load(name).unsupported_reason(need)


def choose(name: str, need: KernelRequest) -> str:
    """`name` itself if it can serve `need`; for "auto" the first of KERNELS that can (``reference`` only where nothing
    faster exists for that device and dtype).  Raises NotImplementedError with the reasons otherwise."""
    if name != "auto":
        require_name(name, [*KERNELS, "auto"], "kernel")
        if reason := unsupported_reason(name, need):
            raise NotImplementedError(
                f"kernel={name!r} cannot do this: {reason}. `ringx info` lists what can run here."
            )
        return name
    reasons = {}
    for candidate in KERNELS:
        reason = unsupported_reason(candidate, need)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    raise NotImplementedError(
        f"kernel='auto': no kernel does {need.dtype} with head size {need.head_dim} on {need.device.type}: "
        + "; ".join(f"{k}: {v}" for k, v in reasons.items())
    )


def cut(tile: Tile, causal: str) -> list[Tile]:
    """The tile in pieces whose bands a kernel of this `causal` kind can do: rectangles and triangles.

    Rows that see no key are left out.  A "top-left" kernel gets the keys that all rows see as a rectangle and one
    triangle; a "bottom-right" kernel one band, and a rectangle for rows that see every key."""
    if causal == "any" or (tile.lo is None and tile.hi is None):
        return [tile]
    if tile.lo is not None or tile.hi is None:
        raise NotImplementedError(
            "this kernel cannot bound the distance to earlier keys; use kernel='reference'."
        )
    q0, k0 = tile.q.start, tile.k.start
    skip = max(0, -tile.hi)  # rows before see nothing
    h = tile.hi + skip  # the first row left sees keys 0..h
    m = tile.q.stop - q0 - skip
    n = min(tile.k.stop - k0, m + h)  # no row sees keys from n on
    q0 += skip
    if n <= h + 1:
        return [Tile(slice(q0, q0 + m), slice(k0, k0 + n))]
    full = n - h  # rows from here see all n keys
    bottom = [Tile(slice(q0 + full, q0 + m), slice(k0, k0 + n))] if full < m else []
    if causal == "bottom-right":
        return [Tile(slice(q0, q0 + full), slice(k0, k0 + n), None, h), *bottom]
    left = [Tile(slice(q0, q0 + m), slice(k0, k0 + h))] if h else []
    if causal == "top-left":
        return [*left, Tile(slice(q0, q0 + m), slice(k0 + h, k0 + n), None, 0)]
    below = [Tile(slice(q0 + full, q0 + m), slice(k0 + h, k0 + n))] if full < m else []
    return [*left, Tile(slice(q0, q0 + full), slice(k0 + h, k0 + n), None, 0), *below]
