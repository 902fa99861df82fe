"""Check and time ringx on one device: `bash script/gpu_check.sh` (its header has the launch commands).

1. Every kernel: is it available, and if not why; errors of out, lse, dq, dk, dv against fp64, of a single call and of the
   pieces that one of four ranks computes.
2. Every algorithm on 1, 2, 4, 8 ranks against fp64.  The ranks are threads on one device that exchange tensors in memory, since
   one GPU cannot run several NCCL ranks: algo/*.py run as they are, only ``ringx.comm``'s five collectives are replaced.
3. Times: every kernel, and each algorithm's local kernel calls, rank after rank: the compute side only, no communication.
4. A training step of apps/gpt and of apps/vit on one rank, with each way to save activations: loss and gradient norm against
   fp64 on the CPU, time and peak memory.

Writes one JSON (schema "ringx-gpu-check/1") and prints tables; exit status 1 if an error is above its bound or a kernel that
says it can do the job fails.  A kernel's own error may be 2 x LIMIT (relative L2); pieces and algorithms 2 x the kernel's own
error plus a tenth of LIMIT.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ringx
from ringx import comm, kernels
from ringx.api import plan_call
from ringx.comm import Group
from ringx.kernels import KERNELS, KernelRequest, cut
from ringx.layout import Sharding
from ringx.merge import OnlineSoftmax, acc_dtype
from ringx.patterns.registry import algorithms, pattern
from ringx.tiles import Tile, tiles

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("out", "lse", "dq", "dk", "dv")
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
    args = _arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report = _machine(device, args.quick)
    misses: list[str] = report["misses"]
    out = Path(
        args.out
        or f"results/gpu_check_{_slug(report['device']['name'])}_{time.strftime('%Y%m%d')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)

    def save():
        out.write_text(json.dumps(report, indent=1) + "\n")

    print(
        f"{report['device']['name']}, torch {report['torch']}, ringx {report['ringx']} {report['commit'] or ''}"
    )
    for part in (check_kernels, check_algorithms, time_kernels, time_algorithms, check_training):
        part(report, device, args)  # each prints its table as it goes
        save()  # an interrupted run keeps what it measured
    print(f"\n{out}: {len(misses)} misses" + "".join(f"\n  {m[:96]}" for m in misses))
    return 1 if misses else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few cases")
    parser.add_argument(
        "--out", help="the JSON file (default: results/gpu_check_<device>_<date>.json)"
    )
    parser.add_argument(
        "--worlds",
        type=lambda s: [int(x) for x in s.split(",")],
        help="numbers of ranks (default: 1,2,4,8)",
    )
    args = parser.parse_args(argv)
    args.worlds = args.worlds or ([1, 2, 4] if args.quick else [1, 2, 4, 8])
    return args


# ---- 1. kernels


def check_kernels(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    print(
        f"\n{'kernel':15}{'dtype':10}{'D':>4}{'H:Hkv':>7} {'mask':7}"
        + "".join(f"{x:>8}" for x in NAMES)
        + f"{'pieces':>9}"
    )
    for name in KERNELS:
        cases: list[dict] = []
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for D, (H, Hkv), causal in _shapes(name, args.quick):
                need = KernelRequest(device, dtype, D, H, Hkv)
                if reason := kernels.unsupported_reason(name, need):
                    cases.append(_case(dtype, D, H, Hkv, causal) | {"refused": reason})
                    continue
                case = _case(dtype, D, H, Hkv, causal) | _tried(
                    lambda: _kernel_errors(name, need, causal, args.quick)
                )  # noqa: B023
                cases.append(case)
                _judge(case, "single", 2 * LIMIT[dtype], f"{name} {_words(case)}", report["misses"])
                _judge(case, "pieces", None, f"{name} pieces {_words(case)}", report["misses"])
                print(_kernel_line(name, case))
        refused = [c["refused"] for c in cases if "refused" in c]
        able = len(refused) < len(cases)
        about = {
            "available": able,
            "causal": kernels.load(name).causal,
            "why_not": sorted(set(refused)),
        }
        report["kernels"][name] = about | {"cases": cases}
        if not able:
            print(f"{name:15}not available: {refused[-1]}"[:100])


def _shapes(name: str, quick: bool) -> Iterator[tuple[int, tuple[int, int], bool]]:
    slow = name == "flex"  # each dtype and shape is compiled
    for D in (64,) if quick or slow else (40, 64, 128, 20):
        for heads in ((4, 2),) if quick or slow else ((8, 8), (8, 2), (8, 1)):
            for causal in (True, False):
                yield D, heads, causal


def _case(dtype: torch.dtype, D: int, H: int, Hkv: int, causal: bool) -> dict[str, Any]:
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "D": D,
        "H": H,
        "Hkv": Hkv,
        "causal": causal,
    }


def _kernel_errors(name: str, need: KernelRequest, causal: bool, quick: bool) -> dict[str, Any]:
    """Errors of one call on everything, and of the pieces that rank 1 of 4 computes of a longer, uneven sequence."""
    S = 150 if quick else 1000
    whole = [Tile(slice(0, S), slice(0, S), None, 0 if causal else None)]
    everything = torch.arange(S)
    single = _errors(name, need, whole, everything, everything, causal)
    sharding, mine, at = Sharding(2 * S + 3, 4, "zigzag"), [], 0
    for src in range(4):
        k_runs = [run._replace(at=run.at + at) for run in sharding.runs(src)]
        mine += tiles(sharding.runs(1), k_runs, window=(None, 0 if causal else None))
        at += sharding.size(src)
    keys = torch.cat([sharding.positions(r) for r in range(4)])
    pieces = _errors(name, need, mine, sharding.positions(1), keys, causal)
    bounds = {x: 2 * single[x] + LIMIT[need.dtype] / 10 for x in NAMES}
    return {"single": single, "pieces": pieces, "pieces_bounds": bounds}


def _errors(
    name: str,
    need: KernelRequest,
    work: list[Tile],
    q_at: torch.Tensor,
    k_at: torch.Tensor,
    causal: bool,
) -> dict[str, float]:
    kernel, scale = kernels.load(name), need.head_dim**-0.5
    q, k, v, dout = _inputs(need, len(q_at), len(k_at))
    pieces = [piece for tile in work for piece in cut(tile, kernel.causal)]
    acc = OnlineSoftmax(q)
    for t in pieces:
        acc.add(*kernel.fwd(q[:, t.q], k[:, t.k], v[:, t.k], band=(t.lo, t.hi), scale=scale), t.q)
    out, lse = acc.out.to(q.dtype).contiguous(), acc.lse.contiguous()
    grads = [torch.zeros(x.shape, dtype=acc_dtype(x.dtype), device=x.device) for x in (q, k, v)]
    for t in pieces:
        parts = kernel.bwd(
            dout[:, t.q], q[:, t.q], k[:, t.k], v[:, t.k], out[:, t.q], lse[:, :, t.q],
            band=(t.lo, t.hi), scale=scale, deterministic=False,
        )  # fmt: skip
        for grad, part, rows in zip(grads, parts, (t.q, t.k, t.k), strict=True):
            grad[:, rows] += part
    return _relative((out, lse, *grads), definition(q, k, v, dout, q_at, k_at, causal, scale))


def definition(q, k, v, dout, q_at, k_at, causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv in fp64 by autograd, for queries and keys at these global positions."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    head = torch.arange(q.shape[2], device=q.device) // (q.shape[2] // k.shape[2])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, head]) * scale
    if causal:
        scores = scores.masked_fill((k_at > q_at[:, None]).to(q.device), -torch.inf)
    out, lse = (
        torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :, head]),
        scores.logsumexp(-1),
    )
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())


def _inputs(need: KernelRequest, m: int, n: int, B: int = 1) -> list[torch.Tensor]:
    g = torch.Generator(need.device).manual_seed(m + n)
    shapes = [
        (B, s, h, need.head_dim)
        for s, h in ((m, need.heads), (n, need.kv_heads), (n, need.kv_heads), (m, need.heads))
    ]
    return [torch.randn(shape, generator=g, device=need.device).to(need.dtype) for shape in shapes]


def _relative(got, want) -> dict[str, float]:
    return {
        x: ((a.double() - b).norm() / b.norm()).item()
        for x, a, b in zip(NAMES, got, want, strict=True)
    }


def _tried(call: Callable[[], dict]) -> dict:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is a finding
        return {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def _judge(case: dict, what: str, bound: float | None, words: str, misses: list[str]) -> None:
    if "failed" in case:
        if what == "single":
            misses.append(f"{words}: {' '.join(case['failed'].split())}")
        return
    for name, error in case[what].items():
        limit = case[f"{what}_bounds"][name] if bound is None else bound
        if not error <= limit:  # nan is a miss
            misses.append(f"{words}: {name} {error:.1e} > {limit:.1e}")


def _words(case: dict) -> str:
    mask = "causal" if case["causal"] else "full"
    return f"{case['dtype']} D={case['D']} {case['H']}:{case['Hkv']} {mask}"


def _kernel_line(name: str, case: dict) -> str:
    head = f"{name:15}{case['dtype']:10}{case['D']:>4}{case['H']:>5}:{case['Hkv']} {'causal' if case['causal'] else 'full':7}"
    if "failed" in case:
        return (head + "FAILED " + " ".join(case["failed"].split()))[:100]
    worst = max(case["pieces"].values())
    return head + "".join(f"{case['single'][x]:8.0e}" for x in NAMES) + f"{worst:9.0e}"


# ---- 2. algorithms, their ranks as threads


class Exchange:
    """Collectives of `world` threads, in memory: what each hands in is seen by all once all have handed in."""

    def __init__(self, world: int):
        self.slots: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=300)

    @contextlib.contextmanager
    def swap(self, group: Group, x: Any) -> Iterator[list[Any]]:
        self.slots[group.rank] = x
        self.barrier.wait()
        yield list(self.slots)

    def broadcast(self, x, src, group):
        with self.swap(group, x) as everyone:
            if group.rank != src:
                x.copy_(everyone[src])
        self.barrier.wait()
        return comm.Done(x)

    def reduce(self, x, dst, group):
        with self.swap(group, x) as everyone:
            total = torch.stack(everyone).sum(0) if group.rank == dst else None
        self.barrier.wait()
        x.copy_(total) if total is not None else x.fill_(
            torch.nan
        )  # other ranks' buffers are lost, as with gloo
        return comm.Done(x)

    def all_reduce_max(self, x, group):
        with self.swap(group, x) as everyone:
            most = torch.stack(everyone).amax(0)
        self.barrier.wait()
        x.copy_(most)
        return comm.Done(x)

    def all_gather(self, x, group):
        with self.swap(group, x) as everyone:
            out = torch.stack(everyone)
        self.barrier.wait()
        return comm.Done(out)

    def all_to_all(self, parts, incoming, group):
        with self.swap(group, list(parts)) as everyone:
            out = torch.cat([sent[group.rank].reshape(-1) for sent in everyone])
        self.barrier.wait()
        assert out.numel() == sum(incoming)
        return comm.Done(out)


def run_ranks(world: int, call: Callable[[int], Any], device: torch.device) -> list[Any]:
    """[call(rank) of every rank], each on its own thread, with ``ringx.comm``'s collectives replaced by an Exchange."""
    exchange, results, errors = Exchange(world), [None] * world, []
    names = ("broadcast", "reduce", "all_reduce_max", "all_gather", "all_to_all")
    real = {name: getattr(comm, name) for name in names}

    def main(rank: int) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # per thread
            with torch.no_grad():
                results[rank] = call(rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(world)]
    try:
        for name in names:
            setattr(comm, name, getattr(exchange, name))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for name in names:
            setattr(comm, name, real[name])
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results


def run_algorithm(
    algorithm: str,
    world: int,
    x: list[torch.Tensor],
    *,
    causal,
    layout: Sharding,
    kernel: str,
    overlap=True,
):
    """out, lse, dq, dk, dv of the whole sequence, as ``world`` ranks compute them."""
    device, scale = x[0].device, x[0].shape[3] ** -0.5

    def rank(r: int):
        q, k, v, dout = (t.index_select(1, layout.positions(r).to(device)) for t in x)
        with torch.enable_grad():  # the plan asks for a kernel that can be trained with
            wants = q.detach().requires_grad_()
            plan = plan_call(
                wants,
                k,
                v,
                _group(r, world),
                algorithm,
                causal,
                layout,
                scale,
                kernel,
                overlap,
                False,
            )
        module = pattern(algorithm)
        with comm.phase(algorithm, "forward"):
            out, lse = module.forward(q, k, v, plan)
        out, lse = out.to(q.dtype).contiguous(), lse.contiguous()
        with comm.phase(algorithm, "backward"):
            return out, lse, *module.backward(dout, q, k, v, out, lse, plan)

    parts = run_ranks(world, rank, device)
    order = torch.cat([layout.positions(r) for r in range(world)]).argsort().to(device)
    whole = [
        torch.cat(shards, 2 if i == 1 else 1) for i, shards in enumerate(zip(*parts, strict=True))
    ]
    return [t.index_select(2 if i == 1 else 1, order) for i, t in enumerate(whole)]


def _group(rank: int, world: int) -> Group:
    return Group(None, rank, world, tuple(range(world)))


def check_algorithms(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    print(f"\n{LABEL}")
    print(
        f"{'algorithm':10}{'N':>3} {'layout':12}{'mask':7}{'kernel':15}{'dtype':9}{'out':>8}{'lse':>8}{'dq':>8}{'dk':>8}{'dv':>8}"
    )
    cases = report["algorithms"]["cases"]
    S = 211 if args.quick else 2051  # prime: uneven shards
    own: dict[tuple, dict[str, float]] = {}
    for dtype, kernel, algorithm, world, layout, causal, overlap in _algorithm_cases(device, args):
        need = KernelRequest(device, dtype, 64, 8, 2)
        x = _inputs(need, S, S)
        sharding = Sharding(S, world, layout)
        at = torch.arange(S)
        case = {
            "algorithm": algorithm,
            "world": world,
            "layout": layout,
            "causal": causal,
            "overlap": overlap,
            "kernel": kernel,
        }
        case |= {"dtype": str(dtype).removeprefix("torch."), "S": S}

        def errors():
            q, k, v, dout = x  # noqa: B023
            want = definition(q, k, v, dout, at, at, causal, 64**-0.5)  # noqa: B023
            got = run_algorithm(
                algorithm, world, x, causal=causal, layout=sharding, kernel=kernel, overlap=overlap
            )  # noqa: B023
            return {"single": _relative(got, want)}

        case |= _tried(errors)
        if (dtype, kernel, causal) not in own:  # the kernel's own error: one call on one rank
            whole = [Tile(slice(0, S), slice(0, S), None, 0 if causal else None)]
            tried = _tried(lambda: _errors(kernel, need, whole, at, at, causal))  # noqa: B023
            own[dtype, kernel, causal] = dict.fromkeys(NAMES, 0.0) if "failed" in tried else tried
        case["single_bounds"] = {
            n: 2 * own[dtype, kernel, causal][n] + LIMIT[dtype] / 10 for n in NAMES
        }
        mask = "causal" if causal else "full"
        _judge(
            case,
            "single",
            None,
            f"{algorithm} N={world} {layout} {mask} {kernel} {case['dtype']}",
            report["misses"],
        )
        cases.append(case)
        head = f"{algorithm:10}{world:>3} {layout:12}{mask:7}{kernel:15}{case['dtype']:9}"
        tail = (
            case["failed"]
            if "failed" in case
            else "".join(f"{case['single'][n]:8.0e}" for n in NAMES)
        )
        print((head + " ".join(tail.split()) if "failed" in case else head + tail)[:100])


def _algorithm_cases(device: torch.device, args: argparse.Namespace) -> Iterator[tuple]:
    """All algorithms, ranks and masks with the kernel that "auto" takes; then all layouts, kernels and no overlap once each."""
    for dtype in (torch.bfloat16, torch.float32):
        auto = kernels.choose("auto", KernelRequest(device, dtype, 64, 8, 2))
        for name, algorithm in algorithms().items():
            for world in args.worlds:
                for causal in (True, False):
                    yield dtype, auto, name, world, algorithm.recommended_layout, causal, True
    world = max(args.worlds)
    auto = kernels.choose("auto", KernelRequest(device, torch.bfloat16, 64, 8, 2))
    for name in algorithms():
        for layout in ("contiguous", "striped", "zigzag"):
            yield torch.bfloat16, auto, name, world, layout, True, False
        for kernel in KERNELS:
            if kernel not in (auto, "flex") and not kernels.unsupported_reason(
                kernel, KernelRequest(device, torch.bfloat16, 64, 8, 2)
            ):
                yield torch.bfloat16, kernel, name, world, "zigzag", True, True


# ---- 3. times


def time_kernels(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    print("\nbf16, batch 1; causal: half the work counted")
    print(
        f"{'kernel':15}{'S':>7} {'mask':7}{'fwd ms':>10}{'TFLOP/s':>9}{'bwd ms':>10}{'TFLOP/s':>9}"
    )
    B, H, Hkv, D, dtype, reps, sizes = _timing_sizes(args.quick)
    for name in KERNELS:
        for S in sizes:
            need = KernelRequest(device, dtype, D, H, Hkv)
            if kernels.unsupported_reason(name, need) or (name == "reference" and S > 4096):
                continue
            for causal in (True, False):
                record = {
                    "kernel": name,
                    "B": B,
                    "S": S,
                    "H": H,
                    "Hkv": Hkv,
                    "D": D,
                    "dtype": "bfloat16",
                    "causal": causal,
                }
                record |= _tried(lambda: _kernel_times(name, need, S, causal, reps))  # noqa: B023
                report["timings"]["kernels"].append(record)
                head = f"{name:15}{S:>7} {'causal' if causal else 'full':7}"
                if "failed" in record:
                    report["misses"].append(
                        f"timing {name} S={S}: {' '.join(record['failed'].split())}"
                    )
                    print((head + " ".join(record["failed"].split()))[:100])
                    continue
                print(
                    head
                    + "".join(
                        f"{record[f'{w}_ms']:10.3f}{record[f'{w}_tflops']:9.1f}"
                        for w in ("fwd", "bwd")
                    )
                )


def _timing_sizes(quick: bool):
    if quick:
        return 1, 4, 2, 64, torch.bfloat16, 3, (256,)
    return 1, 32, 8, 128, torch.bfloat16, 7, (8192, 16384, 32768)


def _kernel_times(
    name: str, need: KernelRequest, S: int, causal: bool, reps: int
) -> dict[str, float]:
    calls = [(S, S, (None, 0 if causal else None))]
    fwd, bwd = _replay(name, need, calls, calls, reps)
    work = 4 * need.heads * S * S * need.head_dim * (0.5 if causal else 1)
    return {
        "fwd_ms": fwd,
        "fwd_tflops": work / fwd / 1e9,
        "bwd_ms": bwd,
        "bwd_tflops": 2.5 * work / bwd / 1e9,
    }


def _replay(
    name: str, need: KernelRequest, forward: list, backward: list, reps: int
) -> tuple[float, float]:
    """Milliseconds (median) of these kernel calls, (queries, keys, band) each, on random tensors."""
    kernel, scale = kernels.load(name), need.head_dim**-0.5
    longest = [max((c[i] for c in (*forward, *backward)), default=1) for i in (0, 1)]
    q, k, v, dout = _inputs(need, *longest)

    def fwd():
        for m, n, band in forward:
            kernel.fwd(q[:, :m], k[:, :n], v[:, :n], band=band, scale=scale)

    out, lse = kernel.fwd(q, k, v, band=(None, None), scale=scale)

    def bwd():
        for m, n, band in backward:
            kernel.bwd(
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

    return _median_ms(fwd, need.device, reps), _median_ms(bwd, need.device, reps)


def _median_ms(call: Callable[[], None], device: torch.device, reps: int) -> float:
    times = []
    with torch.no_grad():
        for _ in range(reps + 2):  # two for warming up
            if device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                stop.record()
                torch.cuda.synchronize(device)
                times.append(start.elapsed_time(stop))
            else:
                began = time.perf_counter()
                call()
                times.append((time.perf_counter() - began) * 1e3)
    return max(statistics.median(times[2:]), 1e-6)


class Recorder:
    """In a kernel's place: notes each rank's calls and computes nothing."""

    def __init__(self, causal: str, world: int):
        self.causal = causal
        self.forward: list[list] = [[] for _ in range(world)]
        self.backward: list[list] = [[] for _ in range(world)]
        self.me = threading.local()

    def fwd(self, q, k, v, *, band, scale):
        self.forward[self.me.rank].append((q.shape[1], k.shape[1], band))
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    def bwd(self, dout, q, k, v, out, lse, *, band, scale, deterministic):
        self.backward[self.me.rank].append((q.shape[1], k.shape[1], band))
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def schedule(algorithm: str, world: int, S: int, causal: bool, layout: str, kind: str) -> Recorder:
    """The kernel calls of every rank, found by running the algorithm on tensors of one element a token."""
    recorder, real, sharding = Recorder(kind, world), kernels.load, Sharding(S, world, layout)

    def rank(r: int) -> None:
        recorder.me.rank = r
        x = torch.zeros(1, sharding.size(r), 1, 1)
        plan = plan_call(
            x, x, x, _group(r, world), algorithm, causal, sharding, 1.0, "reference", True, False
        )
        plan = dataclasses.replace(plan, kernel="recorder")
        out, lse = pattern(algorithm).forward(x, x, x, plan)
        pattern(algorithm).backward(x, x, x, x, out, lse, plan)

    kernels.load = lambda name: recorder if name == "recorder" else real(name)  # type: ignore[assignment,return-value]
    try:
        run_ranks(world, rank, torch.device("cpu"))
    finally:
        kernels.load = real
    return recorder


def time_algorithms(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    print(
        f"\n{LABEL}\nshare: the kernel's time for everything on one device, divided by N, over that of the slowest rank"
    )
    print(
        f"{'algorithm':10}{'N':>3}{'S':>7} {'mask':7}{'layout':12}{'slowest ms':>12}{'mean ms':>10}{'calls':>7}{'share':>9}"
    )
    B, H, Hkv, D, dtype, reps, sizes = _timing_sizes(args.quick)
    S, need = sizes[-1], KernelRequest(device, dtype, D, H, Hkv)
    kernel = kernels.choose("auto", need)
    for causal in (True, False):
        calls = [(S, S, (None, 0 if causal else None))]
        one = sum(_replay(kernel, need, calls, calls, reps))
        for name, algorithm in algorithms().items():
            for world in args.worlds:
                layout = algorithm.recommended_layout
                recorder = schedule(name, world, S, causal, layout, kernels.load(kernel).causal)
                times = [
                    _replay(kernel, need, fwd, bwd, reps)
                    for fwd, bwd in zip(recorder.forward, recorder.backward, strict=True)
                ]
                slowest = max(sum(t) for t in times)
                record = {
                    "algorithm": name,
                    "world": world,
                    "S": S,
                    "causal": causal,
                    "layout": layout,
                    "kernel": kernel,
                }
                record |= {
                    "B": B,
                    "H": H,
                    "Hkv": Hkv,
                    "D": D,
                    "one_device_ms": one,
                    "ranks_ms": times,
                    "slowest_ms": slowest,
                }
                record |= {
                    "calls": [
                        len(f) + len(b)
                        for f, b in zip(recorder.forward, recorder.backward, strict=True)
                    ]
                }
                record["share"] = one / world / slowest
                report["timings"]["algorithms"].append(record)
                mean = statistics.mean(sum(t) for t in times)
                print(
                    f"{name:10}{world:>3}{S:>7} {'causal' if causal else 'full':7}{layout:12}{slowest:12.3f}{mean:10.3f}"
                    f"{max(record['calls']):>7}{record['share']:>9.1%}"
                )


# ---- 4. training


def check_training(report: dict, device: torch.device, args: argparse.Namespace) -> None:
    try:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        apps = {"gpt": _gpt(args.quick), "vit": _vit(args.quick)}
    except ImportError as error:
        report["training"] = {"refused": str(error)}
        print(f"\ntraining: not tried: {error}")
        return
    reps, cases = 3 if args.quick else 7, []
    print(
        f"\n{'training':10}{'S':>7} {'kept':10}{'loss off by':>12}{'norm off by':>12}{'ms':>10}{'TFLOP/s':>9}{'peak GiB':>10}"
    )
    for app, (model, short, long, step) in apps.items():
        S = long[1]
        want = step("float64", "none", torch.device("cpu"), short)()
        for checkpointing in ("none", "selective", "full"):
            case: dict[str, Any] = {
                "app": app,
                "checkpointing": checkpointing,
                "S": S,
                "dtype": "bfloat16",
                "model": model,
            }

            def measure(
                checkpointing=checkpointing, step=step, short=short, long=long, want=want
            ) -> dict[str, Any]:
                got = step("bfloat16", checkpointing, device, short)()
                once = step("bfloat16", checkpointing, device, long)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                with torch.enable_grad():
                    ms = _median_ms(lambda: torch.enable_grad()(once)(), device, reps)
                peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                off = [abs(a - b) / abs(b) for a, b in zip(got, want, strict=True)]
                return {
                    "loss_off": off[0],
                    "norm_off": off[1],
                    "ms": ms,
                    "tflops": long[2] / ms / 1e9,
                    "peak_bytes": peak,
                }

            case |= _tried(measure)
            cases.append(case)
            if "failed" in case or case["loss_off"] > 0.01 or case["norm_off"] > 0.05:
                why = case.get("failed") or (case["loss_off"], case["norm_off"])
                report["misses"].append(f"training {app} {checkpointing}: {why}")
            head = f"{app + ' bf16':10}{S:>7} {checkpointing:10}"
            if "failed" in case:
                print((head + " ".join(case["failed"].split()))[:100])
                continue
            peak = "" if case["peak_bytes"] is None else f"{case['peak_bytes'] / 2**30:10.2f}"
            print(
                head
                + f"{case['loss_off']:12.1e}{case['norm_off']:12.1e}{case['ms']:10.1f}{case['tflops']:9.2f}{peak}"
            )
    report["training"] = {"cases": cases}


def _gpt(quick: bool) -> tuple:
    """The model, a short and a long size (grid, tokens, FLOPs), and what makes a step of dtype, checkpointing, device and size."""
    from apps.gpt.config import Config, ModelConfig, TrainConfig
    from apps.gpt.flops import flops_per_token
    from apps.gpt.parallel import Attend, build
    from ringx.launch.mesh import Mesh, Shape

    model, S = ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=320), 256
    if not quick:
        model, S = (
            ModelConfig(dim=2048, layers=4, heads=16, kv_heads=4, ffn=5632, vocab=32000),
            16384,
        )

    def step(
        dtype: str, checkpointing: str, on: torch.device, size: tuple
    ) -> Callable[[], tuple[float, float]]:
        length = size[1]
        config = Config(
            "check",
            model,
            TrainConfig(seqlen=length, global_batch=1, dtype=dtype, checkpointing=checkpointing),
        )
        engine = build(config, mesh := Mesh.make(Shape()), Attend(config, mesh), on)
        x = torch.randint(
            0, model.vocab, (1, length + 1), generator=torch.Generator().manual_seed(0)
        ).to(on)
        return lambda: _stepped(
            engine, (x[:, :-1], torch.arange(length, device=on), x[:, 1:]), length
        )

    sizes = [(None, n, flops_per_token(model, n).causal * n) for n in (min(S, 512), S)]
    return dataclasses.asdict(model), *sizes, step


def _vit(quick: bool) -> tuple:
    """The same of a ViT, whose tokens all see each other."""
    from apps.common.parallel import kept_dtype
    from apps.vit.config import Config, ModelConfig, TrainConfig
    from apps.vit.flops import flops_per_token
    from apps.vit.parallel import Attend, build
    from ringx.launch.mesh import Mesh, Shape

    shape = dict(dim=64, layers=2, heads=4) if quick else dict(dim=2048, layers=4, heads=16)

    def model_of(grid: tuple[int, int]) -> ModelConfig:
        return ModelConfig(
            **shape, patch=1, height=grid[0], width=grid[1], in_channels=20, out_channels=20
        )

    def step(
        dtype: str, checkpointing: str, on: torch.device, size: tuple
    ) -> Callable[[], tuple[float, float]]:
        model, tokens = model_of(size[0]), size[1]
        config = Config(
            "check",
            model,
            train=TrainConfig(global_batch=1, dtype=dtype, checkpointing=checkpointing),
        )
        engine = build(config, mesh := Mesh.make(Shape()), Attend(config, mesh), on)
        draw = torch.Generator().manual_seed(0)
        x, target = (
            torch.randn(1, tokens, 20, generator=draw).to(on, kept_dtype(config.train))
            for _ in range(2)
        )
        batch = (
            x,
            torch.arange(tokens, device=on),
            target,
            torch.ones(tokens, 1, dtype=x.dtype, device=on),
        )
        return lambda: _stepped(engine, batch, 20 * tokens)

    grids = ((8, 16), (8, 16) if quick else (90, 180))
    sizes = [(g, g[0] * g[1], flops_per_token(model_of(g)).full * g[0] * g[1]) for g in grids]
    return dataclasses.asdict(model_of(grids[1])), *sizes, step


def _stepped(engine: Any, batch: tuple, count: int) -> tuple[float, float]:
    loss = engine(*batch) / count
    engine.backward(loss)
    return float(loss.detach()), float(engine.step(1e-4, 1.0))


# ---- the machine


def _machine(device: torch.device, quick: bool) -> dict[str, Any]:
    gpu = device.type == "cuda"
    about: dict[str, Any] = {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
    }
    if gpu:
        found = torch.cuda.get_device_properties(device)
        about |= {"memory": found.total_memory, "multiprocessors": found.multi_processor_count}
        about |= {
            "capability": f"{found.major}.{found.minor}",
            "arch": getattr(found, "gcnArchName", None),
        }
    return {
        "schema": "ringx-gpu-check/1",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": quick,
        "device": about,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "ringx": ringx.__version__,
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "threads": torch.get_num_threads(),
        "limits": {str(dtype).removeprefix("torch."): limit for dtype, limit in LIMIT.items()},
        "kernels": {},
        "algorithms": {"label": LABEL, "cases": []},
        "training": {},
        "timings": {"label": LABEL, "kernels": [], "algorithms": []},
        "misses": [],
    }


def _driver() -> str | None:
    amd = Path("/sys/module/amdgpu/version")
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found or (amd.read_text().strip() if amd.exists() else None)


def _output(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return (
        done.stdout.strip().splitlines()[0]
        if done.returncode == 0 and done.stdout.strip()
        else None
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return f"cpu {platform.machine()} ({os.cpu_count()} cores)"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
