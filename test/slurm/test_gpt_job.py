"""The GPT app as a Slurm job: warned before its time limit, or after a crash, it goes on.

python -m pytest test/slurm/test_gpt_job.py
"""

import pytest
from helpers.paths import ROOT
from helpers.slurm_cluster import wait_for

from apps.common.log import read_metrics, read_sessions
from apps.gpt.data.prepare import prepare

pytestmark = pytest.mark.slurm
SMALL = """
preset: tiny
model: {dim: 32, layers: 2, ffn: 48, vocab: 264}
train: {seqlen: 64, global_batch: 2, steps: 150, save_every: 10, dtype: float64}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder of the test; words that job.sbatch is given."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "small.yaml").write_text(SMALL)
    prepare([ROOT / "ringx"], folder / "data", tokenizer="bytes")
    return folder, f"--config {folder}/small.yaml --data {folder}/data --no-tensorboard"


def submit(cluster, folder, words, name, *options):
    out = folder / name
    sbatch = f"sbatch --parsable -N2 {' '.join(options)} -o {out}.log apps/gpt/job.sbatch {words}"
    command = f"cd {ROOT} && {sbatch}"
    return cluster("exec", "bash", "-c", command, OUT=str(out)).strip(), out


def steps(out):
    return len(read_metrics(out)) if (out / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="module")
def unbroken(cluster, job):
    """Losses of a job that nothing disturbs."""
    number, out = submit(cluster, *job, "unbroken")
    ended = cluster.await_job(number)
    assert ended["JobState"] == "COMPLETED", out.with_suffix(".log").read_text()
    return [r["loss"] for r in read_metrics(out)]


def expect_restarted(cluster, number, out, unbroken):
    """The job ends in its second start; returns the step that this began with."""
    ended = cluster.await_job(number, timeout=240)
    log = out.with_suffix(".log").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert cluster.job(number)["Restarts"] == "1"
    assert [r["loss"] for r in read_metrics(out)] == unbroken
    _, second = read_sessions(out)
    return second["start_step"]


def test_a_warning_loses_nothing(healthy, job, unbroken):
    number, out = submit(healthy, *job, "warned")
    log = out.with_suffix(".log")
    wait_for(lambda: steps(out) > 5, 90, log.read_text)
    # what --signal=B:USR1@120 has Slurm do
    healthy("exec", "scancel", "--batch", "--signal=USR1", number)
    first = expect_restarted(healthy, number, out, unbroken)
    assert 0 < first < 150
    assert f"stopped by SIGUSR1 after {first} steps, all saved" in log.read_text()


# CI has a job that loses a node in test_jobs.py, and runs that are killed in test_resume.py
@pytest.mark.slow
def test_a_crash_loses_nothing(healthy, job, unbroken):
    number, out = submit(healthy, *job, "crashed", "--exclusive")
    wait_for(lambda: steps(out) > 20, 90, out.with_suffix(".log").read_text)
    healthy("crash", healthy.nodes_of(number)[1])  # it is restarted on other nodes
    first = expect_restarted(healthy, number, out, unbroken)
    assert first >= 10 and first % 10 == 0
