"""What robots.txt lets out of the frontier: it is asked for first, and what it forbids is refused.

Promised, with ``enabled``
- Nothing is asked of an origin before its robots.txt is known, which is asked for once within ``ttl`` unless its rules
  had to be freed; what it forbids is never handed out to be sent. However a request for robots.txt ends, the host goes
  on: if nobody said what the rules are, all is forbidden for ``ROBOTS_AGAIN``.
- All rules together take ``rules_bytes`` at most: those that were asked longest ago are freed first.

Rules are asked under the frontier's lock only where that is quick. Else the question is handed out like a request: one
for each host, which waits for the answer while the others go on. Pure, and called under the frontier's lock; a host
that may go on is returned, to be scheduled.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque

from crawl.errors import FetchError
from crawl.hosts import HostQueue, Question
from crawl.limits import HostLimits
from crawl.model import Request
from crawl.robots import Rules
from crawl.urls import host_of, origin
from primitives import NANOSECOND

ROBOTS_AGAIN = 300.0  # seconds until a robots.txt that could not be read is asked for again; all is forbidden meanwhile
SIFTED = 16  # forbidden URLs that one step takes out of a host's queue
RULES_BYTES = 48 << 20  # bytes that the rules of all origins may take
KEPT_BYTES = 64 << 10
"""Rules of so many bytes are kept while their host has nothing to do: it may come back, and is not asked again."""


def why_forbidden(rules: Rules | None, allowed: bool | None) -> str | None:
    """Why a URL may not be fetched, by what its origin's rules say of it; None: it may."""
    if rules is None:
        return "robots.txt could not be read"
    return None if allowed else "robots.txt is too costly to match" if allowed is None else "forbidden by robots.txt"


class OriginRules:
    """The rules of an origin, good until ``until``; None: they could not be read. ``asking``: they are being read."""

    __slots__ = ("asking", "host", "rules", "until")

    def __init__(self, host: str) -> None:
        self.host = host
        self.rules: Rules | None = None
        self.until = -math.inf
        self.asking = False


class RulesCache:
    """The rules of all origins, in ``most`` bytes at most."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._origins: dict[str, OriginRules] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Bytes of the rules of each origin that has any; those asked last come last."""
        self._large: dict[str, tuple[str, ...]] = {}  # the origins of each host whose rules are large
        self.get = self._origins.get

    def entry(self, name: str, host: str) -> OriginRules:
        """That of an origin, a new one if there is none."""
        known = self._origins.get(name)
        if known is None:
            known = self._origins[name] = OriginRules(host)
        return known

    def keep(self, name: str, host: str, rules: Rules | None, until: float) -> None:
        """These rules, just read; and not others if there is no room. None: they could not be read."""
        known = self.entry(name, host)
        self.free(name)
        known.rules, known.until = rules, until
        if rules and (size := rules.size):
            self._sizes[name] = size
            self._size += size
            if size > KEPT_BYTES:
                self._large[host] = (*self._large.get(host, ()), name)
            while self._size > self._most and len(self._sizes) > 1:
                self.free(next(iter(self._sizes)))

    def touch(self, name: str) -> None:
        """They were asked just now: others are freed before them."""
        if name in self._sizes:
            self._sizes.move_to_end(name)

    def free(self, name: str) -> None:
        """Forget the rules of an origin: its robots.txt is asked for again before anything else is."""
        size = self._sizes.pop(name, 0)
        if not size:
            return
        self._size -= size
        known = self._origins[name]
        known.rules, known.until = None, -math.inf
        if name in (large := self._large.get(known.host, ())):
            self._large[known.host] = tuple(one for one in large if one != name)

    def free_large(self, host: str) -> None:
        """Free a host's rules above ``KEPT_BYTES``: it has nothing left to do."""
        for name in self._large.pop(host, ()):
            self.free(name)

    def forget(self, host: str) -> int:
        """All that is known of a host's origins. How many were being read."""
        names = [name for name, known in self._origins.items() if known.host == host]
        for name in names:
            self.free(name)
        self._large.pop(host, None)
        return sum(self._origins.pop(name).asking for name in names)


class RobotsGate:
    """Between a host's queue and the workers. What is refused goes into ``refused``, with its error."""

    def __init__(
        self,
        hosts: dict[str, HostQueue],
        limits: HostLimits,
        refused: deque[Request],
        *,
        enabled: bool,
        rules_bytes: int,
        lead: float,
    ) -> None:
        self._hosts, self._limits, self._refused, self._lead = hosts, limits, refused, lead
        self.enabled = enabled
        self.rules = RulesCache(rules_bytes)
        self.sifting: deque[HostQueue] = deque()  # hosts that may have more forbidden URLs at their head
        self.questions: deque[Question] = deque()  # some of another time (``next_question``)
        self.blocked = self.forbidden = 0

    def ask(self, host: HostQueue, now: float) -> Request | None:
        """The request for robots.txt, if the host's next URL needs it."""
        found = host.next_target(now + self._lead + NANOSECOND)
        if found is None:
            return None
        name = origin(found[0])
        known = self.rules.entry(name, host.name)
        if known.until > now:
            return None
        known.asking = host.asking = True
        self.blocked += 1
        url = f"{name}/robots.txt"
        return Request(url, url, host.name, started=now, kind="robots", private=found[2])

    def release(self, name: str) -> HostQueue | None:
        """The rules of an origin are known: the host that waited for them, if there is one."""
        known = self.rules.get(name)
        if known is None:
            return None
        host = self._hosts.get(known.host)
        if known.asking:
            known.asking = False
            self.blocked -= 1
            if host:
                host.asking = False
        if host:
            host.cleared = None
        return host

    def learn(self, name: str, rules: Rules | None, now: float, ttl: float) -> HostQueue | None:
        """The rules of an origin; None: they could not be read. The host that may go on."""
        host = host_of(name)
        self.rules.keep(name, host, rules, now + ttl)
        if rules:
            self._limits.learn_delay(host, name, rules.delay)
            if queue := self._hosts.get(host):
                self._limits.apply(queue, now)
        return self.release(name)

    def give_up(self, name: str, now: float) -> HostQueue | None:
        """The robots.txt of an origin, should it still be asked for, cannot be had."""
        known = self.rules.get(name)
        return self.learn(name, None, now, ROBOTS_AGAIN) if known and known.asking else None

    def sift(self, host: HostQueue, now: float) -> bool:
        """Move what is forbidden from the head of the host's queues to what is handed out as refused. True if that is
        not done yet: it is gone on with at the next step, or when a question is answered."""
        if host.question:
            return True
        ripe = now + self._lead + NANOSECOND
        for _ in range(SIFTED):
            found = host.next_target(ripe)
            if found is None:
                return False
            target, kind, _ = found
            name = origin(target)
            known = self.rules.get(name)
            if known is None or known.until <= now:
                return False  # to be asked for first
            if target is host.cleared:
                return False
            allowed: bool | None = False
            if known.rules:
                self.rules.touch(name)
                if kind != "sitemap" and not known.rules.is_quick(target):
                    host.question = Question(host.name, target, known.rules)
                    self.questions.append(host.question)
                    return True
                allowed = kind == "sitemap" or known.rules.allows(target)
            if allowed:
                host.cleared = target
                return False
            self._refuse(host, known, allowed, ripe, now)
        if not host.sifting:
            host.sifting = True
            self.sifting.append(host)
        return True

    def _refuse(self, host: HostQueue, known: OriginRules, allowed: bool | None, ripe: float, now: float) -> None:
        """What the host would be asked for next is not allowed."""
        if host.delayed_first(ripe):
            request = heapq.heappop(host.delayed)[2]
        else:
            request = host.pop_waiting(now)
            if request.kind == "page":
                self._limits.count_page(host.name, -1)
        request.error = FetchError("robots", why_forbidden(known.rules, allowed) or "")
        self._refused.append(request)
        self.forbidden += 1

    def next_question(self) -> Question | None:
        """A question that a host still waits with; None: there is none."""
        while self.questions:
            question = self.questions.popleft()
            if (host := self._hosts.get(question.host)) and host.question is question:
                return question
        return None

    def answer(self, question: Question, allowed: bool | None, now: float) -> HostQueue | None:
        """What the rules say. It counts if they still hold, and the host would still be asked for this next."""
        host = self._hosts.get(question.host)
        if host is None or host.question is not question:
            return None
        host.question = None
        known = self.rules.get(origin(question.target))
        if known and known.rules is question.rules and known.until > now:
            ripe = now + self._lead + NANOSECOND
            found = host.next_target(ripe)
            if allowed:
                host.cleared = question.target
            elif found and found[0] is question.target:
                self._refuse(host, known, allowed, ripe, now)
        return host

    def known(self, target: str, now: float) -> tuple[Rules | None, str]:
        """(The rules that a URL is under, what has to be read to know them if anything has)."""
        site = origin(target)
        known = self.rules.get(site)
        if self.enabled and (known is None or known.until <= now):
            return None, f"{site}/robots.txt is {'being read' if known and known.asking else 'read first'}"
        return known.rules if known else None, ""

    def forget(self, name: str) -> None:
        """The rules of a host, and that it waits for them."""
        self.blocked -= self.rules.forget(name)
        if host := self._hosts.get(name):
            host.asking, host.cleared, host.question = False, None, None
