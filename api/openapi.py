"""The API described: an OpenAPI 3.1 document, made from the configured upstreams.

Promised
- Exact: what the document allows is answered, what it forbids is refused, and every answer is of a form it names.
  Objects are closed (``additionalProperties: false``) and name what is always there, but for the data of an upstream.
- A route with ``{source}`` is written out for each upstream (``/aggregate/weather``), with that upstream's own
  parameters: what another one takes is refused there, and a template could not say so.

Not said, for OpenAPI cannot: that ``/aggregate`` and ``/cache/invalidate`` take the parameters of those sources only
that are asked for; that a query has at most 4,096 bytes in all (414). HEAD is answered wherever GET is.

Nothing here knows of the server: ``document`` is a pure function, called once when the upstreams are known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from api.config import Upstream
from api.upstreams import UpstreamError
from primitives import TTLCacheStats

Json = dict[str, Any]

STATES = ("fresh", "stale", "fallback", "timeout", "error", "open")
"""What a part of an answer can be."""
EXAMPLE = "2026-01-31T12:00:00+00:00"
TOKEN = "The value of AGGREGATE_TOKEN. While that is not set, clients on loopback need none."

TEXT: Json = {
    "type": "string",
    "minLength": 1,
    "maxLength": 200,
    "pattern": r"^[^\x00-\x1f\x7f]+$",
    "not": {"enum": [".", ".."]},
}
"""The value of an upstream's parameter."""
STRING: Json = {"type": "string"}
TIME: Json = {"type": "string", "format": "date-time"}
COUNT: Json = {"type": "integer", "minimum": 0}
NUMBER: Json = {"type": "number", "minimum": 0}

PROBLEMS = {
    401: ("A bearer token is needed", ("WWW-Authenticate",)),
    403: ("Without a configured token only clients of the server's machine may do this", ()),
    404: ("Unknown source; `sources` lists the known ones", ()),
    405: ("Another method is needed", ("Allow",)),
    413: ("The request announces a body of more than 64 KB", ()),
    414: ("The query has more than 4,096 bytes", ()),
    422: ("A parameter is unknown, there twice, empty, too long, or out of its range", ()),
    429: ("The client is over its rate", ("Retry-After",)),
    431: ("The headers have more than 32 KB in all", ()),
    503: ("Not now", ("Retry-After",)),
}
"""What an answer that is a problem document means, and the headers it has."""
ALWAYS = (405, 413, 414, 429, 431)
"""What every route can answer with."""


# ------------------------------------------------------------------------------------------------------- schemas


def ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def closed(properties: Mapping[str, Json], optional: Sequence[str] = ()) -> Json:
    """An object of these properties, all there but for the optional ones, and of no others."""
    needed = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": needed, "additionalProperties": False}


def one_of(values: Iterable[str]) -> Json:
    return {"type": "string", "enum": list(values)}


def array(items: Json) -> Json:
    return {"type": "array", "items": items}


def whole(most: int, usual: int) -> Json:
    return {"type": "integer", "minimum": 1, "maximum": most, "default": usual}


def by_name(names: Iterable[str], value: Json) -> Json:
    """An object whose members are of one kind, by names that are known."""
    return {"type": "object", "propertyNames": {"enum": list(names)}, "additionalProperties": value}


def maybe(schema: Json, *names: str) -> dict[str, Json]:
    """Members that are there, but may be null."""
    return {name: {**schema, "type": [schema["type"], "null"]} for name in names}


def percentiles(*names: str) -> Json:
    """Milliseconds by percentile: all of them, or none while nothing was measured."""
    return {"anyOf": [closed(dict.fromkeys(names, NUMBER)), closed({})]}


def schemas(names: Sequence[str]) -> dict[str, Json]:
    members = {"sources": array(STRING), "parameter": STRING, "parameters": array(STRING)}
    problem = {"type": STRING, "title": STRING, "status": {"type": "integer", "minimum": 400, "maximum": 599}}
    part = {
        "state": one_of(STATES),
        "data": {"description": "What the upstream said; null if nothing is known"},
        **maybe(NUMBER, "age_s", "latency_ms") | maybe(STRING, "error"),
    }
    parts = by_name(names, ref("schemas", "Part")) | {"minProperties": 1}
    answered = {"partial": {"type": "boolean"}, "generated_at": TIME, "duration_ms": NUMBER, "sources": parts}
    database = {
        "state": one_of(("connected", "connecting", "down", "none")),
        "kind": {"enum": ["embedded", "DATABASE_URL", None]},
        "since": TIME,
        **dict.fromkeys(("queued", "written", "lost", "refused", "batches"), COUNT),
        **maybe(STRING, "error"),
    }
    source_health = {
        "breaker": one_of(("closed", "half_open", "open")),
        "next_probe_s": NUMBER,
        **dict.fromkeys(("recent_failures", "calls", "failed_loads", "loading", "renewing"), COUNT),
        "answers": by_name(STATES, COUNT),
        "latency_ms": percentiles("p50", "p95", "p99"),
        "recent_ms": array(NUMBER) | {"maxItems": 60},
        **maybe(TIME, "last_success") | maybe(STRING, "last_error") | maybe(NUMBER, "age_s"),
        "ttl_s": NUMBER,
        "cache": closed(dict.fromkeys(TTLCacheStats._fields, COUNT) | {"weight": NUMBER}),
    }
    host = {"name": STRING, **maybe(STRING, "address", "error"), **maybe(NUMBER, "dns_ms", "connect_ms")}
    host["certificate_days"] = {"type": ["number", "null"]}  # negative once it has expired
    reported = {
        "results": COUNT,
        **maybe({**NUMBER, "maximum": 1}, "availability"),
        "latency_ms": percentiles("p50", "p95", "p99", "max"),
        "errors": {"type": "object", "additionalProperties": COUNT},
        "change_points": array(closed({"at": TIME, "before_ms": NUMBER, "after_ms": NUMBER})),
        "host": closed(host),
    }
    health = {
        "status": one_of(("ok", "degraded")),
        **dict.fromkeys(("uptime_s", "loop_lag_ms"), NUMBER),
        "streams": COUNT,
        "database": closed(database),
        "tasks": {"type": "object", "additionalProperties": one_of(("running", "ended"))},
        "sources": by_name(names, ref("schemas", "SourceHealth")),
    }
    asked = {"type": "object", "additionalProperties": STRING}
    status_of = one_of(("ok", *UpstreamError.KINDS))
    result = {"fetched_at": TIME, "parameters": asked, "status": status_of, "latency_ms": NUMBER, "data": {}}
    return {
        "Problem": closed({**problem, **members}, optional=list(members)),
        "NoData": closed({**problem, **answered}),
        "Part": closed(part),
        "Answer": closed(answered),
        "Invalidated": closed({"invalidated": array(one_of(names))}),
        "Health": closed(health),
        "SourceHealth": closed(source_health),
        "Ok": closed({"status": {"const": "ok"}}),
        "History": closed({"source": one_of(names), "results": array(closed(result)), **maybe(STRING, "next")}),
        "Report": closed({"generated_at": TIME, "hours": whole(168, 24), "sources": by_name(names, closed(reported))}),
    }


# ------------------------------------------------------------------------------------- parameters and answers


def parameter(name: str, schema: Json, about: str, where: str = "query", **more: Any) -> Json:
    return {"name": name, "in": where, "description": about, "schema": schema, **more}


def header(pattern: str, about: str, required: bool) -> Json:
    return {"description": about, "required": required, "schema": {**STRING, "pattern": pattern}}


def own(upstreams: Iterable[Upstream], defaults: bool = True) -> list[Json]:
    """The parameters of these upstreams; one with the same name goes to each of them."""
    found: dict[str, dict[str, str]] = {}
    for upstream in upstreams:
        for name, default in upstream.parameters.items():
            found.setdefault(name, {})[upstream.name] = default
    listed = []
    for name, values in found.items():
        schema, default = dict(TEXT), next(iter(values.values()))
        usable = re.fullmatch(r"[^\x00-\x1f\x7f]{1,200}", default) is not None and default not in (".", "..")
        if defaults and usable and len(set(values.values())) == 1:
            schema["default"] = default
        more = {"example": default} if usable else {}
        listed.append(parameter(name, schema, f"Of {', '.join(values)}", **more))
    return listed


def common(*names: str) -> list[Json]:
    return [ref("parameters", name) for name in names]


def content(media: str, schema: Json | None = None, example: Any = None) -> Json:
    shown = {"schema": schema or STRING}
    return {media: shown if example is None else {**shown, "example": example}}


def json(schema: str, example: Any = None) -> Json:
    return content("application/json", ref("schemas", schema), example)


def answer(about: str, body: Json | None, *headers: str) -> Json:
    shown = {name: ref("headers", name) for name in (*headers, "X-Request-ID")}
    return {"description": about, "headers": shown, **({} if body is None else {"content": body})}


def operation(summary: str, ok: Json, *statuses: int, parameters: Sequence[Json] = (), **more: Any) -> Json:
    """``ok`` is the answer with 200; ``more`` are the operation's other members, ``responses`` among them."""
    refusals = {str(status): ref("responses", str(status)) for status in sorted({*ALWAYS, *statuses})}
    responses = {"200": ok, **refusals, **more.pop("responses", {})}
    given = [*parameters, ref("parameters", "X-Request-ID")]
    return {"summary": summary, "parameters": given, "responses": dict(sorted(responses.items())), **more}


def components(upstreams: Mapping[str, Upstream]) -> Json:
    names = list(upstreams)
    known = "|".join(map(re.escape, names))
    headers = {
        "ETag": (r'^W/"[0-9a-f]{24}"$', "Of the data and of the states; weak, for the times differ"),
        "Cache-Control": (r"^(max-age=[0-9]+|no-cache|no-store)$", "For how long the answer stays fresh, if it is"),
        "Age": ("^[0-9]+$", "Seconds, of the oldest data in it; none if all is a fallback"),
        "Retry-After": (r"^[1-9][0-9]*$", "Seconds"),
        "X-Request-ID": ("^[A-Za-z0-9_-]{1,64}$", "The client's, if it is well formed, else a new one"),
        "WWW-Authenticate": ("^Bearer$", "What is needed"),
        "Allow": ("^[A-Z]+(, [A-Z]+)*$", "The methods there are"),
        "Content-Security-Policy": (".", "Only what the page brings itself"),
    }
    listed = {**STRING, "pattern": f"^({known})(,({known}))*$", "default": ",".join(names)}
    parameters = [
        parameter("X-Request-ID", STRING, "Kept if it has 1 to 64 of A-Z a-z 0-9 _ -", "header"),
        parameter("If-None-Match", STRING, "ETags of answers that are at hand", "header"),
        parameter("Last-Event-ID", STRING, "The last event that arrived", "header"),
        parameter("sources", listed, "Names of sources, with commas between them"),
        parameter("source", one_of(names), "Of this source only"),
        parameter("deadline_ms", whole(30_000, 1000), "Milliseconds to wait for what is not at hand"),
        parameter("hours", whole(168, 24), "How far back"),
        parameter("limit", whole(1000, 100), "Results of a page"),
        parameter("before", TIME, "Results older than this (RFC 3339)", example=EXAMPLE),
    ]
    problems = {}
    for status, (about, extra) in PROBLEMS.items():
        shown = {"type": "about:blank", "title": about, "status": status}
        body = content("application/problem+json", ref("schemas", "Problem"), shown)
        problems[str(status)] = answer(about, body, *extra)
    return {
        "schemas": schemas(names),
        "parameters": {each["name"]: each for each in parameters},
        "responses": problems,
        "headers": {name: header(*described, name != "Age") for name, described in headers.items()},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": TOKEN}},
    }


def document(upstreams: Mapping[str, Upstream], version: str) -> dict[str, Any]:
    """The OpenAPI document of the API before these upstreams (at least one); ``version`` is the API's own."""
    part = {"state": "fresh", "data": {"value": 1}, "age_s": 0.25, "latency_ms": 12.5, "error": None}
    late = {"state": "timeout", "data": None, "age_s": None, "latency_ms": None, "error": "not here in time"}
    refused = {"type": "about:blank", "title": "no source has data", "status": 503}

    caching = ("ETag", "Cache-Control", "Age")

    def aggregate(asked: Mapping[str, Upstream], one: bool) -> Json:
        first = next(iter(asked), "")
        whole = {"partial": False, "generated_at": EXAMPLE, "duration_ms": 12.8, "sources": {first: part}}
        empty = {**refused, **whole, "partial": True, "sources": {first: late}}
        none = content("application/problem+json", ref("schemas", "NoData"), empty)
        return operation(
            f"What {first} says" if one else "What all upstreams say, or those of `sources`",
            answer("What is there at the deadline", json("Answer", whole), *caching),
            *((422,) if one else (404, 422)),
            parameters=common("deadline_ms", *(() if one else ("sources",)), "If-None-Match") + own(asked.values()),
            responses={
                "304": answer("The client has this answer", None, *caching),
                "503": answer("No source has data", none, "Retry-After", "Cache-Control"),
            },
        )

    ok, text = answer("It is", json("Ok", {"status": "ok"})), {"type": "object"}
    paths: dict[str, Json] = {"/aggregate": {"get": aggregate(upstreams, one=False)}}
    for name, upstream in upstreams.items():
        paths[f"/aggregate/{name}"] = {"get": aggregate({name: upstream}, one=True)}
        asked = common("limit", "before") + own([upstream], defaults=False)
        page = answer("A page, the latest first; `next` is the path of the next one", json("History"), "Cache-Control")
        paths[f"/history/{name}"] = {"get": operation(f"What {name} said", page, 422, 503, parameters=asked)}
    invalidate = operation(
        "Forget all answers, those of a source, or that for its parameters",
        answer("Forgotten", json("Invalidated", {"invalidated": list(upstreams)[:1]})),
        *(401, 403, 404, 422),
        parameters=common("source") + own(upstreams.values(), defaults=False),
        security=[{"token": []}],
    )
    paths["/cache/invalidate"] = {"post": invalidate}
    report = answer("Of these hours", json("Report"), "Cache-Control")
    events = "A stream without an end, of the events `breaker`, `refresh` and `invalidate`"
    stream = answer(events, content("text/event-stream"), "Cache-Control")
    others = {
        "/health": operation("The state of everything", answer("As it is", json("Health"))),
        "/health/live": operation("Whether the process answers", ok),
        "/health/ready": operation("Whether it takes requests", ok, 503),
        "/metrics": operation("For Prometheus", answer("Its text format", content("text/plain"))),
        "/report": operation("Availability, latency", report, *(404, 422, 503), parameters=common("hours", "sources")),
        "/events": operation("What happens, as it happens", stream, 503, parameters=common("Last-Event-ID")),
        "/openapi.json": operation("This document", answer("OpenAPI 3.1", content("application/json", text))),
        "/": operation(
            "The dashboard", answer("A page", content("text/html"), "Content-Security-Policy", "Cache-Control")
        ),
    }
    paths |= {path: {"get": described} for path, described in others.items()}
    about = "One endpoint before many upstreams: what is there at the deadline, and how it came by it."
    return {
        "openapi": "3.1.0",
        "info": {"title": "Aggregation", "version": version, "description": about},
        "paths": paths,
        "components": components(upstreams),
    }
