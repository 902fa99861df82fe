"""ringx verify: is every algorithm exact here?  Each against full attention in fp64, on real ranks.

    ringx verify --nproc 4
    ringx verify --nproc 1,2,3,4,8 --grid --json results/verify.json      # everything; takes a while
    torchrun --nproc_per_node 8 -m ringx verify

A case passes if the relative L2 errors of out, lse, dq, dk and dv are within the dtype's limit, and within twice those of the
same kernel on the whole sequence in one process (errors must not grow with N), and a second run gives bitwise the same.
Fresh memory is filled with NaN, so that reading what nobody wrote shows.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import Progress

from .. import kernels, launch
from ..api import attention
from ..checks import DTYPES, MASKS, choices, integers, switches
from ..kernels import reference
from ..layout import LAYOUTS, Sharding
from ..merge import acc_dtype
from ..patterns.registry import ALGORITHMS
from ..sharding import positions

LIMITS = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
NAMES = ("out", "lse", "dq", "dk", "dv")
FLOOR = 16  # units of the accumulator's epsilon below which two errors count as equal


@dataclass(frozen=True)
class Case:
    algorithm: str
    layout: str
    mask: str
    dtype: str
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    overlap: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc",
        type=integers,
        default=None,
        metavar="N,...",
        help="ranks (default: 2, or the launcher's)",
    )
    parser.add_argument(
        "--algorithms", type=choices(ALGORITHMS), default=list(ALGORITHMS), metavar="NAME,..."
    )
    parser.add_argument(
        "--layouts", type=choices(LAYOUTS), default=list(LAYOUTS), metavar="NAME,..."
    )
    parser.add_argument(
        "--masks", type=choices(MASKS), default=list(MASKS), metavar="NAME,...", help="causal, full"
    )
    parser.add_argument(
        "--dtypes", type=choices(DTYPES), default=["fp64", "fp32", "bf16"], metavar="NAME,..."
    )
    parser.add_argument(
        "--seqlens",
        type=integers,
        default=[256, 251],
        metavar="S,...",
        help="global lengths, any >= N",
    )
    parser.add_argument("--heads", type=int, default=4, metavar="H")
    parser.add_argument("--kv-heads", type=integers, default=[2], metavar="H,...")
    parser.add_argument("--head-dims", type=integers, default=[64], metavar="D,...")
    parser.add_argument("--overlap", type=switches, default=[True, False], metavar="on,off")
    parser.add_argument("--kernel", default="auto", help="local kernel (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--grid", action="store_true", help="kv heads 1, 2 and H; head sizes 40, 64 and 128"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write every case and its errors"
    )


def main(args: argparse.Namespace) -> int:
    if args.grid:
        args.kv_heads, args.head_dims = sorted({1, 2, args.heads}), [40, 64, 128]
    if bad := [h for h in args.kv_heads if args.heads % h]:
        raise ValueError(f"--heads {args.heads} is no multiple of --kv-heads {bad[0]}.")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.touch()
    choices_ = (args.algorithms, args.layouts, args.masks, args.dtypes, args.seqlens, [args.heads])
    cases = [
        Case(*values)
        for values in itertools.product(*choices_, args.kv_heads, args.head_dims, args.overlap)
    ]
    worlds = args.nproc or [None if launch.launched() else 2]
    if (most := max(launch.world_size(n) for n in worlds)) > min(args.seqlens):
        raise ValueError(
            f"--seqlens {min(args.seqlens)} is shorter than --nproc {most}: some rank would hold no token."
        )
    results = []
    for nproc in worlds:
        results += launch.run(verify_on_rank, nproc, cases, args.kernel, device=args.device)[0]
        if (
            args.json is not None and results[0]["rank"] == 0
        ):  # after each number of ranks: an interrupted run keeps those
            args.json.write_text(
                json.dumps(
                    {"torch": torch.__version__, "limits": LIMITS, "cases": results}, indent=1
                )
                + "\n"
            )
    if results[0]["rank"] == 0:
        report(results)
    return 0 if all(r["ok"] for r in results) else 1


def verify_on_rank(world: launch.World, cases: list[Case], kernel: str) -> list[dict]:
    """One record per case, the same on every rank."""
    launch.announce(world)
    results = []
    with (
        poisoned_memory(),
        Progress(transient=True, disable=world.rank != 0 or not sys.stdout.isatty()) as progress,
    ):
        for case in progress.track(cases, description=f"verify on {world.world_size} ranks"):
            results.append(
                {
                    "rank": world.rank,
                    "nproc": world.world_size,
                    **asdict(case),
                    **_measure(world, case, kernel),
                }
            )
    return results


def _measure(world: launch.World, case: Case, kernel: str) -> dict:
    shape = (case.seqlen, case.heads, case.kv_heads, case.head_dim)
    inputs, want, single = _expected(case.mask, case.dtype, *shape, kernel, world.device)
    sharding = Sharding(case.seqlen, world.world_size, case.layout)
    where = positions(case.seqlen, layout=sharding).to(world.device)

    def once() -> dict[str, torch.Tensor]:
        q, k, v = (x[:, where].clone().requires_grad_() for x in inputs[:3])
        out, lse = attention(
            q, k, v, algorithm=case.algorithm, causal=case.mask == "causal", layout=sharding,
            kernel=kernel, overlap=case.overlap, return_lse=True, deterministic=world.device.type == "cpu",
        )  # fmt: skip
        out.backward(inputs[3][:, where])
        return dict(zip(NAMES, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=True))

    got, again = once(), once()
    repeats = torch.tensor(float(all(torch.equal(got[n], again[n]) for n in NAMES)))
    squares = torch.zeros(
        len(NAMES), 2, dtype=torch.float64
    )  # of the difference and of what is wanted, on this rank
    for i, name in enumerate(NAMES):
        mine = want[name].index_select(2 if name == "lse" else 1, where)
        squares[i, 0], squares[i, 1] = (
            (got[name].double() - mine).square().sum(),
            mine.square().sum(),
        )
    if world.world_size > 1:
        squares, repeats = squares.to(world.device), repeats.to(world.device)
        dist.all_reduce(squares)
        dist.all_reduce(repeats, dist.ReduceOp.MIN)
    errors = dict(zip(NAMES, (squares[:, 0] / squares[:, 1]).sqrt().tolist(), strict=True))
    repeatable = (
        bool(repeats.item()) if world.device.type == "cpu" else None
    )  # GPU kernels are only asked to repeat on demand
    misses = missed(errors, single, case.dtype) + ([] if repeatable is not False else ["repeat"])
    return {
        "errors": errors,
        "single_process": single,
        "repeatable": repeatable,
        "missed": misses,
        "ok": not misses,
    }


def missed(errors: dict[str, float], single: dict[str, float], dtype: str) -> list[str]:
    """The names whose error is above the dtype's limit, or above twice the single process's (and not just rounding), or NaN."""
    floor = FLOOR * torch.finfo(acc_dtype(DTYPES[dtype])).eps
    return [n for n in NAMES if not errors[n] <= min(LIMITS[dtype], max(2 * single[n], floor))]


@lru_cache(maxsize=8)
def _expected(mask, dtype, seqlen, heads, kv_heads, head_dim, kernel, device):
    """Inputs (the same on every rank), what fp64 full attention makes of them, the kernel's own errors on the whole sequence."""
    g = torch.Generator().manual_seed(seqlen)
    inputs = [
        torch.randn(2, seqlen, h, head_dim, generator=g).to(device, DTYPES[dtype])
        for h in (heads, kv_heads, kv_heads, heads)
    ]
    q, k, v, dout = inputs
    band, scale = (None, 0 if mask == "causal" else None), head_dim**-0.5

    def run(fwd, bwd, dout, q, k, v):
        out, lse = fwd(q, k, v, band=band, scale=scale)
        grads = bwd(dout, q, k, v, out, lse, band=band, scale=scale, deterministic=False)
        return dict(zip(NAMES, (out, lse, *grads), strict=True))

    want = run(reference.forward, reference.backward, *(x.double() for x in (dout, q, k, v)))
    chosen = kernels.load(
        kernels.choose(
            kernel, kernels.KernelRequest(device, DTYPES[dtype], head_dim, heads, kv_heads)
        )
    )
    got = run(chosen.forward, chosen.backward, dout, q, k, v)
    return (
        inputs,
        want,
        {n: ((got[n].double() - want[n]).norm() / want[n].norm()).item() for n in NAMES},
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like return NaN inside."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def report(results: list[dict]) -> None:
    """One line per algorithm, layout, mask and dtype: the worst errors over all other choices."""
    print(
        "Relative L2 error against full attention in fp64, the worst over ranks, lengths, heads and overlap"
    )
    print(
        f"{'algorithm':10}{'layout':12}{'mask':8}{'dtype':7}{'cases':>6}"
        + "".join(f"{n:>10}" for n in NAMES)
        + "  "
    )
    for key, rows in itertools.groupby(sorted(results, key=_key), key=_key):
        group = list(rows)
        worst = [max((r["errors"][n] for r in group), key=lambda e: (e != e, e)) for n in NAMES]
        misses = sorted({m for r in group for m in r["missed"]})
        print(
            f"{key[0]:10}{key[1]:12}{key[2]:8}{key[3]:7}{len(group):6}"
            + "".join(f"{e:10.1e}" for e in worst)
            + (f"  MISS {', '.join(misses)}" if misses else "")
        )
    missed = sum(not r["ok"] for r in results)
    ranks = ", ".join(str(n) for n in sorted({r["nproc"] for r in results}))
    print(
        f"{len(results)} cases on {ranks} ranks: {missed or 'none'} missed"
        + (" (ok)" if not missed else "")
    )


def _key(r: dict) -> tuple:
    return r["algorithm"], r["layout"], r["mask"], r["dtype"]
