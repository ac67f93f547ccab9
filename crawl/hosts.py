"""A host's queue: which URLs of it wait, in which order, and what is under way.

Only hosts at work are here; what is remembered beyond that is in crawl/limits.py. A URL that waits costs little more
than its text: what it has in common with those beside it stands once before them, in a ``UrlRun``. Plain data with a
few pure methods, called under the frontier's lock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from crawl.model import Request
from crawl.robots import Rules
from primitives import TokenBucket

Kind = Literal["page", "robots", "sitemap", "feed"]


class Question(NamedTuple):
    """Whether its rules allow what a host would be asked for next. ``Frontier.consult`` finds the answer."""

    host: str
    target: str
    rules: Rules


class UrlRun(NamedTuple):
    """Stands in a host's queue before the URLs that have this in common: so they cost no more than their text."""

    depth: int
    private: bool
    kind: Kind
    listed: bool = False
    hops: int = 0


Entry = str | tuple[str, str] | UrlRun
"""A target; a line of the list and its target, where they differ; or what the ones that follow have in common."""

_LISTED = UrlRun(0, False, "page", listed=True)


class HostQueue:
    """What waits on one host, and what is known of it while it is at work."""

    __slots__ = (
        *("asking", "cleared", "delayed", "due", "gate", "head", "in_flight", "last_run", "name", "paused_until"),
        *("question", "ready", "run", "schedule", "sifting", "since", "urgent", "waiting"),
    )

    def __init__(self, name: str, schedule: TokenBucket | None, gate: TokenBucket | None) -> None:
        self.name = name
        self.schedule, self.gate = schedule, gate
        self.waiting: list[Entry] = []
        self.head = 0
        self.run = self.last_run = _LISTED
        self.delayed: list[tuple[float, int, Request]] = []
        self.urgent: list[tuple[float, int, Request]] = []
        """Requests for robots.txt that were put back: they pass the gate that the others wait at."""
        self.in_flight = 0
        self.due = math.inf  # the time of its live entry in the heap; -inf while it is among the ready
        self.paused_until = -math.inf
        self.asking = False  # one of its origins' robots.txt is being read: nothing else goes
        self.cleared: str | None = None  # the target that the rules were asked about, and allow
        self.question: Question | None = None  # it waits, or is out, to be answered: nothing goes meanwhile
        self.sifting = False
        self.ready = self.since = 0  # serial numbers of its live entries among the ready

    def has_work(self) -> bool:
        """Whether anything waits."""
        return self.head < len(self.waiting) or bool(self.delayed) or bool(self.urgent)

    def work(self) -> int:
        """How many requests wait, tried ones included."""
        return len(self.waiting) - self.head + len(self.delayed) + len(self.urgent)

    def append(self, entry: Entry, run: UrlRun) -> None:
        """``entry`` goes last, with ``run`` before it unless the one before has that in common with it."""
        if run != self.last_run:
            self.waiting.append(run)
            self.last_run = run
        self.waiting.append(entry)

    def put_back(self, request: Request, not_before: float, serial: int) -> None:
        """A request that was handed out waits again, until ``not_before`` at least."""
        queue = self.urgent if request.kind == "robots" else self.delayed
        heapq.heappush(queue, (not_before, serial, request))

    def first(self) -> tuple[str, str]:
        """(URL, target) of the first that waits."""
        entry = self.waiting[self.head]
        while isinstance(entry, UrlRun):
            self.run = entry
            self.head += 1
            entry = self.waiting[self.head]
        return (entry, entry) if isinstance(entry, str) else entry

    def pop_waiting(self, now: float) -> Request:
        """Takes out the first that waits, what was put back apart; there is one."""
        url, target = self.first()
        self.head += 1
        if self.head >= 32 and self.head * 2 >= len(self.waiting):
            del self.waiting[: self.head]
            self.head = 0
        run = self.run
        request = Request(url, target, self.name, run.depth, hops=run.hops, started=now, kind=run.kind)
        request.private, request.listed = run.private, run.listed
        return request

    def pop_urgent(self, ripe: float) -> Request | None:
        """Takes out the first request for robots.txt that was put back, if it may go by ``ripe``."""
        return heapq.heappop(self.urgent)[2] if self.urgent and self.urgent[0][0] <= ripe else None

    def pop(self, ripe: float, now: float) -> Request:
        """Takes out the one that goes next; there is one."""
        return heapq.heappop(self.delayed)[2] if self.delayed_first(ripe) else self.pop_waiting(now)

    def pause(self, until: float) -> None:
        """Nothing goes before."""
        self.paused_until = max(self.paused_until, until)
        for bucket in (self.schedule, self.gate):
            if bucket:
                bucket.pause(until)

    def turn_in(self, now: float) -> float:
        """Seconds until it may be sent another request."""
        return max(self.gate.wait_for(1, now) if self.gate else 0.0, self.paused_until - now)

    def drop_put_back(self) -> list[tuple[float, Request]]:
        """Takes out all that was put back: (not before, request)."""
        left = [(at, request) for at, _, request in (*self.urgent, *self.delayed)]
        self.urgent.clear()
        self.delayed.clear()
        return left

    def delayed_first(self, ripe: float) -> bool:
        """Whether what was put back goes next: it may by ``ripe``, or nothing else waits."""
        return bool(self.delayed) and (self.delayed[0][0] <= ripe or self.head >= len(self.waiting))

    def next_target(self, ripe: float) -> tuple[str, Kind, bool] | None:
        """(target, kind, private) of the request that it would hand out."""
        if self.delayed_first(ripe):
            at, _, request = self.delayed[0]
            return (request.target, request.kind, request.private) if at <= ripe else None
        if self.head >= len(self.waiting):
            return None
        target = self.first()[1]
        return target, self.run.kind, self.run.private

    def targets(self) -> Iterator[tuple[str, UrlRun]]:
        """Those that wait, in order, without what was put back."""
        run = self.run
        for entry in self.waiting[self.head :]:
            if isinstance(entry, UrlRun):
                run = entry
            else:
                yield entry if isinstance(entry, str) else entry[1], run

    def ahead(self, target: str) -> tuple[int, float] | None:
        """(How many go first, not before) of a URL that waits, or None."""
        for at, _, request in self.delayed:
            if request.target == target:
                return 0, at
        return next(((n, 0.0) for n, (other, _) in enumerate(self.targets()) if other == target), None)


@dataclass(frozen=True, slots=True)
class FrontierStats:
    """What a frontier holds, and what it has turned away."""

    waiting: int
    in_flight: int
    hosts: int
    seen: int
    duplicates: int
    closed: bool
    hosts_ready: int = 0  # due, and waiting for a worker
    hosts_blocked: int = 0  # waiting for robots.txt
    capped: int = 0  # times that a URL was not taken in because of ``max_pages`` or ``host_pages``
    forbidden: int = 0
    """URLs that robots.txt forbids, or that could not be allowed because it could not be read or matched."""
