"""A Vision Transformer that maps fields on a grid to the changes of fields.

It knows nothing of ranks: it is given some of the grid's tokens with their positions, and an
attention.  Its blocks are pre-norm (Dosovitskiy et al., arXiv 2010.11929).  The last projection
begins as 0, so that an untrained model changes nothing of the simple forecast that it corrects.

Shapes:
    B           samples
    S           tokens that are given: all of the grid, or this rank's part of them
    C           width of the residual stream (`dim`)
    H, D        heads of the attention, dimensions of a head; C = H D
    Cin, Cout   channels of the input and the output (leads x channels of the record)
    P           points of a patch, patch x patch

Under tensor parallelism a rank holds S / tp tokens between the matrices, and H / tp heads in
attention.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.common.memory import ActivationMemory
from apps.common.weights import seeded_normal

from .config import ModelConfig

# q, k, v [B, S, H, D] -> out [B, S, H, D]; every token attends to all tokens of the grid
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

KEEP_ALL = ActivationMemory()  # no activation is computed again


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, attend: AttentionFunction):
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.attend = attend
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(config.dim, config.dim)
        self.v_proj = nn.Linear(config.dim, config.dim)
        self.o_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """x [B, S, C], of which the first `tokens` are tokens, the others padding -> [B, S, C]"""
        q = self._heads(self.q_proj(x), tokens)
        k = self._heads(self.k_proj(x), tokens)
        v = self._heads(self.v_proj(x), tokens)
        out = self.attend(q, k, v).flatten(2)
        padding = x.shape[1] - tokens
        return self.o_proj(F.pad(out, (0, 0, 0, padding)))

    def _heads(self, x: Tensor, tokens: int) -> Tensor:
        """[B, S, C] -> [B, tokens, H, D]"""
        return x[:, :tokens].unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.dim, config.hidden)
        self.down_proj = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]"""
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, attend: AttentionFunction, memory: ActivationMemory):
        super().__init__()
        self.norm_attn = nn.LayerNorm(config.dim)
        self.norm_mlp = nn.LayerNorm(config.dim)
        self.attn = Attention(config, attend)
        self.mlp = MLP(config)
        self.memory = memory

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """As ``Attention.forward``."""
        return self.memory.block(self._layers, x, tokens)

    def _layers(self, x: Tensor, tokens: int) -> Tensor:
        x = x + self.attn(self.norm_attn(x), tokens)
        return self.memory.add_mlp(x, self.mlp, self.norm_mlp(x))


class SinusoidalPositions(nn.Module):
    """Two-dimensional positions without parameters.

    Half of the channels encode the row, half the column, as sines and cosines of geometrically
    spaced wavelengths (Vaswani et al., arXiv 1706.03762, section 3.5, of each coordinate)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.columns = config.patch_grid().columns
        self.dim = config.dim

    def forward(self, positions: Tensor) -> Tensor:
        """[S] numbers of tokens -> [1, S, C]"""
        count = self.dim // 4  # of frequencies
        exponents = torch.arange(count, dtype=torch.float64, device=positions.device) / count
        frequencies = 10_000.0**-exponents
        parts = []
        for coordinate in (positions // self.columns, positions % self.columns):
            angles = coordinate.to(torch.float64)[:, None] * frequencies
            parts += [torch.sin(angles), torch.cos(angles)]
        return torch.cat(parts, -1)[None]


class LearnedPositions(nn.Module):
    """A vector for each of the grid's tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table = nn.Embedding(config.patch_grid().tokens, config.dim)

    def forward(self, positions: Tensor) -> Tensor:
        """[S] numbers of tokens -> [1, S, C]"""
        return self.table(positions[None])


class ViT(nn.Module):
    """The whole model.

    Args:
        config: its shape.
        attend: the attention of all blocks.
        memory: which activations are kept for the backward.
        multiple: tokens are padded to a multiple of this; tp ranks hold equally many tokens between
            the matrices."""

    def __init__(
        self,
        config: ModelConfig,
        attend: AttentionFunction,
        memory: ActivationMemory = KEEP_ALL,
        multiple: int = 1,
    ):
        super().__init__()
        self.config = config
        self.multiple = multiple
        self.embed = nn.Linear(config.in_channels * config.patch**2, config.dim)
        if config.positions == "learned":
            self.places: nn.Module = LearnedPositions(config)
        else:
            self.places = SinusoidalPositions(config)
        self.layers = nn.ModuleList(Block(config, attend, memory) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.out_channels * config.patch**2)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        attend: AttentionFunction,
        memory: ActivationMemory = KEEP_ALL,
        multiple: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "ViT":
        """A model on the meta device, without memory for its parameters: to be cut over ranks."""
        with torch.device("meta"):
            return cls(config, attend, memory, multiple).to(dtype)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        target: "Tensor | None" = None,
        weights: "Tensor | None" = None,
    ) -> Tensor:
        """The output of each token, or the sum of its errors.

        Args:
            x: [B, S, Cin P] patches of the inputs.
            positions: [S] numbers of these tokens in the grid.
            target: [B, S, Cout P].
            weights: [S, P] of the points, with `target`.

        Returns:
            [B, S, Cout P]; with `target`, the sum of the weighted squared errors, in fp32 at
            least."""
        tokens = x.shape[1]
        padding = -tokens % self.multiple
        if padding:
            x = F.pad(x, (0, 0, 0, padding))
            positions = F.pad(positions, (0, padding))
        x = x.to(self.embed.weight.dtype)  # FSDP2 casts weights to the computation's dtype, not x
        x = self.embed(x)
        x = x + self.places(positions).to(x.dtype)
        for layer in self.layers:
            x = layer(x, tokens)
        out = self.head(self.norm(x))[:, :tokens]
        if target is None:
            return out
        assert weights is not None
        wide = torch.promote_types(out.dtype, torch.float32)
        error = out.to(wide) - target.to(wide)
        error = error.unflatten(-1, (self.config.out_channels, -1))  # [B, S, Cout, P]
        return (error.square() * weights.to(wide)[:, None]).sum()


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of a parameter, fp32 on the CPU; equal on any device, rank and mesh.

    Matrices are N(0, 0.02); those whose result is added to the residual stream are scaled down by
    the square root of their number, so that all blocks together add about as much.  Norms are 1,
    biases and the last projection 0."""
    if name.endswith("bias") or name.startswith("head."):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = 0.02
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.layers)
    return seeded_normal(name, shape, seed) * std
