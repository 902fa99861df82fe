"""Configuration of the ViT app: the shape of a ViT, what it reads and forecasts, and the presets."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path

import ringx
from apps.common.config import (
    MeshConfig,
    RunConfig,
    Training,
    option,
    require_at_least,
    require_known_choices,
)
from apps.common.config import load as load_yaml
from ringx.checks import require_name
from ringx.launch.mesh import Shape
from ringx.layout import LAYOUTS

from .data.samples import BASES
from .patches import PatchGrid

CONFIGS = Path(__file__).parent / "configs"
POSITIONS = ("learned", "sinusoidal")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a ViT.  The last five are the data's, and filled in when it is opened; a preset gives them for --estimate."""

    dim: int = option(192, "width of the residual stream")
    layers: int = option(6, "blocks")
    heads: int = option(6, "heads of the attention")
    ffn: int = option(0, "width of the MLP (0: 4 dim)")
    patch: int = option(2, "points of a token's side, 1 to 8")
    positions: str = option("learned", "how a token knows its place", POSITIONS)
    height: int = 0  # points from north to south
    width: int = 0  # points from west to east
    periodic: bool = True  # the grid goes around the globe
    in_channels: int = 0
    out_channels: int = 0

    def __post_init__(self):
        require_at_least(self, 1, "dim", "layers", "heads", "patch")
        require_at_least(self, 0, "ffn", "height", "width", "in_channels", "out_channels")
        require_known_choices(self)
        if self.patch > 8:
            raise ValueError(f"patch={self.patch} must be at most 8.")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}.")
        if self.positions == "sinusoidal" and self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4 for sinusoidal positions.")

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return self.ffn or 4 * self.dim

    def patch_grid(self) -> PatchGrid:
        return PatchGrid(self.height, self.width, self.patch, self.periodic)


@dataclass(frozen=True)
class DataConfig:
    """What is read of the data, and what is forecast.  All are words, as on the command line."""

    variables: str = option("", "variables, such as t2m,z (default: all)")
    levels: str = option(
        "", "pressure levels in hPa of those that have levels, such as 500,850 (default: all)"
    )
    channel_names: str = option(
        "", "names of the channels of HDF5 files, which hold none, such as u10,v10,t2m"
    )
    leads: str = option("6", "hours ahead, such as 6,24,72; all are forecast at once")
    history: str = option("", "hours before that are seen too, such as 6 or 1,2,3 (default: none)")
    base: str = option(
        "none",
        "the simple forecast that the model corrects; none: it makes the whole forecast",
        BASES,
    )
    inputs: str = option(
        "auto",
        "what is seen besides the fields: time_of_day, time_of_year, latitude, static, climatology (auto: all there is)",
    )
    train_times: str = option(
        "", "training times, START/STOP as dates or indices (default: the first 70 %%)"
    )
    val_times: str = option("", "validation times (default: the next 15 %%)")
    test_times: str = option("", "test times (default: the rest)")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if not isinstance(getattr(self, f.name), str):
                object.__setattr__(self, f.name, _words(getattr(self, f.name)))
        require_known_choices(self)
        for name, least in (("leads", 1), ("history", 0)):
            text = getattr(self, name)
            try:
                hours = _hours(text)
            except ValueError:
                hours = (0,)
            if len(hours) < least or min(hours, default=1) < 1 or len(set(hours)) < len(hours):
                raise ValueError(
                    f"{name}={text!r} must be different whole numbers of hours above 0, such as 6,24."
                )

    def input_names(self) -> "tuple[str, ...] | None":
        """None for all that there are."""
        return (
            None
            if self.inputs == "auto"
            else tuple(name.strip() for name in self.inputs.split(",") if name.strip())
        )

    def lead_hours(self) -> tuple[int, ...]:
        return _hours(self.leads)

    def history_hours(self) -> tuple[int, ...]:
        return _hours(self.history)

    def hours(self) -> tuple[int, ...]:
        """Of all changes that statistics are needed of."""
        return tuple(sorted({*self.lead_hours(), *self.history_hours()}))


def _hours(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",")) if text else ()


def _words(value: object) -> str:
    """What YAML makes of a field: a list, a number or nothing."""
    return (
        ",".join(map(str, value))
        if isinstance(value, (list, tuple))
        else ""
        if value is None
        else str(value)
    )


@dataclass(frozen=True)
class TrainConfig(Training):
    """How it is trained.  A sample is the grid at one time."""

    layout: str = option("contiguous", "which tokens a rank of the cp group holds", LAYOUTS)
    epochs: int = option(
        0, "passes over the training times, in place of --steps; validates after each"
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 0, "epochs")


@dataclass(frozen=True)
class Config(RunConfig):
    """All of a run."""

    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def expect_fits(self, shape: Shape) -> None:
        """ValueError naming the first size that this mesh cannot cut.  What depends on the grid is seen where that is known."""
        c, m = self.train, self.model
        self.plan_batch(shape)
        if shape.tp > 1:
            for name, size in (("heads", m.heads), ("ffn", m.hidden)):
                if size % shape.tp:
                    raise ValueError(
                        f"tp={shape.tp} does not divide {name}={size} of the model; take a smaller --tp."
                    )
            if self.mesh.dp_engine != "fsdp":
                raise ValueError(
                    f"dp_engine={self.mesh.dp_engine} cannot be combined with tp={shape.tp}; use --dp-engine fsdp."
                )
        if not m.height:
            return
        tokens = m.patch_grid().tokens
        if shape.cp > tokens:
            raise ValueError(
                f"cp={shape.cp} is more than the {tokens} tokens of a field; take a smaller --cp or --patch."
            )
        sharding = ringx.Sharding(tokens, shape.cp, c.layout)
        least = min(sharding.size(r) for r in range(shape.cp))
        if c.mlp_tiles > -(-least // shape.tp):
            raise ValueError(f"mlp_tiles={c.mlp_tiles} is more than the tokens that a rank holds.")


def load(path: str) -> Config:
    """The configuration of a YAML file (see ``apps.common.config.load``), or of one in apps/vit/configs by its name alone."""
    if not Path(path).is_file() and (CONFIGS / f"{path}.yaml").exists():
        path = str(CONFIGS / f"{path}.yaml")
    elif not Path(path).exists() and Path(path).suffix not in (".yaml", ".yml"):
        there = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise ValueError(
            f"--config {path}: there is no such file, and no such name in apps/vit/configs; names: {there}."
        )
    return load_yaml(path, Config, PRESETS)


def preset(name: str) -> Config:
    return PRESETS[require_name(name, PRESETS, "preset")]


_ERA = dict(
    height=360, width=720, in_channels=20, out_channels=20
)  # half a degree, as the public ancestor trains


def _large(name: str, dim: int, heads: int, layers: int, patch: int) -> Config:
    train = TrainConfig(
        steps=100_000,
        lr=5e-4,
        warmup=1000,
        checkpointing="selective",
        mlp_tiles=4,
        val_every=1000,
        save_every=1000,
    )
    return Config(
        name, ModelConfig(dim=dim, heads=heads, layers=layers, patch=patch, **_ERA), train=train
    )  # type: ignore[arg-type]


PRESETS = {
    c.name: c
    for c in (
        Config(  # the default data on one core: seconds a step in fp32 even at patch 1
            "tiny",
            ModelConfig(dim=96, layers=3, heads=4),
            train=TrainConfig(
                global_batch=16,
                steps=300,
                lr=2e-3,
                warmup=5,
                dtype="float32",
                weight_decay=0.05,
                val_every=100,
                save_every=100,
            ),
        ),
        Config(
            "5m",
            ModelConfig(dim=256, layers=6, heads=4),
            train=TrainConfig(global_batch=32, steps=5000, lr=1e-3, warmup=200),
        ),
        Config(
            "90m",
            ModelConfig(dim=768, layers=12, heads=12),
            train=TrainConfig(global_batch=64, steps=20_000, warmup=500),
        ),
        Config(
            "300m",
            ModelConfig(dim=1024, layers=24, heads=16),
            train=TrainConfig(global_batch=64, steps=50_000, warmup=1000),
        ),
        *(_large(f"2.6b-p{p}", 4096, 32, 12, p) for p in (1, 2, 4, 8)),
    )
}
_P1 = PRESETS[
    "2.6b-p1"
]  # a table of 259,200 learned positions would be another billion of parameters
PRESETS["2.6b-p1"] = replace(
    _P1, mesh=MeshConfig(cp=32), model=replace(_P1.model, positions="sinusoidal")
)
PRESETS["2.6b-p2"] = replace(PRESETS["2.6b-p2"], mesh=MeshConfig(cp=8))
