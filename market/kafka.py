"""The publisher: trades, analytics and dead letters into the topics of Kafka that ``market_topics`` describes.

The way of a record: encoded when it is taken -> buffer -> batches, one for each partition (``create_batch``: a quarter
of what ``send`` costs) -> acknowledged by all replicas. One round of batches is under way at a time; the next is filled
meanwhile. While the broker does not answer, the buffer fills; when it is full, and every ``spool_after`` seconds, all
of it goes to the spool, as Kafka is to have it: first what is under way, then the buffer. While anything is in the
spool, records come from there, and what is newer queues behind it. The partition follows from the key as in the Java
client (murmur2): a symbol is in one partition, in the order of ``trades()``.

Promised by ``Publisher``
- accepted + recovered == published + held + spooled + dropped + lost, at every moment; ``dropped`` is analytics (the
  oldest go first, beyond their bound), or what a stop without a spool left over, or a dead letter that the broker
  refuses; the latter two are logged.
- Trades and dead letters wait (``trades()`` and ``dead()`` block their callers) before one of them is dropped.
- While the process lives, a broker that freezes, goes or restarts with its data gets each record once: the producer is
  idempotent, what was under way is sent again under its old sequence number.
- What cannot be written as JSON, is too large, or is refused by the broker for its own sake becomes a dead letter; a
  batch that is refused is halved until the culprit is alone. Dead letters are cut to what a record may hold.
- What is in the spool survives ``kill -9``, and is published first by the next life.

Not promised
- Once only, across lives: what was under way when the process was killed, or stopped without an answer, is in the spool
  and may be in Kafka as well. A reader knows a trade by exchange, symbol and trade_id.
- That what is in memory survives ``kill -9``: ``linger`` and a round trip of a broker that is well, else
  ``spool_after``.
- That a partition whose leader is away does not hold up the others of its topic. Trades and analytics have a producer
  each, and do not hold up one another.

All is for one event loop; there is no lock. Encoding and compression run in it, at most ``AT_ONCE`` records and
``ROUND_BYTES`` in one go (3 to 5 ms); the spool's files have a thread, and what is read from them. On a loop that
others keep busy a round costs some fifteen turns, whatever is in it: so rounds are large. aiokafka has no public way to
leave a broker that does not answer: ``_abandon`` is the one place that touches what is private there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from uuid import uuid4

import orjson

from coordination import Clock, Rng, stats_repr
from market.link import (
    ASK_AGAIN,
    AT_ONCE,
    FLIGHT,
    FLIGHT_BYTES,
    HEAVY,
    LARGEST_CONTEXT,
    Closed,
    Counts,
    _end,
    _Link,
    _uncut,
    heavy,
    log,
)
from market.topics import (
    ANALYTICS,
    DEAD_LETTERS,
    HEADERS,
    LARGEST_RECORD,
    TRADES,
    DeadLetter,
    Item,
    Kind,
    Row,
    buried,
    dead_row,
    decode,
    from_lines,
    quiet,
    to_line,
    trade_row,
)
from market.trade import Trade
from runtime.spool import EncodedBatch, Spool

T = TypeVar("T")


FILE = 2500
"""Records of a file of the spool."""


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


# ---------------------------------------------------------------------------------------------------------- a producer


# -------------------------------------------------------------------------------------------------------- the publisher


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

        def link(*topics: str) -> _Link:
            return _Link(
                brokers,
                dict.fromkeys(topics, partitions),
                replication=replication,
                compression=compression,
                request_timeout=request_timeout,
                security=security or {},
                rng=rng,
            )

        self._link, self._analytics_link = link(self._trades_topic, self._dead_topic), link(self._analytics_topic)
        self._limit, self._linger, self._spool_after = buffer, linger, spool_after
        self._spool = None if spool is None else Spool(spool, max_bytes=spool_bytes, clock=clock)
        self._state = "new"
        self._failed = False
        """``open``, ``stopping``, ``closed``."""
        self._tasks: list[asyncio.Task[None]] = []

        self._buffer = deque[Row]()
        self._heavy = 0
        """Bytes of the dead letters in it."""
        self._flying: list[Row] = []
        self._flying_files: list[str] = []
        """The files of the spool that hold what is under way."""
        self._unwanted = 0
        """Of what is under way: dead letters that the broker refuses."""
        self._moving = 0
        """Records on their way from the buffer to the spool."""
        self._spilling = False
        self._away = False
        self._accepted = self._recovered = self._published = self._spooled = self._dropped = self._lost = self._dead = 0
        self._rows = deque[Row](maxlen=analytics_buffer)
        self._rows_flying = 0
        self._rows_accepted = self._rows_published = self._rows_dropped = 0

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
        if self._spool is not None:
            self._recovered = self._spooled = await asyncio.to_thread(self._spool.open)
        self._state = "open"
        quiet.enter()
        self._ending = asyncio.create_task(self._enough.wait())
        self._tasks = [asyncio.create_task(main) for main in (self._pump(), self._pump_analytics())]
        if self._spool is not None:
            self._tasks.append(asyncio.create_task(self._spiller()))
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
            raise Closed("the publisher is stopped")
        if len(self._buffer) + len(trades) > self._limit or len(trades) > AT_ONCE or self._turn.locked():
            return False
        rows = [self._row(trade) for trade in trades]
        self._buffer.extend(rows)
        self._heavy += heavy(rows)
        self._accepted += len(trades)
        self._wake.set()
        return True

    async def trades(self, trades: Sequence[Trade]) -> None:
        """Take the trades; waits while there is no room. Cancelled or ``Closed``, it may have taken some of them."""
        if not self.offer(trades):
            await self._take(trades)

    async def dead(
        self, exchange: str, error: str, raw: bytes | str, when_ns: int, kind: Kind | None = None, context: str = ""
    ) -> None:
        """Take a frame that cannot be parsed; waits while there is no room."""
        if isinstance(raw, str):
            raw, kind = raw.encode("utf-8", "surrogatepass"), kind or "text"
        if len(raw) > LARGEST_RECORD:
            error, raw = f"{error[:400]} (cut: it had {len(raw)} bytes)", raw[:LARGEST_RECORD]
        context = context if len(context) <= LARGEST_CONTEXT else ""
        await self._take([DeadLetter(exchange, error, bytes(raw), when_ns, kind or "binary", context)])

    async def _take(self, items: Sequence[Item]) -> None:
        async with self._turn:
            done = 0
            while done < len(items):
                if self._failed or self._state not in ("new", "open"):
                    raise Closed("the publisher is stopped")
                part = items[done : done + min(AT_ONCE, max(0, self._limit - len(self._buffer)))]
                if part and self._heavy < HEAVY:
                    rows = [self._row(item) for item in part]
                    self._buffer.extend(rows)
                    self._heavy += heavy(rows)
                    self._accepted += len(part)
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
            raise Closed("the publisher is stopped")
        at = time.time_ns() // 1_000_000
        for row in rows:
            fields = row if isinstance(row, Mapping) else row._asdict()
            encoded = Row(self._analytics_topic, fields["symbol"].encode(), orjson.dumps(fields), at, HEADERS)
            self._rows_dropped += len(self._rows) == self._rows.maxlen
            self._rows.append(encoded)
            self._rows_accepted += 1
        self._rows_wake.set()

    async def flush(self) -> None:
        """Return when nothing waits: all is acknowledged (analytics: or dropped). ``Closed`` if that will never be."""
        while self._buffer or self._flying or self._moving or self._spooled or self._rows or self._rows_flying:
            if self._failed or self._state == "closed":
                raise Closed("the publisher is stopped")
            await self._changed.wait()

    async def stop(self, limit: float = 10.0) -> int:
        """Take nothing more, publish what waits for ``limit`` seconds at the most, spool the rest.

        Returns how many trades and dead letters are neither published nor spooled: none, if there is a spool that takes
        them. Cancelled, it stops at once.
        """
        if self._state == "new":
            self._state = "closed"
            self._dropped += len(self._buffer)
            self._buffer.clear()
        if self._state != "open":
            return self._dropped
        self._state = "stopping"
        for event in (self._wake, self._rows_wake):
            event.set()
        self._pulse()
        pumps = self._tasks[:2]
        try:
            await asyncio.wait(pumps, timeout=limit)
        finally:
            self._enough.set()
            await _uncut(asyncio.create_task(self._close(pumps)))
        return self._dropped

    async def _close(self, pumps: Sequence[asyncio.Task[None]]) -> None:
        results = await asyncio.gather(*pumps, return_exceptions=True)
        await self._ending
        for task in self._tasks[2:]:
            while self._spilling:
                await self._changed.wait()
            await _end(task)
        if self._spool is not None and (self._buffer or (self._flying and not self._flying_files)):
            await self._spill()
        await asyncio.gather(self._link.drop(), self._analytics_link.drop())
        left = len(self._buffer) + (0 if self._flying_files else len(self._flying))
        if left:
            log.error("kafka: %d trades and dead letters could be neither published nor spooled", left)
        self._dropped += left
        self._rows_dropped += len(self._rows) + self._rows_flying
        self._buffer.clear()
        self._rows.clear()
        self._flying, self._rows_flying = [], 0
        if self._spool is not None:
            await self._spool.close()
        self._state = "closed"
        quiet.leave()
        self._pulse()
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -------------------------------------------------------------------------------------------------------- the pumps

    async def _pump(self) -> None:
        lingered = False
        while not self._enough.is_set():
            if self._spilling:
                await self._changed.wait()
            elif self._spooled:
                await self._replay()
            elif self._buffer and (lingered or self._state == "stopping" or len(self._buffer) >= FLIGHT):
                lingered = False
                await self._next_round()
            elif self._buffer:
                lingered = True
                await asyncio.sleep(self._linger)
            elif self._state == "stopping":
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _next_round(self) -> None:
        self._flying = self._some(FLIGHT)
        self._pulse()
        if await self._fly() and (files := self._landed()):
            assert self._spool is not None
            await self._spool.remove(files)

    def _some(self, most: int) -> list[Row]:
        """The oldest of the buffer."""
        rows, weight = list[Row](), 0
        while self._buffer and len(rows) < most and weight < FLIGHT_BYTES:
            rows.append(self._buffer.popleft())
            weight += len(rows[-1].value)
        self._heavy -= heavy(rows)
        return rows

    async def _replay(self) -> None:
        """The spool, file by file, the oldest first. The next ones are read while those before are under way."""
        assert self._spool is not None
        reading = asyncio.create_task(self._read(0))
        removing: asyncio.Task[None] | None = None
        try:
            while found := await reading:
                self._flying_files = [name for name, _ in found]
                self._flying = [row for _, rows in found for row in rows]
                reading = asyncio.create_task(self._read(len(found)))
                if not await self._fly():
                    return
                if removing is not None:
                    await removing
                removing = asyncio.create_task(self._spool.remove(self._landed()))
        except OSError as error:  # neither files nor memory left: that passes
            log.warning("kafka: the spool cannot be read: %s", error)
            await asyncio.wait({self._ending}, timeout=ASK_AGAIN)
        finally:
            await _end(reading)
            if removing is not None:
                await removing

    async def _read(self, skip: int) -> list[tuple[str, list[Row]]]:
        """The oldest files of the spool but so many: their names, and what is in them."""
        assert self._spool is not None
        found = await self._spool.first(FLIGHT // FILE, skip)
        gone = self._spool.stats().lost - self._lost
        if gone:  # set aside: the disk gave back something else
            self._spooled -= gone
            self._lost += gone
            log.error("kafka: %d records of the spool could not be read again", gone)
            self._pulse()
        topics = self._trades_topic, self._dead_topic
        return [(name, await asyncio.to_thread(from_lines, sealed.data, *topics)) for name, sealed in found]

    def _landed(self) -> list[str]:
        """All that was under way is in Kafka. The files of the spool that it was in."""
        files, self._flying_files = self._flying_files, []
        if files:
            self._spooled -= len(self._flying)
        self._published += len(self._flying) - self._unwanted
        self._dropped += self._unwanted
        self._flying = []
        self._pulse()
        return files

    async def _fly(self) -> bool:
        """Publish what is flying; False if it was enough before that was done."""
        task = asyncio.create_task(self._fly_all(list(self._flying)))
        if await self._done(task, self._stalled):
            self._away = False
            quiet.well()
            return True
        return False

    async def _fly_all(self, rows: list[Row]) -> None:
        self._unwanted = 0
        while rows:
            refused = await self._link.publish(rows)
            self._dead += sum(row.topic is self._dead_topic for row in rows)
            rows = []
            for row, error in refused:
                if row.topic == self._dead_topic:
                    self._dead -= 1
                    self._unwanted += 1
                    log.error("kafka: a dead letter was refused: %s: %.200r", error, row.value)
                else:
                    rows.append(self._bury(row.value, error))

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
                await _end(task)
        if task.cancelled():
            return False
        task.result()
        return True

    def _row(self, item: Item) -> Row:
        if isinstance(item, DeadLetter):
            return dead_row(item, self._dead_topic)
        try:
            return trade_row(item, self._trades_topic)
        except (TypeError, ValueError, AttributeError) as error:
            return self._bury(item, error)

    def _bury(self, item: object, error: BaseException | str) -> Row:
        letter = buried(item, error, time.time_ns())
        if isinstance(item, bytes):
            with contextlib.suppress(ValueError):
                letter = letter._replace(exchange=decode(item).exchange)
        return dead_row(letter, self._dead_topic)

    async def _pump_analytics(self) -> None:
        while not self._enough.is_set():
            if not self._rows:
                if self._state == "stopping":
                    return
                self._rows_wake.clear()
                await self._rows_wake.wait()
                await asyncio.sleep(0 if self._state == "stopping" else self._linger)
                continue
            rows = [self._rows.popleft() for _ in range(min(FILE, len(self._rows)))]
            self._rows_flying = len(rows)
            task = asyncio.create_task(self._fly_rows(rows))
            if await self._done(task, lambda: None):
                self._rows_published += self._rows_flying
                self._rows_flying = 0
            self._pulse()

    async def _fly_rows(self, rows: list[Row]) -> None:
        for row, error in await self._analytics_link.publish(rows):
            self._rows_dropped += 1
            self._rows_flying -= 1
            log.error("kafka: analytics were refused: %s: %.200r", error, row.value)

    # -------------------------------------------------------------------------------------------------------- the spool

    async def _spiller(self) -> None:
        while True:
            await self._pressed.wait()
            self._pressed.clear()
            if not await self._spill():
                await asyncio.sleep(ASK_AGAIN)  # no room, or the disk refuses: those who wait go on waiting
                self._pulse()

    async def _spill(self) -> bool:
        """What is under way, and what the buffer holds now, to the end of the spool. False if it would take no more."""
        assert self._spool is not None
        self._spilling = True
        try:
            if self._flying and not self._flying_files and not await self._spill_flying():
                return False
            left = len(self._buffer)  # what comes meanwhile has its turn when something was published again
            while self._buffer and left > 0:
                rows = self._some(FILE)
                left -= len(rows)
                self._moving, taken = len(rows), None
                try:
                    taken = await self._put(rows)
                finally:
                    self._moving = 0
                    if taken is None:
                        self._buffer.extendleft(reversed(rows))
                        self._heavy += heavy(rows)
                if taken is None:
                    return False
                self._spooled += len(rows)
                self._pulse()
            return True
        finally:
            self._spilling = False
            self._pulse()

    async def _spill_flying(self) -> bool:
        """A copy: it is removed when the answer comes."""
        assert self._spool is not None
        flying = self._flying
        sealed = await self._put(flying)
        if sealed is None:
            return False
        found = await self._spool.first(1)
        if not found or found[0][1].id != sealed.id:
            return False
        name = found[0][0]
        if self._flying is flying:
            self._flying_files = [name]
            self._spooled += len(flying)
        else:  # the answer was quicker
            await self._spool.remove([name])
        return True

    async def _put(self, rows: Sequence[Row]) -> EncodedBatch | None:
        assert self._spool is not None
        sealed = EncodedBatch(uuid4(), len(rows), time.time(), b"".join(to_line(row) + b"\n" for row in rows))
        return sealed if await self._spool.put(sealed) else None

    def stats(self) -> PublisherStats:
        held = len(self._buffer) + self._moving + (0 if self._flying_files else len(self._flying))
        link = self._link
        state: Any = self._state
        if state in ("open", "stopping"):
            state = (
                "failed" if self._failed else "away" if self._away else "connected" if link.connected else "connecting"
            )
        return PublisherStats(
            state,
            Counts(
                *(self._accepted, self._recovered, self._published, held),
                *(self._spooled, self._dropped, self._lost),
            ),
            Counts(
                *(self._rows_accepted, 0, self._rows_published, len(self._rows) + self._rows_flying),
                *(0, self._rows_dropped, 0),
            ),
            self._dead,
            link.connects,
            link.error,
        )

    __repr__ = stats_repr
