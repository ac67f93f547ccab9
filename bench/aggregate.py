"""`bench aggregate`: the aggregation API beside what a user would take instead, and under bad upstreams.

* **The speed of a cached answer** is told as a ratio, to two peers (bench/aggregate_peers.py); that of the usual way
  must answer with JSON of the same shape as ours.
* **Each contestant is a uvicorn of its own** with one worker, uvloop, httptools, and no access log; wrk asks one after
  the other, the rounds interleaved. The upstreams are one more process.
* **`deadline`, `chaos` and `reports`** have clients of their own: bench/aggregate_upstreams.py.

Promised: every part ends by itself. Needs wrk, and Linux for CPU and memory. Exit code 1: an answer was wrong, or
something was left running. One thread; the parts with clients of their own have an event loop in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.measure import Row, Spread, command, interleaved, note, require, table, to
from bench.servers import Server, Stage


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


def wrk(server: Server, seconds: int, connections: int) -> Load:
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", server.base + "/aggregate"]
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
    servers = {"ours": stage.ours(stage.calm())}
    headers, body = warm(servers["ours"])
    if args.with_log:
        servers["ours, access log"] = stage.ours(stage.calm(), "--access-log")
        warm(servers["ours, access log"])
    kept = stage.folder / "answer.json"
    sent = {name: text for name, text in headers.items() if name.lower() in ("etag", "cache-control", "x-request-id")}
    kept.write_text(json.dumps({"body": body, "headers": sent}))
    plain = "--factory", "--no-access-log"
    servers["bare Starlette"] = stage.start("bench.aggregate_peers:peer_starlette", *plain, BENCH_ANSWER=str(kept))
    if servers["bare Starlette"].get("/aggregate")[2] != body:
        raise SystemExit("bench: bare Starlette does not answer with the same bytes")
    if all(map(importlib.util.find_spec, ("fastapi", "aiocache"))):
        usual = stage.start("bench.aggregate_peers:peer_usual", *plain, BENCH_UPSTREAMS=stage.upstreams.base)
        servers["usual way (FastAPI, aiocache)"] = usual
        if shape(json.loads(usual.get("/aggregate")[2])) != shape(json.loads(body)):
            raise SystemExit("bench: the usual way answers with JSON of another shape")
    else:
        print("usual way: fastapi or aiocache is not installed: pip install -r requirements-bench.txt")
    runs: dict[str, list[tuple[Load, float]]] = {name: [] for name in servers}
    for server in servers.values():
        wrk(server, 1, args.connections)
    for number, name in interleaved(servers, args.repeat):
        before = servers[name].cpu()
        load = wrk(servers[name], args.seconds, args.connections)
        runs[name].append((load, (servers[name].cpu() - before) / max(1, load.requests) * 1e6))
        note(f"run {number + 1} of {args.repeat}, {name}: {load.rate:,.0f} requests/s")
    rates = {name: Spread.of(load.rate for load, _ in runs[name]) for name in servers}
    usually = next((rates[name].median for name in rates if name.startswith("usual")), None)
    rows: list[Row] = [
        {
            "": name,
            "x bare": rates[name].median / rates["bare Starlette"].median,
            "x usual": to(rates[name].median, usually),
            "requests/s": rates[name],
            "p50 ms": Spread.of(load.p50 for load, _ in runs[name]),
            "p99 ms": Spread.of(load.p99 for load, _ in runs[name]),
            "CPU us/request": Spread.of(cpu for _, cpu in runs[name]),
            "failed": sum(load.failed for load, _ in runs[name]),
            "RSS MB": servers[name].rss_mb(),
        }
        for name in servers
    ]
    print(f"GET /aggregate from the cache, {len(body):,} bytes, {args.connections} connections:\n\n{table(rows)}\n")
    return rows, not any(row["failed"] for row in rows)


@command(
    "the aggregation API from its cache, against bare Starlette and FastAPI; with bad upstreams: requests/s, ms",
    "aggregate",
    "aggregate --seconds 2 --repeat 5 --with-log",
    "aggregate --only --deadline --chaos 60 --reports 8",
    seconds=(5, "seconds of a run; the open loops take twice that"),
    repeat=(3, "runs of each contestant"),
    connections=(32, "connections of wrk"),
    with_log=(False, "ours with its access log, too"),
    only=(False, "leave out the comparison of speeds"),
    deadline=(False, "a silent upstream beside good ones; 1,000 cold requests at once"),
    chaos=(None, "seconds of 50 clients before upstreams that fail, hang, drip and lie"),
    reports=(None, "clients that ask for /report while others are served from the cache"),
)
def aggregate(args: argparse.Namespace) -> list[Row]:
    from bench.aggregate_upstreams import chaos, deadline, reports

    if not args.only and shutil.which("wrk") is None:
        raise SystemExit("bench: wrk is needed: apt install wrk, or brew install wrk")
    require("aggregate", "uvloop", "httptools")
    parts: list[tuple[object, Callable[..., Any]]] = [(not args.only, speed), (args.deadline, deadline)]
    parts += [(args.chaos, chaos), (args.reports, reports)]
    results: list[Row] = []
    wholly = True
    for part in (function for asked, function in parts if asked):
        with contextlib.ExitStack() as stack:
            found = part(args, Stage(stack))
            rows, right = asyncio.run(found) if asyncio.iscoroutine(found) else found
        wholly &= right
        results += rows
    if not wholly:
        raise SystemExit("bench: aggregate: an answer was wrong, or something was left running")
    return results
