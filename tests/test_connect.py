"""market/connect.py: connections to exchanges that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Iterator
from typing import Any

import aiohttp
import pytest

from market.connect import Feed
from market.feeds import ADAPTERS, Okx
from market.trade import EARLIEST_NS, Parsed, Trade
from primitives import CircuitBreaker
from sandbox import markets as sandbox_markets
from sandbox.exchanges import WIRES
from sandbox.markets import Exchanges, Market
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, World, run_task, ticks, until_async, wait_until
from tests.helpers.market import (
    NAMES,
    SYMBOLS,
    FakeSocket,
    MarketConnectWorld,
    Sink,
    feed_options,
)

NUMBERED = ("binance", "coinbase", "kraken", "bitfinex")  # their frames or trades have numbers


@pytest.fixture
def market_connect_them() -> Iterator[Exchanges]:
    gc.collect()  # what asyncio closes in a last turn that does not come any more ends as garbage
    descriptors = len(os.listdir("/proc/self/fd"))
    with Exchanges(symbols=SYMBOLS, heartbeat=0, ledger=True) as them:
        yield them

    def closed() -> bool:
        gc.collect()
        return len(os.listdir("/proc/self/fd")) <= descriptors

    wait_until(closed)
    assert not any(thread.name == "exchanges" for thread in threading.enumerate())


def test_ten_exchanges_tell_every_trade_once_and_right(market_connect_them: Exchanges) -> None:
    them = market_connect_them

    async def main() -> None:
        async with MarketConnectWorld(them) as world:
            them.emit(7)
            for name in world.names:
                await world.settled(name)
            for name in world.names:
                assert world.sink.ids(name) == them.sent_ids(name)
                assert them.sent(name) == {ADAPTERS[name].native(symbol): 7 for symbol in SYMBOLS}
                for symbol in SYMBOLS:
                    wire, native = WIRES[name](), ADAPTERS[name].native(symbol)
                    tape = Market(1).tape(name, *wire.pair(native))
                    made = [trade for trade in world.sink.live(name) if trade.symbol == symbol]
                    expected = [(tape.prices[n], tape.sizes[n], tape.sides[n]) for n in range(1000, 1007)]
                    assert [(t.price_value, t.size_value, t.side) for t in made] == [
                        (float(price), float(size), side) for price, size, side in expected
                    ]
                found = world.feeds[name].stats()
                assert (found.connects, found.failures, found.bad, found.gaps, found.outages) == (1, 0, 0, 0, 0)
                assert (found.duplicates, found.disorder, found.errors) == (0, 0, 0)
                assert found.trades == len(world.sink.told[name])
            assert world.sink.letters == []
        assert {name: each.closes for name, each in them.stats().items()} == dict.fromkeys(world.names, (1000,))

    run_task(main())


# What each fault that leaves the connection comes to: trades sent, dead letters, labels of the trade and of the next.
SMALL_FAULTS = {
    "unknown": (0, 1, (), ""),
    "not json": (0, 1, (), ""),
    "not utf-8": (0, 1, (), ""),
    "wrong types": (1, 1, (), "gap"),
    "text": (1, 0, ("",), ""),
    "gzip": (1, 0, ("",), ""),
    "binary": (1, 0, ("",), ""),
    "fragments": (1, 0, ("",), ""),
    "gap": (0, 0, (), "gap"),
    "duplicate": (0, 0, ("duplicate",), ""),
    "swap": (2, 0, ("gap", "disorder"), ""),
    "error": (0, 0, (), ""),
    "ping": (0, 0, (), ""),
}


@pytest.mark.parametrize("fault", SMALL_FAULTS)
def test_a_fault_that_leaves_the_connection(market_connect_them: Exchanges, fault: Any) -> None:
    """On each exchange in turn: nothing is lost, what is missing is labelled, the connection stays, and the others'."""
    them, (sent, letters, labels, after) = market_connect_them, SMALL_FAULTS[fault]

    async def main() -> None:
        async with MarketConnectWorld(them) as world:
            them.emit(2)
            for victim in world.names:
                await world.settled(victim)
                numbered = victim in NUMBERED
                before, told = them.sent(victim), len(world.sink.told[victim])
                world.sink.letters.clear()
                assert them.fault(victim, fault) == 1
                assert sum(them.sent(victim).values()) - sum(before.values()) == sent
                there = len(labels) + told
                await until_async(
                    lambda v=victim, n=there: (  # type: ignore[misc]
                        len(world.sink.told[v]) >= n and len(world.sink.letters) >= letters
                    )
                )
                them.emit(1, victim)
                await until_async(lambda v=victim, n=there + 2: len(world.sink.told[v]) >= n)  # type: ignore[misc]
                flags = [trade.flags for trade in world.sink.told[victim][told:]]
                if fault == "swap":
                    first = labels[0] if victim in ("binance", "coinbase", "kraken") else ""
                    assert flags == [first, "disorder", "", ""], victim
                else:
                    assert flags == [*labels, after if numbered else "", ""], victim
                assert [letter[0] for letter in world.sink.letters] == [victim] * letters
                assert all(letter[1] and letter[2] and letter[3] > EARLIEST_NS for letter in world.sink.letters)
                if fault != "wrong types":
                    if fault == "swap":
                        ids, expected = world.sink.ids(victim), them.sent_ids(victim)
                        assert {name: sorted(each) for name, each in ids.items()} == {
                            name: sorted(each) for name, each in expected.items()
                        }
                    elif fault != "duplicate":
                        assert world.sink.ids(victim) == them.sent_ids(victim)
                found = world.feeds[victim].stats()
                assert (found.connects, found.state, found.bad) == (1, "live", letters)
                assert found.errors == (fault == "error") and found.duplicates == (fault == "duplicate")
                missed = 2 if victim == "bitfinex" else 1  # "te" and "tu"
                if fault in ("gap", "wrong types") and numbered:
                    assert found.gaps == 1 and (fault == "gap") <= (found.missed == missed)
            them.emit(1)
            for name in world.names:
                await world.told(name, sum(them.sent(name).values()) - (fault == "wrong types"))
            if fault in ("ping", "fragments"):
                pongs = {name: 2 if name == "bitfinex" and fault == "fragments" else 1 for name in world.names}
                await until_async(lambda: {name: each.pongs for name, each in them.stats().items()} == pongs)

    run_task(main())


ENDS = {
    "close": "the exchange closed: 1001",
    "drop": "the connection ended without a close frame",
    "reset": "the connection ended without a close frame",
    "half": "the connection ended without a close frame",
    "maintenance": "",
    "huge": "the connection broke the protocol",
    "reserved": "the connection broke the protocol",
    "stall": "no sign of life",
}


@pytest.mark.parametrize("fault", ENDS)
def test_a_fault_that_ends_the_connection(market_connect_them: Exchanges, fault: Any) -> None:
    """On each exchange in turn: a new connection, what was missed is labelled, and the others notice nothing."""
    them = market_connect_them
    time_of = {name: World() for name in NAMES[::2]}  # the time of those that are to stall
    limits: dict[str, Any] = {"ping_every": 0.1, "pong_within": 1.0, "close_within": 0.1}
    own = {name: {**limits, "clock": its.clock} for name, its in time_of.items()} if fault == "stall" else {}

    async def main() -> None:
        async with MarketConnectWorld(them, max_message=1 << 20, own=own) as world:
            them.emit(2)
            for victim in world.names:
                await world.settled(victim)
                if fault == "stall":
                    continue
                assert them.fault(victim, fault, **({"size": 2 << 20} if fault == "huge" else {})) == 1
                them.emit(2, victim)  # nobody hears that, unless a snapshot tells of it
                await world.until(victim, "live", 2)
            if fault == "stall":  # each has to be waited for: all at once
                for victim in world.names[::2]:
                    them.fault(victim, fault)

                for its in time_of.values():
                    its.now += limits["ping_every"]
                await until_async(lambda: all(them.stats()[victim].pings for victim in time_of))
                for its in time_of.values():
                    its.now += limits["pong_within"]
                for victim in time_of:
                    await world.until(victim, "live", 2)
            victims = world.names[:: 2 if fault == "stall" else 1]
            ended = {name: world.feeds[name].stats() for name in world.names}
            them.emit(3)
            for name in world.names:
                await world.told(name, sum(them.sent(name).values()))
            for name in world.names:
                found = world.feeds[name].stats()
                assert found.connects == ended[name].connects == (2 if name in victims else 1)
                assert world.sink.ids(name) == them.sent_ids(name)
                if name not in victims:
                    assert (found.gaps, found.outages, found.last_error) == (0, 0, "")
                    continue
                assert ended[name].last_error.startswith(ENDS[fault])
                all_ids: dict[str, set[str]] = {}
                for trade in world.sink.told[name]:
                    all_ids.setdefault(trade.symbol, set()).add(trade.trade_id)
                happened = 5 if fault == "stall" else 8 if fault == "half" else 7
                for symbol in SYMBOLS:
                    wanted = {WIRES[name]().trade_id(1000 + n) for n in range(1, happened + 1 - (fault == "half"))}
                    wanted |= (
                        {WIRES[name]().trade_id(1000 + happened)} if symbol == "BTC-USD" and fault == "half" else set()
                    )
                    missing = wanted - all_ids[symbol]
                    if missing:
                        flags = [t.flags for t in world.sink.told[name] if t.symbol == symbol and "gap" in t.flags]
                        assert len(flags) == 1, (name, symbol)
                if name in ("kraken", "gemini", "bitfinex", "bitget"):  # their snapshots tell everything
                    assert found.gaps == found.outages == 0
                    assert all(len(each) >= happened for each in all_ids.values())
                elif name in ("binance", "coinbase"):
                    assert found.outages == 0 and found.gaps == (0 if fault == "stall" else 2)
                else:
                    assert found.outages == 2
            letters = [(letter[0], letter[2]) for letter in world.sink.letters]
            assert letters == ([(name, b"") for name in world.names] if fault in ("huge", "reserved") else [])
        assert {name: each.cut for name, each in them.stats().items()} == dict.fromkeys(
            world.names, int(fault == "half")
        )

    run_task(main())


def test_silence_while_others_talk() -> None:
    """Only protocol pongs come: the feed is dead by `silent_after`, though the link lives."""

    async def main() -> None:
        async with MarketConnectWorld(them, ("kraken", "okx"), ping_every=0.02) as world:
            quiet = world.begin("gateio", silent_after=0.3)
            await world.until("gateio", "live", 2)
            assert quiet.stats().last_error == "silent for 0.3 s"
            await until_async(lambda: them.stats()["gateio"].pings > 3)
            assert [world.feeds[name].stats().connects for name in ("kraken", "okx")] == [1, 1]
            assert them.stats()["gateio"].closes[0] == 1001

    with Exchanges(symbols=SYMBOLS, heartbeat=0) as them:
        run_task(main())


DOORS = {
    "503": "the handshake was refused: HTTP 503",
    "429": "the handshake was refused: HTTP 429",
    "page": "the handshake was refused: HTTP 200",
    "slow": "no connection within 0.2 s",
    "reset": "Client",
    "mute": "no acknowledgement within 0.2 s",
    "deny": "no acknowledgement within 0.2 s: the exchange says: ",
    "close": "the exchange closed: 1013",
}


@pytest.mark.parametrize("door", DOORS)
def test_an_exchange_that_lets_nobody_in(market_connect_them: Exchanges, door: Any) -> None:
    them = market_connect_them

    async def main() -> None:
        them.door("okx", door, seconds=HANG_LIMIT, retry_after=7 if door in ("503", "429") else None)
        naps: list[float] = []

        async def sleep(seconds: float) -> None:
            naps.append(seconds)
            await asyncio.sleep(0)

        async with MarketConnectWorld(them, ("kraken", "bybit")) as world:
            hurry: dict[str, Any] = {"ack_within": 0.2, "close_within": 0.1}
            limits = {"slow": {"connect_within": 0.2}, "mute": hurry, "deny": hurry}.get(door, {})
            feed = world.begin("okx", sleep=sleep, rng=lambda: 0.5, base=1.0, cap=3.0, **limits)
            await until_async(lambda: len(naps) >= 3 and feed.stats().last_error.startswith(DOORS[door]))
            them.emit(1, "kraken", "bybit")
            found = feed.stats()
            assert found.failures >= 3 and found.trades == 0
            assert (found.connects > 0) == (door in ("mute", "deny", "close"))
            later = 7.0 if door in ("503", "429") else 0.0
            assert naps[:3] == [later + 0.5, later + 1.0, later + 1.5]
            them.door("okx", "open")
            feed._times = dataclasses.replace(feed._times, connect_within=HANG_LIMIT, ack_within=HANG_LIMIT)
            await world.until("okx", "live")
            them.emit(1, "okx")
            for name in world.feeds:
                await world.settled(name)
                assert len(world.sink.live(name)) == 2

    run_task(main())


class FakeSession:
    """A session whose connections go by a script: an error, or how long (s of the world's clock) it lives."""

    def __init__(self, world: World, script: Iterator[BaseException | float]) -> None:
        self.world, self.script, self.times = world, script, list[float]()

    async def ws_connect(self, url: str, **_: object) -> FakeSocket:
        self.times.append(self.world.now)
        step = next(self.script)
        if isinstance(step, BaseException):
            raise step
        return FakeSocket(self.world, step)


def market_connect_naps(script: list[BaseException | float], **options: Any) -> tuple[list[float], Feed]:
    """The waits that a script of attempts comes to; it ends with the script."""
    world = World()

    async def main() -> Feed:
        session: Any = FakeSession(world, iter([*script, KeyError("end of the script")]))
        sink = Sink()
        feed = Feed(
            *(ADAPTERS["binance"], ["BTC-USD"], sink.emit, sink.dead),
            **feed_options(
                {"session": session, "clock": world.clock, "sleep": world.asleep, "rng": lambda: 0.5, **options}
            ),
        )
        with pytest.raises(KeyError, match="end of the script"):
            await feed.run()
        return feed

    feed = run_task(main())
    return world.naps, feed


def test_backoff_is_exact_and_begins_anew_after_health() -> None:
    never = CircuitBreaker("never", failures=None, reset=1.0)
    refused: list[BaseException | float] = [aiohttp.ClientConnectionError("no") for _ in range(8)]
    naps, _ = market_connect_naps(refused, breaker=never)
    assert naps == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    naps, feed = market_connect_naps([*refused[:4], 29.9, refused[0], 30.0, *refused[:2]], breaker=never)
    assert naps == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 0.5, 1.0, 2.0]
    assert feed.stats().connects == 2 and feed.stats().failures == 3
    naps, _ = market_connect_naps([*refused[:3]], breaker=never, rng=lambda: 0.999, base=3.0, cap=5.0)
    assert naps == pytest.approx([2.997, 4.995, 4.995])


def test_breaker_waits_longer_and_closes_by_health() -> None:
    refused: list[BaseException | float] = [aiohttp.ClientConnectionError("no") for _ in range(8)]
    naps, feed = market_connect_naps([*refused[:5], refused[5], 31.0, refused[6]])
    # five failures in 7.5 s: 30 s and a quarter, less the wait that was due anyway; doubled; then the probe is healthy
    assert naps == [0.5, 1.0, 2.0, 4.0, 8.0, 37.5 - 8.0, 15.0, 75.0 - 15.0, 0.5, 1.0]
    assert feed.breaker.stats().opened == 2 and feed.stats().breaker == "closed"
    naps, feed = market_connect_naps([*refused[:5], 29.0])  # a probe that connects, and does not last
    assert naps == [0.5, 1.0, 2.0, 4.0, 8.0, 29.5, 15.0, 60.0]
    assert feed.breaker.stats().opened == 2


def test_ten_feeds_come_back_one_by_one(market_connect_them: Exchanges) -> None:
    """All are closed in the same moment: no two wait for the same time, and none comes back before its own."""
    them, waits, due = market_connect_them, dict[str, float](), dict[str, asyncio.Event]()

    def arrivals() -> dict[str, int]:
        return {name: len(them.arrivals(name)) for name in NAMES}

    async def main() -> None:
        async with MarketConnectWorld(them, names=()) as world:
            for number, name in enumerate(NAMES):
                due[name] = asyncio.Event()

                async def sleep(seconds: float, name: str = name) -> None:
                    waits[name] = seconds
                    await due[name].wait()

                world.begin(name, sleep=sleep, rng=random.Random(number).random, base=1.0, cap=1.0)
            for name in NAMES:
                await world.until(name, "live")
            for name in NAMES:
                them.fault(name, "close")
            await until_async(lambda: len(waits) == len(NAMES))
            expected = dict.fromkeys(NAMES, 1)
            for name in sorted(NAMES, key=waits.__getitem__):
                assert arrivals() == expected
                due[name].set()
                await world.until(name, "live", 2)
                expected[name] = 2
            assert arrivals() == expected

    run_task(main())
    assert waits == {name: random.Random(number).random() for number, name in enumerate(NAMES)}
    assert min(later - earlier for earlier, later in itertools.pairwise(sorted(waits.values()))) > 0.001


def test_an_emit_that_waits_holds_the_exchange_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is read, nothing is lost, and our own silence is not taken for the exchange's."""
    count = 6000
    monkeypatch.setattr(sandbox_markets, "BUFFER_LIMIT", 65_536)
    monkeypatch.setattr(sandbox_markets, "AT_ONCE", 200)

    def small(address: Any) -> socket.socket:
        made = socket.socket(*address[:3])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        return made

    async def main() -> None:
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=small))
        limits: dict[str, Any] = {"silent_after": 0.2, "ping_every": 0.05, "pong_within": 0.1, "session": session}
        async with session, MarketConnectWorld(them, ("bitstamp",), symbols=("BTC-USD",)) as world:
            world.sink.gate = asyncio.Event()
            held = world.begin("binance", symbols=("BTC-USD",), **limits)
            await world.until("binance", "live")
            them.emit(count, "binance")
            await until_async(lambda: len(world.sink.told.get("binance", ())) == 1)
            for _ in range(50):  # the server goes on offering what is due
                them.emit(0)
                await ticks()
            assert len(world.sink.told["binance"]) == 1 and held.stats().frames == 2
            sent = sum(them.sent("binance").values())
            assert 600 < sent < count
            world.sink.gate.set()

            def all_there() -> bool:
                them.emit(0)
                return len(world.sink.told["binance"]) >= count

            await until_async(all_there)
            assert world.sink.ids("binance") == them.sent_ids("binance")
            assert held.stats().connects == 1 and held.stats().gaps == 0

    with Exchanges(symbols=SYMBOLS, heartbeat=0, ledger=True, send_buffer=32_768) as them:
        run_task(main())


def test_others_have_their_turn() -> None:
    """Frames that are there without waiting do not keep the loop."""
    world, turns = World(), 0
    frames = [b'{"result":null,"id":1}', *([b'{"e":"serverShutdown2"}'] * 500)]

    async def main() -> None:
        nonlocal turns
        sink = Sink()
        socket_ = FakeSocket(world, 1.0, frames)

        class Session:
            async def ws_connect(self, url: str, **_: object) -> FakeSocket:
                return socket_

        session: Any = Session()
        options: Any = {"session": session, "clock": world.clock, "turn": 0.0}
        feed = Feed(ADAPTERS["binance"], ["BTC-USD"], sink.emit, sink.dead, **options)
        run = asyncio.create_task(feed.run())
        while socket_.frames:
            turns += 1
            await asyncio.sleep(0)
        await feed.stop()
        await run
        assert len(sink.letters) == 500

    run_task(main())
    assert turns >= 250


def test_stop_tells_what_was_sent_before() -> None:
    """At full rate: to the last trade that was written before the exchange saw the close frame."""

    async def main() -> None:
        async with MarketConnectWorld(them) as world:
            await until_async(lambda: all(sum(them.sent(name).values()) > 100 for name in world.names))
        for name in world.names:
            assert world.sink.ids(name) == them.sent_ids(name)
            assert sum(them.sent(name).values()) > 20
            assert world.feeds[name].stats().state == "stopped"
        assert all(each.closes == (1000,) for each in them.stats().values())
        assert world.sink.letters == []

    with Exchanges(rate=3000.0, symbols=SYMBOLS, ledger=True) as them:
        run_task(main())


@pytest.mark.parametrize("state", ["idle", "waiting", "refused", "connecting", "subscribing", "live"])
def test_stop_in_every_state(market_connect_them: Exchanges, state: str) -> None:
    them = market_connect_them

    async def main() -> None:
        async with MarketConnectWorld(them, names=()) as world:
            doors: dict[str, Any] = {"waiting": "503", "refused": "503", "connecting": "slow", "subscribing": "mute"}
            them.door("okx", doors.get(state, "open"), seconds=60.0)
            options: dict[str, Any] = {"base": 1000.0, "cap": 1000.0, "rng": lambda: 0.5}
            if state == "refused":
                options |= {"base": 0.0, "breaker": CircuitBreaker("okx", failures=1, reset=1000.0, max_reset=1000.0)}
            feed = world.feed("okx", **options)
            if state == "idle":
                await feed.stop()
                await feed.run()
            else:
                run = asyncio.create_task(feed.run())
                await until_async(lambda: feed.stats().state == state)
                if state in ("waiting", "refused"):
                    assert feed.stats().retry_in > 10
                await asyncio.wait_for(asyncio.gather(feed.stop(3600.0), feed.stop(3600.0)), HANG_LIMIT)
                await asyncio.wait_for(run, HANG_LIMIT)
            await feed.stop()
            assert feed.stats().state == "stopped"
            with pytest.raises(RuntimeError) if state != "idle" else contextlib.nullcontext():
                await feed.run()
        expected = (1000,) if state in ("subscribing", "live") else ()
        assert them.stats()["okx"].closes == expected

    run_task(main())


def test_stop_does_not_wait_for_ever(market_connect_them: Exchanges) -> None:
    """An emit that never returns, and an exchange that never answers the close frame; and a stop from within."""
    them = market_connect_them

    async def main() -> None:
        async with MarketConnectWorld(them, ("okx", "gateio"), close_within=0.1) as world:
            world.sink.gate = asyncio.Event()
            them.emit(2, "okx")
            await world.told("okx", 1)
            await world.feeds["okx"].stop(0.1)
            await asyncio.wait_for(world.runs[0], HANG_LIMIT)
            them.fault("gateio", "stall")
            await asyncio.wait_for(world.feeds["gateio"].stop(3600.0), HANG_LIMIT)
            await asyncio.wait_for(world.runs[1], HANG_LIMIT)
            stopped: list[Feed] = []

            async def emit(exchange: str, trades: list[Trade]) -> None:
                stopped.append(feed)
                await feed.stop()

            feed = Feed(ADAPTERS["bybit"], ["BTC-USD"], emit, world.sink.dead, url=them.urls["bybit"])
            run = asyncio.create_task(feed.run())
            await until_async(lambda: feed.stats().state == "live")
            them.emit(1, "bybit")
            await asyncio.wait_for(run, HANG_LIMIT)
            assert stopped == [feed] and feed.stats().state == "stopped"
        assert them.stats()["bybit"].closes == them.stats()["okx"].closes == (1000,)

    run_task(main())


def test_cancelled_it_sends_a_close_frame_too(market_connect_them: Exchanges) -> None:
    them = market_connect_them

    async def main() -> None:
        async with MarketConnectWorld(them, ("kraken",)) as world:
            world.runs[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await world.runs.pop()
            await until_async(lambda: them.stats()["kraken"].closes == (1001,))
            assert world.feeds["kraken"].stats().state == "stopped"

    run_task(main())


@pytest.mark.parametrize("which", ["emit", "dead"])
@pytest.mark.parametrize("how", ["at once", "later"])
def test_an_error_of_the_users_ends_it(market_connect_them: Exchanges, which: str, how: str) -> None:
    them = market_connect_them

    async def later() -> None:
        raise ZeroDivisionError

    def fail(*_: object) -> Awaitable[None]:
        if how == "later":
            return later()
        raise ZeroDivisionError

    async def main() -> None:
        sink = Sink()
        emit, dead = (fail, sink.dead) if which == "emit" else (sink.emit, fail)
        feed = Feed(ADAPTERS["okx"], ["BTC-USD"], emit, dead, url=them.urls["okx"])
        run = asyncio.create_task(feed.run())
        await until_async(lambda: feed.stats().state == "live")
        if which == "emit":
            them.emit(1)
        else:
            them.fault("okx", "unknown")
        with pytest.raises(ZeroDivisionError):
            await run
        await until_async(lambda: them.stats()["okx"].closes == (1001,))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_task(main())


def test_pings_as_the_exchange_wants_them(market_connect_them: Exchanges) -> None:
    them = market_connect_them

    async def main() -> None:
        async with MarketConnectWorld(them, names=()) as world:
            for name in ("okx", "bybit", "gateio", "bitget", "bitstamp"):
                hasty = type("Hasty", (type(ADAPTERS[name]),), {"ping_every": 0.03})()
                feed = world.begin(name, hasty, symbols=["BTC-USD"])
                ping = re.sub(r'"time":\d+', "", str(hasty.ping()))

                def pinged(name: str = name, ping: str = ping) -> int:
                    return sum(re.sub(r'"time":\d+', "", str(each)) == ping for each in them.heard(name))

                await until_async(lambda: pinged() >= 3)
                await until_async(lambda f=feed: f.stats().frames >= 4)  # type: ignore[misc]
                assert feed.stats().errors == feed.stats().bad == 0

    run_task(main())


def test_a_symbol_that_is_refused_does_not_keep_the_others(market_connect_them: Exchanges) -> None:
    them = market_connect_them

    async def main() -> None:
        async with MarketConnectWorld(them, names=()) as world:
            feed = world.begin("bitstamp", symbols=["BTC-USD", "XRP-USD"])
            await world.until("bitstamp", "live")
            assert feed.stats().errors == 1 and "not supported" in feed.stats().last_error
            with pytest.raises(ValueError, match="not a symbol"):
                world.feed("bitstamp", symbols=["BTCUSD"])
            with pytest.raises(ValueError, match="no symbols"):
                world.feed("bitstamp", symbols=[])

    run_task(main())


def test_a_key_in_the_address_is_not_told(market_connect_them: Exchanges) -> None:
    them = market_connect_them

    async def main() -> None:
        sink = Sink()
        adapter = ADAPTERS["finnhub"].with_keys({"FINNHUB_API_KEY": "sesame"})
        for url in (them.urls["okx"], "ws://[broken", "ws://127.0.0.1:1/x"):
            them.door("okx", "503")
            feed = Feed(adapter, ["AAPL-USD"], sink.emit, sink.dead, url=url, **feed_options({"base": 1000.0}))
            run = asyncio.create_task(feed.run())
            await until_async(lambda f=feed: f.stats().state == "waiting")  # type: ignore[misc]
            assert feed.stats().last_error and "sesame" not in repr(feed)
            await feed.stop()
            await run

    run_task(main())


def test_the_market_is_the_seeds() -> None:
    one, same, other = Market(5), Market(5), Market(6)
    tape = one.tape("kraken", "BTC", "USD")
    assert tape == same.tape("kraken", "BTC", "USD") != other.tape("kraken", "BTC", "USD")
    beside = one.tape("okx", "BTC", "USDT")
    assert tape != beside
    assert all(
        abs(float(here) / float(there) - 1) < 1e-3 for here, there in zip(tape.prices, beside.prices, strict=True)
    )
    steps = [abs(float(b) / float(a) - 1) for a, b in itertools.pairwise([*tape.prices, tape.prices[0]])]
    assert max(steps) < 1e-3 and min(map(float, tape.sizes)) > 0
    for size in (0, 125, 126, 65_535, 65_536):
        made = sandbox_markets.frame(b"x" * size, 2, fin=False, reserved=4)
        assert made[0] == 0x42 and made.endswith(b"x" * size)
        assert len(made) - size == (2 if size < 126 else 4 if size < 65_536 else 10)
    for wrong in ({"rate": -1.0}, {"symbols": ()}, {"exchanges": ("nowhere",)}, {"port": 70_000}):
        with pytest.raises(ValueError, match=r"needed|no such"):
            Exchanges(**wrong)


def test_the_servers_as_a_program() -> None:
    """`python -m sandbox exchanges`: the addresses, trades at the rate asked for, the counts at the end."""
    command = [sys.executable, "-m", "sandbox", "exchanges", "--rate", "2000", "--symbols", "BTC-USD"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE) as program:
        assert program.stdout is not None
        urls = json.loads(program.stdout.readline())

        async def main() -> int:
            sink = Sink()
            feed = Feed(ADAPTERS["kraken"], ["BTC-USD"], sink.emit, sink.dead, url=urls["kraken"])
            run = asyncio.create_task(feed.run())
            await until_async(lambda: len(sink.live("kraken")) >= 100)
            lag = feed.stats().lag
            await feed.stop()
            await run
            assert abs(lag) < 1e6 * HANG_LIMIT
            return len(sink.live("kraken"))

        told = run_task(main())
        program.send_signal(signal.SIGTERM)
        assert json.loads(program.stdout.readline())["kraken"] == told
        assert program.wait(PROGRAM_LIMIT) == 0


def test_whatever_an_adapter_raises_the_frame_is_not_lost(market_connect_them: Exchanges) -> None:
    them = market_connect_them

    class Broken(Okx):
        def parse(self, frame: str | bytes, received_ns: int) -> Parsed:
            if b"tradeId" in (frame if isinstance(frame, bytes) else frame.encode()):
                raise ZeroDivisionError("oh")
            return super().parse(frame, received_ns)

    async def main() -> None:
        async with MarketConnectWorld(them, names=()) as world:
            feed = world.begin("okx", Broken(), symbols=["BTC-USD"])
            await world.until("okx", "live")
            them.emit(2)
            await until_async(lambda: bool(world.sink.letters))
            assert [letter[:2] for letter in world.sink.letters] == [("okx", "ZeroDivisionError: oh")]
            assert b"tradeId" in world.sink.letters[0][2]
            assert feed.stats().state == "live" and feed.stats().bad == 1

    run_task(main())


def test_an_exchange_that_never_stops_talking() -> None:
    """No close frame comes, and trades go on: they are told for `close_within`, and then the connection is cut."""

    async def main() -> None:
        async with MarketConnectWorld(them, ("okx", "binance"), close_within=0.2) as world:
            for name in world.names:
                assert them.fault(name, "deaf") == 1
            await until_async(lambda: all(world.sink.live(name) for name in world.names))
            told = len(world.sink.live("binance"))
            await asyncio.wait_for(asyncio.gather(*(feed.stop(3600.0) for feed in world.feeds.values())), HANG_LIMIT)
            assert len(world.sink.live("binance")) > told

    with Exchanges(rate=4000.0, symbols=SYMBOLS, exchanges=("okx", "binance"), beat=0.01) as them:
        run_task(main())


def test_what_an_exchange_announces(market_connect_them: Exchanges) -> None:
    """Asked for a new connection, it goes by itself, and that is no failure; a status alone is noted."""
    them, asking = market_connect_them, ("binance", "bitstamp", "okx", "bitfinex")

    async def main() -> None:
        async with MarketConnectWorld(them, (*asking, "kraken")) as world:
            for name in world.names:
                breaker = world.feeds[name].breaker = CircuitBreaker(name, failures=1)
                them.fault(name, "maintenance", code=0)
                if name == "kraken":
                    await until_async(lambda: world.feeds["kraken"].stats().note == "system: maintenance")
                    assert world.feeds["kraken"].stats().connects == 1
                    continue
                await world.until(name, "live", 2)
                assert world.feeds[name].stats().last_error.startswith("the exchange asked for it: ")
                assert breaker.stats().opened == 0 and world.feeds[name].stats().failures == 1
            them.emit(3, "bitfinex")  # its frames are counted anew
            await until_async(lambda: len(world.sink.live("bitfinex")) == 6)
            them.fault("bitfinex", "gap")
            them.emit(1, "bitfinex")
            await until_async(lambda: len(world.sink.live("bitfinex")) == 8)
            found = world.feeds["bitfinex"].stats()
            assert (found.gaps, found.missed) == (1, 2)
        assert {name: each.closes for name, each in them.stats().items() if name in asking} == dict.fromkeys(
            asking, (1001, 1000)
        )

    run_task(main())


def test_frames_are_counted_anew(market_connect_them: Exchanges) -> None:
    """A gap right at the beginning of a later connection is seen, though its numbers were there before."""
    them = market_connect_them

    async def main() -> None:
        async with MarketConnectWorld(them, ("bitfinex",)) as world:
            them.emit(20)
            await world.settled("bitfinex")
            them.fault("bitfinex", "drop")
            await world.until("bitfinex", "live", 2)
            them.fault("bitfinex", "gap")
            them.emit(1)
            await until_async(lambda: len(world.sink.live("bitfinex")) == 42)
            found = world.feeds["bitfinex"].stats()
            assert (found.gaps, found.missed, found.outages) == (1, 2, 0)

    run_task(main())


def test_after_a_wait_of_emit_silence_begins_anew(market_connect_them: Exchanges) -> None:
    them, its = market_connect_them, World()
    options: dict[str, Any] = {"clock": its.clock, "symbols": ("BTC-USD",), "ping_every": 0.05}

    async def main() -> None:
        async with MarketConnectWorld(them, ("binance",), **options) as world:
            world.sink.gate = asyncio.Event()
            them.emit(1)
            await world.told("binance", 1)
            await asyncio.sleep(0)
            its.now += 1000.0
            world.sink.gate.set()
            for looks in range(1, 4):  # a ping is sent before the watch looks for silence
                await until_async(lambda n=looks: them.stats()["binance"].pings == n)  # type: ignore[misc]
                its.now += 0.05
            assert world.feeds["binance"].stats().connects == 1 and world.feeds["binance"].stats().state == "live"

    run_task(main())
