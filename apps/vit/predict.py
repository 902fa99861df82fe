"""Forecast with a trained ViT on any number of ranks, score the forecasts, and draw them.

    python -m apps.vit.predict --checkpoint run --out forecast
    torchrun --nproc-per-node 8 apps/vit/predict.py --checkpoint run --out forecast
    python -m apps.vit.predict --checkpoint run --out forecast --rollout 120

The first forecasts the test times in one process; the second splits each field over 8 ranks; the
third takes its own forecasts as inputs, too, up to 120 h.

OUT gets forecasts.nc (or .zarr; CF-1.11): for each channel NAME and NAME_truth by initial time and
lead time, of a few initial times (--save, --times); scores.csv, over all valid times of the part:
the model beside persistence, climatology and the damped anomaly (``apps.vit.scores`` defines the
scores); spectra.csv where the grid goes around the globe; and maps and curves (``apps.vit.maps``).

A forecast counts where its valid time lies in the part; its initial time may lie before.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common import command
from apps.common.arguments import Parser, add_rank_flags, run_on_ranks
from apps.common.checkpoint import MANIFEST, Checkpoints
from apps.common.config import SHORT_DTYPES, TORCH_DTYPES, from_dict
from apps.common.weights import CheckpointWeights
from apps.vit import scores
from apps.vit.config import Config
from apps.vit.data.dataset import expect_finite
from apps.vit.data.samples import Samples
from apps.vit.data.statistics import Statistics, expect_room, statistics
from apps.vit.forecast import Forecaster, forecast, initial_times, rollout_leads
from apps.vit.forecast_files import FORMATS, forecast_dataset, write_dataset
from apps.vit.forecast_scores import ForecastScores, Sums
from apps.vit.open_data import (
    STATISTICS,
    make_samples,
    open_record,
    open_same_record,
    split_record,
)
from ringx.launch import World
from ringx.launch.mesh import Mesh, Shape

if TYPE_CHECKING:
    import xarray as xr

PROG = "apps.vit.predict"
PARTS = ("test", "val", "train")


@dataclass(frozen=True)
class PredictOptions:
    """What the command line asks for; ``parser`` documents the fields."""

    checkpoint: str
    out: str
    data: str
    step: int | None
    part: str
    rollout: int
    save: int
    times: str
    format: str
    batch: int
    cp: int
    dtype: str  # "" for that of the parameters
    maps: bool


# ---- a rank


class _RankResult(NamedTuple):
    """What one rank has done of the forecasts.  One rank of each cp group has scores and fields."""

    error: str | None
    sums: Sums | None
    saved: dict[int, np.ndarray]


def work(world: World, options: PredictOptions) -> int:
    """One rank's part of the command; returns the process's exit status."""
    ringx.launch.announce(world)
    try:
        _predict(world, options)
    except ValueError as error:  # of all ranks alike
        if world.rank == 0:
            print(f"{PROG}: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _predict(world: World, options: PredictOptions) -> None:
    """Opens checkpoint and data, forecasts, and writes.  Raises ValueError on all ranks alike."""
    is_main_rank = world.rank == 0
    checkpoint, metadata = find_checkpoint(options.checkpoint, options.step, world)
    config = ringx.launch.decide(world, lambda: checkpoint_config(checkpoint, metadata))
    rollout = rollout_leads(options.rollout, config.data.lead_hours()[0])
    _expect_rollout_history(options.rollout, config)
    leads = tuple(sorted({*config.data.lead_hours(), *rollout}))
    samples = _open_samples(world, options, config, leads, checkpoint, metadata["data"])

    shape = Shape.fit(world.world_size, cp=options.cp, tp=1, dp=0)
    mesh = Mesh.make(shape, world.device.type)
    config.expect_fits(mesh.shape)
    forecaster = Forecaster(
        config, CheckpointWeights(checkpoint), mesh, world.device, _model_dtype(options, config)
    )
    t0s = np.unique(np.concatenate([initial_times(samples, lead) for lead in leads]))
    saved_t0s = saved_initial_times(samples, options)
    if is_main_rank:
        print(
            f"{checkpoint}, {len(t0s)} initial times for the {options.part} times\n"
            f"{mesh.shape.describe()}",
            flush=True,
        )

    result_scores = ForecastScores(samples, leads)
    local_t0s = t0s[mesh.dp_rank :: mesh.shape.dp]
    saved: dict[int, np.ndarray] = {}
    error = None
    with _progress_bar(len(local_t0s), is_main_rank) as advance:
        try:
            saved = forecast(
                forecaster,
                samples,
                result_scores,
                local_t0s,
                saved_t0s,
                batch=options.batch,
                rollout=rollout,
                scores_here=mesh.cp_rank == 0,
                advance=advance,
            )
        except ValueError as e:  # missing values at some times, which only some dp groups read
            error = str(e)
    result = _RankResult(error, None, {})
    if mesh.cp_rank == 0:
        result = _RankResult(error, result_scores.sums(), saved)
    results = ringx.launch.gather(result, world)
    for rank_result in results:
        if rank_result.error:
            raise ValueError(rank_result.error)
    if is_main_rank:
        saved = _merge_results(results, result_scores)
        fields = np.stack([saved[int(t0)] for t0 in saved_t0s])
        source = {
            "title": f"Forecasts of {samples.fields.source}",
            "source": f"ringx, {checkpoint}",
        }
        dataset = forecast_dataset(samples, saved_t0s, fields, source)
        _write(options, dataset, result_scores, rollout)


def _merge_results(
    results: list[_RankResult], result_scores: ForecastScores
) -> dict[int, np.ndarray]:
    """Adds the other ranks' scores to those of rank 0; returns the saved fields of all ranks."""
    saved = dict(results[0].saved)
    for rank_result in results[1:]:
        if rank_result.sums is not None:
            result_scores.add_sums(rank_result.sums)
        saved.update(rank_result.saved)
    return saved


def _expect_rollout_history(rollout: int, config: Config) -> None:
    """ValueError if the model sees times that no forecast of a roll-out is of."""
    first_lead = config.data.lead_hours()[0]
    between = [hours for hours in config.data.history_hours() if hours % first_lead]
    if rollout and between:
        raise ValueError(
            f"--rollout {rollout}: the model sees what was {between[0]} h before, and forecasts "
            f"every {first_lead} h."
        )


def _open_samples(
    world: World,
    options: PredictOptions,
    config: Config,
    leads: tuple[int, ...],
    checkpoint: Path,
    data_identity: str,
) -> Samples:
    """The part's samples on every rank.  Rank 0 looks at everything that can be wrong with them."""

    def prepare() -> Statistics:
        return _prepare_statistics(options, config, leads, checkpoint, data_identity)

    prepared = ringx.launch.decide(world, prepare)
    fields = open_same_record(options.data, config.data, data_identity, world)
    return make_samples(fields, config.data, prepared, options.part, "valid")


def _prepare_statistics(
    options: PredictOptions,
    config: Config,
    leads: tuple[int, ...],
    checkpoint: Path,
    data_identity: str,
) -> Statistics:
    """Those of the training times, kept in the run's folder, or in OUT where that is not writable.

    Raises:
        ValueError: it is not the data of `data_identity`, on which the checkpoint was trained; the
            part is too short; it does not have a time that is to be saved; or values are missing at
            a time that is read."""
    fields = open_record(options.data, config.data)
    if fields.identity != data_identity:
        raise ValueError(
            f"--data: {fields.source} is other data than {checkpoint} was trained on; name the "
            f"same with --data."
        )
    cache = checkpoint.parent.parent / STATISTICS
    if not os.access(cache, os.W_OK):
        cache = Path(options.out) / STATISTICS
    prepared = statistics(
        fields,
        split_record(fields, config.data)["train"],
        sorted({*leads, *config.data.hours()}),
        cache=cache,
    )
    samples = make_samples(fields, config.data, prepared, options.part, "valid")
    longest = max(samples.leads)
    expect_room(samples.split, longest // fields.step_hours, longest)
    saved_initial_times(samples, options)
    # Now, for all ranks: later, only some of them would find that values are missing
    history = max(samples.history, default=0) // fields.step_hours
    first = min(initial_times(samples, lead)[0] for lead in leads) - history
    for t in range(first, samples.split.stop):
        expect_finite(fields, np.array([t]), fields.read([t]))
    return prepared


def _model_dtype(options: PredictOptions, config: Config) -> torch.dtype:
    if options.dtype:
        return TORCH_DTYPES[options.dtype]
    return torch.promote_types(TORCH_DTYPES[config.train.dtype], torch.float32)


def _write(
    options: PredictOptions,
    dataset: "xr.Dataset",
    result_scores: ForecastScores,
    rollout: tuple[int, ...],
) -> None:
    """Writes all files, and prints the scores and what was written."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    path = write_dataset(dataset, out, options.format)
    rows, spectrum_rows = result_scores.rows(), result_scores.spectrum_rows()
    scores.write_rows(out / "scores.csv", scores.ScoreRow, rows)
    leads = result_scores.samples.leads
    print(scores.table([row for row in rows if row.lead_hours in leads]))
    rolled_out = [row for row in rows if row.lead_hours in rollout]
    if rolled_out:
        print("Fed with its own forecasts:\n" + scores.table(rolled_out, "roll-out"))
    files = "scores.csv"
    if spectrum_rows:
        scores.write_rows(out / "spectra.csv", scores.SpectrumRow, spectrum_rows)
        files += ", spectra.csv"
    if options.maps and _draw_maps(out):
        files += " and maps/"
    print(f"{dataset.sizes['time']} initial times in {path}; {files} beside it")


def _draw_maps(out: Path) -> bool:
    """Draws OUT/maps and prints what; False where there is no matplotlib."""
    from apps.vit.maps import draw

    try:
        for line in draw(out, out / "maps"):
            print(line)
    except ImportError as error:
        print(f"skipped maps: {error}")
        return False
    return True


@contextlib.contextmanager
def _progress_bar(total: int, is_main_rank: bool) -> Iterator[Callable[[int], None]]:
    """A bar on the main rank's terminal; yields a function that advances it."""
    from rich.progress import Progress

    disable = not is_main_rank or not sys.stdout.isatty()
    with Progress(transient=True, disable=disable) as progress:
        task = progress.add_task("forecasts", total=total)
        yield lambda count: progress.advance(task, count)


# ---- the checkpoint and the initial times


def find_checkpoint(given: str, step: "int | None", world: "World | None") -> tuple[Path, Any]:
    """(folder, metadata) of the checkpoint that is meant.

    Args:
        given: a run or one of its checkpoints.
        step: of a run, the step whose checkpoint is meant; None for the newest that is not damaged.
        world: the ranks, which all call it; None in a process without peers.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; on all ranks."""
    path = Path(given)
    named = ringx.launch.decide(world, lambda: _named_checkpoint(path, step))
    folder = named.parent if named else path / "checkpoints"
    with Checkpoints(folder, world, report=lambda text: print(text, flush=True)) as checkpoints:
        if named:
            return named, checkpoints.require_complete(named)
        newest = checkpoints.newest()
    if newest is None:
        raise ValueError(f"--checkpoint {given}: there is no checkpoint in it that can be used.")
    return newest


def _named_checkpoint(path: Path, step: "int | None") -> "Path | None":
    """The checkpoint that --checkpoint and --step name; None for the newest one of a run."""
    expect_checkpoint(path)
    if (path / MANIFEST).exists():
        if step is not None:
            raise ValueError(f"--step {step}: {path} is a checkpoint, not a run; leave --step out.")
        return path
    if step is None:
        return None
    named = path / "checkpoints" / f"step-{step:08d}"
    if not (named / MANIFEST).exists():
        complete = sorted(p.parent.name for p in path.glob(f"checkpoints/step-*/{MANIFEST}"))
        raise ValueError(
            f"--step {step}: {named} is not there; there are: {', '.join(complete) or 'none'}."
        )
    return named


def expect_checkpoint(path: Path) -> None:
    """ValueError for a folder that is neither a run nor a checkpoint."""
    if not (path / MANIFEST).exists() and not (path / "checkpoints").is_dir():
        raise ValueError(
            f"--checkpoint {path}: it is neither a run (no checkpoints/ in it) nor a checkpoint."
        )


def checkpoint_config(checkpoint: Path, metadata: Any) -> Config:
    """The configuration that a checkpoint was trained with; ValueError if it is of another app."""
    try:
        return from_dict(Config, metadata["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} was not written by this version of apps.vit.train: "
            f"{type(error).__name__}: {error}."
        ) from None


def saved_initial_times(samples: Samples, options: PredictOptions) -> np.ndarray:
    """[n] t0s whose forecasts are saved, ascending: those of --times, or some of the part's.

    Raises:
        ValueError: --times has a word that is no time, or a time whose longest lead is not in the
            part."""
    possible = initial_times(samples, max(samples.leads), inside=True)
    if not options.times:
        return evenly_spaced(possible, options.save)
    words = [word.strip().removesuffix("Z") for word in options.times.split(",")]
    try:
        wanted = np.array(words, "datetime64[s]")
    except ValueError:
        raise ValueError(
            f"--times {options.times}: they must be ISO times such as 2019-03-25T06, with commas "
            f"between."
        ) from None
    times = samples.fields.times
    impossible = wanted[~np.isin(wanted, times[possible])]
    if len(impossible):
        raise ValueError(
            f"--times: {impossible[0]} is no initial time of the {options.part} times, which go "
            f"from {times[possible[0]]} to {times[possible[-1]]} every {samples.fields.step_hours} "
            f"h (the longest lead is still among them)."
        )
    return np.unique(np.searchsorted(times, wanted))


def evenly_spaced(t0s: np.ndarray, count: int) -> np.ndarray:
    """`count` of them from the first to the last, or all if there are fewer."""
    indices = np.linspace(0, len(t0s) - 1, min(count, len(t0s))).round().astype(int)
    return t0s[np.unique(indices)]


# ---- the command line


def parser() -> Parser:
    """The flags of the command."""
    p = Parser(
        PROG,
        description="Forecast with a trained ViT on any number of ranks, score the forecasts, "
        "and draw them.",
    )
    p.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run of apps.vit.train, or one of its checkpoints",
    )
    p.add_argument(
        "--out", required=True, metavar="DIR", help="folder for forecasts, scores and maps"
    )
    p.add_argument("--data", help="the data that it was trained on (default: where it was then)")
    p.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="the run's checkpoint of this step (default: the newest)",
    )
    p.add_argument(
        "--part", default="test", choices=PARTS, help="which times are forecast (default: test)"
    )
    p.add_argument(
        "--rollout",
        type=int,
        default=0,
        metavar="HOURS",
        help="feed forecasts back, up to this lead (default: 0)",
    )
    p.add_argument(
        "--save",
        type=int,
        metavar="N",
        help="how many initial times' fields are kept, spread evenly over the part (default: 4)",
    )
    p.add_argument(
        "--times",
        default="",
        metavar="LIST",
        help="the initial times whose fields are kept, such as 2019-03-25T06,2019-03-26T18",
    )
    p.add_argument(
        "--format",
        default="nc",
        choices=FORMATS,
        help="of the forecasts: NetCDF or Zarr (default: nc)",
    )
    p.add_argument(
        "--batch", type=int, default=8, metavar="N", help="initial times at once (default: 8)"
    )
    p.add_argument(
        "--cp",
        type=int,
        default=0,
        metavar="N",
        help="ranks that a field is cut over; the others take other times (default: all)",
    )
    p.add_argument(
        "--dtype",
        choices=(*TORCH_DTYPES, *SHORT_DTYPES),
        help="of the computation (default: of the parameters)",
    )
    p.add_argument(
        "--maps",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw maps and curves (default: yes)",
    )
    add_rank_flags(p)
    return p


def configure(args: argparse.Namespace) -> PredictOptions:
    """What each rank is given; ValueError for what can be known to be wrong before ranks start."""
    _expect_flags(args)
    # 0: this MPI does not give the number of ranks before they have joined each other
    world_size = ringx.launch.world_size(args.nproc) or 0
    cp = args.cp or world_size
    if world_size and world_size % cp:
        raise ValueError(f"--cp {cp} does not divide the {world_size} ranks.")
    data = _data_of_run(args)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {args.out} is no folder and cannot be made: {error.strerror}."
        ) from None
    return PredictOptions(
        checkpoint=args.checkpoint,
        out=args.out,
        data=data,
        step=args.step,
        part=args.part,
        rollout=args.rollout,
        save=args.save or 4,
        times=args.times,
        format=args.format,
        batch=args.batch,
        cp=cp,
        dtype=SHORT_DTYPES.get(args.dtype, args.dtype) if args.dtype else "",
        maps=args.maps,
    )


def _expect_flags(args: argparse.Namespace) -> None:
    """ValueError for a number that is too small, or for flags that exclude each other."""
    if args.times and args.save is not None:
        raise ValueError(f"--times {args.times} and --save {args.save}: give one.")
    for name in ("save", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    for name in ("rollout", "cp"):
        value = getattr(args, name)
        if value < 0:
            raise ValueError(f"--{name} {value} must be at least 0.")


def _data_of_run(args: argparse.Namespace) -> str:
    """--data, or the data that the run in --checkpoint was trained on."""
    given = Path(args.checkpoint)
    expect_checkpoint(given)
    run = given if (given / "checkpoints").is_dir() else given.parent.parent
    data = args.data or command.resumed_data(str(run)).get("folder")
    if not data:
        raise ValueError(
            f"--checkpoint {given}: {run}/run.json does not say what it was trained on; name it "
            f"with --data."
        )
    return data


def main(argv: "list[str] | None" = None) -> int:
    """The command; returns the greatest exit status of its ranks."""
    return run_on_ranks(parser(), argv, configure, work)


if __name__ == "__main__":
    from apps.vit.predict import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
