"""Feeds through both drivers."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crawl import readers as crawl_readers
from crawl.model import FeedResult
from tests.absent import needs
from tests.helpers.base import HERE, wait_until
from tests.helpers.crawl import FEEDS_DRIVERS, Answer, Site, feeds_article, feeds_rows, feeds_rss, feeds_run

pytestmark = [needs("feedparser", "trafilatura", "lxml_html_clean"), pytest.mark.usefixtures("lent_template")]


@pytest.mark.parametrize("driver", FEEDS_DRIVERS)
def test_end_to_end(driver: str, feeds_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, url = feeds_site, feeds_site.url
    parsed_in: set[tuple[str, str]] = set()
    read = crawl_readers.Readers.read

    def watched(readers: crawl_readers.Readers, function: Callable[..., Any], *args: Any) -> Any:
        parsed_in.add((threading.current_thread().name.partition("_")[0], function.__name__))
        return read(readers, function, *args)

    monkeypatch.setattr(crawl_readers.Readers, "read", watched)
    dated = "<dc:creator>Ann</dc:creator><pubDate>Mon, 06 May 2024 10:00:00 +0200</pubDate>"
    atom = (
        "<feed xmlns='http://www.w3.org/2005/Atom'>"
        f"<entry><link href='{url('/both')}'/></entry><entry><link href='{url('/rss')}'/></entry>"
        "<entry><link href='/plain?utm_source=x'/></entry><entry><link href='/cyrillic'/></entry>"
        "<entry><link href='/moved'/></entry></feed>"
    )
    page_says = "<meta name='author' content='Bob Smith'><meta property='article:published_time' content='2024-02-03'>"
    site.routes = {
        "/rss": Answer(feeds_rss(url("/both"), "/gone", more=dated), "text/html"),
        "/atom": Answer(atom, "application/atom+xml"),
        "/old": Answer(status="301", Location="/new"),
        "/new": Answer(feeds_rss("/far"), "application/rss+xml", ETag='"n"'),
        "/empty": Answer("<?xml version='1.0'?><rss version='2.0'><channel></channel></rss>", "text/xml"),
        "/page": Answer("<link rel=alternate type='application/rss+xml' href='/rss'><a href=/x>x</a>"),
        "/unasked": Answer(status="304"),
        "/both": Answer(feeds_article("both", page_says)),
        "/plain": Answer(feeds_article("plain", page_says)),
        "/far": Answer(feeds_article("far")),
        "/moved": Answer(status="302", Location="/both"),
        "/cyrillic": Answer(feeds_article("Привет").encode("cp1251"), "text/html; charset=windows-1251"),
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
    where = "worker" if driver == "crawl_threads" else "parser"
    assert parsed_in == {(where, "parse_feed"), (where, "read_article")}


@pytest.mark.parametrize("driver", FEEDS_DRIVERS)
def test_of_later_runs(driver: str, feeds_site: Site, tmp_path: Path) -> None:
    site, url = feeds_site, feeds_site.url
    date = "Mon, 06 May 2024 10:00:00 GMT"
    site.routes = {
        "/etag": Answer(feeds_rss("/1"), "text/xml", ETag='W/"1"'),
        "/date": Answer(feeds_rss("/2"), "text/xml", Last_Modified=date),
        "/bare": Answer(feeds_rss("/3"), "text/xml"),
        "/odd": Answer(feeds_rss("/4"), "text/xml", ETag='"Zoë"'),
        "/old": Answer(status="301", Location="/new", ETag='"not the feed\'s"'),
        "/new": Answer(feeds_rss("/5"), "text/xml", ETag='"5"'),
        **{f"/{n}": Answer(feeds_article(str(n))) for n in range(1, 8)},
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
    site.routes["/etag"] = Answer(feeds_rss("/6", "/1"), "text/xml", ETag='W/"2"')
    site.routes["/bare"] = Answer(feeds_rss("/7", "/3"), "text/xml")
    assert again("--max-pages", "2") == (
        3,
        quiet | {"/etag": 200, "/6": 200, "/7": 200},
        ["/6", "/7", "/bare", "/etag"],
    )
    feed, site.routes["/etag"] = site.routes["/etag"], Answer("down", status="500")
    assert again() == (4, quiet | {"/etag": 500}, ["/etag"])
    site.routes["/etag"] = feed
    assert again() == (5, quiet, [])


@pytest.mark.parametrize("driver", FEEDS_DRIVERS)
def test_resumed_after_a_kill(driver: str, feeds_site: Site, tmp_path: Path) -> None:
    """Killed with one article written, one in flight and one waiting: the feed says 304, and yet none is lost."""
    site, url = feeds_site, feeds_site.url
    gate = threading.Event()
    site.routes = {"/feed": Answer(feeds_rss("/1", "/2", "/3"), "text/xml", ETag='"1"')}
    site.routes |= {f"/{n}": Answer(feeds_article(str(n))) for n in (1, 2, 3)}
    site.routes["/2"].gate = gate
    urls, rows = tmp_path / "feeds.txt", tmp_path / "news.jsonl"
    urls.write_text(url("/feed") + "\n")
    name, *more = driver.split()
    words = [sys.executable, str(HERE / f"{name}.py"), str(urls), "--feeds", "-q", "-o", str(rows), "--rate", "0"]
    words += ["--per-host", "1", *more]
    with subprocess.Popen(words, env=os.environ | {"NO_PROXY": "*"}) as process:
        try:
            wait_until(lambda: bool(site.paths()["/2"]) and rows.read_bytes().count(b"\n") == 2)
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


def test_as_a_table_and_as_an_array(feeds_site: Site, tmp_path: Path) -> None:
    site, url = feeds_site, feeds_site.url
    site.routes = {"/feed": Answer(feeds_rss("/1"), "text/xml", ETag='"1"'), "/1": Answer(feeds_article("1"))}
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
