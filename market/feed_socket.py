"""One WebSocket connection to an exchange, and how it ends: with a close frame wherever it is we who end it.

What the exchange had sent before it saw our close frame is still read, for at most ``close_within`` seconds; then the
reader is woken. Not so after a cancellation, or an error of the user's: then the close frame and a moment for the
exchange's own are all. Nothing of the connection is left when ``finish`` returns, whoever cancels it.

It runs in two tasks of its feed, one that reads and one that looks at the time, in one event loop; there is no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import aiohttp
from aiohttp import ClientWSTimeout, WSMsgType

from coordination import Clock
from market.frames import FrameReader
from market.trade import Parsed, short
from runtime.http_dates import parse_retry_after

CLOSE_GRACE = 0.25  # seconds for the exchange's close frame when nothing is read any more
NORMAL, GOING_AWAY = b"\x03\xe8", b"\x03\xe9"  # codes of close frames: 1000, 1001
RETRY_AFTER_LIMIT = 300.0  # seconds, at most, that an exchange's Retry-After is obeyed
_QUERY = re.compile(r"\?[^\s'\"]*")

Socket = aiohttp.ClientWebSocketResponse[Literal[False]]


class End(NamedTuple):
    """How an attempt to have a connection ended."""

    reason: str
    asked: bool = False  # by the exchange, or by `stop`: no failure
    retry_after: float = 0.0


def _without_query(error: BaseException) -> str:
    """An error's text without any address's query: keys stand there."""
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return f"the handshake was refused: HTTP {error.status}"
    text = short(_QUERY.sub("?…", str(error)))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class FeedTimes:
    """How long a feed waits, in seconds."""

    connect_within: float = 10.0  # the handshake
    ack_within: float = 10.0  # the acknowledgement of the subscription
    ping_every: float = 20.0  # by the protocol; the exchange's own are the adapter's
    pong_within: float = 10.0  # any sign of life after a ping
    send_within: float = 5.0  # a message is written
    close_within: float = 2.0  # the exchange's close frame
    silent_after: float | None = None  # without any frame a connection is dead; None: the adapter's
    stale_after: float = 300.0  # a symbol without a trade while others trade is stale
    renew_after: float = 1800.0  # then a new connection is worth a try
    healthy_after: float = 30.0  # a connection that lasts has ended a series of failures
    base: float = 1.0  # of the waits between attempts
    cap: float = 30.0


async def open_socket(session: aiohttp.ClientSession, url: str, times: FeedTimes, max_message: int) -> Socket | End:
    """A connection to ``url``, or why there is none. ``max_message``: bytes of a frame."""
    try:
        async with asyncio.timeout(times.connect_within):
            return await session.ws_connect(
                url,
                timeout=ClientWSTimeout(ws_close=min(CLOSE_GRACE, times.close_within)),
                autoping=False,
                autoclose=False,
                max_msg_size=max_message,
                decode_text=False,
            )
    except TimeoutError:
        return End(f"no connection within {times.connect_within:g} s")
    except aiohttp.WSServerHandshakeError as error:
        value = error.headers.get("Retry-After") if error.headers else None
        after = parse_retry_after(value, maximum=RETRY_AFTER_LIMIT)
        return End(_without_query(error), retry_after=after or 0.0)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return End(_without_query(error))


class Limits:
    """Of one connection since ``begun``: when to ping, and what has lasted for too long. Pure.

    ``message_every``: seconds between the pings that the exchange wants as messages.
    """

    def __init__(self, begun: float, times: FeedTimes, silent_after: float, message_every: float) -> None:
        self._times, self._silent_after, self._message_every = times, silent_after, message_every
        self._ack_by = begun + times.ack_within
        self._next_ping, self._next_message = begun + times.ping_every, begun + message_every
        self._pinged = math.inf  # when the first ping was sent after which nothing came

    def message_is_due(self, now: float) -> bool:
        """Whether the exchange's own ping is due; it is taken as sent."""
        due = now >= self._next_message
        if due:
            self._next_message = now + self._message_every
        return due

    def ping_is_due(self, now: float, received_at: float) -> bool:
        """Whether a ping of the protocol is due; it is taken as sent. ``received_at``: when anything came."""
        if received_at >= self._pinged:
            self._pinged = math.inf
        due = now >= self._next_ping
        if due:
            self._next_ping, self._pinged = now + self._times.ping_every, min(self._pinged, now)
        return due

    def exceeded(self, now: float, message_at: float, subscribing: bool, refusal: str) -> str:
        """What has lasted for too long. ``message_at``: when anything but a pong came; ``refusal``: the exchange's."""
        if subscribing and now >= self._ack_by:
            return f"no acknowledgement within {self._times.ack_within:g} s{': ' if refusal else ''}{refusal}"
        if now >= message_at + self._silent_after:
            return f"silent for {self._silent_after:g} s"
        if now >= self._pinged + self._times.pong_within:
            return f"no sign of life {self._times.pong_within:g} s after a ping"
        return ""

    def next(self, message_at: float, subscribing: bool) -> float:
        """When to look again."""
        ack_by = self._ack_by if subscribing else math.inf
        silent_at, pong_by = message_at + self._silent_after, self._pinged + self._times.pong_within
        return min(self._next_message, self._next_ping, ack_by, silent_at, pong_by)


class FeedSocket:
    """A connection, from the handshake to its end; its frames go to ``reader``. Two tasks: ``read``, and ``tick``."""

    def __init__(self, ws: Socket, reader: FrameReader, times: FeedTimes, clock: Clock, turn: float) -> None:
        self._ws, self._reader, self._times, self._clock, self._turn = ws, reader, times, clock, turn
        adapter, now = reader.adapter, clock()
        silent_after = adapter.silent_after if times.silent_after is None else times.silent_after
        self._limits = Limits(now, times, silent_after, adapter.ping_every or math.inf)
        self._received_at = self._message_at = now  # when anything came; when anything but a pong came
        self._reading = self._cut = self._finishing = False
        """Whether the reader waits for a frame; whether it is to read no more; whether it has ended."""
        self._wanted = math.inf  # acknowledgements; before ``subscribed`` it is not known how many
        self._acks = self._refusals = 0
        self.live_since: float | None = None  # when the subscription was acknowledged
        self.ending: End | None = None  # why it is to end, once that has begun
        self._timer: asyncio.TimerHandle | None = None
        self._closer: asyncio.Task[bool] | None = None

    @property
    def state(self) -> Literal["subscribing", "live", "closing"]:
        """What it is about."""
        if self._finishing or self.ending is not None:
            return "closing"
        return "subscribing" if self.live_since is None else "live"

    async def send(self, message: str) -> bool:
        """Write a message; whether that could be done in time."""
        try:
            async with asyncio.timeout(self._times.send_within):
                await self._ws.send_str(message)
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False  # the connection's end comes to the reader
        return True

    async def subscribed(self, wanted: int) -> None:
        """The subscription is sent; so many acknowledgements are to come."""
        self._wanted = wanted
        await self._count_acks()

    async def _count_acks(self) -> None:
        answered = self._acks + self._refusals >= self._wanted and (self._acks or not self._wanted)
        if answered and self.state == "subscribing":
            self.live_since = self._clock()
            await self._reader.live()

    async def read(self) -> End:
        """Read until the connection ends; how it did."""
        ws, clock, turn = self._ws, self._clock, time.monotonic()
        while not self._cut:
            self._reading = True
            message = await ws.receive()
            self._reading = False
            self._received_at = now = clock()
            kind = message.type
            if kind is WSMsgType.TEXT or kind is WSMsgType.BINARY:
                self._message_at = now
                found = self._reader.take(message.data, now)
                if isinstance(found, Parsed):
                    await self._control(found)
                elif found is not None:
                    await found
                    self._received_at = self._message_at = clock()
            elif kind is WSMsgType.PING:
                self._message_at = now
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await ws.pong(message.data)
            elif kind is WSMsgType.ERROR:
                text = f"the connection broke the protocol: {short(message.data)}"
                if (waits := self._reader.broken(text)) is not None:
                    await waits
                return self.ending or End(text)
            elif kind is not WSMsgType.PONG:
                return self.ending or End(self._close_reason(message))
            if time.monotonic() - turn > self._turn:
                await asyncio.sleep(0)
                turn = time.monotonic()
        return self.ending or End("cut")

    async def _control(self, said: Parsed) -> None:
        """What the exchange says of the connection."""
        self._acks += said.kind == "ack"
        self._refusals += said.kind == "error"
        await self._count_acks()
        if said.reconnect:
            await self.begin_close(End(f"the exchange asked for it: {said.note}", asked=True))

    async def tick(self) -> float:
        """Send the pings that are due, and end what has lasted for too long. Seconds until the next look."""
        now, limits, reader = self._clock(), self._limits, self._reader
        if limits.message_is_due(now) and (text := reader.adapter.ping()) is not None:
            await self.send(text)
        if limits.ping_is_due(now, self._received_at):
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await self._ws.ping()
        subscribing = self.state == "subscribing"
        if self._reading:
            reason = limits.exceeded(now, self._message_at, subscribing, reader.last_error if self._refusals else "")
            renewal = "" if reason else reader.silence.renewal(self.live_since)
            if reason or renewal:
                await self.begin_close(End(reason or renewal, asked=not reason))
        return min(1.0, max(0.01 if self._reading else 0.05, limits.next(self._message_at, subscribing) - now))

    def _close_reason(self, message: Any) -> str:
        """How the exchange ended the connection, by the last that was received."""
        if message.type is WSMsgType.CLOSE:
            return f"the exchange closed: {message.data} {short(message.extra or '')}".rstrip()
        error = self._ws.exception()
        return "the connection ended without a close frame" + (f": {_without_query(error)}" if error else "")

    async def begin_close(self, end: End, code: bytes = GOING_AWAY) -> None:
        """Begin to end it, by a close frame. What comes before the exchange's own is still read.

        The first reason stands, but for that of a stop (NORMAL).
        """
        first = self.ending is None
        if self._finishing or not (first or code == NORMAL):
            return
        self.ending = end
        if first:
            self._timer = asyncio.get_running_loop().call_later(self._times.close_within, self._cut_off)
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                async with asyncio.timeout(self._times.send_within):
                    await self._ws.send_frame(code, WSMsgType.CLOSE)

    def _cut_off(self) -> None:
        """No close frame came. If the reader waits for one, it is woken; else it will see."""
        self._cut = True
        if self._reading:
            self._closer = asyncio.create_task(self._ws.close())

    async def finish(self, watch: asyncio.Task[None], broken_off: bool, stopping: Callable[[], bool]) -> None:
        """Nothing of the connection, nor of the task that watches it, is left."""
        self._finishing = True
        if self._timer is not None:
            self._timer.cancel()
        watch.cancel()
        try:
            await asyncio.wait((watch,))
            if self._closer is not None:
                _, late = await asyncio.wait((self._closer,), timeout=self._times.close_within)
                if late:  # the exchange goes on sending, and aiohttp goes on waiting for its close frame
                    self._closer.cancel()
                    await asyncio.wait((self._closer,))
            if broken_off:
                await self._send_close(NORMAL if stopping() else GOING_AWAY)
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._times.close_within):
                    await self._ws.close(code=1000 if stopping() else 1001)
        if not watch.cancelled() and (error := watch.exception()) is not None:
            raise error

    async def _send_close(self, code: bytes) -> None:
        """The close frame after a cancellation or an error of the user's, and a moment for the exchange's own: a socket
        that is closed with something unread is reset, and the exchange may never see the frame."""
        frames = (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING, WSMsgType.PONG)
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(min(CLOSE_GRACE, self._times.close_within)):
                await self._ws.send_frame(code, WSMsgType.CLOSE)
                while (await self._ws.receive()).type in frames:
                    pass
