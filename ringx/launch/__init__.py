"""Starting ranks: one way to learn rank, world and address, whoever started this process, and a way to start ranks right here.

    world = ringx.launch.init()                 # on every rank, whoever started it; ends with ringx.launch.shutdown()
    results = ringx.launch.run(fn, 4, *args)    # starts 4 ranks on this machine, unless a launcher already did

torchrun, srun (also without ``scontrol``), mpirun (Open MPI, MPICH, PMI, mpi4py) or a plain process: environ.py says how each is
recognised and where its ranks meet.

On GPUs the backend is "cpu:gloo,cuda:nccl" (nccl is RCCL on ROCm): small messages in CPU memory then cost no GPU
synchronisation.  gloo listens on the network interface that leads to the other ranks, unless GLOO_SOCKET_IFNAME names one.
"""

import atexit
import contextlib
import itertools
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import environ
from .environ import LauncherInfo

ANNOUNCED = 8  # hosts that announce() names
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
LEAVE = 10.0  # seconds that shutdown() waits for ranks still at work


@dataclass(frozen=True)
class World:
    """What a rank must know about itself.  `address` and `port` are where rank 0 is met; "" and 0 for a lone process.

    ``detect`` cannot ask the other ranks: where only mpi4py knows, it says world_size 0, local_rank -1, address "" or port 0."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this host
    local_world: int
    device: torch.device
    backend: (
        str  # of torch.distributed; what it would be for a lone process, which initialises none
    )
    launcher: str  # "torchrun" | "srun" | "mpirun" | "plain" | "ringx"
    address: str
    port: int

    @property
    def world(self) -> int:
        """`world_size`, under the name that it had before."""
        return self.world_size


@dataclass
class _Joined:
    world: World
    store: "dist.Store | None"


_joined: _Joined | None = None
_abandoned = False  # a group that an error left behind
_times = (
    itertools.count()
)  # init and shutdown may alternate: each time has its own keys in the store


# ---- the public surface


def detect(env: Mapping[str, str] | None = None, device: str = "auto") -> World:
    """What ``init`` would return, without initialising anything.

    Raises:
        ValueError: variables are missing or contradict each other, or the device cannot be had; names it, and the remedy."""
    if _joined and env is None:
        return _joined.world
    return _world(environ.read(os.environ if env is None else env), device)


def launched() -> bool:
    """Was this process started as one of several ranks (or by torchrun)?  A lone task of srun or mpirun is a plain process:
    ``srun --pty bash`` looks the same."""
    facts = environ.read(os.environ)
    return (
        dist.get_world_size() if dist.is_initialized() else facts.world_size
    ) != 1 or facts.launcher == "torchrun"


def world_size(nproc: int | None = None) -> int:
    """How many ranks ``run(fn, nproc)`` has: the launcher's, or `nproc` (None is 1) where there is no launcher.

    Raises:
        ValueError: `nproc` is no number of ranks, or not the launcher's."""
    if nproc is not None and (not isinstance(nproc, int) or isinstance(nproc, bool) or nproc < 1):
        raise ValueError(f"nproc={nproc!r} must be a positive integer or None.")
    if not launched():
        return nproc or 1
    there = dist.get_world_size() if dist.is_initialized() else environ.read(os.environ).world_size
    if nproc not in (None, there) and there:
        raise ValueError(
            f"nproc={nproc}, but this process was started as one of {there} ranks; leave nproc out, or start {nproc} ranks "
            "with the launcher."
        )
    return there


def init(*, device: str = "auto", timeout: float = 600.0) -> World:
    """Joins the other ranks: learns who this one is, binds its device, initialises torch.distributed.  Once per process; a
    second call returns the same World.  A lone plain process initialises nothing.

    Args:
        device: "cpu", "cuda" (ROCm too), or "auto": cuda where there is a GPU.
        timeout: seconds that the ranks wait for each other, here and in every collective.

    Raises:
        ValueError: the environment is incomplete or contradicts itself, or the device cannot be had.
        RuntimeError: not all ranks came within the timeout; names address, port and the missing ranks."""
    global _joined
    _check_timeout(timeout)
    if _joined and _joined.store and not dist.is_initialized():  # the caller destroyed the group
        _joined = None
    if not _joined and dist.is_initialized():  # by somebody else: theirs to destroy
        return _adopt(device)
    if not _joined:
        facts = environ.read(os.environ)
        if facts.world_size != 1 and not (facts.port and facts.address and facts.local_world):
            facts = environ.ask_mpi4py(facts)
        if facts.world_size > 1 and "OMP_NUM_THREADS" not in os.environ and _kind(device) == "cpu":
            torch.set_num_threads(1)
        kept = (
            facts.launcher == "torchrun"
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        )  # torchrun keeps a store
        return join(facts, device, timeout, serve=facts.rank == 0 and not kept)
    if device not in ("auto", _joined.world.device.type):
        raise ValueError(
            f"device={device!r}, but this rank is already bound to {_joined.world.device}."
        )
    return _joined.world


def shutdown() -> None:
    """Leaves the group that ``init`` joined, after waiting (10 s at most) for the other ranks to get here too.  Never hangs: a
    rank that leaves because of an error waits for nobody.  Without effect where there is nothing to leave."""
    global _joined, _abandoned
    joined, _joined = _joined, None
    if joined is None or joined.store is None:
        return
    failed = sys.exc_info()[0] is not None or hasattr(sys, "last_value")
    with contextlib.suppress(
        RuntimeError
    ):  # the store ends with rank 0, which may be the first to go
        joined.store.set(f"bye/{joined.world.rank}", "")
        if not failed:
            joined.store.wait(
                [f"bye/{r}" for r in range(joined.world.world_size)], timedelta(seconds=LEAVE)
            )
    if not dist.is_initialized():
        return
    if not failed:
        return dist.destroy_process_group()
    # gloo destroys a group only after its last collective ended, and a peer may never join that one: do not wait for it
    _abandoned = True
    with contextlib.suppress(RuntimeError):  # Python 3.12 starts no threads while it exits
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(1)


def run(
    fn: Callable[..., Any],
    nproc: int | None,
    *args: Any,
    device: str = "auto",
    timeout: float = 600.0,
    threads: int = 1,
) -> list[Any]:
    """Calls fn(world, *args) on every rank.

    Where a launcher started this process as one of several ranks, it is this rank's call: returns [its result].  Otherwise
    starts `nproc` ranks on this machine, as processes, and returns their results by rank; None or 1 is called right here.

    Args:
        fn: what to call: importable, with picklable arguments and results, where processes are started.
        device, timeout: as for ``init``.
        threads: of torch, for each rank that is started (or called) here.

    Raises:
        ValueError: nproc is not what the launcher started, or there are fewer GPUs than ranks.
        RuntimeError: a rank raised or died; carries its number and traceback.  The others have been ended."""
    _check_timeout(timeout)
    size = world_size(nproc)
    if launched():
        world = init(device=device, timeout=timeout)
        world_size(nproc)  # again: an MPI may tell the number only now
        return [fn(world, *args)]
    if size > 1:
        from . import local

        return local.start(fn, size, args, device, timeout, threads)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return [fn(init(device=device, timeout=timeout), *args)]
    finally:
        torch.set_num_threads(before)
        shutdown()


def decide(world: World | None, ask: Callable[[], Any]) -> Any:
    """Rank 0's ask() on every rank: for what the ranks may see differently, such as files.  A ValueError or OSError of rank 0 is
    raised on every rank.  `world` None is a process without peers."""
    if world is None or world.world_size == 1:
        return ask()
    told: list[Any] = [None]
    if world.rank == 0:
        try:
            told = [(ask(), None)]
        except (ValueError, OSError) as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, 0)
    answer, refusal = told[0]
    if refusal is not None:
        raise refusal
    return answer


def gather(mine: Any, world: World) -> list[Any]:
    """What every rank has, by rank; on every rank."""
    everyone = [mine] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def announce(world: World) -> None:
    """Rank 0 says on stderr who is where, and which GPUs each rank sees.  Collective; silent where ranks are on one host's CPU."""
    visible = next((os.environ[name] for name in VISIBLE if os.environ.get(name)), None)
    count = torch.cuda.device_count() if world.device.type == "cuda" else 0
    mine = (socket.gethostname(), str(world.device), count, visible)
    everyone = gather(mine, world)
    if world.rank == 0 and (world.device.type == "cuda" or world.local_world < world.world_size):
        print("\n".join(described(world, everyone)), file=sys.stderr, flush=True)


def described(world: World, everyone: Sequence[tuple[str, str, int, str | None]]) -> list[str]:
    """The lines of ``announce``, from every rank's (host, device, number of GPUs it sees, what the scheduler's variable says)."""
    hosts: dict[str, list[int]] = {}
    for rank, (host, *_) in enumerate(everyone):
        hosts.setdefault(host, []).append(rank)
    lines = [
        f"{world.world_size} ranks on {len(hosts)} host{'s'[: len(hosts) != 1]}, started by {world.launcher}, {world.backend}"
    ]
    if interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
        lines[0] += f" over {interfaces}"
    counts = {count for _, _, count, _ in everyone}
    if counts == {1}:
        lines.append("each rank sees one GPU, the one it computes on")
    elif counts != {0}:
        seen = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
        lines.append(
            f"each rank sees all {seen} GPUs of its host and computes on that of its local rank"
        )
    for host, ranks in list(hosts.items())[:ANNOUNCED]:
        says = [
            f"{r}: {everyone[r][1]}" + (f" of {everyone[r][3]}" if everyone[r][3] else "")
            for r in ranks
        ]
        lines.append(f"  {host}  " + ", ".join(says))
    if len(hosts) > ANNOUNCED:
        lines.append(f"  and {len(hosts) - ANNOUNCED} hosts more")
    return lines


def _check_timeout(timeout: float) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9:
        raise ValueError(f"timeout={timeout!r} must be a positive number of seconds.")


# ---- devices


def _kind(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device={device!r} must be 'auto', 'cpu' or 'cuda' (each rank takes the GPU of its local rank)."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', but torch sees no GPU here; check the driver, CUDA_VISIBLE_DEVICES, or take 'cpu'."
        )
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def bind_device(device: str, local_rank: int, local_world: int, launcher: str) -> torch.device:
    """The CPU; or GPU `local_rank` where all are visible, the only one where the scheduler shows each rank its own."""
    if _kind(device) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_world > count and (count > 1 or launcher == "ringx"):
        raise ValueError(
            f"{local_world} ranks on this host would share {count} GPU{'s' if count > 1 else ''}: start at most {count} per host, "
            "let the scheduler show each rank one GPU (srun --gpus-per-task=1), or take device='cpu'."
        )
    return torch.device("cuda", max(local_rank, 0) % count)


def _world(f: LauncherInfo, device: str) -> World:
    bound = bind_device(device, f.local_rank, f.local_world, f.launcher)
    backend = "cpu:gloo,cuda:nccl" if bound.type == "cuda" else "gloo"
    return World(
        f.rank,
        f.world_size,
        f.local_rank,
        f.local_world,
        bound,
        backend,
        f.launcher,
        f.address,
        f.port,
    )


# ---- joining the others


def join(facts: LauncherInfo, device: str, timeout: float, serve: bool) -> World:
    """``init`` with the facts known; `serve`: this rank keeps the store in which all meet."""
    global _joined
    world = _world(facts, device)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        torch.cuda.init()  # a DeviceMesh made later respects the device only then
    store = None
    if world.world_size > 1 or world.launcher == "torchrun":
        store = _meet(world, facts.job, timeout, serve)
        try:
            dist.init_process_group(
                world.backend,
                store=store,
                rank=world.rank,
                world_size=world.world_size,
                timeout=timedelta(seconds=timeout),
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"{_who(world)}: all ranks met at {world.address}:{world.port}, but {world.backend} could not connect them within "
                f"{timeout:g} s: {error}\nIf the hosts have several networks, set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)."
            ) from error
    _joined = _Joined(world, store)
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    return world


def _meet(world: World, job: str, timeout: float, serve: bool) -> dist.Store:
    """The store that all ranks reached; each has said in it that it is here."""
    end = time.monotonic() + timeout
    where = f"{world.address}:{world.port}"
    choose = f"MASTER_ADDR and MASTER_PORT, set alike for all {world.world_size} ranks, choose another place."
    try:
        if not serve:
            _await_server(world.address, world.port, end)
        left = timedelta(seconds=max(end - time.monotonic(), 1))
        tcp = dist.TCPStore(
            world.address,
            world.port,
            world.world_size,
            serve,
            left,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"{_who(world)} could not meet the others at {where} within {timeout:g} s: {str(error).splitlines()[0]}\n"
            f"Is that the host of rank 0 and reachable from here, is the port free, was rank 0 started? {choose}"
        ) from error
    tcp.set_timeout(timedelta(seconds=timeout))
    store = dist.PrefixStore(f"ringx/{job}/{next(_times)}", tcp)
    gpu = (
        str(getattr(torch.cuda.get_device_properties(world.device), "uuid", ""))
        if world.device.type == "cuda"
        else ""
    )
    keys = [f"here/{r}" for r in range(world.world_size)]
    found = ""
    try:  # rank 0 waits for all and tells the rest: N keys to watch, not N * N
        store.set(keys[world.rank], f"{gpu}\t{_my_address(world.address)}")
        store.wait(
            keys if world.rank == 0 else ["all"],
            timedelta(seconds=max(end - time.monotonic(), 0.001)),
        )
        if world.rank == 0:
            store.set("all", "\n".join(value.decode() for value in store.multi_get(keys)))
        found = store.get("all").decode()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # rank 0, and the store with it, may have ended
            missing = [r for r, key in enumerate(keys) if not store.check([key])]
            names = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
            found = f"Missing: rank {names}." if missing else "The last came too late."
            if world.rank == 0:
                store.set("all", found)
                time.sleep(0.5)  # for the others to read it
    if "\t" not in found:
        raise RuntimeError(
            f"{_who(world)}: not all of {world.world_size} ranks came to {where} within {timeout:g} s. {found or 'Rank 0 has ended.'} "
            f"Look for an earlier error in their output; {choose}"
        )
    said = [line.split("\t") for line in found.split("\n")]
    twins = [r for r, (other, _) in enumerate(said) if gpu and other == gpu]
    if len(twins) > 1:
        raise ValueError(
            f"ranks {twins} all have GPU {gpu}; start fewer ranks per host, or have the scheduler give each its own."
        )
    if "GLOO_SOCKET_IFNAME" not in os.environ and (
        name := _interface(world, [address for _, address in said])
    ):
        os.environ["GLOO_SOCKET_IFNAME"] = (
            name  # else gloo takes what the host's name resolves to: often a loopback address
        )
    return store


def _who(world: World) -> str:
    return f"rank {world.rank} of {world.world_size} ({world.launcher})"


def _await_server(address: str, port: int, end: float) -> None:
    """Until somebody listens there.  (A TCPStore waits too, but up to twice its timeout and with a page of C++ frames.)"""
    pause = 0.1
    while True:
        try:
            socket.create_connection(
                (address, port), timeout=max(end - time.monotonic(), 0.1)
            ).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(max(min(pause, end - time.monotonic()), 0))
        pause = min(2 * pause, 2.0)


def _my_address(peer: str) -> str:
    """The IPv4 address of this host from which `peer` is reached; "" if there is none.  Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((peer, 9))
        return s.getsockname()[0]
    return ""


def _interface(world: World, addresses: Sequence[str]) -> str:
    """The name of the network interface that leads to the other ranks; "" where that cannot be told (not on Linux)."""
    mine = addresses[world.rank]
    if (
        mine.startswith("127.") and world.local_world < world.world_size
    ):  # rank 0's host, whose own name leads to itself
        mine = next((_my_address(a) for a in addresses if a and not a.startswith("127.")), "")
    with (
        contextlib.suppress(ImportError, OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s,
    ):
        import fcntl

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                row = fcntl.ioctl(s, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                address = socket.inet_ntoa(row[20:24])
                if address == mine or (address.startswith("127.") and mine.startswith("127.")):
                    return name
    return ""


def _adopt(device: str) -> World:
    """The World of a group that somebody else initialised."""
    rank, size = dist.get_rank(), dist.get_world_size()
    facts = environ.read(os.environ)
    if (facts.rank, facts.world_size) != (rank, size):
        facts = LauncherInfo("plain", rank, size, rank, size)
    world = _world(facts, device)
    here = (
        torch.device("cuda", torch.cuda.current_device())
        if world.device.type == "cuda"
        else world.device
    )
    return replace(world, device=here, backend=str(dist.get_backend()))


def _at_exit() -> None:
    shutdown()
    if (
        hasattr(sys, "last_value") and _abandoned
    ):  # an uncaught error: let the peers know now, not after the group's timeout
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
