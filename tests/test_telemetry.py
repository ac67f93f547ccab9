"""api/telemetry.py: events, log lines, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import re
import threading
from typing import IO, Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api import config, pages, telemetry
from runtime import monitor
from tests.helpers.api import app_run, app_upstream, ask, living
from tests.helpers.base import HANG_LIMIT, World, ticks, until_async

EVENT_STREAM = "text/event-stream; charset=utf-8"


def app_told(parts: list[bytes]) -> list[tuple[int, str, dict[str, Any]]]:
    found = re.findall(rb"id: [0-9a-f]{8}-(\d+)\nevent: (\w+)\ndata: (.*)\n\n", b"".join(parts))
    return [(int(number), kind.decode(), json.loads(data)) for number, kind, data in found]


def event_ids(text: bytes) -> list[str]:
    return [found.decode() for found in re.findall(rb"^id: (.*)$", text, re.M)]


@pytest.mark.parametrize(
    "last", ["00000000-1", "1", "0", "nonsense", "-", "é", "{epoch}-99", "{epoch}-x", "{epoch}-1e1"]
)
def test_who_comes_from_another_life_or_worker_gets_all_that_is_known(last: str) -> None:
    async def main() -> None:
        events = telemetry.Events()
        for number in range(3):
            events.publish("refresh", {"n": number})
        parts = list[bytes]()
        async for part in events.stream(last.replace("{epoch}", events._epoch)):
            parts.append(part)
            if len(parts) == 2:
                events.end()
        assert parts[0] == b"retry: 2000\n\n"
        assert [data["n"] for _, _, data in app_told(parts)] == [0, 1, 2]

    app_run(main())


def test_events_in_order_again_and_to_the_end() -> None:
    async def main() -> None:
        events = telemetry.Events(keep=4)

        async def listen(last: str = "") -> list[bytes]:
            assert events.join("a")
            try:
                return [part async for part in events.stream(last)]
            finally:
                events.leave("a")

        def numbered(number: int) -> str:
            return f"{events._epoch}-{number}"

        for i in (1, 2, 3):
            events.publish("refresh", {"n": i})
        tasks = [asyncio.create_task(listen(last)) for last in ("", numbered(1), numbered(0), numbered(99))]
        await ticks(50)
        assert events.streams == 4
        for i in (4, 5):
            events.publish("breaker", {"n": i})
            await ticks(50)
        for i in range(6, 12):  # more than the ring holds, before anybody may run: the oldest are missed
            events.publish("refresh", {"n": i})
        await ticks(50)
        events.end()
        new = [4, 5, 8, 9, 10, 11]
        every = [1, 2, 3, *new]  # also for who heard of number 99: that was another life
        for task, expected in zip(tasks, ([*new], [2, 3, *new], every, every), strict=True):
            parts = await task
            told = app_told(parts)
            assert parts[0] == b"retry: 2000\n\n"
            assert [number for number, _, _ in told] == [data["n"] for _, _, data in told] == expected
        assert events.streams == 0
        assert app_told(await listen(numbered(8))) == []  # ended: so are those that come now

    app_run(main())


def test_tells_events_and_lets_go_of_those_who_left(app_world: World) -> None:
    async def handler(head: str, body: bytes) -> Any:
        return 404 if "/gone" in head else None

    async def main() -> None:
        async with app_upstream(handler) as url:
            table = {
                "gone": config.Upstream("gone", f"{url}/gone"),
                "silent": config.Upstream("silent", url, timeout=0.01, retries=0, failures=2, window=100.0),
            }
            async with living(table) as app:
                service, leave, parts = app.service, asyncio.Event(), list[bytes]()
                first = asyncio.create_task(ask(app, "/events", sent=parts, leave=leave))
                second = asyncio.create_task(ask(app, "/events", sent=(rest := list[bytes]())))
                await until_async(lambda: service.events.streams == 2)
                assert json.loads((await ask(app, "/health"))[2])["streams"] == 2
                await ask(app, "/aggregate/gone?deadline_ms=20000")
                for _ in range(2):
                    await ask(app, "/aggregate/silent?deadline_ms=20000")
                await ask(app, "/cache/invalidate", "POST")
                await until_async(lambda: b"invalidate" in b"".join(parts))
                leave.set()
                await first
                assert service.events.streams == 1
                told = app_told(parts)
                assert sorted(kind for _, kind, _ in told) == ["breaker", "invalidate", "refresh", "refresh", "refresh"]
                change = next(data for _, kind, data in told if kind == "breaker")
                assert (change["source"], change["previous"], change["state"]) == ("silent", "closed", "open")
                refreshes = [data for _, kind, data in told if kind == "refresh"]
                assert refreshes[0]["error"] == "http: 404"
                assert {data["state"] for data in refreshes} == {"error"}
                assert told[-1][2]["sources"] == ["gone", "silent"]
                before = b"".join(parts)
                parts.clear()
                leave.clear()
                again = asyncio.create_task(
                    ask(app, "/events", headers={"Last-Event-ID": event_ids(before)[-2]}, sent=parts)
                )
                await until_async(lambda: service.events.streams == 2)
                await ticks(50)
                service.stop()  # streams do not keep a server
                for task in (second, again):
                    assert (await task)[0] == 200
                assert app_told(parts) == told[-1:] and app_told(rest) == told
                assert service.events.streams == 0

    app_run(main())


def test_bounds_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "STREAMS", 1)

    async def main() -> None:
        async with living({}) as app:
            first = asyncio.create_task(ask(app, "/events"))
            await until_async(lambda: app.service.events.streams == 1)
            status, headers, _ = await ask(app, "/events")
            assert (status, headers["retry-after"]) == (503, "5")
            app.service.stop()
            await first

    app_run(main())


def test_streams_are_counted_when_they_are_admitted() -> None:
    """130 at once, and each client has a few; those that never began are let go, too."""

    async def main() -> None:
        async with living({}) as app:
            clients = [f"192.0.2.{number % 65}" for number in range(130)]
            asking = [asyncio.create_task(ask(app, "/events", client=(client, 5000))) for client in clients]
            greedy = [asyncio.create_task(ask(app, "/events", client=("192.0.2.0", 5000))) for _ in range(20)]
            await until_async(lambda: sum(task.done() for task in asking) == 30 and all(map(asyncio.Task.done, greedy)))
            assert app.service.events.streams == 100
            assert {task.result()[0] for task in greedy} == {503}
            for task in asking[:50]:
                task.cancel()
            await asyncio.wait(asking[:50])
            assert app.service.events.streams == 50
            greedy = [asyncio.create_task(ask(app, "/events", client=("192.0.2.0", 5000))) for _ in range(20)]
            await until_async(lambda: sum(map(asyncio.Task.done, greedy)) == 13)
            assert {task.result()[0] for task in greedy if task.done()} == {429}
            app.service.stop()
            await asyncio.wait([*asking, *greedy])
            assert app.service.events.streams == 0 and not app.service.events._clients

    app_run(main())


def test_request_log_loses_only_what_is_too_much_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader pauses: 50 lines wait, the others are lost and counted; it goes on: all 50, in order."""
    monkeypatch.setattr(telemetry, "WAITING", 50)

    async def main() -> None:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        lines: list[bytes] = []

        def read() -> None:
            with open(reading, "rb") as source:
                source.read(filled)
                lines.extend(source)

        with os.fdopen(writing, "wb", buffering=0) as output:
            log = telemetry.RequestLog(output, clock=lambda: 1e9 + 0.25)
            for i in range(30):
                log.note("request", f"r{i}", {"i": i})
            await until_async(log._waiting.empty)  # taken over, and written by nobody
            for i in range(30, 80):
                log.note("request", f"r{i}", {"i": i})
            assert log.lost == 30
            reader = threading.Thread(target=read)
            reader.start()
            await until_async(lambda: log._done == 50)
            log.note("request", "last", {"i": 50})
            await log.close(HANG_LIMIT)
            log.note("request", "too late", {})
        await asyncio.to_thread(reader.join)
        said = [json.loads(line) for line in lines]
        assert [line["i"] for line in said] == list(range(51))
        assert said[0] == {"time": "2001-09-09T01:46:40.250Z", "event": "request", "request_id": "r0", "i": 0}
        assert log.lost == 30

    app_run(main())


def test_request_log_goes_on_when_nobody_reads() -> None:
    class Full(io.RawIOBase):
        """As a pipe that must not block and is full."""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> None:
            return None

    class Short(io.RawIOBase):
        def __init__(self) -> None:
            self.text = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.text += bytes(data[:7])
            return len(data[:7])

    async def main() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        shut = io.BytesIO()
        shut.close()
        outputs: list[IO[bytes]] = [os.fdopen(writing, "wb", buffering=0), shut, cast("IO[bytes]", Full())]
        for output in outputs:
            log = telemetry.RequestLog(output)
            for i in range(2):
                log.note("request", str(i), {})
                await until_async(lambda: log._done > i)  # noqa: B023
            log.note("request", "unlikely", {"what": object()})
            await log.close(HANG_LIMIT)
            assert (log.lost, log._thread.is_alive()) == (3, False)
            output.close()
        short = Short()
        log = telemetry.RequestLog(cast("IO[bytes]", short))
        await ticks(50)
        log.note("request", "x" * 100, {})
        await log.close(HANG_LIMIT)
        assert json.loads(short.text)["request_id"] == "x" * 100 and log.lost == 0
        none = telemetry.RequestLog(None)
        none.note("request", "x", {})
        assert (none.lost, none._waiting.qsize()) == (0, 0)

    app_run(main())


def test_notes_every_request_once_and_the_loads_behind_it(app_world: World) -> None:
    asked = 0

    async def handler(head: str, body: bytes) -> Any:
        nonlocal asked
        asked += 1
        return {"serial": 1} if asked == 1 else 404

    async def main() -> list[dict[str, Any]]:
        async with app_upstream(handler) as url:
            output = io.BytesIO()
            output.close = lambda: None  # type: ignore[method-assign]
            async with living({"a": config.Upstream("a", url, ttl=10.0)}, output) as app:
                for i in range(3):  # loaded, from the cache, by a known plan
                    path = "/aggregate/a?deadline_ms=20000"
                    status, headers, _ = await ask(app, path, headers={"X-Request-ID": f"r{i}"})
                    assert (status, headers["x-request-id"]) == (200, f"r{i}")
                app_world.now += 10.0
                await ask(app, "/aggregate/a?x=1", headers={"X-Request-ID": "wrong"})
                await ask(app, "/aggregate/a", headers={"X-Request-ID": "stale"})
                await until_async(lambda: not app.service.sources["a"].running)
            return [json.loads(line) for line in output.getvalue().splitlines()]

    lines = app_run(main())
    requests = [line for line in lines if line["event"] == "request"]
    expected = [("r0", 200), ("r1", 200), ("r2", 200), ("wrong", 422), ("stale", 200)]
    assert [(line["request_id"], line["status"]) for line in requests] == expected
    assert [line["sources"] for line in requests] == [{"a": "fresh"}] * 3 + [None, {"a": "stale"}]
    assert requests[0]["query"] == "deadline_ms=20000" and requests[0]["client"] == "127.0.0.1"
    failed = [line for line in lines if line["event"] == "failed load"]
    assert [(line["request_id"], line["error"]) for line in failed] == [("stale", "http: 404")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)


def test_events_pass_through_a_proxy_and_a_head_opens_no_stream(app_world: World) -> None:
    async def main() -> None:
        async with living({}) as app:
            status, headers, body = await ask(app, "/events", "HEAD")
            assert (status, headers["x-accel-buffering"], headers["content-type"]) == (200, "no", EVENT_STREAM)
            assert body == b"" and app.service.events.streams == 0

    app_run(main())


def test_any_2xx_with_json_is_an_answer(app_world: World) -> None:
    async def handler(head: str, body: bytes) -> Any:
        return int(head.split()[1][1:])

    async def main() -> None:
        async with app_upstream(handler) as url:
            table = {str(n): config.Upstream(str(n), f"{url}/{n}", retries=0) for n in (201, 202, 299, 300)}
            async with living(table) as app:
                sources = json.loads((await ask(app, "/aggregate?deadline_ms=20000"))[2])["sources"]
                assert [sources[str(n)]["data"] for n in (201, 202, 299)] == [201, 202, 299]
                assert sources["300"]["error"] == "http: 300"

    app_run(main())


def test_metrics_are_those_of_its_health(app_world: World) -> None:
    async def handler(head: str, body: bytes) -> Any:
        return 404 if "/gone" in head else {}

    async def main() -> None:
        async with app_upstream(handler) as url:
            table = {name: config.Upstream(name, f"{url}/{name}") for name in ("good", "gone")}
            async with living(table) as app:
                for _ in range(4):
                    await ask(app, "/aggregate?deadline_ms=20000")
                text = (await ask(app, "/metrics"))[2].decode()
                health = json.loads((await ask(app, "/health"))[2])
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            for sample in family.samples:
                assert found.setdefault(sample.name, {}).get(tuple(sample.labels.values())) is None
                found[sample.name][tuple(sample.labels.values())] = sample.value
        for name, source in health["sources"].items():
            for state, count in source["answers"].items():
                assert found["aggregate_answers_total"][name, state] == count == 4
            assert found["aggregate_upstream_calls_total"][name,] == source["calls"] == 1
            assert found["aggregate_failed_loads_total"][name,] == source["failed_loads"] == (name == "gone")
            assert found["aggregate_cache_entries"][name,] == source["cache"]["entries"] == (name == "good")
            assert found["aggregate_circuit_open"][name,] == 0.0
            assert found["aggregate_load_duration_seconds_count"][name,] == 1
            assert found["aggregate_load_duration_seconds_bucket"]["+Inf", name] == 1
        assert found["aggregate_request_duration_seconds_count"]["/aggregate", "200"] == 4
        assert found["process_start_time_seconds"][()] > 0
        assert found["aggregate_rows_lost_total"][()] == found["aggregate_log_lines_lost_total"][()] == 0.0
        assert found["aggregate_database_up"][()] == 0.0

    app_run(main())


def test_refused_loads_are_no_failed_ones_and_each_worker_says_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with (
            app_upstream(lambda *_: asyncio.sleep(0, 429)) as url,
            living({"a": config.Upstream("a", url)}) as app,
        ):
            for state in ("error", "paused"):
                part = json.loads((await ask(app, "/aggregate?deadline_ms=20000"))[2])["sources"]["a"]
                assert part["state"] == state
            text = (await ask(app, "/metrics"))[2].decode()
            assert 'aggregate_failed_loads_total{source="a"} 1.0' in text
            assert 'aggregate_refused_loads_total{reason="paused",source="a"} 1.0' in text
            assert "worker" not in text and "quantile" not in text
            monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
            for line in (await ask(app, "/metrics"))[2].decode().splitlines():
                assert line.startswith("#") or f'worker="{os.getpid()}"' in line

    app_run(main())


def test_requests_are_counted_by_route_and_status() -> None:
    async def main() -> None:
        async with (
            app_upstream(lambda *_: asyncio.sleep(0, {})) as url,
            living({"a": config.Upstream("a", url)}) as app,
        ):
            paths = [
                "/aggregate?deadline_ms=20000",
                "/aggregate",
                "/aggregate/a",
                "/aggregate/b",
                "/x/y",
                "/health",
                "/%00",
            ]
            for path in [*paths, "/aggregate?x=1", "/events/a/b", "/history/a"]:
                await ask(app, path)
            await ask(app, "/aggregate", headers={"Host": "evil.example"})
            await ask(app, "/cache/invalidate")
            counts = {key: durations.told()[0][-1][1] for key, durations in app.service.requests.items()}
        assert counts == {
            ("/aggregate", 200): 2,
            ("/aggregate", 422): 1,
            ("/aggregate", 400): 1,
            ("/aggregate/{source}", 200): 1,
            ("/aggregate/{source}", 404): 1,
            ("other", 404): 3,
            ("/health", 200): 1,
            ("/history/{source}", 503): 1,
            ("/cache/invalidate", 405): 1,
        }

    app_run(main())


def test_histogram() -> None:
    durations = monitor.Histogram()
    for seconds in (0.0, 0.005, 0.0051, 0.3, 10.0, 11.0):
        durations.observe(seconds)
    buckets, total = durations.told()
    assert dict(buckets) == {
        "0.005": 2,
        "0.01": 3,
        "0.025": 3,
        "0.05": 3,
        "0.1": 3,
        "0.25": 3,
        "0.5": 4,
        "1.0": 4,
        "2.5": 4,
        "5.0": 4,
        "10.0": 5,
        "+Inf": 6,
    }
    assert total == pytest.approx(21.3101)
