"""The frontier of a crawl: what waits, what is under way, and what goes next, as a pure state machine.

Nothing here waits, reads a clock or does I/O: time is an argument, so that the same code runs under threads, under
asyncio and under the simulated clock of the tests and of ``simulator``.

Promised
- A URL is handed out to one worker at a time, however many ask, and once, but for what is put back.
- Over all workers, a host is sent at most ``burst + rate * t`` requests in any window of ``t`` seconds, retries and
  redirects included; none while it is paused. No more than ``per_host`` are in flight at a time. Where the rate
  changes (Crawl-delay, ``adaptive``) the bound holds with what each rate allowed in its time.
- What crawl/scheduler.py promises of which host goes next, and crawl/robots_gate.py of what robots.txt forbids.

``Frontier`` is put together of parts that have one job each: what is taken in (``Intake``), the queue of each host
(crawl/hosts.py), how fast it may go and how many pages it has (crawl/limits.py), which goes next (``Scheduler``), and
what may not (``RobotsGate``).
``Frontier._lock`` guards all of them; each bucket and the visited set have locks of their own below it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable

from coordination import new_lock
from crawl.addresses import names_private
from crawl.errors import FetchError, Postponed
from crawl.hosts import FrontierStats, HostQueue, Kind, Question, UrlRun
from crawl.intake import Intake, parse_list
from crawl.limits import AddressSlots, HostLimits, Outcome, SendGate
from crawl.model import Request
from crawl.robots import Rules
from crawl.robots_gate import ROBOTS_AGAIN, RULES_BYTES, RobotsGate, why_forbidden
from crawl.scheduler import Scheduler
from crawl.urls import host_of, normalise, origin
from primitives import NANOSECOND


def say_when(
    host: HostQueue | None, ahead: tuple[int, float], rate: float, per_host: int, robots: str, now: float
) -> str:
    """When a URL goes that has so many of its host ahead, no sooner than such a time, and why not now. ``robots``: what
    has to be read before, if anything has."""
    first, not_before = ahead
    wait, reasons = max(0.0, not_before - now), [robots] if robots else []
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
        if host.in_flight >= per_host:
            reasons.append(f"{host.in_flight} of its host are in flight")
    when = f"in {wait:.3g} s" if wait > NANOSECOND else "later" if reasons else "now"
    return f"{when}: {', '.join(reasons)}" if reasons else when


class Frontier:
    """``step(now)`` answers a Request to send, a Question to ``consult`` outside of locks and event loops, the seconds
    to wait (``inf``: until something changes), or None: nothing will ever come.

    Between leaving the frontier and being sent a request may have to connect, for a time that nobody knows. So there
    are two buckets of the same rate: the *schedule* is charged by ``step`` and spaces the requests as they leave; the
    *gate* is charged by ``clear_to_send`` at the moment of sending, and it alone is the promise. Where connections
    are quick the gate finds nothing to do. ``lead`` (seconds) is how much earlier than it may be sent a request is
    handed out, so that the driver is ready when the moment comes.

    ``per_address`` (0: no limit): how many requests may be under way to one IP address, whatever its hosts.
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
        per_address: int = 0,
        rules_bytes: int = RULES_BYTES,
        private: Callable[[str], bool] = names_private,
    ) -> None:
        self._per_host, self._lead, self._robots_ttl, self._private = per_host, lead, robots_ttl, private
        self._gate = SendGate(total_rate)
        self._lock = new_lock("Frontier")
        self._hosts: dict[str, HostQueue] = {}
        self._refused: deque[Request] = deque()
        self._limits = HostLimits(rate=rate, burst=burst, adaptive=adaptive, host_pages=host_pages, max_pages=max_pages)
        self._limits.addresses = AddressSlots(per_address)
        self._robots = RobotsGate(
            self._hosts, self._limits, self._refused, enabled=robots, rules_bytes=rules_bytes, lead=lead
        )
        self._scheduler = Scheduler(self._hosts, self._limits, self._robots, per_host=per_host, lead=lead)
        self._intake = Intake(self._limits, self._scheduler)
        self._in_flight = 0
        self._closed = self._stopped = self._grows = False
        self._until = math.inf

    # What is found

    def add_all(self, texts: Iterable[str], now: float, *, kind: Kind = "page") -> int:
        """Add URLs as they stand in a list; each distinct one once. Returns how many were new."""
        known, refused = parse_list(texts, kind, self._private)
        with self._lock:
            new = sum(self._intake.add(*line, now) for line in known)
            for request in refused:
                if self._intake.visited.add(request.url):
                    self._refuse(request)
                    new += 1
            return new

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
        """Add normalised URLs that were found at ``depth``, ``hops`` redirects away from where a link, or the list if
        ``listed``, led to; each once. Returns how many were new.

        Also after ``close``, while the request that found them is still in flight; ``ValueError`` when all is over.
        """
        found = [(target, host_of(target)) for target in targets]
        run = UrlRun(depth, private, kind, listed, hops)
        with self._lock:
            if self._closed and not self._scheduler.waiting and not self._in_flight:
                raise ValueError("links were added after the end of the crawl")
            self._grows = True
            return sum(self._intake.add(target, target, host_name, run, now) for target, host_name in found)

    def mark(self, target: str, *, counts: bool = False) -> bool:
        """Take ``target`` for visited without fetching it; True if it was new. ``counts``: as a page under the caps."""
        with self._lock:
            return self._intake.mark(target, counts)

    def close(self) -> None:
        """No more URLs will be added from outside."""
        with self._lock:
            self._closed = True

    # What goes next

    def step(self, now: float) -> Request | Question | float | None:
        """Next: send a request, answer a question, or wait so many seconds (inf: for news); None: it is over."""
        with self._lock:
            if self._stopped or now >= self._until:
                return None
            if now >= self._gate.lease_end:
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
            if host := self._robots.answer(question, allowed, now):
                self._scheduler.schedule(host, now)

    def is_unmetered(self, request: Request, now: float) -> bool:
        """Whether the request may be sent now, and needs no token for it."""
        with self._lock:
            return self._gate.is_open(self._hosts[request.host], now)

    def clear_to_send(self, request: Request, now: float, ahead: float = 0.0) -> float:
        """0.0, or at most ``ahead``: send in so many seconds, the tokens are taken. Else when to ask again.

        Raises Postponed when that would be longer than a second, for instance because the host was paused meanwhile:
        the worker puts the request back instead of waiting for it.
        """
        with self._lock:
            return self._gate.clear(self._hosts[request.host], now, ahead)

    def connects(self, request: Request, address: str) -> None:
        """The request is about to be connected to an IP address. Raises Postponed if that has connections enough."""
        if self._limits.addresses.most == math.inf:
            return
        with self._lock:
            if not self._limits.addresses.learn(request, address):
                raise Postponed

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._lock:
            self._stopped = True

    def stop_at(self, until: float) -> None:
        """Hand out nothing from then on."""
        with self._lock:
            self._until = until

    # What became of it

    def pause(self, host_name: str, until: float, now: float) -> None:
        """Send nothing to this host before ``until`` (Retry-After)."""
        with self._lock:
            self._scheduler.host(host_name).pause(until)

    def robots_known(self, origin_: str, rules: Rules | None, now: float, *, ttl: float | None = None) -> None:
        """The rules of an origin (``crawl.urls.origin``), good for ``ttl`` seconds (None: ``robots_ttl``).

        Told before the request is finished. A delay lowers the rate of the host, to a burst of 1. ``rules`` None: they
        could not be read, which is believed for ``ROBOTS_AGAIN``.
        """
        usual = self._robots_ttl if rules else ROBOTS_AGAIN
        with self._lock:
            if host := self._robots.learn(origin_, rules, now, usual if ttl is None else ttl):
                self._scheduler.schedule(host, now)

    def report(self, request: Request, outcome: Outcome, seconds: float, now: float) -> None:
        """How a request went that took ``seconds``: before ``finish`` or ``put_back``. Only ``adaptive`` listens."""
        if not self._limits.adaptive:
            return
        with self._lock:
            changed = self._limits.report(request.host, outcome, seconds, now)
            if changed and (host := self._hosts.get(request.host)):
                self._limits.apply(host, now)
                self._scheduler.schedule(host, now)

    def finish(self, request: Request, now: float) -> None:
        """The request is done with: its row is written."""
        with self._lock:
            if request.kind == "robots" and (host := self._robots.give_up(origin(request.url), now)):
                self._scheduler.schedule(host, now)
            self._leave(request, now)

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        """The request is not done: it goes (to ``target`` on ``host_name``, if given) no sooner than ``not_before``."""
        with self._lock:
            self._leave(request, now)
            request.target, request.host = target or request.target, host_name or request.host
            self._scheduler.put_back(request, not_before, now)

    # What others hand over, and have again

    def adopt(self, request: Request, now: float, not_before: float = -math.inf) -> None:
        """Take in a request that somebody else knows too: whether its URL was seen is not asked here."""
        with self._lock:
            if request.error:
                self._refuse(request)
            else:
                self._scheduler.put_back(request, not_before, now)

    def pass_on(self, request: Request, now: float) -> None:
        """The request goes on elsewhere. If it is for robots.txt, its host waits for ``robots_known``."""
        with self._lock:
            self._leave(request, now)

    def evict(self, name: str, now: float) -> list[tuple[float, Request]]:
        """Forget a host's rules and what waits there: (not before, request). What is in flight ends as usual."""
        with self._lock:
            self._limits.forget(name)
            self._robots.forget(name)
            return self._scheduler.evict(name, now)

    def load(self, name: str, now: float) -> tuple[int, float]:
        """(Requests in flight to a host, seconds until it may be sent another)."""
        with self._lock:
            host = self._hosts.get(name)
            return (host.in_flight, host.turn_in(now)) if host else (0, 0.0)

    def lease(self, end: float) -> None:
        """Hand out and send nothing from ``end`` on, unless told another end before or then."""
        with self._lock:
            self._gate.lease_end = end

    # What it is doing

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._scheduler.waiting

    def rate(self, host_name: str) -> float:
        """Requests per second that this host gets now; inf: no limit."""
        with self._lock:
            return self._limits.of(host_name)[0]

    def explain(self, url: str, now: float) -> str:
        """Whether ``url`` would be fetched and why (not), now or when: one line. Looks through its host's queue."""
        return _explain(self, url, now)

    def stats(self) -> FrontierStats:
        """The counts of this moment."""
        with self._lock:
            queued = self._scheduler.waiting, self._in_flight, len(self._hosts), *self._intake.visited.stats()
            kept_back = self._robots.blocked, self._intake.capped, self._robots.forbidden
            return FrontierStats(*queued, self._closed, self._scheduler.ready_hosts, *kept_back)

    def __repr__(self) -> str:
        return f"<Frontier {self.waiting} waiting on {len(self._hosts)} hosts, {self._in_flight} in flight>"

    # Called under the lock

    def _take(self, now: float) -> Request | Question | float | None:
        robots, scheduler = self._robots, self._scheduler
        while True:
            while robots.sifting and not self._refused:
                host = robots.sifting.popleft()
                host.sifting = False
                scheduler.schedule(host, now)
            if self._refused:
                scheduler.waiting -= 1
                self._in_flight += 1
                return self._refused.popleft()
            if robots.questions and (question := robots.next_question()):
                return question
            if not scheduler.waiting:
                return None if self._closed and not self._in_flight else math.inf
            if (wait := self._gate.wait(now) - self._lead) > NANOSECOND:
                return wait
            if next_host := scheduler.next_host(now):
                return self._hand_out(next_host, now)
            if not self._refused and not robots.sifting and not robots.questions:
                return scheduler.wait(now)

    def _hand_out(self, host: HostQueue, now: float) -> Request:
        self._scheduler.handed_out(now)
        ripe = now + self._lead + NANOSECOND
        request = host.pop_urgent(ripe)
        if request is None and self._robots.enabled and (asked := self._robots.ask(host, now)):
            request = asked
        else:
            request = request or host.pop(ripe, now)
            self._scheduler.waiting -= 1
        self._in_flight += 1
        host.in_flight += 1
        self._gate.hand_out(host, now)
        self._limits.addresses.enter(request)
        last = self._closed and not self._grows and not host.has_work()
        request.last_of_host = last or self._limits.addresses.most < math.inf  # idle connections would count, too
        self._scheduler.schedule(host, now)
        return request

    def _refuse(self, request: Request) -> None:
        self._refused.append(request)
        self._scheduler.waiting += 1

    def _leave(self, request: Request, now: float) -> None:
        self._in_flight -= 1
        if request.error:
            if host := self._hosts.get(request.host):
                self._scheduler.forget_idle(host, now)
            return
        host = self._hosts[request.host]
        host.in_flight -= 1
        self._scheduler.vacated(request, now)
        if host.has_work():
            self._scheduler.schedule(host, now)
        else:
            self._scheduler.forget_idle(host, now)


def _explain(frontier: Frontier, url: str, now: float) -> str:
    try:
        target, name = normalise(url)
    except FetchError as error:
        return f"no: {error.detail}"
    with frontier._lock:
        rules, unread = frontier._robots.known(target, now)
    asked = frontier._robots.enabled and not unread  # not under the lock: rules may take their time
    forbidden = why_forbidden(rules, rules.allows(target) if rules else None) if asked else None
    with frontier._lock:
        host = frontier._hosts.get(name)
        ahead = host.ahead(target) if host and target in frontier._intake.visited else None
        if frontier._stopped:
            return "no: the crawl was stopped"
        if target in frontier._intake.visited and ahead is None:
            return "no: requested already, or on its way"
        if forbidden:
            return f"no: {forbidden}"
        if ahead is None and (full := frontier._limits.why_full(name)):
            return f"no: {full} reached"
        when = say_when(host, ahead or (0, now), frontier._limits.of(name)[0], frontier._per_host, unread, now)
        return when if ahead is not None else f"{when}; not found yet"
