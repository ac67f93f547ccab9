"""Both HTTP clients: bytes on the wire, as a test gives them."""

from __future__ import annotations

import itertools
import json
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import brotli
import pytest

from crawl.model import ScrapeResult
from runtime.options import EXIT_INTERRUPTED
from sandbox.sites import Sandbox
from tests.helpers.base import HANG_LIMIT, PROGRAM_LIMIT, wait_until
from tests.helpers.crawl import (
    DRIVERS,
    RAW_OK,
    RawAnswer,
    RawWeb,
    kind,
    pack,
    raw_answer,
    run_program,
    scrape,
    start,
)


def raw_page(size: int) -> bytes:
    """HTML that packs well, in lines that all differ, so that one left out or doubled shows."""
    lines = (f'<p>{n:,} <a href="/{n % 50}">one of many</a> {"word " * 40}</p>\n' for n in range(size // 200))
    return ("<title>A long page</title>\n" + "".join(lines)).encode()[:size]


def raw_codings(page: bytes) -> dict[str, tuple[str, bytes]]:
    """{name: (Content-Encoding, body)}, in all shapes that we say we accept."""
    third, fortieth = len(page) // 3 + 1, len(page) // 40 + 1
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    frames = [pack("zstd", page[n : n + fortieth]) for n in range(0, len(page), fortieth)]
    assert len(frames) == 40
    return {
        "br": ("br", pack("br", page)),
        "zstd": ("zstd", pack("zstd", page)),
        "zstd of 40 frames": ("zstd", b"".join(frames)),
        "zstd with skippable frames": (
            "zstd",
            skippable + frames[0] + skippable * 2 + b"".join(frames[1:]) + skippable,
        ),
        "gzip": ("gzip", pack("gzip", page)),
        "gzip of 3 members": ("gzip", b"".join(pack("gzip", page[n : n + third]) for n in range(0, len(page), third))),
        "deflate": ("deflate", pack("deflate", page)),
        "raw deflate": ("deflate", pack("raw deflate", page)),
        "gzip of br": ("br, gzip", pack("gzip", pack("br", page))),
    }


def raw_found(row: ScrapeResult) -> tuple[Any, ...]:
    return row.status, row.error, row.bytes, row.title, row.word_count, row.links_found


@pytest.mark.parametrize("driver", DRIVERS)
def test_long_pages_come_over_a_connection_that_is_kept(driver: str) -> None:
    long = raw_answer(raw_page(3_000_000), "200 OK", "Content-Type: text/html")
    with RawWeb({"/1": [[RAW_OK, None]], **{f"/{n}": [[long, None]] for n in (2, 3, 4)}}) as web:
        argv = [*(web.url(f"/{n}") for n in range(1, 5)), "-q", "--rate", "0", "--concurrency", "1", "--timeout", "60"]
        code, out, err = run_program(driver, *argv)  # on uvloop, which reads more at a time
    found = [(row["error"], row["bytes"]) for row in map(json.loads, out.splitlines())]
    assert (code, err, found) == (0, "", [(None, len(RAW_OK.partition(b"\r\n\r\n")[2])), *[(None, 3_000_000)] * 3])


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("size", [600_000, 1_500_000])
def test_a_page_in_any_coding_is_the_page(driver: str, size: int) -> None:
    """It is as large as it may be."""
    page = raw_page(size)
    head = "Content-Type: text/html"
    answers: dict[str, list[RawAnswer]] = {"/plain": [[raw_answer(page, "200 OK", head)]]}
    for name, (coding, body) in raw_codings(page).items():
        for step in (len(body), 65_536, 7, 1):
            whole = raw_answer(body, "200 OK", head, f"Content-Encoding: {coding}")
            start = len(whole) - len(body)
            pieces = [whole[n : n + step] for n in range(start, len(whole), step)]
            answers[f"/{name.replace(' ', '-')}/{step}"] = [[whole[:start], *pieces]]
    with RawWeb(answers) as web:
        paths = {web.url(path): path for path in answers}
        found = scrape(driver, paths, timeout=5 * HANG_LIMIT, concurrency=8, max_bytes=size)
    rows = {paths[row.url]: raw_found(row) for row in found}
    assert rows["/plain"][:3] == (200, None, size)
    assert {path: row for path, row in rows.items() if row != rows["/plain"]} == {}
    assert len(rows) == len(answers)


BAD_BODIES: dict[str, RawAnswer] = {
    "mislabelled": [b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nplain", None],
    "unknown coding": [b"Content-Encoding: unheard-of\r\nContent-Length: 5\r\n\r\nplain", None],
    "ends early": [b"Content-Encoding: br\r\nContent-Length: 5\r\n\r\n" + brotli.compress(bytes(99))[:5], None],
    "cut off": [b"Content-Length: 50\r\n\r\nshort"],
    "too large": [b"Content-Length: 99999999\r\n\r\nmore to come", None],
    "never complete": [b"Content-Length: 50\r\n\r\nshort", None],
    "no chunk": [b"Transfer-Encoding: chunked\r\n\r\nzz\r\nplain", None],
    "two lengths": [b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nplain", None],
    "chunks without end": [b"Transfer-Encoding: chunked\r\n\r\n5\r\nplain\r\n", None],
}


def bad_answer(body: str, status: str, *lines: str) -> RawAnswer:
    first, *rest = BAD_BODIES[body]
    assert first is not None
    return ["\r\n".join([f"HTTP/1.1 {status}", "Content-Type: text/html", *lines, ""]).encode() + first, *rest]


Answered = tuple[list[ScrapeResult], list[float], int]
"""(Rows, when the one that limits its rate was asked, how often the missing one was)"""


def answers_of_all_statuses(driver: str, body: str) -> Answered:
    limited = [bad_answer(body, f"{status} x", "Retry-After: 1") for status in (429, 503)]
    answers: dict[str, list[RawAnswer]] = {
        "/ok": [[RAW_OK]],
        "/302": [bad_answer(body, "302 Found", "Location: /ok")],
        "/308": [bad_answer(body, "308 Permanent Redirect", "Location: /302")],
        "/404": [bad_answer(body, "404 Not Found")],
        "/500": [bad_answer(body, "500 x"), bad_answer(body, "502 x"), [RAW_OK]],
        "/500/always": [bad_answer(body, "500 x")],
    }
    timeout = 4.0 if body in ("never complete", "chunks without end") else HANG_LIMIT
    with RawWeb(answers) as web, RawWeb({"/x": [*limited, [RAW_OK]]}) as limits:
        urls = [web.url(path) for path in answers] + [limits.url("/x")]
        return scrape(driver, urls, timeout=timeout), limits.times("/x"), len(web.times("/404"))


@pytest.fixture(scope="module")
def answered() -> dict[tuple[str, str], Future[Answered]]:
    """All of them at once: each waits two seconds, as it is told to."""
    with ThreadPoolExecutor(len(DRIVERS) * len(BAD_BODIES)) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr("crawl.core.BODY_PATIENCE", 0.1)
        return {
            (driver, body): pool.submit(answers_of_all_statuses, driver, body)
            for driver in DRIVERS
            for body in BAD_BODIES
        }


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("body", BAD_BODIES)
def test_status_and_headers_decide_whatever_the_body_is(
    driver: str, body: str, answered: dict[tuple[str, str], Future[Answered]]
) -> None:
    found, times, missing = answered[driver, body].result()
    rows = {urlsplit(row.url).path: row for row in found}
    assert missing == 1
    assert {path: (row.status, row.error, row.attempts, row.redirects) for path, row in rows.items()} == {
        "/ok": (200, None, 1, 0),
        "/302": (200, None, 1, 1),
        "/308": (200, None, 1, 2),
        "/404": (404, "http: 404 Not Found", 1, 0),
        "/500": (200, None, 3, 0),
        "/500/always": (500, "http: 500 Internal Server Error", 3, 0),
        "/x": (200, None, 3, 0),
    }
    assert [later - earlier >= 1.0 for earlier, later in itertools.pairwise(times)] == [True, True]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("body", BAD_BODIES)
@pytest.mark.parametrize(
    ("status", "allowed"), [("403 Forbidden", True), ("404 Not Found", True), ("301 Moved", False)]
)
def test_status_and_headers_of_robots_txt_decide_whatever_its_body_is(
    driver: str, body: str, status: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crawl.core.BODY_PATIENCE", 0.05)
    rules = raw_answer(b"User-agent: *\nDisallow: /secret\n")
    answers: dict[str, list[RawAnswer]] = {
        "/robots.txt": [bad_answer(body, status, "Location: /rules")],
        "/rules": [[rules]],
        "/secret": [[RAW_OK]],
        "/open": [[RAW_OK]],
    }
    with RawWeb(answers) as web:
        rows = scrape(driver, [web.url("/secret"), web.url("/open")], robots=True)
    found = {urlsplit(row.url).path: row.error for row in rows}
    assert found == {"/secret": None if allowed else "robots: forbidden by robots.txt", "/open": None}


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_page_that_is_not_asked_to_be_understood_tells_its_fault(driver: str) -> None:
    kinds = {
        "mislabelled": "decode", "unknown coding": "decode", "ends early": "decode", "cut off": "truncated",
        "too large": "too_large", "never complete": "timeout", "no chunk": "protocol", "two lengths": "protocol",
        "chunks without end": "timeout",
    }  # fmt: skip
    rows: list[ScrapeResult] = []
    with RawWeb({f"/{name.replace(' ', '-')}": [bad_answer(name, "200 OK")] for name in BAD_BODIES}) as web:
        for timeout in (2.0, HANG_LIMIT):
            names = [name for name, what in kinds.items() if (what == "timeout") == (timeout == 2.0)]
            rows += scrape(
                driver, [web.url(f"/{name.replace(' ', '-')}") for name in names], timeout=timeout, retries=0
            )
    assert {urlsplit(row.url).path: (row.status, kind(row)) for row in rows} == {
        f"/{name.replace(' ', '-')}": (200, what) for name, what in kinds.items()
    }


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_head_counts_however_it_comes(driver: str) -> None:
    """In pieces, after interim heads, and together with a body that is none."""
    head = b"HTTP/1.1 302 Found\r\nLocation: /ok\r\nTransfer-Encoding: chunked\r\n\r\n"
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    whole = head + b"zz\r\nplain"
    answers: dict[str, list[RawAnswer]] = {
        f"/cut/{at}": [[whole[: len(head) + at], whole[len(head) + at :], None]] for at in range(-5, 3)
    }
    answers["/one"] = [[whole, None]]
    answers["/interim"] = [[interim + whole, None]]
    answers["/interim/2"] = [[interim + interim[:9], interim[9:] + whole, None]]
    answers["/bytes"] = [[*(bytes([byte]) for byte in head), b"zz\r\nplain", None]]
    with RawWeb({**answers, "/ok": [[RAW_OK]]}) as web:
        rows = scrape(driver, [web.url(path) for path in answers], retries=0)
    assert {urlsplit(row.url).path: row.error for row in rows} == dict.fromkeys(answers)
    assert {row.title for row in rows} == {"ok"}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("coding", ["zstd", "gzip"])
def test_a_body_of_empty_frames_is_refused_and_one_of_nothing_is_read(driver: str, coding: str) -> None:
    frames = pack(coding, b"") * 100_000
    for _ in range(2):
        frames = pack(coding, frames)
    html, codings = "Content-Type: text/html", ", ".join([coding] * 3)
    answers: dict[str, list[RawAnswer]] = {
        "/frames": [[raw_answer(frames, "200 OK", html, f"Content-Encoding: {codings}")]],
        "/many": [[raw_answer(b"".join(pack(coding, b"<p>a</p>") for _ in range(5000)), "200 OK", html,
                              f"Content-Encoding: {coding}")]],
        "/empty": [[raw_answer(b"", "200 OK", html, "Content-Encoding: unheard-of")]],
    }  # fmt: skip
    with RawWeb(answers) as web:
        rows = {urlsplit(row.url).path: row for row in scrape(driver, [web.url(path) for path in answers])}
    assert {path: (kind(row), row.word_count) for path, row in rows.items()} == {
        "/frames": ("decode", 0), "/many": ("ok", 5000), "/empty": ("ok", 0),
    }  # fmt: skip


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_counts_of_a_run_can_go_into_a_pipe(driver: str, web: Sandbox, tmp_path: Path) -> None:
    pipe = tmp_path / "stats"
    os.mkfifo(pipe)
    with start(driver, web.url("/"), "-q", "--stats", str(pipe)) as child:
        with open(pipe, encoding="utf-8") as reader:
            counts = json.loads(reader.read())
        child.communicate(timeout=PROGRAM_LIMIT)
    assert (child.returncode, counts["rows"]) == (0, 1)


@pytest.mark.parametrize("driver", DRIVERS)
def test_header_bytes_outside_ascii_mean_the_same_to_both(driver: str) -> None:
    def moved(location: bytes) -> RawAnswer:
        return [raw_answer(b"", "302 Found", b"Location: " + location)]

    answers: dict[str, list[RawAnswer]] = {
        "/latin": [moved(b"/caf\xe9?\xe8=%41")],
        "/caf%E9?%E8=%41": [[RAW_OK]],
        "/utf8": [moved("/café".encode())],
        "/caf%C3%A9": [[RAW_OK]],
        "/mixed": [moved(b"/\xc3\xa9\xff")],
        "/%C3%A9%FF": [[RAW_OK]],
        "/type": [[raw_answer(b"<title>t\xe9</title>", "200 OK", b"Content-Type: text/html; x=\xe9")]],
        "/type8": [[raw_answer(b"<title>t</title>", "200 OK", "Content-Type: text/html; x=é")]],
    }
    with RawWeb(answers) as web:
        urls = [web.url(path) for path in ("/latin", "/utf8", "/mixed", "/type", "/type8")]
        rows = {urlsplit(row.url).path: row for row in scrape(driver, urls)}
        ended = {path: str(row.final_url).removeprefix(web.url("")) for path, row in rows.items()}
    assert [row.error for row in rows.values()] == [None] * 5
    assert ended == {
        "/latin": "/caf%E9?%E8=%41", "/utf8": "/caf%C3%A9", "/mixed": "/%C3%A9%FF",
        "/type": "/type", "/type8": "/type8",
    }  # fmt: skip
    assert rows["/type"].content_type == rows["/type8"].content_type == "text/html; x=é"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_sitemap_may_be_larger_than_a_page(driver: str, tmp_path: Path) -> None:
    with RawWeb({}) as web:
        filler = f"<!-- {'x' * 300_000} -->"
        entries = "".join(f"<url><loc>{web.url(f'/{n}')}</loc></url>{filler}" for n in range(20))
        xml = f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{entries}</urlset>'
        robots = f"Sitemap: {web.url('/map.xml')}\nSitemap: {web.url('/torn.xml')}\nSitemap: {web.url('/none.xml')}\n"
        web.answers = {
            "/robots.txt": [[raw_answer(robots.encode())]],
            "/map.xml": [[raw_answer(xml.encode(), "200 OK", "Content-Type: application/xml")]],
            "/torn.xml": [[raw_answer(f"<urlset><url><loc>{web.url('/torn')}</loc></url><url>".encode())]],
            **{f"/{page}": [[RAW_OK]] for page in (*range(20), "torn", "")},
        }
        code, out, err = run_program(driver, web.url("/"), "--sitemaps", "--rate", "0", "--max-bytes", "10k")
    assert len(xml) > 6_000_000
    rows = [json.loads(line) for line in out.splitlines()]
    pages = {web.url(f"/{page}") for page in (*range(20), "torn", "")}
    assert (code, {row["url"] for row in rows}, {row["error"] for row in rows}) == (0, pages, {None})
    assert "2 of 3 sitemaps" in err.splitlines()[-1]


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_sitemap_is_read_up_to_its_own_limit(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("crawl.core", "crawl.sitemaps"):
        monkeypatch.setattr(f"{module}.MAX_SITEMAP", 60)
    with RawWeb({}) as web:
        web.answers = {
            "/robots.txt": [[raw_answer(f"Sitemap: {web.url('/map.txt')}\n".encode())]],
            "/map.txt": [
                [raw_answer("".join(f"{web.url(f'/{n}')}\n" for n in range(1, 9999)).encode(), length=10**9), None]
            ],
            **{f"/{page}": [[RAW_OK]] for page in ("1", "2", "3", "")},
        }
        rows = scrape(driver, [web.url("/")], sitemaps=True)
    assert {row.url for row in rows} == {web.url("/"), web.url("/1"), web.url("/2")}, "half a line is no address"


@pytest.mark.parametrize("driver", DRIVERS)
def test_ctrl_c_during_a_body_tells_its_status(driver: str) -> None:
    megabyte = b"<p>" * (1 << 18)  # far more of them than the system keeps for a reader
    answer: RawAnswer = [raw_answer(length=1 << 30), *[megabyte] * 40, None]
    options = ("--grace", "0", "--timeout", "90", "--max-bytes", "2G", "-q")
    with RawWeb({"/x": [answer]}) as web, start(driver, web.url("/x"), *options) as child:
        wait_until(lambda: bool(web.sent))
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=PROGRAM_LIMIT)
    row = json.loads(out)
    assert (child.returncode, err, kind(row), row["status"]) == (EXIT_INTERRUPTED, b"", "interrupted", 200)
