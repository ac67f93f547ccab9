"""``GET /aggregate`` and ``POST /cache/invalidate``: what the API is for.

A request asks all its sources at once (``gather``). What the caches know is taken at once; for the rest it waits, until
its deadline, for loads that go on without it. The assembled answer is kept, unless something changed meanwhile.
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
from api.requests import Problem, authorised, check, known_sources, names_in, query_of, reply, service_of, whole_number
from api.service import KEPT, KeptAnswer
from api.upstreams import Loaded, Part, Source
from coordination import fan_out

DEADLINE_MS = 1, 1000, 30_000  # the least, usual and greatest ``deadline_ms``


def parse_request(request: Request, names: Sequence[str] | None) -> tuple[dict[str, Source], dict[str, str], float]:
    """The sources (None: those of the query) and parameters of a request, and its deadline in seconds.

    Raises ``Problem`` if something is unknown."""
    query = query_of(request)
    allowed = {"deadline_ms"}
    if names is None:
        names = names_in(query)
        allowed.add("sources")
    sources = known_sources(request, names)
    check(query, allowed.union(*(source.upstream.parameters for source in sources.values())))
    return sources, query, whole_number(query, "deadline_ms", *DEADLINE_MS) / 1000


async def gather(sources: Mapping[str, Source], given: Mapping[str, str], deadline: float) -> dict[str, Part]:
    """A part for each source, after ``deadline`` seconds at the latest. Loads go on."""
    parts: dict[str, Part | None] = {}
    keys: dict[str, Key] = {}
    loads: dict[str, asyncio.Task[Loaded]] = {}
    for name, source in sources.items():
        keys[name] = source.key(given)
        parts[name], load = source.known(keys[name])
        if load is not None:
            loads[name] = load
    ended = await fan_out(loads, deadline, cancel=False)
    return {name: part or sources[name].outcome(keys[name], ended[name]) for name, part in parts.items()}


async def aggregate(request: Request) -> Response:
    """``/aggregate`` and ``/aggregate/{source}``: 200 if any source has data, else 503 with Retry-After."""
    started = time.monotonic()
    service, one = service_of(request), request.path_params.get("source")
    sources, given, deadline = parse_request(request, None if one is None else [one])
    changes = service.changes
    parts = await gather(sources, given, deadline)
    states = request.scope["states"] = {name: part.state for name, part in parts.items()}
    counted = [(sources[name].answers, state) for name, state in states.items()]
    for answers, state in counted:
        answers[state] += 1
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
            kept, asked = KeptAnswer(response.raw_headers, bytes(response.body), states, counted), request.scope
            service.kept.put((asked["path"], asked["query_string"]), kept, ttl=left, weight=len(kept.body))
    return response


async def invalidate(request: Request) -> Response:
    """``/cache/invalidate``: forgets all answers, those of ``?source=``, or that for its parameters too."""
    authorised(request)
    query = query_of(request)
    name = query.pop("source", None)
    sources = known_sources(request, None if name is None else [name])
    check(query, ("source",) if name is None else sources[name].upstream.parameters)
    for source in sources.values():
        source.forget(source.key(query) if query else None)
    service_of(request).events.publish("invalidate", {"sources": sorted(sources)})
    return reply({"invalidated": sorted(sources)})
