"""What --feeds adds to a crawl: the list names feeds, and the articles that they announce are fetched, each once.

Promised: a feed is asked for in each run, on condition that it changed since the last one (ETag, Last-Modified), unless
not all that it announced was taken in. A feed of the list is no article, also where another feed names it.

What libraries read, feeds and articles, ``read`` does, for which the caller waits. ``FeedCrawl._lock`` guards which
articles are on their way; it is not held while something is read or added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import UTC, datetime

from coordination import Clock, new_lock
from crawl.addresses import leads_private
from crawl.errors import FetchError
from crawl.feeds import NO_FEED, Feed, FeedEntry, parse_feed
from crawl.frontier import Frontier
from crawl.model import FeedResult, Request, Response, ScrapeResult
from crawl.rows import Read, build_article, build_row, validator
from crawl.scope import Scope
from crawl.stats import Stats
from crawl.urls import normalise
from html_parse import parse_page


class FeedCrawl:
    """The feeds of the list, and the articles on their way. ``since``: ISO 8601, no articles from before."""

    def __init__(self, frontier: Frontier, scope: Scope, stats: Stats, clock: Clock, *, since: str | None) -> None:
        self._frontier, self._scope, self._stats, self._clock = frontier, scope, stats, clock
        first = datetime.fromisoformat(since) if since else None
        self._since = first if first is None or first.tzinfo else first.replace(tzinfo=UTC)
        self._lock = new_lock("FeedCrawl")
        self.validators: dict[str, tuple[str, str | None, str | None]] = {}
        """What an earlier run knew of feeds, by the list's URL (normalised): where it led, ETag, Last-Modified."""
        self.listed: set[str] = set()  # the feeds of the list, normalised
        self.entries: dict[str, tuple[str, FeedEntry]] = {}
        """Articles on their way, by normalised URL: their feed, and what it says of them."""

    def know(self, urls: Iterable[str]) -> None:
        """These are feeds of the list."""
        with self._lock:
            for url in urls:
                with contextlib.suppress(FetchError):
                    self.listed.add(normalise(url)[0])

    def condition(self, request: Request) -> tuple[str | None, str | None]:
        """(ETag, Last-Modified) of an earlier answer of the same target: another one's would not mean the same."""
        known = self.validators.get(normalise(request.url)[0])
        return known[1:] if known and known[0] == request.target else (None, None)

    def row(self, request: Request, outcome: Response | FetchError, read: Read) -> ScrapeResult | None:
        """The row of a feed or an article; None of a feed that has nothing new. A feed's new articles are added."""
        now, private = self._clock(), leads_private(request.private, request.host)
        if request.kind == "page":
            known = normalise(request.url)[0]
            with self._lock:
                feed, entry = self.entries.get(known, (None, None))
            article = build_article(request, outcome, feed, entry, read)
            with self._lock:
                self.entries.pop(known, None)
            return article
        if isinstance(outcome, Response) and outcome.status == 304 and any(self.condition(request)):
            self._stats.count(unchanged=1)
            return None
        row = build_row(request, outcome, FeedResult)
        assert isinstance(row, FeedResult)
        row.kind, row.links_found = "feed", []  # some are served as HTML
        if isinstance(outcome, FetchError) or row.error:
            return row
        try:
            found: Feed = read(parse_feed, outcome.body, request.target, outcome.headers)
        except FetchError as error:
            row.error = str(error)
            return row
        if found.fault is None:
            row.etag, row.last_modified = (validator(outcome.headers.get(name)) for name in ("ETag", "Last-Modified"))
        else:  # without validators it is asked for again as a whole
            row.error = f"decode: {found.fault}"
            if found.fault == NO_FEED and (named := parse_page(outcome.body, request.target, row.content_type).feeds):
                row.error += f"; the page names {named[0]}"
        capped = self._frontier.stats().capped
        self.add_articles(row, found.entries, private, now)
        if self._frontier.stats().capped > capped:  # what was left out is asked for again, which 304 would prevent
            row.etag = row.last_modified = None
        elif not (row.links_found or row.error) and self.validators.get(normalise(row.url)[0]) == (
            row.final_url,
            row.etag,
            row.last_modified,
        ):
            self._stats.count(unchanged=1)
            return None
        return row

    def add_articles(self, row: FeedResult, entries: Iterable[FeedEntry], private: bool, now: float) -> None:
        """Add the articles of a feed that are new, and not from before ``since``."""
        for entry in entries:
            if self._since and entry.published and datetime.fromisoformat(entry.published) < self._since:
                continue
            try:
                target = normalise(self._scope.clean(entry.url))[0]
            except FetchError:
                continue
            entry = entry._replace(summary=None)  # the page has the text
            with self._lock:
                if target in self.entries or target in self.listed:
                    continue
                self.entries[target] = row.url, entry
            if self._frontier.add_links([target], 1, now, private=private):
                row.links_found.append(target)
                row.entries.append(entry._asdict())
            else:
                with self._lock:
                    self.entries.pop(target, None)

    def recall(self, row: FeedResult, private: bool) -> None:
        """The articles that a feed named in an earlier run, and that have no row yet."""
        found = [FeedEntry(*(entry.get(name) for name in FeedEntry._fields)) for entry in row.entries]  # type: ignore[arg-type]
        self.add_articles(row, found, private, self._clock())
