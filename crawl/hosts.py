"""What the frontier knows of a host: its queue, its pace, its robots.txt, what is under way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from crawl.model import Request
from primitives import TokenBucket

EARLY = 0.25
"""Longest time in seconds that a worker is given a request before it may be sent, where the whole crawl waits for its
host. The others may keep the workers busy just when such a host is due, and time that a host loses never comes back."""
Kind = Literal["page", "robots", "sitemap", "feed"]
Outcome = Literal["ok", "refused", "timeout"]


class RobotRules(Protocol):
    """What robots.txt says to us."""

    @property
    def delay(self) -> float | None: ...
    @property
    def size(self) -> int:
        """Bytes that they take."""
        ...

    def is_quick(self, url: str, /) -> bool:
        """Whether `allows` takes no longer than a lock may be held, some 0.1 ms."""
        ...

    def allows(self, url: str, /) -> bool | None:
        """None: it would cost too much to say."""
        ...


def host_of(url: str) -> str:
    """The host of a normalised URL or origin, as ``normalise`` gives it."""
    host = url.split("/", 3)[2].rpartition("@")[2]
    return host[: host.index("]") + 1] if host.startswith("[") else host.partition(":")[0]


class Pace:
    """The rate that a host bears: additive increase, multiplicative decrease (Chiu and Jain, 1989).

    It begins at half the ceiling; each success adds a hundredth of the ceiling, a refusal or time-out halves it, and
    so does a mean latency above twice the best of the last one to two minutes. What was sent before the last decrease
    says nothing about the rate since: it neither raises nor lowers, so one jam halves once. At least ``FLOOR``.
    """

    FLOOR = 0.05
    UNLIMITED = 20.0
    """Stands for a ceiling where there is none."""
    WINDOW = 60.0
    NOISE = 0.05
    """Seconds by which latency may differ from the best without meaning anything."""
    SAMPLES = 8

    __slots__ = ("_best", "_earlier", "_lowered", "_mean", "_successes", "_turn", "rate")

    def __init__(self, ceiling: float) -> None:
        self.rate = self._scale(ceiling) / 2
        self._mean = self._best = self._earlier = math.inf
        self._lowered = self._turn = -math.inf
        self._successes = 0

    def _scale(self, ceiling: float) -> float:
        return ceiling if ceiling < math.inf else self.UNLIMITED

    def report(self, outcome: Outcome, seconds: float, now: float, ceiling: float) -> None:
        """A request took ``seconds`` and ended ``now``."""
        current = now - seconds >= self._lowered
        slow = False
        if outcome == "ok":
            self._mean = seconds if self._mean == math.inf else self._mean + (seconds - self._mean) / 8
            if now >= self._turn:
                self._earlier, self._best, self._turn = self._best, math.inf, now + self.WINDOW
            self._best = min(self._best, seconds)
            self._successes += current
            usual = min(self._best, self._earlier)
            slow = self._successes >= self.SAMPLES and self._mean > max(2 * usual, usual + self.NOISE)
        if not current:
            return
        if outcome != "ok" or slow:
            self.rate = max(min(self.FLOOR, ceiling), self.rate / 2)
            self._lowered, self._successes = now, 0
        else:
            self.rate = min(ceiling, self.rate + self._scale(ceiling) / 100)


class HostRecord:
    """What is remembered of a host also while it has nothing to do. Guarded by the frontier's lock."""

    __slots__ = ("delays", "origins", "pace", "pages")

    def __init__(self) -> None:
        self.pages = 0
        self.origins: tuple[str, ...] = ()
        """Those whose rules are large."""
        self.pace: Pace | None = None
        self.delays: dict[str, float] | None = None
        """Crawl-delay of each origin that has one."""


class OriginRules:
    """The rules of an origin, good until ``until``; None: they could not be read. ``asking``: they are being read."""

    __slots__ = ("asking", "host", "rules", "until")

    def __init__(self, host: str) -> None:
        self.host = host
        self.rules: RobotRules | None = None
        self.until = -math.inf
        self.asking = False


class Question(NamedTuple):
    """Whether its rules allow what a host would be asked for next. ``Frontier.consult`` finds the answer."""

    host: str
    target: str
    rules: RobotRules


class UrlRun(NamedTuple):
    """Stands in a host's queue before the URLs that it describes: so they cost no more than their text."""

    depth: int
    private: bool
    kind: Kind
    listed: bool = False


Entry = str | tuple[str, str] | UrlRun
"""A target; a line of the list and its target, where they differ; or what the ones that follow have in common."""
_LISTED = UrlRun(0, False, "page", listed=True)


class HostQueue:
    """What is known of one host. Guarded by the frontier's lock."""

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
        self.due = math.inf
        """The time of its live entry in the heap; -inf while it is among the ready."""
        self.paused_until = -math.inf
        self.asking = False
        """One of its origins' robots.txt is being read: nothing else goes."""
        self.cleared: str | None = None
        """The target that the rules were asked about, and allow."""
        self.question: Question | None = None
        """It waits, or is out, to be answered: nothing goes meanwhile."""
        self.sifting = False
        self.ready = self.since = 0
        """Serial numbers of its live entries among the ready."""

    def has_work(self) -> bool:
        return self.head < len(self.waiting) or bool(self.delayed) or bool(self.urgent)

    def work(self) -> int:
        return len(self.waiting) - self.head + len(self.delayed) + len(self.urgent)

    def append(self, entry: Entry, run: UrlRun) -> None:
        if run != self.last_run:
            self.waiting.append(run)
            self.last_run = run
        self.waiting.append(entry)

    def first(self) -> tuple[str, str]:
        """(URL, target) of the first that waits."""
        entry = self.waiting[self.head]
        while isinstance(entry, UrlRun):
            self.run = entry
            self.head += 1
            entry = self.waiting[self.head]
        return (entry, entry) if isinstance(entry, str) else entry

    def pop_waiting(self, now: float) -> Request:
        url, target = self.first()
        self.head += 1
        if self.head >= 32 and self.head * 2 >= len(self.waiting):
            del self.waiting[: self.head]
            self.head = 0
        run = self.run
        return Request(
            url, target, self.name, run.depth, started=now, kind=run.kind, private=run.private, listed=run.listed
        )

    def delayed_first(self, ripe: float) -> bool:
        return bool(self.delayed) and (self.delayed[0][0] <= ripe or self.head >= len(self.waiting))


@dataclass(frozen=True, slots=True)
class FrontierStats:
    waiting: int
    in_flight: int
    hosts: int
    seen: int
    duplicates: int
    closed: bool
    hosts_ready: int = 0
    """Due, and waiting for a worker."""
    hosts_blocked: int = 0
    """Waiting for robots.txt."""
    capped: int = 0
    """Times that a URL was not taken in because of ``max_pages`` or ``host_pages``."""
    forbidden: int = 0
    """URLs that robots.txt forbids, or that could not be allowed because it could not be read or matched."""
