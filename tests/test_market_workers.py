"""market/workers.py: processes that die."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from market import stats as mst
from market import workers as mw
from market.trade import Trade
from runtime import processes
from tests.helpers.base import HANG_LIMIT, until_async
from tests.helpers.market import market_stats_stream, market_stats_trade
from tests.helpers.processes import proc_alone, proc_gone, proc_writer


class Reduced(str):
    """As what it comes to when a worker unpickles it."""

    def __new__(cls, shown: str, *call: Any) -> Reduced:
        made = super().__new__(cls, shown)
        made.call = call  # type: ignore[attr-defined]
        return made

    def __reduce__(self) -> Any:
        function, *args = self.call  # type: ignore[attr-defined]
        return function, tuple(args)


def market_workers_run(main: Callable[[mw.AnalyticsPool], Awaitable[None]], workers: int = 2, **options: Any) -> None:
    async def started(pool: mw.AnalyticsPool) -> None:
        await pool.start()
        await asyncio.wait_for(main(pool), 2 * HANG_LIMIT)

    pool = proc_alone(lambda: mw.AnalyticsPool(workers, **{"timeout": HANG_LIMIT, **options}), started)
    assert pool.stats()[2:4] == (0, 0)


async def submitted(pool: mw.AnalyticsPool, trades: list[Trade]) -> list[mst.AnalyticsRow]:
    """The rows, when nothing is lost."""
    rows, lost = await pool.submit(trades)
    assert lost == []
    return rows


def market_workers_batches(seed: int, batches: int = 12, size: int = 60) -> list[list[Trade]]:
    stream = market_stats_stream(seed, batches * size)
    return [stream[begin : begin + size] for begin in range(0, batches * size, size)]


class Control:
    """What no death happens to: an ``Analytics`` per symbol, so that one symbol's times are not another one's."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.options, self.symbols = options or {}, dict[str, mst.Analytics]()

    def submit(self, trades: list[Trade], everything: bool = False) -> list[mst.AnalyticsRow]:
        for trade in trades:
            self.symbols.setdefault(trade.symbol, mst.Analytics(**self.options)).take(*mw._fields(trade))
        return sorted(row for each in self.symbols.values() for row in each.due(everything))


def test_rows_are_those_of_one_process_and_a_symbol_stays_in_one_worker() -> None:
    control = Control({"every": 20.0})

    async def main(pool: mw.AnalyticsPool) -> None:
        told = 0
        for batch in market_workers_batches(1):
            rows = control.submit(batch)
            told += len(rows)
            assert sorted(await submitted(pool, batch)) == rows
        last = control.submit([], everything=True)
        assert sorted(await pool.flush()) == last != []
        assert await submitted(pool, []) == []
        stats = pool.stats()
        assert len(set(stats.pids)) == 2
        assert (stats.symbols, stats.trades, stats.died, stats.rebuilt) == ((1, 1), 720, 0, 0)
        assert stats.rows == told + len(last)
        assert pool.analytics().offered == 720
        assert pool.analytics().symbols == 2
        assert repr(pool).startswith("<AnalyticsPool pids=(")

    market_workers_run(main, options=control.options)


@pytest.mark.parametrize("retained", [1, 2_000_000])
def test_a_kill_between_batches_changes_no_row(retained: int) -> None:
    """With checkpoints and without."""
    control = Control({"every": 30.0})

    async def main(pool: mw.AnalyticsPool) -> None:
        flushed = 0
        for n, batch in enumerate(market_workers_batches(2, 9)):
            if n % 3 == 2:
                os.kill(victim := pool.stats().pids[n % 2], signal.SIGKILL)
                await until_async(lambda pid=victim: proc_gone(pid))  # type: ignore[misc]
            assert sorted(await submitted(pool, batch)) == control.submit(batch)
            if n % 3 == 1:
                rows = control.submit([], everything=True)
                flushed += len(rows)
                assert sorted(await pool.flush()) == rows
                assert all(slot.log[-1][1] for slot in pool._slots if slot.log)  # flushed again when it is rebuilt
        assert sorted(await pool.flush()) == control.submit([], everything=True)
        assert flushed > 10
        stats = pool.stats()
        assert (stats.died, stats.rebuilt, stats.trades, stats.uncomputed) == (3, 3, 540, 0)
        assert pool.analytics().offered == 540
        assert (stats.checkpoints > 1) == (retained < 2_000_000)

    market_workers_run(main, retained=retained, options=control.options)


def test_a_kill_in_a_batch_has_it_begun_again(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")
    control = Control()

    async def main(pool: mw.AnalyticsPool) -> None:
        first, second, third = market_workers_batches(3, 3)
        assert sorted(await submitted(pool, first)) == control.submit(first)
        at = next(n for n, trade in enumerate(second) if trade.symbol == "XRP-USD")
        held = second[at]._replace(trade_id=cast(Any, Reduced("gate", Path.read_text, gate)))
        job = asyncio.create_task(submitted(pool, [*second[:at], held, *second[at + 1 :]]))
        writer = await proc_writer(gate)  # the worker is in the batch
        pids = pool.stats().pids
        victim = pids[pool._slots.index(pool._homes["XRP-USD"])]
        gate.unlink()
        gate.write_text("gate")
        os.kill(victim, signal.SIGKILL)
        rows = await job
        os.close(writer)
        second[at] = second[at]._replace(trade_id="gate")
        assert sorted(rows) == control.submit(second)
        assert sorted(await submitted(pool, third)) == control.submit(third)
        stats = pool.stats()
        assert (stats.died, stats.rebuilt, stats.uncomputed) == (1, 1, 0)
        assert len(set(pids) & set(stats.pids)) == 1

    market_workers_run(main)


@pytest.mark.parametrize("how", ["kills", "raises"])
def test_a_batch_that_cannot_be_computed_is_told_and_left_out(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first half of it had been taken already where it raises."""
    control = Control()

    async def main(pool: mw.AnalyticsPool) -> None:
        first, second, third = market_workers_batches(4, 3)
        assert sorted(await submitted(pool, first)) == control.submit(first)
        at = next(n for n, trade in enumerate(second) if trade.symbol == "XRP-USD" and n > 20)
        poison: dict[str, Any] = {"price_value": "much"}
        if how == "kills":
            poison = {"trade_id": Reduced("bad", os._exit, 9)}
        rows, left = await pool.submit([*second[:at], second[at]._replace(**poison), *second[at:]])
        assert f"computed: {'WorkerDied' if how == 'kills' else 'TypeError'}: " in caplog.records[-1].getMessage()
        lost, rest = ([t for t in second if (t.symbol == "XRP-USD") is is_lost] for is_lost in (True, False))
        assert len(left) == len(lost) + 1
        assert {trade.symbol for trade in left} == {"XRP-USD"}
        assert sorted(rows) == control.submit(rest) != []
        assert sorted(await submitted(pool, third)) == control.submit(third)
        stats = pool.stats()
        assert (stats.died, stats.rebuilt) == {"kills": (2, 2), "raises": (0, 1)}[how]
        assert (stats.trades, stats.uncomputed) == (180 - len(lost), len(lost) + 1)

    market_workers_run(main, attempts=2)


def test_a_process_computes_nothing_from_another_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, what runs in a worker."""
    for name in ("analytics", "number"):
        monkeypatch.setattr(mw._WorkerState, name, getattr(mw._WorkerState, name))
    good = ("kraken", "BTC-USD", 1.0, 1.0, "", 10**18, 10**18, "")
    first, bad = (pickle.dumps([good, (*good[:2], price, *good[3:])]) for price in (1.0, "much"))
    assert mw._work(1, first, False, False) is None
    assert mw._rebuild({}, None, 6, []) == os.getpid()
    assert [mw._work(number, first, False, False) is None for number in (6, 8, 0)] == [True] * 3
    done = mw._work(7, first, False, True)
    assert done is not None
    assert done.counts[:2] == (2, 2)
    assert mw._work(7, first, False, False) is None
    with pytest.raises(TypeError):
        mw._work(8, bad, False, False)
    assert mw._work(8, first, False, False) is None
    mw._rebuild({"every": 100.0}, None, 7, [(first, False), (first, True)])
    assert mw._WorkerState.number == 9
    assert mw._work(10, pickle.dumps([]), True, False) == mw._Done([], (4, 4, *[0] * 7, 1, 2, 0), None)
    mw._rebuild({}, done.checkpoint, 7, [(first, False), (first, True)])
    again = mw._work(10, first, False, False)
    assert again is not None
    assert again.counts[:2] == (8, 8)


def test_one_that_hangs_is_replaced() -> None:
    control = Control()

    async def main(pool: mw.AnalyticsPool) -> None:
        first, second = market_workers_batches(5, 2)
        assert sorted(await submitted(pool, first)) == control.submit(first)
        pool._slots[0].timeout = 0.1
        os.kill(victim := pool.stats().pids[0], signal.SIGSTOP)
        job = asyncio.create_task(submitted(pool, second))
        await until_async(lambda: pool.stats().died == 1)
        pool._slots[0].timeout = HANG_LIMIT
        assert sorted(await job) == control.submit(second)
        await until_async(lambda: proc_gone(victim))
        assert pool.stats().rebuilt == 1

    market_workers_run(main, attempts=100)


def test_a_cancelled_batch_is_not_in_the_state(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")
    control = Control()

    async def main(pool: mw.AnalyticsPool) -> None:
        first, second, third = market_workers_batches(6, 3)
        assert sorted(await submitted(pool, first)) == control.submit(first)
        held = second[30]._replace(trade_id=cast(Any, Reduced("gate", Path.read_text, gate)))
        job = asyncio.create_task(pool.submit([*second[:30], held, *second[30:]]))
        writer = await proc_writer(gate)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        os.close(writer)
        assert sorted(await submitted(pool, third)) == control.submit(third)
        assert pool.stats().died == 0
        assert pool.stats().rebuilt == 1

    market_workers_run(main, workers=1)


def test_calls_wait_their_turn(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")

    async def main(pool: mw.AnalyticsPool) -> None:
        held = market_stats_trade(1.0, trade_id=cast(Any, Reduced("gate", Path.read_text, gate)))
        ended = list[int]()

        async def call(n: int) -> None:
            await pool.submit([held if n == 0 else market_stats_trade(1.0 + n)])
            ended.append(n)

        jobs = [asyncio.create_task(call(n)) for n in range(6)]
        writer = await proc_writer(gate)
        assert pool.stats()[2:4] == (2, 4)
        jobs[3].cancel()
        os.write(writer, b"id")
        os.close(writer)
        await asyncio.gather(*jobs, return_exceptions=True)
        assert ended == [0, 1, 2, 4, 5]
        assert pool.analytics().taken == 5

    market_workers_run(main, workers=1, waiting=2)


def test_close_tells_what_it_leaves(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")

    async def main(pool: mw.AnalyticsPool) -> None:
        held = market_stats_trade(1.0, trade_id=cast(Any, Reduced("gate", Path.read_text, gate)))
        jobs = [asyncio.create_task(pool.submit([held])) for _ in range(3)]
        writer = await proc_writer(gate)
        await pool.close()
        os.close(writer)
        *begun, waits = await asyncio.gather(*jobs, return_exceptions=True)
        for outcome in begun:
            assert outcome == ([], [held])
        assert isinstance(waits, processes.PoolClosed)
        with pytest.raises(processes.PoolClosed):
            await pool.submit([market_stats_trade(2.0)])
        with pytest.raises(processes.PoolClosed):
            await pool.flush()
        await pool.close()

    market_workers_run(main, workers=1, waiting=2)


def test_what_is_retained_is_bounded() -> None:
    async def main(pool: mw.AnalyticsPool) -> None:
        (slot,) = pool._slots
        for n in range(2 * mw.MAX_LOG + 3):
            await pool.submit([market_stats_trade(n / 100)])
            assert len(slot.log) <= mw.MAX_LOG
        assert pool.stats().checkpoints == 2
        stream = market_stats_stream(7, 20_000, 200.0)
        for begin in range(0, len(stream), 2_000):
            await pool.submit(stream[begin : begin + 2_000])
            assert slot.log_bytes <= max(100_000, len(slot.checkpoint or b""))
        assert pool.stats().checkpoints > 5
        assert pool.stats().retained == slot.log_bytes + len(slot.checkpoint or b"")
        assert slot.log_bytes == sum(len(packed) for packed, _ in slot.log)

    market_workers_run(main, workers=1, retained=100_000)


def test_symbols_are_shared_out_evenly_and_remembered_boundedly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mw, "MAX_SYMBOLS", 6)
    pool = mw.AnalyticsPool(3)
    homes = [pool._home(f"S{n}") for n in range(6)]
    assert [pool._slots.index(home) for home in homes] == [0, 1, 2, 0, 1, 2]
    assert pool.stats().symbols == (2, 2, 2)
    assert pool._home("another") is pool._home("another")
    assert len(pool._homes) == 6
    asyncio.run(pool.close())
