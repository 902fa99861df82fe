"""What is known of a site: the facts at the head of env/SITE.sh, against which ``ringx submit`` checks a job.

A site file is a bash script that a job sources.  Two kinds of its lines are read here as well:

    #SITE limit 91 2:00:00       a fact; KEYS says which there are.  What follows " # " is a remark
    #SBATCH --partition=batch    options of sbatch, copied into the job as they are
"""

import re
import shlex
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ..checks import require_name

KEYS = {
    "device": "cpu, or cuda (CUDA and ROCm)",
    "ranks-per-node": "ranks on a full node",
    "memory-per-rank": "GiB of the device that a rank computes in",
    "account": "required, or optional",
    "max-array": "the largest number of array tasks",
    "limit": "NODES TIME: up to so many nodes the longest walltime; one line per bin, rising, the last is the largest job",
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
    limits: tuple[
        tuple[int, timedelta], ...
    ] = ()  # (up to so many nodes, longest walltime), rising
    srun: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()  # options, as they stand in the file

    def longest(self, nodes: int) -> timedelta | None:
        """The longest walltime on so many nodes; None where no limit is known.

        Raises:
            ValueError: the site has no jobs that large."""
        for most, walltime in self.limits:
            if nodes <= most:
                return walltime
        if self.limits:
            raise ValueError(
                f"--nodes {nodes}: {self.name} has at most {self.limits[-1][0]} nodes for a job"
            )
        return None


def names(folder: Path) -> list[str]:
    return sorted(p.stem for p in Path(folder).glob("*.sh"))


def load(folder: Path, name: str) -> Site:
    """The site of folder/NAME.sh.

    Raises:
        ValueError: there is no such site, or a fact makes no sense; names it, and the line."""
    require_name(name, names(folder), "site")
    facts: dict[str, list[str]] = {}
    sbatch: list[str] = []
    file = Path(folder) / f"{name}.sh"
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if match := re.match(r"#SBATCH\s+(.*\S)", line):
            sbatch.append(match[1])
        elif match := re.match(r"#SITE\s+(\S+)\s+(.*?)\s*(?:\s#\s.*)?$", line):
            if match[1] not in KEYS or not match[2]:
                raise ValueError(
                    f"{file}, line {number}: {match[1]!r} is no fact, or has no value; there are {', '.join(KEYS)}."
                )
            facts.setdefault(match[1], []).append(match[2])
        elif line.startswith("#SITE"):
            raise ValueError(f"{file}, line {number}: {line!r} is not '#SITE KEY VALUE'.")

    def one(key: str, kind=str, default=None):
        values = facts.get(key, [])
        if len(values) > 1:
            raise ValueError(f"{file}: {key} is there {len(values)} times.")
        try:
            return kind(values[0]) if values else default
        except ValueError:
            raise ValueError(f"{file}: {key} {values[0]!r} is not: {KEYS[key]}.") from None

    device, account = one("device", default="cpu"), one("account", default="optional")
    if device not in ("cpu", "cuda") or account not in ("required", "optional"):
        raise ValueError(
            f"{file}: device {device!r} must be cpu or cuda, account {account!r} required or optional."
        )
    limits = []
    for text in facts.get("limit", []):
        words = text.split()
        if len(words) != 2 or not words[0].isdigit():
            raise ValueError(f"{file}: limit {text!r} is not NODES TIME.")
        limits.append((int(words[0]), walltime(words[1])))
    if limits != sorted(limits, key=lambda limit: limit[0]):
        raise ValueError(f"{file}: its limits do not rise with the number of nodes.")
    memory, ranks = one("memory-per-rank", float), one("ranks-per-node", int, 1)
    srun = tuple(shlex.split(" ".join(facts.get("srun", []))))
    return Site(
        name,
        device,
        ranks,
        memory,
        account == "required",
        one("max-array", int),
        tuple(limits),
        srun,
        tuple(sbatch),
    )


def walltime(text: str) -> timedelta:
    """Slurm's ways to write a time: minutes, MM:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS.

    Raises:
        ValueError: it is none of them, or no time at all."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", text.strip())
    if not match:
        raise ValueError(f"{text!r} is no time such as 30 (minutes), 1:30:00 or 1-12:00:00")
    days, *rest = (int(part) if part else None for part in match.groups())
    first, second, third = rest
    if days is not None:
        found = timedelta(days=days, hours=first or 0, minutes=second or 0, seconds=third or 0)
    elif third is not None:
        found = timedelta(hours=first or 0, minutes=second or 0, seconds=third)
    else:
        found = timedelta(minutes=first or 0, seconds=second or 0)
    if not found:
        raise ValueError(f"{text!r} is no time at all")
    return found


def written(time: timedelta) -> str:
    """H:MM:SS, or D-HH:MM:SS."""
    minutes, seconds = divmod(int(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (
        f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
        if days
        else f"{hours}:{minutes:02}:{seconds:02}"
    )
