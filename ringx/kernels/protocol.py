"""What a local attention kernel is asked, and what each module of this package offers."""

from typing import Literal, NamedTuple, Protocol

import torch

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
