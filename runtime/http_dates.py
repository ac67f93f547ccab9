"""HTTP dates, and what a Retry-After header asks for (RFC 9110, sections 5.6.7 and 10.2.3)."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TIME = r"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_HTTP_DATES = (
    re.compile(
        rf"[A-Z][a-z]{{2}}, (?P<day>\d\d?) (?P<month>[A-Z][a-z]{{2}}) (?P<year>\d{{4}}) {_TIME} (GMT|UTC)", re.A
    ),
    re.compile(rf"[A-Z][a-z]+day, (?P<day>\d\d)-(?P<month>[A-Z][a-z]{{2}})-(?P<year>\d\d) {_TIME} GMT", re.A),
    re.compile(rf"[A-Z][a-z]{{2}} (?P<month>[A-Z][a-z]{{2}}) (?P<day>[ \d]\d) {_TIME} (?P<year>\d{{4}})", re.A),
)


def parse_http_date(value: str, now: float) -> float | None:
    """Unix time of an HTTP date in any of its three forms, or None if it is none of them.

    IMF-fixdate (also, as servers send it, with a day of one digit, or UTC), RFC 850 and asctime (RFC 9110, section
    5.6.7), always UTC whatever the local time zone. The two-digit year of the RFC 850 form is the one that lies at
    most 50 years after ``now`` (Unix time).
    """
    match = next(filter(None, (pattern.fullmatch(value) for pattern in _HTTP_DATES)), None)
    if match is None or match["month"] not in _MONTHS:
        return None
    year, day, hour, minute, second = (int(match[part]) for part in ("year", "day", "hour", "minute", "second"))
    month = _MONTHS.index(match["month"]) + 1
    if len(match["year"]) == 2:
        today = time.gmtime(now)
        year += (today.tm_year + 50) // 100 * 100
        if (year, month, day, hour, minute, second) > (today.tm_year + 50, *today[1:6]):
            year -= 100
    try:  # 60 is a leap second, which datetime does not know
        return datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp() + second if second <= 60 else None
    except ValueError:
        return None


def parse_retry_after(value: str | None, now: float | None = None, maximum: float = 3600.0) -> float | None:
    """Seconds to wait, between 0 and ``maximum``, that a ``Retry-After`` header asks for; None if it is invalid.

    Both forms of RFC 9110, section 10.2.3: delay seconds, or an HTTP date. ``now`` is Unix time (default: the
    system's). A date in the past means 0.
    """
    text = (value or "").strip(" \t")
    if text.isascii() and text.isdigit():
        return maximum if len(text.lstrip("0")) > 9 else min(maximum, float(text))
    now = time.time() if now is None else now
    date = parse_http_date(text, now)
    return None if date is None else min(maximum, max(0.0, date - now))
