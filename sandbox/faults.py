"""The answers of the sandbox's servers: what a handler is, good replies, and the catalogue of misbehaviour.

A *handler* maps a `SiteRequest` to an answer: `bytes` (one well-formed response), or a *script*, an iterable of steps:
bytes to write, a float (seconds of silence), or `CLOSE`, `RESET`, `DOOM`. A script that runs out leaves the connection
open for the next request. Scripts never touch a socket, so an endless answer is an endless iterator.

`@fault` registers a handler with what it does and what a well-behaved client makes of it (`FAULTS`); `@route` registers
a plain path, or a prefix if it ends in "/". `sites.py` has the server that plays them. Everything here runs in that
server's event loop, and nothing here waits, or reads any state but the sandbox's.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import gzip
import http
import importlib
import importlib.util
import itertools
import math
import random
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from sandbox.sites import Sandbox

FOREVER = 86_400.0  # seconds

PHRASES = {status.value: status.phrase for status in http.HTTPStatus}

CLOSE, RESET, DOOM = "close", "reset", "go on, but at the next request close"  # the steps that end a connection
Step = bytes | float | str


@dataclass(slots=True)
class SiteRequest:
    """A request head. `target` is as sent (latin-1), less any scheme and authority; `path` is that less the query."""

    sandbox: Sandbox
    host: int
    method: str
    target: str
    path: str
    close: bool
    cookie: str = ""  # of the Cookie header

    @property
    def name(self) -> str:
        """The last part of the path: for an entry of the catalogue, its name."""
        return self.path.rpartition("/")[2]

    def number(self, key: str, default: float) -> float:
        """A query parameter as a number from 0 to `FOREVER`; `default` if it is absent or not a number."""
        try:
            value = float(parse_qs(self.target.partition("?")[2])[key][0])
        except (KeyError, ValueError):
            value = default
        return min(max(0.0, value), FOREVER)


Answer = bytes | Iterable[Step]
Handler = Callable[[SiteRequest], Answer]


@dataclass(frozen=True, slots=True)
class Fault:
    """An entry of the catalogue.

    `expect`: the result that is right for a client that does not retry, follows at most 20 redirects, and takes 256 KB
    of header and 10 MB of unpacked body: "ok" or an error kind. `needs_retry`: how many retries make it "ok". `title`:
    the page's title where the result is "ok", None where that is not promised. `heavy`: there is more than 1 MB to read
    or to unpack.
    """

    name: str
    path: str
    about: str
    expect: str
    needs_retry: int = 0
    title: str | None = None
    heavy: bool = False


FAULTS: dict[str, Fault] = {}
ROUTES: dict[str, Handler] = {}


def route(path: str) -> Callable[[Handler], Handler]:
    """Register a handler for a path, or for a prefix that ends in "/"."""

    def register(handler: Handler) -> Handler:
        ROUTES[path] = handler
        return handler

    return register


def fault(
    name: str, about: str, expect: str, *, path: str = "", retries: int = 0, title: str | None = "", heavy: bool = False
) -> Callable[[Handler], Handler]:
    """Register a handler as an entry; `title` is the name unless told otherwise."""
    if title == "":
        title = name if retries or expect == "ok" else None
    path = path or f"/fault/{name}"
    FAULTS[name] = Fault(name, path, about, expect, retries, title, heavy)
    return route(path)


def reply(body: bytes, status: int = 200, *headers: str, kind: str = "text/html; charset=utf-8") -> bytes:
    """A complete, well-formed response with its Content-Length."""
    phrase = PHRASES.get(status, "Unnamed")
    lines = [f"HTTP/1.1 {status} {phrase}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def simple(title: str) -> bytes:
    """A short good page."""
    text = f"<h1>{title}</h1><p>There is nothing wrong with this page.</p><a href=/>home</a>"
    return f"<!doctype html><html lang=en><title>{title}</title>{text}".encode()


def plus(response: bytes, *headers: bytes) -> bytes:
    """A response with more header lines."""
    return response.replace(b"\r\n", b"\r\n" + b"".join(header + b"\r\n" for header in headers), 1)


def only_head(response: bytes) -> bytes:
    """A response without its body, as HEAD wants it."""
    return response[: response.index(b"\r\n\r\n") + 4]


# --- The catalogue ---------------------------------------------------------------------------------------------------

HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
CHUNKED = HTML + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB_BYTES = 1 << 30
LOREM = (b"<p>" + b"All work and no play makes a page too dull to read. " * 19 + b"so.\n</p>\n") * 50


def wire(name: str, about: str, expect: str, make: Callable[[bytes], Answer], heavy: bool = False) -> None:
    """An entry that is made of a good response, whose page has the entry's name as its title."""
    fault(name, about, expect, heavy=heavy)(lambda request: make(reply(simple(name))))


def drip(data: bytes) -> Iterator[Step]:
    return itertools.chain.from_iterable((data[n : n + 1], 1.0) for n in range(len(data)))


# fmt: off
wire("ok", "a good page, to compare with", "ok", lambda good: good)
wire("never_answers", "reads the request and stays silent", "timeout", lambda good: [FOREVER])
wire("closes", "closes without a byte", "reset", lambda good: [CLOSE])
wire("resets", "resets (RST) without a byte", "reset", lambda good: [RESET])
wire("resets_in_body", "resets in the middle of the body", "truncated", lambda good: [good[:-40], 0.05, RESET])
wire("head_drip", "the head at one byte a second", "timeout", drip)
wire("body_drip", "the body at one byte a second", "timeout", lambda good: [good[:-99], *drip(good[-99:])])
wire("head_cut", "closes in the middle of the head", "reset", lambda good: [HTML + b"X-Cu", CLOSE])
wire("hangs_in_head", "stops in the middle of the head, stays open", "timeout", lambda good: [HTML + b"X-Cu", FOREVER])
wire("hangs_in_body", "stops in the middle of the body, stays open", "timeout", lambda good: [good[:-40], FOREVER])
wire("closes_keepalive", "promises keep-alive, then closes at once", "ok",
     lambda good: [plus(good, b"Connection: keep-alive"), CLOSE])
wire("closes_on_reuse", "a good page; closes at the connection's next request", "ok", lambda good: [good, DOOM])
wire("junk_after", "a good page, then a forged response", "ok", lambda good: [good + reply(simple("forged"))])

wire("short_body", "Content-Length larger than the body, then close", "truncated", lambda good: [good[:-40], CLOSE])
wire("extra_bytes", "Content-Length smaller than the body", "ok", lambda good: [good + b"<p>too much</p>"])
wire("bad_length", "Content-Length: many", "ok", lambda good: [good.replace(b"Length: ", b"Length: many"), CLOSE])
wire("length_twice", "the same Content-Length twice", "ok",
     lambda good: re.sub(rb"(Content-L.*?\r\n)", rb"\1\1", good))
wire("length_list", "Content-Length: N, N", "ok", lambda good: re.sub(rb"(Content-Length: )(\d+)", rb"\1\2, \2", good))
wire("lengths_differ", "two Content-Lengths", "protocol", lambda good: plus(good, b"Content-Length: 10"))
wire("length_signed", "Content-Length: +1_7", "protocol", lambda good: good.replace(b"Length: ", b"Length: +1_7"))
wire("http10", "HTTP/1.0 without a length", "ok",
     lambda good: [HTML.replace(b"1.1", b"1.0") + b"\r\n" + simple("http10"), CLOSE])
wire("no_length", "its end is the connection's", "ok", lambda good: [HTML + b"\r\n" + simple("no_length"), CLOSE])
wire("chunked", "good chunks, with an extension and a trailer", "ok",
     lambda good: [CHUNKED + b"7;why=not\r\n<title>\r\n0F\r\nchunked</title>\r\n0\r\nX-Trailer: yes\r\n\r\n"])
wire("chunk_bad_size", "a chunk size that is no number, then close", "protocol",
     lambda good: [CHUNKED + b"10\r\n<title>bad size<\r\nzz\r\n/title>\r\n0\r\n\r\n", CLOSE])
wire("chunked_and_length", "chunked, and a Content-Length of 10", "ok",
     lambda good: [plus(CHUNKED, b"Content-Length: 10") + b"22\r\n<title>chunked_and_length</title>\r\n0\r\n\r\n"])
wire("chunk_line_feeds", "chunks between LFs", "ok",
     lambda good: [CHUNKED + b"1f ;x\n<title>chunk_line_feeds</title>\n0\n\n"])
wire("chunk_last_line", "closes behind the line of the last chunk", "ok",
     lambda good: [CHUNKED + b"1e\r\n<title>chunk_last_line</title>\r\n0\r\n", CLOSE])
wire("chunk_signed", "a chunk of +1f bytes", "protocol", lambda good: [CHUNKED + b"+1f\r\n<title>", CLOSE])
wire("chunk_too_long", "a chunk longer than its size", "protocol", lambda good: [CHUNKED + b"3\r\n<title>\r\n", CLOSE])
wire("transfer_gzip", "Transfer-Encoding: gzip, chunked", "ok",
     lambda good: [CHUNKED.replace(b" ch", b" gzip, ch")
                   + b"%x\r\n%b\r\n0\r\n\r\n" % (len(gzip.compress(simple("transfer_gzip"))),
                                               gzip.compress(simple("transfer_gzip")))])
wire("transfer_unknown", "a Transfer-Encoding that nobody knows", "protocol",
     lambda good: [plus(good, b"Transfer-Encoding: x-unheard-of, chunked")])
wire("chunk_cut", "closes in the middle of a chunk", "truncated", lambda good: [CHUNKED + b"1000\r\n<title>cut", CLOSE])

wire("bad_status_line", "HTTP/1.1 abc OK", "protocol", lambda good: [good.replace(b"200", b"abc", 1), CLOSE])
wire("not_http", "an SSH banner, then silence", "protocol", lambda good: [b"SSH-2.0-OpenSSH_9.6\r\n", FOREVER])
wire("null_in_header", "a NUL byte in a header", "protocol", lambda good: plus(good, b"X-Null: a\0b"))
wire("folded_header", "a header on two lines (obsolete)", "ok", lambda good: good.replace(b"; ", b";\r\n ", 1))
wire("many_cookies", "500 Set-Cookie headers, 30 KB", "ok",
     lambda good: plus(good, *(b"Set-Cookie: c%03d=%040d" % (n, n) for n in range(500))))
wire("long_header_line", "one header line of 9,000 bytes", "ok", lambda good: plus(good, b"X-Long: " + b"x" * 8992))
wire("no_colon", "a header line without a colon", "ok", lambda good: plus(good, b"no colon"))
wire("blank_before_colon", "Content-Type : text/html", "ok", lambda good: good.replace(b":", b" :", 1))
wire("bare_cr", "a CR in a header", "ok", lambda good: plus(good, b"X-CR: a\rContent-Length: 3"))
wire("line_feeds", "lines that end with LF alone", "ok", lambda good: good.replace(b"\r\n", b"\n"))
wire("empty_lines_before", "two empty lines before the head", "ok", lambda good: b"\r\n\r\n" + good)
wire("endless_header_line", "one header line without end", "protocol",
     lambda good: itertools.chain([HTML + b"X-Long: "], itertools.repeat(b"x" * 65_536)), heavy=True)
wire("endless_headers", "header lines without end", "protocol",
     lambda good: itertools.chain([HTML], (b"X-More-%d: and on\r\n" % n * 100 for n in itertools.count())), heavy=True)

wire("huge_page", "50 MB, with its Content-Length", "too_large",
     lambda good: itertools.chain([HTML + b"Content-Length: 50000000\r\n\r\n"], [LOREM] * 1000), heavy=True)
wire("endless_body", "a body without length or end", "too_large",
     lambda good: itertools.chain([HTML + b"\r\n"], itertools.repeat(LOREM)), heavy=True)
wire("endless_chunks", "a chunked body without end", "too_large",
     lambda good: itertools.chain([CHUNKED], itertools.repeat(b"%x\r\n%b\r\n" % (len(LOREM), LOREM))), heavy=True)
# fmt: on


@functools.cache
def _bomb_piece() -> tuple[bytes, bytes]:
    """1 MB of zeros, and the same deflated up to a full flush: such pieces can be strung together."""
    zeros, deflate = bytes(1 << 20), zlib.compressobj(9, wbits=-15)
    return zeros, deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH)


@fault("gzip_bomb", "1 MB of gzip that unpacks to 1 GB of zeros", "too_large", heavy=True)
def gzip_bomb(request: SiteRequest) -> Iterator[Step]:
    zeros, piece = _bomb_piece()
    times, check = BOMB_BYTES // len(zeros), 0
    yield HTML + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % (20 + times * len(piece))
    yield b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"
    for _ in range(times):
        check = zlib.crc32(zeros, check)
        yield piece
    yield b"\x03\0" + struct.pack("<II", check, BOMB_BYTES & 0xFFFFFFFF)


def coded(name: str, about: str, expect: str, label: str, pack: Callable[[bytes], bytes]) -> None:
    """An entry whose body is what `pack` makes of its page, under `Content-Encoding: label`."""
    fault(name, about, expect)(lambda request: reply(pack(simple(name)), 200, f"Content-Encoding: {label}"))


def optional_encoding(name: str, label: str, *modules: str, **pace: int) -> None:
    """Entries for an encoding, if one of these modules is installed; it is imported at the first request. `pace`: how
    it packs without holding up the loop."""
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module):
                break
    else:
        return

    def pack(data: bytes) -> bytes:
        return cast(bytes, importlib.import_module(module).compress(data, **pace))

    bomb = functools.cache(lambda: reply(pack(bytes(1 << 25)), 200, f"Content-Encoding: {label}"))
    coded(name, f"good {name}", "ok", label, pack)
    coded(f"{name}_long", f"1 MB of {name}", "ok", label, lambda html: pack(html + b"<p>long</p>" * 95_325))
    coded(f"{name}_broken", f"garbage labelled {label}", "decode", label, lambda html: b"\xff\xfe garbage" * 20)
    coded(f"{name}_cut", f"a response with half the {name}", "decode", label, lambda html: pack(html)[:-60])
    fault(f"{name}_bomb", f"some {name} that unpacks to 32 MB of zeros", "too_large", heavy=True)(lambda _: bomb())


# fmt: off
coded("gzip", "good gzip", "ok", "gzip", gzip.compress)
coded("gzip_twice", "packed twice", "ok", "gzip, gzip", lambda html: gzip.compress(gzip.compress(html)))
coded("gzip_broken", "a gzip header + garbage", "decode", "gzip", lambda html: gzip.compress(html)[:10] + b"\xff" * 99)
coded("gzip_cut", "a response with half the gzip", "decode", "gzip", lambda html: gzip.compress(html)[:-60])
coded("gzip_no_trailer", "gzip, no checksum", "decode", "gzip", lambda html: gzip.compress(html)[:-8])
coded("gzip_junk_after", "garbage after the gzip", "ok", "gzip", lambda html: gzip.compress(html) + b"garbage")
wire("gzip_short_body", "gzip, cut by the connection before its Content-Length", "truncated",
     lambda good: [reply(gzip.compress(simple("gzip_short_body")), 200, "Content-Encoding: gzip")[:-60], CLOSE])
coded("plain_as_gzip", "plain HTML labelled gzip", "decode", "gzip", lambda html: html)
coded("deflate_zlib", "good deflate (in a zlib wrapper)", "ok", "deflate", zlib.compress)
coded("deflate_raw", "deflate, no wrapper", "ok", "deflate", lambda html: zlib.compress(html, wbits=-15))
coded("unknown_encoding", "plain HTML labelled x-unheard-of", "decode", "x-unheard-of", lambda html: html)
optional_encoding("brotli", "br", "brotli", quality=5)  # its own 11 takes a second for the bomb
optional_encoding("zstd", "zstd", "compression.zstd", "backports.zstd")
# fmt: on


@fault("redirect_30", "a chain of 30 redirects", "redirects")
@fault("redirect_3", "a chain of 3 redirects to a good page", "ok")
def redirect_chain(request: SiteRequest) -> bytes:
    left = int(request.number("left", float(request.name.partition("_")[2])))
    return reply(b"", 302, f"Location: {request.path}?left={left - 1}") if left else reply(simple(request.name))


def leads(name: str, about: str, expect: str, status: int, to: Callable[[SiteRequest], str]) -> None:
    """An entry that redirects to where `to` says."""
    title = "ok" if expect == "ok" else None
    fault(name, about, expect, title=title)(lambda request: reply(b"", status, f"Location: {to(request)}"))


# fmt: off
leads("redirect_self", "redirects to itself", "redirects", 301, lambda r: r.target)
leads("redirect_loop", "two URLs, each to the other", "redirects", 307, lambda r: r.path + "?b" * ("?" not in r.target))
leads("redirect_nowhere", "to a closed port", "connect", 302, lambda r: r.sandbox.closed_url)
leads("redirect_unresolvable", "to http://x.invalid/", "dns", 302, lambda r: "http://x.invalid/")
leads("redirect_file", "to file:///etc/passwd", "redirects", 302, lambda r: "file:///etc/passwd")
leads("redirect_relative", "to ../fault/ok", "ok", 301, lambda r: "../fault/ok")
leads("redirect_other_host", "to the next host", "ok", 308, lambda r: r.sandbox.url("/fault/ok", r.host + 1))
leads("redirect_raw_bytes", "to a URL with spaces and raw UTF-8", "ok", 303, lambda r: "/fault/ok?caf\xc3\xa9 au lait")
leads("redirect_latin1", "to a URL with a byte that is no UTF-8", "ok", 302, lambda r: "/fault/ok?caf\xe9")
fault("redirect_bad_body", "302 to a good page, with plain text labelled gzip", "ok", title="ok")(
    lambda request: reply(b"plain", 302, "Location: /fault/ok", "Content-Encoding: gzip"))
fault("missing_bad_body", "404, with plain text labelled gzip", "http")(
    lambda request: reply(b"plain", 404, "Content-Encoding: gzip"))
wire("redirect_no_location", "no Location", "redirects", lambda good: good.replace(b"200 OK", b"302 Found", 1))
# fmt: on


def http_date(form: str, t: float) -> str:
    """A Unix time in a form of RFC 9110 section 5.6.7 ("imf", "rfc850" or "asctime"), whatever the locale."""
    imf, moment = email.utils.formatdate(t, usegmt=True), time.gmtime(t)
    weekday = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")[moment.tm_wday]
    rfc850 = f"{weekday}, {imf[5:7]}-{imf[8:11]}-{imf[14:]}"
    return {"imf": imf, "rfc850": rfc850, "asctime": time.asctime(moment)}[form]


def first_fails(request: SiteRequest, times: int, failure: bytes) -> bytes:
    """`failure` for the first requests of this very URL, then a good page."""
    return failure if request.sandbox._count(request.host, request.target) <= times else reply(simple(request.name))


def retry_after(status: int, form: str, value: str = "") -> None:
    """An entry that fails once with this Retry-After, or with one of `form` for ?seconds=S from now."""

    def handler(request: SiteRequest) -> bytes:
        seconds = math.ceil(request.number("seconds", 1.0))
        later = str(seconds) if form == "seconds" else value or http_date(form, math.ceil(time.time() + seconds))
        return first_fails(request, 1, reply(simple(str(status)), status, f"Retry-After: {later}"))

    about = f"{status} once, Retry-After: {value or form + ' (?seconds=S)'}"
    fault(f"retry_{status}_{form}", about, "http", retries=1)(handler)


for _status, _form in itertools.product((429, 503), ("seconds", "imf", "rfc850", "asctime")):
    retry_after(_status, _form)
retry_after(503, "garbage", "soon")
retry_after(503, "negative", "-5")
retry_after(503, "absurd", "1000000000")
fault("retry_429_bad_body", "429 once, Retry-After: 1, with plain text labelled gzip", "http", retries=1)(
    lambda request: first_fails(request, 1, reply(b"plain", 429, "Retry-After: 1", "Content-Encoding: gzip"))
)
fault("flaky", "500 twice (?n=N times), then a good page", "http", retries=2)(
    lambda request: first_fails(request, int(request.number("n", 2)), reply(simple("500"), 500))
)
fault("always_500", "500 at every request", "http")(lambda request: reply(simple("500"), 500))


@route("/status/")
@fault("status", "any status: /status/N for N from 100 to 599", "http", path="/status/404")
def any_status(request: SiteRequest) -> Answer:
    """1xx: an interim response, then a good page; but 101 switches protocols and closes. No 3xx has a Location."""
    code = request.name
    if not re.fullmatch("[1-5][0-9][0-9]", code):
        return reply(simple("404 Not Found"), 404)
    response = reply(b"" if code == "205" else simple(code), int(code))
    empty = re.sub(rb"Content-[^\r]*\r\n", b"", only_head(response))
    if code == "101":
        return [empty[:-2] + b"Upgrade: other\r\nConnection: Upgrade\r\n\r\n", CLOSE]
    if code[0] == "1":
        final = reply(simple(code))
        return [empty + (only_head(final) if request.method == "HEAD" else final)]
    return empty if code in ("204", "304") else response


def status_expect(code: int) -> str:
    """What `Fault.expect` would say of /status/`code`."""
    if code in (301, 302, 303, 307, 308):
        return "redirects"
    return "protocol" if code == 101 else "http" if code >= 400 else "ok"


def text(name: str, about: str, title: str | None, body: bytes, kind: str = "text/html", heavy: bool = False) -> None:
    """A good response with an unusual body."""
    fault(name, about, "ok", title=title, heavy=heavy)(lambda request: reply(body, kind=kind))


# fmt: off
for _charset, _title in (("windows-1251", "Привет, мир"), ("shift_jis", "こんにちは世界"), ("gb18030", "你好，世界")):
    text(f"charset_{_charset.replace('-', '_')}", f"labelled {_charset}: {_title}", _title,
         f"<title>{_title}</title>".encode(_charset), f"text/html; charset={_charset}")
text("charset_utf_16", "unlabelled UTF-16, BOM: Zażółć", "Zażółć", "\ufeff<title>Zażółć</title>".encode("utf-16-le"))
text("latin1_in_header", "a byte above 127 in its Content-Type", "in", b"<title>in</title>", "text/html; x=\xe9")
text("charset_missing", "unlabelled windows-1252: Café", "Café", b"<title>Caf\xe9</title>")
text("charset_wrong", "windows-1252 labelled utf-8", None, b"<title>Caf\xe9</title>", "text/html; charset=utf-8")
text("charset_unknown", "labelled klingon", "plain", b"<title>plain</title>", "text/html; charset=klingon")
text("binary_as_html", "100 KB of random bytes labelled text/html", None, random.Random(1).randbytes(100_000))
text("image", "image/png", None, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(50), "image/png")
text("pdf", "application/pdf", None, b"%PDF-1.7\n%\xe2\xe3\n", "application/pdf")
text("empty_body", "a body of no bytes", None, b"")
text("long_title", "a title of 1 MB", None, b"<title>" + b"long title " * 95_326 + b"</title>short text", heavy=True)
text("nested_divs", "100,000 nested divs", "nested_divs",
     b"<title>nested_divs</title>" + b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000, heavy=True)
text("malformed_html", "tags and attributes left open, bad references, NULs", "malformed_html",
     b"<title>malformed_html</title><body <p <<a href='/x>1<a href=/ok.html>2</b></i><!-> <![CDATA[ x ]]> </ >\0"
     b"<a href=\"http://[::1\">3</a><a href='%zz'>&#x110000; &#0; &bogus; &amp</a><svg><title>no</title><!-- <")
# fmt: on


def catalogue() -> str:
    """The catalogue as a table for people."""
    rows = [("name", "right result", "retries", "what it does")]
    rows += [(f.name, f.expect, str(f.needs_retry or ""), f.about) for f in FAULTS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
