"""What the metadata API knows of a service: team, environment, region and version, and never a wait for it.

Theory
------
`Enricher.look` is called for every event and answers from memory, in well under a microsecond. What it does not know it
asks for: the name goes into a bounded queue, a few tasks take from it, and each load goes

    single flight -> circuit breaker -> time limit -> retries, under a budget -> size limit and check -> cache.

Who would rather wait a moment than store an event without metadata calls `wait`; who fills in later calls `load`.

Three things are remembered, each in a `TTLCache` of its own, so that invented names push out nothing that is real: what
is *known* (fresh for `ttl`, then stale for `stale` seconds: answered at once, while one load renews it), which names
the API does *not know* (404; for `unknown_ttl`), and which loads *failed* (not asked for again for `failed_for`).

In front of them is a plain dict of what `look` answered: that makes 0.15 us of the 0.9 that asking the caches costs
(measured), and an event can afford about 10 in all. It is emptied every `FRONT` seconds and whenever it has `maxsize`
names, and a name leaves it when its load ends. So an answer can be `FRONT` seconds older than the windows say; and that
an entry was used, or is stale, is noticed once in `FRONT` seconds instead of at each event. It holds "not known" too:
while the API is away, events cost no more.

Promised
- `look` never waits, raises nothing, and costs O(1). `wait` ends after its limit, whatever the API does.
- Of any number that want one service, one request at a time is made; none while the circuit is open, but for probes.
- A name is part of one path segment or query value: it changes neither the host nor the path. Names that no URL can
  hold ("", ".", "..") are not asked for: the API does not know them.
- Memory is bounded whatever names are invented: by `maxsize` names in each cache, and `waiting` in the queue. Beyond
  that `look` just says None, and the name is asked for when it comes again.
- Whatever the API sends, `Metadata` holds four texts of at most `LONGEST` characters that PostgreSQL can store.

Not promised: that a service gets its turn while more names than the queue holds are invented; that the API is asked
slowly for them (it is asked by no more than `tasks` at a time); or that what is stale is still true.

Everything runs in one event loop and belongs to it: no locks but those of the mechanisms, no threads, nothing that
blocks. `open` starts the tasks, `close` ends them; what is not loaded by then stays unknown, until somebody asks again.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

import aiohttp
import orjson
import yarl

from coordination import Clock, Rng, WorkerPool, stats_repr
from logs.parse import Metadata
from primitives import CircuitBreaker, CircuitOpen, RetryBudget, RetryPolicy, SingleFlight, TTLCache, retry_async
from runtime.http_dates import parse_retry_after

log = logging.getLogger(__name__)

FRONT = 1.0
"""Seconds for which an answer of ``look`` is given again without another thought."""
LONGEST = 255
"""Characters of a text of the API's; one with more is as wrong as a number."""
SPREAD = 0.1
"""The share of ``ttl`` by which entries expire earlier, at random: what was loaded together is not renewed together."""
RETRYABLE = (429, 500, 502, 503, 504)


class Unknown(enum.Enum):
    """What is said of a service that the API does not know."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN

Found = Metadata | Unknown | None
"""None: nothing is known, yet or any more."""

_ABSENT: Any = object()


class MetadataError(Exception):
    """A load failed; ``kind`` is one of KINDS.

    "internal" is an error that should not be; "closed": the enricher was closed meanwhile; "name": the API refuses
    this one (another status of 400 to 499).
    """

    KINDS = ("connect", "timeout", "status", "name", "redirect", "too large", "rubbish", "internal", "closed")

    def __init__(self, kind: str, detail: str, *, retryable: bool = False, retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.retryable, self.retry_after = kind, retryable, retry_after
        self.blames_api = kind not in ("name", "closed")
        """Whether the circuit breaker counts it: who invents names must not be able to open the circuit."""


class EnricherStats(NamedTuple):
    configured: bool
    cached: int
    """Services that are known, fresh or stale (or gone, but nobody looked since)."""
    unknown: int
    """Names that the API does not know."""
    hits: int
    """Looks that were answered, be it with UNKNOWN; those that ``wait`` takes are looks too."""
    misses: int
    loads: int
    """Requests that were begun for some name; retries do not count, nor what the open circuit refused."""
    failures: int
    """Loads that failed."""
    retries: int
    refused: int
    """Loads that the open circuit refused."""
    turned_away: int
    """Names that found the queue full."""
    waiting: int
    """Names in the queue."""
    loading: int
    waits: int
    """Calls of ``wait`` that still do."""
    breaker: str
    failed: dict[str, int]
    """The failures by kind."""
    last_error: str | None


def make_template(url: str) -> str:
    """The URL with ``{service}`` in it, at its end unless it is there; ValueError if it cannot be one."""
    template = url if "{service}" in url else url.rstrip("/") + "/{service}"
    parts = urlsplit(template)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the metadata API needs a URL like http://host/services/{service}")
    if "{service}" in parts.netloc or "{service}" in parts.fragment:
        raise ValueError("{service} can be part of the path or of the query of a URL only")
    yarl.URL(template.replace("{service}", "x"), encoded=True).port  # noqa: B018  -- ValueError if it is none
    return template


def address_of(template: str, service: str) -> yarl.URL | None:
    """The URL of a service; None if no URL can name it."""
    if service in ("", ".", ".."):
        return None
    try:
        quoted = quote(service, safe="")
    except UnicodeEncodeError:  # a lone surrogate
        return None
    return yarl.URL(template.replace("{service}", quoted), encoded=True)


def read_metadata(body: bytes | bytearray) -> Metadata:
    """The four texts of a JSON object, "" for what is missing or null; MetadataError if it is anything else."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise MetadataError("rubbish", "not JSON in UTF-8") from None
    if not isinstance(data, dict):
        raise MetadataError("rubbish", "not a JSON object")
    texts = []
    for name in Metadata._fields:
        text = data.get(name)
        if text is None:
            text = ""
        if not isinstance(text, str) or "\0" in text or len(text) > LONGEST:
            raise MetadataError("rubbish", f"{name} is no text of at most {LONGEST} characters without NUL")
        texts.append(text)
    return Metadata(*texts)


class _Wait:
    """One call of ``wait``: what it still misses, and what wakes it up."""

    __slots__ = ("missing", "over")

    def __init__(self, missing: set[str], over: asyncio.Future[None]) -> None:
        self.missing, self.over = missing, over

    def landed(self, service: str) -> None:
        self.missing.discard(service)
        if not self.missing:
            self.end()

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


class Enricher:
    """Metadata of services, from the API at ``url`` (``http://host/services/{service}``; None: there is none).

    Seconds: ``ttl`` and ``stale`` of what is known, ``unknown_ttl`` and ``failed_for`` of what is not, ``timeout`` of a
    load with its retry. ``maxsize``: names in each cache. ``tasks``: loads at a time, ``waiting``: names in the queue.
    ``max_bytes``: of an answer. ``reset``: seconds until an open circuit lets a probe through. Raises ValueError for a
    URL that is none, and for what the mechanisms refuse.
    """

    def __init__(
        self,
        url: str | None,
        *,
        ttl: float = 300.0,
        stale: float = 3600.0,
        unknown_ttl: float = 60.0,
        failed_for: float = 5.0,
        maxsize: int = 10_000,
        tasks: int = 8,
        waiting: int = 1000,
        timeout: float = 2.0,
        max_bytes: int = 65_536,
        reset: float = 2.0,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        if not (tasks >= 1 and waiting >= 1 and max_bytes >= 1 and timeout > 0):
            raise ValueError("tasks, waiting and max_bytes must be at least 1, timeout above 0 s")
        self._template = None if url is None else make_template(url)
        self.maxsize, self.tasks, self.waiting = maxsize, tasks, waiting
        self.timeout, self.max_bytes = timeout, max_bytes
        self.failed_for = failed_for
        self._clock, self._rng = clock, rng
        self._known: TTLCache[str, Metadata] = TTLCache(maxsize, ttl, stale=stale, clock=clock)
        self._unknown: TTLCache[str, Unknown] = TTLCache(maxsize, unknown_ttl, clock=clock)
        self._failed: TTLCache[str, float] = TTLCache(maxsize, failed_for, clock=clock)
        self._front: dict[str, Found] = {}
        self._front_until = clock() + FRONT
        self.breaker = CircuitBreaker(
            "metadata",
            failures=None,  # a share: that some odd name makes the API fail must not open the circuit
            ratio=0.5,
            minimum=10,
            window=10.0,
            reset=reset,
            max_reset=max(30.0, reset),
            probe_timeout=timeout + 1.0,
            on=lambda error: isinstance(error, MetadataError) and error.blames_api,
            clock=clock,
            rng=rng,
        )
        self._budget = RetryBudget()
        self._policy = RetryPolicy(attempts=2, base=0.05, cap=0.5, total=timeout)
        self._flights = SingleFlight()
        self._pool: WorkerPool[str] | None = None
        """Loads names; None while the enricher is not open."""
        self._asked: set[str] = set()
        """What is in the pool."""
        self._waits: set[_Wait] = set()
        self._session: aiohttp.ClientSession | None = None
        self._looks = self._misses = self._loads = self._turned_away = 0
        self._failures: Counter[str] = Counter()
        self._last_error: str | None = None

    @property
    def configured(self) -> bool:
        """Whether there is an API at all."""
        return self._template is not None

    async def open(self) -> None:
        """Begin to load what is asked for. Without an API nothing is started."""
        if self._pool is not None:
            raise RuntimeError("the enricher is open already")
        if self._template is None:
            return
        self._session = aiohttp.ClientSession(
            # The loads are bounded: by the tasks, and by who calls load. The system's resolver: an installed c-ares is
            # taken otherwise, which knows nothing of nsswitch.conf.
            connector=aiohttp.TCPConnector(limit=0, resolver=aiohttp.ThreadedResolver()),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # the limit is ours, in _call
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,  # nothing that could unpack to more than was counted
        )
        self._session._retry_connection = False  # it would try again by itself, past the budget; no public switch
        self._front.clear()
        self._pool = WorkerPool(self._load_asked, self.tasks, self.waiting, name="enrich").start_tasks()

    async def close(self) -> None:
        """Give up what is being loaded; whoever waits goes on. ``look`` still answers what is known."""
        pool, self._pool = self._pool, None
        session, self._session = self._session, None
        self._asked.clear()
        for wait in self._waits:
            wait.end()
        try:
            if pool is not None:
                await pool.close_async(0)
        finally:
            if session is not None:
                await session.close()
                await asyncio.sleep(0)  # the sockets are closed in the next turn of the loop

    async def __aenter__(self) -> Enricher:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------ the hot path

    def look(self, service: str) -> Found:
        """What is known, at once: ``Metadata``, ``UNKNOWN``, or None, and then it is asked for."""
        self._looks += 1
        found: Found = self._front.get(service, _ABSENT)
        if found is _ABSENT or self._clock() >= self._front_until:
            found = self._find(service)
        if found is None:
            self._misses += 1
        return found

    def _find(self, service: str) -> Found:
        if self._template is None:
            return None
        now = self._clock()
        if now >= self._front_until or len(self._front) >= self.maxsize:
            self._front.clear()
            self._front_until = now + FRONT
        found: Found
        if (hit := self._known.lookup(service, now)) is not None:
            found = hit.value
            if hit.needs_refresh:
                self._ask(service)
        else:
            found = self._unknown.get(service)
            if found is None and service not in self._failed:
                self._ask(service)
        self._front[service] = found
        return found

    def _ask(self, service: str) -> None:
        if self._pool is None or service in self._asked:
            return
        try:
            self._pool.submit(service, 0)
        except TimeoutError:
            self._turned_away += 1
        else:
            self._asked.add(service)

    # ------------------------------------------------------------------------------------------ waiting

    async def wait(self, services: Iterable[str], limit: float) -> None:
        """Until each of them is known or has failed, at most ``limit`` seconds.

        What cannot be asked for (the queue is full, it failed just now, nothing is open) is not waited for.
        """
        missing = {service for service in set(services) if self.look(service) is None and service in self._asked}
        if not missing or limit <= 0:
            return
        wait = _Wait(missing, asyncio.get_running_loop().create_future())
        self._waits.add(wait)
        try:
            await asyncio.wait((wait.over,), timeout=limit)
        finally:
            self._waits.discard(wait)

    def _landed(self, service: str) -> None:
        self._front.pop(service, None)
        for wait in self._waits:
            wait.landed(service)

    # ------------------------------------------------------------------------------------------ loading

    async def _load_asked(self, service: str) -> None:
        try:
            await self.load(service)
        finally:
            self._asked.discard(service)
            self._landed(service)

    async def load(self, service: str) -> Found:
        """What the API says, unless it said so just now; None if that failed, or if nothing is open."""
        if self._session is None:
            return None
        try:
            found: Found = await self._flights.do_async(service, lambda: self._load(service))
            return found
        except (MetadataError, CircuitOpen):
            return None

    async def _load(self, service: str) -> Found:
        known = self._known.get(service) or self._unknown.get(service)
        if known is not None:
            return known
        assert self._template is not None
        address = address_of(self._template, service)
        found: Metadata | Unknown = UNKNOWN
        if address is not None:
            try:
                found = await self.breaker.call_async(self._call, address)
            except MetadataError as error:
                self._failures[error.kind] += 1
                self._last_error = str(error)
                self._give_up(service, self.failed_for)
                raise
            except CircuitOpen as error:
                self._give_up(service, max(0.1, min(self.failed_for, error.retry_after)))
                raise
        if isinstance(found, Metadata):
            self._known.put(service, found, ttl=self._known.ttl * (1.0 - SPREAD * self._rng()))
        else:
            self._unknown.put(service, found)
            self._known.invalidate(service)
        self._failed.invalidate(service)
        self._landed(service)
        return found

    def _give_up(self, service: str, seconds: float) -> None:
        """It is not asked for again for so long. A stale answer stays one."""
        now = self._clock()
        self._known.defer(service, seconds, now)
        self._failed.put(service, now, ttl=seconds, now=now)

    async def _call(self, address: yarl.URL) -> Metadata | Unknown:
        self._loads += 1
        try:
            async with asyncio.timeout(self.timeout):
                return await retry_async(
                    lambda: self._fetch(address),
                    on=lambda error: isinstance(error, MetadataError) and error.retryable,
                    policy=self._policy,
                    budget=self._budget,
                    rng=self._rng,
                )
        except TimeoutError:
            raise MetadataError("timeout", f"no answer within {self.timeout:g} s") from None
        except MetadataError:
            raise
        except Exception as error:  # a fault of ours, or of a library's: it must not end the task
            if not self._failures["internal"]:
                log.exception("loading metadata; further errors of this kind are only counted")
            raise MetadataError("internal", type(error).__name__) from None

    async def _fetch(self, address: yarl.URL) -> Metadata | Unknown:
        if self._session is None:
            raise MetadataError("closed", "")
        body = bytearray()
        try:
            async with self._session.get(address, allow_redirects=False) as response:
                status, headers = response.status, response.headers
                if status in (200, 404):  # read to the end, and the connection can be used again
                    async for piece in response.content.iter_chunked(1 << 16):
                        body += piece
                        if len(body) > self.max_bytes:
                            raise MetadataError("too large", f"more than {self.max_bytes} bytes")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if self._session is None:
                raise MetadataError("closed", "") from None
            if isinstance(error, TimeoutError):
                raise MetadataError("timeout", "no connection in time") from None
            raise MetadataError("connect", type(error).__name__, retryable=True) from None
        if status == 200:
            return read_metadata(body)
        if status == 404:
            return UNKNOWN
        if 300 <= status < 400:
            raise MetadataError("redirect", str(status))
        if status in RETRYABLE:
            later = parse_retry_after(headers.get("Retry-After"))
            raise MetadataError("status", str(status), retryable=True, retry_after=later)
        raise MetadataError("name" if 400 <= status < 500 and status not in (401, 403) else "status", str(status))

    def stats(self) -> EnricherStats:
        breaker = self.breaker.stats()
        return EnricherStats(
            configured=self.configured,
            cached=len(self._known),
            unknown=len(self._unknown),
            hits=self._looks - self._misses,
            misses=self._misses,
            loads=self._loads,
            failures=self._failures.total(),
            retries=self._budget.stats().retries,
            refused=breaker.refused,
            turned_away=self._turned_away,
            waiting=0 if self._pool is None else self._pool.stats().queued,
            loading=self._flights.stats().flights,
            waits=len(self._waits),
            breaker=breaker.state,
            failed=dict(self._failures),
            last_error=self._last_error,
        )

    __repr__ = stats_repr
