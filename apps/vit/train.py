"""Train a Vision Transformer to forecast fields on a grid, over context, tensor and data ranks.

    python -m apps.vit.train --preset tiny --out run
    python -m apps.vit.train --data era5.nc --patch 1 --leads 6,24 --cp 4 --nproc 4 --out run
    torchrun --nproc-per-node 4 apps/vit/train.py --data era5.zarr --cp 2 --tp 2 --out run
    python -m apps.vit.train --resume run --cp 4 --nproc 4
    python -m apps.vit.train --preset 2.6b-p1 --cp 32 --dp 128 --dry-run

The first is one process, on a record that it simulates; the fourth resumes a run, on any mesh; the
last prints what 4,096 ranks would do.

The model forecasts the fields themselves, or corrects a simple forecast, --base: persistence or the
damped anomaly.  The loss is the mean over samples, leads, channels and points of the squared
error, each point weighted by cos(latitude) over its mean, each lead and channel divided by the mean
squared error, in the training times, of the simple forecast (or of the mean): about 1 before the
first step.

OUT holds config.yaml and run.json (what was run), metrics.jsonl and tensorboard/ (a record per
step), checkpoints/ and statistics/ (means, deviations and climatology of the training times).
``apps/vit/predict.py`` forecasts from them.

Shapes: n samples, L leads, C channels of the record, Cin channels of the model's input, fields of
H x W points, S tokens of this rank, P points of a patch.
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
DEFAULT_OUT = "vit_out"

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs [n, Cin, H, W], targets [n, L C, H, W]


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
    """``run_steps`` on fields; every rank calls it with the same arguments.

    Args:
        config: that of the run, with the sizes of its data.
        samples: those to train on.
        mesh, engine, attend: the ranks, the model on them and its attention.
        val: samples to validate on; None for no validation.
        first, on_step, before_step: as of ``run_steps``."""
    train_config, model = config.train, config.model
    global_batch, micro_batch, _ = config.plan_batch(mesh.shape)
    local_rows = config.my_samples(mesh.shape, mesh.dp_rank)
    steps_per_epoch = math.ceil(len(samples) / global_batch)
    sharder = BatchSharder(config, mesh, attend, engine.device, samples)

    def read(step: int) -> Batch:
        t0s = samples.rows(step, global_batch, train_config.seed)
        return sharder.read(samples, t0s[local_rows.start : local_rows.stop])

    def split_into_passes(batch: Batch) -> list[tuple]:
        """The model's arguments for each pass."""
        inputs, targets = batch
        micro_batches = zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True)
        return [sharder.model_arguments(*arrays) for arrays in micro_batches]

    def validate() -> dict[str, float]:
        if val is None:
            return {}
        return validation_metrics(val, config, mesh, engine, sharder)

    def add_epoch(record: Record) -> None:
        on_step({**record, "epoch": (record["step"] + 1) / steps_per_epoch})

    work = StepWork(
        read=read,
        parts=split_into_passes,
        count=global_batch * model.out_channels * model.height * model.width,
        tokens=global_batch * model.patch_grid().tokens,
        flops=flops_per_token(model),
        validate=validate,
    )
    run_steps(
        train_config,
        engine,
        attend,
        work,
        first=first,
        on_step=add_epoch,
        before_step=before_step,
    )


class BatchSharder:
    """Reads samples, and takes this rank's tokens of them.

    Args:
        samples: any of the data; their grid weights the points."""

    def __init__(
        self, config: Config, mesh: Mesh, attend: Attend, device: torch.device, samples: Samples
    ):
        self._patches = config.model.patch_grid()
        self._device = device
        self._dtype = kept_dtype(config.train)
        self._positions = ringx.positions(self._patches.tokens, group=mesh.cp, layout=attend.layout)
        rows = torch.from_numpy(samples.fields.grid.weights())
        weights = self._patches.patchify_weights(rows, self._positions)
        self._weights = weights.to(device, self._dtype)

    def read(self, samples: Samples, t0s: np.ndarray) -> Batch:
        """Inputs and targets of the samples with these initial times, of the whole grid."""
        inputs, targets = samples.get(t0s)
        return torch.from_numpy(inputs), torch.from_numpy(targets).flatten(1, 2)

    def model_arguments(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple:
        """(inputs, positions, targets, weights) of this rank's tokens, for ``ViT.forward``."""
        positions = self._positions.to(self._device)
        return self._tokens(inputs), positions, self._tokens(targets), self._weights

    def _tokens(self, fields: torch.Tensor) -> torch.Tensor:
        """[n, C, H, W] -> [n, S, C P]"""
        return self._patches.patchify(fields, self._positions).to(self._device, self._dtype)


def validation_metrics(
    val: Samples, config: Config, mesh: Mesh, engine: Engine, sharder: BatchSharder
) -> dict[str, float]:
    """The loss and errors over samples spread evenly over the validation times; on every rank.

    Returns:
        "val_loss", and "val_rmse/CHANNEL+LEADh": the latitude-weighted root mean square error of
        each channel and lead, in the channel's unit."""
    model = config.model
    _, micro_batch, _ = config.plan_batch(mesh.shape)
    t0s = validation_t0s(val, config)
    local_t0s = t0s[mesh.dp_rank :: mesh.shape.dp]
    most_local_t0s = math.ceil(len(t0s) / mesh.shape.dp)  # all ranks make equally many passes
    squares = torch.zeros(model.out_channels, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for start in range(0, most_local_t0s, micro_batch):
            batch_t0s = local_t0s[start : start + micro_batch]
            is_counted = len(batch_t0s) > 0
            inputs, targets = sharder.read(val, batch_t0s if is_counted else t0s[:1])
            x, positions, wanted, weights = sharder.model_arguments(inputs, targets)
            error = engine(x, positions).double() - wanted
            error = error.unflatten(-1, (model.out_channels, -1))  # [n, S, L C, P]
            if is_counted:
                squares += (error.square() * weights[:, None]).sum((0, 1, 3))
    means = engine.sum(squares) / (len(t0s) * model.height * model.width)
    rmse = means.sqrt().view(len(val.leads), -1).cpu().numpy() * val.scale  # [L, C]
    metrics = {"val_loss": float(means.mean())}
    for i, lead in enumerate(val.leads):
        for j, channel in enumerate(val.fields.channels):
            metrics[f"val_rmse/{channel}+{lead}h"] = float(rmse[i, j])
    return metrics


def validation_t0s(val: Samples, config: Config) -> np.ndarray:
    """The initial times that validation takes, spread evenly over those that there are.

    They are --val-batches times a global batch of them, or all if there are fewer."""
    t0s = val.starts(val.leads[0])
    count = min(len(t0s), config.train.global_batch * config.train.val_batches)
    return t0s[np.linspace(0, len(t0s) - 1, count).round().astype(int)]


OTHER_ORDER = "the data would come in another order"
OTHER_FORECAST = "the model would forecast something else"


class VitRun(TrainingRun):
    """A run on gridded fields."""

    prog = PROG
    loss_unit = "squared error, 1 before training"
    must_match = (
        ("train", "global_batch", OTHER_ORDER),
        ("train", "seed", OTHER_ORDER),
        ("data", "variables", OTHER_FORECAST),
        ("data", "levels", OTHER_FORECAST),
        ("data", "leads", OTHER_FORECAST),
        ("data", "history", OTHER_FORECAST),
        ("data", "base", OTHER_FORECAST),
        ("data", "inputs", OTHER_FORECAST),
        ("data", "train_times", "it would learn from other times"),
    )
    config: Config

    def open_data(self) -> None:
        data = self.config.data
        self.path, prepared, identity = ringx.launch.decide(self.world, self._prepare_data)
        self.fields = open_same_record(self.path, data, identity, self.world)
        self.samples = make_samples(self.fields, data, prepared, "train")
        self.val: Samples | None = None
        if self._validates():
            self.val = make_samples(self.fields, data, prepared, "val")
        self.config = with_data_sizes(self.config, self.fields, self.samples)
        self.config.expect_fits(self.config.mesh.fit(self.world.world_size))

    def _prepare_data(self) -> tuple[str, Statistics, str]:
        """(path, statistics, identity) of the data, which is simulated or checked on rank 0."""
        data = self.config.data
        path = data_path(self.options.data)
        fields = open_record(path, data)
        split = split_record(fields, data)["train"]
        prepared = statistics(fields, split, data.hours(), cache=self.out / STATISTICS)
        make_samples(fields, data, prepared, "train")
        if self._validates():
            make_samples(fields, data, prepared, "val")
        return path, prepared, fields.identity

    def _validates(self) -> bool:
        return bool(self.config.train.val_every or self.config.train.epochs)

    def complete_config(self) -> None:
        train_config = self.config.train
        if train_config.epochs:
            steps_per_epoch = math.ceil(len(self.samples) / train_config.global_batch)
            train_config = replace(
                train_config,
                steps=train_config.epochs * steps_per_epoch,
                val_every=steps_per_epoch,
            )
            self.config = replace(self.config, train=train_config)
        if self.val:
            ringx.launch.decide(self.world, self._expect_validation_values)

    def _expect_validation_values(self) -> None:
        """ValueError for missing values now, not at the first validation."""
        assert self.val is not None
        for t0 in validation_t0s(self.val, self.config):
            self.val.get([t0])

    def data_sha256(self) -> str:
        return self.fields.identity

    def data_metadata(self) -> dict[str, Any]:
        fields = self.fields
        paths = [str(Path(path).resolve()) for path in self.path.split(",")]
        return {
            "source": fields.source,
            "first": str(fields.times[0]),
            "last": str(fields.times[-1]),
            "step_hours": fields.step_hours,
            "times": len(fields),
            "channels": list(fields.channels),
            "sha256": fields.identity,
            "folder": ",".join(paths),
        }

    def describe(self) -> str:
        model, fields = self.config.model, self.fields
        return (
            f"data: {fields.source}, {len(fields)} times x {len(fields.channels)} channels x "
            f"{model.height} x {model.width} points, {len(self.samples)} samples; "
            f"model: {parameters(model).total:,} parameters, "
            f"{model.patch_grid().tokens:,} tokens a field"
        )

    def build_engine(self, weights: bool) -> Engine:
        self.attend = Attend(self.config, self.mesh)
        return build(
            self.config,
            self.mesh,
            self.attend,
            device=self.world.device,
            weights="new" if weights else None,
        )

    def train_steps(
        self, first: int, on_step: Callable[[Record], None], before_step: Callable[[int], None]
    ) -> None:
        train(
            self.config,
            self.samples,
            self.mesh,
            self.engine,
            self.attend,
            val=self.val,
            first=first,
            on_step=on_step,
            before_step=before_step,
        )

    def describe_step(self) -> str:
        tokens = self.config.model.patch_grid().tokens
        return f"{self.config.train.global_batch} fields of {tokens} tokens"


def work(world: World, options: RunOptions) -> int:
    """One rank's part of the command; returns the process's exit status."""
    return VitRun(world, options).main()


# ---- the command line


def parser() -> Parser:
    """The flags of the command."""
    p = Parser(
        PROG,
        description="Train a Vision Transformer to forecast fields on a grid, over context, tensor "
        "and data ranks.",
    )
    command.add_run_flags(
        p,
        preset=f"model and training to start from: {', '.join(PRESETS)} (default: tiny)",
        data="NetCDF, Zarr or HDF5: a file, a folder, a pattern, or several with commas between "
        "(default: the resumed run's, or a simulation made on the spot)",
        out=DEFAULT_OUT,
    )
    add_flags(p, "data", DataConfig)
    add_flags(p, "model, in place of the preset's", ModelConfig)
    add_flags(p, "training, in place of the preset's", TrainConfig)
    return p


def configure(args: argparse.Namespace) -> tuple[RunOptions, Shape | None]:
    """(what each rank is given, the shape of its mesh if it is known yet).

    Raises:
        ValueError, NotImplementedError: for everything that can be known to be wrong before ranks
            start."""
    command.expect_preset_or_config(args)
    if args.epochs and args.steps:
        raise ValueError(f"--epochs {args.epochs} and --steps {args.steps}: give one.")
    config, shape = command.configure(args, base_config(args))
    config = _with_steps_or_epochs(config, args)
    options = RunOptions(
        config=config,
        out=args.out or args.resume or DEFAULT_OUT,
        data=args.data or resumed_data_path(args.resume),
        resume=args.resume,
        tensorboard=args.tensorboard,
        wandb=args.wandb,
    )
    if command.is_estimate(args):
        options = replace(options, config=_with_estimated_sizes(config, args))
        if shape:
            options.config.expect_fits(shape)
    else:
        model = config.model
        command.expect_runnable(
            options,
            args,
            heads=(model.heads, model.heads),
            head_dim=model.dim // model.heads,
            causal=False,
        )
    return options, shape


def _with_steps_or_epochs(config: Config, args: argparse.Namespace) -> Config:
    """The configuration without its epochs where --steps is given.

    Raises:
        ValueError: --val-every, with epochs."""
    if args.steps:
        config = replace(config, train=replace(config.train, epochs=0))
    if config.train.epochs and args.val_every is not None:
        raise ValueError(
            f"--val-every {args.val_every}: a run of epochs is validated after each; leave it "
            f"out, or give --steps."
        )
    return config


def _with_estimated_sizes(config: Config, args: argparse.Namespace) -> Config:
    """The configuration with the sizes of --data, of its own preset, or of the default record.

    Raises:
        ValueError: a flag chooses of the data, but the sizes are the preset's."""
    if args.data or not config.model.height:
        return with_expected_data_sizes(config, args.data)
    for field in dataclasses.fields(DataConfig):
        if getattr(args, field.name) is not None:
            flag = f"--{field.name.replace('_', '-')}"
            raise ValueError(
                f"{flag}: without --data an estimate is of {config.name}'s own channels; name the "
                f"--data it is for."
            )
    return config


def base_config(args: argparse.Namespace) -> Config:
    """What the flags change: a preset, a YAML file, or the configuration of the resumed run."""
    config_file = command.config_file(args)
    if config_file:
        return load(config_file)
    return preset(args.preset or "tiny")


def resumed_data_path(run: "str | None") -> "str | None":
    """The files that a run has read; None if it has not read any yet."""
    return command.resumed_data(run).get("folder")


def estimate(config: Config, shape: Shape) -> Any:
    """The StepEstimate of a configuration."""
    from apps.vit.estimate import estimate_step  # here: it imports torch's testing tools

    return estimate_step(config, shape)


def main(argv: "list[str] | None" = None) -> int:
    """The command; returns the greatest exit status of its ranks."""
    return command.main(parser(), argv, configure, estimate, work)


if __name__ == "__main__":
    from apps.vit.train import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
