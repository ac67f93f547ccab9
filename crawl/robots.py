"""What a site's owner asks of crawlers: robots.txt (RFC 9309), X-Robots-Tag and <meta name=robots>.

The longest pattern that matches a path wins, allow before disallow (section 2.2.2); "*", "$", percent-encoding and
misspellings count as with Protego, which the tests compare with, but which bounds neither its memory nor its time. A
token counts as a whole and without its version (section 2.2.1). A pattern is a head, up to its first wildcard, and a
tail. All heads stand sorted in one text, so those that a path begins with are found by one search; only their tails
are tried, each of their parts by one `str.find`.

Promised
- Nothing here raises, whatever the bytes, or waits. 500 KiB are parsed in some 30 ms, with 20 MB of memory meanwhile.
- Of a file, the first 500 KiB count; a line that this cuts is left out, as half a rule is another rule.
- A file takes ``MAX_SIZE`` bytes of memory at most. A URL takes ``MAX_WORK`` steps at most; those that an origin
  forbids take ``ORIGIN_WORK`` together, and what its allowed ones earn. Where more is needed, `allows` says None.
- /robots.txt itself is always allowed.

Not promised: two escapes that are no UTF-8, such as "%E9" and "%E8", are the same; Request-rate and Visit-time do not
count. Threads may share rules: the one number that changes, the steps that are left, may then miss some.
"""

from __future__ import annotations

import contextlib
import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, repeat
from urllib.parse import quote

from crawl.errors import FetchError
from crawl.model import Response
from crawl.urls import join, normalise

MAX_ROBOTS = 500 * 1024
"""Bytes of a robots.txt that count: the least that RFC 9309, section 2.5 allows, and what the large engines read."""
MAX_HOPS = 5  # redirects that a robots.txt is followed through (section 2.3.1.2)
MAX_DELAY = 300.0  # longest Crawl-delay in seconds that is obeyed: a longer one counts as this
MAX_SITEMAPS = 1000
MAX_LINES = 50_000
"""Lines of a file, not counting empty ones and comments: 500 KiB have as many if they are ten bytes long."""
MAX_SIZE = 768 * 1024
"""Bytes that the patterns of a file may take, estimated: all plain ones of 500 KiB, or some 2,500 with wildcards."""
MAX_WORK = 5_000_000  # steps, of about a nanosecond, that a URL may take
QUICK = 100_000  # steps that may be taken anywhere, and do not count
ORIGIN_WORK = 200_000_000
"""Steps that an origin may take for URLs that it forbids. One that it allows gives ``MAX_WORK`` of them back: a request
follows, and those are paced."""
LARGE = 32 * 1024
"""Bytes of a robots.txt that are parsed in 2 to 3 ms. Larger ones go one at a time, in a thread that is for them."""
OUR_TOKEN = "flatcrawl"

_FEW = 200  # strings that are not worth packing
_PART = 250  # steps that looking for a part of a pattern takes, besides one for each character of the path
_COMPATIBLE = re.compile(r"compatible;\s*([a-zA-Z0-9_-]+)")
_TOKEN = re.compile(r"[a-zA-Z0-9_-]+")
_BROWSERS = frozenset({"mozilla", "opera", "msie"})
_US, _OTHERS = "us", "others"  # what the agents of a file become
_AGENT = re.compile(r"user(?:-|\s+)?agent(?:\s*:|\s+|$)\s*(.*)", re.IGNORECASE)
_FIELDS: dict[str, str] = {
    **dict.fromkeys(["User-agent", "User-Agent", "user-agent"], "agent"),
    **dict.fromkeys(["Disallow", "disallow", "dissallow", "dissalow", "disalow", "diasllow", "disallaw"], "disallow"),
    **dict.fromkeys(["Allow", "allow"], "allow"),
    **dict.fromkeys(["Crawl-delay", "crawl-delay", "crawl delay"], "delay"),
    **dict.fromkeys(["Sitemap", "sitemap", "sitemaps", "site-map"], "sitemap"),
    **dict.fromkeys(["request-rate", "request rate", "visit-time", "visit time"], "other"),
    "host": "host",
}
_NOT_OURS: dict[str, Callable[[str], object]] = dict.fromkeys(["Disallow", "disallow", "Allow", "allow"], len)
"""What to do with the usual lines of others: nothing."""
_PLAIN_URL = re.compile(r"[a-z]+://[^/?#]*(/[A-Za-z0-9_.~/=-]*)")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_HEX = "0123456789ABCDEFabcdef"
_MEANT = {(a + b).encode(): bytes.fromhex(a + b) for a in _HEX for b in _HEX} | {
    digits: b"%" + digits.upper() for digits in (b"25", b"2A", b"2a", b"2F", b"2f", b"0A", b"0a", b"0D", b"0d")
}
"""What escapes stand for; those of "%", "*", "/" and of line ends are not the same as the character."""


def product_token(user_agent: str) -> str:
    """The name in lower case by which a robots.txt may call the sender of this User-Agent.

    That of "Mozilla/5.0 (compatible; flatcrawl/1.0)" is flatcrawl, of "news-bot/2.1 (+https://…)" news-bot.  One that
    says no name, or a browser's, goes by ours: whatever it claims to be, it is this crawler.
    """
    named = _COMPATIBLE.search(user_agent) or _TOKEN.match(user_agent.strip())
    token = (named[1] if named.re is _COMPATIBLE else named[0]).lower() if named else OUR_TOKEN
    return OUR_TOKEN if token in _BROWSERS else token


class Rules:
    """What one robots.txt says to us."""

    __slots__ = ("_answer", "_left", "_patterns", "delay", "sitemaps", "why")

    def __init__(
        self,
        patterns: _Patterns | None = None,
        *,
        answer: bool | None = True,
        delay: float | None = None,
        sitemaps: tuple[str, ...] = (),
        why: str = "robots.txt forbids it",
    ) -> None:
        self._patterns, self._answer, self._left = patterns, answer, ORIGIN_WORK
        self.delay = delay  # seconds between two requests that the site asks for; None if it does not, or asks nonsense
        self.sitemaps = sitemaps
        """Normalised URLs, each once; of any host: what they may list is `parse_sitemap`'s question."""
        self.why = why  # what to say of a URL that is not allowed

    @property
    def size(self) -> int:
        """Bytes that they take, estimated; 0 if no file was read."""
        return (self._patterns.size if self._patterns else 0) + sum(60 + len(url) for url in self.sitemaps)

    def is_quick(self, url: str) -> bool:
        """Whether `allows` takes ``QUICK`` steps at most, as it does but for long files, long URLs, and both."""
        return self._patterns is None or self._patterns.steps * (_PART + len(url)) <= QUICK

    def allows(self, url: str) -> bool | None:
        """Whether a normalised URL of this origin may be fetched; None: to say so would cost too much."""
        if "/robots.txt" in url and re.split("[?#]", url.split("/", 3)[3], maxsplit=1)[0] == "robots.txt":
            return True
        if self._patterns is None:
            return self._answer
        try:
            path = _path_of(url)
        except ValueError:
            return False  # no URL that could be fetched
        rank, tails = self._patterns.begun(path)
        if not tails:
            return bool(rank & 1)
        work = sum(one.parts for _, one in tails) * (_PART + len(path))
        if work > QUICK and work > min(MAX_WORK, self._left):
            return None
        allowed = bool(_longest(path, rank, tails) & 1)
        if work > QUICK:
            self._left = min(ORIGIN_WORK, self._left + MAX_WORK) if allowed else self._left - work
        return allowed


ALLOW_ALL = Rules(answer=True, why="nothing is forbidden")
DISALLOW_ALL = Rules(answer=False, why="robots.txt could not be read")
TOO_COSTLY = Rules(answer=None, why="robots.txt is too costly to match")


def parse_robots(body: bytes, user_agent: str, url: str = "") -> Rules:
    """The rules for us in a robots.txt. ``url`` is where it came from: what relative Sitemap lines start from."""
    lines = [line for line in _decode(body).splitlines() if line and line[0] != "#"]
    if len(lines) > MAX_LINES:
        return TOO_COSTLY
    token = product_token(user_agent)
    groups: dict[str, _Group] = {}
    current: dict[str, _Group] = {}  # the groups that a line belongs to
    naming = False
    delays: list[str] = []  # between the agents of a group, all of which they are for (RFC 9309, section 2.2.4)
    usual: dict[str, Callable[[str], object]] = {}
    """What to do with the value of the usual lines, until the next agent is named: short, as there are many."""
    sitemaps: dict[str, None] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if put := usual.get(name):
            put(value)
            continue
        field = _FIELDS.get(name) if colon else None
        if field is None or "#" in value:
            field, value = _directive(line.partition("#")[0].strip())
        value = value.strip()
        if field == "agent":
            if not naming:
                naming, current, usual = True, {}, {}
            if (who := _addressee(value, token)) and who != _OTHERS and who not in current:
                current[who] = groups.setdefault(who, {"allow": [], "disallow": [], "delay": [], "other": []})
                current[who]["delay"] += delays
        elif field == "sitemap":
            if value and len(sitemaps) < MAX_SITEMAPS:
                sitemaps[value] = None
        elif naming and field == "delay":
            delays.append(value)
            for group in current.values():
                group["delay"].append(value)
        elif field and field != "host":
            delays = []
            if naming and not current:
                usual = _NOT_OURS
            elif naming and len(current) == 1:
                (group,) = current.values()
                usual = {name: group[_FIELDS[name]].append for name in _NOT_OURS}
            naming = False
            for group in current.values():
                group[field].append(value)
    known = dict.fromkeys(_absolute(text, url) for text in sitemaps)
    ours = groups.get(_US) or groups.get("*") or {}
    patterns = _patterns(ours)
    wild = [pattern for pattern in patterns if "*" in pattern or pattern[-1] == "$"]
    each = 9 if len(patterns) > _FEW else 66
    size = 500 + sum(map(len, patterns)) + each * len(patterns) + sum(200 + 57 * one.count("*") for one in wild)
    if size > MAX_SIZE:
        return TOO_COSTLY
    delay = _delay(ours.get("delay", ()))
    return Rules(_Patterns(patterns, wild, size), delay=delay, sitemaps=tuple(filter(None, known)))


def says_nothing(outcome: Response | FetchError) -> bool:
    """Whether the outcome of fetching a robots.txt does not tell if there is one, nor what it says."""
    if isinstance(outcome, FetchError):
        return outcome.kind != "redirects"
    return outcome.status == 429 or not 200 <= outcome.status < 500


def rules_for(outcome: Response | FetchError, user_agent: str, url: str = "") -> Rules:
    """The rules that the outcome of fetching a robots.txt stands for (RFC 9309, section 2.3.1).

    Redirects, up to MAX_HOPS, and retries are over.  An answer that says that there is none (4xx, a redirect too many
    or leading nowhere) allows everything; one that says nothing (5xx, no answer, one broken off) forbids everything.
    429 is with the latter though section 2.3.1.3 counts it to the former: it says "not now", which is no leave.
    """
    if says_nothing(outcome):
        return DISALLOW_ALL
    if isinstance(outcome, FetchError) or outcome.status >= 300:
        return ALLOW_ALL
    return parse_robots(outcome.body, user_agent, url)


# --------------------------------------------------------------------------------------------- of single pages

_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_MEANING = {"noindex": {"noindex"}, "nofollow": {"nofollow"}, "none": {"noindex", "nofollow"}}


def page_directives(header: str | None, meta: Iterable[str], user_agent: str) -> frozenset[str]:
    """What a page asks of us: "nofollow", not to follow its links; "noindex", not to keep what it says.

    ``header`` is the X-Robots-Tag, several of them separated by line ends; ``meta`` is `Page.robots` and
    `Page.agent_robots`.  A directive after "agent:" is for that agent only, to the end of its line or to the next
    agent.  What is said to all and what is said to us add up, and the stricter counts, as with the large engines.
    """
    token = product_token(user_agent)
    found: set[str] = set()
    for line in [*(header or "").splitlines(), *meta]:
        for_us = True
        for item in line.lower().split(","):
            agent, colon, rest = item.partition(":")
            agent = agent.strip()
            if colon and agent not in _VALUED and _TOKEN.fullmatch(agent):
                for_us = agent in (token, "robots")
                item = rest
            if for_us:
                found.update(_MEANING.get(item.strip(), ()))
    return frozenset(found)


# ------------------------------------------------------------------------------------------------------ helpers


def _decode(body: bytes) -> str:
    head = body[:MAX_ROBOTS]
    if len(body) > MAX_ROBOTS:
        head = head[: max(head.rfind(b"\n"), head.rfind(b"\r")) + 1]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return head.decode("utf-16", "replace")
    return head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")


def _addressee(value: str, token: str) -> str:
    """What the value of a User-agent line means to us."""
    if not value or value == "*" or value.startswith("* "):
        return value[:1]
    named = _TOKEN.match(value.lstrip("*"))
    return _US if named and named[0].lower() == token else _OTHERS


def _directive(line: str) -> tuple[str, str]:
    """(What a line is about, its value); "other" is all that is not known, "" what is no directive.

    The colon may be missing, some misspellings are known.
    """
    if line[:1] in ("U", "u") and (agent := _AGENT.match(line)):
        return "agent", agent[1]
    name, colon, value = line.partition(":")
    field = _FIELDS.get(name.strip().lower())
    if colon and (field or not value or value[0].isspace()):
        return field or "other", value.strip()
    words = line.split(None, 2)
    for count in (1, 2):
        if field := _FIELDS.get(" ".join(words[:count]).lower()):
            return field, " ".join(line.split()[count:])
    return "other" if colon else "", value.strip()


def _delay(values: Sequence[str]) -> float | None:
    """The last that is a number of seconds."""
    for value in reversed(values):
        with contextlib.suppress(ValueError):
            if 0 <= (delay := float(value)) < math.inf:
                return min(delay, MAX_DELAY) or None
    return None


def _patterns(group: _Group) -> dict[str, bool]:
    """The patterns of a group, in the one spelling in which they are compared, and whether they allow."""
    found: dict[str, bool] = {}
    for field in ("disallow", "allow"):
        values = group.get(field, [])
        text = "\n".join(values)
        if "#" in text:
            values = [value.partition("#")[0] for value in values]
        values = list(filter(None, dict.fromkeys(map(str.strip, values))))
        if "://" in text:
            values = [f"/{one}" if one.startswith(("http://", "https://")) else one for one in values]
        if "$" in text:  # at the end it may stand for itself too
            values += [one[:-1] + "\r" for one in values if one[-1] == "$"]
        if values:
            patterns = _spelled("\n".join(values), "/%=*\r\n").replace("\r", "$").split("\n")
            found |= dict.fromkeys(patterns, field == "allow")
            if field == "allow" and "/index.html" in text:
                ours = [one.removesuffix("index.html") + "$" for one in patterns if one.endswith("/index.html")]
                found |= dict.fromkeys(ours, True)
    return found


def _spelled(text: str, safe: str) -> str:
    """``text`` with escapes for what needs them, and for nothing else."""
    if "%" in text:
        text = _ESCAPE.sub(lambda escape: _MEANT[escape[1]], text.encode()).decode("utf-8", "replace")
    return quote(text, safe)


def _path_of(url: str) -> str:
    """The path and query of a normalised URL, as patterns are spelled."""
    if plain := _PLAIN_URL.fullmatch(url):
        return plain[1]
    rest = url.partition("#")[0].partition("://")[2]
    path = rest[len(re.split("[/?]", rest, maxsplit=1)[0]) :]
    return _spelled(path if path.startswith("/") else f"/{path}", "/%=")


def _split(pattern: str) -> tuple[str, tuple[str, ...] | None, str]:
    """(Head, what has to follow somewhere and in this order, what ends it) of a pattern; None: nothing may follow."""
    body = pattern.removesuffix("$")
    head, *parts = body.split("*")
    if not parts:
        return head, None, ""
    end = parts.pop() if body != pattern else ""
    return head, tuple(filter(None, parts)), end


_Group = dict[str, list[str]]  # what is said to an agent: values by what they are about
_Tail = tuple[int, tuple[str, ...] | None, str]  # the rank of a pattern, and what `_split` finds behind its head


class _Tails:
    """Of the patterns with one head, the highest rank first."""

    __slots__ = ("parts", "tails")

    def __init__(self, tails: list[_Tail]) -> None:
        self.tails = tuple(sorted(tails, key=lambda tail: tail[0], reverse=True))
        self.parts = sum(1 + sum(1 + len(part) // 16 for part in parts or ()) for _, parts, _ in tails)
        """How often `_PART` is taken for them; long ones are slower to look for."""


class _Packed(Sequence[str]):
    """Many strings in one: 4 bytes more for each, instead of 57."""

    __slots__ = ("_ends", "_text")

    def __init__(self, items: Sequence[str]) -> None:
        self._text = "".join(items)
        self._ends = array("I", accumulate(map(len, items), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        return self._text[self._ends[i] : self._ends[i + 1]]


class _Patterns:
    """The patterns of a file. Their rank is twice their length, and one more if they allow: so the highest wins."""

    __slots__ = ("_heads", "_plain", "_shorter", "_tails", "size", "steps")

    def __init__(self, patterns: dict[str, bool], wild: Iterable[str], size: int) -> None:
        """``wild``: those of them that have a tail."""
        self.size = size
        tails: dict[str, list[_Tail]] = {}
        for pattern in wild:
            head, parts, end = _split(pattern)
            tails.setdefault(head, []).append((2 * len(pattern) + patterns[pattern], parts, end))
        heads = list(patterns) if not wild else [*(patterns.keys() - wild), *tails]
        heads.sort()
        self._heads: Sequence[str] = tuple(heads) if len(heads) <= _FEW else _Packed(heads)
        self._plain = bytes(map(patterns.get, heads, repeat(2)))
        """Of each head: 0 if it forbids, 1 if it allows, 2 if it is no pattern by itself."""
        self._tails = {i: _Tails(tails[head]) for i, head in enumerate(heads) if head in tails} if tails else {}
        self._shorter = array("i")  # of each head: the longest other one that it begins with; -1: none
        nest, deepest = [-1], 1
        longer = list(map(str.startswith, heads, ["\n", *heads[:-1]]))
        if not any(longer):
            self._shorter = array("i", [-1]) * len(heads)
            longer = []
        for i, goes_on in enumerate(longer):
            if goes_on:
                nest.append(i - 1)
                deepest = max(deepest, len(nest))
            while nest[-1] >= 0 and not heads[i].startswith(heads[nest[-1]]):
                nest.pop()
            self._shorter.append(nest[-1])
        self.steps = 24 + deepest + sum(one.parts for one in self._tails.values())

    def begun(self, path: str) -> tuple[int, list[tuple[int, _Tails]]]:
        """(The highest rank of the plain patterns that match, 1 if none does; the tails of the heads that do, each with
        the length of its head)."""
        rank, found = 1, list[tuple[int, _Tails]]()
        i = bisect_right(self._heads, path) - 1
        while i >= 0 and not path.startswith(self._heads[i]):
            i = self._shorter[i]
        while i >= 0:  # all that are left are shorter ones of the same
            length = len(self._heads[i])
            if rank == 1 and (plain := self._plain[i]) < 2:
                rank = 2 * length + plain
            if tails := self._tails.get(i):
                found.append((length, tails))
            i = self._shorter[i]
        return rank, found


def _longest(path: str, rank: int, begun: Iterable[tuple[int, _Tails]]) -> int:
    """``rank``, or the highest of the patterns that match and go on behind the heads that ``path`` begins with."""
    for start, tails in begun:
        for higher, parts, end in tails.tails:
            if higher <= rank:
                break
            at = start
            if parts is None:
                at = start if len(path) == start else -1
            elif end and not path.endswith(end):
                continue
            else:
                for part in parts:
                    at = path.find(part, at)
                    if at < 0:
                        break
                    at += len(part)
            if at >= 0 and at + len(end) <= len(path):
                rank = higher
                break
    return rank


def _absolute(text: str, base: str) -> str | None:
    with contextlib.suppress(FetchError):
        return (join(base, text) if base else normalise(text))[0]
    return None
