"""The API described: an OpenAPI 3.1 document, made from the configured upstreams.

Exact: what the document allows is answered, what it forbids is refused, and every answer is of a form it names. Objects
are closed (``additionalProperties: false``), but for the data of an upstream. A route with ``{source}`` is written out
for each upstream (``/aggregate/weather``), with the parameters of that one.

Not said, for OpenAPI cannot: that ``/aggregate`` and ``/cache/invalidate`` take the parameters of those sources only
that are asked for; that a query has at most 4,096 bytes in all (414). HEAD is answered wherever GET is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, get_args

from api.config import SEGMENT, Upstream
from api.parts import Refused, UpstreamError
from primitives import TTLCacheStats
from runtime.postgres import DatabaseState

Json = dict[str, Any]

STATES = ("fresh", "stale", "fallback", "timeout", "error", *Refused.STATES)  # what a part of an answer can be
EXAMPLE = "2026-01-31T12:00:00+00:00"
TOKEN = "The value of AGGREGATE_TOKEN. While that is not set, clients on loopback need none."

STRING: Json = {"type": "string"}
TEXT: Json = {
    **STRING,
    "minLength": 1,
    "maxLength": 200,
    "pattern": r"^[^\x00-\x1f\x7f]+$",
    "not": {"enum": [".", ".."]},
}
"""The value of an upstream's parameter."""
TIME: Json = {"type": "string", "format": "date-time"}
COUNT: Json = {"type": "integer", "minimum": 0}
NUMBER: Json = {"type": "number", "minimum": 0}

PROBLEMS = {
    400: ("Another host is asked for than those that are served", ()),
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
ALWAYS = (400, 405, 413, 414, 429, 431)  # what every route can answer with


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _object(properties: Mapping[str, Json], optional: Sequence[str] = ()) -> Json:
    """An object of these properties, all there but for the optional ones, and of no others."""
    needed = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": needed, "additionalProperties": False}


def _one_of(values: Iterable[str]) -> Json:
    return {"type": "string", "enum": list(values)}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _int(most: int, usual: int) -> Json:
    return {"type": "integer", "minimum": 1, "maximum": most, "default": usual}


def _by_name(names: Iterable[str], value: Json) -> Json:
    """An object whose members are of one kind, by names that are known."""
    return {"type": "object", "propertyNames": {"enum": list(names)}, "additionalProperties": value}


def _maybe(schema: Json, *names: str) -> dict[str, Json]:
    """Members that are there, but may be null."""
    return {name: {**schema, "type": [schema["type"], "null"]} for name in names}


def _percentiles(*names: str) -> Json:
    """Milliseconds by percentile: all of them, or none while nothing was measured."""
    return {"anyOf": [_object(dict.fromkeys(names, NUMBER)), _object({})]}


def _schemas(names: Sequence[str]) -> dict[str, Json]:
    members = {"detail": STRING, "sources": _array(STRING), "parameter": STRING, "parameters": _array(STRING)}
    problem = {"type": STRING, "title": STRING, "status": {"type": "integer", "minimum": 400, "maximum": 599}}
    part = {
        "state": _one_of(STATES),
        "data": {"description": "What the upstream said; null if nothing is known"},
        **_maybe(NUMBER, "age_s", "latency_ms") | _maybe(STRING, "error"),
    }
    parts = _by_name(names, _ref("schemas", "Part")) | {"minProperties": 1}
    answered = {"partial": {"type": "boolean"}, "generated_at": TIME, "duration_ms": NUMBER, "sources": parts}
    database = {
        "state": _one_of(get_args(DatabaseState)),
        "kind": {"enum": ["embedded", "DATABASE_URL", None]},
        "since": TIME,
        **dict.fromkeys(("queued", "written", "lost", "refused", "batches"), COUNT),
        **_maybe(STRING, "error"),
    }
    source_health = {
        "breaker": _one_of(("closed", "half_open", "open")),
        **{name: {"type": "boolean"} for name in ("waits_for_call", "failing")},
        **dict.fromkeys(("next_probe_s", "paused_s"), NUMBER),
        **dict.fromkeys(("recent_failures", "calls", "failed_loads", "loading", "renewing"), COUNT),
        "answers": _by_name(STATES, COUNT),
        "refused_loads": _object(dict.fromkeys(Refused.STATES, COUNT)),
        "latency_ms": _percentiles("p50", "p95", "p99"),
        "recent_ms": _array(NUMBER) | {"maxItems": 60},
        **_maybe(TIME, "last_success") | _maybe(STRING, "last_error") | _maybe(NUMBER, "age_s"),
        "ttl_s": NUMBER,
        "cache": _object(dict.fromkeys(TTLCacheStats._fields, COUNT) | {"weight": NUMBER}),
    }
    host = {"name": STRING, **_maybe(STRING, "address", "error"), **_maybe(NUMBER, "dns_ms", "connect_ms")}
    host["certificate_days"] = {"type": ["number", "null"]}  # negative once it has expired
    report = {
        "results": COUNT,
        **_maybe({**NUMBER, "maximum": 1}, "availability"),
        "latency_ms": _percentiles("p50", "p95", "p99", "max"),
        "errors": {"type": "object", "additionalProperties": COUNT},
        "change_points": _array(_object({"at": TIME, "before_ms": NUMBER, "after_ms": NUMBER})),
        "host": _object(host),
    }
    health = {
        "status": _one_of(("ok", "degraded")),
        **dict.fromkeys(("uptime_s", "loop_lag_ms"), NUMBER),
        "streams": COUNT,
        "database": _object(database),
        "tasks": {"type": "object", "additionalProperties": _one_of(("running", "ended"))},
        "sources": _by_name(names, _ref("schemas", "SourceHealth")),
    }
    asked = {"type": "object", "additionalProperties": STRING}
    status_of = _one_of(("ok", *UpstreamError.KINDS))
    result = {"fetched_at": TIME, "parameters": asked, "status": status_of, "latency_ms": NUMBER, "data": {}}
    return {
        "Problem": _object({**problem, **members}, optional=list(members)),
        "NoData": _object({**problem, "detail": STRING, **answered}),
        "Part": _object(part),
        "Answer": _object(answered),
        "Invalidated": _object({"invalidated": _array(_one_of(names))}),
        "Health": _object(health),
        "SourceHealth": _object(source_health),
        "Ok": _object({"status": {"const": "ok"}}),
        "History": _object({"source": _one_of(names), "results": _array(_object(result)), **_maybe(STRING, "next")}),
        "Report": _object({"generated_at": TIME, "hours": _int(168, 24), "sources": _by_name(names, _object(report))}),
    }


def _parameter(name: str, schema: Json, about: str, where: str = "query", **more: Any) -> Json:
    return {"name": name, "in": where, "description": about, "schema": schema, **more}


def _header(pattern: str, about: str, required: bool) -> Json:
    return {"description": about, "required": required, "schema": {**STRING, "pattern": pattern}}


def _params(upstreams: Iterable[Upstream], defaults: bool = True) -> list[Json]:
    """The parameters of these upstreams; one with the same name goes to each of them."""
    defaults_of: dict[str, dict[str, str]] = {}
    patterns: dict[str, list[Json]] = {}
    for upstream in upstreams:
        for name, default in upstream.parameters.items():
            defaults_of.setdefault(name, {})[upstream.name] = default
        for name in upstream.in_path():
            patterns.setdefault(name, []).append({"pattern": SEGMENT})
        for name, pattern in upstream.patterns.items():
            patterns.setdefault(name, []).append({"pattern": f"^(?:{pattern})$"})
    listed = []
    for name, values in defaults_of.items():
        default = next(iter(values.values()))
        usable = re.fullmatch(r"[^\x00-\x1f\x7f]{1,200}", default) is not None and default not in (".", "..")
        agreed = {"default": default} if defaults and usable and len(set(values.values())) == 1 else {}
        example = {"example": default} if usable else {}
        more = {"allOf": patterns[name]} if name in patterns else {}
        listed.append(_parameter(name, TEXT | agreed | more, f"Of {', '.join(values)}", **example))
    return listed


def _refs(*names: str) -> list[Json]:
    return [_ref("parameters", name) for name in names]


def _content(media: str, schema: Json | None = None, example: Any = None) -> Json:
    shown = {"schema": schema or STRING}
    return {media: shown if example is None else {**shown, "example": example}}


def _json(schema: str, example: Any = None) -> Json:
    return _content("application/json", _ref("schemas", schema), example)


def _answer(about: str, body: Json | None, *headers: str) -> Json:
    shown = {name: _ref("headers", name) for name in (*headers, "X-Request-ID")}
    return {"description": about, "headers": shown, **({} if body is None else {"content": body})}


def _operation(summary: str, ok: Json, *statuses: int, parameters: Sequence[Json] = (), **more: Any) -> Json:
    """``ok`` is the answer with 200; ``more`` are the operation's other members, ``responses`` among them."""
    refusals = {str(status): _ref("responses", str(status)) for status in sorted({*ALWAYS, *statuses})}
    responses = {"200": ok, **refusals, **more.pop("responses", {})}
    given = [*parameters, _ref("parameters", "X-Request-ID")]
    return {"summary": summary, "parameters": given, "responses": dict(sorted(responses.items())), **more}


def _components(upstreams: Mapping[str, Upstream]) -> Json:
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
        _parameter("X-Request-ID", STRING, "Kept if it has 1 to 64 of A-Z a-z 0-9 _ -", "header"),
        _parameter("If-None-Match", STRING, "ETags of answers that are at hand", "header"),
        _parameter("Last-Event-ID", STRING, "The id of the last event that arrived", "header"),
        _parameter("sources", listed, "Names of sources, with commas between them"),
        _parameter("source", _one_of(names), "Of this source only"),
        _parameter("deadline_ms", _int(30_000, 1000), "Milliseconds to wait for what is not at hand"),
        _parameter("hours", _int(168, 24), "How far back"),
        _parameter("limit", _int(1000, 100), "Results of a page"),
        _parameter("before", TIME, "Results older than this (RFC 3339)", example=EXAMPLE),
    ]
    problems = {}
    for status, (about, extra) in PROBLEMS.items():
        shown = {"type": "about:blank", "title": HTTPStatus(status).phrase, "detail": about, "status": status}
        body = _content("application/problem+json", _ref("schemas", "Problem"), shown)
        problems[str(status)] = _answer(about, body, *extra)
    return {
        "schemas": _schemas(names),
        "parameters": {each["name"]: each for each in parameters},
        "responses": problems,
        "headers": {name: _header(*described, name != "Age") for name, described in headers.items()},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": TOKEN}},
    }


def document(upstreams: Mapping[str, Upstream], version: str) -> dict[str, Any]:
    """The OpenAPI document of the API before these upstreams (at least one); ``version`` is the API's own."""
    part = {"state": "fresh", "data": {"value": 1}, "age_s": 0.25, "latency_ms": 12.5, "error": None}
    late = {"state": "timeout", "data": None, "age_s": None, "latency_ms": None, "error": "not here in time"}
    unavailable = HTTPStatus.SERVICE_UNAVAILABLE
    refused = {"type": "about:blank", "title": unavailable.phrase, "detail": "no source has data", "status": 503}
    caching = ("ETag", "Cache-Control", "Age")

    def aggregate(asked: Mapping[str, Upstream], one: bool) -> Json:
        first = next(iter(asked), "")
        whole = {"partial": False, "generated_at": EXAMPLE, "duration_ms": 12.8, "sources": {first: part}}
        empty = {**refused, **whole, "partial": True, "sources": {first: late}}
        none = _content("application/problem+json", _ref("schemas", "NoData"), empty)
        return _operation(
            f"What {first} says" if one else "What all upstreams say, or those of `sources`",
            _answer("What is there at the deadline", _json("Answer", whole), *caching),
            *((422,) if one else (404, 422)),
            parameters=_refs("deadline_ms", *(() if one else ("sources",)), "If-None-Match") + _params(asked.values()),
            responses={
                "304": _answer("The client has this answer", None, *caching),
                "503": _answer("No source has data", none, "Retry-After", "Cache-Control"),
            },
        )

    ok, text = _answer("It is", _json("Ok", {"status": "ok"})), {"type": "object"}
    paths: dict[str, Json] = {"/aggregate": {"get": aggregate(upstreams, one=False)}}
    for name, upstream in upstreams.items():
        paths[f"/aggregate/{name}"] = {"get": aggregate({name: upstream}, one=True)}
        asked = _refs("limit", "before") + _params([upstream], defaults=False)
        page = _answer("A page, latest first; `next` is the path of the next one", _json("History"), "Cache-Control")
        paths[f"/history/{name}"] = {"get": _operation(f"What {name} said", page, 422, 503, parameters=asked)}
    invalidate = _operation(
        "Forget all answers, those of a source, or that for its parameters",
        _answer("Forgotten", _json("Invalidated", {"invalidated": list(upstreams)[:1]})),
        *(401, 403, 404, 422),
        parameters=_refs("source") + _params(upstreams.values(), defaults=False),
        security=[{"token": []}],
    )
    paths["/cache/invalidate"] = {"post": invalidate}
    report = _answer("Of these hours", _json("Report"), "Cache-Control")
    events = "A stream without an end, of the events `breaker`, `refresh` and `invalidate`"
    stream = _answer(events, _content("text/event-stream"), "Cache-Control")
    page = _answer("A page", _content("text/html"), "Content-Security-Policy", "Cache-Control")
    others = {
        "/health": _operation("The state of everything", _answer("As it is", _json("Health"))),
        "/health/live": _operation("Whether the process answers", ok),
        "/health/ready": _operation("Whether it takes requests", ok, 503),
        "/metrics": _operation("For Prometheus", _answer("Its text format", _content("text/plain"))),
        "/report": _operation("Availability, latency", report, *(404, 422, 503), parameters=_refs("hours", "sources")),
        "/events": _operation("What happens, as it happens", stream, 503, parameters=_refs("Last-Event-ID")),
        "/openapi.json": _operation("This document", _answer("OpenAPI 3.1", _content("application/json", text))),
        "/": _operation("The dashboard", page),
    }
    paths |= {path: {"get": described} for path, described in others.items()}
    about = "One endpoint before many upstreams: what is there at the deadline, and how it came by it."
    return {
        "openapi": "3.1.0",
        "info": {"title": "Aggregation", "version": version, "description": about},
        "paths": paths,
        "components": _components(upstreams),
    }
