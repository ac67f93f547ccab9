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
- After a connection broke in a commit, the same batch is sent again; its number says if it was applied. It also says
  if earlier ones are gone: a replica that lacks them was promoted, or a backup is in the database's place. Then the
  worker drops its hosts, tells again what it read of its list within ``crawl.outbox.KEPT`` seconds, and joins anew;
  what pages said is found again, for they are in the queue again. No host is given out meanwhile until all leases of
  before have ended.
- What a dead worker held waits for a lease at most, and what was in flight there is asked for again. That was perhaps
  the death of it: the host's next URLs are tried one at a time. The one that is the death of a second worker waits for
  one that has nothing else; if that dies too, its row is ``internal``.
- The end is exact: no URL waits, and nobody reads a list.

Not promised: that all workers start with the same options; the first one's count (``crawl.shared_crawl.SHARED``).
``--total-rate`` and ``--adaptive`` are each worker's own.
A Crawl-delay or Retry-After that came within the last moment before a kill -9, or was told to a commit that is lost,
is learnt again. Traps are counted by each worker for itself. If all workers leave, and then commits are lost, the list
has to be given again.

Locks: ``SharedFrontier._guard`` is taken before the frontier's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from coordination import new_lock
from crawl.cookies import Cookie
from crawl.errors import FetchError
from crawl.frontier import Frontier
from crawl.hosts import Kind
from crawl.model import Request, ScrapeResult
from crawl.outbox import AT_ONCE, Outbox
from crawl.robots import DISALLOW_ALL, Rules
from crawl.rows import build_row
from crawl.sync import Done, Found, Move, Note, Queued, SyncAnswer, SyncBatch
from crawl.urls import host_of, normalise
from crawl.urls import origin as origin_of

LEASE = 30.0  # seconds
MARGIN = 0.2  # share of a lease in which its worker sends nothing any more
PORTION = 200  # URLs of a host that a worker has at most
CARRIED = 1000  # redirect chains whose cookies are kept while they wait in the tables
DELEGATED = 90.0  # seconds that a host waits for its robots.txt from a host that another worker holds
ALONE = 2  # workers that died with a URL, the second one with nothing else, before its row says so


class _Held:
    """A host of ours."""

    __slots__ = ("alone", "careful", "drained", "last", "leaving", "local", "robots")

    def __init__(self, careful: int, alone: bool) -> None:
        self.last = 0  # the id up to which its URLs are here
        self.local = 0  # its URLs that are here, in flight or not
        self.robots: set[int] = set()  # ids of requests for the robots.txt of others that were redirected here
        self.drained = self.leaving = False
        self.careful = careful  # so many of its URLs are tried one at a time
        self.alone = alone  # nothing else is held until its first URL is done


class SharedFrontier(Frontier):
    """A ``Frontier`` over the hosts that this worker holds, and what it has to tell the database.

    ``plan(now)`` makes the next batch; ``answered`` takes what came back. One batch at a time.
    """

    def __init__(self, *, length: float = LEASE, margin: float = MARGIN, hosts: int = 100, **limits: Any) -> None:
        super().__init__(**limits)
        self.length, self.margin, self.most = length, margin, hosts
        self.follows = self.knows_first = False
        self.on_scope: Callable[[str], None] = lambda url: None
        self.form = ScrapeResult  # what rows are
        self.rules_of: Callable[[Found], Rules] = lambda found: found.rules("")
        self.token: int | None = None
        self.reading = False
        self.leases_lost = 0
        self.outbox = Outbox(length)
        self._guard = new_lock("SharedFrontier")
        self._serial = 0  # of the last batch that was answered
        self._held: dict[str, _Held] = {}
        self._keys: dict[Request, tuple[str, int, _Held]] = {}
        self._rows: dict[Request, ScrapeResult] = {}
        self._asked: dict[str, float] = {}  # origins whose robots.txt another host has, and until when to wait for it
        self._changed: set[str] = set()  # hosts that were paused, or have another delay
        self._paused = False
        self._scope_after = 0
        self._carried: dict[str, tuple[tuple[Cookie, ...], tuple[str, ...]]] = {}
        """Cookies and trails of requests that wait in the tables: their hosts come back to us, in most cases."""
        self._share: float = math.inf  # hosts to hold at most, while others have too little to do; 0: all go
        self._starved = self._all_leave = False
        self._others_read = True  # somebody reads a list: with ``knows_first`` nothing is fetched until it is known
        self.lease(-math.inf)

    # What the crawl tells

    def add_list(self, texts: Iterable[str]) -> None:
        """Lines of a list."""
        with self._guard:
            self.outbox.add_list(texts)

    def add_links(
        self,
        targets: Iterable[str],
        depth: int,
        now: float,
        *,
        private: bool = False,
        kind: Kind = "page",
        hops: int = 0,
        listed: bool = False,
    ) -> int:
        """Those that were not told yet go into the next batch. Returns how many."""
        with self._guard:
            if listed:
                targets = list(targets)
                self.outbox.batch.scope += targets
            return self.outbox.add_links(targets, depth, private, kind, hops)

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
            self.outbox.batch.robots.append(found)
            self._changed.add(host_of(found.origin))

    def pause(self, host_name: str, until: float, now: float) -> None:
        """Also told to the database, for whoever has the host next."""
        super().pause(host_name, until, now)
        with self._guard:
            self._changed.add(host_name)
            self._paused = True

    def finish(self, request: Request, now: float) -> None:
        """Also told to the database, with its row."""
        super().finish(request, now)
        with self._guard:
            row, known = self._rows.pop(request, None), self._keys.pop(request, None)
            if known is None:
                return  # for robots.txt, or its lease is lost
            host, id_, held = known
            held.local -= 1
            held.careful -= held.careful > 0
            if row is None or not (row.error or "").startswith("interrupted"):
                self.outbox.batch.done.append(Done(host, id_, request.url, row))

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        """It waits here while its host is held; a redirect, or a host that leaves, goes through the database."""
        with self._guard:
            known = self._keys.get(request)
            held = known[2] if known else self._held.get(request.host)
            again = target in request.trail  # with a cookie
            moves = target is not None and ((known is not None and not again) or host_name not in (None, request.host))
            ours = known is not None or request.kind == "robots"
            if held is not None and not held.leaving and ours and not moves:
                super().put_back(request, now, not_before, target, host_name)
                return
            self.pass_on(request, now)
            if held is None or (known is None and (not moves or request.kind != "robots")):
                return  # its lease was lost, or its host is leaving
            out = self.outbox.batch
            if known is None:  # our own request for robots.txt, to a host that may be another's
                assert target is not None and host_name is not None
                self._asked[origin_of(request.url)] = now + DELEGATED
                out.delegated.append(_queued(request, host_name, 0, target, None))
                return
            del self._keys[request]
            held.local -= 1
            host, id_, _ = known
            if request.cookies:
                self._carried[request.url] = request.cookies, request.trail
                if len(self._carried) > CARRIED:
                    del self._carried[next(iter(self._carried))]
            if target is None or host_name is None:
                out.again.append(_queued(request, host, id_, request.target, max(0.0, not_before - now)))
                return
            checked = self.follows and request.kind == "page"
            if checked and not request.depth:
                out.scope.append(target)
            seen = build_row(request, FetchError("duplicate", f"redirects to {target}"), self.form) if checked else None
            out.moves.append(Move(host, id_, _queued(request, host_name, 0, target, None), seen))

    # What is told to the database, and what comes back

    def urgent(self) -> bool:
        """The next batch should not be kept waiting."""
        with self._guard:
            out = self.outbox.batch
            return bool(
                self.outbox.halved
                or self.outbox.backlog() >= AT_ONCE
                or self._paused
                or (not self._keys and (out.done or out.moves))
                or any(held.careful and not held.local and not held.leaving for held in self._held.values())
            )

    def backlog(self) -> int:
        """How much waits to be told, in finished URLs."""
        with self._guard:
            return self.outbox.backlog()

    def leave(self) -> None:
        """Give all hosts back with the next batches."""
        with self._guard:
            self._all_leave = True

    def holds_nothing(self) -> bool:
        """Whether no host is held, and all is told."""
        with self._guard:
            return not self._held and self.outbox.is_empty()

    def plan(self, now: float) -> SyncBatch:
        """The next batch: what is new, and what is asked for."""
        free = max(0, self.most - self.stats().hosts_ready)
        with self._guard:
            reading = self.reading  # before its lines are taken
            batch = self.outbox.take()
            batch.token, batch.serial = self.token, self._serial + 1
            batch.spacing, batch.limit = self._spacing(""), self._portion("")  # of hosts of which nothing is known
            self._choose_leaving()
            for name, held in list(self._held.items()):
                self._review(name, held, batch, now)
            for name in self._changed - self._held.keys():
                if (wait := self.load(name, now)[1]) > 0:  # its lease was lost meanwhile: its next owner is to know
                    batch.notes.setdefault(name, Note(wait, None, False))
            self._changed.clear()
            self._paused = False
            batch.held = list(self._held)
            batch.claim = self._wanted(free)
            batch.hungry = self._starved and batch.claim > 0
            batch.asked, batch.rejoins = list(self._asked), self.leases_lost > 0
            batch.reading, batch.scope_after = reading, self._scope_after
            self.outbox.fit(batch)
            return batch

    def _wanted(self, free: int) -> int:
        """How many hosts more."""
        if self._all_leave or self.token is None or (self.knows_first and self._others_read):
            return 0
        if any(held.alone for held in self._held.values()):
            return 0
        if not self._share:
            return int(not self._held)
        return int(min(free, max(0, min(self._share, self.most) - sum(not one.leaving for one in self._held.values()))))

    def _review(self, name: str, held: _Held, batch: SyncBatch, now: float) -> None:
        """What to tell of a host, and to ask."""
        in_flight, wait = self.load(name, now)
        held.leaving |= held.alone and not in_flight and wait > 1.0
        if held.leaving:
            self._clear(name, held, batch, now)
        delegating = any(host_of(key) == name for key in self._asked) if self._asked else False
        portion = 1 if held.careful else self._portion(name)
        if held.local or in_flight or (delegating and not held.leaving):
            if not held.leaving and not held.alone and held.local <= portion // 2:
                batch.refill.append((name, held.last, portion))
            if name in self._changed:
                batch.notes[name] = Note(wait, self._spacing(name), False)
        elif held.leaving or held.drained or held.alone:
            batch.notes[name] = Note(wait, self._spacing(name), True)
            self.evict(name, now)
            del self._held[name]
        else:
            batch.refill.append((name, held.last, portion))

    def refused(self, batch: SyncBatch) -> bool:
        """``batch`` took too long, and was not applied: halve it. False if that cannot be."""
        with self._guard:
            return self.outbox.refused(batch)

    def answered(self, batch: SyncBatch, answer: SyncAnswer, asked_at: float, now: float) -> None:
        """``asked_at``: before the batch was sent."""
        with self._guard:
            if answer.token is None:
                self._lose(batch, now)
                return
            self.token, self._serial = answer.token, 0 if batch.token is None else batch.serial
            self.outbox.was_told(batch, now)
            self.lease(asked_at + self.length * (1 - self.margin))
            claimed = {name for name, _ in answer.hosts if name not in self._held}
            for name, wait in answer.hosts:
                if name in claimed:
                    self._held[name] = _Held(answer.careful.get(name, 0), answer.alone)
                    if wait is not None:
                        super().pause(name, now + wait, now)
            self._learn_robots(answer, now)
            for name in (*claimed, *(name for name, _, _ in batch.refill)):
                if name in self._held:
                    self._held[name].drained = True
            for queued in answer.urls:
                self._take_in(queued, now)
            for serial, url in answer.scope:
                self._scope_after = max(self._scope_after, serial)
                self.on_scope(url)
            self._others_read = answer.reading
            self._starved = batch.claim > 0 and not claimed
            fair = math.ceil(answer.all_held / max(1, answer.workers)) if answer.hungry else math.inf
            self._share = 0 if answer.try_alone else fair
            if answer.finished and not batch.links and not self.outbox.batch.links and not self.reading:
                self.close()

    def _learn_robots(self, answer: SyncAnswer, now: float) -> None:
        for found in answer.robots:
            self._asked.pop(found.origin, None)
            rules = answer.rules.get(found.origin) or self.rules_of(found)
            self.robots_known(found.origin, None if rules is DISALLOW_ALL else rules, now, ttl=found.ttl)
        for name in [name for name, until in self._asked.items() if until < now]:
            del self._asked[name]
            self.robots_known(name, None, now, ttl=60.0)

    def _take_in(self, queued: Queued, now: float) -> None:
        held = self._held.get(queued.host)
        if held is None or held.leaving:
            return
        if queued.kind == "robots":  # they overtake the others
            if queued.id in held.robots:
                return
            held.robots.add(queued.id)
        elif queued.id <= held.last:
            return
        else:
            held.last = queued.id
        held.drained = False
        request = _request(queued, now)
        request.cookies, request.trail = self._carried.pop(queued.url, ((), ()))
        self._keys[request] = queued.host, queued.id, held
        held.local += 1
        self.adopt(request, now, -math.inf if queued.wait is None else now + queued.wait)

    def _portion(self, name: str) -> int:
        """URLs of a host that are worth having here: for two leases."""
        return int(max(4, min(PORTION, 2 * self.length * min(100.0, self.rate(name)))))

    def _spacing(self, name: str) -> float:
        rate = self.rate(name)
        return 0.0 if rate == math.inf else 1 / rate

    def _choose_leaving(self) -> None:
        stay = [held for held in self._held.values() if not held.leaving]
        most = 0 if self._all_leave else min(self._share, len(stay))
        for held in stay[int(most) :]:
            held.leaving = self._all_leave or not held.alone

    def _clear(self, name: str, held: _Held, batch: SyncBatch, now: float) -> None:
        """What waits on a host that leaves is left to others."""
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
        self.outbox.tell_again(batch)
        for name in self._held:
            _, wait = self.load(name, now)
            if wait > 0:
                self.outbox.batch.notes[name] = Note(wait, self._spacing(name), False)
            self.evict(name, now)
        self._held.clear()
        self._keys.clear()
        self._asked.clear()
        self.token, self._serial, self._share, self._scope_after = None, 0, math.inf, 0


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
    if queued.deaths >= ALONE:
        request.error = FetchError("internal", f"{queued.deaths} workers died with it")
    elif not queued.host:
        try:
            normalise(queued.url)
            request.error = FetchError("invalid_url", "host name too long")
        except FetchError as error:
            request.error = error
    return request
