"""retry, RetryPolicy, RetryBudget: rows, properties, both shells."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import primitives as pr
from tests.helpers.base import SETTINGS, World, run_task, ticks
from tests.helpers.mechanisms import error_of, in_threads


@pytest.mark.parametrize(
    ("policy", "attempt", "rng", "retry_after", "elapsed", "delay"),
    [
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 1, 0.5, None, 0.0, 0.5),
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 2, 0.5, None, 0.0, 1.0),
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 3, 0.5, None, 0.0, 2.0),
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 4, 0.5, None, 0.0, None),  # attempts
        (pr.RetryPolicy(4, 1.0, 30.0, 100.0), 5, 0.5, None, 0.0, None),
        (pr.RetryPolicy(1), 1, 0.5, None, 0.0, None),
        (pr.RetryPolicy(1), 1, 0.5, 0.0, 0.0, None),  # attempts bound Retry-After too
        (pr.RetryPolicy(99, 1.0, 3.0, 100.0), 3, 0.5, None, 0.0, 1.5),  # cap, then jitter
        (pr.RetryPolicy(99, 1.0, 3.0, 100.0), 98, 0.25, None, 0.0, 0.75),
        (pr.RetryPolicy(10**9, 1.0, 3.0, 100.0), 10**8, 0.5, None, 0.0, 1.5),  # no overflow
        (pr.RetryPolicy(10**9, 1e300, 3.0, 100.0), 10**8, 0.5, None, 0.0, 1.5),
        (pr.RetryPolicy(10**9, 0.0, 3.0, 100.0), 10**8, 0.5, None, 0.0, 0.0),
        (pr.RetryPolicy(10**9, 1.0, 0.0, 100.0), 7, 0.5, None, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.5, None, 6.0, 4.0),  # total, to the second
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.5, None, 6.001, None),
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.0, None, 10.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 10.0), 1, 0.0, None, 10.1, None),
        (pr.RetryPolicy(9, 8.0, 30.0, 0.0), 1, 0.0, None, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 50.0, 0.0, 50.0),  # Retry-After wins, over the cap too
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 0.0, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, -5.0, 0.0, 0.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 100.0, 0.0, 100.0),
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, 100.1, 0.0, None),  # but never past total
        (pr.RetryPolicy(9, 8.0, 30.0, 100.0), 1, 0.5, float("inf"), 0.0, None),
    ],
)
def test_policy_rows(
    policy: pr.RetryPolicy, attempt: int, rng: float, retry_after: float | None, elapsed: float, delay: float | None
) -> None:
    assert policy.delay(attempt, lambda: rng, retry_after, elapsed) == delay


def test_policy_defaults_and_refusals() -> None:
    policy = pr.RetryPolicy()
    assert (policy.attempts, policy.base, policy.cap, policy.total) == (3, 0.5, 30.0, 120.0)
    assert 0.0 <= (policy.delay(1) or 0.0) <= 0.5
    assert pr.RetryPolicy(total=0.0).delay(1, lambda: 0.0) == 0.0
    with pytest.raises(AttributeError):
        policy.attempts = 9  # type: ignore[misc]
    for attempts in (0, -1):
        with pytest.raises(ValueError, match="attempts must be at least 1"):
            pr.RetryPolicy(attempts)
    with pytest.raises(TypeError):
        pr.RetryPolicy(2.5)  # type: ignore[arg-type]
    for wrong in ({"base": -0.1}, {"cap": -1.0}, {"total": -1.0}, {"base": float("nan")}, {"total": float("nan")}):
        with pytest.raises(ValueError, match="are seconds, not below 0"):
            pr.RetryPolicy(**wrong)  # type: ignore[arg-type]


def check_delays(policy_type: type[pr.RetryPolicy], effort: settings = SETTINGS) -> None:
    """In [0, cap], never past total, a number for every attempt but the last, and Retry-After as it was asked for."""
    seconds = st.floats(0.0, 1e4)

    @settings(effort, max_examples=2 * effort.max_examples)
    @given(
        st.integers(1, 80), seconds, seconds, seconds, st.integers(1, 10**6), st.none() | seconds, seconds, st.randoms()
    )
    def check(
        attempts: int,
        base: float,
        cap: float,
        total: float,
        attempt: int,
        retry_after: float | None,
        elapsed: float,
        rng: random.Random,
    ) -> None:
        policy = policy_type(attempts, base, cap, total)
        for number in (attempt, attempts - 1, attempts, 1):
            delay = policy.delay(number, rng.random, retry_after, elapsed)
            wanted = cap if retry_after is None else retry_after
            if delay is None:
                assert number >= attempts or elapsed + wanted > total
                continue
            assert number < attempts
            assert elapsed + delay <= total
            assert 0.0 <= delay <= wanted
            assert retry_after is None or delay == retry_after

    check()


def check_spread(policy_type: type[pr.RetryPolicy], effort: settings = SETTINGS) -> None:
    """Waits at the cap are uniform in [0, cap]: a herd that failed together does not come back together."""
    rng = random.Random(5).random
    policy = policy_type(attempts=1000, base=0.5, cap=30.0, total=1e9)
    for attempt in (8, 20, 62, 63, 64, 500):
        delays = sorted(policy.delay(attempt, rng) or 0.0 for _ in range(400))
        assert len(set(delays)) >= 399
        assert delays[-1] <= 30.0
        for quarter in range(4):
            inside = sum(7.5 * quarter <= delay < 7.5 * (quarter + 1) for delay in delays)
            assert 60 <= inside <= 140


def check_backoff(backoff_type: type[pr.Backoff], effort: settings = SETTINGS) -> None:
    """The n-th wait since ``reset`` is a share of min(cap, base * 2**(n-1)), for ever; at the cap they differ."""

    @effort
    @given(st.floats(0.0, 100.0), st.floats(0.0, 100.0), st.lists(st.integers(0, 12), max_size=4), st.randoms())
    def check(base: float, cap: float, runs: list[int], rng: random.Random) -> None:
        draws = list[float]()
        backoff = backoff_type(base, cap, lambda: draws.append(rng.random()) or draws[-1])  # type: ignore[func-returns-value]
        for length in runs:
            for n in range(length):
                assert backoff.next() == draws[-1] * min(cap, base * 2.0**n) and backoff.failures == n + 1
            backoff.reset()
            assert backoff.failures == 0

    check()
    herd = backoff_type(0.5, 30.0, random.Random(5).random)
    waits = [herd.next() for _ in range(5000)][20:]
    assert len(set(waits)) > 4900 and max(waits) <= 30.0 and 14.0 < sum(waits) / len(waits) < 16.0


def check_budget(budget_type: type[pr.RetryBudget], effort: settings = SETTINGS) -> None:
    """retries <= reserve + ratio * requests at every step, and no retry refused that the budget could pay."""

    @effort
    @given(st.integers(0, 1000), st.integers(0, 5), st.lists(st.integers(0, 30)))
    def check(thousandths: int, reserve: int, runs: list[int]) -> None:
        budget = budget_type(thousandths / 1000, reserve)
        saved = Fraction(reserve)
        requests = retries = refused = 0
        for length in runs:
            for turn in range(length):
                if turn % 3 == 0:
                    budget.request()
                    requests += 1
                    saved = min(Fraction(max(reserve, 1)), saved + Fraction(thousandths, 1000))
                elif budget.try_retry():
                    retries += 1
                    saved -= 1
                else:
                    refused += 1
                    assert saved < 1
                assert 1000 * retries <= 1000 * reserve + thousandths * requests
                assert budget.stats() == pr.RetryBudgetStats(requests, retries, refused, float(saved))

    check()


PROPERTIES: list[tuple[Callable[..., None], type]] = [
    (check_delays, pr.RetryPolicy),
    (check_spread, pr.RetryPolicy),
    (check_budget, pr.RetryBudget),
    (check_backoff, pr.Backoff),
]


@pytest.mark.parametrize(("check", "kind"), PROPERTIES, ids=lambda x: x.__name__)
def test_keeps_its_promises(check: Callable[..., None], kind: type) -> None:
    check(kind)


def test_backoff_refuses() -> None:
    for wrong in ((-0.1, 1.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="base and cap are seconds"):
            pr.Backoff(*wrong)
    assert 0.0 <= pr.Backoff(0.5, 30.0).next() <= 0.5


def test_budget_says_what_it_does_and_refuses() -> None:
    budget = pr.RetryBudget(0.25, 2)
    assert [budget.try_retry() for _ in range(3)] == [True, True, False]
    for _ in range(6):
        budget.request()
    assert repr(budget) == "<RetryBudget requests=6 retries=2 refused=1 saved=1.5>"
    stats = budget.stats()
    assert stats == pr.RetryBudgetStats(requests=6, retries=2, refused=1, saved=1.5)
    with pytest.raises(AttributeError):
        stats.saved = 9.0  # type: ignore[misc]
    assert pr.RetryBudget().stats().saved == 10.0
    assert pr.RetryBudget(0, 0).try_retry() is pr.RetryBudget(1, 0).try_retry() is False
    for ratio, reserve in ((-0.1, 1), (1.1, 1), (float("nan"), 1), (0.1, -1)):
        with pytest.raises(ValueError, match="ratio is a share between 0 and 1"):
            pr.RetryBudget(ratio, reserve)


def test_budget_holds_for_many_threads() -> None:
    budget = pr.RetryBudget(0.1, 5)

    def worker() -> None:
        for _ in range(300):
            budget.request()
            budget.try_retry()

    in_threads([worker] * 6)
    stats = budget.stats()
    assert (stats.requests, stats.retries + stats.refused) == (1800, 1800)
    assert 1 <= stats.retries <= 5 + 180


class Flaky:
    """Fails with the given errors, one a call, then answers."""

    def __init__(self, *errors: BaseException, world: World | None = None, seconds: float = 0.0) -> None:
        self.errors = list(errors)
        self.calls = 0
        self.world, self.seconds = world, seconds

    def __call__(self) -> str:
        self.calls += 1
        if self.world is not None:
            self.world.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        return "done"


Outcome = tuple[str | None, BaseException | None]


Retry = Callable[..., Outcome]


def in_thread(flaky: Flaky, world: World, **options: Any) -> Outcome:
    result: list[str] = []
    error = error_of(lambda: result.append(pr.retry(flaky, clock=world.clock, sleep=world.sleep, **options)))
    return (result or [None])[0], error  # type: ignore[list-item]


def in_task(flaky: Flaky, world: World, **options: Any) -> Outcome:
    async def call() -> str:
        await asyncio.sleep(0)
        return flaky()

    async def main() -> Outcome:
        try:
            return await pr.retry_async(call, clock=world.clock, sleep=world.asleep, **options), None
        except BaseException as error:
            return None, error

    outcome: Outcome = run_task(main())
    return outcome


@pytest.fixture(params=[in_thread, in_task], ids=["threads", "tasks"])
def prim_retry(request: pytest.FixtureRequest) -> Retry:
    shell: Retry = request.param
    return shell


def test_success_at_once(prim_retry: Retry) -> None:
    flaky, world, budget = Flaky(), World(), pr.RetryBudget()
    assert prim_retry(flaky, world, on=OSError, budget=budget) == ("done", None)
    assert (flaky.calls, world.naps) == (1, [])
    assert (budget.stats().requests, budget.stats().retries) == (1, 0)


@pytest.mark.parametrize("failures", [1, 2, 5, 9])
def test_success_after_failures(prim_retry: Retry, failures: int) -> None:
    flaky = Flaky(*(OSError(k) for k in range(failures)))
    world, budget = World(), pr.RetryBudget(0.0, 20)
    policy = pr.RetryPolicy(attempts=10, base=0.5, cap=4.0, total=1000.0)
    assert prim_retry(flaky, world, on=OSError, policy=policy, budget=budget, rng=random.Random(7).random) == (
        "done",
        None,
    )
    again = random.Random(7)
    assert world.naps == [again.random() * min(4.0, 0.5 * 2**k) for k in range(failures)]
    assert flaky.calls == failures + 1
    assert (budget.stats().requests, budget.stats().retries) == (1, failures)


def test_gives_up_with_the_users_own_error_and_its_history(prim_retry: Retry) -> None:
    errors = [OSError("one"), TimeoutError("two"), OSError("three")]
    flaky, world = Flaky(*errors), World()
    result, error = prim_retry(flaky, world, on=OSError, rng=lambda: 0.5)
    assert error is errors[2]
    assert result is None
    assert world.naps == [0.25, 0.5]
    assert error.__notes__ == ["retry: gave up after 3 attempts: OSError: one; TimeoutError: two; OSError: three"]
    assert not any(hasattr(earlier, "__notes__") for earlier in errors[:2])
    assert error.__cause__ is None


def test_survives_an_error_that_cannot_be_shown(prim_retry: Retry) -> None:
    class Mute(OSError):
        def __str__(self) -> str:
            raise ZeroDivisionError

    _, error = prim_retry(Flaky(Mute(), Mute()), World(), on=OSError, policy=pr.RetryPolicy(2))
    assert type(error) is Mute and error.__notes__ == ["retry: gave up after 2 attempts: Mute; Mute"]


def test_an_error_that_is_raised_again_and_again_has_one_history(prim_retry: Retry) -> None:
    error = OSError("the same")
    error.add_note("its own")
    for attempts in (3, 2):
        for _ in range(20):
            prim_retry(Flaky(*[error] * 9), World(), on=OSError, policy=pr.RetryPolicy(attempts, base=0.0))
        history = "; ".join(["OSError: the same"] * attempts)
        assert error.__notes__ == ["its own", f"retry: gave up after {attempts} attempts: {history}"]


def test_history_is_bounded(prim_retry: Retry) -> None:
    flaky = Flaky(*(OSError(str(k)) for k in range(40)))
    _, error = prim_retry(flaky, World(), on=OSError, policy=pr.RetryPolicy(attempts=30, base=0.0))
    assert error is not None
    (note,) = error.__notes__
    assert note == "retry: gave up after 30 attempts: " + "; ".join(f"OSError: {k}" for k in range(20, 30))


def test_with_one_attempt_is_a_plain_call(prim_retry: Retry) -> None:
    mine = OSError("mine")
    flaky, world, budget = Flaky(mine), World(), pr.RetryBudget()
    assert prim_retry(flaky, world, on=OSError, policy=pr.RetryPolicy(attempts=1), budget=budget) == (None, mine)
    assert (flaky.calls, world.naps, hasattr(mine, "__notes__")) == (1, [], False)
    assert (budget.stats().retries, budget.stats().refused) == (0, 0)


@pytest.mark.parametrize(
    ("on", "error", "calls"),
    [
        (OSError, OSError(), 2),
        (OSError, ConnectionResetError(), 2),
        (OSError, ValueError(), 1),
        ((OSError, ValueError), ValueError(), 2),
        ((OSError, ValueError), KeyError(), 1),
        ((), OSError(), 1),
        (lambda error: "again" in str(error), ValueError("again"), 2),
        (lambda error: "again" in str(error), ValueError("no"), 1),
        (Exception, ValueError(), 2),
    ],
)
def test_on(prim_retry: Retry, on: Any, error: Exception, calls: int) -> None:
    error = error.with_traceback(None)
    flaky, world = Flaky(error), World()
    outcome = prim_retry(flaky, world, on=on)
    assert flaky.calls == calls
    assert outcome == (("done", None) if calls == 2 else (None, error))
    assert len(world.naps) == calls - 1


@pytest.mark.parametrize(
    "on", [[OSError], {OSError}, None, OSError(), "OSError", (OSError, "x"), (OSError, None)], ids=str
)
def test_refuses_what_is_no_kind_of_error_at_once(prim_retry: Retry, on: Any) -> None:
    flaky, budget = Flaky(OSError("mine")), pr.RetryBudget()
    _, error = prim_retry(flaky, World(), on=on, budget=budget)
    assert isinstance(error, TypeError) and "on must be" in str(error)
    assert (flaky.calls, budget.stats().requests) == (0, 0)


def test_the_blocking_shell_does_not_take_a_coroutine_for_an_answer() -> None:
    made: list[int] = []

    async def call() -> None:
        raise AssertionError("never run")

    def counted() -> Any:
        made.append(1)
        return call()

    for function in (call, counted):
        with pytest.raises(TypeError, match="retry_async"):
            pr.retry(function, on=Exception, sleep=lambda _: pytest.fail("retried"))
    assert made == [1]


def test_stops_at_an_unwanted_error(prim_retry: Retry) -> None:
    unwanted = KeyError("k")
    flaky, world = Flaky(OSError("one"), unwanted), World()
    assert prim_retry(flaky, world, on=OSError) == (None, unwanted)
    assert flaky.calls == 2
    assert unwanted.__notes__ == ["retry: gave up after 2 attempts: OSError: one; KeyError: 'k'"]


def test_lets_a_failing_predicate_be_seen(prim_retry: Retry) -> None:
    def on(error: BaseException) -> bool:
        raise LookupError("the predicate")

    mine = OSError()
    _, error = prim_retry(Flaky(mine), World(), on=on)
    assert isinstance(error, LookupError)
    assert error.__context__ is mine


def test_budget_exhausted(prim_retry: Retry) -> None:
    budget, world = pr.RetryBudget(0.0, 3), World()
    policy = pr.RetryPolicy(attempts=3, base=0.0)
    calls = []
    for _ in range(4):
        flaky = Flaky(*(OSError() for _ in range(9)))
        _, error = prim_retry(flaky, world, on=OSError, policy=policy, budget=budget)
        assert isinstance(error, OSError)
        calls.append(flaky.calls)
    assert calls == [3, 2, 1, 1]
    assert budget.stats() == pr.RetryBudgetStats(requests=4, retries=3, refused=3, saved=0.0)


def test_after_attribute_wins(prim_retry: Retry) -> None:
    def error(seconds: float | None) -> OSError:
        busy = OSError("busy")
        busy.retry_after = seconds  # type: ignore[attr-defined]
        return busy

    world = World()
    flaky = Flaky(error(7.0), error(None), error(0.0), error(61.0))
    policy = pr.RetryPolicy(attempts=9, base=1.0, cap=5.0, total=60.0)
    _, last = prim_retry(flaky, world, on=OSError, policy=policy, rng=lambda: 0.5)
    assert world.naps == [7.0, 1.0, 0.0]
    assert getattr(last, "retry_after", None) == 61.0


def test_counts_the_time_of_the_calls(prim_retry: Retry) -> None:
    world = World()
    flaky = Flaky(*(OSError() for _ in range(9)), world=world, seconds=4.0)
    policy = pr.RetryPolicy(attempts=9, base=1.0, cap=1.0, total=11.0)
    assert isinstance(prim_retry(flaky, world, on=OSError, policy=policy, rng=lambda: 0.5)[1], OSError)
    assert world.naps == [0.5, 0.5]  # starts at 0, 4.5, 9; at 13 the total is over
    assert flaky.calls == 3


def check_never_retried(retry: Retry) -> None:
    for error in (KeyboardInterrupt(), asyncio.CancelledError(), SystemExit(), GeneratorExit()):
        flaky, world, budget = Flaky(error), World(), pr.RetryBudget()
        assert retry(flaky, world, on=BaseException, budget=budget) == (None, error)
        assert (flaky.calls, world.naps, budget.stats().retries) == (1, [], 0)
        assert not hasattr(error, "__notes__")


def test_never_retries_what_ends_a_program(prim_retry: Retry) -> None:
    check_never_retried(prim_retry)


@pytest.mark.parametrize("shell", ["threads", "tasks"])
def test_leaves_no_reference_cycle(shell: str) -> None:
    """An error keeps its frames, and what they hold, alive: a cycle would do so until the collector comes."""

    class Mine(Exception):
        pass

    policy = pr.RetryPolicy(attempts=2, base=0.0)

    def fail() -> weakref.ref[BaseException] | None:
        try:
            pr.retry(Flaky(Mine(), Mine()), on=Mine, policy=policy)
        except Mine as error:
            return weakref.ref(error)
        return None

    async def afail() -> weakref.ref[BaseException] | None:
        async def call() -> None:
            raise Mine

        try:
            await pr.retry_async(call, on=Mine, policy=policy)
        except Mine as error:
            return weakref.ref(error)
        return None

    enabled = gc.isenabled()
    gc.disable()
    try:
        left = fail() if shell == "threads" else run_task(afail())
        assert left is not None
        assert left() is None
    finally:
        if enabled:
            gc.enable()


def test_async_cancelled_at_every_step() -> None:
    async def scenario(step: int) -> bool:
        calls, budget = [0], pr.RetryBudget(0.0, 5)

        async def call() -> str:
            calls[0] += 1
            await ticks(2)
            if calls[0] < 3:
                raise OSError
            return "done"

        async def nap(seconds: float) -> None:
            await ticks(2)

        policy = pr.RetryPolicy(attempts=5)
        task = asyncio.create_task(pr.retry_async(call, on=BaseException, policy=policy, budget=budget, sleep=nap))
        await ticks(step)
        finished = not task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        made = calls[0]
        await ticks()
        assert calls[0] == made
        assert budget.stats().retries in ({2} if finished else {max(0, made - 1), made})
        assert outcome == "done" if finished else isinstance(outcome, asyncio.CancelledError)
        return finished

    outcomes = [run_task(scenario(step)) for step in range(20)]
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (False, True)
