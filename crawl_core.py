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

import contextlib
import http
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import ada_url

from coordination import new_lock
from crawl_rules import (
    MAX_RETRY_AFTER,
    REDIRECT_STATUSES,
    RETRY_STATUSES,
    FetchError,
    Options,
    Request,
    Response,
    ScrapeResult,
    is_secret,
    leads_private,
    normalise,
    origin,
)
from frontier import Frontier
from html_parse import parse_page
from primitives import Clock, RetryPolicy, Rng, parse_retry_after

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
        self.named: set[str] | None = set() if any(is_secret(name) for name, _ in options.headers) else None
        """The origins of the list, if there is something that only they may see. Added to by the thread that reads."""
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
        request.private = leads_private(request.private, request.host)
        request.strayed = request.strayed or origin(target) != origin(request.target)
        self.stats.count(redirects=1)
        self.frontier.put_back(request, now, now, target, host)
        return None

    def feed(self, urls: Iterable[str]) -> threading.Thread:
        """Read ``urls`` into the frontier in a thread: the list may be long, or a pipe that blocks."""

        def add(batch: list[str]) -> None:
            if self.named is not None:
                for url in batch:
                    with contextlib.suppress(FetchError):
                        self.named.add(origin(normalise(url)[0]))
            self.frontier.add_all(batch, self.clock())

        def read() -> None:
            batch: list[str] = []
            try:
                for url in urls:
                    batch.append(url)
                    if len(batch) >= 200 or self.frontier.waiting < 200:
                        add(batch)
                        self.changed()
                        batch = []
            except Exception as error:
                self.fail(error)
            add(batch)
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
