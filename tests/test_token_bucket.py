"""TokenBucket: rows, a model, those who wait in threads and tasks, changes of the rate."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import coordination as co
import primitives as pr
from tests.helpers.base import HANG_LIMIT, SETTINGS, World, run_task, wait_until
from tests.helpers.mechanisms import (
    STEPS,
    PrimThread,
    error_of,
    error_of_task,
    gated_block,
    in_threads,
    prim_stranded,
    simulated,
)

# rate, burst, and what happens: "time event = answer; ..."; "wait" and "within" name who waits (the answer is when it
# is due, by the clock; None while that depends on those ahead), "leave" gives the place back, "go" goes
ROWS: dict[str, tuple[float, float, str]] = {
    "burst, then one by one": (
        10,
        3,
        "0 reserve 1 = 0; 0 reserve 1 = 0; 0 reserve 1 = 0; 0 reserve 1 = 0.1; 0 reserve 1 = 0.2; 0 reserve 1 = 0.3",
    ),
    "refill": (
        1,
        2,
        "0 reserve 2 = 0; 0 tokens = 0; 0.5 tokens = 0.5; 0.5 reserve 1 = 0.5; 0.5 tokens = -0.5; 1.5 reserve 1 = 0.5;"
        "2 reserve 1 = 1",
    ),
    "never fuller than burst": (1, 2, "0 reserve 2 = 0; 1e6 tokens = 2; 1e6 reserve 2 = 0; 1e6 reserve 1 = 1"),
    "a burst of one": (2, 1, "0 reserve 1 = 0; 0 reserve 1 = 0.5; 0.75 reserve 1 = 0.25; 5 reserve 1 = 0"),
    "unequal sizes keep their order": (
        1,
        5,
        "0 reserve 5 = 0; 0 reserve 5 = 5; 0 reserve 1 = 6; 6 reserve 0.5 = 0.5",
    ),
    "parts of a token": (4, 1.5, "0 reserve 1.5 = 0; 0 reserve 0.5 = 0.125; 0.125 tokens = 0"),
    "wait_for books nothing": (
        1,
        2,
        "0 wait_for 1 = 0; 0 wait_for 2 = 0; 0 wait_for 12 = 10; 0 reserve 2 = 0; 0 wait_for 1 = 1; 0 wait_for 1 = 1;"
        "0 wait_for 2 = 2; 0.5 wait_for 1 = 0.5; 9 wait_for 1 = 0",
    ),
    "try_acquire": (
        1,
        2,
        "0 try_acquire 2 = True; 0 try_acquire 1 = False; 0 try_acquire 2 = False; 0.5 try_acquire 1 = False;"
        "1 try_acquire 2 = False; 1 try_acquire 1 = True; 1 reserve 1 = 1; 2 try_acquire 1 = False",
    ),
    "who leaves gives back": (
        1,
        1,
        "0 reserve 1 = 0; 0 wait b 1 = 1; 0 leave b = None; 0 wait c 1 = 1; 0 wait d 1 = None;"
        "0.5 leave d = None; 0.5 leave c = None; 0.5 reserve 1 = 0.5",
    ),
    "those behind move up": (
        1,
        1,
        "0 reserve 1 = 0; 0 wait b 1 = 1; 0 wait c 1 = None; 0 wait d 1 = None; 0 leave b = None; 0 due c = 1;"
        "0 due d = None; 0.5 leave c = None; 0.5 due d = 1; 0.5 wait_for 1 = 1.5; 1 go d = None; 1 reserve 1 = 1",
    ),
    "large ones too": (
        1,
        4,
        "0 reserve 4 = 0; 0 wait a 4 = 4; 0 wait b 1 = None; 0 wait c 4 = None; 2 leave a = None; 2 due b = 1;"
        "2 due c = 5; 2 try_acquire 1 = False; 5 go c = None; 5 tokens = 0",
    ),
    "nobody is due later than it was told": (
        1,
        1,
        "0 reserve 1 = 0; 0 wait a 1 = 1; 0 wait b 1 = None; 0 wait c 1 = None; 0 reserve 1 = 4;"
        "0 due b = 2; 0 due c = 3; 0 leave b = None; 0 due c = 3;"
        "0 pause 50 = None; 0 due c = 3; 1 go a = None; 3 go c = None",
    ),
    "within a time limit, or at once not": (
        1,
        1,
        "0 reserve 1 = 0; 0 within a 1 1 = 1; 0 within b 1 1 = False; 0 within c 1 2 = None; 0 tokens = -2;"
        "0 leave a = None; 0 due c = 1; 0 within d 1 2 = None; 0 within e 1 2 = False; 0 pause 9 = None;"
        "0 within f 1 8 = False; 0 within g 1 9 = 9",
    ),
    "pause": (
        1,
        3,
        "0 reserve 1 = 0; 0 pause 10 = None; 0 wait_for 1 = 10; 0 try_acquire 1 = False; 2 reserve 1 = 8;"
        "2 reserve 1 = 9; 2 reserve 3 = 12",
    ),
    "after a pause one token is there": (
        1,
        3,
        "0 pause 10 = None; 10 tokens = 1; 10 try_acquire 1 = True; 10 try_acquire 1 = False; 11 reserve 1 = 0;"
        "14 tokens = 3",
    ),
    "a shorter pause does not end a longer one": (
        1,
        1,
        "0 pause 10 = None; 0 pause 5 = None; 0 reserve 1 = 10; 0 pause 3 = None; 0 reserve 1 = 11",
    ),
    "a pause keeps the debt": (
        1,
        1,
        "0 reserve 1 = 0; 0 reserve 1 = 1; 0 reserve 1 = 2; 0 reserve 1 = 3; 0 pause 2 = None; 0 reserve 1 = 4",
    ),
    "a pause outlives the cancellation of what was booked before": (
        1,
        1,
        "0 reserve 1 = 0; 0 wait b 1 = 1; 0 pause 1.5 = None; 0 leave b = None; 1 reserve 1 = 0.5",
    ),
    "a pause holds up parts of a token too": (
        1,
        2,
        "0 pause 10 = None; 9.5 try_acquire 0.5 = False; 9.5 wait_for 0.5 = 0.5; 9.5 reserve 0.5 = 0.5;"
        "9.5 reserve 0.5 = 0.5; 9.5 reserve 0.5 = 1",
    ),
    "a clock that steps back": (
        1,
        2,
        "100 reserve 2 = 0; 50 reserve 1 = 51; 50 reserve 1 = 52; 101.5 reserve 1 = 1.5",
    ),
}


def told(place: Any) -> float | None:
    return place.due if place.is_told() else None


@pytest.mark.parametrize("explicit", [True, False], ids=["now=", "clock"])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, explicit: bool) -> None:
    rate, burst, rows = ROWS[name]
    world = World()
    waits = any(verb in rows for verb in ("wait ", "within "))
    given = explicit and not waits
    bucket = pr.TokenBucket(rate, burst, clock=(lambda: pytest.fail("the time was given")) if given else world.clock)
    places: dict[str, Any] = {}
    for row in rows.split(";"):
        event, expected = row.split(" = ")
        time_, verb, *words = event.split()
        world.now = float(time_)
        at: dict[str, Any] = {"now": world.now} if explicit else {}
        answer: Any = None
        if verb in ("wait", "within"):
            limit = float(words[2]) if verb == "within" else None
            place = places[words[0]] = bucket._enter(float(words[1]), limit, None)
            answer = place if isinstance(place, bool) else told(place)
        elif verb == "due":
            answer = told(places[words[0]])
        elif verb in ("leave", "go"):
            bucket._leave(places[words[0]], verb == "leave")
        elif verb == "pause":
            bucket.pause(float(words[0]))
        elif verb == "tokens":
            answer = bucket.stats(**at).tokens
        else:
            answer = getattr(bucket, verb)(float(words[0]), **at)
        if isinstance(answer, float):
            assert answer == pytest.approx(float(expected), abs=1e-9), row
        else:
            assert str(answer) == expected, row


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan"), float("-inf")])
def test_refuses_rates(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be a positive number of tokens per second"):
        pr.TokenBucket(rate)


@pytest.mark.parametrize("burst", [0, 0.99, -1, float("inf"), float("nan")])
def test_refuses_bursts(burst: float) -> None:
    with pytest.raises(ValueError, match="burst must be a number of tokens >= 1"):
        pr.TokenBucket(1.0, burst)


@pytest.mark.parametrize("n", [0, -1, 3.001, float("inf"), float("nan")])
def test_refuses_sizes_and_changes_nothing(n: float) -> None:
    bucket = pr.TokenBucket(1.0, 3.0, clock=lambda: 0.0)
    for verb in (bucket.reserve, bucket.try_acquire, bucket.acquire):
        with pytest.raises(ValueError, match=r"can grant between 0 and 3.0 tokens at once"):
            verb(n)
    with pytest.raises(ValueError):
        run_task(bucket.acquire_async(n))
    assert bucket.stats().tokens == 3.0


def test_says_what_it_does() -> None:
    bucket = pr.TokenBucket(2.5, 10, clock=lambda: 0.0)
    bucket.reserve(4)
    assert bucket.stats() == pr.TokenBucketStats(rate=2.5, burst=10, tokens=6.0)
    assert repr(bucket) == "<TokenBucket rate=2.5 burst=10 tokens=6>"
    with pytest.raises(AttributeError):
        bucket.stats().tokens = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        bucket.typo = 1  # type: ignore[attr-defined]


def test_reads_the_monotonic_clock_by_default() -> None:
    bucket = pr.TokenBucket(1e-4, 2.0)
    assert (bucket.reserve(2.0), bucket.try_acquire()) == (0.0, False)
    assert 0.0 < bucket.wait_for() <= 1e4 + 1e-6


class IntrudingLock:
    """Lets somebody else have the object as soon as its lock is first released."""

    def __init__(self, intruder: Callable[[], Any]) -> None:
        self.intruder: Callable[[], Any] | None = intruder

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        intruder, self.intruder = self.intruder, None
        if intruder is not None:
            intruder()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def test_refused_try_acquire_delays_nobody() -> None:
    """One that books first and cancels afterwards lets a thread in between pay for what was never granted."""
    waits: list[float] = []
    bucket = pr.TokenBucket(1.0, 1.0, clock=lambda: 0.0)
    bucket.reserve()
    bucket._lock = IntrudingLock(lambda: waits.append(bucket.reserve()))  # type: ignore[assignment]
    assert bucket.try_acquire() is False
    assert waits == [1.0]
    assert bucket.stats().tokens == -1.0


# --------------------------------------------------------------------------------------- token bucket: against a model

RATES = st.sampled_from([0.1, 1 / 3, 0.5, 1.0, 2.0, 7.0, 10.0, 100.0])


BURSTS = st.sampled_from([1.0, 1.5, 2.0, 3.0, 10.0])


PARTS = st.one_of(st.sampled_from([1.0, 1.0, 0.5, 0.1]), st.integers(1, 64).map(lambda k: k / 64))


class Ledger:
    """The definition itself, slow and exact: every booking kept, every window looked at.

    A grant of n is due at the first moment when, for each earlier grant, what was granted from that one on is at
    most burst + rate * (time since it); and not in a pause, at whose end all but one token are missing.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = Fraction(rate), Fraction(burst)
        self.entries: list[tuple[int, Fraction, Fraction]] = []  # number (0: a pause), due, tokens
        self.paused_until = Fraction(-(10**9))
        self.waiting: set[int] = set()
        """Who waits, and may move up."""

    def due(self, n: float, now: float) -> Fraction:
        tokens = Fraction(n)
        due = max(Fraction(now), self.paused_until, Fraction(now) + (tokens - self.burst) / self.rate)
        for number, moment, taken in reversed(self.entries):
            if number:
                tokens += taken
                due = max(due, moment + (tokens - self.burst) / self.rate)
            else:
                due = max(due, moment + (tokens - 1) / self.rate)
        return due

    def book(self, number: int, n: float, now: float) -> Fraction:
        due = self.due(n, now)
        self.entries.append((number, due, Fraction(n)))
        return due - Fraction(now)

    def pause(self, until: float) -> None:
        self.waiting.clear()
        self.paused_until = max(self.paused_until, Fraction(until))
        self.entries.append((0, Fraction(until), Fraction(0)))

    def leave(self, number: int, now: float) -> None:
        """Those behind it move up, unless something fixed has come since; then only the last gives anything back."""
        place = next(i for i, entry in enumerate(self.entries) if entry[0] == number)
        behind = self.entries[place + 1 :]
        if number in self.waiting:
            del self.entries[place:]
            for other, _, tokens in behind:
                self.entries.append((other, self.due(float(tokens), now), tokens))
        elif not any(other for other, _, _ in behind):
            del self.entries[place]

    def when(self, number: int) -> Fraction:
        return next(due for other, due, _ in self.entries if other == number)


def close(answer: float, exact: Fraction) -> bool:
    return abs(Fraction(answer) - exact) <= Fraction(1, 10**6)


class Machine(RuleBasedStateMachine):
    """A bucket and the ledger, side by side. Whoever waits goes when it is due, as the shells do."""

    bucket_type: ClassVar[type[pr.TokenBucket]] = pr.TokenBucket

    @initialize(rate=RATES, burst=BURSTS)
    def start(self, rate: float, burst: float) -> None:
        self.now = 1000.0
        self.bucket = self.bucket_type(rate, burst, clock=lambda: self.now)
        self.ledger = Ledger(rate, burst)
        self.places: dict[int, Any] = {}
        self.numbers = itertools.count(1)

    @rule(seconds=STEPS)
    def step(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [place.due for place in self.places.values() if place.is_told() and place.due <= end]:
            self.now = max(self.now, min(due))
            self.go()
        self.now = end
        self.go()

    def go(self) -> None:
        while gone := [number for number, place in self.places.items() if place.is_told() and place.due <= self.now]:
            assert gone[0] == min(self.places), "first come, first served"
            assert close(max(self.places[gone[0]].due, self.now), max(self.ledger.when(gone[0]), Fraction(self.now)))
            self.ledger.waiting.discard(gone[0])
            self.bucket._leave(self.places.pop(gone[0]), False)

    @rule(part=PARTS)
    def book(self, part: float) -> None:
        n = part * self.bucket.burst
        self.ledger.waiting.clear()
        assert close(self.bucket.reserve(n), self.ledger.book(next(self.numbers), n, self.now))

    @rule()
    def book_one(self) -> None:
        self.book(1.0 / self.bucket.burst)

    @rule(part=PARTS, within=st.sampled_from([None, None, 0.0, 1.0, 5.0]), times=st.integers(1, 3))
    def wait(self, part: float, within: float | None, times: int) -> None:
        for _ in range(times):
            n, number = part * self.bucket.burst, next(self.numbers)
            wait = self.ledger.due(n, self.now) - Fraction(self.now)
            assume(within is None or abs(wait - Fraction(within)) > Fraction(1, 10**6))
            place = self.bucket._enter(n, within, None)
            if place is False:
                assert within is not None and wait > within
                continue
            assert within is None or wait <= within
            self.ledger.book(number, n, self.now)
            if place is True:
                assert close(0.0, wait)
            else:
                self.places[number] = place
                self.ledger.waiting.add(number)

    @precondition(lambda self: self.places)
    @rule(back=st.integers(0, 4), going=st.booleans())
    def leave(self, back: int, going: bool) -> None:
        """Somebody gives up; in the same turn in which it comes to its turn, if that is how it happens."""
        numbers = sorted(self.places, reverse=True)
        number = numbers[min(back, len(numbers) - 1)]
        assume(self.ledger.when(number) > self.now)
        self.ledger.leave(number, self.now)
        self.ledger.waiting.discard(number)
        self.bucket._leave(self.places.pop(number), True)
        self.ledger.waiting = {other for other in self.ledger.waiting if self.ledger.when(other) > self.now}
        if going:
            self.go()

    @invariant()
    def times(self) -> None:
        """The first knows its time, and so does whoever has something fixed behind it."""
        for number, place in self.places.items():
            if number not in self.ledger.waiting or number == min(self.ledger.waiting):
                assert place.is_told() and close(max(place.due, self.now), self.ledger.when(number))
            else:
                assert not place.is_told()

    @rule(seconds=STEPS)
    def pause(self, seconds: float) -> None:
        self.bucket.pause(self.now + seconds)
        self.ledger.pause(self.now + seconds)

    @rule(part=PARTS)
    def try_acquire(self, part: float) -> None:
        n = part * self.bucket.burst
        wait = self.ledger.due(n, self.now) - Fraction(self.now)
        if self.bucket.try_acquire(n):
            assert close(0.0, wait)
            self.ledger.book(next(self.numbers), n, self.now)
        else:
            assert wait > 0

    @rule(times=st.sampled_from([0.25, 1.0, 1.5, 40.0]))
    def wait_for(self, times: float) -> None:
        n = times * self.bucket.burst
        assert close(self.bucket.wait_for(n), self.ledger.due(n, self.now) - Fraction(self.now))

    @invariant()
    def nothing_before_the_end_of_a_pause(self) -> None:
        wait = self.bucket.wait_for(0.25)
        assert self.now + wait >= float(self.ledger.paused_until) - 1e-6

    @invariant()
    def tokens(self) -> None:
        exact = self.ledger.burst - max(Fraction(0), self.ledger_full_at() - Fraction(self.now)) * self.ledger.rate
        assert abs(Fraction(self.bucket.stats().tokens) - exact) <= Fraction(1, 10**6) * (1 + self.ledger.rate)

    def ledger_full_at(self) -> Fraction:
        """When a whole burst could be had, if nobody else asked."""
        return self.ledger.due(self.bucket.burst, -(10.0**8))


def check_bucket_machine(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    machine = type("Machine", (Machine,), {"bucket_type": bucket_type})
    run_state_machine_as_test(machine, settings=effort)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), STEPS),
        st.tuples(st.just("book"), PARTS),
        st.tuples(st.just("book"), PARTS),
        st.tuples(st.just("try"), PARTS),
        st.tuples(st.just("wait"), PARTS),
        st.tuples(st.just("wait"), PARTS),
        st.tuples(st.just("leave"), st.integers(0, 3).map(float)),
        st.tuples(st.just("pause"), STEPS),
        st.tuples(st.just("back"), STEPS),
    ),
    max_size=40,
)


def prim_grants(
    bucket: pr.TokenBucket, events: list[tuple[str, float]]
) -> Iterator[tuple[Fraction, Fraction, float, Fraction]]:
    """Play the events; per grant that was used: when by its own clock, when in truth, its size, the pause then set.

    The true time only goes on; "back" makes the clock jump.
    """
    clock = true = Fraction(1000)
    paused = Fraction(0)
    used: list[tuple[Fraction, Fraction, float, Fraction]] = []
    waiting: list[tuple[int, Any, float, Fraction]] = []
    bucket._clock = lambda: float(clock)

    def step(seconds: Fraction) -> None:
        nonlocal clock, true
        while True:
            due = min(
                (Fraction(place.due) for _, place, _, _ in waiting if place.is_told()), default=clock + seconds + 1
            )
            onward = min(max(due - clock, Fraction(0)), seconds)
            clock, true, seconds = clock + onward, true + onward, seconds - onward
            gone = [each for each in waiting if each[1].is_told() and each[1].due - float(clock) <= 1e-9]
            if not gone:
                return
            place, waiter, n, pause = gone[0]
            waiting.remove(gone[0])
            used[place] = clock, true, n, pause
            bucket._leave(waiter, False)

    for verb, value in events:
        if verb == "step":
            step(Fraction(value))
        elif verb == "back":
            step(Fraction(10**6) if waiting else Fraction(0))
            clock -= Fraction(value)
        elif verb == "pause":
            paused = max(paused, clock + Fraction(value))
            bucket.pause(float(clock) + value)
        elif verb == "book":
            n = value * bucket.burst
            wait = Fraction(bucket.reserve(n, float(clock)))
            used.append((clock + wait, true + wait, n, paused))
        elif verb == "try":
            n = value * bucket.burst
            if bucket.try_acquire(n, float(clock)):
                used.append((clock, true, n, paused))
        elif verb == "wait":
            n = value * bucket.burst
            entered = bucket._enter(n, None, None)
            if not isinstance(entered, bool):
                waiting.append((len(used), entered, n, paused))
            used.append((clock, true, n, paused))
        elif waiting:
            place, waiter, _, _ = waiting.pop(max(0, len(waiting) - 1 - int(value)))
            used[place] = clock, true, 0.0, Fraction(0)
            bucket._leave(waiter, True)
    step(Fraction(10**6))
    assert not waiting, "nobody waits for ever"
    yield from (grant for grant in used if grant[2])


def check_any_window(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    """At most burst + rate * t in the window between any two grants, whatever the clock, cancellation or a pause do."""

    @settings(effort, max_examples=2 * effort.max_examples)
    @given(RATES, BURSTS, EVENTS)
    def check(rate: float, burst: float, events: list[tuple[str, float]]) -> None:
        grants = list(prim_grants(bucket_type(rate, burst), events))
        slack = Fraction(2, 10**6) * (1 + Fraction(rate))
        for which in (0, 1):
            ordered = sorted((grant[which], Fraction(grant[2])) for grant in grants)
            total, least = Fraction(0), None
            for moment, n in ordered:  # the window from each grant to this one, by the least of what was before it
                before = total - Fraction(rate) * moment
                least = before if least is None else min(least, before)
                total += n
                assert total - Fraction(rate) * moment <= least + Fraction(burst) + slack

    check()


def check_fifo(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    """Grants are due in the order in which they were booked, in truth, whatever their sizes."""

    @effort
    @given(RATES, BURSTS, EVENTS)
    def check(rate: float, burst: float, events: list[tuple[str, float]]) -> None:
        due = [in_truth for _, in_truth, _, _ in prim_grants(bucket_type(rate, burst), events)]
        assert all(later - earlier >= -Fraction(1, 10**6) for earlier, later in itertools.pairwise(due))

    check()


def check_pause(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    """What is booked after ``pause(until)`` is not due before ``until``."""

    @effort
    @given(RATES, BURSTS, EVENTS)
    def check(rate: float, burst: float, events: list[tuple[str, float]]) -> None:
        for by_clock, _, _, paused in prim_grants(bucket_type(rate, burst), events):
            assert by_clock >= paused - Fraction(1, 10**6)

    check()


def check_debt(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    """The waits are those of the textbook's bucket, which counts tokens and goes into debt."""

    @effort
    @given(RATES, BURSTS, st.lists(st.tuples(STEPS, PARTS), max_size=40))
    def check(rate: float, burst: float, requests: list[tuple[float, float]]) -> None:
        bucket = bucket_type(rate, burst)
        now = read = 1000.0
        tokens = Fraction(burst)
        for step, part in requests:
            now += step
            n = part * burst
            tokens = min(Fraction(burst), tokens + Fraction(now - read) * Fraction(rate)) - Fraction(n)
            read = now
            assert close(bucket.reserve(n, now), max(Fraction(0), -tokens / Fraction(rate)))

    check()


def check_whole_burst(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    """A full bucket grants its burst at one instant, at once or in parts, and nothing more; rounding is no wait."""

    @effort
    @given(RATES, st.integers(1, 20), st.floats(0.0, 1e6))
    def check(rate: float, burst: int, now: float) -> None:
        for parts in (1, burst):
            bucket = bucket_type(rate, burst)
            assert all(bucket.try_acquire(burst / parts, now) for _ in range(parts))
            assert not bucket.try_acquire(1, now)
            assert bucket.wait_for(1, now) == pytest.approx(1 / rate, abs=1e-6)
            refilled = now + burst / rate + 1e-6
            assert [bucket.reserve(1, refilled) for _ in range(burst)] == [0.0] * burst

    check()


def check_cancel_is_never_booked(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    """A bucket whose last waiters left answers as one in which they never were."""

    @effort
    @given(RATES, BURSTS, st.lists(st.tuples(STEPS, PARTS, st.lists(PARTS, max_size=3))))
    def check(rate: float, burst: float, requests: list[tuple[float, float, list[float]]]) -> None:
        disturbed, undisturbed = bucket_type(rate, burst), bucket_type(rate, burst)
        now = 1000.0
        for step, part, dropped in requests:
            now += step
            disturbed._clock = lambda now=now: now  # type: ignore[misc]
            left = [disturbed._enter(d * burst, None, None) for d in dropped]
            for n, place in zip(dropped, left, strict=True):
                if place is True:
                    assert undisturbed.try_acquire(n * burst, now)
            for place in reversed(left):
                if not isinstance(place, bool):
                    disturbed._leave(place, True)
            assert close(disturbed.reserve(part * burst, now), Fraction(undisturbed.reserve(part * burst, now)))
            assert disturbed.stats(now).tokens == pytest.approx(undisturbed.stats(now).tokens, abs=1e-6)

    check()


PROPERTIES: list[Callable[..., None]] = [
    check_any_window,
    check_fifo,
    check_pause,
    check_debt,
    check_whole_burst,
    check_cancel_is_never_booked,
    check_bucket_machine,
]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_keeps_its_promises(check: Callable[..., None]) -> None:
    check(pr.TokenBucket)


# ------------------------------------------------------------------------------------------------ token bucket: shells


@pytest.fixture(params=["threads", "tasks"])
def prim_acquire(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[pr.TokenBucket, World, float], BaseException | None]:
    """Acquire in a world of its own; the error that ended the waiting, if one did."""

    def acquire(bucket: pr.TokenBucket, world: World, n: float) -> BaseException | None:
        with monkeypatch.context() as patch:
            patch.setattr(pr, "time", SimpleNamespace(sleep=world.sleep))
            loops = {"get_running_loop": asyncio.get_running_loop, "AbstractEventLoop": asyncio.AbstractEventLoop}
            patch.setattr(pr, "asyncio", SimpleNamespace(sleep=world.asleep, **loops))
            if request.param == "threads":
                return error_of(lambda: bucket.acquire(n))
            error: BaseException | None = run_task(error_of_task(bucket.acquire_async(n)))
            return error

    return acquire


Acquire = Callable[[pr.TokenBucket, World, float], BaseException | None]


def test_shells_sleep_until_due(prim_acquire: Acquire) -> None:
    world = World()
    bucket = pr.TokenBucket(4.0, 2.0, clock=world.clock)
    granted = []
    for n in (1, 1, 1, 2, 1):
        assert prim_acquire(bucket, world, n) is None
        granted.append(world.now - 1000.0)
    assert granted == [0.0, 0.0, 0.25, 0.75, 1.0]
    assert world.naps == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), asyncio.CancelledError(), OSError("woken up")], ids=repr)
def test_shells_give_back_when_interrupted(prim_acquire: Acquire, error: BaseException) -> None:
    world = World()
    bucket = pr.TokenBucket(4.0, 2.0, clock=world.clock)
    bucket.reserve(2)
    world.interrupt = error
    assert prim_acquire(bucket, world, 2) is error
    assert bucket.stats().tokens == 0.0
    world.interrupt = None
    assert prim_acquire(bucket, world, 1) is None
    assert world.now == 1000.25


def test_verbs_are_about_one_token_by_default() -> None:
    world = World()
    bucket = pr.TokenBucket(1.0, 9.0, clock=world.clock)
    taken: list[float] = []
    for verb in (
        bucket.reserve,
        bucket.try_acquire,
        bucket.acquire,
        lambda: run_task(bucket.acquire_async()),
    ):
        before = bucket.stats().tokens
        verb()
        taken.append(before - bucket.stats().tokens)
    assert taken == [1.0] * 4
    bucket.reserve(5)
    assert bucket.wait_for() == 1.0


def test_shells_do_not_give_back_what_others_wait_behind(prim_acquire: Acquire) -> None:
    world = World()
    bucket = pr.TokenBucket(4.0, 2.0, clock=world.clock)
    bucket.reserve(2)
    behind: list[float] = []

    class Interrupting(World):
        def sleep(self, seconds: float) -> None:
            behind.append(bucket.reserve(1))
            raise KeyboardInterrupt

    assert isinstance(prim_acquire(bucket, Interrupting(), 2), KeyboardInterrupt)
    assert behind == [0.75]
    assert bucket.stats().tokens == -3.0


def test_shells_are_not_early_when_their_sleep_is(prim_acquire: Acquire) -> None:
    """uvloop counts milliseconds: its sleeps end up to one too soon, and the bound is about the moment of sending."""

    class Rounding(World):
        def sleep(self, seconds: float) -> None:
            self.naps.append(seconds)
            self.now += seconds if seconds < 0.001 else seconds - 0.0007

    world = Rounding()
    bucket = pr.TokenBucket(100.0, 1.0, clock=world.clock)
    for number in range(5):
        assert prim_acquire(bucket, world, 1) is None
        assert world.now >= 1000.0 + number / 100 - 1e-9


SIZES = 4, 3, 1, 4, 1


def without(victim: int, left: float) -> list[tuple[int, float]]:
    """When each of those sizes is granted by a bucket of 4 and 1 per second, if one leaves the queue at that time."""
    granted, full_at = list[tuple[int, float]](), 0.0
    for name, n in enumerate(SIZES):
        if name != victim:
            granted.append((name, max(full_at + n - 4, left if name > victim else 0.0)))
            full_at += n
    return granted


def test_tasks_are_granted_in_order_and_cancelled_at_any_point() -> None:
    """Five tasks of unequal size; for each of them and each step, that one is cancelled at that step."""

    async def scenario(victim: int, step: int, world: World) -> tuple[list[tuple[int, float]], float]:
        bucket = pr.TokenBucket(1.0, 4.0, clock=world.clock)
        granted: list[tuple[int, float]] = []
        left = math.inf

        async def worker(name: int, n: float) -> None:
            assert await bucket.acquire_async(n)
            granted.append((name, world.now))

        tasks = [asyncio.create_task(worker(name, n)) for name, n in enumerate(SIZES)]
        for number in range(72):
            if number == step and tasks[victim].cancel():
                left = world.now
            await asyncio.sleep(0 if number % 4 else 0.5)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert bucket.stats(1e9).tokens == 4.0 and not bucket._queue
        return granted, left

    whole = [(0, 0.0), (1, 3.0), (2, 4.0), (3, 8.0), (4, 9.0)]
    assert simulated(functools.partial(scenario, 0, 10**6)) == (whole, math.inf)
    for victim, step in itertools.product(range(5), range(72)):
        granted, left = simulated(functools.partial(scenario, victim, step))
        assert granted == (whole if left == math.inf else without(victim, left)), (victim, step)


@pytest.mark.parametrize("limited", [True, False], ids=["timeout=", "asyncio.timeout"])
def test_places_of_those_who_gave_up_are_used(limited: bool) -> None:
    """A hundred callers a second, who wait for half a second at most, for a bucket of fifty; then half as many."""

    async def main(world: World) -> list[float]:
        bucket, granted = pr.TokenBucket(50, 10, clock=world.clock), list[float]()

        async def caller() -> None:
            if limited:
                got = await bucket.acquire_async(timeout=0.5)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        got = await bucket.acquire_async()
                        granted.append(world.now)
                return
            if got:
                granted.append(world.now)

        tasks = []
        for n in range(600 + 200):
            tasks.append(asyncio.create_task(caller()))
            await asyncio.sleep(0.01 if n < 600 else 0.02)
        await asyncio.gather(*tasks)
        assert not bucket._queue
        return granted

    granted = simulated(main)
    seconds = Counter(int(at) for at in granted)
    assert seconds[0] in (59, 60) and all(49 <= seconds[second] <= 51 for second in range(1, 6)), seconds
    assert all(49 <= seconds[second] <= 51 for second in range(6, 10)), seconds
    for first, last in itertools.combinations(range(0, len(granted), 7), 2):
        assert last - first + 1 <= 10 + 50 * (granted[last] - granted[first]) + 1e-6


def test_threads_wait_in_order_and_move_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads; the first of those that wait is interrupted in its sleep, a later one in the queue."""
    world, asleep, granted = World(0.0), list[tuple[float, threading.Event, list[BaseException]]](), list[Any]()

    def sleep(seconds: float) -> None:
        woken, errors = threading.Event(), list[BaseException]()
        asleep.append((world.now + seconds, woken, errors))
        assert woken.wait(HANG_LIMIT)
        if errors:
            raise errors[0]

    monkeypatch.setattr(pr, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(co.Waiter, "block", gated_block)
    bucket = pr.TokenBucket(1.0, 4.0, clock=world.clock)

    def work(name: int, n: float) -> bool:
        got = bucket.acquire(n, 100.0)
        granted.append((name, world.now))
        return got

    assert bucket.acquire(4, 0.0) is True and bucket.acquire(1, 0.5) is False
    threads = []
    for name, n in enumerate((3, 4, 1, 2)):
        threads.append(PrimThread(functools.partial(work, name, n), gated=name == 2))
        wait_until(lambda: len(bucket._queue) == len(threads))
    wait_until(lambda: len(asleep) == 1)
    threads[2].cancel()
    world.now = 1.0
    due, woken, errors = asleep.pop()
    assert due == 3.0
    errors.append(KeyboardInterrupt())
    woken.set()
    for name, at in ((1, 4.0), (3, 6.0)):
        wait_until(lambda: len(asleep) == 1)
        due, woken, _ = asleep.pop()
        assert due == at
        world.now = due
        woken.set()
        assert threads[name].result() is True
    assert granted == [(1, 4.0), (3, 6.0)] and bucket.stats().tokens == 0.0 and not bucket._queue


def test_a_closed_loop_keeps_nobody_waiting() -> None:
    world = World(0.0)
    bucket = pr.TokenBucket(1.0, clock=world.clock)
    bucket.reserve()
    stranded = [prim_stranded(bucket.acquire_async()) for _ in range(2)]
    world.now = 2.0
    assert bucket._enter(1, 0.0, None) is False
    place = bucket._enter(1, 1.0, None)
    assert not isinstance(place, bool) and place.due == 2.0
    assert not any(task.done() for task in stranded)


def test_serves_many_threads_exactly() -> None:
    bucket = pr.TokenBucket(8.0, 16.0, clock=lambda: 0.0)
    waits: list[float] = []
    start = threading.Barrier(6)

    def worker() -> None:
        start.wait(HANG_LIMIT)
        mine = [bucket.reserve() for _ in range(200)]
        waits.extend(mine)
        assert mine == sorted(mine)

    in_threads([worker] * 6)
    assert sorted(waits) == [max(0, k - 15) / 8 for k in range(1200)]


# ---------------------------------------------------------------------------------------------- token bucket: set_rate

BUCKET_RATE_ROWS: dict[str, tuple[float, float, list[tuple[Any, ...]]]] = {
    "the tokens that are there stay": (1.0, 4.0, [(0, "take", 3), (0, "rate", 10.0), (0, "tokens", 1.0),
        (0, "wait", 0.0), (0, "take", 1), (0, "wait", 0.1)]),
    "a fraction stays a fraction": (1.0, 1.0, [(0, "take", 1), (0.5, "rate", 0.1), (0.5, "wait", 5.0),
        (5.5, "wait", 0.0)]),
    "a full one is full": (1.0, 3.0, [(9, "rate", 0.5), (9, "tokens", 3.0), (9, "take", 3), (9, "wait", 2.0)]),
    "what is booked keeps its time": (1.0, 1.0, [(0, "take", 1), (0, "take", 1), (0, "take", 1), (0, "rate", 10.0),
        (0, "wait", 2.1), (2, "wait", 0.1)]),
    "slower after what is booked": (1.0, 1.0, [(0, "take", 1), (0, "take", 1), (0, "rate", 0.1), (0, "wait", 11.0)]),
    "a smaller burst keeps what it holds": (1.0, 5.0, [(0, "rate", 1.0, 2.0), (0, "tokens", 2.0), (0, "take", 2),
        (0, "wait", 1.0)]),
    "a larger burst gives nothing": (1.0, 2.0, [(0, "rate", 2.0, 5.0), (0, "tokens", 2.0), (1, "tokens", 4.0),
        (9, "tokens", 5.0)]),
    "a pause stays": (1.0, 3.0, [(0, "pause", 5), (1, "rate", 10.0), (1, "wait", 4.0), (5, "take", 1),
        (5, "wait", 0.1)]),
    "a pause does not pay a debt": (1.0, 1.0, [(0, "take", 1), (0, "pause", 1), (0.5, "rate", 0.1),
        (0.5, "wait", 5.0)]),
    "two pauses neither": (1.0, 1.0, [(0, "take", 1), (0, "pause", 1), (0, "pause", 2), (0.5, "rate", 0.1),
        (0.5, "wait", 5.0)]),
    "twice changed in a pause": (2.0, 1.0, [(0, "pause", 10), (1, "rate", 0.5), (2, "rate", 8.0), (2, "wait", 8.0),
        (10, "take", 1), (10, "wait", 0.125)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BUCKET_RATE_ROWS)
def test_set_rate_rows(name: str) -> None:
    rate, burst, rows = BUCKET_RATE_ROWS[name]
    bucket = pr.TokenBucket(rate, burst, clock=lambda: pytest.fail("the time was given"))
    for now, verb, *words in rows:
        if verb == "take":
            bucket.reserve(words[0], now)
        elif verb == "rate":
            bucket.set_rate(words[0], now, *words[1:])
        elif verb == "pause":
            bucket.pause(*words)
        elif verb == "tokens":
            assert bucket.stats(now).tokens == pytest.approx(words[0])
        else:
            assert bucket.wait_for(1, now) == pytest.approx(words[0])


def test_set_rate_reads_the_clock_and_refuses_nonsense() -> None:
    bucket = pr.TokenBucket(1.0, 2.0, clock=lambda: 7.0)
    bucket.reserve(2)
    bucket.set_rate(4.0)
    assert bucket.stats() == pr.TokenBucketStats(rate=4.0, burst=2.0, tokens=0.0)
    assert bucket.wait_for() == 0.25
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rate must be a positive number"):
            bucket.set_rate(wrong)
    for wrong in (0, 0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="burst must be a number"):
            bucket.set_rate(1.0, 0.0, wrong)
    assert bucket.stats().rate == 4.0


@pytest.mark.parametrize("block", range(4))
def test_set_rate_keeps_the_bound_in_any_window(block: int) -> None:
    """Grants in any window: at most the largest burst in it, and the integral of the rate that is in force."""
    for seed in range(block * 100, block * 100 + 100):
        rng = random.Random(seed)
        rate, burst, now = rng.choice([0.5, 2.0, 9.0]), float(rng.choice([1, 1, 3])), 0.0
        bucket = pr.TokenBucket(rate, burst)
        changes = [(-1.0, rate)]
        largest, grants = burst, list[float]()
        for _ in range(60):
            now += rng.choice([0.0, 0.01, rng.random(), 3 * rng.random()])
            fate = rng.random()
            if fate < 0.5:
                if bucket.try_acquire(1, now):
                    grants.append(now)
            elif fate < 0.6:
                grants.append(now + bucket.reserve(1, now))
            elif fate < 0.7:
                bucket.pause(now + rng.random() * 4)
            else:
                rate, burst = rng.choice([0.1, 0.5, 2.0, 9.0]), rng.choice([burst, burst, 1.0, 3.0])
                bucket.set_rate(rate, now, burst)
                largest = max(largest, burst)
                changes.append((max([now, *grants]), rate))  # the contract: not before what is booked
        assert grants == sorted(grants), seed
        ends = [*(at for at, _ in changes[1:]), math.inf]
        for i, first in enumerate(grants):
            for j in range(i, len(grants)):
                spans = (
                    max(0.0, min(grants[j], end) - max(first, at)) * r
                    for (at, r), end in zip(changes, ends, strict=True)
                )
                assert j - i + 1 <= largest + sum(spans) + 1e-6, seed
