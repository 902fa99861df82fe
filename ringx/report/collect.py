"""ringx collect: the records of many jobs as one tidy table.

    ringx collect runs/weak runs/strong --out results/scaling_here_202611
    ringx collect bench_out                                     # the tables beside the records

Every folder is searched with all below it.  What is no valid record is named and left out; a record
that turns up twice (the same case, host, time of writing and content) is taken once.  Writes to
--out (default: the first folder)

    attention.parquet, .csv      a row per record of `ringx bench`: its case, times, bytes,
                                 efficiency, and where it comes from
    collectives.parquet, .csv    a row per collective and size of `ringx bench-comm`
    machine.json                 the alpha-beta fits of the collectives (``ringx.measure.machine``)
    environment.json             the distinct machines, versions, commits, jobs and commands behind
                                 the rows

`ringx plot` draws from such a table as from a folder of records.
Needs pandas and pyarrow: pip install 'ringx[plot]'
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..measure import machine, records
from ..measure.records import Record
from .tables import collectives_sent, require_pandas, rows_of

TABLES = {"attention": "attention", "collective": "collectives"}  # kind -> name of its table
Entry = tuple[Path, Record]  # a record's file, and the record


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
    require_pandas()
    entries, broken, copies = gather(args.folders)
    for fault in broken:
        print(f"left out: {fault}", file=sys.stderr)
    if not entries:
        raise ValueError(
            f"no valid record in {', '.join(map(str, args.folders))};"
            " `ringx bench --out DIR` writes some."
        )
    out = args.out or args.folders[0]
    records.expect_room(out, 2**16 + 2**12 * len(entries))
    _write_all(out, entries)
    print(_summary(len(entries), copies=copies, broken=len(broken)))
    return 0


def _write_all(out: Path, entries: Sequence[Entry]) -> None:
    """Writes the tables, the machine file and environment.json; prints a line for each but that."""
    of_collectives = [record for _, record in entries if record["kind"] == "collective"]
    fits = machine.of(of_collectives)["fits"]
    for kind, name in TABLES.items():
        of_kind = [(path, record) for path, record in entries if record["kind"] == kind]
        _write_table(of_kind, fits=fits, path=out / name)
    if of_collectives:
        print(machine.write(out, of_collectives))
    surroundings = environment(record for _, record in entries)
    text = json.dumps(surroundings, indent=1) + "\n"
    files.write_text(out / "environment.json", text, replace=True)


def _summary(number_of_records: int, *, copies: int, broken: int) -> str:
    parts = [f"{number_of_records} records"]
    if copies:
        parts.append(f"{copies} copies taken once")
    if broken:
        parts.append(f"{broken} broken files, named above")
    return "; ".join(parts)


def _write_table(entries: Sequence[Entry], *, fits: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the records of one kind as `path`.parquet and .csv; nothing if there are none."""
    names = collectives_sent(record for _, record in entries if record["kind"] == "attention")
    rows = []
    for source, record in entries:
        rows += rows_of(record, source, fits, collectives=names)
    if not rows:
        return
    frame = require_pandas().DataFrame(rows)
    frame.to_parquet(f"{path}.parquet", index=False)
    frame.to_csv(f"{path}.csv", index=False)
    print(f"{path}.parquet, .csv: {len(rows)} rows")


def gather(folders: Sequence[Path]) -> tuple[list[Entry], list[str], int]:
    """((file, record) of every valid record below the folders, what is wrong with each other JSON
    file, how many records were copies of others).

    Raises:
        FileNotFoundError: a folder is not there."""
    entries: dict[str, Entry] = {}  # by content
    broken: list[str] = []
    copies = 0
    for folder in map(Path, folders):
        for path in _record_files(folder):
            try:
                record = records.read(path)
            except (ValueError, OSError) as error:
                broken.append(str(error))
                continue
            content = json.dumps(record, sort_keys=True)
            if content in entries:
                copies += 1
            else:
                entries[content] = (path, record)
        for path in sorted(folder.rglob("*.json.broken")):
            broken.append(f"{path}: set aside by a later run")
    return list(entries.values()), list(dict.fromkeys(broken)), copies


def _record_files(folder: Path) -> list[Path]:
    """The JSON files below a folder that should hold a record."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no directory; `ringx bench --out {folder}` writes records there."
        )
    return [
        path
        for path in sorted(folder.rglob("*.json"))
        if path.name not in records.DERIVED_FILES and not path.name.startswith(".")
    ]


def environment(all_records: Iterable[Record]) -> dict[str, list[dict[str, Any]]]:
    """The distinct surroundings of the records, and how many share each."""
    counts: dict[str, dict[str, int]] = {name: {} for name in SURROUNDINGS}
    for record in all_records:
        for name, surroundings in SURROUNDINGS.items():
            text = json.dumps(surroundings(record), sort_keys=True)
            counts[name][text] = counts[name].get(text, 0) + 1
    distinct: dict[str, list[dict[str, Any]]] = {}
    for name, count_of_text in counts.items():
        distinct[name] = [
            {"records": count, name: json.loads(text)} for text, count in count_of_text.items()
        ]
    return distinct


def _versions(record: Record) -> Any:
    return record["versions"]


def _git(record: Record) -> Any:
    return record["git"]


def _machine(record: Record) -> Any:
    return _without(record["machine"], "hosts", "load_average")


def _launch(record: Record) -> Any:
    return _without(record["launch"], "job")


def _job(record: Record) -> Any:
    job = record["launch"]["job"]
    return _without(job, "array_task", "restart") if job else job


def _labels(record: Record) -> Any:
    return record["labels"]


def _command(record: Record) -> list[str]:
    """The command, without the folder that its --out is in: that is private."""
    words = record["command"]["argv"]
    shown = []
    previous = None
    for word in words:
        shown.append(Path(word).name if previous == "--out" else word)
        previous = word
    return shown


def _without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


SURROUNDINGS: dict[str, Callable[[Record], Any]] = {
    "versions": _versions,
    "git": _git,
    "machine": _machine,
    "launch": _launch,
    "job": _job,
    "labels": _labels,
    "command": _command,
}
