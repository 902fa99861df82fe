"""Joining and leaving the process group of all ranks."""

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from . import environ
from .environ import LauncherInfo
from .rendezvous import open_store
from .world import World, rank_label, resolve_device_type, world_of

LEAVE_TIMEOUT = 10.0  # seconds that shutdown() waits for ranks still at work


@dataclass
class _Joined:
    world: World
    store: "dist.Store | None"  # None for a lone process


_joined: _Joined | None = None
_group_abandoned = False  # an error left behind a group that could not be destroyed


def detect(env: Mapping[str, str] | None = None, device: str = "auto") -> World:
    """What ``init`` would return, without initialising anything.

    Args:
        env: the variables to look at; None is this process's environment.
        device: as for ``init``.

    Raises:
        ValueError: variables are missing or contradict each other, or the device cannot be had;
            names it, and the remedy."""
    if env is not None:
        return world_of(environ.read(env), device)
    if _joined is not None:
        return _joined.world
    return world_of(environ.read(os.environ), device)


def init(*, device: str = "auto", timeout: float = 600.0) -> World:
    """Joins the other ranks: learns which rank this is, binds its device and initialises
    torch.distributed.  Once per process; a second call returns the same World.  A lone plain
    process initialises nothing.

    Args:
        device: "cpu", "cuda" (ROCm too), or "auto": cuda where there is a GPU.
        timeout: seconds that the ranks wait for each other, here and in every collective.

    Raises:
        ValueError: the environment is incomplete or contradicts itself, or there is no such device.
        RuntimeError: not all ranks came within the timeout; names address, port and the missing
            ranks."""
    global _joined
    check_timeout(timeout)
    if _joined is not None and _joined.store is not None and not dist.is_initialized():
        _joined = None  # the caller destroyed the group
    if _joined is not None:
        bound_device = _joined.world.device
        if device not in ("auto", bound_device.type):
            raise ValueError(
                f"device={device!r}, but this rank is already bound to {bound_device}."
            )
        return _joined.world
    if dist.is_initialized():
        return _adopt_group(device)
    return _join_launched(device, timeout)


def shutdown() -> None:
    """Leaves the group that ``init`` joined, after waiting (10 s at most) for the other ranks to
    get here too.  Never hangs: a rank that leaves because of an error waits for no other.  Without
    effect where there is nothing to leave."""
    global _joined
    joined = _joined
    _joined = None
    if joined is None or joined.store is None:
        return
    failed = sys.exc_info()[0] is not None or hasattr(sys, "last_value")
    _await_leaving(joined.world, joined.store, wait=not failed)
    if not dist.is_initialized():
        return
    if failed:
        _abandon_group()
    else:
        dist.destroy_process_group()


def join(launcher_info: LauncherInfo, device: str, timeout: float, serve: bool) -> World:
    """``init`` where the launcher's facts are known.

    Args:
        serve: this rank serves the store through which the ranks find each other."""
    global _joined
    world = world_of(launcher_info, device)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        torch.cuda.init()  # a DeviceMesh made later respects the device only then
    store = None
    if world.world_size > 1 or world.launcher == "torchrun":
        store = open_store(world, launcher_info.job, timeout, serve)
        _init_process_group(world, store, timeout)
    _joined = _Joined(world, store)
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    return world


def check_timeout(timeout: float) -> None:
    """Raises ValueError unless `timeout` is a positive number of seconds."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9:
        raise ValueError(f"timeout={timeout!r} must be a positive number of seconds.")


# ---- joining


def _join_launched(device: str, timeout: float) -> World:
    """Joins the ranks that the launcher of this process started."""
    launcher_info = environ.read(os.environ)
    is_complete = launcher_info.port and launcher_info.address and launcher_info.local_world
    if launcher_info.world_size != 1 and not is_complete:
        launcher_info = environ.ask_mpi4py(launcher_info)
    may_set_threads = launcher_info.world_size > 1 and "OMP_NUM_THREADS" not in os.environ
    if may_set_threads and resolve_device_type(device) == "cpu":
        torch.set_num_threads(1)
    launcher_serves = (
        launcher_info.launcher == "torchrun"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )
    serve = launcher_info.rank == 0 and not launcher_serves
    return join(launcher_info, device, timeout, serve)


def _init_process_group(world: World, store: dist.Store, timeout: float) -> None:
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
            f"{rank_label(world)}: all ranks met at {world.address}:{world.port}, but "
            f"{world.backend} could not connect them within {timeout:g} s: {error}\n"
            "If the hosts have several networks, set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)."
        ) from error


def _adopt_group(device: str) -> World:
    """The World of a group that the caller initialised, and will destroy."""
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    launcher_info = environ.read(os.environ)
    if (launcher_info.rank, launcher_info.world_size) != (rank, world_size):
        launcher_info = LauncherInfo(
            "plain", rank=rank, world_size=world_size, local_rank=rank, local_world=world_size
        )
    world = world_of(launcher_info, device)
    current_device = world.device
    if world.device.type == "cuda":
        current_device = torch.device("cuda", torch.cuda.current_device())
    return replace(world, device=current_device, backend=str(dist.get_backend()))


# ---- leaving


def _await_leaving(world: World, store: dist.Store, wait: bool) -> None:
    """Notes in the store that this rank leaves; with `wait`, until all others do."""
    with contextlib.suppress(RuntimeError):  # the store ends with rank 0, which may leave first
        store.set(f"bye/{world.rank}", "")
        if wait:
            keys = [f"bye/{rank}" for rank in range(world.world_size)]
            store.wait(keys, timedelta(seconds=LEAVE_TIMEOUT))


def _abandon_group() -> None:
    """Destroys the group within a second, or leaves it behind.

    gloo destroys a group only after its last collective ended, and a peer may never join that
    one."""
    global _group_abandoned
    _group_abandoned = True
    with contextlib.suppress(RuntimeError):  # Python 3.12 starts no threads while it exits
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(1)


def _at_exit() -> None:
    shutdown()
    if hasattr(sys, "last_value") and _group_abandoned:
        # an uncaught error: end now, for the peers to notice before the group's timeout
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
