"""A ViT cut over tp ranks by torch's own parallel styles, and everything of a run put together: model, mesh, engine.

As in apps/gpt/parallel.py, tensor parallelism cuts matrices and heads, and between them the tokens.
"""

import contextlib
from collections.abc import Callable

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from apps.common.engine import Engine
from apps.common.memory import ActivationMemory
from apps.common.parallel import Attend as SequenceAttend
from apps.common.parallel import kept_dtype, make_engine
from ringx.launch.mesh import Mesh

from .config import Config
from .model import ViT, initial_weight


def apply_tensor_parallel(model: ViT, mesh: Mesh) -> None:
    """Cuts the model's parameters over the tp axis; local (nothing is there yet: the model is on the meta device)."""
    if mesh.shape.tp == 1 or mesh.device_mesh is None:
        return
    tokens, whole = Shard(1), Replicate()
    plan: dict[str, ParallelStyle] = {
        "embed": ColwiseParallel(output_layouts=tokens),
        "norm": SequenceParallel(use_local_output=True),
        "head": RowwiseParallel(input_layouts=tokens, output_layouts=whole),
    }
    if model.config.positions == "learned":
        plan["places.table"] = ColwiseParallel(output_layouts=tokens)
    else:
        plan["places"] = PrepareModuleOutput(output_layouts=whole, desired_output_layouts=tokens)
    for i in range(len(model.layers)):
        plan |= {
            f"layers.{i}.norm_attn": SequenceParallel(),
            f"layers.{i}.attn": PrepareModuleInput(
                input_layouts=(tokens, None), desired_input_layouts=(whole, None)
            ),
            f"layers.{i}.norm_mlp": SequenceParallel(
                use_local_output=True
            ),  # local: tiles cut it further
            f"layers.{i}.mlp": PrepareModuleInput(
                input_layouts=(tokens,), desired_input_layouts=(whole,)
            ),
        }
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj"):
            plan[f"layers.{i}.{name}"] = ColwiseParallel()
        for name in ("attn.o_proj", "mlp.down_proj"):
            plan[f"layers.{i}.{name}"] = RowwiseParallel(output_layouts=tokens)
    parallelize_module(model, mesh.device_mesh["tp"], plan)


class Attend(SequenceAttend):
    """Attention of every token to all tokens of a configuration's grid."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config.train, mesh, seqlen=config.model.patch_grid().tokens, causal=False)


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
    model = ViT.empty(
        config.model, attend, ActivationMemory.from_config(c), mesh.shape.tp, dtype=kept_dtype(c)
    )
    apply_tensor_parallel(model, mesh)
    if weights == "new":
        weights = lambda name, shape: initial_weight(name, shape, config.model, c.seed)  # noqa: E731
    assert not isinstance(weights, str)
    return make_engine(
        config,
        model,
        mesh,
        blocks=model.layers,
        weights=weights,
        device=device,
        allocating=allocating,
    )
