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
  is subscribed for `healthy_after`; a Retry-After comes on top. Five failures within a minute open the breaker, which
  waits longer. A failure is an attempt or connection that ended unhealthy, unless the exchange had asked for that.
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
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple

import aiohttp
from aiohttp import ClientWSTimeout, WSMsgType

from coordination import Clock, Rng, stats_repr
from market.adapter import Adapter, SequenceCheck
from market.trade import BadFrame, Parsed, Trade, short
from primitives import CircuitBreaker, CircuitOpen, Permit, RetryPolicy
from runtime.http_dates import parse_retry_after

Emit = Callable[[str, list[Trade]], Awaitable[object] | None]
"""Told the exchange and a frame's trades, labelled. What it returns is awaited if it is not None."""

Dead = Callable[[str, str, bytes, int], Awaitable[object] | None]
"""Told the exchange, the reason, the frame, and when it was received (Unix time, ns). Awaited likewise."""

State = Literal["idle", "connecting", "subscribing", "live", "closing", "waiting", "refused", "stopped"]

MAX_MESSAGE = 4 << 20  # bytes of a frame; Gemini's books come near to one
TURN = 0.004  # seconds of work, of all feeds together, after which the loop's other tasks have their turn
RETRY_AFTER_LIMIT = 300.0  # seconds
GOODBYE = 0.25  # seconds for the exchange's close frame when nothing is read any more
NORMAL, GOING_AWAY = b"\x03\xe8", b"\x03\xe9"  # codes of close frames: 1000, 1001
_QUERY = re.compile(r"\?[^\s'\"]*")

Socket = aiohttp.ClientWebSocketResponse[Literal[False]]


def new_session() -> aiohttp.ClientSession:
    """With the system's resolver: an installed c-ares is taken otherwise, which knows nothing of nsswitch.conf."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=aiohttp.ThreadedResolver()))


class FeedStats(NamedTuple):
    """Counts since the beginning."""

    exchange: str
    state: State
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


class _End(NamedTuple):
    """How an attempt ended."""

    reason: str
    asked: bool = False  # by the exchange, or by `stop`: no failure
    retry_after: float = 0.0


def without_query(error: BaseException) -> str:
    """An error's text without any address's query: keys stand there."""
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return f"the handshake was refused: HTTP {error.status}"
    text = short(_QUERY.sub("?…", str(error)))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
        self._stale_after, self._renew_after, self._patience = stale_after, renew_after, renew_after
        self._policy = RetryPolicy(attempts=sys.maxsize, base=base, cap=cap, total=math.inf)
        self.breaker = breaker or CircuitBreaker(
            adapter.name,
            window=60.0,
            jitter=0.5,
            probe_timeout=connect_within + ack_within + healthy_after + 30.0,
            clock=clock,
            rng=rng,
        )
        self.check = SequenceCheck()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._state: State = "idle"
        self._connects = self._failures = self._frames = self._bad = self._outages = self._errors = 0
        self._lag = math.nan
        self._note = self._last_error = ""
        self._next_attempt = 0.0
        self._pending: set[str] = set()  # symbols of which nothing has come since the connection was lost
        self._traded: dict[str, float] = {}  # when each symbol's last trade came
        # of one connection:
        self._ws: Socket | None = None
        self._permit: Permit | None = None
        self._wanted = self._acks = self._refusals = 0
        self._since: float | None = None
        self._heard = self._told = 0.0  # when anything came; when anything but a pong came
        self._reading = False
        self._ending: _End | None = None
        self._cut = False
        self._timer: asyncio.TimerHandle | None = None
        self._closer: asyncio.Task[bool] | None = None

    # ------------------------------------------------------------------------------ for others

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
        elif self._ws is not None:
            await self._part(_End("stopped", asked=True), NORMAL)
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
            failures=self._failures,
            since=None if self._since is None else now - self._since,
            frames=self._frames,
            trades=found.trades,
            bad=self._bad,
            gaps=found.gaps,
            missed=found.missed,
            outages=self._outages,
            duplicates=found.duplicates,
            disorder=found.disorder,
            errors=self._errors,
            lag=self._lag,
            breaker=self.breaker.state,
            retry_in=max(0.0, self._next_attempt - now) if self._state in ("waiting", "refused") else 0.0,
            note=self._note,
            last_error=self._last_error,
            stale=self._stale(self._stale_after),
        )

    def _stale(self, seconds: float) -> tuple[str, ...]:
        """Symbols that had been silent for so long when another one's last trade came, on this connection."""
        since = self._since
        if since is None or not self._traded:
            return ()
        newest, traded = max(self._traded.values()), self._traded.get
        return tuple(name for name in self.symbols if newest - max(traded(name, since), since) >= seconds)

    __repr__ = stats_repr

    # ------------------------------------------------------------------------------ attempts

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
                if not self._stopping:
                    delay = self._policy.delay(self._failures, self._rng) or 0.0
                    await self._wait("waiting", end.retry_after + delay)
        finally:
            self._state, self._since = "stopped", None
            if own is not None:
                await own.close()

    def _settle(self, end: _End) -> None:
        """What the end of an attempt means for the next one."""
        healthy = self._check_health()
        self._failures += 1
        if not healthy and not end.asked and self._permit is not None:
            self._permit.failure()
        self._since = None
        if not self._stopping:
            self._last_error = end.reason

    def _check_health(self) -> bool:
        healthy = self._since is not None and self._clock() - self._since >= self._healthy_after
        if healthy:
            self._failures = 0
            if self._permit is not None:
                self._permit.success()
        return healthy

    async def _wait(self, state: State, seconds: float) -> None:
        self._state, self._next_attempt = state, self._clock() + seconds
        await self._sleep(seconds)

    async def _attempt(self, session: aiohttp.ClientSession) -> _End:
        self._state = "connecting"
        try:
            async with asyncio.timeout(self._connect_within):
                ws = await session.ws_connect(
                    self._url,
                    timeout=ClientWSTimeout(ws_close=min(GOODBYE, self._close_within)),
                    autoping=False,
                    autoclose=False,
                    max_msg_size=self._max_message,
                    decode_text=False,
                )
        except TimeoutError:
            return _End(f"no connection within {self._connect_within:g} s")
        except aiohttp.WSServerHandshakeError as error:
            value = error.headers.get("Retry-After") if error.headers else None
            after = parse_retry_after(value, maximum=RETRY_AFTER_LIMIT)
            return _End(without_query(error), retry_after=after or 0.0)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return _End(without_query(error))
        self._connects += 1
        self._begin(ws)
        watch, broken_off = asyncio.create_task(self._watch(ws), name=f"watch {self.exchange}"), False
        try:
            if not await self._subscribe(ws):
                return self._ending or _End("the subscription could not be sent")
            return await self._read(ws)
        except BaseException:
            broken_off = self._ending is None
            raise
        finally:
            self._ws, self._state = None, "closing"
            await self._leave(ws, watch, broken_off)

    async def _leave(self, ws: Socket, watch: asyncio.Task[None], broken_off: bool) -> None:
        """Nothing of the connection is left, whoever cancels this."""
        if self._timer is not None:
            self._timer.cancel()
        if self.check.stats().trades:
            self._pending.update(self.symbols)
        watch.cancel()
        try:
            await asyncio.wait((watch,))
            if self._closer is not None:
                _, late = await asyncio.wait((self._closer,), timeout=self._close_within)
                if late:  # the exchange goes on sending, and aiohttp goes on waiting for its close frame
                    self._closer.cancel()
                    await asyncio.wait((self._closer,))
            if broken_off:
                await self._say_goodbye(ws)
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._close_within):
                    await ws.close(code=1000 if self._stopping else 1001)
        if not watch.cancelled() and (error := watch.exception()) is not None:
            raise error

    async def _say_goodbye(self, ws: Socket) -> None:
        """The close frame after a cancellation or an error of the user's, and a moment for the exchange's own: a socket
        that is closed with something unread is reset, and the exchange may never see the frame."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(min(GOODBYE, self._close_within)):
                await ws.send_frame(NORMAL if self._stopping else GOING_AWAY, WSMsgType.CLOSE)
                while (await ws.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING, WSMsgType.PONG):
                    pass

    def _begin(self, ws: Socket) -> None:
        self._ws, self._state, self._ending, self._cut, self._reading = ws, "subscribing", None, False, False
        self._timer = self._closer = None
        self._acks = self._refusals = 0
        self._heard = self._told = self._clock()
        self.check.reconnected()

    async def _subscribe(self, ws: Socket) -> bool:
        messages = self.adapter.subscribe(self.symbols)
        self._wanted = self.adapter.acks(len(messages), self._natives)
        for n, message in enumerate(messages):
            if n and self.adapter.pace:
                await self._sleep(self.adapter.pace)
            if not await self._send(ws, message):
                return False
        self._look_at_acks()
        return True

    def _look_at_acks(self) -> None:
        answered = self._acks + self._refusals >= self._wanted and (self._acks or not self._wanted)
        if answered and self._ending is None:
            self._state, self._since = "live", self._clock()

    async def _send(self, ws: Socket, message: str | bytes) -> bool:
        try:
            async with asyncio.timeout(self._send_within):
                await (ws.send_str(message) if isinstance(message, str) else ws.send_bytes(message))
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False  # the connection's end comes to the reader
        return True

    # ------------------------------------------------------------------------------ the connection

    async def _read(self, ws: Socket) -> _End:
        clock, turn = self._clock, time.monotonic()
        while not self._cut:
            self._reading = True
            message = await ws.receive()
            self._reading = False
            self._heard = now = clock()
            kind = message.type
            if kind is WSMsgType.TEXT or kind is WSMsgType.BINARY:
                self._told = now
                waits = self._take(ws, message.data)
                if waits is not None:
                    await waits
                    self._heard = self._told = clock()
            elif kind is WSMsgType.PING:
                self._told = now
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await ws.pong(message.data)
            elif kind is not WSMsgType.PONG:
                return await self._ended(ws, message)
            if time.monotonic() - turn > self._turn:
                await asyncio.sleep(0)
                turn = time.monotonic()
        return self._ending or _End("cut")

    async def _ended(self, ws: Socket, message: Any) -> _End:
        if message.type is WSMsgType.ERROR:
            text = f"the connection broke the protocol: {short(message.data)}"
            self._bad += 1
            waits = self._dead(self.exchange, text, b"", self._wall())
            if waits is not None:
                await waits
        elif message.type is WSMsgType.CLOSE:
            text = f"the exchange closed: {message.data} {short(message.extra or '')}".rstrip()
        else:
            error = ws.exception()
            text = "the connection ended without a close frame" + (f": {without_query(error)}" if error else "")
        return self._ending or _End(text)

    def _take(self, ws: Socket, frame: bytes) -> Awaitable[object] | None:
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
            if self._pending:
                trades = self._after_outage(trades)
            for trade in trades:
                self._traded[trade.symbol] = self._told
            self._measure(trades[-1])
            if parsed.reply is None and not parsed.reconnect:
                return self._emit(self.exchange, trades)
        return self._other(ws, parsed, trades)

    def _measure(self, trade: Trade) -> None:
        if "snapshot" not in trade.flags:
            lag = (trade.received_ts_ns - trade.exchange_ts_ns) / 1e3
            self._lag = lag if self._lag != self._lag else self._lag + 0.05 * (lag - self._lag)

    def _after_outage(self, trades: list[Trade]) -> list[Trade]:
        """The first trade of a symbol after a lost connection: nothing but its number can tell that none is missing."""
        pending, told = self._pending, []
        for trade in trades:
            if trade.symbol in pending:
                pending.discard(trade.symbol)
                if trade.sequence is None and not ("snapshot" in trade.flags and "duplicate" in trade.flags):
                    self._outages += 1
                    if "gap" not in trade.flags:
                        trade = trade._replace(flags=f"{trade.flags},gap" if trade.flags else "gap")
            told.append(trade)
        return told

    async def _other(self, ws: Socket, parsed: Parsed, trades: list[Trade]) -> None:
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
                self._look_at_acks()
        elif parsed.kind == "status":
            self._note = parsed.note
        if parsed.reply is not None:
            await self._send(ws, parsed.reply)
        if parsed.reconnect:
            await self._part(_End(f"the exchange asked for it: {parsed.note}", asked=True), GOING_AWAY)

    async def _part(self, end: _End, code: bytes) -> None:
        """Begin to end the connection: the close frame. What comes before the exchange's own is still read."""
        ws = self._ws
        if ws is None or (self._ending is not None and not self._stopping):
            return
        first, self._ending = self._ending is None, end
        self._state = "closing"
        if first:
            self._timer = asyncio.get_running_loop().call_later(self._close_within, self._time_is_up)
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                async with asyncio.timeout(self._send_within):
                    await ws.send_frame(code, WSMsgType.CLOSE)

    def _time_is_up(self) -> None:
        """No close frame came. If the reader waits for one, it is woken; else it will see."""
        self._cut = True
        if self._reading and self._ws is not None:
            self._closer = asyncio.create_task(self._ws.close())

    def _renewal(self) -> str:
        """Why a new connection is worth a try, for a symbol's sake; it takes longer and longer until that helps."""
        if stale := self._stale(self._patience):
            self._patience *= 2
            return f"nothing of {short(', '.join(stale))}"
        flowing = max(self._traded.values(), default=-math.inf) - (self._since or math.inf)
        if flowing >= self._renew_after and not self._stale(self._renew_after):
            self._patience = self._renew_after
        return ""

    async def _watch(self, ws: Socket) -> None:
        """Pings, and the limits of silence, of acknowledgement, of health."""
        adapter, begun = self.adapter, self._clock()
        next_ping = begun + self._ping_every
        pinged = math.inf
        next_message = begun + (adapter.ping_every or math.inf)
        while self._ending is None:
            now = self._clock()
            self._check_health()
            if self._heard >= pinged:
                pinged = math.inf
            if now >= next_message and adapter.ping_every is not None:
                next_message = now + adapter.ping_every
                text = adapter.ping()
                if text is not None:
                    await self._send(ws, text)
            if now >= next_ping:
                next_ping, pinged = now + self._ping_every, min(pinged, now)
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await ws.ping()
            ack_by = begun + self._ack_within if self._state == "subscribing" else math.inf
            silent_at, pong_by = self._told + self._silent_after, pinged + self._pong_within
            if self._reading:
                reason = ""
                if now >= ack_by:
                    reason = self._last_error if self._refusals else ""
                    reason = f"no acknowledgement within {self._ack_within:g} s{': ' if reason else ''}{reason}"
                elif now >= silent_at:
                    reason = f"silent for {self._silent_after:g} s"
                elif now >= pong_by:
                    reason = f"no sign of life {self._pong_within:g} s after a ping"
                renewal = "" if reason else self._renewal()
                if reason or renewal:
                    await self._part(_End(reason or renewal, asked=not reason), GOING_AWAY)
                    return
            healthy_at = math.inf if self._since is None else self._since + self._healthy_after
            due = min(next_message, next_ping, ack_by, silent_at, pong_by, healthy_at if healthy_at > now else math.inf)
            await asyncio.sleep(min(1.0, max(0.01 if self._reading else 0.05, due - now)))


def _being_cancelled() -> bool:
    task: asyncio.Task[Any] | None = asyncio.current_task()
    return task is not None and task.cancelling() > 0
