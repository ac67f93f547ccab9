"""The header lines of HTTP: what both clients send, and their one reading of what comes.

Promised: both clients see the same text whatever bytes a server sent; credentials go to the origin that the list names
them for, and to no other that a page or a redirect chose. Pure.
"""

from __future__ import annotations

import base64
import re
import urllib.parse
from collections.abc import Container, Iterable, Mapping

from crawl.cookies import header as cookie_header
from crawl.model import RESPONSE_HEADERS, Options, Request
from crawl.urls import is_secret, normalise, origin, split_credentials

ACCEPT_ENCODING = "gzip, deflate, br, zstd"
_WANTED = {name.lower().encode(): name for name in RESPONSE_HEADERS}
_LISTS = {"Content-Encoding": ", ", "X-Robots-Tag": "\n", "Set-Cookie": "\n"}  # of the others the first line counts
_NOT_ASCII = re.compile(rb"[\x80-\xff]")


def read_headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Those of RESPONSE_HEADERS that are in the lines of a head, as text.

    Bytes outside ASCII are UTF-8, as browsers have it, or where they cannot be, Latin-1 (RFC 9110, section 5.5); in a
    Location such bytes are percent-encoded as they are, so that the server gets back what it sent.
    """
    found: dict[str, str] = {}
    for line, value in raw:
        name = _WANTED.get(line.lower())
        if name is None or (name in found and name not in _LISTS):
            continue
        value = value.strip(b" \t")
        try:
            text = value.decode()
        except UnicodeDecodeError:
            if name == "Location":
                value = _NOT_ASCII.sub(lambda byte: b"%%%02X" % byte[0][0], value)
            text = value.decode("latin-1")
        found[name] = found[name] + _LISTS[name] + text if name in found else text
    return found


def request_headers(
    options: Options,
    request: Request,
    named: Container[str] | None = None,
    credentials: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, str]]:
    """(URL without credentials, headers) to send.

    Credentials never go to another origin than the list named, nor to one that a page or a redirect chose: ``named``
    holds the origins of the list (None: the request is of the list). ``credentials`` are those that the list has for
    a URL, or for any other URL of its origin. Those in a URL that a page or a redirect names go where that URL goes.
    """
    headers = {
        "User-Agent": options.user_agent,
        "Accept": "text/html,application/xhtml+xml,*/*;q=0.8",
        "Accept-Encoding": ACCEPT_ENCODING,
    }
    if request.last_of_host:
        headers["Connection"] = "close"
    url, userinfo = split_credentials(request.target)
    if options.headers or credentials:
        first = normalise(request.url)[0] if request.hops else url
        home = origin(first)
        trusted = not request.strayed and origin(url) == home and (named is None or home in named)
        for name, value in options.headers:
            if trusted or not is_secret(name):
                for same in [sent for sent in headers if sent.lower() == name.lower()]:
                    del headers[same]
                headers[name] = value
        if trusted and credentials and not userinfo:
            userinfo = credentials.get(first) or credentials.get(home, "")
    if userinfo:
        user, _, password = map(urllib.parse.unquote_to_bytes, userinfo.partition(":"))
        headers["Authorization"] = "Basic " + base64.b64encode(user + b":" + password).decode()
    if cookies := cookie_header(request.cookies, url):
        name = next((name for name in headers if name.lower() == "cookie"), "Cookie")
        headers[name] = f"{headers[name]}; {cookies}" if name in headers else cookies
    return url, headers
