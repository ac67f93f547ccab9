"""market/stats.py: against formulas."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import pickle
import random
import time
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market import stats as mst
from market import workers as mw
from market.trade import Trade
from tests.helpers.market import (
    EXCHANGES,
    STATS_T0,
    market_stats_row,
    market_stats_stream,
    market_stats_take,
    market_stats_trade,
)

SMALL: dict[str, Any] = {"windows": (5, 20, 60), "half_life": 7.0, "every": 0.0}


class Taken(NamedTuple):
    series: dict[tuple[str, str], list[Trade]]
    counts: dict[str, int]


def market_stats_taken(trades: Iterable[Trade], lateness: int = 2 * 10**9) -> Taken:
    """Which trades count, by the definition."""
    counts = dict.fromkeys(("taken", "late", "late_for_all", "repeated", "ahead"), 0)
    series: dict[tuple[str, str], list[Trade]] = {}
    newest: dict[tuple[str, str], int] = {}
    seen = set[tuple[str, str, str]]()
    for trade in trades:
        own, every = (trade.symbol, trade.exchange), (trade.symbol, "*")
        identity = (*own, trade.trade_id)
        at = trade.ts_event
        if at > trade.ts_recv + 2 * 10**9:
            counts["ahead"] += 1
        elif "duplicate" in trade.flags:
            counts["repeated"] += 1
        elif at < newest.get(own, 0) - lateness:
            counts["late"] += 1
        elif trade.trade_id and identity in seen:
            counts["repeated"] += 1
        else:
            seen.add(identity)
            counts["taken"] += 1
            for key in (own, every):
                if at < newest.get(key, 0) - lateness:
                    counts["late_for_all"] += 1
                else:
                    newest[key] = max(at, newest.get(key, 0))
                    series.setdefault(key, []).append(trade)
    return Taken(series, counts)


@functools.cache
def ln(price: float) -> Decimal:
    return Decimal(price).ln()


@functools.cache
def weight(age: int, half_life: float) -> Decimal:
    return Decimal(2) ** (Decimal(-age) / Decimal(half_life))


def common_squares(trades: Sequence[Trade]) -> dict[int, Decimal]:
    """The r² of each second that has returns, those of each exchange from its own closes; from sorted trades."""
    closes = dict[str, dict[int, tuple[int, float]]]()
    for trade in trades:
        closes.setdefault(trade.exchange, {})[trade.ts_event // 10**9] = trade.ts_event, trade.price_value
    returns = dict[int, list[tuple[int, int, Decimal]]]()
    for own in closes.values():
        for (_, (begin, before)), (second, (end, close)) in itertools.pairwise(own.items()):
            returns.setdefault(second, []).append((begin, end, ln(close) - ln(before)))
    first = trades[0].ts_event // 10**9
    told = max(trade.ts_event for trade in trades if trade.ts_event // 10**9 == first)
    found = dict[int, Decimal]()
    for second, those in sorted(returns.items()):
        if len(those) == 1:
            ((begin, until, change),) = those
            found[second], told = change**2 * (until - told) / (until - begin), until
            continue
        speed, overlaps = Decimal(0), Fraction(0)
        for begin, end, change in those:
            speed += change / (end - begin)
            for other, other_end, _ in those:
                shared = max(min(end, other_end) - max(begin, other), 0)
                overlaps += Fraction(shared, (end - begin) * (other_end - other))
        until = max(end for _, end, _ in those)
        scale = Fraction(until - told) / overlaps
        found[second], told = speed**2 * scale.numerator / scale.denominator, until
    return found


def volatility_of_all(venues: dict[str, list[tuple[float, float]]], seconds: int) -> float:
    """What is told of ``*`` after these (seconds, price) of each exchange."""
    analytics = mst.Analytics((seconds,))
    trades = [market_stats_trade(at, price, 1.0, name) for name, each in venues.items() for at, price in each]
    for trade in sorted(trades, key=lambda trade: trade.ts_event):
        assert market_stats_take(analytics, trade)
    found = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD")).volatility[0]
    assert found is not None
    return found


@pytest.mark.parametrize("basis", [0.0, 2e-4, 5e-4, 0.01, 0.5])
def test_constant_prices_have_no_volatility_whatever_lies_between_the_exchanges(basis: float) -> None:
    rng = random.Random(7)
    for phases in ((0.0, 0.0), (0.0, 0.5), (0.2, 0.9)):
        venues = {
            name: [(n + phase, price) for n in range(200) if rng.random() < 0.7]
            for name, phase, price in zip(("kraken", "okx"), phases, (100.0, 100.0 * (1 + basis)), strict=True)
        }
        assert volatility_of_all(venues, 100) == 0.0


@pytest.mark.parametrize(
    ("venues", "chance", "noise", "phase"),
    [
        (2, 1.0, 0.0, 0.0),  # in step
        (10, 1.0, 0.3, 0.0),  # each with a walk of its own beside the factor's
        (2, 1.0, 0.0, 1.0),  # each in its own time
        (5, 0.5, 0.0, 1.0),  # seldom
        (3, 0.2, 0.0, 1.0),
        (8, 0.7, 0.2, 1.0),
    ],
)
def test_exchanges_that_follow_a_common_factor_have_its_volatility(
    venues: int, chance: float, noise: float, phase: float
) -> None:
    """Within 5 % in the mean of some walks: the factor's own realised volatility, of a step of 0.1 s."""
    ratios = []
    for seed in range(4):
        rng, steps, seconds, step = random.Random(seed), 10, 400, 1e-4
        walk = list(itertools.accumulate(rng.gauss(0, step / math.sqrt(steps)) for _ in range(seconds * steps)))
        told = dict[str, list[tuple[float, float]]]()
        for n in range(venues):
            own, prices, basis = 0.0, [], rng.uniform(-0.01, 0.01)
            for second in range(seconds):
                own += rng.gauss(0, noise * step)
                if rng.random() < chance:
                    at = second * steps + int(rng.random() * phase * steps)
                    prices.append((at / steps, 100 * math.exp(walk[at] + basis + own)))
            told[f"venue{n}"] = prices
        factor = math.sqrt(sum((b - a) ** 2 for a, b in itertools.pairwise(walk)) / seconds * mst.YEAR)
        ratios.append(volatility_of_all(told, seconds) / factor)
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.05), ratios


def by_the_formulas(trades: Sequence[Trade], now_ns: int, windows: Sequence[int], half_life: float) -> dict[str, Any]:
    """The figures of a series, from all its trades at once: sums without rounding, logarithms of 28 digits."""
    trades = sorted(
        trades, key=lambda t: (t.ts_event, t.exchange, len(t.trade_id), t.trade_id, t.price_value, t.size_value)
    )
    now = now_ns // 10**9
    first = trades[0].ts_event // 10**9
    squares = dict.fromkeys(range(now, first, -1), Decimal(0)) | common_squares(trades)  # the newest first
    found: dict[str, Any] = {"last": trades[-1].price_value, "vwap": [], "volatility": [], "trades": [], "volume": []}
    weights = [weight(age, half_life) for age in range(len(squares))]
    weighted = sum(map(operator.mul, weights, squares.values()))
    found["ewma"] = float((weighted / sum(weights) * mst.YEAR).sqrt()) if squares else None
    for window in windows:
        inside = [trade for trade in trades if trade.ts_event // 10**9 > now - window]
        volume = math.fsum(trade.size_value for trade in inside)
        turnover = math.fsum(trade.price_value * trade.size_value for trade in inside)
        of_window = list(squares.values())[:window]
        found["trades"].append(len(inside))
        found["volume"].append(volume)
        found["vwap"].append(turnover / volume if volume else None)
        mean = sum(of_window) / Decimal(len(of_window)) if of_window else None
        found["volatility"].append(None if mean is None else float((mean * mst.YEAR).sqrt()))
    return found


def agrees(row: mst.AnalyticsRow, expected: dict[str, Any]) -> None:
    for field, value in expected.items():
        got = getattr(row, field)
        if isinstance(value, list):
            assert len(got) == len(value)
        for one, other in zip(got, value, strict=True) if isinstance(value, list) else [(got, value)]:
            assert one == other or one == pytest.approx(other, rel=1e-12, abs=0.0), (field, row)


@pytest.mark.parametrize("seed", range(4))
def test_agree_with_the_formulas(seed: int) -> None:
    """Late, repeated, labelled, ahead and out of order; asked at the newest trade and long after it."""
    stream = market_stats_stream(seed, seconds=90.0 if seed < 2 else 400.0)
    analytics = mst.Analytics(**SMALL)
    asked = set(random.Random(seed).sample(range(100, len(stream)), 12)) | {0, 1, len(stream) - 1}
    checked = 0
    for n, trade in enumerate(stream):
        market_stats_take(analytics, trade)
        if n not in asked:
            continue
        series, counts = market_stats_taken(stream[: n + 1])
        got = analytics.stats()._asdict()
        assert {name: got[name] for name in counts} == counts
        assert got["offered"] == n + 1 == sum(counts.values()) - counts["late_for_all"]
        for (symbol, exchange), trades in series.items():
            newest = max(trade.ts_event for trade in trades)
            for now in (newest, newest + 3 * 10**9, newest + 200 * 10**9):
                row = market_stats_row(analytics, symbol, exchange, now)
                assert row is not None
                assert row[:3] == (symbol, exchange, now)
                agrees(row, by_the_formulas(trades, now, (5, 20, 60), 7.0))
                checked += 1
    assert checked > 200
    assert min(counts["late"], counts["late_for_all"], counts["repeated"], counts["ahead"]) > 5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_within_the_lateness_gives_the_same_rows(data: st.DataObject) -> None:
    """To the last bit; repeats wherever they come."""
    trades = data.draw(
        st.lists(
            st.builds(
                market_stats_trade,
                st.integers(0, 80).map(lambda tenths: tenths / 10) | st.floats(0, 40),
                st.floats(1e-3, 1e6),
                st.floats(0, 1e9),
                st.sampled_from(EXCHANGES),
                st.sampled_from(("BTC-USD", "ETH-USD")),
            ),
            min_size=1,
            max_size=60,
        )
    )
    trades = [trade._replace(trade_id=str(n), ts_recv=STATS_T0 + 10**11) for n, trade in enumerate(trades)]
    trades += data.draw(st.lists(st.sampled_from(trades), max_size=20))
    results = []
    for _ in range(3):
        delays = data.draw(st.lists(st.integers(0, 2 * 10**9), min_size=len(trades), max_size=len(trades)))
        arrivals = sorted(zip(delays, trades, strict=True), key=lambda each: each[1].ts_event + each[0])
        analytics = mst.Analytics(**SMALL)
        for _, trade in arrivals:
            market_stats_take(analytics, trade)
        stats = analytics.stats()
        assert stats.late_for_all == 0
        assert stats.taken == len({trade.trade_id for trade in trades})
        results.append((sorted(analytics.due(everything=True)), stats._replace(late=0, repeated=0)))
    assert results[0] == results[1] == results[2]


def test_thousands_of_trades_in_any_order_give_the_same_bits() -> None:
    rng = random.Random(8)
    trades = [
        market_stats_trade(rng.uniform(0, 20), rng.uniform(1, 2), 10 ** rng.uniform(-6, 6), rng.choice("abc"))
        for _ in range(6_000)
    ]
    found = []
    for _ in range(3):
        analytics = mst.Analytics(**SMALL)
        for _, trade in sorted((trade.ts_event + rng.uniform(0, 2e9), trade) for trade in trades):
            market_stats_take(analytics, trade)
        assert analytics.stats()[1:4] == (6_000, 0, 0)
        found.append(analytics.due())
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4


def test_lateness_is_exact_and_each_series_has_its_own() -> None:
    analytics = mst.Analytics()
    assert market_stats_take(analytics, market_stats_trade(10.5))
    assert market_stats_take(analytics, market_stats_trade(8.5))
    assert not market_stats_take(analytics, market_stats_trade(8.499999999))
    assert market_stats_take(analytics, market_stats_trade(7.0, exchange="okx"))  # its clock, or its way, is behind
    assert not market_stats_take(analytics, market_stats_trade(4.9, exchange="okx"))
    assert market_stats_take(analytics, market_stats_trade(8.5, exchange="okx"))
    stats = analytics.stats()
    assert (stats.taken, stats.late, stats.late_for_all) == (4, 2, 1)
    counts = {
        name: cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD", name)).trades[0]
        for name in ("*", "kraken", "okx")
    }
    assert counts == {"*": 3, "kraken": 2, "okx": 2}
    assert market_stats_row(analytics, "BTC-USD", "gemini") is None
    assert market_stats_row(analytics, "ETH-USD") is None


def test_a_repeated_id_counts_once() -> None:
    analytics = mst.Analytics()
    long = "x" * 1000
    taken = [
        market_stats_take(analytics, trade)
        for trade in (
            market_stats_trade(1.0, trade_id="7"),
            market_stats_trade(1.0, trade_id="7"),
            market_stats_trade(2.5, trade_id="7"),  # with another time
            market_stats_trade(1.0, trade_id="7", exchange="okx"),
            market_stats_trade(1.0, trade_id="7", symbol="ETH-USD"),
            market_stats_trade(1.0, trade_id="8", flags="disorder,duplicate"),
            market_stats_trade(1.0, trade_id="8", flags="gap"),
            market_stats_trade(1.0),
            market_stats_trade(1.0),
            market_stats_trade(1.0, trade_id=long + "a"),
            market_stats_trade(1.0, trade_id=long + "a"),
            market_stats_trade(1.0, trade_id=long + "b"),
        )
    ]
    assert taken == [True, False, False, True, True, False, True, True, True, True, False, True]
    assert analytics.stats()[:5] == (12, 8, 0, 0, 4)
    assert analytics.stats().ids == 6
    market_stats_take(analytics, market_stats_trade(3.9, trade_id="9"))
    assert analytics.stats().ids == 7
    market_stats_take(analytics, market_stats_trade(4.0, trade_id="10"))  # closes the bar of 1.0 on this exchange
    assert analytics.stats().ids == 4
    assert not market_stats_take(analytics, market_stats_trade(1.0, trade_id="7"))
    assert analytics.stats().late == 1


def test_a_tie_in_time_is_decided_by_the_id_as_a_number() -> None:
    for ids in (("9", "10"), ("10", "9")):
        analytics = mst.Analytics()
        for trade_id in ids:
            market_stats_take(analytics, market_stats_trade(1.0, float(trade_id), trade_id=trade_id))
        assert cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD")).last == 10.0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"price_value": math.nan}, "absurd"),
        ({"price_value": math.inf}, "absurd"),
        ({"price_value": 0.0}, "absurd"),
        ({"price_value": -1.0}, "absurd"),
        ({"price_value": 5e-324}, "absurd"),
        ({"size_value": math.nan}, "absurd"),
        ({"size_value": math.inf}, "absurd"),
        ({"size_value": -1e-9}, "absurd"),
        ({"ts_event": -1}, "absurd"),
        ({"ts_event": 10**30, "ts_recv": 10**30}, "absurd"),
        ({"exchange": "*"}, "absurd"),
        ({"ts_event": STATS_T0 + 2 * 10**9 + 1}, "ahead"),
    ],
)
def test_what_cannot_be_is_counted_and_changes_nothing(fields: dict[str, Any], reason: str) -> None:
    analytics = mst.Analytics()
    good = market_stats_trade(0.0)
    market_stats_take(analytics, good)
    before = market_stats_row(analytics, "BTC-USD")
    assert not market_stats_take(analytics, good._replace(**fields))
    assert analytics.stats()._asdict()[reason] == 1
    assert market_stats_row(analytics, "BTC-USD") == before
    assert market_stats_take(analytics, good._replace(ts_event=STATS_T0 + 2 * 10**9, size_value=0.0))


def test_the_first_trades_and_the_silence_after() -> None:
    analytics = mst.Analytics()
    market_stats_take(analytics, market_stats_trade(0.0, 100.0, 2.0))
    one = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD"))
    assert one == mst.AnalyticsRow(
        "BTC-USD", "*", STATS_T0, 100.0, (10, 60, 300), (100.0,) * 3, (None,) * 3, (1,) * 3, (2.0,) * 3,
        None, None, "", "",
    )  # fmt: skip
    market_stats_take(analytics, market_stats_trade(1.0, 110.0, 0.0))
    square = math.log(1.1) ** 2
    two = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD"))
    assert two.volatility == pytest.approx((math.sqrt(square * mst.YEAR),) * 3, rel=1e-12)
    assert two.ewma == pytest.approx(math.sqrt(square * mst.YEAR), rel=1e-12)
    idle = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD", now_ns=STATS_T0 + 100 * 10**9))
    assert (idle.vwap, idle.trades, idle.last) == ((None, None, 100.0), (0, 0, 2), 110.0)
    assert idle.volatility == pytest.approx((0.0, 0.0, math.sqrt(square / 100 * mst.YEAR)), rel=1e-12)
    began = time.process_time()
    market_stats_take(analytics, market_stats_trade(1e9, 121.0))  # thirty years: no bar is made for what was not
    late = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD"))
    assert time.process_time() - began < 0.1
    assert late.volatility[0] == pytest.approx(math.sqrt(square / 10 * mst.YEAR), rel=1e-12)
    assert late.ewma == pytest.approx(math.sqrt(square * (1 - 2 ** (-1 / 60)) * mst.YEAR), rel=1e-12)
    assert orjson.loads(orjson.dumps(late.record()))["volatility"]["10"] == late.volatility[0]
    assert set(late.record()) == {*mst.AnalyticsRow._fields} - {"windows"}


def test_the_same_instant_asked_again_has_what_came_since() -> None:
    """Also of the bars that were closed since."""
    analytics = mst.Analytics(lateness=1.5)
    now = STATS_T0 + 9 * 10**9
    for n in range(18):
        market_stats_take(analytics, market_stats_trade(n / 2))
        row = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD", now_ns=now))
        assert (row.trades, row.volume) == ((n + 1,) * 3, (n + 1.0,) * 3)


def test_spread_is_between_exchanges_that_trade() -> None:
    analytics = mst.Analytics()
    for at, price, exchange in (
        (0.0, 90.0, "okx"),
        (5.0, 101.0, "kraken"),
        (9.0, 99.5, "gemini"),
        (9.5, 100.0, "bybit"),
    ):
        market_stats_take(analytics, market_stats_trade(at, price, exchange=exchange))
        if exchange == "okx":
            assert cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD")).spread is None
    row = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD"))
    assert (row.spread, row.low, row.high) == (11.0, "okx", "kraken")
    market_stats_take(analytics, market_stats_trade(10.0, 100.0, exchange="bybit"))  # okx is silent for ten seconds
    row = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD"))
    assert (row.spread, row.low, row.high) == (1.5, "gemini", "kraken")
    assert cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD", "okx")).spread is None


def test_rows_are_due_when_they_changed_and_not_too_often() -> None:
    analytics = mst.Analytics(every=0.25)

    def told(everything: bool = False) -> list[tuple[str, str]]:
        return [row[:2] for row in analytics.due(everything)]

    market_stats_take(analytics, market_stats_trade(0.0))
    assert told() == [("BTC-USD", "*"), ("BTC-USD", "kraken")]
    market_stats_take(analytics, market_stats_trade(0.1, exchange="okx"))
    market_stats_take(analytics, market_stats_trade(0.1, symbol="ETH-USD"))
    assert told() == [("ETH-USD", "*"), ("ETH-USD", "kraken")]
    market_stats_take(analytics, market_stats_trade(0.249, exchange="bybit"))
    assert told() == []
    market_stats_take(analytics, market_stats_trade(0.2, symbol="ETH-USD", received=0.25))
    assert told() == [("BTC-USD", "*"), ("BTC-USD", "bybit"), ("BTC-USD", "okx")]
    assert told() == []
    assert told(everything=True) == [("ETH-USD", "*"), ("ETH-USD", "kraken")]
    assert told(everything=True) == []
    market_stats_take(analytics, market_stats_trade(-1.0, symbol="ETH-USD"))  # our clock was put back
    assert told() == [("ETH-USD", "*"), ("ETH-USD", "kraken")]


def test_sums_are_exact_and_leave_no_trace() -> None:
    """30,000 trades of sizes from 1e-9 to 1e9 against fractions; then they are out of the windows, without a rest."""
    rng = random.Random(5)
    analytics = mst.Analytics(SMALL["windows"])
    trades = [market_stats_trade(n / 8_000, rng.uniform(1, 2), 10 ** rng.uniform(-9, 9)) for n in range(30_000)]
    for trade in trades:
        market_stats_take(analytics, trade)
    row = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD"))
    volume = sum(Fraction(trade.size_value) for trade in trades)
    turnover = sum(Fraction(trade.price_value * trade.size_value) for trade in trades)
    assert row.volume[1] == pytest.approx(float(volume), rel=1e-15)
    assert row.vwap[1] == pytest.approx(float(turnover / volume), rel=1e-15)
    for second in range(70, 80):
        market_stats_take(analytics, market_stats_trade(second, 0.001, 1e-9))
    row = cast(mst.AnalyticsRow, market_stats_row(analytics, "BTC-USD"))
    assert row.vwap == pytest.approx((0.001,) * 3, rel=1e-15)
    assert row.volatility[0] == 0.0


def terms(analytics: mst.Analytics) -> int:
    """Everything that is held per trade or per bar, counted."""
    held = 0
    for book in analytics._books.values():
        for series in (book.all, *book.exchanges.values()):
            held += len(series.ids) + len(series.bars)
            held += sum(len(bar.sizes) + len(bar.turnovers) + len(bar.ids) for bar in series.open.values())
    return held


def test_memory_is_bounded_whatever_comes() -> None:
    analytics = mst.Analytics((5, 20), series=7, ids=100, lateness=2.0)
    for n in range(20_000):  # at one instant
        market_stats_take(analytics, market_stats_trade(0.0, trade_id=str(n)))
    stats = analytics.stats()
    assert (stats.taken, stats.ids, stats.unchecked) == (20_000, 100, 19_900)
    assert terms(analytics) <= 2 * 2 * mst.MAX_TERMS + 200
    for n in range(20_000):  # everywhere in time
        market_stats_take(analytics, market_stats_trade(n * 0.37, trade_id=str(n)))
    assert terms(analytics) <= 2 * (4 * 2 * mst.MAX_TERMS + 2 * 20) + 200
    assert analytics.stats().ids <= 100
    for n in range(1000):  # from anywhere
        market_stats_take(analytics, market_stats_trade(n * 0.37, symbol=f"S{n}", trade_id="1"))
    stats = analytics.stats()
    assert (stats.symbols, stats.series, stats.refused) == (3, 6, 998)
    assert market_stats_take(analytics, market_stats_trade(7400.0, exchange="okx"))
    assert not market_stats_take(analytics, market_stats_trade(7400.0, exchange="gemini"))
    assert analytics.stats().offered == sum(analytics.stats()[i] for i in (1, 2, 4, 5, 6, 7))


def test_go_on_from_a_pickle_as_if_nothing_had_been() -> None:
    stream = market_stats_stream(9, 2000)
    analytics = mst.Analytics()
    for trade in stream[:1000]:
        market_stats_take(analytics, trade)
    copy = pickle.loads(pickle.dumps(analytics))
    for each in (analytics, copy):
        for trade in stream[1000:]:
            market_stats_take(each, trade)
    assert copy.due() == analytics.due() != []
    assert copy.stats() == analytics.stats()
    assert repr(copy).startswith("<Analytics offered=")


def test_cost_is_well_under_half_a_core() -> None:
    """Three seconds at 15,000 a second, packed, unpacked, taken and told, in CPU seconds."""
    rng = random.Random(1)
    trades = [
        market_stats_trade(n / 15_000, 100 + rng.random(), rng.random(), f"e{n % 10}", f"S{rng.randrange(3)}", str(n))
        for n in range(45_000)
    ]
    analytics, rows = mst.Analytics(), 0
    began = time.process_time()
    for begin in range(0, len(trades), 750):
        for fields in pickle.loads(pickle.dumps(list(map(mw._fields, trades[begin : begin + 750])), 5)):
            analytics.take(*fields)
        rows += len(analytics.due())
    assert time.process_time() - began < 0.5 * 3.0
    assert rows == 3 * 12 * 11
