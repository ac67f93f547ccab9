"""Each step of `bench ingest` is a life of its own: a fresh database, a fresh contestant, events at one rate, a drain.

What was lost is what was sent and is not in the table: whoever dropped it. An event that is there twice does not count
twice. PostgreSQL has its defaults, and `track_commit_timestamp`, from which the seconds from receipt to commit are
known of every row. CPU time and memory are read from /proc: Linux only. All in one thread, which mostly waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import psutil

from bench.ingest_contestants import VARIANTS, Contestant, ours, rsyslog
from bench.ingest_send import Sent, send_all
from bench.ladder import HELD_BACK, cpu_of, memory_of
from bench.measure import Row, cell, child, free_port, module, note

DRAIN = 2.0
"""Seconds after the last event by which the backlog must be gone."""
TAIL = 1000
"""Rows of each receiver that may come later: a batch that is not full waits for more."""
STILL = 7.0
"""Seconds without a new row after which none is expected any more: longer than the age at which batches are written."""
PATIENCE = 90.0
"""Seconds that a drain may take at most."""


def kernel_drops(port: int) -> int:
    """Datagrams that found the buffer of a socket on this port full."""
    lines = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    return sum(int(words[12]) for words in lines if int(words[1].rpartition(":")[2], 16) == port)


class Postgres:
    """The embedded server, a connection to look at it, and one to the database of the step."""

    def __init__(self, folder: Path) -> None:
        from runtime.embedded import Embedded

        self._server, self._folder = Embedded(folder), folder
        self._runner = asyncio.Runner()
        self._connection: Any = None
        self.url, self._count = "", 0

    def __enter__(self) -> Postgres:
        self.url = self._server.start()
        self.run("ALTER SYSTEM SET track_commit_timestamp = on")
        self._server.stop()
        self.url = self._server.start()
        number = (self._folder / "postmaster.pid").read_text().split()[0]
        self._process = psutil.Process(int(number))
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()
        self._server.stop()

    def run(self, *statements: str) -> None:
        """Statements, each by itself, on a connection of their own."""

        async def work() -> None:
            connection = await asyncpg.connect(self.url)
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        self._runner.run(work())

    @contextlib.contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of a new database."""
        self._count += 1
        name = f"bench_{self._count}"
        self.run(f"CREATE DATABASE {name}")
        base, _, rest = self.url.partition("/postgres?")
        url = f"{base}/{name}?{rest}"
        self._connection = self._runner.run(asyncpg.connect(url))
        self._own = psutil.Process(self._connection.get_server_pid())
        self.ask("SET max_parallel_workers_per_gather = 0")
        self.ask("SET work_mem = '512MB'")
        try:
            yield url
        finally:
            self._runner.run(self._connection.close())
            self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def ask(self, query: str) -> Any:
        """The first row of the answer, on the step's database."""
        return self._runner.run(self._connection.fetchrow(query))

    def cpu(self) -> float:
        """CPU seconds of the server, but for what `ask` took."""
        own = self._own.cpu_times()
        return cpu_of(self._process) - float(own.user + own.system)


class Step(NamedTuple):
    wanted: float
    sent: Sent
    rows: int
    """In the table in the end; each event once."""
    twice: int
    """Rows that were there already."""
    enriched: float | None
    """Share of the rows that have metadata in the end."""
    later: int
    """Rows that got theirs by an UPDATE, which hides when they were committed first."""
    drained: float | None
    """Seconds after the end until at most `TAIL` rows of each receiver were missing; None if that never was."""
    kernel: int
    """Of what is missing, what the kernel dropped."""
    cpu: float
    server_cpu: float
    peak: float
    p50: float | None
    p99: float | None
    """Seconds from receipt to commit; of all rows that are as they came."""
    memory: tuple[float, ...] = ()
    """MB: at 10 s, and at the end of the sending."""

    @property
    def lost(self) -> int:
        return self.sent.events - self.rows

    @property
    def rate(self) -> float:
        return self.sent.rate

    @property
    def held_back(self) -> bool:
        return self.sent.rate < self.wanted * HELD_BACK

    @property
    def lossless(self) -> bool:
        return not self.lost and self.drained is not None and self.drained <= DRAIN

    def row(self, name: str) -> Row:
        each = 1e6 / max(1, self.rows)
        return {
            "": name,
            "wanted/s": round(self.wanted),
            "sent/s": round(self.sent.rate),
            "sent": self.sent.events,
            "lost": self.lost,
            "lost %": 100 * self.lost / max(1, self.sent.events),
            "kernel": self.kernel,
            "twice": self.twice,
            "drain s": self.drained,
            "p50 s": self.p50,
            "p99 s": self.p99,
            "enriched %": None if self.enriched is None else 100 * self.enriched,
            "later": self.later,
            "CPU s": self.cpu,
            "PG s": self.server_cpu,
            "us/row": self.cpu * each,
            "PG us/row": self.server_cpu * each,
            "send us": self.sent.cpu * 1e6 / max(1, self.sent.events),
            "peak MB": self.peak,
        }


class Course:
    """PostgreSQL, the metadata API, and a folder."""

    def __init__(self, postgres: Postgres, folder: Path, api: str, options: str) -> None:
        self._postgres, self._folder, self._api, self._options = postgres, folder, api, options
        self._count = 0

    def run(self, name: str, rate: float, seconds: float, formats: str = "rfc5424") -> Step:
        """One life of a contestant at one rate."""
        self._count += 1
        folder, port = self._folder / str(self._count), free_port(socket.SOCK_DGRAM)
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(self._postgres.fresh())
            if name in VARIANTS:
                running = rsyslog(name, folder, self._postgres.ask, url, port)
            else:
                running = ours(name, folder, url, port, self._api, self._options)
            contestant = stack.enter_context(running)
            self._postgres.ask("CHECKPOINT")
            step = self._measure(contestant, port, rate, seconds, formats, has_metadata=name not in VARIANTS)
        shutil.rmtree(folder, ignore_errors=True)
        verdict = "lossless" if step.lossless else f"{step.lost:,} lost, drained in {step.drained} s"
        note(f"{name} at {rate:,.0f}/s: sent {step.sent.rate:,.0f}/s, {verdict}; p99 {cell(step.p99)} s")
        return step

    def _measure(
        self, contestant: Contestant, port: int, rate: float, seconds: float, formats: str, has_metadata: bool
    ) -> Step:
        postgres, process = self._postgres, psutil.Process(contestant.pid)
        before = cpu_of(process), postgres.cpu(), kernel_drops(port)
        begun, memory = time.monotonic(), list[float]()

        def look() -> None:
            if not memory and time.monotonic() >= begun + 10:
                memory.append(memory_of(process, "VmRSS"))

        sent = send_all(port, rate, seconds, formats, look)
        memory.append(memory_of(process, "VmRSS"))
        rows, drained = self._drain(sent.events, TAIL * contestant.receivers)
        cpu, server = cpu_of(process) - before[0], postgres.cpu() - before[1]
        dropped, peak = kernel_drops(port) - before[2], memory_of(process, "VmHWM")
        (once,) = postgres.ask("SELECT count(DISTINCT substring(message from 'serial=([0-9]+)$')::bigint) FROM logs")
        enriched, later, as_they_came = None, 0, ""
        if has_metadata:
            as_they_came = " WHERE xmin::text IN (SELECT xmin::text FROM log_batches)"
            (done,) = postgres.ask("SELECT count(*) FROM logs WHERE enrichment = 'done'")
            (later,) = postgres.ask(f"SELECT {rows} - count(*) FROM logs{as_they_came}")
            enriched = done / max(1, rows)
        p50, p99 = postgres.ask(
            "SELECT extract(epoch FROM percentile_disc(0.5) WITHIN GROUP (ORDER BY age)),"
            " extract(epoch FROM percentile_disc(0.99) WITHIN GROUP (ORDER BY age))"
            f" FROM (SELECT pg_xact_commit_timestamp(xmin) - received_at AS age FROM logs{as_they_came}) ages"
        )
        p50, p99 = (None if value is None else float(value) for value in (p50, p99))
        return Step(
            *(rate, sent, once, rows - once, enriched, later),
            *(drained, dropped, cpu, server, peak),
            *(p50, p99, tuple(memory)),
        )

    def _drain(self, events: int, tail: int) -> tuple[int, float | None]:
        """Wait until all rows are there, or no more come; how many, and after how long all but ``tail`` were."""
        ended, drained, rows = time.monotonic(), None, 0
        changed = ended
        while True:
            asked = time.monotonic()
            (found,) = self._postgres.ask("SELECT count(*) FROM logs")
            now = time.monotonic()
            if found > rows:
                changed, rows = now, found
            if drained is None and events - rows <= tail:
                drained = asked - ended
            if rows >= events or now - changed > STILL or now - ended > PATIENCE:
                return rows, drained
            time.sleep(max(0.2, 2 * (now - asked)))


@contextlib.contextmanager
def course(options: str) -> Iterator[Course]:
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        port = free_port()
        api = [*module("sandbox"), "logs", "--metadata-port", port]
        stack.enter_context(child(api, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        postgres = stack.enter_context(Postgres(folder / "postgres"))
        yield Course(postgres, folder, f"http://127.0.0.1:{port}/services/{{service}}", options)
