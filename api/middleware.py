"""What every request passes first: its id, its client's rate, its sizes, and the answers that are kept.

A client is its address; each has a ``TokenBucket``, and the ``CLIENTS`` that asked last are known. What is refused here
has cost no route. Everything runs in the event loop, and nothing waits.
"""

from __future__ import annotations

import itertools
import math
import re
import secrets
import time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from api.aggregate import assemble
from api.requests import Problem, problem
from api.service import Service
from api.upstreams import request_id
from primitives import TokenBucket, TTLCache

CLIENT_RATE, BURST_SECONDS, CLIENTS = 1000.0, 2.0, 10_000
"""Requests per second of one client (``AGGREGATE_RATE`` overrides, 0: any number), of how many seconds it may ask at
once, and how many clients are known at a time."""
EXEMPT = frozenset(
    ("/health", "/health/live", "/health/ready", "/metrics")
)  # who watches is not held up by what he is to see
MAX_QUERY, MAX_HEADERS, MAX_BODY = 4096, 32 * 1024, 64 * 1024
"""Bytes of a query, of all headers, and of the body that a request announces (no body is read)."""


def refused(wait: float, query: int, headers: int, body: int) -> Problem | None:
    """Why a request gets no further: its client's rate (``wait`` seconds to go), or its sizes in bytes."""
    if wait:
        return Problem(429, "too many requests", {"Retry-After": str(math.ceil(wait))})
    if query > MAX_QUERY:
        return Problem(414, f"the query has more than {MAX_QUERY} bytes")
    if headers > MAX_HEADERS:
        return Problem(431, f"the headers have more than {MAX_HEADERS} bytes in all")
    return Problem(413, f"a body of more than {MAX_BODY} bytes") if body > MAX_BODY else None


class Aggregator(Starlette):
    """The application behind what every request passes first: it gets an id (or keeps a good one), its client a token,
    or 429; its sizes are bounded. The server has read the headers by then: to bound them there is for it, or a proxy.

    The id is sent upstream as ``X-Request-ID`` by the load that the request began, and comes back with the answer.
    What was answered a moment ago is answered here, without a route or a response being made.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self._rate = rate
        self._process, self._serial = secrets.token_hex(4).encode(), itertools.count()
        self._buckets: TTLCache[str, TokenBucket] = TTLCache(CLIENTS, math.inf)
        self.service: Service | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        started, identity, tags = time.monotonic(), b"", b""
        size, length = 0, b"0"
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name == b"x-request-id":
                identity = value
            elif name == b"if-none-match":
                tags = tags + b"," + value
            elif name == b"content-length":
                length = value
        if not identity or not re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", identity):
            # random for the process, counted within it: a random one each would be a sixteenth of a cached answer
            identity = b"%s%08x" % (self._process, next(self._serial) & 0xFFFFFFFF)
        service, client = self.service, scope["client"][0] if scope.get("client") else ""
        limited = self._rate and scope["path"] not in EXEMPT
        refusal = refused(self._wait(client) if limited else 0.0, len(scope["query_string"]), size, int(length))
        status = 500
        token = request_id.set(identity.decode())
        try:
            plan = service.plans.get((scope["path"], scope["query_string"])) if service and not refusal else None
            if plan is not None and scope["method"] == "GET":
                begun = plan.begin()
                if not begun.loads:
                    answer = assemble(plan, begun.parts, started, tags)
                    status, headers, scope["states"] = answer.status, answer.headers, answer.states
                    headers.append((b"x-request-id", identity))
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                    await send({"type": "http.response.body", "body": answer.body})
                    return
                scope["begun"] = begun

            async def with_id(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                await send(message)

            scope["started"], scope["tags"], scope["plan"] = started, tags, plan
            if refusal is not None:
                await (await problem(Request(scope), refusal))(scope, receive, with_id)
            else:
                await super().__call__(scope, receive, with_id)
        finally:
            request_id.reset(token)
            if service is not None and service.log.wanted:
                self._note(service, scope, identity, client, started, status)

    def _note(self, service: Service, scope: Scope, identity: bytes, client: str, started: float, status: int) -> None:
        fields = {
            "client": client,
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode("latin-1"),
            "status": status,
            "duration_ms": round((time.monotonic() - started) * 1000, 3),
            "sources": scope.get("states"),
        }
        service.log.note("request", identity.decode(), fields)

    def _wait(self, client: str) -> float:
        """Seconds until the client may ask; 0.0: it may."""
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = TokenBucket(self._rate, max(1.0, BURST_SECONDS * self._rate))
            self._buckets.put(client, bucket)
        return 0.0 if bucket.try_acquire() else max(bucket.wait_for(), 0.001)
