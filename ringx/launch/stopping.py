"""Being told to stop, by Slurm before a time limit or by `kill`: all ranks heed it at the same place, and nothing is half done.

    with Watch() as watch:
        for piece in work:
            watch.barrier_or_stop(world)           # a barrier; raises Stopped on every rank if some rank was told to stop
            do(piece)

SIGUSR1 is what `sbatch --signal=B:USR1@120` sends to the batch script two minutes before the limit; script/job.sh passes it on to
the ranks.  A program that stopped like this ends with status AGAIN: what it has done is kept, and starting it again does the rest.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..comm import Group, Pending
from ..consistency import cpu_group
from .world import World

AGAIN = 75  # exit status: stopped early, start it again (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):
    """Some rank was told to stop; raised on all ranks at the same place."""


_received: str | None = None  # once told, this process stays told


class Watch:
    """While it is entered, SIGNALS only set a flag; a second SIGTERM ends the process.  Has no effect in threads other than the
    main one, which get no signals."""

    def __init__(self) -> None:
        self._at_once = False
        self._before: dict[int, Any] = {}

    @property
    def stop_signal(self) -> str | None:
        """The name of the signal that told this process to stop."""
        return _received

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if not _received:
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        global _received
        _received = signal.Signals(number).name
        signal.signal(
            signal.SIGUSR1, signal.SIG_IGN
        )  # the batch script repeats it until all ranks have ended
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._at_once:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self, when: bool) -> Iterator[None]:
        """Inside, and if ``when``, the signal raises KeyboardInterrupt where it finds the process, and so does one that came
        before: for a process that only waits for others and does not ``barrier_or_stop`` them."""
        self._at_once = when
        try:
            if when and self.stop_signal:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def barrier_or_stop(self, world: World) -> None:
        """Waits for all ranks.  Raises Stopped on all of them if one was told to stop before it came here.

        Raises:
            PeerError: a rank did not come within the group's timeout."""
        told = torch.tensor([int(self.stop_signal is not None)])
        if world.world_size > 1:
            group = Group.of(None)
            pg = cpu_group(group)
            Pending(
                group,
                "the meeting of all ranks between two pieces of work",
                lambda: dist.all_reduce(told, dist.ReduceOp.MAX, group=pg, async_op=True),
                told,
            ).wait()
        if told.item():
            raise Stopped
