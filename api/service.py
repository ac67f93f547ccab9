"""One running API: its sources, the answers that it keeps, its tasks; how it ends.

Everything is the event loop's and needs no lock. Hosts are looked at in threads, figures computed in processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, cast

import asyncpg
import orjson
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

from api.bus import Bus, News
from api.config import Key
from api.history import History, Result
from api.parts import Load, Loaded
from api.report import inspect_host
from api.telemetry import METRICS, Events, RequestLog
from api.upstreams import Source, request_id
from coordination import Semaphore, T, cancel_all
from primitives import State, TTLCache
from runtime.loop import Lag
from runtime.monitor import Exporter, Histogram
from runtime.postgres import Database, Unavailable
from runtime.processes import Processes, in_daemon

if TYPE_CHECKING:
    from api.aggregate import Plan

log = logging.getLogger("uvicorn.error")

GRACE = 5.0  # seconds that loads under way get when the server stops
PLANS = 1000  # paths with their queries whose meaning is remembered
RENEW_EVERY, RETAIN_EVERY = 0.1, 600.0
"""Seconds between two searches for what is to be renewed, and for what is too old to be kept."""
WARM = 3.0  # seconds that the start waits for the database and what it knows
REPORTS, INSPECTIONS = 16, 4  # reports, and inspections of hosts for them, at a time
PLACES = 256  # calls under way to all upstreams together


class Service:
    """All that lives as long as the server runs."""

    def __init__(self, sources: dict[str, Source], database: Database, output: IO[bytes] | None) -> None:
        self.sources, self.database, self.history = sources, database, History(database)
        self.lag, self.events, self.log = Lag(), Events(), RequestLog(output)
        self.processes = Processes(waiting=REPORTS)
        self.reports, self._inspections = Semaphore(REPORTS), Semaphore(INSPECTIONS)
        self.registry = CollectorRegistry()
        self.registry.register(cast(Any, Exporter(METRICS, lambda: self)))
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests: defaultdict[tuple[str, int], Histogram] = defaultdict(Histogram)  # by route and status
        self.started, self.stopping, self.patience = time.monotonic(), False, math.inf
        self.force: Callable[[], object] = lambda: None
        self.timers: list[asyncio.TimerHandle] = []
        self.tasks: dict[str, asyncio.Task[Any]] = {}
        self.plans: TTLCache[tuple[str, bytes], Plan] = TTLCache(PLANS, math.inf)  # by path and query
        self.bus, self._hearing = Bus(database, self.heard), False
        for name, source in sources.items():
            source.listeners.append(self.loaded)
            source.breaker.listen(self._switched)
            source.tell = functools.partial(self._paused, name)

    def begin(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task beside the requests. One that fails is an error in the log, and shown by /health."""

        def ended(task: asyncio.Task[T]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("task %s ended", name, exc_info=error)
            else:
                del self.tasks[name]

        task = self.tasks[name] = asyncio.create_task(work, name=name)
        task.add_done_callback(ended)
        return task

    def loaded(self, load: Load) -> None:
        """Hand the result of a load to the history, the events and, if it failed, the log."""
        parameters = load.parameters
        state, error = ("ok", None) if load.error is None else (load.error.kind, str(load.error))
        payload = None if load.data is None else load.data.encoded.decode()
        asked, digest = orjson.dumps(parameters).decode(), self.sources[load.source].upstream.digest
        self.history.keep(Result(load.source, asked, load.at, load.latency, state, payload, digest))
        latency = round(load.latency * 1000, 1)
        fields = {"source": load.source, "parameters": parameters, "latency_ms": latency, "error": error}
        self.events.publish("refresh", {**fields, "state": "ok" if error is None else "error"})
        if error is not None:
            self.log.note("failed load", request_id.get(), fields)

    def _switched(self, source: str, previous: State, state: State, _: int) -> None:
        fields = {"source": source, "state": state, "previous": previous}
        self.events.publish("breaker", fields)
        self.log.note("breaker", request_id.get(), fields)
        if state == "open" and not self._hearing:
            self.bus.tell(News("open", source))

    def _paused(self, source: str, key: Key | None, seconds: float) -> None:
        self.bus.tell(News("pause", source, key, seconds))

    def invalidate(self, source: str | None, key: Key | None) -> list[str]:
        """Forget the answers of a source (None: of all; ``key``: that one only), here and wherever else it is served.
        Returns the names."""
        names = sorted(self.sources) if source is None else [source]
        for name in names:
            self.sources[name].forget(key)
        self.events.publish("invalidate", {"sources": names})
        return names

    def heard(self, news: News) -> None:
        """Do here what happened elsewhere; what does not fit is another configuration's."""
        if news.kind == "invalidate" and not news.source:
            self.invalidate(None, None)
        source, key = self.sources.get(news.source), news.key
        if source is None or (key is not None and len(key) != len(source.upstream.parameters)):
            return
        if news.kind == "invalidate":
            self.invalidate(news.source, key)
        elif news.kind == "pause":
            source.pause(news.seconds, key)
        elif news.kind == "open":
            self._hearing = True
            source.breaker.trip()
            self._hearing = False

    async def renew(self) -> None:
        """Load what is in use before it gets stale, until the stop."""
        request_id.set("renewal")
        while not self.stopping:
            await asyncio.sleep(RENEW_EVERY)
            for source in self.sources.values():
                source.renew()

    async def retain(self, seconds: float) -> None:
        """Delete results older than ``seconds`` now and then."""
        while True:
            await self.database.ready()
            with contextlib.suppress(Unavailable, asyncpg.PostgresError):
                await self.history.forget(seconds)
            await asyncio.sleep(RETAIN_EVERY)

    async def warm(self) -> None:
        """Fill the caches with the last results of the history, as stale, once there is a database."""
        await self.database.ready()
        for name, source in self.sources.items():
            upstream = source.upstream
            within = upstream.ttl + max(upstream.stale, upstream.stale_if_error)
            try:
                results = await self.history.latest(name, within, upstream.keys, configuration=upstream.digest)
            except (Unavailable, asyncpg.PostgresError) as error:
                log.warning("no warm start: %s", type(error).__name__)
                return
            for result in results:
                given = orjson.loads(result.parameters)
                if given.keys() == upstream.parameters.keys() and result.payload is not None:
                    age = (datetime.now(UTC) - result.fetched_at).total_seconds()
                    source.warm(source.key(given), result.payload.encode(), age, result.latency)
                await asyncio.sleep(0)

    def inspection(self, name: str) -> asyncio.Task[dict[str, Any]]:
        """The inspection of a source's host that is under way, or a new one: one, however many reports want it."""

        async def inspect() -> dict[str, Any]:
            async with self._inspections:
                return await in_daemon(inspect_host, self.sources[name].upstream.url)

        return self.tasks.get(f"look at {name}") or self.begin(f"look at {name}", inspect())

    def stop(self) -> None:
        """At the signal: streams end; loads and reports, which requests may wait for, have ``GRACE`` seconds left.

        A client that does not read its answer would keep the server for ever: a second later it is let go.
        """
        if not self.stopping:
            self.stopping, self.patience = True, time.monotonic() + GRACE
            self.events.end()
            later = asyncio.get_running_loop().call_later
            self.timers = [later(GRACE, self._cut), later(GRACE + 1.0, self.force)]

    def _cut(self) -> None:
        self.cancel_loads()
        self.begin("end of reports", self.processes.close(0.0))

    def cancel_loads(self) -> list[asyncio.Task[Loaded]]:
        """Cancel all loads, and return their tasks."""
        loads = [load for source in self.sources.values() for load in source.running]
        for load in loads:
            load.cancel()
        return loads

    async def close(self) -> None:
        """End all tasks; loads have what is left of ``GRACE``."""
        self.stop()
        for timer in self.timers:
            timer.cancel()
        await cancel_all(self.tasks.values())
        while loads := [load for source in self.sources.values() for load in source.running]:
            await asyncio.wait(loads, timeout=max(0.0, self.patience - time.monotonic()))
            await asyncio.wait(self.cancel_loads() or loads)
