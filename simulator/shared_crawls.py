"""Shared crawls under a simulated clock: many workers (``simulator.crawls``) over a model of the tables.

    python -m bench simulate --shared --seeds 1000

Up to 16 workers join, stand still for longer than their lease and wake up late, die, and come anew; their clocks start
anywhere and run up to ``SKEW`` fast or slow; batches and answers are late or lost. The pages redirect, fail, ask for
pauses, name each other; robots.txt is redirected to other hosts. What is checked, all in true time:

- of each host, at most ``burst + rate * t`` sent in any window (by the fastest clock: ``rate * (1 + SKEW)``);
- each URL stored once; at the end none waits, every one that was seen is stored or is a redirect's target, and every
  link of a stored page was seen;
- the crawl ends.

To be given leave to send and to send are one event here: a process that stands still between the two is the overlap
that ``crawl.lease`` does not promise away.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from crawl.lease import SharedFrontier
from crawl.model import Request, ScrapeResult
from crawl.sync import Done, Found, Move, Note, Queued, SyncAnswer, SyncBatch, hashed
from crawl.urls import host_of, origin
from simulator.checker import Rules, Tokens, demand
from simulator.crawls import Fates, Simulation, Web, Worker, each, named

SKEW = 0.03
LEASE = 10.0
FATES = Fates(retry=0.06, refused=0.02, redirect=0.12)


@dataclasses.dataclass
class Host:
    """A row of crawl_hosts."""

    owner: int | None = None
    due: float = math.inf
    next_at: float | None = None
    spacing: float | None = None
    waiting: int = 0


@dataclasses.dataclass
class Member:
    """A row of crawl_workers."""

    until: float
    batch: int = -1
    held: int = 0
    hungry: bool = False
    reading: bool = False


class Tables:
    """What ``crawl.tables`` does in SQL; the faults that tests plant are arguments."""

    def __init__(self, *, fence: bool = True, keeps_next: bool = True) -> None:
        self.fence, self.keeps_next = fence, keeps_next
        self.hosts: dict[str, Host] = {}
        self.queue: dict[str, dict[int, Queued]] = {}
        self.seen: set[Any] = set()
        self.results: dict[str, ScrapeResult] = {}
        self.targets: set[Any] = set()
        self.members: dict[int, Member] = {}
        self.robots: dict[str, Found] = {}
        self.scope: dict[str, int] = {}
        self.ids = itertools.count(1)

    def sync(self, batch: SyncBatch, now: float) -> SyncAnswer:
        token = next(self.ids) if batch.token is None else batch.token
        if batch.token is None or (not self.fence and token not in self.members):
            self.members[token] = Member(now)
        if token not in self.members:
            return SyncAnswer()
        member = self.members[token]
        applied, member.batch = member.batch >= batch.serial, batch.serial if batch.token else 0
        member.until, member.held = now + batch.lease, len(batch.held)
        member.hungry, member.reading = batch.hungry, batch.reading
        answer = SyncAnswer(token)
        if not applied:
            self._apply(token, batch, answer, now)
        for name, host in self.hosts.items():
            if host.owner == token and batch.resync and name not in batch.held:
                answer.hosts.append((name, self._wait(host, now)))
        due = sorted((host.due, name) for name, host in self.hosts.items() if host.due <= now + 1.0)
        for _, name in due[: batch.claim]:
            host = self.hosts[name]
            host.owner, host.due, host.spacing = token, math.inf, host.spacing or batch.spacing
            answer.hosts.append((name, self._wait(host, now)))
        for name, after, portion in [*((name, 0, batch.limit) for name, _ in answer.hosts), *batch.refill]:
            answer.urls += [one for id_, one in sorted(self.queue.get(name, {}).items()) if id_ > after][:portion]
        for name in {*batch.held, *(name for name, _ in answer.hosts)}:
            answer.urls[:0] = [one for one in self.queue.get(name, {}).values() if one.kind == "robots"]
        answer.urls = [one._replace(wait=None if one.wait is None else one.wait - now) for one in answer.urls]
        claimed = {name for name, _ in answer.hosts}
        answer.robots = [one for key, one in self.robots.items() if host_of(key) in claimed or key in batch.asked]
        answer.scope = [(serial, url) for url, serial in self.scope.items() if serial > batch.scope_after]
        answer.workers = len(self.members)
        answer.reading = any(one.reading and one.until > now for one in self.members.values())
        answer.all_held = sum(one.held for one in self.members.values()) + len(claimed)
        answer.hungry = any(one.hungry for key, one in self.members.items() if key != token)
        answer.dead = any(one.until < now for one in self.members.values())
        answer.finished = not any(host.waiting for host in self.hosts.values()) and not any(
            one.reading and one.until > now for one in self.members.values()
        )
        return answer

    def _wait(self, host: Host, now: float) -> float | None:
        return host.next_at - now if host.next_at is not None and self.keeps_next else None

    def _enter(self, one: Queued, now: float) -> None:
        id_ = next(self.ids)
        self.queue.setdefault(one.host, {})[id_] = one._replace(id=id_, wait=None)
        host = self.hosts.setdefault(one.host, Host())
        host.waiting += 1
        if host.owner is None and host.due == math.inf:
            host.due = now if host.next_at is None else host.next_at

    def _apply(self, token: int, batch: SyncBatch, answer: SyncAnswer, now: float) -> None:
        done: list[Done] = list(batch.done)
        for link in batch.links:
            if link.key not in self.seen:
                self.seen.add(link.key)
                self._enter(Queued(link.host, 0, *link[2:], False, 0, 1, None), now)
        for move in batch.moves:
            done += self._move(move, now)
        for one in batch.delegated:
            self._enter(one, now)
        for again in batch.again:
            if again.id in self.queue.get(again.host, {}):
                self.queue[again.host][again.id] = again._replace(wait=now + (again.wait or 0.0))
        for finished in done:
            if self.queue[finished.host].pop(finished.id, None) is None and self.fence:
                continue
            self.hosts[finished.host].waiting -= 1
            if finished.row:
                demand(finished.url not in self.results, "stored twice", finished.url)
                self.results[finished.url] = finished.row
                answer.stored.append(finished.row)
        for name, note in batch.notes.items():
            self._note(token, self.hosts[name], note, now)
        self.robots |= {found.origin: found for found in batch.robots}
        for url in batch.scope:
            self.scope.setdefault(url, next(self.ids))

    def _move(self, move: Move, now: float) -> list[Done]:
        key = hashed(move.to.target)
        if move.instead and key in self.seen:
            return [Done(move.host, move.id, move.to.url, move.instead)]
        if self.queue[move.host].pop(move.id, None):
            self.hosts[move.host].waiting -= 1
            self._enter(move.to, now)
        self.seen.add(key)
        self.targets.add(key)
        return []

    def _note(self, token: int, host: Host, note: Note, now: float) -> None:
        if host.owner != token:
            return
        host.spacing = note.spacing or host.spacing
        if note.wait is not None:
            host.next_at = max(host.next_at or -math.inf, now + note.wait)
        if note.back:
            self._free(host, now)

    def _free(self, host: Host, now: float) -> None:
        host.owner = None
        host.due = (now if host.next_at is None else host.next_at) if host.waiting else math.inf

    def reap(self, now: float) -> None:
        for key in [key for key, one in self.members.items() if one.until < now]:
            until = self.members.pop(key).until
            for host in self.hosts.values():
                if host.owner == key:
                    host.next_at = max(host.next_at or -math.inf, until + (host.spacing or 0.0))
                    self._free(host, now)


class SharedWorker(Worker):
    """A worker's process: its clock, and its exchanges with the tables."""

    def __init__(self, run: Run, frontier: SharedFrontier) -> None:
        super().__init__(run, frontier, run.check, run.web, run.concurrency)
        self.run, self.mine = run, frontier
        self.offset, self.speed = run.rng.uniform(-1e6, 1e6), 1 + run.rng.uniform(-SKEW, SKEW)
        self.alive, self.frozen_until = True, 0.0

    def clock(self) -> float:
        return self.offset + self.run.now * self.speed

    def after(self, seconds: float, what: Callable[..., None], *about: Any) -> None:
        self.run.at(self.run.now + seconds / self.speed, self, what, *about)

    def sync(self) -> None:
        stats = self.mine.stats()
        if stats.closed and not stats.waiting and not stats.in_flight and self.mine.holds_nothing():
            self.alive = False  # the crawl is over
            return
        self._send(self.mine.plan(self.clock()))

    def _send(self, batch: SyncBatch) -> None:
        asked_at, rng = self.clock(), self.rng
        self.run.at(self.run.now + rng.expovariate(100.0), None, self._arrive, batch, asked_at, rng.random() < 0.03)

    def _arrive(self, batch: SyncBatch, asked_at: float, lost: bool) -> None:
        if lost:
            self.after(1.0, self._again, batch)
            return
        answer = self.run.tables.sync(dataclasses.replace(batch), self.run.now)
        if self.rng.random() < 0.03:
            self.after(1.0, self._again, batch)
        else:
            self.after(self.rng.expovariate(100.0), self._answered, batch, answer, asked_at)

    def _again(self, batch: SyncBatch) -> None:
        batch.resync = True
        self._send(batch)

    def _answered(self, batch: SyncBatch, answer: SyncAnswer, asked_at: float) -> None:
        self.mine.answered(batch, answer, asked_at, self.clock())
        if answer.dead:
            self.run.tables.reap(self.run.now)
        self.after(0.02 if self.mine.urgent() else 0.5, self.sync)

    def read(self, request: Request) -> None:
        if request.kind == "robots":
            found = Found(origin(request.url), 200, b"", request.target, 1e6)
            self.mine.found_robots(found)
            self.mine.robots_known(found.origin, self.run.rules(found), self.clock())
        else:
            self.mine.add_links(self.run.links(request.url), request.depth + 1, self.clock())

    def finish(self, request: Request) -> None:
        if request.kind != "robots":
            error = "robots: forbidden" if request.error else None
            self.mine.keep(request, ScrapeResult(request.url, None, None, 0, [], error, "", 0.0))
        super().finish(request)


class TrueTime:
    """Of all that is entered in the books of a checker, what holds over all workers: the rates, in true time."""

    def __init__(self, sim: Simulation, rate: float, burst: int) -> None:
        self._sim, self._tokens = sim, defaultdict[str, Tokens](lambda: Tokens(rate, burst))

    def sent(self, request: Request, _: float, ahead: float = 0.0) -> None:
        self._sim.counts["sent"] += 1
        demand(self._tokens[request.host].spend(self._sim.now), "above the rate:", request.host, self._sim.now)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *about, **more: None


class Run(Simulation):
    """One crawl."""

    def __init__(self, seed: int, frontier: Callable[..., SharedFrontier], tables: Tables, **given: Any) -> None:
        super().__init__(seed)
        rng, self.make, self.tables = self.rng, frontier, tables
        rate, burst = rng.choice((0.7, 3.0, 20.0)), rng.choice((1, 1, 3))
        self.limits = {"rate": rate, "burst": burst, "robots": rng.random() < 0.6}
        self.check = TrueTime(self, rate * (1 + SKEW), burst)
        self.given = {"length": LEASE, "hosts": rng.choice((3, 10, 100))} | given
        self.concurrency, latency = rng.choice((2, 20)), rng.choice((0.02, 0.3, 1.0))
        names = [f"h{n}.example" for n in range(rng.randint(1, 20))]
        self.web = Web(names, rng.randint(60, 200), FATES, latency)
        self.workers_left = rng.randint(1, 16)
        self.workers: list[SharedWorker] = []

    def url(self, page: int) -> str:
        return f"http://{self.web.names[page % 7 * page % len(self.web.names)]}/{page}"

    def links(self, url: str) -> list[str]:
        rng = random.Random(f"{self.seed} {url}")
        return [self.url(rng.randrange(self.web.pages)) for _ in range(5)]

    def rules(self, found: Found) -> Rules:
        rng = random.Random(f"{self.seed} {found.origin}")
        return Rules(rng.choice((0, 0, 5)), None, quick=rng.random() < 0.5, size=1)

    def _join(self, first: bool = False) -> None:
        frontier = self.make(**self.given, **self.limits)
        frontier.follows, frontier.rules_of = True, self.rules
        worker = SharedWorker(self, frontier)
        self.workers.append(worker)
        if first:
            frontier.add_list([self.url(page) for page in range(0, self.web.pages, 9)])
        worker.sync()

    def _accident(self) -> None:
        """Somebody stands still, dies, or comes."""
        alive = [worker for worker in self.workers if worker.alive]
        if not alive:
            return
        self.at(self.now + self.rng.expovariate(0.2), None, self._accident)
        worker, fate = self.rng.choice(alive), self.rng.random()
        if fate < 0.3:
            worker.frozen_until = self.now + self.rng.choice((1.0, LEASE, 3 * LEASE))
            self.counts["frozen"] += 1
        elif fate < 0.5 and self.workers_left:
            worker.alive = False
            self.counts["killed"] += 1
        if self.workers_left and (fate > 0.5 or len(alive) == 1):
            self.workers_left -= 1
            self._join()

    def run(self) -> Counter[str]:
        self._join(first=True)
        self.at(self.rng.random() * 5, None, self._accident)
        for _ in range(self.rng.randint(0, min(4, self.workers_left))):
            self.workers_left -= 1
            self.at(self.rng.random() * 3, None, self._join)
        for step in itertools.count():
            if not any(worker.alive for worker in self.workers):
                if not any(host.waiting for host in self.tables.hosts.values()) and self.tables.hosts:
                    break
                self.workers_left += 1
                self._join(first=not self.tables.hosts)
            demand(step < 500_000, "it does not end")
            when, _, worker, what, about = self.next_event()
            if worker and not worker.alive:
                continue
            if worker and worker.frozen_until > when:
                self.at(worker.frozen_until, worker, what, *about)
                continue
            self.now = max(self.now, when)
            what(*about)
            if worker and worker.alive:
                worker.step()
        self._ended()
        self.counts["lost leases"] = sum(worker.mine.leases_lost for worker in self.workers)
        return self.counts

    def _ended(self) -> None:
        tables = self.tables
        demand(not any(tables.queue.values()), "some wait at the end")
        stored = {hashed(url) for url in tables.results}
        demand(tables.seen <= stored | tables.targets, "lost")
        for url, row in tables.results.items():
            if row.error is None:
                demand(all(hashed(link) in tables.seen for link in self.links(url)), "a link was lost", url)


def simulate_shared(
    seed: int, frontier: Callable[..., SharedFrontier] = SharedFrontier, tables: Tables | None = None, **given: Any
) -> Counter[str]:
    """One crawl; what happened. Raises ``Broken``, with the seed as a note, when a promise is not kept."""
    with named(seed):
        return Run(seed, frontier, tables or Tables(), **given).run()


def run_shared(first: int, seeds: int) -> list[dict[str, Any]]:
    """The rows of ``python -m bench simulate --shared``. Raises SystemExit with the seed if a promise is broken."""
    started = time.perf_counter()
    counts = sum(each(range(first, first + seeds), simulate_shared), Counter[str]())
    return [{"": f"{seeds} shared crawls", **counts, "wall s": time.perf_counter() - started}]
