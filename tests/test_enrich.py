"""logs/enrich.py: metadata from a cache, an API, or not at all."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import math
import os
import re
import time
from collections.abc import Coroutine, Iterator
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

from logs import enrich as le
from logs import metadata as lm
from logs.parse import Metadata
from sandbox import logs as sl
from tests.helpers.base import (
    HANG_LIMIT,
    SETTINGS,
    World,
    limits,
    run_task,
    ticks,
    until_async,
)
from tests.helpers.mechanisms import LoopMachine


@pytest.fixture
def logs_enrich_api() -> Iterator[sl.MetadataApi]:
    with sl.MetadataApi() as api:
        yield api


def logs_enrich_right(service: str) -> Metadata:
    right = sl.metadata_of(service)
    assert right is not None
    return Metadata(**right)


def logs_enrich_new(api: sl.MetadataApi, world: World | None = None, **options: Any) -> le.Enricher:
    """One whose time stands still, without chance: retries come at once, nothing expires early."""
    return le.Enricher(api.url(), **{"clock": (world or World()).clock, "rng": lambda: 0.0, "timeout": 20.0, **options})


def queued(enricher: le.Enricher) -> int:
    """Names in its queue."""
    assert enricher._pool is not None
    return enricher._pool.stats().queued


async def loaded(enricher: le.Enricher, *services: str) -> list[lm.Found]:
    """What is known of them when nothing is under way any more."""
    await enricher.wait(services, math.inf)
    await until_async(lambda: not enricher._asked)
    return [enricher.look(service) for service in services]


def test_a_thousand_want_one_service(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "held"
            assert {enricher.look("a") for _ in range(1000)} == {None}
            loads = [asyncio.create_task(enricher.load("a")) for _ in range(1000)]
            waits = [asyncio.create_task(enricher.wait(["a"], math.inf)) for _ in range(100)]
            await until_async(lambda: logs_enrich_api.requests["a"] == 1)
            assert not any(wait.done() for wait in waits)
            assert enricher._flights.stats().flights == 1
            logs_enrich_api.mode = "ok"
            assert set(await asyncio.gather(*loads)) == {logs_enrich_right("a")}
            await asyncio.gather(*waits)
            assert enricher.look("a") == await enricher.load("a") == logs_enrich_right("a")
        assert logs_enrich_api.requests == {"a": 1}
        assert enricher.stats().loads == 1

    run_task(main())


def test_all_services_are_known_after_a_wait(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        names = [sl.service_name(n) for n in range(500)]
        async with logs_enrich_new(logs_enrich_api) as enricher:
            await enricher.wait(iter(names), math.inf)
            assert [enricher.look(name) for name in names] == [logs_enrich_right(name) for name in names]
            await enricher.wait(names, math.inf)
        assert logs_enrich_api.requests == dict.fromkeys(names, 1)
        assert logs_enrich_api.stats().connections <= 8
        assert len(enricher._known) == 500
        assert [enricher.look(name) for name in names] == [logs_enrich_right(name) for name in names], "after the close"

    run_task(main())


FAULTS = [  # the mode, the kind of failure, how many requests a load makes
    ("down", "connect", 0),
    ("silent", "timeout", 1),
    ("slow", "timeout", 1),
    ("drip", "timeout", 1),
    ("error", "status", 2),
    ("busy", "status", 1),  # it says that it wants to be left alone for longer than the load may last
    ("rubbish", "rubbish", 1),
    ("types", "rubbish", 1),
    ("not-utf8", "rubbish", 1),
    ("huge", "too large", 1),
    ("redirect", "redirect", 1),
    ("truncated", "connect", 2),
    ("refuse", "name", 1),
]


@pytest.mark.parametrize(("mode", "kind", "requests"), FAULTS, ids=[each[0] for each in FAULTS])
def test_faults(logs_enrich_api: sl.MetadataApi, mode: sl.Mode, kind: str, requests: int) -> None:
    async def main() -> None:
        world = World()
        async with logs_enrich_new(logs_enrich_api, world, timeout=0.9) as enricher:
            logs_enrich_api.mode = mode

            async def late(load: Coroutine[Any, Any, Any], asked: int) -> Any:
                """What it comes to; its time is up, if it is to be, when the API has been asked so often."""
                with limits(0.9) as up:
                    loading = asyncio.create_task(load)
                    if kind == "timeout":
                        await until_async(lambda: logs_enrich_api.requests["a"] == asked)
                        up()
                    return await loading

            assert await late(loaded(enricher, "a"), 1) == [None]
            assert enricher.stats().failed == {kind: 1}
            assert (enricher.stats().last_error or "").startswith(kind)
            assert await late(enricher.load("a"), 2) is None, "who fills in may ask again at once"
            assert logs_enrich_api.requests["a"] == 2 * requests
            if mode == "down":
                assert logs_enrich_api.stats().connections == 4
            logs_enrich_api.mode = "ok"
            world.now += 4.9
            assert enricher.look("a") is None
            assert not enricher._asked, "left alone"
            world.now += 0.2
            enricher.timeout = HANG_LIMIT
            assert await loaded(enricher, "a") == [None], "what is known of it already is given again"
            world.now += le.FRONT
            assert await loaded(enricher, "a") == [logs_enrich_right("a")]
        assert logs_enrich_api.stats().strays == 0
        assert enricher.stats().failures == 2

    run_task(main())


def test_nobody_listens() -> None:
    async def main() -> None:
        api = sl.MetadataApi()
        with api:
            pass
        async with logs_enrich_new(api) as enricher:
            assert await loaded(enricher, "a") == [None]
            assert enricher.stats().failed == {"connect": 1}
            assert "ClientConnectorError" in (enricher.stats().last_error or "")

    run_task(main())


GOOD: list[tuple[bytes, Metadata]] = [
    (b'{"team": "a", "environment": "b", "region": "c", "version": "d", "more": [1]}', Metadata("a", "b", "c", "d")),
    (b"{}", Metadata("", "", "", "")),
    (b' {"team": null, "version": "\\u00fc\\n\xc3\xbc"} ', Metadata("", "", "", "ü\nü")),
    (b'{"team": "%b"}' % (b"x" * 255), Metadata("x" * 255, "", "", "")),
    (b'{"team": "%b"}' % ("😀" * 255).encode(), Metadata("😀" * 255, "", "", "")),
    (b'{"team": "%b", "team": "a"}' % (b"x" * 65_511), Metadata("a", "", "", "")),
]


BAD = [
    *(
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"7",
        b"{",
        b'{"team": "a"',
        b"{'team': 'a'}",
        b'{"team": "a"} x',
        b"\0",
        b"\xff",
    ),
    *(
        b'{"team": 7}',
        b'{"region": true}',
        b'{"version": 1.5}',
        b'{"environment": {}}',
        b'{"team": ["a"]}',
        b'{"x": NaN}',
    ),
    *(b'{"team": "\\u0000"}', b'{"team": "\\ud800"}', b'{"team": "\xed\xa0\x80"}', b'{"team": "%b"}' % (b"x" * 256)),
    *(b"[" * 60_000, b'{"team":' * 5000, b'{"team": "%b", "team": "a"}' % (b"x" * 65_512)),
]


def test_bodies(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            for n, (body, right) in enumerate(GOOD):
                logs_enrich_api.answers[f"good-{n}"] = body
                assert await enricher.load(f"good-{n}") == right, body
            for n, body in enumerate(BAD):
                enricher.breaker.permit().success()  # in a world without time, the share of failures must stay low
                enricher.breaker.permit().success()
                logs_enrich_api.answers[f"bad-{n}"] = body
                assert await enricher.load(f"bad-{n}") is None, body
            assert enricher.stats().failed == {"rubbish": len(BAD) - 1, "too large": 1}
            assert enricher.breaker.stats().refused == 0

    run_task(main())


@SETTINGS
@given(
    body=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=300),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(Metadata._fields) | st.text(max_size=3), inner, max_size=4)
        ),
    ).map(lambda data: json.dumps(data).encode())
)
def test_any_body_is_metadata_or_an_error(body: bytes) -> None:
    try:
        found = lm.read_metadata(body)
    except lm.MetadataError as error:
        assert error.kind == "rubbish"
    else:
        assert all(type(text) is str and len(text) <= 255 and "\0" not in text for text in found)
        assert "".join(found).encode().decode() == "".join(found)


@pytest.mark.parametrize(
    ("url", "template"),
    [
        ("http://h", "http://h/{service}"),
        ("http://h:81/services/", "http://h:81/services/{service}"),
        ("https://h/s/{service}?v=1", "https://h/s/{service}?v=1"),
        ("http://h/s?name={service}", "http://h/s?name={service}"),
    ],
)
def test_templates(url: str, template: str) -> None:
    assert lm.make_template(url) == template


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h/x",
        "ftp://h/",
        "http://",
        "http:///x",
        "http://{service}/",
        "http://{service}.h/",
        "http://h:x/",
        "http://h/#{service}",
        "http://h:99999/",
        "http://{service}@h/",
    ],
)
def test_refuses_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        le.Enricher(url)


@SETTINGS
@given(name=st.text() | st.sampled_from(("", ".", "..", "/", "../x", "a?b#c", "%2e%2e", "@evil", "\r\nX: y", "\ud800")))
def test_a_name_stays_one_segment(name: str) -> None:
    path = lm.MetadataClient("http://user@h:81/s/{service}?v=1").address(name)
    query = lm.MetadataClient("http://h/s?name={service}&v=1").address(name)
    if path is None:
        assert query is None
        assert name in ("", ".", "..") or any("\ud800" <= char <= "\udfff" for char in name)
        return
    assert (path.host, path.port, path.raw_query_string, path.raw_fragment) == ("h", 81, "v=1", "")
    assert re.fullmatch(r"/s/[A-Za-z0-9_.~%-]+", path.raw_path)
    assert unquote(path.raw_path[3:]) == name
    assert query is not None
    assert (query.host, query.raw_path, query.raw_fragment) == ("h", "/s", "")
    assert unquote(query.raw_query_string) == f"name={name}&v=1"


def test_odd_names_arrive_as_they_are(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        names = ["../../admin?x#y", "%2e%2e", "büro 7", "a/b", "...", "\x01\r\n", "é" * 255]
        async with logs_enrich_new(logs_enrich_api) as enricher:
            assert await loaded(enricher, *names) == [logs_enrich_right(name) for name in names]
            assert logs_enrich_api.requests == dict.fromkeys(names, 1)
            assert await loaded(enricher, "", ".", "..", "\ud800") == [lm.UNKNOWN] * 4
            assert logs_enrich_api.stats().requests == len(names), "no URL can name them"

    run_task(main())


def test_the_breaker_opens_and_recovers(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = World()
        async with logs_enrich_new(logs_enrich_api, world, reset=2.0) as enricher:
            logs_enrich_api.mode = "rubbish"
            for n in range(9):
                assert await enricher.load(f"s-{n}") is None
            assert enricher.stats().breaker == "closed"
            assert await enricher.load("s-9") is None
            assert enricher.stats().breaker == "open"
            names = [f"t-{n}" for n in range(500)]
            await enricher.wait(names, math.inf)
            assert [enricher.look(name) for name in names] == [None] * 500
            assert (enricher.breaker.stats().refused, enricher.stats().failures) == (500, 10)
            assert logs_enrich_api.stats().requests == 10
            world.now += 1.99
            assert await enricher.load("t-0") is None
            assert logs_enrich_api.stats().requests == 10
            world.now += 0.02
            logs_enrich_api.mode = "held"
            probe = asyncio.create_task(enricher.load("t-0"))
            await until_async(lambda: logs_enrich_api.stats().requests == 11)
            assert await enricher.load("t-1") is None, "one probe at a time"
            assert enricher.stats().breaker == "half_open"
            logs_enrich_api.mode = "ok"
            assert await probe == logs_enrich_right("t-0")
            assert enricher.stats().breaker == "closed"
            world.now += enricher.failed_for + le.FRONT
            assert await loaded(enricher, *names) == [logs_enrich_right(name) for name in names]
            assert logs_enrich_api.requests["t-1"] == 1

    run_task(main())


def test_what_the_open_circuit_refused_is_asked_for_when_it_closes(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = World()
        async with logs_enrich_new(logs_enrich_api, world, reset=2.0, failed_for=1000.0) as enricher:
            logs_enrich_api.mode = "refuse"
            assert await loaded(enricher, "failed") == [None]
            logs_enrich_api.mode = "rubbish"
            for n in range(10):
                await enricher.load(f"s-{n}")
            world.now += 0.5
            assert await loaded(enricher, "refused") == [None]
            logs_enrich_api.mode = "ok"
            world.now += 1.6
            enricher._front.clear()
            assert await loaded(enricher, "refused", "failed") == [logs_enrich_right("refused"), None]

    run_task(main())


def test_names_that_are_refused_do_not_open_the_circuit(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "refuse"
            names = [f"odd-{n}" for n in range(50)]
            assert await loaded(enricher, *names) == [None] * 50
            assert logs_enrich_api.requests == dict.fromkeys(names, 1)
            logs_enrich_api.mode = "ok"
            assert await enricher.load("a") == logs_enrich_right("a")
            assert (enricher.stats().breaker, enricher.stats().failed) == ("closed", {"name": 50})

    run_task(main())


def test_retries_have_a_budget(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "error"
            for n in range(40):
                enricher.breaker.permit().success()
                enricher.breaker.permit().success()
                await enricher.load(f"s-{n}")
            assert enricher.stats().loads == enricher.stats().failures == 40
            assert (
                enricher._budget.stats().retries == 13
            )  # ten are saved, each load earns a tenth: 10 + 40 / 10 - 1, for the
            # first loads earn nothing while nothing is spent
            assert logs_enrich_api.stats().requests == 53

    run_task(main())


def test_a_stale_answer_is_served_while_one_load_renews_it(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world, old, new = World(), Metadata("old", "", "", ""), Metadata("new", "", "", "")
        logs_enrich_api.answers["a"] = b'{"team": "old"}'
        async with logs_enrich_new(logs_enrich_api, world, ttl=300.0, stale=3600.0) as enricher:
            assert await loaded(enricher, "a") == [old]
            world.now += 299.9
            assert await loaded(enricher, "a") == [old]
            assert logs_enrich_api.requests["a"] == 1
            world.now += le.FRONT
            logs_enrich_api.answers["a"] = b'{"team": "new"}'
            logs_enrich_api.mode = "held"
            assert [enricher.look("a") for _ in range(100)] == [old] * 100
            await until_async(lambda: logs_enrich_api.requests["a"] == 2)
            world.now += 2 * le.FRONT
            await enricher.wait(["a"], math.inf)  # what is stale is known
            assert [enricher.look("a") for _ in range(100)] == [old] * 100
            logs_enrich_api.mode = "ok"
            await until_async(lambda: enricher.look("a") == new)
            assert logs_enrich_api.requests["a"] == 2

            world.now += 300.0  # and if that fails, it is tried again after a while, and served until its window ends
            logs_enrich_api.mode = "refuse"
            assert await loaded(enricher, "a") == [new]
            await until_async(lambda: not enricher._asked)
            world.now += 4.9
            assert await loaded(enricher, "a") == [new]
            assert logs_enrich_api.requests["a"] == 3
            world.now += le.FRONT
            enricher.look("a")
            await until_async(lambda: logs_enrich_api.requests["a"] == 4 and not enricher._asked)
            world.now += 3594.0
            assert enricher.look("a") == new
            await until_async(lambda: not enricher._asked)
            world.now += le.FRONT
            assert enricher.look("a") is None

    run_task(main())


def test_what_the_api_does_not_know(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = World()
        async with logs_enrich_new(logs_enrich_api, world, ttl=300.0, unknown_ttl=60.0) as enricher:
            assert await loaded(enricher, "unknown-1") == [lm.UNKNOWN]
            assert await enricher.load("unknown-1") is lm.UNKNOWN
            world.now += 59.9
            assert enricher.look("unknown-1") is lm.UNKNOWN
            assert logs_enrich_api.requests == {"unknown-1": 1}
            logs_enrich_api.answers["unknown-1"] = b'{"team": "a"}'
            world.now += le.FRONT
            assert enricher.look("unknown-1") is None
            assert await loaded(enricher, "unknown-1") == [Metadata("a", "", "", "")]
            del logs_enrich_api.answers["unknown-1"]
            world.now += 300.0
            assert enricher.look("unknown-1") == Metadata("a", "", "", "")
            await until_async(lambda: enricher.look("unknown-1") is lm.UNKNOWN)
            world.now += 60.0 + le.FRONT
            assert enricher.look("unknown-1") is None, "what was known before is forgotten"
            stats = enricher.stats()
            assert (stats.failures, stats.breaker) == (0, "closed")

    run_task(main())


def test_an_answer_makes_the_failure_before_forgotten(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = World()
        async with logs_enrich_new(logs_enrich_api, world, unknown_ttl=60.0, failed_for=1000.0) as enricher:
            logs_enrich_api.mode = "refuse"
            assert await enricher.load("unknown-2") is None
            logs_enrich_api.mode = "ok"
            assert await enricher.load("unknown-2") is lm.UNKNOWN
            world.now += 60.0 + le.FRONT
            assert enricher.look("unknown-2") is None
            assert set(enricher._asked) == {"unknown-2"}, "the failure is forgotten with the answer"

    run_task(main())


def test_expiry_is_spread() -> None:
    async def main(api: sl.MetadataApi) -> None:
        world, numbers = World(), itertools.cycle((0.0, 0.999))
        async with le.Enricher(api.url(), ttl=100.0, tasks=1, clock=world.clock, rng=lambda: next(numbers)) as enricher:
            await loaded(enricher, "a", "b")
            world.now += 90.1
            for _ in range(3):
                await loaded(enricher, "a", "b")
            assert sorted(api.requests.values()) == [1, 2]

    with sl.MetadataApi() as api:
        run_task(main(api))


def test_invented_names_fill_nothing(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = World()
        async with logs_enrich_new(logs_enrich_api, world, maxsize=50, tasks=2, waiting=5) as enricher:
            real = ["a", "b", "c"]
            assert await loaded(enricher, *real) == [logs_enrich_right(name) for name in real]
            await ticks()  # its tasks are free again
            logs_enrich_api.mode = "held"
            for n in range(10_000):
                assert enricher.look(f"unknown-{n}") is None
                assert len(enricher._front) <= 50
            await ticks()
            assert (queued(enricher), enricher._flights.stats().flights) == (5, 2)
            assert enricher.stats().turned_away == 10_000 - 7
            assert len(enricher._asked) == 7
            await enricher.wait(["unknown-9999"], math.inf)  # was turned away: nothing to wait for
            logs_enrich_api.mode = "ok"
            await until_async(lambda: not enricher._asked)
            for first in range(0, 300, 5):
                names = [f"unknown-{n}" for n in range(first, first + 5)]
                assert await loaded(enricher, *names) == [lm.UNKNOWN] * 5
            assert len(enricher._unknown) == 50
            logs_enrich_api.mode = "refuse"
            for first in range(0, 100, 5):
                await loaded(enricher, *(f"odd-{n}" for n in range(first, first + 5)))
            assert len(enricher._failed) == 50
            assert [enricher.look(name) for name in real] == [logs_enrich_right(name) for name in real]
            assert [logs_enrich_api.requests[name] for name in real] == [1, 1, 1]

    run_task(main())


def test_refusals_do_not_keep_the_loop(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api, tasks=2, waiting=1000) as enricher:
            for _ in range(10):
                enricher.breaker.permit().failure()
            await ticks()
            for n in range(1000):
                enricher.look(f"s-{n}")
            left = [queued(enricher)]
            while enricher._asked:
                await asyncio.sleep(0)
                left.append(queued(enricher))
            assert left[0] == 998
            assert max(before - after for before, after in itertools.pairwise(left)) <= 2
            assert enricher.breaker.stats().refused == 1000

    run_task(main())


def test_wait_obeys_its_limit(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            assert await loaded(enricher, "a") == [logs_enrich_right("a")]
            logs_enrich_api.mode = "silent"
            begun = time.monotonic()
            await enricher.wait(["a", "b", "c"], 0.05)
            assert time.monotonic() - begun > 0.04
            assert (enricher.look("a"), enricher.look("b")) == (logs_enrich_right("a"), None)
            await enricher.wait(["a", "b"], 0.0)
            await enricher.wait(["a", "b"], -1.0)
            await enricher.wait(["a"], math.inf)
            await enricher.wait([], math.inf)

    run_task(main())


def test_a_wait_ends_with_the_last_of_its_services(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api, tasks=1) as enricher:
            logs_enrich_api.mode = "held"
            both = asyncio.create_task(enricher.wait(["a", "b"], math.inf))
            one = asyncio.create_task(enricher.wait(["a"], math.inf))
            await until_async(lambda: logs_enrich_api.requests["a"] + logs_enrich_api.requests["b"] == 1)
            first = next(iter(logs_enrich_api.requests))
            assert not (both.done() or one.done())
            logs_enrich_api.mode = "ok"
            await one
            await both
            assert logs_enrich_api.requests == {"a": 1, "b": 1}
            assert first in ("a", "b")
            assert None not in (enricher.look("a"), enricher.look("b"))

    run_task(main())


def test_cancellation(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "held"
            leader = asyncio.create_task(enricher.load("a"))
            await until_async(lambda: logs_enrich_api.requests["a"] == 1)
            follower = asyncio.create_task(enricher.load("a"))
            waiting = asyncio.create_task(enricher.wait(["a"], math.inf))
            await ticks()
            assert not waiting.done()
            waiting.cancel()
            leader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(asyncio.CancelledError):
                await leader
            assert not follower.done() and enricher._flights.stats().flights == 1  # the load goes on
            logs_enrich_api.mode = "ok"
            assert await follower == logs_enrich_right("a")
            assert await loaded(enricher, "a") == [logs_enrich_right("a")]
            assert logs_enrich_api.requests["a"] == 1
            logs_enrich_api.mode = "held"
            alone = asyncio.create_task(enricher.load("b"))
            await until_async(lambda: logs_enrich_api.requests["b"] == 1)
            alone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await alone
            assert enricher._flights.stats().flights == 0  # nobody wants it any more
            assert (enricher.stats().failures, enricher.breaker.stats().failures) == (0, 0)

    run_task(main())


def test_close_ends_everything(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        tasks, files = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
        server = logs_enrich_api.stats().open
        enricher = logs_enrich_new(logs_enrich_api, tasks=2)
        await enricher.__aenter__()
        assert await loaded(enricher, "a") == [logs_enrich_right("a")]
        logs_enrich_api.mode = "silent"
        load = asyncio.create_task(enricher.load("x"))
        wait = asyncio.create_task(enricher.wait([f"s-{n}" for n in range(20)], math.inf))
        await until_async(lambda: logs_enrich_api.stats().requests == 4)
        closing = asyncio.create_task(enricher.__aexit__())
        await asyncio.sleep(0)
        await enricher.wait([f"s-{n}" for n in range(20)], math.inf)  # nothing will come any more
        await closing
        assert await load is None
        await wait
        assert enricher.stats().failed == {"closed": 1}
        assert asyncio.all_tasks() == tasks
        await until_async(lambda: logs_enrich_api.stats().open == server)
        assert len(os.listdir("/proc/self/fd")) <= files
        await enricher.__aexit__()

        assert enricher.look("a") == logs_enrich_right("a")
        assert enricher.look("s-1") is None
        assert await enricher.load("s-1") is None
        await enricher.wait(["s-1"], math.inf)
        assert (enricher._pool, enricher._flights.stats().flights, enricher.stats().loads) == (None, 0, 4)

        logs_enrich_api.mode = "ok"
        await enricher.__aenter__()
        assert await loaded(enricher, "s-1") == [logs_enrich_right("s-1")]
        await enricher.__aexit__()

    run_task(main())


def test_a_close_that_is_cancelled_still_closes(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        enricher = logs_enrich_new(logs_enrich_api)
        await enricher.__aenter__()
        assert enricher.client is not None
        session, pool = enricher.client._session, enricher._pool
        assert session is not None and pool is not None
        workers = list(pool._tasks)
        closing = asyncio.create_task(enricher.__aexit__())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await ticks()
        assert session.closed
        assert all(worker.done() for worker in workers)

    run_task(main())


def test_a_fault_of_ours_ends_no_task(
    logs_enrich_api: sl.MetadataApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api, tasks=1) as enricher:
            with monkeypatch.context() as patch:
                patch.setattr(lm, "read_metadata", lambda body: 1 / 0)
                assert await loaded(enricher, "a", "b") == [None, None]
            assert enricher.stats().failed == {"internal": 2}
            assert await loaded(enricher, "c") == [logs_enrich_right("c")]

    run_task(main())
    assert len(caplog.records) == 1


def test_without_an_api() -> None:
    async def main() -> None:
        tasks = asyncio.all_tasks()
        async with le.Enricher(None) as enricher:
            assert asyncio.all_tasks() == tasks
            assert not enricher.configured
            assert {enricher.look(f"s-{n}") for n in range(10)} == {None}
            await enricher.wait(["a"], math.inf)
            assert await enricher.load("a") is None
            assert enricher._front == {}
            assert "loads=0" in repr(enricher)

    run_task(main())
    wrong: list[dict[str, Any]] = [{name: 0} for name in ("ttl", "maxsize")]
    for options in wrong:
        with pytest.raises(ValueError, match=r"must be"):
            le.Enricher(None, **options)


class Machine(LoopMachine):
    """Looks, waits, loads, answers and time in any order, against what the windows allow."""

    NAMES = ("a", "b", "c", "")
    TTL, STALE, UNKNOWN_TTL, FAILED = 10.0, 20.0, 4.0, 2.0

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.enricher = le.Enricher(
            "http://h/{service}",
            ttl=self.TTL,
            stale=self.STALE,
            unknown_ttl=self.UNKNOWN_TTL,
            failed_for=self.FAILED,
            maxsize=len(self.NAMES),
            tasks=2,
            waiting=2,
            timeout=1e6,
            clock=self.world.clock,
            rng=lambda: 0.0,
        )
        self.asked: dict[str, asyncio.Future[Any]] = {}
        self.said: dict[str, tuple[Any, float]] = {"": (lm.UNKNOWN, math.inf)}
        self.failed: dict[str, float] = {}
        self.versions = itertools.count(1)

    async def fetch(self, address: Any) -> Any:
        name = address.raw_path[1:]
        assert name not in self.asked, "one request at a time"
        self.asked[name] = self.loop.create_future()
        try:
            return await self.asked[name]
        finally:
            del self.asked[name]

    @initialize()
    def begin(self) -> None:
        self.started = True
        self.enricher.client.fetch = self.fetch  # type: ignore[method-assign, union-attr]
        self.spawn(self.enricher.__aenter__())
        self.settle()

    @rule(seconds=st.sampled_from((0.3, 1.0, 2.1, 4.1, 10.0, 20.5)))
    def tick(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def look(self, name: str) -> None:
        now, room = self.world.now, len(self.enricher._asked) < 2 + 2
        front = name in self.enricher._front and now < self.enricher._front_until
        found = self.now(lambda: self.enricher.look(name))
        said, at = self.said.get(name, (None, -math.inf))
        if isinstance(found, Metadata):
            assert found == said
            assert now - at < self.TTL + self.STALE + le.FRONT
        elif found is lm.UNKNOWN:
            assert said is found
            assert now - at < self.UNKNOWN_TTL + le.FRONT
        else:
            if at != math.inf:
                assert not (isinstance(said, Metadata) and now - at < self.TTL + self.STALE)
                assert not (said is lm.UNKNOWN and now - at < self.UNKNOWN_TTL)
            quiet = now - self.failed.get(name, -math.inf) < self.FAILED
            assert name in self.enricher._asked or quiet or front or not room

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), how=st.sampled_from(("found", "found", "unknown", "failed")))
    def answer(self, data: st.DataObject, how: str) -> None:
        self.settle()
        if not self.asked:
            return
        name = data.draw(st.sampled_from(sorted(self.asked)))
        found: Any = Metadata(name, "", "", str(next(self.versions))) if how == "found" else lm.UNKNOWN
        future = self.asked[name]
        if future.done():
            return
        if how == "failed":
            self.failed[name] = self.world.now
            self.now(lambda: future.set_exception(lm.MetadataError("name", "400")))
        else:
            self.said[name] = found, self.world.now
            self.now(lambda: future.set_result(found))
        self.settle()

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=3))
    def wait(self, names: list[str]) -> None:
        self.spawn(self.enricher.wait(names, math.inf))

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        self.spawn(self.enricher.load(name))
        self.settle()

    @invariant()
    def bounded(self) -> None:
        enricher, most = self.enricher, len(self.NAMES)
        assert len(enricher._front) <= most
        assert max(len(enricher._known), len(enricher._unknown), len(enricher._failed)) <= most
        assert len(enricher._asked) <= 4

    def finish(self) -> None:
        self.settle()
        for _ in range(20):
            for name, future in list(self.asked.items()):
                if not future.done():
                    self.now(functools.partial(future.set_result, Metadata(name, "", "", "last")))
            self.settle()
        assert all(task.done() for task in self.tasks), "somebody waits for nothing"
        assert (queued(self.enricher), self.enricher._flights.stats().flights, len(self.enricher._asked)) == (0, 0, 0)
        self.spawn(self.enricher.__aexit__())
        self.settle()
        super().finish()


def test_machine() -> None:
    run_state_machine_as_test(Machine, settings=settings(SETTINGS, max_examples=30, stateful_step_count=30))


def test_look_is_cheap(logs_enrich_api: sl.MetadataApi) -> None:
    """It must not come to the caches for each event: those are locked, ordered and counted."""

    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            await loaded(enricher, "a", "unknown-1")
            logs_enrich_api.mode = "refuse"
            await loaded(enricher, "b")
            before = enricher._known.stats()
            for _ in range(1000):
                enricher.look("a"), enricher.look("unknown-1"), enricher.look("b")
            assert enricher._known.stats() == before

    run_task(main())
