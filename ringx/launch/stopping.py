"""Stopping early: on a signal from Slurm before a time limit, or from `kill`, all ranks stop at the
same place, and no piece of work is left half done.

    with Watch() as watch:
        for piece in work:
            watch.barrier_or_stop(world)  # raises Stopped on all ranks if one received a signal
            do(piece)

SIGUSR1 is what `sbatch --signal=B:USR1@120` sends to the batch script two minutes before the limit;
script/job.sh passes it on to the ranks.  A program that stopped early ends with status AGAIN: what
it has done is kept, and starting it again does the rest.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..comm import Group, Pending, cpu_group
from .world import World

AGAIN = 75  # exit status: stopped early, start it again (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):
    """Some rank received a signal to stop; raised on all ranks at the same place."""


_received: str | None = None  # the name of the signal; never reset in this process


class Watch:
    """While it is entered, SIGNALS only set a flag; a second SIGTERM ends the process.

    Has no effect in threads other than the main one, which get no signals."""

    def __init__(self) -> None:
        self._interrupt_at_once = False
        self._handlers_before: dict[int, Any] = {}

    @property
    def stop_signal(self) -> str | None:
        """The name of the signal that this process received, or None."""
        return _received

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if _received:
            return
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        global _received
        _received = signal.Signals(number).name
        # the batch script repeats SIGUSR1 until all ranks have ended
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._interrupt_at_once:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self, when: bool) -> Iterator[None]:
        """Inside, and if `when`, the signal raises KeyboardInterrupt wherever the process is, and
        so does one that came before.

        For a process that only waits for others and does not call ``barrier_or_stop``."""
        self._interrupt_at_once = when
        try:
            if when and self.stop_signal:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupt_at_once = False

    def barrier_or_stop(self, world: World) -> None:
        """Waits for all ranks.

        Raises:
            Stopped: on all ranks, if one had received a signal before it came here.
            PeerError: a rank did not come within the group's timeout."""
        stop_flag = torch.tensor([int(self.stop_signal is not None)])
        if world.world_size > 1:
            _reduce_over_all_ranks(stop_flag)
        if stop_flag.item():
            raise Stopped


def _reduce_over_all_ranks(stop_flag: torch.Tensor) -> None:
    """Replaces the flag by the largest of all ranks."""
    group = Group.of(None)
    process_group = cpu_group(group)

    def post() -> dist.Work | None:
        return dist.all_reduce(stop_flag, dist.ReduceOp.MAX, group=process_group, async_op=True)

    step = "the meeting of all ranks between two pieces of work"
    Pending(group, step, post, stop_flag).wait()
