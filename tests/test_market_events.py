"""market/frames.py, topics.py, display.py: evidence of gaps and lost connections, and the log of what changes."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from market import display as md
from market import topics as mt
from market.adapter import Adapter
from market.connect import Feed
from market.frames import FrameReader, SymbolSilence
from market.kafka import Publisher
from tests.helpers.base import World, run_task, ticks, until_async
from tests.helpers.market import (
    ABSENT,
    NOW,
    FakeSocket,
    MarketPipelineBase,
    Sink,
    balanced,
    connected,
    market_kafka_open,
    market_kafka_trades,
    market_pipeline_options,
    merged,
)

MS = 10**6


def reader_of(adapter: Adapter, sink: Sink, *symbols: str) -> FrameReader:
    return FrameReader(adapter, SymbolSilence(symbols, 60.0), sink.emit, sink.dead, lambda: NOW, sink.tell)


async def take(reader: FrameReader, frames: list[str]) -> None:
    for frame in frames:
        waits: Any = reader.take(frame.encode(), 0.0)
        if waits is not None:
            await waits


def ticks_of(*numbers: int) -> list[tuple[str, str, str, int, int]]:
    return [("1.5", "1", "buy", number, NOW - 10**9 + number * MS) for number in numbers]


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken"])
def test_a_gap_in_the_numbers_is_told_with_what_is_missing(name: str) -> None:
    wire, adapter, _ = connected(name, ["BTC-USD"])
    sink, at = Sink(), [NOW - 10**9 + number * MS for number in range(10)]
    frames = wire.trades(adapter.native("BTC-USD"), ticks_of(1, 2, 5, 6))
    asyncio.run(take(reader_of(adapter, sink, "BTC-USD"), frames))
    assert sink.events == [mt.MarketEvent("gap", name, "BTC-USD", at[2], at[5], (3, 4), "sequence")]
    assert [trade.flags for trade in sink.told[name]] == ["", "", "gap", ""]


def test_missing_frames_are_told_at_the_next_trade() -> None:
    wire, adapter, _ = connected("bitfinex", ["BTC-USD"])
    sink, reader, at = Sink(), None, [NOW - 10**9 + number * MS for number in range(10)]
    reader = reader_of(adapter, sink, "BTC-USD")
    native = adapter.native("BTC-USD")
    asyncio.run(take(reader, wire.trades(native, ticks_of(1)) + wire.trades(native, ticks_of(2, 3))[2:]))
    assert sink.events == [mt.MarketEvent("gap", "bitfinex", "BTC-USD", at[1], at[3], (3, 4), "frame numbers")]


def test_a_lost_connection_its_return_and_what_a_snapshot_brings() -> None:
    """Without numbers a gap is all that can be told; a snapshot says what it filled."""
    wire, adapter, _ = connected("gemini", ["BTC-USD", "ETH-USD"])
    sink, at = Sink(), [NOW - 10**9 + number * MS for number in range(20)]
    reader, native = reader_of(adapter, sink, "BTC-USD", "ETH-USD"), adapter.native("BTC-USD")

    async def main() -> None:
        await reader.live()
        await take(reader, wire.trades(native, ticks_of(1, 2)))
        assert sink.events == []
        reader.silence.lost(reader.check.ends())
        await reader.lost("the exchange closed: 1001")
        await reader.live()
        await take(reader, wire.snapshot(native, ticks_of(2, 3, 4)) + wire.trades(native, ticks_of(9)))

    asyncio.run(main())
    why = "the exchange closed: 1001"
    assert sink.events == [
        *(mt.MarketEvent("disconnect", "gemini", symbol, NOW, None, None, why) for symbol in ("BTC-USD", "ETH-USD")),
        *(mt.MarketEvent("reconnect", "gemini", symbol, NOW, NOW, None, why) for symbol in ("BTC-USD", "ETH-USD")),
        mt.MarketEvent("back-fill", "gemini", "BTC-USD", at[3], at[4], None, "snapshot"),
    ]
    wire, adapter, _ = connected("okx", ["BTC-USD"])
    reader, sink.events = reader_of(adapter, sink, "BTC-USD"), []
    native = adapter.native("BTC-USD")

    async def without_a_snapshot() -> None:
        await take(reader, wire.trades(native, ticks_of(1, 2)))
        reader.silence.lost(reader.check.ends())
        await take(reader, wire.trades(native, ticks_of(9, 10)))

    asyncio.run(without_a_snapshot())
    assert sink.events == [mt.MarketEvent("gap", "okx", "BTC-USD", at[2], at[9], None, "lost connection")]


def test_a_feed_tells_of_each_connection_but_the_first_and_the_stop() -> None:
    async def main() -> None:
        world, sink = World(1.8e9), Sink()
        feed = Feed(
            *(merged("binance"), ["BTC-USD"], sink.emit, sink.dead),
            tell=sink.tell,
            clock=world.clock,
            wall=lambda: int(world.now * 1e9),
        )
        for _ in range(2):
            feed._stopping = False
            ws: Any = FakeSocket(world, 1.0)
            connection = feed._begin(ws)
            await feed._use(connection, feed.breaker.permit())
            if connection.live_since is not None:
                await feed._reader.lost("closed")
        assert [(event.event, event.begin) for event in sink.events] == [
            ("disconnect", (1_800_000_001) * 10**9),
            ("reconnect", (1_800_000_001) * 10**9),
            ("disconnect", (1_800_000_002) * 10**9),
        ]

    run_task(main())


EVENT = mt.MarketEvent("gap", "kraken", "BTC-USD", 1, 2, (7, 9), "sequence")


def test_an_event_is_a_record_by_symbol_and_a_line_of_the_spool() -> None:
    record = mt.record_of(EVENT, "p-trades", "p-dead", "p-market-events")
    assert (record.topic, record.key, record.headers) == ("p-market-events", b"BTC-USD", [("schema", b"2")])
    assert json.loads(record.value) == {
        "event": "gap",
        "exchange": "kraken",
        "symbol": "BTC-USD",
        "from": 1,
        "to": 2,
        "sequence": [7, 9],
        "cause": "sequence",
    }
    line = mt.line_of_record(record)
    assert mt.record_of_line(line, "p-trades", "p-dead", "p-market-events") == record
    assert mt.record_of_line(line[:3], "p-trades", "p-dead").topic == "p-dead"


def test_events_wait_and_are_spooled_as_trades_are(tmp_path: Path) -> None:
    async def main() -> None:
        async with market_kafka_open(ABSENT, spool=tmp_path / "spool", limit=0.0) as publisher:
            await publisher.trades(market_kafka_trades(0, 3))
            await publisher.event(EVENT)
            assert balanced(publisher).trades.held == 4
        publisher = Publisher(ABSENT, spool=tmp_path / "spool")
        await publisher.start()
        assert publisher.stats().trades.spooled == 4
        await publisher.stop(0.0)

    run_task(main())


def test_all_that_a_frame_tells_waits_for_room_at_once_and_is_given_up_at_once() -> None:
    began: list[str] = []
    ended: list[str] = []

    async def wait(what: str) -> None:
        began.append(what)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(what)

    async def main() -> None:
        wire, adapter, _ = connected("binance", ["BTC-USD"])
        first, second = wire.trades(adapter.native("BTC-USD"), ticks_of(1, 5))
        sink = Sink()
        reader = FrameReader(
            adapter,
            SymbolSilence(("BTC-USD",), 60.0),
            lambda _, trades: wait("trades") if trades[0].flags == "gap" else None,
            sink.dead,
            lambda: NOW,
            lambda event: wait(event.event),
        )
        assert reader.take(first.encode(), 0.0) is None
        waits: Any = reader.take(second.encode(), 0.0)
        task = asyncio.create_task(waits)
        await ticks()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_task(main())
    assert began == ["trades", "gap"]
    assert sorted(ended) == ["gap", "trades"]


# ------------------------------------------------------------------------------------------------- health and the log


def line(state: str, error: str = "") -> md.FeedLine:
    return md.FeedLine(state, *(0,) * 7, None, error=error)


def test_a_feed_that_stays_away_is_degraded_itself() -> None:
    feeds = {"kraken": line("live"), "okx": line("waiting", "refused"), "gemini": line("connecting")}
    counts = md.MarketCounts(kafka="connected", feeds=feeds)
    code, body = md.health(counts)
    assert (code, body["status"], body["degraded_feeds"]) == (200, "ok", ["okx", "gemini"])
    assert {name: feed["status"] for name, feed in body["feeds"].items()} == {
        "kraken": "ok",
        "okx": "degraded",
        "gemini": "degraded",
    }
    nothing = counts._replace(feeds={"okx": line("waiting")})
    assert md.health(nothing)[1]["status"] == "degraded"
    for changes in ({"kafka": "away"}, {"silent": 31.0}, {"published": md.NOTHING._replace(recovered=1, spooled=1)}):
        assert md.health(counts._replace(**changes))[1]["status"] == "degraded"


def test_each_change_of_state_is_one_line() -> None:
    names, changes = [f"venue{n}" for n in range(10)], md.StateChanges()

    def at(state: str, kafka: str, spooled: int = 0) -> str:
        feeds = {name: line(state, "no connection") for name in names}
        spool = md.NOTHING._replace(recovered=spooled, spooled=spooled)
        return changes.line(md.MarketCounts(feeds=feeds, kafka=kafka, error="KafkaConnectionError", published=spool))

    assert at("connecting", "connecting") == ""
    assert at("live", "connected") == f"{', '.join(names)}: live; kafka: connected"
    told = [at(("waiting", "connecting", "refused")[n % 3], "away", n > 5) for n in range(60)]
    gone = f"{', '.join(names)}: away (no connection); kafka: away (KafkaConnectionError)"
    assert [each for each in told if each] == [gone, "spool: in use"]
    assert told[6] and at("connecting", "connecting", 1) == ""
    assert at("live", "connected") == f"{', '.join(names)}: live; kafka: connected; spool: empty"
    assert at("live", "connected") == ""


SYMBOLS = ("BTC-USD", "[/oops]", "[bold]ETH-USD", "ABCDEFGHIJKLMNOPQRST-USDT")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_a_screen_keeps_the_names_and_what_comes_from_outside_is_text(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = ("binance", "coinbase", "bitfinex", "gateio")
    feeds = {
        name: md.FeedLine(state, *(1_234_567,) * 7, 0.012, error="the exchange closed: [red]1001 going away")
        for name, state in zip(names, ("live", "subscribing", "waiting", "refused"), strict=True)
    }
    line = md.SymbolLine(64_123.45, 1.234, 1.2, 12.5, 1000, 1234.5, tuple(range(30)))
    counts = md.MarketCounts(trades=123_456_789, kafka="connecting", feeds=feeds, symbols=dict.fromkeys(SYMBOLS, line))
    text = md.draw(counts, counts, 1.0, 86_400.0)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", each) for each in text.splitlines()]
    assert max(map(len, lines)) <= width
    for name in (*names, *SYMBOLS):
        assert any(each.startswith(f"{name} ") for each in lines), (name, text)
    for state in ("live", "subscribing", "waiting", "refused"):
        assert any(f" {state}" in each for each in lines)
    assert lines[-1].endswith("kafka connecting")
    assert ("repeated" in lines[6]) == (width >= 100) and ("reconnects" in lines[6]) == (width >= 80)
    assert ("[red]1001" in text) == (width == 160)


def test_counts_give_way_in_their_order() -> None:
    lines = [("name", "a", "b", "c", ""), ("x" * 10, "1" * 10, "2" * 10, "3" * 10, "why " * 10)]
    for width, kept in ((100, "abc"), (60, "abc"), (59, "ac"), (48, "ac"), (36, "c"), (24, ""), (5, "")):
        found = md.fitted(lines, width, ("b", "a", "c"))
        assert "".join(found[0][1:]) == kept, width
        assert found[1][0] == "x" * 10 and len(found[1][-1]) == min(40, max(0, width - 12 * (len(kept) + 1)))


def test_that_kafka_is_away_is_seen_before_there_is_a_trade(tmp_path: Path) -> None:
    async def main() -> None:
        program = MarketPipelineBase(market_pipeline_options(ABSENT, "absent", tmp_path))
        await program.publisher.start()
        assert program.snapshot().kafka == "connecting"
        program.tasks.start("connect", program.publisher.connect)
        await until_async(lambda: program.snapshot().kafka == "away")
        assert md.StateChanges().line(program.snapshot()).startswith("kafka: away (KafkaConnectionError: ")
        await program.tasks.end()
        await program.publisher.stop(0.0)
        await program.workers.close()

    run_task(main())
