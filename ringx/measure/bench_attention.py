"""ringx bench: how fast is each algorithm here, against the others and against one process?

    ringx bench --nproc 1,2,4 --seqlens 2048,8192 --masks causal,full --out results/here
    torchrun --nproc_per_node 8 -m ringx bench --seqlens-per-rank 8192 --layouts recommended,striped --out results/node

How each number is measured and what it means is in ``ringx.measure.records``, with the schema of the files: one JSON record per case,
written as soon as all algorithms of its size are done.  An interrupted run keeps those; --resume measures only the rest.  Told
to stop (SIGUSR1, SIGTERM), it drops the size that it is at and ends with status 75.  A job array measures one part each:

    srun python -m ringx bench --seqlens 4096,8192 --kv-heads 8,2 --out DIR --resume --part "$SLURM_ARRAY_TASK_ID/4"
"""

import argparse
import contextlib
import itertools
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from .. import comm, kernels, launch
from ..api import attention
from ..checks import DTYPES
from ..launch.stopping import AGAIN, Stopped, Watch
from ..patterns.registry import ALGORITHMS
from . import provenance, records, wire
from .attention_table import table
from .benchmark import labelled, remaining
from .cases import FLOPS_RULE, Case, add_matrix, plan
from .peak import peak_bytes


@dataclass(frozen=True)
class Job:
    """What the ranks are told besides their cases."""

    out: Path
    options: dict[str, Any]
    labels: dict[str, str]
    passes_before: int  # of earlier world sizes, for the progress bar
    passes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the records"
    )
    parser.add_argument("--nproc", metavar="N,...", help="ranks (default: 1,2, or the launcher's)")
    add_matrix(parser)
    parser.add_argument("--resume", action="store_true", help="skip cases that DIR already holds")
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="measure only part I (from 0) of N parts of the sizes: for job arrays",
    )


def main(args: argparse.Namespace) -> int:
    with Watch() as watch:
        return _main(args, watch)


def _main(args: argparse.Namespace, watch: Watch) -> int:
    me = launch.init(device=args.device, timeout=args.timeout) if launch.launched() else None
    cases = plan(args, me.world_size if me else None)
    labels = labelled(args.label)
    todo = launch.decide(me, lambda: remaining(args.out, cases, args.resume, labels))
    speaks = not me or me.rank == 0  # one rank talks where a launcher started several
    if speaks and len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} cases are there already")
    options = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)
    }
    passes_before, passes, told = 0, sum(_passes(c) for c in todo), None
    try:
        for world, group in itertools.groupby(todo, key=lambda c: c.world):
            mine = list(group)
            job = Job(args.out, options, labels, passes_before, passes)
            with watch.at_once(not me):  # a process that only waits for ranks that it started
                told = launch.run(
                    measure,
                    world,
                    mine,
                    job,
                    device=args.device,
                    threads=args.threads,
                    timeout=args.timeout,
                )[0]
            passes_before += sum(_passes(c) for c in mine)
            if told:
                break
    except KeyboardInterrupt:
        told = watch.stop_signal or "SIGINT"
    if told:
        done = sum(records.path_of(args.out, c.id).exists() for c in todo)
        return _stopped(args.out, len(cases) - len(todo) + done, len(cases), done > 0, told, me)
    if speaks:
        if cases:
            print(table([records.read(records.path_of(args.out, c.id)) for c in cases]))
        print(f"{len(cases)} records in {args.out}; `ringx plot {args.out}` draws them")
    return 0


def _stopped(
    out: Path, there: int, wanted: int, progress: bool, told: str, me: launch.World | None
) -> int:
    """The last words of a run that was told to stop, and its exit status."""
    if not me or me.rank == 0:
        Console(stderr=True).show_cursor(
            True
        )  # the rank that drew the progress bar was ended in the middle of it
        by = "" if told == "SIGINT" else f" by {told}"
        print(
            f"interrupted{by}: {there} of {wanted} cases are in {out}; the same command with --resume measures the rest"
        )
        if (
            told != "SIGINT" and not progress
        ):  # not AGAIN: a job that starts itself again would do so forever
            print(
                "ringx bench: not one size was finished: allow more time, or fewer --reps or sizes",
                file=sys.stderr,
            )
            return 1
    return 130 if told == "SIGINT" else AGAIN


# ---- what to measure


def _passes(case: Case) -> int:
    return case.warmup + case.reps


# ---- measuring, on every rank


def measure(world: launch.World, cases: list[Case], job: Job) -> str | None:
    """Measures the cases, size by size; rank 0 writes their records and shows the progress.  The same on every rank: None, or
    the signal that ended it early."""
    torch.set_num_threads(cases[0].threads)
    common = provenance.of_run(world, job.options, job.labels)
    launch.announce(world)
    with Watch() as watch:
        try:
            _measure(world, cases, job, common, watch)
        except Stopped:
            return next(told for told in launch.gather(watch.stop_signal, world) if told)
    return None


def _measure(
    world: launch.World, cases: list[Case], job: Job, common: dict[str, Any], watch: Watch
) -> None:
    quiet = world.rank != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=job.passes, completed=job.passes_before)
        for size, group in itertools.groupby(cases, key=lambda c: c.size):
            text = f"N={size.world} S={size.seqlen} {size.mask} {size.dtype} Hkv={size.kv_heads}"

            def tick(case: Case, text=text) -> None:
                progress.update(bar, advance=1, description=f"{text} {case.algorithm}")

            load = provenance.load_average()
            for record in measure_size(world, list(group), tick, watch):
                if world.rank != 0:
                    continue
                record = {
                    "schema": records.SCHEMA,
                    "kind": "attention",
                    "date": provenance.now(),
                    **record,
                    **common,
                }
                record["machine"] = {**common["machine"], "load_average": load}
                try:
                    records.write(job.out, record)
                except FileExistsError as e:  # by another run of the same job
                    print(
                        f"not written, for the case was measured elsewhere meanwhile: {e}",
                        file=sys.stderr,
                    )


def measure_size(
    world: launch.World, cases: Sequence[Case], tick: Callable[[Case], None], watch: Watch
) -> list[dict]:
    """Measures cases of one size side by side; on every rank, what their records hold of it."""
    size, device = cases[0], world.device
    kernel = kernels.choose(size.kernel, size.need(device))
    q, k, v, dout = _inputs(size, size.seqlen // world.world_size, world.rank, device)

    def ring(case: Case) -> tuple[float, float]:
        how: dict[str, Any] = {
            "algorithm": case.algorithm,
            "layout": case.layout,
            "overlap": case.overlap,
        }
        forward = partial(attention, q, k, v, causal=case.causal, kernel=kernel, **how)
        return timed(forward, lambda out: torch.autograd.grad(out, (q, k, v), dout), device)

    baseline = Baseline(size, kernel, world) if size.baseline and world.rank == 0 else None
    probes = {}
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    meter = wire.Meter(world)
    for rep in range(-size.warmup, size.reps):
        if baseline:
            baseline.run(keep=rep >= 0)
        for i, case in enumerate(cases):
            watch.barrier_or_stop(world)
            meter.mark()
            if case not in probes:
                probes[case] = _probe(partial(ring, case), device)
            elif rep < 0:
                ring(case)
            else:
                times[i].append(ring(case))
            tick(case)
    watch.barrier_or_stop(world)
    meter.mark()

    passes = range(size.warmup * len(cases), (size.warmup + size.reps) * len(cases))
    sent = [[meter.between(p) for p in passes[i :: len(cases)]] for i in range(len(cases))]
    mine = {
        "times": times,
        "probes": [probes[c] for c in cases],
        "sent": sent,
        "no count": meter.missing,
    }
    everyone = launch.gather(mine, world)
    against = launch.gather(baseline.result() if baseline else None, world)[0]
    hosts = launch.gather((socket.gethostname(), provenance.cores()), world)
    cores = len(set().union(*(c for host, c in hosts if host == hosts[0][0])))
    workers = size.world * (1 if device.type == "cuda" else size.threads)
    result = []
    for i, case in enumerate(cases):
        counted = [r["probes"][i]["bytes"] for r in everyone]
        seconds = slowest([r["times"][i] for r in everyone])
        peaks = [r["probes"][i]["peak"] for r in everyone]
        result.append(
            {
                "id": case.id,
                "case": asdict(case),
                "kernel": kernel,
                "workers": workers,
                "oversubscribed": device.type != "cuda"
                and world.local_world * size.threads > cores,
                "seconds": seconds,
                **derived(case, seconds, workers, against),
                "bytes": _bytes(case, counted),
                **_wire(
                    [r["sent"][i] for r in everyone],
                    next((r["no count"] for r in everyone if r["no count"]), None),
                    meter,
                ),
                "memory": {"peak_bytes": max(p[0] for p in peaks), "how": peaks[0][1]},
            }
        )
    return result


def timed(
    forward: Callable[[], Any], backward: Callable[[Any], object], device: torch.device
) -> tuple[float, float]:
    """Seconds (to the end of the forward pass, to the end of the backward pass)."""
    if device.type != "cuda":
        start = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        backward(out)
        return middle - start, time.perf_counter() - start
    torch.cuda.synchronize(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    marks[0].record()
    out = forward()
    marks[1].record()
    backward(out)
    marks[2].record()
    torch.cuda.synchronize(device)
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[0].elapsed_time(marks[2]) / 1e3


def slowest(per_rank: Sequence[Sequence[tuple[float, float]]]) -> dict[str, dict]:
    """Statistics of the slowest rank of each repetition, from every rank's (forward, forward + backward) seconds."""
    forward = [max(one[0] for one in rep) for rep in zip(*per_rank, strict=True)]
    total = [max(one[1] for one in rep) for rep in zip(*per_rank, strict=True)]
    backward = [t - f for f, t in zip(forward, total, strict=True)]
    return {
        "forward": records.stats(forward),
        "backward": records.stats(backward),
        "total": records.stats(total),
    }


def derived(
    case: Case, seconds: dict[str, dict], workers: int, baseline: dict | None
) -> dict[str, Any]:
    """What follows from the times; definitions in ``records``."""
    if baseline is None or baseline["seconds"] is None:
        missing = baseline["missing"] if baseline else "not asked for (--no-baseline)"
        against: dict[str, Any] = {
            "baseline": None,
            "baseline_missing": missing,
            "efficiency_percent": None,
        }
    else:
        scale = 100 * baseline["workers"] / workers
        against = {
            "baseline": {k: baseline[k] for k in ("kernel", "workers", "seconds")},
            "baseline_missing": None,
            "efficiency_percent": {
                p: scale * baseline["seconds"][p]["median"] / seconds[p]["median"]
                for p in records.PHASES
            },
        }
    return {
        **against,
        "tokens_per_second": case.batch * case.seqlen / seconds["total"]["median"],
        "tflops_per_rank": {
            p: case.flops()[p] / case.world / seconds[p]["median"] / 1e12 for p in records.PHASES
        },
        "flops_rule": FLOPS_RULE,
    }


class Baseline:
    """The same kernel over the whole sequence in this process alone, while the other ranks wait."""

    def __init__(self, size: Case, kernel: str, world: launch.World):
        self.size, self.device, self.kernel = size, world.device, kernel
        self.threads = size.baseline_threads or min(
            size.world * size.threads, len(provenance.cores())
        )
        self.times: list[tuple[float, float]] = []
        self.missing: str | None = None
        with self._memory_may_not_suffice():
            self.inputs = _inputs(size, size.seqlen, 0, self.device)

    def run(self, keep: bool) -> None:
        with self._memory_may_not_suffice():
            if self.missing is None:
                torch.set_num_threads(self.threads)
                seconds = self._once()
                self.times += [seconds] if keep else []
        torch.set_num_threads(self.size.threads)

    def _once(self) -> tuple[float, float]:
        call = kernels.load(self.kernel)
        q, k, v, dout = (x.detach() for x in self.inputs)
        band, scale = (None, 0 if self.size.causal else None), self.size.head_dim**-0.5
        return timed(
            lambda: call.forward(q, k, v, band=band, scale=scale),
            lambda out: call.backward(
                dout, q, k, v, *out, band=band, scale=scale, deterministic=False
            ),
            self.device,
        )

    @contextlib.contextmanager
    def _memory_may_not_suffice(self):
        try:
            yield
        except (RuntimeError, MemoryError) as e:  # on a CPU torch says so in a plain RuntimeError
            if not isinstance(e, MemoryError) and "memory" not in str(e):
                raise
            self.missing, self.inputs, self.times = (
                f"out of memory: {str(e).splitlines()[0]}",
                (),
                [],
            )

    def result(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "workers": 1 if self.device.type == "cuda" else self.threads,
            "seconds": None if self.missing else slowest([self.times]),
            "missing": self.missing,
        }


def _inputs(size: Case, tokens: int, rank: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout of this many tokens.  Times and bytes do not depend on the values, so no rank makes the whole sequence."""
    g = torch.Generator(device).manual_seed(rank)
    heads = (size.heads, size.kv_heads, size.kv_heads, size.heads)
    shapes = [(size.batch, tokens, h, size.head_dim) for h in heads]
    made = [torch.randn(s, generator=g, device=device, dtype=DTYPES[size.dtype]) for s in shapes]
    return *(x.requires_grad_() for x in made[:3]), made[3]


def _probe(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Bytes and peak memory of one pass."""
    with comm.traffic() as sent:
        peak = peak_bytes(call, device)
    counted = {
        d: {"bytes": dict(getattr(sent, d)), "messages": dict(getattr(sent, f"{d}_messages"))}
        for d in ("forward", "backward")
    }
    return {"bytes": counted, "peak": peak}


def _bytes(case: Case, counted: Sequence[dict[str, dict]]) -> dict[str, dict]:
    closed = ALGORITHMS[case.algorithm].bytes(
        *(case.batch, case.seqlen, case.heads, case.kv_heads, case.head_dim, case.world),
        *(DTYPES[case.dtype].itemsize, case.causal, case.layout),
    )
    result = {}
    for direction, form in zip(("forward", "backward"), closed, strict=True):
        mean = {}
        for what in ("bytes", "messages"):
            total: Counter = Counter()
            for rank in counted:
                total.update(rank[direction][what])
            mean[what] = {name: n / len(counted) for name, n in total.items()}
        sums = {"counted": sum(mean["bytes"].values()), "closed_form": form}
        result[direction] = {**sums, "collectives": mean["bytes"], "messages": mean["messages"]}
    return result


def _wire(sent: Sequence[Sequence[int]], missing: str | None, meter: wire.Meter) -> dict[str, Any]:
    """What left the hosts in each repetition, per rank; `sent` by rank (0 of those that do not count)."""
    if missing:
        return {"wire": None, "wire_missing": missing}
    raw = [sum(rep) / len(sent) for rep in zip(*sent, strict=True)]
    hosts = sum(any(rank) for rank in sent)
    return {
        "wire": {
            "median": statistics.median(raw),
            "raw": raw,
            "interface": ",".join(meter.names),
            "hosts": hosts,
        },
        "wire_missing": None,
    }


# ---- the table
