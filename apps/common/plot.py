"""Curves of one or several runs, from their metrics.jsonl: loss, throughput, memory, utilisation.

    python -m apps.common.plot RUN [RUN ...] --out DIR
    python -m apps.common.plot RUN --out DIR --smooth 20

Writes DIR/loss, loss_by_tokens, throughput, memory and mfu: each as PNG and SVG, with the numbers it shows as CSV.  A figure
that no run has numbers for is skipped with the reason.  Needs matplotlib: pip install 'ringx[plot]'
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apps.common.arguments import MISTAKES, run_command
from apps.common.log import read_metrics, read_sessions
from ringx.report import figures as house  # one look for all figures
from ringx.report.figures import Lacking, Row

MARKED = 9  # markers on a line, enough to tell lines apart in black and white
GIB = 2**30


def plot_runs(runs: "Sequence[str | Path]", out: "str | Path", *, smooth: int = 0) -> list[str]:
    """Draws every figure that the runs' records allow into the folder `out`.

    Args:
        runs: folders that hold a metrics.jsonl; one named twice counts once.
        smooth: draw the mean of each `smooth` records up to a step over the pale raw curve (not of memory); 0: raw only.

    Returns:
        A line about each figure: its files, or why it was skipped.

    Raises:
        ValueError: no runs, a folder without (valid) metrics.jsonl, or a negative smooth; names it.
        ImportError: matplotlib is missing."""
    if smooth < 0:
        raise ValueError(f"smooth={smooth} must be at least 0 (0: no smoothing).")
    folders = list({Path(run).resolve(): Path(run) for run in runs}.values())
    if not folders:
        raise ValueError("runs is empty; name at least one folder that holds a metrics.jsonl.")
    records = dict(zip(names_of(folders), map(read_metrics, folders), strict=True))
    units = {(read_sessions(folder) or [{}])[-1].get("loss_unit") for folder in folders}
    unit = units.pop() if len(units) == 1 else None
    out = Path(out)
    plt = house.pyplot()
    out.mkdir(parents=True, exist_ok=True)
    loss = f"loss ({unit})" if unit else "loss"
    figures: dict[str, dict[str, Any]] = {
        "loss": dict(y="loss", ylabel=loss, title="Loss", points="val_loss"),
        "loss_by_tokens": dict(
            y="loss", ylabel=loss, title="Loss by training data", points="val_loss", x="tokens"
        ),
        "throughput": dict(
            y="tokens_per_s", ylabel="throughput (tokens/s)", title="Throughput", from_zero=True
        ),
        "memory": dict(
            y="peak_memory_bytes",
            ylabel="peak memory of a rank (GiB)",
            title="Memory",
            per=GIB,
            from_zero=True,
        ),
        "mfu": dict(
            y="mfu",
            ylabel="model FLOPs utilisation (%)",
            title="Model FLOPs utilisation",
            per=0.01,
            from_zero=True,
        ),
    }
    said = []
    for name, kind in figures.items():
        how = kind | {"smooth": 0 if name == "memory" else smooth}

        def figure(plt, rows, how=how):
            return _curves(plt, rows, **how)

        rows = [{"run": run, **r} for run, mine in records.items() for r in mine]
        said.append(house.draw_figure(plt, figure, rows, out / name))
    return said


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many of its parents' as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def mean_of_last(values: Sequence[float], n: int) -> list[float]:
    """Of each value and the n - 1 before it (fewer at the start)."""
    return [
        sum(part) / len(part)
        for part in (values[max(0, i + 1 - n) : i + 1] for i in range(len(values)))
    ]


def _curves(
    plt,
    rows: Iterable[Row],
    *,
    y: str,
    ylabel: str,
    title: str,
    smooth: int,
    x="step",
    points=None,
    per=1.0,
    from_zero=False,
):
    """One line for each run that has y (hollow points: `points`); and the rows of its CSV, in the records' own units."""
    rows = [
        r
        for r in rows
        if r.get(x) is not None and (r.get(y) is not None or (points and r.get(points) is not None))
    ]
    if not any(r.get(y) is not None for r in rows):
        raise Lacking(f"it needs records with {y!r}" + (f" and {x!r}" if x != "step" else ""))
    fig, ax = plt.subplots(figsize=(house.WIDTH, 4.4))
    runs = list(dict.fromkeys(r["run"] for r in rows))
    shown, hollow = [], None
    for k, run in enumerate(runs):
        mine = [r for r in rows if r["run"] == run and r.get(y) is not None]
        xs, ys = [r[x] for r in mine], [r[y] / per for r in mine]
        look = _look(k, len(xs))
        smoothed: Sequence[float | None] = [None] * len(ys)
        if smooth > 1:
            ax.plot(xs, ys, color=look["color"], lw=0.8, alpha=0.35, zorder=2)
            smoothed = ys = mean_of_last(ys, smooth)
        ax.plot(xs, ys, label=run, **look)
        marks = [r for r in rows if points and r["run"] == run and r.get(points) is not None]
        if marks:
            hollow = {"ls": "", "mfc": "white", "mew": 1.4, "ms": 7, "zorder": 9}
            ax.plot(
                [r[x] for r in marks],
                [r[points] / per for r in marks],
                color=look["color"],
                marker=look["marker"],
                **hollow,
            )
        means = {id(r): None if v is None else v * per for r, v in zip(mine, smoothed, strict=True)}
        for r in (r for r in rows if r["run"] == run):
            row = {"run": run, "step": r["step"], **({x: r[x]} if x != "step" else {}), y: r.get(y)}
            row |= {f"{y}_mean_of_{smooth}": means.get(id(r))} if smooth > 1 else {}
            shown.append(row | ({points: r.get(points)} if points else {}))
    if hollow:
        ax.plot([], [], color="0.3", marker="o", label="hollow: validation", **hollow)
    ax.set(title=title, xlabel={"step": "step", "tokens": "training tokens seen"}[x])
    ax.set_ylabel(ylabel + (f", mean of {smooth} records" if smooth > 1 else ""))
    if from_zero:
        ax.margins(y=0.1)
        ax.set_ylim(bottom=0)
    if x == "step":
        ax.xaxis.get_major_locator().set_params(integer=True)
    for axis, what in ((ax.xaxis, x), (ax.yaxis, y)):
        if what in ("tokens", "tokens_per_s"):  # 200M, not 2.0 and 1e8 in a corner
            axis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    columns = max(1, min(3, int(60 // max(len(run) for run in runs))))
    fig.legend(loc="outside lower center", ncols=columns)
    return fig, shown


def _look(k: int, n: int) -> dict[str, Any]:
    """Colour, marker and line of the k-th run, all three another than its neighbours'; its n points get a few markers, shifted
    so that those of runs which coincide do not."""
    colours, styles = house.COLOURS, house.STYLES
    every = max(1, n // MARKED)
    return {
        "color": colours[k % len(colours)],
        "marker": house.MARKERS[k % len(house.MARKERS)],
        "ls": styles[(k + k // len(colours)) % len(styles)],
        "lw": 1.8,
        "ms": 5,
        "markevery": ((k * every // 4) % every, every),
        "zorder": 3 + k / 100,
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m apps.common.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a trainer's --out: a folder that holds a metrics.jsonl",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the figures")
    p.add_argument(
        "--smooth",
        type=int,
        default=0,
        metavar="N",
        help="draw means of N records over the raw curves (default: 0, no)",
    )
    return p


def main(argv: "Sequence[str] | None" = None) -> int:
    """Draws the figures and prints a line about each; a user's mistake is one line on stderr and exit status 2."""
    return run_command(parser(), argv, _draw, mistakes=(*MISTAKES, OSError))


def _draw(args: argparse.Namespace) -> int:
    for line in plot_runs(args.runs, args.out, smooth=args.smooth):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
