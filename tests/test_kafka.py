"""market/kafka.py, producer.py: a broker that stops, freezes, refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import psutil
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.partitioner import DefaultPartitioner

from market import consumers
from market import display as md
from market import kafka as mk
from market import producer as producer_module
from market import topics as mt
from market.trade import Trade
from runtime.spool import Spool, SpoolInUse
from sandbox.broker import Broker
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, pass_time, run_task, ticks, until_async
from tests.helpers.market import (
    ABSENT,
    MARKET_KAFKA_NOW,
    balanced,
    is_spilling,
    market_kafka_ids,
    market_kafka_letter,
    market_kafka_open,
    market_kafka_trade,
    market_kafka_trades,
    publish,
    read,
    read_all,
    spool_of,
)


@pytest.fixture(scope="module")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


async def create_topic(address: str, name: str, partitions: int, **options: Any) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    await admin.create_topics([NewTopic(name, partitions, 1, **options)])
    await admin.close()


def test_every_record_is_where_its_symbol_belongs_once_and_in_order(
    running_broker: Broker,
) -> None:
    address, trades = running_broker.address, market_kafka_trades(0, 5000, 20)

    async def main() -> None:
        async with market_kafka_open(address, prefix="a.") as publisher:
            for n in range(0, 5000, 50):
                await publisher.trades(trades[n : n + 50])
                balanced(publisher)
                if n % 1000 == 0:
                    await until_async(lambda: not publisher._trades.backlog.waiting)
            publisher.analytics([{"symbol": f"S{n % 20}-USD", "vwap": n} for n in range(100)])
            await publisher.flush()
            stats = balanced(publisher)
            assert stats.trades.published == 5000 and stats.analytics.published == 100
            assert stats.state == "connected" and stats.connects == 1 and stats.dead == 0
        found = await read(address, "a.trades")
        assert len(found) == 3
        assert sum(len(records) for records in found.values()) == 5000
        for partition, records in found.items():
            for record in records:
                trade = mt.decode(record.value)
                assert record.key == trade.symbol.encode() and record.headers == (("schema", b"2"),)
                assert trade == trades[int(trade.trade_id)]
                assert record.timestamp == trade.ts_recv // 1_000_000
                assert partition == DefaultPartitioner()(record.key, [0, 1, 2], [0, 1, 2])
        assert await market_kafka_ids(address, "a.trades") == list(range(5000))
        rows = await read_all(address, "a.analytics")
        assert sorted(orjson.loads(row.value)["vwap"] for row in rows) == list(range(100))
        assert {row.key for row in rows} == {f"S{n}-USD".encode() for n in range(20)}

    run_task(main())


def test_json_of_a_trade_is_its_fields_by_name() -> None:
    trade = market_kafka_trade(7, sequence=None, flags="gap,snapshot")
    assert json.loads(mt.encode(trade)) == trade._asdict()
    assert mt.decode(mt.encode(trade)) == trade
    for bad in (b"", b"[]", b"{}", b"7", b'{"exchange":"x"}', b"\xff", mt.encode(trade)[:-1] + b',"more":1}'):
        with pytest.raises(ValueError):
            mt.decode(bad)


def test_a_line_of_the_spool_gives_back_what_it_was_made_of() -> None:
    odd = market_kafka_trade(1, symbol="Ünï\n\x00\t-USD", trade_id='"{\t')
    for row in (
        mt.trade_record(market_kafka_trade(1), "p-trades"),
        mt.trade_record(odd, "p-trades"),
        mt.trade_record(market_kafka_trade(1, symbol=""), "p-trades"),
        mt.trade_record(market_kafka_trade(1, symbol="1\tBTC"), "p-trades"),
        mt.dead_letter_record(
            mt.DeadLetter("okx", "no price", b"\x00\n\xff{", MARKET_KAFKA_NOW, "binary", "{}"), "p-dead"
        ),
    ):
        line = mt.line_of_record(row)
        assert b"\n" not in line and mt.record_of_line(line, "p-trades", "p-dead") == row
    before = mt.encode(odd)  # as an older version wrote it
    assert mt.record_of_line(before, "p-trades", "p-dead") == mt.trade_record(odd, "p-trades")
    for line in (b'{"exchange":"kraken"}', b"[1]", b"rubbish", b"", b'["a","b","not base64",1,"text"]', b"1", b"1\ta"):
        row = mt.record_of_line(line, "p-trades", "p-dead")
        letter = mt.letter_of_record(row.value, row.headers)
        assert row.topic == "p-dead" and "another version" in letter.error and letter.raw == line


SURROGATE = "frame \ud800 ü".encode("utf-8", "surrogatepass")


def test_what_cannot_be_published_is_a_dead_letter_and_holds_up_nobody(
    running_broker: Broker,
) -> None:
    address = running_broker.address
    bad: list[Any] = [
        market_kafka_trade(0, price="\ud800"),
        market_kafka_trade(0, symbol="\udfff"),
        market_kafka_trade(0, symbol=7),
        market_kafka_trade(0, price=object()),
        market_kafka_trade(0, ts_recv=10**40),
        market_kafka_trade(0, ts_recv=-1),
        market_kafka_trade(0, ts_recv=1.5),
        market_kafka_trade(0, ts_recv="now"),
        market_kafka_trade(0, flags="x" * 1_000_000),
        ("not", "a", "trade"),
    ]

    async def main() -> None:
        async with market_kafka_open(address, prefix="b.") as publisher:
            good = market_kafka_trades(0, 2 * len(bad))
            for n, each in enumerate(bad):
                await publisher.trades([good[2 * n], each, good[2 * n + 1]])
            await publisher.dead(market_kafka_letter("okx", "no price \ud800", b"\x00\xff{raw", MARKET_KAFKA_NOW))
            await publisher.dead(market_kafka_letter("bybit", "text", SURROGATE, MARKET_KAFKA_NOW + 5, "text"))
            await publisher.dead(market_kafka_letter("gateio", "huge", b"y" * 3_000_000, MARKET_KAFKA_NOW))
            await publisher.flush()
            stats = balanced(publisher)
            assert stats.trades.published == stats.trades.accepted == 3 * len(bad) + 3
            assert stats.dead == len(bad) + 3 and stats.connects == 1
        assert await market_kafka_ids(address, "b.trades") == list(range(2 * len(bad)))
        letters = [letter async for letter in consumers.dead_letters(address, prefix="b.")]
        trades = [letter for letter in letters if letter.kind == "trade"]
        assert len(trades) == len(bad) and sum(letter.exchange == "kraken" for letter in trades) == len(bad) - 1
        assert all(letter.error and letter.raw for letter in letters)
        okx, bybit, gateio = (
            next(letter for letter in letters if letter.exchange == name) for name in ("okx", "bybit", "gateio")
        )
        assert okx[:5] == ("okx", "no price \\ud800", b"\x00\xff{raw", MARKET_KAFKA_NOW, "binary")
        assert bybit[:5] == (
            "bybit",
            "text",
            SURROGATE,
            MARKET_KAFKA_NOW + 5,
            "text",
        )
        assert gateio.raw == b"y" * mt.LARGEST_RECORD and "3000000 bytes" in gateio.error
        assert [letter async for letter in consumers.dead_letters(address, prefix="none.")] == []

    run_task(main())


def test_the_broker_refuses_a_record_and_the_rest_of_its_batch_goes_on_in_order(
    running_broker: Broker,
) -> None:
    address, culprits = running_broker.address, {0, 13, 14, 700, 999}

    async def main() -> None:
        for name, limit in (("c.trades", 20_000), ("c.dead-letter", 200_000)):
            await create_topic(address, name, 2, topic_configs={"max.message.bytes": str(limit)})
        trades = market_kafka_trades(0, 1000)
        for n in culprits:
            trades[n] = trades[n]._replace(flags=os.urandom(15_000).hex())
        async with market_kafka_open(address, prefix="c.", compression=None) as publisher:
            await publisher.trades(trades)
            await publisher.flush()
            stats = balanced(publisher)
            assert stats.trades.published == 1000 and stats.dead == len(culprits) and stats.connects > 1
            assert "MessageSizeTooLarge" in stats.error
            await publisher.dead(market_kafka_letter("okx", "huge", os.urandom(400_000), MARKET_KAFKA_NOW))
            await publisher.flush()
            assert balanced(publisher).trades[2:] == (1000, 0, 0, 1, 0)
        assert await market_kafka_ids(address, "c.trades") == [n for n in range(1000) if n not in culprits]
        letters = [letter async for letter in consumers.dead_letters(address, prefix="c.")]
        assert {int(mt.decode(letter.raw).trade_id) for letter in letters} == culprits and len(letters) == len(culprits)
        assert {(letter.exchange, letter.error) for letter in letters} == {("kraken", "MessageSizeTooLargeError")}

    run_task(main())


def test_the_producer_is_idempotent_and_begins_anew_when_the_broker_lost_count(
    running_broker: Broker,
) -> None:
    address = running_broker.address

    async def main() -> None:
        await create_topic(address, "d.trades", 1)  # one is there, the other is not
        async with market_kafka_open(address, prefix="d.", partitions=1) as publisher:
            await publish(publisher, 0, 10)
            producer = publisher._sink.producer._producer
            numbers, place = producer._txn_manager._sequence_numbers, TopicPartition("d.trades", 0)
            assert producer._sender._acks == -1 and numbers[place] == 10
            numbers[place] = 0  # what was sent is sent again: the broker knows it
            await publish(publisher, 0, 10)
            assert publisher.stats().connects == 1
            numbers[place] = 17  # a hole
            await publish(publisher, 10, 20)
            assert publisher.stats().connects == 2 and "OutOfOrder" in publisher.stats().error
            publisher._sink.producer._sent = producer_module.RENEW_AFTER + 1
            await publish(publisher, 20, 30)
            assert publisher.stats().connects == 3
        assert await market_kafka_ids(address, "d.trades") == list(range(30))

    run_task(main())


def test_without_a_spool_callers_wait_for_room_in_their_order(market_kafka_broker: Broker) -> None:
    broker = market_kafka_broker
    broker.stop()

    async def main() -> None:
        async with market_kafka_open(broker.address, buffer=100, spool_after=0.05) as publisher:
            await publisher.trades(market_kafka_trades(0, 100, 1))
            waiting = [asyncio.create_task(publisher.trades(market_kafka_trades(100, 350, 1)))]
            await until_async(
                lambda: len(publisher._trades.backlog.waiting) == 100 and publisher.stats().trades.accepted == 200
            )
            await until_async(lambda: publisher.stats().state == "away" and "Connection" in publisher.stats().error)
            stats = balanced(publisher)
            assert stats.trades.held == 200
            assert not publisher.offer(market_kafka_trades(350, 351, 1)) and not waiting[0].done()
            waiting.append(asyncio.create_task(publisher.trades(market_kafka_trades(350, 400, 1))))
            gone = asyncio.create_task(publisher.trades(market_kafka_trades(900, 901, 1)))
            waiting.append(asyncio.create_task(publisher.dead(market_kafka_letter("x", "y", b"z", 1))))
            await ticks()
            assert not any(task.done() for task in (*waiting, gone))
            gone.cancel()
            assert balanced(publisher).trades.held == 200
            broker.start()
            await asyncio.gather(*waiting)
            async with publisher._turn:  # somebody waits: nobody passes
                await until_async(lambda: not publisher._trades.backlog.waiting)
                assert not publisher.offer(market_kafka_trades(350, 351, 1))
            await publisher.flush()
            assert balanced(publisher).trades.published == 401
            assert publisher.stats().state == "connected"
        assert await market_kafka_ids(broker.address) == list(range(400))

    run_task(main())


def test_analytics_drop_the_oldest_and_trades_do_not_wait_for_them(
    market_kafka_broker: Broker,
) -> None:
    broker = market_kafka_broker
    broker.stop()

    async def main() -> None:
        async with market_kafka_open(broker.address, analytics_buffer=50) as publisher:
            publisher.analytics([{"symbol": "A", "n": 0}])
            await until_async(lambda: publisher._rows.backlog.held_under_way() == 1)
            for n in range(1, 200):
                publisher.analytics([{"symbol": "A", "n": n}])
            stats = balanced(publisher)
            assert stats.analytics == mk.Counts(200, 0, 0, 51, 0, 149, 0) and stats.trades.held == 0
            with pytest.raises((LookupError, AttributeError, TypeError)):
                publisher.analytics([{"n": 1}])
            await publisher.trades([market_kafka_trade(1)])
            broker.start()
            await publisher.flush()
            assert balanced(publisher).analytics == mk.Counts(200, 0, 51, 0, 0, 149, 0)
        rows = await read_all(broker.address, "analytics")
        assert [orjson.loads(row.value)["n"] for row in rows] == [0, *range(150, 200)]

    run_task(main())


def test_absent_at_the_start_the_buffer_fills_then_the_spool_and_all_comes_in_order(
    market_kafka_broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = market_kafka_broker
    broker.stop()

    async def main() -> None:
        async with market_kafka_open(broker.address, buffer=500, spool=tmp_path / "spool", spool_after=60) as publisher:
            for n in range(0, 500, 10):
                await publisher.trades(market_kafka_trades(n, n + 10))
            await until_async(
                lambda: publisher._trades.backlog.held_under_way() == 500 and publisher.stats().error != ""
            )
            assert balanced(publisher).trades == mk.Counts(500, 0, 0, 500, 0, 0, 0)
            for n in range(500, 3000, 10):
                await publisher.trades(market_kafka_trades(n, n + 10))
                balanced(publisher)
            await until_async(lambda: not is_spilling(publisher))
            counts = balanced(publisher).trades
            assert counts.spooled >= 2000 and counts.held <= 500 and counts.accepted == 3000
            assert Spool.stats(spool_of(publisher)).rows == counts.spooled
            broker.start()
            for n in range(3000, 4000, 10):
                await publisher.trades(market_kafka_trades(n, n + 10))
                balanced(publisher)
                await asyncio.sleep(0)
            await publisher.flush()
            assert balanced(publisher).trades == mk.Counts(4000, 0, 4000, 0, 0, 0, 0)
            assert list((tmp_path / "spool").glob("*.batch")) == []
        assert await market_kafka_ids(broker.address) == list(range(4000))

    with caplog.at_level(logging.INFO):
        run_task(main())
    lines = [(record.name, record.levelname) for record in caplog.records if record.name == "market_pipeline"]
    assert lines == [("market_pipeline", "WARNING"), ("market_pipeline", "INFO")]
    assert [each for each in caplog.records if "aiokafka" in each.name and each.levelno >= logging.WARNING] == []


def test_without_a_controller_topics_wait_and_trades_are_spooled(
    market_kafka_broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, real, absent = market_kafka_broker.address, AIOKafkaAdminClient.create_topics, [True]

    async def create_topics(self: Any, topics: Any) -> Any:
        if absent[0]:
            self._client.cluster.controller = None
            monkeypatch.setattr(self._client, "force_metadata_update", ticks)
        return await real(self, topics)

    monkeypatch.setattr(AIOKafkaAdminClient, "create_topics", create_topics)

    async def main() -> None:
        async with market_kafka_open(address, buffer=500, spool=tmp_path / "spool", spool_after=60) as publisher:
            for n in range(0, 2000, 10):
                await publisher.trades(market_kafka_trades(n, n + 10))
            await until_async(lambda: not is_spilling(publisher) and "no controller" in publisher.stats().error)
            assert balanced(publisher).trades.spooled >= 1000
            absent[0] = False
            await publisher.flush()
            assert balanced(publisher).trades == mk.Counts(2000, 0, 2000, 0, 0, 0, 0)
        assert await market_kafka_ids(address) == list(range(2000))

    run_task(main())


def test_what_is_on_its_way_to_the_spool_is_not_overtaken(
    running_broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, go, write = running_broker.address, threading.Event(), Spool._write

    def slow(self: Spool, name: str, line: bytes, data: bytes) -> None:
        assert go.wait(HANG_LIMIT)
        write(self, name, line, data)

    monkeypatch.setattr(Spool, "_write", slow)

    async def main() -> None:
        async with market_kafka_open(
            address, prefix="h.", spool=tmp_path / "spool", buffer=100, spool_after=60, linger=0.1
        ) as publisher:
            await publisher.trades(market_kafka_trades(0, 100, 1))
            task = asyncio.create_task(publisher.trades(market_kafka_trades(100, 200, 1)))
            await until_async(lambda: len(publisher._trades.backlog.moving) == 100)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await publisher.trades(market_kafka_trades(100, 200, 1))
            await pass_time(0.3)  # longer than it lingers
            assert balanced(publisher).trades == mk.Counts(200, 0, 0, 200, 0, 0, 0)
            assert len(publisher._trades.backlog.moving) == len(publisher._trades.backlog.waiting) == 100
            go.set()
            await publisher.flush()
        assert await market_kafka_ids(address, "h.trades") == list(range(200))

    try:
        run_task(main())
    finally:
        go.set()


def test_frozen_for_longer_than_its_limits_each_record_comes_once(
    market_kafka_broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = market_kafka_broker

    async def main() -> None:
        async with market_kafka_open(
            broker.address, buffer=500, spool=tmp_path / "spool", spool_after=0.1, request_timeout=0.2
        ) as publisher:
            await publish(publisher, 0, 100)
            broker.freeze()
            for n in range(100, 1500, 10):
                await publisher.trades(market_kafka_trades(n, n + 10))
                balanced(publisher)
                await asyncio.sleep(0)
            await until_async(lambda: balanced(publisher).trades.spooled > 900 and publisher.stats().state == "away")
            await until_async(lambda: "RequestTimedOutError" in caplog.text)
            assert balanced(publisher).trades.published == 100
            broker.thaw()
            await publisher.flush()
            assert balanced(publisher).trades == mk.Counts(1500, 0, 1500, 0, 0, 0, 0)
            assert publisher.stats().connects == 1
        assert await market_kafka_ids(broker.address) == list(range(1500))

    run_task(main())


def test_stopped_and_restarted_under_load_each_record_comes_once(
    market_kafka_broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what this broker acknowledges after it has saved its data: it gives the same offsets again."""
    broker = market_kafka_broker
    owners: dict[tuple[int, int], int] = {}
    forgotten = set[int]()
    send = AIOKafkaProducer.send_batch
    build = producer_module.Producer._build
    rows_of: dict[int, list[mt.Record]] = {}

    async def built(self: producer_module.Producer, producer: Any, rows: list[mt.Record]) -> Any:
        lanes = await build(self, producer, rows)
        rows_of.update((id(piece.batch), piece.rows) for pieces in lanes.values() for piece in pieces)
        return lanes

    async def sent(self: Any, batch: Any, topic: str, *, partition: int) -> Any:
        future, rows = await send(self, batch, topic, partition=partition), rows_of[id(batch)]

        def acknowledged(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and done.exception() is None:
                for place, row in enumerate(rows, done.result().offset):
                    if (partition, place) in owners:
                        forgotten.add(owners[partition, place])
                    owners[partition, place] = int(mt.decode(row.value).trade_id)

        future.add_done_callback(acknowledged)
        return future

    monkeypatch.setattr(producer_module.Producer, "_build", built)
    monkeypatch.setattr(AIOKafkaProducer, "send_batch", sent)

    async def main() -> None:
        async with market_kafka_open(
            broker.address, buffer=1000, spool=tmp_path / "spool", spool_after=0.1, request_timeout=HANG_LIMIT
        ) as publisher:
            count = 0

            async def load_during(event: Coroutine[Any, Any, object]) -> None:
                nonlocal count
                task = asyncio.create_task(event)
                while not task.done():
                    await publisher.trades(market_kafka_trades(count, count + 10))
                    count += 10
                    balanced(publisher)
                    await ticks()
                await task

            for _ in range(2):
                before = publisher.stats().trades.published
                await load_during(until_async(lambda n=before: publisher.stats().trades.published > n))  # type: ignore[misc]
                await load_during(asyncio.to_thread(broker.stop))
                await load_during(until_async(lambda: publisher.stats().state == "away"))
                await load_during(asyncio.to_thread(broker.start))
            await publisher.flush()
            assert balanced(publisher).trades == mk.Counts(count, 0, count, 0, 0, 0, 0)
        ids = await market_kafka_ids(broker.address)
        assert len(ids) == len(set(ids)) and set(range(count)) - set(ids) <= forgotten and len(owners) >= len(ids)

    run_task(main())


@pytest.mark.parametrize("how", ["absent", "frozen"])
def test_a_stop_without_an_answer_ends_in_time_and_the_next_life_goes_on(
    market_kafka_broker: Broker, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker, spool = market_kafka_broker, tmp_path / "spool"

    def sent_in_vain(publisher: mk.Publisher) -> bool:
        client = publisher._sink.producer._producer.client
        unanswered = any(connection._requests for connection in client._conns.values())
        return unanswered if how == "frozen" else "kafka: " in caplog.text

    async def main() -> None:
        async with market_kafka_open(broker.address, spool=spool, request_timeout=3600) as publisher:
            await publish(publisher, 0, 100)
            caplog.clear()
            broker.freeze() if how == "frozen" else broker.stop()
            await publisher.trades(market_kafka_trades(100, 200))
            await until_async(lambda: publisher._trades.backlog.held_under_way() == 100 and sent_in_vain(publisher))
            await publisher.trades(market_kafka_trades(200, 5200))
            publisher.analytics([{"symbol": "A"}])
            assert await asyncio.wait_for(publisher.stop(0.2), HANG_LIMIT) == 0
            stats = balanced(publisher)
            assert stats.trades == mk.Counts(5200, 0, 100, 0, 5100, 0, 0) and stats.analytics.dropped == 1
            with pytest.raises(mk.PublisherClosed):
                await publisher.trades(market_kafka_trades(1, 2))
            with pytest.raises(mk.PublisherClosed):
                await publisher.flush()
        broker.thaw() if how == "frozen" else broker.start()
        async with market_kafka_open(broker.address, spool=spool) as publisher:
            assert balanced(publisher).trades[:2] == (0, 5100)
            other = mk.Publisher(broker.address, spool=spool)
            with pytest.raises(SpoolInUse):
                await other.start()
            await publish(publisher, 5200, 5300)
            assert balanced(publisher).trades == mk.Counts(100, 5100, 5200, 0, 0, 0, 0)
        if how == "absent":
            assert await market_kafka_ids(broker.address) == list(range(5300))
        else:  # what was under way when it was left may come twice
            ids = [int(mt.decode(record.value).trade_id) for record in await read_all(broker.address, "trades")]
            assert set(ids) == set(range(5300)) and len(ids) <= 5400

    run_task(main())


def test_a_stop_with_nowhere_to_go_says_what_is_lost(
    market_kafka_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    broker = market_kafka_broker
    broker.freeze()

    async def main() -> None:
        async with market_kafka_open(broker.address, request_timeout=3600) as publisher:
            await publisher.trades(market_kafka_trades(0, 3000))
            await until_async(lambda: publisher._trades.backlog.held_under_way() == 3000)
            stop = asyncio.create_task(publisher.stop(3600))
            await until_async(lambda: publisher._state == "stopping")
            stop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stop
            await until_async(lambda: publisher.stats().state == "closed")
            assert balanced(publisher).trades == mk.Counts(3000, 0, 0, 0, 0, 3000, 0)
        never = mk.Publisher(broker.address)
        assert never.offer(market_kafka_trades(0, 5)) and await never.stop() == 5
        balanced(never)

    run_task(main())
    assert "3000 trades and dead letters could be neither published nor spooled" in caplog.text


PROGRAM = """
import asyncio, sys
from pathlib import Path
from market import kafka as mk
import test_part as t

async def main():
    publisher = mk.Publisher(sys.argv[1], buffer=200, spool=Path(sys.argv[2]), partitions=3, spool_after=0.05)
    await publisher.start()
    await publisher.trades(t.market_kafka_trades(0, 2000))
    await t.until_async(lambda: publisher.stats().trades.spooled == 2000)
    print("spooled", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_what_a_killed_process_had_spooled_the_next_one_publishes(market_kafka_broker: Broker, tmp_path: Path) -> None:
    broker, spool = market_kafka_broker, tmp_path / "spool"
    broker.stop()
    program = PROGRAM.replace("test_part", __name__)
    command = [sys.executable, "-c", program, broker.address, str(spool)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"spooled\n"
        process.send_signal(signal.SIGKILL)
    broker.start()

    async def main() -> None:
        async with market_kafka_open(broker.address, spool=spool) as publisher:
            assert publisher.stats().trades.recovered == 2000
            await publish(publisher, 2000, 2100)
            assert balanced(publisher).trades == mk.Counts(100, 2000, 2100, 0, 0, 0, 0)
        assert await market_kafka_ids(broker.address) == list(range(2100))

    run_task(main())


def test_a_full_spool_blocks_and_a_damaged_one_is_counted(market_kafka_broker: Broker, tmp_path: Path) -> None:
    broker, spool = market_kafka_broker, tmp_path / "spool"
    broker.stop()

    async def main() -> None:
        options: dict[str, Any] = {"spool": spool, "buffer": 100, "spool_after": 0.05}
        async with market_kafka_open(broker.address, 0.1, spool_bytes=100_000, **options) as publisher:
            task = asyncio.create_task(publisher.trades(market_kafka_trades(0, 1000)))
            await until_async(lambda: Spool.stats(spool_of(publisher)).refused > 0)
            counts = balanced(publisher).trades
            assert 0 < counts.spooled < 500 and counts.held == 100 and not task.done()
            task.cancel()
            accepted = counts.accepted
        assert 0 < balanced(publisher).trades.dropped <= 100
        files = sorted(spool.glob("*.batch"))
        rows = [json.loads(file.read_bytes().split(b"\n")[0])["rows"] for file in files]
        async with market_kafka_open(broker.address, **options) as publisher:
            files[1].write_bytes(b"rubbish")
            broker.start()
            await publisher.flush()
            counts = balanced(publisher).trades
            assert counts == mk.Counts(0, sum(rows), sum(rows) - rows[1], 0, 0, 0, rows[1])
        first = sum(rows[:1])
        assert await market_kafka_ids(broker.address) == [*range(first), *range(first + rows[1], sum(rows))]
        assert sum(rows) <= accepted

    run_task(main())


def test_dead_letters_are_committed_after_what_came_of_them(running_broker: Broker) -> None:
    address = running_broker.address

    async def main() -> None:
        tasks = asyncio.all_tasks()
        async with market_kafka_open(address, prefix="e.", partitions=1) as publisher:
            for n in range(10):
                await publisher.dead(market_kafka_letter("okx", "bad", str(n).encode(), MARKET_KAFKA_NOW + n))
            await publisher.flush()

            async def left_early() -> int:
                letters = consumers.dead_letters(address, prefix="e.", group="again")
                async for letter in letters:
                    await letters.aclose()  # type: ignore[attr-defined]
                    return int(letter.raw)
                return -1

            assert [await left_early() for _ in range(2)] == [0, 0]
            flushed: list[int] = []

            async def flush() -> None:
                await publisher.flush()
                flushed.append(publisher.stats().trades.published)

            found = list[int]()
            async for letter in consumers.dead_letters(address, prefix="e.", group="again", before_commit=flush):
                found.append(int(letter.raw))
                await publisher.trades([market_kafka_trade(len(found))])
            assert found == list(range(10)) and flushed[-1] == 20
            assert [letter async for letter in consumers.dead_letters(address, prefix="e.", group="again")] == []
            assert len([letter async for letter in consumers.dead_letters(address, prefix="e.")]) == 10
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == tasks
        with pytest.raises(TimeoutError):
            _ = [letter async for letter in consumers.dead_letters("127.0.0.1:1", limit=0.2)]
        assert logging.getLogger("aiokafka").handlers == []

    run_task(main())


def test_a_group_shares_the_symbols_commits_what_was_done_and_looks_back(
    running_broker: Broker,
) -> None:
    address = running_broker.address

    async def take(group: consumers.Group, n: int) -> consumers.Taken:
        trades, again, dead = list[Trade](), list[Trade](), list[mt.DeadLetter]()
        deadline = time.monotonic() + HANG_LIMIT
        while len(trades) + len(dead) < n:
            assert time.monotonic() < deadline
            taken = await group.take(0.05, 100)
            trades += taken.trades
            again += taken.again
            dead += taken.dead
        return consumers.Taken(trades, again, dead)

    async def main() -> None:
        tasks, files = asyncio.all_tasks(), psutil.Process().num_fds()
        async with market_kafka_open(address, prefix="f.", partitions=1) as publisher:
            await publish(publisher, 0, 1000, 1)
            first = consumers.Group(address, prefix="f.")
            await first.start()
            taken = await take(first, 1000)
            assert (
                [int(trade.trade_id) for trade in taken.trades] == list(range(1000))
                and not taken.again
                and not taken.dead
            )
            assert await first.commit()
            await publish(publisher, 1000, 1100, 1)
            assert len((await take(first, 100)).trades) == 100  # not committed: a death here
            assert first.stats().partitions == (0,) and first.stats().commits == 1
            await first.stop()
            producer = publisher._sink.producer
            await producer.publish([mt.Record("f.trades", b"x", b"rubbish", MARKET_KAFKA_NOW // 1_000_000 + 1100, [])])
            second = consumers.Group(address, prefix="f.", look_back=0.1)
            await second.start()
            taken = await take(second, 101)
            assert [int(trade.trade_id) for trade in taken.trades] == list(range(1000, 1100))
            assert [int(trade.trade_id) for trade in taken.again] == list(range(899, 1000))
            assert [letter.raw for letter in taken.dead] == [b"rubbish"]
            assert await second.commit()
            await second.stop()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == tasks and psutil.Process().num_fds() <= files

    run_task(main())


def test_a_member_that_hears_nothing_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """``last_poll_timestamp`` is set by every answer to a fetch, also by one without records."""
    now, polled = [1000.0], dict[TopicPartition, int | None]()

    class Consumer:
        def assignment(self) -> set[TopicPartition]:
            return set(polled)

        def last_poll_timestamp(self, place: TopicPartition) -> int | None:
            return polled[place]

        def pause(self, *_: object) -> None: ...

        resume = pause

        async def committed(self, place: TopicPartition) -> None: ...

    monkeypatch.setattr(consumers, "time", SimpleNamespace(time=lambda: now[0]))
    group = consumers.Group(ABSENT)
    group._consumer = Consumer()

    def silent() -> tuple[float, str]:
        found = group.stats().silent
        return found, md.health(md.MarketCounts(silent=found))[1]["status"]

    async def main() -> None:
        await group.on_partitions_assigned([])  # there are more members than partitions
        now[0] += 100
        assert silent() == (0.0, "ok")
        places = [TopicPartition("trades", n) for n in range(2)]
        await group.on_partitions_assigned(places)
        polled.update(dict.fromkeys(places))
        now[0] += 31
        assert silent() == (31.0, "degraded")
        polled[places[1]] = int(now[0] * 1000) - 2000
        assert silent() == (2.0, "ok")
        polled.clear()
        await group.on_partitions_revoked(places)  # and nobody is told what is his
        now[0] += 31
        assert silent() == (31.0, "degraded")
        await group.on_partitions_assigned([])
        assert silent() == (0.0, "ok")

    asyncio.run(main())


def test_a_member_that_leaves_hands_its_partitions_over_with_all_done(
    running_broker: Broker,
) -> None:
    address = running_broker.address

    async def main() -> None:
        async with market_kafka_open(address, prefix="g.", partitions=4) as publisher:
            seen: dict[str, list[int]] = {"a": [], "b": []}
            revoked: list[set[int]] = []

            async def told() -> None:
                revoked.append({place.partition for place in a._done})

            async def member(name: str, group: consumers.Group) -> None:
                while True:
                    seen[name] += [int(trade.trade_id) for trade in (await group.take(0.02)).trades]

            a = consumers.Group(address, "shared", prefix="g.", revoked=told, heartbeat=0.05)
            b = consumers.Group(address, "shared", prefix="g.", heartbeat=0.05)
            with pytest.raises(TimeoutError, match="no topic"):
                await a.start(0.05)
            await publisher.trades(market_kafka_trades(0, 1000, 20))
            await a.start()
            members = [asyncio.create_task(member("a", a))]
            await until_async(lambda: len(seen["a"]) == 1000)
            assert await a.commit() and not revoked
            await b.start()
            members.append(asyncio.create_task(member("b", b)))
            await until_async(lambda: len(a.stats().partitions) == len(b.stats().partitions) == 2)
            assert revoked == [{0, 1, 2, 3}]
            await publisher.trades(market_kafka_trades(1000, 2000, 20))
            await until_async(lambda: len(seen["a"]) + len(seen["b"]) == 2000)
            assert len(seen["b"]) > 100 and sorted(seen["a"] + seen["b"]) == list(range(2000))
            assert await a.commit() and await b.commit()
            for task in members:
                task.cancel()
            await asyncio.gather(*members, return_exceptions=True)
            await a.stop()
            await b.stop()

    run_task(main())


def test_aiokafka_is_heard_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    throttle = mt.LogThrottle(lambda: now[0])
    noise = logging.getLogger("aiokafka.conn")
    with caplog.at_level(logging.INFO):
        with throttle.attached():
            for n in range(50):
                noise.warning("away %d", n)
                noise.info("no matter")
            now[0] += mt.THROTTLE_FOR
            noise.error("still away")
            throttle.recovered()
            throttle.recovered()
            noise.error("away again")
        noise.error("heard by all")
    assert [record.getMessage() for record in caplog.records] == [
        *("kafka: away 0", "kafka: still away (49 more lines were held back)"),
        *("kafka: answers again (0 lines were held back)", "kafka: away again", "heard by all"),
    ]


def test_the_broker_for_development_keeps_its_port_and_data_and_follows_a_killed_life(
    tmp_path: Path,
) -> None:
    broker = Broker(tmp_path)
    broker.kill()
    broker.stop()
    address = broker.start()
    assert broker.start() == address and broker.running
    pid = broker._process.pid  # type: ignore[union-attr]
    next_life = Broker(tmp_path)
    assert next_life.start() != address and psutil.pid_exists(pid)  # a zombie until the first one looks
    assert not broker.running
    next_life.freeze()
    next_life.stop()
    assert not next_life.running
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = Broker(tmp_path, taken.getsockname()[1])
        with pytest.raises(OSError, match="exit code"):
            busy.start()
        assert not busy.running


def test_the_broker_runs_by_itself_until_it_is_told_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sandbox", "broker", "--folder", str(tmp_path)]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        host, port = process.stdout.readline().split(":")
        socket.create_connection((host, int(port)), HANG_LIMIT).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PROGRAM_LIMIT) == 130
    assert (tmp_path / "broker.log").exists()
