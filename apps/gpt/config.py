"""Configuration of the GPT app: the shape of a Llama, how it is trained, and the presets."""

from dataclasses import dataclass, field, replace

import ringx
from apps.common.config import MeshConfig, RunConfig, Training, option, require_at_least
from apps.common.config import load as load_yaml
from ringx.checks import require_name
from ringx.launch.mesh import Shape


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
        require_at_least(
            self,
            1,
            "dim",
            "layers",
            "heads",
            "kv_heads",
            "ffn",
            "vocab",
            "rope_factor",
            "rope_original",
        )
        require_at_least(self, 0, "rope_base", "rope_low", "rope_high", "norm_eps")
        if self.head_dim == 0 and self.dim % self.heads == 0:
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} (dim={self.dim}, heads={self.heads}): "
                "RoPE needs an even head size."
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if self.rope_factor > 1 and self.rope_high <= self.rope_low:
            raise ValueError(
                f"rope_high={self.rope_high} must be greater than rope_low={self.rope_low}."
            )


@dataclass(frozen=True)
class TrainConfig(Training):
    """How it is trained.  A sample is a sequence."""

    seqlen: int = option(8192, "tokens of a sequence, whatever the number of ranks")
    mask_documents: bool = option(False, "tokens see only their own document")
    loss_chunk: int = option(
        1024, "tokens whose logits exist at once; the whole [S, vocab] never does"
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "seqlen", "loss_chunk")
        if self.mask_documents:
            raise ValueError(
                "mask_documents: ringx.attention cannot mask documents packed into one sequence "
                "yet; without it, tokens see the documents before theirs in the sequence."
            )


@dataclass(frozen=True)
class Config(RunConfig):
    """All of a run."""

    name: str
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def expect_fits(self, shape: Shape) -> None:
        """ValueError naming the first size that this mesh cannot cut."""
        train = self.train
        self.plan_batch(shape)
        sharding = ringx.Sharding(train.seqlen, shape.cp, train.layout)
        local_sizes = [sharding.size(rank) for rank in range(shape.cp)]
        if shape.tp > 1:
            self._expect_tensor_parallel(shape, local_sizes)
        if train.mlp_tiles > min(local_sizes) // shape.tp:
            raise ValueError(
                f"mlp_tiles={train.mlp_tiles} is more than the tokens that a rank holds."
            )

    def _expect_tensor_parallel(self, shape: Shape, local_sizes: list[int]) -> None:
        """ValueError naming the first size that tp cannot cut; local_sizes: tokens of cp ranks."""
        for name in ("heads", "kv_heads", "ffn", "vocab"):
            size = getattr(self.model, name)
            if size % shape.tp:
                raise ValueError(
                    f"tp={shape.tp} does not divide {name}={size} of the model; "
                    "take a smaller --tp."
                )
        for size in local_sizes:
            if size % shape.tp:
                raise ValueError(
                    f"seqlen={self.train.seqlen} leaves {size} tokens on a cp rank, "
                    f"which tp={shape.tp} cannot cut evenly; "
                    f"take a multiple of {2 * shape.cp * shape.tp}."
                )
        if self.mesh.dp_engine != "fsdp":
            raise ValueError(
                f"dp_engine={self.mesh.dp_engine} cannot be combined with tp={shape.tp}; "
                "use --dp-engine fsdp."
            )


def load(path: str) -> Config:
    """The configuration of a YAML file: see ``apps.common.config.load``."""
    return load_yaml(path, Config, PRESETS)


def preset(name: str) -> Config:
    """The preset of this name; ValueError if there is none."""
    return PRESETS[require_name(name, PRESETS, "preset")]


def long_base(
    seqlen: int, head_dim: int = 128, base: float = 500_000.0, trained: int = 8192
) -> float:
    """RoPE's base for a longer context.

    The slowest frequency then turns over seqlen as it did over `trained`, and the fastest is left
    as it is ("NTK-aware" interpolation; e.g. Peng et al., YaRN, arXiv 2309.00071, eq. 16)."""
    return round(base * max(1.0, seqlen / trained) ** (head_dim / (head_dim - 2)))


LLAMA_8B = ModelConfig(
    dim=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256, tied=False
)
CONTEXT_LENGTHS = {
    "8k": 8192,
    "32k": 32768,
    "128k": 131072,
    "256k": 262144,
    "512k": 524288,
    "1m": 1048576,
}


def _long_context_preset(name: str, seqlen: int) -> Config:
    """Llama 3 8B at a context length.

    Each rank holds 8K tokens, whatever the length; attention is never recomputed."""
    if seqlen == 131072:  # as Llama 3.1 was trained
        model = replace(LLAMA_8B, rope_factor=8.0)
    else:
        model = replace(LLAMA_8B, rope_base=float(long_base(seqlen)))
    train = TrainConfig(
        seqlen=seqlen,
        steps=1000,
        lr=2e-5,
        warmup=50,
        checkpointing="selective",
        mlp_tiles=4,
        save_every=100,
        val_every=100,
    )
    return Config(name, model, train, MeshConfig(cp=max(1, seqlen // 8192)))


PRESETS = {
    config.name: config
    for config in (
        Config(  # what `make demo` trains: 20 steps in seconds on one core, even in fp64
            "tiny",
            ModelConfig(dim=128, layers=3, heads=4, kv_heads=2, ffn=256, vocab=320),
            TrainConfig(
                seqlen=512, global_batch=4, steps=20, lr=1e-3, dtype="float32", save_every=5
            ),
        ),
        Config(  # GPT-2 small's size as a Llama
            "160m",
            ModelConfig(
                dim=768, layers=12, heads=12, kv_heads=12, ffn=3072, vocab=32000, tied=False
            ),
            TrainConfig(
                seqlen=8192,
                global_batch=64,
                steps=20_000,
                lr=6e-4,
                warmup=500,
                val_every=500,
                save_every=500,
            ),
        ),
        Config(  # Llama 3.2 1B
            "1b",
            ModelConfig(
                dim=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=128256, rope_factor=32.0
            ),
            TrainConfig(
                seqlen=8192,
                steps=10_000,
                lr=3e-4,
                warmup=500,
                checkpointing="selective",
                val_every=500,
                save_every=500,
            ),
        ),
        Config(  # Llama 3.1 8B
            "8b",
            replace(LLAMA_8B, rope_factor=8.0),
            TrainConfig(
                seqlen=8192,
                steps=10_000,
                lr=3e-4,
                warmup=500,
                checkpointing="selective",
                val_every=500,
                save_every=500,
            ),
        ),
        *(_long_context_preset(f"8b-{label}", seqlen) for label, seqlen in CONTEXT_LENGTHS.items()),
    )
}
