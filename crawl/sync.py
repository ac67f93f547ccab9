"""What a worker of a shared crawl and the tables say to each other: a ``SyncBatch``, and the ``SyncAnswer`` to it.

Records only, and what makes text fit for the tables. All times in them are durations in seconds, so it does not matter
by whose clock. crawl/lease.py says what goes into a batch, crawl/tables.py what becomes of it.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crawl.errors import FetchError
from crawl.hosts import Kind
from crawl.model import Response, ScrapeResult
from crawl.robots import Rules, rules_for


def hashed(url: str) -> uuid.UUID:
    """The key of a URL."""
    return uuid.UUID(bytes=hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).digest())


def clean(value: Any) -> Any:
    """Without what JSON in PostgreSQL cannot hold: NUL and halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    if isinstance(value, dict):
        return {clean(name): clean(item) for name, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list | tuple) else value


class Link(NamedTuple):
    """A URL for the queue."""

    key: uuid.UUID
    host: str
    url: str
    target: str
    depth: int = 0
    kind: Kind = "page"
    private: bool = False
    hops: int = 0


class Queued(NamedTuple):
    """A URL that waits."""

    host: str
    id: int
    url: str
    target: str
    depth: int
    kind: Kind
    private: bool
    strayed: bool
    hops: int
    attempt: int
    wait: float | None  # seconds
    deaths: int = 0  # workers that died while this was the only one of its host that they could have had under way


class Done(NamedTuple):
    """A URL that is finished."""

    host: str
    id: int
    url: str
    row: ScrapeResult | None  # None: of a kind that has none


class Move(NamedTuple):
    """A redirect: the URL goes on as ``to``. ``instead``: its row if ``to`` was seen; None: it does not matter."""

    host: str
    id: int
    to: Queued
    instead: ScrapeResult | None


class Found(NamedTuple):
    """What a request for robots.txt came to: ``status`` None for an error of the kind ``body``."""

    origin: str
    status: int | None
    body: bytes
    target: str
    ttl: float

    def rules(self, user_agent: str) -> Rules:
        """What it says to this ``user_agent``."""
        if self.status is None:
            return rules_for(FetchError(self.body.decode(), ""), user_agent, self.target)
        return rules_for(Response(self.status, {}, self.body), user_agent, self.target)


class Note(NamedTuple):
    """Of a held host: seconds until it may be sent another request, and between two; whether it is given back."""

    wait: float | None
    spacing: float | None
    back: bool


@dataclass
class SyncBatch:
    """What a worker tells and asks, in one transaction."""

    token: int | None  # None: it wants to be one of the workers
    serial: int
    lease: float
    links: list[Link] = field(default_factory=list)
    scope: list[str] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    delegated: list[Queued] = field(default_factory=list)
    """Requests for robots.txt that were redirected to hosts that this worker may not hold."""
    again: list[Queued] = field(default_factory=list)  # given back after an attempt
    robots: list[Found] = field(default_factory=list)
    notes: dict[str, Note] = field(default_factory=dict)
    claim: int = 0
    spacing: float = 0.0  # of a host of which nothing is known
    limit: int = 100  # URLs of a host that is new
    refill: list[tuple[str, int, int]] = field(default_factory=list)  # (host, after which id, how many)
    asked: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    hungry: bool = False
    reading: bool = False
    scope_after: int = 0
    rejoins: bool = False  # it was a worker before


@dataclass
class SyncAnswer:
    """What the tables say to a batch."""

    token: int | None = None
    """None: the lease was lost, or what earlier batches told; nothing else was done."""
    stored: list[ScrapeResult] = field(default_factory=list)
    hosts: list[tuple[str, float | None]] = field(default_factory=list)  # (host, seconds until it may go)
    careful: dict[str, int] = field(default_factory=dict)
    """How many URLs of these hosts, the next ones, are to be tried one at a time: a worker died with one of them."""
    alone: bool = False  # the host is to be tried by a worker that has nothing else
    urls: list[Queued] = field(default_factory=list)
    robots: list[Found] = field(default_factory=list)
    rules: dict[str, Rules] = field(default_factory=dict)  # what ``robots`` say, by origin, where it was read before
    scope: list[tuple[int, str]] = field(default_factory=list)
    finished: bool = False
    reading: bool = False
    workers: int = 1
    all_held: int = 0
    hungry: bool = False  # another worker has too little to do
    dead: bool = False  # a lease has ended: ``reap``
    try_alone: bool = False  # a host waits for a worker that has nothing else, and it is this one's turn
