"""ringx plot: scaling, efficiency, time, bytes and collectives, drawn from records or from the
tables of `ringx collect`.

    ringx plot results/here                    # PNG, SVG and CSV beside the records
    ringx plot results/here --out figures
    ringx plot results/study/attention.parquet results/study/collectives.parquet \\
        --out results/study/plots

Each figure comes as PNG and SVG, with the numbers it shows as CSV.  Records that differ in machine,
dtype, kernel or sizes of heads go to separate files.  Broken records are named and left out; a
figure that lacks data is skipped with the reason.
Needs matplotlib: pip install 'ringx[plot]'
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
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
    rows: list[Row] = []
    for source in args.sources:
        rows += rows_in(source)
    first = args.sources[0]
    if not rows:
        raise ValueError(f"{first} holds no valid record; `ringx bench --out {first}` writes some.")
    beside = first if first.is_dir() else first.parent
    for line in draw(rows, args.out or beside):
        print(line)
    return 0


def rows_in(source: Path) -> list[Row]:
    """The rows of a table, or of a folder's records; broken records are named on stderr."""
    if source.suffix in (".parquet", ".csv"):
        return tables.read_table(source)
    good, broken = records.read_all(source)
    for fault in broken:
        print(f"left out: {fault}", file=sys.stderr)
    rows: list[Row] = []
    for record in good:
        rows += tables.rows_of(record)
    return rows


def draw(rows: Iterable[Row], out: Path) -> Iterator[str]:
    """Draws every figure that the rows (of ``tables.rows_of``) allow; yields a line about each."""
    plt = figures.pyplot()
    out.mkdir(parents=True, exist_ok=True)
    of_kind: dict[str, list[Row]] = {"attention": [], "collective": []}
    for row in rows:
        of_kind[figures.kind_of(row)].append(row)
    for kind, figures_of_kind in figures.OF_KIND.items():
        for suffix, group in by_setting(figures.sort_rows(of_kind[kind]), kind):
            for name, figure in figures_of_kind.items():
                yield figures.draw_figure(plt, figure, group, out / f"{name}{suffix}")


def by_setting(rows: Sequence[Row], kind: str) -> Iterator[tuple[str, list[Row]]]:
    """(what to add to the names of files, the rows) of each setting."""
    columns = records.SETTING_COLUMNS[kind]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    differing = [column for column in columns if len({row[column] for row in rows}) > 1]
    for group in groups.values():
        parts = [figures.slug(column, group[0][column]) for column in differing]
        yield "".join(f"_{part}" for part in parts), group
