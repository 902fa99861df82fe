"""The command line of a trainer: its flags, and mistakes that are found before ranks start."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ringx
from ringx.launch.mesh import Shape

from .arguments import Parser, add_rank_flags, run_on_ranks
from .config import TORCH_DTYPES, MeshConfig, RunConfig, Training, add_flags
from .log import expect_loggers, read_sessions
from .run import RunOptions
from .zero import expect_possible

MESH_FLAGS = {"cp", "tp", "dp"}


def add_run_flags(parser: Parser, *, preset: str, data: str, out: str) -> None:
    """Adds the flags that are not fields of the configuration, and those of the mesh.

    Args:
        preset, data: the help of --preset and --data.
        out: the folder of a run by default."""
    parser.add_argument("--preset", help=preset)
    parser.add_argument(
        "--config", metavar="FILE", help="the same from a YAML file, such as a run's config.yaml"
    )
    parser.add_argument("--data", help=data)
    parser.add_argument(
        "--out", metavar="DIR", help=f"folder of the run (default: the resumed one, or {out})"
    )
    parser.add_argument(
        "--resume", metavar="DIR", help="go on with the run in DIR from its newest whole checkpoint"
    )
    add_rank_flags(parser)
    parser.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="default: where it is installed",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="print the memory that a rank needs, and end; needs no GPU",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print mesh, memory, bytes and FLOPs of a step, and end; needs no GPU",
    )
    add_flags(parser, "mesh", MeshConfig)


def configure(args: argparse.Namespace, base: RunConfig) -> tuple[Any, Shape | None]:
    """(the configuration: `base`, changed by the flags; its mesh if it is known yet).

    Raises ValueError for what does not fit together."""
    config = base
    flags = {name: value for name, value in vars(args).items() if value is not None}
    names_mesh = bool(MESH_FLAGS & set(flags))
    resumes_mesh = _resumes_mesh(args)
    if resumes_mesh and names_mesh:  # the resumed run's other axes are not meant
        config = _with_free_mesh(config)
    config = config.changed(flags)
    world_size = _world_size(args, config.mesh)
    if resumes_mesh and not names_mesh and not is_estimate(args):
        config = _with_fitting_mesh(config, world_size)
    if world_size == 0:
        return config, None
    shape = config.mesh.fit(world_size)
    config.expect_fits(shape)
    return config, shape


def is_estimate(args: argparse.Namespace) -> bool:
    """Whether the command only prints what a step would cost."""
    return args.estimate or args.dry_run


def _resumes_mesh(args: argparse.Namespace) -> bool:
    """Whether the mesh is the resumed run's, not that of --preset or --config."""
    return bool(args.resume) and not (args.preset or args.config)


def _world_size(args: argparse.Namespace, mesh: MeshConfig) -> int:
    """The number of ranks; 0 where it is not known yet."""
    if is_estimate(args):
        return args.nproc or max(mesh.cp, 1) * max(mesh.tp, 1) * max(mesh.dp, 1)
    # Some MPIs do not tell before the ranks have been initialized.
    return ringx.launch.world_size(args.nproc) or 0


def _with_fitting_mesh(config: Any, world_size: int) -> Any:
    """With a mesh that takes what the ranks leave, if its own does not fit them."""
    if world_size and not _fits(config.mesh, world_size):
        return _with_free_mesh(config)
    return config


def _with_free_mesh(config: Any) -> Any:
    """With a mesh that takes what the ranks and the flags leave."""
    return replace(config, mesh=replace(config.mesh, cp=0, tp=0, dp=0))


def _fits(mesh: MeshConfig, world_size: int) -> bool:
    try:
        mesh.fit(world_size)
    except ValueError:
        return False
    return True


def expect_preset_or_config(args: argparse.Namespace) -> None:
    """ValueError where both --preset and --config are given."""
    if args.preset and args.config:
        raise ValueError(
            "--preset and --config: give one; a YAML file may itself start from a preset."
        )


def config_file(args: argparse.Namespace) -> str | None:
    """The YAML file that the flags change: --config, or that of the resumed run.

    None if they change a preset, or if the run has no config.yaml yet."""
    if args.config:
        return args.config
    if args.preset or not args.resume:
        return None
    path = Path(args.resume) / "config.yaml"
    return str(path) if path.exists() else None


def resumed_data(resume: str | None) -> dict[str, Any]:
    """What the resumed run's last session recorded of its data; empty if there is none."""
    sessions = read_sessions(resume) if resume else []
    return sessions[-1].get("data", {}) if sessions else {}


def expect_runnable(
    options: RunOptions,
    args: argparse.Namespace,
    *,
    heads: tuple[int, int],
    head_dim: int,
    causal: bool,
) -> None:
    """ValueError (or NotImplementedError) for what this machine or these folders cannot do.

    heads: of queries, of keys and values."""
    train: Training = options.config.train
    expect_loggers(options.tensorboard, options.wandb)
    expect_possible(
        options.config.mesh.dp_engine,
        optimizer=train.optimizer,
        dtype=TORCH_DTYPES[train.dtype],
        reduce_dtype=TORCH_DTYPES[train.reduce_dtype],
    )
    # On GPUs the ranks find out what the kernel can do: this process need not hold one.
    if ringx.launch.detect(device=args.device).device.type == "cpu":
        _expect_kernel(train, heads, head_dim, causal)
        if train.offload:
            raise ValueError(
                "--offload moves activations from a GPU to its host; this run is on the CPU."
            )
    if train.offload and train.checkpointing == "none":
        raise ValueError(
            "--offload keeps the inputs of checkpointed blocks on the host; "
            "give --checkpointing selective or full too."
        )
    _expect_folders(options, out_is_named=bool(args.out))


def _expect_kernel(train: Training, heads: tuple[int, int], head_dim: int, causal: bool) -> None:
    """Calls attention on two tokens: it refuses what it cannot do."""
    q, k = (
        torch.zeros(1, 2, number, head_dim, dtype=TORCH_DTYPES[train.dtype], requires_grad=True)
        for number in heads
    )
    ringx.attention(
        q,
        k,
        k,
        algorithm=train.algorithm,
        causal=causal,
        layout="contiguous",
        kernel=train.kernel,
        check=False,
    )


def _expect_folders(options: RunOptions, out_is_named: bool) -> None:
    """ValueError for folders that are missing, that hold another run, or that cannot be written."""
    out = Path(options.out)
    if options.init:
        _expect_init(options)
    if options.resume:
        _expect_resumable(options.resume, out, out_is_named)
    holds_run = (out / "checkpoints").is_dir() and any((out / "checkpoints").glob("step-*"))
    if holds_run and not options.resume:
        raise ValueError(
            f"--out {out} holds a run with checkpoints; go on with --resume {out}, "
            "or take another folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".writable", "w"):
            pass
        (out / ".writable").unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out} cannot be written: {e.strerror}.") from None


def _expect_init(options: RunOptions) -> None:
    if options.resume:
        raise ValueError("--init and --resume: a resumed run has its weights; give one.")
    if not Path(str(options.init)).is_dir():
        raise ValueError(f"--init {options.init}: there is no such folder.")


def _expect_resumable(resume: str, out: Path, out_is_named: bool) -> None:
    if Path(resume) != out and not (Path(resume) / "checkpoints").is_dir():
        raise ValueError(f"--resume {resume}: there is no run in it (no checkpoints/).")
    if not out_is_named and not Path(resume).is_dir():
        raise ValueError(
            f"--resume {resume}: there is no such folder; name a run's, or give --out {resume} "
            "too, to begin it."
        )


def main(
    parser: Parser,
    argv: Sequence[str] | None,
    to_options: Callable[[argparse.Namespace], tuple[RunOptions, Shape | None]],
    estimate: Callable[[Any, Shape], Any],
    work: Callable[[ringx.launch.World, RunOptions], int],
) -> int:
    """The `main` of a trainer: runs or estimates; returns the exit status.

    Args:
        parser, argv: as of ``run_on_ranks``.
        to_options: checks the arguments; the mesh that it returns is known for estimates.
        estimate: (configuration, mesh) -> a StepEstimate.
        work: one rank's part of the run."""

    def configure_or_estimate(args: argparse.Namespace) -> RunOptions | None:
        options, shape = to_options(args)
        if not is_estimate(args):
            return options
        assert shape is not None
        if args.dry_run:
            print(options.config.to_yaml() + shape.describe())
        print(estimate(options.config, shape).table(memory_only=not args.dry_run))
        return None

    return run_on_ranks(parser, argv, configure_or_estimate, work)
