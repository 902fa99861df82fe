"""ringx bench-comm: what does each collective cost here, by size?  As nccl-tests measures it, on any backend.

    ringx bench-comm --nproc 4 --out results/here
    srun -N8 --ntasks-per-node=8 python -m ringx bench-comm --out results/site
    ringx bench-comm --nproc 2 --collectives broadcast,ring --min-bytes 1K --max-bytes 16M --seconds 20 --out results/here

Sizes and bandwidths are those of nccl-tests (its doc/PERFORMANCE.md), with N ranks and S bytes:

    size     broadcast, reduce, all_reduce: the message.  all_gather: the result.  reduce_scatter, all_to_all: what each rank hands
             over.  ring: what each rank sends to the next (sendrecv)
    time     mean over the repetitions of the slowest rank, which begin together after a barrier; min, median and p99 beside it
    algbw    S / time
    busbw    algbw x (N-1)/N for all_gather, reduce_scatter, all_to_all; x 2 (N-1)/N for all_reduce; x 1 for the others: to be
             compared with the bandwidth of the links, whatever N
    wrong    elements that are not what they should be, in a first pass on numbers; the timed passes move zeros
    wire     bytes that left the hosts / what an optimal implementation would send (``ringx.comm``), where that can be counted

The largest size is bounded by half of the free memory and by --seconds for each collective.  DIR/machine.json holds a fit of time =
alpha + beta S to each collective and number of ranks with a record in DIR (``ringx.measure.machine``): it is what a planner reads.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from ..launch.stopping import AGAIN, Stopped, Watch
from . import machine, provenance, records, wire
from .benchmark import all_of, labelled, remaining

DTYPE, DTYPE_NAME = torch.float32, "fp32"
PATTERN = 1021  # values of a checked pass repeat after so many elements, a prime: a shifted or swapped block shows
LEAST_REPS = 3


# The preparation of a collective, for one rank and `n` float32 elements (size = 4 n bytes, n a multiple of the number of ranks):
# (rank, world_size, n, device, checked) -> (call, expected).  call() communicates and returns the result; expected() is what the
# result must be if rank r's input was ``_values(r, ..., checked=True)``, or None where it does not matter.
Preparation = Callable[
    [int, int, int, torch.device, bool],
    tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor | None]],
]


def _values(rank: int, n: int, device: torch.device, checked: bool) -> torch.Tensor:
    """What rank contributes: small integers, so that sums are exact; or zeros."""
    if not checked:
        return torch.zeros(n, dtype=DTYPE, device=device)
    return torch.arange(n, device=device).remainder_(PATTERN).add_(rank + 1).to(DTYPE)


def _sum(world: int, n: int, device: torch.device) -> torch.Tensor:
    total = torch.zeros(n, dtype=DTYPE, device=device)
    for r in range(world):
        total += _values(r, n, device, True)
    return total


def _broadcast(rank, world, n, device, checked):
    x = _values(rank, n, device, checked)

    def call():
        dist.broadcast(x, 0)
        return x

    return call, lambda: _values(0, n, device, True)


def _reduce(rank, world, n, device, checked):
    x = _values(rank, n, device, checked)

    def call():
        dist.reduce(x, 0)
        return x

    return call, lambda: _sum(world, n, device) if rank == 0 else None


def _all_reduce(rank, world, n, device, checked):
    x = _values(rank, n, device, checked)

    def call():
        dist.all_reduce(x)
        return x

    return call, lambda: _sum(world, n, device)


def _all_gather(rank, world, n, device, checked):
    x, out = _values(rank, n // world, device, checked), torch.zeros(n, dtype=DTYPE, device=device)
    gather = getattr(
        dist, "all_gather_single", dist.all_gather_into_tensor
    )  # renamed in torch 2.13

    def call():
        gather(out, x)
        return out

    return call, lambda: torch.cat([_values(r, n // world, device, True) for r in range(world)])


def _reduce_scatter(rank, world, n, device, checked):
    x, out = _values(rank, n, device, checked), torch.zeros(n // world, dtype=DTYPE, device=device)
    scatter = getattr(
        dist, "reduce_scatter_single", dist.reduce_scatter_tensor
    )  # renamed in torch 2.13

    def call():
        scatter(out, x)
        return out

    return call, lambda: _sum(world, n, device).chunk(world)[rank]


def _all_to_all(rank, world, n, device, checked):
    x, out = _values(rank, n, device, checked), torch.zeros(n, dtype=DTYPE, device=device)

    def call():
        dist.all_to_all_single(out, x)
        return out

    return call, lambda: torch.cat(
        [_values(r, n, device, True).chunk(world)[rank] for r in range(world)]
    )


def _ring(rank, world, n, device, checked):
    x, out = _values(rank, n, device, checked), torch.zeros(n, dtype=DTYPE, device=device)
    following, previous = (rank + 1) % world, (rank - 1) % world

    def call():
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, following), dist.P2POp(dist.irecv, out, previous)]
        ):
            work.wait()
        return out

    return call, lambda: _values(previous, n, device, True)


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
class Case:
    """One record; what each field means is in ``records.FIELDS``."""

    collective: str
    world: int
    hosts: int
    dtype: str
    warmup: int
    reps: int

    @property
    def id(self) -> str:
        return f"collective_{self.collective}_{self.dtype}_n{self.world}_hosts{self.hosts}"


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
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds that ranks wait for each other (default: 600)",
    )
    text = "note this in the records, such as link_mbit=200; repeatable"
    parser.add_argument("--label", action="append", default=[], metavar="NAME=TEXT", help=text)


def main(args: argparse.Namespace) -> int:
    with Watch() as watch:
        me = launch.init(device=args.device, timeout=args.timeout) if launch.launched() else None
        names, faults = examine(args)
        worlds = _worlds(args, me.world_size if me else None, faults)
        if faults:
            raise ValueError(all_of(faults))
        before = launch.decide(me, lambda: _count(args.out, 2**14 * len(names) * len(worlds)))
        told = None
        try:
            for world in worlds:
                with watch.at_once(not me):
                    told = launch.run(
                        measure, world, names, args, device=args.device, timeout=args.timeout
                    )[0]
                if told:
                    break
        except KeyboardInterrupt:
            told = watch.stop_signal or "SIGINT"
        chief = not me or me.rank == 0
        if not told:
            if chief:
                print(
                    f"records and {machine.FILE} in {args.out}; `ringx plot {args.out}` draws them"
                )
            return 0
        if chief:
            print(
                f"interrupted by {told}: what is complete is in {args.out}; the same command with --resume measures the rest"
            )
            if told != "SIGINT" and _count(args.out) == before:
                return 1  # not AGAIN: without progress it would come again forever
        return 130 if told == "SIGINT" else AGAIN


def _count(out: Path, room: int = 0) -> int:
    """The records of collectives in a folder, which must have so much room for others."""
    records.expect_room(out, room)
    return len(list(out.glob("collective_*.json")))


def examine(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(the collectives that are asked for, everything that is wrong with the options)."""
    faults: list[str] = []
    names: list[str] = []

    def parse(kind: Callable[[], Any], prefix: str = "") -> Any:
        try:
            return kind()
        except (ValueError, argparse.ArgumentTypeError) as e:
            faults.append(f"{prefix}{e}")
            return None

    names = parse(lambda: choices(BENCHMARKS)(args.collectives), "--collectives: ") or []
    low = parse(partial(in_bytes, args.min_bytes), "--min-bytes: ")
    high = parse(partial(in_bytes, args.max_bytes), "--max-bytes: ")
    if low and high and low > high:
        faults.append(f"--min-bytes {args.min_bytes} is more than --max-bytes {args.max_bytes}")
    parse(partial(_also, args), "--also: ")
    for name, least in (("factor", 2), ("reps", LEAST_REPS), ("warmup", 1)):
        if getattr(args, name) < least:
            faults.append(f"--{name} {getattr(args, name)} must be at least {least}")
    if not 0 < args.seconds < 1e6:
        faults.append(f"--seconds {args.seconds} must be a positive number of seconds")
    parse(lambda: labelled(args.label))
    return names, faults


def _worlds(args: argparse.Namespace, launched: int | None, faults: list[str]) -> list[int]:
    try:
        worlds = integers(args.nproc or str(launched or 2))
    except argparse.ArgumentTypeError as e:
        faults.append(f"--nproc: {e}")
        return []
    if min(worlds) < 2:
        faults.append(f"--nproc {min(worlds)}: it takes two ranks to communicate")
    if launched and worlds != [launched]:
        faults.append(
            f"--nproc {args.nproc}: the launcher started {launched} ranks, and only that many can be measured in this job"
        )
    return worlds


def in_bytes(text: str) -> int:
    """ "4K" -> 4096.

    Raises:
        ValueError: it is no such size."""
    match = re.fullmatch(r"([1-9]\d*)([KMG]?)", text.strip().upper().removesuffix("B"))
    if not match:
        raise ValueError(f"{text!r} is no size in bytes such as 1024, 1K, 16M or 1G")
    return int(match[1]) * 1024 ** ("KMG".find(match[2]) + 1 if match[2] else 0)


def _also(args: argparse.Namespace) -> list[int]:
    return [in_bytes(text) for text in args.also.split(",")] if args.also else []


def sizes_of(low: int, high: int, factor: int, world: int, also: Sequence[int] = ()) -> list[int]:
    """Rising sizes in bytes, each a whole number of elements for each rank."""
    unit, found, size = DTYPE.itemsize * world, list(also), low
    while size <= high:
        found.append(size)
        size *= factor
    return sorted({max(size // unit, 1) * unit for size in found})


# ---- measuring, on every rank


def measure(world: launch.World, names: list[str], args: argparse.Namespace) -> str | None:
    """Measures the collectives one after another; rank 0 writes their records and prints a table.  None, or the signal that ended
    it early."""
    labels = labelled(args.label)
    options = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)
    }
    common = provenance.of_run(world, options, labels)
    launch.announce(world)
    hosts = len(common["machine"]["hosts"])
    cases = [
        Case(name, world.world_size, hosts, DTYPE_NAME, args.warmup, args.reps) for name in names
    ]
    todo = launch.decide(world, lambda: remaining(args.out, cases, args.resume, labels))
    chief = world.rank == 0
    if chief:
        print(
            f"{world.world_size} ranks on {hosts} host{'s'[: hosts != 1]}, {world.backend}, {common['machine']['device']}\n{HEADER}",
            flush=True,
        )
    with (
        Watch() as watch,
        Progress(
            console=Console(stderr=True),
            transient=True,
            disable=not (chief and sys.stderr.isatty()),
        ) as bar,
    ):
        task = bar.add_task("", total=len(todo))
        for case in todo:
            bar.update(task, description=case.collective)
            try:
                found = measure_collective(
                    world, case, args, watch, print if chief else lambda *_, **__: None
                )
            except Stopped:
                return next(told for told in launch.gather(watch.stop_signal, world) if told)
            bar.advance(task)
            if chief:
                head = {
                    "schema": records.SCHEMA,
                    "kind": "collective",
                    "id": case.id,
                    "date": provenance.now(),
                    "case": asdict(case),
                }
                try:
                    records.write(args.out, {**head, **found, **common})
                except FileExistsError as e:
                    print(
                        f"not written, for it was measured elsewhere meanwhile: {e}",
                        file=sys.stderr,
                    )
                machine.write(args.out, machine.collected(args.out))
    return None


def measure_collective(
    world: launch.World,
    case: Case,
    args: argparse.Namespace,
    watch: Watch,
    say: Callable[..., None],
) -> dict[str, Any]:
    """What the record of this collective holds; the same on every rank."""
    meter = wire.Meter(world)
    missing = next((m for m in launch.gather(meter.missing, world) if m), None)
    end, ended = time.monotonic() + args.seconds, None
    rows: list[dict[str, Any]] = []
    for size in sizes_of(
        in_bytes(args.min_bytes),
        in_bytes(args.max_bytes),
        args.factor,
        world.world_size,
        _also(args),
    ):
        expected = rows[-1]["median"] * size / rows[-1]["bytes"] if rows else 0.0
        ended = launch.decide(
            world, partial(_enough, size, expected * (case.warmup + LEAST_REPS), end)
        )
        ended = next((e for e in launch.gather(ended or _no_room(size, world), world) if e), None)
        if ended:
            break
        rows.append(_measure_size(world, size, case, watch, meter, missing, end))
        say(_line(case.collective, rows[-1]), flush=True)
    return {"sizes": rows, "ended": ended, "wire_missing": missing}


def _enough(size: int, expected: float, end: float) -> str | None:
    left = end - time.monotonic()
    return (
        f"{size} bytes would take about {expected:.0f} s, and {max(left, 0):.0f} s are left of --seconds"
        if expected > left
        else None
    )


def _no_room(size: int, world: launch.World) -> str | None:
    """Why the buffers of this size do not fit: at most half of what is free, for input, result and what a backend adds."""
    if world.device.type == "cuda":
        free, sharing = torch.cuda.mem_get_info(world.device)[0], 1
    else:
        free, sharing = _free_memory(), world.local_world
    need = 4 * size * sharing
    return (
        f"{size} bytes a rank need {need / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free"
        if need > free / 2
        else None
    )


def _free_memory() -> int:
    """Bytes of host memory that can be had; without limit where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return next(
        (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")),
        sys.maxsize,
    )


def _measure_size(world, size, case, watch, meter, missing, end) -> dict[str, Any]:
    row, prepare = BENCHMARKS[case.collective], PREPARATIONS[case.collective]
    n = size // DTYPE.itemsize
    call, expected = prepare(world.rank, world.world_size, n, world.device, True)
    watch.barrier_or_stop(world)
    got, want = call(), expected()
    wrong = 0 if want is None else int((got != want).sum())
    call, _ = prepare(world.rank, world.world_size, n, world.device, False)
    del got, want
    for _ in range(case.warmup - 1):
        watch.barrier_or_stop(world)
        _timed(call, world.device)
    seconds: list[float] = []
    meter.marks.clear()
    while len(seconds) < case.reps:
        watch.barrier_or_stop(world)
        meter.mark()
        seconds.append(_timed(call, world.device))
        if len(seconds) >= LEAST_REPS and launch.decide(world, partial(_late, end)):
            break
    watch.barrier_or_stop(world)
    meter.mark()
    sent = [meter.between(i) for i in range(len(seconds))]
    everyone = launch.gather({"seconds": seconds, "wrong": wrong, "sent": sent}, world)
    slowest = [max(rep) for rep in zip(*(r["seconds"] for r in everyone), strict=True)]
    mean = statistics.fmean(slowest)
    left = statistics.median(sum(rep) for rep in zip(*(r["sent"] for r in everyone), strict=True))
    return {
        "bytes": size,
        "reps": len(slowest),
        "mean": mean,
        "min": min(slowest),
        "median": statistics.median(slowest),
        "p99": float(np.quantile(slowest, 0.99)),
        "algbw": size / mean,
        "busbw": size / mean * row.bus(world.world_size),
        "wrong": sum(r["wrong"] for r in everyone),
        "wire_factor": None
        if missing
        else left / (row.sent(world.world_size) * size * world.world_size),
    }


def _late(end: float) -> bool:
    return time.monotonic() > end


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


# ---- the table

HEADER = (
    f"{'collective':14} {'size (B)':>10} {'type':>5} {'time us':>10} {'min us':>10} {'p99 us':>10} {'algbw GB/s':>10}"
    f" {'busbw GB/s':>10} {'wrong':>5} {'wire':>5}"
)


def _line(name: str, r: dict[str, Any]) -> str:
    def micro(key: str) -> str:
        return f"{1e6 * r[key]:10.5g}"

    wired = "-" if r["wire_factor"] is None else f"{r['wire_factor']:.2f}"
    return (
        f"{name:14} {r['bytes']:10} {DTYPE_NAME:>5} {micro('mean')} {micro('min')} {micro('p99')} {r['algbw'] / 1e9:10.3g}"
        f" {r['busbw'] / 1e9:10.3g} {r['wrong']:5} {wired:>5}"
    )
