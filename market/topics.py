"""What is in the topics of Kafka, and the lines of the spool: records, and what they say. Pure, but for the log.

Topics (behind a prefix of the user's): ``trades`` (key: the symbol; value: the fields of ``Trade`` by name, JSON),
``analytics`` (key: the symbol; value: the row's fields, JSON), ``dead-letter`` (no key; value: the raw frame as it
came; who, why, when and what kind are headers) and ``market-events`` (key: the symbol; value: a ``MarketEvent``, JSON).
Every record has the header ``schema``. Trades of schema 1, with other names for the times, are still read.

What cannot be a record becomes a dead letter, whoever wrote it; nothing here raises for what a topic or a file holds.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import orjson

from coordination import Clock
from market.trade import SYMBOL, Trade, short

log = logging.getLogger("market_pipeline")

SCHEMA = b"2"  # the version in the header ``schema``: times are ``ts_event`` and ``ts_recv``
OLD_NAMES = {"exchange_ts_ns": "ts_event", "received_ts_ns": "ts_recv"}  # what schema 1 called them
TRADES, ANALYTICS, DEAD_LETTERS, EVENTS = "trades", "analytics", "dead-letter", "market-events"
LARGEST_RECORD = 900_000  # bytes of a value; Kafka's own default for a batch is 1,048,588
LARGEST_CONTEXT = 40_000  # characters of a dead letter's: those of some 1,000 symbols
THROTTLE_FOR = 60.0  # seconds for which aiokafka is not heard again after it complained
BACK_OFF = 0.1, 5.0  # seconds before trying again, and at most


LetterKind = Literal["text", "binary", "trade"]
Headers = list[tuple[str, bytes]]


class DeadLetter(NamedTuple):
    """What could not be parsed or published: bytes, and why."""

    exchange: str
    error: str
    raw: bytes
    ts_recv: int  # when it came, epoch
    kind: LetterKind
    """``text``: a frame that was text, as UTF-8; ``trade``: a trade that could not be published, as JSON or repr."""
    context: str = ""
    """What the adapter knew of its connection (``Adapter.context``): a frame may mean nothing without it."""


class MarketEvent(NamedTuple):
    """Evidence of what a feed left out, for a symbol: what its trades themselves cannot tell.

    gap: trades are, or may be, missing between those of ``begin`` and ``end``, the exchange's times. disconnect: from
    ``begin`` on, by our clock, nothing comes; reconnect: since ``end`` it does again. back-fill: a snapshot brought
    trades that were not known, of the exchange's times from ``begin`` to ``end``.
    """

    event: Literal["gap", "disconnect", "reconnect", "back-fill"]
    exchange: str
    symbol: str
    begin: int | None  # Unix time in ns; "from" and "to" in JSON; None: not known
    end: int | None
    sequence: tuple[int, int] | None  # the first and the last that are missing, or were filled in
    cause: str

    def record(self) -> dict[str, object]:
        """As JSON has it."""
        names = "event", "exchange", "symbol", "from", "to", "sequence", "cause"
        return dict(zip(names, self, strict=True))


class Record(NamedTuple):
    """A record as Kafka has it."""

    topic: str
    key: bytes | None
    value: bytes
    at: int  # epoch, ms
    headers: Headers


_FIELDS = Trade._fields
_TYPES = {(*(str,) * 4, float, float, str, str, int, int, sequence, str) for sequence in (int, type(None))}
_EXCHANGE = re.compile(r"[a-z0-9._-]{1,40}").fullmatch
_PLAIN_KEY = re.compile(rb"[!-~]+").fullmatch
HEADERS: Headers = [("schema", SCHEMA)]
HEADERS_BEFORE: Headers = [("schema", b"1")]  # of a trade that an older version left in the spool
Item = Trade | DeadLetter | MarketEvent


def encode(trade: Trade) -> bytes:
    """The value of a trade. Raises ``TypeError`` or ``ValueError`` if there is none."""
    return orjson.dumps(dict(zip(_FIELDS, trade, strict=True)))


def decode(value: bytes) -> Trade:
    """The trade of a value, whoever wrote it, in this schema or the one before. ``ValueError`` if it is none."""
    trade = _decode(value)
    if not (SYMBOL(trade.symbol) and _EXCHANGE(trade.exchange)):
        raise ValueError(f"not a symbol of an exchange: {short(trade.symbol)} of {short(trade.exchange)}")
    return trade


def _decode(value: bytes) -> Trade:
    try:
        found = orjson.loads(value)
        if "exchange_ts_ns" in found:
            found = {OLD_NAMES.get(name, name): each for name, each in found.items()}
        trade = Trade(**found)
    except TypeError as error:
        raise ValueError(f"not a trade: {error}") from error
    if tuple(map(type, trade)) not in _TYPES:
        raise ValueError("not a trade: the types of its fields")
    return trade


def unpublishable(item: object, error: BaseException | str, topic: str) -> Record:
    """The dead letter, as a record, of what cannot be published: a trade, or bytes that may be the value of one."""
    return dead_letter_record(unpublishable_letter(item, error), topic)


def unpublishable_letter(item: object, error: BaseException | str) -> DeadLetter:
    """The same, as a dead letter."""
    exchange = getattr(item, "exchange", "")
    if isinstance(item, bytes):
        with contextlib.suppress(ValueError):
            exchange = decode(item).exchange
    raw = item if isinstance(item, bytes) else repr(item).encode("utf-8", "backslashreplace")
    return DeadLetter(exchange if isinstance(exchange, str) else "", str(error), raw, time.time_ns(), "trade")


def _plain(text: str) -> bytes:
    return text[:500].encode("utf-8", "backslashreplace")


def dead_letter_record(letter: DeadLetter, topic: str) -> Record:
    """The record of a dead letter; what is above ``LARGEST_RECORD`` is cut."""
    raw = letter.raw
    error = letter.error[:400]
    if len(raw) > LARGEST_RECORD:
        raw, error = raw[:LARGEST_RECORD], f"{error} (cut: it had {len(raw)} bytes)"
    headers = [
        *HEADERS,
        ("exchange", _plain(letter.exchange)),
        ("error", _plain(error)),
        ("ts_recv", str(letter.ts_recv).encode()),
        ("kind", letter.kind.encode()),
        *([("context", letter.context.encode())] if 0 < len(letter.context) <= LARGEST_CONTEXT else []),
    ]
    return Record(topic, None, raw, max(0, letter.ts_recv // 1_000_000), headers)


def letter_of_record(value: bytes | None, headers: Iterable[tuple[str, bytes]]) -> DeadLetter:
    """The dead letter of a record, whoever wrote it."""
    said = {name: (text or b"").decode("utf-8", "replace") for name, text in headers}
    ts_recv, kind = said.get("ts_recv") or said.get("at_ns", ""), said.get("kind")
    return DeadLetter(
        said.get("exchange", ""),
        said.get("error", ""),
        value or b"",
        int(ts_recv) if ts_recv.isascii() and ts_recv.isdigit() and len(ts_recv) < 20 else 0,
        "text" if kind == "text" else "trade" if kind == "trade" else "binary",
        said.get("context", ""),
    )


def trade_record(trade: Trade, topic: str) -> Record:
    """Raises ``TypeError``, ``ValueError`` or ``AttributeError`` for what can be no record."""
    value = encode(trade)
    if len(value) > LARGEST_RECORD:
        raise ValueError(f"a record of {len(value)} bytes")
    at = trade.ts_recv // 1_000_000
    if type(at) is not int or not 0 <= at < 1 << 62:
        raise ValueError(f"ts_recv is {trade.ts_recv!r}")
    return Record(topic, trade.symbol.encode(), value, at, HEADERS)


def record_of(item: Item, trades: str, dead_letters: str, events: str = EVENTS) -> Record:
    """The record of an item, for the topics of these names; a dead letter if there is none."""
    if isinstance(item, DeadLetter):
        return dead_letter_record(item, dead_letters)
    if isinstance(item, MarketEvent):
        at = time.time_ns() // 1_000_000
        return Record(events, item.symbol.encode(), orjson.dumps(item.record()), at, HEADERS)
    try:
        return trade_record(item, trades)
    except (TypeError, ValueError, AttributeError) as error:
        return unpublishable(item, error, dead_letters)


def line_of_record(row: Record) -> bytes:
    """A line of the spool. A trade: time, key and value as Kafka gets them, so that nothing is read or written anew on
    the way back; its value alone, if the key could be taken for something else. The same after a "!": an event. A list:
    a dead letter."""
    topic, key, value, at, headers = row
    if key is not None and topic.endswith(EVENTS):
        return b"!%d\t%b\t%b" % (at, key, value)
    if key is not None:
        return b"%d\t%b\t%b" % (at, key, value) if _PLAIN_KEY(key) else value
    exchange, error, raw, ts_recv, kind, context = letter_of_record(value, headers)
    return orjson.dumps([exchange, error, base64.b64encode(raw).decode(), ts_recv, kind, context])


def record_of_line(line: bytes, trades: str, dead_letters: str, events: str = EVENTS) -> Record:
    """What ``line_of_record`` wrote, for the topics of these names; a line of another version is a dead letter."""
    try:
        if line[:1].isdigit():
            at, key, value = line.split(b"\t", 2)
            return Record(trades, key, value, int(at), HEADERS_BEFORE if b'"exchange_ts_ns":' in value else HEADERS)
        if line.startswith(b"!"):
            at, key, value = line[1:].split(b"\t", 2)
            return Record(events, key, value, int(at), HEADERS)
        if line.startswith(b"{"):
            return trade_record(_decode(line), trades)
        exchange, error, raw, ts_recv, kind, *context = orjson.loads(line)
        letter = DeadLetter(exchange, error, base64.b64decode(raw), int(ts_recv), kind, *context)
        return dead_letter_record(letter, dead_letters)
    except (ValueError, TypeError, AttributeError) as problem:
        return unpublishable(line, f"spooled by another version: {problem}", dead_letters)


def records_of(data: bytes, *topics: str) -> list[Record]:
    """``record_of_line`` of each line of the spool's data."""
    return [record_of_line(line, *topics) for line in data.split(b"\n")[:-1]]


class LogThrottle(logging.Handler):
    """aiokafka's complaints: the first is told, those of the next ``THROTTLE_FOR`` seconds are counted."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._clock, self._until, self.held_back = clock, -math.inf, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it, or count it."""
        now = self._clock()
        if now < self._until:
            self.held_back += 1
            return
        more = f" ({self.held_back} more lines were held back)" if self.held_back else ""
        self._until, self.held_back = now + THROTTLE_FOR, 0
        log.warning("kafka: %s%s", record.getMessage(), more)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While it is entered, aiokafka's logger is heard here only."""
        logger = logging.getLogger("aiokafka")
        self._until, self.held_back = -math.inf, 0
        logger.addHandler(self)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.propagate = True

    def recovered(self) -> None:
        """All is well again: the next complaint is a new one."""
        if self._until > self._clock():
            log.info("kafka: answers again (%d lines were held back)", self.held_back)
            self._until, self.held_back = -math.inf, 0


client_log = LogThrottle()
