"""crawl/robots.py: against Protego, and rows of RFC 9309."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protego import Protego

from crawl.errors import FetchError
from crawl.model import USER_AGENT, Response
from crawl.robots import (
    ALLOW_ALL,
    DISALLOW_ALL,
    MAX_LINES,
    MAX_ROBOTS,
    MAX_SIZE,
    TOO_COSTLY,
    page_directives,
    parse_robots,
    product_token,
    rules_for,
)
from crawl.urls import normalise
from html_parse import parse_page
from tests.helpers.crawl import ROBOTS_LARGE, robots_file


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
def test_product_token(user_agent: str, token: str) -> None:
    assert product_token(user_agent) == token


RFC_5_1 = b"""User-Agent: *
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


RFC_5_2 = b"User-Agent: foobot\nAllow: /example/page/\nDisallow: /example/page/disallowed.gif\n"


@pytest.mark.parametrize(
    ("body", "agent", "path", "allowed"),
    [
        # RFC 9309, section 5.1
        (RFC_5_1, "other", "/x.gif", False),
        (RFC_5_1, "other", "/x.gif?y", True),
        (RFC_5_1, "other", "/example/x", False),
        (RFC_5_1, "other", "/publications/x", True),
        (RFC_5_1, "foobot", "/x", False),
        (RFC_5_1, "foobot", "/example/page.html", True),
        (RFC_5_1, "FooBot/3.2", "/example/allowed.gif", True),
        (RFC_5_1, "barbot", "/example/page.html", False),
        (RFC_5_1, "bazbot", "/example/page.html", False),
        (RFC_5_1, "bazbot", "/example/", True),
        (RFC_5_1, "quxbot", "/x.gif", True),
        # section 5.2, the longest match
        (RFC_5_2, "foobot", "/example/page/x", True),
        (RFC_5_2, "foobot", "/example/page/disallowed.gif", False),
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
def test_rules(body: bytes, agent: str, path: str, allowed: bool) -> None:
    assert parse_robots(body, agent).allows(f"https://site.example{path}") is allowed


names = st.sampled_from(["*", "flatcrawl", "FlatCrawl", "otherbot", "other-bot-2", "Googlebot"])


robots_paths = st.one_of(
    st.text("/ab*$?=.%4é", max_size=8).map("/{}".format),
    st.text("/ab*$", max_size=10).map("/{}".format),
    st.lists(st.sampled_from(["/", "a", "**", "$", "%2F", "%2a", "%24", "%61", "%C3%A9", "%E9", "%zz", "%0a", "%25",
                              "index.html", "日", ";", "&"]), max_size=6).map(lambda parts: "/" + "".join(parts)),
)  # fmt: skip


robots_lines = st.one_of(
    st.builds("{}: {}".format, st.sampled_from(["User-agent", "user-agent", "User-Agent "]), names),
    st.builds("{}:{}".format, st.sampled_from(["Disallow", "Allow", "disallow ", "Disalow"]), robots_paths),
    st.builds("Crawl-delay: {}".format, st.sampled_from(["1", "0.5", "x", "-1", "20"])),
    st.sampled_from(
        ["", "# note", "Sitemap: https://site.example/s.xml", "Disallow:", "Noindex: /", "junk", "Host: x"]
    ),
)


def one_group(lines: list[str]) -> str:
    """The lines with each delay among the agents of a group behind them: there Protego would begin another group."""
    moved: list[str] = []
    delays: list[str] = []
    naming = False
    for line in lines:
        if naming and line.startswith("Crawl-delay"):
            delays.append(line)
            continue
        if re.match("Allow|Dis|Noindex", line, re.IGNORECASE):
            moved, delays = moved + delays, []
        naming = line.lower().startswith("user") or (naming and not re.match("Allow|Dis|Noindex", line, re.IGNORECASE))
        moved.append(line)
    return "\n".join(moved + delays)


@settings(max_examples=300, deadline=None)
@given(st.lists(robots_lines, max_size=25), st.lists(robots_paths, min_size=1, max_size=8))
def test_agrees_with_protego(lines: list[str], paths: list[str]) -> None:
    text = "\n".join(lines)
    theirs, ours = Protego.parse(one_group(lines)), parse_robots(text.encode(), USER_AGENT)
    for path in [*paths, *(line.partition(":")[2] for line in lines if "llow" in line), "/robots.txt"]:
        url = normalise(f"https://site.example{path}")[0]
        assert ours.allows(url) == theirs.can_fetch(url, "flatcrawl"), path
    assert ours.delay == (theirs.crawl_delay("flatcrawl") or None)
    assert list(ours.sitemaps) == sorted(set(theirs.sitemaps))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | st.text("user-agent:\n *sitemap/%$[]?#@\x00\x85\ud800", max_size=200).map(
    lambda text: text.encode("utf-8", "surrogatepass")), st.text(max_size=30))  # fmt: skip
def test_never_raises(body: bytes, text: str) -> None:
    rules = parse_robots(b"User-agent: *\n" + body, text, text)
    for url in ("https://site.example/a", f"http://site.example/{text}", text, "http://[::1"):
        assert rules.allows(url) in (True, False)
    assert page_directives(text, [text], text) <= {"noindex", "nofollow"}


def test_of_many_agents_is_not_their_product_with_the_rules() -> None:
    """Without rewriting, 20,000 agents times 20,000 rules."""
    agents = b"".join(b"User-agent: a%d\n" % i for i in range(20_000))
    rules = parse_robots(b"".join((agents, b"User-agent: flatcrawl\n", b"Disallow: /x\n" * 9_000)), USER_AGENT)
    assert not rules.allows("https://site.example/x") and rules.allows("https://site.example/y")


@pytest.mark.parametrize("kind", ROBOTS_LARGE)
def test_of_a_large_file_little_is_kept(kind: str) -> None:
    body = robots_file(ROBOTS_LARGE[kind])
    tracemalloc.start()
    try:
        rules = parse_robots(body, USER_AGENT, "https://site.example/robots.txt")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20 and peak < 24 << 20
    assert kept < 1.5 * rules.size + 20_000  # which is what the frontier counts with


def test_of_a_large_file_counts_to_its_last_line() -> None:
    rules = parse_robots(robots_file(lambda n: f"Disallow: /{n:019}"), USER_AGENT)
    answers = [rules.allows(f"https://site.example/{n:019}/x") for n in (0, 1, 9_000, 16_500, 18_000)]
    assert answers == [True, False, False, False, True]
    assert rules.size < MAX_SIZE and rules.allows(f"https://site.example/{9_000:018}") is True


@pytest.mark.parametrize(
    ("body", "known"),
    [
        (robots_file(ROBOTS_LARGE["wildcards"]), False),
        (b"User-agent: *\n" + b"Disallow: /x*y\n" * 9_000, True),  # one pattern
        (b"User-agent: *\n" + b"".join(b"Disallow: /x*%d\n" % n for n in range(2_000)), True),
        (b"User-agent: *\n" + b"".join(b"Disallow: /x*%d\n" % n for n in range(9_000)), False),
        (b"User-agent: *\n" + b"Allow: /\n" * MAX_LINES, False),
        (b"User-agent: *\nDisallow: /x*y\n" + b"#\n\n" * MAX_LINES, True),
        (b"User-agent: other\n" + b"".join(b"Disallow: /x*%d\n" % n for n in range(9_000)), True),
    ],
)
def test_with_more_rules_than_there_is_room_for_allow_nothing(body: bytes, known: bool) -> None:
    rules = parse_robots(body, USER_AGENT)
    assert (rules is TOO_COSTLY) is not known
    assert rules.allows("https://site.example/z") is (True if known else None)
    assert rules.allows("https://site.example/robots.txt") is True
    assert rules.is_quick("https://site.example/robots.txt") or known


def test_work_for_a_url_and_for_an_origin_is_bounded() -> None:
    lines = [f"Disallow: /x*{n:06}*{n:06}" for n in range(1_500)] + ["Disallow: /x/end", "Allow: /x/*ok"]
    body = "\n".join(["User-agent: *", *lines]).encode()
    rules = parse_robots(body, USER_AGENT)
    assert [rules.is_quick(f"https://site.example/{path}") for path in ("y", "x/end")] == [False, False]
    assert [rules.allows(f"https://site.example/{path}") for path in ("y", "x/end", "x/ok")] == [True, False, True]
    assert rules.allows("https://site.example/x" + "0" * 8_000) is None  # too much for one
    assert rules.allows("https://site.example/y" + "0" * 8_000) is True  # begins with none of the heads
    answers = [rules.allows(f"https://site.example/x/end/{n}") for n in range(2_000)]
    judged = answers.index(None)
    assert 50 < judged < 500 and set(answers[:judged]) == {False} and set(answers[judged:]) == {None}
    fresh = parse_robots(body, USER_AGENT)
    allowed = [fresh.allows(f"https://site.example/x/{what}") for _ in range(2_000) for what in ("end", "ok")]
    assert allowed == [False, True] * 2_000  # one that is allowed makes good for another that is not
    few = parse_robots(b"User-agent: *\nDisallow: /x*/private\nDisallow: /*?sort=", USER_AGENT)
    assert few.is_quick("https://site.example/x?sort=a")
    assert {few.allows(f"https://site.example/x/private/{n}") for n in range(2_000)} == {False}


def test_is_cut_at_a_line_end() -> None:
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
def test_crawl_delay(value: str, delay: float | None) -> None:
    assert parse_robots(f"User-agent: *\nCrawl-delay: {value}".encode(), USER_AGENT).delay == delay


@pytest.mark.parametrize("agent", ["abot", "flatcrawl", "other"])
def test_a_delay_between_two_agents_does_not_split_their_group(agent: str) -> None:
    body = b"User-agent: abot\nCrawl-delay: 7\nUser-agent: flatcrawl\nDisallow: /x\n\nUser-agent: *\nDisallow: /y"
    rules = parse_robots(body, agent)
    assert (rules.delay, rules.allows("http://a/x")) == ((None, True) if agent == "other" else (7.0, False))


def test_delay_of_another_and_sitemaps() -> None:
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
def test_by_outcome(outcome: Response | FetchError, expected: str) -> None:
    rules = rules_for(outcome, USER_AGENT)
    page = "https://site.example/x"
    assert rules.allows(page) is (expected in ("all", "parsed empty"))
    assert rules.allows("https://site.example/robots.txt") and rules.allows("https://site.example/robots.txt?a")
    assert {"all": rules is ALLOW_ALL, "none": rules is DISALLOW_ALL}.get(
        expected, rules not in (ALLOW_ALL, DISALLOW_ALL)
    )
    assert rules.why and (rules.delay, rules.sitemaps) == (None, ())


BOTH = {"noindex", "nofollow"}


@pytest.mark.parametrize(
    ("header", "meta", "found"),
    [
        (None, (), set()),
        ("NoFollow", (), {"nofollow"}),
        ("noarchive, noindex", (), {"noindex"}),
        ("none", (), BOTH),
        ("all", ("follow", "index"), set()),
        ("index", ("noindex",), {"noindex"}),
        ("otherbot: noindex, nofollow", (), set()),
        ("otherbot: noindex\nnofollow", (), {"nofollow"}),
        ("otherbot: noindex, FlatCrawl: nofollow", (), {"nofollow"}),
        ("flatcrawl: none", (), BOTH),
        ("max-snippet: 20, nofollow", (), {"nofollow"}),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noindex", (), {"noindex"}),
        ("nofollowing", ("no index",), set()),
        (None, ("googlebot: noindex", "flatcrawl: nofollow"), {"nofollow"}),
        (None, ("max-image-preview:large", "none"), BOTH),
        ("a: b: c,, :noindex", (), set()),
    ],
)
def test_page_directives(header: str | None, meta: tuple[str, ...], found: set[str]) -> None:
    assert page_directives(header, meta, USER_AGENT) == found


@pytest.mark.parametrize(
    ("tags", "robots", "found"),
    [
        ("<meta name=robots content='noindex,NoFollow'>", ("noindex", "nofollow"), BOTH),
        ("<meta name=FlatCrawl content='noarchive, NOFOLLOW'>", ("flatcrawl: nofollow",), {"nofollow"}),
        ("<meta content=none name=googlebot>", ("googlebot: none",), set()),
        ("<meta name=robots content=none><meta name=googlebot content=all>", ("none",), BOTH),
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
