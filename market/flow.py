"""The way of a trade through the program: exchanges -> Kafka, with the figures. And what all three programs share.

A ``Feed`` per exchange -> ``Publisher`` (topic ``trades``) -> queue -> ``AnalyticsPool`` -> rows -> ``Publisher``
(topic ``analytics``). A frame that cannot be parsed goes to the topic ``dead-letter``, with its reason, its time, and
what the adapter knew of the connection.

What is bounded, and what happens at the bound
- What an exchange sends: no queue; while its trade waits for room nothing more is read, and TCP holds the exchange.
- The publisher's ``buffer`` of trades and dead letters: then its spool, of at most ``spool_bytes``; then feeds wait.
- The queue for the analytics, ``QUEUE`` trades: the oldest are left out of the rows, and counted (``skipped``). They
  are published: computing never holds up publishing.
- Rows that wait to be published: the oldest go, and are counted.

Promised
- The equations of ``market.display``, at every moment. They are checked in each snapshot, once a second at least.
- Lost are trades only when the program is told to end while Kafka is away and the spool is full, or the disk fails. The
  exit code and the last line say so.
- An exchange, a worker or Kafka that fails holds up nobody else, within the bounds above.
- The first SIGTERM or Ctrl-C: close frames, what the exchanges had sent by then is taken, computed and published, in at
  most ``stop_limit`` seconds; the rest goes to the spool. The second: there at once.

Not promised: that a trade is in the topic once over a ``kill -9`` (see ``market.kafka``); the order of trades of two
exchanges.

Where what runs: all in one event loop, but the figures (processes), the spool's files and the table (threads).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import ssl
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from coordination import stats_repr, wait_for_event
from market.adapter import Adapter
from market.connect import TURN, Feed, new_session
from market.display import Board, FeedLine, MarketCounts, StateChanges, imbalance, lost
from market.feeds import ADAPTERS
from market.kafka import SAVE_LIMIT, Publisher, PublisherClosed
from market.stats import WINDOWS, AnalyticsRow
from market.topics import DeadLetter, MarketEvent, client_log
from market.trade import Trade
from market.workers import MOST, AnalyticsPool
from runtime.loop import Lag, TaskSupervisor, ends_before
from runtime.outlet import TwoStageStop, unusable
from runtime.processes import PoolClosed
from runtime.stderr import lines_lost

log = logging.getLogger("market_pipeline")

QUEUE = 50_000  # trades that may wait to be computed
ROWS = 200  # that are handed over in one go: some 2 ms
COMPUTE_EVERY, IDLE = 0.05, 0.5
"""Seconds that trades may wait for more to be computed with; seconds of silence after which all rows are told."""
FEED_LIMIT = 3.0  # seconds that the exchanges have to answer a close frame
CLOSE_LIMIT = 2 * SAVE_LIMIT  # seconds that the publisher has to end after that, whatever the disk does
WATCH_EVERY = 1.0  # seconds between two looks at the counts
PUBLISHING = ("prefix", "partitions", "replication", "buffer", "spool_bytes", "spool_after")  # options of ``Publisher``


@dataclass(frozen=True)
class MarketOptions:
    """As on the command line. Seconds and bytes."""

    symbols: tuple[str, ...] = ("BTC-USD", "ETH-USD", "SOL-USD")
    exchanges: tuple[str, ...] = tuple(name for name, adapter in ADAPTERS.items() if adapter.key_env is None)
    stocks: tuple[str, ...] = ()
    merge_quotes: bool = False
    urls: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kafka: str | None = None
    prefix: str = ""
    partitions: int = 6
    replication: int = 1
    compression: str = "zstd"
    tls: str | None = None
    sasl: str | None = None
    buffer: int = 100_000
    spool: str = str(Path(__file__).resolve().parents[1] / "data" / "market-spool")
    spool_bytes: int = 1 << 30
    spool_after: float = 5.0
    workers: int | None = None
    windows: tuple[int, ...] = WINDOWS
    lateness: float = 2.0
    group: str = "market-analyse"
    dry_run: bool = False
    stop_limit: float = 10.0
    http: str | None = None


def security(options: MarketOptions, environ: Mapping[str, str]) -> dict[str, Any]:
    """What aiokafka is told of TLS and SASL. ``ValueError``."""
    if options.tls is None and options.sasl is None:
        return {}
    found: dict[str, Any] = {"security_protocol": "PLAINTEXT"}
    if options.tls is not None:
        cafile = None if options.tls == "system" else options.tls
        try:
            found = {"security_protocol": "SSL", "ssl_context": ssl.create_default_context(cafile=cafile)}
        except OSError as error:
            raise ValueError(f"--tls: {options.tls}: {error.strerror or error}") from None
    if options.sasl is not None:
        user, password = environ.get("KAFKA_USERNAME"), environ.get("KAFKA_PASSWORD")
        if not user or not password:
            raise ValueError("--sasl: KAFKA_USERNAME and KAFKA_PASSWORD are not set")
        found["security_protocol"] = "SASL_SSL" if options.tls is not None else "SASL_PLAINTEXT"
        found |= {"sasl_mechanism": options.sasl, "sasl_plain_username": user, "sasl_plain_password": password}
    return found


def feeds_of(options: MarketOptions, environ: Mapping[str, str]) -> dict[str, tuple[Adapter, tuple[str, ...]]]:
    """The adapters, and the symbols of each. ``ValueError`` if something is not there."""
    found = dict[str, tuple[Adapter, tuple[str, ...]]]()
    keys = {name: adapter.key_env for name, adapter in ADAPTERS.items() if adapter.key_env is not None}
    for name in options.exchanges:
        if name not in ADAPTERS:
            raise ValueError(f"--exchanges: there is no {name!r}; known: {', '.join(ADAPTERS)}")
        if name in keys and not options.stocks:
            raise ValueError(f"--exchanges {name} needs --stocks")
        adapter = ADAPTERS[name].with_keys(environ, options.merge_quotes)
        found[name] = adapter, options.stocks if name in keys else options.symbols
    if options.stocks and not keys.keys() & found:
        for name in keys:
            with contextlib.suppress(ValueError):
                found[name] = ADAPTERS[name].with_keys(environ), options.stocks
        if not keys.keys() & found:
            raise ValueError(f"--stocks: no key is set ({', '.join(f'{name}: {key}' for name, key in keys.items())})")
    for name, (adapter, symbols) in found.items():
        try:
            adapter.check(symbols)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


# ------------------------------------------------------------------------------------------- what all programs have


class MarketProgram(ABC):
    """Publisher, stop, tasks that go on after an error, and counts."""

    def __init__(
        self,
        options: MarketOptions,
        *,
        spool: bool = False,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        assert options.kafka is not None
        self.tasks, self._lag = TaskSupervisor(log), Lag()
        self.options = options
        self._security = security(options, environ)
        self.publisher = Publisher(
            options.kafka,
            spool=Path(options.spool) if spool else None,
            compression=None if options.compression == "none" else options.compression,  # type: ignore[arg-type]
            security=self._security,
            **{name: getattr(options, name) for name in PUBLISHING},
        )
        self.board = Board(options.windows)
        self._trades = self._letters = self._events = self._computed = self._uncomputed = 0
        self.stop = TwoStageStop(self.publisher.changes)

        figures = {"windows": options.windows, "lateness": options.lateness}
        self.workers = AnalyticsPool(options.workers, options=figures)  # its processes are not there before ``start``

    # -------------------------------------------------------------------- figures and publishing

    async def _computed_rows(self, trades: list[Trade]) -> list[AnalyticsRow]:
        rows, left_out = await self.workers.submit(trades)
        self._computed += len(trades) - len(left_out)
        self._uncomputed += len(left_out)
        return rows

    async def _tell(self, rows: list[AnalyticsRow]) -> None:
        """Thousands at once would hold the loop for tens of milliseconds."""
        for at in range(0, len(rows), ROWS):
            if at:
                await asyncio.sleep(0)
            part = rows[at : at + ROWS]
            self.board.take(part)
            self.publisher.analytics([row.record() for row in part])

    async def _tell_all(self) -> None:
        """The rows that were not due yet."""
        with contextlib.suppress(PublisherClosed, PoolClosed):
            await self._tell(await self.workers.flush())

    async def _bury(self, letter: DeadLetter) -> None:
        self._letters += 1
        with contextlib.suppress(PublisherClosed):
            await self.publisher.dead(letter)

    async def _attest(self, event: MarketEvent) -> None:
        self._events += 1
        with contextlib.suppress(PublisherClosed):
            await self.publisher.event(event)

    # -------------------------------------------------------------------- life and end

    async def _watch(self) -> None:
        """Whether the counts balance, should nobody else ask; and a line in the log when a state has changed."""
        changes = StateChanges()
        while True:
            await asyncio.sleep(WATCH_EVERY)
            if line := changes.line(self.snapshot()):
                log.info("%s", line)

    async def _unless_forced(self, work: Awaitable[Any], limit: float) -> None:
        """Until that comes to its end, is cut off by a second stop, or the time is over."""
        try:
            await ends_before(work, self.stop.forced, limit)
        except Exception as error:
            self.tasks.fault("stopping", error)

    async def _begin(self, stack: contextlib.AsyncExitStack, *, publishes: bool = True) -> None:
        """What all programs have, until ``stack`` ends it."""
        stack.enter_context(client_log.attached())
        if publishes:
            try:
                await self.publisher.start()
            except Exception as error:
                raise unusable(self.options.spool, error) from None
            stack.push_async_callback(self._close_publisher)
        stack.push_async_callback(self.workers.close)
        stack.push_async_callback(self.tasks.end)
        self.tasks.start("watch", self._watch)
        self.tasks.start("loop lag", self._lag.watch)

    _deadline = 0.0

    async def _close_publisher(self) -> None:
        """What is left after the time, or at once if forced, goes to the spool."""
        limit = max(0.0, self._deadline - time.monotonic())
        closing = asyncio.create_task(self.publisher.stop(limit, self.stop.forced))
        await asyncio.wait((closing,), timeout=limit + CLOSE_LIMIT)
        if not closing.done():
            self.tasks.fault("publisher", TimeoutError("it does not end"))
        elif not closing.cancelled() and (error := closing.exception()) is not None:
            self.tasks.fault("publisher", error)

    @abstractmethod
    async def run(self) -> int:
        """1 if anything was lost. ``CannotStart``."""

    def _more(self) -> dict[str, Any]:
        """What a program adds to its snapshot."""
        workers, found = self.workers.stats(), self.workers.analytics()
        return {
            "late": found.late,
            "repeated": found.repeated,
            "worker_deaths": workers.died,
            "workers": workers.pids,
        }

    def snapshot(self) -> MarketCounts:
        """All counts of this moment; an imbalance is logged."""
        found = self.publisher.stats()
        counts = MarketCounts(
            trades=self._trades,
            letters=self._letters,
            events=self._events,
            waiting=found.waiting,
            given_up=found.given_up,
            kafka=found.state,
            published=found.trades,
            dead=found.dead,
            rows=found.analytics,
            computed=self._computed,
            uncomputed=self._uncomputed,
            symbols=self.board.lines(),
            loop_lag=self._lag.longest,
            lines_lost=lines_lost(),
            error=found.error,
            stopping=self.stop.stage > 0,
        )._replace(**self._more())
        self.tasks.balance(imbalance(counts), counts)
        return counts._replace(faults=self.tasks.faults + self.publisher.tasks.faults)

    stats = snapshot
    __repr__ = stats_repr


# ------------------------------------------------------------------------------------------------------------- run


class Pipeline(MarketProgram):
    """Exchanges -> Kafka, with the figures. ``run`` once."""

    def __init__(
        self,
        options: MarketOptions,
        *,
        environ: Mapping[str, str] = os.environ,
        feed_options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(options, spool=True, environ=environ, **more)
        self._adapters = feeds_of(options, environ)
        turn = TURN / max(1, len(self._adapters))
        self._feed_options = {"turn": turn, **(feed_options or {})}
        self.feeds: dict[str, Feed] = {}
        self._queue: deque[Trade] = deque()
        self._wake = asyncio.Event()
        self._offered = self._skipped = self._computing = 0

    # -------------------------------------------------------------------- what the feeds call

    def emit(self, _: str, trades: list[Trade]) -> Awaitable[object] | None:
        """Take a feed's trades; what is returned is to be awaited: there is no room."""
        self._trades += len(trades)
        try:
            if not self.publisher.offer(trades):
                return self._emit(trades)
        except PublisherClosed:
            return None
        self._offer(trades)
        return None

    async def _emit(self, trades: list[Trade]) -> None:
        with contextlib.suppress(PublisherClosed):
            await self.publisher.trades(trades)
            self._offer(trades)

    async def _feed(self, name: str, session: aiohttp.ClientSession) -> None:
        if self.stop.stage:
            return
        adapter, symbols = self._adapters[name]
        url = self.options.urls.get(name)
        options = {"tell": self._attest, "url": url, "session": session, **self._feed_options}
        self.feeds[name] = Feed(adapter, symbols, self.emit, self._bury, **options)
        await self.feeds[name].run()

    # -------------------------------------------------------------------- the figures

    def _offer(self, trades: list[Trade]) -> None:
        queue = self._queue
        self._offered += len(trades)
        queue.extend(trades)
        while len(queue) > QUEUE:
            queue.popleft()
            self._skipped += 1
        self._wake.set()

    async def _compute(self) -> None:
        await self.workers.start()
        queue, told = self._queue, True
        while True:
            if not queue:
                self._wake.clear()
                if not await wait_for_event(self._wake, float("inf") if told else IDLE):
                    await self._tell_all()
                    told = True
                continue
            if len(queue) < MOST and not self.stop.stage:
                await asyncio.sleep(COMPUTE_EVERY)
            batch = [queue.popleft() for _ in range(min(MOST, len(queue)))]
            self._computing, told = len(batch), False
            try:
                rows = await self._computed_rows(batch)
            except BaseException:
                self._skipped += len(batch)
                raise
            finally:
                self._computing = 0
            self.board.count(batch)
            await self._tell(rows)

    # -------------------------------------------------------------------- life and end

    async def run(self) -> int:
        """Until it has stopped; 1 if something was lost."""
        async with contextlib.AsyncExitStack() as stack:
            await self._begin(stack)
            session = await stack.enter_async_context(new_session())
            self.tasks.start("analytics", self._compute)
            self.tasks.start("connect", self.publisher.connect)
            for name in self._adapters:
                self.tasks.start(f"feed {name}", partial(self._feed, name, session))
            await self.stop.stopped.wait()
            begun = time.monotonic()
            self._deadline = begun + self.options.stop_limit
            limit = min(FEED_LIMIT, self.options.stop_limit)
            await self._unless_forced(asyncio.gather(*(feed.stop(limit) for feed in self.feeds.values())), limit + 1.0)
            await self._unless_forced(self._drain(), (self._deadline - time.monotonic()) * 0.6)
        self._skipped += len(self._queue)
        self._queue.clear()
        return int(lost(self.snapshot()) > 0)

    async def _drain(self) -> None:
        while self._queue or self._computing:  # noqa: ASYNC110  -- no event says
            await asyncio.sleep(0.01)
        await self._tell_all()

    def _more(self) -> dict[str, Any]:
        return super()._more() | {
            "offered": self._offered,
            "skipped": self._skipped,
            "queued": len(self._queue) + self._computing,
            "feeds": {name: feed_line(self.feeds.get(name)) for name in self._adapters},
        }


def feed_line(feed: Feed | None) -> FeedLine:
    """What is shown of a feed."""
    if feed is None:
        return FeedLine("idle", *(0,) * 7, None)
    found = feed.stats()
    return FeedLine(
        *(found.state, found.trades, found.bad, found.gaps + found.outages, found.missed, found.duplicates),
        *(found.disorder, max(0, found.connects - 1), None if found.lag != found.lag else found.lag / 1e6),
        *(found.breaker, found.last_error or found.note, found.stale),
    )
