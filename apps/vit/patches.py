"""A grid of points as a sequence of tokens: patch x patch points each, row by row from the north-west.

A grid that the patch does not divide is continued to the south and the east: around the globe where it is periodic in longitude,
else by repeating its last row or column.  What is added has no weight in a loss and is cropped again.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """Tokens of fields [..., C, height, width]; ``tokens`` of them, `patch` points high and wide."""

    height: int
    width: int
    patch: int
    periodic: bool

    def __post_init__(self):
        if not 1 <= self.patch <= min(self.height, self.width):
            raise ValueError(
                f"patch={self.patch} must be from 1 to the grid's smaller side ({self.height} x {self.width})."
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

    def patchify(self, x: Tensor, tokens: "Tensor | None" = None) -> Tensor:
        """[..., C, H, W] -> [..., S, C patch^2]: all tokens, or those of the given numbers [S]."""
        return self._cut(self._continued(x), tokens)

    def patchify_weights(self, latitudes: Tensor, tokens: "Tensor | None" = None) -> Tensor:
        """The weight of each point, [H] by latitude, as [S, patch^2]; 0 for points that were added."""
        x = latitudes[:, None].expand(self.height, self.width)
        below, right = self.rows * self.patch - self.height, self.columns * self.patch - self.width
        return self._cut(F.pad(x, (0, right, 0, below))[None], tokens)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of ``patchify``, of all tokens in order: [..., S, C patch^2] -> [..., C, H, W]."""
        x = x.unflatten(-1, (-1, self.patch, self.patch)).unflatten(-4, (self.rows, self.columns))
        n = (
            x.dim()
        )  # [..., rows, columns, C, patch, patch] -> [..., C, rows, patch, columns, patch]
        x = x.permute(*range(n - 5), n - 3, n - 5, n - 2, n - 4, n - 1).flatten(-2).flatten(-3, -2)
        return x[..., : self.height, : self.width]

    def _continued(self, x: Tensor) -> Tensor:
        below, right = self.rows * self.patch - self.height, self.columns * self.patch - self.width
        if right:
            x = torch.cat(
                (x, x[..., :right] if self.periodic else x[..., -1:].expand(*x.shape[:-1], right)),
                -1,
            )
        if below:
            x = torch.cat((x, x[..., -1:, :].expand(*x.shape[:-2], below, x.shape[-1])), -2)
        return x

    def _cut(self, x: Tensor, tokens: "Tensor | None") -> Tensor:
        x = x.unflatten(-1, (self.columns, self.patch)).unflatten(-3, (self.rows, self.patch))
        n = (
            x.dim()
        )  # [..., C, rows, patch, columns, patch] -> [..., rows, columns, C, patch, patch]
        x = x.permute(*range(n - 5), n - 4, n - 2, n - 5, n - 3, n - 1).flatten(-3).flatten(-3, -2)
        return x if tokens is None else x.index_select(-2, tokens)
