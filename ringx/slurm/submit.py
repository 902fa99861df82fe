"""ringx submit: Slurm jobs that measure a matrix of cases at a site, checked before they wait in a queue.

    ringx submit --site generic-cpu --nodes 1,2,4 --seqlens 4096,8192 --kv-heads 8,2 --out results/here --dry-run
    ringx submit --site frontier --account ABC123 --nodes 1,2,4,8 --seqlens-per-rank 8192 --time 1:00:00 --out runs/weak
    ringx submit --site lumi --account project_1 --job bench-comm --nodes 2,4 --options "--max-bytes 256M" --out runs/comm

One batch script per number of nodes; in it an array task per size (all algorithms of a size are measured side by side).  The
scripts stay in DIR/jobs, to be read, edited and submitted again by hand; they resume what DIR already holds.  A job that Slurm
warns before its time limit, or that loses a node, goes back into the queue; with --chain N it is followed by N - 1 others instead.

Everything that is wrong is named at once, and nothing is submitted then.  What is checked: the site, its limits and account; the
names and sizes, and whether the layout can cut them; the least memory that a case needs; whether DIR can be written to.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from .. import files
from ..checks import DTYPES, integers, sift
from ..measure import bench_collectives, benchmark, records
from ..measure import cases as attention_cases
from ..merge import acc_dtype
from . import site

MATRIX = {  # job -> the options that its own command line takes for the matrix
    "bench": attention_cases.add_matrix,
    "bench-comm": bench_collectives.add_matrix,
}
WARNING = 120  # seconds before the time limit at which Slurm warns, at most
Matrix = tuple[
    list[str], dict[int, dict[Any, list[str]]], list[Any]
]  # command, {ranks: {size: ids of records}}, cases
PLAIN = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
)  # of words in #SBATCH lines, which no shell reads


@dataclass(frozen=True)
class BatchJob:
    """One batch script."""

    name: str
    site: site.Site
    nodes: int
    ranks_per_node: int
    time: timedelta
    tasks: int  # of the job array; 1: no array
    chain: int
    serial: bool
    account: str | None
    sbatch: tuple[str, ...]  # options, one a line
    command: tuple[str, ...]  # after $PYTHON -m ringx
    out: Path
    root: Path  # the checkout
    python: str

    @property
    def node_hours(self) -> float:
        """That it may use at most."""
        return self.nodes * self.time.total_seconds() / 3600 * self.tasks * self.chain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", required=True, help="name of a file in env/, such as generic-cpu")
    parser.add_argument(
        "--job", default="bench", choices=list(MATRIX), help="what to run (default: bench)"
    )
    parser.add_argument(
        "--nodes", default="1", metavar="N,...", help="a batch script for each (default: 1)"
    )
    parser.add_argument("--ranks-per-node", metavar="R", help="default: the site's")
    parser.add_argument(
        "--time",
        default="0:30:00",
        metavar="T",
        help="walltime of each array task (default: 0:30:00)",
    )
    parser.add_argument("--account", help="to charge")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPT",
        help="another option of sbatch, such as --qos=debug; repeatable",
    )
    parser.add_argument(
        "--chain",
        default="1",
        metavar="N",
        help="jobs one after another, each resuming (default: 1)",
    )
    parser.add_argument(
        "--serial",
        action="store_true",
        help="run one task at a time, so that none disturbs another's network",
    )
    parser.add_argument(
        "--array", metavar="N", help="array tasks of each script (default: one per size)"
    )
    parser.add_argument("--memory-per-rank", type=float, metavar="GIB", help="default: the site's")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench_out"),
        metavar="DIR",
        help="for the records (default: bench_out)",
    )
    parser.add_argument(
        "--options",
        default="",
        metavar="TEXT",
        help="of --job bench-comm; see `ringx bench-comm --help`",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the scripts, write and submit nothing"
    )
    parser.add_argument("--wait", action="store_true", help="until all jobs have ended")
    attention_cases.add_matrix(parser.add_argument_group("what to measure, and how (--job bench)"))


def main(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "script/job.sh").exists():
        raise FileNotFoundError(
            "script/ and env/, which the jobs need, are not beside this installation; use a checkout."
        )
    jobs, cases = prepare(args, root, sys.executable)
    scripts = {job.name: render(job) for job in jobs}
    if args.dry_run:
        print("\n".join(scripts.values()))
    print(table(jobs))
    if args.dry_run:
        return 0
    if not shutil.which("sbatch"):
        raise FileNotFoundError(
            "sbatch is not to be found here: submit from a login node, or look with --dry-run."
        )
    left = benchmark.remaining(
        args.out, cases, True, benchmark.labelled(args.label)
    )  # what is there must fit what the jobs would measure
    print(
        f"{len(left)} of {len(cases)} cases are to be measured"
        + ("" if left else "; nothing to submit")
    )
    if not left:
        return 0
    records.expect_room(args.out / "jobs", 2**16)
    ids: list[str] = []
    for job in jobs:
        script = args.out / "jobs" / f"{job.name}.sbatch"
        files.write_text(script, scripts[job.name], replace=True)
        try:
            ids += submit(script, job.chain, after=ids[-1] if ids and job.serial else None)
        except RuntimeError as error:
            done = (
                f"; submitted before: {', '.join(ids)} (scancel {' '.join(ids)} ends them)"
                if ids
                else ""
            )
            raise RuntimeError(f"{error}{done}") from None
        print(f"submitted {', '.join(ids[-job.chain :])}: {script}")
    where = shlex.quote(str(args.out))
    print(f"follow    squeue -j {','.join(ids)}")
    print(f"logs      {where}/jobs/*.out")
    print(f"collect   ringx collect {where}")
    print(f"plot      ringx plot {where}")
    return wait(ids, args.out, [c.id for c in cases]) if args.wait else 0


# ---- what to run


def prepare(args: argparse.Namespace, root: Path, python: str) -> tuple[list[BatchJob], list[Any]]:
    """(a job per number of nodes, the cases that they will measure).  One ValueError names everything that is wrong."""
    faults: list[str] = []

    def attempt(call, default=None, prefix=""):
        try:
            return call()
        except (ValueError, argparse.ArgumentTypeError) as e:
            faults.append(f"{prefix}{e}")
            return default

    def count(name: str, default: int) -> int:
        text = getattr(args, name.replace("-", "_"))
        if text is None:
            return default
        if not re.fullmatch(r"[1-9]\d*", str(text)):
            faults.append(f"--{name} {text!r} must be a positive integer")
            return default
        return int(text)

    where = attempt(partial(site.load, root / "env", args.site))
    nodes, wrong = sift(integers, args.nodes)
    faults += [f"--nodes: {wrong}"] if wrong else []
    nodes.sort()
    walltime = attempt(partial(site.walltime, args.time), timedelta(minutes=30), "--time ")
    ranks_per_node, chain = (
        count("ranks-per-node", where.ranks_per_node if where else 1),
        count("chain", 1),
    )
    if args.account is not None and not PLAIN.fullmatch(args.account):
        faults.append(f"--account {args.account!r} must be a plain word")
    for option in args.sbatch:
        if not re.fullmatch(r"--[a-z][a-z-]*(=[\w.,:/@&|()%+*=\[\]-]+)?", option):
            faults.append(
                f"--sbatch {option!r} must be one option of sbatch such as --partition=debug, without blanks"
            )
    if any(c in str(args.out) for c in "\n\r%\\\"'"):
        faults.append(
            f"--out {str(args.out)!r}: %, quotes and \\ mean something to Slurm in the names of logs; take another folder"
        )
    if where and where.account_required and not args.account:
        faults.append(f"--account is missing: {where.name} wants one")
    for n in nodes if where else ():
        longest = attempt(partial(where.longest, n))
        if longest and walltime > longest:
            faults.append(
                f"--time {args.time}: {where.name} gives {n} nodes at most {site.format_walltime(longest)}; see --chain"
            )
    if args.memory_per_rank is not None and not args.memory_per_rank > 0:
        faults.append(f"--memory-per-rank {args.memory_per_rank} must be a positive number of GiB")
    if args.memory_per_rank is not None and args.job != "bench":
        faults.append(
            "--memory-per-rank: bench-comm bounds its sizes by the memory that is free; leave it out"
        )
    if args.dry_run and args.wait:
        faults.append("--wait: with --dry-run there is nothing to wait for")
    matrix = _bench if args.job == "bench" else _bench_comm
    command, per_nodes, cases = matrix(args, where, {n * ranks_per_node: n for n in nodes}, faults)
    tasks = {}
    for n in nodes:
        sizes = len(per_nodes.get(n * ranks_per_node, {"": []}))
        parts = count("array", sizes)
        if parts > sizes:
            faults.append(
                f"--array {parts}: there are {sizes} sizes to measure on {n} nodes, and one is the least for a task"
            )
        if where and where.max_array and parts > where.max_array:
            faults.append(
                f"--nodes {n}: {parts} array tasks, {where.name} allows {where.max_array}; bundle sizes with --array"
            )
        tasks[n] = parts
    if faults:
        raise ValueError(benchmark.all_of(list(dict.fromkeys(faults))))
    jobs = []
    for n in nodes:
        nproc = ["--nproc", str(n * ranks_per_node)]
        part = ["--part", f"$SLURM_ARRAY_TASK_ID/{tasks[n]}"] if tasks[n] > 1 else []
        size = (
            where,
            n,
            ranks_per_node,
            walltime,
            tasks[n],
            chain,
            args.serial,
            args.account,
            tuple(args.sbatch),
        )
        jobs.append(
            BatchJob(
                f"ringx-{args.job}-n{n}",
                *size,
                (*command, *nproc, *part),
                args.out.absolute(),
                root,
                python,
            )
        )
    return jobs, cases


def _bench(args, where, worlds: dict[int, int], faults) -> Matrix:
    """For {number of ranks: nodes}; adds to the faults."""
    if args.options:
        faults.append(
            f"--options {args.options!r} is for --job bench-comm; give bench's options as they are"
        )
    args.nproc, args.part = ",".join(map(str, worlds)), None
    if args.device == "auto" and where:
        args.device = where.device
    if not worlds:
        args.nproc = "1"  # look at everything else
    cases, wrong = attention_cases.examine(args, None, None)
    faults += wrong
    memory = args.memory_per_rank or (where.memory_per_rank if where else None) or float("inf")
    for case in cases:
        if (least := least_memory(case) / 2**30) > memory:
            size = f"S={case.seqlen} on N={case.world}, H={case.heads}, D={case.head_dim}"
            faults.append(
                f"{size}: {case.algorithm} needs at least {least:.3g} GiB a rank, of {memory:g}"
            )
    given: dict[int, dict[Any, list[str]]] = {}
    for case in cases:
        given.setdefault(case.world, {}).setdefault(case.size, []).append(case.id)
    return (
        ["bench", *_words(args, "bench"), "--out", str(args.out.absolute()), "--resume"],
        given,
        cases,
    )


def _bench_comm(args, where, worlds: dict[int, int], faults) -> Matrix:
    parser = _Quiet(add_help=False)
    bench_collectives.add_matrix(parser)
    try:
        options = parser.parse_args(shlex.split(args.options))
    except ValueError as e:
        faults.append(f"--options {args.options!r}: {e}")
        return [], {}, []
    shared = ("device", "timeout", "label")  # of both: submit's own
    if others := [w for w in _words(args, "bench", without=shared) if w.startswith("--")]:
        faults.append(
            f"{', '.join(others)}: for --job bench; say what bench-comm is to do in --options"
        )
    if twice := [
        f"--{name}" for name in shared if getattr(options, name) != parser.get_default(name)
    ]:
        faults.append(
            f"--options {args.options!r}: give {', '.join(twice)} to `ringx submit` itself"
        )
    options.device, options.timeout, options.label = args.device, args.timeout, args.label
    if options.device == "auto" and where:
        options.device = where.device
    names, wrong = bench_collectives.examine(options)
    faults += wrong
    faults += [
        f"--nodes: {n} rank cannot communicate with itself; take at least two"
        for n in worlds
        if n < 2
    ]
    how = (options.warmup, options.reps)
    cases = [
        bench_collectives.Case(x, n, hosts, bench_collectives.DTYPE_NAME, *how)
        for n, hosts in worlds.items()
        for x in names
    ]
    given = {n: {"": [c.id for c in cases if c.world == n]} for n in worlds}
    return (
        [
            "bench-comm",
            *_words(options, "bench-comm"),
            "--out",
            str(args.out.absolute()),
            "--resume",
        ],
        given,
        cases,
    )


class _Quiet(argparse.ArgumentParser):
    """Raises a ValueError where argparse would end the process."""

    def error(self, message: str):
        raise ValueError(message)


def _words(args: argparse.Namespace, job: str, without: Sequence[str] = ()) -> list[str]:
    """The matrix options of `args` as words, those that differ from their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    MATRIX[job](parser)
    words: list[str] = []
    for action in parser._actions:
        value, flag = getattr(args, action.dest), action.option_strings[0]
        if value == action.default or action.dest in without:
            continue
        if value is True:
            words.append(flag)
        else:
            words += [
                w
                for one in (value if isinstance(value, list) else [value])
                for w in (flag, str(one))
            ]
    return words


def least_memory(case: attention_cases.Case) -> int:
    """Bytes that a rank holds at least, at the end of its backward: q, k, v, dout, out and their gradients, the accumulator of dq,
    and for algorithms that gather all keys and values those."""
    itemsize, acc = DTYPES[case.dtype].itemsize, acc_dtype(DTYPES[case.dtype]).itemsize
    row = case.batch * case.head_dim  # elements of one head of one token
    tokens = case.seqlen // case.world
    own = (
        tokens * row * (4 * case.heads + 4 * case.kv_heads) * itemsize
        + tokens * row * case.heads * acc
    )
    gathered = (
        2 * (case.seqlen - tokens) * row * case.kv_heads * itemsize
        if case.algorithm == "ringx3"
        else 0
    )
    return own + gathered


# ---- the script


def render(job: BatchJob) -> str:
    """The batch script.  What a user typed is quoted: for the shell in commands, for Slurm in #SBATCH lines."""
    warning = min(WARNING, int(job.time.total_seconds()) // 3)
    # %j rather than the task's number where there is no array
    log = f"{job.out}/jobs/{job.name}_{'%A_%a' if job.tasks > 1 else '%j'}.out"
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--time={site.format_walltime(job.time)}",
        *([f"--account={job.account}"] if job.account else []),
        *([f"--array=0-{job.tasks - 1}{'%1' if job.serial else ''}"] if job.tasks > 1 else []),
        f"--signal=B:USR1@{warning}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}" if re.fullmatch(r"[\w./%:=@+,-]+", log) else f'--output="{log}"',
        *job.site.sbatch,
        *job.sbatch,
    ]
    lines, words = [], list(job.command)
    while words:  # an option and its value a line
        value = (
            [_shell(words.pop(1))]
            if len(words) > 1 and words[0].startswith("--") and not words[1].startswith("--")
            else []
        )
        lines.append(" ".join([_shell(words.pop(0)), *value]))
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {job.name} at {job.site.name}, written by `ringx submit`; to submit it again: sbatch {job.name}.sbatch",
            *(f"#SBATCH {option}" for option in options),
            "",
            f"cd {_shell(str(job.root))} || exit 1",
            f"source script/job.sh {_shell(job.site.name)} {_shell(job.python)}",
            *(
                ["on_limit=leave  # the next job of the chain does the rest"]
                if job.chain > 1
                else []
            ),
            'ranks "$PYTHON" -m ringx ' + " \\\n    ".join(lines),
            "job_end",
            "",
        ]
    )


def _shell(word: str) -> str:
    """Quoted for bash; the array task's own number stays a variable."""
    return f'"{word}"' if re.fullmatch(r"\$SLURM_ARRAY_TASK_ID/\d+", word) else shlex.quote(word)


def table(jobs: Sequence[BatchJob]) -> str:
    lines = [
        f"{'job':24} {'nodes':>6} {'ranks':>7} {'tasks':>6} {'chain':>6} {'time':>10} {'node-hours':>11}"
    ]
    for job in jobs:
        ranks = job.nodes * job.ranks_per_node
        lines.append(
            f"{job.name:24} {job.nodes:6} {ranks:7} {job.tasks:6} {job.chain:6} {site.format_walltime(job.time):>10} {job.node_hours:11.2f}"
        )
    total = sum(job.node_hours for job in jobs)
    return "\n".join(
        [
            *lines,
            f"asks for {total:.2f} node-hours at most (nodes x walltime x array tasks x chain)",
        ]
    )


# ---- Slurm


def submit(script: Path, chain: int, after: str | None = None) -> list[str]:
    """The ids of the submitted job, and of those that follow it.  A job waits for the end of the one before (afterany: whatever
    became of it), the first for that of job `after`."""
    ids: list[str] = []
    for _ in range(chain):
        last = ids[-1] if ids else after
        wait_for = [f"--dependency=afterany:{last}"] if last else []
        done = subprocess.run(
            ["sbatch", "--parsable", *wait_for, str(script)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            followed = f" (after {', '.join(ids)}, which wait in the queue)" if ids else ""
            raise RuntimeError(f"sbatch refused {script}{followed}: {done.stderr.strip()}")
        ids.append(done.stdout.strip().split(";")[0])
    return ids


def wait(ids: Sequence[str], out: Path, wanted: Sequence[str]) -> int:
    """Until none of the jobs is in the queue.  0 if all records are there."""

    def there() -> int:
        return sum(records.path_of(out, i).exists() for i in wanted)

    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        bar = progress.add_task("records", total=len(wanted))
        while _in_queue(ids):
            progress.update(bar, completed=there())
            time.sleep(2)
    print(f"{there()} of {len(wanted)} records are there")
    return 0 if there() == len(wanted) else 1


def _in_queue(ids: Sequence[str]) -> bool:
    done = subprocess.run(
        ["squeue", "-h", "-o", "%A %F"], capture_output=True, text=True, check=False
    )
    if done.returncode:  # the controller may be busy for a while
        return True
    return bool(set(done.stdout.split()) & set(ids))
