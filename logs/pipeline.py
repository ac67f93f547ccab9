"""The way of a log event through one process: socket, parser, queue, metadata, batches, PostgreSQL or the spool.

socket -> ``Receiver`` -> ``parse`` -> ``EventQueue`` -> a batch is taken (``batch`` events, or the oldest is ``flush``
seconds old) -> what is not known of its services is waited for, at most ``enrich_wait`` seconds -> sealed
(``logs.seal``) -> a writer -> PostgreSQL; or, the database being away, the spool -> replayed (``runtime.outlet``).

Promised
- The equation of ``logs.display``, at every moment. It is checked in each snapshot, once a second at least; an
  imbalance is an error in the log and in /health.
- A batch whose commit was not seen is stored once: it keeps its id, in the spool too, and over a restart.
- Intake never waits for the database or for metadata. While the database is away, batches go to the spool; when that
  is full too, they wait in memory, at most ``SEALED`` of them and ``SEALED_BYTES``, and then the queue fills up and
  does what ``overload`` says. Nothing grows beyond its bound.
- ``durable``: each batch is in the spool before it is written, and leaves it after the commit. A ``kill -9`` costs
  what was not sealed yet: at most ``flush`` and ``enrich_wait`` seconds; a power failure ``fsync`` seconds more. Should
  the spool be full, the batches are written without it.
- The first ``stop`` ends the intake, when it has read what the socket holds, and stores the rest, that of the spool
  included, in at most ``stop_limit`` seconds; what is left then goes to the spool. The second goes there at once.

Not promised: order in the table (there is received_at for that). UDP promises nothing: what the kernel dropped for want
of room is counted beside the equation, for it was never received.

Where what runs: parsing, sealing and the sockets in the event loop; files of the spool in threads. All state is the
loop's: there is no lock. Of several workers, number 0 also does ``logs.upkeep``, and replays what a run with more
workers left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, tzinfo
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

from coordination import stats_repr
from logs.display import LogCounts, imbalance
from logs.event_queue import EventQueue
from logs.intake import Receiver
from logs.options import IngestOptions, database_of
from logs.parse import INFORMATIONAL, UNKNOWN_SERVICE, Event, parse
from logs.seal import Sealer
from logs.sink import PATIENCE, DatabaseSink
from logs.store import SCHEMA, Store
from logs.upkeep import fill_in, maintain
from runtime.backlog import Backlog
from runtime.loop import Lag, TaskSupervisor, ends_before
from runtime.outlet import Changes, Outlet, TwoStageStop, unusable
from runtime.postgres import Database
from runtime.spool import EncodedBatch, Spool
from runtime.stderr import lines_lost

log = logging.getLogger("ingest")

WRITERS = 2  # transactions at a time, that of the replay not counted
TOGETHER, TOGETHER_BYTES = 16, 16_000_000  # batches, and bytes of them, in one transaction, when so many wait
SEALED, SEALED_BYTES = 64, 64_000_000  # batches, and bytes of them, that may wait in memory to be written or spooled
DRAIN_LIMIT = 1.0  # seconds that reading what the socket holds may take at the stop: senders may go on
FORCE_LIMIT = 2.0  # seconds that putting the rest into the spool may take at a forced stop
WATCH_EVERY = 1.0  # seconds between two looks at the counts
CANCEL_LIMIT = 0.5  # seconds that the end of a task may take before the connections to the database are cut


class Ingester:
    """One worker, with ``sock`` as its source. ``run`` once. ``CannotStart`` if the spool cannot be looked at."""

    def __init__(
        self,
        options: IngestOptions,
        sock: socket.socket,
        *,
        number: int = 0,
        workers: int = 1,
        kernel_drops: Callable[[], int] = lambda: 0,
    ) -> None:
        self.tasks, self._lag = TaskSupervisor(log), Lag()
        self.options, self.number = options, number
        self._of, self._kernel_drops = workers, kernel_drops
        self._zone: tzinfo = UTC if options.zone == "UTC" else ZoneInfo(options.zone)
        allow = [ipaddress.ip_network(each, strict=False) for each in options.allow]
        self.receiver = Receiver(sock, self._handle, allow=allow)
        self.queue = EventQueue(options.queue, policy=options.overload, max_items=options.batch, max_age=options.flush)
        self.database = Database(database_of(options), SCHEMA, size=WRITERS + 3)
        self.store = Store(self.database, retain_days=options.retain)
        self.sink = DatabaseSink(self.database, self.store)
        spools = [Spool(folder, max_bytes=options.spool_bytes, fsync_every=options.fsync) for folder in self._folders()]
        """The first is this worker's own; the others were those of workers that there are no more."""
        self._changes = Changes()
        self.outlet = Outlet[EncodedBatch](
            Backlog(
                SEALED,
                SEALED_BYTES,
                size=lambda batch: len(batch.data),
                rows=lambda batches: sum(batch.rows for batch in batches),
                round_items=TOGETHER,
                round_bytes=TOGETHER_BYTES,
            ),
            self.sink,
            spools,
            log=log,
            changes=self._changes,
            replay_files=TOGETHER,
        )
        self.sealer = Sealer(options, self.queue, self.outlet, changes=self._changes, fault=self.tasks.fault)
        self._received = 0
        self._stages = TwoStageStop(self._changes)

    def _folders(self) -> list[Path]:
        """``CannotStart``."""
        base = Path(self.options.spool)
        own = base / str(self.number)
        try:
            if self.number or not base.is_dir():
                return [own]
            others = [each for each in base.iterdir() if re.fullmatch("[0-9]{1,4}", each.name) and each.is_dir()]
        except OSError as error:
            raise unusable(base, error) from None
        return [own, *sorted(each for each in others if int(each.name) >= self._of)]

    def _handle(self, datagrams: list[tuple[bytes, str]]) -> None:
        """What the receiver has read."""
        now, zone = datetime.now(UTC), self._zone
        events: list[Event] = []
        for data, source in datagrams:
            try:
                events += parse(data, source, now, zone)
            except Exception as error:  # it promises not to; but one datagram must not cost the others
                self.tasks.fault("parser", error)
                reason = f"the parser failed: {type(error).__name__}"
                events.append(Event(now, now, UNKNOWN_SERVICE, source, INFORMATIONAL, ascii(data), "{}", reason))
        self._received += len(events)
        self.queue.put(events)
        self.sealer.wake()

    async def _watch(self) -> None:
        """Whether the counts balance, should nobody else ask."""
        while True:
            await asyncio.sleep(WATCH_EVERY)
            self.snapshot()

    # ---------------------------------------------------------------- life and end

    async def run(self) -> int:
        """1 if events were lost at the stop. ``CannotStart`` if the spool cannot be used."""
        outlet, enricher, stopped = self.outlet, self.sealer.enricher, self._stages.stopped
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(outlet.close)
            try:
                await outlet.open()
            except (OSError, RuntimeError, ValueError) as error:
                raise unusable(self.options.spool, error) from None
            await stack.enter_async_context(enricher)
            await self.database.open(0.0)
            stack.push_async_callback(self.database.close)
            stack.callback(self.receiver.close)
            stack.push_async_callback(self._end_tasks)
            self.sink.begun = time.monotonic()
            works = {
                "sealer": self.sealer.run,
                **outlet.tasks(WRITERS),
                "watch": self._watch,
                "loop lag": self._lag.watch,
            }
            if not self.number:
                works["maintenance"] = partial(maintain, self.database, self.store)
                works["filler-in"] = partial(fill_in, self.database, self.store, enricher)
            for name, work in works.items():
                self.tasks.start(name, work)
            self.receiver.start()
            if await ends_before(self.database.ready(PATIENCE), stopped) and self.database.state != "connected":
                log.warning("database: not there yet (%s); batches go to the spool", self.database.stats().error or "")
            await stopped.wait()
            await self._drain()
            await self._end_tasks()
            await self.sealer.seal_rest()
            await outlet.save(FORCE_LIMIT)
        self.snapshot()
        there = sum(each.stats().rows for each in outlet.spools)
        if there != outlet.backlog.spooled:
            self.tasks.fault("spool", RuntimeError(f"{there} rows are there, {outlet.backlog.spooled} should be"))
        return int(outlet.backlog.dropped["stopped"] > 0)

    def stop(self) -> None:
        """The first call: no more intake, and what is there is stored. The second: the rest goes to the spool."""
        self.sink.stopping = self.sealer.stopping = True
        self._stages()

    async def _drain(self) -> None:
        """Store what is there, while there is time and a database."""
        deadline = time.monotonic() + self.options.stop_limit
        intake = min(deadline, time.monotonic() + DRAIN_LIMIT)
        while self.receiver.drain() and time.monotonic() < intake:  # noqa: ASYNC110  -- the others have their turn
            await asyncio.sleep(0)
        self._kernel_drops()  # of a closed socket nobody can tell
        self.receiver.close()
        self.sealer.stop()
        await self._changes.until(
            lambda: self._stages.forced.is_set() or self._is_drained(), deadline - time.monotonic()
        )

    def _is_drained(self) -> bool:
        """Whether nothing is in memory, nor in a spool while there is a database."""
        backlog = self.outlet.backlog
        if len(self.queue) or self.sealer.sealing or backlog.held():
            return False
        return self.database.state != "connected" or not backlog.spooled

    async def _end_tasks(self) -> None:
        """A task that is cancelled rolls back, which a database that does not answer holds up: it is cut off then. What
        that raises may take the place of the cancellation, so it is repeated."""
        late = {*self.tasks.running.values(), *self.sealer.waits}
        while late:
            for task in late:
                task.cancel()
            _, late = await asyncio.wait(late, timeout=CANCEL_LIMIT)
            if late:
                await self.database.close()

    def snapshot(self) -> LogCounts:
        """All counts of this moment; an imbalance is logged."""
        queue, intake, data = self.queue.stats(), self.receiver.stats(), self.database.stats()
        found, backlog, sealer = self.sealer.enricher.stats(), self.outlet.backlog, self.sealer
        spools = [each.stats() for each in self.outlet.spools]
        lost = Counter({"spool unreadable": backlog.lost, "cannot be encoded": sealer.unsealed})
        counts = LogCounts(
            received=self._received,
            recovered=backlog.recovered,
            stored=backlog.stored,
            dead=backlog.refused,
            dropped=dict(backlog.dropped + Counter(queue.dropped) + lost),
            held={
                "queue": queue.queued,
                "sealing": sealer.sealing,
                "sealed": backlog.held_waiting(),
                "writing": backlog.held_under_way(),
                "spooling": backlog.held_spilling(),
                "spool": backlog.spooled,
            },
            datagrams=intake.datagrams,
            bytes=intake.bytes,
            refused=intake.refused,
            kernel_drops=self._kernel_drops(),
            missing=self.sink.missing,
            filled=self.store.stats().filled,
            spool_bytes=sum(each.bytes for each in spools),
            spool_refused=sum(each.refused for each in spools),
            lag=max(self.sink.lags),
            loop_lag=self._lag.longest,
            database=data.state,
            metadata=found.breaker if sealer.enricher.configured else "none",
            metadata_loads=found.loads,
            metadata_failures=found.failures,
            lines_lost=lines_lost(),
            stopping=self._stages.stage > 0,
        )
        self.tasks.balance(imbalance(counts), counts)
        return counts._replace(faults=self.tasks.faults)

    stats = snapshot
    __repr__ = stats_repr
