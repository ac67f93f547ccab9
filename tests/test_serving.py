"""runtime/monitor.py and runtime/stderr.py: real sockets, pipes and processes."""

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
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.core import GaugeMetricFamily

from api import telemetry
from crawl.progress import serve_metrics
from logs import display
from logs.display import LogCounts
from logs.intake import udp_socket
from logs.options import IngestOptions
from logs.pipeline import Ingester
from logs.workers import Supervisor
from runtime import loop, monitor, stderr
from tests.absent import needs
from tests.helpers.api import aggregate_http
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, free_port, run_task, wait_until
from tests.helpers.crawl import walk_crawl
from tests.helpers.market import MarketPipelineBase, market_pipeline_metrics, market_pipeline_options
from tests.helpers.processes import HEALTH, IDLERS, besiege, fill, full_pipe

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


class Metrics:
    """A metric whose text is longer than what the sockets of these tests hold."""

    def collect(self) -> Iterator[Any]:
        yield GaugeMetricFamily("big", "x" * 1_000_000, 1.0)


@contextlib.contextmanager
def serving_up(
    new_loop: Callable[[], asyncio.AbstractEventLoop], health: Callable[[], tuple[int, dict[str, Any]]]
) -> Iterator[Callable[[], socket.socket]]:
    """``http`` in a thread; what is given connects to it. At the end the loop has nothing to complain of."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    address, complaints = sock.getsockname(), list[dict[str, Any]]()
    started, over = threading.Event(), asyncio.Event()
    loop = new_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def serve() -> None:
        async with monitor.http(sock, cast("Collector", Metrics()), health):
            started.set()
            await over.wait()

    def connect() -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(HANG_LIMIT)
        client.connect(address)
        return client

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(HANG_LIMIT)
        yield connect
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
    assert complaints == []


def rest(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 16):
            found += data
    return found


def ask(connect: Callable[[], socket.socket], request: bytes) -> tuple[int, dict[str, str], bytes]:
    with connect() as client:
        client.sendall(request)
        head, _, body = rest(client).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


loops = pytest.mark.parametrize(
    "new_loop",
    [
        pytest.param(asyncio.new_event_loop, id="asyncio"),
        pytest.param(loop.new_loop, marks=needs("uvloop"), id="uvloop"),
    ],
)


@loops
def test_answers(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    def health() -> tuple[int, dict[str, Any]]:
        if broken:
            raise RuntimeError("a fault of ours")
        return 503, {"status": "stopping"}

    broken = False
    with serving_up(new_loop, health) as connect:
        for request, status, more in (
            (HEALTH, 503, {"content-type": "application/json", "content-length": "21"}),
            (b"HEAD /health HTTP/1.1\r\n\r\n", 503, {"content-length": "21"}),
            (b"GET /health?a=/metrics HTTP/1.0\r\n\r\n", 503, {}),
            (b"GET http://x:1/health HTTP/1.1\r\nHost: x\r\n\r\n", 503, {}),
            (b"GET /health HTTP/1.1\nHost: x\n\n", 503, {}),
            (b"GET /metrics HTTP/1.1\r\n\r\n", 200, {"content-type": CONTENT_TYPE_LATEST}),
            (b"GET / HTTP/1.1\r\n\r\n", 404, {}),
            (b"GET /health/ HTTP/1.1\r\n\r\n", 404, {}),
            (b"POST / HTTP/1.1\r\n\r\n", 404, {}),
            (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405, {"allow": "GET, HEAD"}),
            (b"POST /health HTTP/1.1\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000, 405, {"allow": "GET, HEAD"}),
            (b"get /health\r\n\r\n", 400, {}),
            (b"GET /health HTTP/2.0\r\n\r\n", 400, {}),
            (b"\x16\x03\x01\r\n\r\n", 400, {}),
            (b"GET /health HTTP/1.1\r\nX: " + b"x" * 8000 + b"\r\n\r\n", 503, {}),
            (b"GET /health HTTP/1.1\r\nX: " + b"x" * 8192, 431, {}),
            (b"GET /health HTTP/1.1\r\nX: " + b"x" * 8192 + b"\r\n\r\n", 431, {}),
        ):
            found, headers, body = ask(connect, request)
            assert (found, headers["connection"]) == (status, "close"), request[:50]
            assert headers.items() >= more.items() and parsedate_to_datetime(headers["date"])
            assert len(body) == (0 if request.startswith(b"HEAD") else int(headers["content-length"])), request[:50]
        assert ask(connect, HEALTH)[2] == b'{"status":"stopping"}'
        with connect() as client:
            client.sendall(HEALTH)
            client.shutdown(socket.SHUT_WR)
            assert rest(client).endswith(b'{"status":"stopping"}')
        broken = True
        assert ask(connect, HEALTH)[0] == 500
        broken = False
        assert ask(connect, HEALTH)[0] == 503


@loops
@pytest.mark.parametrize("kind", IDLERS)
def test_idle_connections_keep_nobody_out(
    kind: str, new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 there are the last eight; who asks takes the place of the oldest."""
    monkeypatch.setattr(monitor, "PATIENCE", 3600.0, raising=False)
    monkeypatch.setattr(monitor, "CONNECTIONS", 8, raising=False)
    with serving_up(new_loop, lambda: (200, {})) as connect, contextlib.ExitStack() as stack:
        ours = psutil.Process()
        before = ours.num_fds()
        clients = [stack.enter_context(connect()) for _ in range(60)]
        for client in clients:
            with contextlib.suppress(ConnectionError):  # it is dropped already
                client.sendall(IDLERS[kind])
        for _ in range(3):
            assert ask(connect, HEALTH)[0] == 200
        wait_until(lambda: ours.num_fds() == before + 60 + 7)
        for client in clients[:53]:
            rest(client)  # it ends


@loops
def test_a_connection_ends_in_time(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its client does."""
    monkeypatch.setattr(monitor, "PATIENCE", 0.3, raising=False)
    with serving_up(new_loop, lambda: (200, {})) as connect, contextlib.ExitStack() as stack:
        ours = psutil.Process()
        before = ours.num_fds()
        clients = {kind: stack.enter_context(connect()) for kind in (*IDLERS, "a drop at a time", "endless")}
        for kind, client in clients.items():
            client.sendall(IDLERS.get(kind, b"GET /health HTTP/1.1\r\n"))
        with pytest.raises(ConnectionError):
            for _ in range(2000):  # far less than a head may have
                clients["a drop at a time"].send(b"x")
                select.select([clients["a drop at a time"]], (), (), 0.01)  # until the other end goes
        with pytest.raises(ConnectionError):
            for _ in range(20_000):
                clients["endless"].send(b"x" * 1000)
        for kind, client in clients.items():
            if kind != "an answer that is not read":
                rest(client)
        wait_until(lambda: ours.num_fds() == before + len(clients))


def test_a_long_request_line_does_not_hold_the_loop() -> None:
    """A pattern that tries all ways to divide it takes seconds for this."""
    begun = time.thread_time()
    for target in (b"/" + b"a" * 8000, b"/" + b"?" * 8000, b"http://" + b"a" * 8000, b"/a?/" * 2000, b"a" * 8000):
        for _ in range(5):
            assert monitor.respond(b"GET " + target + b" x\r\n\r\n", {}).startswith(b"HTTP/1.1 400 ")
    assert time.thread_time() - begun < 1.0


def serving_read(reading: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += os.read(reading, count - len(found))
    return found


def read_all(reading: int) -> bytes:
    found = b""
    while data := os.read(reading, 1 << 16):
        found += data
    return found


def test_stderr_loses_what_nobody_reads_and_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stderr, "UNREAD", 100)
    reading, writing, filled = full_pipe()
    out = stderr.Stderr(writing, "program")
    print("first", file=out)
    wait_until(lambda: not out._waiting)  # in the hands of the thread
    for n in range(30):
        assert out.write(f"line {n:04}\n") == 10 and out.lost == max(0, n - 9)
    print("one more", file=out)  # where less than a line would fit, nothing goes in between
    assert out.lost == 21
    serving_read(reading, filled)
    expected = b"first\n" + b"".join(b"line %04d\n" % n for n in range(10))
    expected += b"program: 21 lines are lost here: they were not read in time\n"
    assert serving_read(reading, len(expected)) == expected
    out.write("next é \ud800\n")
    assert out.finish() and not out._thread.is_alive() and out.lost == 21
    os.close(writing)
    assert read_all(reading) == "next é \\ud800\n".encode()
    os.close(reading)


def test_stderr_status_stays_below_the_lines_and_only_the_newest_waits() -> None:
    reading, writing = os.pipe()
    out = stderr.Stderr(writing, "program")

    def said(text: bytes) -> None:
        assert serving_read(reading, len(text)) == text

    out.write("before\n")
    said(b"before\n")
    out.status("a\nb")
    said(b"a\nb")
    print("one", "two", sep="\n", file=out)  # in pieces: none is where the status will be written over it
    out.write("three\n")
    found = b""
    while not found.endswith(b"three\na\nb"):
        found += os.read(reading, 1 << 16)
    assert found.replace(b"\r\x1b[1A\x1b[J", b"").replace(b"a\nb", b"") == b"one\ntwo\nthree\n"
    filled = fill(writing)
    for n in range(100):
        out.status(f"s{n}")
    serving_read(reading, filled)
    found = b""
    while not found.endswith(b"s99"):
        found += os.read(reading, 1 << 16)
    assert found.startswith(b"\r\x1b[1A\x1b[J") and found.count(b"\x1b[J") <= 2
    out.write("an end")
    assert out.finish()
    os.close(writing)
    assert read_all(reading) == b"\r\x1b[Jan end"
    os.close(reading)


def test_stderr_is_written_in_whole_lines_whoever_else_writes_there() -> None:
    """Where it may not block, too."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        out = stderr.Stderr(ours.fileno(), "program")
        lines = [f"{n} " + "x" * (n % 200) + "\n" for n in range(2000)]
        out.write("".join(lines) + "y" * 9000)
        found = list[bytes]()
        while len(b"".join(found)) < len("".join(lines)) + 9000:
            found.append(theirs.recv(1 << 16))
        assert b"".join(found).decode() == "".join(lines) + "y" * 9000
        assert max(map(len, found)) <= 4096 and all(piece.endswith((b"\n", b"yy")) for piece in found)
        assert out.finish() and out.lost == 0


def test_stderr_goes_on_when_its_reader_is_gone() -> None:
    reading, writing, _ = full_pipe()
    out = stderr.Stderr(writing, "program")
    out.write("one\ntwo\n")
    os.close(reading)
    wait_until(lambda: out.lost == 2)
    out.write("three\n")
    wait_until(lambda: out.lost == 3)
    assert out.finish()
    os.close(writing)


def test_all_that_goes_to_stderr_is_queued_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log has, too. A reader that stalls at the end is not waited for."""
    monkeypatch.setattr(stderr, "LAST", HANG_LIMIT)
    monkeypatch.setattr(stderr, "_stderr", None)

    def now() -> Any:
        return sys.stderr

    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as before:
        monkeypatch.setattr(sys, "stderr", before)
        handler, log = cast("Any", logging.StreamHandler()), logging.getLogger("serving test")
        monkeypatch.setattr(log, "handlers", [handler])
        finish = stderr.queue_stderr("program")
        ours = now()
        assert type(ours) is stderr.Stderr and handler.stream == ours
        assert ours.fileno() == writing and not ours.isatty()
        log.error("a")
        print("b", file=sys.stderr)
        finish()
        assert now() is handler.stream is before
        log.error("c")
        assert serving_read(reading, 6) == b"a\nb\nc\n"
        finish = stderr.queue_stderr("program")
        ours = now()
        filled = fill(writing)
        log.error("d")
        monkeypatch.setattr(stderr, "LAST", 0.05)
        finish()
        assert now() is handler.stream is ours  # or the next to write there would wait for ever
        log.error("e")
        serving_read(reading, filled)
        assert serving_read(reading, 4) == b"d\ne\n"
        wait_until(lambda: not cast("Any", ours)._thread.is_alive())
        assert stderr.lines_lost() == 0
        for other in (io.StringIO(), None):  # in memory; there is none
            monkeypatch.setattr(sys, "stderr", other)
            stderr.queue_stderr("program")()
            assert now() is other
    os.close(reading)


def test_lines_lost_are_in_the_metrics_of_each_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reading, writing, _ = full_pipe()
    out = stderr.Stderr(writing, "program")
    monkeypatch.setattr(stderr, "_stderr", out)
    out.write("x\n" * stderr.UNREAD)
    assert stderr.lines_lost() == stderr.UNREAD

    async def main() -> None:
        program = MarketPipelineBase(market_pipeline_options("127.0.0.1:1", "lost", tmp_path))
        assert b"market_lines_lost_total %.1f\n" % stderr.UNREAD in market_pipeline_metrics(program)
        with udp_socket("127.0.0.1", 0, receive_buffer=4096)[0] as sock:
            ingester = Ingester(IngestOptions(spool=str(tmp_path / "logs"), database=None), sock)
            assert ingester.snapshot().lines_lost == stderr.UNREAD
            several = Supervisor(["unused"], IngestOptions(), [sock])
            several.workers[0].last = LogCounts(lines_lost=3)
            assert several.snapshot().lines_lost == stderr.UNREAD + 3
            found = {each.name: each for each in monitor.Exporter(display.METRICS, several.snapshot).collect()}
            assert found["ingest_lines_lost"].samples[0].value == stderr.UNREAD + 3
        counts = SimpleNamespace(state="connected", queued=0, written=0, lost=0, refused=0)
        part = SimpleNamespace(stats=lambda: counts)
        service = SimpleNamespace(
            sources={}, requests={}, lag=loop.Lag(), database=counts, log=telemetry.RequestLog(None)
        )
        service.history = SimpleNamespace(writer=part)
        exporter = monitor.Exporter(telemetry.METRICS, lambda: service)
        lost = {each.name: each for each in exporter.collect()}["aggregate_log_lines_lost"]
        assert lost.samples[0].value == stderr.UNREAD

    run_task(main())
    os.close(reading)
    assert out.finish()
    os.close(writing)


def test_a_worker_writes_to_a_stderr_that_nobody_reads() -> None:
    program = """if True:
        import asyncio
        from runtime.processes import Processes
        async def main():
            pool = Processes(1)
            await pool.run(exec, "import sys; print('x' * 100_000, file=sys.stderr)", timeout=%r)
            await pool.close()
            print("done")
        asyncio.run(main())
    """
    reading, writing, _ = full_pipe()
    command = [sys.executable, "-c", program % HANG_LIMIT]
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, cwd=HERE, timeout=PROGRAM_LIMIT)
    os.close(reading)
    os.close(writing)
    assert child.stdout == b"done\n"


def test_the_api_ends_while_nobody_reads_its_stderr(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    environ = {**os.environ, "DATA_FOLDER": str(tmp_path), "DATABASE_URL": "", "AGGREGATE_CONFIG": ""}
    command = [sys.executable, "-m", "uvicorn", "aggregate_app:app", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writing, cwd=HERE, env=environ) as server:
        try:
            said = b""
            while not (found := re.search(rb"running on http://127.0.0.1:(\d+)", said)):
                said += os.read(reading, 1 << 16)
            fill(writing)
            assert aggregate_http(int(found[1]), "/health/live")[0] == 200
            server.send_signal(signal.SIGTERM)
            assert server.wait(PROGRAM_LIMIT) in (0, -signal.SIGTERM)
        finally:
            server.kill()
            os.close(reading)
            os.close(writing)


def test_silent_connections_to_a_crawl_cost_no_threads() -> None:
    port, crawl = free_port(), walk_crawl()
    with serve_metrics(crawl, port):
        threads, before = threading.active_count(), psutil.Process().num_fds()
        with contextlib.ExitStack() as stack:
            besiege(port, stack)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_LIMIT) as answer:
                assert b"crawl_rows_total" in answer.read()
            assert threading.active_count() <= threads
            wait_until(lambda: psutil.Process().num_fds() <= before + 200 + 128)
