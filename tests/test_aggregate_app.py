"""aggregate_app.py over HTTP, before upstreams that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import http.server
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote

import ada_url
import aiohttp
import pytest
import uvicorn
import yarl
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Route

import aggregate_app
import coordination as co
from api import aggregate, config, middleware, openapi, report, upstreams
from api import service as service_module
from api.history import History, Result
from sandbox.faults import FAULTS
from sandbox.sites import Sandbox
from tests.helpers.api import aggregate_ask, aggregate_http, app_run, ask, data_of, living, play, settled
from tests.helpers.base import HANG_LIMIT, HERE, SETTINGS, World, wait_until

if TYPE_CHECKING:  # imported where it is used: it takes half a second
    import schemathesis
    from schemathesis.hooks import HookContext
    from schemathesis.specs.openapi.schemas import OpenApiSchema


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no upstream"),
        ("[a", "not TOML"),
        ("a = 1", "a: not a table"),
        ("['b c']\nurl = 'http://h/'", "'b c': a name"),
        ("[a]", "a.url: missing"),
        ("[a]\nurl = 5", "a.url: a text"),
        ("[a]\nurl = 'ftp://h/'", "a.url: http"),
        ("[a]\nurl = 'http://h{x}/'\nparameters = { x = 'y' }", "a.url: http"),
        ("[a]\nurl = 'http://u:p@h/'", "a.url: http"),
        ("[a]\nurl = 'http://h/{x}'", "a.url: {x} is not among"),
        ("[a]\nurl = 'http://h/{'", "a.url: "),
        ("[a]\nurl = 'http://h/'\nttl = 'x'", "a.ttl: a number"),
        ("[a]\nurl = 'http://h/'\nttl = true", "a.ttl: a number"),
        ("[a]\nurl = 'http://h/'\nttl = 0", "a.ttl: a number from"),
        ("[a]\nurl = 'http://h/'\nttl = nan", "a.ttl: a number from"),
        ("[a]\nurl = 'http://h/'\nretries = 1.5", "a.retries: a whole number"),
        ("[a]\nurl = 'http://h/'\nconcurrency = 0", "a.concurrency: a number from 1"),
        ("[a]\nurl = 'http://h/'\ntimeuot = 1", "a.timeuot: no such key"),
        ("[a]\nurl = 'http://h/'\nparameters = 'x'", "a.parameters: a table"),
        ("[a]\nurl = 'http://h/'\nheaders = { X = '${NO_SUCH}' }", "a.headers.X: 'NO_SUCH'"),
        ("[a]\nurl = 'http://h/'\nheaders = { 'X Y' = '1' }", "a.headers: 'X Y' is no name"),
        ("[a]\nurl = 'http://h/'\nheaders = { X = 'a\u2192b' }", "a.headers.X: a character"),
        ("[a]\nurl = 'http://[::1/'", "a.url: "),
        ("[a]\nurl = 'http://h:99999/'", "a.url: Port out of range"),
        ("[a]\nurl = 'http://h/{x!r}'\nparameters = { x = 1 }", "a.url: {x} is written without"),
        ("[a]\nurl = 'http://h/{x:>9}'\nparameters = { x = 1 }", "a.url: {x} is written without"),
        ("[a]\nurl = 'http://h/'\nparameters = { x = 1 }", "a.parameters: x is used nowhere"),
        ("[a]\nurl = 'http://h/${NO_SUCH}'", "a.url: 'NO_SUCH' is not in the environment"),
        ("[a]\nurl = 'http://h/'\nheaders = { X = '${MY-KEY}' }", "a.headers.X: '${MY-KEY}' holds no name"),
        ("[a]\nurl = 'http://h/'\nheaders = { X = '$NO_SUCH' }", "a.headers.X: 'NO_SUCH' is not in the environment"),
        ('[a]\nurl = "http://h/\\n"\n[b]\nurl = "http://h/\\tx"', "b.url: a control character"),
        (
            "[a]\nurl = 'http://h/'\nmethod = 'POST'\nbody = { '{x}' = 1 }\nparameters = { x = 1 }",
            "a.parameters: x is used nowhere",
        ),
    ],
)
def test_refuses_a_wrong_configuration_by_its_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "upstreams.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        aggregate_app.configured({"AGGREGATE_CONFIG": str(path)})
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_reads_a_configuration(tmp_path: Path) -> None:
    assert aggregate_app.configured({}) is None
    with pytest.raises(SystemExit, match="No such file"):
        aggregate_app.configured({"AGGREGATE_CONFIG": str(tmp_path / "none.toml")})
    text = "[a]\nurl='http://h/{x}?y={y}'\nparameters={x='1', y=2}\nheaders={Authorization='Bearer ${KEY}'}\nttl=3"
    shipped = aggregate_app.configured({"AGGREGATE_CONFIG": str(HERE / "upstreams.toml")})
    assert shipped is not None and list(shipped) == ["weather", "rates", "quakes", "stories"]
    upstream = config.read_config(text, {"KEY": "secret"})["a"]
    assert (upstream.ttl, upstream.headers) == (3, {"Authorization": "Bearer secret"})
    assert upstream.address(("a b", "&z=1#")) == "http://h/a%20b?y=%26z%3D1%23"
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[a]\nurl = 'http://h/'")
    assert aggregate_app.configured({"AGGREGATE_CONFIG": str(tmp_path / "bom.toml")}) is not None
    text = "[a]\nurl='http://h/${K}?on={on}'\nmethod='POST'\nbody={k='${K}'}\nparameters={on=true}\nheaders={X='${K}'}"
    upstream = config.read_config(text, {"K": "a b\n"})["a"]
    assert (upstream.address(("true",)), upstream.content(("true",))) == ("http://h/a%20b?on=true", b'{"k":"a b"}')
    assert (upstream.headers, upstream.parameters, upstream.retries) == ({"X": "a b"}, {"on": "true"}, 0)


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("http://h/a b?q=new york", "http://h/a%20b?q=new%20york"),
        ("http://h/stra\u00dfe?q=%C3%9F&p=100%", "http://h/stra%C3%9Fe?q=%C3%9F&p=100%25"),
        ("http://m\u00fcnchen.example:8080/x", "http://xn--mnchen-3ya.example:8080/x"),
        ("http://${HOST}/${KEY}", "http://localhost:8080/a%2Fb%20c"),
        ("${BASE}/x?k=${KEY}", "http://localhost:8080/api/x?k=a%2Fb%20c"),
        ("http://[::1]:8080/x,y;z=(1)!*'", "http://[::1]:8080/x,y;z=(1)!*'"),
    ],
)
def test_a_url_is_percent_encoded_where_it_was_not(written: str, sent: str) -> None:
    environ = {"HOST": "localhost:8080", "KEY": "a/b c\n", "BASE": "http://localhost:8080/api", "D": "x"}
    text = f'[a]\nurl = "{written}"\nheaders = {{ X = "$D-${{D}}$$1" }}'
    upstream = config.read_config(text, environ)["a"]
    assert (upstream.address(()), upstream.headers["X"]) == (sent, "x-x$1")
    assert str(yarl.URL(sent, encoded=True)) == sent


@settings(SETTINGS, max_examples=200)
@given(st.text(min_size=1, max_size=30).filter(lambda value: value not in (".", "..")))
def test_a_parameter_changes_neither_host_nor_path(value: str) -> None:
    text = "[a]\nurl='http://h.example/v1/{x}/end?q={x}&z=1'\nparameters={x='1'}"
    upstream = config.read_config(text, {})["a"]
    try:
        url = ada_url.URL(upstream.address((value,)))
    except UnicodeEncodeError:
        return  # a lone surrogate, which no request can carry
    assert (url.host, url.hash, url.pathname.count("/")) == ("h.example", "", 3)
    assert url.pathname.startswith("/v1/") and url.pathname.endswith("/end") and url.search.endswith("&z=1")
    assert url.search.count("&") == 1


def test_cache_row_by_row(web: Sandbox) -> None:
    """Ages to the tick: fresh, stale inside its window (and renewed behind the answer), past it, after invalidation."""

    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source = make("/api/weather?city=rows", ttl=10.0, stale=5.0, stale_if_error=100.0)
        rows = [  # seconds later, the answer, the calls that it led to in the end
            (0.0, ("fresh", 1, 0.0), 1),
            (9.75, ("fresh", 1, 9.75), 1),
            (0.25, ("stale", 1, 10.0), 2),
            (0.0, ("fresh", 2, 0.0), 2),
            (14.75, ("stale", 2, 14.75), 3),
            (15.0, ("fresh", 4, 0.0), 4),  # past its window: waited for
        ]
        for later, answer, calls in rows:
            world.now += later
            assert (await aggregate_ask(source), source.calls) == (answer, source.calls)
            await settled(source)
            assert source.calls == calls
        source.forget()
        assert await aggregate_ask(source) == ("fresh", 5, 0.0)
        source.forget(())
        assert await aggregate_ask(source) == ("fresh", 6, 0.0)

    play(web, case)


def test_serves_old_data_in_an_outage_within_its_window(web: Sandbox) -> None:
    """The flaky upstream: two good answers, two failures, by turns."""

    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source = make("/api/flaky?outage", ttl=10.0, stale=0.0, stale_if_error=50.0, retries=0)
        assert await aggregate_ask(source) == ("fresh", 1, 0.0)
        source.forget()
        assert await aggregate_ask(source) == ("fresh", 2, 0.0)
        world.now += 20.0
        part = (await aggregate.Plan.of({"a": source}, {}, 20.0).gather())["a"]
        assert part.data is not None
        assert (part.state, data_of(part)["serial"], part.age, part.error) == ("stale", 2, 20.0, "http: 503")
        world.now += 40.0  # past the window
        part = (await aggregate.Plan.of({"a": source}, {}, 20.0).gather())["a"]
        assert (part.state, part.data, part.error) == ("error", None, "http: 503")
        assert await aggregate_ask(source) == ("fresh", 5, 0.0)
        fallback = make("/status/500", retries=0, fallback={"serial": "better than nothing"})
        assert await aggregate_ask(fallback) == ("fallback", "better than nothing", None)

    play(web, case)


@pytest.mark.parametrize(
    ("path", "options", "error"),
    [
        ("/status/404", {}, "http: 404"),
        ("/fault/redirect_3", {}, "http: 302"),  # another host's answer is not this upstream's
        ("/fault/ok", {}, "not_json"),
        ("/api/deep", {}, "not_json"),
        ("/api/news", {"max_bytes": 100}, "too_large: more than 100 bytes"),
        ("/api/news", {"keep": "items.none"}, "missing: items.none"),
        ("/fault/endless_body", {}, "too_large: more than 1000000 bytes"),
        ("/fault/gzip_bomb", {}, "too_large: more than 1000000 bytes"),
        ("/fault/never_answers", {"timeout": 0.05}, "timeout: no answer within 0.05 s"),
    ],
)
def test_names_what_is_wrong_with_an_upstream(web: Sandbox, path: str, options: dict[str, Any], error: str) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source = make(path, **{"timeout": 20.0, "retries": 0, **options})
        part = (await aggregate.Plan.of({"a": source}, {}, 20.0).gather())["a"]
        assert (part.state, part.error) == ("error", error)

    play(web, case)


def test_every_fault_of_the_catalogue_is_an_answer(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        faults = {name: make(fault.path, timeout=1.0, retries=0) for name, fault in FAULTS.items()}
        parts = await aggregate.Plan.of(faults, {}, HANG_LIMIT).gather()
        assert {part.state for part in parts.values()} == {"error"}
        for part in parts.values():
            assert str(part.error).partition(":")[0] in upstreams.UpstreamError.KINDS

    play(web, case)


def test_a_silent_upstream_opens_its_circuit_and_recovers(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source = make("/fault/never_answers", timeout=0.02, failures=5, reset=30.0, retries=0)
        for _ in range(5):
            assert (await aggregate_ask(source))[0] == "error"
        part = (await aggregate.Plan.of({"a": source}, {}, 20.0).gather())["a"]
        assert (part.state, source.calls, source.health()["breaker"]) == ("open", 5, "open")
        assert 30.0 <= part.retry_after <= 33.0
        world.now += 33.0
        source.upstream = dataclasses.replace(
            source.upstream, url=web.url("/api/weather?city=recovered"), timeout=HANG_LIMIT
        )
        assert (await aggregate_ask(source), source.health()["breaker"]) == (("fresh", 1, 0.0), "closed")

    play(web, case)


def test_the_deadline_cuts_the_wait_and_not_the_load(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source = make("/api/weather?city=late", timeout=HANG_LIMIT)
        parts = await asyncio.gather(*(aggregate_ask(source, 1e-9) for _ in range(3)))
        assert parts == [("timeout", None, None)] * 3
        await settled(source)
        assert (await aggregate_ask(source), source.calls) == (("fresh", 1, 0.0), 1)
        source.forget()
        assert (await aggregate_ask(source, 1e-9))[0] == "timeout"
        source.forget()  # what is loaded now was asked for before
        await settled(source)
        assert len(source.cache) == 0

    play(web, case)


@pytest.fixture(scope="module")
def aggregate_port(web: Sandbox) -> Iterator[int]:
    table = {
        name: config.Upstream(name, web.url(path), parameters, timeout=20.0, ttl=600.0, keep=keep)
        for name, path, parameters, keep in [
            ("weather", "/api/weather?city={city}", {"city": "Berlin"}, ""),
            ("news", "/api/news?served", {}, "items"),
            ("silent", "/fault/never_answers", {}, ""),
        ]
    }
    server = uvicorn.Server(uvicorn.Config(aggregate_app.create_app(table), port=0, log_level="error"))
    aggregate_app_grace, service_module.GRACE = service_module.GRACE, 0.0  # the silent one would take it
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
    service_module.GRACE = aggregate_app_grace


def test_over_http(aggregate_port: int) -> None:
    status, body, headers = aggregate_http(aggregate_port, "/aggregate?sources=weather,news&city=Oslo")
    assert (status, body["partial"], body["sources"]["weather"]["data"]["city"]) == (200, False, "Oslo")
    assert 600 - HANG_LIMIT < int(headers["cache-control"].removeprefix("max-age=")) <= 600
    assert len(body["sources"]["news"]["data"]) == 10
    known = {"If-None-Match": headers["etag"]}
    again = aggregate_http(aggregate_port, "/aggregate?sources=weather,news&city=Oslo", headers=known)
    assert (again[0], again[1], again[2]["etag"]) == (304, None, headers["etag"])
    status, body, headers = aggregate_http(aggregate_port, "/aggregate?deadline_ms=50&sources=news,silent")
    assert (status, body["partial"], headers["cache-control"]) == (200, True, "no-cache")
    assert {name: part["state"] for name, part in body["sources"].items()} == {"news": "fresh", "silent": "timeout"}
    status, body, headers = aggregate_http(aggregate_port, "/aggregate/silent?deadline_ms=1")
    assert (status, headers["retry-after"], headers["cache-control"]) == (503, "1", "no-store")
    assert aggregate_http(aggregate_port, "/health")[1]["sources"]["silent"]["loading"] == 1
    for path in ("/health/live", "/health/ready"):
        assert aggregate_http(aggregate_port, path)[:2] == (200, {"status": "ok"})


def test_counts_what_it_answers(aggregate_port: int) -> None:
    def state(body: Any, name: str) -> int:
        return cast(int, body["sources"][name]["answers"].get("fresh", 0))

    before = aggregate_http(aggregate_port, "/health")[1]
    for _ in range(3):
        aggregate_http(aggregate_port, "/aggregate/news?deadline_ms=20000")
    after = aggregate_http(aggregate_port, "/health")[1]
    assert state(after, "news") - state(before, "news") == 3
    assert after["loop_lag_ms"] >= 0 and list(after["sources"]["news"]["latency_ms"]) == ["p50", "p95", "p99"]
    connection = http.client.HTTPConnection("127.0.0.1", aggregate_port, timeout=HANG_LIMIT)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    assert f'aggregate_answers_total{{source="news",state="fresh"}} {state(after, "news")}.0' in lines
    assert 'aggregate_circuit_open{source="news"} 0.0' in lines
    assert any(line.startswith("aggregate_loop_lag_seconds ") for line in lines)
    assert report.percentiles([]) == {}
    assert report.percentiles(range(1, 201)) == {"p50": 100, "p95": 190, "p99": 198}


@pytest.mark.parametrize(
    ("method", "path", "status", "member"),
    [
        ("GET", "/aggregate/nobody", 404, {"sources": ["news", "silent", "weather"]}),
        ("GET", "/aggregate?sources=news,nobody", 404, {"detail": "unknown source nobody"}),
        ("GET", "/aggregate?sources=", 404, {"detail": "unknown source "}),
        ("GET", "/aggregate/news?deadline_ms=0", 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate/news?deadline_ms=-1", 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate/news?deadline_ms=99999", 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate/news?city=Oslo", 422, {"parameter": "city", "parameters": ["deadline_ms"]}),
        ("GET", "/aggregate/news?sources=news", 422, {"parameter": "sources"}),
        ("GET", "/aggregate/weather?city=..", 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city=" + "x" * 201, 422, {"parameter": "city"}),
        ("GET", "/nothing", 404, {"title": "Not Found"}),
        ("POST", "/aggregate", 405, {"title": "Method Not Allowed"}),
        ("POST", "/cache/invalidate?source=nobody", 404, {"detail": "unknown source nobody"}),
        ("POST", "/cache/invalidate?source=news&city=Oslo", 422, {"parameters": []}),
    ],
)
def test_problems(aggregate_port: int, method: str, path: str, status: int, member: dict[str, Any]) -> None:
    got, body, headers = aggregate_http(aggregate_port, path, method)
    assert (got, body["status"], headers["content-type"]) == (status, status, "application/problem+json")
    assert body.items() >= member.items()


def test_a_thousand_cold_requests_are_one_call(aggregate_port: int) -> None:
    async def main() -> list[int]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask() -> int:
                url = f"http://127.0.0.1:{aggregate_port}/aggregate/weather?city=Cold&deadline_ms=20000"
                async with session.get(url) as response:
                    return cast(int, (await response.json())["sources"]["weather"]["data"]["serial"])

            return await asyncio.gather(*(ask() for _ in range(1000)))

    assert set(asyncio.run(main())) == {1}


def test_invalidation_is_for_those_who_may(aggregate_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def serial() -> int:
        body = aggregate_http(aggregate_port, "/aggregate/weather?city=Rome&deadline_ms=20000")[1]
        return cast(int, body["sources"]["weather"]["data"]["serial"])

    path = "/cache/invalidate?source=weather"
    assert [serial(), serial()] == [1, 1]
    assert aggregate_http(aggregate_port, path + "&city=Rome", "POST")[:2] == (200, {"invalidated": ["weather"]})
    assert [serial(), serial()] == [2, 2]
    monkeypatch.setenv("AGGREGATE_TOKEN", "secret")
    for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        status, _, headers = aggregate_http(aggregate_port, path, "POST", shown)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert aggregate_http(aggregate_port, path, "POST", {"Authorization": "Bearer secret"})[0] == 200
    assert serial() == 3
    assert aggregate_http(aggregate_port, "/cache/invalidate", "POST", {"Authorization": "bEARER secret"})[0] == 200
    assert serial() == 4


def test_what_cannot_be_mended_is_not_asked_for_again_at_once(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: World) -> None:
        source = make("/status/404", retries=3)
        for later, calls in ((0.0, 1), (0.75, 1), (0.25, 2), (0.0, 2)):
            world.now += later
            part = (await aggregate.Plan.of({"a": source}, {}, 20.0).gather())["a"]
            await settled(source)
            assert (part.state, part.error, source.calls) == ("error", "http: 404", calls)
        source.forget()
        assert (await aggregate_ask(source), source.calls) == (("error", None, None), 3)
        source.forget(())
        assert (await aggregate_ask(source), source.calls) == (("error", None, None), 4)
        assert source.health()["breaker"] == "closed"  # it answers: that is no outage
        kept = source.refusals.get(())
        assert kept is not None and kept.__traceback__ is None and kept.__context__ is None  # or it holds the body

    play(web, case)


def asgi(
    app: Any, client: str, headers: dict[str, str] | None = None, path: str = "/openapi.json"
) -> tuple[int, dict[str, str]]:
    """A request from any address."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("it has no body")

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "client": (client, 1),
        "headers": raw,
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}


def test_a_client_has_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BURST_SECONDS", 3000.0)
    app = aggregate_app.create_app({}, client_rate=0.001)
    assert [asgi(app, "192.0.2.1")[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    status, headers = asgi(app, "192.0.2.1")
    assert (status, headers["retry-after"], headers["content-type"]) == (429, "1000", "application/problem+json")
    assert asgi(app, "192.0.2.2")[0] == 200
    app = aggregate_app.create_app({}, client_rate=0)
    assert {asgi(app, "192.0.2.1")[0] for _ in range(9)} == {200}


def test_who_watches_has_no_rate() -> None:
    app = aggregate_app.create_app({}, client_rate=0.5)
    assert [asgi(app, "192.0.2.1")[0] for _ in range(2)] == [200, 429], "the burst follows the rate"
    assert {asgi(app, "192.0.2.1", path="/health/live")[0] for _ in range(9)} == {200}
    assert asgi(app, "192.0.2.1", path="/healthy")[0] == 429


@pytest.mark.parametrize("value", ["..%2F..%2Fkeys", "a%2Fb", "a%5Cb", "..;", ".;x", "%252e%252e", "a%252Fb"])
def test_a_value_of_a_path_is_one_segment(value: str, web: Sandbox) -> None:
    async def main() -> None:
        url = web.url("/api/rates")
        table = {
            "path": config.Upstream("path", url + "/{x}", {"x": "EUR"}),
            "query": config.Upstream("query", url + "/EUR?q={x}", {"x": "EUR"}),
        }
        async with living(table) as app:
            status, _, body = await ask(app, f"/aggregate/path?x={value}")
            assert (status, json.loads(body)["parameter"]) == (422, "x")
            assert (await ask(app, f"/aggregate/query?x={value}&deadline_ms=20000"))[0] == 200
            assert web.log[-1].path.endswith("?q=" + quote(unquote(value), safe="")), "what was quoted is what is sent"

    app_run(main())


@pytest.mark.parametrize(
    ("text", "rate"), [("", None), ("0", 0.0), ("2.5", 2.5), ("-1", "x"), ("fast", "x"), ("nan", "x")]
)
def test_reads_the_rate(text: str, rate: float | str | None) -> None:
    if rate != "x":
        assert aggregate_app.configured_number({"AGGREGATE_RATE": text}, "AGGREGATE_RATE", "needed") == rate
        return
    with pytest.raises(SystemExit, match=f"AGGREGATE_RATE={text}: "):
        aggregate_app.configured_app({"AGGREGATE_RATE": text, "DATABASE_URL": "none"})


def test_a_request_keeps_its_id() -> None:
    app = aggregate_app.create_app({})
    assert asgi(app, "192.0.2.1", {"X-Request-ID": "abc-1"})[1]["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 65, 'a"', ""):
        made = asgi(app, "192.0.2.1", {"X-Request-ID": bad})[1]["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", made)

    async def main() -> None:
        heads: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server, aiohttp.ClientSession() as session:
            upstream = config.Upstream("a", url, headers={"X-Key": "secret"})
            source = upstreams.Source(upstream, session, co.Semaphore(1), clock=World().clock)
            upstreams.request_id.set("id-of-the-request")
            assert await aggregate_ask(source) == ("fresh", {}, 0.0)
        assert b"X-Request-ID: id-of-the-request\r\n" in heads[0] and b"X-Key: secret\r\n" in heads[0]

    asyncio.run(main())


def test_runs_with_nothing_configured(tmp_path: Path) -> None:
    """The promised command, on a fresh machine; and again, with what the first life left."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "uvicorn", "aggregate_app:app", "--port", "0"]
    ours = ("AGGREGATE_CONFIG", "AGGREGATE_RATE", "AGGREGATE_TOKEN", "DATABASE_URL")
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    environ["DATA_FOLDER"] = str(tmp_path)
    for expected in ("fresh", "stale"):
        log = tmp_path / "requests.log"  # a pipe that nobody reads would cost lines
        with (
            log.open("wb") as out,
            subprocess.Popen(command, cwd=HERE, env=environ, stderr=subprocess.PIPE, stdout=out) as server,
        ):
            assert server.stderr is not None
            said = b""
            while b"running on" not in said:
                line = server.stderr.readline()
                assert line, said.decode()
                said += line
            port = int(re.search(rb"running on http://127.0.0.1:(\d+)", said)[1])  # type: ignore[index]
            health = functools.partial(aggregate_http, port, "/health")
            wait_until(lambda health=health: health()[1]["database"]["state"] == "connected")  # type: ignore[misc]
            given = {"X-Request-ID": "x-1"}
            status, body, headers = aggregate_http(port, "/aggregate?deadline_ms=20000", headers=given)
            stream = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_LIMIT)
            stream.request("GET", "/events")
            assert stream.getresponse().readline() == b"retry: 2000\n"  # which must not keep the server from ending
            server.send_signal(signal.SIGINT)
            rest = server.stderr.read()
            stream.close()
        lines = [json.loads(line) for line in log.read_bytes().splitlines()]
        assert b"demo upstreams" in said and b"Traceback" not in rest and b"Warning" not in said + rest
        assert (status, {part["state"] for part in body["sources"].values()}) == (200, {expected})
        told = {line["request_id"]: line for line in lines if line["event"] == "request"}["x-1"]
        assert (told["path"], told["status"], told["sources"]["news"]) == ("/aggregate", 200, expected)
        assert (headers["cache-control"] == "no-cache") == (expected == "stale")


OPENAPI_FUZZ = """
seed = 1
continue-on-failure = true
cache.enabled = false
[generation]
deterministic = true
max-examples = 10
[phases.examples]
enabled = false  # it puts together what does not belong together
[phases.stateful]
enabled = false
[phases.coverage]
generate-duplicate-query-parameters = true
extra-data-sources.responses = false
[phases.fuzzing]
extra-data-sources.responses = false  # cases do not depend on answers
error-feedback.enabled = false
[auth.openapi.token]
bearer = "secret"
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]  # 503: no source has data, which is meant
positive_data_acceptance.expected-statuses = ["2xx", "304", "404", "414", "503"]  # 414: many parameters, all long
negative_data_rejection.expected-statuses = ["401", "404", "405", "414", "422", "503"]
"""


def openapi_table(base: str) -> dict[str, config.Upstream]:
    return config.read_config(config.DEMO.format(base=base), {})


class OpenapiHistory(History):
    """Two results of any source, one of them a failure, and always another page."""

    async def page(self, source: str, parameters: str, *_: Any) -> tuple[list[Result], bool]:
        now = datetime.now(UTC)
        ok, failed = (
            Result(source, parameters, now, 0.1, "ok", "[1]"),
            Result(source, parameters, now, 2.0, "http", None),
        )
        return [ok, failed], True

    async def outcomes(self, *_: Any) -> tuple[array[float], array[float], list[str]]:
        start, level = time.time() - 1000, [0.01] * 100 + [0.5] * 100
        return array("d", (start + i for i in range(200))), array("d", level), ["ok", "http"] * 100


@pytest.fixture(scope="module")
def openapi_port(web: Sandbox) -> Iterator[int]:
    app = aggregate_app.create_app(openapi_table(web.url("")), client_rate=0)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    assert app.service is not None
    app.service.history.__class__ = OpenapiHistory
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def openapi_paths(routes: Iterable[str], names: Iterable[str]) -> set[str]:
    """The paths of the document for the paths of these routes."""
    return {path.replace("{source}", name) for path in routes for name in names}


def openapi_load(port: int) -> OpenApiSchema:
    """Not from its URL: schemathesis would leave out /openapi.json then."""
    import schemathesis
    from schemathesis.config import SchemathesisConfig

    config = SchemathesisConfig.from_str(OPENAPI_FUZZ)
    status, document, _ = aggregate_http(port, "/openapi.json")
    assert status == 200
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema.config.update(base_url=f"http://127.0.0.1:{port}")
    return schema


def test_openapi_says_what_the_server_does(openapi_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from schemathesis.engine import from_schema
    from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

    monkeypatch.setenv("AGGREGATE_TOKEN", "secret")
    own = {name: each.parameters for name, each in openapi_table("http://x").items()}
    skipped = {"/events"}  # it streams for ever
    schema = openapi_load(openapi_port).exclude(path=sorted(skipped))

    together = ("/aggregate", "/cache/invalidate")

    @schema.hook
    def map_case(_: HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
        """OpenAPI cannot say that a parameter is allowed together with its source only."""
        every = ",".join(own) if case.path == "/aggregate" else ""
        asked = str(case.query.get("sources", case.query.get("source", every))).split(",")
        if case.meta is not None and case.meta.generation.mode.is_positive and case.path in together:
            foreign = {name for each in own.values() for name in each}
            foreign -= {name for each in asked for name in own.get(each, ())}
            case.query = {name: value for name, value in case.query.items() if name not in foreign}
        return case

    failures: dict[str, str] = {}
    tried: Counter[str] = Counter()
    for event in from_schema(schema).execute():
        if isinstance(event, (NonFatalError, FatalError)):
            failures[type(event).__name__] = repr(event)
        elif isinstance(event, ScenarioFinished):
            tried[f"{event.label}"] += len(event.recorder.interactions)
            for node in itertools.chain.from_iterable(event.recorder.checks.values()):
                if node.failure_info is not None:
                    failure = node.failure_info.failure
                    failures[f"{event.label} {node.name}"] = f"{failure.message}\n{node.failure_info.code_sample}"
    assert not failures, "\n\n".join(f"{what}: {text}" for what, text in failures.items())
    served = {
        f"{method.upper()} {path}"
        for path, item in schema.raw_schema["paths"].items()
        for method in item
        if path not in skipped
    }
    assert tried.keys() == served and min(tried.values()) >= 5


def test_openapi_history_and_report_are_as_described(openapi_port: int) -> None:
    """In full: not even their 503 may hide them from the test above."""
    import jsonschema_rs

    document = aggregate_http(openapi_port, "/openapi.json")[1]
    for path, name in (("/history/weather?city=Oslo&limit=2", "History"), ("/report?sources=weather,news", "Report")):
        status, body, headers = aggregate_http(openapi_port, path)
        assert (status, headers["cache-control"]) == (200, "no-store")
        jsonschema_rs.validate(
            {"$ref": f"#/components/schemas/{name}", "components": document["components"]}, body, validate_formats=True
        )
    assert body["sources"]["weather"]["change_points"] and body["sources"]["weather"]["errors"] == {"http": 100}


def test_openapi_has_the_routes_and_no_others(openapi_port: int) -> None:
    table = openapi_table("http://x")
    routes = cast(list[Route], aggregate_app.create_app(table).routes)
    served = {
        (method, path)
        for each in routes
        for path in openapi_paths([each.path], table)
        for method in (each.methods or set()) - {"HEAD"}
    }
    described = {
        (method.upper(), path)
        for path, item in aggregate_http(openapi_port, "/openapi.json")[1]["paths"].items()
        for method in item
    }
    assert served == described


def test_openapi_is_valid_and_so_are_its_examples(openapi_port: int) -> None:
    import jsonschema_rs

    schema = openapi_load(openapi_port)
    schema.validate()
    document = schema.raw_schema
    assert document == json.loads(json.dumps(openapi.document(openapi_table("http://x"), aggregate_app.VERSION)))
    examples, references = [], []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            references.extend([node["$ref"]] if "$ref" in node else [])
            if "schema" in node and "example" in node:
                examples.append((node["schema"], node["example"]))
            if "default" in node:
                examples.append(({name: value for name, value in node.items() if name != "default"}, node["default"]))
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(inner)

    walk(document)
    for reference in references:
        functools.reduce(lambda node, name: node[name], reference.removeprefix("#/").split("/"), document)
    assert len(examples) > 20
    for each, shown in examples:
        jsonschema_rs.validate({**each, "components": document["components"]}, shown, validate_formats=True)
    alone = openapi.document({"a": config.Upstream("a", "http://x/{q}", {"q": ""})}, "1")  # "" is no valid value
    assert "default" not in alone["paths"]["/aggregate/a"]["get"]["parameters"][-2]["schema"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "member"),
    [
        ("GET", "/aggregate/news?deadline_ms=1&deadline_ms=1", {}, 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate?sources=news&sources=flaky", {}, 422, {"parameter": "sources"}),
        ("GET", "/aggregate/weather?city=%00", {}, 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city=a%0Ab", {}, 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city", {}, 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city=%C3", {}, 422, {"detail": "the query is not percent-encoded UTF-8"}),
        ("GET", "/aggregate/news?%C3=a", {}, 422, {"detail": "the query is not percent-encoded UTF-8"}),
        ("GET", "/aggregate/%C3", {}, 404, {"sources": ["flaky", "news", "rates", "weather"]}),
        ("GET", "/aggregate/", {}, 404, {"title": "Not Found"}),
        ("GET", "/health/", {}, 404, {"title": "Not Found"}),
        ("POST", "/cache/invalidate?sources=news", {}, 422, {"parameter": "sources", "parameters": ["source"]}),
        ("POST", "/cache/invalidate?city=Oslo", {}, 422, {"parameter": "city", "parameters": ["source"]}),
        ("POST", "/cache/invalidate?source=weather&city=", {}, 422, {"parameter": "city"}),
        ("POST", "/cache/invalidate?source=news&source=news", {}, 422, {"parameter": "source"}),
        ("POST", "/cache/invalidate", {"X-Forwarded-For": "unknown"}, 403, {}),
        ("POST", "/cache/invalidate", {"X-Forwarded-For": "192.0.2.1"}, 403, {}),
        ("GET", "/health/live?" + "x" * 4097, {}, 414, {}),
        ("GET", "/health/live", {"A": "x" * 16_000, "B": "x" * 17_000}, 431, {}),
        ("GET", "/health/live", {"Content-Length": "65537"}, 413, {}),
    ],
)
def test_openapi_refusals(
    openapi_port: int, method: str, path: str, headers: dict[str, str], status: int, member: dict[str, Any]
) -> None:
    got, body, answered = aggregate_http(openapi_port, path, method, headers)
    assert (got, body["status"], answered["content-type"]) == (status, status, "application/problem+json")
    assert body.items() >= member.items() and re.fullmatch("[0-9a-f]{16}", answered["x-request-id"])


def test_openapi_bounds_are_those_that_are_said(openapi_port: int) -> None:
    for path, headers in (
        ("/health/live?" + "x" * 4096, {}),
        ("/health/live", {"A": "x" * 16_000, "B": "x" * 16_000}),
        ("/health/live", {"Content-Length": "65536"}),
    ):
        assert aggregate_http(openapi_port, path, headers=headers)[0] == 200


def test_openapi_head_and_any_etag(openapi_port: int) -> None:
    path = "/aggregate/news?deadline_ms=20000"
    status, body, headers = aggregate_http(openapi_port, path, "HEAD")
    assert (status, body) == (200, None) and int(headers["content-length"]) > 100
    for known, expected in (
        (headers["etag"], 304),
        (headers["etag"].removeprefix("W/"), 304),
        ("*", 304),
        ('"a", "b"', 200),
    ):
        assert aggregate_http(openapi_port, path, headers={"If-None-Match": known})[0] == expected


def test_openapi_an_error_of_our_own_is_a_problem_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(aggregate_app, "alive", broken)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("it has no body")

    scope = {"type": "http", "method": "GET", "path": "/health/live", "headers": [], "query_string": b""}
    with pytest.raises(ZeroDivisionError):  # for the server to log
        asyncio.run(aggregate_app.create_app({}, 0)(scope, receive, send))
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], headers[b"content-type"]) == (500, b"application/problem+json")
    assert b"x-request-id" in headers and json.loads(sent[1]["body"])["detail"] == "internal error"


def test_openapi_a_parameter_cannot_hide_one_of_the_api() -> None:
    with pytest.raises(config.ConfigError, match=r"a\.parameters: limit, source means something to the API itself"):
        config.read_config('[a]\nurl = "http://x/"\nparameters = { source = "b", limit = "1" }', {})
