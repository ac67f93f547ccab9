"""Cookies of one redirect chain: for sites that answer only who brings back the cookie that they have just set.

Promised: a cookie goes back to the host that set it alone, whatever Domain it names (RFC 6265, section 5.4, host-only),
under its path, over TLS if it is Secure; no more than ``MOST`` are kept, of ``LONGEST`` characters together. They are
forgotten when the chain is at its end. Pure.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

from crawl.urls import host_of
from runtime.http_dates import parse_http_date

MOST = 20
LONGEST = 8192


class Cookie(NamedTuple):
    """A cookie, and where it goes."""

    host: str
    path: str
    name: str
    value: str
    secure: bool


def _path(url: str) -> str:
    return "/" + url.split("/", 3)[3].partition("?")[0]


def store(known: tuple[Cookie, ...], url: str, lines: str | None) -> tuple[Cookie, ...]:
    """``known``, and what ``url`` sets with the Set-Cookie ``lines``; what is no cookie is left out."""
    cookies = {(cookie.host, cookie.path, cookie.name): cookie for cookie in known}
    for line in (lines or "").split("\n"):
        pair, _, rest = line.partition(";")
        name, equals, value = map(str.strip, pair.partition("="))
        if not equals or not (name + value).isascii() or not (name + value).isprintable() or not name + value:
            continue
        parts = (part.partition("=") for part in rest.split(";"))
        attributes = {key.strip().lower(): text.strip() for key, _, text in parts}
        secure = "secure" in attributes
        path = attributes.get("path", "")
        path = path if path.startswith("/") else _path(url).rpartition("/")[0] or "/"
        key = host_of(url), path, name
        cookies.pop(key, None)
        if not _is_over(attributes) and (url.startswith("https:") or not secure):
            cookies[key] = Cookie(*key, value, secure)
    while len(cookies) > MOST or sum(len(one.name) + len(one.value) for one in cookies.values()) > LONGEST:
        del cookies[next(iter(cookies))]
    return tuple(cookies.values())


def _is_over(attributes: dict[str, str]) -> bool:
    age = attributes.get("max-age", "")
    if re.fullmatch(r"-?[0-9]+", age, re.ASCII):
        return age.strip("-0") == "" or age.startswith("-")
    now = time.time()
    date = parse_http_date(attributes.get("expires", ""), now)
    return date is not None and date <= now


def header(known: tuple[Cookie, ...], url: str) -> str:
    """The Cookie header for ``url``: "" if there is none."""
    host, path, over_tls = host_of(url), _path(url), url.startswith("https:")
    return "; ".join(
        f"{one.name}={one.value}" if one.name else one.value
        for one in sorted(known, key=lambda cookie: -len(cookie.path))
        if one.host == host
        and (over_tls or not one.secure)
        and (path.startswith(one.path) if one.path.endswith("/") else f"{path}/".startswith(f"{one.path}/"))
    )
