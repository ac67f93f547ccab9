"""One crawl in several processes, ``--processes N``: the frontier is here, helpers fetch and read what it grants.

All decisions are made here, as in one process: politeness, robots.txt, scope, traps, caps, equal bodies, what is tried
again, which rows there are. So every option means the same, and only what takes a page most of its time, to fetch and
to parse it, is done by the ``helpers`` (crawl/helper.py): processes that run the program's own driver.

Promised
- A host is sent ``burst + rate * t`` requests at most: a helper asks for its turn when the connection is open. The
  answer is the moment of sending, and comes ``AHEAD`` seconds before it, so that the way between processes costs no
  time; the requests of a host are as far apart as these moments, for who is late (``crawl.helper.LATE``) asks again.
- A helper that dies is replaced, and gives its grants back to the frontier: what was in flight is asked for again. A
  request that two died with is tried alone, by a helper that has nothing else. If that one dies too its row is
  ``internal``, and the crawl goes on. ``STILLBORN`` helpers in a row that died before they began end it.
- So is one that sends what is no message, or says nothing for ``FROZEN`` seconds longer than a request may take: it is
  killed.
- Helpers do not hear Ctrl-C; the first one lets them finish what is granted, the second ends them. They end with this
  process, also if it is killed.

A host goes to the same helper if that one has not much more to do than the others: its connections are there.

Where what runs: all in one event loop, and all of a frame at once: no task for each request. Robots.txt, sitemaps,
feeds and articles are read in threads, as in crawl_async.py, rows are written in another; dead helpers are replaced in
threads. No locks of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from coordination import wait_for_event
from crawl.core import Crawl
from crawl.errors import CUT_OFF, FetchError, Postponed
from crawl.grants import frame, messages, of_request, unpack
from crawl.helper import help_out
from crawl.hosts import Question
from crawl.model import CrawlResult, Options, Request, Response, ScrapeResult
from crawl.net import detail
from crawl.output import Emit, Run, peak_memory_mb, run_in_loop
from crawl.readers import Readers
from runtime.loop import beside
from runtime.options import EXIT_INTERRUPTED
from runtime.processes import how_it_ended, start_child

AHEAD = 0.06  # seconds before the moment of sending that a helper is told of it
INLINE = 64 * 1024  # largest body in bytes that is read in the loop; pages have none here
STILLBORN = 3
ALONE = 2  # helpers that died with a request before it is tried alone
FROZEN = 10.0  # seconds beyond the time limit of a request that a helper, which has one, may say nothing
WATCH = 0.5  # seconds between two looks at that
PARTING = 1.0  # seconds for a helper to say what it used


class Helper(asyncio.Protocol):
    """One helper, and those that take its place when it dies. ``parent`` is told of all that happens to it."""

    parent: Parent

    def __init__(self, number: int, options: Options, program: Run) -> None:
        self.number, self._options, self._program = number, options, program
        self.granted: dict[int, Request] = {}
        self.alive = False
        self.requests = self.deaths = self.stillborn = 0
        self.quiet = 0.0  # seconds for which it has said nothing, and has something to do
        self.usage: tuple[float, float] = 0.0, 0.0  # seconds of processor time, and MB at most
        self._transport: Any = None
        self._why: str | None = None  # it was killed
        self._grants: list[Any] = []
        self._turns: list[tuple[int, float]] = []

    def start(self) -> None:
        """Start the process; blocks."""
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = start_child(help_out, theirs, self._options, self._program)

    async def join(self) -> None:
        """Connect to it."""
        self.alive, self.quiet, self._why, self._received = True, 0.0, None, bytearray()
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._transport, _ = await self._loop.create_connection(lambda: self, sock=self._sock)

    def grant(self, number: int, request: Request, *about: Any) -> None:
        """Have it perform ``request``."""
        self.granted[number] = request
        self._tell(self._grants, (number, *about, *of_request(request)))

    def turn(self, number: int, at: float) -> None:
        """A request may be sent at that moment (monotonic)."""
        self._tell(self._turns, (number, at))

    def _tell(self, among: list[Any], what: tuple[Any, ...]) -> None:
        if not self._grants and not self._turns:
            self._loop.call_soon(self._flush)
        among.append(what)

    def _flush(self) -> None:
        """Write all that is to be told, in one message."""
        if (self._grants or self._turns) and not self._transport.is_closing():  # then it will be lost
            self._transport.write(frame(self.parent.home, self._grants, self._turns))
        self._grants.clear()
        self._turns.clear()

    def data_received(self, data: bytes) -> None:
        """Take in what it has done."""
        self._received += data
        try:
            for outcomes, asks, *usage in messages(self._received):
                if usage:
                    self.usage = usage[0], usage[1]
                self.parent.take_in(self, outcomes, asks)
                self.stillborn, self.quiet = 0, 0.0
        except Exception as error:
            self.kill(f"it sent what is no message: {detail(error)}")

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended, or is cut off."""
        self.alive = False
        self._grants.clear()
        self._turns.clear()
        self._ended.set()
        self.parent.lost(self)

    async def dismiss(self) -> None:
        """It has nothing left to do, says what it used, and ends; or is cut off."""
        if self.alive and not self._transport.is_closing():
            self._transport.write_eof()
            await wait_for_event(self._ended, PARTING)
            self._transport.abort()

    def kill(self, why: str | None = None) -> None:
        """End the process; the first reason counts."""
        self._why = self._why or why
        self._process.kill()

    def bury(self) -> str:
        """How it ended."""
        self._process.kill()
        self._process.join()
        return self._why or how_it_ended(self._process.exitcode or 0)


class Parent:
    """A driver whose fetching is done by ``helpers``."""

    def __init__(self, crawl: Crawl, emit: Callable[[ScrapeResult], Awaitable[object]], helpers: list[Helper]) -> None:
        self._crawl, self._emit, self._helpers = crawl, emit, helpers
        self._readers = Readers()
        self._pool = ThreadPoolExecutor(self._readers.count if crawl.options.feeds else 1, "parser")
        self._matcher = ThreadPoolExecutor(1, "matcher")
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._inbox: deque[tuple[Request, Response | FetchError | None]] = deque()
        """What came of requests; None: it was not sent."""
        self._suspects: deque[Request] = deque()
        self._alone: Helper | None = None  # has one suspect, or nothing, or is to have
        self._ready: list[Helper] = []
        self._withheld: set[str] = set()
        """Links that helpers told of with a page whose body had come before: others may have them, too."""
        self._numbers = itertools.count()
        self._in_hand = self._unwritten = 0
        """Requests that left the frontier and are not done; rows that are not written."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut_off = self._over = False
        crawl.read, crawl.changed = self._readers.read, self._changed_elsewhere
        for helper in helpers:
            helper.parent = self

    async def run(self, urls: Iterable[str]) -> None:
        """Crawl ``urls`` until nothing will ever come, and all that was granted is done."""
        crawl = self._crawl
        crawl.feed(urls)
        if crawl.options.feeds:
            self._pool.submit(self._readers.start)
        try:
            for helper in self._helpers:
                await helper.join()
            self._joined()
            async with beside(self._watch(), "helpers"):
                await self._work()
        finally:
            self._over = True
            crawl.frontier.stop()
            self._readers.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._matcher.shutdown(wait=False)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(helper.dismiss() for helper in self._helpers))
            await asyncio.sleep(0)  # until their sockets are closed
            await asyncio.to_thread(self._readers.close)
            crawl.stats.processes = self._usage()

    async def _work(self) -> None:
        while True:
            self._news.clear()
            while self._inbox:
                await self._settle(*self._inbox.popleft())
            wait = self._hand_out()
            if wait is None and not self._in_hand:
                return
            await wait_for_event(self._news, math.inf if wait is None else wait)
            if self._crawl.failure is not None and not self._cut_off:
                self._force()

    def _changed_elsewhere(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.set)

    @property
    def home(self) -> int:
        """Grows when links come into scope that were not, or have to be told again."""
        crawl = self._crawl
        return crawl.told_anew + (0 if crawl.options.within == "any" else len(crawl.scope.homes))

    # Requests on their way out

    def _hand_out(self) -> float | None:
        """Grant what may go; the seconds to wait for more, or None: nothing will ever come."""
        crawl = self._crawl
        if self._cut_off:
            return None
        self._try_suspects()
        while self._in_hand + self._unwritten < crawl.options.concurrency and self._ready:
            now = crawl.clock()
            decision = crawl.frontier.step(now)
            if isinstance(decision, Question):
                self._start(self._consult(decision))
            elif not isinstance(decision, Request):
                return decision
            else:
                self._in_hand += 1
                if decision.error:
                    self._inbox.append((decision, decision.error))
                    self._news.set()
                elif decision.deaths >= ALONE:
                    self._suspects.append(decision)
                    self._try_suspects()
                else:
                    self._grant(self._helper_for(decision.host), decision, now)
        return math.inf

    def _helper_for(self, host: str) -> Helper:
        usual = self._ready[hash(host) % len(self._ready)]
        least = min(self._ready, key=lambda helper: len(helper.granted))
        return usual if len(usual.granted) <= len(least.granted) * 1.1 + 1 else least

    def _grant(self, helper: Helper, request: Request, now: float) -> None:
        crawl, listed = self._crawl, self._crawl.listed
        special = request.kind == "feed" or listed.credentials or listed.origins is not None or request.cookies
        sends = crawl.headers(request) if special else None
        helper.grant(next(self._numbers), request, crawl.frontier.is_unmetered(request, now), sends)

    def _ask(self, helper: Helper, number: int) -> None:
        """A helper asks for a request's turn: it is told when that is near."""
        request = helper.granted.get(number)
        if request is None:
            return
        try:
            wait = self._crawl.frontier.clear_to_send(request, self._crawl.clock(), AHEAD)
        except Postponed:
            helper.turn(number, -1.0)
        else:
            if wait > AHEAD:
                self._loop.call_later(wait - AHEAD / 2, self._ask, helper, number)
                return
            helper.turn(number, time.monotonic() + wait)

    async def _consult(self, question: Question) -> None:
        crawl = self._crawl
        await self._loop.run_in_executor(self._matcher, crawl.frontier.consult, question, crawl.clock)
        self._news.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What comes back

    def take_in(self, helper: Helper, outcomes: Iterable[Any], asks: Iterable[int]) -> None:
        """What a helper has done, and the requests for which it asks a turn."""
        for number, *packed in outcomes:
            if not self._cut_off:  # then nothing is granted
                request = helper.granted[number]
                if len(packed) == 1:
                    with contextlib.suppress(Postponed):
                        self._crawl.frontier.connects(request, packed.pop())
                outcome = unpack(packed, self._crawl.form, self.home) if packed else None
                del helper.granted[number]  # not before: what is no outcome ends the helper, and its grants come back
                self._inbox.append((request, outcome))
                helper.requests += bool(packed)
        for number in asks:
            self._ask(helper, number)
        self._news.set()

    async def _settle(self, request: Request, outcome: Response | FetchError | None) -> None:
        crawl = self._crawl
        try:
            if outcome is None:
                self._give_back(request)
                return
            final = crawl.judge(request, outcome)
            if final is None:
                self._in_hand -= 1
                return
            if isinstance(final, Response) and final.row is None and crawl.is_long(request, final, INLINE):
                self._start(self._read(request, final))
                return
            row = self._complete(request, final)
        except Exception as error:
            row = crawl.broken(request, FetchError("internal", detail(error)))
        await self._finish(request, row)

    def _complete(self, request: Request, final: Response | FetchError) -> ScrapeResult | None:
        crawl, told, again = self._crawl, [], set[str]()
        if isinstance(final, Response) and isinstance(final.row, CrawlResult) and final.new_links is not None:
            told = final.new_links
            if self._withheld and (again := self._withheld.intersection(crawl.links_to_follow(final.row))):
                final.new_links = [*told, *again]
        row = crawl.complete(request, final)
        if isinstance(row, CrawlResult) and row.duplicate_of:
            self._withheld.update(told)
        else:
            self._withheld -= again
        return row

    async def _read(self, request: Request, final: Response) -> None:
        """``complete``, where that takes a while."""
        try:
            row = await self._loop.run_in_executor(self._pool, self._crawl.complete, request, final)
        except Exception as error:
            row = self._crawl.broken(request, FetchError("internal", detail(error)))
        await self._finish(request, row)
        self._news.set()

    async def _finish(self, request: Request, row: ScrapeResult | None) -> None:
        crawl = self._crawl
        crawl.frontier.finish(request, crawl.clock())
        if row is not None:
            self._unwritten += 1
            try:
                self._unwritten -= not await self._emit(row)
            except Exception as error:
                self._unwritten -= 1
                crawl.fail(error)
        self._in_hand -= 1

    def _give_back(self, request: Request) -> None:
        now = self._crawl.clock()
        self._crawl.frontier.put_back(request, now, now)
        self._in_hand -= 1

    def give_back(self, rows: int) -> None:
        """So many rows are written."""
        self._unwritten -= rows
        self._news.set()

    # Helpers that come and go

    def _joined(self) -> None:
        self._ready = [helper for helper in self._helpers if helper.alive and helper is not self._alone]
        self._news.set()

    def _try_suspects(self) -> None:
        """Have one helper do nothing else, as long as there is a request that may be the death of it."""
        alone = self._alone
        if alone is None and not self._suspects:
            return
        if alone is None or not alone.alive or not (alone.granted or self._suspects):
            alive = [helper for helper in self._helpers if helper.alive]
            alone = min(alive, key=lambda helper: len(helper.granted)) if alive and self._suspects else None
            self._alone = alone
            self._joined()
        if alone and self._suspects and not alone.granted:
            self._grant(alone, self._suspects.popleft(), self._crawl.clock())

    def lost(self, helper: Helper) -> None:
        """It has ended."""
        granted, helper.granted = list(helper.granted.values()), {}
        for request in granted:
            request.deaths += 1
            if request.deaths > ALONE:
                self._inbox.append((request, FetchError("internal", f"{request.deaths} helpers died with it")))
            else:
                self._give_back(request)
        if not self._over and not self._cut_off:
            helper.deaths += 1
            self._start(self._replace(helper))
        self._joined()

    async def _watch(self) -> None:
        """End helpers that have said nothing for longer than a request may take. Counted in steps: where this process
        was held up, they may have been, too."""
        limit = self._crawl.options.timeout + FROZEN
        while True:
            await asyncio.sleep(WATCH)
            for helper in self._helpers:
                helper.quiet = helper.quiet + WATCH if helper.granted else 0.0
                if helper.quiet > limit:
                    helper.kill(f"it said nothing for {limit:g} s")

    async def _replace(self, helper: Helper) -> None:
        helper.stillborn += 1
        try:
            how = await asyncio.to_thread(helper.bury)
            if helper.stillborn >= STILLBORN:
                raise RuntimeError(f"helper {helper.number + 1} died {STILLBORN} times before it began ({how})")
            self._crawl.say(f"helper {helper.number + 1} died ({how}); another one goes on")
            await asyncio.to_thread(helper.start)
            await helper.join()
        except Exception as error:
            self._crawl.fail(error)
        self._joined()

    def _usage(self) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        own = round(usage.ru_utime + usage.ru_stime, 3), peak_memory_mb()
        names = "cpu_seconds", "peak_memory_mb"
        each = [dict(zip(names, one, strict=True)) for one in (own, *(helper.usage for helper in self._helpers))]
        whole = {name: round(sum(one[name] for one in each), 3) for name in names}
        counts = [{"requests": helper.requests, "deaths": helper.deaths} for helper in self._helpers]
        return whole | {"parent": each[0], "processes": [a | b for a, b in zip(each[1:], counts, strict=True)]}

    def stop(self) -> None:
        """First call: finish what is in flight, at most for the grace time. Second: cut it off. Third: exit."""
        if not self._crawl.interrupted:
            self._crawl.interrupted = True
            self._crawl.frontier.stop()
            self._loop.call_later(self._crawl.options.grace, self._force)
        elif not self._cut_off:
            self._force()
        else:
            os._exit(EXIT_INTERRUPTED)
        self._news.set()

    def _force(self) -> None:
        """What helpers have is cut off; so are they."""
        self._cut_off = True
        self._readers.kill()
        cut_off = [*self._suspects]
        self._suspects.clear()
        for helper in self._helpers:
            cut_off += helper.granted.values()
            helper.granted = {}
            helper.kill()
        self._inbox.extend((request, FetchError("interrupted", CUT_OFF)) for request in cut_off)
        self._news.set()


def run_processes(crawl: Crawl, urls: Iterable[str], emit: Emit, count: int, program: Run) -> None:
    """The crawl of the command line, with signals, and ``count`` helpers, each of which runs ``program``."""
    helpers: list[Helper] = []
    try:
        for number in range(min(count, crawl.options.concurrency)):  # before there are threads, and a loop
            helper = Helper(number, crawl.options, program)
            helper.start()
            helpers.append(helper)
        run_in_loop(crawl, urls, emit, lambda crawl, put: Parent(crawl, put, helpers))
    finally:
        for helper in helpers:
            helper.bury()
