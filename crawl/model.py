"""What a crawl is made of: its options, a request, a response, and the rows that come of it.

Records only: nothing here has a lock or does I/O. A ``Request`` is owned by one worker at a time; ``Options`` cannot
change, and are checked when they are made (ValueError).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from coordination import Waiter
from crawl.cookies import Cookie
from crawl.errors import FetchError
from crawl.urls import proxy_url
from runtime.options import Range

MAX_SECONDS = 1_000_000
"""Longest time in seconds that can be asked for (11 days): more than that the system's calls do not take."""
MAX_COUNT = 10**12
USER_AGENT = "Mozilla/5.0 (compatible; flatcrawl/1.0)"
RESPONSE_HEADERS = (
    "Content-Encoding", "Content-Type", "Location", "Retry-After", "ETag", "Last-Modified", "X-Robots-Tag", "Refresh",
    "Set-Cookie",
)  # fmt: skip
"""What a driver hands on of an answer's head."""

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2
_VALUE = re.compile(r"[\t -~]*")
_FRAMING = frozenset({"content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"})


@dataclass(slots=True)
class ScrapeResult:
    """One row. ``status`` is None when no answer came; ``error`` is None or ``kind: detail`` (see ERROR_KINDS)."""

    url: str  # as the list names it
    status: int | None
    title: str | None
    word_count: int
    links_found: list[str]
    error: str | None
    fetched_at: str  # ISO 8601, UTC: when the last answer or failure was complete
    duration_ms: float  # the last attempt, its redirects included; the time spent waiting for politeness is not
    final_url: str | None = None  # where redirects led; None when no answer came
    attempts: int = 1
    redirects: int = 0  # those that a refresh asked for included
    content_type: str | None = None
    bytes: int = 0  # size of the body after decompression
    depth: int = 0
    language: str | None = None
    description: str | None = None
    canonical: str | None = None
    pointer: Literal["refresh", "frameset"] | None = None  # it only leads on, to the first of ``leads_to``, or all
    leads_to: list[str] = field(default_factory=list)  # besides its links: where it refreshes to, its frames and areas


@dataclass(slots=True)
class CrawlResult(ScrapeResult):
    """One row of a crawl that follows links. What a later run needs to go on is in it."""

    robots: str | None = None
    """What the page asks of robots that we are concerned by: ``noindex``, ``nofollow``, or both."""
    nofollow: list[str] = field(default_factory=list)  # those of ``links_found`` that are not to be followed
    digest: str | None = None  # with ``--dedupe``: of the body
    duplicate_of: str | None = None  # with ``--dedupe``: the URL whose body was the same, byte for byte, and came first


@dataclass(slots=True)
class FeedResult(ScrapeResult):
    """One row of ``--feeds``: of a feed (``kind`` is ``feed``, ``links_found`` are its new articles) or an article."""

    kind: str = "article"
    feed: str | None = None  # the feed that led to the article
    author: str | None = None
    published: str | None = None  # ISO 8601, UTC
    text: str | None = None
    entries: list[dict[str, str | None]] = field(default_factory=list)  # what a feed says of its new articles
    etag: str | None = None
    last_modified: str | None = None  # with ``etag``: what the feed's next request is made conditional on


@dataclass(slots=True, eq=False)
class Request:
    """One URL on its way. Owned by the worker that took it; by the frontier while it waits for a retry."""

    url: str
    target: str  # what to fetch next: the normalised URL, later where a redirect led
    host: str
    depth: int = 0
    attempt: int = 1
    hops: int = 0
    spent: float = 0.0  # seconds that this attempt has used on earlier hops
    started: float = 0.0  # when it was first taken (monotonic)
    last_of_host: bool = False  # the list is read and nothing more waits for this host: the connection need not be kept
    error: FetchError | None = None  # known to be wrong before any request was made
    kind: Literal["page", "robots", "sitemap", "feed"] = "page"
    private: bool = False  # the list names a private address, or such a page led here: it may go to private addresses
    listed: bool = False  # the list names it: a page or sitemap did not lead here
    held: float = 0.0  # seconds that its present hop has waited for its turn to be sent
    deaths: int = 0  # helpers that died while they had it
    told: Waiter | None = None  # in a helper: woken when its parent has said when it may be sent
    address: str | None = None  # with ``per_address``: for which it counts
    cookies: tuple[Cookie, ...] = ()
    trail: tuple[str, ...] = ()  # what redirected to ``target``, in turn
    strayed: bool = False
    """A redirect led to another origin: from then on, also back at the first one, no credentials of the user's."""


@dataclass(slots=True)
class Response:
    """An answer, read to its end."""

    status: int
    headers: dict[str, str]  # those of RESPONSE_HEADERS that came
    body: bytes
    seconds: float = 0.0
    row: ScrapeResult | None = None  # of a page that a helper has read; there is no body then
    new_links: list[str] | None = None
    """Those of the row's links to follow that were not told of before; None: all of them."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. Times are seconds, sizes bytes, rates requests per second; 0 means no limit of rate."""

    concurrency: int = 64
    per_host: int = 8
    per_address: int = 0  # connections at a time to one IP address, whatever its hosts; 0: no limit
    rate: float = 2.0
    burst: int = 1
    total_rate: float = 0.0
    timeout: float = 20.0
    connect_timeout: float = 10.0
    retries: int = 2
    max_bytes: int = 5_000_000
    max_redirects: int = 10
    grace: float = 5.0
    user_agent: str = USER_AGENT
    headers: tuple[tuple[str, str], ...] = ()
    proxy: str | None = None
    insecure: bool = False
    depth: int = 0  # how many links away from the list; 0: the list only
    within: Literal["host", "domain", "any"] = "host"
    """Where links are followed to: the host of the page that the list names, its registrable domain, anywhere."""
    include: tuple[str, ...] = ()  # patterns of URLs to follow links to; none: all
    exclude: tuple[str, ...] = ()  # and not to
    drop_params: tuple[str, ...] = ()  # patterns of the query parameters that links are freed of
    max_pages: int = 0
    host_pages: int = 0
    max_time: float = 0.0  # bounds of the whole crawl; 0: none
    robots: bool | None = None  # whether robots.txt is obeyed; None: if links are followed
    sitemaps: bool = False  # whether the pages of the sitemaps that robots.txt names are crawled too
    adaptive: bool = False
    dedupe: bool = False
    feeds: bool = False
    since: str | None = None  # ISO 8601: no articles from before
    allow_private: bool = False  # any request may go to private addresses

    def __post_init__(self) -> None:
        for names, allowed, unit in (
            (("concurrency", "per_host", "burst", "max_bytes"), Range(1, MAX_COUNT), ""),
            (("retries", "max_redirects", "depth", "max_pages", "host_pages", "per_address"), Range(0, MAX_COUNT), ""),
            (("timeout", "connect_timeout"), Range(0, MAX_SECONDS, above=True), " s"),
            (("grace", "max_time"), Range(0, MAX_SECONDS), " s"),
        ):
            for name in names:
                allowed.check(name, getattr(self, name), unit)
        for name in ("rate", "total_rate"):
            if (value := getattr(self, name)) and not 1 / MAX_SECONDS <= value < math.inf:
                raise ValueError(f"{name} must be 0 (no limit), or at least one request in {MAX_SECONDS:,} seconds")
        if self.feeds and (self.depth or self.sitemaps):
            raise ValueError("feeds have articles, not links to follow: no depth or sitemaps with it")
        if self.since is not None and not self.feeds:
            raise ValueError("since is about the articles of feeds: give feeds, too")
        for name, value in (("user_agent", self.user_agent), *self.headers):
            if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
                raise ValueError(f"not a valid header (ASCII, without control characters): {name!r}: {value!r}")
            if name.lower() in _FRAMING:
                raise ValueError(f"the header {name} is about the connection, and not for --header to set")
        if self.since is not None:
            try:
                datetime.fromisoformat(self.since)
            except ValueError:
                raise ValueError(f"since must be a date such as 2030-01-31, not {self.since!r}") from None
        if self.proxy is not None:
            proxy_url(self.proxy)
