"""What ``ringx bench`` and ``ringx bench-comm`` have in common: options, which cases are left,
writing of records, and the end of a run that was told to stop."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .. import launch
from ..launch.stopping import AGAIN, Watch
from . import records

RECORD_BYTES = 2**14  # of a record, at most: what an --out folder must have room for


class Case(Protocol):
    """A dataclass with an id."""

    @property
    def id(self) -> str: ...


CaseT = TypeVar("CaseT", bound=Case)


# ---- options


def add_run_options(parser: argparse._ActionsContainer) -> None:
    """How long ranks wait for each other, and what is noted in the records."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds that ranks wait for each other (default: 600)",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="note this in the records, such as link_mbit=200; repeatable",
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command line, as a record holds them."""
    options = {}
    for name, value in vars(args).items():
        if not callable(value):
            options[name] = str(value) if isinstance(value, Path) else value
    return options


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """["link_mbit=200"] -> {"link_mbit": "200"}.

    Raises:
        ValueError: a label is not NAME=TEXT, or is there twice."""
    labels: dict[str, str] = {}
    for label in texts:
        name, equals, text = label.partition("=")
        if not re.fullmatch(r"[A-Za-z]\w*", name) or not equals or not text:
            raise ValueError(
                f"--label {label!r} must be NAME=TEXT,"
                " with a NAME of letters, digits and underscores"
            )
        if name in labels:
            raise ValueError(f"--label {name} is given twice")
        labels[name] = text
    return labels


def fault_message(faults: Sequence[str]) -> str:
    """All faults as the message of one error."""
    if len(faults) == 1:
        return faults[0]
    lines = "\n".join(f"  - {fault}" for fault in faults)
    return f"{len(faults)} faults:\n{lines}"


# ---- records


def remaining(
    out: Path, cases: Sequence[CaseT], resume: bool, labels: dict[str, str]
) -> list[CaseT]:
    """The cases that `out` does not hold yet.  Broken records are set
    aside, and their cases are among them.

    Raises:
        ValueError: `out` holds some of them and `resume` is False; or it holds one that was
            measured with other options or labels.
        OSError: `out` cannot hold the records."""
    records.expect_room(out, RECORD_BYTES * max(len(cases), 1))
    existing = [case for case in cases if records.path_of(out, case.id).exists()]
    if existing and not resume:
        raise ValueError(
            f"{out} already holds {len(existing)} of these {len(cases)} cases"
            f" ({existing[0].id}, ...): "
            "pass --resume to measure only the others, or another --out."
        )
    measured = _measured_alike(out, existing, labels)
    return [case for case in cases if case not in measured]


def _measured_alike(out: Path, existing: Sequence[CaseT], labels: dict[str, str]) -> set[CaseT]:
    """The cases whose records are not broken.

    Raises:
        ValueError: a record was measured with other options or labels."""
    measured = set()
    faults = []
    for case in existing:
        record = _read_or_set_aside(records.path_of(out, case.id))
        if record is None:
            continue
        measured.add(case)
        differences = _differences(record, case, labels)
        if differences:
            faults.append(
                f"{case.id} in {out} was measured with {', '.join(differences)}: pass another --out"
            )
    if faults:
        raise ValueError(fault_message(faults))
    return measured


def _read_or_set_aside(path: Path) -> records.Record | None:
    """The record in a file; None if it is broken, and then it has another name."""
    try:
        return records.read(path)
    except ValueError as error:
        aside = path.with_name(f"{path.name}.broken")
        path.replace(aside)
        print(
            f"measured again, for it is broken (now {aside.name}): {error}",
            file=sys.stderr,
        )
        return None


def _differences(record: records.Record, case: Any, labels: dict[str, str]) -> list[str]:
    """In what a record differs from what would be measured now."""
    differences = []
    for name, value in asdict(case).items():
        if record["case"].get(name) != value:
            differences.append(f"{name}={record['case'].get(name)!r}, now {value!r}")
    if record["labels"] != labels:
        differences.append(f"labels {record['labels']}, now {labels}")
    return differences


def write_record(out: Path, record: records.Record, subject: str) -> None:
    """Writes a record.  Where there is one already, it stays and a line on stderr names it.

    subject: what was measured, for that line."""
    try:
        records.write(out, record)
    except FileExistsError as error:  # of another run of the same job
        print(
            f"not written, for {subject} was measured elsewhere meanwhile: {error}",
            file=sys.stderr,
        )


# ---- ranks, and stopping


def world_of_launcher(args: argparse.Namespace) -> launch.World | None:
    """This rank's place among those that a launcher started; None where this process is to start
    the ranks itself."""
    if not launch.launched():
        return None
    return launch.init(device=args.device, timeout=args.timeout)


def run_until_stopped(
    runs: Iterable[Callable[[], str | None]], watch: Watch, *, only_waits: bool
) -> str | None:
    """Does the runs one after another, until one returns the name of a signal that it received or
    this process receives one; the name of that signal, or None if all were done.

    only_waits: this process is not a rank itself and only waits for those that it started."""
    try:
        for run in runs:
            with watch.at_once(only_waits):
                stop_signal = run()
            if stop_signal:
                return stop_signal
    except KeyboardInterrupt:
        return watch.stop_signal or "SIGINT"
    return None


def first_stop_signal(watch: Watch, world: launch.World) -> str:
    """The signal that some rank received, the same on every rank.  Collective; one must have."""
    signals = launch.gather(watch.stop_signal, world)
    return next(signal for signal in signals if signal)


def exit_status(stop_signal: str, *, useless: bool) -> int:
    """The exit status of a run that was told to stop.

    useless: nothing was finished.  The status is then not AGAIN: a job that starts itself again on
    that status would do so forever."""
    if stop_signal == "SIGINT":
        return 130
    return 1 if useless else AGAIN
