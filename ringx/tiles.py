"""What of (queries) x (keys) must be computed: the one place that knows masks.

``tiles`` turns the ranges of tokens that two ranks (or sets of ranks) hold into the rectangles and bands that a mask leaves of
their product.  Every layout, length, window and document boundary goes through it.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .layout import TokenRange


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
