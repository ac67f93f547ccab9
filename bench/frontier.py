"""`bench frontier`: the tables of a shared crawl under load: how long a claim takes, and how much one PostgreSQL bears.

An embedded server in a temporary folder, with its usual settings, is filled with URLs that wait, in an order that
has nothing to do with their hosts. Measured, at a tenth of the rows and at all of them:

- ``claim``: the statement that claims 100 hosts, and its commit: milliseconds, p50 and p99;
- ``batch``: a worker's whole transaction of crawl/tables.py: it claims 100 hosts and reads up to 10 URLs of each;
- then so many workers at a time, each a process of its own: they claim, and finish what they claimed with rows and
  found links; hosts claimed and URLs finished per second, all together;
- what that left behind: dead rows, and the size of the index that claims look at, with autovacuum as it comes.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure import Row, command, table

if TYPE_CHECKING:
    import asyncpg

FILL = """
INSERT INTO crawl_queue (host, url, depth, kind, private)
SELECT 'h' || i * 7919::bigint % {hosts} || '.example',
    'https://h' || i * 7919::bigint % {hosts} || '.example/2030/01/some-words-of-a-long-title-' || i, 3, 'page', false
FROM generate_series({first}::bigint, {last}::bigint - 1) AS i
"""
KEYS = "INSERT INTO crawl_seen SELECT md5(i::text)::uuid FROM generate_series({first}::bigint, {last}::bigint - 1) AS i"
HOSTS = """
INSERT INTO crawl_hosts (host, due, next_at, spacing, waiting)
SELECT 'h' || i || '.example', at, at, 0.5, 0
FROM (SELECT i, now() - random() * interval '1 hour' AS at FROM generate_series(0, {hosts} - 1) AS i) AS h
"""


async def fill(connection: asyncpg.Connection[Any], first: int, last: int, hosts: int) -> None:
    """Add rows ``first`` to ``last``. The indexes are built afterwards, which is faster."""
    for name in ("crawl_queue", "crawl_seen"):
        await connection.execute(f"ALTER TABLE {name} DROP CONSTRAINT {name}_pkey")
    await connection.execute("SET maintenance_work_mem = '512MB'; SET synchronous_commit = off")
    if not first:
        await connection.execute(HOSTS.format(hosts=hosts), timeout=600)
    for sql in (FILL, KEYS):
        await connection.execute(sql.format(first=first, last=last, hosts=hosts), timeout=900)
    for sql in ("crawl_queue ADD PRIMARY KEY (host, id)", "crawl_seen ADD PRIMARY KEY (hash)"):
        await connection.execute(f"ALTER TABLE {sql}", timeout=900)
    await connection.execute(f"UPDATE crawl_hosts SET waiting = {last // hosts}")
    await connection.execute("VACUUM ANALYZE crawl_hosts, crawl_queue, crawl_seen", timeout=900)
    await connection.execute("CHECKPOINT; RESET synchronous_commit", timeout=300)


def at(times: list[float], share: float) -> float:
    return 1000 * sorted(times)[int(share * (len(times) - 1))]


async def claims(url: str, count: int) -> list[float]:
    """Seconds of claims of 100 hosts, each given back untimed."""
    import asyncpg

    from crawl.tables import CLAIM

    connection = await asyncpg.connect(url)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        async with connection.transaction():
            claimed = await connection.fetch(CLAIM, 0, 100, 0.5, False)
        times.append(time.perf_counter() - started)
        await connection.execute(
            "UPDATE crawl_hosts SET owner = NULL, due = now() WHERE host = ANY($1)", [row[0] for row in claimed]
        )
        if len(claimed) < 100:
            raise SystemExit("bench: frontier: too few hosts are due; more of them are needed")
    await connection.close()
    return times


async def _work(url: str, seconds: float, finishes: bool) -> tuple[int, int, list[float]]:
    from crawl.model import CrawlResult
    from crawl.sync import Done, Link, Note, SyncBatch, hashed
    from crawl.tables import PgStore
    from runtime.postgres import Database

    database = Database(url, size=1)
    await database.open(10)
    store, rng = PgStore(database, "bench"), random.Random()
    token = (await store.sync(SyncBatch(None, 1, 60.0))).token
    hosts = urls = 0
    times: list[float] = []
    batch = SyncBatch(token, 1, 60.0, claim=100, limit=10)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        answer = await store.sync(batch)
        times.append(time.perf_counter() - started)
        hosts += len(answer.hosts)
        urls += len(batch.done)
        batch = SyncBatch(token, batch.serial + 1, 60.0, claim=100, limit=10)
        batch.notes = {host: Note(0.5, 0.5, True) for host, _ in answer.hosts}
        if finishes:
            for one in answer.urls:
                row = CrawlResult(one.url, 200, "a title", 500, [], None, "2030-01-01T00:00:00Z", 20.0)
                batch.done.append(Done(one.host, one.id, one.url, row))
                found = f"{one.url}/{rng.random()}"
                batch.links.append(Link(hashed(found), one.host, found, found, 4))
    batch.claim = 0
    await store.sync(batch)
    await database.close()
    return hosts, urls, times


def work(url: str, seconds: float, finishes: bool = True) -> tuple[int, int, list[float]]:
    """A worker: (hosts claimed, URLs finished, seconds of each batch)."""
    return asyncio.run(_work(url, seconds, finishes))


async def _behind(url: str) -> Row:
    import asyncpg

    connection = await asyncpg.connect(url)
    sizes = await connection.fetchrow(
        "SELECT pg_relation_size('crawl_hosts_due'), (pg_total_relation_size('crawl_queue') / 1e6)::float8,"
        " (pg_total_relation_size('crawl_seen') / 1e6)::float8, (SELECT sum(n_dead_tup) FROM pg_stat_user_tables"
        " WHERE relname IN ('crawl_hosts', 'crawl_queue'))"
    )
    await connection.close()
    assert sizes is not None
    return {"due index KB": sizes[0] / 1000, "queue MB": sizes[1], "seen MB": sizes[2], "dead rows": int(sizes[3] or 0)}


async def _fill(url: str, first: int, last: int, hosts: int) -> None:
    import asyncpg

    from crawl.tables import SCHEMA

    connection = await asyncpg.connect(url)
    if not first:
        await connection.execute(SCHEMA)
    await fill(connection, first, last, hosts)
    await connection.close()


@command(
    "the tables of a shared crawl: what a claim takes at 1 and 10 million URLs, and what 1 to 8 workers get done",
    "frontier",
    "frontier --rows 100000 --hosts 10000 --seconds 1",
    rows=(10_000_000, "URLs that wait; first a tenth of them"),
    hosts=(100_000, "hosts"),
    seconds=(5, "of each run of the workers"),
    claims=(300, "claims timed"),
)
def frontier(args: argparse.Namespace) -> list[Row]:
    from runtime.embedded import Embedded

    folder = Path(tempfile.mkdtemp(prefix="bench-frontier-"))
    server = Embedded(folder / "postgres")
    results: list[Row] = []
    try:
        url = server.start()
        spawn = multiprocessing.get_context("spawn")
        filled = 0
        for rows in (args.rows // 10, args.rows):
            started = time.perf_counter()
            asyncio.run(_fill(url, filled, rows, args.hosts))
            filled, seconds = rows, time.perf_counter() - started
            times = asyncio.run(claims(url, args.claims))
            _, _, batches = work(url, args.seconds, finishes=False)
            more = {"batch p50 ms": at(batches, 0.5), "batch p99 ms": at(batches, 0.99), "fill s": seconds}
            claim = {"claim p50 ms": at(times, 0.5), "claim p99 ms": at(times, 0.99)}
            first = results[0]["claim p50 ms"] if results else claim["claim p50 ms"]
            results.append({"": f"{rows:,} rows", "x a tenth": claim["claim p50 ms"] / first} | claim | more)
        alone = 0.0
        for workers in (1, 2, 4, 8):
            with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
                parts = list(pool.map(work, [url] * workers, [args.seconds] * workers))
            hosts = sum(part[0] for part in parts) / args.seconds
            urls = sum(part[1] for part in parts) / args.seconds
            times = [one for part in parts for one in part[2]]
            counts = {"hosts/s": hosts, "URLs/s": urls, "batch p50 ms": at(times, 0.5), "batch p99 ms": at(times, 0.99)}
            if workers == 1:
                alone = urls
            results.append({"": f"{workers} worker{'s' * (workers > 1)}", "x 1 worker": urls / alone} | counts)
        times = asyncio.run(claims(url, args.claims))
        after = {"claim p50 ms": at(times, 0.5), "claim p99 ms": at(times, 0.99)}
        results.append({"": "afterwards"} | after | asyncio.run(_behind(url)))
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    for columns in dict.fromkeys(tuple(row) for row in results):
        print(table(row for row in results if tuple(row) == columns), end="\n\n")
    return results
