"""Tiles cut into pieces whose bands a kernel can compute."""

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
    if alignment == "bottom-right":
        band = Tile(slice(first_row, full_row), slice(k_start, k_stop), None, diagonal - k_start)
        lower_half = Tile(slice(full_row, q_stop), slice(k_start, k_stop))
        return [band, lower_half] if full_row < q_stop else [band]
    pieces = []
    if k_start < diagonal:
        pieces.append(Tile(slice(first_row, q_stop), slice(k_start, diagonal)))
    if alignment == "top-left":
        pieces.append(Tile(slice(first_row, q_stop), slice(diagonal, k_stop), None, 0))
        return pieces
    pieces.append(Tile(slice(first_row, full_row), slice(diagonal, k_stop), None, 0))
    if full_row < q_stop:
        pieces.append(Tile(slice(full_row, q_stop), slice(diagonal, k_stop)))
    return pieces
