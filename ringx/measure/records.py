"""The record of one measured case: its schema, and how it is written, checked and read.

One JSON file per case, named after the case, holds the numbers and everything needed to repeat them.  FIELDS is the schema of
either kind: ``validate`` checks a record against it, and readers (``ringx collect``, ``ringx plot``) take no other files.

How a case of kind "attention" is measured (``ringx bench``)
    Warm-up passes, then repetitions.  In each repetition the baseline and then every algorithm of the same size run once, so
    that a ratio compares what ran side by side.  Before each timed pass all ranks meet in a barrier; forward and backward then
    run back to back, as in training.  The slowest rank counts: `forward` is the longest time from start to the end of the
    forward pass, `total` the longest to the end of the backward pass, `backward` their difference.  On CUDA and ROCm times are
    differences of events on the current stream.

What the derived numbers mean
    baseline    the same local kernel over the whole sequence in one process (rank 0), called directly; the others wait
    workers     what computes: threads on a CPU (ranks x threads), devices on GPUs (one a rank)
    efficiency  percent of the theoretical one-process flash / N, of medians:
                100 x baseline seconds x baseline workers / (workers x seconds).  On GPUs: 100 x t_full / (N x t).  On CPUs with
                one thread a rank and a baseline of T threads: 100 x t_full x T / (N x t).  Where more threads than cores run
                (`oversubscribed`), 100 is out of reach.
    TFLOP/s     "causal work counted as done": forward 4 B H D pairs, backward 2.5 times that, with pairs = S (S + 1) / 2
                under the causal mask and S^2 without; divided by N and the seconds
    tokens/s    B S / total seconds: all ranks together, forward and backward
    bytes       that a rank sends, mean over ranks, as defined in ``ringx.comm``: counted during a warm-up pass, and in closed form
    wire        bytes that really left the hosts, per rank, each repetition's forward and backward together: `ringx.measure.wire`
    peak        most bytes a rank held at once above what it held before the pass (its inputs), forward and backward, largest of
                all ranks, in a warm-up pass
"""

import json
import math
import os
import statistics
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..comm.collectives import COLLECTIVES

SCHEMA = 2
DERIVED = ("machine.json", "environment.json")  # files beside records that are made from them
PHASES = ("forward", "backward", "total")

_number = (int, float)
_null = type(None)
_COMMON: dict[str, tuple[Any, str]] = {  # dotted path -> (type or types, meaning)
    "schema": (int, "version of this schema"),
    "kind": (str, "what was measured: attention or collective"),
    "id": (str, "name of the case, and of its file"),
    "date": (str, "when it was written, UTC, ISO 8601"),
    "labels": (dict, "what --label said of this run: {name: text}"),
    "command.argv": (list, "the command line"),
    "command.options": (dict, "all its options, defaults included"),
    "versions.ringx": (str, ""),
    "versions.torch": (str, ""),
    "versions.python": (str, ""),
    "versions.accelerator": ((str, _null), "CUDA or ROCm release that torch was built for"),
    "versions.packages": (dict, "installed packages that can matter: kernels, MPI"),
    "git": (
        (dict, _null),
        "commit, and dirty: uncommitted changes in the package; null outside a checkout",
    ),
    "machine.hosts": (list, "distinct host names of the ranks"),
    "machine.platform": (str, "operating system"),
    "machine.cpu": (str, "model"),
    "machine.cores": (int, "cores that the ranks of rank 0's host may use"),
    "machine.device": (str, "cpu, or the name of the GPU"),
    "machine.load_average": (
        (list, _null),
        "1, 5 and 15 minutes on rank 0's host before the first repetition",
    ),
    "launch.launcher": (str, "what started the ranks"),
    "launch.backend": (str, "of torch.distributed"),
    "launch.local_world": (int, "ranks on rank 0's host"),
    "launch.environment": (dict, "variables of rank 0 that tune threads and communication"),
    "launch.job": (
        (dict, _null),
        "Slurm's id, array_task, restart, nodes, partition, cluster, site file; null outside",
    ),
}
_ATTENTION: dict[str, tuple[Any, str]] = {
    "case.algorithm": (str, "name in ringx.algorithms()"),
    "case.layout": (str, "zigzag, contiguous or striped"),
    "case.mask": (str, "causal or full"),
    "case.dtype": (str, "bf16, fp16, fp32 or fp64"),
    "case.world": (int, "N, number of ranks"),
    "case.seqlen": (int, "S, tokens of the whole sequence"),
    "case.batch": (int, "B"),
    "case.heads": (int, "H, query heads"),
    "case.kv_heads": (int, "Hkv, key/value heads"),
    "case.head_dim": (int, "D"),
    "case.kernel": (str, "the kernel that was asked for"),
    "case.overlap": (bool, "the next collective is posted before the current block is computed"),
    "case.threads": (int, "CPU threads of a rank"),
    "case.baseline_threads": (
        (int, _null),
        "CPU threads asked for the baseline; null: as many as all ranks have, at most the cores",
    ),
    "case.baseline": (bool, "whether the baseline was to be measured"),
    "case.warmup": (int, "passes before the timed ones"),
    "case.reps": (int, "timed repetitions"),
    "kernel": (str, "the kernel that ran"),
    "workers": (int, "threads (CPU) or devices (GPU) that computed"),
    "oversubscribed": (bool, "more threads than cores"),
    "seconds": (dict, "forward, backward, total: see STATS"),
    "baseline": (
        (dict, _null),
        "kernel, workers, seconds {forward, backward, total}; null where it was not measured",
    ),
    "baseline_missing": ((str, _null), "why there is no baseline"),
    "efficiency_percent": ((dict, _null), "forward, backward, total"),
    "tokens_per_second": (_number, "B S / total"),
    "tflops_per_rank": (dict, "forward, backward, total"),
    "flops_rule": (str, "how floating-point operations are counted"),
    "bytes.forward": (
        dict,
        "counted, closed_form, collectives {name: counted}, messages {name: how many}; means over ranks",
    ),
    "bytes.backward": (dict, "likewise"),
    "wire": (
        (dict, _null),
        "median, raw: one value per repetition; interface, hosts; null where nothing could be counted",
    ),
    "wire_missing": ((str, _null), "why there is no count"),
    "memory.peak_bytes": ((int, _null), "see above"),
    "memory.how": (str, "how the peak was found"),
}
_COLLECTIVE: dict[str, tuple[Any, str]] = {
    "case.collective": (str, "name in ringx.comm.collectives.BENCHMARKS"),
    "case.world": (int, "N, number of ranks"),
    "case.hosts": (int, "that the ranks are on"),
    "case.dtype": (str, "of the elements"),
    "case.warmup": (int, "passes before the timed ones of each size; the first checks the result"),
    "case.reps": (int, "timed repetitions of each size, at most"),
    "sizes": (list, "one entry a size, in rising order: see SIZE"),
    "ended": ((str, _null), "why larger sizes were left out; null if none were"),
    "wire_missing": ((str, _null), "why no wire bytes were counted"),
}
FIELDS = {"attention": _COMMON | _ATTENTION, "collective": _COMMON | _COLLECTIVE}
SIZE: dict[
    str, tuple[Any, str]
] = {  # of each entry of "sizes" of a collective; times in seconds, the slowest rank's
    "bytes": (int, "the size as nccl-tests defines it"),
    "reps": (int, "timed repetitions"),
    "mean": (_number, "what nccl-tests prints as time, and what algbw and busbw follow from"),
    "min": (_number, ""),
    "median": (_number, ""),
    "p99": (_number, ""),
    "algbw": (_number, "bytes / mean, in B/s"),
    "busbw": (_number, "algbw x the collective's bus factor"),
    "wrong": (int, "elements of all ranks' results that were not as they should be"),
    "wire_factor": (
        (*_number, _null),
        "bytes that left the hosts / what an optimal implementation would send",
    ),
}
# Every table of attention has a column of the bytes sent by each of these, 0 where a record sent none; others have one where
# some record did.
ALWAYS_A_COLUMN = ("broadcast", "reduce", "all_reduce", "all_gather", "all_to_all")
STATS = ("median", "min", "q1", "q3", "raw")  # raw: one value per repetition, in order


def stats(raw: Sequence[float]) -> dict[str, Any]:
    """Median and spread of the repetitions, all values kept."""
    q1, median, q3 = (
        statistics.quantiles(raw, n=4, method="inclusive") if len(raw) > 1 else [*raw, *raw, *raw]
    )
    return {"median": median, "min": min(raw), "q1": q1, "q3": q3, "raw": list(raw)}


def validate(record: Any) -> dict[str, Any]:
    """The record itself if it follows the schema; otherwise a ValueError that names every fault."""
    if (
        not isinstance(record, dict)
        or record.get("schema") != SCHEMA
        or record.get("kind") not in FIELDS
    ):
        version, kind = (
            (record.get("schema"), record.get("kind")) if isinstance(record, dict) else (None, None)
        )
        raise ValueError(
            f"not a record of schema {SCHEMA} of a kind that is known (schema: {version!r}, kind: {kind!r})"
        )
    faults = []
    for path, (types, _) in FIELDS[record["kind"]].items():
        value = record
        for key in path.split("."):
            value = value.get(key, _missing) if isinstance(value, dict) else _missing
        if value is _missing:
            faults.append(f"{path} is missing")
        elif not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            faults.append(f"{path}={value!r} has the wrong type")
    if not faults:
        faults = list({"attention": _numbers, "collective": _sizes}[record["kind"]](record))
    if faults:
        raise ValueError("; ".join(faults))
    return record


_missing: Any = object()


def _numbers(record):
    """Faults among the values that are computed from each other."""
    for what, block in (
        ("seconds", record["seconds"]),
        ("baseline.seconds", (record["baseline"] or {}).get("seconds")),
    ):
        if what != "seconds" and record["baseline"] is None:
            continue
        for phase in PHASES:
            one = block.get(phase) if isinstance(block, dict) else None
            if not isinstance(one, dict) or any(key not in one for key in STATS):
                yield f"{what}.{phase} does not hold {', '.join(STATS)}"
            elif not isinstance(one["raw"], list) or len(one["raw"]) != record["case"]["reps"]:
                yield f"{what}.{phase}.raw does not hold {record['case']['reps']} repetitions"
            elif not all(_positive(x) for x in one["raw"]):
                yield f"{what}.{phase}.raw holds something other than positive numbers"
            elif one != stats(one["raw"]):
                yield f"{what}.{phase} is not the summary of its raw values"
    groups = {
        "tflops_per_rank": PHASES,
        "efficiency_percent": PHASES if record["efficiency_percent"] is not None else (),
    }
    for what, keys in groups.items():
        for key in keys:
            if not _positive(record[what].get(key)):
                yield f"{what}.{key}={record[what].get(key)!r} is no positive number"
    for direction in ("forward", "backward"):
        for key in ("collectives", "messages"):
            if not isinstance(record["bytes"][direction].get(key), dict):
                yield f"bytes.{direction}.{key} is missing"
        for key in ("counted", "closed_form"):
            value = record["bytes"][direction].get(key)
            if not isinstance(value, _number) or isinstance(value, bool) or value < 0:
                yield f"bytes.{direction}.{key}={value!r} is no number of bytes"
    if record["wire"] is not None and len(record["wire"].get("raw", ())) != record["case"]["reps"]:
        yield f"wire.raw does not hold {record['case']['reps']} repetitions"


def _sizes(record):
    """Faults among the sizes of a collective."""
    for i, one in enumerate(record["sizes"]):
        for key, (types, _) in SIZE.items():
            if (
                not isinstance(one, dict)
                or not isinstance(one.get(key, _missing), types)
                or isinstance(one[key], bool)
            ):
                yield f"sizes[{i}].{key} is missing or has the wrong type"
                break
        else:
            if not all(
                _positive(one[key])
                for key in ("bytes", "reps", "mean", "min", "median", "p99", "algbw", "busbw")
            ):
                yield f"sizes[{i}] holds something other than positive numbers"
            elif not one["min"] <= one["median"] <= one["p99"]:
                yield f"sizes[{i}]: min, median and p99 do not rise"
    if not record["sizes"]:
        yield "sizes is empty"


def _positive(x: object) -> bool:
    return isinstance(x, _number) and not isinstance(x, bool) and math.isfinite(x) and x > 0


def collectives_sent(found: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the collectives that have a column in a table of these records of attention: ALWAYS_A_COLUMN, and whatever
    else a record sent bytes by.  In the order of ``comm.collectives``, others behind."""
    sent: set[str] = set()
    for record in found:
        for direction in ("forward", "backward"):
            sent.update(record["bytes"][direction]["collectives"])
    known = [name for name in COLLECTIVES if name in sent or name in ALWAYS_A_COLUMN]
    return known + sorted(sent - COLLECTIVES.keys())


# ---- files


def path_of(directory: Path, case_id: str) -> Path:
    """The file of a case."""
    return Path(directory) / f"{case_id}.json"


def write(directory: Path, record: dict[str, Any]) -> Path:
    """Checks the record and puts its file in place at once: a reader or a crash never sees half of it.

    Raises:
        ValueError: the record does not follow the schema.
        FileExistsError: the case has a record already.  It stays: a rank that was cut off from its job, and is still at work
            while the restarted job has measured the case, changes nothing."""
    validate(record)
    path = path_of(directory, record["id"])
    files.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n", replace=False)
    return path


def expect_room(directory: Path, size: int) -> None:
    """Makes the folder, and has it hold `size` bytes for a moment.

    Raises:
        OSError: it cannot be made or written to, or has no room; names the folder and the reason."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".room.{uuid.uuid4().hex}"
        try:
            with open(probe, "xb") as f:
                f.write(b"x" * size)
                f.flush()
                os.fsync(f.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as e:
        raise OSError(
            e.errno,
            f"{directory} cannot take the results ({size} bytes): {e.strerror}; pass another --out",
        ) from None


def read(path: Path) -> dict[str, Any]:
    """The record in a file.  ValueError, naming the file, if it is broken."""
    try:
        record = validate(_from_schema_1(json.loads(Path(path).read_text(encoding="utf-8"))))
    except ValueError as e:  # json's and unicode's errors are ValueErrors too
        raise ValueError(f"{path}: {e}") from e
    if path_of(Path(path).parent, record["id"]) != Path(path):
        raise ValueError(f"{path}: holds the case {record['id']}")
    return record


def _from_schema_1(record: Any) -> Any:
    """Records of before labels, numbers of messages, wire bytes and jobs: they have none."""
    if (
        isinstance(record, dict)
        and record.get("schema") == 1
        and all(isinstance(record.get(k), dict) for k in ("launch", "bytes"))
    ):
        sent = {direction: {**of, "messages": {}} for direction, of in record["bytes"].items()}
        none: dict[str, Any] = {
            "labels": {},
            "wire": None,
            "wire_missing": "not counted before schema 2",
        }
        return {
            **record,
            "schema": SCHEMA,
            "kind": "attention",
            **none,
            "bytes": sent,
            "launch": {**record["launch"], "job": None},
        }
    return record


def read_all(directory: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(records of a directory, what is wrong with each file that is none)."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory; `ringx bench --out {directory}` writes records there."
        )
    good, broken = [], []
    for path in sorted(directory.glob("*.json")):
        if path.name in DERIVED:
            continue
        try:
            good.append(read(path))
        except (ValueError, OSError) as e:
            broken.append(str(e))
    return good, broken
