"""api/history.py, and the API over it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import uvicorn

import aggregate_app
from api import config
from api import history as history_module
from api.history import UPSTREAM_RESULTS, History, Result
from runtime import postgres as db
from sandbox.sites import Sandbox
from tests.helpers.api import aggregate_http
from tests.helpers.base import run_task, until_async, wait_until
from tests.helpers.postgres import BEGUN, PgServer, pg_history, pg_result

ROW = "INSERT INTO upstream_results VALUES"


# --------------------------------------------------------------------------------------------------------- the history


async def filled(pg: PgServer, history: History, results: Sequence[Result]) -> None:
    for result in results:
        history.keep(result)
    written = history.writer.stats().written + len(results)
    await until_async(lambda: history.writer.stats().written == written)


def test_pages_have_each_row_once(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_items=5, max_age=0.001) as history:
            results = [
                pg_result(n // 3, city="Oslo" if n % 2 else "Rome", unit="C") for n in range(40)
            ]  # three at a time
            await filled(pg, history, [*results, pg_result(3, source="b")])
            for wanted, limit in (
                ({}, 7),
                ({"city": "Oslo"}, 1),
                ({"city": "Rome", "unit": "C"}, 100),
                ({"unit": "K"}, 5),
            ):
                seen: list[Result] = []
                before, more, pages = datetime.now(UTC), True, 0
                while more:
                    page, more = await history.page("a", json.dumps(wanted), before, limit, 1 << 30)
                    assert len(page) >= limit or not more
                    assert len(page) <= limit + 2  # but for those of one time
                    seen, pages = seen + page, pages + 1
                    before = page[-1].fetched_at if page else before
                times = [result.fetched_at for result in seen]
                assert times == sorted(times, reverse=True)
                expected = [r for r in results if wanted.items() <= json.loads(r.parameters).items()]
                assert Counter((r.fetched_at, r.latency) for r in seen) == Counter(
                    (r.fetched_at, r.latency) for r in expected
                )
            assert await history.page("a", "{}", BEGUN, 5, 100) == ([], False)
            assert await history.page("nobody", "{}", datetime.now(UTC), 5, 100) == ([], False)

    run_task(main())


def test_a_page_ends_at_its_bytes(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            await filled(pg, history, [pg_result(n, payload=json.dumps("x" * 98)) for n in range(10)])
            now = datetime.now(UTC)
            for most, rows in ((0, 1), (99, 1), (100, 2), (250, 3), (999, 10)):
                page, more = await history.page("a", "{}", now, 100, most)
                assert (len(page), more) == (rows, rows < 10)

    run_task(main())


def test_outcomes_are_the_last_ones_oldest_first(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url) as history:
            count = 2500
            await pg.do(
                f"{ROW.removesuffix(' VALUES')} SELECT 1, n, 'a', '{{}}', to_timestamp(n), n, CASE n % 2 WHEN 0 THEN"
                f" 'ok' ELSE 'timeout' END, NULL FROM generate_series(1, {count}) AS n"
            )
            times, latencies, statuses = await history.outcomes("a", datetime.fromtimestamp(3, UTC), 2100)
            assert list(times) == list(latencies) == [float(n) for n in range(401, count + 1)]
            assert statuses == ["timeout" if n % 2 else "ok" for n in range(401, count + 1)]
            assert list((await history.outcomes("a", datetime.fromtimestamp(2499, UTC), 2100))[0]) == [2499.0, 2500.0]
            assert [len(c) for c in await history.outcomes("b", datetime.fromtimestamp(0, UTC), 9)] == [0, 0, 0]

    run_task(main())


def test_latest_is_one_for_each_combination(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            results = [
                pg_result(n, city=f"c{n % 5}", payload=str(n), status="ok" if n < 45 else "http") for n in range(50)
            ]
            await filled(pg, history, [*results, pg_result(99, source="b", city="c0")])

            async def latest(within: float = 7200.0, limit: int = 99, max_bytes: int = 999) -> list[int]:
                return [int(r.payload or "") for r in await history.latest("a", within, limit, max_bytes)]

            assert await latest() == [44, 43, 42, 41, 40]
            assert await latest(limit=2) == [44, 43]
            assert await latest(max_bytes=3) == [44, 43]
            age = (datetime.now(UTC) - results[42].fetched_at).total_seconds() + 0.5
            assert await latest(within=age) == [44, 43, 42]
            monkeypatch.setattr(history_module, "RECENT", 3)
            assert await latest() == [44, 43, 42]

    run_task(main())


def test_forgets_in_batches(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            await filled(pg, history, [pg_result(n) for n in range(25)])
            older = (datetime.now(UTC) - BEGUN).total_seconds() - 19.5  # the first twenty
            assert await history.forget(older, batch=6) == 20
            assert await history.forget(older, batch=6) == 0
            assert [len(c) for c in await history.outcomes("a", BEGUN, 99)] == [5, 5, 5]

    run_task(main())


def test_scans_no_table(pg: PgServer) -> None:
    """With 20,000 rows of four sources, every statement of the history finds what it wants by an index."""
    plans: dict[str, str] = {}

    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            await pg.do(
                "INSERT INTO upstream_results SELECT 1, n, 's' || n % 4, jsonb_build_object('city', n / 4 % 50),"
                " now() - n * interval '30 s', 0.1, 'ok', '{}' FROM generate_series(1, 20000) AS n",
                "ANALYZE upstream_results",
            )
            database = history._database
            connection = await asyncpg.connect(pg.url)

            class Spy:
                def __init__(self, name: str) -> None:
                    self.name = name

                async def explain(self, query: str, *arguments: Any) -> None:
                    rows = await connection.fetch(f"EXPLAIN {query}", *arguments)
                    plans[self.name] = "\n".join(row[0] for row in rows)

            calls: dict[str, Callable[[], Any]] = {
                "latest": lambda: history.latest("s1", 600.0, 100),
                "week": lambda: history.latest("s1", 7 * 86400.0, 100),
                "page": lambda: history.page("s1", "{}", datetime.now(UTC), 100, 1 << 20),
                "outcomes": lambda: history.outcomes("s1", datetime.now(UTC) - timedelta(hours=1), 100),
                "forget": lambda: history.forget(6 * 86400.0, 100),
            }
            for name, call in calls.items():
                spy, inner = Spy(name), database.connection

                @contextlib.asynccontextmanager
                async def watched(inner: Any = inner, spy: Spy = spy) -> AsyncIterator[Any]:
                    async with inner() as held:
                        yield Spied(held, spy.explain)

                database.connection = watched  # type: ignore[method-assign, assignment]
                try:
                    await call()
                finally:
                    database.connection = inner  # type: ignore[method-assign]
            await connection.close()

    asyncio.run(main())
    assert len(plans) == 5
    for name, plan in plans.items():
        assert "Seq Scan" not in plan and "upstream_results_by_" in plan, f"{name}:\n{plan}"


class Spied:
    """A connection that tells of its queries before it makes them."""

    def __init__(self, connection: Any, told: Callable[..., Any]) -> None:
        self._connection, self._told = connection, told

    def transaction(self, **options: Any) -> Any:
        return self._connection.transaction(**options)

    async def execute(self, query: str, *arguments: Any) -> Any:
        await self._told(query, *arguments)
        return await self._connection.execute(query, *arguments)

    def cursor(self, query: str, *arguments: Any, **options: Any) -> Any:
        told, connection = self._told, self._connection

        class Cursor:
            def __await__(self) -> Any:
                return self.first().__await__()

            async def first(self) -> Any:
                await told(query, *arguments)
                return await connection.cursor(query, *arguments, **options)

            async def __aiter__(self) -> AsyncIterator[Any]:
                await told(query, *arguments)
                async for row in connection.cursor(query, *arguments, **options):
                    yield row

        return Cursor()


# ----------------------------------------------------------------------------------------------------- the API over it


@contextlib.contextmanager
def service(url: str | None, upstream: config.Upstream) -> Iterator[int]:
    """The API before one upstream, and its port."""
    app = aggregate_app.create_app(
        {upstream.name: upstream}, database=lambda: db.Database(url, UPSTREAM_RESULTS), client_rate=0
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def pg_health(port: int) -> dict[str, Any]:
    body = aggregate_http(port, "/health")[1]
    return {"status": body["status"], **body["database"]}


def pg_weather(web: Sandbox, **options: Any) -> config.Upstream:
    url = web.url("/api/weather?city={city}")
    return config.Upstream("weather", url, {"city": "Berlin"}, **{"timeout": 20.0, "ttl": 600.0, **options})


def test_aggregate_keeps_what_it_loaded_over_an_outage_and_a_restart(pg: PgServer, web: Sandbox) -> None:
    with service(pg.url, pg_weather(web)) as port:
        wait_until(lambda: pg_health(port)["state"] == "connected")
        cities = [f"c{n}" for n in range(60)]

        def ask(city: str) -> int:
            return aggregate_http(port, f"/aggregate/weather?city={city}&deadline_ms=20000")[0]

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert set(threads.map(ask, cities[:20])) == {200}
            asking = [threads.submit(ask, city) for city in cities[20:40]]
            pg.stop(signal.SIGQUIT)
            assert {one.result() for one in asking} == {200}
        wait_until(lambda: pg_health(port)["state"] == "down")
        assert {ask(city) for city in cities[40:]} == {200}
        health = pg_health(port)
        assert (health["status"], health["lost"]) == ("degraded", 0) and health["queued"] >= 20
        status, body, headers = aggregate_http(port, "/history/weather")
        assert (status, headers["retry-after"], headers["content-type"]) == (503, "2", "application/problem+json")
        assert aggregate_http(port, "/health/ready")[0] == 200
        pg.start()
        wait_until(lambda: pg_health(port)["queued"] == 0)
        health = pg_health(port)
        assert (health["status"], health["state"], health["written"], health["lost"]) == ("ok", "connected", 60, 0)
        assert asyncio.run(pg.do("SELECT count(*) FROM upstream_results")) == 60
        seen: list[str] = []
        path: str | None = "/history/weather?limit=7"
        while path is not None:
            status, body, _ = aggregate_http(port, path)
            assert status == 200 and len(body["results"]) <= 7
            assert {(row["status"], row["data"]["city"] == row["parameters"]["city"]) for row in body["results"]} == {
                ("ok", True)
            }
            seen += [row["parameters"]["city"] for row in body["results"]]
            path = body["next"]
        assert sorted(seen) == sorted(cities)
        rows = aggregate_http(port, "/history/weather?city=c7")[1]
        assert ([row["parameters"] for row in rows["results"]], rows["next"]) == ([{"city": "c7"}], None)
        asyncio.run(pg.do("DROP TABLE upstream_results CASCADE"))
        status, body, headers = aggregate_http(port, "/history/weather")
        assert (status, body["detail"]) == (503, "the history cannot be read: failed") and "retry-after" in headers


def test_aggregate_begins_with_what_the_last_life_knew(pg: PgServer, web: Sandbox) -> None:
    site = Sandbox(hosts=1, pages=1)
    site.start()
    try:
        upstream = pg_weather(site, retries=0)
        with service(pg.url, upstream) as port:
            _, body, _ = aggregate_http(port, "/aggregate/weather?city=Oslo&deadline_ms=20000")
            data = body["sources"]["weather"]["data"]
    finally:
        site.stop()
    assert asyncio.run(pg.do("SELECT count(*) FROM upstream_results")) == 1  # the last rows are written at the end
    with service(pg.url, upstream) as port:
        status, body, _ = aggregate_http(port, "/aggregate/weather?city=Oslo&deadline_ms=20000")
        part = body["sources"]["weather"]
        assert (status, part["state"], part["data"]) == (200, "stale", data)
        assert aggregate_http(port, "/aggregate/weather?city=Rome&deadline_ms=20000")[0] == 503
    # another configuration has other answers: those of this one are history only
    changes: list[dict[str, Any]] = [
        {"url": upstream.url + "&units=metric"},
        {"keep": "temperature"},
        {"method": "POST", "body": {}},
    ]
    for change in changes:
        with service(pg.url, dataclasses.replace(upstream, **change)) as port:
            assert aggregate_http(port, "/aggregate/weather?city=Oslo&deadline_ms=20000")[0] == 503
            assert data in [row["data"] for row in aggregate_http(port, "/history/weather?city=Oslo")[1]["results"]]


def test_a_table_of_an_earlier_version_is_kept(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_items=1, max_age=0.001) as history:
            await filled(pg, history, [pg_result(0)])
        await pg.do("ALTER TABLE upstream_results DROP COLUMN configuration")
        async with pg_history(pg.url, max_items=1, max_age=0.001) as history:
            await filled(pg, history, [pg_result(1)._replace(configuration="x")])
            assert len((await history.page("a", "{}", datetime.now(UTC), 10, 1 << 30))[0]) == 2
            found = [await history.latest("a", 1e9, 10, configuration=digest) for digest in ("", "x", "y")]
            assert [[row.latency for row in rows] for rows in found] == [[0.0], [0.001], []]

    run_task(main())


def test_aggregate_the_database_may_come_later(pg: PgServer, web: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate_app, "WARM", 0.0)
    pg.stop()
    with service(pg.url, pg_weather(web)) as port:
        wait_until(lambda: pg_health(port)["state"] == "down")
        assert aggregate_http(port, "/aggregate/weather?deadline_ms=20000")[0] == 200
        pg.start()
        wait_until(lambda: pg_health(port)["written"] == 1)
        assert len(aggregate_http(port, "/history/weather")[1]["results"]) == 1


def test_aggregate_without_a_database_has_no_history(web: Sandbox) -> None:
    with service(None, pg_weather(web)) as port:
        assert aggregate_http(port, "/aggregate/weather?deadline_ms=20000")[0] == 200
        assert {"status": "ok", "state": "none", "kind": None, "queued": 0}.items() <= pg_health(port).items()
        for path in ("/history/weather", "/report"):
            status, body, headers = aggregate_http(port, path)
            assert (status, body["status"], headers["retry-after"]) == (503, 503, "2")
            assert headers["content-type"] == "application/problem+json"
        for path in ("limit=0", "limit=1001", "before=now", "before=0001-01-01T00:00:00%2B23:00", "city=%00", "town=x"):
            assert aggregate_http(port, f"/history/weather?{path}")[0] == 422
