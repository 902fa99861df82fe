"""Tiles cut into pieces whose bands a kernel can compute."""

from typing import NamedTuple

from ..tiles import Tile
from .protocol import CausalAlignment


def cut(tile: Tile, alignment: CausalAlignment) -> list[Tile]:
    r"""The tile in pieces (rectangles and bands) that a kernel of this alignment can compute.

    A tile with an upper bound only is, below its first rows that see no key and left of its last
    keys that no row sees,

            k_start    diagonal     k_stop
               +-----------+-----------+  first_row
               |           | \         |
               |           |    \      |
               |           |       \   |
               +-----------+-----------+  full_row: this and later rows see every key
               |           |           |
               +-----------+-----------+  q_stop

    A "bottom-right" kernel computes the upper half as one band, and the lower half as a rectangle;
    a "top-left" kernel the left half as a rectangle, and the right half as one band; a "square"
    kernel the left half, the triangle, and the rectangle below the triangle.

    Raises NotImplementedError for a lower bound, unless the alignment is "any".
    """
    if alignment == "any" or (tile.lo is None and tile.hi is None):
        return [tile]
    if tile.lo is not None or tile.hi is None:
        raise NotImplementedError(
            "this kernel cannot bound the distance to earlier keys; use kernel='reference'."
        )
    q_stop = tile.q.stop
    first_row = tile.q.start + max(0, -tile.hi)
    k_start = tile.k.start
    diagonal = k_start + max(0, tile.hi)  # the last key that the first row sees
    k_stop = min(tile.k.stop, diagonal + q_stop - first_row)
    if k_stop <= diagonal + 1:
        return [Tile(slice(first_row, q_stop), slice(k_start, k_stop))]
    full_row = first_row + k_stop - diagonal
    corners = _Corners(first_row, full_row, q_stop, k_start, diagonal, k_stop)
    if alignment == "bottom-right":
        return _cut_at_full_row(corners)
    if alignment == "top-left":
        return _cut_at_diagonal(corners)
    return _cut_at_both(corners)


class _Corners(NamedTuple):
    """Where the lines of the drawing in ``cut`` lie."""

    first_row: int
    full_row: int
    q_stop: int
    k_start: int
    diagonal: int
    k_stop: int

    @property
    def upper(self) -> slice:
        return slice(self.first_row, self.full_row)

    @property
    def lower(self) -> slice:
        return slice(self.full_row, self.q_stop)

    @property
    def left(self) -> slice:
        return slice(self.k_start, self.diagonal)

    @property
    def right(self) -> slice:
        return slice(self.diagonal, self.k_stop)


def _cut_at_full_row(c: _Corners) -> list[Tile]:
    keys = slice(c.k_start, c.k_stop)
    band = Tile(c.upper, keys, None, c.diagonal - c.k_start)
    return [band, *_if_not_empty(c.lower, keys)]


def _cut_at_diagonal(c: _Corners) -> list[Tile]:
    rows = slice(c.first_row, c.q_stop)
    return [*_if_not_empty(rows, c.left), Tile(rows, c.right, None, 0)]


def _cut_at_both(c: _Corners) -> list[Tile]:
    left_half = _if_not_empty(slice(c.first_row, c.q_stop), c.left)
    triangle = Tile(c.upper, c.right, None, 0)
    return [*left_half, triangle, *_if_not_empty(c.lower, c.right)]


def _if_not_empty(q: slice, k: slice) -> list[Tile]:
    """The rectangle, unless it has no rows or no keys."""
    return [Tile(q, k)] if q.start < q.stop and k.start < k.stop else []
