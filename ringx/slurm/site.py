"""What is known of a site: the facts at the head of env/SITE.sh, against which ``ringx submit``
checks a job.

A site file is a bash script that a job sources.  Two kinds of its lines are read here as well:

    #SITE limit 91 2:00:00       a fact; FACTS lists them.  What follows " # " is a remark
    #SBATCH --partition=batch    options of sbatch, copied into the job as they are
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..checks import require_name

FACTS = {
    "device": "cpu, or cuda (CUDA and ROCm)",
    "ranks-per-node": "ranks on a full node",
    "memory-per-rank": "GiB of the device that a rank computes in",
    "account": "required, or optional",
    "max-array": "the largest number of array tasks",
    "limit": "NODES TIME: up to so many nodes the longest walltime; one line per bin, rising, "
    "the last is the largest job",
    "srun": "options for srun",
}


@dataclass(frozen=True)
class Site:
    name: str
    device: str = "cpu"
    ranks_per_node: int = 1
    memory_per_rank: float | None = None  # GiB; None: not known
    account_required: bool = False
    max_array: int | None = None
    # (up to so many nodes, longest walltime), rising
    limits: tuple[tuple[int, timedelta], ...] = ()
    srun: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()  # options, as they stand in the file

    def longest(self, nodes: int) -> timedelta | None:
        """The longest walltime on so many nodes; None where no limit is known.

        Raises:
            ValueError: the site has no jobs that large."""
        for most_nodes, longest_walltime in self.limits:
            if nodes <= most_nodes:
                return longest_walltime
        if self.limits:
            raise ValueError(
                f"--nodes {nodes}: {self.name} has at most {self.limits[-1][0]} nodes for a job"
            )
        return None


def names(folder: Path) -> list[str]:
    """The sites that have a file in the folder."""
    return sorted(path.stem for path in Path(folder).glob("*.sh"))


def load(folder: Path, name: str) -> Site:
    """The site of folder/NAME.sh.

    Raises:
        ValueError: there is no such site, or a fact makes no sense; names it, and the line."""
    require_name(name, names(folder), "site")
    file = Path(folder) / f"{name}.sh"
    facts, sbatch = _read_lines(file)
    device = _single(facts, file, "device", default="cpu")
    account = _single(facts, file, "account", default="optional")
    if device not in ("cpu", "cuda") or account not in ("required", "optional"):
        raise ValueError(
            f"{file}: device {device!r} must be cpu or cuda, "
            f"account {account!r} required or optional."
        )
    limits = _parse_limits(file, facts.get("limit", []))
    return Site(
        name=name,
        device=device,
        memory_per_rank=_single(facts, file, "memory-per-rank", convert=float),
        ranks_per_node=_single(facts, file, "ranks-per-node", convert=int, default=1),
        account_required=account == "required",
        max_array=_single(facts, file, "max-array", convert=int),
        limits=limits,
        srun=tuple(shlex.split(" ".join(facts.get("srun", [])))),
        sbatch=tuple(sbatch),
    )


def _read_lines(file: Path) -> tuple[dict[str, list[str]], list[str]]:
    """({fact: its values}, options of sbatch) of a site file."""
    facts: dict[str, list[str]] = {}
    sbatch: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        option = re.match(r"#SBATCH\s+(.*\S)", line)
        if option:
            sbatch.append(option[1])
        elif line.startswith("#SITE"):
            fact = re.match(r"#SITE\s+(\S+)\s+(.*?)\s*(?:\s#\s.*)?$", line)
            if fact is None:
                raise ValueError(f"{file}, line {number}: {line!r} is not '#SITE KEY VALUE'.")
            name, value = fact.groups()
            if name not in FACTS or not value:
                raise ValueError(
                    f"{file}, line {number}: {name!r} is no fact, or has no value; "
                    f"there are {', '.join(FACTS)}."
                )
            facts.setdefault(name, []).append(value)
    return facts, sbatch


def _single(
    facts: dict[str, list[str]],
    file: Path,
    name: str,
    *,
    convert: Callable[[str], Any] = str,
    default: Any = None,
) -> Any:
    """The value of a fact that a file gives once, or not at all."""
    values = facts.get(name, [])
    if len(values) > 1:
        raise ValueError(f"{file}: {name} is there {len(values)} times.")
    if not values:
        return default
    try:
        return convert(values[0])
    except ValueError:
        raise ValueError(f"{file}: {name} {values[0]!r} is not: {FACTS[name]}.") from None


def _parse_limits(file: Path, texts: list[str]) -> tuple[tuple[int, timedelta], ...]:
    limits: list[tuple[int, timedelta]] = []
    for text in texts:
        words = text.split()
        if len(words) != 2 or not words[0].isdigit():
            raise ValueError(f"{file}: limit {text!r} is not NODES TIME.")
        limits.append((int(words[0]), walltime(words[1])))
    if limits != sorted(limits, key=lambda limit: limit[0]):
        raise ValueError(f"{file}: its limits do not rise with the number of nodes.")
    return tuple(limits)


def walltime(text: str) -> timedelta:
    """Slurm's ways to write a time: minutes, MM:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS.

    Raises:
        ValueError: it is none of them, or no time at all."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", text.strip())
    if not match:
        raise ValueError(f"{text!r} is no time such as 30 (minutes), 1:30:00 or 1-12:00:00")
    days, first, second, third = (int(part) for part in match.groups(default="0"))
    if match[1] is not None:
        time = timedelta(days=days, hours=first, minutes=second, seconds=third)
    elif match[4] is not None:
        time = timedelta(hours=first, minutes=second, seconds=third)
    else:
        time = timedelta(minutes=first, seconds=second)
    if not time:
        raise ValueError(f"{text!r} is no time at all")
    return time


def format_walltime(time: timedelta) -> str:
    """H:MM:SS, or D-HH:MM:SS."""
    minutes, seconds = divmod(int(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}"
