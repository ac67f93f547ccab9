"""TokenBucket: rows, a model, the shells of threads and tasks, changes of the rate."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
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

import primitives as pr
from tests.helpers.base import HANG_LIMIT, SETTINGS, World, run_task
from tests.helpers.mechanisms import STEPS, error_of, error_of_task, in_threads

# rate, burst, and what happens: "time event = answer; ..."; "book" and "cancel" name their reservation
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
    "cancel gives back": (
        1,
        1,
        "0 book a 1 = 0; 0 book b 1 = 1; 0 cancel b = True; 0 book c 1 = 1; 0 book d 1 = 2;"
        "0.5 cancel d = True; 0.5 cancel c = True; 0.5 book e 1 = 0.5",
    ),
    "cancel in the middle gives nothing back": (
        1,
        1,
        "0 book a 1 = 0; 0 book b 1 = 1; 0 book c 1 = 2; 0 cancel b = False; 0 book d 1 = 3;"
        "0 cancel d = True; 0 cancel c = True; 0 book e 1 = 2",
    ),
    "cancel of what was free": (1, 2, "0 book a 2 = 0; 0 cancel a = True; 0 tokens = 2; 0 reserve 2 = 0"),
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
        "0 book a 1 = 0; 0 book b 1 = 1; 0 pause 1.5 = None; 0 cancel b = True; 1 reserve 1 = 0.5",
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


@pytest.mark.parametrize("explicit", [True, False], ids=["now=", "clock"])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, explicit: bool) -> None:
    rate, burst, rows = ROWS[name]
    world = World()
    bucket = pr.TokenBucket(rate, burst, clock=(lambda: pytest.fail("the time was given")) if explicit else world.clock)
    booked: dict[str, pr.Reservation] = {}
    for row in rows.split(";"):
        event, expected = row.split(" = ")
        time_, verb, *words = event.split()
        world.now = float(time_)
        at: dict[str, Any] = {"now": world.now} if explicit else {}
        answer: Any = None
        if verb == "book":
            booked[words[0]] = bucket.book(float(words[1]), **at)
            answer = booked[words[0]].wait
        elif verb == "cancel":
            answer = bucket.cancel(booked[words[0]])
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
    for verb in (bucket.book, bucket.reserve, bucket.try_acquire, bucket.acquire):
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
        self.paused_until = max(self.paused_until, Fraction(until))
        self.entries.append((0, Fraction(until), Fraction(0)))

    def position(self, number: int) -> str:
        """Whether a booking is the last thing, followed by pauses only, or by another booking."""
        behind = list(itertools.takewhile(lambda entry: entry[0] != number, reversed(self.entries)))
        return "last" if not behind else "middle" if any(entry[0] for entry in behind) else "paused"

    def forget(self, number: int) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != number]


def close(answer: float, exact: Fraction) -> bool:
    return abs(Fraction(answer) - exact) <= Fraction(1, 10**6)


class Machine(RuleBasedStateMachine):
    """A bucket and the ledger, side by side."""

    bucket_type: ClassVar[type[pr.TokenBucket]] = pr.TokenBucket

    @initialize(rate=RATES, burst=BURSTS)
    def start(self, rate: float, burst: float) -> None:
        self.now = 1000.0
        self.bucket = self.bucket_type(rate, burst, clock=lambda: self.now)
        self.ledger = Ledger(rate, burst)
        self.open: dict[int, tuple[pr.Reservation, Fraction]] = {}  # booked, and not cancelled
        self.numbers = itertools.count(1)

    @rule(seconds=STEPS)
    def step(self, seconds: float) -> None:
        self.now += seconds

    @rule(part=PARTS)
    def book(self, part: float) -> None:
        n, number = part * self.bucket.burst, next(self.numbers)
        reservation = self.bucket.book(n)
        wait = self.ledger.book(number, n, self.now)
        self.open[number] = (reservation, Fraction(self.now) + wait)
        assert close(reservation.wait, wait)

    @rule()
    def book_one(self) -> None:
        self.book(1.0 / self.bucket.burst)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        newest_first = sorted(self.open, reverse=True)
        number = newest_first[data.draw(st.integers(0, len(newest_first) - 1))]
        reservation, due = self.open[number]
        assume(due > self.now or reservation.wait == 0.0)
        del self.open[number]
        position = self.ledger.position(number)
        served = self.bucket.cancel(reservation)
        assert position == "paused" or served is (position == "last")
        if position != "middle":
            self.ledger.forget(number)

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
        st.tuples(st.just("cancel"), st.integers(0, 3).map(float)),
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
    used: list[tuple[pr.Reservation, Fraction, Fraction, float, Fraction]] = []
    for verb, value in events:
        if verb == "step":
            clock, true = clock + Fraction(value), true + Fraction(value)
        elif verb == "back":
            clock -= Fraction(value)
        elif verb == "pause":
            paused = max(paused, clock + Fraction(value))
            bucket.pause(float(clock) + value)
        elif verb == "book":
            n = value * bucket.burst
            reservation = bucket.book(n, float(clock))
            wait = Fraction(reservation.wait)
            used.append((reservation, clock + wait, true + wait, n, paused))
        elif verb == "try":
            n = value * bucket.burst
            if bucket.try_acquire(n, float(clock)):
                used.append((pr.Reservation(0.0, 0.0, 0.0, 0.0), clock, true, n, paused))
        else:
            waiting = [grant for grant in used if grant[2] > true]
            if waiting:
                gone = waiting[max(0, len(waiting) - 1 - int(value))]
                bucket.cancel(gone[0])
                used = [grant for grant in used if grant is not gone]
    for _, by_clock, in_truth, n, pause in used:
        yield by_clock, in_truth, n, pause


def check_any_window(bucket_type: type[pr.TokenBucket], effort: settings = SETTINGS) -> None:
    """At most burst + rate * t in the window between any two grants, whatever the clock, cancellation or a pause do."""

    @settings(effort, max_examples=2 * effort.max_examples)
    @given(RATES, BURSTS, EVENTS)
    def check(rate: float, burst: float, events: list[tuple[str, float]]) -> None:
        grants = list(prim_grants(bucket_type(rate, burst), events))
        slack = Fraction(2, 10**6) * (1 + Fraction(rate))
        for which in (0, 1):
            ordered = sorted((grant[which], Fraction(grant[2])) for grant in grants)
            for first in range(len(ordered)):
                total = Fraction(0)
                for moment, n in ordered[first:]:
                    total += n
                    assert total <= Fraction(burst) + Fraction(rate) * (moment - ordered[first][0]) + slack

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
    """A bucket whose last bookings were cancelled answers, to the bit, as one in which they were never made."""

    @effort
    @given(RATES, BURSTS, st.lists(st.tuples(STEPS, PARTS, st.lists(PARTS, max_size=3))))
    def check(rate: float, burst: float, requests: list[tuple[float, float, list[float]]]) -> None:
        disturbed, undisturbed = bucket_type(rate, burst), bucket_type(rate, burst)
        now = 1000.0
        for step, part, dropped in requests:
            now += step
            booked = [disturbed.book(d * burst, now) for d in dropped]
            assert all(disturbed.cancel(reservation) for reservation in reversed(booked))
            assert disturbed.reserve(part * burst, now) == undisturbed.reserve(part * burst, now)
            assert disturbed.stats(now) == undisturbed.stats(now)

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
            patch.setattr(pr, "asyncio", SimpleNamespace(sleep=world.asleep))
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
        bucket.book,
        bucket.reserve,
        bucket.try_acquire,
        bucket.acquire,
        lambda: run_task(bucket.acquire_async()),
    ):
        before = bucket.stats().tokens
        verb()
        taken.append(before - bucket.stats().tokens)
    assert taken == [1.0] * 5
    bucket.reserve(4)
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


def test_tasks_are_granted_in_order_and_cancelled_at_any_point() -> None:
    """Five tasks of unequal size; for each of them and each step, that one is cancelled at that step."""

    async def scenario(victim: int, step: int) -> list[tuple[int, float]]:
        world = World(0.0)
        timers: list[tuple[float, asyncio.Future[None]]] = []

        async def sleep(seconds: float) -> None:
            timer = asyncio.get_running_loop().create_future()
            timers.append((world.now + seconds, timer))
            await timer

        bucket = pr.TokenBucket(1.0, 4.0, clock=world.clock)
        granted: list[tuple[int, float]] = []

        async def worker(name: int, n: float) -> None:
            await bucket.acquire_async(n)
            granted.append((name, world.now))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pr, "asyncio", SimpleNamespace(sleep=sleep))
            tasks = [asyncio.create_task(worker(name, n)) for name, n in enumerate((4, 3, 1, 4, 1))]
            for number in itertools.count():
                if number == step:
                    tasks[victim].cancel()
                await asyncio.sleep(0)
                if number >= 3 and number % 3 == 0:
                    timers = [timer for timer in timers if not timer[1].done()]
                    if not timers:
                        break
                    world.now, first = min(timers, key=lambda timer: timer[0])
                    first.set_result(None)
            await asyncio.gather(*tasks, return_exceptions=True)
        assert bucket.stats(1e9).tokens == 4.0
        return granted

    whole = [(0, 0.0), (1, 3.0), (2, 4.0), (3, 8.0), (4, 9.0)]
    assert run_task(scenario(0, 10**6)) == whole
    for victim, step in itertools.product(range(5), range(18)):
        granted = run_task(scenario(victim, step))
        kept = [grant for grant in whole if grant[0] != victim]
        if step == 0:  # it never started, so it never asked
            assert [name for name, _ in granted] == [name for name, _ in kept]
            assert all(now <= dict(whole)[name] for name, now in granted)
        elif victim == 4 or len(granted) == 5:
            assert granted == (whole if len(granted) == 5 else kept)
        else:
            assert granted == kept  # those behind keep the times they were told


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
                grants.append(bucket.book(1, now).due)
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
