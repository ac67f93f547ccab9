"""What a site's owner asks of crawlers: robots.txt (RFC 9309), X-Robots-Tag and <meta name=robots>.

Theory.  Which rule wins for a path (the longest, "*" and "$", percent-encoding) is Protego's business.  Which group of
rules is ours is decided here: the `User-agent` lines are rewritten before Protego sees them, to "*", to a token that
stands for us, or to one that stands for all others.  So a token counts as a whole and without its version, as section
2.2.1 has it (left to itself, Protego lets a group for "flat" govern "flatcrawl", and one for "flatcrawl/2.0" not), and
a file of ten thousand agents costs no more than one of two: their product with the rules that follow is never made.

Promised
- Nothing here raises, whatever the bytes, or waits, or keeps a state. Rules can be shared by threads.
- Of a file, the first 500 KiB count; a line that this cuts is left out, as half a rule is another rule.
- /robots.txt itself is always allowed.

Not promised
- `allows` looks at each rule with a wildcard: a hostile file of 500 KiB of them costs tens of milliseconds per URL.
- Two escapes that are no UTF-8, such as "%E9" and "%E8", are the same to Protego.
- Request-rate and Visit-time are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

import ada_url
from protego import Protego

from crawl_rules import FetchError, Response, normalise

MAX_ROBOTS = 500 * 1024
"""Bytes of a robots.txt that count: the least that RFC 9309, section 2.5 allows, and what the large engines read."""
MAX_HOPS = 5
"""Redirects that a robots.txt is followed through (section 2.3.1.2)."""
MAX_DELAY = 300.0
"""Longest Crawl-delay in seconds that is obeyed: a longer one counts as this."""
MAX_SITEMAPS = 1000
OUR_TOKEN = "flatcrawl"

_COMPATIBLE = re.compile(r"compatible;\s*([a-zA-Z0-9_-]+)")
_TOKEN = re.compile(r"[a-zA-Z0-9_-]+")
_BROWSERS = frozenset({"mozilla", "opera", "msie"})
_US, _OTHERS = "us", "!others"  # what the agents of a file become
_AGENT = re.compile(r"\s*user(?:-|\s+)?agent(?:\s*:|\s+|$)\s*([^#]*)", re.IGNORECASE)


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

    __slots__ = ("_answer", "_parsed", "delay", "sitemaps", "why")

    def __init__(
        self,
        parsed: Protego | None = None,
        *,
        answer: bool = True,
        sitemaps: tuple[str, ...] = (),
        why: str = "robots.txt forbids it",
    ) -> None:
        self._parsed, self._answer = parsed, answer
        delay = parsed.crawl_delay(_US) if parsed else None
        self.delay: float | None = min(delay, MAX_DELAY) if delay and math.isfinite(delay) and delay > 0 else None
        """Seconds between two requests that the site asks for; None if it does not, or asks nonsense."""
        self.sitemaps = sitemaps
        """Normalised URLs, each once; of any host: what they may list is `parse_sitemap`'s question."""
        self.why = why
        """What to say of a URL that is not allowed."""

    def allows(self, url: str) -> bool:
        """Whether a normalised URL of this origin may be fetched."""
        if not self._parsed:
            return self._answer or _is_robots_txt(url)
        try:
            return self._parsed.can_fetch(url, _US)
        except (ValueError, RecursionError):
            return False  # no URL that could be fetched

    def __repr__(self) -> str:
        what = "of a file" if self._parsed else f"all {'allowed' if self._answer else 'forbidden'}"
        return f"<Rules {what}, delay {self.delay}, {len(self.sitemaps)} sitemaps>"


ALLOW_ALL = Rules(answer=True, why="nothing is forbidden")
DISALLOW_ALL = Rules(answer=False, why="robots.txt could not be read")


def parse_robots(body: bytes, user_agent: str, url: str = "") -> Rules:
    """The rules for us in a robots.txt. ``url`` is where it came from: what relative Sitemap lines start from."""
    token = product_token(user_agent)
    lines = _decode(body).splitlines()
    for i, line in enumerate(lines):
        if agent := _AGENT.match(line):
            lines[i] = "User-agent: " + _addressee(agent[1].strip(), token)
    try:
        parsed = Protego.parse("\n".join(lines))
        sitemaps: dict[str, None] = {}
        for text in parsed.sitemaps:
            if len(sitemaps) < MAX_SITEMAPS and (sitemap := _absolute(text, url)):
                sitemaps[sitemap] = None
        return Rules(parsed, sitemaps=tuple(sitemaps))
    except (ValueError, ArithmeticError, LookupError, RecursionError):
        return DISALLOW_ALL  # a fault of the parser: no leave was given


def rules_for(outcome: Response | FetchError, user_agent: str, url: str = "") -> Rules:
    """The rules that the outcome of fetching a robots.txt stands for (RFC 9309, section 2.3.1).

    Redirects, up to MAX_HOPS, and retries are over.  An answer that says that there is none (4xx, a redirect too many
    or leading nowhere) allows everything; one that says nothing (5xx, no answer, one broken off) forbids everything.
    429 is with the latter though section 2.3.1.3 counts it to the former: it says "not now", which is no leave.
    """
    if isinstance(outcome, FetchError):
        return ALLOW_ALL if outcome.kind == "redirects" else DISALLOW_ALL
    if 200 <= outcome.status < 300:
        return parse_robots(outcome.body, user_agent, url)
    return ALLOW_ALL if 300 <= outcome.status < 500 and outcome.status != 429 else DISALLOW_ALL


# --------------------------------------------------------------------------------------------- of single pages

_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_MEANING: dict[str, tuple[Literal["noindex", "nofollow"], ...]] = {
    "noindex": ("noindex",),
    "nofollow": ("nofollow",),
    "none": ("noindex", "nofollow"),
}


def page_directives(
    header: str | None, meta: Iterable[str], user_agent: str
) -> frozenset[Literal["noindex", "nofollow"]]:
    """What a page asks of us: "nofollow", not to follow its links; "noindex", not to keep what it says.

    ``header`` is the X-Robots-Tag, several of them separated by line ends; ``meta`` is `Page.robots` and
    `Page.agent_robots`.  A directive after "agent:" is for that agent only, to the end of its line or to the next
    agent.  What is said to all and what is said to us add up, and the stricter counts, as with the large engines.
    """
    token = product_token(user_agent)
    found: set[Literal["noindex", "nofollow"]] = set()
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


def _absolute(text: str, base: str) -> str | None:
    try:
        return normalise(ada_url.join_url(base, text) if base else text)[0]
    except (ValueError, FetchError):
        return None


def _is_robots_txt(url: str) -> bool:
    return url.partition("://")[2].partition("/")[2].partition("#")[0].partition("?")[0] == "robots.txt"
