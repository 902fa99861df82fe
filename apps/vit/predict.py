"""Forecast with a trained ViT on any number of ranks, score the forecasts, and draw them.

    python -m apps.vit.predict --checkpoint run --out forecast                          # the test times
    torchrun --nproc-per-node 8 apps/vit/predict.py --checkpoint run --out forecast     # each field cut over 8 ranks
    python -m apps.vit.predict --checkpoint run --out forecast --rollout 120            # its own forecasts as inputs, to 120 h

OUT gets forecasts.nc (or .zarr; CF-1.11): for each channel NAME and NAME_truth by initial time and lead time, of a few initial
times (--save, --times); scores.csv, over all valid times of the part: the model beside persistence, climatology and the damped
anomaly (``apps.vit.scores`` defines the scores); spectra.csv where the grid goes around the globe; and maps and curves
(``apps.vit.maps``).

A forecast counts where its valid time lies in the part; its initial time may lie before.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common import command
from apps.common.arguments import Parser
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
from apps.vit.forecast_scores import ForecastScores
from apps.vit.open_data import STATISTICS, make_samples, open_record, open_same_record, split_record
from ringx.launch import World
from ringx.launch.mesh import Mesh, Shape

PROG = "apps.vit.predict"
PARTS = ("test", "val", "train")


@dataclass(frozen=True)
class PredictOptions:
    """What the command line asks for."""

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
    dtype: str
    maps: bool


# ---- a rank


def work(world: World, options: PredictOptions) -> int:
    """One rank's part of the command; returns the process's exit status."""
    ringx.launch.announce(world)
    try:
        _work(world, options)
    except ValueError as e:  # of all ranks alike
        if world.rank == 0:
            print(f"{PROG}: error: {e}", file=sys.stderr, flush=True)
        return 2
    return 0


def _work(world: World, options: PredictOptions) -> None:
    out, chief = Path(options.out), world.rank == 0
    path, about = find_checkpoint(options.checkpoint, options.step, world)
    config = ringx.launch.decide(world, lambda: checkpoint_config(path, about))
    first = config.data.lead_hours()[0]
    leads = tuple(sorted({*config.data.lead_hours(), *rollout_leads(options.rollout, first)}))
    if options.rollout and (between := [h for h in config.data.history_hours() if h % first]):
        raise ValueError(
            f"--rollout {options.rollout}: the model sees what was {between[0]} h before, and forecasts every {first} h."
        )

    def prepare() -> tuple[Statistics, str]:
        fields = open_record(options.data, config.data)
        if fields.identity != about["data"]:
            raise ValueError(
                f"--data: {fields.source} is other data than {path} was trained on; name the same with --data."
            )
        split = split_record(fields, config.data)["train"]
        folder = path.parent.parent / STATISTICS
        hours = sorted({*leads, *config.data.hours()})
        made = statistics(
            fields, split, hours, cache=folder if os.access(folder, os.W_OK) else out / STATISTICS
        )
        samples = make_samples(fields, config.data, made, options.part, "valid")
        expect_room(samples.split, max(samples.leads) // fields.step_hours, max(samples.leads))
        saved_initial_times(samples, options)
        back = max(samples.history, default=0) // fields.step_hours
        for t in range(
            min(initial_times(samples, lead)[0] for lead in leads) - back, samples.split.stop
        ):  # now, on all ranks alike
            expect_finite(fields, np.array([t]), fields.read([t]))
        return made, fields.identity

    made, identity = ringx.launch.decide(world, prepare)
    fields = open_same_record(options.data, config.data, identity, world)
    samples = make_samples(fields, config.data, made, options.part, "valid")

    mesh = Mesh.make(Shape.fit(world.world_size, cp=options.cp, tp=1, dp=0), world.device.type)
    config.expect_fits(mesh.shape)
    dtype = (
        TORCH_DTYPES[options.dtype]
        if options.dtype
        else torch.promote_types(TORCH_DTYPES[config.train.dtype], torch.float32)
    )
    forecaster = Forecaster(config, CheckpointWeights(path), mesh, world.device, dtype)
    t0s = np.unique(np.concatenate([initial_times(samples, lead) for lead in leads]))
    saved = saved_initial_times(samples, options)
    scored, mine_t0s = ForecastScores(samples, leads), t0s[mesh.dp_rank :: mesh.shape.dp]
    if chief:
        print(
            f"{path}, {len(t0s)} initial times for the {options.part} times\n{mesh.shape.describe()}",
            flush=True,
        )
    kept, fault = {}, None
    with _bar(len(mine_t0s), chief) as tick:
        try:
            kept = forecast(
                forecaster, samples, scored, mine_t0s, saved, batch=options.batch,
                rollout=rollout_leads(options.rollout, samples.leads[0]), scores_here=mesh.cp_rank == 0, tick=tick,
            )  # fmt: skip
        except (
            ValueError
        ) as e:  # what only some times have, and so only some dp groups see: missing values
            fault = str(e)
    mine = (fault, scored.sums(), kept) if mesh.cp_rank == 0 else (fault,)
    everyone = ringx.launch.gather(mine, world)
    if faults := [f for f, *_ in everyone if f]:
        raise ValueError(faults[0])
    if chief:
        for _, *made_there in everyone[1:]:
            if made_there:
                scored.take(made_there[0])
                kept |= made_there[1]
        _write(
            options,
            samples,
            scored,
            saved,
            kept,
            {"title": f"Forecasts of {fields.source}", "source": f"ringx, {path}"},
        )


def _write(
    options: PredictOptions,
    samples: Samples,
    scored: ForecastScores,
    saved: np.ndarray,
    kept: dict[int, np.ndarray],
    about: dict,
) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    ahead = np.stack([kept[int(t)] for t in saved])
    path = write_dataset(forecast_dataset(samples, saved, ahead, about), out, options.format)
    rows, spectra = scored.rows(), scored.spectrum_rows()
    scores.write_scores(out / "scores.csv", rows)
    print(scores.table([r for r in rows if r.lead_hours in samples.leads]))
    if rolled := [
        r for r in rows if r.lead_hours in rollout_leads(options.rollout, samples.leads[0])
    ]:
        print("Fed with its own forecasts:\n" + scores.table(rolled, "roll-out"))
    if spectra:
        scores.write_spectra(out / "spectra.csv", spectra)
    drawn = options.maps
    if options.maps:
        from apps.vit.maps import draw

        try:
            for line in draw(out, out / "maps"):
                print(line)
        except ImportError as e:
            print(f"skipped maps: {e}")
            drawn = False
    print(f"{len(saved)} initial times in {path}; scores.csv{', spectra.csv' if spectra else ''}"
          f"{' and maps/' if drawn else ''} beside it")  # fmt: skip


# ---- what is asked for


def find_checkpoint(given: str, step: "int | None", world: "World | None") -> tuple[Path, Any]:
    """(folder, what was said about it) of a run's newest good checkpoint or its step, or of the checkpoint that is given.

    Raises ValueError on all ranks."""
    path = Path(given)

    def named() -> "Path | None":
        expect_checkpoint(path)
        if (path / MANIFEST).exists():
            if step is not None:
                raise ValueError(
                    f"--step {step}: {path} is a checkpoint, not a run; leave --step out."
                )
            return path
        if step is None:
            return None
        chosen = path / "checkpoints" / f"step-{step:08d}"
        if not (chosen / MANIFEST).exists():
            there = (
                ", ".join(
                    sorted(p.parent.name for p in path.glob(f"checkpoints/step-*/{MANIFEST}"))
                )
                or "none"
            )
            raise ValueError(f"--step {step}: {chosen} is not there; there are: {there}.")
        return chosen

    chosen = ringx.launch.decide(world, named)
    folder = chosen.parent if chosen else path / "checkpoints"
    with Checkpoints(folder, world, report=lambda text: print(text, flush=True)) as checkpoints:
        found = (chosen, checkpoints.require_complete(chosen)) if chosen else checkpoints.newest()
    if found is None:
        raise ValueError(f"--checkpoint {given}: there is no checkpoint in it that can be used.")
    return found


def expect_checkpoint(path: Path) -> None:
    if not (path / MANIFEST).exists() and not (path / "checkpoints").is_dir():
        raise ValueError(
            f"--checkpoint {path}: it is neither a run (no checkpoints/ in it) nor a checkpoint."
        )


def checkpoint_config(path: Path, about: Any) -> Config:
    """The configuration that a checkpoint was trained with."""
    try:
        return from_dict(Config, about["config"])
    except (TypeError, KeyError, ValueError) as e:
        raise ValueError(
            f"{path} was not written by this version of apps.vit.train: {type(e).__name__}: {e}."
        ) from None


def saved_initial_times(samples: Samples, options: PredictOptions) -> np.ndarray:
    """Initial times whose fields are kept; ValueError for one that is asked for and cannot be had."""
    there, times = initial_times(samples, max(samples.leads), inside=True), samples.fields.times
    if not options.times:
        return evenly_spaced(there, options.save)
    try:
        wanted = np.array(
            [word.strip().removesuffix("Z") for word in options.times.split(",")], "datetime64[s]"
        )
    except ValueError:
        raise ValueError(
            f"--times {options.times}: they must be ISO times such as 2019-03-25T06, with commas between."
        ) from None
    for time in wanted[~np.isin(wanted, times[there])]:
        raise ValueError(
            f"--times: {time} is no initial time of the {options.part} times, which go from {times[there[0]]} to {times[there[-1]]} "
            f"every {samples.fields.step_hours} h (the longest lead is still among them)."
        )
    return np.unique(np.searchsorted(times, wanted))


def evenly_spaced(t0s: np.ndarray, n: int) -> np.ndarray:
    """n of them, or all if there are fewer, spread evenly."""
    return t0s[np.unique(np.linspace(0, len(t0s) - 1, min(n, len(t0s))).round().astype(int))]


@contextlib.contextmanager
def _bar(total: int, chief: bool) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress

    with Progress(transient=True, disable=not chief or not sys.stdout.isatty()) as progress:
        task = progress.add_task("forecasts", total=total)
        yield lambda n: progress.advance(task, n)


# ---- the command line


def parser() -> Parser:
    p = Parser(
        PROG,
        description="Forecast with a trained ViT on any number of ranks, score the forecasts, and draw them.",
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
    p.add_argument("--times", default="", metavar="LIST", help="the initial times whose fields are kept, such as "
                   "2019-03-25T06,2019-03-26T18")  # fmt: skip
    p.add_argument(
        "--format",
        default="nc",
        choices=FORMATS,
        help="of the forecasts: NetCDF or Zarr (default: nc)",
    )
    p.add_argument(
        "--batch", type=int, default=8, metavar="N", help="initial times at once (default: 8)"
    )
    p.add_argument("--cp", type=int, default=0, metavar="N", help="ranks that a field is cut over; the others take other times "
                   "(default: all)")  # fmt: skip
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
    return p


def configure(args: argparse.Namespace) -> PredictOptions:
    """The options; ValueError for what can be known to be wrong before ranks start."""
    if args.times and args.save is not None:
        raise ValueError(f"--times {args.times} and --save {args.save}: give one.")
    for name in ("save", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1.")
    for name in ("rollout", "cp"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 0.")
    world = (
        ringx.launch.world_size(args.nproc) or 0
    )  # 0: this MPI does not say before the ranks have met
    cp = args.cp or world
    if world and world % cp:
        raise ValueError(f"--cp {cp} does not divide the {world} ranks.")
    given = Path(args.checkpoint)
    expect_checkpoint(given)
    run = given if (given / "checkpoints").is_dir() else given.parent.parent
    data = args.data or command.resumed_data(str(run)).get("folder")
    if not data:
        raise ValueError(
            f"--checkpoint {given}: {run}/run.json does not say what it was trained on; name it with --data."
        )
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(
            f"--out {args.out} is no folder and cannot be made: {e.strerror}."
        ) from None
    dtype = SHORT_DTYPES.get(args.dtype, args.dtype) if args.dtype else ""
    return PredictOptions(
        args.checkpoint,
        args.out,
        data,
        args.step,
        args.part,
        args.rollout,
        args.save or 4,
        args.times,
        args.format,
        args.batch,
        cp,
        dtype,
        args.maps,
    )


def main(argv: "list[str] | None" = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        options = configure(args)
    except ValueError as e:
        p.error(str(e))
    return max(
        ringx.launch.run(work, args.nproc, options, device=args.device, timeout=args.timeout)
    )


if __name__ == "__main__":
    from apps.vit.predict import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
