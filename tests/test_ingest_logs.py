"""ingest_logs.py: whole processes, and the equation of counts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import ingest_logs
from logs import display, sink, upkeep
from logs import pipeline as log_pipeline
from logs import workers as log_workers
from logs.display import LogCounts
from logs.enrich import Enricher
from logs.options import IngestOptions
from logs.pipeline import Ingester
from logs.workers import Supervisor
from runtime import postgres as db
from runtime import spool as log_spool
from sandbox.logs import MetadataApi
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, free_port, run_task, until_async, wait_until
from tests.helpers.logs import files, logs_ingest_serials, logs_ingest_up, logs_spool_open
from tests.helpers.postgres import PgServer
from tests.helpers.processes import answers_besieged, unread


class IngestProcess:
    """``python ingest_logs.py`` with these arguments, and what it says on stderr."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        command = [sys.executable, "ingest_logs.py", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env={**os.environ, "DATABASE_URL": "", "PYTHONWARNINGS": "error::ResourceWarning", **environ},
        )
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def said(self, pattern: str) -> str:
        """Wait for a line; its group."""
        wait_until(lambda: any(re.search(pattern, line) for line in self.lines) or self.process.poll() is not None)
        found = next((match for line in self.lines if (match := re.search(pattern, line))), None)
        assert found is not None, self.lines
        return found[1] if found.groups() else found[0]

    def end(self) -> int:
        try:
            code = self.process.wait(PROGRAM_LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.lines) from None
        self._reading.join()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.output = self.process.stdout.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def address(self) -> tuple[str, int]:
        host, _, port = self.said(r"listening on (\S+)").rpartition(":")
        return host, int(port)

    def health(self) -> dict[str, Any]:
        url = self.said(r"(http://\S+)/metrics")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=HANG_LIMIT) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
        return found

    def until(self, predicate: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def looked() -> bool:
            nonlocal found
            found = self.health()
            assert found["imbalance"] == found["faults"] == 0, found
            return predicate(found)

        wait_until(looked)
        return found


@contextlib.contextmanager
def ingest_process(*arguments: str, **environ: str) -> Iterator[IngestProcess]:
    process = IngestProcess(*arguments, **environ)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            for child in psutil.Process(process.process.pid).children(recursive=True):
                child.kill()
            process.kill()


def ingest_send(to: tuple[str, int], first: int, count: int, sockets: int = 1) -> None:
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(sockets)]
        for n in range(first, first + count):
            senders[n % sockets].sendto(f"<14>1 - host svc - - - serial={n}".encode(), to)


INGEST_ARGUMENTS = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")


def test_ingest_demo() -> None:
    """On a terminal: with a status line."""
    ours, theirs = pty.openpty()
    temporary = Path(tempfile.mkdtemp(prefix="ingest-test-"))
    try:
        command = [sys.executable, "ingest_logs.py", "--demo", "--demo-seconds", "1.5", "--demo-rate", "1000"]
        folder = HERE
        environ = {**os.environ, "TMPDIR": str(temporary), "COLUMNS": "200"}
        environ.pop("DATABASE_URL", None)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, cwd=folder, env=environ) as process:
            output = process.communicate(timeout=PROGRAM_LIMIT)[0].decode()
        os.set_blocking(ours, False)
        said = os.read(ours, 1 << 20).decode()
    finally:
        os.close(ours)
        os.close(theirs)
        left = [path.name for path in temporary.iterdir()]
        shutil.rmtree(temporary, ignore_errors=True)
    assert process.returncode == 0, said
    assert re.search(r"sent +1,500\nrows +1,500\nservices +500\nenriched +100.00%\n", output)
    assert len(output.strip().splitlines()) == 11 and "team-" in output
    assert "received 1,500 = stored 1,500 + dead 0 + dropped 0 + left in the spool 0" in said
    assert re.search(
        r"s · received [\d,]+ \([\d,]+/s\) · stored [\d,]+ .* · queue [\d,]+ · dropped 0 · spool 0 · lag", said
    )
    assert left in ([], [".lockfile"])  # that one is of the wheel's


def test_ingest_killed_with_durable_loses_nothing_that_was_sealed(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    more = ("--durable", "--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--batch", "10", "--flush", "0.05")
    with ingest_process(*INGEST_ARGUMENTS, *more) as first:
        to = first.address()
        first.until(lambda found: found["database"] == "connected")
        ingest_send(to, 0, 3000)
        found = first.until(lambda found: found["stored"] > 0)
        least = found["stored"] + found["held"]["spool"]
        first.kill()  # in the middle of writing
    logs_ingest_pg.stop()
    with ingest_process(*INGEST_ARGUMENTS, *more) as second:
        to = second.address()
        ingest_send(to, 3000, 500)
        found = second.until(lambda found: found["held"]["spool"] == 500 + found["recovered"])
        assert least - 3000 <= found["recovered"] <= 3000
        second.kill()
    logs_ingest_pg.start()
    with ingest_process(*INGEST_ARGUMENTS, *more) as third:
        found = third.until(lambda found: 0 < found["recovered"] == found["stored"])
        assert found["recovered"] >= 500
        assert third.stop() == 0
    serials = asyncio.run(logs_ingest_serials(logs_ingest_pg))
    assert len(serials) == len(set(serials)) >= least + 500
    assert set(range(3000, 3500)) <= set(serials)
    assert files(tmp_path) == []


def test_ingest_second_sigterm_forces(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    more = ("--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--flush", "0.05", "--stop-limit", "3600")
    with ingest_process(*INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["database"] == "connected")
        with logs_ingest_pg.frozen():
            ingest_send(to, 0, 100)
            process.until(lambda found: found["held"]["writing"] + found["held"]["spool"] == 100)
            process.process.send_signal(signal.SIGTERM)
            process.until(lambda found: found["status"] == "stopping")
            assert process.stop() == 0
    process.said(r"received 100 = stored 0 \+ dead 0 \+ dropped 0 \+ left in the spool 100$")
    with ingest_process(*INGEST_ARGUMENTS, *more) as process:
        process.until(lambda found: found["stored"] == 100)
        assert process.stop() == 0
    assert asyncio.run(logs_ingest_serials(logs_ingest_pg)) == list(range(100))


def test_ingest_a_worker_that_dies_is_replaced_and_loses_nothing_in_the_kernel(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    more = ("--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--flush", "0.05", "--receivers", "2")
    with ingest_process(*INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["workers"] == 2 and found["database"] == "connected")
        ingest_send(to, 0, 400, sockets=40)
        process.until(lambda found: found["stored"] == 400)
        workers = psutil.Process(process.process.pid).children()
        assert len(workers) == 2
        workers[1].suspend()
        ingest_send(to, 400, 400, sockets=40)
        found = process.until(lambda found: found["stored"] > 400)
        workers[1].kill()
        found = process.until(lambda found: found["stored"] == 800 and found["workers"] == 2)
        assert found["deaths"] == 1 and found["handed"] == sum(found["dropped"].values()) == 0
        process.said(r"worker \d died \(signal 9\)")
        url = process.said(r"(http://\S+)/metrics")
        with urllib.request.urlopen(f"{url}/metrics", timeout=HANG_LIMIT) as answer:
            families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}
        values = {name: family.samples[0].value for name, family in families.items() if family.samples}
        assert values["ingest_received"] == values["ingest_stored"] == 800 and values["ingest_imbalance"] == 0
        assert {sample.labels["place"] for sample in families["ingest_held"].samples} >= {"queue", "spool"}
        assert process.stop() == 0
    process.said(r"received 800 = stored 800 \+ dead 0 \+ dropped 0 \+ left in the spool 0$")
    assert asyncio.run(logs_ingest_serials(logs_ingest_pg)) == list(range(800))


@pytest.mark.parametrize(("receivers", "terminal"), [(1, False), (2, False), (1, True)])
def test_ingest_nobody_reads_stderr(receivers: int, terminal: bool, logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    """All is stored, and it stops in two stages as ever."""
    to = ("127.0.0.1", free_port(socket.SOCK_DGRAM))
    command = ("ingest_logs.py", "--listen", f"127.0.0.1:{to[1]}", "--spool", str(tmp_path), "--flush", "0.05")
    more = ("--database", logs_ingest_pg.url, "--receivers", str(receivers), "--stop-limit", "60")
    with unread(*command, *more, terminal=terminal) as program:
        program.until(lambda found: found["workers"] == receivers and found["database"] == "connected")
        for n in range(10):
            ingest_send(to, n * 100, 100, sockets=20)
            program.until(lambda found, n=n: found["stored"] == n * 100 + 100)  # type: ignore[misc]
        with logs_ingest_pg.frozen():
            ingest_send(to, 1000, 100, sockets=20)
            program.until(lambda found: found["held"]["writing"] + found["held"]["spool"] == 100)
            program.term()
            program.until(lambda found: found["status"] == "stopping")
            program.term()
            assert program.process.wait(PROGRAM_LIMIT) == 0
    with unread(*command, *more, terminal=terminal) as program:
        program.until(lambda found: found["stored"] == found["recovered"] == 100)
        program.term()
        assert program.process.wait(PROGRAM_LIMIT) == 0
    assert asyncio.run(logs_ingest_serials(logs_ingest_pg)) == list(range(1100))


@pytest.mark.parametrize("receivers", ["1", "2"])
def test_ingest_health_is_told_while_200_connections_stand(receivers: str, tmp_path: Path) -> None:
    more = ("--spool", str(tmp_path), "--database", "postgresql://nobody@127.0.0.1:1/none", "--receivers", receivers)
    with ingest_process(*INGEST_ARGUMENTS, *more) as process:
        process.until(lambda found: found["workers"] == int(receivers) and found["database"] == "down")
        answers_besieged(process.said(r"(http://\S+)/metrics"), process.process.pid)
        assert process.stop() == 0


def test_ingest_workers_end_with_their_parent(tmp_path: Path) -> None:
    more = ("--spool", str(tmp_path), "--database", "postgresql://nobody@127.0.0.1:1/none", "--receivers", "2")
    with ingest_process(*INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["workers"] == 2)
        workers = psutil.Process(process.process.pid).children()
        ingest_send(to, 0, 100, sockets=10)
        process.until(lambda found: found["received"] == 100)
        process.kill()
        wait_until(lambda: not any(worker.is_running() for worker in workers))
    assert len(files(tmp_path)) >= 2


def ingest_main(*arguments: str) -> int:
    try:
        return ingest_logs.main(arguments)
    except SystemExit as error:
        return int(str(error.code))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "where to? --database postgresql://..., or DATABASE_URL; or try --demo"),
        (("--database", "mysql://u:secret@h/d"), "--database: postgresql://user:password@host/database is needed"),
        (("--listen", "nowhere"), "--listen: expected HOST:PORT or [IPv6]:PORT, not 'nowhere'"),
        (("--http", "127.0.0.1:99999"), "--http: expected HOST:PORT"),
        (("--allow", "10.0.0.0/33"), "--allow: '10.0.0.0/33' does not appear to be an IPv4 or IPv6 network"),
        (("--metadata", "ftp://h/"), "--metadata: the metadata API needs a URL"),
        (("--zone", "Mars/Olympus"), "--zone: there is no time zone 'Mars/Olympus'"),
        (("--batch", "10", "--queue", "9"), "--batch must be at least 1, and at most --queue"),
        (("--receivers", "0"), "--receivers must be at least 1"),
        (("--retain", "0"), "--retain must be at least 1"),
        (("--flush", "0"), "--flush must be above 0 s"),
        (("--spool-bytes", "1X"), "argument --spool-bytes: invalid size value: '1X'"),
        (("--demo", "--demo-rate", "0"), "--demo-rate must be above 0"),
    ],
)
def test_ingest_wrong_usage_is_one_line(
    arguments: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    if arguments and "--database" not in arguments and "--demo" not in arguments:
        arguments = ("--database", "postgresql://h/d", *arguments)
    assert ingest_main(*arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said.splitlines()[-1] and "secret" not in said


def test_ingest_says_in_one_line_why_it_cannot_start(tmp_path: Path) -> None:
    other = ("--database", "postgresql://nobody@127.0.0.1:1/none", "--spool", str(tmp_path / "spool"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as busy, socket.create_server(("127.0.0.1", 0)) as served:
        busy.bind(("127.0.0.1", 0))
        port, http = busy.getsockname()[1], served.getsockname()[1]
        with ingest_process("--listen", f"127.0.0.1:{port}", *other) as process:
            assert process.end() == 1
        assert process.lines == [
            f"ingest_logs: cannot receive UDP on 127.0.0.1 port {port}: Address already in use",
        ]
        with ingest_process("--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{http}", *other) as process:
            assert process.end() == 1
        assert process.lines == [f"ingest_logs: cannot serve HTTP on 127.0.0.1:{http}: Address already in use"]
    (tmp_path / "spool").write_text("a file")
    for more in ((), ("--receivers", "2")):
        with ingest_process("--listen", "127.0.0.1:0", *other, *more) as process:
            assert process.end() == 1
        assert process.said(r"the spool .* cannot be used: ") and "Traceback" not in "".join(process.lines)


def test_ingest_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert ingest_main("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in ("(default 0.0.0.0:5514)", "(default 32MiB)", "(default 1000)", "--demo", "exit codes: 0", "examples:"):
        assert text in said
    assert "--worker" not in said


# --------------------------------------------------------------------------------------------- ingest_logs: the counts


def test_ingest_counts_add_up_over_workers_and_their_deaths() -> None:
    one = LogCounts(
        received=100, recovered=5, stored=60, dead=1, dropped={"queue full": 4}, held={"queue": 10, "spool": 30}
    )
    two = LogCounts(received=7, stored=7, held={"queue": 0}, lag=2.0, database="down", metadata="open", deaths=1)
    assert display.imbalance(one) == display.imbalance(two) == 0
    both = display.add_up([one, two])
    assert (both.received, both.stored, both.dropped, both.held) == (
        107,
        67,
        {"queue full": 4},
        {"queue": 10, "spool": 30},
    )
    assert (both.lag, both.database, both.metadata, both.workers, both.deaths) == (2.0, "down", "open", 2, 1)
    gone = display.counts_after_death(one)
    assert (gone.dropped, gone.handed, gone.held) == ({"queue full": 4, "worker died": 10}, 30, {})
    assert display.imbalance(gone) == 0 and (gone.workers, gone.deaths) == (0, 1)
    again = display.add_up([gone, LogCounts(recovered=30, stored=30, database="connected")])
    assert display.imbalance(again) == 0 and again.workers == 1 and again.database == "connected"
    assert display.imbalance(one._replace(stored=61)) == -1
    assert display.add_up([]) == LogCounts(workers=0)


def test_ingest_status_and_last_word() -> None:
    before = LogCounts(received=1000, stored=500)
    now = LogCounts(
        received=3000, stored=2000, dead=2, dropped={"queue full": 5, "less severe": 0},
        held={"queue": 900, "spool": 93}, kernel_drops=7, lag=0.25, database="down", metadata="open", stopping=True,
        refused=3,
    )  # fmt: skip
    assert display.status(now, before, 2.0, 61.0) == (
        "61 s · received 3,000 (1,000/s) · stored 2,000 (750/s) · queue 900 · dropped 5 (queue full 5)"
        " · kernel dropped 7 · dead 2 · spool 93 · lag 0.2 s · database down · metadata open · stopping"
    )
    assert display.last_word(now) == (
        "received 3,000 = stored 2,000 + dead 2 + dropped 5 (queue full 5) + left in the spool 93"
        " + held 900 (queue 900); the kernel dropped 7 datagrams; 3 datagrams came from addresses that are not allowed"
    )


@pytest.mark.parametrize(
    ("counts", "code", "state"),
    [
        (LogCounts(database="connected", metadata="closed"), 200, "ok"),
        (LogCounts(database="connected"), 200, "ok"),
        (LogCounts(database="down"), 200, "degraded"),
        (LogCounts(database="connected", metadata="open"), 200, "degraded"),
        (LogCounts(database="connected", workers=0), 200, "degraded"),
        (LogCounts(database="connected", stopping=True), 503, "stopping"),
        (LogCounts(database="connected", faults=1), 503, "error"),
        (LogCounts(database="connected", received=1), 503, "error"),
    ],
)
def test_ingest_health(counts: LogCounts, code: int, state: str) -> None:
    found = display.health(counts, 1)
    assert (found[0], found[1]["status"]) == (code, state)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://logs:se?cret@127.0.0.1/logs",
        "postgresql://logs:se/cret@127.0.0.1/logs",
        "postgresql://logs:se#cret@127.0.0.1/logs",
        "postgresql://logs:se[cret@127.0.0.1/logs",
        "postgresql://logs:se\u2100cret@127.0.0.1/logs",
        "postgresql://logs@127.0.0.1:cret/logs",
        "",
        "postgresql://",
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_database_url_that_cannot_be_read_is_refused_without_showing_it(
    url: str, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url if by == "environment" else "")
    arguments = ("--database", url) if by == "argument" else ()
    assert ingest_main("--listen", "127.0.0.1:0", *arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "ingest_logs.py: --database: " in said or (by == "environment" and not url and ".py: where to?" in said)
    assert "cret" not in said


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h",
        "postgres://u@h/d",
        "postgresql://u:p%2Fq@h:5432/d?sslmode=require&application_name=x",
        "postgresql://u:p@one:5432,two:5433,[::1]:5434/d",
        "postgresql://u:p@q@h/d",
        "postgresql://postgres:@/postgres?host=/tmp/a%20b&port=5432",
        "postgresql://%2Fvar%2Frun/d",
        "postgresql:///d",
    ],
)
def test_a_database_url_that_can_be_read_is_taken(url: str) -> None:
    db.check_url("--database", url, "embedded")


def test_a_stop_while_replayed_files_are_removed_keeps_the_counts(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in PostgreSQL is counted as stored, not as left in the spool."""

    async def main() -> None:
        removing, go_on = threading.Event(), threading.Event()
        unlink = log_spool.Spool._unlink

        def slowly(spool: log_spool.Spool, names: Sequence[str]) -> int:
            removing.set()
            assert go_on.wait(HANG_LIMIT)
            return unlink(spool, names)

        monkeypatch.setattr(log_spool.Spool, "_unlink", slowly)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, durable=True) as up:
            await up.ingester.database.ready()
            up.send(10)
            await asyncio.to_thread(removing.wait, HANG_LIMIT)
            up.ingester.stop()
            up.ingester.stop()
            await until_async(up.ingester.tasks.running["replayer"].done)
            go_on.set()
        counts = up.ingester.snapshot()
        assert (counts.stored, counts.held["spool"], counts.faults) == (10, 0, 0)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(10))
        await until_async(lambda: files(tmp_path) == [])

    run_task(main())


@pytest.mark.parametrize("refused", [False, True])
def test_a_disk_too_slow_for_the_stop_leaves_no_batch_both_dropped_and_spooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    monkeypatch.setattr(log_pipeline, "FORCE_LIMIT", 0.1)
    monkeypatch.setattr(sink, "PATIENCE", 0.0)

    async def main() -> None:
        writing, go_on = threading.Event(), threading.Event()
        write = log_spool.Spool._write

        def slowly(spool: log_spool.Spool, name: str, line: bytes, data: bytes) -> None:
            writing.set()
            assert go_on.wait(HANG_LIMIT)
            if refused:
                raise OSError("full")
            write(spool, name, line, data)

        monkeypatch.setattr(log_spool.Spool, "_write", slowly)
        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away) as up:
            up.send(30)
            await up.received()
            await asyncio.to_thread(writing.wait, HANG_LIMIT)
            up.ingester.stop()
            up.ingester.stop()
            await up.until(lambda counts: counts.received == 30)
            asyncio.get_running_loop().call_later(0.5, go_on.set)
        counts = up.ingester.snapshot()
        there = 0 if refused else 10
        assert (counts.held["spool"], counts.dropped["stopped"], counts.faults) == (there, 30 - there, 0)
        assert len(files(tmp_path)) == there / 10

    run_task(main())


def test_rows_set_aside_before_a_failure_to_read_are_counted(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        reads = 0
        read = log_spool.Spool._read

        def spoilt(spool: log_spool.Spool, names: Sequence[str]) -> list[Any]:
            nonlocal reads
            reads += 1
            if reads == 1:
                return [log_spool.Damaged("spoilt") for _ in names]
            if reads == 2:
                raise OSError(errno.EMFILE, "too many files")
            return read(spool, names)

        monkeypatch.setattr(log_spool.Spool, "_read", spoilt)
        monkeypatch.setattr(log_pipeline, "TOGETHER", 2)
        monkeypatch.setattr(sink, "PATIENCE", 0.0)
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none") as up:
            up.send(50)
            await up.until(lambda counts: counts.held["spool"] == 50)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            counts = await up.until(lambda counts: counts.stored == 30)
            assert (counts.recovered, counts.dropped, counts.faults) == (50, {"spool unreadable": 20}, 1)
            up.faults = 1  # the failure itself

    run_task(main())


def test_what_the_kernel_drops_until_the_socket_is_closed_is_counted(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        drops = told = 0

        def change(ingester: Ingester) -> None:
            drain = ingester.receiver.drain

            def kernel() -> int:
                nonlocal told
                told = drops if ingester.receiver._sock.fileno() >= 0 else told
                return told

            def drained() -> int:
                nonlocal drops
                drops += 7
                return drain()

            ingester._kernel_drops = kernel
            ingester.receiver.drain = drained  # type: ignore[method-assign]

        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, change=change) as up:
            up.send(10)
            await up.stored()
        assert up.ingester.snapshot().kernel_drops == drops >= 7

    run_task(main())


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And costs the others nothing."""

    async def main() -> None:
        failures, spawn = 3, asyncio.create_subprocess_exec

        async def scarce(*arguments: Any, **more: Any) -> Any:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            return await spawn(*arguments, **more)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
        monkeypatch.setattr(log_workers, "AGAIN", (0.01, 0.01))
        worker = (
            "import socket, sys; link = socket.socket(fileno=int(sys.argv[1])); link.recv(65536);"
            "link.send(b'{}\\n'); link.recv(1)"
        )
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)]
            supervisor = Supervisor([sys.executable, "-c", worker], IngestOptions(), sockets)
            running = asyncio.create_task(supervisor.run())
            await until_async(lambda: running.done() or supervisor.snapshot().workers == 2)
            assert failures < 0 and supervisor.snapshot().deaths == 3
            supervisor.stop()
            assert await running == 0

    run_task(main())


def test_services_that_the_api_refuses_do_not_keep_others_from_being_filled_in(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "FILL_SERVICES", 2)

    async def main() -> None:
        with MetadataApi() as api:
            api.mode = "refuse"
            api.answers = {f"bad-{n}": b'{"team": 7}' for n in range(5)}

            def change(ingester: Ingester) -> None:
                ingester.sealer.enricher = Enricher(api.url(), failed_for=0.05, reset=0.05)

            more: dict[str, Any] = {"metadata": api.url(), "change": change}
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                for n in range(5):
                    up.send(1, service=f"bad-{n}")
                up.send(3, service="orders-1")
                await up.stored()
                api.mode = "ok"
                await up.until(lambda counts: counts.filled == 3)
        assert await logs_ingest_pg.do("SELECT count(*) FROM logs WHERE enrichment = 'missing'") == 5

    run_task(main())


@pytest.mark.parametrize("receivers", ["1", "2"])
def test_a_spool_that_cannot_be_looked_at_is_one_line(receivers: str) -> None:
    """Not a traceback; and no worker is started again and again."""
    other = ("--database", "postgresql://nobody@127.0.0.1:1/none", "--listen", "127.0.0.1:0")
    with ingest_process(*other, "--spool", "x" * 300, "--receivers", receivers) as process:
        assert process.end() == 1
    assert "Traceback" not in "".join(process.lines)
    assert any(line.endswith("x cannot be used: File name too long") for line in process.lines)


def test_a_name_that_nobody_knows_is_said_of_http(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--database", "postgresql://nobody@127.0.0.1:1/none", "--listen", "127.0.0.1:0", "--spool", str(tmp_path))
    with ingest_process(*more, "--http", "no.such.host.invalid:80") as process:
        assert process.end() == 1
    (line,) = [line for line in process.lines if "cannot serve HTTP" in line]
    assert "Unknown error" not in line and line.startswith(
        "ingest_logs: cannot serve HTTP on no.such.host.invalid:80: "
    )


def test_demo_with_a_database_that_has_rows_already(logs_ingest_pg: PgServer) -> None:
    for rows in (300, 600):
        more = ("--demo-seconds", "0.3", "--demo-rate", "1000", "--database", logs_ingest_pg.url)
        with ingest_process("--demo", *more) as process:
            assert process.end() == 0, process.lines
        assert re.search(rf"sent +300\nrows +{rows}\n", process.output)


def test_demo_in_the_embedded_database(tmp_path: Path) -> None:
    """A copy of the program, so that the folder beside it is nobody's."""
    temporary = Path(tempfile.mkdtemp(prefix="ingest-test-"))
    try:
        folder = HERE
        for path in (*folder.glob("*.py"), *folder.glob("*/*.py")):
            if not path.name.startswith("test_"):
                copy = temporary / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
        command = [sys.executable, str(temporary / "ingest_logs.py"), "--demo", "--database", "embedded"]
        command += ["--demo-seconds", "0.3", "--demo-rate", "1000"]
        environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": ""}
        found = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=PROGRAM_LIMIT)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert found.returncode == 0, found.stderr
    assert re.search(r"sent +300\nrows +300\n", found.stdout)


def test_demo_ended_while_postgresql_starts_leaves_nothing() -> None:
    temporary = Path(tempfile.mkdtemp(prefix="ingest-test-"))
    try:
        with ingest_process("--demo", TMPDIR=str(temporary)) as process:
            process.said("starting PostgreSQL")
            wait_until(lambda: any(temporary.glob("ingest-demo-*/postgres/**/PG_VERSION")))
            assert process.stop() == 130, process.lines
        assert [*temporary.glob("ingest-demo-*")] == []
        assert not any(str(temporary) in (each.info["cwd"] or "") for each in psutil.process_iter(["cwd"]))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def test_the_spool_is_for_its_owner_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_spool_open(tmp_path / "a" / "0") as spool:
            assert spool.folder.stat().st_mode & 0o077 == 0

    asyncio.run(main())
