"""Batch: rows and a model."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import primitives as pr
from tests.helpers.base import SETTINGS, World
from tests.helpers.mechanisms import STEPS, in_threads


def test_row_by_row() -> None:
    batch, almost = pr.Batch[str](3, 10.0, clock=World(500.0).clock), math.nextafter(110.0, 0.0)
    assert (batch.due_in(0.0), batch.take(999.0), batch.drain(), batch.stats(7.0)) == (math.inf, [], [], (0, 0.0))
    assert [batch.add("a", 100.0), batch.add("b", 104.0)] == [None, None]  # the age is that of the oldest
    assert (batch.due_in(104.0), batch.stats(104.0), batch.take(almost)) == (6.0, (2, 4.0), [])
    assert (batch.due_in(110.0), batch.due_in(200.0), batch.take(110.0)) == (0.0, 0.0, ["a", "b"])  # to the tick
    assert batch.take(999.0) == []
    assert [batch.add("c", 111.0), batch.add("d", 111.0), batch.add("e", 999.0)] == [None, None, ["c", "d", "e"]]
    assert (batch.due_in(999.0), batch.add("f"), batch.due_in(), batch.take()) == (math.inf, None, 10.0, [])
    assert (batch.stats(), repr(batch), len(batch)) == ((1, 0.0), "<Batch items=1 age=0>", 1)
    assert (batch.drain(), len(batch)) == (["f"], 0)


def test_refuses_its_sizes_and_has_a_clock() -> None:
    for wrong in ((0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, math.nan), (1, 1.0, 0), (1, 1.0, math.nan)):
        with pytest.raises(ValueError, match=r"max_(items|age) must be"):
            pr.Batch(*wrong)
    with pytest.raises(TypeError):
        pr.Batch(1.5, 1.0)  # type: ignore[arg-type]
    batch = pr.Batch[int](2, 3600.0)
    assert (batch.add(7), batch.take(), 0.0 < batch.due_in() <= 3600.0, batch.add(8)) == (None, [], True, [7, 8])


def test_bytes_row_by_row() -> None:
    batch = pr.Batch[str](3, 10.0, 100, clock=World(0.0).clock)
    assert [batch.add("a", size=60), batch.add("b", size=40)] == [None, ["a", "b"]]  # just full
    assert [batch.add("c", size=60), batch.add("d", 1.0, size=50)] == [None, ["c"]]  # it would be too much
    assert (batch.due_in(1.0), batch.take(10.9), batch.drain()) == (10.0, [], ["d"])
    assert [batch.add("e", size=1), batch.add("f", size=500)] == [None, ["e"]]
    assert (batch.due_in(), batch.take(), batch.due_in()) == (0.0, ["f"], math.inf)  # too large for any: alone, at once
    assert batch.add("g", size=500) == ["g"]
    assert [batch.add("h"), batch.add("i"), batch.add("j", size=99)] == [None, None, ["h", "i", "j"]]


class Machine(RuleBasedStateMachine):
    """A batch, and a list of what is in it since when."""

    batch_type: ClassVar[type[pr.Batch[int]]] = pr.Batch

    @initialize(
        max_items=st.integers(1, 5),
        max_age=st.sampled_from([1 / 64, 1.0, 5.0]),
        max_bytes=st.sampled_from([math.inf, 10]),
    )
    def start(self, max_items: int, max_age: float, max_bytes: float) -> None:
        self.world, self.flushed = World(), 0
        self.batch = self.batch_type(max_items, max_age, max_bytes, clock=self.world.clock)
        self.inside: list[tuple[int, float]] = []
        self.size = 0

    def flush(self, items: list[int] | None, expected: bool) -> None:
        assert (items or []) == ([item for item, _ in self.inside] if expected else [])
        if expected:
            self.flushed += len(self.inside)
            self.inside, self.size = [], 0

    @rule(seconds=STEPS)
    def step(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(size=st.sampled_from([0, 0, 3, 5, 10, 11]))
    def add(self, size: int) -> None:
        item, limit = (self.flushed + len(self.inside), self.world.now), self.batch.max_bytes
        full = self.batch.add(item[0], size=size)
        if self.inside and self.size + size > limit:
            self.flush(full, True)
            self.inside, self.size = [item], size
        else:
            self.inside.append(item)
            self.size += size
            self.flush(full, len(self.inside) == self.batch.max_items or self.size >= limit)

    def is_due(self) -> bool:
        old = any(self.world.now - then >= self.batch.max_age for _, then in self.inside)
        return old or self.size >= self.batch.max_bytes

    @rule()
    def take(self) -> None:
        self.flush(self.batch.take(), self.is_due())

    @rule()
    def take_when_due(self) -> None:
        self.world.now += self.batch.due_in() if self.inside else 0.0
        self.flush(self.batch.take(), True)

    @rule()
    def drain(self) -> None:
        self.flush(self.batch.drain(), True)

    @invariant()
    def age(self) -> None:
        age = max((self.world.now - then for _, then in self.inside), default=0.0)
        assert self.batch.stats() == (len(self.batch), age) == (len(self.inside), age)
        left = 0.0 if self.is_due() else max(0.0, self.batch.max_age - age)
        assert self.batch.due_in() == (left if self.inside else math.inf)


def check_machine(batch_type: type[pr.Batch[int]], effort: settings = SETTINGS) -> None:
    """Nothing lost, nothing doubled, in order, when it is full or due."""
    machine = type("Machine", (Machine,), {"batch_type": batch_type})
    run_state_machine_as_test(machine, settings=effort)


def test_keeps_its_promises() -> None:
    check_machine(pr.Batch)


def test_of_many_threads_has_each_item_in_one_batch() -> None:
    batch, full = pr.Batch[tuple[int, int]](7, 3600.0), list[list[tuple[int, int]]]()

    def add(thread: int) -> None:
        full.extend(items for number in range(300) if (items := batch.add((thread, number))) is not None)

    in_threads([functools.partial(add, thread) for thread in range(8)])
    assert [len(items) for items in full] == [7] * (2400 // 7)
    assert Counter([*itertools.chain(*full), *batch.drain()]) == Counter(itertools.product(range(8), range(300)))
    for items in full:  # what a thread added earlier stands earlier
        assert sorted(items) == sorted(items, key=lambda item: item[0])
