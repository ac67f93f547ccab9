"""The readers of the topics: members of a consumer group, and whoever wants the dead letters.

Promised by ``Group``
- Any number of processes share the symbols of a topic: a partition is read by one of them at a time, and what nobody
  committed is read again after a death. ``commit`` after publishing: each trade is computed at least once.
- With ``look_back`` seconds, a partition that is taken over begins that long before its last committed record, so that
  the windows can be filled again; those trades come as ``again``, and are for the state only.
- A record that is no trade stops nobody: it comes as a dead letter.

Not promised: that a member which was away for longer than Kafka's session learns of it before its ``commit`` (which
then does nothing, and says so).

All is for one event loop, without locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from coordination import stats_repr
from market.topics import (
    BACK_OFF,
    DEAD_LETTERS,
    TRADES,
    DeadLetter,
    decode,
    letter_of_record,
    log,
    unpublishable_letter,
)
from market.trade import Trade
from primitives import Backoff

REQUEST_TIMEOUT = 10.0  # seconds
SESSION = 10.0  # seconds without a heartbeat after which a member is taken for dead


async def _connected_consumer(brokers: str, group: str | None, options: Mapping[str, Any], limit: float) -> Any:
    """A consumer that is connected; tries for ``limit`` seconds, then raises ``TimeoutError``."""
    begun, backoff = time.monotonic(), Backoff(*BACK_OFF)
    while True:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=brokers,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            request_timeout_ms=int(REQUEST_TIMEOUT * 1000),
            fetch_max_wait_ms=100,
            **options,
        )
        try:
            await consumer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await consumer.stop()
            delay = backoff.next()
            if time.monotonic() - begun + delay > limit:
                raise TimeoutError(f"no broker at {brokers} in {limit:g} s") from error
            await asyncio.sleep(delay)
        except BaseException:
            await consumer.stop()
            raise
        else:
            return consumer


async def records_now(
    consumer: AIOKafkaConsumer, places: Sequence[TopicPartition], limit: float
) -> AsyncIterator[dict[TopicPartition, list[Any]]]:
    """What is in these partitions now, in portions. ``TimeoutError`` if nothing came for ``limit`` seconds."""
    ends, waited = await consumer.end_offsets(places) if places else {}, time.monotonic()
    while [place for place in places if await consumer.position(place) < ends[place]]:
        found = await consumer.getmany(timeout_ms=200, max_records=500)
        if found:
            yield {place: [each for each in records if each.offset < ends[place]] for place, records in found.items()}
            waited = time.monotonic()
        elif time.monotonic() - waited > limit:
            raise TimeoutError(f"no answer in {limit:g} s")


async def dead_letters(
    brokers: str,
    *,
    prefix: str = "",
    group: str | None = None,
    before_commit: Callable[[], Awaitable[None]] | None = None,
    limit: float = 30.0,
    security: Mapping[str, Any] | None = None,
) -> AsyncIterator[DeadLetter]:
    """The dead letters that are there now, in the order of each partition. ``TimeoutError`` without a broker.

    With a ``group`` those that it has not committed; each lot is committed when the next is asked for, after
    ``before_commit`` (``Publisher.flush``: what came of them is published). Left early, the lot comes again.
    """
    consumer = await _connected_consumer(brokers, group, security or {}, limit)
    try:
        topic = prefix + DEAD_LETTERS
        places = [TopicPartition(topic, n) for n in await _partitions(consumer, topic)]
        consumer.assign(places)
        async with contextlib.aclosing(records_now(consumer, places, limit)) as every:  # type: ignore[type-var]
            async for lot in every:
                for record in itertools.chain.from_iterable(lot.values()):
                    yield letter_of_record(record.value, record.headers)
                if group is not None:
                    if before_commit is not None:
                        await before_commit()
                    await consumer.commit({place: got[-1].offset + 1 for place, got in lot.items() if got})
    finally:
        await consumer.stop()


async def _partitions(consumer: Any, topic: str) -> list[int]:
    """Of a topic that may not be there: none then, and it is not made."""
    if topic not in await consumer.topics():
        return []
    return sorted(await consumer._client._wait_on_metadata(topic))


class Taken(NamedTuple):
    """What came from the topic."""

    trades: list[Trade]
    again: list[Trade]  # of before the committed offset: for the state only
    dead: list[DeadLetter]  # records that are no trades


class GroupStats(NamedTuple):
    """The partitions that a member has now, and counts since it began."""

    partitions: tuple[int, ...]
    commits: int
    rebalances: int
    silent: float
    """Seconds since a partition answered; or, while the group forms, since it began to."""


class Group(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of the consumer group ``group`` of the topic ``trades``. One task uses it.

    ``revoked`` is told, and waited for, before partitions go to others: publish and ``commit`` there, and forget their
    symbols. ``look_back``, ``heartbeat`` (after which members hear of another): seconds.
    """

    def __init__(
        self,
        brokers: str,
        group: str = "market-analyse",
        *,
        prefix: str = "",
        look_back: float = 0.0,
        revoked: Callable[[], Awaitable[None]] | None = None,
        heartbeat: float = 1.0,
        security: Mapping[str, Any] | None = None,
    ) -> None:
        self.topic = prefix + TRADES
        self._brokers, self._group, self._look_back, self._revoked = brokers, group, look_back, revoked
        self._security = security or {}
        self._member = {"heartbeat_interval_ms": int(heartbeat * 1000), "session_timeout_ms": int(SESSION * 1000)}
        self._consumer: Any = None
        self._done: dict[TopicPartition, int] = {}
        """Where to go on: what is below was taken, or had been committed before."""
        self._heard, self._forming = time.time(), False
        self._commits = self._rebalances = 0

    async def start(self, limit: float = 30.0) -> None:
        """Join. ``TimeoutError`` without a broker or the topic: to subscribe would make it, in the wrong size."""
        begun, backoff = time.monotonic(), Backoff(*BACK_OFF)
        try:
            options = {**self._security, **self._member}
            self._consumer = await _connected_consumer(self._brokers, self._group, options, limit)
            while self.topic not in await self._consumer.topics():
                if time.monotonic() - begun > limit:
                    raise TimeoutError(f"no topic {self.topic} in {limit:g} s")
                await asyncio.sleep(backoff.next())
            self._heard, self._forming = time.time(), True
            self._consumer.subscribe([self.topic], listener=self)
        except BaseException:
            await asyncio.shield(asyncio.create_task(self.stop()))
            raise

    async def stop(self) -> None:
        """Leave the group; what is not committed is another's."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()

    async def take(self, wait: float = 0.5, at_once: int = 2000) -> Taken:
        """What there is, after ``wait`` seconds at the most; maybe nothing."""
        trades, again, dead = list[Trade](), list[Trade](), list[DeadLetter]()
        lot = await self._consumer.getmany(timeout_ms=int(wait * 1000), max_records=at_once)
        for place, records in lot.items():
            floor = self._done.get(place, 0)
            for record in records:
                try:
                    (again if record.offset < floor else trades).append(decode(record.value or b""))
                except ValueError as error:
                    if record.offset >= floor:
                        dead.append(unpublishable_letter(record.value or b"", error))
            self._done[place] = max(floor, records[-1].offset + 1)
        return Taken(trades, again, dead)

    async def commit(self) -> bool:
        """All that was taken is done with. False if the partitions are another's by now, or nobody answers."""
        if not self._done:
            return True
        try:
            await self._consumer.commit(dict(self._done))
        except (CommitFailedError, IllegalStateError, KafkaError) as error:
            log.warning("kafka: not committed: %s", error)
            return False
        self._commits += 1
        return True

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Called by aiokafka before partitions go to others."""
        self._heard, self._forming = time.time(), True
        if revoked and self._revoked is not None:
            await self._revoked()
        for place in revoked:
            self._done.pop(place, None)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by aiokafka when partitions have come: they begin ``look_back`` seconds before what is committed."""
        self._rebalances += 1
        self._done = {}
        self._consumer.pause(*assigned)  # ``take`` gets nothing of them before it is clear where they begin
        try:
            for place in assigned:
                committed = await self._consumer.committed(place)
                if committed is not None:
                    self._done[place] = committed
            if self._look_back > 0 and self._done:
                for place, offset in (await self._before(dict(self._done))).items():
                    self._consumer.seek(place, offset)
        except (KafkaError, TimeoutError) as error:  # no windows from before; else the partitions would hang
            log.warning("kafka: no look back: %s", error)
        finally:
            self._consumer.resume(*assigned)
            self._heard, self._forming = time.time(), False

    async def _before(self, committed: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        """Where each partition was ``look_back`` seconds before its last committed record."""
        places = [place for place, offset in committed.items() if offset > 0]
        reader = await _connected_consumer(self._brokers, None, self._security, REQUEST_TIMEOUT)
        try:
            times = dict[TopicPartition, int]()
            reader.assign(places)
            for place in places:
                reader.seek(place, committed[place] - 1)
            deadline = time.monotonic() + REQUEST_TIMEOUT
            while len(times) < len(places) and time.monotonic() < deadline:
                for place, records in (await reader.getmany(timeout_ms=200, max_records=len(places))).items():
                    times.setdefault(place, max(0, records[0].timestamp - int(self._look_back * 1000)))
                    reader.pause(place)
            found = await reader.offsets_for_times(times) if times else {}
        finally:
            await reader.stop()
        return {place: min(at.offset, committed[place]) for place, at in found.items() if at is not None}

    def stats(self) -> GroupStats:
        """The counts, and the partitions."""
        places, silent = self._consumer.assignment() if self._consumer is not None else (), 0.0
        if places or self._forming:
            polled = [] if self._forming else [self._consumer.last_poll_timestamp(place) or 0 for place in places]
            silent = max(0.0, time.time() - max([self._heard, *(ms / 1000 for ms in polled)]))
        places = tuple(sorted(place.partition for place in places))
        return GroupStats(places, self._commits, self._rebalances, silent)

    __repr__ = stats_repr
