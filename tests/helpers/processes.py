"""Processes, and what they say."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import psutil

from market.workers import AnalyticsPool
from runtime import processes
from tests.helpers.api import aggregate_http
from tests.helpers.base import HANG_LIMIT, HERE, free_port, run_task, until_async, wait_until

Pool = TypeVar("Pool", processes.Processes, AnalyticsPool)


def proc_gone(pid: int) -> bool:
    """Whether all its threads are; the first one is a zombie a little sooner, while the files are still open."""
    try:
        return (
            len(os.listdir(f"/proc/{pid}/task")) == 1
            and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        )
    except (FileNotFoundError, ProcessLookupError):
        return True


def proc_children() -> set[int]:
    """The processes started by any thread of this one, but for multiprocessing's resource tracker."""
    found = {int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}
    return {pid for pid in found if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()}


def proc_open() -> set[str]:
    gc.collect()
    return {f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}" for fd in os.listdir("/proc/self/fd") if proc_is_open(fd)}


def proc_is_open(fd: str) -> bool:
    try:
        return "/proc/" not in os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return False


async def proc_writer(path: Path) -> int:
    """The writing end of a FIFO, as soon as a worker has the other one open."""

    def opened() -> int | None:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        return None

    return await until_async(opened)


def proc_alone(make: Callable[[], Pool], main: Callable[[Pool], Awaitable[None]]) -> Pool:
    """``main`` with the pool, which must leave nothing behind: no process, no thread, no descriptor."""

    async def whole() -> Pool:
        before, children, threads = proc_open(), proc_children(), set(threading.enumerate())
        pool = make()
        try:
            await main(pool)
        finally:
            ends = pool.close(0.0) if isinstance(pool, processes.Processes) else pool.close()
            await asyncio.wait_for(ends, HANG_LIMIT)
        assert (proc_children() - children, set(threading.enumerate()) - threads) == (set(), set())
        assert proc_open() - before == set()
        return pool

    resource_tracker.ensure_running()
    return run_task(whole(), lambda _: False, debug=None)


def proc_run(main: Callable[[processes.Processes], Awaitable[None]], workers: int = 1, **options: Any) -> None:
    assert proc_alone(lambda: processes.Processes(workers, **options), main).stats()[1:3] == (0, 0)


def proc_ticks(pid: int) -> int:
    """Hundredths of a second that a process computed for."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


IDLERS = {
    "silent": b"",
    "half a request line": b"GET /hea",
    "half a head": HEALTH[:-2],
    "answered": HEALTH,
    "a body that does not come": b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    "an answer that is not read": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
}


def fill(writing: int) -> int:
    os.set_blocking(writing, False)
    filled = 0
    for piece in (b"x" * 4096, b"x"):
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += os.write(writing, piece)
    os.set_blocking(writing, True)
    return filled


def full_pipe() -> tuple[int, int, int]:
    """Its two ends, and how many bytes are in it: as many as it holds."""
    reading, writing = os.pipe()
    return reading, writing, fill(writing)


class Unread:
    """A program whose stderr, a pipe or a terminal, is full from the beginning: nobody reads it."""

    def __init__(self, *command: str, terminal: bool, **environ: str) -> None:
        self.reading, writing = pty.openpty() if terminal else os.pipe()
        fill(writing)
        self._port = free_port()
        command = (*command, "--http", f"127.0.0.1:{self._port}")
        environ = {**os.environ, "DATABASE_URL": "", **environ}
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=writing, cwd=HERE, env=environ
        )
        os.close(writing)

    def health(self) -> dict[str, Any]:
        found = aggregate_http(self._port, "/health")[1]
        assert found["imbalance"] == found["faults"] == 0, found
        return cast("dict[str, Any]", found)

    def until(self, predicate: Callable[[dict[str, Any]], bool]) -> None:
        def looked() -> bool:
            with contextlib.suppress(ConnectionError):  # it is starting
                return predicate(self.health())
            return False

        assert self.process.poll() is None
        wait_until(looked)

    def term(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def unread(*command: str, terminal: bool = False) -> Iterator[Unread]:
    program = Unread(*command, terminal=terminal, TERM="xterm-256color")
    try:
        yield program
    finally:
        if program.process.poll() is None:
            for each in psutil.Process(program.process.pid).children(True):
                each.kill()
            program.process.kill()
            program.process.wait()
        os.close(program.reading)


def besiege(port: int, stack: contextlib.ExitStack) -> None:
    """200 connections of all kinds that do nothing any more."""
    kinds = list(IDLERS.values())
    for n in range(200):
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), HANG_LIMIT))
        with contextlib.suppress(ConnectionError):
            client.sendall(kinds[n % len(kinds)])


def curl(*arguments: str) -> str:
    """The status, as another client sees it."""
    command = ("curl", "-sS", "-m", str(int(HANG_LIMIT)), "-o", "/dev/null", "-w", "%{http_code}", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def answers_besieged(url: str, process: int) -> None:
    """Also after ``PATIENCE``: as fast as the first connections go, others come."""
    port, before = urlsplit(url).port or 0, psutil.Process(process).num_fds()
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            besiege(port, stack)
            for _ in range(5):
                assert aggregate_http(port, "/health")[0] == 200
            assert psutil.Process(process).num_fds() <= before + 128 + 20  # and what the program opens meanwhile
        if shutil.which("curl"):
            assert curl(f"{url}/health") == curl("-I", f"{url}/health") == "200"
            assert curl("--http1.0", f"{url}/metrics") == "200"
            assert curl("-d", "x", f"{url}/metrics") == "405" and curl(f"{url}/x") == "404"
