"""api/upstreams.py: renewals, the way of a call."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import coordination as co
from api import aggregate, config, parts, renewals, upstreams
from sandbox.sites import Sandbox
from tests.helpers.api import aggregate_ask, app_run, app_upstream, data_of, play, settled
from tests.helpers.base import HANG_LIMIT, SETTINGS, World, limits, ticks, until_async


def app_source(url: str, world: World, session: aiohttp.ClientSession, **options: Any) -> upstreams.Source:
    upstream = config.Upstream(name="a", url=url, **{"timeout": HANG_LIMIT, **options})
    return upstreams.Source(upstream, session, co.Semaphore(99), clock=world.clock)


# ------------------------------------------------------------------------------------------------------------ renewals


def test_renewals_row_by_row() -> None:
    """Times to the tick: at 0.8 of the ttl (the middle), and three quarters of 2, 4, ... times the ttl after errors."""
    known = renewals.Renewals(10.0, 2, lambda: 0.5)
    a, b, c = ("a",), ("b",), ("c",)
    known.asked(a)  # never loaded: nothing is known of it
    assert (len(known), known.due(1e9)) == (0, [])
    known.loaded(a, 100.0)
    known.asked(a)
    assert (known.due(107.99), known.due(108.0), known.due(1e9)) == ([], [a], [])
    known.loaded(a, 110.0)  # nobody asks: it is forgotten
    assert (known.due(118.0), len(known)) == ([], 0)
    now = 200.0
    for wait in (15.0, 30.0, 45.0, 45.0):  # the cap is a minute
        known.failed(a, now)
        known.asked(a)
        assert (known.due(now + wait - 0.01), known.due(now + wait)) == ([], [a])
        now += wait
    known.loaded(a, now)
    known.asked(a)
    assert known.due(now + 8.0) == [a]
    known.failed(a, 1000.0)  # and begins anew
    known.asked(a)
    assert (known.due(1014.99), known.due(1015.0)) == ([], [a])
    for key in (a, b, c):
        known.loaded(key, 2000.0)
        known.asked(key)
    assert (len(known), sorted(known.due(3000.0))) == (2, [a, b])
    for key in (a, b):
        known.loaded(key, 4000.0)
        known.asked(key)
    known.loaded(a, 4004.0)  # planned anew: neither the old time nor what was asked before counts
    assert (known.due(4008.0), known.due(4012.0), len(known)) == ([b], [], 0)
    known.loaded(a, 5000.0)
    known.asked(a)
    known.forget()
    assert (len(known), known.due(1e9)) == (0, [])
    slow = renewals.Renewals(100.0, 1, lambda: 0.5)
    slow.failed(a, 0.0)
    slow.asked(a)
    assert (slow.due(74.99), slow.due(75.0)) == ([], [a])


class AppRenewals(RuleBasedStateMachine):
    """Against the earliest and latest time of each key."""

    keys = st.sampled_from([(name,) for name in "abcd"])

    def __init__(self) -> None:
        super().__init__()
        self.draws = iter(range(10**9))
        self.now, self.ttl, self.most = 0.0, 10.0, 3
        self.known = renewals.Renewals(self.ttl, self.most, lambda: next(self.draws) * 0.37 % 1.0)
        self.planned: dict[Any, tuple[float, float]] = {}
        self.wanted: set[Any] = set()
        self.failures: Counter[Any] = Counter()
        self.asks: Counter[Any] = Counter()
        self.renewed: Counter[Any] = Counter()

    @rule(key=keys)
    def asked(self, key: Any) -> None:
        self.known.asked(key)
        self.asks[key] += 1
        if key in self.planned:
            self.wanted.add(key)

    def plan(self, key: Any, low: float, high: float) -> bool:
        self.wanted.discard(key)
        if key in self.planned or len(self.planned) < self.most:
            self.planned[key] = self.now + low, self.now + high
            return True
        return False

    @rule(key=keys)
    def loaded(self, key: Any) -> None:
        self.known.loaded(key, self.now)
        del self.failures[key]
        self.plan(key, 0.7 * self.ttl, 0.9 * self.ttl)

    @rule(key=keys)
    def failed(self, key: Any) -> None:
        self.known.failed(key, self.now)
        wait = min(60.0, self.ttl * 2.0 ** (self.failures[key] + 1))
        if self.plan(key, wait / 2, wait):
            self.failures[key] += 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 9.0, 70.0]))
    def due(self, seconds: float) -> None:
        self.now += seconds
        keys = self.known.due(self.now)
        assert len(keys) == len(set(keys))
        for key in keys:
            assert key in self.wanted and self.planned[key][0] <= self.now + 1e-9
            del self.planned[key]
            self.wanted.discard(key)
            self.renewed[key] += 1
            assert self.renewed[key] <= self.asks[key]
        for key, (low, high) in list(self.planned.items()):
            if key in self.wanted:
                assert high > self.now - 1e-9  # what is in use is due before its ttl ends
            elif key not in self.known._when:
                assert low <= self.now + 1e-9
                del self.planned[key], self.failures[key]
            else:
                assert high > self.now - 1e-9

    @rule()
    def forget(self) -> None:
        self.known.forget()
        for known in (self.planned, self.wanted, self.failures):
            known.clear()

    @invariant()
    def bounded(self) -> None:
        assert len(self.known) == len(self.planned) <= self.most
        assert len(self.known._heap) <= 2 * self.most + 65
        assert len(self.known._asked) <= self.most and len(self.known._failed) <= self.most


def test_renewals_against_a_model() -> None:
    run_state_machine_as_test(AppRenewals, settings=SETTINGS)


def test_renewals_of_many_loads_keep_their_heap_small() -> None:
    known = renewals.Renewals(10.0, 3, lambda: 0.5)
    for i in range(1000):
        known.loaded((str(i % 3),), float(i) / 1000)
    assert len(known._heap) <= 2 * 3 + 65


def test_renewals_keep_a_source_fresh(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source = make("/api/weather?city=renewed", ttl=10.0)
        source.renewals = renewals.Renewals(10.0, 5, lambda: 0.5)
        assert await aggregate_ask(source) == ("fresh", 1, 0.0)
        for serial in (1, 2, 3):
            assert await aggregate_ask(source) == ("fresh", serial, 0.0)
            world.now += 7.5
            assert source.renew() == 0
            world.now += 0.5
            assert (source.renew(), source.renew()) == (1, 0)
            await settled(source)
        world.now += 8.0
        assert (source.renew(), source.calls, len(source.renewals)) == (0, 4, 0)  # nobody asked any more

    play(web, case)


# --------------------------------------------------------------------------------------------------- the way of a call


def test_hedges_within_its_budget() -> None:
    async def main() -> None:
        heads: list[str] = []

        async def handler(head: str, body: bytes) -> Any:
            heads.append(head)
            return None if len(heads) in (1, 3) else {"asked": len(heads)}

        async with app_upstream(handler) as url, aiohttp.ClientSession() as session:
            source = app_source(url, World(), session, hedge=0.01, retries=0)
            assert await aggregate_ask(source) == ("fresh", {"asked": 2}, 0.0)
            assert (source.calls, source._hedges.stats().retries) == (2, 1)
            while source._hedges.try_retry():
                pass
            source.upstream = dataclasses.replace(source.upstream, timeout=0.1)
            source.forget()
            with limits(0.1) as up:
                asking = asyncio.create_task(aggregate_ask(source))
                await until_async(lambda: len(heads) == 3)
                up()
                assert (await asking)[0] == "error"
            assert (source.calls, len(heads)) == (3, 3)  # nothing saved: nobody is asked twice

    app_run(main())


def test_posts_json_in_which_values_stay_text() -> None:
    async def main() -> None:
        async def handler(head: str, body: bytes) -> Any:
            return {"line": head.partition(" HTTP")[0], "kind": "application/json" in head, "body": body.decode()}

        async with app_upstream(handler) as url, aiohttp.ClientSession() as session:
            body = {"q": "{x} and {x}{y}", "all": ["{y}", 5, None, {"{x}": "{unknown}"}]}
            parameters = {"x": "1", "y": "2"}
            source = app_source(url + "/s/{x}", World(), session, method="POST", body=body, parameters=parameters)
            for x, y in (("1", "2"), ('"},{"', "{x}\\ü")):
                part = (await aggregate.Plan.of({"a": source}, {"x": x, "y": y}, HANG_LIMIT).gather())["a"]
                assert part.data is not None
                assert data_of(part)["line"].startswith("POST /s/") and data_of(part)["kind"]
                expected = {"q": f"{x} and {x}{y}", "all": [y, 5, None, {"{x}": "{unknown}"}]}
                assert json.loads(data_of(part)["body"]) == expected
            plain = app_source(url + "/none", World(), session, method="POST")
            part = (await aggregate.Plan.of({"a": plain}, {}, HANG_LIMIT).gather())["a"]
            assert part.data is not None and data_of(part) == {"line": "POST /none", "kind": False, "body": ""}

    app_run(main())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("method = 'PUT'", "a.method: GET or POST"),
        ("method = 'post'", "a.method: GET or POST"),
        ("method = 5", "a.method: a text"),
        ("body = { q = 1 }", "a.body: only a POST"),
        ("method = 'GET'\nbody = 'x'", "a.body: only a POST"),
        ("method = 'POST'\nbody = 99999999999999999999", "a.body: no JSON"),
        ("fallback = [18446744073709551616]", "a.fallback: no JSON"),
        ("hedge = -1", "a.hedge: a number from 0"),
        ("hedge = 'x'", "a.hedge: a number is needed"),
        ("max_bytes = 5000001", "a.max_bytes: a number from 1 to 5e+06"),
        ("keys = 100001", "a.keys: a number from 1 to 100000"),
        ("retries = 11", "a.retries: a number from 0 to 10"),
        *((f"parameters = {{ {name} = 'x' }}", f"a.parameters: {name} means") for name in sorted(config.RESERVED)),
    ],
)
def test_configuration_refused(line: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        config.read_config(f"[a]\nurl = 'http://h/'\n{line}", {})


def test_configuration_read() -> None:
    text = "[a]\nurl='http://h/'\nmethod='POST'\nbody={q='{x}'}\nparameters={x='1'}\nhedge=0.5\nmax_bytes=5000000"
    upstream = config.read_config(text, {})["a"]
    assert (upstream.method, upstream.hedge, upstream.max_bytes) == ("POST", 0.5, 5_000_000)
    assert upstream.content(("z",)) == b'{"q":"z"}'
    assert config.read_config("[a]\nurl='http://h/'\nmethod='POST'", {})["a"].content(()) is None


def test_starts_warm_with_what_is_stale(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        def state(source: upstreams.Source) -> Any:
            hit = source.cache.lookup(())
            return hit and (hit.state, round(hit.age, 6), hit.needs_refresh, data_of(hit.value))

        options: dict[str, Any] = {"ttl": 10.0, "stale": 20.0, "stale_if_error": 100.0}
        rows = [  # seconds old: never fresh, and no window is longer than it was
            (-5.0, ("stale", 0.001, True, "old")),
            (5.0, ("stale", 5.0, True, "old")),
            (29.75, ("stale", 29.75, True, "old")),
            (30.0, ("expired", 30.0, True, "old")),
            (109.75, ("expired", 109.75, True, "old")),
            (110.0, None),
        ]
        for age, expected in rows:
            source = make("/api/news?warm", **options)
            source.warm((), b'"old"', age, 0.1)
            assert (state(source), source.calls) == (expected, 0)
        source = make("/api/news?warm", **options)
        source.warm((), b'"old"', 50.0, 0.1)
        source.warm((), b'"older"', 51.0, 0.1)
        assert state(source)[3] == "old"
        source.warm((), b'"younger"', 49.0, 0.1)
        assert state(source)[3] == "younger"
        assert (await aggregate_ask(source))[0] == "fresh"  # too old to be said at once
        source.warm((), b'"old"', 1.0, 0.1)
        assert state(source)[0] == "fresh"
        world.now += 15.0
        source.warm((), b'"old"', 16.0, 0.1)
        assert state(source)[3] != "old"  # what this life loaded is stale too by now, and younger
        source.forget(())
        source.warm((), b'"old"', 16.0, 0.1)
        assert state(source) is None  # it was invalidated since

    play(web, case)


def test_a_listener_that_raises_costs_nothing(web: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source, heard = make("/api/news?heard"), list[parts.Load]()

        def broken(load: parts.Load) -> None:
            raise ZeroDivisionError

        source.listeners += [broken, heard.append]
        assert (await aggregate_ask(source))[0] == "fresh"
        assert (source.failures, len(heard), heard[0].error) == (0, 1, None)
        assert (await aggregate_ask(source), source.calls)[1] == 1

    play(web, case)
    assert "a listener failed" in caplog.text


def test_requests_that_were_answered_without_a_load_leave_nothing_behind() -> None:
    """A hundred that wait for 1 ms, and an upstream that says nothing until they are gone."""

    async def main() -> None:
        gate, asked = asyncio.Event(), 0

        async def handler(head: str, body: bytes) -> Any:
            nonlocal asked
            asked += 1
            await gate.wait()
            return {"serial": asked}

        async with app_upstream(handler) as url, aiohttp.ClientSession() as session:
            source = app_source(url, World(), session)
            for _ in range(100):
                parts = await aggregate.Plan.of({"a": source}, {}, 0.001).gather()
                assert parts["a"].state == "timeout" and len(source.running) == 1
            gate.set()
            await settled(source)
            assert (asked, data_of((await aggregate.Plan.of({"a": source}, {}, 1.0).gather())["a"])) == (
                1,
                {"serial": 1},
            )
            assert not source.running

    app_run(main())


def test_what_was_invalidated_says_nothing_later() -> None:
    """A load from before an invalidation fails after it: whoever asks joins the new load, and is not refused."""

    async def main() -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        asked = 0

        async def handler(head: str, body: bytes) -> Any:
            nonlocal asked
            asked += 1
            number = asked
            await gates[number - 1].wait()
            return 404 if number == 1 else {"asked": number}

        async with app_upstream(handler) as url, aiohttp.ClientSession() as session:
            source = app_source(url, World(), session)
            first = asyncio.create_task(aggregate_ask(source))
            await until_async(lambda: asked == 1)
            source.forget(())
            second = asyncio.create_task(aggregate_ask(source))
            await until_async(lambda: asked == 2)
            gates[0].set()
            assert (await first)[0] == "error"
            third = asyncio.create_task(aggregate_ask(source))
            await ticks(50)
            assert not third.done() and len(source.renewals) == 0
            gates[1].set()
            assert await second == await third == ("fresh", {"asked": 2}, 0.0)

    app_run(main())
