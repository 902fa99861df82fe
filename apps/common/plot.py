"""Curves of one or several runs, from their metrics.jsonl: loss, throughput, memory, utilisation.

    python -m apps.common.plot RUN [RUN ...] --out DIR
    python -m apps.common.plot RUN --out DIR --smooth 20

Writes DIR/loss, loss_by_tokens, throughput, memory and mfu: each as PNG and SVG, with the numbers
it shows as CSV.  A figure that no run has numbers for is skipped with the reason.  Needs
matplotlib: pip install 'ringx[plot]'
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.common.arguments import MISTAKES, run_command
from apps.common.log import read_metrics, read_sessions
from ringx.report import figures as shared  # one look for all figures
from ringx.report.figures import Lacking, Row

MARKED = 9  # markers on a line, enough to tell lines apart in black and white
GIB = 2**30
HOLLOW = {"ls": "", "mfc": "white", "mew": 1.4, "ms": 7, "zorder": 9}


@dataclass(frozen=True)
class Curve:
    """A figure: one number of the records against the steps, or against the tokens seen."""

    y: str  # name in the records
    ylabel: str
    title: str
    x: str = "step"
    points: str = ""  # name of a number that is shown as hollow points; "": none
    unit: float = 1.0  # what 1 on the y axis is in the records' unit
    from_zero: bool = False  # whether the y axis begins at 0
    smoothed: bool = True  # whether `smooth` applies


def curves(loss: str) -> dict[str, Curve]:
    """The figures by the names of their files; loss: its label."""
    return {
        "loss": Curve(y="loss", ylabel=loss, title="Loss", points="val_loss"),
        "loss_by_tokens": Curve(
            y="loss", ylabel=loss, title="Loss by training data", points="val_loss", x="tokens"
        ),
        "throughput": Curve(
            y="tokens_per_s", ylabel="throughput (tokens/s)", title="Throughput", from_zero=True
        ),
        "memory": Curve(
            y="peak_memory_bytes",
            ylabel="peak memory of a rank (GiB)",
            title="Memory",
            unit=GIB,
            from_zero=True,
            smoothed=False,
        ),
        "mfu": Curve(
            y="mfu",
            ylabel="model FLOPs utilisation (%)",
            title="Model FLOPs utilisation",
            unit=0.01,
            from_zero=True,
        ),
    }


def plot_runs(runs: "Sequence[str | Path]", out: "str | Path", *, smooth: int = 0) -> list[str]:
    """Draws every figure that the runs' records allow into the folder `out`.

    Args:
        runs: folders that hold a metrics.jsonl; one named twice counts once.
        smooth: draw the mean of each `smooth` records up to a step over the pale raw curve (not of
            memory); 0: raw only.

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
    rows: list[Row] = []
    for name, folder in zip(names_of(folders), folders, strict=True):
        rows += [{"run": name, **record} for record in read_metrics(folder)]
    loss_unit = _loss_unit(folders)
    out = Path(out)
    plt = shared.pyplot()
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, curve in curves(f"loss ({loss_unit})" if loss_unit else "loss").items():

        def figure(plt: Any, rows: Sequence[Row], curve: Curve = curve) -> tuple[Any, list[Row]]:
            return _draw_curves(plt, rows, curve, smooth if curve.smoothed else 0)

        lines.append(shared.draw_figure(plt, figure, rows, out / name))
    return lines


def _loss_unit(folders: Sequence[Path]) -> str | None:
    """The unit of the runs' losses, if all name the same."""
    units = set()
    for folder in folders:
        sessions = read_sessions(folder)
        units.add(sessions[-1].get("loss_unit") if sessions else None)
    return units.pop() if len(units) == 1 else None


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many of its parents' as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return ["/".join(path[-depth:]) for path in parts]


def mean_of_last(values: Sequence[float], n: int) -> list[float]:
    """Of each value and the n - 1 before it (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - n) : end]
        means.append(sum(part) / len(part))
    return means


def _draw_curves(plt: Any, rows: Sequence[Row], curve: Curve, smooth: int) -> tuple[Any, list[Row]]:
    """(the figure: a line for each run that has y; the rows of its CSV, in the records' units)."""
    rows = _rows_to_draw(rows, curve)
    figure, axes = plt.subplots(figsize=(shared.WIDTH, 4.4))
    rows_by_run = _by_run(rows)
    shown: list[Row] = []
    for index, (run, rows_of_run) in enumerate(rows_by_run.items()):
        look = _look(index, sum(_has(row, curve.y) for row in rows_of_run))
        shown += _draw_run(axes, look, run, rows_of_run, curve, smooth)
    if any(_has(row, curve.points) for row in rows):
        axes.plot([], [], color="0.3", marker="o", label="hollow: validation", **HOLLOW)
    _label(plt, axes, curve, smooth)
    longest = max(map(len, rows_by_run))
    columns = max(1, min(3, int(60 // longest)))
    figure.legend(loc="outside lower center", ncols=columns)
    return figure, shown


def _rows_to_draw(rows: Sequence[Row], curve: Curve) -> list[Row]:
    """Those in which there is something to show; raises Lacking where none has y."""
    rows_to_draw = [row for row in rows if _has(row, curve.x) and _has_any(row, curve)]
    if not any(_has(row, curve.y) for row in rows_to_draw):
        needed = f"it needs records with {curve.y!r}"
        if curve.x != "step":
            needed += f" and {curve.x!r}"
        raise Lacking(needed)
    return rows_to_draw


def _by_run(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each run, in the order of the runs' first rows."""
    rows_by_run: dict[str, list[Row]] = {}
    for row in rows:
        rows_by_run.setdefault(row["run"], []).append(row)
    return rows_by_run


def _has(row: Row, name: str) -> bool:
    return row.get(name) is not None


def _has_any(row: Row, curve: Curve) -> bool:
    """Whether there is something to show of a record."""
    return _has(row, curve.y) or _has(row, curve.points)


def _draw_run(
    axes: Any, look: dict[str, Any], run: str, rows: Sequence[Row], curve: Curve, smooth: int
) -> list[Row]:
    """Draws one run, and returns its rows of the CSV."""
    with_y = [row for row in rows if _has(row, curve.y)]
    xs, ys = _coordinates(with_y, curve, curve.y)
    means: dict[int, float] = {}  # by the row's id
    if smooth > 1:
        axes.plot(xs, ys, color=look["color"], lw=0.8, alpha=0.35, zorder=2)
        ys = mean_of_last(ys, smooth)
        means = {id(row): y * curve.unit for row, y in zip(with_y, ys, strict=True)}
    axes.plot(xs, ys, label=run, **look)
    with_points = [row for row in rows if _has(row, curve.points)]
    if with_points:
        xs, ys = _coordinates(with_points, curve, curve.points)
        axes.plot(xs, ys, color=look["color"], marker=look["marker"], **HOLLOW)
    return [_csv_row(row, curve, smooth, means.get(id(row))) for row in rows]


def _coordinates(rows: Sequence[Row], curve: Curve, name: str) -> tuple[list[float], list[float]]:
    """x and y of the points that show the number `name` of the rows."""
    xs = [row[curve.x] for row in rows]
    ys = [row[name] / curve.unit for row in rows]
    return xs, ys


def _csv_row(row: Row, curve: Curve, smooth: int, mean: float | None) -> Row:
    """What the figure shows of a record; `mean` is that of the last `smooth` records."""
    shown = {"run": row["run"], "step": row["step"]}
    shown[curve.x] = row[curve.x]
    shown[curve.y] = row.get(curve.y)
    if smooth > 1:
        shown[f"{curve.y}_mean_of_{smooth}"] = mean
    if curve.points:
        shown[curve.points] = row.get(curve.points)
    return shown


def _label(plt: Any, axes: Any, curve: Curve, smooth: int) -> None:
    xlabels = {"step": "step", "tokens": "training tokens seen"}
    axes.set(title=curve.title, xlabel=xlabels[curve.x])
    mean = f", mean of {smooth} records" if smooth > 1 else ""
    axes.set_ylabel(curve.ylabel + mean)
    if curve.from_zero:
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    if curve.x == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axis, name in ((axes.xaxis, curve.x), (axes.yaxis, curve.y)):
        if name in ("tokens", "tokens_per_s"):  # 200M, not 2.0 and 1e8 in a corner
            axis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))


def _look(index: int, points: int) -> dict[str, Any]:
    """Colour, marker and line of the run `index`: all three differ from its neighbours'.

    Its `points` get a few markers, shifted so that those of runs which coincide do not."""
    colours, styles = shared.COLOURS, shared.STYLES
    every = max(1, points // MARKED)
    return {
        "color": colours[index % len(colours)],
        "marker": shared.MARKERS[index % len(shared.MARKERS)],
        "ls": styles[(index + index // len(colours)) % len(styles)],
        "lw": 1.8,
        "ms": 5,
        "markevery": ((index * every // 4) % every, every),
        "zorder": 3 + index / 100,
    }


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
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
    """Draws the figures and prints a line about each; returns the exit status."""
    return run_command(parser(), argv, _draw, mistakes=(*MISTAKES, OSError))


def _draw(args: argparse.Namespace) -> int:
    for line in plot_runs(args.runs, args.out, smooth=args.smooth):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
