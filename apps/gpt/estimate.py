"""What a step of a GPT run costs each rank: see apps/common/estimate.py."""

import contextlib

import torch

from apps.common import estimate
from apps.common.engine import Engine
from apps.common.estimate import StepEstimate
from ringx.launch.mesh import Mesh, Shape

from .config import Config
from .flops import flops_per_token, parameters
from .parallel import Attend, build


def estimate_step(config: Config, shape: Shape, rank: int = 0) -> StepEstimate:
    """``apps.common.estimate.estimate_step`` of a Llama."""
    return estimate.estimate_step(config, shape, _subject, rank)


def _subject(config: Config) -> estimate.StepSpec:
    c = config.train

    def start(mesh: Mesh, allocating: contextlib.AbstractContextManager) -> Engine:
        attend = Attend(config, mesh)
        attend.check = False
        return build(config, mesh, attend, weights=None, allocating=allocating)

    def batch(mesh: Mesh, samples: int) -> list[torch.Tensor]:
        size = (samples, Attend(config, mesh).layout.size(mesh.cp_rank))
        return [
            torch.zeros(n, dtype=torch.long) for n in (size, size[1:], size)
        ]  # tokens, positions, labels

    flops = flops_per_token(config.model, c.seqlen)
    return estimate.StepSpec(
        c.seqlen, config.model.layers, parameters(config.model).total, flops, start, batch
    )
