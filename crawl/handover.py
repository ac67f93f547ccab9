"""A frontier that is not alone: hosts and requests come to it from others, and go to them.

Those over the tables of a database (crawl/lease.py) hand over requests whose redirects lead to another's host, and give
hosts back, with what waits there. What they need of a ``Frontier`` beyond its own crawl is here. Locks: the frontier's.
"""

from __future__ import annotations

import math

from crawl.frontier import Frontier
from crawl.model import Request


class HandoverFrontier(Frontier):
    """Whether a URL that others hand over was seen before is for them to know."""

    def adopt(self, request: Request, now: float, not_before: float = -math.inf) -> None:
        """Take in a request that somebody else knows too: whether its URL was seen is not asked here."""
        with self._lock:
            if request.error:
                self._refused.append(request)
                self._scheduler.waiting += 1
            else:
                self._enqueue(request, not_before, now)

    def pass_on(self, request: Request, now: float) -> None:
        """The request goes on elsewhere. If it is for robots.txt, its host waits for ``robots_known``."""
        with self._lock:
            self._leave(request, now)

    def evict(self, name: str, now: float) -> list[tuple[float, Request]]:
        """Forget a host's rules and what waits there: (not before, request). What is in flight ends as usual."""
        with self._lock:
            self._limits.forget(name)
            self._robots.forget(name)
            host = self._hosts.get(name)
            if host is None:
                return []
            left = [(at, request) for at, _, request in (*host.urgent, *host.delayed)]
            host.urgent.clear()
            host.delayed.clear()
            self._scheduler.waiting -= len(left)
            self._scheduler.schedule(host, now)
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
