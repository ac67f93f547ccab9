"""SingleFlight: one suite over threads, tasks and both; cancelled at every step."""

from __future__ import annotations

import asyncio
import gc
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

import primitives as pr
from tests.helpers.base import HANG_LIMIT, HUNT, SETTINGS, World, run_task, wait_until
from tests.helpers.mechanisms import (
    FlightDesk,
    FlightError,
    FlightLoad,
    LoopMachine,
    PrimTask,
    PrimThread,
    Shell,
    prim_stranded,
)


@pytest.fixture(params=["flight", "cache"])
def desk(request: pytest.FixtureRequest, prim_shell: Shell) -> Iterator[FlightDesk]:
    size = threading.stack_size(256 * 1024)
    yield FlightDesk(prim_shell, request.param)
    threading.stack_size(size)


def flight_error(worker: PrimThread | PrimTask) -> BaseException | None:
    return worker.outcome.exception(HANG_LIMIT)


def test_a_thousand_misses_are_one_load(desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = desk.crowd(load, desk.many)
    load.begun(1).set_result(answer := object())
    assert [worker.result() for worker in workers] == [answer] * len(workers) and load.begun(1)
    assert desk.flights.stats() == pr.SingleFlightStats(0, 0, 1, desk.many)


def test_a_failure_is_one_load_and_everybodys(desk: FlightDesk) -> None:
    load, error = FlightLoad(), FlightError()
    workers = desk.crowd(load, desk.many)
    load.begun(1).set_exception(error)
    assert all(flight_error(worker) is error for worker in workers) and load.begun(1)
    assert desk.flights.stats() == pr.SingleFlightStats(0, 0, 1, desk.many)
    if desk.shell.kind == "tasks":  # threads that raise one error at the same moment lengthen each other's
        assert len(traceback.extract_tb(error.__traceback__)) < 20
    again = desk.ask(load)
    load.begun(2).set_result(2)
    assert again.result() == 2, "a failure is not kept"


def test_a_killed_leader_is_replaced_once(desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = desk.crowd(load, desk.many)
    desk.kill(workers[0], load.begun(1))
    load.begun(2).set_result("answer")
    assert [worker.result() for worker in workers[1:]] == ["answer"] * desk.many and load.begun(2)
    assert isinstance(flight_error(workers[0]), (KeyboardInterrupt, asyncio.CancelledError))
    assert desk.flights.stats() == pr.SingleFlightStats(0, 0, 2, desk.many - 1)


def test_a_cancelled_follower_only_leaves(desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = desk.crowd(load, 3, gated=True)
    workers[2].cancel()
    desk.waiting(2)
    load.begun(1).set_result("answer")
    workers[0].result()
    for worker in workers:
        if isinstance(worker, PrimThread):
            worker.gate.set()
    assert [workers[n].result() for n in (0, 1, 3)] == ["answer"] * 3 and desk.idle()


@pytest.mark.parametrize("followers", [1, 2])
def test_a_follower_cancelled_right_after_its_grant_hands_on(desk: FlightDesk, followers: int) -> None:
    load = FlightLoad()
    leader, heir = desk.crowd(load, 1, gated=True)
    others = [desk.ask(load) for _ in range(followers - 1)]
    desk.waiting(followers)
    heir.cancel(after=lambda: desk.kill(leader, load.gates[0]))
    if others:
        load.begun(2).set_result("answer")
        assert others[0].result() == "answer"
    assert desk.idle() and len(load.gates) == followers
    assert desk.flights.stats().loads == followers, "a lead that was handed on is no load"


def test_a_follower_cancelled_right_after_the_answer_only_leaves(desk: FlightDesk) -> None:
    load = FlightLoad()
    workers = desk.crowd(load, 1, gated=True)

    def answer() -> None:
        load.gates[0].set_result("answer")
        if isinstance(workers[0], PrimThread):
            workers[0].result()

    workers[1].cancel(after=answer)
    assert workers[0].result() == "answer" and desk.idle()


def test_forgotten_keys_are_loaded_anew(desk: FlightDesk) -> None:
    load = FlightLoad()
    old = desk.crowd(load, 1)
    if desk.kind == "cache":
        desk.cache.invalidate("key")
    else:
        desk.flights.forget("key")
    assert not desk.flights.loading("key")
    desk.flights.forget("never was")
    new = [desk.ask(load)]
    load.begun(2)
    new.append(desk.ask(load))
    desk.waiting(1)
    load.gates[0].set_result("old")
    assert [worker.result() for worker in old] == ["old"] * 2 and desk.flights.loading("key")
    load.gates[1].set_result("new")
    assert [worker.result() for worker in new] == ["new"] * 2 and desk.idle()
    assert desk.kind == "flight" or desk.cache.get("key") == "new"


def test_keys_do_not_wait_for_one_another(desk: FlightDesk) -> None:
    loads = {key: FlightLoad() for key in "abc"}
    workers = {key: desk.ask(load, key) for key, load in loads.items()}
    for key in "cab":
        loads[key].begun(1).set_result(key)
        assert workers[key].result() == key


def test_a_failure_leaves_no_cycle(desk: FlightDesk) -> None:
    """The error's traceback has the frames of all who raised it: none of them may lead back to the error."""
    load, seen, flights = FlightLoad(), list[weakref.ref[FlightError]](), desk.flights

    def fail(_: Any) -> None:
        error = FlightError()
        seen.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    def depth() -> int:
        try:
            flights.do("key", lambda: fail(load()))
        except FlightError as error:
            return len(traceback.extract_tb(error.__traceback__))
        return 0

    async def failing() -> None:
        fail(await load.aload())

    async def depth_async() -> int:
        try:
            await flights.do_async("key", failing)
        except FlightError as error:
            return len(traceback.extract_tb(error.__traceback__))
        return 0

    gc.collect()
    gc.disable()
    try:
        workers = []
        for number in range(40):
            workers.append(desk.shell.start(depth, depth_async))
            desk.waiting(number)
        load.begun(1).set_result(None)
        assert all(2 < worker.result() < 12 for worker in workers)
        wait_until(lambda: seen[0]() is None)
        assert len(seen) == 1
    finally:
        gc.enable()


@pytest.mark.parametrize("live", [True, False])
def test_followers_of_a_closed_loop_are_passed_over(live: bool) -> None:
    flights, load = pr.SingleFlight(), FlightLoad()
    leader = PrimThread(lambda: flights.do("key", load))
    load.begun(1)
    stranded = [prim_stranded(flights.do_async("key", load.aload)) for _ in range(2)]
    followers = [PrimThread(lambda: flights.do("key", load))] if live else []
    wait_until(lambda: flights.stats().waiting == 2 + live)
    load.gates[0].set_exception(KeyboardInterrupt())
    assert isinstance(flight_error(leader), KeyboardInterrupt)
    if not live:
        assert flights.stats() == pr.SingleFlightStats(0, 0, 1, 0), "nobody is left to lead"
        followers = [PrimThread(lambda: flights.do("key", load))]
    load.begun(2).set_result("answer")
    assert followers[0].result() == "answer" and flights.stats() == pr.SingleFlightStats(0, 0, 2, 0)
    assert not any(task.done() for task in stranded)


# ---------------------------------------------------------------------- single flight: a walk, cancelled at every step


class Machine(LoopMachine):
    """Tasks that ask for two keys. The model of a flight is its passengers, the leader first."""

    flight_type: ClassVar[type[pr.SingleFlight]] = pr.SingleFlight

    @initialize()
    def start(self) -> None:
        self.started = True
        self.flights = self.flight_type()
        self.known: dict[int, list[int]] = {}  # by key
        self.forgotten: list[list[int]] = []
        self.gates: dict[int, asyncio.Future[Any]] = {}  # of the loads, by passenger, in the order of their calls
        self.outcomes: dict[int, Any] = {}

    async def passenger(self, number: int, key: int) -> None:
        def load() -> asyncio.Future[Any]:
            assert number not in self.gates
            self.gates[number] = self.loop.create_future()
            return self.gates[number]

        try:
            self.outcomes[number] = await self.flights.do_async(key, load)
        except BaseException as error:
            self.outcomes[number] = error

    def under_way(self) -> list[list[int]]:
        return [*self.known.values(), *self.forgotten]

    def leaves(self, flight: list[int]) -> None:
        self.known = {key: other for key, other in self.known.items() if other is not flight}
        self.forgotten = [other for other in self.forgotten if other is not flight]

    @rule(key=st.integers(0, 1), passengers=st.integers(1, 4))
    def ask(self, key: int, passengers: int) -> None:
        for _ in range(passengers):
            self.known.setdefault(key, []).append(len(self.tasks))
            self.spawn(self.passenger(len(self.tasks), key))

    @precondition(lambda self: self.under_way())
    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data: st.DataObject, fails: bool) -> None:
        flight = data.draw(st.sampled_from(self.under_way()))
        gate, answer = self.gates[flight[0]], FlightError() if fails else object()
        self.now(lambda: gate.set_exception(answer) if isinstance(answer, FlightError) else gate.set_result(answer))
        self.settle()
        assert all(self.outcomes.get(number) is answer for number in flight)
        self.leaves(flight)

    @precondition(lambda self: self.under_way())
    @rule(data=st.data(), victims=st.integers(1, 3), steps=st.integers(0, 4))
    def cancel_some(self, data: st.DataObject, victims: int, steps: int) -> None:
        """Cancel from the leader on, or from its first follower on, with so many steps between."""
        flight = data.draw(st.sampled_from(self.under_way()))
        first = data.draw(st.integers(0, 1)) if len(flight) > 1 else 0
        gone = flight[first : first + victims]
        for number in gone:
            self.now(self.tasks[number].cancel)
            for _ in range(steps):
                self.now(lambda: None)
        self.settle()
        assert all(isinstance(self.outcomes.get(number), asyncio.CancelledError) for number in gone)
        del flight[first : first + victims]
        if not flight:
            self.leaves(flight)

    @rule(key=st.integers(0, 1))
    def forget(self, key: int) -> None:
        self.flights.forget(key)
        if key in self.known:
            self.forgotten.append(self.known.pop(key))

    @rule()
    def step(self) -> None: ...

    @rule()
    def cancel(self) -> None: ...  # see cancel_some

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "started"):
            self.settle()
            assert {flight[0] for flight in self.under_way()} == self.gates.keys() - self.outcomes.keys()
            assert {n for flight in self.under_way() for n in flight} == {
                *range(len(self.tasks))
            } - self.outcomes.keys()
            waiting = sum(len(flight) - 1 for flight in self.known.values())
            assert self.flights.stats()[:3] == (len(self.known), waiting, len(self.gates))


def check_flights(flight_type: type[pr.SingleFlight], effort: settings = SETTINGS) -> None:
    machine = type("Machine", (Machine,), {"flight_type": flight_type, "debug": effort is not HUNT})
    run_state_machine_as_test(machine, settings=effort)


def test_does_as_its_model() -> None:
    check_flights(pr.SingleFlight)


@pytest.mark.parametrize("shell", ["threads", "tasks"])
def test_cache_serves_no_value_whose_window_ended_while_loading(shell: str) -> None:
    world = World(0.0)
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10, stale_if_error=10, negative_ttl=3, clock=world.clock)

    def ask(load: Callable[[], Any]) -> Any:
        async def load_async() -> Any:
            return load()

        if shell == "threads":
            return cache.get_or_load("key", load)
        return run_task(cache.get_or_load_async("key", load_async))

    def fail(seconds: float, then: Callable[[str], object] = bool) -> Callable[[], int]:
        def load() -> int:
            world.now += seconds
            then("key")
            raise OSError

        return load

    assert ask(lambda: 1) == 1
    world.now = 12.0
    assert ask(fail(7.0)) == 1  # at 19, within its window
    assert ask(fail(0.0)) == 1 and world.now == 19.0  # not tried again for three seconds
    assert cache.stats().failed == 1
    for then in (bool, cache.invalidate):
        world.now, _ = 100.0, cache.put("key", 1, now=85.0)
        with pytest.raises(OSError):
            ask(fail(10.0 if then is bool else 0.0, then))
    assert "key" not in cache


@pytest.mark.parametrize("shell", ["threads", "tasks"])
def test_cache_keeps_what_is_loaded_as_the_load_says(shell: str) -> None:
    world = World(0.0)
    cache: pr.TTLCache[str, str | None] = pr.TTLCache(ttl=10, negative_ttl=3, maxweight=5, clock=world.clock)

    def ask(key: str, kept: Any) -> str | None:
        async def load() -> Any:
            return kept

        return (
            cache.get_or_load(key, lambda: kept) if shell == "threads" else run_task(cache.get_or_load_async(key, load))
        )

    assert ask("a", pr.Keep(None, negative=True)) is None
    assert ask("b", pr.Keep("long", ttl=100)) == "long"
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, True, False)
    world.now = 3.0
    assert ("a" in cache, "b" in cache) == (False, True)
    assert ask("c", pr.Keep("heavy", weight=6)) == "heavy" and "c" not in cache
    assert ask("d", pr.Keep("filling", weight=5)) == "filling" and len(cache) == 1
    started = cache.generation("b")
    cache.clear()
    assert (len(cache), cache.stats().weight, cache.put("b", "late", generation=started)) == (0, 0.0, False)
