"""The worker processes of ``ingest_logs.py``.

The parent makes N sockets (SO_REUSEPORT: the kernel deals the senders out by their addresses) and keeps them open, so
that what waits in the kernel outlives a worker; the next one reads on. A worker that ends without having been asked to
is replaced, with back-off.

A worker and its parent have a socketpair: first the configuration, as a line of JSON, then to the worker single bytes
(stop, force), to the parent a line of JSON now and then, and a last one. Workers do not listen to signals: the parent
tells them. A worker whose parent is gone stops as if it had been told to.

Where what runs: all in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from coordination import Clock, Rng, cancel_all, wait_for_event
from logs.display import LogCounts, add_up, counts_after_death
from primitives import Backoff
from runtime.loop import STOPPING, blocked
from runtime.processes import how_it_ended
from runtime.shell import Program
from runtime.stderr import lines_lost

log = logging.getLogger("ingest")

REPORT_EVERY = 0.25  # seconds between two lines from a worker to its parent
AGAIN = 0.2, 10.0  # seconds before a dead worker is replaced, and at most
HEALTHY_AFTER = 30.0  # seconds that a worker must have lived for the next wait to be short again
KILL_AFTER = 5.0  # seconds beyond the limit of a stop after which a worker is killed
MAX_LINE = 1 << 20  # bytes of a line between a worker and its parent, at most
STOP, FORCE = b"s", b"f"


class WorkerProcess:
    """What the parent knows of one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.last: LogCounts | None = None  # of the one that lives
        self.past = LogCounts(workers=0, database="connected")  # of those that died
        self.code: int | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.process: asyncio.subprocess.Process | None = None

    def tell(self, word: bytes) -> None:
        """Send it a word, STOP or FORCE, if it still hears."""
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(word)


class Supervisor:
    """Worker processes, one for each of ``sockets``, which stay the caller's. ``command`` starts one: it gets the
    number of a descriptor as its last argument; ``config`` says what it is told."""

    def __init__(
        self,
        command: Sequence[str],
        config: Callable[[int], Mapping[str, Any]],
        sockets: Sequence[socket.socket],
        *,
        stop_limit: float,
        kernel_drops: Callable[[], int | None] = lambda: 0,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        self._command, self._config, self._sockets = list(command), config, list(sockets)
        self._stop_limit, self._kernel_drops, self._clock, self._rng = stop_limit, kernel_drops, clock, rng
        self.workers = [WorkerProcess(number) for number in range(len(sockets))]
        self.failure: str | None = None  # why a worker could not begin at all: there is no use in trying again
        self._stage, self._stopped = 0, asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []
        self._spawning = asyncio.Lock()

    def stop(self) -> None:
        """Have the workers stop; the second time at once, the third time by a kill."""
        self._stage += 1
        self._stopped.set()
        for worker in self.workers:
            worker.tell(STOP if self._stage == 1 else FORCE)
            if self._stage > 2:
                self._kill(worker)
        if self._stage <= 2:
            later = KILL_AFTER + (self._stop_limit if self._stage == 1 else 0.0)
            self._timers += [asyncio.get_running_loop().call_later(later, self._kill, each) for each in self.workers]

    def _kill(self, worker: WorkerProcess) -> None:
        if worker.process is not None and worker.process.returncode is None:
            log.error("worker %d is late: killed", worker.number)
            worker.process.kill()

    def snapshot(self) -> LogCounts:
        """The sums over all workers, those that died too."""
        counts = add_up(part for worker in self.workers for part in (worker.past, worker.last) if part is not None)
        return counts._replace(
            kernel_drops=self._kernel_drops() or 0,
            lines_lost=counts.lines_lost + lines_lost(),
            stopping=self._stage > 0,
        )

    async def run(self) -> int:
        """1 if a worker could not begin, or lost events at the stop."""
        tasks = [asyncio.create_task(self._keep(each), name=f"worker {each.number}") for each in self.workers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for timer in self._timers:
                timer.cancel()
            for worker in self.workers:
                self._kill(worker)
            await cancel_all(tasks)
        return 1 if self.failure or any(worker.code for worker in self.workers) else 0

    async def _keep(self, worker: WorkerProcess) -> None:
        """Have the worker live, again and again."""
        backoff = Backoff(*AGAIN, self._rng)
        while True:
            began = self._clock()
            worker.code = code = await self._live(worker)
            if self._stopped.is_set():
                if code < 0 and worker.last is not None:
                    self._bury(worker)
                return
            if self.failure is not None:
                log.error("%s", self.failure)
                self.stop()
                return
            self._bury(worker)
            if self._clock() - began > HEALTHY_AFTER:
                backoff.reset()
            log.error("worker %d died (%s); another one goes on", worker.number, how_it_ended(code))
            await wait_for_event(self._stopped, backoff.next())
            if self._stopped.is_set():
                return

    @staticmethod
    def _bury(worker: WorkerProcess) -> None:
        worker.past = add_up([worker.past, counts_after_death(worker.last or LogCounts())])
        worker.last = None

    async def _spawn(self, *sockets: socket.socket) -> asyncio.subprocess.Process:
        """Signals are blocked until the process ignores them. One at a time: the mask is this thread's."""
        async with self._spawning:
            with blocked(*STOPPING):
                return await asyncio.create_subprocess_exec(
                    *self._command,
                    str(sockets[0].fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[sock.fileno() for sock in sockets],
                )

    async def _live(self, worker: WorkerProcess) -> int:
        """One life; how it ended."""
        ours, theirs = socket.socketpair()
        udp = self._sockets[worker.number]
        try:
            with theirs:
                worker.process = await self._spawn(theirs, udp)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):  # no memory, too many processes: that may pass
                log.error("worker %d cannot be started: %s", worker.number, error)
                return 1
            raise
        try:
            reader, worker.writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
            worker.writer.write(json.dumps({**self._config(worker.number), "socket": udp.fileno()}).encode() + b"\n")
            if self._stage:
                worker.tell(STOP if self._stage == 1 else FORCE)
            with contextlib.suppress(OSError, ValueError):  # it died in the middle of a line
                while line := await reader.readline():
                    said = orjson.loads(line)
                    if "failed" in said:
                        self.failure = said["failed"]
                    else:
                        worker.last = LogCounts(**said)
            return await worker.process.wait()
        finally:
            if worker.writer is not None:
                worker.writer.close()
                worker.writer = None
            if worker.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.kill()
                await worker.process.wait()
            worker.process = None


class ParentConnection:
    """A worker's side: tells its parent where it stands, and hears from it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, sock: socket.socket) -> tuple[ParentConnection, dict[str, Any]]:
        """The connection, and the configuration."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        return cls(reader, writer), orjson.loads(await reader.readline())

    def tell(self, what: Mapping[str, Any]) -> None:
        """Send a line, if the parent still hears."""
        if not self._writer.is_closing():
            self._writer.write(orjson.dumps(what) + b"\n")

    async def listen(self, program: Program[LogCounts]) -> None:
        """Obey, until the parent is gone; then stop."""
        stage = 0
        with contextlib.suppress(OSError):
            while word := await self._reader.read(1):
                for _ in range((1 if word == STOP else 2) - stage):
                    stage += 1
                    program.stop()
        if not stage:
            program.stop()

    async def report(self, program: Program[LogCounts]) -> None:
        """Tell the counts, again and again."""
        while True:
            self.tell(program.snapshot()._asdict())
            await asyncio.sleep(REPORT_EVERY)

    async def close(self) -> None:
        """Send what is to be sent, and end it."""
        with contextlib.suppress(OSError):
            await self._writer.drain()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
