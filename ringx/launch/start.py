"""Calling a function on every rank: on those of the launcher, or on ranks that are started here."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import environ, local
from .process_group import check_timeout, init, shutdown


def launched() -> bool:
    """Was this process started as one of several ranks, or by torchrun?

    A lone task of srun or mpirun is a plain process: ``srun --pty bash`` looks the same."""
    return environ.read(os.environ).launcher == "torchrun" or _launched_size() != 1


def world_size(nproc: int | None = None) -> int:
    """How many ranks ``run(fn, nproc)`` has: those of the launcher, or `nproc` (None is 1) where
    there is no launcher.  0 where only mpi4py will know.

    Raises:
        ValueError: `nproc` is no number of ranks, or not the launcher's."""
    if nproc is not None and (not isinstance(nproc, int) or isinstance(nproc, bool) or nproc < 1):
        raise ValueError(f"nproc={nproc!r} must be a positive integer or None.")
    if not launched():
        return nproc or 1
    launched_size = _launched_size()
    if nproc is not None and launched_size not in (0, nproc):
        raise ValueError(
            f"nproc={nproc}, but this process was started as one of {launched_size} ranks; "
            f"leave nproc out, or start {nproc} ranks with the launcher."
        )
    return launched_size


def run(
    fn: Callable[..., Any],
    nproc: int | None,
    *args: Any,
    device: str = "auto",
    timeout: float = 600.0,
    threads: int = 1,
) -> list[Any]:
    """Calls fn(world, *args) on every rank.

    Where a launcher started this process as one of several ranks, it is this rank's call: returns
    [its result].  Otherwise starts `nproc` ranks on this machine, as processes, and returns their
    results by rank; None or 1 is called right here.

    Args:
        fn: what to call.  It must be importable, with picklable arguments and results, where
            processes are started.
        device, timeout: as for ``init``.
        threads: of torch, for each rank that is started (or called) here.

    Raises:
        ValueError: nproc is not what the launcher started, or there are fewer GPUs than ranks.
        RuntimeError: a rank raised or died; carries its number and traceback.  The others have been
            ended."""
    check_timeout(timeout)
    number_of_ranks = world_size(nproc)
    if launched():
        world = init(device=device, timeout=timeout)
        world_size(nproc)  # again: an MPI may tell the number only now
        return [fn(world, *args)]
    if number_of_ranks > 1:
        return local.start(
            fn, number_of_ranks, args, device=device, timeout=timeout, threads=threads
        )
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return [fn(init(device=device, timeout=timeout), *args)]
    finally:
        torch.set_num_threads(threads_before)
        shutdown()


def _launched_size() -> int:
    """Ranks of the initialised process group, or of the launcher; 0 where only mpi4py knows."""
    if dist.is_initialized():
        return dist.get_world_size()
    return environ.read(os.environ).world_size
