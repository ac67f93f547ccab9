"""crawl/scope.py: what belongs to a crawl, and traps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crawl.scope import MAX_QUERIES, Scope, Traps, registrable
from tests.helpers.base import HERE, PROGRAM_LIMIT


def scope_of(*seeds: str, **options: Any) -> Scope:
    scope = Scope(**options)
    for seed in seeds:
        scope.add(seed)
    return scope


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
def test_within(within: Any, url: str, why: str | None) -> None:
    seeds = [
        "https://www.site.co.uk/a",
        "http://blog.github.io",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://localhost",
    ]
    assert scope_of(*seeds, "not a URL", within=within).why_not(url) == why


def test_grows_and_refuses_nonsense() -> None:
    scope = scope_of("https://site.example/")
    assert scope.why_not("https://www.site.example/") is not None
    scope.add("https://www.site.example/")
    assert scope.why_not("https://www.site.example/") is None and len(scope.homes) == 2
    for bad in ({"within": "world"}, {"include": ["re:("]}, {"exclude": ["re:*"]}):
        with pytest.raises(ValueError, match=r"must be|regular"):
            Scope(**bad)


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
def test_patterns(include: list[str], exclude: list[str], url: str, why: str | None) -> None:
    assert Scope(within="any", include=include, exclude=exclude).why_not(url) == why


@settings(max_examples=300, deadline=None)
@given(st.text("a*/", max_size=8), st.text("a/", max_size=10))
def test_glob_is_that_of_fnmatch(pattern: str, path: str) -> None:
    import fnmatch

    url = f"https://s/{path}"
    matched = Scope(within="any", exclude=["*/" + pattern]).why_not(url) is not None
    assert matched == fnmatch.fnmatchcase(url, "*/" + pattern)


def test_glob_does_not_backtrack() -> None:
    scope = Scope(within="any", exclude=["*a" * 500 + "*b"])
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
def test_drops_parameters(drop: list[str], url: str, clean: str) -> None:
    scope = Scope(drop_params=drop)
    assert scope.clean(url) == clean == scope.clean(clean)


def test_touches_neither_network_nor_home(tmp_path: Path) -> None:
    script = """
import sys
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename")) or event == "open" and (
            set(str(args[1] or "r")) & set("wax+") or "pycache" not in str(args[0]) and sys.argv[1] in str(args[0])):
        sys.exit(f"{event} {args}")
sys.dont_write_bytecode = True
from crawl import scope
sys.addaudithook(watch)
assert "publicsuffixlist" not in sys.modules
assert scope.registrable("a.b.example.co.uk") == "example.co.uk" and "publicsuffixlist" in sys.modules
"""
    home = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, home],
        env={**os.environ, "HOME": home, "XDG_CACHE_HOME": home, "PYTHONPATH": str(HERE)},
        capture_output=True, text=True, timeout=PROGRAM_LIMIT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.parametrize(
    ("host", "domain"),
    [("www.example.com", "example.com"), ("example.com", "example.com"), ("com", "com"), ("co.uk", "co.uk"),
     ("a.city.kawasaki.jp", "city.kawasaki.jp"), ("x.y.kawasaki.jp", "x.y.kawasaki.jp"), ("10.0.0.1", "10.0.0.1"),
     ("www.xn--85x722f.xn--55qx5d.cn", "xn--85x722f.xn--55qx5d.cn"), ("a.b.unlisted", "b.unlisted"),
     ("www.example.com.", "example.com"), ("..", ".."), ("", "")],
)  # fmt: skip
def test_registrable(host: str, domain: str) -> None:
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
    assert [traps.why_not(f"https://site.example/other?b={n}") for n in range(3)] == [None] * 3


def test_traps_are_bounded_in_memory() -> None:
    traps = Traps(variety=1)
    for i in range(MAX_QUERIES + 5000):
        assert traps.why_not(f"https://site.example/{i}?a") is None
    kept = [i for i in range(MAX_QUERIES + 5000) if traps.why_not(f"https://site.example/{i}?b", note=False)]
    assert kept == list(range(5000, MAX_QUERIES + 5000))
