"""Items between whoever has them and a sink: where each one is, and what comes next. Pure: no I/O, no clock, no lock.

    accepted -> waiting  ---------------->  under way -> stored, or refused
                   \\-> diverted -> moving -> spooled /

Promised by ``Backlog``, in rows (an item has one or more)
- accepted + recovered == stored + refused + held + spooled + lost + dropped, after every call. ``held`` are those in
  memory, ``lost`` those that the disk did not give back, ``dropped`` has its causes.
- No more than ``max_items`` and ``max_bytes`` wait or are diverted, if callers ask ``room`` first, and what failed
  under way besides; with ``newest``, the oldest that wait are dropped instead.
- Items are taken in the order in which they came. ``in_order``: they leave so too, for nothing that waits is taken
  while anything older is spooled or on its way there; and what is under way is copied there before what waits moves.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

Step = Literal["wait", "replay", "idle", "linger", "write"]
"""What a writer is to do: wait for the spool to be filled; write what is in it; wait for items; wait for more of them;
write what waits."""


class Round(Generic[T]):
    """Items that are under way together."""

    def __init__(self, items: list[T], files: Sequence[str]) -> None:
        self.items, self.files = items, files  # ``files``: those of the spool that hold the items too


class Backlog(Generic[T]):
    """What waits for one sink. ``rows`` counts the rows of items, ``size`` the bytes of one; a round has at most
    ``round_items`` and ``round_bytes``, or one item more; a file of the spool ``file_items``, and as many bytes."""

    def __init__(
        self,
        max_items: int,
        max_bytes: float = math.inf,
        *,
        size: Callable[[T], int],
        rows: Callable[[Collection[T]], int] = len,
        round_items: int,
        round_bytes: float = math.inf,
        file_items: int = 1,
        in_order: bool = False,
        newest: bool = False,
    ) -> None:
        self.max_items, self.max_bytes, self.round_items = max_items, max_bytes, round_items
        self.in_order, self.newest = in_order, newest
        self._size, self._rows = size, rows
        self._round_bytes, self._file_items = round_bytes, file_items
        self.waiting, self.diverted = deque[T](), deque[T]()
        self.moving: list[T] = []  # on their way to the spool
        self.rounds: list[Round[T]] = []  # under way to the sink
        self.accepted = self.recovered = self.stored = self.refused = self.spooled = self.lost = 0
        self.dropped = Counter[str]()
        self._bytes = 0
        self._to_copy: Round[T] | None = None
        self._copying: Round[T] | None = None
        """Under way, and to be in the spool too, before ``diverted``; and on its way there."""

    # ------------------------------------------------------------------------------------------------------ in memory

    def room(self, bytes_elsewhere: int = 0, *, moves: bool = False) -> int:
        """How many more items may wait, if so many bytes are kept for others. What moves to the spool may come back;
        with ``moves`` it is taken for gone."""
        if self._bytes + bytes_elsewhere >= self.max_bytes:
            return 0
        left = self.max_items - len(self.waiting) - len(self.diverted)
        if not moves:
            left -= len(self.moving)
        return left if left > 0 else 0

    def accept(self, items: Sequence[T], *, divert: bool = False) -> None:
        """Take ``items``: for the sink, or for the spool."""
        self.accepted += self._rows(items)
        for item in items:
            self._bytes += self._size(item)
        (self.diverted if divert else self.waiting).extend(items)
        if self.newest and len(self.waiting) > self.max_items:
            gone, size = self._cut(self.waiting, len(self.waiting) - self.max_items, math.inf)
            self._bytes -= size
            self.dropped["oldest"] += self._rows(gone)

    def _cut(self, queue: deque[T], most: int, most_bytes: float) -> tuple[list[T], int]:
        items, total, size = list[T](), 0, self._size
        while queue and len(items) < most and total < most_bytes:
            items.append(queue.popleft())
            total += size(items[-1])
        return items, total

    # ------------------------------------------------------------------------------------------------------- the sink

    def next_step(self, ready: bool) -> Step:
        """What a writer does now. ``ready``: a round that is not full need not wait for more."""
        if self.in_order and self.is_spilling():
            return "wait"
        if self.in_order and self.spooled:
            return "replay"
        if not self.waiting:
            return "idle"
        return "write" if ready or len(self.waiting) >= self.round_items else "linger"

    def take(self) -> Round[T]:
        """The oldest that wait, which are under way now."""
        items, size = self._cut(self.waiting, self.round_items, self._round_bytes)
        self._bytes -= size
        return self._begin(items, ())

    def replay(self, items: list[T], files: Sequence[str]) -> Round[T]:
        """What is in these files of the spool, which is under way now, and stays there until it is stored."""
        return self._begin(items, files)

    def _begin(self, items: list[T], files: Sequence[str]) -> Round[T]:
        self.rounds.append(Round(items, files))
        return self.rounds[-1]

    def landed(self, round: Round[T], stored: int, refused: int) -> Sequence[str]:
        """Its rows are stored, but for those that are ``refused`` for their own sake. The files that are of no use."""
        self._leave(round)
        if round.files:
            self.spooled -= self._rows(round.items)
        self.stored += stored
        self.refused += refused
        return round.files

    def failed(self, round: Round[T]) -> None:
        """It is to be written again: what is not in the spool waits in its old place."""
        self._leave(round)
        if not round.files:
            (self.diverted or self.waiting).extendleft(reversed(round.items))
            self._bytes += sum(map(self._size, round.items))

    def _leave(self, round: Round[T]) -> None:
        self.rounds.remove(round)
        if self._to_copy is round:
            self._to_copy = None

    # ------------------------------------------------------------------------------------------------------ the spool

    def is_spilling(self) -> bool:
        """Whether anything is on its way to the spool."""
        return bool(self.diverted or self.moving or self._to_copy or self._copying)

    def divert(self) -> None:
        """All that waits goes to the spool."""
        self.diverted.extend(self.waiting)
        self.waiting.clear()

    def press(self) -> None:
        """``divert``, and a copy of the round that is under way before it, if they are to be in order."""
        if self.in_order and self.rounds and not self.rounds[0].files and self.rounds[0] is not self._copying:
            self._to_copy = self.rounds[0]
        self.divert()

    def undivert(self) -> None:
        """The spool takes no more: what it has not got waits for the sink again."""
        self._to_copy = None
        self.waiting.extendleft(reversed(self.diverted))
        self.diverted.clear()

    def next_file(self) -> list[T]:
        """What is to be the next file of the spool."""
        if self._to_copy is not None:
            self._copying, self._to_copy = self._to_copy, None
            return self._copying.items
        self.moving, _ = self._cut(self.diverted, self._file_items, self._round_bytes)
        return self.moving

    def filed(self, name: str | None) -> bool:
        """That file has this name now, or could not be written. Whether it is of use: the answer may be quicker."""
        copied, self._copying = self._copying, None
        if copied is not None and name is not None:
            if copied not in self.rounds:
                return False
            copied.files = (name,)
            self.spooled += self._rows(copied.items)
        elif name is not None:
            self.spooled += self._rows(self.moving)
            self._bytes -= sum(map(self._size, self.moving))
        elif copied is None:
            self.diverted.extendleft(reversed(self.moving))
        self.moving = []
        return True

    def recover(self, rows: int) -> None:
        """A previous life left so many in the spool."""
        self.recovered += rows
        self.spooled += rows

    def lose(self, rows: int) -> None:
        """The disk did not give back so many."""
        self.spooled -= rows
        self.lost += rows

    # ----------------------------------------------------------------------------------------------------- the counts

    def drop(self, cause: str) -> int:
        """At the end: what is in memory only is dropped. How many rows that are."""
        left = self.held()
        self.dropped[cause] += left
        self.waiting.clear()
        self.diverted.clear()
        self.rounds.clear()
        self._bytes = 0
        return left

    def held_waiting(self) -> int:
        """Rows that wait for the sink."""
        return self._rows(self.waiting)

    def held_spilling(self) -> int:
        """Rows on their way to the spool."""
        return self._rows(self.diverted) + self._rows(self.moving)

    def held_under_way(self) -> int:
        """Rows that are under way, and not in the spool."""
        return sum(self._rows(round.items) for round in self.rounds if not round.files)

    def held(self) -> int:
        """Rows in memory."""
        return self.held_waiting() + self.held_spilling() + self.held_under_way()

    def is_empty(self) -> bool:
        """Whether all has left, the spool too."""
        return not (self.waiting or self.rounds or self.is_spilling() or self.spooled)

    def imbalance(self) -> int:
        """Rows that are not accounted for: 0, or there is a fault in the program."""
        out = self.stored + self.refused + self.held() + self.spooled + self.lost + self.dropped.total()
        return self.accepted + self.recovered - out
