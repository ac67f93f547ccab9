"""The parts of `bench aggregate` with bad upstreams, and these: `bench/aggregate_upstreams.py PORT` serves them.

* **Deadlines** are measured in an open loop: a request goes when it is due, whatever became of those before it, and its
  time counts from then. A closed loop would wait with the server, and hide how slow it was.
* **`chaos`** asks upstreams that fail, hang, drip, break off and lie at random, for few keys and with deadlines that
  often come first; some clients leave before their answer. Every answer is checked for its shape and status. What an
  answer says of its own duration tells a slow server from a client that was woken late.
* **Calls are counted by the upstreams**, from their log, not by who claims to have made them.

A part returns its rows, and whether all was right. All of it runs in one event loop; the server is another process.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, NamedTuple

import aiohttp

from bench.measure import Row, table
from bench.servers import Server, Stage
from sandbox import sites
from sandbox.faults import CHUNKED, CLOSE, FOREVER, RESET, Answer, SiteRequest, reply, route

SILENT = """
[silent]
url = "{base}/fault/never_answers"
timeout = 2.5
retries = 0
window = 60
reset = 120
"""
CHAOTIC = """
[{name}]
url = "{base}/chaos/{name}?n={{n}}"
parameters = {{ n = "0" }}
timeout = 1
ttl = 0.5
stale = 0.5
stale_if_error = 2
failures = 8
window = 2
reset = 0.5
{more}
"""
WITH_DATA, WITHOUT = {"fresh", "stale", "fallback"}, {"timeout", "error", "open", "paused", "busy"}
SLACK = 0.05
"""Seconds over its deadline from which an answer of `chaos` counts as late."""

# ----------------------------------------------------------------------------------------------------- upstreams


def serve_upstreams(port: int) -> None:
    """The sandbox with two routes more: /chaos/NAME, and /calls with the number of requests by path."""
    weights = {"good": 8, "slow": 3}

    @route("/chaos/")
    def chaos(request: SiteRequest) -> Answer:
        body = json.dumps({"name": request.name, "text": "x" * random.choice((10, 1_000, 50_000))}).encode()
        good = reply(body, kind="application/json")
        answers: dict[str, Answer] = {
            "good": good,
            "slow": [random.uniform(0.01, 1.2), good],
            "hang": [FOREVER],
            "drip": itertools.chain.from_iterable((good[n : n + 1], 0.02) for n in range(len(good))),
            "cut": [good[: random.randrange(1, len(good))], CLOSE],
            "reset": [RESET],
            "rubbish": [random.randbytes(300), CLOSE],
            "not_json": reply(body[:-1] + b"]", kind="application/json"),
            "deep": reply(b"[" * 9000 + b"]" * 9000, kind="application/json"),
            "status": reply(b"no", random.choice((302, 400, 404, 429, 500, 503)), "Retry-After: 1"),
            "endless": itertools.chain([CHUNKED], itertools.repeat(b"2000\r\n" + b" " * 8192 + b"\r\n")),
        }
        return answers[random.choices(list(answers), [weights.get(kind, 1) for kind in answers])[0]]

    @route("/calls")
    def calls(request: SiteRequest) -> Answer:
        paths = collections.Counter(entry.path for entry in request.sandbox.log)
        return reply(json.dumps(paths).encode(), kind="application/json")

    with sites.Sandbox(hosts=1, pages=1, port=port):
        time.sleep(3600)  # ended by its parent, or at last by itself


# ------------------------------------------------------------------------------------------------------- clients


class Reply(NamedTuple):
    """An answer: seconds from when its request was due, the status (0: there was none), the body."""

    seconds: float
    status: int
    body: bytes


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session


async def ask(session: aiohttp.ClientSession, url: str, due: float | None = None) -> Reply:
    due = time.monotonic() if due is None else due
    try:
        async with session.get(url) as answer:
            body = await answer.read()
            return Reply(time.monotonic() - due, answer.status, body)
    except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
        return Reply(time.monotonic() - due, 0, repr(error).encode())


async def open_loop(session: aiohttp.ClientSession, url: str, rate: float, seconds: float) -> list[Reply]:
    """So many requests a second, each sent when it is due, whatever became of those before it."""
    begin, tasks = time.monotonic() + 0.05, []
    async with asyncio.TaskGroup() as group:
        for n in range(int(rate * seconds)):
            due = begin + n / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(group.create_task(ask(session, url, due)))
    return [task.result() for task in tasks]


def times(name: str, replies: Collection[Reply]) -> Row:
    """Answers, and their times in ms."""
    ranked = sorted(reply.seconds * 1000 for reply in replies) or [0.0]
    row: Row = {"": name, "answers": len(replies)}
    row |= {f"p{p} ms": ranked[min(len(ranked) - 1, len(ranked) * p // 100)] for p in (50, 99)}
    return row | {"max ms": ranked[-1]}


def toll(server: Server, before: tuple[float, float] = (0.0, 0.0)) -> Row:
    """CPU seconds of the server since, and how long it waited for a core: then its times are the machine's."""
    cpu, waited = server.used()
    return {"CPU s": cpu - before[0], "waited for CPU s": waited - before[1]}


async def until(done: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    """Whether it was, within these seconds."""
    limit = time.monotonic() + seconds
    while not await done():
        if time.monotonic() > limit:
            return False
        await asyncio.sleep(0.1)
    return True


async def health(session: aiohttp.ClientSession, server: Server) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((await ask(session, server.base + "/health")).body)
    return told


# ------------------------------------------------------------------------------------------------------ deadline


async def deadline(args: argparse.Namespace, stage: Stage) -> tuple[list[Row], bool]:
    server = stage.ours(stage.calm(ttl=5) + SILENT.format(base=stage.upstreams.base))
    url, rows, right = server.base + "/aggregate?deadline_ms=300", [], True

    def partly(reply: Reply) -> bool:
        """Whether the other sources' data is there."""
        parts = json.loads(reply.body)["sources"] if reply.status in (200, 503) else {}
        return sum(part["data"] is not None for part in parts.values()) == 3

    async def opened() -> bool:
        await ask(session, url)
        return bool((await health(session, server))["sources"]["silent"]["breaker"] == "open")

    async with client() as session:
        await ask(session, server.base + "/aggregate?sources=weather,rates,news&deadline_ms=5000")
        for phase in ("breaker closed", "breaker open"):
            if phase == "breaker open" and not await until(opened, 40):
                raise SystemExit("bench: the breaker of the silent upstream did not open within 40 s")
            before = server.used()
            replies = await open_loop(session, url, 200, 2 * args.seconds)
            spent = toll(server, before)
            whole, failed = sum(map(partly, replies)), sum(reply.status != 200 for reply in replies)
            right &= whole == len(replies) and not failed
            rows.append(times(phase, replies) | {"with all others' data": whole, "failed": failed} | spent)
        print(f"One silent upstream of four, deadline 300 ms, 200 requests/s:\n\n{table(rows)}\n")
        cold = stage.ours(stage.calm())
        made = stage.calls()
        replies = await asyncio.gather(*(ask(session, cold.base + "/aggregate?deadline_ms=10000") for _ in range(1000)))
        calls = stage.calls()
        got = {path: calls[path] - made.get(path, 0) for path in calls if path.startswith("/api/")}
        row = times("1,000 cold requests at once", replies) | {"failed": sum(reply.status != 200 for reply in replies)}
        row |= {"calls " + path[5:].split("?")[0]: count for path, count in got.items()}
    print(table([row]) + "\n")
    return [*rows, row], right and not row["failed"] and set(got.values()) == {1}


# --------------------------------------------------------------------------------------------------------- chaos


def wrong(reply: Reply, names: Collection[str]) -> str | None:
    """What is wrong with an answer for these sources."""
    try:
        body = json.loads(reply.body)
        parts = body["sources"]
        states = {part["state"] for part in parts.values()}
        keys = all(part.keys() == {"state", "data", "age_s", "latency_ms", "error"} for part in parts.values())
        shown = all((part["data"] is not None) == (part["state"] in WITH_DATA) for part in parts.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"status {reply.status}, not the JSON of an answer: {reply.body[:100]!r}"
    right = 200 if states & WITH_DATA else 503
    if reply.status != right:
        return f"status {reply.status} for {sorted(states)}"
    members = {"partial", "sources", "generated_at", "duration_ms"}
    members |= {"type", "title", "status", "detail"} if right == 503 else set()
    if body.keys() != members or set(parts) != set(names) or not keys or not shown or states - WITH_DATA - WITHOUT:
        return f"the wrong shape: {reply.body[:100]!r}"
    return None


async def chaos(args: argparse.Namespace, stage: Stage) -> tuple[list[Row], bool]:
    more = {"alpha": "retries = 0", "beta": "fallback = []", "gamma": "concurrency = 2", "delta": "max_bytes = 20000"}
    base = stage.upstreams.base
    server = stage.ours("".join(CHAOTIC.format(base=base, name=name, more=extra) for name, extra in more.items()))
    replies: list[Reply] = []
    mistakes: collections.Counter[str] = collections.Counter()
    over: list[float] = []
    own: list[float] = []
    left_early = 0
    files, memory = server.files(), 0.0
    end = time.monotonic() + args.chaos

    async def user(session: aiohttp.ClientSession, rng: random.Random) -> None:
        nonlocal left_early
        while time.monotonic() < end:
            limit, one = rng.randint(5, 800), rng.choice([None, None, *more])
            url = f"{server.base}/aggregate{f'/{one}' if one else ''}?deadline_ms={limit}&n={rng.randrange(20)}"
            if rng.random() < 0.1:  # a client that leaves
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ask(session, url), rng.uniform(0, limit / 1000))
                left_early += 1
                continue
            replies.append(await ask(session, url))
            over.append(replies[-1].seconds - limit / 1000)
            mistake = wrong(replies[-1], [one] if one else more)
            if replies[-1].status == 200 and not mistake:
                own.append(json.loads(replies[-1].body)["duration_ms"] - limit)
            mistakes.update([mistake] if mistake else [])
            await asyncio.sleep(rng.uniform(0, 0.05))

    async def weigh() -> None:
        nonlocal memory
        await asyncio.sleep(args.chaos / 5)
        memory = server.rss_mb()

    async with client() as session:
        await asyncio.gather(weigh(), *(user(session, random.Random(seed)) for seed in range(50)))
        lag = (await health(session, server))["loop_lag_ms"]

    async def at_rest() -> bool:
        async with client() as session:
            told = await health(session, server)
        return not any(source["loading"] for source in told["sources"].values())

    async def closed() -> bool:
        return server.files() <= files + 2

    ended, freed = await until(at_rest, 10), await until(closed, 40)
    statuses = collections.Counter(reply.status for reply in replies)
    row = times("chaos", replies) | {
        "200": statuses[200],
        "503": statuses[503],
        "wrong": sum(mistakes.values()),
        f"over +{SLACK * 1000:.0f} ms": sum(late > SLACK for late in over),
        "worst over ms": max(over, default=0.0) * 1000,
        "by its own word": max(own, default=0.0),
        "loop lag ms": lag,
        "left early": left_early,
        "loads left": "none" if ended else "SOME",
        "files before/after": f"{files}/{server.files()}",
        "RSS MB at a fifth/after": f"{memory:.1f}/{server.rss_mb():.1f}",
    }
    row |= toll(server)
    for mistake, count in mistakes.most_common(5):
        print(f"{count} x {mistake}")
    print(f"{args.chaos} s, 50 clients, four upstreams that fail, hang, drip, lie:\n\n{table([row])}\n")
    return [row], ended and freed and not mistakes and bool(replies)


# ------------------------------------------------------------------------------------------------------- reports


async def reports(args: argparse.Namespace, stage: Stage) -> tuple[list[Row], bool]:
    server = stage.ours(stage.calm(ttl=1), database=True)
    url = server.base + "/report"
    made: list[Reply] = []

    async def ready() -> bool:
        return (await ask(session, url)).status != 503

    async with client() as session:
        await until(ready, 60)
        status = (await ask(session, url)).status
        if status != 200:
            print(f"reports: left out, /report answers {status}")
            return [], status == 404
        alone = await open_loop(session, server.base + "/aggregate", 100, 2 * args.seconds)
        end = time.monotonic() + 2 * args.seconds

        async def reader() -> None:
            while time.monotonic() < end:
                made.append(await ask(session, url))

        readers = [asyncio.create_task(reader()) for _ in range(args.reports)]
        beside = await open_loop(session, server.base + "/aggregate", 100, 2 * args.seconds)
        await asyncio.gather(*readers)
    rows = [times("/aggregate alone", alone), times("/aggregate beside reports", beside), times("/report", made)]
    for row, replies in zip(rows, (alone, beside, made), strict=True):
        row["failed"] = sum(reply.status != 200 for reply in replies)
    print(f"{args.reports} clients ask for /report, 100 requests/s for /aggregate:\n\n{table(rows)}\n")
    return rows, not any(row["failed"] for row in rows)


if __name__ == "__main__":
    serve_upstreams(int(sys.argv[1]))
