"""What every measurement is made of: figures and their tables, children and what they took, the pages' server.

* **A figure** is a `Spread`: the median of some repetitions, with the smallest and the largest beside it.
* **A child** is a process of its own, timed from its start to its end; CPU time and peak memory are what the system
  kept for it (wait4). Linux starts a child's peak at its parent's, so the process that measures stays small: this room
  imports the standard library at its heads, and all else where it is used.
* **A command** is a function with `@command`, named as the user calls it; the runner finds it in any file of the room.

Promised: all traffic stays on 127.0.0.0/8; every child is ended, by its id, when its block is left or after
`CHILD_LIMIT` seconds. This file is below all others of the room, and imports none of them. The only threads are the
timers that end children; there are no locks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parents[1]
"""The project's folder."""
CHILD_LIMIT = 3600.0
"""Seconds after which a child is ended."""
Row = dict[str, Any]
"""A line of a table, and of the JSON: what a column is called, to text, a number, a `Spread`, or None."""

NEEDS = {
    "textbook": "html",
    "textbook_async": "aiohttp",
    "textbook_threads": "html",
    "scrapy_stripped": "scrapy",
    "cryptofeed-batched": "cryptofeed",
}
"""The module that a contestant cannot do without, where it is not named like it."""

# ------------------------------------------------------------------------------------------------------ commands

Runner = Callable[[argparse.Namespace], list[Row]]


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


def require(name: str, *modules: str) -> None:
    """SystemExit with one line if something is not installed without which the command cannot run."""
    from runtime.options import missing

    if line := missing(name, *modules):
        raise SystemExit(f"bench: {line}")


DRIVERS = ("crawl_async.py", "crawl_threads.py")
DRIVER = ("both", f"{', '.join(DRIVERS)} or both")


def drivers(choice: str) -> Sequence[str]:
    return DRIVERS if choice == "both" else [choice] * known(choice, DRIVERS)


# -------------------------------------------------------------------------------------------- figures and tables


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


def interleaved(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Every name once a round, each round beginning with another."""
    names = list(names)
    for number in range(rounds):
        start = number % max(1, len(names))
        for name in (*names[start:], *names[:start]):
            yield number, name


# ------------------------------------------------------------------------------------------------------ children


def module(name: str) -> list[object]:
    """The command line that runs a module of this project, whatever the current folder."""
    run = f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"  # its own processes must find it, too
    return [sys.executable, "-P", "-c", f"import runpy, sys; sys.path.insert(0, {str(HERE)!r}); {run}"]


def note(text: str) -> None:
    """What is going on, to stderr: the tables are the output."""
    print(text, file=sys.stderr, flush=True)


def find_program(name: str) -> str | None:
    """Where it is, also outside of a user's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


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


# --------------------------------------------------------------------------------------------------------- nginx

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


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """On all addresses, and below those that connections get, so that none takes it before its server does."""
    while True:
        with socket.socket(socket.AF_INET, kind) as probe, contextlib.suppress(OSError):
            probe.bind(("", port := secrets.choice(range(27_000, 32_768))))
            return port


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
