"""ringx collect: the records of many jobs as one tidy table.

    ringx collect runs/weak runs/strong --out results/scaling_here_202611
    ringx collect bench_out                                     # the tables beside the records

Every folder is searched with all below it.  What is no valid record is named and left out; a record that turns up twice (the same
case, host, time of writing and content) is taken once.  Writes to --out (default: the first folder)

    attention.parquet, .csv      a row per record of `ringx bench`: its case, times, bytes, efficiency, and where it comes from
    collectives.parquet, .csv    a row per collective and size of `ringx bench-comm`
    machine.json                 the alpha-beta fits of the collectives (``ringx.measure.machine``)
    environment.json             the distinct machines, versions, commits, jobs and commands behind the rows

`ringx plot` draws from such a table as from a folder of records.  Needs pandas and pyarrow: pip install 'ringx[plot]'
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..measure import machine, records
from .tables import _pandas, rows_of

TABLES = {"attention": "attention", "collective": "collectives"}  # kind -> name of its table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders with records, searched with all below them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder for the tables (default: the first DIR)",
    )


def main(args: argparse.Namespace) -> int:
    pandas = _pandas()
    found, broken, twice = gather(args.folders)
    for fault in broken:
        print(f"left out: {fault}", file=sys.stderr)
    if not found:
        raise ValueError(
            f"no valid record in {', '.join(map(str, args.folders))}; `ringx bench --out DIR` writes some."
        )
    out = args.out or args.folders[0]
    records.expect_room(out, 2**16 + 2**12 * len(found))
    collectives = [r for _, r in found if r["kind"] == "collective"]
    names = records.collectives_sent([r for _, r in found if r["kind"] == "attention"])
    fits = machine.of(collectives)["fits"]
    for kind, name in TABLES.items():
        rows = [
            row
            for path, r in found
            if r["kind"] == kind
            for row in rows_of(r, path, fits, collectives=names)
        ]
        if rows:
            frame = pandas.DataFrame(rows)
            frame.to_parquet(out / f"{name}.parquet", index=False)
            frame.to_csv(out / f"{name}.csv", index=False)
            print(f"{out / name}.parquet, .csv: {len(rows)} rows")
    if collectives:
        print(machine.write(out, collectives))
    files.write_text(
        out / "environment.json",
        json.dumps(environment([r for _, r in found]), indent=1) + "\n",
        replace=True,
    )
    more = [f"{len(broken)} broken files, named above"] if broken else []
    print(
        "; ".join(
            [f"{len(found)} records", *([f"{twice} copies taken once"] if twice else []), *more]
        )
    )
    return 0


def gather(folders: Sequence[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[str], int]:
    """((file, record) of every valid record below the folders, what is wrong with each other JSON file, how many were copies).

    Raises:
        FileNotFoundError: a folder is not there."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    broken, twice = [], 0
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"{folder} is no directory; `ringx bench --out {folder}` writes records there."
            )
        for path in sorted(Path(folder).rglob("*.json")):
            if path.name in records.DERIVED or path.name.startswith("."):
                continue
            try:
                record = records.read(path)
            except (ValueError, OSError) as e:
                broken.append(str(e))
                continue
            content = json.dumps(record, sort_keys=True)
            twice += content in found
            found.setdefault(content, (path, record))
        broken += [
            f"{p}: set aside by a later run" for p in sorted(Path(folder).rglob("*.json.broken"))
        ]
    return list(found.values()), list(dict.fromkeys(broken)), twice


# ---- rows


def environment(found: Iterable[dict[str, Any]]) -> dict[str, list]:
    """The distinct surroundings of the records, and how many share each."""
    what = {
        "versions": lambda r: r["versions"],
        "git": lambda r: r["git"],
        "machine": lambda r: {
            k: v for k, v in r["machine"].items() if k not in ("hosts", "load_average")
        },
        "launch": lambda r: {k: v for k, v in r["launch"].items() if k != "job"},
        "job": lambda r: (
            r["launch"]["job"]
            and {k: v for k, v in r["launch"]["job"].items() if k not in ("array_task", "restart")}
        ),
        "labels": lambda r: r["labels"],
        "command": lambda r: _without_folder(r["command"]["argv"]),
    }
    counts: dict[str, dict[str, int]] = {name: {} for name in what}
    for r in found:
        for name, of in what.items():
            key = json.dumps(of(r), sort_keys=True)
            counts[name][key] = counts[name].get(key, 0) + 1
    return {
        name: [{"records": n, name: json.loads(key)} for key, n in seen.items()]
        for name, seen in counts.items()
    }


def _without_folder(argv: Sequence[str]) -> list[str]:
    """A command without the folder that its --out is in, which is nobody's business."""
    return [
        Path(word).name if before == "--out" else word
        for before, word in zip(["", *argv], argv, strict=False)
    ]


# ---- tables
