"""Configuration of the ViT app: the model, what it reads and forecasts, and the presets."""

import dataclasses
from dataclasses import dataclass, field
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
    """The shape of a ViT.

    The last five fields are those of the data: they are filled in when it is opened.  A large
    preset gives them for --estimate."""

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
        """How fields are cut into tokens; ValueError if the patch is larger than the grid."""
        return PatchGrid(self.height, self.width, self.patch, self.periodic)


@dataclass(frozen=True)
class DataConfig:
    """What is read of the data, and what is forecast.  All is text, as on the command line."""

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
        "what is seen besides the fields: time_of_day, time_of_year, latitude, static, climatology "
        "(auto: all there is)",
    )
    train_times: str = option(
        "", "training times, START/STOP as dates or indices (default: the first 70 %%)"
    )
    val_times: str = option("", "validation times (default: the next 15 %%)")
    test_times: str = option("", "test times (default: the rest)")

    def __post_init__(self):
        for declared in dataclasses.fields(self):
            value = getattr(self, declared.name)
            if not isinstance(value, str):
                object.__setattr__(self, declared.name, _to_text(value))
        require_known_choices(self)
        _require_hours("leads", self.leads, least=1)
        _require_hours("history", self.history, least=0)

    def input_names(self) -> "tuple[str, ...] | None":
        """Names of `inputs`; None for all that there are."""
        if self.inputs == "auto":
            return None
        names = [name.strip() for name in self.inputs.split(",")]
        return tuple(name for name in names if name)

    def lead_hours(self) -> tuple[int, ...]:
        return _hours(self.leads)

    def history_hours(self) -> tuple[int, ...]:
        return _hours(self.history)

    def hours(self) -> tuple[int, ...]:
        """The time spans of all changes whose statistics are needed, ascending."""
        return tuple(sorted({*self.lead_hours(), *self.history_hours()}))


def _require_hours(name: str, text: str, *, least: int) -> None:
    """ValueError unless `text` lists at least `least` different whole numbers of hours above 0."""
    try:
        hours = _hours(text)
    except ValueError:
        hours = (0,)
    different = len(set(hours)) == len(hours)
    if len(hours) < least or min(hours, default=1) < 1 or not different:
        raise ValueError(
            f"{name}={text!r} must be different whole numbers of hours above 0, such as 6,24."
        )


def _hours(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    return tuple(int(word) for word in text.split(","))


def _to_text(value: object) -> str:
    """The text of a field for which YAML gives a list, a number or nothing."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)


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
        """ValueError naming the first size that ranks of this shape cannot share.

        Sizes that depend on the grid are checked once it is known."""
        self.plan_batch(shape)
        if shape.tp > 1:
            self._expect_fits_tp(shape.tp)
        if self.model.height:
            self._expect_fits_tokens(shape)

    def _expect_fits_tp(self, tp: int) -> None:
        for name, size in (("heads", self.model.heads), ("ffn", self.model.hidden)):
            if size % tp:
                raise ValueError(
                    f"tp={tp} does not divide {name}={size} of the model; take a smaller --tp."
                )
        engine = self.mesh.dp_engine
        if engine != "fsdp":
            raise ValueError(
                f"dp_engine={engine} cannot be combined with tp={tp}; use --dp-engine fsdp."
            )

    def _expect_fits_tokens(self, shape: Shape) -> None:
        tokens = self.model.patch_grid().tokens
        if shape.cp > tokens:
            raise ValueError(
                f"cp={shape.cp} is more than the {tokens} tokens of a field; take a smaller --cp "
                f"or --patch."
            )
        sharding = ringx.Sharding(tokens, shape.cp, self.train.layout)
        fewest = min(sharding.size(rank) for rank in range(shape.cp))
        mlp_tiles = self.train.mlp_tiles
        if mlp_tiles > -(-fewest // shape.tp):
            raise ValueError(f"mlp_tiles={mlp_tiles} is more than the tokens that a rank holds.")


def load(path: str) -> Config:
    """The configuration of a YAML file, or of one in apps/vit/configs by its name alone.

    Raises:
        ValueError: there is no such file or name, or ``apps.common.config.load`` refuses it."""
    given = Path(path)
    named = CONFIGS / f"{path}.yaml"
    if not given.is_file() and named.exists():
        path = str(named)
    elif not given.exists() and given.suffix not in (".yaml", ".yml"):
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise ValueError(
            f"--config {path}: there is no such file, and no such name in apps/vit/configs; "
            f"names: {names}."
        )
    return load_yaml(path, Config, PRESETS)


def preset(name: str) -> Config:
    """The preset of this name; ValueError for an unknown one."""
    return PRESETS[require_name(name, PRESETS, "preset")]


# For the default data on one core: seconds a step in fp32, even at patch 1.
_TINY = Config(
    name="tiny",
    model=ModelConfig(dim=96, layers=3, heads=4),
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
)
_5M = Config(
    name="5m",
    model=ModelConfig(dim=256, layers=6, heads=4),
    train=TrainConfig(global_batch=32, steps=5000, lr=1e-3, warmup=200),
)
_90M = Config(
    name="90m",
    model=ModelConfig(dim=768, layers=12, heads=12),
    train=TrainConfig(global_batch=64, steps=20_000, warmup=500),
)
_300M = Config(
    name="300m",
    model=ModelConfig(dim=1024, layers=24, heads=16),
    train=TrainConfig(global_batch=64, steps=50_000, warmup=1000),
)


def _large(patch: int, cp: int = 0, positions: str = "learned") -> Config:
    """2.6 billion parameters, on 20 channels at half a degree."""
    return Config(
        name=f"2.6b-p{patch}",
        model=ModelConfig(
            dim=4096,
            layers=12,
            heads=32,
            patch=patch,
            positions=positions,
            height=360,
            width=720,
            in_channels=20,
            out_channels=20,
        ),
        train=TrainConfig(
            steps=100_000,
            lr=5e-4,
            warmup=1000,
            checkpointing="selective",
            mlp_tiles=4,
            val_every=1000,
            save_every=1000,
        ),
        mesh=MeshConfig(cp=cp),
    )


PRESETS = {
    config.name: config
    for config in (
        _TINY,
        _5M,
        _90M,
        _300M,
        # A table of 259,200 learned positions would be another billion of parameters.
        _large(patch=1, cp=32, positions="sinusoidal"),
        _large(patch=2, cp=8),
        _large(patch=4),
        _large(patch=8),
    )
}
