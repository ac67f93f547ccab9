"""Which answers are loaded again before they get stale: a decision, which ``api.service`` obeys now and then."""

from __future__ import annotations

import heapq
import random

from api.config import Key
from coordination import Rng


class Renewals:
    """Which keys are to be loaded before they expire: those that somebody asked for since their last load.

    A key is due when most of its ``ttl`` is over, at a point drawn
    for each load, so that keys loaded together are not renewed together. If loading fails, the wait doubles each
    time, up to ``CAP`` seconds (or ``ttl``, if that is longer). There are never more renewals than requests; at most
    ``maxsize`` keys are known. All times are of the caller's clock.
    """

    EARLY = 0.7, 0.9
    CAP = 60.0

    def __init__(self, ttl: float, maxsize: int, rng: Rng = random.random) -> None:
        self.ttl, self.maxsize, self._rng = ttl, maxsize, rng
        self._when: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []  # what is in ``_when``, and what was there: to be skipped
        self._asked: set[Key] = set()
        self._failed: dict[Key, int] = {}

    def asked(self, key: Key) -> None:
        """Somebody asked for ``key``."""
        if key in self._when:
            self._asked.add(key)

    def loaded(self, key: Key, now: float) -> None:
        """``key`` was loaded at ``now``."""
        self._failed.pop(key, None)
        low, high = self.EARLY
        self._plan(key, now + self.ttl * (low + (high - low) * self._rng()))

    def failed(self, key: Key, now: float) -> None:
        """A load of ``key`` failed at ``now``."""
        times = self._failed.get(key, 0) + 1
        wait = min(max(self.CAP, self.ttl), self.ttl * 2.0 ** min(times, 30))
        if self._plan(key, now + wait * (0.5 + self._rng() / 2)):
            self._failed[key] = times

    def due(self, now: float) -> list[Key]:
        """The keys to load now. Each is known again when ``loaded`` or ``failed`` is called."""
        keys = []
        while self._heap and self._heap[0][0] <= now:
            when, key = heapq.heappop(self._heap)
            if self._when.get(key) != when:
                continue
            del self._when[key]
            if key in self._asked:
                self._asked.discard(key)
                keys.append(key)
            else:
                self._failed.pop(key, None)
        return keys

    def forget(self) -> None:
        """Forget all keys."""
        for known in (self._when, self._heap, self._asked, self._failed):
            known.clear()

    def __len__(self) -> int:
        return len(self._when)

    def _plan(self, key: Key, when: float) -> bool:
        self._asked.discard(key)
        if key not in self._when and len(self._when) >= self.maxsize:
            return False
        self._when[key] = when
        heapq.heappush(self._heap, (when, key))
        if len(self._heap) > 2 * len(self._when) + 64:
            self._heap = [(when, key) for key, when in self._when.items()]
            heapq.heapify(self._heap)
        return True
