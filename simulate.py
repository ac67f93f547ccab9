"""Whole crawls under a simulated clock: the crawlers' own ``Frontier``, with the web and the workers made up.

    python bench.py simulate --urls 1000000 --hosts 10000 --seed 1
    python bench.py simulate --seeds 1000

A heap of events stands for the workers: each asks ``take``, connects, asks ``clear_to_send``, sends, and has an answer
after a random latency, a failure to be tried again, a 429 with Retry-After, a redirect to another host, or it dies.
All randomness comes from the seed: a run that fails fails again.

``Checker`` sees what the frontier is told and what it answers, never its state, and keeps books of its own. After
every step it demands
- of each host: at most ``burst + rate * t`` sent in any window (as a bucket of tokens that must never be overdrawn),
  nothing while it is paused, no more than ``per_host`` in flight; the same of the total rate;
- of each URL: handed out once but for what was put back, with the depth at which it was found, none lost at the end;
- of ``take``: that it makes nobody wait while something could go (no lost wake-up), and passes no host over for ever;
- of robots.txt: asked for first, once per origin while it is good, what it forbids never handed out to be sent, its
  Crawl-delay kept; and of the caps that they hold.

The makespan is compared with what no schedule can beat: the busiest host's requests at its rate, or within its places
in flight; or all service times over all workers.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crawl_rules import Postponed, Request, origin
from frontier import FAIR, ROBOTS_AGAIN, Frontier, host_of

EPSILON = 1e-6
Row = dict[str, Any]


class Broken(AssertionError):
    """An invariant does not hold."""


def demand(holds: bool, what: str, *about: object) -> None:
    if not holds:
        raise Broken(" ".join([what, *map(str, about)]))


# ------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Fates:
    """Shares of the answers that are no plain success, of all."""

    retry: float = 0.0
    refused: float = 0.0
    """429 with Retry-After."""
    redirect: float = 0.0
    death: float = 0.0


@dataclass(frozen=True)
class Settings:
    urls: int
    hosts: int
    concurrency: int
    frontier: dict[str, Any]
    """The arguments of ``Frontier``."""
    fates: Fates
    latency: float
    links: bool = False
    """Pages link to others, up to so deep; else all are listed."""


def plain(urls: int, hosts: int, concurrency: int) -> Settings:
    """A long list, some failures."""
    limits = {"rate": 20.0, "burst": 1, "per_host": 8, "lead": 0.002}
    return Settings(urls, hosts, concurrency, limits, Fates(retry=0.02, death=0.0005), 0.15)


def random_settings(seed: int) -> Settings:
    """A small crawl with all that there is."""
    rng = random.Random(f"settings {seed}")
    limits: dict[str, Any] = {
        "rate": rng.choice([0.0, 0.5, 3.0, 20.0]),
        "burst": rng.choice([1, 1, 2, 5]),
        "per_host": rng.choice([1, 2, 8]),
        "total_rate": rng.choice([0.0, 0.0, 0.0, 15.0]),
        "lead": rng.choice([0.0, 0.002]),
        "robots": rng.random() < 0.7,
        "robots_ttl": rng.choice([20.0, 86400.0]),
        "host_pages": rng.choice([0, 0, 0, 15]),
        "max_pages": rng.choice([0, 0, 0, 60]),
        "adaptive": rng.random() < 0.4,
    }
    fates = Fates(*(rng.choice([0.0, 0.05, high]) for high in (0.15, 0.1, 0.2, 0.1)))
    latency = rng.choice([0.01, 0.2, 1.0])
    return Settings(
        rng.randint(100, 300), rng.randint(1, 12), rng.choice([1, 3, 20, 100]), limits, fates, latency, seed % 2 == 0
    )


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

    def spend(self, now: float, lead: float = 0.0) -> bool:
        """Take one; False if there was none ``lead`` seconds from now."""
        if self.rate == math.inf:
            return True
        self.advance(now, lead)
        self.level -= 1.0
        return self.level >= -EPSILON - lead * self.rate

    def next(self) -> float:
        """When there is one again."""
        if self.rate == math.inf:
            return self.resumes
        return max(self.at + (1.0 - self.level) / self.rate, self.resumes)

    def change(self, now: float, rate: float, burst: float) -> None:
        if (rate, burst) == (self.rate, self.burst):
            return
        self.advance(now)
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
    delays: dict[str, float] = field(default_factory=dict)
    pages: int = 0
    admitted: int = 0
    turn: int = 0
    """The hand-out at which it has to have had its turn; 0 while it is not due."""
    due: float = math.inf
    sent: int = 0
    served: float = 0.0
    first: float = math.inf


class Rules:
    """A robots.txt that forbids each ``step``-th page (0: none)."""

    def __init__(self, step: int, delay: float | None) -> None:
        self.step, self.delay = step, delay

    def allows(self, url: str, /) -> bool:
        return not self.step or int(url.rpartition("/")[2]) % self.step != 0


WAITING, OUT, DONE = range(3)


class Checker:
    """Keeps its own books of what the frontier was told and answered."""

    def __init__(self, settings: Settings) -> None:
        given = settings.frontier
        self.burst, self.per_host, self.lead = given["burst"], given["per_host"], given["lead"]
        self.rate = given["rate"] or math.inf
        self.robots, self.adaptive = given.get("robots", False), given.get("adaptive", False)
        self.host_pages, self.max_pages = given.get("host_pages") or math.inf, given.get("max_pages") or math.inf
        self.small = settings.hosts <= 50
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
        if fresh and request.kind == "page":
            book.pages += 1
            self.pages += 1
            demand(book.pages <= self.host_pages and self.pages <= self.max_pages, "more pages than the cap", request)
        book.in_flight += 1
        demand(book.in_flight <= self.per_host, "too many in flight", request.host)
        demand(now >= book.paused_until - self.lead - EPSILON, "handed out while paused", request.host)
        demand(book.leaves.spend(now, self.lead), "left too soon", request.host, now)
        demand(self.total_leaves.spend(now, self.lead), "total rate", now)
        if self.small:
            self._fair(request.host, now)

    def _robots_out(self, request: Request, now: float, fresh: bool) -> None:
        name = origin(request.url)
        book = self.books[host_of(name)]
        if fresh:
            demand(self.robots and book.asking is None, "robots.txt asked for while it is being read", name)
            demand(self.rules.get(name, (-math.inf, None))[0] <= now, "robots.txt asked for again", name)
            book.asking = name

    def _allowed(self, target: str) -> bool:
        _, rules = self.rules.get(origin(target), (0.0, None))
        return rules is not None and rules.allows(target)

    def _fair(self, name: str, now: float) -> None:
        self.handed += 1
        self.books[name].turn = 0
        due = [book for book in self.books.values() if self._due(book) <= now - EPSILON]
        for book in self.books.values():
            if book not in due:
                book.turn = 0
            book.turn = book.turn or (self.handed + FAIR * (len(due) + 2) if book in due else 0)
            demand(not book.turn or self.handed <= book.turn, "a host starves behind", name)

    def sent(self, request: Request, now: float) -> None:
        self.steps += 1
        book = self.touch(request.host)
        demand(now >= book.paused_until - EPSILON, "sent while paused", request.host)
        demand(book.sends.spend(now), "more than burst + rate * t", request.host, now)
        demand(self.total_sends.spend(now), "more than the total rate", now)
        book.sent += 1
        book.first = min(book.first, now)

    def left(self, request: Request, host: str) -> None:
        """It was finished or put back, from ``host``."""
        self.steps += 1
        self.out -= 1
        if not request.error:
            self.touch(host).in_flight -= 1

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
        if work == math.inf or book.in_flight >= self.per_host:
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


# ---------------------------------------------------------------------------------------------------- simulation


@dataclass(frozen=True)
class Result:
    seed: int
    settings: Settings
    makespan: float
    bound: float
    """Seconds that no schedule can beat; meaningful without pauses, robots and adaptive rates."""
    requests: int
    steps: int
    fates: Counter[str]

    @property
    def ratio(self) -> float:
        return self.makespan / self.bound if self.bound else 1.0


class _Run:
    def __init__(self, seed: int, settings: Settings, frontier: Callable[..., Frontier]) -> None:
        self.settings, self.seed = settings, seed
        self.rng = random.Random(seed)
        self.check = Checker(settings)
        self.frontier = frontier(**settings.frontier)
        self.events: list[tuple[float, int, Callable[..., None], Request | None]] = []
        self.serial = itertools.count()
        self.now = 0.0
        self.free = settings.concurrency
        self.fates: Counter[str] = Counter()
        self.back: set[int] = set()
        """Requests that wait in the frontier for their next turn, by id: the frontier owns them meanwhile."""
        self.caps = bool(settings.frontier.get("host_pages") or settings.frontier.get("max_pages"))
        self.names = [f"h{n}.example" for n in range(settings.hosts)]
        shares = list(itertools.accumulate(1 / n for n in range(1, settings.hosts + 1)))
        self.count = settings.urls
        self.sites = self.rng.choices(range(settings.hosts), cum_weights=shares, k=settings.urls)
        if not settings.links:
            self.sites.sort()  # in host order, as lists often are
        self.ended = False
        self.service = 0.0

    def url(self, page: int) -> str:
        name = self.names[self.sites[page]]
        return f"http://{name}{':81' if page % 17 == 5 and self.check.small else ''}/{page}"

    def at(self, when: float, what: Callable[..., None], request: Request | None = None) -> None:
        heapq.heappush(self.events, (when, next(self.serial), what, request))

    def offer(self, pages: list[int]) -> None:
        """Lines of the list. With caps one by one: only the frontier can say which of several it took in."""
        urls = [self.url(page) for page in pages]
        if self.caps:
            for url in urls:
                self.check.offered(url, 0, bool(self.frontier.add_all([url], self.now)))
            return
        new = [url for url in dict.fromkeys(urls) if url not in self.check.state]
        demand(self.frontier.add_all(urls, self.now) == len(new), "not as many new as there are")
        for url in new:
            self.check.offered(url, 0, True)

    def run(self) -> Result:
        listed = range(max(1, self.count // 20)) if self.settings.links else range(self.count)
        step = max(7, min(10_000, len(listed) // 5))
        batches = [list(listed[i : i + step]) for i in range(0, len(listed), step)]
        for n, batch in enumerate(batches):
            self.at(n * 0.01, lambda _, batch=batch: self.offer(batch))
        self.at(len(batches) * 0.01, lambda _: self.frontier.close())
        alarm, limit = math.inf, 200 * self.count + 100_000
        for step in itertools.count():
            decision: Request | float | None = math.inf
            while self.free and isinstance(decision := self.frontier.take(self.now), Request):
                self.start(decision)
            if decision is None:
                break
            if self.free and isinstance(decision, float):
                self.check.told_to_wait(self.now, decision)
                if self.now + decision < alarm or alarm <= self.now:
                    alarm = self.now + decision
                    if alarm < math.inf:
                        self.at(alarm, lambda _: None)
            demand(bool(self.events), "the crawl hangs:", self.frontier)
            demand(step < limit, "the crawl does not end:", self.frontier)
            self.now, _, what, request = heapq.heappop(self.events)
            what(request)
        self.check.ended()
        demand(self.free == self.settings.concurrency, "ended while workers are at work")
        return self.result()

    def start(self, request: Request) -> None:
        fresh = id(request) not in self.back
        self.back.discard(id(request))
        self.check.handed_out(request, self.now, fresh)
        self.free -= 1
        if request.error:
            self.at(self.now, self.finish, request)
            return
        connect = self.rng.choice((0.0, 0.001, self.settings.latency * self.rng.random())) if self.check.small else 0.0
        self.at(self.now + connect, self.ready, request)

    def ready(self, request: Request) -> None:
        try:
            wait = self.frontier.clear_to_send(request, self.now)
        except Postponed:
            self.put_back(request, self.now)
            return
        if wait > 0:
            self.at(self.now + wait, self.ready, request)
            return
        self.check.sent(request, self.now)
        latency = self.rng.lognormvariate(-0.125, 0.5) * self.settings.latency
        request.spent = latency
        self.check.books[request.host].served += latency
        self.service += latency
        self.at(self.now + latency, self.answer, request)

    def answer(self, request: Request) -> None:
        fate, fates = self.rng.random(), self.settings.fates
        name = "ok"
        for name in ("retry", "refused", "redirect", "death", "ok"):
            share = getattr(fates, name, 1.0)
            if fate < share:
                break
            fate -= share
        if (name in ("retry", "refused") and request.attempt > 3) or (name == "redirect" and request.hops > 3):
            name = "death" if request.kind == "robots" else "ok"
        self.fates[name] += 1
        if name != "death" and self.check.adaptive:
            outcome: Any = {"retry": "timeout", "refused": "refused"}.get(name, "ok")
            self.frontier.report(request, outcome, request.spent, self.now)
            self.check.paced(request.host, self.now, self.frontier.rate(request.host))
        if name in ("retry", "refused"):
            request.attempt += 1
            wait = self.rng.random() * 2**request.attempt / 4
            if name == "refused":
                wait = self.rng.choice((0.5, 3.0, 10.0))
                self.frontier.pause(request.host, self.now + wait, self.now)
                self.check.paused(request.host, self.now, self.now + wait)
            self.put_back(request, self.now + wait)
        elif name == "redirect":
            request.hops += 1
            host = self.rng.choice(self.names)
            target = "robots.txt" if request.kind == "robots" else str(self.rng.randrange(self.count))
            self.put_back(request, self.now, f"http://{host}/{target}", host)
        elif name == "death":
            self.finish(request)
        elif request.kind == "robots":
            self.know_robots(request)
        else:
            self.links(request)
            self.finish(request)

    def know_robots(self, request: Request) -> None:
        name = origin(request.url)
        rng = random.Random(f"{self.seed} {name} {int(self.now / 50)}")  # it may say something else later
        rules = Rules(rng.choice((0, 0, 3, 1)), rng.choice((None, None, 0.4, 2.5)))
        self.frontier.robots_known(name, rules, self.now)
        self.check.ruled(name, rules, self.now, self.now + self.settings.frontier["robots_ttl"])
        if self.check.adaptive:
            self.check.paced(host_of(name), self.now, self.frontier.rate(host_of(name)))
        self.finish(request)

    def links(self, request: Request) -> None:
        if not self.settings.links or request.depth >= 20:
            return
        page = int(request.url.rpartition("/")[2])
        for other in [*random.Random(f"{self.seed} {page}").choices(range(self.count), k=4), (page + 1) % self.count]:
            url = self.url(other)
            new = self.frontier.add_links([url], request.depth + 1, self.now)
            self.check.offered(url, request.depth + 1, bool(new))

    def put_back(self, request: Request, at: float, target: str | None = None, host: str | None = None) -> None:
        self.check.left(request, request.host)
        self.back.add(id(request))
        self.frontier.put_back(request, self.now, at, target, host)
        self.check.put_back(request, at)
        self.free += 1

    def finish(self, request: Request) -> None:
        self.check.left(request, request.host)
        self.frontier.finish(request, self.now)
        self.check.finished(request, self.now)
        self.free += 1

    def result(self) -> Result:
        given = self.settings.frontier
        bounds = [self.service / self.settings.concurrency]
        for book in self.check.books.values():
            if given["rate"]:
                bounds.append(max(0, book.sent - given["burst"]) / given["rate"])
            bounds.append(book.served / given["per_host"])
        requests = sum(book.sent for book in self.check.books.values())
        return Result(self.seed, self.settings, self.now, max(bounds), requests, self.check.steps, self.fates)


def simulate(seed: int, settings: Settings | None = None, frontier: Callable[..., Frontier] = Frontier) -> Result:
    """One crawl, a small one with all that there is unless ``settings`` say otherwise. Raises ``Broken``, with the
    seed as a note, when an invariant does not hold."""
    try:
        return _Run(seed, settings or random_settings(seed), frontier).run()
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise


# --------------------------------------------------------------------------------------- bench.py simulate

OPTIONS: dict[str, tuple[Any, str]] = {
    "urls": (1_000_000, "URLs"),
    "hosts": (10_000, "hosts, of sizes by Zipf's law"),
    "seed": (1, "of all randomness; the first of --seeds"),
    "seeds": (None, "instead: so many small crawls with robots, redirects, pauses, links"),
    "concurrency": (64, "workers"),
}


def run(arguments: argparse.Namespace) -> list[Row]:
    """The crawls that are asked for, as rows. Raises SystemExit with the seed if an invariant is broken."""
    started, rows = time.perf_counter(), []
    seed = arguments.seed
    try:
        if arguments.seeds:
            results = []
            for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                results.append(simulate(seed))
        else:
            results = [simulate(seed, plain(arguments.urls, arguments.hosts, arguments.concurrency))]
    except Exception as error:
        raise SystemExit(f"bench.py: simulate: seed {seed}: {type(error).__name__}: {error}") from error
    rows.append(
        {
            "": f"{len(results)} crawls" if arguments.seeds else f"seed {seed}",
            "requests": sum(result.requests for result in results),
            "steps checked": sum(result.steps for result in results),
            "makespan s": sum(result.makespan for result in results),
            "bound s": sum(result.bound for result in results),
            **({} if arguments.seeds else {"makespan / bound": results[0].ratio}),
            "wall s": time.perf_counter() - started,
            "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
    return rows
