"""One WebSocket connection to an exchange, and how it ends: with a close frame wherever it is we who end it.

What the exchange had sent before it saw our close frame is still read, for at most ``close_within`` seconds; then the
reader is woken. Not so after a cancellation, or an error of the user's: then the close frame and a moment for the
exchange's own are all. Nothing of the connection is left when ``leave`` returns, whoever cancels it.

All of it runs in the tasks of its feed, in one event loop; there is no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import aiohttp
from aiohttp import ClientWSTimeout, WSMsgType

from market.trade import short
from runtime.http_dates import parse_retry_after

GOODBYE = 0.25
"""Seconds for the exchange's close frame when nothing is read any more."""
NORMAL, GOING_AWAY = b"\x03\xe8", b"\x03\xe9"
"""Codes of close frames: 1000, 1001."""
RETRY_AFTER_LIMIT = 300.0
"""Seconds, at most, that an exchange's Retry-After is obeyed."""
_QUERY = re.compile(r"\?[^\s'\"]*")

Socket = aiohttp.ClientWebSocketResponse[Literal[False]]


class End(NamedTuple):
    """How an attempt to have a connection ended."""

    reason: str
    asked: bool = False  # by the exchange, or by `stop`: no failure
    retry_after: float = 0.0


def without_query(error: BaseException) -> str:
    """An error's text without any address's query: keys stand there."""
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return f"the handshake was refused: HTTP {error.status}"
    text = short(_QUERY.sub("?…", str(error)))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def open_socket(
    session: aiohttp.ClientSession, url: str, within: float, close_within: float, max_message: int
) -> Socket | End:
    """A connection to ``url`` in ``within`` seconds, or why there is none."""
    try:
        async with asyncio.timeout(within):
            return await session.ws_connect(
                url,
                timeout=ClientWSTimeout(ws_close=min(GOODBYE, close_within)),
                autoping=False,
                autoclose=False,
                max_msg_size=max_message,
                decode_text=False,
            )
    except TimeoutError:
        return End(f"no connection within {within:g} s")
    except aiohttp.WSServerHandshakeError as error:
        value = error.headers.get("Retry-After") if error.headers else None
        after = parse_retry_after(value, maximum=RETRY_AFTER_LIMIT)
        return End(without_query(error), retry_after=after or 0.0)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return End(without_query(error))


class FeedSocket:
    """A connection since ``now`` (by the feed's clock)."""

    def __init__(self, ws: Socket, now: float, *, close_within: float, send_within: float) -> None:
        self.ws = ws
        self.heard = self.told = now
        """When anything came; when anything but a pong came."""
        self.reading = self.cut = False
        """Whether the reader waits for a frame; whether it is to read no more."""
        self.ending: End | None = None
        self._close_within, self._send_within = close_within, send_within
        self._timer: asyncio.TimerHandle | None = None
        self._closer: asyncio.Task[bool] | None = None

    async def send(self, message: str | bytes) -> bool:
        try:
            async with asyncio.timeout(self._send_within):
                await (self.ws.send_str(message) if isinstance(message, str) else self.ws.send_bytes(message))
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False  # the connection's end comes to the reader
        return True

    def farewell(self, message: aiohttp.WSMessage) -> str:
        """How the exchange ended the connection, by the last that was received."""
        if message.type is WSMsgType.CLOSE:
            return f"the exchange closed: {message.data} {short(message.extra or '')}".rstrip()
        error = self.ws.exception()
        return "the connection ended without a close frame" + (f": {without_query(error)}" if error else "")

    async def part(self, end: End, code: bytes) -> None:
        """Begin to end the connection: the close frame. What comes before the exchange's own is still read."""
        first, self.ending = self.ending is None, end
        if first:
            self._timer = asyncio.get_running_loop().call_later(self._close_within, self._time_is_up)
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                async with asyncio.timeout(self._send_within):
                    await self.ws.send_frame(code, WSMsgType.CLOSE)

    def _time_is_up(self) -> None:
        """No close frame came. If the reader waits for one, it is woken; else it will see."""
        self.cut = True
        if self.reading:
            self._closer = asyncio.create_task(self.ws.close())

    async def leave(self, watch: asyncio.Task[None], broken_off: bool, stopping: Callable[[], bool]) -> None:
        """Nothing of the connection, nor of the task that watches it, is left."""
        if self._timer is not None:
            self._timer.cancel()
        watch.cancel()
        try:
            await asyncio.wait((watch,))
            if self._closer is not None:
                _, late = await asyncio.wait((self._closer,), timeout=self._close_within)
                if late:  # the exchange goes on sending, and aiohttp goes on waiting for its close frame
                    self._closer.cancel()
                    await asyncio.wait((self._closer,))
            if broken_off:
                await self._say_goodbye(NORMAL if stopping() else GOING_AWAY)
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._close_within):
                    await self.ws.close(code=1000 if stopping() else 1001)
        if not watch.cancelled() and (error := watch.exception()) is not None:
            raise error

    async def _say_goodbye(self, code: bytes) -> None:
        """The close frame after a cancellation or an error of the user's, and a moment for the exchange's own: a socket
        that is closed with something unread is reset, and the exchange may never see the frame."""
        frames = (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING, WSMsgType.PONG)
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(min(GOODBYE, self._close_within)):
                await self.ws.send_frame(code, WSMsgType.CLOSE)
                while (await self.ws.receive()).type in frames:
                    pass
