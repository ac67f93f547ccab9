"""bench/market.py and what it needs; the pace of sandbox/markets.py."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench import market, market_contestants, market_course, market_kafka, runner
from sandbox.markets import FIRST, Exchanges
from tests.helpers.base import HANG_LIMIT


def test_markets_pace_tells_exactly_so_many_trades() -> None:
    with Exchanges(symbols=["BTC-USD", "ETH-USD"], exchanges=["okx", "gateio"], ledger=True) as them:

        async def read() -> list[str]:
            ids = list[str]()
            async with aiohttp.ClientSession() as session, session.ws_connect(them.urls["okx"]) as ws:
                args = [{"channel": "trades", "instId": f"{base}-USDT"} for base in ("BTC", "ETH")]
                await ws.send_json({"op": "subscribe", "args": args})
                for _ in args:
                    assert (await ws.receive_json())["event"] == "subscribe"
                assert them.pace(1000, 0.2) == 50
                while len(ids) < 100:
                    ids += [trade["tradeId"] for trade in (await ws.receive_json())["data"]]
                them.emit(1, "okx")
                last = (await ws.receive_json())["data"] + (await ws.receive_json())["data"]
                return [*ids, *(trade["tradeId"] for trade in last)]

        found = asyncio.run(asyncio.wait_for(read(), HANG_LIMIT))
        assert sorted(map(int, found)) == sorted([*range(FIRST + 1, FIRST + 52)] * 2)
        assert them.sent("okx") == {"BTC-USDT": 51, "ETH-USDT": 51}


def test_markets_pace_refuses_what_makes_no_sense() -> None:
    with Exchanges() as them:
        for rate, seconds in ((0, 1), (1, 0), (-1, 1)):
            with pytest.raises(ValueError, match="needed: servers without a rate"):
                them.pace(rate, seconds)
    with Exchanges(rate=10) as them, pytest.raises(ValueError, match="without a rate"):
        them.pace(10, 1)


def made_step(wanted: float, *, missing: int = 0, repeated: int = 0, **more: Any) -> Any:
    step = market_course.Step(
        *(wanted, 10, wanted, 1000, missing, repeated, 0.5, (0.01, 0.1, 0.2), (0.01, 0.05)),
        *({"own": 1.0, "pool": 0.5, "broker": None}, (100.0, 101.0), 102.0, 7, 0, 0.03, 0),
    )
    return step._replace(**more)


class Course:
    """Loses what is above so many trades a second; those of peers one tenth of it."""

    def __init__(self, most: float, **more: Any) -> None:
        self.most, self.more = most, more

    def run(self, name: str, rate: float, seconds: float) -> Any:
        most = self.most / 10 if name in market_contestants.PEERS else self.most
        return made_step(rate, missing=5 if rate > most else 0, **self.more)


def test_a_rate_holds_if_each_is_there_once_and_in_time() -> None:
    assert made_step(100).lossless
    assert not made_step(100, missing=1).lossless
    assert not made_step(100, repeated=1).lossless
    assert not made_step(100, drained=None).lossless
    assert made_step(100, drained=market_course.DRAIN).lossless
    assert not made_step(100, drained=market_course.DRAIN + 0.01).lossless
    assert made_step(100, rate=89.0).held_back
    assert not made_step(100, rate=91.0).held_back


def test_counts_each_trade_once() -> None:
    ledger = market_kafka.Ledger(3, 3)
    for exchange, numbers in (("okx", (1, 2, 2)), ("bybit", (1, 3)), ("GEMINI", (-20, 0, 1, 2, 3, 4))):
        for number in numbers:
            known = FIRST + number + market_contestants.EVENT_IDS.get(exchange, 0)
            text = f"00000000-0000-4000-8000-{known:012x}" if exchange == "bybit" else str(known)
            ledger.take(exchange, "BTC-USD", text, 10.0, 10.25, 10.5)
    assert (ledger.missing, ledger.repeated, ledger.others) == (2, 1, 3)
    assert set(ledger.whole) == {0.5} and set(ledger.inside) == {0.25} and len(ledger.whole) == 7


def test_marks_tell_when_an_offset_could_be_read() -> None:
    marks = market_kafka.Marks()
    for end, at in ((0, 1), (2, 5), (2, 6), (5, 9)):
        marks.note(end, at)
    assert [marks.readable(offset) for offset in range(5)] == [5, 5, 9, 9, 9]


def test_shares() -> None:
    assert market_kafka.share([], 0.5) is None
    assert market_kafka.share([1.0], 0.99) == 1.0
    assert market_kafka.share([float(n) for n in range(100)], 0.5) == 50.0
    assert market_kafka.share([float(n) for n in range(100)], 0.99) == 99.0


def test_compares_the_highest_rates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = tmp_path / "found.json"
    monkeypatch.setattr(market, "present", lambda _: True)
    monkeypatch.setattr(market_course, "course", lambda *_: contextlib.nullcontext(Course(1000)))
    words = ["--peers", "market_pipeline,cryptofeed", "--rates", "100,800,1600", "--halvings", "1"]
    assert runner.main(["market", *words, "--json", str(found)]) == 0
    ours, theirs = json.loads(found.read_text())["results"][:2]
    assert (ours["holds/s"][0], theirs["holds/s"][0]) == (800, 100)
    assert (ours["x cryptofeed"], theirs["x cryptofeed"], ours["exchanges"]) == (8, 1, 10)
    assert ours["us/trade"] == 1500
    assert "x cryptofeed" in capsys.readouterr().out


def test_without_cryptofeed_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(market_course, "course", lambda *_: contextlib.nullcontext(Course(1000)))
    assert runner.main(["market", "--peers", "market_pipeline,cryptofeed", "--rates", "50"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "cryptofeed: not installed: pip install -r requirements-bench.txt" in shown
    assert [line for line in shown if line.startswith("cryptofeed ")] == []
    with pytest.raises(SystemExit, match="'nobody' is none of market_pipeline"):
        runner.main(["market", "--peers", "nobody"])


@pytest.mark.parametrize(
    ("more", "broken"),
    [
        ({}, None),
        ({"missing": 1}, "trades are missing"),
        ({"repeated": 1}, "trades are there twice"),
        ({"whole": (0.1, 0.25, 0.3)}, "trades come late"),
        ({"whole": (None, None, None)}, "trades come late"),
        ({"memory": (100.0, 126.0)}, "memory grows"),
        ({"rate": 1.0}, "the exchanges were held back"),
        ({"code": 1}, "it ended with 1"),
    ],
)
def test_soak_says_what_did_not_hold(more: dict[str, Any], broken: str | None) -> None:
    course: Any = Course(1000)
    course.run = lambda *_: made_step(100, **more)
    if broken is None:
        (row,) = market.soak(course, "market_pipeline", 100, 20)
        assert (row["MB at 10 s"], row["MB at the end"]) == (100, 101)
    else:
        with pytest.raises(SystemExit, match=f"bench: market: {broken}$"):
            market.soak(course, "market_pipeline", 100, 20)


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    found, names = tmp_path / "found.json", ["market_pipeline"]
    if importlib.util.find_spec("cryptofeed") is not None:
        quick = tuple(name for name in market_contestants.NATIVE if name != "bitstamp")  # where it sleeps for 5 s
        monkeypatch.setitem(market_contestants.PEERS, "cryptofeed", quick)
        names.append("cryptofeed")
    words = ["--peers", ",".join(names), "--rates", "360", "--seconds", "1", "--json", str(found)]
    assert runner.main(["market", *words]) == 0
    rows = json.loads(found.read_text())["results"]
    steps = [row for row in rows if "sent" in row]
    assert {row[""] for row in steps} == {*names}
    for row in steps:
        assert (row["sent"], row["missing"], row["repeated"]) == (360, 0, 0)
    assert steps[0]["rows"] > 0 and steps[0]["left out"] == 0


def test_a_contestant_that_does_not_start_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with market_course.course(None, "--windows=nonsense") as track, pytest.raises(SystemExit, match="did not start"):
        track.run("market_pipeline", 100, 1)
