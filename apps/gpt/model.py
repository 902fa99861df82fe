"""A Llama 3.  It knows nothing of ranks: it is given the *global* position of each token it sees, and an attention.

Parameters are named as in Hugging Face's LlamaForCausalLM (without its leading "model."), and rotated as there.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.common.memory import ActivationMemory
from apps.common.weights import seeded_normal

from .config import ModelConfig
from .loss import gather_sequence, head_logits, head_loss

Attend = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # q [B, S, H, D], k and v [B, S, Hkv, D] -> [B, S, H, D], causal
NOTHING_AGAIN = ActivationMemory()


def rope_frequencies(c: ModelConfig, device: "torch.device | str" = "cpu") -> Tensor:
    """[D/2] fp64: radians a token.  With rope_factor > 1 stretched as in Llama 3.1: a frequency that turns less than rope_low
    times within rope_original tokens is divided by the factor, one of more than rope_high is left, between them linearly."""
    f = c.rope_base ** -(
        torch.arange(0, c.head_dim, 2, dtype=torch.float64, device=device) / c.head_dim
    )
    if c.rope_factor == 1:
        return f
    turns = c.rope_original * f / (2 * math.pi)
    kept = ((turns - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
    return kept * f + (1 - kept) * f / c.rope_factor


def rope(positions: Tensor, c: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [S, 1, D/2] of tokens at the global `positions` [S].

    Angles are formed in fp64: at position 1,000,000 those of fp32 are off by 0.03."""
    angle = (positions.to(torch.float64)[:, None] * rope_frequencies(c, positions.device))[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, heads, D] with each pair (x[i], x[i + D/2]) turned by its token's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, attend: Attend):
        super().__init__()
        self.head_dim, self.attend = c.head_dim, attend
        self.q_proj = nn.Linear(c.dim, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(
            rotate(q, cos, sin), rotate(k, cos, sin), v
        )  # [B, S, H, D]; under tp, a part of the heads
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.dim, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, attend: Attend, memory: ActivationMemory):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c, attend)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)
        self.memory = memory

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.memory.block(self._layers, x, cos, sin)

    def _layers(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return self.memory.add_mlp(x, self.mlp, self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(
        self,
        c: ModelConfig,
        attend: Attend,
        memory: ActivationMemory = NOTHING_AGAIN,
        loss_chunk: int = 1024,
    ):
        super().__init__()
        self.config, self.loss_chunk = c, loss_chunk
        self.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(Block(c, attend, memory) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.lm_head = None if c.tied else nn.Linear(c.dim, c.vocab, bias=False)

    @classmethod
    def empty(
        cls, c: ModelConfig, attend: Attend, *how: Any, dtype: torch.dtype = torch.float32
    ) -> "Llama":
        """A model without memory for its parameters (meta device), to be cut over ranks first."""
        with torch.device("meta"):
            return cls(c, attend, *how).to(dtype)

    @classmethod
    def make(cls, c: ModelConfig, attend: Attend, *, seed: int, dtype: torch.dtype) -> "Llama":
        """A new model in this process alone."""
        model = cls.empty(c, attend, dtype=dtype).to_empty(device="cpu")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(initial_weight(name, p.shape, c, seed))
        return model

    def forward(self, tokens: Tensor, positions: Tensor, labels: "Tensor | None" = None) -> Tensor:
        """tokens [B, S] and their global positions [S], in any order that `attend` knows -> logits [B, S, vocab]; with `labels`
        [B, S] the sum of the tokens' cross-entropies instead (fp32 at least), without ever holding all logits."""
        x = self.hidden(tokens, positions)
        return (
            head_logits(x, self.head)
            if labels is None
            else head_loss(x, self.head, labels, chunk=self.loss_chunk)
        )

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[B, S, C]: what the output projection is applied to."""
        x = self.embed_tokens(tokens)  # under tp [B, S / tp, C]
        cos, sin = rope(positions, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return gather_sequence(self.norm(x))

    @property
    def head(self) -> Tensor:
        """[vocab, C], the output projection."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def initial_weight(name: str, shape: torch.Size, c: ModelConfig, seed: int) -> Tensor:
    """The initial value of a parameter, fp32 on the CPU: N(0, 0.02), what is added to the residual stream by all blocks together
    about as much, norms 1.  It depends on seed, name and shape alone: equal on any device, rank and mesh."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = (
        0.02 / (2 * c.layers) ** 0.5
        if name.endswith(("o_proj.weight", "down_proj.weight"))
        else 0.02
    )
    return seeded_normal(name, shape, seed) * std
