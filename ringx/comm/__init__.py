"""What ranks say to each other: streams and collectives over one context-parallel group, and the bytes they send.

Thin on purpose: each algorithm file shows its own collectives.  What is added to torch.distributed here is ranks counted
within the group (global ranks appear nowhere else), buffers that live until their collective is waited for, errors that
name the algorithm and the step, and byte accounting.

Byte accounting.  ``traffic`` counts what a rank sends under a bandwidth-optimal implementation of each collective, with m
the size of the whole message in bytes (for all_gather and all_to_all: what this rank hands over):

    broadcast, reduce   m (N-1)/N      a pipeline in which N-1 of the N ranks send m once: the mean over ranks
    all_reduce          2 m (N-1)/N    reduce-scatter + all-gather
    all_gather          m (N-1)        this rank's block reaches every other rank
    all_to_all          exact          the parts meant for other ranks

These are the definitions behind nccl-tests' bus bandwidth.  What a backend really puts on the wire differs by a factor of
its own (gloo's reduce sends 1.1 to 2.3 times as much).  Small control messages (``check=True``) are not counted.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch.profiler import record_function


@dataclass(frozen=True)
class Group:
    """A process group as one of its ranks sees it; `pg` is None where there is nobody to talk to."""

    pg: dist.ProcessGroup | None
    rank: int
    world_size: int
    ranks: tuple[int, ...]  # global rank of each group rank

    @classmethod
    def of(cls, group: "dist.ProcessGroup | Group | None") -> "Group":
        """`group`, or the default group for None; one lone rank where no group was initialised."""
        if isinstance(group, Group):
            return group
        if group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return cls(None, 0, 1, (0,))
            group = dist.group.WORLD
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "group: this rank is not a member of the group; call only on its members."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group={group!r} must be a torch.distributed.ProcessGroup or None, not {type(group).__name__}; "
                "of a DeviceMesh pass mesh['cp'].get_group()."
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                "group: this rank is not a member of the group; call only on its members."
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        return cls(group, rank, len(ranks), ranks)

    @property
    def me(self) -> int:
        """This rank's global rank."""
        return self.ranks[self.rank]


class PeerError(RuntimeError):
    """A collective failed: a peer died, raised, or did not make this call within the group's timeout."""


class Disagreement(ValueError):
    """Another rank refused this call, or made a different one (``check=True``)."""


# ---- accounting and phases


@dataclass
class Traffic:
    """Bytes that this rank sent inside one ``traffic()`` block: {collective: bytes}, forward and backward apart; and how many such
    collectives it took part in."""

    forward: Counter = field(default_factory=Counter)
    backward: Counter = field(default_factory=Counter)
    forward_messages: Counter = field(default_factory=Counter)
    backward_messages: Counter = field(default_factory=Counter)
    rank: int = 0


_traffic: list[Traffic] = []  # of all ranks of this process (tests run many ranks as threads)
_phase = threading.local()


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what this rank sends while the block runs (definitions: this module's docstring).

    >>> with ringx.comm.traffic() as t:
    ...     ringx.attention(q, k, v).sum().backward()
    >>> t.forward, t.backward
    (Counter({'all_gather': 524288}), Counter({'all_gather': 524288, 'all_to_all': 393216}))
    """
    seen = Traffic(rank=Group.of(None).me)
    _traffic.append(seen)
    try:
        yield seen
    finally:
        _traffic[:] = [t for t in _traffic if t is not seen]


@contextlib.contextmanager
def phase(name: str, direction: str) -> Iterator[None]:
    """Collectives inside belong to this algorithm's "forward" or "backward": for accounting, error messages and profiles, where
    the ranges read "ringx4 backward" and "ringx4 backward: post (or wait for) broadcast from rank 1"."""
    outer = getattr(_phase, "now", None)
    _phase.now = (name, direction)
    try:
        with record_function(f"{name} {direction}"):
            yield
    finally:
        _phase.now = outer


def _count(group: Group, kind: str, sent: float) -> None:
    direction = (getattr(_phase, "now", None) or ("", "forward"))[1]
    for t in _traffic:
        if t.rank == group.me:
            getattr(t, direction)[kind] += sent
            getattr(t, f"{direction}_messages")[kind] += 1


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


class Pending:
    """A collective in flight.  Holds every buffer that it reads or writes until ``wait`` returns the result."""

    def __init__(
        self,
        group: Group,
        step: str,
        post: Callable[[], "dist.Work | None"],
        result: torch.Tensor,
        *keep: torch.Tensor,
    ):
        self._group, self._step, self._keep = group, step, keep
        self._result = result
        self._phase = getattr(_phase, "now", None)
        self._work = self._explain(post, "post")

    def wait(self) -> torch.Tensor:
        if self._work is not None:
            self._explain(self._work.wait, "wait for")
            self._work = None
        self._keep = ()
        return self._result

    def _explain(self, call: Callable, what: str):
        where = " ".join(self._phase) if self._phase else "ringx"
        try:
            with record_function(f"{where}: {what} {self._step}"):
                return call()
        except RuntimeError as error:
            raise PeerError(
                f"{where}: {self._step} failed on rank {self._group.rank} of {self._group.world_size} (global rank {self._group.me}): "
                f"{error}\nA peer has most likely died, raised, or not made this call within the group's timeout; look for the "
                "first error among the other ranks' output."
            ) from error


class Done(Pending):
    """What a lone rank gets at once."""

    def __init__(self, result: torch.Tensor):
        self._work, self._result, self._keep = None, result, ()


# ---- collectives; each starts at once and returns a Pending.  A backend sends memory as it lies, so what is not contiguous is
# copied first (torch.stack and torch.cat keep an input's channels_last strides)


def broadcast(x: torch.Tensor, src: int, group: Group) -> Pending:
    """x of group rank `src`, on every rank (received in the memory of x where that is contiguous)."""
    if group.world_size == 1:
        return Done(x)
    x = x.contiguous()
    _count(group, "broadcast", _bytes(x) * (group.world_size - 1) / group.world_size)
    return Pending(
        group,
        f"broadcast from rank {src}",
        lambda: dist.broadcast(x, group.ranks[src], group=group.pg, async_op=True),
        x,
    )


def reduce(x: torch.Tensor, dst: int, group: Group) -> Pending:
    """Sum of every rank's x, on group rank `dst`.  What the others get is of no use, and their x is lost (gloo writes to it)."""
    if group.world_size == 1:
        return Done(x)
    x = x.contiguous()
    _count(group, "reduce", _bytes(x) * (group.world_size - 1) / group.world_size)
    return Pending(
        group,
        f"reduce to rank {dst}",
        lambda: dist.reduce(x, group.ranks[dst], group=group.pg, async_op=True),
        x,
    )


def all_reduce_max(x: torch.Tensor, group: Group) -> Pending:
    """The elementwise maximum over all ranks; x is lost."""
    if group.world_size == 1:
        return Done(x)
    x = x.contiguous()
    _count(group, "all_reduce", 2 * _bytes(x) * (group.world_size - 1) / group.world_size)
    return Pending(
        group,
        "all-reduce",
        lambda: dist.all_reduce(x, dist.ReduceOp.MAX, group=group.pg, async_op=True),
        x,
    )


def all_gather(x: torch.Tensor, group: Group) -> Pending:
    """[N, *x.shape]: every rank's x (equal shapes)."""
    if group.world_size == 1:
        return Done(x[None])
    x = x.contiguous()
    out = x.new_empty((group.world_size, *x.shape))
    gather = getattr(
        dist, "all_gather_single", dist.all_gather_into_tensor
    )  # renamed in torch 2.13
    _count(group, "all_gather", _bytes(x) * (group.world_size - 1))
    return Pending(
        group,
        "all-gather",
        lambda: gather(out.view(-1), x.view(-1), group=group.pg, async_op=True),
        out,
        x,
    )


def all_to_all(parts: Sequence[torch.Tensor], incoming: Sequence[int], group: Group) -> Pending:
    """Part i goes to rank i; the result is flat, `incoming[i]` elements from each rank i, one after another."""
    if group.world_size == 1:
        return Done(parts[0].reshape(-1))
    send = torch.cat([p.reshape(-1) for p in parts])
    out = send.new_empty(sum(incoming))
    mine = parts[group.rank].numel() * send.element_size()
    _count(group, "all_to_all", _bytes(send) - mine)
    return Pending(
        group,
        "all-to-all",
        lambda: dist.all_to_all_single(
            out, send, list(incoming), [p.numel() for p in parts], group=group.pg, async_op=True
        ),
        out,
        send,
    )


# ---- streams


def broadcasts(
    mine: torch.Tensor, shapes: Sequence[Sequence[int]], group: Group, overlap: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each rank's message in rank order, as (src, message); `shapes[src]` is its shape, and an empty one is not sent at all.

    With overlap two broadcasts are always ahead, in two buffers that take turns: this call posts the first two, and a message
    is valid until the next one is asked for, which gives its buffer to the one after that.  Without, one at a time.
    """
    order = [src for src, shape in enumerate(shapes) if prod(shape)]
    ahead = min(2 if overlap else 1, len(order))
    largest = max((prod(shapes[src]) for src in order if src != group.rank), default=0)
    buffers = [mine.new_empty(largest) for _ in range(ahead)]

    def post(i: int) -> Pending:
        src = order[i]
        if src == group.rank:
            return broadcast(mine, src, group)
        return broadcast(buffers[i % ahead][: prod(shapes[src])].view(*shapes[src]), src, group)

    posted = [post(i) for i in range(ahead)] if overlap else []

    def stream() -> Iterator[tuple[int, torch.Tensor]]:
        for i, src in enumerate(order):
            yield src, (posted.pop(0) if overlap else post(i)).wait()
            if overlap and i + ahead < len(order):
                posted.append(post(i + ahead))

    return stream()
