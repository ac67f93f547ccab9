"""What a crawl counts: rows, errors, statuses, retries. Safe for threads; ``Stats._lock`` guards the counts."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from coordination import Clock, new_lock
from crawl.model import ScrapeResult

COUNTED = ("retries", "redirects", "pauses", "robots", "sitemaps", "sitemap_errors", "unchanged")  # by ``Stats.count``


class Stats:
    """What a run has done so far."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._lock = new_lock("Stats")
        self._clock = clock
        self.started = clock()
        self.rows = self.ok = self.bytes = self.retries = self.redirects = self.pauses = 0
        self.robots = self.sitemaps = self.sitemap_errors = self.unchanged = 0
        self.errors: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.processes: dict[str, Any] = {}  # what --stats tells besides, at the end, if there were helpers

    def count(self, **what: int) -> None:
        """Add to these counts."""
        with self._lock:
            for name, n in what.items():
                setattr(self, name, getattr(self, name) + n)

    def count_row(self, row: ScrapeResult) -> None:
        """Count a row: its status, kind of error, size."""
        with self._lock:
            self.rows += 1
            self.bytes += row.bytes
            if row.status is not None:
                self.statuses[row.status] += 1
            if row.error is None:
                self.ok += 1
            else:
                self.errors[row.error.partition(":")[0]] += 1

    def snapshot(self) -> dict[str, Any]:
        """The counts as JSON-able values; ``seconds`` since the start."""
        with self._lock:
            seconds = max(1e-9, self._clock() - self.started)
            return {
                "rows": self.rows,
                "ok": self.ok,
                "failed": self.rows - self.ok,
                "errors": dict(self.errors.most_common()),
                "statuses": {str(status): n for status, n in sorted(self.statuses.items())},
                **{name: getattr(self, name) for name in COUNTED},
                "bytes": self.bytes,
                "seconds": round(seconds, 3),
                "rows_per_second": round(self.rows / seconds, 1),
            }
