"""What a step of a ViT run costs each rank: see apps/common/estimate.py."""

import contextlib

import torch

from apps.common import estimate
from apps.common.config import TORCH_DTYPES
from apps.common.engine import Engine
from apps.common.estimate import StepEstimate, StepSpec
from ringx.launch.mesh import Mesh, Shape

from .config import Config
from .flops import flops_per_token, parameters
from .parallel import Attend, build


def estimate_step(config: Config, shape: Shape, rank: int = 0) -> StepEstimate:
    """``apps.common.estimate.estimate_step`` of a ViT.

    Args:
        config: must name the grid and the channels.
        shape: of the mesh.
        rank: whose costs are estimated.

    Raises:
        ValueError, RuntimeError: as there."""
    return estimate.estimate_step(config, shape, _step_spec, rank)


def _step_spec(config: Config) -> StepSpec:
    model = config.model
    points = model.patch**2

    def build_engine(mesh: Mesh, allocating: contextlib.AbstractContextManager) -> Engine:
        attend = Attend(config, mesh)
        attend.check = False
        return build(config, mesh, attend, weights=None, allocating=allocating)

    def make_batch(mesh: Mesh, samples: int) -> list[torch.Tensor]:
        """Inputs, positions, targets and weights, as ``ViT.forward`` takes them."""
        tokens = Attend(config, mesh).layout.size(mesh.cp_rank)
        dtype = torch.promote_types(TORCH_DTYPES[config.train.dtype], torch.float32)
        return [
            torch.zeros(samples, tokens, model.in_channels * points, dtype=dtype),
            torch.zeros(tokens, dtype=torch.long),
            torch.zeros(samples, tokens, model.out_channels * points, dtype=dtype),
            torch.zeros(tokens, points, dtype=dtype),
        ]

    return StepSpec(
        tokens=model.patch_grid().tokens,
        layers=model.layers,
        parameters=parameters(model).total,
        flops=flops_per_token(model),
        build=build_engine,
        batch=make_batch,
    )
