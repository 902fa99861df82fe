"""Check and time ringx on one device: `bash script/gpu_check.sh` (its head has launch commands).

1. Every kernel: is it available, and if not why; errors of out, lse, dq, dk, dv against fp64, of a
   single call and of the pieces that one of four ranks computes.
2. Every algorithm on 1, 2, 4, 8 ranks against fp64.  The ranks are threads on one device that
   exchange tensors in memory, since one GPU cannot run several NCCL ranks: the patterns run as they
   are, over a ``ringx.comm.ThreadTransport``.
3. Times: every kernel, and each algorithm's local kernel calls, rank after rank: the compute side
   only, no communication.
4. A training step of apps/gpt and of apps/vit on one rank, with each way to save activations: loss
   and gradient norm against fp64 on the CPU, time and peak memory.

Writes one JSON (schema "ringx-gpu-check/1") and prints tables; exit status 1 if an error is above
its bound or a kernel fails at what it claims to support.  A kernel's own error may be 2 x LIMIT
(relative L2); that of pieces and algorithms 2 x the kernel's own error plus a tenth of LIMIT.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ringx
from ringx import comm, kernels
from ringx.api import plan_call
from ringx.checks import integers
from ringx.comm import FakeTransport, Group, ThreadExchange, ThreadTransport, Transport
from ringx.kernels import KERNELS, Band, CausalAlignment, KernelEntry, KernelRequest, cut
from ringx.layout import Sharding
from ringx.merge import OnlineSoftmax, acc_dtype
from ringx.patterns.registry import algorithms
from ringx.tiles import Tile, tiles

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RESULTS = ("out", "lse", "dq", "dk", "dv")
LABEL = "ranks run as threads on one device: times the compute side only"
PACKAGES = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "amd-aiter",
    "triton",
    "pytorch-triton-rocm",
    "nvidia-cudnn-cu13",
)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report = empty_report(device, args.quick)
    device_name = report["device"]["name"]
    out = Path(args.out) if args.out else default_path(device_name)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{device_name}, torch {report['torch']}, ringx {report['ringx']} {report['commit'] or ''}"
    )
    for check in (check_kernels, check_algorithms, time_kernels, time_algorithms, check_training):
        check(report, device, args)  # prints its table row by row
        # Written after each check, so that an interrupted run keeps what it measured.
        out.write_text(json.dumps(report, indent=1) + "\n")
    misses: list[str] = report["misses"]
    print(f"\n{out}: {len(misses)} misses" + "".join(f"\n  {miss[:96]}" for miss in misses))
    return 1 if misses else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few cases")
    parser.add_argument(
        "--out", help="the JSON file (default: results/gpu_check_<device>_<date>.json)"
    )
    parser.add_argument("--worlds", type=integers, help="numbers of ranks (default: 1,2,4,8)")
    args = parser.parse_args(argv)
    if args.worlds is None:
        args.worlds = [1, 2, 4] if args.quick else [1, 2, 4, 8]
    return args


def default_path(device_name: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(f"results/gpu_check_{slug}_{time.strftime('%Y%m%d')}.json")


# ---- what the checks share


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mask_name(causal: bool) -> str:
    return "causal" if causal else "full"


def whole_band(causal: bool) -> Band:
    """The band of a call of all queries against all keys of a sequence."""
    return (None, 0) if causal else (None, None)


def random_inputs(
    request: KernelRequest, query_count: int, key_count: int, batch: int = 1
) -> list[Tensor]:
    """q, k, v and dout of the request's heads and dtype, from a seed that the lengths determine."""
    generator = torch.Generator(request.device).manual_seed(query_count + key_count)
    query_shape = (batch, query_count, request.heads, request.head_dim)
    key_shape = (batch, key_count, request.kv_heads, request.head_dim)
    tensors = []
    for shape in (query_shape, key_shape, key_shape, query_shape):
        tensor = torch.randn(shape, generator=generator, device=request.device)
        tensors.append(tensor.to(request.dtype))
    return tensors


def attention_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv in fp64 by autograd, of tokens at these global positions."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group_size = q.shape[2] // k.shape[2]
    kv_head = torch.arange(q.shape[2], device=q.device) // group_size
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, kv_head]) * scale
    if causal:
        hidden = k_positions > q_positions[:, None]
        scores = scores.masked_fill(hidden.to(q.device), -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :, kv_head])
    lse = scores.logsumexp(-1)
    gradients = torch.autograd.grad(out, (q, k, v), dout.double())
    return out.detach(), lse.detach(), *gradients


def relative_errors(results: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """The relative L2 error of each of RESULTS."""
    errors = {}
    for name, result, reference in zip(RESULTS, results, expected, strict=True):
        errors[name] = ((result.double() - reference).norm() / reference.norm()).item()
    return errors


def bounds_of_parts(own_errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """What errors may be where results are put together, given those of a single kernel call."""
    return {name: 2 * own_errors[name] + LIMIT[dtype] / 10 for name in RESULTS}


def attempt(function: Callable[..., dict], *args: Any, **options: Any) -> dict:
    """What the function returns, or {"failed": the error}: what a kernel raises is a finding."""
    try:
        return function(*args, **options)
    except Exception as error:  # noqa: BLE001
        return {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def one_line(text: str) -> str:
    return " ".join(text.split())


def note_misses(
    errors: dict[str, float], bounds: dict[str, float], label: str, misses: list[str]
) -> None:
    for name, error in errors.items():
        if not error <= bounds[name]:  # nan is a miss
            misses.append(f"{label}: {name} {error:.1e} > {bounds[name]:.1e}")


# ---- 1. kernels


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """What a kernel is checked with."""

    dtype: torch.dtype
    head_dim: int
    heads: int
    kv_heads: int
    causal: bool

    def request(self, device: torch.device) -> KernelRequest:
        return KernelRequest(device, self.dtype, self.head_dim, self.heads, self.kv_heads)

    def record(self) -> dict[str, Any]:
        return {
            "dtype": dtype_name(self.dtype),
            "D": self.head_dim,
            "H": self.heads,
            "Hkv": self.kv_heads,
            "causal": self.causal,
        }

    def label(self) -> str:
        heads = f"{self.heads}:{self.kv_heads}"
        return f"{dtype_name(self.dtype)} D={self.head_dim} {heads} {mask_name(self.causal)}"

    def columns(self) -> str:
        return (
            f"{dtype_name(self.dtype):10}{self.head_dim:>4}{self.heads:>5}:{self.kv_heads} "
            f"{mask_name(self.causal):7}"
        )


def check_kernels(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    result_columns = "".join(f"{name:>8}" for name in RESULTS)
    print(
        f"\n{'kernel':15}{'dtype':10}{'D':>4}{'H:Hkv':>7} {'mask':7}{result_columns}{'pieces':>9}"
    )
    for name in KERNELS:
        records = []
        for case in kernel_cases(name, args.quick):
            records.append(check_kernel(name, case, device, args.quick, report["misses"]))
        reasons = [record["refused"] for record in records if "refused" in record]
        available = len(reasons) < len(records)
        report["kernels"][name] = {
            "available": available,
            "causal": kernels.load(name).causal_alignment,
            "why_not": sorted(set(reasons)),
            "cases": records,
        }
        if not available:
            print(f"{name:15}not available: {reasons[-1]}"[:100])


def kernel_cases(name: str, quick: bool) -> Iterator[KernelCase]:
    few = quick or name == "flex"  # which is compiled for each dtype and shape
    head_dims = (64,) if few else (40, 64, 128, 20)
    head_counts = ((4, 2),) if few else ((8, 8), (8, 2), (8, 1))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for head_dim in head_dims:
            for heads, kv_heads in head_counts:
                for causal in (True, False):
                    yield KernelCase(dtype, head_dim, heads, kv_heads, causal)


def check_kernel(
    name: str, case: KernelCase, device: torch.device, quick: bool, misses: list[str]
) -> dict[str, Any]:
    """The record of one case: refused, failed, or its errors.  Prints a row unless refused."""
    request = case.request(device)
    record = case.record()
    if reason := kernels.unsupported_reason(name, request):
        record["refused"] = reason
        return record
    record.update(attempt(kernel_errors, name, request, case.causal, quick))
    row = f"{name:15}{case.columns()}"
    if "failed" in record:
        failure = one_line(record["failed"])
        misses.append(f"{name} {case.label()}: {failure}")
        print(f"{row}FAILED {failure}"[:100])
        return record
    bound = dict.fromkeys(RESULTS, 2 * LIMIT[case.dtype])
    note_misses(record["single"], bound, f"{name} {case.label()}", misses)
    note_misses(record["pieces"], record["pieces_bounds"], f"{name} pieces {case.label()}", misses)
    errors = "".join(f"{record['single'][result]:8.0e}" for result in RESULTS)
    print(f"{row}{errors}{max(record['pieces'].values()):9.0e}")
    return record


def kernel_errors(name: str, request: KernelRequest, causal: bool, quick: bool) -> dict[str, Any]:
    """Errors of one call on everything, and of the tiles of one of four ranks."""
    seqlen = 150 if quick else 1000
    single = errors_of_whole(name, request, seqlen, causal)
    rank_tiles, q_positions, k_positions = tiles_of_one_rank(2 * seqlen + 3, causal)
    pieces = errors_of_tiles(name, request, rank_tiles, q_positions, k_positions, causal)
    bounds = bounds_of_parts(single, request.dtype)
    return {"single": single, "pieces": pieces, "pieces_bounds": bounds}


def errors_of_whole(
    name: str, request: KernelRequest, seqlen: int, causal: bool
) -> dict[str, float]:
    """Errors of one call of a kernel on a whole sequence."""
    whole = Tile(slice(0, seqlen), slice(0, seqlen), *whole_band(causal))
    positions = torch.arange(seqlen)
    return errors_of_tiles(name, request, [whole], positions, positions, causal)


def tiles_of_one_rank(seqlen: int, causal: bool) -> tuple[list[Tile], Tensor, Tensor]:
    """What rank 1 of 4 computes in the zigzag layout, and the positions of its queries and keys.

    The keys are those of all ranks, rank after rank.
    """
    sharding = Sharding(seqlen, 4, "zigzag")
    q_runs = sharding.runs(1)
    rank_tiles: list[Tile] = []
    first_row = 0
    for src in range(4):
        k_runs = [run._replace(at=run.at + first_row) for run in sharding.runs(src)]
        rank_tiles += tiles(q_runs, k_runs, window=whole_band(causal))
        first_row += sharding.size(src)
    k_positions = torch.cat([sharding.positions(rank) for rank in range(4)])
    return rank_tiles, sharding.positions(1), k_positions


def errors_of_tiles(
    name: str,
    request: KernelRequest,
    rank_tiles: list[Tile],
    q_positions: Tensor,
    k_positions: Tensor,
    causal: bool,
) -> dict[str, float]:
    """Errors of these tiles' attention, merged, and of its gradients, added up."""
    kernel = kernels.load(name)
    scale = request.head_dim**-0.5
    q, k, v, dout = random_inputs(request, len(q_positions), len(k_positions))
    pieces = []
    for tile in rank_tiles:
        pieces += cut(tile, kernel.causal_alignment)
    merged = OnlineSoftmax(q)
    for t in pieces:
        part = kernel.forward(q[:, t.q], k[:, t.k], v[:, t.k], band=(t.lo, t.hi), scale=scale)
        merged.add(*part, t.q)
    out = merged.out.to(q.dtype).contiguous()
    lse = merged.lse.contiguous()
    dq, dk, dv = (torch.zeros_like(x, dtype=acc_dtype(x.dtype)) for x in (q, k, v))
    for t in pieces:
        part_q, part_k, part_v = kernel.backward(
            dout[:, t.q],
            q[:, t.q],
            k[:, t.k],
            v[:, t.k],
            out[:, t.q],
            lse[:, :, t.q],
            band=(t.lo, t.hi),
            scale=scale,
            deterministic=False,
        )
        dq[:, t.q] += part_q
        dk[:, t.k] += part_k
        dv[:, t.k] += part_v
    expected = attention_by_definition(
        q,
        k,
        v,
        dout,
        q_positions=q_positions,
        k_positions=k_positions,
        causal=causal,
        scale=scale,
    )
    return relative_errors((out, lse, dq, dk, dv), expected)


# ---- ranks as threads


def run_ranks(world: int, call: Callable[[Transport], Any], device: torch.device) -> list[Any]:
    """What call(transport) returns on every rank, each rank on its own thread, without gradients.

    Raises the first error of a rank, unless that rank only waited for another that had failed.
    """
    exchange = ThreadExchange(world)
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def run_rank(rank: int) -> None:
        transport = ThreadTransport(Group.without_peers(rank, world), exchange)
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a setting of each thread
            with torch.no_grad():
                results[rank] = call(transport)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
            exchange.abort()

    threads = [threading.Thread(target=run_rank, args=(r,), daemon=True) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return results


def run_algorithm(
    algorithm: str,
    world: int,
    inputs: list[Tensor],
    *,
    causal: bool,
    layout: Sharding,
    kernel: str,
    overlap: bool,
) -> list[Tensor]:
    """out, lse, dq, dk, dv of the whole sequence, as `world` ranks compute them.

    `inputs` are q, k, v and dout of the whole sequence.
    """
    device = inputs[0].device
    pattern = algorithms()[algorithm].module

    def run_rank(transport: Transport) -> tuple[Tensor, ...]:
        positions = layout.positions(transport.group.rank).to(device)
        q, k, v, dout = (x.index_select(1, positions) for x in inputs)
        with torch.enable_grad():  # so that the plan asks for a kernel that can be trained with
            plan = plan_call(
                q.detach().requires_grad_(),
                k,
                v,
                transport=transport,
                algorithm=algorithm,
                causal=causal,
                layout=layout,
                scale=None,
                kernel=kernel,
                overlap=overlap,
                deterministic=False,
            )
        with comm.phase(algorithm, "forward"):
            out, lse = pattern.forward(q, k, v, plan)
        out = out.to(q.dtype).contiguous()
        lse = lse.contiguous()
        with comm.phase(algorithm, "backward"):
            gradients = pattern.backward(dout, q, k, v, out, lse, plan)
        return out, lse, *gradients

    results_of_ranks = run_ranks(world, run_rank, device)
    positions = torch.cat([layout.positions(rank) for rank in range(world)])
    order = positions.argsort().to(device)
    whole = []
    for name, shards in zip(RESULTS, zip(*results_of_ranks, strict=True), strict=True):
        sequence_dim = 2 if name == "lse" else 1
        whole.append(torch.cat(shards, sequence_dim).index_select(sequence_dim, order))
    return whole


# ---- 2. algorithms


@dataclasses.dataclass(frozen=True)
class AlgorithmCase:
    """What an algorithm is checked with."""

    dtype: torch.dtype
    kernel: str
    algorithm: str
    world: int
    layout: str
    causal: bool
    overlap: bool

    def record(self, seqlen: int) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "world": self.world,
            "layout": self.layout,
            "causal": self.causal,
            "overlap": self.overlap,
            "kernel": self.kernel,
            "dtype": dtype_name(self.dtype),
            "S": seqlen,
        }

    def label(self) -> str:
        return (
            f"{self.algorithm} N={self.world} {self.layout} {mask_name(self.causal)} "
            f"{self.kernel} {dtype_name(self.dtype)}"
        )

    def columns(self) -> str:
        return (
            f"{self.algorithm:10}{self.world:>3} {self.layout:12}{mask_name(self.causal):7}"
            f"{self.kernel:15}{dtype_name(self.dtype):9}"
        )


def algorithm_request(device: torch.device, dtype: torch.dtype) -> KernelRequest:
    return KernelRequest(device, dtype, head_dim=64, heads=8, kv_heads=2)


def check_algorithms(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    print(f"\n{LABEL}")
    result_columns = "".join(f"{name:>8}" for name in RESULTS)
    print(
        f"{'algorithm':10}{'N':>3} {'layout':12}{'mask':7}{'kernel':15}{'dtype':9}{result_columns}"
    )
    seqlen = 211 if args.quick else 2051  # prime, so that shards are uneven
    own_errors: dict[tuple, dict[str, float]] = {}
    for case in algorithm_cases(device, args.worlds):
        request = algorithm_request(device, case.dtype)
        record = case.record(seqlen)
        record.update(attempt(algorithm_errors, case, request, seqlen))
        key = (case.dtype, case.kernel, case.causal)
        if key not in own_errors:
            own_errors[key] = own_errors_of_kernel(case, request, seqlen)
        record["single_bounds"] = bounds_of_parts(own_errors[key], case.dtype)
        report["algorithms"]["cases"].append(record)
        if "failed" in record:
            failure = one_line(record["failed"])
            report["misses"].append(f"{case.label()}: {failure}")
            print(f"{case.columns()}{failure}"[:100])
            continue
        note_misses(record["single"], record["single_bounds"], case.label(), report["misses"])
        errors = "".join(f"{record['single'][name]:8.0e}" for name in RESULTS)
        print(f"{case.columns()}{errors}"[:100])


def algorithm_errors(
    case: AlgorithmCase, request: KernelRequest, seqlen: int
) -> dict[str, dict[str, float]]:
    q, k, v, dout = random_inputs(request, seqlen, seqlen)
    positions = torch.arange(seqlen)
    expected = attention_by_definition(
        q,
        k,
        v,
        dout,
        q_positions=positions,
        k_positions=positions,
        causal=case.causal,
        scale=request.head_dim**-0.5,
    )
    results = run_algorithm(
        case.algorithm,
        case.world,
        [q, k, v, dout],
        causal=case.causal,
        layout=Sharding(seqlen, case.world, case.layout),
        kernel=case.kernel,
        overlap=case.overlap,
    )
    return {"single": relative_errors(results, expected)}


def own_errors_of_kernel(
    case: AlgorithmCase, request: KernelRequest, seqlen: int
) -> dict[str, float]:
    """Errors of one call on one rank; zero where the kernel fails."""
    errors = attempt(errors_of_whole, case.kernel, request, seqlen, case.causal)
    return dict.fromkeys(RESULTS, 0.0) if "failed" in errors else errors


def algorithm_cases(device: torch.device, worlds: list[int]) -> Iterator[AlgorithmCase]:
    """All algorithms, ranks and masks with the kernel that "auto" takes; then the other choices."""
    for dtype in (torch.bfloat16, torch.float32):
        kernel = kernels.choose("auto", algorithm_request(device, dtype))
        for name, algorithm in algorithms().items():
            for world in worlds:
                for causal in (True, False):
                    layout = algorithm.recommended_layout
                    yield AlgorithmCase(dtype, kernel, name, world, layout, causal, overlap=True)
    for name in algorithms():
        yield from other_choices(name, device, max(worlds))


def other_choices(algorithm: str, device: torch.device, world: int) -> Iterator[AlgorithmCase]:
    """Every layout without overlap, then every kernel, once each."""
    dtype = torch.bfloat16
    request = algorithm_request(device, dtype)
    auto = kernels.choose("auto", request)
    for layout in ("contiguous", "striped", "zigzag"):
        yield AlgorithmCase(dtype, auto, algorithm, world, layout, causal=True, overlap=False)
    for kernel in KERNELS:
        if kernel in (auto, "flex") or kernels.unsupported_reason(kernel, request):
            continue
        yield AlgorithmCase(dtype, kernel, algorithm, world, "zigzag", causal=True, overlap=True)


# ---- 3. times


class KernelCall(NamedTuple):
    """The shape of one kernel call: numbers of queries and keys, and which pairs are visible."""

    query_count: int
    key_count: int
    band: Band


class TimingSizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    repetitions: int
    seqlens: tuple[int, ...]

    def request(self, device: torch.device) -> KernelRequest:
        return KernelRequest(device, self.dtype, self.head_dim, self.heads, self.kv_heads)


QUICK_SIZES = TimingSizes(1, 4, 2, 64, torch.bfloat16, repetitions=3, seqlens=(256,))
FULL_SIZES = TimingSizes(1, 32, 8, 128, torch.bfloat16, repetitions=7, seqlens=(8192, 16384, 32768))


def time_kernels(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    print("\nbf16, batch 1; causal: half the work counted")
    print(
        f"{'kernel':15}{'S':>7} {'mask':7}{'fwd ms':>10}{'TFLOP/s':>9}{'bwd ms':>10}{'TFLOP/s':>9}"
    )
    sizes = QUICK_SIZES if args.quick else FULL_SIZES
    for name in KERNELS:
        for seqlen in sizes.seqlens:
            if kernels.unsupported_reason(name, sizes.request(device)):
                continue
            if name == "reference" and seqlen > 4096:  # it holds all scores
                continue
            for causal in (True, False):
                record = time_kernel(name, sizes, seqlen, causal, device)
                report["timings"]["kernels"].append(record)
                if "failed" in record:
                    failure = one_line(record["failed"])
                    report["misses"].append(f"timing {name} S={seqlen}: {failure}")


def time_kernel(
    name: str, sizes: TimingSizes, seqlen: int, causal: bool, device: torch.device
) -> dict[str, Any]:
    """The record of one kernel, length and mask.  Prints a row."""
    record: dict[str, Any] = {
        "kernel": name,
        "B": sizes.batch,
        "S": seqlen,
        "H": sizes.heads,
        "Hkv": sizes.kv_heads,
        "D": sizes.head_dim,
        "dtype": "bfloat16",
        "causal": causal,
    }
    request = sizes.request(device)
    record.update(attempt(kernel_times, name, request, seqlen, causal, sizes.repetitions))
    row = f"{name:15}{seqlen:>7} {mask_name(causal):7}"
    if "failed" in record:
        print(f"{row}{one_line(record['failed'])}"[:100])
        return record
    for direction in ("fwd", "bwd"):
        row += f"{record[f'{direction}_ms']:10.3f}{record[f'{direction}_tflops']:9.1f}"
    print(row)
    return record


def kernel_times(
    name: str, request: KernelRequest, seqlen: int, causal: bool, repetitions: int
) -> dict[str, float]:
    calls = [KernelCall(seqlen, seqlen, whole_band(causal))]
    forward_ms, backward_ms = replay(name, request, calls, calls, repetitions)
    flops = 4 * request.heads * seqlen * seqlen * request.head_dim * (0.5 if causal else 1)
    return {
        "fwd_ms": forward_ms,
        "fwd_tflops": flops / forward_ms / 1e9,
        "bwd_ms": backward_ms,
        "bwd_tflops": 2.5 * flops / backward_ms / 1e9,
    }


def replay(
    name: str,
    request: KernelRequest,
    forward_calls: list[KernelCall],
    backward_calls: list[KernelCall],
    repetitions: int,
) -> tuple[float, float]:
    """Milliseconds (median) of these forward calls and backward calls, on random tensors."""
    kernel = kernels.load(name)
    scale = request.head_dim**-0.5
    calls = [*forward_calls, *backward_calls]
    most_queries = max((call.query_count for call in calls), default=1)
    most_keys = max((call.key_count for call in calls), default=1)
    q, k, v, dout = random_inputs(request, most_queries, most_keys)

    def run_forward() -> None:
        for m, n, band in forward_calls:
            kernel.forward(q[:, :m], k[:, :n], v[:, :n], band=band, scale=scale)

    out, lse = kernel.forward(q, k, v, band=(None, None), scale=scale)

    def run_backward() -> None:
        for m, n, band in backward_calls:
            kernel.backward(
                dout[:, :m],
                q[:, :m],
                k[:, :n],
                v[:, :n],
                out[:, :m],
                lse[:, :, :m],
                band=band,
                scale=scale,
                deterministic=False,
            )

    return (
        median_ms(run_forward, request.device, repetitions),
        median_ms(run_backward, request.device, repetitions),
    )


def median_ms(call: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Milliseconds of one call, without gradients; the first two warm up and do not count."""
    with torch.no_grad():
        times = [time_ms(call, device) for _ in range(repetitions + 2)]
    return max(statistics.median(times[2:]), 1e-6)


def time_ms(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start_time = time.perf_counter()
        call()
        return (time.perf_counter() - start_time) * 1e3
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop)


class Recorder:
    """Takes a kernel's place on one rank: notes the calls and computes nothing."""

    def __init__(self, alignment: CausalAlignment):
        self.causal_alignment = alignment
        self.forward_calls: list[KernelCall] = []
        self.backward_calls: list[KernelCall] = []

    def unsupported_reason(self, request: KernelRequest) -> None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        self.forward_calls.append(KernelCall(q.shape[1], k.shape[1], band))
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        band: Band,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.backward_calls.append(KernelCall(q.shape[1], k.shape[1], band))
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def schedule(
    algorithm: str,
    world: int,
    seqlen: int,
    causal: bool,
    layout: str,
    *,
    alignment: CausalAlignment,
) -> list[Recorder]:
    """The kernel calls of every rank, from runs without peers on one element a token."""
    sharding = Sharding(seqlen, world, layout)
    pattern = algorithms()[algorithm].module
    recorders = []
    for rank in range(world):
        recorder = Recorder(alignment)
        recorders.append(recorder)
        x = torch.zeros(1, sharding.size(rank), 1, 1)
        with recording_kernel(recorder):
            plan = plan_call(
                x,
                x,
                x,
                transport=FakeTransport.of_rank(rank, world),
                algorithm=algorithm,
                causal=causal,
                layout=sharding,
                scale=1.0,
                kernel="recorder",
                overlap=True,
                deterministic=False,
            )
            out, lse = pattern.forward(x, x, x, plan)
            pattern.backward(x, x, x, x, out, lse, plan)
    return recorders


@contextlib.contextmanager
def recording_kernel(recorder: Recorder) -> Iterator[None]:
    """The recorder is the kernel "recorder" as long as the block runs."""
    KERNELS["recorder"] = KernelEntry(recorder, "notes calls")
    try:
        yield
    finally:
        del KERNELS["recorder"]


def time_algorithms(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    print(
        f"\n{LABEL}\nshare: the kernel's time for everything on one device, divided by N, "
        "over that of the slowest rank"
    )
    print(
        f"{'algorithm':10}{'N':>3}{'S':>7} {'mask':7}{'layout':12}"
        f"{'slowest ms':>12}{'mean ms':>10}{'calls':>7}{'share':>9}"
    )
    sizes = QUICK_SIZES if args.quick else FULL_SIZES
    kernel = kernels.choose("auto", sizes.request(device))
    for causal in (True, False):
        seqlen = sizes.seqlens[-1]
        calls = [KernelCall(seqlen, seqlen, whole_band(causal))]
        one_device_ms = sum(replay(kernel, sizes.request(device), calls, calls, sizes.repetitions))
        for algorithm in algorithms():
            for world in args.worlds:
                record = time_algorithm(
                    algorithm,
                    world,
                    sizes,
                    device=device,
                    causal=causal,
                    kernel=kernel,
                    one_device_ms=one_device_ms,
                )
                report["timings"]["algorithms"].append(record)


def time_algorithm(
    algorithm: str,
    world: int,
    sizes: TimingSizes,
    *,
    device: torch.device,
    causal: bool,
    kernel: str,
    one_device_ms: float,
) -> dict[str, Any]:
    """The record of the kernel calls of every rank, timed one rank after another.  Prints a row."""
    seqlen = sizes.seqlens[-1]
    layout = algorithms()[algorithm].recommended_layout
    recorders = schedule(
        algorithm, world, seqlen, causal, layout, alignment=kernels.load(kernel).causal_alignment
    )
    times = []
    call_counts = []
    for recorder in recorders:
        forward_calls = recorder.forward_calls
        backward_calls = recorder.backward_calls
        times.append(
            replay(kernel, sizes.request(device), forward_calls, backward_calls, sizes.repetitions)
        )
        call_counts.append(len(forward_calls) + len(backward_calls))
    totals = [forward_ms + backward_ms for forward_ms, backward_ms in times]
    slowest = max(totals)
    share = one_device_ms / world / slowest
    print(
        f"{algorithm:10}{world:>3}{seqlen:>7} {mask_name(causal):7}{layout:12}{slowest:12.3f}"
        f"{statistics.mean(totals):10.3f}{max(call_counts):>7}{share:>9.1%}"
    )
    return {
        "algorithm": algorithm,
        "world": world,
        "S": seqlen,
        "causal": causal,
        "layout": layout,
        "kernel": kernel,
        "B": sizes.batch,
        "H": sizes.heads,
        "Hkv": sizes.kv_heads,
        "D": sizes.head_dim,
        "one_device_ms": one_device_ms,
        "ranks_ms": times,
        "slowest_ms": slowest,
        "calls": call_counts,
        "share": share,
    }


# ---- 4. training


class StepSize(NamedTuple):
    """One training sample: the grid of an image (None for text), its tokens, a step's FLOPs."""

    grid: tuple[int, int] | None
    tokens: int
    flops: float


Step = Callable[[], tuple[float, float]]
"""Makes one training step and returns its loss and gradient norm."""


class TrainingApp(NamedTuple):
    """An app's model, a short size to check and a long one to time, and what prepares a step.

    make_step(dtype, checkpointing, device, size) builds the engine and the batch.
    """

    model: dict[str, Any]
    short: StepSize
    long: StepSize
    make_step: Callable[[str, str, torch.device, StepSize], Step]


def check_training(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        apps = {"gpt": gpt_app(args.quick), "vit": vit_app(args.quick)}
    except ImportError as error:
        report["training"] = {"refused": str(error)}
        print(f"\ntraining: not tried: {error}")
        return
    print(
        f"\n{'training':10}{'S':>7} {'kept':10}{'loss off by':>12}{'norm off by':>12}"
        f"{'ms':>10}{'TFLOP/s':>9}{'peak GiB':>10}"
    )
    repetitions = 3 if args.quick else 7
    records = []
    for name, app in apps.items():
        expected = app.make_step("float64", "none", torch.device("cpu"), app.short)()
        for checkpointing in ("none", "selective", "full"):
            record = {
                "app": name,
                "checkpointing": checkpointing,
                "S": app.long.tokens,
                "dtype": "bfloat16",
                "model": app.model,
            }
            record.update(
                attempt(measure_training, app, checkpointing, expected, device, repetitions)
            )
            records.append(record)
            note_training_miss(record, report["misses"])
            print(training_row(record))
    report["training"] = {"cases": records}


def measure_training(
    app: TrainingApp,
    checkpointing: str,
    expected: tuple[float, float],
    device: torch.device,
    repetitions: int,
) -> dict[str, Any]:
    """How far a short step's loss and gradient norm are off; a long step's time and memory."""
    loss, norm = app.make_step("bfloat16", checkpointing, device, app.short)()
    expected_loss, expected_norm = expected
    long_step = app.make_step("bfloat16", checkpointing, device, app.long)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    milliseconds = median_ms(torch.enable_grad()(long_step), device, repetitions)
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "loss_off": abs(loss - expected_loss) / abs(expected_loss),
        "norm_off": abs(norm - expected_norm) / abs(expected_norm),
        "ms": milliseconds,
        "tflops": app.long.flops / milliseconds / 1e9,
        "peak_bytes": peak_bytes,
    }


def note_training_miss(record: dict[str, Any], misses: list[str]) -> None:
    label = f"training {record['app']} {record['checkpointing']}"
    if "failed" in record:
        misses.append(f"{label}: {record['failed']}")
    elif record["loss_off"] > 0.01 or record["norm_off"] > 0.05:
        misses.append(f"{label}: {(record['loss_off'], record['norm_off'])}")


def training_row(record: dict[str, Any]) -> str:
    row = f"{record['app'] + ' bf16':10}{record['S']:>7} {record['checkpointing']:10}"
    if "failed" in record:
        return f"{row}{one_line(record['failed'])}"[:100]
    row += f"{record['loss_off']:12.1e}{record['norm_off']:12.1e}"
    row += f"{record['ms']:10.1f}{record['tflops']:9.2f}"
    if record["peak_bytes"] is not None:
        row += f"{record['peak_bytes'] / 2**30:10.2f}"
    return row


def gpt_app(quick: bool) -> TrainingApp:
    """A language model; each token sees those before."""
    from apps.gpt.config import Config, ModelConfig, TrainConfig
    from apps.gpt.flops import flops_per_token
    from apps.gpt.parallel import Attend, build
    from ringx.launch.mesh import Mesh, Shape

    if quick:
        model = ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=320)
        seqlen = 256
    else:
        model = ModelConfig(dim=2048, layers=4, heads=16, kv_heads=4, ffn=5632, vocab=32000)
        seqlen = 16384

    def make_step(dtype: str, checkpointing: str, device: torch.device, size: StepSize) -> Step:
        train = TrainConfig(
            seqlen=size.tokens, global_batch=1, dtype=dtype, checkpointing=checkpointing
        )
        config = Config("check", model, train)
        mesh = Mesh.make(Shape())
        engine = build(config, mesh, Attend(config, mesh), device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.vocab, (1, size.tokens + 1), generator=generator)
        tokens = tokens.to(device)
        positions = torch.arange(size.tokens, device=device)
        batch = (tokens[:, :-1], positions, tokens[:, 1:])
        return lambda: training_step(engine, batch, size.tokens)

    def size_of(tokens: int) -> StepSize:
        return StepSize(None, tokens, flops_per_token(model, tokens).causal * tokens)

    return TrainingApp(
        dataclasses.asdict(model), size_of(min(seqlen, 512)), size_of(seqlen), make_step
    )


def vit_app(quick: bool) -> TrainingApp:
    """A vision transformer; all tokens see each other."""
    from apps.common.parallel import kept_dtype
    from apps.vit.config import Config, ModelConfig, TrainConfig
    from apps.vit.flops import flops_per_token
    from apps.vit.parallel import Attend, build
    from ringx.launch.mesh import Mesh, Shape

    channels = 20
    dim, layers, heads = (64, 2, 4) if quick else (2048, 4, 16)

    def model_of(grid: tuple[int, int]) -> ModelConfig:
        return ModelConfig(
            dim=dim,
            layers=layers,
            heads=heads,
            patch=1,
            height=grid[0],
            width=grid[1],
            in_channels=channels,
            out_channels=channels,
        )

    def make_step(dtype: str, checkpointing: str, device: torch.device, size: StepSize) -> Step:
        assert size.grid is not None
        train = TrainConfig(global_batch=1, dtype=dtype, checkpointing=checkpointing)
        config = Config("check", model_of(size.grid), train=train)
        mesh = Mesh.make(Shape())
        engine = build(config, mesh, Attend(config, mesh), device)
        generator = torch.Generator().manual_seed(0)
        fields = torch.randn(1, size.tokens, channels, generator=generator)
        target = torch.randn(1, size.tokens, channels, generator=generator)
        fields = fields.to(device, kept_dtype(config.train))
        target = target.to(device, kept_dtype(config.train))
        positions = torch.arange(size.tokens, device=device)
        weights = torch.ones(size.tokens, 1, dtype=fields.dtype, device=device)
        batch = (fields, positions, target, weights)
        return lambda: training_step(engine, batch, channels * size.tokens)

    def size_of(grid: tuple[int, int]) -> StepSize:
        tokens = grid[0] * grid[1]
        return StepSize(grid, tokens, flops_per_token(model_of(grid)).full * tokens)

    short_grid = (8, 16)
    long_grid = (8, 16) if quick else (90, 180)
    return TrainingApp(
        dataclasses.asdict(model_of(long_grid)), size_of(short_grid), size_of(long_grid), make_step
    )


def training_step(engine: Any, batch: tuple[Tensor, ...], count: int) -> tuple[float, float]:
    """One step of the optimizer; the loss is the engine's sum over `count` predictions / count."""
    loss = engine(*batch) / count
    engine.backward(loss)
    norm = engine.step(1e-4, 1.0)
    return float(loss.detach()), float(norm)


# ---- the machine


def empty_report(device: torch.device, quick: bool) -> dict[str, Any]:
    """What is known before the first check."""
    on_gpu = device.type == "cuda"
    return {
        "schema": "ringx-gpu-check/1",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": quick,
        "device": describe_device(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "driver": driver_version() if on_gpu else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "packages": package_versions(),
        "ringx": ringx.__version__,
        "commit": first_line_of("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "threads": torch.get_num_threads(),
        "limits": {dtype_name(dtype): limit for dtype, limit in LIMIT.items()},
        "kernels": {},
        "algorithms": {"label": LABEL, "cases": []},
        "training": {},
        "timings": {"label": LABEL, "kernels": [], "algorithms": []},
        "misses": [],
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        name = f"cpu {platform.machine()} ({os.cpu_count()} cores)"
        return {"type": device.type, "name": name}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "arch": getattr(properties, "gcnArchName", None),
    }


def driver_version() -> str | None:
    nvidia = first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if nvidia:
        return nvidia
    amd = Path("/sys/module/amdgpu/version")
    return amd.read_text().strip() if amd.exists() else None


def package_versions() -> dict[str, str]:
    """Of those of PACKAGES that are installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            if version:
                versions[package] = version
    return versions


def first_line_of(*command: str) -> str | None:
    """The first line that a command prints; None if it is not installed or fails."""
    if not shutil.which(command[0]):
        return None
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = result.stdout.strip().splitlines()
    return lines[0] if result.returncode == 0 and lines else None


if __name__ == "__main__":
    sys.exit(main())
