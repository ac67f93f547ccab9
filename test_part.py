"""What a second look at ingest_logs found."""

# ruff: noqa: F811

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import ingest_logs
import log_pipeline
import log_spool
import log_workers
from log_enrich import Enricher
from log_pipeline import Ingester
from log_workers import Supervisor
from primitives import RetryPolicy
from sandbox_logs import MetadataApi
from test_all import (  # noqa: F401  -- fixtures among them
    LOGS_STORE_NOON,
    PgServer,
    logs_ingest_files,
    logs_ingest_main,
    logs_ingest_pg,
    logs_ingest_process,
    logs_ingest_serials,
    logs_ingest_up,
    logs_pg,
    logs_spool_batch,
    logs_spool_open,
    logs_store_batch,
    logs_store_event,
    logs_store_open,
    pg,
    pg_module,
    prim_run,
    prim_until,
    prim_until_async,
)


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
def test_logs_review_a_database_url_that_cannot_be_read_is_refused_without_showing_it(
    url: str, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url if by == "environment" else "")
    arguments = ("--database", url) if by == "argument" else ()
    assert logs_ingest_main("--listen", "127.0.0.1:0", *arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error: --database: " in said or (by == "environment" and not url and "error: where to?" in said)
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
def test_logs_review_a_database_url_that_can_be_read_is_taken(url: str) -> None:
    ingest_logs.check_database(url)


def test_logs_review_a_stop_while_replayed_files_are_removed_keeps_the_counts(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in PostgreSQL is counted as stored, not as left in the spool."""

    async def main() -> None:
        removing, go_on = threading.Event(), threading.Event()
        unlink = log_spool.Spool._unlink

        def slowly(spool: log_spool.Spool, names: Sequence[str]) -> int:
            removing.set()
            assert go_on.wait(10.0)
            return unlink(spool, names)

        monkeypatch.setattr(log_spool.Spool, "_unlink", slowly)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, durable=True) as up:
            await up.ingester.database.ready()
            up.send(10)
            await asyncio.to_thread(removing.wait, 10.0)
            up.ingester.stop()
            up.ingester.stop()
            await asyncio.sleep(0.2)
            go_on.set()
        counts = up.ingester.snapshot()
        assert (counts.stored, counts.held["spool"], counts.faults) == (10, 0, 0)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(10)) and logs_ingest_files(tmp_path) == []

    prim_run(main())


@pytest.mark.parametrize("refused", [False, True])
def test_logs_review_a_disk_too_slow_for_the_stop_leaves_no_batch_both_dropped_and_spooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    monkeypatch.setattr(log_pipeline, "FORCE_LIMIT", 0.1)
    monkeypatch.setattr(log_pipeline, "PATIENCE", 0.0)

    async def main() -> None:
        writing, go_on = threading.Event(), threading.Event()
        write = log_spool.Spool._write

        def slowly(spool: log_spool.Spool, name: str, line: bytes, data: bytes) -> None:
            writing.set()
            assert go_on.wait(10.0)
            if refused:
                raise OSError("full")
            write(spool, name, line, data)

        monkeypatch.setattr(log_spool.Spool, "_write", slowly)
        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away) as up:
            up.send(30)
            await up.received()
            await asyncio.to_thread(writing.wait, 10.0)
            up.ingester.stop()
            up.ingester.stop()
            await up.until(lambda counts: counts.received == 30)
            asyncio.get_running_loop().call_later(0.5, go_on.set)
        counts = up.ingester.snapshot()
        there = 0 if refused else 10
        assert (counts.held["spool"], counts.dropped["stopped"], counts.faults) == (there, 30 - there, 0)
        assert len(logs_ingest_files(tmp_path)) == there / 10

    prim_run(main())


def test_logs_review_rows_set_aside_before_a_failure_to_read_are_counted(
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
        monkeypatch.setattr(log_pipeline, "PATIENCE", 0.0)
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none") as up:
            up.send(50)
            await up.until(lambda counts: counts.held["spool"] == 50)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            counts = await up.until(lambda counts: counts.stored == 30)
            assert (counts.recovered, counts.dropped, counts.faults) == (50, {"spool unreadable": 20}, 1)
            up.faults = 1  # the failure itself

    prim_run(main())


def test_logs_review_what_the_kernel_drops_until_the_socket_is_closed_is_counted(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
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

    prim_run(main())


def test_logs_review_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
        monkeypatch.setattr(
            log_workers, "AGAIN", RetryPolicy(attempts=sys.maxsize, base=0.01, cap=0.01, total=math.inf)
        )
        worker = (
            "import socket, sys; link = socket.socket(fileno=int(sys.argv[1])); link.recv(65536);"
            "link.send(b'{}\\n'); link.recv(1)"
        )
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)]
            supervisor = Supervisor([sys.executable, "-c", worker], lambda number: {}, sockets, stop_limit=5.0)
            running = asyncio.create_task(supervisor.run())
            await prim_until_async(lambda: running.done() or supervisor.snapshot().workers == 2)
            assert failures < 0 and supervisor.snapshot().deaths == 3
            supervisor.stop()
            assert await running == 0

    prim_run(main())


def test_logs_review_services_that_the_api_refuses_do_not_keep_others_from_being_filled_in(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_pipeline, "FILL_SERVICES", 2)

    async def main() -> None:
        with MetadataApi() as api:
            api.mode = "refuse"
            api.answers = {f"bad-{n}": b'{"team": 7}' for n in range(5)}

            def change(ingester: Ingester) -> None:
                ingester.enricher = Enricher(api.url(), failed_for=0.05, reset=0.05)

            more: dict[str, Any] = {"metadata": api.url(), "change": change}
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                for n in range(5):
                    up.send(1, service=f"bad-{n}")
                up.send(3, service="orders-1")
                await up.stored()
                api.mode = "ok"
                await up.until(lambda counts: counts.filled == 3)
        assert await logs_ingest_pg.do("SELECT count(*) FROM logs WHERE enrichment = 'missing'") == 5

    prim_run(main())


@pytest.mark.parametrize("receivers", ["1", "2"])
def test_logs_review_a_spool_that_cannot_be_looked_at_is_one_line(receivers: str) -> None:
    """Not a traceback; and no worker is started again and again."""
    other = ("--database", "postgresql://nobody@127.0.0.1:1/none", "--listen", "127.0.0.1:0")
    with logs_ingest_process(*other, "--spool", "x" * 300, "--receivers", receivers) as process:
        assert process.end() == 1
    assert "Traceback" not in "".join(process.lines)
    assert any(line.endswith("x cannot be used: File name too long") for line in process.lines)


def test_logs_review_a_name_that_nobody_knows_is_said_of_http(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--database", "postgresql://nobody@127.0.0.1:1/none", "--listen", "127.0.0.1:0", "--spool", str(tmp_path))
    with logs_ingest_process(*more, "--http", "no.such.host.invalid:80") as process:
        assert process.end() == 1
    (line,) = [line for line in process.lines if "cannot serve HTTP" in line]
    assert "Unknown error" not in line and line.startswith(
        "ingest_logs: cannot serve HTTP on no.such.host.invalid:80: "
    )


def test_logs_review_demo_with_a_database_that_has_rows_already(logs_ingest_pg: PgServer) -> None:
    for rows in (300, 600):
        more = ("--demo-seconds", "0.3", "--demo-rate", "1000", "--database", logs_ingest_pg.url)
        with logs_ingest_process("--demo", *more) as process:
            assert process.end() == 0, process.lines
        assert re.search(rf"sent +300\nrows +{rows}\n", process.output)


def test_logs_review_demo_in_the_embedded_database(tmp_path: Path) -> None:
    """A copy of the program, so that the folder beside it is nobody's."""
    temporary = Path(tempfile.mkdtemp(prefix="ingest-test-"))
    temporary.chmod(0o755)
    try:
        folder = Path(ingest_logs.__file__).parent
        for path in folder.glob("*.py"):
            if not path.name.startswith("test_"):
                shutil.copy(path, temporary)
        command = [sys.executable, str(temporary / "ingest_logs.py"), "--demo", "--database", "embedded"]
        command += ["--demo-seconds", "0.3", "--demo-rate", "1000"]
        environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": ""}
        found = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert found.returncode == 0, found.stderr
    assert re.search(r"sent +300\nrows +300\n", found.stdout)


def test_logs_review_demo_ended_while_postgresql_starts_leaves_nothing() -> None:
    temporary = Path(tempfile.mkdtemp(prefix="ingest-test-"))
    temporary.chmod(0o755)
    try:
        with logs_ingest_process("--demo", TMPDIR=str(temporary)) as process:
            process.said("starting PostgreSQL")
            prim_until(lambda: any(temporary.glob("ingest-demo-*/postgres/PG_VERSION")))
            assert process.stop() == 130, process.lines
        assert [*temporary.glob("ingest-demo-*")] == []
        commands = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
        assert not any(str(temporary) in each for each in commands)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def test_logs_review_the_spool_is_for_its_owner_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_spool_open(tmp_path / "a" / "0") as spool:
            assert spool.folder.stat().st_mode & 0o077 == 0

    asyncio.run(main())
