"""From the options of ``ringx submit`` to batch jobs: every check, and the split into array tasks.

What is checked: the site, its limits and account; the names and sizes, and whether the layout can
cut them; the least memory that a case needs.  The checks add to a list of faults, so that
everything that is wrong is named at once.  Where an option is wrong, the other checks go on with
its default.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..checks import DTYPES, integers, sift
from ..measure import bench_collectives, benchmark
from ..measure import cases as attention_cases
from ..merge import acc_dtype
from ..patterns.registry import ALGORITHMS
from . import site
from .batch_script import BatchJob
from .site import Site

ADD_MATRIX = {  # job -> adds the options that its own command line takes for the matrix of cases
    "bench": attention_cases.add_matrix,
    "bench-comm": bench_collectives.add_matrix,
}
# options of bench-comm that `ringx submit` itself has
SHARED_OPTIONS = ("device", "timeout", "label")

# of words in #SBATCH lines, which no shell reads
PLAIN_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
SBATCH_OPTION = re.compile(r"--[a-z][a-z-]*(=[\w.,:/@&|()%+*=\[\]-]+)?")


@dataclass(frozen=True)
class _Allocation:
    """The nodes and the time that are asked for."""

    site: Site | None  # None where there is no such site
    nodes: list[int]  # one job for each number, rising
    ranks_per_node: int
    time: timedelta
    chain: int

    def nodes_by_ranks(self) -> dict[int, int]:
        """{number of ranks: number of nodes} of each job."""
        return {nodes * self.ranks_per_node: nodes for nodes in self.nodes}


@dataclass(frozen=True)
class _Matrix:
    """What is to be measured."""

    command: list[str]  # words after `python -m ringx`, without --nproc and --part
    number_of_sizes: dict[int, int]  # by number of ranks; all cases of a size are one array task
    cases: list[Any]


def prepare(args: argparse.Namespace, root: Path, python: str) -> tuple[list[BatchJob], list[Any]]:
    """(a job per number of nodes, the cases that they will measure).

    Args:
        root: the checkout, which holds env/ and script/.
        python: the Python that the jobs run where the site names none.

    Raises:
        ValueError: names everything that is wrong."""
    faults: list[str] = []
    allocation = _read_allocation(args, root, faults)
    _check_slurm_options(args, allocation.site, faults)
    _check_walltime(args, allocation, faults)
    _check_combinations(args, faults)
    if args.job == "bench":
        matrix = _bench_matrix(args, allocation, faults)
    else:
        matrix = _bench_comm_matrix(args, allocation, faults)
    array_tasks = _array_tasks(args, allocation, matrix, faults)
    if faults or allocation.site is None:
        raise ValueError(benchmark.fault_message(list(dict.fromkeys(faults))))
    jobs: list[BatchJob] = []
    for nodes in allocation.nodes:
        tasks = array_tasks[nodes]
        command = [*matrix.command, "--nproc", str(nodes * allocation.ranks_per_node)]
        if tasks > 1:
            command += ["--part", f"$SLURM_ARRAY_TASK_ID/{tasks}"]
        job = BatchJob(
            name=f"ringx-{args.job}-n{nodes}",
            site=allocation.site,
            nodes=nodes,
            ranks_per_node=allocation.ranks_per_node,
            time=allocation.time,
            tasks=tasks,
            chain=allocation.chain,
            serial=args.serial,
            account=args.account,
            sbatch=tuple(args.sbatch),
            command=tuple(command),
            out=args.out.absolute(),
            root=root,
            python=python,
        )
        jobs.append(job)
    return jobs, matrix.cases


# ---- site, nodes and options of Slurm


def _read_allocation(args: argparse.Namespace, root: Path, faults: list[str]) -> _Allocation:
    known_site = _attempt(faults, partial(site.load, root / "env", args.site))
    nodes, wrong = sift(integers, args.nodes)
    if wrong:
        faults.append(f"--nodes: {wrong}")
    time = _attempt(
        faults, partial(site.walltime, args.time), default=timedelta(minutes=30), prefix="--time "
    )
    usual_ranks = known_site.ranks_per_node if known_site else 1
    ranks_per_node = _read_count(faults, "ranks-per-node", args.ranks_per_node, usual_ranks)
    chain = _read_count(faults, "chain", args.chain, 1)
    return _Allocation(
        site=known_site,
        nodes=sorted(nodes),
        ranks_per_node=ranks_per_node,
        time=time,
        chain=chain,
    )


def _attempt(
    faults: list[str], call: Callable[[], Any], default: Any = None, prefix: str = ""
) -> Any:
    """The result of the call, or the default if it raises ValueError."""
    try:
        return call()
    except ValueError as error:
        faults.append(f"{prefix}{error}")
        return default


def _read_count(faults: list[str], name: str, text: str | None, default: int) -> int:
    """The positive integer of an option."""
    if text is None:
        return default
    if not re.fullmatch(r"[1-9]\d*", text):
        faults.append(f"--{name} {text!r} must be a positive integer")
        return default
    return int(text)


def _check_slurm_options(
    args: argparse.Namespace, known_site: Site | None, faults: list[str]
) -> None:
    if args.account is not None and not PLAIN_WORD.fullmatch(args.account):
        faults.append(f"--account {args.account!r} must be a plain word")
    for option in args.sbatch:
        if not SBATCH_OPTION.fullmatch(option):
            faults.append(
                f"--sbatch {option!r} must be one option of sbatch such as --partition=debug, "
                "without blanks"
            )
    if any(character in str(args.out) for character in "\n\r%\\\"'"):
        faults.append(
            f"--out {str(args.out)!r}: %, quotes and \\ mean something to Slurm "
            "in the names of logs; take another folder"
        )
    if known_site and known_site.account_required and not args.account:
        faults.append(f"--account is missing: {known_site.name} wants one")


def _check_walltime(args: argparse.Namespace, allocation: _Allocation, faults: list[str]) -> None:
    if allocation.site is None:
        return
    for nodes in allocation.nodes:
        longest = _attempt(faults, partial(allocation.site.longest, nodes))
        if longest and allocation.time > longest:
            faults.append(
                f"--time {args.time}: {allocation.site.name} gives {nodes} nodes at most "
                f"{site.format_walltime(longest)}; see --chain"
            )


def _check_combinations(args: argparse.Namespace, faults: list[str]) -> None:
    if args.memory_per_rank is not None:
        if not args.memory_per_rank > 0:  # also where it is not a number
            faults.append(
                f"--memory-per-rank {args.memory_per_rank} must be a positive number of GiB"
            )
        if args.job != "bench":
            faults.append(
                "--memory-per-rank: bench-comm bounds its sizes by the memory that is free; "
                "leave it out"
            )
    if args.dry_run and args.wait:
        faults.append("--wait: with --dry-run there is nothing to wait for")


# ---- the matrix of cases


def _bench_matrix(args: argparse.Namespace, allocation: _Allocation, faults: list[str]) -> _Matrix:
    if args.options:
        faults.append(
            f"--options {args.options!r} is for --job bench-comm; give bench's options as they are"
        )
    world_sizes = list(allocation.nodes_by_ranks()) or [1]  # 1: to check everything else
    options = argparse.Namespace(**vars(args))
    options.nproc = ",".join(map(str, world_sizes))
    options.part = None
    options.device = _device_of(args, allocation.site)
    cases, wrong = attention_cases.examine(options, None, None)
    faults += wrong
    _check_memory(args, allocation.site, cases, faults)
    sizes: dict[int, set[Any]] = {}
    for case in cases:
        sizes.setdefault(case.world, set()).add(case.size)
    return _Matrix(
        command=["bench", *_matrix_words(options, "bench"), *_output_words(args)],
        number_of_sizes={world_size: len(group) for world_size, group in sizes.items()},
        cases=cases,
    )


def _device_of(args: argparse.Namespace, known_site: Site | None) -> str:
    if args.device == "auto" and known_site:
        return known_site.device
    return args.device


def _output_words(args: argparse.Namespace) -> list[str]:
    return ["--out", str(args.out.absolute()), "--resume"]


def _check_memory(
    args: argparse.Namespace,
    known_site: Site | None,
    cases: Sequence[attention_cases.AttentionCase],
    faults: list[str],
) -> None:
    memory = args.memory_per_rank  # GiB
    if not memory and known_site:
        memory = known_site.memory_per_rank
    if not memory:
        return
    for case in cases:
        try:
            least = least_memory(case) / 2**30
        except ValueError:  # it gives no equal shards, which is a fault by itself
            continue
        if least > memory:
            faults.append(
                f"S={case.seqlen} on N={case.world}, H={case.heads}, D={case.head_dim}: "
                f"{case.algorithm} needs at least {least:.3g} GiB a rank, of {memory:g}"
            )


def least_memory(case: attention_cases.AttentionCase) -> int:
    """Bytes that a rank holds at least at one of two moments of its backward.

    While other ranks' blocks are here: q, k, v, dout and out, the accumulated dq, and what the
    blocks are received into.  At its end: q, k, v, dout and out, the accumulated dq, and the
    gradients of q, k and v.

    Raises:
        ValueError: the case's sequence does not give equal shards."""
    dtype = DTYPES[case.dtype]
    received = ALGORITHMS[case.algorithm].received_bytes(
        B=case.batch,
        S=case.seqlen,
        H=case.heads,
        Hkv=case.kv_heads,
        D=case.head_dim,
        N=case.world,
        itemsize=dtype.itemsize,
        causal=case.causal,
        layout=case.layout,
        overlap=case.overlap,
    )
    head = case.batch * (case.seqlen // case.world) * case.head_dim  # elements of one head
    q, kv = case.heads * head, 2 * case.kv_heads * head
    always = (3 * q + kv) * dtype.itemsize + q * acc_dtype(dtype).itemsize
    gradients = (q + kv) * dtype.itemsize
    return always + max(int(received.backward), gradients)


class _RaisingParser(argparse.ArgumentParser):
    """Raises a ValueError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _bench_comm_matrix(
    args: argparse.Namespace, allocation: _Allocation, faults: list[str]
) -> _Matrix:
    parser = _RaisingParser(add_help=False)
    bench_collectives.add_matrix(parser)
    try:
        options = parser.parse_args(shlex.split(args.options))
    except ValueError as error:
        faults.append(f"--options {args.options!r}: {error}")
        return _Matrix(command=[], number_of_sizes={}, cases=[])
    _check_bench_comm_options(args, options, parser, faults)
    options.device = _device_of(args, allocation.site)
    options.timeout = args.timeout
    options.label = args.label
    collectives, wrong = bench_collectives.examine(options)
    faults += wrong
    cases: list[bench_collectives.CollectiveCase] = []
    for world_size, nodes in allocation.nodes_by_ranks().items():
        if world_size < 2:
            faults.append(
                f"--nodes: {world_size} rank cannot communicate with itself; take at least two"
            )
        for collective in collectives:
            case = bench_collectives.CollectiveCase(
                collective=collective,
                world=world_size,
                hosts=nodes,
                dtype=bench_collectives.DTYPE_NAME,
                warmup=options.warmup,
                reps=options.reps,
            )
            cases.append(case)
    return _Matrix(
        command=["bench-comm", *_matrix_words(options, "bench-comm"), *_output_words(args)],
        number_of_sizes=dict.fromkeys(allocation.nodes_by_ranks(), 1),
        cases=cases,
    )


def _check_bench_comm_options(
    args: argparse.Namespace,
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
    faults: list[str],
) -> None:
    """Options of the other job, and options that are given in two places."""
    words = _matrix_words(args, "bench", without=SHARED_OPTIONS)
    of_bench = [word for word in words if word.startswith("--")]
    if of_bench:
        faults.append(
            f"{', '.join(of_bench)}: for --job bench; say what bench-comm is to do in --options"
        )
    given_twice = [
        f"--{name}" for name in SHARED_OPTIONS if getattr(options, name) != parser.get_default(name)
    ]
    if given_twice:
        faults.append(
            f"--options {args.options!r}: give {', '.join(given_twice)} to `ringx submit` itself"
        )


def _matrix_words(args: argparse.Namespace, job: str, without: Sequence[str] = ()) -> list[str]:
    """The matrix options of `args` as words, those that differ from their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    ADD_MATRIX[job](parser)
    words: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest)
        flag = action.option_strings[0]
        if value == action.default or action.dest in without:
            continue
        if value is True:
            words.append(flag)
            continue
        values = value if isinstance(value, list) else [value]
        for single_value in values:
            words += [flag, str(single_value)]
    return words


# ---- array tasks


def _array_tasks(
    args: argparse.Namespace, allocation: _Allocation, matrix: _Matrix, faults: list[str]
) -> dict[int, int]:
    """{number of nodes: array tasks of that job}."""
    known_site = allocation.site
    array_tasks: dict[int, int] = {}
    for nodes in allocation.nodes:
        sizes = matrix.number_of_sizes.get(nodes * allocation.ranks_per_node, 1)
        tasks = _read_count(faults, "array", args.array, sizes)
        if tasks > sizes:
            faults.append(
                f"--array {tasks}: there are {sizes} sizes to measure on {nodes} nodes, "
                "and one is the least for a task"
            )
        if known_site and known_site.max_array and tasks > known_site.max_array:
            faults.append(
                f"--nodes {nodes}: {tasks} array tasks, {known_site.name} allows "
                f"{known_site.max_array}; bundle sizes with --array"
            )
        array_tasks[nodes] = tasks
    return array_tasks
