"""The sizes of a problem, for closed forms of bytes, messages and memory."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple


class PerDirection(NamedTuple):
    """A number of bytes for the forward and for the backward of one rank."""

    forward: float
    backward: float


class Messages(NamedTuple):
    """{collective: how many of them a rank takes part in}, forward and backward."""

    forward: Counter
    backward: Counter


@dataclass(frozen=True)
class Sizes:
    """A problem on N equal shards.  S is global; `itemsize` in bytes."""

    B: int
    S: int
    H: int
    Hkv: int
    D: int
    N: int
    itemsize: int
    causal: bool
    layout: str

    def check(self, caller: str) -> None:
        """ValueError, with the name of what was called, for sizes that are no positive integers or
        give no equal shards."""
        for name in ("B", "S", "H", "Hkv", "D", "N", "itemsize"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{caller}: {name}={value!r} must be a positive integer.")
        parts = 2 * self.N if self.layout == "zigzag" and self.N > 1 else self.N
        if self.S % parts:
            raise ValueError(
                f"{caller}: S={self.S} does not give {self.N} equal {self.layout} shards; "
                "count uneven ones with ringx.comm.traffic()."
            )

    @property
    def acc(self) -> int:
        """Bytes of an accumulated element: fp32, or fp64 for fp64."""
        return max(4, self.itemsize)

    @property
    def q_row(self) -> int:
        """Bytes of one token's queries."""
        return self.B * self.H * self.D * self.itemsize

    @property
    def kv_elements(self) -> int:
        """Elements of one token's keys and values."""
        return 2 * self.B * self.Hkv * self.D

    @property
    def block(self) -> float:
        """Tokens of one rank."""
        return self.S / self.N

    @property
    def q_block(self) -> float:
        """Bytes of one rank's queries."""
        return self.block * self.q_row

    @property
    def kv_block(self) -> float:
        """Bytes of one rank's keys and values."""
        return self.block * self.kv_elements * self.itemsize

    @property
    def kept_at_home(self) -> float:
        """Tokens at one end of a causal sequence that no other rank needs: no other rank's queries
        see them, or their queries see no other rank's keys."""
        if not self.causal:
            return 0
        return {"contiguous": self.block, "zigzag": self.block / 2, "striped": 1}[self.layout]

    @property
    def needed_elsewhere(self) -> float:
        """Tokens of all ranks that some other rank needs."""
        return 0 if self.N == 1 else self.S - self.kept_at_home

    @property
    def owners(self) -> int:
        """Ranks that hold a token that some other rank needs."""
        if self.N == 1:
            return 0
        return self.N - 1 if self.kept_at_home >= self.block else self.N

    @property
    def remote_keys_seen(self) -> float:
        """Tokens of other ranks' keys that a rank sees, mean over ranks."""
        other_ranks = self.N - 1
        if not self.causal:
            return other_ranks * self.block
        seen_of_a_block = {
            "contiguous": self.block / 2,
            "zigzag": self.block * 3 / 4,
            "striped": self.block - 0.5,
        }
        return other_ranks * seen_of_a_block[self.layout]
