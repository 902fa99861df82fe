"""A Llama cut over tp ranks by torch's own parallel styles, and everything of a run put together: model, mesh, engine.

Tensor parallelism cuts matrices and heads; between them, where norms and residuals work token by token, the tokens are cut over
the same ranks instead (sequence parallel, Korthikanti et al., arXiv 2205.05198).  Context parallelism has cut the sequence before:
a tp rank holds S / cp / tp tokens there, and S / cp tokens of some heads in attention.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import ringx
from apps.common.engine import Engine
from apps.common.optim import make_optimizer
from apps.common.zero import STAGES, ZeroEngine
from ringx.mesh import Mesh

from .config import DTYPES, Config
from .model import Llama, Memory, first_weight


def cut_over_tp(model: Llama, mesh: Mesh) -> None:
    """Cuts the model's parameters over the tp axis; local (nothing is there yet: the model is on the meta device)."""
    if mesh.shape.tp == 1 or mesh.device_mesh is None:
        return
    tokens, whole = Shard(1), Replicate()
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=tokens),
        "norm": SequenceParallel(),
    }
    if model.lm_head is not None:
        plan["lm_head"] = ColwiseParallel()
    for i in range(len(model.layers)):
        plan |= {
            f"layers.{i}.input_layernorm": SequenceParallel(),
            f"layers.{i}.self_attn": PrepareModuleInput(
                input_layouts=(tokens, None, None), desired_input_layouts=(whole, None, None)
            ),
            f"layers.{i}.post_attention_layernorm": SequenceParallel(use_local_output=True),  # local: tiles cut it further
            f"layers.{i}.mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,)),
        }
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"layers.{i}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"layers.{i}.{name}"] = RowwiseParallel(output_layouts=tokens)
    parallelize_module(model, mesh.device_mesh["tp"], plan)


class Attend:
    """ringx's attention over the cp group.  `check` compares each call with the other ranks' first: one small message."""

    def __init__(self, config: Config, mesh: Mesh):
        c = config.train
        self.check = True
        self.layout = ringx.Sharding(c.seqlen, mesh.shape.cp, c.layout)
        self._how: dict[str, Any] = {
            "group": mesh.cp,
            "algorithm": c.algorithm,
            "causal": True,
            "layout": self.layout,
            "kernel": c.kernel,
            "overlap": c.overlap,
        }

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = ringx.attention(q, k, v, check=self.check, **self._how)
        assert isinstance(out, torch.Tensor)
        return out


def memory_of(config: Config) -> Memory:
    c = config.train
    return Memory(c.checkpointing, c.loss_chunk, c.mlp_tiles, c.offload)


def build(
    config: Config,
    mesh: Mesh,
    attend: Callable,
    device: "torch.device | str" = "cpu",
    weights: "Callable[[str, torch.Size], torch.Tensor] | str | None" = "new",
    allocating: "contextlib.AbstractContextManager | None" = None,
) -> Engine:
    """Model, optimizer and data parallelism of this rank; collective.

    weights: "new" for those of the seed, a function (name, shape) -> full tensor, or None to leave them as they come.
    allocating: as of Engine."""
    c = config.train
    dtype = DTYPES[c.dtype]
    model = Llama.empty(config.model, attend, memory_of(config), torch.promote_types(dtype, torch.float32))
    cut_over_tp(model, mesh)
    if weights == "new":
        weights = lambda name, shape: first_weight(name, shape, config.model, c.seed)  # noqa: E731
    assert not isinstance(weights, str)
    zero = config.mesh.dp_engine in STAGES and mesh.data_mesh is not None and mesh.data_mesh.size() > 1
    return (ZeroEngine if zero else Engine)(
        model,
        mesh,
        config.mesh.dp_engine,
        blocks=model.layers,
        weights=weights,
        make_optimizer=lambda params: make_optimizer(
            c.optimizer, params, lr=c.lr, weight_decay=c.weight_decay, betas=(c.beta1, c.beta2), eps=c.eps
        ),
        dtype=dtype,
        reduce_dtype=DTYPES[c.reduce_dtype],
        device=device,
        allocating=allocating,
    )
