"""The peers of the crawlers and of the parser: what a user would take instead, as programs that write the same rows.

A parser of pages takes bytes and their URL and returns ``Facts``; a crawler takes a file of URLs, a file for its rows
(JSON lines) and a concurrency, and runs as a process of its own (``bench/peers.py NAME URLS ROWS CONCURRENCY``).
Where the name says textbook they are written as everyone does at first. Scrapy is here twice: as its documentation
teaches it, and stripped of all that it can do without, which is faster, and what its documentation advises against.
Third-party libraries are imported where they are used: one that is missing costs its own row only.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

# ----------------------------------------------------------------------- peers of `parse`: bytes, URL -> the facts


class Facts(NamedTuple):
    """What everyone has to find: links absolute, http(s), without fragment, each once."""

    title: str | None
    word_count: int
    links_found: list[str]


HIDDEN = ("script", "style", "noscript", "template")
SHOWN = f"//body//text()[not({' or '.join(f'ancestor::{tag}' for tag in HIDDEN)})]"


def fold(text: str | None) -> str | None:
    return " ".join((text or "").split()) or None


def count_words(texts: Iterable[str]) -> int:
    return len(" ".join(texts).split())


def absolute_links(hrefs: Iterable[str], join: Callable[[str], str]) -> list[str]:
    links: dict[str, None] = {}
    for href in dict.fromkeys(hrefs):
        try:
            link = join(href)
        except ValueError:
            continue
        if link.startswith(("http://", "https://")):
            links[link.partition("#")[0]] = None
    return list(links)


def browser_join(url: str, base: str | None) -> Callable[[str], str]:
    """Joining as browsers do it, with ``<base>``: what html_parse does, too, so that parsers are compared."""
    join: Callable[[str, str], str] = importlib.import_module("ada_url").join_url
    return functools.partial(join, join(url, base) if base else url)


class Textbook(HTMLParser):
    """The scraper's parser of the tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.title, self.in_title = "", False
        self.hrefs: list[str] = []
        self.hidden = self.words = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value is not None]
        self.in_title |= tag == "title"
        self.hidden += tag in HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self.in_title &= tag != "title"
        self.hidden -= tag in HIDDEN and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data
        elif not self.hidden:
            self.words += len(data.split())


def parse_textbook(body: bytes, url: str) -> Facts:
    parser = Textbook()
    parser.feed(body.decode("utf-8", "replace"))
    parser.close()
    return Facts(fold(parser.title), parser.words, absolute_links(parser.hrefs, functools.partial(urljoin, url)))


def parse_ours(body: bytes, url: str) -> Facts:
    from html_parse import parse_page

    page = parse_page(body, url, "text/html; charset=utf-8")
    return Facts(page.title, page.word_count, page.links)


@functools.cache
def xpath(path: str) -> Callable[[Any], list[str]]:
    compiled: Callable[[Any], list[str]] = importlib.import_module("lxml.etree").XPath(path, smart_strings=False)
    return compiled


def parse_lxml(body: bytes, url: str) -> Facts:
    etree = importlib.import_module("lxml.etree")
    page = etree.HTML(body, etree.HTMLParser(encoding="utf-8"))
    join = browser_join(url, next(iter(xpath("//base/@href")(page)), None))
    links = absolute_links(xpath("//a/@href")(page), join)
    return Facts(fold(page.findtext(".//title")), count_words(xpath(SHOWN)(page)), links)


def parse_parsel(body: bytes, url: str) -> Facts:
    page = importlib.import_module("parsel").Selector(body=body, encoding="utf-8")
    links = absolute_links(page.xpath("//a/@href").getall(), browser_join(url, page.xpath("//base/@href").get()))
    return Facts(fold(page.xpath("//title/text()").get()), count_words(page.xpath(SHOWN).getall()), links)


def parse_selectolax(body: bytes, url: str) -> Facts:
    page = importlib.import_module("selectolax.lexbor").LexborHTMLParser(body.decode("utf-8", "replace"))
    title, base = page.css_first("head > title") or page.css_first("title"), page.css_first("base[href]")
    heading = fold(title.text()) if title else None
    join = browser_join(url, base.attributes["href"] if base else None)
    links = absolute_links((anchor.attributes["href"] or "" for anchor in page.css("a[href]")), join)
    for node in page.css(", ".join((*HIDDEN, "head"))):
        node.decompose()
    return Facts(heading, count_words([page.body.text(separator=" ")] if page.body else []), links)


PARSERS: dict[str, Callable[[bytes, str], Facts]] = {
    "html_parse": parse_ours,
    "textbook": parse_textbook,
    "lxml": parse_lxml,
    "parsel": parse_parsel,
    "selectolax": parse_selectolax,
}

# --------------------------------------------------------- peers of `crawl`: URL list, rows, concurrency -> a file


def as_row(url: str, facts: Facts) -> dict[str, Any]:
    return {"url": url, **facts._asdict()}


def run_spider(urls: str, rows: str, concurrency: int, read: Callable[[Any], Facts], **settings: Any) -> None:
    """Scrapy over a URL list, one row for each page as `read` sees it; its documentation's settings, no politeness."""
    scrapy, crawler = map(importlib.import_module, ("scrapy", "scrapy.crawler"))

    class Pages(scrapy.Spider):  # type: ignore[misc, name-defined]
        name = "pages"

        async def start(self) -> Any:
            for url in Path(urls).read_text().split():  # noqa: ASYNC240
                yield scrapy.Request(url, cb_kwargs={"url": url}, dont_filter=True)

        def parse(self, response: Any, url: str) -> Any:
            yield as_row(url, read(response))

    process = crawler.AsyncCrawlerProcess(
        {
            "CONCURRENT_REQUESTS": concurrency,
            "CONCURRENT_REQUESTS_PER_DOMAIN": concurrency,
            "DOWNLOAD_DELAY": 0,
            "ROBOTSTXT_OBEY": False,
            "LOG_LEVEL": "ERROR",
            "TWISTED_REACTOR": "twisted.internet.asyncioreactor.AsyncioSelectorReactor",
            "ASYNCIO_EVENT_LOOP": "uvloop.Loop" if importlib.util.find_spec("uvloop") else None,
            "FEEDS": {rows: {"format": "jsonlines"}},
            **settings,
        }
    )
    process.crawl(Pages)
    process.start()


def crawl_scrapy(urls: str, rows: str, concurrency: int) -> None:
    """The spider of Scrapy's documentation: its selectors, its default middlewares."""

    def read(response: Any) -> Facts:
        links = absolute_links(response.xpath("//a/@href").getall(), response.urljoin)
        title = fold(response.xpath("//title/text()").get())
        return Facts(title, count_words(response.xpath(SHOWN).getall()), links)

    run_spider(urls, rows, concurrency, read, COOKIES_ENABLED=False, TELNETCONSOLE_ENABLED=False)


def crawl_scrapy_stripped(urls: str, rows: str, concurrency: int) -> None:
    """Scrapy without all that its documentation advises to keep (retries, redirects, decompression), and bare lxml."""

    def read(response: Any) -> Facts:
        page = response.selector.root
        links = absolute_links(xpath("//a/@href")(page), response.urljoin)
        return Facts(fold(page.findtext(".//title")), count_words(xpath(SHOWN)(page)), links)

    run_spider(
        *(urls, rows, concurrency, read),
        CONCURRENT_ITEMS=1,  # of one response: so many tasks are started for each, and there is one item
        DOWNLOADER_MIDDLEWARES_BASE={},
        SPIDER_MIDDLEWARES_BASE={},
        EXTENSIONS_BASE={"scrapy.extensions.feedexport.FeedExporter": 0},
    )


def crawl_textbook_async(urls: str, rows: str, concurrency: int) -> None:
    import aiohttp

    async def crawl(urls: list[str]) -> None:
        semaphore = asyncio.Semaphore(concurrency)
        async with aiohttp.ClientSession() as session:

            async def scrape(url: str) -> None:
                async with semaphore, session.get(url) as response:
                    file.write(json.dumps(as_row(url, parse_textbook(await response.read(), url))) + "\n")

            await asyncio.gather(*map(scrape, urls))

    with open(rows, "w") as file:
        asyncio.run(crawl(Path(urls).read_text().split()))


def crawl_textbook_threads(urls: str, rows: str, concurrency: int) -> None:
    from urllib.request import urlopen

    def scrape(url: str) -> dict[str, Any]:
        with urlopen(url, timeout=30) as response:
            return as_row(url, parse_textbook(response.read(), url))

    with open(rows, "w") as file, ThreadPoolExecutor(concurrency) as pool:
        for row in pool.map(scrape, Path(urls).read_text().split()):
            file.write(json.dumps(row) + "\n")


PEERS: dict[str, Callable[[str, str, int], None]] = {
    "scrapy": crawl_scrapy,
    "scrapy_stripped": crawl_scrapy_stripped,
    "textbook_async": crawl_textbook_async,
    "textbook_threads": crawl_textbook_threads,
}


if __name__ == "__main__":
    PEERS[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
