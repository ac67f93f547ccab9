"""The shell of a long-running program: from its checked options to its exit code.

``run``: lines for stderr are queued; SIGTERM is Ctrl-C until the loop runs, and after it; ``CannotStart`` is one line.
In the loop SIGINT and SIGTERM call ``Program.stop``, the second forces; ``/metrics`` and ``/health`` are served, a
terminal shows where all stands, and a demo plays, if there is one. Then the last word, and the exit code.

Where what runs: all in one event loop, but for the drawing (a thread). A snapshot is immutable, and so needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from runtime.demo import Demo
from runtime.loop import beside, new_loop, stopped_by_signals
from runtime.monitor import Exporter, Measure, http
from runtime.options import EXIT_FAILED, EXIT_INTERRUPTED, CannotStart, split_address
from runtime.stderr import queue_stderr, say, status_shown

EVERY = 0.5  # seconds between two drawings
RATES = 5.0  # seconds over which rates are shown


C_co = TypeVar("C_co", covariant=True)
C = TypeVar("C")


class Program(Protocol[C_co]):
    """What runs until it is stopped, or done."""

    async def run(self) -> int:
        """Run until it has stopped; returns the exit code."""

    def stop(self) -> None:
        """Stop and drain at the first call, at once at the second."""

    def snapshot(self) -> C_co:
        """The counts of this moment: a ``NamedTuple`` with ``faults`` and ``stopping``."""


class Wiring(NamedTuple, Generic[C]):
    """What ``run`` runs, and what is shown of its counts."""

    make: Callable[[], Program[C]]  # makes the program, in the loop
    tell: Callable[[Any], object]  # says at the end what became of all that came; the program is its argument
    metrics: Sequence[Measure]
    health: Callable[[C], tuple[int, dict[str, Any]]]  # the status code and the body of ``/health``
    draw: Callable[[C, C, float, float], str] | None
    """For a terminal: of the counts, those of some seconds ago, the seconds, the program's age in seconds."""
    stays: bool = False  # whether the last picture stays when the program has ended
    loop: Callable[[], asyncio.AbstractEventLoop] | None = new_loop


def shown_address(sock: socket.socket) -> str:
    """The address of a socket: ``HOST:PORT``, or ``[IPv6]:PORT``."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_http(address: str | None, stack: contextlib.ExitStack, log: logging.Logger) -> socket.socket | None:
    """A socket for ``http`` (None: no address), closed by ``stack``. Raises ``CannotStart``."""
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


@contextlib.contextmanager
def prepared_process(name: str, log: logging.Logger) -> Iterator[None]:
    """Surround a process of a program: lines for stderr are queued, with its name; garbage is collected rarely."""
    finish = queue_stderr(name)
    try:
        logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s")
        log.setLevel(logging.INFO)
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)  # thousands of records wait at any time, and hardly any garbage is cyclic
        yield
    finally:
        finish()


def run(
    name: str,
    log: logging.Logger,
    options: Any,
    wire: Callable[[Any, contextlib.ExitStack], Wiring[Any]],
    demo: Demo | None = None,
) -> int:
    """Run the program that ``wire`` makes of ``options``, or of the demo's. They have the address ``http``; what is
    entered into the stack is closed after the loop.

    Returns the exit code: the program's, or 1 if there were faults or the demo did not come out right."""
    with prepared_process(name, log):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the demo's servers do not outlive us
        try:
            with contextlib.ExitStack() as stack:
                if demo is not None:
                    options = stack.enter_context(demo).options
                http_sock = open_http(options.http, stack, log)
                wiring = wire(options, stack)
                with asyncio.Runner(loop_factory=wiring.loop) as runner:
                    code, program = runner.run(_serve(wiring, http_sock, demo))
                counts = program.snapshot()
                wiring.tell(program)
                good = demo is None or demo.report(counts)
                return code if good and not counts.faults else EXIT_FAILED
        except CannotStart as error:
            say(name, error)
            return EXIT_FAILED
        except KeyboardInterrupt:  # before signals are listened to, or after
            return EXIT_INTERRUPTED


async def _serve(wiring: Wiring[Any], http_sock: socket.socket | None, demo: Demo | None) -> tuple[int, Program[Any]]:
    program = wiring.make()
    async with contextlib.AsyncExitStack() as stack:
        if demo is not None:
            await stack.enter_async_context(beside(demo.play(program), "demo"))
        stack.enter_context(stopped_by_signals(program.stop))
        exporter = Exporter(wiring.metrics, program.snapshot)
        await stack.enter_async_context(http(http_sock, exporter, lambda: wiring.health(program.snapshot())))
        if wiring.draw is not None and sys.stderr.isatty():
            await stack.enter_async_context(_screen(program.snapshot, wiring.draw, wiring.stays))
        return await program.run(), program


@contextlib.asynccontextmanager
async def _screen(
    snapshot: Callable[[], C], draw: Callable[[C, C, float, float], str], stays: bool
) -> AsyncIterator[None]:
    """The picture below the log's lines, while it is entered. The loop takes the snapshots, a thread draws them."""
    began = time.monotonic()
    seen = deque([(began, snapshot())], maxlen=round(RATES / EVERY))

    async def look() -> None:
        while True:
            await asyncio.sleep(EVERY)
            seen.append((time.monotonic(), snapshot()))

    def picture() -> str:
        (then, before), (now, counts) = seen[0], seen[-1]
        return draw(counts, before, now - then, now - began)

    with status_shown(picture, EVERY, stays):
        try:
            async with beside(look(), "screen"):
                yield
        finally:
            seen.append((time.monotonic(), snapshot()))
