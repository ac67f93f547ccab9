"""The other routes: the dashboard, events, health and metrics, and what is asked of the past.

Health, metrics and events wait for nothing. ``/history`` and ``/report`` wait for PostgreSQL and answer 503 while it is
away. ``/report`` needs all three layers: rows in the event loop, hosts in threads, figures in processes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from urllib.parse import urlencode

import asyncpg
import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api.report import Columns, summarise
from api.requests import (
    Problem,
    check,
    check_values,
    known_sources,
    names_in,
    parse_time,
    query_of,
    reply,
    service_of,
    whole_number,
)
from api.service import log
from api.telemetry import Events, OfWorker
from coordination import fan_out
from runtime.postgres import Unavailable
from runtime.processes import PoolClosed, WorkerDied

STREAMS = 100  # streams of events at a time
# What a report says of a host that took too long.
UNSEEN = dict.fromkeys(("name", "address", "dns_ms", "connect_ms", "certificate_days")) | {"error": "timeout"}
OUTCOMES = 20_000  # results of one source that a report takes into account: the last ones
HOURS = 1, 24, 168  # the least, usual and greatest ``hours`` of a report
HISTORY = 1, 100, 1000  # the same of ``limit`` of a page of the history
PAGE_BYTES = 4_000_000  # a page of the history ends early when it holds so much
HISTORY_LIMIT, REPORT_LIMIT = 5.0, 8.0  # seconds that a page of the history, or a report, may take


async def health(request: Request) -> Response:
    """``/health``: the state of everything."""
    service = service_of(request)
    sources = {name: source.health() for name, source in service.sources.items()}
    database, writer = service.database.stats(), service.history.writer.stats()
    tasks = {name: "ended" if task.done() else "running" for name, task in service.tasks.items()}
    away = database.kind is not None and database.state != "connected"
    shut = [name for name, source in sources.items() if source["breaker"] != "closed" and not source["waits_for_call"]]
    degraded = away or bool(shut) or "ended" in tasks.values()
    return reply(
        {
            "status": "degraded" if degraded else "ok",
            "uptime_s": round(time.monotonic() - service.started, 1),
            "loop_lag_ms": round(service.lag.longest * 1000, 1),
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
    """``/health/live``: 200."""
    return reply({"status": "ok"})


async def ready(request: Request) -> Response:
    """``/health/ready``: 503 from the signal to stop on. A database that is away is no reason."""
    if service_of(request).stopping:
        raise Problem(503, "stopping", {"Retry-After": "5"})
    return reply({"status": "ok"})


async def metrics(request: Request) -> Response:
    """``/metrics``, for Prometheus."""
    registry = cast(CollectorRegistry, OfWorker(service_of(request).registry))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class EventStream(StreamingResponse):
    """Events from now on, or after the last that the client has; it leaves when it ends, though it never began."""

    def __init__(self, published: Events, client: str, last: str, headers: Mapping[str, str]) -> None:
        super().__init__(published.stream(last), headers=headers, media_type="text/event-stream")
        self._published, self._client = published, client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._published.leave(self._client)


async def events(request: Request) -> Response:
    """``/events``: a stream of server-sent events (WHATWG HTML, 9.2), which goes on after ``Last-Event-ID``."""
    published, client = service_of(request).events, request.client.host if request.client else ""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # or nginx would keep them to itself
    if request.method == "HEAD":
        return Response(headers=headers, media_type="text/event-stream")
    if published.streams >= STREAMS:
        raise Problem(503, "too many streams", {"Retry-After": "5"})
    if not published.join(client):
        raise Problem(429, "too many streams of this client", {"Retry-After": "5"})
    return EventStream(published, client, request.headers.get("Last-Event-ID", ""), headers)


@contextlib.contextmanager
def _history_or_503() -> Iterator[None]:
    try:
        yield
    except (Unavailable, TimeoutError) as error:
        later = str(math.ceil(getattr(error, "retry_after", 5.0)))
        raise Problem(503, f"the history cannot be read: {error or 'no time left'}", {"Retry-After": later}) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        log.error("the history cannot be read: %r", error)
        raise Problem(503, "the history cannot be read: failed", {"Retry-After": "5"}) from None


async def history(request: Request) -> Response:
    """``/history/{source}``: the results of its calls, the latest first, a page at a time."""
    name = request.path_params["source"]
    source, query = known_sources(request, [name])[name], query_of(request)
    check(query, {"limit", "before", *source.upstream.parameters})
    check_values(query, [source.upstream])
    limit = whole_number(query, "limit", *HISTORY)
    given = {key: value for key, value in query.items() if key in source.upstream.parameters}
    before = parse_time(query.get("before", "9999-01-01T00:00:00Z"), "before")
    with _history_or_503():
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
    return reply({"source": name, "results": rows, "next": following}, {"Cache-Control": "no-store"})


async def report(request: Request) -> Response:
    """``/report``: the history is read in the event loop, hosts are inspected in threads, a process computes."""
    service, query = service_of(request), query_of(request)
    names = list(known_sources(request, names_in(query)))
    check(query, ("hours", "sources"))
    hours = whole_number(query, "hours", *HOURS)
    since, until = datetime.now(UTC) - timedelta(hours=hours), time.monotonic() + REPORT_LIMIT
    if not service.reports.try_acquire():
        raise Problem(503, "too many reports", {"Retry-After": "2"})
    try:
        with _history_or_503():
            async with asyncio.timeout(REPORT_LIMIT):
                rows = {name: Columns(*await service.history.outcomes(name, since, OUTCOMES)) for name in names}
                tasks = {name: service.inspection(name) for name in names}
                figures = await service.processes.run(summarise, rows, timeout=REPORT_LIMIT)
        # whose name is not found in time is no reason to say nothing at all
        hosts = await fan_out(tasks, max(0.001, until - time.monotonic()), cancel=False)
    except (PoolClosed, WorkerDied):
        raise Problem(503, "no report could be computed", {"Retry-After": "2"}) from None
    finally:
        service.reports.release()
    shown = {name: {**figures[name], "host": hosts[name].value or UNSEEN} for name in names}
    generated_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return reply({"generated_at": generated_at, "hours": hours, "sources": shown}, {"Cache-Control": "no-store"})


async def openapi(request: Request) -> Response:
    """``/openapi.json``."""
    return Response(request.app.state.openapi, media_type="application/json")


def dashboard_page() -> Callable[[Request], Awaitable[Response]]:
    """The route of the dashboard, with a policy under which no other script, style or host can have a part in it."""
    page = Path(__file__).with_name("dashboard.html").read_bytes()

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
