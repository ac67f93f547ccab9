"""``python -m bench ingest``: loss against rate of ingest_logs.py, beside rsyslog; and a minute of steady load.

Theory
------
* **Each step is a life of its own**: a fresh database on one embedded PostgreSQL, a fresh process, `seconds` of events
  at one rate, and then time to drain. What was lost is what was sent and is not in the table: whoever dropped it. An
  event that is there twice does not count twice.
* **Lossless means sustainable**: no event is missing in the end, and `DRAIN` seconds after the last one was sent no
  more are outstanding than a last batch that is not full (`TAIL`), which both may keep for seconds by design. A step
  that fails is done once more, for all contestants alike: the machine is shared, and its bad second is not theirs.
* **The search**: all contestants climb the same ladder of rates, taking turns; whoever failed at two of them is out.
  Then the gap between the last good and the first bad rate is halved a few times. What is told is the rate at which
  the senders really sent in the best lossless step. If they could not send as fast as they were to, for want of a
  processor, then that is the end of the ladder too.
* **The senders** (sandbox/logs.py) are processes of their own: RFC 5424, about 200 bytes, 500 services that have each
  a socket and an address. They, PostgreSQL and the contestant share the processors.
* **What each does**: ingest_logs.py runs with its defaults, and with metadata from an API on top: 13 columns, an index
  over the time, a record of each batch. rsyslog (imudp -> ompgsql) inserts time, time of receipt, service, host,
  severity and message into a table without an index. PostgreSQL has its defaults, and `track_commit_timestamp`, from
  which the seconds from receipt to commit are known of every row.

rsyslog's configuration (`RSYSLOG`, `VARIANTS`): imudp with a receive buffer of 32 MB, as ours, and a thread that takes
512 datagrams in a call; one queue (linked list of 200,000, of the action, before ompgsql) with up to four workers and
batches of 1,000, of each of which ompgsql makes one transaction of so many INSERTs. Fewer workers, two threads of
imudp, a fixed array, larger batches, and a queue of the ruleset instead were tried on a busy machine, once: none was
clearly better, and one worker or batches of 4,000 were worse. All are in `VARIANTS`, to be tried again.
`rsyslog-defaults` is what one gets who sets nothing: the system's receive buffer, rsyslog's own queue, none of the
action.

Promised: all traffic stays on 127.0.0.0/8, all children are ended by their id, the system's rsyslog is not touched.
Raises SystemExit if the soak does not hold what ingest_logs.py promises. Linux only: CPU time and memory are read from
/proc. Everything is in one thread, and it waits most of the time.

`bench/ingest.py send PORT RATE TOTAL FIRST FORMATS` is the sender.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import asyncpg
import psutil

HERE = Path(__file__).resolve().parents[1]
Row = dict[str, object]

DRAIN = 2.0
"""Seconds after the last event by which the backlog must be gone."""
TAIL = 1000
"""Rows of each receiver that may come later: a batch that is not full waits for more."""
STILL = 7.0
"""Seconds without a new row after which none is expected any more: longer than the age at which batches are written."""
PATIENCE = 90.0
"""Seconds that a drain may take at most."""
READY = 20.0
"""Seconds that a contestant may take to be there."""
AT_ONCE = 80_000
"""Events a second of one sending process."""
HELD_BACK = 0.9
"""Share of the wanted rate below which the senders did not do it."""
SOAK_P99, SOAK_ENRICHED, SOAK_GROWTH = 6.0, 0.999, 1.25
"""What a soak must hold: seconds from receipt to commit; share of rows with metadata; growth of memory after 10 s."""

TABLE = """CREATE TABLE logs (received_at timestamptz NOT NULL, event_at timestamptz NOT NULL, service text NOT NULL,
    host text NOT NULL, severity smallint NOT NULL, message text NOT NULL)"""
RSYSLOG = """global(workDirectory="{folder}" internalmsg.ratelimit.interval="1")
module(load="imudp" {module})
module(load="ompgsql")
{main}
template(name="row" type="list" option.stdsql="on") {{
  constant(value="INSERT INTO logs (received_at,event_at,service,host,severity,message) VALUES ('")
  property(name="timegenerated" dateFormat="rfc3339") constant(value="','")
  property(name="timereported" dateFormat="rfc3339") constant(value="','")
  property(name="app-name") constant(value="','")
  property(name="hostname") constant(value="',")
  property(name="syslogseverity") constant(value=",'")
  property(name="msg") constant(value="')")
}}
ruleset(name="in" {ruleset}) {{ action(type="ompgsql" conninfo="{database}" template="row" {action}) }}
input(type="imudp" address="127.0.0.1" port="{port}" ruleset="in" {input})
"""
QUEUE = (
    'queue.type="LinkedList" queue.size="200000" queue.dequeueBatchSize="1000" queue.workerThreads="{}" '
    'queue.workerThreadMinimumMessages="2000" queue.timeoutWorkerThreadShutdown="60000"'
)
TUNED = {"module": 'threads="2" batchSize="128" timeRequery="8"', "input": 'rcvbufSize="32m"'}
ONE = TUNED | {"module": 'threads="1" batchSize="512" timeRequery="8"'}
VARIANTS: dict[str, dict[str, str]] = {
    "rsyslog": ONE | {"action": QUEUE.format(4)},
    "rsyslog-w2": ONE | {"action": QUEUE.format(2)},
    "rsyslog-w1": ONE | {"action": QUEUE.format(1)},
    "rsyslog-i2": TUNED | {"action": QUEUE.format(2)},
    "rsyslog-ruleset": ONE | {"ruleset": QUEUE.format(2)},
    "rsyslog-fixed": ONE | {"action": QUEUE.format(2).replace("LinkedList", "FixedArray")},
    "rsyslog-b4000": ONE | {"action": QUEUE.format(2).replace('Size="1000"', 'Size="4000"')},
    "rsyslog-defaults": {},
}
"""Ways to set up rsyslog: what goes into the gaps of `RSYSLOG`."""
OURS = {"ingest_logs": 1, "ingest_logs-x2": 2, "ingest_logs-x4": 4}
"""Their receivers."""
INSTALL = "rsyslogd with ompgsql: not installed: apt install rsyslog rsyslog-pgsql"


# ---------------------------------------------------------------------------------------------------------- sending


def send(port: int, rate: float, total: int, first: int, formats: str) -> None:
    """Send, and print what was sent, as JSON."""
    from sandbox.logs import Senders

    with Senders(("127.0.0.1", port), rate=rate, total=total, first=first, formats=formats.split(",")) as senders:  # type: ignore[arg-type]
        senders.wait()
    stats, usage = senders.stats(), resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({**stats._asdict(), "cpu": usage.ru_utime + usage.ru_stime}))


class Sent(NamedTuple):
    events: int
    rate: float
    """Events a second, really."""
    cpu: float


def send_all(
    port: int, rate: float, seconds: float, formats: str, while_waiting: Callable[[], None] = lambda: None
) -> Sent:
    """Have as many processes send as it takes. ``while_waiting`` is called about every 0.1 s."""
    from bench import runner

    count = math.ceil(rate / AT_ONCE)
    total = round(rate * seconds / count)
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                runner.child(
                    [*runner.module("bench.ingest"), "send", port, rate / count, total, n * total, formats],
                    stdout=subprocess.PIPE,
                )
            )
            for n in range(count)
        ]
        while any(child.poll() is None for child in children):
            while_waiting()
            time.sleep(0.05)
        told = [json.loads(child.stdout.read()) for child in children if child.stdout and not child.returncode]
    if len(told) < count or any(each["failed"] for each in told):
        raise SystemExit("bench: ingest: a sender failed")
    return Sent(sum(t["events"] for t in told), sum(t["rate"] for t in told), sum(t["cpu"] for t in told))


# ---------------------------------------------------------------------------------------------------- the processes


def cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process and its children, those that have ended too."""
    seconds = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(each.cpu_times()[:4])
    return seconds


def memory_of(process: psutil.Process, field: str) -> float:
    """MB of a process and its children: "VmHWM" (peak) or "VmRSS" (now)."""
    kilobytes = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
    return kilobytes / 1024


def kernel_drops(port: int) -> int:
    """Datagrams that found the buffer of a socket on this port full."""
    lines = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    return sum(int(words[12]) for words in lines if int(words[1].rpartition(":")[2], 16) == port)


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


class Contestant(NamedTuple):
    process: psutil.Process
    receivers: int


@contextlib.contextmanager
def ours(name: str, folder: Path, postgres: Postgres, url: str, port: int, api: str, more: str) -> Iterator[Contestant]:
    from bench import runner

    receivers, http = OURS[name], runner.free_port()
    words: list[object] = [sys.executable, HERE / "ingest_logs.py", "--listen", f"127.0.0.1:{port}"]
    words += ["--metadata", api, "--http", f"127.0.0.1:{http}", "--spool", folder / "spool", "--stop-limit", 2]
    words += ["--receivers", receivers, *more.split()]
    environment, address = {**os.environ, "DATABASE_URL": url}, f"http://127.0.0.1:{http}/health"
    with open(folder / "log", "a+") as log, runner.child(words, env=environment, stdout=log, stderr=log) as process:

        def is_there() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=1) as answer:
                found = json.load(answer)
                return bool(found["workers"] == receivers and found["database"] == "connected")
            return False

        wait_for(is_there, process, folder / "log")
        yield Contestant(psutil.Process(process.pid), receivers)
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@contextlib.contextmanager
def rsyslog(name: str, folder: Path, postgres: Postgres, url: str, port: int) -> Iterator[Contestant]:
    from bench import runner

    gaps = dict.fromkeys(("module", "main", "ruleset", "action", "input"), "") | VARIANTS[name]
    config = folder / "rsyslog.conf"
    config.write_text(RSYSLOG.format(folder=folder, port=port, database=url.replace(":@", "@"), **gaps))
    words = [rsyslogd(), "-n", "-f", config, "-i", folder / "rsyslog.pid"]
    postgres.ask(TABLE)
    with open(folder / "log", "a+") as log, runner.child(words, stdout=log, stderr=log) as process:

        def is_there() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
                probe.connect(("127.0.0.1", port))
                probe.send(b"<14>1 - bench bench - - - are you there?")
                time.sleep(0.2)
            return bool(postgres.ask("SELECT count(*) FROM logs")[0])

        wait_for(is_there, process, folder / "log")
        time.sleep(0.3)
        postgres.ask("TRUNCATE logs")
        yield Contestant(psutil.Process(process.pid), 1)


def rsyslogd() -> str | None:
    """Where it is, if its module for PostgreSQL is there too."""
    program = shutil.which("rsyslogd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")
    folders = [*Path("/usr/lib").glob("*/rsyslog"), Path("/usr/lib/rsyslog"), Path("/usr/lib64/rsyslog")]
    return program if any((folder / "ompgsql.so").exists() for folder in folders) else None


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY
    while not is_there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"bench: a contestant did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------ a step


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
        from bench import runner

        self._count += 1
        folder, port = self._folder / str(self._count), free_udp_port()
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(self._postgres.fresh())
            if name in VARIANTS:
                running = rsyslog(name, folder, self._postgres, url, port)
            else:
                running = ours(name, folder, self._postgres, url, port, self._api, self._options)
            contestant = stack.enter_context(running)
            self._postgres.ask("CHECKPOINT")
            step = self._measure(contestant, port, rate, seconds, formats, has_metadata=name not in VARIANTS)
        shutil.rmtree(folder, ignore_errors=True)
        verdict = "lossless" if step.lossless else f"{step.lost:,} lost, drained in {step.drained} s"
        runner.note(f"{name} at {rate:,.0f}/s: sent {step.sent.rate:,.0f}/s, {verdict}; p99 {runner.cell(step.p99)} s")
        return step

    def _measure(
        self, contestant: Contestant, port: int, rate: float, seconds: float, formats: str, has_metadata: bool
    ) -> Step:
        postgres, process = self._postgres, contestant.process
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


# ----------------------------------------------------------------------------------------------------- the search


class Tried(Protocol):
    """A step, as the search sees it."""

    @property
    def rate(self) -> float:
        """At which the senders really sent."""

    @property
    def lossless(self) -> bool: ...

    @property
    def held_back(self) -> bool: ...

    @property
    def wanted(self) -> float: ...

    def row(self, name: str) -> Row: ...


S = TypeVar("S", bound=Tried)
S_co = TypeVar("S_co", bound=Tried, covariant=True)


class Track(Protocol[S_co]):
    """What the contestants climb on."""

    def run(self, name: str, rate: float, seconds: float) -> S_co:
        """One life of a contestant at one rate."""


class Search(Generic[S]):
    """Of one contestant: which rate is next."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: list[S] = []
        self.low, self.high, self.failures = 0.0, math.inf, 0

    @property
    def best(self) -> S | None:
        """The lossless step with the highest rate."""
        return max((step for step in self.steps if step.lossless), key=lambda step: step.rate, default=None)

    def run(self, course: Track[S], rate: float, seconds: float) -> None:
        """A step, once more if it fails for the first time."""
        for _ in range(2 if not self.failures else 1):
            step = course.run(self.name, rate, seconds)
            self.steps.append(step)
            if step.lossless and not step.held_back:
                self.low = max(self.low, rate)
                return
        self.failures += 1
        self.high = min(self.high, rate)

    def halve(self, course: Track[S], seconds: float) -> None:
        if self.low < self.high < math.inf:
            self.failures = 0
            self.run(course, (self.low + self.high) / 2, seconds)


def climb(
    course: Track[S], names: Sequence[str], rates: Sequence[int], halvings: int, seconds: float
) -> list[Search[S]]:
    """The ladder, the contestants taking turns, and then the halvings."""
    searches = [Search[S](name) for name in names]
    for number, rate in enumerate(rates):
        turn = number % len(searches)
        for search in (*searches[turn:], *searches[:turn]):
            if search.failures < 2:
                search.run(course, rate, seconds)
    for _ in range(halvings):
        for search in searches:
            search.halve(course, seconds)
    return searches


def ladder(
    course: Track[S],
    names: Sequence[str],
    args: argparse.Namespace,
    summary: Callable[[Sequence[Sequence[Search[S]]]], list[Row]],
) -> list[Row]:
    """The whole comparison, ``args.repeat`` times: prints every step, and then what it comes to; returns both."""
    from bench import runner

    rates = [int(rate) for rate in args.rates.split(",")]
    found = [climb(course, names, rates, args.halvings, args.seconds) for _ in range(args.repeat)]
    steps = [
        step.row(search.name)
        for name in names
        for searches in found
        for search in searches
        if search.name == name
        for step in sorted(search.steps, key=lambda step: step.wanted)
    ]
    results = summary(found)
    print(runner.table(steps), end="\n\n")
    print(runner.table(results))
    return results + steps


BRIEF = ("us/row", "PG us/row", "send us", "peak MB", "p50 s", "p99 s", "drain s")
"""What the summary tells of the best step."""


def summary(found: Sequence[Sequence[Search[Step]]]) -> list[Row]:
    """A row for each contestant, of all its searches."""
    from bench import runner

    rates: dict[str, list[float]] = {}
    for searches in found:
        for search in searches:
            rates.setdefault(search.name, []).append(search.best.sent.rate if search.best else 0.0)
    best = {name: runner.Spread.of(values) for name, values in rates.items()}
    base = max((spread.median for name, spread in best.items() if name in VARIANTS), default=None)
    results: list[Row] = []
    for name, spread in best.items():
        steps = [s.best for searches in found for s in searches if s.name == name and s.best]
        step = max(steps, key=lambda step: step.sent.rate, default=None)
        row: Row = {"": name, "x rsyslog": runner.to(spread.median, base), "lossless/s": spread}
        if step is not None:
            told = step.row(name)
            row |= {key: told[key] for key in BRIEF}
        results.append(row)
    return results


@contextlib.contextmanager
def course(options: str) -> Iterator[Course]:
    from bench import runner

    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        port = runner.free_port()
        api = [*runner.module("sandbox"), "logs", "--metadata-port", port]
        stack.enter_context(runner.child(api, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        postgres = stack.enter_context(Postgres(folder / "postgres"))
        yield Course(postgres, folder, f"http://127.0.0.1:{port}/services/{{service}}", options)


def soak(course: Course, name: str, rate: int, seconds: int) -> list[Row]:
    """Raises SystemExit if something that is promised does not hold."""
    from bench import runner

    step = course.run(name, rate, seconds, "rfc5424,rfc3164,json")
    begun, ended = step.memory[0], step.memory[-1]
    row = step.row(name) | {"MB at 10 s": begun, "MB at the end": ended}
    print(runner.table([row]))
    broken = [
        *(["events are missing"] if step.lost else []),
        *(["events are there twice"] if step.twice else []),
        *(["metadata are missing"] if (step.enriched or 0) < SOAK_ENRICHED else []),
        *(["commits come late"] if step.p99 is None or step.p99 >= SOAK_P99 else []),
        *(["memory grows"] if ended > begun * SOAK_GROWTH else []),
        *(["the senders were held back"] if step.held_back else []),
    ]
    if broken:
        raise SystemExit(f"bench: ingest: {', '.join(broken)}")
    return [row]


def run(args: argparse.Namespace) -> list[Row]:
    """The table's rows."""
    from bench import runner

    names = args.peers.split(",")
    for name in names:
        runner.known(name, [*OURS, *VARIANTS])
    if rsyslogd() is None and any(name in VARIANTS for name in names):
        print(INSTALL)
        names = [name for name in names if name not in VARIANTS]
    with course(args.options) as track:
        if args.soak:
            return soak(track, names[0], args.rate, args.soak)
        return ladder(track, names, args, summary)


if __name__ == "__main__":
    assert sys.argv[1] == "send"
    send(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
