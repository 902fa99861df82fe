"""What all models here use: attention over the cp group, an engine over ranks with other data."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import ringx
from ringx.launch.mesh import Mesh

from .config import TORCH_DTYPES, RunConfig, Training
from .engine import Engine
from .optim import make_optimizer
from .zero import STAGES, ZeroEngine


class Attend:
    """ringx's attention over the cp group, of sequences of `seqlen` tokens.

    check: whether each call is first compared with the other ranks', by one small message."""

    def __init__(self, train: Training, mesh: Mesh, *, seqlen: int, causal: bool):
        self.check = True
        self.layout = ringx.Sharding(seqlen, mesh.shape.cp, train.layout)
        self._options: dict[str, Any] = {
            "group": mesh.cp,
            "algorithm": train.algorithm,
            "causal": causal,
            "layout": self.layout,
            "kernel": train.kernel,
            "overlap": train.overlap,
        }

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = ringx.attention(q, k, v, check=self.check, **self._options)
        assert isinstance(out, torch.Tensor)
        return out


def make_engine(
    config: RunConfig,
    model: nn.Module,
    mesh: Mesh,
    *,
    blocks: Iterable[nn.Module],
    weights: "Callable[[str, torch.Size], torch.Tensor] | None",
    device: "torch.device | str" = "cpu",
    allocating: "contextlib.AbstractContextManager | None" = None,
) -> Engine:
    """The engine that a configuration asks for; collective.

    The other arguments are the Engine's."""
    train = config.train

    def optimizer_for(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(
            train.optimizer,
            params,
            lr=train.lr,
            weight_decay=train.weight_decay,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
        )

    has_peers = mesh.data_mesh is not None and mesh.data_mesh.size() > 1
    engine_class = ZeroEngine if config.mesh.dp_engine in STAGES and has_peers else Engine
    return engine_class(
        model,
        mesh,
        config.mesh.dp_engine,
        blocks=blocks,
        weights=weights,
        make_optimizer=optimizer_for,
        dtype=TORCH_DTYPES[train.dtype],
        reduce_dtype=TORCH_DTYPES[train.reduce_dtype],
        device=device,
        allocating=allocating,
    )


def kept_dtype(train: Training) -> torch.dtype:
    """In which parameters, gradients and optimizer are kept."""
    return torch.promote_types(TORCH_DTYPES[train.dtype], torch.float32)
