"""Threads whose number cannot change a result: each piece of work is computed by one thread from beginning to end.

A matrix product that several threads share is cut, and so rounded, by their number. Here work is cut into pieces first,
always the same ones, and the threads take whole pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Threads:
    """A pool of ``count`` threads."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self.count = pool, count

    def map(self, function: Callable[[Piece], Result], pieces: Iterable[Piece], ahead: int = 2) -> Iterator[Result]:
        """Yield ``function`` of each piece in order; at most ``ahead`` pieces beyond the threads' own are in memory."""
        waiting: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                waiting.append(self._pool.submit(function, piece))
                if len(waiting) >= self.count + ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # an error, or a caller that stopped early: what has not begun need not begin
            for future in waiting:
                future.cancel()


@contextmanager
def one_thread_each(count: int | None = None) -> Iterator[Threads]:
    """Yield ``count`` threads (None: as many as PyTorch uses) in which PyTorch's own work is done by the thread that
    calls it; so it is in the calling thread while in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Threads(pool, count or before)
    finally:
        torch.set_num_threads(before)
