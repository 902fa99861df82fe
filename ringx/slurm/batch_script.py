"""A batch script that measures some of the cases at a site, and the table of what scripts ask
for."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from .site import Site, format_walltime

MAX_WARNING = 120  # seconds before the time limit at which Slurm warns, at most


@dataclass(frozen=True)
class BatchJob:
    """One batch script."""

    name: str
    site: Site
    nodes: int
    ranks_per_node: int
    time: timedelta  # walltime of each array task
    tasks: int  # of the job array; 1: no array
    chain: int  # jobs one after another
    serial: bool  # one array task at a time
    account: str | None
    sbatch: tuple[str, ...]  # options, one a line
    command: tuple[str, ...]  # after $PYTHON -m ringx
    out: Path
    root: Path  # the checkout
    python: str

    @property
    def node_hours(self) -> float:
        """That it may use at most."""
        hours = self.time.total_seconds() / 3600
        return self.nodes * hours * self.tasks * self.chain


def render(job: BatchJob) -> str:
    """The batch script.

    What a user typed is quoted: for the shell in commands, for Slurm in #SBATCH lines."""
    lines = [
        "#!/bin/bash",
        f"# {job.name} at {job.site.name}, written by `ringx submit`; "
        f"to submit it again: sbatch {job.name}.sbatch",
    ]
    lines += [f"#SBATCH {option}" for option in _sbatch_options(job)]
    lines += [
        "",
        f"cd {_quote(str(job.root))} || exit 1",
        f"source script/job.sh {_quote(job.site.name)} {_quote(job.python)}",
    ]
    if job.chain > 1:
        lines.append("on_limit=leave  # the next job of the chain does the rest")
    lines += [
        'ranks "$PYTHON" -m ringx ' + " \\\n    ".join(_command_lines(job.command)),
        "job_end",
        "",
    ]
    return "\n".join(lines)


def _sbatch_options(job: BatchJob) -> list[str]:
    is_array = job.tasks > 1
    warning = min(MAX_WARNING, int(job.time.total_seconds()) // 3)
    task = "%A_%a" if is_array else "%j"
    log = f"{job.out}/jobs/{job.name}_{task}.out"
    needs_quotes = re.fullmatch(r"[\w./%:=@+,-]+", log) is None
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--time={format_walltime(job.time)}",
    ]
    if job.account:
        options.append(f"--account={job.account}")
    if is_array:
        at_once = "%1" if job.serial else ""
        options.append(f"--array=0-{job.tasks - 1}{at_once}")
    options += [
        f"--signal=B:USR1@{warning}",
        "--requeue",
        "--open-mode=append",
        f'--output="{log}"' if needs_quotes else f"--output={log}",
    ]
    options += job.site.sbatch
    options += job.sbatch
    return options


def _command_lines(words: Sequence[str]) -> list[str]:
    """The quoted words: an option and its value a line, every other word on one of its own."""
    lines: list[str] = []
    previous = ""  # the word before, if it may have a value
    for word in words:
        is_option = word.startswith("--")
        if previous.startswith("--") and not is_option:
            lines[-1] += f" {_quote(word)}"
            previous = ""
        else:
            lines.append(_quote(word))
            previous = word
    return lines


def _quote(word: str) -> str:
    """Quoted for bash; the array task's own number stays a variable."""
    if re.fullmatch(r"\$SLURM_ARRAY_TASK_ID/\d+", word):
        return f'"{word}"'
    return shlex.quote(word)


def table(jobs: Sequence[BatchJob]) -> str:
    """The size of each job, and the node-hours of all."""
    lines = [
        f"{'job':24} {'nodes':>6} {'ranks':>7} {'tasks':>6} {'chain':>6} {'time':>10} "
        f"{'node-hours':>11}"
    ]
    for job in jobs:
        ranks = job.nodes * job.ranks_per_node
        lines.append(
            f"{job.name:24} {job.nodes:6} {ranks:7} {job.tasks:6} {job.chain:6} "
            f"{format_walltime(job.time):>10} {job.node_hours:11.2f}"
        )
    total = sum(job.node_hours for job in jobs)
    lines.append(
        f"asks for {total:.2f} node-hours at most (nodes x walltime x array tasks x chain)"
    )
    return "\n".join(lines)
