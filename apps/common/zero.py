"""DeepSpeed's ZeRO 1 to 3 behind the interface of ``engine.Engine``, over all dp x cp ranks.

1 cuts the optimizer's state over the ranks, 2 also the gradients, 3 also the parameters.  Nothing
else of DeepSpeed is used: its process group is the one that exists, and it is given passes and
learning rate before each pass and step.

Computing in bfloat16, parameters are bfloat16 and DeepSpeed keeps float32 masters of them, cut over
the ranks.  Gradients are summed over ranks in `reduce_dtype` and over passes in float32; ZeRO 2 and
3 sum over ranks in every pass, not only the last.
"""

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from apps.common.engine import Engine, MakeOptimizer, fill_parameters
from ringx.launch.mesh import Mesh

# From torch about DeepSpeed, once a process: no user could change what is deprecated there.
warnings.filterwarnings(
    "ignore", message=r".*all_gather_into_tensor.* is deprecated", category=FutureWarning
)
warnings.filterwarnings(
    "ignore", message=r".*reduce_scatter_tensor.* is deprecated", category=FutureWarning
)

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
MOMENTS = ("exp_avg", "exp_avg_sq")
# What is taken from a checkpoint's parameter group; how to compute it is this run's.
OPTIONS = ("lr", "betas", "eps", "weight_decay")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def expect_possible(
    kind: str, *, optimizer: str, dtype: torch.dtype, reduce_dtype: torch.dtype = torch.float32
) -> None:
    """ValueError naming what DeepSpeed cannot do here.

    Imports nothing of it: the process that starts the ranks calls this, too."""
    if kind not in STAGES:
        return
    use = "use --dp-engine fsdp"
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"--dp-engine {kind}: DeepSpeed is not installed; pip install deepspeed, or {use}."
        )
    if optimizer != "adamw":
        raise ValueError(
            f"--dp-engine {kind} cannot be combined with --optimizer {optimizer}: ZeRO's flat "
            "partitions do not know where a parameter ends, and LAMB needs the norm of each; use "
            f"--optimizer adamw, or {use}."
        )
    if dtype not in NAMES:
        raise ValueError(
            f"--dp-engine {kind}: DeepSpeed keeps parameters in float32, not {_name(dtype)}; {use}."
        )
    if dtype is torch.bfloat16 and reduce_dtype not in NAMES:
        raise ValueError(
            f"--dp-engine {kind}: DeepSpeed sums gradients in float32 or bfloat16, "
            f"not {_name(reduce_dtype)}; {use}."
        )


class ZeroEngine(Engine):
    """As ``Engine``, whose arguments it takes; a process group must exist.

    `kind` is of STAGES, the optimizer an AdamW.

    state() gives DTensors in host memory, cut over the ranks: one whole tensor exists at a time,
    gathered from the partitions.  load() gathers each again.  So a checkpoint costs a rank 12 bytes
    a parameter / ranks of host memory, and time for messages."""

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
        if allocating is not None:
            raise ValueError(
                f"--dp-engine {kind}: DeepSpeed cannot be tried without memory; "
                "use --dp-engine fsdp."
            )
        assert mesh.data_mesh is not None and mesh.shape.tp == 1
        self.mesh = mesh
        self.device = torch.device(device)
        self.module = model
        self.ranks = mesh.data_mesh.size()
        self._stage = STAGES[kind]
        expect_possible(kind, optimizer="adamw", dtype=dtype, reduce_dtype=reduce_dtype)
        half = dtype is torch.bfloat16
        config = self._config(half, reduce_dtype if half else torch.float32)
        with _environment(self.device):
            self._deepspeed = _import_deepspeed(kind, self.device)
            model.to(dtype)
            self._groups = self._make_optimizer(kind, make_optimizer, dtype)
            self._allocate_parameters(config, weights, blocks)
            self._params = dict(model.named_parameters())
            self._engine = self._start_engine(config)
        self.model = self._engine
        self._zero = self._engine.optimizer
        self._make_state()
        if half and weights is not None:
            self._set_masters(weights)

    def _make_optimizer(
        self, kind: str, make_optimizer: MakeOptimizer, dtype: torch.dtype
    ) -> list[list[str]]:
        """Makes the optimizer; returns the names of the parameters of each of its groups.

        It is made of empty parameters of the same numbers of dimensions: DeepSpeed has yet to make
        those that it will hold."""
        placeholders = {
            name: nn.Parameter(torch.empty([0] * p.dim(), dtype=dtype, device=self.device))
            for name, p in self.module.named_parameters()
        }
        self.optimizer = make_optimizer(list(placeholders.values()))
        if not isinstance(self.optimizer, torch.optim.AdamW):
            raise ValueError(
                f"--dp-engine {kind} takes torch's AdamW, not {type(self.optimizer).__name__}; "
                "use --dp-engine fsdp."
            )
        name_of = {placeholder: name for name, placeholder in placeholders.items()}
        names_by_group = []
        for group in self.optimizer.param_groups:
            names_by_group.append([name_of[p] for p in group["params"]])
        return names_by_group

    def _allocate_parameters(
        self,
        config: dict[str, Any],
        weights: Callable[[str, torch.Size], torch.Tensor] | None,
        blocks: Iterable[nn.Module],
    ) -> None:
        """Gives the parameters their memory, this rank's part of it in stage 3, and their values.

        The values stay undefined where there are no weights."""
        if self._stage == 3:
            self._partition(config, weights)
            self._gather_with_model(blocks)
            return
        self.module.to_empty(device=self.device)
        if weights is not None:
            fill_parameters(self.module, weights)

    def _start_engine(self, config: dict[str, Any]) -> Any:
        """DeepSpeed's engine; the optimizer is given the model's parameters first."""
        for group, names in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [self._params[name] for name in names]
        # DeepSpeed prints how much memory there is, twenty times.
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = self._deepspeed.initialize(
                model=self.module, optimizer=self.optimizer, config=config, dist_init_required=False
            )
        return engine

    def _set_masters(self, weights: Callable[[str, torch.Size], torch.Tensor]) -> None:
        """Sets the float32 masters, which DeepSpeed has copied from bfloat16, to full precision."""
        for name, p in self._params.items():
            self._set(p, weights(name, self._shape(p)).to(self.device))
        self._masters_changed()

    def _gather_with_model(self, blocks: Iterable[nn.Module]) -> None:
        """Has the parameters outside the blocks gathered for all of the model's forward."""
        in_blocks: set[nn.Parameter] = set()
        for block in blocks:
            in_blocks.update(block.parameters())
        for p in self.module.parameters():
            if p not in in_blocks:
                self._deepspeed.zero.register_external_parameter(self.module, p)

    def _config(self, half: bool, reduce_dtype: torch.dtype) -> dict[str, Any]:
        """What DeepSpeed is told; half: the computation is in bfloat16."""
        bf16: dict[str, Any] = {"enabled": half}
        if half:  # a gradient that is no number must skip the step and show, as it does in fp32
            bf16["check_grad_overflow"] = True
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only divides by it
            "gradient_accumulation_steps": 1,  # accumulate() tells which pass is the last
            "gradient_clipping": 0.0,  # step() tells
            "zero_optimization": {"stage": self._stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": NAMES[reduce_dtype],
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": bf16,
        }

    @torch.no_grad()
    def _partition(
        self,
        config: dict[str, Any],
        weights: Callable[[str, torch.Size], torch.Tensor] | None,
    ) -> None:
        """Fills every parameter and cuts it over the ranks, one after another.

        So no rank ever holds two whole ones."""
        modules = dict(self.module.named_modules())
        for name, p in list(self.module.named_parameters()):
            full = torch.empty(p.shape, dtype=p.dtype, device=self.device)
            if weights is not None:
                full.copy_(weights(name, p.shape))
            owner, _, attribute = name.rpartition(".")
            holder = nn.Module()
            holder.p = nn.Parameter(full)
            del full
            self._deepspeed.zero.Init(module=holder, config_dict_or_path=config)
            setattr(modules[owner], attribute, holder.p)

    def __call__(self, *args: Any) -> torch.Tensor:
        with _environment(self.device):
            return self._engine(*args)

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        with _environment(self.device):
            self._engine.backward(loss * self.ranks)  # DeepSpeed averages gradients

    def step(self, lr: float, clip: float) -> torch.Tensor:
        """As ``Engine.step``.

        Where the gradient is not finite, the norm is inf or nan and no parameter changes."""
        self._zero.clip_grad = clip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return torch.as_tensor(
            self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device
        )

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        utils = self._deepspeed.utils
        step = next(iter(self.optimizer.state.values()))["step"]
        model = {
            name: self._cut(utils.safe_get_full_fp32_param(p)) for name, p in self._params.items()
        }
        moments: dict[str, dict[str, Any]] = {}
        for name, p in self._params.items():
            moments[name] = {"step": step.detach().cpu().clone()}
            for key in MOMENTS:
                moments[name][key] = self._cut(utils.safe_get_full_optimizer_state(p, key))
        groups = []
        for group, names in zip(self.optimizer.param_groups, self._groups, strict=True):
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({**options, "params": list(names)})
        return {"model": model, "optimizer": {"state": moments, "param_groups": groups}}

    def load(self, state: dict[str, Any]) -> None:
        moments = state["optimizer"]["state"]
        groups = state["optimizer"]["param_groups"]
        for name, p in self._params.items():
            self._set(p, self._whole(state["model"][name]))
            for key in MOMENTS:
                self._set(p, self._whole(moments[name][key]), key)
        self._masters_changed()
        for group, names in zip(self.optimizer.param_groups, self._groups, strict=True):
            saved = next(saved for saved in groups if names[0] in saved["params"])
            group.update({key: saved[key] for key in OPTIONS})
        step = moments[next(iter(self._params))]["step"]
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"].fill_(float(step))

    def _make_state(self) -> None:
        """Makes the optimizer's state now: DeepSpeed's helpers know it only after a first step."""
        if self._stage == 3:
            flat = self._zero.fp32_partitioned_groups_flat
        else:
            flat = [group["params"][0] for group in self.optimizer.param_groups]
        for p in flat:
            device = p.device if self.optimizer.defaults["fused"] else "cpu"
            parameter_state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
            for key in MOMENTS:
                parameter_state[key] = torch.zeros_like(p, requires_grad=False)
            self.optimizer.state[p] = parameter_state
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def _shape(p: nn.Parameter) -> torch.Size:
        return getattr(p, "ds_shape", p.shape)

    def _cut(self, full: torch.Tensor) -> DTensor:
        """This rank's part of a tensor that all ranks hold, as FSDP2 would cut it."""
        mesh = self.mesh.data_mesh
        assert mesh is not None
        shape, offset = compute_local_shape_and_global_offset(full.shape, mesh, [Shard(0)])
        local = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        part = full.detach()[local].cpu().clone()
        return DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
        )

    def _whole(self, saved: torch.Tensor) -> torch.Tensor:
        """The inverse of ``_cut``, in fp32 on this rank's device."""
        full = saved
        if isinstance(saved, DTensor):
            full = DTensor.from_local(
                saved.to_local().to(self.device),
                saved.device_mesh,
                saved.placements,
                run_check=False,
                shape=saved.shape,
                stride=saved.stride(),
            ).full_tensor()
        return full.to(self.device, torch.float32)

    @torch.no_grad()
    def _set(self, p: nn.Parameter, full: torch.Tensor, moment: str | None = None) -> None:
        """This rank's part of a master, or of a moment."""
        utils = self._deepspeed.utils
        if self._stage < 3:
            if moment:
                utils.safe_set_full_optimizer_state(p, full, moment)
            else:
                utils.safe_set_full_fp32_param(p, full)
            return
        # DeepSpeed's own way fails on the padding where the ranks do not divide the size.
        size = p.ds_tensor.numel()  # type: ignore[attr-defined]
        part = torch.zeros(size, dtype=torch.float32, device=self.device)
        local = full.flatten()[dist.get_rank(self.mesh.data) * size :][:size]
        part[: local.numel()] = local
        if moment:
            utils.safe_set_local_optimizer_state(p, part, moment)
            return
        utils.safe_set_local_fp32_param(p, part)
        with self._deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(full)

    def _masters_changed(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()


def _import_deepspeed(kind: str, device: torch.device) -> Any:
    """DeepSpeed's module, ready to use the process group that exists."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device.type:
        raise ValueError(
            f"--dp-engine {kind}: DeepSpeed computes on {get_accelerator().device_name()}, not on "
            f"{device.type}; set DS_ACCELERATOR={device.type}, or leave it unset."
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if device.type == "cpu":  # of use in inference only, and compiled for a minute and a half
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(),
        dist_init_required=False,
        verbose=False,
    )
    return deepspeed


@contextlib.contextmanager
def _environment(device: torch.device) -> Iterator[None]:
    """Sets the variables in which DeepSpeed looks for this rank's device, and for its type."""
    variables = {
        "LOCAL_RANK": str(device.index or 0),
        "OMPI_COMM_WORLD_LOCAL_RANK": None,
        "DS_ACCELERATOR": device.type,
    }
    before = {name: os.environ.get(name) for name in variables}
    variables["DS_ACCELERATOR"] = before["DS_ACCELERATOR"] or device.type
    try:
        _set_variables(variables)
        yield
    finally:
        _set_variables(before)


def _set_variables(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
