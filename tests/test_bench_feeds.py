"""bench/feeds.py."""

from __future__ import annotations

from bench import feeds


def test_has_what_it_says() -> None:
    assert sum(map(feeds.articles_of, range(feeds.HOSTS))) == 36
    waits = {feeds.latency(1, host, path) for host in range(26) for path in ("/feed.xml", "/article/0")}
    assert len(waits) == 52 and min(waits) >= 0.3 and max(waits) <= 1.5 and feeds.latency(1, 0, "/log") == 0.0
    best = {part: feeds.at_best(1, part, 10) for part in feeds.PARTS}
    assert 1.5 < best["feeds"] < best["articles"] < best["whole"] < 10
