"""The publisher: trades, analytics and dead letters into the topics of Kafka that ``market.topics`` describes.

The way of a record: encoded when it is taken -> ``Backlog`` -> ``Producer`` -> acknowledged by all replicas. One round
is under way at a time; the next is filled meanwhile. While the broker does not answer, the backlog fills; when it is
full, and every ``spool_after`` seconds, all of it goes to the spool (``Overflow``). While anything is in the spool,
records come from there, and what is newer queues behind it: a symbol is in the order of ``trades()``.

Promised by ``Publisher``
- accepted + recovered == published + held + spooled + dropped + lost, at every moment; ``dropped`` is analytics (the
  oldest go first, beyond their bound), or what a stop without a spool left over, or a dead letter that the broker
  refuses; the latter two are logged.
- Trades and dead letters wait (``trades()`` and ``dead()`` block their callers) before one of them is dropped.
- While the process lives, a broker that freezes, goes or restarts with its data gets each record once.
- What cannot be written as JSON, is too large, or is refused by the broker for its own sake becomes a dead letter. Dead
  letters are cut to what a record may hold.
- What is in the spool survives ``kill -9``, and is published first by the next life.

Not promised
- Once only, across lives: what was under way when the process was killed, or stopped without an answer, is in the spool
  and may be in Kafka as well. A reader knows a trade by exchange, symbol and trade_id.
- That what is in memory survives ``kill -9``: ``linger`` and a round trip of a broker that is well, else
  ``spool_after``.
- That a partition whose leader is away does not hold up the others of its topic. Trades and analytics have a producer
  each, and do not hold up one another.

All is for one event loop; there is no lock. Encoding and compression run in it, a few milliseconds in one go; the
spool's files have a thread, and what is read from them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from coordination import Clock, Rng, cancel_all, stats_repr
from market.backlog import FLIGHT, Backlog, Counts, LatestRows
from market.overflow import Overflow
from market.producer import AT_ONCE, Producer
from market.topics import (
    ANALYTICS,
    DEAD_LETTERS,
    HEADERS,
    LARGEST_RECORD,
    TRADES,
    DeadLetter,
    Item,
    LetterKind,
    Record,
    client_log,
    log,
    record_of,
    unpublishable_record,
)
from market.trade import Trade
from runtime.spool import Spool

ROWS = 2500
"""Rows of analytics that are under way together, at most."""
LARGEST_CONTEXT = 20_000
"""Characters."""
ASK_AGAIN = 1.0
"""Seconds after which a disk that refused is asked again."""


class PublisherClosed(RuntimeError):
    """The publisher takes nothing any more."""


class PublisherStats(NamedTuple):
    state: Literal["new", "connecting", "connected", "away", "failed", "closed"]
    trades: Counts
    """Dead letters included."""
    analytics: Counts
    dead: int
    """Records of the topic of dead letters, as published."""
    connects: int
    error: str
    """The last one."""


async def _finish(task: asyncio.Task[None]) -> None:
    """Wait until it is over, also if that is cancelled, and then end cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


class Publisher:
    """Publishes to ``brokers`` (``host:port``, several with commas) until ``stop``.

    ``buffer``: trades and dead letters that may wait in memory; as many rows of analytics as ``analytics_buffer``.
    ``spool``: a folder for more, of at most ``spool_bytes``; None: the callers wait. ``linger``: seconds that a round
    may wait for more. ``request_timeout``: seconds after which a request is sent again. ``security``: more
    options of aiokafka's clients (TLS, SASL).
    """

    def __init__(
        self,
        brokers: str,
        *,
        prefix: str = "",
        partitions: int = 6,
        replication: int = 1,
        buffer: int = 100_000,
        analytics_buffer: int = 20_000,
        spool: Path | None = None,
        spool_bytes: int = 1 << 30,
        spool_after: float = 5.0,
        linger: float = 0.02,
        compression: Literal["zstd", "lz4", "snappy", "gzip"] | None = "zstd",
        request_timeout: float = 10.0,
        security: Mapping[str, Any] | None = None,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        self.topics = {name: prefix + name for name in (TRADES, ANALYTICS, DEAD_LETTERS)}
        self._trades_topic, self._analytics_topic, self._dead_topic = self.topics.values()

        def producer(*topics: str) -> Producer:
            return Producer(
                brokers,
                dict.fromkeys(topics, partitions),
                replication=replication,
                compression=compression,
                request_timeout=request_timeout,
                security=security or {},
                rng=rng,
            )

        self._producer = producer(self._trades_topic, self._dead_topic)
        self._analytics_producer = producer(self._analytics_topic)
        self._linger, self._spool_after = linger, spool_after
        self._backlog, self._rows = Backlog(buffer), LatestRows(analytics_buffer)
        self._overflow: Overflow | None = None
        if spool is not None:
            files = Spool(spool, max_bytes=spool_bytes, clock=clock)
            self._overflow = Overflow(self._backlog, files, (self._trades_topic, self._dead_topic), self._pulse)
        self._state = "new"
        self._failed = False
        """``open``, ``stopping``, ``closed``."""
        self._tasks: list[asyncio.Task[None]] = []

        self._away = False
        self._dead = 0

        self._wake, self._rows_wake, self._pressed, self._enough = (asyncio.Event() for _ in range(4))
        self._ending: asyncio.Task[Any]
        """Waits for ``_enough``."""
        self._changed = asyncio.Event()
        """Set and replaced when anything was published or moved."""
        self._turn = asyncio.Lock()
        """Who waits for room waits in a queue."""

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def start(self) -> None:
        """Begin; the broker need not be there. Raises ``SpoolInUse``, ``OSError``."""
        if self._overflow is not None:
            self._backlog.recover(await asyncio.to_thread(self._overflow.spool.open))
        self._state = "open"
        client_log.attach()
        self._ending = asyncio.create_task(self._enough.wait())
        self._tasks = [asyncio.create_task(main) for main in (self._pump(), self._pump_analytics())]
        if self._overflow is not None:
            self._tasks.append(asyncio.create_task(self._spill_when_pressed(self._overflow)))
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A mistake in this file is loud: nothing is taken any more, nobody waits for ever. ``stop`` raises it."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.critical("kafka: the publisher failed", exc_info=error)
            self._failed = True
            self._enough.set()
            self._pulse()

    def offer(self, trades: Sequence[Trade]) -> bool:
        """Take the trades if there is room for all of them, and nobody waits for room."""
        if self._failed or self._state not in ("new", "open"):
            raise PublisherClosed("the publisher is stopped")
        backlog = self._backlog
        if len(backlog.waiting) + len(trades) > backlog.limit or len(trades) > AT_ONCE or self._turn.locked():
            return False
        backlog.accept(self._records(trades))
        self._wake.set()
        return True

    async def trades(self, trades: Sequence[Trade]) -> None:
        """Take the trades; waits while there is no room. Cancelled or closed, it may have taken some of them."""
        if not self.offer(trades):
            await self._take(trades)

    async def dead(
        self,
        exchange: str,
        error: str,
        raw: bytes | str,
        when_ns: int,
        kind: LetterKind | None = None,
        context: str = "",
    ) -> None:
        """Take a frame that cannot be parsed; waits while there is no room."""
        if isinstance(raw, str):
            raw, kind = raw.encode("utf-8", "surrogatepass"), kind or "text"
        if len(raw) > LARGEST_RECORD:
            error, raw = f"{error[:400]} (cut: it had {len(raw)} bytes)", raw[:LARGEST_RECORD]
        context = context if len(context) <= LARGEST_CONTEXT else ""
        await self._take([DeadLetter(exchange, error, bytes(raw), when_ns, kind or "binary", context)])

    def _records(self, items: Sequence[Item]) -> list[Record]:
        return [record_of(item, self._trades_topic, self._dead_topic) for item in items]

    async def _take(self, items: Sequence[Item]) -> None:
        async with self._turn:
            done = 0
            while done < len(items):
                if self._failed or self._state not in ("new", "open"):
                    raise PublisherClosed("the publisher is stopped")
                part = items[done : done + min(AT_ONCE, self._backlog.room())]
                if part:
                    self._backlog.accept(self._records(part))
                    done += len(part)
                    self._wake.set()
                    if done < len(items):
                        await asyncio.sleep(0)
                else:
                    self._pressed.set()
                    await self._changed.wait()

    def analytics(self, rows: Iterable[Any]) -> None:
        """Take rows (mappings or named tuples with ``symbol``); the oldest that wait make room, and are counted.

        Raises ``TypeError`` or ``ValueError`` for what cannot be written as JSON.
        """
        if self._failed or self._state not in ("new", "open"):
            raise PublisherClosed("the publisher is stopped")
        at = time.time_ns() // 1_000_000
        for row in rows:
            fields = row if isinstance(row, Mapping) else row._asdict()
            key, value = fields["symbol"].encode(), orjson.dumps(fields)
            self._rows.accept(Record(self._analytics_topic, key, value, at, HEADERS))
        self._rows_wake.set()

    async def flush(self) -> None:
        """Return when nothing waits: all is acknowledged (analytics: or dropped). Raises if that will never be."""
        while not (self._backlog.is_empty() and self._rows.is_empty()):
            if self._failed or self._state == "closed":
                raise PublisherClosed("the publisher is stopped")
            await self._changed.wait()

    async def stop(self, limit: float = 10.0) -> int:
        """Take nothing more, publish what waits for ``limit`` seconds at the most, spool the rest.

        Returns how many trades and dead letters are neither published nor spooled: none, if there is a spool that takes
        them. Cancelled, it stops at once.
        """
        if self._state == "new":
            self._state = "closed"
            self._backlog.drop()
        if self._state != "open":
            return self._backlog.dropped
        self._state = "stopping"
        for event in (self._wake, self._rows_wake):
            event.set()
        self._pulse()
        pumps = self._tasks[:2]
        try:
            await asyncio.wait(pumps, timeout=limit)
        finally:
            self._enough.set()
            await _finish(asyncio.create_task(self._close(pumps)))
        return self._backlog.dropped

    async def _close(self, pumps: Sequence[asyncio.Task[None]]) -> None:
        results = await asyncio.gather(*pumps, return_exceptions=True)
        await self._ending
        overflow, backlog = self._overflow, self._backlog
        for task in self._tasks[2:]:
            while overflow is not None and overflow.spilling:
                await self._changed.wait()
            await cancel_all([task])
        if overflow is not None and (backlog.waiting or (backlog.under_way and not backlog.files)):
            await overflow.spill()
        await asyncio.gather(self._producer.drop(), self._analytics_producer.drop())
        if left := backlog.drop():
            log.error("kafka: %d trades and dead letters could be neither published nor spooled", left)
        self._rows.drop()
        if overflow is not None:
            await overflow.spool.close()
        self._state = "closed"
        client_log.detach()
        self._pulse()
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -------------------------------------------------------------------------------------------------------- the pumps

    async def _pump(self) -> None:
        lingered, backlog, overflow = False, self._backlog, self._overflow
        while not self._enough.is_set():
            if overflow is not None and overflow.spilling:
                await self._changed.wait()
            elif overflow is not None and backlog.spooled:
                await self._replay(overflow)
            elif backlog.waiting and (lingered or self._state == "stopping" or len(backlog.waiting) >= FLIGHT):
                lingered = False
                await self._next_round()
            elif backlog.waiting:
                lingered = True
                await asyncio.sleep(self._linger)
            elif self._state == "stopping":
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _next_round(self) -> None:
        self._backlog.send(self._backlog.take(FLIGHT))
        self._pulse()
        if await self._publish() and (files := self._landed()):
            assert self._overflow is not None
            await self._overflow.spool.remove(files)

    async def _replay(self, overflow: Overflow) -> None:
        """The spool, file by file, the oldest first. The next ones are read while those before are under way."""
        reading = asyncio.create_task(overflow.read(FLIGHT, 0))
        removing: asyncio.Task[None] | None = None
        try:
            while found := await reading:
                self._backlog.send([record for _, records in found for record in records], [name for name, _ in found])
                reading = asyncio.create_task(overflow.read(FLIGHT, len(found)))
                if not await self._publish():
                    return
                if removing is not None:
                    await removing
                removing = asyncio.create_task(overflow.spool.remove(self._landed()))
        except OSError as error:  # neither files nor memory left: that passes
            log.warning("kafka: the spool cannot be read: %s", error)
            await asyncio.wait({self._ending}, timeout=ASK_AGAIN)
        finally:
            await cancel_all([reading])
            if removing is not None:
                await removing

    def _landed(self) -> list[str]:
        files = self._backlog.landed()
        self._pulse()
        return files

    async def _publish(self) -> bool:
        """Publish what is under way; False if it was enough before that was done."""
        task = asyncio.create_task(self._publish_all(list(self._backlog.under_way)))
        if await self._done(task, self._stalled):
            self._away = False
            client_log.recovered()
            return True
        return False

    async def _publish_all(self, records: list[Record]) -> None:
        self._backlog.unwanted = 0
        while records:
            refused = await self._producer.publish(records)
            self._dead += sum(record.topic is self._dead_topic for record in records)
            records = []
            for record, error in refused:
                if record.topic == self._dead_topic:
                    self._dead -= 1
                    self._backlog.unwanted += 1
                    log.error("kafka: a dead letter was refused: %s: %.200r", error, record.value)
                else:
                    records.append(unpublishable_record(record.value, error, self._dead_topic))

    def _stalled(self) -> None:
        self._away = True
        self._pressed.set()

    async def _done(self, task: asyncio.Task[None], late: Callable[[], None]) -> bool:
        """Wait for ``task``, tell ``late`` every ``spool_after`` seconds; cancel it when it is enough: then False."""
        both = {task, self._ending}
        try:
            while not task.done() and not self._enough.is_set():
                await asyncio.wait(both, timeout=self._spool_after, return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    late()
        finally:
            if not task.done():
                await cancel_all([task])
        if task.cancelled():
            return False
        task.result()
        return True

    async def _pump_analytics(self) -> None:
        while not self._enough.is_set():
            if not self._rows.waiting:
                if self._state == "stopping":
                    return
                self._rows_wake.clear()
                await self._rows_wake.wait()
                await asyncio.sleep(0 if self._state == "stopping" else self._linger)
                continue
            task = asyncio.create_task(self._publish_rows(self._rows.send(ROWS)))
            if await self._done(task, lambda: None):
                self._rows.landed()
            self._pulse()

    async def _publish_rows(self, rows: list[Record]) -> None:
        for row, error in await self._analytics_producer.publish(rows):
            self._rows.refused()
            log.error("kafka: analytics were refused: %s: %.200r", error, row.value)

    async def _spill_when_pressed(self, overflow: Overflow) -> None:
        while True:
            await self._pressed.wait()
            self._pressed.clear()
            if not await overflow.spill():
                await asyncio.sleep(ASK_AGAIN)  # no room, or the disk refuses: those who wait go on waiting
                self._pulse()

    def stats(self) -> PublisherStats:
        producer = self._producer
        state: Any = self._state
        if state in ("open", "stopping"):
            connected = "connected" if producer.connected else "connecting"
            state = "failed" if self._failed else "away" if self._away else connected
        counts = self._backlog.counts(), self._rows.counts()
        return PublisherStats(state, *counts, self._dead, producer.connects, producer.error)

    __repr__ = stats_repr
