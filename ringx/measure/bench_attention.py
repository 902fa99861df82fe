"""ringx bench: how fast is each algorithm here, against the others and against one process?

    ringx bench --nproc 1,2,4 --seqlens 2048,8192 --masks causal,full --out results/here
    torchrun --nproc_per_node 8 -m ringx bench --seqlens-per-rank 8192 \\
        --layouts recommended,striped --out results/node

How each number is measured and what it means is in ``ringx.measure.records``, with the schema of
the files: one JSON record per case, written as soon as all algorithms of its size are done.  An
interrupted run keeps those; --resume measures only the rest.  Told to stop (SIGUSR1, SIGTERM), it
drops the size that it is at and ends with status 75.  A job array measures one part each:

    srun python -m ringx bench --seqlens 4096,8192 --kv-heads 8,2 --out DIR --resume \\
        --part "$SLURM_ARRAY_TASK_ID/4"
"""

import argparse
import contextlib
import itertools
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from .. import comm, kernels, launch
from ..api import attention
from ..checks import DTYPES
from ..launch.stopping import Stopped, Watch
from ..patterns.registry import ALGORITHMS
from . import provenance, records, wire
from .attention_table import table
from .benchmark import (
    exit_status,
    first_stop_signal,
    options_of,
    parse_labels,
    remaining,
    run_until_stopped,
    world_of_launcher,
    write_record,
)
from .cases import FLOPS_RULE, AttentionCase, add_matrix, plan
from .peak import peak_bytes

Seconds = tuple[float, float]  # to the end of the forward pass, to the end of the backward pass


@dataclass(frozen=True)
class RunSettings:
    """What the ranks must know besides their cases."""

    out: Path
    options: dict[str, Any]
    labels: dict[str, str]
    passes_before: int  # of earlier world sizes, for the progress bar
    passes: int


# ---- the command


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
    world = world_of_launcher(args)
    is_main_rank = world is None or world.rank == 0
    cases = plan(args, world.world_size if world else None)
    labels = parse_labels(args.label)
    todo = launch.decide(world, lambda: remaining(args.out, cases, args.resume, labels))
    if is_main_rank and len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} cases are there already")
    stop_signal = run_until_stopped(_runs(args, todo, labels), watch, only_waits=world is None)
    if stop_signal:
        measured = sum(records.path_of(args.out, case.id).exists() for case in todo)
        if is_main_rank:
            existing = len(cases) - len(todo) + measured
            _print_interrupted(args.out, existing, len(cases), stop_signal, useless=measured == 0)
        return exit_status(stop_signal, useless=is_main_rank and measured == 0)
    if is_main_rank:
        _print_results(args.out, cases)
    return 0


def _print_results(out: Path, cases: Sequence[AttentionCase]) -> None:
    """The last lines of a run that measured all its cases."""
    if cases:
        print(table([records.read(records.path_of(out, case.id)) for case in cases]))
    print(f"{len(cases)} records in {out}; `ringx plot {out}` draws them")


def _runs(
    args: argparse.Namespace, cases: Sequence[AttentionCase], labels: dict[str, str]
) -> Iterator[Callable[[], str | None]]:
    """A call for each number of ranks, which measures the cases on so many."""
    passes_before = 0
    for world_size, group in itertools.groupby(cases, key=lambda case: case.world):
        cases_of_world = list(group)
        settings = RunSettings(
            out=args.out,
            options=options_of(args),
            labels=labels,
            passes_before=passes_before,
            passes=sum(case.passes for case in cases),
        )
        passes_before += sum(case.passes for case in cases_of_world)
        yield partial(_run, args, world_size, cases_of_world, settings)


def _run(
    args: argparse.Namespace,
    world_size: int,
    cases: list[AttentionCase],
    settings: RunSettings,
) -> str | None:
    results = launch.run(
        measure,
        world_size,
        cases,
        settings,
        device=args.device,
        threads=args.threads,
        timeout=args.timeout,
    )
    return results[0]


def _print_interrupted(
    out: Path, existing: int, wanted: int, stop_signal: str, *, useless: bool
) -> None:
    """The last lines of a run that was told to stop."""
    # The rank that drew the progress bar was ended in the middle of it.
    Console(stderr=True).show_cursor(True)
    by = "" if stop_signal == "SIGINT" else f" by {stop_signal}"
    print(
        f"interrupted{by}: {existing} of {wanted} cases are in {out};"
        " the same command with --resume measures the rest"
    )
    if useless and stop_signal != "SIGINT":
        print(
            "ringx bench: not one size was finished: allow more time, or fewer --reps or sizes",
            file=sys.stderr,
        )


# ---- measuring, on every rank


def measure(world: launch.World, cases: list[AttentionCase], settings: RunSettings) -> str | None:
    """Measures the cases, size by size; rank 0 writes their records and shows the progress.

    Returns, the same on every rank: None, or the signal that ended it early."""
    torch.set_num_threads(cases[0].threads)
    run = provenance.of_run(world, settings.options, settings.labels)
    launch.announce(world)
    with Watch() as watch:
        try:
            _measure(world, cases, settings, run, watch)
        except Stopped:
            return first_stop_signal(watch, world)
    return None


def _measure(
    world: launch.World,
    cases: list[AttentionCase],
    settings: RunSettings,
    run: dict[str, Any],
    watch: Watch,
) -> None:
    quiet = world.rank != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=settings.passes, completed=settings.passes_before)
        for size, group in itertools.groupby(cases, key=lambda case: case.size):
            text = f"N={size.world} S={size.seqlen} {size.mask} {size.dtype} Hkv={size.kv_heads}"

            def tick(case: AttentionCase, text: str = text) -> None:
                progress.update(bar, advance=1, description=f"{text} {case.algorithm}")

            cases_of_size = list(group)
            load = provenance.load_average()
            measured = measure_size(world, cases_of_size, tick, watch)
            if world.rank != 0:
                continue
            for case, entries in zip(cases_of_size, measured, strict=True):
                record = records.new_record("attention", case, entries, run)
                record["machine"] = {**run["machine"], "load_average": load}
                write_record(settings.out, record, "the case")


@dataclass
class LocalPasses:
    """What one rank finds out about the cases of one size; lists in the order of the cases."""

    times: list[list[Seconds]]  # of each repetition
    bytes: list[dict[str, dict]]  # sent: {direction: {"bytes", "messages": {collective: number}}}
    peaks: list[tuple[int, str]]  # see ``peak_bytes``
    wire: list[list[int]]  # bytes that left this host in each repetition; 0 if not counted here
    wire_missing: str | None  # why they cannot be counted


def measure_size(
    world: launch.World,
    cases: Sequence[AttentionCase],
    tick: Callable[[AttentionCase], None],
    watch: Watch,
) -> list[dict[str, Any]]:
    """Measures cases of one size side by side.

    tick: called after each pass of a case.  Returns, for each case and on every rank, the entries
    that its record has to itself."""
    size = cases[0]
    kernel = kernels.choose(size.kernel, size.kernel_request(world.device))
    meter = wire.Meter(world)
    baseline = None
    inputs = _inputs(size, size.seqlen // world.world_size, world.rank, world.device)
    if size.baseline and world.rank == 0:
        baseline = Baseline(size, kernel, world)
    passes = {case: partial(_timed_pass, case, kernel, inputs, world.device) for case in cases}
    local = _measure_passes(world, passes, baseline, meter, tick, watch)
    of_ranks: list[LocalPasses] = launch.gather(local, world)
    of_baseline = launch.gather(baseline.result() if baseline else None, world)[0]
    workers, oversubscribed = _workers(world, size)
    measured = []
    for i, case in enumerate(cases):
        seconds = slowest([rank.times[i] for rank in of_ranks])
        peaks = [rank.peaks[i] for rank in of_ranks]
        measured.append(
            {
                "kernel": kernel,
                "workers": workers,
                "oversubscribed": oversubscribed,
                "seconds": seconds,
                **derived(case, seconds, workers, of_baseline),
                "bytes": _bytes(case, [rank.bytes[i] for rank in of_ranks]),
                **_wire(of_ranks, i, meter),
                "memory": {
                    "peak_bytes": max(peak for peak, _ in peaks),
                    "how": peaks[0][1],
                },
            }
        )
    return measured


def _measure_passes(
    world: launch.World,
    passes: Mapping[AttentionCase, Callable[[], Seconds]],
    baseline: "Baseline | None",
    meter: wire.Meter,
    tick: Callable[[AttentionCase], None],
    watch: Watch,
) -> LocalPasses:
    """Does all passes of the cases of one size: in each repetition the baseline, then the cases."""
    size = next(iter(passes))
    times: dict[AttentionCase, list[Seconds]] = {case: [] for case in passes}
    probes = []
    for repetition in range(-size.warmup, size.reps):
        if baseline:
            baseline.run(keep=repetition >= 0)
        for case, run_pass in passes.items():
            watch.barrier_or_stop(world)
            meter.mark()
            if repetition == -size.warmup:
                probes.append(_probe(run_pass, world.device))
            else:
                seconds = run_pass()
                if repetition >= 0:
                    times[case].append(seconds)
            tick(case)
    watch.barrier_or_stop(world)
    meter.mark()
    return LocalPasses(
        times=list(times.values()),
        bytes=[sent for sent, _ in probes],
        peaks=[peak for _, peak in probes],
        wire=_wire_of_repetitions(meter, size, len(passes)),
        wire_missing=meter.missing,
    )


def _wire_of_repetitions(meter: wire.Meter, size: AttentionCase, cases: int) -> list[list[int]]:
    """For each case the bytes that left this host in each timed pass; there is a mark before each
    pass and one after the last."""
    first = size.warmup * cases
    end = first + size.reps * cases
    of_cases = []
    for case in range(cases):
        marks = range(first + case, end, cases)
        of_cases.append([meter.between(mark) for mark in marks])
    return of_cases


def _timed_pass(
    case: AttentionCase,
    kernel: str,
    inputs: tuple[torch.Tensor, ...],
    device: torch.device,
) -> Seconds:
    """Forward and backward of this rank's part of a case."""
    q, k, v, dout = inputs
    forward = partial(
        attention,
        q,
        k,
        v,
        algorithm=case.algorithm,
        causal=case.causal,
        layout=case.layout,
        kernel=kernel,
        overlap=case.overlap,
    )
    return timed(forward, lambda out: torch.autograd.grad(out, (q, k, v), dout), device)


def _workers(world: launch.World, size: AttentionCase) -> tuple[int, bool]:
    """(what computes: threads on a CPU, devices on GPUs; whether threads outnumber cores).
    Collective."""
    hosts = launch.gather((socket.gethostname(), provenance.cores()), world)
    if world.device.type == "cuda":
        return size.world, False
    cores = provenance.cores_of_first_host(hosts)
    return size.world * size.threads, world.local_world * size.threads > cores


def timed(
    forward: Callable[[], Any], backward: Callable[[Any], object], device: torch.device
) -> Seconds:
    """Does both passes, the backward on what the forward returns, and times them."""
    if device.type != "cuda":
        start = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        backward(out)
        return middle - start, time.perf_counter() - start
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    events[0].record()
    out = forward()
    events[1].record()
    backward(out)
    events[2].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1]) / 1e3, events[0].elapsed_time(events[2]) / 1e3


def slowest(per_rank: Sequence[Sequence[Seconds]]) -> dict[str, dict[str, Any]]:
    """Statistics of the slowest rank of each repetition, from every rank's seconds."""
    repetitions = list(zip(*per_rank, strict=True))
    forward = [max(seconds[0] for seconds in ranks) for ranks in repetitions]
    total = [max(seconds[1] for seconds in ranks) for ranks in repetitions]
    backward = [both - first for first, both in zip(forward, total, strict=True)]
    return {
        "forward": records.stats(forward),
        "backward": records.stats(backward),
        "total": records.stats(total),
    }


def derived(
    case: AttentionCase,
    seconds: dict[str, dict[str, Any]],
    workers: int,
    baseline: dict[str, Any] | None,
) -> dict[str, Any]:
    """What follows from the times; definitions in ``records``.

    baseline: the result of ``Baseline``, None if none was asked for."""
    medians = {phase: seconds[phase]["median"] for phase in records.PHASES}
    flops = case.flops()
    return {
        **_against_baseline(medians, workers, baseline),
        "tokens_per_second": case.batch * case.seqlen / medians["total"],
        "tflops_per_rank": {
            phase: flops[phase] / case.world / medians[phase] / 1e12 for phase in records.PHASES
        },
        "flops_rule": FLOPS_RULE,
    }


def _against_baseline(
    medians: dict[str, float], workers: int, baseline: dict[str, Any] | None
) -> dict[str, Any]:
    if baseline is None or baseline["seconds"] is None:
        missing = baseline["missing"] if baseline else "not asked for (--no-baseline)"
        return {"baseline": None, "baseline_missing": missing, "efficiency_percent": None}
    scale = 100 * baseline["workers"] / workers
    return {
        "baseline": {
            "kernel": baseline["kernel"],
            "workers": baseline["workers"],
            "seconds": baseline["seconds"],
        },
        "baseline_missing": None,
        "efficiency_percent": {
            phase: scale * baseline["seconds"][phase]["median"] / medians[phase]
            for phase in records.PHASES
        },
    }


class Baseline:
    """The same kernel over the whole sequence in this process alone, while the other ranks wait."""

    def __init__(self, size: AttentionCase, kernel: str, world: launch.World) -> None:
        self.size, self.device, self.kernel = size, world.device, kernel
        self.threads = size.baseline_threads or min(
            size.world * size.threads, len(provenance.cores())
        )
        self.times: list[Seconds] = []
        self.missing: str | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()
        with self._memory_may_not_suffice():
            self.inputs = _inputs(size, size.seqlen, 0, self.device)

    def run(self, keep: bool) -> None:
        """One pass; its times are kept or not."""
        with self._memory_may_not_suffice():
            if self.missing is None:
                torch.set_num_threads(self.threads)
                seconds = self._once()
                if keep:
                    self.times.append(seconds)
        torch.set_num_threads(self.size.threads)

    def _once(self) -> Seconds:
        kernel = kernels.load(self.kernel)
        q, k, v, dout = (x.detach() for x in self.inputs)
        band = (None, 0 if self.size.causal else None)
        scale = self.size.head_dim**-0.5

        def forward() -> Any:
            return kernel.forward(q, k, v, band=band, scale=scale)

        def backward(result: Any) -> Any:
            out, lse = result
            return kernel.backward(
                dout, q, k, v, out, lse, band=band, scale=scale, deterministic=False
            )

        return timed(forward, backward, self.device)

    @contextlib.contextmanager
    def _memory_may_not_suffice(self) -> Iterator[None]:
        """Where memory is short, `missing` says so, and there is no baseline."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            # On a CPU torch reports it by a plain RuntimeError.
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            self.missing = f"out of memory: {str(error).splitlines()[0]}"
            self.inputs = ()
            self.times = []

    def result(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "workers": 1 if self.device.type == "cuda" else self.threads,
            "seconds": None if self.missing else slowest([self.times]),
            "missing": self.missing,
        }


def _inputs(
    size: AttentionCase, tokens: int, rank: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout of this many tokens.  Times and bytes do not depend on the values, so no rank
    makes the whole sequence."""
    generator = torch.Generator(device).manual_seed(rank)

    def random(heads: int) -> torch.Tensor:
        shape = (size.batch, tokens, heads, size.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[size.dtype])

    q, k, v = random(size.heads), random(size.kv_heads), random(size.kv_heads)
    dout = random(size.heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def _probe(
    call: Callable[[], object], device: torch.device
) -> tuple[dict[str, dict], tuple[int, str]]:
    """(bytes and messages sent in each direction, peak memory) of one pass."""
    with comm.traffic() as sent:
        peak = peak_bytes(call, device)
    counted = {
        "forward": {"bytes": dict(sent.forward), "messages": dict(sent.forward_messages)},
        "backward": {"bytes": dict(sent.backward), "messages": dict(sent.backward_messages)},
    }
    return counted, peak


def _bytes(case: AttentionCase, per_rank: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """What a rank sends, the mean of all: counted, and in closed form."""
    closed_form = ALGORITHMS[case.algorithm].bytes(
        B=case.batch,
        S=case.seqlen,
        H=case.heads,
        Hkv=case.kv_heads,
        D=case.head_dim,
        N=case.world,
        itemsize=DTYPES[case.dtype].itemsize,
        causal=case.causal,
        layout=case.layout,
    )
    sent = {}
    for direction, in_closed_form in zip(records.DIRECTIONS, closed_form, strict=True):
        collectives = _mean([rank[direction]["bytes"] for rank in per_rank])
        sent[direction] = {
            "counted": sum(collectives.values()),
            "closed_form": in_closed_form,
            "collectives": collectives,
            "messages": _mean([rank[direction]["messages"] for rank in per_rank]),
        }
    return sent


def _mean(per_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over ranks of numbers by name; a rank without a name counts as 0."""
    total: Counter = Counter()
    for numbers in per_rank:
        total.update(numbers)
    return {name: number / len(per_rank) for name, number in total.items()}


def _wire(of_ranks: Sequence[LocalPasses], case: int, meter: wire.Meter) -> dict[str, Any]:
    """What left the hosts in each repetition of a case, per rank."""
    reasons = [rank.wire_missing for rank in of_ranks if rank.wire_missing]
    if reasons:
        return {"wire": None, "wire_missing": reasons[0]}
    per_rank = [rank.wire[case] for rank in of_ranks]
    raw = [sum(repetition) / len(of_ranks) for repetition in zip(*per_rank, strict=True)]
    return {
        "wire": {
            "median": statistics.median(raw),
            "raw": raw,
            "interface": ",".join(meter.names),
            "hosts": sum(any(repetitions) for repetitions in per_rank),
        },
        "wire_missing": None,
    }
