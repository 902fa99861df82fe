"""Being told to stop, by Slurm before a time limit or by `kill`: all ranks heed it at the same place, and nothing is half done.

    with Watch() as watch:
        for piece in work:
            watch.meet(world)           # a barrier; raises Stopped on every rank if some rank was told to stop
            do(piece)

SIGUSR1 is what `sbatch --signal=B:USR1@120` sends to the batch script two minutes before the limit; script/job.sh passes it on to
the ranks.  A program that stopped like this ends with status AGAIN: what it has done is kept, and starting it again does the rest.
"""

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

from . import launch
from .agree import cpu_group
from .comm import Group

AGAIN = 75  # exit status: stopped early, start it again (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):
    """Some rank was told to stop; raised on all ranks at the same place."""


_told: str | None = None  # once told, this process stays told


class Watch:
    """While it is entered, SIGNALS only set a flag; a second SIGTERM ends the process.  Has no effect in threads other than the
    main one, which get no signals.

    at_once: raise KeyboardInterrupt where the signal finds the process, instead of waiting for ``meet``: for a process that only
        waits for others."""

    def __init__(self, at_once: bool = False):
        self._at_once = at_once
        self._before: dict[int, Any] = {}

    @property
    def told(self) -> str | None:
        """The name of the signal that told this process to stop."""
        return _told

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if not _told:
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        global _told
        _told = signal.Signals(number).name
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the batch script repeats it until all ranks have ended
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._at_once:
            raise KeyboardInterrupt

    def meet(self, world: launch.World) -> None:
        """Waits for all ranks.  Raises Stopped on all of them if one was told to stop before it came here."""
        told = torch.tensor([int(self.told is not None)])
        if world.world > 1:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=cpu_group(Group.of(None)))
        if told.item():
            raise Stopped
