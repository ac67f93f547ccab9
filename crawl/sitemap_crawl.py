"""What --sitemaps adds to a crawl: the sitemaps that robots.txt names are fetched, and the pages in them.

Promised: each sitemap is fetched once, ``MAX_SITEMAPS`` of a host at most; its pages count as if the list named them,
and only those in scope are taken. A sitemap speaks for its own host and for the one whose robots.txt led there.

``SitemapCrawl._lock`` guards which sitemaps are on their way; it is not held while one is read or a URL is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from coordination import Clock, new_lock
from crawl.addresses import leads_private, names_private
from crawl.errors import FetchError
from crawl.frontier import Frontier
from crawl.model import Request, Response
from crawl.robots import MAX_SITEMAPS
from crawl.scope import Scope
from crawl.sitemaps import parse_sitemap
from crawl.stats import Stats
from crawl.urls import normalise


class SitemapCrawl:
    """Which sitemaps are on their way, and what becomes of them."""

    def __init__(self, frontier: Frontier, scope: Scope, stats: Stats, clock: Clock, *, allow_private: bool) -> None:
        self._frontier, self._scope, self._stats, self._clock = frontier, scope, stats, clock
        self._allow_private = allow_private
        self._lock = new_lock("SitemapCrawl")
        self.homes: dict[str, str] = {}
        """Sitemaps on their way, by normalised URL: the host whose robots.txt led there, and which they speak for."""
        self._files: Counter[str] = Counter()  # how many there were, by that host

    def ask_again(self, origins: Iterable[str]) -> None:
        """Have robots.txt read, and so the sitemaps, where an earlier run may have left nothing else to ask for."""
        for name in origins:
            host = normalise(name)[1]
            if self._scope.has(host):
                private = self._allow_private or names_private(host)
                self.add([f"{name}/sitemap.xml"], host, private)

    def add(self, urls: Iterable[str], home: str, private: bool) -> None:
        """Fetch these sitemaps of the host ``home``, those of them that are new, and as many as it may have."""
        for url in urls:
            try:
                target = normalise(url)[0]
            except FetchError:
                continue
            with self._lock:
                if self._files[home] >= MAX_SITEMAPS:
                    return
                if target in self.homes:
                    continue
                self.homes[target] = home
            new = self._frontier.add_links([target], 0, self._clock(), private=private, kind="sitemap")
            with self._lock:
                if new:
                    self._files[home] += 1
                else:
                    self.homes.pop(target, None)

    def read(self, request: Request, outcome: Response | FetchError) -> None:
        """A sitemap names pages, which count as if the list named them, and other sitemaps."""
        with self._lock:
            home = self.homes.pop(request.url, normalise(request.url)[1])
        self._stats.count(sitemaps=1)
        if isinstance(outcome, FetchError) or outcome.status != 200:
            self._stats.count(sitemap_errors=1)
            return
        found = parse_sitemap(outcome.body, request.target, (home,))
        self._stats.count(sitemap_errors=found.error is not None)
        private = leads_private(request.private, request.host)
        self.add(found.sitemaps, home, private)
        self._frontier.add_links(list(self._scope.targets(found.urls)), 0, self._clock(), private=private)
