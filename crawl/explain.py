"""--explain: would a URL be fetched, why (not), and when?

Asks its host for robots.txt, and nothing else of the web; of the output of an earlier run, should there be one to go on
with, it reads only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable

from crawl.addresses import names_private
from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.journal import recall
from crawl.output import Run
from crawl.robots import DISALLOW_ALL, Rules
from crawl.urls import normalise, origin


def _explain_url(crawl: Crawl, url: str, listed: Iterable[str], ask: Callable[[str], Rules | None]) -> list[str]:
    """Why ``url`` would be fetched or not, in lines. ``listed`` is the list; ``ask`` reads the robots.txt that a
    URL is under, in vain if the answer is None. Of an earlier run is known what was recalled before."""
    url = crawl.listed.keep_credentials(url)
    try:
        target, host = normalise(url)
    except FetchError as error:
        return [f"no: {error}"]
    homes: dict[str, str] = {}
    for text in crawl.listed.know_all(listed):
        with contextlib.suppress(FetchError):
            homes.setdefault(*normalise(text))
    crawl.frontier.add_all(homes, crawl.clock())
    in_list = target in homes
    if crawl.follows and not in_list:
        target = normalise(crawl.scope.clean(target))[0]
    said = [f"as {target}"] if target != url else []
    why_not = None
    if not in_list:
        if not crawl.options.allow_private and names_private(host) and not any(map(names_private, homes.values())):
            why_not = "a private address, to which no public page leads"
        elif not crawl.follows:
            why_not = "the list does not name it, and no links are followed (--depth)"
        else:
            why_not = crawl.scope.why_not(target) or crawl.traps.why_not(target, note=False)
    line = f"no: {why_not}" if why_not else crawl.frontier.explain(target, crawl.clock())
    if not line.startswith("no:") and crawl.obeys:
        rules = crawl.asked = ask(target)
        if rules is None or rules is DISALLOW_ALL:
            line = "no: robots.txt could not be read"
        else:
            crawl.frontier.robots_known(origin(target), rules, crawl.clock())
            line = crawl.frontier.explain(target, crawl.clock())
    if not line.startswith("no:"):
        way = "a sitemap or a page" if crawl.options.sitemaps else "a page"
        links = f"yes, if {way} within {crawl.options.depth} links of the list leads there"
        said.append("yes: the list names it" if in_list else links)
    return [*said, line]


def print_explanation(url: str, crawl: Crawl, urls: Iterable[str], journal: str | None, run: Run) -> None:
    """``journal``: the file of an earlier run that this one would go on with. Raises JournalError, OSError."""

    def ask(url: str) -> Rules | None:
        probe = Crawl(dataclasses.replace(crawl.options, robots=True, max_time=0.0, feeds=False))
        probe.ask_robots_only = True
        probe.listed.borrow(crawl.listed)  # the URL asked for is not of the list
        run(probe, [url], lambda *rows: None)
        return probe.asked

    listed = list(urls)
    if journal is not None and os.path.isfile(journal):
        crawl.listed.know_all(listed)
        with open(journal, "rb") as file:
            recall(crawl, file)
    for line in _explain_url(crawl, url, listed, ask):
        print(line)
