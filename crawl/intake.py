"""Which URLs are taken in: each once, under the caps.

A line of the list is normalised first, or refused. Called under the frontier's lock, but for ``parse_list``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coordination import Visited
from crawl.errors import FetchError
from crawl.hosts import Kind, UrlRun
from crawl.limits import HostLimits
from crawl.model import Request
from crawl.scheduler import Scheduler
from crawl.urls import host_of, normalise


def parse_list(
    texts: Iterable[str], kind: Kind, is_private: Callable[[str], bool]
) -> tuple[list[tuple[str, str, str, UrlRun]], list[Request]]:
    """(line, target, host, what it has in common) of the lines that are URLs, and refused requests for the others."""
    known: list[tuple[str, str, str, UrlRun]] = []
    refused: list[Request] = []
    open_run, private_run = UrlRun(0, False, kind, listed=True), UrlRun(0, True, kind, listed=True)
    for text in texts:
        try:
            target, host_name = normalise(text)
        except FetchError as error:
            refused.append(Request(text, text, "", kind=kind, error=error))
        else:
            known.append((text, target, host_name, private_run if is_private(host_name) else open_run))
    return known, refused


class Intake:
    """Which URLs are taken in: each once, under the caps."""

    def __init__(self, limits: HostLimits, scheduler: Scheduler) -> None:
        self._limits, self._scheduler = limits, scheduler
        self.visited: Visited[str] = Visited()
        self.capped = 0

    def mark(self, target: str, counts: bool) -> bool:
        """Take it for visited; True if it was new. ``counts``: as a page under the caps."""
        new = self.visited.add(target)
        if new and counts:
            self._limits.count_page(host_of(target), 1)
        return new

    def add(self, text: str, target: str, host_name: str, run: UrlRun, now: float) -> bool:
        """Into its host's queue, if it is new."""
        if run.kind == "page" and self._limits.is_full(host_name):
            self.capped += target not in self.visited
            return False
        # A feed of the list is polled in each run, whatever an article of that address was in this or an earlier one.
        if not self.mark(target if run.kind != "feed" else f"feed {target}", run.kind == "page"):
            return False
        host = self._scheduler.host(host_name)
        idle = host.head >= len(host.waiting)
        host.append(target if text == target else (text, target), run)
        self._scheduler.added(host, idle, now)
        return True
