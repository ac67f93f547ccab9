"""What ``market_pipeline.py`` shows of itself: the counts, a live table, ``/metrics`` and ``/health``.

``MarketCounts``   those of one moment. ``imbalance`` is 0 in every one of them:
                   trades + dead letters + events = taken by the publisher + waiting + given up,
                   taken + recovered = published + held + spooled + dropped + lost,
                   for the analytics = computed + not computed + skipped + queued.

All here is pure.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, NamedTuple

from market.kafka import Counts
from market.stats import ALL, AnalyticsRow
from market.trade import Trade, short
from runtime.monitor import Measure, counter, counters, gauge, health_of

MOST_SYMBOLS, MOST_ROWS = 500, 12  # symbols in a snapshot, and on the screen
NOTHING = Counts(0, 0, 0, 0, 0, 0, 0)
PRICES = 30  # of a symbol's last seconds, for its line
SPARKS = "▁▂▃▄▅▆▇█"
LEAST = 12  # characters that a table's last column keeps while others give way
STYLES = {"live": "green", "connecting": "yellow"} | dict.fromkeys(
    ("idle", "subscribing", "closing", "waiting", "refused", "stopped"), "red"
)


class FeedLine(NamedTuple):
    """An exchange."""

    state: str
    trades: int
    bad: int  # frames that became dead letters
    gaps: int
    missed: int  # trades that the gaps left out, as far as the numbers tell
    duplicates: int
    disorder: int
    reconnects: int
    lag: float | None  # seconds from the exchange's time of a trade to ours; None before the first
    breaker: str = "closed"
    error: str = ""
    stale: tuple[str, ...] = ()  # symbols that are silent while others trade


class SymbolLine(NamedTuple):
    """A symbol over all exchanges, as the last row of the analytics has it."""

    last: float
    volatility: float | None  # of the middle window
    ewma: float | None
    spread: float | None
    trades: int  # since the start
    trades_per_second: float  # over the shortest window
    prices: tuple[float, ...] = ()  # the last ones, a second apart


class MarketCounts(NamedTuple):
    """Counts since the start; trades, but where it says otherwise."""

    trades: Annotated[int, "Trades parsed, or taken from Kafka"] = 0
    letters: int = 0  # frames, or records, handed over as dead letters
    events: Annotated[int, "Gaps, lost and new connections, back-fills, by symbol"] = 0
    waiting: int = 0  # of all three: their feeds wait for room
    given_up: Annotated[int, "Trades and dead letters that nobody took before the end"] = 0
    kafka: str = "new"
    published: Counts = NOTHING  # trades, events and dead letters; of ``analyse`` dead letters only
    dead: int = 0  # records in the topic of dead letters
    rows: Counts = NOTHING  # of analytics
    offered: int = 0  # for the analytics
    computed: Annotated[int, "Trades in the analytics"] = 0
    uncomputed: Annotated[int, "Trades whose job failed"] = 0
    skipped: Annotated[int, "Trades published, but not in the analytics for want of room"] = 0
    queued: int = 0
    late: Annotated[int, "Trades too late for the analytics"] = 0
    repeated: Annotated[int, "Trades that the analytics had already"] = 0
    worker_deaths: Annotated[int, "Workers that died, or were too late"] = 0
    workers: tuple[int, ...] = ()  # their process ids
    feeds: Mapping[str, FeedLine] = {}
    symbols: Mapping[str, SymbolLine] = {}
    partitions: tuple[int, ...] | None = None  # of ``analyse``
    silent: float = 0.0  # seconds for which no partition answered, or the group forms
    rebalances: Annotated[int, "Of the consumer group"] = 0
    commits: Annotated[int, "Of the consumer group"] = 0
    loop_lag: float = 0.0  # seconds by which the event loop was late; the longest of the last minute
    faults: Annotated[int, "Counts that did not balance, and failures of the program"] = 0
    lines_lost: Annotated[int, "Lines of the log that nobody read"] = 0
    error: str = ""  # the last one of Kafka's
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
        """Add trades to those of their symbols."""
        counts = self._trades
        for trade in trades:
            if trade.symbol in counts or len(counts) < MOST_SYMBOLS:
                counts[trade.symbol] += 1

    def take(self, rows: Iterable[AnalyticsRow]) -> None:
        """Show the newest rows over all exchanges."""
        for row in rows:
            symbol, second = row.symbol, row.ts_event // 1_000_000_000
            if row.exchange != ALL or (symbol not in self._lines and len(self._lines) >= MOST_SYMBOLS):
                continue
            prices = self._prices.setdefault(symbol, deque(maxlen=PRICES))
            if second != self._seconds.get(symbol):
                self._seconds[symbol] = second
                prices.append(row.last)
            prices[-1] = row.last
            self._lines[symbol] = SymbolLine(
                *(row.last, row.volatility[self._middle], row.ewma, row.spread, self._trades[symbol]),
                *(row.trades[0] / self._shortest, tuple(prices)),
            )

    def lines(self) -> dict[str, SymbolLine]:
        """By symbol, in their order."""
        return dict(sorted(self._lines.items()))


def imbalance(counts: MarketCounts) -> int:
    """How many trades or rows are not accounted for; 0, or there is a fault in the program."""
    handed = counts.letters + counts.events + (counts.trades if counts.partitions is None else 0)
    found = abs(handed - counts.published.accepted - counts.waiting - counts.given_up)
    for kind in (counts.published, counts.rows):
        out = kind.published + kind.held + kind.spooled + kind.dropped + kind.lost
        found += abs(kind.accepted + kind.recovered - out)
    return found + abs(counts.offered - counts.computed - counts.uncomputed - counts.skipped - counts.queued)


def lost(counts: MarketCounts) -> int:
    """Trades and dead letters that are nowhere."""
    return counts.given_up + counts.published.dropped + counts.published.lost


def last_word(counts: MarketCounts) -> str:
    """What became of all that came."""
    out, rows = counts.published, counts.rows
    held = out.held + counts.waiting
    off = imbalance(counts)
    begin = f"trades {counts.trades:,} + dead letters {counts.letters:,}"
    if counts.partitions is not None:
        begin = f"trades taken {counts.trades:,}, computed {counts.computed:,}; dead letters {counts.letters:,}"
    begin += f" + events {counts.events:,}" if counts.events else ""
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


SILENT = 30.0  # seconds without an answer from a partition, after which a member of the group is not well


def health(counts: MarketCounts) -> tuple[int, dict[str, Any]]:
    """The status code and the body of ``/health``. A feed that is away is degraded itself; all is, if no feed lives."""
    body: dict[str, Any] = {name: getattr(counts, name)._asdict() for name in ("published", "rows")}
    body["symbols"] = {name: line._asdict() for name, line in counts.symbols.items()}
    body["feeds"] = {
        name: {"status": "ok" if line.state == "live" else "degraded", **line._asdict()}
        for name, line in counts.feeds.items()
    }
    body["degraded_feeds"] = away = [name for name, line in counts.feeds.items() if line.state != "live"]
    degraded = counts.kafka == "away" or counts.silent > SILENT or counts.published.spooled > 0
    return health_of(counts, imbalance(counts), degraded or 0 < len(counts.feeds) == len(away), **body)


class StateChanges:
    """What has changed in the states of feeds, Kafka and spool since somebody asked, as one line for the log."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {"spool": "empty"}

    def line(self, counts: MarketCounts) -> str:
        """Empty if nothing changed. What is on its way to be live or connected keeps its state until it is."""
        known = {"live": "live", "waiting": "away", "refused": "away", "connected": "connected", "away": "away"}
        states = {name: known.get(line.state, "") for name, line in counts.feeds.items()}
        states |= {"kafka": known.get(counts.kafka, ""), "spool": "in use" if counts.published.spooled else "empty"}
        changed = dict[tuple[str, str], list[str]]()
        for name, state in states.items():
            if state and state != self._known.get(name):
                self._known[name] = state
                error = counts.feeds[name].error if name in counts.feeds else counts.error
                changed.setdefault((state, short(error) if state == "away" else ""), []).append(name)
        return "; ".join(
            f"{', '.join(names)}: {state}{f' ({error})' if error else ''}" for (state, error), names in changed.items()
        )


def _exchange(name: str, text: str, value: Callable[[FeedLine], float | None], make: Any = gauge) -> Measure:
    """A metric of each exchange that has a value."""

    def read(counts: MarketCounts) -> dict[str, float]:
        return {name: each for name, line in counts.feeds.items() if (each := value(line)) is not None}

    measure: Measure = make(f"market_exchange_{name}", text, read, "exchange")
    return measure


def _symbol(field: str) -> Measure:
    """A metric of each symbol; NaN where it is not known."""

    def read(counts: MarketCounts) -> dict[str, float]:
        found = {name: getattr(line, field) for name, line in counts.symbols.items()}
        return {name: math.nan if value is None else value for name, value in found.items()}

    return gauge(f"market_symbol_{field}", f"By symbol: {field}", read, "symbol")


METRICS = (
    *counters("market", MarketCounts),
    counter("market_dead_letters", "Frames handed over as dead letters", "letters"),
    counter("market_published", "Trades and dead letters that Kafka acknowledged", attrgetter("published.published")),
    counter("market_recovered", "Trades and dead letters found in the spool", attrgetter("published.recovered")),
    counter("market_lost", "Trades and dead letters that are nowhere", lost),
    counter("market_rows", "Rows of analytics that Kafka acknowledged", attrgetter("rows.published")),
    counter("market_rows_dropped", "Rows of analytics dropped, the oldest", attrgetter("rows.dropped")),
    gauge("market_waiting", "Trades whose feeds wait for room"),
    gauge("market_held", "Trades and dead letters in memory", attrgetter("published.held")),
    gauge("market_spooled", "Trades and dead letters in the spool", attrgetter("published.spooled")),
    gauge("market_queued", "Trades that wait to be computed"),
    gauge("market_imbalance", "Trades not accounted for: 0", imbalance),
    gauge("market_loop_lag_seconds", "Longest of the last minute", "loop_lag"),
    gauge("market_kafka_up", "1 if connected", lambda counts: float(counts.kafka == "connected")),
    *(
        _exchange(field, f"By exchange: {field}", attrgetter(field), counter)
        for field in ("trades", "bad", "gaps", "missed", "duplicates", "disorder", "reconnects")
    ),
    _exchange("up", "1 if its trades come", lambda line: float(line.state == "live")),
    _exchange("lag_seconds", "From the exchange's time to ours", attrgetter("lag")),
    _exchange("stale_symbols", "Symbols that are silent while others trade", lambda line: len(line.stale)),
    *map(_symbol, ("last", "volatility", "ewma", "spread", "trades_per_second")),
)


def sparkline(prices: Sequence[float]) -> str:
    """A bar for each price, between the least and the greatest."""
    if not prices:
        return ""
    low, high = min(prices), max(prices)
    step = (high - low) / (len(SPARKS) - 1) or 1.0
    return "".join(SPARKS[round((price - low) / step)] for price in prices)


def percent(value: float | None) -> str:
    """A share; a dash for None."""
    return "–" if value is None else f"{value:.1%}"


def price(value: float | None) -> str:
    """Six digits at least."""
    return "–" if value is None else f"{value:,.2f}" if value >= 1000 else f"{value:.6g}"


def latency(seconds: float | None) -> str:
    """In milliseconds; a dash for None."""
    return "–" if seconds is None else f"{seconds * 1000:,.0f} ms"


def columns(lines: Sequence[Sequence[str]], right: Iterable[int] | None = None) -> str:
    """As text, in columns. ``right``: those that are right-aligned; None: all but the first."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ends = set(range(1, len(widths)) if right is None else right)
    align = [str.rjust if n in ends else str.ljust for n in range(len(widths))]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(align, line, widths, strict=True)).rstrip()
        for line in lines
    )


def fitted(lines: Sequence[Sequence[str]], width: int, give_way: Iterable[str]) -> list[list[str]]:
    """The lines without those columns, by their headings and in this order, that leave the others no room; the last
    column is cut to what is left, but keeps ``LEAST``. Two spaces are between columns."""
    columns = [list(column) for column in zip(*lines, strict=True)]

    def taken() -> int:
        return sum(max(map(len, column)) + 2 for column in columns[:-1])

    for heading in give_way:
        if taken() + min(LEAST, max(map(len, columns[-1]))) > width:
            columns = [column for column in columns if column[0] != heading or column is columns[-1]]
    columns[-1] = [cell[: max(0, width - taken())] for cell in columns[-1]]
    return [list(line) for line in zip(*columns, strict=True)]


def status(counts: MarketCounts, rate: float, age: float, width: int = sys.maxsize) -> str:
    """One line on where all stands; where there is no room, counts are left out."""
    out, left_out = counts.published, counts.skipped + counts.uncomputed
    places = "" if counts.partitions is None else ",".join(map(str, counts.partitions)) or "none"
    parts = {
        "age": f"{age:,.0f} s",
        "trades": f"trades {counts.trades:,} ({rate:,.0f}/s)",
        "published": f"published {out.published:,}",
        "held": f"held {out.held + counts.waiting:,}",
        "spool": f"spool {out.spooled:,}",
        "lost": f"lost {lost(counts):,}" if lost(counts) else "",
        "letters": f"dead letters {counts.letters:,}",
        "rows": f"rows {counts.rows.published:,}",
        "left out": f"left out {left_out:,}" if left_out else "",
        "partitions": places and f"partitions {places}",
        "kafka": f"kafka {counts.kafka}",
        "stopping": "stopping" if counts.stopping else "",
        "faults": f"FAULTS {counts.faults}" if counts.faults else "",
    }
    for name in ("", "rows", "letters", "held", "published", "age", "left out", "spool", "trades", "partitions"):
        parts.pop(name, None)
        line = " · ".join(filter(None, parts.values()))
        if len(line) <= width:
            break
    return line[:width]


def picture(counts: MarketCounts, rate: float, age: float, width: int = sys.maxsize) -> Any:
    """The table, for rich. Nothing in it is markup: names come from outside."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(lines: Sequence[Sequence[str]], give_way: Iterable[str], last: str = "") -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        head, *rows = fitted(lines, width, give_way)
        for place, column in enumerate(head):
            made.add_column(column, justify="right" if place and column else "left", no_wrap=True)
        for row in rows:
            made.add_row(
                *(Text(cell, STYLES.get(cell, last if n == len(row) - 1 else "")) for n, cell in enumerate(row))
            )
        return made

    symbols = [("symbol", "last", "volatility", "ewma", "spread", "trades/s", "")]
    for name, line in list(counts.symbols.items())[:MOST_ROWS]:
        cells = (price(line.last), percent(line.volatility), percent(line.ewma), price(line.spread))
        symbols.append((name, *cells, f"{line.trades_per_second:,.1f}", sparkline(line.prices)))
    parts: list[Any] = [table(symbols, ("trades/s", "ewma", "spread", "volatility")), ""]
    if counts.feeds:
        feeds = [("exchange", "state", "trades", "lag", "gaps", "repeated", "bad", "reconnects", "")]
        for name, feed in counts.feeds.items():
            told = (f"{feed.trades:,}", latency(feed.lag), f"{feed.gaps:,}", f"{feed.duplicates:,}", f"{feed.bad:,}")
            silent = f"silent: {' '.join(feed.stale)}" if feed.stale else ""
            error = (feed.error if feed.state != "live" else silent)[:40]
            feeds.append((name, feed.state, *told, str(feed.reconnects), error))
        parts += [table(feeds, ("repeated", "gaps", "bad", "reconnects", "trades", "lag"), "dim"), ""]
    return Group(*parts, Text(status(counts, rate, age, width), no_wrap=True))


def draw(counts: MarketCounts, before: MarketCounts, seconds: float, age: float) -> str:
    """``picture`` as text, as wide as the terminal."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.capture() as text:
        console.print(picture(counts, (counts.trades - before.trades) / max(seconds, 1e-9), age, console.width))
    return text.get().rstrip("\n")
