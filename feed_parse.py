"""Sitemaps and feeds: bytes in, the addresses that they announce out.

Theory.  A sitemap may have 50,000 addresses in 50 MiB, in XML that is often broken, and it is a stranger's: so it is
never held as a whole but streamed, 256 KiB at a time, through inflating, decoding, mending and Expat.  Mending makes
an "&" that is no reference of XML itself into text.  That saves the many sitemaps with bare "&" in their addresses,
and no entity is ever expanded, whoever declares it; a document that declares one is refused on top.
A feed is smaller and stranger: feedparser, which knows every dialect, reads it, once its encoding is settled here.

Promised
- Nothing here raises, whatever the bytes; nothing is fetched or opened. At most MAX_SITEMAP or MAX_FEED bytes are
  read, after inflating. A sitemap's time and memory are linear in them; so are a feed's as far as known: where
  feedparser's are not (tags, authors, namespaces, white space), it is kept from them here.
- What was found before a fault, a limit or a torn end is kept, and `truncated` says so.
- All addresses are http or https, normalised, each once, in the order of the document.

Not promised
- To be quick: feedparser takes half a second for 1 MB, trafilatura too, a full sitemap as much, a hostile document
  seconds. Call them in a thread.
- Addresses of the image, video and hreflang extensions are not looked at.

Articles are read by trafilatura, kept from what takes it quadratic time: giant tags, thousands of tables.

Every function is pure.  feedparser is imported when the first feed comes, trafilatura when the first article does: that
costs 0.1 s and 0.2 s.
"""

from __future__ import annotations

import codecs
import contextlib
import html
import io
import logging
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, NamedTuple
from xml.parsers import expat
from xml.sax import SAXException
from xml.sax.expatreader import create_parser
from xml.sax.xmlreader import InputSource

import ada_url
import webencodings

from crawl_rules import MAX_URL, FetchError, normalise
from html_parse import parse_page

MAX_SITEMAP = 50 * 1024 * 1024
"""Bytes of a sitemap that are read, after inflating (sitemaps.org's own limit)."""
MAX_LOCATIONS = 50_000
"""Addresses of one sitemap that are kept (sitemaps.org's own limit), left out ones counted in."""
MAX_FEED = 5 * 1024 * 1024
MAX_TEXT = 100_000
"""Characters of one entry's text that are kept."""
MAX_ARTICLE = 1_000_000
"""Characters of an article's page that its text is looked for in."""

_PIECE = 1 << 18
_MAX_TOKEN = 1 << 20  # bytes of one tag, comment or the like: Expat scans an unfinished one anew with every piece
_MAX_DEPTH = 64
_MAX_ELEMENTS = 2_000_000
_MAX_FEED_ELEMENTS = 200_000
_MAX_NAMESPACES = 10_000  # feedparser's time is quadratic in them
_DECLARATION = re.compile(r"\A<\?xml\b[^>]*>\s*")
_LONG_SPACE = re.compile(r"\s{40,}")  # and in these, in its search for entities
_GIANT_TAG = re.compile(r"<[^<>]{8192,}>")  # an image in its own address, mostly; with 50,000 attributes it takes 12 s
_MAX_TABLES = 500  # trafilatura's time is quadratic in them
_LONG_PAGE = 200_000  # from here without trafilatura's second opinion, of another algorithm


class SitemapEntry(NamedTuple):
    url: str
    lastmod: str | None
    """ISO 8601, UTC; None if there is none, or none that can be read."""


@dataclass(slots=True)
class Sitemap:
    urls: list[SitemapEntry] = field(default_factory=list)
    sitemaps: list[str] = field(default_factory=list)
    """Further sitemaps that this one, an index, names. Who follows them counts them, and keeps to each once."""
    truncated: bool = False
    """There was more, or there may have been."""
    error: str | None = None
    """Why it was not read to its end."""
    foreign: int = 0
    """Addresses left out as they are of other hosts."""


class FeedEntry(NamedTuple):
    url: str
    title: str | None
    author: str | None
    published: str | None
    """ISO 8601, UTC; when it was changed, if only that is said; None if there is no date, or none that can be read."""
    summary: str | None
    """Text without markup: the full content if the feed has it."""


class _Stop(Exception):
    """Nothing more of this document is read: its argument says why."""


# ------------------------------------------------------------------------------------------------------- sitemaps


def parse_sitemap(body: bytes, url: str, hosts: Collection[str] | None = ()) -> Sitemap:
    """Read a sitemap or an index of sitemaps; XML, RSS, Atom or plain lines, also gzipped.

    ``url`` is where it came from, redirects followed.  It speaks for its own host, and for those of ``hosts``, whose
    robots.txt named it (sitemaps.org, "Sitemaps & Cross Submits"); None: for any.
    """
    sitemap = Sitemap()
    try:
        own = normalise(url)[1]
        found = _Found(sitemap, url, None if hosts is None else {own, *hosts})
        pieces = _decoded(_inflated(body, MAX_SITEMAP))
        for first in pieces:
            if first := first.lstrip("\ufeff \t\r\n"):
                (_read_xml if first[0] == "<" else _read_lines)(first, pieces, found)
    except FetchError as error:
        sitemap.error = f"sitemap's own address: {error.detail}"
    except _Stop as stop:
        sitemap.truncated, sitemap.error = True, str(stop)
    except expat.ExpatError as error:
        sitemap.truncated, sitemap.error = True, f"XML: {error}"
    return sitemap


class _Found:
    """Puts addresses into a sitemap, as far as it may name them."""

    def __init__(self, sitemap: Sitemap, base: str, hosts: Collection[str] | None) -> None:
        self.sitemap, self.base, self.hosts = sitemap, base, hosts
        self._seen: set[str] = set()
        self._left, self._looks = MAX_LOCATIONS, 4 * MAX_LOCATIONS

    def add(self, text: str, lastmod: str | None, *, index: bool) -> None:
        self._looks -= 1
        if self._looks < 0:
            raise _Stop(f"more than {4 * MAX_LOCATIONS} entries, bad and repeated ones counted in")
        if not text or len(text) > MAX_URL:
            return
        try:
            if not text.startswith(("http://", "https://")):
                text = ada_url.join_url(self.base, text)
            target, host = normalise(text)
        except (ValueError, FetchError):
            return
        if target in self._seen:
            return
        if not self._left:
            raise _Stop(f"more than {MAX_LOCATIONS} addresses")
        self._left -= 1
        self._seen.add(target)
        if self.hosts is not None and host not in self.hosts:
            self.sitemap.foreign += 1
        elif index:
            self.sitemap.sitemaps.append(target)
        else:
            self.sitemap.urls.append(SitemapEntry(target, iso_utc(lastmod) if lastmod else None))


def _read_lines(first: str, pieces: Iterator[str], found: _Found) -> None:
    rest = ""
    for piece in _chain(first, pieces):
        *lines, rest = (rest + piece).split("\n")
        if len(rest) > 2 * MAX_URL:
            rest = "-"  # so that no part of it passes for an address
        for line in lines:
            _add_line(line, found)
    _add_line(rest, found)


def _add_line(line: str, found: _Found) -> None:
    line = line.strip()
    if line[:4].lower() == "http":  # no relative ones: any prose would be
        found.add(line, None, index=False)


_BARE = re.compile(r"&(?!(?:amp|lt|gt|quot|apos|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});)")
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]+")  # characters that XML cannot have
# By the kind of entry, what its direct children are.
_FIELDS = {
    "url": {"loc": "loc", "lastmod": "date"},
    "sitemap": {"loc": "loc", "lastmod": "date"},
    "item": {"link": "loc", "pubdate": "date", "date": "date"},
    "entry": {"link": "loc", "updated": "date", "modified": "date"},
}


def _read_xml(first: str, pieces: Iterator[str], found: _Found) -> None:
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    _Handlers(parser, found)
    carry, fed = "", 0
    for piece in _chain(first, pieces):
        text, carry = carry + piece, ""
        cut = text.rfind("&", -12)
        if cut >= 0 and ";" not in text[cut:]:
            text, carry = text[:cut], text[cut:]
        fed += _feed(parser, text)
        if fed - max(0, parser.CurrentByteIndex) > _MAX_TOKEN:
            raise _Stop(f"XML: a single construct of more than {_MAX_TOKEN} bytes")
    _feed(parser, carry)
    parser.Parse(b"", True)


def _feed(parser: expat.XMLParserType, text: str) -> int:
    data = _BARE.sub("&amp;", _NO_XML.sub("", text)).encode("utf-8", "replace")
    parser.Parse(data, False)
    return len(data)


class _Handlers:
    """What Expat tells: entries, by their local names whatever the namespace, and their direct children."""

    def __init__(self, parser: expat.XMLParserType, found: _Found) -> None:
        self._parser, self._found = parser, found
        self._depth = self._elements = 0
        self._kind = self._field = ""  # of the entry that is open, and of the child that is open
        self._entry_depth = 0
        self._text: list[str] = []
        self._size = 0
        self._values: dict[str, str] = {}
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.EntityDeclHandler = self._refuse
        parser.StartCdataSectionHandler = self._in_cdata

    def _refuse(self, *_: Any) -> None:
        raise _Stop("XML: it declares entities")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        self._elements += 1
        if self._depth > _MAX_DEPTH or self._elements > _MAX_ELEMENTS:
            raise _Stop("XML: nested too deep" if self._depth > _MAX_DEPTH else "XML: too many elements")
        name = name.rpartition(":")[2].lower()
        if not self._kind:
            if name in _FIELDS:
                self._kind, self._entry_depth = name, self._depth
                self._values = {}
            elif self._depth == 1 and name == "html":
                raise _Stop("an HTML page")
        elif self._depth == self._entry_depth + 1 and (what := _FIELDS[self._kind].get(name)):
            href = attributes.get("href")
            if href is None:
                self._field, self._text, self._size = what, [], 0
                self._parser.CharacterDataHandler = self._characters
            elif self._kind == "entry" and attributes.get("rel", "alternate").lower() == "alternate":
                self._values.setdefault("loc", href.strip())

    def _characters(self, text: str) -> None:
        self._size += len(text)
        if self._size <= 2 * MAX_URL:
            self._text.append(text)

    def _in_cdata(self) -> None:
        if self._field:
            self._text.append("\0")  # which no XML has

    def _end(self, _: str) -> None:
        if self._field and self._depth == self._entry_depth + 1:
            text, cdata, rest = "".join(self._text).partition("\0")
            if cdata:  # no references are read there, and mending put some in
                text += html.unescape(rest.replace("\0", ""))
            if self._size <= 2 * MAX_URL and (text := text.strip()):
                self._values.setdefault(self._field, text)
            self._field = ""
            self._parser.CharacterDataHandler = None
        elif self._kind and self._depth == self._entry_depth:
            self._found.add(self._values.get("loc", ""), self._values.get("date"), index=self._kind == "sitemap")
            self._kind = ""
        self._depth -= 1


# ---------------------------------------------------------------------------------------------------------- feeds


def parse_feed(body: bytes, url: str, headers: Mapping[str, str] | None = None) -> list[FeedEntry]:
    """The entries of an RSS (0.9x, 1.0, 2.0) or Atom feed, well-formed or not; [] if it is none.

    ``url`` is where it came from, redirects followed; relative links start from it or from xml:base.  ``headers`` are
    the answer's, read for the charset of Content-Type.  An entry without a link is left out.  Costs about 0.5 s per MB.
    """
    pieces: list[str] = []
    with contextlib.suppress(_Stop):  # a torn or endless feed still has its first entries, the newest
        for piece in _decoded(_inflated(body, MAX_FEED), (headers or {}).get("Content-Type")):
            pieces += (piece,)
    text = _LONG_SPACE.sub(" ", _NO_XML.sub("", "".join(pieces)).lstrip("\ufeff \t\r\n"))
    text = _DECLARATION.sub("", text, count=1)  # its encoding holds no longer
    if not text.startswith("<") or text.count("xmlns") > _MAX_NAMESPACES:
        return []
    try:
        entries = _feed_entries(text.encode("utf-8", "replace"), url)
    except Exception:  # whatever a parser of a hundred dialects may trip over
        return []
    found: dict[str, FeedEntry] = {}
    for entry in entries:
        try:
            if (read := _read_entry(entry, url)) and read.url not in found:
                found[read.url] = read
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
            continue
    return list(found.values())


_FEED = re.compile(rb"<(?:[a-zA-Z]\w{0,20}:)?(?:rss|feed|RDF|channel)[\s/>]")


def is_feed(body: bytes) -> bool:
    """Whether a body in which ``parse_feed`` found nothing begins like a feed: it may have no entries today."""
    return _FEED.search(body[:2048]) is not None


@cache
def _feed_parsers() -> tuple[Any, Any]:
    """feedparser's two parsers, strict and loose, without what takes quadratic time or is not asked for here."""
    import feedparser.api  # type: ignore[import-untyped]

    class Bounded:
        elements = 0

        def unknown_starttag(self, *tag: Any) -> None:
            self.elements += 1
            if self.elements > _MAX_FEED_ELEMENTS:
                raise _Stop("too many elements")
            super().unknown_starttag(*tag)  # type: ignore[misc]

        def _add_tag(self, *tag: Any) -> None:
            self._get_context()["tags"] = []  # type: ignore[attr-defined]  # else each is compared with all others
            super()._add_tag(*tag)  # type: ignore[misc]

        def _sync_author_detail(self, key: str = "author") -> None:
            if len(str(self._get_context().get(key) or "")) <= 300:  # type: ignore[attr-defined]
                super()._sync_author_detail(key)  # type: ignore[misc]

    strict = type("Strict", (Bounded, feedparser.api.StrictFeedParser), {})
    return strict, type("Loose", (Bounded, feedparser.api.LooseFeedParser), {})


def _feed_entries(data: bytes, url: str) -> list[Any]:
    """What feedparser.parse does with a body once its encoding is known. That itself, given bytes, may open a file."""
    strict, loose = _feed_parsers()
    from feedparser.sanitizer import replace_doctype  # type: ignore[import-untyped]

    _, data, entities = replace_doctype(data)
    for kind in (strict, loose):
        parser = kind(url, None, "utf-8", *([entities] if kind is loose else []))
        parser.resolve_relative_uris = parser.sanitize_html = False
        try:
            if kind is loose:
                parser.feed(data.decode("utf-8", "replace"))
            else:
                reader = create_parser(namespaceHandling=True)  # fetches no external entity: Python's default
                reader.setContentHandler(parser)
                reader.setErrorHandler(parser)
                source = InputSource()
                source.setByteStream(io.BytesIO(data))
                reader.parse(source)
        except _Stop:
            pass
        except SAXException:
            continue
        return list(parser.entries)
    return []


def _read_entry(entry: Any, base: str) -> FeedEntry | None:
    link = entry.get("link")
    if not isinstance(link, str) or not link or len(link) > MAX_URL:
        return None
    try:
        target = normalise(ada_url.join_url(base, link))[0]
    except (ValueError, FetchError):
        return None
    dates = (dict.get(entry, f"{what}_parsed") for what in ("published", "updated", "created"))
    when = next(filter(None, dates), None)
    contents = [entry.get("summary_detail"), *(entry.get("content") or ())]
    texts = [text for part in contents if part and (text := _plain(part.get("value"), part.get("type")))]
    title = entry.get("title_detail") or {}
    return FeedEntry(
        target,
        _plain(title.get("value"), title.get("type")),
        _plain(entry.get("author"), "text/plain"),
        _utc(datetime(*when[:6])) if when else None,
        max(texts, key=len, default=None),
    )


def _plain(text: object, kind: str | None) -> str | None:
    """The words of a text, without markup unless its type says that it has none."""
    if not isinstance(text, str):
        return None
    text = text[: 4 * MAX_TEXT]
    if kind != "text/plain" and ("<" in text or "&" in text):
        text = parse_page(b"<body>" + text.encode("utf-8", "replace"), "", "text/html; charset=utf-8").text
        return text[:MAX_TEXT].strip() or None
    return " ".join(text.split())[:MAX_TEXT].strip() or None


# ------------------------------------------------------------------------------------------------------- articles


class Article(NamedTuple):
    text: str | None
    author: str | None
    published: str | None
    """ISO 8601, UTC."""


@cache
def extractor() -> Any:
    """trafilatura's extraction. To be called ahead, in a thread, by who knows that articles will come: 0.2 s."""
    import trafilatura

    for name in ("trafilatura", "htmldate"):  # they complain of pages, on stderr
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return trafilatura.bare_extraction


def read_article(body: bytes, url: str, content_type: str | None = None) -> Article:
    """The main text of an HTML page, and what the page says of it; Nones where it says nothing.

    10 ms for 20 KB, half a second for 1 MB; of a longer page the first MAX_ARTICLE characters are read. The date is one
    that the page declares: trafilatura would guess one from the numbers in its text.
    """
    page = webencodings.decode(body, parse_page(body, url, content_type).encoding, "replace")[0]
    page = _GIANT_TAG.sub("", _NO_XML.sub("", page[:MAX_ARTICLE]))
    declared = (
        iso_utc(html.unescape(match[match.lastindex or 0])) for dated in _DATED for match in dated.finditer(page)
    )
    published = next(filter(None, declared), None)
    try:
        found = extractor()(
            page,
            url=url,
            with_metadata=True,
            fast=len(page) > _LONG_PAGE,
            include_comments=False,
            include_tables=page.count("<table") <= _MAX_TABLES,
            date_extraction_params={"extensive_search": False, "original_date": True},
        )
    except Exception:  # whatever it may trip over
        found = None
    if found is None:
        return Article(None, None, published)
    return Article(found.text or None, found.author or None, published)


# Where a page says when it was published: <meta>, JSON-LD or microdata, <time>.
_NAMES = (
    r"(?:article|og):published_time|datePublished|date|pubdate|publish-?date|publication_?date|parsely-pub-date"
    r"|sailthru\.date|dc(?:terms)?\.(?:date|created|issued)(?:\.issued)?"
)
_VALUE = r"""\s*=\s*(?:"([^"<>]{4,64})"|'([^'<>]{4,64})'|([^\s"'<>]{4,64}))"""
_DATED = tuple(
    re.compile(text, re.IGNORECASE)
    for text in (
        rf'<meta\b(?=[^<>]{{0,1000}}?\b(?:name|property|itemprop)\s*=\s*["\']?(?:{_NAMES})["\'\s/>])'
        rf"[^<>]{{0,1000}}?\bcontent{_VALUE}",
        r'"datePublished"\s*:\s*"([^"<>]{4,64})"',
        rf"<time\b[^<>]{{0,1000}}?\bdatetime{_VALUE}",
    )
)


# -------------------------------------------------------------------------------------------------------- helpers


def iso_utc(text: str) -> str | None:
    """A date of ISO 8601 or of e-mail as ISO 8601 in UTC, one without a zone taken for UTC; None if it is neither.

    "2024" and "2024-05", which W3C's profile of ISO 8601 allows, are the beginning of that year or month.
    """
    text = text.strip()
    if len(text) > 64:
        return None
    try:
        if text[:4].isdigit():
            when = datetime.fromisoformat(text + "-01-01"[len(text) - 4 :] if len(text) in (4, 7) else text)
        else:
            when = parsedate_to_datetime(text)
        return _utc(when if when.tzinfo else when.replace(tzinfo=UTC))
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _utc(when: datetime) -> str:
    offset = when.utcoffset() or timedelta()
    return (when.replace(tzinfo=None) - offset).isoformat(timespec="seconds") + "Z"


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _inflated(body: bytes, limit: int) -> Iterator[bytes]:
    """The body in pieces, without its gzip if it begins like one; _Stop past ``limit``, or where it is torn."""
    if not body.startswith(b"\x1f\x8b"):
        for start in range(0, min(len(body), limit), _PIECE):
            yield body[start : min(start + _PIECE, limit)]
        if len(body) > limit:
            raise _Stop(f"larger than {limit} bytes")
        return
    total, start = 0, 0
    inflate, data = zlib.decompressobj(31), b""
    step = _PIECE >> 4  # what is left of it is copied after each member, of which a hostile file has many
    try:
        while True:
            if not data:
                if start >= len(body):
                    break
                data = body[start : start + step]
                start += step
            piece = inflate.decompress(data, _PIECE)
            data = inflate.unconsumed_tail
            if piece:
                yield piece[: max(0, limit - total)]
                total += len(piece)
                if total > limit:
                    raise _Stop(f"larger than {limit} bytes")
            if inflate.eof:
                data = inflate.unused_data or body[start : (start := start + step)]
                if not data.startswith(b"\x1f\x8b"):
                    return  # padding, or nothing
                inflate = zlib.decompressobj(31)
    except zlib.error as error:
        raise _Stop(f"gzip: {error}") from None
    raise _Stop("gzip: it ends too soon")


_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([a-zA-Z0-9._:-]{1,40})["']""")
_CHARSET = re.compile(r"""charset\s*=\s*["']?([a-zA-Z0-9._:-]{1,40})""", re.IGNORECASE)
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16le"), (b"\xfe\xff", "utf-16be"))
_SHAPES = ((b"<\0", "utf-16le"), (b"\0<", "utf-16be"))


def _decoded(pieces: Iterator[bytes], content_type: str | None = None) -> Iterator[str]:
    """The text of the pieces: by BOM, then HTTP's charset, then the XML declaration (RFC 7303, section 3)."""
    decoder: codecs.IncrementalDecoder | None = None
    for piece in pieces:
        if decoder is None:
            decoder = _codec(piece, content_type).incrementaldecoder("replace")
        yield decoder.decode(piece)
    if decoder:
        yield decoder.decode(b"", True)


def _codec(head: bytes, content_type: str | None) -> codecs.CodecInfo:
    for mark, name in (*_BOMS, *_SHAPES):
        if head.startswith(mark):
            return codecs.lookup(name.replace("utf-16", "utf-16-"))
    told = _CHARSET.search(content_type or "")
    declared = _DECLARED.match(head[:1024])
    for label in (told[1] if told else None, declared[1].decode() if declared else None):
        encoding = webencodings.lookup(label) if label else None
        if encoding and not encoding.name.startswith("utf-16"):  # the declaration was read as ASCII: it is none
            return encoding.codec_info
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return codecs.lookup("cp1252")
    return codecs.lookup("utf-8")
