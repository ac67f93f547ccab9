"""One upstream of the aggregation API: the way of a call to it, and what is said of it at the deadline.

Cache -> one load for all who ask -> places, of this upstream and of all -> circuit breaker -> time limit ->
retries, under a budget -> pause, rate -> the request -> size limit and JSON check -> cache.

Promised
- However many ask, an upstream gets one call for a key at a time, and none while its circuit is open, but for probes;
  nor while it wants a pause (429, Retry-After): of the upstream, or of the key.
- Who waits for a place waits with no more than ``queue`` others, and no longer than a call may take.
- Each request that is sent is counted, and is one of ``rate`` a second.
- Whoever waits for a load may leave: ``refresh`` stays with it, and what comes late still fills the cache.
- What an upstream says when it fails reaches no client: errors are of the closed list in ``UpstreamError``.

Everything runs in one event loop, and nothing in it blocks. All state is the loop's, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp
import orjson
from yarl import URL

from api.config import Key, Upstream
from api.parts import Data, Load, Loaded, Part, Refused, UpstreamError, read_data
from api.renewals import Renewals
from api.report import percentiles
from coordination import Clock, Outcome, Semaphore
from primitives import CircuitBreaker, CircuitOpen, RetryBudget, RetryPolicy, TokenBucket, TTLCache, hedged, retry_async
from runtime.http_dates import parse_retry_after
from runtime.monitor import Histogram

log = logging.getLogger("uvicorn.error")

REFUSED = 1.0  # seconds for which a key is left alone after its load failed

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


def _is_failure(error: BaseException) -> bool:
    """Whether the circuit counts an error of a call."""
    return error.is_transient if isinstance(error, UpstreamError) else not isinstance(error, (Refused, CircuitOpen))


def make_session(places: int) -> aiohttp.ClientSession:
    """A client for at most ``places`` requests at a time, in the running loop."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=places, limit_per_host=0, resolver=aiohttp.ThreadedResolver()),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    session._retry_connection = False  # it would send again by itself, uncounted; no public switch
    return session


class Source:
    """One upstream: its cache, its circuit breaker, its places, and the loads that are under way."""

    def __init__(
        self, upstream: Upstream, session: aiohttp.ClientSession, places: Semaphore, clock: Clock = time.monotonic
    ) -> None:
        self.upstream, self._session, self._all_places, self._clock = upstream, session, places, clock
        self.listeners: list[Callable[[Load], None]] = []  # called for each load that ended, in its task
        self.tell: Callable[[Key | None, float], object] = lambda key, seconds: None  # of pauses that it wants
        self.renewals = Renewals(upstream.ttl, upstream.keys)
        self.cache: TTLCache[Key, Loaded] = TTLCache(
            upstream.keys, upstream.ttl, stale=upstream.stale, stale_if_error=upstream.stale_if_error, clock=clock
        )
        self.breaker = CircuitBreaker(
            upstream.name,
            failures=upstream.failures,
            ratio=upstream.ratio or None,
            minimum=upstream.minimum,
            window=upstream.window,
            reset=upstream.reset,
            max_reset=max(upstream.max_reset, upstream.reset),
            probe_timeout=max(upstream.reset, upstream.timeout),
            on=_is_failure,
            clock=clock,
        )
        self.refusals: TTLCache[Key, tuple[str, float]] = TTLCache(upstream.keys, REFUSED, clock=clock)
        """The error of a key that is not asked for again now, and when it may be: what trying again cannot mend (a
        404, say), or what wants to be left alone (Retry-After). The rest is the breaker's."""
        self._paused_until = -math.inf
        self._rate = TokenBucket(upstream.rate, max(1.0, upstream.rate), clock=clock) if upstream.rate else None
        self._places = Semaphore(upstream.concurrency)
        self._fallback = None if upstream.fallback is None else Data(orjson.dumps(upstream.fallback))
        self._budget, self._hedges = RetryBudget(), RetryBudget()
        self._policy = RetryPolicy(1 + upstream.retries, base=0.05, cap=1.0, total=upstream.timeout)
        self.running: set[asyncio.Task[Loaded]] = set()  # tasks that wait for loads
        self._current: dict[Key, asyncio.Task[Loaded]] = {}  # of these, one for each key that was not forgotten since
        self.calls = self.failures = 0
        self.refused = dict.fromkeys(Refused.STATES, 0)  # loads that made no call
        self._forgot = -math.inf
        self.answers: defaultdict[str, int] = defaultdict(int)  # parts of answers by state; a Counter is slower
        self.durations = Histogram()
        self.latencies: deque[float] = deque(maxlen=1000)  # seconds that the last loads took, failed ones included
        self.failing = False  # whether the last load was
        self.last_success: datetime | None = None
        self.last_error: str | None = None

    def key(self, given: Mapping[str, str]) -> Key:
        """The key of these parameters; what is missing has its default."""
        return tuple(given.get(name, default) for name, default in self.upstream.parameters.items())

    def known(self, key: Key) -> Part | asyncio.Task[Loaded]:
        """The part that the cache gives at once; else the load to wait for."""
        self.renewals.asked(key)
        hit = self.cache.lookup(key)
        if hit is None or hit.state == "expired":
            if (refusal := self.refusals.get(key)) is None:
                return self.refresh(key)
            return self._instead(key, "error", refusal[0], refusal[1] - self._clock())
        if hit.needs_refresh:
            self.refresh(key)
        return self._part(hit.state, hit.value, hit.age)

    def _part(self, state: str, loaded: Loaded, age: float, error: str | None = None) -> Part:
        window = 0.0 if state == "fresh" else self.upstream.stale
        if error is not None:
            window = max(window, self.upstream.stale_if_error)
        left = max(0.0, self.upstream.ttl + window - age)
        return Part(state, loaded.data, age, loaded.latency, error, left)

    def outcome(self, key: Key, load: Outcome[Loaded]) -> Part:
        """The part when the deadline came, or the load ended: its answer, else what is left of an older one."""
        loaded, problem = load.value, load.error
        if loaded is not None:
            age = self._clock() - loaded.at  # others in the same answer may have taken long since
            return self._part("fresh" if age < self.upstream.ttl else "stale", loaded, age)
        if isinstance(problem, Refused):
            return self._instead(key, problem.state, str(problem), problem.retry_after)
        if isinstance(problem, UpstreamError):
            return self._instead(key, "error", str(problem), self._pause_of(problem))
        if isinstance(problem, Exception):
            return self._instead(key, "error", "internal error")
        return self._instead(key, "timeout", "not here in time")

    def _pause_of(self, error: UpstreamError) -> float:
        """Seconds for which whoever got this error is left alone."""
        return max(REFUSED, min(error.retry_after or 0.0, self.upstream.max_pause))

    def pause(self, seconds: float, key: Key | None = None, error: str = "paused") -> None:
        """Make no call for so long, of ``key`` or (None) at all; at most for the configured ``max_pause``."""
        seconds = max(0.0, min(seconds, self.upstream.max_pause))
        until = self._clock() + seconds
        if key is None:
            self._paused_until = max(self._paused_until, until)
        elif seconds:
            self.cache.defer(key, seconds)
            self.refusals.put(key, (error, until), ttl=seconds)

    @property
    def paused_for(self) -> float:
        """Seconds for which no call is made, for the upstream wants it so."""
        return max(0.0, self._paused_until - self._clock())

    def _instead(self, key: Key, state: str, error: str, wait: float = 1.0) -> Part:
        """An older answer within its window, else the fallback, else why there is none."""
        hit = self.cache.lookup(key)
        if hit is not None:
            return self._part("stale", hit.value, hit.age, error)
        if self._fallback is not None:
            return Part("fallback", self._fallback, error=error, retry_after=wait)
        return Part(state, error=error, retry_after=wait)

    def refresh(self, key: Key, anew: bool = False) -> asyncio.Task[Loaded]:
        """The task that waits for the load of ``key``, one for all who ask: the load under way, or a new one if nothing
        fresh is there (``anew``: whatever is there)."""
        load = self._current.get(key)
        if load is None:
            load = self._current[key] = asyncio.create_task(
                self.cache.get_or_load_async(key, lambda: self._load(key), anew=anew), name=f"load {self.upstream.name}"
            )
            self.running.add(load)
            load.add_done_callback(lambda load: self._ended(key, load))
        return load

    def _ended(self, key: Key, load: asyncio.Task[Loaded]) -> None:
        self.running.discard(load)
        if self._current.get(key) is load:
            del self._current[key]
        if not load.cancelled():
            load.exception()  # ``_load`` has logged it

    def renew(self) -> int:
        """Load what is in use and about to expire; returns how many loads that began."""
        due = [key for key in self.renewals.due(self._clock()) if key not in self._current]
        for key in due:
            self.refresh(key, anew=True)
        return len(due)

    def warm(self, key: Key, encoded: bytes, age: float, latency: float) -> None:
        """Keep JSON that was loaded ``age`` seconds ago, in an earlier life: as stale, if its windows are not over,
        nothing younger is there, and nothing was invalidated since."""
        age = max(age, 0.001)
        at = self._clock() - age
        hit = self.cache.lookup(key)
        if at > self._forgot and (hit is None or hit.age > age):
            self.cache.put(key, Loaded(Data(encoded), latency, at), ttl=min(self.upstream.ttl, age), now=at)

    async def _load(self, key: Key) -> Loaded:
        generation, started = self.cache.generation(key), time.monotonic()
        data, problem = None, None
        try:
            data = await self._call(key)
        except Exception as error:
            problem = error
            self._failed(key, error, self.cache.generation(key) == generation)
            raise
        finally:
            latency, at = time.monotonic() - started, datetime.now(UTC)
            failure = problem if isinstance(problem, UpstreamError) else None
            if data is not None or failure is not None:
                self.latencies.append(latency)
                self.durations.observe(latency)
                parameters = dict(zip(self.upstream.parameters, key, strict=True))
                self._tell(Load(self.upstream.name, parameters, at, latency, data, failure))
            problem = failure = None  # its traceback leads here
        loaded = Loaded(data, latency, self._clock())
        if self.cache.generation(key) == generation:
            self.renewals.loaded(key, loaded.at)
        self.last_success, self.failing = at, False
        return loaded

    def _tell(self, load: Load) -> None:
        for listener in self.listeners:
            try:
                listener(load)
            except Exception:  # its fault must not be the source's
                log.exception("source %s: a listener failed", self.upstream.name)

    def _failed(self, key: Key, error: Exception, current: bool) -> None:
        """Not ``current``: the key was invalidated meanwhile, and this says nothing about it any more."""
        self.failing = True
        if isinstance(error, Refused):
            self.refused[error.state] += 1
        else:
            self.failures += 1
        if current:
            self.renewals.failed(key, self._clock())
            self.cache.defer(key, min(REFUSED, self.upstream.ttl))
            if isinstance(error, UpstreamError) and error.is_for_later:
                self.pause(self._pause_of(error), key, str(error))
                if error.retry_after:
                    self.tell(key, self._pause_of(error))
        if isinstance(error, UpstreamError):
            self.last_error = str(error)
        elif not isinstance(error, Refused):
            log.error("source %s: %r", self.upstream.name, error)

    async def _call(self, key: Key) -> Data:
        places = self._places.stats()
        if not places.available and places.waiting >= self.upstream.queue:
            raise Refused("busy", f"{self.upstream.queue} calls wait already", 1.0)
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self.upstream.timeout):
                    await held.enter_async_context(self._places)
                    await held.enter_async_context(self._all_places)
            except TimeoutError:
                raise Refused("busy", f"no place for a call within {self.upstream.timeout:g} s", 1.0) from None
            try:
                return await self.breaker.call_async(self._tries, key)
            except CircuitOpen as error:
                wait = error.retry_after
                raise Refused("open", f"circuit open for another {wait:.1f} s", wait) from None

    async def _tries(self, key: Key) -> Data:
        send, hedge = functools.partial(self._send, key), self.upstream.hedge
        try:
            async with asyncio.timeout(self.upstream.timeout):
                return await retry_async(
                    lambda: hedged(send, hedge, self._hedges) if hedge else send(),
                    on=lambda error: isinstance(error, UpstreamError) and error.is_transient,
                    policy=self._policy,
                    budget=self._budget,
                )
        except TimeoutError:
            raise UpstreamError("timeout", f"no answer within {self.upstream.timeout:g} s") from None

    async def _send(self, key: Key) -> Data:
        """Send a request, if none forbids it by now: neither others' failures, nor the upstream, nor its rate."""
        circuit = self.breaker.stats()
        if circuit.state == "open":
            raise CircuitOpen(self.upstream.name, circuit.retry_after)
        if (wait := self.paused_for) or (wait := self._key_pause(key)):
            raise Refused("paused", f"wants to be left alone for another {wait:.1f} s", wait)
        if self._rate is not None and not self._rate.try_acquire():
            raise Refused("busy", f"more than {self.upstream.rate:g} calls a second", max(1.0, self._rate.wait_for()))
        self.calls += 1
        return await self._fetch(key)

    def _key_pause(self, key: Key) -> float:
        refusal = self.refusals.get(key)
        return 0.0 if refusal is None else max(0.0, refusal[1] - self._clock())

    async def _fetch(self, key: Key) -> Data:
        limit, content = self.upstream.max_bytes, self.upstream.content(key)
        kind = {} if content is None else {"Content-Type": "application/json"}
        headers = {"X-Request-ID": request_id.get(), **kind, **self.upstream.headers}
        body = bytearray()
        try:
            async with self._session.request(
                self.upstream.method,
                URL(self.upstream.address(key), encoded=True),  # what was quoted stays so
                data=content,
                headers=headers,
                allow_redirects=False,
            ) as response:
                if not 200 <= response.status < 300:
                    later = parse_retry_after(response.headers.get("Retry-After"))
                    error = UpstreamError("http", str(response.status), later)
                    if error.is_pause:
                        self.pause(self._pause_of(error))
                        self.tell(None, self._pause_of(error))
                    raise error
                async for piece in response.content.iter_chunked(1 << 16):
                    body += piece
                    if len(body) > limit:
                        raise UpstreamError("too_large", f"more than {limit} bytes")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError("connect", type(error).__name__) from None
        return read_data(bytes(body), self.upstream.keep)

    def forget(self, key: Key | None = None) -> None:
        """Drop the answer for ``key`` (None: for any), and what is being loaded for it."""
        self._forgot = self._clock()
        if key is None:
            self.cache.clear()
            self.refusals.clear()
            self._current.clear()
            self.renewals.forget()
        else:
            self.cache.invalidate(key)
            self.refusals.invalidate(key)
            self._current.pop(key, None)

    def health(self) -> dict[str, Any]:
        """The state for ``/health``."""
        breaker, cache, last = self.breaker.stats(), self.cache.stats(), self.last_success
        return {
            "breaker": breaker.state,
            "waits_for_call": breaker.state == "half_open" and not cache.loading,
            "recent_failures": breaker.failures,
            "next_probe_s": round(breaker.retry_after, 3),
            "paused_s": round(self.paused_for, 3),
            "calls": self.calls,
            "failed_loads": self.failures,
            "refused_loads": dict(self.refused),
            "loading": cache.loading,
            "renewing": len(self.renewals),
            "answers": dict(self.answers),
            "latency_ms": {name: round(seconds * 1000, 1) for name, seconds in percentiles(self.latencies).items()},
            "recent_ms": [round(seconds * 1000, 1) for seconds in list(self.latencies)[-60:]],
            "last_success": None if last is None else last.isoformat(timespec="milliseconds"),
            "age_s": None if last is None else round((datetime.now(UTC) - last).total_seconds(), 3),
            "ttl_s": self.upstream.ttl,
            "last_error": self.last_error,
            "failing": self.failing,
            "cache": cache._asdict(),
        }
