"""What a program tells of itself: ``/metrics`` and ``/health`` on one small server.

Metrics are a table of ``Measure`` beside the counts; ``Exporter`` reads one snapshot through it, when it is asked.

The server: an answer and the connection ends; the oldest connection makes room for a new one, and none outlives
``PATIENCE``, so that nobody who stalls keeps others out. All is in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import threading
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast, get_origin, get_type_hints

if TYPE_CHECKING:
    from prometheus_client import Metric

CONNECTIONS = 128  # connections for ``/metrics`` and ``/health`` at a time
PATIENCE = 5.0  # seconds from the beginning of such a connection to its end
HEAD = 8 << 10  # bytes of a request's head, at most
BODY = 64 << 10  # bytes of what comes after it. Nobody needs a body: it is read and forgotten.


class Measure(NamedTuple):
    """A metric: ``read`` is an attribute of the counts, or a function of them; None: the metric is not shown."""

    kind: str
    name: str
    text: str
    read: str | Callable[[Any], Any]
    labels: tuple[str, ...]  # with labels, what is read is a mapping by label


def counter(name: str, text: str, read: str | Callable[[Any], Any] = "", *labels: str) -> Measure:
    """A metric that only grows. Without ``read``: the attribute of its name, after the first underscore."""
    return Measure("counter", name, text, read or name.partition("_")[2], labels)


def gauge(name: str, text: str, read: str | Callable[[Any], Any] = "", *labels: str) -> Measure:
    """A metric that grows and shrinks; arguments as of ``counter``."""
    return counter(name, text, read, *labels)._replace(kind="gauge")


class Histogram:
    """How many durations fell into which bucket, and their sum: a few hundred nanoseconds for each."""

    BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(self.BOUNDS, seconds)] += 1
        self._sum += seconds

    def told(self) -> tuple[list[tuple[str, int]], float]:
        """Counts up to each bound, and the sum, as prometheus_client takes them."""
        bounds = (*map(str, self.BOUNDS), "+Inf")
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


def histogram(name: str, text: str, read: str | Callable[[Any], Any], *labels: str) -> Measure:
    """Durations in buckets: what is read is a mapping of ``Histogram`` by label."""
    return counter(name, text, read, *labels)._replace(kind="histogram")


def counters(prefix: str, counts: type) -> list[Measure]:
    """A counter for each field of a ``NamedTuple`` that is ``Annotated`` with its text."""
    hints = get_type_hints(counts, include_extras=True).items()
    texts = {name: hint.__metadata__[0] for name, hint in hints if get_origin(hint) is Annotated}
    return [counter(f"{prefix}_{name}", text) for name, text in texts.items()]


class Exporter:
    """A collector for prometheus_client: what ``table`` reads in ``snapshot()``."""

    def __init__(self, table: Sequence[Measure], snapshot: Callable[[], Any]) -> None:
        from prometheus_client import core  # now: an import would hold the loop

        self._table, self._snapshot = table, snapshot
        self._families = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
        }

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        counts = self._snapshot()
        for kind, name, text, read, labels in self._table:
            value = read(counts) if callable(read) else getattr(counts, read)
            if value is not None:
                family = self._families[kind](name, text, labels=labels)
                for label, each in value.items() if labels else [((), value)]:
                    told = each.told() if kind == "histogram" else (each,)
                    family.add_metric((label,) if isinstance(label, str) else label, *told)
                yield family


def health_of(counts: Any, imbalance: int, degraded: bool, **body: Any) -> tuple[int, dict[str, Any]]:
    """The status code and the body of ``/health``: the counts, those in ``body`` as they are there.

    ``degraded`` (a peer is away) is no reason to start the program anew: the code is 200."""
    bad = imbalance or counts.faults
    state = "error" if bad else "stopping" if counts.stopping else "degraded" if degraded else "ok"
    code = 200 if state in ("ok", "degraded") else 503
    return code, {"status": state, "imbalance": imbalance, **counts._asdict(), **body}


Routes = Mapping[str, Callable[[], tuple[int, str, bytes]]]  # by path: status code, content type, body

_REQUEST = re.compile(rb"([!-~]+) (?:http://[^/?\s]*)?(/[^?\s]*)(?:\?\S*)? HTTP/1\.[01]\r?\n")


def respond(head: bytes | None, routes: Routes) -> bytes:
    """The whole answer to a request with this head; None: one that is too long."""
    request = _REQUEST.match(head or b"")
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


class _Connection(asyncio.Protocol):
    """One request and its answer. ``held`` are the connections that there are, the oldest first."""

    def __init__(self, routes: Routes, held: dict[_Connection, None]) -> None:
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
    sock: socket.socket | None, metrics: Any, health: Callable[[], tuple[int, dict[str, Any]]] | None = None
) -> AsyncIterator[None]:
    """Serve ``metrics``, a collector, and what ``health`` says (status code, body) on ``sock``, and close it."""
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
    held: dict[_Connection, None] = {}
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(routes, held), sock=sock)
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
def http_in_thread(sock: socket.socket, metrics: Any) -> Iterator[None]:
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
