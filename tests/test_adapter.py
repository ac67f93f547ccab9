"""market/adapter.py: wires, gaps in numbers, frames with an error in them."""

from __future__ import annotations

import gzip
import itertools
import random
import re
from collections import Counter

import pytest

from market.adapter import SequenceCheck
from market.feeds import ADAPTERS
from market.trade import AHEAD_NS, EARLIEST_NS, BadFrame, Parsed, Trade
from sandbox.exchanges import WIRES
from tests.helpers.market import BITFINEX_ACK, CASES, NOW, connected

STEP = {"binance": 10**6, "coinbase": 10**3, "kraken": 10**3, "bitstamp": 10**3, "gateio": 100}  # else ms


@pytest.mark.parametrize("name", list(WIRES))
def test_wires_and_adapters_agree(name: str) -> None:
    symbols = ["BTC-USD", "ETH-USD", "DOGE-USDT"]
    wire, adapter, begun = connected(name, symbols)
    assert {parsed.kind for parsed in begun} <= {"ack", "status", "ignored"}
    assert {parsed.kind for parsed in begun} & {"ack", "ignored"}
    rng, step, check = random.Random(name), STEP.get(name, 10**6), SequenceCheck()
    number, when = 1000, NOW - 10**12
    for symbol, size in itertools.product(symbols, (1, 2, 7, 50)):
        native = adapter.native(symbol)
        assert wire.pair(native)[0] == symbol.split("-")[0]
        numbers, number = range(number + 1, number + size + 1), number + size
        ticks = []
        for each in numbers:
            when += rng.randrange(10**8)
            price, amount = f"{rng.uniform(0.001, 1e5):.5f}1", f"{rng.uniform(1e-8, 1e3):.7f}1"
            ticks.append((price, amount, rng.choice(("buy", "sell")), each, when))
        frames = wire.trades(native, ticks)
        assert len(frames) == (1 if wire.per_frame > 1 else 2 * size if name == "bitfinex" else size)
        got = [trade for frame in frames for trade in check.check(adapter.parse(frame, NOW))]
        expected = [
            (symbol, side, wire.trade_id(each), at // step * step, price, amount)
            for price, amount, side, each, at in ticks
        ]
        assert [(t.symbol, t.side, t.trade_id, t.ts_event, t.price, t.size) for t in got] == expected
        assert all(t.price_value == float(t.price) and t.size_value == float(t.size) for t in got)
        assert all(t.exchange == name and t.ts_recv == NOW for t in got)
        assert all(t.sequence in (None, each) for t, each in zip(got, numbers, strict=True))
        again = [trade for frame in wire.snapshot(native, ticks) for trade in adapter.parse(frame, NOW).trades]
        assert all(t.flags == "snapshot" for t in again)
        assert [t._replace(flags="") for t in again] == [t._replace(flags="") for t in got[len(got) - len(again) :]]
    gaps = 2 if name in ("binance", "coinbase", "kraken") else 1 if name == "bitfinex" else 0
    counted = check.stats()
    assert (counted.duplicates, counted.disorder, counted.restarts) == (0, 0, 0)
    assert counted.trades == number - 1000
    assert counted.gaps == (11 if gaps == 1 else 0)  # Bitfinex: each snapshot's frame number was not told to the check
    for frames, kind in ((wire.heartbeat(), "heartbeat"), (wire.error("no"), "error"), (wire.maintenance(), "status")):
        for frame in frames:
            parsed = adapter.parse(frame, NOW)
            assert parsed.kind == kind
            assert kind != "error" or "no" in parsed.note
    ping = adapter.ping()
    if ping is not None:
        assert [adapter.parse(frame, NOW).kind for frame in wire.acks(ping)] == ["heartbeat"]


@pytest.mark.parametrize("name", list(WIRES))
def test_wires_answer_rubbish(name: str) -> None:
    wire, adapter = WIRES[name](), ADAPTERS[name].fresh()
    for message in (
        "",
        "x",
        "{}",
        "[]",
        "null",
        "5",
        b"\xff",
        '{"op":"subscribe"}',
        '{"event":"conf"}',
        '{"method":5}',
        '"x"',
    ):
        assert wire.symbols_of(message) == []
        assert [adapter.parse(frame, NOW).kind for frame in wire.acks(message)] == ["error"]


# ------------------------------------------------------------------------------------------------------- SequenceCheck


def sample(number: int, *, symbol: str = "BTC-USD", sequence: bool = True, when: int = 0, flags: str = "") -> Trade:
    at = when or number
    return Trade("x", symbol, "1", "1", 1.0, 1.0, "buy", str(number), at, 10**6, number if sequence else None, flags)


@pytest.mark.parametrize(
    ("numbers", "flags", "missed"),
    [
        ([5, 6, 7], ["", "", ""], 0),
        ([5, 7, 8], ["", "gap", ""], 1),
        ([5, 9, 20], ["", "gap", "gap"], 13),
        ([5, 6, 6, 7], ["", "", "duplicate", ""], 0),
        ([5, 7, 6, 8], ["", "gap", "disorder", ""], 1),
        ([5, 7, 7, 6, 6, 8], ["", "gap", "duplicate", "disorder", "duplicate", ""], 1),
        ([5, 4, 6], ["", "disorder", ""], 0),
    ],
)
def test_sequences(numbers: list[int], flags: list[str], missed: int) -> None:
    check = SequenceCheck()
    given = [sample(number) for number in numbers]
    assert [check.label(trade) for trade in given] == [
        trade._replace(flags=flag) for trade, flag in zip(given, flags, strict=True)
    ]
    counts = Counter(flags)
    assert check.stats() == (len(numbers), counts["gap"], missed, counts["duplicate"], counts["disorder"], 0)
    assert f"missed={missed}" in repr(check)


def test_sequences_are_per_symbol_and_flags_are_joined() -> None:
    check = SequenceCheck()
    for number in (1, 2):
        for symbol in ("BTC-USD", "ETH-USD"):
            assert check.label(sample(number, symbol=symbol)).flags == ""
    assert check.label(sample(9, flags="snapshot")).flags == "snapshot,gap"
    assert check.label(sample(9, flags="snapshot")).flags == "snapshot,duplicate"
    assert check.stats() == (6, 1, 6, 1, 0, 0)


def test_without_sequences_time_tells_disorder() -> None:
    check = SequenceCheck()
    given = [(1, 100), (2, 100), (3, 99), (4, 100), (2, 100), (5, 101)]
    found = [check.label(sample(number, sequence=False, when=when)).flags for number, when in given]
    assert found == ["", "", "disorder", "", "duplicate", ""]
    nameless = sample(1, sequence=False, when=200)._replace(trade_id="")
    assert [check.label(nameless).flags for _ in range(2)] == ["", ""]  # no id: nothing can be said


def test_a_sequence_may_begin_again() -> None:
    check = SequenceCheck()
    check.label(sample(2**62))
    flags = [check.label(sample(number)).flags for number in range(1, 31)]
    assert flags == ["disorder"] * SequenceCheck.RESTARTED + [""] * (30 - SequenceCheck.RESTARTED)
    assert check.stats().restarts == 1


def test_late_ones_do_not_begin_a_sequence_again() -> None:
    check = SequenceCheck()
    for number in range(0, 200, 2):
        check.label(sample(number))
    assert {check.label(sample(number)).flags for number in range(1, 199, 2)} == {"disorder"}
    assert check.stats()[1:] == (99, 99, 0, 99, 0)
    assert check.label(sample(199)).flags == ""


def test_ids_are_forgotten_in_order() -> None:
    check = SequenceCheck(remembered=100)
    for number in range(10_000):
        check.label(sample(number))
    (seen,) = check._seen.values()
    assert len(seen.ids) == len(seen.order) == 100
    assert check.label(sample(9_900)).flags == "duplicate"
    assert check.label(sample(9_899)).flags == "disorder"  # too long ago to know


def test_frame_numbers() -> None:
    check = SequenceCheck()

    def frame(sequence: int | None, *numbers: int) -> list[str]:
        trades = [sample(number, sequence=False) for number in numbers]
        return [trade.flags for trade in check.check(Parsed(trades, "trades", sequence=sequence))]

    assert [frame(1), frame(2, 10), frame(3), frame(4, 11)] == [[], [""], [], [""]]
    assert frame(7) == []  # 5 and 6 are missing, and the next trade says so, once
    assert frame(8, 12, 13) == ["gap", ""]
    assert check.stats()[1:] == (1, 2, 0, 0, 0)
    assert frame(7, 12) == ["duplicate"]  # the same frame again
    assert frame(9, 14) == [""]
    assert frame(20) == []
    check.reconnected()
    assert frame(1, 15) == [""]
    assert frame(2, 15) == ["duplicate"]  # ids are remembered over connections
    assert frame(4, 9) == ["gap,disorder"]
    assert check.stats()[1:] == (3, 2 + 10 + 1, 2, 1, 0)


def test_sequence_counts_are_exact_on_a_lossy_feed() -> None:
    rng = random.Random(80)
    for _ in range(30):
        check, expected, present = SequenceCheck(), Counter[str](), [0]
        check.label(sample(0))
        for number in range(1, 400):
            chance = rng.random()
            if chance < 0.1:
                expected["missed"] += 1
                continue
            check.label(sample(number))
            expected["gap"] += number != present[-1] + 1
            present.append(number)
            if chance > 0.9:
                expected["duplicate"] += 1
                assert check.label(sample(rng.choice(present))).flags == "duplicate"
        missed = present[-1] - (len(present) - 1)
        assert check.stats() == (
            *(len(present) + expected["duplicate"], expected["gap"], missed),
            *(expected["duplicate"], 0, 0),
        )


# ---------------------------------------------------------------------------------------------- 100,000 mutated frames

VALUES = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "-0.5",
        "1.5",
        "1e999",
        "-1e999",
        "1e-999",
        "NaN",
        "Infinity",
        "1e300",
        "5e-324",
    ),
    *(
        "99999999999999999999999",
        "18446744073709551616",
        "-9223372036854775809",
        '"1"',
        '"0"',
        '"-1"',
        '"nan"',
        '"inf"',
    ),
    *(
        '"1e5"',
        '"1e-7"',
        '"1e999"',
        '""',
        '" "',
        '"x"',
        '"\\ud800"',
        '"\\u0000"',
        '"１２"',
        '"1_0"',
        '"1,5"',
        '"0x1"',
        "[]",
    ),
    *("{}", "[null]", '{"a":1}', "[[1,2],[3]]", "[" * 1200 + "]" * 1200, "[" * 90 + "]" * 90, '"' + "9" * 5000 + '"'),
    *(
        '"buy"',
        '"sell"',
        '"BTCUSDT"',
        '"trade"',
        '"2021-02-22T15:51:44Z"',
        '"9999-99-99T99:99:99Z"',
        "1606292218213",
        '"te"',
    ),
)


TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null')


DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?")


def mutated(rng: random.Random, frame: str, spans: list[tuple[int, int]]) -> str | bytes:
    """A frame with one to three wounds: of its bytes, of a value, of a key, of its structure."""
    way = rng.random()
    if way < 0.35 or not spans:
        data = bytearray(frame.encode())
        for _ in range(rng.randrange(1, 4)):
            at, what = rng.randrange(len(data) + 1), rng.randrange(6)
            if what == 0:
                del data[at:]
            elif what == 1:
                del data[at : at + rng.randrange(1, 20)]
            elif what == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 5))
            elif what == 3:
                data[at : at + 1] = rng.choice((b"0", b"9", b'"', b"[", b"}", b",", b":", b"-", b"e", b"\x00", b"\xff"))
            elif what == 4:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
            else:
                data[at : at + 1] = bytes((rng.randrange(256),))
        return bytes(data)
    if way < 0.97:
        for _ in range(rng.choice((1, 1, 1, 2))):
            begin, end = spans[rng.randrange(len(spans))]
            if way < 0.8:
                new = VALUES[rng.randrange(len(VALUES))]
            elif way < 0.85:
                new = f"[{frame[begin:end]}]"
            elif way < 0.9:
                new = f'{{"x":{frame[begin:end]}}}'
            elif way < 0.95:
                new = (
                    frame[begin:end][1:-1] if frame[begin] == '"' else f'"{frame[begin:end]}"'
                )  # numbers as text, and back
            else:
                new = f"-{frame[begin:end]}"
            frame = frame[:begin] + new + frame[end:]
            spans = [span for span in spans if span[1] <= begin]
            if not spans:
                break
        return frame
    packed = bytearray(gzip.compress(frame.encode(), 1))
    if way < 0.99:
        packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
    return bytes(packed)


def test_feeds_100_000_mutated_frames() -> None:
    rng, outcomes = random.Random(8_8), {name: Counter[str]() for name in ADAPTERS}
    each = 100_000 // len(ADAPTERS) + 1
    for name, adapter in ADAPTERS.items():
        cases = [case for case in CASES if case.exchange == name]
        frames = [case.frame for case in cases for _ in range(3 if case.kind == "trades" else 1)]
        spans = [[match.span() for match in TOKEN.finditer(frame)] for frame in frames]
        here = outcomes[name]
        asked = (
            ["AAPL-USD", "BRK.B-USD"] if adapter.key_env else ["BTC-USD", "MATIC-USD", "BNB-BTC", "GT-USD", "ETH-USDT"]
        )
        allowed = set(adapter.told(asked).values())
        for number in range(each):
            if number % 500 == 0:
                adapter = adapter.fresh()
                adapter.subscribe(asked)
                if name == "bitfinex":
                    adapter.parse(BITFINEX_ACK, NOW)
            which = rng.randrange(len(frames))
            frame = mutated(rng, frames[which], spans[which])
            try:
                parsed = adapter.parse(frame, NOW)
            except BadFrame as error:
                here["bad"] += 1
                assert len(str(error)) < 500
                str(error).encode()
                continue
            here[parsed.kind] += 1
            for reason, alone in parsed.bad:  # what is told of a bad trade is bad by itself, for the same reason
                with pytest.raises(BadFrame, match=f"^{re.escape(reason)}$"):
                    adapter.parse(alone, NOW)
            parsed.note.encode()
            assert len(parsed.note) <= 2000
            for trade in parsed.trades:
                assert trade.symbol in allowed
                assert trade.side in ("buy", "sell", "")
                assert 0 < trade.price_value < 1e18
                assert 0 < trade.size_value < 1e18
                assert DECIMAL.fullmatch(trade.price) and DECIMAL.fullmatch(trade.size)
                assert float(trade.price) == trade.price_value
                assert float(trade.size) == trade.size_value
                assert type(trade.ts_event) is int
                assert EARLIEST_NS <= trade.ts_event <= NOW + AHEAD_NS
                assert trade.sequence is None or 0 <= trade.sequence < 2**63
                assert type(trade.trade_id) is str and trade.trade_id.isascii() and len(trade.trade_id) <= 64
                assert trade.flags in ("", "snapshot")
                trade.trade_id.encode()
    assert sum(sum(here.values()) for here in outcomes.values()) >= 100_000
    for name, here in outcomes.items():
        assert here["bad"] > each // 4, name
        assert here["trades"] > each // 50, name
        assert here["error"], name
    assert {kind for here in outcomes.values() for kind in here} == {
        *("bad", "trades", "ack", "heartbeat", "status", "error", "ignored")
    }
