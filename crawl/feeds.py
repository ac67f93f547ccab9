"""Sitemaps and feeds: bytes in, the addresses that they announce out.

Theory.  A sitemap may have 50,000 addresses in 50 MiB, in XML that is often broken, and it is a stranger's: so it is
never held as a whole but streamed, 256 KiB at a time, through inflating, decoding, mending and Expat.  Mending makes
an "&" that is no reference of XML itself into text.  That saves the many sitemaps with bare "&" in their addresses,
and no entity is ever expanded, whoever declares it; a document that declares one is refused on top.
A feed is smaller and stranger: feedparser, which knows every dialect, reads it, once its encoding is settled and its
bad references are mended here.  It is shown an entry's own fields only, and its dates are read here: it would guess.

Promised
- Nothing here raises but MemoryError, whatever the bytes; nothing is fetched or opened. At most MAX_SITEMAP or MAX_FEED
  bytes are read, after inflating. A sitemap's time and memory are linear in them; so are a feed's as far as known:
  where feedparser's are not (nesting, authors, namespaces, white space), it is kept from them here.
- What was found before a fault, a limit or a torn end is kept, and `truncated` or `fault` says so. A field that cannot
  be read is None, a date that is not one of a known form from end to end too; the rest of its entry is kept.
- All addresses are http or https, normalised, each once, in the order of the document.

Not promised
- To be quick: feedparser takes half a second for 1 MB, trafilatura too, a full sitemap as much. What they do with a
  hostile document is bounded by nobody: read feeds and articles where that can be ended (crawl/readers.py).
- Addresses of the image, video and hreflang extensions are not looked at.

Articles are read by trafilatura, kept from what takes it quadratic time: giant tags, thousands of tables.

Every function is pure.  feedparser is imported when the first feed comes, trafilatura when the first article does: that
costs 0.1 s and 0.2 s.
"""

from __future__ import annotations

import codecs
import html
import io
import logging
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, lru_cache
from typing import Any, NamedTuple
from xml.parsers import expat
from xml.sax.expatreader import create_parser
from xml.sax.xmlreader import InputSource

import ada_url
import webencodings

from crawl.rules import MAX_URL, FetchError, normalise
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
MAX_TAGS = 50_000
"""Tags of it: each costs trafilatura some 25 microseconds, however short it is."""

_PIECE = 1 << 18
_MAX_TOKEN = 1 << 20  # bytes of one tag, comment or the like: Expat scans an unfinished one anew with every piece
_MAX_DEPTH = 64
_MAX_ELEMENTS = 2_000_000
_MAX_FEED_ELEMENTS = 200_000
_MAX_NAMESPACES = 200  # by different prefixes: feedparser looks through them for each element
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
        name = _local(name).lower()
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


def bounds(function: Callable[..., Any], size: int) -> tuple[float, int]:
    """(Seconds of processor time, bytes of memory) that reading so many bytes may take: ten times the usual.

    ``function`` is ``parse_feed``, or ``read_article``, which reads MAX_ARTICLE characters.
    """
    if function is parse_feed:
        return 2.0 + 4e-6 * size, (32 << 20) + 24 * size
    read = min(size, MAX_ARTICLE)
    return 1.0 + 5e-6 * read + 2e-7 * size, (32 << 20) + 64 * read + 8 * size


class Feed(NamedTuple):
    entries: list[FeedEntry]
    fault: str | None
    """Why there may be more than these entries; ``NO_FEED``: there is nothing of a feed in it."""


_TOO_LONG = "it takes too long"
NO_FEED = "no RSS or Atom feed"
_FEED = re.compile(r"<(?:[a-zA-Z]\w{0,20}:)?(?:rss|feed|RDF|channel)[\s/>]")


def parse_feed(body: bytes, url: str, headers: Mapping[str, str] | None = None) -> Feed:
    """The entries of an RSS (0.9x, 1.0, 2.0) or Atom feed, well-formed or not.

    ``url`` is where it came from, redirects followed; relative links start from it or from xml:base.  ``headers`` are
    the answer's, read for the charset of Content-Type.  An entry without a link is left out.  Costs about 0.5 s per MB.
    Raises MemoryError.
    """
    pieces: list[str] = []
    fault: str | None = None
    try:
        for piece in _decoded(_inflated(body, MAX_FEED), (headers or {}).get("Content-Type")):
            pieces += (piece,)
    except _Stop as stop:
        fault = str(stop)
    text = _LONG_SPACE.sub(" ", _NO_XML.sub("", "".join(pieces)).lstrip("\ufeff \t\r\n"))
    text = mend_references(_DECLARATION.sub("", text, count=1))  # its encoding holds no longer
    feed_parsers()
    began, seconds = time.thread_time(), bounds(parse_feed, len(body))[0]  # rather than be ended with nothing
    entries, why = list[Any](), None
    if text.startswith("<"):
        entries, why = _feed_entries(text.encode("utf-8", "replace"), url, began + 0.6 * seconds)
    found: dict[str, FeedEntry] = {}
    for entry in entries:
        if time.thread_time() > began + 0.9 * seconds:
            why = _TOO_LONG
            break
        if (read := _read_entry(entry, url)) and read.url not in found:
            found[read.url] = read
    if not found and not _FEED.search(text[:2048]):
        return Feed([], NO_FEED if fault is None else f"{NO_FEED}: {fault}")
    return Feed(list(found.values()), fault or why)


_ENTRIES = {"item", "entry"}
_BEGINS = (rb"<(?:\w{1,20}:)?item[\s>]", rb"<(?:\w{1,20}:)?entry[\s>]")  # of one kind: the others may be nested
_AROUND = {"rss", "rdf_rdf", "rdf", "feed", "channel"}
# Of an entry's direct children those that are asked for, by the names of feedparser's methods; of an author's, too.
_CHILDREN = {
    *("title", "dc_title", "media_title", "link", "guid", "id"),
    *("author", "managingeditor", "dc_creator", "dc_author", "itunes_author"),
    *("description", "abstract", "dc_description", "summary", "itunes_summary"),
    *("content", "content_encoded", "fullitem", "body", "xhtml_body"),
}
_DATES = {
    "published": ("pubdate", "published", "issued", "dcterms_issued"),
    "updated": ("updated", "modified", "dc_date", "dcterms_modified"),
    "created": ("created", "dcterms_created"),
}
_DATE_OF = {name: key for key, names in _DATES.items() for name in names}
_OF_AUTHORS = {"name", "email", "uri", "url", "homepage"}


def _local(tag: str) -> str:
    return tag.rpartition(":")[2]


@cache
def feed_parsers() -> tuple[Any, Any]:
    """feedparser's two parsers, strict and loose, imported: 0.1 s.

    They are shown an entry's own title, link and so on, and nothing else: what is nested deeper, or beside the entries,
    they would take for its own, too.  Nor are they shown what takes them quadratic time.
    """
    import feedparser.api  # type: ignore[import-untyped]

    class Bounded:
        """Between the tokens and feedparser: ``_path`` is what is open, and whether feedparser knows of it."""

        loose = False
        elements = 0
        until = math.inf

        def __init__(self, *args: Any) -> None:
            self._path: list[tuple[str, str, bool]] = []
            self._open = Counter[str]()
            self._entry = 0  # length of the path down to the entry; 0: in none
            self._text = ""  # the name of what holds text or markup, if that is open
            self._nested = 0  # elements of that name in it
            super().__init__(*args)

        @property
        def torn(self) -> bool:
            return bool(self._path)

        def _mapped(self, tag: str) -> str:
            prefix, _, local = tag.rpartition(":")
            prefix = self.namespacemap.get(prefix, prefix)  # type: ignore[attr-defined]
            return (f"{prefix}_{local}" if prefix else local).lower()

        def _is_entry(self, name: str) -> bool:
            """Whether this is what the open entry is: in no good XML it begins or ends within that, or its texts."""
            return self.loose and self._entry > 0 and name == self._path[self._entry - 1][0]

        def _is_shown(self, name: str) -> bool:
            if not self._entry:
                return name in _AROUND or name in _ENTRIES
            if len(self._path) == self._entry:
                return name in _CHILDREN or name in _DATE_OF
            above, _, shown = self._path[-1]
            return shown and name in _OF_AUTHORS and "author" in above

        def unknown_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
            self.elements += 1
            if self.elements > _MAX_FEED_ELEMENTS:
                raise _Stop("too many elements")
            if time.thread_time() > self.until:
                raise _Stop(_TOO_LONG)
            name = self._mapped(tag)
            if self._is_entry(name):  # the one before was not closed
                self._close(self._entry - 1)
            if self._text:
                self._nested += name == self._text
                self._add_markup(name, f"<{_local(tag)}{self.strattrs(attrs)}>")  # type: ignore[attr-defined]
                return
            shown = self._is_shown(name)
            if shown:
                attrs = [(key, value) for key, value in attrs if len(value) <= 2 * MAX_URL]
                if name not in _DATE_OF:
                    super().unknown_starttag(tag, attrs)  # type: ignore[misc]
                else:
                    self.push(_DATE_OF[name], 1)  # type: ignore[attr-defined]
            if name == "link" and any(key.lower() == "href" for key, _ in attrs):  # as in HTML, it may have no end
                if shown:
                    super().unknown_endtag(tag)  # type: ignore[misc]
                return
            self._path.append((name, tag, shown))
            self._open[name] += 1
            if shown and name in _ENTRIES:
                self._entry = len(self._path)
            if shown and self.incontent:  # type: ignore[attr-defined]
                self._text, self._nested = name, 0

        def unknown_endtag(self, tag: str) -> None:
            name = self._mapped(tag)
            in_text = self._text and (name != self._text or self._nested)
            if in_text and not self._is_entry(name):
                self._nested -= name == self._text
                self._add_markup(name, f"</{_local(tag)}>")
                return
            if self._open[name]:
                at = len(self._path) - 1
                while self._path[at][0] != name:
                    at -= 1
                self._close(at)

        def _close(self, length: int) -> None:
            """Close what is open, down to so many."""
            while len(self._path) > length:
                name, tag, shown = self._path.pop()
                self._open[name] -= 1
                if self._text:
                    pieces = self.elementstack[-1][2]  # type: ignore[attr-defined]
                    pieces[:] = ["".join(one.decode() if isinstance(one, bytes) else one for one in pieces)]
                    self._text = ""
                if shown and name in _DATE_OF:
                    self.pop(_DATE_OF[name])  # type: ignore[attr-defined]
                elif shown:
                    super().unknown_endtag(tag)  # type: ignore[misc]
                if len(self._path) < self._entry:
                    self._entry = 0

        def _add_markup(self, name: str, markup: str) -> None:
            """As feedparser does it: a text that is said to be escaped, but has elements in it, is not escaped."""
            params = self.contentparams  # type: ignore[attr-defined]
            if not params.get("type", "xml").endswith("xml"):
                if name in ("div", "xhtml_div"):
                    return
                params["type"] = "application/xhtml+xml"
            self.elementstack[-1][2].append(markup)  # type: ignore[attr-defined]

        def _hears(self) -> bool:
            return bool(self._text or (self._path and self._path[-1][2]))

        def handle_data(self, *data: Any) -> None:
            if self._hears():
                super().handle_data(*data)  # type: ignore[misc]

        def handle_charref(self, ref: str) -> None:
            if self._hears():
                mended = mend_references(f"&#{ref};")  # it came without its semicolon, or it would be mended by now
                if mended[0] == "&":
                    super().handle_charref(ref)  # type: ignore[misc]
                else:
                    super().handle_data(mended)  # type: ignore[misc]

        def handle_entityref(self, ref: str) -> None:
            if self._hears():
                super().handle_entityref(ref)  # type: ignore[misc]

        def track_namespace(self, prefix: str | None, uri: str) -> None:
            super().track_namespace(prefix, uri)  # type: ignore[misc]
            if len(self.namespaces_in_use) > _MAX_NAMESPACES:  # type: ignore[attr-defined]
                raise _Stop("too many namespaces")

        def _sync_author_detail(self, key: str = "author") -> None:
            if len(str(self._get_context().get(key) or "")) <= 300:  # type: ignore[attr-defined]
                super()._sync_author_detail(key)  # type: ignore[misc]

    strict = type("Strict", (Bounded, feedparser.api.StrictFeedParser), {})
    return strict, type("Loose", (Bounded, feedparser.api.LooseFeedParser), {"loose": True})


def _feed_entries(data: bytes, url: str, until: float) -> tuple[list[Any], str | None]:
    """What feedparser.parse does with a body once its encoding is known, and why it did not come to its end.

    feedparser.parse itself, given bytes, may open a file.
    """
    strict, loose = feed_parsers()
    from feedparser.sanitizer import replace_doctype  # type: ignore[import-untyped]

    _, data, entities = replace_doctype(data)
    entries: list[Any] = []
    fault: str | None = None
    for kind in (strict, loose):
        parser = kind(url, None, "utf-8", *([entities] if kind is loose else []))
        parser.resolve_relative_uris = parser.sanitize_html = False
        parser.until = until
        over = True
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
            fault = "it ends too soon" if parser.torn else None
        except _Stop as stop:
            fault = str(stop)
        except MemoryError:
            raise
        except Exception as error:  # whatever a parser of a hundred dialects may trip over
            over, fault = False, f"it cannot be read on: {type(error).__name__}"
        if len(parser.entries) >= len(entries):
            entries = parser.entries
        if kind is loose and len(entries) < max(len(re.findall(begin, data)) for begin in _BEGINS):
            fault = fault or "not all of it can be read"
        if over:
            break
    return list(entries), fault


def _read_entry(entry: Any, base: str) -> FeedEntry | None:
    """What a field says that cannot be read is None; without a link there is no entry."""
    link = entry.get("link")
    if not isinstance(link, str) or not link or len(link) > MAX_URL:
        return None
    try:
        target = normalise(ada_url.join_url(base, link))[0]
    except (ValueError, FetchError):
        return None
    dates = (iso_utc(text) for what in _DATES if isinstance(text := dict.get(entry, what), str))
    contents = [entry.get("summary_detail"), *(entry.get("content") or ())]
    texts = [text for part in contents if part and (text := _plain(part.get("value"), part.get("type")))]
    title = entry.get("title_detail") or {}
    return FeedEntry(
        target,
        _plain(title.get("value"), title.get("type")),
        _plain(entry.get("author"), "text/plain"),
        next(filter(None, dates), None),
        max(texts, key=len, default=None),
    )


def _plain(text: object, kind: str | None) -> str | None:
    """The words of a text, without its markup, unless its type says that it has none."""
    if not isinstance(text, str):
        return None
    text = mend_references(text[: 4 * MAX_TEXT])
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
    """trafilatura's extraction, imported: 0.2 s."""
    import trafilatura

    for name in ("trafilatura", "htmldate"):  # they complain of pages, on stderr
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return trafilatura.bare_extraction


def read_article(body: bytes, url: str, content_type: str | None = None) -> Article:
    """The main text of an HTML page, and what the page says of it; Nones where it says nothing.

    10 ms for 20 KB, half a second for 1 MB; of a longer page the first MAX_ARTICLE characters and MAX_TAGS tags are
    read.  The date is one that the page declares: trafilatura would guess one from the numbers in its text.
    """
    page = webencodings.decode(body, parse_page(body, url, content_type).encoding, "replace")[0]
    page = _GIANT_TAG.sub("", _NO_XML.sub("", page[:MAX_ARTICLE]))
    page = "<".join(page.split("<", MAX_TAGS + 1)[: MAX_TAGS + 1])
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
    except MemoryError:
        raise
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


_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY_NAME = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?\.?,? )?"
_OFFSET = r"(?:gmt|utc?)?(?P<sign>[+-])(?P<hours>\d\d?)(?::?(?P<minutes>\d\d))?"
_TIME = r"(?P<hour>\d\d?):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,]\d+)?)?"
_ZONE = rf"(?: ?(?:{_OFFSET}|(?P<zone>[a-z]{{1,4}})))?(?: \([^()]*\))?"
_FORMS = tuple(
    re.compile(form, re.ASCII)
    for form in (
        # ISO 8601, RFC 3339, W3C's profile; 2024/12/25, 2024.12.25: after the year comes the month.
        rf"{_DAY_NAME}(?P<year>\d{{4}})(?P<between>[-/.])(?P<month>\d\d?)(?P=between)(?P<day>\d\d?)"
        rf"(?:(?:t| )(?:{_TIME}){_ZONE})?",
        r"(?P<year>\d{4})(?:-(?P<month>\d\d))?",
        r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)"
        rf"(?:t(?P<hour>\d\d)(?P<minute>\d\d)(?P<second>\d\d)?(?:[.,]\d+)?{_ZONE})?",
        # RFC 822, 850, 2822, 5322
        rf"{_DAY_NAME}(?P<day>\d\d?)[- ]{_MONTH}[- ,] ?(?P<year>\d{{4}}|\d\d)(?:,? {_TIME}{_ZONE})?",
        rf"{_DAY_NAME}{_MONTH} (?P<day>\d\d?),? (?P<year>\d{{4}})(?:,? {_TIME}{_ZONE})?",
        rf"{_DAY_NAME}{_MONTH} (?P<day>\d\d?) {_TIME}{_ZONE} (?P<year>\d{{4}})",  # C's asctime
    )
)
# Those of RFC 822, but for the military ones (RFC 2822: most got them wrong), and those that mean one thing only.
_ZONES = {"z": 0, "ut": 0, "utc": 0, "gmt": 0, "wet": 0, "west": 1, "cet": 1, "cest": 2, "met": 1, "mest": 2, "eet": 2}
_ZONES |= {"eest": 3, "jst": 9, "est": -5, "edt": -4, "cst": -6, "cdt": -5, "mst": -7, "mdt": -6, "pst": -8, "pdt": -7}


@lru_cache(1 << 12)
def iso_utc(text: str) -> str | None:
    """A date of ISO 8601, of e-mail or the like as ISO 8601 in UTC, one without a zone taken for UTC.

    None unless all of the text is such a date: a day before a month, a number of seconds, an unknown zone or language
    would be guesses.  "2024" and "2024-05", which W3C's profile of ISO 8601 allows, are the beginning of that year or
    month; a year of two digits is of 1950 to 2049 (RFC 5322).  The weekday's name adds nothing, so it decides nothing.
    """
    text = " ".join(text.lower().split()) if len(text) <= 64 else ""
    found = next((match for form in _FORMS if (match := form.fullmatch(text))), None)
    if found is None:
        return None
    part = {name: value for name, value in found.groupdict().items() if value is not None}
    month, zone = part.get("month", "1"), part.get("zone", "z")
    hour, minute, second = (int(part.get(name, 0)) for name in ("hour", "minute", "second"))
    hours, minutes = (int(part.get("sign", "+") + part.get(name, "0")) for name in ("hours", "minutes"))
    midnight = (hour, minute, second) == (24, 0, 0)  # the end of the day, in ISO 8601
    if zone not in _ZONES or minute > 59 or second > 60 or abs(hours) > 23 or abs(minutes) > 59:
        return None
    if hour > 23 and not midnight:
        return None
    year = int(part["year"])
    try:
        day = datetime(
            year + (0 if len(part["year"]) == 4 else 2000 if year < 50 else 1900),
            int(month) if month.isdecimal() else _MONTHS.index(month[:3]) + 1,
            int(part.get("day", "1")),
        )
        when = day + timedelta(hours=hour - hours - _ZONES[zone], minutes=minute - minutes, seconds=second)
    except (ValueError, OverflowError):
        return None
    return when.isoformat(timespec="seconds") + "Z"


_REFERENCES = re.compile(r"(?:&#(?:[0-9]+|[xX][0-9a-fA-F]+);)+")
_REFERENCE = re.compile(r"&#(?:([0-9]+)|[xX]([0-9a-fA-F]+));")


def mend_references(text: str) -> str:
    """Numeric references to what is no character of XML become U+FFFD, and those to two surrogates one character."""
    return _REFERENCES.sub(_mended, text) if "&#" in text else text


def _mended(run: re.Match[str]) -> str:
    mended: list[str] = []
    high = 0
    for one in _REFERENCE.finditer(run[0]):
        digits, base = (one[1], 10) if one[1] else (one[2], 16)
        code = int(digits, base) if len(digits.lstrip("0")) <= 7 else 0
        if high and 0xDC00 <= code <= 0xDFFF:
            mended[-1] = chr(0x10000 + (high - 0xD800 << 10) + code - 0xDC00)
            high = 0
            continue
        high = code if 0xD800 <= code <= 0xDBFF else 0
        good = code in (9, 10, 13) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or 0x10000 <= code <= 0x10FFFF
        mended.append(f"&#{code};" if good else "\ufffd")
    return "".join(mended)


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
