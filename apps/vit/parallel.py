"""A ViT sharded over tp ranks by torch's own parallel styles, and the engine of a run.

As in apps/gpt/parallel.py, tensor parallelism shards matrices and heads, and between them the
tokens.
"""

import contextlib
from functools import partial
from typing import Literal

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
from apps.common.weights import ReadWeight
from ringx.launch.mesh import Mesh

from .config import Config
from .model import AttentionFunction, ViT, initial_weight

TOKENS = Shard(1)  # [B, S, C] with a part of the tokens on each tp rank
WHOLE = Replicate()


def apply_tensor_parallel(model: ViT, mesh: Mesh) -> None:
    """Shards the model's parameters over the tp axis.

    Local: the model is on the meta device, where no parameter has values yet."""
    if mesh.shape.tp == 1 or mesh.device_mesh is None:
        return
    plan: dict[str, ParallelStyle] = {
        "embed": ColwiseParallel(output_layouts=TOKENS),
        "norm": SequenceParallel(use_local_output=True),
        "head": RowwiseParallel(input_layouts=TOKENS, output_layouts=WHOLE),
    }
    if model.config.positions == "learned":
        plan["places.table"] = ColwiseParallel(output_layouts=TOKENS)
    else:
        plan["places"] = PrepareModuleOutput(output_layouts=WHOLE, desired_output_layouts=TOKENS)
    for i in range(len(model.layers)):
        for name, style in _block_plan().items():
            plan[f"layers.{i}.{name}"] = style
    parallelize_module(model, mesh.device_mesh["tp"], plan)


def _block_plan() -> dict[str, ParallelStyle]:
    """The styles of a block's modules."""
    return {
        "norm_attn": SequenceParallel(),
        "attn": PrepareModuleInput(
            input_layouts=(TOKENS, None), desired_input_layouts=(WHOLE, None)
        ),
        # A local tensor, because tiles of the MLP split it further
        "norm_mlp": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(input_layouts=(TOKENS,), desired_input_layouts=(WHOLE,)),
        "attn.q_proj": ColwiseParallel(),
        "attn.k_proj": ColwiseParallel(),
        "attn.v_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "attn.o_proj": RowwiseParallel(output_layouts=TOKENS),
        "mlp.down_proj": RowwiseParallel(output_layouts=TOKENS),
    }


class Attend(SequenceAttend):
    """Attention of every token to all tokens of a configuration's grid."""

    def __init__(self, config: Config, mesh: Mesh):
        tokens = config.model.patch_grid().tokens
        super().__init__(config.train, mesh, seqlen=tokens, causal=False)


def build(
    config: Config,
    mesh: Mesh,
    attend: AttentionFunction,
    device: "torch.device | str" = "cpu",
    weights: "ReadWeight | Literal['new'] | None" = "new",
    allocating: "contextlib.AbstractContextManager | None" = None,
) -> Engine:
    """Model, optimizer and data parallelism of this rank; collective.

    Args:
        config: that of the run, with the sizes of its data.
        mesh: the ranks.
        attend: the model's attention.
        device: of the parameters.
        weights: (name, shape) -> the full tensor of a parameter; "new" for the initial ones of the
            configuration's seed; None to leave the parameters as they are allocated.
        allocating: as of Engine."""
    train = config.train
    model = ViT.empty(
        config.model,
        attend,
        memory=ActivationMemory.from_config(train),
        multiple=mesh.shape.tp,
        dtype=kept_dtype(train),
    )
    apply_tensor_parallel(model, mesh)
    if weights == "new":
        weights = partial(initial_weight, config=config.model, seed=train.seed)
    return make_engine(
        config,
        model,
        mesh,
        blocks=model.layers,
        weights=weights,
        device=device,
        allocating=allocating,
    )
