"""What ``market_pipeline.py`` shows of itself: the counts, a live table, ``/metrics`` and ``/health``.

``Snapshot``   the counts of one moment. ``imbalance`` is 0 in every one of them:
               trades + dead letters = taken by the publisher + waiting + given up,
               taken + recovered = published + held + spooled + dropped + lost,
               for the analytics = computed + not computed + skipped + queued.
``Screen``     the table on a terminal, below the log's lines. A thread draws it, ``serving.Stderr`` writes it.
``serve``      signals, ``/metrics`` and ``/health``, the table, around a ``Program``.

Where what runs: all in one event loop, but for the drawing. A snapshot is immutable, and so needs no lock.
"""

from __future__ import annotations

import asyncio
import math
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from coordination import Clock
from market.kafka import Counts
from market.stats import ALL, AnalyticsRow
from market.trade import Trade
from runtime.packages import missing
from runtime.serving import http, show_status, stopped_by_signals

EVERY = 0.5
"""Seconds between two drawings."""
MOST_SYMBOLS, MOST_ROWS = 500, 12
"""Symbols in a snapshot, and on the screen."""
NOTHING = Counts(0, 0, 0, 0, 0, 0, 0)
PRICES = 30
"""Of a symbol's last seconds, for its line."""
SPARKS = "▁▂▃▄▅▆▇█"

# ------------------------------------------------------------------------------------------------------ snapshots


class FeedLine(NamedTuple):
    """An exchange."""

    state: str
    trades: int
    bad: int
    """Frames that became dead letters."""
    gaps: int
    missed: int
    """Trades that the gaps left out, as far as the numbers tell."""
    duplicates: int
    disorder: int
    reconnects: int
    lag: float | None
    """Seconds from the exchange's time of a trade to ours; None before the first."""
    breaker: str = "closed"
    error: str = ""
    stale: tuple[str, ...] = ()
    """Symbols that are silent while others trade."""


class SymbolLine(NamedTuple):
    """A symbol over all exchanges, as the last row of the analytics has it."""

    last: float
    volatility: float | None
    """Of the middle window."""
    ewma: float | None
    spread: float | None
    trades: int
    """Since the start."""
    trades_per_second: float
    """Over the shortest window."""
    prices: tuple[float, ...] = ()
    """The last ones, a second apart."""


class Snapshot(NamedTuple):
    """Counts since the start; trades, but where it says otherwise."""

    trades: int = 0
    """Parsed (run, replay) or taken from Kafka (analyse)."""
    letters: int = 0
    """Frames, or records, handed over as dead letters."""
    waiting: int = 0
    """Of both: their feeds wait for room."""
    given_up: int = 0
    """Of both: nobody took them before the end."""
    kafka: str = "new"
    published: Counts = NOTHING
    """Trades and dead letters; of ``analyse`` dead letters only."""
    dead: int = 0
    """Records in the topic of dead letters."""
    rows: Counts = NOTHING
    """Of analytics."""
    offered: int = 0
    """For the analytics."""
    computed: int = 0
    uncomputed: int = 0
    """Their job failed or killed its worker, again and again."""
    skipped: int = 0
    """There was no room for them in the queue, or no time at the stop: published, but in no row."""
    queued: int = 0
    late: int = 0
    """Too late for the analytics."""
    repeated: int = 0
    worker_deaths: int = 0
    workers: tuple[int, ...] = ()
    """Their process ids."""
    feeds: Mapping[str, FeedLine] = {}
    symbols: Mapping[str, SymbolLine] = {}
    partitions: tuple[int, ...] | None = None
    """Of ``analyse``."""
    rebalances: int = 0
    commits: int = 0
    loop_lag: float = 0.0
    """Seconds by which the event loop was late; the longest of the last minute."""
    faults: int = 0
    """How often the counts did not balance, or a part failed in a way that nobody had foreseen."""
    lines_lost: int = 0
    """Lines of the log that nobody read."""
    error: str = ""
    """The last one of Kafka's."""
    stopping: bool = False


class Board:
    """The last figures of each symbol."""

    def __init__(self, windows: Sequence[int]) -> None:
        self._shortest, self._middle = windows[0], len(windows) // 2
        self._lines: dict[str, SymbolLine] = {}
        self._prices: dict[str, deque[float]] = {}
        self._seconds: dict[str, int] = {}
        self._trades: Counter[str] = Counter()

    def count(self, trades: Iterable[Trade]) -> None:
        counts = self._trades
        for trade in trades:
            if trade.symbol in counts or len(counts) < MOST_SYMBOLS:
                counts[trade.symbol] += 1

    def take(self, rows: Iterable[AnalyticsRow]) -> None:
        for row in rows:
            symbol = row.symbol
            if row.exchange != ALL or (symbol not in self._lines and len(self._lines) >= MOST_SYMBOLS):
                continue
            prices, second = self._prices.setdefault(symbol, deque(maxlen=PRICES)), row.ts_ns // 1_000_000_000
            if second != self._seconds.get(symbol) or not prices:
                self._seconds[symbol] = second
                prices.append(row.last)
            prices[-1] = row.last
            self._lines[symbol] = SymbolLine(
                *(row.last, row.volatility[self._middle], row.ewma, row.spread, self._trades[symbol]),
                *(row.trades[0] / self._shortest, tuple(prices)),
            )

    def lines(self) -> dict[str, SymbolLine]:
        return dict(sorted(self._lines.items()))


def imbalance(counts: Snapshot) -> int:
    """How many trades or rows are not accounted for; 0, or there is a fault in the program."""
    handed = counts.letters if counts.partitions is not None else counts.trades + counts.letters
    found = abs(handed - counts.published.accepted - counts.waiting - counts.given_up)
    for kind in (counts.published, counts.rows):
        out = kind.published + kind.held + kind.spooled + kind.dropped + kind.lost
        found += abs(kind.accepted + kind.recovered - out)
    return found + abs(counts.offered - counts.computed - counts.uncomputed - counts.skipped - counts.queued)


def lost(counts: Snapshot) -> int:
    """Trades and dead letters that are nowhere."""
    return counts.given_up + counts.published.dropped + counts.published.lost


def last_word(counts: Snapshot) -> str:
    """What became of all that came."""
    out, rows = counts.published, counts.rows
    held = out.held + counts.waiting
    off = imbalance(counts)
    begin = f"trades {counts.trades:,} + dead letters {counts.letters:,}"
    if counts.partitions is not None:
        begin = f"trades taken {counts.trades:,}, computed {counts.computed:,}; dead letters {counts.letters:,}"
    return (
        begin
        + (f" + recovered {out.recovered:,}" if out.recovered else "")
        + f" = published {out.published:,} + left in the spool {out.spooled:,} + lost {lost(counts):,}"
        + (f" + held {held:,}" if held else "")
        + f"; analytics: {rows.published:,} rows"
        + (f", {rows.dropped:,} dropped" if rows.dropped else "")
        + (f", {counts.skipped + counts.uncomputed:,} trades left out" if counts.skipped + counts.uncomputed else "")
        + (f"; THE COUNTS DO NOT BALANCE: {off:,}" if off else "")
    )


def health(counts: Snapshot) -> tuple[int, dict[str, Any]]:
    """The status code and the body of ``/health``. What is away outside is no reason to start the program anew."""
    off, feeds = imbalance(counts), counts.feeds.values()
    if off or counts.faults:
        state = "error"
    elif counts.stopping:
        state = "stopping"
    elif counts.kafka in ("away", "failed") or any(feed.state != "live" for feed in feeds) or counts.published.spooled:
        state = "degraded"
    else:
        state = "ok"
    body = counts._asdict() | {name: getattr(counts, name)._asdict() for name in ("published", "rows")}
    body |= {
        name: {key: line._asdict() for key, line in getattr(counts, name).items()} for name in ("feeds", "symbols")
    }
    return (200 if state in ("ok", "degraded") else 503), {"status": state, "imbalance": off, **body}


# ---------------------------------------------------------------------------------------------------------- metrics


class Exporter(Collector):
    """What ``/metrics`` shows, read from the counts that the parts keep anyway."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        counts = self._snapshot()
        for name, text, value in (
            ("trades", "Trades parsed, or taken from Kafka", counts.trades),
            ("dead_letters", "Frames handed over as dead letters", counts.letters),
            ("given_up", "Trades and dead letters that nobody took before the end", counts.given_up),
            ("published", "Trades and dead letters that Kafka acknowledged", counts.published.published),
            ("recovered", "Trades and dead letters that were in the spool at the start", counts.published.recovered),
            ("lost", "Trades and dead letters that are nowhere", lost(counts)),
            ("rows", "Rows of analytics that Kafka acknowledged", counts.rows.published),
            ("rows_dropped", "Rows of analytics dropped, the oldest", counts.rows.dropped),
            ("computed", "Trades in the analytics", counts.computed),
            ("uncomputed", "Trades whose job failed", counts.uncomputed),
            ("skipped", "Trades published, but not in the analytics for want of room", counts.skipped),
            ("late", "Trades too late for the analytics", counts.late),
            ("repeated", "Trades that the analytics had already", counts.repeated),
            ("worker_deaths", "Workers that died, or were too late", counts.worker_deaths),
            ("rebalances", "Of the consumer group", counts.rebalances),
            ("commits", "Of the consumer group", counts.commits),
            ("faults", "Counts that did not balance, and failures of the program", counts.faults),
            ("lines_lost", "Lines of the log that nobody read", counts.lines_lost),
        ):
            yield CounterMetricFamily(f"market_{name}", text, value)
        for name, text, level in (
            ("waiting", "Trades whose feeds wait for room", counts.waiting),
            ("held", "Trades and dead letters in memory", counts.published.held),
            ("spooled", "Trades and dead letters in the spool", counts.published.spooled),
            ("queued", "Trades that wait to be computed", counts.queued),
            ("imbalance", "Trades not accounted for: 0", imbalance(counts)),
            ("loop_lag_seconds", "Longest of the last minute", counts.loop_lag),
            ("kafka_up", "1 if connected", float(counts.kafka == "connected")),
        ):
            yield GaugeMetricFamily(f"market_{name}", text, level)
        for field in ("trades", "bad", "gaps", "missed", "duplicates", "disorder", "reconnects"):
            family = CounterMetricFamily(f"market_exchange_{field}", f"By exchange: {field}", labels=("exchange",))
            for name, line in counts.feeds.items():
                family.add_metric((name,), getattr(line, field))
            yield family
        text = "Symbols that are silent while others trade"
        stale = GaugeMetricFamily("market_exchange_stale_symbols", text, labels=("exchange",))
        up = GaugeMetricFamily("market_exchange_up", "1 if its trades come", labels=("exchange",))
        lag = GaugeMetricFamily("market_exchange_lag_seconds", "From the exchange's time to ours", labels=("exchange",))
        for name, line in counts.feeds.items():
            stale.add_metric((name,), len(line.stale))
            up.add_metric((name,), float(line.state == "live"))
            if line.lag is not None:
                lag.add_metric((name,), line.lag)
        yield from (up, lag, stale)
        for field in ("last", "volatility", "ewma", "spread", "trades_per_second"):
            gauge = GaugeMetricFamily(f"market_symbol_{field}", f"By symbol: {field}", labels=("symbol",))
            for name, symbol in counts.symbols.items():
                value = getattr(symbol, field)
                gauge.add_metric((name,), math.nan if value is None else value)
            yield gauge


# ------------------------------------------------------------------------------------------------------- the table


def sparkline(prices: Sequence[float]) -> str:
    """A bar for each price, between the least and the greatest."""
    if not prices:
        return ""
    low, high = min(prices), max(prices)
    if high == low:
        return SPARKS[0] * len(prices)
    return "".join(SPARKS[round((price - low) / (high - low) * (len(SPARKS) - 1))] for price in prices)


def number(value: float | None, form: str = ",.2f") -> str:
    return "–" if value is None else format(value, form)


def price(value: float | None) -> str:
    """Six digits at least."""
    return "–" if value is None else f"{value:,.2f}" if value >= 1000 else f"{value:.6g}"


def latency(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:,.0f} ms"


def columns(lines: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """As text, in columns."""
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    right = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(w) if n in right else cell.ljust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def status(counts: Snapshot, rate: float, age: float) -> str:
    """One line on where all stands."""
    out = counts.published
    parts = [
        f"{age:,.0f} s",
        f"trades {counts.trades:,} ({rate:,.0f}/s)",
        f"published {out.published:,}",
        f"held {out.held + counts.waiting:,}",
        f"spool {out.spooled:,}",
        *([f"lost {lost(counts):,}"] if lost(counts) else []),
        f"dead letters {counts.letters:,}",
        f"rows {counts.rows.published:,}",
        *([f"left out {counts.skipped + counts.uncomputed:,}"] if counts.skipped + counts.uncomputed else []),
        *([f"partitions {','.join(map(str, counts.partitions)) or 'none'}"] if counts.partitions is not None else []),
        f"kafka {counts.kafka}",
        *(["stopping"] if counts.stopping else []),
        *([f"FAULTS {counts.faults}"] if counts.faults else []),
    ]
    return " · ".join(parts)


def picture(counts: Snapshot, rate: float, age: float) -> Any:
    """The table, for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for place, column in enumerate(columns):
            made.add_column(column, justify="right" if place and column else "left", no_wrap=True)
        return made

    symbols = table("symbol", "last", "volatility", "ewma", "spread", "trades/s", "")
    for name, line in list(counts.symbols.items())[:MOST_ROWS]:
        cells = (price(line.last), number(line.volatility, ".1%"), number(line.ewma, ".1%"), price(line.spread))
        symbols.add_row(name, *cells, f"{line.trades_per_second:,.1f}", sparkline(line.prices))
    parts: list[Any] = [symbols, ""]
    if counts.feeds:
        feeds = table("exchange", "state", "trades", "lag", "gaps", "repeated", "bad", "reconnects", "")
        for name, feed in counts.feeds.items():
            style = {"live": "green", "connecting": "yellow"}.get(feed.state, "red")
            told = (f"{feed.trades:,}", latency(feed.lag), f"{feed.gaps:,}", f"{feed.duplicates:,}", f"{feed.bad:,}")
            silent = f"silent: {' '.join(feed.stale)}" if feed.stale else ""
            error = Text((feed.error if feed.state != "live" else silent)[:40], "dim")
            feeds.add_row(name, Text(feed.state, style), *told, str(feed.reconnects), error)
        parts += [feeds, ""]
    return Group(*parts, Text(status(counts, rate, age), no_wrap=True, overflow="ellipsis"))


class Screen:
    """The table of what ``look`` sees, while it is entered; the last one is left standing."""

    def __init__(self, snapshot: Callable[[], Snapshot], *, clock: Clock = time.monotonic) -> None:
        self._snapshot, self._clock = snapshot, clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=round(5 / EVERY))
        self._began = clock()
        self._shown = self._taken()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="screen", daemon=True)

    def _taken(self) -> tuple[Snapshot, float, float]:
        counts, now = self._snapshot(), self._clock()
        self._seen.append((now, counts.trades))
        then, before = self._seen[0]
        rate = (counts.trades - before) / (now - then) if now > then else 0.0
        return counts, rate, now - self._began

    async def look(self) -> None:
        """In the loop: take a snapshot now and then."""
        while True:
            await asyncio.sleep(EVERY)
            self._shown = self._taken()

    def _show(self) -> None:
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        while not self._over.wait(EVERY):
            if not console.is_dumb_terminal:
                with console.capture() as drawn:
                    console.print(picture(*self._shown))
                show_status("\n".join(drawn.get().splitlines()[: console.height - 1]))
        show_status("")
        console.print(picture(*self._shown))  # the last one stays

    def __enter__(self) -> Screen:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown = self._taken()
        self._over.set()
        self._thread.join(2.0)


# ---------------------------------------------------------------------------------------------- around a program


class Program(Protocol):
    async def run(self) -> int:
        """Until it has stopped; the exit code."""

    def stop(self) -> None:
        """The first call: stop and drain. The second: at once."""

    def snapshot(self) -> Snapshot: ...


async def serve(program: Program, http_sock: socket.socket | None) -> int:
    """Run ``program``: SIGINT and SIGTERM stop it, the second forces. Returns the exit code."""
    with stopped_by_signals(program.stop):
        async with http(http_sock, Exporter(program.snapshot), lambda: health(program.snapshot())):
            if not sys.stderr.isatty() or missing("the table", "rich"):
                return await program.run()
            with Screen(program.snapshot) as screen:
                looking = asyncio.create_task(screen.look(), name="screen")
                try:
                    return await program.run()
                finally:
                    looking.cancel()
                    await asyncio.gather(looking, return_exceptions=True)
