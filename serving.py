"""Around a program that runs until it is told to stop: its event loop, its signals, ``/metrics`` and ``/health``.

``Lag``                  how late the event loop wakes a sleeper, measured all the time.
``stopped_by_signals``   SIGINT and SIGTERM call the program's ``stop``: the first drains, the second forces.
``Lasting``              tasks that go on after an error that nobody had foreseen; each is counted and shown.
``http``                 two routes on a socket that was bound before the program began, so that a port which is taken
                         is the user's one line at the start.

Where what runs: all in the event loop. What is shown is taken from a snapshot when somebody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


PAUSE = 0.5
"""Seconds after which a task that failed in a way that nobody had foreseen goes on."""
SHOWN = 10
"""Of such failures, with their tracebacks."""


class CannotStart(Exception):
    """One line for the user."""


class Lasting:
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
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(?:([kMGT])(i?)B?|B?)", text, re.ASCII | re.IGNORECASE)
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


@contextlib.asynccontextmanager
async def http(
    sock: socket.socket | None, metrics: Collector, health: Callable[[], tuple[int, dict[str, Any]]]
) -> AsyncIterator[None]:
    """Serve ``metrics`` and what ``health`` says (status code, body) on ``sock``, and close it."""
    if sock is None:
        yield
        return
    import orjson
    import uvicorn
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are the program's

    registry = CollectorRegistry()
    registry.register(metrics)

    async def told(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def healthy(_: Request) -> Response:
        code, body = health()
        return Response(orjson.dumps(body), code, media_type="application/json")

    app = Starlette(routes=[Route("/metrics", told), Route("/health", healthy)])
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, limit_concurrency=50, timeout_graceful_shutdown=1
    )
    server = Server(config)
    task = asyncio.create_task(server.serve([sock]), name="http")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        sock.close()


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
