"""The crawler on asyncio: one event loop and aiohttp over the decisions of crawl_core.

    python crawl_async.py urls.txt --csv

The model: one dispatcher takes requests from the frontier, as many at a time as the semaphore has permits, and starts
a task for each: fetch, parse, write the row. A task gives way only where it says ``await``; between two awaits it has
the loop to itself, so nothing here needs a lock against the other tasks, and nothing here may block.

Which work runs where: sockets, TLS, decompression (in small steps) and the parsing of ordinary pages in the loop;
parsing of pages above ``INLINE_PARSE`` bytes in one thread, looking URLs up in long robots.txt in another; feeds and
articles in other processes (crawl/readers.py), for each of which a thread waits, so that the exit never does; DNS in
the resolver's threads; the list is read in a thread, and the rows are written in one (a pipe may block), fed by a
bounded ``Channel``: when the reader of the rows is slow, the tasks wait, and the crawl slows down instead of filling
the memory.

Waiting: the dispatcher waits for one event, set when a task ends, when the list brings more, or by a timer when the
next host is due.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import math
import os
import queue
import re
import signal
import socket
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from coordination import Channel, Semaphore
from crawl.cli import EXIT_INTERRUPTED, main
from crawl.core import Crawl, patience
from crawl.frontier import Question
from crawl.net import BodyDecoder, ProxyRule, Resolver, TimeLimit, allowed, detail, tls_detail
from crawl.readers import Readers
from crawl.rules import (
    CUT_OFF,
    FetchError,
    Options,
    Postponed,
    Request,
    Response,
    ScrapeResult,
    may_go_anywhere,
    read_headers,
)
from runtime.serving import Lag, new_loop

INLINE_PARSE = 256 * 1024
"""Largest body in bytes that is parsed in the loop: 2 to 3 ms."""

Emit = Callable[[ScrapeResult], Awaitable[object]]
"""Takes a row; True: it says later when it is written (``Rows``)."""

# -------------------------------------------------------------------------------------------------- connections

_in_hand: contextvars.ContextVar[Request] = contextvars.ContextVar("request")


END_OF_HEAD = re.compile(rb"\n\r?\n")


class HeadFirst(ResponseHandler):
    """aiohttp's end of a connection, which lets the parser have a head before the bytes of the body that came with it:
    a fault in those would take the head too, and what it says. Who reads the body is told of the fault."""

    _end_of_last = b""
    """The last bytes of what has come of a head."""

    def data_received(self, data: bytes) -> None:
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
        connection = await super().connect(*args, **more)
        request, began, clock = _in_hand.get(), time.monotonic(), self._crawl.clock
        try:
            while (wait := self._crawl.frontier.clear_to_send(request, clock())) > 0.0:  # noqa: ASYNC110
                # The loop's timers are good to a millisecond: sleep a little less, and yield for the rest.
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
        addresses = allowed(host, await self._resolver.lookup_async(host), anywhere=self._anywhere)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in addresses
        ]

    async def close(self) -> None:
        """The resolver serves others too."""


# -------------------------------------------------------------------------------------------------------- fetch


class _Within:
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
        self.aborted = False
        """Whoever is cancelled from now on has been cut off."""
        self._free, self._guarded = (
            aiohttp.ClientSession(
                connector=GatedConnector(
                    crawl,
                    self._resolver,
                    anywhere=anywhere,
                    limit=0,
                    ssl=not options.insecure,
                    use_dns_cache=False,
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
        _in_hand.set(request)
        request.held, limit = 0.0, TimeLimit(self._crawl.remaining(request))
        try:
            outcome = await self._fetch(request, limit)
        except FetchError as error:
            outcome = error
        except (OSError, aiohttp.ClientError, ValueError) as error:
            outcome = self._explain(error)
        outcome.seconds = max(0.0, time.monotonic() - started - request.held - limit.ours())
        return outcome

    async def _fetch(self, request: Request, limit: TimeLimit) -> Response:
        anywhere = may_go_anywhere(self._options, request)
        url, headers = self._crawl.headers(request)
        proxy = self._proxy.find(url)
        session = self._free if anywhere or proxy else self._guarded
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=self._options.connect_timeout,
            ceil_threshold=math.inf,
        )
        async with _Within(limit):
            response = await session.get(
                URL(url, encoded=True),
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                proxy=proxy,
            )
        async with response:
            answer = Response(response.status, read_headers(response.raw_headers), b"")
            seconds = patience(request, answer.status)
            try:
                async with _Within(limit if seconds is None else TimeLimit(seconds, limit)):
                    answer.body = await self._body(request, answer, response)
                return answer
            except FetchError as error:
                failure = error
            except TimeoutError:
                failure = FetchError("timeout", self._too_late(), status=answer.status)
            except aiohttp.ClientPayloadError as error:
                failure = _payload_error(error, answer.status)
            except (OSError, aiohttp.ClientConnectionError) as error:
                failure = FetchError("truncated", detail(error), status=answer.status)
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
        if length is not None and length > limit and not cut:
            raise FetchError("too_large", f"{length} bytes", status=status)
        body = BodyDecoder(answer.headers.get("Content-Encoding"), limit, status, cut=cut)
        while not body.full and (data := await response.content.readany()):
            for step, _ in enumerate(body.feed(data)):
                if step:
                    await asyncio.sleep(0)
        if body.full:
            response.close()
        return body.finish()

    def _too_late(self) -> str:
        return f"no complete answer within {self._options.timeout:g} s"

    def _explain(self, error: Exception) -> FetchError:
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return FetchError("timeout", "no connection in time")
        if isinstance(error, TimeoutError):
            return FetchError("timeout", self._too_late())
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return FetchError("dns", error.strerror or str(error))
        if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
            cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
            return FetchError("tls", tls_detail(cause))
        if isinstance(error, aiohttp.ClientConnectorError):
            return FetchError("connect", error.os_error.strerror or str(error.os_error))
        if isinstance(error, aiohttp.ClientHttpProxyError):
            return FetchError("connect", f"the proxy answered {error.status}")
        if isinstance(error, (aiohttp.ClientConnectionError, OSError)):
            return FetchError("reset", detail(error))
        return FetchError("protocol", detail(error))

    async def close(self) -> None:
        await self._free.close()
        await self._guarded.close()
        self._resolver.close()


def _payload_error(error: aiohttp.ClientPayloadError, status: int) -> FetchError:
    cause = error.__cause__
    if isinstance(cause, aiohttp.http_exceptions.BadHttpMessage) and not isinstance(
        cause, (aiohttp.http_exceptions.ContentLengthError, aiohttp.http_exceptions.TransferEncodingError)
    ):
        return FetchError("protocol", detail(cause), status=status)
    return FetchError("truncated", detail(cause or error), status=status)


# -------------------------------------------------------------------------------------------------------- tasks


class Tasks:
    """The driver: a dispatcher and its tasks over one frontier."""

    def __init__(self, crawl: Crawl, emit: Emit) -> None:
        self._crawl, self._emit = crawl, emit
        self._fetcher = Fetcher(crawl)
        self._slots = Semaphore(crawl.options.concurrency)
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._readers = Readers(crawl.processes)
        crawl.read = self._readers.read
        # What is parsed here is in one thread: more would only share one interpreter. What readers read is waited for.
        waits = self._readers.count if crawl.options.feeds else 1
        self._parser = concurrent.futures.ThreadPoolExecutor(waits, "parser")
        self._matcher = concurrent.futures.ThreadPoolExecutor(1, "matcher")  # a host need not wait for a parser
        self._in_flight: set[asyncio.Task[bool]] = set()
        crawl.changed = self._changed

    def _changed(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    async def _next(self, group: asyncio.TaskGroup) -> Request | None:
        while True:
            decision = self._crawl.frontier.step(self._crawl.clock())
            if isinstance(decision, Question):
                group.create_task(self._consult(decision))
                continue
            if decision is None or isinstance(decision, Request):
                return decision
            self._wake.clear()
            timer = self._loop.call_later(decision, self._wake.set) if decision < math.inf else None
            try:
                await self._wake.wait()
            finally:
                if timer:
                    timer.cancel()

    async def run(self, urls: Iterable[str]) -> None:
        """Crawl ``urls`` until nothing will ever come and all tasks are done."""
        self._crawl.feed(urls)
        if self._crawl.options.feeds:
            self._parser.submit(self._readers.start)
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._slots.acquire_async()
                    request = await self._next(group)
                    if request is None:
                        break
                    task = group.create_task(self._handle(request))
                    self._in_flight.add(task)
                    task.add_done_callback(self._done)
        finally:
            self._crawl.frontier.stop()
            self._readers.kill()  # nobody waits for them any more, or only those who are cut off
            self._parser.shutdown(wait=False, cancel_futures=True)
            await self._fetcher.close()
            self._matcher.shutdown(wait=False)
            await asyncio.to_thread(self._readers.close)

    async def _consult(self, question: Question) -> None:
        crawl = self._crawl
        await self._loop.run_in_executor(self._matcher, crawl.frontier.consult, question, crawl.clock)
        self._wake.set()

    def _done(self, task: asyncio.Task[bool]) -> None:
        self._in_flight.discard(task)
        if task.cancelled() or task.exception() is not None or not task.result():
            self._slots.release()
        self._wake.set()

    def give_back(self, permits: int) -> None:
        """So many rows, whose tasks ended without giving back their permits, are written."""
        for _ in range(permits):
            self._slots.release()

    async def _handle(self, request: Request) -> bool:
        """True: the permit goes with the row, and is given back when that is written."""
        crawl = self._crawl
        final: Response | FetchError | None
        try:
            outcome = request.error or await self._fetcher.fetch(request)
            final = crawl.judge(request, outcome)
            if final is None:
                return False
            if isinstance(final, Response) and crawl.is_long(request, final, INLINE_PARSE):
                row = await self._loop.run_in_executor(self._parser, crawl.complete, request, final)
            else:
                row = crawl.complete(request, final)
        except Postponed:
            now = crawl.clock()
            crawl.frontier.put_back(request, now, now)
            return False
        except asyncio.CancelledError:
            if not self._fetcher.aborted:
                raise
            row = crawl.broken(request, FetchError("interrupted", CUT_OFF))
        except Exception as error:
            row = crawl.broken(request, FetchError("internal", detail(error)))
        crawl.frontier.finish(request, crawl.clock())  # its host need not wait for the row, as the permit does
        self._wake.set()
        try:
            return row is not None and bool(await self._emit(row))
        except Exception as error:
            crawl.fail(error)
            return False

    def stop(self) -> None:
        """First call: finish what is in flight, at most for the grace time. Second: cut it off. Third: exit."""
        if not self._crawl.interrupted:
            self._crawl.interrupted = True
            self._crawl.frontier.stop()
            self._loop.call_later(self._crawl.options.grace, self._force)
        elif not self._fetcher.aborted:
            self._force()
        else:
            os._exit(EXIT_INTERRUPTED)
        self._wake.set()

    def cut_off(self) -> None:
        """Both at once."""
        if not self._crawl.interrupted:
            self.stop()
        self._force()

    def _force(self) -> None:
        self._fetcher.aborted = True
        self._readers.kill()
        for task in self._in_flight:
            task.cancel()


class Rows:
    """The way of the rows to the thread that writes them: in batches, since each hand-over makes two threads contend
    for the interpreter. A batch goes when it is full, or ``AGE`` seconds after its first row. The permits of its tasks
    go with it and come back when it is written, so what a ``kill -9`` costs is no more than is in flight: a batch is a
    quarter of that."""

    SIZE, AGE = 100, 0.05

    def __init__(self, emit: Callable[..., None], concurrency: int = 4 * SIZE) -> None:
        self._emit = emit
        self._size = max(1, min(self.SIZE, concurrency // 4))
        self._loop = asyncio.get_running_loop()
        self._batch: list[ScrapeResult] = []
        self._batches: Channel[list[ScrapeResult]] = Channel(10)
        self.written: Callable[[int], None] = lambda rows: None
        """Told, in the loop, how many rows were written (or cannot be)."""
        self._writer = threading.Thread(target=self._write, name="writer")
        self._writer.start()

    def _write(self) -> None:
        for batch in self._batches:
            self._emit(*batch)
            self._loop.call_soon_threadsafe(self.written, len(batch))

    async def put(self, row: ScrapeResult) -> bool:
        """Take ``row``: True. Waits while the writer is far behind."""
        self._batch.append(row)
        if len(self._batch) >= self._size:
            batch, self._batch = self._batch, []
            try:
                await self._batches.put_async(batch)
            except BaseException:
                self._batch[:0] = batch
                raise
        elif len(self._batch) == 1:
            self._loop.call_later(self.AGE, self._too_old, self._batch)
        return True

    def _too_old(self, batch: list[ScrapeResult]) -> None:
        if batch is self._batch:
            try:
                self._batches.put_nowait(batch)
            except queue.Full:  # the writer is busy: the batch may grow until it is full
                self._loop.call_later(self.AGE, self._too_old, batch)
            else:
                self._batch = []

    async def close(self) -> None:
        """Every row that was put is written when this returns."""
        if self._batch:
            await self._batches.put_async(self._batch)
            self._batch = []
        self._batches.close()
        await asyncio.to_thread(self._writer.join)


async def _program(crawl: Crawl, urls: Iterable[str], emit: Callable[..., None]) -> None:
    rows, lag = Rows(emit, crawl.options.concurrency), Lag()
    crawl.loop_lags, watch = lag.recent, asyncio.create_task(lag.watch())
    try:
        async with crawl.joined(rows.put) as put:
            driver = Tasks(crawl, put)
            if put == rows.put:
                rows.written = driver.give_back
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, driver.stop)
            await driver.run(urls)
    finally:
        watch.cancel()
        await rows.close()


def run(crawl: Crawl, urls: Iterable[str], emit: Callable[..., None]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_program(crawl, urls, emit))


async def scrape_all(
    urls: Iterable[str],
    options: Options | None = None,
    *,
    on_result: Callable[[ScrapeResult], Awaitable[None] | None] | None = None,
) -> list[ScrapeResult]:
    """Fetch ``urls``; returns the rows in order of completion.

    With ``on_result`` (a function, or an async one: the crawl then goes no faster than it) each row goes there
    instead and the list returned is empty. ``urls`` is iterated in a thread. What ``on_result`` or the iteration
    raises ends the run and is raised here. Cancelling it cuts off what is in flight.
    """
    rows: list[ScrapeResult] = []

    async def emit(row: ScrapeResult) -> None:
        if on_result is None:
            rows.append(row)
        elif inspect.isawaitable(answer := on_result(row)):
            await answer
        crawl.stats.count_row(row)

    crawl = Crawl(options or Options())
    await Tasks(crawl, emit).run(urls)
    if crawl.failure is not None:
        raise crawl.failure
    return rows


if __name__ == "__main__":
    sys.exit(main("crawl_async.py", run))
