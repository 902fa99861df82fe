"""Runs of the trainers: starting them as users do, and reading what they leave behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from helpers.paths import ROOT

from apps.common.log import read_metrics


def start(*words: object, **env: str) -> subprocess.Popen:
    """A Python process in the repository's root, with a group of processes of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(*words: object, status: int = 0, timeout: float = 180) -> str:
    """What such a process prints until it ends, with this status."""
    process = start(*words, PYTHONFAULTHANDLER="1")
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # every rank says where it is
        raise AssertionError(f"no end within {timeout} s:\n{process.communicate()[0]}") from None
    assert process.returncode == status, output
    return output


def losses(out: str | Path) -> list[float]:
    """Of all steps of a run."""
    return [record["loss"] for record in read_metrics(out)]


def parameters(out: str | Path, step: int) -> dict[str, torch.Tensor]:
    """Of a run's checkpoint, read without this repository's code."""
    path = Path(out) / "checkpoints" / f"step-{step:08d}"
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for name, metadata in stored.items()
        if name.startswith("model.")
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    assert state
    return state


def remove_checkpoints(out: str | Path, *, after: int) -> None:
    """As if the run had ended after so many steps."""
    for path in (Path(out) / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > after:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
