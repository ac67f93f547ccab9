"""What a worker of a shared crawl has to tell the tables, and what it tells again if they forget it.

Links of a page go before or with its row; lines of the list are kept for a while after they were told, because nobody
else could find them again. Plain data, used under the lock of ``crawl.lease.SharedFrontier``.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections import deque
from collections.abc import Iterable

from crawl.addresses import names_private
from crawl.errors import FetchError
from crawl.hosts import Kind
from crawl.sync import Link, SyncBatch, clean, hashed
from crawl.urls import host_of, normalise

AT_ONCE = 500  # finished URLs that are not kept waiting for that; ten times as many make the tasks wait
LINKS = 20_000  # found URLs and rows in one batch, at most; fewer after one that took too long
MAX_HOST = 255
TOLD = 200_000  # found URLs of which it is kept in mind that they were told
KEPT = 300.0  # seconds that lines of the list are kept after they were told
KEPT_LINES = 50_000  # that are kept at most


class Outbox:
    """What is to be told to the tables, and what is to be told again if they forget it."""

    def __init__(self, length: float) -> None:
        self._length = length
        self.batch = SyncBatch(None, 0, length)  # in the making
        self.scoped = False  # the hosts of the list matter
        self.halved = False  # the rest of a batch waits
        self._most = LINKS  # links and rows of a batch
        self._told: set[uuid.UUID] = set()
        self._kept: deque[tuple[float, list[Link]]] = deque()

    def add_list(self, texts: Iterable[str]) -> None:
        """Lines of a list."""
        for raw in texts:
            text = clean(raw)
            try:
                target, host = normalise(text)
                if len(host) > MAX_HOST:
                    raise FetchError("invalid_url", "host name too long")
            except FetchError:
                self.batch.links.append(Link(hashed(text), "", text, text))
            else:
                link = Link(hashed(target), host, text, target, private=names_private(host))
                self.batch.links.append(link)
                self._add_scope([link])

    def _add_scope(self, links: Iterable[Link]) -> None:
        if self.scoped:
            self.batch.scope += [link.target for link in links if link.host]

    def add_links(self, targets: Iterable[str], depth: int, private: bool, kind: Kind, hops: int = 0) -> int:
        """Those that were not told yet. Returns how many."""
        before = len(self.batch.links)
        for target in targets:
            key, host = hashed(target), host_of(target)
            if key not in self._told and len(host) <= MAX_HOST:
                if len(self._told) >= TOLD:
                    self._told.clear()
                self._told.add(key)
                self.batch.links.append(Link(key, host, target, target, depth, kind, private, hops))
        return len(self.batch.links) - before

    def take(self) -> SyncBatch:
        """All that there is."""
        batch, self.batch, self.halved = self.batch, SyncBatch(None, 0, self._length), False
        return batch

    def fit(self, batch: SyncBatch) -> None:
        """Leave for later what would be more links and rows than the tables can take."""
        while len(batch.links) + len(batch.done) > self._most and self.halve(batch):
            pass

    def refused(self, batch: SyncBatch) -> bool:
        """It took too long: halve it, and what comes after it; whether that could be."""
        halved = self.halve(batch)
        self._most = max(1, len(batch.links) + len(batch.done))
        return halved

    def halve(self, batch: SyncBatch) -> bool:
        """Keep half of what ``batch`` tells; the rest goes before what comes next.

        False if there is nothing to halve. Links stay before the rows of their pages, and rows before their host goes.
        """
        rest, later = dataclasses.replace(batch, links=[], done=[], robots=[], claim=0), self.batch
        if len(batch.links) > 1 or (batch.links and batch.done):
            half = max(1, len(batch.links) // 2)
            batch.links, rest.links, rest.done = batch.links[:half], batch.links[half:], batch.done
            batch.done, batch.reading = [], True
        elif len(batch.done) > 1:
            half = len(batch.done) // 2
            batch.done, rest.done = batch.done[:half], batch.done[half:]
        else:
            return False
        half = len(batch.scope) // 2
        batch.scope, rest.scope = batch.scope[:half], batch.scope[half:]
        for name in ("links", "scope", "done", "moves", "delegated", "again", "robots"):
            setattr(later, name, getattr(rest, name) + getattr(later, name))
        later.notes |= batch.notes
        batch.moves, batch.delegated, batch.again, batch.notes = [], [], [], {}
        batch.held += [name for name, note in later.notes.items() if note.back]  # they are told of, not claimed
        self.halved = True
        return True

    def was_told(self, batch: SyncBatch, now: float) -> None:
        """The tables have it. Lines of the list are kept for a while."""
        self._most = min(LINKS, self._most + self._most // 8 + 1)
        if listed := [link for link in batch.links if not link.depth]:
            self._kept.append((now, listed))
        while self._kept and (self._kept[0][0] < now - KEPT or sum(len(links) for _, links in self._kept) > KEPT_LINES):
            self._kept.popleft()

    def tell_again(self, batch: SyncBatch) -> None:
        """``batch`` did not reach the tables, and they may have forgotten what was told before. What was finished, or
        is given back, is no longer ours to tell."""
        old, kept = self.batch, [link for _, links in self._kept for link in links]
        self._told.clear()
        self._kept.clear()
        self.batch = SyncBatch(None, 0, self._length)
        self.batch.links, self.batch.robots = kept + batch.links + old.links, batch.robots + old.robots
        self.batch.scope = batch.scope + old.scope
        self.batch.notes = {
            name: note._replace(back=False) for name, note in (old.notes | batch.notes).items() if note.wait
        }
        self._add_scope(kept)

    def backlog(self) -> int:
        """How much waits, in finished URLs."""
        return max(len(self.batch.done), len(self.batch.links) * AT_ONCE // LINKS)

    def is_empty(self) -> bool:
        """Whether all is told."""
        out = self.batch
        return not (out.done or out.links or out.moves or out.scope or out.again)
