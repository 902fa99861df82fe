"""What a step of a ViT run costs each rank: see apps/common/estimate.py."""

import contextlib

import torch

from apps.common import estimate
from apps.common.config import TORCH_DTYPES
from apps.common.engine import Engine
from apps.common.estimate import StepEstimate
from ringx.launch.mesh import Mesh, Shape

from .config import Config
from .flops import flops_per_token, parameters
from .parallel import Attend, build


def estimate_step(config: Config, shape: Shape, rank: int = 0) -> StepEstimate:
    """``apps.common.estimate.estimate_step`` of a ViT, whose configuration must name the grid and the channels."""
    return estimate.estimate_step(config, shape, _subject, rank)


def _subject(config: Config) -> estimate.StepSpec:
    c = config.model

    def start(mesh: Mesh, allocating: contextlib.AbstractContextManager) -> Engine:
        attend = Attend(config, mesh)
        attend.check = False
        return build(config, mesh, attend, weights=None, allocating=allocating)

    def batch(mesh: Mesh, samples: int) -> list[torch.Tensor]:
        tokens, points = Attend(config, mesh).layout.size(mesh.cp_rank), c.patch**2
        kind = torch.promote_types(TORCH_DTYPES[config.train.dtype], torch.float32)
        return [
            torch.zeros(samples, tokens, c.in_channels * points, dtype=kind),
            torch.zeros(tokens, dtype=torch.long),
            torch.zeros(samples, tokens, c.out_channels * points, dtype=kind),
            torch.zeros(tokens, points, dtype=kind),
        ]

    return estimate.StepSpec(
        c.patch_grid().tokens, c.layers, parameters(c).total, flops_per_token(c), start, batch
    )
