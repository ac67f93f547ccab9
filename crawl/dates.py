"""Dates as feeds and articles write them, read strictly: one that is not of a known form from end to end is none.

Pure, and linear in the text, of which 64 characters are looked at.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from functools import lru_cache

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY_NAME = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?\.?,? )?"
_OFFSET = r"(?:gmt|utc?)?(?P<sign>[+-])(?P<hours>\d\d?)(?::?(?P<minutes>\d\d))?"
_TIME = r"(?P<hour>\d\d?):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,]\d+)?)?"
_ZONE = rf"(?: ?(?:{_OFFSET}|(?P<zone>[a-z]{{1,4}})))?(?: \([^()]*\))?"
_FORMS = tuple(
    re.compile(form, re.ASCII)
    for form in (
        # ISO 8601, RFC 3339, W3C's profile; 2024/12/25, 2024.12.25: after the year comes the month.
        rf"{_DAY_NAME}(?P<year>\d{{4}})(?P<between>[-/.])(?P<month>\d\d?)(?P=between)(?P<day>\d\d?)"
        rf"(?:(?:t| )(?:{_TIME}){_ZONE})?",
        r"(?P<year>\d{4})(?:-(?P<month>\d\d))?",
        r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)"
        rf"(?:t(?P<hour>\d\d)(?P<minute>\d\d)(?P<second>\d\d)?(?:[.,]\d+)?{_ZONE})?",
        # RFC 822, 850, 2822, 5322
        rf"{_DAY_NAME}(?P<day>\d\d?)[- ]{_MONTH}[- ,] ?(?P<year>\d{{4}}|\d\d)(?:,? {_TIME}{_ZONE})?",
        rf"{_DAY_NAME}{_MONTH} (?P<day>\d\d?),? (?P<year>\d{{4}})(?:,? {_TIME}{_ZONE})?",
        rf"{_DAY_NAME}{_MONTH} (?P<day>\d\d?) {_TIME}{_ZONE} (?P<year>\d{{4}})",  # C's asctime
    )
)


# Those of RFC 822, but for the military ones (RFC 2822: most got them wrong), and those that mean one thing only.
_ZONES = {"z": 0, "ut": 0, "utc": 0, "gmt": 0, "wet": 0, "west": 1, "cet": 1, "cest": 2, "met": 1, "mest": 2, "eet": 2}
_ZONES |= {"eest": 3, "jst": 9, "est": -5, "edt": -4, "cst": -6, "cdt": -5, "mst": -7, "mdt": -6, "pst": -8, "pdt": -7}


@lru_cache(1 << 12)
def iso_utc(text: str) -> str | None:
    """A date of ISO 8601, of e-mail or the like as ISO 8601 in UTC, one without a zone taken for UTC.

    None unless all of the text is such a date: a day before a month, a number of seconds, an unknown zone or language
    would be guesses.  "2024" and "2024-05", which W3C's profile of ISO 8601 allows, are the beginning of that year or
    month; a year of two digits is of 1950 to 2049 (RFC 5322).  The weekday's name adds nothing, so it decides nothing.
    """
    text = " ".join(text.lower().split()) if len(text) <= 64 else ""
    found = next((match for form in _FORMS if (match := form.fullmatch(text))), None)
    if found is None:
        return None
    part = {name: value for name, value in found.groupdict().items() if value is not None}
    month, zone = part.get("month", "1"), part.get("zone", "z")
    hour, minute, second = (int(part.get(name, 0)) for name in ("hour", "minute", "second"))
    hours, minutes = (int(part.get("sign", "+") + part.get(name, "0")) for name in ("hours", "minutes"))
    midnight = (hour, minute, second) == (24, 0, 0)  # the end of the day, in ISO 8601
    if zone not in _ZONES or minute > 59 or second > 60 or abs(hours) > 23 or abs(minutes) > 59:
        return None
    if hour > 23 and not midnight:
        return None
    year = int(part["year"])
    try:
        day = datetime(
            year + (0 if len(part["year"]) == 4 else 2000 if year < 50 else 1900),
            int(month) if month.isdecimal() else _MONTHS.index(month[:3]) + 1,
            int(part.get("day", "1")),
        )
        when = day + timedelta(hours=hour - hours - _ZONES[zone], minutes=minute - minutes, seconds=second)
    except (ValueError, OverflowError):
        return None
    return when.isoformat(timespec="seconds") + "Z"
