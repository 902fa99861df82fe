"""Configuration: frozen dataclasses, checked when made, the presets, and the way to and from YAML.

Every field is a flag of the command line (``--global-batch 8``) and a key of a YAML file (``train: {global_batch: 8}``); its
`help` is said here once.
"""

import dataclasses
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

import ringx
from apps.common.schedule import SCHEDULES
from ringx.kernel import KERNELS
from ringx.layout import LAYOUTS, name_of
from ringx.mesh import ORDERS, Shape

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}  # as in ringx bench
ENGINES = ("fsdp", "ddp", "zero1", "zero2", "zero3")
CHECKPOINTING = ("none", "selective", "full")
OPTIMIZERS = ("adamw", "lamb", "lamb_apex", "lamb_deepspeed")


def option(default: Any, help: str, choices: Any = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


def _at_least(config, least: float, *names: str) -> None:
    types = {f.name: f.type for f in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        whole = types[name] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be {'an integer' if whole else 'a finite number'}.")
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def _known(config) -> None:
    """Every field that has choices is one of them."""
    for f in dataclasses.fields(config):
        if f.metadata.get("choices"):
            name_of(getattr(config, f.name), f.metadata["choices"], f.name)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama 3."""

    dim: int  # width of the residual stream
    layers: int
    heads: int
    kv_heads: int
    ffn: int  # width of the SwiGLU
    vocab: int
    head_dim: int = 0  # 0: dim / heads
    rope_base: float = 500_000.0
    rope_factor: float = 1.0  # Llama 3.1's stretching of slow RoPE frequencies; 1: none
    rope_low: float = 1.0  # turns within rope_original below which a frequency is stretched in full
    rope_high: float = 4.0  # and above which it is left alone
    rope_original: int = 8192  # context length before stretching
    norm_eps: float = 1e-5
    tied: bool = True  # the output projection is the embedding

    def __post_init__(self):
        _at_least(self, 1, "dim", "layers", "heads", "kv_heads", "ffn", "vocab", "rope_factor", "rope_original")
        _at_least(self, 0, "rope_base", "rope_low", "rope_high", "norm_eps")
        if self.head_dim == 0 and self.dim % self.heads == 0:
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} (dim={self.dim}, heads={self.heads}): RoPE needs an even head size.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if self.rope_factor > 1 and self.rope_high <= self.rope_low:
            raise ValueError(f"rope_high={self.rope_high} must be greater than rope_low={self.rope_low}.")


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks are cut; 0: what the others leave."""

    cp: int = option(0, "ranks that one sequence is cut over (default: what tp and dp leave)")
    tp: int = option(0, "ranks that each matrix is cut over (default: 1)")
    dp: int = option(0, "groups of ranks with sequences of their own (default: what cp and tp leave)")
    dp_replicate: int = option(1, "replicas of the parameters among the dp groups (HSDP); the rest are shards")
    parallel_order: str = option("cp-tp-dp", "which axis varies fastest over the ranks, leftmost first", ORDERS)
    dp_engine: str = option("fsdp", "FSDP2, DDP, or DeepSpeed ZeRO 1 to 3, over the dp x cp ranks", ENGINES)

    def __post_init__(self):
        _at_least(self, 0, "cp", "tp", "dp")
        _at_least(self, 1, "dp_replicate")
        _known(self)
        if self.dp_engine != "fsdp" and self.dp_replicate > 1:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} is FSDP2's; --dp-engine {self.dp_engine} has no replicas of shards."
            )

    def fit(self, world: int) -> Shape:
        return Shape.fit(world, cp=self.cp, tp=self.tp, dp=self.dp, replicate=self.dp_replicate, order=self.parallel_order)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    seqlen: int = option(8192, "tokens of a sequence, whatever the number of ranks")
    global_batch: int = option(0, "sequences of an optimizer step, over all ranks (0: one per dp group)")
    micro_batch: int = option(0, "sequences of a dp group in one pass; the rest are accumulated (0: all at once)")
    steps: int = option(1000, "optimizer steps of the whole run")
    seed: int = option(0, "of the weights and of the order of the data")
    dtype: str = option("bfloat16", "of the computation; parameters, gradients and optimizer are kept in float32 at least", DTYPES)
    reduce_dtype: str = option("float32", "in which gradients of a bfloat16 computation are summed over ranks", DTYPES)
    optimizer: str = option(
        "adamw", "lamb is for large batches; lamb_apex and lamb_deepspeed are fused versions for GPUs", OPTIMIZERS
    )
    lr: float = option(3e-4, "peak learning rate")
    schedule: str = option("cosine", "after the warm-up: half a cosine, or constant and then a linear decay (wsd)", SCHEDULES)
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
    kernel: str = option("auto", "local attention kernel (ringx info lists them)", [*KERNELS, "auto"])
    overlap: bool = option(True, "communicate while computing")
    mask_documents: bool = option(False, "tokens see only their own document")
    checkpointing: str = option(
        "none", "activations computed again in backward: all but attention's (selective), or all (full)", CHECKPOINTING
    )
    loss_chunk: int = option(1024, "tokens whose logits exist at once; the whole [S, vocab] never does")
    mlp_tiles: int = option(1, "pieces of the sequence that go through an MLP one after another")
    offload: bool = option(False, "keep saved activations in host memory (GPUs)")
    val_every: int = option(0, "steps between validations (0: none)")
    val_batches: int = option(4, "global batches of a validation")
    save_every: int = option(100, "steps between checkpoints; the last step is always saved (0: only that)")
    keep: int = option(2, "newest checkpoints that are kept (0: all)")

    def __post_init__(self):
        object.__setattr__(self, "dtype", SHORT.get(self.dtype, self.dtype))
        object.__setattr__(self, "reduce_dtype", SHORT.get(self.reduce_dtype, self.reduce_dtype))
        _at_least(self, 1, "seqlen", "steps", "loss_chunk", "mlp_tiles", "val_batches")
        _at_least(self, 0, "global_batch", "micro_batch", "lr", "warmup", "decay", "floor", "weight_decay", "beta1", "beta2", "eps")
        _at_least(self, 0, "clip", "seed", "val_every", "save_every", "keep")
        _known(self)
        for name in ("overlap", "mask_documents", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
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
            raise ValueError(f"decay={self.decay} is for --schedule wsd; {self.schedule} decays from the warm-up to the end.")
        if self.schedule == "wsd" and self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} are longer than steps={self.steps}.")
        if self.mask_documents:
            raise ValueError(
                "mask_documents: ringx.attention cannot mask documents packed into one sequence yet; without it, tokens see the "
                "documents before theirs in the sequence."
            )


@dataclass(frozen=True)
class Config:
    """All of a run.  Printed in full at its start, and kept beside its results as config.yaml."""

    name: str
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        c, engine = self.train, self.mesh.dp_engine
        if c.reduce_dtype != "float32" and (c.dtype != "bfloat16" or engine == "ddp"):
            raise ValueError(
                f"reduce_dtype={c.reduce_dtype} is for dtype=bfloat16 with FSDP2 or ZeRO; with dtype={c.dtype} and {engine} "
                "gradients are summed in their own dtype: leave it out."
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, width=120)

    def changed(self, flags: dict[str, Any]) -> "Config":
        """With these fields of `train` and `mesh` in place of its own."""
        parts = {}
        for part in ("train", "mesh"):
            names = {f.name for f in dataclasses.fields(getattr(self, part))}
            parts[part] = replace(getattr(self, part), **{k: v for k, v in flags.items() if k in names})
        return replace(self, **parts)

    def plan_batch(self, shape: Shape) -> tuple[int, int, int]:
        """(sequences of a step, of a dp group in one pass, passes); ValueError where they do not divide."""
        total = self.train.global_batch or shape.dp * (self.train.micro_batch or 1)
        if total % shape.dp:
            raise ValueError(f"global_batch={total} must be a multiple of dp={shape.dp}: each group takes equally many sequences.")
        mine = total // shape.dp
        micro = self.train.micro_batch or mine
        if mine % micro:
            raise ValueError(
                f"micro_batch={micro} must divide the {mine} sequences of a dp group (global_batch={total}, dp={shape.dp})."
            )
        return total, micro, mine // micro

    def expect_fits(self, shape: Shape) -> None:
        """ValueError naming the first size that this mesh cannot cut."""
        c, m = self.train, self.model
        self.plan_batch(shape)
        sharding = ringx.Sharding(c.seqlen, shape.cp, c.layout)
        if shape.tp > 1:
            for name in ("heads", "kv_heads", "ffn", "vocab"):
                if getattr(m, name) % shape.tp:
                    raise ValueError(f"tp={shape.tp} does not divide {name}={getattr(m, name)} of the model; take a smaller --tp.")
            for rank in range(shape.cp):
                if sharding.size(rank) % shape.tp:
                    raise ValueError(
                        f"seqlen={c.seqlen} leaves {sharding.size(rank)} tokens on a cp rank, which tp={shape.tp} cannot cut "
                        f"evenly; take a multiple of {2 * shape.cp * shape.tp}."
                    )
            if self.mesh.dp_engine != "fsdp":
                raise ValueError(f"dp_engine={self.mesh.dp_engine} cannot be combined with tp={shape.tp}; use --dp-engine fsdp.")
        if c.mlp_tiles > min(sharding.size(r) for r in range(shape.cp)) // shape.tp:
            raise ValueError(f"mlp_tiles={c.mlp_tiles} is more than the tokens that a rank holds.")


def load(path: str) -> Config:
    """The configuration of a YAML file: `preset` to start from (or all of `model`), then what it changes.

    Raises ValueError naming the file and the key."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f"--config {path}: cannot be read: {' '.join(str(e).split())}.") from None
    if not isinstance(given, dict):
        raise ValueError(f"--config {path}: it must be a mapping with the keys preset, name, model, train, mesh.")
    if unknown := set(given) - {"preset", "name", "model", "train", "mesh"}:
        raise ValueError(f"--config {path}: unknown key {sorted(unknown)[0]!r}; known: preset, name, model, train, mesh.")
    base = preset(given["preset"]) if "preset" in given else None
    parts: dict[str, Any] = {"name": str(given.get("name", base.name if base else Path(path).stem))}
    for part, kind in (("model", ModelConfig), ("train", TrainConfig), ("mesh", MeshConfig)):
        values = given.get(part) or {}
        names = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(values, dict) or (unknown := set(values) - names):
            bad = sorted(unknown)[0] if isinstance(values, dict) else values
            raise ValueError(f"--config {path}: {part} has no field {bad!r}; it has {', '.join(sorted(names))}.")
        try:
            parts[part] = replace(getattr(base, part), **values) if base else kind(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"--config {path}: {part}: {e}") from None
    return Config(**parts)


def preset(name: str) -> Config:
    return PRESETS[name_of(name, PRESETS, "preset")]


def long_base(seqlen: int, head_dim: int = 128, base: float = 500_000.0, trained: int = 8192) -> float:
    """RoPE's base for a longer context: the slowest frequency then turns over seqlen as it did over `trained`, and the fastest
    is left alone ("NTK-aware" interpolation; e.g. Peng et al., YaRN, arXiv 2309.00071, eq. 16)."""
    return round(base * max(1.0, seqlen / trained) ** (head_dim / (head_dim - 2)))


_8B = ModelConfig(dim=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256, tied=False)
_LONG = {"8k": 8192, "32k": 32768, "128k": 131072, "256k": 262144, "512k": 524288, "1m": 1048576}


def _recipe(name: str, seqlen: int) -> Config:
    """Llama 3 8B at a context length: 8K tokens a rank, whatever the length; attention is never recomputed."""
    if seqlen == 131072:  # as Llama 3.1 was trained
        model = replace(_8B, rope_factor=8.0)
    else:
        model = replace(_8B, rope_base=float(long_base(seqlen)))
    train = TrainConfig(
        seqlen=seqlen, steps=1000, lr=2e-5, warmup=50, checkpointing="selective", mlp_tiles=4, save_every=100, val_every=100
    )
    return Config(name, model, train, MeshConfig(cp=max(1, seqlen // 8192)))


PRESETS = {
    c.name: c
    for c in (
        Config(  # what `make demo` trains: 20 steps in seconds on one core, even in fp64
            "tiny",
            ModelConfig(dim=128, layers=3, heads=4, kv_heads=2, ffn=256, vocab=320),
            TrainConfig(seqlen=512, global_batch=4, steps=20, lr=1e-3, dtype="float32", save_every=5),
        ),
        Config(  # GPT-2 small's size as a Llama
            "160m",
            ModelConfig(dim=768, layers=12, heads=12, kv_heads=12, ffn=3072, vocab=32000, tied=False),
            TrainConfig(seqlen=8192, global_batch=64, steps=20_000, lr=6e-4, warmup=500, val_every=500, save_every=500),
        ),
        Config(  # Llama 3.2 1B
            "1b",
            ModelConfig(dim=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=128256, rope_factor=32.0),
            TrainConfig(seqlen=8192, steps=10_000, lr=3e-4, warmup=500, checkpointing="selective", val_every=500, save_every=500),
        ),
        Config(  # Llama 3.1 8B
            "8b",
            replace(_8B, rope_factor=8.0),
            TrainConfig(seqlen=8192, steps=10_000, lr=3e-4, warmup=500, checkpointing="selective", val_every=500, save_every=500),
        ),
        *(_recipe(f"8b-{label}", seqlen) for label, seqlen in _LONG.items()),
    )
}
