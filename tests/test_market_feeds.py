"""market/feeds.py: frames of each exchange."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import zlib
from typing import Any

import pytest

from market.adapter import Adapter
from market.feeds import ADAPTERS
from market.trade import (
    AHEAD_NS,
    EARLIEST_NS,
    UNPACKED_LIMIT,
    BadFrame,
    Parsed,
    Trade,
    decimal,
    identity,
    milliseconds,
    parse_iso_time,
    sequence_number,
    short,
)
from tests.helpers.market import (
    BITFINEX_ACK,
    CASES,
    NOW,
    Case,
    connected,
    market_feeds_ns,
    merged,
)

CRYPTO = tuple(name for name, adapter in ADAPTERS.items() if adapter.key_env is None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.exchange}-{case.kind}")
@pytest.mark.parametrize("as_bytes", [False, True])
def test_documented_frames(case: Case, as_bytes: bool) -> None:
    adapter = ADAPTERS[case.exchange].fresh()
    adapter.subscribe(sorted({row[0] for row in case.trades}) or [f"{'AAPL' if adapter.key_env else 'BTC'}-USD"])
    for frame in case.before:
        adapter.parse(frame, NOW)
    parsed = adapter.parse(case.frame.encode() if as_bytes else case.frame, NOW)
    expected = [
        Trade._make((case.exchange, *row[:3], float(row[1]), float(row[2]), *row[3:6], NOW, *row[6:]))
        for row in case.trades
    ]
    assert parsed == Parsed(expected, case.kind, case.note, case.sequence, case.reconnect)  # type: ignore[arg-type]
    if not as_bytes and case.frame[0] in "[{":
        assert adapter.parse(gzip.compress(case.frame.encode()), NOW) == parsed


def test_every_kind_is_covered() -> None:
    kinds = {name: {case.kind for case in CASES if case.exchange == name} for name in ADAPTERS}
    for name, adapter in ADAPTERS.items():
        wanted = {"trades", "error"} | (set() if name in ("gemini", "finnhub") else {"ack"})  # these two send none
        wanted |= (
            {"heartbeat"} if adapter.ping_every or name in ("coinbase", "bitfinex", "gemini", "finnhub") else set()
        )
        assert wanted <= kinds[name], name


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("binance", "BTCUSDT"),
        ("coinbase", "BTC-USD"),
        ("kraken", "BTC/USD"),
        ("bitstamp", "btcusd"),
        ("okx", "BTC-USDT"),
        ("bybit", "BTCUSDT"),
        ("bitfinex", "tBTCUSD"),
        ("gemini", "BTCUSD"),
        ("gateio", "BTC_USDT"),
        ("bitget", "BTCUSDT"),
        ("alpaca", "BTC"),
        ("finnhub", "BTC"),
    ],
)
def test_symbols(name: str, native: str) -> None:
    adapter = merged(name)
    assert adapter.native("BTC-USD") == native
    with pytest.raises(BadFrame, match="not asked for"):
        adapter.symbol(native)
    others = (
        ("ETH-USD", "DOGE-USD", "1INCH-USD") if adapter.key_env else ("ETH-BTC", "DOGE-USDT", "SOL-EUR", "BTC-USDC")
    )
    others = (*others, "ETH-USDT" if adapter.dollar == "USDT" else "ETH-USD")
    adapter.subscribe(others)
    for symbol in others:
        assert adapter.symbol(adapter.native(symbol)) == symbol
    for wrong in (
        "BTC",
        "btc-usd",
        "BTC/USD",
        "",
        "-USD",
        "BTC-",
        "BTC-USD-X",
        "BTC USD",
        'B"C-USD',
        "B" * 21 + "-USD",
    ):
        with pytest.raises(ValueError, match="not a symbol"):
            adapter.native(wrong)
    with pytest.raises(ValueError, match="no symbols"):
        adapter.subscribe([])
    adapter.subscribe(["BTC-USD", "ETH-USD"])
    assert adapter.symbol(native) == "BTC-USD"  # as it was asked for
    assert adapter.symbol(adapter.native("ETH-USD")) == "ETH-USD"
    with pytest.raises(BadFrame, match="not asked for"):
        adapter.symbol(adapter.native("LTC-USD"))
    adapter.subscribe(["LTC-USD"])
    with pytest.raises(BadFrame, match="not asked for"):
        adapter.symbol(native)


def test_an_exact_symbol_is_not_stood_in_for() -> None:
    for symbols in (["BTC-USD", "BTC-USDT"], ["BTC-USDT", "BTC-USD"]):
        adapter = merged("binance")
        (message,) = adapter.subscribe(symbols)
        assert json.loads(message)["params"] == ["btcusdt@trade"]
        assert adapter.symbol("BTCUSDT") == "BTC-USDT"


def test_what_is_sent() -> None:
    symbols = ["BTC-USD", "DOGE-USDT"]
    sent = {}
    for name, adapter in ADAPTERS.items():
        other = type(adapter)(clock=lambda: 1611541000.7)
        asked = symbols if adapter.key_env is None else ["AAPL-USD"]
        sent[name] = [json.loads(message) for message in other.subscribe(asked)], other.ping()
    assert sent == {
        "binance": ([{"method": "SUBSCRIBE", "params": ["btcusdt@trade", "dogeusdt@trade"], "id": 1}], None),
        "coinbase": (
            [{"type": "subscribe", "product_ids": symbols, "channels": ["matches", "heartbeat"]}],
            None,
        ),
        "kraken": (
            [
                {
                    "method": "subscribe",
                    "params": {"channel": "trade", "symbol": ["BTC/USD", "DOGE/USDT"], "snapshot": True},
                }
            ],
            None,
        ),
        "bitstamp": (
            [
                {"event": "bts:subscribe", "data": {"channel": f"live_trades_{native}"}}
                for native in ("btcusd", "dogeusdt")
            ],
            '{"event":"bts:heartbeat"}',
        ),
        "okx": (
            [
                {
                    "op": "subscribe",
                    "args": [{"channel": "trades", "instId": name} for name in ("BTC-USDT", "DOGE-USDT")],
                }
            ],
            "ping",
        ),
        "bybit": (
            [{"op": "subscribe", "args": ["publicTrade.BTCUSDT", "publicTrade.DOGEUSDT"]}],
            '{"op":"ping"}',
        ),
        "bitfinex": (
            [
                {"event": "conf", "flags": 65536},
                {"event": "subscribe", "channel": "trades", "symbol": "tBTCUSD"},
                {"event": "subscribe", "channel": "trades", "symbol": "tDOGE:UST"},
            ],
            None,
        ),
        "gemini": (
            [{"type": "subscribe", "subscriptions": [{"name": "l2", "symbols": ["BTCUSD", "DOGEUSDT"]}]}],
            None,
        ),
        "gateio": (
            [
                {
                    "time": 1611541000,
                    "channel": "spot.trades",
                    "event": "subscribe",
                    "payload": ["BTC_USDT", "DOGE_USDT"],
                }
            ],
            '{"time":1611541000,"channel":"spot.ping"}',
        ),
        "bitget": (
            [
                {
                    "op": "subscribe",
                    "args": [
                        {"instType": "SPOT", "channel": "trade", "instId": name} for name in ("BTCUSDT", "DOGEUSDT")
                    ],
                }
            ],
            "ping",
        ),
        "alpaca": (
            [{"action": "auth", "key": "", "secret": ""}, {"action": "subscribe", "trades": ["AAPL"]}],
            None,
        ),
        "finnhub": ([{"type": "subscribe", "symbol": "AAPL"}], None),
    }
    assert all((adapter.ping() is None) == (adapter.ping_every is None) for adapter in ADAPTERS.values())
    assert all(adapter.silent_after > (adapter.ping_every or 0) for adapter in ADAPTERS.values())
    many = [f"C{number}-USD" for number in range(205)]
    assert [len(json.loads(message)["params"]) for message in ADAPTERS["binance"].fresh().subscribe(many)] == [
        100,
        100,
        5,
    ]
    assert [len(json.loads(message)["args"]) for message in ADAPTERS["bybit"].fresh().subscribe(many[:21])] == [
        10,
        10,
        1,
    ]


def test_keys() -> None:
    with pytest.raises(ValueError, match="APCA_API_KEY_ID"):
        ADAPTERS["alpaca"].with_keys({})
    with pytest.raises(ValueError, match="APCA_API_SECRET_KEY"):
        ADAPTERS["alpaca"].with_keys({"APCA_API_KEY_ID": "k"})
    alpaca = ADAPTERS["alpaca"].with_keys({"APCA_API_KEY_ID": "k", "APCA_API_SECRET_KEY": "s"}).fresh()
    assert json.loads(alpaca.subscribe(["AAPL-USD"])[0]) == {"action": "auth", "key": "k", "secret": "s"}
    with pytest.raises(ValueError, match="FINNHUB_API_KEY"):
        ADAPTERS["finnhub"].with_keys({"FINNHUB_API_KEY": ""})
    finnhub = ADAPTERS["finnhub"].with_keys({"FINNHUB_API_KEY": "a b&c"}).fresh()
    assert finnhub.connect_url() == "wss://ws.finnhub.io?token=a%20b%26c"
    assert finnhub.connect_url("ws://127.0.0.1:1/x") == "ws://127.0.0.1:1/x?token=a%20b%26c"
    assert "a b" not in repr(finnhub) and "'s'" not in repr(alpaca)
    for name in CRYPTO:
        adapter = ADAPTERS[name].with_keys({})
        assert adapter is not ADAPTERS[name]
        assert adapter.connect_url() == adapter.url
        assert adapter.connect_url("ws://127.0.0.1:1/") == "ws://127.0.0.1:1/"


NO_NUMBERS: tuple[Any, ...] = (
    *("", ".", "e5", "-1", " 1", "1 ", "1_000", "1,5", "nan", "inf", "0x10", "１", "1e", "1\n"),
    *(-1.5, -1, True, None, [], {}, math.inf, math.nan, 10**18, 1e19, "1e30", "1e-40", 5e-324),
    *("1" * 19, "0." + "1" * 37, "1e999", "9" * 10_000),
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("42219.90", "42219.90"),
        (42219.9, "42219.9"),
        (7245, "7245"),
        (1e-07, "0.0000001"),
        (1.5e-07, "0.00000015"),
        (1e17, "100000000000000000"),
        (1e16, "10000000000000000"),
        ("1e-8", "0.00000001"),
        ("1.25E+3", "1250"),
        ("12.5e-1", "1.25"),
        ("+3", "3"),
        (".5", "0.5"),
        ("5.", "5"),
        ("0", "0"),
        ("1.23e1", "12.3"),
        *((value, None) for value in NO_NUMBERS),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_decimals(value: object, text: str | None) -> None:
    if text is None:
        with pytest.raises(BadFrame):
            decimal(value)
    else:
        assert decimal(value) == text


def test_decimals_are_the_doubles_that_were_sent() -> None:
    rng = random.Random(8)
    for _ in range(2000):
        number = 10 ** rng.uniform(-9, 12) * rng.random()
        assert float(decimal(number)) == number
        assert "e" not in decimal(number)


def test_times() -> None:
    assert parse_iso_time("2014-11-07T08:19:27.028459Z") == market_feeds_ns("2014-11-07T08:19:27.028459Z")
    assert parse_iso_time("2021-02-22T15:51:44.208123456+00:00") == 1614009104208123456
    assert parse_iso_time("2021-02-22T15:51:44Z") == 1614009104000000000
    assert parse_iso_time("2021-02-22T15:51:44.5Z") == 1614009104500000000
    assert milliseconds(1606292218213) == milliseconds("1606292218213") == 1606292218213000000
    assert milliseconds("1606292218213.4578") == 1606292218213457800
    assert milliseconds(1606292218213.5) == 1606292218213500000
    for wrong in (
        "2021-02-22 15:51:44Z",
        "2021-02-22T15:51:44",
        "2021-13-22T15:51:44Z",
        "2021-02-22T15:51:44+01:00",
        5,
        None,
        "",
    ):
        with pytest.raises(ValueError):
            parse_iso_time(wrong)
    no_times: tuple[Any, ...] = ("", "x", "-5", "1e12", " 1", None, True, [], 1e300, math.nan)
    for bad in no_times:
        with pytest.raises(BadFrame):
            milliseconds(bad)


def market_feeds_trade(adapter: Adapter, **changed: object) -> Parsed:
    item = {"e": "trade", "s": "BTCUSDT", "t": 1, "p": "1", "q": "1", "T": NOW // 10**6, "m": True}
    return adapter.parse(json.dumps(item | changed), NOW)


def test_implausible_trades_are_bad_frames() -> None:
    adapter = ADAPTERS["binance"].fresh()
    adapter.subscribe(["BTC-USD"])
    borders = (EARLIEST_NS // 10**6, (NOW + AHEAD_NS) // 10**6)
    for when in borders:
        assert market_feeds_trade(adapter, T=when).trades[0].ts_event == when * 10**6
    for when in (borders[0] - 1, borders[1] + 1, 0, -1, 10**30, NOW):
        with pytest.raises(BadFrame, match=r"plausible time|time in milliseconds"):
            market_feeds_trade(adapter, T=when)
    for field in ("p", "q"):
        assert (
            market_feeds_trade(adapter, **{field: 2.5}).trades[0]
            == market_feeds_trade(adapter, **{field: "2.5"}).trades[0]
        )
        no_amounts: tuple[Any, ...] = (0, "0", "0.000", -1, "-1", None, "", "abc", [], {}, True, 1e300, "1e300")
        for wrong in no_amounts:
            with pytest.raises(BadFrame):
                market_feeds_trade(adapter, **{field: wrong})
    for field, wrong in (
        ("m", None),
        ("m", 1),
        ("t", -1),
        ("t", 1.5),
        ("t", "x"),
        ("s", 5),
        ("s", ["BTC"]),
        ("s", "X"),
    ):
        with pytest.raises(BadFrame):
            market_feeds_trade(adapter, **{field: wrong})
    for frame in (
        "",
        "{",
        "null",
        "1",
        '"trade"',
        "[]",
        "{}",
        '{"e":"kline"}',
        b"\xff\xfe",
        "pong",
        "\ud800",
        None,
        5,
        [b"x"],
    ):
        with pytest.raises(BadFrame):
            adapter.parse(frame, NOW)  # type: ignore[arg-type]
    with pytest.raises(BadFrame, match="unknown message: kline"):
        adapter.parse('{"e":"kline"}', NOW)


# What of a wire makes a frame of three trades.
THREE = {
    **dict.fromkeys(("kraken", "okx", "bybit", "bitget"), "trades"),
    **dict.fromkeys(("bitfinex", "gemini"), "snapshot"),
}


@pytest.mark.parametrize("wound", ["null", '"wound"', "-5.5", "[[]]", "-0.0", '{"a": 1}', "true"])
@pytest.mark.parametrize("name", [*THREE, "alpaca", "finnhub"])
def test_one_bad_trade_loses_that_trade_only(name: str, wound: str) -> None:
    if name in THREE:
        wire, adapter, _ = connected(name, ["BTC-USD"])
        native = adapter.native("BTC-USD")
        (frame,) = getattr(wire, THREE[name])(native, [(f"{n}.25", "1", "buy", n, NOW) for n in (101, 102, 103)])
    else:
        adapter = merged(name)
        adapter.subscribe(["AAPL-USD"])
        item = {"alpaca": '{"T":"t","i":%d,"S":"AAPL","x":"V","p":%d.25,"s":1,"t":"2021-02-22T15:51:44Z"}'}.get(
            name, '{"s":"AAPL","t":1575526690%d,"p":%d.25,"v":1}'
        )
        items = ",".join(item % (n, n) for n in (101, 102, 103))
        frame = f"[{items}]" if name == "alpaca" else f'{{"type":"trade","data":[{items}]}}'
    good = adapter.parse(frame, NOW)
    assert [trade.price for trade in good.trades] == ["101.25", "102.25", "103.25"] and good.bad == ()
    broken = re.sub(r'"?102\.25"?', wound, frame)
    parsed = adapter.parse(broken, NOW)
    assert parsed._replace(bad=()) == good._replace(trades=[good.trades[0], good.trades[2]])
    ((reason, alone),) = parsed.bad
    assert reason and json.loads(alone) != json.loads(broken) and b"101.25" not in alone
    with pytest.raises(BadFrame):
        adapter.parse(alone, NOW)
    mended = alone.replace(json.dumps(json.loads(wound)).encode(), b"102.25", 1)  # what a mended parser would see
    assert adapter.parse(mended, NOW).trades == [good.trades[1]]


def test_what_stands_among_trades_and_is_none_is_bad_alone() -> None:
    adapter = merged("alpaca")
    adapter.subscribe(["AAPL-USD"])
    trade = {"T": "t", "i": 1, "S": "AAPL", "x": "V", "p": 1, "s": 1, "t": "2021-02-22T15:51:44Z"}
    strange = [trade, None, {"T": "new"}, {"T": ["t"]}, {"S": "AAPL"}, {"T": "c"}, {**trade, "S": "MSFT"}]
    parsed = adapter.parse(json.dumps(strange), NOW)
    assert len(parsed.trades) == 1
    assert [json.loads(alone)[0] for _, alone in parsed.bad] == [each for each in strange[1:] if each != {"T": "c"}]


@pytest.mark.parametrize("name", CRYPTO)
def test_a_symbol_for_each_quote_currency(name: str) -> None:
    """An exchange without books in USD is asked for those in USDT, and says so."""
    apart, dollar = ADAPTERS[name].fresh(), ADAPTERS[name].dollar
    for symbols in (["BTC-USD"], ["BTC-USD", "BTC-USDT"], ["BTC-USDT", "BTC-USD"]):
        messages = apart.subscribe(symbols)
        assert apart.symbol(apart.native("BTC-USD")) == f"BTC-{dollar}"
        assert set(apart.told(symbols).values()) == {*symbols} - ({"BTC-USD"} if dollar == "USDT" else set()) | {
            f"BTC-{dollar}"
        }
        assert [*map(len, (messages, apart.told(symbols)))] != [0, 0]
    assert merged(name).told(["BTC-USD"]) == {apart.native("BTC-USD"): "BTC-USD"}
    assert apart.fresh().told(["ETH-USD"]) == {apart.native("ETH-USD"): f"ETH-{dollar}"}
    assert ADAPTERS[name].with_keys({}, merge_quotes=True).fresh().told(["ETH-USD"]).popitem()[1] == "ETH-USD"


def test_gzip_is_bounded() -> None:
    adapter = ADAPTERS["gateio"].fresh()
    frame = b'{"time":1,"channel":"spot.pong","event":"","error":null,"result":null}'
    assert adapter.parse(gzip.compress(frame), NOW).kind == "heartbeat"
    for wrong in (
        gzip.compress(frame)[:-5],
        gzip.compress(frame) + b"x",
        gzip.compress(frame + b" " * UNPACKED_LIMIT),
        b"\x1f\x8b",
        b"\x1f\x8b" + bytes(100),
        zlib.compress(frame),
    ):
        with pytest.raises(BadFrame):
            adapter.parse(wrong, NOW)


def test_bitfinex_channels_are_of_one_connection() -> None:
    adapter = ADAPTERS["bitfinex"].fresh()
    frame = '[17470,"te",[1,1574694478809,-0.005,7245]]'
    with pytest.raises(BadFrame, match="channel"):
        adapter.parse(frame, NOW)
    adapter.subscribe(["BTC-USD"])
    adapter.parse(BITFINEX_ACK, NOW)
    assert adapter.parse(frame, NOW).trades[0].symbol == "BTC-USD"
    with pytest.raises(BadFrame, match="channel"):
        adapter.fresh().parse(frame, NOW)
    adapter.subscribe(["BTC-USD"])
    with pytest.raises(BadFrame, match="channel"):
        adapter.parse(frame, NOW)


def test_snapshots_come_oldest_first_where_times_are_equal() -> None:
    for name in ("kraken", "bitfinex", "gemini"):
        wire, adapter, _ = connected(name, ["BTC-USD"])
        ticks = [("1", "1", "buy", number, NOW) for number in range(1, 6)]
        (frame,) = wire.snapshot(adapter.native("BTC-USD"), ticks)
        assert [trade.trade_id for trade in adapter.parse(frame, NOW).trades] == ["1", "2", "3", "4", "5"]


def test_the_state_of_a_connection_goes_with_a_dead_letter() -> None:
    for name in ADAPTERS:
        adapter = merged(name)
        adapter.subscribe(["BTC-USD"])
        native, context = adapter.native("BTC-USD"), adapter.context()
        if name == "bitfinex":
            adapter.parse(BITFINEX_ACK, NOW)
            frame, context = '[17470,"te",[1,1574694478809,-0.005,7245]]', adapter.context()
            later = ADAPTERS[name].within(context)
            assert later.parse(frame, NOW) == adapter.parse(frame, NOW)
        later = ADAPTERS[name].within(context.encode())
        assert later is not ADAPTERS[name]
        assert later.symbol(native) == "BTC-USD"
        assert later.context() == context
        for wrong in ("", "5", "{}", "[]", '{"asked":5}', '{"asked":{"a":5}}'):
            with pytest.raises(ValueError):
                ADAPTERS[name].within(wrong)
    for wrong in ('{"asked":{}}', '{"asked":{},"channels":{"x":"BTC-USD"}}', '{"asked":{},"channels":{"1":2}}'):
        with pytest.raises(ValueError):
            ADAPTERS["bitfinex"].within(wrong)


def test_types_are_not_mixed_up() -> None:
    assert (identity(5), identity("a-5"), sequence_number("7"), sequence_number(2**63 - 1)) == (
        "5",
        "a-5",
        7,
        2**63 - 1,
    )
    wrong: tuple[Any, ...] = (True, False, -1, 1.0, None, "", "a b", "x" * 65, "é", [], {})
    for value in wrong:
        with pytest.raises(BadFrame):
            identity(value)
    for value in (*wrong, 2**63, "1" * 19, "-1", "x"):
        with pytest.raises(BadFrame):
            sequence_number(value)
    frame = next(case.frame for case in CASES if case.exchange == "bitstamp" and case.trades)
    adapter = ADAPTERS["bitstamp"].fresh()
    adapter.subscribe(["BTC-USD"])
    assert adapter.parse(frame, NOW).trades[0].side == "buy"
    for kind in ("false", "0.0", '"0"', "2", "-1", "null", "[]"):
        with pytest.raises(BadFrame):
            adapter.parse(frame.replace('"type":0', f'"type":{kind}'), NOW)
    assert (
        short("\x1b]0;x\x07\x9b2J\u202eb\r\n") == "\ufffd]0;x\ufffd\ufffd2J\ufffdb\ufffd\ufffd"
    )  # nothing steers a terminal
    assert short("a\ud800" + "b" * 300) == "a\\ud800" + "b" * 198


def test_many_bad_trades_are_told_without_a_copy_of_the_frame_for_each() -> None:
    adapter = merged("finnhub")
    adapter.subscribe(["AAPL-USD"])
    good = {"s": "AAPL", "t": NOW // 10**6, "p": 1, "v": 1}
    parsed = adapter.parse(json.dumps({"type": "trade", "data": [good, *range(1000)], "x": "x" * 9000}), NOW)
    assert len(parsed.trades) == 1
    told = [json.loads(alone)["data"] for _, alone in parsed.bad]
    assert told == [*([n] for n in range(10)), [*range(10, 1000)]]
