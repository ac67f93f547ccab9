"""What the metadata API knows of a service: team, environment, region and version, and never a wait for it.

`Enricher.look` is called for every event and answers from memory, in well under a microsecond. What it does not know it
asks for: the name goes into a bounded queue, a few tasks take from it, and each load goes

    single flight -> circuit breaker -> time limit -> retries, under a budget -> `logs.metadata` -> cache.

Three things are remembered, each in a `TTLCache` of its own, so that invented names push out nothing that is real: what
is *known* (fresh for `ttl`, then stale for `stale` seconds: answered at once, while one load renews it), which names
the API does *not know* (404; for `unknown_ttl`), and which loads *failed* (not asked for again for `failed_for`).

In front of them is a plain dict of what `look` answered, "not known" too: that makes 0.15 us of the 0.9 that asking the
caches costs, and an event can afford about 10 in all. It is emptied every `FRONT` seconds and whenever it has `maxsize`
names, and a name leaves it when its load ends: an answer can be `FRONT` seconds older than the windows say.

Promised
- `look` never waits, raises nothing, and costs O(1). `wait` ends after its limit, whatever the API does.
- Of any number that want one service, one request at a time is made; none while the circuit is open, but for probes.
- Memory is bounded whatever names are invented: by `maxsize` names in each cache, and `waiting` in the queue. Beyond
  that `look` just says None, and the name is asked for when it comes again.

Not promised: that a service gets its turn while more names than the queue holds are invented; that the API is asked
slowly for them (it is asked by no more than `tasks` at a time); or that what is stale is still true.

Everything belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import yarl

from coordination import Clock, Rng, WorkerPool, stats_repr
from logs.metadata import UNKNOWN, Found, MetadataClient, MetadataError, Unknown
from logs.parse import Metadata
from primitives import CircuitBreaker, CircuitOpen, RetryBudget, RetryPolicy, SingleFlight, TTLCache, retry_async

log = logging.getLogger(__name__)

FRONT = 1.0  # seconds for which an answer of ``look`` is given again without another thought
SPREAD = 0.1
"""The share of ``ttl`` by which entries expire earlier, at random: what was loaded together is not renewed together."""

_ABSENT: Any = object()


class EnricherStats(NamedTuple):
    """What an enricher did."""

    loads: int  # requests that were begun for some name; retries do not count, nor what the open circuit refused
    failures: int  # loads that failed
    turned_away: int  # names that found the queue full
    breaker: str
    failed: dict[str, int]  # the failures by kind
    last_error: str | None


class Enricher:
    """Metadata of services, from the API at ``url`` (``http://host/services/{service}``; None: there is none).

    Seconds: ``ttl`` and ``stale`` of what is known, ``unknown_ttl`` and ``failed_for`` of what is not, ``timeout`` of a
    load with its retry. ``maxsize``: names in each cache. ``tasks``: loads at a time, ``waiting``: names in the queue.
    ``reset``: seconds until an open circuit lets a probe through. ``ValueError`` for a URL that is none.
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
        reset: float = 2.0,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        self.client = None if url is None else MetadataClient(url)
        self.configured = url is not None  # whether there is an API at all
        self.maxsize, self.tasks, self.waiting = maxsize, tasks, waiting
        self.timeout, self.failed_for = timeout, failed_for
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
        self._pool: WorkerPool[str] | None = None  # loads names; None while the enricher is not open
        self._asked: dict[str, asyncio.Future[None]] = {}  # what is in the pool, until that has ended
        self._loads = self._turned_away = 0
        self._failures: Counter[str] = Counter()
        self._last_error: str | None = None

    async def __aenter__(self) -> Enricher:
        """Begin to load what is asked for."""
        if self.client is not None:
            self.client.open()
            self._front.clear()
            self._pool = WorkerPool(self._load_asked, self.tasks, self.waiting, name="enrich").start_tasks()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give up what is being loaded; whoever waits goes on. ``look`` still answers what is known."""
        pool, self._pool = self._pool, None
        for service in list(self._asked):
            self._end_wait(service)
        self._asked.clear()
        try:
            if pool is not None:
                await pool.close_async(0)
        finally:
            if self.client is not None:
                await self.client.close()

    def look(self, service: str) -> Found:
        """What is known, at once: ``Metadata``, ``UNKNOWN``, or None, and then it is asked for."""
        found: Found = self._front.get(service, _ABSENT)
        if found is _ABSENT or self._clock() >= self._front_until:
            return self._find(service)
        return found

    def _find(self, service: str) -> Found:
        if self.client is None:
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
            self._asked[service] = asyncio.get_running_loop().create_future()

    async def wait(self, services: Iterable[str], limit: float) -> None:
        """Until each of them is known or has failed, at most ``limit`` seconds.

        What cannot be asked for (the queue is full, it failed just now, nothing is open) is not waited for.
        """
        ends = [self._asked[name] for name in set(services) if self.look(name) is None and name in self._asked]
        if ends and limit > 0:
            await asyncio.wait(ends, timeout=limit)

    def _end_wait(self, service: str) -> None:
        """What is known of it by now is to be looked up again."""
        self._front.pop(service, None)
        end = self._asked.get(service)
        if end is not None and not end.done():
            end.set_result(None)

    async def _load_asked(self, service: str) -> None:
        try:
            await self.load(service)
        finally:
            self._end_wait(service)
            self._asked.pop(service, None)

    async def load(self, service: str) -> Found:
        """What the API says, unless it said so just now; None if that failed, or if nothing is open."""
        if self._pool is None:
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
        assert self.client is not None
        address = self.client.address(service)
        found: Metadata | Unknown = UNKNOWN
        if address is not None:
            try:
                found = await self.breaker.call_async(self._call, self.client, address)
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
        self._end_wait(service)
        return found

    def _give_up(self, service: str, seconds: float) -> None:
        """It is not asked for again for so long. A stale answer stays one."""
        now = self._clock()
        self._known.defer(service, seconds, now)
        self._failed.put(service, now, ttl=seconds, now=now)

    async def _call(self, client: MetadataClient, address: yarl.URL) -> Metadata | Unknown:
        self._loads += 1
        try:
            async with asyncio.timeout(self.timeout):
                return await retry_async(
                    lambda: client.fetch(address),
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

    def stats(self) -> EnricherStats:
        """Counts since the beginning."""
        return EnricherStats(
            loads=self._loads,
            failures=self._failures.total(),
            turned_away=self._turned_away,
            breaker=self.breaker.state,
            failed=dict(self._failures),
            last_error=self._last_error,
        )

    __repr__ = stats_repr
