"""The crawler on asyncio: one event loop and aiohttp over the decisions of crawl/core.py.

    python crawl_async.py urls.txt --csv

The model: one dispatcher takes requests from the frontier, as many at a time as the semaphore has permits, and starts
a task for each: fetch, parse, write the row. A task gives way only where it says ``await``; between two awaits it has
the loop to itself, so nothing here needs a lock against the other tasks, and nothing here may block.

Which work runs where: sockets, TLS, decompression (in small steps) and the parsing of ordinary pages in the loop;
parsing of pages above ``INLINE_PARSE`` bytes, and of costly ones (``crawl.rows.is_costly``), in one thread, looking
URLs up in long robots.txt in another; feeds and articles, in other processes (crawl/readers.py), for each of which a
thread waits; DNS, in the resolver's threads; the list, in a thread; the writing of rows, in one (a pipe may block), fed
in batches by a bounded channel (``RowBatches``): when the reader of the rows is slow, the tasks wait, and the crawl
slows down instead of filling the memory.

Waiting: the dispatcher waits for one event, ``WorkQueue``, set when a task ends, when the list brings more, or by a
timer when the next host is due. Signals come as callbacks of the loop. Locks: none of its own; what the threads beside
the loop do goes through the frontier's, or comes into the loop by ``call_soon_threadsafe``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from coordination import Semaphore
from crawl.cli import main
from crawl.core import Crawl
from crawl.errors import CUT_OFF, FetchError, Postponed
from crawl.hosts import Question
from crawl.http_aiohttp import Fetcher
from crawl.model import Options, Request, Response, ScrapeResult
from crawl.net import detail
from crawl.output import run_in_loop
from crawl.readers import Readers
from runtime.options import EXIT_INTERRUPTED

INLINE_PARSE = 256 * 1024  # largest body in bytes that is parsed in the loop, unless it is costly: 2 to 3 ms

Emit = Callable[[ScrapeResult], Awaitable[object]]
"""Takes a row; True: it says later when it is written (``RowBatches``)."""

# ------------------------------------------------------------------------------------------------------- waiting


class WorkQueue:
    """What goes next, and who waits for it. ``next`` waits until there is something to do, or there will never be."""

    def __init__(self, crawl: Crawl) -> None:
        self._crawl = crawl
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.changed = self._event.set  # the frontier may answer otherwise than before. In the loop.

    async def next(self) -> Request | Question | None:
        """What to do next; None: nothing will ever come. For the dispatcher only."""
        while True:
            decision = self._crawl.frontier.step(self._crawl.clock())
            if not isinstance(decision, float):
                return decision
            self._event.clear()
            timer = self._loop.call_later(decision, self._event.set) if decision < math.inf else None
            try:
                await self._event.wait()
            finally:
                if timer:
                    timer.cancel()

    def changed_elsewhere(self) -> None:
        """``changed``, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more


# -------------------------------------------------------------------------------------------------------- driver


class Driver:
    """A dispatcher and its tasks over one frontier."""

    def __init__(self, crawl: Crawl, emit: Emit) -> None:
        self._crawl, self._emit = crawl, emit
        self._fetcher = Fetcher(crawl)
        self._work = WorkQueue(crawl)
        self._readers = Readers()
        # What is parsed here is in one thread: more would only share one interpreter. What readers read is waited for.
        waits = self._readers.count if crawl.options.feeds else 1
        self._parser = ThreadPoolExecutor(waits, "parser")
        self._matcher = ThreadPoolExecutor(1, "matcher")  # a host need not wait for a parser
        self._slots = Semaphore(crawl.options.concurrency)
        self._loop = asyncio.get_running_loop()
        self._in_flight: set[asyncio.Task[bool]] = set()
        crawl.read = self._readers.read
        crawl.changed = self._work.changed_elsewhere

    async def run(self, urls: Iterable[str]) -> None:
        """Crawl ``urls`` until nothing will ever come and all tasks are done."""
        crawl = self._crawl
        crawl.feed(urls)
        if crawl.options.feeds:
            self._parser.submit(self._readers.start)
        try:
            async with asyncio.TaskGroup() as group:
                await self._dispatch(group)
        finally:
            crawl.frontier.stop()
            self._readers.kill()  # nobody waits for them any more, or only those who are cut off
            self._parser.shutdown(wait=False, cancel_futures=True)
            await self._fetcher.close()
            self._matcher.shutdown(wait=False)
            await asyncio.to_thread(self._readers.close)

    async def _dispatch(self, group: asyncio.TaskGroup) -> None:
        """What the dispatcher does until nothing will ever come."""
        await self._slots.acquire_async()
        while (work := await self._work.next()) is not None:
            if isinstance(work, Question):
                group.create_task(self._consult(work))
                continue
            task = group.create_task(self._handle(work))
            self._in_flight.add(task)
            task.add_done_callback(self._done)
            await self._slots.acquire_async()

    def _done(self, task: asyncio.Task[bool]) -> None:
        self._in_flight.discard(task)
        if task.cancelled() or task.exception() is not None or not task.result():
            self._slots.release()
        self._work.changed()

    async def _consult(self, question: Question) -> None:
        crawl = self._crawl
        await self._loop.run_in_executor(self._matcher, crawl.frontier.consult, question, crawl.clock)
        self._work.changed()

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
        except Postponed as error:
            now = crawl.clock()
            crawl.frontier.put_back(request, now, now + error.delay)
            return False
        except asyncio.CancelledError:
            if not self._fetcher.aborted:
                raise
            row = crawl.broken(request, FetchError("interrupted", CUT_OFF))
        except Exception as error:
            row = crawl.broken(request, FetchError("internal", detail(error)))
        crawl.frontier.finish(request, crawl.clock())  # its host need not wait for the row, as the permit does
        self._work.changed()
        try:
            return row is not None and bool(await self._emit(row))
        except Exception as error:
            crawl.fail(error)
            return False

    def give_back(self, permits: int) -> None:
        """So many rows, whose tasks ended without giving back their permits, are written."""
        for _ in range(permits):
            self._slots.release()

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
        self._work.changed()

    def _force(self) -> None:
        self._fetcher.aborted = True
        self._readers.kill()
        for task in self._in_flight:
            task.cancel()


# ------------------------------------------------------------------------------------------------------- program


def run(crawl: Crawl, urls: Iterable[str], emit: Callable[..., None]) -> None:
    """The crawl of the command line, with signals."""
    run_in_loop(crawl, urls, emit, Driver)


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
    await Driver(crawl, emit).run(urls)
    if crawl.failure is not None:
        raise crawl.failure
    return rows


if __name__ == "__main__":
    sys.exit(main("crawl_async.py", run))
