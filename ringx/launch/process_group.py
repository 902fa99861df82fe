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
from .rendezvous import _meet, _who
from .world import World, _kind, _world

LEAVE = 10.0  # seconds that shutdown() waits for ranks still at work


@dataclass
class _Joined:
    world: World
    store: "dist.Store | None"


_joined: _Joined | None = None

_abandoned = False  # a group that an error left behind


def detect(env: Mapping[str, str] | None = None, device: str = "auto") -> World:
    """What ``init`` would return, without initialising anything.

    Raises:
        ValueError: variables are missing or contradict each other, or the device cannot be had; names it, and the remedy."""
    if _joined and env is None:
        return _joined.world
    return _world(environ.read(os.environ if env is None else env), device)


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


def _check_timeout(timeout: float) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9:
        raise ValueError(f"timeout={timeout!r} must be a positive number of seconds.")


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
