"""ringx verify: is every algorithm exact here?  Each against full attention in fp64, on real ranks.

    ringx verify --nproc 4
    ringx verify --nproc 1,2,3,4,8 --grid --json results/verify.json    # everything; takes a while
    torchrun --nproc_per_node 8 -m ringx verify

A case passes if the relative L2 errors of out, lse, dq, dk and dv are within the dtype's limit, and
within twice those of the same kernel on the whole sequence in one process (errors must not grow
with N), and a second run gives bitwise the same.  Fresh memory is filled with NaN, so that reading
what nobody wrote shows.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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
class VerifyCase:
    """One combination of what ``ringx verify`` varies, on one number of ranks."""

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
    kv_heads, head_dims = args.kv_heads, args.head_dims
    if args.grid:
        kv_heads, head_dims = sorted({1, 2, args.heads}), [40, 64, 128]
    world_sizes = args.nproc or [None if launch.launched() else 2]
    _check_sizes(args, kv_heads, world_sizes)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.touch()
    results = _verify_all(args, world_sizes, _cases(args, kv_heads, head_dims))
    if results[0]["rank"] == 0:
        report(results)
    return 0 if all(result["ok"] for result in results) else 1


def _verify_all(
    args: argparse.Namespace, world_sizes: Sequence[int | None], cases: list[VerifyCase]
) -> list[dict[str, Any]]:
    """The results of the cases on each number of ranks; rank 0 writes them to --json."""
    results: list[dict[str, Any]] = []
    for world_size in world_sizes:
        of_ranks = launch.run(verify_on_rank, world_size, cases, args.kernel, device=args.device)
        results += of_ranks[0]
        # After each number of ranks: an interrupted run keeps those.
        if args.json is not None and results[0]["rank"] == 0:
            _write_results(args.json, results)
    return results


def _check_sizes(
    args: argparse.Namespace, kv_heads: Sequence[int], world_sizes: Sequence[int | None]
) -> None:
    for number in kv_heads:
        if args.heads % number:
            raise ValueError(f"--heads {args.heads} is no multiple of --kv-heads {number}.")
    most = max(launch.world_size(world_size) for world_size in world_sizes)
    if most > min(args.seqlens):
        raise ValueError(
            f"--seqlens {min(args.seqlens)} is shorter than --nproc {most}:"
            " some rank would hold no token."
        )


def _cases(
    args: argparse.Namespace, kv_heads: Sequence[int], head_dims: Sequence[int]
) -> list[VerifyCase]:
    combinations = itertools.product(
        args.algorithms,
        args.layouts,
        args.masks,
        args.dtypes,
        args.seqlens,
        [args.heads],
        kv_heads,
        head_dims,
        args.overlap,
    )
    return [VerifyCase(*values) for values in combinations]


def _write_results(path: Path, results: list[dict[str, Any]]) -> None:
    content = {"torch": torch.__version__, "limits": LIMITS, "cases": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


# ---- on every rank


def verify_on_rank(
    world: launch.World, cases: list[VerifyCase], kernel: str
) -> list[dict[str, Any]]:
    """One result per case, the same on every rank."""
    launch.announce(world)
    quiet = world.rank != 0 or not sys.stdout.isatty()
    results = []
    with poisoned_memory(), Progress(transient=True, disable=quiet) as progress:
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


def _measure(world: launch.World, case: VerifyCase, kernel: str) -> dict[str, Any]:
    """The errors of a case, and whether they are small enough.  Collective."""
    reference_run = _reference_run(
        case.mask,
        case.dtype,
        case.seqlen,
        case.heads,
        case.kv_heads,
        case.head_dim,
        kernel,
        world.device,
    )
    sharding = Sharding(case.seqlen, world.world_size, case.layout)
    local_tokens = positions(case.seqlen, layout=sharding).to(world.device)
    first = _attend(world, case, kernel, sharding, reference_run.inputs, local_tokens)
    second = _attend(world, case, kernel, sharding, reference_run.inputs, local_tokens)
    equal = all(torch.equal(first[name], second[name]) for name in NAMES)
    errors, equal_on_all = _over_ranks(world, first, reference_run.exact, local_tokens, equal)
    # Kernels on GPUs repeat their results only where they are asked to.
    repeatable = equal_on_all if world.device.type == "cpu" else None
    too_large = missed(errors, reference_run.kernel_errors, case.dtype)
    if repeatable is False:
        too_large.append("repeat")
    return {
        "errors": errors,
        "single_process": reference_run.kernel_errors,
        "repeatable": repeatable,
        "missed": too_large,
        "ok": not too_large,
    }


def _attend(
    world: launch.World,
    case: VerifyCase,
    kernel: str,
    sharding: Sharding,
    inputs: Sequence[torch.Tensor],
    local_tokens: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """This rank's part of out, lse, dq, dk, dv."""
    q, k, v = (tensor[:, local_tokens].clone().requires_grad_() for tensor in inputs[:3])
    dout = inputs[3][:, local_tokens]
    out, lse = attention(
        q,
        k,
        v,
        algorithm=case.algorithm,
        causal=case.mask == "causal",
        layout=sharding,
        kernel=kernel,
        overlap=case.overlap,
        return_lse=True,
        deterministic=world.device.type == "cpu",
    )
    out.backward(dout)
    results: tuple[Any, ...] = (out.detach(), lse.detach(), q.grad, k.grad, v.grad)
    return dict(zip(NAMES, results, strict=True))


def _over_ranks(
    world: launch.World,
    local: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    local_tokens: torch.Tensor,
    equal: bool,
) -> tuple[dict[str, float], bool]:
    """(relative L2 errors of the whole sequence, whether `equal` holds on all ranks).

    local: this rank's part; exact: the whole sequence."""
    squares = torch.zeros(len(NAMES), 2, dtype=torch.float64)  # of the difference, of the exact
    for i, name in enumerate(NAMES):
        token_dim = 2 if name == "lse" else 1
        exact_part = exact[name].index_select(token_dim, local_tokens)
        squares[i, 0] = (local[name].double() - exact_part).square().sum()
        squares[i, 1] = exact_part.square().sum()
    all_equal = torch.tensor(float(equal))
    if world.world_size > 1:
        squares, all_equal = squares.to(world.device), all_equal.to(world.device)
        dist.all_reduce(squares)
        dist.all_reduce(all_equal, dist.ReduceOp.MIN)
    relative = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    return dict(zip(NAMES, relative, strict=True)), bool(all_equal.item())


def missed(errors: dict[str, float], single: dict[str, float], dtype: str) -> list[str]:
    """The names whose error is above the dtype's limit, or above twice the single process's (and
    not just rounding), or NaN."""
    floor = FLOOR * torch.finfo(acc_dtype(DTYPES[dtype])).eps
    names = []
    for name in NAMES:
        limit = min(LIMITS[dtype], max(2 * single[name], floor))
        if not errors[name] <= limit:  # also if it is NaN
            names.append(name)
    return names


class ReferenceRun(NamedTuple):
    """What the ranks are compared with."""

    inputs: list[torch.Tensor]  # q, k, v, dout of the whole sequence, the same on every rank
    exact: dict[str, torch.Tensor]  # what fp64 full attention makes of them
    kernel_errors: dict[str, float]  # relative L2, of the kernel on the whole sequence


@lru_cache(maxsize=8)
def _reference_run(
    mask: str,
    dtype: str,
    seqlen: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kernel: str,
    device: torch.device,
) -> ReferenceRun:
    generator = torch.Generator().manual_seed(seqlen)
    inputs = [
        torch.randn(2, seqlen, number, head_dim, generator=generator).to(device, DTYPES[dtype])
        for number in (heads, kv_heads, kv_heads, heads)
    ]
    request = kernels.KernelRequest(device, DTYPES[dtype], head_dim, heads, kv_heads)
    chosen = kernels.load(kernels.choose(kernel, request))
    exact = _full_attention(reference, [tensor.double() for tensor in inputs], mask)
    computed = _full_attention(chosen, inputs, mask)
    errors = {}
    for name in NAMES:
        difference = computed[name].double() - exact[name]
        errors[name] = (difference.norm() / exact[name].norm()).item()
    return ReferenceRun(inputs, exact, errors)


def _full_attention(
    kernel: Any, inputs: Sequence[torch.Tensor], mask: str
) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv of a kernel on the whole sequence; inputs: q, k, v, dout."""
    q, k, v, dout = inputs
    band = (None, 0 if mask == "causal" else None)
    scale = q.shape[-1] ** -0.5
    out, lse = kernel.forward(q, k, v, band=band, scale=scale)
    dq, dk, dv = kernel.backward(
        dout, q, k, v, out, lse, band=band, scale=scale, deterministic=False
    )
    return dict(zip(NAMES, (out, lse, dq, dk, dv), strict=True))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like return NaN inside."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


# ---- the table


def report(results: list[dict[str, Any]]) -> None:
    """Prints one line per algorithm, layout, mask and dtype: the worst errors over all other
    choices."""
    print(
        "Relative L2 error against full attention in fp64, the worst over ranks, lengths, heads"
        " and overlap"
    )
    names = "".join(f"{name:>10}" for name in NAMES)
    print(f"{'algorithm':10}{'layout':12}{'mask':8}{'dtype':7}{'cases':>6}{names}  ")
    for key, group in itertools.groupby(sorted(results, key=_key), key=_key):
        print(_line(key, list(group)))
    misses = sum(not result["ok"] for result in results)
    rank_counts = sorted({result["nproc"] for result in results})
    ranks = ", ".join(str(count) for count in rank_counts)
    verdict = f"{misses} missed" if misses else "none missed (ok)"
    print(f"{len(results)} cases on {ranks} ranks: {verdict}")


def _key(result: dict[str, Any]) -> tuple[str, str, str, str]:
    return result["algorithm"], result["layout"], result["mask"], result["dtype"]


def _line(key: tuple[str, str, str, str], group: Sequence[dict[str, Any]]) -> str:
    algorithm, layout, mask, dtype = key
    errors = ""
    for name in NAMES:
        worst = max((result["errors"][name] for result in group), key=_nan_last)
        errors += f"{worst:10.1e}"
    line = f"{algorithm:10}{layout:12}{mask:8}{dtype:7}{len(group):6}{errors}"
    misses: set[str] = set()
    for result in group:
        misses.update(result["missed"])
    if misses:
        line += f"  MISS {', '.join(sorted(misses))}"
    return line


def _nan_last(error: float) -> tuple[bool, float]:
    """To sort by: NaN above all numbers."""
    return math.isnan(error), error
