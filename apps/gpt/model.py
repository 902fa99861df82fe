"""A Llama.  It knows nothing of ranks: it is given the *global* position of each token it sees, and an attention.

Parameters are named as in Hugging Face's LlamaForCausalLM (without its leading "model."), and rotated as there.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import IGNORE, ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, H, D], k and v [B, S, Hkv, D] -> [B, S, H, D], causal


def rope(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [S, 1, D/2] of tokens at the global `positions` [S].

    Angles are formed in fp64: at position 1,000,000 those of fp32 are off by 0.03."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angle = (positions.to(torch.float64)[:, None] * frequency)[:, None]
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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, attend: Attend):
        super().__init__()
        self.head_dim, self.attend = c.head_dim, attend
        self.q_proj = nn.Linear(c.dim, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # [B, S, H, D]
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
    def __init__(self, c: ModelConfig, attend: Attend):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c, attend)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, c: ModelConfig, attend: Attend):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(Block(c, attend) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.lm_head = None if c.tied else nn.Linear(c.dim, c.vocab, bias=False)

    @classmethod
    def make(cls, c: ModelConfig, attend: Attend, *, seed: int, dtype: torch.dtype, device: "torch.device | str") -> "Llama":
        """A new model; equal seeds give equal weights, rounded to dtype, on any device and rank.  (Made without memory first:
        neither torch's own initialisation nor its global generator is used.)"""
        with torch.device("meta"):
            model = cls(c, attend)
        model.to(dtype).to_empty(device=device)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, 0.02); what is added to the residual stream, by all blocks together, about as much."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                std = 0.02 / (2 * self.config.layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * std)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, S] and their global positions [S], in any order that `attend` knows -> logits [B, S, vocab]."""
        x = self.embed_tokens(tokens)  # [B, S, C]
        cos, sin = rope(positions, self.config.head_dim, self.config.rope_base, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(self.norm(x), head)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of logits [B, S, vocab] against labels [B, S], in fp32 at least; IGNORE is skipped."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
