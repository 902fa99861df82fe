"""What the environment says about this process: pure functions of a mapping, one for each launcher, and mpi4py for the rest.

The first that applies:

    torchrun   RANK and WORLD_SIZE (also what deepspeed, accelerate and hand-written scripts set)
    mpirun     OMPI_COMM_WORLD_*, MV2_COMM_WORLD_*, or PMI_* with the local rank that hydra or PALS set; before srun, whose
               variables reach every rank that mpirun starts from inside a Slurm job
    srun       SLURM_STEP_ID and SLURM_PROCID: a task of a job step.  A batch script and salloc's shell are plain processes
    mpirun     bare PMI_RANK or PMIX_RANK: mpi4py tells the rest

MASTER_ADDR and MASTER_PORT always win.  Without them rank 0 is on the first host of the step's node list (127.0.0.1 if there is
only one host), and the port follows from the job and step (srun) or the job's name or parent process (mpirun), so that two
jobs on one host do not meet.  Ranks of mpirun on several hosts exchange the address through mpi4py.
"""

import itertools
import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

MPI = (  # rank, world, local rank, local world
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # hydra: MPICH, Intel MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # PALS: HPE Cray
)


@dataclass(frozen=True)
class LauncherInfo:
    """What the environment says, before any device or peer was asked."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = ""
    port: int = 0
    job: str = ""  # tells this job's ranks from another's that meet at the same port


def read(env: Mapping[str, str]) -> LauncherInfo:
    scheduler = _mpirun(env) or _srun(env) or _pmi(env)
    facts = _torchrun(env, scheduler) or scheduler or LauncherInfo("plain")
    if facts.launcher == "plain":
        return facts
    if env.get("MASTER_ADDR"):
        facts = replace(facts, address=env["MASTER_ADDR"])
    if env.get("MASTER_PORT"):
        facts = replace(facts, port=_int(env, "MASTER_PORT", 1, 65536))
    for what, n, size in (
        ("rank", facts.rank, facts.world_size),
        ("local rank", facts.local_rank, facts.local_world),
    ):
        if size and n >= size:
            raise ValueError(
                f"{facts.launcher} says {what} {n} of {size}: its variables contradict each other; see the top of ringx/launch/environ.py."
            )
    if facts.local_world > facts.world_size > 0:
        raise ValueError(
            f"{facts.launcher} says {facts.local_world} ranks on this host of {facts.world_size} in all."
        )
    return facts


def _int(env: Mapping[str, str], name: str, low: int = 0, high: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        raise ValueError(
            f"{name} is not set, though other variables of the launcher are; start all ranks with one launcher."
        )
    if (
        not re.fullmatch(r"\d+", text)
        or int(text) < low
        or (high is not None and int(text) >= high)
    ):
        bounds = f"at least {low}" if high is None else f"{low} to {high - 1}"
        raise ValueError(
            f"{name}={text!r} must be an integer, {bounds}; unset it, or set it right on every rank."
        )
    return int(text)


def _torchrun(env: Mapping[str, str], scheduler: LauncherInfo | None) -> LauncherInfo | None:
    there = [name for name in ("RANK", "WORLD_SIZE") if name in env]
    if not there or (scheduler and len(there) == 1):
        return None
    world = _int(env, "WORLD_SIZE", 1)
    rank = _int(env, "RANK", 0, world)
    if rank == 0 == world - 1 and "MASTER_ADDR" not in env:  # needs no meeting point
        return LauncherInfo(
            "torchrun", address="127.0.0.1", port=_port("torchrun", str(os.getpid()))
        )
    fallback = (
        scheduler if scheduler and (scheduler.rank, scheduler.world_size) == (rank, world) else None
    )
    address = env.get("MASTER_ADDR") or (fallback.address if fallback else "")
    port = (
        _int(env, "MASTER_PORT", 1, 65536)
        if "MASTER_PORT" in env or not fallback
        else fallback.port
    )
    if not address:
        raise ValueError(
            "MASTER_ADDR is not set, though RANK and WORLD_SIZE are; set it to the host of rank 0, or use torchrun."
        )
    if not fallback and (address == "localhost" or address == "::1" or address.startswith("127.")):
        fallback = LauncherInfo("", local_rank=rank, local_world=world)
    local = [  # torchrun sets both; hand-written scripts may not
        getattr(fallback, field) if fallback and name not in env else _int(env, name, low)
        for name, field, low in (
            ("LOCAL_RANK", "local_rank", 0),
            ("LOCAL_WORLD_SIZE", "local_world", 1),
        )
    ]
    job = env.get("TORCHELASTIC_RUN_ID", "") + "/" + env.get("TORCHELASTIC_RESTART_COUNT", "")
    return LauncherInfo("torchrun", rank, world, local[0], local[1], address, port, job)


def _mpirun(env: Mapping[str, str]) -> LauncherInfo | None:
    for names in MPI:
        if names[0] in env and names[2] in env:
            rank, world, local_rank, local_world = (
                _int(env, name, low) for name, low in zip(names, (0, 1, 0, 1), strict=True)
            )
            job = (
                env.get("PMIX_NAMESPACE")
                or env.get("OMPI_MCA_ess_base_jobid")
                or env.get("PMI_JOBID")
                or ""
            )
            if local_world < world:  # which host rank 0 is on, only MPI can tell
                return LauncherInfo("mpirun", rank, world, local_rank, local_world, job=job)
            job = job or f"parent {os.getppid()}"  # hydra: one proxy starts all ranks of a host
            return LauncherInfo(
                "mpirun",
                rank,
                world,
                local_rank,
                local_world,
                "127.0.0.1",
                _port("mpirun", job),
                job,
            )
    return None


def _pmi(env: Mapping[str, str]) -> LauncherInfo | None:
    """Ranks of an MPI that does not say who shares this host (PMIX_RANK: nor how many there are)."""
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        world = _int(env, "PMI_SIZE", 1)
        return LauncherInfo("mpirun", _int(env, "PMI_RANK", 0, world), world, -1, 0)
    return LauncherInfo("mpirun", _int(env, "PMIX_RANK"), 0, -1, 0) if "PMIX_RANK" in env else None


def _srun(env: Mapping[str, str]) -> LauncherInfo | None:
    # Steps numbered from 2**32 - 16 are Slurm's own: batch script, salloc's shell, external.  sbatch sets SLURM_PROCID=0 and
    # SLURM_NTASKS for its script, but no step.
    if (
        not {"SLURM_STEP_ID", "SLURM_PROCID"} <= env.keys()
        or _int(env, "SLURM_STEP_ID") >= 2**32 - 16
    ):
        return None
    world = _int(
        env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1
    )
    rank, local_rank, job = (
        _int(env, "SLURM_PROCID", 0, world),
        _int(env, "SLURM_LOCALID"),
        _int(env, "SLURM_JOB_ID"),
    )
    hosts = next(
        (
            hosts_of(env[n], n)
            for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
            if env.get(n)
        ),
        [],
    )
    local_world = _tasks_here(env, world, len(hosts))
    address = (
        "127.0.0.1"
        if local_world == world
        else env.get("MASTER_ADDR") or (hosts[0] if hosts else "")
    )
    if not address:
        raise ValueError(
            "SLURM_STEP_NODELIST is not set, though SLURM_STEP_ID is; set MASTER_ADDR to the host of rank 0."
        )
    step = _int(env, "SLURM_STEP_ID")
    return LauncherInfo(
        "srun",
        rank,
        world,
        local_rank,
        local_world,
        address,
        _port("srun", job, step),
        f"slurm {job}.{step}",
    )


def _tasks_here(env: Mapping[str, str], world: int, hosts: int) -> int:
    """How many of the step's tasks are on this node."""
    if hosts == 1:
        return world
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if name not in env:
            continue
        counts: list[int] = []
        for item in env[name].split(","):
            if not (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)):
                raise ValueError(f"{name}={env[name]!r} is not of the form 4(x2),3.")
            counts += [int(match[1])] * int(match[2] or 1)
        if name == "SLURM_NTASKS_PER_NODE":  # a bare number, for every node
            counts *= hosts or 1
        if sum(counts) != world:  # the job's, not the step's
            if name == "SLURM_STEP_TASKS_PER_NODE":
                raise ValueError(
                    f"{name}={env[name]!r} has {sum(counts)} tasks, but the step has {world}; set MASTER_ADDR etc."
                )
            continue
        if len(set(counts)) == 1:
            return counts[0]
        return counts[_int(env, "SLURM_NODEID", 0, len(counts))]
    raise ValueError(
        "SLURM_STEP_TASKS_PER_NODE is not set or not this step's; how many ranks share this node is not known."
    )


def hosts_of(text: str, name: str = "node list") -> list[str]:
    """The hosts of a compact Slurm list such as n[1-3,07-09],gpu[001-002]-ib,login."""
    parts = re.findall(r"(?:[^,\[\]\s]|\[[^\[\]\s]+\])+", text)
    if not parts or ",".join(parts) != text:
        raise ValueError(f"{name}={text!r} is not a host list such as n[1-3,07-09],login.")
    hosts = []
    for part in parts:
        choices = []
        for i, piece in enumerate(re.split(r"\[(.*?)\]", part)):
            choices.append([piece] if i % 2 == 0 else [])
            for item in piece.split(",") if i % 2 else ():
                match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
                low, high = (match[1], match[2] or match[1]) if match else ("1", "0")
                if int(low) > int(high):
                    raise ValueError(
                        f"{name}={text!r}: {item!r} is not a number or a rising range."
                    )
                choices[-1] += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
        hosts += ["".join(pick) for pick in itertools.product(*choices)]
    return hosts


def _port(launcher: str, job: "int | str", step: int = 0) -> int:
    """Below the ports that systems give out (32768 and up).  Neighbouring Slurm jobs differ by 131, steps by 1."""
    return (
        15000
        + (131 * job + step if isinstance(job, int) else zlib.crc32(f"{launcher} {job}".encode()))
        % 12007
    )


def ask_mpi4py(facts: LauncherInfo) -> LauncherInfo:
    """The ranks tell each other what their environment does not.  Collective over all ranks of mpirun."""
    try:
        from mpi4py import MPI as mpi
    except ImportError as error:
        raise ValueError(
            f"mpirun's variables do not say where rank 0 is, and mpi4py cannot be imported ({error}): install mpi4py, or set "
            "MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there (and RANK, WORLD_SIZE, LOCAL_RANK and "
            "LOCAL_WORLD_SIZE where an MPI does not say who shares a host)."
        ) from error
    everyone = mpi.COMM_WORLD
    if facts.world_size not in (0, everyone.size) or facts.rank != everyone.rank:
        raise ValueError(
            f"mpirun says rank {facts.rank} of {facts.world_size}, mpi4py rank {everyone.rank} of {everyone.size}: mpi4py was built for "
            "another MPI than mpirun; install one that fits, or set MASTER_ADDR and MASTER_PORT."
        )
    local = everyone.Split_type(mpi.COMM_TYPE_SHARED)
    here = (
        (facts.address or socket.gethostname(), facts.port or _free_port())
        if everyone.rank == 0
        else None
    )
    address, port = everyone.bcast(here)
    if local.size == everyone.size and not facts.address:
        address = "127.0.0.1"
    return LauncherInfo(
        "mpirun", everyone.rank, everyone.size, local.rank, local.size, address, port, facts.job
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
