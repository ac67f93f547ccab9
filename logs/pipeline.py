"""The way of a log event through one process: socket, parser, queue, metadata, batches, PostgreSQL or the spool.

socket -> ``Receiver`` -> ``parse`` -> ``EventQueue`` -> a batch is taken (``batch`` events, or the oldest is ``flush``
seconds old) -> what is not known of its services is waited for, at most ``enrich_wait`` seconds -> sealed: COPY text
and an id -> a writer -> PostgreSQL; or, the database being away, the spool -> replayed
(``logs.outlet``).

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
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from coordination import Clock, Rng, stats_repr, wait_for_event
from logs.display import LogCounts, imbalance
from logs.enrich import Enricher
from logs.event_queue import EventQueue
from logs.intake import Receiver
from logs.options import IngestOptions, database_of
from logs.outlet import Outlet, rows_in
from logs.parse import Event, parse
from logs.seal import seal
from logs.store import SCHEMA, Store
from runtime.loop import Lag, TaskSupervisor
from runtime.options import CannotStart
from runtime.postgres import Database
from runtime.spool import Spool
from runtime.stderr import lines_lost

log = logging.getLogger("ingest")

WRITERS = 2
"""Transactions at a time, that of the replay not counted."""
WAITS, WAITS_BYTES = 50, 32_000_000
"""Batches, and bytes of them, that may wait for metadata; further ones do not wait."""
FILL_EVERY, FILL_SERVICES = 2.0, 1000
"""Seconds between two looks for rows without metadata; services filled in at a time."""
MAINTAIN_EVERY = 600.0
"""Seconds between two looks at the partitions."""
DRAIN_LIMIT = 1.0
"""Seconds that reading what the socket holds may take at the stop: senders may go on."""
FORCE_LIMIT = 2.0
"""Seconds that putting the rest into the spool may take at a forced stop."""
WATCH_EVERY = 1.0
"""Seconds between two looks at the counts."""
CANCEL_LIMIT = 0.5
"""Seconds that the end of a task may take before the connections to the database are cut."""


class Ingester:
    """One worker, with ``sock`` as its source. ``run`` once. ``CannotStart`` if the spool cannot be looked at."""

    workers = 1

    def __init__(
        self,
        options: IngestOptions,
        sock: socket.socket,
        *,
        number: int = 0,
        workers: int = 1,
        kernel_drops: Callable[[], int | None] = lambda: 0,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
        rng: Rng = random.random,
    ) -> None:
        self.tasks, self._lag = TaskSupervisor(log), Lag()
        self.options, self.number = options, number
        self._of, self._kernel_drops = workers, kernel_drops
        self._clock = clock
        self._zone: tzinfo = UTC if options.zone == "UTC" else ZoneInfo(options.zone)
        allow = [ipaddress.ip_network(each, strict=False) for each in options.allow]
        self.receiver = Receiver(sock, self._handle, allow=allow)
        self.queue = EventQueue(
            options.queue, policy=options.overload, max_items=options.batch, max_age=options.flush, clock=clock
        )
        self.enricher = Enricher(options.metadata)
        self.database = Database(database_of(options), SCHEMA, size=WRITERS + 3)
        self.store = Store(self.database, retain_days=options.retain)
        spools = [Spool(folder, max_bytes=options.spool_bytes, fsync_every=options.fsync) for folder in self._folders()]
        """The first is this worker's own; the others were those of workers that there are no more."""
        self._received = self._recovered = 0
        self._sealing = self._sealing_bytes = 0
        self._unbalanced = self._stage = 0
        self._stopped, self._forced, self._moved = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._due, self._room = asyncio.Event(), asyncio.Event()
        self.outlet = Outlet(
            options,
            self.database,
            self.store,
            spools,
            over=self.queue.over,
            sealing_bytes=lambda: self._sealing_bytes,
            room=self._room,
            moved=self._moved,
            forced=self._forced,
            clock=clock,
            wall=wall,
            rng=rng,
        )
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
                self.tasks.fault("parser", error)
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
        return self.outlet.may_be_sealed() or (self.queue.over() and self.outlet.may_be_spooled())

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
            self.tasks.fault("enricher", error)
        self._seal(events)

    def _seal(self, events: list[Event]) -> None:
        try:
            self.outlet.hand_on(seal(events, self.enricher.look, self.enricher.configured))
        except Exception as error:  # a fault of ours; whatever it is, it must cost the event that causes it only
            self.tasks.fault("sealer", error)
            for event in events:
                try:
                    self.outlet.hand_on(seal([event], self.enricher.look, self.enricher.configured))
                except Exception:
                    self.outlet.dropped["cannot be encoded"] += 1
        self._sealing -= len(events)

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
        """Whether the counts balance, should nobody else ask."""
        while True:
            await asyncio.sleep(WATCH_EVERY)
            self.snapshot()

    # ---------------------------------------------------------------- life and end

    async def run(self) -> int:
        """1 if events were lost at the stop. ``CannotStart`` if the spool cannot be used."""
        async with contextlib.AsyncExitStack() as stack:
            for spool in self.outlet.spools:
                try:
                    rows = await asyncio.to_thread(spool.open)
                except (OSError, RuntimeError, ValueError) as error:
                    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                    raise CannotStart(f"the spool {self.options.spool} cannot be used: {why}") from None
                stack.push_async_callback(spool.close)
                self._recovered += rows
                self.outlet.spooled_rows += rows
            self.outlet.spooled.set()
            await self.enricher.open()
            stack.push_async_callback(self.enricher.close)
            await self.database.open(0.0)
            stack.push_async_callback(self.database.close)
            stack.callback(self.receiver.close)
            stack.push_async_callback(self._end_tasks)
            self.outlet.begun = self._clock()
            self.tasks.start("sealer", self._take)
            for n in range(WRITERS):
                self.tasks.start(f"writer {n}", self.outlet.write)
            self.tasks.start("spooler", self.outlet.put_into_spool)
            self.tasks.start("replayer", self.outlet.replay)
            self.tasks.start("watch", self._watch)
            self.tasks.start("loop lag", self._lag.watch)
            if not self.number:
                self.tasks.start("maintenance", self._maintain)
                self.tasks.start("filler-in", self._fill_in)
            self.receiver.start()
            if not await arrives_first(self.outlet.first_connection(), self._stopped):
                log.warning("database: not there yet (%s); batches go to the spool", self.database.stats().error or "")
            await self._stopped.wait()
            await self._drain()
            await self._save()
        self.snapshot()
        there = sum(each.stats().rows for each in self.outlet.spools)
        if there != self.outlet.spooled_rows:
            self.tasks.fault("spool", RuntimeError(f"{there} rows are there, {self.outlet.spooled_rows} should be"))
        return int(self.outlet.dropped["stopped"] > 0)

    def stop(self) -> None:
        """The first call: no more intake, and what is there is stored. The second: the rest goes to the spool."""
        self._stage += 1
        self.outlet.stopping = True
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
        return not self.queue.stats().queued and not self._sealing and self.outlet.is_empty()

    async def _end_tasks(self, but: str = "") -> None:
        """A task that is cancelled rolls back, which a database that does not answer holds up: it is cut off then. What
        that raises may take the place of the cancellation, so it is repeated."""
        late = {task for name, task in self.tasks.running.items() if name != but} | {*self._waits}
        while late:
            for task in late:
                task.cancel()
            _, late = await asyncio.wait(late, timeout=CANCEL_LIMIT)
            if late:
                await self.database.close()

    async def _save(self) -> None:
        """What is still in memory goes to the spool; what cannot is dropped."""
        outlet = self.outlet
        await self._end_tasks("spooler")
        outlet.divert()
        while events := self.queue.drain():
            self._sealing += len(events)
            self._seal(events)
            outlet.divert()
            await asyncio.sleep(0)
        deadline, outlet.full = self._clock() + FORCE_LIMIT, False
        while outlet.to_spool and not outlet.full and self._clock() < deadline:
            self._moved.clear()
            await wait_for_event(self._moved, deadline - self._clock())
        await self._end_tasks()
        await outlet.spools[0].close()  # when what was being put there is done: is it there?
        if outlet.to_spool and sum(each.stats().rows for each in outlet.spools) > outlet.spooled_rows:
            outlet.spooled_rows += outlet.to_spool.popleft().rows
        outlet.drop("stopped")

    def snapshot(self) -> LogCounts:
        """All counts of this moment; an imbalance is logged."""
        queue, intake, found, data = (
            self.queue.stats(),
            self.receiver.stats(),
            self.enricher.stats(),
            self.database.stats(),
        )
        outlet = self.outlet
        spools = [each.stats() for each in outlet.spools]
        counts = LogCounts(
            received=self._received,
            recovered=self._recovered,
            stored=outlet.stored,
            dead=outlet.dead,
            dropped=dict(outlet.dropped + Counter(queue.dropped)),
            held={
                "queue": queue.queued,
                "sealing": self._sealing,
                "sealed": rows_in(outlet.sealed),
                "writing": outlet.writing,
                "spooling": rows_in(outlet.to_spool),
                "spool": outlet.spooled_rows,
            },
            datagrams=intake.datagrams,
            bytes=intake.bytes,
            refused=intake.refused,
            truncated=intake.truncated,
            kernel_drops=self._kernel_drops() or 0,
            missing=outlet.missing,
            filled=self.store.stats().filled,
            spool_bytes=sum(each.bytes for each in spools),
            spool_refused=sum(each.refused for each in spools),
            lag=max(outlet.lags),
            loop_lag=self._lag.longest,
            database=data.state,
            metadata=found.breaker if self.enricher.configured else "none",
            metadata_loads=found.loads,
            metadata_failures=found.failures,
            faults=self.tasks.faults,
            lines_lost=lines_lost(),
            stopping=self._stage > 0,
        )
        off = imbalance(counts)
        if off and off != self._unbalanced:
            self.tasks.faults += 1
            log.error("the counts do not balance: %d events are not accounted for: %s", off, counts)
        self._unbalanced = off
        return counts._replace(faults=self.tasks.faults)

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
