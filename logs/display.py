"""What ``ingest_logs.py`` shows of itself: the counts and their equation, a status line, ``/metrics``, ``/health``.

``LogCounts`` are the counts of one worker, or the sums of all. ``imbalance`` is 0 in every one of them:
received + recovered = stored + dead + dropped + held + handed on.

The counts of a dead worker are those of its last line, a moment old: what it received after that is in no count. What
it held in memory is dropped (``worker died``); what it held on disk is ``handed on``: the next one counts it as
recovered. All here is pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

from runtime.monitor import counter, counters, gauge, health_of
from runtime.stderr import terminal_size


class LogCounts(NamedTuple):
    """What a worker counted since it began; events, but where it says otherwise. More of them is in ``METRICS``."""

    received: Annotated[int, "Events received"] = 0
    recovered: Annotated[int, "Events that were in the spool at the start"] = 0
    stored: Annotated[int, "Events in the table logs"] = 0
    dead: Annotated[int, "Events in the table dead_letter"] = 0
    dropped: Mapping[str, int] = {}
    held: Mapping[str, int] = {}  # by place: queue, sealing, sealed, writing, spooling, spool
    handed: Annotated[int, "Events in the spool of workers that died; counted as recovered by the next"] = 0
    datagrams: Annotated[int, "Datagrams read"] = 0
    bytes: Annotated[int, "Bytes read"] = 0
    refused: Annotated[int, "Datagrams from addresses that are not allowed"] = 0
    kernel_drops: Annotated[int, "Datagrams that found the socket's buffer full"] = 0
    missing: Annotated[int, "Rows that were stored before their metadata were known"] = 0
    filled: Annotated[int, "Rows whose metadata came later"] = 0
    spool_bytes: int = 0
    spool_refused: Annotated[int, "Batches for which the spool had no room"] = 0
    lag: float = 0.0  # seconds from the receipt of a batch's oldest event to its commit: the longest of the last ones
    loop_lag: float = 0.0  # seconds by which the event loop was late; the longest of the last minute
    database: str = "none"
    metadata: str = "none"  # the state of the API's circuit
    metadata_loads: Annotated[int, "Requests to the metadata API"] = 0
    metadata_failures: Annotated[int, "Loads of metadata that failed"] = 0
    faults: Annotated[int, "Counts that did not balance, and failures of the program"] = 0
    lines_lost: Annotated[int, "Lines of the log that nobody read"] = 0
    workers: int = 1
    deaths: Annotated[int, "Workers that died"] = 0
    stopping: bool = False


LARGEST = {"lag", "loop_lag"}
WORST = {
    "database": ("down", "refusing", "connecting", "none", "connected"),
    "metadata": ("open", "half_open", "closed", "none"),
}


def imbalance(counts: LogCounts) -> int:
    """How many events more came in than are accounted for; 0, or there is a fault in the program."""
    out = counts.stored + counts.dead + sum(counts.dropped.values()) + sum(counts.held.values()) + counts.handed
    return counts.received + counts.recovered - out


def _open_share(counts: LogCounts) -> float:
    return {"half_open": 0.5, "open": 1.0}.get(counts.metadata, 0.0)


METRICS = (
    *counters("ingest", LogCounts),
    counter("ingest_dropped", "Events dropped, by cause", "dropped", "cause"),
    gauge("ingest_held", "Events held, by place", "held", "place"),
    gauge("ingest_imbalance", "Events not accounted for: 0", imbalance),
    gauge("ingest_spool_bytes", "Bytes in the spool"),
    gauge("ingest_lag_seconds", "From receipt to commit, longest of the last batches", "lag"),
    gauge("ingest_loop_lag_seconds", "Longest of the last minute", "loop_lag"),
    gauge("ingest_database_up", "1 if connected", lambda counts: float(counts.database == "connected")),
    gauge("ingest_metadata_circuit_open", "0 closed, 0.5 half-open, 1 open", _open_share),
    gauge("ingest_workers", "Workers that run"),
)


def add_up(snapshots: Iterable[LogCounts]) -> LogCounts:
    """The sums; of the lags the longest, of the states the worst."""
    every = list(snapshots)
    if not every:
        return LogCounts(workers=0)
    sums: dict[str, Any] = {}
    for name, values in zip(LogCounts._fields, zip(*every, strict=True), strict=True):
        if isinstance(values[0], Mapping):
            total: Counter[str] = Counter()
            for value in values:
                total.update(value)
            sums[name] = dict(total)
        elif name in WORST:
            sums[name] = min(values, key=WORST[name].index)
        elif name == "stopping":
            sums[name] = any(values)
        else:
            sums[name] = max(values) if name in LARGEST else sum(values)
    return LogCounts(**sums)


def counts_after_death(last: LogCounts) -> LogCounts:
    """What remains of the counts of a worker that died."""
    spooled = last.held.get("spool", 0)
    lost = sum(last.held.values()) - spooled
    dropped = dict(last.dropped)
    if lost:
        dropped["worker died"] = dropped.get("worker died", 0) + lost
    handed = last.handed + spooled
    gone: dict[str, Any] = dict.fromkeys(("spool_bytes", "workers", "lag", "loop_lag"), 0)
    gone |= {name: ranks[-1] for name, ranks in WORST.items()}
    return last._replace(dropped=dropped, held={}, handed=handed, deaths=last.deaths + 1, stopping=False, **gone)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def status(counts: LogCounts, before: LogCounts, seconds: float, age: float) -> str:
    """One line on where all stands; ``before`` is the snapshot of ``seconds`` ago."""

    def rate(name: str) -> str:
        return f"{(getattr(counts, name) - getattr(before, name)) / max(seconds, 1e-9):,.0f}/s"

    dropped, held = sum(counts.dropped.values()), dict(counts.held)
    spool = held.pop("spool", 0)
    parts = [
        f"{age:,.0f} s",
        f"received {counts.received:,} ({rate('received')})",
        f"stored {counts.stored:,} ({rate('stored')})",
        f"queue {sum(held.values()):,}",
        f"dropped {dropped:,}" + (f" ({_listed(counts.dropped)})" if dropped else ""),
        *([f"kernel dropped {counts.kernel_drops:,}"] if counts.kernel_drops else []),
        *([f"dead {counts.dead:,}"] if counts.dead else []),
        f"spool {spool:,}",
        f"lag {counts.lag:.1f} s",
        *([f"database {counts.database}"] if counts.database != "connected" else []),
        *([f"metadata {counts.metadata}"] if counts.metadata not in ("closed", "none") else []),
        *(["stopping"] if counts.stopping else []),
        *([f"FAULTS {counts.faults}"] if counts.faults else []),
    ]
    return " · ".join(parts)


def draw(*seen: Any) -> str:
    """``status``, in a line of the terminal."""
    return status(*seen)[: terminal_size().columns - 1]


def last_word(counts: LogCounts) -> str:
    """What became of all that came."""
    lost, left = counts.dropped, dict(counts.held)
    spooled = left.pop("spool", 0)
    return (
        f"received {counts.received:,}"
        + (f" + recovered {counts.recovered:,}" if counts.recovered else "")
        + f" = stored {counts.stored:,} + dead {counts.dead:,} + dropped {sum(lost.values()):,}"
        + (f" ({_listed(lost)})" if any(lost.values()) else "")
        + f" + left in the spool {spooled:,}"
        + (f" + handed on {counts.handed:,}" if counts.handed else "")
        + (f" + held {sum(left.values()):,} ({_listed(left)})" if any(left.values()) else "")
        + (f"; the kernel dropped {counts.kernel_drops:,} datagrams" if counts.kernel_drops else "")
        + (f"; {counts.refused:,} datagrams came from addresses that are not allowed" if counts.refused else "")
        + (f"; THE COUNTS DO NOT BALANCE: {imbalance(counts):,}" if imbalance(counts) else "")
    )


def health(counts: LogCounts, workers: int) -> tuple[int, dict[str, Any]]:
    """The status code and the body of ``/health``, of a program of so many workers."""
    away = counts.database != "connected" or counts.metadata not in ("closed", "none")
    return health_of(counts, imbalance(counts), away or counts.workers < workers)
