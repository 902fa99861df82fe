"""The cases of ``ringx bench``: which ones the options ask for, and what is wrong with those that are impossible."""

import argparse
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from .. import kernels
from ..checks import DTYPES, MASKS, choices, integers, require_name, sift, switches
from ..layout import LAYOUTS, Sharding
from ..patterns.registry import ALGORITHMS
from .benchmark import all_of, labelled

RECOMMENDED = "recommended"  # among layouts: the one that each algorithm recommends
FLOPS_RULE = "causal work counted as done: forward 4 B H D pairs, backward 2.5 times that"
_LISTS: dict[
    str, tuple[Callable[[str], list], str, str]
] = {  # option: (type, default, help); parsed in `plan`, all faults at once
    "algorithms": (choices(ALGORITHMS), "all", "names or all"),
    "layouts": (
        choices([RECOMMENDED, *LAYOUTS]),
        RECOMMENDED,
        f"{RECOMMENDED} (each algorithm's own), {', '.join(LAYOUTS)}, all",
    ),
    "masks": (choices(MASKS), "causal", "causal, full"),
    "dtypes": (choices(DTYPES), "bf16", ", ".join(DTYPES)),
    "heads": (integers, "8", "query heads"),
    "kv-heads": (integers, "8", "key/value heads, divisors of the query heads"),
    "head-dim": (integers, "64", "head size"),
    "batch": (integers, "1", "batch size"),
    "overlap": (switches, "on", "post the next collective early: on, off or on,off"),
}


@dataclass(frozen=True)
class Case:
    """One row of the results; what each field means is in ``records.FIELDS``."""

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
        return (
            f"{self.algorithm}_{self.layout}_{self.mask}_{self.dtype}_n{self.world}_s{self.seqlen}_b{self.batch}_h{self.heads}"
            f"_kv{self.kv_heads}_d{self.head_dim}_{self.kernel}_{'overlap' if self.overlap else 'nooverlap'}_t{self.threads}"
        )

    @property
    def size(self) -> "Case":
        """The same for all cases that are measured side by side, and share inputs and baseline."""
        return replace(self, algorithm="", layout="", overlap=False)

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    def need(self, device: torch.device) -> kernels.KernelRequest:
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
    for name, (_, default, text) in _LISTS.items():
        parser.add_argument(
            f"--{name}", default=default, metavar="X,...", help=f"{text} (default: {default})"
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
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds that ranks wait for each other (default: 600)",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="note this in the records, such as link_mbit=200; repeatable",
    )


def plan(args: argparse.Namespace, launched: int | None = None) -> list[Case]:
    """Every case that the options ask for, cases of one size next to each other.  One ValueError names all that is impossible.

    `launched`: how many ranks a launcher started, if one did."""
    device = torch.device(
        "cuda"
        if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        else "cpu"
    )
    cases, faults = examine(args, launched, device)
    try:
        cases = part(cases, args.part)
    except ValueError as e:
        faults.append(str(e))
    if faults:
        raise ValueError(all_of(faults))
    return cases


def examine(
    args: argparse.Namespace, launched: int | None, device: torch.device | None
) -> tuple[list[Case], list[str]]:
    """(the cases that the options ask for, everything that is wrong with them).  `device`: where the kernels are to run; None
    where that cannot be asked here (on a login node)."""
    faults: list[str] = []

    def parse(option: str, kind: Callable[[str], list], text: str) -> list:
        good, wrong = sift(kind, text)
        faults.extend([f"--{option}: {wrong}"] if wrong else [])
        return good

    lists = {
        name: parse(name, kind, getattr(args, name.replace("-", "_")))
        for name, (kind, _, _) in _LISTS.items()
    }
    worlds = sorted(parse("nproc", integers, args.nproc or str(launched or "1,2")))
    if launched and (wrong := [n for n in worlds if n != launched]):
        faults.append(
            f"--nproc {wrong[0]}: the launcher started {launched} ranks, and only that many can be measured in this job"
        )
    per_rank = args.seqlens_per_rank is not None
    lengths_option = "seqlens-per-rank" if per_rank else "seqlens"
    lengths = parse(
        lengths_option, integers, args.seqlens_per_rank if per_rank else args.seqlens or "2048"
    )
    for name in ("reps", "warmup", "threads", "baseline_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            faults.append(f"--{name.replace('_', '-')} {value} must be at least 1")
    _try(
        faults, "--kernel", lambda: require_name(args.kernel, [*kernels.KERNELS, "auto"], "kernel")
    )
    _try(faults, "--label", lambda: labelled(args.label))

    cases = {}  # of ids: "recommended,zigzag" must not measure a case twice
    sizes = itertools.product(
        worlds,
        lengths,
        lists["masks"],
        lists["dtypes"],
        lists["batch"],
        lists["heads"],
        lists["kv-heads"],
        lists["head-dim"],
    )
    for (
        world,
        length,
        mask,
        dtype,
        batch,
        heads,
        kv,
        dim,
    ), name, layout, overlap in itertools.product(
        sizes, lists["algorithms"] or ALGORITHMS, lists["layouts"], lists["overlap"]
    ):
        case = Case(
            name,
            ALGORITHMS[name].recommended_layout if layout == RECOMMENDED else layout,
            *(
                mask,
                dtype,
                world,
                length * world if per_rank else length,
                batch,
                heads,
                kv,
                dim,
                args.kernel,
                overlap,
            ),
            *(args.threads, args.baseline_threads, not args.no_baseline, args.warmup, args.reps),
        )
        cases[case.id] = case
    for seqlen, world, layout in dict.fromkeys(
        (c.seqlen, c.world, c.layout) for c in cases.values()
    ):
        _try(faults, f"S={seqlen} on N={world}", partial(Sharding.equal, seqlen, world, layout))
    for heads, kv in dict.fromkeys((c.heads, c.kv_heads) for c in cases.values()):
        if heads % kv:
            faults.append(f"--heads {heads} is no multiple of --kv-heads {kv}")
    known = args.kernel in (*kernels.KERNELS, "auto")
    for kernel, need in (
        dict.fromkeys((c.kernel, c.need(device)) for c in cases.values())
        if device and known
        else ()
    ):
        _try(
            faults,
            f"{need.dtype}, head size {need.head_dim}",
            partial(kernels.choose, kernel, need),
        )
    return list(cases.values()), faults


def part(cases: Sequence[Case], which: str | None) -> list[Case]:
    """Part "I/N" of the cases, those of one size together; all of them for None.

    Raises:
        ValueError: it is not of that form, or I is not below N."""
    if which is None:
        return list(cases)
    match = re.fullmatch(r"(\d+)/(\d+)", which)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"--part {which!r} must be I/N with I from 0 to N - 1, such as 0/4")
    mine = set(list(dict.fromkeys(c.size for c in cases))[int(match[1]) :: int(match[2])])
    return [c for c in cases if c.size in mine]


def _try(faults: list[str], what: str, check: Callable[[], object]) -> None:
    try:
        check()
    except (TypeError, ValueError, NotImplementedError) as e:
        faults.append(f"{what}: {e}")
