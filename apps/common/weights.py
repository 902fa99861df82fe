"""First weights that are the same on any device, rank and mesh."""

import zlib

import torch


def seeded_normal(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """N(0, 1), fp32 on the CPU; depends on seed, name and shape alone."""
    mixed = zlib.crc32(f"{seed} {name}".encode())  # 32 bits: no more of a seed is heeded by the CPU's generator
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))
