"""crawl/lease.py, tables.py: hosts leased from PostgreSQL, by several workers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest

import crawl_async
from crawl import cli as crawl_cli
from crawl import shared_crawl, sync
from crawl import tables as ct
from crawl.errors import FetchError
from crawl.frontier import Frontier
from crawl.hosts import Question
from crawl.model import Options, Request, Response, ScrapeResult
from runtime import postgres as db
from sandbox.sites import Sandbox
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, until_async
from tests.helpers.postgres import LET_GO, PgServer, Proxy, bouncer, refusing
from tests.helpers.web import AnyPage, Web, shares_client


@pytest.fixture
def shared_pg(pg: PgServer) -> PgServer:
    """Without a crawl in it."""
    tables = ["settings", "workers", "hosts", "seen", "queue", "results", "robots", "scope", "server"]
    asyncio.run(pg.do(LET_GO, f"DROP TABLE IF EXISTS {', '.join('crawl_' + name for name in tables)}"))
    return pg


@contextlib.asynccontextmanager
async def shared_store(server: PgServer) -> AsyncIterator[ct.PgStore]:
    database = db.Database(server.url, ct.SCHEMA, size=4)
    await database.open(HANG_LIMIT)
    try:
        yield ct.PgStore(database)
    finally:
        await database.close()


def link(host: str, path: str = "/") -> sync.Link:
    url = f"http://{host}{path}"
    return sync.Link(sync.hashed(url), host, url, url)


def shared_row(url: str) -> ScrapeResult:
    return ScrapeResult(url, 200, "a \0 title", 1, [], None, "2030-01-01T00:00:00Z", 1.0)


def shared_done(queued: sync.Queued) -> sync.Done:
    return sync.Done(queued.host, queued.id, queued.url, shared_row(queued.url))


def shared_test(check: Callable[[PgServer, ct.PgStore], Coroutine[Any, Any, None]]) -> Callable[[PgServer], None]:
    async def run(server: PgServer) -> None:
        async with shared_store(server) as store:
            await check(server, store)

    def test(shared_pg: PgServer) -> None:
        asyncio.run(run(shared_pg))

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


ENDED = "UPDATE crawl_workers SET renewed_at = now() - '1 s'::interval, lease_until = now() - '1 s'::interval"
"""All leases have."""


@shared_test
async def test_claims_skip_what_is_leased_or_locked(server: PgServer, store: ct.PgStore) -> None:
    hosts = [f"h{n}" for n in range(4)]
    links = [link(host, path) for host in hosts for path in ("/", "/a")]
    first = await store.sync(sync.SyncBatch(None, 1, 30.0, links=[*links, *links]))
    second = await store.sync(sync.SyncBatch(None, 1, 30.0, links=links))
    assert await server.do("SELECT count(*) FROM crawl_queue") == 8, "each once, whoever finds it"
    mine = await store.sync(sync.SyncBatch(first.token, 1, 30.0, claim=2, limit=1))
    assert len(mine.hosts) == 2 and {one.host for one in mine.urls} == {host for host, _ in mine.hosts}
    assert len(mine.urls) == 2
    left = sorted({*hosts} - {host for host, _ in mine.hosts})
    async with store._database.connection() as other, other.transaction():
        await other.execute("SELECT FROM crawl_hosts WHERE host = $1 FOR UPDATE", left[0])
        theirs = await store.sync(sync.SyncBatch(second.token, 1, 30.0, claim=9))
        assert [host for host, _ in theirs.hosts] == left[1:]
    again = await store.sync(
        sync.SyncBatch(second.token, 2, 30.0, claim=9, held=left[1:], notes={left[1]: sync.Note(0.0, 2.0, True)})
    )
    assert {host for host, _ in again.hosts} == {left[0], left[1]}, "what is no longer locked, and what was given back"


@shared_test
async def test_host_goes_back_with_its_next_time(server: PgServer, store: ct.PgStore) -> None:
    first = await store.sync(sync.SyncBatch(None, 1, 30.0, links=[link("a"), link("b")]))
    held = await store.sync(sync.SyncBatch(first.token, 1, 30.0, claim=2))
    assert dict(held.hosts) == {"a": None, "b": None}, "never sent anything"
    notes = {"a": sync.Note(0.7, 2.0, True), "b": sync.Note(500.0, 2.0, True)}
    answer = await store.sync(sync.SyncBatch(first.token, 2, 30.0, claim=2, notes=notes))
    (found,) = answer.hosts
    assert found[0] == "a" and found[1] is not None and 0.6 < found[1] <= 0.7, "b has to wait"


@shared_test
async def test_late_worker_is_fenced_off(server: PgServer, store: ct.PgStore) -> None:
    late = await store.sync(sync.SyncBatch(None, 1, 30.0, links=[link("a")]))
    held = await store.sync(sync.SyncBatch(late.token, 1, 30.0, claim=1, spacing=100.0))
    await server.do(ENDED)
    next_one = await store.sync(sync.SyncBatch(None, 1, 30.0))
    assert next_one.dead and not next_one.finished
    await store.reap()
    await server.do("UPDATE crawl_hosts SET due = now()")
    claimed = await store.sync(sync.SyncBatch(next_one.token, 1, 30.0, claim=1))
    ((host, wait),) = claimed.hosts
    assert host == "a" and wait is not None and 95 < wait < 100, "one interval after the end of the lease"
    done = [shared_done(held.urls[0])]
    assert (await store.sync(sync.SyncBatch(late.token, 2, 30.0, done=done))).token is None
    assert await server.do("SELECT count(*) FROM crawl_results") == 0
    ended = await store.sync(sync.SyncBatch(next_one.token, 2, 30.0, done=done, held=["a"]))
    assert [row.url for row in ended.stored] == ["http://a/"] and ended.finished
    assert await server.do("SELECT row->>'title' FROM crawl_results") == "a \ufffd title"


class Stuck(ct.PgStore):
    """Stands still in its transaction, until it is let go."""

    def __init__(self, database: db.Database) -> None:
        super().__init__(database)
        self.there, self.let_go = asyncio.Event(), asyncio.Event()

    async def _read(self, *about: Any) -> None:
        self.there.set()
        await self.let_go.wait()
        await super()._read(*about)


@shared_test
async def test_worker_that_stands_still_in_its_transaction_does_not_keep_its_hosts(
    server: PgServer, store: ct.PgStore
) -> None:
    first = await store.sync(sync.SyncBatch(None, 1, 2.0, links=[link("a")]))
    held = await store.sync(sync.SyncBatch(first.token, 1, 2.0, claim=1))
    stuck = Stuck(store._database)
    batch = sync.SyncBatch(first.token, 2, 2.0, held=["a"], done=[shared_done(held.urls[0])], links=[link("b")])
    sent = asyncio.create_task(stuck.sync(batch))
    await stuck.there.wait()
    await server.do(ENDED)
    await store.reap()
    other = await store.sync(sync.SyncBatch(None, 1, 2.0, links=[link("b")]))
    claimed = await store.sync(sync.SyncBatch(other.token, 1, 2.0, claim=9))
    assert sorted(host for host, _ in claimed.hosts) == ["a", "b"], "and what it had found is for others to find"
    stuck.let_go.set()
    with pytest.raises((db.Unavailable, *db.PASSING)):
        await sent
    assert (await store.sync(batch)).token is None


@shared_test
async def test_robots_txt_that_could_not_be_read_is_believed_for_a_while_only(
    server: PgServer, store: ct.PgStore
) -> None:
    crawl = shared_crawl.SharedCrawl(Options(depth=1), server.url)
    for path, outcome in ("a", Response(503, {}, b"")), ("b", FetchError("timeout", "")), ("c", Response(404, {}, b"")):
        url = f"http://{path}/robots.txt"
        crawl.learn_robots(Request(url, url, path, kind="robots"), outcome)
    batch = crawl.mine.plan(0.0)
    batch.links = [link(host) for host in "abc"]
    first = await store.sync(batch)
    claimed = await store.sync(sync.SyncBatch(first.token, 1, 30.0, claim=3))
    assert {found.origin[-1]: round(found.ttl, -1) for found in claimed.robots} == {"a": 300, "b": 300, "c": 86400}
    other = shared_start(server)[0].mine
    other.answered(other.plan(0.0), claimed, 0.0, 0.0)
    assert other.explain("http://a/", 0.0).startswith("now")
    robots = shared_start(server, robots=True)[0].mine
    robots.answered(robots.plan(0.0), claimed, 0.0, 0.0)
    assert robots.explain("http://a/", 299.0) == "no: robots.txt could not be read"
    assert "robots.txt is read first" in robots.explain("http://a/", 301.0)


@shared_test
async def test_batch_sent_twice_is_applied_once(server: PgServer, store: ct.PgStore) -> None:
    first = await store.sync(sync.SyncBatch(None, 1, 30.0, links=[link("a"), link("b"), link("c")]))
    held = await store.sync(sync.SyncBatch(first.token, 1, 30.0, claim=1))
    host = held.hosts[0][0]
    batch = sync.SyncBatch(first.token, 2, 30.0, done=[shared_done(held.urls[0])], claim=1, held=[host])
    batch.links = [link(host, "/found")]
    one = await store.sync(batch)
    two = await store.sync(batch)
    assert [row.url for row in one.stored] == [row.url for row in two.stored] == [held.urls[0].url]
    assert {name for name, _ in one.hosts} < {name for name, _ in two.hosts} <= {"a", "b", "c"} - {host}
    assert (
        await server.do("SELECT sum(waiting) FROM crawl_hosts")
        == 3
        == await server.do("SELECT count(*) FROM crawl_queue")
    )
    assert await server.do("SELECT sum(done) FROM crawl_hosts") == 1


@shared_test
async def test_redirects_meet_in_the_database(server: PgServer, store: ct.PgStore) -> None:
    """One of two that lead to the same target goes there; a target that has a row of its own is a duplicate."""
    first = await store.sync(sync.SyncBatch(None, 1, 30.0, links=[link("a", f"/{n}") for n in range(3)]))
    held = await store.sync(sync.SyncBatch(first.token, 1, 30.0, claim=1, limit=3))
    moves = []
    for one, target in zip(held.urls, ("http://b/x", "http://b/x", "http://a/0"), strict=True):
        to = one._replace(host=target[7], target=target, hops=1)
        moves.append(
            sync.Move(one.host, one.id, to, dataclasses.replace(shared_row(one.url), error="duplicate: it is"))
        )
    answer = await store.sync(sync.SyncBatch(first.token, 2, 30.0, moves=moves, claim=1, held=["a"]))
    assert [row.url for row in answer.stored] == ["http://a/1", "http://a/2"]
    (left,) = answer.urls
    assert (left.host, left.url, left.target, left.hops) == ("b", "http://a/0", "http://b/x", 1)
    assert await server.do("SELECT sum(failed) FROM crawl_hosts WHERE host = 'a' AND waiting = 0") == 2


def test_workers_agree_on_options(shared_pg: PgServer) -> None:
    crawl = shared_crawl.join(Options(depth=3, rate=7.0), shared_pg.url)
    assert (crawl.options.depth, crawl.options.rate) == (3, 7.0)
    assert shared_crawl.join(Options(concurrency=5), shared_pg.url).options == dataclasses.replace(
        crawl.options, concurrency=5
    )
    with pytest.raises(ValueError, match="--rate: this crawl was started with 7"):
        shared_crawl.join(Options(rate=9.0), shared_pg.url)
    with pytest.raises(ValueError, match="not with --frontier: max-pages"):
        shared_crawl.SharedCrawl(Options(max_pages=5), shared_pg.url)
    with pytest.raises(ValueError, match="postgresql://"):
        shared_crawl.server_of("mysql://user:secret@host/")


# --------------------------------------------------------------------------------------------------------- the workers


def shared_start(server: PgServer, **given: Any) -> tuple[shared_crawl.SharedCrawl, list[ScrapeResult]]:
    length = given.pop("length", 30.0)
    options = Options(**{"depth": 20, "rate": 40.0, "robots": False} | given)
    return shared_crawl.SharedCrawl(options, server.url, length=length), []


async def shared_work(crawl: shared_crawl.SharedCrawl, rows: list[ScrapeResult], urls: list[str]) -> None:
    async def put(row: ScrapeResult) -> None:
        rows.append(row)

    async with crawl.joined(put) as keep:
        await crawl_async.Driver(crawl, keep).run(urls)
    if crawl.failure:
        raise crawl.failure


@pytest.fixture(scope="module")
def shared_site() -> Iterator[Sandbox]:
    with Sandbox(hosts=4, pages=20, page_bytes=300) as site:
        yield site


async def all_stored(server: PgServer, site: Sandbox) -> None:
    count = "SELECT count(*) FROM crawl_results WHERE row->>'error' IS NULL AND (row->>'status') = '200'"
    assert await server.do(count) == len(site.hosts) * site.pages
    assert await server.do("SELECT count(*) FROM crawl_queue") == 0
    assert await server.do("SELECT count(*) FROM crawl_hosts WHERE owner IS NOT NULL") == 0


OPTIONS = Options(depth=20, rate=5.0, robots=False)


NOTE = """if True:
    import os, sys
    from crawl import frontier
    out, real = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT), frontier.Frontier.clear_to_send

    def clear_to_send(self, request, now):
        wait = real(self, request, now)
        if wait == 0.0:
            os.write(out, f"{request.host} {now!r}\\n".encode())
        return wait

    frontier.Frontier.clear_to_send = clear_to_send
"""
"""Notes the moment of each sending, in a file."""


def rate_held(noted: Path, rate: float) -> int:
    """Over all workers, at the moments of sending; how many there were."""
    times: dict[str, list[float]] = {}
    for line in noted.read_text().splitlines():
        host, moment = line.split()
        times.setdefault(host, []).append(float(moment))
    for host, sent in times.items():
        sent.sort()
        for i, first in enumerate(sent):
            for j, last in enumerate(sent[i:], 1):
                assert j <= 1 + rate * (last - first) + 1e-6, host
    return sum(map(len, times.values()))


def note(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``NOTE`` in this process."""
    monkeypatch.setattr(Frontier, "clear_to_send", Frontier.clear_to_send)  # and so undone
    monkeypatch.setattr(sys, "argv", ["", str(noted)])
    exec(NOTE, {})


def test_two_workers_share_hosts_and_pages(
    shared_pg: PgServer, shared_site: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(shared_site.log)
    note(tmp_path / "noted", monkeypatch)
    (one, first), (two, second) = shared_start(shared_pg, rate=10.0), shared_start(shared_pg, rate=10.0)
    step = one.frontier.step

    def begun() -> bool:
        return len(shared_site.log) - before >= 4

    def step_some(now: float) -> Request | Question | float | None:
        """The first has some and then waits for the other, which may have to connect and to claim first."""
        return 0.01 if begun() and not second else step(now)

    async def both() -> None:
        monkeypatch.setattr(one.frontier, "step", step_some)
        urls = [shared_site.url("/", host) for host in range(4)]
        work = asyncio.create_task(shared_work(one, first, urls))
        await until_async(begun)
        await asyncio.gather(work, shared_work(two, second, []))
        await all_stored(shared_pg, shared_site)

    asyncio.run(both())
    urls = [row.url for row in first + second]
    assert len(urls) == len(set(urls)) == 80
    assert first and second, "the hosts were shared out"
    assert len(shared_site.log) - before == 80, "each page was asked for once"
    assert rate_held(tmp_path / "noted", 10.0) == 80
    assert shared_crawl.status(shared_pg.url).startswith(
        "0 URLs waiting, 80 done, 0 failed · 1.3 rows/s in the last minute\n4 hosts"
    )


def test_killed_worker_is_followed(
    shared_pg: PgServer, shared_site: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(shared_site.log)
    listed, noted = tmp_path / "urls.txt", tmp_path / "noted"
    listed.write_text("".join(shared_site.url("/", host) + "\n" for host in range(4)))
    options = ["--frontier", shared_pg.url, "--depth", "20", "--rate", "20", "--no-robots", "--lease", "1", "-q"]
    program = NOTE + "    import crawl_async\n    crawl_async.main('crawl_async.py', crawl_async.run)"
    command = [sys.executable, "-c", program, str(noted), str(listed), *options]
    note(noted, monkeypatch)

    async def run() -> None:
        with subprocess.Popen(  # noqa: ASYNC220
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE
        ) as worker:
            try:
                await until_async(lambda: len(shared_site.log) - before >= 20)
            finally:
                worker.kill()
        await shared_work(*shared_start(shared_pg, rate=20.0, length=1.0), [])
        await all_stored(shared_pg, shared_site)

    asyncio.run(run())
    assert rate_held(noted, 20.0) >= 80


def test_kills_of_workers_and_of_helpers(shared_pg: PgServer) -> None:
    """Of whoever asks for a page, or of the worker whose helper does; each time another one joins."""
    rng, lock = random.Random(3), threading.Lock()
    moments = [20 + 14 * n + rng.randrange(8) for n in range(3)]  # how many requests there have been
    killed: list[int] = []
    workers: list[subprocess.Popen[bytes]] = []

    def asking() -> tuple[int, int]:
        """The worker, and the process with the connection: itself, or its helper."""
        for worker in [one.pid for one in workers if one.poll() is None]:
            if helper := shares_client(worker, web.client.port):
                return worker, helper.pid
        raise AssertionError("nobody asks")

    def page(host: int, path: str) -> AnyPage:
        number = int(path[1:])
        with lock:
            asked = Counter(int(path[1:]) for _, name, path in web.log if name == f"127.0.2.{host}")
            if (
                len(killed) < len(moments)
                and len(web.log) >= moments[len(killed)]
                and asked[number] == 1  # not one that two have died with
                and number == max(asked)
            ):
                killed.append(rng.choice(asking()))
                os.kill(killed[-1], signal.SIGKILL)
        return 200, {}, "".join(f"<a href=/{n}>x</a>" for n in (2 * number + 1, 2 * number + 2) if n < 40)

    with Web(page) as web:
        argv = [web.url(host, "/0") for host in (1, 2, 3, 4)]
        argv += ["--depth", "99", "--no-robots", "--rate", "0", "--concurrency", "6", "--processes", "2", "-q"]
        argv += ["--frontier", shared_pg.url, "--lease", "1"]

        def start() -> None:
            with lock:
                workers.append(subprocess.Popen([sys.executable, "crawl_async.py", *argv], cwd=HERE, stdout=DEVNULL))

        start()
        start()
        for worker in workers:  # it grows
            worker.wait(PROGRAM_LIMIT)
            if worker.returncode:
                assert worker.returncode == -signal.SIGKILL
                start()
    stored = "SELECT count(*) FROM crawl_results WHERE row->>'error' IS NULL"
    assert asyncio.run(shared_pg.do(stored)) == 160 == len({(name, path) for _, name, path in web.log})
    assert len(killed) == len(set(killed)) == len(moments)
    assert len(web.log) <= 160 + 12 * len(killed), "those under way were asked for again"


def test_crawl_outlives_a_restart_of_the_database(shared_pg: PgServer, shared_site: Sandbox) -> None:
    before, rows = len(shared_site.log), list[ScrapeResult]()
    crawl, _ = shared_start(shared_pg)

    async def run() -> None:
        urls = [shared_site.url("/", host) for host in range(4)]
        work = asyncio.create_task(shared_work(crawl, rows, urls))
        await until_async(lambda: len(rows) >= 15)
        await asyncio.to_thread(shared_pg.stop)
        await asyncio.to_thread(shared_pg.start)
        await work
        await all_stored(shared_pg, shared_site)

    asyncio.run(run())
    assert len(shared_site.log) - before == 80 == len({row.url for row in rows}) == len(rows), (
        "nothing lost or done twice"
    )


def test_full_disk_is_waited_for(
    shared_pg: PgServer, shared_site: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rows = len(shared_site.log), list[ScrapeResult]()
    crawl, _ = shared_start(shared_pg)
    tries = 0
    real = ct.PgStore.sync

    async def sync(self: ct.PgStore, batch: Any) -> Any:
        nonlocal tries
        tries += bool(batch.done)
        return await real(self, batch)

    monkeypatch.setattr(ct.PgStore, "sync", sync)

    async def run() -> None:
        urls = [shared_site.url("/", host) for host in range(4)]
        work = asyncio.create_task(shared_work(crawl, rows, urls))
        await until_async(lambda: len(rows) >= 15)
        begun = tries
        async with refusing(shared_pg, "crawl_results", "53100"):
            await until_async(lambda: crawl._database.stats().state == "refusing" and tries > begun + 3)
        await work
        await all_stored(shared_pg, shared_site)

    asyncio.run(run())
    said = [record.getMessage() for record in caplog.records if "database" in record.getMessage()]
    assert said == ["database: the crawl waits: DiskFullError: refused", "database: it is stored again"]
    assert len(shared_site.log) - before == 80 == len({row.url for row in rows}) == len(rows)


def test_batch_that_takes_too_long_is_halved(
    shared_pg: PgServer, shared_site: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    shared_crawl.join(Options(depth=20, rate=40.0, robots=False), shared_pg.url)  # makes the tables
    crawl, rows = shared_start(shared_pg)

    async def run() -> None:
        async with refusing(shared_pg, "crawl_results", "57014", 3), refusing(shared_pg, "crawl_seen", "57014", 5):
            await shared_work(crawl, rows, [shared_site.url("/", host) for host in range(4)])
            await all_stored(shared_pg, shared_site)

    asyncio.run(run())
    assert "took too long: QueryCanceledError: the batch is halved" in caplog.text
    assert len(rows) == len({row.url for row in rows}) == 80


def test_workers_share_through_pgbouncer(
    shared_pg: PgServer, shared_site: Sandbox, capfd: pytest.CaptureFixture[str]
) -> None:
    with bouncer(shared_pg) as url:
        options = Options(depth=20, rate=40.0, robots=False)
        workers = [(shared_crawl.join(options, url), list[ScrapeResult]()) for _ in range(3)]

        async def run() -> None:
            lists = [[shared_site.url("/", host) for host in range(4)], [], []]
            await asyncio.gather(*(shared_work(*one, urls) for one, urls in zip(workers, lists, strict=True)))
            await all_stored(shared_pg, shared_site)

        asyncio.run(run())
        assert "80 done, 0 failed" in shared_crawl.status(url)
    assert sum(len(rows) for _, rows in workers) == 80


def test_table_of_somebody_else_is_named(shared_pg: PgServer, capfd: pytest.CaptureFixture[str]) -> None:
    asyncio.run(shared_pg.do("CREATE TABLE crawl_scope (name text)"))
    for more in ([], ["--status"]):
        assert crawl_cli.main("crawl_async.py", crawl_async.run, ["--frontier", shared_pg.url, *more]) == 1
        assert capfd.readouterr().err == (
            "crawl_async.py: database: the table crawl_scope is another program's or version's, it lacks the column"
            " serial: rename it, or use another database\n"
        )


def test_stop_gives_all_back(shared_pg: PgServer, shared_site: Sandbox) -> None:
    rows = list[ScrapeResult]()
    crawl, _ = shared_start(shared_pg, rate=10.0)

    async def stopped() -> None:
        async def put(row: ScrapeResult) -> None:
            rows.append(row)

        async with crawl.joined(put) as keep:
            driver = crawl_async.Driver(crawl, keep)
            work = asyncio.create_task(driver.run([shared_site.url("/", host) for host in range(4)]))
            await until_async(lambda: len(rows) >= 5)
            driver.stop()
            await work
        held = (
            "SELECT (SELECT count(*) FROM crawl_workers) + (SELECT count(*) FROM crawl_hosts WHERE owner IS NOT NULL)"
        )
        assert await shared_pg.do(held) == 0
        stored = await shared_pg.do("SELECT count(*) FROM crawl_results")
        assert stored == len(rows) < 80
        await shared_work(*shared_start(shared_pg), [])
        await all_stored(shared_pg, shared_site)

    asyncio.run(stopped())


class TwoHosts:
    """Two hosts: the first one's robots.txt, and one of its pages, are redirected to the second."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        host = head.lower().partition("host: ")[2].split(":")[0]
        self.asked.append(host + path)
        base = f"http://127.0.9.2:{self.port}"
        if host == "127.0.9.1" and path in ("/robots.txt", "/moved"):
            answer = f"HTTP/1.1 302 Found\r\nLocation: {base}{path}\r\nContent-Length: 0\r\n"
        else:
            body = (
                "User-agent: *\nDisallow: /secret"
                if path == "/robots.txt"
                else "<a href=/moved>1</a><a href=/secret>2</a>"
            )
            answer = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{answer}Connection: close\r\n\r\n{'' if '302' in answer else body}".encode())
        writer.close()

    async def crawl(self, server: PgServer) -> None:
        async with await asyncio.start_server(self.serve, ["127.0.9.1", "127.0.9.2"], 0) as site:
            ports = {one.getsockname()[1] for one in site.sockets}
            if len(ports) > 1:  # one port on both
                site.close()
                self.port = ports.pop()
                site = await asyncio.start_server(self.serve, ["127.0.9.1", "127.0.9.2"], self.port)
            async with site:
                self.port = site.sockets[0].getsockname()[1]
                urls = [f"http://127.0.9.{n}:{self.port}/" for n in (1, 2)]
                await asyncio.gather(
                    shared_work(*shared_start(server, robots=True), urls),
                    shared_work(*shared_start(server, robots=True), []),
                )


def test_redirects_to_hosts_of_others(shared_pg: PgServer) -> None:
    web = TwoHosts()
    asyncio.run(web.crawl(shared_pg))

    async def rows() -> list[Any]:
        text = await shared_pg.do(
            "SELECT json_agg(json_build_array(url, row->>'final_url', row->>'error'))::text FROM crawl_results"
        )
        found: list[Any] = json.loads(text.replace(f":{web.port}", ""))
        return sorted(found, key=lambda row: str(row[0]))

    one, two = "http://127.0.9.1", "http://127.0.9.2"
    forbidden = "robots: forbidden by robots.txt"
    found = asyncio.run(rows())
    assert [row for row in found if "moved" not in row[0]] == [
        [f"{one}/", f"{one}/", None], [f"{one}/secret", None, forbidden],
        [f"{two}/", f"{two}/", None], [f"{two}/secret", None, forbidden],
    ]  # fmt: skip
    moved = {row[0]: row[1:] for row in found if "moved" in row[0]}
    # Whoever comes first has the page; the other one leads to it.
    assert len(moved) in (1, 2) and [f"{two}/moved", None] in moved.values()
    assert Counter(web.asked)["127.0.9.2/moved"] == 1
    assert not any("secret" in path for path in web.asked)


def test_command_line(shared_pg: PgServer, capfd: pytest.CaptureFixture[str]) -> None:
    run = functools.partial(crawl_cli.main, "crawl_async.py", crawl_async.run)
    assert run(["--frontier", shared_pg.url, "--status"]) == 0
    assert "0 hosts" in capfd.readouterr().out
    with Sandbox(hosts=1, pages=5, page_bytes=100) as site:
        assert run([site.url("/"), "gopher://a/", "--frontier", shared_pg.url, "--depth", "9", "--rate", "0"]) == 0
    out, _ = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 6 and sum(row["error"] is None for row in rows) == 5
    assert run(["--frontier", "mysql://u:secret@h/"]) == 1
    assert "secret" not in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run(["--status"])


@pytest.mark.parametrize("program", ["crawl_async.py", "crawl_threads.py"])
def test_worker_with_helpers(program: str, shared_pg: PgServer, shared_site: Sandbox, tmp_path: Path) -> None:
    before = len(shared_site.log)
    urls = [shared_site.url("/", host) for host in range(4)]
    options = ["--depth", "20", "--rate", "40", "--no-robots", "--processes", "2", "--stats", str(tmp_path / "stats")]
    command = [sys.executable, program, *urls, "--frontier", shared_pg.url, *options, "-q"]
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, timeout=PROGRAM_LIMIT)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 80
    asyncio.run(all_stored(shared_pg, shared_site))
    assert len(shared_site.log) - before == 80, "each page was asked for once"
    helpers = json.loads((tmp_path / "stats").read_text())["processes"]
    assert sum(helper["requests"] for helper in helpers) == 80 and all(helper["requests"] for helper in helpers)


# ------------------------------------------------------------------------------------------- commits lost, workers lost


@shared_test
async def test_commits_that_are_lost_are_noticed_and_told_again(server: PgServer, store: ct.PgStore) -> None:
    one = shared_start(server, robots=False)[0].mine
    one.add_list(["http://a/", "http://b/"])

    async def exchange() -> sync.SyncAnswer:
        batch = one.plan(0.0)
        answer = await store.sync(batch)
        one.answered(batch, answer, 0.0, 0.0)
        return answer

    await exchange()
    held = await exchange()
    assert sorted(host for host, _ in held.hosts) == ["a", "b"]
    one.add_links(["http://a/found"], 1, 0.0)
    await exchange()
    # What a server holds that lacks the last two commits, and half of the first one.
    await server.do(
        "UPDATE crawl_workers SET batch = batch - 2",
        "UPDATE crawl_hosts SET owner = NULL, due = now(), waiting = 1",
        "DELETE FROM crawl_queue WHERE host = 'b' OR depth > 0",
        "DELETE FROM crawl_hosts WHERE host = 'b'",
        "TRUNCATE crawl_seen",
        f"INSERT INTO crawl_seen VALUES ('{sync.hashed('http://a/')}')",
        "UPDATE crawl_server SET started = 'epoch'",
    )
    one.pause("a", 500.0, 0.0)
    assert (await exchange()).token is None and one.leases_lost == 1 and one.load("a", 0.0)[0] == 0
    assert isinstance(one.step(0.0), float), "nothing is sent any more"
    again = await exchange()
    assert again.token is not None and await server.do("SELECT count(*) FROM crawl_queue") == 2, "the list, told again"
    assert not (await exchange()).hosts, "no host is given out until all leases of before have ended"
    await server.do(
        "UPDATE crawl_server SET grace_until = now() - '1 s'::interval", "UPDATE crawl_hosts SET spacing = 20"
    )
    claimed = await exchange()
    assert [host for host, _ in claimed.hosts] == ["b"], "the other one asked for a pause"
    wait = claimed.hosts[0][1]
    assert wait is not None and 15 < wait < 20, "one interval after the last lease"


@shared_test
async def test_url_that_is_the_death_of_its_workers(server: PgServer, store: ct.PgStore) -> None:
    """It costs three of them, and has its row; the URLs of other hosts go on."""
    await store.sync(sync.SyncBatch(None, 1, 30.0, links=[*(link("a", f"/{n}") for n in range(3)), link("b")]))
    seen = []
    for _ in range(3):
        worker = await store.sync(sync.SyncBatch(None, 1, 30.0))
        answer = await store.sync(sync.SyncBatch(worker.token, 1, 30.0, claim=9, limit=9))
        seen.append((len(answer.urls), sorted(answer.careful), answer.alone, answer.urls[0].deaths))
        await server.do(ENDED)
        await store.reap()
    assert seen == [(4, [], False, 0), (2, ["a", "b"], False, 0), (1, ["a"], True, 1)]
    worker = await store.sync(sync.SyncBatch(None, 1, 30.0))
    other = await store.sync(sync.SyncBatch(worker.token, 1, 30.0, claim=9))
    assert other.alone and [(one.host, one.deaths) for one in other.urls] == [("b", 1)]
    batch = sync.SyncBatch(worker.token, 2, 30.0, claim=9, done=[shared_done(other.urls[0])])
    answer = await store.sync(batch)
    assert answer.alone and [(one.host, one.deaths) for one in answer.urls] == [("a", 2)]
    crawl = shared_start(server)[0].mine
    crawl.answered(crawl.plan(0.0), answer, 0.0, 0.0)
    guilty = crawl.step(0.0)
    assert isinstance(guilty, Request) and str(guilty.error) == "internal: 2 workers died with it"
    notes = {"a": sync.Note(0.0, 0.0, True)}
    rest = sync.SyncBatch(worker.token, 3, 30.0, claim=9, done=[shared_done(answer.urls[0])], notes=notes)
    after = await store.sync(rest)
    assert not after.alone and [(one.url, one.deaths) for one in after.urls] == [("http://a/1", 0)], "one at a time"


STORED = "SELECT count(*) FROM crawl_results"
REPLICATED = "-c", "wal_level=replica", "-c", "max_wal_senders=4", "-c", "hot_standby=on", "-c", "max_wal_size=200MB"


def test_crawl_goes_on_at_a_replica_that_lacks_the_last_commits(
    pg: PgServer, shared_site: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, promoted: every page is stored once, and no host gets more than its rate."""
    note(tmp_path / "noted", monkeypatch)
    before = len(shared_site.log)
    primary = pg.twin("primary", pg.fresh, *REPLICATED)
    primary.start()  # its own log says from then on what replicas need
    primary.stop()
    replica = pg.twin("replica", primary.data, *REPLICATED)
    (replica.data / "standby.signal").touch()
    source = f"primary_conninfo = 'host=127.0.0.1 port={primary.port} user=postgres'"
    (replica.data / "postgresql.conf").write_text(source)
    proxy = Proxy(primary.port, lambda data: False)

    def pages() -> int:
        return len(shared_site.log) - before

    async def run() -> None:
        async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as door:
            url = f"postgresql://postgres@127.0.0.1:{door.sockets[0].getsockname()[1]}/postgres"
            crawls = [shared_crawl.SharedCrawl(OPTIONS, url, length=2.0) for _ in range(2)]
            urls = [shared_site.url("/", host) for host in range(4)]
            work = [asyncio.create_task(shared_work(crawl, [], urls[i::2])) for i, crawl in enumerate(crawls)]
            await until_async(lambda: pages() >= 12)
            await replica.do("ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()")
            await until_async(lambda: replica.do("SELECT count(*) = 0 FROM pg_stat_wal_receiver"))
            few = await replica.do(STORED) + 4
            await until_async(lambda: primary.do(f"SELECT ({STORED}) >= {few}"))
            await asyncio.to_thread(primary.stop, signal.SIGQUIT)
            proxy.port = replica.port
            await replica.do("SELECT pg_promote()")
            await asyncio.gather(*work)
            assert max(crawl.mine.leases_lost for crawl in crawls) > 0
            await all_stored(replica, shared_site)

    try:
        primary.start()
        replica.start()
        asyncio.run(run())
    finally:
        for server in (primary, replica):
            if server.process is not None and server.process.poll() is None:
                server.stop(signal.SIGQUIT)
    assert rate_held(tmp_path / "noted", OPTIONS.rate) >= 80
