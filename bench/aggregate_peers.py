"""What a user would take instead of the aggregation API: two apps, each started as `uvicorn --factory`.

`bare Starlette` sends the very bytes that ours sent, kept in memory, through a route. `usual way` is the same service
as it is mostly written: FastAPI, a `response_model`, and aiocache's `@cached(ttl=600)` over each upstream's call. It
has neither deadline, breaker, ETag, request ids nor counts, but it assembles every answer anew.

This file imports little at its head, as its memory is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, Generic, TypeVar


def peer_starlette() -> Any:
    """Starlette and nothing else: what the file BENCH_ANSWER holds, as it is."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    kept = json.loads(Path(os.environ["BENCH_ANSWER"]).read_text())
    body, headers = kept["body"].encode(), kept["headers"]

    async def answer(_: Request) -> Response:
        return Response(body, 200, headers, "application/json")

    return Starlette(routes=[Route("/aggregate", answer)])


def peer_usual() -> Any:
    """The service as it is mostly written, before the upstreams at BENCH_UPSTREAMS."""
    import aiohttp
    from aiocache import cached
    from fastapi import FastAPI
    from pydantic import BaseModel

    Kept = TypeVar("Kept")

    class Weather(BaseModel):
        serial: int
        city: str
        temperature: float
        wind: int

    class Rates(BaseModel):
        serial: int
        base: str
        rates: dict[str, float]

    class Item(BaseModel):
        id: int
        title: str

    class News(BaseModel):
        serial: int
        items: list[Item]

    class Part(BaseModel, Generic[Kept]):
        state: str
        data: Kept | None
        age_s: float | None
        latency_ms: float | None
        error: str | None

    class Sources(BaseModel):
        weather: Part[Weather]
        rates: Part[Rates]
        news: Part[News]

    class Answer(BaseModel):
        partial: bool
        generated_at: str
        duration_ms: float
        sources: Sources

    base = os.environ["BENCH_UPSTREAMS"]
    paths = {"weather": "/api/weather?city=Berlin", "rates": "/api/rates/EUR", "news": "/api/news"}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as app.state.session:
            yield

    app = FastAPI(lifespan=lifespan)

    @cached(ttl=600)
    async def fetch(name: str) -> tuple[Any, float, float]:
        """What it said, when, and how long it took."""
        started = time.monotonic()
        async with app.state.session.get(base + paths[name]) as response:
            data = await response.json()
        return data, started, time.monotonic() - started

    async def part(name: str) -> dict[str, Any]:
        try:
            data, when, latency = await fetch(name)
        except (aiohttp.ClientError, TimeoutError) as error:
            return {"state": "error", "data": None, "age_s": None, "latency_ms": None, "error": type(error).__name__}
        age = round(time.monotonic() - when, 3)
        return {"state": "fresh", "data": data, "age_s": age, "latency_ms": round(latency * 1e3, 1), "error": None}

    @app.get("/aggregate", response_model=Answer)
    async def aggregate() -> Any:
        started = time.monotonic()
        parts = dict(zip(paths, await asyncio.gather(*map(part, paths)), strict=True))
        return {
            "partial": any(part["state"] != "fresh" for part in parts.values()),
            "generated_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "duration_ms": round((time.monotonic() - started) * 1000, 1),
            "sources": parts,
        }

    return app
