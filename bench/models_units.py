"""What the children of `bench models` do: `bench/models_units.py PART ARGUMENTS`, which prints its result as JSON.

* **bare** is a thread for each unit with a blocking socket, or a task for each with asyncio's streams on the standard
  library's loop. They do nothing else, so their memory is that of the model: all units stay until all are done, and
  share the memory that is in use then, the process's own, without the kernel's buffers.
* **idle** units only wait.
* **parse**: pages of 20 to 200 KB are parsed in the loop, in threads, and in processes beside it, while a task of that
  loop wants to run every 5 ms; how late it is, is the lag that any other request would have.
* **block**: 100 units make requests of 100 ms, while something blocks for 0.2 s once a second.

A failure is a result: a thread that cannot be started, a file too many, a run that takes longer than `LIMIT`.
"""

from __future__ import annotations

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
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure import Row, host_address
from bench.models_server import ANSWER, HOSTS, allow_files

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


def rounds_of(units: int) -> int:
    """How many requests each of so many units makes."""
    return max(2, min(ROUNDS, REQUESTS // units))


def memory_kb(pid: int | str = "self") -> dict[str, int]:
    """``VmRSS``, ``VmHWM`` (its peak), ``VmSize`` and ``VmPeak`` of a process; none of them if it is gone."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {line[0].rstrip(":"): int(line[1]) for line in lines if line[0].startswith("Vm")}
    return {}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---------------------------------------------------------------------------------------------------- bare units


def request(number: int, latency: float) -> tuple[str, bytes]:
    """Address and bytes of a request."""
    host = host_address(number % HOSTS)
    return host, f"GET /{latency}/{number} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


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


# ------------------------------------------------------------------------------------ computing, and calls that block


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


PARTS: dict[str, Callable[..., Any]] = {
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
