"""A small internet on loopback: sites worth crawling, and a catalogue of servers that misbehave.

Theory
------
`Sandbox` is one HTTP/1.1 server on the addresses 127.0.1.1, 127.0.1.2, ... (one per host, all on one port). It writes
raw bytes, because most of what a client must survive is what an HTTP library refuses to send. (Linux has all of
127.0.0.0/8; on macOS each address must be added first: `ifconfig lo0 alias 127.0.1.1`.) Three layers:

* **Pure functions.** `make_page` depends on its arguments alone. A *handler* maps a `Request` to an answer: `bytes`
  (one well-formed response), or a *script*, an iterable of steps: bytes to write, a float (seconds of silence), or
  `CLOSE`, `RESET`, `DOOM`. A script that runs out leaves the connection open for the next request. Scripts never touch
  a socket, so an endless answer is an endless iterator.
* **The catalogue.** `@fault` registers a handler with what it does and what a well-behaved client makes of it
  (`FAULTS`); `@route` registers a plain path, or a prefix if it ends in "/".
* **`Connection`** plays the answers of one connection in order, and never buffers more than the transport's high-water
  mark and one step, however slowly the peer reads. **`Sandbox`** owns the sockets, the thread and the log.

Promised: the same seed gives the same pages; every page of a host can be reached from its "/" in about log8(pages)
clicks; HEAD, keep-alive, pipelining and `Connection: close` are right for every answer that is not a script; a request
is logged when its head is complete, before anything is sent; after `stop()` no socket, task or thread is left, whatever
was hanging. Not promised: methods other than GET and HEAD, or HEAD on scripts (they are played in full: they are wrong
on purpose).

Threads: all connections live in one event loop in a thread of the sandbox's own. `Sandbox._lock` guards the log and the
count of statuses, which other threads read; everything else belongs to the loop (others read two of its integers).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import email.utils
import errno
import functools
import gzip
import http
import importlib
import importlib.util
import ipaddress
import itertools
import math
import os
import random
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, cast
from urllib.parse import parse_qs, urlencode

BASE = "http://{host}:8080"
HEAD_LIMIT = 65_536  # bytes of a request head, and of pipelined requests held back behind a running answer
CACHE_BYTES = 64 << 20  # generated pages kept
COUNTS_LIMIT = 100_000  # URLs whose requests are counted for the entries that fail at first
TURN_BYTES, STEP_COST = 262_144, 16_384  # what a connection may write before the others' turn; a step counts extra
LINGER = 1.0  # seconds that a refused peer has to read why
FOREVER = 86_400.0  # seconds

PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
SITE_PAGE = re.compile(r"/p/([1-9][0-9]{0,8})\.html")
ASKS_CLOSE = re.compile(rb"(?i)\r\nconnection:[^\r\n]*\bclose\b")
HAS_BODY = re.compile(rb"(?i)\r\n(?:content-length:[ \t]*0*[1-9]|transfer-encoding:)")
PLAIN_WORDS = re.findall(
    r"\w+",
    """about after against all also among around away back because before between both call change city close could
    day different down each early end even every example face far field first form found full garden give good great
    hand harbour help high house idea just keep kind know land large last letter life light line little long look make
    market measure might more most mountain much name near network never new night number often old once open order
    other over paper part people place plan point power question read result right river road same school second side
    small sound state still story system table take tell that these thing through time town tree turn under until
    voice water well what when where which while wind with word work world would year young""",
)
SMALL_WORDS = re.findall(r"\S+", "the of and to in is it for on was as a at caf&eacute; r&amp;d Zürich naïve señor")
WORDS = PLAIN_WORDS + SMALL_WORDS * 3


CLOSE, RESET, DOOM = "close", "reset", "go on, but at the next request close"  # the steps that end a connection
Step = bytes | float | str


@dataclass(slots=True)
class Request:
    """A request head. `target` is as sent (latin-1), less any scheme and authority; `path` is that less the query."""

    sandbox: Sandbox
    host: int
    method: str
    target: str
    path: str
    close: bool

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
Handler = Callable[[Request], Answer]


@dataclass(frozen=True, slots=True)
class Fault:
    """An entry of the catalogue.

    `expect`: the kinds of result that are right for a client that does not retry, follows at most 20 redirects, and
    takes 64 KB of header and 10 MB of unpacked body: "ok" or an error kind, the most telling first. `needs_retry`: how
    many retries make it "ok". `title`: the page's title where the result is "ok", None where that is not promised.
    `heavy`: there is more than 1 MB to read or to unpack.
    """

    name: str
    path: str
    about: str
    expect: tuple[str, ...]
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
    """Register a handler as an entry; `expect` is separated by spaces, `title` is the name unless told otherwise."""
    if title == "":
        title = name if retries or "ok" in expect else None
    path = path or f"/fault/{name}"
    FAULTS[name] = Fault(name, path, about, tuple(expect.split()), retries, title, heavy)
    return route(path)


# --- Sites -----------------------------------------------------------------------------------------------------------


def address(host: int) -> str:
    """The address of a host: 127.0.1.1 for host 0, and so on upwards."""
    return str(ipaddress.IPv4Address("127.0.1.1") + host)


def page_path(page: int) -> str:
    """The path of a page: "/" for 0, else /p/N.html."""
    return f"/p/{page}.html" if page else "/"


def _link(base: str, target: int, on: int, shape: int, text: str) -> str:
    """A link from page `on` to page `target` of one host, in one of seven shapes."""
    path = page_path(target)
    relative = (f"{target}.html" if target else "../") if on else path[1:] or "./"
    scheme_relative = base.partition(":")[2] + path
    shapes = (path, relative, base + path, f"{path}#part-{shape}", f"../{path[1:]}", scheme_relative, f"{relative}#top")
    return f'<a href="{shapes[shape % 7]}"{(" class=link", " title=more", "")[shape % 3]}>{text}</a>'


def make_page(
    host_index: int, page: int, pages: int, size: int = 20_000, base: str = BASE, *, hosts: int = 1, seed: int = 1
) -> bytes:
    """Page `page` of a host's `pages`: a news-like HTML article in UTF-8, of exactly `size` bytes.

    `base` is a host's URL without path, "{host}" standing for its address. Pages form a tree (8n+1 to 8n+8 are below n)
    with more links across it and, given `hosts` > 1, a few to other hosts; about 60 links at 20 KB. 15 % of the bytes
    are style and script, a third is visible text. A size below the skeleton's (2 to 3 KB) gives a tiny valid page that
    has the tree's links only. Raises ValueError unless 0 <= page < pages.
    """
    if not 0 <= page < pages:
        raise ValueError(f"page {page} is not one of {pages}")
    rng = random.Random(f"{seed}/{host_index}/{page}")
    here = base.replace("{host}", address(host_index))
    title = f"{' '.join(rng.choices(PLAIN_WORDS, k=4)).capitalize()}, page {page} of host {host_index + 1}"
    below = range(8 * page + 1, min(8 * page + 9, pages))

    links = [_link(here, child, page, n, f"Story {child}") for n, child in enumerate(below)]
    for n in range(min(48, size // 400)):
        target, text = rng.randrange(pages), " ".join(rng.choices(WORDS, k=2))
        if n % 12 == 5 and hosts > 1:
            other = (host_index + rng.randrange(1, hosts)) % hosts
            links.append(f'<a href="{base.replace("{host}", address(other))}{page_path(target)}">{text}</a>')
        elif n % 25 == 9:
            links.append(f'<a href="mailto:desk{n}@example.org">{text}</a>')
        else:
            links.extend([_link(here, target, page, n, text)] * (1 + (n % 10 == 3)))
    menu, inline = links[: len(links) // 3], links[len(links) // 3 :]

    rules = "".join(f".c{n}>p:hover{{color:#{n * 7919:06x};margin:{n}px auto}}" for n in range(size * 3 // 1900))
    script = "".join(f"q.push(['track','<a href=\"/not/a/link\">',{n}]);" for n in range(size * 3 // 1900))
    head = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="description" content="{" ".join(rng.choices(WORDS, k=12))}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="/favicon.ico">
<link rel="canonical" href="{here}{page_path(page)}">
<style>body{{font:16px/1.5 serif}}{rules}</style><script>var q=[];{script}</script></head>
<body class="article"><header><a href="#main">Skip</a></header>
<nav><ul>{"".join(f"<li>{link}</li>" for link in menu)}</ul></nav><main id="main"><article><h1>{title}</h1>"""
    foot = f"</article></main><footer><p>&copy; host {host_index + 1} &mdash; no rights</p></footer></body></html>\n"

    paragraphs = max(1, size // 3 // 300 - 1)
    blocks = []
    for n in range(paragraphs):
        words = rng.choices(WORDS, k=52)
        words[9], words[21] = f"<em>{words[9]}</em>", f"<strong class='key'>{words[21]}</strong> &#8212;"
        words[33:33] = inline[n::paragraphs]
        heading = f"\n<h2 id=part-{n}>{' '.join(rng.choices(WORDS, k=4))}</h2>" if n % 4 == 0 else ""
        blocks.append(f'{heading}\n<p class="c{n}">{" ".join(words)}.</p>')
    left = size - len((head + "".join(blocks) + foot).encode())
    if left < 0:
        tiny = "".join(f"<a href={page_path(child)}>{child}</a> " for child in below)
        return f"<!doctype html><html lang=en><title>{title}</title><p>{title}.</p>{tiny}".encode()
    for n in itertools.cycle(range(paragraphs)):
        if left < 200:
            break
        photo = f'\n<figure><img src="/img/{left}.jpg" srcset="/img/{left}-2x.jpg 2x" alt="photo {n}"></figure>'
        comment = f'<!-- <a href="/commented/out/{left}">a teaser that was taken down</a> {"-=" * 20} -->'
        blocks[n] += photo if n % 3 else comment
        left -= len(photo if n % 3 else comment)
    padding = f"<!--{'.' * (left - 7)}-->" if left >= 7 else " " * left
    return (head + "".join(blocks) + padding + foot).encode()


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


@route("/")
@route("/p/")
def site(request: Request) -> bytes:
    """The pages of a host, and 404 for everything that nobody else serves."""
    match = SITE_PAGE.fullmatch(request.path)
    page = int(match[1]) if match else 0
    if page < request.sandbox.pages and (match or request.path == "/"):
        return request.sandbox._page(request.host, page)
    return reply(simple("404 Not Found"), 404)


route("/robots.txt")(lambda request: reply(b"User-agent: *\nAllow: /\n", kind="text/plain"))

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
wire("resets_in_body", "resets in the middle of the body", "reset truncated", lambda good: [good[:-40], 0.05, RESET])
wire("head_drip", "the head at one byte a second", "timeout", drip)
wire("body_drip", "the body at one byte a second", "timeout", lambda good: [good[:-99], *drip(good[-99:])])
wire("head_cut", "closes in the middle of the head", "protocol truncated reset", lambda good: [HTML + b"X-Cu", CLOSE])
wire("hangs_in_head", "stops in the middle of the head, stays open", "timeout", lambda good: [HTML + b"X-Cu", FOREVER])
wire("hangs_in_body", "stops in the middle of the body, stays open", "timeout", lambda good: [good[:-40], FOREVER])
wire("closes_keepalive", "promises keep-alive, then closes at once", "ok",
     lambda good: [plus(good, b"Connection: keep-alive"), CLOSE])
wire("closes_on_reuse", "a good page; closes at the connection's next request", "ok", lambda good: [good, DOOM])
wire("junk_after", "a good page, then a forged response", "ok protocol", lambda good: [good + reply(simple("forged"))])

wire("short_body", "Content-Length larger than the body, then close", "truncated", lambda good: [good[:-40], CLOSE])
wire("extra_bytes", "Content-Length smaller than the body", "ok protocol", lambda good: [good + b"<p>too much</p>"])
wire("bad_length", "Content-Length: many", "protocol", lambda good: [good.replace(b"Length: ", b"Length: many"), CLOSE])
wire("http10", "HTTP/1.0 without a length", "ok",
     lambda good: [HTML.replace(b"1.1", b"1.0") + b"\r\n" + simple("http10"), CLOSE])
wire("no_length", "its end is the connection's", "ok", lambda good: [HTML + b"\r\n" + simple("no_length"), CLOSE])
wire("chunked", "good chunks, with an extension and a trailer", "ok",
     lambda good: [CHUNKED + b"7;why=not\r\n<title>\r\n0F\r\nchunked</title>\r\n0\r\nX-Trailer: yes\r\n\r\n"])
wire("chunk_bad_size", "a chunk size that is no number, then close", "protocol truncated",
     lambda good: [CHUNKED + b"10\r\n<title>bad size<\r\nzz\r\n/title>\r\n0\r\n\r\n", CLOSE])
wire("chunk_cut", "closes in the middle of a chunk", "truncated", lambda good: [CHUNKED + b"1000\r\n<title>cut", CLOSE])

wire("bad_status_line", "HTTP/1.1 abc OK", "protocol", lambda good: [good.replace(b"200", b"abc", 1), CLOSE])
wire("not_http", "an SSH banner, then silence", "protocol", lambda good: [b"SSH-2.0-OpenSSH_9.6\r\n", FOREVER])
wire("null_in_header", "a NUL byte in a header", "ok protocol", lambda good: plus(good, b"X-Null: a\0b"))
wire("folded_header", "a header on two lines (obsolete)", "ok protocol", lambda good: good.replace(b"; ", b";\r\n ", 1))
wire("many_cookies", "500 Set-Cookie headers, 30 KB", "ok protocol too_large",
     lambda good: plus(good, *(b"Set-Cookie: c%03d=%040d" % (n, n) for n in range(500))))
wire("endless_header_line", "one header line without end", "protocol too_large",
     lambda good: itertools.chain([HTML + b"X-Long: "], itertools.repeat(b"x" * 65_536)), heavy=True)
wire("endless_headers", "header lines without end", "protocol too_large",
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
def gzip_bomb(request: Request) -> Iterator[Step]:
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


def optional_encoding(name: str, label: str, *modules: str) -> None:
    """Entries for an encoding, if one of these modules is installed; it is imported at the first request."""
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module):
                break
    else:
        return

    def pack(data: bytes) -> bytes:
        return cast(bytes, importlib.import_module(module).compress(data))

    bomb = functools.cache(lambda: reply(pack(bytes(1 << 25)), 200, f"Content-Encoding: {label}"))
    coded(name, f"good {name}", "ok", label, pack)
    coded(f"{name}_broken", f"garbage labelled {label}", "decode", label, lambda html: b"\xff\xfe garbage" * 20)
    coded(f"{name}_cut", f"a response with half the {name}", "truncated decode", label, lambda html: pack(html)[:-60])
    fault(f"{name}_bomb", f"some {name} that unpacks to 32 MB of zeros", "too_large", heavy=True)(lambda _: bomb())


# fmt: off
coded("gzip", "good gzip", "ok", "gzip", gzip.compress)
coded("gzip_twice", "packed twice", "ok decode", "gzip, gzip", lambda html: gzip.compress(gzip.compress(html)))
coded("gzip_broken", "a gzip header + garbage", "decode", "gzip", lambda html: gzip.compress(html)[:10] + b"\xff" * 99)
coded("gzip_cut", "a response with half the gzip", "truncated decode", "gzip", lambda html: gzip.compress(html)[:-60])
coded("gzip_no_trailer", "gzip, no checksum", "ok truncated decode", "gzip", lambda html: gzip.compress(html)[:-8])
coded("gzip_junk_after", "garbage after the gzip", "ok decode", "gzip", lambda html: gzip.compress(html) + b"garbage")
wire("gzip_short_body", "gzip, cut by the connection before its Content-Length", "truncated decode",
     lambda good: [reply(gzip.compress(simple("gzip_short_body")), 200, "Content-Encoding: gzip")[:-60], CLOSE])
coded("plain_as_gzip", "plain HTML labelled gzip", "decode ok", "gzip", lambda html: html)
coded("deflate_zlib", "good deflate (in a zlib wrapper)", "ok", "deflate", zlib.compress)
coded("deflate_raw", "deflate, no wrapper", "ok decode", "deflate", lambda html: zlib.compress(html, wbits=-15))
coded("unknown_encoding", "plain HTML labelled x-unheard-of", "decode ok", "x-unheard-of", lambda html: html)
optional_encoding("brotli", "br", "brotli")
optional_encoding("zstd", "zstd", "compression.zstd", "backports.zstd")
# fmt: on


@fault("redirect_30", "a chain of 30 redirects", "redirects")
@fault("redirect_3", "a chain of 3 redirects to a good page", "ok")
def redirect_chain(request: Request) -> bytes:
    left = int(request.number("left", float(request.name.partition("_")[2])))
    return reply(b"", 302, f"Location: {request.path}?left={left - 1}") if left else reply(simple(request.name))


def leads(name: str, about: str, expect: str, status: int, to: Callable[[Request], str]) -> None:
    """An entry that redirects to where `to` says."""
    title = "ok" if expect == "ok" else None
    fault(name, about, expect, title=title)(lambda request: reply(b"", status, f"Location: {to(request)}"))


# fmt: off
leads("redirect_self", "redirects to itself", "redirects", 301, lambda r: r.target)
leads("redirect_loop", "two URLs, each to the other", "redirects", 307, lambda r: r.path + "?b" * ("?" not in r.target))
leads("redirect_nowhere", "to a closed port", "connect", 302, lambda r: r.sandbox.closed_url)
leads("redirect_unresolvable", "to http://x.invalid/", "dns timeout", 302, lambda r: "http://x.invalid/")
leads("redirect_file", "to file:///etc/passwd", "redirects", 302, lambda r: "file:///etc/passwd")
leads("redirect_relative", "to ../fault/ok", "ok", 301, lambda r: "../fault/ok")
leads("redirect_other_host", "to the next host", "ok", 308, lambda r: r.sandbox.url("/fault/ok", r.host + 1))
leads("redirect_raw_bytes", "to a URL with spaces and raw UTF-8", "ok", 303, lambda r: "/fault/ok?caf\xc3\xa9 au lait")
wire("redirect_no_location", "no Location", "redirects ok http", lambda good: good.replace(b"200 OK", b"302 Found", 1))
# fmt: on


def http_date(form: str, t: float) -> str:
    """A Unix time in a form of RFC 9110 section 5.6.7 ("imf", "rfc850" or "asctime"), whatever the locale."""
    imf, moment = email.utils.formatdate(t, usegmt=True), time.gmtime(t)
    weekday = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")[moment.tm_wday]
    rfc850 = f"{weekday}, {imf[5:7]}-{imf[8:11]}-{imf[14:]}"
    return {"imf": imf, "rfc850": rfc850, "asctime": time.asctime(moment)}[form]


def first_fails(request: Request, times: int, failure: bytes) -> bytes:
    """`failure` for the first requests of this very URL, then a good page."""
    return failure if request.sandbox._count(request.host, request.target) <= times else reply(simple(request.name))


def retry_after(status: int, form: str, value: str = "") -> None:
    """An entry that fails once with this Retry-After, or with one of `form` for ?seconds=S from now."""

    def handler(request: Request) -> bytes:
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
fault("flaky", "500 twice (?n=N times), then a good page", "http", retries=2)(
    lambda request: first_fails(request, int(request.number("n", 2)), reply(simple("500"), 500))
)
fault("always_500", "500 at every request", "http")(lambda request: reply(simple("500"), 500))


@route("/status/")
@fault("status", "any status: /status/N for N from 100 to 599", "http", path="/status/404")
def any_status(request: Request) -> Answer:
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


def status_expect(code: int) -> tuple[str, ...]:
    """What `Fault.expect` would say of /status/`code`."""
    if code == 101:
        return ("protocol", "reset", "http")
    return ("http",) if code >= 400 else ("ok", "redirects", "http") if code >= 300 else ("ok",)


def text(name: str, about: str, title: str | None, body: bytes, kind: str = "text/html", heavy: bool = False) -> None:
    """A good response with an unusual body."""
    fault(name, about, "ok", title=title, heavy=heavy)(lambda request: reply(body, kind=kind))


# fmt: off
for _charset, _title in (("windows-1251", "Привет, мир"), ("shift_jis", "こんにちは世界"), ("gb18030", "你好，世界")):
    text(f"charset_{_charset.replace('-', '_')}", f"labelled {_charset}: {_title}", _title,
         f"<title>{_title}</title>".encode(_charset), f"text/html; charset={_charset}")
text("charset_utf_16", "unlabelled UTF-16, BOM: Zażółć", "Zażółć", "\ufeff<title>Zażółć</title>".encode("utf-16-le"))
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
    rows += [(f.name, "|".join(f.expect), str(f.needs_retry or ""), f.about) for f in FAULTS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# --- The log ---------------------------------------------------------------------------------------------------------


class LogEntry(NamedTuple):
    """One request. `t`: monotonic seconds when its head was complete; `status`: that of the answer's first status line,
    None if that is not sent in one piece; `connection`: its number, counted from 1 over all hosts."""

    t: float
    host: str
    path: str
    status: int | None
    connection: int


class Stats(NamedTuple):
    """Counts since the start; `open` connections are of now; `statuses` counts requests by the log's `status`."""

    requests: int
    connections: int
    open: int
    statuses: dict[int | None, int]


def max_in_window(times: Sequence[float], seconds: float) -> int:
    """The largest number of these ascending times in any half-open window [t, t + seconds)."""
    best = first = 0
    for last, t in enumerate(times):
        while t - times[first] >= seconds:
            first += 1
        best = max(best, last - first + 1)
    return best


# --- The server ------------------------------------------------------------------------------------------------------


def parse_head(sandbox: Sandbox, host: int, head: bytes) -> Request | int:
    """A request from the bytes before its blank line, or the status that refuses it (RFC 9112 sections 3 and 6)."""
    words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return 400
    method, target, version = words
    if target.startswith(("http://", "https://")):
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    if not target.startswith("/"):
        return 400
    if method not in ("GET", "HEAD"):
        return 405
    if HAS_BODY.search(head):
        return 413
    close = version == "HTTP/1.0" or ASKS_CLOSE.search(head) is not None
    return Request(sandbox, host, method, target, target.partition("?")[0], close)


class Connection(asyncio.Protocol):
    """One accepted connection: takes request heads from `inbox` and plays their answers, one after the other.

    `steps`: the answer being played, None between answers. `timer`: set while it waits by itself; `choked`: the peer
    does not read; `last`: close after this answer; `doomed`: close at the next request; `deaf`: refused, or lost;
    `handshake`: TLS is not ready, although its first data may already have come.
    """

    transport: asyncio.Transport

    def __init__(self, sandbox: Sandbox, host: int) -> None:
        self.sandbox, self.host, self.loop = sandbox, host, asyncio.get_running_loop()
        self.number = 0
        self.inbox = b""
        self.steps: Iterator[Step] | None = None
        self.timer: asyncio.Handle | None = None
        self.handshake: asyncio.Task[None] | None = None
        self.choked = self.last = self.doomed = self.deaf = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.sandbox._connections += 1
        self.number = self.sandbox._connections
        self.sandbox._open.add(self)
        if self.sandbox.tls is not None:
            # create_server(ssl=...) would hide the connection from stop() until its handshake is over.
            self.transport.pause_reading()
            self.handshake = self.loop.create_task(self._start_tls(self.sandbox.tls))

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        try:
            transport = await self.loop.start_tls(self.transport, self, context, server_side=True)
        except OSError:
            transport = None
        if transport is None:
            self.connection_lost(None)
        else:
            self.transport, self.handshake = transport, None
            self._serve()

    def connection_lost(self, exc: Exception | None) -> None:
        self.steps, self.deaf = None, True
        if self.timer is not None:
            self.timer.cancel()
        self.sandbox._open.discard(self)

    def pause_writing(self) -> None:
        self.choked = True

    def resume_writing(self) -> None:
        self.choked = False
        if self.timer is None:
            self._resume()

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        self.inbox += data
        if self.steps is None and self.handshake is None:
            self._serve()
        if len(self.inbox) > HEAD_LIMIT:
            self.transport.pause_reading()

    def _resume(self) -> None:
        """Go on after a wait of any kind."""
        self.timer = None
        if self.steps is not None:
            self._play()
        self._serve()
        if len(self.inbox) <= HEAD_LIMIT:
            self.transport.resume_reading()

    def _serve(self) -> None:
        """Answer what the inbox holds, until an answer has to wait."""
        while self.steps is None and not (self.choked or self.deaf or self.transport.is_closing()):
            end = self.inbox.find(b"\r\n\r\n", 0, HEAD_LIMIT)
            if end >= 0:
                head, self.inbox = self.inbox[:end], self.inbox[end + 4 :]
                self._start(head, time.monotonic())
            elif len(self.inbox) < HEAD_LIMIT:
                return
            else:
                self._refuse(431, time.monotonic())

    def _start(self, head: bytes, now: float) -> None:
        """Log one request and begin its answer."""
        request = parse_head(self.sandbox, self.host, head)
        if isinstance(request, int):
            self._refuse(request, now)
            return
        path = request.path
        handler = ROUTES.get(path) or ROUTES.get(path[: path.rfind("/") + 1]) or site
        answer = [CLOSE] if self.doomed else handler(request)
        if isinstance(answer, bytes):
            if request.method == "HEAD":
                answer = only_head(answer)
            if request.close:
                answer = plus(answer, b"Connection: close")
            answer = [answer]
        steps = iter(answer)
        first = next(steps)
        announced = re.match(rb"HTTP/1\.. (\d{3}) ", first) if isinstance(first, bytes) else None
        self.sandbox._record(now, self, request.target, int(announced[1]) if announced else None)
        self.steps, self.last = itertools.chain((first,), steps), request.close
        delay = self.sandbox._latency(self.host, path)
        if delay > 0:
            self.timer = self.loop.call_later(delay, self._resume)
        else:
            self._play()

    def _play(self) -> None:
        """Take steps until one waits, the peer chokes, the turn is over or the answer ends."""
        turn = TURN_BYTES
        while self.steps is not None and not (self.choked or self.transport.is_closing()):
            step = next(self.steps, None)
            if isinstance(step, bytes):
                self.transport.write(step)
                turn -= len(step) + STEP_COST
                if turn < 0:
                    self.timer = self.loop.call_soon(self._resume)
                    return
            elif isinstance(step, float):
                self.timer = self.loop.call_later(step, self._resume)
                return
            elif step is DOOM:
                self.doomed = True
            elif step is RESET:
                linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.transport.abort()
            else:
                self.steps = None
                if self.last or step is CLOSE:
                    self.transport.close()

    def _refuse(self, status: int, now: float) -> None:
        """Answer with an error and close, but read on for a moment: closing on unread bytes would reset the answer."""
        self.sandbox._record(now, self, "", status)
        self.deaf, self.inbox = True, b""
        self.transport.write(reply(simple(str(status)), status, "Allow: GET, HEAD", "Connection: close"))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.timer = self.loop.call_later(LINGER, self.transport.abort)
        else:
            self.transport.close()


class Sandbox:
    """The server in a thread of its own: `with Sandbox() as sandbox: client(sandbox.url("/"))`.

    `hosts`, `pages` (of a host), `page_bytes`, `seed`: the sites. `port`: 0 finds one that is free on all addresses.
    `latency`: seconds before every answer, or a function of (host index, path) that gives them. `tls`: a server
    context, for https instead of http. `log`: how many entries to keep, the newest; True is 200,000, False none.
    Raises ValueError for impossible arguments; `start` raises OSError if an address cannot be had.
    """

    hosts: list[str]
    closed_url: str

    def __init__(
        self,
        hosts: int = 8,
        pages: int = 25,
        page_bytes: int = 20_000,
        port: int = 0,
        seed: int = 1,
        latency: float | Callable[[int, str], float] = 0.0,
        tls: ssl.SSLContext | None = None,
        log: bool | int = True,
    ) -> None:
        if not (1 <= hosts <= 50_000 and pages >= 1 and page_bytes >= 0 and 0 <= port <= 65_535):
            raise ValueError("needed: 1 to 50000 hosts, at least one page, no negative size, a port up to 65535")
        self.hosts = [address(host) for host in range(hosts)]
        self.pages, self.page_bytes, self.port, self.seed, self.tls = pages, page_bytes, port, seed, tls
        self._latency = latency if callable(latency) else lambda host, path: latency
        self._cache: dict[tuple[int, int], bytes] = {}
        self._cached = 0
        self._counts: Counter[tuple[int, str]] = Counter()
        self._open: set[Connection] = set()
        self._lock = threading.Lock()
        self._log: deque[LogEntry] = deque(maxlen=200_000 if log is True else int(log))
        self._connections = 0
        self._statuses: Counter[int | None] = Counter()
        self._thread: threading.Thread | None = None
        self._halt: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        state = "running" if self._thread else "stopped"
        return f"<Sandbox {state}, {len(self.hosts)} hosts of {self.pages} pages from {self.url('/')}, {self.stats()}>"

    def url(self, path: str, host: int = 0) -> str:
        """The URL of a path; host numbers wrap around."""
        return self._base.replace("{host}", self.hosts[host % len(self.hosts)]) + path

    def site_urls(self) -> Iterator[str]:
        """The URL of every page of every host, the hosts taking turns."""
        return (self.url(page_path(page), host) for page in range(self.pages) for host in range(len(self.hosts)))

    def fault_url(self, name: str, host: int = 0, **query: object) -> str:
        """The URL of an entry of the catalogue; any new `key=...` makes entries that fail at first fail again."""
        return self.url(FAULTS[name].path, host) + ("?" + urlencode(query) if query else "")

    @property
    def log(self) -> list[LogEntry]:
        """A copy of the log, in order of time."""
        with self._lock:
            return list(self._log)

    def stats(self) -> Stats:
        with self._lock:
            return Stats(self._statuses.total(), self._connections, len(self._open), dict(self._statuses))

    def requests_for(self, path: str) -> list[LogEntry]:
        """The logged requests for a path: with any query, unless `path` has one itself."""
        whole = "?" in path
        return [entry for entry in self.log if (entry.path if whole else entry.path.partition("?")[0]) == path]

    def max_in_window(self, host: int, seconds: float) -> int:
        """The largest number of logged requests to a host in any half-open window of so many seconds."""
        return max_in_window([entry.t for entry in self.log if entry.host == self.hosts[host]], seconds)

    def start(self) -> Sandbox:
        """Bind, listen and serve. Raises OSError if an address cannot be had."""
        if self._thread is not None:
            raise RuntimeError("the sandbox is running already")
        sockets = self._bind()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(sockets, started), name="sandbox", daemon=True)
        self._thread.start()
        try:
            started.result()
        except OSError:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Close every connection and wait for the thread. Harmless if nothing runs."""
        if self._thread is not None:
            self._halt()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _bind(self) -> list[socket.socket]:
        """A listening socket for each host, all on one port, and a last one that is bound only: a closed port."""
        tries = 20
        while True:
            sockets: list[socket.socket] = []
            port, tries = self.port, tries - 1
            try:
                for host in self.hosts:
                    sockets.append(socket.socket())
                    if os.name == "posix":
                        sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sockets[-1].bind((host, port))
                    sockets[-1].listen(4096)
                    port = sockets[-1].getsockname()[1]
                sockets.append(socket.socket())
                sockets[-1].bind((self.hosts[0], 0))
                self.port, self.closed_url = port, "http://{}:{}/".format(*sockets[-1].getsockname())
                return sockets
            except OSError as error:
                for sock in sockets:
                    sock.close()
                if self.port or tries == 0 or error.errno != errno.EADDRINUSE:
                    raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None

    def _run(self, sockets: list[socket.socket], started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(sockets, started))
        except OSError as error:
            started.set_exception(error)
        finally:
            for sock in sockets:
                sock.close()

    async def _serve(self, sockets: list[socket.socket], started: Future[None]) -> None:
        loop, halted = asyncio.get_running_loop(), asyncio.Event()
        self._halt = functools.partial(loop.call_soon_threadsafe, halted.set)
        servers = [
            await loop.create_server(functools.partial(Connection, self, host), sock=sock, backlog=4096)
            for host, sock in enumerate(sockets[:-1])
        ]
        started.set_result(None)
        await halted.wait()
        for server in servers:
            server.close()
        while self._open or len(asyncio.all_tasks()) > 1:
            for connection in list(self._open):
                connection.transport.abort()
            await asyncio.sleep(0)  # ends are reported, accepts and handshakes finish, in the next turns of the loop

    @property
    def _base(self) -> str:
        return f"{'https' if self.tls else 'http'}://{{host}}:{self.port}"

    def _page(self, host: int, page: int) -> bytes:
        response = self._cache.get((host, page))
        if response is None:
            hosts = len(self.hosts)
            body = make_page(host, page, self.pages, self.page_bytes, self._base, hosts=hosts, seed=self.seed)
            response = self._cache[host, page] = reply(body)
            self._cached += len(response)
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                self._cached -= len(self._cache.pop(next(iter(self._cache))))
        return response

    def _count(self, host: int, target: str) -> int:
        self._counts[host, target] += 1
        if len(self._counts) > COUNTS_LIMIT:
            del self._counts[next(iter(self._counts))]
        return self._counts[host, target]

    def _record(self, now: float, connection: Connection, target: str, status: int | None) -> None:
        with self._lock:
            self._statuses[status] += 1
            self._log.append(LogEntry(now, self.hosts[connection.host], target, status, connection.number))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM (exit code 130); see --help."""
    parser = argparse.ArgumentParser(
        description="Serve a small internet on loopback: linked sites, and a catalogue of servers that misbehave.",
        epilog=f"""examples:
  python sandbox.py --hosts 50 --pages 200 --urls urls.txt
  python sandbox.py --latency 0.2 & curl -s --compressed http://127.0.1.1:8080/fault/gzip
  python sandbox.py --urls - | python crawl_async.py -

Every host serves / and /p/N.html (its pages), /robots.txt, /status/N for N from 100 to 599, and /fault/NAME for each
name below. "right result" is what a client should make of it without retries; so many "retries" make it succeed.

{catalogue()}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", type=int, default=8, metavar="N", help="addresses from 127.0.1.1 up (%(default)s)")
    parser.add_argument("--pages", type=int, default=25, metavar="N", help="pages of each host (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, metavar="P", help="0 finds a free one (%(default)s)")
    parser.add_argument("--size", type=int, default=20_000, metavar="B", help="bytes of a page (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the generated pages (%(default)s)")
    parser.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds before each answer")
    parser.add_argument("--list", action="store_true", help="print the catalogue and exit")
    parser.add_argument("--urls", metavar="FILE", help="write the URL of every page (- for stdout), and serve")
    args = parser.parse_args(argv)
    try:
        if args.list:
            print(catalogue(), flush=True)
            return 0
        with Sandbox(args.hosts, args.pages, args.size, args.port, args.seed, args.latency, log=False) as sandbox:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            lines = (url + "\n" for url in sandbox.site_urls())
            if args.urls == "-":
                sys.stdout.writelines(lines)
                sys.stdout.flush()
                _leave_stdout()
            elif args.urls:
                with open(args.urls, "w", encoding="ascii") as file:
                    file.writelines(lines)
            print(f"serving {sandbox.url('/')} to {sandbox.url('/', -1)}, Ctrl-C stops", file=sys.stderr)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _leave_stdout()
    except OSError as error:
        print(f"sandbox: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2
    return 0


def _leave_stdout() -> None:
    """Let the reader of our standard output see its end; or write no more to one that has gone."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)


if __name__ == "__main__":
    sys.exit(main())
