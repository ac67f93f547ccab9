"""crawl/http1.py: what bytes are read as, in whatever segments, and that both drivers read them so."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import itertools
import random
import socket
import time
import zlib
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crawl.http1 import MAX_HEAD, MAX_LINE, STEPS, Answer
from crawl.http_aiohttp import Body, Reading
from tests.helpers.crawl import DRIVERS, RAW_OK, RawAnswer, RawWeb, kind, raw_answer, scrape

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
PAGE = b"<title>t</title><p>one two"
SIZE = b"Content-Length: %d\r\n" % len(PAGE)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(PAGE), PAGE)
LAST = b"0\r\n\r\n"
GOOD = HEAD + SIZE + b"\r\n" + PAGE
PACKED = gzip.compress(PAGE)


def head_with(*lines: bytes) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def lengths(*values: bytes) -> bytes:
    return head_with(*(b"Content-Length: " + value for value in values)) + PAGE


def chunks(*pieces: bytes) -> bytes:
    return HEAD + CHUNKED + b"\r\n" + b"".join(pieces)


def coded(coding: bytes, body: bytes = CHUNK + LAST, *lines: bytes) -> bytes:
    return head_with(b"Transfer-Encoding: " + coding, *lines) + body


# What comes -> what it is: whether its connection is kept, or why it is not read. Where it is closed, that ends it.
KEPT, CLOSED = "kept", "closed"
ROWS: dict[str, tuple[bytes, str]] = {
    "good": (GOOD, KEPT),
    # the head
    "a long line": (head_with(b"X-CSP: " + b"a" * 9000, SIZE[:-2]) + PAGE, KEPT),
    "the longest head": (HEAD + SIZE + b"X: " + b"a" * (MAX_HEAD - len(HEAD + SIZE) - 7) + b"\r\n\r\n" + PAGE, KEPT),
    "a longer head": (HEAD + SIZE + b"X: " + b"a" * (MAX_HEAD - len(HEAD + SIZE) - 6) + b"\r\n\r\n" + PAGE, "protocol"),
    "many lines": (head_with(*[b"Set-Cookie: a=b"] * 3000, SIZE[:-2]) + PAGE, KEPT),
    "no colon": (head_with(b"no colon", SIZE[:-2]) + PAGE, KEPT),
    "no colon at first": (GOOD.replace(b"\r\n", b"\r\nno colon\r\n", 1), KEPT),
    "a blank before the colon": (head_with(b"Content-Length : %d" % len(PAGE)) + PAGE, KEPT),
    "a name of two words": (head_with(b"X Y: z", SIZE[:-2]) + PAGE, KEPT),
    "no name": (head_with(b": x", SIZE[:-2]) + PAGE, KEPT),
    "a folded line": (GOOD.replace(b": text/html", b":\r\n \ttext/html"), KEPT),
    "a folded line at first": (GOOD.replace(b"\r\n", b"\r\n X: y\r\n", 1), KEPT),
    "a line of blanks": (GOOD.replace(b"\r\n", b"\r\nX: y\r\n  \r\n", 1), KEPT),
    "a folded length": (head_with(b"Content-Length: 2\r\n 6") + PAGE, CLOSED),
    "CR in a line": (head_with(b"X: a\rContent-Length: 3", SIZE[:-2]) + PAGE, KEPT),
    "CR CR LF": (GOOD.replace(b"\r\n", b"\r\r\n", 1), KEPT),
    "NUL": (head_with(b"X: a\0b", SIZE[:-2]) + PAGE, "protocol"),
    "other control characters": (head_with(b"X: a\x01b", SIZE[:-2]) + PAGE, KEPT),
    "LF": (GOOD.replace(b"\r\n", b"\n"), KEPT),
    "both": (GOOD.replace(b"\r\n\r\n", b"\n\r\n"), KEPT),
    "empty lines before": (b"\r\n\n\r\n" + GOOD, KEPT),
    "interim heads": (b"HTTP/1.1 103 Hints\r\nContent-Length: 5\r\n\r\n" * 50 + GOOD, KEPT),
    "thousands of interim heads": (b"HTTP/1.1 100 Go\r\n\r\n" * 5000 + GOOD, KEPT),
    "interim heads without end": (b"HTTP/1.1 103 Hints\r\nX: %b\r\n\r\n" % (b"a" * 9000) * 30, "protocol"),
    "no reason": (GOOD.replace(b" OK", b""), KEPT),
    "any reason": (GOOD.replace(b"OK", b"\xff\x01" * 5000), KEPT),
    "more blanks": (GOOD.replace(b" 200", b" \t 200"), KEPT),
    "lower case": (GOOD.replace(b"HTTP", b"http"), KEPT),
    "HTTP/1.2": (GOOD.replace(b"1.1", b"1.2"), KEPT),
    "HTTP/2": (GOOD.replace(b"1.1", b"2"), CLOSED),
    "HTTP/1.0": (GOOD.replace(b"1.1", b"1.0"), CLOSED),
    "HTTP/1.0 that is kept": (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n" + SIZE + b"\r\n" + PAGE, KEPT),
    "close": (head_with(b"Connection: x, Close", SIZE[:-2]) + PAGE, CLOSED),
    "no status": (GOOD.replace(b"200", b"abc"), "protocol"),
    "a status of two digits": (GOOD.replace(b"200", b"20"), "protocol"),
    "a status of four digits": (GOOD.replace(b"200", b"2000"), "protocol"),
    "a status below 100": (GOOD.replace(b"200", b"099"), "protocol"),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n", "protocol"),
    "a page and no head": (PAGE, "protocol"),
    "cut in the status line": (b"HTTP/1.1 200", "reset"),
    "cut in a line": (HEAD[:-9], "reset"),
    "cut between lines": (HEAD, "reset"),
    "nothing": (b"", "reset"),
    # the length
    "twice": (lengths(b"26", b"26"), KEPT),
    "a list": (lengths(b"26,26 , 26"), KEPT),
    "twice, and different": (lengths(b"26", b"10"), "protocol"),
    "a list of different ones": (lengths(b"26, 10"), "protocol"),
    "a sign": (lengths(b"+26"), "protocol"),
    "a sign and no number": (lengths(b"+"), "protocol"),
    "an underscore": (lengths(b"2_6"), "protocol"),
    "a sign and an underscore": (lengths(b"+1_7"), "protocol"),
    "a number and nothing": (lengths(b"26", b""), "protocol"),
    "a list that ends with nothing": (lengths(b"26,"), "protocol"),
    "the same number, written otherwise": (lengths(b"26, 026"), "protocol"),
    "leading zeros": (lengths(b"0" * 30 + b"26"), KEPT),
    "below zero": (lengths(b"-1"), CLOSED),
    "a prefix": (lengths(b"0x1a"), CLOSED),
    "two words": (lengths(b"26 x"), CLOSED),
    "digits of others": (lengths("٢٦".encode()), CLOSED),
    "no digits": (lengths(b""), CLOSED),
    "more digits than a number can have": (lengths(b"9" * 5000), "truncated"),
    "a longer body": (GOOD + b"more", CLOSED),
    "a shorter body": (GOOD[:-1], "truncated"),
    "no length": (HEAD + b"\r\n" + PAGE, CLOSED),
    # chunks
    "chunks": (chunks(CHUNK, LAST), KEPT),
    "chunks, and more": (chunks(CHUNK, LAST, b"x"), CLOSED),
    "chunked and a length": (coded(b"chunked", CHUNK + LAST, b"Content-Length: 3"), CLOSED),
    "chunked and no length": (coded(b"chunked", CHUNK + LAST, b"Content-Length: x, 3"), CLOSED),
    "an extension, blanks, zeros": (chunks(b"000000000000000000001A \t; a=b\r\n%b\r\n" % PAGE, b"0;c\r\n\r\n"), KEPT),
    "a long extension": (chunks(b"1a;%b\r\n%b\r\n" % (b"a" * (MAX_LINE - 5), PAGE), LAST), KEPT),
    "a longer extension": (chunks(b"1a;%b\r\n%b\r\n" % (b"a" * MAX_LINE, PAGE), LAST), "protocol"),
    "chunks and LF": (chunks(CHUNK, LAST).replace(b"\r\n", b"\n"), KEPT),
    "a trailer": (chunks(CHUNK, b"0\r\nX: y\r\nno colon\r\n" + b"Y: z\r\n" * 3000, b"\r\n"), KEPT),
    "a trailer without end": (chunks(CHUNK, b"0\r\n" + b"Y: zzzz\r\n" * 30_000), "protocol"),
    "cut in the trailer": (chunks(CHUNK, b"0\r\nX: y"), CLOSED),
    "cut behind the last line": (chunks(CHUNK, b"0\r\n"), CLOSED),
    "cut in the last line": (chunks(CHUNK, b"0"), "truncated"),
    "cut before the last line": (chunks(CHUNK), "truncated"),
    "cut in a chunk": (chunks(CHUNK[:-5]), "truncated"),
    "cut behind a chunk": (chunks(CHUNK[:-1]), "truncated"),
    "a sign before a size": (chunks(b"+" + CHUNK, LAST), "protocol"),
    "a blank before a size": (chunks(b" " + CHUNK, LAST), "protocol"),
    "a prefix before a size": (chunks(b"0x" + CHUNK, LAST), "protocol"),
    "no size": (chunks(b"\r\n", CHUNK, LAST), "protocol"),
    "a size without end": (chunks(b"f" * 16 + b"\r\n"), "protocol"),
    "a chunk that is longer": (chunks(b"3\r\n<title>\r\n", LAST), "protocol"),
    "nothing behind a chunk": (chunks(CHUNK[:-2], LAST), "protocol"),
    # other codings
    "twice chunked": (coded(b"chunked, Chunked"), KEPT),
    "identity": (head_with(b"Transfer-Encoding: identity", SIZE[:-2]) + PAGE, KEPT),
    "no coding": (head_with(b"Transfer-Encoding:", SIZE[:-2]) + PAGE, KEPT),
    "gzip in chunks": (coded(b"gzip, chunked", b"%x\r\n%b\r\n" % (len(PACKED), PACKED) + LAST), KEPT),
    "gzip to the end": (coded(b"gzip", PACKED), CLOSED),
    "two codings in chunks": (
        coded(b"x-gzip, chunked", b"%x\r\n%b\r\n" % (len(two := gzip.compress(zlib.compress(PAGE))), two) + LAST,
              b"Content-Encoding: deflate"), KEPT),
    "chunks in gzip": (coded(b"chunked, gzip"), "protocol"),
    "chunks with a parameter": (coded(b"chunked;a=b"), "protocol"),
    "an unknown coding": (coded(b"x-unheard-of, chunked"), "protocol"),
    "chunks in 1.0": (coded(b"chunked", CHUNK + LAST, b"Connection: Keep-Alive").replace(b"1.1", b"1.0"), CLOSED),
    # no body
    "204": (head_with(b"Content-Length: 0").replace(b"200", b"204"), KEPT),
    "304": (head_with().replace(b"200", b"304"), KEPT),
    "204 with a length": (GOOD.replace(b"200", b"204")[: -len(PAGE)], CLOSED),
    "304 with a coding": (coded(b"chunked", b"").replace(b"200", b"304"), CLOSED),
    "204 with a body": (GOOD.replace(b"200", b"204"), CLOSED),
    "101": (b"HTTP/1.1 101 Other\r\nUpgrade: x\r\n\r\n", CLOSED),
}  # fmt: skip


def read(*segments: bytes) -> tuple[Any, ...]:
    """(status, headers, length, body, fault, whether it can be used again) of an answer; it is closed at the end."""
    answer = Answer()
    body = b"".join(answer.feed(segment) for segment in segments)
    while answer.more:
        body += answer.feed()
    reusable = answer.reusable
    if not answer.over:
        answer.end()
    assert answer.over and (answer.head or answer.fault)
    return answer.head, body, answer.fault and (str(answer.fault), answer.fault.status), reusable


@pytest.mark.parametrize("name", ROWS)
def test_what_bytes_are_read_as_in_whatever_segments(name: str) -> None:
    data, wanted = ROWS[name]
    whole = head, body, fault, reusable = read(data)
    assert (fault[0].partition(":")[0] if fault else KEPT if reusable else CLOSED) == wanted
    if not fault:
        assert body in (PAGE, b"", PACKED) or head.headers["Content-Encoding"] == "deflate, x-gzip"
        assert head.headers.get("Content-Type", "text/html") == "text/html"
    step = 1 + len(data) // 1000
    assert read(*(data[n : n + step] for n in range(0, len(data), step))) == whole
    for cut in range(len(data) if len(data) < 1000 else 0):
        assert read(data[:cut], data[cut:]) == whole, cut


# Of each: what it is in Chromium, by the tests of the Fetch standard (web-platform-tests, fetch/content-length): the
# length, 42 where it is none, an error. Its body is of 42 bytes, and the connection's end follows.
LENGTHS = {
    b"42": 42, b"42,42": 42, b"42|42": 42, b"42|42,42": 42, b"30": 30, b"30,30": 30, b"30|30": 30, b"30|30,30": 30,
    b"42,30": None, b"30,42": None, b"42|30": None, b"30|42": None, b"30,": None, b",30": None, b"30|\t": None,
    b"|30": None, b"aaaah|nah": None, b"aaaah, nah": None, b"aaaah|aaaah": 42, b"aaaah, aaaah": 42, b"aaaah": 42,
    b"42s": 42, b"30s": 42, b"-1": 42, b"0x20": 42, b"030": 30, b"030|30": None, b"030, 30": None,
}  # fmt: skip


def test_both_drivers_read_lengths_as_chromium_does() -> None:
    body, paths = b"Fact: this is really forty-two bytes long.", {f"/{n}": value for n, value in enumerate(LENGTHS)}
    answers: dict[str, list[RawAnswer]] = {
        path: [[head_with(*(b"Content-Length: " + line for line in value.split(b"|"))) + body]]
        for path, value in paths.items()
    }
    for driver in DRIVERS:
        rows = compared(driver, answers)
        assert {
            value: None if rows[path]["error"].startswith("protocol: Content-Length") else int(rows[path]["bytes"])
            for path, value in paths.items()
        } == LENGTHS


def test_a_call_reads_so_many_chunks_at_most() -> None:
    answer = Answer()
    first = answer.feed(chunks(b"1\r\na\r\n" * 10_000, LAST, b"more"))
    assert 0 < len(first) < STEPS and answer.more and not answer.over
    rest = b""
    while answer.more:
        rest += answer.feed()
    assert len(first + rest) == 10_000 and answer.over and not answer.reusable


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_rubbish_is_the_same_in_whatever_segments(data: st.DataObject) -> None:
    good = bytearray(data.draw(st.sampled_from([row for row, _ in ROWS.values() if len(row) < 1000])))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(good)))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b"\r", b"\n", b"\r\n", b" ", b":", b",", b"0", b"9", b"\0", b"\xff", b"chunked"])
        )
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(good)), max_size=5))), len(good)]
    assert read(*(bytes(good[a:b]) for a, b in itertools.pairwise(cuts))) == read(bytes(good))


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 200 OK\r\nX: " + b"a" * 250_000, b"\r\n" * 125_000, chunks(b"1\r\na\r\n" * 40_000)]
)  # fmt: skip
def test_bytes_one_by_one_take_linear_time(data: bytes) -> None:
    answer = Answer()
    began = time.thread_time()
    for n in range(len(data)):
        answer.feed(data[n : n + 1])
    assert not answer.over and not answer.more
    assert time.thread_time() - began < 5.0  # 0.3 s; it would be 100, if each step cost what came before it


def compared(driver: str, answers: dict[str, list[RawAnswer]], **options: Any) -> dict[str, dict[str, Any]]:
    """The rows, without what no two runs have in common."""
    with RawWeb({**answers, "/ok": [[RAW_OK, None]]}) as web:
        rows = scrape(driver, [web.url(path) for path in answers], **{"retries": 0, "per_host": 16} | options)
        found = {}
        for row in rows:
            kept = dataclasses.asdict(row)
            del kept["duration_ms"], kept["fetched_at"]
            found[row.url.removeprefix(web.url(""))] = {
                name: str(value).replace(web.url(""), "") for name, value in kept.items()
            }
    assert found.keys() == answers.keys()
    return found


def test_both_drivers_read_each_row_so() -> None:
    names = {f"/{n}": name for n, name in enumerate(ROWS)}
    answers: dict[str, list[RawAnswer]] = {
        path: [[ROWS[name][0], None] if ROWS[name][1] in (KEPT, "protocol") else [ROWS[name][0]]]
        for path, name in names.items()
    }
    one, other = (compared(driver, answers) for driver in DRIVERS)
    assert one == other
    for path, name in names.items():
        error = one[path]["error"].partition(":")[0]
        other_fault = {"more digits than a number can have": "too_large", "101": "protocol"}.get(name)
        assert error == (other_fault or ("None" if ROWS[name][1] in (KEPT, CLOSED) else ROWS[name][1])), name


LINES = [
    b"Content-Type: text/html", b"Content-Type: text/html; charset=\xe9", b"Content-Length: %d",
    b"Content-Length: %d", b"Content-Length: %d, %d", b"Content-Length: +%d", b"Content-Length: 7",
    b"Content-Length: ", b"Content-Length : %d", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding: gzip",
    b"Transfer-Encoding:", b"Transfer-Encoding: x", b"Content-Encoding: gzip", b"Content-Encoding: br",
    b"Content-Encoding: identity", b"Connection: close", b"Connection: keep-alive", b"Location: /ok",
    b"Location: /ok?\xe9\xc3\xa9", b"Retry-After: 0", b"no colon", b" folded", b"\tContent-Length: 9",
    b": nameless", b"X: \r", b"X: a\rb", b"X: \0", b"X: \x01\xff", b"", b"Set-Cookie: a=b",
    b"X-Robots-Tag: noindex",
]  # fmt: skip
STATUS_LINES = [
    *[b"HTTP/1.1 200 OK"] * 8, b"HTTP/1.0 200 OK", b"HTTP/1.1 302 Found", b"HTTP/1.1 404 Not Found", b"HTTP/1.1 429 x",
    b"HTTP/1.1 503", b"HTTP/1.1 204 x", b"HTTP/1.1 304 x", b"HTTP/1.1 999 x", b"HTTP/1.1 103 x", b"HTTP/1.1 101 x",
    b"HTTP/2 200", b"http/1.1  200", b"HTTP/1.1 20", b"ICY 200 OK", b"\r\nHTTP/1.1 200 OK",
]  # fmt: skip


def any_answer(rng: random.Random) -> RawAnswer:
    """A head and a body as servers could mean them, with some of what goes wrong."""
    page = PAGE * rng.choice([0, 1, 1, 3, 1000])
    end = rng.choice([b"\r\n", b"\r\n", b"\r\n", b"\n"])
    body = gzip.compress(page) if rng.random() < 0.3 else page
    if rng.random() < 0.4:
        size = rng.choice([len(body) or 1, 7, 1000])
        parts = [body[n : n + size] for n in range(0, len(body), size)][:50]
        body = b"".join(b"%x%b\r\n%b%b" % (len(one), rng.choice([b"", b"", b";a", b" "]), one, end) for one in parts)
        body += rng.choice([b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\n", b"0", b""])
    lines = [line.replace(b"%d", b"%d" % len(body)) for line in rng.choices(LINES, k=rng.randrange(6))]
    if rng.random() < 0.5:
        lines.append(b"Content-Length: %d" % len(body))
    data = end.join([rng.choice(STATUS_LINES), *lines, b"", body])
    if rng.random() < 0.3:
        data = rng.choice([data[: rng.randrange(len(data) + 1)], data + b"more", data.replace(b"\r\n", b"\n")])
    if rng.random() < 0.2:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice([b"\r", b"\n", b" ", b"0", b"\xff"]) + data[at + rng.randrange(2) :]
    cuts = [0, *sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3]))), len(data)]
    pieces: RawAnswer = [data[a:b] for a, b in itertools.pairwise(cuts)]
    answer = Answer()
    answer.feed(data)
    return [*pieces, None] if answer.over and rng.random() < 0.7 else pieces


@pytest.mark.parametrize("seed", range(3))
def test_both_drivers_have_the_same_rows_whatever_comes(seed: int, count: int = 100) -> None:
    rng = random.Random(seed)
    answers = {f"/{n}": [any_answer(rng)] for n in range(count)}
    one, other = (compared(driver, answers) for driver in DRIVERS)
    different = {path: (one[path], other[path], answers[path]) for path in answers if one[path] != other[path]}
    assert different == {}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("end", [b"", b"HTTP/1.1 200", HEAD, b"more of before"])
def test_where_a_kept_connection_brings_no_answer_another_one_is_asked(driver: str, end: bytes) -> None:
    answers: dict[str, list[RawAnswer]] = {"/1": [[RAW_OK, None]], "/2": [[end], [RAW_OK]], "/3": [[b""]]}
    with RawWeb(answers) as web:
        rows = scrape(driver, [web.url(path) for path in answers], retries=0, concurrency=1)
        asked = [path for path, _ in web.asked]
    assert [kind(row) for row in rows] == ["ok", "ok", "reset"]
    assert [row.attempts for row in rows] == [1, 1, 1]
    assert asked == ["/1", "/2", "/2", "/3"], "a new connection that is closed is one failure"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("apart", [False, True])
def test_what_comes_behind_an_answer_is_no_answer_to_the_next_request(driver: str, apart: bool) -> None:
    late = raw_answer(b"<title>late</title>", "408 Request Timeout")
    pieces: RawAnswer = [RAW_OK, late, None] if apart else [RAW_OK + late, None]
    with RawWeb({"/1": [pieces], "/2": [[RAW_OK]]}) as web:
        rows = scrape(driver, [web.url("/1"), web.url("/2")], retries=0, concurrency=1, rate=20.0)
    assert [(row.status, row.title) for row in rows] == [(200, "ok")] * 2


def test_what_comes_before_the_loop_looks_is_no_answer_to_the_next_request() -> None:
    async def ask() -> tuple[bool, bool]:
        ours, theirs = socket.socketpair()
        _, reading = await asyncio.get_running_loop().create_connection(
            lambda: Reading(loop=asyncio.get_running_loop()), sock=ours
        )
        with theirs, contextlib.closing(reading):
            reading.set_response_params()
            theirs.sendall(RAW_OK)
            await reading.read()
            before = reading.is_idle()
            theirs.sendall(RAW_OK)
            return before, reading.is_idle()

    assert asyncio.run(ask()) == (True, False)


@pytest.mark.parametrize("lost", [False, True])
def test_many_chunks_do_not_hold_the_loop(lost: bool) -> None:
    async def read_body() -> tuple[bytes, int]:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, reading = await loop.create_connection(lambda: Reading(loop=loop), sock=ours)
        with theirs, contextlib.closing(reading):
            reading.set_response_params()
            reading.data_received(chunks(b"1\r\na\r\n" * 20_000, LAST))
            body = cast(Body, (await reading.read())[1])
            pieces = [await body.readany()]
            if lost:
                reading.connection_lost(None)
            while not body.at_eof():
                pieces.append(await body.readany())
            assert body.answer.fault is None
            return b"".join(pieces), len(pieces)

    body, count = asyncio.run(read_body())
    assert body == b"a" * 20_000
    assert count == 2 if lost else count > 60_000 // STEPS // 3
