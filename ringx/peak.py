"""Peak memory of one pass, by what the device offers."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from .attention import SeesInside

ON_GPU = "torch.cuda.max_memory_allocated"
ON_CPU = "lifetimes of tensors at the dispatcher (buffers inside an operator are not seen)"


def peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """(most bytes that were allocated at once during `call`, above what was allocated before; how that was found).

    CPU tensors have no such counter in PyTorch: there it is slower than the plain call, so do not time it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, ON_GPU
    with _Lifetimes() as seen:
        call()
    return seen.peak, ON_CPU


class _Lifetimes(SeesInside):
    """Adds up the storages that appear as results of operators, each until it is freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def see(self, func, args, kwargs):
        for x in tree_leaves((args, kwargs)):
            self._see(x, counts=False)  # what comes in unseen was there before
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            self._see(x, counts=True)
        return out

    def _see(self, x: object, counts: bool) -> None:
        if not isinstance(x, torch.Tensor):
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counts else 0
        self.now += self._known[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)
