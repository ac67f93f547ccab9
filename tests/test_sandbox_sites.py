"""sandbox/sites.py, faults.py: do the servers misbehave as they say?"""

from __future__ import annotations

import asyncio
import email.utils
import gc
import gzip
import http.client
import http.server
import importlib
import importlib.machinery
import importlib.util
import itertools
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urljoin, urlsplit

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import faults as sf
from sandbox import sites as sb
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT

SILENCE = 0.25  # seconds for what must not


class Page(HTMLParser):
    """What the tests want to know of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sizes = {"code": 0, "title": 0, "text": 0}
        self.title = ""
        self.inside = "text"
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = {"style": "code", "script": "code", "title": "title"}.get(tag, self.inside)
        if tag == "a":
            self.links.append(dict(attrs)["href"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script", "title"):
            self.inside = "text"

    def handle_data(self, data: str) -> None:
        self.sizes[self.inside] += len(data.encode())
        self.title += data if self.inside == "title" else ""


def talk(
    sandbox: sb.Sandbox,
    target: str,
    host: int = 0,
    method: str = "GET",
    headers: str = "Connection: close\r\n",
    promised: int = 1 << 60,
    limit: int = 1 << 60,
) -> tuple[bytes, str]:
    """Send one request; all bytes that come, and how it ended: "eof", "reset", "silence" after the promised bytes."""
    data = bytearray()
    with socket.create_connection((sandbox.hosts[host], sandbox.port), HANG_LIMIT) as sock:
        sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode("latin-1"))
        while len(data) < limit:
            sock.settimeout(HANG_LIMIT if len(data) < promised else SILENCE)
            try:
                piece = sock.recv(1 << 20)
            except TimeoutError:
                assert len(data) >= promised, f"{target}: nothing more after {bytes(data[-80:])!r}"
                return bytes(data), "silence"
            except ConnectionResetError:
                return bytes(data), "reset"
            if not piece:
                return bytes(data), "eof"
            data += piece
    return bytes(data), "limit"


def sandbox_split(response: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and the rest of a response."""
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    return int(lines[0].split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}, body


@pytest.fixture(scope="module")
def internet() -> Iterator[sb.Sandbox]:
    with sb.Sandbox(hosts=3, pages=30) as sandbox:
        yield sandbox


# --------------------------------------------------------------------------------------------------------------- pages


def test_page_is_a_function_of_its_arguments() -> None:
    pages = {(h, n, seed): sb.make_page(h, n, 9, seed=seed) for h in (0, 1) for n in range(9) for seed in (1, 2)}
    assert pages == {(h, n, seed): sb.make_page(h, n, 9, seed=seed) for h, n, seed in pages}
    titles = {Page(page).title for page in pages.values()}
    assert len(set(pages.values())) == len(titles) == len(pages)
    for n in (-1, 9):
        with pytest.raises(ValueError, match="is not one of 9"):
            sb.make_page(0, n, 9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60_000), st.integers(0, 400), st.integers(1, 400), st.integers(1, 9))
def test_page_has_its_size_or_is_tiny(size: int, page: int, pages: int, hosts: int) -> None:
    page %= pages
    html = sb.make_page(hosts - 1, page, pages, size, hosts=hosts)
    assert len(html) == size or (len(html) < 500 and size < 3_500)
    found = {urlsplit(urljoin(f"http://h{sb.page_path(page)}", a)).path for a in Page(html).links}
    assert found >= {sb.page_path(n) for n in range(8 * page + 1, 8 * page + 9) if n < pages}


def test_page_is_made_like_an_article() -> None:
    for n in range(5):
        page = Page(sb.make_page(3, n, 200, base="http://{host}:99", hosts=8))
        assert 0.28 < page.sizes["text"] / 20_000 < 0.40
        assert 0.12 < page.sizes["code"] / 20_000 < 0.18
        assert 55 <= len(page.links) <= 70 and len(set(page.links)) < len(page.links)
        shapes = [
            r"/p/\d+\.html", r"/p/\d+\.html#.+", r"(p/)?\d+\.html", r"\.\./p/\d+\.html", r"//127\.0\.1\.4:99/.*",
            r"http://127\.0\.1\.4:99/.*", r"http://127\.0\.1\.[1-35-8]:99/.*", r"mailto:.+", r"#main",
        ]  # fmt: skip
        for shape in shapes:
            assert any(re.fullmatch(shape, link) for link in page.links), shape
        assert not any("not/a/link" in link or "commented" in link for link in page.links)


@pytest.mark.parametrize("size", [0, 4_000])
def test_walk_from_the_root_reaches_every_page(size: int) -> None:
    pages = 300
    with sb.Sandbox(hosts=2, pages=pages, page_bytes=size) as sandbox:
        connection = http.client.HTTPConnection(sandbox.hosts[1], sandbox.port, timeout=HANG_LIMIT)
        depth, wave, base = {sandbox.url("/", 1): 0}, [sandbox.url("/", 1)], sandbox.url("", 1)
        while wave:
            url = wave.pop(0)
            connection.request("GET", url.removeprefix(base))
            response = connection.getresponse()
            assert response.status == 200
            for link in Page(response.read()).links:
                to = urljoin(url, link).partition("#")[0]
                if to.startswith(base) and to not in depth:
                    depth[to] = depth[url] + 1
                    wave.append(to)
        connection.close()
        assert set(depth) == {url for url in sandbox.site_urls() if url.startswith(base)}
        assert len(depth) == pages and max(depth.values()) <= 3
        assert sandbox.stats().requests == pages and {entry.connection for entry in sandbox.log} == {1}


# ----------------------------------------------------------------------------------------------------- the sites' HTTP


def test_site_paths(internet: sb.Sandbox) -> None:
    urls = list(internet.site_urls())
    assert len(urls) == len(set(urls)) == 90
    assert urls[:4] == [internet.url("/", 0), internet.url("/", 1), internet.url("/", 2), internet.url("/p/1.html", 0)]
    assert internet.url("/x", 4) == f"http://127.0.1.2:{internet.port}/x"
    base = f"http://{{host}}:{internet.port}"
    for target, page in {"/": 0, "/?q=1": 0, "/p/7.html": 7, "http://127.0.1.2/p/7.html": 7, "http://other": 0}.items():
        status, headers, body = sandbox_split(talk(internet, target, host=1)[0])
        assert (status, int(headers["content-length"])) == (200, len(body))
        assert body == sb.make_page(1, page, 30, base=base, hosts=3)
    for target in (
        "/p/0.html",
        "/p/30.html",
        "/p/01.html",
        f"/p/{'9' * 5000}.html",
        "/p/²",
        "/favicon.ico",
        "/fault/",
        "/x",
    ):
        assert sandbox_split(talk(internet, target)[0])[0] == 404, target
    assert sandbox_split(talk(internet, "/robots.txt")[0])[2] == b"User-agent: *\nAllow: /\n"


def test_head_has_the_headers_of_get(internet: sb.Sandbox) -> None:
    for target in ("/", "/nowhere", "/fault/gzip", "/status/404", "/status/204", "/fault/image"):
        whole, head = talk(internet, target)[0], talk(internet, target, method="HEAD")[0]
        assert head == sf.only_head(whole)
    assert talk(internet, "/status/103", method="HEAD")[0].count(b"\r\n\r\n") == 2


def test_keeps_connections_and_answers_pipelined_requests_in_order(internet: sb.Sandbox) -> None:
    with socket.create_connection((internet.hosts[0], internet.port), HANG_LIMIT) as sock, sock.makefile("rb") as file:
        targets = ["/", "/fault/chunked", "/status/404", "/p/3.html", "/fault/ok", "/p/4.html", "/robots.txt"]
        sent = b"".join(b"GET %b?pipe HTTP/1.1\r\nHost: x\r\n\r\n" % target.encode() for target in targets) * 20
        for n in range(0, len(sent), 7_001):
            sock.sendall(sent[n : n + 7_001])
        for target in targets * 20:
            head = b"".join(iter(file.readline, b"\r\n")) + b"\r\n"
            assert b"Connection: close" not in head
            if target == "/fault/chunked":
                assert b"".join(file.readline() for _ in range(7)).endswith(b"0\r\nX-Trailer: yes\r\n\r\n")
            else:
                assert len(file.read(int(sandbox_split(head)[1]["content-length"])))
        sock.sendall(b"GET / HTTP/1.1\r\nconnection: Keep-Alive, CLOSE\r\n\r\n")
        assert b"\r\nConnection: close\r\n" in file.read()
    asked = [entry for entry in internet.log if entry.path.endswith("?pipe")]
    assert [entry.path for entry in asked] == [f"{target}?pipe" for target in targets] * 20
    assert len({entry.connection for entry in asked}) == 1
    with socket.create_connection((internet.hosts[0], internet.port), HANG_LIMIT) as sock, sock.makefile("rb") as file:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert sandbox_split(file.read())[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\0\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\n" + b"X-Long: y\r\n" * 60_000, 431),
        (b"y" * 400_000, 431),
    ],
)
def test_refuses_what_is_no_request(internet: sb.Sandbox, head: bytes, status: int) -> None:
    with socket.create_connection((internet.hosts[0], internet.port), HANG_LIMIT) as sock, sock.makefile("rb") as file:
        sock.sendall(head)
        answer = file.read()
    assert sandbox_split(answer)[0] == status and b"Connection: close" in answer
    assert internet.log[-1].status == status


def test_latency_delays_one_host_and_not_another() -> None:
    asked: list[tuple[int, str]] = []

    def latency(host: int, path: str) -> float:
        asked.append((host, path))
        return 3600.0 if host == 1 else 0.001

    with sb.Sandbox(hosts=2, latency=latency) as sandbox:
        assert talk(sandbox, "/p/1.html?q", host=1, promised=0) == (b"", "silence")
        assert sandbox_split(talk(sandbox, "/fault/ok")[0])[0] == 200
        assert asked == [(1, "/p/1.html"), (0, "/fault/ok")]
        assert [entry.status for entry in sandbox.log] == [200, 200]


# ------------------------------------------------------------------------------------------------------- the catalogue

HEAD = len(sf.HTML)


# How each entry ends on the wire (for "silence": after how many bytes at least), and what its bytes look like.
WIRE: dict[str, tuple[str | int, str]] = {
    "ok": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>ok</title>.*</a>"),
    "never_answers": (0, ""),
    "closes": ("eof", ""),
    "resets": ("reset", ""),
    "resets_in_body": ("reset", r"HTTP/1.1 200 OK\r\n.*<title>resets_in_body</title>.*"),
    "head_drip": (1, "HT?T?P?"),
    "body_drip": (HEAD, r"HTTP/1.1 200 OK\r\n.*\r\n\r\n<.*"),
    "head_cut": ("eof", r"HTTP/1.1 200 OK\r\n.*\r\nX-Cu"),
    "hangs_in_head": (HEAD, r"HTTP/1.1 200 OK\r\n.*\r\nX-Cu"),
    "hangs_in_body": (HEAD + 50, r"HTTP/1.1 200 OK\r\n.*\r\n\r\n<.*"),
    "closes_keepalive": ("eof", r"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n.*<title>closes_keepalive<.*</a>"),
    "closes_on_reuse": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>closes_on_reuse<.*</a>"),
    "junk_after": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>junk_after<.*</a>HTTP/1.1 200 OK\r\n.*<title>forged<.*"),
    "short_body": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>short_body</title>.*"),
    "extra_bytes": ("eof", r"HTTP/1.1 200 OK\r\n.*</a><p>too much</p>"),
    "bad_length": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: many\d*\r\n.*"),
    "http10": ("eof", r"HTTP/1.0 200 OK\r\nContent-Type: [^\r]*\r\n\r\n<.*<title>http10<.*</a>"),
    "no_length": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\n\r\n<.*<title>no_length<.*</a>"),
    "chunked": (
        "eof",
        r".*chunked\r\n\r\n7;why=not\r\n<title>\r\n0F\r\nchunked</title>\r\n0\r\nX-Trailer: yes\r\n\r\n",
    ),
    "chunk_bad_size": ("eof", r".*chunked\r\n\r\n10\r\n.{16}\r\nzz\r\n.*"),
    "chunk_cut": ("eof", r".*chunked\r\n\r\n1000\r\n<title>cut"),
    "bad_status_line": ("eof", r"HTTP/1.1 abc OK\r\n.*"),
    "not_http": (10, r"SSH-2.0-\S+\r\n"),
    "null_in_header": ("eof", r"HTTP/1.1 200 OK\r\n.*X-Null: a\0b\r\n.*<title>null_in_header<.*"),
    "folded_header": ("eof", r"HTTP/1.1 200 OK\r\n.*text/html;\r\n charset=utf-8\r\n.*<title>folded_header<.*"),
    "many_cookies": ("eof", r"HTTP/1.1 200 OK\r\n.*(Set-Cookie: c\d+=\d+\r\n){500}.*<title>many_cookies<.*"),
    "length_twice": ("eof", r"HTTP/1.1 200 OK\r\n.*(Content-Length: 140\r\n){2}\r\n<.*<title>length_twice<.*"),
    "length_list": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: 138, 138\r\n.*<title>length_list<.*"),
    "lengths_differ": ("eof", r"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n.*Content-Length: 144\r\n.*"),
    "length_signed": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: \+1_7142\r\n.*"),
    "chunked_and_length": (
        "eof",
        r".*Length: 10\r\n.*chunked\r\n\r\n22\r\n<title>chunked_and_length</title>\r\n0\r\n\r\n",
    ),
    "chunk_line_feeds": ("eof", r".*chunked\r\n\r\n1f ;x\n<title>chunk_line_feeds</title>\n0\n\n"),
    "chunk_last_line": ("eof", r".*chunked\r\n\r\n1e\r\n<title>chunk_last_line</title>\r\n0\r\n"),
    "chunk_signed": ("eof", r".*chunked\r\n\r\n\+1f\r\n<title>"),
    "chunk_too_long": ("eof", r".*chunked\r\n\r\n3\r\n<title>\r\n"),
    "transfer_gzip": ("eof", r".*Transfer-Encoding: gzip, chunked\r\n\r\n[0-9a-f]+\r\n\x1f\x8b.*\r\n0\r\n\r\n"),
    "transfer_unknown": ("eof", r".*Transfer-Encoding: x-unheard-of, chunked\r\n.*"),
    "long_header_line": ("eof", r"HTTP/1.1 200 OK\r\nX-Long: x{8992}\r\n.*<title>long_header_line<.*"),
    "no_colon": ("eof", r"HTTP/1.1 200 OK\r\nno colon\r\n.*<title>no_colon<.*"),
    "blank_before_colon": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type : text/html.*<title>blank_before_colon<.*"),
    "bare_cr": ("eof", r"HTTP/1.1 200 OK\r\nX-CR: a\rContent-Length: 3\r\n.*<title>bare_cr<.*"),
    "line_feeds": ("eof", r"HTTP/1.1 200 OK\n[^\r]*\n\n<.*<title>line_feeds<.*"),
    "empty_lines_before": ("eof", r"\r\n\r\nHTTP/1.1 200 OK\r\n.*<title>empty_lines_before<.*"),
    "latin1_in_header": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type: text/html; x=\xe9\r\n.*<title>in</title>"),
    "missing_bad_body": ("eof", r"HTTP/1.1 404 .*Content-Encoding: gzip\r\n\r\nplain"),
    "endless_header_line": ("limit", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\nX-Long: x+"),
    "endless_headers": ("limit", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\n(X-More-\d+: and on\r\n)+[^\n]*\n?"),
    "endless_body": ("limit", r"HTTP/1.1 200 OK\r\nContent-Type: [^\r]*\r\n\r\n<p>.*"),
    "endless_chunks": ("limit", r".*chunked\r\n\r\n[0-9a-f]+\r\n<p>.*\r\n[0-9a-f]+\r\n<p>.*"),
    "huge_page": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: 50000000\r\n\r\n<p>.*"),
    "gzip_bomb": ("eof", r".*Content-Encoding: gzip\r\nContent-Length: 10\d{5}\r\n\r\n\x1f\x8b.*"),
    "gzip_short_body": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Encoding: gzip\r\n\r\n\x1f\x8b.*"),
    "redirect_no_location": ("eof", r"HTTP/1.1 302 Found\r\n(?!.*Location).*<title>redirect_no_location<.*"),
    "always_500": ("eof", r"HTTP/1.1 500 .*"),
    "status": ("eof", r"HTTP/1.1 404 .*"),
    "binary_as_html": ("eof", r"HTTP/1.1 200 OK\r\n.*text/html\r\n.*\0.*"),
    "malformed_html": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>malformed_html<.*<!-- <"),
    "image": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n.*\x89PNG.*"),
    "pdf": ("eof", r"HTTP/1.1 200 OK\r\nContent-Type: application/pdf\r\n.*%PDF.*"),
    "empty_body": ("eof", r"HTTP/1.1 200 OK\r\n.*Content-Length: 0\r\n\r\n"),
    "long_title": ("eof", r"HTTP/1.1 200 OK\r\n.*<title>(long title ){95326}</title>.*"),
    "nested_divs": ("eof", r"HTTP/1.1 200 OK\r\n.*</title>(<div>){100000}deep(</div>){100000}"),
}


KINDS = "ok invalid_url dns connect tls timeout reset protocol truncated too_large redirects decode http"


ELSEWHERE = "gzip deflate brotli zstd plain_as_gzip unknown_encoding redirect retry flaky charset"
UNSPLIT = {"bad_status_line", "line_feeds", "empty_lines_before"}  # those that `sandbox_split` cannot read

# Entries with a Content-Length that is wrong, or whose body is not the length that they were cut to.
BAD_LENGTH = {
    "resets_in_body", "junk_after", "short_body", "extra_bytes", "bad_length", "gzip_short_body", "length_list",
    "length_signed", "chunked_and_length",
}  # fmt: skip


def test_every_entry_is_tested() -> None:
    others = {name for name in sf.FAULTS if name not in WIRE and not name.startswith(tuple(ELSEWHERE.split()))}
    assert others == set() and WIRE.keys() <= sf.FAULTS.keys()
    kinds = set(KINDS.split())
    for name, entry in sf.FAULTS.items():
        assert entry.name == name and entry.about and entry.expect in kinds
        assert entry.path == (f"/fault/{name}" if name != "status" else "/status/404")
        assert entry.needs_retry == 0 or entry.expect == "http"
        assert f"\n{name} " in sf.catalogue()


def test_entries_on_the_wire(internet: sb.Sandbox) -> None:
    def ask(name: str) -> tuple[bytes, str]:
        end = WIRE[name][0]
        promised = end if isinstance(end, int) else 1 << 60
        limit = 3_000_000 if end == "limit" else 1 << 60
        return talk(internet, sf.FAULTS[name].path, promised=promised, limit=limit)

    with ThreadPoolExecutor(8) as pool:
        for name, (data, end) in zip(WIRE, pool.map(ask, WIRE), strict=True):
            wanted, pattern = WIRE[name]
            assert end == ("silence" if isinstance(wanted, int) else wanted), name
            assert re.fullmatch(pattern.encode("latin-1"), data.replace(b"Connection: close\r\n", b""), re.S), name
            if end == "eof" and b"Content-Length" in data and name not in UNSPLIT:
                _, headers, body = sandbox_split(data)
                right = headers["content-length"] == str(len(body))
                assert right != (name in BAD_LENGTH), name
    short = {name: sandbox_split(talk(internet, f"/fault/{name}")[0]) for name in ("short_body", "extra_bytes")}
    assert int(short["short_body"][1]["content-length"]) - 40 == len(short["short_body"][2])
    assert int(short["extra_bytes"][1]["content-length"]) < len(short["extra_bytes"][2])


def test_drips_byte_by_byte() -> None:
    good = sf.reply(sf.simple("x"))
    steps = list(sf.drip(good))
    assert b"".join(step for step in steps if isinstance(step, bytes)) == good
    assert steps[1::2] == [1.0] * len(good) and {len(step) for step in steps[::2] if isinstance(step, bytes)} == {1}


def test_kept_connections_that_go_bad(internet: sb.Sandbox) -> None:
    def twice(name: str) -> tuple[bytes, int]:
        """The bytes up to the end, of two requests, the second one sent when the first answer is complete."""
        request = f"GET /fault/{name}?reused HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        with socket.create_connection((internet.hosts[0], internet.port), HANG_LIMIT) as sock:
            sock.sendall(request)
            data = sock.recv(1 << 16)
            while not data.endswith(b"</a>"):
                data += sock.recv(1 << 16)
            try:
                sock.sendall(request)
                while piece := sock.recv(1 << 16):
                    data += piece
            except OSError:
                data += b""
        return data, len(internet.requests_for(f"/fault/{name}?reused"))

    assert twice("closes_on_reuse") == (sf.reply(sf.simple("closes_on_reuse")), 2)
    data, asked = twice("closes_keepalive")
    assert asked == 1 and sandbox_split(data)[1]["connection"] == "keep-alive"


def test_content_encodings(internet: sb.Sandbox) -> None:
    unpack: dict[str, Any] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
    for label, name, modules in (
        ("br", "brotli", ["brotli"]),
        ("zstd", "zstd", ["compression.zstd", "backports.zstd"]),
    ):
        for module in modules:
            try:
                unpack[label] = importlib.import_module(module).decompress
            except ImportError:
                continue
        assert (name in sf.FAULTS) == (label in unpack) == (f"{name}_bomb" in sf.FAULTS)

    def body(name: str) -> tuple[str, bytes]:
        status, headers, data = sandbox_split(talk(internet, f"/fault/{name}")[0])
        assert status == 200 and headers["content-length"] == str(len(data))
        return headers["content-encoding"], data

    for name, label in {"gzip": "gzip", "deflate_zlib": "deflate", "brotli": "br", "zstd": "zstd"}.items():
        if name in sf.FAULTS:
            said, data = body(name)
            assert said == label and unpack[label](data) == sf.simple(name)
    for name in ("brotli", "zstd"):
        if name in sf.FAULTS:
            said, data = body(f"{name}_bomb")
            assert unpack[said](data) == bytes(32 << 20) and len(data) < 100_000
            with pytest.raises(Exception, match=r"."):
                unpack[said](body(f"{name}_broken")[1])
            with pytest.raises(Exception, match=r"."):
                unpack[said](body(f"{name}_cut")[1])
    said, data = body("gzip_twice")
    assert said == "gzip, gzip" and gzip.decompress(gzip.decompress(data)) == sf.simple("gzip_twice")
    assert zlib.decompress(body("deflate_raw")[1], wbits=-15) == sf.simple("deflate_raw")
    assert body("plain_as_gzip") == ("gzip", sf.simple("plain_as_gzip"))
    assert body("unknown_encoding") == ("x-unheard-of", sf.simple("unknown_encoding"))
    with pytest.raises(zlib.error):
        gzip.decompress(body("gzip_broken")[1])
    for name in ("gzip_cut", "gzip_no_trailer"):
        with pytest.raises(EOFError):
            gzip.decompress(body(name)[1])
    assert zlib.decompressobj(31).decompress(body("gzip_no_trailer")[1]) == sf.simple("gzip_no_trailer")
    stream = zlib.decompressobj(31)
    assert stream.decompress(body("gzip_junk_after")[1]) == sf.simple("gzip_junk_after")
    assert stream.eof and stream.unused_data == b"garbage"


def test_gzip_bomb_is_a_valid_gzip(internet: sb.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sf, "BOMB_BYTES", 64 << 20)
    _, headers, data = sandbox_split(talk(internet, "/fault/gzip_bomb")[0])
    assert gzip.decompress(data) == bytes(64 << 20) and headers["content-length"] == str(len(data))


def test_redirects(internet: sb.Sandbox) -> None:
    def hop(target: str) -> tuple[int, str]:
        status, headers, _ = sandbox_split(talk(internet, target)[0])
        return status, headers.get("location", "")

    def walk(target: str, limit: int = 50) -> list[str]:
        path = [target]
        while len(path) <= limit and (location := hop(path[-1])[1]):
            path.append(location)
        return path

    assert len(walk("/fault/redirect_3")) == 4 and hop(walk("/fault/redirect_3")[-1])[0] == 200
    assert len(walk("/fault/redirect_30")) == 31
    assert len(set(walk("/fault/redirect_loop"))) == 2 and len(set(walk("/fault/redirect_self"))) == 1
    assert hop("/fault/redirect_no_location") == (302, "")
    assert hop("/fault/redirect_file")[1] == "file:///etc/passwd"
    assert hop("/fault/redirect_unresolvable")[1] == "http://x.invalid/"
    assert hop("/fault/redirect_relative") == (301, "../fault/ok")
    assert hop("/fault/redirect_other_host") == (308, internet.url("/fault/ok", 1))
    raw, _ = talk(internet, "/fault/redirect_raw_bytes")
    assert b"\r\nLocation: /fault/ok?caf\xc3\xa9 au lait\r\n" in raw
    closed = urlsplit(hop("/fault/redirect_nowhere")[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((closed.hostname, closed.port), HANG_LIMIT)


def test_entries_that_fail_at_first(internet: sb.Sandbox) -> None:
    ago = time.time()
    for name, entry in sf.FAULTS.items():
        if not entry.needs_retry:
            continue
        url = internet.fault_url(name, key="a").removeprefix(internet.url(""))
        fails = [sandbox_split(talk(internet, url)[0]) for _ in range(entry.needs_retry)]
        status, _, body = sandbox_split(talk(internet, url)[0])
        assert status == 200 and Page(body).title == entry.title == name
        assert {s for s, _, _ in fails} == {int(name.split("_")[1]) if "retry" in name else 500}
        for other in (url + "b", f"/fault/{name}"):
            assert sandbox_split(talk(internet, other)[0])[0] >= 400
        assert sandbox_split(talk(internet, url, host=1)[0])[0] >= 400
        after = fails[0][1].get("retry-after", "")
        if name.endswith(("imf", "rfc850", "asctime")):
            parsed = email.utils.parsedate_tz(after)
            assert parsed is not None and ago + 1 <= email.utils.mktime_tz(parsed) <= time.time() + 2
        else:
            wanted = {
                "seconds": "1",
                "garbage": "soon",
                "negative": "-5",
                "absurd": "1000000000",
                "flaky": "",
                "body": "1",
            }
            assert after == wanted[name.rpartition("_")[2]]
    assert b"Retry-After: 7\r\n" in talk(internet, "/fault/retry_503_seconds?seconds=6.5")[0]
    statuses = [sandbox_split(talk(internet, "/fault/flaky?n=4")[0])[0] for _ in range(5)]
    assert statuses == [500] * 4 + [200]
    for value in ("nan", "inf", "-1", "x", "", "9" * 5000):
        assert sandbox_split(talk(internet, f"/fault/retry_503_imf?seconds={value}")[0])[0] == 503


@given(st.integers(0, 4_000_000_000))
def test_http_dates_are_those_of_the_rfc(t: int) -> None:
    weekday, day, month, year, clock, _ = email.utils.formatdate(t, usegmt=True).split()
    full = {"Tue,": "Tuesday,", "Wed,": "Wednesday,", "Thu,": "Thursday,", "Sat,": "Saturday,"}
    assert sf.http_date("imf", t) == f"{weekday} {day} {month} {year} {clock} GMT"
    assert sf.http_date("rfc850", t) == (
        f"{full.get(weekday, weekday[:-1] + 'day,')} {day}-{month}-{year[2:]} {clock} GMT"
    )
    assert sf.http_date("asctime", t) == f"{weekday[:-1]} {month} {int(day):2} {clock} {year}"


def test_every_status(internet: sb.Sandbox) -> None:
    def ask(code: int) -> tuple[bytes, str]:
        return talk(internet, f"/status/{code}")

    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(range(100, 600), pool.map(ask, range(100, 600)), strict=True))
    for code, (data, end) in answers.items():
        status, headers, body = sandbox_split(data)
        assert status == code and end == "eof"
        if code == 101:
            assert headers["connection"] == "Upgrade" and body == b""
        elif code < 200:
            status, headers, body = sandbox_split(body)
            assert status == 200 and headers["content-length"] == str(len(body)) and b"<title>" in body
        elif code in (204, 304):
            assert body == b"" and "content-length" not in headers
        else:
            assert headers["content-length"] == str(len(body)) and bool(body) == (code != 205)
        assert (sf.status_expect(code) == "http") == (code >= 400)
    for bad in ("99", "600", "999", "abc", "2000", "²00", ""):
        assert sandbox_split(talk(internet, f"/status/{bad}")[0])[0] == 404


def test_charsets(internet: sb.Sandbox) -> None:
    codecs = {"windows_1251": "cp1251", "shift_jis": "shift_jis", "gb18030": "gb18030", "utf_16": "utf-16"}
    codecs |= {"missing": "cp1252", "unknown": "ascii", "wrong": "cp1252"}
    assert {f"charset_{name}" for name in codecs} == {name for name in sf.FAULTS if name.startswith("charset")}
    for name, codec in codecs.items():
        _, headers, body = sandbox_split(talk(internet, f"/fault/charset_{name}")[0])
        title = body.decode(codec).removeprefix("<title>").removesuffix("</title>")
        assert title == (sf.FAULTS[f"charset_{name}"].title or "Café")
        label = headers["content-type"].partition("charset=")[2].replace("-", "_")
        assert label == {"utf_16": "", "missing": "", "unknown": "klingon", "wrong": "utf_8"}.get(name, name)
        if name in ("missing", "wrong"):
            with pytest.raises(UnicodeDecodeError):
                body.decode("utf-8")


# -------------------------------------------------------------------------------------------- back-pressure, log, life


class SandboxTransport(asyncio.Transport):
    """A transport whose peer has stopped reading."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.protocol: sb.SiteConnection | None = None
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(data)
        if self.protocol and sum(map(len, self.written)) > 65_536:
            self.protocol.pause_writing()

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.written.append(b"(paused)")

    def resume_reading(self) -> None:
        return


@pytest.mark.parametrize("target", ["/fault/endless_body", "/fault/endless_headers", "/fault/huge_page", "/"])
def test_stops_writing_when_the_peer_stops_reading(target: str) -> None:
    async def scenario() -> None:
        transport = SandboxTransport()
        transport.protocol = connection = sb.SiteConnection(sb.Sandbox(), 0)
        connection.connection_made(transport)
        connection.data_received(f"GET {target} HTTP/1.1\r\n\r\n".encode() * 100)
        for _ in range(3):
            for _ in range(100):
                await asyncio.sleep(0)
            assert connection.choked and 65_536 < sum(map(len, transport.written)) < 2 * 66_000
            transport.written.clear()
            connection.resume_writing()
        connection.data_received(b"GET /" + b"y" * sb.HEAD_LIMIT)
        assert transport.written[-1] == b"(paused)"
        connection.connection_lost(None)

    asyncio.run(scenario())


def test_holds_back_what_comes_before_tls_is_ready() -> None:
    async def scenario() -> None:
        plain, encrypted = SandboxTransport(), SandboxTransport()
        connection = sb.SiteConnection(sb.Sandbox(), 0)
        connection.connection_made(plain)

        async def start_tls(*args: object, **kwargs: object) -> asyncio.Transport:
            connection.data_received(b"GET /fault/ok HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0)
            assert plain.written == [] and connection.sandbox.log == []
            return encrypted

        setattr(connection.loop, "start_tls", start_tls)  # noqa: B010
        connection.handshake = asyncio.ensure_future(connection._start_tls(ssl.create_default_context()))
        await connection.handshake
        assert plain.written == [] and encrypted.written == [sf.reply(sf.simple("ok"))]

    asyncio.run(scenario())


def test_gives_others_their_turn() -> None:
    async def scenario() -> None:
        transport = SandboxTransport()  # takes everything, never full
        connection = sb.SiteConnection(sb.Sandbox(), 0)
        connection.connection_made(transport)
        connection.data_received(b"GET /fault/endless_body HTTP/1.1\r\n\r\n")
        assert 1 < len(transport.written) < 10
        connection.connection_lost(None)
        await asyncio.sleep(0)
        assert len(transport.written) < 10

    asyncio.run(scenario())


def test_no_first_answer_takes_longer_than_packing_a_bomb_once_does() -> None:
    program = """if True:
        import time, zlib
        from sandbox import faults, sites

        def cost(make):
            began = time.thread_time()
            make()
            return time.thread_time() - began

        usual = max(cost(lambda: zlib.compress(bytes(1 << 25))) for _ in range(3))
        with sites.Sandbox() as web:
            for name, fault in faults.FAULTS.items():
                request = faults.SiteRequest(web, 0, "GET", fault.path, fault.path, False)
                route = fault.path if name != "status" else "/status/"
                spent = cost(lambda: next(iter(faults.ROUTES[route](request))))
                if spent > 2 * usual:
                    print(name, spent, usual)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=HERE, timeout=PROGRAM_LIMIT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 30))
def test_window_count_equals_the_plain_definition(times: list[int], seconds: int) -> None:
    times.sort()
    slow = max((sum(1 for t in times if start <= t < start + seconds) for start in times), default=0)
    assert sb.max_in_window(times, seconds) == slow


def test_log() -> None:
    before = time.monotonic()
    with sb.Sandbox(hosts=2, pages=3, page_bytes=0) as sandbox:
        for target in ("/", "/x?a", "/fault/closes", "/x?b", "/fault/not_http"):
            talk(sandbox, target, promised=20 if "not_http" in target else 1 << 60)
        talk(sandbox, "/p/1.html", host=1)
        log = sandbox.log
        assert [entry[1:] for entry in log] == [
            ("127.0.1.1", "/", 200, 1),
            ("127.0.1.1", "/x?a", 404, 2),
            ("127.0.1.1", "/fault/closes", None, 3),
            ("127.0.1.1", "/x?b", 404, 4),
            ("127.0.1.1", "/fault/not_http", None, 5),
            ("127.0.1.2", "/p/1.html", 200, 6),
        ]
        times = [before, *(entry.t for entry in log), time.monotonic()]
        assert times == sorted(times)
        assert sandbox.requests_for("/x") == [log[1], log[3]] and sandbox.requests_for("/x?b") == [log[3]]
        assert sandbox.max_in_window(0, 1e9) == 5 and sandbox.max_in_window(1, 1e9) == 1
        stats = sandbox.stats()
        assert (stats.requests, stats.connections) == (6, 6) and stats.statuses == {200: 2, 404: 2, None: 2}
        assert "2 hosts of 3 pages" in repr(sandbox) and "requests=6" in repr(sandbox)
    for keep, left in ((2, ["/b", "/c"]), (False, []), (True, ["/a", "/b", "/c"])):
        with sb.Sandbox(hosts=1, log=keep) as sandbox:
            for target in ("/a", "/b", "/c"):
                talk(sandbox, target)
            assert [entry.path for entry in sandbox.log] == left and sandbox.stats().requests == 3


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb, "CACHE_BYTES", 12_000)
    monkeypatch.setattr(sb, "COUNTS_LIMIT", 3)
    sandbox = sb.Sandbox(hosts=2, pages=9, page_bytes=5_000)
    for host, page in itertools.product(range(2), range(9)):
        assert sandbox._page(host, page) == sandbox._page(host, page)
        assert sandbox._cached == sum(map(len, sandbox._cache.values())) <= 12_000
    assert [sandbox._count(0, target) for target in "aabcdda"] == [1, 2, 1, 1, 1, 2, 1] and len(sandbox._counts) == 3


@pytest.mark.parametrize("encrypted", [False, True])
def test_stops_whatever_hangs(encrypted: bool, caplog: pytest.LogCaptureFixture) -> None:
    contexts = Tls.contexts() if encrypted else None
    threads = set(threading.enumerate())
    names = [
        "never_answers",
        "head_drip",
        "body_drip",
        "hangs_in_body",
        "not_http",
        "endless_body",
        "endless_headers",
        "gzip_bomb",
    ]
    with sb.Sandbox(hosts=2, tls=contexts[0] if contexts else None) as sandbox:
        sockets: list[socket.socket] = []
        for name, host in itertools.product(names, (0, 1)):
            sock = socket.create_connection((sandbox.hosts[host], sandbox.port), HANG_LIMIT)
            if contexts:
                sock = contexts[1].wrap_socket(sock, server_hostname=sandbox.hosts[host])
            sock.sendall(f"GET {sf.FAULTS[name].path} HTTP/1.1\r\n\r\n".encode())
            sockets.append(sock)
        # Connected, but silent: idle, or in the middle of a handshake.
        sockets += [socket.create_connection((host, sandbox.port), HANG_LIMIT) for host in sandbox.hosts * 3]
        sockets[-1].sendall(b"GET / HT")
        assert tls_get(sandbox, contexts, "/robots.txt").endswith(b"Allow: /\n")
    assert set(threading.enumerate()) == threads and sandbox.stats().open == 0
    for sock in sockets:
        with sock:
            try:
                while sock.recv(1 << 20):
                    pass
            except OSError as error:
                assert not isinstance(error, TimeoutError)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((sandbox.hosts[0], sandbox.port), HANG_LIMIT)
    sandbox.stop()
    gc.collect()
    assert caplog.records == []


class Tls:
    """A server and a client context that trust each other, made once."""

    made: ClassVar[list[tuple[ssl.SSLContext, ssl.SSLContext]]] = []

    @classmethod
    def contexts(cls) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        if not cls.made:
            authority = trustme.CA()
            server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
            authority.issue_cert("127.0.1.1", "127.0.1.2").configure_cert(server)
            authority.configure_trust(client)
            cls.made.append((server, client))
        return cls.made[0]


def tls_get(sandbox: sb.Sandbox, contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None, path: str) -> bytes:
    if contexts is None:
        return talk(sandbox, path)[0]
    connection = http.client.HTTPSConnection(sandbox.hosts[0], sandbox.port, timeout=HANG_LIMIT, context=contexts[1])
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


def test_tls_serves_the_same_site() -> None:
    contexts = Tls.contexts()
    with sb.Sandbox(hosts=1, pages=3, tls=contexts[0]) as sandbox:
        assert sandbox.url("/") == f"https://127.0.1.1:{sandbox.port}/"
        for page in range(3):
            wanted = sb.make_page(0, page, 3, base=f"https://{{host}}:{sandbox.port}")
            assert tls_get(sandbox, contexts, sb.page_path(page)) == wanted
        assert len(tls_get(sandbox, contexts, "/fault/huge_page")) == 50_000_000
        with socket.create_connection((sandbox.hosts[0], sandbox.port), HANG_LIMIT) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")  # no TLS at all: refused, and nothing is served
            assert b"HTTP" not in sock.recv(1 << 16)
        assert sandbox.stats().requests == 4


def test_misuse() -> None:
    for bad in ({"hosts": 0}, {"pages": 0}, {"page_bytes": -1}, {"port": 70_000}, {"hosts": 10**6}):
        with pytest.raises(ValueError, match="needed"):
            sb.Sandbox(**bad)  # type: ignore[arg-type]
    with sb.Sandbox(hosts=2) as sandbox:
        with pytest.raises(RuntimeError, match="running"):
            sandbox.start()
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.1\.1:{sandbox.port}: "):
            sb.Sandbox(hosts=1, port=sandbox.port).start()
        with pytest.raises(KeyError):
            sandbox.fault_url("no such")
    sandbox.start()
    assert sandbox_split(talk(sandbox, "/")[0])[0] == 200
    sandbox.stop()
    gc.collect()


def sandbox_command(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sandbox", *args]
    return subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    for number, urls in ((signal.SIGINT, "-"), (signal.SIGTERM, str(tmp_path / "urls.txt"))):
        with sandbox_command("--hosts", "2", "--pages", "3", "--size", "0", "--port", "0", "--urls", urls) as process:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r"http://127.0.1.1:\d+/", process.stderr.readline())
            assert found is not None
            listed = process.stdout.read() if urls == "-" else ""  # the list ends although the server goes on
            target = urlsplit(found[0])
            with (
                socket.create_connection((target.hostname, target.port), HANG_LIMIT) as sock,
                sock.makefile("rb") as file,
            ):
                sock.sendall(b"GET /p/2.html HTTP/1.0\r\n\r\n")
                assert sandbox_split(file.read())[0] == 200
            process.send_signal(number)
            _, errors = process.communicate(timeout=PROGRAM_LIMIT)
            assert (process.returncode, errors) == (130, "")
            lines = (listed or Path(urls).read_text()).splitlines()
            assert len(lines) == 6 and lines[5] == f"http://127.0.1.2:{target.port}/p/2.html"


def test_command_explains_itself(tmp_path: Path) -> None:
    with sandbox_command("--list") as listing, sandbox_command("--help") as about:
        table = listing.communicate(timeout=PROGRAM_LIMIT)[0].splitlines()
        text = about.communicate(timeout=PROGRAM_LIMIT)[0]
    assert len(table) == len(sf.FAULTS) + 1 and (listing.returncode, about.returncode) == (0, 0)
    assert all(line in text for line in table) and "examples:" in text
    with sb.Sandbox(hosts=1) as sandbox:
        wrong = (
            (["--port", str(sandbox.port)], 1, "cannot listen"),
            (["--hosts", "0"], 2, "needed"),
            (["--port", "0", "--urls", str(tmp_path / "no" / "urls")], 1, "urls: No such file"),
        )
        for args, code, message in wrong:
            with sandbox_command(*args) as process:
                errors = process.communicate(timeout=PROGRAM_LIMIT)[1].splitlines()
            assert process.returncode == code and message in errors[-1] and errors[-1].startswith("sandbox: ")
            assert not any("Traceback" in line for line in errors)
