"""Which global tokens a rank holds, and what of (queries) x (keys) must be computed.

A layout says which *runs* of global positions a rank holds; ``tiles`` turns runs of queries and runs of keys into
the rectangles that a mask leaves of them.  It is the only place that knows about masks: every layout, length, window
and document boundary goes through it, for single ranks and for sets of ranks alike.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .checks import require_name

LAYOUTS = {
    "contiguous": "rank r holds the r-th of N equal parts; causal work grows with the rank",
    "zigzag": "rank r holds chunks r and 2N-1-r of 2N: causal work is equal on all ranks",
    "striped": "rank r holds tokens r, r+N, r+2N, ... (Brandon et al., arXiv 2311.09431); causal work is nearly equal",
}


class TokenRange(NamedTuple):
    """`length` tokens at the global positions start, start+step, ...; they are local rows at, at+1, ..."""

    start: int
    length: int
    at: int
    step: int = 1

    @property
    def last(self) -> int:
        return self.start + (self.length - 1) * self.step


class Tile(NamedTuple):
    """Rows `q` of the queries against rows `k` of the keys.  With i and j counted from the tile's own first rows, key j
    is visible to query i iff lo <= j - i <= hi; None is unbounded."""

    q: slice
    k: slice
    lo: int | None = None
    hi: int | None = None

    @property
    def area(self) -> int:
        """Number of (query, key) pairs that the tile computes."""
        m, n = self.q.stop - self.q.start, self.k.stop - self.k.start
        top = m * n if self.hi is None else _below(m, n, self.hi)
        return top - (0 if self.lo is None else _below(m, n, self.lo - 1))


def _below(m: int, n: int, h: int) -> int:
    """How many of the m x n pairs (i, j) have j - i <= h."""
    first = min(max(0, -h), m)  # rows before see nothing
    full = min(
        max(first, n - 1 - h), m
    )  # rows from here see all n keys, the rows between one more each
    banded = full - first
    return banded * (first + h + 1) + banded * (banded - 1) // 2 + (m - full) * n


@dataclass(frozen=True)
class Sharding:
    """A layout bound to one sequence: any `seqlen` >= `world`, shards (zigzag: chunks) that differ by at most one token.

    Pass it as ``layout=`` wherever a layout's name is accepted when the sequence does not divide equally.  Rank r's
    local tensors then have ``sharding.size(r)`` tokens, in ascending order of their global positions.

    Raises TypeError or ValueError, naming the argument, for sizes that are no positive integers, seqlen < world, or an
    unknown layout.
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
                f"Sharding: seqlen={self.seqlen} is shorter than world={self.world}: some rank would hold no token; "
                f"use at most {self.seqlen} ranks."
            )

    @classmethod
    def equal(cls, seqlen: int, world: int, layout: str) -> "Sharding":
        """The sharding that a layout's *name* stands for: every rank (zigzag: every chunk) holds equally many tokens."""
        sharding = cls(seqlen, world, layout)
        parts = 2 * world if layout == "zigzag" and world > 1 else world
        if seqlen % parts:
            raise ValueError(
                f"layout={layout!r} on {world} ranks cuts the sequence in {parts} equal parts, which {seqlen} tokens do not "
                f"divide into; pass layout=ringx.Sharding({seqlen}, {world}, {layout!r}) for uneven shards, or pad the sequence."
            )
        return sharding

    def runs(self, rank: int) -> list[TokenRange]:
        """The runs of global positions that `rank` holds, in the order of its local rows (ascending positions)."""
        if not 0 <= rank < self.world:
            raise ValueError(
                f"Sharding: rank={rank} is not one of the {self.world} ranks 0..{self.world - 1}."
            )
        if self.layout == "striped":
            return [TokenRange(rank, -(-(self.seqlen - rank) // self.world), 0, self.world)]
        if self.layout == "contiguous" or self.world == 1:
            chunks = [self._chunk(rank, self.world)]
        else:
            chunks = [
                self._chunk(rank, 2 * self.world),
                self._chunk(2 * self.world - 1 - rank, 2 * self.world),
            ]
        return pack([TokenRange(start, stop - start, 0) for start, stop in chunks if stop > start])

    def _chunk(self, i: int, of: int) -> tuple[int, int]:
        """[start, stop) of part i; the first seqlen % of parts hold one token more."""
        size, extra = divmod(self.seqlen, of)
        start = i * size + min(i, extra)
        return start, start + size + (i < extra)

    def size(self, rank: int) -> int:
        """Number of tokens that `rank` holds."""
        return sum(run.length for run in self.runs(rank))

    def positions(self, rank: int) -> torch.Tensor:
        """[size(rank)] int64 on the CPU: the global position of each local token."""
        return torch.cat([torch.arange(r.start, r.last + 1, r.step) for r in self.runs(rank)])


def resolve_sharding(layout: "str | Sharding", world: int, seqlen: int) -> Sharding:
    """What a `layout` argument means on `world` ranks: a Sharding as it is, a name as equal shards of `seqlen` tokens."""
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
            f"{sharding} gives rank {rank} {sharding.size(rank)} tokens, but its tensor has {tokens}; "
            "cut it with ringx.shard and the same Sharding."
        )
    return sharding


def pack(runs: Sequence[TokenRange]) -> list[TokenRange]:
    """The same tokens in the same order, laid out row after row from 0; runs that continue each other become one."""
    out: list[TokenRange] = []
    at = 0
    for run in runs:
        if out and run.step == out[-1].step and run.start == out[-1].last + run.step:
            out[-1] = out[-1]._replace(length=out[-1].length + run.length)
        else:
            out.append(run._replace(at=at))
        at += run.length
    return out


def clip(runs: Sequence[TokenRange], rows: slice) -> list[TokenRange]:
    """The runs of local rows [rows.start, rows.stop), as they stand in a tensor that holds only those rows."""
    out = []
    for run in runs:
        a, b = max(rows.start, run.at), min(rows.stop, run.at + run.length)
        if a < b:
            out.append(
                TokenRange(run.start + (a - run.at) * run.step, b - a, a - rows.start, run.step)
            )
    return out


def rows_upto(runs: Sequence[TokenRange], position: int) -> int:
    """How many of the (ascending) tokens lie at global positions <= `position`."""
    return sum(min(max((position - r.start) // r.step + 1, 0), r.length) for r in runs)


def _documents(
    run: TokenRange, cu_seqlens: Sequence[int] | None
) -> Iterable[tuple[TokenRange, int]]:
    """The run cut at document boundaries, with the number of each document."""
    if cu_seqlens is None:
        yield run, 0
        return
    for doc, (a, b) in enumerate(itertools.pairwise(cu_seqlens)):
        i, j = (min(max(-(-(x - run.start) // run.step), 0), run.length) for x in (a, b))
        if i < j:
            yield TokenRange(run.start + i * run.step, j - i, run.at + i, run.step), doc


def tiles(
    q_runs: Sequence[TokenRange],
    k_runs: Sequence[TokenRange],
    *,
    window: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | None = None,
    by_keys: bool = False,
) -> list[Tile]:
    """What must be computed of these queries against these keys: disjoint tiles whose union is the mask.

    Key position j is visible to query position i iff i - left <= j <= i + right, for window = (left, right), None
    unbounded (causal is right = 0), and both lie in the same document of `cu_seqlens` (global boundaries 0, ..., S).
    Runs must be ascending; all runs longer than one token must share one step.

    Neighbouring tiles are fused while they remain one band: a contiguous prefix of keys is one kernel call.  Tiles grow
    along the keys of one set of queries first (a forward wants few merges of outputs), or with `by_keys` along the
    queries of one set of keys (a backward then writes each key's gradient once).
    """
    left, right = window
    q_parts = [part for run in q_runs for part in _documents(run, cu_seqlens)]
    k_parts = [part for run in k_runs for part in _documents(run, cu_seqlens)]
    pairs = (
        [(q, k) for k in k_parts for q in q_parts]
        if by_keys
        else [(q, k) for q in q_parts for k in k_parts]
    )
    out: list[Tile] = []
    for (q, q_doc), (k, k_doc) in pairs:
        if q_doc != k_doc:
            continue
        step, off = (q.step if q.length > 1 else k.step), k.start - q.start
        if q.length > 1 and k.length > 1 and q.step != k.step:
            raise ValueError(f"tiles: runs of steps {q.step} and {k.step} do not form bands.")
        hi = None if right is None else (right - off) // step
        lo = None if left is None else -((left + off) // step)
        tile = _simplest(Tile(slice(q.at, q.at + q.length), slice(k.at, k.at + k.length), lo, hi))
        if tile is None:
            continue
        while out and (fused := _fuse(out[-1], tile)):
            out.pop()
            tile = fused
        out.append(tile)
    return out


def _simplest(t: Tile) -> Tile | None:
    """Without bounds that exclude nothing; None when nothing is left."""
    m, n = t.q.stop - t.q.start, t.k.stop - t.k.start
    if t.area == 0:
        return None
    return t._replace(
        lo=t.lo if t.lo is not None and t.lo > 1 - m else None,
        hi=t.hi if t.hi is not None and t.hi < n - 1 else None,
    )


def _fuse(a: Tile, b: Tile) -> Tile | None:
    """One tile that computes exactly the pairs of a and of b, if there is one.

    Their bounding box under a candidate band holds both, so it equals their union iff the areas agree."""
    if a.lo is not None or b.lo is not None:
        return None
    q = slice(min(a.q.start, b.q.start), max(a.q.stop, b.q.stop))
    k = slice(min(a.k.start, b.k.start), max(a.k.stop, b.k.stop))
    total = a.area + b.area
    shift = [
        (t.q.start - q.start) - (t.k.start - k.start) for t in (a, b)
    ]  # hi in the box's rows: hi_box = hi - shift
    for t, s in zip((a, b), shift, strict=True):
        hi = None if t.hi is None else t.hi - s
        if all(_narrow(x, hi, y) == x.area for x, y in zip((a, b), shift, strict=True)):
            box = Tile(q, k, None, hi)
            if box.area == total:
                return _simplest(box)
    return None


def _narrow(t: Tile, hi: int | None, shift: int) -> int:
    """Area of t where the box's bound `hi` holds too."""
    if hi is None:
        return t.area
    hi = hi + shift
    return t._replace(hi=hi if t.hi is None else min(hi, t.hi)).area
