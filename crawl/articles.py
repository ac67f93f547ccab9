"""Articles: the text of a page without what stands around it, who wrote it, and when it appeared.

trafilatura finds the text, kept from what takes it quadratic time: giant tags, thousands of tables. Dates are those
that the page declares. Half a second for 1 MB, and what a hostile page makes trafilatura do is bounded by nobody: read
articles where that can be ended (crawl/readers.py). Raises MemoryError only. trafilatura is imported when the first
article comes: that costs 0.2 s.
"""

from __future__ import annotations

import html
import logging
import re
from functools import cache
from typing import Any, NamedTuple

from charsets import transcode
from crawl.dates import iso_utc
from crawl.xml import NOT_XML
from html_parse import parse_page

MAX_ARTICLE = 1_000_000  # characters of an article's page that its text is looked for in
MAX_TAGS = 50_000  # tags of it: each costs trafilatura some 25 microseconds, however short it is
_GIANT_TAG = re.compile(r"<[^<>]{8192,}>")  # an image in its own address, mostly; with 50,000 attributes it takes 12 s
_MAX_TABLES = 500  # trafilatura's time is quadratic in them
_LONG_PAGE = 200_000  # from here without trafilatura's second opinion, of another algorithm

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


class Article(NamedTuple):
    """What an article says; None where it does not."""

    text: str | None
    author: str | None
    published: str | None  # ISO 8601, UTC


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
    page = transcode(body, parse_page(body, url, content_type).encoding).decode("utf-8", "replace")
    page = _GIANT_TAG.sub("", NOT_XML.sub("", page[:MAX_ARTICLE]))
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
