"""The publisher: trades, events, analytics and dead letters into the topics of Kafka that ``market.topics`` describes.

The way of a record: encoded when it is taken -> ``Outlet`` -> a sink here -> ``Producer`` -> acknowledged by all
replicas. One round is under way at a time; the next is filled meanwhile. While the broker does not answer, the backlog
fills; when it is full, and every ``spool_after`` seconds, all of it goes to the spool. While anything is in the spool,
records come from there, and what is newer queues behind it: a symbol is in the order of ``trades()``.

Promised by ``Publisher``
- offered == accepted + waiting + given up, and the equation of ``Counts``, at every moment; ``dropped`` is analytics
  (the oldest, beyond their bound), or, logged, what a stop without a spool left over, and refused dead letters.
- Trades, events and dead letters wait (``trades()`` and the like block their callers) before one of them is dropped.
- While the process lives, a broker that freezes, goes or restarts with its data gets each record once.
- What cannot be written as JSON, is too large, or is refused by the broker for its own sake becomes a dead letter.
- What is in the spool survives ``kill -9``, and is published first by the next life.

Not promised
- Once only, across lives: what was under way when the process was killed, or stopped without an answer, is in the spool
  and may be in Kafka as well. A reader knows a trade by exchange, symbol and trade_id.
- That what is in memory survives ``kill -9``: ``linger`` and a round trip of a broker that is well, else
  ``spool_after``.
- That a partition whose leader is away does not hold up the others of its topic.

All is for one event loop; there is no lock. Encoding and compression run in it, a few milliseconds in one go; the
spool's files have a thread, and what is read from them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import orjson

from coordination import cancel_all, stats_repr
from market.producer import AT_ONCE, FLIGHT, FLIGHT_BYTES, Producer
from market.topics import (
    ANALYTICS,
    DEAD_LETTERS,
    EVENTS,
    HEADERS,
    TRADES,
    DeadLetter,
    Item,
    MarketEvent,
    Record,
    client_log,
    line_of_record,
    log,
    record_of,
    records_of,
    unpublishable,
)
from market.trade import Trade
from runtime.backlog import Backlog
from runtime.loop import TaskSupervisor, ends_before
from runtime.outlet import Changes, Outlet
from runtime.spool import EncodedBatch, Spool

ROWS, FILE = 2500, 2500  # rows of analytics that are under way together, and records of a file of the spool, at most
HEAVY, EACH = 64_000_000, 640
"""Bytes of records that may wait, or so many for each, if that is more: raw frames may be large, trades are not."""
ASK_AGAIN = 1.0  # seconds after which a disk that refused is asked again
SAVE_LIMIT = 20.0  # seconds that what is left at the end has to get into the spool


class PublisherClosed(RuntimeError):
    """The publisher takes nothing any more."""


class Counts(NamedTuple):
    """accepted + recovered == published + held + spooled + dropped + lost."""

    accepted: int
    recovered: int  # left in the spool by a previous life
    published: int  # acknowledged
    held: int  # in memory, on its way included
    spooled: int
    dropped: int
    lost: int  # the disk did not give back what it had taken


def counts_of(backlog: Backlog[Record]) -> Counts:
    """The counts of ``backlog`` now."""
    dropped = backlog.refused + backlog.dropped.total()
    return Counts(
        *(backlog.accepted, backlog.recovered, backlog.stored, backlog.held(), backlog.spooled, dropped, backlog.lost)
    )


class PublisherStats(NamedTuple):
    """Where it stands, and what became of its records."""

    state: Literal["new", "connecting", "connected", "away", "closed"]
    trades: Counts  # dead letters included
    analytics: Counts
    dead: int  # records of the topic of dead letters, as published
    connects: int
    error: str  # the last one
    waiting: int  # trades and dead letters whose callers wait for room
    given_up: int  # those that were not taken before the end


class RowSink:
    """Analytics: what the broker refuses is logged."""

    def __init__(self, producer: Producer, topic: str, dead_letters: str, *events: str) -> None:
        self.producer, self._topics, self._dead_topic = producer, (topic, dead_letters, *events), dead_letters

    async def write(self, items: list[Record]) -> tuple[int, int]:
        """Published and refused, when all is acknowledged."""
        refused = await self.producer.publish(items)
        for row, error in refused:
            log.error("kafka: analytics were refused: %s: %.200r", error, row.value)
        return len(items) - len(refused), len(refused)

    async def ready(self, _: float) -> bool:
        """It waits for the broker itself."""
        return True

    def diverts(self) -> bool:
        """Never: the spool gets what has no room."""
        return False

    def encode(self, items: Sequence[Record]) -> EncodedBatch:
        """Lines as ``market.topics`` writes them: any later life can publish them."""
        data = b"".join(line_of_record(record) + b"\n" for record in items)
        return EncodedBatch(uuid4(), len(items), time.time(), data)

    def decode(self, batch: EncodedBatch) -> list[Record]:
        """The records of a batch of the spool."""
        return records_of(batch.data, *self._topics)


class TradeSink(RowSink):
    """Trades and dead letters: a trade that the broker refuses becomes a dead letter."""

    dead = 0  # records of the topic of dead letters, as published

    async def write(self, items: list[Record]) -> tuple[int, int]:
        """Publish them; how many trades and dead letters Kafka refused for good."""
        unwanted, records = 0, list(items)
        while records:
            refused = await self.producer.publish(records)
            self.dead += sum(record.topic is self._dead_topic for record in records)
            records = []
            for record, error in refused:
                if record.topic == self._dead_topic:
                    self.dead -= 1
                    unwanted += 1
                    log.error("kafka: a dead letter was refused: %s: %.200r", error, record.value)
                else:
                    records.append(unpublishable(record.value, error, self._dead_topic))
        client_log.recovered()
        return len(items) - unwanted, unwanted


async def _finished(task: asyncio.Task[None]) -> None:
    """Wait until it is over; if that is cancelled, end cancelled after it."""
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        raise


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
    ) -> None:
        self.topics = {name: prefix + name for name in (TRADES, ANALYTICS, DEAD_LETTERS, EVENTS)}
        self._trades_topic, self._analytics_topic, self._dead_topic, self._events_topic = self.topics.values()

        def producer(*topics: str) -> Producer:
            return Producer(
                brokers,
                dict.fromkeys(topics, partitions),
                replication=replication,
                compression=compression,
                request_timeout=request_timeout,
                security=security or {},
            )

        self.changes = Changes()
        topics = self._trades_topic, self._dead_topic, self._events_topic
        self._sink = TradeSink(producer(*topics), *topics)
        self._row_sink = RowSink(producer(self._analytics_topic), self._analytics_topic, self._dead_topic)
        common: dict[str, Any] = {"log": log, "changes": self.changes, "linger": linger}
        self._trades = Outlet(
            Backlog[Record](
                buffer,
                max(HEAVY, EACH * buffer),
                size=lambda record: len(record.value),
                round_items=FLIGHT,
                round_bytes=FLIGHT_BYTES,
                file_items=FILE,
                in_order=True,
            ),
            self._sink,
            [] if spool is None else [Spool(spool, max_bytes=spool_bytes)],
            replay_files=max(1, FLIGHT // FILE),
            stalls_after=spool_after,
            ask_again=ASK_AGAIN,
            **common,
        )
        self._rows = Outlet(
            Backlog[Record](analytics_buffer, size=lambda record: len(record.value), round_items=ROWS, newest=True),
            self._row_sink,
            **common,
        )
        self._state: Literal["new", "open", "stopping", "closed"] = "new"
        self.tasks = TaskSupervisor(log)
        self._turn = asyncio.Lock()  # who waits for room waits in a queue
        self._waiting = self._given_up = 0

    # ------------------------------------------------------------------------------------------------------------ verbs

    async def start(self) -> None:
        """Begin; the broker need not be there. Raises ``SpoolInUse``, ``OSError``."""
        await self._trades.open()
        self._state = "open"
        for name, outlet in (("trades", self._trades), ("analytics", self._rows)):
            for task, work in outlet.tasks().items():
                self.tasks.start(f"{name}: {task}", work)

    async def connect(self) -> None:
        """Return when Kafka is there. So its absence is seen before there is anything to publish."""
        await self._sink.producer.connect()

    def _is_closed(self) -> bool:
        return self._state not in ("new", "open")

    def offer(self, trades: Sequence[Trade]) -> bool:
        """Take the trades if there is room for all of them, and nobody waits for room."""
        if self._is_closed():
            self._given_up += len(trades)
            raise PublisherClosed("the publisher is stopped")
        count = len(trades)
        if count > AT_ONCE or count > self._trades.backlog.room(moves=True) or self._turn.locked():
            return False
        self._trades.put(self._records(trades))
        return True

    async def trades(self, trades: Sequence[Trade]) -> None:
        """Take the trades; waits while there is no room. Cancelled or closed, it may have taken some of them."""
        if not self.offer(trades):
            await self._take(trades)

    async def dead(self, letter: DeadLetter) -> None:
        """Take a frame that cannot be parsed; waits while there is no room."""
        await self._take([letter])

    async def event(self, event: MarketEvent) -> None:
        """Take an event; waits while there is no room."""
        await self._take([event])

    def _records(self, items: Sequence[Item]) -> list[Record]:
        topics = self._trades_topic, self._dead_topic, self._events_topic
        return [record_of(item, *topics) for item in items]

    async def _take(self, items: Sequence[Item]) -> None:
        left = len(items)
        self._waiting += left
        try:
            async with self._turn:
                while left:
                    if self._is_closed():
                        raise PublisherClosed("the publisher is stopped")
                    part = items[len(items) - left :][: min(AT_ONCE, self._trades.backlog.room())]
                    if part:
                        self._trades.put(self._records(part))
                        left -= len(part)
                        self._waiting -= len(part)
                        if left:
                            await asyncio.sleep(0)
                    else:
                        self._trades.press()
                        await self.changes.wait()
        finally:
            self._waiting -= left
            self._given_up += left

    def analytics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows (with ``symbol``); the oldest that wait make room, and are counted."""
        if self._is_closed():
            raise PublisherClosed("the publisher is stopped")
        at, topic = time.time_ns() // 1_000_000, self._analytics_topic
        self._rows.put([Record(topic, row["symbol"].encode(), orjson.dumps(row), at, HEADERS) for row in rows])

    def _is_empty(self) -> bool:
        return self._trades.backlog.is_empty() and self._rows.backlog.is_empty()

    async def flush(self) -> None:
        """Return when nothing waits: all is acknowledged (analytics: or dropped). Raises if that will never be."""
        await self.changes.until(lambda: self._is_empty() or self._state == "closed")
        if not self._is_empty():
            raise PublisherClosed("the publisher is stopped")

    async def stop(self, limit: float = 10.0, forced: asyncio.Event | None = None) -> int:
        """Take nothing more, publish what waits for ``limit`` seconds at the most, or until ``forced``; spool the rest.

        Returns how many trades and dead letters are neither published nor spooled: none, if there is a spool that takes
        them. Cancelled, it stops at once.
        """
        backlog = self._trades.backlog
        if self._state == "new":
            self._state = "closed"
            backlog.drop("stopped")
        if self._state == "open":
            self._state = "stopping"
            for outlet in (self._trades, self._rows):
                outlet.stop()
            self.changes.tell()
            try:
                await ends_before(self.changes.until(self._is_empty), forced or asyncio.Event(), limit)
            finally:
                await _finished(asyncio.create_task(self._close()))
        return backlog.refused + backlog.dropped.total()

    async def _close(self) -> None:
        await cancel_all(self.tasks.running.values())
        left = await self._trades.save(SAVE_LIMIT)
        await asyncio.gather(*(sink.producer.drop() for sink in (self._sink, self._row_sink)))
        if left:
            log.error("kafka: %d trades and dead letters could be neither published nor spooled", left)
        self._rows.backlog.drop("stopped")
        await self._trades.close()
        self._state = "closed"
        self.changes.tell()

    def stats(self) -> PublisherStats:
        """The counts of this moment."""
        producer, outlet = self._sink.producer, self._trades
        state: Any = self._state
        if state in ("open", "stopping"):
            absent = outlet.stalled or (producer.error and not producer.connected)
            state = "away" if absent else "connected" if producer.connected else "connecting"
        counts = counts_of(outlet.backlog), counts_of(self._rows.backlog)
        return PublisherStats(
            *(state, *counts, self._sink.dead, producer.connects, producer.error, self._waiting, self._given_up)
        )

    __repr__ = stats_repr
