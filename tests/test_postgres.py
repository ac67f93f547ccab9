"""runtime/postgres.py, writer.py: a real server, which is stopped, killed and frozen; a proxy that swallows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aggregate_app
from api.history import UPSTREAM_RESULTS, History
from runtime import postgres as db
from runtime.writer import Writer, WriterStats
from tests.helpers.api import ask
from tests.helpers.base import HANG_LIMIT, SETTINGS, World, run_task, ticks, until_async
from tests.helpers.postgres import BEGUN, PgServer, Proxy, bouncer, pg_history, pg_open, pg_result, refusing


class Fake:
    """Rows by their number. ``gate`` stands before an insert; ``before`` and ``after`` its effect there are errors."""

    def __init__(self) -> None:
        self.rows: Counter[int] = Counter()
        self.batches: list[list[int]] = []
        self.bad: set[int] = set()
        self.shut_at = 0
        self.before: deque[Exception] = deque()
        self.after: deque[Exception] = deque()
        self.gate, self.up = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.up.set()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        if not self.up.is_set():
            raise db.Unavailable("away")
        yield self

    async def ready(self) -> bool:
        return await self.up.wait()

    def stored(self, error: Exception | None = None) -> None:
        self.trouble = error

    async def insert(self, _: Any, rows: Sequence[int]) -> None:
        self.batches.append(list(rows))
        if len(self.batches) == self.shut_at:
            self.gate.clear()
        await self.gate.wait()
        if self.before:
            raise self.before.popleft()
        if self.bad.intersection(rows):
            raise asyncpg.DataError("one of them")
        self.rows.update(set(rows) - set(self.rows))
        if self.after:
            raise self.after.popleft()

    def writer(self, **options: Any) -> Writer[int]:
        writer = Writer(self, self.insert, **{"max_age": 0.001, **options})  # type: ignore[arg-type]
        writer._backoff.base = 0.0
        return writer


def test_writer_batches_by_count_and_by_age() -> None:
    async def main() -> None:
        world, looks = World(), 0

        def clock() -> float:
            nonlocal looks
            looks += 1
            return world.now

        fake = Fake()
        writer = fake.writer(max_items=3, max_age=0.001, clock=clock)
        writing = asyncio.create_task(writer.run())
        for n in range(7):
            assert writer.offer(n)
        await until_async(lambda: writer.stats().written == 6)
        looked = looks
        await until_async(lambda: looks > looked + 6)  # it looked thrice, and the last row is not due
        assert (fake.batches, writer.stats()) == ([[0, 1, 2], [3, 4, 5]], WriterStats(1, 6, 0, 0, 2))
        world.now += 0.001
        await until_async(lambda: writer.stats().written == 7)
        assert writer.offer(7)
        assert (await writer.close(writing, HANG_LIMIT), writer.stats()) == (0, WriterStats(0, 8, 0, 0, 4))
        assert not writer.offer(8) and writer.stats().lost == 1

    run_task(main())


def test_writer_is_bounded_in_rows_and_bytes() -> None:
    async def main() -> None:
        fake = Fake()
        fake.up.clear()
        writer = fake.writer(capacity=3, max_bytes=100, max_items=2)
        assert [writer.offer(n, size) for n, size in enumerate((50, 51, 50, 0, 0))] == [True, False, True, True, False]
        assert (writer.stats().queued, writer.stats().lost) == (3, 2)
        writing = asyncio.create_task(writer.run())
        fake.up.set()
        await until_async(lambda: writer.stats().written == 3)
        assert writer.offer(9, 100) and not writer.offer(10, 1)  # what is written takes no room any more
        assert await writer.close(writing, HANG_LIMIT) == 0
        assert sorted(fake.rows) == [0, 2, 3, 9]

    run_task(main())


def test_writer_writes_no_more_than_a_portion_at_a_time() -> None:
    async def main() -> None:
        fake = Fake()
        writer = fake.writer(max_items=6, portion=10)
        writing = asyncio.create_task(writer.run())
        for n, size in enumerate((4, 6, 1, 30, 9, 1)):
            writer.offer(n, size)
        await writer.close(writing, HANG_LIMIT)
        assert fake.batches == [[0, 1], [2], [3], [4, 5]]

    run_task(main())


@pytest.mark.parametrize("bad", [set(), {0}, {7}, {3, 4}, {0, 2, 4, 6}, set(range(8))])
def test_writer_finds_the_rows_that_are_refused(bad: set[int]) -> None:
    async def main() -> None:
        fake = Fake()
        fake.bad = bad
        writer = fake.writer(max_items=8)
        writing = asyncio.create_task(writer.run())
        for n in range(8):
            writer.offer(n)
        assert await writer.close(writing, HANG_LIMIT) == 0
        stats = writer.stats()
        assert (stats.written, stats.refused, stats.queued, stats.lost) == (8 - len(bad), len(bad), 0, 0)
        assert fake.rows == Counter(set(range(8)) - bad)

    run_task(main())


@pytest.mark.parametrize(
    "error",
    [
        db.Unavailable("away"),
        asyncpg.DiskFullError("no space"),
        asyncpg.UndefinedTableError("dropped"),
        asyncpg.InternalClientError("who knows"),
        RuntimeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_writer_sends_the_same_rows_again(error: Exception) -> None:
    async def main() -> None:
        fake = Fake()
        fake.before.extend([error] * 3)
        fake.after.append(error)
        writer = fake.writer(max_items=2)
        writing = asyncio.create_task(writer.run())
        writer.offer(1)
        writer.offer(2)
        assert await writer.close(writing, HANG_LIMIT) == 0
        assert (fake.batches, fake.rows) == ([[1, 2]] * 5, Counter((1, 2)))
        assert writer.stats() == WriterStats(0, 2, 0, 0, 1)

    run_task(main())


def test_writer_cut_off_while_halving_counts_each_row_once() -> None:
    async def main() -> None:
        fake = Fake()
        fake.bad, fake.shut_at = {3}, 3
        writer = fake.writer(max_items=4)
        writing = asyncio.create_task(writer.run())
        for n in range(4):
            writer.offer(n)
        await until_async(lambda: not fake.gate.is_set())
        assert (fake.batches, writer.stats().queued) == ([[0, 1, 2, 3], [0, 1], [2, 3]], 2)
        assert (await writer.close(writing, 0.0), fake.rows) == (2, Counter((0, 1)))
        assert writer.stats() == WriterStats(0, 2, 2, 0, 1)

    run_task(main())


def test_writer_close_waits_so_long_and_no_longer() -> None:
    async def main() -> None:
        fake = Fake()
        fake.up.clear()
        writer = fake.writer()
        writing = asyncio.create_task(writer.run())
        writer.offer(1)
        assert (await writer.close(writing, 0.01), writing.cancelled()) == (1, True)
        assert writer.stats() == WriterStats(0, 0, 1, 0, 0)
        fake = Fake()
        fake.gate.clear()
        writer = fake.writer()
        writing = asyncio.create_task(writer.run())
        writer.offer(1)
        closing = asyncio.create_task(writer.close(writing, HANG_LIMIT))
        await until_async(lambda: fake.batches == [[1]])
        closing.cancel()  # a second signal
        await asyncio.wait([closing])
        await asyncio.wait([writing], timeout=HANG_LIMIT)
        assert writing.cancelled() and closing.cancelled()

    run_task(main())


@settings(SETTINGS)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(0, 40)),
            st.sampled_from(["bad", "away", "back", "shut", "open", "before", "after", "ticks", "time"]).map(
                lambda s: (s, 0)
            ),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_writer_every_row_ends_exactly_once(steps: list[tuple[str, int]], patient: bool) -> None:
    async def main() -> None:
        world, fake, offered = World(), Fake(), 0
        writer = fake.writer(capacity=12, max_bytes=200, max_items=4, max_age=5.0, portion=50, clock=world.clock)
        writing = asyncio.create_task(writer.run())
        for step, size in steps:
            if step in ("offer", "bad"):
                if step == "bad":
                    fake.bad.add(offered)
                writer.offer(offered, size)
                offered += 1
            elif step in ("away", "back"):
                (fake.up.clear if step == "away" else fake.up.set)()
            elif step in ("shut", "open"):
                (fake.gate.clear if step == "shut" else fake.gate.set)()
            elif step in ("before", "after"):
                getattr(fake, step).append(db.Unavailable("cut"))
            elif step == "time":
                world.now += 5.0
            await ticks(3 if step == "ticks" else 0)
            stats = writer.stats()
            assert stats.queued + stats.written + stats.refused + stats.lost == offered
            assert stats.queued <= 12 and stats.written <= len(fake.rows)
        if patient:
            fake.up.set()
            fake.gate.set()
        before = writer.stats().lost
        lost = await writer.close(writing, HANG_LIMIT if patient else 0.0)
        stats = writer.stats()
        assert (
            stats.queued == 0 and stats.written + stats.refused + stats.lost == offered and stats.lost == before + lost
        )
        assert set(fake.rows.values()) <= {1} and not fake.bad.intersection(fake.rows)
        assert stats.written <= len(fake.rows) <= stats.written + lost
        assert writing.done() and (lost == 0 or not patient)

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------ the pool


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL], ids=["fast", "immediate", "kill"])
def test_database_goes_and_comes_back(pg: PgServer, number: int) -> None:
    async def main() -> None:
        async with pg_open(pg.url) as database:
            first = database.stats()
            assert (first.kind, first.connects, first.error) == ("DATABASE_URL", 1, None)

            async def use() -> None:
                async with database.connection() as connection:
                    await connection.execute("SELECT pg_sleep(60)")

            async with database.connection() as connection:
                assert await connection.fetchval("SELECT count(*) FROM upstream_results") == 0
            using = asyncio.create_task(use())
            await until_async(lambda: len(database._held) == 1)
            await pg.do("DROP TABLE upstream_results")
            await asyncio.to_thread(pg.stop, number)
            with pytest.raises(db.Unavailable):
                await using
            await until_async(lambda: database.state == "down")
            with pytest.raises(db.Unavailable, match="database away"):
                async with database.connection(wait=math.inf):
                    raise AssertionError("there is none")
            assert database.stats().error and not await database.ready(0.0)
            starting = asyncio.create_task(asyncio.to_thread(pg.start))
            assert await database.ready(HANG_LIMIT), (starting.done(), database)
            await starting
            async with database.connection() as connection:  # the schema is there again, the pool is not of the dead
                assert await connection.fetchval("SELECT count(*) FROM upstream_results") == 0
            assert (database.stats().connects, database.stats().error) == (2, None)

    run_task(main())


def test_database_comes_back_though_a_connection_cannot_be_cut_off(pg: PgServer) -> None:
    """asyncpg's terminate raises while it reads what the server said last."""

    class Stubborn:
        cuts = 0

        def terminate(self) -> None:
            self.cuts += 1
            raise asyncpg.InternalClientError("cannot switch to state 15")

    async def main() -> None:
        async with pg_open(pg.url) as database:
            stubborn = Stubborn()
            database._held.add(stubborn)  # type: ignore[arg-type]
            assert database._probe is not None
            database._probe.terminate()
            await until_async(lambda: stubborn.cuts > 0)
            await until_async(lambda: database.state == "connected" and database.stats().connects == 2)

    run_task(main())


@pytest.mark.usefixtures("impatient")
def test_database_that_stands_still_is_noticed_and_nobody_hangs(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_open(pg.url) as database:

            async def use(entered: asyncio.Event) -> None:
                async with database.connection() as connection, connection.transaction():
                    await connection.execute("SELECT 1")
                    entered.set()
                    await going.wait()
                    async with asyncio.timeout(0.01):  # a request that gives up; its rollback has nobody to answer it
                        await connection.execute("SELECT 2")

            going, entered = asyncio.Event(), asyncio.Event()
            using = asyncio.create_task(use(entered))
            await entered.wait()
            with pg.frozen():
                going.set()
                await until_async(lambda: database.state == "down")
                with pytest.raises((db.Unavailable, TimeoutError)):
                    await using
                with pytest.raises(db.Unavailable, match="database away"):
                    async with database.connection():
                        raise AssertionError("there is none")
                assert database.stats().error == "TimeoutError"
            assert await database.ready(HANG_LIMIT)
            async with database.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1

    run_task(main())


@pytest.mark.usefixtures("impatient")
def test_database_closes_while_it_stands_still(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_open(pg.url) as database:
            async with database.connection() as connection:
                await connection.execute("SELECT 1")
            with pg.frozen():
                task = asyncio.create_task(database._check())
                await ticks()
                task.cancel()
                await asyncio.wait([task])
                await database.close()

    asyncio.run(main())


def test_database_a_connection_is_broken_off_at_its_limit(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pg_open(pg.url, size=1) as database:
            for _ in range(2):  # the place in the pool is free again
                with pytest.raises(db.Unavailable):
                    async with database.connection(limit=0.01) as connection, connection.transaction():
                        await connection.execute("SELECT pg_sleep(60)")
            async with database.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1
                with pytest.raises(db.Unavailable, match="TimeoutError"):
                    async with database.connection(wait=0.01):
                        raise AssertionError("there is one only")
            with pytest.raises(asyncpg.UndefinedTableError):
                async with database.connection() as connection:
                    await connection.execute("SELECT * FROM nowhere")
            assert database.state == "connected"

    run_task(main())


def test_database_a_connection_that_is_given_back_late_was_used_all_the_same(
    pg: PgServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reset(self: Any, *, timeout: float | None = None) -> None:
        async with asyncio.timeout(timeout):
            await asyncio.Event().wait()

    async def main() -> None:
        async with pg_open(pg.url, 1) as database:
            monkeypatch.setattr(asyncpg.Connection, "reset", reset)
            monkeypatch.setattr(db, "CLOSE_LIMIT", 0.01)
            async with database.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1
            with pytest.raises(ZeroDivisionError):
                async with database.connection():
                    raise ZeroDivisionError
            monkeypatch.undo()
            async with database.connection() as connection:
                assert await connection.fetchval("SELECT 2") == 2

    asyncio.run(main())


@pytest.mark.usefixtures("impatient")
def test_database_that_cannot_be_used_says_why_without_its_secrets(pg: PgServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        free = socket.create_server(("127.0.0.1", 0))
        closed = free.getsockname()[1]
        free.close()
        cases = {
            f"postgresql://postgres:hidden@127.0.0.1:{closed}/postgres": "ConnectionRefusedError",
            f"postgresql://postgres:hidden@127.0.0.1:{port}/postgres": "TimeoutError",
            pg.url.removesuffix("postgres") + "hidden": "InvalidCatalogNameError",
            f"postgresql://locked:hidden@127.0.0.1:{pg.port}/postgres": "InvalidPasswordError",
            "postgresql://postgres:hidden@127.0.0.1:port/hidden": "ValueError",
        }

        async def main() -> None:
            databases = {url: db.Database(url) for url in cases}
            for database in databases.values():
                await database.open(0.0)
                assert database.state in ("connecting", "down")
            await until_async(lambda: all(database.state == "down" for database in databases.values()))
            for url, database in databases.items():
                assert database.stats().error == cases[url]
                assert "hidden" not in repr(database) + repr(database.stats())
                with pytest.raises(db.Unavailable) as caught:
                    async with database.connection():
                        raise AssertionError("there is none")
                assert "hidden" not in str(caught.value)
                await database.close()
            await until_async(lambda: len(asyncio.all_tasks()) == 1)

        run_task(main())


@pytest.mark.parametrize(
    "url",
    [
        *("mysql://a:hidden@b/c", "hidden", "http://u:hid\u2100den@[host/db", "postgresql:hidden"),
        *("postgresql://u:hid?den@h/d", "postgresql://u:hid/den@h/d", "postgresql://u:hid\u2100den@h/d"),
    ],
)
def test_database_url_is_not_repeated(url: str) -> None:
    why = "postgresql://user:password@host/database is needed|the URL cannot be read"
    with pytest.raises(ValueError, match=f"^DATABASE_URL: ({why})") as caught:
        db.Database.configured({"DATABASE_URL": url}, "")
    assert "hid" not in str(caught.value) and caught.value.__cause__ is None and caught.value.__context__ is None


def test_database_none_is_none() -> None:
    async def main() -> None:
        database = db.Database.configured({"DATABASE_URL": "none"}, "")
        await database.open(HANG_LIMIT)
        assert database.stats()[:2] == ("none", None)
        with pytest.raises(db.Unavailable, match="not configured"):
            async with database.connection():
                raise AssertionError("there is none")
        history = History(database)
        history.keep(pg_result(1))
        assert history.writer.stats() == WriterStats(0, 0, 0, 0, 0)
        await database.close()

    run_task(main())


def test_history_a_batch_whose_answer_is_lost_is_there_once(pg: PgServer) -> None:
    async def main() -> None:
        left = 3

        def cut(data: bytes) -> bool:  # the server has committed: it says so, and that it is ready again
            nonlocal left
            left -= b"INSERT 0 " in data and b"Z\x00\x00\x00\x05I" in data
            return left >= 0 and b"INSERT 0 " in data

        proxy = Proxy(pg.port, cut)
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        url = pg.url.replace(f":{pg.port}/", f":{server.sockets[0].getsockname()[1]}/")
        async with server:
            async with pg_history(url, max_items=10) as history:
                for n in range(50):
                    history.keep(pg_result(n))
                await until_async(lambda: history.writer.stats().written == 50)
            assert proxy.cuts == 3
        assert await pg.do("SELECT count(*) FROM upstream_results") == 50
        assert await pg.do("SELECT count(DISTINCT fetched_at) FROM upstream_results") == 50

    asyncio.run(main())


def test_history_a_batch_whose_backend_dies_before_the_commit_is_there_once(pg: PgServer) -> None:
    """A deferred trigger stands between the statement and its commit, until its backend is ended there."""
    hold = (
        "CREATE OR REPLACE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END'",
        "CREATE CONSTRAINT TRIGGER held AFTER INSERT ON upstream_results DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION held()",
    )
    waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted"

    async def main() -> None:
        async with pg_history(pg.url, max_items=10) as history:
            await pg.do(*hold)
            blocker = await asyncpg.connect(pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            for n in range(10):
                history.keep(pg_result(n))
            killed = set[int]()
            while len(killed) < 3:
                pid = await blocker.fetchval(waiting)
                if pid is not None and pid not in killed:
                    assert await blocker.fetchval("SELECT count(*) FROM upstream_results") == 0
                    await blocker.execute("SELECT pg_terminate_backend($1)", pid)
                    killed.add(pid)
            assert history.writer.stats()[:4] == (10, 0, 0, 0)
            await blocker.close()
            await until_async(lambda: history.writer.stats().written == 10)
        assert await pg.do("SELECT count(*) FROM upstream_results") == 10

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["fast", "kill"])
def test_history_counts_are_exact_over_a_restart(pg: PgServer, number: int) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_items=7, max_age=0.001) as history:
            going, n = True, 0

            async def feed() -> None:
                nonlocal n
                while going:
                    history.keep(pg_result(n))
                    n += 1
                    await asyncio.sleep(0)

            feeding = asyncio.create_task(feed())
            await until_async(lambda: history.writer.stats().written > 20)
            await asyncio.to_thread(pg.stop, number)
            await until_async(lambda: history._database.state == "down")
            going = False
            await feeding
            stats = history.writer.stats()
            assert stats.queued > 0 and stats.queued + stats.written + stats.lost == n
            await asyncio.to_thread(pg.start)
            await until_async(lambda: history.writer.stats().queued == 0)
            stats = history.writer.stats()
            assert (stats.written + stats.lost, stats.refused) == (n, 0)
        assert await pg.do("SELECT count(*) FROM upstream_results") == stats.written

    asyncio.run(main())


def test_history_refuses_rows_that_the_database_does_not_take(pg: PgServer) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    bad = ['"\\u0000"', "1e999999", "NaN", '"\ud800"', '"\\ud800"', deep, "{", "\x00"]
    good = [
        '"\\ud83d\\ude00"',
        "1e300",
        "null",
        None,
        json.dumps("x" * 3_000_000),
        '{"a": 1, "a": 2}',
        "[" * 500 + "]" * 500,
    ]

    async def main() -> None:
        async with pg_history(pg.url, max_items=100) as history:
            for n, payload in enumerate(bad + good):
                history.keep(pg_result(n, payload=payload))
            history.keep(pg_result(100)._replace(latency=math.inf))
            history.keep(pg_result(101)._replace(latency=math.nan))
            history.keep(pg_result(102)._replace(parameters="none"))
            await until_async(lambda: history.writer.stats().queued == 0)
            stats = history.writer.stats()
            assert (stats.written, stats.refused, stats.lost) == (len(good) + 2, len(bad) + 1, 0)
            shown, more = await history.page("a", "{}", datetime.now(UTC), 1000, 1 << 30)
            assert (len(shown), more) == (len(good) + 2, False)

    asyncio.run(main())


def test_history_halves_what_takes_too_long(pg: PgServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        limited = refusing(pg, "upstream_results", "57014", 3)
        async with pg_history(pg.url, max_items=8, max_age=60.0) as history, limited:
            for n in range(8):
                history.keep(pg_result(n))
            await until_async(lambda: history.writer.stats().queued == 0)
            assert history.writer.stats()[1:] == (8, 0, 0, 4)

    asyncio.run(main())
    assert "database took too long: QueryCanceledError: 8 rows are halved" in caplog.text


def test_history_says_that_nothing_can_be_stored(pg: PgServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        app = aggregate_app.create_app({}, 0, database=lambda: db.Database(pg.url, UPSTREAM_RESULTS))
        async with aggregate_app.lifespan(app):
            database, history = app.state.service.database, app.state.service.history
            assert await database.ready(HANG_LIMIT)
            async with refusing(pg, "upstream_results", "53100"):
                history.keep(pg_result(1))
                await until_async(lambda: database.stats().state == "refusing")
                health = json.loads((await ask(app, "/health"))[2])
                assert (health["status"], health["database"]["state"]) == ("degraded", "refusing")
                assert health["database"]["error"] == "DiskFullError"
            await until_async(lambda: history.writer.stats().written == 1)
            assert json.loads((await ask(app, "/health"))[2])["status"] == "ok"

    asyncio.run(main())
    said = [record.getMessage() for record in caplog.records if "stored" in record.getMessage()]
    assert said == ["database: what is to be stored waits: DiskFullError: refused", "database: it is stored again"]


def test_history_names_the_table_of_somebody_else(pg: PgServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        await pg.do("CREATE TABLE upstream_results (source text)")
        database = db.Database(pg.url, UPSTREAM_RESULTS)
        with pytest.raises(db.Misconfigured, match="the table upstream_results is another"):
            await database.open(HANG_LIMIT)
        assert database.stats().state == "none"
        await database.open(0.0)  # whoever can do without goes on, and it may be mended
        await until_async(lambda: database.state == "down")
        assert database.stats().error == "Misconfigured"
        await pg.do("DROP TABLE upstream_results")
        assert await database.ready(HANG_LIMIT)
        await database.close()

    asyncio.run(main())
    assert caplog.text.count("the table upstream_results") == 1


def test_all_goes_through_pgbouncer(pg: PgServer) -> None:
    """In transaction mode with one connection to the server, which all use in turn."""

    async def main(url: str) -> None:
        async with pg_history(url, max_items=8, max_age=0.001) as history:
            for n in range(20):
                history.keep(pg_result(n))

            async def look() -> None:
                for _ in range(10):
                    await history.page("a", "{}", datetime.now(UTC), 5, 1 << 30)
                    await history.latest("a", 1e6, 5)
                    await history.outcomes("a", BEGUN, 5)

            await asyncio.gather(*(look() for _ in range(3)))
            await until_async(lambda: history.writer.stats().written == 20)
            assert await history.forget(0.0) == 20

    with bouncer(pg) as url:
        asyncio.run(main(url))


def test_history_waits_for_what_may_be_mended(pg: PgServer) -> None:
    """A database that must not be written to refuses every row, and none is lost."""

    async def main() -> None:
        async with pg_history(pg.url, max_items=5, max_age=0.001) as history:
            readers = history._database
            await pg.do("ALTER DATABASE postgres SET default_transaction_read_only = on")
            try:
                for n in range(5):
                    history.keep(pg_result(n))
                tried = asyncio.create_task(until_async(lambda: history.writer.stats().written > 0))
                await ticks(20)
                assert history.writer.stats()[:4] == (5, 0, 0, 0) and readers.state == "connected"
            finally:
                await pg.do("SET default_transaction_read_only = off", "ALTER DATABASE postgres RESET ALL")
            await pg.do(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"  # a bare one would end the first only
                " WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
            )
            await tried
            assert history.writer.stats()[:4] == (0, 5, 0, 0)

    asyncio.run(main())
