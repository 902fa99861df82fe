"""What the environment says about this process: pure functions of a mapping, one for each launcher,
and mpi4py for the rest.

The first that applies:

    torchrun   RANK and WORLD_SIZE (also what deepspeed, accelerate and hand-written scripts set)
    mpirun     OMPI_COMM_WORLD_*, MV2_COMM_WORLD_*, or PMI_* with the local rank that hydra or PALS
               set; before srun, whose variables reach every rank that mpirun starts from inside a
               Slurm job
    srun       SLURM_STEP_ID and SLURM_PROCID: a task of a job step.  A batch script and salloc's
               shell are plain processes
    mpirun     bare PMI_RANK or PMIX_RANK: mpi4py tells the rest

MASTER_ADDR and MASTER_PORT always win.  Without them rank 0 is on the first host of the step's node
list (127.0.0.1 if there is only one host), and the port follows from the job and step (srun) or the
job's name or parent process (mpirun), so that two jobs on one host use different ports.  Ranks of
mpirun on several hosts exchange the address through mpi4py.
"""

import itertools
import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

# Slurm numbers its own steps from here: batch script, salloc's shell, external processes
FIRST_INTERNAL_STEP = 2**32 - 16
NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
TASK_COUNTS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
FIRST_PORT = 15000  # ports that systems give out themselves begin at 32768
NUMBER_OF_PORTS = 12007


class _MpiVariables(NamedTuple):
    """Names of the variables in which an MPI describes a rank."""

    rank: str
    world_size: str
    local_rank: str
    local_world: str


MPI_VARIABLES = (
    _MpiVariables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _MpiVariables(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    # hydra: MPICH, Intel MPI
    _MpiVariables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # PALS: HPE Cray
    _MpiVariables("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)


@dataclass(frozen=True)
class LauncherInfo:
    """What the environment says, before any device or other rank was asked."""

    launcher: str
    rank: int = 0
    world_size: int = 1  # 0: not known
    local_rank: int = 0  # -1: not known
    local_world: int = 1  # 0: not known
    address: str = ""
    port: int = 0
    job: str = ""  # tells this job's ranks from another's that use the same port


def read(env: Mapping[str, str]) -> LauncherInfo:
    """What the variables `env` say about this process.

    Raises:
        ValueError: variables are missing or contradict each other; names them, and the remedy."""
    scheduler = _read_mpirun(env) or _read_srun(env) or _read_bare_pmi(env)
    info = _read_torchrun(env, scheduler) or scheduler or LauncherInfo("plain")
    if info.launcher == "plain":
        return info
    if env.get("MASTER_ADDR"):
        info = replace(info, address=env["MASTER_ADDR"])
    if env.get("MASTER_PORT"):
        info = replace(info, port=_read_port(env))
    _check_rank(info.launcher, "rank", info.rank, info.world_size)
    _check_rank(info.launcher, "local rank", info.local_rank, info.local_world)
    if info.local_world > info.world_size > 0:
        raise ValueError(
            f"{info.launcher} says {info.local_world} ranks on this host "
            f"of {info.world_size} in all."
        )
    return info


def _check_rank(launcher: str, name: str, rank: int, size: int) -> None:
    if size and rank >= size:
        raise ValueError(
            f"{launcher} says {name} {rank} of {size}: its variables contradict each other; "
            "see the top of ringx/launch/environ.py."
        )


def _read_int(env: Mapping[str, str], name: str, low: int = 0, high: int | None = None) -> int:
    """The integer of a variable, at least `low` and less than `high`."""
    text = env.get(name)
    if text is None:
        raise ValueError(
            f"{name} is not set, though other variables of the launcher are; "
            "start all ranks with one launcher."
        )
    is_number = re.fullmatch(r"\d+", text) is not None
    if not is_number or int(text) < low or (high is not None and int(text) >= high):
        bounds = f"at least {low}" if high is None else f"{low} to {high - 1}"
        raise ValueError(
            f"{name}={text!r} must be an integer, {bounds}; "
            "unset it, or set it right on every rank."
        )
    return int(text)


def _read_port(env: Mapping[str, str]) -> int:
    return _read_int(env, "MASTER_PORT", 1, 65536)


# ---- torchrun


def _read_torchrun(env: Mapping[str, str], scheduler: LauncherInfo | None) -> LauncherInfo | None:
    if not _names_a_rank(env, scheduler):
        return None
    world_size = _read_int(env, "WORLD_SIZE", 1)
    rank = _read_int(env, "RANK", 0, world_size)
    if world_size == 1 and "MASTER_ADDR" not in env:  # there are no others to find
        port = _port_of_name("torchrun", str(os.getpid()))
        return LauncherInfo("torchrun", address="127.0.0.1", port=port)
    # where only RANK and WORLD_SIZE were set, by a wrapper script, the scheduler knows the rest
    fallback = None
    if scheduler and (scheduler.rank, scheduler.world_size) == (rank, world_size):
        fallback = scheduler
    address, port = _read_address(env, fallback)
    if fallback is None and _is_this_host(address):
        fallback = LauncherInfo("", local_rank=rank, local_world=world_size)
    local_rank, local_world = _read_local_rank(env, fallback)
    run_id = env.get("TORCHELASTIC_RUN_ID", "")
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "")
    return LauncherInfo(
        launcher="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world=local_world,
        address=address,
        port=port,
        job=f"{run_id}/{restart}",
    )


def _names_a_rank(env: Mapping[str, str], scheduler: LauncherInfo | None) -> bool:
    """Do the variables of torchrun name a rank?  Beside a scheduler's one alone does not count."""
    has_rank = "RANK" in env
    has_world_size = "WORLD_SIZE" in env
    if scheduler:
        return has_rank and has_world_size
    return has_rank or has_world_size


def _read_address(env: Mapping[str, str], fallback: LauncherInfo | None) -> tuple[str, int]:
    """(address, port) where the ranks find each other."""
    address = env.get("MASTER_ADDR", "")
    if fallback and not address:
        address = fallback.address
    if fallback and "MASTER_PORT" not in env:
        port = fallback.port
    else:
        port = _read_port(env)
    if not address:
        raise ValueError(
            "MASTER_ADDR is not set, though RANK and WORLD_SIZE are; "
            "set it to the host of rank 0, or use torchrun."
        )
    return address, port


def _is_this_host(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def _read_local_rank(env: Mapping[str, str], fallback: LauncherInfo | None) -> tuple[int, int]:
    """(local rank, local world); torchrun sets both, hand-written scripts may not."""
    if fallback and "LOCAL_RANK" not in env:
        local_rank = fallback.local_rank
    else:
        local_rank = _read_int(env, "LOCAL_RANK")
    if fallback and "LOCAL_WORLD_SIZE" not in env:
        local_world = fallback.local_world
    else:
        local_world = _read_int(env, "LOCAL_WORLD_SIZE", 1)
    return local_rank, local_world


# ---- mpirun


def _read_mpirun(env: Mapping[str, str]) -> LauncherInfo | None:
    for names in MPI_VARIABLES:
        if names.rank in env and names.local_rank in env:
            return _read_mpi_rank(env, names)
    return None


def _read_mpi_rank(env: Mapping[str, str], names: _MpiVariables) -> LauncherInfo:
    info = LauncherInfo(
        "mpirun",
        rank=_read_int(env, names.rank),
        world_size=_read_int(env, names.world_size, 1),
        local_rank=_read_int(env, names.local_rank),
        local_world=_read_int(env, names.local_world, 1),
    )
    job_names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
    job = next((env[name] for name in job_names if env.get(name)), "")
    if info.local_world < info.world_size:  # which host rank 0 is on, only MPI can tell
        return replace(info, job=job)
    if not job:
        job = f"parent {os.getppid()}"  # hydra: one proxy starts all ranks of a host
    return replace(info, address="127.0.0.1", port=_port_of_name("mpirun", job), job=job)


def _read_bare_pmi(env: Mapping[str, str]) -> LauncherInfo | None:
    """A rank of an MPI that does not say who shares this host (PMIX_RANK: nor the world size)."""
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        world_size = _read_int(env, "PMI_SIZE", 1)
        rank = _read_int(env, "PMI_RANK", 0, world_size)
        return LauncherInfo(
            "mpirun", rank=rank, world_size=world_size, local_rank=-1, local_world=0
        )
    if "PMIX_RANK" in env:
        rank = _read_int(env, "PMIX_RANK")
        return LauncherInfo("mpirun", rank=rank, world_size=0, local_rank=-1, local_world=0)
    return None


# ---- srun


def _read_srun(env: Mapping[str, str]) -> LauncherInfo | None:
    # sbatch sets SLURM_PROCID=0 and SLURM_NTASKS for its script, but no step
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    step = _read_int(env, "SLURM_STEP_ID")
    if step >= FIRST_INTERNAL_STEP:
        return None
    in_step = "SLURM_STEP_NUM_TASKS" in env
    world_size = _read_int(env, "SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS", 1)
    rank = _read_int(env, "SLURM_PROCID", 0, world_size)
    local_rank = _read_int(env, "SLURM_LOCALID")
    job = _read_int(env, "SLURM_JOB_ID")
    hosts = _read_hosts(env)
    local_world = _tasks_on_this_node(env, world_size, len(hosts))
    address = env.get("MASTER_ADDR", "")
    if local_world == world_size:
        address = "127.0.0.1"
    elif not address and hosts:
        address = hosts[0]
    if not address:
        raise ValueError(
            "SLURM_STEP_NODELIST is not set, though SLURM_STEP_ID is; "
            "set MASTER_ADDR to the host of rank 0."
        )
    return LauncherInfo(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world=local_world,
        address=address,
        port=_port_of_step(job, step),
        job=f"slurm {job}.{step}",
    )


def _read_hosts(env: Mapping[str, str]) -> list[str]:
    """The hosts of the step, or of the job; [] where they are not told."""
    for name in NODE_LISTS:
        if env.get(name):
            return hosts_of(env[name], name)
    return []


def _tasks_on_this_node(env: Mapping[str, str], world_size: int, hosts: int) -> int:
    """How many of the step's tasks are on this node; `hosts` is the number of its nodes, or 0."""
    if hosts == 1:
        return world_size
    for name in TASK_COUNTS:
        if name not in env:
            continue
        counts = _parse_task_counts(name, env[name])
        if name == "SLURM_NTASKS_PER_NODE":  # one number, for every node
            counts *= hosts or 1
        if sum(counts) == world_size:
            if len(set(counts)) == 1:
                return counts[0]
            return counts[_read_int(env, "SLURM_NODEID", 0, len(counts))]
        # else these are the counts of the job, not those of the step
        if name == "SLURM_STEP_TASKS_PER_NODE":
            raise ValueError(
                f"{name}={env[name]!r} has {sum(counts)} tasks, but the step has {world_size}; "
                "set MASTER_ADDR etc."
            )
    raise ValueError(
        "SLURM_STEP_TASKS_PER_NODE is not set or not this step's; "
        "how many ranks share this node is not known."
    )


def _parse_task_counts(name: str, text: str) -> list[int]:
    """ "4(x2),3" -> [4, 4, 3]: the tasks on each node."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise ValueError(f"{name}={text!r} is not of the form 4(x2),3.")
        tasks, repetitions = match.groups(default="1")
        counts += [int(tasks)] * int(repetitions)
    return counts


def hosts_of(text: str, name: str = "node list") -> list[str]:
    """The hosts of a compact Slurm list such as n[1-3,07-09],gpu[001-002]-ib,login.

    Args:
        name: for the error message, what `text` is.

    Raises:
        ValueError: it is no such list."""
    groups = re.findall(r"(?:[^,\[\]\s]|\[[^\[\]\s]+\])+", text)
    if not groups or ",".join(groups) != text:
        raise ValueError(f"{name}={text!r} is not a host list such as n[1-3,07-09],login.")
    hosts: list[str] = []
    for group in groups:
        # the parts of r[1-2]n[01,3] are alternately fixed and in brackets
        alternatives: list[list[str]] = []
        for index, part in enumerate(re.split(r"\[(.*?)\]", group)):
            in_brackets = index % 2 == 1
            alternatives.append(_expand_brackets(part, text, name) if in_brackets else [part])
        hosts += ["".join(parts) for parts in itertools.product(*alternatives)]
    return hosts


def _expand_brackets(part: str, text: str, name: str) -> list[str]:
    """ "1-3,07" -> ["1", "2", "3", "07"]."""
    numbers: list[str] = []
    for item in part.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        first, last = match.groups() if match else ("1", "0")  # the latter is refused below
        last = last or first
        if int(first) > int(last):
            raise ValueError(f"{name}={text!r}: {item!r} is not a number or a rising range.")
        width = len(first)
        numbers += [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    return numbers


# ---- ports


def _port_of_step(job: int, step: int) -> int:
    """Neighbouring Slurm jobs differ by 131, steps by 1."""
    return FIRST_PORT + (131 * job + step) % NUMBER_OF_PORTS


def _port_of_name(launcher: str, job: str) -> int:
    return FIRST_PORT + zlib.crc32(f"{launcher} {job}".encode()) % NUMBER_OF_PORTS


# ---- mpi4py


def ask_mpi4py(info: LauncherInfo) -> LauncherInfo:
    """What the environment does not say, asked of MPI.  Collective over all ranks of mpirun.

    Raises:
        ValueError: mpi4py is missing, or was built for another MPI."""
    try:
        from mpi4py import MPI as mpi  # an optional dependency
    except ImportError as error:
        raise ValueError(
            "mpirun's variables do not say where rank 0 is, and mpi4py cannot be imported "
            f"({error}): install mpi4py, or set MASTER_ADDR and MASTER_PORT to the host of rank 0 "
            "and a free port there (and RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE where an "
            "MPI does not say who shares a host)."
        ) from error
    communicator = mpi.COMM_WORLD
    if info.world_size not in (0, communicator.size) or info.rank != communicator.rank:
        raise ValueError(
            f"mpirun says rank {info.rank} of {info.world_size}, mpi4py rank {communicator.rank} "
            f"of {communicator.size}: mpi4py was built for another MPI than mpirun; "
            "install one that fits, or set MASTER_ADDR and MASTER_PORT."
        )
    host_communicator = communicator.Split_type(mpi.COMM_TYPE_SHARED)
    address_of_rank_0 = None
    if communicator.rank == 0:
        address_of_rank_0 = (info.address or socket.gethostname(), info.port or _free_port())
    address, port = communicator.bcast(address_of_rank_0)
    if host_communicator.size == communicator.size and not info.address:
        address = "127.0.0.1"
    return LauncherInfo(
        launcher="mpirun",
        rank=communicator.rank,
        world_size=communicator.size,
        local_rank=host_communicator.rank,
        local_world=host_communicator.size,
        address=address,
        port=port,
        job=info.job,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
