"""Around a program that runs until it is told to stop: its event loop, signals, log lines, ``/metrics``, ``/health``.

``Lag``                  how late the event loop wakes a sleeper, measured all the time.
``stopped_by_signals``   SIGINT and SIGTERM call the program's ``stop``: the first drains, the second forces.
``TaskSupervisor``              tasks that go on after an error that nobody had foreseen; each is counted and shown.
``Stderr``               standard error, for the log and all else: who writes never waits for who reads. What waits is
                         bounded, what finds no room is counted, and said when there is a reader again.
``http``                 two routes on a socket that was bound before the program began, so that a port which is taken
                         is the user's one line at the start. A connection is one request, and ends within ``PATIENCE``
                         seconds whatever its client does or leaves undone; of more than ``CONNECTIONS`` the oldest ends
                         at once. So silent clients keep nobody out, and there is no reason to refuse one.

That server is our own: the usual ones have no limit of time for a request's head, and bound the connections by refusing
new ones, which is whoever asks for ``/health``.

Where what runs: all in the event loop, but for writing what ``Stderr`` has: that is a daemon thread's, and the end of
the program waits ``LAST`` seconds for it at most. What is shown is taken from a snapshot when somebody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from decimal import Decimal
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


PAUSE = 0.5
"""Seconds after which a task that failed in a way that nobody had foreseen goes on."""
SHOWN = 10
"""Of such failures, with their tracebacks."""
CONNECTIONS = 128
"""Connections for ``/metrics`` and ``/health`` at a time."""
PATIENCE = 5.0
"""Seconds from the beginning of such a connection to its end."""
HEAD, BODY = 8 << 10, 64 << 10
"""Bytes of a request's head, and of what comes after it, at most. Nobody needs a body: it is read and forgotten."""
UNREAD = 256 << 10
"""Bytes that wait to be written to standard error."""
LAST = 1.0
"""Seconds that the end of the program waits for them to be read."""


class CannotStart(Exception):
    """One line for the user."""


class TaskSupervisor:
    """What a program has of tasks that last as long as itself, and of its faults."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._faults = log, 0
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def _fault(self, where: str, error: BaseException | None) -> None:
        self._faults += 1
        if self._faults <= SHOWN:
            self._log.error("%s failed", where, exc_info=error)

    def _start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """A task of that name: ``work()``, until it returns or is cancelled; after an error, once more."""

        async def kept() -> None:
            while True:
                try:
                    return await work()
                except Exception as error:
                    self._fault(name, error)
                    await asyncio.sleep(PAUSE)

        self._tasks[name] = asyncio.create_task(kept(), name=name)


def new_loop() -> asyncio.AbstractEventLoop:
    """That of uvloop, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Lag:
    """How late the event loop wakes a sleeper: what a call that blocks it would cost everybody. Seconds."""

    def __init__(self, every: float = 0.25, keep: int = 240) -> None:
        self._every = every
        self.recent: deque[float] = deque([0.0], maxlen=keep)

    async def watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._every
            await asyncio.sleep(self._every)
            self.recent.append(max(0.0, loop.time() - due))


SIZES = "5M and 5MB are 5,000,000 bytes, 5MiB are 5,242,880"


def size(text: str) -> int:
    """``5M``, ``5MB`` -> 5,000,000 bytes, ``5MiB`` -> 5,242,880 (IEC 80000-13); ``ValueError`` for what is no size."""
    match = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,15})?(?:e[0-9]{1,2})?) ?(?:([kMGT])(i?)B?|B?)", text, re.ASCII | re.IGNORECASE
    )
    if match is None:
        raise ValueError
    power = " kmgt".index((match[2] or " ").lower())
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPv6]:PORT``; ``ValueError`` for anything else."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65_536) or bracketed == (
        ":" not in host
    ):
        raise ValueError(f"expected HOST:PORT or [IPv6]:PORT, not {text!r}")
    host = host[1:-1] if bracketed else host
    if not host:
        raise ValueError(f"expected an address before the port (0.0.0.0 or [::] for all), not {text!r}")
    return host, int(port)


def shown_address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Stderr(io.TextIOBase):
    """Text for descriptor ``fd``, written by a thread. ``name`` is the program's, for what is said of lost lines.

    What finds ``UNREAD`` bytes waiting is lost, and all after it until these are written: a loss is one gap, and the
    line on it stands there. ``status`` is for a terminal: what stays below all lines; of it only the newest waits.
    """

    def __init__(self, fd: int, name: str, encoding: str = "utf-8") -> None:
        self._fd, self._name, self._encoding = fd, name, encoding
        self._waiting, self._status = bytearray(), b""
        self._full, self._gap, self.lost = False, 0, 0
        self._over = False
        self._news = threading.Condition()  # of an RLock: a warning may be written in the middle of this
        self._thread = threading.Thread(target=self._write_all, name="stderr", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        data = text.encode(self._encoding, "backslashreplace")
        with self._news:
            self._full = self._full or len(self._waiting) + len(data) > UNREAD
            if self._full:
                self._gap += data.count(b"\n")
                self.lost += data.count(b"\n")
            else:
                self._waiting += data
            self._news.notify_all()
        return len(text)

    def status(self, text: str) -> None:
        with self._news:
            self._status = text.encode(self._encoding, "replace")
            self._news.notify_all()

    def finish(self) -> bool:
        """Whether all is written within ``LAST`` seconds. If not, nobody reads, and what comes is never written."""
        with self._news:
            self._over, self._status = True, b""
            self._news.notify_all()
        with contextlib.suppress(KeyboardInterrupt):
            self._thread.join(LAST)
        return not self._thread.is_alive()

    def _ready(self) -> int:
        """How many bytes may be written: the status would be in a line that has not ended."""
        return self._waiting.rfind(b"\n") + 1 if self._status and not self._full else len(self._waiting)

    def _write_all(self) -> None:
        shown = b""
        while True:
            with self._news:
                while not (self._ready() or self._full or self._status != shown):
                    if self._over:
                        return
                    self._news.wait()
                end, status = self._ready(), self._status
                text = bytes(self._waiting[:end])
                del self._waiting[:end]
                if self._full:
                    text += f"{self._name}: {self._gap:,} lines are lost here: they were not read in time\n".encode()
                    self._full, self._gap = False, 0
            above = b"\x1b[%dA" % shown.count(b"\n") if b"\n" in shown else b""
            self._put((b"\r" + above + b"\x1b[J" if shown else b"") + text + status)
            shown = status

    def _put(self, data: bytes) -> None:
        while data:
            end = data.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF  # whole, beside those of other processes
            try:
                select.select((), (self._fd,), ())  # somebody may have made it one that does not block
                data = data[os.write(self._fd, data[:end]) :]
            except BlockingIOError:
                continue
            except OSError:  # nobody will ever read it
                with self._news:
                    self.lost += data.count(b"\n")
                return

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True


_stderr: Stderr | None = None


def queue_stderr(name: str) -> Callable[[], None]:
    """Have ``sys.stderr``, and what the log writes there, go through ``Stderr``. What it gives is to be called at the
    end: it waits for what is not written yet. Without a descriptor (there is no stderr, or it is in memory) all stays
    as it is."""
    global _stderr
    before = sys.stderr
    try:
        fd = before.fileno()
    except (AttributeError, OSError, ValueError):
        return lambda: None
    before.flush()
    ours = _stderr = Stderr(fd, name, before.encoding)
    _redirect(before, ours)

    def finish() -> None:
        if ours.finish():
            _redirect(ours, before)

    return finish


def _redirect(old: Any, new: Any) -> None:
    if sys.stderr is old:
        sys.stderr = new
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def show_status(text: str) -> None:
    """On a terminal, below the log's lines, in the place of the last such text; no line of it may be too long."""
    if _stderr is not None:
        _stderr.status(text)


def lines_lost() -> int:
    """Lines for standard error that were not written: nobody read those before."""
    return 0 if _stderr is None else _stderr.lost


def open_http(address: str | None, stack: contextlib.ExitStack, log: logging.Logger) -> socket.socket | None:
    """A socket for ``http``, closed by ``stack``. ``CannotStart``."""
    if address is None:
        return None
    host, port = split_address(address)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while ")[0]
        raise CannotStart(f"cannot serve HTTP on {address}: {why}") from None
    stack.callback(sock.close)
    log.info("http://%s/metrics and /health", shown_address(sock))
    return sock


Routes = Mapping[str, Callable[[], tuple[int, str, bytes]]]
"""By path: status code, content type, body."""

REQUEST = re.compile(rb"([!-~]+) (?:http://[^/?\s]*)?(/[^?\s]*)(?:\?\S*)? HTTP/1\.[01]\r?\n")


def respond(head: bytes | None, routes: Routes) -> bytes:
    """The whole answer to a request with this head; None: one that is too long."""
    request = REQUEST.match(head or b"")
    method, path = (request[1].decode(), request[2].decode("latin-1")) if request else ("", "")
    code, kind, body, more = 200, "text/plain; charset=utf-8", b"", ""
    if request is None:
        code = 431 if head is None else 400
    elif path not in routes:
        code = 404
    elif method not in ("GET", "HEAD"):
        code, more = 405, "Allow: GET, HEAD\r\n"
    else:
        try:
            code, kind, body = routes[path]()
        except Exception:
            logging.getLogger(__name__).exception("%s failed", path)
            code = 500
    phrase = HTTPStatus(code).phrase
    body = body or f"{phrase}\n".encode()
    return (
        f"HTTP/1.1 {code} {phrase}\r\nDate: {formatdate(usegmt=True)}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    ).encode() + (body if method != "HEAD" else b"")


class MonitorConnection(asyncio.Protocol):
    """One request and its answer. ``held`` are the connections that there are, the oldest first."""

    def __init__(self, routes: Routes, held: dict[MonitorConnection, None]) -> None:
        self._routes, self._held = routes, held
        self._head: bytearray | None = bytearray()
        self._rest = BODY

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._late = asyncio.get_running_loop().call_later(PATIENCE, self.drop)
        self._held[self] = None
        if len(self._held) > CONNECTIONS:
            next(iter(self._held)).drop()

    def drop(self) -> None:
        self._held.pop(self, None)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._head is None:
            self._rest -= len(data)
            if self._rest < 0:
                self.drop()
            return
        self._head += data
        head = bytes(self._head[:HEAD])
        whole = b"\n\r\n" in head or b"\n\n" in head
        if whole or len(self._head) > HEAD:
            self._head = None
            self._transport.write(respond(head if whole else None, self._routes))
            with contextlib.suppress(OSError):  # the client is gone
                self._transport.write_eof()  # closed by the client: what it still sends would cost it the answer

    def connection_lost(self, error: Exception | None) -> None:
        self._late.cancel()
        self._held.pop(self, None)


@contextlib.asynccontextmanager
async def http(
    sock: socket.socket | None,
    metrics: Collector,
    health: Callable[[], tuple[int, dict[str, Any]]] | None = None,
) -> AsyncIterator[None]:
    """Serve ``metrics`` and what ``health`` says (status code, body) on ``sock``, and close it."""
    if sock is None:
        yield
        return
    import orjson
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(metrics)
    routes = {"/metrics": lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry))}
    if health is not None:

        def healthy() -> tuple[int, str, bytes]:
            code, body = health()
            return code, "application/json", orjson.dumps(body)

        routes["/health"] = healthy
    held: dict[MonitorConnection, None] = {}
    server = await asyncio.get_running_loop().create_server(lambda: MonitorConnection(routes, held), sock=sock)
    try:
        yield
    finally:
        server.close()
        for connection in list(held):
            connection.drop()
        await server.wait_closed()
        await asyncio.sleep(0)  # connections are told that they are lost
        sock.close()


@contextlib.contextmanager
def http_in_thread(sock: socket.socket, metrics: Collector) -> Iterator[None]:
    """``http`` beside a program that has no event loop, or more than one."""
    loop, over = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with http(sock, metrics):
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """In a running loop: SIGINT and SIGTERM call ``stop``."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
