"""Credentials stay with the host they were given for."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.headers import request_headers
from crawl.model import Options, Request
from crawl.urls import is_secret, normalise, split_credentials
from tests.helpers.crawl import (
    DRIVERS,
    PUBLIC,
    RAW_OK,
    RawAnswer,
    RawWeb,
    Web,
    guard_errors,
    guard_scrape,
    raw_answer,
    run_here,
    scrape,
)

SECRETS = (
    ("Authorization", "Bearer t"), ("Cookie", "c=1"), ("X-Api-Key", "k"), ("X-JWT", "t"), ("Accept-Language", "cs"),
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
def test_who_sees_the_credentials_of_the_command_line(url: str, target: str, more: dict[str, Any], kept: bool) -> None:
    request = Request(url, target, normalise(target)[1], **more)
    headers = request_headers(Options(headers=SECRETS), request, {"http://a.example"})[1]
    own = [name for name, _ in SECRETS]
    expected = own if kept else ["Accept-Language"]
    if "@" in target:
        assert headers.pop("Authorization") == "Basic " + base64.b64encode(b"a.example:").decode()
    assert [name for name in headers if name in own] == expected
    assert not {"Referer", "Origin"} & set(headers)


def test_which_headers_hold_secrets() -> None:
    for name in ("Authorization", "Proxy-Authorization", "Cookie", "Cookie2", "X-API-Key", "PRIVATE-TOKEN", "X-CSRF",
                 "X-Amz-Security-Token", "X-Session-Id", "api_secret", "X-Password", "X-JWT", "X-Sig", "X-Pwd", "X-OTP",
                 "X-Other", "Referer", "Origin", "X-Accept", "Accept-X"):  # fmt: skip
        assert is_secret(name)
    for name in ("Accept", "accept-language", "User-Agent", "DNT", "Cache-Control", "Sec-CH-UA-Platform", "Sec-GPC"):
        assert not is_secret(name)


def test_the_list_names_the_origins() -> None:
    crawl = Crawl(Options(headers=SECRETS))
    crawl.feed(["http://A.example:80/x", "not a URL", "https://u:p@b.example:8443/"]).join()
    assert crawl.listed.origins == {"http://a.example", "https://b.example:8443"}
    crawl = Crawl(Options(headers=(("DNT", "1"),)))
    crawl.feed(["http://a.example/"]).join()
    assert crawl.listed.origins is None


@pytest.mark.parametrize("driver", DRIVERS)
def test_credentials_on_the_wire(driver: str, guarded: Web) -> None:
    guarded.names |= {name: [[PUBLIC]] for name in ("a.example", "b.example", "c.example", "d.example")}
    other = f"http://a.example:{guarded.other_port}/port"
    urls = [
        "http://a.example/to/http://a.example/same",
        "http://a.example/to/http://b.example/host",
        f"http://a.example/to/{other}",
        "http://a.example/to/http://b.example/to/http://a.example/to//back",
        "http://u:p@c.example/to/http://d.example/host2",
        "http://u:p@c.example/to//home",
    ]
    rows = guard_scrape(driver, urls, headers=SECRETS)
    assert guard_errors(rows) == [None] * 6
    own = {name.lower() for name, _ in SECRETS}
    sent = ((path, {name: head[name] for name in own & set(head)}) for path, head in guarded.heads)
    seen = {path: {name for name in known if known[name] != "theirs=1"} for path, known in sent if "/to/" not in path}
    harmless = {"accept-language"}
    assert seen == {
        "/same": own,
        "/home": own,
        **dict.fromkeys(["/host", "/port", "/back", "/host2"], harmless),
    }
    basic = "Basic " + base64.b64encode(b"u:p").decode()
    assert {head["host"] for _, head in guarded.heads if head.get("authorization") == basic} == {"c.example"}
    for _, head in guarded.heads:
        assert not {"referer", "origin", "proxy-authorization"} & set(head)


@pytest.mark.parametrize(
    ("line", "text", "credentials"),
    [
        ("http://h/x@y", "http://h/x@y", ""), ("http://u:p@h/", "http://h/", "u:p"), ("http://u@h", "http://h", "u"),
        ("HTTPS://u:p@h:1/?a@b", "HTTPS://h:1/?a@b", "u:p"), ("http://u:p%40@q@h/", "http://h/", "u:p%40@q"),
        ("http:u:p@h/", "http:h/", "u:p"), ("http:\\\\u:p@h/", "http:\\\\h/", "u:p"),
        ("ht\ttp://u:p@h/", "http://h/", "u:p"), ("ftp://u:p@h/", "ftp://h/", "u:p"),
        ("http://u:p@no host/", "http://no host/", "u:p"), ("mailto:u@h", "mailto:u@h", ""), ("u@h", "u@h", ""),
        ("http://u:p@[::1]:8/x", "http://[::1]:8/x", "u:p"), ("sip:u@h", "sip:u@h", ""), ("acct:u@h", "acct:u@h", ""),
        *((line, line.replace("u:s@", "<password>"), "")
          for line in ('"http://u:s@h/"', "//u:s@h/x", "u:s@h/x", "<http://u:s@h/>", "- http://u:s@h/", "http//u:s@h/",
                       "view-source:http://u:s@h/", "url(http://u:s@h/)", "\u200bhttp://u:s@h/")),
        ("http://u:s/t@h/", "http://<password>h/", ""), ("http://u:s?t@h/", "http://<password>h/", ""),
        ("u:s@http://h/x", "<password>http://h/x", ""), ("u:s#t@h", "<password>h", ""),
    ],
)  # fmt: skip
def test_a_line_of_the_list_without_its_credentials(line: str, text: str, credentials: str) -> None:
    assert split_credentials(line) == (text, credentials)
    if "<password>" in text:
        with pytest.raises(FetchError):
            normalise(text)


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_first_user_of_a_url_is_the_one(driver: str) -> None:
    with RawWeb({f"/{n}": [[RAW_OK]] for n in "xyz"}) as web:
        lines = [web.url(path).replace("//", f"//{user}@")
                 for path, user in (("/x", "a:1"), ("/x", "b:2"), ("/y", "b:2"), ("/z", "c:%E9%FF"))]  # fmt: skip
        rows = scrape(driver, lines, concurrency=1)
    assert Counter(row.url for row in rows) == Counter(web.url(path) for path in ("/x", "/y", "/z"))
    sent = {head.split()[1]: base64.b64decode(head.partition(b"Basic ")[2].split(b"\r")[0]) for head in web.heads}
    assert sent == {b"/x": b"a:1", b"/y": b"b:2", b"/z": b"c:\xe9\xff"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_explain_sends_nothing_secret_to_others(driver: str, capfd: pytest.CaptureFixture[str]) -> None:
    robots: dict[str, list[RawAnswer]] = {"/robots.txt": [[raw_answer(b"User-agent: *\nDisallow: /q\n")]]}
    with RawWeb(dict(robots)) as ours, RawWeb(dict(robots)) as other:
        for web, secret in ((ours, True), (other, False)):
            argv = [ours.url("/").replace("//", "//u:p@"), "--depth", "1", "--within", "any", "--header", "X-JWT: s3"]
            code, out, err = run_here(capfd, driver, *argv, "--explain", web.url("/q"))
            assert (code, out.startswith("no:"), err) == (0, True, "")
            assert (b"s3" in web.heads[0], b"Basic" in web.heads[0]) == (secret, secret)


@pytest.mark.parametrize("driver", [*DRIVERS, "crawl_async --processes 2"])
def test_passwords_of_the_list_are_written_nowhere_and_good_for_their_origin(
    driver: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    html = "Content-Type: text/html"
    page = b"<title>t</title><a href=/deep>d</a><a href=two>2</a>"
    out, stats = tmp_path / "rows.jsonl", tmp_path / "stats.json"
    with RawWeb({}) as other, RawWeb({}) as web:
        web.answers = {
            "/": [[raw_answer(page + b"<a href=" + other.url("/o").encode() + b">o</a>", "200 OK", html)]],
            "/deep": [[raw_answer(b"", "302 Found", f"Location: {other.url('/moved')}")]],
            "/two": [[RAW_OK]],
            "/mine": [[RAW_OK]],
        }
        urls = tmp_path / "urls.txt"
        secret = web.url("/").replace("//", "//us%65r:se%63ret@")
        own = web.url("/mine").replace("//", "//own:secret2@")
        urls.write_text(f"{secret}\n{own}\nhttp://u:secret3@no host/\nftp://u:secret4@h/\n")
        argv = [str(urls), "--depth", "1", "--rate", "0", "--within", "any", "-o", str(out), "--stats", str(stats)]
        code, _, err = run_here(capfd, driver, *argv, "--resume")
        assert code == 0
        heads = {head.split()[1].decode(): head for head in [*web.heads, *other.heads]}
        signed = {path: b"authorization: basic" in head.lower() for path, head in heads.items()}
        assert signed == {"/robots.txt": False, **dict.fromkeys(["/", "/deep", "/two", "/mine", "/x"], True),
                          "/o": False, "/moved": False}  # fmt: skip
        assert base64.b64encode(b"user:secret") in heads["/two"] and base64.b64encode(b"own:secret2") in heads["/mine"]
        asked = len(web.asked) + len(other.asked)
        assert run_here(capfd, driver, *argv, "--resume")[0] == 0
        assert len(web.asked) + len(other.asked) == asked, "the rows are those of the lines"
    text = out.read_text()
    assert "secret" not in text + err + stats.read_text() and "se%63ret" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["url"] for row in rows} >= {web.url(path) for path in ("/", "/deep", "/two", "/mine")}


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_cookie_that_is_set_is_not_sent(driver: str, guarded: Web) -> None:
    assert guard_errors(guard_scrape(driver, [f"http://public.example/{n}" for n in range(3)])) == [None] * 3
    assert not any("cookie" in head for _, head in guarded.heads)
