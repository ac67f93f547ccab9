"""runtime/backlog.py: each item is in one place, whatever the order of events; and rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.backlog import Backlog, Round
from tests.helpers.base import HUNT, SETTINGS


def make_backlog(max_items: int = 100, **options: object) -> Backlog[int]:
    """Items are numbers, each as many bytes as it is large."""
    return Backlog(max_items, **{"size": lambda item: item, "round_items": 3, "file_items": 2, **options})  # type: ignore[arg-type]


def test_room_is_of_items_and_bytes_and_what_moves_keeps_its_place() -> None:
    backlog = make_backlog(5, max_bytes=100)
    backlog.accept([10, 20, 30])
    assert (backlog.room(), backlog.room(40), backlog.held_waiting()) == (2, 0, 3)
    backlog.press()
    assert backlog.next_file() == [10, 20] and (backlog.room(), backlog.room(moves=True)) == (2, 4)
    backlog.filed(None)
    assert backlog.room() == 2 and list(backlog.diverted) == [10, 20, 30] and backlog.imbalance() == 0
    assert backlog.next_file() == [10, 20] and backlog.filed("a")
    assert (backlog.room(), backlog.spooled, backlog.held_spilling()) == (4, 2, 1)
    backlog.accept([90])
    assert (backlog.room(), backlog.held()) == (0, 2)


def test_a_round_and_a_file_end_at_their_bytes() -> None:
    backlog = make_backlog(round_bytes=50)
    backlog.accept([10, 45, 10, 60, 1, 1, 1, 1])
    assert [backlog.take().items for _ in range(4)] == [[10, 45], [10, 60], [1, 1, 1], [1]]
    backlog = make_backlog(round_bytes=50, file_items=10)
    backlog.accept([10, 45, 10, 60, 1], divert=True)
    files = []
    while file := backlog.next_file():
        files.append(file)
        assert backlog.filed("name")
    assert files == [[10, 45], [10, 60], [1]] and backlog.spooled == 5


def test_the_newest_stay_where_the_oldest_give_way() -> None:
    backlog = make_backlog(3, newest=True)
    backlog.accept([1, 2])
    backlog.accept([3, 4, 5])
    assert (list(backlog.waiting), backlog.dropped, backlog.imbalance()) == ([3, 4, 5], {"oldest": 2}, 0)


@pytest.mark.parametrize("quicker", [False, True])
def test_what_is_under_way_is_copied_before_what_waits_moves(quicker: bool) -> None:
    backlog = make_backlog(in_order=True)
    backlog.accept([1, 2, 3, 4])
    round = backlog.take()
    backlog.press()
    assert backlog.next_step(True) == "wait" and backlog.next_file() == [1, 2, 3]
    if quicker:
        assert backlog.landed(round, 3, 0) == ()
        assert backlog.next_step(True) == "wait"  # its file must not be read
        assert not backlog.filed("a")
    else:
        assert backlog.filed("a") and (backlog.spooled, backlog.held_under_way()) == (3, 0)
        assert backlog.landed(round, 2, 1) == ("a",)
    assert backlog.next_file() == [4] and backlog.filed("b") and backlog.next_step(True) == "replay"
    assert (backlog.stored + backlog.refused, backlog.spooled, backlog.imbalance()) == (3, 1, 0)


def test_drops_what_is_in_memory_only() -> None:
    backlog = make_backlog(in_order=True)
    backlog.recover(7)
    backlog.accept([1, 2, 3, 4, 5])
    backlog.failed(backlog.take())
    assert (list(backlog.waiting), backlog.drop("stopped"), backlog.spooled) == ([1, 2, 3, 4, 5], 5, 7)
    backlog.lose(4)
    assert (backlog.lost, backlog.dropped["stopped"], backlog.imbalance(), backlog.is_empty()) == (4, 5, 0, False)


class Walk:
    """A backlog, the files of a disk, and what the sink was given. A step takes a number below 256."""

    def __init__(self, backlog: Backlog[int]) -> None:
        self.backlog = backlog
        self.accepted = 0
        self.disk: dict[str, list[int]] = {}
        self.rounds: list[Round[int]] = []
        self.most_rounds = 1  # under way at once: all may fail, and wait again
        self.sunk: list[int] = []
        self.writing: list[int] | None = None
        self.serial = 0

    def steps(self) -> list[Callable[[int], None]]:
        """Those that are possible now."""
        found: list[Callable[[int], None]] = [self.accept, self.go_on, self.press]
        if self.rounds:
            found.append(self.answer)
        if self.writing is not None:
            found.append(self.end_file)
        elif self.backlog.is_spilling():
            found.append(self.begin_file)
        return found

    def accept(self, number: int) -> None:
        n = min(1 + number // 2 % 9, self.backlog.room())
        divert = number % 2 > 0 and not self.backlog.in_order
        self.backlog.accept(range(self.accepted, self.accepted + n), divert=divert)
        self.accepted += n

    def go_on(self, number: int) -> None:
        """A writer of what waits; in order, one writer does what it is told."""
        from_disk = number % 2 > 0
        if self.backlog.in_order:
            step = self.backlog.next_step(True)
            if self.rounds or step not in ("write", "replay"):
                return
            from_disk = step == "replay"
        replayed = {name for round in self.rounds for name in round.files}
        if not from_disk:
            if self.backlog.waiting:
                self.rounds.append(self.backlog.take())
        elif self.disk and not replayed:
            names = list(self.disk)[:2]
            self.rounds.append(self.backlog.replay([item for name in names for item in self.disk[name]], names))

    def answer(self, number: int) -> None:
        stored, refused, which = number % 2 > 0, number // 2 % 2, number // 4
        round = self.rounds.pop(which % len(self.rounds))
        if not stored:
            self.backlog.failed(round)
            return
        for name in self.backlog.landed(round, len(round.items) - refused, refused):
            del self.disk[name]
        self.sunk += round.items

    def press(self, number: int) -> None:
        self.backlog.press()

    def begin_file(self, number: int) -> None:
        self.writing = list(self.backlog.next_file())

    def end_file(self, number: int) -> None:
        """Mostly, the disk takes it."""
        taken, gives_up = number % 4 > 0, number // 4 % 2 > 0
        assert self.writing is not None
        name, items, self.writing = f"{self.serial:04d}", self.writing, None
        self.serial += 1
        if self.backlog.filed(name if taken else None) and taken and items:
            self.disk[name] = items
        if not taken and (gives_up or self.backlog.in_order):
            self.backlog.undivert()

    def look(self) -> None:
        """Each is in one place."""
        backlog = self.backlog
        assert backlog.imbalance() == 0 and backlog.held() >= 0 and backlog.spooled >= 0
        assert backlog.spooled == sum(map(len, self.disk.values()))
        self.most_rounds = max(self.most_rounds, len(self.rounds))
        under_way = [item for round in self.rounds if not round.files for item in round.items]
        memory = [*backlog.waiting, *backlog.diverted, *backlog.moving, *under_way]
        spooled = [item for items in self.disk.values() for item in items]
        assert sorted([*memory, *spooled, *self.sunk]) == list(range(self.accepted))
        if backlog.in_order:
            assert self.sunk == list(range(len(self.sunk)))
        most = 20 + self.most_rounds * backlog.round_items
        assert len(backlog.waiting) + len(backlog.diverted) + len(backlog.moving) <= most


def check_backlog(backlog_type: type[Backlog[int]], in_order: bool, effort: settings) -> None:
    """Each item is in one place; in order, they leave in order; the counts balance."""
    few, size = st.integers(1, 3), 2 * effort.stateful_step_count  # two bytes a step: which one, and its number

    @settings(effort)
    @given(few, few, st.binary(min_size=size, max_size=size))
    def walks(items: int, files: int, steps: bytes) -> None:
        backlog = backlog_type(20, size=lambda _: 1, round_items=items, file_items=files, in_order=in_order)
        walk = Walk(backlog)
        for which, number in zip(steps[::2], steps[1::2], strict=True):
            possible = walk.steps()
            possible[which % len(possible)](number)
            walk.look()

    walks()


@pytest.mark.parametrize("in_order", [False, True])
def test_keeps_its_promises(in_order: bool) -> None:
    check_backlog(Backlog, in_order, settings(SETTINGS, max_examples=100, stateful_step_count=40))


class Overtakes(Backlog[int]):
    """What waits does not wait for what is spooled."""

    def next_step(self, ready: bool) -> str:  # type: ignore[override]
        step = super().next_step(ready)
        return "write" if step == "replay" and self.waiting else step


class MovesFirst(Backlog[int]):
    """What is under way is not copied before what waits moves."""

    def press(self) -> None:
        self.divert()


class PutsBackLast(Backlog[int]):
    """What failed waits behind what came after it."""

    def failed(self, round: Round[int]) -> None:
        before = len(self.waiting)
        super().failed(round)
        self.waiting.rotate(-(len(self.waiting) - before))


class KeepsTheCopy(Backlog[int]):
    """A copy stays though the answer was quicker."""

    def filed(self, name: str | None) -> bool:
        super().filed(name)
        return True


@pytest.mark.parametrize("planted", [Overtakes, MovesFirst, PutsBackLast, KeepsTheCopy])
def test_the_checker_finds_planted_bugs(planted: type[Backlog[int]]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_backlog(planted, True, settings(HUNT, stateful_step_count=50))
