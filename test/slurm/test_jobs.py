"""Jobs on a real Slurm: submitted, chained, warned, requeued after a loss, collected, plotted.

python -m pytest test/slurm/test_jobs.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import PROGRAMS, ROOT
from helpers.slurm_cluster import wait_for

import ringx
from apps.common.log import read_metrics, read_sessions
from ringx.measure import records
from ringx.report import tables

pytestmark = pytest.mark.slurm
SMALL = ("--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtypes", "fp32", "--no-baseline")


def submit(cluster, out, *words, **keywords):
    """(job ids, output) of `ringx submit`."""
    printed = cluster.ringx("submit", "--site", "generic-cpu", "--out", out, *words, **keywords)
    return re.findall(r"\d+", " ".join(re.findall(r"submitted ([\d, ]+):", printed))), printed


def records_in(out):
    good, broken = records.read_all(out)
    assert not broken
    return good


@pytest.fixture(scope="module")
def limited(cluster):
    """A job with a real time limit of a minute, submitted with the first test; a later one
    waits."""
    out = cluster.folder / "limited.out"
    script = cluster.folder / "limited.sbatch"
    script.write_text(
        "#!/bin/bash\n"
        "#SBATCH -N2 --ntasks-per-node=1 --time=1 --signal=B:USR1@10 --requeue\n"
        "#SBATCH --open-mode=append\n"
        f"#SBATCH --output={out}\n"
        f"cd {ROOT}\n"
        "source script/job.sh generic-cpu\n"
        f"ranks python3 {PROGRAMS / 'await_signal.py'}\n"
        "job_end\n"
    )
    return cluster.sbatch(script), out


def test_submit_collect_plot(cluster, limited, tmp_path):
    """A folder and a label with blanks and quotes; two numbers of nodes, an array, a chain; then
    one table and its plots."""
    out = tmp_path / "my runs; $(touch oops)"
    label = "note=a 'b' $(touch oops)"
    ids, printed = submit(
        cluster, out, "--nodes", "1,2", "--seqlens", "64,128", *SMALL, "--reps", "2",
        "--algorithms", "ringx3,ringx4", "--label", label,
        "--label", "net=veth", "--chain", "2", "--wait",
    )  # fmt: skip
    assert len(ids) == 4
    assert "asks for 6.00 node-hours" in printed
    assert "8 of 8 records are there" in printed
    assert not list(tmp_path.rglob("oops"))
    assert not (ROOT / "oops").exists()
    measured = records_in(out)
    assert {record["labels"]["note"] for record in measured} == {label.removeprefix("note=")}
    check_places(measured, first_ids={int(ids[0]), int(ids[2])})
    logs = [log.read_text() for log in (out / "jobs").glob("*.out")]
    assert len(logs) == 8
    assert "Traceback" not in "".join(logs)
    check_table_and_plots(cluster, out, table=tmp_path / "table")


def check_places(measured, *, first_ids):
    """Where the records of 1 and 2 nodes and of two array tasks were measured.

    first_ids: of the first job of each chain; those that followed found everything there."""
    places = {}
    for record in measured:
        job = record["launch"]["job"]
        assert job["id"] in first_ids
        size = (record["case"]["world"], record["case"]["seqlen"])
        places[size] = (job["nodes"], job["array_task"], job["site"], job["restart"])
        if record["case"]["world"] == 2:
            assert record["wire"]["interface"] == "eth0"
            assert record["wire"]["hosts"] == 2
    assert places == {
        (1, 64): (1, 0, "generic-cpu", 0), (1, 128): (1, 1, "generic-cpu", 0),
        (2, 64): (2, 0, "generic-cpu", 0), (2, 128): (2, 1, "generic-cpu", 0),
    }  # fmt: skip


def check_table_and_plots(cluster, out, *, table):
    cluster.ringx("collect", out, "--out", table)
    rows = tables.read_table(table / "attention.parquet")
    assert len(rows) == 8
    assert {row["label_net"] for row in rows} == {"veth"}
    assert {row["site"] for row in rows} == {"generic-cpu"}
    printed = cluster.ringx("plot", table / "attention.parquet")
    for figure in ("strong_scaling", "weak_scaling", "bytes", "wire"):
        assert (table / f"{figure}.png").exists(), printed


def test_results_that_cannot_be_written_fail_before_the_first_case(cluster):
    """Rank 0's node has a folder that is read-only, then one that is full; the other rank's is
    fine."""
    out = cluster.folder / "here"
    out.mkdir()
    room = 2**14 * len(ringx.algorithms())
    for options, reason in (
        ("ro", "Read-only file system"),
        ("size=16k", "No space left on device"),
    ):
        cluster("node", 1, "mount", "-t", "tmpfs", "-o", options, "tmpfs", out)
        try:
            bench = (
                sys.executable,
                "-m",
                "ringx",
                "bench",
                "--seqlens",
                "64",
                *SMALL,
                "--out",
                out,
            )
            printed = cluster("exec", "srun", "-N2", "-n2", *bench, check=False)
            assert (
                cluster.status
                and printed.count(f"{out} cannot take the results ({room} bytes): {reason}") == 2
            ), printed
            assert "Traceback" not in printed and not list(out.iterdir())
            assert cluster("node", 1, "ls", "-A", out) == ""
        finally:
            cluster("node", 1, "umount", out)


def test_batch_scripts_by_hand(cluster, tmp_path):
    """sbatch script/NAME.sbatch ARGUMENTS from the checkout, and from script/."""
    env = {"OUT": str(tmp_path / "gpt")}
    log = tmp_path / "log"
    jobs = []
    for folder, words in (
        (ROOT, ("test.sbatch", "ringx1")),
        (
            ROOT / "script",
            ("gpt.sbatch", "--preset", "tiny", "--steps", "2", "--seqlen", "64", "--dtype", "fp32"),
        ),
    ):
        script = os.path.relpath(ROOT / "script" / words[0], folder)
        options = f"--parsable -N2 --ntasks-per-node=1 -o {log}_%x"
        command = f"cd {folder} && sbatch {options} {script} {' '.join(words[1:])}"
        jobs.append(cluster("exec", "bash", "-c", command, **env).strip())
    for job in jobs:
        assert cluster.await_job(job)["JobState"] == "COMPLETED", [
            p.read_text() for p in tmp_path.glob("log_*")
        ]
    assert (
        "ringx1: 24 cases on 2 ranks equal full attention in fp64"
        in (tmp_path / "log_ringx-test").read_text()
    )
    assert (
        read_sessions(tmp_path / "gpt")[0]["launch"]["world"] == 2
        and len(read_metrics(tmp_path / "gpt")) == 2
    )


def test_an_environment_is_staged_to_every_node(cluster, tmp_path):
    """A virtual environment goes by sbcast to each node's own disk, and the ranks run there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    local = cluster.folder / "cluster/local"
    script, log = tmp_path / "stage.sbatch", tmp_path / "log"
    script.write_text(
        f"#!/bin/bash\n#SBATCH -N2 --ntasks-per-node=2 -o {log}\ncd {ROOT}\n"
        f"export PYTHON={tmp_path}/env/bin/python\n"
        f"source script/job.sh generic-cpu\nSTAGE={local} source script/stage_env.sh\n"
        'ranks "$PYTHON" -c "import glob, socket, sys; '
        "print(socket.gethostname(), sys.prefix, len(glob.glob(sys.argv[1] + '/*.tar')))\" "
        f"{local}\njob_end\n"
    )
    job = cluster.sbatch(script)
    assert cluster.await_job(job, 60)["JobState"] == "COMPLETED", log.read_text()
    printed = [
        line.split()
        for line in log.read_text().splitlines()
        if "ringx-env" in line and not line.startswith("stage_env")
    ]
    assert len(printed) == 4 and {words[1] for words in printed} == {f"{local}/ringx-env-{job}"}
    assert len({words[0] for words in printed}) == 2 and {words[2] for words in printed} == {
        "0"
    }  # the archive is gone
    assert "on 2 nodes" in log.read_text()


@pytest.mark.parametrize(
    "world",
    [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)],
)
def test_wire_bytes_are_the_closed_form_times_the_collectives_factors(cluster, tmp_path, world):
    """Of every algorithm, within 5 %: what interfaces counted, against sizes times factors that
    bench-comm measured."""
    program = ROOT / "test/slurm/wire.py"
    cluster(
        "exec",
        "srun",
        f"-N{world}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        sys.executable,
        program,
        tmp_path,
        timeout=180,
    )
    good, broken = records.read_all(tmp_path)
    fits = [r for r in good if r["kind"] == "collective"]
    assert (
        not broken
        and len(fits) == 6
        and all(size["wrong"] == 0 for r in fits for size in r["sizes"])
    )
    cluster.ringx("collect", tmp_path)
    rows = tables.read_table(tmp_path / "attention.parquet")
    assert {r["algorithm"] for r in rows} == set(ringx.algorithms())
    for r in rows:
        assert r["wire_bytes"] == pytest.approx(r["wire_expected_bytes"], rel=0.05), (
            r["algorithm"],
            world,
        )
        assert r["forward_bytes"] + r["backward_bytes"] == pytest.approx(
            r["forward_bytes_closed_form"] + r["backward_bytes_closed_form"]
        )


def test_a_real_time_limit_reaches_the_ranks(cluster, limited):
    """It was submitted before the tests above; it is warned within its minute and starts again."""
    job, out = limited
    assert cluster.await_job(job, 120)["JobState"] == "COMPLETED", out.read_text()
    printed = out.read_text()
    first, again = printed.split("back into the queue")
    assert (
        len(set(re.findall(r"up (n\d) 0", first))) == 2
        and len(set(re.findall(r"received (n\d)", first))) == 2
    )
    assert len(set(re.findall(r"up (n\d) 1", again))) == 2


# ---- jobs that are disturbed: `healthy` cancels all jobs afterwards, so these tests come last


def stamps(out):
    return {p.name: p.stat().st_mtime_ns for p in Path(out).glob("*.json")}


def begun(cluster, out, n=1):
    """Waits until so many records are there."""
    wait_for(lambda: len(list(out.glob("*.json"))) >= n, 90, lambda: cluster("status") + logs(out))


def logs(out):
    return "".join(f"== {p}\n{p.read_text()}" for p in sorted(Path(out).glob("jobs/*.out")))


# CI has a job that is warned in test_gpt_job.py, and a benchmark that is told in test_stopping.py
@pytest.mark.slow
def test_a_warning_ends_the_job_between_cases_and_it_requeues_itself(healthy, tmp_path):
    """The warning is sent to the batch script, as Slurm does for --signal=B:USR1@N."""
    out = tmp_path / "out"
    (job,), _ = submit(
        healthy, out, "--nodes", "2", "--array", "1", "--algorithms", "ringx3",
        "--seqlens", "64,2048,4096", *SMALL, "--reps", "40", "--time", "10",
    )  # fmt: skip
    begun(healthy, out)
    healthy("exec", "scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: healthy.job(job)["Restarts"] == "1", 60, lambda: logs(out))
    before = stamps(out)
    assert 1 <= len(before) < 3, logs(out)
    assert healthy.await_job(job)["JobState"] == "COMPLETED", logs(out)
    assert (
        stamps(out).items() >= before.items() and len(stamps(out)) == 3
    )  # nothing twice, nothing lost
    restarts = {r["case"]["seqlen"]: r["launch"]["job"]["restart"] for r in records_in(out)}
    assert restarts[64] == 0 and restarts[4096] == 1
    assert "interrupted by SIGUSR1: " in logs(out) and "back into the queue" in logs(out)
    assert "task 1: Terminated" not in logs(out)  # rank 0, whose status is the job's, leaves last
    assert "not written" not in logs(out) and "Traceback" not in logs(out)


# Slurm takes longer to miss a node that is cut off; CI has ranks that hear nothing of their peers
# in test_launch.py
@pytest.mark.parametrize("what", ["crash", pytest.param("cable", marks=pytest.mark.slow)])
def test_a_job_that_loses_a_node_is_restarted_on_others(healthy, tmp_path, what):
    """A node of a job of two crashes, or the node of rank 0 is cut off and its processes go on for
    a while.  The job is restarted on other nodes and measures every case exactly once; ranks that
    were cut off end by their timeout."""
    (job,), _ = submit(
        healthy, tmp_path, "--nodes", "2", "--algorithms", "ringx4", "--seqlens", "64,2048",
        *SMALL, "--reps", "100", "--timeout", "8", "--sbatch=--exclusive",
    )  # fmt: skip
    # an array of two tasks of two nodes: once the small case is measured, the large one loses a
    # node
    begun(healthy, tmp_path)
    large = tmp_path / "jobs" / f"ringx-bench-n2_{job}_1.out"
    wait_for(
        lambda: large.exists() and "2 ranks on 2 hosts" in large.read_text(),
        90,
        lambda: logs(tmp_path),
    )
    before = stamps(tmp_path)
    first, last = healthy.nodes_of(f"{job}_1")
    if what == "crash":
        healthy("crash", last)
    else:
        healthy("link", first, "down")
        ranks = f"{sys.executable} -m ringx bench"  # srun and the batch script are Slurm's to end

        def have_ended():
            running = healthy("node", first, "ps", "-eo", "args")
            return ranks not in re.sub(r"srun .*", "", running)

        wait_for(have_ended, 60, lambda: logs(tmp_path))
    ended = healthy.await_job(f"{job}_1")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    restarts = {r["case"]["seqlen"]: r["launch"]["job"]["restart"] for r in records_in(tmp_path)}
    assert restarts == {64: 0, 2048: 1}
    assert stamps(tmp_path).items() >= before.items()
    if what == "cable":
        assert "failed on rank 0 of 2" in logs(tmp_path)  # what the cut-off rank said
