"""ALGORITHMS: which names exist and what each stands for.  Data; the communication itself is in algo/."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from ..checks import require_name
from ..layout import LAYOUTS


@dataclass(frozen=True)
class Sizes:
    """A problem on N equal shards, for closed forms.  S is global; `itemsize` in bytes."""

    B: int
    S: int
    H: int
    Hkv: int
    D: int
    N: int
    itemsize: int
    causal: bool
    layout: str

    @property
    def acc(self) -> int:
        """Bytes of an accumulated element."""
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
    def others(self) -> float:
        """Tokens of all ranks that some other rank needs: those that no other rank's queries see, or whose queries see no
        other rank's keys (at one end of a causal sequence), stay at home."""
        if self.N == 1:
            return 0
        at_home = {"contiguous": self.S / self.N, "zigzag": self.S / self.N / 2, "striped": 1}[
            self.layout
        ]
        return self.S - (at_home if self.causal else 0)

    @property
    def pairs(self) -> float:
        """Tokens of other ranks' keys that a rank sees, mean over ranks."""
        block, others = self.S / self.N, self.N - 1
        if not self.causal:
            return others * block
        return (
            others
            * {"contiguous": block / 2, "zigzag": block * 3 / 4, "striped": block - 0.5}[
                self.layout
            ]
        )


@dataclass(frozen=True)
class Algorithm:
    """One named algorithm: a communication pattern with the layout it is at its best with."""

    name: str
    pattern: str  # file in ringx/patterns
    paper: str
    recommended_layout: str
    memory: str  # remote blocks held at once, a rank
    doc: str

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
        """(forward, backward): bytes that a rank sends in closed form, mean over ranks where they differ, as defined in
        ``ringx.comm``.  S is the global length, in equal shards (S a multiple of N, of 2N for zigzag; for other lengths
        count with ``ringx.comm.traffic``); `layout` defaults to the recommended one."""
        layout = (
            self.recommended_layout if layout is None else require_name(layout, LAYOUTS, "layout")
        )
        for name, value in {
            "B": B,
            "S": S,
            "H": H,
            "Hkv": Hkv,
            "D": D,
            "N": N,
            "itemsize": itemsize,
        }.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"bytes: {name}={value!r} must be a positive integer.")
        if S % (2 * N if layout == "zigzag" and N > 1 else N):
            raise ValueError(
                f"bytes: S={S} does not give {N} equal {layout} shards; count uneven ones with ringx.comm.traffic()."
            )
        return pattern(self.name).bytes_sent(
            Sizes(B, S, H, Hkv, D, N, itemsize, bool(causal), layout)
        )


_PAPER = "Yin et al., RingX, SC25"
ALGORITHMS = {
    a.name: a
    for a in (
        Algorithm(
            "ringx1", "broadcast_q", f"{_PAPER}: X1", "contiguous", "2 blocks of q",
            "Queries are broadcast, partial outputs reduced to their owner; made for bidirectional attention.",
        ),
        Algorithm(
            "ringx2", "broadcast_q", f"{_PAPER}: X2", "zigzag", "2 blocks of q",
            "ringx1's pattern for causal attention: each rank computes only the tiles that the mask leaves.",
        ),
        Algorithm(
            "ringx3", "gather_kv", f"{_PAPER}: X3", "zigzag", "N blocks of kv, twice",
            "One all-gather of keys and values, one all-to-all of their gradients: fewest messages and kernel calls.",
        ),
        Algorithm(
            "ringx4", "broadcast_kv", f"{_PAPER}: X4", "zigzag", "2 blocks of kv",
            "Keys and values are broadcast one owner at a time, gradients reduced to it: constant memory.",
        ),
    )
}  # fmt: skip


def algorithms() -> dict[str, Algorithm]:
    """Every algorithm that ``attention(algorithm=...)`` takes, by name."""
    return dict(ALGORITHMS)


def pattern(name: str) -> ModuleType:
    """The module with forward, backward and bytes_sent of algorithm `name`."""
    return importlib.import_module(f".{ALGORITHMS[name].pattern}", __package__)
