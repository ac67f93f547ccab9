"""One aiokafka producer after another: what is sent, acknowledged, refused, or has to be sent again.

Records become batches, one for each partition (``create_batch``: a quarter of what ``send`` costs). The partition
follows from the key as in the Java client (murmur2), so a symbol is in one partition, in the order of ``publish``.

Promised: the producer is idempotent; what was under way when the broker froze or went is sent again under its old
sequence number. A batch that the broker refuses for the sake of a record in it is halved until the culprit is alone;
``publish`` hands that back, and all else is acknowledged when it returns.

All is for one event loop; there is no lock. Encoding and compression run in it, at most ``AT_ONCE`` records and
``ROUND_BYTES`` in one go (3 to 5 ms). On a loop that others keep busy a round costs some fifteen turns, whatever is in
it: so rounds are large. aiokafka has no public way to leave a broker that does not answer: ``_abandon`` is the one
place that touches what is private there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    CorruptRecordException,
    InvalidMessageError,
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    UnknownTopicOrPartitionError,
)
from aiokafka.partitioner import DefaultPartitioner

from market.topics import BACK_OFF, Record, log
from primitives import Backoff

FLIGHT, FLIGHT_BYTES = 5000, 1_300_000
"""Records that are under way together at most, and bytes of their values, or one more."""
AT_ONCE = 1000  # records that are encoded, or put into batches, in one go
ROUND_BYTES = {"gzip": 180_000, "lz4": 500_000}
"""Of the values of one round, which are compressed in one go; by the kinds that are slow."""
BATCH_BYTES = 950_000  # of a batch; Kafka's own default for the largest is 1,048,588
RENEW_AFTER = 1 << 30
"""Records of one producer: aiokafka's sequence numbers turn negative at 2**31 in a partition, where Kafka's turn 0."""
KEYS = 100_000  # symbols whose partition is remembered
RECORDS_FAULT = (
    CorruptRecordException,
    InvalidMessageError,
    InvalidTimestampError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)
"""What the broker says of a batch for the sake of a record in it."""


class _Piece(NamedTuple):
    batch: Any
    rows: list[Record]


def rounds(rows: Sequence[Record], most: int) -> Iterator[list[Record]]:
    """In their order, each with at most so many bytes, or a little more."""
    begin = size = 0
    for n, row in enumerate(rows, 1):
        size += len(row.value)
        if size >= most or n == len(rows):
            yield list(rows[begin:n])
            begin, size = n, 0


async def _force(task: asyncio.Task[Any]) -> None:
    """Cancel until it is over: aiokafka's sender answers the first time by waiting for what is under way."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.05)


async def _abandon(producer: Any) -> None:
    """Leave a producer with all that is under way in it, whatever the broker does; nothing of it stays."""
    sender, accumulator = producer._sender, producer._message_accumulator
    if sender.sender_task is not None:
        await _force(sender.sender_task)
    for task in asyncio.all_tasks():  # requests that the sender had begun; they would try again for ever
        frame = getattr(task.get_coro(), "cr_frame", None)
        if frame is not None and frame.f_locals.get("self") is sender:
            await _force(task)
    given_up = KafkaError("given up")
    batches = {batch for queue in accumulator._batches.values() for batch in queue} | set(accumulator._pending_batches)
    accumulator._pending_batches.update(batches)  # each is going to be removed from there
    for batch in batches:
        batch.failure(given_up)
        for future in (batch.future, batch._drain_waiter):
            future.exception()  # somebody looked
    accumulator._batches.clear()
    update = producer.client._md_update_fut
    with contextlib.suppress(KafkaError, OSError):
        await producer.stop()
    if update is not None and not update.done():
        update.cancel()


class Producer:
    """One producer after another, to the same brokers. One ``publish`` at a time."""

    def __init__(
        self,
        brokers: str,
        topics: Mapping[str, int],
        *,
        replication: int,
        compression: str | None,
        request_timeout: float,
        security: Mapping[str, Any],
    ) -> None:
        self._brokers, self._topics, self._replication = brokers, topics, replication
        self._timeout = request_timeout
        self._compression = compression
        self._security = security
        self._producer: Any = None
        self._sent = 0
        self._connecting = asyncio.Lock()
        self._partitions: dict[str, list[int]] = {}
        self._place = functools.lru_cache(KEYS)(self._partition_of)
        self._partitioner = DefaultPartitioner()
        self._turn = itertools.count()
        self.connects = 0
        self.error = ""

    @property
    def connected(self) -> bool:
        """Whether there is a producer that has found the topics."""
        return self._producer is not None

    async def publish(self, rows: list[Record]) -> list[tuple[Record, str]]:
        """Return when each row is acknowledged, but for those that the broker refuses for their own sake."""
        refused = list[tuple[Record, str]]()
        todo = list(rounds(rows, ROUND_BYTES.get(self._compression or "", 2 * FLIGHT_BYTES)))
        """Groups that may not share a batch; each in its order."""
        backoff, at_once = Backoff(*BACK_OFF), True
        while todo:
            producer = await self._connected()
            again = list[list[Record]]()
            broken = False
            for group in todo:
                if broken:
                    again.append(group)
                    continue
                try:
                    lanes = await self._build(producer, group)
                except Exception as error:
                    self.error, broken = f"{type(error).__name__}: {error}", True
                    again.append(group)
                    continue
                results = await asyncio.gather(*(self._send(producer, *lane) for lane in lanes.items()))
                for left, why in results:
                    if why is None:
                        continue
                    broken = True
                    self.error = f"{type(why).__name__}: {why}"
                    if not isinstance(why, RECORDS_FAULT):
                        again.append([row for piece in left for row in piece.rows])
                        continue
                    culprit, *others = [piece.rows for piece in left]
                    half = len(culprit) // 2
                    if half:
                        again += [culprit[:half], culprit[half:]]
                    else:
                        refused.append((culprit[0], type(why).__name__))
                    again += others
                    backoff.reset()
                    at_once = True
            if broken:  # a sequence number was used up, or nobody knows
                await self.drop()
                if not at_once:
                    await asyncio.sleep(backoff.next())
                at_once = False
            todo = again
        self._sent += len(rows)
        return refused

    async def _build(self, producer: Any, rows: list[Record]) -> dict[tuple[str, int], list[_Piece]]:
        lanes = dict[tuple[str, int], list[_Piece]]()
        for topic in {row.topic for row in rows}:
            known = producer.client.cluster.partitions_for_topic(topic)
            if known is None:
                raise UnknownTopicOrPartitionError(topic)
            if len(known) != len(self._partitions.get(topic, ())):
                self._partitions[topic] = sorted(known)
                self._place.cache_clear()
        for n, row in enumerate(rows, 1):
            if n % AT_ONCE == 0:
                await asyncio.sleep(0)
            topic, key, value, at, headers = row
            place = self._any(topic) if key is None else self._place(topic, key)
            pieces = lanes.get((topic, place))
            if pieces is None:
                pieces = lanes[topic, place] = [_Piece(producer.create_batch(), [])]
            piece = pieces[-1]
            if piece.batch.append(timestamp=at, key=key, value=value, headers=headers) is None:
                pieces.append(piece := _Piece(producer.create_batch(), []))
                piece.batch.append(timestamp=at, key=key, value=value, headers=headers)
            piece.rows.append(row)
        return lanes

    def _partition_of(self, topic: str, key: bytes) -> int:
        partitions = self._partitions[topic]
        return self._partitioner(key, partitions, partitions)  # type: ignore[no-any-return]

    def _any(self, topic: str) -> int:
        partitions = self._partitions[topic]
        return partitions[next(self._turn) % len(partitions)]

    async def _send(
        self, producer: Any, lane: tuple[str, int], pieces: list[_Piece]
    ) -> tuple[list[_Piece], Exception | None]:
        """One after the other; what is left, and why."""
        topic, partition = lane
        for n, piece in enumerate(pieces):
            try:
                await (await producer.send_batch(piece.batch, topic, partition=partition))
            except Exception as error:  # also what aiokafka did not mean to raise
                return pieces[n:], error
        return [], None

    async def connect(self) -> None:
        """Return when there is a producer that has found the topics."""
        await self._connected()

    async def _connected(self) -> Any:
        if self._producer is not None and self._sent > RENEW_AFTER:
            await self.drop()
        async with self._connecting:
            return await self._connect()

    async def _connect(self) -> Any:
        backoff = Backoff(*BACK_OFF)
        while self._producer is None:
            milliseconds = int(self._timeout * 1000)
            producer = AIOKafkaProducer(
                bootstrap_servers=self._brokers,
                enable_idempotence=True,
                acks="all",
                compression_type=self._compression,
                max_batch_size=BATCH_BYTES,
                request_timeout_ms=milliseconds,
                **self._security,
            )
            try:
                async with asyncio.timeout(3 * self._timeout):
                    await producer.start()
                    await self._find_topics(producer)
            except (KafkaError, OSError, TimeoutError) as error:
                self.error = f"{type(error).__name__}: {error}"
                await asyncio.shield(asyncio.create_task(_abandon(producer)))
                await asyncio.sleep(backoff.next())
            except BaseException:
                await asyncio.shield(asyncio.create_task(_abandon(producer)))
                raise
            else:
                self._producer, self._sent = producer, 0
                self.connects += 1
        return self._producer

    async def _find_topics(self, producer: Any) -> None:
        there = (await producer.client.fetch_all_metadata()).topics()
        missing = [NewTopic(name, n, self._replication) for name, n in self._topics.items() if name not in there]
        if missing:
            admin = AIOKafkaAdminClient(
                bootstrap_servers=self._brokers, request_timeout_ms=int(self._timeout * 1000), **self._security
            )
            try:
                await admin.start()
                try:
                    errors = (await admin.create_topics(missing)).topic_errors
                except AttributeError:  # aiokafka's, of the controller that is None
                    raise KafkaError("the cluster has no controller, which makes topics") from None
                for topic, code, *text in errors:
                    if code not in (0, 36):  # 36: another was quicker
                        self.error = f"topic {topic}: {text[0] if text and text[0] else f'error {code}'}"
                        log.warning("kafka: %s", self.error)
            finally:
                await admin.close()
        await producer.client.set_topics(self._topics)  # it forgets those that it only heard of
        for name in self._topics:
            await producer.partitions_for(name)

    async def drop(self) -> None:
        """Leave the producer; the next one has a new id."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await asyncio.shield(asyncio.create_task(_abandon(producer)))
