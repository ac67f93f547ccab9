"""The way of a log event through one process: socket, parser, queue, metadata, batches, PostgreSQL or the spool.

socket -> ``Receiver`` -> ``parse`` -> ``EventQueue`` -> a batch is taken (``batch`` events, or the oldest is ``flush``
seconds old) -> what is not known of its services is waited for, at most ``enrich_wait`` seconds -> sealed: COPY text
and an id -> a writer -> PostgreSQL; or, the database being away, the spool -> replayed.

Promised
- At every moment ``received + recovered = stored + dead + dropped (by cause) + held``, in events. It is checked in each
  snapshot, once a second at least; an imbalance is an error in the log and in /health.
- A batch whose commit was not seen is stored once: it keeps its id, in the spool too, and over a restart.
- Intake never waits for the database or for metadata. While the database is away, batches go to the spool; when that
  is full too, they wait in memory, at most ``SEALED`` of them and ``SEALED_BYTES``, and then the queue fills up and
  does what ``overload`` says. Nothing grows beyond its bound.
- ``durable``: each batch is in the spool before it is written, and leaves it after the commit. A ``kill -9`` costs
  what was not sealed yet: at most ``flush`` and ``enrich_wait`` seconds; a power failure ``fsync`` seconds more. Should
  the spool be full, the batches are written without it.
- The first ``stop`` ends the intake, when it has read what the socket holds, and stores the rest, that of the spool
  included, in at most ``stop_limit`` seconds; what is left then goes to the spool. The second goes there at once.

Not promised: order in the table (there is received_at for that; the spool is replayed in order). UDP promises nothing:
what the kernel dropped for want of room is counted beside the equation, for it was never received.

Where what runs: parsing, sealing and the sockets in the event loop; files of the spool in threads. All state is the
loop's: there is no lock. Of several workers, number 0 also keeps the tables (``maintain``), fills in metadata that came
late, and replays what a run with more workers left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import random
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from coordination import Clock, Rng, stats_repr, wait_for_event
from logs.display import Snapshot, imbalance
from logs.enrich import Enricher
from logs.intake import EventQueue, Policy, Receiver
from logs.parse import Event, parse
from logs.store import SCHEMA, Outcome, Store, seal
from primitives import RetryPolicy
from runtime.embedded import Embedded
from runtime.postgres import Database
from runtime.serving import CannotStart, TaskSupervisor, lines_lost
from runtime.spool import EncodedBatch, Spool

log = logging.getLogger("ingest")

WRITERS = 2
"""Transactions at a time, that of the replay not counted."""
TOGETHER, TOGETHER_BYTES = 16, 16_000_000
"""Batches, and bytes of them, in one transaction, when so many wait."""
SEALED, SEALED_BYTES = 64, 64_000_000
"""Batches, and bytes of them, that may wait in memory to be written or spooled."""
WAITS, WAITS_BYTES = 50, 32_000_000
"""Batches, and bytes of them, that may wait for metadata; further ones do not wait."""
PATIENCE = 5.0
"""Seconds from the start for which batches wait for the first connection, and are not spooled yet."""
DISTRUST = 1.0
"""Seconds for which a database that is there, but could not write, is not asked again."""
FILL_EVERY, FILL_SERVICES = 2.0, 1000
"""Seconds between two looks for rows without metadata; services filled in at a time."""
MAINTAIN_EVERY = 600.0
"""Seconds between two looks at the partitions."""
DRAIN_LIMIT = 1.0
"""Seconds that reading what the socket holds may take at the stop: senders may go on."""
FORCE_LIMIT = 2.0
"""Seconds that putting the rest into the spool may take at a forced stop."""
CANCEL_LIMIT = 0.5
"""Seconds that the end of a task may take before the connections to the database are cut."""
BACK_OFF = RetryPolicy(attempts=sys.maxsize, base=0.1, cap=5.0, total=math.inf)
"""How long to wait before the spool is replayed again after a failure."""


@dataclass(frozen=True)
class Options:
    """As on the command line. Seconds and bytes."""

    listen: str = "0.0.0.0:5514"
    metadata: str | None = None
    database: str | None = None
    receivers: int = 1
    receive_buffer: int = 32 << 20
    allow: tuple[str, ...] = ()
    enrich_wait: float = 0.5
    batch: int = 1000
    flush: float = 5.0
    queue: int = 100_000
    overload: Policy = "drop-newest"
    spool: str = str(Path(__file__).resolve().parents[1] / "data" / "spool")
    spool_bytes: int = 1 << 30
    fsync: float = 1.0
    durable: bool = False
    retain: int | None = None
    stop_limit: float = 10.0
    http: str | None = None
    zone: str = "UTC"


def rows_in(batches: Sequence[EncodedBatch] | deque[EncodedBatch]) -> int:
    return sum(batch.rows for batch in batches)


def database_of(options: Options) -> str | Embedded | None:
    kind, _, folder = (options.database or "").partition(":")
    return Embedded(Path(folder)) if kind == "embedded" else options.database


# ------------------------------------------------------------------------------------------------------ one worker


class Ingester(TaskSupervisor):
    """One worker, with ``sock`` as its source. ``run`` once. ``CannotStart`` if the spool cannot be looked at."""

    workers = 1

    def __init__(
        self,
        options: Options,
        sock: socket.socket,
        *,
        number: int = 0,
        workers: int = 1,
        kernel_drops: Callable[[], int | None] = lambda: 0,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
        rng: Rng = random.random,
    ) -> None:
        super().__init__(log)
        self.options, self.number = options, number
        self._of, self._kernel_drops = workers, kernel_drops
        self._clock, self._wall, self._rng = clock, wall, rng
        self._zone: tzinfo = UTC if options.zone == "UTC" else ZoneInfo(options.zone)
        allow = [ipaddress.ip_network(each, strict=False) for each in options.allow]
        self.receiver = Receiver(sock, self._handle, allow=allow)
        self.queue = EventQueue(
            options.queue, policy=options.overload, max_items=options.batch, max_age=options.flush, clock=clock
        )
        self.enricher = Enricher(options.metadata)
        self.database = Database(database_of(options), SCHEMA, size=WRITERS + 3)
        self.store = Store(self.database, retain_days=options.retain)
        self.spools = [
            Spool(folder, max_bytes=options.spool_bytes, fsync_every=options.fsync) for folder in self._folders()
        ]
        """The first is this worker's own; the others were those of workers that there are no more."""
        self._received = self._recovered = self._stored = self._dead = self._missing = 0
        self._dropped: Counter[str] = Counter()
        self._spooled_rows = 0
        """What this worker put into the spools, or found there, and did not remove: their own counts move earlier."""
        self._sealing = self._sealing_bytes = 0
        self._sealed: deque[EncodedBatch] = deque()
        self._writing = 0
        self._to_spool: deque[EncodedBatch] = deque()
        """The first one is being put there."""
        self._lags: deque[float] = deque([0.0], maxlen=100)
        self._loop_lags: deque[float] = deque([0.0], maxlen=60)
        self._begun = self._distrust = -math.inf
        self._trouble = ""
        self._unbalanced, self._full = 0, False
        self._stage = 0
        self._stopped, self._forced, self._moved = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._due, self._work, self._room, self._spoolable, self._spooled = (asyncio.Event() for _ in range(5))
        self._waits: dict[asyncio.Task[None], tuple[list[Event], int]] = {}
        """Batches that wait for metadata, and their bytes."""

    def _folders(self) -> list[Path]:
        """``CannotStart``."""
        base = Path(self.options.spool)
        own = base / str(self.number)
        try:
            if self.number or not base.is_dir():
                return [own]
            others = [each for each in base.iterdir() if re.fullmatch("[0-9]{1,4}", each.name) and each.is_dir()]
        except OSError as error:
            raise CannotStart(f"the spool {base} cannot be used: {error.strerror}") from None
        return [own, *sorted(each for each in others if int(each.name) >= self._of)]

    # -------------------------------------------------------------------- intake

    def _handle(self, datagrams: list[tuple[bytes, str]]) -> None:
        now, zone = datetime.now(UTC), self._zone
        events: list[Event] = []
        for data, source in datagrams:
            try:
                events += parse(data, source, now, zone)
            except Exception as error:  # it promises not to; but one datagram must not cost the others
                self._fault("parser", error)
                events.append(unparsed(data, source, now, error))
        self._received += len(events)
        self.queue.put(events)
        if not self._sleeping or self.queue.due_in() <= 0.0:
            self._due.set()
        if self.queue.over():
            self._room.set()

    _sleeping = False
    """Whether the sealer knows when the oldest event will be due."""

    async def _take(self) -> None:
        """The sealer: takes batches from the queue when they are due, while there is room for them."""
        queue = self.queue
        while True:
            self._due.clear()
            while not self._has_room():
                self._room.clear()
                await self._room.wait()
            before = queue.stats().bytes
            events = queue.drain() if self._stage else queue.take()
            if events:
                self._begin(events, max(0, before - queue.stats().bytes))
                await asyncio.sleep(0)
                continue
            self._moved.set()
            due = queue.due_in()
            self._sleeping = due < math.inf
            await wait_for_event(self._due, due)
            self._sleeping = False

    def _has_room(self) -> bool:
        """Whether another batch may be sealed. Those that wait for metadata come on top: at most WAITS."""
        return self._may_be_sealed() or (self.queue.over() and len(self._to_spool) < SEALED)

    def _may_be_sealed(self) -> bool:
        size = self._sealing_bytes + sum(len(each.data) for each in (*self._sealed, *self._to_spool))
        return len(self._sealed) + len(self._to_spool) < SEALED and size < SEALED_BYTES

    def _begin(self, events: list[Event], size: int) -> None:
        """Seal a batch; when the metadata of its services are there, or did not come in time."""
        self._sealing += len(events)
        enricher, limit = self.enricher, self.options.enrich_wait
        may_wait = len(self._waits) < WAITS and self._sealing_bytes + size <= WAITS_BYTES
        if enricher.configured and limit > 0 and may_wait and not self._stage:
            look = enricher.look
            unknown = [name for name in {event.service for event in events} if look(name) is None]
            if unknown:
                self._sealing_bytes += size
                task = asyncio.create_task(enricher.wait(unknown, limit))
                self._waits[task] = events, size
                task.add_done_callback(self._waited)  # also if it is cancelled: the events must go somewhere
                return
        self._seal(events)

    def _waited(self, task: asyncio.Task[None]) -> None:
        events, size = self._waits.pop(task)
        self._sealing_bytes -= size
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault("enricher", error)
        self._seal(events)

    def _seal(self, events: list[Event]) -> None:
        try:
            self._hand_on(seal(events, self.enricher.look, self.enricher.configured))
        except Exception as error:  # a fault of ours; whatever it is, it must cost the event that causes it only
            self._fault("sealer", error)
            for event in events:
                try:
                    self._hand_on(seal([event], self.enricher.look, self.enricher.configured))
                except Exception:
                    self._dropped["cannot be encoded"] += 1
        self._sealing -= len(events)

    def _hand_on(self, batch: EncodedBatch) -> None:
        overflows = self.options.overload == "spool" and (self.queue.over() or not self._may_be_sealed())
        if self.options.durable or overflows or self._diverts():
            self._to_spool.append(batch)
            self._spoolable.set()
        else:
            self._sealed.append(batch)
            self._work.set()

    def _diverts(self) -> bool:
        """Whether the database is not to be asked now."""
        now = self._clock()
        if self.database.state == "connected":
            return now < self._distrust
        return self._stage > 0 or now >= self._begun + PATIENCE

    # ------------------------------------------------------------------- writing

    async def _write(self) -> None:
        """A writer: takes all that waits, up to a bound, in one transaction."""
        while True:
            if not self._sealed:
                self._work.clear()
                await self._work.wait()
                continue
            if self._diverts():
                self._divert()
                continue
            if self.database.state != "connected":
                await self.database.ready(0.1)
                continue
            batches, size = list[EncodedBatch](), 0
            while self._sealed and len(batches) < TOGETHER and size < TOGETHER_BYTES:
                batches.append(self._sealed.popleft())
                size += len(batches[-1].data)
            rows = rows_in(batches)
            self._writing += rows
            try:
                outcomes = await self.store.write(batches)
            except BaseException as error:  # cancelled, too: whether it was committed is found out by the id
                self._writing -= rows
                self._to_spool.extend(batches)
                self._spoolable.set()
                if not isinstance(error, Exception):
                    raise
                self._away(error)
            else:
                self._writing -= rows
                self._count(batches, outcomes)
            self._moved.set()

    def _divert(self) -> None:
        """What was to be written goes to the spool."""
        self._to_spool.extend(self._sealed)
        self._sealed.clear()
        self._spoolable.set()

    def _count(self, batches: Sequence[EncodedBatch], outcomes: Sequence[Outcome]) -> None:
        now = self._wall()
        for batch, outcome in zip(batches, outcomes, strict=True):
            self._stored += outcome.stored
            self._dead += outcome.dead
            self._missing += batch.data.count(b"\tmissing\n")
            self._lags.append(max(0.0, now - batch.received_at))
        if self._trouble:
            log.warning("database: batches are stored again")
            self._trouble = ""
        self._room.set()

    def _away(self, error: Exception) -> None:
        """Batches could not be stored."""
        if self.database.state == "connected":
            self._distrust = self._clock() + DISTRUST
        trouble = f"{type(error).__name__}: {error}"
        if trouble != self._trouble:
            log.warning("database: batches go to the spool: %s", trouble)
            self._trouble = trouble

    async def _put(self) -> None:
        """The spooler: what is to go to the spool, in order. Not to be cancelled in the middle of it."""
        while True:
            if not self._to_spool:
                self._spoolable.clear()
                self._moved.set()
                await self._spoolable.wait()
                continue
            batch = self._to_spool[0]
            if await self.spools[0].put(batch):
                self._to_spool.popleft()
                self._spooled_rows += batch.rows
                self._room.set()
                self._spooled.set()
                self._full = False
                continue
            if not self._full:
                log.error("spool: no room, or it cannot be written: batches wait in memory")
                self._full = True
                self._moved.set()
            if self.database.state == "connected":  # without the detour then
                self._sealed.extend(self._to_spool)
                self._to_spool.clear()
                self._work.set()
            await wait_for_event(self._forced, 0.2)

    async def _replay(self) -> None:
        """Store what is in the spools, in their order, whenever there is a database."""
        failures = 0
        while True:
            spool = next((each for each in self.spools[::-1] if each.stats().batches), None)
            if spool is None:
                self._spooled.clear()
                self._moved.set()
                await self._spooled.wait()
                continue
            if not await self.database.ready(1.0):
                self._moved.set()
                continue
            lost = spool.stats().lost
            try:
                found = await spool.first(TOGETHER)
            finally:  # it may fail, or be cancelled, after it has set some aside
                if lost := spool.stats().lost - lost:
                    self._spooled_rows -= lost
                    self._dropped["spool unreadable"] += lost
            batches = [batch for _, batch in found]
            try:
                outcomes = await self.store.write(batches)
            except Exception as error:
                self._away(error)
                failures += 1
                self._moved.set()
                await asyncio.sleep(BACK_OFF.delay(failures, self._rng) or 0.0)
                continue
            self._spooled_rows -= rows_in(batches)
            self._count(batches, outcomes)
            failures = 0
            await spool.remove([name for name, _ in found])  # which may be cancelled in the middle
            self._moved.set()

    # ------------------------------------------------------------- beside the way

    async def _maintain(self) -> None:
        """Of worker 0: partitions ahead, and none that are too old."""
        while True:
            await self.database.ready()
            try:
                await self.store.maintain()
            except Exception as error:
                log.warning("maintenance: %s: %s", type(error).__name__, error)
                await asyncio.sleep(FILL_EVERY)
                continue
            await asyncio.sleep(MAINTAIN_EVERY)

    async def _fill_in(self) -> None:
        """Of worker 0: metadata for rows that were stored without. Services whose metadata never come, however many,
        must not be all that is looked at."""
        after = ""
        while self.enricher.configured:
            await asyncio.sleep(FILL_EVERY)
            await self.database.ready()
            try:
                services = await self.store.missing(FILL_SERVICES, after)
                after = services[-1] if len(services) == FILL_SERVICES else ""
                for service in services:
                    found = await self.enricher.load(service)
                    if found is not None:
                        await self.store.fill_in(service, found)
            except Exception as error:
                log.warning("filling in: %s: %s", type(error).__name__, error)

    async def _watch(self) -> None:
        """How late the loop is; and whether the counts balance, should nobody else ask."""
        while True:
            due = self._clock() + 1.0
            await asyncio.sleep(1.0)
            self._loop_lags.append(max(0.0, self._clock() - due))
            self.snapshot()

    # ---------------------------------------------------------------- life and end

    async def run(self) -> int:
        """1 if events were lost at the stop. ``CannotStart`` if the spool cannot be used."""
        async with contextlib.AsyncExitStack() as stack:
            for spool in self.spools:
                try:
                    rows = await asyncio.to_thread(spool.open)
                except (OSError, RuntimeError, ValueError) as error:
                    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                    raise CannotStart(f"the spool {self.options.spool} cannot be used: {why}") from None
                stack.push_async_callback(spool.close)
                self._recovered += rows
                self._spooled_rows += rows
            self._spooled.set()
            await self.enricher.open()
            stack.push_async_callback(self.enricher.close)
            await self.database.open(0.0)
            stack.push_async_callback(self.database.close)
            stack.callback(self.receiver.close)
            stack.push_async_callback(self._end_tasks)
            self._begun = self._clock()
            self._start("sealer", self._take)
            for n in range(WRITERS):
                self._start(f"writer {n}", self._write)
            self._start("spooler", self._put)
            self._start("replayer", self._replay)
            self._start("watch", self._watch)
            if not self.number:
                self._start("maintenance", self._maintain)
                self._start("filler-in", self._fill_in)
            self.receiver.start()
            if not await arrives_first(self.database.ready(PATIENCE), self._stopped):
                log.warning("database: not there yet (%s); batches go to the spool", self.database.stats().error or "")
            await self._stopped.wait()
            await self._drain()
            await self._save()
        self.snapshot()
        there = sum(each.stats().rows for each in self.spools)
        if there != self._spooled_rows:
            self._fault("spool", RuntimeError(f"{there} rows are there, {self._spooled_rows} should be"))
        return int(self._dropped["stopped"] > 0)

    def stop(self) -> None:
        """The first call: no more intake, and what is there is stored. The second: the rest goes to the spool."""
        self._stage += 1
        self._stopped.set()
        if self._stage > 1:
            self._forced.set()
            self._moved.set()

    async def _drain(self) -> None:
        """Store what is there, while there is time and a database."""
        deadline = self._clock() + self.options.stop_limit
        intake = min(deadline, self._clock() + DRAIN_LIMIT)
        while self.receiver.drain() and self._clock() < intake:  # noqa: ASYNC110  -- the others have their turn
            await asyncio.sleep(0)
        self._kernel_drops()  # of a closed socket nobody can tell
        self.receiver.close()
        self._due.set()
        while not self._forced.is_set() and not self._is_drained() and self._clock() < deadline:
            self._moved.clear()
            await wait_for_event(self._moved, min(1.0, deadline - self._clock()))

    def _is_drained(self) -> bool:
        if self._in_memory():
            return False
        return self.database.state != "connected" or not any(each.stats().batches for each in self.spools)

    def _in_memory(self) -> int:
        return (
            self.queue.stats().queued + self._sealing + rows_in(self._sealed) + self._writing + rows_in(self._to_spool)
        )

    async def _end_tasks(self, but: str = "") -> None:
        """A task that is cancelled rolls back, which a database that does not answer holds up: it is cut off then. What
        that raises may take the place of the cancellation, so it is repeated."""
        late = {task for name, task in self._tasks.items() if name != but} | {*self._waits}
        while late:
            for task in late:
                task.cancel()
            _, late = await asyncio.wait(late, timeout=CANCEL_LIMIT)
            if late:
                await self.database.close()

    async def _save(self) -> None:
        """What is still in memory goes to the spool; what cannot is dropped."""
        await self._end_tasks("spooler")
        self._divert()
        while events := self.queue.drain():
            self._sealing += len(events)
            self._seal(events)
            self._divert()
            await asyncio.sleep(0)
        deadline, self._full = self._clock() + FORCE_LIMIT, False
        while self._to_spool and not self._full and self._clock() < deadline:
            self._moved.clear()
            await wait_for_event(self._moved, deadline - self._clock())
        await self._end_tasks()
        await self.spools[0].close()  # when what was being put there is done: is it there?
        if self._to_spool and sum(each.stats().rows for each in self.spools) > self._spooled_rows:
            self._spooled_rows += self._to_spool.popleft().rows
        self._dropped["stopped"] += rows_in(self._to_spool) + rows_in(self._sealed)
        self._to_spool.clear()
        self._sealed.clear()

    def snapshot(self) -> Snapshot:
        """All counts of this moment; an imbalance is logged."""
        queue, intake, found, data = (
            self.queue.stats(),
            self.receiver.stats(),
            self.enricher.stats(),
            self.database.stats(),
        )
        spools = [each.stats() for each in self.spools]
        counts = Snapshot(
            received=self._received,
            recovered=self._recovered,
            stored=self._stored,
            dead=self._dead,
            dropped=dict(self._dropped + Counter(queue.dropped)),
            held={
                "queue": queue.queued,
                "sealing": self._sealing,
                "sealed": rows_in(self._sealed),
                "writing": self._writing,
                "spooling": rows_in(self._to_spool),
                "spool": self._spooled_rows,
            },
            datagrams=intake.datagrams,
            bytes=intake.bytes,
            refused=intake.refused,
            truncated=intake.truncated,
            kernel_drops=self._kernel_drops() or 0,
            missing=self._missing,
            filled=self.store.stats().filled,
            spool_bytes=sum(each.bytes for each in spools),
            spool_refused=sum(each.refused for each in spools),
            lag=max(self._lags),
            loop_lag=max(self._loop_lags),
            database=data.state,
            metadata=found.breaker if self.enricher.configured else "none",
            metadata_loads=found.loads,
            metadata_failures=found.failures,
            faults=self._faults,
            lines_lost=lines_lost(),
            stopping=self._stage > 0,
        )
        off = imbalance(counts)
        if off and off != self._unbalanced:
            self._faults += 1
            log.error("the counts do not balance: %d events are not accounted for: %s", off, counts)
        self._unbalanced = off
        return counts._replace(faults=self._faults)

    stats = snapshot
    __repr__ = stats_repr


def unparsed(data: bytes, source: str, now: datetime, error: Exception) -> Event:
    """The event of a datagram that the parser failed on."""
    return Event(now, now, "unknown", source, 6, ascii(data), "{}", f"the parser failed: {type(error).__name__}")


async def arrives_first(waiting: Awaitable[bool], other: asyncio.Event) -> bool:
    """What ``waiting`` comes to; True if ``other`` is set before."""
    tasks = asyncio.ensure_future(waiting), asyncio.ensure_future(other.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[1].done() or tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
