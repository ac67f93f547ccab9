"""What the crawlers agree on: the records that pass between the files, the kinds of errors, the options, the URL rules.

Nothing here has a state, waits, or does I/O.
"""

from __future__ import annotations

import base64
import functools
import ipaddress
import math
import re
import urllib.parse
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import ada_url

from html_parse import is_normal

MAX_URL = 8192
"""Longest URL in characters; RFC 9110, section 4.1 asks for at least 8000."""
MAX_SECONDS = 1_000_000
"""Longest time in seconds that can be asked for (11 days): more than that the system's calls do not take."""
MAX_COUNT = 10**12
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
    "decode": "the body is not in the Content-Encoding that it claims, no feed, or not to be read to its end",
    "http": "an answer of status 400 or above",
    "blocked": "a public page or name led to a private address",
    "robots": "robots.txt forbids it, or could not be read, or is too costly to match",
    "duplicate": "it redirects to a page that has a row of its own",
    "interrupted": "the run was stopped before the answer was complete",
    "internal": "a fault of the crawler itself, kept to this one row",
}

CUT_OFF = "stopped before the answer was complete"
"""What an ``interrupted`` request says of itself."""

RETRY_KINDS = frozenset({"connect", "timeout", "reset", "truncated"})
RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
RESPONSE_HEADERS = (
    "Content-Encoding", "Content-Type", "Location", "Retry-After", "ETag", "Last-Modified", "X-Robots-Tag",
)  # fmt: skip
"""What a driver hands on of an answer's head."""


class FetchError(Exception):
    """A fetch that failed: ``kind`` is one of ERROR_KINDS, ``status`` that of the answer if its head came.

    ``answer``: that answer, if it was its body that failed.
    """

    def __init__(self, kind: str, detail: str, *, status: int | None = None, retry: bool | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.status = kind, detail, status
        self.retry = kind in RETRY_KINDS if retry is None else retry
        self.seconds = 0.0
        self.answer: Response | None = None


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
    listed: bool = False
    """The list names it: a page or sitemap did not lead here."""
    held: float = 0.0
    """Seconds that its present hop has waited for its turn to be sent."""
    strayed: bool = False
    """A redirect led to another origin: from then on, also back at the first one, no credentials of the user's."""


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
    allow_private: bool = False
    """Any request may go to private addresses."""

    def __post_init__(self) -> None:
        whole = {"concurrency": 1, "per_host": 1, "burst": 1, "max_bytes": 1}
        whole |= dict.fromkeys(("retries", "max_redirects", "depth", "max_pages", "host_pages"), 0)
        for name, least in whole.items():
            if not least <= getattr(self, name) <= MAX_COUNT:
                raise ValueError(f"{name} must be at least {least}, and at most {MAX_COUNT:,}")
        for name in ("timeout", "connect_timeout"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                raise ValueError(f"{name} must be above 0, and at most {MAX_SECONDS:,} seconds")
        for name in ("grace", "max_time"):
            if not 0 <= getattr(self, name) <= MAX_SECONDS:
                raise ValueError(f"{name} must be 0 or above, and at most {MAX_SECONDS:,} seconds")
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


# ------------------------------------------------------------------------------------------------------ headers

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2
_VALUE = re.compile(r"[\t -~]*")
_FRAMING = frozenset({"content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"})

_WANTED = {name.lower().encode(): name for name in RESPONSE_HEADERS}
_LISTS = {"Content-Encoding": ", ", "X-Robots-Tag": "\n"}
"""Of these each line counts, of the others the first one."""
_NOT_ASCII = re.compile(rb"[\x80-\xff]")


def read_headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Those of RESPONSE_HEADERS that are in the lines of a head, as text.

    Bytes outside ASCII are UTF-8, as browsers have it, or where they cannot be, Latin-1 (RFC 9110, section 5.5); in a
    Location such bytes are percent-encoded as they are, so that the server gets back what it sent.
    """
    found: dict[str, str] = {}
    for line, value in raw:
        name = _WANTED.get(line.lower())
        if name is None or (name in found and name not in _LISTS):
            continue
        value = value.strip(b" \t")
        try:
            text = value.decode()
        except UnicodeDecodeError:
            if name == "Location":
                value = _NOT_ASCII.sub(lambda byte: b"%%%02X" % byte[0][0], value)
            text = value.decode("latin-1")
        found[name] = found[name] + _LISTS[name] + text if name in found else text
    return found


# ---------------------------------------------------------------------------------------------------- URL rules


_HOST_AND_PORT = re.compile(r"(?!javascript|sms|tel)[a-z0-9.-]+:[0-9]{1,5}(?:[/?#]|$)")


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
        if _HOST_AND_PORT.match(url):
            raise FetchError("invalid_url", "not a URL; write http:// before it")
        raise FetchError("invalid_url", f"only http and https are fetched, not {url.partition(':')[0]}")
    url = url.partition("#")[0]
    authority = url.split("/", 3)[2]
    host = authority.rpartition("@")[2]
    return url, host[: host.index("]") + 1] if host.startswith("[") else host.partition(":")[0]


def origin(url: str) -> str:
    """Scheme, host and port of a normalised URL: what credentials are good for."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"


_HARMLESS = re.compile(
    "accept|accept-(?:charset|encoding|language)|cache-control|connection|dnt|from|pragma|priority|save-data"
    "|sec-(?:ch|fetch|gpc)[a-z-]*|upgrade-insecure-requests|user-agent",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a header may hold what only the servers of the list should see: any may that is not known for none."""
    return _HARMLESS.fullmatch(name) is None


_USERINFO = re.compile(r"(\s*(?:https?:[/\\]*|[a-z][a-z0-9+.-]*://))([^/\\?#]*)@", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(?:acct|cid|im|javascript|mailto|mid|sips?|xmpp):", re.IGNORECASE)
"""URLs in which an "@" has no password before it."""
HIDDEN = "<password>"
"""In the place of what may be one, in a line that is no URL; with it, it never becomes one."""


def split_credentials(line: str) -> tuple[str, str]:
    """A line of the list without what stands before the "@" of its host, and that: ``user:password``, or ``""``.

    What is no URL is shown all the same, so what may be a password in it is replaced.
    """
    if "@" not in line:
        return line, ""
    text, found = line, _USERINFO.match(line)
    if found is None:  # a spelling that only the URL standard takes for one, or no URL
        try:
            text = normalise(line)[0]
        except FetchError:
            at = line.rindex("@")
            start = line.rfind("//", 0, at) + 2
            if start < 2:
                start = 0
                if ":" not in line[:at] or _ADDRESS.match(line):
                    return line, ""
            return line[:start] + HIDDEN + line[at + 1 :], ""
        found = _USERINFO.match(text) if "@" in text.split("/")[2] else None
    return (line, "") if found is None else (found[1] + text[found.end() :], found[2])


def request_headers(
    options: Options,
    request: Request,
    named: Container[str] | None = None,
    credentials: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, str]]:
    """(URL without credentials, headers) to send.

    Credentials never go to another origin than the list named, nor to one that a page or a redirect chose: ``named``
    holds the origins of the list (None: the request is of the list). ``credentials`` are those that the list has for
    a URL, or for any other URL of its origin. Those in a URL that a page or a redirect names go where that URL goes.
    """
    headers = {
        "User-Agent": options.user_agent,
        "Accept": "text/html,application/xhtml+xml,*/*;q=0.8",
        "Accept-Encoding": ACCEPT_ENCODING,
    }
    if request.last_of_host:
        headers["Connection"] = "close"
    url, userinfo = split_credentials(request.target)
    if options.headers or credentials:
        first = normalise(request.url)[0] if request.hops else url
        home = origin(first)
        trusted = not request.strayed and origin(url) == home and (named is None or home in named)
        for name, value in options.headers:
            if trusted or not is_secret(name):
                for same in [sent for sent in headers if sent.lower() == name.lower()]:
                    del headers[same]
                headers[name] = value
        if trusted and credentials and not userinfo:
            userinfo = credentials.get(first) or credentials.get(home, "")
    if userinfo:
        user, _, password = map(urllib.parse.unquote_to_bytes, userinfo.partition(":"))
        headers["Authorization"] = "Basic " + base64.b64encode(user + b":" + password).decode()
    return url, headers


def proxy_url(text: str) -> str:
    """A proxy as a URL that both drivers understand; ``host:port`` is one, as in the environment. ``ValueError``."""
    try:
        url = normalise(text if "://" in text else f"http://{text}")[0]
        parts = urllib.parse.urlsplit(url)
        if url.startswith("http://") and parts.path == "/" and not parts.query and parts.port != 0:
            return url[:-1]
    except (FetchError, ValueError):
        pass
    raise ValueError(f"proxy must be http://host:port, not {split_credentials(text)[0]!r}") from None


# ---------------------------------------------------------------------------------------------------- addresses


def _ranges(*networks: str) -> tuple[tuple[int, int], ...]:
    parsed = [ipaddress.ip_network(network) for network in networks]
    return tuple((int(network.network_address), int(network.broadcast_address)) for network in parsed)


_NOT_PUBLIC_4 = _ranges(
    "0.0.0.0/8",  # this network (RFC 791)
    "10.0.0.0/8",  # private (RFC 1918)
    "100.64.0.0/10",  # behind a carrier's NAT (RFC 6598); a cloud's metadata at 100.100.100.200
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # Azure's platform (wire server, DNS): a public address that the machine's own host answers
    "169.254.0.0/16",  # link-local; metadata of most clouds at 169.254.169.254
    "172.16.0.0/12",  # private (RFC 1918)
    "192.0.0.0/24",  # IETF protocols; a cloud's metadata at 192.0.0.192
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # the relays of 6to4, withdrawn (RFC 7526)
    "192.168.0.0/16",  # private (RFC 1918)
    "198.18.0.0/15",  # benchmarks (RFC 2544)
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
)
_PUBLIC_6 = _ranges("2000::/3")  # all that has been given out for unicast (RFC 4291): the rest is closed by default
_NOT_PUBLIC_6 = _ranges(
    "2001::/23",  # IETF protocols: Teredo, benchmarks, ORCHID
    "2001:db8::/32",  # documentation
    "3fff::/20",  # documentation (RFC 9637)
)


@functools.lru_cache(1 << 14)
def is_public(address: str) -> bool:
    """Whether an IP address, as ``inet_ntop`` writes it, is one of the public internet. Never raises.

    The IANA special-purpose registries decide, from a table of our own, for ``ipaddress.is_global`` differs between
    versions of Python and takes multicast, site-local and several embedded addresses for global. Where an IPv6
    address stands for an IPv4 one (mapped, NAT64, 6to4), the latter counts. Closed: what has a scope, what no table
    knows, and what has other spellings (``010.0.0.1``, ``127.1``), which a socket might read in its own way.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    value = int(parsed)
    if parsed.version == 6:
        if "%" in address:
            return False
        prefix = value >> 32
        if value >> 112 == 0x2002:
            value = value >> 80 & 0xFFFF_FFFF
        elif prefix in (0xFFFF, 0x64_FF9B << 64):
            value &= 0xFFFF_FFFF
        else:
            return _within(value, _PUBLIC_6) and not _within(value, _NOT_PUBLIC_6)
    return not _within(value, _NOT_PUBLIC_4)


def _within(value: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= value <= last for first, last in ranges)


def names_private(host: str) -> bool:
    """Whether the host of a normalised URL says itself that it is not public: an address, or ``localhost``.

    Whoever writes such a host into the list means it. A name that only resolves to a private address does not count.
    """
    host = host.rstrip(".")
    if host[:1] == "[":
        return not is_public(host[1:-1])
    if host[-1:].isdecimal():  # in a normalised URL such a host is an IPv4 address
        return not is_public(host)
    return host == "localhost" or host.endswith(".localhost")


def leads_private(private: bool, found_on: str) -> bool:
    """``Request.private`` of what a request led to, by a link or a redirect on the host ``found_on``.

    The list's trust goes as far as the private hosts themselves reach: they may name any host; a public page, or a
    name, passes nothing on, even if a private page led to it.
    """
    return private and names_private(found_on)


def may_go_anywhere(options: Options, request: Request) -> bool:
    """Whether the addresses that the target resolves to need no check.

    Raises FetchError ``blocked`` if they do and the target names a private address itself: then nobody need be asked,
    and no proxy either.
    """
    if request.private or options.allow_private:
        return True
    if names_private(request.host):
        host = request.host.strip("[]")
        raise FetchError("blocked", f"{host} -> {host}")
    return False
