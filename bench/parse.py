"""`bench parse`: title, links and words of HTML pages, by html_parse.py and by what one would take instead: MB/s.

The parsers run in this process, in turns, each over all pages; what a parser compiles once is compiled before the first
run. How far they agree is told beside the speed: on how many pages each found what lexbor (selectolax) found.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.measure import Row, Spread, command, interleaved, present, table, to
from bench.peers import PARSERS, Facts


def pages_to_parse(folder: str | None, count: int, size: int) -> Iterator[tuple[bytes, str]]:
    if folder is None:
        from sandbox.sites import make_page

        for page in range(count):
            yield make_page(0, page, count, size), f"http://127.0.1.1:8080/p/{page}.html"
        return
    files = sorted(Path(folder).glob("*.html"))
    if not files:
        raise SystemExit(f"bench: no *.html in {folder}")
    for file in files:
        yield file.read_bytes(), "http://page.example/d/p.html"


def agree(reference: Sequence[Facts], other: Sequence[Facts]) -> Row:
    """On how many pages both found the same title, the same links, and word counts within 2 %."""
    pairs = list(zip(reference, other, strict=True))
    return {
        "titles": sum(a.title == b.title for a, b in pairs),
        "links": sum(set(a.links_found) == set(b.links_found) for a, b in pairs),
        "words +-2 %": sum(abs(a.word_count - b.word_count) <= 0.02 * max(1, a.word_count) for a, b in pairs),
    }


@command(
    "title, links and words of HTML pages, against html.parser, lxml, parsel, selectolax: MB/s, agreement",
    "parse",
    "parse saved_pages/ --repeat 7",
    DIR=(None, "a folder of *.html; default: generated pages"),
    pages=(200, "pages to generate"),
    size=(20_000, "bytes of a generated page"),
    repeat=(5, "runs of each parser"),
)
def parse(args: argparse.Namespace) -> list[Row]:
    pages = list(pages_to_parse(args.DIR, args.pages, args.size))
    megabytes = sum(len(body) for body, _ in pages) / 1e6
    parsers = {name: parser for name, parser in PARSERS.items() if present(name)}
    speeds: dict[str, list[float]] = {name: [] for name in parsers}
    found = {name: [parser(*pages[0])] for name, parser in parsers.items()}  # what is compiled once, is by now
    for _, name in interleaved(parsers, args.repeat):
        started = time.perf_counter()
        found[name] = [parsers[name](body, url) for body, url in pages]
        speeds[name].append(megabytes / (time.perf_counter() - started))
    reference = "selectolax" if "selectolax" in parsers else "html_parse"
    speed = {name: Spread.of(speeds[name]) for name in parsers}
    results = [
        {
            "": name,
            "x textbook": to(speed[name].median, speed["textbook"].median),
            "MB/s": speed[name],
            "us/page": megabytes * 1e6 / speed[name].median / len(pages),
            **agree(found[reference], found[name]),
        }
        for name in parsers
    ]
    print(f"{len(pages)} pages, {megabytes:.1f} MB; on how many of them each agrees with {reference}:\n")
    print(table(results))
    return results
