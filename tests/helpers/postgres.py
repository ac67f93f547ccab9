"""A PostgreSQL for the tests, and a proxy before it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from api.history import UPSTREAM_RESULTS, History, Result
from runtime import postgres as db
from runtime import writer as writer_module
from runtime.embedded import Account, Embedded, find_programs
from tests.helpers.base import HANG_LIMIT, free_port, until_async, wait_until


class PgServer:
    """PostgreSQL of the wheel in a folder of its own, on loopback: a child of this process, to be done anything to."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg-test-"))
        self.fresh = self.folder / "fresh"  # what initdb made, for a server of another test
        embedded, password = Embedded(self.fresh), secrets.token_hex()
        try:  # few iterations: many connections are made
            asyncio.run(
                pg_do(embedded.start(), "SET scram_iterations = 1", f"ALTER USER postgres PASSWORD '{password}'")
            )
        finally:
            embedded.stop()
        owner = self.fresh.stat()
        self.account = Account(owner.st_uid, owner.st_gid)
        self.bin = find_programs(None, self.account)
        self.data = self.folder / "data"
        self.copy_fresh(self.data)
        (self.data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        self.port = free_port()
        self.url = f"postgresql://postgres:{password}@127.0.0.1:{self.port}/postgres"
        self.process: subprocess.Popen[bytes] | None = None
        self.options: tuple[str, ...] = ()

    def twin(self, name: str, source: Path, *options: str) -> PgServer:
        """Another one, which is not started, of the data in ``source``, and with these options besides."""
        other = copy.copy(self)
        other.data, other.process, other.options = self.folder / name, None, options
        shutil.rmtree(other.data, ignore_errors=True)
        self.copy_of(source, other.data)
        (other.data / "pg_hba.conf").write_text("host all,replication all 127.0.0.1/32 trust\n")
        other.port = free_port()
        other.url = f"postgresql://postgres@127.0.0.1:{other.port}/postgres"
        return other

    def copy_fresh(self, folder: Path) -> None:
        self.copy_of(self.fresh, folder)

    def copy_of(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, *self.account)

    def start(self) -> None:
        """Start, as often as it takes: after a kill, the backends that are left keep the next out for a while."""
        here = str(self.data) if os.geteuid() else "/proc/self/cwd"  # whoever it is then need not be able to go there
        command = [
            str(self.bin / "postgres"), "-D", here, "-h", "127.0.0.1", "-p", str(self.port), "-k", "",
            "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "shared_buffers=16MB", "-c", "max_connections=40",
            "-c", "wal_level=minimal", "-c", "max_wal_senders=0", "-c", "autovacuum=off", "-c", "io_method=sync",
            *self.options,
        ]  # fmt: skip
        pid_file = self.data / "postmaster.pid"

        def ready() -> bool:
            if self.process is None or self.process.poll() is not None:
                options = {"cwd": self.data, **self.account.options()}
                silent = subprocess.DEVNULL
                self.process = subprocess.Popen(command, stdout=silent, stderr=silent, **options)
            with contextlib.suppress(OSError):
                lines = pid_file.read_text().split()
                return lines[:1] == [str(self.process.pid)] and lines[-1] in ("ready", "standby")
            return False

        wait_until(ready)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: fast; SIGQUIT: immediate; SIGKILL: of the postmaster only."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(HANG_LIMIT)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """All its processes stand still; the kernel goes on to accept for them."""
        assert self.process is not None
        postmaster = psutil.Process(self.process.pid)
        postmaster.suspend()
        processes = [postmaster, *postmaster.children()]
        for process in processes[1:]:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    async def do(self, *statements: str) -> Any:
        """Execute; the value of the last statement."""
        return await pg_do(self.url, *statements)


async def pg_do(url: str, *statements: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        value = None
        for statement in statements:
            value = await connection.fetchval(statement)
        return value
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def refusing(server: PgServer, table: str, code: str, rows: int = 0) -> AsyncIterator[None]:
    """Whatever enters more than ``rows`` rows into ``table`` at a time is refused with the error ``code``."""
    name = f"refuse_{table}"
    make = (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF (SELECT count(*) FROM entered) > {rows} THEN RAISE EXCEPTION 'refused' USING ERRCODE = '{code}'; END IF;"
        " RETURN NULL; END $$",
        f"CREATE TRIGGER {name} AFTER INSERT ON {table} REFERENCING NEW TABLE AS entered"
        f" FOR EACH STATEMENT EXECUTE FUNCTION {name}()",
    )
    await server.do(*make)
    try:
        yield
    finally:
        await server.do(f"DROP FUNCTION {name} CASCADE")


@contextlib.contextmanager
def bouncer(server: PgServer) -> Iterator[str]:
    """The URL of a PgBouncer in transaction mode, which has two connections to ``server``."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("needs pgbouncer: apt-get install pgbouncer")
    parts = urlsplit(server.url)
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="bouncer-test-"))
    inner = f"host=127.0.0.1 port={server.port} user={parts.username} password={parts.password}"
    (folder / "ini").write_text(
        f"[databases]\n* = {inner}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\n"
    )
    for path in (folder, folder / "ini"):
        os.chown(path, *server.account)
    options = {"cwd": folder, **server.account.options()}
    silent = subprocess.DEVNULL
    process = subprocess.Popen([program, folder / "ini"], stdout=silent, stderr=silent, **options)

    def ready() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_until(ready)
        yield f"postgresql://anybody@127.0.0.1:{port}/postgres"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


LET_GO = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
)
"""Whoever holds a lock, left by a test that failed: the next one's DROP would wait for it without end."""


@pytest.fixture(scope="session")
def pg_server() -> Iterator[PgServer]:
    server = PgServer()
    try:
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop(signal.SIGQUIT)
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture
def pg(pg_server: PgServer, monkeypatch: pytest.MonkeyPatch) -> PgServer:
    """The server, which runs and holds nothing; checks come quickly, and wait for it however busy the machine is."""
    assert pg_server.process is not None
    if pg_server.process.poll() is not None:
        pg_server.start()
    asyncio.run(pg_server.do("DROP TABLE IF EXISTS upstream_results, invalidations"))
    monkeypatch.setattr(db, "CHECK_EVERY", 0.05)
    monkeypatch.setattr(db, "CHECK_LIMIT", HANG_LIMIT)
    monkeypatch.setattr(db, "CLOSE_LIMIT", HANG_LIMIT)
    monkeypatch.setattr(db, "BACK_OFF", AT_ONCE)
    monkeypatch.setattr(writer_module, "BACK_OFF", AT_ONCE)
    return pg_server


@pytest.fixture
def impatient(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server that does not answer."""
    monkeypatch.setattr(db, "CHECK_LIMIT", 1.0)
    monkeypatch.setattr(db, "CLOSE_LIMIT", 0.2)


AT_ONCE = 0.02, 0.02


@contextlib.asynccontextmanager
async def pg_open(url: str, size: int = 4) -> AsyncIterator[db.Database]:
    """A database, connected; at the end nothing of it is left."""
    before = asyncio.all_tasks()
    database = db.Database(url, UPSTREAM_RESULTS, size=size)
    try:
        await database.open(HANG_LIMIT)
        assert database.state == "connected"
        yield database
    finally:
        await database.close()
    await database.close()
    await until_async(lambda: asyncio.all_tasks() <= before)
    assert database.stats().state == "none"


@contextlib.asynccontextmanager
async def pg_history(url: str, **options: Any) -> AsyncIterator[History]:
    async with pg_open(url) as database:
        history = History(database)
        if options:
            history.writer = writer_module.Writer(database, history._insert, **options)
        writing = asyncio.create_task(history.writer.run())
        yield history
        await history.writer.close(writing, HANG_LIMIT)
        assert writing.exception() is None


def pg_result(n: int, source: str = "a", payload: str | None = "{}", status: str = "ok", **parameters: str) -> Result:
    """The ``n``-th result, a second after the one before, an hour ago."""
    return Result(source, json.dumps(parameters), BEGUN + timedelta(seconds=n), n / 1000, status, payload)


BEGUN = datetime.now(UTC) - timedelta(hours=1)


class Proxy:
    """Between a client and the server. ``cut`` says of what the server sent whether to cut the connection instead."""

    def __init__(self, port: int, cut: Callable[[bytes], bool]) -> None:
        self.port, self.cut, self.cuts = port, cut, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, watched: bool) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    if watched and self.cut(data):
                        self.cuts += 1
                        break
                    target.write(data)
                    await target.drain()
            for end in (writer, inner_writer):
                end.close()

        await asyncio.gather(pump(reader, inner_writer, False), pump(inner_reader, writer, True))
        for end in (writer, inner_writer):
            with contextlib.suppress(ConnectionError):
                await end.wait_closed()
