"""The market pipeline as a whole: over real exchanges' formats, sockets, processes, and the development broker."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import psutil  # type: ignore[import-untyped]
import pytest
from aiokafka import AIOKafkaConsumer

import market_connect
import market_display as md
import market_feeds as mf
import market_flow
import market_pipeline
from market_flow import Analyser, Base, Options, Pipeline, Replayer
from market_kafka import Counts, Publisher
from market_topics import Broker, DeadLetter, decode
from sandbox_markets import Exchanges
from test_all import PRIM_PATIENCE, prim_run, prim_until, prim_until_async

# ------------------------------------------------------------------------------------------------ market_pipeline.py

MARKET_PIPELINE_SYMBOLS = ("BTC-USD", "ETH-USD", "SOL-USD")
MARKET_PIPELINE_FEEDS = {"base": 0.02, "cap": 0.05, "healthy_after": 0.2}


@pytest.fixture(scope="module")
def market_pipeline_broker() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder)) as broker:
        yield broker.address


def market_pipeline_options(kafka: str, prefix: str, folder: Path, **more: Any) -> Options:
    exchanges = more.pop("them", None)
    if exchanges is not None:
        more |= {"urls": exchanges.urls, "exchanges": more.get("exchanges", tuple(exchanges.urls))}
    more = {"spool": str(folder / "spool"), "workers": 1, "partitions": 3, "stop_limit": 10.0} | more
    return Options(kafka=kafka, prefix=f"{prefix}-", **more)


@contextlib.asynccontextmanager
async def market_pipeline_running(program: Base, code: int = 0) -> AsyncIterator[None]:
    """While it runs, its counts balance; afterwards it is stopped, and nothing is left of it."""
    task = asyncio.create_task(program.run())
    try:
        yield
        assert not task.done(), task
        program.stop()
        assert await asyncio.wait_for(task, PRIM_PATIENCE) == code
        counts = program.snapshot()
        assert md.imbalance(counts) == counts.faults == counts.queued == counts.waiting == 0, counts
    finally:
        for _ in range(2):
            program.stop()
        await asyncio.gather(task, return_exceptions=True)


async def market_pipeline_read(kafka: str, topic: str) -> list[Any]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        found, places = list[Any](), list(consumer.assignment())
        ends = await consumer.end_offsets(places)
        while [place for place in places if await consumer.position(place) < ends[place]]:
            for records in (await consumer.getmany(timeout_ms=50)).values():
                found += records
        return found
    finally:
        await consumer.stop()


async def market_pipeline_trades(kafka: str, prefix: str) -> list[mf.Trade]:
    """All trades of the topic; each symbol's are in one partition, under its key."""
    records, places = await market_pipeline_read(kafka, f"{prefix}-trades"), dict[str, int]()
    for record in records:
        symbol = decode(record.value).symbol
        assert record.key == symbol.encode() and places.setdefault(symbol, record.partition) == record.partition
        assert dict(record.headers) == {"schema": b"1"}
    return [decode(record.value) for record in records]


def market_pipeline_live(trades: list[mf.Trade], exchange: str) -> dict[str, list[str]]:
    """The ids of the trades that were not in a snapshot, by symbol."""
    found = dict[str, list[str]]()
    for trade in trades:
        if trade.exchange == exchange and "snapshot" not in trade.flags:
            found.setdefault(trade.symbol, []).append(trade.trade_id)
    return found


def market_pipeline_sent(them: Exchanges, exchange: str) -> dict[str, list[str]]:
    """What it sent, by our symbols."""
    ours = {mf.ADAPTERS[exchange].native(symbol): symbol for symbol in MARKET_PIPELINE_SYMBOLS}
    return {ours[native]: ids for native, ids in them.sent_ids(exchange).items() if ids}


async def market_pipeline_arrived(them: Exchanges, program: Base, kafka: Callable[[Any], bool] | None = None) -> None:
    """All that was sent is with us, and, unless ``kafka`` says otherwise, published."""

    def there() -> bool:
        counts = program.snapshot()
        assert md.imbalance(counts) == counts.faults == 0, counts
        sent = sum(each.sent for each in them.stats().values())
        return counts.trades >= sent and (kafka or market_pipeline_published)(counts)

    await prim_until_async(there)


def market_pipeline_published(counts: Any) -> bool:
    return bool(counts.published.published == counts.trades + counts.letters and not counts.queued)


async def market_pipeline_live_feeds(program: Base, *but: str) -> None:
    def all_live() -> bool:
        feeds = program.snapshot().feeds
        return all(feed.state == "live" for name, feed in feeds.items() if name not in but)

    await prim_until_async(all_live)


def test_market_pipeline_every_trade_of_ten_exchanges_is_in_kafka_once(
    market_pipeline_broker: str, tmp_path: Path
) -> None:
    async def main() -> None:
        with Exchanges(ledger=True, history=5) as them:
            pipeline = Pipeline(market_pipeline_options(market_pipeline_broker, "once", tmp_path, them=them))
            async with market_pipeline_running(pipeline):
                await market_pipeline_live_feeds(pipeline)
                for _ in range(5):
                    await asyncio.to_thread(them.emit, 4)
                await market_pipeline_arrived(them, pipeline)
                counts = pipeline.snapshot()
                assert counts.offered == counts.computed == counts.trades and not counts.letters
                await asyncio.to_thread(them.emit, 1)  # is on its way when the stop comes
                sent = {name: market_pipeline_sent(them, name) for name in them.urls}
            trades = await market_pipeline_trades(market_pipeline_broker, "once")
            assert len(trades) == pipeline.snapshot().trades
            for name, ids in sent.items():
                assert market_pipeline_live(trades, name) == ids and all(len(each) == 21 for each in ids.values())
            assert all(stats.closes == (1000,) and not stats.open for stats in them.stats().values())
        rows = await market_pipeline_read(market_pipeline_broker, "once-analytics")
        assert len(rows) == pipeline.snapshot().rows.published
        last = dict[tuple[str, str], Any]()
        for record in rows:
            row = orjson.loads(record.value)
            assert record.key == row["symbol"].encode()
            last[row["symbol"], row["exchange"]] = row
        assert len(last) == 33 and set(them.urls) | {"*"} == {exchange for _, exchange in last}
        everything = last["BTC-USD", "*"]
        assert everything["volatility"].keys() == {"10", "60", "300"} and everything["spread"] > 0

    prim_run(main())


def test_market_pipeline_an_exchange_that_fails_does_not_hold_up_the_others(
    market_pipeline_broker: str, tmp_path: Path
) -> None:
    async def main() -> None:
        with Exchanges(ledger=True, history=0) as them:
            options = market_pipeline_options(market_pipeline_broker, "fails", tmp_path, them=them)
            pipeline = Pipeline(options, feed_options={**MARKET_PIPELINE_FEEDS, "silent_after": 3.0})
            async with market_pipeline_running(pipeline):
                await market_pipeline_live_feeds(pipeline)
                await asyncio.to_thread(them.emit, 2)
                await market_pipeline_arrived(them, pipeline)
                for exchange, fault in (("kraken", "close"), ("okx", "reset"), ("gemini", "stall"), ("bybit", "half")):
                    await asyncio.to_thread(them.fault, exchange, fault)
                for fault in ("not json", "wrong types", "unknown", "gap"):
                    await asyncio.to_thread(them.fault, "binance", fault)
                them.door("kraken", "503")
                await asyncio.to_thread(them.emit, 3)
                away = {"kraken", "okx", "gemini", "bybit"}
                others = set(them.urls) - away

                def on() -> bool:
                    feeds = pipeline.snapshot().feeds
                    return all(feeds[name].trades >= 15 for name in others) and feeds["binance"].bad == 3

                await prim_until_async(on)
                counts = pipeline.snapshot()
                assert md.health(counts)[1]["status"] == "degraded" and counts.letters >= 3
                assert counts.feeds["binance"].gaps >= 1
                them.door("kraken", "open")
                await market_pipeline_live_feeds(pipeline)
                assert all(pipeline.snapshot().feeds[name].reconnects >= 1 for name in away - {"gemini"})
                await prim_until_async(lambda: pipeline.snapshot().feeds["gemini"].reconnects == 1)
                await market_pipeline_live_feeds(pipeline)
                await asyncio.to_thread(them.emit, 1)
                await prim_until_async(lambda: market_pipeline_published(pipeline.snapshot()))
            trades = await market_pipeline_trades(market_pipeline_broker, "fails")
            for name in others - {"binance"}:
                assert market_pipeline_live(trades, name) == market_pipeline_sent(them, name)
            for name in away:
                found = market_pipeline_live(trades, name)
                assert all(len(ids) == len(set(ids)) for ids in found.values())
                assert {ids[-1] for ids in found.values()} <= {ids[-1] for ids in market_pipeline_sent(them, name).values()}
        letters = await market_pipeline_read(market_pipeline_broker, "fails-dead-letter")
        said = [dict(record.headers) for record in letters if dict(record.headers)["exchange"] == b"binance"]
        assert len(said) == 3 and all(head["error"] and head["at_ns"] and b"asked" in head["context"] for head in said)

    prim_run(main())


def test_market_pipeline_broker_frozen_stopped_and_started_again(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker")

    async def main() -> None:
        with Exchanges(ledger=True, history=0) as them:
            options = market_pipeline_options(f"127.0.0.1:{broker.port}", "away", tmp_path, them=them, spool_after=0.2)
            pipeline = Pipeline(options)

            async def more(n: int, kafka: Callable[[Any], bool] | None = None) -> None:
                for _ in range(n):
                    await asyncio.to_thread(them.emit, 3)
                await market_pipeline_arrived(them, pipeline, kafka)

            async with market_pipeline_running(pipeline):
                await market_pipeline_live_feeds(pipeline)
                await more(2)
                broker.freeze()
                try:
                    await more(3, lambda counts: counts.published.spooled > 0 and not counts.queued)
                    assert md.health(pipeline.snapshot())[1]["status"] == "degraded"
                finally:
                    broker.thaw()
                await more(1)
                await asyncio.to_thread(broker.stop)
                await more(3, lambda counts: counts.published.spooled > 0 and not counts.queued)
                await asyncio.to_thread(broker.start)
                await more(1)
                await prim_until_async(lambda: md.health(pipeline.snapshot())[1]["status"] == "ok")
            trades = await market_pipeline_trades(broker.address, "away")
            for name in them.urls:
                assert market_pipeline_live(trades, name) == market_pipeline_sent(them, name)
            assert pipeline.snapshot().published.spooled == 0

    broker.start()
    try:
        prim_run(main())
    finally:
        broker.stop()


def test_market_pipeline_a_worker_that_is_killed_costs_nothing(market_pipeline_broker: str, tmp_path: Path) -> None:
    async def main() -> None:
        with Exchanges(rate=500, history=0) as them:
            options = market_pipeline_options(market_pipeline_broker, "worker", tmp_path, them=them)
            pipeline = Pipeline(options)
            async with market_pipeline_running(pipeline):
                await prim_until_async(lambda: pipeline.snapshot().computed > 100)
                (worker,) = pipeline.snapshot().workers
                os.kill(worker, signal.SIGKILL)
                before = pipeline.snapshot().computed
                await prim_until_async(lambda: pipeline.snapshot().computed > before + 200)
            counts = pipeline.snapshot()
            assert counts.worker_deaths == 1 and counts.workers != (worker,)
            assert counts.offered == counts.computed == counts.trades == counts.published.published
            assert not psutil.pid_exists(worker)

    prim_run(main())


def test_market_pipeline_dead_letters_are_replayed_by_the_mended_parser(
    market_pipeline_broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise mf.BadFrame("a fault of ours")

    async def replayed(**more: Any) -> Replayer:
        options = market_pipeline_options(market_pipeline_broker, "dead", tmp_path, group="again", **more)
        replayer = Replayer(options)
        assert await asyncio.wait_for(replayer.run(), PRIM_PATIENCE) == 0
        assert md.imbalance(replayer.snapshot()) == 0
        return replayer

    async def main() -> None:
        with Exchanges(ledger=True, history=0, exchanges=("bitfinex", "okx")) as them:
            pipeline = Pipeline(market_pipeline_options(market_pipeline_broker, "dead", tmp_path, them=them))
            async with market_pipeline_running(pipeline):
                await market_pipeline_live_feeds(pipeline)
                with monkeypatch.context() as patch:
                    patch.setattr(mf.ADAPTERS["bitfinex"].__class__, "_item", broken)
                    await asyncio.to_thread(them.emit, 3)
                    await prim_until_async(lambda: pipeline.snapshot().letters == 9)
                await asyncio.to_thread(them.fault, "okx", "not json")
                await prim_until_async(lambda: pipeline.snapshot().letters == 10)
                sent = market_pipeline_sent(them, "bitfinex")
        trades = await market_pipeline_trades(market_pipeline_broker, "dead")
        assert len(trades) == 9 and market_pipeline_live(trades, "bitfinex") == {}
        dry = await replayed(dry_run=True)
        assert (dry.read, dry.found, dry.failed) == (10, 9, 1)
        first = await replayed()
        assert (first.read, first.found, first.failed) == (10, 9, 1)
        assert re.search(r"bitfinex +parsed +9 +a fault of ours\n", first.report() + "\n")
        assert first.report().endswith("10 dead letters: 9 parsed, with 9 trades; 1 still bad")
        trades = await market_pipeline_trades(market_pipeline_broker, "dead")
        found = {symbol: sorted(ids) for symbol, ids in market_pipeline_live(trades, "bitfinex").items()}
        assert found == {symbol: sorted(ids) for symbol, ids in sent.items()} and len(trades) == 18
        again = await replayed()
        assert (again.read, again.found, again.failed) == (1, 0, 1)  # the one that is still bad, for the next time

    prim_run(main())


def market_pipeline_trade(n: int, symbol: str) -> mf.Trade:
    now = time.time_ns()
    return mf.Trade("kraken", symbol, "100.5", "1", 100.5 + n % 7, 1.0, "buy", str(n), now, now, n, "")


def test_market_pipeline_two_analysers_share_the_symbols(market_pipeline_broker: str, tmp_path: Path) -> None:
    symbols = [f"S{n}-USD" for n in range(8)]

    async def main() -> None:
        options = market_pipeline_options(market_pipeline_broker, "share", tmp_path, group="share", partitions=4)
        publisher = Publisher(market_pipeline_broker, prefix="share-", partitions=4)
        await publisher.start()
        sent = 0

        async def publish(n: int) -> None:
            nonlocal sent
            await publisher.trades([market_pipeline_trade(sent + k, symbols[k % 8]) for k in range(n)])
            await publisher.flush()
            sent += n

        try:
            await publish(80)
            first, second = Analyser(options), Analyser(options)
            async with market_pipeline_running(first):
                await prim_until_async(lambda: first.snapshot().computed == 80 and first.snapshot().commits > 0)
                async with market_pipeline_running(second):

                    def shared() -> bool:
                        owned = [each.snapshot().partitions or () for each in (first, second)]
                        return all(owned) and sorted(owned[0] + owned[1]) == [0, 1, 2, 3]

                    await prim_until_async(shared)
                    await publish(160)
                    await prim_until_async(lambda: first.snapshot().computed + second.snapshot().computed >= 240)
                    assert second.snapshot().computed > 0 and first.snapshot().computed > 80
                await prim_until_async(lambda: first.snapshot().partitions == (0, 1, 2, 3))
                await publish(80)
                await prim_until_async(lambda: first.snapshot().computed + second.snapshot().computed >= 320)
            assert first.snapshot().computed + second.snapshot().computed == 320  # each once, as nobody died
            rows = [orjson.loads(r.value) for r in await market_pipeline_read(market_pipeline_broker, "share-analytics")]
            assert {row["symbol"] for row in rows} == set(symbols)
            assert len(rows) == sum(each.snapshot().rows.published for each in (first, second))
            last = {row["symbol"]: row for row in rows if row["exchange"] == "*"}
            totals = {symbol: row["trades"]["300"] for symbol, row in last.items()}
            assert totals == dict.fromkeys(symbols, 40)  # what the one before had taken is in the windows
            third = Analyser(options)
            async with market_pipeline_running(third):
                await prim_until_async(lambda: third.snapshot().partitions == (0, 1, 2, 3))
                await publish(8)
                await prim_until_async(lambda: third.snapshot().computed >= 8)
            assert third.snapshot().trades == 8
        finally:
            await publisher.stop()

    prim_run(main())
