"""Train a Vision Transformer to forecast fields on a grid, over context, tensor and data parallel ranks.

    python -m apps.vit.train --preset tiny --out run                                   # one process, data made on the spot
    python -m apps.vit.train --data era5.nc --patch 1 --leads 6,24 --cp 4 --nproc 4 --out run
    torchrun --nproc-per-node 4 apps/vit/train.py --data era5.zarr --cp 2 --tp 2 --out run
    python -m apps.vit.train --resume run --cp 4 --nproc 4                             # go on, on any mesh
    python -m apps.vit.train --preset 2.6b-p1 --cp 32 --dp 128 --dry-run               # what 4,096 ranks would do

The model forecasts the fields themselves, or corrects a simple forecast, --base: persistence or the damped anomaly.  The loss is
the mean over samples, leads, channels and points of the squared error, each point weighted by cos(latitude) over its mean, each
lead and channel divided by the mean squared error, in the training times, of the simple forecast (or of the mean): about 1 before
the first step.

OUT holds config.yaml and run.json (what was run), metrics.jsonl and tensorboard/ (a record per step), checkpoints/ and statistics/
(means, deviations and climatology of the training times).  ``apps/vit/predict.py`` takes it from there.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common import command
from apps.common.arguments import Parser
from apps.common.config import add_flags
from apps.common.engine import Engine
from apps.common.loop import Record, StepWork, run_steps
from apps.common.parallel import kept_dtype
from apps.common.run import RunOptions, TrainingRun
from apps.vit.config import PRESETS, Config, DataConfig, ModelConfig, TrainConfig, load, preset
from apps.vit.data.samples import Samples
from apps.vit.data.statistics import Statistics, statistics
from apps.vit.flops import flops_per_token, parameters
from apps.vit.open_data import (
    STATISTICS,
    data_path,
    make_samples,
    open_record,
    open_same_record,
    split_record,
    with_data_sizes,
    with_expected_data_sizes,
)
from apps.vit.parallel import Attend, build
from ringx.launch import World
from ringx.launch.mesh import Mesh, Shape

PROG = "apps.vit.train"


# ---- training


def train(
    config: Config,
    samples: Samples,
    mesh: Mesh,
    engine: Engine,
    attend: Attend,
    *,
    val: Samples | None = None,
    first: int = 0,
    on_step: Callable[[Record], None] = lambda record: None,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """``run_steps`` on fields; every rank calls it with the same arguments."""
    c, patches = config.train, config.model.patch_grid()
    total, micro, _ = config.plan_batch(mesh.shape)
    mine = config.my_samples(mesh.shape, mesh.dp_rank)
    epoch = math.ceil(len(samples) / total)
    cut = BatchSharder(config, mesh, attend, engine.device, samples)

    def read(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return cut.read(samples, samples.rows(step, total, c.seed)[mine.start : mine.stop])

    def parts(data: tuple[torch.Tensor, torch.Tensor]) -> list[tuple]:
        return [cut(*piece) for piece in zip(*(x.split(micro) for x in data), strict=True)]

    def validate() -> dict[str, float]:
        return {} if val is None else validation_metrics(val, config, mesh, engine, cut)

    def numbered(record: Record) -> None:
        on_step({**record, "epoch": (record["step"] + 1) / epoch})

    count = total * math.prod((config.model.out_channels, config.model.height, config.model.width))
    work = StepWork(
        read, parts, count, total * patches.tokens, flops_per_token(config.model), validate
    )
    run_steps(c, engine, attend, work, first=first, on_step=numbered, before_step=before_step)


class BatchSharder:
    """This rank's tokens of samples."""

    def __init__(
        self, config: Config, mesh: Mesh, attend: Attend, device: torch.device, samples: Samples
    ):
        self._patches, self._device, self._dtype = (
            config.model.patch_grid(),
            device,
            kept_dtype(config.train),
        )
        self.places = ringx.positions(self._patches.tokens, group=mesh.cp, layout=attend.layout)
        latitudes = torch.from_numpy(samples.fields.grid.weights())
        self.weights = self._patches.patchify_weights(latitudes, self.places).to(
            device, self._dtype
        )

    def read(self, samples: Samples, t0s: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [n, Cin, H, W] and targets [n, L C, H, W] of the samples, whole."""
        inputs, target = (torch.from_numpy(x) for x in samples.get(t0s))
        return inputs, target.flatten(1, 2)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self._patches.patchify(x, self.places).to(self._device, self._dtype)

    def __call__(self, inputs: torch.Tensor, target: torch.Tensor) -> tuple:
        """What the model is called with."""
        return self.tokens(inputs), self.places.to(self._device), self.tokens(target), self.weights


def validation_metrics(
    val: Samples, config: Config, mesh: Mesh, engine: Engine, cut: BatchSharder
) -> dict[str, float]:
    """val_loss, and the latitude-weighted root mean square error of each channel and lead in its own unit, over samples spread
    evenly over the validation times; on every rank."""
    _, micro, _ = config.plan_batch(mesh.shape)
    chosen = validation_t0s(val, config)
    mine = chosen[mesh.dp_rank :: mesh.shape.dp]
    squares = torch.zeros(config.model.out_channels, dtype=torch.float64, device=engine.device)
    most = math.ceil(len(chosen) / mesh.shape.dp)  # all ranks must make as many passes
    with torch.no_grad():
        for i in range(0, most, micro):
            t0s = mine[i : i + micro]
            inputs, target = cut.read(val, t0s if len(t0s) else chosen[:1])
            x, places, wanted, weights = cut(inputs, target)
            error = (engine(x, places).double() - wanted).unflatten(
                -1, (config.model.out_channels, -1)
            )
            if len(t0s):
                squares += (error.square() * weights[:, None]).sum((0, 1, 3))
    height, width = config.model.height, config.model.width
    means = engine.sum(squares) / (len(chosen) * height * width)
    rmse = means.sqrt().view(len(val.leads), -1).cpu().numpy() * val.scale
    names = val.fields.channels
    of_each = {
        f"val_rmse/{name}+{lead}h": float(rmse[i, j])
        for i, lead in enumerate(val.leads)
        for j, name in enumerate(names)
    }
    return {"val_loss": float(means.mean()), **of_each}


def validation_t0s(val: Samples, config: Config) -> np.ndarray:
    """The initial times that validation takes, spread evenly: --val-batches times a global batch of them."""
    starts = val.starts(val.leads[0])
    most = min(len(starts), config.train.global_batch * config.train.val_batches)
    return starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]


class VitRun(TrainingRun):
    """A run on gridded fields."""

    prog = PROG
    loss_unit = "squared error, 1 before training"
    must_match = (
        *(("train", k, "the data would come in another order") for k in ("global_batch", "seed")),
        *(
            ("data", k, "the model would forecast something else")
            for k in ("variables", "levels", "leads", "history", "base", "inputs")
        ),
        ("data", "train_times", "it would learn from other times"),
    )
    config: Config

    def open_data(self) -> None:
        c = self.config.data

        def prepare() -> tuple[str, Statistics, str]:
            path = data_path(self.options.data)
            fields = open_record(path, c)
            made = statistics(
                fields, split_record(fields, c)["train"], c.hours(), cache=self.out / STATISTICS
            )
            make_samples(fields, c, made, "train")
            if self.config.train.val_every or self.config.train.epochs:
                make_samples(fields, c, made, "val")
            return path, made, fields.identity

        self.path, made, identity = ringx.launch.decide(self.world, prepare)
        self.fields = open_same_record(self.path, c, identity, self.world)
        self.samples = make_samples(self.fields, c, made, "train")
        validates = self.config.train.val_every or self.config.train.epochs
        self.val = make_samples(self.fields, c, made, "val") if validates else None
        self.config = with_data_sizes(self.config, self.fields, self.samples)
        self.config.expect_fits(self.config.mesh.fit(self.world.world_size))

    def complete_config(self) -> None:
        c = self.config.train
        if c.epochs:
            epoch = math.ceil(len(self.samples) / c.global_batch)
            self.config = replace(
                self.config, train=replace(c, steps=c.epochs * epoch, val_every=epoch)
            )
        if self.val:
            val = self.val

            def expect_values() -> None:  # now, not at the first validation
                for t0 in validation_t0s(val, self.config):
                    val.get([t0])

            ringx.launch.decide(self.world, expect_values)

    def data_sha256(self) -> str:
        return self.fields.identity

    def data_metadata(self) -> dict[str, Any]:
        f = self.fields
        paths = ",".join(str(Path(p).resolve()) for p in self.path.split(","))
        times = {
            "first": str(f.times[0]),
            "last": str(f.times[-1]),
            "step_hours": f.step_hours,
            "times": len(f),
        }
        return {
            "source": f.source,
            **times,
            "channels": list(f.channels),
            "sha256": f.identity,
            "folder": paths,
        }

    def describe(self) -> str:
        m, f = self.config.model, self.fields
        about = f"{len(f)} times x {len(f.channels)} channels x {m.height} x {m.width} points, {len(self.samples)} samples"
        return f"data: {f.source}, {about}; model: {parameters(m).total:,} parameters, {m.patch_grid().tokens:,} tokens a field"

    def build_engine(self, weights: bool) -> Engine:
        self.attend = Attend(self.config, self.mesh)
        return build(
            self.config,
            self.mesh,
            self.attend,
            self.world.device,
            weights="new" if weights else None,
        )

    def train_steps(
        self, first: int, on_step: Callable[[Record], None], before_step: Callable[[int], None]
    ) -> None:
        how: dict[str, Any] = {"first": first, "on_step": on_step, "before_step": before_step}
        train(self.config, self.samples, self.mesh, self.engine, self.attend, val=self.val, **how)

    def describe_step(self) -> str:
        return f"{self.config.train.global_batch} fields of {self.config.model.patch_grid().tokens} tokens"


def work(world: World, options: RunOptions) -> int:
    """One rank's part of the command; returns the process's exit status."""
    return VitRun(world, options).main()


# ---- the command line


def parser() -> Parser:
    p = Parser(
        PROG,
        description="Train a Vision Transformer to forecast fields on a grid, over context, tensor and data ranks.",
    )
    command.add_run_flags(
        p,
        preset=f"model and training to start from: {', '.join(PRESETS)} (default: tiny)",
        data="NetCDF, Zarr or HDF5: a file, a folder, a pattern, or several with commas between (default: the resumed run's, or a "
        "simulation made on the spot)",
        out="vit_out",
    )
    add_flags(p, "data", DataConfig)
    add_flags(p, "model, in place of the preset's", ModelConfig)
    add_flags(p, "training, in place of the preset's", TrainConfig)
    return p


def configure(args: argparse.Namespace) -> tuple[RunOptions, Shape | None]:
    """(the options, its mesh if it is known yet).  Everything that can be known to be wrong before ranks start raises ValueError or
    NotImplementedError here."""
    if args.preset and args.config:
        raise ValueError(
            "--preset and --config: give one; a YAML file may itself start from a preset."
        )
    if args.epochs and args.steps:
        raise ValueError(f"--epochs {args.epochs} and --steps {args.steps}: give one.")
    config, shape = command.configure(args, base_config(args))
    if args.steps:
        config = replace(config, train=replace(config.train, epochs=0))
    if config.train.epochs and args.val_every is not None:
        raise ValueError(
            f"--val-every {args.val_every}: a run of epochs is validated after each; leave it out, or give --steps."
        )
    out = args.out or args.resume or "vit_out"
    options = RunOptions(
        config,
        out,
        args.data or resumed_data_path(args.resume),
        args.resume,
        None,
        args.tensorboard,
        args.wandb,
    )
    m = config.model
    if args.estimate or args.dry_run:
        if m.height and not args.data:
            if given := [
                f.name for f in dataclasses.fields(DataConfig) if getattr(args, f.name) is not None
            ]:
                flag = f"--{given[0].replace('_', '-')}"
                raise ValueError(
                    f"{flag}: without --data an estimate is of {config.name}'s own channels; name the --data it is for."
                )
        else:
            config = with_expected_data_sizes(config, args.data)
            options = replace(options, config=config)
            if shape:
                config.expect_fits(shape)
    else:
        command.expect_runnable(
            options, args, heads=(m.heads, m.heads), head_dim=m.dim // m.heads, causal=False
        )
    return options, shape


def base_config(args: argparse.Namespace) -> Config:
    """What the flags change: a preset, a YAML file, or the configuration of the run that is resumed."""
    if args.config:
        return load(args.config)
    if not args.preset and (resumed := command.resumed_config(args.resume)):
        return load(resumed)
    return preset(args.preset or "tiny")


def resumed_data_path(run: "str | None") -> "str | None":
    """The files that a run has read; None if it has none yet."""
    return command.resumed_data(run).get("folder")


def estimate(config: Config, shape: Shape) -> Any:
    from apps.vit.estimate import estimate_step  # here: it imports torch's testing tools

    return estimate_step(config, shape)


def main(argv: "list[str] | None" = None) -> int:
    return command.main(parser(), argv, configure, estimate, work)


if __name__ == "__main__":
    from apps.vit.train import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
