"""The aggregation API: one fast, honest endpoint before flaky upstreams.

    uvicorn aggregate_app:app
    python aggregate_app.py --check upstreams.toml

``GET /aggregate`` asks many upstreams at once and answers with what is there at the deadline. This file is the routes,
the start and the end; docs/aggregate.md says what the routes answer, ``api/upstreams.py`` the way of a call.

Promised
- A request waits for its deadline at most; the deadline cuts the wait, not the load: what comes late fills the cache.
- What is stale is served at once, while one load in the background renews it; it never carries a full max-age. What
  is in use is loaded again before it gets stale.
- The database may be away at any time. A stop takes ten seconds at most.

Three layers: what waits for a socket runs in the event loop of the server (the upstreams, PostgreSQL), what blocks in
threads (names and certificates of ``/report``, log lines, the demo's sandbox, starting the embedded database), what
computes in processes (``/report``). All state is the loop's, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import IO, Any

import anyio
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from api.aggregate import aggregate, invalidate
from api.check import main
from api.config import DEMO, ConfigError, Upstream, load_config, read_config
from api.history import UPSTREAM_RESULTS
from api.middleware import CLIENT_RATE, Aggregator
from api.openapi import document
from api.pages import alive, dashboard_page, events, health, history, metrics, openapi, ready, report
from api.requests import failed, problem
from api.service import PLACES, WARM, Service, log
from api.telemetry import is_worker, standard_output
from api.upstreams import Source, make_session
from coordination import Semaphore
from runtime.loop import handled_before_the_server
from runtime.postgres import Database
from runtime.stderr import queue_stderr

VERSION = "1.0"  # of the API


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The life of the API: entered before the first request, left after the last one."""
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
            demo = read_config(DEMO.format(base=site.url("")), os.environ)
            upstreams = {name: dataclasses.replace(upstream, base=site.url("")) for name, upstream in demo.items()}
            log.info("no AGGREGATE_CONFIG: four demo upstreams at %s", site.url("/api/"))
        async with anyio.create_task_group():
            pass  # imports what the first stream of events would hold the loop for
        gc.freeze()  # what was imported is no garbage: a full collection of it held the loop for 30 ms
        stack.callback(gc.unfreeze)
        session = await stack.enter_async_context(make_session(PLACES))
        places = Semaphore(PLACES)
        sources = {name: Source(upstream, session, places) for name, upstream in upstreams.items()}
        access = logging.getLogger("uvicorn.access")
        output = app.state.output if access.hasHandlers() else None
        if output is not None:  # ours has more in it; who wants none starts uvicorn with --no-access-log
            access.handlers, access.propagate = [], False
        service = app.service = app.state.service = Service(sources, app.state.database(), output)
        service.force = stack.enter_context(handled_before_the_server(service.stop))
        stack.push_async_callback(service.log.close)
        stack.push_async_callback(service.processes.close)
        if service.database.server is None:
            log.info("no database: nothing is kept over a restart")
            if is_worker():
                log.warning("no database: of several workers, each has answers, circuits and invalidations of its own")
        else:
            stack.push_async_callback(service.database.close)
            await service.database.open(0.0)
            service.begin("retention", service.retain(app.state.retention))
            service.begin("news of others", service.bus.run())
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
    hosts: Iterable[str] = (),
) -> Aggregator:
    """The application before these upstreams (None: those of the demo, which it then serves itself).

    ``database`` makes the database of each life, which keeps results for ``retention`` seconds; the log of the requests
    goes to ``output``. ``hosts`` are served besides the names and addresses of this machine.
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
    application = Aggregator(rate, hosts, routes=routes, exception_handlers=handlers, lifespan=lifespan)
    application.router.redirect_slashes = False
    known = upstreams if upstreams is not None else read_config(DEMO.format(base="http://127.0.0.1"), os.environ)
    application.state.openapi = orjson.dumps(document(known, VERSION))
    application.state.upstreams, application.state.database = upstreams, database
    application.state.retention, application.state.output = retention, output
    return application


def configured(environ: Mapping[str, str]) -> dict[str, Upstream] | None:
    """The upstreams of the file that ``AGGREGATE_CONFIG`` names; ``SystemExit`` with one line if it is wrong."""
    if not (path := environ.get("AGGREGATE_CONFIG")):
        return None
    try:
        return load_config(path, environ)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise SystemExit(f"AGGREGATE_CONFIG={path}: {error}") from None


def configured_number(environ: Mapping[str, str], name: str, needed: str) -> float | None:
    """A number from 0 to 9,999,999 out of the environment, or None; ``SystemExit`` with one line if it is none."""
    if not (text := environ.get(name)):
        return None
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", text, re.A):
        raise SystemExit(f"{name}={text}: {needed}")
    return float(text)


def configured_list(environ: Mapping[str, str], name: str, form: str, needed: str) -> list[str]:
    """What stands between commas in the environment; ``SystemExit`` with one line if it is not of this form."""
    values = [value.strip() for value in environ.get(name, "").split(",") if value.strip()]
    for value in values:
        if not re.fullmatch(form, value):
            raise SystemExit(f"{name}={value}: {needed}")
    return values


def configured_app(environ: Mapping[str, str]) -> ASGIApp:
    """The application as the environment describes it. ``SystemExit`` with one line if that cannot be."""
    of_rate = "requests per second of one client are needed, 0 for any number"
    rate = configured_number(environ, "AGGREGATE_RATE", of_rate)
    days = configured_number(environ, "AGGREGATE_RETENTION_DAYS", "a number of days is needed")
    retention = (7.0 if days is None else days) * 86400
    database = functools.partial(Database.configured, environ, UPSTREAM_RESULTS)
    try:
        database()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    hosts = configured_list(environ, "AGGREGATE_HOSTS", r"[\w.-]+|\*", "names of hosts are needed, without ports")
    of_origins = "origins such as https://app.example are needed, or *"
    origins = configured_list(environ, "AGGREGATE_ORIGINS", r"https?://[^/\s]+|\*", of_origins)
    smallest = configured_number(environ, "AGGREGATE_GZIP", "a number of bytes is needed")
    options: dict[str, Any] = {"retention": retention, "output": standard_output(), "hosts": hosts}
    app: ASGIApp = create_app(configured(environ), rate, database=database, **options)
    if smallest is not None:
        app = GZipMiddleware(app, int(smallest), compresslevel=5)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "If-None-Match", "Last-Event-ID", "X-Request-ID"),
            expose_headers=("Age", "ETag", "Retry-After", "X-Request-ID"),
        )
    return app


if __name__ == "__main__":
    raise SystemExit(main())
app = configured_app(os.environ)
