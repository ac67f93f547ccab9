"""Upstreams and a running API."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import http.server
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import IO, Any

import aiohttp
import pytest

import aggregate_app
import coordination as co
from api import aggregate, config, parts, upstreams
from api import service as service_module
from sandbox.sites import Sandbox
from tests.helpers.base import HANG_LIMIT, World, run_task

Case = Callable[[Callable[..., upstreams.Source], World], Coroutine[Any, Any, None]]


def play(web: Sandbox, case: Case) -> None:
    """A coroutine over sources of real upstreams and a fake clock."""

    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            sources: list[upstreams.Source] = []

            def source(path: str, **options: Any) -> upstreams.Source:
                upstream = config.Upstream(name="a", url=web.url(path), **options)
                sources.append(upstreams.Source(upstream, session, co.Semaphore(99), clock=world.clock))
                return sources[-1]

            world = World()
            await case(source, world)
            for one in sources:
                for load in list(one.running):
                    load.cancel()
                    await asyncio.gather(load, return_exceptions=True)
                assert not one.running and not one.cache.stats().loading

    asyncio.run(main())


def data_of(part: parts.Part | parts.Loaded) -> Any:
    """The data that are sent, decoded."""
    assert part.data is not None
    return json.loads(part.data.encoded)


async def aggregate_ask(source: upstreams.Source, deadline: float = 20.0) -> tuple[str, Any, float | None]:
    part = (await aggregate.Plan.of({"a": source}, {}, deadline).gather())["a"]
    return part.state, part.data and data_of(part).get("serial", data_of(part)), part.age


async def settled(source: upstreams.Source) -> None:
    while source.running:
        await asyncio.wait(source.running)
        await asyncio.sleep(0)


def aggregate_http(
    port: int, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_LIMIT)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        body = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, json.loads(body) if body else None, found


Handler = Callable[[str, bytes], Awaitable[Any]]


@contextlib.asynccontextmanager
async def app_upstream(handler: Handler) -> AsyncIterator[str]:
    """The URL of an upstream in this loop: ``handler`` makes its JSON (None: no answer) of the path and the body."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            said = await handler(head, body)
            if said is not None:
                text = json.dumps(said).encode()
                status = said if isinstance(said, int) else 200
                writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(text)))
                writer.write(text)
                await writer.drain()
            else:
                await reader.read()  # until the client goes
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def ask(
    app: Any,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    client: tuple[str, int] | None = ("127.0.0.1", 5000),
    sent: list[bytes] | None = None,
    leave: asyncio.Event | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """A request, without a socket. ``sent`` gets the parts of the body, ``leave`` has the client go away."""
    parts: list[bytes] = [] if sent is None else sent
    start: dict[str, Any] = {}

    async def receive() -> Any:
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "client": client,
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "headers": raw,
    }
    await app(scope, receive, send)
    found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(parts)


@contextlib.asynccontextmanager
async def living(table: dict[str, config.Upstream], output: IO[bytes] | None = None) -> AsyncIterator[Any]:
    app = aggregate_app.create_app(table, 0, output=output)
    async with aggregate_app.lifespan(app):
        yield app


app_run = functools.partial(run_task, excused=lambda _: False)


@pytest.fixture
def app_world(monkeypatch: pytest.MonkeyPatch) -> World:
    """The sources of an application get this clock."""
    world = World()
    monkeypatch.setattr(aggregate_app, "Source", functools.partial(upstreams.Source, clock=world.clock))
    monkeypatch.setattr(service_module, "RENEW_EVERY", 1e6)
    access = logging.getLogger("uvicorn.access")
    monkeypatch.setattr(access, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(access, "propagate", False)
    return world
