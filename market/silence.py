"""When a connection to an exchange, or one of its symbols, has been silent for too long. Pure: time is an argument.

A symbol may trade seldom, or its subscription may have died, or been refused: after ``renew_after`` seconds a new
connection is worth a try, and after twice as long, and so on, for as long as any is silent.

After a lost connection the first trade of a symbol is labelled "gap", if no number tells that none is missing.
"""

from __future__ import annotations

import math

from market.trade import Trade, short


class Limits:
    """Of one connection since ``begun``: when to ping, and what has lasted for too long. Times are seconds.

    ``ping_every``: pings of the protocol; ``message_every``: those that the exchange wants as messages.
    """

    def __init__(
        self,
        begun: float,
        *,
        ping_every: float,
        pong_within: float,
        ack_within: float,
        silent_after: float,
        message_every: float,
    ) -> None:
        self._ping_every, self._pong_within, self._message_every = ping_every, pong_within, message_every
        self._ack_within, self._silent_after = ack_within, silent_after
        self._ack_by = begun + ack_within
        self._next_ping, self._next_message = begun + ping_every, begun + message_every
        self._pinged = math.inf
        """When the first ping was sent after which nothing came."""

    def message_is_due(self, now: float) -> bool:
        due = now >= self._next_message
        if due:
            self._next_message = now + self._message_every
        return due

    def ping_is_due(self, now: float, heard: float) -> bool:
        """``heard``: when anything came."""
        if heard >= self._pinged:
            self._pinged = math.inf
        due = now >= self._next_ping
        if due:
            self._next_ping, self._pinged = now + self._ping_every, min(self._pinged, now)
        return due

    def exceeded(self, now: float, told: float, subscribing: bool, refusal: str) -> str:
        """What has lasted for too long. ``told``: when anything but a pong came; ``refusal``: the exchange's."""
        if subscribing and now >= self._ack_by:
            return f"no acknowledgement within {self._ack_within:g} s{': ' if refusal else ''}{refusal}"
        if now >= told + self._silent_after:
            return f"silent for {self._silent_after:g} s"
        if now >= self._pinged + self._pong_within:
            return f"no sign of life {self._pong_within:g} s after a ping"
        return ""

    def next(self, told: float, subscribing: bool) -> float:
        """When to look again."""
        ack_by = self._ack_by if subscribing else math.inf
        silent_at, pong_by = told + self._silent_after, self._pinged + self._pong_within
        return min(self._next_message, self._next_ping, ack_by, silent_at, pong_by)


class SymbolSilence:
    """For these symbols; belongs to the event loop of its feed. ``since``: when the connection went live, or None."""

    def __init__(self, symbols: tuple[str, ...], renew_after: float) -> None:
        self._symbols, self._renew_after = symbols, renew_after
        self.patience = renew_after
        """Seconds of silence after which a new connection is worth a try."""
        self._traded: dict[str, float] = {}
        """When each symbol's last trade came."""
        self._pending: set[str] = set()
        """Symbols of which nothing has come since the connection was lost."""
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
            trades = self._after_outage(trades)
        for trade in trades:
            self._traded[trade.symbol] = now
        return trades

    def _after_outage(self, trades: list[Trade]) -> list[Trade]:
        """Nothing but a trade's number can tell that none is missing before it."""
        pending, told = self._pending, []
        for trade in trades:
            if trade.symbol in pending:
                pending.discard(trade.symbol)
                if trade.sequence is None and not ("snapshot" in trade.flags and "duplicate" in trade.flags):
                    self.outages += 1
                    if "gap" not in trade.flags:
                        trade = trade._replace(flags=f"{trade.flags},gap" if trade.flags else "gap")
            told.append(trade)
        return told
