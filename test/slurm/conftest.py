"""The cluster that these tests share; skipped with the reason where there can be none."""

import re

import pytest
from helpers.slurm_cluster import Cluster, missing_requirement


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := missing_requirement():
        pytest.skip(f"no Slurm cluster: {reason}")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made("up")
        yield made
    finally:
        made("down")


@pytest.fixture
def healthy(cluster):
    """A cluster whose nodes are all there, before and after the test."""
    yield cluster
    cluster("exec", "bash", "-c", "squeue -h -o %A | xargs -r scancel", check=False)
    for i in range(1, 9):
        up = (cluster.folder / "cluster" / f"n{i}.pid").exists()
        cluster(*(("link", i, "up") if up else ("boot", i)))
    cluster("wait", 10, check=False)
    for i in re.findall(
        r"^n(\d) (?!idle)", cluster("exec", "sinfo", "-h", "-N", "-o", "%n %T"), re.MULTILINE
    ):
        cluster("crash", i)  # a node that was cut off takes up to a minute to find back
        cluster("boot", i)
    cluster("wait", 60)
