"""What is asked of a local attention kernel, and what each kernel's module offers."""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Band = tuple[int | None, int | None]
"""(lo, hi): key row j is visible to query row i iff lo <= j - i <= hi.  None is unbounded."""

CausalAlignment = Literal["any", "top-left", "bottom-right", "square"]
"""Which bands a kernel can compute, besides (None, None).

    "any"           every band
    "top-left"      (None, 0) with Sk <= Sq
    "bottom-right"  (None, Sk - Sq) with Sk >= Sq
    "square"        (None, 0) with Sk == Sq
"""


class KernelRequest(NamedTuple):
    """What one call of attention asks of a kernel."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    heads: int = 1
    kv_heads: int = 1
    grad: bool = True  # whether the backward is needed
    deterministic: bool = False


class Kernel(Protocol):
    """What each kernel's module offers.

    q, dout and out are [B, Sq, H, D], k and v [B, Sk, Hkv, D], none of them empty.  lse is
    [B, H, Sq] in fp32 (fp64 for fp64 inputs), in natural logarithms.  ``cut`` brings every tile to
    bands of the module's `causal_alignment`.
    """

    causal_alignment: CausalAlignment

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """Why this kernel cannot serve the request here, in a few words; None if it can."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out, like q, and lse, of these keys alone."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        band: Band,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of these keys, like q, k and v.

        `lse` and `out` are those of the whole row: of all keys of all ranks.  `out` serves only to
        form delta = rowsum(dout * out), as the fused kernels do; where delta is another number,
        ``merge.absorb_dlse`` makes the `dout` and `out` that lead to it.
        """
