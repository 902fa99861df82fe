"""What the configurations of all trainers share: frozen dataclasses, checked when made, and the way to and from YAML.

Every field is a flag of the command line (``--global-batch 8``) and a key of a YAML file (``train: {global_batch: 8}``); its
`help` is said here once.  An app adds the shape of its model, fields of its own and what must fit together.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping
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

TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}  # as in ringx bench
ENGINES = ("fsdp", "ddp", "zero1", "zero2", "zero3")
CHECKPOINTING = ("none", "selective", "full")
OPTIMIZERS = ("adamw", "lamb", "lamb_apex", "lamb_deepspeed")


def option(default: Any, help: str, choices: Any = None) -> Any:
    """A field of a configuration that is a flag, too."""
    return field(default=default, metadata={"help": help, "choices": choices})


def require_at_least(config: Any, least: float, *names: str) -> None:
    """ValueError naming the first of these fields that is no number of its type, not finite or below `least`."""
    types = {f.name: f.type for f in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        whole = types[name] is int
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else (int, float))
            or not math.isfinite(value)
        ):
            raise ValueError(
                f"{name}={value!r} must be {'an integer' if whole else 'a finite number'}."
            )
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

    def __post_init__(self):
        require_at_least(self, 0, "cp", "tp", "dp")
        require_at_least(self, 1, "dp_replicate")
        require_known_choices(self)
        if self.dp_engine != "fsdp" and self.dp_replicate > 1:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} is FSDP2's; --dp-engine {self.dp_engine} has no replicas of shards."
            )

    def fit(self, world: int) -> Shape:
        return Shape.fit(
            world,
            cp=self.cp,
            tp=self.tp,
            dp=self.dp,
            replicate=self.dp_replicate,
            order=self.parallel_order,
        )


@dataclass(frozen=True)
class Training:
    """How a model is trained; what is a sample is the app's to say (a sequence of text, a field at a time)."""

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

    def __post_init__(self):
        object.__setattr__(self, "dtype", SHORT_DTYPES.get(self.dtype, self.dtype))
        object.__setattr__(
            self, "reduce_dtype", SHORT_DTYPES.get(self.reduce_dtype, self.reduce_dtype)
        )
        require_at_least(self, 1, "steps", "mlp_tiles", "val_batches")
        require_at_least(
            self,
            0,
            "global_batch",
            "micro_batch",
            "lr",
            "warmup",
            "decay",
            "floor",
            "weight_decay",
            "beta1",
            "beta2",
            "eps",
        )
        require_at_least(self, 0, "clip", "seed", "val_every", "save_every", "keep")
        require_known_choices(self)
        for f in dataclasses.fields(self):
            if f.type is bool and not isinstance(getattr(self, f.name), bool):
                raise ValueError(f"{f.name}={getattr(self, f.name)!r} must be true or false.")
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
        if self.decay and self.schedule != "wsd":
            raise ValueError(
                f"decay={self.decay} is for --schedule wsd; {self.schedule} decays from the warm-up to the end."
            )
        if self.schedule == "wsd" and self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup={self.warmup} and decay={self.decay} are longer than steps={self.steps}."
            )


class RunConfig:
    """All of a run: a frozen dataclass of `name` and parts, each a frozen dataclass.  Printed in full at its start, and kept beside
    its results as config.yaml."""

    name: str
    model: Any
    train: Any
    mesh: MeshConfig

    def __post_init__(self):
        c, engine = self.train, self.mesh.dp_engine
        if c.reduce_dtype != "float32" and (c.dtype != "bfloat16" or engine == "ddp"):
            raise ValueError(
                f"reduce_dtype={c.reduce_dtype} is for dtype=bfloat16 with FSDP2 or ZeRO; with dtype={c.dtype} and {engine} "
                "gradients are summed in their own dtype: leave it out."
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
            names = {f.name for f in dataclasses.fields(kind) if "help" in f.metadata}
            if values := {k: v for k, v in flags.items() if k in names}:
                parts[part] = replace(getattr(self, part), **values)
        return replace(self, **parts)  # type: ignore[type-var]

    def plan_batch(self, shape: Shape) -> tuple[int, int, int]:
        """(samples of a step, of a dp group in one pass, passes); ValueError where they do not divide."""
        total = self.train.global_batch or shape.dp * (self.train.micro_batch or 1)
        if total % shape.dp:
            raise ValueError(
                f"global_batch={total} must be a multiple of dp={shape.dp}: each group takes equally many samples."
            )
        mine = total // shape.dp
        micro = self.train.micro_batch or mine
        if mine % micro:
            raise ValueError(
                f"micro_batch={micro} must divide the {mine} samples of a dp group (global_batch={total}, dp={shape.dp})."
            )
        return total, micro, mine // micro

    def my_samples(self, shape: Shape, dp_rank: int) -> range:
        """Which of the global batch's samples this dp group takes."""
        _, micro, passes = self.plan_batch(shape)
        return range(dp_rank * micro * passes, (dp_rank + 1) * micro * passes)


C = TypeVar("C", bound=RunConfig)


def parts_of(kind: type[RunConfig]) -> dict[str, Any]:
    """{name: dataclass} of a configuration's parts."""
    return {f.name: f.type for f in dataclasses.fields(kind) if f.name != "name"}  # type: ignore[arg-type]


def from_dict(kind: type[C], values: Mapping[str, Any]) -> C:
    """The inverse of ``to_dict``.  Raises TypeError, KeyError or ValueError for what is none."""
    parts = {name: part(**values[name]) for name, part in parts_of(kind).items()}
    return kind(name=values["name"], **parts)  # type: ignore[call-arg]


def load(path: str, kind: type[C], presets: Mapping[str, C]) -> C:
    """The configuration of a YAML file: `preset` to start from (or all of `model`), then what it changes.

    Raises ValueError naming the file and the key."""
    types = parts_of(kind)
    keys = ("preset", "name", *types)
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f"--config {path}: cannot be read: {' '.join(str(e).split())}.") from None
    if not isinstance(given, dict):
        raise ValueError(f"--config {path}: it must be a mapping with the keys {', '.join(keys)}.")
    if unknown := set(given) - set(keys):
        raise ValueError(
            f"--config {path}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(keys)}."
        )
    base = presets[require_name(given["preset"], presets, "preset")] if "preset" in given else None
    parts: dict[str, Any] = {"name": str(given.get("name", base.name if base else Path(path).stem))}
    for part, type_ in types.items():
        values = given.get(part) or {}
        names = {f.name for f in dataclasses.fields(type_)}
        if not isinstance(values, dict) or (unknown := set(values) - names):
            bad = sorted(unknown)[0] if isinstance(values, dict) else values
            raise ValueError(
                f"--config {path}: {part} has no field {bad!r}; it has {', '.join(sorted(names))}."
            )
        try:
            parts[part] = replace(getattr(base, part), **values) if base else type_(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"--config {path}: {part}: {e}") from None
    return kind(**parts)


def add_flags(parser: argparse.ArgumentParser, title: str, kind: Any) -> None:
    """A group of flags: those fields of a configuration's part that were made by ``option``."""
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(kind):
        if "help" not in f.metadata:
            continue
        flag, about, choices = (
            "--" + f.name.replace("_", "-"),
            f.metadata["help"],
            f.metadata["choices"],
        )
        if f.type is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=about
            )
            continue
        if choices:
            about = f"{about}: {', '.join(choices)}"
        group.add_argument(
            flag, type=f.type, default=None, metavar=None if choices else "N", help=about
        )  # type: ignore[arg-type]
