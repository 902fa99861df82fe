"""The ViT app's figures: skill on real data and on the data at hand, what small patches bring, and what they cost.

    python script/vit_study.py era5 --data era5_t2m_uk_2019-03.nc --out DIR   # three seeds; by day, where it loses (10 minutes)
    python script/vit_study.py default --out DIR                              # the simulated record (5 minutes)
    python script/vit_study.py patches --out DIR                              # patch 4, 2, 1, as many epochs each (15 minutes)
    python script/vit_study.py time --out DIR                                 # seconds a step, by patch and algorithm (10 minutes)

All run the trainer's own command on two ranks (--nproc changes that), sequences cut over them.  Each writes tables, the runs' logs
and figures into DIR; whole runs, with their checkpoints, go to --work (default: a folder that is removed).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ringx
from apps.common.log import read_metrics
from apps.common.plot import plot_runs
from apps.vit.scores import ScoreRow, read_rows

ROOT = Path(__file__).resolve().parents[1]
PATCHES = (4, 2, 1)
PARTS = (
    "--train-times",
    "0/560",
    "--val-times",
    "1120/1360",
    "--test-times",
    "1360/1600",
)  # half of the usual training times
SMALL = (
    "--dim",
    64,
    "--layers",
    2,
    "--heads",
    2,
    "--ffn",
    384,
    "--leads",
    6,
    "--base",
    "damped",
    "--warmup",
    20,
    *PARTS,
)


def ask(module: str, *words: object) -> str:
    """What a command of the app says."""
    command = [sys.executable, "-m", f"apps.vit.{module}", *map(str, words)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def train(args: argparse.Namespace, name: str, *words: object) -> Path:
    """A run, or what is left to do of it; its log is kept."""
    run = args.work / name
    ask("train", *words, "--cp", args.nproc, "--nproc", args.nproc, "--out", run, "--resume", run)
    keep(run, args.out / name, "config.yaml", "metrics.jsonl")
    return run


def predict(args: argparse.Namespace, run: Path, *words: object) -> Path:
    folder = args.work / f"{run.name}_forecast"
    ask("predict", "--checkpoint", run, "--out", folder, "--nproc", args.nproc, *words)
    keep(folder, args.out / run.name, "scores.csv")
    return folder


def keep(source: Path, into: Path, *names: str) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, into / name)


def keep_figures(maps: Path, into: Path) -> None:
    """PNGs, and the numbers behind them."""
    into.mkdir(parents=True, exist_ok=True)
    for path in (*maps.glob("*.png"), *maps.glob("*.csv")):
        shutil.copy(path, into / path.name)


def write_table(path: Path, head: tuple[str, ...], rows: list[tuple]) -> None:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *rows)]
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text(), flush=True)


# ---- real data


def era5(args: argparse.Namespace) -> None:
    """Three seeds of apps/vit/configs/era5_t2m_uk.yaml."""
    rmse: dict[tuple[int, str], list[float]] = {}
    days: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in range(3):
        run = train(
            args, f"seed{seed}", "--config", "era5_t2m_uk", "--data", args.data, "--seed", seed
        )
        forecast = predict(args, run, "--save", 1000)
        for row in read_rows(forecast / "scores.csv", ScoreRow):
            rmse.setdefault((row.lead_hours, row.forecast), []).append(row.rmse)
        for day, lead, *errors in by_day(run, forecast, args.data):
            days.setdefault((day, lead), []).append((errors[0], errors[1]))
        if seed == 0:
            keep_figures(predict(args, run, "--save", 2) / "maps", args.out / "plots/era5")
    leads = sorted({lead for lead, _ in rmse})
    names = ("persistence", "climatology", "damped anomaly")
    rows = [
        (
            f"{lead} h",
            *(f"{x:.3f}" for x in rmse[lead, "model"]),
            f"**{statistics.median(rmse[lead, 'model']):.3f}**",
        )
        + tuple(f"{rmse[lead, name][0]:.3f}" for name in names)
        for lead in leads
    ]
    write_table(
        args.out / "table.md", ("RMSE (K)", "seed 0", "seed 1", "seed 2", "median", *names), rows
    )
    found = []
    for day in sorted({day for day, _ in days}):
        cells = []
        for lead in leads:
            pairs = days[day, lead]
            lost = sum(model > damped for model, damped in pairs)
            cells.append(
                f"{statistics.median(m for m, _ in pairs):.3f} / {pairs[0][1]:.3f}"
                + (f" (lost by {lost} of 3)" if lost else "")
            )
        found.append((day, *cells))
    write_table(
        args.out / "days.md",
        ("initial day", *(f"{lead} h: median / damped anomaly" for lead in leads)),
        found,
    )


def by_day(run: Path, forecast: Path, data: str) -> list[tuple[str, int, float, float]]:
    """(initial day, lead, RMSE of the model, of the damped anomaly), from the forecasts' file and the record alone."""
    import xarray as xr

    from apps.vit.config import load
    from apps.vit.data.samples import Samples
    from apps.vit.data.statistics import statistics as statistics_of
    from apps.vit.open_data import open_record, split_record

    c = load(str(run / "config.yaml")).data
    fields = open_record(data, c)
    parts = split_record(fields, c)
    made = statistics_of(fields, parts["train"], c.hours(), cache=run / "statistics")
    damped = Samples(fields, parts["test"], made, c.lead_hours(), (), "valid", base="damped")
    with xr.open_dataset(forecast / "forecasts.nc") as ds:
        t0s = np.searchsorted(fields.times, ds.time.values.astype("datetime64[s]"))
        model, truth = (ds[name].values[:, :, None].astype(float) for name in ("t2m", "t2m_truth"))
        simple = damped.to_fields(np.zeros(truth.shape, np.float32), t0s).astype(float)
        day = ds.time.values.astype("datetime64[D]")
    weights = fields.grid.weights()[:, None] / fields.grid.weights().mean()
    out = []
    for one in np.unique(day):
        at = day == one
        for i, lead in enumerate(c.lead_hours()):
            errors = [
                float(np.sqrt((np.square(x[at, i] - truth[at, i]) * weights).mean()))
                for x in (model, simple)
            ]
            out.append((str(one), lead, *errors))
    return out


# ---- the data at hand


def default(args: argparse.Namespace) -> None:
    run = train(
        args,
        "default",
        "--patch",
        4,
        "--leads",
        "6,24,72",
        "--base",
        "damped",
        "--warmup",
        20,
        "--epochs",
        8,
    )
    forecast = predict(args, run, "--save", 2, "--rollout", 72)
    keep_figures(forecast / "maps", args.out / "plots/default")
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for row in read_rows(forecast / "scores.csv", ScoreRow):
        rows.setdefault((f"{row.variable} ({row.units})", row.lead_hours), {})[row.forecast] = (
            f"{row.rmse:.4g}"
        )
    names = ("model", "roll-out", "persistence", "climatology", "damped anomaly")
    shown = [
        (v, f"{lead} h", *(found.get(name, "") for name in names))
        for (v, lead), found in rows.items()
        if "model" in found
    ]
    write_table(args.out / "table_default.md", ("RMSE", "lead", *names), shown)


def patches(args: argparse.Namespace) -> None:
    """The same model but for the patch, over as many epochs: the validation loss after each."""
    runs = [train(args, f"p{p}", *SMALL, "--patch", p, "--epochs", args.epochs) for p in PATCHES]
    plot_runs(runs, args.out / "plots/patches")
    losses = [
        [r["val_loss"] for r in read_metrics(run) if r.get("val_loss") is not None] for run in runs
    ]
    skill = [
        next(
            r
            for r in read_rows(predict(args, run, "--no-maps") / "scores.csv", ScoreRow)
            if (r.variable, r.forecast) == ("h", "model")
        )
        for run in runs
    ]
    head = (
        "patch",
        "tokens",
        *(f"epoch {n + 1}" for n in range(len(losses[0]))),
        "RMSE of h in the test times (m)",
    )
    rows = [
        (p, 32 * 64 // p**2, *(f"{x:.4f}" for x in mine), f"{s.rmse:.2f}")
        for p, mine, s in zip(PATCHES, losses, skill, strict=True)
    ]
    write_table(args.out / "patches.md", head, rows)


def time(args: argparse.Namespace) -> None:
    """Algorithms take turns; the median of all their steps but each run's first two."""
    seconds: dict[tuple[int, str], list[float]] = {}
    for turn in range(args.turns):
        for p in PATCHES:
            for algorithm in ringx.algorithms():
                words = (
                    "--patch",
                    p,
                    "--steps",
                    8,
                    "--algorithm",
                    algorithm,
                    "--val-every",
                    0,
                    "--save-every",
                    0,
                )
                run = args.work / f"time_p{p}_{algorithm}_{turn}"
                ask(
                    "train", *SMALL, *words, "--cp", args.nproc, "--nproc", args.nproc, "--out", run
                )
                seconds.setdefault((p, algorithm), []).extend(
                    r["seconds"] for r in read_metrics(run)[2:]
                )
    found = [{"patch": p, "algorithm": a, "seconds": s} for (p, a), s in seconds.items()]
    (args.out / "time.json").write_text(
        json.dumps({"ranks": args.nproc, "times": found}, indent=1) + "\n"
    )
    middle = {key: statistics.median(s) for key, s in seconds.items()}
    head = ("patch", "tokens", *(f"{a} (ratio to ringx3)" for a in ringx.algorithms()))
    rows = [
        (
            p,
            32 * 64 // p**2,
            *(
                f"{middle[p, a]:.2f} s ({middle[p, a] / middle[p, 'ringx3']:.2f})"
                for a in ringx.algorithms()
            ),
        )
        for p in PATCHES
    ]
    write_table(args.out / "time.md", head, rows)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("era5", "default", "patches", "time"))
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
    with tempfile.TemporaryDirectory() as made:
        args.work = args.work or Path(made)
        {"era5": era5, "default": default, "patches": patches, "time": time}[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
