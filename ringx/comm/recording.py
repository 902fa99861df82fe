"""A transport that also writes down what was posted and waited for, in order: for tests and
timelines."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .transport import Transport, Work


class Event(NamedTuple):
    """One entry of ``RecordingTransport.events``."""

    action: str  # "post" or "wait"
    collective: str  # name in COLLECTIVES
    peer: (
        int | None
    )  # root of a broadcast or reduce, destination of a send; None where all ranks are alike


@dataclass(frozen=True)
class RecordingTransport(Transport):
    """Sends through `inner` and appends an Event to `events` for each message when it is posted and
    when it is waited for."""

    inner: Transport
    events: list = field(default_factory=list, compare=False)

    @classmethod
    def over(cls, inner: Transport, events: list) -> "RecordingTransport":
        """Records what `inner` does in a list of the caller's, which may get other entries too."""
        return cls(inner.group, inner, events)

    def _record(self, collective: str, peer: int | None, work: Work | None) -> Work:
        self.events.append(Event("post", collective, peer))
        return _RecordedWork(self.events, Event("wait", collective, peer), work)

    def _broadcast(self, x: torch.Tensor, src: int) -> Work:
        return self._record("broadcast", src, self.inner._broadcast(x, src))

    def _reduce(self, x: torch.Tensor, dst: int) -> Work:
        return self._record("reduce", dst, self.inner._reduce(x, dst))

    def _all_reduce_max(self, x: torch.Tensor) -> Work:
        return self._record("all_reduce", None, self.inner._all_reduce_max(x))

    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Work:
        return self._record("all_gather", None, self.inner._all_gather(out, x))

    def _all_to_all(
        self,
        out: torch.Tensor,
        message: torch.Tensor,
        incoming: list[int],
        outgoing: list[int],
    ) -> Work:
        work = self.inner._all_to_all(out, message, incoming, outgoing)
        return self._record("all_to_all", None, work)

    def _send_recv(self, x: torch.Tensor, dst: int, out: torch.Tensor, src: int) -> Work:
        return self._record("send_recv", dst, self.inner._send_recv(x, dst, out, src))


class _RecordedWork:
    def __init__(self, events: list, event: Event, work: Work | None):
        self._events = events
        self._event = event
        self._work = work

    def wait(self) -> None:
        self._events.append(self._event)
        if self._work is not None:
            self._work.wait()
