"""Where a measurement comes from: versions, commit, machine, job.  Everything that a record holds
besides its numbers."""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..launch import World, gather

PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "amd-aiter", "mpi4py")
# Variables that change what is measured, by how their names begin.
ENVIRONMENT = ("OMP_", "KMP_", "NCCL_", "RCCL_", "GLOO_", "FI_", "TORCH_NCCL_")


def of_run(world: World, options: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """What all records of a run have in common; the same keys on every rank.  Collective.

    options: of the command; what JSON does not know is noted as text."""
    hosts = gather((socket.gethostname(), sorted(cores())), world)
    environment = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)
    }
    return {
        "labels": dict(labels),
        "command": {
            "argv": ["ringx", *sys.argv[1:]],
            "options": json.loads(json.dumps(options, default=str)),
        },
        "versions": versions(),
        "git": git() if world.rank == 0 else None,
        "machine": {
            "hosts": list(dict.fromkeys(host for host, _ in hosts)),
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cores": cores_of_first_host(hosts),
            "device": device_name(world.device),
            "load_average": load_average(),
        },
        "launch": {
            "launcher": str(world.launcher),
            "backend": str(world.backend),
            "local_world": world.local_world,
            "environment": environment,
            "job": job(),
        },
    }


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, Any]:
    from .. import __version__

    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    accelerator = None
    if torch.version.cuda:
        accelerator = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        accelerator = f"ROCm {torch.version.hip}"
    return {
        "ringx": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "accelerator": accelerator,
        "packages": packages,
    }


def git() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether the package differs from it;
    None if it is installed."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    try:
        commit = _git_output(package, "rev-parse", "HEAD", timeout=10)
        changes = _git_output(package, "status", "--porcelain", "--", ".", timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git_output(folder: Path, *words: str, timeout: float) -> str:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    return done.stdout.strip()


def job() -> dict[str, Any] | None:
    """The Slurm job that this process belongs to, if it does."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return {
        "id": _integer_variable("SLURM_ARRAY_JOB_ID") or _integer_variable("SLURM_JOB_ID"),
        "array_task": _integer_variable("SLURM_ARRAY_TASK_ID"),
        "restart": _integer_variable("SLURM_RESTART_COUNT") or 0,
        "nodes": _integer_variable("SLURM_JOB_NUM_NODES"),
        "partition": os.environ.get("SLURM_JOB_PARTITION"),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "site": os.environ.get("RINGX_SITE"),
    }


def _integer_variable(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def cores_of_first_host(hosts: Sequence[tuple[str, Iterable[int]]]) -> int:
    """How many cores the ranks of the first rank's host may use together.

    hosts: (name of the host, numbers of the cores) of each rank."""
    first_host = hosts[0][0]
    usable: set[int] = set()
    for host, numbers in hosts:
        if host == first_host:
            usable.update(numbers)
    return len(usable)


def device_name(device: torch.device) -> str:
    """ "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_model() -> str:
    """The model's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """Of 1, 5 and 15 minutes; None where the system has none."""
    if not hasattr(os, "getloadavg"):
        return None
    return [round(load, 2) for load in os.getloadavg()]
