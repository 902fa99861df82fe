"""Many ranks in one process, as threads: real gloo collectives, and quick to start.

Connecting takes 10 ms a rank.  For tests in which processes are not what is tested.
"""

import contextlib
import functools
import gc
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.testing._internal.distributed.multi_threaded_pg as threaded

from ringx import launch


def run(world: int, call: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """The results of ``call(rank, *args)`` by rank; each rank is a thread with a gloo group.

    Raises the first rank's error.  Make random inputs before: the threads share the generator.
    """
    results = attempt(world, call, *args, timeout=timeout)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def attempt(world: int, call: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """As ``run``, with each rank's exception in place of its result."""
    store = dist.HashStore()
    results: list[Any] = [None] * world
    # A rank that has little to do must not be gone before the others have reached it.
    connected = threading.Barrier(world)

    def rank_main(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
            try:
                connected.wait(timeout)
                results[rank] = call(rank, *args)
            finally:
                dist.destroy_process_group()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            results[rank] = error
            connected.abort()  # nobody waits for a rank that could not connect

    with _thread_isolation():
        threads = [
            threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout + 60)
            assert not thread.is_alive(), "a rank hangs"
        if "torch.distributed.tensor" in sys.modules:
            _forget_meshes()
    return results


def world_of(rank: int, size: int) -> launch.World:
    """What ``launch.init`` would give this rank."""
    return launch.World(rank, size, rank, size, torch.device("cpu"), "gloo", "threads", "", 0)


def launch_threads(call: Callable[..., Any], nproc: int, *args: Any, **_: Any) -> list[Any]:
    """In place of ``launch.run``: the ranks are threads; one rank has no group."""
    if nproc == 1:
        return [call(world_of(0, 1), *args)]
    return run(nproc, lambda rank: call(world_of(rank, nproc), *args))


def _forget_meshes() -> None:
    """Empties DTensor's caches, which hold meshes.

    The gloo groups of these would keep threads that wake up often and slow down all later tests.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith("torch.distributed.tensor"):
            continue
        for function in list(vars(module).values()):
            if isinstance(function, functools._lru_cache_wrapper):
                function.cache_clear()
    gc.collect()


@contextlib.contextmanager
def _thread_isolation():
    """Each thread has process groups of its own."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    world = c10d._world
    c10d._world = threaded.ThreadLocalWorld()
    try:
        yield
    finally:
        c10d._world = world
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
