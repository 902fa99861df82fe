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


def run(world: int, call: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """The results of ``call(rank, *args)`` by rank; each rank is a thread with a gloo group.

    Raises the first rank's error.  Make random inputs before: the threads share the generator.
    """
    results = attempt(world, call, *args, timeout=timeout)
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def attempt(world: int, call: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """As ``run``, with each rank's exception in place of its result."""
    with _thread_isolation():
        store = dist.HashStore()
        results: list[Any] = [None] * world
        group_timeout = timedelta(seconds=timeout)
        connected = threading.Barrier(
            world
        )  # a rank that has little to do must not be gone before the others have reached it

        def main(rank: int) -> None:
            try:
                torch.set_num_threads(1)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world, timeout=group_timeout
                )
                try:
                    connected.wait(timeout)
                    results[rank] = call(rank, *args)
                finally:
                    dist.destroy_process_group()
            except BaseException as e:  # noqa: BLE001 - handed to the caller
                results[rank] = e
                connected.abort()  # nobody waits for a rank that could not connect

        threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(world)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout + 60)
            assert not t.is_alive(), "a rank hangs"
        if "torch.distributed.tensor" in sys.modules:
            _forget_meshes()
        return results


def _forget_meshes() -> None:
    """Empties DTensor's caches, which hold meshes.

    The gloo groups of these would keep threads that wake up often and slow down all later tests.
    """
    for module in [
        m for name, m in sys.modules.items() if name.startswith("torch.distributed.tensor")
    ]:
        for function in list(vars(module).values()):
            if isinstance(function, functools._lru_cache_wrapper):
                function.cache_clear()
    gc.collect()


@contextlib.contextmanager
def _thread_isolation():
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    old = c10d._world
    c10d._world = threaded.ThreadLocalWorld()
    try:
        yield
    finally:
        c10d._world = old
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
