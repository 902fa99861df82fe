"""Tiles cut into pieces that a kernel can compute."""

from ..tiles import Tile


def cut(tile: Tile, causal: str) -> list[Tile]:
    """The tile in pieces whose bands a kernel of this `causal` kind can do: rectangles and triangles.

    Rows that see no key are left out.  A "top-left" kernel gets the keys that all rows see as a rectangle and one
    triangle; a "bottom-right" kernel one band, and a rectangle for rows that see every key."""
    if causal == "any" or (tile.lo is None and tile.hi is None):
        return [tile]
    if tile.lo is not None or tile.hi is None:
        raise NotImplementedError(
            "this kernel cannot bound the distance to earlier keys; use kernel='reference'."
        )
    q0, k0 = tile.q.start, tile.k.start
    skip = max(0, -tile.hi)  # rows before see nothing
    h = tile.hi + skip  # the first row left sees keys 0..h
    m = tile.q.stop - q0 - skip
    n = min(tile.k.stop - k0, m + h)  # no row sees keys from n on
    q0 += skip
    if n <= h + 1:
        return [Tile(slice(q0, q0 + m), slice(k0, k0 + n))]
    full = n - h  # rows from here see all n keys
    bottom = [Tile(slice(q0 + full, q0 + m), slice(k0, k0 + n))] if full < m else []
    if causal == "bottom-right":
        return [Tile(slice(q0, q0 + full), slice(k0, k0 + n), None, h), *bottom]
    left = [Tile(slice(q0, q0 + m), slice(k0, k0 + h))] if h else []
    if causal == "top-left":
        return [*left, Tile(slice(q0, q0 + m), slice(k0 + h, k0 + n), None, 0)]
    below = [Tile(slice(q0 + full, q0 + m), slice(k0 + h, k0 + n))] if full < m else []
    return [*left, Tile(slice(q0, q0 + full), slice(k0 + h, k0 + n), None, 0), *below]
