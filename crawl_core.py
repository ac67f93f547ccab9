"""What both crawlers share: the decisions. The drivers only wait, read and write.

The way of a URL: a line of the list -> ``normalise`` -> ``Frontier.add_all`` (once per URL) -> ``Frontier.take`` -> the
driver's fetch -> ``Crawl.judge`` (a row? a retry? a redirect?) -> ``build_row`` -> the writer -> ``Frontier.finish``.

Promised
- One row for each distinct URL of the list: never none, never two, whatever the web sends. A URL is requested by one
  worker at a time, and a retry or redirect goes *back into the frontier*: no worker ever sleeps a back-off.
- Politeness: over all workers, a host is sent at most ``burst + rate * t`` requests in any window of ``t`` seconds,
  retries and redirects included. The tokens are taken at the moment of sending (``Frontier.clear_to_send``), when
  the connection is open: what a slow connect delays cannot bunch up. A Retry-After pauses its host only.
- A slow, failing or limited host holds up no other: hosts wait in one heap, ordered by when each may go next.
- Every size has a bound: the body after decompression, the redirects, the attempts, a line of the list.

Not promised
- The order of the rows: they come as they complete.
- That the server's clock sees the bound exactly: the network may bunch what was sent apart.

Locks: ``Frontier._lock`` guards the frontier's state, each bucket and the visited set have theirs below it;
``Stats._lock`` guards the counts. None is held during I/O, parsing or user code. The one thread started here reads the
list (``Crawl.feed``): it may be long, or a pipe that blocks; what the thread finds goes into the frontier at once.
"""

from __future__ import annotations

import base64
import heapq
import http
import math
import random
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ada_url

from coordination import Visited, new_lock
from html_parse import is_normal, parse_page
from primitives import NANOSECOND, Clock, RetryPolicy, Rng, TokenBucket, parse_retry_after

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
    "interrupted": "the run was stopped before the answer was complete",
    "internal": "a fault of the crawler itself, kept to this one row",
}

RETRY_KINDS = frozenset({"connect", "timeout", "reset", "truncated"})
RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
RESPONSE_HEADERS = ("Content-Type", "Location", "Retry-After")
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

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("per_host", 1), ("burst", 1), ("retries", 0), ("max_redirects", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")
        for name in ("timeout", "connect_timeout", "max_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("rate", "total_rate", "grace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or above")
        for name, value in (("user_agent", self.user_agent), *self.headers):
            if not (name.isascii() and name.replace("-", "").replace("_", "").isalnum()) or set(value) & set("\r\n\0"):
                raise ValueError(f"not a valid header: {name!r}: {value!r}")
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


# ----------------------------------------------------------------------------------------------------- frontier


class _Host:
    """What is known of one host. Guarded by the frontier's lock."""

    __slots__ = ("delayed", "due", "gate", "head", "in_flight", "name", "paused_until", "schedule", "waiting")

    def __init__(self, name: str, schedule: TokenBucket | None, gate: TokenBucket | None) -> None:
        self.name = name
        self.schedule, self.gate = schedule, gate
        self.waiting: list[str | tuple[str, str]] = []
        self.head = 0
        self.delayed: list[tuple[float, int, Request]] = []
        self.in_flight = 0
        self.due = math.inf
        self.paused_until = -math.inf

    def has_work(self) -> bool:
        return self.head < len(self.waiting) or bool(self.delayed)

    def pop_waiting(self) -> str | tuple[str, str]:
        entry = self.waiting[self.head]
        self.head += 1
        if self.head >= 32 and self.head * 2 >= len(self.waiting):
            del self.waiting[: self.head]
            self.head = 0
        return entry


@dataclass(frozen=True, slots=True)
class FrontierStats:
    waiting: int
    in_flight: int
    hosts: int
    seen: int
    duplicates: int
    closed: bool


class Frontier:
    """Which URL goes next, and when: the politeness and the fairness of a crawl, as a pure state machine.

    ``take(now)`` answers a Request to send, the seconds to wait (``inf``: until something changes), or None: nothing
    will ever come. Each host has its FIFO of waiting URLs, its token bucket, and at most one live entry in a heap
    ordered by the earliest time at which it may go (an entry that turns out to be early is put back: cheaper than
    finding and changing it). A step costs O(log hosts).

    Between leaving the frontier and being sent a request may have to connect, for a time that nobody knows. So there
    are two buckets of the same rate: the *schedule* is charged by ``take`` and spaces the requests as they leave; the
    *gate* is charged by ``clear_to_send`` at the moment of sending, and it alone is the promise. Where connections
    are quick the gate finds nothing to do. ``lead`` (seconds) is how much earlier than it may be sent a request is
    handed out, so that the driver is ready when the moment comes.
    """

    def __init__(
        self, *, rate: float = 2.0, burst: int = 1, per_host: int = 8, total_rate: float = 0.0, lead: float = 0.0
    ) -> None:
        self._rate, self._burst, self._per_host, self._lead = rate, burst, per_host, lead
        self._total_schedule = TokenBucket(total_rate) if total_rate else None
        self._total_gate = TokenBucket(total_rate) if total_rate else None
        self._lock = new_lock("Frontier")
        self._hosts: dict[str, _Host] = {}
        self._heap: list[tuple[float, int, _Host]] = []
        self._serial = 0
        self._visited: Visited[str] = Visited()
        self._refused: deque[Request] = deque()
        self._waiting = self._in_flight = 0
        self._closed = self._stopped = False

    def add_all(self, texts: Iterable[str], now: float) -> int:
        """Add URLs as they stand in a list; each distinct one once. Returns how many were new."""
        known: list[tuple[str, str, str]] = []
        refused: list[Request] = []
        for text in texts:
            try:
                known.append((text, *normalise(text)))
            except FetchError as error:
                refused.append(Request(text, text, "", error=error))
        with self._lock:
            before = len(self._visited)
            for text, target, host_name in known:
                if self._visited.add(target):
                    host = self._host(host_name)
                    host.waiting.append(target if text == target else (text, target))
                    self._waiting += 1
                    if host.due == math.inf:
                        self._schedule(host, now)
            for request in refused:
                if self._visited.add(request.url):
                    self._refused.append(request)
                    self._waiting += 1
            return len(self._visited) - before

    @property
    def waiting(self) -> int:
        return self._waiting

    def close(self) -> None:
        """No more URLs will be added from outside."""
        with self._lock:
            self._closed = True

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._lock:
            self._stopped = True

    def take(self, now: float) -> Request | float | None:
        with self._lock:
            if self._stopped:
                return None
            if self._refused:
                self._waiting -= 1
                self._in_flight += 1
                return self._refused.popleft()
            if not self._waiting:
                return None if self._closed and not self._in_flight else math.inf
            soon = now + self._lead
            if self._total_schedule and self._total_gate:
                wait = max(self._total_schedule.wait_for(1, now), self._total_gate.wait_for(1, now)) - self._lead
                if wait > NANOSECOND:
                    return wait
            while self._heap:
                due, _, host = self._heap[0]
                if due > soon + NANOSECOND:
                    return due - soon
                heapq.heappop(self._heap)
                if due != host.due or self._hosts.get(host.name) is not host:
                    continue  # superseded by an earlier entry, or forgotten
                host.due = math.inf
                due = self._due(host, now)
                if due > soon + NANOSECOND:
                    self._push(host, due)
                    self._forget_idle(host, now)
                    continue
                return self._hand_out(host, now)
            return math.inf

    def clear_to_send(self, request: Request, now: float) -> float:
        """0.0: send now, the tokens are taken. Else the seconds after which to ask again.

        Raises Postponed when that would be longer than a second, for instance because the host was paused meanwhile:
        the worker puts the request back instead of waiting for it.
        """
        with self._lock:
            host = self._hosts[request.host]
            gates = [gate for gate in (host.gate, self._total_gate) if gate]
            wait = max(host.paused_until - now, *(gate.wait_for(1, now) for gate in gates), 0.0)
            if wait > 1.0:
                raise Postponed
            if wait > NANOSECOND:
                return wait
            for gate in gates:
                gate.reserve(1, now)
            return 0.0

    def pause(self, host_name: str, until: float, now: float) -> None:
        """Send nothing to this host before ``until`` (Retry-After)."""
        with self._lock:
            host = self._host(host_name)
            host.paused_until = max(host.paused_until, until)
            for bucket in (host.schedule, host.gate):
                if bucket:
                    bucket.pause(until)

    def finish(self, request: Request, now: float) -> None:
        """The request is done with: its row is written."""
        with self._lock:
            self._leave(request, now)

    def put_back(
        self, request: Request, now: float, not_before: float, target: str | None = None, host_name: str | None = None
    ) -> None:
        """The request is not done: it goes (to ``target`` on ``host_name``, if given) no sooner than ``not_before``."""
        with self._lock:
            self._leave(request, now)
            request.target, request.host = target or request.target, host_name or request.host
            host = self._host(request.host)
            heapq.heappush(host.delayed, (not_before, self._next_serial(), request))
            self._waiting += 1
            self._schedule(host, now)

    def stats(self) -> FrontierStats:
        with self._lock:
            return FrontierStats(self._waiting, self._in_flight, len(self._hosts), *self._visited.stats(), self._closed)

    def __repr__(self) -> str:
        s = self.stats()
        return f"<Frontier {s.waiting} waiting on {s.hosts} hosts, {s.in_flight} in flight>"

    # The rest runs under the lock.

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            schedule, gate = (TokenBucket(self._rate, self._burst) if self._rate else None for _ in range(2))
            host = self._hosts[name] = _Host(name, schedule, gate)
        return host

    def _due(self, host: _Host, now: float) -> float:
        """When the host's next request may leave the frontier; inf if it has none, or enough in flight."""
        if host.in_flight >= self._per_host:
            return math.inf
        if host.head < len(host.waiting):
            due = now
        elif host.delayed:
            due = max(now, host.delayed[0][0])
        else:
            return math.inf
        if host.schedule and host.gate:
            due = max(due, now + host.schedule.wait_for(1, now), now + host.gate.wait_for(1, now))
        return max(due, host.paused_until)

    def _push(self, host: _Host, due: float) -> None:
        if due < host.due:
            host.due = due
            heapq.heappush(self._heap, (due, self._next_serial(), host))

    def _schedule(self, host: _Host, now: float) -> None:
        self._push(host, self._due(host, now))

    def _hand_out(self, host: _Host, now: float) -> Request:
        if host.delayed and (host.delayed[0][0] <= now or host.head >= len(host.waiting)):
            request = heapq.heappop(host.delayed)[2]
        else:
            entry = host.pop_waiting()
            url, target = (entry, entry) if isinstance(entry, str) else entry
            request = Request(url, target, host.name, started=now)
        self._waiting -= 1
        self._in_flight += 1
        host.in_flight += 1
        for bucket in (host.schedule, self._total_schedule):
            if bucket:
                bucket.reserve(1, now)
        request.last_of_host = self._closed and not host.has_work()
        self._schedule(host, now)
        return request

    def _leave(self, request: Request, now: float) -> None:
        self._in_flight -= 1
        if request.error:
            return
        host = self._hosts[request.host]
        host.in_flight -= 1
        if host.has_work():
            self._schedule(host, now)
        else:
            self._forget_idle(host, now)

    def _forget_idle(self, host: _Host, now: float) -> None:
        """Drop a host with nothing to do once its bucket is full again: the memory follows the hosts at work."""
        if host.in_flight or host.has_work():
            return
        free_at = host.paused_until
        for bucket in (host.schedule, host.gate):
            if bucket:
                free_at = max(free_at, now + bucket.wait_for(self._burst, now))
        if free_at <= now:
            self._hosts.pop(host.name, None)
        else:
            # Entries are looked at ``lead`` early; a millisecond more, so that it is surely over when this one is.
            self._push(host, free_at + self._lead + 0.001)


# -------------------------------------------------------------------------------------------------------- rules


class Stats:
    """What a run has done so far."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._lock = new_lock("Stats")
        self._clock = clock
        self.started = clock()
        self.rows = self.ok = self.bytes = self.retries = self.redirects = self.pauses = 0
        self.errors: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()

    def count(self, **what: int) -> None:
        with self._lock:
            for name, n in what.items():
                setattr(self, name, getattr(self, name) + n)

    def count_row(self, row: ScrapeResult) -> None:
        with self._lock:
            self.rows += 1
            self.bytes += row.bytes
            if row.status is not None:
                self.statuses[row.status] += 1
            if row.error is None:
                self.ok += 1
            else:
                self.errors[row.error.partition(":")[0]] += 1

    def snapshot(self) -> dict[str, Any]:
        """The counts as JSON-able values; ``seconds`` since the start."""
        with self._lock:
            seconds = max(1e-9, self._clock() - self.started)
            return {
                "rows": self.rows,
                "ok": self.ok,
                "failed": self.rows - self.ok,
                "errors": dict(self.errors.most_common()),
                "statuses": {str(status): n for status, n in sorted(self.statuses.items())},
                "retries": self.retries,
                "redirects": self.redirects,
                "pauses": self.pauses,
                "bytes": self.bytes,
                "seconds": round(seconds, 3),
                "rows_per_second": round(self.rows / seconds, 1),
            }


class Crawl:
    """One run: the frontier, the rules by which an answer becomes a row or goes round again, and the counts.

    A driver asks ``frontier.take``, fetches, hands the outcome to ``judge``, writes the row and tells
    ``frontier.finish``. ``changed`` is called, from whatever thread, when ``take`` may answer otherwise than before.
    """

    def __init__(self, options: Options, *, clock: Clock = time.monotonic, rng: Rng = random.random) -> None:
        self.options = options
        self.clock, self.rng = clock, rng
        fast = max(options.rate, options.total_rate) > 5
        self.frontier = Frontier(
            rate=options.rate,
            burst=options.burst,
            per_host=options.per_host,
            total_rate=options.total_rate,
            lead=0.002 if fast else 0.0,
        )
        self.policy = RetryPolicy(attempts=options.retries + 1, base=0.5, cap=30.0, total=900.0)
        self.stats = Stats(clock)
        self.changed: Callable[[], None] = lambda: None
        self.interrupted = False
        self.failure: BaseException | None = None
        """Why the run ended early, if it did: the list or the output could not be read or written."""

    def judge(self, request: Request, outcome: Response | FetchError) -> Response | FetchError | None:
        """What becomes of a request: the final outcome, for its row, or None: it went back into the frontier."""
        now = self.clock()
        request.spent += outcome.seconds
        retry_after = None
        if isinstance(outcome, FetchError):
            if not outcome.retry:
                return outcome
        else:
            if outcome.status < 200:
                return FetchError("protocol", f"{outcome.status} as the answer", status=outcome.status)
            if outcome.status in REDIRECT_STATUSES:
                return self._follow(request, outcome, now)
            if outcome.status not in RETRY_STATUSES:
                return outcome
            if outcome.status in (429, 503):
                retry_after = parse_retry_after(outcome.headers.get("Retry-After"), maximum=MAX_RETRY_AFTER)
                if retry_after is not None:
                    self.frontier.pause(request.host, now + retry_after, now)
                    self.stats.count(pauses=1)
        delay = self.policy.delay(request.attempt, self.rng, retry_after, now - request.started)
        if delay is None:
            return outcome
        request.attempt += 1
        request.spent = 0.0
        self.stats.count(retries=1)
        self.frontier.put_back(request, now, now + delay)
        return None

    def _follow(self, request: Request, response: Response, now: float) -> FetchError | None:
        location = response.headers.get("Location")
        if not location:
            return FetchError("redirects", "no Location", status=response.status)
        try:
            target, host = normalise(ada_url.join_url(request.target, location))
        except (ValueError, FetchError) as error:
            why = error.detail if isinstance(error, FetchError) else "not a URL"
            return FetchError("redirects", f"to {location[:200]!r}: {why}", status=response.status)
        if request.hops >= self.options.max_redirects:
            return FetchError("redirects", f"more than {self.options.max_redirects}", status=response.status)
        if target == request.target:
            return FetchError("redirects", "to itself", status=response.status)
        request.hops += 1
        self.stats.count(redirects=1)
        self.frontier.put_back(request, now, now, target, host)
        return None

    def feed(self, urls: Iterable[str]) -> threading.Thread:
        """Read ``urls`` into the frontier in a thread: the list may be long, or a pipe that blocks."""

        def read() -> None:
            batch: list[str] = []
            try:
                for url in urls:
                    batch.append(url)
                    if len(batch) >= 200 or self.frontier.waiting < 200:
                        self.frontier.add_all(batch, self.clock())
                        self.changed()
                        batch = []
            except Exception as error:
                self.fail(error)
            self.frontier.add_all(batch, self.clock())
            self.frontier.close()
            self.changed()

        thread = threading.Thread(target=read, name="list", daemon=True)
        thread.start()
        return thread

    def fail(self, error: BaseException) -> None:
        """End the run: the list or the output could not be read or written."""
        self.failure = self.failure or error
        self.frontier.stop()
        self.changed()

    def remaining(self, request: Request) -> float:
        """Seconds left of this attempt's time limit."""
        return max(0.001, self.options.timeout - request.spent)


def build_row(request: Request, outcome: Response | FetchError) -> ScrapeResult:
    """The row of a finished request. Parses the page: 1 ms for 100 KB or so, in the caller's thread."""
    row = ScrapeResult(
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
    elif is_html(content_type, outcome.body):
        page = parse_page(outcome.body, request.target, content_type)
        row.title, row.word_count, row.links_found = page.title, page.word_count, page.links
        row.language, row.description, row.canonical = page.language, page.description, page.canonical
    return row


_REASONS = {status.value: status.phrase for status in http.HTTPStatus}


def is_html(content_type: str | None, body: bytes) -> bool:
    """Whether an answer is to be parsed: by its type; without one, if it begins like markup."""
    essence = (content_type or "").partition(";")[0].strip().lower()
    if not essence:
        return body[:512].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<"
    return essence in ("text/html", "application/xhtml+xml")
