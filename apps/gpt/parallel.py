"""A Llama cut over tp ranks by torch's own parallel styles, and everything of a run put together: model, mesh, engine.

Tensor parallelism cuts matrices and heads; between them, where norms and residuals work token by token, the tokens are cut over
the same ranks instead (sequence parallel, Korthikanti et al., arXiv 2205.05198).  Context parallelism has cut the sequence before:
a tp rank holds S / cp / tp tokens there, and S / cp tokens of some heads in attention.
"""

import contextlib
from collections.abc import Callable

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
from ringx.launch.mesh import Mesh

from .config import Config
from .model import Llama, initial_weight


def apply_tensor_parallel(model: Llama, mesh: Mesh) -> None:
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
            f"layers.{i}.post_attention_layernorm": SequenceParallel(
                use_local_output=True
            ),  # local: tiles cut it further
            f"layers.{i}.mlp": PrepareModuleInput(
                input_layouts=(tokens,), desired_input_layouts=(whole,)
            ),
        }
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            plan[f"layers.{i}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"layers.{i}.{name}"] = RowwiseParallel(output_layouts=tokens)
    parallelize_module(model, mesh.device_mesh["tp"], plan)


class Attend(SequenceAttend):
    """Causal attention over a configuration's sequences."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config.train, mesh, seqlen=config.train.seqlen, causal=True)


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
    model = Llama.empty(
        config.model, attend, ActivationMemory.from_config(c), c.loss_chunk, dtype=kept_dtype(c)
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
