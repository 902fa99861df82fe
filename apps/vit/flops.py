"""Operations and parameters of a ViT, in closed form; conventions: apps/common/flops.py."""

from dataclasses import dataclass

from apps.common.flops import Flops

from .config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    matmul: int  # of matrices that multiply activations


def parameters(config: ModelConfig) -> Parameters:
    """How many parameters a model of this shape has."""
    dim, points = config.dim, config.patch**2

    block_matmul = 4 * dim**2 + 2 * dim * config.hidden
    block_biases = 5 * dim + config.hidden
    embed_and_head = dim * points * (config.in_channels + config.out_channels)

    matmul = config.layers * block_matmul + embed_and_head
    biases = config.layers * block_biases + dim + config.out_channels * points
    norms = (2 * config.layers + 1) * 2 * dim
    total = matmul + biases + norms
    if config.positions == "learned":
        total += config.patch_grid().tokens * dim
    return Parameters(total=total, matmul=matmul)


def flops_per_token(config: ModelConfig) -> Flops:
    """Operations of a training step for each token.

    Every token sees all tokens: both conventions are the same here."""
    attention = 12 * config.layers * config.dim * config.patch_grid().tokens
    flops = 6 * parameters(config).matmul + attention
    return Flops(full=flops, causal=flops)
