"""logs/parse.py: rows for each format; any bytes; a real server stores whatever comes of them."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from logs import parse as log_parse
from tests.helpers.postgres import PgServer

NOW = datetime(2026, 11, 21, 20, 0, 0, tzinfo=UTC)


SOURCE = "192.0.2.7"


def logs_parse_all(datagram: bytes | str, zone: tzinfo = UTC, now: datetime = NOW) -> list[log_parse.Event]:
    return log_parse.parse(datagram.encode() if isinstance(datagram, str) else datagram, SOURCE, now, zone)


def one(datagram: bytes | str, zone: tzinfo = UTC, now: datetime = NOW) -> log_parse.Event:
    (event,) = logs_parse_all(datagram, zone, now)
    return event


def logs_parse_is(event: log_parse.Event, **expected: Any) -> None:
    """What is not named must be as if the sender had said nothing. Times: ISO, attributes: a dict."""
    nothing = {
        "event_at": NOW.isoformat(), "service": "unknown", "host": SOURCE, "severity": 6,
        "attributes": {}, "parse_error": None,
    }  # fmt: skip
    said = event._asdict() | {"event_at": event.event_at.isoformat(), "attributes": json.loads(event.attributes)}
    assert said == nothing | {"received_at": NOW} | expected


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
def test_rfc5424(line: str, expected: dict[str, Any]) -> None:
    logs_parse_is(one(line), **expected)


logs_parse_names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


sd_names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='="]'), min_size=1)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(
    st.integers(0, 191),
    st.timedeltas(timedelta(days=-365), timedelta(days=1)),
    st.lists(logs_parse_names, min_size=4, max_size=4),
    st.dictionaries(sd_names, st.dictionaries(sd_names, texts, max_size=3), max_size=3),
    texts,
)
def test_rfc5424_gives_back_what_was_sent(
    priority: int, age: timedelta, names: list[str], data: dict[str, dict[str, str]], message: str
) -> None:
    at = NOW + age
    escaped = str.maketrans({c: "\\" + c for c in '"\\]'})
    structured = ""
    for name, values in data.items():
        pairs = [f' {key}="{value.translate(escaped)}"' for key, value in values.items()]
        structured += f"[{name}{''.join(pairs)}]"
    line = f"<{priority}>1 {at.isoformat()} {' '.join(names)} {structured or '-'} {message}."
    if "\n<" in line:
        return  # may begin another
    event = one(line)
    host, service, procid, msgid = ("" if name == "-" else name for name in names)
    assert (event.severity, event.event_at, event.parse_error) == (priority % 8, at, None)
    assert (event.host, event.service) == (host or SOURCE, service or "unknown")
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
def test_rfc3164_and_devices(line: str, expected: dict[str, str]) -> None:
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
    event = one(line)
    logs_parse_is(event, event_at=at, severity=2, attributes=attributes, parse_error=error, **expected)


def test_syslog_without_priority() -> None:
    logs_parse_is(
        one("Nov 11 22:14:15 h a[1]: m"),
        event_at="2026-11-11T22:14:15+00:00", host="h", service="a", attributes={"procid": "1"}, message="m",
    )  # fmt: skip
    for text in ("error: m", "29: m", "2026-11-11 22:14:15 ERROR app: m", "Nov 11", " <34>m", "[a] b", "m" * 60_000):
        logs_parse_is(one(text), message=text)


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
def test_the_year_is_the_nearest(now: str, said: str, at: str | None) -> None:
    received_at = datetime.fromisoformat(f"{now}+00:00")
    event = one(f"<34>{said} h a: m", now=received_at)
    assert event.event_at == (received_at if at is None else datetime.fromisoformat(f"{at}+00:00"))
    assert json.loads(event.attributes).get("claimed_event_at") == (said if at is None else None)


@given(
    st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)),
    st.integers(-180 * 86400, 86400),
    st.integers(-12 * 60, 14 * 60),
)
def test_a_time_without_year_or_zone(now: datetime, ahead: int, minutes: int) -> None:
    received_at = now.replace(tzinfo=UTC, microsecond=0)
    zone = timezone(timedelta(minutes=minutes))
    sent = (received_at + timedelta(seconds=ahead)).astimezone(zone)
    event = one(f"<34>{sent:%b} {sent.day:2d} {sent:%H:%M:%S} h a: m", zone, received_at)
    assert event.event_at == sent
    assert event.event_at.tzinfo is UTC
    with_offset = one(f"<34>1 {sent.isoformat()} h a - - - m", UTC, received_at)
    without = one(f"<34>1 {sent.replace(tzinfo=None).isoformat()} h a - - - m", zone, received_at)
    assert with_offset == without
    assert with_offset.event_at == sent


def test_a_time_that_names_utc_is_not_in_the_zone() -> None:
    zone = timezone(timedelta(hours=5))
    for name, hour in (("", 14), (" UTC", 19), (" GMT", 19), (" CET", 14)):
        event = one(f"<34>Nov 21 19:00:00{name}: %SYS-5-A: m", zone)
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
        (datetime.max.replace(tzinfo=UTC) - NOW, False),
        (datetime.min.replace(tzinfo=UTC) - NOW, False),
    ],
)
def test_absurd_times_are_kept_as_claims(line: str, ahead: timedelta, believed: bool) -> None:
    said = (NOW + ahead).isoformat()
    event = one(line.format(said))
    assert (event.service, event.host, event.message, event.parse_error) == ("a", "h", "m", None)
    assert event.event_at == (NOW + ahead if believed else NOW)
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
def test_json(record: dict[str, Any], expected: dict[str, Any]) -> None:
    expected = {"message": ""} | expected
    for indent, ascii_only in itertools.product((None, 2), (False, True)):
        text = json.dumps(record, ensure_ascii=ascii_only, indent=indent)
        logs_parse_is(one(text), **expected)
        logs_parse_is(one(f"\r\n\ufeff{text}\r\n"), **expected)


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
def test_json_that_is_kept_raw(text: str, expected: dict[str, Any]) -> None:
    logs_parse_is(one(text), message=text, **expected)


@pytest.mark.parametrize("text", ["{", "{}}", "{a}", '{"a": NaN}', '{\n "a": 1,\n "b"', '{"a": 1} {"a": 2}'])
def test_broken_json_is_one_event(text: str) -> None:
    event = one(text)
    assert (event.parse_error or "").startswith("JSON: ")
    logs_parse_is(event, message=text, parse_error=event.parse_error)


def test_json_and_bytes_that_are_no_text() -> None:
    event = one(b'{"app": "a\xff", "msg": "m\0"}')
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
def test_lines(datagram: bytes, messages: list[str]) -> None:
    events = logs_parse_all(datagram)
    assert [event.message for event in events] == messages
    for event in events:
        assert (event.parse_error == log_parse.EMPTY) == (not event.message.strip())


@pytest.mark.parametrize("line", [b"m", b"<14>m", b'{"msg":"m"}'])
def test_a_datagram_gives_so_many_events_and_no_more(line: bytes) -> None:
    limit = log_parse.MAX_LINES
    exact = logs_parse_all(b"\n".join([line] * limit))
    assert {event[1:] for event in exact} == {one(line)[1:]}
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
def test_bytes_that_are_no_text_are_shown(datagram: bytes, message: str, error: str) -> None:
    event = one(datagram)
    assert (event.message, event.parse_error) == (message, error)
    if datagram.startswith(b"<14>Nov"):
        assert (event.host, event.service, event.event_at) == (r"h\xf4te", "a", NOW)
    good, bad = logs_parse_all(b"good\n" + datagram.lstrip(b"<"))
    assert (good.parse_error, bad.parse_error) == (None, error)


@pytest.mark.parametrize(
    "line", ["<14>1 - {h} {s} - - - m", "<14>Nov 21 20:00:00 {h} {s}: m", '{{"host":"{h}","app":"{s}","msg":"m"}}']
)
def test_long_names_are_cut_and_said_so(line: str) -> None:
    limit = log_parse.MAX_NAME
    fits = one(line.format(h="h" * limit, s="ü" * limit))
    assert (fits.host, fits.service, fits.message, fits.parse_error) == ("h" * limit, "ü" * limit, "m", None)
    text = line.format(h="h" * (limit + 1), s="\U0001f600" * (limit + 1))
    cut = one(text)
    assert (cut.host, cut.service, cut.message) == ("h" * limit, "\U0001f600" * limit, text)
    assert cut.parse_error == "service longer than 255 characters; host longer than 255 characters"


# ----------------------------------------------------------------------------------------------------------- any bytes

SEEDS = [
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


PIECES = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r\n", b" ", b"<", b">", b"<191>", b"<192>1 ", b"\n<34>1 - - - - - ",
    b"[", b"]",
    b'"', b"\\", b"=", b":", b"-", b"{", b"}", b"\\u0000", b"\\ud800", b"1e999", b"9" * 30,
    b"0001-01-01T00:00:00+23:59",
    b"9999-12-31T23:59:59-23:59", b"Feb 30 25:61:61 ", b"Dec 31 23:59:59", b"\xef\xbb\xbf", b"null", b"x" * 300,
    b"[" * 300,
]  # fmt: skip


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """One in eight is noise, the others are a datagram of the corpus with one to four wounds."""
    rng = random.Random(seed)
    random_, choice = rng.random, rng.choice
    for number in range(count):
        if number % 8 == 0:
            yield rng.randbytes(int(random_() * 60))
            continue
        data = choice(SEEDS)
        for _ in range(1 + int(random_() * 4)):
            at = int(random_() * (len(data) + 1))
            kind = random_()
            if kind < 0.3:
                data = data[:at] + choice(PIECES) + data[at:]
            elif kind < 0.6:
                data = data[:at] + bytes((int(random_() * 256),)) + data[at + 1 :]
            elif kind < 0.8:
                data = data[:at] + data[at + int(random_() * 20) :]
            else:
                data = data[:at] + choice(SEEDS)[-at:]
        yield data


def check(datagram: bytes, events: list[log_parse.Event]) -> None:
    """What is promised of any datagram."""
    assert events
    for event in events:
        received_at, at, service, host, severity, message, attributes, error = event
        assert received_at is NOW
        assert at.tzinfo is UTC and -log_parse.BEHIND <= at - received_at <= log_parse.AHEAD
        assert 0 <= severity <= 7
        assert 0 < len(service) <= 255 and 0 < len(host) <= 255
        text = f"{service}{host}{message}{attributes}{error}"
        assert "\0" not in text
        text.encode()
        assert attributes[0] == "{" and attributes[-1] == "}"
        if error is not None and datagram.isascii() and b"\0" not in datagram:
            assert message in datagram.decode()


def test_parse_100_000_mutated_datagrams() -> None:
    events = errors = 0
    for datagram in mutants(7, 100_000):
        parsed = log_parse.parse(datagram, SOURCE, NOW)
        check(datagram, parsed)
        events += len(parsed)
        errors += sum(event.parse_error is not None for event in parsed)
    assert 20_000 < errors < events - 20_000  # both sorts were there


@settings(max_examples=1000)
@given(st.lists(st.binary(max_size=20) | st.sampled_from(PIECES + SEEDS), max_size=12))
@example([b"<34>1 0001-01-01T00:00:00+23:59 h a - - - m"])
def test_any_bytes(pieces: list[bytes]) -> None:
    datagram = b"".join(pieces)
    check(datagram, logs_parse_all(datagram))


@functools.cache
def heavy() -> list[bytes]:
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


def test_the_longest_datagrams_cost_little() -> None:
    """Linear: going back over 64 KiB at each byte would take seconds. What it costs is the least of some tries."""
    for datagram in heavy():
        cost = float("inf")
        for _ in range(5):
            begun = time.process_time()
            events = logs_parse_all(datagram)
            cost = min(cost, time.process_time() - begun)
            if cost < 0.25:
                break
        assert cost < 0.25
        check(datagram, events)
        assert len(events) <= log_parse.MAX_LINES


def test_postgresql_stores_whatever_comes_of_any_bytes(pg: PgServer) -> None:
    nasty = [
        *heavy()[::7],
        *(b'<34>1 - - - - - [s x="%s"][t%s x="%s"]%s' % ((piece,) * 4) for piece in PIECES),
        *(b'{"a":"' + piece + b'","' + piece + b'":[' + piece + b"]}" for piece in PIECES),
        *(b'{"a":' + b"[" * depth + b"]" * depth + b"}" for depth in (200, 252, 253, 254, 255, 1022, 30_000)),
        *(b'{"a":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}" for depth in (252, 253, 254, 255, 1022, 9_000)),
        *(b'{"a":%s,"ts":%s}' % (n, n) for n in (b"1e308", b"-1e308", b"5e-324", b"18446744073709551616", b"9" * 300)),
        *(b'{"a":"' + chr(n).encode() + b'","b":"\\u%04x"}' % n for n in (*range(1, 0xD800, 211), 0xFFFE, 0xFFFF)),
        bytes(range(256)) * 255,
    ]  # fmt: skip
    datagrams = [*nasty, *itertools.islice(mutants(8, 20_000), 0, None, 5)]
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
