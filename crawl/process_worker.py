"""One worker of a crawl in several processes: its frontier, its end of the wire. crawl/processes.py has the whole.

A worker is the program's own driver over a crawl whose frontier has a share of the hosts. Nothing here knows the
driver: a forked worker is given its class, a fresh interpreter the name of the module that has it as ``Driver``. What
it finds for other hosts (links, articles, redirects) goes out; what others find for its hosts comes in. It hears
nothing of signals but the parent's two (SIGUSR1: stop, SIGUSR2: cut off), and ends at once when its socket does.

All state belongs to the event loop, but for ``WorkerFrontier.outbox`` and what the frontier guards: a thread parses
long pages.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import io
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import threading
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, astuple
from typing import Any, Protocol

import orjson

from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.feeds import FeedEntry
from crawl.handover import HandoverFrontier
from crawl.hosts import Kind, Question, UrlRun
from crawl.journal import known_as
from crawl.model import FeedResult, Options, Request, Response, ScrapeResult
from crawl.output import RowWriter, peak_memory_mb
from crawl.robots import LARGE
from crawl.urls import host_of, origin
from crawl.wire import BUCKETS, ME, bucket_of, exactly, key_of, place, section, sections
from runtime.loop import new_loop

FULL, AGE = 1 << 16, 0.05
"""A frame goes when it has so many bytes of rows, or a quarter of what may be in flight, or after so many seconds."""
PULSE = 0.25
"""Seconds from one report of the counts to the next, where there are no rows."""


class Driver(Protocol):
    """What fetches, in an event loop."""

    async def run(self, urls: Iterable[str], /) -> None: ...
    def stop(self) -> None: ...
    def cut_off(self) -> None: ...


MakeDriver = Callable[[Crawl, Callable[[ScrapeResult], Awaitable[object]]], Driver]


class WorkerFrontier(HandoverFrontier):
    """The frontier of one worker. ``outbox`` is for the others; what a dead worker did is not done."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.outbox: deque[bytes] = deque()
        self.own = bytearray(BUCKETS)
        self.central = False
        """All links go through the parent, which counts them."""
        self.held = False
        """Nothing goes before the whole list is here."""
        self.articles: dict[str, tuple[str, FeedEntry]] | None = None
        """With --feeds: what the feeds say of articles, which goes with them; else ``homes`` go with sitemaps."""
        self.homes: dict[str, str] = {}
        self.received = 0
        self.idle_at = self._told = -1
        self.given_back = 0
        self.status: int | None = None
        """Of the redirect that is being followed, which leads ``led_to``."""
        self.led_to = ""
        self.done: set[int] = set()
        """Keys of what has been finished before this worker began."""
        self._asked: set[int] = set()
        """Keys of links that were sent away, and of requests that were taken over."""
        self.keys = array("Q")
        """Of what was finished since the last frame."""
        self.wake = asyncio.Event()

    def send(self, kind: bytes, bucket: int, content: object) -> None:
        self.outbox.append(section(kind, bucket, orjson.dumps(content)))

    def step(self, now: float) -> Request | Question | float | None:
        received = self.received
        if self.held and not self._stopped and now < self._until:
            return self._until - now
        decision = super().step(now)
        if isinstance(decision, float) and not self.waiting and not self._in_flight and received != self._told:
            self.idle_at = self._told = received
            self.wake.set()
        return decision

    def add_all(self, texts: Iterable[str], now: float, *, kind: Kind = "page") -> int:
        """Lines of the list, which the parent has found to be this worker's."""
        if self.done:
            texts = [text for text in texts if key_of(text) not in self.done or place(text)[2]]
        return super().add_all(texts, now, kind=kind)

    def _add(self, text: str, target: str, host_name: str, run: UrlRun, now: float) -> bool:
        self.own[bucket_of(host_name)] = 1
        if self.done and key_of(target if run.kind != "feed" else f"feed {target}") in self.done:
            if self._visited.add(target) and run.kind == "page":
                self._limits.count_page(host_name, 1)
            return False
        return super()._add(text, target, host_name, run, now)

    def mark(self, target: str, *, counts: bool = False) -> bool:
        if not self.own[bucket_of(host_of(target))]:
            return True  # whose it is will see
        return key_of(target) not in self.done and super().mark(target, counts=counts)

    def add_links(
        self, targets: Iterable[str], depth: int, now: float, *, private: bool = False, kind: Kind = "page"
    ) -> int:
        if self.articles is not None:
            return self._add_articles(list(targets), depth, now, private)
        mine, others = [], dict[int, list[str]]()
        for target in targets:
            bucket = bucket_of(host_of(target))
            if self.own[bucket] and not self.central:
                if target not in self._visited:
                    mine.append(target)
            elif (key := key_of(target)) not in self._asked:
                self._asked.add(key)
                others.setdefault(bucket, []).append(target)
        for bucket, found in others.items():
            self.send(b"L", bucket, (depth, private, kind, found, [self.homes.get(target) for target in found]))
        if not mine:
            return 0
        homes = [self.homes.get(target) for target in mine]
        self.send(b"L", ME, (depth, private, kind, mine, homes))  # to be had again, should this worker die
        return super().add_links(mine, depth, now, private=private, kind=kind)

    def _add_articles(self, targets: list[str], depth: int, now: float, private: bool) -> int:
        """Of another worker's article nobody here knows whether it is new there: it is, if it is here."""
        new = 0
        for target in targets:
            bucket, (feed, entry) = bucket_of(host_of(target)), (self.articles or {})[target]
            mine = self.own[bucket] and not self.central
            if super().add_links([target], depth, now, private=private) if mine else self.is_new(target):
                self.send(b"E", ME if mine else bucket, (target, feed, entry._asdict(), private))
                new += 1
        return new

    def take_links(self, targets: list[str], depth: int, now: float, *, private: bool, kind: Kind) -> int:
        new = super().add_links(targets, depth, now, private=private, kind=kind)
        if kind == "page":
            self.given_back += len(targets) - new
        return new

    def no_rules(self, name: str, now: float) -> None:
        """The robots.txt of this origin, asked for by another worker, cannot be had."""
        with self._lock:
            self._no_rules(name, now)

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        self.led_to = target or ""
        if target is None or host_name is None or self.own[bucket_of(host_name)]:
            super().put_back(request, now, not_before, target, host_name)
            return
        fields = asdict(request)
        self.send(b"Q", bucket_of(host_name), (fields, target, host_name, self.status))
        self.pass_on(request, now)

    def take_over(self, request: Request, target: str, host_name: str, now: float, *, only: bool) -> bool:
        """Go on with another worker's request, unless that was done before. ``only``: False if its target is known."""
        if request.kind != "robots":
            again = key_of(f"{request.hops} {request.url}")
            if again in self._asked or key_of(self._name(request)) in self.done:
                return True
            self._asked.add(again)
        if only and not self.mark(target):
            return False
        request.target, request.host = target, host_name
        self.adopt(request, now, now)
        return True

    def _name(self, request: Request) -> str:
        known = known_as(request.url)[0]
        return f"feed {known}" if request.kind == "feed" else known

    def finished(self, url: str, *, feed: bool = False, abroad: bool = True) -> None:
        """Its row is on its way, or it has none. ``abroad``: whose URL it was is to know it too."""
        known, bucket, _ = place(url)
        self.keys.append(key := key_of(f"feed {known}" if feed else known))
        if abroad and not self.own[bucket]:
            self.outbox.append(section(b"K", bucket, array("Q", [key]).tobytes()))

    def know_pages(self, pages: dict[str, int]) -> None:
        for host, count in pages.items():
            self._limits.record(host).pages = count

    def is_new(self, target: str) -> bool:
        """Whether a page of another worker's was not sent there before, as far as is known here."""
        key = key_of(target)
        new = key not in self._asked and key not in self.done
        self._asked.add(key)
        return new


class WorkerCrawl(Crawl):
    """The crawl of one worker: as any other, but for what concerns the others."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, frontier=WorkerFrontier)
        assert isinstance(self.frontier, WorkerFrontier)
        self.share = self.frontier
        self.share.homes = self.sitemaps.homes
        if options.feeds:
            self.share.articles = self.feeds.entries

    def feed(self, urls: Iterable[str]) -> threading.Thread:
        return threading.main_thread()  # the list comes from the parent

    def _redirect(self, request: Request, response: Response, now: float) -> FetchError | None:
        homes = len(self.scope.homes)
        self.share.status, self.share.led_to = response.status, ""
        error = super()._redirect(request, response, now)
        if len(self.scope.homes) > homes:
            self.share.send(b"H", ME, self.share.led_to)
        return error

    def learn_robots(self, request: Request, outcome: Response | FetchError) -> None:
        bucket = bucket_of(host_of(request.url))
        if self.share.own[bucket]:
            super().learn_robots(request, outcome)
        elif isinstance(outcome, Response):
            said = (outcome.status, outcome.headers, outcome.body.decode("latin-1"))
            self.share.send(b"A", bucket, (asdict(request), said))
        else:
            self.share.send(b"A", bucket, (asdict(request), (outcome.kind, outcome.detail, outcome.status)))

    def complete(self, request: Request, outcome: Response | FetchError) -> ScrapeResult | None:
        row = super().complete(request, outcome)
        if row is None and request.kind != "robots":
            self.share.finished(request.url, feed=request.kind == "feed")
        return row


class ParentLink:
    """A worker's end of the socket: what comes is put into the crawl; rows and all else go in frames."""

    def __init__(self, sock: socket.socket, crawl: WorkerCrawl, form: str) -> None:
        self._socket, self._crawl, self._share = sock, crawl, crawl.share
        self._loop = asyncio.get_running_loop()
        self._writer = RowWriter(io.BytesIO(), form, crawl.form, begun=True)
        self._rows: list[bytes] = []
        self._size = 0
        self._many = max(1, min(100, crawl.options.concurrency // 4))
        self._sent = asyncio.Event()
        self._ended = False

    async def put(self, row: ScrapeResult) -> None:
        """Returns when it is sent: so what the death of a worker costs is no more than is in flight."""
        self._rows.append(data := self._writer.encode(row))
        self._crawl.stats.count_row(row)
        self._share.finished(row.url, feed=isinstance(row, FeedResult) and row.kind == "feed")
        if row.final_url not in (None, row.url) and self._crawl.follows:
            self._share.finished(str(row.final_url), abroad=False)
        if self._share.central and (row.error or "").startswith("robots"):
            self._share.given_back += 1
        self._size += len(data)
        sent = self._sent
        if self._size >= FULL or len(self._rows) >= self._many:
            self._share.wake.set()
        elif len(self._rows) == 1:
            self._loop.call_later(AGE, self._share.wake.set)
        await sent.wait()

    def _pulse(self) -> None:
        self._share.wake.set()
        self._loop.call_later(PULSE, self._pulse)

    async def send(self) -> None:
        """One frame after the other, until ``end``."""
        self._pulse()
        while True:
            await self._share.wake.wait()
            self._share.wake.clear()
            last, sent, self._sent = self._ended, self._sent, asyncio.Event()
            await self._loop.sock_sendall(self._socket, self._frame(last))
            sent.set()
            if last:
                return

    def _frame(self, last: bool) -> bytes:
        share = self._share
        rows, self._rows, self._size = self._rows, [], 0
        parts = [section(b"R", len(rows), b"".join(rows))] if rows else []  # at most as many as are in flight
        keys, share.keys = share.keys, array("Q")
        if keys:
            parts.append(section(b"K", ME, keys.tobytes()))
        while share.outbox:
            parts.append(share.outbox.popleft())
        if share.given_back:
            parts.append(section(b"G", ME, b"%d" % share.given_back))
            share.given_back = 0
        if share.idle_at >= 0:
            parts.append(section(b"I", ME, b"%d" % share.idle_at))
            share.idle_at = -1
        counts: dict[str, Any] = {"stats": self._crawl.stats.snapshot(), "frontier": astuple(share.stats())}
        if last:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            counts |= {"peak_memory_mb": peak_memory_mb(), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3)}
        parts.append(section(b"F" if last else b"S", ME, orjson.dumps(counts)))
        return struct.pack("<I", sum(map(len, parts))) + b"".join(parts)

    async def end(self, sender: asyncio.Task[None]) -> None:
        """Every row that was put is sent when this returns."""
        self._ended = True
        self._share.wake.set()
        await sender

    async def receive(self) -> None:
        data, size = bytearray(), 0
        while True:
            if len(data) < 4 or len(data) < (size := struct.unpack_from("<I", data)[0] + 4):
                piece = await self._loop.sock_recv(self._socket, 1 << 18)
                if not piece:
                    os._exit(1)  # the parent is gone
                data += piece
                continue
            frame = bytes(data[4:size])
            del data[:size]
            for kind, _, content in sections(frame):
                self._take_in(kind, content)
                self._share.received += kind != b"Z"
            self._crawl.changed()

    def learn_robots(self, request: Request, outcome: Response | FetchError) -> None:
        """What another worker was answered about a robots.txt."""
        self._crawl.learn_robots(request, outcome)
        self._share.no_rules(origin(request.url), self._crawl.clock())
        self._crawl.changed()

    def _take_in(self, kind: bytes, data: memoryview) -> None:
        crawl, share, now = self._crawl, self._share, self._crawl.clock()
        if kind == b"T":
            new = share.add_all(lines := str(data, "utf-8", "surrogatepass").split("\n"), now, kind=crawl.list_kind)
            if crawl.list_kind == "page":
                share.given_back += len(lines) - new
            return
        if kind == b"D":
            share.done.update(array("Q", bytes(data)))
            return
        content = orjson.loads(data)
        if kind == b"L":
            depth, private, link_kind, targets, homes = content
            crawl.sitemaps.homes.update((target, home) for target, home in zip(targets, homes, strict=True) if home)
            share.take_links(targets, depth, now, private=private, kind=link_kind)
        elif kind == b"Q":
            self._go_on(content, now)
        elif kind == b"A":
            fields, said = content
            answer = FetchError(said[0], said[1], status=said[2])
            outcome = Response(said[0], said[1], said[2].encode("latin-1")) if isinstance(said[0], int) else answer
            if len(data) > LARGE:
                self._loop.run_in_executor(None, self.learn_robots, Request(**fields), outcome)
            else:
                self.learn_robots(Request(**fields), outcome)
        elif kind == b"E":
            target, feed, entry, private = content
            if target not in crawl.feeds.listed:
                known = crawl.feeds.entries.setdefault(target, article := (feed, FeedEntry(**entry)))
                if not share.take_links([target], 1, now, private=private, kind="page") and known is article:
                    del crawl.feeds.entries[target]
        elif kind == b"H":
            crawl.scope.add(content)
        elif kind == b"O":
            for url in content:
                crawl.listed.know(url)
            if crawl.options.feeds:
                crawl.feeds.listed.update(content)
        elif kind == b"U":
            crawl.listed.credentials |= content
        elif kind == b"V":
            crawl.feeds.validators |= {url: tuple(known) for url, known in content.items()}
        elif kind == b"B":
            crawl.know_body(*content)
        elif kind == b"P":
            share.know_pages(content)
        elif kind == b"Y":
            share.held = False
        elif kind == b"Z":
            share.close()

    def _go_on(self, content: tuple[dict[str, Any], str, str, int | None], now: float) -> None:
        fields, target, host, status = content
        request, crawl = Request(**fields), self._crawl
        request.last_of_host = False
        page = (crawl.follows or crawl.options.feeds) and request.kind == "page"
        self._share.own[bucket_of(host)] = 1
        if not self._share.take_over(request, target, host, now, only=page):
            request.hops -= 1
            crawl.stats.count(redirects=-1)
            request.error = FetchError("duplicate", f"redirects to {target}", status=status)
            self._share.adopt(request, now)


async def _worker_program(sock: socket.socket, config: dict[str, Any], make_driver: MakeDriver) -> None:
    crawl = WorkerCrawl(config["options"])
    crawl.share.central, crawl.share.held = config["central"], crawl.knows_first
    crawl.processes, crawl.listed.credentials = config["processes"], config["credentials"]
    if config["until"]:
        crawl.share.stop_at(config["until"])
    link = ParentLink(sock, crawl, config["form"])
    driver = make_driver(crawl, link.put)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: None if crawl.interrupted else driver.stop())
    loop.add_signal_handler(signal.SIGUSR2, driver.cut_off)  # which may come first
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    sender, receiver = asyncio.create_task(link.send()), asyncio.create_task(link.receive())
    receiver.add_done_callback(_fatal)
    sender.add_done_callback(_fatal)
    await driver.run(())
    await link.end(sender)
    receiver.remove_done_callback(_fatal)
    receiver.cancel()


def _fatal(task: asyncio.Task[None]) -> None:
    """A worker whose link is broken has nothing to live for."""
    if not task.cancelled() and (error := task.exception()) is not None:
        if not isinstance(error, OSError):
            sys.excepthook(type(error), error, error.__traceback__)
        os._exit(1)


def worker(descriptor: int, make_driver: MakeDriver) -> None:
    """What a worker process runs. SIGINT and SIGTERM are blocked since before it began."""
    gc.set_threshold(10_000, 20, 50)
    with socket.socket(fileno=descriptor) as sock:
        config = pickle.loads(exactly(sock, struct.unpack("<I", exactly(sock, 4))[0]))
        sock.setblocking(False)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_worker_program(sock, config, make_driver))
    os._exit(0)  # a thread may wait for a name server


def main() -> None:
    worker(int(sys.argv[1]), importlib.import_module(sys.argv[2]).Driver)
