"""Where a measurement comes from: versions, commit, machine, job.  Everything that a record holds besides its numbers."""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..launch import World, gather

PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "amd-aiter", "mpi4py")
ENVIRONMENT = (
    "OMP_",
    "KMP_",
    "NCCL_",
    "RCCL_",
    "GLOO_",
    "FI_",
    "TORCH_NCCL_",
)  # variables that change what is measured


def of_run(world: World, options: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """What all records of a run have in common.  Collective."""
    hosts = gather((socket.gethostname(), sorted(cores())), world)
    cuda = world.device.type == "cuda"
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
            "cores": len({core for host, cores in hosts if host == hosts[0][0] for core in cores}),
            "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
            "load_average": load_average(),
        },
        "launch": {
            "launcher": str(world.launcher),
            "backend": str(world.backend),
            "local_world": world.local_world,
            "environment": {
                k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)
            },
            "job": job(),
        },
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, Any]:
    from .. import __version__

    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    accelerator = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else None
    )
    return {
        "ringx": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "accelerator": accelerator,
        "packages": packages,
    }


def git() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether the package differs from it; None if it is installed."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(package)]
        commit = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run(
            [*ask, "status", "--porcelain", "--", "."],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def job() -> dict[str, Any] | None:
    """The Slurm job that this process belongs to."""
    if "SLURM_JOB_ID" not in os.environ:
        return None

    def number(name: str) -> int | None:
        return int(text) if (text := os.environ.get(name, "")).isdigit() else None

    return {
        "id": number("SLURM_ARRAY_JOB_ID") or number("SLURM_JOB_ID"),
        "array_task": number("SLURM_ARRAY_TASK_ID"),
        "restart": number("SLURM_RESTART_COUNT") or 0,
        "nodes": number("SLURM_JOB_NUM_NODES"),
        "partition": os.environ.get("SLURM_JOB_PARTITION"),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "site": os.environ.get("RINGX_SITE"),
    }


def cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
