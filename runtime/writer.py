"""Rows on their way to PostgreSQL in batches: whoever has one to keep never waits.

Promised by ``Writer``
- ``offer`` returns at once. What finds the queue full is counted as lost, and nothing else is.
- A row that was taken is written once, however often the connection breaks in the middle of a batch: it is sent again
  until the database has said yes, and its key makes the second time do nothing.
- A row that the database does not take (a text with a NUL, say) costs its batch nothing; it is counted as refused.
- A batch that takes longer than the server or the pool allows is halved.

Not promised: that what is still in the queue survives ``kill -9``. All in the event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from coordination import Clock, Rng, cancel_all, stats_repr, wait_for_event
from primitives import Backoff, Batch
from runtime.postgres import BACK_OFF, Database, TooSlow, halves, is_a_rows_fault, is_away, log

if TYPE_CHECKING:
    from runtime.postgres import PooledConnection

R = TypeVar("R")


class WriterStats(NamedTuple):
    """Rows and batches of a ``Writer``."""

    queued: int
    written: int
    lost: int  # rows that came while the queue was full, or were in it when it was closed
    refused: int  # rows that the database does not take
    batches: int


class Writer(Generic[R]):
    """Hands rows to ``insert`` in batches of ``max_items``, or when the oldest has waited ``max_age`` seconds.

    ``insert(connection, rows)`` may be called again with the same rows, and must then do nothing to those it has
    written. At most ``capacity`` rows of at most ``max_bytes`` in sum wait. A batch has at most ``portion`` bytes, or
    one row, for encoding it holds the event loop.
    """

    def __init__(
        self,
        database: Database,
        insert: Callable[[PooledConnection, Sequence[R]], Awaitable[object]],
        *,
        capacity: int = 10_000,
        max_bytes: int = 64_000_000,
        max_items: int = 500,
        max_age: float = 0.25,
        portion: int = 2_000_000,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        self._database, self._insert, self._backoff = database, insert, Backoff(*BACK_OFF, rng)
        self.capacity, self.max_bytes = capacity, max_bytes
        self._batch: Batch[tuple[R, int]] = Batch(max_items, max_age, portion, clock=clock)
        self._full: deque[list[tuple[R, int]]] = deque()
        self._queued = self._bytes = self._written = self._lost = self._refused = self._batches = 0
        self._wake = asyncio.Event()
        self._closing = False

    def offer(self, row: R, size: int = 0) -> bool:
        """Take ``row``, of ``size`` bytes; False, and one more lost, if there is no room for it."""
        if self._closing or self._queued >= self.capacity or self._bytes + size > self.max_bytes:
            self._lost += 1
            return False
        self._queued += 1
        self._bytes += size
        full = self._batch.add((row, size), size=size)
        if full is not None:
            self._full.append(full)
        if full is not None or len(self._batch) == 1:
            self._wake.set()
        return True

    async def run(self) -> None:
        """Write until ``close``. Cancelled, it leaves what is not written in the queue, for ``close`` to count."""
        while True:
            self._wake.clear()
            items = self._full.popleft() if self._full else self._batch.drain() if self._closing else self._batch.take()
            if items:
                await self._store(items)
            elif self._closing:
                return
            else:
                await wait_for_event(self._wake, self._batch.due_in())

    async def _store(self, items: Sequence[tuple[R, int]]) -> None:
        """Write ``items``, however long that takes; halve what is refused until the row is found whose fault it is."""
        rows = [row for row, _ in items]
        while True:
            try:
                async with self._database.connection() as connection:
                    await self._insert(connection, rows)
            except Exception as error:  # what is nobody's fault, such as a full disk, may pass
                slow, refused = isinstance(error, TooSlow), is_a_rows_fault(error)
                if len(items) > 1 and (slow or refused):
                    if slow:
                        log.warning("%s: %d rows are halved", error, len(items))
                        await self._database.ready()
                    for half in halves(items):
                        await self._store(half)
                    return
                if not refused:
                    if slow or not is_away(error):
                        self._database.stored(error)
                    await asyncio.sleep(self._backoff.next())
                    await self._database.ready()
                    continue
                self._refused += 1
                log.warning("database: a row was refused: %s", type(error).__name__)
            else:
                self._database.stored()
                self._written += len(items)
                self._batches += 1
            self._backoff.reset()
            self._queued -= len(items)
            self._bytes -= sum(size for _, size in items)
            return

    async def close(self, task: asyncio.Task[None], timeout: float = 2.0) -> int:
        """End ``task`` (of ``run``) when all is written, or after ``timeout`` seconds. How many rows were lost.

        What was under way then counts as lost; the database may have it nevertheless.
        """
        self._closing = True
        self._wake.set()
        try:
            await asyncio.wait([task], timeout=timeout)
        finally:
            await cancel_all([task])
        self._lost += self._queued
        lost, self._queued, self._bytes = self._queued, 0, 0
        return lost

    def stats(self) -> WriterStats:
        """Counts since the start."""
        return WriterStats(self._queued, self._written, self._lost, self._refused, self._batches)

    __repr__ = stats_repr
