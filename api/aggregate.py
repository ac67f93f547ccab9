"""``GET /aggregate`` and ``POST /cache/invalidate``: what the API is for.

A request asks all its sources at once. What the caches know is taken at once; for the rest it waits, until its
deadline, for loads that go on without it. What a path and query ask for is remembered as a ``Plan``: where one is
known, and the caches know all of it, the answer is sent before any route (api/middleware.py), by the same ``assemble``.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from api.bus import News
from api.config import Key
from api.parts import Loaded, Part
from api.requests import (
    authorised,
    check,
    check_values,
    known_sources,
    names_in,
    query_of,
    reply,
    service_of,
    whole_number,
)
from api.upstreams import Source
from coordination import fan_out

DEADLINE_MS = 1, 1000, 30_000  # the least, usual and greatest ``deadline_ms``
NO_DATA = b'{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"no source has data",'
ONLY_FRESH, FROM_CACHE = frozenset({"fresh"}), frozenset({"fresh", "stale"})


class Begun(NamedTuple):
    """The parts that are known at once, and the loads of the rest."""

    parts: dict[str, Part]
    loads: dict[str, asyncio.Task[Loaded]]


class Plan(NamedTuple):
    """What a request asks for: its sources, each with its key, and for how many seconds it waits at most."""

    asked: dict[str, tuple[Source, Key]]
    deadline: float

    @classmethod
    def of(cls, sources: Mapping[str, Source], given: Mapping[str, str], deadline: float) -> Plan:
        """The plan to ask ``sources`` with the parameters ``given``."""
        return cls({name: (source, source.key(given)) for name, source in sources.items()}, deadline)

    @classmethod
    def read(cls, request: Request) -> Plan:
        """The plan of a request. Raises ``Problem`` if something in it is unknown."""
        query, one = query_of(request), request.path_params.get("source")
        allowed, names = {"deadline_ms"}, None if one is None else [one]
        if names is None:
            names = names_in(query)
            allowed.add("sources")
        sources = known_sources(request, names)
        check(query, allowed.union(*(source.upstream.parameters for source in sources.values())))
        check_values(query, [source.upstream for source in sources.values()])
        return cls.of(sources, query, whole_number(query, "deadline_ms", *DEADLINE_MS) / 1000)

    def begin(self) -> Begun:
        """Look at the caches, and begin to load what is not there."""
        begun = Begun({}, {})
        for name, (source, key) in self.asked.items():
            part = source.known(key)
            if isinstance(part, Part):
                begun.parts[name] = part
            else:
                begun.loads[name] = part
        return begun

    async def gather(self, begun: Begun | None = None) -> dict[str, Part]:
        """A part for each source, after the deadline at the latest. Loads go on."""
        parts, loads = begun or self.begin()
        ended = await fan_out(loads, self.deadline, cancel=False)
        late = {name: self.asked[name][0].outcome(self.asked[name][1], load) for name, load in ended.items()}
        return {name: parts.get(name) or late[name] for name in self.asked}


class Answer(NamedTuple):
    """An assembled answer as it is sent, and the state of each of its parts."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    states: dict[str, str]


@functools.lru_cache(1)
def _iso(milliseconds: int) -> bytes:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").encode()


@functools.lru_cache(1000)
def _etag(content: str) -> bytes:
    return b'W/"%b"' % hashlib.blake2b(content.encode(), digest_size=12).hexdigest().encode()


def assemble(plan: Plan, parts: Mapping[str, Part], started: float, tags: bytes = b"") -> Answer:
    """200 if any source has data, 304 if the client has just that (``tags``: its If-None-Match), else 503.

    ``started``: when the request came (monotonic seconds). The parts are counted.
    """
    states, ages, content, shown = {}, [], [], []
    for name, part in parts.items():
        state = states[name] = part.state
        plan.asked[name][0].answers[state] += 1
        if part.age is not None:
            ages.append(part.age)
        content.append(f"{name} {state} {part.data and part.data.digest}")
        shown.append(b'"%b":%b' % (name.encode(), part.encoded()))
    body = b'"partial":%b,"generated_at":"%b","duration_ms":%.1f,"sources":{%b}}' % (
        b"false" if FROM_CACHE.issuperset(states.values()) else b"true",
        _iso(int(time.time() * 1000)),
        (time.monotonic() - started) * 1000,
        b",".join(shown),
    )
    status, control, kind = 200, b"no-cache", b"application/json"
    if not any(part.data for part in parts.values()):
        later = max(1, math.ceil(min(part.retry_after for part in parts.values())))
        status, control, kind = 503, b"no-store", b"application/problem+json"
        headers = [(b"retry-after", b"%d" % later)]
        body = NO_DATA + body
    else:
        etag = _etag(";".join(content))
        headers = [(b"etag", etag)]
        if tags and not {etag, etag[2:], b"*"}.isdisjoint(map(bytes.strip, tags.split(b","))):
            status = 304
        if ages:
            oldest = math.ceil(max(ages))
            headers.append((b"age", b"%d" % oldest))
        if ONLY_FRESH.issuperset(states.values()):
            control = b"max-age=%d" % (oldest + int(min(part.expires_in for part in parts.values())))
        body = b"{" + body
    headers.append((b"cache-control", control))
    if status == 304:
        return Answer(status, headers, b"", states)
    headers += (b"content-length", b"%d" % len(body)), (b"content-type", kind)
    return Answer(status, headers, body, states)


async def aggregate(request: Request) -> Response:
    """``/aggregate`` and ``/aggregate/{source}``: the answer when all is there, or the deadline."""
    scope = request.scope
    plan = scope.get("plan")
    if plan is None:
        plan = Plan.read(request)
        service_of(request).plans.put((scope["path"], scope["query_string"]), plan)
    parts = await plan.gather(scope.get("begun"))
    answer = assemble(plan, parts, scope["started"], scope["tags"])
    scope["states"] = answer.states
    response = Response(answer.body, answer.status)
    response.raw_headers = answer.headers
    return response


async def invalidate(request: Request) -> Response:
    """``/cache/invalidate``: forgets all answers, those of ``?source=``, or that for its parameters too."""
    authorised(request)
    query = query_of(request)
    name = query.pop("source", None)
    sources = known_sources(request, None if name is None else [name])
    check(query, ("source",) if name is None else sources[name].upstream.parameters)
    check_values(query, [source.upstream for source in sources.values()])
    service, key = service_of(request), sources[name].key(query) if name is not None and query else None
    service.bus.tell(News("invalidate", name or "", key))
    return reply({"invalidated": service.invalidate(name, key)})
