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
- What status and headers decide (redirect, retry, pause, robots) is done, whatever the body is or fails to be.
- Passwords of the list are sent to their origin, and never written.

Not promised
- The order of the rows: they come as they complete.
- Where links are followed: which of the pages that lead to a URL is first, and so its depth; and with ``within`` any,
  where the list is not read first, that a URL of the list has a row of its own if a redirect was there before it.
- That the server's clock sees the bound exactly: the network may bunch what was sent apart.

Locks: ``Frontier._lock`` guards the frontier's state, each bucket and the visited set have theirs below it;
``Crawl._lock`` guards the bodies that were seen. None is held during I/O, parsing or user code. The one thread started
here reads the list (``Crawl.feed``), which may be long, or a pipe that blocks, into the frontier.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal

import ada_url

from coordination import Clock, Rng, new_lock
from crawl.addresses import leads_private
from crawl.cookies import store
from crawl.errors import MAX_RETRY_AFTER, REDIRECT_STATUSES, RETRY_STATUSES, FetchError, Postponed
from crawl.feed_crawl import FeedCrawl
from crawl.frontier import Frontier
from crawl.headers import request_headers
from crawl.model import CrawlResult, FeedResult, Options, Request, Response, ScrapeResult
from crawl.robots import DISALLOW_ALL, LARGE, MAX_HOPS, MAX_ROBOTS, Rules, rules_for
from crawl.rows import Read, build_row, in_place, is_costly
from crawl.scope import Scope, Traps
from crawl.sitemap_crawl import SitemapCrawl
from crawl.sitemaps import MAX_SITEMAP
from crawl.stats import Stats
from crawl.url_list import UrlList
from crawl.urls import is_secret, normalise, origin, split_credentials
from primitives import RetryPolicy
from runtime.http_dates import parse_retry_after

HELPERS_LEAD = 0.05
"""Seconds that a request is handed out before it may be sent, where it goes to another process first."""
BODY_PATIENCE = 1.0
"""Seconds for the body of an answer whose status and headers say already what is next: then the connection is kept."""


def body_matters(request: Request, status: int) -> bool:
    """Whether what becomes of an answer depends on its body: if not, no fault of the body is one of the answer's."""
    if 200 <= status < 300 or request.kind == "robots":
        return 200 <= status < 300
    return status < 400 and status not in REDIRECT_STATUSES and status != 304


def patience(request: Request, status: int) -> float | None:
    """Seconds to wait for the body of an answer; None: as long as the attempt has."""
    final = status >= 400 and status not in RETRY_STATUSES and request.kind != "robots"
    return None if final or body_matters(request, status) else BODY_PATIENCE


class Crawl:
    """One run: the frontier, the rules by which an answer becomes a row or goes round again, and the counts.

    A driver asks ``frontier.take``, fetches, hands the outcome to ``judge``, writes the row and tells
    ``frontier.finish``. ``changed`` is called, from whatever thread, when ``take`` may answer otherwise than before.
    """

    def __init__(
        self,
        options: Options,
        *,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
        frontier: Callable[..., Frontier] = Frontier,
        lead: float | None = None,
    ) -> None:
        """``lead``: seconds by which the frontier hands out a request before it may be sent; None: as threads and tasks
        need it."""
        self.options = options
        self.clock, self.rng = clock, rng
        self.follows = bool(options.depth or options.sitemaps)
        self.obeys = self.follows if options.robots is None else options.robots
        if lead is None:
            lead = 0.002 if max(options.rate, options.total_rate) > 5 else 0.0
        self.frontier = frontier(
            rate=options.rate,
            burst=options.burst,
            per_host=options.per_host,
            per_address=options.per_address,
            total_rate=options.total_rate,
            lead=lead,
            robots=self.obeys,
            host_pages=options.host_pages,
            max_pages=options.max_pages,
            adaptive=options.adaptive,
        )
        self.knows_first = self.follows and options.within != "any"
        """Whether the whole list is read before anything is fetched."""
        self.form = FeedResult if options.feeds else CrawlResult if self.follows else ScrapeResult  # what the rows are
        self.scope = Scope(
            within=options.within, include=options.include, exclude=options.exclude, drop_params=options.drop_params
        )
        self.traps = Traps()
        self.listed = UrlList(self.scope, guarded=any(is_secret(name) for name, _ in options.headers))
        self.stats = Stats(clock)
        self.sitemaps = SitemapCrawl(self.frontier, self.scope, self.stats, clock, allow_private=options.allow_private)
        self.feeds = FeedCrawl(self.frontier, self.scope, self.stats, clock, since=options.since)
        self._lock = new_lock("Crawl")
        self.bodies: dict[str, str] = {}  # with ``dedupe``: the digest of each body, and the URL that had it first
        self.policy = RetryPolicy(attempts=options.retries + 1, base=0.5, cap=30.0, total=900.0)
        self.changed: Callable[[], None] = lambda: None
        self.say: Callable[[str], None] = lambda text: None  # told what a user should know, in one line
        self.read: Read = in_place
        """By which feeds and articles are read; a driver has it done where it can be ended. Raises FetchError."""
        self._few_sockets = False  # the user knows
        self.interrupted = False
        self.ask_robots_only = False
        self.asked: Rules | None = None  # what robots.txt says, if only that was to be asked
        self.failure: BaseException | None = None
        """Why the run ended early, if it did: the list or the output could not be read or written."""
        self.loop_lags: Sequence[float] = ()
        """Seconds, of the last minute; none where there is no event loop, or none yet."""

    @property
    def told_anew(self) -> int:
        """How often all links that were told of have had to be told again."""
        return 0

    @contextlib.asynccontextmanager
    async def joined(
        self, put: Callable[[ScrapeResult], Awaitable[object]]
    ) -> AsyncIterator[Callable[[ScrapeResult], Awaitable[object]]]:
        """Around a driver in an event loop: where it puts its rows."""
        yield put

    def judge(self, request: Request, outcome: Response | FetchError) -> Response | FetchError | None:
        """What becomes of a request: the final outcome, for ``complete``, or None: it went back into the frontier."""
        now = self.clock()
        request.spent += outcome.seconds
        retry_after = None
        if self.options.adaptive and not request.error:
            self._report(request, outcome, now)
        if isinstance(outcome, FetchError) and outcome.answer and not body_matters(request, outcome.answer.status):
            outcome = outcome.answer
        if isinstance(outcome, FetchError):
            if not outcome.retry:
                return outcome
        else:
            if outcome.status < 200:
                return FetchError("protocol", f"{outcome.status} as the answer", status=outcome.status)
            if outcome.status in REDIRECT_STATUSES:
                return self._redirect(request, outcome, now)
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
        if outcome.status == 429 and retry_after is None:  # too much for the host, not for this request alone
            self.frontier.pause(request.host, now + delay, now)
            self.stats.count(pauses=1)
        request.attempt += 1
        request.spent = 0.0
        self.stats.count(retries=1)
        self.frontier.put_back(request, now, now + delay)
        return None

    def _redirect(self, request: Request, response: Response, now: float) -> FetchError | None:
        location = response.headers.get("Location")
        if not location:
            return FetchError("redirects", "no Location", status=response.status)
        try:
            target, host = normalise(ada_url.join_url(request.target, location))
            text, userinfo = split_credentials(target)
            if userinfo and userinfo == self.listed.credentials.get(origin(target)):
                target = text  # they are kept anyway
        except (ValueError, FetchError) as error:
            why = error.detail if isinstance(error, FetchError) else "not a URL"
            return FetchError("redirects", f"to {location[:200]!r}: {why}", status=response.status)
        most = MAX_HOPS if request.kind == "robots" else self.options.max_redirects
        if request.hops >= most:
            return FetchError("redirects", f"more than {most}", status=response.status)
        cookies = store(request.cookies, request.target, response.headers.get("Set-Cookie"))
        if target == request.target and cookies == request.cookies:
            return FetchError("redirects", "to itself", status=response.status)
        request.cookies, request.trail = cookies, (*request.trail, request.target)
        again = cookies and target in request.trail  # with a cookie it may answer otherwise
        if (self.follows or self.options.feeds) and request.kind == "page" and not again:
            if self.follows and not request.listed and (outside := self.scope.why_not(target)):
                return FetchError("redirects", f"to {target}: {outside}", status=response.status)
            if not self.frontier.mark(target):
                return FetchError("duplicate", f"redirects to {target}", status=response.status)
            if request.listed:
                self.scope.add(target)
        request.hops += 1
        request.private = leads_private(request.private, request.host)
        request.strayed = request.strayed or origin(target) != origin(request.target)
        self.stats.count(redirects=1)
        self.frontier.put_back(request, now, now, target, host)
        return None

    def _report(self, request: Request, outcome: Response | FetchError, now: float) -> None:
        late = isinstance(outcome, FetchError) and outcome.kind == "timeout"
        refused = outcome.status in (429, 503)
        if late or refused or isinstance(outcome, Response):
            verdict: Literal["ok", "refused", "timeout"] = "timeout" if late else "refused" if refused else "ok"
            self.frontier.report(request, verdict, outcome.seconds, now)

    def headers(self, request: Request) -> tuple[str, dict[str, str]]:
        """(URL without credentials, headers) to send."""
        url, headers = request_headers(self.options, request, self.listed.origins, self.listed.credentials)
        if request.kind == "feed":
            etag, last_modified = self.feeds.condition(request)
            if etag:
                headers["If-None-Match"] = etag
            if last_modified:
                headers["If-Modified-Since"] = last_modified
        return url, headers

    def complete(self, request: Request, outcome: Response | FetchError) -> ScrapeResult | None:
        """The row of a finished request, once what it leads to is in the frontier; None if it is none that has a row.

        Parses the body, in the caller's thread: 1 ms for 100 KB of HTML. What a library reads, feeds and articles, ten
        times slower, ``read`` does, while the caller waits.
        """
        if request.kind == "robots":
            self.learn_robots(request, outcome)
            return None
        if request.kind == "sitemap":
            self.sitemaps.read(request, outcome)
            self.changed()
            return None
        if self.options.feeds:
            result = self.feeds.row(request, outcome, self.read)
            if request.kind == "feed":
                self.changed()
            return result
        row = self.page_row(request, outcome)
        if not isinstance(row, CrawlResult):
            return row
        if row.digest:
            with self._lock:
                first = self.bodies.setdefault(row.digest, row.url)
            row.duplicate_of = None if first == row.url else first
        if row.duplicate_of is None:
            new = outcome.new_links if isinstance(outcome, Response) else None
            self.follow(row, leads_private(request.private, request.host), new, listed=request.listed)
        return row

    def page_row(self, request: Request, outcome: Response | FetchError) -> ScrapeResult:
        """The row of a page, without what other pages have to do with it."""
        if isinstance(outcome, Response) and outcome.row is not None:
            return outcome.row
        row = build_row(request, outcome, self.form, self.options.user_agent)
        if self.follows and row.pointer == "refresh" and row.redirects >= self.options.max_redirects:
            row.error = f"redirects: more than {self.options.max_redirects}"
        if self.options.dedupe and isinstance(row, CrawlResult) and isinstance(outcome, Response) and not row.error:
            row.digest = hashlib.blake2b(outcome.body, digest_size=12).hexdigest()
        return row

    def broken(self, request: Request, error: FetchError) -> ScrapeResult | None:
        """``complete``, for a request that an exception ended: whatever raised it may raise it again."""
        try:
            return self.complete(request, error)
        except Exception:
            return None if request.kind in ("robots", "sitemap") else build_row(request, error, self.form)

    def is_long(self, request: Request, response: Response, size: int) -> bool:
        """Whether ``complete`` may take longer than an event loop has: more than ``size`` bytes, or slower to read."""
        size = min(size, LARGE) if request.kind == "robots" else size
        if len(response.body) > size or request.kind in ("sitemap", "feed") or self.options.feeds:
            return True
        return request.kind == "page" and is_costly(response.body, response.headers.get("Content-Type"))

    def links_to_follow(self, row: CrawlResult) -> list[str]:
        """Those that the page lets us follow, in scope or not."""
        if row.depth >= self.options.depth or row.error or "nofollow" in (row.robots or ""):
            return []
        unwanted = set(row.nofollow)
        frames = row.leads_to[row.pointer == "refresh" :]
        return [*(link for link in row.links_found if link not in unwanted), *frames]

    def follow(
        self, row: CrawlResult, private: bool, links: Iterable[str] | None = None, *, listed: bool = False
    ) -> None:
        """Add where a page leads; of its links and frames only ``links``, if they are given.

        A refresh counts as a redirect: it is one of ``max_redirects``, costs no depth, and where a URL that is
        ``listed`` leads to is in scope.
        """
        if row.pointer == "refresh" and not row.error and "nofollow" not in (row.robots or ""):
            if listed:
                self.scope.add(row.leads_to[0])
            self._add_links(row.leads_to[:1], row.depth, private, hops=row.redirects + 1, listed=listed)
        self._add_links(self.links_to_follow(row) if links is None else links, row.depth + 1, private)

    def _add_links(self, links: Iterable[str], depth: int, private: bool, **more: Any) -> None:
        found = self.scope.targets(links)
        targets = [target for target in found if self.traps.why_not(target) is None]
        if targets and self.frontier.add_links(targets, depth, self.clock(), private=private, **more):
            self.changed()

    def learn_robots(self, request: Request, outcome: Response | FetchError) -> None:
        """robots.txt is here. If it cannot be had, the frontier draws its conclusion when the request is finished."""
        if self.interrupted:
            return  # nothing follows: a queue of large ones need not be read
        rules = rules_for(outcome, self.options.user_agent, request.target)
        sitemaps, rules.sitemaps = rules.sitemaps, ()  # the rules stay
        self.stats.count(robots=1)
        if self.ask_robots_only:
            self.asked = rules
            self.frontier.stop()
        elif rules is not DISALLOW_ALL:
            self.frontier.robots_known(origin(request.url), rules, self.clock())
            host = normalise(request.url)[1]
            if self.options.sitemaps and self.scope.has(host):
                self.sitemaps.add(sitemaps, host, leads_private(request.private, request.host))
        self.changed()

    def max_bytes(self, request: Request) -> tuple[int, bool]:
        """Size limit of the body that ``request`` asks for, and whether what is longer is cut there, or refused.

        What is cut has a byte more than its reader takes, who so knows that its last line may be half a line.
        """
        own = {"robots": MAX_ROBOTS, "sitemap": MAX_SITEMAP}.get(request.kind)
        return (self.options.max_bytes, False) if own is None else (own + 1, True)

    def feed(self, urls: Iterable[str]) -> threading.Thread:
        """Read ``urls`` into the frontier in a thread: the list may be long, or a pipe that blocks."""
        kind: Literal["page", "feed"] = "feed" if self.options.feeds else "page"  # what the URLs of the list are
        if self.options.max_time:
            self.frontier.stop_at(self.clock() + self.options.max_time)

        def read() -> None:
            batch: list[str] = []
            try:
                for url in self.listed.know_all(urls) if self.knows_first else urls:
                    batch.append(self.listed.keep_credentials(url))
                    if not self.knows_first and (len(batch) >= 200 or self.frontier.waiting < 200):
                        self._add(batch, kind)
                        self.changed()
                        batch = []
                self._add(batch, kind)  # with ``knows_first`` all of it, before a redirect could lead there
            except Exception as error:
                self.fail(error)
            self.frontier.close()
            self.changed()

        thread = threading.Thread(target=read, name="list", daemon=True)
        thread.start()
        return thread

    def _add(self, batch: list[str], kind: Literal["page", "feed"]) -> None:
        if self.follows or self.listed.origins is not None:
            for url in batch:
                self.listed.know(url)
        if kind == "feed":
            self.feeds.know(batch)
        self.frontier.add_all(batch, self.clock(), kind=kind)

    def fail(self, error: BaseException) -> None:
        """End the run: the list or the output could not be read or written."""
        self.failure = self.failure or error
        self.frontier.stop()
        self.changed()

    def no_socket(self, error: OSError) -> Postponed:
        """What to raise where the system gives no socket: those in use come free. Else ``error`` is raised."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS):
            raise error
        if not self._few_sockets:
            self._few_sockets = True
            self.say(f"goes on with fewer connections at a time: {error.strerror}")
        return Postponed(0.1)

    def remaining(self, request: Request) -> float:
        """Seconds left of this attempt's time limit."""
        return max(0.001, self.options.timeout - request.spent)
