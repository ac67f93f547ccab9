"""What the frames of an exchange come to: trades for ``emit``, dead letters for ``dead``, or a word on the connection.

Where an exchange numbers its trades, the numbers tell what is missing (``SequenceCheck``). Where it does not, the first
trade of a symbol after a lost connection is labelled "gap": it may be that nothing is missing.

A ``FrameReader`` lasts over the connections of its feed, and belongs to its event loop; nothing here waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from market.adapter import Adapter, Gap, SequenceCheck, flagged, reason_of
from market.topics import DeadLetter, LetterKind, MarketEvent
from market.trade import Parsed, Trade, short

Emit = Callable[[str, list[Trade]], Awaitable[object] | None]
"""Told the exchange and a frame's trades, labelled. What it returns is awaited if it is not None."""

Tell = Callable[[MarketEvent], Awaitable[object] | None]
"""Told of a gap, of the connection's end and return, of a back-fill. Awaited likewise."""

Dead = Callable[[DeadLetter], Awaitable[object] | None]
"""Told a frame that is bad, with the adapter's context. Awaited likewise."""


async def _awaited(what: Awaitable[object]) -> None:
    await what


class SymbolSilence:
    """Which of these symbols are silent, or had an outage. ``since``: when the connection went live, or None."""

    def __init__(self, symbols: tuple[str, ...], renew_after: float) -> None:
        self.symbols, self._renew_after = symbols, renew_after
        self.patience = renew_after  # seconds of silence after which a new connection is worth a try
        self._traded: dict[str, float] = {}  # when each symbol's last trade came
        self._pending = dict[str, int | None]()  # when each symbol's last trade was, of those still silent since a loss
        self.found: list[Gap] = []  # since somebody took them
        self.outages = 0

    def stale(self, since: float | None, seconds: float) -> tuple[str, ...]:
        """Symbols that had been silent for so long when another one's last trade came, on this connection."""
        if since is None or not self._traded:
            return ()
        newest, traded = max(self._traded.values()), self._traded.get
        return tuple(name for name in self.symbols if newest - max(traded(name, since), since) >= seconds)

    def renewal(self, since: float | None) -> str:
        """Why a new connection is worth a try, for a symbol's sake; it takes longer and longer until that helps."""
        if stale := self.stale(since, self.patience):
            self.patience *= 2
            return f"nothing of {short(', '.join(stale))}"
        flowing = max(self._traded.values(), default=-math.inf) - (since or math.inf)
        if flowing >= self._renew_after and not self.stale(since, self._renew_after):
            self.patience = self._renew_after
        return ""

    def lost(self, ends: Mapping[str, int | None]) -> None:
        """The connection was lost. ``ends``: the time of each symbol's newest trade."""
        self._pending = {symbol: ends.get(symbol) for symbol in self.symbols} | self._pending

    def take(self, trades: list[Trade], now: float) -> list[Trade]:
        """The same trades, labelled if they are the first ones after a lost connection."""
        if self._pending:
            trades = [self._after_outage(trade) for trade in trades]
        for trade in trades:
            self._traded[trade.symbol] = now
        return trades

    def _after_outage(self, trade: Trade) -> Trade:
        if trade.symbol in self._pending:
            begin = self._pending.pop(trade.symbol)
            if trade.sequence is None and not ("snapshot" in trade.flags and "duplicate" in trade.flags):
                self.outages += 1
                self.found.append(Gap(trade.symbol, begin, trade.ts_event, None, "lost connection"))
                if "gap" not in trade.flags:
                    return flagged(trade, "gap")
        return trade


class FrameReader:
    """Reads the frames of one feed. ``wall``: Unix time in ns."""

    def __init__(
        self,
        adapter: Adapter,
        silence: SymbolSilence,
        emit: Emit,
        dead: Dead,
        wall: Callable[[], int],
        tell: Tell = lambda _: None,
    ) -> None:
        self.adapter, self.silence, self.check = adapter, silence, SequenceCheck()
        self._emit, self._dead, self._wall, self._tell = emit, dead, wall, tell
        self._lost: tuple[int, str] | None = None  # when and why, while there is no connection after the first one
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
            if "snapshot" in last.flags:
                self._back_filled(trades)
            else:
                lag = (last.ts_recv - last.ts_event) / 1e3
                self.lag = lag if math.isnan(self.lag) else self.lag + 0.05 * (lag - self.lag)
            told = self._emit(self.adapter.name, trades)
            if self.check.found or self.silence.found:
                for gap in self.check.found + self.silence.found:
                    self._event("gap", *gap)
                self.check.found, self.silence.found = [], []
            if self._waits and told is not None:
                self._waits.insert(0, told)  # they are counted: they may not wait for others to be taken
            return self._told() if self._waits else told
        if kind == "error":
            self.errors += 1
            self.last_error = f"the exchange says: {parsed.note}"
        elif kind == "status":
            self.note = parsed.note
        return parsed if kind == "ack" or kind == "error" or kind == "status" else None

    def _event(self, event: Any, *more: Any) -> None:
        self._later(self._tell(MarketEvent(event, self.adapter.name, *more)))

    def _back_filled(self, trades: list[Trade]) -> None:
        new = [trade for trade in trades if "duplicate" not in trade.flags]
        for symbol in dict.fromkeys(trade.symbol for trade in new):
            times = [trade.ts_event for trade in new if trade.symbol == symbol]
            numbers = [trade.sequence for trade in new if trade.symbol == symbol and trade.sequence is not None]
            sequence = (min(numbers), max(numbers)) if numbers else None
            self._event("back-fill", symbol, min(times), max(times), sequence, "snapshot")

    async def lost(self, cause: str) -> None:
        """A connection that was live has ended."""
        self._lost = self._wall(), cause
        for symbol in self.silence.symbols:
            self._event("disconnect", symbol, self._lost[0], None, None, cause)
        await self._told()

    async def live(self) -> None:
        """A connection is live."""
        if self._lost is not None:
            (begin, cause), self._lost = self._lost, None
            for symbol in self.silence.symbols:
                self._event("reconnect", symbol, begin, self._wall(), None, cause)
            await self._told()

    async def _told(self) -> None:
        waits, self._waits = self._waits, []
        if waits:
            async with asyncio.TaskGroup() as group:  # so that all are waiting, and given up, should this be cancelled
                for each in waits[1:]:
                    group.create_task(_awaited(each))
                await waits[0]

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
