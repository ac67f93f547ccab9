"""Sites to crawl, and drivers to crawl them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import gzip
import http.client
import http.server
import importlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import unittest.mock
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import brotli
import pytest

import crawl_async
import crawl_threads
from crawl import cli as crawl_cli
from crawl import http_aiohttp, http_urllib
from crawl import net as crawl_net
from crawl import readers as crawl_readers
from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.frontier import Frontier
from crawl.hosts import Question
from crawl.model import CrawlResult, Options, Request, Response, ScrapeResult
from crawl.net import BodyDecoder
from crawl.output import RowWriter, Run
from crawl.processes import run_processes
from crawl.robots import MAX_ROBOTS
from runtime.loop import new_loop
from sandbox.sites import Sandbox
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT


def take(frontier: Frontier, now: float) -> Request | float | None:
    """``step``, its questions answered."""
    while isinstance(decision := frontier.step(now), Question):
        frontier.answer(decision, decision.rules.allows(decision.target), now)
    return decision


def taken(decision: Request | float | None) -> Request:
    assert isinstance(decision, Request), decision
    return decision


def answer(status: int = 200, body: bytes = b"", **headers: Any) -> Response:
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return Response(status, named, body, seconds=0.01)


def judged(outcome: Response | FetchError, **options: Any) -> tuple[Crawl, Request, Response | FetchError | None]:
    clock = [100.0]
    crawl = Crawl(Options(**options), clock=lambda: clock[0], rng=lambda: 0.5)
    crawl.frontier.add_all(["http://a.example/x"], clock[0])
    request = taken(take(crawl.frontier, clock[0]))
    crawl.frontier.clear_to_send(request, clock[0])
    return crawl, request, crawl.judge(request, outcome)


ZSTD = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def pack(coding: str, data: bytes) -> bytes:
    if coding == "gzip":
        return gzip.compress(data)
    if coding == "deflate":
        return zlib.compress(data)
    if coding == "raw deflate":
        packer = zlib.compressobj(wbits=-15)
        return packer.compress(data) + packer.flush()
    if coding == "br":
        return bytes(brotli.compress(data, quality=1))
    return bytes(ZSTD.compress(data))


def unpack(coding: str | None, data: bytes, limit: int = 1 << 20, step: int = 7) -> bytes:
    decoder = BodyDecoder(coding and coding.replace("raw ", ""), limit, 200)
    for start in range(0, len(data), step):
        for _ in decoder.feed(data[start : start + step]):
            pass
    return decoder.finish()


def a_row(**more: Any) -> ScrapeResult:
    values: dict[str, Any] = {
        "url": "http://a/", "status": 200, "title": "T", "word_count": 2, "links_found": ["http://b/", "http://c/"],
        "error": None, "fetched_at": "2026-01-02T03:04:05.678Z", "duration_ms": 1.5,
    }  # fmt: skip
    return ScrapeResult(**(values | more))


def written(form: str, *rows: ScrapeResult) -> bytes:
    stream = io.BytesIO()
    writer = RowWriter(stream, form)
    for row in rows:
        writer.write(row)
    writer.close()
    return stream.getvalue()


DRIVERS = ["crawl_threads", "crawl_async"]
WALKERS = [*DRIVERS, *(f"{driver} --processes 2" for driver in DRIVERS)]
RUN: dict[str, Run] = {"crawl_threads": crawl_threads.run, "crawl_async": crawl_async.run}


def walk_main(driver: str, *argv: str) -> int:
    """The exit code of a crawler that runs in this process. Its helpers are copies, with all that a test has planted;
    that there are other threads does not matter to them."""
    name, *more = driver.split()
    threshold = gc.get_threshold()
    try:
        with unittest.mock.patch("runtime.processes.may_fork", return_value=True):
            return crawl_cli.main(f"{name}.py", RUN[name], [*argv, *more])
    finally:
        gc.set_threshold(*threshold)


def run_here(capfd: pytest.CaptureFixture[str], driver: str, *argv: str) -> tuple[int, str, str]:
    """As ``run_program``, in this process."""
    return walk_main(driver, *argv), *capfd.readouterr()


@pytest.fixture(scope="session")
def web() -> Iterator[Sandbox]:
    with Sandbox(hosts=24, pages=20, page_bytes=4000) as sandbox:
        yield sandbox


def scrape(
    driver: str, urls: Iterable[str], on_result: Callable[[ScrapeResult], None] | None = None, **options: Any
) -> list[ScrapeResult]:
    settings = Options(**({"rate": 0, "timeout": HANG_LIMIT} | options))
    if driver == "crawl_threads":
        return crawl_threads.scrape_all(urls, settings, on_result=on_result)
    return asyncio.run(crawl_async.scrape_all(urls, settings, on_result=on_result))


def start(driver: str, *argv: str, stdin: Any = subprocess.DEVNULL, **more: Any) -> subprocess.Popen[bytes]:
    name, *more_argv = driver.split()
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", str(HERE / f"{name}.py"), *argv, *more_argv],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=HERE,
        **more,
    )


def run_program(driver: str, *argv: str, input: bytes = b"", **more: Any) -> tuple[int, bytes, str]:
    with start(driver, *argv, stdin=subprocess.PIPE, **more) as child:
        out, err = child.communicate(input, timeout=PROGRAM_LIMIT)
    return child.returncode, out, err.decode()


def kind(row: ScrapeResult | dict[str, Any]) -> str:
    error = row["error"] if isinstance(row, dict) else row.error
    return error.partition(":")[0] if error else "ok"


RawAnswer = list[bytes | None]
"""Pieces, each sent by itself. ``None`` at the end: the connection stays, for a next request; else it is closed."""


class RawWeb:
    """A server on loopback: ``answers`` holds those of each path, the last one for all further requests."""

    def __init__(self, answers: dict[str, list[RawAnswer]]) -> None:
        self.answers = {path: list(several) for path, several in answers.items()}
        self.asked: list[tuple[str, float]] = []
        """(path, monotonic seconds) of each request."""
        self.heads: list[bytes] = []
        self.sent: list[str] = []
        """The paths whose pieces were all taken by the system, or read."""
        self._open: set[socket.socket] = set()
        web = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                web._open.add(self.request)
                with contextlib.suppress(OSError):
                    lines = iter(self.rfile.readline, b"")
                    while head := b"".join(itertools.takewhile(b"\r\n".__ne__, lines)):
                        path = head.split()[1].decode("latin-1")
                        web.asked.append((path, time.monotonic()))
                        web.heads.append(head)
                        several = web.answers.get(path) or [[raw_answer(b"", "404 Not Found")]]
                        *pieces, last = several.pop(0) if len(several) > 1 else several[0]
                        for piece in pieces if last is None else [*pieces, last]:
                            self.request.sendall(cast(bytes, piece))
                        web.sent.append(path)
                        if last is not None:
                            return

            def finish(self) -> None:
                web._open.discard(self.request)
                with contextlib.suppress(OSError):
                    super().finish()

        class Server(socketserver.ThreadingTCPServer):
            request_queue_size = 128  # with the usual 5, some of many connections come a second late

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> RawWeb:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def times(self, path: str) -> list[float]:
        return [at for asked, at in self.asked if asked == path]


def raw_answer(body: bytes = b"", status: str = "200 OK", *lines: str | bytes, length: int | None = None) -> bytes:
    encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in encoded):
        encoded.append(b"Content-Length: %d" % (len(body) if length is None else length))
    return b"\r\n".join([b"HTTP/1.1 " + status.encode(), *encoded, b"", body])


RAW_OK = raw_answer(b"<title>ok</title><p>one two<a href=/x>x</a>", "200 OK", "Content-Type: text/html")


PUBLIC = "93.184.215.14"


class Web:
    """A world for one test: names resolve as ``names`` says, every connection ends at one server on loopback.

    ``connects`` holds the addresses that were to be connected to; a path that begins with ``/to/`` redirects to what
    follows; ``/close`` in it closes the connection after the answer.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[list[str]]] = {"public.example": [[PUBLIC]]}
        self.connects: list[str] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.refusing: set[str] = set()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def do_GET(self) -> None:
                web.heads.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                path = "/" + self.path.split("/", 3)[3] if self.path.startswith("http://") else self.path
                body = f"<title>{path}</title>".encode()
                self.send_response(302 if path.startswith("/to/") else 200)
                if path.startswith("/to/"):
                    self.send_header("Location", path[4:])
                if "/close" in path:
                    self.send_header("Connection", "close")
                self.send_header("Set-Cookie", "theirs=1; Path=/")
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.port, self.other_port = (server.server_address[1] for server in self.servers)
        self.threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self.servers]
        for thread in self.threads:
            thread.start()
        real = socket.socket.connect

        def getaddrinfo(name: str, *args: Any, **more: Any) -> list[Any]:
            if name not in web.names:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            answers = web.names[name]
            return [
                (socket.AF_INET6 if ":" in address else socket.AF_INET, 1, 6, "", (address, 0))
                for address in (answers.pop(0) if len(answers) > 1 else answers[0])
            ]

        def connect(sock: socket.socket, address: Any) -> None:
            web.connects.append(address[0])
            if address[0] in web.refusing:
                raise ConnectionRefusedError(111, "Connection refused")
            real(sock, ("127.0.0.1", web.other_port if address[1] == web.other_port else web.port))

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", connect)
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for module in (http_urllib, http_aiohttp):  # so that a name is looked up for each connection
            monkeypatch.setattr(module, "Resolver", functools.partial(crawl_net.Resolver, ttl=1e-9, threads=1))

    def close(self) -> None:
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def asked(self, path: str) -> int:
        return sum(found == path for found, _ in self.heads)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    web = Web(monkeypatch)
    try:
        yield web
    finally:
        web.close()


def guard_scrape(driver: str, urls: Iterable[str], **options: Any) -> dict[str, ScrapeResult]:
    """One worker, so that the order is that of the list; a redirect goes before the next of its host."""
    settings = Options(**({"rate": 0.0, "timeout": HANG_LIMIT, "concurrency": 1} | options))
    if driver == "crawl_threads":
        rows = crawl_threads.scrape_all(urls, settings)
    else:
        factory = new_loop if driver == "crawl_async on uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            rows = runner.run(crawl_async.scrape_all(urls, settings))
    return {row.url: row for row in rows}


def guard_errors(rows: dict[str, ScrapeResult]) -> list[str | None]:
    return [row.error for row in rows.values()]


def robots_file(line: Callable[[int], str]) -> bytes:
    """500 KiB of lines, by their number."""
    parts = ["User-agent: *\n"]
    size = len(parts[0])
    while size < MAX_ROBOTS:
        parts.append(line(len(parts)) + "\n")
        size += len(parts[-1].encode())
    return "".join(parts[:-1]).encode()


ROBOTS_LARGE = {
    "wildcards": lambda n: f"Disallow: /*{n:014}*{n:010}*{n:07}",
    "short wildcards": lambda n: f"allow:/{n:x}*",
    "stars": lambda n: f"Disallow: /{n}" + "*a" * 300,
    "prefixes": lambda n: f"Disallow: /{n:018}",
    "short prefixes": lambda n: f"allow:/{n:05x}",
    "nested prefixes": lambda n: "allow:/" + "a" * n,
    "anchors": lambda n: f"Disallow: /{n:x}$",
    "dollars": lambda n: f"Disallow: /$$$$$$$$$$$$$$${n:x}$",
    "escapes": lambda n: "Disallow: /" + "%e9" * 40 + f"{n:x}",
    "unicode": lambda n: f"Disallow: /日本語日本語日本語{n:x}",
    "special": lambda n: f"Disallow: /?&!,;@()?&!,;@(){n:x}",
    "groups": lambda n: f"User-agent: a{n}\nDisallow: /{n:05x}\nUser-agent: *",
    "agents": lambda n: f"User-agent: a{n}",
    "sitemaps": lambda n: f"Sitemap: https://site.example/{n}/" + "x" * 400,
    "bad sitemaps": lambda n: f"Sitemap: {n:x}",
    "delays": lambda n: f"Crawl-delay: {n}",
    "unknown": lambda n: "a:",
    "junk": lambda n: "a",
    "comments": lambda n: "#",
    "long lines": lambda n: f"Disallow: /{n}" + "x" * 100_000,
}


FEEDS_DRIVERS = WALKERS


class Answer:
    """A route: its body, and what it is conditional on. ``gate``: answered when that is set."""

    def __init__(self, body: str | bytes = "", kind: str = "text/html; charset=utf-8", **headers: str) -> None:
        self.body = body.encode() if isinstance(body, str) else body
        self.status = 200
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"Content-Type": kind}
        self.gate: threading.Event | None = None


class Site:
    """Servers on loopback addresses, one for each host, with the same routes, and a log of what was asked."""

    def __init__(self, hosts: int) -> None:
        self.routes: dict[str, Answer] = {}
        self.log: list[tuple[str, int, str | None, str | None]] = []
        """(path, status, If-None-Match, If-Modified-Since)"""
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer = site.routes.get(self.path) or Answer("nothing", status="404")
                status = int(answer.headers.get("status", 200))
                asked, since = self.headers["If-None-Match"], self.headers["If-Modified-Since"]
                known = asked is not None and asked == answer.headers.get("ETag")
                unchanged = since is not None and since == answer.headers.get("Last-Modified")
                if status == 200 and (known or unchanged):
                    status = 304
                site.log.append((self.path, status, asked, since))
                if answer.gate:
                    answer.gate.wait(HANG_LIMIT)
                with contextlib.suppress(OSError):  # its client was killed
                    self.send_response(status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", "0" if status == 304 else str(len(answer.body)))
                    self.end_headers()
                    self.wfile.write(b"" if status == 304 else answer.body)

            def log_message(self, *_: Any) -> None: ...

        self.servers = [http.server.ThreadingHTTPServer((f"127.0.2.{n + 1}", 0), Handler) for n in range(hosts)]
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self.servers]
        for thread in self._threads:
            thread.start()

    def url(self, path: str, host: int = 0) -> str:
        return "http://{}:{}".format(*self.servers[host].server_address) + path

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
        for thread in self._threads:
            thread.join()
        for server in self.servers:
            server.server_close()

    def paths(self) -> Counter[str]:
        return Counter(path for path, *_ in self.log)


@pytest.fixture
def feeds_site() -> Iterator[Site]:
    site, thresholds = Site(2), gc.get_threshold()
    try:
        yield site
    finally:
        site.close()
        gc.set_threshold(*thresholds)


@pytest.fixture(scope="session")
def template() -> Iterator[crawl_readers.Template]:
    kept = crawl_readers.Template()
    yield kept
    kept.close()


@pytest.fixture
def lent_template(template: crawl_readers.Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of crawls in this process are copies of one template, which stays: each would take half a second."""

    class Lent(crawl_readers.Template):
        def __init__(self) -> None:
            self.lock, self.process, self._control = template.lock, template.process, template._control

        def end(self, readers: Iterable[crawl_readers.Reader]) -> None:
            for reader in readers:  # who holds one reaps it
                os.kill(reader.pid, signal.SIGKILL)

        def close(self) -> None: ...

    monkeypatch.setattr(crawl_readers, "Template", Lent)


def feeds_rss(*links: str, more: str = "") -> str:
    items = "".join(f"<item><title>On {link}</title><link>{link}</link>{more}</item>" for link in links)
    return f"<rss version='2.0' xmlns:dc='http://purl.org/dc/elements/1.1/'><channel>{items}</channel></rss>"


def feeds_article(name: str, head: str = "") -> str:
    text = f"This is the story of {name}, which has a good many words in it, as stories have. " * 5
    return f"<html><head><title>Page {name}</title>{head}</head><body><article><p>{text}</p></article></body></html>"


def feeds_run(driver: str, folder: Path, listed: list[str], *options: str, name: str = "news.jsonl") -> dict[str, Any]:
    """Run a crawler's program; the counts of --stats. The rows are in ``name``."""
    urls, stats = folder / "feeds.txt", folder / "stats.json"
    urls.write_text("".join(f"{url}\n" for url in listed))
    argv = [str(urls), "--feeds", "-q", "-o", str(folder / name), "--rate", "0", "--stats", str(stats), *options]
    assert walk_main(driver, *argv) == 0
    return cast(dict[str, Any], json.loads(stats.read_text()))


def feeds_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "news.jsonl").read_text().splitlines()]


def walk_crawl(**options: Any) -> Crawl:
    return Crawl(Options(**({"rate": 0.0, "timeout": HANG_LIMIT, "depth": 9, "retries": 0} | options)))


def walk(driver: str, crawl: Crawl, urls: Iterable[str], emit: Callable[[ScrapeResult], None]) -> None:
    def count(row: ScrapeResult) -> None:
        crawl.stats.count_row(row)
        emit(row)

    async def put(row: ScrapeResult) -> None:
        count(row)

    async def tasks() -> None:
        await crawl_async.Driver(crawl, put).run(urls)

    def write(*found: ScrapeResult) -> None:
        for row in found:
            count(row)

    name, *processes = driver.split()
    if processes:
        with unittest.mock.patch("runtime.processes.may_fork", return_value=True):
            run_processes(crawl, urls, write, int(processes[1]), RUN[name])
    elif driver == "crawl_threads":
        crawl_threads.Driver(crawl, count).run(urls)
    else:
        asyncio.run(tasks())
    if crawl.failure:
        raise crawl.failure


def walk_row(url: str, /, *links: str, **more: Any) -> bytes:
    row = CrawlResult(url, 200, None, 0, list(links), None, "2030-01-01T00:00:00Z", 1.0, url)
    return json.dumps(dataclasses.asdict(row) | more).encode().replace(b'{"url": ', b'{"url":') + b"\n"
