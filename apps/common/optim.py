"""Optimizers by name, and gradient clipping, for plain tensors and DTensors on any mix of meshes.

AdamW is torch's own.  LAMB is written here: torch has none, and the fused ones of apex and
DeepSpeed know neither shards nor CPUs; these are used only where they are asked for by name.
Everything a norm needs from other ranks travels together: one all-reduce per process group over
which something is sharded, however many parameters there are.
"""

import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ringx.checks import require_name

OPTIMIZERS = {
    "adamw": "torch's AdamW (Loshchilov and Hutter, arXiv 1711.05101)",
    "lamb": "LAMB (You et al., arXiv 1904.00962) for plain, FSDP2 and tensor-parallel parameters",
    "lamb_apex": "apex.optimizers.FusedLAMB: whole parameters on a GPU; overwrites gradients",
    "lamb_deepspeed": "deepspeed.ops.lamb.FusedLamb: whole parameters on a GPU",
}
# Devices whose fused AdamW the tests have run, in fp64 too (cuda: ROCm as well).
FUSED = ("cpu", "cuda")


def make_optimizer(
    name: str,
    params: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """The optimizer `name` (of OPTIMIZERS) for those of `params` that require a gradient.

    Weight decay is for parameters of two or more dimensions: biases and norms are left alone.
    There are two parameter groups, with and without decay; more where parameters lie on several
    meshes (a fused step takes one mesh at a time), so change every group's "lr".  Call
    ``clip_by_global_norm`` before each step (with 0 to leave sizes alone): it also brings gradients
    into their parameters' placements.

    lamb_apex and lamb_deepspeed are set up so that they clip nothing and bound no trust ratio.
    They have not been run by the tests, which need no GPU.  lamb_apex then follows the same formula
    as lamb; DeepSpeed corrects the bias in the step size, decay and eps included, so its first
    steps differ.

    Args:
        lr: learning rate, at least 0.
        weight_decay: decoupled, a factor of lr, at least 0.
        betas: decay per step of the gradient's first and second moments, each in [0, 1).
        eps: added to the root of the second moment, greater than 0.

    Raises:
        ValueError: an unknown name, a number out of range, no parameters, or a fused LAMB that is
            not installed or cannot take these parameters."""
    require_name(name, OPTIMIZERS, "optimizer")
    _expect_hyperparameters(lr, weight_decay, betas, eps)
    trained = [p for p in params if p.requires_grad]
    if not trained:
        raise ValueError(
            "params holds no parameter that requires a gradient; give the model's parameters."
        )
    groups = _parameter_groups(trained, weight_decay)
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps}
    if name == "adamw":
        fused = all(p.device.type in FUSED and p.is_floating_point() for p in trained)
        return torch.optim.AdamW(groups, fused=fused, **options)
    if name == "lamb":
        return Lamb(groups, **options)
    return _fused_lamb(name, trained, groups, options)


def _expect_hyperparameters(
    lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> None:
    """ValueError naming the first that is out of range."""
    _expect(math.isfinite(lr) and lr >= 0, "lr", lr, "a number of at least 0")
    _expect(
        math.isfinite(weight_decay) and weight_decay >= 0,
        "weight_decay",
        weight_decay,
        "a number of at least 0",
    )
    _expect(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "betas",
        betas,
        "two numbers from 0 to below 1",
    )
    _expect(math.isfinite(eps) and eps > 0, "eps", eps, "a number greater than 0")


def _parameter_groups(
    params: Sequence[torch.nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """One for each mesh, with and without decay."""
    groups: dict[Any, dict[str, Any]] = {}
    for p in params:
        decays = p.dim() > 1
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        empty = {"params": [], "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((decays, mesh), empty)["params"].append(p)
    return list(groups.values())


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments: You et al., arXiv 1904.00962, Algorithm 2, with bias correction.

    A layer is one parameter.
    With gradient g, step t = 1, 2, ... and norms over the whole parameter x, however it is sharded:

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g g
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay x
        x = x - lr (|x| / |u|) u     the ratio is 1 where either norm is 0

    A step is collective where parameters are sharded, and holds every u at once.  Arguments as of
    ``make_optimizer``."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: a closure is given: evaluate the loss before the step."""
        if closure is not None:
            raise ValueError(
                f"closure={closure!r} is not supported; evaluate the loss before step()."
            )
        updates = self._updates()
        if not updates:
            return
        _scale_by_trust_ratios(updates)
        for update in updates:
            torch._foreach_add_(
                [_local(p) for p in update.params], update.directions, alpha=-update.lr
            )

    def _updates(self) -> "list[_LambUpdate]":
        """One for each parameter group in which there are gradients, not yet scaled."""
        updates = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._make_missing_state(params)
                directions = self._directions(group, params)
                updates.append(_LambUpdate(group["lr"], params, directions))
        return updates

    def _make_missing_state(self, params: Sequence[torch.nn.Parameter]) -> None:
        """As torch's AdamW has it, so that distributed checkpoints reshard it."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }

    def _directions(
        self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]
    ) -> list[torch.Tensor]:
        """This rank's part of u of each parameter, after the moments have taken in the gradient.

        The letters are those of the formula above."""
        m = [_local(self.state[p]["exp_avg"]) for p in params]
        v = [_local(self.state[p]["exp_avg_sq"]) for p in params]
        g = [_local(gradient) for gradient in _gradients(params)]
        steps = [self.state[p]["step"] for p in params]
        b1, b2 = group["betas"]
        decay = group["weight_decay"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(m, g, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        times = [float(t) for t in steps]
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, [math.sqrt(1 - b2**t) for t in times])
        torch._foreach_add_(root, group["eps"])
        u = torch._foreach_div(m, [1 - b1**t for t in times])
        torch._foreach_div_(u, root)
        if decay:
            torch._foreach_add_(u, [_local(p) for p in params], alpha=decay)
        return list(u)


class _LambUpdate(NamedTuple):
    """What a step subtracts from the parameters of one group."""

    lr: float
    params: list[torch.nn.Parameter]
    directions: list[torch.Tensor]  # this rank's part of u of each parameter


def _scale_by_trust_ratios(updates: Sequence[_LambUpdate]) -> None:
    """Multiplies each u by |x| / |u| in place; the norms of all travel together."""
    params: list[torch.Tensor] = []
    directions: list[torch.Tensor] = []
    for update in updates:
        params += update.params
        directions += update.directions
    x_norm, u_norm = _norms([*params, *directions], [*params, *params]).chunk(2)
    ratios = torch.where((x_norm > 0) & (u_norm > 0), x_norm / u_norm, 1.0)
    torch._foreach_mul_(directions, ratios.unbind())


@torch.no_grad()
def clip_by_global_norm(params: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients together to an L2 norm of at most `max_norm`; 0 only measures.

    Gradients may be plain or DTensors, on several meshes (torch.nn.utils.get_total_norm takes one
    mesh only).  A plain one is taken to be whole, and the same on all ranks: sum or average it
    first.  A DTensor's placements become its parameter's: pending sums of sequence parallelism are
    done here.  Collective where gradients are sharded.

    Args:
        max_norm: at least 0.

    Returns:
        The norm before: a plain scalar, the same on every rank, in fp32 or wider.

    Raises:
        ValueError: max_norm is negative or not a number, or there is no gradient."""
    _expect(max_norm >= 0, "max_norm", max_norm, "a number of at least 0 (0: measure only)")
    grads = _gradients([p for p in params if p.grad is not None])
    if not grads:
        raise ValueError("params hold no gradient to clip; call backward() first.")
    wide = _wide(grads)
    norm = torch.linalg.vector_norm(_norms(grads, grads)).to(wide)
    if max_norm > 0:
        factor = (max_norm / norm.clamp(min=torch.finfo(wide).tiny)).clamp(max=1.0)
        torch._foreach_mul_([_local(g) for g in grads], factor)
    return norm


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradients(params: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients, placed as their parameters are.

    Those of sequence-parallel norms still wait for a sum over the ranks, which is done here."""
    grads = []
    for p in params:
        if isinstance(p, DTensor) and p.grad.placements != p.placements:  # type: ignore[union-attr]
            p.grad = p.grad.redistribute(placements=p.placements)  # type: ignore[union-attr]
        grads.append(p.grad)
    return grads  # type: ignore[return-value]


def _norms(tensors: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 [n]: L2 norm of each whole tensor.

    tensors[i] is, or is this rank's part of, a tensor sharded as like[i] is.  In fp64, where the
    square of no fp32 number over- or underflows."""
    parts = [_local(t) for t in tensors]
    squares = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64)).square()
    # group: the tensors of which each of its ranks has another part
    sharded: dict[Any, list[int]] = {}
    for i, tensor in enumerate(like):
        if isinstance(tensor, DTensor):
            for dim, placement in enumerate(tensor.placements):
                if not placement.is_replicate():
                    sharded.setdefault(tensor.device_mesh.get_group(dim), []).append(i)
    for group, indices in sharded.items():  # in the same order on every rank
        part = squares[indices]
        dist.all_reduce(part, group=group)
        squares[indices] = part
    return squares.sqrt()


def _wide(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The widest of their dtypes, at least fp32."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


class _FusedLamb(NamedTuple):
    """Where a fused LAMB is, and with which options it clips nothing and bounds no trust ratio."""

    module: str
    name: str
    options: dict[str, Any]
    remedy: str  # how to install it


FUSED_LAMBS = {
    "lamb_apex": _FusedLamb(
        module="apex.optimizers",
        name="FusedLAMB",
        # use_nvlamb: the trust ratio also where nothing decays
        options={"max_grad_norm": math.inf, "use_nvlamb": True},
        remedy="build NVIDIA/apex or ROCm/apex from source (PyPI's apex is another project)",
    ),
    "lamb_deepspeed": _FusedLamb(
        module="deepspeed.ops.lamb",
        name="FusedLamb",
        options={"max_grad_norm": 0.0, "min_coeff": 0.0, "max_coeff": math.inf},
        remedy="pip install deepspeed",
    ),
}


def _fused_lamb(
    name: str,
    params: Sequence[torch.nn.Parameter],
    groups: list[dict[str, Any]],
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    fused = FUSED_LAMBS[name]
    if any(p.device.type != "cuda" for p in params):
        raise ValueError(f"optimizer={name!r} needs all parameters on a GPU; use 'lamb'.")
    if any(isinstance(p, DTensor) for p in params):
        raise ValueError(
            f"optimizer={name!r} would take a shard for a whole parameter; use 'lamb' with FSDP2 "
            "and tensor parallelism."
        )
    try:
        make = getattr(importlib.import_module(fused.module), fused.name)
    except (ImportError, AttributeError):
        raise ValueError(
            f"optimizer={name!r}: {fused.module}.{fused.name} is not installed; {fused.remedy}, "
            "or use 'lamb'."
        ) from None
    return make(groups, **options, **fused.options)


def _expect(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} must be {allowed}.")
