"""The aggregation API: one fast, honest endpoint before flaky upstreams.

    uvicorn aggregate_app:app

``GET /aggregate`` asks many upstreams at once and answers with what is there at the deadline: for each source its
data, and how it came by it (``fresh``, ``stale``, ``fallback``, ``timeout``, ``error``, ``open``). The upstreams are
those of the TOML file that ``AGGREGATE_CONFIG`` names; without it, four demo upstreams on loopback, one of them flaky.

The way of a call: cache -> one load for all who ask (``Source.refresh``) -> circuit breaker -> places, of this upstream
and of all -> time limit -> retries, under a budget -> size limit and JSON check -> cache.

Promised
- A request waits for its deadline at most; the deadline cuts the wait, not the load: what comes late fills the cache.
- What is stale is served at once, while one load in the background renews it; it never carries a full max-age.
- However many ask, an upstream gets one call for a key at a time, and none while its circuit is open, but for probes.
- A parameter is part of a path segment or of a query value; it can change neither the host nor the path.
- What an upstream says when it fails reaches no client: errors are of the closed list in ``UpstreamError``.

Not promised: that a load ends with the server. On a stop, loads under way get ``GRACE`` seconds, then are cancelled.

Everything runs in the event loop of the server, and nothing in it blocks: the sandbox of the demo has a thread of its
own. All state is the loop's, so nothing here needs a lock; the mechanisms of ``primitives`` bring their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import hashlib
import hmac
import ipaddress
import itertools
import logging
import math
import os
import re
import secrets
import string
import time
import tomllib
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urlsplit

import aiohttp
import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from primitives import (
    CircuitBreaker,
    CircuitOpen,
    Clock,
    Hit,
    RetryBudget,
    RetryPolicy,
    Semaphore,
    TokenBucket,
    TTLCache,
    parse_retry_after,
    retry_async,
)

log = logging.getLogger("uvicorn.error")

GRACE = 5.0
"""Seconds that loads under way get when the server stops."""
REFUSED = 1.0
"""Seconds for which a key is left alone after its load failed."""
CLIENT_RATE, CLIENT_BURST, CLIENTS = 1000.0, 2000, 10_000
"""Requests per second of one client (``AGGREGATE_RATE`` overrides, 0: any number), and how many are known at a time."""
PLACES = 256
"""Calls under way to all upstreams together."""
MAX_PARAMETER = 200
"""Characters of a parameter's value."""
DEADLINE_MS = 1, 1000, 30_000
"""The least, usual and greatest ``deadline_ms``."""

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")

Key = tuple[str, ...]
"""The values of an upstream's parameters, in their order."""


class ConfigError(ValueError):
    """One line that names what is wrong in the configuration."""


class UpstreamError(Exception):
    """Why a call failed, in words that may reach a client: ``kind`` is one of KINDS."""

    KINDS = ("connect", "timeout", "http", "too_large", "not_json", "missing")

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.retry_after = retry_after
        self.passes = kind in ("connect", "timeout") or detail in ("429", "500", "502", "503", "504")
        """Whether to try again makes sense."""


# ------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True, slots=True)
class Upstream:
    """What the configuration says of an upstream; times are in seconds, ``parameters`` are names and defaults."""

    name: str
    url: str
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout: float = 2.0
    ttl: float = 10.0
    stale: float = 60.0
    stale_if_error: float = 600.0
    retries: int = 1
    failures: int = 5
    window: float = 10.0
    reset: float = 15.0
    concurrency: int = 16
    max_bytes: int = 1_000_000
    keys: int = 1000
    keep: str = ""
    fallback: Any = None

    def address(self, key: Key) -> str:
        """The URL for these values of the parameters."""
        values = zip(self.parameters, key, strict=True)
        return self.url.format_map({name: quote(value, safe="") for name, value in values})


def read_config(text: str, environ: Mapping[str, str]) -> dict[str, Upstream]:
    """The upstreams of a TOML configuration, by name: a table ``[name]`` each. Raises ``ConfigError``.

    ``${NAME}`` in a header's value stands for a variable of the environment: secrets need not be in the file.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from None
    if not tables:
        raise ConfigError("no upstream: a table [name] with a url is needed for each")
    return {name: _upstream(name, table, environ) for name, table in tables.items()}


def _upstream(name: str, table: Any, environ: Mapping[str, str]) -> Upstream:
    if not isinstance(table, dict):
        raise ConfigError(f"{name}: not a table; an upstream is [{name}] with a url")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,40}", name):
        raise ConfigError(f"{name!r}: a name is made of up to 41 letters, digits, _ and -, and begins with a letter")
    known = {field.name for field in dataclasses.fields(Upstream)} - {"name"}
    whole = dict.fromkeys(("retries", "failures", "concurrency", "max_bytes", "keys"), int)
    given: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{name}.{key}: no such key; there are {', '.join(sorted(known))}")
        if key in ("parameters", "headers"):
            if not isinstance(value, dict) or not all(isinstance(v, (str, int, float)) for v in value.values()):
                raise ConfigError(f"{name}.{key}: a table of names and texts is needed")
            given[key] = {inner: str(text) for inner, text in value.items()}
            continue
        if key in ("url", "keep"):
            if not isinstance(value, str):
                raise ConfigError(f"{name}.{key}: a text is needed, not {value!r}")
        elif key != "fallback":
            number = isinstance(value, int if key in whole else (int, float)) and not isinstance(value, bool)
            if not number:
                raise ConfigError(f"{name}.{key}: a {'whole ' * (key in whole)}number is needed, not {value!r}")
            least = 0 if key in ("retries", "stale", "stale_if_error") else 1 if key in whole else 0.001
            if not least <= float(value) < 1e9:
                raise ConfigError(f"{name}.{key}: a number from {least} to a thousand million is needed, not {value!r}")
        given[key] = value
    if "url" not in given:
        raise ConfigError(f"{name}.url: missing")
    for header, value in given.get("headers", {}).items():
        try:
            given["headers"][header] = string.Template(value).substitute(environ)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{name}.headers.{header}: {error} is not in the environment") from None
    upstream = Upstream(name=name, **given)
    _check_url(upstream)
    return upstream


def _check_url(upstream: Upstream) -> None:
    """A placeholder may stand in a path segment or in the query only, where it can change nothing else."""
    try:
        placeholders = [field for _, field, _, _ in string.Formatter().parse(upstream.url) if field is not None]
    except ValueError as error:
        raise ConfigError(f"{upstream.name}.url: {error}") from None
    for placeholder in placeholders:
        if placeholder not in upstream.parameters:
            raise ConfigError(f"{upstream.name}.url: {{{placeholder}}} is not among its parameters")
    parts = urlsplit(upstream.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "{" in parts.netloc or "@" in parts.netloc:
        raise ConfigError(f"{upstream.name}.url: http:// or https:// and a fixed host are needed")


DEMO = """
[weather]
url = "{base}/api/weather?city={{city}}"
parameters = {{ city = "Berlin" }}
ttl = 5

[rates]
url = "{base}/api/rates/{{currency}}"
parameters = {{ currency = "EUR" }}
keep = "rates"

[news]
url = "{base}/api/news"
keep = "items"
ttl = 20

[flaky]
url = "{base}/api/flaky"
ttl = 2
retries = 0
fallback = {{ note = "nothing better is known" }}
"""


# ------------------------------------------------------------------------------------------------------- sources


class Data:
    """What an upstream said, encoded once: every answer that has it in it copies ``json`` and hashes ``digest``."""

    __slots__ = ("digest", "json", "value")

    def __init__(self, value: Any) -> None:
        encoded = orjson.dumps(value)
        self.value = value
        self.json = orjson.Fragment(encoded)
        self.digest = hashlib.blake2b(encoded, digest_size=12).hexdigest()


class Part(NamedTuple):
    """What is known of one source for one answer."""

    state: str
    data: Data | None = None
    age: float | None = None
    latency: float | None = None
    error: str | None = None
    expires_in: float = 0.0
    """Seconds for which the data stays fresh."""
    retry_after: float = 1.0

    def shown(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "data": None if self.data is None else self.data.json,
            "age_s": None if self.age is None else round(self.age, 3),
            "latency_ms": None if self.latency is None else round(self.latency * 1000, 1),
            "error": self.error,
        }


class Loaded(NamedTuple):
    data: Data
    latency: float


class Source:
    """One upstream: its cache, its circuit breaker, its places, and the loads that are under way."""

    def __init__(
        self, upstream: Upstream, session: aiohttp.ClientSession, places: Semaphore, clock: Clock = time.monotonic
    ) -> None:
        self.upstream, self._session, self._all_places = upstream, session, places
        self.cache: TTLCache[Key, Loaded] = TTLCache(
            upstream.keys, upstream.ttl, stale=upstream.stale, stale_if_error=upstream.stale_if_error, clock=clock
        )
        self.breaker = CircuitBreaker(
            upstream.name,
            failures=upstream.failures,
            window=upstream.window,
            reset=upstream.reset,
            max_reset=max(300.0, upstream.reset),
            on=lambda error: not isinstance(error, UpstreamError) or error.passes,
            clock=clock,
        )
        self.refusals: TTLCache[Key, UpstreamError] = TTLCache(upstream.keys, REFUSED, clock=clock)
        """What trying again cannot mend (a 404, say) is not asked for again at once; the rest is the breaker's."""
        self._places = Semaphore(upstream.concurrency)
        self._fallback = None if upstream.fallback is None else Data(upstream.fallback)
        self._budget = RetryBudget()
        self._policy = RetryPolicy(1 + upstream.retries, base=0.05, cap=1.0, total=upstream.timeout)
        self.loads: dict[Key, asyncio.Task[Loaded]] = {}
        """The load of each key that is under way. It is a task of its own, for it outlives those who wait for it."""
        self.running: set[asyncio.Task[Loaded]] = set()
        """These, and those that nobody joins any more, for their key was invalidated."""
        self.calls = self.failures = 0
        self.answers: Counter[str] = Counter()
        """How many parts of answers were in each state."""
        self.latencies: deque[float] = deque(maxlen=1000)
        """Seconds that the last loads took, the failed ones included."""
        self.last_success: datetime | None = None

    def key(self, given: Mapping[str, str]) -> Key:
        return tuple(given.get(name, default) for name, default in self.upstream.parameters.items())

    def known(self, key: Key) -> tuple[Part | None, asyncio.Task[Loaded] | None]:
        """What can be said at once, and the load to wait for if that is nothing."""
        hit = self.cache.lookup(key)
        if hit is None or hit.state == "expired":
            refusal = self.refusals.get(key)
            return (None, self.refresh(key)) if refusal is None else (self._instead(key, "error", str(refusal)), None)
        if hit.refresh:
            self.refresh(key)
        return self._part(hit.state, hit), None

    def _part(self, state: str, hit: Hit[Loaded], error: str | None = None) -> Part:
        left = max(0.0, self.upstream.ttl - hit.age) if state == "fresh" else 0.0
        return Part(state, hit.value.data, hit.age, hit.value.latency, error, left)

    def outcome(self, key: Key, load: asyncio.Task[Loaded]) -> Part:
        """What is known once the deadline came, or the load ended: its answer, else what is left of an older one."""
        if load.done() and not load.cancelled() and load.exception() is None:
            return Part("fresh", load.result().data, 0.0, load.result().latency, None, self.upstream.ttl)
        state, error, wait = "timeout", "not here in time", 1.0
        if load.done() and not load.cancelled():
            problem = load.exception()
            state, error = "error", str(problem) if isinstance(problem, UpstreamError) else "internal error"
            if isinstance(problem, CircuitOpen):
                wait = problem.retry_after
                state, error = "open", f"circuit open for another {wait:.1f} s"
        return self._instead(key, state, error, wait)

    def _instead(self, key: Key, state: str, error: str, wait: float = 1.0) -> Part:
        """An older answer within its window, else the fallback, else why there is none."""
        hit = self.cache.lookup(key)
        if hit is not None:
            return self._part("stale", hit, error)
        if self._fallback is not None:
            return Part("fallback", self._fallback, error=error, retry_after=wait)
        return Part(state, error=error, retry_after=wait)

    def refresh(self, key: Key) -> asyncio.Task[Loaded]:
        """The load of ``key`` that is under way, or a new one."""
        load = self.loads.get(key)
        if load is None:
            load = self.loads[key] = asyncio.create_task(self._load(key), name=f"load {self.upstream.name}")
            self.running.add(load)
            load.add_done_callback(lambda done: self._ended(key, done))
        return load

    def _ended(self, key: Key, load: asyncio.Task[Loaded]) -> None:
        self.running.discard(load)
        if self.loads.get(key) is load:
            del self.loads[key]
        if load.cancelled():
            return
        error = load.exception()
        if error is not None:
            self.failures += 1
            self.cache.defer(key, min(REFUSED, self.upstream.ttl))
            if isinstance(error, UpstreamError) and not error.passes:
                self.refusals.put(key, error)
            if not isinstance(error, (UpstreamError, CircuitOpen)):
                log.error("source %s: %r", self.upstream.name, error)

    async def _load(self, key: Key) -> Loaded:
        generation, started = self.cache.generation(key), time.monotonic()
        try:
            data = await self.breaker.call_async(self._call, key)
        except UpstreamError:
            self.latencies.append(time.monotonic() - started)
            raise
        loaded = Loaded(data, time.monotonic() - started)
        self.latencies.append(loaded.latency)
        self.cache.put(key, loaded, cost=loaded.latency, generation=generation)
        self.last_success = datetime.now(UTC)
        return loaded

    async def _call(self, key: Key) -> Data:
        async with self._places, self._all_places:
            try:
                async with asyncio.timeout(self.upstream.timeout):
                    return await retry_async(
                        lambda: self._fetch(key),
                        on=lambda error: isinstance(error, UpstreamError) and error.passes,
                        policy=self._policy,
                        budget=self._budget,
                    )
            except TimeoutError:
                raise UpstreamError("timeout", f"no answer within {self.upstream.timeout:g} s") from None

    async def _fetch(self, key: Key) -> Data:
        self.calls += 1
        limit = self.upstream.max_bytes
        body = b""
        try:
            async with self._session.get(
                self.upstream.address(key),
                headers={"X-Request-ID": request_id.get(), **self.upstream.headers},
                allow_redirects=False,
            ) as response:
                if response.status != 200:
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
        """Keep neither the answer for ``key`` (None: for any) nor what is being loaded for it."""
        if key is None:
            self.cache.clear()
            self.refusals.clear()
            self.loads.clear()
        else:
            self.cache.invalidate(key)
            self.refusals.invalidate(key)
            self.loads.pop(key, None)

    def health(self) -> dict[str, Any]:
        breaker = self.breaker.stats()
        return {
            "breaker": breaker.state,
            "recent_failures": breaker.failures,
            "next_probe_s": round(breaker.retry_after, 3),
            "calls": self.calls,
            "failed_loads": self.failures,
            "loading": len(self.loads),
            "answers": dict(self.answers),
            "latency_ms": {name: round(seconds * 1000, 1) for name, seconds in percentiles(self.latencies).items()},
            "last_success": None if self.last_success is None else self.last_success.isoformat(timespec="seconds"),
            "cache": self.cache.stats()._asdict(),
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 by the nearest rank; nothing of nothing."""
    ranked = sorted(seconds)
    return {f"p{p}": ranked[math.ceil(len(ranked) * p / 100) - 1] for p in (50, 95, 99)} if ranked else {}


class Lag:
    """How late the event loop wakes a sleeper: what a call that blocks it would cost everybody. Seconds."""

    def __init__(self, every: float = 0.25, keep: int = 240) -> None:
        self._every = every
        self.recent: deque[float] = deque([0.0], maxlen=keep)

    async def watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._every
            await asyncio.sleep(self._every)
            self.recent.append(max(0.0, loop.time() - due))


class Exporter(Collector):
    """What ``/metrics`` shows, read from the sources' own counts when it is asked for: a request pays nothing."""

    def __init__(self, sources: Mapping[str, Source], lag: Lag) -> None:
        self._sources, self._lag = sources, lag

    def collect(self) -> Iterator[Metric]:
        answers = CounterMetricFamily(
            "aggregate_answers", "Parts of answers by their state", labels=("source", "state")
        )
        calls = CounterMetricFamily("aggregate_upstream_calls", "Requests sent, retries included", labels=("source",))
        failed = CounterMetricFamily("aggregate_failed_loads", "Loads that ended in an error", labels=("source",))
        refused = CounterMetricFamily("aggregate_refused_calls", "Calls that the breaker refused", labels=("source",))
        circuit = GaugeMetricFamily("aggregate_circuit_open", "0 closed, 0.5 half-open, 1 open", labels=("source",))
        cached = GaugeMetricFamily("aggregate_cache_entries", "Answers kept", labels=("source",))
        latency = GaugeMetricFamily(
            "aggregate_upstream_latency_seconds", "Of the last 1,000 loads", labels=("source", "quantile")
        )
        for name, source in self._sources.items():
            for state, count in source.answers.items():
                answers.add_metric((name, state), count)
            breaker = source.breaker.stats()
            calls.add_metric((name,), source.calls)
            failed.add_metric((name,), source.failures)
            refused.add_metric((name,), breaker.refused)
            circuit.add_metric((name,), {"closed": 0.0, "half_open": 0.5, "open": 1.0}[breaker.state])
            cached.add_metric((name,), len(source.cache))
            for quantile, seconds in percentiles(source.latencies).items():
                latency.add_metric((name, f"0.{quantile[1:]}"), seconds)
        yield from (answers, calls, failed, refused, circuit, cached, latency)
        yield GaugeMetricFamily("aggregate_loop_lag_seconds", "Longest of the last minute", max(self._lag.recent))


# -------------------------------------------------------------------------------------------------------- routes


class Problem(HTTPException):
    """An RFC 9457 problem document, with members of its own."""

    def __init__(self, status: int, title: str, headers: dict[str, str] | None = None, **members: Any) -> None:
        super().__init__(status, title, headers)
        self.members = members


async def problem(_: Request, error: Exception) -> Response:
    failure = cast(HTTPException, error)
    members = failure.members if isinstance(failure, Problem) else {}
    body = {"type": "about:blank", "title": failure.detail, "status": failure.status_code, **members}
    headers = dict(failure.headers or {})
    return Response(orjson.dumps(body), failure.status_code, headers, "application/problem+json")


def reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")


def sources_of(request: Request) -> dict[str, Source]:
    return cast(dict[str, Source], request.app.state.sources)


def wanted(request: Request, names: Sequence[str] | None) -> tuple[dict[str, Source], float]:
    """The sources a request asks for, and its deadline in seconds. ``Problem`` if it asks for what is not there."""
    sources, query = sources_of(request), request.query_params
    if names is None:
        names = query["sources"].split(",") if "sources" in query else list(sources)
    unknown = [name for name in names if name not in sources]
    if unknown:
        raise Problem(404, f"unknown source {unknown[0][:50]}", sources=sorted(sources))
    chosen = {name: sources[name] for name in names}
    allowed = {"deadline_ms", "sources", *(name for source in chosen.values() for name in source.upstream.parameters)}
    for name, value in query.items():
        if name not in allowed:
            raise Problem(422, f"no parameter {name[:50]} here", parameter=name[:50], parameters=sorted(allowed))
        if name != "sources" and (not value or len(value) > MAX_PARAMETER or value in (".", "..")):
            raise Problem(422, f"{name} must have 1 to {MAX_PARAMETER} characters", parameter=name)
    least, usual, most = DEADLINE_MS
    text = query.get("deadline_ms", str(usual))
    if not re.fullmatch(r"[0-9]{1,6}", text, re.A) or not least <= int(text) <= most:
        raise Problem(422, f"deadline_ms must be a whole number from {least} to {most}", parameter="deadline_ms")
    return chosen, int(text) / 1000


async def gather(sources: Mapping[str, Source], given: Mapping[str, str], deadline: float) -> dict[str, Part]:
    """A part for each source, after ``deadline`` seconds at the latest. Loads go on (``fan_out`` would cancel them)."""
    parts: dict[str, Part | None] = {}
    loads: dict[str, tuple[Key, asyncio.Task[Loaded]]] = {}
    for name, source in sources.items():
        key = source.key(given)
        parts[name], load = source.known(key)
        if load is not None:
            loads[name] = key, load
    if loads:
        await asyncio.wait([load for _, load in loads.values()], timeout=deadline)
    return {name: part if part is not None else sources[name].outcome(*loads[name]) for name, part in parts.items()}


async def aggregate(request: Request) -> Response:
    """``/aggregate`` and ``/aggregate/{source}``: 200 if any source has data, else 503 with Retry-After."""
    started = time.monotonic()
    one = request.path_params.get("source")
    sources, deadline = wanted(request, None if one is None else [one])
    parts = await gather(sources, request.query_params, deadline)
    complete = all(part.state == "fresh" for part in parts.values())
    shown = {name: part.shown() for name, part in parts.items()}
    for name, part in parts.items():
        sources[name].answers[part.state] += 1
    content = ";".join(f"{name} {part.state} {part.data and part.data.digest}" for name, part in parts.items())
    etag = f'"{hashlib.blake2b(content.encode(), digest_size=12).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if complete:
        headers["Cache-Control"] = f"max-age={int(min(part.expires_in for part in parts.values()))}"
    elif all(part.data is None for part in parts.values()):
        headers = {"Retry-After": str(max(1, round(min(part.retry_after for part in parts.values()))))}
        return reply({"partial": True, "sources": shown}, 503, headers | {"Cache-Control": "no-store"})
    if etag in (tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")):
        return Response(status_code=304, headers=headers)
    body = {
        "partial": not all(part.state in ("fresh", "stale") for part in parts.values()),
        "generated_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "duration_ms": round((time.monotonic() - started) * 1000, 1),
        "sources": shown,
    }
    return reply(body, headers=headers)


def authorised(request: Request) -> None:
    """With ``AGGREGATE_TOKEN``, who has it; without, who is on this machine."""
    token = os.environ.get("AGGREGATE_TOKEN")
    if token:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Problem(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
    elif request.client is None or not ipaddress.ip_address(request.client.host).is_loopback:
        raise Problem(403, "without AGGREGATE_TOKEN only clients of this machine may do this")


async def invalidate(request: Request) -> Response:
    """Forget all answers, those of ``?source=``, or that for its parameters too; whoever asks next is answered anew."""
    authorised(request)
    sources, query = sources_of(request), dict(request.query_params)
    name = query.pop("source", None)
    if name is None:
        for source in sources.values():
            source.forget()
        return reply({"invalidated": sorted(sources)})
    if name not in sources:
        raise Problem(404, f"unknown source {name[:50]}", sources=sorted(sources))
    source = sources[name]
    if query.keys() - source.upstream.parameters.keys():
        raise Problem(422, "no such parameter", parameters=sorted(source.upstream.parameters))
    source.forget(source.key(query) if query else None)
    return reply({"invalidated": [name]})


async def health(request: Request) -> Response:
    sources = {name: source.health() for name, source in sources_of(request).items()}
    degraded = any(source["breaker"] != "closed" for source in sources.values())
    lag = round(max(request.app.state.lag.recent) * 1000, 1)
    return reply({"status": "degraded" if degraded else "ok", "loop_lag_ms": lag, "sources": sources})


async def metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


async def alive(_: Request) -> Response:
    return reply({"status": "ok"})


# ------------------------------------------------------------------------------------------------------ lifespan


class Edge:
    """What every request passes first: it gets an id (or keeps a good one), and its client a token, or 429.

    The id is sent upstream as ``X-Request-ID`` by the load that the request began, and comes back with the answer.
    """

    def __init__(self, inner: ASGIApp, rate: float) -> None:
        self._inner, self._rate = inner, rate
        self._process, self._serial = secrets.token_hex(4), itertools.count()
        self._buckets: TTLCache[str, TokenBucket] = TTLCache(CLIENTS, math.inf)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        identity = given if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given, re.A) else self._next_id()
        token = request_id.set(identity)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        try:
            wait = self._wait(scope["client"][0] if scope.get("client") else "")
            if wait:
                refusal = Problem(429, "too many requests", {"Retry-After": str(math.ceil(wait))})
                await (await problem(Request(scope), refusal))(scope, receive, answer)
            else:
                await self._inner(scope, receive, answer)
        finally:
            request_id.reset(token)

    def _next_id(self) -> str:
        """Random for the process, counted within it: a random one each would be a sixteenth of a cached answer."""
        return f"{self._process}{next(self._serial) & 0xFFFFFFFF:08x}"

    def _wait(self, client: str) -> float:
        """0.0: the client may ask; else the seconds until it may."""
        if not self._rate:
            return 0.0
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = TokenBucket(self._rate, CLIENT_BURST)
            self._buckets.put(client, bucket)
        return 0.0 if bucket.try_acquire() else max(bucket.wait_for(), 0.001)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        upstreams: dict[str, Upstream] | None = app.state.upstreams
        if upstreams is None:
            from sandbox import Sandbox

            site = Sandbox(hosts=1, pages=1)
            await asyncio.to_thread(site.start)
            stack.push_async_callback(asyncio.to_thread, site.stop)
            upstreams = read_config(DEMO.format(base=site.url("")), os.environ)
            log.info("no AGGREGATE_CONFIG: four demo upstreams at %s", site.url("/api/"))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=PLACES, limit_per_host=0),
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        )
        places = Semaphore(PLACES)
        sources = {name: Source(upstream, session, places) for name, upstream in upstreams.items()}
        app.state.sources, app.state.lag, app.state.registry = sources, Lag(), CollectorRegistry()
        app.state.registry.register(Exporter(sources, app.state.lag))
        watch = asyncio.create_task(app.state.lag.watch(), name="loop lag")
        yield
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        loads = [load for source in sources.values() for load in source.running]
        if loads:
            _, late = await asyncio.wait(loads, timeout=GRACE)
            for load in late:
                load.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def create_app(upstreams: dict[str, Upstream] | None = None, client_rate: float | None = None) -> Starlette:
    """The application before these upstreams; before those of the demo, which it then serves itself, if None."""
    routes = [
        Route("/aggregate", aggregate),
        Route("/aggregate/{source}", aggregate),
        Route("/cache/invalidate", invalidate, methods=["POST"]),
        Route("/health", health),
        Route("/health/live", alive),
        Route("/health/ready", alive),
        Route("/metrics", metrics),
    ]
    edge = Middleware(Edge, rate=CLIENT_RATE if client_rate is None else client_rate)
    handlers = {HTTPException: problem}
    application = Starlette(routes=routes, middleware=[edge], exception_handlers=handlers, lifespan=lifespan)
    application.state.upstreams = upstreams
    return application


def configured(environ: Mapping[str, str]) -> dict[str, Upstream] | None:
    """The upstreams of the file that ``AGGREGATE_CONFIG`` names; ``SystemExit`` with one line if it is wrong."""
    path = environ.get("AGGREGATE_CONFIG")
    if not path:
        return None
    try:
        return read_config(Path(path).read_text("utf-8"), environ)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise SystemExit(f"AGGREGATE_CONFIG={path}: {error}") from None


def configured_rate(environ: Mapping[str, str]) -> float | None:
    """``AGGREGATE_RATE``, or None; ``SystemExit`` with one line if it is no rate."""
    text = environ.get("AGGREGATE_RATE")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", text, re.A):
        raise SystemExit(f"AGGREGATE_RATE={text}: requests per second of one client are needed, 0 for any number")
    return float(text)


app = create_app(configured(os.environ), configured_rate(os.environ))
