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
import inspect
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable

from coordination import Channel, Semaphore
from crawl.cli import main
from crawl.core import Crawl
from crawl.errors import CUT_OFF, FetchError, Postponed
from crawl.hosts import Question
from crawl.http_aiohttp import Fetcher
from crawl.model import Options, Request, Response, ScrapeResult
from crawl.net import detail
from crawl.output import EXIT_INTERRUPTED
from crawl.readers import Readers
from runtime.serving import Lag, new_loop

INLINE_PARSE = 256 * 1024
"""Largest body in bytes that is parsed in the loop: 2 to 3 ms."""

Emit = Callable[[ScrapeResult], Awaitable[object]]
"""Takes a row; True: it says later when it is written (``Rows``)."""

# -------------------------------------------------------------------------------------------------- connections


# -------------------------------------------------------------------------------------------------------- fetch


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
