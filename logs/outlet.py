"""The way of a sealed batch: a writer and PostgreSQL; or, the database being away, the spool, and back from there.

sealed -> ``write`` -> PostgreSQL; sealed -> ``to_spool`` -> ``put_into_spool`` -> the spool -> ``replay`` -> the
same ``Store``.

Promised: a batch is in one place at every moment, and what becomes of it is counted here, in events. It keeps its id,
in the spool too: one whose commit was not seen is stored once. At most ``SEALED`` batches and ``SEALED_BYTES`` wait in
memory; then ``may_be_sealed`` says no, and the queue before it fills.

Everything is in the event loop but the files of the spool, which are in threads; there is no lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from coordination import Clock, Rng, wait_for_event
from logs.options import IngestOptions
from logs.store import BatchOutcome, Store
from primitives import Backoff
from runtime.postgres import Database
from runtime.spool import EncodedBatch, Spool

log = logging.getLogger("ingest")

TOGETHER, TOGETHER_BYTES = 16, 16_000_000
"""Batches, and bytes of them, in one transaction, when so many wait."""
SEALED, SEALED_BYTES = 64, 64_000_000
"""Batches, and bytes of them, that may wait in memory to be written or spooled."""
PATIENCE = 5.0
"""Seconds from the start for which batches wait for the first connection, and are not spooled yet."""
DISTRUST = 1.0
"""Seconds for which a database that is there, but could not write, is not asked again."""
BACK_OFF = 0.1, 5.0
"""How long to wait before the spool is replayed again after a failure."""


def rows_in(batches: Sequence[EncodedBatch] | deque[EncodedBatch]) -> int:
    return sum(batch.rows for batch in batches)


class Outlet:
    """Sealed batches, on their way to ``store`` or the first of ``spools``; the other ones are emptied only.

    ``over``: whether the queue before it is too full. ``sealing_bytes``: of batches that wait to be sealed. ``room`` is
    set when a batch less waits in memory, ``moved`` when any went on; ``forced`` says that the end is near.
    """

    def __init__(
        self,
        options: IngestOptions,
        database: Database,
        store: Store,
        spools: Sequence[Spool],
        *,
        over: Callable[[], bool],
        sealing_bytes: Callable[[], int],
        room: asyncio.Event,
        moved: asyncio.Event,
        forced: asyncio.Event,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
        rng: Rng = random.random,
    ) -> None:
        self._options, self._database, self._store, self.spools = options, database, store, spools
        self._over, self._sealing_bytes = over, sealing_bytes
        self._room, self._moved, self._forced = room, moved, forced
        self._clock, self._wall, self._rng = clock, wall, rng
        self.sealed: deque[EncodedBatch] = deque()
        self.writing = 0
        self.to_spool: deque[EncodedBatch] = deque()
        """The first one is being put there."""
        self.spooled_rows = 0
        """What this worker put into the spools, or found there, and did not remove: their own counts move earlier."""
        self.stored = self.dead = self.missing = 0
        self.dropped: Counter[str] = Counter()
        self.lags: deque[float] = deque([0.0], maxlen=100)
        """Seconds from the receipt of a batch's oldest event to its commit."""
        self.full = self.stopping = False
        """``full``: the spool took no more when it was asked last."""
        self.begun = self._distrust = -math.inf
        self._trouble = ""
        self._work, self._spoolable, self.spooled = (asyncio.Event() for _ in range(3))

    def in_memory(self) -> int:
        """Events."""
        return rows_in(self.sealed) + self.writing + rows_in(self.to_spool)

    def is_empty(self) -> bool:
        """Whether nothing is in memory, nor in a spool while there is a database."""
        if self.in_memory():
            return False
        return self._database.state != "connected" or not any(each.stats().batches for each in self.spools)

    def drop(self, cause: str) -> None:
        """What is in memory, at the end."""
        self.dropped[cause] += rows_in(self.to_spool) + rows_in(self.sealed)
        self.to_spool.clear()
        self.sealed.clear()

    def may_be_sealed(self) -> bool:
        """Whether there is room in memory for another batch."""
        size = self._sealing_bytes() + sum(len(each.data) for each in (*self.sealed, *self.to_spool))
        return len(self.sealed) + len(self.to_spool) < SEALED and size < SEALED_BYTES

    def may_be_spooled(self) -> bool:
        """Whether another batch may wait for the spool."""
        return len(self.to_spool) < SEALED

    async def first_connection(self) -> bool:
        """Whether there is a database before the start's patience is over."""
        return await self._database.ready(PATIENCE)

    def hand_on(self, batch: EncodedBatch) -> None:
        """Take a sealed batch: for a writer, or for the spool."""
        overflows = self._options.overload == "spool" and (self._over() or not self.may_be_sealed())
        if self._options.durable or overflows or self.diverts():
            self.to_spool.append(batch)
            self._spoolable.set()
        else:
            self.sealed.append(batch)
            self._work.set()

    def diverts(self) -> bool:
        """Whether the database is not to be asked now."""
        now = self._clock()
        if self._database.state == "connected":
            return now < self._distrust
        return self.stopping or now >= self.begun + PATIENCE

    async def write(self) -> None:
        """A writer: takes all that waits, up to a bound, in one transaction."""
        while True:
            if not self.sealed:
                self._work.clear()
                await self._work.wait()
                continue
            if self.diverts():
                self.divert()
                continue
            if self._database.state != "connected":
                await self._database.ready(0.1)
                continue
            batches, size = list[EncodedBatch](), 0
            while self.sealed and len(batches) < TOGETHER and size < TOGETHER_BYTES:
                batches.append(self.sealed.popleft())
                size += len(batches[-1].data)
            rows = rows_in(batches)
            self.writing += rows
            try:
                outcomes = await self._store.write(batches)
            except BaseException as error:  # cancelled, too: whether it was committed is found out by the id
                self.writing -= rows
                self.to_spool.extend(batches)
                self._spoolable.set()
                if not isinstance(error, Exception):
                    raise
                self._away(error)
            else:
                self.writing -= rows
                self._count(batches, outcomes)
            self._moved.set()

    def divert(self) -> None:
        """What was to be written goes to the spool."""
        self.to_spool.extend(self.sealed)
        self.sealed.clear()
        self._spoolable.set()

    def _count(self, batches: Sequence[EncodedBatch], outcomes: Sequence[BatchOutcome]) -> None:
        now = self._wall()
        for batch, outcome in zip(batches, outcomes, strict=True):
            self.stored += outcome.stored
            self.dead += outcome.dead
            self.missing += batch.data.count(b"\tmissing\n")
            self.lags.append(max(0.0, now - batch.received_at))
        if self._trouble:
            log.warning("database: batches are stored again")
            self._trouble = ""
        self._room.set()

    def _away(self, error: Exception) -> None:
        """Batches could not be stored."""
        if self._database.state == "connected":
            self._distrust = self._clock() + DISTRUST
        trouble = f"{type(error).__name__}: {error}"
        if trouble != self._trouble:
            log.warning("database: batches go to the spool: %s", trouble)
            self._trouble = trouble

    async def put_into_spool(self) -> None:
        """The spooler: what is to go to the spool, in order. Not to be cancelled in the middle of it."""
        while True:
            if not self.to_spool:
                self._spoolable.clear()
                self._moved.set()
                await self._spoolable.wait()
                continue
            batch = self.to_spool[0]
            if await self.spools[0].put(batch):
                self.to_spool.popleft()
                self.spooled_rows += batch.rows
                self._room.set()
                self.spooled.set()
                self.full = False
                continue
            if not self.full:
                log.error("spool: no room, or it cannot be written: batches wait in memory")
                self.full = True
                self._moved.set()
            if self._database.state == "connected":  # without the detour then
                self.sealed.extend(self.to_spool)
                self.to_spool.clear()
                self._work.set()
            await wait_for_event(self._forced, 0.2)

    async def replay(self) -> None:
        """Store what is in the spools, in their order, whenever there is a database."""
        backoff = Backoff(*BACK_OFF, self._rng)
        while True:
            spool = next((each for each in self.spools[::-1] if each.stats().batches), None)
            if spool is None:
                self.spooled.clear()
                self._moved.set()
                await self.spooled.wait()
                continue
            if not await self._database.ready(1.0):
                self._moved.set()
                continue
            lost = spool.stats().lost
            try:
                found = await spool.first(TOGETHER)
            finally:  # it may fail, or be cancelled, after it has set some aside
                if lost := spool.stats().lost - lost:
                    self.spooled_rows -= lost
                    self.dropped["spool unreadable"] += lost
            batches = [batch for _, batch in found]
            try:
                outcomes = await self._store.write(batches)
            except Exception as error:
                self._away(error)
                self._moved.set()
                await asyncio.sleep(backoff.next())
                continue
            self.spooled_rows -= rows_in(batches)
            self._count(batches, outcomes)
            backoff.reset()
            await spool.remove([name for name, _ in found])  # which may be cancelled in the middle
            self._moved.set()
