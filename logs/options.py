"""What ``ingest_logs.py`` was told on its command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from logs.event_queue import Policy
from runtime.embedded import Embedded

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class IngestOptions:
    """As on the command line. Seconds and bytes."""

    listen: str = "0.0.0.0:5514"
    metadata: str | None = None
    database: str | None = None
    receivers: int = 1
    receive_buffer: int = 32 << 20
    allow: tuple[str, ...] = ()
    enrich_wait: float = 0.5
    batch: int = 1000
    flush: float = 5.0
    queue: int = 100_000
    overload: Policy = "drop-newest"
    spool: str = str(DATA / "spool")
    spool_bytes: int = 1 << 30
    fsync: float = 1.0
    durable: bool = False
    retain: int | None = None
    stop_limit: float = 10.0
    http: str | None = None
    zone: str = "UTC"


def database_of(options: IngestOptions) -> str | Embedded | None:
    """The URL, or an embedded server."""
    return Embedded(DATA / "postgres") if options.database == "embedded" else options.database
