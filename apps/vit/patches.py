"""A grid of points as a sequence of tokens: patches of points, row by row from the north-west.

A grid that the patch does not divide is extended to the south and the east: around the globe where
it is periodic in longitude, else by repeating its last row or column.  What is added has no weight
in a loss, and is cropped again.

Shapes: C channels, fields of H x W points, S tokens, P = patch x patch points of a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """How fields [..., C, height, width] are cut into `rows` x `columns` tokens.

    Raises ValueError for a patch that is larger than the grid."""

    height: int
    width: int
    patch: int  # points of a token's side
    periodic: bool  # the grid goes around the globe

    def __post_init__(self):
        smaller_side = min(self.height, self.width)
        if not 1 <= self.patch <= smaller_side:
            raise ValueError(
                f"patch={self.patch} must be from 1 to the grid's smaller side "
                f"({self.height} x {self.width})."
            )

    @property
    def rows(self) -> int:
        return -(-self.height // self.patch)

    @property
    def columns(self) -> int:
        return -(-self.width // self.patch)

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def patchify(self, x: Tensor, positions: "Tensor | None" = None) -> Tensor:
        """[..., C, H, W] -> [..., S, C P]: all tokens, or those with numbers `positions` [S]."""
        return self._split(self._extend(x), positions)

    def patchify_weights(self, weights: Tensor, positions: "Tensor | None" = None) -> Tensor:
        """[H] weights of the rows -> [S, P] of the points; 0 for points that were added."""
        x = weights[:, None].expand(self.height, self.width)
        below, right = self._added()
        return self._split(F.pad(x, (0, right, 0, below))[None], positions)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[..., S, C P] -> [..., C, H, W]: the inverse of ``patchify``, of all tokens in order."""
        x = x.unflatten(-1, (-1, self.patch, self.patch))
        x = x.unflatten(-4, (self.rows, self.columns))  # [..., rows, columns, C, patch, patch]
        n = x.dim()
        # -> [..., C, rows, patch, columns, patch]
        x = x.permute(*range(n - 5), n - 3, n - 5, n - 2, n - 4, n - 1)
        x = x.flatten(-2).flatten(-3, -2)
        return x[..., : self.height, : self.width]

    def _added(self) -> tuple[int, int]:
        """How many rows are added in the south, and columns in the east."""
        below = self.rows * self.patch - self.height
        right = self.columns * self.patch - self.width
        return below, right

    def _extend(self, x: Tensor) -> Tensor:
        """[..., H, W] -> [..., rows patch, columns patch]"""
        below, right = self._added()
        if right:
            if self.periodic:
                added = x[..., :right]
            else:
                added = x[..., -1:].expand(*x.shape[:-1], right)
            x = torch.cat((x, added), -1)
        if below:
            added = x[..., -1:, :].expand(*x.shape[:-2], below, x.shape[-1])
            x = torch.cat((x, added), -2)
        return x

    def _split(self, x: Tensor, positions: "Tensor | None") -> Tensor:
        """[..., C, rows patch, columns patch] -> [..., S, C P]"""
        x = x.unflatten(-1, (self.columns, self.patch))
        x = x.unflatten(-3, (self.rows, self.patch))  # [..., C, rows, patch, columns, patch]
        n = x.dim()
        # -> [..., rows, columns, C, patch, patch]
        x = x.permute(*range(n - 5), n - 4, n - 2, n - 5, n - 3, n - 1)
        x = x.flatten(-3).flatten(-3, -2)
        if positions is None:
            return x
        return x.index_select(-2, positions)
