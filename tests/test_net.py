"""crawl/net.py: codings, limits, names, proxies."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import socket
import threading
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crawl import net
from crawl.errors import FetchError
from crawl.net import ProxyRule, Resolver, TimeLimit
from primitives import retry
from tests.helpers.base import HANG_LIMIT, World, wait_until
from tests.helpers.crawl import pack, unpack

CODINGS = ["gzip", "deflate", "raw deflate", "br", "zstd"]


@pytest.mark.parametrize("coding", CODINGS)
@given(data=st.binary(max_size=2000), step=st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_decoding_gives_back_what_was_packed_whatever_the_pieces(coding: str, data: bytes, step: int) -> None:
    packed = pack(coding, data)
    assert unpack(coding, packed, step=step) == data
    if coding == "gzip":
        assert unpack(coding, packed + pack(coding, data), step=step) == data * 2
        assert unpack(coding, packed + b"junk", step=step) == data
    assert unpack("identity", data, step=step) == unpack(None, data, step=step) == data
    assert unpack("None", data, step=step) == data
    assert unpack("gzip, br", pack("br", pack("gzip", data)), step=step) == data


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_noticed_at_the_limit_and_a_cut_at_the_end(coding: str) -> None:
    packed = pack(coding, bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(FetchError) as caught:
        unpack(coding, packed, limit=1_000_000, step=65536)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.kind == "too_large"
    assert peak < 20_000_000
    with pytest.raises(FetchError) as caught:
        unpack(coding, pack(coding, random.Random(1).randbytes(10_000))[:5000])
    assert caught.value.kind == "decode"


@pytest.mark.parametrize("coding", [*CODINGS, "gzip, gzip, gzip, gzip", "unheard-of"])
@given(data=st.binary(min_size=1, max_size=300))
@settings(max_examples=40, deadline=None)
def test_rubbish_is_decoded_or_refused(coding: str, data: bytes) -> None:
    try:
        unpack(coding, data)
    except FetchError as error:
        assert error.kind in ("decode", "too_large")
    else:
        assert coding in CODINGS


def test_a_time_limit_counts_a_step_that_took_long_as_one() -> None:
    world = World(0.0)
    limit = TimeLimit(20.0, clock=world.clock)
    assert (limit.step, limit.next_step()) == (1.0, 1.0)
    world.now += 0.5
    assert limit.left() == 19.5
    world.now += 3600.0  # the interpreter was another's
    assert (limit.ours(), limit.left(), limit.ours()) == (3599.0, 18.5, 3599.0)
    world.now += 60.0
    limit.skip()
    within = TimeLimit(40.0, limit, clock=world.clock)
    assert (within.step, within.left(), limit.ours()) == (1.0, 18.5, 3599.0)
    for _ in range(18):
        world.now += 1.0
        limit.left()
    world.now += 0.25
    assert within.next_step() == limit.left() == 0.25
    world.now += 0.25
    for spent in (within, limit, within):
        with pytest.raises(TimeoutError):
            spent.left()
    with pytest.raises(TimeoutError):
        TimeLimit(0.0).left()


def test_a_name_is_looked_up_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    gate = threading.Event()

    def getaddrinfo(name: str, *args: Any, **more: Any) -> Any:
        asked.append(name)
        assert gate.wait(HANG_LIMIT)
        if name == "no.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, 1, 6, "", ("192.0.2.1", 0)), (socket.AF_INET6, 1, 6, "", ("2001:db8::1", 0, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = Resolver(threads=2)
    with pytest.raises(FetchError, match="did not answer") as late:
        resolver.lookup("a.example", TimeLimit(0.0))
    assert late.value.kind == "timeout"
    found = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")]

    async def many() -> list[Any]:
        waiting = [asyncio.create_task(resolver.lookup_async("a.example")) for _ in range(20)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*waiting)

    assert asyncio.run(many()) == [found] * 20
    assert resolver.lookup("a.example", TimeLimit(HANG_LIMIT)) == found
    for _ in range(2):
        with pytest.raises(FetchError, match="not known") as caught:
            resolver.lookup("no.example", TimeLimit(HANG_LIMIT))
        assert caught.value.kind == "dns"
    assert asked == ["a.example", "no.example"]
    assert resolver.lookup("127.0.0.1", TimeLimit(0.0)) == [(socket.AF_INET, "127.0.0.1")]
    assert resolver.lookup("::1", TimeLimit(0.0)) == [(socket.AF_INET6, "::1")]
    resolver.close()


def test_a_closed_resolver_lets_go_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: gate.wait(HANG_LIMIT) and [])
    resolver = Resolver()
    future = resolver.submit("slow.example")
    resolver.close()
    with pytest.raises(FetchError, match="interrupted"):
        future.result(HANG_LIMIT)
    gate.set()


def test_a_look_up_that_its_task_has_left_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: gate.wait(HANG_LIMIT) and [])
    said: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        resolver = Resolver()
        task = asyncio.create_task(resolver.lookup_async("slow.example"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        resolver.close()
        for _ in range(3):
            await asyncio.sleep(0)

    before = set(threading.enumerate())
    asyncio.run(main())
    gate.set()
    wait_until(lambda: set(threading.enumerate()) <= before)  # the last that has the future
    gc.collect()
    assert said == []


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert ProxyRule(None).find("http://a.example/") is None
    assert ProxyRule("http://p:1").find("https://a.example/") == "http://p:1"
    monkeypatch.setenv("http_proxy", "http://q:2")
    monkeypatch.setenv("no_proxy", "b.example")
    assert ProxyRule(None).find("http://a.example/") == "http://q:2"
    assert ProxyRule(None).find("http://b.example/x") is None
    assert ProxyRule(None).find("https://a.example/") is None


@pytest.mark.parametrize(
    ("errno", "seconds", "asked"),
    [(socket.EAI_AGAIN, 0.0, 2), (socket.EAI_AGAIN, 1.5, 1), (socket.EAI_NONAME, 0.0, 1)],
)
def test_resolver_asks_again_if_it_failed_for_the_moment(
    errno: int, seconds: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, world = list[str](), World()

    def getaddrinfo(name: str, *_: Any, **__: Any) -> Any:
        names.append(name)
        world.now += seconds
        raise socket.gaierror(errno, "no")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(net, "retry", functools.partial(retry, clock=world.clock, sleep=world.sleep))
    resolver = Resolver()
    with pytest.raises(FetchError, match=r"host\.example") as caught:
        resolver.lookup("host.example", TimeLimit(HANG_LIMIT))
    assert (names, caught.value.retry) == (["host.example"] * asked, errno == socket.EAI_AGAIN)
    resolver.close()
