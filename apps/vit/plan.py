"""What a step of a ViT run costs each rank: see apps/common/estimate.py."""

import contextlib

import torch

from apps.common import estimate
from apps.common.config import DTYPES
from apps.common.engine import Engine
from apps.common.estimate import Plan
from ringx.launch.mesh import Mesh, Shape

from .config import Config
from .flops import flops_per_token, parameters
from .parallel import Attend, build


def make_plan(config: Config, shape: Shape, rank: int = 0) -> Plan:
    """``apps.common.estimate.make_plan`` of a ViT, whose configuration must name the grid and the channels."""
    return estimate.make_plan(config, shape, _subject, rank)


def _subject(config: Config) -> estimate.Subject:
    c = config.model

    def start(mesh: Mesh, allocating: contextlib.AbstractContextManager) -> Engine:
        attend = Attend(config, mesh)
        attend.check = False
        return build(config, mesh, attend, weights=None, allocating=allocating)

    def batch(mesh: Mesh, samples: int) -> list[torch.Tensor]:
        tokens, points = Attend(config, mesh).layout.size(mesh.cp_rank), c.patch**2
        kind = torch.promote_types(DTYPES[config.train.dtype], torch.float32)
        return [
            torch.zeros(samples, tokens, c.in_channels * points, dtype=kind),
            torch.zeros(tokens, dtype=torch.long),
            torch.zeros(samples, tokens, c.out_channels * points, dtype=kind),
            torch.zeros(tokens, points, dtype=kind),
        ]

    return estimate.Subject(
        c.patches().tokens, c.layers, parameters(c).total, flops_per_token(c), start, batch
    )
