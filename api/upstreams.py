"""One upstream of the aggregation API: the way of a call to it, and what is said of it at the deadline.

Cache -> one load for all who ask -> circuit breaker -> places, of this upstream and of all ->
time limit -> retries, under a budget -> size limit and JSON check -> cache.

Promised
- However many ask, an upstream gets one call for a key at a time, and none while its circuit is open, but for probes.
- Whoever waits for a load may leave: ``refresh`` stays with it, and what comes late still fills the cache.
- What an upstream says when it fails reaches no client: errors are of the closed list in ``UpstreamError``.

Everything runs in one event loop, and nothing in it blocks. All state is the loop's, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import hashlib
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import aiohttp
import orjson
from yarl import URL

from api.config import Key, Upstream
from api.renewals import Renewals
from api.report import percentiles
from coordination import Clock, Outcome, Semaphore
from primitives import CircuitBreaker, CircuitOpen, RetryBudget, RetryPolicy, TTLCache, hedged, retry_async
from runtime.http_dates import parse_retry_after

log = logging.getLogger("uvicorn.error")

REFUSED = 1.0  # seconds for which a key is left alone after its load failed

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


class UpstreamError(Exception):
    """Why a call failed, in words that may reach a client: ``kind`` is one of KINDS."""

    KINDS = ("connect", "timeout", "http", "too_large", "not_json", "missing")

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.retry_after = retry_after
        # whether to try again makes sense
        self.is_transient = kind in ("connect", "timeout") or detail in ("429", "500", "502", "503", "504")


class Data:
    """The answer of an upstream, encoded once: each of our answers copies it and hashes ``digest``."""

    __slots__ = ("digest", "encoded")

    def __init__(self, value: Any) -> None:
        self.encoded = orjson.dumps(value)
        self.digest = hashlib.blake2b(self.encoded, digest_size=12).hexdigest()


class Part(NamedTuple):
    """One source in one answer."""

    state: str
    data: Data | None = None
    age: float | None = None
    latency: float | None = None
    error: str | None = None
    expires_in: float = 0.0  # seconds for which the data may be said to be in this state
    retry_after: float = 1.0

    def encoded(self) -> bytes:
        """The part as JSON."""
        return b'{"state":"%b","data":%b,"age_s":%b,"latency_ms":%b,"error":%b}' % (
            self.state.encode(),
            b"null" if self.data is None else self.data.encoded,
            b"null" if self.age is None else b"%.3f" % self.age,
            b"null" if self.latency is None else b"%.1f" % (self.latency * 1000),
            b"null" if self.error is None else orjson.dumps(self.error),
        )


class Loaded(NamedTuple):
    """What the cache keeps of a load."""

    data: Data
    latency: float
    at: float  # by the clock of the source


class Load(NamedTuple):
    """The result of a load, for listeners; ``latency`` in seconds."""

    source: str
    parameters: dict[str, str]
    at: datetime
    latency: float
    data: Data | None
    error: UpstreamError | None


class Source:
    """One upstream: its cache, its circuit breaker, its places, and the loads that are under way."""

    def __init__(
        self, upstream: Upstream, session: aiohttp.ClientSession, places: Semaphore, clock: Clock = time.monotonic
    ) -> None:
        self.upstream, self._session, self._all_places, self._clock = upstream, session, places, clock
        self.listeners: list[Callable[[Load], None]] = []  # called for each load that ended, in its task
        self.renewals = Renewals(upstream.ttl, upstream.keys)
        self.cache: TTLCache[Key, Loaded] = TTLCache(
            upstream.keys, upstream.ttl, stale=upstream.stale, stale_if_error=upstream.stale_if_error, clock=clock
        )
        self.breaker = CircuitBreaker(
            upstream.name,
            failures=upstream.failures,
            window=upstream.window,
            reset=upstream.reset,
            max_reset=max(upstream.max_reset, upstream.reset),
            on=lambda error: not isinstance(error, UpstreamError) or error.is_transient,
            clock=clock,
        )
        self.refusals: TTLCache[Key, UpstreamError] = TTLCache(upstream.keys, REFUSED, clock=clock)
        """What trying again cannot mend (a 404, say) is not asked for again at once; the rest is the breaker's."""
        self._places = Semaphore(upstream.concurrency)
        self._fallback = None if upstream.fallback is None else Data(upstream.fallback)
        self._budget, self._hedges = RetryBudget(), RetryBudget()
        self._policy = RetryPolicy(1 + upstream.retries, base=0.05, cap=1.0, total=upstream.timeout)
        self.running: set[asyncio.Task[Loaded]] = set()  # tasks that wait for loads
        self._current: dict[Key, asyncio.Task[Loaded]] = {}  # of these, one for each key that was not forgotten since
        self.calls = self.failures = 0
        self._forgot = -math.inf
        self.answers: defaultdict[str, int] = defaultdict(int)  # parts of answers by state; a Counter is slower
        self.latencies: deque[float] = deque(maxlen=1000)  # seconds that the last loads took, failed ones included
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
            refusal = self.refusals.get(key)
            return self.refresh(key) if refusal is None else self._instead(key, "error", str(refusal))
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
        if isinstance(problem, CircuitOpen):
            wait = problem.retry_after
            return self._instead(key, "open", f"circuit open for another {wait:.1f} s", wait)
        if isinstance(problem, Exception):
            return self._instead(key, "error", str(problem) if isinstance(problem, UpstreamError) else "internal error")
        return self._instead(key, "timeout", "not here in time")

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

    def warm(self, key: Key, value: Any, age: float, latency: float) -> None:
        """Keep what was loaded ``age`` seconds ago, in an earlier life: as stale, if its windows are not over, nothing
        younger is there, and nothing was invalidated since."""
        age = max(age, 0.001)
        at = self._clock() - age
        hit = self.cache.lookup(key)
        if at > self._forgot and (hit is None or hit.age > age):
            self.cache.put(key, Loaded(Data(value), latency, at), ttl=min(self.upstream.ttl, age), now=at)

    async def _load(self, key: Key) -> Loaded:
        generation, started = self.cache.generation(key), time.monotonic()
        data, problem = None, None
        try:
            data = await self.breaker.call_async(self._call, key)
        except Exception as error:
            problem = error
            self._failed(key, error, self.cache.generation(key) == generation)
            raise
        finally:
            latency, at = time.monotonic() - started, datetime.now(UTC)
            failure = problem if isinstance(problem, UpstreamError) else None
            if data is not None or failure is not None:
                self.latencies.append(latency)
                parameters = dict(zip(self.upstream.parameters, key, strict=True))
                self._tell(Load(self.upstream.name, parameters, at, latency, data, failure))
            problem = failure = None  # its traceback leads here
        loaded = Loaded(data, latency, self._clock())
        if self.cache.generation(key) == generation:
            self.renewals.loaded(key, loaded.at)
        self.last_success = at
        return loaded

    def _tell(self, load: Load) -> None:
        for listener in self.listeners:
            try:
                listener(load)
            except Exception:  # its fault must not be the source's
                log.exception("source %s: a listener failed", self.upstream.name)

    def _failed(self, key: Key, error: Exception, current: bool) -> None:
        """Not ``current``: the key was invalidated meanwhile, and this says nothing about it any more."""
        self.failures += 1
        if current:
            self.renewals.failed(key, self._clock())
            self.cache.defer(key, min(REFUSED, self.upstream.ttl))
            if isinstance(error, UpstreamError) and not error.is_transient:
                self.refusals.put(key, copy.copy(error))  # the error itself holds the frames, and in them the body
        if isinstance(error, UpstreamError):
            self.last_error = str(error)
        elif not isinstance(error, CircuitOpen):
            log.error("source %s: %r", self.upstream.name, error)

    async def _call(self, key: Key) -> Data:
        async with self._places, self._all_places:
            try:
                async with asyncio.timeout(self.upstream.timeout):
                    fetch, hedge = functools.partial(self._fetch, key), self.upstream.hedge
                    return await retry_async(
                        lambda: hedged(fetch, hedge, self._hedges) if hedge else fetch(),
                        on=lambda error: isinstance(error, UpstreamError) and error.is_transient,
                        policy=self._policy,
                        budget=self._budget,
                    )
            except TimeoutError:
                raise UpstreamError("timeout", f"no answer within {self.upstream.timeout:g} s") from None

    async def _fetch(self, key: Key) -> Data:
        self.calls += 1
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
                    raise UpstreamError("http", str(response.status), later)
                async for piece in response.content.iter_chunked(1 << 16):
                    body += piece
                    if len(body) > limit:
                        raise UpstreamError("too_large", f"more than {limit} bytes")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError("connect", type(error).__name__) from None
        try:
            return Data(self._kept(orjson.loads(body)))
        except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # encoding fails on what is nested too deeply
            raise UpstreamError("not_json") from None

    def _kept(self, data: Any) -> Any:
        for name in filter(None, self.upstream.keep.split(".")):
            if not isinstance(data, dict) or name not in data:
                raise UpstreamError("missing", self.upstream.keep)
            data = data[name]
        return data

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
        breaker, last = self.breaker.stats(), self.last_success
        return {
            "breaker": breaker.state,
            "recent_failures": breaker.failures,
            "next_probe_s": round(breaker.retry_after, 3),
            "calls": self.calls,
            "failed_loads": self.failures,
            "loading": self.cache.stats().loading,
            "renewing": len(self.renewals),
            "answers": dict(self.answers),
            "latency_ms": {name: round(seconds * 1000, 1) for name, seconds in percentiles(self.latencies).items()},
            "recent_ms": [round(seconds * 1000, 1) for seconds in list(self.latencies)[-60:]],
            "last_success": None if last is None else last.isoformat(timespec="milliseconds"),
            "age_s": None if last is None else round((datetime.now(UTC) - last).total_seconds(), 3),
            "ttl_s": self.upstream.ttl,
            "last_error": self.last_error,
            "cache": self.cache.stats()._asdict(),
        }
