"""A Vision Transformer that maps fields on a grid to the changes of fields.  It knows nothing of ranks: it is given some of the
grid's tokens with their places, and an attention.

Pre-norm blocks (Dosovitskiy et al., arXiv 2010.11929).  The last projection begins as 0, so that an untrained model changes
nothing of the simple forecast that it corrects.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.common.memory import ActivationMemory
from apps.common.weights import seeded_normal

from .config import ModelConfig

Attend = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # q, k, v [B, S, H, D] -> [B, S, H, D], every token sees all


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, attend: Attend):
        super().__init__()
        self.head_dim, self.attend = c.dim // c.heads, attend
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(c.dim, c.dim) for _ in range(4)
        )

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """x [B, S, C], of which the first `tokens` are tokens and the others only fill up (see ``ViT.forward``)."""
        q, k, v = (
            proj(x)[:, :tokens].unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(q, k, v).flatten(2)  # under tp, of a part of the heads
        return self.o_proj(F.pad(out, (0, 0, 0, x.shape[1] - tokens)))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, attend: Attend, memory: ActivationMemory):
        super().__init__()
        self.norm_attn, self.norm_mlp = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.attn, self.mlp = Attention(c, attend), MLP(c)
        self.memory = memory

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        return self.memory.block(self._layers, x, tokens)

    def _layers(self, x: Tensor, tokens: int) -> Tensor:
        x = x + self.attn(self.norm_attn(x), tokens)
        return self.memory.add_mlp(x, self.mlp, self.norm_mlp(x))


class SinusoidalPositions(nn.Module):
    """Two-dimensional positions without parameters: half of the channels say the row, half the column, as sines and cosines of
    geometrically spaced wavelengths (Vaswani et al., arXiv 1706.03762, section 3.5, of each coordinate)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.columns, self.dim = c.patch_grid().columns, c.dim

    def forward(self, places: Tensor) -> Tensor:
        """[S] numbers of tokens -> [1, S, C]."""
        n = self.dim // 4
        rates = 10_000.0 ** -(torch.arange(n, dtype=torch.float64, device=places.device) / n)
        angles = [
            x.to(torch.float64)[:, None] * rates
            for x in (places // self.columns, places % self.columns)
        ]
        return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], -1)[None]


class LearnedPositions(nn.Module):
    """A vector for each of the grid's tokens."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.table = nn.Embedding(c.patch_grid().tokens, c.dim)

    def forward(self, places: Tensor) -> Tensor:
        """[S] numbers of tokens -> [1, S, C]."""
        return self.table(places[None])


class ViT(nn.Module):
    def __init__(
        self,
        c: ModelConfig,
        attend: Attend,
        memory: ActivationMemory = ActivationMemory(),  # noqa: B008 - frozen
        multiple: int = 1,
    ):
        """multiple: tokens are filled up to a multiple of this (tp ranks hold equally many between the matrices)."""
        super().__init__()
        self.config, self.multiple = c, multiple
        self.embed = nn.Linear(c.in_channels * c.patch**2, c.dim)
        self.places = (LearnedPositions if c.positions == "learned" else SinusoidalPositions)(c)
        self.layers = nn.ModuleList(Block(c, attend, memory) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.out_channels * c.patch**2)

    @classmethod
    def empty(
        cls, c: ModelConfig, attend: Attend, *how, dtype: torch.dtype = torch.float32
    ) -> "ViT":
        """A model without memory for its parameters (meta device), to be cut over ranks first."""
        with torch.device("meta"):
            return cls(c, attend, *how).to(dtype)

    def forward(
        self,
        x: Tensor,
        places: Tensor,
        target: "Tensor | None" = None,
        weights: "Tensor | None" = None,
    ) -> Tensor:
        """x [B, S, Cin patch^2] of the tokens with numbers `places` [S] -> [B, S, Cout patch^2].  With `target` of that shape and
        `weights` [S, patch^2] of the points, the sum of the weighted squared errors instead, in fp32 at least."""
        tokens = x.shape[1]
        fill = -tokens % self.multiple
        if fill:
            x, places = F.pad(x, (0, 0, 0, fill)), F.pad(places, (0, fill))
        x = self.embed(
            x.to(self.embed.weight.dtype)
        )  # FSDP2 casts weights but not this; under tp [B, S / tp, C]
        x = x + self.places(places).to(x.dtype)
        for layer in self.layers:
            x = layer(x, tokens)
        out = self.head(self.norm(x))[:, :tokens]
        if target is None:
            return out
        assert weights is not None
        wide = torch.promote_types(out.dtype, torch.float32)
        error = (out.to(wide) - target.to(wide)).unflatten(
            -1, (self.config.out_channels, -1)
        )  # [B, S, Cout, patch^2]
        return (error.square() * weights.to(wide)[:, None]).sum()


def initial_weight(name: str, shape: torch.Size, c: ModelConfig, seed: int) -> Tensor:
    """The initial value of a parameter, fp32 on the CPU: matrices N(0, 0.02), what is added to the residual stream by all blocks
    together about as much; norms 1; biases and the last projection 0.  Equal on any device, rank and mesh."""
    if name.endswith("bias") or name.startswith("head."):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = (
        0.02 / math.sqrt(2 * c.layers)
        if name.endswith(("o_proj.weight", "down_proj.weight"))
        else 0.02
    )
    return seeded_normal(name, shape, seed) * std
