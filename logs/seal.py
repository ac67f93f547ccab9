"""From the queue to sealed batches: what is not known of a batch's services is waited for, at most ``enrich_wait`` s.

A sealed batch is events as the text that COPY reads, and an id: what happens to it afterwards never changes either.
``seal`` takes about 2 ms for 1,000 events.

Promised by ``Sealer``: an event that was taken from the queue is counted as ``sealing`` until it is in the outlet,
whatever fails or is cancelled; one that cannot be encoded costs itself only. Batches that wait for metadata are bounded
in number and bytes; beyond that, batches do not wait. All is in the event loop, without a lock.
"""

from __future__ import annotations

import asyncio
import functools
import math
import secrets
import time
from collections.abc import Callable, Sequence
from uuid import UUID

from coordination import wait_for_event
from logs.enrich import Enricher
from logs.event_queue import EventQueue
from logs.metadata import Found
from logs.options import IngestOptions
from logs.parse import Event, Metadata
from runtime.outlet import Changes, Outlet
from runtime.spool import EncodedBatch

WAITS, WAITS_BYTES = 50, 32_000_000  # batches, and bytes of them, that may wait for metadata; further ones do not wait

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def escaped(text: str) -> str:
    """``text`` as a field of COPY's text format."""
    if "\\" in text or "\t" in text or "\n" in text or "\r" in text:
        return text.translate(_ESCAPES)
    return text


def row(event: Event, received: str) -> str:
    """The columns of ``event`` up to ``parse_error`` as COPY text, without a tab after it or a line end. ``received``:
    its ``received_at``, written."""
    received_at, event_at, service, host, severity, message, attributes, parse_error = event
    when = received if event_at is received_at else event_at.isoformat()
    line = f"{received}\t{when}\t{service}\t{host}\t{severity}\t{message}\t{attributes}"
    if "\\" in line or "\n" in line or "\r" in line or line.count("\t") != 6:
        texts = "\t".join([escaped(service), escaped(host), str(severity), escaped(message), escaped(attributes)])
        line = f"{received}\t{when}\t{texts}"
    return f"{line}\t\\N" if parse_error is None else f"{line}\t{escaped(parse_error)}"


_NO_METADATA = "\\N\t\\N\t\\N\t\\N\t"


@functools.lru_cache(10_000)
def _done(found: Metadata) -> str:
    return "\t".join([*map(escaped, found), "done"])


def metadata_columns(found: Found, configured: bool = True) -> str:
    """The columns from ``team`` on, as COPY text without a line end. ``configured``: whether there is an API at all."""
    if isinstance(found, Metadata):
        return _done(found)
    if found is not None:
        return f"{_NO_METADATA}unknown"
    return _NO_METADATA + ("missing" if configured else "none")


def new_id(now: float, randbits: Callable[[int], int] = secrets.randbits) -> UUID:
    """An id for a batch (UUID version 7, RFC 9562): the Unix time ``now`` (seconds), so that the index of the ids grows
    at one end, and 74 random bits."""
    milliseconds = int(now * 1000) & (1 << 48) - 1
    return UUID(int=milliseconds << 80 | 7 << 76 | randbits(12) << 64 | 2 << 62 | randbits(62))


def seal(events: Sequence[Event], look: Callable[[str], Found], configured: bool = True) -> EncodedBatch:
    """A batch of ``events``, at least one, with the metadata that ``look(service)`` has at this moment.

    What UTF-8 cannot hold (a lone surrogate) is kept as bytes that the database will refuse: that costs its row, not
    the batch.
    """
    lines, columns = [], dict[str, str]()
    oldest = last = events[0].received_at
    received = last.isoformat()
    for event in events:
        if event.received_at is not last:
            last = event.received_at
            received = last.isoformat()
            oldest = min(oldest, last)
        service = event.service
        rest = columns.get(service)
        if rest is None:
            rest = columns[service] = metadata_columns(look(service), configured)
        lines.append(f"{row(event, received)}\t{rest}\n")
    data = "".join(lines).encode(errors="surrogatepass")
    return EncodedBatch(new_id(time.time()), len(events), oldest.timestamp(), data)


class Sealer:
    """Takes batches from ``queue`` when they are due and ``outlet`` has room. ``fault`` is told of faults of ours."""

    def __init__(
        self,
        options: IngestOptions,
        queue: EventQueue,
        outlet: Outlet[EncodedBatch],
        *,
        changes: Changes,
        fault: Callable[[str, BaseException], None],
    ) -> None:
        self._queue, self._outlet, self._changes, self._fault = queue, outlet, changes, fault
        self._spools, self._durable = options.overload == "spool", options.durable
        self._wait = options.enrich_wait
        self.enricher = Enricher(options.metadata)
        self.sealing = self.unsealed = self._bytes = 0
        """Events: on their way; those that could not be encoded. Bytes of those that wait."""
        self.stopping = False
        self.waits: dict[asyncio.Task[None], tuple[list[Event], int]] = {}
        """Batches that wait for metadata, and their bytes."""
        self._due, self._sleeping = asyncio.Event(), False  # ``_sleeping``: it knows when the oldest event will be due

    def wake(self) -> None:
        """Events came."""
        if not self._sleeping or self._queue.due_in() <= 0.0:
            self._due.set()
        if self._queue.over():
            self._changes.tell()

    def stop(self) -> None:
        """Batches are due as they are, and wait for nothing."""
        self.stopping = True
        self._due.set()

    async def run(self) -> None:
        """Take batches when they are due, while there is room for them."""
        queue = self._queue
        while True:
            self._due.clear()
            while not self._has_room():
                await self._changes.wait()
            before = queue.stats().bytes
            events = queue.drain() if self.stopping else queue.take()
            if events:
                self._begin(events, max(0, before - queue.stats().bytes))
                await asyncio.sleep(0)
                continue
            self._changes.tell()
            due = queue.due_in()
            self._sleeping = due < math.inf
            await wait_for_event(self._due, due)
            self._sleeping = False

    def _has_room(self) -> bool:
        """Whether another batch may be sealed. Those that wait for metadata come on top: at most ``WAITS``."""
        backlog = self._outlet.backlog
        return backlog.room(self._bytes) > 0 or (self._queue.over() and len(backlog.diverted) < backlog.max_items)

    def _begin(self, events: list[Event], size: int) -> None:
        """Seal a batch; when the metadata of its services are there, or did not come in time."""
        self.sealing += len(events)
        enricher = self.enricher
        may_wait = len(self.waits) < WAITS and self._bytes + size <= WAITS_BYTES
        if enricher.configured and self._wait > 0 and may_wait and not self.stopping:
            look = enricher.look
            unknown = [name for name in {event.service for event in events} if look(name) is None]
            if unknown:
                self._bytes += size
                task = asyncio.create_task(enricher.wait(unknown, self._wait))
                self.waits[task] = events, size
                task.add_done_callback(self._waited)  # also if it is cancelled: the events must go somewhere
                return
        self._seal(events)

    def _waited(self, task: asyncio.Task[None]) -> None:
        events, size = self.waits.pop(task)
        self._bytes -= size
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault("enricher", error)
        self._seal(events)

    def _seal(self, events: list[Event]) -> None:
        try:
            self._hand_on(events)
        except Exception as error:  # a fault of ours; whatever it is, it must cost the event that causes it only
            self._fault("sealer", error)
            for event in events:
                try:
                    self._hand_on([event])
                except Exception:
                    self.unsealed += 1
        self.sealing -= len(events)

    def _hand_on(self, events: list[Event]) -> None:
        """To the sink, or to the spool."""
        batch, outlet = seal(events, self.enricher.look, self.enricher.configured), self._outlet
        overflows = self._spools and (self._queue.over() or not outlet.backlog.room(self._bytes))
        outlet.put([batch], divert=self._durable or overflows or outlet.sink.diverts())

    async def seal_rest(self) -> None:
        """At the end: what is left in the queue."""
        while events := self._queue.drain():
            self.sealing += len(events)
            self._seal(events)
            await asyncio.sleep(0)
