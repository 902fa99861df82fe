"""What the configurations of all trainers share: dataclasses, checked when made, to and from YAML.

Every field is a flag of the command line (``--global-batch 8``) and a key of a YAML file
(``train: {global_batch: 8}``); its `help` is written here once.  An app adds the shape of its
model, fields of its own and what must fit together.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

import ringx
from apps.common.schedule import SCHEDULES
from ringx.checks import require_name
from ringx.kernels import KERNELS
from ringx.launch.mesh import ORDERS, Shape
from ringx.layout import LAYOUTS

# Torch's names, as configurations hold them; SHORT_DTYPES are those of ``python -m ringx bench``.
TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}
ENGINES = ("fsdp", "ddp", "zero1", "zero2", "zero3")
CHECKPOINTING = ("none", "selective", "full")
OPTIMIZERS = ("adamw", "lamb", "lamb_apex", "lamb_deepspeed")


def option(default: Any, help: str, choices: Any = None) -> Any:
    """A field of a configuration that is a flag, too."""
    return field(default=default, metadata={"help": help, "choices": choices})


def require_at_least(config: Any, least: float, *names: str) -> None:
    """ValueError naming the first of these fields that is no finite number or below `least`."""
    types = {f.name: f.type for f in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        is_integer = types[name] is int
        allowed: Any = int if is_integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
            wanted = "an integer" if is_integer else "a finite number"
            raise ValueError(f"{name}={value!r} must be {wanted}.")
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def require_known_choices(config: Any) -> None:
    """ValueError naming the first field that has choices and is none of them."""
    for f in dataclasses.fields(config):
        if f.metadata.get("choices"):
            require_name(getattr(config, f.name), f.metadata["choices"], f.name)


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks are cut; 0: what the others leave."""

    cp: int = option(0, "ranks that one sequence is cut over (default: what tp and dp leave)")
    tp: int = option(0, "ranks that each matrix is cut over (default: 1)")
    dp: int = option(
        0, "groups of ranks with sequences of their own (default: what cp and tp leave)"
    )
    dp_replicate: int = option(
        1, "replicas of the parameters among the dp groups (HSDP); the rest are shards"
    )
    parallel_order: str = option(
        "cp-tp-dp", "which axis varies fastest over the ranks, leftmost first", ORDERS
    )
    dp_engine: str = option(
        "fsdp", "FSDP2, DDP, or DeepSpeed ZeRO 1 to 3, over the dp x cp ranks", ENGINES
    )

    def __post_init__(self) -> None:
        require_at_least(self, 0, "cp", "tp", "dp")
        require_at_least(self, 1, "dp_replicate")
        require_known_choices(self)
        if self.dp_engine != "fsdp" and self.dp_replicate > 1:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} is FSDP2's; --dp-engine {self.dp_engine} has "
                "no replicas of shards."
            )

    def fit(self, world_size: int) -> Shape:
        """The mesh of that many ranks; ValueError where they cannot be cut so."""
        return Shape.fit(
            world_size,
            cp=self.cp,
            tp=self.tp,
            dp=self.dp,
            replicate=self.dp_replicate,
            order=self.parallel_order,
        )


@dataclass(frozen=True)
class Training:
    """How a model is trained; the app defines a sample (a sequence of text, a field at a time)."""

    global_batch: int = option(
        0, "samples of an optimizer step, over all ranks (0: one per dp group)"
    )
    micro_batch: int = option(
        0, "samples of a dp group in one pass; the rest are accumulated (0: all at once)"
    )
    steps: int = option(1000, "optimizer steps of the whole run")
    seed: int = option(0, "of the weights and of the order of the data")
    dtype: str = option(
        "bfloat16",
        "of the computation; parameters, gradients and optimizer are kept in float32 at least",
        TORCH_DTYPES,
    )
    reduce_dtype: str = option(
        "float32",
        "in which gradients of a bfloat16 computation are summed over ranks",
        TORCH_DTYPES,
    )
    optimizer: str = option(
        "adamw",
        "lamb is for large batches; lamb_apex and lamb_deepspeed are fused versions for GPUs",
        OPTIMIZERS,
    )
    lr: float = option(3e-4, "peak learning rate")
    schedule: str = option(
        "cosine",
        "after the warm-up: half a cosine, or constant and then a linear decay (wsd)",
        SCHEDULES,
    )
    warmup: int = option(0, "steps of linear warm-up")
    decay: int = option(0, "steps of decay at the end (wsd)")
    floor: float = option(0.1, "last learning rate over the peak")
    weight_decay: float = option(0.1, "on matrices, not on norms")
    beta1: float = option(0.9, "of the optimizer")
    beta2: float = option(0.95, "of the optimizer")
    eps: float = option(1e-8, "of the optimizer")
    clip: float = option(1.0, "largest global gradient norm (0: no clipping)")
    algorithm: str = option("ringx3", "attention's communication pattern", ringx.algorithms())
    layout: str = option("zigzag", "which tokens a rank of the cp group holds", LAYOUTS)
    kernel: str = option(
        "auto", "local attention kernel (ringx info lists them)", [*KERNELS, "auto"]
    )
    overlap: bool = option(True, "communicate while computing")
    checkpointing: str = option(
        "none",
        "activations computed again in backward: all but attention's (selective), or all (full)",
        CHECKPOINTING,
    )
    mlp_tiles: int = option(1, "pieces of the sequence that go through an MLP one after another")
    offload: bool = option(False, "keep saved activations in host memory (GPUs)")
    val_every: int = option(0, "steps between validations (0: none)")
    val_batches: int = option(4, "global batches of a validation")
    save_every: int = option(
        100, "steps between checkpoints; the last step is always saved (0: only that)"
    )
    keep: int = option(2, "newest checkpoints that are kept (0: all)")

    def __post_init__(self) -> None:
        for name in ("dtype", "reduce_dtype"):
            value = getattr(self, name)
            object.__setattr__(self, name, SHORT_DTYPES.get(value, value))
        require_at_least(self, 1, "steps", "mlp_tiles", "val_batches")
        require_at_least(self, 0, "global_batch", "micro_batch", "lr", "warmup", "decay", "floor")
        require_at_least(self, 0, "weight_decay", "beta1", "beta2", "eps")
        require_at_least(self, 0, "clip", "seed", "val_every", "save_every", "keep")
        require_known_choices(self)
        for f in dataclasses.fields(self):
            if f.type is bool and not isinstance(getattr(self, f.name), bool):
                raise ValueError(f"{f.name}={getattr(self, f.name)!r} must be true or false.")
        self._require_bounds()
        self._require_schedule()

    def _require_bounds(self) -> None:
        """ValueError for a number that is out of range in another way than being too small."""
        for name in ("lr", "eps"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 must be greater than 0.")
        for name in ("beta1", "beta2"):
            if getattr(self, name) > 1 - 1e-12:
                raise ValueError(f"{name}={getattr(self, name)} must be below 1.")
        if self.floor > 1:
            raise ValueError(f"floor={self.floor} must be at most 1.")
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed} must be below 2**31.")

    def _require_schedule(self) -> None:
        """ValueError for phases of the schedule that do not fit."""
        if self.decay and self.schedule != "wsd":
            raise ValueError(
                f"decay={self.decay} is for --schedule wsd; {self.schedule} decays from the "
                "warm-up to the end."
            )
        if self.schedule == "wsd" and self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup={self.warmup} and decay={self.decay} are longer than steps={self.steps}."
            )


class RunConfig:
    """All of a run: a frozen dataclass of `name` and parts, each a frozen dataclass.

    Printed in full at the run's start, and kept beside its results as config.yaml."""

    name: str
    model: Any
    train: Any
    mesh: MeshConfig

    def __post_init__(self) -> None:
        train = self.train
        engine = self.mesh.dp_engine
        if train.reduce_dtype != "float32" and (train.dtype != "bfloat16" or engine == "ddp"):
            raise ValueError(
                f"reduce_dtype={train.reduce_dtype} is for dtype=bfloat16 with FSDP2 or ZeRO; "
                f"with dtype={train.dtype} and {engine} gradients are summed in their own dtype: "
                "leave it out."
            )

    def expect_fits(self, shape: Shape) -> None:
        """ValueError naming the first size that this mesh cannot cut."""
        raise NotImplementedError

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def changed(self: "C", flags: Mapping[str, Any]) -> "C":
        """With these values in place of those of its options."""
        parts = {}
        for part, kind in parts_of(type(self)).items():
            options = {f.name for f in dataclasses.fields(kind) if "help" in f.metadata}
            values = {name: value for name, value in flags.items() if name in options}
            if values:
                parts[part] = replace(getattr(self, part), **values)
        return replace(self, **parts)  # type: ignore[type-var]

    def plan_batch(self, shape: Shape) -> tuple[int, int, int]:
        """(samples of a step, samples of a dp group in one pass, passes of a step).

        Raises ValueError where they do not divide."""
        total = self.train.global_batch or shape.dp * (self.train.micro_batch or 1)
        if total % shape.dp:
            raise ValueError(
                f"global_batch={total} must be a multiple of dp={shape.dp}: each group takes "
                "equally many samples."
            )
        per_group = total // shape.dp
        micro_batch = self.train.micro_batch or per_group
        if per_group % micro_batch:
            raise ValueError(
                f"micro_batch={micro_batch} must divide the {per_group} samples of a dp group "
                f"(global_batch={total}, dp={shape.dp})."
            )
        return total, micro_batch, per_group // micro_batch

    def my_samples(self, shape: Shape, dp_rank: int) -> range:
        """Which of the global batch's samples this dp group takes."""
        _, micro_batch, passes = self.plan_batch(shape)
        per_group = micro_batch * passes
        return range(dp_rank * per_group, (dp_rank + 1) * per_group)


C = TypeVar("C", bound=RunConfig)


def parts_of(kind: type[RunConfig]) -> dict[str, Any]:
    """{name: dataclass} of a configuration's parts."""
    return {f.name: f.type for f in dataclasses.fields(kind) if f.name != "name"}  # type: ignore[arg-type]


def from_dict(kind: type[C], values: Mapping[str, Any]) -> C:
    """The inverse of ``to_dict``.

    Raises TypeError, KeyError or ValueError for what is no configuration of this kind."""
    parts = {name: part(**values[name]) for name, part in parts_of(kind).items()}
    return kind(name=values["name"], **parts)  # type: ignore[call-arg]


def load(path: str, kind: type[C], presets: Mapping[str, C]) -> C:
    """The configuration of a YAML file: `preset` to start from (or all of `model`), then changes.

    Raises ValueError naming the file and the key."""
    given = _read_yaml(path, keys=("preset", "name", *parts_of(kind)))
    base = None
    if "preset" in given:
        base = presets[require_name(given["preset"], presets, "preset")]
    default_name = base.name if base else Path(path).stem
    parts: dict[str, Any] = {"name": str(given.get("name", default_name))}
    for part, part_type in parts_of(kind).items():
        values = given.get(part) or {}
        _require_fields(path, part, values, part_type)
        try:
            if base:
                parts[part] = replace(getattr(base, part), **values)
            else:
                parts[part] = part_type(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"--config {path}: {part}: {e}") from None
    return kind(**parts)


def _read_yaml(path: str, keys: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError for another key than these."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f"--config {path}: cannot be read: {' '.join(str(e).split())}.") from None
    if not isinstance(given, dict):
        raise ValueError(f"--config {path}: it must be a mapping with the keys {', '.join(keys)}.")
    unknown = set(given) - set(keys)
    if unknown:
        raise ValueError(
            f"--config {path}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(keys)}."
        )
    return given


def _require_fields(path: str, part: str, values: Any, kind: Any) -> None:
    """ValueError if `values` is no mapping of fields of `kind`."""
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        unknown = values
    elif set(values) <= names:
        return
    else:
        unknown = sorted(set(values) - names)[0]
    raise ValueError(
        f"--config {path}: {part} has no field {unknown!r}; it has {', '.join(sorted(names))}."
    )


def add_flags(parser: argparse.ArgumentParser, title: str, kind: Any) -> None:
    """A group of flags: those fields of a configuration's part that were made by ``option``."""
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(kind):
        if "help" not in f.metadata:
            continue
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        choices = f.metadata["choices"]
        if f.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        if choices:
            text = f"{text}: {', '.join(choices)}"
        metavar = None if choices else "N"
        flag_type: Any = f.type
        group.add_argument(flag, type=flag_type, default=None, metavar=metavar, help=text)
