"""Work beside the main thread, in order and never two pieces at once.

Where workers compute on a GPU of this process, its cores are idle meanwhile. The next task is
written and the last reply is folded then. Workers stay in the main thread, which is the one that an
interrupt reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

import torch

T = TypeVar("T")


class Beside:
    """A thread for work that may go on while the caller does something else.

    With `is_on=False` all work is done at once, in the caller's own thread.
    """

    def __init__(self, is_on: bool) -> None:
        self._pool = _thread() if is_on else None
        self._last: Future[object] | None = None

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def do(self, work: Callable[[], object]) -> None:
        """Begin a piece of work as soon as the one before is done. Raises what that one raised."""
        self.wait()
        if self._pool is None:
            work()
        else:
            self._last = self._pool.submit(work)

    def wait(self) -> None:
        """Wait until the last piece is done. Raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def one_ahead(items: Iterable[T], is_on: bool) -> Iterator[T]:
    """Yield items; with `is_on` each is made while the caller works with the one before."""
    if not is_on:
        yield from items
        return
    iterator, end = iter(items), object()
    with _thread() as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield cast(T, item)
            del item  # It is the caller's alone.


def _thread() -> ThreadPoolExecutor:
    # Half of the cores move memory as fast as all, and the caller needs some as well.
    count = max(1, torch.get_num_threads() // 2)
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(count,))
