"""Operations and parameters of a ViT, in closed form; conventions: apps/common/flops.py."""

from dataclasses import dataclass

from apps.common.flops import Flops

from .config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    matmul: int  # of matrices that multiply activations


def parameters(c: ModelConfig) -> Parameters:
    """How many parameters such a model has."""
    points = c.patch**2
    matmul = c.layers * (4 * c.dim**2 + 2 * c.dim * c.hidden) + c.dim * points * (
        c.in_channels + c.out_channels
    )
    biases = c.layers * (5 * c.dim + c.hidden) + c.dim + c.out_channels * points
    norms = (2 * c.layers + 1) * 2 * c.dim
    places = c.patch_grid().tokens * c.dim if c.positions == "learned" else 0
    return Parameters(matmul + biases + norms + places, matmul)


def flops_per_token(c: ModelConfig) -> Flops:
    """Operations of a training step for each token.  Every token sees all: both conventions are the same here."""
    flops = 6 * parameters(c).matmul + 12 * c.layers * c.dim * c.patch_grid().tokens
    return Flops(flops, flops)
