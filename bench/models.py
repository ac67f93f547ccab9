"""`bench models`: threads against asyncio: what a unit in flight costs, and where each ends.

* **A cell is a process** (bench/models_units.py). `crawl_threads` and `crawl_async` are the crawlers, as their user
  starts them, with ``--concurrency N --per-host N --rate 0``; their memory and CPU time are told above those of a run
  over one URL, the memory by the most that the server saw in flight. The share of the ideal goes by what it saw, too.
* **Requests/s** are counted from when the first request went out to when the last answer was there; the ideal is units
  by latency. Each unit makes up to six requests, of 20,000 in all, so at 10,000 units much of it is a start. `first
  row` is from the start of the process.
* **A failure is a result**, and stands in the column `stops`.

Promised: every child is ended by its id, after twice `LIMIT` seconds at the latest. No limit of the system is tried out
on a shared machine: how many threads it allows is read from its settings. Not promised: that the server, on the same
processors, costs the same in every cell. Linux only (/proc). One thread, with a timer for each child.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.measure import (
    HERE,
    Row,
    Spread,
    child,
    command,
    free_port,
    host_address,
    interleaved,
    known,
    module,
    note,
    table,
)
from bench.models_server import HOSTS, allow_files
from bench.models_units import BLOCKED, CLIENTS, LIMIT, PACE, PAGES, TERMINATED, memory_kb, rounds_of

BARE = {"bare threads": "threads", "bare tasks": "tasks"}
CRAWLERS = {"crawl_threads": "crawl_threads.py", "crawl_async": "crawl_async.py"}


# ---------------------------------------------------------------------------------------------- cells and children


@contextlib.contextmanager
def late_server() -> Iterator[int]:
    """Its port."""
    port = free_port()
    with child([*module("bench.models_server"), port], stdout=subprocess.PIPE) as process:
        if not process.stdout or process.stdout.readline() != b"ready\n":
            raise SystemExit("bench: the late server did not start")
        yield port


def most_in_flight(port: int) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{host_address(0)}:{port}/most", timeout=30) as answer:
        return int(answer.read())


def ask_child(*words: object) -> Any:
    """What `bench/models_units.py WORDS` prints, from JSON; an error as text if it failed or took too long."""
    with child([*module("bench.models_units"), *words], stdout=subprocess.PIPE) as process:
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
    urls, hosts = folder / "urls.txt", [host_address(number) for number in range(HOSTS)]
    urls.write_text("".join(f"http://{hosts[n % HOSTS]}:{port}/{latency}/{n}\n" for n in range(count)))
    words = [sys.executable, HERE / CRAWLERS[name], urls, "--rate", 0, "--concurrency", units, "--per-host", units]
    times, errors = list[float](), collections.Counter[str]()
    rows, rest, peaks, looked = 0, b"", dict[str, int](), 0.0
    started = time.monotonic()
    with child([*words, "--retries", 0, "-q"], stdout=subprocess.PIPE, bufsize=0) as process:
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


def ask_checked(*words: object) -> Any:
    """Like `ask_child`. Raises SystemExit if the child failed."""
    found = ask_child(*words)
    if isinstance(found, str):
        raise SystemExit(f"bench: models: {' '.join(map(str, words))}: {found}")
    return found


# ------------------------------------------------------------------------------------------------------ the tables


def percentile(values: Sequence[float], share: float) -> float:
    """Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[int(share * (len(values) - 1))]


def in_flight(args: argparse.Namespace, names: Sequence[str], counts: Sequence[int], folder: Path) -> list[Row]:
    """The first table: a row for each number of units and each contestant."""
    cells = dict[tuple[str, int], list[Row]]()
    with late_server() as port:
        base = {name: crawl_cell(name, 1, 1, port, 0.0, folder) for name in names if name in CRAWLERS}
        for units in counts:
            for number, name in interleaved(names, args.repeat):
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
                note(
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
    places = {"nothing to parse": ("nowhere", 1), "in the loop": ("loop", 1)}
    for where, many in (("thread", "threads"), ("process", "processes")):
        places |= {f"{count} {where if count == 1 else many}": (where, count) for count in (1, 2, 4)}
    found = {name: list[Row]() for name in places}
    for _, name in interleaved(places, args.repeat):
        found[name].append(ask_checked("parse", *places[name], args.seconds))
        note(f"parsing, {name}: {found[name][-1]['pages/s']:,.0f} pages/s")
    speeds = {name: Spread.of(run["pages/s"] for run in runs) for name, runs in found.items()}
    base = speeds["in the loop"].median
    return [
        {
            "": name,
            "x in the loop": speeds[name].median / base if speeds[name].median else None,
            "pages/s": speeds[name] if speeds[name].median else None,
            "MB/s": Spread.of(run["MB/s"] for run in runs) if speeds[name].median else None,
            **lateness("lag", [run["lags"] for run in runs]),
        }
        for name, runs in found.items()
    ]


def lateness(name: str, runs: Sequence[Sequence[float]]) -> Row:
    """Median, p99 and largest of the seconds of each run, in milliseconds."""
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        f"{name} {key} ms": Spread.of(1e3 * percentile(run, share) for run in runs) for key, share in shares.items()
    }


def planted(args: argparse.Namespace) -> list[Row]:
    """The third table: the latency of the others beside a call that blocks."""
    cases = {
        "tasks, nothing blocks": ("tasks", "none"),
        "tasks, a call blocks the loop": ("tasks", "loop"),
        "tasks, the call in a thread": ("tasks", "thread"),
        "threads, nothing blocks": ("threads", "none"),
        "threads, a call blocks one": ("threads", "thread"),
    }
    found = {name: list[list[float]]() for name in cases}
    with late_server() as port:
        for _, name in interleaved(cases, args.repeat):
            found[name].append(ask_checked("block", *cases[name], args.seconds, port))
            note(f"{name}: p99 {percentile(found[name][-1], 0.99) * 1e3:,.0f} ms")
    rows: list[Row] = [{"": name, "x undisturbed": 1.0} | lateness("request", runs) for name, runs in found.items()]
    for row in rows:
        calm = next(one for one in rows if one[""] == f"{str(row['']).partition(',')[0]}, nothing blocks")
        row["x undisturbed"] = row["request p99 ms"].median / calm["request p99 ms"].median
    return rows


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


@command(
    "threads against asyncio at 1 to 10,000 in flight; parsing beside a loop; a call that blocks: speed, memory, lag",
    "models",
    "models --units 1,100,1000 --repeat 1 --seconds 1",
    units=("1,10,100,1000,10000", "numbers in flight"),
    latency=(0.5, "seconds that each answer takes"),
    peers=("bare threads,bare tasks,crawl_threads,crawl_async", "contestants of the first table"),
    seconds=(2.0, "of each run of the other tables"),
    repeat=(3, "runs of each"),
)
def models(args: argparse.Namespace) -> list[Row]:
    """Print the four tables, and return their rows. Raises SystemExit if a part without limits failed."""
    names = [name for name in args.peers.split(",") if known(name, [*BARE, *CRAWLERS])]
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
        print(f"{title}:\n\n{table(rows)}\n")
    return [*flights, *parsed, *blocked, *told]
