"""Whole crawls under a simulated clock: the crawlers' own ``Frontier``, with the web and the workers made up.

    python -m bench simulate --urls 1000000 --hosts 10000 --seed 1
    python -m bench simulate --seeds 1000

A heap of events stands for all that takes time. A ``Worker`` asks ``step``, connects, asks ``clear_to_send``, sends,
and has an answer after a random latency: a page, a failure to be tried again, a 429 with Retry-After, a redirect to
another host; or the request dies. In some crawls helpers have the requests: they are told ahead when to send, and die.
All randomness comes from the seed: a run that fails fails again. A crawl says what its pages and robots.txt hold
(``Worker.read``), and gives the books in which all that happens is entered: here there is one worker, and
``simulator.checker`` watches every step; in ``simulator.shared_crawls`` there are many.

The makespan is compared with what no schedule can beat: the busiest host's requests at its rate, or within its places
in flight; or all service times over all workers.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import heapq
import itertools
import math
import random
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from crawl.core import HELPERS_LEAD
from crawl.errors import Postponed
from crawl.frontier import Frontier
from crawl.hosts import Question
from crawl.model import Request
from crawl.processes import AHEAD
from crawl.urls import host_of, origin
from simulator.checker import Checker, Rules, demand

Row = dict[str, Any]
T = TypeVar("T")

# -------------------------------------------------------------------------------------------- simulated time


@dataclass(frozen=True)
class Fates:
    """Shares of the answers that are no plain success, of all."""

    retry: float = 0.0
    refused: float = 0.0
    """429 with Retry-After."""
    redirect: float = 0.0
    death: float = 0.0

    def draw(self, rng: random.Random) -> str:
        fate = rng.random()
        for name in ("retry", "refused", "redirect", "death"):
            share = getattr(self, name)
            if fate < share:
                return name
            fate -= share
        return "ok"


class Web(NamedTuple):
    """What all workers find."""

    names: Sequence[str]
    pages: int
    fates: Fates
    latency: float


class Simulation:
    """The time, and what is to happen."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.events: list[tuple[float, int, Any, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = itertools.count()

    def at(self, when: float, worker: Worker | None, what: Callable[..., None], *about: Any) -> None:
        heapq.heappush(self.events, (when, next(self._serial), worker, what, about))

    def next_event(self) -> tuple[float, int, Any, Callable[..., None], tuple[Any, ...]]:
        return heapq.heappop(self.events)


def each(seeds: Iterable[int], simulate: Callable[[int], T]) -> Iterator[T]:
    """What one crawl after the other came to. Raises SystemExit with the seed if a promise is broken."""
    for seed in seeds:
        try:
            yield simulate(seed)
        except Exception as error:
            raise SystemExit(f"bench: simulate: seed {seed}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def named(seed: int) -> Iterator[None]:
    """Whatever is raised says for which seed."""
    try:
        yield
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise


class Worker(abc.ABC):
    """Up to ``free`` requests at a time over a frontier."""

    connects = True
    """To connect takes a while."""
    adaptive = False
    ahead = 0.0
    """Seconds before the moment of sending that it is told of it, as helpers are."""

    def __init__(self, sim: Simulation, frontier: Frontier, check: Any, web: Web, free: int) -> None:
        self.sim, self.rng, self.frontier, self.check, self.web = sim, sim.rng, frontier, check, web
        self.free, self.alarm = free, math.inf
        self.served: defaultdict[str, float] = defaultdict(float)
        """Seconds, by host."""
        self.back: dict[int, Request] = {}
        """Requests that were put back, by id; kept here so that no other one gets the id of one that was lost."""

    def clock(self) -> float:
        return self.sim.now

    def after(self, seconds: float, what: Callable[..., None], *about: Any) -> None:
        """After so many seconds by its clock."""
        self.sim.at(self.sim.now + seconds, self, what, *about)

    def step(self) -> bool:
        """Start what can be started. False: nothing will ever come."""
        decision: Request | Question | float | None = math.inf
        while self.free and isinstance(decision := self.frontier.step(self.clock()), (Request, Question)):
            if isinstance(decision, Request):
                self.start(decision)
            else:
                self.consult(decision)
        if self.free and isinstance(decision, float):
            self.check.told_to_wait(self.clock(), decision)
            due = self.clock() + decision
            if due < self.alarm or self.alarm <= self.clock() + 1e-9:  # clocks are rounded
                self.alarm = due
                if due < math.inf:
                    self.after(decision, lambda: None)
        return decision is not None

    def consult(self, question: Question) -> None:
        """It is answered in a while: nobody knows how long that takes."""
        self.check.questioned(question.host, asked=True)
        self.free -= 1
        allowed = question.rules.allows(question.target)
        self.after(self.rng.choice((0.0, 0.001, 0.3)), self.answer_rules, question, allowed)

    def answer_rules(self, question: Question, allowed: bool | None) -> None:
        self.check.questioned(question.host, asked=False)
        self.frontier.answer(question, allowed, self.clock())
        self.free += 1

    def on_way(self, seconds: float, what: Callable[[Request], None], request: Request) -> None:
        """``after``, for what a request goes through."""
        self.after(seconds, what, request)

    def start(self, request: Request) -> None:
        self.check.handed_out(request, self.clock(), fresh=self.back.pop(id(request), None) is None)
        self.free -= 1
        if request.error:
            self.after(0.0, self.finish, request)
            return
        seconds = self.rng.choice((0.0, 0.001, self.web.latency * self.rng.random())) if self.connects else 0.0
        self.on_way(seconds, self.ready, request)

    def ready(self, request: Request) -> None:
        try:
            wait = self.frontier.clear_to_send(request, self.clock(), self.ahead)
        except Postponed:
            self.put_back(request, self.clock())
            return
        if wait > self.ahead:
            self.on_way(wait - self.ahead / 2, self.ready, request)
            return
        self.check.sent(request, self.clock(), wait)
        request.spent = self.rng.lognormvariate(-0.125, 0.5) * self.web.latency
        self.served[request.host] += request.spent
        self.on_way(wait + request.spent, self.answer, request)

    def answer(self, request: Request) -> None:
        name = self.web.fates.draw(self.rng)
        if (name in ("retry", "refused") and request.attempt > 3) or (name == "redirect" and request.hops > 3):
            name = "death" if request.kind == "robots" else "ok"
        self.sim.counts[name] += 1
        if name != "death" and self.adaptive:
            outcome: Any = {"retry": "timeout", "refused": "refused"}.get(name, "ok")
            self.frontier.report(request, outcome, request.spent, self.clock())
            self.check.paced(request.host, self.clock(), self.frontier.rate(request.host))
        if name in ("retry", "refused"):
            request.attempt += 1
            wait = self.rng.random() * 2**request.attempt / 4
            if name == "refused":
                wait = self.rng.choice((0.5, 3.0, 10.0))
                self.frontier.pause(request.host, self.clock() + wait, self.clock())
                self.check.paused(request.host, self.clock(), self.clock() + wait)
            self.put_back(request, self.clock() + wait)
        elif name == "redirect":
            request.hops += 1
            host = self.rng.choice(self.web.names)
            target = "robots.txt" if request.kind == "robots" else str(self.rng.randrange(self.web.pages))
            self.put_back(request, self.clock(), f"http://{host}/{target}", host)
        else:
            if name == "ok":
                self.read(request)
            self.finish(request)

    @abc.abstractmethod
    def read(self, request: Request) -> None:
        """A page or a robots.txt is here: tell the frontier what is in it."""

    def put_back(self, request: Request, at: float, target: str | None = None, host: str | None = None) -> None:
        self.check.left(request, request.host)
        self.back[id(request)] = request
        self.frontier.put_back(request, self.clock(), at, target, host)
        self.check.put_back(request, at)
        self.free += 1

    def finish(self, request: Request) -> None:
        self.check.left(request, request.host)
        self.frontier.finish(request, self.clock())
        self.check.finished(request, self.clock())
        self.free += 1


# ------------------------------------------------------------------------------------------------- one worker


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
    helpers: int = 0
    """Processes that have the requests in flight, and that die at times; 0: none."""


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
        **({"rules_bytes": 3} if seed % 5 == 3 else {}),
    }
    if helpers := (0, 2, 4)[seed % 3]:
        limits["lead"] = HELPERS_LEAD
    fates = Fates(*(rng.choice([0.0, 0.05, high]) for high in (0.15, 0.1, 0.2, 0.1)))
    latency = rng.choice([0.01, 0.2, 1.0])
    size = rng.randint(100, 300), rng.randint(1, 12), rng.choice([1, 3, 20, 100])
    return Settings(*size, limits, fates, latency, seed % 2 == 0, helpers)


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


class CheckedWorker(Worker):
    """A crawl by one worker, every step of it checked."""

    def __init__(self, seed: int, settings: Settings, make: Callable[..., Frontier]) -> None:
        names = [f"h{n}.example" for n in range(settings.hosts)]
        check, frontier = Checker(settings.frontier, settings.hosts), make(**settings.frontier)
        web = Web(names, settings.urls, settings.fates, settings.latency)
        super().__init__(Simulation(seed), frontier, check, web, settings.concurrency)
        self.settings = settings
        self.connects, self.adaptive = check.small, check.adaptive
        self.caps = bool(settings.frontier.get("host_pages") or settings.frontier.get("max_pages"))
        shares = list(itertools.accumulate(1 / n for n in range(1, settings.hosts + 1)))
        self.sites = self.rng.choices(range(settings.hosts), cum_weights=shares, k=settings.urls)
        if not settings.links:
            self.sites.sort()  # in host order, as lists often are
        self.lives: dict[Request, tuple[int, int]] = {}
        """The helper that has a request, and a number that it never had before."""
        self.serial = itertools.count()
        if settings.helpers:
            self.ahead = AHEAD
            for _ in range(8):
                self.after(self.rng.random() * 10, self.accident)

    def accident(self) -> None:
        """A helper dies: what it had goes back."""
        dead = self.rng.randrange(self.settings.helpers)
        self.sim.counts["died"] += 1
        for request in [request for request, (helper, _) in self.lives.items() if helper == dead]:
            self.put_back(request, self.clock())

    def start(self, request: Request) -> None:
        if self.settings.helpers and not request.error:
            self.lives[request] = self.rng.randrange(self.settings.helpers), next(self.serial)
        super().start(request)

    def on_way(self, seconds: float, what: Callable[[Request], None], request: Request) -> None:
        life = self.lives.get(request)
        self.after(seconds, lambda: what(request) if self.lives.get(request) == life else None)

    def put_back(self, request: Request, at: float, target: str | None = None, host: str | None = None) -> None:
        self.lives.pop(request, None)
        super().put_back(request, at, target, host)

    def finish(self, request: Request) -> None:
        self.lives.pop(request, None)
        super().finish(request)

    def url(self, page: int) -> str:
        name = self.web.names[self.sites[page]]
        return f"http://{name}{':81' if page % 17 == 5 and self.check.small else ''}/{page}"

    def offer(self, pages: list[int]) -> None:
        """Lines of the list. With caps one by one: only the frontier can say which of several it took in."""
        urls = [self.url(page) for page in pages]
        if self.caps:
            for url in urls:
                self.check.offered(url, 0, bool(self.frontier.add_all([url], self.clock())))
            return
        new = [url for url in dict.fromkeys(urls) if url not in self.check.state]
        demand(self.frontier.add_all(urls, self.clock()) == len(new), "not as many new as there are")
        for url in new:
            self.check.offered(url, 0, True)

    def run(self) -> Result:
        listed = range(max(1, self.settings.urls // 20)) if self.settings.links else range(self.settings.urls)
        size = max(7, min(10_000, len(listed) // 5))
        batches = [list(listed[i : i + size]) for i in range(0, len(listed), size)]
        for n, batch in enumerate(batches):
            self.sim.at(n * 0.01, self, self.offer, batch)
        self.sim.at(len(batches) * 0.01, self, self.frontier.close)
        for count in itertools.count():
            if not self.step():
                break
            demand(bool(self.sim.events), "the crawl hangs:", self.frontier)
            demand(count < 200 * self.settings.urls + 100_000, "the crawl does not end:", self.frontier)
            self.sim.now, _, _, what, about = self.sim.next_event()
            what(*about)
        self.check.ended()
        demand(self.free == self.settings.concurrency, "ended while workers are at work")
        return self.result()

    def read(self, request: Request) -> None:
        if request.kind == "robots":
            self.know_robots(request)
        elif self.settings.links and request.depth < 20:
            page = int(request.url.rpartition("/")[2])
            rng = random.Random(f"{self.sim.seed} {page}")
            for other in [*rng.choices(range(self.settings.urls), k=4), (page + 1) % self.settings.urls]:
                url = self.url(other)
                new = self.frontier.add_links([url], request.depth + 1, self.clock())
                self.check.offered(url, request.depth + 1, bool(new))

    def know_robots(self, request: Request) -> None:
        name, now = origin(request.url), self.clock()
        rng = random.Random(f"{self.sim.seed} {name} {int(now / 50)}")  # it may say something else later
        rules = Rules(rng.choice((0, 0, 3, 1)), rng.choice((None, None, 0.4, 2.5)), quick=rng.random() < 0.5, size=1)
        self.frontier.robots_known(name, rules, now)
        self.check.ruled(name, rules, now, now + self.settings.frontier["robots_ttl"])
        if self.adaptive:
            self.check.paced(host_of(name), now, self.frontier.rate(host_of(name)))

    def result(self) -> Result:
        given = self.settings.frontier
        bounds = [sum(self.served.values()) / self.settings.concurrency]
        if given["rate"]:
            bounds += [max(0, book.sent - given["burst"]) / given["rate"] for book in self.check.books.values()]
        bounds += [seconds / given["per_host"] for seconds in self.served.values()]
        requests = sum(book.sent for book in self.check.books.values())
        return Result(
            self.sim.seed, self.settings, self.clock(), max(bounds), requests, self.check.steps, self.sim.counts
        )


def simulate(seed: int, settings: Settings | None = None, frontier: Callable[..., Frontier] = Frontier) -> Result:
    """One crawl, a small one with all that there is unless ``settings`` say otherwise. Raises ``Broken``, with the
    seed as a note, when an invariant does not hold."""
    with named(seed):
        return CheckedWorker(seed, settings or random_settings(seed), frontier).run()


def run(arguments: argparse.Namespace) -> list[Row]:
    """The crawls that are asked for, as rows. Raises SystemExit with the seed if an invariant is broken."""
    started, seed, count = time.perf_counter(), arguments.seed, arguments.seeds
    settings = None if count else plain(arguments.urls, arguments.hosts, arguments.concurrency)
    results = list(each(range(seed, seed + (count or 1)), lambda seed: simulate(seed, settings)))
    return [
        {
            "": f"{len(results)} crawls" if count else f"seed {seed}",
            "x bound": sum(result.makespan for result in results) / sum(result.bound for result in results),
            "requests": sum(result.requests for result in results),
            "steps checked": sum(result.steps for result in results),
            "makespan s": sum(result.makespan for result in results),
            "bound s": sum(result.bound for result in results),
            **({} if count else {"above bound %": 100 * (results[0].ratio - 1)}),
            "wall s": time.perf_counter() - started,
            "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    ]
