"""What a request may ask for, and the answers that say no: problem documents (RFC 9457).

Each parameter is checked before anything is done. Nothing here waits, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qsl

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.config import SEGMENT, Upstream
from api.service import Service
from api.upstreams import Source

MAX_PARAMETER = 200  # characters of a parameter's value


class Problem(HTTPException):
    """An RFC 9457 problem document, with members of its own: its title is the status, ``detail`` a sentence."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None, **members: Any) -> None:
        super().__init__(status, detail, headers)
        self.members = members


async def problem(_: Request, error: Exception) -> Response:
    """The problem document that an ``HTTPException`` means."""
    failure = cast(HTTPException, error)
    members = failure.members if isinstance(failure, Problem) else {}
    title = HTTPStatus(failure.status_code).phrase
    said = {} if failure.detail == title else {"detail": failure.detail}
    body = {"type": "about:blank", "title": title, "status": failure.status_code, **said, **members}
    return Response(orjson.dumps(body), failure.status_code, failure.headers, "application/problem+json")


async def failed(request: Request, _: Exception) -> Response:
    """A 500 without a reason: the server logs the error."""
    return await problem(request, Problem(500, "internal error"))


def query_of(request: Request) -> dict[str, str]:
    """The parameters in a request's query. ``Problem`` if one is there twice, or is no percent-encoded UTF-8."""
    try:
        pairs = parse_qsl(request.scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise Problem(422, "the query is not percent-encoded UTF-8") from None
    query = dict(pairs)
    if len(query) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:50]
        raise Problem(422, f"{twice} is there more than once", parameter=twice)
    return query


def check(query: Mapping[str, str], allowed: Iterable[str]) -> None:
    """``Problem`` if there is a parameter that is not allowed, or one that cannot be a part of an upstream's URL."""
    for name, value in query.items():
        if name not in allowed:
            raise Problem(422, f"no parameter {name[:50]} here", parameter=name[:50], parameters=sorted(allowed))
        if not re.fullmatch(r"[^\x00-\x1f\x7f]+", value) or len(value) > MAX_PARAMETER or value in (".", ".."):
            what = f"{name} must have 1 to {MAX_PARAMETER} characters, without control characters, and not be . or .."
            raise Problem(422, what, parameter=name)


def check_values(query: Mapping[str, str], upstreams: Iterable[Upstream]) -> None:
    """``Problem`` if a value is not one that these upstreams take."""
    for upstream in upstreams:
        for name in upstream.in_path():
            if not re.match(SEGMENT, query.get(name, "")):
                raise Problem(422, f"{name} must not have / or \\, nor be a dot segment", parameter=name)
        for name, pattern in upstream.patterns.items():
            if name in query and not re.fullmatch(pattern, query[name]):
                raise Problem(422, f"{name} must match {pattern}", parameter=name)


def whole_number(query: Mapping[str, str], name: str, least: int, usual: int, most: int) -> int:
    """Parameter ``name`` as a whole number. ``Problem`` if it is none, or out of its bounds."""
    text = query.get(name, str(usual))
    if not re.fullmatch(r"[0-9]{1,6}", text, re.A) or not least <= int(text) <= most:
        raise Problem(422, f"{name} must be a whole number from {least} to {most}", parameter=name)
    return int(text)


def parse_time(text: str, name: str) -> datetime:
    """The time in ``text`` (RFC 3339). ``Problem`` if it is none."""
    form = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)"
    with contextlib.suppress(ValueError, OverflowError):
        if re.fullmatch(form, text, re.A):
            return datetime.fromisoformat(text.upper()).astimezone(UTC)
    raise Problem(422, f"{name} must be a time with its offset, such as 2030-01-31T12:00:00Z", parameter=name)


def authorised(request: Request) -> None:
    """``Problem`` unless the client has ``AGGREGATE_TOKEN``, or, without one, is on this machine.

    Neither behind a proxy that is, nor the page of another origin in a browser that is (nor one whose name was made to
    lead here).
    """
    token = os.environ.get("AGGREGATE_TOKEN")
    if token:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise Problem(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        return
    headers, client = request.headers, request.client
    origin = headers.get("Origin")
    same = origin is None or re.sub("^https?://", "", origin) == headers.get("Host", "").lower()
    if not same or headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise Problem(403, "without AGGREGATE_TOKEN no page of another origin may do this")
    names = [client.host if client is not None else ""]
    if origin is not None:
        names.append(request.url.hostname or "")
    proxied = any(name in headers for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"))
    if client is None or not client.port or proxied or not all(map(_is_loopback, names)):
        raise Problem(403, "without AGGREGATE_TOKEN only clients of this machine may do this")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def reply(body: Any, headers: Mapping[str, str] | None = None) -> Response:
    """200 with ``body`` as JSON."""
    return Response(orjson.dumps(body), 200, headers, "application/json")


def service_of(request: Request) -> Service:
    """The running service."""
    return cast(Service, request.app.state.service)


def names_in(query: dict[str, str]) -> list[str] | None:
    """Takes ``sources`` out of the query and returns its names; None: there is none."""
    return query.pop("sources").split(",") if "sources" in query else None


def known_sources(request: Request, names: Iterable[str] | None) -> dict[str, Source]:
    """The sources of these names (None: all). ``Problem`` if there is none of some name."""
    sources = service_of(request).sources
    try:
        return {name: sources[name] for name in (sources if names is None else names)}
    except KeyError as unknown:
        raise Problem(404, f"unknown source {unknown.args[0][:50]}", sources=sorted(sources)) from None
