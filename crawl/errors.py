"""Why there is no row of a page yet: the kinds of failure, and which of them are tried again.

Whatever the network, a server or a document does wrong is a ``FetchError`` of one of ERROR_KINDS, and becomes a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crawl.model import Response


MAX_RETRY_AFTER = 600.0  # longest pause in seconds that a server can ask for
ERROR_KINDS = {
    "invalid_url": "the line of the list is not an http or https URL",
    "dns": "the host name has no address, or the name server did not answer",
    "connect": "no connection: refused, unreachable",
    "tls": "no secure connection: certificate or protocol",
    "timeout": "no complete answer within the time limit",
    "reset": "the server closed the connection before it answered",
    "protocol": "what came is not HTTP",
    "truncated": "the connection closed before the body was complete",
    "too_large": "the body is larger than the size limit",
    "redirects": "too many redirects, or one that leads nowhere",
    "decode": "the body is not in the Content-Encoding that it claims, no feed, or not to be read to its end",
    "http": "an answer of status 400 or above",
    "blocked": "a public page or name led to a private address",
    "robots": "robots.txt forbids it, or could not be read, or is too costly to match",
    "duplicate": "it redirects to a page that has a row of its own",
    "interrupted": "the run was stopped before the answer was complete",
    "internal": "a fault of the crawler itself, kept to this one row",
}
CUT_OFF = "stopped before the answer was complete"  # what an ``interrupted`` request says of itself
RETRY_KINDS = frozenset({"connect", "timeout", "reset", "truncated"})
RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})


class FetchError(Exception):
    """A fetch that failed: ``kind`` is one of ERROR_KINDS, ``status`` that of the answer if its head came.

    ``answer``: that answer, if it was its body that failed.
    """

    def __init__(self, kind: str, detail: str, *, status: int | None = None, retry: bool | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.status = kind, detail, status
        self.retry = kind in RETRY_KINDS if retry is None else retry
        self.seconds = 0.0
        self.answer: Response | None = None


class Postponed(Exception):
    """Something came between a request's leaving the frontier and its being sent: a pause of its host, or no socket
    left to be had. It goes back, to be tried after ``delay`` seconds."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__(delay)
        self.delay = delay
