"""Shared crawls under a simulated clock: many workers (``simulator.crawls``) over a model of the tables.

    python -m bench simulate --shared --seeds 1000

Up to 16 workers join, stand still for longer than their lease and wake up late, die, and come anew, also within a
transaction, whose locks others then wait for; their clocks start anywhere and run up to ``SKEW`` fast or slow; batches
and answers are late or lost. A replica that lacks the last commits takes the server's place. The pages redirect, fail,
ask for pauses, name each other; some are the death of their worker; robots.txt is redirected to other hosts. What is
checked, all in true time:

- of each host, at most ``burst + rate * t`` sent in any window (by the fastest clock: ``rate * (1 + SKEW)``), and
  nothing in a pause that the tables, or its worker, know of;
- each URL stored once; at the end none waits, every one that was seen is stored or is a redirect's target, and every
  link of a stored page, and every line of the list, was seen;
- workers and tables agree on who has which host, once an answer was heard;
- no locks are held for longer than half a lease;
- a URL is said to be the death of its workers only if the last of them had nothing else;
- the crawl ends.

To be given leave to send and to send are one event here: a process that stands still between the two is the overlap
that ``crawl.lease`` does not promise away.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from crawl.lease import ALONE, PORTION, SharedFrontier
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
    careful: int = 0
    suspect: bool = False


@dataclasses.dataclass
class Member:
    """A row of crawl_workers."""

    until: float
    batch: int = 0
    held: int = 0
    hungry: bool = False
    reading: bool = False


class Open(NamedTuple):
    """A transaction that stands still."""

    keys: set[Any]  # what it has locked
    began: float
    until: float


class Tables:
    """What ``crawl.tables`` does in SQL; the faults that tests plant are arguments."""

    def __init__(
        self,
        *,
        fence: bool = True,
        keeps_next: bool = True,
        idle: float = LEASE / 4,
        notices: bool = True,
        grace: bool = True,
        sequence: bool = False,
        counts: bool = True,
        alone: bool = True,
    ) -> None:
        self.fence, self.keeps_next, self.idle, self.notices, self.grace = fence, keeps_next, idle, notices, grace
        self.sequence, self.counts_deaths, self.tries_alone = sequence, counts, alone
        self.hosts: dict[str, Host] = {}
        self.queue: dict[str, dict[int, Queued]] = {}
        self.seen: set[Any] = set()
        self.results: dict[str, ScrapeResult] = {}
        self.targets: set[Any] = set()
        self.members: dict[int, Member] = {}
        self.robots: dict[str, Found] = {}
        self.scope: dict[str, int] = {}
        self.ids, self.tokens = itertools.count(1), itertools.count(1)
        self.server, self.grace_until = 0, -math.inf
        self.started = 0  # which server it is
        self.open: list[Open] = []

    # Replicas, and transactions that stand still

    def copied(self) -> dict[str, Any]:
        """What a replica has of it. The numbers of workers are random, so none is given again."""
        names = "hosts", "queue", "seen", "results", "targets", "members", "robots", "scope", "ids"
        more = ("tokens",) if self.sequence else ()
        return copy.deepcopy({name: getattr(self, name) for name in (*names, "server", "grace_until", *more)})

    def promoted(self, content: dict[str, Any]) -> None:
        vars(self).update(content)
        self.started += 1
        self.open.clear()

    @staticmethod
    def _keys(batch: SyncBatch) -> set[Any]:
        hosts = [*batch.notes, *(one.host for one in batch.links), *(one.host for one in batch.delegated)]
        hosts += [*(one.host for one in batch.moves), *(one.host for one in batch.done)]
        to = [key for move in batch.moves for key in (hashed(move.to.target), move.to.host)]
        return {batch.token, *(link.key for link in batch.links), *hosts, *to} - {None}

    def hold(self, batch: SyncBatch, now: float, seconds: float) -> None:
        self.open.append(Open(self._keys(batch), now, now + min(seconds, self.idle)))

    def blocked(self, batch: SyncBatch, now: float) -> float:
        """When the locks are free that a batch needs; -inf: they are."""
        keys = self._keys(batch)
        self.open = [one for one in self.open if one.until > now]
        return max((one.until for one in self.open if one.keys & keys), default=-math.inf)

    def _locked(self, key: Any, now: float) -> bool:
        return any(key in one.keys and one.until > now for one in self.open)

    # Transactions

    def sync(self, batch: SyncBatch, now: float) -> SyncAnswer:
        if self.server != self.started:
            if self.grace and (batch.rejoins or batch.token is not None or self.members):
                self.grace_until = now + batch.lease
            self.server = self.started
        token = next(self.tokens) if batch.token is None else batch.token
        if batch.token is None or (not self.fence and token not in self.members):
            self.members[token] = Member(now, batch.serial - 1)
        if token not in self.members:
            return SyncAnswer()
        member = self.members[token]
        if member.batch < batch.serial - 1 and self.notices:
            member.until = now
            return SyncAnswer()
        applied, member.batch = member.batch >= batch.serial, batch.serial if batch.token else 0
        member.until, member.held = now + batch.lease, len(batch.held)
        member.hungry, member.reading = batch.hungry, batch.reading
        answer = SyncAnswer(token)
        if not applied:
            self._apply(token, batch, answer, now)
        mine = [name for name, host in self.hosts.items() if host.owner == token and name not in batch.held]
        demand(applied or not mine, "hosts that their worker does not know of:", *mine)
        theirs = [name for name in batch.held if self.hosts[name].owner != token]
        demand(not theirs or not self.fence, "hosts held that belong to others:", *theirs)
        claimed = mine if applied else []
        if batch.claim and not batch.held and not claimed and self.tries_alone:
            claimed = self._claim(token, batch, 1, True, now)
        answer.alone = self.tries_alone and any(self.hosts[name].suspect for name in claimed)
        if batch.claim and not answer.alone:
            claimed = claimed + self._claim(token, batch, batch.claim, False if self.tries_alone else None, now)
        answer.hosts = [(name, self._wait(self.hosts[name], now)) for name in claimed]
        answer.careful = {name: self.hosts[name].careful for name in claimed if self.hosts[name].careful}
        new = [(name, 0, 1 if name in answer.careful else batch.limit) for name in claimed]
        for name, after, portion in [*new, *batch.refill]:
            answer.urls += [one for id_, one in sorted(self.queue.get(name, {}).items()) if id_ > after][:portion]
        for name in {*batch.held, *(name for name, _ in answer.hosts)}:
            answer.urls[:0] = [one for one in self.queue.get(name, {}).values() if one.kind == "robots"]
        answer.urls = [one._replace(wait=None if one.wait is None else one.wait - now) for one in answer.urls]
        answer.robots = [one for key, one in self.robots.items() if host_of(key) in claimed or key in batch.asked]
        answer.scope = [(serial, url) for url, serial in self.scope.items() if serial > batch.scope_after]
        answer.workers = len(self.members)
        answer.reading = any(one.reading and one.until > now for one in self.members.values())
        answer.all_held = sum(one.held for one in self.members.values()) + len(claimed)
        answer.hungry = any(one.hungry for key, one in self.members.items() if key != token)
        answer.dead = self.grace_until < now and any(one.until < now for one in self.members.values())
        first = min(key for key, one in self.members.items() if one.until > now)
        answer.try_alone = token == first and any(one.suspect and one.due <= now + 1.0 for one in self.hosts.values())
        answer.finished = not any(host.waiting for host in self.hosts.values()) and not any(
            one.reading and one.until > now for one in self.members.values()
        )
        return answer

    def _claim(self, token: int, batch: SyncBatch, count: int, suspect: bool | None, now: float) -> list[str]:
        free = [
            (host.due, name)
            for name, host in self.hosts.items()
            if host.due <= now + 1.0 and suspect in (None, host.suspect) and not self._locked(name, now)
        ]
        names = [name for _, name in sorted(free)[:count]] if self.grace_until < now else []
        for name in names:
            host = self.hosts[name]
            host.owner, host.due, host.spacing = token, math.inf, host.spacing or batch.spacing
        return names

    def _wait(self, host: Host, now: float) -> float | None:
        at = max(host.next_at or -math.inf, self.grace_until + (host.spacing or 0.0))
        return at - now if at > -math.inf and self.keeps_next else None

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
                self._enter(Queued(link.host, 0, *link[2:7], False, link.hops, 1, None), now)
        for move in batch.moves:
            done += self._move(move, now)
        for one in batch.delegated:
            self._enter(one, now)
        for again in batch.again:
            if known := self.queue.get(again.host, {}).get(again.id):
                wait = now + (again.wait or 0.0)
                self.queue[again.host][again.id] = again._replace(wait=wait, deaths=known.deaths)
        for finished in done:
            known = self.queue[finished.host].pop(finished.id, None)
            if known is None and self.fence:
                continue
            self._left(self.hosts[finished.host], known is None or known.kind != "robots")
            if finished.row:
                demand(finished.url not in self.results, "stored twice", finished.url)
                self.results[finished.url] = finished.row
                answer.stored.append(finished.row)
        for name, note in batch.notes.items():
            self._note(token, self.hosts.setdefault(name, Host()), note, now)
        self.robots |= {found.origin: found for found in batch.robots}
        for url in batch.scope:
            self.scope.setdefault(url, next(self.ids))

    def _left(self, host: Host, tried: bool) -> None:
        host.waiting -= 1
        if tried:
            host.careful, host.suspect = max(0, host.careful - 1), False

    def _move(self, move: Move, now: float) -> list[Done]:
        key = hashed(move.to.target)
        if move.instead and key in self.seen:
            return [Done(move.host, move.id, move.to.url, move.instead)]
        if self.queue[move.host].pop(move.id, None):
            self._left(self.hosts[move.host], True)
            self._enter(move.to, now)
        self.seen.add(key)
        self.targets.add(key)
        return []

    def _note(self, token: int, host: Host, note: Note, now: float) -> None:
        host.spacing = note.spacing or host.spacing
        if note.wait is not None:
            host.next_at = max(host.next_at or -math.inf, now + note.wait)
            host.due = max(host.due, host.next_at)
        if note.back and host.owner == token:
            self._free(host, now)

    def _free(self, host: Host, now: float) -> None:
        host.owner = None
        host.due = (now if host.next_at is None else host.next_at) if host.waiting else math.inf

    def reap(self, now: float) -> None:
        if self.server != self.started or self.grace_until >= now:
            return
        long_held = any(one.began < now - LEASE / 2 for one in self.open if one.until > now)
        demand(not long_held, "locks are held for longer than half a lease")
        for key in [key for key, one in self.members.items() if one.until < now and not self._locked(key, now)]:
            until = max(self.members.pop(key).until, self.grace_until)
            owned = [(name, host) for name, host in self.hosts.items() if host.owner == key]
            for name, host in owned:
                host.next_at = max(host.next_at or -math.inf, until + (host.spacing or 0.0))
                self._free(host, now)
                if self.counts_deaths:
                    self._suspect(name, host, len(owned))

    def _suspect(self, name: str, host: Host, hosts: int) -> None:
        queue = self.queue.get(name, {})
        if host.careful and (pages := [id_ for id_, one in queue.items() if one.kind != "robots"]):
            first = min(pages)
            queue[first] = queue[first]._replace(deaths=queue[first].deaths + 1)
            demand(queue[first].deaths < ALONE or hosts == 1, "blamed though it was not alone:", name)
            host.suspect = True
        host.careful = PORTION if host.waiting else 0


class SharedWorker(Worker):
    """A worker's process: its clock, and its exchanges with the tables."""

    def __init__(self, run: Run, frontier: SharedFrontier) -> None:
        super().__init__(run, frontier, Books(run, self), run.web, run.concurrency)
        self.run, self.mine = run, frontier
        self.killed = False
        self.offset, self.speed = run.rng.uniform(-1e6, 1e6), 1 + run.rng.uniform(-SKEW, SKEW)
        self.alive, self.frozen_until = True, 0.0

    def clock(self) -> float:
        return self.offset + self.run.now * self.speed

    def after(self, seconds: float, what: Callable[..., None], *about: Any) -> None:
        self.run.at(self.run.now + seconds / self.speed, self, what, *about)

    def read_list(self, lines: list[str]) -> None:
        """Some now, the rest later."""
        self.mine.add_list(lines[:8])
        self.mine.reading = len(lines) > 8
        if self.mine.reading:
            self.after(self.rng.choice((0.01, 0.5)), self.read_list, lines[8:])

    def sync(self) -> None:
        stats = self.mine.stats()
        if stats.closed and not stats.waiting and not stats.in_flight and self.mine.holds_nothing():
            self.alive = False  # the crawl is over
            return
        self.pauses = {name: pause for name, pause in self.run.pauses.items() if pause.learner is self}
        self._send(self.mine.plan(self.clock()))

    def _send(self, batch: SyncBatch) -> None:
        asked_at, rng = self.clock(), self.rng
        self.run.at(self.run.now + rng.expovariate(100.0), None, self._arrive, batch, asked_at, rng.random() < 0.03)

    def _arrive(self, batch: SyncBatch, asked_at: float, lost: bool) -> None:
        run, tables = self.run, self.run.tables
        if lost:
            self.after(1.0, self._send, batch)
        elif (free := tables.blocked(batch, run.now)) > -math.inf:
            run.at(free, None, self._arrive, batch, asked_at, False)
        elif self.alive and self.rng.random() < 0.004:
            run.counts["stuck"] += 1
            seconds = self.rng.choice((LEASE / 8, LEASE, 3 * LEASE))
            if self.rng.random() < 0.3 and run.workers_left:
                self.die()
                seconds = math.inf
            tables.hold(batch, run.now, seconds)
            self.frozen_until = run.now + seconds
            if seconds < tables.idle:
                run.at(self.frozen_until, None, self._commit, batch, asked_at, tables.started)
            elif seconds < math.inf:
                self.after(1.0, self._send, batch)
        else:
            self._commit(batch, asked_at, tables.started)

    def _commit(self, batch: SyncBatch, asked_at: float, server: int) -> None:
        tables = self.run.tables
        if server == tables.started:
            answer = tables.sync(dataclasses.replace(batch), self.run.now)
            for name, pause in self.pauses.items():  # who has the host of a late worker does not hear of it
                if answer.token is not None and (host := tables.hosts.get(name)):
                    pause.told |= host.owner in (None, answer.token)
        if server != tables.started or self.rng.random() < 0.03:
            self.after(1.0, self._send, batch)
        else:
            self.after(self.rng.expovariate(100.0), self._answered, batch, answer, asked_at)

    def die(self) -> None:
        self.alive, self.killed = False, True
        self.run.counts["killed"] += 1

    def answer(self, request: Request) -> None:
        if request.kind == "page" and int(request.target.rpartition("/")[2]) in self.run.deadly:
            self.run.counts["deaths"] += 1
            demand(self.run.counts["deaths"] < 50, "a page is the death of all")
            self.die()
            self.run.at(self.run.now + 1.0, None, self.run._join)
        else:
            super().answer(request)

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
            error = str(request.error) if request.error else None
            self.mine.keep(request, ScrapeResult(request.url, None, None, 0, [], error, "", 0.0))
        super().finish(request)


@dataclasses.dataclass
class Pause:
    until: float
    learner: SharedWorker
    told: bool = False


class Books:
    """Of all that a worker enters in the books of a checker, what holds over all: rates and pauses, in true time."""

    def __init__(self, run: Run, worker: SharedWorker) -> None:
        self._run, self._worker = run, worker

    def sent(self, request: Request, _: float, ahead: float = 0.0) -> None:
        run, name = self._run, request.host
        run.counts["sent"] += 1
        demand(run.tokens[name].spend(run.now), "above the rate:", name, run.now)
        if (pause := run.pauses.get(name)) and run.now < pause.until:
            demand(not pause.told and pause.learner is not self._worker, "sent while paused:", name, run.now)

    def paused(self, name: str, now: float, until: float) -> None:
        """By the slowest clocks."""
        end = self._run.now + (until - now) * (1 - 3 * SKEW)
        if name not in self._run.pauses or self._run.pauses[name].until < end:
            self._run.pauses[name] = Pause(end, self._worker)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *about, **more: None


class Run(Simulation):
    """One crawl."""

    def __init__(self, seed: int, frontier: Callable[..., SharedFrontier], tables: Tables, **given: Any) -> None:
        super().__init__(seed)
        rng, self.make, self.tables = self.rng, frontier, tables
        rate, burst = rng.choice((0.7, 3.0, 20.0)), rng.choice((1, 1, 3))
        self.limits = {"rate": rate, "burst": burst, "robots": rng.random() < 0.6}
        self.tokens = defaultdict[str, Tokens](lambda: Tokens(rate * (1 + SKEW), burst))
        self.pauses: dict[str, Pause] = {}
        self.given = {"length": LEASE, "hosts": rng.choice((3, 10, 100))} | given
        self.concurrency, latency = rng.choice((2, 20)), rng.choice((0.02, 0.3, 1.0))
        names = [f"h{n}.example" for n in range(rng.randint(1, 20))]
        self.web = Web(names, rng.randint(60, 200), FATES, latency)
        self.workers_left = rng.randint(1, 16)
        self.workers: list[SharedWorker] = []
        self.lister: SharedWorker
        self.listed = [self.url(page) for page in range(0, self.web.pages, 9)]
        self.deadly = {rng.randrange(self.web.pages) for _ in range(rng.choice((0, 0, 1, 2)))}

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
            self.lister = worker
            worker.read_list(list(self.listed))
        worker.sync()

    def _replicate(self) -> None:
        """What a replica has, which is promoted after a while."""
        self.at(self.now + self.rng.choice((0.3, 2.0, 15.0)), None, self._promote, self.tables.copied())

    def _promote(self, content: dict[str, Any]) -> None:
        if content["members"] and self.lister.alive and not self.lister.mine.stats().closed:
            self.tables.promoted(content)
            self.pauses.clear()
            self.counts["promoted"] += 1

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
            worker.die()
        if self.workers_left and (fate > 0.5 or len(alive) == 1):
            self.workers_left -= 1
            self._join()

    def run(self) -> Counter[str]:
        self._join(first=True)
        self.at(self.rng.random() * 5, None, self._accident)
        for _ in range(self.rng.randint(0, min(4, self.workers_left))):
            self.workers_left -= 1
            self.at(self.rng.random() * 3, None, self._join)
        if self.rng.random() < 0.4:
            self.at(self.rng.random() * self.rng.choice((1, 40)), None, self._replicate)
        for step in itertools.count():
            if not any(worker.alive for worker in self.workers):
                told = all(hashed(url) in self.tables.seen for url in self.listed)
                if told and not any(host.waiting for host in self.tables.hosts.values()):
                    break
                demand(told or self.lister.killed, "a line of the list was lost")
                self.workers_left += 1
                self._join(first=not told)
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
