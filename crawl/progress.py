"""What a run tells of itself: a line for people, the counts of --stats as JSON, and those for Prometheus.

All of it is read from ``Crawl.stats`` and ``Crawl.frontier.stats()``, each a consistent snapshot. Threads: the display
on a terminal has one, the metrics server has one; the crawl waits for neither.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import stat
import textwrap
from dataclasses import asdict
from types import SimpleNamespace
from typing import TextIO

from crawl.core import Crawl
from crawl.output import peak_memory_mb
from runtime.monitor import Exporter, counter, gauge, http_in_thread
from runtime.stderr import status_shown, terminal_size


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``5 min``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"


def describe(crawl: Crawl) -> str:
    """One line on where the run stands."""
    stats, frontier = crawl.stats.snapshot(), crawl.frontier.stats()
    left = f"{frontier.waiting:,} waiting on {frontier.hosts:,} hosts" if frontier.waiting else "none waiting"
    errors = ", ".join(f"{kind} {n:,}" for kind, n in list(stats["errors"].items())[:4])
    timed = frontier.waiting and stats["rows_per_second"] and not crawl.follows and not crawl.interrupted
    return (
        f"{stats['rows']:,} rows, {stats['rows_per_second']:,.0f}/s, {stats['ok']:,} ok, {stats['failed']:,} failed"
        + (f" ({errors})" if errors else "")
        + (f", {stats['unchanged']:,} feeds unchanged" if stats["unchanged"] else "")
        + (
            f", {bad:,} of {stats['sitemaps']:,} sitemaps not read to the end"
            if (bad := stats["sitemap_errors"])
            else ""
        )
        + f" · {frontier.in_flight:,} in flight, {left}"
        + (f", {frontier.hosts_blocked:,} hosts wait for robots.txt" if frontier.hosts_blocked else "")
        + (f", about {duration(frontier.waiting / stats['rows_per_second'])} left" if timed else "")
    )


def progress(crawl: Crawl, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Show how the crawl goes on, on a terminal, while it is entered, if that is ``wanted``."""

    def picture() -> str:
        return textwrap.fill(describe(crawl), terminal_size().columns - 1)

    return status_shown(picture, 0.25) if wanted else contextlib.nullcontext()


def write_stats(crawl: Crawl, file: TextIO) -> None:
    """Write the counts of the run as JSON."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    frontier = crawl.frontier.stats()
    counts = (
        crawl.stats.snapshot()
        | {
            "duplicates": frontier.duplicates,
            "seen": frontier.seen,
            "capped": frontier.capped,
            "forbidden": frontier.forbidden,
            "not_fetched": frontier.waiting,
            "interrupted": crawl.interrupted,
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
            "peak_memory_mb": peak_memory_mb(),
        }
        | crawl.stats.processes
    )
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.truncate(0)
    file.write(json.dumps(counts, indent=2) + "\n")
    file.flush()


METRICS = (
    *(
        counter(f"crawl_{name}", f"As in --stats: {name}")
        for name in (
            *("rows", "ok", "retries", "redirects", "pauses", "bytes", "robots", "sitemaps", "sitemap_errors"),
            *("unchanged", "duplicates", "capped", "forbidden"),
        )
    ),
    counter("crawl_errors", "Rows by kind", "errors", "kind"),
    counter("crawl_statuses", "Rows by status", "statuses", "status"),
    *(
        gauge(f"crawl_{name}", f"In the frontier: {name}")
        for name in ("waiting", "in_flight", "hosts", "hosts_ready", "hosts_blocked", "seen")
    ),
    gauge("crawl_loop_lag_seconds", "Longest of the last minute", "loop_lag"),
)


def serve_metrics(crawl: Crawl, port: int) -> contextlib.AbstractContextManager[None]:
    """Serve the run's counts to Prometheus on 127.0.0.1, from a thread, while it is entered. ``OSError``."""
    if not 0 <= port < 65_536:
        raise OSError(errno.EINVAL, "0 to 65535")  # ``create_server`` would not close its socket

    def counts() -> SimpleNamespace:
        lag = max(tuple(crawl.loop_lags), default=None)
        return SimpleNamespace(**crawl.stats.snapshot(), **asdict(crawl.frontier.stats()), loop_lag=lag)

    return http_in_thread(socket.create_server(("127.0.0.1", port)), Exporter(METRICS, counts))
