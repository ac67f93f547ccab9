"""Analytics in processes: every symbol has one worker, which keeps its state; one that dies takes nothing with it.

A worker is a ``processes.Processes`` of one process. What is added here is state, which a pool whose jobs go to any
worker cannot have. Jobs have numbers: a process does n + 1 only after n, so a fresh one (after a kill, out of memory, a
time-out) computes nothing from nothing. It is rebuilt first, from the *retained window*: a checkpoint of the state, and
the batches since. Then the batch is tried again.

Promised
- Rows are the same, to the last bit, as if no worker had died: rebuilding does what was done, in the same order.
- A batch whose rows came back is in the state once, any other not at all: what a worker did and did not tell died
  with it.
- A batch is begun ``attempts`` times at most. Then, or at once if it raises or ``close`` cuts it off, its trades
  are lost: in no state and no row. The worker goes on without it, and the others with theirs.
- Backpressure: ``waiting`` calls of at most MOST trades at a time; further ones wait, first come, first served.
- Bounded: a worker's batches since its checkpoint have at most ``retained`` bytes (or as many as the checkpoint, if
  that has more) and are at most MAX_LOG; the next job then brings a new checkpoint. ``Analytics`` bounds the state.
- The loop is held for the packing of a call's trades, under 1 ms, and while ``Processes`` pickles a job.

Not promised: anything about a call that was cancelled, of which some workers may have done their part and others not.
A symbol's worker is the one that has the fewest symbols when it first comes (with three symbols a hash may put all on
one); in the next run, which begins without state, it may be another. Machines share symbols by Kafka's partitions.

A batch travels as a pickle of tuples of the eight fields that count (0.35 us of CPU per trade, 1.4 of the ``Trade``s
themselves). On two processors 130,000 trades/s with one worker, 190,000 with two.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from zlib import crc32

from coordination import Semaphore, fan_out, stats_repr
from market.stats import Analytics, AnalyticsRow, AnalyticsStats
from market.topics import log
from market.trade import Trade
from runtime.processes import PoolClosed, Processes, WorkerDied

MAX_LOG = 256  # batches that a worker is rebuilt from at most, beside its checkpoint
MOST = 2_048  # trades per job
MAX_SYMBOLS = 100_000  # whose workers are remembered; those of more are found by hash
FIELDS = ("exchange", "symbol", "price_value", "size_value", "trade_id", "ts_event", "ts_recv", "flags")
"""What ``Analytics.take`` takes, in its order."""

_fields = itemgetter(*(Trade._fields.index(name) for name in FIELDS))
_Logged = tuple[bytes, bool]


class _WorkerState:
    """A worker's state: after job ``number``. None: nothing can be computed here."""

    analytics: Analytics | None = None
    number = -1


class _Done(NamedTuple):
    rows: list[tuple[Any, ...]]
    counts: tuple[int, ...]
    checkpoint: bytes | None


def _rebuild(options: Mapping[str, Any], checkpoint: bytes | None, number: int, log: Sequence[_Logged]) -> int:
    """Bring this process to the state after job ``number`` + the jobs of the log; returns its id."""
    _WorkerState.analytics = Analytics(**options) if checkpoint is None else pickle.loads(checkpoint)
    _WorkerState.number = number
    for packed, everything in log:
        if _work(_WorkerState.number + 1, packed, everything, False) is None:
            raise RuntimeError("cannot be")
    return os.getpid()


def _work(number: int, packed: bytes, everything: bool, checkpoint: bool) -> _Done | None:
    """Job ``number``; None if this process is not in the state after the one before."""
    analytics = _WorkerState.analytics
    if analytics is None or _WorkerState.number != number - 1:
        return None
    _WorkerState.analytics = None  # until it is whole again
    take = analytics.take
    for fields in pickle.loads(packed):
        take(*fields)
    rows = [tuple(row) for row in analytics.due(everything)]
    done = _Done(rows, tuple(analytics.stats()), pickle.dumps(analytics, 5) if checkpoint else None)
    _WorkerState.analytics, _WorkerState.number = analytics, number
    return done


class AnalyticsPoolStats(NamedTuple):
    """``died``: workers that died or were late. ``retained``: bytes that the workers would be rebuilt from."""

    pids: tuple[int, ...]
    symbols: tuple[int, ...]
    running: int
    waiting: int
    trades: int
    rows: int
    died: int
    rebuilt: int
    checkpoints: int
    uncomputed: int
    retained: int


class _Slot:
    """One worker. One job at a time, under ``turn``."""

    def __init__(self, options: Mapping[str, Any], attempts: int, timeout: float, retained: int) -> None:
        self.options, self.attempts, self.timeout, self.most = options, attempts, timeout, retained
        self.pool, self.turn = Processes(1, waiting=1, attempts=1, nice=0), asyncio.Lock()
        """On a busy machine nicer processes fall behind."""
        self.checkpoint: bytes | None = None
        self.log: list[_Logged] = []
        self.log_bytes = self.number = 0  # the last job that is in the log or the checkpoint
        self.pid = self.symbols = self.died = self.rebuilt = self.checkpoints = 0
        self.counts = tuple(Analytics(**options).stats())
        self.ready = False  # as far as is known

    async def run(self, packed: bytes, everything: bool) -> list[AnalyticsRow]:
        """The rows of a job. Raises ``WorkerDied``, ``TimeoutError``, ``PoolClosed``, what the job raised."""
        async with self.turn:
            size = self.log_bytes + len(packed)
            full = size > max(self.most, len(self.checkpoint or b"")) or len(self.log) >= MAX_LOG
            done = await self._attempt(packed, everything, full)
            self.number += 1
            self.counts = done.counts
            if done.checkpoint is None:
                self.log.append((packed, everything))
                self.log_bytes = size
            else:
                self.checkpoint, self.log, self.log_bytes = done.checkpoint, [], 0
                self.checkpoints += 1
            return list(map(AnalyticsRow._make, done.rows))

    async def _attempt(self, packed: bytes, everything: bool, checkpoint: bool) -> _Done:
        job = _work, self.number + 1, packed, everything, checkpoint
        failure: Exception | None = None
        for _ in range(self.attempts):
            ready, self.ready = self.ready, False  # until it is done
            try:
                if not ready:
                    await self._rebuild()
                done = await self.pool.run(*job, timeout=self.timeout)
            except (WorkerDied, TimeoutError) as error:
                failure = error
            else:
                if done is not None:
                    self.ready = True
                    return done
                failure = WorkerDied("the worker process died between jobs")
            self.died += 1
        assert failure is not None
        raise failure

    async def _rebuild(self) -> None:
        number, again = self.number - len(self.log), self.pid != 0
        job = _rebuild, self.options, self.checkpoint, number, self.log
        self.pid = await self.pool.run(*job, timeout=self.timeout)
        self.rebuilt += again


class AnalyticsPool:
    """``await submit(trades)`` in ``workers`` processes (None: all processors but one); ``options`` are ``Analytics``'.

    ``waiting`` calls at a time, ``timeout`` seconds per attempt of a job. ``retained``: bytes per worker.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        waiting: int = 8,
        attempts: int = 3,
        timeout: float = 10.0,
        retained: int = 2_000_000,
    ) -> None:
        workers = max(1, (os.cpu_count() or 1) - 1) if workers is None else workers
        self._slots = [_Slot(options or {}, attempts, timeout, retained) for _ in range(workers)]
        self._places = Semaphore(waiting)
        self._homes: dict[str, _Slot] = {}
        self._trades = self._rows = self._uncomputed = 0
        self._closed = False

    async def start(self) -> None:
        """Have the processes started. Raises ``WorkerDied``, ``TimeoutError``."""
        await asyncio.gather(*(slot.run(pickle.dumps([]), False) for slot in self._slots))

    async def submit(self, trades: Sequence[Trade]) -> tuple[list[AnalyticsRow], list[Trade]]:
        """Take the trades into the state; the rows that are due, and the trades that are lost. ``PoolClosed``."""
        rows, lost, parts = list[AnalyticsRow](), list[Trade](), dict[_Slot, list[Trade]]()
        async with self._places:
            if self._closed:
                raise PoolClosed
            for trade in trades:
                parts.setdefault(self._homes.get(trade.symbol) or self._home(trade.symbol), []).append(trade)
            packed = {slot: pickle.dumps(list(map(_fields, part)), 5) for slot, part in parts.items()}
            outcomes = await fan_out({slot: slot.run(data, False) for slot, data in packed.items()})
        for slot, (_, found, error) in outcomes.items():
            rows += found or ()
            if error is not None:
                log.warning("%d trades could not be computed: %s: %s", len(parts[slot]), type(error).__name__, error)
                lost += parts[slot]
        self._rows += len(rows)
        self._trades += len(trades) - len(lost)
        self._uncomputed += len(lost)
        return rows, lost

    async def flush(self) -> list[AnalyticsRow]:
        """The rows that are not due yet: of all series that changed since they were told, but for workers that died."""
        async with self._places:
            if self._closed:
                raise PoolClosed
            outcomes = await fan_out({slot: slot.run(pickle.dumps([]), True) for slot in self._slots})
        rows = [row for outcome in outcomes.values() for row in outcome.value or ()]
        self._rows += len(rows)
        return rows

    def _home(self, symbol: str) -> _Slot:
        """The worker of a symbol that has none yet."""
        if len(self._homes) >= MAX_SYMBOLS:
            return self._slots[crc32(symbol.encode(errors="replace")) % len(self._slots)]
        slot = self._homes[symbol] = min(self._slots, key=lambda slot: slot.symbols)
        slot.symbols += 1
        return slot

    async def close(self) -> None:
        """Kill the processes: calls that run lose their trades, those that wait raise ``PoolClosed``."""
        self._closed = True
        await asyncio.gather(*(slot.pool.close(0.0) for slot in self._slots))

    def analytics(self) -> AnalyticsStats:
        """The counts of all workers together, as their last jobs told them."""
        return AnalyticsStats(*map(sum, zip(*(slot.counts for slot in self._slots), strict=True)))

    def stats(self) -> AnalyticsPoolStats:
        """Where the workers stand."""
        slots, places = self._slots, self._places.stats()
        retained = sum(slot.log_bytes + len(slot.checkpoint or b"") for slot in slots)
        return AnalyticsPoolStats(
            tuple(slot.pid for slot in slots), tuple(slot.symbols for slot in slots),
            places.permits - places.available, places.waiting, self._trades, self._rows,
            sum(slot.died for slot in slots), sum(slot.rebuilt for slot in slots),
            sum(slot.checkpoints for slot in slots), self._uncomputed, retained,
        )  # fmt: skip

    __repr__ = stats_repr
