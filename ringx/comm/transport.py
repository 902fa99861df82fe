"""The messages that a pattern sends, as methods of one Transport, whatever carries them.

Thin on purpose: each pattern's file shows its own messages.  What Transport adds to a backend are
ranks counted within the group, contiguous buffers that live until the message has been waited for,
errors that name the algorithm and the step, and byte accounting.  A kind of message is a row of
``collectives.COLLECTIVES``, a method here, and a hook that each subclass fills:

    TorchTransport       torch.distributed: gloo, NCCL, RCCL
    ThreadTransport      ranks that are threads of one process and share its memory (one GPU, many
                         ranks)
    RecordingTransport   another transport, and a list of what was posted and waited for
    FakeTransport        no peers: nothing arrives; for schedules, counts and costs at any number of
                         ranks

A backend sends memory as it lies, so what is not contiguous is copied first (torch.stack and
torch.cat keep an input's channels_last strides).
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.profiler import record_function

from .accounting import count, current_phase
from .collectives import COLLECTIVES
from .group import Group, PeerError


class Work(Protocol):
    """A message that a backend has begun to move."""

    def wait(self) -> Any:
        """Returns when it has arrived (on CUDA: when the current stream may use it)."""


class Pending:
    """A message in flight.  Holds every buffer that it reads or writes until ``wait`` returns the
    result."""

    def __init__(
        self,
        group: Group,
        step: str,
        post: Callable[[], Work | None],
        result: torch.Tensor,
        *buffers: torch.Tensor,
    ):
        """`post` begins it; `step` names it in errors and profiles."""
        self._group = group
        self._step = step
        self._result = result
        self._buffers = buffers
        self._phase = current_phase()
        self._work = self._explain(post, "post")

    def wait(self) -> torch.Tensor:
        """The result.  May be called again."""
        if self._work is not None:
            self._explain(self._work.wait, "wait for")
            self._work = None
        self._buffers = ()
        return self._result

    def _explain(self, call: Callable[[], Any], action: str) -> Any:
        where = f"{self._phase.name} {self._phase.direction}" if self._phase else "ringx"
        try:
            with record_function(f"{where}: {action} {self._step}"):
                return call()
        except RuntimeError as error:
            if not _is_transport_error(error):
                raise
            group = self._group
            raise PeerError(
                f"{where}: {self._step} failed on rank {group.rank} of {group.world_size} "
                f"(global rank {group.global_rank}): {error}\n"
                "A peer has most likely died, raised, or not made this call within the group's "
                "timeout; look for the first error among the other ranks' output."
            ) from error


# gloo's words, in a RuntimeError of no other kind, for what it cannot do
_NOT_SUPPORTED = ("Invalid scalar type", "No backend type associated with device type")


def _is_transport_error(error: RuntimeError) -> bool:
    """gloo raises RuntimeError itself, NCCL a DistError.  Other kinds of RuntimeError
    (NotImplementedError, out of memory, a fault of the accelerator) are not about a peer."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and not str(error).startswith(_NOT_SUPPORTED)


class Done(Pending):
    """What a rank without peers gets at once."""

    def __init__(self, result: torch.Tensor):
        self._work = None
        self._result = result
        self._buffers = ()


@dataclass(frozen=True)
class Transport(abc.ABC):
    """The messages of one rank.  Every method is called by all ranks of the group in the same
    order, begins at once, and returns a Pending; a group of one rank sends nothing."""

    group: Group

    def broadcast(self, x: torch.Tensor, src: int) -> Pending:
        """x of rank `src`, on every rank (received in the memory of x where that is contiguous)."""
        if self.group.world_size == 1:
            return Done(x)
        x = x.contiguous()
        self._count("broadcast", x)
        return Pending(self.group, f"broadcast from rank {src}", lambda: self._broadcast(x, src), x)

    def reduce(self, x: torch.Tensor, dst: int) -> Pending:
        """Sum of every rank's x, on rank `dst`.  What the others get is of no use, and their x is
        lost (gloo writes to it)."""
        if self.group.world_size == 1:
            return Done(x)
        x = x.contiguous()
        self._count("reduce", x)
        return Pending(self.group, f"reduce to rank {dst}", lambda: self._reduce(x, dst), x)

    def all_reduce_max(self, x: torch.Tensor) -> Pending:
        """The elementwise maximum over all ranks; x is lost."""
        if self.group.world_size == 1:
            return Done(x)
        x = x.contiguous()
        self._count("all_reduce", x)
        return Pending(self.group, "all-reduce", lambda: self._all_reduce_max(x), x)

    def all_gather(self, x: torch.Tensor) -> Pending:
        """[N, *x.shape]: every rank's x (equal shapes)."""
        if self.group.world_size == 1:
            return Done(x[None])
        x = x.contiguous()
        out = x.new_empty((self.group.world_size, *x.shape))
        self._count("all_gather", x)
        return Pending(self.group, "all-gather", lambda: self._all_gather(out, x), out, x)

    def all_to_all(self, parts: Sequence[torch.Tensor], incoming: Sequence[int]) -> Pending:
        """Part i goes to rank i; the result is flat, `incoming[i]` elements from each rank i, one
        after another."""
        if self.group.world_size == 1:
            return Done(parts[0].reshape(-1))
        message = torch.cat([part.reshape(-1) for part in parts])
        out = message.new_empty(sum(incoming))
        outgoing = [part.numel() for part in parts]
        sent = message.nbytes - parts[self.group.rank].numel() * message.itemsize
        count(self.group, "all_to_all", sent)
        return Pending(
            self.group,
            "all-to-all",
            lambda: self._all_to_all(out, message, list(incoming), outgoing),
            out,
            message,
        )

    def send_recv(self, x: torch.Tensor, dst: int, src: int, shape: Sequence[int]) -> Pending:
        """Sends x to rank `dst` and receives a tensor of this `shape` and x's dtype from rank
        `src`.  Every rank sends one message and receives one."""
        if self.group.world_size == 1:
            return Done(x)
        x = x.contiguous()
        out = x.new_empty(tuple(shape))
        self._count("send_recv", x)
        step = f"send/receive (to rank {dst}, from rank {src})"
        return Pending(self.group, step, lambda: self._send_recv(x, dst, out, src), out, x)

    def _count(self, collective: str, message: torch.Tensor) -> None:
        row = COLLECTIVES[collective]
        count(self.group, collective, row.sent_bytes(message.nbytes, self.group.world_size))

    # ---- what a subclass fills: begin to move contiguous buffers among at least two ranks

    @abc.abstractmethod
    def _broadcast(self, x: torch.Tensor, src: int) -> Work | None: ...

    @abc.abstractmethod
    def _reduce(self, x: torch.Tensor, dst: int) -> Work | None: ...

    @abc.abstractmethod
    def _all_reduce_max(self, x: torch.Tensor) -> Work | None: ...

    @abc.abstractmethod
    def _all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Work | None: ...

    @abc.abstractmethod
    def _all_to_all(
        self,
        out: torch.Tensor,
        message: torch.Tensor,
        incoming: list[int],
        outgoing: list[int],
    ) -> Work | None: ...

    @abc.abstractmethod
    def _send_recv(self, x: torch.Tensor, dst: int, out: torch.Tensor, src: int) -> Work | None: ...
