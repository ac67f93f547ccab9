"""Rolling volatility, EWMA volatility, VWAP and spread of trades, per exchange and over all. Pure: no clock, no I/O.

What a row says
- Event time (``ts_event``) is cut into bars of a second. A bar has the sums of price · size and of size,
  a count, and its last price: that of the greatest (time, exchange, length of the id, id, price, size).
- A window of w seconds at ``now`` is the bar that holds ``now``, as far as it has come, and the w - 1 before.
- ``vwap``: Σ price · size / Σ size over the window's trades. None if Σ size is 0.
- ``volatility``: r is the log of a bar's last price over the last price of the latest earlier bar with a trade; a bar
  without trades has r = 0. √(Σ r² / n · year) over the n bars of the window after the series' first bar: the
  realised volatility on a regular grid (from trade to trade it would measure the bounce between bid and ask). A year is
  365 days; no mean is subtracted. None while n is 0.
- Over all exchanges each has returns of its own, so that what one price is beside another (a basis) does not count.
  They are taken for returns of one common factor with independent noise: a bar's r² is d · (Σ r_v / s_v)² / Σ Σ o_uv /
  (s_u s_v), with s_v the time that the return of v spans, o_uv that which two have in common, and d that since the last
  bar with a return. So it is the factor's variance, whoever trades how often; of one exchange it is r². (The overlaps
  are those of Hayashi and Yoshida, On covariance estimation of non-synchronously observed diffusion processes, 2005.)
- ``ewma``: √(Σ λ^k r² / Σ λ^k · year) over all bars since the series' first, k bars ago; λ = 2^(-1 / half_life). None
  while there is but one bar.
- ``spread``: of the exchanges that traded in the seconds of the shortest window before ``now``, the greatest last price
  less the least. None with fewer than two.

What is taken
- A series is the trades of a symbol on one exchange, or on all ("*"). Each goes by its own event time: *late* is what
  is more than ``lateness`` older than the newest trade that the series took; it is counted and not taken. So what an
  exchange that lags sends is late for "*" only.
- A trade_id is taken once per exchange and symbol, the first to come; a trade labelled "duplicate" is not taken. An id
  is remembered until its bar is closed, after which it would be late. Without an id nothing can be told.
- *Ahead* is what claims to be more than two seconds later than it was received: one bad clock would make all
  else late. *Absurd*: a price that is not finite and above 0, a size below 0, a time that is none.

Promised
- The order in which trades come changes no row, not in the last bit, while none is late. A bar that can still change
  keeps its sums exactly (Shewchuk's expansions, by ``fsum``).
- No drift, after any number of trades: nothing is ever subtracted, a window is summed anew from its bars.
- Bounded: per series two bars per second of the longest window, 40 bytes each, and lateness + 2 bars that can change,
  3 KB each; ``series`` and ``ids`` in all, beyond which trades are ``refused`` or ``unchecked``.

Not promised: thread safety. CPU: 2.3 us per trade; 13 us per row, 45 for a series' first in a bar (Python 3.11).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, combinations
from operator import neg
from typing import Any, NamedTuple

from coordination import stats_repr
from market.trade import SECOND

WINDOWS = (10, 60, 300)  # seconds
ALL = "*"  # the exchange of the rows over all exchanges
YEAR = 365 * 86_400
MAX_TIME_NS = 1 << 62
AHEAD_NS = 2 * SECOND  # how far a trade's time may be ahead of when it was received
MAX_VALUE = 1e100  # prices lie between its inverse and it, sizes between 0 and it: no sum and no ratio overflows
MAX_TERMS = 64  # numbers that a sum is kept as, at most
MAX_ID = 64  # characters of an id that is remembered as it is; a digest of longer ones

Key = tuple[int, str, int, str, float, float]


class AnalyticsRow(NamedTuple):
    """One series at ``ts_event``; the tuples have a value per window, in the order of ``windows`` (seconds)."""

    symbol: str
    exchange: str
    ts_event: int
    last: float
    windows: tuple[int, ...]
    vwap: tuple[float | None, ...]
    volatility: tuple[float | None, ...]
    trades: tuple[int, ...]
    volume: tuple[float, ...]
    ewma: float | None
    spread: float | None
    low: str
    high: str  # the exchanges between which the spread lies; "" without one

    def record(self) -> dict[str, Any]:
        """As JSON likes it: what has a value per window as an object, its keys the windows' seconds."""
        record = self._asdict()
        names = [str(window) for window in record.pop("windows")]
        for field in ("vwap", "volatility", "trades", "volume"):
            record[field] = dict(zip(names, record[field], strict=True))
        return record


class AnalyticsStats(NamedTuple):
    """``offered`` = ``taken`` + ``late`` + ``repeated`` + ``ahead`` + ``absurd`` + ``refused``.

    ``late_for_all``: taken for the exchange, late for "*". ``refused``: there would be too many series. ``unchecked``:
    taken, the id not remembered, there were too many. ``ids``: remembered now.
    """

    offered: int
    taken: int
    late: int
    late_for_all: int
    repeated: int
    ahead: int
    absurd: int
    refused: int
    unchecked: int
    symbols: int
    series: int
    ids: int


def exact(terms: Iterable[float]) -> list[float]:
    """A few numbers with exactly the sum of ``terms``, the greatest first."""
    terms, found = list(terms), list[float]()
    while rest := math.fsum(chain(terms, map(neg, found))):
        found.append(rest)
    return found


class Grid(NamedTuple):
    """What the series of one ``Analytics`` have in common."""

    windows: tuple[int, ...]
    lateness: int  # nanoseconds
    decay: float  # the log of what a bar's weight is multiplied by with each bar after it


class Bar:
    """One that can still change. ``keys``: by exchange, that of its last trade."""

    __slots__ = ("count", "ids", "keys", "sizes", "turnovers")

    def __init__(self) -> None:
        self.keys, self.count = dict[str, Key](), 0
        self.sizes, self.turnovers, self.ids = list[float](), list[float](), list[str]()

    def last(self) -> float:
        """The last price."""
        return max(self.keys.values())[4]


class Past(NamedTuple):
    """What a bar goes on from: the bar before, its last price, and each exchange's last trade (time, price).

    ``since``: the time up to which returns are told.
    """

    bar: int = -1
    price: float = 0.0
    since: int = 0
    ewma: float = 0.0
    weight: float = 0.0
    ends: Mapping[str, tuple[int, float]] = {}


def squared(keys: Mapping[str, Key], past: Past) -> tuple[float, int]:
    """A bar's r², and the time up to which returns are told then."""
    ends = past.ends
    told = sorted(keys.items()) if len(keys) > 1 else keys.items()
    returns = [(ends[name][0], key[0], math.log(key[4] / ends[name][1])) for name, key in told if name in ends]
    if not returns:
        return 0.0, past.since or max(keys.values())[0]
    until = max(end for _, end, _ in returns)
    if len(returns) == 1:
        ((begin, end, change),) = returns
        return change * change * ((until - past.since) / (end - begin)), until
    speed = sum(change / (end - begin) for begin, end, change in returns)
    common = sum(1 / (end - begin) for begin, end, _ in returns) + 2 * sum(
        max(0, min(one[1], other[1]) - max(one[0], other[0])) / ((one[1] - one[0]) * (other[1] - other[0]))
        for one, other in combinations(returns, 2)
    )
    return speed * speed / common * (until - past.since), until


class Series:
    """One symbol on one exchange, or on all."""

    __slots__ = (
        "bars", "closes", "counts", "first", "grid", "ids", "newest", "open", "past", "sizes", "squares", "sums",
        "turnovers",
    )  # fmt: skip

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.newest = self.closes = -1  # nanoseconds: of the newest trade; from when on a bar has to be closed
        self.open: dict[int, Bar] = {}
        self.ids: set[str] = set()  # of the open bars
        self.bars, self.counts = array("q"), array("q")  # of the closed bars that have trades
        self.turnovers, self.sizes, self.squares = array("d"), array("d"), array("d")
        self.first, self.past = -1, Past()  # the first of these bars; the past after the last of them
        self.sums: tuple[int, list[tuple[float, float, float, int]]] | None = None  # per window, closed bars, of a now

    def take(self, key: Key, price: float, size: float) -> bool:
        """False: late."""
        at, grid = key[0], self.grid
        if at > self.newest:
            self.newest = at
            if at >= self.closes:
                self._close()
        elif at < self.newest - grid.lateness:
            return False
        number = at // SECOND
        bar = self.open.get(number)
        if bar is None:
            bar = self.open[number] = Bar()
        keys, exchange = bar.keys, key[1]
        if exchange not in keys or key > keys[exchange]:
            keys[exchange] = key
        bar.count += 1
        bar.sizes.append(size)
        bar.turnovers.append(price * size)
        if len(bar.sizes) >= MAX_TERMS:
            bar.sizes, bar.turnovers = exact(bar.sizes), exact(bar.turnovers)
        return True

    def _step(self, number: int, bar: Bar, past: Past) -> tuple[float, Past]:
        """A bar's r², and the past after it."""
        square, until = squared(bar.keys, past)
        ewma, weight = self._idle(number - past.bar, past.ewma, past.weight) if past.bar >= 0 else (0.0, 0.0)
        ends = {**past.ends, **{name: (key[0], key[4]) for name, key in bar.keys.items()}}
        return square, Past(number, bar.last(), until, ewma + square, weight, ends)

    def _idle(self, bars: int, ewma: float, weight: float) -> tuple[float, float]:
        """So many bars on, all with r = 0."""
        decay = self.grid.decay
        kept = math.exp(decay * bars)
        return ewma * kept, weight * kept + math.expm1(decay * bars) / math.expm1(decay)

    def _close(self) -> None:
        """Close the bars in which any trade would be late from now on."""
        grid = self.grid
        edge = (self.newest - grid.lateness) // SECOND
        self.closes = (edge + 1) * SECOND + grid.lateness
        for number in sorted(number for number in self.open if number < edge):
            bar = self.open.pop(number)
            self.ids.difference_update(bar.ids)
            square, self.past = self._step(number, bar, self.past)
            self.first = number if self.first < 0 else self.first
            self.bars.append(number)
            self.counts.append(bar.count)
            self.turnovers.append(math.fsum(bar.turnovers))
            self.sizes.append(math.fsum(bar.sizes))
            self.squares.append(square)
            self.sums = None
        if len(self.bars) > 2 * grid.windows[-1]:
            old = bisect_left(self.bars, self.bars[-1] - grid.windows[-1])
            for column in (self.bars, self.counts, self.turnovers, self.sizes, self.squares):
                del column[:old]

    def _closed_sums(self, now: int) -> list[tuple[float, float, float, int]]:
        """Σ turnover, size, r², count of the closed bars of each window at the bar ``now``, summed anew."""
        if self.sums is None or self.sums[0] != now:
            end, found, sums = len(self.bars), list[tuple[float, float, float, int]](), (0.0, 0.0, 0.0, 0)
            for width in self.grid.windows:
                begin = bisect_left(self.bars, now - width + 1, 0, end)
                part = slice(begin, end)
                sums = (
                    sums[0] + sum(self.turnovers[part]), sums[1] + sum(self.sizes[part]),
                    sums[2] + sum(self.squares[part]), sums[3] + sum(self.counts[part]),
                )  # fmt: skip
                found.append(sums)
                end = begin
            self.sums = now, found
        return self.sums[1]

    def row(self, symbol: str, exchange: str, at: int = 0) -> AnalyticsRow:
        """At ``at`` or the newest trade, whichever is later. Without a spread."""
        grid, at = self.grid, max(at, self.newest)
        now = at // SECOND
        recent = list[tuple[int, float, float, float, int]]()
        past, first = self.past, self.first
        for number, bar in sorted(self.open.items()):
            square, past = self._step(number, bar, past)
            first = number if first < 0 else first
            recent.append((number, math.fsum(bar.turnovers), math.fsum(bar.sizes), square, bar.count))
        ewma, weight = self._idle(now - past.bar, past.ewma, past.weight)
        vwap, volatility, counts, volumes = [], [], [], []
        for width, sums in zip(grid.windows, self._closed_sums(now), strict=True):
            turnover, volume, squares, count = sums
            for number, *bar_sums in recent:
                if number > now - width:
                    turnover += bar_sums[0]
                    volume += bar_sums[1]
                    squares += bar_sums[2]
                    count += int(bar_sums[3])
            n = min(width, now - first)
            vwap.append(turnover / volume if volume else None)
            volatility.append(math.sqrt(squares / n * YEAR) if n else None)
            counts.append(count)
            volumes.append(volume)
        return AnalyticsRow(
            symbol, exchange, at, past.price, grid.windows,
            tuple(vwap), tuple(volatility), tuple(counts), tuple(volumes),
            math.sqrt(ewma / weight * YEAR) if weight else None, None, "", "",
        )  # fmt: skip

    def last(self) -> float:
        """The newest trade's price."""
        return self.open[max(self.open)].last()  # the newest trade's bar is open


class Book:
    """One symbol."""

    __slots__ = ("all", "changed", "exchanges", "told")

    def __init__(self, grid: Grid) -> None:
        self.all, self.exchanges, self.changed, self.told = Series(grid), dict[str, Series](), set[str](), -MAX_TIME_NS


class Analytics:
    """Any number of symbols. ``take`` each trade; ``due`` gives the rows that changed.

    ``windows`` (ascending), ``lateness``, ``half_life``, ``every``: seconds. A symbol's rows are due at most once per
    ``every``, by the time at which the last trade was received; at once if that clock was put back.
    """

    def __init__(
        self,
        windows: Sequence[int] = WINDOWS,
        *,
        lateness: float = 2.0,
        half_life: float = 60.0,
        every: float = 0.25,
        series: int = 4_000,
        ids: int = 500_000,
    ) -> None:
        self._grid = Grid(tuple(windows), round(lateness * SECOND), -math.log(2) / half_life)
        self._every, self._most_series, self._most_ids = round(every * SECOND), series, ids
        self._books: dict[str, Book] = {}
        self._changed: dict[str, Book] = {}
        self._received = -MAX_TIME_NS
        self._series = self._ids = self._offered = self._taken = self._late = self._late_for_all = 0
        self._repeated = self._ahead = self._absurd = self._refused = self._unchecked = 0

    def take(
        self, exchange: str, symbol: str, price: float, size: float, trade_id: str, at: int, received: int, flags: str
    ) -> bool:
        """Whether the trade of these fields was taken."""
        self._offered += 1
        bounded = 1 / MAX_VALUE < price < MAX_VALUE and 0 <= size < MAX_VALUE and 0 <= at < MAX_TIME_NS
        if not bounded or exchange == ALL:
            self._absurd += 1
            return False
        if at > received + AHEAD_NS:
            self._ahead += 1
            return False
        if flags and "duplicate" in flags.split(","):
            self._repeated += 1
            return False
        book = self._books.get(symbol)
        series = None if book is None else book.exchanges.get(exchange)
        if book is None or series is None:
            if self._series + 1 + (book is None) > self._most_series:
                self._refused += 1
                return False
            if book is None:
                book = self._books[symbol] = Book(self._grid)
                self._series += 1
            series = book.exchanges[exchange] = Series(self._grid)
            self._series += 1
        if len(trade_id) > MAX_ID:
            trade_id = blake2b(trade_id.encode(errors="replace"), digest_size=MAX_ID // 4).hexdigest()
        if trade_id and trade_id in series.ids and at >= series.newest - self._grid.lateness:
            self._repeated += 1
            return False
        known = len(series.ids)
        key = (at, exchange, len(trade_id), trade_id, price, size)
        if not series.take(key, price, size):
            self._late += 1
            return False
        if trade_id:
            if self._ids < self._most_ids:
                series.ids.add(trade_id)
                series.open[at // SECOND].ids.append(trade_id)
            else:
                self._unchecked += 1
        self._ids += len(series.ids) - known
        self._taken += 1
        self._received = received
        self._late_for_all += not book.all.take(key, price, size)
        if not book.changed:
            self._changed[symbol] = book
        book.changed.add(exchange)
        return True

    def due(self, everything: bool = False) -> list[AnalyticsRow]:
        """The rows of the series that changed since they were last told, of the symbols whose time has come."""
        found = list[AnalyticsRow]()
        for symbol, book in list(self._changed.items()):
            if everything or not 0 <= self._received - book.told < self._every:
                del self._changed[symbol]
                book.told = self._received
                found.append(self._all(symbol, book))
                found += (book.exchanges[name].row(symbol, name) for name in sorted(book.changed))
                book.changed.clear()
        return found

    def _all(self, symbol: str, book: Book, at: int = 0) -> AnalyticsRow:
        row = book.all.row(symbol, ALL, at)
        since = row.ts_event - self._grid.windows[0] * SECOND
        lasts = [(series.last(), name) for name, series in book.exchanges.items() if series.newest > since]
        if len(lasts) < 2:
            return row
        (low, lowest), (high, highest) = min(lasts), max(lasts)
        return row._replace(spread=high - low, low=lowest, high=highest)

    def stats(self) -> AnalyticsStats:
        """Counts since the beginning; what is kept."""
        return AnalyticsStats(
            self._offered, self._taken, self._late, self._late_for_all, self._repeated, self._ahead, self._absurd,
            self._refused, self._unchecked, len(self._books), self._series, self._ids,
        )  # fmt: skip

    __repr__ = stats_repr
