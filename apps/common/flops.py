"""Floating-point operations: in which conventions they are counted, and what GPUs can do.

A matrix multiplication [m, k] @ [k, n] is 2 m k n operations; the backward is two such: 6 a token
for each parameter of a matrix that multiplies.  Attention adds, per layer, 12 heads head_dim seqlen
a token ("full": as if every token saw all; the convention of Chowdhery et al., arXiv 2204.02311,
and of torch.utils.flop_counter) or half of that ("causal": what a causal mask leaves).  What
activation checkpointing computes again is not work done: it is in neither.
"""

from dataclasses import dataclass

import torch

# Dense bf16 FLOP/s as the vendors state them, by a part of the device's name, special ones first.
PEAK = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM
    "H200": 989e12,
    "A100": 312e12,
    "MI250X": 191.5e12,  # one of the two dies of a card (383e12), each a device
    "MI300X": 1307e12,
}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, forward and backward, in the two conventions for attention."""

    full: float
    causal: float


def peak_flops(device: "torch.device | str") -> float | None:
    """Dense bf16 FLOP/s of a GPU by its vendor; None for a device that is not in PEAK."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK.items() if part in name), None)
