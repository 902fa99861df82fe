"""Operations and parameters of a Llama, in closed form; conventions: apps/common/flops.py.

An embedding is looked up and does not count; the output projection does, even where it is the embedding.
"""

from dataclasses import dataclass

from apps.common.flops import Flops

from .config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    matmul: (
        int  # of matrices that multiply activations; a tied embedding does, as output projection
    )


def parameters(c: ModelConfig) -> Parameters:
    """How many parameters such a model has."""
    attention = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    layers = c.layers * (attention + 3 * c.dim * c.ffn)
    embedding, norms = c.vocab * c.dim, (2 * c.layers + 1) * c.dim
    return Parameters(layers + norms + embedding * (1 if c.tied else 2), layers + embedding)


def flops_per_token(c: ModelConfig, seqlen: int) -> Flops:
    """Operations of a training step for each token of sequences of `seqlen` tokens."""
    matmuls, attention = 6 * parameters(c).matmul, 12 * c.layers * c.heads * c.head_dim * seqlen
    return Flops(matmuls + attention, matmuls + attention / 2)
