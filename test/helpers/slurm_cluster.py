"""test/slurm/cluster from Python, for tests; why it cannot be had, where it cannot."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from helpers.paths import ROOT, TEST

from ringx.launch.environ import hosts_of

OUR_OWN = re.compile(
    r"SLURM_|PMI|OMPI_|MASTER_|GLOO_|RANK$|WORLD_SIZE$|LOCAL_|CL_"
)  # variables that the tests' own shell may have


class Cluster:
    """test/slurm/cluster, and short ways to what the tests want of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not OUR_OWN.match(k)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env |= {
            "CL_DIR": str(folder / "cluster"),
            "CL_NODES": "8",
            "CL_CPUS": "4",
            "OMP_NUM_THREADS": "1",
            "PATH": path,
        }
        self.env |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}

    def __call__(self, *words: object, check: bool = True, timeout: float = 120, **env: str) -> str:
        """The output of a cluster command, stdout and stderr together."""
        done = self.popen(*words, **env)
        try:
            said, _ = done.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            done.kill()
            raise AssertionError(
                f"{words} took longer than {timeout} s: {done.communicate()[0]}"
            ) from None
        assert not check or done.returncode == 0, f"{words}: status {done.returncode}\n{said}"
        self.status = done.returncode
        return said

    def popen(self, *words: object, **env: str) -> subprocess.Popen:
        command = [str(TEST / "slurm/cluster"), *map(str, words)]
        pipes = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "stdin": subprocess.DEVNULL,
        }
        return subprocess.Popen(command, env=self.env | env, cwd=self.folder, text=True, **pipes)

    def ringx(self, *words: object, **how) -> str:
        return self("exec", sys.executable, "-m", "ringx", *words, **how)

    def sbatch(self, *words: object, **env: str) -> str:
        """The id of a submitted job."""
        return self("exec", "sbatch", "--parsable", *words, **env).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self("exec", "scontrol", "show", "job", job)))

    def await_job(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Waits for its end (of the whole array: all of its tasks)."""
        ended = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}

        def all_ended():
            states = re.findall(r"JobState=(\w+)", self("exec", "scontrol", "show", "job", job))
            return states and set(states) <= ended

        wait_for(
            all_ended,
            timeout,
            lambda: self("status") + self("exec", "scontrol", "show", "job", job),
        )
        return self.job(job)

    def nodes_of(self, job: str) -> list[int]:
        """Numbers of the nodes that a running job is on, the first one first."""
        return [int(name.removeprefix("n")) for name in hosts_of(self.job(job)["NodeList"])]


def wait_for(condition, timeout: float, explain=lambda: "") -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s\n{explain()}"
        time.sleep(0.2)


def missing_requirement() -> str | None:
    if sys.platform != "linux":
        return "needs Linux's namespaces"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [
        t
        for t in ("slurmctld", "sbatch", "munged", "ip", "tc", "unshare")
        if not shutil.which(t, path=path)
    ]:
        return f"{missing[0]} is missing: apt-get install --no-install-recommends slurm-wlm munge iproute2"
    if subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False
    ).returncode:
        return "this machine does not let root make namespaces"
    return None
