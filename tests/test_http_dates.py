"""runtime/http_dates.py: rows of RFC 9110, and rubbish."""

from __future__ import annotations

import calendar
import importlib
import importlib.machinery
import importlib.util
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import http_dates
from tests.helpers.base import SETTINGS

NOW = float(calendar.timegm((2026, 1, 1, 0, 0, 0)))


WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


@pytest.fixture(params=["UTC0", "EST5EDT,M3.2.0,M11.1.0", "<+0545>-5:45"], ids=["UTC", "New York", "Kathmandu"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The rules of the zones themselves, so that no time zone database is needed."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    assert time.timezone == {"U": 0, "E": 5 * 3600, "<": -20700}[request.param[0]]
    yield request.param
    monkeypatch.undo()
    time.tzset()


def imf(date: time.struct_time) -> str:
    day, month = WEEKDAYS[date.tm_wday][:3], MONTHS[date.tm_mon - 1]
    return f"{day}, {date.tm_mday:02} {month} {date.tm_year:04} {clock_time(date)} GMT"


def rfc850(date: time.struct_time) -> str:
    day, month = WEEKDAYS[date.tm_wday], MONTHS[date.tm_mon - 1]
    return f"{day}, {date.tm_mday:02}-{month}-{date.tm_year % 100:02} {clock_time(date)} GMT"


def prim_asctime(date: time.struct_time) -> str:
    day, month = WEEKDAYS[date.tm_wday][:3], MONTHS[date.tm_mon - 1]
    return f"{day} {month} {date.tm_mday:2} {clock_time(date)} {date.tm_year:04}"


def clock_time(date: time.struct_time) -> str:
    return f"{date.tm_hour:02}:{date.tm_min:02}:{date.tm_sec:02}"


@pytest.mark.parametrize(
    ("value", "utc"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", (1994, 11, 6, 8, 49, 37)),  # the three examples of RFC 9110, 5.6.7
        ("Sunday, 06-Nov-94 08:49:37 GMT", (1994, 11, 6, 8, 49, 37)),
        ("Sun Nov  6 08:49:37 1994", (1994, 11, 6, 8, 49, 37)),
        ("Wed Nov 16 08:49:37 1994", (1994, 11, 16, 8, 49, 37)),
        ("Thu, 01 Jan 1970 00:00:00 GMT", (1970, 1, 1, 0, 0, 0)),
        ("Wed, 31 Dec 1969 23:59:59 GMT", (1969, 12, 31, 23, 59, 59)),
        ("Sun, 08 Mar 2026 02:30:00 GMT", (2026, 3, 8, 2, 30, 0)),  # an hour that New York does not have
        ("Sun, 01 Nov 2026 01:30:00 GMT", (2026, 11, 1, 1, 30, 0)),  # and one that it has twice
        ("Wed, 01 Jul 2026 12:00:00 GMT", (2026, 7, 1, 12, 0, 0)),
        ("Thu, 29 Feb 2024 00:00:00 GMT", (2024, 2, 29, 0, 0, 0)),
        ("Sat, 31 Dec 2016 23:59:60 GMT", (2017, 1, 1, 0, 0, 0)),  # a leap second
        ("Fri, 31 Dec 9999 23:59:59 GMT", (9999, 12, 31, 23, 59, 59)),
        ("Mon, 01 Jan 0001 00:00:00 GMT", (1, 1, 1, 0, 0, 0)),
    ],
)
def test_http_date(value: str, utc: tuple[int, ...], zone: str) -> None:
    assert http_dates.parse_http_date(value, NOW) == calendar.timegm(utc)


@pytest.mark.parametrize(
    ("today", "value", "year"),
    [
        ((2026, 6, 1), "Thursday, 01-Jan-26 00:00:00 GMT", 2026),
        ((2026, 6, 1), "Friday, 01-Jan-27 00:00:00 GMT", 2027),
        ((2026, 6, 1), "Saturday, 01-Jan-00 00:00:00 GMT", 2000),
        ((2026, 6, 1), "Wednesday, 01-Jan-76 00:00:00 GMT", 2076),  # 49 years and 7 months ahead
        ((2026, 6, 1), "Monday, 01-Jun-76 00:00:00 GMT", 2076),  # 50 years ahead, to the second
        ((2026, 6, 1), "Tuesday, 01-Jun-76 00:00:01 GMT", 1976),  # more than 50 years ahead
        ((2026, 6, 1), "Friday, 31-Dec-76 00:00:00 GMT", 1976),
        ((2026, 6, 1), "Sunday, 01-Jan-77 00:00:00 GMT", 1977),
        ((2026, 6, 1), "Friday, 31-Dec-99 00:00:00 GMT", 1999),
        ((1999, 12, 31), "Friday, 31-Dec-99 00:00:00 GMT", 1999),
        ((1999, 12, 31), "Saturday, 01-Jan-00 00:00:00 GMT", 2000),  # tomorrow
        ((2100, 1, 1), "Thursday, 31-Dec-99 00:00:00 GMT", 2099),  # yesterday
    ],
)
def test_two_digit_years_are_the_nearest(today: tuple[int, int, int], value: str, year: int) -> None:
    now = calendar.timegm((*today, 0, 0, 0))
    date = http_dates.parse_http_date(value, now)
    assert date is not None
    assert time.gmtime(date).tm_year == year


def test_reads_what_servers_send() -> None:
    for text in ("Mon, 3 Jun 2019 12:00:00 UTC", "Mon, 03 Jun 2019 12:00:00 UTC", "Mon, 3 Jun 2019 12:00:00 GMT"):
        assert http_dates.parse_http_date(text, 0.0) == 1559563200.0
        assert http_dates.parse_retry_after(text, 1559563140.0) == 60.0


NOT_DATES = [
    "Fri, 32 Jan 2026 00:00:00 GMT",
    "Fri, 00 Jan 2026 00:00:00 GMT",
    "Sun, 29 Feb 2026 00:00:00 GMT",
    "Fri, 31 Apr 2026 00:00:00 GMT",
    "Sunday, 29-Feb-26 00:00:00 GMT",
    "Fri Jan  0 00:00:00 2026",
    "Fri Jan 32 00:00:00 2026",
    "Fri Feb 29 00:00:00 2026",
    "Fri, 02 Foo 2026 00:00:00 GMT",
    "Fri, 02 jan 2026 00:00:00 GMT",
    "Fri, 02 Mai 2026 00:00:00 GMT",
    "Fri, 02 Jan 2026 24:00:00 GMT",
    "Fri, 02 Jan 2026 00:60:00 GMT",
    "Fri, 02 Jan 2026 00:00:61 GMT",
    "Fri, 02 Jan 2026 00:00:00 +0000",
    "Fri, 02 Jan 2026 00:00:00",
    "Fri, 02 Jan 2026 00:00:00 GMT;",
    "Fri, 02 Jan 2026 00:00:00 GMT\n",
    "Fri, 2 Jan 2026 00:00:00 CET",
    "Fri, 002 Jan 2026 00:00:00 GMT",
    "Fri, 02 Jan 26 00:00:00 GMT",
    "Fri, 02 Jan 0000 00:00:00 GMT",
    "Fri, 02 Jan 20261 00:00:00 GMT",
    "Fri, 0٢ Jan 2026 00:00:00 GMT",
    "Fri, 02 Jan ２０２６ 00:00:00 GMT",
    "Friday, 02-Jan-2026 00:00:00 GMT",
    "Fri Jan 2 00:00:00 2026",
    "2026-01-02T00:00:00Z",
    "02 Jan 2026 00:00:00 GMT",
]


@pytest.mark.parametrize("value", NOT_DATES)
def test_http_date_refuses(value: str) -> None:
    assert http_dates.parse_http_date(value, NOW) is None
    assert http_dates.parse_retry_after(value.strip(), NOW) is None or value.endswith("\n")


INSTANTS = st.integers(calendar.timegm((1, 1, 1, 0, 0, 0)), calendar.timegm((9999, 12, 31, 23, 59, 59)))


@settings(SETTINGS, max_examples=150)
@given(INSTANTS, INSTANTS)
def test_http_date_round_trip_of_the_four_digit_forms(instant: int, now: int) -> None:
    date = time.gmtime(instant)
    assert http_dates.parse_http_date(imf(date), now) == instant
    assert http_dates.parse_http_date(prim_asctime(date), now) == instant
    if date.tm_year >= 1900:
        assert time.asctime(date) == prim_asctime(date)  # the form that C writes


@settings(SETTINGS, max_examples=150)
@given(st.integers(calendar.timegm((1980, 1, 1, 0, 0, 0)), calendar.timegm((2150, 1, 1, 0, 0, 0))), st.data())
def test_http_date_round_trip_of_the_two_digit_form(now: int, data: st.DataObject) -> None:
    years = 49 * 365 * 86400
    instant = now + data.draw(st.integers(-years, years))
    assert http_dates.parse_http_date(rfc850(time.gmtime(instant)), now) == instant


def test_http_date_does_not_depend_on_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """``calendar.month_abbr`` speaks the language that the program chose; HTTP speaks English."""
    monkeypatch.setattr(calendar, "month_abbr", ["", *(f"{name}." for name in MONTHS)])
    spec = importlib.util.spec_from_file_location("prim_elsewhere", http_dates.__file__)
    assert spec is not None and spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, elsewhere)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.parse_http_date("Thu, 01 Jan 2026 00:00:00 GMT", 0.0) == NOW


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("1", 1.0),
        ("120", 120.0),
        (" 5\t", 5.0),
        ("007", 7.0),
        ("0000000005", 5.0),
        ("3599", 3599.0),
        ("3600", 3600.0),
        ("3601", 3600.0),
        ("999999999", 3600.0),
        ("9999999999", 3600.0),
        ("9" * 5000, 3600.0),
        ("Thu, 01 Jan 2026 00:02:00 GMT", 120.0),
        ("Thursday, 01-Jan-26 00:02:00 GMT", 120.0),
        ("Thu Jan  1 00:02:00 2026", 120.0),
        ("\t Thu Jan  1 00:02:00 2026 ", 120.0),
        ("Thu, 01 Jan 2026 00:00:00 GMT", 0.0),
        ("Wed, 31 Dec 2025 23:59:59 GMT", 0.0),
        ("Wednesday, 31-Dec-25 23:59:59 GMT", 0.0),
        ("Sun Nov  6 08:49:37 1994", 0.0),
        ("Thu, 01 Jan 2026 01:00:00 GMT", 3600.0),
        ("Thu, 01 Jan 2026 01:00:01 GMT", 3600.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
    ],
)
def test_retry_after(value: str, seconds: float, zone: str) -> None:
    assert http_dates.parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            "",
            " ",
            "\t",
            "-1",
            "+5",
            "1.5",
            "1e3",
            "0x10",
            "1_000",
            "5 s",
            "5,6",
            "5\n",
            "5\x00",
            "soon",
            "inf",
            "nan",
        ),
        *("٣", "５", "²", "1٣", "\xa05", "Thu, 01 Jan 2026", "Thu, 01 Jan 2026 00:02:00 GMT, 5"),
    ],
)
def test_retry_after_refuses(value: str | None) -> None:
    assert http_dates.parse_retry_after(value, NOW) is None


def test_retry_after_takes_its_own_maximum_and_the_clock_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert http_dates.parse_retry_after("61", NOW, maximum=60.0) == 60.0
    assert http_dates.parse_retry_after("Thu, 01 Jan 2026 00:02:00 GMT", NOW, maximum=60.0) == 60.0
    assert http_dates.parse_retry_after("86400", NOW, maximum=1e6) == 86400.0
    monkeypatch.setattr(http_dates, "time", SimpleNamespace(time=lambda: NOW + 30.0, gmtime=time.gmtime))
    assert http_dates.parse_retry_after("Thu, 01 Jan 2026 00:02:00 GMT") == 90.0


@SETTINGS
@given(st.text(alphabet="0123456789+-., :GMTJanFebSunday٣５\xa0\n\x00"))
def test_retry_after_never_raises(value: str) -> None:
    wait = http_dates.parse_retry_after(value, NOW)
    assert wait is None or 0.0 <= wait <= 3600.0
