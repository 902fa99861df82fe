"""A Llama 3.

It knows nothing of ranks: it is given the *global* position of each token it sees, and an
attention.  Parameters are named as in Hugging Face's LlamaForCausalLM (without its leading
"model."), and rotated as there.

Shapes: B sequences, S tokens of each on this rank, C = dim, H query heads, Hkv key and value heads,
D = head_dim.  Under tensor parallelism a rank has H / tp heads, and between attention and MLP
S / tp tokens.
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

# q [B, S, H, D], k and v [B, S, Hkv, D] -> [B, S, H, D], causal
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
KEEP_ALL = ActivationMemory()  # no activation is computed again


def rope_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """[D/2] fp64: radians a token.

    With rope_factor > 1 they are stretched as in Llama 3.1: a frequency that turns less than
    rope_low times within rope_original tokens is divided by the factor, one of more than rope_high
    is left as it is, and between them the two are mixed linearly."""
    exponents = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    )
    frequencies = config.rope_base**-exponents
    if config.rope_factor == 1:
        return frequencies
    turns = config.rope_original * frequencies / (2 * math.pi)
    unstretched = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    return unstretched * frequencies + (1 - unstretched) * frequencies / config.rope_factor


def rope(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [S, 1, D/2] of tokens at the global `positions` [S].

    Angles are formed in fp64: at position 1,000,000 those of fp32 are off by 0.03."""
    frequencies = rope_frequencies(config, positions.device)
    angles = positions.to(torch.float64)[:, None] * frequencies  # [S, D/2]
    angles = angles[:, None]  # the same for all heads
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, heads, D] with each pair (x[i], x[i + D/2]) turned by its token's angle."""
    first, second = x.chunk(2, dim=-1)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    return torch.cat((turned_first, turned_second), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """torch's, with the weight in the dtype of the input."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections and rotation around an attention."""

    def __init__(self, config: ModelConfig, attend: AttentionFunction):
        super().__init__()
        self.head_dim = config.head_dim
        self.attend = attend
        self.q_proj = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, H, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, Hkv, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, Hkv, D]
        out = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # [B, S, H, D]
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, attend: AttentionFunction, memory: ActivationMemory):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.memory = memory

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        return self.memory.block(self._layers, x, cos, sin)

    def _layers(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return self.memory.add_mlp(x, self.mlp, self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama 3.

    Args:
        config: its shape.
        attend: the attention of all layers.
        memory: what its blocks keep for the backward.
        loss_chunk: tokens whose logits exist at once when the loss is formed."""

    def __init__(
        self,
        config: ModelConfig,
        attend: AttentionFunction,
        memory: ActivationMemory = KEEP_ALL,
        loss_chunk: int = 1024,
    ):
        super().__init__()
        self.config = config
        self.loss_chunk = loss_chunk
        self.embed_tokens = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config, attend, memory) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        attend: AttentionFunction,
        *args: Any,
        dtype: torch.dtype = torch.float32,
    ) -> "Llama":
        """A model without memory for its parameters (meta device), to be cut over ranks first.

        Args:
            args: memory and loss_chunk, as of ``Llama``."""
        with torch.device("meta"):
            return cls(config, attend, *args).to(dtype)

    @classmethod
    def make(
        cls, config: ModelConfig, attend: AttentionFunction, *, seed: int, dtype: torch.dtype
    ) -> "Llama":
        """A new model in this process alone."""
        model = cls.empty(config, attend, dtype=dtype).to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(initial_weight(name, parameter.shape, config, seed))
        return model

    def forward(self, tokens: Tensor, positions: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or the sum of the tokens' losses.

        Args:
            tokens: [B, S].
            positions: [S], global, in any order that the attention supports.
            labels: [B, S], the token after each.

        Returns:
            Without labels the logits [B, S, vocab].  With them the sum of the tokens'
            cross-entropies, fp32 at least, without ever holding all logits."""
        x = self.hidden(tokens, positions)
        if labels is None:
            return head_logits(x, self.head)
        return head_loss(x, self.head, labels, chunk=self.loss_chunk)

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[B, S, C]: what the output projection is applied to."""
        x = self.embed_tokens(tokens)  # [B, S, C], under tp [B, S / tp, C]
        cos, sin = rope(positions, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return gather_sequence(self.norm(x))

    @property
    def head(self) -> Tensor:
        """[vocab, C], the output projection."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of a parameter, fp32 on the CPU.

    Matrices are drawn from N(0, 0.02); those that add to the residual stream from a narrower
    distribution, so that all blocks together add about as much; norms are 1.  It depends on seed,
    name and shape alone: it is equal on any device, rank and mesh."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = 0.02
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std = 0.02 / (2 * config.layers) ** 0.5
    return seeded_normal(name, shape, seed) * std
