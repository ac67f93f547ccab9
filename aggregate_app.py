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
import hashlib
import hmac
import ipaddress
import itertools
import logging
import math
import os
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

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

from primitives import Semaphore, TokenBucket, TTLCache
from upstreams import DEMO, ConfigError, Key, Loaded, Part, Source, Upstream, percentiles, read_config, request_id

log = logging.getLogger("uvicorn.error")

GRACE = 5.0
"""Seconds that loads under way get when the server stops."""
CLIENT_RATE, CLIENT_BURST, CLIENTS = 1000.0, 2000, 10_000
"""Requests per second of one client (``AGGREGATE_RATE`` overrides, 0: any number), and how many are known at a time."""
PLACES = 256
"""Calls under way to all upstreams together."""
MAX_PARAMETER = 200
"""Characters of a parameter's value."""
DEADLINE_MS = 1, 1000, 30_000
"""The least, usual and greatest ``deadline_ms``."""


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
