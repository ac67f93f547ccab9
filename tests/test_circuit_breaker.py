"""CircuitBreaker: rows, a model, both shells, many threads."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
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
from tests.helpers.base import HANG_LIMIT, SETTINGS, World, run_task, ticks, wait_until
from tests.helpers.mechanisms import error_of, error_of_task, in_threads

# ----------------------------------------------------------------------------------------- circuit breaker: row by row
#
# A table is its options, and rows of "time event expected". The events ok, fail and ignore ask for a permit and settle
# it at once; "ask a" keeps it for a later "ok a". Expected is the state afterwards, or the exact retry_after.

ROWS = """
five of six stay closed: failures=6
  0 fail closed | 0 fail closed | 0 fail closed | 0 fail closed | 0 fail closed | 0 ignore closed | 0 fail open
to the edge of the window: failures=3 window=10
  0 fail closed | 5 fail closed | 10 fail closed | 14.75 fail open
exactly a window apart: failures=2 window=5
  0 fail closed | 5 fail closed | 10 fail closed | 14.75 fail open
a success begins the row anew: failures=3
  0 fail closed | 1 fail closed | 2 ok closed | 3 fail closed | 4 fail closed | 5 ignore closed | 6 fail open
shut to the tick:
  0 fail open | 0 ok 30 | 29.75 ok .25 | 30 ask a half_open | 40 ok a closed
the reset doubles up to its cap, and closing starts anew: max_reset=100
  0 fail open | 0 ok 30 | 30 fail open | 30 ok 60 | 89.75 ok .25 | 90 fail open | 90 ok 100 | 190 fail open
  190 ok 100 | 290 ok closed | 290 fail open | 290 ok 30
jitter comes after the cap: max_reset=40 jitter=.5
  0 fail open | 0 ok 37.5 | 37.5 fail open | 37.5 ok 50 | 87.25 ok .25
an earlier generation reports: probes=2
  0 ask a closed | 0 ask b closed | 0 ask c closed | 0 ask d closed | 0 ask e closed | 0 ask f closed | 1 fail open
  2 fail a open | 2 ok b open | 2 ok 29 | 31 ok half_open | 31 ok c half_open | 31 fail d half_open | 31 ask p half_open
  32 ok p closed | 32 fail e closed | 32 ok f closed
a probe of an earlier half-open circuit reports: probes=3
  0 fail open | 30 ask a half_open | 30 ask b half_open | 30 fail open | 90 ok half_open | 90 ok a half_open
  90 ok half_open | 90 fail b half_open | 90 ok closed
the fourth call of three probes: probes=3
  0 fail open | 30 ask a half_open | 31 ask b half_open | 32 ask c half_open | 33 ok 27 | 34 ok a half_open | 34 ok 27
  35 ok b half_open | 35 ok 27 | 36 ok c closed | 36 ok closed
a probe that never reports: probe_timeout=5
  0 fail open | 30 ask a half_open | 34.75 ok .25 | 35 ask b half_open | 36 ok 4 | 39.75 ok b closed | 40 fail a closed
a report at the end of the probe's time: probe_timeout=5
  0 fail open | 30 ask a half_open | 35 ok a closed | 36 fail open | 66 ask b half_open | 71 fail b open | 71 ok 60
a report after the probe's time, while another one is under way: probe_timeout=5
  0 fail open | 30 ask a half_open | 35 ask b half_open | 36 ok 4 | 37 ok a closed | 37 fail b closed
  37 fail open | 67 ask c half_open | 72 ask d half_open | 80 fail c open | 81 ok d open | 81 ok 59
an answer that takes longer than the probe's time, for ever: probe_timeout=2
  0 fail open | 30 ask a half_open | 32.5 ok a closed | 32.5 ok closed
places that expired, and all of their reports: probes=2 probe_timeout=5
  0 fail open | 30 ask a half_open | 30 ask b half_open | 35 ask c half_open | 36 ok a half_open | 37 ok b closed
  37 ok c closed
expiry leaves alone who passed: probes=2
  0 fail open | 30 ask a half_open | 31 ok half_open | 60 ok closed
ignored:
  0 ignore closed | 0 fail open | 30 ask a half_open | 31 ok 29 | 31 ignore a half_open | 31 ok closed
settled twice: failures=2 probes=2
  0 ask a closed | 0 fail a closed | 0 fail a closed | 0 fail open | 30 ask b half_open | 30 ok b half_open
  30 ok b half_open | 30 fail b half_open | 30 ok closed
the ratio is enough: failures=99 ratio=.5 minimum=4
  0 fail closed | 0 ok closed | 0 ok closed | 0 fail open | 30 ok closed
a success may complete the minimum, and each generation has its own: failures=99 ratio=.75 minimum=4
  0 fail closed | 0 fail closed | 0 fail closed | 0 ignore closed | 0 ok open | 30 ok closed
  30 fail closed | 30 fail closed | 30 fail closed | 30 ok open
calls slide out by tenths of the window: failures=99 ratio=.5 minimum=4 window=8
  0 fail closed | .75 fail closed | .75 fail closed | 8 ok closed | 8 ok closed | 8 fail closed | 15.75 fail open
calls count until their tenth is gone: failures=99 ratio=.5 minimum=4 window=8
  0 fail closed | 0 fail closed | 0 fail closed | 7.75 ok open
the ratio does not replace the number: failures=2 ratio=1
  0 fail closed | 0 fail open
"""


TABLES = re.findall(r"^(\w.*):(.*)\n((?:  .*\n)+)", ROWS, re.M)


def breaker_new(world: World, **options: Any) -> pr.CircuitBreaker:
    return pr.CircuitBreaker("b", **{"failures": 1, "jitter": 0.0, "rng": lambda: 0.5, "clock": world.clock, **options})


def breaker_settle(permit: pr.Permit, verb: str) -> None:
    {"ok": permit.success, "fail": permit.failure, "ignore": permit.ignore}[verb]()


@pytest.mark.parametrize(("name", "options", "rows"), TABLES, ids=[name for name, _, _ in TABLES])
def test_row_by_row(name: str, options: str, rows: str) -> None:
    numbers = (option.split("=") for option in options.split())
    world, permits, refused = World(), dict[str, pr.Permit](), 0
    breaker = breaker_new(world, **{key: int(value) if value.isdigit() else float(value) for key, value in numbers})
    for number, row in enumerate(re.split(r"[|\n]", rows.strip())):
        time, verb, *key, expected = row.split()
        world.now = float(time)
        try:
            permit = permits[key[0]] if key and verb != "ask" else breaker.permit()
        except pr.CircuitOpen as error:
            refused += 1
            assert (number, error.name, error.retry_after) == (number, "b", float(expected))
            continue
        if verb == "ask":
            permits[key[0]] = permit
        else:
            breaker_settle(permit, verb)
        assert (number, breaker.state) == (number, expected)
    assert breaker.stats().refused == refused


def test_tells_of_itself() -> None:
    breaker = breaker_new(World(0.0), failures=2)
    assert repr(breaker) == "<CircuitBreaker name=b state=closed failures=0 refused=0 opened=0 retry_after=0>"
    breaker.permit().failure()
    assert [breaker.stats(now).failures for now in (9.75, 10.0)] == [1, 0]
    breaker.permit().failure()
    with pytest.raises(pr.CircuitOpen, match=r"^circuit b is open for another 29\.8 s$"):
        breaker.permit(0.25)
    assert breaker.stats(29.0) == ("b", "open", 0, 1, 1, 1.0)
    assert breaker.stats(30.0) == breaker.stats(31.0) == ("b", "half_open", 0, 1, 1, 0.0)  # before anybody asks
    assert breaker.permit(30.0).generation == 2
    assert breaker.stats() == ("b", "half_open", 0, 1, 1, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        *[{"failures": 0}, {"probes": 0}, {"minimum": 0}, {"ratio": 0.0}, {"ratio": 1.5}, {"ratio": math.nan}],
        *[{"window": 0.0}, {"window": math.nan}, {"reset": 0.0}, {"reset": 30.0, "max_reset": 29.0}, {"jitter": -0.1}],
        *[{"probe_timeout": 0.0}, {"probe_timeout": math.nan}],
    ],
    ids=str,
)
def test_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r" must be | is a share "):
        pr.CircuitBreaker("b", **options)


@pytest.mark.parametrize("on", [[OSError], OSError(), None, (OSError, "x")], ids=str)
def test_refuses_what_is_no_kind_of_error(on: Any) -> None:
    with pytest.raises(TypeError, match="on must be"):
        pr.CircuitBreaker("b", on=on)


both_paths = pytest.mark.parametrize("path", [{}, {"ratio": 1.0, "minimum": 10**9}], ids=["simple", "recorded"])


@both_paths
@pytest.mark.parametrize(
    ("on", "error", "counts"),
    [
        *[(OSError, ConnectionResetError(), 1), (OSError, ValueError(), 0), (Exception, pr.CircuitOpen("c", 1.0), 1)],
        *[((KeyError, OSError), KeyError(), 1), ((KeyError, OSError), ValueError(), 0)],
        *[(lambda error: error.args == (503,), ValueError(status), status == 503) for status in (404, 503)],
        *[(BaseException, error(), 0) for error in (KeyboardInterrupt, asyncio.CancelledError, SystemExit)],
        (lambda error: True, KeyboardInterrupt(), 0),
    ],
)
def test_what_is_a_failure(on: pr.RetryOn, error: BaseException, counts: int, path: dict[str, float]) -> None:
    breaker = breaker_new(World(), failures=9, on=on, **path)

    def fail() -> None:
        raise error

    for shell in SHELLS.values():
        assert error_of(lambda shell=shell: shell(breaker, fail)()) is error  # type: ignore[misc]
    assert breaker.stats().failures == 2 * counts


# --------------------------------------------------------------------------------------------- circuit breaker: shells

Body = Callable[..., Any]


def breaker_async(body: Body) -> Body:
    async def slowly(*args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        return body(*args, **options)

    return slowly


def with_permit(breaker: pr.CircuitBreaker, body: Body) -> Body:
    def call(*args: Any, **options: Any) -> Any:
        with breaker.permit():
            return body(*args, **options)

    return call


def breaker_run(function: Body) -> Body:
    return lambda *args, **options: asyncio.run(function(*args, **options))


SHELLS: dict[str, Callable[[pr.CircuitBreaker, Body], Body]] = {
    "permit": with_permit,
    "call_async": lambda breaker, body: breaker_run(functools.partial(breaker.call_async, breaker_async(body))),
}


@both_paths
@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell(shell: str, path: dict[str, float]) -> None:
    world, values = World(), list[Any]()

    def body(value: Any, *, times: int = 1) -> Any:
        values.append(value)
        if isinstance(value, Exception):
            raise value
        return value * times

    breaker = breaker_new(world, failures=2, **path)
    call, error = SHELLS[shell](breaker, body), OSError()
    assert call(21, times=2) == 42
    assert [error_of(lambda: call(error)) for _ in "12"] == [error, error]
    assert isinstance(error_of(lambda: call(1)), pr.CircuitOpen)
    assert values == [21, error, error]
    world.now += 30
    assert error_of(lambda: call(error)) is error
    world.now += 60
    assert (call(3), breaker.stats()) == (3, ("b", "closed", 0, 1, 2, 0.0))


def test_leaves_every_argument_name_to_the_call() -> None:
    for shell in SHELLS.values():
        call = shell(breaker_new(World()), dict)
        assert call(self=1, function=2) == {"self": 1, "function": 2}


@both_paths
def test_calls_overlap(path: dict[str, float]) -> None:
    breaker, barrier = breaker_new(World(), **path), threading.Barrier(5)
    with ThreadPoolExecutor(5) as pool:
        wait = with_permit(breaker, barrier.wait)
        assert sorted(pool.map(lambda _: wait(HANG_LIMIT), range(5))) == [0, 1, 2, 3, 4]

    async def main() -> list[int]:
        barrier = asyncio.Barrier(5)
        return sorted(await asyncio.gather(*(breaker.call_async(barrier.wait) for _ in range(5))))

    assert run_task(main()) == [0, 1, 2, 3, 4]


@both_paths
def test_cancelled(path: dict[str, float]) -> None:
    world = World()
    breaker = breaker_new(world, **path)

    async def cancelled() -> None:
        task = asyncio.create_task(breaker.call_async(asyncio.Event().wait))
        await ticks()
        task.cancel()
        assert isinstance(await error_of_task(task), asyncio.CancelledError)

    run_task(cancelled())
    assert breaker.state == "closed"
    breaker.permit().failure()
    world.now += 30
    run_task(cancelled())
    assert (breaker.stats().state, with_permit(breaker, int)(), breaker.stats().state) == ("half_open", 0, "closed")


class NoLock:
    def __enter__(self) -> None:
        raise AssertionError("locked")

    def __exit__(self, *error: object) -> None: ...


def test_a_success_on_the_simple_path_takes_no_lock() -> None:
    for options in ({}, {"ratio": 0.5}):
        for shell in SHELLS.values():
            breaker = breaker_new(World(), failures=2, **options)
            breaker._lock = NoLock()  # type: ignore[assignment]
            assert str(error_of(shell(breaker, int))) == ("locked" if options else "None")


def test_a_success_after_a_failure_is_recorded() -> None:
    breaker = breaker_new(World(), failures=2)
    call = SHELLS["call_async"](breaker, lambda error=None: (_ for _ in ()).throw(error) if error else 0)
    for _ in range(9):
        assert isinstance(error_of(lambda: SHELLS["call_async"](breaker, lambda: int("x"))()), ValueError)
        assert breaker.stats().failures == 1
        assert call() == 0 and breaker.stats().failures == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_a_success_between_failures_counts_whenever_it_was_admitted(shell: str) -> None:
    """Calls that are all under way at once fail and succeed in turn."""
    breaker = breaker_new(World(), failures=2)

    async def main() -> None:
        gates = [asyncio.Event() for _ in range(9)]

        async def call(number: int) -> None:
            await gates[number].wait()
            if number % 2 == 0:
                raise OSError

        async def permitted(number: int) -> None:
            with breaker.permit():
                await call(number)

        ask = permitted if shell == "permit" else functools.partial(breaker.call_async, call)
        tasks = [asyncio.create_task(ask(number)) for number in range(9)]
        await ticks()
        for gate, task in zip(gates, tasks, strict=True):
            gate.set()
            await asyncio.wait((task,))
            task.exception()
            assert breaker.state == "closed"

    run_task(main())
    assert breaker.stats().failures == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_one_failure_in_a_thousand_opens_nothing_by_default(shell: str) -> None:
    """A thousand calls a second for 20 s; then all fail, and five are enough."""
    world = World(0.0)
    breaker = pr.CircuitBreaker("b", clock=world.clock)
    refused = number = 0

    def body() -> None:
        if number % 1000 == 0 or world.now >= 20.0:
            raise OSError

    async def main() -> None:
        nonlocal number, refused
        for number in range(20_010):
            world.now = number / 1000
            try:
                if shell == "permit":
                    with breaker.permit():
                        body()
                else:
                    await breaker.call_async(breaker_async(body))
            except OSError:
                pass
            except pr.CircuitOpen:
                refused += 1

    asyncio.run(main())
    assert (refused, breaker.state, breaker.stats().opened) == (5, "open", 1)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shell", SHELLS)
def test_a_failure_admitted_before_a_transition_is_dropped(shell: str, back: bool) -> None:
    world = World()
    breaker = breaker_new(world)

    def body() -> None:
        breaker.permit().failure()
        if back:
            world.now += 30
            breaker.permit().success()
        raise OSError

    assert isinstance(error_of(SHELLS[shell](breaker, body)), OSError)
    assert breaker.stats() == ("b", "closed" if back else "open", 0, 0, 1, 0.0 if back else 30.0)


@pytest.mark.parametrize("shell", SHELLS)
@SETTINGS
@example(opened=0.3, reset=7.0, later=0.8)  # where rounding makes now + retry_after less than the end of the reset
@given(opened=st.floats(0.0, 100.0), reset=st.floats(1.0, 300.0), later=st.floats(0.0, 0.9))
def test_retry_waits_once_and_exactly(shell: str, opened: float, reset: float, later: float) -> None:
    world, times = World(opened), list[float]()
    breaker, policy = breaker_new(world, reset=reset), pr.RetryPolicy(attempts=2, total=math.inf)
    breaker.permit().failure()
    world.now = asked = opened + later
    retry_after = breaker.stats().retry_after
    body = functools.partial(lambda: times.append(world.now))
    if shell == "permit":
        pr.retry(with_permit(breaker, body), on=pr.CircuitOpen, policy=policy, clock=world.clock, sleep=world.sleep)
    else:
        call = functools.partial(breaker.call_async, breaker_async(body))
        asyncio.run(pr.retry_async(call, on=pr.CircuitOpen, policy=policy, clock=world.clock, sleep=world.asleep))
    assert (world.naps, times, breaker.state) == ([retry_after], [asked + retry_after], "closed")


def test_listeners(caplog: pytest.LogCaptureFixture) -> None:
    world, told = World(), list[Any]()
    breaker = breaker_new(world)

    def faulty(*transition: object) -> None:
        raise RuntimeError("the listener's own")

    def nosy(name: str, before: str, after: str, generation: int) -> None:
        refusal = error_of(lambda: breaker.permit().ignore())
        told.append((name, before, after, generation, breaker.stats().state, getattr(refusal, "retry_after", None)))

    for listener in (faulty, nosy, lambda *transition: told.append(transition)):
        breaker.listen(listener)
    assert isinstance(error_of(lambda: with_permit(breaker, int)("x")), ValueError)
    world.now += 30
    assert asyncio.run(breaker.call_async(breaker_async(int))) == 0
    turns = [("closed", "open", 1, 30.0), ("open", "half_open", 2, 30.0), ("half_open", "closed", 3, None)]
    assert told[::2] == [("b", before, after, number, after, wait) for before, after, number, wait in turns]
    assert told[1::2] == [("b", *turn[:3]) for turn in turns]
    records = [(record.levelno, record.getMessage(), record.exc_info is not None) for record in caplog.records]
    assert records == [(logging.ERROR, "listener of circuit b", True)] * 3


@pytest.mark.parametrize("elsewhere", [False, True], ids=["by the listener", "in another thread"])
def test_a_transition_while_another_is_told_waits_its_turn(elsewhere: bool) -> None:
    world, told = World(), list[int]()
    breaker = breaker_new(world)

    def meddle(name: str, before: str, after: str, generation: int) -> None:
        if after == "open":
            world.now += 30
            with ThreadPoolExecutor(1) as pool:
                (pool.submit(with_permit(breaker, int)).result if elsewhere else with_permit(breaker, int))()

    breaker.listen(meddle)
    breaker.listen(lambda *transition: told.append(transition[3]))
    breaker.permit().failure()
    assert (breaker.state, told) == ("closed", [1, 2, 3])


# ------------------------------------------------------------------------------------ circuit breaker: against a model


def breaker_rng(number: int) -> float:
    return number % 4 / 4


class Model:
    """The definition itself: nothing is ever forgotten, and every answer is computed from the whole past."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.o = SimpleNamespace(**options)
        self.turns: list[tuple[str, float]] = [("closed", 0.0)]
        self.permits: list[SimpleNamespace] = []  # generation, started, verb, counted: (time, failed)
        self.reports: list[tuple[float, bool]] = []  # of this closed circuit, in their order
        self.refused = 0

    @property
    def state(self) -> str:
        return self.turns[-1][0]

    def mine(self) -> list[SimpleNamespace]:
        return [permit for permit in self.permits if permit.generation == len(self.turns) - 1]

    def counted(self) -> list[tuple[float, bool]]:
        return [permit.counted for permit in self.mine() if permit.counted]

    def until(self) -> float:
        states = [state for state, _ in self.turns]
        in_a_row = states[len(states) - states[::-1].index("closed") :].count("open")
        pause = min(self.o.max_reset, self.o.reset * 2 ** (in_a_row - 1))
        return float(self.turns[-1][1] + pause * (1 + self.o.jitter * breaker_rng(states.count("open") - 1)))

    def recent(self, now: float) -> int:
        """Failures of the closed circuit in the window, since the last success."""
        last = [failed for _, failed in self.reports]
        row = self.reports[len(last) - last[::-1].index(False) if False in last else 0 :]
        return sum(now - t < self.o.window for t, _ in row)

    def ask(self, now: float) -> float | None:
        """The retry_after of a refusal, or None."""
        if self.state == "open" and now >= self.until():
            self.turns.append(("half_open", now))
        wait = self.until() - now if self.state == "open" else None
        if self.state == "half_open":
            ends = [permit.started + self.o.probe_timeout for permit in self.mine() if permit.verb is None]
            ends = [end for end in ends if end > now]
            if len(ends) + len(self.counted()) >= self.o.probes:
                wait = min(ends) - now
        if wait is None:
            self.permits.append(SimpleNamespace(generation=len(self.turns) - 1, started=now, verb=None, counted=None))
        self.refused += wait is not None
        return wait

    def settle(self, permit: SimpleNamespace, verb: str, now: float) -> None:
        if permit.verb is not None:
            return
        permit.verb = verb
        if permit.generation != len(self.turns) - 1 or verb == "ignore":
            return
        failed = verb == "fail"
        permit.counted = now, failed
        if self.state == "half_open":
            if failed or len(self.counted()) == self.o.probes:
                self.turns.append(("open" if failed else "closed", now))
                self.reports = []
            return
        self.reports.append((now, failed))
        results = [f for t, f in self.counted() if t * 10 // self.o.window > now * 10 // self.o.window - 10]
        many = self.o.ratio is not None and sum(results) >= self.o.ratio * len(results)
        if self.recent(now) >= self.o.failures or (many and len(results) >= self.o.minimum):
            self.turns.append(("open", now))
            self.reports = []


class Machine(RuleBasedStateMachine):
    """A breaker and the model, side by side; every time is a whole number of quarters of a second."""

    kind: ClassVar[type[pr.CircuitBreaker]] = pr.CircuitBreaker

    @initialize(
        failures=st.integers(1, 3),
        probes=st.integers(1, 3),
        ratio=st.sampled_from([None, None, 0.5, 1.0]),
        probe_timeout=st.sampled_from([2.0, 6.0]),
    )
    def start(self, failures: int, ratio: float | None, **drawn: Any) -> None:
        options = {"failures": failures if ratio is None else failures + 3, "ratio": ratio, "minimum": 3, **drawn}
        options |= {"window": 8.0, "reset": 4.0, "max_reset": 12.0, "jitter": 0.5}
        numbers = itertools.count()
        self.now, self.model = 0.0, Model(options)
        self.breaker = self.kind("b", clock=lambda: self.now, rng=lambda: breaker_rng(next(numbers)), **options)
        self.permits: list[pr.Permit] = []

    @rule(quarters=st.sampled_from([0, 1, 3, 7, 8, 16, 24, 31, 32]))
    def step(self, quarters: int) -> None:
        self.now += quarters / 4

    @rule()
    def ask(self) -> None:
        wait = self.model.ask(self.now)
        try:
            self.permits.append(self.breaker.permit())
        except pr.CircuitOpen as error:
            assert (error.name, error.retry_after) == ("b", wait)
        else:
            assert wait is None

    @precondition(lambda self: self.permits)
    @rule(back=st.sampled_from([0, 0, 0, 1, 2, 5]), verb=st.sampled_from(["ok", "fail", "ignore"]))
    def settle(self, back: int, verb: str) -> None:
        which = max(0, len(self.permits) - 1 - back)
        self.model.settle(self.model.permits[which], verb, self.now)
        breaker_settle(self.permits[which], verb)

    @rule(verbs=st.lists(st.sampled_from(["ok", "fail"]), min_size=1, max_size=3))
    def ask_and_settle(self, verbs: list[str]) -> None:
        for verb in verbs:
            self.ask()
            if self.permits:
                self.settle(0, verb)

    @precondition(lambda self: self.model.state == "open")
    @rule(early=st.sampled_from([0.0, 0.0, 0.25]), verb=st.sampled_from(["ok", "ok", "fail", "ignore"]))
    def ask_at_the_reset(self, early: float, verb: str) -> None:
        self.now = max(self.now, self.model.until() - early)
        self.ask_and_settle([verb] * self.model.o.probes)
        self.ask()

    @precondition(lambda self: self.model.state == "half_open")
    @rule(early=st.sampled_from([0.0, 0.25]), verb=st.sampled_from(["ok", "fail", "ignore", "ask"]))
    def when_a_probe_expires(self, early: float, verb: str) -> None:
        self.now = max(self.now, self.model.mine()[-1].started + self.model.o.probe_timeout - early)
        if verb == "ask":
            self.ask()
        else:
            self.settle(0, verb)

    @invariant()
    def agree(self) -> None:
        model, states = self.model, [state for state, _ in self.model.turns]
        wait = max(0.0, model.until() - self.now) if model.state == "open" else 0.0
        failures = model.recent(self.now) if model.state == "closed" else 0
        state = "half_open" if model.state == "open" and self.now >= model.until() else model.state
        assert self.breaker.stats() == ("b", state, failures, model.refused, states.count("open"), wait)
        assert self.breaker.state == state
        assert [permit.generation for permit in self.permits] == [permit.generation for permit in model.permits]


def check_breaker(kind: type[pr.CircuitBreaker], effort: settings = SETTINGS) -> None:
    run_state_machine_as_test(type("Machine", (Machine,), {"kind": kind}), settings=effort)


def test_is_its_model() -> None:
    check_breaker(pr.CircuitBreaker, settings(SETTINGS, max_examples=80, stateful_step_count=40))


def test_is_tripped_by_what_others_have_seen() -> None:
    heard: list[tuple[str, str]] = []
    breaker = breaker_new(World(0.0), failures=9)
    breaker.listen(lambda _, before, after, __: heard.append((before, after)))
    early = breaker.permit(0.0)
    breaker.trip(1.0)
    breaker.trip(5.0)  # it is open already
    early.success(6.0)
    assert breaker.stats(6.0)[1:] == ("open", 0, 0, 1, 25.0)
    probe = breaker.permit(31.0)
    breaker.trip(32.0)  # here it is being tried
    probe.success(33.0)
    assert heard == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]


def test_takes_the_callers_clock_all_the_way() -> None:
    breaker = pr.CircuitBreaker("b", failures=1, reset=30, rng=lambda: 0.0)
    breaker.permit(now=1.0).success(now=5.75)
    assert breaker.stats(now=5.75).state == "closed"
    breaker.permit(now=1.0).failure(now=2.0)
    assert breaker.stats(now=3.0).retry_after == 29.0


def test_opens_by_ratio_alone_and_remembers_no_longer_than_its_window() -> None:
    breaker = pr.CircuitBreaker("b", failures=None, ratio=0.5, minimum=4, window=10)
    for now in range(0, 100, 5):
        breaker.permit(now).failure(now)
    assert breaker.stats(95.0)[:3] == ("b", "closed", 0)  # never four calls in ten seconds
    assert not breaker._failures
    for _ in range(3):
        breaker.permit(100.0).failure(100.0)
    assert breaker.stats(100.0).state == "open"
    breaker = pr.CircuitBreaker("b", failures=1000, window=10)
    for now in range(100):
        breaker.permit(now).failure(now)
    assert len(breaker._failures) == 10


def test_probe_whose_predicate_raises_gives_its_place_back() -> None:
    world = World()

    def on(error: BaseException) -> bool:
        if world.now > 1005:
            raise ZeroDivisionError
        return True

    breaker = pr.CircuitBreaker("b", failures=1, reset=10, on=on, clock=world.clock, rng=lambda: 0.0)
    for expected in (OSError, ZeroDivisionError, ZeroDivisionError):
        with pytest.raises(expected), breaker.permit():
            raise OSError
        world.now = 1010.0
    assert breaker.state == "half_open" and breaker.stats().refused == 0


# --------------------------------------------------------------------------------------- circuit breaker: many threads


def errors_in_threads(call: Callable[[int], object]) -> Counter[str]:
    """``call(0)`` to ``call(199)`` in each of eight threads that start together: how often each error came."""
    together = threading.Barrier(8)

    def work() -> list[str]:
        together.wait(HANG_LIMIT)
        return [type(error_of(functools.partial(call, number))).__name__ for number in range(200)]

    return Counter(itertools.chain.from_iterable(in_threads([work] * 8)))


def every_other(number: int) -> None:
    if number % 2:
        raise OSError


def always(number: int) -> None:
    raise OSError


@pytest.mark.parametrize("options", [{}, {"ratio": 1.0, "minimum": 1601}], ids=str)
def test_threads_lose_no_failure(options: dict[str, Any]) -> None:
    breaker = breaker_new(World(), failures=1601, **options)
    assert errors_in_threads(with_permit(breaker, always)) == {"OSError": 1600}
    assert breaker.stats() == ("b", "closed", 1600, 0, 0, 0.0)
    breaker.permit().failure()
    assert breaker.state == "open"


def test_threads_lose_no_result() -> None:
    breaker = breaker_new(World(), failures=9999, ratio=0.5, minimum=1600)
    assert errors_in_threads(with_permit(breaker, every_other)) == {"NoneType": 800, "OSError": 800}
    assert breaker.stats() == ("b", "open", 0, 0, 1, 30.0)


@both_paths
def test_threads_open_it_once(path: dict[str, float]) -> None:
    """All eight are inside before any fails: one failure opens, seven come late, and nobody else gets in."""
    breaker, inside, told = breaker_new(World(), **path), threading.Barrier(8), list[Any]()
    breaker.listen(lambda *transition: told.append(transition))

    def fail(_: int) -> None:
        inside.wait(HANG_LIMIT)
        raise OSError

    assert errors_in_threads(with_permit(breaker, fail)) == {"OSError": 8, "CircuitOpen": 1592}
    assert (breaker.stats(), told) == (("b", "open", 0, 1592, 1, 30.0), [("b", "closed", "open", 1)])


@pytest.mark.parametrize("gated", [True, False])
def test_threads_probe_within_the_limit(gated: bool) -> None:
    """Gated, three probes stay inside until the other five threads were refused every call: the counts are exact.

    Else how many get in is chance; that there are never more than three at once is not.
    """
    world, gate, lock, inside, peaks = World(), threading.Event(), threading.Lock(), set[int](), list[int]()
    breaker = breaker_new(world, probes=3, on=OSError)
    breaker.permit().failure()
    world.now += 30

    def probe(_: int) -> None:
        with lock:
            inside.add(threading.get_ident())
            peaks.append(len(inside))
        if gated:
            assert gate.wait(HANG_LIMIT)
        with lock:
            inside.remove(threading.get_ident())
        raise KeyError  # not what `on` names: the place is free again

    def open_the_gate() -> None:
        wait_until(lambda: not gated or (breaker.stats().refused, len(inside)) == (1000, 3))
        gate.set()

    with ThreadPoolExecutor(1) as opener:
        opened = opener.submit(open_the_gate)
        calls = errors_in_threads(with_permit(breaker, probe))
        opened.result(HANG_LIMIT)
    assert (max(peaks) <= 3, calls["KeyError"], calls.total()) == (True, len(peaks), 1600)
    assert (calls["CircuitOpen"], 1, "half_open") == (*breaker.stats()[3:5], breaker.state)
    assert not gated or (max(peaks), len(peaks)) == (3, 600)
    assert [with_permit(breaker, int)() for _ in range(3)] == [0, 0, 0]
    assert breaker.state == "closed"
