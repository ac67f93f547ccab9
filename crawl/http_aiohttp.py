"""The HTTP client of the crawler on asyncio: aiohttp, whose connections wait for their turn before they send.

Everything runs in the event loop, but DNS, which does in the resolver's threads. Nothing holds the loop up: bodies are
decoded in small steps, with a turn of the loop between them. Leave to send is asked for when the connection is open
(``GatedConnector.connect``). Requests that may go anywhere, and those to public addresses only, have a pool each.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import math
import os
import socket
import time
import weakref
from typing import Any, cast

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpVersion11, RawResponseMessage
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from crawl.addresses import may_go_anywhere
from crawl.core import Crawl, patience
from crawl.errors import CUT_OFF, FetchError
from crawl.http1 import MAX_HEAD, Answer, Head
from crawl.model import Request, Response
from crawl.net import BodyDecoder, ProxyRule, Resolver, TimeLimit, allowed, detail, explained, readable, tls_detail

_NO_HEADERS = CIMultiDictProxy(CIMultiDict[str]())
current_request: contextvars.ContextVar[Request] = contextvars.ContextVar("request")
"""The request that the running task fetches, for the connector, to which aiohttp does not pass it."""

through_proxy: contextvars.ContextVar[bool] = contextvars.ContextVar("through_proxy", default=False)


def _explained(error: Exception, seconds: float) -> FetchError:
    """``explained``, of what aiohttp raises before the answer."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return FetchError("timeout", "no connection in time")
    if isinstance(error, aiohttp.ClientSSLError):
        cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
        return FetchError("tls", tls_detail(cause))
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = error.os_error  # whose text names the address
        return FetchError("connect", os.strerror(reason.errno) if reason.errno else str(reason))
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return FetchError("connect", f"the proxy answered {error.status}")
    if isinstance(error, aiohttp.ClientConnectionError) and not isinstance(error, OSError):
        return FetchError("reset", detail(error))
    return explained(error, seconds)


class Lost(Exception):
    """A kept connection brought no answer but its end, or rubbish: another one is to be asked (RFC 9112, 9.3.1)."""


class Body(aiohttp.StreamReader):
    """The body of an answer, as aiohttp hands it on, and what our reader says of that answer."""

    answer: Answer
    begun = False  # its head was handed on


class Reading(ResponseHandler):
    """aiohttp's end of a connection, which reads HTTP/1.1 as the other driver does (crawl/http1.py)."""

    _body: Body | None = None
    _kept = False  # it has brought an answer

    def is_idle(self) -> bool:
        """Whether a request can be sent on it: it is open, and since its last answer nothing has come."""
        transport = self._live()
        return transport is not None and not (self._kept and readable(transport.get_extra_info("socket")))

    def _live(self) -> asyncio.Transport | None:
        return self.transport if self.is_connected() else None

    def without_answer(self, fault: FetchError) -> Exception:
        """What to raise where none comes."""
        return Lost() if self._kept else fault

    def set_response_params(self, *, read_bufsize: int = 1 << 16, **_: Any) -> None:
        """An answer is to come."""
        self._payload = self._body = Body(self, read_bufsize, loop=self._loop)
        self._body.answer = Answer()
        early, self._tail = self._tail, b""
        self.data_received(early)
        self.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Reads on. What comes when nothing was asked for, or nothing any more, belongs to no request."""
        body = self._body
        if body is None:
            self._tail += data
            if len(self._tail) > MAX_HEAD:
                self.pause_reading()
        elif not body.answer.over:
            self._hand_on(body, body.answer.feed(data))
        elif data and self.transport:
            self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The answer ends here, complete or not."""
        body = self._body
        while body and body.answer.more:
            self._hand_on(body, body.answer.feed())
        if body and not (answer := body.answer).over:
            status = answer.head.status if answer.head else None
            answer.end(explained(exc, 0, status) if isinstance(exc, Exception) else None)
            self._hand_on(body, b"")
        super().connection_lost(exc)

    def _hand_on(self, body: Body, data: bytes) -> None:
        answer = body.answer
        if answer.over and not answer.reusable:
            self._should_close = True
        if answer.more:
            self.pause_reading()
            self._loop.call_soon(self._go_on)
        if answer.head is None:
            if fault := answer.fault:
                self.set_exception(self.without_answer(fault))
            return
        if not body.begun:
            body.begun = self._kept = True
            status = answer.head.status
            message = RawResponseMessage(HttpVersion11, status, "", _NO_HEADERS, (), False, None, False, False)
            self.feed_data((message, body))
        body.feed_data(data)
        if answer.over:
            body.feed_eof()

    def _go_on(self) -> None:
        self.data_received(b"")
        self.resume_reading()

    def pause_reading(self) -> None:
        """More has come than is read."""
        if (transport := self._live()) and not self._reading_paused:
            self._reading_paused = True
            transport.pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """It is read again."""
        unread = self._body and self._body.answer.more
        if (transport := self._live()) and self._reading_paused and not unread:
            self._reading_paused = False
            transport.resume_reading()


class GatedConnector(aiohttp.TCPConnector):
    """aiohttp's connection pool, with the last word on politeness: when the connection is open, and nothing sent yet,
    the request waits for its turn. It knows every socket that it opened, for at the end some are in nobody's hands: a
    TLS connection that waits for the other side's goodbye is no longer in the pool.

    Unless it may go ``anywhere`` it opens sockets to public addresses only, so none of its pool leads elsewhere. The
    names are judged where they are resolved; an address in the URL itself, which aiohttp resolves on its own, here.
    """

    def __init__(self, crawl: Crawl, resolver: Resolver, *, anywhere: bool, **more: Any) -> None:
        names = LoopResolver(resolver, anywhere=anywhere, one=crawl.options.per_address > 0)
        super().__init__(socket_factory=self._open, resolver=names, **more)
        self._crawl, self._anywhere = crawl, anywhere
        self._factory = cast(Any, functools.partial(Reading, loop=self._loop))
        self._opened: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def _open(self, address: aiohttp.AddrInfoType) -> socket.socket:
        where = str(address[4][0])
        allowed(where, [(socket.AddressFamily(address[0]), where)], anywhere=self._anywhere)
        if not through_proxy.get():
            self._crawl.frontier.connects(current_request.get(), where)
        try:
            opened = socket.socket(*address[:3])
        except OSError as error:
            for idle in self._conns.values():
                for protocol, _ in idle:
                    protocol.close()
            self._conns.clear()
            raise self._crawl.no_socket(error) from None
        self._opened.add(opened)
        return opened

    async def connect(self, *args: Any, **more: Any) -> Any:
        """A connection on which the request of this task may be sent now. Raises Postponed, Lost."""
        connection = await super().connect(*args, **more)
        request, began, clock = current_request.get(), time.monotonic(), self._crawl.clock
        try:
            while (wait := self._crawl.frontier.clear_to_send(request, clock())) > 0.0:
                if wait == math.inf and request.told:
                    await request.told.parked()
                else:  # the loop's timers are good to a millisecond: sleep a little less, and yield for the rest
                    await asyncio.sleep(wait - 0.001 if wait > 0.0015 else 0)
            reading = cast(Reading, connection.protocol)
            if not reading.is_idle():
                connection.close()
                raise reading.without_answer(FetchError("reset", "closed without an answer"))
        except BaseException:
            connection.release()
            raise
        request.held = time.monotonic() - began
        return connection

    async def close(self, *, abort_ssl: bool = False) -> None:
        """Every transport has closed its socket when this returns, or a second has passed."""
        await super().close(abort_ssl=abort_ssl)
        give_up = time.monotonic() + 1.0
        while (left := [one for one in self._opened if one.fileno() >= 0]) and time.monotonic() < give_up:
            for one in left:
                with contextlib.suppress(OSError):  # it was not connected, or is no longer
                    one.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(0.001)


class LoopResolver(AbstractResolver):
    """The crawlers' resolver, as aiohttp wants it. Fails with FetchError."""

    def __init__(self, resolver: Resolver, *, anywhere: bool, one: bool) -> None:
        self._resolver, self._anywhere, self._most = resolver, anywhere, 1 if one else None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of ``host`` that may be connected to."""
        addresses = allowed(host, await self._resolver.lookup_async(host), anywhere=self._anywhere)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in addresses[: self._most]
        ]

    async def close(self) -> None:
        """The resolver serves others too."""


class DeadlineScope:
    """``asyncio.timeout``, by a ``TimeLimit``: what holds up the loop does not count."""

    def __init__(self, limit: TimeLimit) -> None:
        self._limit, self._scope = limit, asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._scope.__aenter__()
        self._look()

    async def __aexit__(self, *raised: Any) -> None:
        if self._timer:
            self._timer.cancel()
        await self._scope.__aexit__(*raised)

    def _look(self) -> None:
        try:
            self._timer = self._loop.call_later(self._limit.next_step(), self._look)
        except TimeoutError:
            self._scope.reschedule(self._loop.time())


class Fetcher:
    """``await fetch(request) -> Response or FetchError``, on two sessions for all tasks: one for requests that may
    go anywhere and for what goes through a proxy, one for the rest, whose connections all lead to public addresses."""

    def __init__(self, crawl: Crawl) -> None:
        options = crawl.options
        self._crawl, self._options = crawl, options
        self._proxy = ProxyRule(options.proxy)
        self._resolver = Resolver()
        self.aborted = False  # whoever is cancelled from now on has been cut off
        self._free, self._guarded = (
            aiohttp.ClientSession(
                connector=GatedConnector(
                    crawl, self._resolver, anywhere=anywhere, limit=0, ssl=not options.insecure, use_dns_cache=False
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
            for anywhere in (True, False)
        )

    async def fetch(self, request: Request) -> Response | FetchError:
        """Raises Postponed; all that the network does comes back as a FetchError."""
        started = time.monotonic()
        outcome: Response | FetchError
        current_request.set(request)
        request.held, limit = 0.0, TimeLimit(self._crawl.remaining(request))
        try:
            outcome = await self._fetch(request, limit)
        except (FetchError, OSError, aiohttp.ClientError, ValueError) as error:
            outcome = _explained(error, self._options.timeout)
        outcome.seconds = max(0.0, time.monotonic() - started - request.held - limit.ours())
        return outcome

    async def _fetch(self, request: Request, limit: TimeLimit) -> Response:
        anywhere = may_go_anywhere(self._options, request)
        url, headers = self._crawl.headers(request)
        proxy = self._proxy.find(url)
        through_proxy.set(proxy is not None)
        session = self._free if anywhere or proxy else self._guarded
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._options.connect_timeout, ceil_threshold=math.inf)
        async with DeadlineScope(limit):
            while True:
                with contextlib.suppress(Lost):
                    response = await session.get(
                        URL(url, encoded=True), headers=headers, timeout=timeout, allow_redirects=False, proxy=proxy
                    )
                    break
        async with response:
            body = cast(Body, response.content)
            head = body.answer.head
            assert head
            answer = Response(head.status, head.headers, b"")
            seconds = patience(request, answer.status)
            try:
                async with DeadlineScope(limit if seconds is None else TimeLimit(seconds, limit)):
                    answer.body = await self._body(request, head, body)
                return answer
            except (FetchError, OSError) as error:
                failure = explained(error, self._options.timeout, answer.status)
            except asyncio.CancelledError:
                if not self.aborted:
                    raise
                raise FetchError("interrupted", CUT_OFF, status=answer.status) from None
            finally:
                response.close()
            failure.answer = answer
            raise failure

    async def _body(self, request: Request, head: Head, coming: Body) -> bytes:
        limit, cut = self._crawl.max_bytes(request)
        coding = head.headers.get("Content-Encoding")
        body = BodyDecoder(coding, limit, head.status, cut=cut, length=head.length)
        while not body.full and (data := await coming.readany()):
            for step, _ in enumerate(body.feed(data)):
                if step:
                    await asyncio.sleep(0)
        if coming.answer.fault and not body.full:
            raise coming.answer.fault
        return body.finish()

    async def close(self) -> None:
        """Close every connection; look-ups that still run fail."""
        await self._free.close()
        await self._guarded.close()
        self._resolver.close()
