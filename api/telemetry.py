"""What the aggregation API tells about itself: metrics, events, log lines.

``METRICS``     for ``/metrics``, read from the counts that the parts keep anyway: a request pays nothing for it.
``Events``      ``/events``: one ring of the last events for all who listen. A stream holds only the number of the last
                event it sent; who is slower than the ring misses what fell out of it.
``RequestLog``  a line of JSON for each request and each failed load, made and written in a thread. If the output is
                blocked, at most ``WAITING`` lines wait: a log that nobody reads never stops a request.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import starmap
from operator import attrgetter
from typing import IO, TYPE_CHECKING, Any

import orjson

from api.upstreams import Source
from coordination import Clock
from runtime.monitor import Histogram, Measure, counter, gauge, histogram
from runtime.outlet import Changes
from runtime.stderr import lines_lost

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from api.service import Service
    from runtime.writer import WriterStats

KEEP_ALIVE = 15.0  # seconds after which a silent stream says that it is still there
WAITING = 20_000  # log lines that may wait for the output
STREAMS_OF_CLIENT = 8  # streams of events of one client address at a time
EVENT = b"id: %s-%d\nevent: %s\ndata: %s\n\n"
GATHER = 0.2  # seconds in which log lines gather to be written together
CIRCUIT = {"closed": 0.0, "half_open": 0.5, "open": 1.0}


def _answers(service: Service) -> dict[tuple[str, str], int]:
    """Counts by source and state."""
    return {(name, state): n for name, source in service.sources.items() for state, n in source.answers.items()}


def _refused(service: Service) -> dict[tuple[str, str], int]:
    """Counts by source and reason."""
    return {(name, reason): n for name, source in service.sources.items() for reason, n in source.refused.items()}


def _requests(service: Service) -> dict[tuple[str, str], Histogram]:
    """By route and status."""
    return {(route, str(status)): durations for (route, status), durations in service.requests.items()}


def _sources(name: str, text: str, read: Callable[[Source], float], kind: Callable[..., Measure] = counter) -> Measure:
    """A metric that ``read`` gives for each source."""

    def values(service: Service) -> dict[str, float]:
        return {name: read(source) for name, source in service.sources.items()}

    return kind(f"aggregate_{name}", text, values, "source")


def _rows(name: str, text: str, read: Callable[[WriterStats], int], kind: Callable[..., Measure] = counter) -> Measure:
    """A metric that ``read`` gives of the rows of the history."""
    return kind(f"aggregate_rows_{name}", text, lambda service: read(service.history.writer.stats()))


def _durations(service: Service) -> dict[str, Histogram]:
    return {name: source.durations for name, source in service.sources.items()}


METRICS = (
    histogram("aggregate_request_duration_seconds", "Of requests, streams included", _requests, "route", "status"),
    counter("aggregate_answers", "Parts of answers by their state", _answers, "source", "state"),
    _sources("upstream_calls", "Requests sent, retries included", attrgetter("calls")),
    _sources("failed_loads", "Loads that ended in an error", attrgetter("failures")),
    counter("aggregate_refused_loads", "Loads that made no call", _refused, "source", "reason"),
    _sources("circuit_open", "0 closed, 0.5 half-open, 1 open", lambda source: CIRCUIT[source.breaker.state], gauge),
    _sources("cache_entries", "Answers kept", lambda source: len(source.cache), gauge),
    histogram("aggregate_load_duration_seconds", "Of loads, with their retries and waits", _durations, "source"),
    _sources("paused_seconds", "For which no call is made, as it wished", attrgetter("paused_for"), gauge),
    gauge("aggregate_loop_lag_seconds", "Longest of the last minute", attrgetter("lag.longest")),
    gauge("aggregate_database_up", "1 if there is a connection", lambda api: float(api.database.state == "connected")),
    _rows("queued", "Results that wait to be written", attrgetter("queued"), gauge),
    _rows("written", "Results in the database", attrgetter("written")),
    _rows("lost", "Results that were not kept", lambda stats: stats.lost + stats.refused),
    counter("aggregate_log_lines_lost", "Lines that found the output blocked", lambda api: api.log.lost + lines_lost()),
)


class OfWorker:
    """The metrics of a registry; if this process may be one of several workers, each with its number as a label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        labels = {"worker": str(os.getpid())} if is_worker() else {}
        for family in self._registry.collect():
            family.samples = [sample._replace(labels={**labels, **sample.labels}) for sample in family.samples]
            yield family


def is_worker() -> bool:
    """Whether another process started this one to serve, and so maybe others (``--workers``)."""
    return multiprocessing.parent_process() is not None


class Events:
    """The last ``keep`` events, and those who wait for the next one.

    An event's id is the epoch of this life of this process, and its number.
    """

    def __init__(self, keep: int = 256) -> None:
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=keep)
        self._serial, self._epoch = 0, secrets.token_hex(4)
        self._news = Changes()
        self._clients: Counter[str] = Counter()
        self._ended = False

    @property
    def streams(self) -> int:
        """Streams that there are."""
        return self._clients.total()

    def join(self, client: str) -> bool:
        """Count a stream, unless there are too many of this client; ``leave`` follows."""
        if self._clients[client] >= STREAMS_OF_CLIENT:
            return False
        self._clients[client] += 1
        return True

    def leave(self, client: str) -> None:
        """The stream has ended."""
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        """Send an event to all streams."""
        self._serial += 1
        body = orjson.dumps({**data, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})
        self._ring.append((self._serial, EVENT % (self._epoch.encode(), self._serial, kind.encode(), body)))
        self._news.tell()

    def end(self) -> None:
        """End all streams, and those that begin from now on."""
        self._ended = True
        self._news.tell()

    async def stream(self, last: str = "") -> AsyncIterator[bytes]:
        """The events after the one of id ``last``, as far as they are known: all that are, if that is none of this
        life's. Without it, those from now on."""
        epoch, _, number = last.partition("-")
        seen = 0 if last else self._serial
        if epoch == self._epoch and re.fullmatch("[0-9]{1,18}", number, re.A) and int(number) <= self._serial:
            seen = int(number)
        yield b"retry: 2000\n\n"
        while not self._ended:
            text = b"".join(event for serial, event in self._ring if serial > seen)
            seen = self._serial
            if text:
                yield text
            elif not await self._news.wait(KEEP_ALIVE):
                yield b": keep-alive\n\n"


class RequestLog:
    """Lines of JSON to ``output``, written by a thread of its own. ``output`` None: no lines are made.

    Each count has one writer, the event loop or the thread, so that none needs a lock.
    """

    def __init__(self, output: IO[bytes] | None, clock: Clock = time.time) -> None:
        self._output, self._clock = output, clock
        self.wanted = output is not None
        self._waiting: queue.SimpleQueue[tuple[float, str, str, Mapping[str, Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._noted = self._done = self._refused = self._unwritten = 0
        # a daemon: if the output is blocked for ever, the program must end nevertheless
        self._thread = threading.Thread(target=self._write_all, name="request log", daemon=True)
        if self.wanted:
            self._thread.start()

    def note(self, event: str, request_id: str, fields: Mapping[str, Any]) -> None:
        """Have a line written; it is lost if ``WAITING`` lines wait for the output."""
        if self.wanted and self._noted - self._done >= WAITING:
            self._refused += 1
        elif self.wanted:
            self._noted += 1
            self._waiting.put((self._clock(), event, request_id, fields))

    @property
    def lost(self) -> int:
        """Lines that were not written."""
        return self._refused + self._unwritten

    def _write_all(self) -> None:
        ended = False
        while not ended:
            lines = [self._waiting.get()]
            self._closing.wait(GATHER)
            lines += [self._waiting.get() for _ in range(self._waiting.qsize())]
            ended = lines[-1] is None
            noted = [line for line in lines if line is not None]
            try:
                assert self._output is not None
                left = memoryview(b"".join(starmap(_encoded, noted)))
                while left:  # without a buffer, a part of it may be written; nothing (None), if it must not block
                    count = self._output.write(left)
                    if not count:
                        raise BlockingIOError
                    left = left[count:]
                self._output.flush()
            except Exception:  # nobody is there to read; whatever it is, the next lines may be written
                self._unwritten += len(noted)
            self._done += len(noted)

    async def close(self, timeout: float = 1.0) -> None:
        """Write what is left, for at most ``timeout`` seconds."""
        self.wanted = False
        self._closing.set()
        self._waiting.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout)


def _encoded(at: float, event: str, request_id: str, fields: Mapping[str, Any]) -> bytes:
    """A line of JSON; ``at`` is in seconds since 1970, and written as RFC 3339 has it."""
    time = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"time": time, "event": event, "request_id": request_id, **fields}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def standard_output() -> IO[bytes] | None:
    """Stdout without its buffer, whose lock a thread in a blocked write would keep at the end. None: it is closed."""
    buffer = getattr(sys.stdout, "buffer", None)
    return getattr(buffer, "raw", buffer)
