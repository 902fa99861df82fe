"""The ViT app's figures: skill on real and on simulated data, what small patches bring and cost.

    python script/vit_study.py era5 --data era5_t2m_uk_2019-03.nc --out DIR
    python script/vit_study.py default --out DIR
    python script/vit_study.py patches --out DIR
    python script/vit_study.py time --out DIR

era5      three seeds; by day, where it loses (10 minutes)
default   the simulated record (5 minutes)
patches   patches of 4, 2 and 1 points, as many epochs each (15 minutes)
time      seconds of a step, by patch and algorithm (10 minutes)

All run the trainer's own command on two ranks (--nproc changes that), sequences cut over them.
Each writes tables, the runs' logs and figures into DIR; whole runs, with their checkpoints, go to
--work (default: a folder that is removed).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ringx
from apps.common.log import read_metrics
from apps.common.plot import plot_runs
from apps.vit.scores import ScoreRow, read_rows

ROOT = Path(__file__).resolve().parents[1]
SIMPLE = ("persistence", "climatology", "damped anomaly")  # forecasts beside the model's
SEEDS = (0, 1, 2)
PATCHES = (4, 2, 1)
POINTS = 32 * 64  # of the simulated record
# Half of the usual training times.
PARTS = "--train-times 0/560 --val-times 1120/1360 --test-times 1360/1600"
SMALL = f"--dim 64 --layers 2 --heads 2 --ffn 384 --leads 6 --base damped --warmup 20 {PARTS}"


def run_module(module: str, *words: object) -> None:
    """Runs a command of the app; its output is not shown."""
    command = [sys.executable, "-m", f"apps.vit.{module}", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")


def train(args: argparse.Namespace, name: str, *words: object) -> Path:
    """A run, or what is left to do of it; its log is kept."""
    run = args.work / name
    ranks = ("--cp", args.nproc, "--nproc", args.nproc)
    run_module("train", *words, *ranks, "--out", run, "--resume", run)
    copy_files(run, args.out / name, "config.yaml", "metrics.jsonl")
    return run


def predict(args: argparse.Namespace, run: Path, *words: object) -> Path:
    """The folder of a run's forecasts; its scores are kept."""
    folder = args.work / f"{run.name}_forecast"
    run_module("predict", "--checkpoint", run, "--out", folder, "--nproc", args.nproc, *words)
    copy_files(folder, args.out / run.name, "scores.csv")
    return folder


def copy_files(source: Path, into: Path, *names: str) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, into / name)


def copy_figures(maps: Path, into: Path) -> None:
    """Copies PNGs, and the numbers behind them."""
    paths = [*maps.glob("*.png"), *maps.glob("*.csv")]
    copy_files(maps, into, *(path.name for path in paths))


def write_table(path: Path, head: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
    """Writes a table in Markdown, and prints it."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(map(str, row)) + " |")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text(), flush=True)


# ---- real data


class DayError(NamedTuple):
    """Errors of the forecasts that start on a day."""

    day: str
    lead: int  # hours
    model: float  # RMSE
    damped: float  # RMSE of the damped anomaly


def study_era5(args: argparse.Namespace) -> None:
    """Three seeds of apps/vit/configs/era5_t2m_uk.yaml."""
    rmse: dict[tuple[int, str], list[float]] = {}  # by lead and forecast, of each seed
    days: dict[tuple[str, int], list[DayError]] = {}  # by day and lead, of each seed
    for seed in SEEDS:
        source = ("--config", "era5_t2m_uk", "--data", args.data)
        run = train(args, f"seed{seed}", *source, "--seed", seed)
        forecast = predict(args, run, "--save", 1000)
        for row in read_rows(forecast / "scores.csv", ScoreRow):
            rmse.setdefault((row.lead_hours, row.forecast), []).append(row.rmse)
        for error in errors_by_day(run, forecast, args.data):
            days.setdefault((error.day, error.lead), []).append(error)
        if seed == 0:
            few_maps = predict(args, run, "--save", 2) / "maps"
            copy_figures(few_maps, args.out / "plots/era5")
    leads = sorted({lead for lead, _ in rmse})
    write_rmse(args.out / "table.md", rmse, leads)
    write_days(args.out / "days.md", days, leads)


def write_rmse(path: Path, rmse: dict[tuple[int, str], list[float]], leads: Sequence[int]) -> None:
    """Writes the table of the leads: each seed, their median, and the simple forecasts."""
    rows = []
    for lead in leads:
        of_seeds = rmse[lead, "model"]
        row = [f"{lead} h"]
        row += [f"{value:.3f}" for value in of_seeds]
        row.append(f"**{statistics.median(of_seeds):.3f}**")
        row += [f"{rmse[lead, name][0]:.3f}" for name in SIMPLE]
        rows.append(row)
    head = ["RMSE (K)", *(f"seed {seed}" for seed in SEEDS), "median", *SIMPLE]
    write_table(path, head, rows)


def write_days(
    path: Path, days: dict[tuple[str, int], list[DayError]], leads: Sequence[int]
) -> None:
    """Writes the table of the days and leads, which tells where the damped anomaly is better."""
    rows = []
    for day in sorted({day for day, _ in days}):
        cells = [day]
        for lead in leads:
            errors = days[day, lead]
            median = statistics.median(error.model for error in errors)
            cell = f"{median:.3f} / {errors[0].damped:.3f}"
            lost = sum(error.model > error.damped for error in errors)
            if lost:
                cell += f" (lost by {lost} of {len(SEEDS)})"
            cells.append(cell)
        rows.append(cells)
    head = ["initial day", *(f"{lead} h: median / damped anomaly" for lead in leads)]
    write_table(path, head, rows)


def errors_by_day(run: Path, forecast: Path, data: str) -> list[DayError]:
    """The errors by initial day and lead, from the forecasts' file and the record alone."""
    import xarray as xr

    from apps.vit.config import load
    from apps.vit.data.samples import Samples
    from apps.vit.data.statistics import statistics as statistics_of
    from apps.vit.open_data import open_record, split_record

    config = load(str(run / "config.yaml")).data
    leads = config.lead_hours()
    fields = open_record(data, config)
    parts = split_record(fields, config)
    made = statistics_of(fields, parts["train"], config.hours(), cache=run / "statistics")
    samples = Samples(fields, parts["test"], made, leads, (), "valid", base="damped")
    with xr.open_dataset(forecast / "forecasts.nc") as dataset:
        times = dataset.time.values
        model = dataset["t2m"].values[:, :, None].astype(float)
        truth = dataset["t2m_truth"].values[:, :, None].astype(float)
    t0s = np.searchsorted(fields.times, times.astype("datetime64[s]"))
    # A prediction of 0 leaves the damped anomaly as it is.
    damped = samples.to_fields(np.zeros(truth.shape, np.float32), t0s).astype(float)
    initial_days = times.astype("datetime64[D]")
    weights = fields.grid.weights()[:, None] / fields.grid.weights().mean()
    errors = []
    for day in np.unique(initial_days):
        on_day = initial_days == day
        for i, lead in enumerate(leads):
            error = DayError(
                day=str(day),
                lead=lead,
                model=rmse_of(model[on_day, i] - truth[on_day, i], weights),
                damped=rmse_of(damped[on_day, i] - truth[on_day, i], weights),
            )
            errors.append(error)
    return errors


def rmse_of(differences: np.ndarray, weights: np.ndarray) -> float:
    """The root of the weighted mean square; the weights have the mean 1."""
    return float(np.sqrt((np.square(differences) * weights).mean()))


# ---- the simulated record


def study_default(args: argparse.Namespace) -> None:
    """One run of a small model on the default record, and forecasts fed with themselves."""
    flags = "--patch 4 --leads 6,24,72 --base damped --warmup 20 --epochs 8"
    run = train(args, "default", *flags.split())
    forecast = predict(args, run, "--save", 2, "--rollout", 72)
    copy_figures(forecast / "maps", args.out / "plots/default")
    by_line: dict[tuple[str, int], dict[str, str]] = {}  # by variable and lead, then forecast
    for row in read_rows(forecast / "scores.csv", ScoreRow):
        line = by_line.setdefault((f"{row.variable} ({row.units})", row.lead_hours), {})
        line[row.forecast] = f"{row.rmse:.4g}"
    names = ("model", "roll-out", *SIMPLE)
    rows = []
    for (variable, lead), line in by_line.items():
        if "model" in line:
            rows.append([variable, f"{lead} h", *(line.get(name, "") for name in names)])
    write_table(args.out / "table_default.md", ["RMSE", "lead", *names], rows)


def study_patches(args: argparse.Namespace) -> None:
    """The same model but for the patch, over as many epochs: the validation loss after each."""
    runs = [
        train(args, f"p{patch}", *SMALL.split(), "--patch", patch, "--epochs", args.epochs)
        for patch in PATCHES
    ]
    plot_runs(runs, args.out / "plots/patches")
    losses = [validation_losses(run) for run in runs]
    rows = []
    for patch, run, of_run in zip(PATCHES, runs, losses, strict=True):
        rmse = rmse_of_height(predict(args, run, "--no-maps"))
        rows.append([patch, POINTS // patch**2, *(f"{loss:.4f}" for loss in of_run), f"{rmse:.2f}"])
    epochs = [f"epoch {n}" for n in range(1, len(losses[0]) + 1)]
    head = ["patch", "tokens", *epochs, "RMSE of h in the test times (m)"]
    write_table(args.out / "patches.md", head, rows)


def validation_losses(run: Path) -> list[float]:
    losses = [record.get("val_loss") for record in read_metrics(run)]
    return [loss for loss in losses if loss is not None]


def rmse_of_height(forecast: Path) -> float:
    """The model's error of h, m."""
    for row in read_rows(forecast / "scores.csv", ScoreRow):
        if row.variable == "h" and row.forecast == "model":
            return row.rmse
    raise ValueError(f"{forecast}/scores.csv has no row of h and the model.")


def study_time(args: argparse.Namespace) -> None:
    """Algorithms take turns; the median of all their steps but each run's first two."""
    algorithms = ringx.algorithms()
    seconds: dict[tuple[int, str], list[float]] = {}
    for turn in range(args.turns):
        for patch in PATCHES:
            for algorithm in algorithms:
                run = args.work / f"time_p{patch}_{algorithm}_{turn}"
                train_8_steps(args, run, patch, algorithm)
                of_steps = [record["seconds"] for record in read_metrics(run)[2:]]
                seconds.setdefault((patch, algorithm), []).extend(of_steps)
    times = [
        {"patch": patch, "algorithm": algorithm, "seconds": of_steps}
        for (patch, algorithm), of_steps in seconds.items()
    ]
    text = json.dumps({"ranks": args.nproc, "times": times}, indent=1)
    (args.out / "time.json").write_text(text + "\n")
    medians = {key: statistics.median(of_steps) for key, of_steps in seconds.items()}
    rows = []
    for patch in PATCHES:
        cells: list[object] = [patch, POINTS // patch**2]
        for algorithm in algorithms:
            median = medians[patch, algorithm]
            cells.append(f"{median:.2f} s ({median / medians[patch, 'ringx3']:.2f})")
        rows.append(cells)
    head = ["patch", "tokens", *(f"{name} (ratio to ringx3)" for name in algorithms)]
    write_table(args.out / "time.md", head, rows)


def train_8_steps(args: argparse.Namespace, run: Path, patch: int, algorithm: str) -> None:
    """A run that is only timed."""
    flags = (
        f"{SMALL} --patch {patch} --steps 8 --algorithm {algorithm} --val-every 0 --save-every 0 "
        f"--cp {args.nproc} --nproc {args.nproc}"
    )
    run_module("train", *flags.split(), "--out", run)


STUDIES = {
    "era5": study_era5,
    "default": study_default,
    "patches": study_patches,
    "time": study_time,
}


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=STUDIES)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--data", help="era5's file")
    p.add_argument("--work", type=Path, help="where runs are made, or gone on with")
    p.add_argument("--nproc", type=int, default=2)
    p.add_argument("--epochs", type=int, default=4, help="of patches (default: 4)")
    p.add_argument("--turns", type=int, default=2, help="of time (default: 2)")
    args = p.parse_args()
    if args.what == "era5" and not args.data:
        p.error("era5 needs --data FILE")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        STUDIES[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
