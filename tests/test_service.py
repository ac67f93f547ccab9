"""api/service.py: answers, reports, the stop."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import threading
from array import array
from collections import Counter
from typing import Any, cast

import pytest

from api import config, pages
from api import service as service_module
from runtime.loop import handled_before_the_server
from tests.helpers.api import app_run, app_upstream, ask, living
from tests.helpers.base import HANG_LIMIT, World, holds_the_loop, ticks, until_async


def counts(body: bytes, name: str) -> dict[str, int]:
    return cast("dict[str, int]", json.loads(body)["sources"][name]["answers"])


def test_answers_are_counted_and_follow_each_change_at_once(app_world: World) -> None:
    """Also those that no route has seen: of a path and query that were asked before, and a cache that has all."""
    asked: Counter[str] = Counter()

    async def handler(head: str, body: bytes) -> Any:
        path = head.split()[1]
        asked[path] += 1
        return None if path == "/silent" else {"serial": asked[path]}

    async def main() -> None:
        async with app_upstream(handler) as url:
            table = {name: config.Upstream(name, f"{url}/{name}", ttl=10.0) for name in ("a", "b", "silent")}
            async with living(table) as app:
                service, path = app.service, "/aggregate?sources=a,b"

                async def serials(**options: Any) -> list[Any]:
                    status, _, body = await ask(app, path, **options)
                    if status == 304 or options.get("method") == "HEAD":
                        return [status]
                    return [part["data"]["serial"] for part in json.loads(body)["sources"].values()]

                for _ in range(4):
                    assert await serials() == [1, 1]
                assert service.plans.stats().hits == 3
                assert await serials(method="HEAD") == [200]
                assert await serials(headers={"If-None-Match": "*"}) == [304]
                assert counts((await ask(app, "/health"))[2], "a") == {"fresh": 6}
                metrics = (await ask(app, "/metrics"))[2].decode()
                assert 'aggregate_answers_total{source="a",state="fresh"} 6.0' in metrics
                status, _, body = await ask(app, "/cache/invalidate?source=b", "POST")
                assert (status, json.loads(body)) == (200, {"invalidated": ["b"]})
                assert await serials() == [1, 2]
                app_world.now += 10.0
                assert await serials() == [1, 2]  # stale, and two loads begun
                await until_async(lambda: not any(source.running for source in service.sources.values()))
                assert await serials() == [2, 3]
                status, headers, _ = await ask(app, "/aggregate?sources=a,silent&deadline_ms=1")
                assert (status, headers["cache-control"]) == (200, "no-cache")
                service.cancel_loads()
                service.plans.maxsize = 3
                for i in range(1, 9):
                    await ask(app, f"/aggregate/a?deadline_ms={i}")
                    assert len(service.plans) <= 3
                    assert service.plans.get(("/aggregate/a", b"deadline_ms=%d" % i)) is not None

    app_run(main())


def test_keeps_no_answer_from_before_an_invalidation(app_world: World) -> None:
    async def main() -> None:
        gates, asked = [asyncio.Event(), asyncio.Event()], 0
        gates[1].set()

        async def handler(head: str, body: bytes) -> Any:
            nonlocal asked
            asked += 1
            number = asked
            await gates[number - 1].wait()
            return {"serial": number}

        async with app_upstream(handler) as url:
            table = {"a": config.Upstream("a", url, timeout=HANG_LIMIT)}
            async with living(table) as app:
                first = asyncio.create_task(ask(app, "/aggregate?deadline_ms=20000"))
                await until_async(lambda: asked == 1)
                await ask(app, "/cache/invalidate", "POST")
                gates[0].set()
                assert b'"serial": 1' in (await first)[2]
                assert b'"serial": 2' in (await ask(app, "/aggregate?deadline_ms=20000"))[2]

    app_run(main())


def test_says_how_old_its_answers_are(app_world: World) -> None:
    """RFC 9111: what is left of max-age after Age is how long the answer stays fresh; a 304 says the same."""

    async def handler(head: str, body: bytes) -> Any:
        return None if "/silent" in head else {"name": head.split()[1]}

    async def main() -> None:
        async with app_upstream(handler) as url:
            ttls = {"a": 10.0, "b": 20.0, "silent": 5.0}
            table = {name: config.Upstream(name, f"{url}/{name}", ttl=ttl) for name, ttl in ttls.items()}
            async with living(table) as app:
                rows = [  # seconds later, the path, Age, Cache-Control
                    (0.0, "/aggregate/a?deadline_ms=20000", "0", "max-age=10"),
                    (3.25, "/aggregate/a", "4", "max-age=10"),  # 6.75 s left, said as 6
                    (0.0, "/aggregate/b?deadline_ms=20000", "0", "max-age=20"),
                    (0.0, "/aggregate?sources=a,b", "4", "max-age=10"),
                    (6.5, "/aggregate?sources=b,a", "10", "max-age=10"),  # a quarter of a second: 0
                    (0.0, "/aggregate/b", "7", "max-age=20"),
                    (0.0, "/aggregate?sources=a,b,silent&deadline_ms=1", "10", "no-cache"),
                    (0.25, "/aggregate/a?deadline_ms=19999", "10", "no-cache"),  # stale
                ]
                for later, path, age, control in rows:
                    app_world.now += later
                    status, headers, body = await ask(app, path)
                    assert (status, path, headers["age"], headers["cache-control"]) == (200, path, age, control)
                    etag = headers["etag"]
                    assert re.fullmatch('W/"[0-9a-f]{24}"', etag)
                    if "silent" in path:
                        app.service.cancel_loads()
                        continue
                    for tags, expected in [
                        (etag, 304),
                        (etag[2:], 304),
                        ("*", 304),
                        (f'"x", {etag} ,W/"y"', 304),
                        ('"x"', 200),
                        (etag[2:-1], 200),
                        ("", 200),
                    ]:
                        again, said, body = await ask(app, path, headers={"If-None-Match": tags})
                        assert (again, tags) == (expected, tags)
                        if again == 304:
                            assert body == b""
                            names = ("etag", "age", "cache-control")
                            assert [said[name] for name in names] == [headers[name] for name in names]
                    await until_async(lambda: not app.service.sources["a"].running)

    app_run(main())


def test_what_came_early_has_its_age_when_the_last_one_came(app_world: World) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def handler(head: str, body: bytes) -> Any:
            if "/slow" in head:
                await gate.wait()
            return {}

        async with app_upstream(handler) as url:
            table = {
                "quick": config.Upstream("quick", f"{url}/quick", ttl=10.0, timeout=HANG_LIMIT),
                "slow": config.Upstream("slow", f"{url}/slow", ttl=60.0, timeout=HANG_LIMIT),
            }
            async with living(table) as app:
                for later, age, state, control in (
                    (4.0, 4.0, "fresh", "max-age=10"),
                    (11.0, 11.0, "stale", "no-cache"),
                ):
                    answer = asyncio.create_task(ask(app, "/aggregate?deadline_ms=20000"))
                    await until_async(lambda: app.service.sources["quick"].last_success is not None)
                    await until_async(lambda: not app.service.sources["quick"].running)
                    app_world.now += later
                    gate.set()
                    _, headers, body = await answer
                    part = json.loads(body)["sources"]["quick"]
                    assert (part["state"], part["age_s"], headers["cache-control"]) == (state, age, control)
                    gate.clear()
                    app.service.sources["quick"].last_success = None
                    for source in app.service.sources.values():
                        source.forget()

    app_run(main())


@pytest.mark.parametrize(
    ("headers", "client", "status"),
    [
        ({}, ("127.0.0.1", 5000), 200),
        ({}, ("::1", 5000), 200),
        ({}, ("192.0.2.1", 5000), 403),
        ({}, ("nonsense", 5000), 403),
        ({}, None, 403),
        ({}, ("127.0.0.1", 0), 403),  # what a server makes of X-Forwarded-For
        ({"X-Forwarded-For": "127.0.0.1:5000"}, ("127.0.0.1", 5000), 403),
        ({"Forwarded": "for=127.0.0.1"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 200),
        ({"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, ("::1", 5000), 200),
        ({"Origin": "http://localhost:8001", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "https://evil.example", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "null", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "http://[", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, ("127.0.0.1", 5000), 400),  # rebound
        ({"Sec-Fetch-Site": "cross-site", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Sec-Fetch-Site": "same-site", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Sec-Fetch-Site": "same-origin", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 200),
    ],
)
def test_knows_who_is_on_this_machine(
    headers: dict[str, str], client: tuple[str, int] | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AGGREGATE_TOKEN", raising=False)

    async def main() -> None:
        async with living({}) as app:
            got, _, body = await ask(app, "/cache/invalidate", "POST", headers, client)
            assert got == status, body
            monkeypatch.setenv("AGGREGATE_TOKEN", "secret")
            got, _, body = await ask(app, "/cache/invalidate", "POST", headers, client)
            assert got == (400 if status == 400 else 401) and b"secret" not in body
            got, _, _ = await ask(
                app, "/cache/invalidate", "POST", {"Authorization": "Bearer secret"}, ("192.0.2.1", 0)
            )
            assert got == 200

    app_run(main())


# ------------------------------------------------------------------------------------------------------- reports, stop


def dying(flag: str) -> Any:
    """``summarise`` in a worker that is killed in the middle of it, if there is no file ``flag`` yet."""
    return functools.partial(
        eval,
        f"(__import__('os').path.exists({flag!r}) or (open({flag!r}, 'w').close(),"
        " __import__('os').kill(__import__('os').getpid(), 9)),"
        " __import__('api.report').report.summarise({k: v for k, v in globals().items() if k != '__builtins__'}))[1]",
    )


def test_reports_though_workers_die(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    async def outcomes(*_: object) -> Any:
        return array("d", range(100)), array("d", [0.1] * 100), ["ok"] * 99 + ["timeout"]

    async def main() -> None:
        async with (
            app_upstream(lambda *_: asyncio.sleep(0, {})) as url,
            living({"a": config.Upstream("a", url)}) as app,
        ):
            status, headers, body = await ask(app, "/report")
            assert (status, headers["content-type"]) == (503, "application/problem+json")  # no database
            service = app.service
            assert len(service.tasks) == 2  # and no host was looked at for nothing
            assert service.reports.stats().available == 16
            service.history.outcomes = outcomes
            monkeypatch.setattr(pages, "summarise", dying(str(tmp_path / "flag")))
            status, _, body = await ask(app, "/report?hours=1")
            said = json.loads(body)["sources"]["a"]
            assert (status, said["results"], said["availability"], said["errors"]) == (200, 100, 0.99, {"timeout": 1})
            assert (said["host"]["name"], said["host"]["error"]) == ("127.0.0.1", None)
            assert (service.processes.stats().retried, service.processes.stats().failed) == (1, 0)
            for worker in service.processes._idle:  # and one that dies while it has nothing to do
                os.kill(worker._started[0].pid, signal.SIGKILL)
            answers = await asyncio.gather(*(ask(app, "/report?hours=1") for _ in range(8)))
            assert [status for status, _, _ in answers] == [200] * 8
            assert all(json.loads(body)["sources"]["a"]["results"] == 100 for _, _, body in answers)
            assert [service.reports.try_acquire() for _ in range(17)] == [True] * 16 + [False]
            status, headers, _ = await ask(app, "/report")
            assert (status, headers["retry-after"]) == (503, "2")
            for _ in range(16):
                service.reports.release()
            await service.processes.close(0.0)
            status, headers, body = await ask(app, "/report")
            assert (status, headers["retry-after"], json.loads(body)["detail"]) == (
                503,
                "2",
                "no report could be computed",
            )
            assert service.reports.stats().available == 16

    app_run(main())


def test_stops_though_an_upstream_and_a_resolver_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "GRACE", 0.01)
    gate = threading.Event()

    def inspect(url: str) -> dict[str, Any]:
        gate.wait()
        return {}

    monkeypatch.setattr("api.service.inspect_host", inspect)

    async def main() -> None:
        async with app_upstream(lambda *_: asyncio.sleep(0)) as url:
            table = {"silent": config.Upstream("silent", url, timeout=60.0, retries=0)}
            async with living(table) as app:
                service = app.service
                source = service.sources["silent"]
                look = service.inspection("silent")
                assert service.inspection("silent") is look
                waiting = asyncio.create_task(ask(app, "/aggregate/silent?deadline_ms=30000"))
                await until_async(lambda: source.calls == 1)
                assert (await ask(app, "/health/ready"))[0] == 200
                service.stop()
                service.stop()
                assert (await ask(app, "/health/ready"))[0] == 503
                status, _, body = await waiting
                assert (status, json.loads(body)["sources"]["silent"]["state"]) == (503, "timeout")
                source.refresh(())  # begun after that
                await until_async(lambda: source.calls == 2)
            assert look.cancelled() and not source.running and not service.tasks

    try:
        app_run(main())
    finally:
        gate.set()


def test_is_told_of_signals_before_the_server() -> None:
    heard: list[Any] = []

    def server(number: int, frame: object) -> None:
        heard.append(number)

    async def main() -> None:
        with handled_before_the_server(lambda: heard.append("told")) as force:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            assert heard == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
            await ticks(50)
            assert heard[3:] == ["told"] * 3
            force()
            assert heard[6:] == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is server

    async def beside() -> None:
        with handled_before_the_server(lambda: heard.append("never")) as force:
            assert signal.getsignal(signal.SIGINT) is server
            force()

    before = {number: signal.signal(number, server) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(main())
        count = len(heard)
        thread = threading.Thread(target=lambda: asyncio.run(beside()))
        thread.start()
        thread.join()
        assert len(heard) == count and signal.getsignal(signal.SIGINT) is server
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_never_blocks_its_loop() -> None:
    program = """if True:
        import asyncio, sys
        import aggregate_app
        PATHS = ("/", "/aggregate", "/aggregate?sources=news", "/aggregate/flaky", "/events", "/health", "/health/live",
                 "/health/ready", "/history/news", "/metrics", "/openapi.json", "/report", "/nothing")

        async def ask(app, path, method="GET"):
            statuses, answered = [], asyncio.Event()
            async def receive():
                await answered.wait()
                return {"type": "http.disconnect"}
            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                else:
                    answered.set()
            scope = {"type": "http", "method": method, "path": path.partition("?")[0], "headers": [],
                     "query_string": path.partition("?")[2].encode(), "client": ("127.0.0.1", 9)}
            await app(scope, receive, send)
            return statuses[0]

        async def main():
            app = aggregate_app.create_app(None, 0)
            async with aggregate_app.lifespan(app):
                await ask(app, "/aggregate")
                watch_the_loop()
                imported = set(sys.modules)
                for _ in range(8):
                    asked = [asyncio.create_task(ask(app, path), name=path) for path in PATHS for _ in range(3)]
                    statuses = await asyncio.gather(*asked, ask(app, "/cache/invalidate", "POST"))
                    assert set(statuses) <= {200, 404, 503}, statuses
                assert sys.modules.keys() == imported, "an import holds the loop for as long as the disk likes"
                print("done")
        asyncio.run(main(), debug=True)
    """
    assert holds_the_loop(program, "done") == set()
