"""The same program under every launcher, on several hosts; meeting, and ranks that do not come.

python -m pytest test/slurm/test_launchers.py
"""

import ctypes
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers.paths import PROGRAMS, ROOT

pytestmark = pytest.mark.slurm
PYTHON = sys.executable
ATTEND = PROGRAMS / "attend.py"


def reports(output):
    """{rank: [launcher, local rank/local world, address, port, backend]} of attend.py's lines,
    however they were mixed."""
    ranks = re.findall(r"ok (\w+) (\d+)/(\d+) (\S+) (\S+) (\d+) (\S+) threads (\d+)", output)
    worlds = {f[2] for f in ranks}
    assert len(ranks) == len({f[1] for f in ranks}) == int(worlds.pop()) and not worlds, output
    assert {f[7] for f in ranks} == {"1"}
    return {int(rank): [launcher, *rest] for launcher, rank, _, *rest, _ in ranks}


def test_srun_uneven_nodes(cluster):
    ranks = reports(cluster("exec", "srun", "-N2", "-n3", PYTHON, ATTEND))
    assert {r: f[:3] for r, f in ranks.items()} == {
        0: ["srun", "0/2", "n1"], 1: ["srun", "1/2", "n1"], 2: ["srun", "0/1", "n1"],
    }  # fmt: skip


def test_srun_pmi2_with_mpi4py(cluster):
    pytest.importorskip("mpi4py", reason="needs mpi4py and MPICH: pip install mpi4py mpich")
    printed = cluster("exec", "srun", "--mpi=pmi2", "-N2", "-n2", PYTHON, ATTEND, "--with-mpi")
    assert reports(printed)[1][:3] == ["srun", "0/1", "n1"]
    assert printed.count("MPI agrees") == 2


def loads(library):
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def test_srun_pmix_with_mpi4py(cluster):
    pytest.importorskip("mpi4py", reason="needs mpi4py: pip install mpi4py")
    if missing := [name for name in ("libmpi.so.40", "libpmix.so") if not loads(name)]:
        pytest.skip(f"needs {missing[0]} of Open MPI: apt-get install libopenmpi3 libpmix-dev")
    printed = cluster(
        "exec",
        "srun",
        "--mpi=pmix",
        "-N2",
        "-n2",
        PYTHON,
        ATTEND,
        "--with-mpi",
        MPI4PY_MPIABI="openmpi",
    )
    assert reports(printed)[1][:3] == ["srun", "0/1", "n1"]
    assert printed.count("MPI agrees") == 2 and "Open MPI" in printed


def test_mpiexec_in_a_job_meets_through_mpi4py(cluster):
    mpiexec = shutil.which("mpiexec", path=str(Path(PYTHON).parent))
    if not mpiexec:
        pytest.skip("needs MPICH's mpiexec: pip install mpich mpi4py")
    log = cluster.folder / "mpiexec.out"
    job = cluster.sbatch(
        "-N2",
        "--ntasks-per-node=1",
        "-o",
        log,
        "--wrap",
        f"{mpiexec} -n 2 -ppn 1 {PYTHON} {ATTEND}",
    )
    cluster.await_job(job, 60)
    ranks = reports(log.read_text())
    assert [f[:3] for f in ranks.values()] == [["mpirun", "0/1", "n1"]] * 2


def test_torchrun_on_two_nodes(cluster):
    torchrun = (
        PYTHON,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
    )
    printed = cluster(
        "exec", "srun", "-N2", "--ntasks-per-node=1", *torchrun, "--rdzv_endpoint=n1:29611", ATTEND
    )
    assert [f[:2] for f in reports(printed).values()] == [["torchrun", "0/1"]] * 2


def test_setup_dist_vars_from_the_script_folder(cluster):
    show = 'echo "vars $RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $WORLD_SIZE $MASTER_ADDR $MASTER_PORT"'
    command = (
        f"cd {ROOT}/script; source setup_dist_vars.sh; {show}; {PYTHON} ../test/test_ringx1.py"
    )
    # the nodes are named, for a job that is still ending may hold them
    printed = cluster("exec", "srun", "-w", "n1,n2", "-N2", "-n3", "bash", "-c", command)
    assert "ringx1: 24 cases on 3 ranks equal full attention in fp64" in printed
    ranks = sorted(line.split()[1:] for line in printed.splitlines() if line.startswith("vars"))
    (port,) = {words.pop() for words in ranks}
    assert 15000 <= int(port) < 27007
    assert ranks == [
        ["0", "0", "2", "3", "n1"],
        ["1", "1", "2", "3", "n1"],
        ["2", "0", "1", "3", "n1"],
    ]


def test_two_jobs_on_one_node_take_different_ports(cluster):
    log = str(cluster.folder / "port_%j.out")
    wrap = ("-N1", "-n2", "-w", "n3", "-o", log, "--wrap", f"srun {PYTHON} {ATTEND}")
    jobs = [cluster.sbatch(*wrap) for _ in range(2)]
    ports = set()
    for job in jobs:
        assert cluster.await_job(job, 60)["NodeList"] == "n3"
        ports |= {f[3] for f in reports(Path(log.replace("%j", job)).read_text()).values()}
    assert len(ports) == 2


def test_a_rank_that_never_starts_is_named_within_the_timeout(cluster):
    """join.py waits for 3 seconds."""
    late = f'[ "$SLURM_PROCID" = 1 ] && exec sleep 8; exec {PYTHON} {PROGRAMS / "join.py"}'
    printed = cluster("exec", "srun", "-N3", "bash", "-c", late)
    lines = [line for line in printed.splitlines() if "not all of 3 ranks came to n1:" in line]
    assert len(lines) == 2 and all(
        "within 3 s. Missing: rank 1." in line and float(line.split()[0]) < 6 for line in lines
    )
