"""Which URL goes next, and when: the politeness and the fairness of a crawl, as a pure state machine.

Nothing here waits, reads a clock or does I/O: time is an argument, so that the same code runs under threads, under
asyncio and under the simulated clock of the tests and of ``simulator/crawls.py``.

Promised
- A URL is handed out to one worker at a time, however many ask, and once, but for what is put back.
- Over all workers, a host is sent at most ``burst + rate * t`` requests in any window of ``t`` seconds, retries and
  redirects included; none while it is paused. No more than ``per_host`` are in flight at a time. Where the rate
  changes (Crawl-delay, ``adaptive``) the bound holds with what each rate allowed in its time.
- A slow, failing or limited host holds up no other: hosts wait in one heap, ordered by when each may go next.
- Where more hosts are due than there are workers, the one whose URLs will take longest goes first: so the crawl ends
  when the busiest host ends, or when all workers were busy throughout. No host starves: every ``FAIR``-th hand-out is
  that of the host that has been due for longest, so one that is due behind n others waits for FAIR * (n + 1) at most.
- With ``robots`` nothing is asked of an origin before its robots.txt is known, which is asked for once within
  ``robots_ttl`` unless its rules had to be freed; what it forbids is never handed out to be sent. However a request
  for robots.txt ends, the host goes on: if nobody said what the rules are, it was unreachable.
- All rules together take ``rules_bytes`` at most: those that were asked longest ago are freed first, and large ones
  when their host has nothing left to do.

``Frontier._lock`` guards all of it; each bucket and the visited set have locks of their own below it. Rules are asked
under it only where that is quick. Else the question is handed out like a request (``step``): one for each host, which
waits for the answer while the others go on.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from coordination import Visited, new_lock
from crawl.addresses import names_private
from crawl.errors import FetchError, Postponed
from crawl.hosts import (
    EARLY,
    FrontierStats,
    Kind,
    Outcome,
    Pace,
    Question,
    RobotRules,
    _Host,
    _Origin,
    _Run,
    _Site,
    host_of,
)
from crawl.model import Request
from crawl.rules import normalise, origin
from primitives import NANOSECOND, TokenBucket

FAIR = 8
"""Every so many hand-outs one goes by age instead of by the work that is left."""
ROBOTS_AGAIN = 300.0
"""Seconds until a robots.txt that could not be read is asked for again; all is forbidden meanwhile."""
SIFTED = 16
"""Forbidden URLs that one step takes out of a host's queue."""
RULES_BYTES = 48 << 20
"""Bytes that the rules of all origins may take."""
KEPT_BYTES = 64 << 10
"""Rules of so many bytes are kept while their host has nothing to do: it may come back, and is not asked again."""


def _why_not(rules: RobotRules | None, allowed: bool | None) -> str | None:
    """Why a URL may not be fetched, by what its origin's rules say of it; None: it may."""
    if rules is None:
        return "robots.txt could not be read"
    return None if allowed else "robots.txt is too costly to match" if allowed is None else "forbidden by robots.txt"


class Frontier:
    """Which URL goes next, and when: the politeness and the fairness of a crawl, as a pure state machine.

    ``step(now)`` answers a Request to send, a Question to ``consult`` outside of locks and event loops, the seconds to
    wait (``inf``: until something changes), or None: nothing will ever come. Each host has its FIFO of waiting URLs,
    its token bucket, and at most one live entry in a heap ordered by the earliest time at which it may go (an entry
    that turns out to be early is put back: cheaper than finding and changing it); when that has come it moves to the
    ready, ordered by the work that is left, and by age. A step costs O(log hosts).

    Between leaving the frontier and being sent a request may have to connect, for a time that nobody knows. So there
    are two buckets of the same rate: the *schedule* is charged by ``take`` and spaces the requests as they leave; the
    *gate* is charged by ``clear_to_send`` at the moment of sending, and it alone is the promise. Where connections
    are quick the gate finds nothing to do. ``lead`` (seconds) is how much earlier than it may be sent a request is
    handed out, so that the driver is ready when the moment comes. Where workers are scarce, a host that will not be
    done before all else is has its requests handed out up to ``EARLY`` seconds earlier.

    ``max_pages`` and ``host_pages`` (0: no cap) count what is taken in of kind "page"; what robots.txt then forbids
    gives its place back. ``private`` says which hosts of the list may be at private addresses.
    """

    def __init__(
        self,
        *,
        rate: float = 2.0,
        burst: int = 1,
        per_host: int = 8,
        total_rate: float = 0.0,
        lead: float = 0.0,
        robots: bool = False,
        robots_ttl: float = 86400.0,
        host_pages: int = 0,
        max_pages: int = 0,
        adaptive: bool = False,
        rules_bytes: int = RULES_BYTES,
        private: Callable[[str], bool] = names_private,
    ) -> None:
        self._rate, self._burst, self._per_host, self._lead = rate, burst, per_host, lead
        self._robots, self._robots_ttl, self._adaptive, self._private = robots, robots_ttl, adaptive, private
        self._host_pages, self._max_pages = host_pages or math.inf, max_pages or math.inf
        self._total_schedule = TokenBucket(total_rate) if total_rate else None
        self._total_gate = TokenBucket(total_rate) if total_rate else None
        self._lock = new_lock("Frontier")
        self._hosts: dict[str, _Host] = {}
        self._sites: dict[str, _Site] = {}
        self._origins: dict[str, _Origin] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Bytes of the rules of each origin that has any; those asked last come last."""
        self._size, self._most = 0, rules_bytes
        self._heap: list[tuple[float, int, _Host]] = []
        self._ready: list[tuple[float, int, _Host]] = []
        """By the work that is left; some of another time."""
        self._oldest: deque[tuple[int, _Host]] = deque()
        """The same hosts by age; some of another time."""
        self._ready_hosts = self._picked = 0
        self._gap, self._handed_at = 0.0, -math.inf
        """Mean seconds from one hand-out to the next while hosts wait for workers; 0: they do not."""
        self._serial = 0
        self._visited: Visited[str] = Visited()
        self._refused: deque[Request] = deque()
        self._sifting: deque[_Host] = deque()
        self._questions: deque[Question] = deque()
        self._waiting = self._in_flight = self._pages = self._capped = self._forbidden = self._blocked = 0
        self._closed = self._stopped = self._grows = False
        self._until = self._lease_end = math.inf

    def add_all(self, texts: Iterable[str], now: float, *, kind: Kind = "page") -> int:
        """Add URLs as they stand in a list; each distinct one once. Returns how many were new."""
        known: list[tuple[str, str, str, _Run]] = []
        refused: list[Request] = []
        open_run, private_run = _Run(0, False, kind, listed=True), _Run(0, True, kind, listed=True)
        for text in texts:
            try:
                target, host_name = normalise(text)
            except FetchError as error:
                refused.append(Request(text, text, "", kind=kind, error=error))
            else:
                known.append((text, target, host_name, private_run if self._private(host_name) else open_run))
        with self._lock:
            before = len(self._visited)
            for text, target, host_name, run in known:
                self._add(text, target, host_name, run, now)
            for request in refused:
                if self._visited.add(request.url):
                    self._refused.append(request)
                    self._waiting += 1
            return len(self._visited) - before

    def add_links(
        self, targets: Iterable[str], depth: int, now: float, *, private: bool = False, kind: Kind = "page"
    ) -> int:
        """Add normalised URLs that were found at ``depth``; each once. Returns how many were new.

        Also after ``close``, while the request that found them is still in flight; ``ValueError`` when all is over.
        """
        found = [(target, host_of(target)) for target in targets]
        run = _Run(depth, private, kind)
        with self._lock:
            if self._closed and not self._waiting and not self._in_flight:
                raise ValueError("links were added after the end of the crawl")
            self._grows = True
            return sum(self._add(target, target, host_name, run, now) for target, host_name in found)

    def mark(self, target: str, *, counts: bool = False) -> bool:
        """Take ``target`` for visited without fetching it; True if it was new. ``counts``: as a page under the caps."""
        with self._lock:
            new = self._visited.add(target)
            if new and counts:
                self._count_page(host_of(target), 1)
            return new

    @property
    def waiting(self) -> int:
        return self._waiting

    def close(self) -> None:
        """No more URLs will be added from outside."""
        with self._lock:
            self._closed = True

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._lock:
            self._stopped = True

    def stop_at(self, until: float) -> None:
        """Hand out nothing from then on."""
        with self._lock:
            self._until = until

    def take(self, now: float) -> Request | float | None:
        """``step``, for those who may answer its questions themselves."""
        while isinstance(decision := self.step(now), Question):
            self.answer(decision, decision.rules.allows(decision.target), now)
        return decision

    def step(self, now: float) -> Request | Question | float | None:
        with self._lock:
            if self._stopped or now >= self._until:
                return None
            if now >= self._lease_end:
                return self._until - now
            decision = self._take(now)
            return min(decision, self._until - now) if isinstance(decision, float) else decision

    def consult(self, question: Question, clock: Callable[[], float]) -> None:
        """Ask the rules, and let the host go on. Takes some milliseconds of computing, and no lock for them."""
        allowed = None
        try:
            allowed = None if self._stopped else question.rules.allows(question.target)
        finally:
            self.answer(question, allowed, clock())

    def answer(self, question: Question, allowed: bool | None, now: float) -> None:
        """What the rules say. It counts if they still hold, and the host would still be asked for this next."""
        with self._lock:
            host = self._hosts.get(question.host)
            if host is None or host.question is not question:
                return
            host.question = None
            known = self._origins.get(origin(question.target))
            if known and known.rules is question.rules and known.until > now:
                ripe = now + self._lead + NANOSECOND
                found = self._next_target(host, ripe)
                if allowed:
                    host.cleared = question.target
                elif found and found[0] is question.target:
                    self._refuse(host, known, allowed, ripe, now)
            self._schedule(host, now)

    def clear_to_send(self, request: Request, now: float) -> float:
        """0.0: send now, the tokens are taken. Else the seconds after which to ask again.

        Raises Postponed when that would be longer than a second, for instance because the host was paused meanwhile:
        the worker puts the request back instead of waiting for it.
        """
        with self._lock:
            if now >= self._lease_end:
                raise Postponed
            host = self._hosts[request.host]
            gates = [gate for gate in (host.gate, self._total_gate) if gate]
            wait = max(host.paused_until - now, *(gate.wait_for(1, now) for gate in gates), 0.0)
            if wait > 1.0:
                raise Postponed
            if wait > NANOSECOND:
                return wait
            for gate in gates:
                gate.reserve(1, now)
            return 0.0

    def pause(self, host_name: str, until: float, now: float) -> None:
        """Send nothing to this host before ``until`` (Retry-After)."""
        with self._lock:
            host = self._host(host_name)
            host.paused_until = max(host.paused_until, until)
            for bucket in (host.schedule, host.gate):
                if bucket:
                    bucket.pause(until)

    def robots_known(self, origin_: str, rules: RobotRules, now: float, *, ttl: float | None = None) -> None:
        """The rules of an origin (``crawl_rules.origin``), good for ``ttl`` seconds (None: ``robots_ttl``).

        Told before the request is finished. A delay lowers the rate of the host, to a burst of 1.
        """
        name = host_of(origin_)
        delay = rules.delay
        with self._lock:
            known = self._origins.setdefault(origin_, _Origin(name))
            self._free(origin_)
            known.rules, known.until = rules, now + (self._robots_ttl if ttl is None else ttl)
            site = self._site(name)
            if size := rules.size:
                self._keep(origin_, site, size)
            if delay is not None and 0 < delay < math.inf:
                site.delays = {**(site.delays or {}), origin_: delay}
            elif site.delays:
                site.delays.pop(origin_, None)
            if host := self._hosts.get(name):
                self._set_rate(host, now)
            self._answered(known, now)

    def report(self, request: Request, outcome: Outcome, seconds: float, now: float) -> None:
        """How a request went that took ``seconds``: before ``finish`` or ``put_back``. Only ``adaptive`` listens."""
        if not self._adaptive:
            return
        with self._lock:
            site = self._site(request.host)
            ceiling = self._ceiling(site)
            site.pace = site.pace or Pace(ceiling)
            before = site.pace.rate
            site.pace.report(outcome, seconds, now, ceiling)
            if site.pace.rate != before and (host := self._hosts.get(request.host)):
                self._set_rate(host, now)
                self._schedule(host, now)

    def rate(self, host_name: str) -> float:
        """Requests per second that this host gets now; inf: no limit."""
        with self._lock:
            return self._limits(self._sites.get(host_name))[0]

    def finish(self, request: Request, now: float) -> None:
        """The request is done with: its row is written."""
        with self._lock:
            if request.kind == "robots":
                self._no_rules(origin(request.url), now)
            self._leave(request, now)

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        """The request is not done: it goes (to ``target`` on ``host_name``, if given) no sooner than ``not_before``."""
        with self._lock:
            self._leave(request, now)
            request.target, request.host = target or request.target, host_name or request.host
            host = self._host(request.host)
            queue = host.urgent if request.kind == "robots" else host.delayed
            heapq.heappush(queue, (not_before, self._next_serial(), request))
            self._waiting += 1
            self._schedule(host, now)

    # Where hosts are leased (crawl_shared), they come and go with what waits on them.

    def adopt(self, request: Request, now: float, not_before: float = -math.inf) -> None:
        """Take in a request that somebody else knows too: whether its URL was seen is not asked here."""
        with self._lock:
            self._waiting += 1
            if request.error:
                self._refused.append(request)
                return
            host = self._host(request.host)
            queue = host.urgent if request.kind == "robots" else host.delayed
            heapq.heappush(queue, (not_before, self._next_serial(), request))
            self._schedule(host, now)

    def pass_on(self, request: Request, now: float) -> None:
        """The request goes on elsewhere. If it is for robots.txt, its host waits for ``robots_known``."""
        with self._lock:
            self._leave(request, now)

    def evict(self, name: str, now: float) -> list[tuple[float, Request]]:
        """Forget a host's rules and what waits there: (not before, request). What is in flight ends as usual."""
        with self._lock:
            self._sites.pop(name, None)
            for key in [key for key, known in self._origins.items() if known.host == name]:
                self._free(key)
                self._blocked -= self._origins.pop(key).asking
            host = self._hosts.get(name)
            if host is None:
                return []
            host.asking, host.cleared, host.question = False, None, None
            left = [(at, request) for at, _, request in (*host.urgent, *host.delayed)]
            host.urgent.clear()
            host.delayed.clear()
            self._waiting -= len(left)
            self._schedule(host, now)
            return left

    def load(self, name: str, now: float) -> tuple[int, float]:
        """(Requests in flight to a host, seconds until it may be sent another)."""
        with self._lock:
            host = self._hosts.get(name)
            if host is None:
                return 0, 0.0
            wait = host.gate.wait_for(1, now) if host.gate else 0.0
            return host.in_flight, max(wait, host.paused_until - now)

    def lease(self, end: float) -> None:
        """Hand out and send nothing from ``end`` on, unless told another end before or then."""
        with self._lock:
            self._lease_end = end

    def explain(self, url: str, now: float) -> str:
        """Whether ``url`` would be fetched and why (not), now or when: one line. Looks through its host's queue."""
        try:
            target, name = normalise(url)
        except FetchError as error:
            return f"no: {error.detail}"
        with self._lock:
            known = self._origins.get(origin(target)) if self._robots else None
            rules = known.rules if known and known.until > now else None
        allowed = rules.allows(target) if rules else None
        with self._lock:
            return self._explain(target, name, _why_not(rules, allowed), now)

    def stats(self) -> FrontierStats:
        with self._lock:
            return FrontierStats(
                self._waiting,
                self._in_flight,
                len(self._hosts),
                *self._visited.stats(),
                self._closed,
                self._ready_hosts,
                self._blocked,
                self._capped,
                self._forbidden,
            )

    def __repr__(self) -> str:
        s = self.stats()
        return f"<Frontier {s.waiting} waiting on {s.hosts} hosts, {s.in_flight} in flight>"

    # The rest runs under the lock.

    def _take(self, now: float) -> Request | Question | float | None:
        soon = now + self._lead
        while True:
            while self._sifting and not self._refused:
                host = self._sifting.popleft()
                host.sifting = False
                self._schedule(host, now)
            if self._refused:
                self._waiting -= 1
                self._in_flight += 1
                return self._refused.popleft()
            while self._questions:
                question = self._questions.popleft()
                if (asked := self._hosts.get(question.host)) and asked.question is question:
                    return question
            if not self._waiting:
                return None if self._closed and not self._in_flight else math.inf
            if self._total_schedule and self._total_gate:
                wait = max(self._total_schedule.wait_for(1, now), self._total_gate.wait_for(1, now)) - self._lead
                if wait > NANOSECOND:
                    return wait
            before = self._serial
            while self._heap and self._heap[0][0] <= soon + NANOSECOND:
                due, _, host = heapq.heappop(self._heap)
                if due != host.due or self._hosts.get(host.name) is not host:
                    continue  # superseded by an earlier entry, or forgotten
                host.due = math.inf
                due = self._due(host, now)
                if due > soon + self._early(host, now) + NANOSECOND:
                    self._push(host, due - self._early(host, now))
                    self._forget_idle(host, now)
                else:
                    self._make_ready(host)
            while self._ready_hosts:
                host, since = self._pick()
                early = self._early(host, now)
                if since <= before and (due := self._due(host, now)) > soon + early + NANOSECOND:
                    self._push(host, due - early)  # paused meanwhile, for instance
                    self._forget_idle(host, now)
                    continue
                return self._hand_out(host, now)
            if not self._refused and not self._sifting and not self._questions:
                return self._heap[0][0] - soon if self._heap else math.inf

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _add(self, text: str, target: str, host_name: str, run: _Run, now: float) -> bool:
        page = run.kind == "page"
        if page and self._is_capped(host_name):
            self._capped += target not in self._visited
            return False
        # A feed of the list is polled in each run, whatever an article of that address was in this or an earlier one.
        if not self._visited.add(target if run.kind != "feed" else f"feed {target}"):
            return False
        if page:
            self._count_page(host_name, 1)
        host = self._host(host_name)
        idle = host.head >= len(host.waiting)
        host.append(target if text == target else (text, target), run)
        self._waiting += 1
        if idle or host.due == math.inf:  # its entry may say when a retry is due, or when it can be forgotten
            self._schedule(host, now)
        elif host.due == -math.inf and not host.work() & (host.work() - 1):
            self._rank(host)  # its work has doubled since
        return True

    def _is_capped(self, host_name: str) -> bool:
        if self._pages >= self._max_pages:
            return True
        return self._host_pages < math.inf and self._site(host_name).pages >= self._host_pages

    def _count_page(self, host_name: str, n: int) -> None:
        self._pages += n
        if self._host_pages < math.inf:
            self._site(host_name).pages += n

    def _site(self, name: str) -> _Site:
        site = self._sites.get(name)
        if site is None:
            site = self._sites[name] = _Site()
        return site

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            rate, burst = self._limits(self._sites.get(name))
            schedule, gate = (TokenBucket(rate, burst) if rate < math.inf else None for _ in range(2))
            host = self._hosts[name] = _Host(name, schedule, gate)
        return host

    def _ceiling(self, site: _Site | None) -> float:
        ceiling = self._rate or math.inf
        if site and site.delays:
            ceiling = min(ceiling, 1 / max(site.delays.values()))
        return ceiling

    def _limits(self, site: _Site | None) -> tuple[float, int]:
        """(requests per second, burst) of a host."""
        rate = self._ceiling(site)
        if self._adaptive:
            rate = min(rate, ((site and site.pace) or Pace(rate)).rate)
        return rate, 1 if site and site.delays else self._burst

    def _set_rate(self, host: _Host, now: float) -> None:
        rate, burst = self._limits(self._sites.get(host.name))
        if rate == math.inf:
            host.schedule = host.gate = None
        elif host.schedule and host.gate:
            if (host.schedule.rate, host.schedule.burst) != (rate, burst):
                host.schedule.set_rate(rate, now, burst)
                host.gate.set_rate(rate, now, burst)
        else:  # without a limit until now: what was sent last is not known, so it begins with nothing
            host.schedule, host.gate = TokenBucket(rate, burst), TokenBucket(rate, burst)
            for bucket in (host.schedule, host.gate):
                bucket.reserve(burst, now)
                bucket.pause(host.paused_until)

    def _due(self, host: _Host, now: float) -> float:
        """When the host's next request may leave the frontier; inf if it has none, or enough in flight."""
        due = host.urgent[0][0] if host.urgent else math.inf
        if not host.asking:
            if self._robots and self._sift(host, now):
                return math.inf
            if host.head < len(host.waiting):
                due = now
            elif host.delayed:
                due = min(due, host.delayed[0][0])
        if due == math.inf or host.in_flight >= self._per_host:
            return math.inf
        if due < now:
            due = now
        if host.schedule and host.gate:
            due = max(due, now + host.schedule.wait_for(1, now), now + host.gate.wait_for(1, now))
        return max(due, host.paused_until)

    def _push(self, host: _Host, due: float) -> None:
        if due < host.due:
            host.due = due
            heapq.heappush(self._heap, (due, self._next_serial(), host))

    def _schedule(self, host: _Host, now: float) -> None:
        if host.due > -math.inf:
            self._push(host, self._due(host, now) - self._early(host, now))

    def _early(self, host: _Host, now: float) -> float:
        """How much before its time the host's next request is handed out: so that a worker is surely there when the
        host is due, if the crawl as a whole will take no longer than its URLs do."""
        if (
            not self._gap
            or not host.schedule
            or host.paused_until > now
            or host.urgent
            or host.head >= len(host.waiting)
        ):
            return 0.0  # neither a pause nor a retry's time is ever shortened
        if host.work() < 0.9 * host.schedule.rate * self._waiting * self._gap:
            return 0.0
        return min(EARLY, 3 * self._gap)

    def _make_ready(self, host: _Host) -> None:
        host.due = -math.inf
        host.since = self._next_serial()
        self._oldest.append((host.since, host))
        self._ready_hosts += 1
        self._rank(host)

    def _rank(self, host: _Host) -> None:
        """Enter a ready host by the seconds that its waiting URLs will take."""
        host.ready = self._next_serial()
        work = host.work()
        heapq.heappush(self._ready, (-work / host.schedule.rate if host.schedule else -work, host.ready, host))
        if len(self._ready) > 2 * self._ready_hosts + 64:
            self._ready = [entry for entry in self._ready if entry[2].ready == entry[1]]
            heapq.heapify(self._ready)
        if len(self._oldest) > 2 * self._ready_hosts + 64:
            self._oldest = deque(entry for entry in self._oldest if entry[1].since == entry[0])

    def _pick(self) -> tuple[_Host, int]:
        """The ready host with the longest work before it; at times the one that has been ready for longest. And the
        serial number of when it became ready."""
        while True:
            if (self._picked + 1) % FAIR:
                _, serial, host = heapq.heappop(self._ready)
                live = serial == host.ready
            else:
                serial, host = self._oldest.popleft()
                live = serial == host.since
            if live:
                since, host.ready, host.since, host.due = host.since, 0, 0, math.inf
                self._ready_hosts -= 1
                return host, since

    def _hand_out(self, host: _Host, now: float) -> Request:
        self._picked += 1
        if not self._ready_hosts:
            self._gap, self._handed_at = 0.0, -math.inf
        else:
            if self._handed_at > -math.inf:
                gap = now - self._handed_at
                self._gap = self._gap + (gap - self._gap) / 32 if self._gap else gap
            self._handed_at = now
        ripe = now + self._lead + NANOSECOND
        if host.urgent and host.urgent[0][0] <= ripe:
            request = heapq.heappop(host.urgent)[2]
            self._waiting -= 1
        elif asked := self._robots and self._ask(host, now):
            request = asked
        else:
            request = heapq.heappop(host.delayed)[2] if host.delayed_first(ripe) else host.pop_waiting(now)
            self._waiting -= 1
        self._in_flight += 1
        host.in_flight += 1
        for bucket in (host.schedule, self._total_schedule):
            if bucket:
                bucket.reserve(1, now)
        request.last_of_host = self._closed and not self._grows and not host.has_work()
        self._schedule(host, now)
        return request

    def _next_target(self, host: _Host, ripe: float) -> tuple[str, Kind, bool] | None:
        """(target, kind, private) of the request that the host would hand out."""
        if host.delayed_first(ripe):
            at, _, request = host.delayed[0]
            return (request.target, request.kind, request.private) if at <= ripe else None
        if host.head >= len(host.waiting):
            return None
        target = host.first()[1]
        return target, host.run.kind, host.run.private

    def _ask(self, host: _Host, now: float) -> Request | None:
        """The request for robots.txt, if the host's next URL needs it."""
        found = self._next_target(host, now + self._lead + NANOSECOND)
        if found is None:
            return None
        name = origin(found[0])
        known = self._origins.setdefault(name, _Origin(host.name))
        if known.until > now:
            return None
        known.asking = host.asking = True
        self._blocked += 1
        url = f"{name}/robots.txt"
        return Request(url, url, host.name, started=now, kind="robots", private=found[2])

    def _answered(self, known: _Origin, now: float) -> None:
        """Let go the host that waited for these rules."""
        host = self._hosts.get(known.host)
        if known.asking:
            known.asking = False
            self._blocked -= 1
            if host:
                host.asking = False
        if host:
            host.cleared = None
            self._schedule(host, now)

    def _no_rules(self, name: str, now: float) -> None:
        """The robots.txt of an origin, should it still be asked for, cannot be had."""
        if (known := self._origins.get(name)) and known.asking:
            self._free(name)
            known.rules, known.until = None, now + ROBOTS_AGAIN
            self._answered(known, now)

    def _sift(self, host: _Host, now: float) -> bool:
        """Move what is forbidden from the head of the host's queues to what is handed out as refused. True if that is
        not done yet: it is gone on with at the next step, or when a question is answered."""
        if host.question:
            return True
        ripe = now + self._lead + NANOSECOND
        for _ in range(SIFTED):
            found = self._next_target(host, ripe)
            if found is None:
                return False
            target, kind, _ = found
            name = origin(target)
            known = self._origins.get(name)
            if known is None or known.until <= now:
                return False  # to be asked for first
            if target is host.cleared:
                return False
            allowed: bool | None = False
            if known.rules:
                if name in self._sizes:
                    self._sizes.move_to_end(name)
                if kind != "sitemap" and not known.rules.is_quick(target):
                    host.question = Question(host.name, target, known.rules)
                    self._questions.append(host.question)
                    return True
                allowed = kind == "sitemap" or known.rules.allows(target)
            if allowed:
                host.cleared = target
                return False
            self._refuse(host, known, allowed, ripe, now)
        if not host.sifting:
            host.sifting = True
            self._sifting.append(host)
        return True

    def _refuse(self, host: _Host, known: _Origin, allowed: bool | None, ripe: float, now: float) -> None:
        """What the host would be asked for next is not allowed."""
        if host.delayed_first(ripe):
            request = heapq.heappop(host.delayed)[2]
        else:
            request = host.pop_waiting(now)
            if request.kind == "page":
                self._count_page(host.name, -1)
        request.error = FetchError("robots", _why_not(known.rules, allowed) or "")
        self._refused.append(request)
        self._forbidden += 1

    def _keep(self, name: str, site: _Site, size: int) -> None:
        """Of these rules, just read; and not of others if there is no room."""
        self._sizes[name] = size
        self._size += size
        if size > KEPT_BYTES:
            site.origins += (name,)
        while self._size > self._most and len(self._sizes) > 1:
            self._free(next(iter(self._sizes)))

    def _free(self, name: str) -> None:
        """Forget the rules of an origin: its robots.txt is asked for again before anything else is."""
        size = self._sizes.pop(name, 0)
        if not size:
            return
        self._size -= size
        known = self._origins[name]
        known.rules, known.until = None, -math.inf
        if (site := self._sites.get(known.host)) and name in site.origins:
            site.origins = tuple(one for one in site.origins if one != name)

    def _leave(self, request: Request, now: float) -> None:
        self._in_flight -= 1
        if request.error:
            if host := self._hosts.get(request.host):
                self._forget_idle(host, now)
            return
        host = self._hosts[request.host]
        host.in_flight -= 1
        if host.has_work():
            self._schedule(host, now)
        else:
            self._forget_idle(host, now)

    def _forget_idle(self, host: _Host, now: float) -> None:
        """Drop a host with nothing to do once its bucket is full again: the memory follows the hosts at work."""
        if host.in_flight or host.asking or host.due == -math.inf or host.has_work():
            return
        free_at = host.paused_until
        for bucket in (host.schedule, host.gate):
            if bucket:
                free_at = max(free_at, now + bucket.wait_for(bucket.burst, now))
        if free_at <= now:
            self._hosts.pop(host.name, None)
            if site := self._sites.get(host.name):
                for name in site.origins:
                    self._free(name)
        else:
            # Entries are looked at ``lead`` early; a millisecond more, so that it is surely over when this one is.
            self._push(host, free_at + self._lead + 0.001)

    def _explain(self, target: str, name: str, why_not: str | None, now: float) -> str:
        host, site = self._hosts.get(name), self._sites.get(name)
        if self._stopped:
            return "no: the crawl was stopped"
        ahead = self._ahead(host, target) if host and target in self._visited else None
        if target in self._visited and ahead is None:
            return "no: requested already, or on its way"
        known = self._origins.get(origin(target))
        if self._robots and known and known.until > now and why_not:
            return f"no: {why_not}"
        if ahead is None and self._is_capped(name):
            return "no: " + ("max_pages" if self._pages >= self._max_pages else "its host's pages") + " reached"
        seen = "" if ahead is not None else "; not found yet"
        rate, _ = self._limits(site)
        first, not_before = ahead or (0, now)
        wait, reasons = max(0.0, not_before - now), []
        if self._robots and (known is None or known.until <= now):
            reasons.append(f"{origin(target)}/robots.txt is {'being read' if known and known.asking else 'read first'}")
        if wait > NANOSECOND:
            reasons.append("it is to be tried again")
        if first:
            reasons.append(f"{first} of its host go first")
        if host:
            turn = max((bucket.wait_for(1, now) for bucket in (host.schedule, host.gate) if bucket), default=0.0)
            wait = max(wait, turn + first / rate, host.paused_until - now)
            if host.paused_until > now:
                reasons.append("its host asked for a pause")
            elif turn or (first and rate < math.inf):
                reasons.append(f"its host gets {rate:.3g}/s")
            if host.in_flight >= self._per_host:
                reasons.append(f"{host.in_flight} of its host are in flight")
        when = f"in {wait:.3g} s" if wait > NANOSECOND else "later" if reasons else "now"
        return (f"{when}: {', '.join(reasons)}" if reasons else when) + seen

    def _ahead(self, host: _Host, target: str) -> tuple[int, float] | None:
        """(How many of the host go first, not before) of a URL that waits, or None."""
        for at, _, request in host.delayed:
            if request.target == target:
                return 0, at
        ahead = 0
        for entry in host.waiting[host.head :]:
            if isinstance(entry, _Run):
                continue
            if (entry if isinstance(entry, str) else entry[1]) == target:
                return ahead, 0.0
            ahead += 1
        return None
