"""A small internet on loopback: sites worth crawling, and a catalogue of servers that misbehave.

Theory
------
`Sandbox` is one HTTP/1.1 server on the addresses 127.0.1.1, 127.0.1.2, ... (one per host, all on one port). It writes
raw bytes, because most of what a client must survive is what an HTTP library refuses to send. (Linux has all of
127.0.0.0/8; on macOS each address must be added first: `ifconfig lo0 alias 127.0.1.1`.) In layers:

* **Pages.** `make_page` is pure: it depends on its arguments alone.
* **Upstream APIs** under /api/ (JSON, one of them flaky) for programs that aggregate.
* **Answers.** `sandbox/faults.py` has the handlers, each a pure function of the request, and the catalogue of faults.
* **`SiteConnection`** plays the answers of one in order, and never buffers more than the transport's high-water
  mark and one step, however slowly the peer reads. **`Sandbox`** owns the sockets, the thread and the log.

Promised: the same seed gives the same pages; every page of a host can be reached from its "/" in about log8(pages)
clicks; HEAD, keep-alive, pipelining and `Connection: close` are right for every answer that is not a script; a request
is logged when its head is complete, before anything is sent; after `stop()` no socket, task or thread is left, whatever
was hanging. Not promised: methods other than GET and HEAD, or HEAD on scripts (they are played in full: they are wrong
on purpose).

Threads: all connections live in one event loop in a thread of the sandbox's own. `Sandbox._lock` guards the log and the
count of statuses, which other threads read; everything else belongs to the loop (others read two of its integers).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import functools
import ipaddress
import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import NamedTuple, cast
from urllib.parse import parse_qs, urlencode

from sandbox.faults import (
    CLOSE,
    DOOM,
    FAULTS,
    RESET,
    ROUTES,
    SiteRequest,
    Step,
    catalogue,
    only_head,
    plus,
    reply,
    route,
    simple,
)
from sandbox.serving import InThread

BASE = "http://{host}:8080"
HEAD_LIMIT = 65_536  # bytes of a request head, and of pipelined requests held back behind a running answer
CACHE_BYTES = 64 << 20  # generated pages kept
COUNTS_LIMIT = 100_000  # URLs whose requests are counted for the entries that fail at first
TURN_BYTES, STEP_COST = 262_144, 16_384  # what a connection may write before the others' turn; a step counts extra
LINGER = 1.0  # seconds that a refused peer has to read why

SITE_PAGE = re.compile(r"/p/([1-9][0-9]{0,8})\.html")
ASKS_CLOSE = re.compile(rb"(?i)\r\nconnection:[^\r\n]*\bclose\b")
COOKIE = re.compile(rb"(?i)\r\ncookie:[ \t]*([^\r\n]*)")
HAS_BODY = re.compile(rb"(?i)\r\n(?:content-length:[ \t]*0*[1-9]|transfer-encoding:)")
PLAIN_WORDS = re.findall(
    r"\w+",
    """about after against all also among around away back because before between both call change city close could
    day different down each early end even every example face far field first form found full garden give good great
    hand harbour help high house idea just keep kind know land large last letter life light line little long look make
    market measure might more most mountain much name near network never new night number often old once open order
    other over paper part people place plan point power question read result right river road same school second side
    small sound state still story system table take tell that these thing through time town tree turn under until
    voice water well what when where which while wind with word work world would year young""",
)
SMALL_WORDS = re.findall(r"\S+", "the of and to in is it for on was as a at caf&eacute; r&amp;d Zürich naïve señor")
WORDS = PLAIN_WORDS + SMALL_WORDS * 3


# --- Sites -----------------------------------------------------------------------------------------------------------


def address(host: int) -> str:
    """The address of a host: 127.0.1.1 for host 0, and so on upwards."""
    return str(ipaddress.IPv4Address("127.0.1.1") + host)


def page_path(page: int) -> str:
    """The path of a page: "/" for 0, else /p/N.html."""
    return f"/p/{page}.html" if page else "/"


def _link(base: str, target: int, on: int, shape: int, text: str) -> str:
    """A link from page `on` to page `target` of one host, in one of seven shapes."""
    path = page_path(target)
    relative = (f"{target}.html" if target else "../") if on else path[1:] or "./"
    scheme_relative = base.partition(":")[2] + path
    shapes = (path, relative, base + path, f"{path}#part-{shape}", f"../{path[1:]}", scheme_relative, f"{relative}#top")
    return f'<a href="{shapes[shape % 7]}"{(" class=link", " title=more", "")[shape % 3]}>{text}</a>'


def make_page(
    host_index: int, page: int, pages: int, size: int = 20_000, base: str = BASE, *, hosts: int = 1, seed: int = 1
) -> bytes:
    """Page `page` of a host's `pages`: a news-like HTML article in UTF-8, of exactly `size` bytes.

    `base` is a host's URL without path, "{host}" standing for its address. Pages form a tree (8n+1 to 8n+8 are below n)
    with more links across it and, given `hosts` > 1, a few to other hosts; about 60 links at 20 KB. 15 % of the bytes
    are style and script, a third is visible text. A size below the skeleton's (2 to 3 KB) gives a tiny valid page that
    has the tree's links only. Raises ValueError unless 0 <= page < pages.
    """
    if not 0 <= page < pages:
        raise ValueError(f"page {page} is not one of {pages}")
    rng = random.Random(f"{seed}/{host_index}/{page}")
    here = base.replace("{host}", address(host_index))
    title = f"{' '.join(rng.choices(PLAIN_WORDS, k=4)).capitalize()}, page {page} of host {host_index + 1}"
    below = range(8 * page + 1, min(8 * page + 9, pages))

    links = [_link(here, child, page, n, f"Story {child}") for n, child in enumerate(below)]
    for n in range(min(48, size // 400)):
        target, text = rng.randrange(pages), " ".join(rng.choices(WORDS, k=2))
        if n % 12 == 5 and hosts > 1:
            other = (host_index + rng.randrange(1, hosts)) % hosts
            links.append(f'<a href="{base.replace("{host}", address(other))}{page_path(target)}">{text}</a>')
        elif n % 25 == 9:
            links.append(f'<a href="mailto:desk{n}@example.org">{text}</a>')
        else:
            links.extend([_link(here, target, page, n, text)] * (1 + (n % 10 == 3)))
    menu, inline = links[: len(links) // 3], links[len(links) // 3 :]

    rules = "".join(f".c{n}>p:hover{{color:#{n * 7919:06x};margin:{n}px auto}}" for n in range(size * 3 // 1900))
    script = "".join(f"q.push(['track','<a href=\"/not/a/link\">',{n}]);" for n in range(size * 3 // 1900))
    head = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="description" content="{" ".join(rng.choices(WORDS, k=12))}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="/favicon.ico">
<link rel="canonical" href="{here}{page_path(page)}">
<style>body{{font:16px/1.5 serif}}{rules}</style><script>var q=[];{script}</script></head>
<body class="article"><header><a href="#main">Skip</a></header>
<nav><ul>{"".join(f"<li>{link}</li>" for link in menu)}</ul></nav><main id="main"><article><h1>{title}</h1>"""
    foot = f"</article></main><footer><p>&copy; host {host_index + 1} &mdash; no rights</p></footer></body></html>\n"

    paragraphs = max(1, size // 3 // 300 - 1)
    blocks = []
    for n in range(paragraphs):
        words = rng.choices(WORDS, k=52)
        words[9], words[21] = f"<em>{words[9]}</em>", f"<strong class='key'>{words[21]}</strong> &#8212;"
        words[33:33] = inline[n::paragraphs]
        heading = f"\n<h2 id=part-{n}>{' '.join(rng.choices(WORDS, k=4))}</h2>" if n % 4 == 0 else ""
        blocks.append(f'{heading}\n<p class="c{n}">{" ".join(words)}.</p>')
    left = size - len((head + "".join(blocks) + foot).encode())
    if left < 0:
        tiny = "".join(f"<a href={page_path(child)}>{child}</a> " for child in below)
        return f"<!doctype html><html lang=en><title>{title}</title><p>{title}.</p>{tiny}".encode()
    for n in itertools.cycle(range(paragraphs)):
        if left < 200:
            break
        photo = f'\n<figure><img src="/img/{left}.jpg" srcset="/img/{left}-2x.jpg 2x" alt="photo {n}"></figure>'
        comment = f'<!-- <a href="/commented/out/{left}">a teaser that was taken down</a> {"-=" * 20} -->'
        blocks[n] += photo if n % 3 else comment
        left -= len(photo if n % 3 else comment)
    padding = f"<!--{'.' * (left - 7)}-->" if left >= 7 else " " * left
    return (head + "".join(blocks) + padding + foot).encode()


@route("/")
@route("/p/")
def site(request: SiteRequest) -> bytes:
    """The pages of a host, and 404 for everything that nobody else serves."""
    match = SITE_PAGE.fullmatch(request.path)
    page = int(match[1]) if match else 0
    if page < request.sandbox.pages and (match or request.path == "/"):
        return request.sandbox._page(request.host, page)
    return reply(simple("404 Not Found"), 404)


route("/robots.txt")(lambda request: reply(b"User-agent: *\nAllow: /\n", kind="text/plain"))


# --- Upstream APIs ---------------------------------------------------------------------------------------------------


def api(request: SiteRequest, data: object) -> bytes:
    """A good JSON answer; `serial` counts the requests of this URL, so that a client can tell a cached one."""
    serial = request.sandbox._count(request.host, request.target)
    return reply(json.dumps({"serial": serial, **cast(dict[str, object], data)}).encode(), kind="application/json")


@route("/api/weather")
def weather(request: SiteRequest) -> bytes:
    city = parse_qs(request.target.partition("?")[2]).get("city", ["nowhere"])[0]
    rng = random.Random(city)
    return api(request, {"city": city, "temperature": round(rng.uniform(-10, 35), 1), "wind": rng.randrange(90)})


@route("/api/rates/")
def rates(request: SiteRequest) -> bytes:
    rng = random.Random(request.name)
    names = sorted({"CHF", "EUR", "GBP", "JPY", "USD"} - {request.name})
    return api(request, {"base": request.name, "rates": {name: round(rng.uniform(0.5, 2), 4) for name in names}})


@route("/api/news")
def news(request: SiteRequest) -> bytes:
    rng = random.Random(request.sandbox.seed)
    return api(request, {"items": [{"id": n, "title": " ".join(rng.choices(PLAIN_WORDS, k=5))} for n in range(10)]})


route("/api/deep")(lambda request: reply(b"[" * 500 + b"]" * 500, kind="application/json"))


@route("/api/flaky")
def flaky(request: SiteRequest) -> bytes:
    """Two good answers, then two failures, and so on."""
    good = api(request, {"luck": True})
    serial = json.loads(good.partition(b"\r\n\r\n")[2])["serial"]
    return reply(b"out of luck", 503, "Retry-After: 1") if serial % 4 in (3, 0) else good


# --- The log ---------------------------------------------------------------------------------------------------------


class LogEntry(NamedTuple):
    """One request. `t`: monotonic seconds when its head was complete; `status`: that of the answer's first status line,
    None if that is not sent in one piece; `connection`: its number, counted from 1 over all hosts."""

    t: float
    host: str
    path: str
    status: int | None
    connection: int


class SandboxStats(NamedTuple):
    """Counts since the start; `open` connections are of now; `statuses` counts requests by the log's `status`."""

    requests: int
    connections: int
    open: int
    statuses: dict[int | None, int]


def max_in_window(times: Sequence[float], seconds: float) -> int:
    """The largest number of these ascending times in any half-open window [t, t + seconds)."""
    best = first = 0
    for last, t in enumerate(times):
        while t - times[first] >= seconds:
            first += 1
        best = max(best, last - first + 1)
    return best


# --- The server ------------------------------------------------------------------------------------------------------


def parse_head(sandbox: Sandbox, host: int, head: bytes) -> SiteRequest | int:
    """A request from the bytes before its blank line, or the status that refuses it (RFC 9112 sections 3 and 6)."""
    words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return 400
    method, target, version = words
    if target.startswith(("http://", "https://")):
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    if not target.startswith("/"):
        return 400
    if method not in ("GET", "HEAD"):
        return 405
    if HAS_BODY.search(head):
        return 413
    close = version == "HTTP/1.0" or ASKS_CLOSE.search(head) is not None
    cookie = COOKIE.search(head)
    return SiteRequest(
        sandbox, host, method, target, target.partition("?")[0], close, cookie[1].decode("latin-1") if cookie else ""
    )


class SiteConnection(asyncio.Protocol):
    """One accepted connection: takes request heads from `inbox` and plays their answers, one after the other.

    `steps`: the answer being played, None between answers. `timer`: set while it waits by itself; `choked`: the peer
    does not read; `last`: close after this answer; `doomed`: close at the next request; `deaf`: refused, or lost;
    `handshake`: TLS is not ready, although its first data may already have come.
    """

    transport: asyncio.Transport

    def __init__(self, sandbox: Sandbox, host: int) -> None:
        self.sandbox, self.host, self.loop = sandbox, host, asyncio.get_running_loop()
        self.number = 0
        self.inbox = b""
        self.steps: Iterator[Step] | None = None
        self.timer: asyncio.Handle | None = None
        self.handshake: asyncio.Task[None] | None = None
        self.choked = self.last = self.doomed = self.deaf = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.sandbox._connections += 1
        self.number = self.sandbox._connections
        self.sandbox._open.add(self)
        if self.sandbox.tls is not None:
            # create_server(ssl=...) would hide the connection from stop() until its handshake is over.
            self.transport.pause_reading()
            self.handshake = self.loop.create_task(self._start_tls(self.sandbox.tls))

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        try:
            transport = await self.loop.start_tls(self.transport, self, context, server_side=True)
        except OSError:
            transport = None
        if transport is None:
            self.connection_lost(None)
        else:
            self.transport, self.handshake = transport, None
            self._serve()

    def connection_lost(self, exc: Exception | None) -> None:
        self.steps, self.deaf = None, True
        if self.timer is not None:
            self.timer.cancel()
        self.sandbox._open.discard(self)

    def pause_writing(self) -> None:
        self.choked = True

    def resume_writing(self) -> None:
        self.choked = False
        if self.timer is None:
            self._resume()

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        self.inbox += data
        if self.steps is None and self.handshake is None:
            self._serve()
        if len(self.inbox) > HEAD_LIMIT:
            self.transport.pause_reading()

    def _resume(self) -> None:
        """Go on after a wait of any kind."""
        self.timer = None
        if self.steps is not None:
            self._play()
        self._serve()
        if len(self.inbox) <= HEAD_LIMIT:
            self.transport.resume_reading()

    def _serve(self) -> None:
        """Answer what the inbox holds, until an answer has to wait."""
        while self.steps is None and not (self.choked or self.deaf or self.transport.is_closing()):
            end = self.inbox.find(b"\r\n\r\n", 0, HEAD_LIMIT)
            if end >= 0:
                head, self.inbox = self.inbox[:end], self.inbox[end + 4 :]
                self._start(head, time.monotonic())
            elif len(self.inbox) < HEAD_LIMIT:
                return
            else:
                self._refuse(431, time.monotonic())

    def _start(self, head: bytes, now: float) -> None:
        """Log one request and begin its answer."""
        request = parse_head(self.sandbox, self.host, head)
        if isinstance(request, int):
            self._refuse(request, now)
            return
        path = request.path
        handler = ROUTES.get(path) or ROUTES.get(path[: path.rfind("/") + 1]) or site
        answer = [CLOSE] if self.doomed else handler(request)
        if isinstance(answer, bytes):
            if request.method == "HEAD":
                answer = only_head(answer)
            if request.close:
                answer = plus(answer, b"Connection: close")
            answer = [answer]
        steps = iter(answer)
        first = next(steps)
        announced = re.match(rb"HTTP/1\.. (\d{3}) ", first) if isinstance(first, bytes) else None
        self.sandbox._record(now, self, request.target, int(announced[1]) if announced else None)
        self.steps, self.last = itertools.chain((first,), steps), request.close
        delay = self.sandbox._latency(self.host, path)
        if delay > 0:
            self.timer = self.loop.call_later(delay, self._resume)
        else:
            self._play()

    def _play(self) -> None:
        """Take steps until one waits, the peer chokes, the turn is over or the answer ends."""
        turn = TURN_BYTES
        while self.steps is not None and not (self.choked or self.transport.is_closing()):
            step = next(self.steps, None)
            if isinstance(step, bytes):
                self.transport.write(step)
                turn -= len(step) + STEP_COST
                if turn < 0:
                    self.timer = self.loop.call_soon(self._resume)
                    return
            elif isinstance(step, float):
                self.timer = self.loop.call_later(step, self._resume)
                return
            elif step is DOOM:
                self.doomed = True
            elif step is RESET:
                linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.transport.abort()
            else:
                self.steps = None
                if self.last or step is CLOSE:
                    self.transport.close()

    def _refuse(self, status: int, now: float) -> None:
        """Answer with an error and close, but read on for a moment: closing on unread bytes would reset the answer."""
        self.sandbox._record(now, self, "", status)
        self.deaf, self.inbox = True, b""
        self.transport.write(reply(simple(str(status)), status, "Allow: GET, HEAD", "Connection: close"))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.timer = self.loop.call_later(LINGER, self.transport.abort)
        else:
            self.transport.close()


class Sandbox(InThread):
    """The server in a thread of its own: `with Sandbox() as sandbox: client(sandbox.url("/"))`.

    `hosts`, `pages` (of a host), `page_bytes`, `seed`: the sites. `port`: 0 finds one that is free on all addresses.
    `latency`: seconds before every answer, or a function of (host index, path) that gives them. `tls`: a server
    context, for https instead of http. `log`: how many entries to keep, the newest; True is 200,000, False none.
    Raises ValueError for impossible arguments; `start` raises OSError if an address cannot be had.
    """

    hosts: list[str]
    closed_url: str

    def __init__(
        self,
        hosts: int = 8,
        pages: int = 25,
        page_bytes: int = 20_000,
        port: int = 0,
        seed: int = 1,
        latency: float | Callable[[int, str], float] = 0.0,
        tls: ssl.SSLContext | None = None,
        log: bool | int = True,
    ) -> None:
        if not (1 <= hosts <= 50_000 and pages >= 1 and page_bytes >= 0 and 0 <= port <= 65_535):
            raise ValueError("needed: 1 to 50000 hosts, at least one page, no negative size, a port up to 65535")
        super().__init__()
        self.hosts = [address(host) for host in range(hosts)]
        self.pages, self.page_bytes, self.port, self.seed, self.tls = pages, page_bytes, port, seed, tls
        self._latency = latency if callable(latency) else lambda host, path: latency
        self._cache: dict[tuple[int, int], bytes] = {}
        self._cached = 0
        self._counts: Counter[tuple[int, str]] = Counter()
        self._open: set[SiteConnection] = set()
        self._lock = threading.Lock()
        self._log: deque[LogEntry] = deque(maxlen=200_000 if log is True else int(log))
        self._connections = 0
        self._statuses: Counter[int | None] = Counter()

    def __repr__(self) -> str:
        state = "running" if self._thread else "stopped"
        return f"<Sandbox {state}, {len(self.hosts)} hosts of {self.pages} pages from {self.url('/')}, {self.stats()}>"

    def url(self, path: str, host: int = 0) -> str:
        """The URL of a path; host numbers wrap around."""
        return self._base.replace("{host}", self.hosts[host % len(self.hosts)]) + path

    def site_urls(self) -> Iterator[str]:
        """The URL of every page of every host, the hosts taking turns."""
        return (self.url(page_path(page), host) for page in range(self.pages) for host in range(len(self.hosts)))

    def fault_url(self, name: str, host: int = 0, **query: object) -> str:
        """The URL of an entry of the catalogue; any new `key=...` makes entries that fail at first fail again."""
        return self.url(FAULTS[name].path, host) + ("?" + urlencode(query) if query else "")

    @property
    def log(self) -> list[LogEntry]:
        """A copy of the log, in order of time."""
        with self._lock:
            return list(self._log)

    def stats(self) -> SandboxStats:
        with self._lock:
            return SandboxStats(self._statuses.total(), self._connections, len(self._open), dict(self._statuses))

    def requests_for(self, path: str) -> list[LogEntry]:
        """The logged requests for a path: with any query, unless `path` has one itself."""
        whole = "?" in path
        return [entry for entry in self.log if (entry.path if whole else entry.path.partition("?")[0]) == path]

    def max_in_window(self, host: int, seconds: float) -> int:
        """The largest number of logged requests to a host in any half-open window of so many seconds."""
        return max_in_window([entry.t for entry in self.log if entry.host == self.hosts[host]], seconds)

    def _bind(self) -> list[socket.socket]:
        """A listening socket for each host, all on one port, and a last one that is bound only: a closed port."""
        tries = 20
        while True:
            sockets: list[socket.socket] = []
            port, tries = self.port, tries - 1
            try:
                for host in self.hosts:
                    sockets.append(socket.socket())
                    if os.name == "posix":
                        sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sockets[-1].bind((host, port))
                    sockets[-1].listen(4096)
                    port = sockets[-1].getsockname()[1]
                sockets.append(socket.socket())
                sockets[-1].bind((self.hosts[0], 0))
                self.port, self.closed_url = port, "http://{}:{}/".format(*sockets[-1].getsockname())
                return sockets
            except OSError as error:
                for sock in sockets:
                    sock.close()
                if self.port or tries == 0 or error.errno != errno.EADDRINUSE:
                    raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None

    @contextlib.asynccontextmanager
    async def _serve(self, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_server(functools.partial(SiteConnection, self, host), sock=sock, backlog=4096)
            for host, sock in enumerate(sockets[:-1])
        ]
        yield
        for server in servers:
            server.close()
        while self._open or len(asyncio.all_tasks()) > 1:
            for connection in list(self._open):
                connection.transport.abort()
            await asyncio.sleep(0)  # ends are reported, accepts and handshakes finish, in the next turns of the loop

    @property
    def _base(self) -> str:
        return f"{'https' if self.tls else 'http'}://{{host}}:{self.port}"

    def _page(self, host: int, page: int) -> bytes:
        response = self._cache.get((host, page))
        if response is None:
            hosts = len(self.hosts)
            body = make_page(host, page, self.pages, self.page_bytes, self._base, hosts=hosts, seed=self.seed)
            response = self._cache[host, page] = reply(body)
            self._cached += len(response)
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                self._cached -= len(self._cache.pop(next(iter(self._cache))))
        return response

    def _count(self, host: int, target: str) -> int:
        self._counts[host, target] += 1
        if len(self._counts) > COUNTS_LIMIT:
            del self._counts[next(iter(self._counts))]
        return self._counts[host, target]

    def _record(self, now: float, connection: SiteConnection, target: str, status: int | None) -> None:
        with self._lock:
            self._statuses[status] += 1
            self._log.append(LogEntry(now, self.hosts[connection.host], target, status, connection.number))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM (exit code 130); see --help."""
    parser = argparse.ArgumentParser(
        "python -m sandbox",
        description="Serve a small internet on loopback: linked sites, and a catalogue of servers that misbehave.",
        epilog=f"""examples:
  python -m sandbox --hosts 50 --pages 200 --urls pages.txt
  python -m sandbox --latency 0.2 & curl -s --compressed http://127.0.1.1:8080/fault/gzip
  python -m sandbox --urls - | python crawl_async.py -

other simulations, with options of their own (python -m sandbox WORD --help):
  sites       this one; without a word too
  logs        services that send log lines by UDP, and the API of their metadata
  exchanges   ten simulated exchanges by WebSocket
  broker      a broker that speaks Kafka

Every host serves / and /p/N.html (its pages), /robots.txt, /status/N for N from 100 to 599, and /fault/NAME for each
name below. "right result" is what a client should make of it without retries; so many "retries" make it succeed.

{catalogue()}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", type=int, default=8, metavar="N", help="addresses from 127.0.1.1 up (%(default)s)")
    parser.add_argument("--pages", type=int, default=25, metavar="N", help="pages of each host (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, metavar="P", help="0 finds a free one (%(default)s)")
    parser.add_argument("--size", type=int, default=20_000, metavar="B", help="bytes of a page (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the generated pages (%(default)s)")
    parser.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds before each answer")
    parser.add_argument("--list", action="store_true", help="print the catalogue and exit")
    parser.add_argument("--urls", metavar="FILE", help="write the URL of every page (- for stdout), and serve")
    args = parser.parse_args(argv)
    try:
        if args.list:
            print(catalogue(), flush=True)
            return 0
        with Sandbox(args.hosts, args.pages, args.size, args.port, args.seed, args.latency, log=False) as sandbox:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            lines = (url + "\n" for url in sandbox.site_urls())
            if args.urls == "-":
                sys.stdout.writelines(lines)
                sys.stdout.flush()
                _leave_stdout()
            elif args.urls:
                with open(args.urls, "w", encoding="ascii") as file:
                    file.writelines(lines)
            print(f"serving {sandbox.url('/')} to {sandbox.url('/', -1)}, Ctrl-C stops", file=sys.stderr)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _leave_stdout()
    except OSError as error:
        print(f"sandbox: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2
    return 0


def _leave_stdout() -> None:
    """Let the reader of our standard output see its end; or write no more to one that has gone."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
