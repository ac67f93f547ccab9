"""Whole crawls of small sites, by both drivers."""

from __future__ import annotations

import contextlib
import csv
import gc
import gzip
import io
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import crawl_async
import crawl_threads
import html_parse
from crawl import core as crawl_core
from crawl import journal as crawl_journal
from crawl import robots as robots_module
from crawl import rows as rows_module
from crawl import sitemap_crawl
from crawl.core import Crawl
from crawl.frontier import Frontier
from crawl.model import CrawlResult, Options, Request, Response, ScrapeResult
from crawl.progress import serve_metrics, write_stats
from crawl.robots import LARGE, rules_for
from sandbox import faults as sf
from sandbox import sites as sb
from sandbox.sites import Sandbox
from tests.absent import needs
from tests.helpers.base import HANG_LIMIT, HERE, free_port, wait_until
from tests.helpers.crawl import (
    DRIVERS,
    ROBOTS_LARGE,
    WALKERS,
    kind,
    robots_file,
    walk,
    walk_crawl,
    walk_main,
    walk_row,
)


class Web:
    """A few hosts whose every answer a test sets: ``pages`` by host number and target, such as "0/a?b=c"."""

    def __init__(self, site: Sandbox) -> None:
        self.site = site
        self.pages: dict[str, sf.Answer | sf.Handler] = {}

    def __call__(self, request: sf.SiteRequest) -> sf.Answer:
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
        more = ["--rate", "0", "--timeout", "60", "-q"]
        return walk_main(driver, *(self.url(arg) if arg[:2] in ("0/", "1/") else arg for arg in argv), *more)


def errors(rows: dict[str, CrawlResult]) -> dict[str, str | None]:
    return {key: row.error and row.error.partition(":")[0] for key, row in rows.items()}


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with Sandbox(hosts=4, pages=1) as site:
        web = Web(site)
        monkeypatch.setattr(sb, "site", web)
        for path in list(sf.ROUTES):
            monkeypatch.delitem(sf.ROUTES, path)
        yield web


# ------------------------------------------------------------------------------------------------------ each page once


@pytest.mark.parametrize("driver", WALKERS)
def test_finds_every_page_once_at_any_concurrency(driver: str) -> None:
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


@pytest.mark.parametrize("driver", WALKERS)
def test_goes_on_after_each_kill(driver: str, walked: Web, tmp_path: Path) -> None:
    rng, out, concurrency = random.Random(11), tmp_path / "rows.jsonl", 5
    with Sandbox(hosts=2, pages=60, page_bytes=2800) as site:  # its pages, but from where a run can be held up
        every = {web_key: site._page(host, page) for host in (0, 1) for page in range(60)
                 for web_key in [f"{host}{sb.page_path(page)}"]}  # fmt: skip
        port = site.port
    answered = [0, 0]  # requests of this run, and how many get an answer

    def answer(key: str) -> sf.Handler:
        body = every[key].replace(b":%d/" % port, b":%d/" % walked.site.port)

        def handler(request: sf.SiteRequest) -> sf.Answer:
            answered[0] += 1
            return body if answered[0] <= answered[1] else [sf.FOREVER]

        return handler

    walked.pages |= {key: answer(key) for key in every}
    argv = [walked.url("0/"), walked.url("1/"), "--depth", "20", "--rate", "0", "--concurrency", str(concurrency)]
    name, *more = driver.split()
    argv = [sys.executable, "-W", "error::ResourceWarning", str(HERE / f"{name}.py"), *argv, *more]
    done = 0
    for _ in range(4):
        goal = done + rng.randrange(1, 25)
        answered[:] = 0, goal - done + rng.randrange(concurrency)
        with subprocess.Popen([*argv, "-o", str(out), "--resume", "-q"], cwd=HERE, stderr=subprocess.PIPE) as child:
            wait_until(lambda goal=goal: out.exists() and out.read_bytes().count(b"\n") >= goal)  # type: ignore[misc]
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


def every_kind(web: Web) -> None:
    """Two hosts that have something of everything, in a tree: no page's depth depends on which is first."""
    for host in (0, 1):
        web.robots(host, "User-agent: *", "Disallow: /forbidden", f"Sitemap: {web.url(f'{host}/map.xml')}")
        web.sitemap(f"{host}/map.xml", f"{host}/mapped/1", f"{host}/mapped/2", "2/mapped")
        web.page(f"{host}/", *(f"{host}/{n}/" for n in range(6)), "/forbidden/1", "/gone", "/moved", "/moved-away")
        for n in range(6):
            web.page(f"{host}/{n}/", *(f"{host}/{n}/{m}" for m in range(4)), f"{host}/{n}/?session={n}&page=1")
            for m in range(4):  # pairs of them are the same, byte for byte
                web.page(f"{host}/{n}/{m}", f"{host}/{n}/below/{m // 2}", tag=f"twins {n} {m // 2}")
            for m in range(2):
                web.page(f"{host}/{n}/below/{m}", '<a rel=nofollow href="/unwanted">x</a>', "2/elsewhere")
        web.page(f"{host}/0/?page=1", "/a/a/a/", "/day?n=0")
        for n in range(1, 6):  # without end
            web.page(f"{host}/{'a/' * n}", f"/{'a/' * (n + 1)}")
        for n in range(120):
            web.page(f"{host}/day?n={n}", f"/day?n={n + 1}", head='<meta name="robots" content="noindex">' * (n % 2))
        web.redirect(f"{host}/moved", "/new")
        web.page(f"{host}/new", "/after")
        web.page(f"{host}/after")
        web.redirect(f"{host}/moved-away", f"2/new/{host}")
        for n in (1, 2):
            web.page(f"{host}/mapped/{n}", f"{host}/mapped/below/{n}")
            web.page(f"{host}/mapped/below/{n}")
        articles = [web.url(f"{host}/article/{n}") for n in range(6)]
        items = "".join(
            f"<item><link>{url}</link><title>t</title></item>" for url in [*articles, web.url(f"2/none/{host}")]
        )
        web.pages[f"{host}/feed.xml"] = sf.reply(f"<rss><channel>{items}</channel></rss>".encode(), kind="text/xml")
        for n in range(6):
            web.page(f"{host}/article/{n}", tag=f"article {n} " + "with many words " * 20)


WHATEVER = {
    "links": ("--depth", 9),
    "dedupe": ("--depth", 9, "--dedupe"),
    "host pages": ("--depth", 9, "--host-pages", 20),
    "max pages": ("--depth", 9, "--max-pages", 30, "--no-robots"),
    "sitemaps": ("--depth", 9, "--sitemaps", "--no-robots"),
    "adaptive": ("--depth", 2, "--adaptive", "--rate", 500, "--burst", 5),
    "any": ("--depth", 3, "--within", "any", "--drop-params", "session", "--exclude", "*/below/*"),
    "feeds": ("--feeds",),
    "explain": ("--depth", 9, "--explain", "1/0/?page=1"),
    "resume": ("--depth", 9, "--dedupe", "--resume"),
}
"""What must be the same whatever the number of processes, and what is asked of the program for it."""


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=needs("feedparser", "trafilatura") if what == "feeds" else ()) for what in WHATEVER],
)
def test_four_processes_have_the_rows_of_one(
    driver: str,
    what: str,
    walked: Web,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if what == "feeds":
        request.getfixturevalue("lent_template")
    every_kind(walked)
    seeds = ["0/feed.xml", "1/feed.xml"] if what == "feeds" else ["0/", "1/", "0/"]
    listed = tmp_path / "list"
    listed.write_text("\n".join(["not a URL", *map(walked.url, seeds)]))
    options = [walked.url(each) if each.startswith("1/") else each for each in map(str, WHATEVER[what])]

    def crawl(count: int) -> tuple[set[tuple[Any, ...]], *tuple[Any, ...]]:
        out, stats = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.stats"
        if what == "resume":
            out.write_bytes(
                walk_row(walked.url("0/"), *(walked.url(f"0/{n}/") for n in range(6)))
                + walk_row(walked.url("0/1/"), walked.url("0/1/0"), walked.url("0/1/3"), depth=1)
            )
        argv = [str(listed), "--rate", "0", "--timeout", "60", "-q", "--retries", "0", "-o", str(out)]
        argv += options if what == "explain" else [*options, "--stats", str(stats)]
        assert walk_main(driver, *argv, "--processes", str(count)) == 0
        if what == "explain":
            return set(), capsys.readouterr().out
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        twins = Counter((row.get("digest"), row.pop("duplicate_of", None) is None) for row in rows)
        for row in rows:
            del row["fetched_at"], row["duration_ms"]
        found = {tuple(map(str, row.values())) for row in rows}
        assert len({row["url"] for row in rows}) == len(rows) == len(found)
        hosts = Counter(row["url"].split("/")[2] for row in rows if "/" in row["url"])
        counts = json.loads(stats.read_text())
        same = "rows", "ok", "errors", "statuses", "redirects", "retries", "robots", "sitemaps", "capped"
        return found, twins, hosts, {name: counts[name] for name in same}

    (rows, *one), (also, *four) = crawl(1), crawl(4)
    if what == "max pages":  # which of them is a matter of chance
        assert len(rows) == len(also) and one[-1]["capped"] and four[-1]["capped"]
    elif what == "host pages":
        assert one[1] == four[1] and one[-1]["capped"] and four[-1]["capped"]
    else:
        assert (one, rows ^ also) == (four, set())
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------- what must not end a crawl


@pytest.mark.parametrize("driver", WALKERS)
def test_a_fault_of_its_own_is_one_row(driver: str, walked: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    walked.page("0/", "/a", "/b", "/c")
    for key in ("0/a", "0/b", "0/c"):
        walked.page(key)

    def parse(body: bytes, *more: Any) -> Any:
        if b"0/b" in body:
            raise KeyError("planted")
        return real(body, *more)

    real = html_parse.parse_page
    monkeypatch.setattr("crawl.rows.parse_page", parse)
    rows = walked.crawl(driver, "0/", concurrency=2)
    assert errors(rows) == {"0/": None, "0/a": None, "0/b": "internal", "0/c": None}
    assert rows["0/b"].error == "internal: KeyError: 'planted'"


@pytest.mark.parametrize("driver", WALKERS)
@pytest.mark.parametrize("name", ["rules_for", "parse_sitemap", "page_directives", "Scope.targets"])
def test_a_fault_where_there_is_no_row_to_tell(
    driver: str, name: str, walked: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*args: Any) -> Any:
        raise MemoryError("planted")

    owner, _, attribute = name.rpartition(".")
    module = {"page_directives": rows_module, "parse_sitemap": sitemap_crawl}.get(name, crawl_core)
    monkeypatch.setattr(getattr(module, owner) if owner else module, attribute, planted)
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
        "Scope.targets": {"0/": "internal"},
    }
    assert errors(rows) == expected[name]


@pytest.mark.parametrize("driver", WALKERS)
def test_a_full_disk_and_then_room_again(
    driver: str, walked: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert (code, capsys.readouterr().err) == (1, f"{driver.split()[0]}.py: stopped: [Errno 27] File too large\n")
    data = out.read_bytes()
    assert 18_000 < len(data) <= 20_000
    assert not data.endswith(b"\n")
    assert walked.program(driver, "0/", "--depth", "3", "-o", str(out), "--resume") == 0
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert Counter(walked.key(row["url"]) for row in rows) == Counter(walked.pages.keys())
    assert {row["error"] for row in rows} == {None}
    assert walked.program(driver, "0/", "--depth", "3", "-o", "/dev/full") == 1
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("driver", WALKERS)
def test_the_reader_of_the_rows_leaves(
    driver: str, walked: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    walked.page("0/", "/a")
    walked.page("0/a", "/b")
    left = threading.Event()

    def last(request: sf.SiteRequest) -> Iterator[sf.Step]:
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
    reader.join(HANG_LIMIT)
    assert walked.program(driver, "0/", "--depth", "3", "-o", str(pipe), "--resume") == 1
    assert "is no file, which could be read back" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- robots and sitemaps


@pytest.mark.parametrize("driver", WALKERS)
def test_obeys_robots(driver: str, walked: Web) -> None:
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
    assert errors(rows) == {
        "0/": None, "0/no": "robots", "0/no/yes": None, "0/yes": "robots", "1/": None, "1/a": None, "2/": "robots",
        "2/too": "robots", "3/": None, "3/a": "robots", "3/b": None,
    }  # fmt: skip
    assert rows["0/no"].error == "robots: forbidden by robots.txt"
    assert rows["2/"].error == "robots: robots.txt could not be read"
    asked = Counter(walked.asked(robots=True))
    assert {key for key, times in asked.items() if times > 1} == set()
    assert set(asked).isdisjoint({"0/no", "0/no/more", "2/", "2/too", "3/a"})
    assert set(errors(walked.crawl(driver, "0/", robots=False)).values()) == {None, "http"}


@pytest.mark.parametrize("driver", WALKERS)
def test_is_not_held_up_by_the_rules_of_one_host(driver: str, walked: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of host 0 answer when the pages of host 1 are done."""
    done = threading.Event()
    waited: list[bool] = []
    real = robots_module.Rules.allows

    def allows(self: robots_module.Rules, url: str) -> bool | None:
        if walked.key(url).startswith("0/"):
            waited.append(done.wait(HANG_LIMIT))
        return real(self, url)

    monkeypatch.setattr(robots_module.Rules, "is_quick", lambda self, url: walked.key(url)[0] != "0", raising=False)
    monkeypatch.setattr(robots_module.Rules, "allows", allows)
    for host in (0, 1):
        walked.robots(host, "User-agent: *", "Disallow: /no")
    walked.page("0/", "/no")
    walked.page("1/", *(f"/{n}" for n in range(8)))
    for n in range(8):
        walked.page(f"1/{n}")
    rows: list[ScrapeResult] = []

    def emit(row: ScrapeResult) -> None:
        rows.append(row)
        if sum(walked.key(row.url).startswith("1/") for row in rows) == 9:
            done.set()

    walk(driver, walk_crawl(concurrency=4), [walked.url("0/"), walked.url("1/")], emit)
    assert waited == [True, True]
    assert {walked.key(row.url): row.error for row in rows if walked.key(row.url).startswith("0/")} == {
        "0/": None, "0/no": "robots: forbidden by robots.txt",
    }  # fmt: skip


@pytest.mark.parametrize("driver", WALKERS)
def test_beside_hostile_robots(driver: str, walked: Web) -> None:
    """10,000 rules with wildcards; and few enough to be read, over long links."""
    walked.pages["0/robots.txt"] = sf.reply(robots_file(ROBOTS_LARGE["wildcards"]), kind="text/plain")
    walked.robots(1, "User-agent: *", *(f"Disallow: /x*{n:06}*{n:06}" for n in range(1_500)), "Disallow: /x/end")
    walked.page("0/", "/a")
    walked.page("1/", *(f"/x/end{n:0{3 if n < 600 else 1_900}}" for n in range(900)))
    walked.page("2/", *(f"/{n}" for n in range(30)))
    for n in range(30):
        walked.page(f"2/{n}")
    crawl = walk_crawl(concurrency=8, host_pages=2_000)
    rows = walked.crawl(driver, "0/", "1/", "2/", crawl=crawl)
    assert rows["0/"].error == "robots: robots.txt is too costly to match"
    said = Counter(row.error for key, row in rows.items() if key.startswith("1/x"))
    forbidden, costly = (
        said[f"robots: {why}"] for why in ("forbidden by robots.txt", "robots.txt is too costly to match")
    )
    assert forbidden + costly == 900 and forbidden > 50 and costly > 300
    assert [row.error for key, row in rows.items() if key.startswith("2/")] == [None] * 31
    assert crawl.frontier.stats().forbidden == 901
    assert set(walked.asked()) == {"1/", "2/", *(f"2/{n}" for n in range(30))}


@pytest.mark.parametrize("driver", WALKERS)
def test_reads_large_robots_one_at_a_time_and_not_once_it_is_stopped(
    driver: str, walked: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading: list[str] = []
    crawl = walk_crawl(concurrency=4)
    real = rules_for

    def slow(outcome: Any, *more: Any) -> Any:
        reading.append(threading.current_thread().name)
        wait_until(lambda: len(walked.asked(robots=True)) == 4)
        crawl.interrupted = True
        crawl.frontier.stop()
        return real(outcome, *more)

    monkeypatch.setattr(crawl_core, "rules_for", slow)
    large = b"User-agent: *\n" + b"Disallow: /no\n" * (LARGE // 10)
    for host in range(4):
        walked.pages[f"{host}/robots.txt"] = sf.reply(large, kind="text/plain")
        walked.page(f"{host}/")
    rows = walked.crawl(driver, "0/", "1/", "2/", "3/", crawl=crawl)
    assert (rows, len(reading)) == ({}, 1)
    assert reading[0].startswith("parser")


@pytest.mark.parametrize("driver", WALKERS)
def test_keeps_the_delay_that_robots_ask_for(driver: str, walked: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, float]] = []
    real = Frontier.clear_to_send

    def clear(self: Frontier, request: Request, now: float, ahead: float = 0.0) -> float:
        wait = real(self, request, now, ahead)
        if wait <= ahead:
            sent.append((request.kind, now + wait))
        return wait

    monkeypatch.setattr(Frontier, "clear_to_send", clear)
    monkeypatch.setattr("crawl.helper.LATE", HANG_LIMIT)  # a helper that is late would ask again
    walked.robots(0, "User-agent: *", "Crawl-delay: 0.125")
    walked.page("0/", *(f"/{n}" for n in range(4)))
    for n in range(4):
        walked.page(f"0/{n}")
    crawl = walk_crawl()
    walked.crawl(driver, "0/", crawl=crawl)
    asks = driver in DRIVERS  # a helper need not, where there is no limit yet
    assert [what for what, _ in sent] == ["robots"] * asks + ["page"] * 5
    times = [at for what, at in sent if what == "page"]
    assert min(b - a for a, b in itertools.pairwise(times)) >= 0.125 - 1e-6
    assert crawl.frontier.rate(walked.site.hosts[0]) == 8


@pytest.mark.parametrize("driver", WALKERS)
def test_sitemaps_seed(driver: str, walked: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("core", "sitemaps"):
        monkeypatch.setattr(f"crawl.{module}.MAX_SITEMAP", 1 << 20)
    walked.robots(0, *(f"Sitemap: {walked.url(key)}" for key in ("0/index.xml", "0/index.xml", "1/for0.xml", "0/404")))
    walked.sitemap("0/index.xml", "0/a.xml.gz", "0/index.xml", "0/back.xml", "0/bomb.gz", "0/list.txt", index=True)
    walked.sitemap("0/back.xml", "0/index.xml", "0/a.xml.gz", index=True)
    walked.sitemap("0/a.xml.gz", "0/a", "0/away", "1/foreign", pack=True)
    walked.sitemap("1/for0.xml", "0/by1", "1/own")
    walked.robots(1, f"Sitemap: {walked.url('2/spread.xml')}")
    walked.sitemap("2/spread.xml", "0/spread")
    bomb = io.BytesIO()
    with gzip.open(bomb, "wb") as packed:
        packed.write(b"<urlset>" + b" " * 1_200_000)
    walked.pages["0/bomb.gz"] = sf.reply(bomb.getvalue(), kind="application/gzip")
    walked.pages["0/list.txt"] = sf.reply(walked.url("0/text").encode(), kind="text/plain")
    walked.page("0/")
    walked.page("0/a", "/deeper")
    walked.page("0/by1")
    walked.page("0/text")
    walked.redirect("0/away", "1/elsewhere")
    crawl = walk_crawl(depth=0, sitemaps=True, concurrency=4)
    rows = walked.crawl(driver, "0/", crawl=crawl)
    assert errors(rows) == {"0/": None, "0/a": None, "0/by1": None, "0/text": None, "0/away": "redirects"}
    assert {row.depth for row in rows.values()} == {0}
    asked = Counter(walked.asked(robots=True))
    assert {key for key, times in asked.items() if times > 1} == set()
    assert not [key for key in asked if key[0] in "23"]
    stats = crawl.stats.snapshot()
    assert (stats["sitemaps"], stats["sitemap_errors"], stats["robots"]) == (7, 2, 2)
    assert crawl.sitemaps.homes == {}


@pytest.mark.parametrize("driver", WALKERS)
def test_sitemaps_without_end_have_one(driver: str, walked: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sitemap_crawl, "MAX_SITEMAPS", 7)
    walked.robots(0, f"Sitemap: {walked.url('0/m1')}")
    for n in range(1, 40):
        walked.sitemap(f"0/m{n}", f"0/m{2 * n}", f"0/m{2 * n + 1}", index=True)
    walked.page("0/")
    crawl = walk_crawl(sitemaps=True)
    assert list(walked.crawl(driver, "0/", crawl=crawl)) == ["0/"]
    assert len([key for key in walked.asked() if key.startswith("0/m")]) == 7 == crawl.stats.sitemaps


# ------------------------------------------------------------------------------------------- what is followed, and not


@pytest.mark.parametrize("driver", WALKERS)
def test_honours_what_pages_ask(driver: str, walked: Web) -> None:
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


@pytest.mark.parametrize("driver", WALKERS)
def test_stays_where_it_is_told_to(driver: str, walked: Web) -> None:
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


@pytest.mark.parametrize("driver", WALKERS)
def test_within_a_registrable_domain(driver: str, walked: Web, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("driver", WALKERS)
def test_redirects(driver: str, walked: Web) -> None:
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
    assert errors(rows) | {"0/to-new": None, "0/twice": None} == {
        "0/": None, "0/known": None, "0/to-known": "duplicate", "0/to-new": None, "0/out": "redirects", "0/twice": None,
        "0/loop": "duplicate", "0/deep": None, "2/": None, "2/more": None, "3/more": None,
    }  # fmt: skip
    assert rows["0/out"].error == f"redirects: to {walked.url('1/')}: 127.0.1.2 is not a host of the list"
    assert {key: times for key, times in Counter(walked.asked()).items() if times > 1} == {}
    assert "1/" not in walked.asked()


def wall(name: str, to: str | None = None, page: bytes | None = None) -> sf.Handler:
    """A page for those who bring its cookie back; the others are redirected, to itself unless ``to`` says where."""

    def handle(request: sf.SiteRequest) -> sf.Answer:
        if f"{name}=1" in request.cookie:
            return page or sf.reply(f"<title>{name}</title><a href=/{name}/on>".encode())
        return sf.reply(b"", 302, f"Set-Cookie: {name}=1; Path=/", f"Location: {to or request.target}")

    return handle


@pytest.mark.parametrize("driver", WALKERS)
def test_follows_all_that_leads_on(driver: str, walked: Web) -> None:
    """500 pages, none of which has a link to another one."""
    names = range(500)
    for n in names:
        first, *others = [f"/{below}" for below in (2 * n + 1, 2 * n + 2) if below in names] or ["/0"]
        body = {
            0: "".join(f'<iframe src="{to}"></iframe>' for to in (first, *others)),
            1: f"<meta http-equiv=refresh content='1;url={first}'>" + "".join(f"<area href={to}>" for to in others),
        }.get(n % 3, f"<frameset>{''.join(f'<frame src={to}>' for to in (first, *others))}</frameset>")
        page = sf.reply(f"<title>{n}</title>{body}".encode())
        walked.pages[f"0/{n}"] = wall(str(n), page=page) if n % 7 == 3 else page
    rows = walked.crawl(driver, "0/0", depth=20)
    assert {key: (row.title, row.error) for key, row in rows.items()} == {f"0/{n}": (f"{n}", None) for n in names}


@pytest.mark.parametrize("driver", WALKERS)
def test_a_refresh_counts_as_a_redirect(driver: str, walked: Web) -> None:
    def refresh(to: str, more: str = "") -> str:
        return f'{more}<meta http-equiv=Refresh content="0; URL={to}">'

    walked.page("0/", head=refresh(walked.url("1/home")))  # out of scope, did the list not lead there
    walked.page("1/home", "/next", headers=["Refresh: 5;url='/header'"])
    walked.page("1/header", head=refresh("/far") + refresh("/other"))
    walked.page("1/far", head=refresh("/fourth"))
    walked.page("1/next", head=refresh(walked.url("2/")))
    walked.page("2/")
    walked.page("0/slow", head=refresh("/slower").replace("0;", "900;"))
    walked.page("0/self", head=refresh("self"))
    walked.page("0/meek", head=refresh("/x", "<meta name=robots content=nofollow>"))
    walked.page("0/script", head=f"<noscript>{refresh('/x')}</noscript><template>{refresh('/x')}</template>")
    rows = walked.crawl(driver, "0/", "0/slow", "0/self", "0/meek", "0/script", depth=1, max_redirects=3)
    found = {key: (row.depth, row.redirects, row.pointer, row.error) for key, row in rows.items()}
    plain = (0, 0, None, None)
    assert found == {
        "0/": (0, 0, "refresh", None), "1/home": (0, 1, "refresh", None), "1/header": (0, 2, "refresh", None),
        "1/far": (0, 3, "refresh", "redirects: more than 3"), "1/next": (1, 0, "refresh", None),
        "0/slow": plain, "0/self": plain, "0/meek": (0, 0, "refresh", None), "0/script": plain,
    }  # fmt: skip
    assert rows["0/"].leads_to == [walked.url("1/home")]
    listed = walked.crawl(driver, "0/", depth=0)["0/"]  # where links are not followed the row says so
    assert (listed.pointer, listed.leads_to) == ("refresh", [walked.url("1/home")])


@pytest.mark.parametrize("driver", WALKERS)
@pytest.mark.parametrize("depth", [0, 1])
def test_cookies_for_one_redirect_chain(driver: str, depth: int, walked: Web) -> None:
    walked.pages["0/wall"] = wall("wall")
    walked.pages["0/a"] = wall("away", to=walked.url("1/check"))
    seen = []

    def check(request: sf.SiteRequest) -> sf.Answer:
        seen.append(request.cookie)
        return sf.reply(b"", 302, f"Location: {walked.url('0/a')}")

    for key in ("1/check", "0/wall/on", "0/away/on"):
        walked.pages[key] = check
    walked.pages["0/never"] = sf.reply(b"", 302, "Set-Cookie: n=1", "Location: /never")
    rows = walked.crawl(driver, "0/wall", "0/a", "0/never", depth=depth, max_redirects=4)
    assert {key: (row.title, row.redirects) for key, row in rows.items() if row.status == 200} == {
        "0/wall": ("wall", 1),
        "0/a": ("away", 2),
    }
    assert rows["0/never"].error == "redirects: to itself"
    assert seen == [""] * (1 + 2 * depth), "neither other hosts nor what is found have them"


@pytest.mark.parametrize("driver", WALKERS)
def test_goes_on_where_pages_lead(driver: str, walked: Web, tmp_path: Path) -> None:
    out = tmp_path / "site.jsonl"
    first = walk_row(walked.url("0/"), pointer="refresh", leads_to=[walked.url("1/"), walked.url("0/frame")])
    out.write_bytes(first)
    walked.page("1/")
    walked.page("0/frame")
    assert walked.program(driver, "0/", "--depth", "1", "-o", str(out), "--resume") == 0
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert {(walked.key(row["url"]), row["depth"], row["redirects"]) for row in found[1:]} == {
        ("1/", 0, 1),
        ("0/frame", 1, 0),
    }


@pytest.mark.parametrize("driver", WALKERS)
def test_the_end_of_the_list_is_in_scope_from_the_beginning(driver: str, walked: Web) -> None:
    fill = [f"0/{n}" for n in range(300)]
    walked.page("0/", "1/linked")
    walked.page("1/linked")
    walked.redirect("0/0", "1/last")
    walked.page("1/last")
    rows = walked.crawl(driver, "0/", *fill, "1/last", concurrency=2)
    assert (rows["1/linked"].depth, rows["1/last"].error, kind(rows["0/0"])) == (1, None, "duplicate")


@pytest.mark.parametrize("driver", WALKERS)
def test_equal_bodies_are_marked_and_their_links_followed_once(driver: str, walked: Web) -> None:
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


@pytest.mark.parametrize("driver", WALKERS)
def test_has_bounds(driver: str, walked: Web) -> None:
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

    def late(request: sf.SiteRequest) -> sf.Answer:
        clock[0] = 1000.0
        return sf.reply(b"")

    walked.pages["0/2"] = late
    crawl = Crawl(Options(rate=0.0, depth=9, max_time=500, concurrency=1), clock=lambda: time.monotonic() + clock[0])
    assert list(walked.crawl(driver, "0/", crawl=crawl)) == ["0/", "0/0", "0/1", "0/2"]
    assert (crawl.failure, crawl.interrupted, crawl.frontier.stats().waiting) == (None, False, 6)


ROWS = walk_row("http://a.example/") + walk_row("http://a.example/b", error="http: 404 Not Found")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""), (ROWS, ROWS), (ROWS + b'{"url":"http://a.exa', ROWS), (b'{"ur', b""),
        (ROWS[:-1], walk_row("http://a.example/")), (ROWS + bytes(5000), ROWS),
        (ROWS + b'{"url":"http' + bytes(50) + b'c":1}\n', ROWS), (ROWS[:100], b""),
        (walk_row("http://c.example/", error="interrupted: x", status=None) + ROWS, ROWS),
        (ROWS + walk_row("http://c.example/", error="interrupted: x") + b'{"url', ROWS),
        (ROWS + walk_row("http://c.example/" + "x" * 3_000_000) + b"{", None),
    ],
)  # fmt: skip
def test_a_journal_is_mended(before: bytes, after: bytes | None, tmp_path: Path) -> None:
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
    kept = path.read_bytes()
    if kept.startswith(b'{"url":'):
        with pytest.raises(crawl_journal.JournalError, match="the rows of another crawl"):
            crawl_journal.open_anew(str(path))
        assert path.read_bytes() == kept
    else:
        with crawl_journal.open_anew(str(path)):
            assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "before",
    [
        b"url,status,title\r\nhttp://a.example/,200,x\r\n", b"[\n" + ROWS[:-1] + b"\n]\n", b"[]\n", b"\n",
        ROWS + b"a note of mine\n", b"a note of mine", bytes(100), b'{"url":"http://a/","error":null}\n',
        b"\0" * 10 + ROWS, ROWS + b"torn\0" + ROWS, b"{}\n", b"x" * 5_000_000, b"\x89PNG\r\n\x1a\n\0\0",
        walk_row("x", links_found=7), walk_row("x", url=7), b'{"url":"x",\n' + ROWS,
    ],
)  # fmt: skip
def test_what_is_no_journal_is_refused_and_not_touched(
    before: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before)
    code = walk_main("crawl_async", "http://a.example/", "--depth", "1", "-o", str(path), "--resume")
    err = capsys.readouterr().err
    assert (code, path.read_bytes()) == (1, before)
    assert err.count("\n") == 1
    assert "no row of a crawl" in err


@pytest.mark.parametrize("driver", WALKERS)
def test_resume_asks_for_what_is_left_and_nothing_else(
    driver: str, walked: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


@pytest.mark.parametrize("driver", WALKERS)
def test_resume_knows_the_first_of_equal_bodies(driver: str, walked: Web, tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("driver", WALKERS)
def test_explains(driver: str, walked: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def walk_metrics(crawl: Crawl) -> str:
    port = free_port()
    with (
        serve_metrics(crawl, port),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_LIMIT) as answer,
    ):
        return str(answer.read().decode())


@pytest.mark.parametrize(("driver", "told"), [(crawl_async, True), (crawl_threads, False)])
def test_loop_lag_is_told_where_there_is_a_loop(driver: Any, told: bool, walked: Web) -> None:
    crawl = walk_crawl()
    driver.run(crawl, [walked.url("0/")], lambda *rows: None)
    assert ("crawl_loop_lag_seconds" in walk_metrics(crawl)) == told


@pytest.mark.parametrize("driver", WALKERS)
def test_counts_agree_and_nothing_is_kept(driver: str, walked: Web, tmp_path: Path) -> None:
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
    assert (len(crawl.frontier._intake.visited), len(crawl.bodies)) == (86, 81)
    text = walk_metrics(crawl)
    with open(tmp_path / "stats", "a", encoding="utf-8") as file:
        write_stats(crawl, file)
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


@pytest.mark.parametrize("driver", WALKERS)
def test_as_a_table(driver: str, walked: Web, tmp_path: Path) -> None:
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
def test_wrong_usage_is_one_line(
    argv: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_bytes(ROWS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"OUT": str(out), "IN USE": str(taken.getsockname()[1])}
        argv = ["http://a.invalid/", *(words.get(arg, arg) for arg in argv)]
        with contextlib.suppress(SystemExit) if code == 2 else contextlib.nullcontext():
            assert walk_main("crawl_async", *argv) == code
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out.read_bytes() == ROWS
