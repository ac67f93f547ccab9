"""runtime/backlog.py: each item is in one place, whatever the order of events; and rows."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

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


MOSTLY = st.sampled_from([True, True, True, False])


class BacklogMachine(RuleBasedStateMachine):
    """A backlog, the files of a disk, and what the sink was given."""

    backlog_type: ClassVar[type[Backlog[int]]] = Backlog
    in_order: ClassVar[bool] = False

    @initialize(items=st.integers(1, 3), files=st.integers(1, 3))
    def start(self, items: int, files: int) -> None:
        self.backlog = self.backlog_type(
            20, size=lambda _: 1, round_items=items, file_items=files, in_order=self.in_order
        )
        self.accepted = 0
        self.disk: dict[str, list[int]] = {}
        self.rounds: list[Round[int]] = []
        self.sunk: list[int] = []
        self.writing: list[int] | None = None
        self.serial = 0

    @rule(n=st.integers(1, 9), divert=st.booleans())
    def accept(self, n: int, divert: bool) -> None:
        n = min(n, self.backlog.room())
        divert = divert and not self.backlog.in_order
        self.backlog.accept(range(self.accepted, self.accepted + n), divert=divert)
        self.accepted += n

    @rule(from_disk=st.booleans())
    def go_on(self, from_disk: bool) -> None:
        """A writer of what waits; in order, one writer does what it is told."""
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

    @precondition(lambda self: self.rounds)
    @rule(which=st.integers(0, 9), stored=st.booleans(), refused=st.booleans())
    def answer(self, which: int, stored: bool, refused: bool) -> None:
        round = self.rounds.pop(which % len(self.rounds))
        if not stored:
            self.backlog.failed(round)
            return
        for name in self.backlog.landed(round, len(round.items) - refused, int(refused)):
            del self.disk[name]
        self.sunk += round.items

    @rule()
    def press(self) -> None:
        self.backlog.press()

    @precondition(lambda self: self.writing is None and self.backlog.is_spilling())
    @rule()
    def begin_file(self) -> None:
        self.writing = list(self.backlog.next_file())

    @precondition(lambda self: self.writing is not None)
    @rule(taken=MOSTLY, gives_up=st.booleans())
    def end_file(self, taken: bool, gives_up: bool) -> None:
        assert self.writing is not None
        name, items, self.writing = f"{self.serial:04d}", self.writing, None
        self.serial += 1
        if self.backlog.filed(name if taken else None) and taken and items:
            self.disk[name] = items
        if not taken and (gives_up or self.backlog.in_order):
            self.backlog.undivert()

    @invariant()
    def each_is_in_one_place(self) -> None:
        backlog = self.backlog
        assert backlog.imbalance() == 0 and backlog.held() >= 0 and backlog.spooled >= 0
        assert backlog.spooled == sum(map(len, self.disk.values()))
        under_way = [item for round in self.rounds if not round.files for item in round.items]
        memory = [*backlog.waiting, *backlog.diverted, *backlog.moving, *under_way]
        spooled = [item for items in self.disk.values() for item in items]
        assert sorted([*memory, *spooled, *self.sunk]) == list(range(self.accepted))
        if backlog.in_order:
            assert self.sunk == list(range(len(self.sunk)))
        assert len(backlog.waiting) + len(backlog.diverted) + len(backlog.moving) <= 20 + backlog.round_items


def check_backlog(backlog_type: type[Backlog[int]], in_order: bool, effort: settings) -> None:
    """Each item is in one place; in order, they leave in order; the counts balance."""
    kind = type("Machine", (BacklogMachine,), {"backlog_type": backlog_type, "in_order": in_order})
    run_machine(kind, settings=effort)


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
