"""Data parallelism behind one interface: FSDP2, DDP, DeepSpeed ZeRO, or nothing on a lone rank.

What a trainer does is the same with each:

    engine = Engine(model, mesh, ...)
    for i in range(passes):
        with engine.accumulate(last=i == passes - 1):
            engine.backward(engine(tokens, positions, labels) / count)
    norm = engine.step(lr, clip)

Each rank's loss is (sum over its own tokens) / (number of tokens in the *whole* batch).  The loss
of the batch is then the sum over the ranks with other tokens, dp x cp, and so is the gradient of
every parameter, whichever tokens it saw: embeddings and final norm too.  The engines average
gradients over these ranks, so the loss is multiplied by their number before it is differentiated.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from apps.common.optim import clip_by_global_norm
from ringx.launch.mesh import Mesh

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Engine:
    """FSDP2 over shard x cp (and replicas of that), DDP over dp x cp, or nothing on one such rank.

    Args:
        model: on the meta device, its parameters in the dtype in which they are kept; already cut
            over tp.
        blocks: its submodules that FSDP2 gathers one at a time, in the order of the forward.
        weights: weights(name, shape) -> the full tensor of a parameter, the same on every rank.
        dtype: of the computation.  Where parameters are wider: with FSDP2 they are gathered in it
            and their gradients summed in `reduce_dtype`; otherwise autocast.
        allocating: a context around what allocates parameters and buckets of gradients, such as a
            dry run's FakeTensorMode.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        kind: str,
        *,
        blocks: Iterable[nn.Module],
        weights: Callable[[str, torch.Size], torch.Tensor] | None,
        make_optimizer: MakeOptimizer,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype = torch.float32,
        device: "torch.device | str" = "cpu",
        allocating: "contextlib.AbstractContextManager[Any] | None" = None,
    ):
        self.mesh = mesh
        self.device = torch.device(device)
        self.module = model
        self.ranks = mesh.data_mesh.size() if mesh.data_mesh is not None else 1
        kept_dtype = next(model.parameters()).dtype
        self._autocast = dtype if dtype != kept_dtype else None
        self._sharded = kind == "fsdp" and self.ranks > 1
        if self._sharded:
            policy = MixedPrecisionPolicy()
            if self._autocast:
                policy = MixedPrecisionPolicy(
                    param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
                )
                self._autocast = None
            self._shard(blocks, policy)
        with allocating or contextlib.nullcontext():
            model.to_empty(device=self.device)
            if weights is not None:
                fill_parameters(model, weights)
            self.model: Any = model
            if kind == "ddp" and self.ranks > 1:
                # No rank needs another's parameters: they are the same on every rank.
                self.model = nn.parallel.DistributedDataParallel(
                    model, process_group=mesh.data, init_sync=False
                )
        self.optimizer = make_optimizer(list(model.parameters()))

    def _shard(self, blocks: Iterable[nn.Module], policy: MixedPrecisionPolicy) -> None:
        """Has FSDP2 shard the parameters of each block, and then those outside all blocks."""
        for block in blocks:
            fully_shard(block, mesh=self.mesh.shard_mesh, mp_policy=policy)
        fully_shard(self.module, mesh=self.mesh.shard_mesh, mp_policy=policy)

    def __call__(self, *args: Any) -> torch.Tensor:
        if self._autocast:
            with torch.autocast(self.device.type, dtype=self._autocast):
                return self.model(*args)
        return self.model(*args)

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around a forward and its backward.

        Gradients are summed over the ranks in the last one of a step only."""
        if self._sharded:
            self.model.set_requires_gradient_sync(last)
        is_ddp = self.model is not self.module
        with self.model.no_sync() if is_ddp and not last else contextlib.nullcontext():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.ranks).backward()

    def step(self, lr: float, clip: float) -> torch.Tensor:
        """Clips, steps, forgets the gradients; returns the global gradient norm before clipping."""
        norm = clip_by_global_norm(self.module.parameters(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks with other tokens (x is overwritten)."""
        if self.ranks > 1:
            dist.all_reduce(x, group=self.mesh.data)
        return x

    def state(self) -> dict[str, Any]:
        """Parameters and optimizer under names that no mesh and no engine changes."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``, of a run on any mesh."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


@torch.no_grad()
def fill_parameters(model: nn.Module, weights: Callable[[str, torch.Size], torch.Tensor]) -> None:
    """Sets every parameter from its full value, of which each rank keeps its part.

    Local; one full parameter exists at a time."""
    for name, p in model.named_parameters():
        full = weights(name, p.shape)
        if isinstance(p, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                p.shape, p.device_mesh, p.placements
            )
            part = tuple(
                slice(start, start + size) for start, size in zip(offset, shape, strict=True)
            )
            p.to_local().copy_(full[part])
        else:
            p.copy_(full)
