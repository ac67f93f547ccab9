"""One supervised WebSocket connection to an exchange: `Feed`.

`Feed.run` connects, subscribes, reads until the connection ends (`market.feed_socket`), waits, and begins again, until
`stop`. All of it is one task in one event loop, with one more that watches the time while a connection lasts. There is
no lock and no queue: a frame's trades go to `emit` before the next frame is looked at. So when `emit` waits, nothing
more is read, aiohttp stops reading the socket after some 128 KB, and the exchange's writes stall: the bound of memory.

Promised:

* Every frame that arrives whole comes to trades for `emit`, or to one call of `dead` with the reason, or is known and
  not needed. A frame that the WebSocket layer refuses (too large, reserved bits) has no bytes to show: `dead` is called
  with none, and the connection ends. What was under way when a connection broke off cannot be known (`market.frames`
  labels it).
* Waits between attempts are uniform in [0, min(cap, base * 2**n)], n counted since a connection was last healthy, that
  is subscribed for `healthy_after`; a Retry-After comes on top. Five failures in a row within a minute open the
  breaker, which waits longer. A failure is an attempt or connection that ended unhealthy, unless the exchange had asked
  for that.
* A feed that says nothing for the adapter's `silent_after` is left for a new connection, and so is one that does not
  answer a ping. While `emit` waits that is not asked: silence is our own then.
* A symbol without a trade for `stale_after` while others trade is told (`stats().stale`). Its subscription may have
  died, or been refused: after `renew_after` the connection is left for a new one, and after twice as long, and so on,
  for as long as any is stale.

Not promised: that each of several symbols is served (an exchange may refuse one and acknowledge the others: `stats`
shows the error); that `emit` is called again for what it raised on: its error, and that of `dead`, ends `run`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple

import aiohttp

from coordination import Clock, Rng, stats_repr
from market.adapter import Adapter
from market.feed_socket import NORMAL, End, FeedSocket, FeedTimes, Socket, open_socket
from market.frames import Dead, Emit, FrameReader, SymbolSilence, Tell
from primitives import Backoff, CircuitBreaker, CircuitOpen, Permit, TokenBucket

FeedState = Literal["idle", "connecting", "subscribing", "live", "closing", "waiting", "refused", "stopped"]

TIMES = FeedTimes()
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
    restarts: int  # times that a sequence began again below where it was
    errors: int  # messages of the exchange that say so
    lag: float  # microseconds from the exchange's time to ours, a moving mean; includes the clocks' difference
    breaker: str
    retry_in: float  # seconds until the next attempt, while there is a wait
    note: str  # what the exchange said last of its status, a maintenance for instance
    last_error: str
    stale: tuple[str, ...]  # symbols that are silent while others are not


class Feed:
    """The trades of one exchange: `await Feed(ADAPTERS["kraken"], ["BTC-USD"], emit, dead).run()`.

    `adapter` is copied (`fresh`). `tell`: told of gaps, of a connection's end and return, of back-fills. `url`: instead
    of the exchange's own. `session`: shared; None: one of its own. `turn`: seconds of the loop at a time. `clock`:
    seconds, monotonic; `wall`: Unix time in ns; `sleep`: how to wait between attempts. ValueError for symbols that the
    exchange cannot have, or not so many.
    """

    def __init__(
        self,
        adapter: Adapter,
        symbols: Sequence[str],
        emit: Emit,
        dead: Dead,
        *,
        tell: Tell = lambda _: None,
        url: str | None = None,
        session: aiohttp.ClientSession | None = None,
        times: FeedTimes = TIMES,
        max_message: int = MAX_MESSAGE,
        turn: float = TURN,
        breaker: CircuitBreaker | None = None,
        clock: Clock = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
        rng: Rng = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._natives = adapter.check(symbols)
        self.adapter, self.symbols = adapter.fresh(), tuple(symbols)
        self.exchange = adapter.name
        self._url, self._session = adapter.connect_url(url), session
        self._times, self._max_message, self._turn = times, max_message, turn
        self._clock, self._sleep = clock, sleep
        self._backoff = Backoff(times.base, times.cap, rng)
        self._sends = TokenBucket(1.0 / self.adapter.pace, clock=clock) if self.adapter.pace else None
        self.breaker = breaker or CircuitBreaker(
            adapter.name,
            window=60.0,
            jitter=0.5,
            probe_timeout=times.connect_within + times.ack_within + times.healthy_after + 30.0,
            clock=clock,
            rng=rng,
        )
        told = tuple(dict.fromkeys(self.adapter.told(symbols).values()))
        self._reader = FrameReader(self.adapter, SymbolSilence(told, times.renew_after), emit, dead, wall, tell)
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._state: FeedState = "idle"
        self._connects = 0
        self._next_attempt = 0.0
        self._connection: FeedSocket | None = None

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
            caller = asyncio.current_task()
            if not self._stopping or not self._task.done() or (caller is not None and caller.cancelling()):
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
        if self._connection is not None:
            await self._connection.begin_close(End("stopped", asked=True), NORMAL)
        elif self._state in ("connecting", "waiting", "refused"):
            task.cancel()
        if task is not asyncio.current_task():
            await asyncio.wait((task,), timeout=limit)
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def stats(self) -> FeedStats:
        """Where it stands."""
        now, reader, found, connection = self._clock(), self._reader, self._reader.check.stats(), self._connection
        since = None if connection is None else connection.live_since
        waits = self._state in ("waiting", "refused")
        return FeedStats(
            **found._asdict(),
            exchange=self.exchange,
            state=self._state if connection is None else connection.state,
            connects=self._connects,
            failures=self._backoff.failures,
            since=None if since is None else now - since,
            frames=reader.frames,
            bad=reader.bad,
            outages=reader.silence.outages,
            errors=reader.errors,
            lag=reader.lag,
            breaker=self.breaker.state,
            retry_in=max(0.0, self._next_attempt - now) if waits else 0.0,
            note=reader.note,
            last_error=reader.last_error,
            stale=reader.silence.stale(since, self._times.stale_after),
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
                try:
                    end = await self._attempt(self._session or own, permit)  # type: ignore[arg-type]
                finally:
                    permit.ignore()
                delay = self._backoff.next()
                if not self._stopping:
                    await self._wait("waiting", end.retry_after + delay)
        finally:
            self._state = "stopped"
            if own is not None:
                await own.close()

    async def _wait(self, state: FeedState, seconds: float) -> None:
        self._state, self._next_attempt = state, self._clock() + seconds
        await self._sleep(seconds)

    async def _attempt(self, session: aiohttp.ClientSession, permit: Permit) -> End:
        """Connect, and read until the connection ends."""
        self._state, times = "connecting", self._times
        ws = await open_socket(session, self._url, times, self._max_message)
        if isinstance(ws, End):
            end = ws
        else:
            self._connects += 1
            try:
                connection = self._begin(ws)
                end = await self._use(connection, permit)
                self._note_health(connection, permit)
                if connection.live_since is not None and not self._stopping:
                    await self._reader.lost(end.reason)
            finally:
                self._connection = None
        if not end.asked:
            permit.failure()  # which is nothing if the connection was healthy
        if not self._stopping:
            self._reader.last_error = end.reason
        return end

    def _begin(self, ws: Socket) -> FeedSocket:
        self._reader.check.reconnected()
        self._connection = connection = FeedSocket(ws, self._reader, self._times, self._clock, self._turn)
        return connection

    async def _use(self, connection: FeedSocket, permit: Permit) -> End:
        broken_off = False
        watch = asyncio.create_task(self._watch(connection, permit), name=f"watch {self.exchange}")
        try:
            if not await self._subscribe(connection):
                return connection.ending or End("the subscription could not be sent")
            return await connection.read()
        except BaseException:
            broken_off = connection.ending is None
            raise
        finally:
            if self._reader.check.stats().trades:
                self._reader.silence.lost(self._reader.check.ends())
            await connection.finish(watch, broken_off, lambda: self._stopping)

    async def _subscribe(self, connection: FeedSocket) -> bool:
        messages = self.adapter.subscribe(self.symbols)
        for message in messages:
            if self._sends:
                await self._sends.acquire_async()
            if not await connection.send(message):
                return False
        await connection.subscribed(self.adapter.acks(len(messages), self._natives))
        return True

    async def _watch(self, connection: FeedSocket, permit: Permit) -> None:
        while connection.ending is None:
            self._note_health(connection, permit)
            await asyncio.sleep(await connection.tick())

    def _note_health(self, connection: FeedSocket, permit: Permit) -> None:
        since = connection.live_since
        if since is not None and self._clock() - since >= self._times.healthy_after:
            self._backoff.reset()
            permit.success()
