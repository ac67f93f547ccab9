"""The aggregation API: one fast, honest endpoint before flaky upstreams.

    uvicorn aggregate_app:app

``GET /aggregate`` asks many upstreams at once and answers with what is there at the deadline: for each source its
data, and how it came by it (``fresh``, ``stale``, ``fallback``, ``timeout``, ``error``, ``open``). The upstreams are
those of the TOML file that ``AGGREGATE_CONFIG`` names; without it, four demo upstreams on loopback, one of them flaky.
The way of a call to one is told in ``api/upstreams.py``.

Promised
- A request waits for its deadline at most; the deadline cuts the wait, not the load: what comes late fills the cache.
- What is stale is served at once, while one load in the background renews it; it never carries a full max-age. What
  is in use is loaded again before it gets stale.
- An assembled answer is handed out again for ``KEPT`` seconds, while nothing in it changed: its ``generated_at`` says
  when it was made, and its ages are of that moment.
- The database may be away at any time: the API goes on without it.
- On a stop, streams end at once, requests under way get ``GRACE`` seconds, and the last rows and lines are written:
  ten seconds at most.

Three layers: what waits for a socket runs in the event loop of the server (the upstreams, PostgreSQL), what blocks in
threads (names and certificates of ``/report``, log lines, the demo's sandbox, starting the embedded database), what
computes in processes (``/report``). All state is the loop's, so nothing here needs a lock; the mechanisms of
``primitives`` bring their own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import hashlib
import itertools
import logging
import math
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast
from urllib.parse import urlencode

import aiohttp
import anyio
import asyncpg
import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from api.history import UPSTREAM_RESULTS
from api.openapi import document
from api.report import Columns, summarise
from api.requests import Problem, authorised, check, failed, moment, problem, query_of, whole
from api.service import KEPT, PLACES, REPORTS, WARM, Kept, Service, log
from api.telemetry import standard_output
from api.upstreams import DEMO, ConfigError, Key, Loaded, Part, Source, Upstream, read_config, request_id
from coordination import Semaphore
from primitives import TokenBucket, TTLCache
from runtime.postgres import Database, Unavailable
from runtime.processes import PoolClosed, WorkerDied
from runtime.serving import queue_stderr

VERSION = "1.0"
"""Of the API, as its document says it."""
STREAMS = 100
"""Streams of events at a time."""
UNSEEN = dict.fromkeys(("name", "address", "dns_ms", "connect_ms", "certificate_days")) | {"error": "timeout"}
"""What a report says of a host that took too long."""
OUTCOMES = 20_000
"""Results of one source that a report takes into account: the last ones."""
HOURS = 1, 24, 168
HISTORY = 1, 100, 1000
"""The least, usual and greatest ``hours`` of a report, and ``limit`` of a page."""
PAGE_BYTES = 4_000_000
"""A page of the history ends early when it holds so much."""
HISTORY_LIMIT, REPORT_LIMIT = 5.0, 8.0
"""Seconds that a page of the history, or a report, may take."""
CLIENT_RATE, CLIENT_BURST, CLIENTS = 1000.0, 2000, 10_000
"""Requests per second of one client (``AGGREGATE_RATE`` overrides, 0: any number), and how many are known at a time."""
MAX_QUERY, MAX_HEADERS, MAX_BODY = 4096, 32 * 1024, 64 * 1024
"""Bytes of a query, of all headers, and of the body that a request announces (no body is read)."""
DEADLINE_MS = 1, 1000, 30_000
"""The least, usual and greatest ``deadline_ms``."""


# ------------------------------------------------------------------------------------------------------- the service


# -------------------------------------------------------------------------------------------------------- routes


def reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def sources_of(request: Request) -> dict[str, Source]:
    return service_of(request).sources


def names_in(query: dict[str, str], request: Request) -> list[str]:
    """What ``sources`` in the query names, which is taken out of it; without it, all sources."""
    return query.pop("sources").split(",") if "sources" in query else list(sources_of(request))


def known_sources(request: Request, names: Sequence[str]) -> dict[str, Source]:
    """The sources of these names. ``Problem`` if there is none of some name."""
    sources = sources_of(request)
    for name in names:
        if name not in sources:
            raise Problem(404, f"unknown source {name[:50]}", sources=sorted(sources))
    return {name: sources[name] for name in names}


def wanted(request: Request, names: Sequence[str] | None) -> tuple[dict[str, Source], dict[str, str], float]:
    """The sources and parameters of a request, and its deadline in seconds. ``Problem`` if something is not there."""
    query = query_of(request)
    allowed = {"deadline_ms"}
    if names is None:
        names = names_in(query, request)
        allowed.add("sources")
    chosen = known_sources(request, names)
    check(query, allowed.union(*(source.upstream.parameters for source in chosen.values())))
    return chosen, query, whole(query, "deadline_ms", *DEADLINE_MS) / 1000


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
    service, one = service_of(request), request.path_params.get("source")
    sources, given, deadline = wanted(request, None if one is None else [one])
    changes = service.changes
    parts = await gather(sources, given, deadline)
    states = request.scope["states"] = {name: part.state for name, part in parts.items()}
    for name, state in states.items():
        sources[name].answers[state] += 1
    shown = {name: part.shown() for name, part in parts.items()}
    answer = {
        "partial": not all(state in ("fresh", "stale") for state in states.values()),
        "generated_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "duration_ms": round((time.monotonic() - started) * 1000, 1),
        "sources": shown,
    }
    if all(part.data is None for part in parts.values()):
        later = str(max(1, round(min(part.retry_after for part in parts.values()))))
        raise Problem(503, "no source has data", {"Retry-After": later, "Cache-Control": "no-store"}, **answer)
    content = ";".join(f"{name} {part.state} {part.data and part.data.digest}" for name, part in parts.items())
    etag = f'W/"{hashlib.blake2b(content.encode(), digest_size=12).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    fresh_for = min(part.expires_in for part in parts.values())
    ages = [part.age for part in parts.values() if part.age is not None]
    if ages:
        headers["Age"] = str(math.ceil(max(ages)))
    if all(state == "fresh" for state in states.values()):
        headers["Cache-Control"] = f"max-age={math.ceil(max(ages)) + int(fresh_for)}"
    known = (tag.strip() for line in request.headers.getlist("If-None-Match") for tag in line.split(","))
    if any(tag in (etag, etag.removeprefix("W/"), "*") for tag in known):
        return Response(status_code=304, headers=headers)
    response = reply(answer, headers=headers)
    # what changed while loads were waited for may have been an invalidation, and this an answer from before it
    unchanged = changes == service.changes
    if unchanged and set(states.values()) <= {"fresh", "stale"} and request.method == "GET":
        until = started + min(KEPT, *(part.expires_in for part in parts.values()))
        kept = Kept(until, response.raw_headers, bytes(response.body), states)
        service.keep((request.scope["path"], request.scope["query_string"]), kept)
    return response


async def invalidate(request: Request) -> Response:
    """Forget all answers, those of ``?source=``, or that for its parameters too; whoever asks next is answered anew."""
    authorised(request)
    sources, query = sources_of(request), query_of(request)
    name = query.pop("source", None)
    if name is None:
        check(query, ("source",))
        for source in sources.values():
            source.forget()
        return forgotten(request, sorted(sources))
    if name not in sources:
        raise Problem(404, f"unknown source {name[:50]}", sources=sorted(sources))
    source = sources[name]
    check(query, source.upstream.parameters)
    source.forget(source.key(query) if query else None)
    return forgotten(request, [name])


def forgotten(request: Request, names: list[str]) -> Response:
    service_of(request).events.publish("invalidate", {"sources": names})
    return reply({"invalidated": names})


async def health(request: Request) -> Response:
    service = service_of(request)
    service.settle()
    sources = {name: source.health() for name, source in service.sources.items()}
    database, writer = service.database.stats(), service.history.writer.stats()
    tasks = {name: "ended" if task.done() else "running" for name, task in service.tasks.items()}
    away = database.kind is not None and database.state != "connected"
    degraded = away or any(source["breaker"] != "closed" for source in sources.values()) or "ended" in tasks.values()
    return reply(
        {
            "status": "degraded" if degraded else "ok",
            "uptime_s": round(time.monotonic() - service.started, 1),
            "loop_lag_ms": round(max(service.lag.recent) * 1000, 1),
            "database": {
                "state": database.state,
                "kind": database.kind,
                "since": database.since.isoformat(timespec="seconds"),
                "error": database.error,
                **writer._asdict(),
                "lost": writer.lost + writer.refused,
            },
            "tasks": tasks,
            "streams": service.events.streams,
            "sources": sources,
        }
    )


async def alive(_: Request) -> Response:
    return reply({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether to send requests here. A database that is away is no reason not to."""
    if service_of(request).stopping:
        raise Problem(503, "stopping", {"Retry-After": "5"})
    return reply({"status": "ok"})


async def metrics(request: Request) -> Response:
    service_of(request).settle()
    return Response(generate_latest(service_of(request).registry), media_type=CONTENT_TYPE_LATEST)


async def events(request: Request) -> Response:
    """A stream of server-sent events (WHATWG HTML, 9.2), which goes on after ``Last-Event-ID``."""
    told = service_of(request).events
    if told.streams >= STREAMS:
        raise Problem(503, "too many streams", {"Retry-After": "5"})
    last = request.headers.get("Last-Event-ID", "")
    after = int(last) if re.fullmatch(r"[0-9]{1,18}", last, re.A) else None
    return StreamingResponse(told.stream(after), headers={"Cache-Control": "no-store"}, media_type="text/event-stream")


@contextlib.contextmanager
def kept_rows() -> Iterator[None]:
    """For what needs the history: 503 while there is none."""
    try:
        yield
    except (Unavailable, TimeoutError) as error:
        later = str(math.ceil(getattr(error, "retry_after", 5.0)))
        raise Problem(503, f"the history cannot be read: {error or 'no time left'}", {"Retry-After": later}) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        log.error("the history cannot be read: %r", error)
        raise Problem(503, "the history cannot be read: failed", {"Retry-After": "5"}) from None


async def history(request: Request) -> Response:
    """``/history/{source}``: what its calls came to, the latest first, a page at a time."""
    name = request.path_params["source"]
    source, query = known_sources(request, [name])[name], query_of(request)
    check(query, {"limit", "before", *source.upstream.parameters})
    limit = whole(query, "limit", *HISTORY)
    given = {key: value for key, value in query.items() if key in source.upstream.parameters}
    before = moment(query.get("before", "9999-01-01T00:00:00Z"), "before")
    with kept_rows():
        async with asyncio.timeout(HISTORY_LIMIT):
            kept = service_of(request).history
            shown, more = await kept.page(name, orjson.dumps(given).decode(), before, limit, PAGE_BYTES)
    following = None
    if more:
        page = {**given, "limit": limit, "before": shown[-1].fetched_at.isoformat()}
        following = f"/history/{name}?{urlencode(page)}"
    rows = [
        {
            "fetched_at": result.fetched_at.isoformat(),
            "parameters": orjson.Fragment(result.parameters),
            "status": result.status,
            "latency_ms": round(result.latency * 1000, 1),
            "data": None if result.payload is None else orjson.Fragment(result.payload),
        }
        for result in shown
    ]
    return reply({"source": name, "results": rows, "next": following}, headers={"Cache-Control": "no-store"})


async def report(request: Request) -> Response:
    """The three layers: the history from the event loop, hosts inspected in threads, figures computed in a process."""
    service, query = service_of(request), query_of(request)
    names = list(known_sources(request, names_in(query, request)))
    check(query, ("hours", "sources"))
    hours = whole(query, "hours", *HOURS)
    since, until = datetime.now(UTC) - timedelta(hours=hours), time.monotonic() + REPORT_LIMIT
    if service.reports >= REPORTS:
        raise Problem(503, "too many reports", {"Retry-After": "2"})
    service.reports += 1
    try:
        with kept_rows():
            async with asyncio.timeout(REPORT_LIMIT):
                rows = {name: Columns(*await service.history.outcomes(name, since, OUTCOMES)) for name in names}
                looks = {name: service.look(name) for name in names}
                figures = await service.processes.run(summarise, rows, timeout=REPORT_LIMIT)
        if looks:  # whose name is not found in time is no reason to say nothing at all
            await asyncio.wait(looks.values(), timeout=max(0.0, until - time.monotonic()))
    except (PoolClosed, WorkerDied):
        raise Problem(503, "no report could be computed", {"Retry-After": "2"}) from None
    finally:
        service.reports -= 1
    hosts = {name: look.result() if look.done() and not look.cancelled() else UNSEEN for name, look in looks.items()}
    said = {name: {**figures[name], "host": hosts[name]} for name in names}
    generated_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return reply({"generated_at": generated_at, "hours": hours, "sources": said}, headers={"Cache-Control": "no-store"})


async def openapi(request: Request) -> Response:
    return Response(request.app.state.openapi, media_type="application/json")


def dashboard_page() -> Callable[[Request], Awaitable[Response]]:
    """The page, and a policy under which no other script, style or host can have a part in it."""
    page = Path(__file__).with_name("api").joinpath("dashboard.html").read_bytes()

    def hashed(tag: str) -> str:
        text = page.partition(b"<%s>" % tag.encode())[2].partition(b"</%s>" % tag.encode())[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    async def dashboard(_: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return dashboard


# ------------------------------------------------------------------------------------------------- the application


def refused(wait: float, query: int, headers: int, body: int) -> Problem | None:
    """Why a request gets no further: its client's rate (``wait`` seconds to go), or its sizes in bytes."""
    if wait:
        return Problem(429, "too many requests", {"Retry-After": str(math.ceil(wait))})
    if query > MAX_QUERY:
        return Problem(414, f"the query has more than {MAX_QUERY} bytes")
    if headers > MAX_HEADERS:
        return Problem(431, f"the headers have more than {MAX_HEADERS} bytes in all")
    return Problem(413, f"a body of more than {MAX_BODY} bytes") if body > MAX_BODY else None


class Aggregator(Starlette):
    """What every request passes first: it gets an id (or keeps a good one), its client a token, or 429; its sizes are
    bounded. The server has read the headers by then: what they may cost it is for the server, or a proxy, to bound.

    The id is sent upstream as ``X-Request-ID`` by the load that the request began, and comes back with the answer.
    What was answered a moment ago is answered here, without a route or a response being made.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self._rate = rate
        self._process, self._serial = secrets.token_hex(4).encode(), itertools.count()
        self._buckets: TTLCache[str, TokenBucket] = TTLCache(CLIENTS, math.inf)
        self.service: Service | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        started, identity, plain = time.monotonic(), b"", scope["method"] == "GET"
        size, length = 0, b"0"
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name == b"x-request-id":
                identity = value
            elif name == b"if-none-match":
                plain = False
            elif name == b"content-length":
                length = value
        if not identity or not re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", identity):
            # random for the process, counted within it: a random one each would be a sixteenth of a cached answer
            identity = b"%s%08x" % (self._process, next(self._serial) & 0xFFFFFFFF)
        service, client = self.service, scope["client"][0] if scope.get("client") else ""
        wait = self._wait(client) if self._rate else 0.0
        if plain and not wait and service is not None and size <= MAX_HEADERS:
            kept = service.kept.get((scope["path"], scope["query_string"]))
            if kept is not None and started < kept.until:
                kept.hits += 1
                headers = [*kept.headers, (b"x-request-id", identity)]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": kept.body})
                if service.log.wanted:
                    self._note(service, scope, identity, client, started, 200, kept.states)
                return
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
            await send(message)

        token = request_id.set(identity.decode())
        try:
            refusal = refused(wait, len(scope["query_string"]), size, int(length))
            if refusal is not None:
                await (await problem(Request(scope), refusal))(scope, receive, answer)
            else:
                await super().__call__(scope, receive, answer)
        finally:
            request_id.reset(token)
            if service is not None and service.log.wanted:
                self._note(service, scope, identity, client, started, status, scope.get("states"))

    def _note(
        self,
        service: Service,
        scope: Scope,
        identity: bytes,
        client: str,
        started: float,
        status: int,
        states: dict[str, str] | None,
    ) -> None:
        fields = {
            "client": client,
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode("latin-1"),
            "status": status,
            "duration_ms": round((time.monotonic() - started) * 1000, 3),
            "sources": states,
        }
        service.log.note("request", identity.decode(), fields)

    def _wait(self, client: str) -> float:
        """0.0: the client may ask; else the seconds until it may."""
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = TokenBucket(self._rate, CLIENT_BURST)
            self._buckets.put(client, bucket)
        return 0.0 if bucket.try_acquire() else max(bucket.wait_for(), 0.001)


@contextlib.contextmanager
def told_of_signals(call: Callable[[], object]) -> Iterator[Callable[[], object]]:
    """Have ``call`` called in the event loop at SIGINT and SIGTERM, before whoever else waits for them. What is given
    is for the server as one more SIGINT, after which it waits for nobody.

    The server ends the lifespan only when the last response has ended, and a stream of events does not end by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(call)
        following = before[signal.Signals(number)]
        if callable(following):
            following(number, frame)

    for number in before:
        signal.signal(number, handle)
    forced = before[signal.SIGINT]
    try:
        yield lambda: forced(signal.SIGINT, None) if callable(forced) else None
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    assert isinstance(app, Aggregator)
    async with contextlib.AsyncExitStack() as stack:
        if logging.getLogger("uvicorn").handlers:  # it writes to stderr in its loop
            stack.push_async_callback(asyncio.to_thread, queue_stderr("aggregate_app"))
        upstreams: dict[str, Upstream] | None = app.state.upstreams
        if upstreams is None:
            from sandbox.sites import Sandbox

            site = Sandbox(hosts=1, pages=1)
            await asyncio.to_thread(site.start)
            stack.push_async_callback(asyncio.to_thread, site.stop)
            upstreams = read_config(DEMO.format(base=site.url("")), os.environ)
            log.info("no AGGREGATE_CONFIG: four demo upstreams at %s", site.url("/api/"))
        async with anyio.create_task_group():
            pass  # imports what the first stream of events would hold the loop for
        gc.freeze()  # what was imported is no garbage: a full collection of it held the loop for 30 ms
        stack.callback(gc.unfreeze)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=PLACES, limit_per_host=0, resolver=aiohttp.ThreadedResolver()),
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        )
        places = Semaphore(PLACES)
        sources = {name: Source(upstream, session, places) for name, upstream in upstreams.items()}
        access = logging.getLogger("uvicorn.access")
        output = app.state.output if access.hasHandlers() else None
        if output is not None:  # ours has more in it; who wants none starts uvicorn with --no-access-log
            access.handlers, access.propagate = [], False
        service = app.service = app.state.service = Service(sources, app.state.database(), output)
        service.force = stack.enter_context(told_of_signals(service.stop))
        if service.log.wanted:
            service.begin("request log", service.log.run())
            stack.push_async_callback(service.log.close)
        stack.push_async_callback(service.processes.close)
        if service.database.server is None:
            log.info("no database: nothing is kept over a restart")
        else:
            stack.push_async_callback(service.database.close)
            await service.database.open(0.0)
            service.begin("retention", service.retain(app.state.retention))
            await asyncio.wait([service.begin("warm start", service.warm())], timeout=WARM)
        writing = asyncio.create_task(service.history.writer.run(), name="history writer")
        stack.push_async_callback(service.history.writer.close, writing)
        service.begin("renewal", service.renew())
        service.begin("loop lag", service.lag.watch())
        stack.push_async_callback(service.close)
        yield
        app.service = None


def create_app(
    upstreams: dict[str, Upstream] | None = None,
    client_rate: float | None = None,
    *,
    database: Callable[[], Database] = lambda: Database(None),
    retention: float = 7 * 86400.0,
    output: IO[bytes] | None = None,
) -> Aggregator:
    """The application before these upstreams; before those of the demo, which it then serves itself, if None.

    ``database`` makes the database of each life, ``retention`` is how long it keeps results (seconds), ``output`` is
    where the log of the requests goes.
    """
    routes = [
        Route("/", dashboard_page()),
        Route("/aggregate", aggregate),
        Route("/aggregate/{source}", aggregate),
        Route("/cache/invalidate", invalidate, methods=["POST"]),
        Route("/events", events),
        Route("/health", health),
        Route("/health/live", alive),
        Route("/health/ready", ready),
        Route("/history/{source}", history),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/report", report),
    ]
    rate = CLIENT_RATE if client_rate is None else client_rate
    handlers = {HTTPException: problem, Exception: failed}
    application = Aggregator(rate, routes=routes, exception_handlers=handlers, lifespan=lifespan)
    application.router.redirect_slashes = False
    shown = upstreams if upstreams is not None else read_config(DEMO.format(base="http://127.0.0.1"), os.environ)
    application.state.openapi = orjson.dumps(document(shown, VERSION))
    application.state.upstreams, application.state.database = upstreams, database
    application.state.retention, application.state.output = retention, output
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


def configured_number(environ: Mapping[str, str], name: str, needed: str) -> float | None:
    """A number from 0 to 9,999,999 out of the environment, or None; ``SystemExit`` with one line if it is none."""
    text = environ.get(name)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", text, re.A):
        raise SystemExit(f"{name}={text}: {needed}")
    return float(text)


def configured_app(environ: Mapping[str, str]) -> Aggregator:
    """The application as the environment describes it. ``SystemExit`` with one line if that cannot be."""
    rate = configured_number(
        environ, "AGGREGATE_RATE", "requests per second of one client are needed, 0 for any number"
    )
    days = configured_number(environ, "AGGREGATE_RETENTION_DAYS", "a number of days is needed")
    try:
        Database.configured(environ, UPSTREAM_RESULTS)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return create_app(
        configured(environ),
        rate,
        database=lambda: Database.configured(environ, UPSTREAM_RESULTS),
        retention=(7.0 if days is None else days) * 86400,
        output=standard_output(),
    )


app = configured_app(os.environ)
