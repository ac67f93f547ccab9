"""A trade of any exchange in one form, and the pure functions that make its fields of what exchanges write.

Promised:

* Price and size are finite and positive. Their text is the exchange's, digit by digit, where it sends text; where it
  sends JSON numbers (Kraken, Bitfinex, Alpaca, Finnhub), it is the shortest decimal that gives that double,
  which is the number itself up to 15 digits (trailing zeros are not kept). Never an exponent.
* The time of a trade is after 2009 and at most a minute ahead of `received_ns`.
* `side` is the taker's: "buy" if the aggressor bought. Each adapter says how its exchange puts it, and where that is
  written. `size` is in units of the base currency.

What is wrong raises `BadFrame` with the reason. There is no state and no clock here.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

SECOND = 1_000_000_000  # in nanoseconds
EARLIEST_NS = 1_230_768_000 * SECOND  # 2009-01-01, before which there was nothing to trade
AHEAD_NS = 60 * SECOND  # how far an exchange's clock may be ahead of ours
UNPACKED_LIMIT = 4 << 20  # bytes of a compressed frame
NOTE_LIMIT = 200  # characters of an exchange's message, or of a reason

Side = Literal["buy", "sell", ""]
FrameKind = Literal["trades", "ack", "heartbeat", "status", "error", "ignored"]


class BadFrame(ValueError):
    """The frame is not what the exchange's documentation allows; the text says why."""


class Trade(NamedTuple):
    """A trade of any exchange, as the head of this file promises."""

    exchange: str
    symbol: str  # "BTC-USD"
    price: str  # exact, without exponent
    size: str  # exact, in the base currency
    price_value: float
    size_value: float
    side: Side  # the taker's; "" where the feed does not say
    trade_id: str  # "" if the feed has none
    ts_event: int
    ts_recv: int
    sequence: int | None  # per symbol, contiguous where the feed is complete; None if the feed has none
    flags: str  # "", or of "snapshot", "gap", "duplicate", "disorder", joined with ","


class Parsed(NamedTuple):
    """What a frame came to."""

    trades: list[Trade]
    kind: FrameKind  # "ignored": known and not needed
    note: str = ""  # the exchange's text: of an error, of a maintenance
    sequence: int | None = None  # the frame's number, contiguous over the connection (Bitfinex only)
    reconnect: bool = False  # the exchange asks for that, or is about to close
    bad: Sequence[tuple[str, bytes]] = ()  # of each bad trade among good ones: why, and a frame of that trade alone


SYMBOL = re.compile(r"[A-Z0-9.]{1,20}-[A-Z0-9]{2,10}").fullmatch  # matches "BTC-USD"
PLAIN_NUMBER = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,36})?").fullmatch  # matches a decimal without sign and exponent
_SCIENTIFIC = re.compile(r"\+?([0-9]{0,18})(?:\.([0-9]{0,36}))?(?:[eE]([+-]?[0-9]{1,2}))?").fullmatch
_DIGITS = re.compile(r"[0-9]{1,18}").fullmatch
_MILLISECONDS = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?").fullmatch
_ISO = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:Z|\+00:00)").fullmatch
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")  # C0, DEL, C1, bidi
_ID = re.compile(r"[!-~]{1,64}").fullmatch


def short(text: object) -> str:
    """An exchange's text, fit to be logged, stored and shown: short, and without what steers a terminal."""
    return _STEERING.sub("\ufffd", str(text)[:NOTE_LIMIT]).encode("utf-8", "backslashreplace").decode()


def unknown(what: object) -> BadFrame:
    """To be raised for a message that the documentation does not have."""
    return BadFrame(f"unknown message: {short(what)}")


def decimal(value: object) -> str:
    """A number, or text of one, as plain decimal text: not negative, no exponent. `BadFrame` if it is none."""
    if type(value) is float or type(value) is int:
        value = repr(value)
    if type(value) is not str:
        raise BadFrame(f"{type(value).__name__} instead of a number")
    if PLAIN_NUMBER(value):
        return value
    match = _SCIENTIFIC(value)
    if match is None or not (match[1] or match[2]):
        raise BadFrame(f"not a positive number: {short(value)}")
    digits, point = match[1] + (match[2] or ""), len(match[1]) + int(match[3] or 0)
    digits, point = ("0" * -point + digits, 0) if point < 0 else (digits.ljust(point, "0"), point)
    whole, fraction = digits[:point].lstrip("0") or "0", digits[point:]
    text = f"{whole}.{fraction}" if fraction else whole
    if not PLAIN_NUMBER(text):
        raise BadFrame(f"not a plausible number: {short(value)}")
    return text


def milliseconds(value: object) -> int:
    """Nanoseconds of Unix time from milliseconds: an int, or text, that may have a fraction."""
    if type(value) is int:
        return value * 1_000_000
    if type(value) is float:
        value = repr(value)
    match = _MILLISECONDS(value) if type(value) is str else None
    if match is None:
        raise BadFrame(f"not a time in milliseconds: {short(value)}")
    return int(match[1]) * 1_000_000 + (int(match[2].ljust(9, "0")) // 1000 if match[2] else 0)


@functools.lru_cache(1024)
def _seconds(text: str) -> int:
    return int(datetime.fromisoformat(text + "+00:00").timestamp()) * SECOND


def parse_iso_time(value: object) -> int:
    """Nanoseconds of Unix time from RFC 3339 text in UTC, to the nanosecond."""
    match = _ISO(value) if type(value) is str else None
    if match is None:
        raise BadFrame(f"not a time: {short(value)}")
    return _seconds(match[1]) + (int(match[2].ljust(9, "0")) if match[2] else 0)


def identity(value: object) -> str:
    """A trade's id as text, from a number or text."""
    if type(value) is int and value >= 0:
        return str(value)
    if type(value) is str and _ID(value):
        return value
    raise BadFrame(f"not an id: {short(value)}")


def sequence_number(value: object) -> int:
    """A sequence number, from a number or text."""
    if type(value) is int and 0 <= value < 1 << 63:
        return value
    if type(value) is str and _DIGITS(value):
        return int(value)
    raise BadFrame(f"not a sequence number: {short(value)}")


def gunzip(data: bytes) -> bytes:
    """No exchange here compresses its frames (only WebSocket itself does); one that begins to is still understood."""
    unpacker = zlib.decompressobj(31)
    found = unpacker.decompress(data, UNPACKED_LIMIT)
    if not unpacker.eof or unpacker.unused_data:
        raise BadFrame("a gzip frame that is cut off, too large or followed by something")
    return found


def in_order(trades: list[Trade], newest_first: bool = False) -> list[Trade]:
    """A snapshot, oldest first. `newest_first`: how the exchange has it, where the times are too coarse to tell."""
    if len(trades) > 1:
        first, last = trades[0].ts_event, trades[-1].ts_event
        if first > last or (first == last and newest_first):
            trades.reverse()
    return trades


def expect_list(value: object) -> list[Any]:
    """The value, if it is a list; else ``BadFrame``."""
    if type(value) is not list:
        raise BadFrame(f"{type(value).__name__} instead of a list")
    return value
