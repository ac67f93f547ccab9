"""What a parent and its helpers say to each other: grants, leave to send, and what became of a request.

Frames: a length, then plain tuples (marshal: both ends are one program, and nothing that came from the web is run).
The parent sends (``home``, grants, turns), a helper (outcomes, asks); at first two empty ones, and at the end
with (seconds of processor time, peak of memory in MB) behind them. A request is known by the number of its grant.

turn     (number, when it may be sent by ``time.monotonic``, which all processes share; -1: it is to be put back)
outcome  (number, seconds, ...): nothing more if it was not sent, but the address of its host if that is news; else
         what ``pack`` makes of an answer or error

Pure.
"""

from __future__ import annotations

import marshal
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from crawl.errors import FetchError
from crawl.model import Request, Response, ScrapeResult

SENT = (
    *("url", "target", "host", "depth", "attempt", "hops", "spent", "last_of_host", "kind", "private", "strayed"),
    "address",
)  # fmt: skip
"""What a helper is told of a request."""
of_request = attrgetter(*SENT)
MOST = 1 << 30  # bytes of a frame
Message = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Grant(Request):
    """A request, in the helper that has it."""

    number: int = 0
    sends: tuple[str, dict[str, str]] | None = None  # URL and headers, where there is more to them than the options say
    fresh_until: float = -math.inf  # until then it may be sent without asking
    turn: float = math.inf  # when it may be sent, once that is told; below 0: not soon
    missed: int = 0  # turns
    elsewhere: str | None = None  # the address that its host turned out to have


def frame(*message: Any) -> bytes:
    """A message as bytes, which tell its length."""
    data = marshal.dumps(message)
    return len(data).to_bytes(4, "little") + data


def messages(received: bytearray) -> Iterator[Message]:
    """Those that are complete; they are taken out of ``received``. Raises ValueError, and others, for what is none."""
    while len(received) >= 4:
        end = 4 + int.from_bytes(received[:4], "little")
        if end > MOST:
            raise ValueError(f"a frame of {end:,} bytes")
        if len(received) < end:
            return
        data = bytes(received[4:end])
        del received[:end]
        yield marshal.loads(data)


def row_fields(form: type[ScrapeResult]) -> attrgetter[Any]:
    """What makes a tuple of a row, of which ``form`` makes a row again."""
    return attrgetter(*(field.name for field in fields(form)))


def pack(outcome: Response | FetchError, body: bytes, row: Message | None, new: list[str] | None, home: int) -> Message:
    """``row``: of a page; ``new``: those of its links that were not told before, since the crawl had ``home`` homes."""
    if isinstance(outcome, Response):
        return outcome.seconds, outcome.status, outcome.headers, body, row, new, home
    answer = outcome.answer and (outcome.answer.status, outcome.answer.headers)
    return outcome.seconds, outcome.kind, outcome.detail, outcome.status, outcome.retry, answer


def unpack(packed: Message, form: type[ScrapeResult], home: int) -> Response | FetchError:
    """What came of a request, as a helper packed it; links new to the helper count if it knew the same ``home``."""
    seconds, first, *more = packed
    if isinstance(first, int):
        headers, body, row, new, then = more
        response = Response(first, headers, body, seconds)
        if row is not None:
            response.row, response.new_links = form(*row), new if then == home else None
        return response
    text, status, retry, head = more
    error = FetchError(first, text, status=status, retry=retry)
    error.seconds, error.answer = seconds, head and Response(head[0], head[1], b"")
    return error
