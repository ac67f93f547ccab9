"""api/bus.py: what workers tell each other over a real PostgreSQL, and what they make of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aggregate_app
from api import bus as bus_module
from api import config
from api.bus import CHANNEL, Bus, News
from api.history import UPSTREAM_RESULTS
from runtime.postgres import Database
from tests.helpers.api import app_upstream, ask, living
from tests.helpers.base import HANG_LIMIT, limits, run_task, ticks, until_async
from tests.helpers.postgres import PgServer


@contextlib.asynccontextmanager
async def worker(url: str, table: dict[str, config.Upstream]) -> AsyncIterator[Any]:
    app = aggregate_app.create_app(table, 0, database=lambda: Database(url, UPSTREAM_RESULTS))
    async with aggregate_app.lifespan(app):
        service = app.state.service
        await until_async(lambda: service.bus.listening)
        yield app


def test_workers_hear_of_invalidations_pauses_and_circuits(pg: PgServer) -> None:
    serial, refusing = 0, 0

    async def handler(head: str, body: bytes) -> Any:
        nonlocal serial
        serial += 1
        return refusing or {"serial": serial}

    async def main() -> None:
        nonlocal refusing
        async with app_upstream(handler) as url:
            given: dict[str, Any] = {"ttl": 600.0, "timeout": HANG_LIMIT, "retries": 0, "failures": 1, "reset": 100.0}
            table = {
                name: config.Upstream(name, f"{url}/{name}?k={{k}}", {"k": "0"}, max_reset=100.0, **given)
                for name in ("a", "b")
            }
            async with worker(pg.url, table) as first, worker(pg.url, table) as second:

                async def part(app: Any, path: str) -> Any:
                    return json.loads((await ask(app, f"/aggregate/{path}&deadline_ms=20000"))[2])["sources"][path[0]]

                for path in ("a?k=1", "a?k=2", "b?k=1"):
                    for app in (first, second):
                        assert (await part(app, path))["state"] == "fresh"
                caches = {name: source.cache for name, source in second.service.sources.items()}
                kept = second.service.events.stream()
                assert await anext(kept) == b"retry: 2000\n\n"
                rows = [("?source=a&k=1", 1, 1), ("?source=a", 0, 1), ("", 0, 0)]
                for query, a, b in rows:
                    await ask(first, "/cache/invalidate" + query, "POST")
                    await until_async(lambda a=a, b=b: (len(caches["a"]), len(caches["b"])) == (a, b))  # type: ignore[misc]
                    assert len(first.service.sources["a"].cache) == a
                assert (await anext(kept)).count(b"event: invalidate") == 3
                refusing = 429
                assert (await part(first, "a?k=1"))["state"] == "error"
                await until_async(lambda: second.service.sources["a"].paused_for > 0)
                assert (await part(second, "a?k=5"))["state"] == "paused"
                refusing = 503
                assert (await part(first, "b?k=1"))["state"] == "error"
                await until_async(lambda: second.service.sources["b"].breaker.state == "open")
                calls = serial
                assert (await part(second, "b?k=5"))["state"] == "open" and serial == calls
                assert second.service.sources["b"].breaker.stats().opened == 1

                async with first.service.database.connection() as connection:  # others may use the channel, too
                    for text in (
                        "",
                        "x",
                        "[]",
                        '["s","invalidate","a"]',
                        '["s","invalidate","a",5,0]',
                        '["s",1,2,3,"x"]',
                    ):
                        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, text)
                await ask(second, "/cache/invalidate", "POST")
                heard = first.service.events
                await until_async(lambda: b'"sources":["a","b"]' in heard._ring[-1][1])
                assert first.service.bus.listening and not [t for t in first.service.tasks.values() if t.done()]

    run_task(main())


def test_news_survive_an_outage_of_the_database(pg: PgServer) -> None:
    async def main() -> None:
        heard: list[News] = []
        databases = [Database(pg.url, UPSTREAM_RESULTS) for _ in range(2)]
        buses = [Bus(database, heard.append) for database in databases]
        for database in databases:
            await database.open(0.0)
        tasks = [asyncio.create_task(bus.run()) for bus in buses]
        await until_async(lambda: all(bus.listening for bus in buses))
        ours = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        await pg.do(f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {ours}")
        await until_async(lambda: all(database.stats().connects == 2 for database in databases))
        await until_async(lambda: all(bus.listening for bus in buses))
        buses[0].tell(News("invalidate", "a", ("é" * 3000, "x" * 3000)))
        buses[1].tell(News("pause", "b", ("x" * 8000,), 5.0))
        buses[1].tell(News("pause", "b", ("x",), 5.0))
        await until_async(lambda: len(heard) == 2)
        buses[0].listening = False
        buses[0].tell(News("pause", "a", None, 5.0))  # without a connection: it would be over by then
        assert not buses[0]._waiting
        assert sorted(heard) == [News("invalidate", "a"), News("pause", "b", ("x",), 5.0)]
        tasks[1].cancel()  # who has no connection when the others are told finds it later
        await until_async(lambda: not buses[1].listening)
        buses[0].tell(News("open", "a"))
        buses[0].tell(News("invalidate", "a", ("é",)))
        await until_async(lambda: not buses[0]._waiting)
        tasks.append(asyncio.create_task(buses[1].run()))
        await until_async(lambda: News("invalidate", "a", ("é",)) in heard)
        assert "open" not in {news.kind for news in heard}
        await pg.do("INSERT INTO invalidations SELECT now(), 'x' FROM generate_series(1, 1000)")
        buses.append(Bus(databases[0], heard.append))
        tasks.append(asyncio.create_task(buses[2].run()))
        await until_async(lambda: News("invalidate", "") in heard)  # more than can be read
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for database in databases:
            await database.close()

    run_task(main())


def test_a_silent_connection_is_checked_and_no_message_is_lost_to_another() -> None:
    async def main() -> None:
        bus, sent, waits = Bus(Database("postgresql://h/"), print), list[str](), asyncio.Event()

        class Connection:
            async def execute(self, query: str, *arguments: str) -> None:
                if query == "SELECT 1":
                    raise ConnectionResetError
                sent.append(json.loads(arguments[1])[2])
                await waits.wait()

            def is_closed(self) -> bool:
                return False

            def add_termination_listener(self, _: object) -> None: ...

            remove_termination_listener = add_termination_listener

        with limits(bus_module.CHECK_EVERY) as up:
            bus.listening = True
            bus.tell(News("invalidate", "0"))
            serving = asyncio.create_task(bus._serve(Connection()))  # type: ignore[arg-type]
            await ticks()
            for number in range(1, bus_module.WAITING + 1):
                bus.tell(News("open", str(number)))
            waits.set()
            await until_async(lambda: len(sent) == bus_module.WAITING + 1)
            assert sent == list(map(str, range(bus_module.WAITING + 1)))
            up()
            with pytest.raises(ConnectionResetError):
                await serving

    run_task(main())


@pytest.mark.parametrize(
    ("news", "effect"),
    [
        (News("invalidate", "nobody"), ("closed", 0)),
        (News("invalidate", "a", ("1", "2")), ("closed", 0)),
        (News("nonsense", "a"), ("closed", 0)),
        (News("pause", "a", None, 1e9), ("closed", 300)),  # max_pause
        (News("pause", "a", None, -5.0), ("closed", 0)),
        (News("pause", "a", None, float("nan")), ("closed", 0)),
        (News("open", "a", None, 1e9), ("open", 0)),
    ],
)
def test_foreign_news_do_no_harm(news: News, effect: tuple[str, int]) -> None:
    async def main() -> None:
        async with living({"a": config.Upstream("a", "http://127.0.0.1/")}) as app:
            source = app.service.sources["a"]
            app.service.heard(news)
            await ticks()
            assert (source.breaker.state, round(source.paused_for)) == effect

    run_task(main())


def test_several_workers_without_a_database_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with living({}):
            pass

    run_task(main())
    assert "of several workers" not in caplog.text
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    run_task(main())
    assert "of several workers" in caplog.text
