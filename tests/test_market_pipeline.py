"""market_pipeline.py: the whole."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
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
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

import market_pipeline
from market import connect as market_connect
from market import display as md
from market import feeds as mf
from market import flow as market_flow
from market.analyse import Analyser
from market.feed_socket import FeedTimes
from market.flow import MarketProgram, Pipeline
from market.kafka import Counts, Publisher
from market.replay import Replayer
from market.topics import decode
from market.trade import BadFrame, Trade
from sandbox.broker import Broker
from sandbox.markets import Exchanges, Fault
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, run_task, ticks, until_async, wait_until
from tests.helpers.market import (
    ABSENT,
    MarketPipelineBase,
    market_kafka_letter,
    market_pipeline_metrics,
    market_pipeline_options,
    read_all,
)
from tests.helpers.processes import answers_besieged, unread

SYMBOLS = ("BTC-USD", "ETH-USD", "SOL-USD")


FEEDS = {"times": FeedTimes(base=0.02, cap=0.05, healthy_after=0.2, ping_every=0.3)}


@pytest.fixture(scope="module")
def market_pipeline_broker() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder)) as broker:
        yield broker.address


@contextlib.asynccontextmanager
async def running(program: MarketProgram, code: int = 0) -> AsyncIterator[None]:
    """While it runs, its counts balance; afterwards it is stopped, and nothing is left of it."""
    task = asyncio.create_task(program.run())
    try:
        yield
        assert not task.done(), task
        program.stop()
        assert await asyncio.wait_for(task, HANG_LIMIT) == code
        counts = program.snapshot()
        assert md.imbalance(counts) == counts.faults == counts.queued == counts.waiting == 0, counts
    finally:
        for _ in range(2):
            program.stop()
        await asyncio.gather(task, return_exceptions=True)


async def market_pipeline_trades(kafka: str, prefix: str) -> list[Trade]:
    """All trades of the topic; each symbol's are in one partition, under its key."""
    records, places = await read_all(kafka, f"{prefix}-trades"), dict[str, int]()
    for record in records:
        symbol = decode(record.value).symbol
        assert record.key == symbol.encode() and places.setdefault(symbol, record.partition) == record.partition
        assert dict(record.headers) == {"schema": b"2"}
    return [decode(record.value) for record in records]


def live(trades: list[Trade], exchange: str) -> dict[str, list[str]]:
    """The ids of the trades that were not in a snapshot, by symbol."""
    found = dict[str, list[str]]()
    for trade in trades:
        if trade.exchange == exchange and "snapshot" not in trade.flags:
            found.setdefault(trade.symbol, []).append(trade.trade_id)
    return found


def market_pipeline_sent(them: Exchanges, exchange: str) -> dict[str, list[str]]:
    """What it sent, by our symbols."""
    ours = {mf.ADAPTERS[exchange].native(symbol): symbol for symbol in SYMBOLS}
    return {ours[native]: ids for native, ids in them.sent_ids(exchange).items() if ids}


async def arrived(them: Exchanges, program: MarketProgram, kafka: Callable[[Any], bool] | None = None) -> None:
    """All that was sent is with us, and, unless ``kafka`` says otherwise, published."""

    def there() -> bool:
        counts = program.snapshot()
        assert md.imbalance(counts) == counts.faults == 0, counts
        sent = sum(each.sent for each in them.stats().values())
        return counts.trades >= sent and (kafka or market_pipeline_published)(counts)

    await until_async(there)


def market_pipeline_published(counts: Any) -> bool:
    return bool(counts.published.published == counts.trades + counts.letters + counts.events and not counts.queued)


async def live_feeds(program: MarketProgram, *but: str) -> None:
    def all_live() -> bool:
        feeds = program.snapshot().feeds
        return all(feed.state == "live" for name, feed in feeds.items() if name not in but)

    await until_async(all_live)


def test_every_trade_of_ten_exchanges_is_in_kafka_once(market_pipeline_broker: str, tmp_path: Path) -> None:
    async def main() -> None:
        with Exchanges(ledger=True, history=5) as them:
            pipeline = Pipeline(market_pipeline_options(market_pipeline_broker, "once", tmp_path, them=them))
            async with running(pipeline):
                await live_feeds(pipeline)
                for _ in range(5):
                    await asyncio.to_thread(them.emit, 4)
                await arrived(them, pipeline)
                counts = pipeline.snapshot()
                assert counts.offered == counts.computed == counts.trades and not counts.letters
                await asyncio.to_thread(them.emit, 1)  # is on its way when the stop comes
                sent = {name: market_pipeline_sent(them, name) for name in them.urls}
            trades = await market_pipeline_trades(market_pipeline_broker, "once")
            assert len(trades) == pipeline.snapshot().trades
            for name, ids in sent.items():
                assert live(trades, name) == ids and all(len(each) == 21 for each in ids.values())
            assert all(stats.closes == (1000,) and not stats.open for stats in them.stats().values())
        rows = await read_all(market_pipeline_broker, "once-analytics")
        assert len(rows) == pipeline.snapshot().rows.published
        last = dict[tuple[str, str], Any]()
        for record in rows:
            row = orjson.loads(record.value)
            assert record.key == row["symbol"].encode()
            last[row["symbol"], row["exchange"]] = row
        assert len(last) == 33 and set(them.urls) | {"*"} == {exchange for _, exchange in last}
        for symbol, count in Counter(trade.symbol for trade in trades).items():  # the stop tells what was not due yet
            assert last[symbol, "*"]["trades"]["300"] == count
        everything = last["BTC-USD", "*"]
        assert everything["volatility"].keys() == {"10", "60", "300"} and everything["spread"] > 0

    run_task(main())


def test_an_exchange_that_fails_does_not_hold_up_the_others(market_pipeline_broker: str, tmp_path: Path) -> None:
    async def main() -> None:
        with Exchanges(ledger=True, history=0) as them:
            options = market_pipeline_options(market_pipeline_broker, "fails", tmp_path, them=them)
            pipeline = Pipeline(options, feed_options=FEEDS)
            async with running(pipeline):
                await live_feeds(pipeline)
                await asyncio.to_thread(them.emit, 2)
                await arrived(them, pipeline)
                stalled = pipeline.feeds["gemini"]

                async def left_soon() -> None:
                    patience, stalled._times = stalled._times, dataclasses.replace(stalled._times, pong_within=0.6)
                    await until_async(lambda: pipeline.snapshot().feeds["gemini"].reconnects == 1)
                    stalled._times = patience

                faults: list[tuple[str, Fault]] = [("kraken", "close"), ("okx", "reset"), ("gemini", "stall")]
                faults += [("bybit", "half"), ("binance", "not json"), ("binance", "wrong types")]
                for exchange, fault in [*faults, ("binance", "unknown"), ("binance", "gap")]:
                    await asyncio.to_thread(them.fault, exchange, fault)
                leaving = asyncio.create_task(left_soon())
                them.door("kraken", "503")
                await asyncio.to_thread(them.emit, 3)
                away = {"kraken", "okx", "gemini", "bybit"}
                others = set(them.urls) - away

                def on() -> bool:
                    feeds = pipeline.snapshot().feeds
                    return all(feeds[name].trades >= 15 for name in others) and feeds["binance"].bad == 3

                await until_async(on)
                await until_async(lambda: bool(away & {*md.health(pipeline.snapshot())[1]["degraded_feeds"]}))
                counts = pipeline.snapshot()
                assert counts.letters >= 3
                assert counts.feeds["binance"].gaps >= 1
                them.door("kraken", "open")
                await live_feeds(pipeline)
                assert all(pipeline.snapshot().feeds[name].reconnects >= 1 for name in away - {"gemini"})
                await leaving
                await live_feeds(pipeline)
                await asyncio.to_thread(them.emit, 1)
                await until_async(lambda: market_pipeline_published(pipeline.snapshot()))
            trades = await market_pipeline_trades(market_pipeline_broker, "fails")
            for name in others - {"binance"}:
                assert live(trades, name) == market_pipeline_sent(them, name)
            for name in away:
                found = live(trades, name)
                assert all(len(ids) == len(set(ids)) for ids in found.values())
                assert {ids[-1] for ids in found.values()} <= {
                    ids[-1] for ids in market_pipeline_sent(them, name).values()
                }
        letters = await read_all(market_pipeline_broker, "fails-dead-letter")
        said = [dict(record.headers) for record in letters if dict(record.headers)["exchange"] == b"binance"]
        assert len(said) == 3 and all(
            head["error"] and head["ts_recv"] and b"asked" in head["context"] for head in said
        )

    run_task(main())


def test_broker_frozen_stopped_and_started_again(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker")

    async def main() -> None:
        with Exchanges(ledger=True, history=0) as them:
            options = market_pipeline_options(f"127.0.0.1:{broker.port}", "away", tmp_path, them=them, spool_after=0.2)
            pipeline = Pipeline(options)

            async def more(n: int, kafka: Callable[[Any], bool] | None = None) -> None:
                for _ in range(n):
                    await asyncio.to_thread(them.emit, 3)
                await arrived(them, pipeline, kafka)

            async with running(pipeline):
                await live_feeds(pipeline)
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
                await until_async(lambda: md.health(pipeline.snapshot())[1]["status"] == "ok")
            trades = await market_pipeline_trades(broker.address, "away")
            for name in them.urls:
                assert live(trades, name) == market_pipeline_sent(them, name)
            assert pipeline.snapshot().published.spooled == 0

    broker.start()
    try:
        run_task(main())
    finally:
        broker.stop()


def test_a_worker_that_is_killed_costs_nothing(market_pipeline_broker: str, tmp_path: Path) -> None:
    async def main() -> None:
        with Exchanges(rate=500, history=0) as them:
            options = market_pipeline_options(market_pipeline_broker, "worker", tmp_path, them=them)
            pipeline = Pipeline(options)
            pipeline.workers._slots[0].timeout = HANG_LIMIT
            async with running(pipeline):
                await until_async(lambda: pipeline.snapshot().computed > 100)
                (worker,) = pipeline.snapshot().workers
                os.kill(worker, signal.SIGKILL)
                before = pipeline.snapshot().computed
                await until_async(lambda: pipeline.snapshot().computed > before + 200)
            counts = pipeline.snapshot()
            assert counts.worker_deaths == 1 and counts.workers != (worker,)
            assert counts.offered == counts.computed == counts.trades == counts.published.published
            assert not psutil.pid_exists(worker)

    run_task(main())


def test_dead_letters_are_replayed_by_the_mended_parser(
    market_pipeline_broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise BadFrame("a fault of ours")

    async def replayed(**more: Any) -> Replayer:
        options = market_pipeline_options(market_pipeline_broker, "dead", tmp_path, group="again", **more)
        replayer, flushed = Replayer(options), list[int]()
        flush = replayer.publisher.flush

        async def flushing() -> None:
            await flush()
            flushed.append(replayer.publisher.stats().trades.published)

        monkeypatch.setattr(replayer.publisher, "flush", flushing)
        assert await asyncio.wait_for(replayer.run(), HANG_LIMIT) == 0
        counts = replayer.snapshot()
        assert md.imbalance(counts) == 0
        if not options.dry_run:  # before the offsets are committed
            assert flushed and flushed[-1] == counts.trades + counts.letters
        return replayer

    async def main() -> None:
        with Exchanges(ledger=True, history=0, exchanges=("bitfinex", "okx")) as them:
            pipeline = Pipeline(market_pipeline_options(market_pipeline_broker, "dead", tmp_path, them=them))
            async with running(pipeline):
                await live_feeds(pipeline)
                with monkeypatch.context() as patch:
                    patch.setattr(mf.ADAPTERS["bitfinex"].__class__, "_item", broken)
                    await asyncio.to_thread(them.emit, 3)
                    await until_async(lambda: pipeline.snapshot().letters == 9)
                await asyncio.to_thread(them.fault, "okx", "not json")
                await until_async(lambda: pipeline.snapshot().letters == 10)
                sent = market_pipeline_sent(them, "bitfinex")
        trades = await market_pipeline_trades(market_pipeline_broker, "dead")
        assert len(trades) == 9 and live(trades, "bitfinex") == {}
        dry = await replayed(dry_run=True)
        assert (dry.read, dry.found, dry.failed) == (10, 9, 1)
        first = await replayed()
        assert (first.read, first.found, first.failed) == (10, 9, 1)
        assert re.search(r"bitfinex +parsed +9 +a fault of ours\n", first.report() + "\n")
        assert first.report().endswith("10 dead letters: 9 parsed, with 9 trades; 1 still bad")
        trades = await market_pipeline_trades(market_pipeline_broker, "dead")
        found = {symbol: sorted(ids) for symbol, ids in live(trades, "bitfinex").items()}
        assert found == {symbol: sorted(ids) for symbol, ids in sent.items()} and len(trades) == 18
        again = await replayed()
        assert (again.read, again.found, again.failed) == (1, 0, 1)  # the one that is still bad, for the next time

    run_task(main())


def market_pipeline_trade(n: int, symbol: str) -> Trade:
    now = time.time_ns()
    return Trade("kraken", symbol, "100.5", "1", 100.5 + n % 7, 1.0, "buy", str(n), now, now, n, "")


def test_two_analysers_share_the_symbols(market_pipeline_broker: str, tmp_path: Path) -> None:
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
            first, second = (Analyser(options, group_options={"heartbeat": 0.1}) for _ in range(2))
            async with running(first):
                await until_async(lambda: first.snapshot().computed == 80 and first.snapshot().commits > 0)
                async with running(second):

                    def shared() -> bool:
                        owned = [each.snapshot().partitions or () for each in (first, second)]
                        return all(owned) and sorted(owned[0] + owned[1]) == [0, 1, 2, 3]

                    await until_async(shared)
                    await publish(160)
                    await until_async(lambda: first.snapshot().computed + second.snapshot().computed >= 240)
                    assert second.snapshot().computed > 0 and first.snapshot().computed > 80
                await until_async(lambda: first.snapshot().partitions == (0, 1, 2, 3))
                await publish(80)
                await until_async(lambda: first.snapshot().computed + second.snapshot().computed >= 320)
            assert first.snapshot().computed + second.snapshot().computed == 320  # each once, as nobody died
            rows = [orjson.loads(r.value) for r in await read_all(market_pipeline_broker, "share-analytics")]
            assert {row["symbol"] for row in rows} == set(symbols)
            assert len(rows) == sum(each.snapshot().rows.published for each in (first, second))
            last = {row["symbol"]: row for row in rows if row["exchange"] == "*"}
            totals = {symbol: row["trades"]["300"] for symbol, row in last.items()}
            assert totals == dict.fromkeys(symbols, 40)  # what the one before had taken is in the windows
            third = Analyser(options)
            async with running(third):
                await until_async(lambda: third.snapshot().partitions == (0, 1, 2, 3))
                await publish(8)
                await until_async(lambda: third.snapshot().computed >= 8)
            assert third.snapshot().trades == 8
        finally:
            await publisher.stop()

    run_task(main())


def test_loop_is_never_held_for_50_ms(market_pipeline_broker: str, tmp_path: Path) -> None:
    longest = [0.0]

    async def measure() -> None:
        """By the thread's own time: the machine is shared."""
        while True:
            begun = time.thread_time()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            longest[0] = max(longest[0], time.thread_time() - begun)

    async def main() -> None:
        with Exchanges(rate=4000, history=50) as them:
            pipeline = Pipeline(market_pipeline_options(market_pipeline_broker, "loop", tmp_path, them=them))
            async with running(pipeline):
                measuring = asyncio.create_task(measure())
                await until_async(lambda: pipeline.snapshot().computed > 4000)
                assert b"market_trades_total" in market_pipeline_metrics(pipeline)  # in the loop, as it is served
                measuring.cancel()
            assert pipeline.snapshot().published.published == pipeline.snapshot().trades + pipeline.snapshot().events

    gc.collect()
    gc.freeze()  # the tests are a larger heap than the program's
    try:
        asyncio.run(main())
    finally:
        gc.unfreeze()
    assert 0.0 < longest[0] < 0.05


class MarketPipelineProcess:
    def __init__(self, *arguments: str, **environ: str) -> None:
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "market_pipeline.py", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env={**os.environ, **environ},
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.http = ""

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    def said(self, pattern: str) -> re.Match[str]:
        found: re.Match[str] | None = None

        def looked() -> bool:
            nonlocal found
            found = re.search(pattern, "".join(self._lines), re.M)
            assert found or self.process.poll() is None or self._thread.is_alive(), self._lines
            return found is not None

        wait_until(looked)
        assert found is not None
        return found

    def get(self, path: str) -> str:
        if not self.http:
            self.http = self.said(r"(http://127\.0\.0\.1:[0-9]+)/metrics")[1]
        try:
            with urllib.request.urlopen(self.http + path, timeout=HANG_LIMIT) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return str(error.read().decode())

    def until(self, predicate: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def looked() -> bool:
            nonlocal found
            found = json.loads(self.get("/health"))
            assert found["imbalance"] == found["faults"] == 0, found
            return predicate(found)

        wait_until(looked)
        return found

    def wait(self) -> int:
        code = self.process.wait(PROGRAM_LIMIT)
        self._thread.join(HANG_LIMIT)
        return code

    def close(self) -> None:
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def market_pipeline_process(*arguments: str, **environ: str) -> Iterator[MarketPipelineProcess]:
    """Ended by somebody, it leaves no child."""
    process = MarketPipelineProcess(*arguments, **environ)
    children: list[Any] = []
    try:
        yield process
        children = psutil.Process(process.process.pid).children(True) if process.process.poll() is None else []
    finally:
        for each in [process.process, *children]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        process.close()
    assert not children, "it was to be ended"


def market_pipeline_arguments(them: Exchanges, kafka: str, prefix: str, folder: Path) -> list[str]:
    urls = [word for name, url in them.urls.items() for word in ("--url", f"{name}={url}")]
    names = ["--merge-quotes", "--exchanges", ",".join(them.urls), "--workers", "1", "--http", "127.0.0.1:0"]
    return [*urls, *names, "--kafka", kafka, "--prefix", f"{prefix}-", "--spool", str(folder / "spool")]


def market_pipeline_all_live(found: dict[str, Any]) -> bool:
    return all(feed["state"] == "live" for feed in found["feeds"].values())


def test_sigterm_publishes_all_and_a_second_one_spools_it(tmp_path: Path) -> None:
    names = ("kraken", "okx", "bitfinex")
    with Broker(tmp_path / "broker") as broker, Exchanges(ledger=True, history=0, exchanges=names) as them:
        arguments = market_pipeline_arguments(them, broker.address, "term", tmp_path)
        with market_pipeline_process(*arguments) as process:
            process.until(market_pipeline_all_live)
            them.emit(10)
            process.until(lambda found: found["published"]["published"] == found["computed"] == 90 and found["symbols"])
            metrics = process.get("/metrics")
            assert 'market_exchange_trades_total{exchange="okx"} 30.0' in metrics
            assert re.search(r'market_symbol_last\{symbol="BTC-USD"\} [0-9.]+', metrics)
            children = psutil.Process(process.process.pid).children(True)
            them.emit(1)
            process.process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
            process.said(r"trades 99 \+ dead letters 0 = published 99 \+ left in the spool 0 \+ lost 0; analytics")
            wait_until(lambda: not any(child.is_running() for child in children))  # one only sees that we are gone
            assert [stats.closes for stats in them.stats().values()] == [(1000,)] * 3
        with market_pipeline_process(*arguments, "--stop-limit", "3600", "--spool-after", "0.2") as process:
            process.until(market_pipeline_all_live)
            them.emit(1)
            process.until(lambda found: found["published"]["published"] == 9)
            broker.freeze()
            try:
                them.emit(10)
                process.until(lambda found: found["trades"] == 99)
                process.process.send_signal(signal.SIGTERM)
                process.until(lambda found: found["status"] == "stopping")
                process.process.send_signal(signal.SIGTERM)
                assert process.wait() == 0
            finally:
                broker.thaw()
            process.said(r"= published 9 \+ left in the spool 90 \+ lost 0")
        with market_pipeline_process(*arguments) as process:
            process.until(lambda found: found["published"]["published"] == 90 and market_pipeline_all_live(found))
            process.process.send_signal(signal.SIGINT)
            assert process.wait() == 0
            process.said(r"trades 0 \+ dead letters 0 \+ recovered 90 = published 90")
        trades = asyncio.run(market_pipeline_trades(broker.address, "term"))
        for name in names:  # what was under way at the second stop may be there twice
            sent, found = market_pipeline_sent(them, name), live(trades, name)
            assert {symbol: set(ids) for symbol, ids in found.items()} == {s: set(ids) for s, ids in sent.items()}


def test_analyse_and_replay_as_commands(market_pipeline_broker: str) -> None:
    async def fill() -> None:
        publisher = Publisher(market_pipeline_broker, prefix="commands-", partitions=2)
        await publisher.start()
        await publisher.trades([market_pipeline_trade(n, "BTC-USD") for n in range(3)])
        await publisher.dead(market_kafka_letter("kraken", "cut off", b'{"channel": "heart', time.time_ns(), "text"))
        await publisher.dead(
            market_kafka_letter("kraken", "a fault of ours", b'{"channel": "heartbeat"}', time.time_ns(), "text")
        )
        await publisher.stop()

    asyncio.run(fill())
    arguments = ("--kafka", market_pipeline_broker, "--prefix", "commands-")
    more = ("--http", "127.0.0.1:0", "--workers", "1")
    with market_pipeline_process("analyse", *arguments, *more) as process:
        found = process.until(lambda found: found["computed"] == 3 and found["rows"]["published"] >= 2)
        assert found["partitions"] == [0, 1] and found["symbols"]["BTC-USD"]["trades"] == 3
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        process.said(
            r"trades taken 3, computed 3; dead letters 0 = published 0 \+ left in the spool 0 \+ lost 0; analytics"
        )
    with market_pipeline_process("replay", *arguments) as process:
        assert process.process.stdout is not None
        said = process.process.stdout.read()
        assert process.wait() == 0
    assert re.search(r"^kraken +still bad +1 +JSONDecodeError", said, re.M), said
    assert re.search(r"^kraken +parsed +1 +a fault of ours$", said, re.M)
    assert said.endswith("2 dead letters: 1 parsed, with 0 trades; 1 still bad\n")


def test_demo_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "market_pipeline.py", "--demo", "--demo-seconds", "4", "--demo-rate", "600"]
        environ = {**os.environ, "TMPDIR": folder, "COLUMNS": "160", "LINES": "60", "TERM": "xterm-256color"}
        environ.pop("KAFKA_BROKERS", None)
        shown: list[bytes] = []

        def look() -> None:
            with contextlib.suppress(OSError):
                while chunk := os.read(ours, 1 << 16):
                    shown.append(chunk)

        looking = threading.Thread(target=look)
        try:
            with subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=theirs,
                cwd=HERE,
                env=environ,
            ) as process:
                os.close(theirs)
                looking.start()
                output = process.communicate(timeout=PROGRAM_LIMIT)[0].decode()
            looking.join(HANG_LIMIT)
        finally:
            os.close(ours)
        assert process.returncode == 0, output
        assert list(Path(folder).iterdir()) == []
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    sent = re.search(r"trades sent +([\d,]+) .*\nin Kafka +[\d,]+ +of ([\d,]+) live trades", output)
    assert sent and sent[1] == sent[2] and "with a wrong key: 0\n" in output
    assert re.search(r"^BTC-USD +[\d,]+ +[\d,.]+ ", output, re.M) and re.search(r"^binance +\d+ +1 +1 ", output, re.M)
    assert re.search(r"^kraken( +\d+){5} +1 +\d+ ms$", output, re.M) and re.search(r"^dead letters +1$", output, re.M)
    assert re.search(r"kraken +live +\d+ +\d+ ms", screen) and re.search(
        r"BTC-USD +6\d,\d{3}\.\d\d .*[▁▂▃▄▅▆▇█]", screen
    )
    handed = r"trades [\d,]+ \+ dead letters 1 \+ events [\d,]+"
    assert re.search(handed + r" = published [\d,]+ \+ left in the spool 0 \+ lost 0", screen)
    assert re.search(
        r"· published [\d,]+ · held [\d,]+ · spool 0 · dead letters \d · rows [\d,]+ · kafka connected", screen
    )


def test_items_that_wait_are_counted_and_those_of_a_cancelled_call_too(tmp_path: Path) -> None:
    async def main() -> None:
        program = MarketPipelineBase(market_pipeline_options("127.0.0.1:1", "full", tmp_path, buffer=10))
        trades = [market_pipeline_trade(n, "BTC-USD") for n in range(25)]
        program._trades = 50
        waiting = [asyncio.create_task(program.publisher.trades(trades)) for _ in range(2)]
        await ticks()
        counts = program.snapshot()
        assert (counts.published.accepted, counts.waiting, counts.given_up) == (10, 40, 0)
        assert md.imbalance(counts) == 0
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        counts = program.snapshot()
        assert (counts.waiting, counts.given_up, md.imbalance(counts)) == (25, 15, 0)
        waiting[1].cancel()
        await asyncio.gather(waiting[1], return_exceptions=True)
        await program.publisher.stop()
        counts = program.snapshot()
        assert (counts.waiting, counts.given_up, counts.published.dropped) == (0, 40, 10)
        assert md.lost(counts) == 50 and md.imbalance(counts) == counts.faults == 0
        program._trades += 1
        assert md.imbalance(program.snapshot()) == 1 and program.snapshot().faults == 1

    run_task(main())


def test_a_second_stop_cuts_the_publishing_short(tmp_path: Path) -> None:
    async def main() -> None:
        program = MarketPipelineBase(
            market_pipeline_options("127.0.0.1:1", "cut", tmp_path, spool_after=60.0), spool=True
        )
        await program.publisher.start()
        program._trades = 25
        trades = [market_pipeline_trade(n, "BTC-USD") for n in range(25)]
        await program.publisher.trades(trades)
        program.stop()
        program._deadline = time.monotonic() + 3600.0
        closing = asyncio.create_task(program._close_publisher())
        await until_async(lambda: program.publisher._state == "stopping")
        program.stop()
        await asyncio.wait_for(closing, HANG_LIMIT)
        counts = program.snapshot()
        assert (counts.published.spooled, counts.kafka, counts.faults, md.lost(counts)) == (25, "closed", 0, 0)

    run_task(main())


def test_computing_that_is_slow_leaves_out_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(market_flow, "QUEUE", 100)

    async def main() -> None:
        pipeline = Pipeline(market_pipeline_options("127.0.0.1:1", "slow", tmp_path))
        for n in range(5):
            trades = [market_pipeline_trade(n * 50 + k, "BTC-USD") for k in range(50)]
            assert pipeline.emit("kraken", trades) is None
        counts = pipeline.snapshot()
        assert (counts.offered, counts.queued, counts.skipped, counts.published.held) == (250, 100, 150, 250)
        assert md.imbalance(counts) == 0
        assert [trade.trade_id for trade in pipeline._queue] == [str(n) for n in range(150, 250)]
        await pipeline.publisher.stop()
        assert pipeline.emit("kraken", trades) is None  # too late
        counts = pipeline.snapshot()
        assert (counts.given_up, md.imbalance(counts)) == (50, 0)
        await pipeline.workers.close()

    run_task(main())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "where to"),
        (["--kafka", "nowhere"], "--kafka: expected HOST:PORT"),
        (["--kafka", "a:1", "--exchanges", "kraken,mtgox"], "there is no 'mtgox'"),
        (["--kafka", "a:1", "--symbols", "BTC"], "not a symbol"),
        (["--kafka", "a:1", "--symbols", ","], "must name one"),
        (["--kafka", "a:1", "--stocks", "AAPL"], "no key is set"),
        (["--kafka", "a:1", "--exchanges", "alpaca"], "needs --stocks"),
        (["--kafka", "a:1", "--url", "kraken=http://x"], "--url"),
        (["--kafka", "a:1", "--windows", "60,10"], "--windows"),
        (["--kafka", "a:1", "--buffer", "0"], "--buffer"),
        (["--kafka", "a:1", "--http", "x"], "--http"),
        (["--kafka", "a:1", "--prefix", "a b"], "--prefix"),
        (["--kafka", "a:1", "--dry-run"], "replay only"),
        (["--kafka", "a:1", "--sasl", "PLAIN"], "KAFKA_USERNAME"),
        (["--kafka", "a:1", "--tls", "/nowhere"], "--tls"),
        (["analyse", "--demo"], "does not go"),
        (["analyse", "--kafka", "a:1", "--exchanges", "kraken"], "has no feeds"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        market_pipeline.parse_arguments(arguments, {})
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_options() -> None:
    parse = market_pipeline.parse_arguments
    _, options = parse(
        ["--symbols", "btc-usd,ETH-EUR", "--spool-bytes", "2GiB", "--windows", "5,60"], {"KAFKA_BROKERS": "a:1,b:2"}
    )
    assert (options.symbols, options.kafka, options.spool_bytes) == (("BTC-USD", "ETH-EUR"), "a:1,b:2", 2 << 30)
    assert options.windows == (5, 60) and options.group == "market-analyse" and len(options.exchanges) == 10
    assert parse(["replay", "--kafka", "a:1", "--dry-run"], {})[1].group == "market-replay"
    key = mf.ADAPTERS["finnhub"].key_env
    assert key is not None
    _, options = parse(["--kafka", "a:1", "--stocks", "aapl"], {key: "k"})
    feeds = market_flow.feeds_of(options, {key: "k"})
    assert feeds["finnhub"][1] == ("AAPL-USD",) and feeds["kraken"][1] == options.symbols and "alpaca" not in feeds
    shared = market_flow.Pipeline(options, environ={key: "k"})._feed_options["turn"]
    assert shared == pytest.approx(market_connect.TURN / 11)  # ten that are behind leave the loop to publishing, too
    login = market_flow.security(
        dataclasses.replace(options, sasl="PLAIN", tls="system"), {"KAFKA_USERNAME": "u", "KAFKA_PASSWORD": "p"}
    )
    assert login["security_protocol"] == "SASL_SSL" and login["sasl_plain_password"] == "p"


@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_reads_stderr(terminal: bool, tmp_path: Path) -> None:
    names = ("kraken", "okx", "bitfinex")
    with Broker(tmp_path / "broker") as broker, Exchanges(ledger=True, history=0, exchanges=names) as them:
        arguments = market_pipeline_arguments(them, broker.address, "unread", tmp_path)
        with unread("market_pipeline.py", *arguments, terminal=terminal) as program:
            program.until(market_pipeline_all_live)
            for n in range(1, 11):
                them.emit(1)
                program.until(lambda found, n=n: found["published"]["published"] == found["computed"] == 9 * n)  # type: ignore[misc]
            children = psutil.Process(program.process.pid).children(True)
            program.term()
            assert program.process.wait(PROGRAM_LIMIT) == 0
            wait_until(lambda: not any(child.is_running() for child in children))
        trades = asyncio.run(market_pipeline_trades(broker.address, "unread"))
        for name in names:
            assert live(trades, name) == market_pipeline_sent(them, name)


def test_health_is_told_while_200_connections_stand(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        them = stack.enter_context(Exchanges(history=0, exchanges=("kraken", "okx")))
        arguments = market_pipeline_arguments(them, ABSENT, "many", tmp_path)
        process = stack.enter_context(market_pipeline_process(*arguments))
        process.until(market_pipeline_all_live)
        answers_besieged(process.http, process.process.pid)
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_what_cannot_start_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with market_pipeline_process("--kafka", "127.0.0.1:1", "--spool", str(tmp_path / "file")) as process:
        assert process.wait() == 1
        assert re.fullmatch(r"market_pipeline: the spool .* cannot be used: .*\n", "".join(process._lines))


def test_pictures() -> None:
    assert md.sparkline([]) == "" and md.sparkline([5.0, 5.0]) == "▁▁" and md.sparkline([1, 2, 3]) == "▁▅█"
    assert md.price(64000.126) == "64,000.13" and md.price(0.0000123456789) == "1.23457e-05" and md.price(None) == "–"
    assert md.latency(0.0123) == "12 ms" and md.latency(None) == "–"
    feed = md.FeedLine("live", *(0,) * 7, None)
    counts = md.MarketCounts(kafka="connected", feeds={"kraken": feed})
    assert md.health(counts)[0] == 200 and md.health(counts)[1]["status"] == "ok"
    for changes, status, code in (
        ({"kafka": "away"}, "degraded", 200),
        ({"feeds": {"kraken": feed._replace(state="waiting")}}, "degraded", 200),
        ({"stopping": True}, "stopping", 503),
        ({"trades": 1}, "error", 503),
        ({"faults": 1}, "error", 503),
    ):
        assert (md.health(counts._replace(**changes))[1]["status"], md.health(counts._replace(**changes))[0]) == (
            status,
            code,
        )
    whole = md.MarketCounts(trades=5, letters=1, published=Counts(6, 2, 4, 1, 2, 1, 0), skipped=1, offered=1)
    assert md.imbalance(whole) == 0
    assert md.last_word(whole) == (
        "trades 5 + dead letters 1 + recovered 2 = published 4 + left in the spool 2 + lost 1 + held 1"
        "; analytics: 0 rows, 1 trades left out"
    )
    for name in ("trades", "letters", "waiting", "given_up", "offered", "queued"):
        assert md.imbalance(whole._replace(**{name: getattr(whole, name) + 3})) == 3
