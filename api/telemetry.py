"""What the aggregation API tells about itself: metrics, events, log lines.

``METRICS``     for ``/metrics``, read from the counts that the parts keep anyway: a request pays nothing for it.
``Events``      ``/events``: one ring of the last events for all who listen. A stream holds only the number of the last
                event it sent, so that a thousand slow listeners cost no more than the ring; who is slower than the ring
                misses what fell out of it.
``RequestLog``  a line of JSON for each request and each failed load. The event loop only appends a tuple; the lines are
                made and written in a thread, in batches. If the output is blocked, at most ``WAITING`` lines wait, and
                what comes after them is counted as lost: a log that nobody reads never stops a request.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from operator import attrgetter
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import orjson

from api.upstreams import Source, percentiles
from coordination import Clock, wait_for_event
from primitives import Batch
from runtime.monitor import Measure, counter, gauge
from runtime.stderr import lines_lost

if TYPE_CHECKING:
    from api.service import Service
    from runtime.postgres import WriterStats

KEEP_ALIVE = 15.0
"""Seconds after which a silent stream says that it is still there."""
WAITING = 20_000
"""Log lines that may wait for the output."""


# -------------------------------------------------------------------------------------------------------- metrics


CIRCUIT = {"closed": 0.0, "half_open": 0.5, "open": 1.0}


def answers(service: Service) -> dict[tuple[str, str], int]:
    """How many, by source and state."""
    return {(name, state): n for name, source in service.sources.items() for state, n in source.answers.items()}


def latencies(service: Service) -> dict[tuple[str, str], float]:
    """Seconds, by source and quantile."""
    every = {name: percentiles(source.latencies) for name, source in service.sources.items()}
    return {(name, f"0.{quantile[1:]}"): seconds for name, each in every.items() for quantile, seconds in each.items()}


def rows(service: Service) -> WriterStats:
    """Counts of the rows of the history."""
    return service.history.writer.stats()


def by_source(name: str, text: str, read: Callable[[Source], float], kind: Callable[..., Measure] = counter) -> Measure:
    """What is read of each source."""
    return kind(
        f"aggregate_{name}", text, lambda it: {name: read(source) for name, source in it.sources.items()}, "source"
    )


METRICS = (
    counter("aggregate_answers", "Parts of answers by their state", answers, "source", "state"),
    by_source("upstream_calls", "Requests sent, retries included", attrgetter("calls")),
    by_source("failed_loads", "Loads that ended in an error", attrgetter("failures")),
    by_source("refused_calls", "Calls that the breaker refused", lambda source: source.breaker.stats().refused),
    by_source(
        "circuit_open", "0 closed, 0.5 half-open, 1 open", lambda each: CIRCUIT[each.breaker.stats().state], gauge
    ),
    by_source("cache_entries", "Answers kept", lambda source: len(source.cache), gauge),
    gauge("aggregate_upstream_latency_seconds", "Of the last 1,000 loads", latencies, "source", "quantile"),
    gauge("aggregate_loop_lag_seconds", "Longest of the last minute", attrgetter("lag.longest")),
    gauge("aggregate_database_up", "1 if there is a connection", lambda it: float(it.database.state == "connected")),
    gauge("aggregate_rows_queued", "Results that wait to be written", lambda it: rows(it).queued),
    counter("aggregate_rows_written", "Results in the database", lambda it: rows(it).written),
    counter(
        "aggregate_rows_lost",
        "Results that were not kept",
        lambda it: rows(it).lost + rows(it).refused,
    ),
    counter("aggregate_log_lines_lost", "Lines that found the output blocked", lambda it: it.log.lost + lines_lost()),
)
"""What ``/metrics`` shows of the service, read from the counts that its parts keep anyway."""


# --------------------------------------------------------------------------------------------------------- events


class Events:
    """The last ``keep`` events, and those who wait for the next one."""

    def __init__(self, keep: int = 256) -> None:
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=keep)
        self._serial = 0
        self._news = asyncio.Event()
        self.streams = 0
        self._ended = False

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        self._serial += 1
        said = orjson.dumps({**data, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})
        self._ring.append((self._serial, b"id: %d\nevent: %s\ndata: %s\n\n" % (self._serial, kind.encode(), said)))
        self._wake()

    def end(self) -> None:
        """End all streams, and those that begin from now on."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def stream(self, last: int | None = None) -> AsyncIterator[bytes]:
        """The events after number ``last``, as far as they are known; None: those from now on."""
        seen = self._serial if last is None or last > self._serial else last
        self.streams += 1
        try:
            yield b"retry: 2000\n\n"
            while not self._ended:
                news = self._news
                text = b"".join(event for serial, event in self._ring if serial > seen)
                seen = self._serial
                if text:
                    yield text
                    continue
                if not await wait_for_event(news, KEEP_ALIVE):
                    yield b": keep-alive\n\n"
        finally:
            self.streams -= 1


# ------------------------------------------------------------------------------------------------------- log lines


class Line(NamedTuple):
    """What is noted of a request (or, with an ``event`` of another name, of something else)."""

    at: float
    """Seconds since 1970."""
    event: str
    request_id: str
    fields: Mapping[str, Any]


class RequestLog:
    """Lines of JSON to ``output``, written by a thread of its own. ``output`` None: no lines are made.

    Each count has one writer, the event loop or the thread, so that none needs a lock.
    """

    def __init__(self, output: IO[bytes] | None, clock: Clock = time.time) -> None:
        self._output, self._clock = output, clock
        self.wanted = output is not None
        self._batch: Batch[Line] = Batch(1000, 0.2)
        self._wake = asyncio.Event()
        self._handed: queue.SimpleQueue[list[Line] | None] = queue.SimpleQueue()
        self._noted = self._done = self._refused = self._unwritten = 0
        # a daemon: if the output is blocked for ever, the program must end nevertheless
        self._thread = threading.Thread(target=self._write_all, name="request log", daemon=True)

    def note(self, event: str, request_id: str, fields: Mapping[str, Any]) -> None:
        if not self.wanted:
            return
        if self._noted - self._done >= WAITING:
            self._refused += 1
            return
        self._noted += 1
        full = self._batch.add(Line(self._clock(), event, request_id, fields))
        if full is not None:
            self._handed.put(full)
        elif len(self._batch) == 1:
            self._wake.set()

    @property
    def lost(self) -> int:
        return self._refused + self._unwritten

    def _write_all(self) -> None:
        while (lines := self._handed.get()) is not None:
            try:
                assert self._output is not None
                left = memoryview(b"".join(map(written, lines)))
                while left:  # without a buffer, a part of it may be written; nothing (None), if it must not block
                    count = self._output.write(left)
                    if not count:
                        raise BlockingIOError
                    left = left[count:]
                self._output.flush()
            except Exception:  # nobody is there to read; whatever it is, the next lines may be written
                self._unwritten += len(lines)
            self._done += len(lines)

    async def run(self) -> None:
        """Hand over what has waited long enough."""
        self._thread.start()
        while True:
            self._wake.clear()
            if lines := self._batch.take():
                self._handed.put(lines)
            await wait_for_event(self._wake, self._batch.due_in())

    async def close(self, timeout: float = 1.0) -> None:
        """Write what is left, for at most ``timeout`` seconds."""
        self.wanted = False
        self._handed.put(self._batch.drain())
        self._handed.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout)


def standard_output() -> IO[bytes] | None:
    """Without its buffer, whose lock a thread in a blocked write would keep when the program ends. None: closed."""
    buffer = getattr(sys.stdout, "buffer", None)
    return getattr(buffer, "raw", buffer)


def written(line: Line) -> bytes:
    """A line of JSON, with the time as RFC 3339 has it."""
    at = datetime.fromtimestamp(line.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    said = {"time": at, "event": line.event, "request_id": line.request_id, **line.fields}
    return orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE)
