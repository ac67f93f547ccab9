"""Which URL goes next, and when: the politeness and the fairness of a crawl, as a pure state machine.

Nothing here waits, reads a clock or does I/O: time is an argument, so that the same code runs under threads, under
asyncio and under the simulated clock of the tests.

Promised
- A URL is handed out to one worker at a time, however many ask, and once, but for what is put back.
- Over all workers, a host is sent at most ``burst + rate * t`` requests in any window of ``t`` seconds, retries and
  redirects included; none while it is paused. No more than ``per_host`` are in flight at a time.
- A slow, failing or limited host holds up no other: hosts wait in one heap, ordered by when each may go next.

``Frontier._lock`` guards all of it; each bucket and the visited set have locks of their own below it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coordination import Visited, new_lock
from crawl_rules import FetchError, Postponed, Request, names_private, normalise
from primitives import NANOSECOND, TokenBucket


class _Host:
    """What is known of one host. Guarded by the frontier's lock."""

    __slots__ = ("delayed", "due", "gate", "head", "in_flight", "name", "paused_until", "schedule", "waiting")

    def __init__(self, name: str, schedule: TokenBucket | None, gate: TokenBucket | None) -> None:
        self.name = name
        self.schedule, self.gate = schedule, gate
        self.waiting: list[str | tuple[str, str]] = []
        self.head = 0
        self.delayed: list[tuple[float, int, Request]] = []
        self.in_flight = 0
        self.due = math.inf
        self.paused_until = -math.inf

    def has_work(self) -> bool:
        return self.head < len(self.waiting) or bool(self.delayed)

    def pop_waiting(self) -> str | tuple[str, str]:
        entry = self.waiting[self.head]
        self.head += 1
        if self.head >= 32 and self.head * 2 >= len(self.waiting):
            del self.waiting[: self.head]
            self.head = 0
        return entry


@dataclass(frozen=True, slots=True)
class FrontierStats:
    waiting: int
    in_flight: int
    hosts: int
    seen: int
    duplicates: int
    closed: bool


class Frontier:
    """Which URL goes next, and when: the politeness and the fairness of a crawl, as a pure state machine.

    ``take(now)`` answers a Request to send, the seconds to wait (``inf``: until something changes), or None: nothing
    will ever come. Each host has its FIFO of waiting URLs, its token bucket, and at most one live entry in a heap
    ordered by the earliest time at which it may go (an entry that turns out to be early is put back: cheaper than
    finding and changing it). A step costs O(log hosts).

    Between leaving the frontier and being sent a request may have to connect, for a time that nobody knows. So there
    are two buckets of the same rate: the *schedule* is charged by ``take`` and spaces the requests as they leave; the
    *gate* is charged by ``clear_to_send`` at the moment of sending, and it alone is the promise. Where connections
    are quick the gate finds nothing to do. ``lead`` (seconds) is how much earlier than it may be sent a request is
    handed out, so that the driver is ready when the moment comes.
    """

    def __init__(
        self,
        *,
        rate: float = 2.0,
        burst: int = 1,
        per_host: int = 8,
        total_rate: float = 0.0,
        lead: float = 0.0,
        private: Callable[[str], bool] = names_private,
    ) -> None:
        self._private = private
        self._rate, self._burst, self._per_host, self._lead = rate, burst, per_host, lead
        self._total_schedule = TokenBucket(total_rate) if total_rate else None
        self._total_gate = TokenBucket(total_rate) if total_rate else None
        self._lock = new_lock("Frontier")
        self._hosts: dict[str, _Host] = {}
        self._heap: list[tuple[float, int, _Host]] = []
        self._serial = 0
        self._visited: Visited[str] = Visited()
        self._refused: deque[Request] = deque()
        self._waiting = self._in_flight = 0
        self._closed = self._stopped = False

    def add_all(self, texts: Iterable[str], now: float) -> int:
        """Add URLs as they stand in a list; each distinct one once. Returns how many were new."""
        known: list[tuple[str, str, str]] = []
        refused: list[Request] = []
        for text in texts:
            try:
                known.append((text, *normalise(text)))
            except FetchError as error:
                refused.append(Request(text, text, "", error=error))
        with self._lock:
            before = len(self._visited)
            for text, target, host_name in known:
                if self._visited.add(target):
                    host = self._host(host_name)
                    host.waiting.append(target if text == target else (text, target))
                    self._waiting += 1
                    if host.due == math.inf:
                        self._schedule(host, now)
            for request in refused:
                if self._visited.add(request.url):
                    self._refused.append(request)
                    self._waiting += 1
            return len(self._visited) - before

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

    def take(self, now: float) -> Request | float | None:
        with self._lock:
            if self._stopped:
                return None
            if self._refused:
                self._waiting -= 1
                self._in_flight += 1
                return self._refused.popleft()
            if not self._waiting:
                return None if self._closed and not self._in_flight else math.inf
            soon = now + self._lead
            if self._total_schedule and self._total_gate:
                wait = max(self._total_schedule.wait_for(1, now), self._total_gate.wait_for(1, now)) - self._lead
                if wait > NANOSECOND:
                    return wait
            while self._heap:
                due, _, host = self._heap[0]
                if due > soon + NANOSECOND:
                    return due - soon
                heapq.heappop(self._heap)
                if due != host.due or self._hosts.get(host.name) is not host:
                    continue  # superseded by an earlier entry, or forgotten
                host.due = math.inf
                due = self._due(host, now)
                if due > soon + NANOSECOND:
                    self._push(host, due)
                    self._forget_idle(host, now)
                    continue
                return self._hand_out(host, now)
            return math.inf

    def clear_to_send(self, request: Request, now: float) -> float:
        """0.0: send now, the tokens are taken. Else the seconds after which to ask again.

        Raises Postponed when that would be longer than a second, for instance because the host was paused meanwhile:
        the worker puts the request back instead of waiting for it.
        """
        with self._lock:
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

    def finish(self, request: Request, now: float) -> None:
        """The request is done with: its row is written."""
        with self._lock:
            self._leave(request, now)

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        """The request is not done: it goes (to ``target`` on ``host_name``, if given) no sooner than ``not_before``."""
        with self._lock:
            self._leave(request, now)
            request.target, request.host = target or request.target, host_name or request.host
            host = self._host(request.host)
            heapq.heappush(host.delayed, (not_before, self._next_serial(), request))
            self._waiting += 1
            self._schedule(host, now)

    def stats(self) -> FrontierStats:
        with self._lock:
            return FrontierStats(self._waiting, self._in_flight, len(self._hosts), *self._visited.stats(), self._closed)

    def __repr__(self) -> str:
        s = self.stats()
        return f"<Frontier {s.waiting} waiting on {s.hosts} hosts, {s.in_flight} in flight>"

    # The rest runs under the lock.

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            schedule, gate = (TokenBucket(self._rate, self._burst) if self._rate else None for _ in range(2))
            host = self._hosts[name] = _Host(name, schedule, gate)
        return host

    def _due(self, host: _Host, now: float) -> float:
        """When the host's next request may leave the frontier; inf if it has none, or enough in flight."""
        if host.in_flight >= self._per_host:
            return math.inf
        if host.head < len(host.waiting):
            due = now
        elif host.delayed:
            due = max(now, host.delayed[0][0])
        else:
            return math.inf
        if host.schedule and host.gate:
            due = max(due, now + host.schedule.wait_for(1, now), now + host.gate.wait_for(1, now))
        return max(due, host.paused_until)

    def _push(self, host: _Host, due: float) -> None:
        if due < host.due:
            host.due = due
            heapq.heappush(self._heap, (due, self._next_serial(), host))

    def _schedule(self, host: _Host, now: float) -> None:
        self._push(host, self._due(host, now))

    def _hand_out(self, host: _Host, now: float) -> Request:
        if host.delayed and (host.delayed[0][0] <= now or host.head >= len(host.waiting)):
            request = heapq.heappop(host.delayed)[2]
        else:
            entry = host.pop_waiting()
            url, target = (entry, entry) if isinstance(entry, str) else entry
            request = Request(url, target, host.name, started=now, private=self._private(host.name))
        self._waiting -= 1
        self._in_flight += 1
        host.in_flight += 1
        for bucket in (host.schedule, self._total_schedule):
            if bucket:
                bucket.reserve(1, now)
        request.last_of_host = self._closed and not host.has_work()
        self._schedule(host, now)
        return request

    def _leave(self, request: Request, now: float) -> None:
        self._in_flight -= 1
        if request.error:
            return
        host = self._hosts[request.host]
        host.in_flight -= 1
        if host.has_work():
            self._schedule(host, now)
        else:
            self._forget_idle(host, now)

    def _forget_idle(self, host: _Host, now: float) -> None:
        """Drop a host with nothing to do once its bucket is full again: the memory follows the hosts at work."""
        if host.in_flight or host.has_work():
            return
        free_at = host.paused_until
        for bucket in (host.schedule, host.gate):
            if bucket:
                free_at = max(free_at, now + bucket.wait_for(self._burst, now))
        if free_at <= now:
            self._hosts.pop(host.name, None)
        else:
            # Entries are looked at ``lead`` early; a millisecond more, so that it is surely over when this one is.
            self._push(host, free_at + self._lead + 0.001)
