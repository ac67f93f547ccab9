"""What ``ingest_logs.py`` shows of itself, and its worker processes.

``Snapshot``     the counts of one worker, or the sums of all. ``imbalance`` is 0 in every one of them:
                 received + recovered = stored + dead + dropped + held + handed on.
``serve``        signals, ``/metrics`` and ``/health``, the status line, around a ``Program``: one worker or many.
``Supervisor``   N worker processes. The parent makes the N sockets (SO_REUSEPORT: the kernel deals the senders out by
                 their addresses) and keeps them open, so that what waits in the kernel outlives a worker; the next one
                 reads on. A worker that ends without having been asked to is replaced, with back-off.

A worker and its parent have a socketpair: first the configuration, as a line of JSON, then to the worker single bytes
(stop, force), to the parent a line of JSON now and then, and a last one. Workers do not listen to signals: the parent
tells them. A worker whose parent is gone stops as if it had been told to.

The counts of a dead worker are those of its last line, at most ``REPORT_EVERY`` seconds old: what it received after
that is in no count. What it held in memory is dropped (``worker died``); what it held on disk is ``handed on``: the
next one counts it as recovered.

Where what runs: all in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import orjson
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from coordination import Clock, Rng, arrives, telling
from primitives import RetryPolicy
from runtime.serving import http, lines_lost, show_status, stopped_by_signals

log = logging.getLogger("ingest")

EVERY, REPORT_EVERY = 1.0, 0.25
"""Seconds between two status lines, and between two lines from a worker to its parent."""
AGAIN = RetryPolicy(attempts=sys.maxsize, base=0.2, cap=10.0, total=float("inf"))
"""How long to wait before a dead worker is replaced."""
HEALTHY = 30.0
"""Seconds that a worker must have lived for the next wait to be short again."""
LATE = 5.0
"""Seconds beyond the limit of a stop after which a worker is killed."""
STOP, FORCE = b"s", b"f"
LINE = 1 << 20
"""Bytes of a line between a worker and its parent, at most."""

# ------------------------------------------------------------------------------------------------------ snapshots


class Snapshot(NamedTuple):
    """What a worker counted since it began; events, but where it says otherwise."""

    received: int = 0
    recovered: int = 0
    """In the spool when it began."""
    stored: int = 0
    dead: int = 0
    """In ``dead_letter``."""
    dropped: Mapping[str, int] = {}
    """By cause."""
    held: Mapping[str, int] = {}
    """By place: queue, sealing, sealed, writing, spooling, spool."""
    handed: int = 0
    """Left in the spool by a worker that died."""
    datagrams: int = 0
    bytes: int = 0
    refused: int = 0
    """Datagrams from addresses that are not allowed."""
    truncated: int = 0
    """Datagrams longer than what is read of one."""
    kernel_drops: int = 0
    """Datagrams that found the socket's buffer full; 0 too where the system does not say."""
    missing: int = 0
    """Rows that were stored without the metadata that there should be."""
    filled: int = 0
    """Such rows whose metadata came later, of earlier runs too."""
    spool_bytes: int = 0
    spool_refused: int = 0
    """Batches for which the spool had no room."""
    lag: float = 0.0
    """Seconds from the receipt of a batch's oldest event to its commit: the longest of the last ones."""
    loop_lag: float = 0.0
    """Seconds by which the event loop was late; the longest of the last minute."""
    database: str = "none"
    metadata: str = "none"
    """The state of the API's circuit."""
    metadata_loads: int = 0
    metadata_failures: int = 0
    faults: int = 0
    """How often the counts did not balance, or a part failed in a way that nobody had foreseen."""
    lines_lost: int = 0
    """Lines of the log that nobody read."""
    workers: int = 1
    deaths: int = 0
    stopping: bool = False


LARGEST = {"lag", "loop_lag"}
WORST = {
    "database": ("down", "connecting", "none", "connected"),
    "metadata": ("open", "half_open", "closed", "none"),
}


def imbalance(counts: Snapshot) -> int:
    """How many events more came in than are accounted for; 0, or there is a fault in the program."""
    out = counts.stored + counts.dead + sum(counts.dropped.values()) + sum(counts.held.values()) + counts.handed
    return counts.received + counts.recovered - out


def add_up(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sums; of the lags the longest, of the states the worst."""
    every = list(snapshots)
    if not every:
        return Snapshot(workers=0)
    sums: dict[str, Any] = {}
    for name in Snapshot._fields:
        values = [getattr(each, name) for each in every]
        if isinstance(values[0], Mapping):
            total: Counter[str] = Counter()
            for value in values:
                total.update(value)
            sums[name] = dict(total)
        elif name in WORST:
            sums[name] = min(values, key=WORST[name].index)
        elif name == "stopping":
            sums[name] = any(values)
        else:
            sums[name] = max(values) if name in LARGEST else sum(values)
    return Snapshot(**sums)


def buried(last: Snapshot) -> Snapshot:
    """What remains of the counts of a worker that died; see above."""
    spooled = last.held.get("spool", 0)
    lost = sum(last.held.values()) - spooled
    dropped = dict(last.dropped)
    if lost:
        dropped["worker died"] = dropped.get("worker died", 0) + lost
    handed = last.handed + spooled
    gone: dict[str, Any] = dict.fromkeys(("spool_bytes", "workers", "lag", "loop_lag"), 0)
    gone |= {name: ranks[-1] for name, ranks in WORST.items()}
    return last._replace(dropped=dropped, held={}, handed=handed, deaths=last.deaths + 1, stopping=False, **gone)


def listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def status(counts: Snapshot, before: Snapshot, seconds: float, age: float) -> str:
    """One line on where all stands; ``before`` is the snapshot of ``seconds`` ago."""

    def rate(name: str) -> str:
        return f"{(getattr(counts, name) - getattr(before, name)) / max(seconds, 1e-9):,.0f}/s"

    dropped, held = sum(counts.dropped.values()), dict(counts.held)
    spool = held.pop("spool", 0)
    parts = [
        f"{age:,.0f} s",
        f"received {counts.received:,} ({rate('received')})",
        f"stored {counts.stored:,} ({rate('stored')})",
        f"queue {sum(held.values()):,}",
        f"dropped {dropped:,}" + (f" ({listed(counts.dropped)})" if dropped else ""),
        *([f"kernel dropped {counts.kernel_drops:,}"] if counts.kernel_drops else []),
        *([f"dead {counts.dead:,}"] if counts.dead else []),
        f"spool {spool:,}",
        f"lag {counts.lag:.1f} s",
        *([f"database {counts.database}"] if counts.database != "connected" else []),
        *([f"metadata {counts.metadata}"] if counts.metadata not in ("closed", "none") else []),
        *(["stopping"] if counts.stopping else []),
        *([f"FAULTS {counts.faults}"] if counts.faults else []),
    ]
    return " · ".join(parts)


def last_word(counts: Snapshot) -> str:
    """What became of all that came."""
    lost = {name: count for name, count in counts.dropped.items() if count}
    left = {name: count for name, count in counts.held.items() if count}
    spooled = left.pop("spool", 0)
    return (
        f"received {counts.received:,}"
        + (f" + recovered {counts.recovered:,}" if counts.recovered else "")
        + f" = stored {counts.stored:,} + dead {counts.dead:,} + dropped {sum(lost.values()):,}"
        + (f" ({listed(lost)})" if lost else "")
        + f" + left in the spool {spooled:,}"
        + (f" + handed on {counts.handed:,}" if counts.handed else "")
        + (f" + held {sum(left.values()):,} ({listed(left)})" if left else "")
        + (f"; the kernel dropped {counts.kernel_drops:,} datagrams" if counts.kernel_drops else "")
        + (f"; {counts.refused:,} datagrams came from addresses that are not allowed" if counts.refused else "")
        + (f"; THE COUNTS DO NOT BALANCE: {imbalance(counts):,}" if imbalance(counts) else "")
    )


class Exporter(Collector):
    """What ``/metrics`` shows."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        counts = self._snapshot()
        for name, text in (
            ("received", "Events received"),
            ("recovered", "Events that were in the spool at the start"),
            ("stored", "Events in the table logs"),
            ("dead", "Events in the table dead_letter"),
            ("handed", "Events in the spool of workers that died; counted as recovered by the next"),
            ("datagrams", "Datagrams read"),
            ("bytes", "Bytes read"),
            ("refused", "Datagrams from addresses that are not allowed"),
            ("truncated", "Datagrams that were too long"),
            ("kernel_drops", "Datagrams that found the socket's buffer full"),
            ("missing", "Rows that were stored before their metadata were known"),
            ("filled", "Rows whose metadata came later"),
            ("spool_refused", "Batches for which the spool had no room"),
            ("metadata_loads", "Requests to the metadata API"),
            ("metadata_failures", "Loads of metadata that failed"),
            ("faults", "Counts that did not balance, and failures of the program"),
            ("lines_lost", "Lines of the log that nobody read"),
            ("deaths", "Workers that died"),
        ):
            yield CounterMetricFamily(f"ingest_{name}", text, getattr(counts, name))
        dropped = CounterMetricFamily("ingest_dropped", "Events dropped, by cause", labels=("cause",))
        for cause, count in counts.dropped.items():
            dropped.add_metric((cause,), count)
        held = GaugeMetricFamily("ingest_held", "Events held, by place", labels=("place",))
        for place, count in counts.held.items():
            held.add_metric((place,), count)
        yield from (dropped, held)
        yield GaugeMetricFamily("ingest_imbalance", "Events not accounted for: 0", imbalance(counts))
        yield GaugeMetricFamily("ingest_spool_bytes", "Bytes in the spool", counts.spool_bytes)
        yield GaugeMetricFamily("ingest_lag_seconds", "From receipt to commit, longest of the last batches", counts.lag)
        yield GaugeMetricFamily("ingest_loop_lag_seconds", "Longest of the last minute", counts.loop_lag)
        yield GaugeMetricFamily("ingest_database_up", "1 if connected", float(counts.database == "connected"))
        circuit = {"half_open": 0.5, "open": 1.0}.get(counts.metadata, 0.0)
        yield GaugeMetricFamily("ingest_metadata_circuit_open", "0 closed, 0.5 half-open, 1 open", circuit)
        yield GaugeMetricFamily("ingest_workers", "Workers that run", counts.workers)


def health(counts: Snapshot, workers: int) -> tuple[int, dict[str, Any]]:
    """The status code and the body of ``/health``. A database that is away is no reason to start the ingester anew."""
    off = imbalance(counts)
    if off or counts.faults:
        state = "error"
    elif counts.stopping:
        state = "stopping"
    elif counts.workers < workers or counts.database != "connected" or counts.metadata not in ("closed", "none"):
        state = "degraded"
    else:
        state = "ok"
    body = {"status": state, "imbalance": off, **counts._asdict()}
    return (200 if state in ("ok", "degraded") else 503), body


# ---------------------------------------------------------------------------------------------- around a program


class Program(Protocol):
    """One worker, or many."""

    workers: int

    async def run(self) -> int:
        """Until it has stopped; the exit code."""

    def stop(self) -> None:
        """The first call: stop and drain. The second: at once."""

    def snapshot(self) -> Snapshot: ...


async def serve(program: Program, http_sock: socket.socket | None, *, clock: Clock = time.monotonic) -> int:
    """Run ``program``: SIGINT and SIGTERM stop it, the second forces. Returns the exit code."""

    async def keep() -> None:
        began = at = clock()
        shown = program.snapshot()
        while True:
            await asyncio.sleep(EVERY)
            before, then = shown, at
            shown, at = program.snapshot(), clock()
            text = status(shown, before, at - then, at - began)
            show_status(text[: shutil.get_terminal_size().columns - 1])

    exporter = Exporter(program.snapshot)
    with stopped_by_signals(program.stop):
        async with http(http_sock, exporter, lambda: health(program.snapshot(), program.workers)):
            if not sys.stderr.isatty():
                return await program.run()
            keeping = asyncio.create_task(keep(), name="status line")
            try:
                return await program.run()
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
                show_status("")


# ------------------------------------------------------------------------------------------------- many workers


class Worker:
    """What the parent knows of one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.last: Snapshot | None = None
        """Of the one that lives."""
        self.past = Snapshot(workers=0, database="connected")
        """Of those that died."""
        self.code: int | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.process: asyncio.subprocess.Process | None = None

    def tell(self, word: bytes) -> None:
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(word)


class SupervisorStats(NamedTuple):
    workers: int
    running: int
    deaths: int
    stage: int


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
        self.list = [Worker(number) for number in range(len(sockets))]
        self.workers = len(sockets)
        self.failure: str | None = None
        """Why a worker could not begin at all: there is no use in trying again."""
        self._stage, self._stopped = 0, asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []
        self._spawning = asyncio.Lock()

    def stop(self) -> None:
        self._stage += 1
        self._stopped.set()
        for worker in self.list:
            worker.tell(STOP if self._stage == 1 else FORCE)
            if self._stage > 2:
                self._kill(worker)
        if self._stage <= 2:
            later = LATE + (self._stop_limit if self._stage == 1 else 0.0)
            self._timers += [asyncio.get_running_loop().call_later(later, self._kill, each) for each in self.list]

    def _kill(self, worker: Worker) -> None:
        if worker.process is not None and worker.process.returncode is None:
            log.error("worker %d is late: killed", worker.number)
            worker.process.kill()

    def snapshot(self) -> Snapshot:
        parts = [worker.past for worker in self.list]
        parts += [worker.last for worker in self.list if worker.last is not None]
        counts = add_up(parts)
        return counts._replace(
            kernel_drops=self._kernel_drops() or 0,
            lines_lost=counts.lines_lost + lines_lost(),
            stopping=self._stage > 0,
        )

    def stats(self) -> SupervisorStats:
        running = sum(worker.process is not None for worker in self.list)
        return SupervisorStats(self.workers, running, self.snapshot().deaths, self._stage)

    __repr__ = telling

    async def run(self) -> int:
        """1 if a worker could not begin, or lost events at the stop."""
        tasks = [asyncio.create_task(self._keep(worker), name=f"worker {worker.number}") for worker in self.list]
        try:
            await asyncio.gather(*tasks)
        finally:
            for timer in self._timers:
                timer.cancel()
            for worker in self.list:
                self._kill(worker)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return 1 if self.failure or any(worker.code for worker in self.list) else 0

    async def _keep(self, worker: Worker) -> None:
        """Have the worker live, again and again."""
        deaths = 0
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
            deaths = 1 if self._clock() - began > HEALTHY else deaths + 1
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            log.error("worker %d died (%s); another one goes on", worker.number, how)
            await arrives(self._stopped, AGAIN.delay(deaths, self._rng) or 0.0)
            if self._stopped.is_set():
                return

    @staticmethod
    def _bury(worker: Worker) -> None:
        worker.past = add_up([worker.past, buried(worker.last or Snapshot())])
        worker.last = None

    async def _spawn(self, *sockets: socket.socket) -> asyncio.subprocess.Process:
        """Signals are blocked until the process ignores them. One at a time: the mask is this thread's."""
        async with self._spawning:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                return await asyncio.create_subprocess_exec(
                    *self._command,
                    str(sockets[0].fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[sock.fileno() for sock in sockets],
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    async def _live(self, worker: Worker) -> int:
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
            reader, worker.writer = await asyncio.open_connection(sock=ours, limit=LINE)
            worker.writer.write(json.dumps({**self._config(worker.number), "socket": udp.fileno()}).encode() + b"\n")
            if self._stage:
                worker.tell(STOP if self._stage == 1 else FORCE)
            with contextlib.suppress(OSError, ValueError):  # it died in the middle of a line
                while line := await reader.readline():
                    said = orjson.loads(line)
                    if "failed" in said:
                        self.failure = said["failed"]
                    else:
                        worker.last = Snapshot(**said)
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


class Link:
    """A worker's side: tells its parent where it stands, and hears from it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None

    async def open(self) -> dict[str, Any]:
        """The configuration."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._sock, limit=LINE)
        told: dict[str, Any] = orjson.loads(await self._reader.readline())
        return told

    def tell(self, what: Mapping[str, Any]) -> None:
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(orjson.dumps(what) + b"\n")

    async def listen(self, program: Program) -> None:
        """Obey, until the parent is gone; then stop."""
        assert self._reader is not None
        stage = 0
        with contextlib.suppress(OSError):
            while word := await self._reader.read(1):
                for _ in range((1 if word == STOP else 2) - stage):
                    stage += 1
                    program.stop()
        if not stage:
            program.stop()

    async def report(self, program: Program) -> None:
        while True:
            self.tell(program.snapshot()._asdict())
            await asyncio.sleep(REPORT_EVERY)

    async def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                await self._writer.drain()
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
