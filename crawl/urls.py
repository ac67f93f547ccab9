"""URLs as the crawlers know them: one spelling each, their origin, and the passwords in them.

Promised: two spellings of one URL come out equal, as a browser understands them (WHATWG URL); what may be a password is
never shown. Nothing here has a state, waits, or does I/O.
"""

from __future__ import annotations

import re
import urllib.parse

import ada_url

from crawl.errors import FetchError
from html_parse import is_normal

MAX_URL = 8192  # longest URL in characters; RFC 9110, section 4.1 asks for at least 8000
HIDDEN = "<password>"  # in the place of what may be one, in a line that is no URL; with it, it never becomes one

_HOST_AND_PORT = re.compile(r"(?!javascript|sms|tel)[a-z0-9.-]+:[0-9]{1,5}(?:[/?#]|$)")
_HARMLESS = re.compile(
    "accept|accept-(?:charset|encoding|language)|cache-control|connection|dnt|from|pragma|priority|save-data"
    "|sec-(?:ch|fetch|gpc)[a-z-]*|upgrade-insecure-requests|user-agent",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(\s*(?:https?:[/\\]*|[a-z][a-z0-9+.-]*://))([^/\\?#]*)@", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(?:acct|cid|im|javascript|mailto|mid|sips?|xmpp):", re.IGNORECASE)
"""URLs in which an "@" has no password before it."""


def normalise(text: str) -> tuple[str, str]:
    """(URL without fragment, host) as a browser understands ``text`` (WHATWG URL).

    Two spellings of one URL come out equal: case of scheme and host, default port, dot segments, percent-encoding
    of what must be encoded. Raises FetchError ``invalid_url``.
    """
    if len(text) > MAX_URL:
        raise FetchError("invalid_url", f"longer than {MAX_URL} characters")
    try:
        url: str = text if is_normal(text) else ada_url.normalize_url(text)
    except (ValueError, UnicodeError):
        hint = "" if "://" in text else "; write https:// before it"
        raise FetchError("invalid_url", f"not a URL{hint}") from None
    if not url.startswith(("http://", "https://")):
        if _HOST_AND_PORT.match(url):
            raise FetchError("invalid_url", "not a URL; write http:// before it")
        raise FetchError("invalid_url", f"only http and https are fetched, not {url.partition(':')[0]}")
    url = url.partition("#")[0]
    return url, host_of(url)


def as_url(text: str) -> str | None:
    """The URL that ``text`` may stand for without its scheme; None: it looks like none."""
    if _HOST_AND_PORT.match(text):
        return f"http://{text}"
    return f"https://{text}" if "." in text.partition("/")[0].strip(".") else None


def join(base: str, text: str) -> tuple[str, str]:
    """``normalise``, of an address that a document at ``base`` names."""
    try:
        return normalise(ada_url.join_url(base, text))
    except ValueError:
        raise FetchError("invalid_url", "not a URL") from None


def host_of(url: str) -> str:
    """The host of a normalised URL or origin."""
    host = url.split("/", 3)[2].rpartition("@")[2]
    return host[: host.index("]") + 1] if host.startswith("[") else host.partition(":")[0]


def origin(url: str) -> str:
    """Scheme, host and port of a normalised URL: what credentials are good for."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"


def is_secret(name: str) -> bool:
    """Whether a header may hold what only the servers of the list should see: any may that is not known for none."""
    return _HARMLESS.fullmatch(name) is None


def split_credentials(line: str) -> tuple[str, str]:
    """A line of the list without what stands before the "@" of its host, and that: ``user:password``, or ``""``.

    What is no URL is shown all the same, so what may be a password in it is replaced.
    """
    if "@" not in line:
        return line, ""
    text, found = line, _USERINFO.match(line)
    if found is None:  # a spelling that only the URL standard takes for one, or no URL
        try:
            text = normalise(line)[0]
        except FetchError:
            at = line.rindex("@")
            start = line.rfind("//", 0, at) + 2
            if start < 2:
                start = 0
                if ":" not in line[:at] or _ADDRESS.match(line):
                    return line, ""
            return line[:start] + HIDDEN + line[at + 1 :], ""
        found = _USERINFO.match(text) if "@" in text.split("/")[2] else None
    return (line, "") if found is None else (found[1] + text[found.end() :], found[2])


def proxy_url(text: str) -> str:
    """A proxy as a URL that both drivers understand; ``host:port`` is one, as in the environment. ``ValueError``."""
    try:
        url = normalise(text if "://" in text else f"http://{text}")[0]
        parts = urllib.parse.urlsplit(url)
        if url.startswith("http://") and parts.path == "/" and not parts.query and parts.port != 0:
            return url[:-1]
    except (FetchError, ValueError):
        pass
    raise ValueError(f"proxy must be http://host:port, not {split_credentials(text)[0]!r}") from None
