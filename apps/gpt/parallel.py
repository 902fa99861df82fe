"""A Llama cut over tp ranks by torch's own parallel styles, and the engine of a run.

Tensor parallelism cuts matrices and heads.  Between them, where norms and residuals work token by
token, the tokens are cut over the same ranks instead (sequence parallel, Korthikanti et al.,
arXiv 2205.05198).  Context parallelism has cut the sequence before: between attention and MLP a
tp rank holds S / cp / tp tokens, and inside them S / cp tokens of some heads.
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
from .model import AttentionFunction, Llama, initial_weight

TOKENS = Shard(1)  # [B, S, C] with a part of the tokens on each tp rank
WHOLE = Replicate()


def apply_tensor_parallel(model: Llama, mesh: Mesh) -> None:
    """Cuts the model's parameters over the tp axis.

    Local: the model is on the meta device, where no parameter has values yet."""
    if mesh.shape.tp == 1 or mesh.device_mesh is None:
        return
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=WHOLE, output_layouts=TOKENS),
        "norm": SequenceParallel(),
    }
    if model.lm_head is not None:
        plan["lm_head"] = ColwiseParallel()
    for i in range(len(model.layers)):
        for name, style in _block_plan().items():
            plan[f"layers.{i}.{name}"] = style
    parallelize_module(model, mesh.device_mesh["tp"], plan)


def _block_plan() -> dict[str, ParallelStyle]:
    """The styles of a block's modules."""
    return {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(TOKENS, None, None), desired_input_layouts=(WHOLE, None, None)
        ),
        # A local tensor, because tiles of the MLP cut it further
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(input_layouts=(TOKENS,), desired_input_layouts=(WHOLE,)),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=TOKENS),
        "mlp.down_proj": RowwiseParallel(output_layouts=TOKENS),
    }


class Attend(SequenceAttend):
    """Causal attention over a configuration's sequences."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config.train, mesh, seqlen=config.train.seqlen, causal=True)


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
        config: that of the run.
        mesh: the ranks.
        attend: the model's attention.
        device: of the parameters.
        weights: (name, shape) -> the full tensor of a parameter; "new" for the initial ones of the
            configuration's seed; None to leave the parameters as they are allocated.
        allocating: as of Engine."""
    train = config.train
    model = Llama.empty(
        config.model,
        attend,
        ActivationMemory.from_config(train),
        train.loss_chunk,
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
