"""What the frames of an exchange come to: trades for ``emit``, dead letters for ``dead``, or a word on the connection.

Where an exchange numbers its trades, the numbers tell what is missing (``SequenceCheck``). Where it does not, the first
trade of a symbol after a lost connection is labelled "gap": it may be that nothing is missing.

A ``FrameReader`` lasts over the connections of its feed, and belongs to its event loop; nothing here waits.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable

from market.adapter import Adapter, SequenceCheck, flagged, reason_of
from market.topics import DeadLetter, LetterKind
from market.trade import Parsed, Trade, short

Emit = Callable[[str, list[Trade]], Awaitable[object] | None]
"""Told the exchange and a frame's trades, labelled. What it returns is awaited if it is not None."""

Dead = Callable[[DeadLetter], Awaitable[object] | None]
"""Told a frame that is bad, with the adapter's context. Awaited likewise."""


async def one_by_one(waits: Iterable[Awaitable[object]]) -> None:
    """Await each."""
    for each in waits:
        await each


class SymbolSilence:
    """Which of these symbols are silent, or had an outage. ``since``: when the connection went live, or None."""

    def __init__(self, symbols: tuple[str, ...], renew_after: float) -> None:
        self._symbols, self._renew_after = symbols, renew_after
        self.patience = renew_after  # seconds of silence after which a new connection is worth a try
        self._traded: dict[str, float] = {}  # when each symbol's last trade came
        self._pending: set[str] = set()  # symbols of which nothing has come since the connection was lost
        self.outages = 0

    def stale(self, since: float | None, seconds: float) -> tuple[str, ...]:
        """Symbols that had been silent for so long when another one's last trade came, on this connection."""
        if since is None or not self._traded:
            return ()
        newest, traded = max(self._traded.values()), self._traded.get
        return tuple(name for name in self._symbols if newest - max(traded(name, since), since) >= seconds)

    def renewal(self, since: float | None) -> str:
        """Why a new connection is worth a try, for a symbol's sake; it takes longer and longer until that helps."""
        if stale := self.stale(since, self.patience):
            self.patience *= 2
            return f"nothing of {short(', '.join(stale))}"
        flowing = max(self._traded.values(), default=-math.inf) - (since or math.inf)
        if flowing >= self._renew_after and not self.stale(since, self._renew_after):
            self.patience = self._renew_after
        return ""

    def lost(self) -> None:
        """The connection was lost."""
        self._pending.update(self._symbols)

    def take(self, trades: list[Trade], now: float) -> list[Trade]:
        """The same trades, labelled if they are the first ones after a lost connection."""
        if self._pending:
            trades = [self._after_outage(trade) for trade in trades]
        for trade in trades:
            self._traded[trade.symbol] = now
        return trades

    def _after_outage(self, trade: Trade) -> Trade:
        if trade.symbol in self._pending:
            self._pending.discard(trade.symbol)
            if trade.sequence is None and not ("snapshot" in trade.flags and "duplicate" in trade.flags):
                self.outages += 1
                if "gap" not in trade.flags:
                    return flagged(trade, "gap")
        return trade


class FrameReader:
    """Reads the frames of one feed. ``wall``: Unix time in ns."""

    def __init__(
        self, adapter: Adapter, silence: SymbolSilence, emit: Emit, dead: Dead, wall: Callable[[], int]
    ) -> None:
        self.adapter, self.silence, self.check = adapter, silence, SequenceCheck()
        self._emit, self._dead, self._wall = emit, dead, wall
        self.frames = self.bad = self.errors = 0
        self.lag = math.nan
        self.note = self.last_error = ""
        self._waits: list[Awaitable[object]] = []  # what is to be awaited of this frame, but for its trades

    def take(self, frame: bytes, now: float) -> Awaitable[object] | Parsed | None:
        """Tell a frame's trades, or why it is bad. Returns what to await, or a message about the connection.

        ``now``: by the feed's clock.
        """
        received = self._wall()
        self.frames += 1
        try:
            parsed = self.adapter.parse(frame, received)
        except Exception as error:  # an adapter raises nothing but BadFrame; if it does, the frame is not lost
            return self._bury(reason_of(error), frame, received)
        for reason, alone in parsed.bad:
            self._later(self._bury(reason, alone, received))
        trades, kind = self.check.check(parsed), parsed.kind
        if trades:
            trades = self.silence.take(trades, now)
            last = trades[-1]
            if "snapshot" not in last.flags:
                lag = (last.ts_recv - last.ts_event) / 1e3
                self.lag = lag if math.isnan(self.lag) else self.lag + 0.05 * (lag - self.lag)
            told = self._emit(self.adapter.name, trades)
            if self._waits:
                self._later(told)
                waits, self._waits = self._waits, []
                return one_by_one(waits)
            return told
        if kind == "error":
            self.errors += 1
            self.last_error = f"the exchange says: {parsed.note}"
        elif kind == "status":
            self.note = parsed.note
        return parsed if kind == "ack" or kind == "error" or kind == "status" else None

    def _later(self, told: Awaitable[object] | None) -> None:
        if told is not None:
            self._waits.append(told)

    def broken(self, reason: str) -> Awaitable[object] | None:
        """The WebSocket layer refused a frame, and shows nothing of it. Returns what to await."""
        return self._bury(reason, b"", self._wall())

    def _bury(self, reason: str, frame: bytes, received: int) -> Awaitable[object] | None:
        self.bad += 1
        kind: LetterKind = "text"
        try:
            frame.decode()
        except ValueError:
            kind = "binary"
        return self._dead(DeadLetter(self.adapter.name, reason, frame, received, kind, self.adapter.context()))
