"""Which global tokens a rank holds.

A layout says which *runs* of global positions each rank holds; a ``Sharding`` is a layout bound to
one sequence and number of ranks.  What of queries x keys must then be computed is decided in
``ringx.tiles``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .checks import require_name

LAYOUTS = {
    "contiguous": "rank r holds the r-th of N equal parts; causal work grows with the rank",
    "zigzag": "rank r holds chunks r and 2N-1-r of 2N: causal work is equal on all ranks",
    "striped": "rank r holds tokens r, r+N, r+2N, ... (Brandon et al., arXiv 2311.09431); "
    "causal work is nearly equal",
}


class TokenRange(NamedTuple):
    """`length` tokens at the global positions start, start + step, ...; they are the local rows at,
    at + 1, ..."""

    start: int
    length: int
    at: int
    step: int = 1

    @property
    def last(self) -> int:
        return self.start + (self.length - 1) * self.step


@dataclass(frozen=True)
class Sharding:
    """A layout bound to one sequence: any `seqlen` >= `world`, shards (zigzag: chunks) that differ
    by at most one token.

    Pass it as ``layout=`` wherever a layout's name is accepted when the sequence does not divide
    equally.  Rank r's local tensors then have ``sharding.size(r)`` tokens, in ascending order of
    their global positions.

    Raises TypeError or ValueError, naming the argument, for sizes that are no positive integers,
    seqlen < world, or an unknown layout.
    """

    seqlen: int
    world: int
    layout: str = "zigzag"

    def __post_init__(self):
        for what in ("seqlen", "world"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"Sharding: {what}={value!r} must be an integer, not {type(value).__name__}."
                )
            if value < 1:
                raise ValueError(f"Sharding: {what}={value} must be at least 1.")
        require_name(self.layout, LAYOUTS, "layout")
        if self.seqlen < self.world:
            raise ValueError(
                f"Sharding: seqlen={self.seqlen} is shorter than world={self.world}: "
                "some rank would hold no token; "
                f"use at most {self.seqlen} ranks."
            )

    @classmethod
    def equal(cls, seqlen: int, world: int, layout: str) -> "Sharding":
        """The sharding that a layout's *name* stands for: every rank (zigzag: every chunk) holds
        equally many tokens."""
        sharding = cls(seqlen, world, layout)
        parts = 2 * world if layout == "zigzag" and world > 1 else world
        if seqlen % parts:
            raise ValueError(
                f"layout={layout!r} on {world} ranks cuts the sequence in {parts} equal parts, "
                f"which {seqlen} tokens do not divide into; pass "
                f"layout=ringx.Sharding({seqlen}, {world}, {layout!r}) for uneven shards, "
                "or pad the sequence."
            )
        return sharding

    def runs(self, rank: int) -> list[TokenRange]:
        """The runs of global positions that `rank` holds, in the order of its local rows (ascending
        positions)."""
        if not 0 <= rank < self.world:
            raise ValueError(
                f"Sharding: rank={rank} is not one of the {self.world} ranks 0..{self.world - 1}."
            )
        if self.layout == "striped":
            length = -(-(self.seqlen - rank) // self.world)  # rounded up
            return [TokenRange(start=rank, length=length, at=0, step=self.world)]
        if self.layout == "contiguous" or self.world == 1:
            chunks = [self._chunk(rank, self.world)]
        else:
            number = 2 * self.world
            chunks = [self._chunk(rank, number), self._chunk(number - 1 - rank, number)]
        return pack([chunk for chunk in chunks if chunk.length])

    def _chunk(self, index: int, number: int) -> TokenRange:
        """One of `number` consecutive parts; the first seqlen % number hold one token more."""
        size, extra = divmod(self.seqlen, number)
        start = index * size + min(index, extra)
        return TokenRange(start=start, length=size + (index < extra), at=0)

    def size(self, rank: int) -> int:
        """Number of tokens that `rank` holds."""
        return sum(run.length for run in self.runs(rank))

    def positions(self, rank: int) -> torch.Tensor:
        """[size(rank)] int64 on the CPU: the global position of each local token."""
        return torch.cat([torch.arange(r.start, r.last + 1, r.step) for r in self.runs(rank)])


def resolve_sharding(layout: "str | Sharding", world: int, seqlen: int) -> Sharding:
    """What a `layout` argument means on `world` ranks: a Sharding as it is, a name as equal shards
    of `seqlen` tokens."""
    if isinstance(layout, Sharding):
        if layout.world != world:
            raise ValueError(
                f"layout is a Sharding for {layout.world} ranks, but the group has {world}."
            )
        return layout
    if not isinstance(layout, str):
        raise TypeError(
            f"layout={layout!r} must be a name ({', '.join(LAYOUTS)}) or a ringx.Sharding."
        )
    return Sharding.equal(seqlen, world, layout)


def resolve_local_sharding(
    layout: "str | Sharding", world: int, rank: int, tokens: int
) -> Sharding:
    """The same from what one rank holds: `tokens` of the sequence."""
    sharding = resolve_sharding(layout, world, tokens * world)
    if sharding.size(rank) != tokens:
        raise ValueError(
            f"{sharding} gives rank {rank} {sharding.size(rank)} tokens, "
            f"but its tensor has {tokens}; cut it with ringx.shard and the same Sharding."
        )
    return sharding


def pack(runs: Sequence[TokenRange]) -> list[TokenRange]:
    """The same tokens in the same order, laid out row after row from 0; runs that continue each
    other become one."""
    packed: list[TokenRange] = []
    next_row = 0
    for run in runs:
        previous = packed[-1] if packed else None
        if (
            previous is not None
            and run.step == previous.step
            and run.start == previous.last + run.step
        ):
            packed[-1] = previous._replace(length=previous.length + run.length)
        else:
            packed.append(run._replace(at=next_row))
        next_row += run.length
    return packed


def clip(runs: Sequence[TokenRange], rows: slice) -> list[TokenRange]:
    """The runs of local rows [rows.start, rows.stop), as they stand in a tensor that holds only
    those rows."""
    clipped = []
    for run in runs:
        first = max(rows.start, run.at)
        last = min(rows.stop, run.at + run.length)
        if first < last:
            position = run.start + (first - run.at) * run.step
            clipped.append(TokenRange(position, last - first, first - rows.start, run.step))
    return clipped


def rows_upto(runs: Sequence[TokenRange], position: int) -> int:
    """How many of the (ascending) tokens lie at global positions <= `position`."""
    rows = 0
    for run in runs:
        tokens = (position - run.start) // run.step + 1
        rows += min(max(tokens, 0), run.length)
    return rows
