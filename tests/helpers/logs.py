"""Batches and a store for them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from logs import display, seal, sink, upkeep
from logs import store as log_store
from logs.display import LogCounts
from logs.intake import udp_socket
from logs.options import IngestOptions
from logs.parse import Event, Metadata
from logs.pipeline import Ingester
from runtime import postgres as db
from runtime import spool as log_spool
from tests.helpers.base import HANG_LIMIT, until_async
from tests.helpers.postgres import LET_GO, PgServer

NOON = datetime(2024, 2, 28, 12, tzinfo=UTC)


META = Metadata("payments", "production", "eu-west-1", "1.2.3")


@pytest.fixture
def logs_pg(pg: PgServer) -> PgServer:
    """Without logs in it."""
    asyncio.run(
        pg.do(
            LET_GO,
            "DROP TABLE IF EXISTS logs, log_batches, dead_letter",
            "DROP FUNCTION IF EXISTS logs_held, logs_failing CASCADE",
        )
    )
    return pg


@contextlib.asynccontextmanager
async def logs_store_open(url: str, now: datetime = NOON, **options: Any) -> AsyncIterator[log_store.Store]:
    """A store whose clock stands at ``now``; ``clock=`` for another."""
    options.setdefault("clock", now.timestamp)
    database = db.Database(url, log_store.SCHEMA, size=4)
    await database.open(HANG_LIMIT)
    try:
        assert database.state == "connected"
        yield log_store.Store(database, **options)
    finally:
        await database.close()


def logs_store_event(n: int = 0, at: datetime = NOON, **fields: Any) -> Event:
    event = Event(at, at, f"service-{n % 7}", "host", 6, f"message {n}", '{"n": 1}', None)
    return event._replace(**fields)


def logs_store_batch(
    n: int, at: datetime = NOON, found: Any = META, service: str | None = None
) -> log_spool.EncodedBatch:
    events = [logs_store_event(i, at, **({} if service is None else {"service": service})) for i in range(n)]
    return seal.seal(events, lambda name: found)


async def logs_store_counts(server: PgServer) -> tuple[int, int, int]:
    """Rows, batches, dead letters."""
    tables = ("logs", "log_batches", "dead_letter")
    rows, batches, dead = [await server.do(f"SELECT count(*) FROM {table}") for table in tables]
    return rows, batches, dead


async def logs_store_days(server: PgServer) -> list[str]:
    names = await server.do(
        "SELECT coalesce(array_agg(relid::text), '{}') FROM pg_partition_tree('logs') WHERE isleaf"
        " AND relid <> 'logs'::regclass"
    )
    return sorted(name.removeprefix("logs_") for name in names)


@contextlib.asynccontextmanager
async def logs_spool_open(folder: Path, **options: Any) -> AsyncIterator[log_spool.Spool]:
    spool = log_spool.Spool(folder, **options)
    spool.open()
    try:
        yield spool
    finally:
        await spool.close()
        assert spool._lock_file is None


@pytest.fixture
def logs_ingest_pg(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> PgServer:
    """The server without tables of logs; what is waited for comes quickly."""
    asyncio.run(pg.do(LET_GO, "DROP TABLE IF EXISTS logs, log_batches, dead_letter CASCADE"))
    monkeypatch.setattr(upkeep, "FILL_EVERY", 0.02)
    monkeypatch.setattr(sink, "DISTRUST", 0.02)
    return pg


SERIALS = r"SELECT array_agg(substring(message from 'serial=(\d+)')::int) FROM logs"


class LogsIngestUp:
    """An ingester that runs, and a socket to send to it."""

    def __init__(self, ingester: Ingester, sender: socket.socket, address: tuple[str, int]) -> None:
        self.ingester, self._sender, self.address = ingester, sender, address
        self.sent = 0
        self.snapshots = 0
        self.code: int | None = None
        self.faults = 0
        """How many are expected."""

    def send(self, count: int, severity: int = 6, service: str = "svc") -> None:
        for n in range(self.sent, self.sent + count):
            self._sender.send(f"<{8 + severity}>1 - host {service} - - - serial={n}".encode())
        self.sent += count

    async def until(self, predicate: Callable[[LogCounts], bool]) -> LogCounts:
        await until_async(lambda: predicate(self.ingester.snapshot()))
        return self.ingester.snapshot()

    async def received(self) -> LogCounts:
        return await self.until(lambda counts: counts.received == self.sent)

    async def stored(self) -> LogCounts:
        return await self.until(lambda counts: counts.stored == self.sent + counts.recovered)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """The snapshot balances at each turn of the loop, or it is a fault of the ingester's."""
        selector = cast(Any, asyncio.get_running_loop())._selector
        select = selector.select

        def look(timeout: float | None) -> Any:
            self.ingester.snapshot()
            self.snapshots += 1
            return select(timeout)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selector, "select", look)
            yield


@contextlib.asynccontextmanager
async def logs_ingest_up(
    folder: Path, database: str | None, *, change: Callable[[Ingester], object] = lambda _: None, **more: Any
) -> AsyncIterator[LogsIngestUp]:
    """At the end it stops, has lost nothing that it does not own up to, and leaves nothing behind."""
    before = asyncio.all_tasks()
    sock = udp_socket("127.0.0.1", 0, receive_buffer=4 << 20)[0]
    options = IngestOptions(
        **{
            "spool": str(folder / "spool"),
            "database": database,
            "batch": 10,
            "flush": 0.05,
            "stop_limit": HANG_LIMIT / 2,
            **more,
        }
    )
    ingester = Ingester(options, sock)
    change(ingester)
    address = sock.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        up = LogsIngestUp(ingester, sender, address)
        running = asyncio.create_task(ingester.run())
        with up.watched():
            try:
                yield up
            finally:
                if not ingester.snapshot().stopping:
                    ingester.stop()
                async with asyncio.timeout(HANG_LIMIT):
                    up.code = await running
    counts = ingester.snapshot()
    assert display.imbalance(counts) == 0 and counts.faults == up.faults
    assert {place: n for place, n in counts.held.items() if n and place != "spool"} == {}
    assert counts.received == up.sent or not up.sent
    assert up.code == (1 if counts.dropped.get("stopped") else 0)
    await until_async(lambda: asyncio.all_tasks() <= before)
    assert sock.fileno() == -1 and ingester.database.state == "none"


async def logs_ingest_serials(server: PgServer) -> list[int]:
    return sorted(await server.do(SERIALS) or [])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.batch"))
