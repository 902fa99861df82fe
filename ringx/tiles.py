"""What of (queries) x (keys) must be computed: the one place that knows masks.

``tiles`` turns the ranges of tokens that two ranks (or sets of ranks) hold into the rectangles and
bands that a mask leaves of their product.  Every layout, length, window and document boundary goes
through it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .layout import TokenRange


class Tile(NamedTuple):
    """Rows `q` of the queries against rows `k` of the keys.  With i and j counted from the tile's
    own first rows, key j is visible to query i iff lo <= j - i <= hi; None is unbounded."""

    q: slice
    k: slice
    lo: int | None = None
    hi: int | None = None

    @property
    def area(self) -> int:
        """Number of (query, key) pairs that the tile computes."""
        rows, keys = _extent(self)
        upto_hi = rows * keys if self.hi is None else _pairs_upto(rows, keys, self.hi)
        before_lo = 0 if self.lo is None else _pairs_upto(rows, keys, self.lo - 1)
        return upto_hi - before_lo


def _extent(tile: Tile) -> tuple[int, int]:
    """(number of query rows, number of key rows)"""
    return tile.q.stop - tile.q.start, tile.k.stop - tile.k.start


def _pairs_upto(rows: int, keys: int, bound: int) -> int:
    """How many of the rows x keys pairs (i, j) have j - i <= bound."""
    first = min(max(0, -bound), rows)  # rows before see nothing
    # rows from here see all keys; from one row to the next of those between, one key more
    full = min(max(first, keys - 1 - bound), rows)
    banded = full - first
    in_band = banded * (first + bound + 1) + banded * (banded - 1) // 2
    return in_band + (rows - full) * keys


def _cut_at_documents(
    runs: Sequence[TokenRange], cu_seqlens: Sequence[int] | None
) -> list[tuple[TokenRange, int]]:
    """The runs cut at document boundaries, each part with the number of its document."""
    if cu_seqlens is None:
        return [(run, 0) for run in runs]
    parts = []
    for run in runs:
        for document, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
            first, last = _tokens_before(run, start), _tokens_before(run, stop)
            if first < last:
                position = run.start + first * run.step
                part = TokenRange(position, last - first, run.at + first, run.step)
                parts.append((part, document))
    return parts


def _tokens_before(run: TokenRange, position: int) -> int:
    """How many tokens of the run lie before this global position."""
    steps = -(-(position - run.start) // run.step)  # rounded up
    return min(max(steps, 0), run.length)


def tiles(
    q_runs: Sequence[TokenRange],
    k_runs: Sequence[TokenRange],
    *,
    window: tuple[int | None, int | None] = (None, None),
    cu_seqlens: Sequence[int] | None = None,
    by_keys: bool = False,
) -> list[Tile]:
    """What must be computed of these queries against these keys: disjoint tiles whose union is the
    mask.

    Key position j is visible to query position i iff i - left <= j <= i + right, for window =
    (left, right), None unbounded (causal is right = 0), and both lie in the same document of
    `cu_seqlens` (global boundaries 0, ..., S).  Runs must be ascending; all runs longer than one
    token must share one step.

    Neighbouring tiles are fused while they remain one band: a contiguous prefix of keys is one
    kernel call.  Tiles grow along the keys of one set of queries first (a forward wants few merges
    of outputs), or with `by_keys` along the queries of one set of keys (a backward then writes each
    key's gradient once).
    """
    q_parts = _cut_at_documents(q_runs, cu_seqlens)
    k_parts = _cut_at_documents(k_runs, cu_seqlens)
    fused_tiles: list[Tile] = []
    for q_run, k_run in _pairs_in_one_document(q_parts, k_parts, by_keys):
        tile = _tile_of(q_run, k_run, window)
        if tile is None:
            continue
        while fused_tiles and (fused := _fuse(fused_tiles[-1], tile)):
            fused_tiles.pop()
            tile = fused
        fused_tiles.append(tile)
    return fused_tiles


def _pairs_in_one_document(
    q_parts: list[tuple[TokenRange, int]], k_parts: list[tuple[TokenRange, int]], by_keys: bool
) -> Iterator[tuple[TokenRange, TokenRange]]:
    """(queries, keys) of the same document, by ascending queries, or by ascending keys."""
    outer, inner = (k_parts, q_parts) if by_keys else (q_parts, k_parts)
    for outer_run, outer_document in outer:
        for inner_run, inner_document in inner:
            if outer_document == inner_document:
                yield (inner_run, outer_run) if by_keys else (outer_run, inner_run)


def _tile_of(
    q_run: TokenRange, k_run: TokenRange, window: tuple[int | None, int | None]
) -> Tile | None:
    """What the window leaves of one run of queries against one run of keys; None for nothing."""
    if q_run.length > 1 and k_run.length > 1 and q_run.step != k_run.step:
        raise ValueError(f"tiles: runs of steps {q_run.step} and {k_run.step} do not form bands.")
    step = q_run.step if q_run.length > 1 else k_run.step
    offset = k_run.start - q_run.start
    left, right = window
    return _simplify(
        Tile(
            q=slice(q_run.at, q_run.at + q_run.length),
            k=slice(k_run.at, k_run.at + k_run.length),
            lo=None if left is None else -((left + offset) // step),
            hi=None if right is None else (right - offset) // step,
        )
    )


def _simplify(tile: Tile) -> Tile | None:
    """Without bounds that exclude nothing; None when nothing is left."""
    if tile.area == 0:
        return None
    rows, keys = _extent(tile)
    lo, hi = tile.lo, tile.hi
    if lo is not None and lo <= 1 - rows:
        lo = None
    if hi is not None and hi >= keys - 1:
        hi = None
    return tile._replace(lo=lo, hi=hi)


def _fuse(a: Tile, b: Tile) -> Tile | None:
    """One tile that computes exactly the pairs of a and of b, if there is one.

    Their bounding box under a candidate's upper bound holds both, so it equals their union iff the
    areas agree."""
    if a.lo is not None or b.lo is not None:
        return None
    q = slice(min(a.q.start, b.q.start), max(a.q.stop, b.q.stop))
    k = slice(min(a.k.start, b.k.start), max(a.k.stop, b.k.stop))
    total = a.area + b.area
    for candidate in (a, b):
        hi = None if candidate.hi is None else candidate.hi - _shift(candidate, q, k)
        if all(_area_under(tile, hi, _shift(tile, q, k)) == tile.area for tile in (a, b)):
            box = Tile(q, k, None, hi)
            if box.area == total:
                return _simplify(box)
    return None


def _shift(tile: Tile, q: slice, k: slice) -> int:
    """A bound in the tile's own rows, minus the same bound in the rows of the box q x k."""
    return (tile.q.start - q.start) - (tile.k.start - k.start)


def _area_under(tile: Tile, hi: int | None, shift: int) -> int:
    """Area of the tile where the box's bound `hi` holds too."""
    if hi is None:
        return tile.area
    own_hi = hi + shift
    if tile.hi is not None:
        own_hi = min(own_hi, tile.hi)
    return tile._replace(hi=own_hi).area
