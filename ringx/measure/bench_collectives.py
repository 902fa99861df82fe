"""ringx bench-comm: what does each collective cost here, by size?  As nccl-tests measures it, on
any backend.

    ringx bench-comm --nproc 4 --out results/here
    srun -N8 --ntasks-per-node=8 python -m ringx bench-comm --out results/site
    ringx bench-comm --nproc 2 --collectives broadcast,ring --min-bytes 1K --max-bytes 16M \\
        --seconds 20 --out results/here

Sizes and bandwidths are those of nccl-tests (its doc/PERFORMANCE.md), with N ranks and S bytes:

    size     broadcast, reduce, all_reduce: the message.  all_gather: the result.  reduce_scatter,
             all_to_all: what each rank hands over.  ring: what each rank sends to the next
             (sendrecv)
    time     mean over the repetitions of the slowest rank, which begin together after a barrier;
             min, median and p99 beside it
    algbw    S / time
    busbw    algbw x (N-1)/N for all_gather, reduce_scatter, all_to_all; x 2 (N-1)/N for all_reduce;
             x 1 for the others: to be compared with the bandwidth of the links, whatever N
    wrong    elements that are not what they should be, in a first pass on numbers; the timed passes
             move zeros
    wire     bytes that left the hosts / what an optimal implementation would send (``ringx.comm``),
             where that can be counted

The largest size is bounded by half of the free memory and by --seconds for each collective.
DIR/machine.json holds a fit of time = alpha + beta S to each collective and number of ranks with a
record in DIR (``ringx.measure.machine``): it is what a planner reads.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from .. import launch
from ..checks import choices, integers
from ..comm.collectives import BENCHMARKS
from ..launch.stopping import Stopped, Watch
from . import machine, provenance, records, wire
from .benchmark import (
    RECORD_BYTES,
    add_run_options,
    exit_status,
    fault_message,
    first_stop_signal,
    options_of,
    parse_labels,
    remaining,
    run_until_stopped,
    world_of_launcher,
    write_record,
)

DTYPE, DTYPE_NAME = torch.float32, "fp32"
# Values of a checked pass repeat after so many elements, a prime: a shifted or swapped block shows.
PATTERN = 1021
LEAST_REPS = 3
BUFFERS = 4  # of the size: input, result, and what a backend adds

# ---- what is measured


# call() communicates and returns the result; expected() is what that must be if the input of rank r
# was ``_values(r, ..., checked=True)``, or None where it does not matter.
Prepared = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor | None]]
# The preparation of a collective on so many float32 elements (a multiple of the number of ranks; 4
# bytes each), for one rank: (rank, world_size, elements, device, checked) -> (call, expected).
Preparation = Callable[[int, int, int, torch.device, bool], Prepared]


def _values(rank: int, elements: int, device: torch.device, checked: bool) -> torch.Tensor:
    """What a rank contributes: small integers, so that sums are exact; or zeros."""
    if not checked:
        return torch.zeros(elements, dtype=DTYPE, device=device)
    return torch.arange(elements, device=device).remainder_(PATTERN).add_(rank + 1).to(DTYPE)


def _sum(world_size: int, elements: int, device: torch.device) -> torch.Tensor:
    total = torch.zeros(elements, dtype=DTYPE, device=device)
    for rank in range(world_size):
        total += _values(rank, elements, device, checked=True)
    return total


def _broadcast(
    rank: int, world_size: int, elements: int, device: torch.device, checked: bool
) -> Prepared:
    values = _values(rank, elements, device, checked)

    def call() -> torch.Tensor:
        dist.broadcast(values, 0)
        return values

    return call, lambda: _values(0, elements, device, checked=True)


def _reduce(
    rank: int, world_size: int, elements: int, device: torch.device, checked: bool
) -> Prepared:
    values = _values(rank, elements, device, checked)

    def call() -> torch.Tensor:
        dist.reduce(values, 0)
        return values

    return call, lambda: _sum(world_size, elements, device) if rank == 0 else None


def _all_reduce(
    rank: int, world_size: int, elements: int, device: torch.device, checked: bool
) -> Prepared:
    values = _values(rank, elements, device, checked)

    def call() -> torch.Tensor:
        dist.all_reduce(values)
        return values

    return call, lambda: _sum(world_size, elements, device)


def _all_gather(
    rank: int, world_size: int, elements: int, device: torch.device, checked: bool
) -> Prepared:
    sent = _values(rank, elements // world_size, device, checked)
    received = torch.zeros(elements, dtype=DTYPE, device=device)
    # renamed in torch 2.13
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

    def call() -> torch.Tensor:
        gather(received, sent)
        return received

    def expected() -> torch.Tensor:
        parts = [
            _values(peer, elements // world_size, device, checked=True)
            for peer in range(world_size)
        ]
        return torch.cat(parts)

    return call, expected


def _reduce_scatter(
    rank: int, world_size: int, elements: int, device: torch.device, checked: bool
) -> Prepared:
    sent = _values(rank, elements, device, checked)
    received = torch.zeros(elements // world_size, dtype=DTYPE, device=device)
    # renamed in torch 2.13
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

    def call() -> torch.Tensor:
        scatter(received, sent)
        return received

    return call, lambda: _sum(world_size, elements, device).chunk(world_size)[rank]


def _all_to_all(
    rank: int, world_size: int, elements: int, device: torch.device, checked: bool
) -> Prepared:
    sent = _values(rank, elements, device, checked)
    received = torch.zeros(elements, dtype=DTYPE, device=device)

    def call() -> torch.Tensor:
        dist.all_to_all_single(received, sent)
        return received

    def expected() -> torch.Tensor:
        inputs = [_values(peer, elements, device, checked=True) for peer in range(world_size)]
        return torch.cat([values.chunk(world_size)[rank] for values in inputs])

    return call, expected


def _ring(
    rank: int, world_size: int, elements: int, device: torch.device, checked: bool
) -> Prepared:
    sent = _values(rank, elements, device, checked)
    received = torch.zeros(elements, dtype=DTYPE, device=device)
    following, previous = (rank + 1) % world_size, (rank - 1) % world_size

    def call() -> torch.Tensor:
        send = dist.P2POp(dist.isend, sent, following)
        receive = dist.P2POp(dist.irecv, received, previous)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        return received

    return call, lambda: _values(previous, elements, device, checked=True)


# What is measured for each row of the table of collectives.
PREPARATIONS: dict[str, Preparation] = {
    "broadcast": _broadcast,
    "reduce": _reduce,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "ring": _ring,
}


@dataclass(frozen=True)
class CollectiveCase:
    """One record of a collective; what each entry means is in ``records.COLLECTIVE``."""

    collective: str
    world: int
    hosts: int
    dtype: str
    warmup: int
    reps: int

    @property
    def id(self) -> str:
        return f"collective_{self.collective}_{self.dtype}_n{self.world}_hosts{self.hosts}"


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the records"
    )
    parser.add_argument("--nproc", metavar="N,...", help="ranks (default: 2, or the launcher's)")
    add_matrix(parser)
    parser.add_argument(
        "--resume", action="store_true", help="skip collectives that DIR already holds"
    )


def add_matrix(parser: argparse._ActionsContainer) -> None:
    """What to measure and how, apart from ranks and files."""
    parser.add_argument(
        "--collectives",
        default="all",
        metavar="X,...",
        help=f"{', '.join(BENCHMARKS)} (default: all)",
    )
    parser.add_argument(
        "--min-bytes",
        default="1K",
        metavar="S",
        help="smallest size; K, M and G are powers of 1024 (default: 1K)",
    )
    parser.add_argument("--max-bytes", default="1G", metavar="S", help="largest size (default: 1G)")
    parser.add_argument(
        "--factor", type=int, default=4, help="from one size to the next (default: 4)"
    )
    parser.add_argument(
        "--also", default="", metavar="S,...", help="sizes besides, where a backend changes its way"
    )
    parser.add_argument(
        "--reps", type=int, default=20, help="timed repetitions of a size, at most (default: 20)"
    )
    parser.add_argument(
        "--warmup", type=int, default=2, help="passes before, of each size (default: 2)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="for each collective, about (default: 60)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add_run_options(parser)


def main(args: argparse.Namespace) -> int:
    with Watch() as watch:
        return _main(args, watch)


def _main(args: argparse.Namespace, watch: Watch) -> int:
    world = world_of_launcher(args)
    is_main_rank = world is None or world.rank == 0
    names, faults = examine(args)
    world_sizes = _world_sizes(args, world.world_size if world else None, faults)
    if faults:
        raise ValueError(fault_message(faults))
    room = RECORD_BYTES * len(names) * len(world_sizes)
    existing = launch.decide(world, lambda: _count_records(args.out, room))
    runs = [partial(_run, args, world_size, names) for world_size in world_sizes]
    stop_signal = run_until_stopped(runs, watch, only_waits=world is None)
    if not is_main_rank:
        return exit_status(stop_signal, useless=False) if stop_signal else 0
    if stop_signal:
        return _end_interrupted(args.out, stop_signal, existing)
    print(f"records and {machine.FILE} in {args.out}; `ringx plot {args.out}` draws them")
    return 0


def _end_interrupted(out: Path, stop_signal: str, records_before: int) -> int:
    """Prints the last line of a run that was told to stop; its exit status."""
    print(
        f"interrupted by {stop_signal}: what is complete is in {out};"
        " the same command with --resume measures the rest"
    )
    useless = stop_signal != "SIGINT" and _count_records(out) == records_before
    return exit_status(stop_signal, useless=useless)


def _run(args: argparse.Namespace, world_size: int, names: list[str]) -> str | None:
    results = launch.run(measure, world_size, names, args, device=args.device, timeout=args.timeout)
    return results[0]


def _count_records(out: Path, room: int = 0) -> int:
    """How many records of collectives a folder holds, which must have so much room for others."""
    records.expect_room(out, room)
    return len(list(out.glob("collective_*.json")))


def examine(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(the collectives that are asked for, everything that is wrong with the options)."""
    faults: list[str] = []

    def parse(option: str, kind: Callable[[], Any]) -> Any:
        """What `kind` returns; None if it raises, and then a fault."""
        try:
            return kind()
        except (ValueError, argparse.ArgumentTypeError) as error:
            faults.append(f"{option}{error}")
            return None

    names = parse("--collectives: ", lambda: choices(BENCHMARKS)(args.collectives)) or []
    smallest = parse("--min-bytes: ", lambda: in_bytes(args.min_bytes))
    largest = parse("--max-bytes: ", lambda: in_bytes(args.max_bytes))
    if smallest and largest and smallest > largest:
        faults.append(f"--min-bytes {args.min_bytes} is more than --max-bytes {args.max_bytes}")
    parse("--also: ", lambda: _additional_sizes(args))
    for name, least in (("factor", 2), ("reps", LEAST_REPS), ("warmup", 1)):
        if getattr(args, name) < least:
            faults.append(f"--{name} {getattr(args, name)} must be at least {least}")
    if not 0 < args.seconds < 1e6:
        faults.append(f"--seconds {args.seconds} must be a positive number of seconds")
    parse("", lambda: parse_labels(args.label))  # whose errors name the option
    return names, faults


def _world_sizes(args: argparse.Namespace, launched: int | None, faults: list[str]) -> list[int]:
    try:
        worlds = integers(args.nproc or str(launched or 2))
    except argparse.ArgumentTypeError as error:
        faults.append(f"--nproc: {error}")
        return []
    if min(worlds) < 2:
        faults.append(f"--nproc {min(worlds)}: it takes two ranks to communicate")
    if launched and worlds != [launched]:
        faults.append(
            f"--nproc {args.nproc}: the launcher started {launched} ranks,"
            " and only that many can be measured in this job"
        )
    return worlds


def in_bytes(text: str) -> int:
    """ "4K" -> 4096.

    Raises:
        ValueError: it is no such size."""
    match = re.fullmatch(r"([1-9]\d*)([KMG]?)", text.strip().upper().removesuffix("B"))
    if not match:
        raise ValueError(f"{text!r} is no size in bytes such as 1024, 1K, 16M or 1G")
    number, unit = match.groups()
    power = " KMG".index(unit) if unit else 0
    return int(number) * 1024**power


def _additional_sizes(args: argparse.Namespace) -> list[int]:
    return [in_bytes(text) for text in args.also.split(",")] if args.also else []


def sizes_of(low: int, high: int, factor: int, world: int, also: Sequence[int] = ()) -> list[int]:
    """Rising sizes in bytes, each a whole number of elements for each rank."""
    sizes = list(also)
    size = low
    while size <= high:
        sizes.append(size)
        size *= factor
    unit = DTYPE.itemsize * world
    return sorted({max(size // unit, 1) * unit for size in sizes})


# ---- measuring, on every rank


def measure(world: launch.World, names: list[str], args: argparse.Namespace) -> str | None:
    """Measures the collectives one after another; rank 0 writes their records and prints a table.

    Returns, the same on every rank: None, or the signal that ended it early."""
    labels = parse_labels(args.label)
    run = provenance.of_run(world, options_of(args), labels)
    launch.announce(world)
    hosts = len(run["machine"]["hosts"])
    cases = [
        CollectiveCase(
            collective=name,
            world=world.world_size,
            hosts=hosts,
            dtype=DTYPE_NAME,
            warmup=args.warmup,
            reps=args.reps,
        )
        for name in names
    ]
    todo = launch.decide(world, lambda: remaining(args.out, cases, args.resume, labels))
    if world.rank == 0:
        plural = "" if hosts == 1 else "s"
        print(
            f"{world.world_size} ranks on {hosts} host{plural}, {world.backend},"
            f" {run['machine']['device']}\n{HEADER}",
            flush=True,
        )
    quiet = world.rank != 0 or not sys.stderr.isatty()
    with (
        Watch() as watch,
        Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress,
    ):
        bar = progress.add_task("", total=len(todo))
        for case in todo:
            progress.update(bar, description=case.collective)
            try:
                measured = measure_collective(world, case, args, watch)
            except Stopped:
                return first_stop_signal(watch, world)
            progress.advance(bar)
            if world.rank == 0:
                record = records.new_record("collective", case, measured, run)
                write_record(args.out, record, "it")
                machine.write(args.out, machine.collected(args.out))
    return None


def measure_collective(
    world: launch.World, case: CollectiveCase, args: argparse.Namespace, watch: Watch
) -> dict[str, Any]:
    """The entries that the record of this collective has to itself, the same on every rank; rank 0
    prints a line for each size."""
    meter = wire.Meter(world)
    wire_missing = next((reason for reason in launch.gather(meter.missing, world) if reason), None)
    deadline = time.monotonic() + args.seconds
    measured: list[dict[str, Any]] = []
    ended = None
    for size in sizes_of(
        low=in_bytes(args.min_bytes),
        high=in_bytes(args.max_bytes),
        factor=args.factor,
        world=world.world_size,
        also=_additional_sizes(args),
    ):
        ended = _why_end(world, case, size, measured, deadline)
        if ended:
            break
        passes = _measure_size(world, case, size, watch, meter, deadline)
        measured.append(_size_entries(world, case, size, passes, wire_missing))
        if world.rank == 0:
            print(_line(case.collective, measured[-1]), flush=True)
    return {"sizes": measured, "ended": ended, "wire_missing": wire_missing}


def _why_end(
    world: launch.World,
    case: CollectiveCase,
    size: int,
    measured: Sequence[dict[str, Any]],
    deadline: float,
) -> str | None:
    """Why this size and larger ones are left out, or None.  Collective."""
    expected = 0.0  # seconds of a pass
    if measured:
        expected = measured[-1]["median"] * size / measured[-1]["bytes"]
    needed = expected * (case.warmup + LEAST_REPS)
    no_time = launch.decide(world, partial(_no_time, size, needed, deadline))
    reasons = launch.gather(no_time or _no_room(size, world), world)
    return next((reason for reason in reasons if reason), None)


def _no_time(size: int, needed: float, deadline: float) -> str | None:
    """Why this size takes too long, if it does; needed: seconds."""
    left = deadline - time.monotonic()
    if needed <= left:
        return None
    return (
        f"{size} bytes would take about {needed:.0f} s,"
        f" and {max(left, 0):.0f} s are left of --seconds"
    )


def _no_room(size: int, world: launch.World) -> str | None:
    """Why the buffers of this size do not fit, if they do not: they may take half of what is
    free."""
    if world.device.type == "cuda":
        free, sharing = torch.cuda.mem_get_info(world.device)[0], 1
    else:
        free, sharing = _free_memory(), world.local_world
    needed = BUFFERS * size * sharing
    if needed <= free / 2:
        return None
    return (
        f"{size} bytes a rank need {needed / 2**30:.1f} GiB"
        f" of the {free / 2**30:.1f} GiB that are free"
    )


def _free_memory() -> int:
    """Bytes of host memory that can be had; without limit where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    for line in lines:
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return sys.maxsize


@dataclass
class LocalPasses:
    """What one rank finds out about one size of a collective."""

    seconds: list[float]  # of each repetition
    wrong: int  # elements of the result
    wire: list[int]  # bytes that left this host in each repetition; 0 if not counted here


def _measure_size(
    world: launch.World,
    case: CollectiveCase,
    size: int,
    watch: Watch,
    meter: wire.Meter,
    deadline: float,
) -> LocalPasses:
    """Checks the result once, then does the other passes before, then the timed ones."""
    prepare = PREPARATIONS[case.collective]
    elements = size // DTYPE.itemsize
    call, expected = prepare(world.rank, world.world_size, elements, world.device, True)
    watch.barrier_or_stop(world)
    wrong = _count_wrong(call(), expected())
    call, _ = prepare(world.rank, world.world_size, elements, world.device, False)
    for _ in range(case.warmup - 1):
        watch.barrier_or_stop(world)
        _timed(call, world.device)
    seconds: list[float] = []
    meter.marks.clear()
    while len(seconds) < case.reps:
        watch.barrier_or_stop(world)
        meter.mark()
        seconds.append(_timed(call, world.device))
        if len(seconds) >= LEAST_REPS and launch.decide(world, partial(_is_late, deadline)):
            break
    watch.barrier_or_stop(world)
    meter.mark()
    sent = [meter.between(i) for i in range(len(seconds))]
    return LocalPasses(seconds=seconds, wrong=wrong, wire=sent)


def _count_wrong(result: torch.Tensor, expected: torch.Tensor | None) -> int:
    if expected is None:
        return 0
    return int((result != expected).sum())


def _is_late(deadline: float) -> bool:
    return time.monotonic() > deadline


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _size_entries(
    world: launch.World,
    case: CollectiveCase,
    size: int,
    local: LocalPasses,
    wire_missing: str | None,
) -> dict[str, Any]:
    """What a record holds of a size, from the passes of all ranks.  Collective."""
    collective = BENCHMARKS[case.collective]
    of_ranks: list[LocalPasses] = launch.gather(local, world)
    repetitions = zip(*[rank.seconds for rank in of_ranks], strict=True)
    seconds = [max(seconds_of_ranks) for seconds_of_ranks in repetitions]
    mean = statistics.fmean(seconds)
    wire_factor = None
    if not wire_missing:
        repetitions_on_wire = zip(*[rank.wire for rank in of_ranks], strict=True)
        left_hosts = [sum(bytes_of_ranks) for bytes_of_ranks in repetitions_on_wire]
        optimal = collective.sent(world.world_size) * size * world.world_size
        wire_factor = statistics.median(left_hosts) / optimal
    return {
        "bytes": size,
        "reps": len(seconds),
        "mean": mean,
        "min": min(seconds),
        "median": statistics.median(seconds),
        "p99": float(np.quantile(seconds, 0.99)),
        "algbw": size / mean,
        "busbw": size / mean * collective.bus(world.world_size),
        "wrong": sum(rank.wrong for rank in of_ranks),
        "wire_factor": wire_factor,
    }


# ---- the table

HEADER = (
    f"{'collective':14} {'size (B)':>10} {'type':>5} {'time us':>10} {'min us':>10} {'p99 us':>10}"
    f" {'algbw GB/s':>10} {'busbw GB/s':>10} {'wrong':>5} {'wire':>5}"
)


def _line(name: str, size: dict[str, Any]) -> str:
    wire_factor = "-" if size["wire_factor"] is None else f"{size['wire_factor']:.2f}"
    times = " ".join(f"{1e6 * size[key]:10.5g}" for key in ("mean", "min", "p99"))
    return (
        f"{name:14} {size['bytes']:10} {DTYPE_NAME:>5} {times} {size['algbw'] / 1e9:10.3g}"
        f" {size['busbw'] / 1e9:10.3g} {size['wrong']:5} {wire_factor:>5}"
    )
