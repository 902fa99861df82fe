"""The ViT app as Slurm jobs: one run, and tasks of the array over algorithm, patch and cp.

python -m pytest test/slurm/test_vit_job.py
"""

import pytest
from helpers.invented import weather
from helpers.paths import ROOT

from apps.common.log import read_metrics, read_sessions

pytestmark = pytest.mark.slurm
WORDS = "--steps 4 --global-batch 2 --dim 16 --layers 1 --save-every 2 --no-tensorboard"


def submit(cluster, folder, script, out, *options, **env):
    words = ["--parsable", "-N2", "--ntasks-per-node=1", *options, f"-o {folder}/%x_%a.log"]
    command = f"cd {ROOT} && sbatch {' '.join(words)} apps/vit/{script}"
    return cluster(
        "exec",
        "bash",
        "-c",
        f"{command} tiny --data {folder}/weather.nc {WORDS}",
        OUT=str(out),
        **env,
    ).strip()


def test_a_run_and_the_matrix(cluster, tmp_path):
    pytest.importorskip("netCDF4", reason="netCDF4 is not installed")
    weather().to_netcdf(tmp_path / "weather.nc")
    one = submit(cluster, tmp_path, "submit.sbatch", tmp_path / "one")
    lists = {"ALGORITHMS": "ringx1,ringx4", "PATCHES": "2", "CPS": "2,3"}
    matrix = submit(cluster, tmp_path, "submit_cp.sbatch", tmp_path / "cp", "--array=1,2", **lists)
    log = lambda: "".join(p.read_text() for p in tmp_path.glob("*.log"))  # noqa: E731

    assert cluster.await_job(one)["JobState"] == "COMPLETED", log()
    assert [r["step"] for r in read_metrics(tmp_path / "one")] == [0, 1, 2, 3]
    (session,) = read_sessions(tmp_path / "one")
    assert (
        session["launch"]["world"] == 2
        and session["config"]["model"]["patch"] == 2
        and session["launch"]["launcher"] == "srun"
    )

    cluster.await_job(matrix)
    assert [p.name for p in (tmp_path / "cp").iterdir()] == ["ringx4_p2_cp2"]  # case 2
    case = tmp_path / "cp" / "ringx4_p2_cp2"
    assert [r["step"] for r in read_metrics(case)] == [0, 1, 2, 3] and (case / "done").exists(), (
        log()
    )
    (session,) = read_sessions(case)
    assert (
        session["config"]["train"]["algorithm"] == "ringx4" and session["config"]["mesh"]["cp"] == 2
    )
    assert "ringx1_p2_cp3: cp=3 does not divide the 2 ranks" in log()  # case 1
