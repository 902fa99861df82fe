"""Configuration: frozen dataclasses, checked when made, and the presets."""

import math
from dataclasses import dataclass, fields

import torch

import ringx
from ringx.kernel import KERNELS
from ringx.layout import LAYOUTS, name_of

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
IGNORE = -100  # a label that carries no loss


def _at_least(config, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        whole = {f.name: f.type for f in fields(config)}[name] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be {'an integer' if whole else 'a finite number'}.")
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama."""

    dim: int  # width of the residual stream
    layers: int
    heads: int
    kv_heads: int
    ffn: int  # width of the SwiGLU
    vocab: int = 256  # bytes
    head_dim: int = 0  # 0: dim / heads
    rope_base: float = 500_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the output projection is the embedding

    def __post_init__(self):
        _at_least(self, 1, "dim", "layers", "heads", "kv_heads", "ffn", "vocab")
        if self.head_dim == 0 and self.dim % self.heads == 0:
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} (dim={self.dim}, heads={self.heads}): RoPE needs an even head size.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained.  `dtype` is the dtype of activations; bf16 keeps parameters, gradients and optimizer in fp32."""

    seqlen: int  # global, whatever the number of ranks
    batch: int  # sequences a step
    steps: int
    lr: float
    warmup: int = 0  # steps
    floor: float = 0.1  # last learning rate / lr
    weight_decay: float = 0.1  # on matrices, not on norms
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    dtype: str = "fp32"
    seed: int = 0
    algorithm: str = "ringx3"
    layout: str = "zigzag"
    kernel: str = "auto"
    overlap: bool = True

    def __post_init__(self):
        _at_least(self, 1, "seqlen", "batch", "steps")
        _at_least(self, 0, "lr", "warmup", "floor", "weight_decay", "beta1", "beta2", "eps", "clip", "seed")
        for name in ("lr", "eps"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 must be greater than 0.")
        for name in ("beta1", "beta2", "floor"):
            if getattr(self, name) > 1 - (name != "floor") * 1e-12:
                raise ValueError(f"{name}={getattr(self, name)} must be {'at most' if name == 'floor' else 'below'} 1.")
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed} must be below 2**31.")
        name_of(self.dtype, DTYPES, "dtype")
        name_of(self.algorithm, ringx.algorithms(), "algorithm")
        name_of(self.layout, LAYOUTS, "layout")
        name_of(self.kernel, [*KERNELS, "auto"], "kernel")


@dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    train: TrainConfig


PRESETS = {
    c.name: c
    for c in (
        Config(  # what `make demo` trains: 20 steps in seconds on one core, even in fp64
            "tiny",
            ModelConfig(dim=128, layers=3, heads=4, kv_heads=2, ffn=256),
            TrainConfig(seqlen=512, batch=2, steps=20, lr=2e-3, warmup=5),
        ),
    )
}
