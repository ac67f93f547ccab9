"""One supervised WebSocket connection to an exchange: `Feed`.

Theory
------
`Feed.run` connects, subscribes, reads until the connection ends, waits, and begins again, until `stop`. What a frame
means the adapter knows; what the trades lack, `SequenceCheck`. All of it is one task in one event loop, with one more
that watches the time while a connection lasts; frames are parsed in the loop, and after `turn` of it the others have
theirs. (Feeds of one loop share `TURN`: ten that are behind would leave a tenth of it to all else.) There is no lock
and no queue: a frame's trades go to `emit` before the next frame is looked at. So when `emit` waits, nothing more is
read, aiohttp stops reading the socket after some 128 KB, and the exchange's writes stall: the bound of memory. (An
exchange that is kept waiting for long closes the connection, and is connected to again.)

Promised:

* Every frame that arrives whole comes to trades for `emit`, or to one call of `dead` with the reason, or is known and
  not needed. A frame that the WebSocket layer refuses (too large, reserved bits) has no bytes to show: `dead` is called
  with none, and the connection ends. What was under way when a connection broke off cannot be known; where an exchange
  numbers its trades, the numbers tell; where it does not, each symbol's first trade afterwards is labelled "gap" (it
  may be that nothing is missing), unless a snapshot overlaps with what came before.
* A connection ends with a close frame wherever it is we who end it, and what the exchange had sent before it saw that
  is still read and told, for at most `close_within`; not so after a cancellation, or an error of `emit` or `dead`.
* Waits between attempts are uniform in [0, min(cap, base * 2**n)], n counted since a connection was last healthy, that
  is subscribed for `healthy_after`; a Retry-After comes on top. Five failures in a row within a minute open the
  breaker, which waits longer. A failure is an attempt or connection that ended unhealthy, unless the exchange had asked
  for that.
* A feed that says nothing for the adapter's `silent_after` is left for a new connection, and so is one that does not
  answer a ping. While `emit` waits that is not asked: silence is our own then.
* A symbol without a trade for `stale_after` while others trade is told (`stats().stale`). It may trade seldom, or its
  subscription may have died, or been refused: after `renew_after` the connection is left for a new one, and after twice
  as long, and so on, for as long as any is stale.

Not promised: that each of several symbols is served (an exchange may refuse one and acknowledge the others: `stats`
shows the error); that `emit` is called again for what it raised on: its error, and that of `dead`, ends `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple

import aiohttp
from aiohttp import WSMsgType

from coordination import Clock, Rng, stats_repr
from market.adapter import Adapter, SequenceCheck
from market.feed_socket import GOING_AWAY, NORMAL, End, FeedSocket, Socket, open_socket
from market.silence import Limits, SymbolSilence
from market.trade import BadFrame, Parsed, Trade, short
from primitives import Backoff, CircuitBreaker, CircuitOpen, Permit, TokenBucket

Emit = Callable[[str, list[Trade]], Awaitable[object] | None]
"""Told the exchange and a frame's trades, labelled. What it returns is awaited if it is not None."""

Dead = Callable[[str, str, bytes, int], Awaitable[object] | None]
"""Told the exchange, the reason, the frame, and when it was received (Unix time, ns). Awaited likewise."""

FeedState = Literal["idle", "connecting", "subscribing", "live", "closing", "waiting", "refused", "stopped"]

MAX_MESSAGE = 4 << 20  # bytes of a frame; Gemini's books come near to one
TURN = 0.004  # seconds of work, of all feeds together, after which the loop's other tasks have their turn


def new_session() -> aiohttp.ClientSession:
    """With the system's resolver: an installed c-ares is taken otherwise, which knows nothing of nsswitch.conf."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=aiohttp.ThreadedResolver()))


class FeedStats(NamedTuple):
    """Counts since the beginning."""

    exchange: str
    state: FeedState
    connects: int  # handshakes that succeeded
    failures: int  # attempts and connections in a row that were not healthy
    since: float | None  # seconds for which it has been live
    frames: int
    trades: int
    bad: int  # frames that went to `dead`
    gaps: int  # those that numbers show
    missed: int  # trades that are missing there
    outages: int  # gaps that no number shows: trades labelled because a connection had been lost
    duplicates: int
    disorder: int
    errors: int  # messages of the exchange that say so
    lag: float  # microseconds from the exchange's time to ours, a moving mean; includes the clocks' difference
    breaker: str
    retry_in: float  # seconds until the next attempt, while there is a wait
    note: str  # what the exchange said last of its status, a maintenance for instance
    last_error: str
    stale: tuple[str, ...]  # symbols that are silent while others are not


class Feed:
    """The trades of one exchange: `await Feed(ADAPTERS["kraken"], ["BTC-USD"], emit, dead).run()`.

    `adapter` is copied (`fresh`); the copy is `self.adapter`, whose `context` a dead letter needs, as it is when `dead`
    is called. `url`: instead of the exchange's own. `session`: shared; None: one of its own.
    `clock`: seconds, monotonic; `wall`: Unix time in ns; `sleep`: how to wait between attempts, or messages. Times
    are seconds: `connect_within` for the handshake, `ack_within` for the acknowledgement of the subscription,
    `ping_every` for pings of the protocol, `pong_within` for any sign of life after one, `close_within` for the
    exchange's close frame, `send_within` for a message to be written, `silent_after` instead of the adapter's,
    `stale_after` and `renew_after` for one symbol's silence, `turn` of the loop at a time. Raises ValueError for
    symbols that the exchange cannot have, or not so many.
    """

    def __init__(
        self,
        adapter: Adapter,
        symbols: Sequence[str],
        emit: Emit,
        dead: Dead,
        *,
        url: str | None = None,
        session: aiohttp.ClientSession | None = None,
        clock: Clock = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
        rng: Rng = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        healthy_after: float = 30.0,
        connect_within: float = 10.0,
        ack_within: float = 10.0,
        ping_every: float = 20.0,
        pong_within: float = 10.0,
        close_within: float = 2.0,
        send_within: float = 5.0,
        silent_after: float | None = None,
        stale_after: float = 300.0,
        renew_after: float = 1800.0,
        base: float = 1.0,
        cap: float = 30.0,
        max_message: int = MAX_MESSAGE,
        turn: float = TURN,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self._natives = adapter.check(symbols)
        self.adapter, self.symbols = adapter.fresh(), tuple(symbols)
        self.exchange = adapter.name
        self._url = adapter.connect_url(self.symbols, url)
        self._emit, self._dead, self._session = emit, dead, session
        self._clock, self._wall, self._rng, self._sleep = clock, wall, rng, sleep
        self._healthy_after, self._connect_within, self._ack_within = healthy_after, connect_within, ack_within
        self._ping_every, self._pong_within, self._send_within = ping_every, pong_within, send_within
        self._close_within, self._max_message, self._turn = close_within, max_message, turn
        self._silent_after = adapter.silent_after if silent_after is None else silent_after
        self._stale_after = stale_after
        self._backoff = Backoff(base, cap, rng)
        self._sends = TokenBucket(1.0 / self.adapter.pace, clock=clock) if self.adapter.pace else None
        self.breaker = breaker or CircuitBreaker(
            adapter.name,
            window=60.0,
            jitter=0.5,
            probe_timeout=connect_within + ack_within + healthy_after + 30.0,
            clock=clock,
            rng=rng,
        )
        self.check = SequenceCheck()
        self._silence = SymbolSilence(self.symbols, renew_after)
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._state: FeedState = "idle"
        self._connects = self._frames = self._bad = self._errors = 0
        self._lag = math.nan
        self._note = self._last_error = ""
        self._next_attempt = 0.0
        # of one connection:
        self._connection: FeedSocket | None = None
        self._permit: Permit | None = None
        self._wanted = self._acks = self._refusals = 0
        self._since: float | None = None

    async def run(self) -> None:
        """Until `stop`, cancellation, or an error of `emit` or `dead`. Once."""
        if self._task is not None:
            raise RuntimeError("a feed runs once")
        if self._stopping:
            return
        self._task = asyncio.create_task(self._supervise(), name=f"feed {self.exchange}")
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._stopping or not self._task.done() or _being_cancelled():
                raise

    async def stop(self, limit: float = 5.0) -> None:
        """Send a close frame, tell what still comes before the exchange's own, and end; after `limit` seconds anyhow.

        A wait or an attempt to connect is broken off. Called by `emit` or `dead`, it does not wait for the end.
        """
        self._stopping = True
        task = self._task
        if task is None or task.done():
            self._state = "stopped"
            return
        if self._state in ("connecting", "waiting", "refused"):
            task.cancel()
        elif self._connection is not None:
            await self._part(End("stopped", asked=True), NORMAL)
        if task is not asyncio.current_task():
            await asyncio.wait((task,), timeout=limit)
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def stats(self) -> FeedStats:
        now, found = self._clock(), self.check.stats()
        return FeedStats(
            exchange=self.exchange,
            state=self._state,
            connects=self._connects,
            failures=self._backoff.failures,
            since=None if self._since is None else now - self._since,
            frames=self._frames,
            trades=found.trades,
            bad=self._bad,
            gaps=found.gaps,
            missed=found.missed,
            outages=self._silence.outages,
            duplicates=found.duplicates,
            disorder=found.disorder,
            errors=self._errors,
            lag=self._lag,
            breaker=self.breaker.state,
            retry_in=max(0.0, self._next_attempt - now) if self._state in ("waiting", "refused") else 0.0,
            note=self._note,
            last_error=self._last_error,
            stale=self._silence.stale(self._since, self._stale_after),
        )

    __repr__ = stats_repr

    async def _supervise(self) -> None:
        own = None if self._session is not None else new_session()
        try:
            while not self._stopping:
                try:
                    permit = self.breaker.permit()
                except CircuitOpen as error:
                    await self._wait("refused", error.retry_after)
                    continue
                self._permit = permit
                try:
                    end = await self._attempt(self._session or own)  # type: ignore[arg-type]
                    self._settle(end)
                finally:
                    permit.ignore()
                delay = self._backoff.next()
                if not self._stopping:
                    await self._wait("waiting", end.retry_after + delay)
        finally:
            self._state, self._since = "stopped", None
            if own is not None:
                await own.close()

    def _settle(self, end: End) -> None:
        """What the end of an attempt means for the next one."""
        healthy = self._check_health()
        if not healthy and not end.asked and self._permit is not None:
            self._permit.failure()
        self._since = None
        if not self._stopping:
            self._last_error = end.reason

    def _check_health(self) -> bool:
        healthy = self._since is not None and self._clock() - self._since >= self._healthy_after
        if healthy:
            self._backoff.reset()
            if self._permit is not None:
                self._permit.success()
        return healthy

    async def _wait(self, state: FeedState, seconds: float) -> None:
        self._state, self._next_attempt = state, self._clock() + seconds
        await self._sleep(seconds)

    async def _attempt(self, session: aiohttp.ClientSession) -> End:
        self._state = "connecting"
        within, close_within = self._connect_within, self._close_within
        ws = await open_socket(session, self._url, within, close_within, self._max_message)
        if isinstance(ws, End):
            return ws
        self._connects += 1
        connection, broken_off = self._begin(ws), False
        watch = asyncio.create_task(self._watch(connection), name=f"watch {self.exchange}")
        try:
            if not await self._subscribe(connection):
                return connection.ending or End("the subscription could not be sent")
            return await self._read(connection)
        except BaseException:
            broken_off = connection.ending is None
            raise
        finally:
            self._connection, self._state = None, "closing"
            if self.check.stats().trades:
                self._silence.lost()
            await connection.leave(watch, broken_off, lambda: self._stopping)

    def _begin(self, ws: Socket) -> FeedSocket:
        within = {"close_within": self._close_within, "send_within": self._send_within}
        self._connection = connection = FeedSocket(ws, self._clock(), **within)
        self._state = "subscribing"
        self._acks = self._refusals = 0
        self.check.reconnected()
        return connection

    async def _subscribe(self, connection: FeedSocket) -> bool:
        messages = self.adapter.subscribe(self.symbols)
        self._wanted = self.adapter.acks(len(messages), self._natives)
        for message in messages:
            if self._sends:
                await self._sends.acquire_async()
            if not await connection.send(message):
                return False
        self._look_at_acks(connection)
        return True

    def _look_at_acks(self, connection: FeedSocket) -> None:
        answered = self._acks + self._refusals >= self._wanted and (self._acks or not self._wanted)
        if answered and connection.ending is None:
            self._state, self._since = "live", self._clock()

    async def _read(self, connection: FeedSocket) -> End:
        ws, clock, turn = connection.ws, self._clock, time.monotonic()
        while not connection.cut:
            connection.reading = True
            message = await ws.receive()
            connection.reading = False
            connection.heard = now = clock()
            kind = message.type
            if kind is WSMsgType.TEXT or kind is WSMsgType.BINARY:
                connection.told = now
                waits = self._take(connection, message.data)
                if waits is not None:
                    await waits
                    connection.heard = connection.told = clock()
            elif kind is WSMsgType.PING:
                connection.told = now
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await ws.pong(message.data)
            elif kind is not WSMsgType.PONG:
                return await self._ended(connection, message)
            if time.monotonic() - turn > self._turn:
                await asyncio.sleep(0)
                turn = time.monotonic()
        return connection.ending or End("cut")

    async def _ended(self, connection: FeedSocket, message: Any) -> End:
        if message.type is WSMsgType.ERROR:
            text = f"the connection broke the protocol: {short(message.data)}"
            self._bad += 1
            waits = self._dead(self.exchange, text, b"", self._wall())
            if waits is not None:
                await waits
        else:
            text = connection.farewell(message)
        return connection.ending or End(text)

    def _take(self, connection: FeedSocket, frame: bytes) -> Awaitable[object] | None:
        """A frame: what it came to is told. Returns what must be awaited before the next one."""
        received = self._wall()
        self._frames += 1
        try:
            parsed = self.adapter.parse(frame, received)
        except Exception as error:  # an adapter raises nothing but BadFrame; if it does, the frame is not lost
            self._bad += 1
            reason = str(error) if isinstance(error, BadFrame) else f"{type(error).__name__}: {short(error)}"
            return self._dead(self.exchange, reason, frame, received)
        trades = self.check.check(parsed)
        kind = parsed.kind
        if (kind == "heartbeat" or kind == "ignored") and parsed.reply is None:
            return None
        if kind == "trades" and trades:
            trades = self._silence.take(trades, connection.told)
            self._measure(trades[-1])
            if parsed.reply is None and not parsed.reconnect:
                return self._emit(self.exchange, trades)
        return self._other(connection, parsed, trades)

    def _measure(self, trade: Trade) -> None:
        if "snapshot" not in trade.flags:
            lag = (trade.received_ts_ns - trade.exchange_ts_ns) / 1e3
            self._lag = lag if self._lag != self._lag else self._lag + 0.05 * (lag - self._lag)

    async def _other(self, connection: FeedSocket, parsed: Parsed, trades: list[Trade]) -> None:
        """What is rare: a task's worth of waiting is no matter."""
        if trades:
            waits = self._emit(self.exchange, trades)
            if waits is not None:
                await waits
        if parsed.kind == "ack" or parsed.kind == "error":
            self._acks += parsed.kind == "ack"
            if parsed.kind == "error":
                self._errors += 1
                self._last_error = f"the exchange says: {parsed.note}"
                self._refusals += 1
            if self._state == "subscribing":
                self._look_at_acks(connection)
        elif parsed.kind == "status":
            self._note = parsed.note
        if parsed.reply is not None:
            await connection.send(parsed.reply)
        if parsed.reconnect:
            await self._part(End(f"the exchange asked for it: {parsed.note}", asked=True), GOING_AWAY)

    async def _part(self, end: End, code: bytes) -> None:
        """Begin to end the connection. The first reason stands, but for `stop`'s."""
        connection = self._connection
        if connection is not None and (connection.ending is None or self._stopping):
            self._state = "closing"
            await connection.part(end, code)

    async def _watch(self, connection: FeedSocket) -> None:
        """Pings, and the limits of silence, of acknowledgement, of health."""
        adapter = self.adapter
        limits = Limits(
            self._clock(),
            ping_every=self._ping_every,
            pong_within=self._pong_within,
            ack_within=self._ack_within,
            silent_after=self._silent_after,
            message_every=adapter.ping_every or math.inf,
        )
        while connection.ending is None:
            now = self._clock()
            self._check_health()
            if limits.message_is_due(now) and (text := adapter.ping()) is not None:
                await connection.send(text)
            if limits.ping_is_due(now, connection.heard):
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await connection.ws.ping()
            subscribing = self._state == "subscribing"
            if connection.reading:
                reason = limits.exceeded(now, connection.told, subscribing, self._last_error if self._refusals else "")
                renewal = "" if reason else self._silence.renewal(self._since)
                if reason or renewal:
                    await self._part(End(reason or renewal, asked=not reason), GOING_AWAY)
                    return
            healthy_at = math.inf if self._since is None else self._since + self._healthy_after
            due = min(limits.next(connection.told, subscribing), healthy_at if healthy_at > now else math.inf)
            await asyncio.sleep(min(1.0, max(0.01 if connection.reading else 0.05, due - now)))


def _being_cancelled() -> bool:
    task: asyncio.Task[Any] | None = asyncio.current_task()
    return task is not None and task.cancelling() > 0
