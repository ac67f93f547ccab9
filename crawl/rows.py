"""From an answer to its row: what is kept of a page, a feed or an article.

Pure but for the clock that stamps a row. Pages are parsed in the caller's thread, 1 ms for 100 KB; feeds and articles,
which libraries read for as long as they like, by the caller's ``Read``.
"""

from __future__ import annotations

import contextlib
import http
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from crawl.articles import Article, read_article
from crawl.errors import FetchError
from crawl.feeds import FeedEntry
from crawl.model import USER_AGENT, CrawlResult, FeedResult, Request, Response, ScrapeResult
from crawl.robots import page_directives
from crawl.urls import join
from html_parse import parse_page, read_refresh, sniff

Read = Callable[..., Any]
"""``read(function, body, *more)``: what ``function(body, *more)`` returns, or FetchError if that is not to be had."""

POINTER_DELAY = 100.0
"""Seconds after which a page that goes on to another one by itself is one that is meant to be read."""
MOST_TAGS = 3000
MOST_REFERENCES = 10_000
MOST_LEGACY = 32 * 1024  # bytes
_REASONS = {status.value: status.phrase for status in http.HTTPStatus}


def validator(text: object) -> str | None:
    """What can be sent back as it came, else None: the drivers read other bytes in ways of their own."""
    return text if isinstance(text, str) and text.isascii() and text.isprintable() else None


def build_row(
    request: Request,
    outcome: Response | FetchError,
    form: type[ScrapeResult] = ScrapeResult,
    user_agent: str = USER_AGENT,
) -> ScrapeResult:
    """The row of a finished request. Parses the page: 1 ms for 100 KB or so, in the caller's thread."""
    row = form(
        url=request.url,
        status=outcome.status,
        title=None,
        word_count=0,
        links_found=[],
        error=None,
        fetched_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        duration_ms=round(request.spent * 1000, 1),
        final_url=None if outcome.status is None else request.target,
        attempts=request.attempt,
        redirects=request.hops,
        depth=request.depth,
    )
    if isinstance(outcome, FetchError):
        row.error = f"{outcome.kind}: {outcome.detail}"
        return row
    row.content_type = content_type = outcome.headers.get("Content-Type")
    row.bytes = len(outcome.body)
    if outcome.status >= 400:
        row.error = f"http: {outcome.status} {_REASONS.get(outcome.status, '')}".rstrip()
        return row
    refresh = read_refresh(outcome.headers.get("Refresh", ""))
    if is_html(content_type, outcome.body):
        page = parse_page(outcome.body, request.target, content_type)
        row.title, row.word_count, row.links_found = page.title, page.word_count, page.links
        row.language, row.description, row.canonical = page.language, page.description, page.canonical
        if isinstance(row, CrawlResult):
            meta = (*page.robots, *page.agent_robots)
            asked = page_directives(outcome.headers.get("X-Robots-Tag"), meta, user_agent)
            row.robots = ", ".join(sorted(asked)) or None
            row.nofollow = [link for link in page.links if link in page.nofollow]
        row.leads_to, refresh = page.frames, refresh or page.refresh
        row.pointer = "frameset" if page.frameset and page.frames else None
    if refresh and refresh[0] <= POINTER_DELAY:
        with contextlib.suppress(FetchError):
            target = join(request.target, refresh[1])[0]
            if target != request.target:
                row.leads_to = list(dict.fromkeys([target, *row.leads_to]))
                row.pointer = "refresh"
    return row


def is_costly(body: bytes, content_type: str | None) -> bool:
    """Whether a page may take far longer than its size says: a tag can take 5 us, a reference 1, a character of a
    legacy encoding 0.5. Ordinary pages take 2 or 3 ms for 256 KB."""
    if body.count(b"<") > MOST_TAGS or body.count(b"&") > MOST_REFERENCES:
        return True
    return len(body) > MOST_LEGACY and sniff(body, content_type) != "utf-8"


def in_place(function: Callable[..., Any], body: bytes, *more: Any) -> Any:
    """A ``Read`` that just calls: for what need not be ended."""
    return function(body, *more)


def build_article(
    request: Request, outcome: Response | FetchError, feed: str | None, entry: FeedEntry | None, read: Read = in_place
) -> FeedResult:
    """The row of an article: what its feed says, else what the page says. Some 50 ms: trafilatura finds the text."""
    row = build_row(request, outcome, FeedResult)
    assert isinstance(row, FeedResult)
    row.feed = feed
    if entry is not None:
        row.title, row.author, row.published = entry.title or row.title, entry.author, entry.published
    if row.error is None and isinstance(outcome, Response) and is_html(row.content_type, outcome.body):
        try:
            found: Article = read(read_article, outcome.body, request.target, row.content_type)
        except FetchError as error:
            row.error = str(error)
            return row
        row.text, row.author, row.published = found.text, row.author or found.author, row.published or found.published
    return row


def is_html(content_type: str | None, body: bytes) -> bool:
    """Whether an answer is to be parsed: by its type; without one, if it begins like markup."""
    essence = (content_type or "").partition(";")[0].strip().lower()
    if not essence:
        return body[:512].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<"
    return essence in ("text/html", "application/xhtml+xml")
