"""One crawl by any number of workers, on any number of machines: the frontier and the rows are tables in PostgreSQL.

    python crawl_async.py urls.txt --frontier postgresql://user@host/crawl --depth 5     in any number of terminals
    python crawl_async.py --frontier postgresql://user@host/crawl --status

Theory.  Hosts are what is leased: who holds a host runs the usual ``Frontier`` over its URLs, so which goes next, and
when, is decided there as ever, and nobody else sends that host anything. All that passes between a worker and the
database is one ``SyncBatch`` and its ``SyncAnswer`` (crawl/sync.py), in one short transaction: it renews the lease,
stores what was finished, adds what was found, gives hosts back, claims others. ``SharedFrontier`` says what goes into
a batch and what follows from an answer; it is pure, so the simulator drives many of them over a model of the tables.

The lease is the worker's: one row, renewed by every batch. Hosts name their owner, so renewal costs one row, however
many are held. A worker whose row is gone has lost all its hosts at once: the row is the fence that every batch must
pass first, and a number is never given twice. Whoever sees a lease that has ended deletes its row and frees its
hosts in one transaction.

Promised
- Times that workers share are the database's; each worker only measures durations, on a clock that goes on while the
  machine sleeps. A worker counts its lease from before it asked for it, and sends nothing after ``1 - MARGIN`` of it,
  so clocks may run apart by that. A host that was given back may go at its exact next time; one whose lease ended,
  one interval after the end. So over all workers a host is sent at most ``burst + rate * t``, lost leases included.
  What overlaps is only a request that had its leave to be sent before its process stood still: ``per_host`` at most.
- A URL is stored once: its row enters with the transaction that takes it out of the queue, behind the fence. It is
  lost never: it stays in the queue until then, and the links of a page enter before or with its row.
- After a connection broke in a commit, the same batch is sent again; its number says if it was applied.
- What a dead worker held waits for a lease at most, and what was in flight there is asked for again.
- The end is exact: no URL waits, and nobody reads a list.

Not promised: that all workers start with the same options; the first one's count (``crawl.shared_crawl.SHARED``).
``--total-rate`` and ``--adaptive`` are each worker's own.
A Crawl-delay or Retry-After that came within the last moment before a kill -9 is learnt again. Traps are counted by
each worker for itself.

Locks: ``SharedFrontier._guard`` is taken before the frontier's own.
"""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from coordination import new_lock
from crawl.addresses import names_private
from crawl.errors import FetchError
from crawl.handover import HandoverFrontier
from crawl.hosts import Kind
from crawl.model import Request, ScrapeResult
from crawl.robots import DISALLOW_ALL, Rules
from crawl.rows import build_row
from crawl.sync import Done, Found, Link, Move, Note, Queued, SyncAnswer, SyncBatch, clean, hashed
from crawl.urls import host_of, normalise
from crawl.urls import origin as origin_of

LEASE = 30.0  # seconds
MARGIN = 0.2  # share of a lease in which its worker sends nothing any more
AT_ONCE = 500  # finished URLs that are not kept waiting for that; ten times as many make the tasks wait
LINKS = 20_000  # found URLs in one batch
DELEGATED = 90.0  # seconds that a host waits for its robots.txt from a host that another worker holds
MAX_HOST = 255


class _Held:
    """A host of ours."""

    __slots__ = ("drained", "last", "leaving", "local", "robots")

    def __init__(self) -> None:
        self.last = 0  # the id up to which its URLs are here
        self.local = 0  # its URLs that are here, in flight or not
        self.robots: set[int] = set()  # ids of requests for the robots.txt of others that were redirected here
        self.drained = self.leaving = False


class SharedFrontier(HandoverFrontier):
    """A ``Frontier`` over the hosts that this worker holds, and what it has to tell the database.

    ``plan(now)`` makes the next batch; ``answered`` takes what came back. One batch at a time.
    """

    def __init__(self, *, length: float = LEASE, margin: float = MARGIN, hosts: int = 100, **limits: Any) -> None:
        super().__init__(**limits)
        self.length, self.margin, self.most = length, margin, hosts
        self.follows = self.scoped = self.knows_first = False  # ``scoped``: the hosts of the list matter
        self.on_scope: Callable[[str], None] = lambda url: None
        self.as_duplicate: Callable[[Request, str], ScrapeResult] = _no_row
        self.rules_of: Callable[[Found], Rules] = lambda found: found.rules("")
        self.token: int | None = None
        self.reading = False
        self.leases_lost = 0
        self._guard = new_lock("SharedFrontier")
        self._serial_of_batch = 0
        self._held: dict[str, _Held] = {}
        self._keys: dict[Request, tuple[str, int, _Held]] = {}
        self._rows: dict[Request, ScrapeResult] = {}
        self._asked: dict[str, float] = {}  # origins whose robots.txt another host has, and until when to wait for it
        self._paused: set[str] = set()
        self._spaced: set[str] = set()
        self._out = SyncBatch(None, 0, length)
        self._told: set[uuid.UUID] = set()
        self._scope_after = 0
        self._give = 0
        self._share: float = math.inf  # hosts to hold at most, while others have too little to do
        self._starved = self._all_leave = self._halved = False
        self._others_read = True  # somebody reads a list: with ``knows_first`` nothing is fetched until it is known
        self.lease(-math.inf)

    # What the crawl tells.

    def add_list(self, texts: Iterable[str]) -> None:
        """Lines of a list."""
        links, scope = [], []
        for raw in texts:
            text = clean(raw)
            try:
                target, host = normalise(text)
                if len(host) > MAX_HOST:
                    raise FetchError("invalid_url", "host name too long")
            except FetchError:
                links.append(Link(hashed(text), "", text, text))
            else:
                links.append(Link(hashed(target), host, text, target, private=names_private(host)))
                scope.append(target)
        with self._guard:
            self._out.links += links
            if self.scoped:
                self._out.scope += scope

    def add_links(
        self, targets: Iterable[str], depth: int, now: float, *, private: bool = False, kind: Kind = "page"
    ) -> int:
        """Those that were not told yet go into the next batch. Returns how many."""
        with self._guard:
            before = len(self._out.links)
            for target in targets:
                key, host = hashed(target), host_of(target)
                if key not in self._told and len(host) <= MAX_HOST:
                    if len(self._told) >= 200_000:
                        self._told.clear()
                    self._told.add(key)
                    self._out.links.append(Link(key, host, target, target, depth, kind, private))
            return len(self._out.links) - before

    def mark(self, target: str, *, counts: bool = False) -> bool:
        """Whether somebody had it is seen when it comes to the database."""
        return True

    def keep(self, request: Request, row: ScrapeResult) -> None:
        """The row of a request, before it is finished."""
        with self._guard:
            self._rows[request] = row

    def found_robots(self, found: Found) -> None:
        """What a request for robots.txt came to, for the other workers."""
        with self._guard:
            self._out.robots.append(found)
            self._spaced.add(host_of(found.origin))

    def pause(self, host_name: str, until: float, now: float) -> None:
        """Also told to the database, for whoever has the host next."""
        super().pause(host_name, until, now)
        with self._guard:
            self._paused.add(host_name)

    def finish(self, request: Request, now: float) -> None:
        """Also told to the database, with its row."""
        super().finish(request, now)
        with self._guard:
            row, known = self._rows.pop(request, None), self._keys.pop(request, None)
            if known is None:
                return  # for robots.txt, or its lease is lost
            host, id_, held = known
            held.local -= 1
            if row is None or not (row.error or "").startswith("interrupted"):
                self._out.done.append(Done(host, id_, request.url, row))

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        """It waits here while its host is held; a redirect, or a host that leaves, goes through the database."""
        with self._guard:
            known = self._keys.get(request)
            held = known[2] if known else self._held.get(request.host)
            moves = target is not None and (known is not None or host_name not in (None, request.host))
            ours = known is not None or request.kind == "robots"
            if held is not None and not held.leaving and ours and not moves:
                super().put_back(request, now, not_before, target, host_name)
                return
            self.pass_on(request, now)
            if held is None or (known is None and (not moves or request.kind != "robots")):
                return  # its lease was lost, or its host is leaving
            if known is None:  # our own request for robots.txt, to a host that may be another's
                assert target is not None and host_name is not None
                name = origin_of(request.url)
                self._asked[name] = now + DELEGATED
                self._out.delegated.append(_queued(request, host_name, 0, target, None))
                return
            del self._keys[request]
            held.local -= 1
            host, id_, _ = known
            if target is None or host_name is None:
                self._out.again.append(_queued(request, host, id_, request.target, max(0.0, not_before - now)))
                return
            checked = self.follows and request.kind == "page"
            if checked and not request.depth:
                self._out.scope.append(target)
            to = _queued(request, host_name, 0, target, None)
            self._out.moves.append(Move(host, id_, to, self.as_duplicate(request, target) if checked else None))

    # What is told to the database, and what comes back.

    def urgent(self) -> bool:
        """The next batch should not be kept waiting."""
        with self._guard:
            out = self._out
            return bool(
                self._halved
                or len(out.done) >= AT_ONCE
                or len(out.links) >= LINKS
                or (self._paused & self._held.keys())
                or (not self._keys and (out.done or out.moves))
            )

    def backlog(self) -> int:
        """How much waits to be told, in finished URLs."""
        with self._guard:
            return max(len(self._out.done), len(self._out.links) * AT_ONCE // LINKS)

    def leave(self) -> None:
        """Give all hosts back with the next batches."""
        with self._guard:
            self._all_leave = True

    def holds_nothing(self) -> bool:
        """Whether no host is held, and all is told."""
        with self._guard:
            out = self._out
            return not self._held and not (out.done or out.links or out.moves or out.scope or out.again)

    def plan(self, now: float) -> SyncBatch:
        """The next batch: what is new, and what is asked for."""
        free = max(0, self._room())
        with self._guard:
            reading, self._halved = self.reading, False  # before its lines are taken
            out = self._out
            batch, self._out = out, SyncBatch(None, 0, self.length)
            self._out.links, batch.links = out.links[LINKS:], out.links[:LINKS]
            batch.token, batch.serial = self.token, self._serial_of_batch + 1
            fair = self.rate("")  # of a host of which nothing is known
            batch.spacing, batch.limit = (0.0 if fair == math.inf else 1 / fair), self._portion("")
            self._choose_leaving()
            for name, held in list(self._held.items()):
                if held.leaving:
                    self._clear(name, held, batch, now)
                in_flight, wait = self.load(name, now)
                delegating = any(host_of(key) == name for key in self._asked) if self._asked else False
                if held.local or in_flight or (delegating and not held.leaving):
                    portion = self._portion(name)
                    if not held.leaving and held.local <= portion // 2:
                        batch.refill.append((name, held.last, portion))
                    if name in self._paused or name in self._spaced:
                        batch.notes[name] = Note(wait, self._spacing(name), False)
                elif held.leaving or held.drained:
                    batch.notes[name] = Note(wait, self._spacing(name), True)
                    self.evict(name, now)
                    del self._held[name]
                else:
                    batch.refill.append((name, held.last, self._portion(name)))
            self._paused.clear()
            self._spaced.clear()
            batch.held = list(self._held)
            staying = sum(not held.leaving for held in self._held.values())
            waits = self.token is None or (self.knows_first and self._others_read)
            most = 0.0 if self._all_leave or waits else min(self._share, self.most)
            batch.claim = int(min(free, max(0, most - staying)))
            batch.hungry = self._starved and batch.claim > 0
            batch.asked = list(self._asked)
            batch.reading, batch.scope_after = reading or bool(self._out.links), self._scope_after
            return batch

    def halve(self, batch: SyncBatch) -> bool:
        """Keep half of what ``batch`` tells, which was not applied; the rest goes before what comes next.

        False if there is nothing to halve. Links stay before the rows of their pages, and rows before their host goes.
        """
        with self._guard:
            rest, later = dataclasses.replace(batch, links=[], done=[], robots=[], claim=0), self._out
            if len(batch.links) > 1 or (batch.links and batch.done):
                half = max(1, len(batch.links) // 2)
                batch.links, rest.links, rest.done = batch.links[:half], batch.links[half:], batch.done
                batch.done, batch.reading = [], True
            elif len(batch.done) > 1:
                half = len(batch.done) // 2
                batch.done, rest.done = batch.done[:half], batch.done[half:]
            else:
                return False
            half = len(batch.scope) // 2
            batch.scope, rest.scope = batch.scope[:half], batch.scope[half:]
            for name in ("links", "scope", "done", "moves", "delegated", "again", "robots"):
                setattr(later, name, getattr(rest, name) + getattr(later, name))
            later.notes |= batch.notes
            batch.moves, batch.delegated, batch.again, batch.notes = [], [], [], {}
            self._halved = True
            batch.held += [name for name, note in later.notes.items() if note.back]  # they are told of, not claimed
            return True

    def answered(self, batch: SyncBatch, answer: SyncAnswer, asked_at: float, now: float) -> None:
        """``asked_at``: before the batch was sent."""
        with self._guard:
            if answer.token is None:
                self._lose(batch, now)
                return
            self.token, self._serial_of_batch = answer.token, batch.serial
            if batch.token is None:
                self._serial_of_batch = 0
            self.lease(asked_at + self.length * (1 - self.margin))
            claimed = {name for name, _ in answer.hosts if name not in self._held}
            for name, wait in answer.hosts:
                if name in claimed:
                    self._held[name] = _Held()
                    if wait is not None:
                        super().pause(name, now + wait, now)
            for found in answer.robots:
                self._asked.pop(found.origin, None)
                rules = answer.rules.get(found.origin) or self.rules_of(found)
                self.robots_known(found.origin, rules, now, ttl=found.ttl)
            for name in [name for name, until in self._asked.items() if until < now]:
                del self._asked[name]
                self.robots_known(name, DISALLOW_ALL, now, ttl=60.0)
            for name in (*claimed, *(name for name, _, _ in batch.refill)):
                if name in self._held:
                    self._held[name].drained = True
            for queued in answer.urls:
                held = self._held.get(queued.host)
                if held is None or held.leaving:
                    continue
                if queued.kind == "robots":  # they overtake the others
                    if queued.id in held.robots:
                        continue
                    held.robots.add(queued.id)
                elif queued.id <= held.last:
                    continue
                else:
                    held.last = queued.id
                held.drained = False
                request = _request(queued, now)
                self._keys[request] = queued.host, queued.id, held
                held.local += 1
                self.adopt(request, now, -math.inf if queued.wait is None else now + queued.wait)
            for serial, url in answer.scope:
                self._scope_after = max(self._scope_after, serial)
                self.on_scope(url)
            self._others_read = answer.reading
            self._starved = batch.claim > 0 and not claimed
            self._share = math.ceil(answer.all_held / max(1, answer.workers)) if answer.hungry else math.inf
            self._give = int(max(0, len(self._held) - self._share))
            if answer.finished and not batch.links and not self._out.links and not self.reading:
                self.close()

    def _portion(self, name: str) -> int:
        """URLs of a host that are worth having here: for two leases."""
        return int(max(4, min(200, 2 * self.length * min(100.0, self.rate(name)))))

    def _spacing(self, name: str) -> float:
        rate = self.rate(name)
        return 0.0 if rate == math.inf else 1 / rate

    def _room(self) -> int:
        """Hosts that could be put to use."""
        return self.most - self.stats().hosts_ready

    def _choose_leaving(self) -> None:
        self._give -= sum(held.leaving for held in self._held.values())
        for held in reversed(self._held.values()):
            if not held.leaving and (self._all_leave or self._give > 0):
                held.leaving = True
                self._give -= 1

    def _clear(self, name: str, held: _Held, batch: SyncBatch, now: float) -> None:
        for key in [key for key in self._asked if host_of(key) == name]:
            del self._asked[key]
        for at, request in self.evict(name, now):
            known = self._keys.pop(request, None)
            if known is None:
                continue
            held.local -= 1
            if request.attempt > 1 or at > now:
                batch.again.append(_queued(request, name, known[1], request.target, max(0.0, at - now)))

    def _lose(self, batch: SyncBatch, now: float) -> None:
        """Others have our hosts now: what was found stays to be told, what was finished they do anew."""
        self.leases_lost += 1
        self.lease(-math.inf)
        for name in list(self._held):
            self.evict(name, now)
        self._held.clear()
        self._keys.clear()
        self._asked.clear()
        self.token, self._serial_of_batch, self._give, self._share = None, 0, 0, math.inf
        links, scope, robots = self._out.links, self._out.scope, self._out.robots
        self._out = SyncBatch(None, 0, self.length)
        self._out.links, self._out.scope = batch.links + links, batch.scope + scope
        self._out.robots = batch.robots + robots


def _no_row(request: Request, target: str) -> ScrapeResult:
    return build_row(request, FetchError("duplicate", f"redirects to {target}"))


def _queued(request: Request, host: str, id_: int, target: str, wait: float | None) -> Queued:
    more = request.private, request.strayed, request.hops, request.attempt
    return Queued(host, id_, request.url, target, request.depth, request.kind, *more, wait)


def _request(queued: Queued, now: float) -> Request:
    request = Request(
        queued.url,
        queued.target,
        queued.host,
        queued.depth,
        queued.attempt,
        queued.hops,
        started=now,
        kind=queued.kind,
        private=queued.private,
        strayed=queued.strayed,
    )
    if not queued.host:
        try:
            normalise(queued.url)
            request.error = FetchError("invalid_url", "host name too long")
        except FetchError as error:
            request.error = error
    return request
