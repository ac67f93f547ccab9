"""Whether a ``Frontier`` keeps its promises, seen from outside: from what it is told and what it answers.

``Checker`` keeps books of its own and never looks at the frontier's state. After every step it demands
- of each host: at most ``burst + rate * t`` sent in any window (as a bucket of tokens that must never be overdrawn),
  nothing while it is paused, no more than ``per_host`` in flight; the same of the total rate;
- of each URL: handed out once but for what was put back, with the depth at which it was found, none lost at the end;
- of ``take``: that it makes nobody wait while something could go (no lost wake-up), and passes no host over for ever;
- of robots.txt: asked for first, once per origin while it is good, what it forbids never handed out to be sent, its
  Crawl-delay kept; and of the caps that they hold.

Where the frontier seeks the rate itself, its claim is held to the ceiling, and what it sends to its claim. Which of
several URLs it takes in under a cap it says itself too; it has to be full when it says no.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from crawl import robots
from crawl.model import Request
from crawl.robots_gate import ROBOTS_AGAIN
from crawl.scheduler import EARLY, FAIR
from crawl.urls import host_of, origin

EPSILON = 1e-6


class Broken(AssertionError):
    """A promise is not kept."""


def demand(holds: bool, what: str, *about: object) -> None:
    if not holds:
        raise Broken(" ".join([what, *map(str, about)]))


# --------------------------------------------------------------------------------------------------------- books


class Tokens:
    """A bucket as the checker keeps it: so many tokens at such a time. A pause leaves one at most when it is over."""

    __slots__ = ("at", "burst", "level", "rate", "resumes")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self.level, self.at = burst, 0.0
        self.resumes = -math.inf

    def advance(self, now: float, lead: float = 0.0) -> None:
        if self.resumes > -math.inf and now >= self.resumes - lead - EPSILON:
            self._refill(self.resumes)
            self.level, self.resumes = min(self.level, 1.0), -math.inf
        self._refill(now)

    def _refill(self, now: float) -> None:
        if now > self.at:
            if self.rate < math.inf:
                self.level = min(self.burst, self.level + (now - self.at) * self.rate)
            self.at = now

    def spend(self, now: float, lead: float = 0.0, early: float = 0.0) -> bool:
        """Take one; False if there was none ``lead`` seconds from now."""
        if self.rate == math.inf:
            return True
        self.advance(now, lead)
        self.level -= 1.0
        return self.level >= -EPSILON - (lead + early) * self.rate

    def next(self) -> float:
        """When there is one again."""
        if self.rate == math.inf:
            return self.resumes
        return max(self.at + (1.0 - self.level) / self.rate, self.resumes)

    def change(self, now: float, rate: float, burst: float) -> None:
        if (rate, burst) == (self.rate, self.burst):
            return
        self.advance(now)
        if self.level < 0.0:  # what left early keeps its time: the new rate begins there
            self.level, self.at = 0.0, self.at - self.level / self.rate
        self.level = 0.0 if self.rate == math.inf else min(self.level, burst)
        self.rate, self.burst = rate, burst

    def pause(self, now: float, until: float) -> None:
        self.advance(now)
        self.resumes = max(self.resumes, until)


@dataclass(slots=True)
class Book:
    """One host."""

    leaves: Tokens
    sends: Tokens
    waiting: int = 0
    delayed: list[float] = field(default_factory=list)
    urgent: list[float] = field(default_factory=list)
    """When put back requests for robots.txt may go."""
    in_flight: int = 0
    paused_until: float = -math.inf
    asking: str | None = None
    question: bool = False
    """Its rules are being asked."""
    delays: dict[str, float] = field(default_factory=dict)
    pages: int = 0
    admitted: int = 0
    turn: int = 0
    """The hand-out at which it has to have had its turn; 0 while it is not due."""
    due: float = math.inf
    sent: int = 0


class Rules(robots.Rules):
    """A robots.txt that forbids each ``step``-th page (0: none); to say so may cost more than a moment."""

    def __init__(self, step: int, delay: float | None, *, quick: bool = True, size: int = 0) -> None:
        super().__init__(delay=delay)
        self.step, self.quick, self.bytes = step, quick, size

    @property
    def size(self) -> int:
        return self.bytes

    def is_quick(self, url: str) -> bool:
        return self.quick

    def allows(self, url: str) -> bool | None:
        return not self.step or int(url.rpartition("/")[2]) % self.step != 0


WAITING, OUT, DONE = range(3)


class Checker:
    """Keeps its own books of what the frontier was told and answered."""

    def __init__(self, given: dict[str, Any], hosts: int) -> None:
        """``given``: the arguments of the ``Frontier``."""
        self.burst, self.per_host, self.lead = given["burst"], given["per_host"], given["lead"]
        self.rate = given["rate"] or math.inf
        self.robots, self.adaptive = given.get("robots", False), given.get("adaptive", False)
        self.host_pages, self.max_pages = given.get("host_pages") or math.inf, given.get("max_pages") or math.inf
        self.frees = "rules_bytes" in given
        """Rules may be freed for want of room, and are asked for again."""
        self.small = hosts <= 50
        total = given.get("total_rate") or math.inf
        self.total_leaves, self.total_sends = Tokens(total, 1), Tokens(total, 1)
        self.books: defaultdict[str, Book] = defaultdict(self._book)
        self.state: dict[str, int] = {}
        self.depths: dict[str, int] = {}
        self.rules: dict[str, tuple[float, Rules | None]] = {}
        """Of each origin: good until when, and what they are."""
        self.pages = self.admitted = self.handed = self.out = self.steps = self.dropped = 0
        self._touched: dict[str, Book] = {}
        self._dues: list[tuple[float, str]] = []

    def _book(self) -> Book:
        rate = self.rate if not self.adaptive else (self.rate if self.rate < math.inf else 20.0) / 2
        return Book(Tokens(rate, self.burst), Tokens(rate, self.burst))

    def touch(self, name: str) -> Book:
        book = self._touched[name] = self.books[name]
        return book

    def offered(self, url: str, depth: int, new: bool) -> None:
        """``url`` was offered, and the frontier said whether it took it in."""
        self.steps += 1
        name = host_of(url)
        if url in self.state:
            demand(not new, "taken in twice", url)
            return
        capped = self.host_pages < math.inf or self.max_pages < math.inf
        if not new:
            full = self.books[name].admitted >= self.host_pages or self.admitted >= self.max_pages
            demand(capped and full, "not taken in", url)
            self.dropped += 1
            return
        book = self.touch(name)
        self.state[url] = WAITING
        if depth:
            self.depths[url] = depth
        book.waiting += 1
        book.admitted += 1
        self.admitted += 1

    def handed_out(self, request: Request, now: float, fresh: bool) -> None:
        """``fresh``: not one that was put back before."""
        self.steps += 1
        self.out += 1
        if request.kind == "robots":
            self._robots_out(request, now, fresh)
        elif fresh:
            demand(self.state.get(request.url) == WAITING, "handed out twice", request.url)
            demand(request.depth == self.depths.get(request.url, 0), "wrong depth", request.url, request.depth)
            self.state[request.url] = OUT
            self.books[request.host].waiting -= 1
        book = self.touch(request.host)
        if not fresh:
            queue = book.urgent if request.kind == "robots" else book.delayed
            at = heapq.heappop(queue)
            demand(at <= now + self.lead + EPSILON or bool(request.error), "too early after it was put back", request)
        if request.error:
            demand(self.robots and not self._allowed(request.target), "refused", request.target, request.error)
            return
        if self.robots and request.kind == "page":
            until, _ = self.rules.get(origin(request.target), (-math.inf, None))
            demand(until > now and self._allowed(request.target), "against robots.txt", request.target)
            demand(book.asking is None, "while robots.txt is being read", request.target)
            demand(not book.question, "while its rules are asked", request.target)
        if fresh and request.kind == "page":
            book.pages += 1
            self.pages += 1
            demand(book.pages <= self.host_pages and self.pages <= self.max_pages, "more pages than the cap", request)
        book.in_flight += 1
        demand(book.in_flight <= self.per_host, "too many in flight", request.host)
        demand(now >= book.paused_until - self.lead - EPSILON, "handed out while paused", request.host)
        demand(book.leaves.spend(now, self.lead, EARLY), "left too soon", request.host, now)
        demand(self.total_leaves.spend(now, self.lead), "total rate", now)
        if self.small:
            self._fair(request.host, now)

    def _robots_out(self, request: Request, now: float, fresh: bool) -> None:
        name = origin(request.url)
        book = self.books[host_of(name)]
        if fresh:
            demand(self.robots and book.asking is None, "robots.txt asked for while it is being read", name)
            again = self.rules.get(name, (-math.inf, None))[0] <= now
            demand(again or self.frees, "robots.txt asked for again", name)
            book.asking = name

    def _allowed(self, target: str) -> bool:
        _, rules = self.rules.get(origin(target), (0.0, None))
        return rules is not None and bool(rules.allows(target))

    def _fair(self, name: str, now: float) -> None:
        self.handed += 1
        self.books[name].turn = 0
        due = [book for book in self.books.values() if self._due(book) <= now - EPSILON]
        for book in self.books.values():
            if book not in due:
                book.turn = 0
            book.turn = book.turn or (self.handed + FAIR * (len(due) + 2) if book in due else 0)
            demand(not book.turn or self.handed <= book.turn, "a host starves behind", name)

    def sent(self, request: Request, now: float, ahead: float = 0.0) -> None:
        """``ahead``: in so many seconds, as a helper is told now."""
        self.steps += 1
        book = self.touch(request.host)
        demand(now >= book.paused_until - ahead - EPSILON, "sent while paused", request.host)
        demand(book.sends.spend(now, ahead), "more than burst + rate * t", request.host, now)
        demand(self.total_sends.spend(now, ahead), "more than the total rate", now)
        book.sent += 1

    def left(self, request: Request, host: str) -> None:
        """It was finished or put back, from ``host``."""
        self.steps += 1
        self.out -= 1
        if not request.error:
            self.touch(host).in_flight -= 1

    def questioned(self, name: str, *, asked: bool) -> None:
        """The rules of a host are asked, or have answered."""
        self.steps += 1
        book = self.touch(name)
        demand(book.question is not asked and (book.asking is None or not asked), "asked while it waits", name)
        book.question = asked

    def put_back(self, request: Request, not_before: float) -> None:
        book = self.touch(request.host)
        heapq.heappush(book.urgent if request.kind == "robots" else book.delayed, not_before)

    def finished(self, request: Request, now: float) -> None:
        if request.kind != "robots":
            demand(self.state[request.url] == OUT, "finished twice", request.url)
            self.state[request.url] = DONE
        elif self.touch(host_of(request.url)).asking == origin(request.url):
            self.ruled(origin(request.url), None, now, now + ROBOTS_AGAIN)

    def ruled(self, name: str, rules: Rules | None, now: float, until: float) -> None:
        self.rules[name] = until, rules
        book = self.touch(host_of(name))
        book.asking = None
        if rules:
            book.delays.pop(name, None)
            if rules.delay:
                book.delays[name] = rules.delay
            self.paced(host_of(name), now, None)

    def paced(self, name: str, now: float, found: float | None) -> None:
        """The rate may be another: ``found`` is what the frontier claims where it seeks it itself."""
        book = self.touch(name)
        ceiling = min([self.rate, *(1 / delay for delay in book.delays.values())])
        rate = ceiling if found is None and not self.adaptive else min(ceiling, found or book.leaves.rate)
        demand(found is None or 0 < found <= ceiling * (1 + EPSILON), "a rate above the ceiling", name, found)
        for bucket in (book.leaves, book.sends):
            bucket.change(now, rate, 1 if book.delays else self.burst)

    def paused(self, name: str, now: float, until: float) -> None:
        book = self.touch(name)
        book.paused_until = max(book.paused_until, until)
        for bucket in (book.leaves, book.sends):
            bucket.pause(now, until)

    def _due(self, book: Book) -> float:
        """The earliest time that the host's next request could leave, if nobody is late."""
        work = book.urgent[0] if book.urgent else math.inf
        if book.asking is None:
            work = -math.inf if book.waiting else min([work, *book.delayed[:1]])
        if work == math.inf or book.in_flight >= self.per_host or book.question:
            return math.inf
        return max(work, book.leaves.next(), book.sends.next(), book.paused_until)

    def told_to_wait(self, now: float, seconds: float) -> None:
        """``take`` answered so: could anything go before?"""
        self.steps += 1
        for name, book in self._touched.items():
            if (due := self._due(book)) != book.due:
                book.due = due
                heapq.heappush(self._dues, (due, name))
        self._touched.clear()
        while self._dues and self._dues[0][0] != self.books[self._dues[0][1]].due:
            heapq.heappop(self._dues)
        if self._dues:
            due, name = self._dues[0]
            due = max(due, self.total_leaves.next(), self.total_sends.next())
            demand(due - self.lead >= now + seconds - EPSILON, "a lost wake-up:", name, now, due, seconds)

    def ended(self) -> None:
        demand(self.out == 0, "ended with requests in flight")
        lost = next((url for url, state in self.state.items() if state != DONE), None)
        demand(lost is None, "lost", lost)
