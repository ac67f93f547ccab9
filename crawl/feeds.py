"""Feeds: RSS and Atom in, the articles that they announce out.

feedparser, which knows every dialect, reads them, once their encoding is settled and their bad references are mended
(crawl/xml.py). It is shown an entry's own fields only, and dates are read by crawl/dates.py: it would guess.

Promised
- Nothing here raises but MemoryError, whatever the bytes; nothing is fetched or opened. At most MAX_FEED bytes are
  read, after inflating. Time and memory are linear in them as far as known: where feedparser's are not (nesting,
  authors, namespaces, white space), it is kept from them here.
- What was found before a fault, a limit or a torn end is kept, and `fault` says so. A field that cannot be read is
  None. All addresses are http or https, normalised, each once, in the order of the document.

Not promised: to be quick. feedparser takes half a second for 1 MB, and what it does with a hostile document is bounded
by nobody: read feeds where that can be ended (crawl/readers.py). It is imported when the first feed comes: 0.1 s.
"""

from __future__ import annotations

import io
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple
from xml.sax.expatreader import create_parser
from xml.sax.xmlreader import InputSource

from crawl.articles import MAX_ARTICLE
from crawl.dates import iso_utc
from crawl.errors import FetchError
from crawl.urls import MAX_URL, join
from crawl.xml import NOT_XML, XML_DECLARATION, StopReading, decode_pieces, inflate_pieces, local_name, mend_references
from html_parse import parse_page

MAX_FEED = 5 * 1024 * 1024
MAX_TEXT = 100_000  # characters of one entry's text that are kept
NO_FEED = "no RSS or Atom feed"

_MAX_FEED_ELEMENTS = 200_000
_MAX_NAMESPACES = 200  # by different prefixes: feedparser looks through them for each element
_LONG_SPACE = re.compile(r"\s{40,}")  # and in these, in its search for entities
_TOO_LONG = "it takes too long"
_FEED = re.compile(r"<(?:[a-zA-Z]\w{0,20}:)?(?:rss|feed|RDF|channel)[\s/>]")
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


class FeedEntry(NamedTuple):
    """An article, as its feed announces it."""

    url: str
    title: str | None
    author: str | None
    published: str | None
    """ISO 8601, UTC; when it was changed, if only that is said; None if there is no date, or none that can be read."""
    summary: str | None  # text without markup: the full content if the feed has it


class Feed(NamedTuple):
    """What could be read of a feed."""

    entries: list[FeedEntry]
    fault: str | None  # why there may be more than these entries; ``NO_FEED``: there is nothing of a feed in it


def bounds(function: Callable[..., Any], size: int) -> tuple[float, int]:
    """(Seconds of processor time, bytes of memory) that reading so many bytes may take: ten times the usual.

    ``function`` is ``parse_feed``, or ``read_article``, which reads MAX_ARTICLE characters.
    """
    if function is parse_feed:
        return 2.0 + 4e-6 * size, (32 << 20) + 24 * size
    read = min(size, MAX_ARTICLE)
    return 1.0 + 5e-6 * read + 2e-7 * size, (32 << 20) + 64 * read + 8 * size


def parse_feed(body: bytes, url: str, headers: Mapping[str, str] | None = None) -> Feed:
    """The entries of an RSS (0.9x, 1.0, 2.0) or Atom feed, well-formed or not.

    ``url`` is where it came from, redirects followed; relative links start from it or from xml:base.  ``headers`` are
    the answer's, read for the charset of Content-Type.  An entry without a link is left out.  Costs about 0.5 s per MB.
    Raises MemoryError.
    """
    pieces: list[str] = []
    fault: str | None = None
    try:
        pieces.extend(decode_pieces(inflate_pieces(body, MAX_FEED), (headers or {}).get("Content-Type")))
    except StopReading as stop:
        fault = str(stop)
    text = _LONG_SPACE.sub(" ", NOT_XML.sub("", "".join(pieces)).lstrip("\ufeff \t\r\n"))
    text = mend_references(XML_DECLARATION.sub("", text, count=1))  # its encoding holds no longer
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
                raise StopReading("too many elements")
            if time.thread_time() > self.until:
                raise StopReading(_TOO_LONG)
            name = self._mapped(tag)
            if self._is_entry(name):  # the one before was not closed
                self._close(self._entry - 1)
            if self._text:
                self._nested += name == self._text
                self._add_markup(name, f"<{local_name(tag)}{self.strattrs(attrs)}>")  # type: ignore[attr-defined]
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
                self._add_markup(name, f"</{local_name(tag)}>")
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
                raise StopReading("too many namespaces")

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
        except StopReading as stop:
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
        target = join(base, link)[0]
    except FetchError:
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
