"""Sitemaps: XML, text, gzip; the addresses that they name out.

A sitemap may have 50,000 addresses in 50 MiB, in XML that is often broken: so it is streamed through inflating,
decoding, mending (crawl/xml.py) and Expat. Mending makes an "&" that is no reference of XML itself into text, so no
entity is ever expanded, whoever declares it; a document that declares one is refused on top.

Promised: nothing here raises, whatever the bytes. At most MAX_SITEMAP bytes are read, after inflating; time and memory
are linear in them. What was found before a fault, a limit or a torn end is kept, and `error` says so. All addresses
are http or https, normalised, each once, in the order of the document; those of images, videos and hreflang left out.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from crawl.errors import FetchError
from crawl.urls import MAX_URL, join, normalise
from crawl.xml import NOT_XML, StopReading, decode_pieces, inflate_pieces, local_name

MAX_SITEMAP = 50 * 1024 * 1024  # bytes of a sitemap that are read, after inflating (sitemaps.org's own limit)
MAX_LOCATIONS = 50_000  # addresses of one sitemap that are kept (sitemaps.org's own limit), left out ones counted in
MAX_DEPTH, MAX_ELEMENTS = 64, 2_000_000
MAX_TOKEN = 1 << 20  # bytes of one tag, comment or the like: Expat scans an unfinished one anew with every piece

_BARE = re.compile(r"&(?!(?:amp|lt|gt|quot|apos|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});)")
_ADDRESS_OF = {"url": "loc", "sitemap": "loc", "item": "link", "entry": "link"}  # which child of an entry holds it


@dataclass(slots=True)
class Sitemap:
    """What a sitemap names."""

    urls: list[str] = field(default_factory=list)
    sitemaps: list[str] = field(default_factory=list)
    """Further sitemaps that this one, an index, names. Who follows them counts them, and keeps to each once."""
    error: str | None = None  # why it was not read to its end


def parse_sitemap(body: bytes, url: str, hosts: Collection[str] | None = ()) -> Sitemap:
    """Read a sitemap or an index of sitemaps; XML, RSS, Atom or plain lines, also gzipped.

    ``url`` is where it came from, redirects followed.  It speaks for its own host, and for those of ``hosts``, whose
    robots.txt named it (sitemaps.org, "Sitemaps & Cross Submits"); None: for any.
    """
    sitemap = Sitemap()
    try:
        own = normalise(url)[1]
        found = _Found(sitemap, url, None if hosts is None else {own, *hosts})
        pieces = decode_pieces(inflate_pieces(body, MAX_SITEMAP))
        for first in pieces:
            if first := first.lstrip("\ufeff \t\r\n"):
                (_read_xml if first[0] == "<" else _read_lines)(first, pieces, found)
    except FetchError as error:
        sitemap.error = f"sitemap's own address: {error.detail}"
    except StopReading as stop:
        sitemap.error = str(stop)
    except expat.ExpatError as error:
        sitemap.error = f"XML: {error}"
    return sitemap


class _Found:
    """Puts addresses into a sitemap, as far as it may name them."""

    def __init__(self, sitemap: Sitemap, base: str, hosts: Collection[str] | None) -> None:
        self.sitemap, self.base, self.hosts = sitemap, base, hosts
        self._seen: set[str] = set()
        self._left, self._looks = MAX_LOCATIONS, 4 * MAX_LOCATIONS

    def add(self, text: str, *, index: bool) -> None:
        self._looks -= 1
        if self._looks < 0:
            raise StopReading(f"more than {4 * MAX_LOCATIONS} entries, bad and repeated ones counted in")
        if not text or len(text) > MAX_URL:
            return
        try:
            target, host = normalise(text) if text.startswith(("http://", "https://")) else join(self.base, text)
        except FetchError:
            return
        if target in self._seen:
            return
        if not self._left:
            raise StopReading(f"more than {MAX_LOCATIONS} addresses")
        self._left -= 1
        self._seen.add(target)
        if self.hosts is None or host in self.hosts:
            (self.sitemap.sitemaps if index else self.sitemap.urls).append(target)


def _read_lines(first: str, pieces: Iterator[str], found: _Found) -> None:
    rest = ""
    for piece in itertools.chain([first], pieces, ["\n"]):
        *lines, rest = (rest + piece).split("\n")
        if len(rest) > 2 * MAX_URL:
            rest = "-"  # so that no part of it passes for an address
        for line in map(str.strip, lines):
            if line[:4].lower() == "http":  # no relative ones: any prose would be
                found.add(line, index=False)


def _read_xml(first: str, pieces: Iterator[str], found: _Found) -> None:
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    _Handlers(parser, found)
    carry, fed = "", 0
    for piece in itertools.chain([first], pieces):
        text, carry = carry + piece, ""
        cut = text.rfind("&", -12)
        if cut >= 0 and ";" not in text[cut:]:
            text, carry = text[:cut], text[cut:]
        fed += _feed(parser, text)
        if fed - max(0, parser.CurrentByteIndex) > MAX_TOKEN:
            raise StopReading(f"XML: a single construct of more than {MAX_TOKEN} bytes")
    _feed(parser, carry)
    parser.Parse(b"", True)


def _feed(parser: expat.XMLParserType, text: str) -> int:
    data = _BARE.sub("&amp;", NOT_XML.sub("", text)).encode("utf-8", "replace")
    parser.Parse(data, False)
    return len(data)


class _Handlers:
    """What Expat tells: entries, by their local names whatever the namespace, and their direct children."""

    def __init__(self, parser: expat.XMLParserType, found: _Found) -> None:
        self._parser, self._found = parser, found
        self._depth = self._elements = 0
        self._kind = self._address = ""  # of the entry that is open
        self._in_address = False
        self._entry_depth = 0
        self._text: list[str] = []
        self._size = 0
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.EntityDeclHandler = self._refuse
        parser.StartCdataSectionHandler = self._in_cdata

    def _refuse(self, *_: Any) -> None:
        raise StopReading("XML: it declares entities")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH or self._elements > MAX_ELEMENTS:
            raise StopReading("XML: nested too deep" if self._depth > MAX_DEPTH else "XML: too many elements")
        name = local_name(name).lower()
        if not self._kind:
            if name in _ADDRESS_OF:
                self._kind, self._entry_depth, self._address = name, self._depth, ""
            elif self._depth == 1 and name == "html":
                raise StopReading("an HTML page")
        elif self._depth == self._entry_depth + 1 and name == _ADDRESS_OF[self._kind]:
            href = attributes.get("href")
            if href is None:
                self._in_address, self._text, self._size = True, [], 0
                self._parser.CharacterDataHandler = self._characters
            elif self._kind == "entry" and attributes.get("rel", "alternate").lower() == "alternate":
                self._address = self._address or href.strip()

    def _characters(self, text: str) -> None:
        self._size += len(text)
        if self._size <= 2 * MAX_URL:
            self._text.append(text)

    def _in_cdata(self) -> None:
        if self._in_address:
            self._text.append("\0")  # which no XML has

    def _end(self, _: str) -> None:
        if self._in_address and self._depth == self._entry_depth + 1:
            text, cdata, rest = "".join(self._text).partition("\0")
            if cdata:  # no references are read there, and mending put some in
                text += html.unescape(rest.replace("\0", ""))
            if self._size <= 2 * MAX_URL:
                self._address = self._address or text.strip()
            self._in_address = False
            self._parser.CharacterDataHandler = None
        elif self._kind and self._depth == self._entry_depth:
            self._found.add(self._address, index=self._kind == "sitemap")
            self._kind = ""
        self._depth -= 1
