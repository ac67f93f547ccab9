"""``python -m bench aggregate``: the aggregation API beside what a user would take instead, and under bad upstreams.

Theory
------
* **The speed of a cached answer** is told as a ratio. `bare Starlette` sends the very bytes that ours sent, kept in
  memory, through a route. `usual way` is the same service as it is mostly written: FastAPI, a `response_model`, and
  aiocache's `@cached(ttl=600)` over each upstream's call. It must answer with JSON of the same shape. It has neither
  deadline, breaker, ETag, request ids nor counts, but it assembles every answer anew.
* **`ours` hands out a whole answer again** for a fraction of a second, before any route: that is less work than either
  peer does. `ours, assembled` is what compares like with like with the usual way: the same server, asked with an
  `If-None-Match` that fits nothing, for which it makes each answer anew.
* **Each contestant is a uvicorn of its own** with one worker, uvloop, httptools, and no access log; wrk asks one after
  the other, the rounds interleaved. CPU per request is the server's own (its /proc entry), and so is steadier than a
  rate on a shared machine. The upstreams are one more process.
* **`deadline`, `chaos` and `reports`** have clients of their own: `bench/upstreams.py`.

Promised: all traffic stays on 127.0.0.0/8, every part ends by itself, every child is ended by its id. Needs wrk, and
Linux for CPU and memory. Exit code 1: an answer was wrong, or something was left running.

Everything runs in one thread, but for the timers that end children; the parts with clients of their own have an event
loop in it. The peers are started as `uvicorn --factory bench.aggregate:peer_usual`: therefore this file imports little
at its head.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

HERE = Path(__file__).resolve().parents[1]
SETTINGS = {"AGGREGATE_RATE": "0"}
"""The environment of our server in all parts; `DATA_FOLDER` is temporary, too."""
NO_DATABASE, EMBEDDED = {"DATABASE_URL": "none"}, {"DATABASE_URL": ""}
"""More of it, in all parts but `reports`; in `reports`."""
ASSEMBLED = "ours, assembled"
CALM = """
[weather]
url = "{base}/api/weather?city=Berlin"
ttl = {ttl}
[rates]
url = "{base}/api/rates/EUR"
ttl = {ttl}
[news]
url = "{base}/api/news"
ttl = {ttl}
"""
Row = dict[str, object]

# --------------------------------------------------------------------------------------------------------- peers


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


# ----------------------------------------------------------------------------------------------------- processes


class Server(NamedTuple):
    base: str
    pid: int

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and body."""
        try:
            with urllib.request.urlopen(self.base + path, timeout=10) as answer:
                return answer.status, dict(answer.headers), answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read().decode()

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def used(self) -> tuple[float, float]:
        """Seconds of CPU so far, and those in which its main thread could have run, had there been a core for it."""
        return self.cpu(), int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9

    def rss_mb(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextlib.contextmanager
def serving(name: str, words: Sequence[object], port: int, log: Path, **settings: str) -> Iterator[Server]:
    """A child that serves, once it does. Raises SystemExit with the last line that it said if it does not."""
    from bench import runner

    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | settings
    with (
        open(log, "wb") as errors,
        runner.child(words, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=HERE) as process,
    ):
        server, limit = Server(f"http://{runner.host_address(0)}:{port}", process.pid), time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                server.get("/health/live")
                break
            if process.poll() is not None or time.monotonic() > limit:
                said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise SystemExit(f"bench: {name} did not start: {said[0]}")
            time.sleep(0.05)
        yield server


class Stage:
    """A folder, the upstreams, and the servers before them: all ended when the stack is."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        from bench import runner

        self._stack, self._port, self._count = stack, runner.free_port, itertools.count()
        self._host = runner.host_address(0)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        self.upstreams = self._serve("the sandbox", [*runner.module("bench.upstreams"), port := self._port()], port)

    def _serve(self, name: str, words: Sequence[object], port: int, **settings: str) -> Server:
        log = self.folder / f"server{next(self._count)}.log"
        return self._stack.enter_context(serving(name, words, port, log, **settings))

    def start(self, target: str, *options: str, **settings: str) -> Server:
        """A uvicorn, the same for all but for these."""
        words = [sys.executable, "-m", "uvicorn", target, "--host", self._host, "--port", port := self._port()]
        words += ["--loop", "uvloop", "--http", "httptools", "--no-server-header", *options]
        return self._serve(target, words, port, **settings)

    def ours(self, config: str, *options: str, database: bool = False) -> Server:
        path = self.folder / f"config{next(self._count)}.toml"
        path.write_text(config)
        settings = SETTINGS | {"AGGREGATE_CONFIG": str(path), "DATA_FOLDER": str(self.folder / "data")}
        settings |= EMBEDDED if database else NO_DATABASE
        return self.start("aggregate_app:app", *(options or ["--no-access-log"]), **settings)

    def calm(self, ttl: float = 600) -> str:
        return CALM.format(base=self.upstreams.base, ttl=ttl)

    def calls(self) -> dict[str, int]:
        """How many requests each upstream got, by path."""
        paths: dict[str, int] = json.loads(self.upstreams.get("/calls")[2])
        return paths


# --------------------------------------------------------------------------------------------------------- speed


class Load(NamedTuple):
    """What wrk told: requests, requests/s, latencies in ms, answers that were no 2xx or did not come."""

    requests: int
    rate: float
    p50: float
    p99: float
    failed: int


def read_wrk(text: str) -> Load:
    """Raises AttributeError if it is not what `wrk --latency` prints."""

    def milliseconds(share: str) -> float:
        value, unit = re.search(rf"{share}% +([\d.]+)(us|ms|s|m)\b", text).groups()  # type: ignore[union-attr]
        return float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}[unit]

    requests, rate = re.search(r"(\d+) requests in[^$]*Requests/sec: +([\d.]+)", text).groups()  # type: ignore[union-attr]
    refused = re.findall(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.findall(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = sum(map(int, itertools.chain(refused, *broken)))
    return Load(int(requests), float(rate), milliseconds("50"), milliseconds("99"), failed)


def wrk(server: Server, seconds: int, connections: int, *options: str) -> Load:
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", *options, server.base + "/aggregate"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 30)
    if done.returncode != 0:
        raise SystemExit(f"bench: wrk failed: {(done.stderr or done.stdout).strip()[-200:]}")
    return read_wrk(done.stdout)


def shape(value: Any) -> Any:
    """Keys and types, all numbers being alike."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def warm(server: Server) -> tuple[dict[str, str], str]:
    """The second answer of our server, all of whose sources must be fresh: headers and body."""
    server.get("/aggregate?deadline_ms=5000")
    status, headers, body = server.get("/aggregate")
    states = {name: part["state"] for name, part in json.loads(body).get("sources", {}).items()}
    if status != 200 or set(states.values()) != {"fresh"}:
        raise SystemExit(f"bench: /aggregate is not all fresh: {status} {states}")
    return headers, body


def speed(args: argparse.Namespace, stage: Stage) -> tuple[list[Row], bool]:
    from bench import runner

    servers = {"ours": stage.ours(stage.calm())}
    servers[ASSEMBLED] = servers["ours"]
    headers, body = warm(servers["ours"])
    if args.with_log:
        servers["ours, access log"] = stage.ours(stage.calm(), "--access-log")
        warm(servers["ours, access log"])
    kept = stage.folder / "answer.json"
    sent = {name: text for name, text in headers.items() if name.lower() in ("etag", "cache-control", "x-request-id")}
    kept.write_text(json.dumps({"body": body, "headers": sent}))
    plain = "--factory", "--no-access-log"
    servers["bare Starlette"] = stage.start("bench.aggregate:peer_starlette", *plain, BENCH_ANSWER=str(kept))
    if servers["bare Starlette"].get("/aggregate")[2] != body:
        raise SystemExit("bench: bare Starlette does not answer with the same bytes")
    if all(map(importlib.util.find_spec, ("fastapi", "aiocache"))):
        usual = stage.start("bench.aggregate:peer_usual", *plain, BENCH_UPSTREAMS=stage.upstreams.base)
        servers["usual way (FastAPI, aiocache)"] = usual
        if shape(json.loads(usual.get("/aggregate")[2])) != shape(json.loads(body)):
            raise SystemExit("bench: the usual way answers with JSON of another shape")
    else:
        print("usual way: fastapi or aiocache is not installed: pip install -r requirements-bench.txt")
    runs: dict[str, list[tuple[Load, float]]] = {name: [] for name in servers}
    for server in servers.values():
        wrk(server, 1, args.connections)
    for number, name in runner.interleaved(servers, args.repeat):
        before = servers[name].cpu()
        options = ["-H", 'If-None-Match: "none"'] if name == ASSEMBLED else []
        load = wrk(servers[name], args.seconds, args.connections, *options)
        runs[name].append((load, (servers[name].cpu() - before) / max(1, load.requests) * 1e6))
        runner.note(f"run {number + 1} of {args.repeat}, {name}: {load.rate:,.0f} requests/s")
    rates = {name: runner.Spread.of(load.rate for load, _ in runs[name]) for name in servers}
    usually = next((rates[name].median for name in rates if name.startswith("usual")), None)
    rows: list[Row] = [
        {
            "": name,
            "x bare": rates[name].median / rates["bare Starlette"].median,
            "x usual": runner.to(rates[name].median, usually),
            "requests/s": rates[name],
            "p50 ms": runner.Spread.of(load.p50 for load, _ in runs[name]),
            "p99 ms": runner.Spread.of(load.p99 for load, _ in runs[name]),
            "CPU us/request": runner.Spread.of(cpu for _, cpu in runs[name]),
            "failed": sum(load.failed for load, _ in runs[name]),
            "RSS MB": servers[name].rss_mb(),
        }
        for name in servers
    ]
    print(
        f"GET /aggregate from the cache, {len(body):,} bytes, {args.connections} connections:\n\n{runner.table(rows)}\n"
    )
    return rows, not any(row["failed"] for row in rows)


# ------------------------------------------------------------------------------------------------------ all parts


def run(args: argparse.Namespace, results: list[Row] | None = None) -> int:
    """The parts that are asked for, with their tables; 1 if anything was wrong. ``results`` gets the rows."""
    from bench.upstreams import chaos, deadline, reports

    if not args.only and shutil.which("wrk") is None:
        raise SystemExit("bench: wrk is needed: apt install wrk, or brew install wrk")
    parts: list[tuple[object, Callable[..., Any]]] = [(not args.only, speed), (args.deadline, deadline)]
    parts += [(args.chaos, chaos), (args.reports, reports)]
    wholly = True
    for part in (function for asked, function in parts if asked):
        with contextlib.ExitStack() as stack:
            stage = Stage(stack)
            found = part(args, stage)
            rows, right = asyncio.run(found) if asyncio.iscoroutine(found) else found
        wholly &= right
        (results if results is not None else []).extend(rows)
    return 0 if wholly else 1
