"""The bounded queue of log events between the socket and the batches.

Promised by ``EventQueue``: never more than its capacity in events and bytes; first in, first out; what does not fit is
dropped by a stated policy and counted by its cause: received = queued + taken + dropped, at every moment.

It is a container that knows the time: it waits for nothing, and belongs to one event loop, so there is no lock.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from heapq import merge
from itertools import repeat
from typing import Literal, NamedTuple, get_args

from coordination import Clock, stats_repr
from logs.parse import Event
from primitives import NANOSECOND

Policy = Literal["drop-newest", "drop-lowest-severity", "spool"]
Cause = Literal["queue full", "queue bytes", "less severe", "too large"]

POLICIES: tuple[Policy, ...] = get_args(Policy)
CAUSES: tuple[Cause, ...] = get_args(Cause)
"""Of a dropped event: no place, or no bytes, were left for it; it gave way to a more severe one; it alone is larger
than all that the queue may hold."""
EVENT_BYTES = 400
"""An estimate of what an event takes in memory besides the characters of its message and attributes: the tuple, a
datetime, the heads of four strings, and short names."""


class EventQueueStats(NamedTuple):
    """``received == queued + taken + sum(dropped.values())``; ``bytes`` as estimated, ``age`` in seconds."""

    received: int
    queued: int
    bytes: int
    taken: int
    dropped: dict[Cause, int]
    age: float  # of the oldest event; 0.0 if there is none


Waiting = tuple[int, float, Event, int]
"""An event that waits: its number in the order of arrival, since when, itself, and its bytes."""


class EventQueue:
    """Events that wait to be stored: at most ``capacity`` of them and about ``max_bytes`` bytes.

    They leave in batches: as soon as there are ``max_items`` or ``batch_bytes``, or when the oldest has waited
    ``max_age`` seconds. A batch has at most ``max_items`` and ``batch_bytes`` (half of ``max_bytes``), or one event.

    What comes when there is no room: ``drop-newest`` drops it. ``drop-lowest-severity`` drops the least severe that
    waits, of these the newest, as long as that is less severe than what comes; if not even all of those would make
    room, what comes is dropped and they stay. ``spool`` is ``drop-newest``, with ``over()`` telling in time that
    batches should be put on disk.

    Not built on ``primitives.Batch``: that one hands out all it has, and nothing in it gives way. Inside, what waits is
    one queue, or one for each severity if the least severe is to go; a batch is merged from their heads by ``serial``.
    """

    def __init__(
        self,
        capacity: int = 100_000,
        max_bytes: int = 64_000_000,
        policy: Policy = "drop-newest",
        *,
        max_items: int = 1000,
        max_age: float = 5.0,
        batch_bytes: int = 4_000_000,
        clock: Clock = time.monotonic,
    ) -> None:
        self.capacity, self.max_bytes, self.policy = capacity, max_bytes, policy
        self.max_items, self.max_age, self.batch_bytes = max_items, max_age, batch_bytes
        self._clock = clock
        self._by_severity = policy == "drop-lowest-severity"
        self._levels = [deque[Waiting]() for _ in range(8 if self._by_severity else 1)]
        self._level_bytes = [0] * len(self._levels)
        self._queued = self._bytes = self._received = self._taken = self._serial = 0
        self._dropped: dict[Cause, int] = dict.fromkeys(CAUSES, 0)

    def put(self, events: Sequence[Event]) -> None:
        """Take events, or drop and count what does not fit."""
        sizes = [
            EVENT_BYTES
            + (len(event.message) if event.message.isascii() else sys.getsizeof(event.message))
            + (len(event.attributes) if event.attributes.isascii() else sys.getsizeof(event.attributes))
            for event in events
        ]
        size, now = sum(sizes), self._clock()
        self._received += len(events)
        if self._queued + len(events) <= self.capacity and self._bytes + size <= self.max_bytes:
            self._admit(events, sizes, size, now)
            return
        for event, size in zip(events, sizes, strict=True):
            cause = self._refusal(size)
            if cause is None or self._make_room(event.severity & 7, size):
                self._admit((event,), (size,), size, now)
            else:
                self._dropped[cause] += 1

    def _refusal(self, size: int) -> Cause | None:
        """Why an event of that size cannot be admitted; None: it can."""
        if size > self.max_bytes:
            return "too large"
        if self._queued >= self.capacity:
            return "queue full"
        return "queue bytes" if self._bytes + size > self.max_bytes else None

    def _admit(self, events: Sequence[Event], sizes: Sequence[int], size: int, now: float) -> None:
        waiting = zip(range(self._serial, self._serial + len(events)), repeat(now), events, sizes, strict=False)
        if self._by_severity:
            for one in waiting:
                level = one[2].severity & 7
                self._levels[level].append(one)
                self._level_bytes[level] += one[3]
        else:
            self._levels[0].extend(waiting)
        self._serial += len(events)
        self._queued += len(events)
        self._bytes += size

    def _make_room(self, level: int, size: int) -> bool:
        """Drop what is less severe than ``level`` until ``size`` bytes fit; False, and nothing dropped, if they never
        would."""
        needed, less_severe = self._bytes + size - self.max_bytes, self._levels[level + 1 :]
        if needed > sum(self._level_bytes[level + 1 :]) or not any(less_severe):
            return False
        for least in range(7, level, -1):
            while self._levels[least] and self._refusal(size) is not None:
                freed = self._levels[least].pop()[3]
                self._queued -= 1
                self._bytes -= freed
                self._level_bytes[least] -= freed
                self._dropped["less severe"] += 1
        return True

    def take(self) -> list[Event] | None:
        """The next batch if one is due, the oldest first; else None."""
        return self.drain() if self.due_in() <= 0.0 else None

    def drain(self) -> list[Event]:
        """The next batch, due or not; empty if nothing waits."""
        batch, total = list[Event](), 0
        for _, _, event, size in merge(*self._levels) if self._by_severity else self._levels[0]:
            if len(batch) == self.max_items or (batch and total + size > self.batch_bytes):
                break
            batch.append(event)
            total += size
        if self._by_severity:
            for event in batch:
                level = event.severity & 7
                self._level_bytes[level] -= self._levels[level].popleft()[3]
        else:
            gone = self._levels[0].popleft
            for _ in batch:
                gone()
        self._queued -= len(batch)
        self._taken += len(batch)
        self._bytes -= total
        return batch

    def _oldest_since(self) -> float:
        return min(waiting[0] for waiting in self._levels if waiting)[1]

    def due_in(self) -> float:
        """Seconds until ``take`` gives a batch if nothing more comes (0.0: now), infinity if nothing waits."""
        if not self._queued:
            return math.inf
        if self._queued >= self.max_items or self._bytes >= self.batch_bytes:
            return 0.0
        wait = self._oldest_since() + self.max_age - self._clock()
        return wait if wait > NANOSECOND else 0.0

    def over(self) -> bool:
        """The policy is ``spool`` and the queue is past half of what it may hold: put batches on disk."""
        half = self._queued * 2 > self.capacity or self._bytes * 2 > self.max_bytes
        return half and self.policy == "spool"

    def __len__(self) -> int:
        return self._queued

    def stats(self) -> EventQueueStats:
        """The counts of this moment."""
        age = max(0.0, self._clock() - self._oldest_since()) if self._queued else 0.0
        return EventQueueStats(self._received, self._queued, self._bytes, self._taken, dict(self._dropped), age)

    __repr__ = stats_repr
