"""The GPT app as a Slurm job: warned before its time limit it saves, requeues and goes on; so it does when a node crashes.

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
    command = f"cd {ROOT} && sbatch --parsable -N2 {' '.join(options)} -o {out}.log apps/gpt/job.sbatch {words}"
    return cluster("exec", "bash", "-c", command, OUT=str(out)).strip(), out


def steps(out):
    return len(read_metrics(out)) if (out / "metrics.jsonl").exists() else 0


def test_a_warning_and_a_crash_lose_nothing(healthy, job):
    folder, words = job
    whole, unbroken = submit(healthy, folder, words, "unbroken")
    assert healthy.await_job(whole)["JobState"] == "COMPLETED", unbroken.with_suffix(
        ".log"
    ).read_text()
    want = [r["loss"] for r in read_metrics(unbroken)]

    warned, out = submit(healthy, folder, words, "warned")
    crashed, lost = submit(healthy, folder, words, "crashed", "--exclusive")
    log = lambda: out.with_suffix(".log").read_text() + lost.with_suffix(".log").read_text()  # noqa: E731
    wait_for(lambda: steps(out) > 5, 90, log)
    healthy(
        "exec", "scancel", "--batch", "--signal=USR1", warned
    )  # what --signal=B:USR1@120 has Slurm do
    wait_for(lambda: steps(lost) > 20, 90, log)
    healthy("crash", healthy.nodes_of(crashed)[1])  # it is restarted on other nodes
    for name, run in ((warned, out), (crashed, lost)):
        assert healthy.await_job(name, timeout=240)["JobState"] == "COMPLETED", log()
        assert healthy.job(name)["Restarts"] == "1"
        assert [r["loss"] for r in read_metrics(run)] == want
    _, second = read_sessions(out)
    assert 0 < second["start_step"] < 150
    assert (
        f"stopped by SIGUSR1 after {second['start_step']} steps, all saved"
        in out.with_suffix(".log").read_text()
    )
    _, second = read_sessions(lost)
    assert second["start_step"] >= 10 and second["start_step"] % 10 == 0
