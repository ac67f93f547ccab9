"""What is in Kafka: which of the trades, how often, and since when a consumer could read them.

End to end is from the time that the exchange wrote into the trade, when it was due, until a consumer can read it. That
is seen from the partitions' high watermarks, which somebody looks at often (`Marks`); the records themselves are read
when all is over, for a consumer of 15,000 records/s would need a processor of its own.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer

from bench.market_contestants import EVENT_IDS
from sandbox.markets import FIRST

SECOND = 1_000_000_000


class Marks:
    """From when on the offsets of a partition could be read."""

    def __init__(self) -> None:
        self._ends, self._seen = array("q"), array("q")
        self._at = 0

    def note(self, end: int, now_ns: int) -> None:
        if not self._ends or end > self._ends[-1]:
            self._ends.append(end)
            self._seen.append(now_ns)

    def readable(self, offset: int) -> int:
        """Unix time, ns. Offsets are asked for in ascending order, and none that was not seen."""
        while self._ends[self._at] <= offset:
            self._at += 1
        return self._seen[self._at]


class Ledger:
    """Which trades of those that were sent are there; ``each``: how many of each symbol at each exchange."""

    def __init__(self, each: int, pairs: int) -> None:
        self._each, self._pairs = each, pairs
        self._seen: dict[tuple[str, str], bytearray] = {}
        self.repeated = self.others = 0
        self.whole, self.inside = array("d"), array("d")
        """Seconds end to end, and from receipt."""

    def take(self, exchange: str, symbol: str, trade_id: str, sent: float, received: float, readable: float) -> None:
        seen = self._seen.get((exchange, symbol))
        if seen is None:
            seen = self._seen[exchange, symbol] = bytearray(self._each)
        number = int(trade_id[-12:], 16) if "-" in trade_id else int(trade_id) - EVENT_IDS.get(exchange, 0)
        place = number - FIRST - 1
        if not 0 <= place < self._each:
            self.others += 1  # of a snapshot
        elif seen[place]:
            self.repeated += 1
        else:
            seen[place] = 1
            self.whole.append(readable - sent)
            self.inside.append(readable - received)

    @property
    def missing(self) -> int:
        return self._each * self._pairs - len(self.whole)


def share(values: Sequence[float], part: float) -> float | None:
    """So much of the values is not above it; they are sorted."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else None


@contextlib.asynccontextmanager
async def listening(address: str, topics: Sequence[str]) -> AsyncIterator[Any]:
    """A consumer of all that is in the topics; nothing is fetched before it is resumed."""
    consumer = AIOKafkaConsumer(
        *topics,
        bootstrap_servers=address,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        max_partition_fetch_bytes=4 << 20,
    )
    await consumer.start()
    try:
        consumer.pause(*consumer.assignment())
        yield consumer
    finally:
        await consumer.stop()


async def count(address: str, topic: str) -> int:
    async with listening(address, [topic]) as consumer:
        return sum((await consumer.end_offsets(list(consumer.assignment()))).values())


async def read(consumer: Any, marks: dict[Any, Marks], each: int, pairs: int) -> Ledger:
    """All that is in the topics now. What was not readable while the contestant ran is taken to be from now on."""
    ledger, places = Ledger(each, pairs), list(consumer.assignment())
    ends = await consumer.end_offsets(places)
    for place, end in ends.items():
        marks.setdefault(place, Marks()).note(end, time.time_ns())
    left = {place for place in places if ends[place]}
    consumer.resume(*places)
    while left:
        for place, records in (await consumer.getmany(timeout_ms=1000, max_records=5000)).items():
            readable = marks[place].readable
            for record in records:
                at, found = readable(record.offset) / SECOND, orjson.loads(record.value)
                who = found["exchange"], found["symbol"]
                if "trade_id" in found:
                    times = found["ts_event"] / SECOND, found["ts_recv"] / SECOND
                    ledger.take(*who, found["trade_id"], *times, at)
                else:
                    ledger.take(*who, found["id"], found["timestamp"], found["receipt_timestamp"], at)
            if records[-1].offset + 1 >= ends[place]:
                left.discard(place)
    return ledger
