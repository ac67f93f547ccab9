"""How fast each host may go, and how many of its pages are taken in.

The rate of a host is the user's, or less: a Crawl-delay of one of its origins lowers it, and with ``adaptive`` so does
what the host bears. What is known of that stays while the host has nothing to do. Pure, and called under the
frontier's lock: time is an argument, and nothing here waits.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

from crawl.errors import Postponed
from crawl.hosts import HostQueue
from crawl.model import Request
from primitives import NANOSECOND, TokenBucket

Outcome = Literal["ok", "refused", "timeout"]


class Pace:
    """The rate that a host bears: additive increase, multiplicative decrease (Chiu and Jain, 1989).

    It begins at half the ceiling; each success adds a hundredth of the ceiling, a refusal or time-out halves it, and
    so does a mean latency above twice the best of the last one to two minutes. What was sent before the last decrease
    says nothing about the rate since: it neither raises nor lowers, so one jam halves once. At least ``FLOOR``.
    """

    FLOOR = 0.05
    UNLIMITED = 20.0  # stands for a ceiling where there is none
    WINDOW = 60.0
    NOISE = 0.05  # seconds by which latency may differ from the best without meaning anything
    SAMPLES = 8

    __slots__ = ("_best", "_earlier", "_lowered", "_mean", "_successes", "_turn", "rate")

    def __init__(self, ceiling: float) -> None:
        self.rate = self._scale(ceiling) / 2
        self._mean = self._best = self._earlier = math.inf
        self._lowered = self._turn = -math.inf
        self._successes = 0

    def _scale(self, ceiling: float) -> float:
        return ceiling if ceiling < math.inf else self.UNLIMITED

    def report(self, outcome: Outcome, seconds: float, now: float, ceiling: float) -> None:
        """A request took ``seconds`` and ended ``now``."""
        current = now - seconds >= self._lowered
        slow = False
        if outcome == "ok":
            self._mean = seconds if self._mean == math.inf else self._mean + (seconds - self._mean) / 8
            if now >= self._turn:
                self._earlier, self._best, self._turn = self._best, math.inf, now + self.WINDOW
            self._best = min(self._best, seconds)
            self._successes += current
            usual = min(self._best, self._earlier)
            slow = self._successes >= self.SAMPLES and self._mean > max(2 * usual, usual + self.NOISE)
        if not current:
            return
        if outcome != "ok" or slow:
            self.rate = max(min(self.FLOOR, ceiling), self.rate / 2)
            self._lowered, self._successes = now, 0
        else:
            self.rate = min(ceiling, self.rate + self._scale(ceiling) / 100)


class HostRecord:
    """What is remembered of a host also while it has nothing to do."""

    __slots__ = ("delays", "pace", "pages")

    def __init__(self) -> None:
        self.pages = 0
        self.pace: Pace | None = None
        self.delays: dict[str, float] | None = None  # Crawl-delay of each origin that has one


class SendGate:
    """Leave to be handed out, and to be sent: the buckets of a host, and those of all hosts together."""

    def __init__(self, total_rate: float) -> None:
        self.schedule, self.gate = (TokenBucket(total_rate) if total_rate else None for _ in range(2))
        self.lease_end = math.inf  # nothing is sent from then on

    def wait(self, now: float) -> float:
        """Seconds until the rate of all hosts lets another request leave."""
        return max((bucket.wait_for(1, now) for bucket in (self.schedule, self.gate) if bucket), default=0.0)

    def hand_out(self, host: HostQueue, now: float) -> None:
        """A request leaves."""
        for bucket in (host.schedule, self.schedule):
            if bucket:
                bucket.reserve(1, now)

    def is_open(self, host: HostQueue, now: float) -> bool:
        """Whether a request may be sent now, and needs no token for it."""
        return not (host.gate or self.gate) and host.paused_until <= now < self.lease_end

    def clear(self, host: HostQueue, now: float, ahead: float) -> float:
        """0.0, or at most ``ahead``: send in so many seconds, the tokens are taken. Else when to ask again.

        Raises Postponed where that would be longer than a second.
        """
        if now >= self.lease_end:
            raise Postponed
        gates = [gate for gate in (host.gate, self.gate) if gate]
        wait = max(host.paused_until - now, *(gate.wait_for(1, now) for gate in gates), 0.0)
        if wait > 1.0:
            raise Postponed
        if wait > max(ahead, NANOSECOND):
            return wait
        for gate in gates:
            gate.reserve(1, now)
        return wait if wait > NANOSECOND else 0.0


class AddressSlots:
    """At most ``most`` requests at a time to one IP address (0: no limit), over all hosts that have it. A host's
    address is known once it was connected to."""

    def __init__(self, most: int) -> None:
        self.most = most or math.inf
        self._addresses: dict[str, str] = {}
        self._busy: Counter[str] = Counter()
        self._waiting: dict[str, dict[str, None]] = {}

    def has_room(self, name: str) -> bool:
        """Whether a host's address takes another request; if not, the host is told of by ``leave`` when it does."""
        address = self._addresses.get(name)
        if address is None or self._busy[address] < self.most:
            return True
        self._waiting.setdefault(address, {})[name] = None
        return False

    def enter(self, request: Request) -> None:
        """The request is handed out."""
        if address := self._addresses.get(request.host):
            self._busy[address] += 1
            request.address = address

    def learn(self, request: Request, address: str) -> bool:
        """The host of ``request`` turns out to be at ``address``. Whether that takes it."""
        self._addresses[request.host] = address
        if request.address == address:
            return True
        if self._busy[address] >= self.most:
            return False
        self._busy[address] += 1
        if request.address:
            self._busy[request.address] -= 1
        request.address = address
        return True

    def leave(self, request: Request) -> dict[str, None]:
        """The request is under way no more. The hosts that wait for its address, oldest first: whoever goes is to be
        taken out."""
        address, request.address = request.address, None
        if address is None:
            return {}
        self._busy[address] -= 1
        if not self._busy[address]:
            del self._busy[address]
        return self._waiting.get(address, {})


class HostLimits:
    """The rates of all hosts, and their pages. ``host_pages`` and ``max_pages`` are caps (0: none)."""

    def __init__(self, *, rate: float, burst: int, adaptive: bool, host_pages: int, max_pages: int) -> None:
        self.addresses = AddressSlots(0)
        self._rate, self._burst, self.adaptive = rate, burst, adaptive
        self._host_pages, self._max_pages = host_pages or math.inf, max_pages or math.inf
        self._records: dict[str, HostRecord] = {}
        self.pages = 0

    def record(self, name: str) -> HostRecord:
        """That of a host, a new one if there is none."""
        record = self._records.get(name)
        if record is None:
            record = self._records[name] = HostRecord()
        return record

    def forget(self, name: str) -> None:
        """Nothing is known of the host any more."""
        self._records.pop(name, None)

    # Rates

    def of(self, name: str) -> tuple[float, int]:
        """(requests per second, burst) of a host; inf: no limit."""
        record = self._records.get(name)
        rate = self._ceiling(record)
        if self.adaptive:
            rate = min(rate, ((record and record.pace) or Pace(rate)).rate)
        return rate, 1 if record and record.delays else self._burst

    def _ceiling(self, record: HostRecord | None) -> float:
        ceiling = self._rate or math.inf
        if record and record.delays:
            ceiling = min(ceiling, 1 / max(record.delays.values()))
        return ceiling

    def new_queue(self, name: str) -> HostQueue:
        """With full buckets."""
        rate, burst = self.of(name)
        schedule, gate = (TokenBucket(rate, burst) if rate < math.inf else None for _ in range(2))
        return HostQueue(name, schedule, gate)

    def apply(self, host: HostQueue, now: float) -> None:
        """The host's rate may be another now."""
        rate, burst = self.of(host.name)
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

    def learn_delay(self, name: str, origin: str, delay: float | None) -> None:
        """The Crawl-delay of one of a host's origins."""
        record = self.record(name)
        if delay is not None and 0 < delay < math.inf:
            record.delays = {**(record.delays or {}), origin: delay}
        elif record.delays:
            record.delays.pop(origin, None)

    def report(self, name: str, outcome: Outcome, seconds: float, now: float) -> bool:
        """How a request went that took ``seconds``; with ``adaptive`` only. Whether the rate is another now."""
        record = self.record(name)
        ceiling = self._ceiling(record)
        record.pace = record.pace or Pace(ceiling)
        before = record.pace.rate
        record.pace.report(outcome, seconds, now, ceiling)
        return record.pace.rate != before

    # Pages

    def is_full(self, name: str) -> bool:
        """Whether no page more of this host is taken in."""
        if self.pages >= self._max_pages:
            return True
        return self._host_pages < math.inf and self.record(name).pages >= self._host_pages

    def why_full(self, name: str) -> str | None:
        """The cap that is reached, if one is."""
        if not self.is_full(name):
            return None
        return "max_pages" if self.pages >= self._max_pages else "its host's pages"

    def count_page(self, name: str, n: int) -> None:
        """``n`` pages more of the host; fewer, if negative."""
        self.pages += n
        if self._host_pages < math.inf:
            self.record(name).pages += n
