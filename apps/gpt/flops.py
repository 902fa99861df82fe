"""Operations and parameters of a Llama, in closed form; conventions: apps/common/flops.py.

An embedding is looked up and does not count; the output projection does, even where it is the
embedding.
"""

from dataclasses import dataclass

from apps.common.flops import Flops

from .config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    # of matrices that multiply activations; a tied embedding does, as output projection
    matmul: int


def parameters(config: ModelConfig) -> Parameters:
    """How many parameters such a model has."""
    attention = config.dim * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    mlp = 3 * config.dim * config.ffn
    layers = config.layers * (attention + mlp)
    norms = (2 * config.layers + 1) * config.dim
    embedding = config.vocab * config.dim
    embeddings = embedding if config.tied else 2 * embedding
    return Parameters(total=layers + norms + embeddings, matmul=layers + embedding)


def flops_per_token(config: ModelConfig, seqlen: int) -> Flops:
    """Operations of a training step for each token of sequences of `seqlen` tokens."""
    matmuls = 6 * parameters(config).matmul
    attention = 12 * config.layers * config.heads * config.head_dim * seqlen
    return Flops(matmuls + attention, matmuls + attention / 2)
