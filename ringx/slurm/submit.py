"""ringx submit: Slurm jobs that measure a matrix of cases at a site, checked before they wait in a
queue.

    ringx submit --site generic-cpu --nodes 1,2,4 --seqlens 4096,8192 --kv-heads 8,2 \\
        --out results/here --dry-run
    ringx submit --site frontier --account ABC123 --nodes 1,2,4,8 --seqlens-per-rank 8192 \\
        --time 1:00:00 --out runs/weak
    ringx submit --site lumi --account project_1 --job bench-comm --nodes 2,4 \\
        --options "--max-bytes 256M" --out runs/comm

One batch script per number of nodes; in it an array task per size (all algorithms of a size are
measured side by side).  The scripts stay in DIR/jobs, to be read, edited and submitted again by
hand; they resume what DIR already holds.  A job that Slurm warns before its time limit, or that
loses a node, goes back into the queue; with --chain N it is followed by N - 1 others instead.

Everything that is wrong is named at once, and nothing is submitted then.  What is checked: the
site, its limits and account; the names and sizes, and whether the layout can cut them; the least
memory that a case needs; whether DIR can be written to.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .. import files
from ..measure import benchmark, records
from ..measure import cases as attention_cases
from .batch_script import BatchJob, render, table
from .jobs import ADD_MATRIX, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", required=True, help="name of a file in env/, such as generic-cpu")
    parser.add_argument(
        "--job", default="bench", choices=list(ADD_MATRIX), help="what to run (default: bench)"
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
            "script/ and env/, which the jobs need, are not beside this installation; "
            "use a checkout."
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
    # records that are there must fit what the jobs would measure
    labels = benchmark.parse_labels(args.label)
    unmeasured = benchmark.remaining(args.out, cases, True, labels)
    remark = "" if unmeasured else "; nothing to submit"
    print(f"{len(unmeasured)} of {len(cases)} cases are to be measured{remark}")
    if not unmeasured:
        return 0
    records.expect_room(args.out / "jobs", 2**16)
    ids = _submit_all(jobs, scripts, args.out)
    folder = shlex.quote(str(args.out))
    print(f"follow    squeue -j {','.join(ids)}")
    print(f"logs      {folder}/jobs/*.out")
    print(f"collect   ringx collect {folder}")
    print(f"plot      ringx plot {folder}")
    if args.wait:
        return wait(ids, args.out, [case.id for case in cases])
    return 0


def _submit_all(jobs: Sequence[BatchJob], scripts: dict[str, str], out: Path) -> list[str]:
    """Writes the scripts into out/jobs and submits them; the ids of all jobs."""
    ids: list[str] = []
    for job in jobs:
        script = out / "jobs" / f"{job.name}.sbatch"
        files.write_text(script, scripts[job.name], replace=True)
        previous = ids[-1] if ids and job.serial else None
        try:
            ids += submit(script, job.chain, after=previous)
        except RuntimeError as error:
            submitted = ""
            if ids:
                submitted = (
                    f"; submitted before: {', '.join(ids)} (scancel {' '.join(ids)} ends them)"
                )
            raise RuntimeError(f"{error}{submitted}") from None
        print(f"submitted {', '.join(ids[-job.chain :])}: {script}")
    return ids


def submit(script: Path, chain: int, after: str | None = None) -> list[str]:
    """The ids of the submitted job, and of those that follow it.

    A job waits for the end of the one before (afterany: however it ended), the first for that of
    job `after`.

    Raises:
        RuntimeError: sbatch refused."""
    ids: list[str] = []
    previous = after
    for _ in range(chain):
        dependency = [f"--dependency=afterany:{previous}"] if previous else []
        result = subprocess.run(
            ["sbatch", "--parsable", *dependency, str(script)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            submitted = f" (after {', '.join(ids)}, which wait in the queue)" if ids else ""
            raise RuntimeError(f"sbatch refused {script}{submitted}: {result.stderr.strip()}")
        previous = result.stdout.strip().split(";")[0]
        ids.append(previous)
    return ids


def wait(ids: Sequence[str], out: Path, case_ids: Sequence[str]) -> int:
    """Waits until none of the jobs is in the queue.  The exit status: 0 if all records are
    there."""

    def count_records() -> int:
        return sum(records.path_of(out, case_id).exists() for case_id in case_ids)

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("records", total=len(case_ids))
        while _in_queue(ids):
            progress.update(bar, completed=count_records())
            time.sleep(2)
    print(f"{count_records()} of {len(case_ids)} records are there")
    return 0 if count_records() == len(case_ids) else 1


def _in_queue(ids: Sequence[str]) -> bool:
    result = subprocess.run(
        ["squeue", "-h", "-o", "%A %F"], capture_output=True, text=True, check=False
    )
    if result.returncode:  # the controller may be busy for a while
        return True
    return bool(set(result.stdout.split()) & set(ids))
