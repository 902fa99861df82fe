"""The record of one measured case: its schema, and how it is written, checked and read.

One JSON file per case, named after the case, holds the numbers and everything needed to repeat
them.  FIELDS is the schema of either kind of record: ``validate`` checks a record against it,
readers (``ringx collect``, ``ringx plot``) take no other files, and the columns of their tables
follow from it.

How a case of kind "attention" is measured (``ringx bench``)
    Warm-up passes, then repetitions.  In each repetition the baseline and then every algorithm of
    the same size run once, so that a ratio compares what ran side by side.  Before each timed pass
    all ranks wait for each other at a barrier; forward and backward then run back to back, as in
    training.  The slowest rank counts: `forward` is the longest time from start to the end of the
    forward pass, `total` the longest to the end of the backward pass, `backward` their difference.
    On CUDA and ROCm times are differences of events on the current stream.

What the derived numbers mean
    baseline    the same local kernel over the whole sequence in one process (rank 0), called
                directly; the others wait
    workers     what computes: threads on a CPU (ranks x threads), devices on GPUs (one a rank)
    efficiency  percent of the theoretical one-process flash / N, of medians:
                100 x baseline seconds x baseline workers / (workers x seconds).  On GPUs:
                100 x t_full / (N x t).  On CPUs with one thread a rank and a baseline of T threads:
                100 x t_full x T / (N x t).  Where more threads than cores run (`oversubscribed`),
                100 is out of reach.
    TFLOP/s     "causal work counted as done": forward 4 B H D pairs, backward 2.5 times that, with
                pairs = S (S + 1) / 2 under the causal mask and S^2 without; divided by N and the
                seconds
    tokens/s    B S / total seconds: all ranks together, forward and backward
    bytes       that a rank sends, mean over ranks, as defined in ``ringx.comm``: counted during a
                warm-up pass, and in closed form
    wire        bytes that really left the hosts, per rank, each repetition's forward and backward
                together: ``ringx.measure.wire``
    peak        most bytes a rank held at once above what it held before the pass (its inputs),
                forward and backward, largest of all ranks, in a warm-up pass
"""

import json
import math
import os
import statistics
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import files
from . import provenance

SCHEMA = 2
DERIVED_FILES = ("machine.json", "environment.json")  # files beside records that are made from them
DIRECTIONS = ("forward", "backward")
PHASES = (*DIRECTIONS, "total")
STATS = ("median", "min", "q1", "q3", "raw")  # raw: one value per repetition, in order

Record = dict[str, Any]
Row = dict[str, Any]

# ---- the schema: what a record holds, and which columns of a flat row follow from it


@dataclass(frozen=True)
class Field:
    """An entry of a record, and the column that shows it."""

    path: str  # from the top of the record, with dots
    types: Any  # the type that its value must have, or a tuple of types
    meaning: str
    column: str | None = None  # None: no column of its own


@dataclass(frozen=True)
class Computed:
    """Columns that follow from entries of the record."""

    columns: Callable[[Record], Row]
    meaning: str


@dataclass(frozen=True)
class Given:
    """Columns that follow from more than the record: ``flat_rows`` is given them by `name`."""

    name: str
    meaning: str


Entry = Field | Computed | Given


def seqlen_per_rank(record: Record) -> Row:
    return {"seqlen_per_rank": record["case"]["seqlen"] // record["case"]["world"]}


def processors(record: Record) -> Row:
    return {"machine": record["machine"]["cpu"], "device": record["machine"]["device"]}


def host_count(record: Record) -> Row:
    return {"hosts": len(record["machine"]["hosts"])}


def labels_as_text(record: Record) -> Row:
    labels = sorted(record["labels"].items())
    return {"labels": " ".join(f"{name}={text}" for name, text in labels)}


def ranks_and_device(record: Record) -> Row:
    return {
        "ranks_per_host": record["launch"]["local_world"],
        "device": record["machine"]["device"],
    }


def times_and_rates(record: Record) -> Row:
    row: Row = {}
    for phase in PHASES:
        seconds = record["seconds"][phase]
        row[f"{phase}_s"] = seconds["median"]
        for statistic in ("min", "q1", "q3"):
            row[f"{phase}_{statistic}_s"] = seconds[statistic]
        row[f"{phase}_ideal_s"] = _ideal_seconds(record, phase)
        efficiency = record["efficiency_percent"]
        row[f"{phase}_efficiency_percent"] = efficiency[phase] if efficiency else None
        row[f"{phase}_tflops_per_rank"] = record["tflops_per_rank"][phase]
    return row


def _ideal_seconds(record: Record, phase: str) -> float | None:
    """What the baseline would take on as many workers as the ranks had; None without a baseline."""
    baseline = record["baseline"]
    if not baseline:
        return None
    return baseline["seconds"][phase]["median"] * baseline["workers"] / record["workers"]


def raw_times(record: Record) -> Row:
    raw = record["seconds"]["total"]["raw"]
    return {"total_raw_s": " ".join(f"{seconds:.6g}" for seconds in raw)}


def bytes_sent(record: Record) -> Row:
    row: Row = {}
    for direction in DIRECTIONS:
        sent = record["bytes"][direction]
        row[f"{direction}_bytes"] = sent["counted"]
        row[f"{direction}_bytes_closed_form"] = sent["closed_form"]
    return row


def wire_bytes(record: Record) -> Row:
    return {"wire_bytes": record["wire"]["median"] if record["wire"] else None}


def label_columns(record: Record) -> Row:
    return {f"label_{name}": text for name, text in sorted(record["labels"].items())}


def commit(record: Record) -> Row:
    git = record["git"] or {}
    return {"commit": git.get("commit"), "dirty": git.get("dirty")}


def slurm_job(record: Record) -> Row:
    job = record["launch"]["job"] or {}
    return {
        "site": job.get("site"),
        "job": job.get("id"),
        "array_task": job.get("array_task"),
        "restart": job.get("restart"),
    }


_number = (int, float)
_null = type(None)
COMMON: tuple[Entry, ...] = (
    Field("schema", int, "version of this schema"),
    Field("kind", str, "what was measured: attention or collective"),
    Field("id", str, "name of the case, and of its file", column="id"),
    Field("date", str, "when it was written, UTC, ISO 8601", column="date"),
    Given("source", "source: the name of the file that the record was read from"),
    Field("labels", dict, "what --label said of this run: {name: text}"),
    Computed(label_columns, "label_NAME: the text of each label"),
    Field("command.argv", list, "the command line"),
    Field("command.options", dict, "all its options, defaults included"),
    Field("versions.ringx", str, "", column="ringx"),
    Field("versions.torch", str, "", column="torch"),
    Field("versions.python", str, ""),
    Field(
        "versions.accelerator",
        (str, _null),
        "CUDA or ROCm release that torch was built for",
    ),
    Field("versions.packages", dict, "installed packages that can matter: kernels, MPI"),
    Field(
        "git",
        (dict, _null),
        "commit, and dirty: uncommitted changes in the package; null outside a checkout",
    ),
    Computed(commit, "commit, dirty: of the checkout"),
    Field("machine.hosts", list, "distinct host names of the ranks"),
    Field("machine.platform", str, "operating system"),
    Field("machine.cpu", str, "model"),
    Field("machine.cores", int, "cores that the ranks of rank 0's host may use"),
    Field("machine.device", str, "cpu, or the name of the GPU"),
    Field(
        "machine.load_average",
        (list, _null),
        "1, 5 and 15 minutes on rank 0's host before the first repetition",
    ),
    Field("launch.launcher", str, "what started the ranks", column="launcher"),
    Field("launch.backend", str, "of torch.distributed", column="backend"),
    Field("launch.local_world", int, "ranks on rank 0's host"),
    Field("launch.environment", dict, "variables of rank 0 that tune threads and communication"),
    Field(
        "launch.job",
        (dict, _null),
        "Slurm's id, array_task, restart, nodes, partition, cluster, site file; null outside",
    ),
    Computed(slurm_job, "site, job, array_task, restart: of the Slurm job"),
)
ATTENTION: tuple[Entry, ...] = (
    Field("case.algorithm", str, "name in ringx.algorithms()", column="algorithm"),
    Field("case.layout", str, "zigzag, contiguous or striped", column="layout"),
    Field(
        "case.overlap",
        bool,
        "the next collective is posted before the current block is computed",
        column="overlap",
    ),
    Field("case.mask", str, "causal or full", column="mask"),
    Field("case.world", int, "N, number of ranks", column="world"),
    Field("case.seqlen", int, "S, tokens of the whole sequence", column="seqlen"),
    Computed(seqlen_per_rank, "seqlen_per_rank: S / N"),
    Field("oversubscribed", bool, "more threads than cores", column="oversubscribed"),
    Computed(processors, "machine: the CPU's model; device: cpu, or the name of the GPU"),
    Field("case.dtype", str, "bf16, fp16, fp32 or fp64", column="dtype"),
    Field("kernel", str, "the kernel that ran", column="kernel"),
    Field("case.batch", int, "B", column="batch"),
    Field("case.heads", int, "H, query heads", column="heads"),
    Field("case.kv_heads", int, "Hkv, key/value heads", column="kv_heads"),
    Field("case.head_dim", int, "D", column="head_dim"),
    Field("case.threads", int, "CPU threads of a rank", column="threads"),
    Computed(host_count, "hosts: how many the ranks are on"),
    Field("case.reps", int, "timed repetitions", column="reps"),
    Computed(labels_as_text, "labels: all labels, NAME=TEXT"),
    Field("case.kernel", str, "the kernel that was asked for"),
    Field(
        "case.baseline_threads",
        (int, _null),
        "CPU threads asked for the baseline; null: as many as all ranks have, at most the cores",
    ),
    Field("case.baseline", bool, "whether the baseline was to be measured"),
    Field("case.warmup", int, "passes before the timed ones"),
    Field("workers", int, "threads (CPU) or devices (GPU) that computed"),
    Field("seconds", dict, "forward, backward, total: see STATS"),
    Field(
        "baseline",
        (dict, _null),
        "kernel, workers, seconds {forward, backward, total}; null where it was not measured",
    ),
    Field("baseline_missing", (str, _null), "why there is no baseline"),
    Field("efficiency_percent", (dict, _null), "forward, backward, total"),
    Field("tflops_per_rank", dict, "forward, backward, total"),
    Computed(
        times_and_rates,
        "of each phase PHASE_s (the median), PHASE_min_s, PHASE_q1_s, PHASE_q3_s, PHASE_ideal_s"
        " (one-process flash / N), PHASE_efficiency_percent, PHASE_tflops_per_rank",
    ),
    Computed(raw_times, "total_raw_s: the seconds of each repetition"),
    Field("tokens_per_second", _number, "B S / total", column="tokens_per_second"),
    Field("flops_rule", str, "how floating-point operations are counted"),
    Field(
        "bytes.forward",
        dict,
        "counted, closed_form, collectives {name: counted}, messages {name: how many}; means over"
        " ranks",
    ),
    Field("bytes.backward", dict, "likewise"),
    Computed(bytes_sent, "DIRECTION_bytes (counted), DIRECTION_bytes_closed_form"),
    Given("sent", "COLLECTIVE_bytes: counted, forward and backward"),
    Field(
        "wire",
        (dict, _null),
        "median, raw: one value per repetition; interface, hosts; null where nothing could be"
        " counted",
    ),
    Computed(wire_bytes, "wire_bytes: the median"),
    Field("wire_missing", (str, _null), "why there is no count"),
    Field("memory.peak_bytes", (int, _null), "see above", column="peak_bytes"),
    Field("memory.how", str, "how the peak was found"),
    Given(
        "expected",
        "wire_expected_bytes, unhidden_s: what the collectives, measured on as many ranks under"
        " the same labels, make of the bytes sent",
    ),
)
COLLECTIVE: tuple[Entry, ...] = (
    Field(
        "case.collective",
        str,
        "name in ringx.comm.collectives.BENCHMARKS",
        column="collective",
    ),
    Field("case.world", int, "N, number of ranks", column="world"),
    Field("case.hosts", int, "that the ranks are on", column="hosts"),
    Field("case.dtype", str, "of the elements", column="dtype"),
    Field(
        "case.warmup",
        int,
        "passes before the timed ones of each size; the first checks the result",
        column="warmup",
    ),
    Field("case.reps", int, "timed repetitions of each size, at most", column="reps"),
    Given("fit", "fit_alpha_s, fit_beta_s_per_byte: see ``machine``"),
    Computed(ranks_and_device, "ranks_per_host; device: cpu, or the name of the GPU"),
    Computed(labels_as_text, "labels: all labels, NAME=TEXT"),
    Field("sizes", list, "one entry a size, in rising order: see SIZE"),
    Field("ended", (str, _null), "why larger sizes were left out; null if none were"),
    Field("wire_missing", (str, _null), "why no wire bytes were counted"),
)
SIZE = (  # of each entry of "sizes" of a collective; times in seconds, the slowest rank's
    Field("bytes", int, "the size as nccl-tests defines it", column="bytes"),
    Field("reps", int, "timed repetitions; the column holds these", column="reps"),
    Field(
        "mean",
        _number,
        "what nccl-tests prints as time, and what algbw and busbw follow from",
        column="mean_s",
    ),
    Field("min", _number, "", column="min_s"),
    Field("median", _number, "", column="median_s"),
    Field("p99", _number, "", column="p99_s"),
    Field("algbw", _number, "bytes / mean, in B/s", column="algbw_bytes_per_s"),
    Field("busbw", _number, "algbw x the collective's bus factor", column="busbw_bytes_per_s"),
    Field(
        "wrong",
        int,
        "elements of all ranks' results that were not as they should be",
        column="wrong",
    ),
    Field(
        "wire_factor",
        (*_number, _null),
        "bytes that left the hosts / what an optimal implementation would send",
        column="wire_factor",
    ),
)
OF_KIND = {"attention": ATTENTION, "collective": COLLECTIVE}
FIELDS = {
    kind: tuple(entry for entry in COMMON + entries if isinstance(entry, Field))
    for kind, entries in OF_KIND.items()
}

# Columns that say what was measured, and those that say under which conditions: rows that differ
# in one of the latter are not compared in one figure.
CASE_COLUMNS = (
    "algorithm",
    "layout",
    "overlap",
    "mask",
    "world",
    "seqlen",
    "seqlen_per_rank",
    "oversubscribed",
)
SETTING_COLUMNS = {
    "attention": (
        "machine",
        "device",
        "dtype",
        "kernel",
        "batch",
        "heads",
        "kv_heads",
        "head_dim",
        "threads",
        "labels",
    ),
    "collective": ("device", "backend", "dtype", "ranks_per_host", "labels"),
}


def flat_rows(record: Record, given: Mapping[str, Row]) -> list[Row]:
    """The flat rows of a record: one of attention, one for each size of a collective.

    given: the columns of each ``Given`` of its kind, by name."""
    of_kind = _columns(record, OF_KIND[record["kind"]], given)
    common = _columns(record, COMMON, given)
    if record["kind"] == "attention":
        return [{**of_kind, **common}]
    return [{**of_kind, **_columns(size, SIZE, given), **common} for size in record["sizes"]]


def _columns(record: Record, entries: Sequence[Entry], given: Mapping[str, Row]) -> Row:
    row: Row = {}
    for entry in entries:
        if isinstance(entry, Computed):
            row.update(entry.columns(record))
        elif isinstance(entry, Given):
            row.update(given[entry.name])
        elif entry.column is not None:
            row[entry.column] = _value(record, entry.path)
    return row


_missing: Any = object()


def _value(record: Any, path: str) -> Any:
    """What a record holds at a dotted path; _missing if nothing."""
    value = record
    for key in path.split("."):
        value = value.get(key, _missing) if isinstance(value, dict) else _missing
    return value


# ---- making and checking records


def new_record(kind: str, case: Any, measured: Record, run: Record) -> Record:
    """A record of kind "attention" or "collective" that is complete, and not checked yet.

    case: a dataclass with an `id`; measured: the entries that this case has to itself; run: those
    that all cases of the run share (``provenance.of_run``)."""
    identity = {"date": provenance.now(), "id": case.id}
    if kind == "collective":  # in files of collectives the id has always come first
        identity = {"id": case.id, "date": identity["date"]}
    return {
        "schema": SCHEMA,
        "kind": kind,
        **identity,
        "case": asdict(case),
        **measured,
        **run,
    }


def stats(raw: Sequence[float]) -> dict[str, Any]:
    """Median and spread of the repetitions, all values kept."""
    if len(raw) > 1:
        q1, median, q3 = statistics.quantiles(raw, n=4, method="inclusive")
    else:
        q1 = median = q3 = raw[0]
    return {"median": median, "min": min(raw), "q1": q1, "q3": q3, "raw": list(raw)}


def validate(record: Any) -> Record:
    """The record itself if it follows the schema; otherwise a ValueError that names every fault."""
    content = record if isinstance(record, dict) else {}
    version, kind = content.get("schema"), content.get("kind")
    if version != SCHEMA or kind not in FIELDS:
        raise ValueError(
            f"not a record of schema {SCHEMA} of a kind that is known"
            f" (schema: {version!r}, kind: {kind!r})"
        )
    faults = []
    for field in FIELDS[kind]:
        value = _value(record, field.path)
        if value is _missing:
            faults.append(f"{field.path} is missing")
        elif not _has_type(value, field.types):
            faults.append(f"{field.path}={value!r} has the wrong type")
    if not faults:
        check = _attention_faults if kind == "attention" else _size_faults
        faults = list(check(record))
    if faults:
        raise ValueError("; ".join(faults))
    return record


def _has_type(value: object, types: Any) -> bool:
    """isinstance, but a bool is no number."""
    if isinstance(value, bool) and types is not bool:
        return False
    return isinstance(value, types)


def _attention_faults(record: Record) -> Iterator[str]:
    """Faults among the values of a record of attention that are computed from each other."""
    reps = record["case"]["reps"]
    yield from _time_faults("seconds", record["seconds"], reps)
    if record["baseline"] is not None:
        yield from _time_faults("baseline.seconds", record["baseline"].get("seconds"), reps)
    yield from _rate_faults("tflops_per_rank", record["tflops_per_rank"])
    if record["efficiency_percent"] is not None:
        yield from _rate_faults("efficiency_percent", record["efficiency_percent"])
    for direction in DIRECTIONS:
        yield from _byte_faults(f"bytes.{direction}", record["bytes"][direction])
    if record["wire"] is not None and len(record["wire"].get("raw", ())) != reps:
        yield f"wire.raw does not hold {reps} repetitions"


def _time_faults(path: str, seconds: Any, reps: int) -> Iterator[str]:
    phases = seconds if isinstance(seconds, dict) else {}
    for phase in PHASES:
        fault = _fault_of_statistics(f"{path}.{phase}", phases.get(phase), reps)
        if fault is not None:
            yield fault


def _fault_of_statistics(path: str, statistics_of_phase: Any, reps: int) -> str | None:
    """What is wrong with the times of one phase; None if nothing is."""
    if not isinstance(statistics_of_phase, dict) or not statistics_of_phase.keys() >= set(STATS):
        return f"{path} does not hold {', '.join(STATS)}"
    raw = statistics_of_phase["raw"]
    if not isinstance(raw, list) or len(raw) != reps:
        return f"{path}.raw does not hold {reps} repetitions"
    if not all(_positive(seconds) for seconds in raw):
        return f"{path}.raw holds something other than positive numbers"
    if statistics_of_phase != stats(raw):
        return f"{path} is not the summary of its raw values"
    return None


def _rate_faults(path: str, rates: Record) -> Iterator[str]:
    for phase in PHASES:
        if not _positive(rates.get(phase)):
            yield f"{path}.{phase}={rates.get(phase)!r} is no positive number"


def _byte_faults(path: str, sent: Record) -> Iterator[str]:
    for key in ("collectives", "messages"):
        if not isinstance(sent.get(key), dict):
            yield f"{path}.{key} is missing"
    for key in ("counted", "closed_form"):
        value: Any = sent.get(key)
        if not _has_type(value, _number) or value < 0:
            yield f"{path}.{key}={value!r} is no number of bytes"


def _size_faults(record: Record) -> Iterator[str]:
    """Faults among the sizes of a collective."""
    for i, size in enumerate(record["sizes"]):
        wrong_field = _field_of_wrong_type(size)
        if wrong_field is not None:
            yield f"sizes[{i}].{wrong_field} is missing or has the wrong type"
        elif not all(_positive(size[key]) for key in _POSITIVE_OF_SIZE):
            yield f"sizes[{i}] holds something other than positive numbers"
        elif not size["min"] <= size["median"] <= size["p99"]:
            yield f"sizes[{i}]: min, median and p99 do not rise"
    if not record["sizes"]:
        yield "sizes is empty"


_POSITIVE_OF_SIZE = ("bytes", "reps", "mean", "min", "median", "p99", "algbw", "busbw")


def _field_of_wrong_type(size: object) -> str | None:
    """The first entry of a size that is missing or has the wrong type."""
    for field in SIZE:
        if not _has_type(_value(size, field.path), field.types):
            return field.path
    return None


def _positive(value: Any) -> bool:
    return _has_type(value, _number) and math.isfinite(value) and value > 0


# ---- files


def path_of(directory: Path, case_id: str) -> Path:
    """The file of a case."""
    return Path(directory) / f"{case_id}.json"


def write(directory: Path, record: Record) -> Path:
    """Checks the record and puts its file in place at once: no reader ever sees half of it.

    Raises:
        ValueError: the record does not follow the schema.
        FileExistsError: the case has a record already.  It stays: a rank that was cut off from its
            job, and is still at work while the restarted job has measured the case, changes
            nothing."""
    validate(record)
    path = path_of(directory, record["id"])
    files.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n", replace=False)
    return path


def expect_room(directory: Path, size: int) -> None:
    """Makes the folder, and has it hold `size` bytes for a moment.

    Raises:
        OSError: it cannot be made or written to, or has no room; names the folder and why."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".room.{uuid.uuid4().hex}"
        try:
            with open(probe, "xb") as file:
                file.write(b"x" * size)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{directory} cannot take the results ({size} bytes): {error.strerror};"
            " pass another --out",
        ) from None


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        ValueError: it is broken, or holds another case than its name says; names the file.
        OSError: it cannot be read."""
    try:
        record = validate(_from_schema_1(json.loads(Path(path).read_text(encoding="utf-8"))))
    except ValueError as error:  # json's and unicode's errors are ValueErrors too
        raise ValueError(f"{path}: {error}") from error
    if path_of(Path(path).parent, record["id"]) != Path(path):
        raise ValueError(f"{path}: holds the case {record['id']}")
    return record


def _from_schema_1(record: Any) -> Any:
    """A record of schema 1 as one of SCHEMA; any other as it is.

    Schema 1 had no labels, numbers of messages, wire bytes and jobs."""
    if not isinstance(record, dict) or record.get("schema") != 1:
        return record
    if not isinstance(record.get("launch"), dict) or not isinstance(record.get("bytes"), dict):
        return record
    upgraded = dict(record)
    upgraded["schema"] = SCHEMA
    upgraded["kind"] = "attention"
    upgraded["labels"] = {}
    upgraded["wire"] = None
    upgraded["wire_missing"] = "not counted before schema 2"
    upgraded["bytes"] = {
        direction: {**sent, "messages": {}} for direction, sent in record["bytes"].items()
    }
    upgraded["launch"] = {**record["launch"], "job": None}
    return upgraded


def read_all(directory: Path) -> tuple[list[Record], list[str]]:
    """(records of a directory, what is wrong with each file that is none)."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory; `ringx bench --out {directory}` writes records there."
        )
    valid, broken = [], []
    for path in sorted(directory.glob("*.json")):
        if path.name in DERIVED_FILES:
            continue
        try:
            valid.append(read(path))
        except (ValueError, OSError) as error:
            broken.append(str(error))
    return valid, broken
