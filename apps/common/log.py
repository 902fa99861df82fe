"""A run's folder: run.json records what was run, metrics.jsonl each step; and what a person sees.

    with Metrics(folder, start_step=k) as metrics, progress(steps, k, "a run") as show:
        write_header(folder, {"config": ...}, start_step=k)
        for step in range(k, steps):
            record = {"step": step, "loss": ..., "tokens_per_s": ...}
            metrics.write(record)
            show(record)

metrics.jsonl is the record: one JSON object a line, on its way to disk before the next step begins.
TensorBoard and W&B show the same numbers, and may lack the last seconds of a run that was killed.
"""

import contextlib
import importlib.util
import json
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import torch

import ringx
from ringx.files import write_text

NEEDED = ("step", "loss", "tokens_per_s")  # in every record
SHOWN = 20  # steps that have a line each where there is no terminal
PAUSE = 10.0  # after these: seconds between two lines, at least
Record = dict[str, Any]


class Metrics:
    """Appends a run's records to folder/metrics.jsonl, and their numbers to TensorBoard and W&B.

    A context manager.  A run that resumes at step k drops what it is going to redo, and nothing
    else: lines of step k and later, and a last line that a kill cut short.  The rest is written
    aside and renamed, so that a kill meanwhile loses nothing.

    Args:
        folder: made if need be; None swallows all records (ranks other than the first).
        start_step: the first step to come; 0 begins anew, and drops the records of an older run.
        tensorboard: "auto": folder/tensorboard where the package is installed; True: likewise, or
            an error; False: no.
        wandb: W&B project; None: no W&B.  A resumed run goes on in its W&B run, whose id is in
            folder/wandb.id; W&B keeps the first values it saw of a step that is redone.
        config: shown beside the curves by TensorBoard and W&B; ``write_header`` puts it in
            run.json.

    Raises:
        ValueError: TensorBoard or W&B is asked for but not installed (on every rank), or
            metrics.jsonl is broken."""

    def __init__(
        self,
        folder: Path | None,
        *,
        start_step: int = 0,
        tensorboard: bool | str = "auto",
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        _expect_start(start_step)
        expect_loggers(tensorboard, wandb)
        self._file = self._tensorboard = self._wandb = None
        self._next = start_step
        if folder is None:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _keep_before(folder, start_step)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        if tensorboard is True or (tensorboard == "auto" and _installed("tensorboard")):
            self._tensorboard = _start_tensorboard(folder, config, start_step)
        if wandb is not None:
            self._wandb = _start_wandb(folder, wandb, config, resumed=start_step > 0)

    def write(self, record: Record) -> None:
        """One step's record: numbers by name, at least step, loss and tokens_per_s.

        Not-a-numbers are written as Python's json does (NaN, Infinity).

        Raises:
            ValueError: a name is missing, or the step is not after the last one."""
        self._expect_next(record)
        step = record["step"]
        self._next = step + 1
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = _numbers(record)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def _expect_next(self, record: Record) -> None:
        """ValueError where a name is missing, or the step is not after the last one."""
        missing = [name for name in NEEDED if name not in record]
        if missing:
            raise ValueError(f"record={record!r} lacks {', '.join(missing)}.")
        step = record["step"]
        if step < self._next:
            raise ValueError(
                f"step={step} was written already or lies before start_step; "
                f"the next is {self._next}."
            )

    def close(self, failed: bool = False) -> None:
        """Finishes all files; may be called twice.  `failed` is for W&B, which marks the run so."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
        self._file = self._tensorboard = self._wandb = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


def _numbers(record: Record) -> dict[str, float]:
    """What TensorBoard and W&B show of a record."""
    numbers = {}
    for name, value in record.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and name != "step":
            numbers[name] = value
    return numbers


def expect_loggers(tensorboard: bool | str = "auto", wandb: str | None = None) -> None:
    """For a command line to call before ranks start.

    Raises:
        ValueError: what is asked for is not installed, or makes no sense."""
    if tensorboard not in (True, False, "auto"):
        raise ValueError(f"tensorboard={tensorboard!r} must be True, False or 'auto'.")
    if tensorboard is True and not _installed("tensorboard"):
        raise ValueError(
            "tensorboard=True, but TensorBoard is not installed: pip install tensorboard, or leave "
            "it at 'auto'."
        )
    if wandb == "":
        raise ValueError("wandb='' must name a W&B project, or be None.")
    if wandb is not None and not _installed("wandb"):
        raise ValueError(
            f"wandb={wandb!r}, but W&B is not installed: pip install wandb, or leave it out."
        )


def read_metrics(folder: "str | Path") -> list[Record]:
    """The records of folder/metrics.jsonl, oldest first, less a last line that was cut short.

    Raises:
        ValueError: there is no such file, or a line other than the last is broken; names it."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} holds no metrics.jsonl; name the folder that a trainer wrote.")
    records = []
    lines = path.read_bytes().split(b"\n")  # the last one: nothing, or what was cut short
    for number, line in enumerate(lines, 1):
        record = _parse_record(line)
        if record is None:
            if any(lines[number:]):
                raise ValueError(
                    f"{path} line {number} is no record of a step; mend or remove the line."
                )
            break
        records.append(record)
    return records


def _parse_record(line: bytes) -> Record | None:
    """The record in a line; None if there is no whole one."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def write_header(folder: Path, header: dict[str, Any], *, start_step: int = 0) -> None:
    """Puts what is being run into folder/run.json, at once or not at all.

    The file is {"sessions": [the first start, each resumption]}.  A session is `header`
    (configuration, launch, data, ...; "loss_unit" labels the axis of ``apps.common.plot``) with
    "started", "start_step" and "versions".  start_step=0 begins a new list.

    Raises:
        ValueError: run.json is there but holds no sessions."""
    _expect_start(start_step)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "start_step": start_step,
        "versions": versions(),
        **header,
    }
    before = read_sessions(folder) if start_step > 0 else []
    write_text(
        folder / "run.json",
        json.dumps({"sessions": [*before, session]}, indent=1) + "\n",
        replace=True,
    )


def read_sessions(folder: "str | Path") -> list[dict[str, Any]]:
    """The sessions in folder/run.json, oldest first; none where there is no such file.

    Raises:
        ValueError: the file is broken."""
    path = Path(folder) / "run.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["sessions"])
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} holds no sessions of a run; mend or remove it.") from None


def versions() -> dict[str, str]:
    """What a reader needs to know to repeat a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ringx": ringx.__version__,
        "platform": platform.platform(),
        "command": " ".join(sys.argv),
    }


def _expect_start(start_step: int) -> None:
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must be at least 0.")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _keep_before(folder: Path, step: int) -> None:
    """Leaves the records before `step` in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    # A new run need not understand the records of an older one.
    records = read_metrics(folder) if step > 0 else []
    kept = "".join(json.dumps(record) + "\n" for record in records if record["step"] < step)
    if kept.encode() != path.read_bytes():
        write_text(path, kept, replace=True)


def _start_tensorboard(folder: Path, config: dict[str, Any] | None, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step, flush_secs=10)
    if config:
        text = json.dumps(config, indent=1, default=str)
        writer.add_text("config", f"```\n{text}\n```", start_step)
    return writer


def _start_wandb(folder: Path, project: str, config: dict[str, Any] | None, resumed: bool) -> Any:
    import wandb

    id_file = folder / "wandb.id"
    if not (resumed and id_file.exists()):
        write_text(id_file, uuid.uuid4().hex[:12] + "\n", replace=True)
    identity = id_file.read_text(encoding="utf-8").strip()
    return wandb.init(
        project=project,
        name=folder.resolve().name,
        dir=str(folder),
        config=config or {},
        id=identity,
        resume="allow",
    )


# ---- what a person sees


@contextlib.contextmanager
def progress(
    total: int, first: int, title: str, *, is_main_rank: bool = True
) -> Iterator[Callable[[Record], None]]:
    """What to call with each step's record.

    At a terminal it shows a bar with loss, tokens/s and the time left.  Elsewhere it prints a line
    for each of the first 20 steps, then at most one in 10 s, and always for the last step and for a
    validation.  Nothing where not `is_main_rank`.

    Args:
        total: the run's steps.
        first: steps that were done before (of a resumed run).
        title: names the run."""
    if not is_main_rank:
        yield lambda record: None
    elif sys.stdout.isatty():
        with _bar(total, first, title) as show:
            yield show
    else:
        with _lines() as show:
            yield show


@contextlib.contextmanager
def _bar(total: int, first: int, title: str) -> Iterator[Callable[[Record], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    numbers = (TextColumn("{task.fields[numbers]}"), TextColumn("left"), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *numbers
    ) as bar:
        task = bar.add_task(title, total=total, completed=first, numbers="")

        def show(record: Record) -> None:
            validation = f"  val {record['val_loss']:.4f}" if "val_loss" in record else ""
            numbers = (
                f"loss {record['loss']:.4f}{validation}  {record['tokens_per_s']:,.0f} tokens/s"
            )
            bar.update(task, completed=record["step"] + 1, numbers=numbers)

        yield show


@contextlib.contextmanager
def _lines() -> Iterator[Callable[[Record], None]]:
    shown = 0  # lines
    last = monotonic()  # when the last one was printed
    waiting: Record | None = None  # the newest record that has no line

    def show(record: Record) -> None:
        nonlocal shown, last, waiting
        if shown < SHOWN or "val_loss" in record or monotonic() - last >= PAUSE:
            print(_line(record), flush=True)
            shown += 1
            last = monotonic()
            waiting = None
        else:
            waiting = record

    try:
        yield show
    finally:
        if waiting is not None:
            print(_line(waiting), flush=True)


def _line(record: Record) -> str:
    parts = [f"step {record['step']:4d}", f"loss {record['loss']:.6f}"]
    for name, text in (
        ("val_loss", "val loss {:.6f}"),
        ("grad_norm", "grad norm {:.4f}"),
        ("lr", "lr {:.2e}"),
    ):
        if name in record:
            parts.append(text.format(record[name]))
    return "  ".join([*parts, f"{record['tokens_per_s']:,.0f} tokens/s"])
