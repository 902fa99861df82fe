"""What a step of a GPT run costs each rank: see apps/common/estimate.py."""

import contextlib

import torch

from apps.common import estimate
from apps.common.engine import Engine
from apps.common.estimate import StepEstimate, StepSpec
from ringx.launch.mesh import Mesh, Shape

from .config import Config
from .flops import flops_per_token, parameters
from .parallel import Attend, build


def estimate_step(config: Config, shape: Shape, rank: int = 0) -> StepEstimate:
    """``apps.common.estimate.estimate_step`` of a Llama.

    Args:
        config: that of the run.
        shape: of the mesh.
        rank: whose costs are estimated.

    Raises:
        ValueError, RuntimeError: as there."""
    return estimate.estimate_step(config, shape, _step_spec, rank)


def _step_spec(config: Config) -> StepSpec:
    seqlen = config.train.seqlen

    def build_engine(mesh: Mesh, allocating: contextlib.AbstractContextManager) -> Engine:
        attend = Attend(config, mesh)
        attend.check = False
        return build(config, mesh, attend, weights=None, allocating=allocating)

    def make_batch(mesh: Mesh, samples: int) -> list[torch.Tensor]:
        """Tokens, positions and labels, as ``Llama.forward`` takes them."""
        local_tokens = Attend(config, mesh).layout.size(mesh.cp_rank)
        return [
            torch.zeros(samples, local_tokens, dtype=torch.long),
            torch.zeros(local_tokens, dtype=torch.long),
            torch.zeros(samples, local_tokens, dtype=torch.long),
        ]

    return StepSpec(
        tokens=seqlen,
        layers=config.model.layers,
        parameters=parameters(config.model).total,
        flops=flops_per_token(config.model, seqlen),
        build=build_engine,
        batch=make_batch,
    )
