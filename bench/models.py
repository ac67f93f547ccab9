"""``python -m bench models``: threads against asyncio: what a unit in flight costs, and where each ends.

Theory
------
* **The server** is a process of its own with a raw protocol on 50 loopback addresses: ``GET /SECONDS/anything`` is
  answered so much later, on a connection that is kept. It counts how many requests wait in it at once, because a model
  that is told to have 10,000 in flight need not have them: the share of the ideal and the memory go by what it saw.
* **A cell is a process**: `bare threads` is a thread for each unit with a blocking socket, `bare tasks` a task for each
  with asyncio's streams on the standard library's loop; they do nothing else, so their memory is that of the model. All
  units stay until all are done, and share the memory that is in use then. `crawl_threads` and `crawl_async` are the
  crawlers, as their user starts them, with ``--concurrency N --per-host N --rate 0``; their memory and CPU time are
  told above those of a run over one URL, the memory by the most that the server saw in flight.
* **Requests/s** are counted from when the first request went out to when the last answer was there; the ideal is units
  by latency. Each unit makes up to six requests, of 20,000 in all, so at 10,000 units much of it is a start. `first
  row` is from the start of the process.
* **A failure is a result**: a thread that cannot be started, a file too many, a run that takes too long. It stands in
  the column `stops`.
* **Computing**: pages of 20 to 200 KB are parsed in the loop, in threads, and in processes beside it, while a task of
  that loop wants to run every 5 ms; how late it is, is the lag that any other request would have.
* **A call that blocks**: 100 units make requests of 100 ms, while something blocks for 0.2 s once a second.

Promised: all traffic stays on 127.0.0.0/8; every child is ended by its id, after `LIMIT` seconds at the latest. No
limit of the system is tried out on a shared machine: how many threads it allows is read from its settings. Not
promised: that the server, on the same processors, costs the same in every cell. Memory is the process's own, without
the kernel's buffers. Linux only (/proc).

Threads: this process is one thread, with a timer for each child. What the children have is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

HERE = Path(__file__).resolve().parents[1]
HOSTS = 50
REQUESTS, ROUNDS = 20_000, 6
"""Requests in a cell, at most; of one unit, at most."""
LIMIT = 15.0
"""Seconds after which a cell is ended; what there is by then is told."""
TERMINATED = 143
"""The exit code of a child after SIGTERM."""
TICK = 0.005
CLIENTS, PACE, BLOCKED, BEFORE = 100, 0.1, 0.2, 0.4
"""The units beside a call that blocks; seconds: the latency of their requests, of the call, and before it."""
PAGES = (20_000, 50_000, 100_000, 150_000, 200_000)
"""Bytes of the pages that are parsed."""
BODY = b"<!doctype html><title>Late</title><p>One <a href=/>link</a>."
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
BARE = {"bare threads": "threads", "bare tasks": "tasks"}
CRAWLERS = {"crawl_threads": "crawl_threads.py", "crawl_async": "crawl_async.py"}
Row = dict[str, Any]


def allow_files() -> tuple[int, int]:
    """Raise the limit of open files as far as it goes: what it was, and what it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def rounds_of(units: int) -> int:
    """How many requests each of so many units makes."""
    return max(2, min(ROUNDS, REQUESTS // units))


def percentile(values: Sequence[float], share: float) -> float:
    """Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[int(share * (len(values) - 1))]


def memory_kb(pid: int | str = "self") -> dict[str, int]:
    """``VmRSS``, ``VmHWM`` (its peak), ``VmSize`` and ``VmPeak`` of a process; none of them if it is gone."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {line[0].rstrip(":"): int(line[1]) for line in lines if line[0].startswith("Vm")}
    return {}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---------------------------------------------------------------------------------------------------- the server


class Count:
    """How many requests wait in the server, and the most since that was asked for."""

    def __init__(self) -> None:
        self.now = self.most = 0


class Late(asyncio.Protocol):
    """A connection. ``/SECONDS/...`` is answered with a page so much later, ``/most`` at once, others are cut."""

    def __init__(self, count: Count) -> None:
        self._count, self._rest = count, b""
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        *heads, self._rest = (self._rest + data).split(b"\r\n\r\n")
        for head in heads:
            words = head.split(b" ", 2)
            path = words[1] if len(words) == 3 else b""
            if path == b"/most":
                most, self._count.most = b"%d" % self._count.most, self._count.now
                self._write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(most), most))
                continue
            try:
                latency = float(path.split(b"/")[1])
            except (IndexError, ValueError):
                if self._transport is not None:
                    self._transport.abort()
                return
            self._count.now += 1
            self._count.most = max(self._count.most, self._count.now)
            self._loop.call_later(latency, self._answer)

    def _answer(self) -> None:
        self._count.now -= 1
        self._write(ANSWER)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def serve(port: int) -> None:
    """The server, until SIGTERM. It says "ready" when it listens."""
    from bench.runner import host_address
    from runtime.serving import new_loop

    async def forever() -> None:
        count, addresses = Count(), [host_address(number) for number in range(HOSTS)]
        await asyncio.get_running_loop().create_server(lambda: Late(count), addresses, port, backlog=4096)
        print("ready", flush=True)
        await asyncio.Event().wait()

    allow_files()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(forever())


@contextlib.contextmanager
def late_server() -> Iterator[int]:
    """Its port."""
    from bench import runner as bench

    port = bench.free_port()
    with bench.child([*bench.module("bench.models"), "serve", port], stdout=subprocess.PIPE) as process:
        if not process.stdout or process.stdout.readline() != b"ready\n":
            raise SystemExit("bench: the late server did not start")
        yield port


def most_in_flight(port: int) -> int:
    from bench.runner import host_address

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{host_address(0)}:{port}/most", timeout=30) as answer:
        return int(answer.read())


def request(number: int, latency: float) -> tuple[str, bytes]:
    """Address and bytes of a request."""
    from bench.runner import host_address

    host = host_address(number % HOSTS)
    return host, f"GET /{latency}/{number} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


# --------------------------------------------------------------------------------------------- bare units, in a child


def call(sock: socket.socket, words: bytes) -> None:
    """One request on a blocking socket. Raises ConnectionError if the server leaves."""
    sock.sendall(words)
    missing = len(ANSWER)
    while missing:
        data = sock.recv(missing)
        if not data:
            raise ConnectionError("the server closed the connection")
        missing -= len(data)


async def call_async(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, words: bytes) -> None:
    writer.write(words)
    await reader.readexactly(len(ANSWER))


class Bare(NamedTuple):
    """What a bare model came to: when each answer was there, what went wrong, how many there were, their memory."""

    times: list[float]
    errors: list[str]
    there: int
    memory: dict[str, int]


def bare_threads(units: int, rounds: int, port: int, latency: float, limit: float = LIMIT) -> Bare:
    """A thread for each unit. After ``limit`` seconds what there is by then; the threads are left where they are."""
    times, errors, threads = list[float](), list[str](), list[threading.Thread]()
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    leave, end = threading.Event(), time.monotonic() + limit

    def unit(number: int) -> None:
        host, words = request(number, latency)
        try:
            with socket.create_connection((host, port)) as sock:
                for _ in range(rounds):
                    call(sock, words)
                    times.append(time.monotonic())
                ended.put(None)
                leave.wait()
        except OSError as error:
            errors.append(f"{type(error).__name__}: {error.strerror or error}")
            ended.put(None)

    while len(threads) < units and time.monotonic() < end:
        thread = threading.Thread(target=unit, args=(len(threads),), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            errors.append(f"{error}, after {len(threads):,}")
            break
        threads.append(thread)
    try:
        for _ in threads:
            ended.get(timeout=max(0.0, end - time.monotonic()))
    except queue.Empty:
        errors.append(
            f"ended after {limit:g} s with {len(times):,} of {units * rounds:,}; {len(threads):,} had started"
        )
        return Bare(times, errors, len(threads), memory_kb())
    memory = memory_kb()
    leave.set()
    for thread in threads:
        thread.join()
    return Bare(times, errors, len(threads) - len(errors), memory)


def bare_tasks(units: int, rounds: int, port: int, latency: float, limit: float = LIMIT) -> Bare:
    """A task for each unit, the same."""
    times, errors, memory = list[float](), list[str](), dict[str, int]()

    async def unit(number: int, leave: asyncio.Event, ended: asyncio.Semaphore) -> None:
        host, words = request(number, latency)
        try:
            reader, writer = await asyncio.open_connection(host, port)
            try:
                for _ in range(rounds):
                    await call_async(reader, writer, words)
                    times.append(time.monotonic())
                ended.release()
                await leave.wait()
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            errors.append(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}")
            ended.release()

    async def all_units() -> None:
        leave, ended = asyncio.Event(), asyncio.Semaphore(0)
        tasks = [asyncio.create_task(unit(number, leave, ended)) for number in range(units)]
        try:
            async with asyncio.timeout(limit):
                for _ in tasks:
                    await ended.acquire()
        except TimeoutError:
            errors.append(f"ended after {limit:g} s with {len(times):,} of {units * rounds:,}")
            for task in tasks:
                task.cancel()
        memory.update(memory_kb())
        leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_units())
    return Bare(times, errors, units - len(errors), memory)


def bare(kind: str, units: int, port: int, latency: float, started: float) -> Row:
    """What a cell of a bare model came to; ``started`` is the parent's clock."""
    allow_files()
    request(0, latency)  # what it imports is not the model's
    before, cpu = memory_kb(), cpu_seconds()
    model = bare_threads if kind == "threads" else bare_tasks
    times, errors, there, after = model(units, rounds_of(units), port, latency)
    return {
        "times": [min(times) - started, max(times) - started] if times else [],
        "requests": len(times),
        "there": there,
        "cpu": cpu_seconds() - cpu,
        "kb": after.get("VmRSS", 0) - before.get("VmRSS", 0),
        "virtual": after.get("VmSize", 0) - before.get("VmSize", 0),
        "peak": after.get("VmHWM", 0),
        "errors": [f"{number:,} x {error}" for error, number in collections.Counter(errors).most_common(1)],
        "failed": len(errors),
    }


def idle(kind: str, units: int) -> Row:
    """So many threads or tasks that only wait: memory of each, and microseconds to start one."""
    before, error = memory_kb(), None
    if kind == "threads":
        leave, threads = threading.Event(), list[threading.Thread]()
        started = time.perf_counter()
        for _ in range(units):
            try:
                threads.append(threading.Thread(target=leave.wait, daemon=True))
                threads[-1].start()
            except RuntimeError as refused:
                error = str(refused)
                threads.pop()
                break
        seconds, after, units = time.perf_counter() - started, memory_kb(), len(threads)
        leave.set()
        for thread in threads:
            thread.join()
    else:

        async def wait() -> tuple[float, dict[str, int]]:
            started, leave = time.perf_counter(), asyncio.Event()
            tasks = [asyncio.create_task(leave.wait()) for _ in range(units)]
            await asyncio.sleep(0)
            seconds, memory = time.perf_counter() - started, memory_kb()
            leave.set()
            await asyncio.gather(*tasks)
            return seconds, memory

        seconds, after = asyncio.run(wait())
    kb, virtual = (after.get(key, 0) - before.get(key, 0) for key in ("VmRSS", "VmSize"))
    each = max(1, units)
    return {"units": units, "kb": kb / each, "virtual": virtual / each, "us": seconds / each * 1e6, "error": error}


# ------------------------------------------------------------------------- computing, and calls that block, in a child


def count_words(body: bytes) -> int:
    from html_parse import parse_page

    return parse_page(body, "http://127.0.1.1/p.html", "text/html; charset=utf-8").word_count


def parsing(where: str, workers: int, seconds: float) -> Row:
    """Pages parsed beside a task that wants to run every ``TICK``: ``where`` is loop, thread, process or nowhere."""
    from sandbox.sites import make_page

    pages = [make_page(0, number, len(PAGES), size) for number, size in enumerate(PAGES)]
    lags, done, size = list[float](), 0, 0
    pool: concurrent.futures.Executor | None = None
    if where == "thread":
        pool = concurrent.futures.ThreadPoolExecutor(workers)
    elif where == "process":
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))

    async def tick(end: float) -> None:
        while (now := time.perf_counter()) < end:
            await asyncio.sleep(TICK)
            lags.append(max(0.0, time.perf_counter() - now - TICK))

    async def parse(end: float) -> None:
        nonlocal done, size
        for body in itertools.cycle(pages):
            if time.perf_counter() >= end:
                return
            if pool is None:
                count_words(body)
                await asyncio.sleep(0)
            else:
                await asyncio.get_running_loop().run_in_executor(pool, count_words, body)
            done, size = done + 1, size + len(body)

    async def both() -> float:
        if pool is not None:  # started, and everything imported
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(pool, count_words, pages[-1]) for _ in range(4 * workers)))
        count_words(pages[0])
        started = time.perf_counter()
        end = started + seconds
        feeders = 0 if where == "nowhere" else workers if where != "process" else 2 * workers
        await asyncio.gather(tick(end), *(parse(end) for _ in range(feeders)))
        return time.perf_counter() - started

    try:
        taken = asyncio.run(both())
    finally:
        if pool is not None:
            pool.shutdown()
    return {"pages/s": done / taken, "MB/s": size / taken / 1e6, "lags": lags}


def blocking(kind: str, planted: str, seconds: float, port: int) -> list[float]:
    """Latencies of ``CLIENTS`` units that make requests, beside a call that blocks: in a thread, the loop, or none.

    Each is connected before the ``seconds`` begin, and has a request under way from then on.
    """
    latencies = list[float]()

    def block() -> None:
        time.sleep(BLOCKED)

    if kind == "threads":
        sockets = [socket.create_connection((request(number, PACE)[0], port)) for number in range(CLIENTS)]
        stop = time.perf_counter() + seconds

        def unit(number: int) -> None:
            words = request(number, PACE)[1]
            with sockets[number] as sock:
                while (started := time.perf_counter()) < stop:
                    call(sock, words)
                    latencies.append(time.perf_counter() - started)

        def spoil() -> None:
            while time.perf_counter() + BEFORE < stop:
                time.sleep(BEFORE)
                block()
                time.sleep(1 - BLOCKED - BEFORE)

        targets = [threading.Thread(target=unit, args=(number,)) for number in range(CLIENTS)]
        targets += [threading.Thread(target=spoil)] * (planted == "thread")
        for thread in targets:
            thread.start()
        for thread in targets:
            thread.join()
        return latencies

    async def unit_async(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: float) -> None:
        words = request(number, PACE)[1]
        while (started := time.perf_counter()) < stop:
            await call_async(reader, writer, words)
            latencies.append(time.perf_counter() - started)
        writer.close()

    async def spoil_async(stop: float) -> None:
        while planted != "none" and time.perf_counter() + BEFORE < stop:
            await asyncio.sleep(BEFORE)
            if planted == "loop":
                block()
            else:
                await asyncio.to_thread(block)
            await asyncio.sleep(1 - BLOCKED - BEFORE)

    async def all_units() -> None:
        streams = [await asyncio.open_connection(request(number, PACE)[0], port) for number in range(CLIENTS)]
        stop = time.perf_counter() + seconds
        units = (unit_async(number, *stream, stop) for number, stream in enumerate(streams))
        await asyncio.gather(*units, spoil_async(stop))

    asyncio.run(all_units())
    return latencies


# ------------------------------------------------------------------------------------------------- cells, in the parent


def ask_child(*words: object) -> Any:
    """What `bench/models.py WORDS` prints, from JSON; an error as text if it failed or took too long."""
    from bench import runner as bench

    with bench.child([*bench.module("bench.models"), *words], stdout=subprocess.PIPE) as process:
        assert process.stdout
        timer = threading.Timer(2 * LIMIT, process.terminate)  # it ends by itself before that
        timer.start()
        try:
            said = process.stdout.read()
            code = process.wait()
        finally:
            timer.cancel()
    if code == TERMINATED:
        return f"ended after {2 * LIMIT:g} s"
    return json.loads(said) if code == 0 else f"exit code {code}"


def crawl_cell(name: str, units: int, count: int, port: int, latency: float, folder: Path) -> Row:
    """A crawler with so many in flight over ``count`` URLs, like `bare`."""
    from bench import runner as bench

    urls, hosts = folder / "urls.txt", [bench.host_address(number) for number in range(HOSTS)]
    urls.write_text("".join(f"http://{hosts[n % HOSTS]}:{port}/{latency}/{n}\n" for n in range(count)))
    words = [sys.executable, HERE / CRAWLERS[name], urls, "--rate", 0, "--concurrency", units, "--per-host", units]
    times, errors = list[float](), collections.Counter[str]()
    rows, rest, peaks, looked = 0, b"", dict[str, int](), 0.0
    started = time.monotonic()
    with bench.child([*words, "--retries", 0, "-q"], stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        try:
            while data := process.stdout.read(1 << 20):
                now = time.monotonic()
                *lines, rest = (rest + data).split(b"\n")
                rows += len(lines)
                times += [now] if lines else []
                errors.update(str(json.loads(line)["error"]) for line in lines if b'"error":null' not in line)
                if now - looked > 0.05:
                    peaks, looked = memory_kb(process.pid) or peaks, now
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
    told = [f"{number:,} x {error}" for error, number in errors.most_common(1)]
    if process.returncode == -signal.SIGKILL:
        told.append(f"ended after {LIMIT:g} s with {rows:,} of {count:,}")
    elif process.returncode != 0 and not errors:
        told.append(f"exit code {process.returncode}")
    peak = max(peaks.get("VmHWM", 0), usage.ru_maxrss)
    return {
        "times": [times[0] - started, times[-1] - started] if times else [],
        "requests": rows - sum(errors.values()),
        "cpu": usage.ru_utime + usage.ru_stime,
        "kb": peak,
        "virtual": peaks.get("VmPeak", 0),
        "peak": peak,
        "errors": told,
        "failed": sum(errors.values()),
    }


def in_flight(args: argparse.Namespace, names: Sequence[str], counts: Sequence[int], folder: Path) -> list[Row]:
    """The first table: a row for each number of units and each contestant."""
    from bench import runner as bench

    cells = dict[tuple[str, int], list[Row]]()
    with late_server() as port:
        base = {name: crawl_cell(name, 1, 1, port, 0.0, folder) for name in names if name in CRAWLERS}
        for units in counts:
            for number, name in bench.interleaved(names, args.repeat):
                most_in_flight(port)
                if name in CRAWLERS:
                    cell = crawl_cell(name, units, units * rounds_of(units), port, args.latency, folder)
                    for key in ("cpu", "kb", "virtual"):
                        cell[key] = max(0, cell[key] - base[name][key])
                else:
                    cell = ask_child("bare", BARE[name], units, port, args.latency, time.monotonic())
                if not isinstance(cell, dict):
                    cell = {"times": [], "requests": 0, "failed": units, "errors": [cell]}
                cell["most"] = most_in_flight(port)
                cell.setdefault("there", cell["most"])
                cells.setdefault((name, units), []).append(cell)
                bench.note(
                    f"{units:,} units, run {number + 1} of {args.repeat}, {name}: {rate_of(cell, args.latency):,.0f}/s"
                )
    return [flight_row(name, units, found, args.latency) for (name, units), found in cells.items()]


def rate_of(cell: Row, latency: float) -> float:
    """Requests/s from when the first one went out; 0 if none was answered."""
    if not cell["times"]:
        return 0.0
    first, last = cell["times"]
    return float(cell["requests"] / max(1e-9, last - first + latency))


def flight_row(name: str, units: int, cells: Sequence[Row], latency: float) -> Row:
    from bench.runner import Spread

    good = [cell for cell in cells if cell["times"]]
    rates = Spread.of(rate_of(cell, latency) for cell in cells)

    def spread(key: str, scale: float, per: str) -> Spread | None:
        return Spread.of(cell[key] * scale / max(1, cell[per]) for cell in good) if good else None

    return {
        "": name,
        "x ideal": rates.median * latency / units,
        "units": units,
        "requests/s": rates,
        "most in flight": max(cell["most"] for cell in cells),
        "first row s": Spread.of(cell["times"][0] for cell in good) if good else None,
        "CPU ms/request": spread("cpu", 1e3, "requests"),
        "KB/unit": spread("kb", 1, "there"),
        "virtual KB/unit": spread("virtual", 1, "there"),
        "peak MB": Spread.of(cell["peak"] / 1024 for cell in good) if good else None,
        "failed": max(cell["failed"] for cell in cells),
        "stops": next((said for cell in cells for said in cell["errors"]), None),
    }


def computing(args: argparse.Namespace) -> list[Row]:
    """The second table: where pages are parsed, how fast, and how late the loop is."""
    from bench import runner as bench

    places = {"nothing to parse": ("nowhere", 1), "in the loop": ("loop", 1)}
    for where, many in (("thread", "threads"), ("process", "processes")):
        places |= {f"{count} {where if count == 1 else many}": (where, count) for count in (1, 2, 4)}
    found = {name: list[Row]() for name in places}
    for _, name in bench.interleaved(places, args.repeat):
        found[name].append(ask_checked("parse", *places[name], args.seconds))
        bench.note(f"parsing, {name}: {found[name][-1]['pages/s']:,.0f} pages/s")
    speeds = {name: bench.Spread.of(run["pages/s"] for run in runs) for name, runs in found.items()}
    base = speeds["in the loop"].median
    return [
        {
            "": name,
            "x in the loop": speeds[name].median / base if speeds[name].median else None,
            "pages/s": speeds[name] if speeds[name].median else None,
            "MB/s": bench.Spread.of(run["MB/s"] for run in runs) if speeds[name].median else None,
            **lateness("lag", [run["lags"] for run in runs]),
        }
        for name, runs in found.items()
    ]


def lateness(name: str, runs: Sequence[Sequence[float]]) -> Row:
    """Median, p99 and largest of the seconds of each run, in milliseconds."""
    from bench.runner import Spread

    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        f"{name} {key} ms": Spread.of(1e3 * percentile(run, share) for run in runs) for key, share in shares.items()
    }


def planted(args: argparse.Namespace) -> list[Row]:
    """The third table: the latency of the others beside a call that blocks."""
    from bench import runner as bench

    cases = {
        "tasks, nothing blocks": ("tasks", "none"),
        "tasks, a call blocks the loop": ("tasks", "loop"),
        "tasks, the call in a thread": ("tasks", "thread"),
        "threads, nothing blocks": ("threads", "none"),
        "threads, a call blocks one": ("threads", "thread"),
    }
    found = {name: list[list[float]]() for name in cases}
    with late_server() as port:
        for _, name in bench.interleaved(cases, args.repeat):
            found[name].append(ask_checked("block", *cases[name], args.seconds, port))
            bench.note(f"{name}: p99 {percentile(found[name][-1], 0.99) * 1e3:,.0f} ms")
    rows: list[Row] = [{"": name, "x undisturbed": 1.0} | lateness("request", runs) for name, runs in found.items()]
    for row in rows:
        calm = next(one for one in rows if one[""] == f"{str(row['']).partition(',')[0]}, nothing blocks")
        row["x undisturbed"] = row["request p99 ms"].median / calm["request p99 ms"].median
    return rows


def ask_checked(*words: object) -> Any:
    """Like `ask_child`. Raises SystemExit if the child failed."""
    found = ask_child(*words)
    if isinstance(found, str):
        raise SystemExit(f"bench: models: {' '.join(map(str, words))}: {found}")
    return found


# -------------------------------------------------------------------------------------------------- the usual table


def thread_limits() -> dict[str, int]:
    """What bounds the threads of a process here, by setting; those that are not set are left out."""
    limits = {"RLIMIT_NPROC": resource.getrlimit(resource.RLIMIT_NPROC)[0]}
    files = {
        "kernel.threads-max": ("/proc/sys/kernel/threads-max", 1),
        "kernel.pid_max": ("/proc/sys/kernel/pid_max", 1),
        "vm.max_map_count / 2": ("/proc/sys/vm/max_map_count", 2),  # a stack, and the page that guards it
        "the cgroup's pids.max": ("/sys/fs/cgroup/pids.max", 1),
    }
    for name, (path, share) in files.items():
        with contextlib.suppress(OSError, ValueError):
            limits[name] = int(Path(path).read_text()) // share
    return {name: limit for name, limit in limits.items() if limit > 0}


def usual(rows: Sequence[Row], alone: dict[str, Row], files: int) -> list[Row]:
    """What tutorials tell of threads and tasks, with this machine's figures."""

    def of(column: str, **where: object) -> Any:
        """The median in the first row that fits."""
        for row in rows:
            if column in row and row[column] is not None and all(row.get(key) == value for key, value in where.items()):
                return row[column][0] if isinstance(row[column], tuple) else row[column]
        return None

    def line(text: str, thread: Any, task: Any) -> Row:
        ratio = thread / task if isinstance(thread, float) and isinstance(task, float) and task else None
        return {"": text, "thread / task": ratio, "thread": thread, "task": task}

    most = max((row["units"] for row in rows if "units" in row), default=0)
    name, limit = min(thread_limits().items(), key=lambda item: item[1])
    table = [
        line("memory of one that only waits, KB", alone["threads"]["kb"], alone["tasks"]["kb"]),
        line("address space of one that only waits, KB", alone["threads"]["virtual"], alone["tasks"]["virtual"]),
        line("time to start one, us", alone["threads"]["us"], alone["tasks"]["us"]),
    ]
    for units in sorted({row["units"] for row in rows if row.get("units", 0) >= 100}):
        at = f"at {units:,} in flight"
        table += [
            line(f"{title}, {at}", *(of(column, **{"": who, "units": units}) for who in BARE))
            for title, column in (("requests/s", "requests/s"), ("memory of one with its connection, KB", "KB/unit"))
        ]
    table += [
        line(
            f"largest number tried, all answered ({most:,})",
            *(
                "no: " + str(said) if said else "yes"
                for said in (of("stops", **{"": who, "units": most}) for who in BARE)
            ),
        ),
        line("allowed here, at most", f"{limit:,} ({name})", f"{files:,} connections (RLIMIT_NOFILE)"),
        line(
            "others' p99 while one call blocks 0.2 s in a second, ms",
            of("request p99 ms", **{"": "threads, a call blocks one"}),
            of("request p99 ms", **{"": "tasks, a call blocks the loop"}),
        ),
        line(
            "others' p99 lag while pages are parsed, ms",
            of("lag p99 ms", **{"": "1 thread"}),
            of("lag p99 ms", **{"": "in the loop"}),
        ),
        line("parsing on two of them, x the loop alone", of("x in the loop", **{"": "2 threads"}), 1.0),
        line("the same on two processes", of("x in the loop", **{"": "2 processes"}), None),
    ]
    return table


def run(args: argparse.Namespace) -> list[Row]:
    """Print the four tables, and return their rows. Raises SystemExit if a part without limits failed."""
    from bench import runner as bench

    names = [name for name in args.peers.split(",") if bench.known(name, [*BARE, *CRAWLERS])]
    counts = [int(count) for count in args.units.split(",")]
    before, files = allow_files()
    if before < files:
        print(f"open files: {files:,} instead of {before:,}\n")
    elif files < max(counts) + 100:
        print(f"open files: no more than {files:,} are allowed here\n")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        flights = in_flight(args, names, counts, Path(folder))
    parsed, blocked = computing(args), planted(args)
    alone = {kind: ask_checked("idle", kind, max(counts)) for kind in ("threads", "tasks")}
    told = usual([*flights, *parsed, *blocked], alone, files)
    for title, rows in {
        f"Requests of {args.latency:g} s, by how many are in flight; the server is on the same processors": flights,
        f"Pages of {PAGES[0] // 1000}-{PAGES[-1] // 1000} KB parsed beside a loop; lag: how late its tasks are": parsed,
        f"{CLIENTS} units make requests of {PACE * 1e3:.0f} ms; a call blocks {BLOCKED} s, once a second": blocked,
        f"The usual table, with this machine's figures (bare threads and tasks; {max(counts):,} that only wait)": told,
    }.items():
        print(f"{title}:\n\n{bench.table(rows)}\n")
    return [*flights, *parsed, *blocked, *told]


PARTS: dict[str, Callable[..., Any]] = {
    "serve": lambda port: serve(int(port)),
    "bare": lambda kind, units, port, latency, t: bare(kind, int(units), int(port), float(latency), float(t)),
    "idle": lambda kind, units: idle(kind, int(units)),
    "parse": lambda where, workers, seconds: parsing(where, int(workers), float(seconds)),
    "block": lambda kind, where, seconds, port: blocking(kind, where, float(seconds), int(port)),
}
"""What a child does, by its first word; the others are its arguments."""

if __name__ == "__main__":
    # With a pool of processes there is something to clean up; else nothing, but thousands of threads to leave.
    leave: Any = sys.exit if sys.argv[1] == "parse" else os._exit
    signal.signal(signal.SIGTERM, lambda *_: leave(TERMINATED))
    print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])), flush=True)
    leave(0)
