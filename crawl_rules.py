"""What the crawlers agree on: the records that pass between the files, the kinds of errors, the options, the URL rules.

Nothing here has a state, waits, or does I/O.
"""

from __future__ import annotations

import base64
import math
import urllib.parse
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import ada_url

from html_parse import is_normal

MAX_URL = 8192
"""Longest URL in characters; RFC 9110, section 4.1 asks for at least 8000."""
MAX_RETRY_AFTER = 600.0
"""Longest pause in seconds that a server can ask for."""
ACCEPT_ENCODING = "gzip, deflate, br, zstd"
USER_AGENT = "Mozilla/5.0 (compatible; flatcrawl/1.0)"

ERROR_KINDS = {
    "invalid_url": "the line of the list is not an http or https URL",
    "dns": "the host name has no address, or the name server did not answer",
    "connect": "no connection: refused, unreachable",
    "tls": "no secure connection: certificate or protocol",
    "timeout": "no complete answer within the time limit",
    "reset": "the server closed the connection before it answered",
    "protocol": "what came is not HTTP",
    "truncated": "the connection closed before the body was complete",
    "too_large": "the body is larger than the size limit",
    "redirects": "too many redirects, or one that leads nowhere",
    "decode": "the body is not in the Content-Encoding that it claims",
    "http": "an answer of status 400 or above",
    "blocked": "a public page or name led to a private address",
    "robots": "robots.txt forbids it, or could not be read",
    "duplicate": "it redirects to a page that has a row of its own",
    "interrupted": "the run was stopped before the answer was complete",
    "internal": "a fault of the crawler itself, kept to this one row",
}

RETRY_KINDS = frozenset({"connect", "timeout", "reset", "truncated"})
RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
RESPONSE_HEADERS = ("Content-Type", "Location", "Retry-After", "ETag", "Last-Modified", "X-Robots-Tag")
"""What a driver hands on of an answer's head."""


class FetchError(Exception):
    """A fetch that failed: ``kind`` is one of ERROR_KINDS, ``status`` that of the answer if its head came."""

    def __init__(self, kind: str, detail: str, *, status: int | None = None, retry: bool | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.status = kind, detail, status
        self.retry = kind in RETRY_KINDS if retry is None else retry
        self.seconds = 0.0


class Postponed(Exception):
    """The host was paused after this request had left the frontier, and before it was sent."""


# ------------------------------------------------------------------------------------------------------ records


@dataclass(slots=True)
class ScrapeResult:
    """One row. ``status`` is None when no answer came; ``error`` is None or ``kind: detail`` (see ERROR_KINDS)."""

    url: str
    """As the list names it."""
    status: int | None
    title: str | None
    word_count: int
    links_found: list[str]
    error: str | None
    fetched_at: str
    """ISO 8601, UTC: when the last answer or failure was complete."""
    duration_ms: float
    """The last attempt, its redirects included; the time spent waiting for politeness is not."""
    final_url: str | None = None
    """Where redirects led; None when no answer came."""
    attempts: int = 1
    redirects: int = 0
    content_type: str | None = None
    bytes: int = 0
    """Size of the body after decompression."""
    depth: int = 0
    language: str | None = None
    description: str | None = None
    canonical: str | None = None


@dataclass(slots=True)
class CrawlResult(ScrapeResult):
    """One row of a crawl that follows links. What a later run needs to go on is in it."""

    robots: str | None = None
    """What the page asks of robots that we are concerned by: ``noindex``, ``nofollow``, or both."""
    nofollow: list[str] = field(default_factory=list)
    """Those of ``links_found`` that are not to be followed."""
    digest: str | None = None
    """With ``--dedupe``: of the body."""
    duplicate_of: str | None = None
    """With ``--dedupe``: the URL whose body was the same, byte for byte, and came first."""


@dataclass(slots=True)
class FeedResult(ScrapeResult):
    """One row of ``--feeds``: of a feed (``kind`` is ``feed``, ``links_found`` are its new articles) or an article."""

    kind: str = "article"
    feed: str | None = None
    """The feed that led to the article."""
    author: str | None = None
    published: str | None = None
    """ISO 8601, UTC."""
    text: str | None = None
    entries: list[dict[str, str | None]] = field(default_factory=list)
    """What a feed says of its new articles."""
    etag: str | None = None
    last_modified: str | None = None
    """With ``etag``: what the feed's next request is made conditional on."""


@dataclass(slots=True, eq=False)
class Request:
    """One URL on its way. Owned by the worker that took it; by the frontier while it waits for a retry."""

    url: str
    target: str
    """What to fetch next: the normalised URL, later where a redirect led."""
    host: str
    depth: int = 0
    attempt: int = 1
    hops: int = 0
    spent: float = 0.0
    """Seconds that this attempt has used on earlier hops."""
    started: float = 0.0
    """When it was first taken (monotonic)."""
    last_of_host: bool = False
    """The list is read and nothing more waits for this host: the connection need not be kept."""
    error: FetchError | None = None
    """Known to be wrong before any request was made."""
    kind: Literal["page", "robots", "sitemap", "feed"] = "page"
    private: bool = False
    """The list names a private address, or such a page led here: it may go to private addresses."""


@dataclass(slots=True)
class Response:
    status: int
    headers: dict[str, str]
    """Those of RESPONSE_HEADERS that came."""
    body: bytes
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. Times are seconds, sizes bytes, rates requests per second; 0 means no limit of rate."""

    concurrency: int = 64
    per_host: int = 8
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
    depth: int = 0
    """How many links away from the list; 0: the list only."""
    within: Literal["host", "domain", "any"] = "host"
    """Where links are followed to: the host of the page that the list names, its registrable domain, anywhere."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Patterns of URLs to follow links to (none: all), and not to."""
    drop_params: tuple[str, ...] = ()
    """Patterns of the query parameters that links are freed of."""
    max_pages: int = 0
    host_pages: int = 0
    max_time: float = 0.0
    """Bounds of the whole crawl; 0: none."""
    robots: bool | None = None
    """Whether robots.txt is obeyed; None: if links are followed."""
    sitemaps: bool = False
    """Whether the pages of the sitemaps that robots.txt names are crawled too."""
    adaptive: bool = False
    dedupe: bool = False
    feeds: bool = False
    since: str | None = None
    """ISO 8601: no articles from before."""

    def __post_init__(self) -> None:
        whole = {"concurrency": 1, "per_host": 1, "burst": 1}
        whole |= dict.fromkeys(("retries", "max_redirects", "depth", "max_pages", "host_pages"), 0)
        for name, least in whole.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")
        for name in ("timeout", "connect_timeout", "max_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("rate", "total_rate", "grace", "max_time"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above")
        if self.feeds and (self.depth or self.sitemaps):
            raise ValueError("feeds have articles, not links to follow: no depth or sitemaps with it")
        for name, value in (("user_agent", self.user_agent), *self.headers):
            if not (name.isascii() and name.replace("-", "").replace("_", "").isalnum()) or set(value) & set("\r\n\0"):
                raise ValueError(f"not a valid header: {name!r}: {value!r}")
        if self.since is not None:
            try:
                datetime.fromisoformat(self.since)
            except ValueError:
                raise ValueError(f"since must be a date such as 2030-01-31, not {self.since!r}") from None
        if self.proxy and urllib.parse.urlsplit(self.proxy).scheme != "http":
            raise ValueError(f"proxy must be an http:// URL, not {self.proxy!r}")


# ---------------------------------------------------------------------------------------------------- URL rules


def normalise(text: str) -> tuple[str, str]:
    """(URL without fragment, host) as a browser understands ``text`` (WHATWG URL).

    Two spellings of one URL come out equal: case of scheme and host, default port, dot segments, percent-encoding
    of what must be encoded. Raises FetchError ``invalid_url``.
    """
    if len(text) > MAX_URL:
        raise FetchError("invalid_url", f"longer than {MAX_URL} characters")
    try:
        url: str = text if is_normal(text) else ada_url.normalize_url(text)
    except (ValueError, UnicodeError):
        hint = "" if "://" in text else "; write https:// before it"
        raise FetchError("invalid_url", f"not a URL{hint}") from None
    if not url.startswith(("http://", "https://")):
        raise FetchError("invalid_url", f"only http and https are fetched, not {url.partition(':')[0]}")
    url = url.partition("#")[0]
    authority = url.split("/", 3)[2]
    host = authority.rpartition("@")[2]
    return url, host[: host.index("]") + 1] if host.startswith("[") else host.partition(":")[0]


def origin(url: str) -> str:
    """Scheme, host and port of a normalised URL: what credentials are good for."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"


def request_headers(options: Options, request: Request) -> tuple[str, dict[str, str]]:
    """(URL without credentials, headers) to send. Credentials never go to another origin than the list named."""
    headers = {
        "User-Agent": options.user_agent,
        "Accept": "text/html,application/xhtml+xml,*/*;q=0.8",
        "Accept-Encoding": ACCEPT_ENCODING,
    }
    if request.last_of_host:
        headers["Connection"] = "close"
    url = request.target
    foreign = request.hops and origin(url) != origin(normalise(request.url)[0])
    private = ("authorization", "cookie", "proxy-authorization") if foreign else ()
    headers |= {name: value for name, value in options.headers if name.lower() not in private}
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    credentials, at, host = authority.rpartition("@")
    if at:
        user, _, password = (urllib.parse.unquote(part) for part in credentials.partition(":"))
        token = f"{user}:{password}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(token).decode()
        url = f"{scheme}://{host}{slash}{path}"
    return url, headers
