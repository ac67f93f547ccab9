"""Which of the links that a crawl finds belong to it: the scope that the user set, and the traps that the web sets.

Both answer None, or why a URL is left out, in words for --explain. URLs are normalised ones (crawl.urls.normalise).

Patterns (`--include`, `--exclude`) are globs over the whole URL, in which "*" stands for any run of characters, "/"
and none included, and each other character for itself, "?" and "[" too. They are matched in linear time. After "re:"
comes a regular expression of Python's, searched for anywhere; nested repetition can take it exponential time.

Registrable domains follow the Public Suffix List as publicsuffixlist ships it, its private part included: one blog of
github.io is not the other's. The 0.3 MB are read when the first domain is asked for.

`Traps` takes 40 MB at worst: a path that others pushed out may have `variety` queries anew.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import unquote_plus

from coordination import new_lock
from crawl.errors import FetchError
from crawl.urls import normalise

MAX_QUERIES = 100_000  # query strings that Traps keeps in mind


def glob(pattern: str, *, ignore_case: bool = False) -> Callable[[str], bool]:
    """A test whether a text as a whole matches; "*" is any run of characters."""
    first, *rest = (pattern.lower() if ignore_case else pattern).split("*")

    def matches(text: str) -> bool:
        text = text.lower() if ignore_case else text
        if not rest or not text.startswith(first):
            return text == first
        start = len(first)
        for part in rest[:-1]:
            found = text.find(part, start)
            if found < 0:
                return False
            start = found + len(part)
        return start <= len(text) - len(rest[-1]) and text.endswith(rest[-1])

    return matches


def _pattern(text: str) -> Callable[[str], Any]:
    if not text.startswith("re:"):
        return glob(text)
    try:
        return re.compile(text[3:]).search
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {text!r}: {error}") from None


@lru_cache(maxsize=1)
def _suffixes() -> Any:
    from publicsuffixlist import PublicSuffixList

    return PublicSuffixList()


@lru_cache(maxsize=65536)
def registrable(host: str) -> str:
    """The registrable domain of a host; the host itself if it is an address, a single label or a public suffix."""
    if host.startswith("[") or "." not in host or host.rpartition(".")[2].isdigit():
        return host
    return _suffixes().privatesuffix(host) or host.rstrip(".")


class Scope:
    """Which links to follow. Threads may share it; ``add`` may come at any time."""

    def __init__(
        self,
        *,
        within: Literal["host", "domain", "any"] = "host",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        drop_params: Sequence[str] = (),
    ) -> None:
        """ValueError for a pattern that is none."""
        if within not in ("host", "domain", "any"):
            raise ValueError(f"within must be host, domain or any, not {within!r}")
        self.within = within
        self._include = [(text, _pattern(text)) for text in include]
        self._exclude = [(text, _pattern(text)) for text in exclude]
        self._drop = [glob(text, ignore_case=True) for text in drop_params]
        self.homes: set[str] = set()

    def add(self, seed: str) -> None:
        """Where else the crawl is at home: a further seed, or where one redirects to. No URL: without effect."""
        with contextlib.suppress(FetchError):
            self.homes.add(self._home(normalise(seed)[1]))

    def has(self, host: str) -> bool:
        """Whether the crawl may go to this host, as ``normalise`` gives it."""
        return self.within == "any" or self._home(host) in self.homes

    def _home(self, host: str) -> str:
        return registrable(host) if self.within == "domain" else host

    def why_not(self, url: str) -> str | None:
        """None: the link belongs to the crawl. Else why not."""
        try:
            return self._outside(*normalise(url))
        except FetchError as error:
            return error.detail

    def _outside(self, url: str, host: str) -> str | None:
        if not self.has(host):
            return f"{self._home(host)} is not a {self.within} of the list"
        for text, matches in self._exclude:
            if matches(url):
                return f"excluded by {text}"
        if self._include and not any(matches(url) for _, matches in self._include):
            return "included by no pattern"
        return None

    def targets(self, links: Iterable[str]) -> Iterator[str]:
        """Those that belong to the crawl, clean and normalised."""
        for link in links:
            try:
                target, host = normalise(self.clean(link))
            except FetchError:
                continue
            if self._outside(target, host) is None:
                yield target

    def clean(self, url: str) -> str:
        """A normalised URL without the parameters to drop, the others as they were and in their order."""
        head, _, query = url.partition("?")
        if not query or not self._drop:
            return url
        left = "&".join(part for part in query.split("&") if not self._drops(part.partition("=")[0]))
        return f"{head}?{left}" if left else head

    def _drops(self, name: str) -> bool:
        name = unquote_plus(name)
        return bool(name) and any(matches(name) for matches in self._drop)


class Traps:
    """Cuts off what never ends: calendars, sessions in the path, links that add to their own path. Thread-safe."""

    def __init__(self, *, depth: int = 20, repeats: int = 3, length: int = 2000, variety: int = 100) -> None:
        self.depth, self.repeats, self.length, self.variety = depth, repeats, length, variety
        self._lock = new_lock("Traps")
        self._seen: OrderedDict[int, set[int]] = OrderedDict()  # by host and path, hashed: the queries, hashed
        self._queries = 0

    def why_not(self, url: str, *, note: bool = True) -> str | None:
        """None: no trap. Else which. ``note=False`` only asks: the URL's query does not count as one more."""
        return self._path_trap(url) or self._query_trap(url, note)

    def _path_trap(self, url: str) -> str | None:
        if len(url) > self.length:
            return f"trap: longer than {self.length} characters"
        segments = [segment for segment in url.partition("#")[0].partition("?")[0].split("/")[3:] if segment]
        if len(segments) > self.depth:
            return f"trap: a path deeper than {self.depth}"
        if len(segments) > self.repeats:
            segment, times = Counter(segments).most_common(1)[0]
            if times > self.repeats:
                return f"trap: {segment[:40]!r} is {times} times in the path"
        return f"trap: {found[:40]!r} recurs in the path" if (found := self._recurring(segments)) else None

    def _recurring(self, segments: list[str]) -> str:
        """Two or more segments that come ``repeats`` times in a row: the path has begun to go round."""
        for size in range(2, len(segments) // self.repeats + 1):
            run = 0  # segments in a row that equal the one `size` before
            for i in range(size, len(segments)):
                run = run + 1 if segments[i] == segments[i - size] else 0
                if run >= size * (self.repeats - 1):
                    return "/".join(segments[i - size + 1 : i + 1])
        return ""

    def _query_trap(self, url: str, note: bool) -> str | None:
        path, _, query = url.partition("#")[0].partition("?")
        if not query:
            return None
        key, entry = hash(path), hash(query)
        with self._lock:
            seen = self._seen.get(key, ())
            new = entry not in seen
            if new and len(seen) >= self.variety:
                return f"trap: more than {self.variety} queries of {path[:80]}"
            if new and note:
                self._seen.setdefault(key, set()).add(entry)
                self._seen.move_to_end(key)
                self._queries += 1
                while self._queries > MAX_QUERIES:
                    self._queries -= len(self._seen.popitem(last=False)[1])
        return None
