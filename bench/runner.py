"""Side-by-side measurements: the programs of this project against their peers, in one run, as ratios.

    python -m bench crawl

Theory
------
A rate by itself says more about the machine than about the program. So everything here is measured next to what a
user would take instead, on the same input, in one run: repetitions are interleaved (A B C, B C A, ...), so that a busy
minute hits all alike; a figure is the median, with the smallest and the largest beside it; what counts is the ratio.

* **A contestant of `crawl` is a process of its own**, timed from its start to its end, as its user would wait for it;
  a run over one page tells how much of that is starting up. CPU time and peak memory are what the system kept for the
  child (wait4). Linux starts a child's peak at its parent's, so this process stays small: the pages are generated in
  another, and the rows are read when all timing is over. What it takes itself is printed: no peak below that is told.
* **Being fast at something else does not count**: all contestants write the same rows, and these are compared.
* **The peers** are in bench/peers.py and run as `python -m bench _peer NAME URLS ROWS CONCURRENCY`; therefore this
  file imports little at its head.
* **What else is measured** (`primitives`, `models`, `aggregate`, `feeds`, `ingest`, `market`, `simulate`, `frontier`;
  `million` and `crawl --scale` in bench/scale.py) is in files named after it.
* **Each run leaves its rows and a plot** (bench/plot.py) in bench/latest/, which git ignores. The published ones are in
  bench/: they are replaced by `--out bench` only. Where there is a reference, the first figure of a row is the ratio.

Promised: all traffic stays on 127.0.0.0/8; every child is ended, and every temporary folder removed, however the run
ends, SIGKILL excepted. A peer that is not installed is left out, with a note. Not promised: that a shared machine
repeats itself.

Threads: `rate` has the server in one, each child has a timer that ends it if it takes too long. There are no locks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers import PARSERS, PEERS, Facts, Row

HERE = Path(__file__).resolve().parents[1]
CHILD_LIMIT = 3600.0
"""Seconds after which a child is ended."""
LIBRARIES = "aiohttp uvloop ada-url orjson scrapy twisted parsel lxml selectolax tenacity stamina aiolimiter cryptofeed"
"""Those whose versions are printed; the figures keep those of all that the requirements name."""

PROGRAMS = {"nginx": "-v", "wrk": "-v", "curl": "--version", "rsyslogd": "-v"}
"""What else may take part, and the flag that makes it tell its version."""

NEEDS = {
    "textbook": "html",
    "textbook_async": "aiohttp",
    "textbook_threads": "html",
    "scrapy_stripped": "scrapy",
    "cryptofeed-batched": "cryptofeed",
}
"""The module that a contestant cannot do without, where it is not named like it."""

Runner = Callable[[argparse.Namespace], list[Row]]


def module(name: str) -> list[object]:
    """The command line that runs a module of this project, whatever the current folder."""
    program = f"import runpy, sys; sys.path.insert(0, {str(HERE)!r}); runpy.run_module({name!r}, run_name='__main__')"
    return [sys.executable, "-P", "-c", program]


class Command(NamedTuple):
    """A subcommand. ``options``: name to (default, help); a name in capitals is an argument."""

    run: Runner
    about: str
    examples: tuple[str, ...]
    options: dict[str, tuple[Any, str]]


class OrNone(NamedTuple):
    """The default of an option that may be left out, or given without a value: then it has this one."""

    value: int


COMMANDS: dict[str, Command] = {}


def command(about: str, *examples: str, **options: tuple[Any, str]) -> Callable[[Runner], Runner]:
    """Register a function, which prints its table and returns its rows, as the subcommand of its name."""

    def register(run: Runner) -> Runner:
        COMMANDS[run.__name__] = Command(run, about, examples, options)
        return run

    return register


def known(name: str, names: Collection[str]) -> bool:
    """True. Raises SystemExit if ``name`` is none of them."""
    if name not in names:
        raise SystemExit(f"bench: {name!r} is none of {', '.join(names)}")
    return True


def present(name: str) -> bool:
    """Whether what a contestant needs is installed; if not, with a note for the reader."""
    needed = NEEDS.get(name, name.partition(" x")[0])
    there = bool(shutil.which(name) if name == "curl" else importlib.util.find_spec(needed))
    if not there:
        print(f"{needed}: not installed" + ("" if name == "curl" else ": pip install -r requirements-bench.txt"))
    return there


# ------------------------------------------------------------------------------------------- figures and tables


class Spread(NamedTuple):
    """The median of some repetitions, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError if there are none."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values")
        middle = len(ordered) // 2
        return cls((ordered[middle] + ordered[-middle - 1]) / 2, ordered[0], ordered[-1])


def cell(value: object) -> str:
    """``480``, ``48.0``, ``4.80``; ``480 (470-495)`` for a spread, the median alone if nothing spreads."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Spread):
        median, low, high = map(cell, value)
        return median if low == high else f"{median} ({low}-{high})"
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
    return f"{value:,}"


def table(rows: Iterable[Mapping[str, object]]) -> str:
    """Columns named by the keys of the first row, as wide as they need to be: the first to the left, others right."""
    rows = list(rows)
    lines = [list(rows[0]), *(list(map(cell, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join((first.ljust(widths[0]), *map(str.rjust, rest, widths[1:]))) for first, *rest in lines)


def to(value: float, base: float | None) -> float | None:
    """How many times ``base`` it is; None if there is nothing to compare with."""
    return value / base if base else None


def note(text: str) -> None:
    """What is going on, to stderr: the tables are the output."""
    print(text, file=sys.stderr, flush=True)


def interleaved(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Every name once a round, each round beginning with another."""
    names = list(names)
    for number in range(rounds):
        start = number % max(1, len(names))
        for name in (*names[start:], *names[:start]):
            yield number, name


def find_program(name: str) -> str | None:
    """Where it is, also outside of a user's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def describe_machine() -> dict[str, Any]:
    """What a reader of the figures wants to know of where they were made; printed, too."""
    cpu, versions = platform.processor(), {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    named = [line for file in HERE.glob("requirements*.txt") for line in file.read_text().splitlines()]
    names = {match[0] for line in named if (match := re.match(r"[A-Za-z][\w.-]*", line))}
    for name in (*LIBRARIES.split(), *sorted(names.difference(LIBRARIES.split()))):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    for name, flag in PROGRAMS.items():
        with contextlib.suppress(OSError, subprocess.SubprocessError, TypeError):
            said = subprocess.run([find_program(name), flag], capture_output=True, text=True, timeout=10)  # type: ignore[list-item]
            versions[name] = re.search(r"\d+\.[\w.]+", said.stdout + said.stderr)[0]  # type: ignore[index]
    cores, load, python = os.cpu_count(), round(os.getloadavg()[0], 2), platform.python_version()
    print(f"{cores} x {cpu or platform.machine()}, load {load}, {platform.platform()}")
    print(
        f"Python {python}; "
        + ", ".join(f"{name} {versions[name]}" for name in LIBRARIES.split() if name in versions)
        + "\n"
    )
    return {"cpu": cpu, "cores": cores, "load": load, "system": platform.platform(), "python": python} | versions


# ----------------------------------------------------------------------------------------------------- children


class Run(NamedTuple):
    """What a finished child took: wall and CPU time in seconds, peak memory in MB."""

    seconds: float
    cpu: float
    peak_mb: float


def maxrss_mb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@contextlib.contextmanager
def child(words: Sequence[object], **pipes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child without proxies in its environment; ended, by its id, when the block is left or takes too long."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": sys.stderr, "env": environment} | pipes
    process: subprocess.Popen[bytes] = subprocess.Popen([str(word) for word in words], **pipes)
    watchdog = threading.Timer(CHILD_LIMIT, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        if process.returncode is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in filter(None, (process.stdin, process.stdout)):
            stream.close()


def reap(process: subprocess.Popen[bytes], started: float, name: str) -> Run:
    """Wait for the child to end by itself. Raises SystemExit if it failed."""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"bench: {name} failed with exit code {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, maxrss_mb(usage))


def run_child(words: Sequence[object], name: str) -> Run:
    """Run a command to its end. What it says goes to stderr."""
    started = time.perf_counter()
    with child(words) as process:
        return reap(process, started, name)


# -------------------------------------------------------------------------------------------------------- nginx

NGINX = """daemon off; worker_processes 1; pid nginx.pid; error_log error.log crit; {user}
events {{ worker_connections 8192; multi_accept on; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on;
  keepalive_timeout 600s; keepalive_requests 1000000000; reset_timedout_connection on;
  open_file_cache max=100000 inactive=3600s; open_file_cache_valid 3600s;
  types {{ text/html html; }} default_type text/html; charset utf-8;
  client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
  server {{
    {listen}
    root {root}/$server_addr; index index.html;
    location = /tiny {{ return 200 '<!doctype html><title>Tiny</title><p>One <a href=/>link</a>.</p>'; }}
  }}
}}
"""


def host_address(number: int) -> str:
    """127.0.1.1 for 0, and so on: as the sandbox numbers its hosts."""
    return f"127.0.{1 + (number + 1) // 256}.{(number + 1) % 256}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((host_address(0), 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def nginx(folder: Path, hosts: int, port: int) -> Iterator[None]:
    """nginx over ``folder/www/ADDRESS/...`` on ``hosts`` loopback addresses; one worker, as one core is enough."""
    program = find_program("nginx")
    if program is None:
        raise SystemExit("bench: nginx is needed to serve the pages: apt install nginx, or brew install nginx")
    config, log = folder / "nginx.conf", folder / "error.log"
    user = "user root;" if os.geteuid() == 0 else ""  # the worker must read a folder that only we can enter
    listen = " ".join(f"listen {host_address(number)}:{port} backlog=1024;" for number in range(hosts))
    config.write_text(NGINX.format(user=user, listen=listen, root=folder / "www"))
    with child([program, "-p", folder, "-c", config]) as server:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((host_address(hosts - 1), port), 1).close()
                break
            except OSError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    why = log.read_text().strip().splitlines()[-1:] if log.exists() else []
                    raise SystemExit(f"bench: nginx did not start: {' '.join(why) or error}") from None
                time.sleep(0.02)
        yield


def write_site(folder: str, urls: str, pages: int, hosts: int, size: int, port: int) -> None:
    """The pages as files below ``folder``, and their URLs, the hosts taking turns."""
    from sandbox.sites import make_page, page_path

    base, of_host = f"http://{{host}}:{port}", -(-pages // hosts)
    with open(urls, "w") as lines:
        for number in range(pages):
            page, host = divmod(number, hosts)
            path, address = page_path(page), host_address(host)
            file = Path(folder, address, path.lstrip("/") or "index.html")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(make_page(host, page, of_host, size, base, hosts=hosts))
            lines.write(f"http://{address}:{port}{path}\n")


# ------------------------------------------------------------------------------------------------ bench crawl

IN_FLIGHT = {
    "crawl_async": 64,
    "crawl_async x2": 64,
    "crawl_threads": 16,
    "scrapy": 32,
    "scrapy_stripped": 32,
    "textbook_async": 64,
    "textbook_threads": 16,
    "curl": 64,
}
"""The contestants, and a concurrency at which each does well on two cores; none depends on it much."""
Digest = dict[str, tuple[int, int, int]]


def crawl_command(name: str, urls: Path, rows: Path, concurrency: int) -> list[object]:
    if name in PEERS:
        return [*module("bench"), "_peer", name, urls, rows, concurrency]
    if name == "curl":
        config = urls.with_suffix(".curl")
        config.write_text("".join(f"url={url}\noutput=/dev/null\n" for url in urls.read_text().split()))
        return ["curl", "-sSfZ", "--no-progress-meter", "--parallel-max", concurrency, "-K", config]
    program, _, processes = name.partition(" x")
    more = ["--processes", processes] if processes else []
    program_and_list = [sys.executable, HERE / f"{program}.py", urls]
    return [*program_and_list, "--rate", 0, "--concurrency", concurrency, *more, "-q", "-o", rows]


def digest(rows: Path) -> Digest:
    """The rows by URL, small enough to keep: title and set of links as hashes, the word count as it is."""
    with open(rows, encoding="utf-8") as lines:
        return {
            row["url"]: (hash(row["title"]), row["word_count"], hash(frozenset(row["links_found"])))
            for row in map(json.loads, lines)
        }


def differences(reference: Digest, other: Digest) -> dict[str, int]:
    """On how many pages the rows differ, and in what."""
    both = [(reference[url], other[url]) for url in reference.keys() & other.keys()]
    alone = len(reference.keys() ^ other.keys())
    found = {what: sum(a[n] != b[n] for a, b in both) for n, what in enumerate(("titles", "words", "links"))}
    return {"pages": sum(a != b for a, b in both) + alone, **found, "in one only": alone}


@command(
    "whole crawls of generated pages, against Scrapy and the textbook: pages/s, CPU, memory, same rows",
    "crawl",
    "crawl --pages 1000 --repeat 1",
    "crawl --peers crawl_async,crawl_threads,curl --concurrency 128",
    "crawl --scale 1000000 --repeat 1",
    pages=(10_000, "pages in all"),
    hosts=(50, "hosts that they are spread over"),
    size=(20_000, "bytes of a page"),
    repeat=(3, "runs of each contestant"),
    concurrency=(None, "requests in flight, for all; default: what suits each best"),
    peers=(",".join(IN_FLIGHT), "contestants"),
    scale=(
        OrNone(100_000),
        "instead: our crawlers over 1,000 URLs of a tiny page, then ten times as many, up to these",
    ),
)
def crawl(args: argparse.Namespace) -> list[Row]:
    if args.scale:
        from bench import scale as bench_scale

        return bench_scale.scale(args)
    names = [name for name in args.peers.split(",") if known(name, IN_FLIGHT) and present(name)]
    in_flight = {name: args.concurrency or IN_FLIGHT[name] for name in names}
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder, port = Path(temporary), free_port()
        urls, one = folder / "urls.txt", folder / "one.txt"
        rows = {name: folder / f"{name}.jsonl" for name in names}
        note(f"writing {args.pages:,} pages of {args.size:,} bytes")
        site = (folder / "www", urls, args.pages, args.hosts, args.size, port)
        run_child([*module("bench"), "_site", *site], "the page generator")
        with open(urls) as lines:
            one.write_text(next(lines))
        with nginx(folder, args.hosts, port):
            startup = {name: run_child(crawl_command(name, one, rows[name], in_flight[name]), name) for name in names}
            for number, name in interleaved(names, args.repeat):
                rows[name].unlink(missing_ok=True)
                runs[name].append(run_child(crawl_command(name, urls, rows[name], in_flight[name]), name))
                note(f"run {number + 1} of {args.repeat}, {name}: {args.pages / runs[name][-1].seconds:,.0f} pages/s")
        own = maxrss_mb(resource.getrusage(resource.RUSAGE_SELF))
        digests = {name: digest(rows[name]) for name in names if name != "curl"}
    reference = digests.get("scrapy") or next(iter(digests.values()), {})
    differ = {name: differences(reference, digests[name]) for name in digests}
    for name in digests:
        if differ[name]["pages"]:
            print(f"{name} differs: {differ[name]}")
    speed = {name: Spread.of(args.pages / run.seconds for run in runs[name]) for name in names}
    scrapy, textbook = (speed[peer].median if peer in speed else None for peer in ("scrapy", "textbook_async"))
    results = [
        {
            "": name,
            "x Scrapy": to(speed[name].median, scrapy),
            "x textbook": to(speed[name].median, textbook),
            "pages/s": speed[name],
            "in flight": in_flight[name],
            "CPU s": Spread.of(run.cpu for run in runs[name]),
            "peak MB": Spread.of(run.peak_mb for run in runs[name]),
            "1 page, s": startup[name].seconds,
            "pages differ": differ[name]["pages"] if name in differ else None,
        }
        for name in names
    ]
    print(table(results))
    print("\nWhole processes, start-up included: median (smallest-largest). No peak below this program's own")
    print(f"{own:.0f} MB can be told. Rows differ, if any do, from the first's or Scrapy's. curl only fetches.")
    return results


# ------------------------------------------------------------------------------------------------ bench parse


def pages_to_parse(folder: str | None, count: int, size: int) -> Iterator[tuple[bytes, str]]:
    if folder is None:
        from sandbox.sites import make_page

        for page in range(count):
            yield make_page(0, page, count, size), f"http://127.0.1.1:8080/p/{page}.html"
        return
    files = sorted(Path(folder).glob("*.html"))
    if not files:
        raise SystemExit(f"bench: no *.html in {folder}")
    for file in files:
        yield file.read_bytes(), "http://page.example/d/p.html"


def agree(reference: Sequence[Facts], other: Sequence[Facts]) -> Row:
    """On how many pages both found the same title, the same links, and word counts within 2 %."""
    pairs = list(zip(reference, other, strict=True))
    return {
        "titles": sum(a.title == b.title for a, b in pairs),
        "links": sum(set(a.links_found) == set(b.links_found) for a, b in pairs),
        "words +-2 %": sum(abs(a.word_count - b.word_count) <= 0.02 * max(1, a.word_count) for a, b in pairs),
    }


@command(
    "title, links and words of HTML pages, against html.parser, lxml, parsel, selectolax: MB/s, agreement",
    "parse",
    "parse saved_pages/ --repeat 7",
    DIR=(None, "a folder of *.html; default: generated pages"),
    pages=(200, "pages to generate"),
    size=(20_000, "bytes of a generated page"),
    repeat=(5, "runs of each parser"),
)
def parse(args: argparse.Namespace) -> list[Row]:
    pages = list(pages_to_parse(args.DIR, args.pages, args.size))
    megabytes = sum(len(body) for body, _ in pages) / 1e6
    parsers = {name: parser for name, parser in PARSERS.items() if present(name)}
    speeds: dict[str, list[float]] = {name: [] for name in parsers}
    found = {name: [parser(*pages[0])] for name, parser in parsers.items()}  # what is compiled once, is by now
    for _, name in interleaved(parsers, args.repeat):
        started = time.perf_counter()
        found[name] = [parsers[name](body, url) for body, url in pages]
        speeds[name].append(megabytes / (time.perf_counter() - started))
    reference = "selectolax" if "selectolax" in parsers else "html_parse"
    speed = {name: Spread.of(speeds[name]) for name in parsers}
    results = [
        {
            "": name,
            "x textbook": to(speed[name].median, speed["textbook"].median),
            "MB/s": speed[name],
            "us/page": megabytes * 1e6 / speed[name].median / len(pages),
            **agree(found[reference], found[name]),
        }
        for name in parsers
    ]
    print(f"{len(pages)} pages, {megabytes:.1f} MB; on how many of them each agrees with {reference}:\n")
    print(table(results))
    return results


# ------------------------------------------------------------------------------------------------- bench rate

DRIVERS = ("crawl_async.py", "crawl_threads.py")
DRIVER = ("both", f"{', '.join(DRIVERS)} or both")


def drivers(choice: str) -> Sequence[str]:
    return DRIVERS if choice == "both" else [choice] * known(choice, DRIVERS)


@command(
    "the politeness bound, as the server sees it: wall time, and the busiest second of its log",
    "rate",
    "rate --concurrency 500 --driver crawl_async.py",
    "rate --urls 1000 --rate 200 --burst 10",
    urls=(10_000, "URLs, all of one host"),
    rate=(100.0, "requests per second"),
    burst=(1, "requests that may go at once"),
    concurrency=(64, "requests in flight"),
    per_host=(None, "requests in flight to one host; default: the crawler's"),
    driver=DRIVER,
)
def rate(args: argparse.Namespace) -> list[Row]:
    from sandbox.sites import Sandbox

    results: list[Row] = []
    options = ["--rate", args.rate, "--burst", args.burst, "--concurrency", args.concurrency, "-q", "-o", os.devnull]
    options += ["--per-host", args.per_host] if args.per_host else []
    for driver in drivers(args.driver):
        note(f"{driver}: {args.urls:,} URLs at {args.rate:g}/s take {args.urls / args.rate:,.0f} s")
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as folder,
            Sandbox(hosts=1, pages=1, page_bytes=2000, log=args.urls * 2) as site,
        ):
            urls, stats = Path(folder, "urls.txt"), Path(folder, "stats.json")
            urls.write_text("".join(f"{site.url('/')}?n={n}\n" for n in range(args.urls)))
            run = run_child([sys.executable, HERE / driver, urls, "--stats", stats, *options], driver)
            seen = [entry.t for entry in site.log]
            results.append(
                {
                    "": driver,
                    "x urls/rate": run.seconds * args.rate / args.urls,
                    "off, %": f"{(run.seconds * args.rate / args.urls - 1) * 100:+.2f}",
                    "wall s": run.seconds,
                    "first to last s": seen[-1] - seen[0],
                    "ideal s": max(0, args.urls - args.burst) / args.rate,
                    "requests": len(seen),
                    "ok": json.loads(stats.read_text())["ok"],
                    "most in 1 s": site.max_in_window(0, 1.0),
                    "bound": args.burst + args.rate,
                    "CPU s": run.cpu,
                }
            )
    print(table(results))
    print("\nmost in 1 s: in any window of a second of the server's log. ideal: (urls - burst) / rate.")
    return results


# ------------------------- bench million, primitives, models, aggregate, feeds, ingest, simulate, frontier, plot

# What follows is in files of their own, which are imported when they are asked for: this process stays small.


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
    from bench import scale as bench_scale

    return bench_scale.million(args)


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
    from bench import models as bench_models

    return bench_models.run(args)


@command(
    "a call of each mechanism, against the library that it replaces: nanoseconds",
    "primitives",
    "primitives --calls 100000 --repeat 5",
    calls=(20_000, "calls in a run"),
    repeat=(15, "runs of each"),
)
def primitives(args: argparse.Namespace) -> list[Row]:
    from bench import primitives as bench_primitives

    return bench_primitives.run(args)


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
    from bench import aggregate as bench_aggregate

    results: list[Row] = []
    if bench_aggregate.run(args, results):
        raise SystemExit("bench: aggregate: an answer was wrong, or something was left running")
    return results


@command(
    "26 feeds and their 36 articles, each answer with its own latency: seconds, ratio to one after the other, pauses",
    "feeds",
    "feeds --repeat 3 --seed 2",
    repeat=(1, "runs of each contestant; the loop runs once"),
    seed=(1, "of the latencies"),
)
def feeds(args: argparse.Namespace) -> list[Row]:
    from bench import feeds as bench_feeds

    return bench_feeds.run(args)


@command(
    "logs by UDP into PostgreSQL, against rsyslog: loss at a ladder of rates, the highest lossless one, CPU, memory",
    "ingest",
    "ingest --peers ingest_logs,ingest_logs-x2 --rates 40000,60000,80000 --halvings 2",
    "ingest --soak 60 --rate 20000",
    peers=("ingest_logs,ingest_logs-x2,rsyslog,rsyslog-defaults", "contestants; x2: two receivers"),
    rates=("5000,10000,20000,30000,45000,60000,80000,100000,130000", "events/s, the ladder"),
    halvings=(3, "steps between the last good and the first bad rate"),
    seconds=(10, "of sending in a step"),
    repeat=(1, "searches of each contestant"),
    options=("", "more options of ingest_logs.py, as in --options=--batch=2000"),
    soak=(None, "instead: so many seconds at --rate; is each event there once, in time, with its metadata?"),
    rate=(20_000, "events/s of --soak"),
)
def ingest(args: argparse.Namespace) -> list[Row]:
    from bench import ingest as bench_ingest

    return bench_ingest.run(args)


@command(
    "trades of ten simulated exchanges into Kafka, against cryptofeed: the highest rate without growing lag, ms, CPU",
    "market",
    "market --peers market_pipeline,cryptofeed --rates 1000,2000,4000 --halvings 2",
    "market --soak 60 --rate 15000",
    peers=(
        "market_pipeline,market_pipeline-7,cryptofeed,cryptofeed-batched",
        "contestants; -7: the exchanges of the next",
    ),
    rates=("5000,10000,15000,20000,30000,40000", "trades/s of all exchanges together, the ladder"),
    halvings=(1, "steps between the last good and the first bad rate"),
    seconds=(7, "of trading in a step"),
    repeat=(1, "searches of each contestant"),
    kafka=("", "HOST:PORT of a broker; default: the one for development, a fresh one for each step"),
    options=("", "more options of market_pipeline.py, as in --options=--workers=2"),
    soak=(None, "instead: so many seconds at --rate; is each trade there once and in time, is memory flat?"),
    rate=(15_000, "trades/s of --soak"),
)
def market(args: argparse.Namespace) -> list[Row]:
    from bench import market as bench_market

    return bench_market.run(args)


@command(
    "whole crawls under a simulated clock, every step checked: makespan against what no schedule can beat",
    "simulate --urls 1000000 --hosts 10000 --seed 1",
    "simulate --seeds 1000",
    urls=(1_000_000, "URLs"),
    hosts=(10_000, "hosts, of sizes by Zipf's law"),
    seed=(1, "of all randomness; the first of --seeds"),
    seeds=(None, "instead: so many small crawls with robots, redirects, pauses, links"),
    concurrency=(64, "workers"),
    shared=(False, "with --seeds: crawls by up to 16 workers over a model of PostgreSQL's tables"),
)
def simulate(args: argparse.Namespace) -> list[Row]:
    from simulator import crawls as simulator

    results = simulator.run(args)
    print(table(results))
    return results


@command(
    "the tables of a shared crawl: what a claim takes at 1 and 10 million URLs, and what 1 to 8 workers get done",
    "frontier",
    "frontier --rows 100000 --hosts 10000 --seconds 1",
    rows=(10_000_000, "URLs that wait; first a tenth of them"),
    hosts=(100_000, "hosts"),
    seconds=(5, "of each run of the workers"),
    claims=(300, "claims timed"),
)
def frontier(args: argparse.Namespace) -> list[Row]:
    from bench import frontier as bench_frontier

    results = bench_frontier.run(args)
    for columns in dict.fromkeys(tuple(row) for row in results):
        print(table(row for row in results if tuple(row) == columns), end="\n\n")
    return results


@command(
    "draw the plots anew from the figures in --out, without measuring",
    "plot --out bench",
    "plot crawl models --out bench",
    NAMES=((), "as in NAME.json; default: all that are there"),
)
def plot(args: argparse.Namespace) -> list[Row]:
    if not present("matplotlib"):
        raise SystemExit(1)
    from bench import plot as bench_plot

    files = [Path(args.out, f"{name}.json") for name in args.NAMES] or sorted(Path(args.out).glob("*.json"))
    for file in files:
        try:
            drawn = bench_plot.draw(json.loads(file.read_text()), file.parent)
        except (OSError, ValueError) as error:
            raise SystemExit(f"bench: plot: {file}: {error}") from None
        print(*(map(str, drawn) if drawn else [f"{file}: nothing to draw"]), sep="\n")
    return []


# -------------------------------------------------------------------------------------------------- command line

LATEST = HERE / "bench" / "latest"
VARIANTS = ["scale", "soak", "shared", "seeds", "only"]
"""Options that make something else of a subcommand: its files have a name of their own."""


def describe_commit() -> str | None:
    """What git calls the state of these files; None without git, or outside of a clone."""

    def git(*words: str) -> str:
        words = ("git", "-C", str(HERE), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("describe", "--always") + "-dirty" * bool(changed)
    return None


def keep(args: argparse.Namespace, argv: Sequence[str], whole: dict[str, Any]) -> None:
    """Write the figures, and their plot if matplotlib is there, as the command line says."""
    name = "-".join((args.command, *(word for word in VARIANTS if getattr(args, word, None))))
    whole = {"name": name, "command": shlex.join(("python", "-m", "bench", *argv))} | whole
    text = json.dumps(whole, indent=1) + "\n"
    if args.json:
        Path(args.json).write_text(text)
    elif not args.no_files:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(text)
        drawn = []
        if present("matplotlib"):
            from bench import plot as bench_plot

            drawn = bench_plot.draw(json.loads(text), folder)
        print("\nwritten:", *(os.path.relpath(file) for file in (folder / f"{name}.json", *drawn)))


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def make_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    listing = "\n".join(f"  {name:12} {command.about}" for name, command in COMMANDS.items())
    examples = "\n".join(f"  python -m bench {command.examples[0]}" for command in COMMANDS.values())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        formatter_class=form,
        description=f"Side-by-side measurements, in one run, as ratios.\n\ncommands:\n{listing}",
        epilog=f"examples:\n{examples}\n  python -m bench crawl --help\n\n"
        "The peers: pip install -r requirements-bench.txt; nginx, which serves the pages: from the system's packages.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    for name, command in COMMANDS.items():
        examples = "examples:\n" + "\n".join(f"  python -m bench {example}" for example in command.examples)
        sub = commands.add_parser(name, description=command.about, epilog=examples, formatter_class=form)
        for option, (default, about) in command.options.items():
            if option.isupper():
                sub.add_argument(option, nargs="*" if default == () else "?", default=default, help=about)
            elif isinstance(default, OrNone):
                about += f" (without a number: {default.value})"
                sub.add_argument(f"--{option}", nargs="?", type=positive, const=default.value, metavar="N", help=about)
            elif default is False:
                sub.add_argument("--" + option.replace("_", "-"), action="store_true", help=about)
            else:
                kind = positive if default is None or isinstance(default, int) else type(default)
                about += "" if default is None else f" (default {default})"
                flag = "--" + option.replace("_", "-")
                sub.add_argument(flag, type=kind, default=default, help=about, metavar="X" if kind is str else "N")
        about = (
            "where NAME.json, with machine and versions, and the plots are; default: bench/latest, which git ignores;"
        )
        about += " the published ones are in bench"
        sub.add_argument("--out", metavar="DIR", default=LATEST, type=Path, help=about)
        if name != "plot":
            sub.add_argument("--no-files", action="store_true", help="print the table only")
            sub.add_argument("--json", metavar="FILE", help="write the figures there, and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["_peer"]:
        PEERS[argv[1]](argv[2], argv[3], int(argv[4]))
        return 0
    if argv[:1] == ["_site"]:
        write_site(argv[1], argv[2], *map(int, argv[3:]))
        return 0
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "plot":
        plot(args)
        return 0
    options = {name: value for name, value in vars(args).items() if name not in ("out", "no_files", "json")}
    whole: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": describe_commit()}
    whole |= {"options": options, "machine": describe_machine()}
    keep(args, argv, whole | {"results": COMMANDS[args.command].run(args)})
    return 0
