"""`bench million` and `bench crawl --scale`: does a crawler's cost for a URL grow with their number?

The URLs are distinct ones of a tiny page that nginx serves from memory, so what is measured is the crawler. They come
through stdin and the rows leave through stdout, so nothing but the crawler itself can keep them.

* ``million`` is one crawl: rows/s in each tenth of it, and the peak of its memory.
* ``crawl --scale`` is a crawl of 1,000 URLs, one of ten times as many, and so on. Seconds and memory are told for a
  URL, above the least that a crawl of one URL took, which is what starting costs. Memory at 1,000 URLs is mostly that
  of what is in flight; what a URL costs for good is the difference between two sizes (`more bytes/URL`).

Threads: one writes the URLs, the main one reads the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO

from bench.measure import (
    DRIVER,
    HERE,
    Row,
    Run,
    Spread,
    child,
    command,
    drivers,
    free_port,
    host_address,
    interleaved,
    nginx,
    note,
    reap,
    table,
    to,
)

SMALLEST = 1000
REPEATED = 100_000
"""Largest crawl that is repeated: beyond it, one takes minutes."""


def feed(stream: IO[bytes], count: int, hosts: int, port: int) -> None:
    """So many distinct URLs of the tiny page, a thousand at a time; ends quietly when nobody reads on."""
    with contextlib.suppress(BrokenPipeError), stream:
        for start in range(0, count, 1000):
            numbers = range(start, min(start + 1000, count))
            lines = (f"http://{host_address(n % hosts)}:{port}/tiny?n={n}\n" for n in numbers)
            stream.write("".join(lines).encode())


class Arrivals:
    """Counts rows as they come out of a pipe, and notes when the first was there, then each tenth of them."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.rows = self.failed = 0
        self.times: list[float] = []
        self._rest = b""

    def take(self, data: bytes, now: float) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.rows += len(lines)
        self.failed += sum(b'"error":null' not in line for line in lines)
        while self.rows and len(self.times) <= 10 and self.rows >= len(self.times) * self.expected / 10:
            self.times.append(now)

    def rates(self) -> list[float]:
        """Rows per second in each tenth."""
        return [self.expected / 10 / max(1e-9, end - start) for start, end in pairwise(self.times)]


def stream_urls(driver: str, urls: int, hosts: int, concurrency: int | None, port: int) -> tuple[Run, Arrivals]:
    """A crawl of so many URLs. Raises SystemExit unless each has a row."""
    arrivals, started = Arrivals(urls), time.perf_counter()
    options: list[object] = ["--concurrency", concurrency] if concurrency else []
    words = [sys.executable, HERE / driver, "-", "--rate", 0, "-q", *options]
    with child(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout
        feeder = threading.Thread(target=feed, args=(process.stdin, urls, hosts, port), daemon=True)
        feeder.start()
        while data := process.stdout.read(1 << 20):
            tenths = len(arrivals.times)
            arrivals.take(data, time.perf_counter())
            if len(arrivals.times) > max(1, tenths) and urls > REPEATED:
                note(f"{driver}: {arrivals.rows:,} rows, {arrivals.rates()[-1]:,.0f}/s in the last tenth")
        run = reap(process, started, driver)
        feeder.join()
    if arrivals.rows != urls:
        raise SystemExit(f"bench: {driver} wrote {arrivals.rows:,} rows for {urls:,} URLs")
    return run, arrivals


def million_row(driver: str, run: Run, arrivals: Arrivals) -> Row:
    rates = arrivals.rates()
    return {
        "": driver,
        "last / first": rates[-1] / rates[0],
        "rows": arrivals.rows,
        "failed": arrivals.failed,
        "wall s": run.seconds,
        "rows/s": arrivals.rows / run.seconds,
        "first tenth": rates[0],
        "last tenth": rates[-1],
        "slowest tenth": min(rates),
        "CPU s": run.cpu,
        "peak MB": run.peak_mb,
    }


@command(
    "a stream of distinct URLs of a tiny page through stdin: peak memory, and whether the speed holds",
    "million --driver crawl_async.py",
    "million --urls 100000",
    urls=(1_000_000, "URLs"),
    hosts=(50, "hosts that they are spread over"),
    concurrency=(None, "requests in flight; default: the crawler's"),
    driver=DRIVER,
)
def million(args: argparse.Namespace) -> list[Row]:
    """Print the table of one crawl for each driver, and return its rows."""
    port, who = free_port(), drivers(args.driver)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, nginx(Path(folder), args.hosts, port):
        results = [
            million_row(driver, *stream_urls(driver, args.urls, args.hosts, args.concurrency, port)) for driver in who
        ]
    print(table(results))
    return results


def sizes(largest: int) -> list[int]:
    """1,000, ten times as many, and so on; ``largest`` in any case."""
    found = [largest]
    while found[0] > SMALLEST:
        found.insert(0, SMALLEST * 10 ** (len(str((found[0] - 1) // SMALLEST)) - 1))
    return found


def least(runs: Sequence[Run]) -> Run:
    """The least that starting takes: of each figure the smallest."""
    return Run(*map(min, zip(*runs, strict=True)))


def scale_rows(driver: str, alone: Run, runs: dict[int, list[Run]]) -> list[Row]:
    """A row for each size: what a URL costs above a crawl of one, and how many times what it does at the smallest."""
    rows: list[Row] = []
    for urls, made in runs.items():
        each = Spread.of(1e3 * (run.seconds - alone.seconds) / urls for run in made)
        peak = Spread.of(run.peak_mb for run in made)
        rows.append(
            {
                "": driver,
                "x smallest": to(each.median, max(0.0, rows[0]["ms/URL"].median)) if rows else 1.0,
                "URLs": urls,
                "wall s": Spread.of(run.seconds for run in made),
                "ms/URL": each,
                "CPU ms/URL": Spread.of(1e3 * (run.cpu - alone.cpu) / urls for run in made),
                "peak MB": peak,
                "bytes/URL": max(0.0, peak.median - alone.peak_mb) * (1 << 20) / urls,
                "more bytes/URL": None,
            }
        )
    for less, more in pairwise(rows):
        grown = (more["peak MB"].median - less["peak MB"].median) * (1 << 20)
        more["more bytes/URL"] = grown / (more["URLs"] - less["URLs"])
    return rows


def scale(args: argparse.Namespace) -> list[Row]:
    """Print the table of all sizes for both drivers, and return its rows."""
    port, who = free_port(), drivers("both")
    runs: dict[str, dict[int, list[Run]]] = {driver: {} for driver in who}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, nginx(Path(folder), args.hosts, port):
        starts: dict[str, list[Run]] = {driver: [] for driver in who}
        for _, driver in interleaved(who, args.repeat):
            starts[driver].append(stream_urls(driver, 1, args.hosts, args.concurrency, port)[0])
        alone = {driver: least(starts[driver]) for driver in who}
        for urls in sizes(args.scale):
            for _, driver in interleaved(who, args.repeat if urls <= REPEATED else 1):
                run, arrivals = stream_urls(driver, urls, args.hosts, args.concurrency, port)
                if arrivals.failed:
                    raise SystemExit(f"bench: {driver}: {arrivals.failed:,} of {urls:,} URLs failed")
                runs[driver].setdefault(urls, []).append(run)
                note(f"{driver}: {urls:,} URLs, {run.seconds:,.1f} s, {run.peak_mb:,.0f} MB")
    results = [row for driver in who for row in scale_rows(driver, alone[driver], runs[driver])]
    print(table(results))
    print("\nA URL's share of what a crawl takes above one of a single URL, which took at least", end=" ")
    print(
        ", ".join(f"{run.seconds:.2f} s and {run.peak_mb:.0f} MB ({driver})" for driver, run in alone.items()),
        end=".\n",
    )
    print("more bytes/URL: of those that came on top of the size before; it is what a URL leaves behind for good.")
    return results
