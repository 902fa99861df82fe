"""The next step's data, read while this one's is used."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Loader(Generic[T]):
    """read(step) for step = first, first + 1, ... up to `stop` (None: without end).

    A thread reads the next one while this one is used.  What the thread raises, next() raises.
    `read` must not communicate.  Use as a context manager: closing waits for the thread."""

    def __init__(self, read: Callable[[int], T], first: int, stop: "int | None" = None):
        self.waited = 0.0  # seconds that the last next() waited
        self.waited_total = 0.0  # seconds
        self._read = read
        self._step = first
        self._stop = stop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: "Future[T] | None" = self._begin()  # noqa: UP037

    def _begin(self) -> "Future[T] | None":
        if self._stop is not None and self._step >= self._stop:
            return None
        return self._thread.submit(self._read, self._step)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._next is None:
            raise StopIteration
        began = time.perf_counter()
        batch = self._next.result()
        self.waited = time.perf_counter() - began
        self.waited_total += self.waited
        self._step += 1
        self._next = self._begin()
        return batch

    def close(self) -> None:
        self._next = None
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Loader[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
