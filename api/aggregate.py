"""``GET /aggregate`` and ``POST /cache/invalidate``: what the API is for.

A request asks all its sources at once (``gather``). What the caches know is taken at once; for the rest it waits, until
its deadline, for loads that go on without it. The assembled answer is kept for ``KEPT`` seconds, unless something
changed while it was being made: it may then be from before an invalidation.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response

from api.config import Key
from api.requests import (
    Problem,
    authorised,
    check,
    known_sources,
    names_in,
    query_of,
    reply,
    service_of,
    sources_of,
    whole_number,
)
from api.service import KEPT, KeptAnswer
from api.upstreams import Loaded, Part, Source

DEADLINE_MS = 1, 1000, 30_000
"""The least, usual and greatest ``deadline_ms``."""


def wanted(request: Request, names: Sequence[str] | None) -> tuple[dict[str, Source], dict[str, str], float]:
    """The sources and parameters of a request, and its deadline in seconds. ``Problem`` if something is not there."""
    query = query_of(request)
    allowed = {"deadline_ms"}
    if names is None:
        names = names_in(query, request)
        allowed.add("sources")
    chosen = known_sources(request, names)
    check(query, allowed.union(*(source.upstream.parameters for source in chosen.values())))
    return chosen, query, whole_number(query, "deadline_ms", *DEADLINE_MS) / 1000


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
    service.count(states)
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
        left = started + min(KEPT, *(part.expires_in for part in parts.values())) - time.monotonic()
        if left > 0:
            kept, asked = KeptAnswer(response.raw_headers, bytes(response.body), states), request.scope
            service.kept.put((asked["path"], asked["query_string"]), kept, ttl=left, weight=len(kept.body))
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
