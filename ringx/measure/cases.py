"""The cases of ``ringx bench``: which ones the options ask for, and which are impossible."""

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from .. import kernels
from ..checks import DTYPES, MASKS, choices, integers, require_name, sift, switches
from ..layout import LAYOUTS, Sharding
from ..patterns.registry import ALGORITHMS
from .benchmark import add_run_options, fault_message, parse_labels

RECOMMENDED = "recommended"  # among layouts: the one that each algorithm recommends
FLOPS_RULE = "causal work counted as done: forward 4 B H D pairs, backward 2.5 times that"


class ListOption(NamedTuple):
    """A command line option that takes a comma-separated list."""

    parse: Callable[[str], list[Any]]
    default: str
    help: str


LIST_OPTIONS = {  # parsed in ``examine``, so that all faults are named at once
    "algorithms": ListOption(choices(ALGORITHMS), "all", "names or all"),
    "layouts": ListOption(
        choices([RECOMMENDED, *LAYOUTS]),
        RECOMMENDED,
        f"{RECOMMENDED} (each algorithm's own), {', '.join(LAYOUTS)}, all",
    ),
    "masks": ListOption(choices(MASKS), "causal", "causal, full"),
    "dtypes": ListOption(choices(DTYPES), "bf16", ", ".join(DTYPES)),
    "heads": ListOption(integers, "8", "query heads"),
    "kv-heads": ListOption(integers, "8", "key/value heads, divisors of the query heads"),
    "head-dim": ListOption(integers, "64", "head size"),
    "batch": ListOption(integers, "1", "batch size"),
    "overlap": ListOption(switches, "on", "post the next collective early: on, off or on,off"),
}


@dataclass(frozen=True)
class AttentionCase:
    """One record of attention; what each entry means is in ``records.ATTENTION``."""

    algorithm: str
    layout: str
    mask: str
    dtype: str
    world: int
    seqlen: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    kernel: str
    overlap: bool
    threads: int
    baseline_threads: int | None
    baseline: bool
    warmup: int
    reps: int

    @property
    def id(self) -> str:
        overlap = "overlap" if self.overlap else "nooverlap"
        return (
            f"{self.algorithm}_{self.layout}_{self.mask}_{self.dtype}_n{self.world}"
            f"_s{self.seqlen}_b{self.batch}_h{self.heads}_kv{self.kv_heads}_d{self.head_dim}"
            f"_{self.kernel}_{overlap}_t{self.threads}"
        )

    @property
    def size(self) -> "AttentionCase":
        """The same for all cases that are measured side by side: they share inputs and baseline."""
        return replace(self, algorithm="", layout="", overlap=False)

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    @property
    def passes(self) -> int:
        return self.warmup + self.reps

    def kernel_request(self, device: torch.device) -> kernels.KernelRequest:
        return kernels.KernelRequest(
            device, DTYPES[self.dtype], self.head_dim, self.heads, self.kv_heads
        )

    def flops(self) -> dict[str, float]:
        """Of all ranks together; the rule is FLOPS_RULE."""
        pairs = self.seqlen * (self.seqlen + 1) // 2 if self.causal else self.seqlen**2
        forward = 4.0 * self.batch * self.heads * self.head_dim * pairs
        return {"forward": forward, "backward": 2.5 * forward, "total": 3.5 * forward}


def add_matrix(parser: argparse._ActionsContainer) -> None:
    """What to measure and how, apart from ranks and files."""
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--seqlens", metavar="S,...", help="tokens of the whole sequence (default: 2048)"
    )
    lengths.add_argument(
        "--seqlens-per-rank", metavar="S,...", help="tokens of each rank: weak scaling"
    )
    for name, option in LIST_OPTIONS.items():
        parser.add_argument(
            f"--{name}",
            default=option.default,
            metavar="X,...",
            help=f"{option.help} (default: {option.default})",
        )
    parser.add_argument("--kernel", default="auto", help="local kernel (default: auto)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--reps", type=int, default=7, help="timed repetitions (default: 7)")
    parser.add_argument(
        "--warmup",
        type=int,
        default=1,
        help="passes before; the first counts bytes and memory (default: 1)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank (default: 1)")
    parser.add_argument(
        "--baseline-threads",
        type=int,
        metavar="T",
        help="CPU threads of the baseline (default: all ranks' together, at most the cores)",
    )
    parser.add_argument(
        "--no-baseline",
        action="store_true",
        help="where the whole sequence is too much for one process",
    )
    add_run_options(parser)


def plan(args: argparse.Namespace, launched: int | None = None) -> list[AttentionCase]:
    """Every case that the options ask for, cases of one size next to each other.

    launched: how many ranks a launcher started, if one did.

    Raises:
        ValueError: something is wrong with the options; names everything that is."""
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    cases, faults = examine(args, launched, device)
    try:
        cases = part(cases, args.part)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError(fault_message(faults))
    return cases


def examine(
    args: argparse.Namespace, launched: int | None, device: torch.device | None
) -> tuple[list[AttentionCase], list[str]]:
    """(the cases that the options ask for, everything that is wrong with them).

    launched: how many ranks a launcher started, if one did; device: where the kernels are to run,
    None where that cannot be asked here (on a login node)."""
    faults: list[str] = []
    values = {}
    for name, option in LIST_OPTIONS.items():
        text = getattr(args, name.replace("-", "_"))
        values[name] = _parse_list(name, option.parse, text, faults)
    values["algorithms"] = values["algorithms"] or list(ALGORITHMS)  # to look at everything else
    values["world"] = _world_sizes(args, launched, faults)
    values["length"] = _lengths(args, faults)
    faults += _single_value_faults(args)
    cases = _combinations(args, values)
    faults += _impossible_shardings(cases)
    faults += _impossible_heads(cases)
    kernel_is_known = args.kernel in (*kernels.KERNELS, "auto")
    if device is not None and kernel_is_known:
        faults += _impossible_kernels(cases, device)
    return cases, faults


def _parse_list(
    option: str, parse: Callable[[str], list[Any]], text: str, faults: list[str]
) -> list[Any]:
    """The values of a list that make sense; what is wrong with the others goes to `faults`."""
    values, fault = sift(parse, text)
    if fault:
        faults.append(f"--{option}: {fault}")
    return values


def _world_sizes(args: argparse.Namespace, launched: int | None, faults: list[str]) -> list[int]:
    worlds = sorted(_parse_list("nproc", integers, args.nproc or str(launched or "1,2"), faults))
    others = [world for world in worlds if world != launched]
    if launched and others:
        faults.append(
            f"--nproc {others[0]}: the launcher started {launched} ranks,"
            " and only that many can be measured in this job"
        )
    return worlds


def _lengths(args: argparse.Namespace, faults: list[str]) -> list[int]:
    """Tokens of the whole sequence, or of a rank if --seqlens-per-rank was given."""
    if args.seqlens_per_rank is not None:
        return _parse_list("seqlens-per-rank", integers, args.seqlens_per_rank, faults)
    return _parse_list("seqlens", integers, args.seqlens or "2048", faults)


def _single_value_faults(args: argparse.Namespace) -> list[str]:
    """What is wrong with options that take one value."""
    faults = []
    for name in ("reps", "warmup", "threads", "baseline_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            faults.append(f"--{name.replace('_', '-')} {value} must be at least 1")
    known = [*kernels.KERNELS, "auto"]
    faults += _fault_of("--kernel", partial(require_name, args.kernel, known, "kernel"))
    faults += _fault_of("--label", partial(parse_labels, args.label))
    return faults


def _combinations(args: argparse.Namespace, values: dict[str, list[Any]]) -> list[AttentionCase]:
    """All combinations of the values; those of one size next to each other, none twice."""
    sizes = itertools.product(
        values["world"],
        values["length"],
        values["masks"],
        values["dtypes"],
        values["batch"],
        values["heads"],
        values["kv-heads"],
        values["head-dim"],
    )
    variants = list(itertools.product(values["algorithms"], values["layouts"], values["overlap"]))
    cases = {}  # by id: "recommended,zigzag" must not measure a case twice
    for world, length, mask, dtype, batch, heads, kv_heads, head_dim in sizes:
        for algorithm, layout, overlap in variants:
            if layout == RECOMMENDED:
                layout = ALGORITHMS[algorithm].recommended_layout
            case = AttentionCase(
                algorithm=algorithm,
                layout=layout,
                mask=mask,
                dtype=dtype,
                world=world,
                seqlen=length if args.seqlens_per_rank is None else length * world,
                batch=batch,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                kernel=args.kernel,
                overlap=overlap,
                threads=args.threads,
                baseline_threads=args.baseline_threads,
                baseline=not args.no_baseline,
                warmup=args.warmup,
                reps=args.reps,
            )
            cases[case.id] = case
    return list(cases.values())


def _impossible_shardings(cases: Iterable[AttentionCase]) -> list[str]:
    faults = []
    shardings = dict.fromkeys((case.seqlen, case.world, case.layout) for case in cases)
    for seqlen, world, layout in shardings:
        check = partial(Sharding.equal, seqlen, world, layout)
        faults += _fault_of(f"S={seqlen} on N={world}", check)
    return faults


def _impossible_heads(cases: Iterable[AttentionCase]) -> list[str]:
    return [
        f"--heads {heads} is no multiple of --kv-heads {kv_heads}"
        for heads, kv_heads in dict.fromkeys((case.heads, case.kv_heads) for case in cases)
        if heads % kv_heads
    ]


def _impossible_kernels(cases: Iterable[AttentionCase], device: torch.device) -> list[str]:
    faults = []
    requests = dict.fromkeys((case.kernel, case.kernel_request(device)) for case in cases)
    for kernel, request in requests:
        check = partial(kernels.choose, kernel, request)
        faults += _fault_of(f"{request.dtype}, head size {request.head_dim}", check)
    return faults


def _fault_of(subject: str, check: Callable[[], object]) -> list[str]:
    """What `check` raises, as a list of at most one fault."""
    try:
        check()
    except (TypeError, ValueError, NotImplementedError) as error:
        return [f"{subject}: {error}"]
    return []


def part(cases: Sequence[AttentionCase], which: str | None) -> list[AttentionCase]:
    """Part "I/N" of the cases, those of one size together; all of them for None.

    Raises:
        ValueError: it is not of that form, or I is not below N."""
    if which is None:
        return list(cases)
    match = re.fullmatch(r"(\d+)/(\d+)", which)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--part {which!r} must be I/N with I from 0 to N - 1, such as 0/4")
    sizes = list(dict.fromkeys(case.size for case in cases))
    chosen = set(sizes[int(match[1]) :: int(match[2])])
    return [case for case in cases if case.size in chosen]
