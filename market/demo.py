"""``market_pipeline.py --demo``: simulated exchanges that trade for some seconds, a broker, and what is in Kafka then.

The exchanges have a thread; the broker, unless one is named, is a process, in a temporary folder. ``play`` stops the
program; ``report`` compares what was sent with what the topics hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer

from market.consumers import records_now
from market.display import MarketCounts, columns, latency, percent, price
from market.flow import MarketOptions
from market.stats import ALL
from market.topics import ANALYTICS, DEAD_LETTERS, TRADES, decode
from market.trade import Trade
from runtime.demo import Demo
from runtime.options import CannotStart
from runtime.shell import Program
from runtime.stderr import say

DEMO_PATIENCE = 15.0  # seconds without an answer of Kafka


class MarketDemo(Demo):
    """Simulated exchanges that trade for some seconds, one of which fails, and, unless one is named, a broker."""

    def __init__(self, options: MarketOptions, seconds: float, rate: float) -> None:
        super().__init__("market_pipeline", options)
        self._seconds, self._rate = seconds, rate
        self._exchanges: Any = None

    def begin(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        """The exchanges, and a broker if none is named."""
        from sandbox.broker import Broker
        from sandbox.exchanges import WIRES
        from sandbox.markets import Exchanges

        changes: dict[str, Any] = {"stocks": ()}
        if self.options.kafka is not None and not self.options.prefix:
            changes["prefix"] = f"demo-{os.urandom(4).hex()}-"  # simulated trades are not to be among real ones
        if self.options.kafka is None:
            if Broker.program() is None:
                raise CannotStart("--demo needs a broker: pip install noida-db, or --kafka HOST:PORT")
            called = "the broker for development"
            changes["kafka"] = self.start(stack, Broker, called, self.folder / "broker", called)
        names = tuple(name for name in self.options.exchanges if name in WIRES)
        if not names:
            raise CannotStart(f"the demo has {', '.join(WIRES)} only")
        self._exchanges = Exchanges(rate=self._rate, symbols=self.options.symbols, exchanges=names)
        stack.enter_context(self._exchanges)
        return changes | {"urls": self._exchanges.urls, "exchanges": names}

    async def play(self, program: Program[MarketCounts]) -> None:
        """Some faults in passing; after the time, stop."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._seconds
        names = self.options.exchanges
        faults = ((names[2 % len(names)], "close"), (names[0], "gap"), (names[-1], "not json"))
        try:
            for n, (name, fault) in enumerate(faults):
                await asyncio.sleep(self._seconds * 0.25 if not n else self._seconds * 0.1)
                await asyncio.to_thread(self._exchanges.fault, name, fault)
            await asyncio.sleep(max(0.0, end - loop.time()))
        finally:
            if not program.snapshot().stopping:
                program.stop()

    def report(self, counts: MarketCounts) -> bool:
        """Print what is in Kafka; whether that is what was sent, in the right places."""
        sent = sum(each.sent for each in self._exchanges.stats().values())
        try:
            trades, rows, letters = asyncio.run(self._look())
        except Exception as error:
            say("market_pipeline", f"Kafka cannot be read: {error}")
            return False
        found = [decode(record.value) for record in trades]
        live = {(each.exchange, each.symbol, each.trade_id) for each in found if "snapshot" not in each.flags}
        wrong = _misplaced(trades) + _misplaced(rows)
        print(f"trades sent       {sent:>9,}    (snapshots come on top)")
        print(f"in Kafka          {len(trades):>9,}    of {len(live):,} live trades, {len(found) - len(live):,} others")
        print(f"rows of analytics {len(rows):>9,}")
        print(f"dead letters      {len(letters):>9,}")
        print(f"in a wrong partition, or with a wrong key: {wrong}\n")
        print(self._symbols([orjson.loads(record.value) for record in rows], found), end="\n\n")
        print(self._by_exchange(found, counts))
        return (
            sent == len(live) and not wrong and len(trades) == counts.published.published - counts.dead - counts.events
        )

    def _symbols(self, rows: Sequence[Mapping[str, Any]], trades: Sequence[Trade]) -> str:
        windows = [str(window) for window in self.options.windows]
        lines: list[tuple[str, ...]] = [
            ("symbol", "trades", "last", "vwap", *(f"volatility {w} s" for w in windows), "ewma", "spread")
        ]
        counts, last = Counter(trade.symbol for trade in trades), dict[str, Mapping[str, Any]]()
        for row in rows:
            if row["exchange"] == ALL and row["ts_event"] >= last.get(row["symbol"], row)["ts_event"]:
                last[row["symbol"]] = row
        for symbol, row in sorted(last.items()):
            volatility = (percent(row["volatility"][w]) for w in windows)
            cells = (f"{counts[symbol]:,}", price(row["last"]), price(row["vwap"][windows[-1]]))
            lines.append((symbol, *cells, *volatility, percent(row["ewma"]), price(row["spread"])))
        return columns(lines)

    def _by_exchange(self, trades: Sequence[Trade], counts: MarketCounts) -> str:
        lines: list[tuple[str, ...]] = [
            ("exchange", "trades", "gaps", "missed", "repeated", "bad", "reconnects", "lag")
        ]
        by_exchange = Counter(trade.exchange for trade in trades)
        for name, feed in counts.feeds.items():
            cells = (by_exchange[name], feed.gaps, feed.missed, feed.duplicates, feed.bad, feed.reconnects)
            lines.append((name, *(f"{cell:,}" for cell in cells), latency(feed.lag)))
        return columns(lines)

    async def _look(self) -> tuple[list[Any], list[Any], list[Any]]:
        """All records of the three topics."""
        topics = [self.options.prefix + name for name in (TRADES, ANALYTICS, DEAD_LETTERS)]
        consumer = AIOKafkaConsumer(*topics, bootstrap_servers=self.options.kafka, auto_offset_reset="earliest")
        try:
            await consumer.start()
            found = {topic: list[Any]() for topic in topics}
            async for portion in records_now(consumer, list(consumer.assignment()), DEMO_PATIENCE):
                for place, records in portion.items():
                    found[place.topic] += records
            return found[topics[0]], found[topics[1]], found[topics[2]]
        finally:
            await consumer.stop()


def _misplaced(records: Sequence[Any]) -> int:
    """Records whose key is not their symbol, or whose symbol is in another partition as well."""
    places, wrong = dict[bytes, int](), 0
    for record in records:
        key = record.key or b""
        wrong += (
            key.decode() != orjson.loads(record.value)["symbol"]
            or places.setdefault(key, record.partition) != record.partition
        )
    return wrong
