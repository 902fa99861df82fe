"""test/slurm/cluster from Python, for tests."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.paths import ROOT, TEST

from ringx.launch.environ import hosts_of

# variables that the tests' own shell may have
LAUNCHER_VARIABLES = re.compile(r"SLURM_|PMI|OMPI_|MASTER_|GLOO_|RANK$|WORLD_SIZE$|LOCAL_|CL_")
REQUIRED_TOOLS = ("slurmctld", "sbatch", "munged", "ip", "tc", "unshare")
FINAL_STATES = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}


class Cluster:
    """test/slurm/cluster, and short ways to what the tests want of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.status = 0  # exit status of the last command
        self.env = {
            name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.match(name)
        }
        self.env |= {
            "CL_DIR": str(folder / "cluster"),
            "CL_NODES": "8",
            "CL_CPUS": "4",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            "PYTHONUNBUFFERED": "1",
        }

    def __call__(self, *words: object, check: bool = True, timeout: float = 120, **env: str) -> str:
        """The output of a cluster command, stdout and stderr together."""
        process = self.popen(*words, **env)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(
                f"{words} took longer than {timeout} s: {process.communicate()[0]}"
            ) from None
        status = process.returncode
        assert not check or status == 0, f"{words}: status {status}\n{output}"
        self.status = status
        return output

    def popen(self, *words: object, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(TEST / "slurm/cluster"), *map(str, words)],
            env=self.env | env,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )

    def ringx(self, *words: object, **options) -> str:
        return self("exec", sys.executable, "-m", "ringx", *words, **options)

    def sbatch(self, *words: object, **env: str) -> str:
        """The id of a submitted job."""
        return self("exec", "sbatch", "--parsable", *words, **env).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields that scontrol shows of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self._show(job)))

    def _show(self, job: str) -> str:
        return self("exec", "scontrol", "show", "job", job)

    def await_job(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Waits for its end (of the whole array: all of its tasks)."""

        def all_ended() -> bool:
            states = re.findall(r"JobState=(\w+)", self._show(job))
            return bool(states) and set(states) <= FINAL_STATES

        wait_for(all_ended, timeout, lambda: self("status") + self._show(job))
        return self.job(job)

    def nodes_of(self, job: str) -> list[int]:
        """Numbers of the nodes that a running job is on, the first one first."""
        return [int(name.removeprefix("n")) for name in hosts_of(self.job(job)["NodeList"])]


def wait_for(
    condition: Callable[[], object], timeout: float, explain: Callable[[], str] = lambda: ""
) -> None:
    """Waits until the condition holds; a failure after `timeout` seconds shows `explain()`."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s\n{explain()}"
        time.sleep(0.2)


def missing_requirement() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if sys.platform != "linux":
        return "needs Linux's namespaces"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in REQUIRED_TOOLS if not shutil.which(tool, path=path)]
    if missing:
        return (
            f"{missing[0]} is missing: "
            "apt-get install --no-install-recommends slurm-wlm munge iproute2"
        )
    unshare = ["unshare", "--net", "--pid", "--fork", "true"]
    if subprocess.run(unshare, capture_output=True, check=False).returncode:
        return "this machine does not let root make namespaces"
    return None
