"""One request to the metadata API, and what it comes to: metadata, "unknown", or an error that says whose fault.

Promised
- A name is part of one path segment or query value: it changes neither the host nor the path. Names that no URL can
  hold ("", ".", "..") are not asked for: the API does not know them.
- Whatever the API sends, `Metadata` holds four texts of at most `MAX_TEXT` characters that PostgreSQL can store, and no
  more than `MAX_BYTES` are read. How long a request may take is the caller's to say.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Final
from urllib.parse import quote, urlsplit

import aiohttp
import orjson
import yarl

from logs.parse import Metadata
from runtime.http_dates import parse_retry_after

MAX_BYTES = 65_536  # of an answer
MAX_TEXT = 255  # characters of a text of the API's; one with more is as wrong as a number
RETRYABLE = (429, 500, 502, 503, 504)


class Unknown(enum.Enum):
    """What is said of a service that the API does not know."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN

Found = Metadata | enum.Enum | None
"""What is known of a service: its metadata; UNKNOWN if the API does not know it; None if nothing is known yet."""


class MetadataError(Exception):
    """A load failed; ``kind``: "connect", "timeout", "status", "redirect", "too large", "rubbish"; "name": the API
    refuses this one (another status of 400 to 499); "closed": the enricher was meanwhile; "internal": a fault of ours.
    """

    def __init__(self, kind: str, detail: str, *, retryable: bool = False, retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.retryable, self.retry_after = kind, retryable, retry_after
        self.blames_api = kind not in ("name", "closed")
        """Whether the circuit breaker counts it: who invents names must not be able to open the circuit."""


def make_template(url: str) -> str:
    """The URL with ``{service}`` in it, at its end unless it is there; ValueError if it cannot be one."""
    template = url if "{service}" in url else url.rstrip("/") + "/{service}"
    parts = urlsplit(template)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the metadata API needs a URL like http://host/services/{service}")
    if "{service}" in parts.netloc or "{service}" in parts.fragment:
        raise ValueError("{service} can be part of the path or of the query of a URL only")
    yarl.URL(template.replace("{service}", "x"), encoded=True).port  # noqa: B018  -- ValueError if it is none
    return template


def read_metadata(body: bytes | bytearray) -> Metadata:
    """The four texts of a JSON object, "" for what is missing or null; MetadataError if it is anything else."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise MetadataError("rubbish", "not JSON in UTF-8") from None
    if not isinstance(data, dict):
        raise MetadataError("rubbish", "not a JSON object")
    texts = []
    for name in Metadata._fields:
        text = data.get(name)
        if text is None:
            text = ""
        if not isinstance(text, str) or "\0" in text or len(text) > MAX_TEXT:
            raise MetadataError("rubbish", f"{name} is no text of at most {MAX_TEXT} characters without NUL")
        texts.append(text)
    return Metadata(*texts)


class MetadataClient:
    """The API at ``url`` (``http://host/services/{service}``; ValueError if it cannot be one). Requests can be made
    from ``open`` to ``close``."""

    def __init__(self, url: str) -> None:
        self._template = make_template(url)
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Make a session, in the running loop."""
        self._session = aiohttp.ClientSession(
            # The requests are bounded by who calls. The system's resolver: an installed c-ares is taken otherwise,
            # which knows nothing of nsswitch.conf.
            connector=aiohttp.TCPConnector(limit=0, resolver=aiohttp.ThreadedResolver()),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # the limit is the caller's
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,  # nothing that could unpack to more than was counted
        )
        self._session._retry_connection = False  # it would try again by itself, past the budget; no public switch

    async def close(self) -> None:
        """Requests under way fail with "closed"."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
            await asyncio.sleep(0)  # the sockets are closed in the next turn of the loop

    def address(self, service: str) -> yarl.URL | None:
        """The URL of a service; None if no URL can name it."""
        if service in ("", ".", ".."):
            return None
        try:
            quoted = quote(service, safe="")
        except UnicodeEncodeError:  # a lone surrogate
            return None
        return yarl.URL(self._template.replace("{service}", quoted), encoded=True)

    async def fetch(self, address: yarl.URL) -> Metadata | Unknown:
        """What the API says now; `MetadataError` if that is of no use."""
        if self._session is None:
            raise MetadataError("closed", "")
        body = bytearray()
        try:
            async with self._session.get(address, allow_redirects=False) as response:
                status, headers = response.status, response.headers
                if status in (200, 404):  # read to the end, and the connection can be used again
                    async for piece in response.content.iter_chunked(1 << 16):
                        body += piece
                        if len(body) > MAX_BYTES:
                            raise MetadataError("too large", f"more than {MAX_BYTES} bytes")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if self._session is None:
                raise MetadataError("closed", "") from None
            if isinstance(error, TimeoutError):
                raise MetadataError("timeout", "no connection in time") from None
            raise MetadataError("connect", type(error).__name__, retryable=True) from None
        if status == 200:
            return read_metadata(body)
        if status == 404:
            return UNKNOWN
        if 300 <= status < 400:
            raise MetadataError("redirect", str(status))
        if status in RETRYABLE:
            later = parse_retry_after(headers.get("Retry-After"))
            raise MetadataError("status", str(status), retryable=True, retry_after=later)
        raise MetadataError("name" if 400 <= status < 500 and status not in (401, 403) else "status", str(status))
