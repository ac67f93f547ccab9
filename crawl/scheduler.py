"""Which host goes next, and when.

Each host has at most one live entry in a heap, ordered by the earliest time at which it may go (one that turns out to
be early is put back); when that has come it moves to the ready, ordered by the work that is left, and by age. A step
costs O(log hosts).

Promised
- A slow, failing or limited host holds up no other.
- Where more hosts are due than there are workers, the one whose URLs will take longest goes first. No host starves:
  every ``FAIR``-th hand-out is that of the host that has been due for longest, so one that is due behind n others waits
  for FAIR * (n + 1) at most.
- Where workers are scarce, a host that will not be done before all else is handed out up to ``EARLY`` seconds earlier.

Pure, and called under the frontier's lock: time is an argument.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from crawl.hosts import HostQueue
from crawl.limits import HostLimits
from crawl.model import Request
from crawl.robots_gate import RobotsGate
from primitives import NANOSECOND

FAIR = 8  # every so many hand-outs one goes by age instead of by the work that is left
EARLY = 0.25
"""Longest time in seconds that a worker is given a request before it may be sent, where the whole crawl waits for its
host. The others may keep the workers busy just when such a host is due, and time that a host loses never comes back."""


class Scheduler:
    """``next_host`` takes out the host that goes next; ``schedule`` enters one whose queue, rate or pause changed."""

    def __init__(
        self, hosts: dict[str, HostQueue], limits: HostLimits, robots: RobotsGate, *, per_host: int, lead: float
    ) -> None:
        self._hosts, self._limits, self._robots = hosts, limits, robots
        self._per_host, self._lead = per_host, lead
        self.waiting = 0  # URLs on all hosts, and refused ones
        self.ready_hosts = 0
        self._heap: list[tuple[float, int, HostQueue]] = []
        self._ready: list[tuple[float, int, HostQueue]] = []  # by the work that is left; some of another time
        self._oldest: deque[tuple[int, HostQueue]] = deque()  # the same hosts by age; some of another time
        self._picked = 0
        self._gap, self._handed_at = 0.0, -math.inf
        """Mean seconds from one hand-out to the next while hosts wait for workers; 0: they do not."""
        self._serial = 0

    def next_serial(self) -> int:
        """A number above all before."""
        self._serial += 1
        return self._serial

    def put_back(self, request: Request, not_before: float, now: float) -> None:
        """Have a request wait that was handed out, here or elsewhere."""
        host = self.host(request.host)
        host.put_back(request, not_before, self.next_serial())
        self.waiting += 1
        self.schedule(host, now)

    def host(self, name: str) -> HostQueue:
        """The queue of a host, a new one if there is none."""
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = self._limits.new_queue(name)
        return host

    def next_host(self, now: float) -> HostQueue | None:
        """None: for now there is none (``wait``), or the gate has something to do first."""
        soon = now + self._lead
        before = self._serial
        while self._heap and self._heap[0][0] <= soon + NANOSECOND:
            due, _, host = heapq.heappop(self._heap)
            if due != host.due or self._hosts.get(host.name) is not host:
                continue  # superseded by an earlier entry, or forgotten
            host.due = math.inf
            due, early = self._due(host, now), self._early(host, now)
            if due > soon + early + NANOSECOND:
                self._push(host, due - early)
                self.forget_idle(host, now)
            else:
                self._make_ready(host)
        while self.ready_hosts:
            host, since = self._pick()
            early = self._early(host, now)
            if since <= before and (due := self._due(host, now)) > soon + early + NANOSECOND:
                self._push(host, due - early)  # paused meanwhile, for instance
                self.forget_idle(host, now)
                continue
            return host
        return None

    def wait(self, now: float) -> float:
        """Seconds until the first host is due; inf: until something changes."""
        return self._heap[0][0] - (now + self._lead) if self._heap else math.inf

    def schedule(self, host: HostQueue, now: float) -> None:
        """Enter a host by when it may go, unless it is among the ready."""
        if host.due > -math.inf:
            self._push(host, self._due(host, now) - self._early(host, now))

    def vacated(self, request: Request, now: float) -> None:
        """A request of an address is under way no more: the first host that waits for that and may go now does."""
        names = self._limits.addresses.leave(request)
        while names:
            name = next(iter(names))
            del names[name]
            if host := self._hosts.get(name):
                self.schedule(host, now)
                if host.due <= now + self._lead:
                    return

    def added(self, host: HostQueue, idle: bool, now: float) -> None:
        """A URL was appended to the host's queue, which was empty before if ``idle``."""
        self.waiting += 1
        if idle or host.due == math.inf:  # its entry may say when a retry is due, or when it can be forgotten
            self.schedule(host, now)
        elif host.due == -math.inf and not host.work() & (host.work() - 1):
            self._rank(host)  # its work has doubled since

    def evict(self, name: str, now: float) -> list[tuple[float, Request]]:
        """Take out what was put back on a host: (not before, request)."""
        host = self._hosts.get(name)
        if host is None:
            return []
        left = host.drop_put_back()
        self.waiting -= len(left)
        self.schedule(host, now)
        return left

    def handed_out(self, now: float) -> None:
        """Measures how long workers take to come back for more."""
        self._picked += 1
        if not self.ready_hosts:
            self._gap, self._handed_at = 0.0, -math.inf
        else:
            if self._handed_at > -math.inf:
                gap = now - self._handed_at
                self._gap = self._gap + (gap - self._gap) / 32 if self._gap else gap
            self._handed_at = now

    def forget_idle(self, host: HostQueue, now: float) -> None:
        """Drop a host with nothing to do once its bucket is full again: the memory follows the hosts at work."""
        if host.in_flight or host.asking or host.due == -math.inf or host.has_work():
            return
        free_at = host.paused_until
        for bucket in (host.schedule, host.gate):
            if bucket:
                free_at = max(free_at, now + bucket.wait_for(bucket.burst, now))
        if free_at <= now:
            self._hosts.pop(host.name, None)
            self._robots.rules.free_large(host.name)
        else:
            # Entries are looked at ``lead`` early; a millisecond more, so that it is surely over when this one is.
            self._push(host, free_at + self._lead + 0.001)

    def _due(self, host: HostQueue, now: float) -> float:
        """When the host's next request may leave the frontier; inf if it has none, or enough in flight."""
        due = host.urgent[0][0] if host.urgent else math.inf
        if not host.asking:
            if self._robots.enabled and self._robots.sift(host, now):
                return math.inf
            if host.head < len(host.waiting):
                due = now
            elif host.delayed:
                due = min(due, host.delayed[0][0])
        if due == math.inf or host.in_flight >= self._per_host or not self._limits.addresses.has_room(host.name):
            return math.inf
        if due < now:
            due = now
        if host.schedule and host.gate:
            due = max(due, now + host.schedule.wait_for(1, now), now + host.gate.wait_for(1, now))
        return max(due, host.paused_until)

    def _early(self, host: HostQueue, now: float) -> float:
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
        if host.work() < 0.9 * host.schedule.rate * self.waiting * self._gap:
            return 0.0
        return min(EARLY, 3 * self._gap)

    def _push(self, host: HostQueue, due: float) -> None:
        if due < host.due:
            host.due = due
            heapq.heappush(self._heap, (due, self.next_serial(), host))

    def _make_ready(self, host: HostQueue) -> None:
        host.due = -math.inf
        host.since = self.next_serial()
        self._oldest.append((host.since, host))
        self.ready_hosts += 1
        self._rank(host)

    def _rank(self, host: HostQueue) -> None:
        """Enter a ready host by the seconds that its waiting URLs will take."""
        host.ready = self.next_serial()
        work = host.work()
        heapq.heappush(self._ready, (-work / host.schedule.rate if host.schedule else -work, host.ready, host))
        if len(self._ready) > 2 * self.ready_hosts + 64:
            self._ready = [entry for entry in self._ready if entry[2].ready == entry[1]]
            heapq.heapify(self._ready)
        if len(self._oldest) > 2 * self.ready_hosts + 64:
            self._oldest = deque(entry for entry in self._oldest if entry[1].since == entry[0])

    def _pick(self) -> tuple[HostQueue, int]:
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
                self.ready_hosts -= 1
                return host, since
