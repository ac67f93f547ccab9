"""crawl/readers.py: the rules of feeds, and readers that are killed."""

from __future__ import annotations

import contextlib
import json
import operator
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from crawl import articles
from crawl import journal as crawl_journal
from crawl import readers as crawl_readers
from crawl.articles import read_article
from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.feeds import FeedEntry, bounds
from crawl.model import FeedResult, Options, Request, Response, ScrapeResult
from crawl.output import encode_json
from crawl.rows import build_article, validator
from crawl.urls import normalise
from runtime.options import EXIT_INTERRUPTED
from tests.absent import needs
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, wait_until
from tests.helpers.crawl import (
    FEEDS_DRIVERS,
    Answer,
    Site,
    feeds_article,
    feeds_rows,
    feeds_rss,
    feeds_run,
    take,
)
from tests.helpers.processes import proc_children, proc_gone, proc_open, proc_ticks

pytestmark = needs("feedparser", "trafilatura", "lxml_html_clean")


def answer(crawl: Crawl, url: str, body: str, **headers: str) -> ScrapeResult | None:
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
def test_since(since: str | None, left: str) -> None:
    crawl = Crawl(Options(feeds=True, since=since))
    dates = ("Sun, 05 May 2024 23:59:59 GMT", "2024-05-06T12:00:00+02:00", "2024-05-07T04:59:00Z", None)
    row = answer(crawl, "http://a.example/feed", feeds_entries(*dates))
    assert row and [link[-1] for link in row.links_found] == list(left)


def test_options() -> None:
    for wrong in ({"since": "2024-05-06"}, {"feeds": True, "since": "May"}, {"feeds": True, "depth": 1}):
        with pytest.raises(ValueError, match=r"since|depth"):
            Options(**cast(Any, wrong))


def test_of_one_host_share_its_rate() -> None:
    """The feed, its articles there and a retry: one request in two seconds; on another host at once."""
    now = 100.0
    crawl = Crawl(Options(feeds=True, rate=0.5), clock=lambda: now, rng=lambda: 0.0)
    crawl.frontier.add_all(["http://a.example/feed"], now, kind="feed")
    sent: list[tuple[float, str]] = []
    body = feeds_rss("/1", "/2", "http://b.example/3").encode()
    while True:
        decision = take(crawl.frontier, now)
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


def test_what_a_cap_left_out_is_asked_for_again() -> None:
    crawl = Crawl(Options(feeds=True, max_pages=1))
    first, second = (
        answer(crawl, f"http://a.example/{name}", feeds_rss(*links), ETag='"1"')
        for name, links in (("f", ("/1", "/2")), ("g", ("/1",)))
    )
    assert isinstance(first, FeedResult) and isinstance(second, FeedResult)
    assert (first.links_found, first.etag) == (["http://a.example/1"], None)  # a 304 would hide the other for ever
    assert (second.links_found, second.etag) == ([], '"1"')


def test_that_were_articles_are_polled() -> None:
    """An article of another feed, now or in an earlier run: the list names it, so it is a feed."""
    crawl = Crawl(Options(feeds=True, rate=0))
    crawl.frontier.mark("http://b.example/feed")
    answer(crawl, "http://a.example/feed", feeds_rss("http://c.example/feed"))
    crawl.feed(["http://a.example/feed", "http://b.example/feed", "http://c.example/feed"]).join()
    taken = [take(crawl.frontier, 1e9) for _ in range(4)]
    assert sorted((one.target[7], one.kind) for one in taken if isinstance(one, Request)) == [
        ("a", "feed"),
        ("b", "feed"),
        ("c", "feed"),
        ("c", "page"),
    ]
    row = answer(crawl, "http://a.example/feed", feeds_rss("http://b.example/feed"))
    assert row and row.links_found == []


def feeds_journal(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The journal with these rows, once it was opened."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with crawl_journal.open_journal(str(path)) as file:
        return list(crawl_journal.rows(file))


def test_journal_grows_with_the_articles_only(tmp_path: Path) -> None:
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
    assert crawl.frontier.waiting == 4 and set(crawl.feeds.validators) == {f"http://a.example/{n}" for n in (1, 3, 4)}


def test_validators_of_a_strange_journal_are_not_sent() -> None:
    assert [validator(text) for text in ('"a"', "", None, 5, '"é"', "a\nb", '"\ud800"')] == [
        '"a"',
        "",
        *[None] * 5,
    ]


HOSTILE: dict[str, Callable[[], str]] = {
    "attributes": lambda: "<p " + " ".join(f"a{n}=x" for n in range(50_000)) + ">The text of it all",
    "tables": lambda: "<table><tr><td>x y z</table>" * 3_000,
    "long": lambda: feeds_article("a long page") + "<script>x</script>" * 300_000,
    "deep": lambda: "<div>" * 5_000 + "The text of it all",
    "elements": lambda: "<h1>x</h1>" * 40_000,
    "controls": lambda: "\0\1\x0b<p>The text\0 of it all</p>\ud800\ufffe",
    "nothing": lambda: "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_article_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes trafilatura minutes by itself (attributes, tables), or is too much, is not handed to it."""
    handed: list[tuple[str, bool]] = []
    extract = articles.extractor()

    def watched(html: str, *, include_tables: bool, **more: Any) -> Any:
        handed.append((html, include_tables))
        return extract(html, include_tables=include_tables, **more)

    monkeypatch.setattr(articles, "extractor", lambda: watched)
    text, author, published = read_article(HOSTILE[name]().encode("utf-8", "replace"), "http://a.example/")
    [(html, with_tables)] = handed
    assert len(html) <= articles.MAX_ARTICLE and html.count("<") <= articles.MAX_TAGS == 50_000
    assert max(map(len, html.split("<")), default=0) < 10_000
    assert with_tables == (name != "tables") and not set(html) & set("\0\1\x0b\ufffe")
    assert (text or "").startswith("This is the story" if name == "long" else "") and not author
    assert published is None


def test_article_says_nothing_that_the_page_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page = "<html><body><article><p>In 1995, on 12/05/2001, there was much to tell, and more.</p></article>"
    assert read_article(page.encode(), "http://a.example/x").published is None

    def trips(*_: Any, **__: Any) -> None:
        raise RecursionError

    monkeypatch.setattr(articles, "extractor", lambda: trips)
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
def test_article_says_when(markup: str, published: str | None) -> None:
    assert read_article(markup.encode(), "http://a.example/x").published == published


def test_of_a_failed_article_keep_what_the_feed_says() -> None:
    entry = FeedEntry("http://a.example/1", "Title", "Ann", "2024-05-06T00:00:00Z", None)
    request = Request(entry.url, entry.url, "a.example")
    row = build_article(request, FetchError("timeout", "x"), "http://a.example/f", entry)
    assert (row.error, row.title, row.author, row.published) == ("timeout: x", "Title", "Ann", entry.published)
    assert row.kind == "article" and row.feed == "http://a.example/f" and row.text is None


def test_a_fault_is_in_the_row_and_its_articles_are_followed(tmp_path: Path) -> None:
    """Torn: its articles are, the row says that there may be more, and nothing that a 304 could answer is kept."""
    body, url = feeds_rss("http://a.example/1", "http://a.example/2"), "http://a.example/feed"
    crawl = Crawl(Options(feeds=True))
    row = answer(crawl, url, body[: -len("</channel></rss>")], ETag='"1"')
    assert isinstance(row, FeedResult) and row.error == "decode: it ends too soon"
    assert row.links_found == ["http://a.example/1", "http://a.example/2"] == [entry["url"] for entry in row.entries]
    assert (row.etag, row.last_modified, row.status) == (None, None, 200)
    again = Crawl(Options(feeds=True))
    (tmp_path / "news.jsonl").write_bytes(encode_json(row) + b"\n")
    with crawl_journal.open_journal(str(tmp_path / "news.jsonl")) as file:
        assert crawl_journal.recall(again, file) == 1
    assert again.frontier.waiting == 2 and again.feeds.validators == {}
    row = answer(again, url, body[: -len("</channel></rss>")], ETag='"1"')  # the same fault: a row each time
    assert isinstance(row, FeedResult) and (row.error, row.entries) == ("decode: it ends too soon", [])
    row = answer(again, url, body, ETag='"1"')
    assert isinstance(row, FeedResult) and (row.error, row.etag) == (None, '"1"')


def test_what_was_not_read_says_so_and_keeps_the_rest() -> None:
    def read(function: Callable[..., Any], body: bytes, *more: Any) -> Any:
        if b"hostile" in body:
            raise FetchError("decode", "reading it takes more than 1 s")
        return function(body, *more)

    crawl = Crawl(Options(feeds=True))
    crawl.read = read
    row = answer(crawl, "http://a.example/feed", feeds_rss("/hostile"), ETag='"1"')
    assert isinstance(row, FeedResult) and row.error == "decode: reading it takes more than 1 s"
    assert (row.status, row.kind, row.etag, row.entries) == (200, "feed", None, [])
    answer(crawl, "http://a.example/feed", feeds_rss("/1"))
    request = Request("http://a.example/1", *normalise("http://a.example/1"))
    page = Response(200, {"Content-Type": "text/html"}, b"<title>hostile</title>")
    assert crawl.judge(request, page) is page
    article = crawl.complete(request, page)
    assert isinstance(article, FeedResult) and article.error == row.error
    assert (article.title, article.feed, article.text) == ("On /1", "http://a.example/feed", None)
    assert (article.status, article.bytes, article.kind) == (200, len(page.body), "article")


@contextlib.contextmanager
def feeds_readers() -> Iterator[crawl_readers.Readers]:
    """Which must leave nothing behind: no process, no thread, no descriptor."""
    before, children, threads = proc_open(), proc_children(), set(threading.enumerate())
    readers = crawl_readers.Readers()
    try:
        yield readers
    finally:
        readers.close()
    assert readers.stats()[1:] == (0, 0)
    assert proc_children() - children == set()
    wait_until(lambda: not set(threading.enumerate()) - threads)
    assert proc_open() - before == set()


@pytest.mark.parametrize(
    ("job", "error"),
    [
        ((re.match, b"(a+)+$", b"a" * 64 + b"b"), "decode: reading it takes more than 0.3 s"),  # within C, with the GIL
        ((exec, b"while True: pass"), "decode: reading it takes more than 0.3 s"),
        ((operator.mul, b"x" * 1000, 10**9), "decode: reading it takes more than 34 MB"),
        ((exec, b"held = [bytes(1000)]\nwhile True: held += held"), "decode: reading it takes more than 34 MB"),
        ((exec, b"import os; os._exit(3)"), "decode: its reader died: exit code 3"),
        ((exec, b"import os; os.kill(os.getpid(), 11)"), "decode: its reader died: signal 11"),
        ((exec, b"1/0"), "internal: ZeroDivisionError: division by zero"),
        ((exec, b"raise SystemExit(4)"), "internal: SystemExit: 4"),
    ],
    ids=["time in C", "time", "memory", "memory by and by", "exit", "crash", "exception", "SystemExit"],
)
def test_readers_a_document_costs_no_more_than_it_may_and_no_other_one(
    job: tuple[Any, ...], error: str, lent_template: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1.0 <= bounds(job[0], len(job[1]))[0] < 1.01  # which would take too long here
    monkeypatch.setattr(crawl_readers, "bounds", lambda *document: (0.3, bounds(*document)[1]))
    with feeds_readers() as readers:
        for _ in range(2):
            with pytest.raises(FetchError) as failed:
                readers.read(*job)
            assert str(failed.value) == error and not readers._killed
            assert readers.read(bytes.upper, b"x") == b"X"
        assert readers.stats().started == 1


def feeds_held(readers: crawl_readers.Readers, gate: Path, found: list[object]) -> threading.Thread:
    """A thread whose document is read as long as nobody opens the gate; then what came of it is in ``found``."""
    os.mkfifo(gate)

    def wait() -> None:
        try:
            found.append(readers.read(exec, f"open({str(gate)!r}, 'rb').read()".encode()))
        except FetchError as error:
            found.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_readers_nobody_waits_behind_a_slow_document_and_all_end_at_once(tmp_path: Path) -> None:
    with feeds_readers() as readers:
        found: list[object] = []
        threads = [feeds_held(readers, tmp_path / "0", found)]
        held = [os.open(tmp_path / "0", os.O_WRONLY)]  # opens when it is being read
        assert [readers.read(bytes.upper, b"%d" % n) for n in range(20)] == [b"%d" % n for n in range(20)]
        for n in range(1, readers.count):
            threads.append(feeds_held(readers, tmp_path / str(n), found))
            held.append(os.open(tmp_path / str(n), os.O_WRONLY))
        threads.append(threading.Thread(target=lambda: ask(readers, found)))  # waits for a reader
        threads[-1].start()
        wait_until(lambda: bool(readers._places.stats().waiting))
        readers.kill()
        for thread in threads:
            thread.join(HANG_LIMIT)
        assert found == ["interrupted: stopped before it was read"] * (readers.count + 1)
        with pytest.raises(FetchError, match="interrupted"):
            readers.read(bytes.upper, b"x")
        for one in held:
            os.close(one)


def ask(readers: crawl_readers.Readers, found: list[object]) -> None:
    try:
        found.append(readers.read(bytes.upper, b"x"))
    except FetchError as error:
        found.append(str(error))


def test_readers_one_that_died_idle_or_kept_much_costs_nothing() -> None:
    with feeds_readers() as readers:
        first = readers.read(eval, b"__import__('os').getpid()")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: proc_gone(first))
        pid = readers.read(eval, b"__import__('os').getpid()")
        assert pid != first
        keep = b"[__import__('sys').modules.setdefault('kept', bytearray(30 << 20)), __import__('os').getpid()][1]"
        assert readers.read(eval, keep) == pid
        last = readers.read(eval, b"__import__('os').getpid()")
        assert last != pid and readers.stats() == (readers.count, 1, 1)
        template = readers._template
        assert template is not None
        template.process.kill()
        wait_until(lambda: proc_gone(template.process.pid) and proc_gone(last))
        assert readers.read(bytes.upper, b"x") == b"X" and readers.stats().started == 1


READERS_ORPHANS = """
import os, re, threading, time
from crawl import readers as crawl_readers
print("once", flush=True)
crawl_readers.bounds = lambda *_: (1000.0, 1 << 28)
readers = crawl_readers.Readers()
me = b"__import__('builtins').print(__import__('os').getpid(), file=__import__('sys').stderr, flush=True)"
busy = lambda: readers.read(exec, me + b"; __import__('re').match('(a+)+$', 'a' * 64 + 'b')")
idle = lambda: readers.read(exec, me + b"; __import__('signal').pause()")
for job in (busy, idle):
    threading.Thread(target=job).start()
"""


def test_readers_end_with_their_program_which_they_do_not_import(tmp_path: Path) -> None:
    """A program without a guard by ``__name__``; one reader waits, the other never lets go of the GIL."""
    script = tmp_path / "orphans.py"
    script.write_text(READERS_ORPHANS)
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], env=environ, stdout=pipe, stderr=pipe) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pids = [int(parent.stderr.readline()) for _ in range(2)]
        try:
            wait_until(lambda: any(proc_ticks(pid) > 20 for pid in pids))  # the match is under way
            for pid in pids:
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGTERM)
            assert not any(map(proc_gone, pids))
            parent.kill()
            wait_until(lambda: all(map(proc_gone, pids)))
            assert parent.stdout.read() == b"once\n"
        finally:
            parent.kill()
            for pid in pids:
                if not proc_gone(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("driver", FEEDS_DRIVERS)
def test_a_hostile_article_costs_its_own_text(
    driver: str, feeds_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, url = feeds_site, feeds_site.url
    monkeypatch.setattr(crawl_readers, "bounds", lambda _, size: (0.05 if size > 100_000 else 100.0, 1 << 28))
    site.routes = {"/feed": Answer(feeds_rss("/1", "/hostile", "/2"), "text/xml")}
    site.routes |= {f"/{n}": Answer(feeds_article(str(n))) for n in (1, 2)}
    site.routes["/hostile"] = Answer("<title>Hostile</title>" + "<h1>x</h1>" * 20_000)
    children = proc_children()
    stats = feeds_run(driver, tmp_path, [url("/feed")])
    rows = {row["url"].removeprefix(url("")): row for row in feeds_rows(tmp_path)}
    assert (stats["rows"], stats["ok"], stats["errors"]) == (4, 3, {"decode": 1})
    assert all("a good many words" in rows[f"/{n}"]["text"] for n in (1, 2))
    hostile = rows["/hostile"]
    assert hostile["error"] == "decode: reading it takes more than 0.1 s" and hostile["text"] is None
    assert (hostile["status"], hostile["title"], hostile["feed"]) == (200, "On /hostile", url("/feed"))
    assert site.paths() == {"/feed": 1, "/1": 1, "/2": 1, "/hostile": 1} and proc_children() == children


@pytest.mark.parametrize(
    "program", [("crawl_async.py",), ("crawl_async.py", "--processes", "2"), ("crawl_threads.py",)]
)
def test_the_end_waits_for_no_reader(program: tuple[str, ...], feeds_site: Site, tmp_path: Path) -> None:
    """The reader stands still with a feed in hand. Another feed has its row, and the signal ends all."""
    site, url = feeds_site, feeds_site.url
    site.routes = {f"/{name}": Answer(feeds_rss("/1"), "text/xml", ETag='"1"') for name in ("first", "slow")}
    site.routes |= {"/1": Answer(feeds_article("1")), "/missing": Answer("nothing", status="404")}
    site.routes["/slow"].gate = site.routes["/missing"].gate = gate = threading.Event()
    script, *options = program
    words = [sys.executable, str(HERE / script), "-", "--feeds", "-q", "--rate", "0"]
    out = tmp_path / "news.jsonl"
    words += ["-o", str(out), "--grace", "0.1", *options]
    with subprocess.Popen(words, env=os.environ | {"NO_PROXY": "*"}, stdin=subprocess.PIPE) as process:
        readers: list[psutil.Process] = []
        try:
            assert process.stdin is not None
            process.stdin.write(f"{url('/first')}\n{url('/slow')}\n{url('/missing')}\n".encode())
            process.stdin.close()
            wait_until(lambda: site.paths().keys() >= {"/slow", "/missing"} and out.read_bytes().count(b"\n") == 2)
            readers += feeds_children(process)
            assert len(readers) > 1  # the template, and what read the first feed and its article
            for reader in readers:
                reader.suspend()
            gate.set()
            wait_until(lambda: b"/missing" in out.read_bytes())
            process.terminate()
            assert process.wait(PROGRAM_LIMIT) == EXIT_INTERRUPTED
            wait_until(lambda: all(proc_gone(reader.pid) for reader in readers))
        finally:
            gate.set()
            process.kill()
            for reader in readers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    reader.kill()
    rows = {row["url"]: (row["error"] or "").partition(":")[0] for row in feeds_rows(tmp_path)}
    assert rows == {url("/first"): "", url("/1"): "", url("/missing"): "http", url("/slow"): "interrupted"}


def feeds_children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The readers of a crawl."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid).children(recursive=True)
        return [one for one in found if any("crawl.readers" in word for word in one.cmdline())]
    return []
