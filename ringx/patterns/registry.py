"""The algorithms that ``attention(algorithm=...)`` takes.

An algorithm is one row of ALGORITHMS: a pattern (one file of this folder) under a name, with the
layout that it is at its best with.  Everything else in ringx that must know the algorithms iterates
over this table.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from ..checks import require_name
from ..layout import LAYOUTS
from ..plan import Plan
from . import broadcast_kv, broadcast_q, gather_kv, ring
from .sizes import Messages, PerDirection, Sizes


class Pattern(Protocol):
    """What the file of a pattern holds."""

    __name__: str

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out like q (any float dtype), lse [B, H, S_local], of this rank's queries over the keys
        of all ranks."""

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        plan: Plan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, dk, dv of this rank's tokens, from the gradients of all ranks."""

    def bytes_sent(self, s: Sizes) -> PerDirection:
        """Bytes that a rank sends in closed form, mean over ranks where they differ."""

    def messages(self, s: Sizes) -> Messages:
        """How many collectives of each kind a rank takes part in, in closed form."""

    def received_bytes(self, s: Sizes, overlap: bool) -> PerDirection:
        """Most bytes of the buffers, at once, that a rank receives other ranks' blocks into."""


@dataclass(frozen=True)
class Algorithm:
    """One named algorithm: a communication pattern with the layout it is at its best with."""

    name: str
    pattern: str  # the file in ringx/patterns
    paper: str
    recommended_layout: str
    memory: str  # remote blocks held at once, a rank
    doc: str

    @property
    def module(self) -> Pattern:
        """The file of the pattern."""
        return PATTERNS[self.pattern]

    def bytes(
        self,
        B: int,
        S: int,
        H: int,
        Hkv: int,
        D: int,
        N: int,
        itemsize: int,
        causal: bool,
        layout: str | None = None,
    ) -> tuple[float, float]:
        """(forward, backward): bytes that a rank sends in closed form, mean over ranks where they
        differ, as defined in ``ringx.comm.collectives``.

        S is the global length, in equal shards (S a multiple of N, of 2N for zigzag; for other
        lengths count with ``ringx.comm.traffic``); `itemsize` is in bytes; `layout` defaults to the
        recommended one."""
        s = Sizes(B, S, H, Hkv, D, N, itemsize, bool(causal), self._layout(layout))
        s.check("bytes")
        return self.module.bytes_sent(s)

    def messages(
        self,
        B: int,
        S: int,
        H: int,
        Hkv: int,
        D: int,
        N: int,
        itemsize: int,
        causal: bool,
        layout: str | None = None,
    ) -> Messages:
        """({collective: count} of the forward, of the backward) that a rank takes part in;
        arguments as of ``bytes``."""
        s = Sizes(B, S, H, Hkv, D, N, itemsize, bool(causal), self._layout(layout))
        s.check("messages")
        return self.module.messages(s)

    def received_bytes(
        self,
        B: int,
        S: int,
        H: int,
        Hkv: int,
        D: int,
        N: int,
        itemsize: int,
        causal: bool,
        layout: str | None = None,
        overlap: bool = True,
    ) -> PerDirection:
        """(forward, backward): most bytes of the buffers, at once, that a rank receives other
        ranks' blocks into; arguments as of ``bytes`` and of ``ringx.attention``."""
        s = Sizes(B, S, H, Hkv, D, N, itemsize, bool(causal), self._layout(layout))
        s.check("received_bytes")
        return self.module.received_bytes(s, overlap)

    def _layout(self, layout: str | None) -> str:
        if layout is None:
            return self.recommended_layout
        return require_name(layout, LAYOUTS, "layout")


_FILES = (broadcast_kv, broadcast_q, gather_kv, ring)
PATTERNS: dict[str, Pattern] = {file.__name__.rpartition(".")[2]: file for file in _FILES}

_RINGX = "Yin et al., RingX, SC25"
_ROWS = (
    Algorithm(
        name="ringx1",
        pattern="broadcast_q",
        paper=f"{_RINGX}: X1",
        recommended_layout="contiguous",
        memory="2 blocks of q",
        doc="Queries are broadcast, partial outputs reduced to their owner; made for "
        "bidirectional attention.",
    ),
    Algorithm(
        name="ringx2",
        pattern="broadcast_q",
        paper=f"{_RINGX}: X2",
        recommended_layout="zigzag",
        memory="2 blocks of q",
        doc="ringx1's pattern for causal attention: each rank computes only the tiles that "
        "the mask leaves.",
    ),
    Algorithm(
        name="ringx3",
        pattern="gather_kv",
        paper=f"{_RINGX}: X3",
        recommended_layout="zigzag",
        memory="N blocks of kv, twice",
        doc="One all-gather of keys and values, one all-to-all of their gradients: fewest "
        "messages and kernel calls.",
    ),
    Algorithm(
        name="ringx4",
        pattern="broadcast_kv",
        paper=f"{_RINGX}: X4",
        recommended_layout="zigzag",
        memory="2 blocks of kv",
        doc="Keys and values are broadcast one owner at a time, gradients reduced to it: "
        "constant memory.",
    ),
    Algorithm(
        name="ring",
        pattern="ring",
        paper="Liu et al., Ring Attention, arXiv 2310.01889",
        recommended_layout="zigzag",
        memory="2 blocks of kv",
        doc="Keys and values travel from neighbour to neighbour, their gradients after them: "
        "constant memory.",
    ),
)
ALGORITHMS = {algorithm.name: algorithm for algorithm in _ROWS}


def algorithms() -> dict[str, Algorithm]:
    """Every algorithm that ``attention(algorithm=...)`` takes, by name."""
    return dict(ALGORITHMS)


def pattern(name: str) -> Pattern:
    """The file of algorithm `name`'s pattern."""
    return ALGORITHMS[name].module
