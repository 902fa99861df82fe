"""The command line of a trainer: its flags, and everything that can be known to be wrong before ranks start."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ringx
from ringx.launch.mesh import Shape

from .arguments import Parser, run_on_ranks
from .config import TORCH_DTYPES, MeshConfig, RunConfig, add_flags
from .log import expect_loggers, read_sessions
from .run import RunOptions
from .zero import expect_possible


def add_run_flags(p: Parser, *, preset: str, data: str, out: str) -> None:
    """The flags that are not fields of the configuration; `preset` and `data`: their help, `out`: the folder by default."""
    p.add_argument("--preset", help=preset)
    p.add_argument(
        "--config", metavar="FILE", help="the same from a YAML file, such as a run's config.yaml"
    )
    p.add_argument("--data", help=data)
    p.add_argument(
        "--out", metavar="DIR", help=f"folder of the run (default: the resumed one, or {out})"
    )
    p.add_argument(
        "--resume", metavar="DIR", help="go on with the run in DIR from its newest whole checkpoint"
    )
    p.add_argument(
        "--nproc",
        type=int,
        help="ranks to start here (default: 1, or the ranks of torchrun, srun or mpirun)",
    )
    p.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto"
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds that ranks wait for each other (default: 600)",
    )
    p.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="default: where it is installed",
    )
    p.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")
    p.add_argument(
        "--estimate",
        action="store_true",
        help="print the memory that a rank needs, and end; needs no GPU",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print mesh, memory, bytes and FLOPs of a step, and end; needs no GPU",
    )
    add_flags(p, "mesh", MeshConfig)


def configure(args: argparse.Namespace, base: RunConfig) -> tuple[Any, Shape | None]:
    """(the configuration, its mesh if it is known yet): `base`, changed by the flags.  ValueError for what does not fit."""
    config = base
    flags = {name: value for name, value in vars(args).items() if value is not None}
    axes = {"cp", "tp", "dp"}
    resumed = args.resume and not (
        args.preset or args.config
    )  # else the mesh is theirs, not the old one
    if resumed and axes & set(flags):  # the old mesh's other axes are not meant
        config = replace(config, mesh=replace(config.mesh, cp=0, tp=0, dp=0))  # type: ignore[type-var]
    config = config.changed(flags)
    if args.estimate or args.dry_run:
        m = config.mesh
        world = args.nproc or max(m.cp, 1) * max(m.tp, 1) * max(m.dp, 1)
    else:
        world = (
            ringx.launch.world_size(args.nproc) or 0
        )  # 0: this MPI does not say before the ranks have met
        if resumed and world and not axes & set(flags) and _misfits(config.mesh, world):
            config = replace(config, mesh=replace(config.mesh, cp=0, tp=0, dp=0))  # type: ignore[type-var]
    shape = config.mesh.fit(world) if world else None
    if shape:
        config.expect_fits(shape)
    return config, shape


def _misfits(mesh: MeshConfig, world: int) -> bool:
    try:
        mesh.fit(world)
    except ValueError:
        return True
    return False


def resumed_config(resume: "str | None") -> "str | None":
    """The config.yaml of the run that is resumed, if it has one yet."""
    path = Path(resume or "") / "config.yaml"
    return str(path) if resume and path.exists() else None


def resumed_data(resume: "str | None") -> "dict[str, Any]":
    """What the resumed run's last session says of its data; empty if there is none."""
    sessions = read_sessions(resume) if resume else []
    return sessions[-1].get("data", {}) if sessions else {}


def expect_runnable(
    job: RunOptions,
    args: argparse.Namespace,
    *,
    heads: tuple[int, int],
    head_dim: int,
    causal: bool,
) -> None:
    """ValueError (or NotImplementedError) for what this machine or these folders cannot do."""
    c = job.config.train
    expect_loggers(job.tensorboard, job.wandb)
    kinds = TORCH_DTYPES[c.dtype], TORCH_DTYPES[c.reduce_dtype]
    expect_possible(
        job.config.mesh.dp_engine, optimizer=c.optimizer, dtype=kinds[0], reduce_dtype=kinds[1]
    )
    device = ringx.launch.detect(device=args.device).device
    if (
        device.type == "cpu"
    ):  # can the kernel do it?  (on GPUs the ranks find out: this process need not hold one)
        q, k = (
            torch.zeros(1, 2, n, head_dim, dtype=TORCH_DTYPES[c.dtype], requires_grad=True)
            for n in heads
        )
        ringx.attention(
            q,
            k,
            k,
            algorithm=c.algorithm,
            causal=causal,
            layout="contiguous",
            kernel=c.kernel,
            check=False,
        )
        if c.offload:
            raise ValueError(
                "--offload moves activations from a GPU to its host; this run is on the CPU."
            )
    if c.offload and c.checkpointing == "none":
        raise ValueError(
            "--offload keeps the inputs of checkpointed blocks on the host; give --checkpointing selective or full too."
        )
    _expect_folders(job, bool(args.out))


def _expect_folders(job: RunOptions, named: bool) -> None:
    out, resume = Path(job.out), job.resume
    if job.init and resume:
        raise ValueError("--init and --resume: a resumed run has its weights; give one.")
    if job.init and not Path(job.init).is_dir():
        raise ValueError(f"--init {job.init}: there is no such folder.")
    if resume and Path(resume) != out and not (Path(resume) / "checkpoints").is_dir():
        raise ValueError(f"--resume {resume}: there is no run in it (no checkpoints/).")
    if resume and not named and not Path(resume).is_dir():
        raise ValueError(
            f"--resume {resume}: there is no such folder; name a run's, or give --out {resume} too, to begin it."
        )
    held = (out / "checkpoints").is_dir() and any((out / "checkpoints").glob("step-*"))
    if held and not resume:
        raise ValueError(
            f"--out {out} holds a run with checkpoints; go on with --resume {out}, or take another folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".writable", "w"):
            pass
        (out / ".writable").unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out} cannot be written: {e.strerror}.") from None


def main(
    p: Parser,
    argv: "list[str] | None",
    to_job: Callable[[argparse.Namespace], tuple[RunOptions, Shape | None]],
    plan: Callable[[Any, Shape], Any],
    work: Callable[[ringx.launch.World, RunOptions], int],
) -> int:
    """Parses, checks, and plans or runs; returns the exit status.  `plan` makes a StepEstimate, `work` is one rank's job."""

    def configure_or_estimate(args: argparse.Namespace) -> RunOptions | None:
        job, shape = to_job(args)
        if not (args.estimate or args.dry_run):
            return job
        assert shape is not None  # `configure` knows it for estimates
        if args.dry_run:
            print(job.config.to_yaml() + shape.describe())
        print(plan(job.config, shape).table(memory_only=not args.dry_run))
        return None

    return run_on_ranks(p, argv, configure_or_estimate, work)
