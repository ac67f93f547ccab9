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
import re
import socket
import time
import weakref
from typing import Any, cast

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from crawl.addresses import may_go_anywhere
from crawl.core import Crawl, patience
from crawl.errors import CUT_OFF, FetchError
from crawl.headers import read_headers
from crawl.model import Request, Response
from crawl.net import BodyDecoder, ProxyRule, Resolver, TimeLimit, allowed, detail, explained, tls_detail

END_OF_HEAD = re.compile(rb"\n\r?\n")
current_request: contextvars.ContextVar[Request] = contextvars.ContextVar("request")
"""The request that the running task fetches, for the connector, to which aiohttp does not pass it."""


def _payload_error(error: aiohttp.ClientError, status: int) -> FetchError:
    cause = error.__cause__
    if isinstance(cause, aiohttp.http_exceptions.BadHttpMessage) and not isinstance(
        cause, (aiohttp.http_exceptions.ContentLengthError, aiohttp.http_exceptions.TransferEncodingError)
    ):
        return FetchError("protocol", detail(cause), status=status)
    return FetchError("truncated", detail(cause or error), status=status)


def _explained(error: Exception, seconds: float) -> FetchError:
    """``explained``, of what aiohttp raises before the answer."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return FetchError("timeout", "no connection in time")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return FetchError("dns", error.strerror or str(error))
    if isinstance(error, aiohttp.ClientSSLError):
        cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
        return FetchError("tls", tls_detail(cause))
    if isinstance(error, aiohttp.ClientConnectorError):
        return FetchError("connect", error.os_error.strerror or str(error.os_error))
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return FetchError("connect", f"the proxy answered {error.status}")
    if isinstance(error, aiohttp.ClientConnectionError) and not isinstance(error, OSError):
        return FetchError("reset", detail(error))
    return explained(error, seconds)


class HeadFirst(ResponseHandler):
    """aiohttp's end of a connection, which lets the parser have a head before the bytes of the body that came with it:
    a fault in those would take the head too, and what it says. Who reads the body is told of the fault."""

    _end_of_last = b""  # the last bytes of what has come of a head

    def data_received(self, data: bytes) -> None:
        """Gives the parser a head by itself, then what came behind it."""
        rest = data
        while rest and (self._payload is None or self._payload.is_eof()):  # interim heads may come before the answer's
            found = END_OF_HEAD.search(self._end_of_last + rest)
            if found is None:
                self._end_of_last = (self._end_of_last + rest)[-3:]
                break
            end = found.end() - len(self._end_of_last)
            self._end_of_last = b""
            super().data_received(rest[:end])
            rest = rest[end:]
        if rest or not data:  # nothing at all means to aiohttp: go on with what you have
            super().data_received(rest)
        fault, body = self._exception, self._payload
        if fault is not None and body is not None and not body.is_eof() and body.exception() is None:
            error = aiohttp.ClientPayloadError()
            error.__cause__ = aiohttp.http_exceptions.BadHttpMessage(str(getattr(fault, "message", fault)))
            body.set_exception(error)


class GatedConnector(aiohttp.TCPConnector):
    """aiohttp's connection pool, with the last word on politeness: when the connection is open, and nothing sent yet,
    the request waits for its turn. It knows every socket that it opened, for at the end some are in nobody's hands: a
    TLS connection that waits for the other side's goodbye is no longer in the pool.

    Unless it may go ``anywhere`` it opens sockets to public addresses only, so none of its pool leads elsewhere. The
    names are judged where they are resolved; an address in the URL itself, which aiohttp resolves on its own, here.
    """

    def __init__(self, crawl: Crawl, resolver: Resolver, *, anywhere: bool, **more: Any) -> None:
        super().__init__(socket_factory=self._open, resolver=LoopResolver(resolver, anywhere=anywhere), **more)
        self._crawl, self._anywhere = crawl, anywhere
        self._factory = cast(Any, functools.partial(HeadFirst, loop=self._loop))
        self._opened: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def _open(self, address: aiohttp.AddrInfoType) -> socket.socket:
        where = str(address[4][0])
        allowed(where, [(socket.AddressFamily(address[0]), where)], anywhere=self._anywhere)
        opened = socket.socket(*address[:3])
        self._opened.add(opened)
        return opened

    async def connect(self, *args: Any, **more: Any) -> Any:
        """A connection on which the request of this task may be sent now. Raises Postponed."""
        connection = await super().connect(*args, **more)
        request, began, clock = current_request.get(), time.monotonic(), self._crawl.clock
        try:
            while (wait := self._crawl.frontier.clear_to_send(request, clock())) > 0.0:
                if wait == math.inf and request.told:
                    await request.told.parked()
                else:  # the loop's timers are good to a millisecond: sleep a little less, and yield for the rest
                    await asyncio.sleep(wait - 0.001 if wait > 0.0015 else 0)
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

    def __init__(self, resolver: Resolver, *, anywhere: bool) -> None:
        self._resolver, self._anywhere = resolver, anywhere

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of ``host`` that may be connected to."""
        addresses = allowed(host, await self._resolver.lookup_async(host), anywhere=self._anywhere)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in addresses
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
        session = self._free if anywhere or proxy else self._guarded
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._options.connect_timeout, ceil_threshold=math.inf)
        async with DeadlineScope(limit):
            response = await session.get(
                URL(url, encoded=True), headers=headers, timeout=timeout, allow_redirects=False, proxy=proxy
            )
        async with response:
            answer = Response(response.status, read_headers(response.raw_headers), b"")
            seconds = patience(request, answer.status)
            try:
                async with DeadlineScope(limit if seconds is None else TimeLimit(seconds, limit)):
                    answer.body = await self._body(request, answer, response)
                return answer
            except (FetchError, OSError) as error:
                failure = explained(error, self._options.timeout, answer.status)
            except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError) as error:
                failure = _payload_error(error, answer.status)
            except asyncio.CancelledError:
                response.close()
                if not self.aborted:
                    raise
                raise FetchError("interrupted", CUT_OFF, status=answer.status) from None
            response.close()
            failure.answer = answer
            raise failure

    async def _body(self, request: Request, answer: Response, response: aiohttp.ClientResponse) -> bytes:
        status = answer.status
        length = 0 if status in (204, 304) else response.content_length
        limit, cut = self._crawl.max_bytes(request)
        body = BodyDecoder(answer.headers.get("Content-Encoding"), limit, status, cut=cut, length=length)
        while not body.full and (data := await response.content.readany()):
            for step, _ in enumerate(body.feed(data)):
                if step:
                    await asyncio.sleep(0)
        if body.full:
            response.close()
        return body.finish()

    async def close(self) -> None:
        """Close every connection; look-ups that still run fail."""
        await self._free.close()
        await self._guarded.close()
        self._resolver.close()
