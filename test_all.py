"""Every test, in the order of the files. Faults come from sandbox.py over real sockets on loopback; time is injected,
gates stand where sleeps would, and the same suite runs over threads and over asyncio.
"""

from __future__ import annotations

import asyncio
import base64
import calendar
import concurrent.futures
import contextlib
import csv
import dataclasses
import email.utils
import gc
import gzip
import heapq
import html
import http.client
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import queue
import random
import re
import signal
import socket
import ssl
import statistics
import string
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import urljoin, urlsplit

import ada_url
import brotli
import pytest
import trustme
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import bench
import coordination as co
import crawl_async
import crawl_threads
import html_parse
import primitives as pr
import sandbox
import sandbox as sb
from bench_peers import PARSERS
from crawl_cli import (
    EXIT_INTERRUPTED,
    EXIT_PIPE,
    EXIT_USAGE,
    Output,
    RowWriter,
    make_parser,
    parse_arguments,
    read_lines,
    read_urls,
)
from crawl_core import (
    ERROR_KINDS,
    MAX_RETRY_AFTER,
    MAX_URL,
    Crawl,
    FetchError,
    Frontier,
    FrontierStats,
    Options,
    Postponed,
    Request,
    Response,
    ScrapeResult,
    build_row,
    normalise,
    request_headers,
)
from crawl_net import BodyDecoder, ProxyRule, Resolver
from html_parse import Page, parse_page
from sandbox import FAULTS, Sandbox, status_expect

# ---------------------------------------------------------------------------------------------------------------------
# primitives.py: Retry-After, token bucket, retry, semaphore, channel
#
# Time and randomness are arguments, threads meet at gates, tasks are stepped by hand: nothing here sleeps or measures.
# A property is a function of the class under test, so that the last part can show that it refuses a planted bug.
# ---------------------------------------------------------------------------------------------------------------------


PRIM_PATIENCE = 20.0  # seconds for what must come; reached only by a failing test
PRIM_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
PRIM_HUNT = settings(PRIM_SETTINGS, max_examples=300, phases=(Phase.generate,))  # for planted bugs: found is enough


def prim_until(predicate: Callable[[], bool]) -> None:
    """Let the other threads run until the predicate holds."""
    deadline, nap = time.monotonic() + PRIM_PATIENCE, threading.Event()
    while not predicate():
        assert time.monotonic() < deadline, "it never came"
        nap.wait(0.0005)


def prim_run(main: Coroutine[Any, Any, Any]) -> Any:
    """``asyncio.run`` in debug mode; fails if the loop had anything to complain of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        return await main

    result = asyncio.run(watched(), debug=True)
    assert complaints == []
    return result


async def prim_ticks(n: int = 8) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


class PrimWorld:
    """A clock that moves when somebody sleeps, and a record of the sleeps."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.naps: list[float] = []
        self.interrupt: BaseException | None = None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        if self.interrupt is not None:
            raise self.interrupt
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)


# ------------------------------------------------------------------------------------------ dates and Retry-After

PRIM_NOW = float(calendar.timegm((2026, 1, 1, 0, 0, 0)))
PRIM_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PRIM_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


@pytest.fixture(params=["UTC0", "EST5EDT,M3.2.0,M11.1.0", "<+0545>-5:45"], ids=["UTC", "New York", "Kathmandu"])
def prim_zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The rules of the zones themselves, so that no time zone database is needed."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    assert time.timezone == {"U": 0, "E": 5 * 3600, "<": -20700}[request.param[0]]
    yield request.param
    monkeypatch.undo()
    time.tzset()


def prim_imf(date: time.struct_time) -> str:
    day, month = PRIM_WEEKDAYS[date.tm_wday][:3], PRIM_MONTHS[date.tm_mon - 1]
    return f"{day}, {date.tm_mday:02} {month} {date.tm_year:04} {prim_clock_time(date)} GMT"


def prim_rfc850(date: time.struct_time) -> str:
    day, month = PRIM_WEEKDAYS[date.tm_wday], PRIM_MONTHS[date.tm_mon - 1]
    return f"{day}, {date.tm_mday:02}-{month}-{date.tm_year % 100:02} {prim_clock_time(date)} GMT"


def prim_asctime(date: time.struct_time) -> str:
    day, month = PRIM_WEEKDAYS[date.tm_wday][:3], PRIM_MONTHS[date.tm_mon - 1]
    return f"{day} {month} {date.tm_mday:2} {prim_clock_time(date)} {date.tm_year:04}"


def prim_clock_time(date: time.struct_time) -> str:
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
def test_prim_http_date(value: str, utc: tuple[int, ...], prim_zone: str) -> None:
    assert pr.parse_http_date(value, PRIM_NOW) == calendar.timegm(utc)


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
def test_prim_two_digit_years_are_the_nearest(today: tuple[int, int, int], value: str, year: int) -> None:
    now = calendar.timegm((*today, 0, 0, 0))
    date = pr.parse_http_date(value, now)
    assert date is not None
    assert time.gmtime(date).tm_year == year


PRIM_NOT_DATES = [
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
    "Fri, 02 Jan 2026 00:00:00 UTC",
    "Fri, 02 Jan 2026 00:00:00 +0000",
    "Fri, 02 Jan 2026 00:00:00",
    "Fri, 02 Jan 2026 00:00:00 GMT;",
    "Fri, 02 Jan 2026 00:00:00 GMT\n",
    "Fri, 2 Jan 2026 00:00:00 GMT",
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


@pytest.mark.parametrize("value", PRIM_NOT_DATES)
def test_prim_http_date_refuses(value: str) -> None:
    assert pr.parse_http_date(value, PRIM_NOW) is None
    assert pr.parse_retry_after(value.strip(), PRIM_NOW) is None or value.endswith("\n")


PRIM_INSTANTS = st.integers(calendar.timegm((1, 1, 1, 0, 0, 0)), calendar.timegm((9999, 12, 31, 23, 59, 59)))


@settings(PRIM_SETTINGS, max_examples=150)
@given(PRIM_INSTANTS, PRIM_INSTANTS)
def test_prim_http_date_round_trip_of_the_four_digit_forms(instant: int, now: int) -> None:
    date = time.gmtime(instant)
    assert pr.parse_http_date(prim_imf(date), now) == instant
    assert pr.parse_http_date(prim_asctime(date), now) == instant
    if date.tm_year >= 1900:
        assert time.asctime(date) == prim_asctime(date)  # the form that C writes


@settings(PRIM_SETTINGS, max_examples=150)
@given(st.integers(calendar.timegm((1980, 1, 1, 0, 0, 0)), calendar.timegm((2150, 1, 1, 0, 0, 0))), st.data())
def test_prim_http_date_round_trip_of_the_two_digit_form(now: int, data: st.DataObject) -> None:
    years = 49 * 365 * 86400
    instant = now + data.draw(st.integers(-years, years))
    assert pr.parse_http_date(prim_rfc850(time.gmtime(instant)), now) == instant


def test_prim_http_date_does_not_depend_on_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """``calendar.month_abbr`` speaks the language that the program chose; HTTP speaks English."""
    monkeypatch.setattr(calendar, "month_abbr", ["", *(f"{name}." for name in PRIM_MONTHS)])
    spec = importlib.util.spec_from_file_location("prim_elsewhere", pr.__file__)
    assert spec is not None and spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, elsewhere)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.parse_http_date("Thu, 01 Jan 2026 00:00:00 GMT", 0.0) == PRIM_NOW


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
def test_prim_retry_after(value: str, seconds: float, prim_zone: str) -> None:
    assert pr.parse_retry_after(value, PRIM_NOW) == seconds


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
def test_prim_retry_after_refuses(value: str | None) -> None:
    assert pr.parse_retry_after(value, PRIM_NOW) is None


def test_prim_retry_after_takes_its_own_maximum_and_the_clock_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pr.parse_retry_after("61", PRIM_NOW, maximum=60.0) == 60.0
    assert pr.parse_retry_after("Thu, 01 Jan 2026 00:02:00 GMT", PRIM_NOW, maximum=60.0) == 60.0
    assert pr.parse_retry_after("86400", PRIM_NOW, maximum=1e6) == 86400.0
    monkeypatch.setattr(pr, "time", SimpleNamespace(time=lambda: PRIM_NOW + 30.0, gmtime=time.gmtime))
    assert pr.parse_retry_after("Thu, 01 Jan 2026 00:02:00 GMT") == 90.0


@PRIM_SETTINGS
@given(st.text(alphabet="0123456789+-., :GMTJanFebSunday٣５\xa0\n\x00"))
def test_prim_retry_after_never_raises(value: str) -> None:
    wait = pr.parse_retry_after(value, PRIM_NOW)
    assert wait is None or 0.0 <= wait <= 3600.0


# ----------------------------------------------------------------------------------------------- token bucket: rows

# rate, burst, and what happens: "time event = answer; ..."; "book" and "cancel" name their reservation
PRIM_BUCKET_ROWS: dict[str, tuple[float, float, str]] = {
    "burst, then one by one": (
        10,
        3,
        "0 reserve 1 = 0; 0 reserve 1 = 0; 0 reserve 1 = 0; 0 reserve 1 = 0.1; 0 reserve 1 = 0.2; 0 reserve 1 = 0.3",
    ),
    "refill": (
        1,
        2,
        "0 reserve 2 = 0; 0 tokens = 0; 0.5 tokens = 0.5; 0.5 reserve 1 = 0.5; 0.5 tokens = -0.5; 1.5 reserve 1 = 0.5;"
        "2 reserve 1 = 1",
    ),
    "never fuller than burst": (1, 2, "0 reserve 2 = 0; 1e6 tokens = 2; 1e6 reserve 2 = 0; 1e6 reserve 1 = 1"),
    "a burst of one": (2, 1, "0 reserve 1 = 0; 0 reserve 1 = 0.5; 0.75 reserve 1 = 0.25; 5 reserve 1 = 0"),
    "unequal sizes keep their order": (
        1,
        5,
        "0 reserve 5 = 0; 0 reserve 5 = 5; 0 reserve 1 = 6; 6 reserve 0.5 = 0.5",
    ),
    "parts of a token": (4, 1.5, "0 reserve 1.5 = 0; 0 reserve 0.5 = 0.125; 0.125 tokens = 0"),
    "wait_for books nothing": (
        1,
        2,
        "0 wait_for 1 = 0; 0 wait_for 2 = 0; 0 wait_for 12 = 10; 0 reserve 2 = 0; 0 wait_for 1 = 1; 0 wait_for 1 = 1;"
        "0 wait_for 2 = 2; 0.5 wait_for 1 = 0.5; 9 wait_for 1 = 0",
    ),
    "try_acquire": (
        1,
        2,
        "0 try_acquire 2 = True; 0 try_acquire 1 = False; 0 try_acquire 2 = False; 0.5 try_acquire 1 = False;"
        "1 try_acquire 2 = False; 1 try_acquire 1 = True; 1 reserve 1 = 1; 2 try_acquire 1 = False",
    ),
    "cancel gives back": (
        1,
        1,
        "0 book a 1 = 0; 0 book b 1 = 1; 0 cancel b = True; 0 book c 1 = 1; 0 book d 1 = 2;"
        "0.5 cancel d = True; 0.5 cancel c = True; 0.5 book e 1 = 0.5",
    ),
    "cancel in the middle gives nothing back": (
        1,
        1,
        "0 book a 1 = 0; 0 book b 1 = 1; 0 book c 1 = 2; 0 cancel b = False; 0 book d 1 = 3;"
        "0 cancel d = True; 0 cancel c = True; 0 book e 1 = 2",
    ),
    "cancel of what was free": (1, 2, "0 book a 2 = 0; 0 cancel a = True; 0 tokens = 2; 0 reserve 2 = 0"),
    "pause": (
        1,
        3,
        "0 reserve 1 = 0; 0 pause 10 = None; 0 wait_for 1 = 10; 0 try_acquire 1 = False; 2 reserve 1 = 8;"
        "2 reserve 1 = 9; 2 reserve 3 = 12",
    ),
    "after a pause one token is there": (
        1,
        3,
        "0 pause 10 = None; 10 tokens = 1; 10 try_acquire 1 = True; 10 try_acquire 1 = False; 11 reserve 1 = 0;"
        "14 tokens = 3",
    ),
    "a shorter pause does not end a longer one": (
        1,
        1,
        "0 pause 10 = None; 0 pause 5 = None; 0 reserve 1 = 10; 0 pause 3 = None; 0 reserve 1 = 11",
    ),
    "a pause keeps the debt": (
        1,
        1,
        "0 reserve 1 = 0; 0 reserve 1 = 1; 0 reserve 1 = 2; 0 reserve 1 = 3; 0 pause 2 = None; 0 reserve 1 = 4",
    ),
    "a pause outlives the cancellation of what was booked before": (
        1,
        1,
        "0 book a 1 = 0; 0 book b 1 = 1; 0 pause 1.5 = None; 0 cancel b = True; 1 reserve 1 = 0.5",
    ),
    "a pause holds up parts of a token too": (
        1,
        2,
        "0 pause 10 = None; 9.5 try_acquire 0.5 = False; 9.5 wait_for 0.5 = 0.5; 9.5 reserve 0.5 = 0.5;"
        "9.5 reserve 0.5 = 0.5; 9.5 reserve 0.5 = 1",
    ),
    "a clock that steps back": (
        1,
        2,
        "100 reserve 2 = 0; 50 reserve 1 = 51; 50 reserve 1 = 52; 101.5 reserve 1 = 1.5",
    ),
}


@pytest.mark.parametrize("explicit", [True, False], ids=["now=", "clock"])
@pytest.mark.parametrize("name", PRIM_BUCKET_ROWS)
def test_prim_bucket_rows(name: str, explicit: bool) -> None:
    rate, burst, rows = PRIM_BUCKET_ROWS[name]
    world = PrimWorld()
    bucket = pr.TokenBucket(rate, burst, clock=(lambda: pytest.fail("the time was given")) if explicit else world.clock)
    booked: dict[str, pr.Reservation] = {}
    for row in rows.split(";"):
        event, expected = row.split(" = ")
        time_, verb, *words = event.split()
        world.now = float(time_)
        at: dict[str, Any] = {"now": world.now} if explicit else {}
        answer: Any = None
        if verb == "book":
            booked[words[0]] = bucket.book(float(words[1]), **at)
            answer = booked[words[0]].wait
        elif verb == "cancel":
            answer = bucket.cancel(booked[words[0]])
        elif verb == "pause":
            bucket.pause(float(words[0]))
        elif verb == "tokens":
            answer = bucket.stats(**at).tokens
        else:
            answer = getattr(bucket, verb)(float(words[0]), **at)
        if isinstance(answer, float):
            assert answer == pytest.approx(float(expected), abs=1e-9), row
        else:
            assert str(answer) == expected, row


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan"), float("-inf")])
def test_prim_bucket_refuses_rates(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be a positive number of tokens per second"):
        pr.TokenBucket(rate)


@pytest.mark.parametrize("burst", [0, 0.99, -1, float("inf"), float("nan")])
def test_prim_bucket_refuses_bursts(burst: float) -> None:
    with pytest.raises(ValueError, match="burst must be a number of tokens >= 1"):
        pr.TokenBucket(1.0, burst)


@pytest.mark.parametrize("n", [0, -1, 3.001, float("inf"), float("nan")])
def test_prim_bucket_refuses_sizes_and_changes_nothing(n: float) -> None:
    bucket = pr.TokenBucket(1.0, 3.0, clock=lambda: 0.0)
    for verb in (bucket.book, bucket.reserve, bucket.try_acquire, bucket.acquire):
        with pytest.raises(ValueError, match=r"can grant between 0 and 3.0 tokens at once"):
            verb(n)
    with pytest.raises(ValueError):
        prim_run(bucket.acquire_async(n))
    assert bucket.stats().tokens == 3.0


def test_prim_bucket_says_what_it_does() -> None:
    bucket = pr.TokenBucket(2.5, 10, clock=lambda: 0.0)
    bucket.reserve(4)
    assert bucket.stats() == pr.TokenBucketStats(rate=2.5, burst=10, tokens=6.0)
    assert repr(bucket) == "<TokenBucket rate=2.5 burst=10 tokens=6>"
    with pytest.raises(AttributeError):
        bucket.stats().tokens = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        bucket.typo = 1  # type: ignore[attr-defined]


def test_prim_bucket_reads_the_monotonic_clock_by_default() -> None:
    bucket = pr.TokenBucket(1e-4, 2.0)
    assert (bucket.reserve(2.0), bucket.try_acquire()) == (0.0, False)
    assert 0.0 < bucket.wait_for() <= 1e4 + 1e-6


class PrimIntrudingLock:
    """Lets somebody else have the object as soon as its lock is first released."""

    def __init__(self, intruder: Callable[[], Any]) -> None:
        self.intruder: Callable[[], Any] | None = intruder

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        intruder, self.intruder = self.intruder, None
        if intruder is not None:
            intruder()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def test_prim_bucket_refused_try_acquire_delays_nobody() -> None:
    """One that books first and cancels afterwards lets a thread in between pay for what was never granted."""
    waits: list[float] = []
    bucket = pr.TokenBucket(1.0, 1.0, clock=lambda: 0.0)
    bucket.reserve()
    bucket._lock = PrimIntrudingLock(lambda: waits.append(bucket.reserve()))  # type: ignore[assignment]
    assert bucket.try_acquire() is False
    assert waits == [1.0]
    assert bucket.stats().tokens == -1.0


# ----------------------------------------------------------------------------------- token bucket: against a model

PRIM_RATES = st.sampled_from([0.1, 1 / 3, 0.5, 1.0, 2.0, 7.0, 10.0, 100.0])
PRIM_BURSTS = st.sampled_from([1.0, 1.5, 2.0, 3.0, 10.0])
PRIM_STEPS = st.integers(0, 320).map(lambda k: k / 64)
PRIM_PARTS = st.one_of(st.sampled_from([1.0, 1.0, 0.5, 0.1]), st.integers(1, 64).map(lambda k: k / 64))


class PrimLedger:
    """The definition itself, slow and exact: every booking kept, every window looked at.

    A grant of n is due at the first moment when, for each earlier grant, what was granted from that one on is at
    most burst + rate * (time since it); and not in a pause, at whose end all but one token are missing.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = Fraction(rate), Fraction(burst)
        self.entries: list[tuple[int, Fraction, Fraction]] = []  # number (0: a pause), due, tokens
        self.paused_until = Fraction(-(10**9))

    def due(self, n: float, now: float) -> Fraction:
        tokens = Fraction(n)
        due = max(Fraction(now), self.paused_until, Fraction(now) + (tokens - self.burst) / self.rate)
        for number, moment, taken in reversed(self.entries):
            if number:
                tokens += taken
                due = max(due, moment + (tokens - self.burst) / self.rate)
            else:
                due = max(due, moment + (tokens - 1) / self.rate)
        return due

    def book(self, number: int, n: float, now: float) -> Fraction:
        due = self.due(n, now)
        self.entries.append((number, due, Fraction(n)))
        return due - Fraction(now)

    def pause(self, until: float) -> None:
        self.paused_until = max(self.paused_until, Fraction(until))
        self.entries.append((0, Fraction(until), Fraction(0)))

    def position(self, number: int) -> str:
        """Whether a booking is the last thing, followed by pauses only, or by another booking."""
        behind = list(itertools.takewhile(lambda entry: entry[0] != number, reversed(self.entries)))
        return "last" if not behind else "middle" if any(entry[0] for entry in behind) else "paused"

    def forget(self, number: int) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != number]


def prim_close(answer: float, exact: Fraction) -> bool:
    return abs(Fraction(answer) - exact) <= Fraction(1, 10**6)


class PrimBucketMachine(RuleBasedStateMachine):
    """A bucket and the ledger, side by side."""

    bucket_type: ClassVar[type[pr.TokenBucket]] = pr.TokenBucket

    @initialize(rate=PRIM_RATES, burst=PRIM_BURSTS)
    def start(self, rate: float, burst: float) -> None:
        self.now = 1000.0
        self.bucket = self.bucket_type(rate, burst, clock=lambda: self.now)
        self.ledger = PrimLedger(rate, burst)
        self.open: dict[int, tuple[pr.Reservation, Fraction]] = {}  # booked, and not cancelled
        self.numbers = itertools.count(1)

    @rule(seconds=PRIM_STEPS)
    def step(self, seconds: float) -> None:
        self.now += seconds

    @rule(part=PRIM_PARTS)
    def book(self, part: float) -> None:
        n, number = part * self.bucket.burst, next(self.numbers)
        reservation = self.bucket.book(n)
        wait = self.ledger.book(number, n, self.now)
        self.open[number] = (reservation, Fraction(self.now) + wait)
        assert prim_close(reservation.wait, wait)

    @rule()
    def book_one(self) -> None:
        self.book(1.0 / self.bucket.burst)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        newest_first = sorted(self.open, reverse=True)
        number = newest_first[data.draw(st.integers(0, len(newest_first) - 1))]
        reservation, due = self.open[number]
        assume(due > self.now or reservation.wait == 0.0)
        del self.open[number]
        position = self.ledger.position(number)
        served = self.bucket.cancel(reservation)
        assert position == "paused" or served is (position == "last")
        if position != "middle":
            self.ledger.forget(number)

    @rule(seconds=PRIM_STEPS)
    def pause(self, seconds: float) -> None:
        self.bucket.pause(self.now + seconds)
        self.ledger.pause(self.now + seconds)

    @rule(part=PRIM_PARTS)
    def try_acquire(self, part: float) -> None:
        n = part * self.bucket.burst
        wait = self.ledger.due(n, self.now) - Fraction(self.now)
        if self.bucket.try_acquire(n):
            assert prim_close(0.0, wait)
            self.ledger.book(next(self.numbers), n, self.now)
        else:
            assert wait > 0

    @rule(times=st.sampled_from([0.25, 1.0, 1.5, 40.0]))
    def wait_for(self, times: float) -> None:
        n = times * self.bucket.burst
        assert prim_close(self.bucket.wait_for(n), self.ledger.due(n, self.now) - Fraction(self.now))

    @invariant()
    def nothing_before_the_end_of_a_pause(self) -> None:
        wait = self.bucket.wait_for(0.25)
        assert self.now + wait >= float(self.ledger.paused_until) - 1e-6

    @invariant()
    def tokens(self) -> None:
        exact = self.ledger.burst - max(Fraction(0), self.ledger_full_at() - Fraction(self.now)) * self.ledger.rate
        assert abs(Fraction(self.bucket.stats().tokens) - exact) <= Fraction(1, 10**6) * (1 + self.ledger.rate)

    def ledger_full_at(self) -> Fraction:
        """When a whole burst could be had, if nobody else asked."""
        return self.ledger.due(self.bucket.burst, -(10.0**8))


def prim_check_bucket_machine(bucket_type: type[pr.TokenBucket], effort: settings = PRIM_SETTINGS) -> None:
    machine = type("Machine", (PrimBucketMachine,), {"bucket_type": bucket_type})
    run_state_machine_as_test(machine, settings=effort)


PRIM_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), PRIM_STEPS),
        st.tuples(st.just("book"), PRIM_PARTS),
        st.tuples(st.just("book"), PRIM_PARTS),
        st.tuples(st.just("try"), PRIM_PARTS),
        st.tuples(st.just("cancel"), st.integers(0, 3).map(float)),
        st.tuples(st.just("pause"), PRIM_STEPS),
        st.tuples(st.just("back"), PRIM_STEPS),
    ),
    max_size=40,
)


def prim_grants(
    bucket: pr.TokenBucket, events: list[tuple[str, float]]
) -> Iterator[tuple[Fraction, Fraction, float, Fraction]]:
    """Play the events; per grant that was used: when by its own clock, when in truth, its size, the pause then set.

    The true time only goes on; "back" makes the clock jump.
    """
    clock = true = Fraction(1000)
    paused = Fraction(0)
    used: list[tuple[pr.Reservation, Fraction, Fraction, float, Fraction]] = []
    for verb, value in events:
        if verb == "step":
            clock, true = clock + Fraction(value), true + Fraction(value)
        elif verb == "back":
            clock -= Fraction(value)
        elif verb == "pause":
            paused = max(paused, clock + Fraction(value))
            bucket.pause(float(clock) + value)
        elif verb == "book":
            n = value * bucket.burst
            reservation = bucket.book(n, float(clock))
            wait = Fraction(reservation.wait)
            used.append((reservation, clock + wait, true + wait, n, paused))
        elif verb == "try":
            n = value * bucket.burst
            if bucket.try_acquire(n, float(clock)):
                used.append((pr.Reservation(0.0, 0.0, 0.0, 0.0), clock, true, n, paused))
        else:
            waiting = [grant for grant in used if grant[2] > true]
            if waiting:
                gone = waiting[max(0, len(waiting) - 1 - int(value))]
                bucket.cancel(gone[0])
                used = [grant for grant in used if grant is not gone]
    for _, by_clock, in_truth, n, pause in used:
        yield by_clock, in_truth, n, pause


def prim_check_any_window(bucket_type: type[pr.TokenBucket], effort: settings = PRIM_SETTINGS) -> None:
    """At most burst + rate * t in the window between any two grants, whatever the clock, cancellation or a pause do."""

    @settings(effort, max_examples=2 * effort.max_examples)
    @given(PRIM_RATES, PRIM_BURSTS, PRIM_EVENTS)
    def check(rate: float, burst: float, events: list[tuple[str, float]]) -> None:
        grants = list(prim_grants(bucket_type(rate, burst), events))
        slack = Fraction(2, 10**6) * (1 + Fraction(rate))
        for which in (0, 1):
            ordered = sorted((grant[which], Fraction(grant[2])) for grant in grants)
            for first in range(len(ordered)):
                total = Fraction(0)
                for moment, n in ordered[first:]:
                    total += n
                    assert total <= Fraction(burst) + Fraction(rate) * (moment - ordered[first][0]) + slack

    check()


def prim_check_fifo(bucket_type: type[pr.TokenBucket], effort: settings = PRIM_SETTINGS) -> None:
    """Grants are due in the order in which they were booked, in truth, whatever their sizes."""

    @effort
    @given(PRIM_RATES, PRIM_BURSTS, PRIM_EVENTS)
    def check(rate: float, burst: float, events: list[tuple[str, float]]) -> None:
        due = [in_truth for _, in_truth, _, _ in prim_grants(bucket_type(rate, burst), events)]
        assert all(later - earlier >= -Fraction(1, 10**6) for earlier, later in itertools.pairwise(due))

    check()


def prim_check_pause(bucket_type: type[pr.TokenBucket], effort: settings = PRIM_SETTINGS) -> None:
    """What is booked after ``pause(until)`` is not due before ``until``."""

    @effort
    @given(PRIM_RATES, PRIM_BURSTS, PRIM_EVENTS)
    def check(rate: float, burst: float, events: list[tuple[str, float]]) -> None:
        for by_clock, _, _, paused in prim_grants(bucket_type(rate, burst), events):
            assert by_clock >= paused - Fraction(1, 10**6)

    check()


def prim_check_debt(bucket_type: type[pr.TokenBucket], effort: settings = PRIM_SETTINGS) -> None:
    """The waits are those of the textbook's bucket, which counts tokens and goes into debt."""

    @effort
    @given(PRIM_RATES, PRIM_BURSTS, st.lists(st.tuples(PRIM_STEPS, PRIM_PARTS), max_size=40))
    def check(rate: float, burst: float, requests: list[tuple[float, float]]) -> None:
        bucket = bucket_type(rate, burst)
        now = read = 1000.0
        tokens = Fraction(burst)
        for step, part in requests:
            now += step
            n = part * burst
            tokens = min(Fraction(burst), tokens + Fraction(now - read) * Fraction(rate)) - Fraction(n)
            read = now
            assert prim_close(bucket.reserve(n, now), max(Fraction(0), -tokens / Fraction(rate)))

    check()


def prim_check_whole_burst(bucket_type: type[pr.TokenBucket], effort: settings = PRIM_SETTINGS) -> None:
    """A full bucket grants its burst at one instant, at once or in parts, and nothing more; rounding is no wait."""

    @effort
    @given(PRIM_RATES, st.integers(1, 20), st.floats(0.0, 1e6))
    def check(rate: float, burst: int, now: float) -> None:
        for parts in (1, burst):
            bucket = bucket_type(rate, burst)
            assert all(bucket.try_acquire(burst / parts, now) for _ in range(parts))
            assert not bucket.try_acquire(1, now)
            assert bucket.wait_for(1, now) == pytest.approx(1 / rate, abs=1e-6)
            refilled = now + burst / rate + 1e-6
            assert [bucket.reserve(1, refilled) for _ in range(burst)] == [0.0] * burst

    check()


def prim_check_cancel_is_never_booked(bucket_type: type[pr.TokenBucket], effort: settings = PRIM_SETTINGS) -> None:
    """A bucket whose last bookings were cancelled answers, to the bit, as one in which they were never made."""

    @effort
    @given(PRIM_RATES, PRIM_BURSTS, st.lists(st.tuples(PRIM_STEPS, PRIM_PARTS, st.lists(PRIM_PARTS, max_size=3))))
    def check(rate: float, burst: float, requests: list[tuple[float, float, list[float]]]) -> None:
        disturbed, undisturbed = bucket_type(rate, burst), bucket_type(rate, burst)
        now = 1000.0
        for step, part, dropped in requests:
            now += step
            booked = [disturbed.book(d * burst, now) for d in dropped]
            assert all(disturbed.cancel(reservation) for reservation in reversed(booked))
            assert disturbed.reserve(part * burst, now) == undisturbed.reserve(part * burst, now)
            assert disturbed.stats(now) == undisturbed.stats(now)

    check()


PRIM_BUCKET_PROPERTIES: list[Callable[..., None]] = [
    prim_check_any_window,
    prim_check_fifo,
    prim_check_pause,
    prim_check_debt,
    prim_check_whole_burst,
    prim_check_cancel_is_never_booked,
    prim_check_bucket_machine,
]


@pytest.mark.parametrize("check", PRIM_BUCKET_PROPERTIES, ids=lambda check: check.__name__)
def test_prim_bucket_keeps_its_promises(check: Callable[..., None]) -> None:
    check(pr.TokenBucket)


# --------------------------------------------------------------------------------------------- token bucket: shells


@pytest.fixture(params=["threads", "tasks"])
def prim_acquire(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[pr.TokenBucket, PrimWorld, float], BaseException | None]:
    """Acquire in a world of its own; the error that ended the waiting, if one did."""

    def acquire(bucket: pr.TokenBucket, world: PrimWorld, n: float) -> BaseException | None:
        with monkeypatch.context() as patch:
            patch.setattr(pr, "time", SimpleNamespace(sleep=world.sleep))
            patch.setattr(pr, "asyncio", SimpleNamespace(sleep=world.asleep))
            if request.param == "threads":
                return prim_error_of(lambda: bucket.acquire(n))
            error: BaseException | None = prim_run(prim_error_of_task(bucket.acquire_async(n)))
            return error

    return acquire


def prim_error_of(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


async def prim_error_of_task(awaitable: Awaitable[Any]) -> BaseException | None:
    try:
        await awaitable
    except BaseException as error:
        return error
    return None


PrimAcquire = Callable[[pr.TokenBucket, PrimWorld, float], BaseException | None]


def test_prim_bucket_shells_sleep_until_due(prim_acquire: PrimAcquire) -> None:
    world = PrimWorld()
    bucket = pr.TokenBucket(4.0, 2.0, clock=world.clock)
    granted = []
    for n in (1, 1, 1, 2, 1):
        assert prim_acquire(bucket, world, n) is None
        granted.append(world.now - 1000.0)
    assert granted == [0.0, 0.0, 0.25, 0.75, 1.0]
    assert world.naps == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), asyncio.CancelledError(), OSError("woken up")], ids=repr)
def test_prim_bucket_shells_give_back_when_interrupted(prim_acquire: PrimAcquire, error: BaseException) -> None:
    world = PrimWorld()
    bucket = pr.TokenBucket(4.0, 2.0, clock=world.clock)
    bucket.reserve(2)
    world.interrupt = error
    assert prim_acquire(bucket, world, 2) is error
    assert bucket.stats().tokens == 0.0
    world.interrupt = None
    assert prim_acquire(bucket, world, 1) is None
    assert world.now == 1000.25


def test_prim_bucket_verbs_are_about_one_token_by_default() -> None:
    world = PrimWorld()
    bucket = pr.TokenBucket(1.0, 9.0, clock=world.clock)
    taken: list[float] = []
    for verb in (
        bucket.book,
        bucket.reserve,
        bucket.try_acquire,
        bucket.acquire,
        lambda: prim_run(bucket.acquire_async()),
    ):
        before = bucket.stats().tokens
        verb()
        taken.append(before - bucket.stats().tokens)
    assert taken == [1.0] * 5
    bucket.reserve(4)
    assert bucket.wait_for() == 1.0


def test_prim_bucket_shells_do_not_give_back_what_others_wait_behind(prim_acquire: PrimAcquire) -> None:
    world = PrimWorld()
    bucket = pr.TokenBucket(4.0, 2.0, clock=world.clock)
    bucket.reserve(2)
    behind: list[float] = []

    class Interrupting(PrimWorld):
        def sleep(self, seconds: float) -> None:
            behind.append(bucket.reserve(1))
            raise KeyboardInterrupt

    assert isinstance(prim_acquire(bucket, Interrupting(), 2), KeyboardInterrupt)
    assert behind == [0.75]
    assert bucket.stats().tokens == -3.0


def test_prim_bucket_shells_are_not_early_when_their_sleep_is(prim_acquire: PrimAcquire) -> None:
    """uvloop counts milliseconds: its sleeps end up to one too soon, and the bound is about the moment of sending."""

    class Rounding(PrimWorld):
        def sleep(self, seconds: float) -> None:
            self.naps.append(seconds)
            self.now += seconds if seconds < 0.001 else seconds - 0.0007

    world = Rounding()
    bucket = pr.TokenBucket(100.0, 1.0, clock=world.clock)
    for number in range(5):
        assert prim_acquire(bucket, world, 1) is None
        assert world.now >= 1000.0 + number / 100 - 1e-9


def test_prim_bucket_tasks_are_granted_in_order_and_cancelled_at_any_point() -> None:
    """Five tasks of unequal size; for each of them and each step, that one is cancelled at that step."""

    async def scenario(victim: int, step: int) -> list[tuple[int, float]]:
        world = PrimWorld(0.0)
        timers: list[tuple[float, asyncio.Future[None]]] = []

        async def sleep(seconds: float) -> None:
            timer = asyncio.get_running_loop().create_future()
            timers.append((world.now + seconds, timer))
            await timer

        bucket = pr.TokenBucket(1.0, 4.0, clock=world.clock)
        granted: list[tuple[int, float]] = []

        async def worker(name: int, n: float) -> None:
            await bucket.acquire_async(n)
            granted.append((name, world.now))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pr, "asyncio", SimpleNamespace(sleep=sleep))
            tasks = [asyncio.create_task(worker(name, n)) for name, n in enumerate((4, 3, 1, 4, 1))]
            for number in itertools.count():
                if number == step:
                    tasks[victim].cancel()
                await asyncio.sleep(0)
                if number >= 3 and number % 3 == 0:
                    timers = [timer for timer in timers if not timer[1].done()]
                    if not timers:
                        break
                    world.now, first = min(timers, key=lambda timer: timer[0])
                    first.set_result(None)
            await asyncio.gather(*tasks, return_exceptions=True)
        assert bucket.stats(1e9).tokens == 4.0
        return granted

    whole = [(0, 0.0), (1, 3.0), (2, 4.0), (3, 8.0), (4, 9.0)]
    assert prim_run(scenario(0, 10**6)) == whole
    for victim, step in itertools.product(range(5), range(18)):
        granted = prim_run(scenario(victim, step))
        kept = [grant for grant in whole if grant[0] != victim]
        if step == 0:  # it never started, so it never asked
            assert [name for name, _ in granted] == [name for name, _ in kept]
            assert all(now <= dict(whole)[name] for name, now in granted)
        elif victim == 4 or len(granted) == 5:
            assert granted == (whole if len(granted) == 5 else kept)
        else:
            assert granted == kept  # those behind keep the times they were told


def test_prim_bucket_serves_many_threads_exactly() -> None:
    bucket = pr.TokenBucket(8.0, 16.0, clock=lambda: 0.0)
    waits: list[float] = []
    start = threading.Barrier(6)

    def worker() -> None:
        start.wait(PRIM_PATIENCE)
        mine = [bucket.reserve() for _ in range(200)]
        waits.extend(mine)
        assert mine == sorted(mine)

    prim_in_threads([worker] * 6)
    assert sorted(waits) == [max(0, k - 15) / 8 for k in range(1200)]


def prim_in_threads(calls: list[Callable[[], Any]]) -> None:
    """Run all at once with the smallest time slices; the first error of theirs is raised."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            for future in [pool.submit(call) for call in calls]:
                future.result(PRIM_PATIENCE)
    finally:
        sys.setswitchinterval(interval)


# ------------------------------------------------------------------------------------------------------------ retry


@pytest.mark.parametrize(
    ("policy", "attempt", "rng", "retry_after", "elapsed", "delay"),
    [
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 1, 0.5, None, 0.0, 0.5),
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 2, 0.5, None, 0.0, 1.0),
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 3, 0.5, None, 0.0, 2.0),
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 4, 0.5, None, 0.0, None),  # attempts
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 5, 0.5, None, 0.0, None),
        (pr.RetryPolicy(1), 1, 0.5, None, 0.0, None),
        (pr.RetryPolicy(1), 1, 0.5, 0.0, 0.0, None),  # attempts bound Retry-After too
        (pr.RetryPolicy(99, 1.0, 3.0, 100.0), 3, 0.5, None, 0.0, 1.5),  # cap, then jitter
        (pr.RetryPolicy(99, 1.0, 3.0, 100.0), 98, 0.25, None, 0.0, 0.75),
        (pr.RetryPolicy(10**9, 1.0, 3.0, 100.0), 10**8, 0.5, None, 0.0, 1.5),  # no overflow
        (pr.RetryPolicy(10**9, 1e300, 3.0, 100.0), 10**8, 0.5, None, 0.0, 1.5),
        (pr.RetryPolicy(10**9, 0.0, 3.0, 100.0), 10**8, 0.5, None, 0.0, 0.0),
        (pr.RetryPolicy(10**9, 1.0, 0.0, 100.0), 7, 0.5, None, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.5, None, 6.0, 4.0),  # total, to the second
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.5, None, 6.001, None),
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.0, None, 10.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.0, None, 10.1, None),
        (pr.RetryPolicy(9, 8.0, 30.0, 0.0), 1, 0.0, None, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 50.0, 0.0, 50.0),  # Retry-After wins, over the cap too
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 0.0, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, -5.0, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 100.0, 0.0, 100.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 100.1, 0.0, None),  # but never past total
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, float("inf"), 0.0, None),
    ],
)
def test_prim_policy_rows(
    policy: pr.RetryPolicy, attempt: int, rng: float, retry_after: float | None, elapsed: float, delay: float | None
) -> None:
    assert policy.delay(attempt, lambda: rng, retry_after, elapsed) == delay


def test_prim_policy_defaults_and_refusals() -> None:
    policy = pr.RetryPolicy()
    assert (policy.attempts, policy.base, policy.cap, policy.total) == (3, 0.5, 30.0, 120.0)
    assert 0.0 <= (policy.delay(1) or 0.0) <= 0.5
    assert pr.RetryPolicy(total=0.0).delay(1, lambda: 0.0) == 0.0
    with pytest.raises(AttributeError):
        policy.attempts = 9  # type: ignore[misc]
    for attempts in (0, -1):
        with pytest.raises(ValueError, match="attempts must be at least 1"):
            pr.RetryPolicy(attempts)
    for wrong in ({"base": -0.1}, {"cap": -1.0}, {"total": -1.0}, {"base": float("nan")}, {"total": float("nan")}):
        with pytest.raises(ValueError, match="are seconds, not below 0"):
            pr.RetryPolicy(**wrong)  # type: ignore[arg-type]


def prim_check_delays(policy_type: type[pr.RetryPolicy], effort: settings = PRIM_SETTINGS) -> None:
    """In [0, cap], never past total, a number for every attempt but the last, and Retry-After as it was asked for."""
    seconds = st.floats(0.0, 1e4)

    @settings(effort, max_examples=2 * effort.max_examples)
    @given(
        st.integers(1, 80), seconds, seconds, seconds, st.integers(1, 10**6), st.none() | seconds, seconds, st.randoms()
    )
    def check(
        attempts: int,
        base: float,
        cap: float,
        total: float,
        attempt: int,
        retry_after: float | None,
        elapsed: float,
        rng: random.Random,
    ) -> None:
        policy = policy_type(attempts, base, cap, total)
        for number in (attempt, attempts - 1, attempts, 1):
            delay = policy.delay(number, rng.random, retry_after, elapsed)
            wanted = cap if retry_after is None else retry_after
            if delay is None:
                assert number >= attempts or elapsed + wanted > total
                continue
            assert number < attempts
            assert elapsed + delay <= total
            assert 0.0 <= delay <= wanted
            assert retry_after is None or delay == retry_after

    check()


def prim_check_spread(policy_type: type[pr.RetryPolicy], effort: settings = PRIM_SETTINGS) -> None:
    """Waits at the cap are uniform in [0, cap]: a herd that failed together does not come back together."""
    rng = random.Random(5).random
    policy = policy_type(attempts=1000, base=0.5, cap=30.0, total=1e9)
    for attempt in (8, 20, 62, 63, 64, 500):
        delays = sorted(policy.delay(attempt, rng) or 0.0 for _ in range(400))
        assert len(set(delays)) >= 399
        assert delays[-1] <= 30.0
        for quarter in range(4):
            inside = sum(7.5 * quarter <= delay < 7.5 * (quarter + 1) for delay in delays)
            assert 60 <= inside <= 140


def prim_check_budget(budget_type: type[pr.RetryBudget], effort: settings = PRIM_SETTINGS) -> None:
    """retries <= reserve + ratio * requests at every step, and no retry refused that the budget could pay."""

    @effort
    @given(st.integers(0, 1000), st.integers(0, 5), st.lists(st.integers(0, 30)))
    def check(thousandths: int, reserve: int, runs: list[int]) -> None:
        budget = budget_type(thousandths / 1000, reserve)
        saved = Fraction(reserve)
        requests = retries = refused = 0
        for length in runs:
            for turn in range(length):
                if turn % 3 == 0:
                    budget.request()
                    requests += 1
                    saved = min(Fraction(max(reserve, 1)), saved + Fraction(thousandths, 1000))
                elif budget.try_retry():
                    retries += 1
                    saved -= 1
                else:
                    refused += 1
                    assert saved < 1
                assert 1000 * retries <= 1000 * reserve + thousandths * requests
                assert budget.stats() == pr.RetryBudgetStats(requests, retries, refused, float(saved))

    check()


PRIM_RETRY_PROPERTIES: list[tuple[Callable[..., None], type]] = [
    (prim_check_delays, pr.RetryPolicy),
    (prim_check_spread, pr.RetryPolicy),
    (prim_check_budget, pr.RetryBudget),
]


@pytest.mark.parametrize(("check", "kind"), PRIM_RETRY_PROPERTIES, ids=lambda x: x.__name__)
def test_prim_retry_keeps_its_promises(check: Callable[..., None], kind: type) -> None:
    check(kind)


def test_prim_budget_says_what_it_does_and_refuses() -> None:
    budget = pr.RetryBudget(0.25, 2)
    assert [budget.try_retry() for _ in range(3)] == [True, True, False]
    for _ in range(6):
        budget.request()
    assert repr(budget) == "<RetryBudget requests=6 retries=2 refused=1 saved=1.5>"
    stats = budget.stats()
    assert stats == pr.RetryBudgetStats(requests=6, retries=2, refused=1, saved=1.5)
    with pytest.raises(AttributeError):
        stats.saved = 9.0  # type: ignore[misc]
    assert pr.RetryBudget().stats().saved == 10.0
    assert pr.RetryBudget(0, 0).try_retry() is pr.RetryBudget(1, 0).try_retry() is False
    for ratio, reserve in ((-0.1, 1), (1.1, 1), (float("nan"), 1), (0.1, -1)):
        with pytest.raises(ValueError, match="ratio is a share between 0 and 1"):
            pr.RetryBudget(ratio, reserve)


def test_prim_budget_holds_for_many_threads() -> None:
    budget = pr.RetryBudget(0.1, 5)

    def worker() -> None:
        for _ in range(300):
            budget.request()
            budget.try_retry()

    prim_in_threads([worker] * 6)
    stats = budget.stats()
    assert (stats.requests, stats.retries + stats.refused) == (1800, 1800)
    assert 1 <= stats.retries <= 5 + 180


class PrimFlaky:
    """Fails with the given errors, one a call, then answers."""

    def __init__(self, *errors: BaseException, world: PrimWorld | None = None, seconds: float = 0.0) -> None:
        self.errors = list(errors)
        self.calls = 0
        self.world, self.seconds = world, seconds

    def __call__(self) -> str:
        self.calls += 1
        if self.world is not None:
            self.world.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        return "done"


PrimOutcome = tuple[str | None, BaseException | None]
PrimRetry = Callable[..., PrimOutcome]


def prim_retry_in_thread(flaky: PrimFlaky, world: PrimWorld, **options: Any) -> PrimOutcome:
    result: list[str] = []
    error = prim_error_of(lambda: result.append(pr.retry(flaky, clock=world.clock, sleep=world.sleep, **options)))
    return (result or [None])[0], error  # type: ignore[list-item]


def prim_retry_in_task(flaky: PrimFlaky, world: PrimWorld, **options: Any) -> PrimOutcome:
    async def call() -> str:
        await asyncio.sleep(0)
        return flaky()

    async def main() -> PrimOutcome:
        try:
            return await pr.retry_async(call, clock=world.clock, sleep=world.asleep, **options), None
        except BaseException as error:
            return None, error

    outcome: PrimOutcome = prim_run(main())
    return outcome


@pytest.fixture(params=[prim_retry_in_thread, prim_retry_in_task], ids=["threads", "tasks"])
def prim_retry(request: pytest.FixtureRequest) -> PrimRetry:
    shell: PrimRetry = request.param
    return shell


def test_prim_retry_success_at_once(prim_retry: PrimRetry) -> None:
    flaky, world, budget = PrimFlaky(), PrimWorld(), pr.RetryBudget()
    assert prim_retry(flaky, world, on=OSError, budget=budget) == ("done", None)
    assert (flaky.calls, world.naps) == (1, [])
    assert (budget.stats().requests, budget.stats().retries) == (1, 0)


@pytest.mark.parametrize("failures", [1, 2, 5, 9])
def test_prim_retry_success_after_failures(prim_retry: PrimRetry, failures: int) -> None:
    flaky = PrimFlaky(*(OSError(k) for k in range(failures)))
    world, budget = PrimWorld(), pr.RetryBudget(0.0, 20)
    policy = pr.RetryPolicy(attempts=10, base=0.5, cap=4.0, total=1000.0)
    assert prim_retry(flaky, world, on=OSError, policy=policy, budget=budget, rng=random.Random(7).random) == (
        "done",
        None,
    )
    again = random.Random(7)
    assert world.naps == [again.random() * min(4.0, 0.5 * 2**k) for k in range(failures)]
    assert flaky.calls == failures + 1
    assert (budget.stats().requests, budget.stats().retries) == (1, failures)


def test_prim_retry_gives_up_with_the_users_own_error_and_its_history(prim_retry: PrimRetry) -> None:
    errors = [OSError("one"), TimeoutError("two"), OSError("three")]
    flaky, world = PrimFlaky(*errors), PrimWorld()
    result, error = prim_retry(flaky, world, on=OSError, rng=lambda: 0.5)
    assert error is errors[2]
    assert result is None
    assert world.naps == [0.25, 0.5]
    assert error.__notes__ == ["retry: gave up after 3 attempts: OSError: one; TimeoutError: two; OSError: three"]
    assert not any(hasattr(earlier, "__notes__") for earlier in errors[:2])
    assert error.__cause__ is None


def test_prim_retry_history_is_bounded(prim_retry: PrimRetry) -> None:
    flaky = PrimFlaky(*(OSError(str(k)) for k in range(40)))
    _, error = prim_retry(flaky, PrimWorld(), on=OSError, policy=pr.RetryPolicy(attempts=30, base=0.0))
    assert error is not None
    (note,) = error.__notes__
    assert note == "retry: gave up after 30 attempts: " + "; ".join(f"OSError: {k}" for k in range(20, 30))


def test_prim_retry_with_one_attempt_is_a_plain_call(prim_retry: PrimRetry) -> None:
    mine = OSError("mine")
    flaky, world, budget = PrimFlaky(mine), PrimWorld(), pr.RetryBudget()
    assert prim_retry(flaky, world, on=OSError, policy=pr.RetryPolicy(attempts=1), budget=budget) == (None, mine)
    assert (flaky.calls, world.naps, hasattr(mine, "__notes__")) == (1, [], False)
    assert (budget.stats().retries, budget.stats().refused) == (0, 0)


@pytest.mark.parametrize(
    ("on", "error", "calls"),
    [
        (OSError, OSError(), 2),
        (OSError, ConnectionResetError(), 2),
        (OSError, ValueError(), 1),
        ((OSError, ValueError), ValueError(), 2),
        ((OSError, ValueError), KeyError(), 1),
        ((), OSError(), 1),
        (lambda error: "again" in str(error), ValueError("again"), 2),
        (lambda error: "again" in str(error), ValueError("no"), 1),
        (Exception, ValueError(), 2),
    ],
)
def test_prim_retry_on(prim_retry: PrimRetry, on: Any, error: Exception, calls: int) -> None:
    error = error.with_traceback(None)
    flaky, world = PrimFlaky(error), PrimWorld()
    outcome = prim_retry(flaky, world, on=on)
    assert flaky.calls == calls
    assert outcome == (("done", None) if calls == 2 else (None, error))
    assert len(world.naps) == calls - 1


def test_prim_retry_stops_at_an_unwanted_error(prim_retry: PrimRetry) -> None:
    unwanted = KeyError("k")
    flaky, world = PrimFlaky(OSError("one"), unwanted), PrimWorld()
    assert prim_retry(flaky, world, on=OSError) == (None, unwanted)
    assert flaky.calls == 2
    assert unwanted.__notes__ == ["retry: gave up after 2 attempts: OSError: one; KeyError: 'k'"]


def test_prim_retry_lets_a_failing_predicate_be_seen(prim_retry: PrimRetry) -> None:
    def on(error: BaseException) -> bool:
        raise LookupError("the predicate")

    mine = OSError()
    _, error = prim_retry(PrimFlaky(mine), PrimWorld(), on=on)
    assert isinstance(error, LookupError)
    assert error.__context__ is mine


def test_prim_retry_budget_exhausted(prim_retry: PrimRetry) -> None:
    budget, world = pr.RetryBudget(0.0, 3), PrimWorld()
    policy = pr.RetryPolicy(attempts=3, base=0.0)
    calls = []
    for _ in range(4):
        flaky = PrimFlaky(*(OSError() for _ in range(9)))
        _, error = prim_retry(flaky, world, on=OSError, policy=policy, budget=budget)
        assert isinstance(error, OSError)
        calls.append(flaky.calls)
    assert calls == [3, 2, 1, 1]
    assert budget.stats() == pr.RetryBudgetStats(requests=4, retries=3, refused=3, saved=0.0)


def test_prim_retry_after_attribute_wins(prim_retry: PrimRetry) -> None:
    def error(seconds: float | None) -> OSError:
        busy = OSError("busy")
        busy.retry_after = seconds  # type: ignore[attr-defined]
        return busy

    world = PrimWorld()
    flaky = PrimFlaky(error(7.0), error(None), error(0.0), error(61.0))
    policy = pr.RetryPolicy(attempts=9, base=1.0, cap=5.0, total=60.0)
    _, last = prim_retry(flaky, world, on=OSError, policy=policy, rng=lambda: 0.5)
    assert world.naps == [7.0, 1.0, 0.0]
    assert getattr(last, "retry_after", None) == 61.0


def test_prim_retry_counts_the_time_of_the_calls(prim_retry: PrimRetry) -> None:
    world = PrimWorld()
    flaky = PrimFlaky(*(OSError() for _ in range(9)), world=world, seconds=4.0)
    policy = pr.RetryPolicy(attempts=9, base=1.0, cap=1.0, total=11.0)
    assert isinstance(prim_retry(flaky, world, on=OSError, policy=policy, rng=lambda: 0.5)[1], OSError)
    assert world.naps == [0.5, 0.5]  # starts at 0, 4.5, 9; at 13 the total is over
    assert flaky.calls == 3


def prim_check_never_retried(retry: PrimRetry) -> None:
    for error in (KeyboardInterrupt(), asyncio.CancelledError(), SystemExit(), GeneratorExit()):
        flaky, world, budget = PrimFlaky(error), PrimWorld(), pr.RetryBudget()
        assert retry(flaky, world, on=BaseException, budget=budget) == (None, error)
        assert (flaky.calls, world.naps, budget.stats().retries) == (1, [], 0)
        assert not hasattr(error, "__notes__")


def test_prim_retry_never_retries_what_ends_a_program(prim_retry: PrimRetry) -> None:
    prim_check_never_retried(prim_retry)


@pytest.mark.parametrize("shell", ["threads", "tasks"])
def test_prim_retry_leaves_no_reference_cycle(shell: str) -> None:
    """An error keeps its frames, and what they hold, alive: a cycle would do so until the collector comes."""

    class Mine(Exception):
        pass

    policy = pr.RetryPolicy(attempts=2, base=0.0)

    def fail() -> weakref.ref[BaseException] | None:
        try:
            pr.retry(PrimFlaky(Mine(), Mine()), on=Mine, policy=policy)
        except Mine as error:
            return weakref.ref(error)
        return None

    async def afail() -> weakref.ref[BaseException] | None:
        async def call() -> None:
            raise Mine

        try:
            await pr.retry_async(call, on=Mine, policy=policy)
        except Mine as error:
            return weakref.ref(error)
        return None

    enabled = gc.isenabled()
    gc.disable()
    try:
        left = fail() if shell == "threads" else prim_run(afail())
        assert left is not None
        assert left() is None
    finally:
        if enabled:
            gc.enable()


def test_prim_retry_async_cancelled_at_every_step() -> None:
    async def scenario(step: int) -> bool:
        calls, budget = [0], pr.RetryBudget(0.0, 5)

        async def call() -> str:
            calls[0] += 1
            await prim_ticks(2)
            if calls[0] < 3:
                raise OSError
            return "done"

        async def nap(seconds: float) -> None:
            await prim_ticks(2)

        policy = pr.RetryPolicy(attempts=5)
        task = asyncio.create_task(pr.retry_async(call, on=BaseException, policy=policy, budget=budget, sleep=nap))
        await prim_ticks(step)
        finished = not task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        made = calls[0]
        await prim_ticks()
        assert calls[0] == made
        assert budget.stats().retries in ({2} if finished else {max(0, made - 1), made})
        assert outcome == "done" if finished else isinstance(outcome, asyncio.CancelledError)
        return finished

    outcomes = [prim_run(scenario(step)) for step in range(20)]
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (False, True)


# ------------------------------------------------------------------------ semaphore and channel: one suite, 3 shells

prim_local = threading.local()
PRIM_BLOCK = co._Waiter.block


def prim_gated_block(waiter: co._Waiter, timeout: float | None) -> None:
    """Block as told: a worker that is to be interrupted or to time out does so when the test says, not the clock."""
    worker: PrimThread | None = getattr(prim_local, "worker", None)
    if worker is None or not worker.gated:
        return PRIM_BLOCK(waiter, timeout)
    assert worker.gate.wait(PRIM_PATIENCE)
    if worker.interrupt is not None:
        raise worker.interrupt
    return None


class PrimThread:
    """A blocking call in a thread of its own."""

    def __init__(self, call: Callable[[], Any], gated: bool = False) -> None:
        self.gated = gated
        self.gate = threading.Event()
        self.interrupt: BaseException | None = None
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self.thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        prim_local.worker = self
        try:
            self.outcome.set_result(call())
        except BaseException as error:
            self.outcome.set_exception(error)

    def done(self) -> bool:
        return self.outcome.done()

    def result(self) -> Any:
        self.thread.join(PRIM_PATIENCE)
        return self.outcome.result(PRIM_PATIENCE)

    def cancel(self, after: Callable[[], Any] = lambda: None) -> None:
        """Interrupt the wait, as Ctrl-C does, right after the given call."""
        after()
        self.interrupt = KeyboardInterrupt()
        self.gate.set()
        assert isinstance(self.outcome.exception(PRIM_PATIENCE), KeyboardInterrupt)

    def expire(self, after: Callable[[], Any] = lambda: None) -> Any:
        """Let the wait time out right after the given call."""
        after()
        self.gate.set()
        return self.result()


class PrimTask:
    """An awaited call in a task of a loop that runs in another thread."""

    def __init__(self, loop: PrimLoop, call: Callable[[], Awaitable[Any]]) -> None:
        self.loop = loop
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.task = loop.do(lambda: loop.loop.create_task(self._run(call)))

    async def _run(self, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            self.outcome.set_result(await call())
        except BaseException as error:
            self.outcome.set_exception(error)

    def done(self) -> bool:
        return self.outcome.done()

    def result(self) -> Any:
        return self.outcome.result(PRIM_PATIENCE)

    def cancel(self, after: Callable[[], Any] = lambda: None) -> None:
        def both() -> None:
            after()
            self.task.cancel()

        self.loop.do(both)
        assert isinstance(self.outcome.exception(PRIM_PATIENCE), asyncio.CancelledError)


class PrimLoop:
    """An event loop in debug mode in a thread of its own."""

    def __init__(self) -> None:
        self.complaints: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(True)
        self.loop.slow_callback_duration = PRIM_PATIENCE
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def do(self, call: Callable[[], Any]) -> Any:
        """Run the call in the loop's thread."""
        outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        return outcome.result(PRIM_PATIENCE)

    def close(self) -> None:
        for task in self.do(lambda: asyncio.all_tasks(self.loop)):
            self.do(task.cancel)
        prim_until(lambda: not self.do(lambda: asyncio.all_tasks(self.loop)))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PRIM_PATIENCE)
        self.loop.close()
        assert self.complaints == []


class PrimShell:
    """Starts each call in a thread, in a task, or in turns in a thread and in tasks of two loops."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loops = [PrimLoop() for _ in range({"threads": 0, "tasks": 1, "mixed": 2}[kind])]
        homes: list[PrimLoop | None] = [*self.loops] if kind == "tasks" else [None, *self.loops]
        self.homes = itertools.cycle(homes)

    def start(
        self, call: Callable[[], Any], acall: Callable[[], Awaitable[Any]], gated: bool = False
    ) -> PrimThread | PrimTask:
        home = next(self.homes)
        return PrimThread(call, gated) if home is None else PrimTask(home, acall)

    def do(self, call: Callable[[], Any]) -> Any:
        """What does not wait: in the loop if there is one only, else from outside."""
        return self.loops[0].do(call) if self.kind == "tasks" else call()

    def acquire(self, semaphore: pr.Semaphore, gated: bool = False) -> PrimThread | PrimTask:
        return self.start(semaphore.acquire, semaphore.acquire_async, gated)

    def put(self, channel: pr.Channel[Any], item: Any, gated: bool = False) -> PrimThread | PrimTask:
        return self.start(lambda: channel.put(item), lambda: channel.put_async(item), gated)

    def get(self, channel: pr.Channel[Any], gated: bool = False) -> PrimThread | PrimTask:
        return self.start(channel.get, channel.get_async, gated)

    def drain(self, channel: pr.Channel[Any]) -> PrimThread | PrimTask:
        async def adrain() -> list[Any]:
            return [item async for item in channel]

        return self.start(lambda: list(channel), adrain)


@pytest.fixture(params=["threads", "tasks", "mixed"])
def prim_shell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrimShell]:
    monkeypatch.setattr(co._Waiter, "block", prim_gated_block)
    shell = PrimShell(request.param)
    yield shell
    for loop in shell.loops:
        loop.close()


def prim_waiting(semaphore: pr.Semaphore, n: int) -> None:
    prim_until(lambda: semaphore.stats().waiting == n)


def prim_putters(channel: pr.Channel[Any], n: int) -> None:
    prim_until(lambda: channel.stats().putters == n)


def prim_getters(channel: pr.Channel[Any], n: int) -> None:
    prim_until(lambda: channel.stats().getters == n)


def test_prim_semaphore_free_permits_are_taken_at_once(prim_shell: PrimShell) -> None:
    semaphore = pr.Semaphore(3)
    for taken in range(1, 4):
        assert prim_shell.acquire(semaphore).result() is True
        assert semaphore.stats() == pr.SemaphoreStats(3, 3 - taken, 0)
    assert prim_shell.do(semaphore.try_acquire) is False
    prim_shell.do(semaphore.release)
    assert prim_shell.do(semaphore.try_acquire) is True


def test_prim_semaphore_is_fifo(prim_shell: PrimShell) -> None:
    semaphore = pr.Semaphore(1)
    assert semaphore.try_acquire()
    workers = []
    for number in range(12):
        workers.append(prim_shell.acquire(semaphore))
        prim_waiting(semaphore, number + 1)
    for number, worker in enumerate(workers):
        prim_shell.do(semaphore.release)
        assert worker.result() is True
        assert not any(later.done() for later in workers[number + 1 :])
        assert semaphore.stats() == pr.SemaphoreStats(1, 0, 11 - number)


def test_prim_semaphore_nobody_barges(prim_shell: PrimShell) -> None:
    semaphore = pr.Semaphore(1)
    assert semaphore.try_acquire()
    first, second = prim_shell.acquire(semaphore), None
    prim_waiting(semaphore, 1)
    second = prim_shell.acquire(semaphore)
    prim_waiting(semaphore, 2)

    def release_and_try() -> bool:
        semaphore.release()
        return semaphore.try_acquire() or semaphore.acquire(timeout=0)

    assert prim_shell.do(release_and_try) is False
    assert first.result() is True
    assert prim_shell.do(release_and_try) is False
    assert second.result() is True
    prim_shell.do(semaphore.release)
    assert prim_shell.do(semaphore.try_acquire) is True


def test_prim_semaphore_a_cancelled_waiter_leaves(prim_shell: PrimShell) -> None:
    semaphore = pr.Semaphore(1)
    assert semaphore.try_acquire()
    workers = []
    for number in range(6):
        workers.append(prim_shell.acquire(semaphore, gated=number in (0, 2, 5)))
        prim_waiting(semaphore, number + 1)
    for left, number in ((5, 2), (4, 0), (3, 5)):
        workers[number].cancel()
        prim_waiting(semaphore, left)
    for number in (1, 3, 4):
        prim_shell.do(semaphore.release)
        assert workers[number].result() is True
    prim_shell.do(semaphore.release)
    assert semaphore.stats() == pr.SemaphoreStats(1, 1, 0)


def test_prim_semaphore_cancelled_after_the_grant_hands_it_on(prim_shell: PrimShell) -> None:
    for behind in (0, 2):
        semaphore = pr.Semaphore(1)
        assert semaphore.try_acquire()
        victim = prim_shell.acquire(semaphore, gated=True)
        prim_waiting(semaphore, 1)
        workers = []
        for number in range(behind):
            workers.append(prim_shell.acquire(semaphore))
            prim_waiting(semaphore, number + 2)
        victim.cancel(after=semaphore.release)
        for worker in workers:
            assert worker.result() is True
            prim_shell.do(semaphore.release)
        assert semaphore.stats() == pr.SemaphoreStats(1, 1, 0)


def test_prim_semaphore_time_outs(prim_shell: PrimShell) -> None:
    async def acquire_now(semaphore: pr.Semaphore) -> bool:
        try:
            async with asyncio.timeout(0):
                return await semaphore.acquire_async()
        except TimeoutError:
            return False

    semaphore = pr.Semaphore(1)
    assert semaphore.try_acquire()
    for timeout in (0, -1.0, 0.001):
        late = prim_shell.start(lambda t=timeout: semaphore.acquire(t), lambda: acquire_now(semaphore))  # type: ignore[misc]
        assert late.result() is False
        assert semaphore.stats() == pr.SemaphoreStats(1, 0, 0)
    prim_shell.do(semaphore.release)
    assert prim_shell.start(lambda: semaphore.acquire(1e12), lambda: acquire_now(semaphore)).result() is True


def test_prim_semaphore_a_grant_at_the_last_moment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co._Waiter, "block", prim_gated_block)
    semaphore = pr.Semaphore(1)
    assert semaphore.try_acquire()
    late, later = PrimThread(semaphore.acquire, gated=True), PrimThread(semaphore.acquire, gated=True)
    prim_waiting(semaphore, 2)
    assert late.expire(after=semaphore.release) is (not later.expire())
    assert semaphore.stats() == pr.SemaphoreStats(1, 0, 0)


def test_prim_semaphore_context_managers(prim_shell: PrimShell) -> None:
    semaphore = pr.Semaphore(1)

    def hold() -> pr.SemaphoreStats:
        with semaphore as inside:
            assert inside is semaphore
            return semaphore.stats()

    async def ahold() -> pr.SemaphoreStats:
        async with semaphore as inside:
            assert inside is semaphore
            return semaphore.stats()

    def fail() -> None:
        with semaphore:
            raise LookupError

    async def afail() -> None:
        async with semaphore:
            raise LookupError

    for _ in range(3):
        assert prim_shell.start(hold, ahold).result() == pr.SemaphoreStats(1, 0, 0)
        with pytest.raises(LookupError):
            prim_shell.start(fail, afail).result()
        assert semaphore.stats() == pr.SemaphoreStats(1, 1, 0)


def test_prim_semaphore_refuses_misuse_and_says_what_it_does() -> None:
    for permits in (0, -1):
        with pytest.raises(ValueError, match="permits must be at least 1"):
            pr.Semaphore(permits)
    semaphore = pr.Semaphore(2)
    with pytest.raises(ValueError, match="released more often than acquired"):
        semaphore.release()
    assert semaphore.acquire()
    semaphore.release()
    with pytest.raises(ValueError, match="released more often than acquired"):
        semaphore.release()
    assert semaphore.try_acquire()
    assert repr(semaphore) == "<Semaphore permits=2 available=1 waiting=0>"
    assert semaphore.stats() == pr.SemaphoreStats(permits=2, available=1, waiting=0)
    with pytest.raises(AttributeError):
        semaphore.stats().available = 2  # type: ignore[misc]


def test_prim_semaphore_never_more_holders_than_permits(prim_shell: PrimShell) -> None:
    semaphore, holders, most, lock = pr.Semaphore(3), [0], [0], threading.Lock()

    def enter() -> None:
        with lock:
            holders[0] += 1
            most[0] = max(most[0], holders[0])

    def leave() -> None:
        with lock:
            holders[0] -= 1

    def work() -> int:
        for _ in range(40):
            with semaphore:
                enter()
                os.sched_yield()
                leave()
        return 40

    async def awork() -> int:
        for _ in range(40):
            async with semaphore:
                enter()
                await asyncio.sleep(0)
                leave()
        return 40

    workers = [prim_shell.start(work, awork) for _ in range(9)]
    assert sum(worker.result() for worker in workers) == 360
    assert semaphore.stats() == pr.SemaphoreStats(3, 3, 0)
    assert (holders, 1 <= most[0] <= 3) == ([0], True)


def test_prim_semaphore_loses_no_permit_to_a_loop_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """A waiter whose loop was closed without cancelling it can never be woken; the permit goes to the next."""
    semaphore = pr.Semaphore(1)
    assert semaphore.try_acquire()
    task = prim_stranded(semaphore.acquire_async())
    assert semaphore.stats().waiting == 1
    semaphore.release()
    assert semaphore.try_acquire() is True
    del task


def prim_stranded(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that waits, in a loop that was closed."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # "destroyed but pending": that is what is tested
    task = loop.create_task(coroutine)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    return task


def test_prim_channel_is_fifo_and_bounded(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(3)
    for item in (0, None, 2):
        assert prim_shell.put(channel, item).result() is None
    putters = []
    for number in range(5):
        putters.append(prim_shell.put(channel, 3 + number))
        prim_putters(channel, number + 1)
    assert (len(channel), channel.stats()) == (3, pr.ChannelStats(3, 3, 5, 0, False))
    for number, item in enumerate((0, None, 2, 3, 4, 5, 6, 7)):
        assert prim_shell.get(channel).result() == item
        if number < 5:
            assert putters[number].result() is None
            assert not any(later.done() for later in putters[number + 1 :])
    assert channel.stats() == pr.ChannelStats(3, 0, 0, 0, False)


def test_prim_channel_getters_wait_in_line(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(2)
    getters = []
    for number in range(6):
        getters.append(prim_shell.get(channel))
        prim_getters(channel, number + 1)
    for number, getter in enumerate(getters):
        if number % 2:
            prim_shell.do(lambda n=number: channel.put_nowait(n))  # type: ignore[misc]
        else:
            assert prim_shell.put(channel, number).result() is None
        assert getter.result() == number
        assert not any(later.done() for later in getters[number + 1 :])


def test_prim_channel_nobody_barges(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(1)
    getter = prim_shell.get(channel)
    prim_getters(channel, 1)

    def put_and_get() -> Any:
        channel.put_nowait("mine")
        return channel.get_nowait()

    with pytest.raises(queue.Empty):
        prim_shell.do(put_and_get)
    assert getter.result() == "mine"

    channel.put_nowait(1)
    putter = prim_shell.put(channel, 2)
    prim_putters(channel, 1)

    def get_and_put() -> None:
        assert channel.get_nowait() == 1
        channel.put_nowait(3)

    with pytest.raises(queue.Full):
        prim_shell.do(get_and_put)
    assert putter.result() is None
    assert channel.get_nowait() == 2


def test_prim_channel_close_refuses_putters_and_drains_to_getters(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(2)
    channel.put_nowait(0)
    channel.put_nowait(None)
    putters = [prim_shell.put(channel, "never"), prim_shell.put(channel, "never")]
    prim_putters(channel, 2)
    prim_shell.do(channel.close)
    for putter in [*putters, prim_shell.put(channel, "late")]:
        with pytest.raises(pr.ChannelClosed):
            putter.result()
    with pytest.raises(pr.ChannelClosed):
        channel.put_nowait("late")
    assert channel.stats() == pr.ChannelStats(2, 2, 0, 0, True)
    assert prim_shell.get(channel).result() == 0
    assert prim_shell.drain(channel).result() == [None]
    assert prim_shell.drain(channel).result() == []
    with pytest.raises(pr.ChannelClosed):
        prim_shell.get(channel).result()
    with pytest.raises(pr.ChannelClosed):
        channel.get_nowait()
    prim_shell.do(channel.close)
    assert channel.stats() == pr.ChannelStats(2, 0, 0, 0, True)


def test_prim_channel_close_ends_waiting_getters_and_iteration(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(2)
    drains, getters = [], []
    for number in range(3):
        drains.append(prim_shell.drain(channel))
        prim_getters(channel, 2 * number + 1)
        getters.append(prim_shell.get(channel))
        prim_getters(channel, 2 * number + 2)
    prim_shell.do(lambda: channel.put_nowait("one"))
    prim_until(lambda: channel.stats().getters == 6)
    prim_shell.do(channel.close)
    assert [drain.result() for drain in drains] == [["one"], [], []]
    for getter in getters:
        with pytest.raises(pr.ChannelClosed):
            getter.result()


def test_prim_channel_accepted_before_the_close_is_delivered(prim_shell: PrimShell) -> None:
    """The place in the buffer, and the item, were handed over before the channel closed."""
    channel: pr.Channel[Any] = pr.Channel(1)
    channel.put_nowait(0)
    putter = prim_shell.put(channel, 1)
    prim_putters(channel, 1)

    def take_and_close() -> None:
        assert channel.get_nowait() == 0
        channel.close()

    prim_shell.do(take_and_close)
    assert putter.result() is None
    assert prim_shell.drain(channel).result() == [1]

    channel = pr.Channel(1)
    getter = prim_shell.get(channel)
    prim_getters(channel, 1)

    def put_and_close() -> None:
        channel.put_nowait(2)
        channel.close()

    prim_shell.do(put_and_close)
    assert getter.result() == 2


def test_prim_channel_a_cancelled_getter_leaves_or_gives_back(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(2)
    victims, getters = [], []
    for number in range(3):
        victims.append(prim_shell.get(channel, gated=True))
        prim_getters(channel, 2 * number + 1)
        getters.append(prim_shell.get(channel))
        prim_getters(channel, 2 * number + 2)
    victims[1].cancel()
    prim_getters(channel, 5)
    victims[0].cancel(after=lambda: channel.put_nowait("a"))  # to the next
    assert getters[0].result() == "a"
    channel.put_nowait("b")
    assert getters[1].result() == "b"

    def put_three() -> None:
        for item in "cde":
            channel.put_nowait(item)

    victims[2].cancel(after=put_three)  # c was his, d went to the next, e waits
    assert getters[2].result() == "d"
    assert prim_shell.do(lambda: (channel.get_nowait(), channel.get_nowait())) == ("c", "e")
    assert channel.stats() == pr.ChannelStats(2, 0, 0, 0, False)


def test_prim_channel_a_returned_item_goes_to_the_front(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(2)
    victim = prim_shell.get(channel, gated=True)
    prim_getters(channel, 1)

    def put_three() -> None:
        for item in range(3):
            channel.put_nowait(item)

    victim.cancel(after=put_three)
    putter = prim_shell.put(channel, 3)
    prim_putters(channel, 1)
    assert prim_shell.get(channel).result() == 0
    assert prim_shell.get(channel).result() == 1
    assert putter.result() is None
    channel.close()
    assert prim_shell.drain(channel).result() == [2, 3]


def test_prim_channel_an_item_returned_after_the_close_is_still_there(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(1)
    victim = prim_shell.get(channel, gated=True)
    prim_getters(channel, 1)

    def put_and_close() -> None:
        channel.put_nowait("mine")
        channel.close()

    victim.cancel(after=put_and_close)
    assert prim_shell.drain(channel).result() == ["mine"]


def test_prim_channel_a_cancelled_putter_leaves(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(1)
    channel.put_nowait(0)
    putters = []
    for number in range(4):
        putters.append(prim_shell.put(channel, number + 1, gated=number in (0, 2)))
        prim_putters(channel, number + 1)
    putters[2].cancel()
    putters[0].cancel()
    prim_putters(channel, 2)
    assert prim_shell.get(channel).result() == 0
    assert putters[1].result() is None
    assert prim_shell.get(channel).result() == 2
    assert putters[3].result() is None
    assert prim_shell.get(channel).result() == 4
    assert channel.stats() == pr.ChannelStats(1, 0, 0, 0, False)


def test_prim_channel_a_putter_cancelled_after_it_was_accepted_delivers_once(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(1)
    channel.put_nowait(0)
    victim = prim_shell.put(channel, 1, gated=True)
    prim_putters(channel, 1)
    victim.cancel(after=channel.get_nowait)
    channel.close()
    assert prim_shell.drain(channel).result() == [1]


def test_prim_channel_time_outs(prim_shell: PrimShell) -> None:
    channel: pr.Channel[Any] = pr.Channel(1)

    async def now(awaitable: Awaitable[Any]) -> Any:
        async with asyncio.timeout(0):
            return await awaitable

    for timeout in (0, -1.0, 0.001):
        with pytest.raises(TimeoutError):
            prim_shell.start(lambda t=timeout: channel.get(t), lambda: now(channel.get_async())).result()  # type: ignore[misc]
        assert channel.stats() == pr.ChannelStats(1, 0, 0, 0, False)
    assert prim_shell.start(lambda: channel.put(1, 0), lambda: now(channel.put_async(1))).result() is None
    for timeout in (0, -1.0, 0.001):
        with pytest.raises(TimeoutError):
            prim_shell.start(lambda t=timeout: channel.put(2, t), lambda: now(channel.put_async(2))).result()  # type: ignore[misc]
        assert channel.stats() == pr.ChannelStats(1, 1, 0, 0, False)
    assert prim_shell.start(lambda: channel.get(0), lambda: now(channel.get_async())).result() == 1


def test_prim_channel_a_hand_over_at_the_last_moment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co._Waiter, "block", prim_gated_block)
    channel: pr.Channel[Any] = pr.Channel(1)
    getter = PrimThread(channel.get, gated=True)
    prim_getters(channel, 1)
    assert getter.expire(after=lambda: channel.put_nowait(None)) is None
    channel.put_nowait(0)
    putter = PrimThread(lambda: channel.put(1), gated=True)
    prim_putters(channel, 1)
    assert putter.expire(after=channel.get_nowait) is None
    assert channel.get_nowait() == 1

    getter = PrimThread(channel.get, gated=True)
    prim_getters(channel, 1)
    with pytest.raises(pr.ChannelClosed):
        getter.expire(after=channel.close)
    assert channel.stats() == pr.ChannelStats(1, 0, 0, 0, True)


def test_prim_channel_delivers_each_item_once(prim_shell: PrimShell) -> None:
    channel: pr.Channel[tuple[int, int]] = pr.Channel(2)

    def produce(name: int) -> None:
        for number in range(60):
            channel.put((name, number))

    async def aproduce(name: int) -> None:
        for number in range(60):
            await channel.put_async((name, number))

    producers = [prim_shell.start(lambda n=n: produce(n), lambda n=n: aproduce(n)) for n in range(6)]  # type: ignore[misc]
    consumers = [prim_shell.drain(channel) for _ in range(5)]
    for producer in producers:
        producer.result()
    prim_shell.do(channel.close)
    shares = [consumer.result() for consumer in consumers]
    assert sorted(itertools.chain(*shares)) == [(name, number) for name in range(6) for number in range(60)]
    for share, name in itertools.product(shares, range(6)):
        mine = [number for producer, number in share if producer == name]
        assert mine == sorted(mine)


def test_prim_channel_loses_nothing_in_a_storm_of_time_outs_and_cancellations() -> None:
    """Threads that time out and tasks that are cancelled, of two loops: what was accepted is delivered once."""
    channel: pr.Channel[tuple[str, int]] = pr.Channel(2)
    accepted: list[tuple[str, int]] = []
    delivered: list[tuple[str, int]] = []
    unsure: list[tuple[str, int]] = []
    loops = [PrimLoop(), PrimLoop()]

    def produce(name: str) -> None:
        for number in range(80):
            try:
                channel.put((name, number), timeout=0 if number % 3 else PRIM_PATIENCE)
                accepted.append((name, number))
            except TimeoutError:
                pass

    async def aproduce(name: str, rng: random.Random) -> None:
        for number in range(80):
            put = asyncio.create_task(channel.put_async((name, number)))
            await prim_ticks(rng.randrange(4))
            if rng.random() < 0.3:
                put.cancel()
            (outcome,) = await asyncio.gather(put, return_exceptions=True)
            (unsure if outcome else accepted).append((name, number))

    def consume(number: int) -> None:
        try:
            while True:
                with_time = number % 2 == 0
                try:
                    delivered.append(channel.get(timeout=0 if with_time else PRIM_PATIENCE))
                except TimeoutError:
                    os.sched_yield()
        except pr.ChannelClosed:
            return

    async def aconsume(rng: random.Random) -> None:
        while True:
            get = asyncio.create_task(channel.get_async())
            await prim_ticks(rng.randrange(4))
            if rng.random() < 0.3:
                get.cancel()
            (outcome,) = await asyncio.gather(get, return_exceptions=True)
            if isinstance(outcome, pr.ChannelClosed):
                return
            if not isinstance(outcome, asyncio.CancelledError):
                assert not isinstance(outcome, BaseException)
                delivered.append(outcome)

    consumers: list[Any] = [PrimThread(lambda n=n: consume(n)) for n in range(2)]  # type: ignore[misc]
    producers: list[Any] = [PrimThread(lambda n=n: produce(f"t{n}")) for n in range(2)]  # type: ignore[misc]
    for seed, loop in enumerate(loops):
        consumers.append(PrimTask(loop, lambda s=seed: aconsume(random.Random(s))))  # type: ignore[misc]
        producers.append(PrimTask(loop, lambda s=seed: aproduce(f"a{s}", random.Random(s))))  # type: ignore[misc]
    for producer in producers:
        producer.result()
    channel.close()
    for consumer in consumers:
        consumer.result()
    for loop in loops:
        loop.close()
    delivered.extend(channel)  # what a getter gave back after the others had gone
    assert len(delivered) == len(set(delivered))
    assert set(accepted) <= set(delivered) <= set(accepted) | set(unsure)
    assert channel.stats() == pr.ChannelStats(2, 0, 0, 0, True)


def test_prim_channel_loses_no_item_to_a_loop_that_is_gone() -> None:
    channel: pr.Channel[str] = pr.Channel(1)
    getter = prim_stranded(channel.get_async())
    channel.put_nowait("item")
    assert channel.get_nowait() == "item"
    channel.put_nowait("first")
    putter = prim_stranded(channel.put_async("never accepted"))
    assert channel.get_nowait() == "first"
    channel.put_nowait("second")
    assert channel.get_nowait() == "second"
    getter, putter = prim_stranded(channel.get_async()), getter
    channel.close()
    assert channel.stats() == pr.ChannelStats(1, 0, 0, 0, True)
    del getter, putter


def test_prim_channel_refuses_misuse_and_says_what_it_does() -> None:
    for capacity in (0, -1):
        with pytest.raises(ValueError, match="capacity must be at least 1"):
            pr.Channel(capacity)
    channel: pr.Channel[int] = pr.Channel(2)
    with pytest.raises(queue.Empty):
        channel.get_nowait()
    channel.put_nowait(1)
    assert repr(channel) == "<Channel capacity=2 items=1 putters=0 getters=0 closed=False>"
    channel.put_nowait(2)
    with pytest.raises(queue.Full):
        channel.put_nowait(3)
    channel.close()
    assert repr(channel) == "<Channel capacity=2 items=2 putters=0 getters=0 closed=True>"
    assert channel.stats() == pr.ChannelStats(capacity=2, items=2, putters=0, getters=0, closed=True)
    with pytest.raises(AttributeError):
        channel.stats().closed = False  # type: ignore[misc]
    assert list(channel) == [1, 2]


@pytest.mark.parametrize("what", ["acquire", "put", "get"])
def test_prim_ctrl_c_ends_a_blocked_thread_and_leaves_no_waiter(what: str) -> None:
    """A real signal, sent once the main thread is inside the blocking call."""
    semaphore, channel = pr.Semaphore(1), pr.Channel[int](1)
    assert semaphore.try_acquire()
    if what == "put":
        channel.put_nowait(0)
    main = threading.main_thread().ident
    assert main is not None and main == threading.get_ident()

    def interrupt() -> None:
        frames = sys._current_frames
        prim_until(lambda: frames()[main].f_code is PRIM_BLOCK.__code__)
        signal.pthread_kill(main, signal.SIGINT)

    helper = PrimThread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        if what == "acquire":
            semaphore.acquire()
        elif what == "put":
            channel.put(1)
        else:
            channel.get()
    helper.result()
    assert semaphore.stats() == pr.SemaphoreStats(1, 0, 0)
    assert channel.stats() == pr.ChannelStats(1, int(what == "put"), 0, 0, False)


# ------------------------------------------------------------------- semaphore and channel: cancelled at every step


async def prim_cancelled(
    victim: Coroutine[Any, Any, Any],
    event: Callable[[asyncio.Task[Any]], Any],
    event_step: int,
    cancel_step: int,
    event_first: bool,
) -> Any:
    """Run the victim; let the event happen, and cancel the victim, before its given steps. Its result, or its error."""
    task = asyncio.create_task(victim)
    for step in range(9):
        if event_first and step == event_step:
            event(task)
        if step == cancel_step:
            task.cancel()
        if not event_first and step == event_step:
            event(task)
        await asyncio.sleep(0)
    return (await asyncio.gather(task, return_exceptions=True))[0]


PRIM_ORDERS = list(itertools.product(range(4), range(6), (True, False)))


def prim_check_semaphore_cancel(semaphore_type: type[pr.Semaphore], effort: settings | None = None) -> None:
    """No permit is lost and no waiter left, whenever the victim is cancelled; those behind are served in order."""

    async def scenario(event_step: int, cancel_step: int, event_first: bool, how: str, behind: int) -> bool:
        semaphore = semaphore_type(1)
        assert semaphore.try_acquire()
        served: list[int] = []

        async def victim() -> str:
            if how == "plain":
                await semaphore.acquire_async()
                semaphore.release()
            elif how == "timeout":
                await asyncio.wait_for(semaphore.acquire_async(), PRIM_PATIENCE)
                semaphore.release()
            else:
                async with semaphore:
                    await prim_ticks(2)
            return "served"

        async def other(number: int) -> None:
            async with semaphore:
                served.append(number)

        others: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: others.extend(loop.create_task(other(number)) for number in range(behind)))
        outcome = await prim_cancelled(victim(), lambda _: semaphore.release(), event_step, cancel_step, event_first)
        await prim_ticks()
        assert all(worker.done() for worker in others), "somebody waits for a permit that is lost"
        assert await asyncio.gather(*others, return_exceptions=True) == [None] * behind
        assert outcome == "served" or isinstance(outcome, asyncio.CancelledError)
        assert served == list(range(behind))
        assert semaphore.stats() == pr.SemaphoreStats(1, 1, 0)
        return bool(outcome == "served")

    async def all_of_them() -> set[bool]:
        return {
            await scenario(*order, how, behind)
            for order in PRIM_ORDERS
            for how in ("plain", "timeout", "with")
            for behind in (0, 2)
        }

    assert prim_run(all_of_them()) == {True, False}


def prim_check_channel_get_cancel(channel_type: type[pr.Channel[Any]], effort: settings | None = None) -> None:
    """Every accepted item is delivered exactly once, whenever a getter is cancelled."""

    async def scenario(event_step: int, cancel_step: int, event_first: bool, how: str, behind: int) -> bool:
        channel = channel_type(1)
        got: list[Any] = []

        async def victim() -> str:
            if how == "plain":
                got.append(await channel.get_async())
            elif how == "timeout":
                got.append(await asyncio.wait_for(channel.get_async(), PRIM_PATIENCE))
            else:
                async for item in channel:
                    got.append(item)
                    break
            return "served"

        async def other() -> None:
            got.append(await channel.get_async())

        others: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: others.extend(loop.create_task(other()) for _ in range(behind)))
        sent = iter(range(100))

        def event() -> None:
            channel.put_nowait(next(sent))

        outcome = await prim_cancelled(victim(), lambda _: event(), event_step, cancel_step, event_first)
        assert outcome == "served" or isinstance(outcome, asyncio.CancelledError)
        while not all(worker.done() for worker in others):
            before = len(got)
            event()
            await prim_ticks(4)
            assert len(got) == before + 1, "an item went to nobody"
        channel.close()
        got.extend([item async for item in channel])
        assert sorted(got) == list(range(next(sent)))
        assert channel.stats() == pr.ChannelStats(1, 0, 0, 0, True)
        return bool(outcome == "served")

    async def all_of_them() -> set[bool]:
        return {
            await scenario(*order, how, behind)
            for order in PRIM_ORDERS
            for how in ("plain", "timeout", "for")
            for behind in (0, 2)
        }

    assert prim_run(all_of_them()) == {True, False}


def prim_check_channel_put_cancel(channel_type: type[pr.Channel[Any]], effort: settings | None = None) -> None:
    """A put that returned is delivered once, one that was cancelled at most once, and no putter stays behind."""

    async def scenario(event_step: int, cancel_step: int, event_first: bool, close: bool, behind: int) -> str:
        channel = channel_type(1)
        channel.put_nowait("first")
        got: list[Any] = []
        others: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: others.extend(loop.create_task(channel.put_async(n)) for n in range(behind)))

        had_left: list[bool] = []

        def event(task: asyncio.Task[Any]) -> None:
            had_left.append(task.done())
            got.append(channel.get_nowait())
            if close:
                channel.close()

        outcome = await prim_cancelled(channel.put_async("victim"), event, event_step, cancel_step, event_first)
        while channel.stats().items and not close:
            got.append(channel.get_nowait())
            await prim_ticks(4)
        channel.close()
        refused = await asyncio.gather(*others, return_exceptions=True)
        got.extend([item async for item in channel])
        assert got[0] == "first"
        assert got.count("victim") <= (0 if had_left[0] else 1)
        assert outcome is not None or got.count("victim") == 1
        expected = [n for n, error in enumerate(refused) if error is None]
        assert [item for item in got[1:] if item != "victim"] == expected
        assert close or expected == list(range(behind))
        assert channel.stats() == pr.ChannelStats(1, 0, 0, 0, True)
        return type(outcome).__name__

    async def all_of_them() -> set[str]:
        return {
            await scenario(*order, close, behind)
            for order in PRIM_ORDERS
            for close in (True, False)
            for behind in (0, 2)
        }

    assert prim_run(all_of_them()) == {"NoneType", "CancelledError", "ChannelClosed"}


# ------------------------------------------------------------------ semaphore and channel: random walks of one loop


class PrimLoopMachine(RuleBasedStateMachine):
    """Tasks of a loop that takes one step at a time."""

    debug: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[dict[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(self.debug)
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.tasks: list[asyncio.Task[Any]] = []
        self.cancelled: set[asyncio.Task[Any]] = set()

    def now(self, call: Callable[[], Any]) -> Any:
        """Run the call inside the loop, and one step of everybody else with it."""
        outcome: list[Any] = []
        self.loop.call_soon(lambda: outcome.append(call()))
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()
        assert outcome, self.complaints
        return outcome[0]

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self.now(lambda: self.loop.create_task(coroutine))
        self.tasks.append(task)
        self.now(lambda: None)
        return task

    def settle(self) -> None:
        for _ in range(6):
            self.now(lambda: None)

    @rule()
    def step(self) -> None:
        self.now(lambda: None)

    @precondition(lambda self: any(not task.done() for task in self.tasks))
    @rule(data=st.data(), act_first=st.booleans())
    def cancel(self, data: st.DataObject, act_first: bool) -> None:
        pending = [task for task in self.tasks if not task.done()]
        victim = data.draw(st.just(0) | st.sampled_from(range(len(pending))))  # the oldest is the next to be granted
        self.cancelled.add(pending[victim])

        def both() -> None:
            if act_first:
                self.act()
            pending[victim].cancel()

        self.now(both)

    def act(self) -> None:
        """What may wake somebody up, just before he is cancelled."""

    def finish(self) -> None:
        self.settle()
        for task in self.tasks:
            if not task.done():
                task.cancel()
        self.settle()

    def teardown(self) -> None:
        try:
            if hasattr(self, "started"):
                self.finish()
                assert self.complaints == []
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.settle()
            for task in self.tasks:
                if task.done() and not task.cancelled():
                    task.exception()
            self.loop.close()


class PrimSemaphoreMachine(PrimLoopMachine):
    semaphore_type: ClassVar[type[pr.Semaphore]] = pr.Semaphore

    @initialize(permits=st.integers(1, 3))
    def start(self, permits: int) -> None:
        self.started = True
        self.semaphore = self.semaphore_type(permits)
        self.permits = permits
        self.held = 0  # by try_acquire
        self.order: list[int] = []
        self.released: set[asyncio.Task[Any]] = set()

    @rule()
    def acquire(self) -> None:
        async def worker(number: int) -> None:
            await self.semaphore.acquire_async()
            self.order.append(number)

        self.spawn(worker(len(self.tasks)))

    def holders(self) -> list[asyncio.Task[Any]]:
        return [t for t in self.tasks if t.done() and not t.cancelled() and t not in self.released]

    @rule()
    def try_acquire(self) -> None:
        before = self.semaphore.stats()
        taken = self.now(self.semaphore.try_acquire)
        assert not (taken and before.waiting)
        self.held += taken

    @precondition(lambda self: self.held or self.holders())
    @rule()
    def release(self) -> None:
        self.now(self.act)

    def act(self) -> None:
        holders = self.holders()
        if self.held:
            self.held -= 1
        elif holders:
            self.released.add(holders[0])
        else:
            return
        self.semaphore.release()

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "started"):
            stats = self.semaphore.stats()
            assert self.held + len(self.holders()) <= self.permits - stats.available
            assert stats.waiting == 0 or stats.available == 0

    @invariant()
    def fifo(self) -> None:
        if hasattr(self, "started"):
            assert self.order == sorted(self.order)

    @rule()
    def balance(self) -> None:
        self.settle()
        stats = self.semaphore.stats()
        assert self.held + len(self.holders()) + stats.available == self.permits
        assert stats.waiting == sum(not task.done() for task in self.tasks)

    def finish(self) -> None:
        self.settle()
        self.balance()
        super().finish()
        while self.held or self.holders():
            self.now(self.act)
        self.settle()
        assert self.semaphore.stats() == pr.SemaphoreStats(self.permits, self.permits, 0)


class PrimChannelMachine(PrimLoopMachine):
    channel_type: ClassVar[type[pr.Channel[Any]]] = pr.Channel

    @initialize(capacity=st.integers(1, 3))
    def start(self, capacity: int) -> None:
        self.started = True
        self.channel = self.channel_type(capacity)
        self.sent = itertools.count()
        self.puts: dict[asyncio.Task[Any] | None, list[int]] = {None: []}
        self.arrivals: list[asyncio.Task[Any] | int] = []  # getters, and what was got at once, in order
        self.gets: set[asyncio.Task[Any]] = set()
        self.closed = False

    @rule()
    def put(self) -> None:
        item = next(self.sent)
        task = self.spawn(self.channel.put_async(item))
        self.puts[task] = [item]

    @rule()
    def get(self) -> None:
        task = self.spawn(self.channel.get_async())
        self.gets.add(task)
        self.arrivals.append(task)

    @rule()
    def put_nowait(self) -> None:
        self.now(self.act)

    def act(self) -> None:
        item = next(self.sent)
        try:
            self.channel.put_nowait(item)
        except queue.Full:
            return
        except pr.ChannelClosed:
            assert self.closed
            return
        assert not self.closed
        self.puts[None].append(item)

    @rule()
    def get_nowait(self) -> None:
        def call() -> None:
            try:
                self.arrivals.append(self.channel.get_nowait())
            except queue.Empty:
                assert not self.closed
            except pr.ChannelClosed:
                assert self.closed

        self.now(call)

    @precondition(lambda self: len(self.tasks) > 3)
    @rule()
    def close(self) -> None:
        self.closed = True
        self.now(self.channel.close)

    def delivered(self) -> list[int]:
        items = []
        for arrival in self.arrivals:
            if isinstance(arrival, int):
                items.append(arrival)
            elif arrival.done() and not arrival.cancelled() and arrival.exception() is None:
                items.append(arrival.result())
        return items

    def accepted(self) -> set[int]:
        items = set(self.puts[None])
        for task, sent in self.puts.items():
            if task is not None and task.done() and not task.cancelled() and task.exception() is None:
                items.update(sent)
        return items

    @invariant()
    def exactly_once(self) -> None:
        if hasattr(self, "started"):
            delivered = self.delivered()
            assert len(delivered) == len(set(delivered))
            assert self.cancelled & self.gets or delivered == sorted(delivered)

    @invariant()
    def in_line(self) -> None:
        if hasattr(self, "started"):
            stats = self.channel.stats()
            assert stats.getters == 0 or stats.items == 0
            assert stats.putters == 0 or stats.items >= stats.capacity
            assert self.cancelled & self.gets or stats.items <= stats.capacity

    @rule()
    def balance(self) -> None:
        self.settle()
        stats = self.channel.stats()
        assert stats.getters == sum(not task.done() for task in self.gets)
        assert stats.putters == sum(not task.done() for task in self.puts if task is not None)
        assert not self.closed or stats.getters == stats.putters == 0
        assert len(self.accepted() - set(self.delivered())) <= stats.items

    def finish(self) -> None:
        self.settle()
        self.balance()
        super().finish()
        self.closed = True
        self.now(self.channel.close)
        left: list[int] = self.now(lambda: list(self.channel))
        assert self.cancelled & self.gets or left == sorted(left)
        delivered = self.delivered() + left
        assert len(delivered) == len(set(delivered))
        assert self.accepted() <= set(delivered)
        refused = {
            item
            for task, sent in self.puts.items()
            if task is not None and not task.cancelled() and task.exception() is not None
            for item in sent
        }
        assert not refused & set(delivered)
        assert self.channel.stats() == pr.ChannelStats(self.channel.capacity, 0, 0, 0, True)


def prim_check_semaphore_walk(semaphore_type: type[pr.Semaphore], effort: settings = PRIM_SETTINGS) -> None:
    machine = type(
        "Machine", (PrimSemaphoreMachine,), {"semaphore_type": semaphore_type, "debug": effort is not PRIM_HUNT}
    )
    run_state_machine_as_test(machine, settings=effort)


def prim_check_channel_walk(channel_type: type[pr.Channel[Any]], effort: settings = PRIM_SETTINGS) -> None:
    machine = type("Machine", (PrimChannelMachine,), {"channel_type": channel_type, "debug": effort is not PRIM_HUNT})
    run_state_machine_as_test(machine, settings=effort)


PRIM_WAITING_PROPERTIES: list[tuple[Callable[..., None], type]] = [
    (prim_check_semaphore_cancel, pr.Semaphore),
    (prim_check_channel_get_cancel, pr.Channel),
    (prim_check_channel_put_cancel, pr.Channel),
    (prim_check_semaphore_walk, pr.Semaphore),
    (prim_check_channel_walk, pr.Channel),
]


@pytest.mark.parametrize(("check", "kind"), PRIM_WAITING_PROPERTIES, ids=lambda x: x.__name__)
def test_prim_waiting_keeps_its_promises(check: Callable[..., None], kind: type) -> None:
    check(kind)


def test_prim_a_coroutine_that_is_closed_leaves_too() -> None:
    """Not every coroutine is run by a task to its end; one that is thrown away must not stay in a queue."""

    async def main() -> None:
        semaphore, channel = pr.Semaphore(1), pr.Channel[int](1)
        assert semaphore.try_acquire()
        for waiting in (semaphore.acquire_async(), channel.get_async()):
            waiting.send(None)
            waiting.close()
        channel.put_nowait(0)
        putting = channel.put_async(1)
        putting.send(None)
        putting.close()
        assert semaphore.stats() == pr.SemaphoreStats(1, 0, 0)
        assert channel.stats() == pr.ChannelStats(1, 1, 0, 0, False)

    prim_run(main())


# ---------------------------------------------------------------------------------------- the tests, tested: planted


class PrimBucketOneTooMany(pr.TokenBucket):
    """Burst and refill off by one: "N per period" that lets N + 1 through."""

    def __init__(self, rate: float, burst: float = 1, **options: Any) -> None:
        super().__init__(rate, burst, **options)
        self._depth = (burst + 1) * self._interval


class PrimBucketWindow(pr.TokenBucket):
    """Counts per fixed window: twice the burst around its edge."""

    def book(self, n: float = 1, now: float | None = None) -> pr.Reservation:
        now = self._clock() if now is None else now
        length = self.burst / self.rate
        start = max(self._full_at, now // length * length)
        used = self._depth if start == self._full_at else 0.0
        spent = (used if used < 1e9 else 0.0) + n
        wait = 0.0
        if spent > self.burst:
            start, spent, wait = start + length, n, max(0.0, start + length - now)
        self._full_at, self._depth = start, spent
        return pr.Reservation(wait, now + wait, start, start)


class PrimBucketStarves(pr.TokenBucket):
    """A large request that has to wait books nothing, so small ones go first."""

    def book(self, n: float = 1, now: float | None = None) -> pr.Reservation:
        before = self._full_at
        reservation = super().book(n, now)
        if reservation.wait and n > 1:
            self._full_at = before
        return reservation


class PrimBucketRewinds(pr.TokenBucket):
    """Believes a clock that steps back, and forgets the debt."""

    __slots__ = ("_last",)

    def book(self, n: float = 1, now: float | None = None) -> pr.Reservation:
        now = self._clock() if now is None else now
        if now < getattr(self, "_last", now):
            self._full_at = now
        self._last = now
        return super().book(n, now)


class PrimBucketGivesBackTwice(pr.TokenBucket):
    """Gives back although others were booked behind."""

    def cancel(self, reservation: pr.Reservation) -> bool:
        self._full_at -= reservation.after - reservation.before
        return True


class PrimBucketKeeps(pr.TokenBucket):
    """Never gives back."""

    def cancel(self, reservation: pr.Reservation) -> bool:
        return self._full_at == reservation.after


class PrimBucketPausesShort(pr.TokenBucket):
    """Forgets that a pause has to swallow the burst too."""

    def pause(self, until: float) -> None:
        self._full_at = max(self._full_at, until)


class PrimBucketPeeks(pr.TokenBucket):
    """``wait_for`` that books."""

    def wait_for(self, n: float = 1, now: float | None = None) -> float:
        wait = super().wait_for(n, now)
        self._full_at += 1e-3
        return wait


class PrimPolicyHerd(pr.RetryPolicy):
    """Jitter before the cap: the capped waits are all equal."""

    def delay(
        self, attempt: int, rng: pr.Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
    ) -> float | None:
        if attempt >= self.attempts:
            return None
        delay = min(self.cap, rng() * self.base * 2.0 ** min(attempt - 1, 62)) if retry_after is None else retry_after
        return delay if elapsed + delay <= self.total else None


class PrimPolicyPastTotal(pr.RetryPolicy):
    """Looks at the time before the wait only."""

    def delay(
        self, attempt: int, rng: pr.Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
    ) -> float | None:
        if attempt >= self.attempts or elapsed > self.total:
            return None
        return rng() * min(self.cap, self.base * 2.0 ** min(attempt - 1, 62)) if retry_after is None else retry_after


class PrimPolicyUncapped(pr.RetryPolicy):
    """Equal jitter that forgets the cap."""

    def delay(
        self, attempt: int, rng: pr.Rng = random.random, retry_after: float | None = None, elapsed: float = 0.0
    ) -> float | None:
        delay = super().delay(attempt, rng, retry_after, elapsed)
        return delay if delay is None or retry_after is not None else min(delay + self.cap / 2, self.total - elapsed)


class PrimBudgetHoards(pr.RetryBudget):
    """Earns more than it was told to."""

    def request(self) -> None:
        super().request()
        self._saved += 1


class PrimBudgetForgets(pr.RetryBudget):
    """Pays from an empty purse."""

    def try_retry(self) -> bool:
        return super().try_retry() or bool(self._requests)


def prim_retry_too_eager(flaky: PrimFlaky, world: PrimWorld, on: Any, **options: Any) -> PrimOutcome:
    """Retries whatever ``on`` names, Ctrl-C included."""
    for _ in range(3):
        error = prim_error_of(flaky)
        if error is None:
            return "done", None
        if not isinstance(error, on):
            break
    return None, error


class PrimSemaphoreLoses(pr.Semaphore):
    """Cancelled after the grant: the permit is gone."""

    def _abandon(self, waiter: co._Waiter) -> None:
        with self._lock:
            self._released.leave(waiter)


class PrimSemaphoreGhosts(pr.Semaphore):
    """A cancelled waiter stays in the queue and is granted a permit that it will never use."""

    def _abandon(self, waiter: co._Waiter) -> None:
        if waiter.granted:
            super()._abandon(waiter)


class PrimSemaphoreDoubles(pr.Semaphore):
    """Cancelled before the grant: a permit out of nothing."""

    def _abandon(self, waiter: co._Waiter) -> None:
        super()._abandon(waiter)
        self._available = min(self.permits, self._available + 1)


class PrimSemaphoreBarges(pr.Semaphore):
    """A permit passes through the count, so whoever comes first takes it."""

    async def acquire_async(self) -> bool:
        while not self.try_acquire():
            with self._lock:
                waiter = self._released.park(asyncio.get_running_loop())
            try:
                await waiter.parked()
            except BaseException:
                with self._lock:
                    self._released.leave(waiter)
                if waiter.granted and self._released:
                    self._released.grant_oldest()
                raise
        return True

    def release(self) -> None:
        with self._lock:
            self._available += 1
            if self._released:
                self._released.grant_oldest()


class PrimSemaphoreStack(pr.Semaphore):
    """Last come, first served."""

    def release(self) -> None:
        self._released._waiters.reverse()
        super().release()
        self._released._waiters.reverse()


class PrimChannelLoses(pr.Channel[Any]):
    """Cancelled after it was handed an item: the item is gone."""

    def _give_back(self, waiter: co._Waiter) -> None:
        self._leave(self._not_empty, waiter)


class PrimChannelGhosts(pr.Channel[Any]):
    """A cancelled getter stays in the queue and is handed the next item."""

    def _give_back(self, waiter: co._Waiter) -> None:
        if waiter.granted:
            super()._give_back(waiter)


class PrimChannelDoubles(pr.Channel[Any]):
    """Cancelled after it was handed an item: one to the next getter, and one into the buffer."""

    def _give_back(self, waiter: co._Waiter) -> None:
        super()._give_back(waiter)
        if waiter.granted and not self._items:
            self._items.append(waiter.value)


class PrimChannelGhostPutter(pr.Channel[Any]):
    """A cancelled putter stays in the queue, and its place in the buffer with it."""

    def _leave(self, condition: co._FairCondition, waiter: co._Waiter) -> None:
        if condition is not self._not_full:
            super()._leave(condition, waiter)


class PrimChannelOverfull(pr.Channel[Any]):
    """One more than it can hold."""

    def _offer(self, item: Any) -> bool:
        accepted = super()._offer(item)
        if not accepted and len(self._items) == self.capacity:
            self._items.append(item)
            return True
        return accepted


class PrimChannelForgetful(pr.Channel[Any]):
    """Closing drops what is in the buffer."""

    def close(self) -> None:
        super().close()
        self._items.clear()


class PrimChannelStack(pr.Channel[Any]):
    """Last in, first out."""

    def _take(self) -> Any:
        self._items.rotate(1)
        return super()._take()


class PrimChannelForgetsPutters(pr.Channel[Any]):
    """A place that is freed is given to nobody."""

    def _take(self) -> Any:
        return self._items.popleft()


class PrimChannelLeavesGetters(pr.Channel[Any]):
    """Closing wakes the putters only."""

    def close(self) -> None:
        self._closed = True
        self._not_full.wake_all_empty_handed()


@pytest.mark.parametrize(
    ("check", "planted"),
    [
        (prim_check_any_window, PrimBucketOneTooMany),
        (prim_check_debt, PrimBucketOneTooMany),
        (prim_check_bucket_machine, PrimBucketOneTooMany),
        (prim_check_any_window, PrimBucketWindow),
        (prim_check_any_window, PrimBucketStarves),
        (prim_check_fifo, PrimBucketStarves),
        (prim_check_debt, PrimBucketStarves),
        (prim_check_any_window, PrimBucketRewinds),
        (prim_check_any_window, PrimBucketGivesBackTwice),
        (prim_check_bucket_machine, PrimBucketGivesBackTwice),
        (prim_check_cancel_is_never_booked, PrimBucketKeeps),
        (prim_check_bucket_machine, PrimBucketKeeps),
        (prim_check_pause, PrimBucketPausesShort),
        (prim_check_bucket_machine, PrimBucketPausesShort),
        (prim_check_bucket_machine, PrimBucketPeeks),
        (prim_check_spread, PrimPolicyHerd),
        (prim_check_delays, PrimPolicyPastTotal),
        (prim_check_delays, PrimPolicyUncapped),
        (prim_check_spread, PrimPolicyUncapped),
        (prim_check_budget, PrimBudgetHoards),
        (prim_check_budget, PrimBudgetForgets),
        (prim_check_semaphore_cancel, PrimSemaphoreLoses),
        (prim_check_semaphore_walk, PrimSemaphoreLoses),
        (prim_check_semaphore_cancel, PrimSemaphoreGhosts),
        (prim_check_semaphore_walk, PrimSemaphoreGhosts),
        (prim_check_semaphore_cancel, PrimSemaphoreDoubles),
        (prim_check_semaphore_walk, PrimSemaphoreDoubles),
        (prim_check_semaphore_walk, PrimSemaphoreBarges),
        (prim_check_semaphore_walk, PrimSemaphoreStack),
        (prim_check_channel_get_cancel, PrimChannelLoses),
        (prim_check_channel_walk, PrimChannelLoses),
        (prim_check_channel_get_cancel, PrimChannelGhosts),
        (prim_check_channel_walk, PrimChannelGhosts),
        (prim_check_channel_get_cancel, PrimChannelDoubles),
        (prim_check_channel_walk, PrimChannelDoubles),
        (prim_check_channel_put_cancel, PrimChannelGhostPutter),
        (prim_check_channel_walk, PrimChannelGhostPutter),
        (prim_check_channel_walk, PrimChannelOverfull),
        (prim_check_channel_walk, PrimChannelForgetful),
        (prim_check_channel_walk, PrimChannelStack),
        (prim_check_channel_walk, PrimChannelForgetsPutters),
        (prim_check_channel_walk, PrimChannelLeavesGetters),
    ],
    ids=lambda x: x.__name__,
)
def test_prim_a_planted_bug_is_found(check: Callable[..., None], planted: type) -> None:
    with pytest.raises(AssertionError):
        check(planted, PRIM_HUNT)


def test_prim_a_planted_retry_is_found() -> None:
    with pytest.raises(AssertionError):
        prim_check_never_retried(prim_retry_too_eager)


# ------------------------------------------------------------------------------------------------------------------
# html_parse.py
# ------------------------------------------------------------------------------------------------------------------


HTML_URL = "http://site.example/dir/page.html?q=1#top"


def html_page(markup: str, content_type: str | None = "text/html; charset=utf-8", url: str = HTML_URL) -> Page:
    return parse_page(markup.encode(), url, content_type)


# --- encoding


@pytest.mark.parametrize(
    ("body", "content_type", "encoding", "title"),
    [
        # 1. a byte order mark wins over everything
        (b"\xef\xbb\xbf<title>\xc3\xa9</title>", "text/html; charset=koi8-r", "utf-8", "é"),
        ("\ufeff<title>é</title>".encode("utf-16-le"), "text/html; charset=utf-8", "utf-16le", "é"),
        ("\ufeff<title>é</title>".encode("utf-16-be"), None, "utf-16be", "é"),
        # 2. the header, by any label the encoding standard knows
        (b"<meta charset=utf-8><title>\xe9</title>", "text/html; charset=iso-8859-1", "windows-1252", "é"),
        (b"<title>\x80</title>", "text/html;charset=ASCII", "windows-1252", "€"),
        (b"<title>\xc3\xa9</title>", 'TEXT/HTML; x=y; CHARSET = "UTF8"', "utf-8", "é"),
        (b"<title>\xc3\xa9</title>", "text/html; charset=' utf-8 '", "utf-8", "é"),
        ("<title>日本</title>".encode("shift_jis"), "text/html; charset=x-sjis", "shift_jis", "日本"),
        ("<title>中文</title>".encode("gbk"), "text/html; charset=gb2312", "gbk", "中文"),
        ("<title>é</title>".encode("utf-16-le"), "text/html; charset=utf-16", "utf-16le", "é"),
        # 3. <meta>, where the header says nothing or nothing known
        (b"<meta charset=koi8-r><title>\xc1</title>", "text/html", "koi8-r", "а"),
        (b"<META CHARSET='koi8-r'><title>\xc1</title>", "text/html; charset=nonsense", "koi8-r", "а"),
        (
            b'<meta http-equiv="Content-Type" content="text/html; charset=koi8-r"><title>\xc1</title>',
            "text/html; charset=",
            "koi8-r",
            "а",
        ),
        (b'<meta content="text/html; charset=koi8-r" http-equiv=CONTENT-TYPE><title>\xc1</title>', None, "koi8-r", "а"),
        (b"<meta charset=bogus><meta charset=koi8-r><title>\xc1</title>", None, "koi8-r", "а"),
        (b"<meta charset=utf-16><title>\xc3\xa9</title>", None, "utf-8", "é"),
        (b"<meta charset=x-user-defined><title>\xe9</title>", None, "windows-1252", "é"),
        (b'<meta content="text/html; charset=koi8-r"><title>\xe9</title>', None, "windows-1252", "é"),
        (b'<meta name=x content="charset=koi8-r"><title>\xe9</title>', None, "windows-1252", "é"),
        (b"<!-- <meta charset=koi8-r> --><title>\xe9</title>", None, "windows-1252", "é"),
        (b"<meta charset=koi8-r", None, "utf-8", None),
        (b" " * 1005 + b"<meta charset=koi8-r><title>\xe9</title>", None, "windows-1252", "é"),
        (b" " * 1000 + b"<meta charset=koi8-r><title>\xc1</title>", None, "koi8-r", "а"),
        # 4. UTF-8 if it is valid, else windows-1252
        (b"<title>\xc3\xa9</title>", None, "utf-8", "é"),
        (b"<title>\xe9\x93</title>", None, "windows-1252", "é“"),
        (b"", None, "utf-8", None),
        # labels that no header should have; bytes that the encoding does not have
        (b"<title>a</title>", "text/html; charset=\udcff\udcfe", "utf-8", "a"),
        (b"<title>a</title>", "text/html; charset=\u212aoi8-r", "utf-8", "a"),
        (b"<title>a\xff\xc3b</title>", "text/html; charset=utf-8", "utf-8", "a\ufffd\ufffdb"),
        (b"<title>\x81</title>", "text/html; charset=shift_jis", "shift_jis", "\ufffd"),
    ],
)
def test_html_encoding(body: bytes, content_type: str | None, encoding: str, title: str | None) -> None:
    page = parse_page(body, HTML_URL, content_type)
    assert (page.encoding, page.title) == (encoding, title)


# --- title


@pytest.mark.parametrize(
    ("markup", "title"),
    [
        ("<title>Plain</title>", "Plain"),
        ("<TITLE lang=en>\n  A \t B\u00a0 C\r\n</TiTlE >", "A B C"),
        (
            "<title>Fish &amp; Chips &#8212; &eacute;t&eacute; &copy2025 &nosuch;</title>",
            "Fish & Chips — été ©2025 &nosuch;",
        ),
        ("<title>a <b>bold</b> <!-- claim --></title>", "a <b>bold</b> <!-- claim -->"),
        ("<title>first</title><title>second</title>", "first"),
        ("<title> </title><title>second</title>", None),
        ("", None),
        ("<p>no title</p>", None),
        ("<title>cut off by the end", "cut off by the end"),
        ("<title>cut off</titl", "cut off</titl"),
        ("<title>x</titles></title>", "x</titles>"),
        ('<title data-x="a>b">q</title>', "q"),
        ("<titles>no</titles>", None),
        ("<!-- <title>comment</title> --><title>real</title>", "real"),
        ("<script>'<title>script</title>'</script><title>real</title>", "real"),
        ("<script><!-- <script> <title>x</title> </script> --></script><title>real</title>", "real"),
        ("<style><title>style</title></style><title>real</title>", "real"),
        ("<textarea><title>area</title></textarea><title>real</title>", "real"),
        ("<noscript><title>noscript</title></noscript><title>real</title>", "real"),
        ("<template><title>template</title></template><title>real</title>", "real"),
        ("<template><template></template><title>no</title></template><title>real</title>", "real"),
        ("<svg><title>icon</title></svg><title>real</title>", "real"),
        ("<svg><title>icon</title></svg>", None),
        ("<svg><title/></svg><title>real</title>", "real"),
        ("<svg/><title>real</title>", "real"),
        ("<svg><!-- </svg> --><title>icon</title></svg><title>real</title>", "real"),
        ("<body><p>x</p><title>late</title>", "late"),
        ("<title>&#" + "9" * 5000 + ";&#" + "0" * 5000 + "65;&#0;</title>", "\ufffdA\ufffd"),
    ],
)
def test_html_title(markup: str, title: str | None) -> None:
    assert html_page(markup).title == title


# --- links


@pytest.mark.parametrize(
    ("markup", "links"),
    [
        ('<a href="/x">', ["http://site.example/x"]),
        ('<a href="x">', ["http://site.example/dir/x"]),
        ('<a href="../x/./y/../z">', ["http://site.example/x/z"]),
        ('<a href="?p=2">', ["http://site.example/dir/page.html?p=2"]),
        ('<a href="//other.example/x">', ["http://other.example/x"]),
        ('<a href="https://Other.Example">', ["https://other.example/"]),
        ('<a href="HTTP://other.example:80/%7ea b">', ["http://other.example/%7ea%20b"]),
        ('<a href="http://127.1:8080/x">', ["http://127.0.0.1:8080/x"]),
        ('<a href="/é?ü=ö">', ["http://site.example/%C3%A9?%C3%BC=%C3%B6"]),
        ('<a href="#part">', ["http://site.example/dir/page.html?q=1"]),
        ('<a href="">', ["http://site.example/dir/page.html?q=1"]),
        ("<a href>", ["http://site.example/dir/page.html?q=1"]),
        (
            '<a href="/x#a"><a href="/x#b"><a href="/y"><a href="/x">',
            ["http://site.example/x", "http://site.example/y"],
        ),
        ("<a href='/1'><a href=\"/2\"><a href='/1'><a href=/3>", [f"http://site.example/{n}" for n in (1, 2, 3)]),
        (
            '<a href="javascript:void(0)"><a href="mailto:a@b.example"><a href="tel:1"><a href="data:,x"><a href="ftp://h/">',
            [],
        ),
        (
            '<a href="http://"><a href="http://a b/"><a href="http://[1/"><a href="https://h%20h/"><a href="/ok">',
            ["http://site.example/ok"],
        ),
        ('<A HREF="/up">', ["http://site.example/up"]),
        ("<a href=/bare class=x>", ["http://site.example/bare"]),
        ("<a href=/bare/>", ["http://site.example/bare/"]),
        ("<a href='/single' title='a > b'>", ["http://site.example/single"]),
        ('<a title="a > b" href="/q">', ["http://site.example/q"]),
        ('<a\nhref = "/spaced"\n>', ["http://site.example/spaced"]),
        ("<a/href=/slash>", ["http://site.example/slash"]),
        ('<a href="/typo"">', ["http://site.example/typo"]),
        ('<a href="/near"class="x">', ["http://site.example/near"]),
        ('<a href="/first" href="/second">', ["http://site.example/first"]),
        ("<a HREF='/first' href='/second'>", ["http://site.example/first"]),
        ('<a data-href="/no" hreflang="de" rel="me" href="/yes">', ["http://site.example/yes"]),
        ('<a href=" /tri\n\tm ">', ["http://site.example/trim"]),
        ('<a href="/?a=1&amp;b=2">', ["http://site.example/?a=1&b=2"]),
        ('<a href="/?a=1&b=2&copy=3&reg;">', ["http://site.example/?a=1&b=2&copy=3%C2%AE"]),
        ("<a href='/?a=1&amp;copy=2&notit;&lt'>", ["http://site.example/?a=1&copy=2&notit;%3C"]),
        ('<a href="&#47;&#x78;">', ["http://site.example/x"]),
        ('<a name="anchor"><a><a class=x><abbr href="/no"><area href="/no"><link href="/no">', []),
        ('<!-- <a href="/no"> --><a href="/yes">', ["http://site.example/yes"]),
        ('<!--><a href="/yes">-->', ["http://site.example/yes"]),
        ('<!-- --!><a href="/yes">', ["http://site.example/yes"]),
        ("<script>s = '<a href=\"/no\">'</script><style><a href='/no'></style>", []),
        ("<textarea><a href='/no'></textarea><iframe><a href='/no'></iframe><xmp><a href='/no'></xmp>", []),
        ("<div title='<a href=\"/no\">' data-x=\"<a href='/no'>\"><a href=/yes>", ["http://site.example/yes"]),
        ("<template><a href=/no><a href='/no2'></template><a href=/yes>", ["http://site.example/yes"]),
        ("<noscript><a href=/yes></noscript>", ["http://site.example/yes"]),
        (
            "<svg><a href='/icon'><path d='M0'/></a><style/><a href=/more></a></svg>",
            ["http://site.example/icon", "http://site.example/more"],
        ),
        ("<plaintext><a href=/no>", []),
        ('<a href="/yes"><a href="/cut', ["http://site.example/yes"]),
        ('<p>1 < 2 <a href="/yes">', ["http://site.example/yes"]),
    ],
)
def test_html_links(markup: str, links: list[str]) -> None:
    assert html_page(markup).links == links


@pytest.mark.parametrize(
    ("markup", "links"),
    [
        ('<a href="x"><base href="/b/"><base href="/c/">', ["http://site.example/b/x"]),
        ('<base target=_top><base href="https://cdn.example/b/c"><a href="x">', ["https://cdn.example/b/x"]),
        ('<base href=""><a href="x">', ["http://site.example/dir/x"]),
        ('<base href="http://[bad/"><a href="x">', ["http://site.example/dir/x"]),
        ('<base href="data:,x"><a href="x">', ["http://site.example/dir/x"]),
        ('<!-- <base href="/b/"> --><template><base href="/b/"></template><a href="x">', ["http://site.example/dir/x"]),
        ('<base href="/a?b/c#d/e"><a href="x"><a href="#f">', ["http://site.example/x", "http://site.example/a?b/c"]),
    ],
)
def test_html_base(markup: str, links: list[str]) -> None:
    assert html_page(markup).links == links


def test_html_url_of_the_page_may_be_anything() -> None:
    for url in ("", "nonsense", "file:///x", "about:blank", "http://", "\ud800"):
        assert html_page('<a href="/x"><a href="http://h.example/y">', url=url).links == ["http://h.example/y"]
    assert html_page('<a href="x">', url="HTTP://User@Site.example:80").links == ["http://User@site.example/x"]


def test_html_nofollow_is_what_no_anchor_follows() -> None:
    page = html_page(
        '<a rel="nofollow" href="/1"><a href="/2" rel="NoFollow noopener"><a rel=nofollow href="/3"><a href="/3#x">'
        "<a rel='nofollow' href='/4'><a href='/4'><a href=\"/5\" rel=\"nofollowing\"><a href=/6 rel='ugc nofollow'>"
        '<template><a href="/1"></template><a rel="nofollow" href="mailto:x">'
    )
    assert page.links == [f"http://site.example/{n}" for n in range(1, 7)]
    assert page.nofollow == {f"http://site.example/{n}" for n in (1, 2, 6)}


# --- words and text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("", ""),
        ("one two  three\n four", "one two three four"),
        ("foo<b>bar</b>baz", "foo bar baz"),
        ("a<!-- comment -->b", "a b"),
        ("<title>not this</title><p>but this", "but this"),
        ("<body><p>x</p><title>in the body</title>", "x\nin the body"),
        ("a&nbsp;b&nbspc&#160;d&#xA0;e&ensp;f&Tab;g&#32;h", "a b c d e f g h"),
        ("a\u00a0b\u2003c\u3000d\x1ce\u0085f", "a b c d e f"),
        ("a\u200bb &#8203; &shy; &#133;", "a\u200bb \u200b \u00ad …"),
        ("&lt;p&gt; &amp;nbsp; R&D &copy2025", "<p> &nbsp; R&D ©2025"),
        ("1 < 2 <3 a<", "1 < 2 <3 a<"),
        ("a</>b", "a b"),
        ("x <?php echo 1 ?> y <!doctype z> <![CDATA[ w ]]>", "x y"),
        (
            "a <script>b</script> c <style>d</style> e <noscript>f <b>g</b></noscript> h <template>i</template> j",
            "a c e h j",
        ),
        ("<noscript>a<noscript>b</noscript>c</noscript>d", "d"),
        ("<SCRIPT>a</script >b", "b"),
        ("<script>a</scripty></script>b", "b"),
        ("<script><!-- <script> </script> c --></script> d", "d"),
        ("<script><!-- </script> d", "d"),
        ("<script><!--><script></script> d", "d"),
        ("a<script>b", "a"),
        ("a<!-- b", "a"),
        ('a<b title="b', "a"),
        ("</noscript></template>a", "a"),
        ("<textarea>a&nbsp;b <i>c</i></textarea>", "a b <i>c</i>"),
        ("<iframe>a&nbsp;b <i>c</i></iframe>d", "a&nbsp;b <i>c</i> d"),
        ("<xmp>a <b></xmp><noembed>c <d></noembed>", "a <b> c <d>"),
        ("<plaintext>a </plaintext> <b>", "a </plaintext> <b>"),
        ("<body><noframes>a</noframes>b", "a b"),
        ("<frameset><frame src=x><noframes>a b</noframes></frameset>", ""),
        ("<p>a<frameset>b", "a b"),
        ("<select><option>a<option>b</select>", "a\nb"),
        ("<svg><title>a</title><text>b</text><style>c</style><script>d</script><style/>e</svg>f", "a b e f"),
        ("<p>a</p><p>b <i>c</i></p>d<br>e<ul><li>f<li>g</ul><table><tr><td>h<td>i", "a\nb c\nd\ne\nf\ng\nh i"),
        ("a\nb<div>c\n\nd</div>", "a b\nc d"),
        ("<div title=\"x > y\">a</div><div title='>'>b</div><div title=>>c", "a\nb\n>c"),
    ],
)
def test_html_words(markup: str, text: str) -> None:
    page = html_page(markup)
    assert page.text == text
    assert page.word_count == len(text.split())


def test_html_text_is_made_when_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scans: list[bytes] = []

    class Counted(html_parse._Scan):
        def __init__(self, page: bytes, *, blocks: bool = False) -> None:
            scans.append(page)
            super().__init__(page, blocks=blocks)

    monkeypatch.setattr(html_parse, "_Scan", Counted)
    body = b"<p>caf\xe9"
    page = parse_page(body, HTML_URL)
    assert page._body is body
    assert len(scans) == 1
    assert page.text == "café"
    assert page.text is page.text
    assert len(scans) == 2
    assert page._body == b""


def test_html_page_compares_and_pickles() -> None:
    page = html_page("<title>t</title><a href=x rel=nofollow>y z")
    copy = pickle.loads(pickle.dumps(page))
    assert copy == page
    assert copy.text == page.text == "y z"
    assert "y z" not in repr(page)


# --- metadata


def test_html_metadata() -> None:
    page = html_page(
        """<!DOCTYPE html><HTML class=no-js LANG=" de-AT "><head>
        <meta property="og:description" content="not this">
        <META NAME="Description" CONTENT="  Fish &amp;
            chips ">
        <meta name=description content="nor that">
        <meta name=robots content="NoIndex, nofollow,"><meta name='ROBOTS' content='max-snippet:10'>
        <meta name="googlebot-robots" content="none">
        <link rel="shortcut Canonical" href="/c?x=1&amp;y=2#z"><link rel=canonical href=/later>
        <link rel=alternate type="application/rss+xml" title="RSS" href="/rss">
        <link type='Application/Atom+XML' rel='alternate home' href='atom'>
        <link rel="alternate" type="application/feed+json" href="https://feeds.example/json">
        <link rel=alternate type="application/rss+xml" href="/rss">
        <link rel=alternate type="application/rss+xml" href="mailto:x"><link rel=alternate type="application/rss+xml">
        <link rel="alternate" hreflang="en" href="/en"><link rel=stylesheet href=s.css>
        <template><meta name=description content=no></template>
        </head><body><html lang=fr>"""
    )
    assert page.language == "de-AT"
    assert page.description == "Fish & chips"
    assert page.robots == ("noindex", "nofollow", "max-snippet:10")
    assert page.canonical == "http://site.example/c?x=1&y=2"
    assert page.feeds == ["http://site.example/rss", "http://site.example/dir/atom", "https://feeds.example/json"]
    assert page.links == []


def test_html_metadata_absent() -> None:
    page = html_page('<html lang=""><meta name=description content=" "><link rel=canonical href="javascript:x">')
    assert (page.language, page.description, page.canonical) == (None, None, None)
    assert (page.robots, page.feeds, page.nofollow, page.encoding) == ((), [], frozenset(), "utf-8")


# --- whatever the bytes


def html_units(*lines: str) -> list[str]:
    """What stands between the bars."""
    return [unit for line in lines for unit in line.split("|")]


HTML_FRAGMENTS = html_units(
    '<a href=/1>|<a href=\'/2\'>|<a href="/3#x">|<A HREF = /4>|<a href="?&amp;&copy=&#1114112;">|</a>',
    "<a rel=nofollow href=5>",
    "word |x|é|日本|\u00a0|\u3000| |\n|<b>|</b>|<p>|</p>|<br/>|<div title='>'>|<div title=\"<a href=no>\">|</div>",
    "<!--|-->|--!>|<!-->|<!|<?|</|</>|<|>|\"|'|=|/|-|&|&#|&#x|;|&nbsp;|&nbsp|&amp;|&lt|&#160;|&#99999999999;|\x00|<plaintext>",
    "<script>|</script>|<script/>|<style>|</style>|<title>|</title>|<textarea>|</textarea>|<xmp>|</xmp>|<iframe>|</iframe>",
    "<noembed>|</noembed>|<noframes>|</noframes>|<noscript>|</noscript>|<template>|</template>|<svg>|</svg>|<svg/>|<select>",
    "<html lang=x>|<head>|<body>|<frameset>|<base href=/b/>|<meta name=robots content=none>|<meta charset=koi8-r>",
    "<link rel=canonical href=c>|<link rel=alternate type=application/rss+xml href=f>|<![CDATA[|]]>|<math>|<table>",
)


def html_check_invariants(page: Page) -> None:
    assert len(set(page.links)) == len(page.links)
    assert page.nofollow <= set(page.links)
    for url in [*page.links, *page.feeds, *([page.canonical] if page.canonical else [])]:
        assert url.startswith(("http://", "https://"))
        assert "#" not in url
        assert ada_url.normalize_url(url) == url
    assert page.title is None or page.title == " ".join(page.title.split()) != ""
    assert len(page.text.split()) == page.word_count


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.none() | st.text(max_size=40), st.text(max_size=30))
def test_html_any_bytes(body: bytes, content_type: str | None, url: str) -> None:
    parse_page(body, url, content_type)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(HTML_FRAGMENTS), max_size=40).map("".join))
@example("<svg><svg></svg><title>x</svg><a href=/1>")
@example("<template><noscript></template>x</noscript>y")
def test_html_any_soup(markup: str) -> None:
    html_check_invariants(html_page(markup))
    html_check_invariants(html_page(markup, content_type=None))


def test_html_long_soup_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pieces end is not to be seen in the result."""
    markup = "<p title='a > b'>one &amp; two <a href=/{0}>three</a> <script>'<a href=/no>' + '</p>'</script></p>\n"
    markup += (
        "<!-- </p> {0} --> <svg><title>four </title><style/><!-- </svg> --></svg> <textarea> </p> five </textarea>\n"
    )
    markup += "<noscript> </p> six <a href='/n{0}'>x</a></noscript> <template> <a href=/no> </p> seven </template>\n"
    markup = "".join(markup.format(i) for i in range(20))
    whole = html_page(markup)
    whole_text = whole.text
    assert (len(whole.links), whole.word_count) == (40, 20 * 7)
    for size in (2, 10, 50, 100, 333, 1000):
        monkeypatch.setattr(html_parse, "_PIECE", size)
        pieces = html_page(markup)
        assert pieces == whole
        assert pieces.text == whole_text


# --- hostile pages

HTML_HOSTILE = html_units(
    "<|</|</a|<a|<a |<a href=\"|<a href='x|<a x=\"'|<a b=='|<!--|<!-- -|<!--<|<!-|<!|<?|-->|<script>|<script></script>",
    "<script><!--|<script><!--<script>|<style>|<title>|<title></title>|<textarea>|<xmp>x</xmp>|<iframe>|<plaintext>|<svg>",
    "<svg>x</svg>|<svg><svg></svg>|<svg><title>|<svg><!--|<svg><style>|<template>|<template></template>|<noscript>",
    "<noscript>x</noscript>|<frameset>|x<frameset>|<base>|<meta name=robots content=a>|<meta charset=",
    "<link rel=canonical>|<html>|<body>",
    "&|&#|&#x|&amp|&nbsp|<div>|</div>|<b>x|<a href=x>|<a href = 'x'>|<a =x>|<a rel=\"nofollow\" |\"|'|='|=\"",
    '<x ="| |ab |é |\x00|x|\udcff',
)
HTML_GIANTS = {
    "an attribute": b'<a title="%b" href=/x>',
    "an attribute in single quotes": b"<a title='%b' href='/x'>",
    "an href": b'<a href="/%b">',
    "a rel": b'<a rel="%b" href=/x>',
    "an unclosed attribute": b'<a title="%b>',
    "a title": b"<title>%b</title>",
    "a number": b"<title>&#%b;</title>",
    "a comment": b"<!-- %b --><a href=/x>",
    "a script": b"<script>%b</script><a href=/x>",
    "a word": b"%b",
    "a tag name": b"<a%b>",
    "a host": b'<a href="http://%b/">',
    "a description": b'<meta name=description content="%b">',
}


@pytest.mark.parametrize("unit", HTML_HOSTILE)
def test_html_hostile_repetition_is_read_a_few_times(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is counted in bytes handed to the tokenizer, whose patterns cannot backtrack."""
    handed = 0

    class Counting:
        def __init__(self, pattern: Any) -> None:
            self.pattern = pattern

        def split(self, piece: bytes) -> list[bytes | None]:
            nonlocal handed
            handed += len(piece)
            parts: list[bytes | None] = self.pattern.split(piece)
            return parts

    tokenizer = html_parse._tokenizer
    monkeypatch.setattr(html_parse, "_tokenizer", lambda **options: Counting(tokenizer(**options)))
    monkeypatch.setattr(html_parse, "_PIECE", 500)
    for prefix in (b"", b"<p>x</p> "):
        body = prefix + unit.encode("utf-8", "surrogateescape") * (40_000 // len(unit))
        handed = 0
        page = parse_page(body, HTML_URL, "text/html; charset=utf-8")
        assert handed < 6 * len(body)
        html_check_invariants(page)


@pytest.mark.parametrize("what", HTML_GIANTS)
@pytest.mark.parametrize("filling", [b"x", b"9", b"<", b"&", b"' ", b"- ", b"a=b "])
def test_html_giant_constructs(what: str, filling: bytes) -> None:
    html_check_invariants(parse_page(HTML_GIANTS[what].replace(b"%b", filling * (200_000 // len(filling))), HTML_URL))


def test_html_deep_and_wide_pages() -> None:
    deep = html_page("<div>" * 100_000 + "x" + "</div>" * 100_000)
    assert deep.word_count == 1
    wide = html_page("".join(f'<p><a href="/{n}">word {n}</a></p>\n' for n in range(20_000)))
    assert (len(wide.links), wide.word_count) == (20_000, 40_000)
    assert wide.links[-1] == "http://site.example/19999"


# --- the fast ways give what the slow ones give

html_names = st.sampled_from(["href", "HREF", "rel", "class", "data-x", "xml:lang", "hidden", "title"])
html_values = st.text(alphabet="ab/?=&;#.:% \n'<>éamp38", max_size=12)


@st.composite
def html_tags(draw: st.DrawFn) -> str:
    """An <a> with attributes in any spelling."""
    tag = draw(st.sampled_from(["a", "A"]))
    for name, value in draw(st.lists(st.tuples(html_names, html_values), max_size=4)):
        bare = "".join(c for c in value if c not in " \n'<>=") or "x"
        spelling = st.sampled_from(
            [f'="{value}"', "='" + value.replace("'", "") + "'", f"={bare}", f' = "{value}"', ""]
        )
        tag += draw(st.sampled_from([" ", "\n", "  "])) + name + draw(spelling)
    return tag + draw(st.sampled_from([">", " >", " />"]))


@settings(max_examples=500, deadline=None)
@given(html_tags())
def test_html_plain_attributes_equal_those_of_html_parser(tag: str) -> None:
    plain = html_parse._plain_attributes(tag.encode())
    assert plain is None or plain == html_parse._read_attributes(tag.encode())


@settings(max_examples=500, deadline=None)
@given(html_tags())
def test_html_ordinary_anchors_equal_unusual_ones(tag: str) -> None:
    attributes = html_parse._attributes(tag.encode())
    href = attributes.get("href")
    url = html_parse._join(HTML_URL, href) if href is not None else None
    page = html_page(f"<{tag}")
    assert page.links == ([url.partition("#")[0]] if url else [])
    assert bool(page.nofollow) == (bool(page.links) and "nofollow" in attributes.get("rel", "").lower().split())


html_bases = st.sampled_from(
    [
        "http://h.example/",
        "http://h.example/a/b?c/d",
        "https://u:p@h.example:81/a/../b/",
        "http://127.1/%2e/x?y#z",
        "http://[::1]/a;b/c",
    ]
)
html_addresses = st.lists(
    st.sampled_from(
        html_units(
            "/|//|.|..|:|?|#|%|%2e|%2E|%41|@|;|=|&|+|~|!|$|(|)|*|,|'|\"|<|>|\\|^|`|{|}|[|]|a|b|Z|0|1|é|-|_",
            "http:|https://|http://h.example|http://H.example|http://1.2|http://0x7f.1|http://xn--a|http://h.example:80",
            "https://h.example:8080|http://a_b|http://a..b|http://u@h|http://h%41|javascript:|mailto:| |\t|\n|\u00a0",
        )
    ),
    max_size=7,
).map("".join)


@settings(max_examples=1000, deadline=None)
@given(html_bases, st.lists(html_addresses, max_size=5))
@example("http://h.example/", ["http://h.example/a/%2e%2e/b"])
@example("http://h.example/a/b", ["c/.%2e/d"])
@example("http://h.example/a/b", ["a:b"])
@example("http://h.example/a/b", ["/x #y"])
@example("http://h.example/a/b", ["http:?x"])
@example("http://h.example/a/b", ["h\ntt\tp:"])
@example("http://h.example/a/b", ["../../../c:d?e"])
@example("http://h.example/a//b/", ["../../..//c"])
@example("http://h.example/a/b/c", ["../..x"])
@example("http://h.example/" + "a/" * 12, ["../" * 11 + "x"])
@example("https://h.example/a/b?c/d", ["../"])
@example("https://h.example/a/b", ["//h.example:443/c"])
@example("http://h.example/a/b", ["x", "", "\0/y", "#\0", "../z"])
def test_html_resolving_all_equals_joining_each(base: str, hrefs: list[str]) -> None:
    base = ada_url.normalize_url(base)
    for start in (base, None):
        joined = [html_parse._join(start, href.replace("\0", "\ufffd")) for href in hrefs]
        urls = [url and url.partition("#")[0] for url in joined]
        assert html_parse._resolve(start, hrefs) == urls
        assert html_parse._resolve(start, [href.replace("&", "&amp;").encode() for href in hrefs]) == urls


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*string.whitespace, "\x1c", "\x85", "\xa0", "\u2028", "\u200b", "a", "é", "&", "#", "x", ";", "0"]
        )
        | st.sampled_from(
            [
                "&nbsp",
                "&nbsp;",
                "&NewLine;",
                "&ensp;",
                "&#32;",
                "&#0x20;",
                "&#xa0;",
                "&#160",
                "&#1600",
                "&#133;",
                "&amp;",
                "&#x3000;",
            ]
        ),
        max_size=20,
    ).map("".join)
)
def test_html_words_are_those_of_split(text: str) -> None:
    assert html_parse._count_words(text.encode()) == len(html.unescape(text).split())


class HtmlReference(HTMLParser):
    """The textbook: every tag and every text through html.parser."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.links, self.words = url, dict[str, None](), 0
        self.title: str | None = None
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href is not None:
            url = ada_url.join_url(self.url, href)
            if url.startswith("http"):
                self.links[url.partition("#")[0]] = None
        if tag not in ("br", "img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["title"] and "svg" not in self.open:
            self.title = self.title or " ".join(data.split())
        elif not {"script", "style", "noscript", "head"} & set(self.open):
            self.words += len(data.split())


html_texts = st.lists(
    st.sampled_from(
        [
            "word",
            " ",
            "\n",
            "été",
            "日本 語",
            "&amp;",
            "&nbsp;",
            "&#160;",
            "&eacute;",
            "&lt;b&gt;",
            "1.5",
            "\u00a0",
            "'",
            '"',
            "--",
        ]
    ),
    max_size=6,
).map("".join)
html_paths = st.sampled_from(
    ["/", "/a/b?c=d", "x.html", "../up", "#f", "https://h.example/x", "mailto:a", "?q=1&amp;r=2", "é", "//n.example"]
)
html_leaves = st.one_of(
    html_texts,
    st.sampled_from(
        [
            "<br>",
            "<br/>",
            '<img alt="a > b">',
            "<!-- <a href='/no'> -->",
            "<script>if (1 < 2) '<p>no</p>'</script>",
            "<style>p > a {}</style>",
        ]
    ),
    st.builds("<a class='x' href='{}'>{}</a>".format, html_paths, html_texts),
    st.builds('<a data-x="1" href="{}" rel="nofollow">{}</a>'.format, html_paths, html_texts),
    st.builds('<a href="{}" class="y">{}</a>'.format, html_paths, html_texts),
    st.builds("<svg viewBox='0 0 1 1'><title>{}</title><path d='M0'/></svg>".format, st.just("icon one")),
)
html_documents = st.builds(
    "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><title>{}</title></head><body>{}</body></html>\n".format,
    html_texts,
    st.recursive(
        html_leaves,
        lambda inner: st.builds(
            "<{0} id='i' title=\"<a href='/no'>\">{1}</{0}>".format,
            st.sampled_from(["div", "p", "b", "SPAN", "noscript", "section"]),
            st.lists(inner, max_size=4).map("".join),
        ),
        max_leaves=25,
    ),
)


@settings(max_examples=200, deadline=None)
@given(html_documents)
def test_html_well_formed_pages_as_the_textbook_reads_them(markup: str) -> None:
    reference = HtmlReference(HTML_URL)
    reference.feed(markup)
    reference.close()
    page = html_page(markup)
    assert page.title == (reference.title or None)
    assert page.links == list(reference.links)
    assert page.word_count == len(page.text.split()) == reference.words


# ===================================================================================================== crawl_core


@pytest.mark.parametrize(
    ("text", "url", "host"),
    [
        ("http://example.com", "http://example.com/", "example.com"),
        ("HTTP://EXAMPLE.com:80/a/../b?q#frag", "http://example.com/b?q", "example.com"),
        ("https://example.com:443/%7euser/ü x", "https://example.com/%7euser/%C3%BC%20x", "example.com"),
        ("https://example.com:8443/", "https://example.com:8443/", "example.com"),
        ("http://user:p@example.com/x", "http://user:p@example.com/x", "example.com"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x", "[::1]"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        (" http://a.example/\t", "http://a.example/", "a.example"),
        ("http://0x7f.1/", "http://127.0.0.1/", "127.0.0.1"),
    ],
)
def test_normalise(text: str, url: str, host: str) -> None:
    assert normalise(text) == (url, host)
    assert normalise(url) == (url, host)


@pytest.mark.parametrize(
    "text",
    ["", "example.com", "ftp://example.com/", "javascript:alert(1)", "http://", "http://exa mple/", "//x/", "not a URL",
     "file:///etc/passwd", "http://a/" + "x" * 9000, "\ud800", "http://\ud800/", "http://[::1/"],
)  # fmt: skip
def test_what_is_not_a_url_is_refused(text: str) -> None:
    with pytest.raises(FetchError) as caught:
        normalise(text)
    assert caught.value.kind == "invalid_url"


def test_credentials_and_cookies_stay_with_the_origin_that_the_list_named() -> None:
    options = Options(headers=(("Cookie", "c=1"), ("Authorization", "Bearer t"), ("X-Other", "o")))
    first = Request("http://u:p%40@a.example/x", "http://u:p%40@a.example/x", "a.example")
    url, headers = request_headers(options, first)
    assert url == "http://a.example/x"
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"u:p@").decode()
    assert headers["Cookie"] == "c=1"
    hop = Request("http://a.example/x", "http://b.example/", "b.example", hops=1)
    assert not {"Cookie", "Authorization"} & set(request_headers(options, hop)[1])
    assert request_headers(options, hop)[1]["X-Other"] == "o"
    home = Request("http://a.example/x", "http://a.example/y", "a.example", hops=1)
    assert request_headers(options, home)[1]["Cookie"] == "c=1"


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": 0}, {"per_host": 0}, {"burst": 0}, {"retries": -1}, {"timeout": 0}, {"max_bytes": 0},
     {"rate": -1}, {"rate": math.nan}, {"rate": math.inf}, {"headers": (("a b", "c"),)}, {"headers": (("a", "b\nc"),)},
     {"user_agent": "a\r\nb"}, {"proxy": "socks5://x"}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Options(**wrong)


def taken(decision: Request | float | None) -> Request:
    assert isinstance(decision, Request), decision
    return decision


def test_frontier_one_host_row_by_row() -> None:
    frontier = Frontier(rate=2.0, burst=1)
    assert frontier.take(0.0) == math.inf
    assert frontier.add_all(["http://a/1", "http://a/2", "http://a/1#again", "http://A:80/2"], 0.0) == 2
    first = taken(frontier.take(0.0))
    assert (first.url, first.target, first.host) == ("http://a/1", "http://a/1", "a")
    assert frontier.take(0.1) == pytest.approx(0.4)
    assert frontier.clear_to_send(first, 0.2) == 0.0
    assert frontier.take(0.2) == pytest.approx(0.3)  # the lower bound that is in the heap
    assert frontier.take(0.5) == pytest.approx(0.2)  # half a second after it was *sent*
    frontier.close()
    second = taken(frontier.take(0.7))
    assert (first.last_of_host, second.last_of_host) == (False, True)
    frontier.finish(first, 0.8)
    assert frontier.take(0.8) == math.inf  # it may come back
    frontier.finish(second, 0.9)
    assert frontier.take(0.9) is None
    assert frontier.stats() == FrontierStats(waiting=0, in_flight=0, hosts=1, seen=2, duplicates=2, closed=True)
    assert "0 waiting" in repr(frontier)


def test_frontier_holds_back_at_the_moment_of_sending() -> None:
    frontier = Frontier(rate=1.0, burst=1)
    frontier.add_all(["http://a/1", "http://a/2", "http://a/3"], 0.0)
    slow = taken(frontier.take(0.0))
    quick = taken(frontier.take(1.0))  # slow is still connecting
    assert frontier.clear_to_send(quick, 1.0) == 0.0
    assert frontier.clear_to_send(slow, 1.4) == pytest.approx(0.6)  # both at once would be two within a second
    assert frontier.clear_to_send(slow, 2.0) == 0.0
    third = taken(frontier.take(3.0))
    frontier.pause("a", 60.0, 3.0)
    assert frontier.stats().in_flight == 3
    with pytest.raises(Postponed):
        frontier.clear_to_send(third, 3.0)
    frontier.put_back(third, 3.0, 3.0)
    assert frontier.take(3.0) == pytest.approx(57.0)
    assert taken(frontier.take(60.0)) is third


def test_frontier_a_paused_or_slow_host_holds_up_no_other() -> None:
    frontier = Frontier(rate=0, per_host=1)
    frontier.add_all([f"http://{host}/{n}" for host in "abc" for n in range(2)], 0.0)
    a = taken(frontier.take(0.0))
    frontier.pause("a", 100.0, 0.0)
    assert [taken(frontier.take(0.0)).host for _ in range(2)] == ["b", "c"]
    assert frontier.take(0.0) == math.inf  # one in flight per host
    frontier.finish(a, 1.0)
    assert frontier.take(1.0) == 99.0
    assert taken(frontier.take(100.0)).host == "a"


def test_frontier_retries_wait_in_the_frontier_and_redirects_obey_the_target_host() -> None:
    frontier = Frontier(rate=10.0, burst=1)
    frontier.add_all(["http://a/1", "http://b/1"], 0.0)
    a, b = taken(frontier.take(0.0)), taken(frontier.take(0.0))
    assert frontier.clear_to_send(a, 0.0) == frontier.clear_to_send(b, 0.0) == 0.0
    frontier.put_back(a, 0.01, 5.0)
    frontier.put_back(b, 0.02, 0.02, "http://a/target", "a")
    assert frontier.take(0.02) == pytest.approx(0.08)
    hop = taken(frontier.take(0.1))
    assert hop is b
    assert (hop.target, hop.host) == ("http://a/target", "a")
    frontier.finish(hop, 0.2)
    assert frontier.take(0.2) == pytest.approx(4.8)
    assert taken(frontier.take(5.0)) is a


def test_frontier_total_rate_and_stop_and_refused_urls() -> None:
    frontier = Frontier(rate=0, total_rate=4.0)
    frontier.add_all(["http://a/", "http://b/", "http://c/", "no url", "no url"], 0.0)
    refused = taken(frontier.take(0.0))
    assert refused.error and refused.error.kind == "invalid_url"
    frontier.finish(refused, 0.0)
    a = taken(frontier.take(0.0))
    assert frontier.clear_to_send(a, 0.0) == 0.0
    assert frontier.take(0.0) == pytest.approx(0.25)
    b = taken(frontier.take(0.25))
    assert frontier.clear_to_send(b, 0.3) == 0.0
    frontier.stop()
    assert frontier.take(9.0) is None
    frontier.finish(a, 9.0)
    frontier.put_back(b, 9.0, 10.0)
    assert frontier.take(20.0) is None
    assert frontier.stats().waiting == 2


def test_frontier_forgets_hosts_when_their_bucket_is_full_again() -> None:
    frontier = Frontier(rate=1.0, lead=0.002)
    frontier.add_all([f"http://h{n}/" for n in range(1000)], 0.0)
    requests = [taken(frontier.take(0.0)) for _ in range(1000)]
    for request in requests:
        assert frontier.clear_to_send(request, 0.0) == 0.0
        frontier.finish(request, 0.1)
    assert frontier.stats().hosts == 1000
    frontier.add_all(["http://late/"], 5.0)
    taken(frontier.take(5.0))
    frontier.add_all(["http://later/"], 9.0)
    taken(frontier.take(9.0))
    assert frontier.stats().hosts <= 3


class Played:
    """What a simulated crawl did: every send by host, every URL finished, and the time it all took."""

    def __init__(self) -> None:
        self.sent: dict[str, list[float]] = {}
        self.finished: Counter[str] = Counter()
        self.end = 0.0


def play(seed: int, frontier_class: type[Frontier] = Frontier, **settings: Any) -> Played:
    """A crawl under a simulated clock: random latencies, connect delays, failures, redirects, pauses, workers."""
    rng = random.Random(seed)
    hosts = [f"h{n}" for n in range(rng.randint(1, 6))]
    workers = rng.randint(1, 12)
    settings = {
        "rate": rng.choice([0, 0.5, 3.0, 50.0]),
        "burst": rng.choice([1, 1, 3]),
        "per_host": rng.choice([1, 2, 8]),
        "total_rate": rng.choice([0, 0, 20.0]),
        "lead": rng.choice([0.0, 0.002]),
    } | settings
    frontier = frontier_class(**settings)
    urls = [f"http://{rng.choice(hosts)}/{n}" for n in range(rng.randint(1, 60))]
    played = Played()
    now, serial = 0.0, 0
    events: list[tuple[float, int, str, Request | None]] = []
    paused: dict[str, float] = {}

    def at(when: float, what: str, request: Request | None = None) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (when, serial, what, request))

    cut = rng.randint(0, len(urls))
    frontier.add_all(urls[:cut], now)
    at(rng.random() * 3, "more")
    alarm = math.inf
    busy = steps = 0
    in_flight: Counter[str] = Counter()
    while True:
        steps += 1
        assert steps < 20_000, "the crawl does not end"
        while busy < workers:
            decision = frontier.take(now)
            if not isinstance(decision, Request):
                break
            busy += 1
            in_flight[decision.host] += 1
            assert in_flight[decision.host] <= settings["per_host"]
            at(now + rng.choice([0.0, 0.001, rng.random()]), "ready", decision)
        else:
            decision = math.inf
        if decision is None:
            break
        if isinstance(decision, float) and now + decision < alarm:
            alarm = now + decision
            at(alarm, "tick")
        assert events, f"nothing will happen, but {frontier}"
        now, _, what, request = heapq.heappop(events)
        if what == "more":
            frontier.add_all(urls[cut:] + urls[: cut // 2], now)
            frontier.close()
        elif what == "ready" and request:
            try:
                wait = frontier.clear_to_send(request, now)
            except Postponed:
                busy -= 1
                in_flight[request.host] -= 1
                frontier.put_back(request, now, now)
                continue
            if wait > 0:
                at(now + wait, "ready", request)
            else:
                assert now >= paused.get(request.host, 0.0) - 1e-9
                played.sent.setdefault(request.host, []).append(now)
                at(now + rng.expovariate(5), "answer", request)
        elif what == "answer" and request:
            busy -= 1
            in_flight[request.host] -= 1
            fate = rng.random()
            if request.attempt < 4 and fate < 0.15:
                request.attempt += 1
                frontier.put_back(request, now, now + rng.random() * 2)
            elif request.hops < 3 and fate < 0.3:
                request.hops += 1
                host = rng.choice(hosts)
                frontier.put_back(request, now, now, f"http://{host}/hop", host)
            else:
                if fate < 0.4:
                    frontier.pause(request.host, now + 5.0, now)
                    paused[request.host] = now + 5.0
                frontier.finish(request, now)
                played.finished[request.url] += 1
        elif what == "tick":
            alarm = math.inf
    played.end = now
    assert played.finished == Counter(set(urls)), "each URL once"
    assert busy == 0
    stats = frontier.stats()
    assert (stats.waiting, stats.in_flight) == (0, 0)
    groups = [(settings["rate"], settings["burst"], times) for times in played.sent.values()]
    groups.append((settings["total_rate"], 1, sorted(t for times in played.sent.values() for t in times)))
    for rate, burst, times in groups:
        if rate:
            for i, j in itertools.combinations_with_replacement(range(len(times)), 2):
                assert j - i + 1 <= burst + rate * (times[j] - times[i]) + 1e-6, "any window"
    return played


@pytest.mark.parametrize("block", range(10))
def test_frontier_simulated_crawls_keep_every_promise(block: int) -> None:
    for seed in range(block * 60, block * 60 + 60):
        play(seed)


class CarelessFrontier(Frontier):
    """Planted: takes the tokens when a request leaves, not when it is sent."""

    def clear_to_send(self, request: Request, now: float) -> float:
        super().clear_to_send(request, now)
        return 0.0


class ForgetfulVisited(pr.Visited[str]):
    def add(self, key: str) -> bool:
        super().add(key)
        return True


class ForgetfulFrontier(Frontier):
    """Planted: a URL that is found while it is in flight is taken for a new one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._visited = ForgetfulVisited()


class LosingFrontier(Frontier):
    """Planted: a request that is put back is forgotten if its host was idle."""

    def _schedule(self, host: Any, now: float) -> None:
        if not (host.delayed and host.head >= len(host.waiting)):
            super()._schedule(host, now)


@pytest.mark.parametrize("planted", [CarelessFrontier, ForgetfulFrontier, LosingFrontier])
def test_the_simulation_finds_planted_bugs(planted: type[Frontier]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(200):
            play(seed, planted)


def test_frontier_a_skewed_list_in_host_order_takes_as_long_as_its_busiest_host() -> None:
    frontier = Frontier(rate=10.0, burst=1)
    urls = [f"http://big/{n}" for n in range(100)] + [f"http://h{h}/{n}" for h in range(30) for n in range(10)]
    frontier.add_all(urls, 0.0)
    frontier.close()
    now = 0.0
    while (decision := frontier.take(now)) is not None:
        if isinstance(decision, Request):
            assert frontier.clear_to_send(decision, now) == 0.0
            frontier.finish(decision, now)
        else:
            now += decision
    assert now == pytest.approx(99 / 10)


def answer(status: int = 200, body: bytes = b"", **headers: Any) -> Response:
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return Response(status, named, body, seconds=0.01)


def judged(outcome: Response | FetchError, **options: Any) -> tuple[Crawl, Request, Response | FetchError | None]:
    clock = [100.0]
    crawl = Crawl(Options(**options), clock=lambda: clock[0], rng=lambda: 0.5)
    crawl.frontier.add_all(["http://a.example/x"], clock[0])
    request = taken(crawl.frontier.take(clock[0]))
    crawl.frontier.clear_to_send(request, clock[0])
    return crawl, request, crawl.judge(request, outcome)


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (answer(200), False), (answer(204), False), (answer(304), False), (answer(404), False), (answer(410), False),
        (answer(429), True), (answer(500), True), (answer(501), False), (answer(503), True), (answer(408), True),
        (FetchError("timeout", ""), True), (FetchError("connect", ""), True), (FetchError("reset", ""), True),
        (FetchError("truncated", ""), True), (FetchError("dns", ""), False), (FetchError("dns", "", retry=True), True),
        (FetchError("tls", ""), False), (FetchError("decode", ""), False), (FetchError("too_large", ""), False),
        (FetchError("protocol", ""), False), (FetchError("interrupted", ""), False),
    ],
)  # fmt: skip
def test_what_is_tried_again(outcome: Response | FetchError, again: bool) -> None:
    crawl, request, final = judged(outcome)
    assert (final is None) == again
    assert crawl.frontier.stats().waiting == int(again)
    assert request.attempt == 1 + again
    assert judged(outcome, retries=0)[2] is outcome


def test_retry_after_pauses_the_host_and_wins_over_the_back_off() -> None:
    crawl, request, final = judged(answer(429, retry_after="30"))
    assert final is None
    assert crawl.frontier.take(100.0) == pytest.approx(30.0)
    crawl.frontier.add_all(["http://a.example/other", "http://b.example/"], 100.0)
    assert taken(crawl.frontier.take(100.0)).host == "b.example"
    assert crawl.frontier.take(129.9) == pytest.approx(0.1)
    assert taken(crawl.frontier.take(130.0)) is request
    assert judged(answer(503, retry_after="1000000000"))[0].frontier.take(100.0) == MAX_RETRY_AFTER
    assert judged(answer(503, retry_after="soon"))[0].frontier.take(100.0) == pytest.approx(0.5)  # its rate: 2/s


@pytest.mark.parametrize(
    ("location", "leads"),
    [
        ("/y", "http://a.example/y"), ("y?q#f", "http://a.example/y?q"), ("//b.example", "http://b.example/"),
        ("https://b.example/ü", "https://b.example/%C3%BC"), (None, None), ("", None), ("file:///etc/passwd", None),
        ("javascript:1", None), ("http://", None), ("/x", None), ("/x#again", None), ("ftp://b/", None),
    ],
)  # fmt: skip
def test_where_redirects_lead(location: str | None, leads: str | None) -> None:
    headers: dict[str, Any] = {} if location is None else {"location": location}
    crawl, request, final = judged(answer(302, **headers))
    if leads:
        assert final is None
        assert (request.target, request.hops) == (leads, 1)
        assert crawl.stats.snapshot()["redirects"] == 1
    else:
        assert isinstance(final, FetchError)
        assert (final.kind, final.status) == ("redirects", 302)
    assert isinstance(judged(answer(301, location="/y"), max_redirects=0)[2], FetchError)


def test_rows() -> None:
    request = Request("http://a.example", "http://a.example/", "a.example", spent=0.1234)
    html = b"<!doctype html><html lang=en><title> A  b </title><p>one two<a href='/c#d'>three</a>"
    row = build_row(request, answer(200, html, content_type="text/html; charset=utf-8"))
    assert [field.name for field in dataclasses.fields(ScrapeResult)][:8] == [
        "url", "status", "title", "word_count", "links_found", "error", "fetched_at", "duration_ms",
    ]  # fmt: skip
    assert (row.url, row.status, row.title, row.word_count, row.links_found, row.error) == (
        "http://a.example", 200, "A b", 3, ["http://a.example/c"], None,
    )  # fmt: skip
    assert (row.final_url, row.bytes, row.duration_ms, row.language) == ("http://a.example/", len(html), 123.4, "en")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row.fetched_at)
    assert build_row(request, answer(404, html, content_type="text/html")).error == "http: 404 Not Found"
    assert build_row(request, answer(599)).error == "http: 599"
    failed = build_row(request, FetchError("dns", "no such host"))
    assert (failed.status, failed.final_url, failed.error) == (None, None, "dns: no such host")
    image = build_row(request, answer(200, b"<title>x", content_type="image/png"))
    assert (image.title, image.error) == (None, None)
    assert build_row(request, answer(200, b" \n<title>x")).title == "x"
    assert build_row(request, answer(200, b"GIF89a")).title is None


def test_a_list_that_fails_ends_the_run_and_what_came_before_counts() -> None:
    def urls() -> Iterator[str]:
        yield "http://a.example/"
        raise OSError("the disk is gone")

    crawl = Crawl(Options())
    changes: list[int] = []
    crawl.changed = lambda: changes.append(1)
    crawl.feed(urls()).join()
    assert isinstance(crawl.failure, OSError)
    assert crawl.frontier.take(0.0) is None
    assert changes


# ====================================================================================================== crawl_net


ZSTD = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def pack(coding: str, data: bytes) -> bytes:
    if coding == "gzip":
        return gzip.compress(data)
    if coding == "deflate":
        return zlib.compress(data)
    if coding == "raw deflate":
        packer = zlib.compressobj(wbits=-15)
        return packer.compress(data) + packer.flush()
    if coding == "br":
        return bytes(brotli.compress(data, quality=1))
    return bytes(ZSTD.compress(data))


CODINGS = ["gzip", "deflate", "raw deflate", "br", "zstd"]


def unpack(coding: str | None, data: bytes, limit: int = 1 << 20, step: int = 7) -> bytes:
    decoder = BodyDecoder(coding and coding.replace("raw ", ""), limit, 200)
    for start in range(0, len(data), step):
        for _ in decoder.feed(data[start : start + step]):
            pass
    return decoder.finish()


@pytest.mark.parametrize("coding", CODINGS)
@given(data=st.binary(max_size=2000), step=st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_decoding_gives_back_what_was_packed_whatever_the_pieces(coding: str, data: bytes, step: int) -> None:
    packed = pack(coding, data)
    assert unpack(coding, packed, step=step) == data
    if coding == "gzip":
        assert unpack(coding, packed + pack(coding, data), step=step) == data * 2
        assert unpack(coding, packed + b"junk", step=step) == data
    assert unpack("identity", data, step=step) == unpack(None, data, step=step) == data
    assert unpack("gzip, br", pack("br", pack("gzip", data)), step=step) == data


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_noticed_at_the_limit_and_a_cut_at_the_end(coding: str) -> None:
    packed = pack(coding, bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(FetchError) as caught:
        unpack(coding, packed, limit=1_000_000, step=65536)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.kind == "too_large"
    assert peak < 20_000_000
    with pytest.raises(FetchError) as caught:
        unpack(coding, pack(coding, random.Random(1).randbytes(10_000))[:5000])
    assert caught.value.kind == "decode"


@pytest.mark.parametrize("coding", [*CODINGS, "gzip, gzip, gzip, gzip", "unheard-of"])
@given(data=st.binary(min_size=1, max_size=300))
@settings(max_examples=40, deadline=None)
def test_rubbish_is_decoded_or_refused(coding: str, data: bytes) -> None:
    try:
        unpack(coding, data)
    except FetchError as error:
        assert error.kind in ("decode", "too_large")
    else:
        assert coding in CODINGS


def test_a_name_is_looked_up_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    gate = threading.Event()

    def getaddrinfo(name: str, *args: Any, **more: Any) -> Any:
        asked.append(name)
        assert gate.wait(10)
        if name == "no.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, 1, 6, "", ("192.0.2.1", 0)), (socket.AF_INET6, 1, 6, "", ("2001:db8::1", 0, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = Resolver(threads=2)
    with pytest.raises(FetchError, match="did not answer") as late:
        resolver.lookup("a.example", 0.0)
    assert late.value.kind == "timeout"
    found = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")]

    async def many() -> list[Any]:
        waiting = [asyncio.create_task(resolver.lookup_async("a.example")) for _ in range(20)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*waiting)

    assert asyncio.run(many()) == [found] * 20
    assert resolver.lookup("a.example", 1.0) == found
    for _ in range(2):
        with pytest.raises(FetchError, match="not known") as caught:
            resolver.lookup("no.example", 10.0)
        assert caught.value.kind == "dns"
    assert asked == ["a.example", "no.example"]
    assert resolver.lookup("127.0.0.1", 0.0) == [(socket.AF_INET, "127.0.0.1")]
    assert resolver.lookup("::1", 0.0) == [(socket.AF_INET6, "::1")]
    resolver.close()


def test_a_closed_resolver_lets_go_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: gate.wait(10) and [])
    resolver = Resolver()
    future = resolver.submit("slow.example")
    resolver.close()
    with pytest.raises(FetchError, match="interrupted"):
        future.result(10)
    gate.set()


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert ProxyRule(None).find("http://a.example/") is None
    assert ProxyRule("http://p:1").find("https://a.example/") == "http://p:1"
    monkeypatch.setenv("http_proxy", "http://q:2")
    monkeypatch.setenv("no_proxy", "b.example")
    assert ProxyRule(None).find("http://a.example/") == "http://q:2"
    assert ProxyRule(None).find("http://b.example/x") is None
    assert ProxyRule(None).find("https://a.example/") is None


# ====================================================================================================== crawl_cli


class Pieces(io.RawIOBase):
    """A raw stream that gives its bytes in pieces of the given sizes, as a pipe does."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, itertools.cycle(sizes)

    def read(self, size: int = -1) -> bytes:
        n = min(next(self._sizes), size)
        piece, self._data = self._data[:n], self._data[n:]
        return piece


@given(
    lines=st.lists(st.text(st.characters(exclude_characters="\r\n\ufeff", exclude_categories=["Cs"]), max_size=30)),
    sizes=st.lists(st.integers(2, 100), min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    form=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@settings(deadline=None)
def test_lines_are_read_whatever_the_pieces(lines: list[str], sizes: list[int], end: str, form: str) -> None:
    stream: Any = Pieces(end.join(lines).encode(form), sizes)
    assert [line for line in read_lines(stream) if line] == [line for line in lines if line]


def test_a_list_may_look_as_lists_do(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    text = "\ufeff# heading\r\nhttp://a/\r\n\r\n  http://b/#frag # why\r\n\thttp://c/\t# tab\r\nnot a URL"
    path.write_bytes(text.encode())
    assert list(read_urls([str(path), "http://d/"])) == [
        "http://a/",
        "http://b/#frag",
        "http://c/",
        "not a URL",
        "http://d/",
    ]
    path.write_bytes(b"http://a/\n" + b"x" * 5_000_000 + b"\nhttp://b/\n\xff\xfe\n")
    first, long, last, rubbish = read_urls([str(path)])
    assert (first, last, len(long), rubbish) == ("http://a/", "http://b/", MAX_URL + 1, "\ufffd\ufffd")


def a_row(**more: Any) -> ScrapeResult:
    values: dict[str, Any] = {
        "url": "http://a/", "status": 200, "title": "T", "word_count": 2, "links_found": ["http://b/", "http://c/"],
        "error": None, "fetched_at": "2026-01-02T03:04:05.678Z", "duration_ms": 1.5,
    }  # fmt: skip
    return ScrapeResult(**(values | more))


def written(form: str, *rows: ScrapeResult) -> bytes:
    stream = io.BytesIO()
    writer = RowWriter(stream, form)
    for row in rows:
        writer.write(row)
    writer.close()
    return stream.getvalue()


def test_rows_as_json_and_jsonl() -> None:
    rows = [a_row(), a_row(title='"\n\u2028é\x00'), a_row(url="http://\ud800/")]
    lines = [json.loads(line) for line in written("jsonl", *rows).splitlines()]
    assert lines == json.loads(written("json", *rows)) == [dataclasses.asdict(row) for row in rows]
    assert json.loads(written("json")) == []
    assert written("jsonl") == b""


@given(title=st.text(), url=st.text())
@settings(deadline=None)
def test_rows_as_csv_are_rfc_4180_and_no_formulas(title: str, url: str) -> None:
    data = written("csv", a_row(title=title, url=url)).decode("utf-8", "surrogatepass")
    head, cells = csv.reader(io.StringIO(data, newline=""))
    assert data.startswith("url,status,title,word_count,links_found,error,fetched_at,duration_ms,")
    assert data.endswith("\r\n")
    row = dict(zip(head, cells, strict=True))
    assert row["links_found"] == "http://b/ http://c/"
    assert row["error"] == ""
    assert not row["title"].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    expected = title.encode("utf-8", "replace").decode()
    assert row["title"] in (expected, "'" + expected)


class GatedStream(io.BytesIO):
    """Each write says that it began and waits to be let through."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__()
        self.began, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.failure, self.writes = failure, 0

    def write(self, data: Any) -> int:
        self.began.release()
        assert self.gate.acquire(timeout=30)
        self.writes += 1
        if self.failure:
            raise self.failure
        return super().write(data)


def test_rows_that_come_during_a_write_are_written_in_one_go() -> None:
    crawl, stream = Crawl(Options()), GatedStream()
    output = Output(crawl, RowWriter(stream, "jsonl"))
    writer = threading.Thread(target=output.emit, args=(a_row(url="0"),))
    writer.start()
    assert stream.began.acquire(timeout=30)
    for number in range(1, 6):
        output.emit(a_row(url=str(number)))  # does not wait for the write that goes on
    stream.gate.release(2)
    writer.join(30)
    assert [json.loads(line)["url"] for line in stream.getvalue().splitlines()] == list("012345")
    assert (stream.writes, crawl.stats.snapshot()["rows"]) == (2, 6)


def test_whoever_brings_rows_waits_while_the_writer_is_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Output, "LEFT", 2)
    stream = GatedStream()
    output = Output(Crawl(Options()), RowWriter(stream, "jsonl"))
    threads = [threading.Thread(target=output.emit, args=(a_row(url=str(number)),)) for number in range(8)]
    threads[0].start()
    assert stream.began.acquire(timeout=30)
    for thread in threads[1:]:
        thread.start()
    until(lambda: sum(thread.is_alive() for thread in threads) == 6)  # the writer, and who finds two rows left
    stream.gate.release(8)
    for thread in threads:
        thread.join(30)
    assert sorted(json.loads(line)["url"] for line in stream.getvalue().splitlines()) == list("01234567")


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("a mistake")])
def test_a_write_that_fails_ends_the_run_and_holds_up_nobody(failure: Exception) -> None:
    crawl, stream = Crawl(Options()), GatedStream(failure)
    output = Output(crawl, RowWriter(stream, "jsonl"))
    stream.gate.release()
    for number in range(3):
        output.emit(a_row(url=str(number)))
    output.close()
    assert (crawl.failure, stream.writes, crawl.stats.snapshot()["rows"]) == (failure, 1, 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no URLs"), (["no.txt"], "cannot read no.txt"), (["a.example"], "did you mean https://a.example"),
        (["-", "--concurrency", "0"], "concurrency must be at least 1"), (["-", "--rate", "x"], "--rate"),
        (["-", "--header", "x"], "--header"), (["-", "--proxy", "ftp://x"], "proxy must be"), (["."], "is a folder"),
        (["-", "--json", "--csv"], "not allowed with"), (["-", "--max-bytes", "10Q"], "--max-bytes"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments("crawl_async.py", argv)
    assert caught.value.code == EXIT_USAGE
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_options_from_the_command_line() -> None:
    args, options = parse_arguments(
        "crawl_async.py",
        ["http://a/", "--csv", "--rate=0", "-", "--max-bytes=10M", "--header", "A: b:c", "--insecure", "--retries=0"],
    )
    assert args.sources == ["http://a/", "-"]
    assert args.form == "csv"
    assert options == Options(rate=0, max_bytes=10_000_000, headers=(("A", "b:c"),), insecure=True, retries=0)
    assert parse_arguments("x", ["-"])[1] == Options()
    assert parse_arguments("x", ["--demo"])[1].rate > 2


def test_help_names_every_kind_of_error_and_exit_code() -> None:
    text = make_parser("crawl_async.py").format_help()
    for word in [*ERROR_KINDS, "examples:", "exit codes:", "--per-host", "(default 64)"]:
        assert word in text


# =================================================================================== crawl_threads, crawl_async

DRIVERS = ["crawl_threads", "crawl_async"]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def web() -> Iterator[Sandbox]:
    with Sandbox(hosts=24, pages=20, page_bytes=4000) as sandbox:
        # The bomb is made when it is first asked for; that takes a second in which nobody else is served.
        with socket.create_connection((sandbox.hosts[0], sandbox.port)) as sock:
            sock.sendall(b"GET /fault/gzip_bomb HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            sock.recv(100)
        yield sandbox


def scrape(
    driver: str, urls: Iterable[str], on_result: Callable[[ScrapeResult], None] | None = None, **options: Any
) -> list[ScrapeResult]:
    settings = Options(**({"rate": 0, "timeout": 20.0} | options))
    if driver == "crawl_threads":
        return crawl_threads.scrape_all(urls, settings, on_result=on_result)
    return asyncio.run(crawl_async.scrape_all(urls, settings, on_result=on_result))


def start(driver: str, *argv: str, stdin: Any = subprocess.DEVNULL, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", str(HERE / f"{driver}.py"), *argv],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=HERE,
        **more,
    )


def run_program(driver: str, *argv: str, input: bytes = b"", **more: Any) -> tuple[int, bytes, str]:
    with start(driver, *argv, stdin=subprocess.PIPE, **more) as child:
        out, err = child.communicate(input, timeout=100)
    return child.returncode, out, err.decode()


def kind(row: ScrapeResult | dict[str, Any]) -> str:
    error = row["error"] if isinstance(row, dict) else row.error
    return error.partition(":")[0] if error else "ok"


def until(condition: Callable[[], bool]) -> None:
    gate = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        gate.wait(0.005)
    raise AssertionError("it never came true")


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_site_row_by_row(driver: str, web: Sandbox) -> None:
    urls = [web.url(f"/p/{page}.html", host=host) for host in range(4) for page in range(1, 20)]
    rows = scrape(driver, [*urls, urls[0], urls[0] + "#again"], concurrency=8)
    assert Counter(row.url for row in rows) == Counter(urls)
    for row in rows:
        assert (row.status, row.error, row.attempts, row.final_url) == (200, None, 1, row.url)
        assert row.bytes == 4000
        assert row.title
        assert row.word_count > 100
        assert len(row.links_found) > 5


def test_both_drivers_find_the_same(web: Sandbox) -> None:
    urls = [web.url(f"/p/{page}.html", host=host) for host in range(2) for page in range(1, 20)]
    urls += [web.fault_url(name) for name, fault in FAULTS.items() if fault.expect == ("ok",) and not fault.heavy]
    found = [
        {row.url: (row.status, row.title, row.word_count, row.links_found, row.error, row.final_url, row.bytes)
         for row in scrape(driver, urls)}
        for driver in DRIVERS
    ]  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == len(urls)


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_fault_is_one_row_of_the_right_kind_and_hurts_nobody_else(
    driver: str, web: Sandbox, tmp_path: Path
) -> None:
    healthy = [web.url(f"/p/{page}.html" if page else "/", host=host) for host in range(10) for page in range(20)]
    expected = {web.fault_url(name, host=23 if "absurd" in name else 10, run=driver): fault.expect
                for name, fault in FAULTS.items()}  # fmt: skip
    expected |= {web.url(f"/status/{code}", host=11): status_expect(code) for code in range(100, 600)}
    stats = tmp_path / "stats.json"
    argv = ["-", "--rate", "0", "--retries", "0", "--timeout", "4", "--concurrency", "100", "--per-host", "100"]
    code, out, err = run_program(driver, *argv, "--stats", str(stats), input="\n".join([*expected, *healthy]).encode())
    assert code == 0
    assert "Traceback" not in err
    assert "Warning" not in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert Counter(row["url"] for row in rows) == Counter([*expected, *healthy])
    assert [row for row in rows if row["url"] in healthy and row["error"]] == []
    wrong = [(row["url"], row["error"]) for row in rows if row["url"] in expected
             and kind(row) not in expected[row["url"]]]  # fmt: skip
    assert wrong == []
    assert {kind(row) for row in rows} <= {"ok", *ERROR_KINDS} - {"internal"}
    assert max(row["duration_ms"] for row in rows) <= 5000
    assert json.loads(stats.read_text())["peak_memory_mb"] <= 5 + 100


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_passes_is_tried_again_until_it_has_passed(driver: str, web: Sandbox) -> None:
    names = [name for name, fault in FAULTS.items() if fault.needs_retry and "absurd" not in name]
    urls = {web.fault_url(name, host=n, run=f"retry {driver}"): name for n, name in enumerate(names)}
    rows = scrape(driver, urls, retries=3)
    assert {urls[row.url]: kind(row) for row in rows} == dict.fromkeys(names, "ok")
    assert {urls[row.url]: row.attempts for row in rows} == {name: FAULTS[name].needs_retry + 1 for name in names}


@pytest.mark.parametrize("driver", DRIVERS)
def test_at_the_moment_of_sending_the_bound_is_exact(
    driver: str, web: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[float] = []
    lock = threading.Lock()
    real = Frontier.clear_to_send

    def clear_to_send(self: Frontier, request: Request, now: float) -> float:
        wait = real(self, request, now)
        if wait == 0.0:
            with lock:
                sent.append(now)
        return wait

    monkeypatch.setattr(Frontier, "clear_to_send", clear_to_send)
    hop = web.fault_url("redirect_3", host=5)
    urls = [web.url(f"/?n={n}", host=5) for n in range(60)] + [hop]
    rows = scrape(driver, urls, rate=100.0, burst=2, concurrency=30, per_host=30)
    assert [row.error for row in rows] == [None] * 61
    assert len(sent) >= 64  # a request that met a closed connection is sent, and counted, again
    sent.sort()
    for i, j in itertools.combinations_with_replacement(range(len(sent)), 2):
        assert j - i + 1 <= 2 + 100.0 * (sent[j] - sent[i]) + 1e-6


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_are_kept_and_bounded(driver: str) -> None:
    with Sandbox(hosts=1, pages=1, page_bytes=300) as web:
        rows = scrape(driver, [web.url(f"/?n={n}") for n in range(150)], per_host=3)
        assert [row.error for row in rows] == [None] * 150
        assert len({entry.connection for entry in web.log}) <= 4


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_are_kept_while_a_list_goes_round_many_hosts(driver: str) -> None:
    with Sandbox(hosts=40, pages=1, page_bytes=300) as web:
        urls = [web.url(f"/?n={n}", host=host) for n in range(5) for host in range(40)]
        rows = scrape(driver, urls, concurrency=4, per_host=1)
        assert [row.error for row in rows] == [None] * 200
        assert web.stats().connections == 40


def test_the_pool_of_the_threads_forgets_what_is_closed(web: Sandbox) -> None:
    crawl = Crawl(Options(rate=0, timeout=0.3))
    fetcher = crawl_threads.Fetcher(crawl)
    paths = ["ok", "http10", "closes_keepalive", "closes", "junk_after", "never_answers"]
    crawl.frontier.add_all([web.fault_url(path, host=9, pool=1) for path in paths], crawl.clock())
    for _ in paths:
        fetcher.fetch(taken(crawl.frontier.take(crawl.clock())))
    assert len(fetcher._pool._in_use) == 0
    assert len(fetcher._pool._idle) <= 2
    fetcher.close()
    assert len(fetcher._pool._idle) == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_is_left_behind(driver: str, web: Sandbox) -> None:
    before = set(threading.enumerate())
    sockets = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    scrape(driver, [web.url("/"), web.fault_url("never_answers"), "http://nowhere.invalid/"], timeout=0.2, retries=0)
    until(lambda: set(threading.enumerate()) <= before)
    gc.collect()
    if sockets:
        until(lambda: len(os.listdir("/proc/self/fd")) <= sockets + 2)  # the server's ends close when they notice


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_fault_of_our_own_costs_one_row(driver: str, web: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(body: bytes, url: str, content_type: str | None = None) -> Page:
        if url.endswith("/p/3.html"):
            raise ZeroDivisionError("planted")
        return parse_page(body, url, content_type)

    monkeypatch.setattr("crawl_core.parse_page", broken)
    rows = scrape(driver, [web.url(f"/p/{n}.html") for n in range(1, 6)])
    assert sorted(kind(row) for row in rows) == ["internal", "ok", "ok", "ok", "ok"]
    assert {row.error for row in rows} == {None, "internal: ZeroDivisionError: planted"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_on_result_or_the_list_raises_comes_back(driver: str, web: Sandbox) -> None:
    seen: list[ScrapeResult] = []
    assert scrape(driver, [web.url("/")], on_result=seen.append) == []
    assert [row.status for row in seen] == [200]

    def refuse(row: ScrapeResult) -> None:
        raise LookupError("planted")

    with pytest.raises(LookupError, match="planted"):
        scrape(driver, [web.url(f"/?n={n}") for n in range(50)], on_result=refuse)

    def urls() -> Iterator[str]:
        yield web.url("/")
        raise LookupError("the list")

    with pytest.raises(LookupError, match="the list"):
        scrape(driver, urls())


def test_an_async_on_result_sets_the_pace(web: Sandbox) -> None:
    busy = most = 0

    async def slow(row: ScrapeResult) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0)
        busy -= 1

    options = Options(rate=0, concurrency=3)
    urls = [web.url(f"/?n={n}") for n in range(30)]
    assert asyncio.run(crawl_async.scrape_all(urls, options, on_result=slow)) == []
    assert 1 <= most <= 3


def test_a_cancelled_crawl_ends_at_once(web: Sandbox) -> None:
    async def main() -> None:
        urls = [web.url("/fault/never_answers?cancelled", host=7)]
        crawl = asyncio.create_task(crawl_async.scrape_all(urls, Options(rate=0)))
        await asyncio.to_thread(until, lambda: bool(web.requests_for("/fault/never_answers?cancelled")))
        crawl.cancel()
        with pytest.raises(asyncio.CancelledError):
            await crawl
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_the_event_loop_is_never_blocked(web: Sandbox) -> None:
    program = """if True:
        import asyncio, logging, sys
        import crawl_async, crawl_core
        logging.basicConfig(format="%(message)s")
        async def main():
            asyncio.get_running_loop().slow_callback_duration = 0.05
            options = crawl_core.Options(rate=0, timeout=5, retries=0)
            rows = await crawl_async.scrape_all(sys.stdin.read().split(), options)
            print(len(rows))
        asyncio.run(main(), debug=True)
    """
    names = [name for name, fault in FAULTS.items() if not fault.needs_retry and "endless" not in name]
    urls = [web.fault_url(name, host=12) for name in names if name not in ("huge_page", "gzip_bomb")]
    urls += [web.url(f"/p/{page}.html", host=13) for page in range(1, 20)]
    command, slow = [sys.executable, "-c", program], []
    for _ in range(3):  # a busy machine may hold it up once, a blocking call does so each time
        child = subprocess.run(command, input="\n".join(urls), capture_output=True, text=True, cwd=HERE, timeout=100)
        assert child.stdout.strip() == str(len(urls))
        slow = [line for line in child.stderr.splitlines() if line.startswith("Executing")]
        if not slow:
            break
    assert slow == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_certificates_are_checked_unless_told_otherwise(driver: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.1.1").configure_cert(context)
    with Sandbox(hosts=1, pages=3, page_bytes=4000, tls=context) as web:
        urls = [web.url("/p/1.html"), web.url("/p/2.html")]
        refused = scrape(driver, urls, retries=0)
        assert [kind(row) for row in refused] == ["tls", "tls"]
        assert "certificate" in str(refused[0].error)
        assert [row.error for row in scrape(driver, urls, insecure=True)] == [None, None]
        trusted = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(trusted))
        _, out, _ = run_program(driver, *urls, "--rate", "0", env=os.environ | {"SSL_CERT_FILE": str(trusted)})
        assert [json.loads(line)["error"] for line in out.splitlines()] == [None, None]
    gc.collect()


class Proxy(threading.Thread):
    """A forward proxy for one test: answers absolute-form requests itself, tunnels CONNECT."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://user:secret@127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with self.listener, contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as lines:
            head = list(iter(lines.readline, b"\r\n"))
            method, target, _ = head[0].decode().split()
            signed = any(line.lower().startswith(b"proxy-authorization: basic ") for line in head)
            self.asked.append(f"{method} {target} {'signed' if signed else 'unsigned'}")
            if method != "CONNECT":
                body = f"<title>{target}</title>".encode()
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                               b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
                return
            host, _, port = target.partition(":")
            if host.endswith(".invalid"):
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=self.copy, args=(server, client), daemon=True)
                back.start()
                self.copy(client, server)
                back.join()

    @staticmethod
    def copy(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_proxy(driver: str) -> None:
    proxy = Proxy()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.1.1").configure_cert(context)
    with Sandbox(hosts=1, pages=1, page_bytes=4000, tls=context) as web:
        rows = scrape(
            driver,
            ["http://far.invalid/x?y", web.url("/"), "https://far.invalid/"],
            proxy=proxy.url,
            insecure=True,
            retries=0,
        )
    shutdown = socket.create_connection(proxy.listener.getsockname())
    proxy.listener.shutdown(socket.SHUT_RDWR)
    shutdown.close()
    found = {row.url.partition(":")[0] + str(row.status): row for row in rows}
    assert found["http200"].title == "http://far.invalid/x?y"
    assert found["https200"].error is None
    assert kind(found["httpsNone"]) == "connect"
    assert sorted(proxy.asked) == sorted(
        ["GET http://far.invalid/x?y signed", f"CONNECT 127.0.1.1:{web.port} signed", "CONNECT far.invalid:443 signed"]
    )
    gc.collect()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("form", ["json", "csv"])
def test_ctrl_c_writes_every_row_that_the_server_completed(driver: str, form: str) -> None:
    with Sandbox(hosts=10, pages=1, page_bytes=300, latency=0.05) as web:
        urls = "\n".join(web.url(f"/?n={n}", host=n % 10) for n in range(5000))
        with start(driver, "-", "--rate", "0", f"--{form}", stdin=subprocess.PIPE) as child:
            assert child.stdin
            child.stdin.write(urls.encode())
            child.stdin.close()
            child.stdin = None
            until(lambda: len(web.log) > 100)
            child.send_signal(signal.SIGINT if form == "json" else signal.SIGTERM)
            out, err = child.communicate(timeout=60)
        assert child.returncode == EXIT_INTERRUPTED
        text = out.decode()
        rows = json.loads(text) if form == "json" else list(csv.DictReader(io.StringIO(text, newline="")))
        assert len({row["url"] for row in rows}) == len(rows) == len(web.log)
        assert {row["error"] for row in rows} <= {None, ""}
        assert 100 < len(rows) < 5000
        assert "Traceback" not in err.decode()
        assert "not fetched" in err.decode()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("grace", ["60", "0.1"])
def test_what_does_not_finish_is_cut_off(driver: str, grace: str, web: Sandbox) -> None:
    path = f"/fault/never_answers?{driver}{grace}"
    with start(driver, web.url(path), web.url("/"), "--timeout", "90", "--grace", grace, "--rate", "0") as child:
        assert child.stdout
        first = json.loads(child.stdout.readline())
        assert first["status"] == 200
        until(lambda: bool(web.requests_for(path)))
        child.send_signal(signal.SIGINT)
        if grace == "60":
            child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=60)
    assert child.returncode == EXIT_INTERRUPTED
    assert kind(json.loads(out)) == "interrupted"
    assert "Traceback" not in err.decode()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_reader_that_leaves_ends_it_quietly(driver: str, web: Sandbox) -> None:
    urls = [web.url(f"/?n={n}") for n in range(500)]
    with start(driver, *urls, "--rate", "0") as child:
        assert child.stdout
        assert child.stderr
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(60) == EXIT_PIPE
        assert child.stderr.read() == b""


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_full_disk_is_said_in_one_line(driver: str, web: Sandbox) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full (Linux)")
    code, _, err = run_program(driver, web.url("/"), "-q", "-o", "/dev/full")
    assert (code, err.count("\n")) == (1, 1)
    assert "No space left on device" in err
    code, _, err = run_program(driver, web.url("/"), "-o", "/no/such/folder/x")
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.parametrize("driver", DRIVERS)
def test_rows_come_while_the_list_is_still_being_written(driver: str, web: Sandbox) -> None:
    with start(driver, "-", "--rate", "0", "-q", stdin=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        for n in range(3):
            child.stdin.write(web.url(f"/?slow={n}\n").encode())
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["status"] == 200
        child.stdin.close()
        assert child.wait(60) == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_demo_and_the_promised_commands(driver: str, tmp_path: Path) -> None:
    code, out, err = run_program(driver, "--demo", "--csv", "--retries", "1")
    assert (code, "Traceback" in err) == (0, False)
    rows = list(csv.DictReader(io.StringIO(out.decode(), newline="")))
    assert len(rows) == 63
    assert {kind(row) for row in rows if row["error"]} >= {"timeout", "reset", "http", "dns", "invalid_url", "decode"}
    listed = list(read_urls([str(HERE / "urls.txt")]))
    assert len(listed) >= 20
    assert len({normalise(url)[1] for url in listed}) == len(listed)


# ---------------------------------------------------------------------------------------------------------------------
# sandbox.py
# ---------------------------------------------------------------------------------------------------------------------


PATIENCE = 10.0  # seconds for what must come
SILENCE = 0.25  # seconds for what must not


class SandboxPage(HTMLParser):
    """What the tests want to know of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sizes = {"code": 0, "title": 0, "text": 0}
        self.title = ""
        self.inside = "text"
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = {"style": "code", "script": "code", "title": "title"}.get(tag, self.inside)
        if tag == "a":
            self.links.append(dict(attrs)["href"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script", "title"):
            self.inside = "text"

    def handle_data(self, data: str) -> None:
        self.sizes[self.inside] += len(data.encode())
        self.title += data if self.inside == "title" else ""


def sandbox_talk(
    sandbox: sb.Sandbox,
    target: str,
    host: int = 0,
    method: str = "GET",
    headers: str = "Connection: close\r\n",
    promised: int = 1 << 60,
    limit: int = 1 << 60,
) -> tuple[bytes, str]:
    """Send one request; all bytes that come, and how it ended: "eof", "reset", "silence" after the promised bytes."""
    data = bytearray()
    with socket.create_connection((sandbox.hosts[host], sandbox.port), PATIENCE) as sock:
        sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode("latin-1"))
        while len(data) < limit:
            sock.settimeout(PATIENCE if len(data) < promised else SILENCE)
            try:
                piece = sock.recv(1 << 20)
            except TimeoutError:
                assert len(data) >= promised, f"{target}: nothing more after {bytes(data[-80:])!r}"
                return bytes(data), "silence"
            except ConnectionResetError:
                return bytes(data), "reset"
            if not piece:
                return bytes(data), "eof"
            data += piece
    return bytes(data), "limit"


def sandbox_split(response: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and the rest of a response."""
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    return int(lines[0].split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}, body


@pytest.fixture(scope="module")
def internet() -> Iterator[sb.Sandbox]:
    with sb.Sandbox(hosts=3, pages=30) as sandbox:
        yield sandbox


# --- pages ---


def test_sandbox_page_is_a_function_of_its_arguments() -> None:
    pages = {(h, n, seed): sb.make_page(h, n, 9, seed=seed) for h in (0, 1) for n in range(9) for seed in (1, 2)}
    assert pages == {(h, n, seed): sb.make_page(h, n, 9, seed=seed) for h, n, seed in pages}
    titles = {SandboxPage(page).title for page in pages.values()}
    assert len(set(pages.values())) == len(titles) == len(pages)
    for n in (-1, 9):
        with pytest.raises(ValueError, match="is not one of 9"):
            sb.make_page(0, n, 9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60_000), st.integers(0, 400), st.integers(1, 400), st.integers(1, 9))
def test_sandbox_page_has_its_size_or_is_tiny(size: int, page: int, pages: int, hosts: int) -> None:
    page %= pages
    html = sb.make_page(hosts - 1, page, pages, size, hosts=hosts)
    assert len(html) == size or (len(html) < 500 and size < 3_500)
    found = {urlsplit(urljoin(f"http://h{sb.page_path(page)}", a)).path for a in SandboxPage(html).links}
    assert found >= {sb.page_path(n) for n in range(8 * page + 1, 8 * page + 9) if n < pages}


def test_sandbox_page_is_made_like_an_article() -> None:
    for n in range(5):
        page = SandboxPage(sb.make_page(3, n, 200, base="http://{host}:99", hosts=8))
        assert 0.28 < page.sizes["text"] / 20_000 < 0.40
        assert 0.12 < page.sizes["code"] / 20_000 < 0.18
        assert 55 <= len(page.links) <= 70 and len(set(page.links)) < len(page.links)
        shapes = [
            r"/p/\d+\.html", r"/p/\d+\.html#.+", r"(p/)?\d+\.html", r"\.\./p/\d+\.html", r"//127\.0\.1\.4:99/.*",
            r"http://127\.0\.1\.4:99/.*", r"http://127\.0\.1\.[1-35-8]:99/.*", r"mailto:.+", r"#main",
        ]  # fmt: skip
        for shape in shapes:
            assert any(re.fullmatch(shape, link) for link in page.links), shape
        assert not any("not/a/link" in link or "commented" in link for link in page.links)


@pytest.mark.parametrize("size", [0, 4_000])
def test_sandbox_walk_from_the_root_reaches_every_page(size: int) -> None:
    pages = 300
    with sb.Sandbox(hosts=2, pages=pages, page_bytes=size) as sandbox:
        connection = http.client.HTTPConnection(sandbox.hosts[1], sandbox.port, timeout=PATIENCE)
        depth, wave, base = {sandbox.url("/", 1): 0}, [sandbox.url("/", 1)], sandbox.url("", 1)
        while wave:
            url = wave.pop(0)
            connection.request("GET", url.removeprefix(base))
            response = connection.getresponse()
            assert response.status == 200
            for link in SandboxPage(response.read()).links:
                to = urljoin(url, link).partition("#")[0]
                if to.startswith(base) and to not in depth:
                    depth[to] = depth[url] + 1
                    wave.append(to)
        connection.close()
        assert set(depth) == {url for url in sandbox.site_urls() if url.startswith(base)}
        assert len(depth) == pages and max(depth.values()) <= 3
        assert sandbox.stats().requests == pages and {entry.connection for entry in sandbox.log} == {1}


# --- the sites' HTTP ---


def test_sandbox_site_paths(internet: sb.Sandbox) -> None:
    urls = list(internet.site_urls())
    assert len(urls) == len(set(urls)) == 90
    assert urls[:4] == [internet.url("/", 0), internet.url("/", 1), internet.url("/", 2), internet.url("/p/1.html", 0)]
    assert internet.url("/x", 4) == f"http://127.0.1.2:{internet.port}/x"
    base = f"http://{{host}}:{internet.port}"
    for target, page in {"/": 0, "/?q=1": 0, "/p/7.html": 7, "http://127.0.1.2/p/7.html": 7, "http://other": 0}.items():
        status, headers, body = sandbox_split(sandbox_talk(internet, target, host=1)[0])
        assert (status, int(headers["content-length"])) == (200, len(body))
        assert body == sb.make_page(1, page, 30, base=base, hosts=3)
    for target in (
        "/p/0.html",
        "/p/30.html",
        "/p/01.html",
        f"/p/{'9' * 5000}.html",
        "/p/²",
        "/favicon.ico",
        "/fault/",
        "/x",
    ):
        assert sandbox_split(sandbox_talk(internet, target)[0])[0] == 404, target
    assert sandbox_split(sandbox_talk(internet, "/robots.txt")[0])[2] == b"User-agent: *\nAllow: /\n"


def test_sandbox_head_has_the_headers_of_get(internet: sb.Sandbox) -> None:
    for target in ("/", "/nowhere", "/fault/gzip", "/status/404", "/status/204", "/fault/image"):
        whole, head = sandbox_talk(internet, target)[0], sandbox_talk(internet, target, method="HEAD")[0]
        assert head == sb.only_head(whole)
    assert sandbox_talk(internet, "/status/103", method="HEAD")[0].count(b"\r\n\r\n") == 2


def test_sandbox_keeps_connections_and_answers_pipelined_requests_in_order(internet: sb.Sandbox) -> None:
    with socket.create_connection((internet.hosts[0], internet.port), PATIENCE) as sock, sock.makefile("rb") as file:
        targets = ["/", "/fault/chunked", "/status/404", "/p/3.html", "/fault/ok", "/p/4.html", "/robots.txt"]
        sent = b"".join(b"GET %b?pipe HTTP/1.1\r\nHost: x\r\n\r\n" % target.encode() for target in targets) * 20
        for n in range(0, len(sent), 7_001):
            sock.sendall(sent[n : n + 7_001])
        for target in targets * 20:
            head = b"".join(iter(file.readline, b"\r\n")) + b"\r\n"
            assert b"Connection: close" not in head
            if target == "/fault/chunked":
                assert b"".join(file.readline() for _ in range(7)).endswith(b"0\r\nX-Trailer: yes\r\n\r\n")
            else:
                assert len(file.read(int(sandbox_split(head)[1]["content-length"])))
        sock.sendall(b"GET / HTTP/1.1\r\nconnection: Keep-Alive, CLOSE\r\n\r\n")
        assert b"\r\nConnection: close\r\n" in file.read()
    asked = [entry for entry in internet.log if entry.path.endswith("?pipe")]
    assert [entry.path for entry in asked] == [f"{target}?pipe" for target in targets] * 20
    assert len({entry.connection for entry in asked}) == 1
    with socket.create_connection((internet.hosts[0], internet.port), PATIENCE) as sock, sock.makefile("rb") as file:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert sandbox_split(file.read())[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\0\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\n" + b"X-Long: y\r\n" * 60_000, 431),
        (b"y" * 400_000, 431),
    ],
)
def test_sandbox_refuses_what_is_no_request(internet: sb.Sandbox, head: bytes, status: int) -> None:
    with socket.create_connection((internet.hosts[0], internet.port), PATIENCE) as sock, sock.makefile("rb") as file:
        sock.sendall(head)
        answer = file.read()
    assert sandbox_split(answer)[0] == status and b"Connection: close" in answer
    assert internet.log[-1].status == status


def test_sandbox_latency_delays_one_host_and_not_another() -> None:
    asked: list[tuple[int, str]] = []

    def latency(host: int, path: str) -> float:
        asked.append((host, path))
        return 3600.0 if host == 1 else 0.001

    with sb.Sandbox(hosts=2, latency=latency) as sandbox:
        assert sandbox_talk(sandbox, "/p/1.html?q", host=1, promised=0) == (b"", "silence")
        assert sandbox_split(sandbox_talk(sandbox, "/fault/ok")[0])[0] == 200
        assert asked == [(1, "/p/1.html"), (0, "/fault/ok")]
        assert [entry.status for entry in sandbox.log] == [200, 200]


# --- the catalogue ---

SANDBOX_HEAD = len(sb.HTML)
# How each entry ends on the wire (for "silence": after how many bytes at least), and what its bytes look like.
SANDBOX_WIRE: dict[str, tuple[str | int, str]] = {
    "ok": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>ok</title>.*</a>"),
    "never_answers": (0, ""),
    "closes": ("eof", ""),
    "resets": ("reset", ""),
    "resets_in_body": ("reset", r"HTTP/1.1 200 OK\r\n.*<title>resets_in_body</title>.*"),
    "head_drip": (1, "HT?T?P?"),
    "body_drip": (SANDBOX_HEAD, r"HTTP/1.1 200 OK\r\n.*\r\n\r\n<.*"),
    "head_cut": ("eof", r"HTTP/1.1 200 OK\r\n.*\r\nX-Cu"),
    "hangs_in_head": (SANDBOX_HEAD, r"HTTP/1.1 200 OK\r\n.*\r\nX-Cu"),
    "hangs_in_body": (SANDBOX_HEAD + 50, r"HTTP/1.1 200 OK\r\n.*\r\n\r\n<.*"),
    "closes_keepalive": ("eof", r"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n.*<title>closes_keepalive<.*</a>"),
    "closes_on_reuse": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>closes_on_reuse<.*</a>"),
    "junk_after": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>junk_after<.*</a>HTTP/1.1 200 OK\r\n.*<title>forged<.*"),
    "short_body": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>short_body</title>.*"),
    "extra_bytes": ("eof", r"HTTP/1.1 200 OK\r\n.*</a><p>too much</p>"),
    "bad_length": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: many\d*\r\n.*"),
    "http10": ("eof", r"HTTP/1.0 200 OK\r\nContent-Type: [^\r]*\r\n\r\n<.*<title>http10<.*</a>"),
    "no_length": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\n\r\n<.*<title>no_length<.*</a>"),
    "chunked": (
        "eof",
        r".*chunked\r\n\r\n7;why=not\r\n<title>\r\n0F\r\nchunked</title>\r\n0\r\nX-Trailer: yes\r\n\r\n",
    ),
    "chunk_bad_size": ("eof", r".*chunked\r\n\r\n10\r\n.{16}\r\nzz\r\n.*"),
    "chunk_cut": ("eof", r".*chunked\r\n\r\n1000\r\n<title>cut"),
    "bad_status_line": ("eof", r"HTTP/1.1 abc OK\r\n.*"),
    "not_http": (10, r"SSH-2.0-\S+\r\n"),
    "null_in_header": ("eof", r"HTTP/1.1 200 OK\r\n.*X-Null: a\0b\r\n.*<title>null_in_header<.*"),
    "folded_header": ("eof", r"HTTP/1.1 200 OK\r\n.*text/html;\r\n charset=utf-8\r\n.*<title>folded_header<.*"),
    "many_cookies": ("eof", r"HTTP/1.1 200 OK\r\n.*(Set-Cookie: c\d+=\d+\r\n){500}.*<title>many_cookies<.*"),
    "endless_header_line": ("limit", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\nX-Long: x+"),
    "endless_headers": ("limit", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\n(X-More-\d+: and on\r\n)+[^\n]*\n?"),
    "endless_body": ("limit", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\n\r\n<p>.*"),
    "endless_chunks": ("limit", r".*chunked\r\n\r\n[0-9a-f]+\r\n<p>.*\r\n[0-9a-f]+\r\n<p>.*"),
    "huge_page": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: 50000000\r\n\r\n<p>.*"),
    "gzip_bomb": ("eof", r".*Content-Encoding: gzip\r\nContent-Length: 10\d{5}\r\n\r\n\x1f\x8b.*"),
    "gzip_short_body": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Encoding: gzip\r\n\r\n\x1f\x8b.*"),
    "redirect_no_location": ("eof", r"HTTP/1.1 302 Found\r\n(?!.*Location).*<title>redirect_no_location<.*"),
    "always_500": ("eof", r"HTTP/1.1 500 .*"),
    "status": ("eof", r"HTTP/1.1 404 .*"),
    "binary_as_html": ("eof", r"HTTP/1.1 200 OK\r\n.*text/html\r\n.*\0.*"),
    "malformed_html": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>malformed_html<.*<!-- <"),
    "image": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n.*\x89PNG.*"),
    "pdf": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type: application/pdf\r\n.*%PDF.*"),
    "empty_body": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: 0\r\n\r\n"),
    "long_title": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>(long title ){95326}</title>.*"),
    "nested_divs": ("eof", r"HTTP/1.1 200 OK\r\n.*</title>(<div>){100000}deep(</div>){100000}"),
}
SANDBOX_KINDS = "ok invalid_url dns connect tls timeout reset protocol truncated too_large redirects decode http"
SANDBOX_ELSEWHERE = "gzip deflate brotli zstd plain_as_gzip unknown_encoding redirect retry flaky charset"
# Entries with a Content-Length that is wrong, or whose body is not the length that they were cut to.
SANDBOX_BAD_LENGTH = {"resets_in_body", "junk_after", "short_body", "extra_bytes", "bad_length", "gzip_short_body"}


def test_sandbox_every_entry_is_tested() -> None:
    others = {
        name for name in sb.FAULTS if name not in SANDBOX_WIRE and not name.startswith(tuple(SANDBOX_ELSEWHERE.split()))
    }
    assert others == set() and SANDBOX_WIRE.keys() <= sb.FAULTS.keys()
    kinds = set(SANDBOX_KINDS.split())
    for name, entry in sb.FAULTS.items():
        assert entry.name == name and entry.about and set(entry.expect) <= kinds and entry.expect
        assert entry.path == (f"/fault/{name}" if name != "status" else "/status/404")
        assert entry.needs_retry == 0 or entry.expect == ("http",)
        assert f"\n{name} " in sb.catalogue()


def test_sandbox_entries_on_the_wire(internet: sb.Sandbox) -> None:
    def ask(name: str) -> tuple[bytes, str]:
        end = SANDBOX_WIRE[name][0]
        promised = end if isinstance(end, int) else 1 << 60
        limit = 3_000_000 if end == "limit" else 1 << 60
        return sandbox_talk(internet, sb.FAULTS[name].path, promised=promised, limit=limit)

    with ThreadPoolExecutor(8) as pool:
        for name, (data, end) in zip(SANDBOX_WIRE, pool.map(ask, SANDBOX_WIRE), strict=True):
            wanted, pattern = SANDBOX_WIRE[name]
            assert end == ("silence" if isinstance(wanted, int) else wanted), name
            assert re.fullmatch(pattern.encode("latin-1"), data.replace(b"Connection: close\r\n", b""), re.S), name
            if end == "eof" and b"Content-Length" in data and name != "bad_status_line":
                _, headers, body = sandbox_split(data)
                right = headers["content-length"] == str(len(body))
                assert right != (name in SANDBOX_BAD_LENGTH), name
    short = {name: sandbox_split(sandbox_talk(internet, f"/fault/{name}")[0]) for name in ("short_body", "extra_bytes")}
    assert int(short["short_body"][1]["content-length"]) - 40 == len(short["short_body"][2])
    assert int(short["extra_bytes"][1]["content-length"]) < len(short["extra_bytes"][2])


def test_sandbox_drips_byte_by_byte() -> None:
    good = sb.reply(sb.simple("x"))
    steps = list(sb.drip(good))
    assert b"".join(step for step in steps if isinstance(step, bytes)) == good
    assert steps[1::2] == [1.0] * len(good) and {len(step) for step in steps[::2] if isinstance(step, bytes)} == {1}


def test_sandbox_kept_connections_that_go_bad(internet: sb.Sandbox) -> None:
    def twice(name: str) -> tuple[bytes, int]:
        """The bytes up to the end, of two requests, the second one sent when the first answer is complete."""
        request = f"GET /fault/{name}?reused HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        with socket.create_connection((internet.hosts[0], internet.port), PATIENCE) as sock:
            sock.sendall(request)
            data = sock.recv(1 << 16)
            while not data.endswith(b"</a>"):
                data += sock.recv(1 << 16)
            try:
                sock.sendall(request)
                while piece := sock.recv(1 << 16):
                    data += piece
            except OSError:
                data += b""
        return data, len(internet.requests_for(f"/fault/{name}?reused"))

    assert twice("closes_on_reuse") == (sb.reply(sb.simple("closes_on_reuse")), 2)
    data, asked = twice("closes_keepalive")
    assert asked == 1 and sandbox_split(data)[1]["connection"] == "keep-alive"


def test_sandbox_content_encodings(internet: sb.Sandbox) -> None:
    unpack: dict[str, Any] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
    for label, name, modules in (
        ("br", "brotli", ["brotli"]),
        ("zstd", "zstd", ["compression.zstd", "backports.zstd"]),
    ):
        for module in modules:
            try:
                unpack[label] = importlib.import_module(module).decompress
            except ImportError:
                continue
        assert (name in sb.FAULTS) == (label in unpack) == (f"{name}_bomb" in sb.FAULTS)

    def body(name: str) -> tuple[str, bytes]:
        status, headers, data = sandbox_split(sandbox_talk(internet, f"/fault/{name}")[0])
        assert status == 200 and headers["content-length"] == str(len(data))
        return headers["content-encoding"], data

    for name, label in {"gzip": "gzip", "deflate_zlib": "deflate", "brotli": "br", "zstd": "zstd"}.items():
        if name in sb.FAULTS:
            said, data = body(name)
            assert said == label and unpack[label](data) == sb.simple(name)
    for name in ("brotli", "zstd"):
        if name in sb.FAULTS:
            said, data = body(f"{name}_bomb")
            assert unpack[said](data) == bytes(32 << 20) and len(data) < 100_000
            with pytest.raises(Exception, match=r"."):
                unpack[said](body(f"{name}_broken")[1])
            with pytest.raises(Exception, match=r"."):
                unpack[said](body(f"{name}_cut")[1])
    said, data = body("gzip_twice")
    assert said == "gzip, gzip" and gzip.decompress(gzip.decompress(data)) == sb.simple("gzip_twice")
    assert zlib.decompress(body("deflate_raw")[1], wbits=-15) == sb.simple("deflate_raw")
    assert body("plain_as_gzip") == ("gzip", sb.simple("plain_as_gzip"))
    assert body("unknown_encoding") == ("x-unheard-of", sb.simple("unknown_encoding"))
    with pytest.raises(zlib.error):
        gzip.decompress(body("gzip_broken")[1])
    for name in ("gzip_cut", "gzip_no_trailer"):
        with pytest.raises(EOFError):
            gzip.decompress(body(name)[1])
    assert zlib.decompressobj(31).decompress(body("gzip_no_trailer")[1]) == sb.simple("gzip_no_trailer")
    stream = zlib.decompressobj(31)
    assert stream.decompress(body("gzip_junk_after")[1]) == sb.simple("gzip_junk_after")
    assert stream.eof and stream.unused_data == b"garbage"


def test_sandbox_gzip_bomb_is_a_valid_gzip(internet: sb.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb, "BOMB_BYTES", 64 << 20)
    _, headers, data = sandbox_split(sandbox_talk(internet, "/fault/gzip_bomb")[0])
    assert gzip.decompress(data) == bytes(64 << 20) and headers["content-length"] == str(len(data))


def test_sandbox_redirects(internet: sb.Sandbox) -> None:
    def hop(target: str) -> tuple[int, str]:
        status, headers, _ = sandbox_split(sandbox_talk(internet, target)[0])
        return status, headers.get("location", "")

    def walk(target: str, limit: int = 50) -> list[str]:
        path = [target]
        while len(path) <= limit and (location := hop(path[-1])[1]):
            path.append(location)
        return path

    assert len(walk("/fault/redirect_3")) == 4 and hop(walk("/fault/redirect_3")[-1])[0] == 200
    assert len(walk("/fault/redirect_30")) == 31
    assert len(set(walk("/fault/redirect_loop"))) == 2 and len(set(walk("/fault/redirect_self"))) == 1
    assert hop("/fault/redirect_no_location") == (302, "")
    assert hop("/fault/redirect_file")[1] == "file:///etc/passwd"
    assert hop("/fault/redirect_unresolvable")[1] == "http://x.invalid/"
    assert hop("/fault/redirect_relative") == (301, "../fault/ok")
    assert hop("/fault/redirect_other_host") == (308, internet.url("/fault/ok", 1))
    raw, _ = sandbox_talk(internet, "/fault/redirect_raw_bytes")
    assert b"\r\nLocation: /fault/ok?caf\xc3\xa9 au lait\r\n" in raw
    closed = urlsplit(hop("/fault/redirect_nowhere")[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((closed.hostname, closed.port), PATIENCE)


def test_sandbox_entries_that_fail_at_first(internet: sb.Sandbox) -> None:
    ago = time.time()
    for name, entry in sb.FAULTS.items():
        if not entry.needs_retry:
            continue
        url = internet.fault_url(name, key="a").removeprefix(internet.url(""))
        fails = [sandbox_split(sandbox_talk(internet, url)[0]) for _ in range(entry.needs_retry)]
        status, _, body = sandbox_split(sandbox_talk(internet, url)[0])
        assert status == 200 and SandboxPage(body).title == entry.title == name
        assert {s for s, _, _ in fails} == {int(name.split("_")[1]) if "retry" in name else 500}
        for other in (url + "b", f"/fault/{name}"):
            assert sandbox_split(sandbox_talk(internet, other)[0])[0] >= 400
        assert sandbox_split(sandbox_talk(internet, url, host=1)[0])[0] >= 400
        after = fails[0][1].get("retry-after", "")
        if name.endswith(("imf", "rfc850", "asctime")):
            parsed = email.utils.parsedate_tz(after)
            assert parsed is not None and ago + 1 <= email.utils.mktime_tz(parsed) <= time.time() + 2
        else:
            wanted = {"seconds": "1", "garbage": "soon", "negative": "-5", "absurd": "1000000000", "flaky": ""}
            assert after == wanted[name.rpartition("_")[2]]
    assert b"Retry-After: 7\r\n" in sandbox_talk(internet, "/fault/retry_503_seconds?seconds=6.5")[0]
    statuses = [sandbox_split(sandbox_talk(internet, "/fault/flaky?n=4")[0])[0] for _ in range(5)]
    assert statuses == [500] * 4 + [200]
    for value in ("nan", "inf", "-1", "x", "", "9" * 5000):
        assert sandbox_split(sandbox_talk(internet, f"/fault/retry_503_imf?seconds={value}")[0])[0] == 503


@given(st.integers(0, 4_000_000_000))
def test_sandbox_http_dates_are_those_of_the_rfc(t: int) -> None:
    weekday, day, month, year, clock, _ = email.utils.formatdate(t, usegmt=True).split()
    full = {"Tue,": "Tuesday,", "Wed,": "Wednesday,", "Thu,": "Thursday,", "Sat,": "Saturday,"}
    assert sb.http_date("imf", t) == f"{weekday} {day} {month} {year} {clock} GMT"
    assert sb.http_date("rfc850", t) == (
        f"{full.get(weekday, weekday[:-1] + 'day,')} {day}-{month}-{year[2:]} {clock} GMT"
    )
    assert sb.http_date("asctime", t) == f"{weekday[:-1]} {month} {int(day):2} {clock} {year}"


def test_sandbox_every_status(internet: sb.Sandbox) -> None:
    def ask(code: int) -> tuple[bytes, str]:
        return sandbox_talk(internet, f"/status/{code}")

    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(range(100, 600), pool.map(ask, range(100, 600)), strict=True))
    for code, (data, end) in answers.items():
        status, headers, body = sandbox_split(data)
        assert status == code and end == "eof"
        if code == 101:
            assert headers["connection"] == "Upgrade" and body == b""
        elif code < 200:
            status, headers, body = sandbox_split(body)
            assert status == 200 and headers["content-length"] == str(len(body)) and b"<title>" in body
        elif code in (204, 304):
            assert body == b"" and "content-length" not in headers
        else:
            assert headers["content-length"] == str(len(body)) and bool(body) == (code != 205)
        assert ("http" in sb.status_expect(code)) == (code >= 300 or code == 101)
    for bad in ("99", "600", "999", "abc", "2000", "²00", ""):
        assert sandbox_split(sandbox_talk(internet, f"/status/{bad}")[0])[0] == 404


def test_sandbox_charsets(internet: sb.Sandbox) -> None:
    codecs = {"windows_1251": "cp1251", "shift_jis": "shift_jis", "gb18030": "gb18030", "utf_16": "utf-16"}
    codecs |= {"missing": "cp1252", "unknown": "ascii", "wrong": "cp1252"}
    assert {f"charset_{name}" for name in codecs} == {name for name in sb.FAULTS if name.startswith("charset")}
    for name, codec in codecs.items():
        _, headers, body = sandbox_split(sandbox_talk(internet, f"/fault/charset_{name}")[0])
        title = body.decode(codec).removeprefix("<title>").removesuffix("</title>")
        assert title == (sb.FAULTS[f"charset_{name}"].title or "Café")
        label = headers["content-type"].partition("charset=")[2].replace("-", "_")
        assert label == {"utf_16": "", "missing": "", "unknown": "klingon", "wrong": "utf_8"}.get(name, name)
        if name in ("missing", "wrong"):
            with pytest.raises(UnicodeDecodeError):
                body.decode("utf-8")


# --- back-pressure, log, life ---


class SandboxTransport(asyncio.Transport):
    """A transport whose peer has stopped reading."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.protocol: sb.Connection | None = None
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(data)
        if self.protocol and sum(map(len, self.written)) > 65_536:
            self.protocol.pause_writing()

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.written.append(b"(paused)")

    def resume_reading(self) -> None:
        return


@pytest.mark.parametrize("target", ["/fault/endless_body", "/fault/endless_headers", "/fault/huge_page", "/"])
def test_sandbox_stops_writing_when_the_peer_stops_reading(target: str) -> None:
    async def scenario() -> None:
        transport = SandboxTransport()
        transport.protocol = connection = sb.Connection(sb.Sandbox(), 0)
        connection.connection_made(transport)
        connection.data_received(f"GET {target} HTTP/1.1\r\n\r\n".encode() * 100)
        for _ in range(3):
            for _ in range(100):
                await asyncio.sleep(0)
            assert connection.choked and 65_536 < sum(map(len, transport.written)) < 2 * 66_000
            transport.written.clear()
            connection.resume_writing()
        connection.data_received(b"GET /" + b"y" * sb.HEAD_LIMIT)
        assert transport.written[-1] == b"(paused)"
        connection.connection_lost(None)

    asyncio.run(scenario())


def test_sandbox_holds_back_what_comes_before_tls_is_ready() -> None:
    async def scenario() -> None:
        plain, encrypted = SandboxTransport(), SandboxTransport()
        connection = sb.Connection(sb.Sandbox(), 0)
        connection.connection_made(plain)

        async def start_tls(*args: object, **kwargs: object) -> asyncio.Transport:
            connection.data_received(b"GET /fault/ok HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0)
            assert plain.written == [] and connection.sandbox.log == []
            return encrypted

        setattr(connection.loop, "start_tls", start_tls)  # noqa: B010
        connection.handshake = asyncio.ensure_future(connection._start_tls(ssl.create_default_context()))
        await connection.handshake
        assert plain.written == [] and encrypted.written == [sb.reply(sb.simple("ok"))]

    asyncio.run(scenario())


def test_sandbox_gives_others_their_turn() -> None:
    async def scenario() -> None:
        transport = SandboxTransport()  # takes everything, never full
        connection = sb.Connection(sb.Sandbox(), 0)
        connection.connection_made(transport)
        connection.data_received(b"GET /fault/endless_body HTTP/1.1\r\n\r\n")
        assert 1 < len(transport.written) < 10
        connection.connection_lost(None)
        await asyncio.sleep(0)
        assert len(transport.written) < 10

    asyncio.run(scenario())


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 30))
def test_sandbox_window_count_equals_the_plain_definition(times: list[int], seconds: int) -> None:
    times.sort()
    slow = max((sum(1 for t in times if start <= t < start + seconds) for start in times), default=0)
    assert sb.max_in_window(times, seconds) == slow


def test_sandbox_log() -> None:
    before = time.monotonic()
    with sb.Sandbox(hosts=2, pages=3, page_bytes=0) as sandbox:
        for target in ("/", "/x?a", "/fault/closes", "/x?b", "/fault/not_http"):
            sandbox_talk(sandbox, target, promised=20 if "not_http" in target else 1 << 60)
        sandbox_talk(sandbox, "/p/1.html", host=1)
        log = sandbox.log
        assert [entry[1:] for entry in log] == [
            ("127.0.1.1", "/", 200, 1),
            ("127.0.1.1", "/x?a", 404, 2),
            ("127.0.1.1", "/fault/closes", None, 3),
            ("127.0.1.1", "/x?b", 404, 4),
            ("127.0.1.1", "/fault/not_http", None, 5),
            ("127.0.1.2", "/p/1.html", 200, 6),
        ]
        times = [before, *(entry.t for entry in log), time.monotonic()]
        assert times == sorted(times)
        assert sandbox.requests_for("/x") == [log[1], log[3]] and sandbox.requests_for("/x?b") == [log[3]]
        assert sandbox.max_in_window(0, 1e9) == 5 and sandbox.max_in_window(1, 1e9) == 1
        stats = sandbox.stats()
        assert (stats.requests, stats.connections) == (6, 6) and stats.statuses == {200: 2, 404: 2, None: 2}
        assert "2 hosts of 3 pages" in repr(sandbox) and "requests=6" in repr(sandbox)
    for keep, left in ((2, ["/b", "/c"]), (False, []), (True, ["/a", "/b", "/c"])):
        with sb.Sandbox(hosts=1, log=keep) as sandbox:
            for target in ("/a", "/b", "/c"):
                sandbox_talk(sandbox, target)
            assert [entry.path for entry in sandbox.log] == left and sandbox.stats().requests == 3


def test_sandbox_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb, "CACHE_BYTES", 12_000)
    monkeypatch.setattr(sb, "COUNTS_LIMIT", 3)
    sandbox = sb.Sandbox(hosts=2, pages=9, page_bytes=5_000)
    for host, page in itertools.product(range(2), range(9)):
        assert sandbox._page(host, page) == sandbox._page(host, page)
        assert sandbox._cached == sum(map(len, sandbox._cache.values())) <= 12_000
    assert [sandbox._count(0, target) for target in "aabcdda"] == [1, 2, 1, 1, 1, 2, 1] and len(sandbox._counts) == 3


@pytest.mark.parametrize("encrypted", [False, True])
def test_sandbox_stops_whatever_hangs(encrypted: bool, caplog: pytest.LogCaptureFixture) -> None:
    contexts = SandboxTls.contexts() if encrypted else None
    threads = set(threading.enumerate())
    names = [
        "never_answers",
        "head_drip",
        "body_drip",
        "hangs_in_body",
        "not_http",
        "endless_body",
        "endless_headers",
        "gzip_bomb",
    ]
    with sb.Sandbox(hosts=2, tls=contexts[0] if contexts else None) as sandbox:
        sockets: list[socket.socket] = []
        for name, host in itertools.product(names, (0, 1)):
            sock = socket.create_connection((sandbox.hosts[host], sandbox.port), PATIENCE)
            if contexts:
                sock = contexts[1].wrap_socket(sock, server_hostname=sandbox.hosts[host])
            sock.sendall(f"GET {sb.FAULTS[name].path} HTTP/1.1\r\n\r\n".encode())
            sockets.append(sock)
        # Connected, but silent: idle, or in the middle of a handshake.
        sockets += [socket.create_connection((host, sandbox.port), PATIENCE) for host in sandbox.hosts * 3]
        sockets[-1].sendall(b"GET / HT")
        assert sandbox_tls_get(sandbox, contexts, "/robots.txt").endswith(b"Allow: /\n")
    assert set(threading.enumerate()) == threads and sandbox.stats().open == 0
    for sock in sockets:
        with sock:
            try:
                while sock.recv(1 << 20):
                    pass
            except OSError as error:
                assert not isinstance(error, TimeoutError)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((sandbox.hosts[0], sandbox.port), PATIENCE)
    sandbox.stop()
    gc.collect()
    assert caplog.records == []


class SandboxTls:
    """A server and a client context that trust each other, made once."""

    made: ClassVar[list[tuple[ssl.SSLContext, ssl.SSLContext]]] = []

    @classmethod
    def contexts(cls) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        if not cls.made:
            authority = trustme.CA()
            server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
            authority.issue_cert("127.0.1.1", "127.0.1.2").configure_cert(server)
            authority.configure_trust(client)
            cls.made.append((server, client))
        return cls.made[0]


def sandbox_tls_get(sandbox: sb.Sandbox, contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None, path: str) -> bytes:
    if contexts is None:
        return sandbox_talk(sandbox, path)[0]
    connection = http.client.HTTPSConnection(sandbox.hosts[0], sandbox.port, timeout=PATIENCE, context=contexts[1])
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


def test_sandbox_tls_serves_the_same_site() -> None:
    contexts = SandboxTls.contexts()
    with sb.Sandbox(hosts=1, pages=3, tls=contexts[0]) as sandbox:
        assert sandbox.url("/") == f"https://127.0.1.1:{sandbox.port}/"
        for page in range(3):
            wanted = sb.make_page(0, page, 3, base=f"https://{{host}}:{sandbox.port}")
            assert sandbox_tls_get(sandbox, contexts, sb.page_path(page)) == wanted
        assert len(sandbox_tls_get(sandbox, contexts, "/fault/huge_page")) == 50_000_000
        with socket.create_connection((sandbox.hosts[0], sandbox.port), PATIENCE) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")  # no TLS at all: refused, and nothing is served
            assert b"HTTP" not in sock.recv(1 << 16)
        assert sandbox.stats().requests == 4


def test_sandbox_misuse() -> None:
    for bad in ({"hosts": 0}, {"pages": 0}, {"page_bytes": -1}, {"port": 70_000}, {"hosts": 10**6}):
        with pytest.raises(ValueError, match="needed"):
            sb.Sandbox(**bad)  # type: ignore[arg-type]
    with sb.Sandbox(hosts=2) as sandbox:
        with pytest.raises(RuntimeError, match="running"):
            sandbox.start()
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.1\.1:{sandbox.port}: "):
            sb.Sandbox(hosts=1, port=sandbox.port).start()
        with pytest.raises(KeyError):
            sandbox.fault_url("no such")
    sandbox.start()
    assert sandbox_split(sandbox_talk(sandbox, "/")[0])[0] == 200
    sandbox.stop()
    gc.collect()


def sandbox_command(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(sb.__file__)), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def test_sandbox_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    for number, urls in ((signal.SIGINT, "-"), (signal.SIGTERM, str(tmp_path / "urls.txt"))):
        with sandbox_command("--hosts", "2", "--pages", "3", "--size", "0", "--port", "0", "--urls", urls) as process:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r"http://127.0.1.1:\d+/", process.stderr.readline())
            assert found is not None
            listed = process.stdout.read() if urls == "-" else ""  # the list ends although the server goes on
            target = urlsplit(found[0])
            with (
                socket.create_connection((target.hostname, target.port), PATIENCE) as sock,
                sock.makefile("rb") as file,
            ):
                sock.sendall(b"GET /p/2.html HTTP/1.0\r\n\r\n")
                assert sandbox_split(file.read())[0] == 200
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)
            assert (process.returncode, errors) == (130, "")
            lines = (listed or Path(urls).read_text()).splitlines()
            assert len(lines) == 6 and lines[5] == f"http://127.0.1.2:{target.port}/p/2.html"


def test_sandbox_command_explains_itself(tmp_path: Path) -> None:
    with sandbox_command("--list") as listing, sandbox_command("--help") as about:
        table = listing.communicate(timeout=PATIENCE)[0].splitlines()
        text = about.communicate(timeout=PATIENCE)[0]
    assert len(table) == len(sb.FAULTS) + 1 and (listing.returncode, about.returncode) == (0, 0)
    assert all(line in text for line in table) and "examples:" in text
    with sb.Sandbox(hosts=1) as sandbox:
        wrong = (
            (["--port", str(sandbox.port)], 1, "cannot listen"),
            (["--hosts", "0"], 2, "needed"),
            (["--port", "0", "--urls", str(tmp_path / "no" / "urls")], 1, "urls: No such file"),
        )
        for args, code, message in wrong:
            with sandbox_command(*args) as process:
                errors = process.communicate(timeout=PATIENCE)[1].splitlines()
            assert process.returncode == code and message in errors[-1] and errors[-1].startswith("sandbox: ")
            assert not any("Traceback" in line for line in errors)


# ======================================================================================================== bench.py


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_bench_spread_is_the_median_and_the_range(values: list[float]) -> None:
    spread = bench.Spread.of(iter(values))
    assert spread.median == pytest.approx(statistics.median(values))
    assert (spread.low, spread.high) == (min(values), max(values))


def test_bench_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        bench.Spread.of([])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("", ""),
        ("scrapy", "scrapy"),
        (1234567, "1,234,567"),
        (0.02, "0.02"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (18223.4, "18,223"),
        (bench.Spread(2.0, 2.0, 2.0), "2.00"),
        (bench.Spread(480.2, 469.6, 495.0), "480 (470-495)"),
    ],
)
def test_bench_cell(value: object, text: str) -> None:
    assert bench.cell(value) == text


def test_bench_table_is_aligned() -> None:
    rows: list[dict[str, Any]] = [
        {"": "crawl_async", "pages/s": 1234.0, "x Scrapy": 3.5},
        {"": "curl", "pages/s": bench.Spread(5.0, 4.0, 6.0), "x Scrapy": None},
    ]
    assert bench.table(rows).splitlines() == [
        "                      pages/s  x Scrapy",
        "-----------  ----------------  --------",
        "crawl_async             1,234      3.50",
        "curl         5.00 (4.00-6.00)          ",
    ]


def test_bench_rounds_are_interleaved() -> None:
    assert "".join(name for _, name in bench.interleaved("abc", 4)) == "abcbcacababc"
    assert [number for number, _ in bench.interleaved("ab", 2)] == [0, 0, 1, 1]
    assert list(bench.interleaved("", 3)) == []


def test_bench_without_arguments_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    shown = capsys.readouterr().out
    for name, command in bench.COMMANDS.items():
        assert f"  {name:12} {command.about}\n" in shown
    assert {"crawl", "parse", "primitives", "rate", "million"} <= bench.COMMANDS.keys()


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_bench_command_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for command in bench.COMMANDS[name].examples:
        assert f"python bench.py {command}\n" in shown
        assert bench.make_parser().parse_args(command.split()).command == name


@pytest.mark.parametrize("arguments", [["crawl", "--peers", "nobody"], ["million", "--driver", "nobody"]])
def test_bench_refuses_unknown_names(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="'nobody' is none of crawl_async"):
        bench.main(arguments)


def test_bench_parse_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    assert bench.main(["parse", "--pages", "3", "--size", "3000", "--repeat", "1", "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    whole = json.loads(figures.read_text())
    assert {"html_parse", "textbook"} <= {row[""] for row in whole["results"]} <= PARSERS.keys()
    assert whole["options"]["pages"] == 3 and whole["machine"]["python"]
    for row in whole["results"]:
        assert f"\n{row['']} " in shown
        assert (row["titles"], row["links"], row["words +-2 %"]) == (3, 3, 3)


def test_bench_parse_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"no \*\.html"):
        bench.main(["parse", str(tmp_path)])
    (tmp_path / "one.html").write_text("<title>One</title><body>two words <a href=/x>three</a>")
    assert bench.main(["parse", str(tmp_path), "--repeat", "1"]) == 0
    assert "1 pages, 0.0 MB" in capsys.readouterr().out


def test_bench_primitives_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["primitives", "--calls", "4", "--repeat", "1"]) == 0
    shown = capsys.readouterr().out
    for name in ("primitives.retry", "primitives.retry_async", "TokenBucket.acquire_async", "Semaphore", "Channel",
                 "threading.Semaphore", "asyncio.Semaphore", "queue.Queue", "asyncio.Queue"):  # fmt: skip
        assert f"\n  {name} " in shown


BENCH_PAGE = b"""<!doctype html><html><head><title> A
 title </title><style>p { color: red }</style></head><body><p>two wo<b>rds</b><script>let no = "<a href=/no>";</script>
<noscript>not this</noscript><a href="../up#top">up</a> <a href=/up>again</a> <a href="mailto:a@b.example">mail</a>
<a href="//other.example/x?y=1">other</a></body></html>"""


@pytest.mark.parametrize("name", PARSERS)
def test_bench_parsers_find_the_same(name: str) -> None:
    if not bench.present(name):
        pytest.skip(f"{name} is not installed")
    facts = PARSERS[name](BENCH_PAGE, "http://host.example/a/b")
    assert facts == ("A title", 7, ["http://host.example/up", "http://other.example/x?y=1"])


@pytest.mark.parametrize("peer", ["textbook_async", "textbook_threads"])
def test_bench_textbook_crawlers_write_every_row(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    urls, rows = tmp_path / "urls.txt", tmp_path / "rows.jsonl"
    with sandbox.Sandbox(hosts=2, pages=3, page_bytes=3000) as site:
        urls.write_text("\n".join(site.site_urls()))
        assert bench.main(["_peer", peer, str(urls), str(rows), "2"]) == 0
    found = {row["url"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found.keys() == set(urls.read_text().split())
    assert all(row["title"] and row["word_count"] and row["links_found"] for row in found.values())


def test_bench_site_is_the_sandboxs(tmp_path: Path) -> None:
    urls = tmp_path / "urls.txt"
    assert bench.main(["_site", str(tmp_path / "www"), str(urls), "5", "2", "3000", "8080"]) == 0
    expected = [(page, host) for page in range(3) for host in range(2)][:5]
    base = "http://{host}:8080"
    assert urls.read_text().split() == [
        base.format(host=sandbox.address(host)) + sandbox.page_path(page) for page, host in expected
    ]
    for page, host in expected:
        file = tmp_path / "www" / sandbox.address(host) / (f"p/{page}.html" if page else "index.html")
        assert file.read_bytes() == sandbox.make_page(host, page, 3, 3000, base, hosts=2)


def test_bench_counts_hosts_as_the_sandbox_does() -> None:
    assert [bench.host_address(n) for n in range(600)] == [sandbox.address(n) for n in range(600)]


def test_bench_tells_what_differs(tmp_path: Path) -> None:
    def rows(name: str, *found: tuple[str, str, int, list[str]]) -> bench.Digest:
        file = tmp_path / name
        keys = ("url", "title", "word_count", "links_found")
        file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in found))
        return bench.digest(file)

    ours = rows("a", ("/1", "t", 5, ["x", "y"]), ("/2", "t", 5, []), ("/3", "t", 5, []))
    theirs = rows("b", ("/1", "t", 5, ["y", "x"]), ("/2", "u", 6, ["x"]), ("/4", "t", 5, []))
    assert not any(bench.differences(ours, ours).values())
    assert bench.differences(ours, theirs) == {"pages": 3, "titles": 1, "words": 1, "links": 1, "in one only": 2}


def test_bench_arrivals_are_counted_across_pieces() -> None:
    data = b'{"url":"a\\n","error":null}\n' * 19 + b'{"error":"http: 404"}\n'
    arrivals = bench.Arrivals(20)
    for second, start in enumerate(range(0, len(data), 7)):
        arrivals.take(data[start : start + 7], float(second))
    assert (arrivals.rows, arrivals.failed) == (20, 1)
    assert len(arrivals.times) == 11 and arrivals.times == sorted(arrivals.times)
    assert arrivals.rates() == [2 / (b - a) for a, b in zip(arrivals.times, arrivals.times[1:], strict=False)]


def test_bench_arrivals_all_at_once() -> None:
    arrivals = bench.Arrivals(10)
    arrivals.take(b"\n" * 10, 1.0)
    assert arrivals.times == [1.0] * 11 and len(arrivals.rates()) == 10


def test_bench_feeds_distinct_urls() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as lines, open(writer, "wb", buffering=0) as stream:
        bench.feed(stream, 1001, 7, 80)
        urls = lines.read().split()
    assert len(urls) == len(set(urls)) == 1001
    assert urls[1000] == b"http://127.0.1.7:80/tiny?n=1000"


def test_bench_feed_ends_quietly_when_the_reader_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as stream:
        bench.feed(stream, 10, 1, 80)


def test_bench_children_are_measured_and_ended() -> None:
    run = bench.run_child([sys.executable, "-c", "b'x' * 50_000_000"], "a child")
    assert run.seconds > 0 and run.cpu > 0 and run.peak_mb > 50
    with pytest.raises(SystemExit, match="a child failed with exit code 3"):
        bench.run_child([sys.executable, "-c", "raise SystemExit(3)"], "a child")
    with (
        pytest.raises(KeyError),
        bench.child([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as process,
    ):
        assert process.stdout and process.stdout.readline() == b"1\n"
        raise KeyError
    assert process.returncode == -15


def test_bench_children_get_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9/")
    code = "import os; print(sorted(name for name in os.environ if 'proxy' in name.lower()))"
    with bench.child([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read() == b"[]\n"
        process.wait()
