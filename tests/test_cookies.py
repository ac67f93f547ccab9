"""crawl/cookies.py: what is kept, and where it goes."""

from __future__ import annotations

import pytest

from crawl.cookies import LONGEST, MOST, header, store


@pytest.mark.parametrize(
    ("lines", "url", "sent"),
    [
        ("a=1", "http://h/x", "a=1"),
        ("a=1; Path=/", "http://h/other/deep", "a=1"),
        ("a=1", "http://h/other", "a=1"),
        ("a=1", "http://other/x", ""),
        ("a=1; Domain=h", "http://sub.h/x", ""),
        ("a=1; Path=/x", "http://h/x/y?q", "a=1"),
        ("a=1; Path=/x", "http://h/xy", ""),
        ("a=1; Path=/x/", "http://h/x", ""),
        ("a=1; path=x", "http://h:81/", "a=1"),
        ("a=1; Secure", "https://h/", ""),
        ("a=1\nb=2; path=/x\na=3", "http://h/x", "b=2; a=3"),
        ("a=b=c", "http://h/", "a=b=c"),
        ("a=1\na=; Max-Age=0", "http://h/", ""),
        ("a=1\na=; Max-Age=-1", "http://h/", ""),
        ("a=1; Max-Age=5", "http://h/", "a=1"),
        ("a=1; Expires=Thu, 01 Jan 1970 00:00:00 GMT", "http://h/", ""),
        ("a=1; expires=never", "http://h/", "a=1"),
        ("", "http://h/", ""),
        ("a", "http://h/", ""),
        ("=", "http://h/", ""),
        ("a=é", "http://h/", ""),
        ("a=\x01", "http://h/", ""),
        ("=v", "http://h/", "v"),
        ('a="1, 2" ; HttpOnly', "http://h/", 'a="1, 2"'),
    ],
)
def test_where_a_cookie_goes(lines: str, url: str, sent: str) -> None:
    assert header(store((), "http://h/first", lines), url) == sent


def test_secure_ones_go_over_tls() -> None:
    known = store((), "https://h/", "a=1; Secure\nb=2")
    assert (header(known, "https://h/"), header(known, "http://h/")) == ("a=1; b=2", "b=2")


def test_they_are_bounded() -> None:
    many = store((), "http://h/", "\n".join(f"c{n}=1" for n in range(500)))
    assert header(many, "http://h/").split("; ") == [f"c{n}=1" for n in range(500 - MOST, 500)]
    assert store((), "http://h/", "a=" + "x" * LONGEST) == ()
    assert [one.name for one in store(many, "http://h/", "a=" + "x" * (LONGEST - 1))] == ["a"]
