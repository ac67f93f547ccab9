"""What an exchange is to this program: what to ask it, what its frames mean, and whether its numbers leave a gap.

An adapter opens nothing, waits for nothing and logs nothing: the connection belongs to `market.connect`. Time is an
argument (`received_ns`, Unix time; Gate.io's ping, which must carry a time, takes it from `clock`).

Promised:

* `parse` raises `BadFrame` and nothing else, whatever the frame. A frame is trades, or known and said to be so
  (`kind`), or bad; nothing is guessed and nothing is passed over in silence. A bad trade among good ones is lost alone:
  `Parsed.bad` holds the frame as it would be with that trade only (the first `ALONE`, then one with the rest), which
  can be read again by itself.
* A symbol is BASE-QUOTE in capitals ("BTC-USD"). An exchange whose books are in USDT (`dollar`) is asked for BTC-USDT
  where BTC-USD is wanted, and its trades are BTC-USDT's. With `merge_quotes` they are told as BTC-USD, unless BTC-USDT
  was asked for as well. A trade of a symbol that was not asked for is bad, so nobody outside makes up symbols for us.

Not promised: that an exchange tells the truth, or everything. What its sequences and ids show is labelled by
`SequenceCheck`, counted, and never patched.

An adapter holds the state of one connection, the symbols asked for; `subscribe` begins it anew. For two connections to
one exchange take two adapters: `fresh()`. A frame that is read again later (a dead letter) needs that state too:
`context` tells it and `within` restores it. Nothing here has a lock: an adapter and its check belong to one event loop.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar, Literal, NamedTuple, Self

import orjson

from coordination import stats_repr
from market.trade import (
    AHEAD_NS,
    EARLIEST_NS,
    PLAIN_NUMBER,
    SYMBOL,
    BadFrame,
    Parsed,
    Side,
    Trade,
    decimal,
    expect_list,
    gunzip,
    identity,
    in_order,
    milliseconds,
    sequence_number,
    short,
    unknown,
)

Fields = Sequence[str | tuple[str, ...]]
"""Where a trade's symbol, price, size, side, id and time stand; a tuple: the documented spellings, the first wins."""

ALONE = 10  # bad trades of a frame that are told one by one; more are told together, as each takes a copy of the rest

HEARTBEAT = Parsed([], "heartbeat")  # these are shared: nobody appends to their lists
ACK = Parsed([], "ack")
IGNORED = Parsed([], "ignored")

_new = tuple.__new__


def picker(fields: Fields) -> Callable[[Any], Sequence[Any]]:
    """Takes the six `fields` out of a trade; the function raises `KeyError` if one has none of its spellings."""
    spellings = [(field,) if isinstance(field, str) else field for field in fields]
    first = itemgetter(*(names[0] for names in spellings))

    def pick(item: Any) -> Sequence[Any]:
        try:
            return first(item)  # type: ignore[no-any-return]
        except KeyError:
            return [item[next((name for name in names if name in item), names[0])] for names in spellings]

    return pick if any(len(names) > 1 for names in spellings) else first


def reason_of(error: Exception) -> str:
    """Why a frame or a trade is bad."""
    return str(error) if isinstance(error, BadFrame) else f"{type(error).__name__}: {short(error)}"


class Adapter(ABC):
    """What all have in common. An exchange is a subclass with `_subscriptions`, `_message` and, for its trades,
    `fields`, `sides`, `moment` and `numbered`."""

    name: str
    url: str
    key_env: str | None = None  # the environment's variable without which the exchange says nothing
    secret_env: str | None = None  # another one
    ping_text: str | None = None
    ping_every: float | None = None  # seconds between the pings that the exchange wants as messages
    silent_after: float = 60.0  # seconds without any frame after which the feed is dead
    max_symbols: int = 1000  # of one connection
    pace: float = 0.0  # seconds between two messages of a subscription
    dollar: str = "USD"  # the quote currency that stands in for USD
    separator: str = ""  # between base and quote currency
    acknowledged: Literal["messages", "symbols"] | int = "messages"  # each of these is; or how many come in all
    heartbeats: frozenset[object] = frozenset()  # frames that are not JSON
    controls: ClassVar[Mapping[Any, Parsed]] = {}  # what messages without trades mean, by their kind
    fields: Fields = ()
    sides: ClassVar[Mapping[Any, Side]] = {"buy": "buy", "sell": "sell"}  # the taker's, by what the exchange writes
    moment: Callable[[object], int] = staticmethod(milliseconds)  # nanoseconds of what the exchange writes
    numbered = False  # ids count up by one per symbol: they are the sequence
    newest_first = False  # how several trades of one time stand in a frame or a snapshot

    def __init_subclass__(cls) -> None:
        if "fields" in vars(cls):
            cls._pick = staticmethod(picker(cls.fields))

    def __init__(
        self, *, clock: Callable[[], float] = time.time, keys: Sequence[str] = (), merge_quotes: bool = False
    ) -> None:
        self._clock, self._keys, self._merge_quotes = clock, keys, merge_quotes
        self._asked: dict[str, str] = {}  # native -> ours

    def fresh(self) -> Self:
        """Another one, for another connection."""
        return type(self)(clock=self._clock, keys=self._keys, merge_quotes=self._merge_quotes)

    def with_keys(self, environment: Mapping[str, str], merge_quotes: bool = False) -> Self:
        """Another one with its keys, if it needs any; `ValueError` if a variable is not set."""
        names = [name for name in (self.key_env, self.secret_env) if name]
        for name in names:
            if not environment.get(name):
                raise ValueError(f"the environment has no {name}")
        keys = [environment[name] for name in names]
        return type(self)(clock=self._clock, keys=keys, merge_quotes=merge_quotes)

    def context(self) -> str:
        """What `parse` knows of the connection, as JSON: with it a dead letter can be read again elsewhere."""
        return orjson.dumps({"asked": self._asked}).decode()

    def within(self, context: str | bytes) -> Self:
        """Another one that knows what the one with this `context` knew; `ValueError` if it is none."""
        other, found = self.fresh(), orjson.loads(context)
        asked = found.get("asked") if type(found) is dict else None
        if type(asked) is not dict or not all(type(symbol) is str for symbol in asked.values()):
            raise ValueError(f"not a context: {short(context)}")
        other._asked = asked
        return other

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {' '.join(self._asked.values()) or 'nothing asked'}>"

    def native(self, symbol: str) -> str:
        """ "BTC-USD" as the exchange writes it; `ValueError` if it is not BASE-QUOTE."""
        if not SYMBOL(symbol):
            raise ValueError(f"not a symbol such as BTC-USD: {symbol!r}")
        base, _, currency = symbol.partition("-")
        return self._join(base, self.dollar if currency == "USD" else currency)

    def _join(self, base: str, currency: str) -> str:
        return base + self.separator + currency

    def told(self, symbols: Sequence[str]) -> dict[str, str]:
        """By the exchange's names, what their trades are told as."""
        found = dict[str, str]()
        for symbol in sorted(symbols, key=lambda each: not each.endswith("-USD")):  # what is exact comes last, and wins
            stands_in = symbol.endswith("-USD") and not self._merge_quotes
            found[self.native(symbol)] = f"{symbol[:-3]}{self.dollar}" if stands_in else symbol
        return {native: found[native] for native in map(self.native, symbols)}

    def symbol(self, native: Any) -> str:
        """The other way, as it is told; `BadFrame` if it was not asked for."""
        found = self._asked.get(native)
        if found is None:
            raise BadFrame(f"a symbol that was not asked for: {short(native)}")
        return found

    def connect_url(self, url: str | None = None) -> str:
        """Where to connect; `url` replaces the exchange's own address."""
        return url or self.url

    def check(self, symbols: Sequence[str]) -> int:
        """How many these are for the exchange; `ValueError` if a connection cannot have them."""
        found = len({self.native(symbol) for symbol in symbols})
        if not found:
            raise ValueError("no symbols")
        if found > self.max_symbols:
            raise ValueError(f"{found} symbols; a connection has {self.max_symbols} at most")
        return found

    def subscribe(self, symbols: Sequence[str]) -> list[str]:
        """What to send after connecting. Forgets the connection before this one."""
        self.check(symbols)
        self._asked = self.told(symbols)
        return [orjson.dumps(message).decode() for message in self._subscriptions(list(self._asked))]

    @abstractmethod
    def _subscriptions(self, natives: list[str]) -> list[object]:
        """The messages that subscribe to the trades of these symbols, as the exchange writes them."""

    def acks(self, messages: int, symbols: int) -> int:
        """How many acknowledgements `subscribe`'s so many messages for so many symbols bring; 0 if it brings none."""
        wanted = self.acknowledged
        return wanted if isinstance(wanted, int) else symbols if wanted == "symbols" else messages

    def ping(self) -> str | None:
        """The message to send every `ping_every` seconds; None if the exchange wants none."""
        return self.ping_text

    def parse(self, frame: str | bytes, received_ns: int) -> Parsed:
        """What a frame means. `received_ns`: Unix time in nanoseconds. `BadFrame` is all that it raises."""
        try:
            if self.heartbeats and frame in self.heartbeats:
                return HEARTBEAT
            if type(frame) is bytes and frame[:2] == b"\x1f\x8b":
                frame = gunzip(frame)
            return self._message(orjson.loads(frame), received_ns)
        except Exception as error:  # a missing key, a wrong type, a number out of range: all are the frame's fault
            raise BadFrame(reason_of(error)) from None

    @abstractmethod
    def _message(self, message: Any, received: int) -> Parsed:
        """What a decoded message means. Whatever it raises makes the frame a `BadFrame`."""

    def _control(self, kind: object) -> Parsed:
        """What a message without trades means by its kind alone; `BadFrame` if that is unknown."""
        found = self.controls.get(kind)
        if found is None:
            raise unknown(kind)
        return found

    def _trades(
        self,
        message: Any,
        items: Any,
        received: int,
        flags: str = "",
        read: Callable[[Any, int, str], Trade] | None = None,
    ) -> Parsed:
        """The trades of a list within the message; a bad one loses itself only. `BadFrame` if there is no good one."""
        trades, bad, read = list[Trade](), list[tuple[Any, Exception]](), read or self._item
        for item in expect_list(items):
            try:
                trades.append(read(item, received, flags))
            except Exception as error:
                bad.append((item, error))
        if flags or self.newest_first:
            in_order(trades, self.newest_first)
        if not bad:
            return Parsed(trades, "trades")
        if not trades:
            raise bad[0][1]
        letters = list[tuple[str, bytes]]()
        parts = [[one] for one in bad[:ALONE]] + ([bad[ALONE:]] if len(bad) > ALONE else [])
        for some in parts:
            items[:] = [item for item, _ in some]
            letters.append((reason_of(some[0][1]), json.dumps(message).encode()))
        return Parsed(trades, "trades", bad=letters)

    _pick: Callable[[Any], Sequence[Any]]

    def _item(self, item: Any, received: int, flags: str = "") -> Trade:
        """A trade as the exchange writes it."""
        symbol, price, size, side, number, when = self._pick(item)
        sequence = sequence_number(number) if self.numbered else None
        number = identity(number) if sequence is None else str(sequence)
        name, side, when = self._asked.get(symbol) or self.symbol(symbol), self.sides[side], self.moment(when)
        return self._trade(name, price, size, side, number, when, received, sequence, flags)

    def _trade(
        self,
        symbol: str,
        price: object,
        size: object,
        side: Side,
        trade_id: str,
        when: int,
        received: int,
        sequence: int | None = None,
        flags: str = "",
    ) -> Trade:
        if not (type(price) is str and PLAIN_NUMBER(price)):
            price = decimal(price)
        if not (type(size) is str and PLAIN_NUMBER(size)):
            size = decimal(size)
        price_value, size_value = float(price), float(size)
        if not (price_value > 0.0 and size_value > 0.0):
            raise BadFrame(f"not positive: price {price}, size {size}")
        if not EARLIEST_NS <= when <= received + AHEAD_NS:
            raise BadFrame(f"not a plausible time: {when} ns, received at {received} ns")
        parts = self.name, symbol, price, size, price_value, size_value, side, trade_id, when, received, sequence, flags
        return _new(Trade, parts)


class SequenceStats(NamedTuple):
    """Counts since the beginning."""

    trades: int
    gaps: int  # places where something is missing
    missed: int  # how many are missing there, as the numbers tell (late ones are not taken off again)
    duplicates: int
    disorder: int
    restarts: int  # times that a sequence began again below where it was


class Gap(NamedTuple):
    """Where trades of a symbol are missing, or may be: the times of those around it, and which."""

    symbol: str
    begin: int | None
    end: int
    sequence: tuple[int, int] | None
    cause: str


class _Seen:
    """What is known of one symbol."""

    __slots__ = ("at", "high", "ids", "latest", "order", "run")

    def __init__(self) -> None:
        self.at: int | None = None  # the newest trade's time, ns
        self.high: int | None = None  # of the sequence
        self.run = 0  # how many came one after the other below `high`
        self.latest = 0  # exchange's time, ns
        self.ids: set[str] = set()
        self.order: deque[str] = deque()


class SequenceCheck:
    """Labels what one exchange's trades lack, repeat or mix up. Keep it over reconnects, and tell it of them.

    `check(parsed)` is the whole of it; `label(trade)` is the part for one trade. A trade is

    * a "duplicate" if its id is among the symbol's last `remembered`,
    * after a "gap" if its sequence left numbers out (so the trades missed while a connection was away show as a gap),
      or if it is the first after a frame number that did,
    * in "disorder" if its sequence is below one that came before; without sequences, if its time is.

    A duplicate is labelled that and nothing else, and moves nothing. What is older than `remembered` trades cannot be
    told from a late one and is called disorder. A sequence that runs on for 16 numbers below its height began again.
    """

    RESTARTED = 16

    def __init__(self, *, remembered: int = 4096) -> None:
        self._remembered = remembered
        self._seen: dict[str, _Seen] = {}
        self._frame: int | None = None
        self._frames_missing: tuple[int, int] | None = None
        self.found: list[Gap] = []  # since somebody took them
        self._trades = self._gaps = self._missed = self._duplicates = self._disorder = self._restarts = 0

    def stats(self) -> SequenceStats:
        """The counts of all symbols together."""
        counts = self._trades, self._gaps, self._missed, self._duplicates, self._disorder, self._restarts
        return SequenceStats(*counts)

    __repr__ = stats_repr

    def reconnected(self) -> None:
        """Frames are counted from anew; the trades' ids and sequences go on."""
        self._frame = self._frames_missing = None

    def ends(self) -> dict[str, int | None]:
        """The time of each symbol's newest trade."""
        return {symbol: seen.at for symbol, seen in self._seen.items()}

    def check(self, parsed: Parsed) -> list[Trade]:
        """The frame's trades, labelled. Give it every frame, those without trades too."""
        if parsed.sequence is not None:
            last = self._frame
            if last is not None and parsed.sequence > last + 1:
                self._gaps += 1
                self._missed += parsed.sequence - last - 1
                self._frames_missing = last + 1, parsed.sequence - 1
            if last is None or parsed.sequence > last:
                self._frame = parsed.sequence
        return [self.label(trade) for trade in parsed.trades]

    def label(self, trade: Trade) -> Trade:
        """The same trade, with what is found added to its flags."""
        self._trades += 1
        seen = self._seen.get(trade.symbol)
        if seen is None:
            seen = self._seen[trade.symbol] = _Seen()
        number = trade.trade_id
        if number:
            if number in seen.ids:
                self._duplicates += 1
                return flagged(trade, "duplicate")
            seen.ids.add(number)
            seen.order.append(number)
            if len(seen.order) > self._remembered:
                seen.ids.discard(seen.order.popleft())
        found = ""
        sequence = trade.sequence
        if sequence is None:
            if trade.ts_event < seen.latest:
                self._disorder += 1
                found = "disorder"
            else:
                seen.latest = trade.ts_event
        elif seen.high is None or sequence == seen.high + 1:
            seen.high, seen.run = sequence, 0
        elif sequence > seen.high:
            self._gaps += 1
            self._missed += sequence - seen.high - 1
            self.found.append(Gap(trade.symbol, seen.at, trade.ts_event, (seen.high + 1, sequence - 1), "sequence"))
            seen.high, seen.run = sequence, 0
            found = "gap"
        else:
            self._disorder += 1
            found = "disorder"
            self._below(seen, sequence)
        if self._frames_missing:
            self.found.append(Gap(trade.symbol, seen.at, trade.ts_event, self._frames_missing, "frame numbers"))
            self._frames_missing = None
            found = f"gap,{found}" if found and found != "gap" else "gap"
        seen.at = trade.ts_event
        return flagged(trade, found) if found else trade

    def _below(self, seen: _Seen, sequence: int) -> None:
        seen.run = seen.run + 1 if sequence == seen.latest + 1 else 1
        seen.latest = sequence
        if seen.run >= self.RESTARTED:
            self._restarts += 1
            seen.high, seen.run = sequence, 0


def flagged(trade: Trade, found: str) -> Trade:
    """The same trade with one more flag."""
    return trade._replace(flags=f"{trade.flags},{found}" if trade.flags else found)
