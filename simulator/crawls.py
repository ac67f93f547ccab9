"""Whole crawls under a simulated clock: the crawlers' own ``Frontier``, with the web and the workers made up.

    python -m bench simulate --urls 1000000 --hosts 10000 --seed 1
    python -m bench simulate --seeds 1000

A heap of events stands for the workers: each asks ``take``, connects, asks ``clear_to_send``, sends, and has an answer
after a random latency, a failure to be tried again, a 429 with Retry-After, a redirect to another host, or it dies.
All randomness comes from the seed: a run that fails fails again. ``simulator.checker`` watches every step.

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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crawl.errors import Postponed
from crawl.frontier import Frontier
from crawl.hosts import Question, host_of
from crawl.model import Request
from crawl.rules import origin
from simulator.checker import Checker, Rules, demand

Row = dict[str, Any]

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
        **({"rules_bytes": 3} if seed % 5 == 3 else {}),
    }
    fates = Fates(*(rng.choice([0.0, 0.05, high]) for high in (0.15, 0.1, 0.2, 0.1)))
    latency = rng.choice([0.01, 0.2, 1.0])
    return Settings(
        rng.randint(100, 300), rng.randint(1, 12), rng.choice([1, 3, 20, 100]), limits, fates, latency, seed % 2 == 0
    )


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
        self.check = Checker(settings.frontier, settings.hosts)
        self.frontier = frontier(**settings.frontier)
        self.events: list[tuple[float, int, Callable[..., None], Request | None]] = []
        self.serial = itertools.count()
        self.now = 0.0
        self.free = settings.concurrency
        self.fates: Counter[str] = Counter()
        self.back: dict[int, Request] = {}
        """Requests that were put back, by id; kept here so that no other one gets the id of one that was lost."""
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
            decision: Request | Question | float | None = math.inf
            while self.free and isinstance(decision := self.frontier.step(self.now), (Request, Question)):
                if isinstance(decision, Request):
                    self.start(decision)
                else:
                    self.consult(decision)
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

    def consult(self, question: Question) -> None:
        """A worker answers it in a while: nobody knows how long that takes."""
        self.check.questioned(question.host, asked=True)
        self.free -= 1
        allowed = question.rules.allows(question.target)
        self.at(self.now + self.rng.choice((0.0, 0.001, 0.3)), lambda _: self.answer_rules(question, allowed))

    def answer_rules(self, question: Question, allowed: bool | None) -> None:
        self.check.questioned(question.host, asked=False)
        self.frontier.answer(question, allowed, self.now)
        self.free += 1

    def start(self, request: Request) -> None:
        fresh = self.back.pop(id(request), None) is None
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
        rules = Rules(rng.choice((0, 0, 3, 1)), rng.choice((None, None, 0.4, 2.5)), quick=rng.random() < 0.5, size=1)
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
        self.back[id(request)] = request
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


# --------------------------------------------------------------------------------------- bench simulate


def run(arguments: argparse.Namespace) -> list[Row]:
    """The crawls that are asked for, as rows. Raises SystemExit with the seed if an invariant is broken."""
    started, rows = time.perf_counter(), []
    seed = arguments.seed
    if arguments.shared:
        from simulator.shared_crawls import run_shared

        return run_shared(seed, arguments.seeds or 100)
    try:
        if arguments.seeds:
            results = []
            for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                results.append(simulate(seed))
        else:
            results = [simulate(seed, plain(arguments.urls, arguments.hosts, arguments.concurrency))]
    except Exception as error:
        raise SystemExit(f"bench: simulate: seed {seed}: {type(error).__name__}: {error}") from error
    rows.append(
        {
            "": f"{len(results)} crawls" if arguments.seeds else f"seed {seed}",
            "x bound": sum(result.makespan for result in results) / sum(result.bound for result in results),
            "requests": sum(result.requests for result in results),
            "steps checked": sum(result.steps for result in results),
            "makespan s": sum(result.makespan for result in results),
            "bound s": sum(result.bound for result in results),
            **({} if arguments.seeds else {"above bound %": 100 * (results[0].ratio - 1)}),
            "wall s": time.perf_counter() - started,
            "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
    return rows
