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
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from coordination import cancel_all, wait_for_event
from logs.display import LogCounts, add_up, counts_after_death
from logs.options import IngestOptions
from logs.pipeline import FORCE_LIMIT, Ingester
from primitives import Backoff
from runtime.loop import STOPPING, beside, blocked
from runtime.options import EXIT_FAILED, CannotStart
from runtime.processes import how_it_ended
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
    """Worker processes with ``options``, one for each of ``sockets``, which stay the caller's. ``command`` starts one,
    with the number of a descriptor as its last argument, with which it is to ``work``."""

    def __init__(
        self,
        command: Sequence[str],
        options: IngestOptions,
        sockets: Sequence[socket.socket],
        *,
        kernel_drops: Callable[[], int] = lambda: 0,
    ) -> None:
        self._command, self._options, self._sockets = command, options, sockets
        self._kernel_drops = kernel_drops
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
            later = KILL_AFTER + (self._options.stop_limit + FORCE_LIMIT if self._stage == 1 else 0.0)
            self._timers += [asyncio.get_running_loop().call_later(later, self._kill, each) for each in self.workers]

    def _kill(self, worker: WorkerProcess) -> None:
        if worker.process is not None and worker.process.returncode is None:
            log.error("worker %d is late: killed", worker.number)
            worker.process.kill()

    def snapshot(self) -> LogCounts:
        """The sums over all workers, those that died too."""
        counts = add_up(part for worker in self.workers for part in (worker.past, worker.last) if part is not None)
        return counts._replace(
            kernel_drops=self._kernel_drops(),
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
        backoff = Backoff(*AGAIN)
        while True:
            began = time.monotonic()
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
            if time.monotonic() - began > HEALTHY_AFTER:
                backoff.reset()
            log.error("worker %d died (%s); another one goes on", worker.number, how_it_ended(code))
            await wait_for_event(self._stopped, backoff.next())
            if self._stopped.is_set():
                return

    @staticmethod
    def _bury(worker: WorkerProcess) -> None:
        worker.past = add_up([worker.past, counts_after_death(worker.last or LogCounts())])
        worker.last = None

    async def _live(self, worker: WorkerProcess) -> int:
        """One life; how it ended."""
        ours, theirs = socket.socketpair()
        udp = self._sockets[worker.number]
        try:
            async with self._spawning:  # the mask is this thread's
                with theirs, blocked(*STOPPING):  # until the process ignores them
                    command = (*self._command, str(theirs.fileno()))
                    files, nothing = (theirs.fileno(), udp.fileno()), asyncio.subprocess.DEVNULL
                    worker.process = await asyncio.create_subprocess_exec(*command, stdin=nothing, pass_fds=files)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):  # no memory, too many processes: that may pass
                log.error("worker %d cannot be started: %s", worker.number, error)
                return 1
            raise
        try:
            reader, worker.writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
            place = {"number": worker.number, "workers": len(self.workers), "socket": udp.fileno()}
            worker.writer.write(orjson.dumps({"options": self._options, **place}) + b"\n")
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


async def work(parent: socket.socket) -> int:
    """The life of a worker, which tells its parent where it stands, and hears from it. The exit code."""
    reader, writer = await asyncio.open_connection(sock=parent, limit=MAX_LINE)
    told = orjson.loads(await reader.readline())

    def tell(what: Mapping[str, Any]) -> None:
        if not writer.is_closing():
            writer.write(orjson.dumps(what) + b"\n")

    async def report(ingester: Ingester) -> None:
        while True:
            tell(ingester.snapshot()._asdict())
            await asyncio.sleep(REPORT_EVERY)

    async def obey(ingester: Ingester) -> None:
        stage = 0
        with contextlib.suppress(OSError):
            while word := await reader.read(1):
                for _ in range((1 if word == STOP else 2) - stage):
                    stage += 1
                    ingester.stop()
        if not stage:  # the parent is gone
            ingester.stop()

    try:
        options, sock = IngestOptions(**told["options"]), socket.socket(fileno=told["socket"])
        ingester = Ingester(options, sock, number=told["number"], workers=told["workers"])
        async with beside(obey(ingester), "parent"), beside(report(ingester), "report"):
            code = await ingester.run()
            tell(ingester.snapshot()._asdict())
            return code
    except CannotStart as error:
        tell({"failed": str(error)})
        return EXIT_FAILED
    finally:
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
