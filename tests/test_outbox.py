"""crawl/outbox.py: how much is told at once."""

from __future__ import annotations

import uuid

from crawl import outbox
from crawl.outbox import LINKS, Outbox
from crawl.sync import Done, Link, SyncBatch


def full(links: int, done: int) -> Outbox:
    out = Outbox(30.0)
    out.batch.links = [Link(uuid.UUID(int=n), "h", str(n), str(n)) for n in range(links)]
    out.batch.done = [Done("h", n, str(n), None) for n in range(done)]
    return out


def taken(out: Outbox) -> SyncBatch:
    batch = out.take()
    out.fit(batch)
    return batch


def test_rows_wait_for_the_links_of_their_pages() -> None:
    out = full(2 * LINKS + 5, 10)
    sizes = []
    while not out.is_empty():
        batch = taken(out)
        out.was_told(batch, 0.0)
        sizes.append((len(batch.links), len(batch.done)))
        assert len(batch.links) + len(batch.done) <= LINKS
    assert sum(links for links, _ in sizes) == 2 * LINKS + 5
    assert sizes[-1][1] == 10 and {done for _, done in sizes[:-1]} == {0}


def test_what_took_too_long_is_told_in_smaller_parts_from_then_on() -> None:
    out = full(1000, 0)
    batch = taken(out)
    assert out.refused(batch) and out.refused(batch) and len(batch.links) == 250
    out.was_told(batch, 0.0)
    sizes = []
    while not out.is_empty():
        sizes.append(len(taken(out).links))
    assert sum(sizes) == 750 and 250 // 2 < max(sizes) <= 250 + 250 // 8 + 1
    one = full(1, 0).take()
    assert not full(0, 0).refused(one) and len(one.links) == 1


def test_the_parts_grow_again() -> None:
    out = full(2, 0)
    out.refused(taken(out))
    for _ in range(100):
        out.was_told(SyncBatch(None, 0, 30.0), 0.0)
    out.batch.links = full(LINKS, 0).batch.links
    assert len(taken(out).links) == LINKS == outbox.LINKS
