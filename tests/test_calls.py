"""api/upstreams.py: when a request is sent, and when none: pauses, places, circuit, rate; what is read of answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from api import aggregate, config, upstreams
from api.parts import Data, Part, UpstreamError, read_data
from coordination import Semaphore
from tests.helpers.api import app_run
from tests.helpers.base import HANG_LIMIT, World, limits, ticks


class Scripted:
    """An upstream on a socket: each request gets the next of ``answers`` (status, headers), the last one for ever."""

    def __init__(self, *answers: tuple[int, str], drops: bool = False) -> None:
        self.answers, self.drops, self.requests = list(answers), drops, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            for served in range(1000):
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                if self.drops and served:
                    break
                status, more = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                writer.write(f"HTTP/1.1 {status} X\r\n{more}Content-Length: 2\r\n\r\n{{}}".encode())
        writer.close()

    @contextlib.asynccontextmanager
    async def source(self, world: World, **options: Any) -> AsyncIterator[upstreams.Source]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server, upstreams.make_session(99) as session:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            given = {"timeout": HANG_LIMIT, "ttl": 0.01, "stale": 0.0, "stale_if_error": 0.0, **options}
            yield upstreams.Source(config.Upstream("a", url, {"k": "0"}, **given), session, Semaphore(99), world.clock)


class Gated(upstreams.Source):
    """A source whose requests wait for ``gate`` and then do what ``result`` says."""

    def __init__(self, world: World, **options: Any) -> None:
        upstream = config.Upstream("a", "http://127.0.0.1/", {"k": "0"}, **{"timeout": HANG_LIMIT, **options})
        super().__init__(upstream, None, Semaphore(99), world.clock)  # type: ignore[arg-type]
        self.gate, self.result, self.sent = asyncio.Event(), list[Any](), list[str]()

    async def _fetch(self, key: config.Key) -> Data:
        self.sent.append(key[0])
        await self.gate.wait()
        result = self.result.pop(0) if self.result else Data(b"1")
        result = result() if callable(result) else result
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Data)
        return result


async def part_of(source: upstreams.Source, key: object = 0) -> Part:
    return (await aggregate.Plan.of({"a": source}, {"k": str(key)}, HANG_LIMIT).gather())["a"]


@pytest.mark.parametrize(
    ("status", "after", "pause", "state"),
    [
        (429, "60", 60.0, "paused"),
        (429, "7200", 300.0, "paused"),  # max_pause
        (429, None, 1.0, "paused"),
        (429, "0", 1.0, "paused"),
        (503, "60", 60.0, "error"),
        (503, "7200", 300.0, "error"),
        (404, "60", 60.0, "error"),
        (404, None, 1.0, "error"),
    ],
)
def test_nothing_is_sent_while_the_upstream_wants_it_so(
    status: int, after: str | None, pause: float, state: str
) -> None:
    """A 429 is about all keys, and no failure; Retry-After of another status is about its key."""

    async def main() -> None:
        world, upstream = World(), Scripted((status, f"Retry-After: {after}\r\n" if after else ""), (200, ""))
        async with upstream.source(world, retries=3 if status != 503 else 0, failures=2) as source:
            part = await part_of(source)
            assert (part.state, part.error, part.retry_after) == ("error", f"http: {status}", pause)
            for passed in (0.0, pause - 0.25):
                world.now += passed
                part = await part_of(source)
                assert (part.state, part.retry_after) == (state, pause - passed)
            assert (await part_of(source, "another")).state == ("paused" if status == 429 else "fresh")
            assert upstream.requests == source.calls == 1 + (status != 429)
            assert (source.breaker.stats().failures, source.failures) == (0, 1)
            assert source.refused == {"open": 0, "paused": 3 if status == 429 else 0, "busy": 0}
            world.now += 0.25
            assert (await part_of(source)).state == "fresh"

    app_run(main())


def test_who_waits_for_a_place_sends_nothing_once_the_circuit_is_open() -> None:
    async def main() -> None:
        source = Gated(World(), concurrency=4, failures=5, retries=0)
        source.result = [UpstreamError("timeout")] * 80
        asking = [asyncio.create_task(part_of(source, key)) for key in range(80)]
        await ticks(50)
        assert len(source.sent) == 4 and source._places.stats().waiting == 76
        source.gate.set()
        states = [(await task).state for task in asking]
        assert (len(source.sent), states.count("error"), states.count("open")) == (5, 5, 75)
        assert (source.failures, source.refused["open"]) == (5, 75)

    app_run(main())


def test_the_queue_for_places_is_bounded() -> None:
    async def main() -> None:
        source = Gated(World(), concurrency=1, queue=2, timeout=0.5)
        with limits(0.5) as up:
            asking = [asyncio.create_task(part_of(source, key)) for key in range(3)]
            await ticks(50)
            part = await part_of(source, 3)
            assert (part.state, part.error) == ("busy", "2 calls wait already")
            assert source.sent == ["0"] and source.refused["busy"] == 1
            up()
            parts = [await task for task in asking]
        assert [(part.state, part.error) for part in parts] == [
            ("error", "timeout: no answer within 0.5 s"),
            *[("busy", "no place for a call within 0.5 s")] * 2,
        ]
        assert source._places.stats().available == 1 and source._all_places.stats().available == 99
        source.gate.set()
        assert (await part_of(source, 9)).state == "fresh"
        none_waits = Gated(World(), concurrency=1, queue=0)
        first = asyncio.create_task(part_of(none_waits, 0))
        await ticks(50)
        assert (await part_of(none_waits, 1)).state == "busy"
        none_waits.gate.set()
        assert (await first).state == "fresh"

    app_run(main())


def test_no_second_try_is_sent_once_the_circuit_is_open() -> None:
    """Another call opens it while the first one fails, and is about to be tried again."""

    async def main() -> None:
        source = Gated(World(), failures=1, retries=5)

        def fails() -> UpstreamError:
            source.breaker.permit().failure()
            return UpstreamError("connect")

        source.result = [fails]
        source.gate.set()
        assert ((await part_of(source)).state, source.sent) == ("open", ["0"])

    app_run(main())


@pytest.mark.parametrize(
    ("options", "results", "opens"),
    [
        ({}, "f....f.f...f........f..f" * 5, False),  # a quarter at random
        ({}, "ffff." * 3 + "ffff", False),  # never five in a row, and not twenty yet
        ({}, "ffff." * 3 + "ffff.", True),
        ({}, "fffff", True),
        ({"failures": 1000}, "." * 10 + "f" * 9, False),
        ({"failures": 1000}, "." * 10 + "f" * 10, True),
        ({"failures": 1000, "ratio": 0}, "f" * 60, False),
        ({"failures": 1000, "ratio": 0.9, "minimum": 2}, "f.", False),
        ({"failures": 1000, "ratio": 0.9, "minimum": 2}, "ff", True),
    ],
)
def test_a_circuit_opens_by_share_or_in_a_row(options: dict[str, Any], results: str, opens: bool) -> None:
    async def main() -> None:
        source = Gated(World(), retries=0, keys=2000, rate=0.0, **options)
        source.gate.set()
        for number, result in enumerate(results):
            assert source.breaker.state == "closed"
            source.result = [UpstreamError("connect") if result == "f" else Data(b"1")]
            await part_of(source, number)
        assert source.breaker.state == ("open" if opens else "closed")

    app_run(main())


def test_a_probe_has_the_time_of_a_call() -> None:
    for timeout, reset, least in ((2.0, 0.5, 2.0), (0.5, 2.0, 2.0)):
        source = Gated(World(), timeout=timeout, reset=reset)
        assert source.breaker.probe_timeout == least


def test_what_is_sent_is_counted() -> None:
    """A kept connection that ends at its second request: the client must not send that again by itself."""

    async def main() -> None:
        world, upstream = World(), Scripted((200, ""), drops=True)
        async with upstream.source(world, retries=0) as source:
            states = []
            for key in range(4):
                states.append((await part_of(source, key)).state)
                assert upstream.requests == source.calls == key + 1
            assert states == ["fresh", "error"] * 2

    app_run(main())


def test_made_up_parameters_are_bounded_by_the_rate() -> None:
    async def main() -> None:
        world = World()
        source = Gated(world, rate=50.0, queue=1000)
        source.gate.set()
        states = [(await part_of(source, key)).state for key in range(150)]
        assert (len(source.sent), states.count("fresh"), states.count("busy")) == (50, 50, 100)
        world.now += 1.0
        assert [(await part_of(source, key)).state for key in range(200, 251)] == ["fresh"] * 50 + ["busy"]
        assert source.breaker.state == "closed" and source.failures == 0
        free = Gated(world, rate=0.0)
        free.gate.set()
        assert {(await part_of(free, key)).state for key in range(150)} == {"fresh"}

    app_run(main())


@pytest.mark.parametrize(
    ("body", "keep", "expected"),
    [
        (b'{"id": 12345678901234567890123, "price": 1.10}', "", None),
        (b'[1e2, -0.0, 1.0E+2, "\\u00e9", {"a" : 1}]', "", None),
        (b'\xef\xbb\xbf \r\n{"a": 1}\n', "", b'{"a": 1}'),
        (b'{"a": {"b": [1, 2.50]}}', "a.b", b"[1,2.5]"),
        (b"0.30", "", None),
        (b"[" * 150 + b"]" * 150, "", None),
        (b"[" + b'{"price": 1.10},' * 300 + b"1E2]", "", None),
        (b"[" * 300 + b"]" * 300, "", "not_json"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "", "not_json"),
        (b'{"a": 1', "", "not_json"),
        (b'{"a": 1} {}', "", "not_json"),
        (b'{"a": NaN}', "", "not_json"),
        (b'{"a": "\xff"}', "", "not_json"),
        (b'{"a": "\\ud800"}', "", "not_json"),
        (b"", "", "not_json"),
        (b'{"a": 1}', "b", "missing: b"),
        (b"[]", "b", "missing: b"),
    ],
)
def test_an_answer_is_checked_and_passed_on_as_it_came(body: bytes, keep: str, expected: bytes | str | None) -> None:
    if isinstance(expected, str):
        with pytest.raises(UpstreamError, match=f"^{expected}$"):
            read_data(body, keep)
    else:
        assert read_data(body, keep).encoded == (body if expected is None else expected)


def test_no_data_is_a_503_with_the_least_wait_of_its_sources() -> None:
    async def main() -> None:
        world = World()
        sources = {name: Gated(world) for name in ("a", "b", "c")}
        for source, seconds in zip(sources.values(), (60.0, 30.5, 7200.0), strict=True):
            source.pause(seconds)
        for asked, later in (("abc", b"31"), ("ac", b"60"), ("c", b"300")):
            plan = aggregate.Plan.of({name: sources[name] for name in asked}, {}, HANG_LIMIT)
            answer = aggregate.assemble(plan, await plan.gather(), 0.0)
            assert (answer.status, dict(answer.headers)[b"retry-after"]) == (503, later)
            assert set(answer.states.values()) == {"paused"}
        assert not any(source.sent for source in sources.values())

    app_run(main())
