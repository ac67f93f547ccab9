"""market/: records, spools, exchanges and programs that are not as they should be."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import io
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import market_pipeline
from market import display as md
from market import flow as market_flow
from market import kafka as mk
from market import producer as producer_module
from market import topics as mt
from market.connect import Feed
from market.feed_socket import FeedTimes
from market.feeds import ADAPTERS
from market.stats import Analytics, AnalyticsRow
from market.trade import Parsed, Trade
from runtime import shell
from runtime.monitor import Exporter
from runtime.options import EXIT_INTERRUPTED
from runtime.spool import EncodedBatch, Spool
from sandbox.broker import Broker
from sandbox.markets import Exchanges
from tests.helpers.base import World, run_task, until_async
from tests.helpers.market import (
    ABSENT,
    MARKET_KAFKA_NOW,
    FakeSocket,
    MarketConnectWorld,
    Sink,
    balanced,
    is_spilling,
    market_kafka_ids,
    market_kafka_letter,
    market_kafka_open,
    market_kafka_trade,
    market_kafka_trades,
    market_stats_take,
    merged,
    publish,
)
from tests.helpers.mechanisms import simulated


@pytest.fixture
def restored_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    "field",
    [
        *({"symbol": ["BTC-USD"]}, {"symbol": None}, {"price": 1}, {"price_value": "1"}, {"size_value": 1}),
        *({"ts_event": "1"}, {"ts_recv": 1.5}, {"sequence": "1"}, {"flags": 7}, {"side": {}}),
        *({"sequence": True}, {"trade_id": 1}),
    ],
)
def test_kafka_a_record_with_wrong_types_is_no_trade(field: dict[str, Any]) -> None:
    """One that was taken for a trade had the analysers read its partition again, for ever."""
    good = market_kafka_trade(1)
    assert mt.decode(mt.encode(good)) == good and mt.decode(mt.encode(good._replace(sequence=None))).sequence is None
    with pytest.raises(ValueError, match="not a trade"):
        mt.decode(json.dumps({**good._asdict(), **field}).encode())


@pytest.mark.parametrize("symbol", ["[/oops]", "BTC", "btc-usd", "BTC-USD\n", "\x1b[2J-USD", "B" * 21 + "-USD", ""])
def test_kafka_a_record_whose_symbol_is_none_is_no_trade(symbol: str) -> None:
    for changes in ({"symbol": symbol}, {"exchange": symbol or "*"}):
        if changes != {"exchange": "btc-usd"}:
            with pytest.raises(ValueError, match="not a symbol"):
                mt.decode(mt.encode(market_kafka_trade(1, **cast("dict[str, Any]", changes))))


def test_kafka_records_of_the_schema_before_are_read_and_spooled_ones_stay_what_they_are() -> None:
    trade = market_kafka_trade(1)
    before = mt.encode(trade).replace(b"ts_event", b"exchange_ts_ns").replace(b"ts_recv", b"received_ts_ns")
    assert mt.decode(before) == trade
    line = b"%d\tBTC-USD\t%b" % (MARKET_KAFKA_NOW // 10**6, before)
    record = mt.record_of_line(line, "trades", "dead")
    assert (record.value, record.headers) == (before, [("schema", b"1")])
    assert mt.record_of_line(before, "trades", "dead") == mt.trade_record(trade, "trades")
    headers = [("exchange", b"okx"), ("at_ns", b"17"), ("kind", b"text")]
    assert mt.letter_of_record(b"x", headers) == mt.DeadLetter("okx", "", b"x", 17, "text")


def test_kafka_rounds_are_bounded_and_in_order() -> None:
    rows = [mt.Record("t", b"k", b"x" * size, 0, []) for size in (40, 40, 40, 100, 1, 300, 5)]
    found = [[len(row.value) for row in each] for each in producer_module.rounds(rows, 100)]
    assert found == [[40, 40, 40], [100], [1, 300], [5]]
    assert list(producer_module.rounds([], 100)) == []


def test_kafka_encoding_gives_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0
    most = 0

    trade_record = mt.trade_record

    def counted(trade: Trade, topic: str) -> mt.Record:
        nonlocal begun
        begun += 1
        return trade_record(trade, topic)

    monkeypatch.setattr(mt, "trade_record", counted)

    async def main() -> None:
        nonlocal most
        publisher = mk.Publisher(ABSENT)
        taking = asyncio.create_task(publisher.trades(market_kafka_trades(0, 5000)))
        while not taking.done():
            before = begun
            await asyncio.sleep(0)
            most = max(most, begun - before)
        assert publisher.stats().trades.accepted == begun == 5000 and most == producer_module.AT_ONCE
        assert await publisher.stop() == 5000

    run_task(main())


# ----------------------------------------------------------------------------------------------------------- the spool


def test_kafka_what_the_spool_gives_back_is_not_encoded_again(
    market_kafka_broker: Broker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = 0

    trade_record = mt.trade_record

    def counted(trade: Trade, topic: str) -> mt.Record:
        nonlocal encoded
        encoded += 1
        return trade_record(trade, topic)

    monkeypatch.setattr(mt, "trade_record", counted)
    monkeypatch.setattr(mk, "FILE", 500)
    monkeypatch.setattr(mk, "FLIGHT", 1000)
    broker = market_kafka_broker
    broker.stop()

    async def main() -> None:
        async with market_kafka_open(broker.address, spool=tmp_path / "spool", limit=0.0) as publisher:
            await publisher.trades(market_kafka_trades(0, 4200))
            await publisher.dead(market_kafka_letter("okx", "bad", b"\x00\n", MARKET_KAFKA_NOW, "binary", "{}"))
        assert encoded == 4200 and len(list((tmp_path / "spool").glob("*.batch"))) >= 8
        broker.start()
        with monkeypatch.context() as patched:
            patched.setattr(mt, "decode", None)
            async with market_kafka_open(broker.address, spool=tmp_path / "spool") as publisher:
                await publish(publisher, 4200, 4300)
                assert balanced(publisher).trades == mk.Counts(100, 4201, 4301, 0, 0, 0, 0)
                assert list((tmp_path / "spool").glob("*.batch")) == []
        assert encoded == 4300 and await market_kafka_ids(broker.address) == list(range(4300))

    run_task(main())


def test_kafka_a_spool_that_cannot_be_read_for_a_while_is_read_later(
    market_kafka_broker: Broker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a file descriptor left; that ended the publisher."""
    broker, first, refused = market_kafka_broker, Spool.first, 0

    async def failing(self: Spool, n: int, skip: int = 0) -> list[tuple[str, EncodedBatch]]:
        nonlocal refused
        if not refused:
            refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await first(self, n, skip)

    async def main() -> None:
        async with market_kafka_open(ABSENT, spool=tmp_path / "spool", limit=0.0) as publisher:
            await publisher.trades(market_kafka_trades(0, 50))
        monkeypatch.setattr(Spool, "first", failing)
        monkeypatch.setattr(mk, "ASK_AGAIN", 0.01)
        async with market_kafka_open(broker.address, spool=tmp_path / "spool") as publisher:
            await publisher.flush()
            assert refused == 1 and publisher.stats().state == "connected"
        assert await market_kafka_ids(broker.address) == list(range(50))

    run_task(main())


def test_kafka_what_comes_while_the_buffer_is_moved_does_not_keep_it_moving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine it was refilled as fast as it went to the spool, and nothing was published for so long."""
    put, puts = Spool.put, 0

    async def refilling(self: Spool, batch: EncodedBatch) -> str | None:
        nonlocal puts
        puts += 1
        assert publisher.offer(market_kafka_trades(puts * 50, puts * 50 + 50))
        return await put(self, batch)

    publisher = mk.Publisher(ABSENT, spool=tmp_path / "spool", spool_after=60)

    async def main() -> None:
        await publisher.start()
        assert publisher.offer(market_kafka_trades(0, 50))
        monkeypatch.setattr(Spool, "put", refilling)
        publisher._trades.press()
        await until_async(lambda: puts == 1 and not is_spilling(publisher))
        monkeypatch.setattr(Spool, "put", put)
        counts = balanced(publisher).trades
        assert (puts, counts.spooled, counts.held) == (1, 50, 50)
        await publisher.stop(0.0)
        assert balanced(publisher).trades.spooled == 100

    run_task(main())


def test_kafka_dead_letters_go_to_the_spool_in_files_of_bounded_size(tmp_path: Path) -> None:
    async def main() -> None:
        async with market_kafka_open(ABSENT, spool=tmp_path / "spool", limit=0.0) as publisher:
            for _ in range(6):
                await publisher.dead(market_kafka_letter("okx", "bad", b"x" * 800_000, MARKET_KAFKA_NOW))
        assert [Spool(tmp_path / "spool").open()] == [6]
        assert len(list((tmp_path / "spool").glob("*.batch"))) == 3  # beyond FLIGHT_BYTES no further one

    run_task(main())


def test_kafka_a_stop_that_is_cancelled_while_it_closes_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second signal does it: the rest was on its way to the spool, and its task was left behind."""
    put, gate, putting = Spool.put, asyncio.Event(), asyncio.Event()

    async def held(self: Spool, batch: EncodedBatch) -> str | None:
        putting.set()
        await gate.wait()
        return await put(self, batch)

    monkeypatch.setattr(Spool, "put", held)

    async def main() -> None:
        async with market_kafka_open(ABSENT, spool=tmp_path / "spool") as publisher:
            await publisher.trades(market_kafka_trades(0, 50))
            stopping = asyncio.create_task(publisher.stop(0.0))
            await putting.wait()
            for _ in range(2):
                stopping.cancel()
                for _ in range(5):
                    await asyncio.sleep(0)
            assert not stopping.done()
            gate.set()
            await asyncio.wait((stopping,))
            assert stopping.cancelled() and publisher.stats().state == "closed"
            assert balanced(publisher).trades == mk.Counts(50, 0, 0, 0, 50, 0, 0)
        spool = Spool(tmp_path / "spool")
        assert spool.open() == 50
        await spool.close()

    run_task(main())


# ----------------------------------------------------------------------------------------------------------- exchanges


def test_feeds_no_more_symbols_than_a_connection_may_have() -> None:
    symbols = [f"S{n}-USD" for n in range(1025)]
    for name, most in (("bitfinex", 25), ("binance", 1024)):
        adapter = ADAPTERS[name].fresh()
        assert adapter.check(symbols[:most]) == most
        assert adapter.check([*symbols[: most - 1], symbols[0]]) == most - 1
        for wrong, why in ((symbols[: most + 1], f"{most} at most"), ([], "no symbols")):
            with pytest.raises(ValueError, match=why):
                adapter.check(wrong)
            with pytest.raises(ValueError, match=why):
                Feed(adapter, wrong, print, print)
    with pytest.raises(ValueError, match="bitfinex: 26 symbols"):
        market_flow.feeds_of(
            market_flow.MarketOptions(symbols=tuple(symbols[:26]), exchanges=("kraken", "bitfinex")), {}
        )


def test_connect_subscriptions_are_as_slow_as_the_exchange_wants_them() -> None:
    async def main(world: World) -> None:
        sink, at = Sink(), list[float]()
        ws: Any = FakeSocket(World(), 1.0)
        send = ws.send_str

        async def send_str(text: str) -> None:
            at.append(world.now)
            await send(text)

        ws.send_str = send_str
        symbols = [f"S{n}-USD" for n in range(750)]
        for name, messages, pause in (("binance", 8, 0.3), ("bybit", 75, 0.0)):
            at.clear()
            feed = Feed(ADAPTERS[name], symbols, sink.emit, sink.dead, clock=world.clock)
            assert await feed._subscribe(feed._begin(ws))
            assert [later - earlier for earlier, later in itertools.pairwise(at)] == pytest.approx(
                [pause] * (messages - 1)
            )
            assert 4 * pause >= 1.0 or not pause  # four of them and a pong are five in a second

    simulated(main)


def test_connect_a_symbol_that_is_silent_while_others_trade_is_told_and_asked_for_again() -> None:
    """By the clock of the test; each symbol's silence is that of this connection, until another's last trade."""

    def frame(symbol: str, number: int, now: float) -> bytes:
        ms = int(now * 1000)
        fields = {"e": "trade", "s": symbol, "t": number, "p": "1", "q": "1", "T": ms, "m": True}
        return json.dumps(fields).encode()

    async def main() -> None:
        world, sink = World(1.8e9), Sink()
        ws: Any = FakeSocket(world, 1.0)
        symbols = ["BTC-USD", "SOL-USD"]
        feed = Feed(
            *(merged("binance"), symbols, sink.emit, sink.dead),
            clock=world.clock,
            wall=lambda: int(world.now * 1e9),
            times=FeedTimes(stale_after=300.0, renew_after=1800.0),
        )

        async def connect() -> None:
            connection = feed._begin(ws)
            await feed._subscribe(connection)
            ack = feed._reader.take(b'{"result":null,"id":1}', world.now)
            assert isinstance(ack, Parsed)
            await connection._control(ack)
            assert feed.stats().state == "live" and feed.stats().stale == ()

        def trade(symbol: str, after: float) -> None:
            world.now += after
            feed._reader.take(frame(symbol, int(world.now), world.now), world.now)

        def renewal() -> str:
            assert feed._connection is not None
            return feed._reader.silence.renewal(feed._connection.live_since)

        await connect()
        trade("BTCUSDT", 299.0)
        assert feed.stats().stale == ()
        trade("BTCUSDT", 1.0)
        assert feed.stats().stale == ("SOL-USD",) and renewal() == ""
        trade("SOLUSDT", 1.0)
        assert feed.stats().stale == ()
        world.now += 5000.0  # all are silent: that is not one symbol's
        assert feed.stats().stale == () and renewal() == ""
        trade("BTCUSDT", 1.0)
        assert renewal() == "nothing of SOL-USD"
        await connect()
        trade("BTCUSDT", 1800.0)
        assert feed.stats().stale == ("SOL-USD",) and renewal() == ""  # twice as long now
        trade("BTCUSDT", 1800.0)
        assert renewal() == "nothing of SOL-USD"
        await connect()
        trade("SOLUSDT", 1000.0)
        trade("BTCUSDT", 1000.0)
        assert renewal() == "" and feed._reader.silence.patience == 1800.0  # it helped
        assert len(sink.told["binance"]) == 8 and sink.letters == []

    run_task(main())


def test_connect_a_connection_is_left_for_a_silent_symbols_sake() -> None:
    """One symbol is refused: nothing of it ever comes. Bitstamp is asked for each by a message."""

    async def main() -> None:
        options: dict[str, Any] = {"base": 0.01, "cap": 0.02, "renew_after": 0.05, "stale_after": 0.01}
        async with MarketConnectWorld(them, ("bitstamp", "okx"), symbols=["BTC-USD", "ETH-USD"], **options) as world:
            feed = world.feeds["lacking"] = world.feed("bitstamp", symbols=["BTC-USD", "XRP-USD"])
            world.runs.append(asyncio.create_task(feed.run()))
            ends = set[str]()

            def renewed() -> bool:
                them.emit(1)
                ends.add(feed.stats().last_error)
                return feed.stats().connects >= 3 and feed.stats().state == "live"

            await until_async(renewed)
            assert "nothing of XRP-USD" in ends and feed.stats().breaker == "closed"
            assert [world.feeds[name].stats().connects for name in ("bitstamp", "okx")] == [1, 1]

    with Exchanges(symbols=("BTC-USD", "ETH-USD"), heartbeat=0) as them:
        run_task(main())


# -------------------------------------------------------------------------------------------------------- the programs


def test_flow_thousands_of_rows_do_not_hold_the_loop() -> None:
    analytics = Analytics()
    market_stats_take(analytics, market_kafka_trade(1))
    row = analytics.due(everything=True)[0]
    told: list[int] = []
    shown: list[AnalyticsRow] = []

    async def main() -> None:
        program = SimpleNamespace(
            board=SimpleNamespace(take=shown.extend),
            publisher=SimpleNamespace(analytics=lambda rows: told.append(len(rows))),
        )
        stats_repr = asyncio.ensure_future(market_flow.MarketProgram._tell(program, [row] * (3 * market_flow.ROWS + 1)))  # type: ignore[arg-type]
        turns = 0
        while not stats_repr.done():
            turns += 1
            await asyncio.sleep(0)
        assert told == [market_flow.ROWS] * 3 + [1] and turns >= 4 and len(shown) == sum(told)

    run_task(main())


@pytest.mark.usefixtures("restored_sigterm")
def test_pipeline_sigterm_before_and_after_the_loop_is_as_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the demo's broker would live on."""
    closed: list[str] = []

    class Demo:
        options = market_flow.MarketOptions(kafka=ABSENT)

        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Demo:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append("demo")

        async def play(self, _: object) -> None: ...

        def report(self, _: object) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return True

    class Ended:
        """A program that ends at once."""

        def __init__(self, *_: object) -> None: ...

        async def run(self) -> int:
            return 0

        def stop(self) -> None: ...

        def snapshot(self) -> Any:
            return SimpleNamespace(faults=0, stopping=False)

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(market_pipeline, "MarketDemo", Demo)
    monkeypatch.setitem(market_pipeline.COMMANDS, "run", Ended)
    monkeypatch.setattr(market_pipeline, "last_word", lambda _: "")
    assert market_pipeline.main(["--demo"]) == EXIT_INTERRUPTED and closed == ["demo"]
    monkeypatch.setattr(shell, "open_http", killed)
    assert market_pipeline.main(["--demo"]) == EXIT_INTERRUPTED and closed == ["demo"] * 2


def test_pipeline_a_publisher_is_closed_before_the_program_ends(tmp_path: Path) -> None:
    """Forced: what waits is in the spool when `run` returns, and no task is left."""

    async def main() -> None:
        urls = {"kraken": "ws://127.0.0.1:9/"}
        options = market_flow.MarketOptions(kafka=ABSENT, exchanges=("kraken",), urls=urls, workers=1)
        program = market_flow.Pipeline(dataclasses.replace(options, spool=str(tmp_path / "spool")))
        running = asyncio.create_task(program.run())
        await until_async(lambda: program.publisher.stats().state == "connecting")
        program.emit("kraken", market_kafka_trades(0, 500))
        program.stop()
        program.stop()
        assert await running == 0
        assert program.snapshot().published.spooled == 500 and program.snapshot().kafka == "closed"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_task(main())


def test_display_silent_symbols_are_shown() -> None:
    from prometheus_client import CollectorRegistry, generate_latest
    from rich.console import Console

    line = md.FeedLine("live", *(0,) * 7, None, stale=("SOL-USD", "ADA-USD"))
    counts = md.MarketCounts(feeds={"okx": line, "kraken": line._replace(stale=())})
    registry = CollectorRegistry()
    registry.register(cast("Any", Exporter(md.METRICS, lambda: counts)))
    told = generate_latest(registry)
    assert b'market_exchange_stale_symbols{exchange="okx"} 2.0' in told
    assert b'market_exchange_stale_symbols{exchange="kraken"} 0.0' in told
    assert md.health(counts)[1]["feeds"]["okx"]["stale"] == ("SOL-USD", "ADA-USD")
    console = Console(file=io.StringIO(), width=150, record=True)
    console.print(md.picture(counts, 0.0, 0.0))
    assert console.export_text().count("silent: SOL-USD ADA-USD") == 1


def test_pipeline_windows_that_are_no_numbers_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        market_pipeline.parse_arguments(["--demo", "--windows", "10,x"], {})
    told = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and told.endswith(
        "--windows: whole seconds with commas are needed, not '10,x' (--help tells more)"
    )
