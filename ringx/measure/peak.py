"""Peak memory of one pass, by what the device offers."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from ..api import SeesInside

ON_GPU = "torch.cuda.max_memory_allocated"
ON_CPU = "lifetimes of tensors at the dispatcher (buffers inside an operator are not seen)"


def peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """(most bytes that were allocated at once during `call`, above what was allocated before; how
    that was found).

    CPU tensors have no such counter in PyTorch: there it is slower than the plain call, so do not
    time it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, ON_GPU
    with Lifetimes() as seen:
        call()
    return seen.peak, ON_CPU


class Alive(NamedTuple):
    """A storage that has been seen and is not freed yet."""

    serial: int  # no other storage of the same counter has it
    before: int  # bytes that it had before the counting began; 0 if it is new
    bytes: int  # above that


class Lifetimes(SeesInside):
    """Adds up the storages that appear as results of operators, each until it is freed or resized.

    `now` and `peak` are bytes above what was allocated before; `at_peak` is {serial: bytes} of the
    storages alive then, `resized` the serials of those that changed their size by
    ``UntypedStorage.resize_``: FSDP2 frees and fills unsharded parameters so."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: dict[int, int] = {}
        self.resized: set[int] = set()
        self.alive: dict[int, Alive] = {}  # by the address of the storage
        self._serials = itertools.count()

    def __enter__(self):
        _watch(self)
        return super().__enter__()

    def __exit__(self, *error):
        _unwatch(self)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            # A DTensor: its operations on the tensors inside come here in turn.
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)

    def see(self, func, args, kwargs):
        for storage in _storages((args, kwargs)):
            self.account(storage, new=False)  # an unknown input was allocated before
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self.account(storage, new=True)
        return out

    def account(self, storage: torch.UntypedStorage, new: bool) -> Alive:
        """Counts a storage as large as it is now; returns what is known of it.

        new: whether the call that is being counted made it, if it is seen for the first time."""
        address = storage._cdata
        size = storage.nbytes()
        known = self.alive.get(address)
        if known is None:
            before = 0 if new else size
            known = self.alive[address] = Alive(next(self._serials), before, bytes=0)
            weakref.finalize(storage, self._freed, address)
        if known.before + known.bytes != size:
            self.now += size - known.before - known.bytes
            known = self.alive[address] = known._replace(bytes=size - known.before)
            if self.now > self.peak:
                self.peak = self.now
                self.at_peak = {alive.serial: alive.bytes for alive in self.alive.values()}
        return known

    def _freed(self, address: int) -> None:
        # What was allocated before still counts as allocated.
        self.now -= max(0, self.alive.pop(address).bytes)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        # The is_meta of a fake tensor is False: fake tensors count.
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            yield leaf.untyped_storage()


# ---- resizes of storages, which do not pass the dispatcher.  Several threads may count at the same
# time: each counts its own

_watching: list[tuple[int, Lifetimes]] = []  # thread, counter; one entered twice is here twice
_lock = threading.Lock()
_resize = torch.UntypedStorage.resize_


def _watch(counter: Lifetimes) -> None:
    with _lock:
        _watching.append((threading.get_ident(), counter))
        torch.UntypedStorage.resize_ = _resize_and_count  # type: ignore[assignment, method-assign]


def _unwatch(counter: Lifetimes) -> None:
    with _lock:
        _watching.remove((threading.get_ident(), counter))
        if not _watching:
            torch.UntypedStorage.resize_ = _resize  # type: ignore[method-assign]


def _resize_and_count(storage: torch.UntypedStorage, size: int) -> object:
    this_thread = threading.get_ident()
    counters = {counter for thread, counter in _watching if thread == this_thread}
    for counter in counters:
        counter.account(storage, new=False)
    out = _resize(storage, size)
    for counter in counters:
        counter.resized.add(counter.account(storage, new=False).serial)
    return out
