"""The records that a publisher has taken and not yet got rid of. Pure: what comes next, and the counts; no I/O.

``Backlog``   trades and dead letters: waiting -> under way -> published; or waiting -> moving -> spooled -> under way.
``LatestRows``   analytics: waiting -> under way -> published; the oldest that wait make room.

Promised: accepted + recovered == published + held + spooled + dropped + lost after every call (``Counts``). Records
leave in the order in which they came. Both belong to the event loop of the publisher; there is no lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from market.topics import Record

FLIGHT, FLIGHT_BYTES = 5000, 1_300_000
"""Records that are under way together at most, and bytes of their values, or one more."""
HEAVY = 64_000_000
"""Bytes of raw frames that may wait."""


class Counts(NamedTuple):
    """accepted + recovered == published + held + spooled + dropped + lost."""

    accepted: int
    recovered: int
    """Left in the spool by a previous life."""
    published: int
    """Acknowledged."""
    held: int
    """In memory, on its way included."""
    spooled: int
    dropped: int
    lost: int
    """The disk did not give back what it had taken."""


def frame_bytes(records: Iterable[Record]) -> int:
    """Bytes of the dead letters among them, which have no key."""
    return sum(len(record.value) for record in records if record.key is None)


class Backlog:
    """Trades and dead letters: at most ``limit`` that wait in memory, of which raw frames have ``HEAVY`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting = deque[Record]()
        self.under_way: list[Record] = []
        self.files: list[str] = []
        """The files of the spool that hold what is under way."""
        self.unwanted = 0
        """Of what is under way: dead letters that the broker refuses."""
        self.moving = 0
        """Records on their way from memory to the spool."""
        self.recovered = self.published = self.spooled = self.dropped = self.lost = 0
        self._accepted = self._frame_bytes = 0

    def room(self) -> int:
        """How many more may wait: what moves to the spool may come back."""
        return max(0, self.limit - len(self.waiting) - self.moving) if self._frame_bytes < HEAVY else 0

    def accept(self, records: Sequence[Record]) -> None:
        self.waiting.extend(records)
        self._frame_bytes += frame_bytes(records)
        self._accepted += len(records)

    def recover(self, records: int) -> None:
        """A previous life left so many in the spool."""
        self.recovered = self.spooled = records

    def take(self, most: int) -> list[Record]:
        """The oldest of what waits."""
        records, size = list[Record](), 0
        while self.waiting and len(records) < most and size < FLIGHT_BYTES:
            records.append(self.waiting.popleft())
            size += len(records[-1].value)
        self._frame_bytes -= frame_bytes(records)
        return records

    def put_back(self, records: Sequence[Record]) -> None:
        """What was taken waits again, in its place."""
        self.waiting.extendleft(reversed(records))
        self._frame_bytes += frame_bytes(records)

    def send(self, records: list[Record], files: list[str] | None = None) -> None:
        """These are under way now; they stay in those files of the spool until the answer comes."""
        self.under_way, self.files = records, files or []

    def copied(self, name: str) -> None:
        """What is under way is in that file of the spool too."""
        self.files = [name]
        self.spooled += len(self.under_way)

    def landed(self) -> list[str]:
        """All that was under way is in Kafka. The files of the spool that it was in."""
        files, self.files = self.files, []
        if files:
            self.spooled -= len(self.under_way)
        self.published += len(self.under_way) - self.unwanted
        self.dropped += self.unwanted
        self.under_way = []
        return files

    def lose(self, records: int) -> None:
        """The disk did not give back so many."""
        self.spooled -= records
        self.lost += records

    def drop(self) -> int:
        """At the end: what is in memory only is dropped. How many that are."""
        left = len(self.waiting) + (0 if self.files else len(self.under_way))
        self.dropped += left
        self.waiting.clear()
        self.under_way = []
        return left

    def is_empty(self) -> bool:
        return not (self.waiting or self.under_way or self.moving or self.spooled)

    def counts(self) -> Counts:
        held = len(self.waiting) + self.moving + (0 if self.files else len(self.under_way))
        return Counts(
            *(self._accepted, self.recovered, self.published, held),
            *(self.spooled, self.dropped, self.lost),
        )


class LatestRows:
    """Rows of analytics, ``limit`` of which may wait."""

    def __init__(self, limit: int) -> None:
        self.waiting = deque[Record](maxlen=limit)
        self.under_way = 0
        self._accepted = self._published = self._dropped = 0

    def accept(self, record: Record) -> None:
        self._dropped += len(self.waiting) == self.waiting.maxlen
        self.waiting.append(record)
        self._accepted += 1

    def send(self, most: int) -> list[Record]:
        """The oldest of what waits, which are under way now."""
        records = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
        self.under_way = len(records)
        return records

    def refused(self) -> None:
        """The broker does not take one of what is under way."""
        self._dropped += 1
        self.under_way -= 1

    def landed(self) -> None:
        self._published += self.under_way
        self.under_way = 0

    def drop(self) -> None:
        """At the end."""
        self._dropped += len(self.waiting) + self.under_way
        self.waiting.clear()
        self.under_way = 0

    def is_empty(self) -> bool:
        return not (self.waiting or self.under_way)

    def counts(self) -> Counts:
        return Counts(self._accepted, 0, self._published, len(self.waiting) + self.under_way, 0, self._dropped, 0)
