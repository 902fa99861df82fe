"""ringx plot: scaling, efficiency, time, bytes and collectives, drawn from records or from the tables of `ringx collect`.

    ringx plot results/here                    # PNG, SVG and CSV beside the records
    ringx plot results/here --out figures
    ringx plot results/study/attention.parquet results/study/collectives.parquet --out results/study/plots

Each figure comes as PNG and SVG, with the numbers it shows as CSV.  Records that differ in machine, dtype, kernel or sizes of
heads go to separate files.  Broken records are named and left out; a figure that lacks data is skipped with the reason.
Needs matplotlib: pip install 'ringx[plot]'
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from ..measure import records
from . import figures, tables
from .figures import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="DIR|TABLE",
        help="folders with records, or tables of ringx collect",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder for the figures (default: the first source's)",
    )


def main(args: argparse.Namespace) -> int:
    rows = [row for source in args.sources for row in rows_in(source)]
    first = args.sources[0]
    if not rows:
        raise ValueError(f"{first} holds no valid record; `ringx bench --out {first}` writes some.")
    for line in draw(rows, args.out or (first if first.is_dir() else first.parent)):
        print(line)
    return 0


def rows_in(source: Path) -> list[Row]:
    """The rows of a table, or of a folder's records; broken records are named on stderr."""
    if source.suffix in (".parquet", ".csv"):
        return tables.read_table(source)
    good, broken = records.read_all(source)
    for fault in broken:
        print(f"left out: {fault}", file=sys.stderr)
    return [row for r in good for row in tables.rows_of(r)]


def draw(rows: Iterable[Row], out: Path) -> Iterable[str]:
    """Draws every figure that the rows (of ``tables.rows_of``) allow; yields a line about each."""
    plt = figures.pyplot()
    out.mkdir(parents=True, exist_ok=True)
    of_attention: list[Row] = []
    of_collectives: list[Row] = []
    for row in rows:
        (of_attention if "algorithm" in row else of_collectives).append(row)
    for drawn, these, setting in (
        (figures.FIGURES, figures._sorted(of_attention), figures.SETTING),
        (figures.BANDWIDTH, figures._sorted(of_collectives), figures.WHERE),
    ):
        kinds = list(dict.fromkeys(tuple(r[k] for k in setting) for r in these))
        differ = [i for i in range(len(setting)) if len({kind[i] for kind in kinds}) > 1]
        for kind in kinds:
            same = [r for r in these if tuple(r[k] for k in setting) == kind]
            suffix = "".join(f"_{figures._slug(setting[i], kind[i])}" for i in differ)
            for name, figure in drawn.items():
                yield figures.draw_figure(plt, figure, same, out / f"{name}{suffix}")
