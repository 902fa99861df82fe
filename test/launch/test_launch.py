"""Starting ranks: what each launcher's variables mean, real launchers, and ranks that fail.

python -m pytest test/launch/test_launch.py
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.paths import PROGRAMS
from programs import rank_functions

import ringx
from ringx import launch
from ringx.launch import environ
from ringx.launch.placement import Placement

LAUNCHERS = (
    "SLURM",
    "PMI",
    "OMPI_",
    "MPI_",
    "MV2_",
    "TORCHELASTIC",
    "MASTER_",
    "GLOO_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
)
SRUN = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}  # fmt: skip
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-h-12@1", "PMIX_RANK": "1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SEVERAL = HYDRA | {"MPI_LOCALNRANKS": "2"}  # hosts


# ---- host lists


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("n[1-3,07-09]", ["n1", "n2", "n3", "n07", "n08", "n09"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("gpu[001-002]-ib,login", ["gpu001-ib", "gpu002-ib", "login"]),
        ("r[1-2]n[01,3]", ["r1n01", "r1n3", "r2n01", "r2n3"]),
        ("node-1.site.org,x[2]", ["node-1.site.org", "x2"]),
    ],
)
def test_host_list(text, hosts):
    assert environ.hosts_of(text) == hosts


@pytest.mark.fast
@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "a,",
        "a,,b",
        "n[1-3",
        "n1-3]",
        "n[]",
        "n[3-1]",
        "n[a-b]",
        "n[1-2-3]",
        "n[1,]",
        "a b",
    ],
)
def test_malformed_host_list(text):
    with pytest.raises(ValueError, match=r"host list|rising range"):
        environ.hosts_of(text)


# ---- what variables mean


def facts(env):
    f = environ.read(env)
    return f.launcher, f.rank, f.world_size, f.local_rank, f.local_world, f.address


@pytest.mark.fast
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("plain", 0, 1, 0, 1, "")),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4, "n1")),
        (TORCHRUN | SRUN, ("torchrun", 5, 8, 1, 4, "n1")),  # torchrun inside srun
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            ("torchrun", 1, 2, 1, 2, "localhost"),
        ),
        (
            SRUN | {"RANK": "5", "WORLD_SIZE": "7"},
            ("torchrun", 5, 7, 1, 3, "n08"),
        ),  # a wrapper script that sets only these
        (SRUN, ("srun", 5, 7, 1, 3, "n08")),
        (SRUN | {"WORLD_SIZE": "7"}, ("srun", 5, 7, 1, 3, "n08")),
        (SRUN | {"MASTER_ADDR": "n08-ib0"}, ("srun", 5, 7, 1, 3, "n08-ib0")),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_STEP_NODELIST": "n4"},
            ("srun", 5, 7, 1, 7, "127.0.0.1"),
        ),
        (
            SRUN | {"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            ("srun", 5, 8, 1, 4, "n08"),
        ),
        (
            SRUN | {"SLURM_NTASKS": "99", "SLURM_STEP_NUM_TASKS": "7"},
            ("srun", 5, 7, 1, 3, "n08"),
        ),  # a step of a larger job
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}, ("srun", 5, 7, 1, 3, "n08")),  # srun --mpi=pmi2
        (SRUN | {"PMIX_RANK": "5"}, ("srun", 5, 7, 1, 3, "n08")),
        (
            {k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"},
            ("plain", 0, 1, 0, 1, ""),
        ),  # a batch script
        (
            SRUN | {"SLURM_STEP_ID": str(2**32 - 6)},
            ("plain", 0, 1, 0, 1, ""),
        ),  # salloc's interactive step
        (OPENMPI, ("mpirun", 1, 2, 1, 2, "127.0.0.1")),
        (
            OPENMPI | SRUN,
            ("mpirun", 1, 2, 1, 2, "127.0.0.1"),
        ),  # mpirun started this rank through srun
        (HYDRA, ("mpirun", 1, 4, 1, 4, "127.0.0.1")),
        (HYDRA | {"MASTER_ADDR": "h", "MASTER_PORT": "5"}, ("mpirun", 1, 4, 1, 4, "h")),
        (SEVERAL, ("mpirun", 1, 4, 1, 2, "")),  # for mpi4py to fill in
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "4"},
            ("mpirun", 1, 4, 0, 4, "127.0.0.1"),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, ("mpirun", 1, 4, -1, 0, "")),
        ({"PMIX_RANK": "1"}, ("mpirun", 1, 0, -1, 0, "")),
    ],
)
def test_variables(env, expected):
    assert facts(env) == expected


@pytest.mark.fast
@pytest.mark.parametrize(
    ("env", "words"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK='8' must be an integer, 0 to 7"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "16 ranks on this host of 8"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000' must be an integer, 1 to 65535"),
        *[
            ({k: v for k, v in TORCHRUN.items() if k != gone}, f"{gone} is not set")
            for gone in TORCHRUN
        ],
        (SRUN | {"SLURM_PROCID": "7"}, "SLURM_PROCID='7'"),
        (SRUN | {"SLURM_LOCALID": "3"}, "local rank 3 of 3"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-"}, r"SLURM_STEP_NODELIST='n\[1-' is not a host list"),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x"},
            r"SLURM_STEP_TASKS_PER_NODE='4\(x' is not of the form",
        ),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4"}, "has 4 tasks, but the step has 7"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NODEID"}, "SLURM_NODEID is not set"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS"}, "SLURM_NTASKS is not set"),
        (
            {k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"},
            "SLURM_STEP_NODELIST is not set",
        ),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x'"),
        (HYDRA | {"PMI_RANK": "4"}, "rank 4 of 4"),
    ],
)
def test_missing_or_contradicting_variables(env, words):
    with pytest.raises(ValueError, match=words):
        environ.read(env)


@pytest.mark.fast
def test_ports_tell_jobs_and_steps_apart():
    jobs = [
        SRUN | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)}
        for j in range(4711, 4751)
        for s in range(100)
    ]
    ports = [environ.read(env).port for env in jobs]
    assert len(set(ports)) == len(ports)
    assert all(15000 <= p < 32768 for p in ports)
    assert (
        environ.read(OPENMPI).port
        != environ.read(OPENMPI | {"PMIX_NAMESPACE": "prterun-h-13@1"}).port
    )
    assert environ.read(SRUN | {"MASTER_PORT": "1234"}).port == 1234


@pytest.mark.fast
def test_ranks_have_their_own_gpu_or_say_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    local = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for count, expected in ((1, 0), (2, 1), (4, 1)):  # 1: the scheduler shows each rank its own
        # called in this round
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)  # noqa: B023
        world = launch.detect(local)
        assert (world.device, world.backend) == (
            torch.device("cuda", expected),
            "cpu:gloo,cuda:nccl",
        )
        assert launch.detect(local, device="cpu").backend == "gloo"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 ranks on this host would share 2 GPUs"):
        launch.detect(TORCHRUN)
    with pytest.raises(ValueError, match="3 ranks on this host would share 2 GPUs"):
        launch.run(rank_functions.describe_rank, 3, "")


@pytest.mark.fast
def test_bad_arguments(monkeypatch):
    for nproc in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="nproc="):
            launch.run(rank_functions.describe_rank, nproc, "")
    with pytest.raises(ValueError, match="timeout=0"):
        launch.run(rank_functions.describe_rank, 2, "", timeout=0)
    with pytest.raises(ValueError, match="device='tpu'"):
        launch.run(rank_functions.describe_rank, 2, "", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU here"):
            launch.init(device="cuda")
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert launch.launched()
    assert launch.world_size() == 7
    with pytest.raises(ValueError, match="nproc=2, but this process was started as one of 7 ranks"):
        launch.run(rank_functions.describe_rank, 2, "")


# ---- ranks started here


@pytest.mark.parametrize("nproc", [None, 1, 2, 3])
def test_run_gives_results_by_rank(nproc, capfd):
    results = launch.run(rank_functions.describe_rank, nproc, "hello")
    n = nproc or 1
    launcher = "plain" if n == 1 else "ringx"
    gathered = [
        (w.rank, w.world, w.local_rank, w.local_world, w.launcher, w.backend, threads)
        for w, threads, *_ in results
    ]
    assert gathered == [(r, n, r, n, launcher, "gloo", 1) for r in range(n)]
    assert [x.tolist() for *_, x in results] == [list(range(r + 1)) for r in range(n)]
    assert sorted(re.findall(r"hello from rank \d\n", capfd.readouterr().out)) == [
        f"hello from rank {r}\n" for r in range(n)
    ]
    assert not launch.launched()
    assert launch.run(rank_functions.number_of_threads, nproc, threads=2) == [2] * n


def failure(call, *args, nproc=3, timeout=30):
    """(the message, seconds)"""
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        launch.run(call, nproc, *args, timeout=timeout)
    return str(caught.value), time.monotonic() - start


def test_the_rank_that_raised_is_named_and_the_others_end():
    message, seconds = failure(rank_functions.raise_on, 1)
    assert message.startswith(
        "rank 1 of 3 raised KeyError: 'rank 1 has no such thing'\n\nTraceback"
    )
    assert "in raise_on" in message
    assert seconds < 10
    message, seconds = failure(rank_functions.pass_bool_on, 2)
    assert message.startswith("rank 2 of 3 raised TypeError: q.dtype=torch.bool")
    assert seconds < 10
    message, _ = failure(rank_functions.exit_on, 0)
    assert message.startswith("rank 0 of 3 ended with status 3 before it had a result")
    message, _ = failure(rank_functions.return_lambda, nproc=2)
    assert "raised" in message
    assert "pickle" in message


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_killed_in_a_collective(direction):
    message, seconds = failure(rank_functions.stop_in_attention, 1, direction, "kill")
    assert message.startswith("rank 1 of 3 was ended by SIGKILL. Rank ")
    assert re.search(
        rf"ringx4 {direction}: broadcast from rank [01] failed on rank", message
    )  # two are on their way at once
    assert seconds < 10


@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_rank_that_never_comes(direction):
    message, seconds = failure(rank_functions.stop_in_attention, 2, direction, "sleep", timeout=2)
    assert "waited for its peers in vain; rank 2 is still at work." in message
    assert f"ringx4 {direction}: broadcast from rank 2 failed on rank" in message
    assert "Timed out" in message
    assert seconds < 15


# ---- real launchers, each in its own processes


def clean_env(**extra):
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(LAUNCHERS) and k not in ("RANK", "WORLD_SIZE")
    }
    return env | {"PYTHONPATH": str(Path(ringx.__file__).parents[1])} | extra


def start(*command, **env):
    return subprocess.Popen(
        [str(word) for word in command],
        env=clean_env(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, status=0):
    output, _ = process.communicate(timeout=90)
    assert process.returncode == status, output
    return output


def reports(output):
    """What attend.py printed on each rank, however the lines of several ranks were mixed."""
    return sorted(
        words.split()
        for words in re.findall(r"ok (\w+ \d+/\d+ \d+/\d+ \S+ \d+ \S+ threads \d+)", output)
    )


def test_torchrun():
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2)
    first, second = reports(finish(start(*torchrun, PROGRAMS / "attend.py", "--twice")))
    assert first[:3] == ["torchrun", "0/2", "0/2"]
    assert second[:3] == ["torchrun", "1/2", "1/2"]


def need_mpiexec():
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if (
        not mpiexec
        or "HYDRA"
        not in subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("needs MPICH's mpiexec: pip install mpich mpi4py")
    return mpiexec


def test_mpiexec_on_one_host_needs_no_mpi4py():
    output = finish(
        start(
            need_mpiexec(),
            "-n",
            2,
            sys.executable,
            PROGRAMS / "attend.py",
            "--no-mpi4py",
            "--leave",
        )
    )
    first, second = reports(output)
    assert first == ["mpirun", "0/2", "0/2", "127.0.0.1", first[4], "gloo", "threads", "1"]
    assert second == ["mpirun", "1/2", "1/2", "127.0.0.1", first[4], "gloo", "threads", "1"]


def test_mpiexec_on_two_hosts_exchanges_the_address_through_mpi4py():
    mpiexec = need_mpiexec()
    if not importlib.util.find_spec("mpi4py"):
        pytest.skip("needs mpi4py: pip install mpi4py")
    two = (
        mpiexec,
        "-launcher",
        "fork",
        "-hosts",
        "one,two",
        "-n",
        2,
        sys.executable,
        PROGRAMS / "attend.py",
    )  # both are this host
    first, second = reports(finish(start(*two)))
    assert (first[:3], second[:3], first[3:5]) == (
        ["mpirun", "0/2", "0/1"],
        ["mpirun", "1/2", "0/1"],
        second[3:5],
    )


@pytest.mark.fast
def test_without_mpi4py_several_hosts_need_an_address(monkeypatch):
    for name, value in SEVERAL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match="install mpi4py, or set MASTER_ADDR and MASTER_PORT"):
        launch.init()


def step(rank, world, job=0, **extra):
    """The variables that srun sets for a task on one node."""
    return {
        "SLURM_JOB_ID": str(os.getpid() + job), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(world), "SLURM_LOCALID": str(rank), "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": str(world), **extra,
    }  # fmt: skip


def test_the_variables_of_srun_and_an_error_that_ends_all_ranks():
    ranks = [
        start(sys.executable, PROGRAMS / "attend.py", "--raise", **step(r, 2)) for r in range(2)
    ]
    ranks[0].wait(timeout=60)
    began = time.monotonic()
    outputs = [finish(process, status=1) for process in ranks]
    assert (
        time.monotonic() - began < 15
    )  # the group's timeout is 30 s: the peer learnt of it at once
    for r, output in enumerate(outputs):
        assert reports(output)[0][:4] == ["srun", f"{r}/2", f"{r}/2", "127.0.0.1"]
    assert "A peer has most likely died" in outputs[0]
    assert "ZeroDivisionError: on rank 1, with a collective under way" in outputs[1]


def test_absent_ranks_and_a_wrong_host_are_named_within_the_timeout():
    absent = [start(sys.executable, PROGRAMS / "join.py", **step(r, 4, job=1)) for r in (0, 2)]
    port = environ.read(step(0, 4, job=1)).port
    nowhere = start(
        sys.executable,
        PROGRAMS / "join.py",
        **step(1, 2, job=2, MASTER_ADDR="no-such-host.invalid"),
    )
    for process in absent:
        printed = finish(process)
        assert (
            f"not all of 4 ranks came to 127.0.0.1:{port} within 3 s. Missing: rank 1, 3."
            in printed
        )
    printed = finish(nowhere).splitlines()
    (line,) = (text for text in printed if "could not meet" in text)
    assert "rank 1 of 2 (srun) could not meet the others at no-such-host.invalid:" in line
    assert float(line.split()[0]) < 5


def gone(pid):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


linux = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"
)


def await_ranks(path, n=2):
    """The process ids that rank_functions.write_pid writes."""
    files = [Path(f"{path}.{r}") for r in range(n)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files), 60)
    return [f.read_text() for f in files]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@linux
def test_no_rank_outlives_a_killed_parent(tmp_path):
    parent = start(sys.executable, PROGRAMS / "start_two_ranks.py", tmp_path / "pid")
    pids = await_ranks(tmp_path / "pid")
    parent.kill()
    wait_for(lambda: all(gone(p) for p in pids), 10)
    parent.communicate(timeout=10)


@linux
def test_an_interrupt_ends_all_ranks_at_once(tmp_path):
    def interrupt():
        await_ranks(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        launch.run(rank_functions.write_pid, 2, tmp_path / "pid")
    thread.join()
    wait_for(lambda: all(gone(p) for p in await_ranks(tmp_path / "pid")), 5)


# ---- what ranks say at start


def world_of(world, local_world, device, launcher="srun"):
    return launch.World(
        0, world, 0, local_world, torch.device(device), "cpu:gloo,cuda:nccl", launcher, "n1", 1
    )


@pytest.mark.fast
def test_one_visible_gpu_per_rank_is_said():
    everyone = [Placement(f"n{r // 2 + 1}", "cuda:0", 1, str(r % 2)) for r in range(4)]
    says = launch.describe_placement(world_of(4, 2, "cuda"), everyone)[1:]
    assert says[0] == "each rank sees one GPU, the one it computes on"
    assert says[1:] == [
        "  n1  0: cuda:0 of 0, 1: cuda:0 of 1",
        "  n2  2: cuda:0 of 0, 3: cuda:0 of 1",
    ]


@pytest.mark.fast
def test_all_gpus_visible_is_said():
    everyone = [Placement("n1", f"cuda:{r}", 4, "0,1,2,3") for r in range(4)]
    head, says, ranks = launch.describe_placement(world_of(4, 4, "cuda"), everyone)
    assert head.startswith("4 ranks on 1 host, started by srun") and says == (
        "each rank sees all 4 GPUs of its host and computes on that of its local rank"
    )
    assert ranks == "  n1  " + ", ".join(f"{r}: cuda:{r} of 0,1,2,3" for r in range(4))


@pytest.mark.fast
def test_thousands_of_hosts_are_not_all_listed():
    everyone = [Placement(f"n{r}", "cpu", 0, None) for r in range(4096)]
    lines = launch.describe_placement(world_of(4096, 1, "cpu"), everyone)
    assert (
        lines[-1] == f"  and {4096 - launch.MAX_LISTED_HOSTS} hosts more"
        and len(lines) == launch.MAX_LISTED_HOSTS + 2
    )


@pytest.mark.fast
@pytest.mark.parametrize(("visible", "local_rank", "expected"), [(1, 3, 0), (4, 3, 3)])
def test_both_habits_bind_the_right_gpu(monkeypatch, visible, local_rank, expected):
    """The scheduler shows each rank one GPU, or all of them: rank 3 of 4 takes the only one, or the
    fourth."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert launch.bind_device("auto", local_rank, 4, "srun") == torch.device("cuda", expected)


def decide_refused(world, path):
    def ask():
        raise OSError(28, "No space left on device", path)

    try:
        launch.decide(world, ask)
    except OSError as e:
        return str(e)


def test_what_rank_0_refuses_all_refuse():
    assert launch.run(decide_refused, 2, "/x") == ["[Errno 28] No space left on device: '/x'"] * 2
