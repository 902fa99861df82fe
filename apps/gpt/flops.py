"""Floating-point operations of a training step, in closed form, and what GPUs can do.

A matrix multiplication [m, k] @ [k, n] is 2 m k n operations; the backward is two such.  Per token that is 6 for each parameter
of a matrix that multiplies: not for an embedding, which is looked up, but for the output projection even where it is the embedding.
Attention adds, per layer, 12 heads head_dim seqlen a token ("full": as if every token saw all; the convention of Chowdhery et al.,
arXiv 2204.02311, and of torch.utils.flop_counter) or half of that ("causal": what the mask leaves).  What activation checkpointing
computes again is not work done: it is in neither.
"""

from dataclasses import dataclass

import torch

from .config import ModelConfig

PEAK = {  # dense bf16 FLOP/s as the vendors state them, by a part of the device's name, special ones first
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM
    "H200": 989e12,
    "A100": 312e12,
    "MI250X": 191.5e12,  # one of the two dies of a card (383e12), each a device
    "MI300X": 1307e12,
}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    matmul: int  # of matrices that multiply activations; a tied embedding does, as output projection


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, forward and backward, in the two conventions for attention."""

    full: float
    causal: float


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


def peak_flops(device: "torch.device | str") -> float | None:
    """Dense bf16 FLOP/s of a GPU by its vendor; None for a device that is not in PEAK."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK.items() if part in name), None)
