"""A helper: a process that fetches and reads pages by grants of its parent (crawl/processes.py).

It is the program itself: its driver, threads or tasks, runs over a crawl whose frontier hands out what was granted, and
whose rows go to the parent. It decides nothing: what an answer means, what goes next and when, the parent says. Pages
are read here; the bodies of robots.txt, sitemaps, feeds and articles go to the parent as they are.

Leave to send. Where its host has a limit, a request whose connection is open asks for its turn, and sleeps until it is
told the moment; to tell that ahead of time is the parent's business. Who is late (``LATE``) asks again, so
that what the system held up is not sent together with what comes after it. Where there is no limit, a request may be
sent within ``FRESH`` seconds of its grant; later it asks too, for its host may have asked for a pause.

Memory: of the links of all pages those that were not told before go to the parent apart, ``TOLD`` at most are kept in
mind. They are forgotten when the crawl has new homes: what was out of scope may be within now.

A helper hears no signal, and ends at once when its socket does: it has nothing that its parent could not grant again.
Locks: ``HelperCrawl._sending`` guards the socket, where threads share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import resource
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

from coordination import Waiter, new_lock
from crawl.core import Crawl
from crawl.errors import REDIRECT_STATUSES, FetchError, Postponed
from crawl.frontier import Frontier
from crawl.grants import SENT, Grant, Message, frame, messages, pack, row_fields
from crawl.model import CrawlResult, Options, Request, Response, ScrapeResult
from crawl.output import Run, peak_memory_mb

FRESH = 0.1
LATE = 0.02  # seconds after its turn in which a request may still be sent; twice as long for each that it has missed
TOLD = 200_000


class HelperFrontier(Frontier):
    """Hands out what was granted."""

    def __init__(self, tell: Callable[[Message | None, int | None], None], per_address: int = 0) -> None:
        super().__init__(per_address=per_address)
        self._tell = tell
        self._begun = False
        self._grants: deque[Grant] = deque()
        self._out: dict[int, Grant] = {}
        self.loop: asyncio.AbstractEventLoop | None = None  # the driver's, if it has one

    def granted(self, grant: Grant) -> None:
        """Take a grant of the parent."""
        self._out[grant.number] = grant
        self._grants.append(grant)

    def turn(self, number: int, at: float) -> None:
        """Grant ``number`` may be sent at that moment (monotonic)."""
        if (grant := self._out.get(number)) and grant.told:
            grant.turn = at
            grant.told.wake()

    def done(self, grant: Grant, *outcome: Any) -> None:
        """Tell the parent what came of a grant."""
        self._out.pop(grant.number, None)
        self._tell((grant.number, *outcome), None)

    def step(self, now: float) -> Request | float | None:
        """The oldest grant that waits, or inf: wait for one. The first call says that the driver has begun."""
        if not self._begun:
            self._begun = True
            self._tell(None, None)
        return None if self._stopped else self._grants.popleft() if self._grants else math.inf

    def clear_to_send(self, request: Request, now: float, ahead: float = 0.0) -> float:
        """Seconds to wait before it is sent; inf: until its turn is told, which the parent is asked for."""
        assert isinstance(request, Grant)
        if request.told is None:
            if now < request.fresh_until:
                return 0.0
        elif request.turn < 0:
            raise Postponed
        elif now < request.turn + LATE * 2**request.missed:
            if request.turn > now:
                return request.turn - now
            request.told = None  # should the connection turn out to be closed, it asks again
            return 0.0
        else:
            request.missed += 1  # so that it is sent at last, however slow this process is
        request.told, request.turn = Waiter(self.loop), math.inf
        self._tell(None, request.number)
        return math.inf

    def connects(self, request: Request, address: str) -> None:
        """Raises Postponed if the parent did not count it for this address."""
        assert isinstance(request, Grant)
        if self._limits.addresses.most < math.inf and request.address != address:
            request.elsewhere = address
            raise Postponed

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        """It was not sent: the parent has it again."""
        assert isinstance(request, Grant)
        self.done(request, *filter(None, [request.elsewhere]))

    def finish(self, request: Request, now: float) -> None:
        """The outcome was told when it was complete."""


class HelperCrawl(Crawl, asyncio.Protocol):
    """The crawl as a helper sees it, and its end of the socket."""

    def __init__(self, options: Options, sock: socket.socket) -> None:
        own = replace(options, feeds=False, since=None)
        super().__init__(own, frontier=lambda **_: HelperFrontier(self._tell, options.per_address))
        assert isinstance(self.frontier, HelperFrontier)
        self._mine, self._sock, self._received = self.frontier, sock, bytearray()
        self._transport: Any = None
        self._sending = new_lock("HelperCrawl")
        self._outcomes: deque[Message] = deque()
        self._asks: deque[int] = deque()
        self._due = self._introduced = False  # something waits to be sent, and will be; the parent has heard of us
        self._fields = row_fields(self.form)
        self._told: set[str] = set()
        self._remembers = not (options.max_pages or options.host_pages)  # with caps the parent decides again each time
        self._home, self._feeds = 0, options.feeds

    # What the driver calls

    def feed(self, urls: Iterable[str]) -> threading.Thread:
        """Hear the parent, in a thread unless a loop does."""
        thread = threading.Thread(target=self._receive, name="parent", daemon=True)
        if self._mine.loop is None:
            thread.start()
        return thread

    @contextlib.asynccontextmanager
    async def joined(self, put: Callable[[ScrapeResult], Awaitable[object]]) -> AsyncIterator[Any]:
        """Hear the parent in the running loop."""
        self._mine.loop = loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: self, sock=self._sock)
        yield put

    def headers(self, request: Request) -> tuple[str, dict[str, str]]:
        """Those that the parent chose, or the usual ones."""
        assert isinstance(request, Grant)
        return request.sends or super().headers(request)

    def judge(self, request: Request, outcome: Response | FetchError) -> Response | FetchError | None:
        """Nothing is judged here: the parent does that."""
        request.spent += outcome.seconds
        return outcome

    def complete(self, request: Request, outcome: Response | FetchError) -> None:
        """Tell the parent the outcome, its row, and the links it has not been told of."""
        assert isinstance(request, Grant)
        body, row, new, home = b"", None, None, self._home
        if isinstance(outcome, Response):
            if request.kind != "page" or self._feeds:
                body = outcome.body
            elif outcome.status not in REDIRECT_STATUSES:
                page = self.page_row(request, outcome)
                row, new = self._fields(page), self._new_links(page)
        self._mine.done(request, *pack(outcome, body, row, new, home))

    def broken(self, request: Request, error: FetchError) -> None:
        """Tell the parent of a fault of ours."""
        assert isinstance(request, Grant)
        self._mine.done(request, *pack(error, b"", None, None, 0))

    def _new_links(self, row: ScrapeResult) -> list[str] | None:
        if not isinstance(row, CrawlResult) or not self._remembers:
            return None
        told = self._told
        new = [link for link in self.links_to_follow(row) if link not in told]
        if len(told) > TOLD:
            told.clear()
        told.update(new)
        return new

    # To the parent, from any thread

    def _tell(self, outcome: Message | None, ask: int | None) -> None:
        if outcome is not None:
            self._outcomes.append(outcome)
        if ask is not None:
            self._asks.append(ask)
        if self._mine.loop is None:
            self._send()
        elif not self._due:
            self._due = True
            self._mine.loop.call_soon_threadsafe(self._send)

    def _send(self) -> None:
        """All that there is, in one piece."""
        with self._sending:
            self._due = False
            outcomes, asks = ([some.popleft() for _ in range(len(some))] for some in (self._outcomes, self._asks))
            if not outcomes and not asks and self._introduced:
                return
            self._introduced = True
            data = frame(outcomes, asks)
            if self._transport is not None:
                self._transport.write(data)
            else:
                with contextlib.suppress(OSError):  # the parent is gone: the other thread sees it too
                    self._sock.sendall(data)

    # From the parent

    def data_received(self, data: bytes) -> None:
        """Take grants and turns."""
        self._received += data
        for home, grants, turns in messages(self._received):
            if home != self._home:
                self._home, self._told = home, set()
            fresh = time.monotonic() + FRESH
            for number, is_fresh, sends, *told in grants:
                grant = Grant(**dict(zip(SENT, told, strict=True)), number=number, sends=sends)
                if is_fresh:
                    grant.fresh_until = fresh
                self._mine.granted(grant)
            for number, at in turns:
                self._mine.turn(number, at)
            if grants:
                self.changed()

    def eof_received(self) -> None:
        """All is done; or the parent is gone."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        last = frame([], [], round(usage.ru_utime + usage.ru_stime, 3), peak_memory_mb())
        with contextlib.suppress(OSError):
            self._sock.send(last)
        os._exit(0)

    def connection_lost(self, error: Exception | None) -> None:
        """End at once: without a parent there is nothing to do."""
        os._exit(0)

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._sock.recv(1 << 18):
                self.data_received(data)
        self.eof_received()


def help_out(sock: socket.socket, options: Options, run: Run) -> None:
    """What a helper process runs: ``run`` is the program's own. Does not return."""
    crawl = HelperCrawl(options, sock)
    gc.set_threshold(10_000, 20, 50)
    run(crawl, (), lambda *rows: None)
    os._exit(1)
