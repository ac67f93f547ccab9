"""The crawler on threads: ThreadPoolExecutor, urllib and html.parser over the decisions of crawl/core.py.

    python crawl_threads.py urls.txt

The model: each of up to ``concurrency`` worker threads runs the same plain loop: take a request, fetch, parse, write
the row; or take a URL that is to be looked up in a long robots.txt, and do that. It blocks wherever it likes, and the
others go on. A thread may lose the interpreter between any two instructions, so what threads share has a lock.

Which work runs where: everything in the workers but the parsing of large robots.txt, in one thread; feeds and articles,
in other processes (crawl/readers.py), for which the worker waits; DNS, in the resolver's threads, so that it can time
out; the list, in a thread. What Python code computes does not run in parallel (one interpreter lock).

Waiting: workers with nothing to do block on one condition, ``WorkQueue``. Only one of them at a time, the timekeeper,
waits with a time limit for the next host to be due; so a wake-up wakes one thread, not all. The main thread waits for
the workers and for signals, which a thread of their own reads. Locks: ``WorkQueue._condition`` guards who keeps the
time and is held around ``Frontier.step`` (condition -> frontier), so that no wake-up is missed; ``Driver._lock`` guards
the number of workers.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from coordination import new_lock
from crawl.cli import main
from crawl.core import Crawl
from crawl.errors import FetchError, Postponed
from crawl.hosts import Question
from crawl.http_urllib import Fetcher
from crawl.model import Options, Request, Response, ScrapeResult
from crawl.net import detail
from crawl.readers import Readers
from crawl.robots import LARGE
from runtime.loop import stopped_by_signals_in_a_thread
from runtime.options import EXIT_INTERRUPTED

Emit = Callable[[ScrapeResult], object]  # takes a row; returns when it is written

# ------------------------------------------------------------------------------------------------------- waiting


class WorkQueue:
    """What goes next, and who waits for it. ``next`` blocks until there is something to do, or there will never be."""

    def __init__(self, crawl: Crawl) -> None:
        self._crawl = crawl
        self._condition = threading.Condition(new_lock("WorkQueue"))
        self._waiting = 0
        self._alarm = math.inf  # until when the present timekeeper waits

    @property
    def idle(self) -> bool:
        """Whether somebody waits for work."""
        return self._waiting > 0

    def next(self) -> Request | Question | None:
        """What to do next; None: nothing will ever come. For the workers."""
        with self._condition:
            while True:
                now = self._crawl.clock()
                decision = self._crawl.frontier.step(now)
                if decision is None:
                    self._condition.notify_all()
                    return None
                if not isinstance(decision, float):
                    if self._waiting:
                        self._condition.notify()  # the watch over the next host passes on
                    return decision
                self._waiting += 1
                if now + decision < self._alarm:
                    mine = self._alarm = now + decision
                    self._condition.wait(decision)
                    if self._alarm == mine:
                        self._alarm = math.inf
                else:
                    self._condition.wait()
                self._waiting -= 1

    def changed(self) -> None:
        """The frontier may answer otherwise than before. From any thread."""
        with self._condition:
            if self._waiting:
                self._condition.notify()


# -------------------------------------------------------------------------------------------------------- driver


class Driver:
    """Worker threads over one frontier. A worker that takes a request while no other waits for one starts the next, so
    there are no more than have work, and one; and where the system gives no more, those that there are."""

    def __init__(self, crawl: Crawl, emit: Emit) -> None:
        self._crawl, self._emit = crawl, emit
        self._fetcher = Fetcher(crawl)
        self._work = WorkQueue(crawl)
        self._readers = Readers()
        self._parser = ThreadPoolExecutor(1, "parser")
        self._pool = ThreadPoolExecutor(crawl.options.concurrency, thread_name_prefix="worker")
        self._lock = new_lock("Driver")
        self._most, self._running = crawl.options.concurrency, 0
        self._failure: BaseException | None = None
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        crawl.read = self._readers.read
        crawl.changed = self._work.changed

    def run(self, urls: Iterable[str]) -> None:
        """Crawl ``urls`` until nothing will ever come and all workers are done."""
        crawl = self._crawl
        crawl.feed(urls)
        if crawl.options.feeds:
            self._readers.start()
        try:
            self._start()
            limit: float | None = None
            while True:
                try:
                    event = self._events.get(timeout=limit)
                except queue.Empty:
                    event = "stop"
                if event == "done":
                    break
                if not crawl.interrupted:
                    crawl.interrupted = True
                    crawl.frontier.stop()
                    limit = crawl.options.grace
                elif not self._fetcher.aborted:
                    self._force()
                    limit = None
                else:
                    os._exit(EXIT_INTERRUPTED)
                self._work.changed()
        except BaseException:
            crawl.frontier.stop()
            self._force()
            self._work.changed()
            raise
        finally:
            self._pool.shutdown()
            self._parser.shutdown()
            self._fetcher.close()
            self._readers.close()
        if self._failure is not None:
            raise self._failure

    def _start(self) -> None:
        with self._lock:
            if self._running >= self._most:
                return
            self._running += 1
        try:
            self._pool.submit(self._loop).add_done_callback(self._done)
        except RuntimeError as error:
            with self._lock:
                self._running -= 1
                first = self._most == self._crawl.options.concurrency
                self._most = left = self._running
            if not left:
                raise
            if first:
                self._crawl.say(f"goes on with {left:,} threads: {error}")

    def _loop(self) -> None:
        """What each worker does until nothing will ever come."""
        while (work := self._work.next()) is not None:
            if self._running < self._most and not self._work.idle:
                self._start()
            if isinstance(work, Question):
                self._crawl.frontier.consult(work, self._crawl.clock)
            else:
                self._handle(work)
            self._work.changed()

    def _done(self, worker: Future[None]) -> None:
        self._failure = self._failure or worker.exception()
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            self._events.put("done")

    def _handle(self, request: Request) -> None:
        crawl = self._crawl
        try:
            outcome = request.error or self._fetcher.fetch(request)
            final = crawl.judge(request, outcome)
            if final is None:
                return
            if request.kind == "robots" and isinstance(final, Response) and crawl.is_long(request, final, LARGE):
                # It takes many times its size: once, not once for each worker, and not in each one's part of the heap.
                row = self._parser.submit(crawl.complete, request, final).result()
            else:
                row = crawl.complete(request, final)
        except Postponed as error:
            now = crawl.clock()
            crawl.frontier.put_back(request, now, now + error.delay)
            return
        except Exception as error:
            row = crawl.broken(request, FetchError("internal", detail(error)))
        try:
            if row is not None:
                self._emit(row)
        except Exception as error:
            crawl.fail(error)
        crawl.frontier.finish(request, crawl.clock())

    def stop(self) -> None:
        """First call: finish what is in flight, at most for the grace time. Second: cut it off. Third: exit."""
        self._events.put("stop")

    def _force(self) -> None:
        self._fetcher.abort()
        self._readers.kill()


# ------------------------------------------------------------------------------------------------------- program


def run(crawl: Crawl, urls: Iterable[str], emit: Emit) -> None:
    """The crawl of the command line, with signals."""
    driver = Driver(crawl, emit)
    with stopped_by_signals_in_a_thread(driver.stop):
        driver.run(urls)


def scrape_all(
    urls: Iterable[str], options: Options | None = None, *, on_result: Callable[[ScrapeResult], None] | None = None
) -> list[ScrapeResult]:
    """Fetch ``urls``; returns the rows in order of completion.

    With ``on_result`` each row goes there instead (called by worker threads, several at a time) and the list returned
    is empty. What ``on_result`` or the iteration of ``urls`` raises ends the run and is raised here.
    """
    rows: list[ScrapeResult] = []
    crawl = Crawl(options or Options())
    Driver(crawl, on_result or rows.append).run(urls)
    if crawl.failure is not None:
        raise crawl.failure
    return rows


if __name__ == "__main__":
    sys.exit(main("crawl_threads.py", run))
