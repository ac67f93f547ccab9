"""SingleFlight: one suite over threads, tasks and both; cancelled at every step."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import threading
import traceback
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

import coordination as co
import primitives as pr
from tests.helpers.base import HANG_LIMIT, HUNT, SETTINGS, World, run_task, ticks, wait_until
from tests.helpers.mechanisms import (
    FlightDesk,
    FlightError,
    FlightLoad,
    LoopMachine,
    PrimTask,
    PrimThread,
    Shell,
    gated_block,
    prim_stranded,
    simulated,
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
    assert "key" not in desk.flights._flights
    desk.flights.forget("never was")
    new = [desk.ask(load)]
    load.begun(2)
    new.append(desk.ask(load))
    desk.waiting(1)
    load.gates[0].set_result("old")
    assert [worker.result() for worker in old] == ["old"] * 2 and "key" in desk.flights._flights
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


def test_a_leader_that_leaves_does_not_end_the_load(desk: FlightDesk) -> None:
    if desk.shell.kind == "threads":
        return  # there a leader loads by itself
    if desk.shell.kind == "mixed":
        next(desk.shell.homes)  # the next one is a task
    load = FlightLoad()
    leader = desk.ask(load)
    gate = load.begun(1)
    followers = [desk.ask(load) for _ in range(3)]
    desk.waiting(3)
    leader.cancel()
    followers.append(desk.ask(load))
    desk.waiting(4)
    gate.set_result("answer")
    assert [worker.result() for worker in followers] == ["answer"] * 4 and load.begun(1)
    assert desk.idle()


def test_who_leaves_last_takes_the_load_along() -> None:
    async def main() -> None:
        flights, gate, ended = pr.SingleFlight(), asyncio.Event(), list[str]()

        async def load() -> None:
            try:
                await gate.wait()
            finally:
                await ticks(3)
                ended.append("load")

        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
            tasks = [asyncio.create_task(flights.do_async("key", load)) for _ in range(3)]
            await ticks()
            for number in order:
                assert not ended and "key" in flights._flights
                tasks[number].cancel()
                await ticks(2)
            assert "key" not in flights._flights, "who comes now begins anew"
            assert not tasks[order[-1]].done(), "it goes when the load has ended"
            await asyncio.wait(tasks)
            assert ended.pop() == "load" and len(asyncio.all_tasks()) == 1
        assert flights.stats() == pr.SingleFlightStats(0, 0, 3, 0)

    run_task(main())


def test_a_load_that_is_cancelled_before_it_began_is_replaced() -> None:
    async def main() -> None:
        flights, loads = pr.SingleFlight(), list[str]()

        async def load(name: str) -> str:
            loads.append(name)
            return name

        tasks = [asyncio.create_task(flights.do_async("key", functools.partial(load, name))) for name in "abc"]
        await ticks(1)
        (task,) = asyncio.all_tasks() - {*tasks, asyncio.current_task()}
        assert flights.stats().waiting == 2 and not loads
        task.cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled() and [task.result() for task in tasks[1:]] == ["b", "b"] and loads == ["b"]
        assert flights.stats() == pr.SingleFlightStats(0, 0, 2, 1)

    run_task(main())


def test_a_thread_that_leaves_last_ends_the_load_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co.Waiter, "block", gated_block)
    shell, flights, load = Shell("tasks"), pr.SingleFlight(), FlightLoad()
    leader = shell.start(lambda: None, lambda: flights.do_async("key", load.aload))
    load.begun(1)
    follower = PrimThread(lambda: flights.do("key", load), gated=True)
    wait_until(lambda: flights.stats().waiting == 1)
    leader.cancel()
    assert "key" in flights._flights
    follower.cancel()
    assert "key" not in flights._flights
    wait_until(load.gates[0].cancelled)
    shell.loops[0].close()


def test_callers_that_give_up_before_the_load_ends() -> None:
    """A load of 0.12 s; one caller each 10 ms, who waits for 0.1 s: 9 of 12 live to see it."""

    async def main(world: World) -> tuple[int, int]:
        flights, loads, answered = pr.SingleFlight(), 0, 0

        async def load() -> str:
            nonlocal loads
            loads += 1
            await asyncio.sleep(0.12)
            return "answer"

        async def caller() -> None:
            nonlocal answered
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    assert await flights.do_async("key", load) == "answer"
                    answered += 1

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(caller()))
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        return loads, answered

    assert simulated(main) == (5, 45)


def test_a_coroutine_is_no_answer() -> None:
    async def load() -> None:
        raise AssertionError("never run")

    flights, cache = pr.SingleFlight(), pr.TTLCache[str, Any]()
    for ask in (flights.do, cache.get_or_load):
        with pytest.raises(TypeError, match="coroutine"):
            ask("key", load)
    assert "key" not in cache and cache.get_or_load("key", lambda: 7) == 7
    for ask_async in (flights.do_async, cache.get_or_load_async):
        with pytest.raises(TypeError):
            run_task(ask_async("other", lambda: 7))  # type: ignore[arg-type,return-value]
    assert "other" not in cache


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


class Flight:
    """Who waits, in order, and whose load it is."""

    def __init__(self, leader: int) -> None:
        self.leader, self.aboard = leader, list[int]()


class Machine(LoopMachine):
    """Tasks that ask for two keys; loads that answer, fail or are killed; and who leaves, the leader too."""

    flight_type: ClassVar[type[pr.SingleFlight]] = pr.SingleFlight

    @initialize()
    def start(self) -> None:
        self.started = True
        self.flights = self.flight_type()
        self.known: dict[int, Flight] = {}  # by key
        self.forgotten: list[Flight] = []
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

    def under_way(self) -> list[Flight]:
        return [*self.known.values(), *self.forgotten]

    def ends(self, flight: Flight) -> None:
        self.known = {key: other for key, other in self.known.items() if other is not flight}
        self.forgotten = [other for other in self.forgotten if other is not flight]

    @rule(key=st.integers(0, 1), passengers=st.integers(1, 4))
    def ask(self, key: int, passengers: int) -> None:
        for _ in range(passengers):
            self.known.setdefault(key, Flight(len(self.tasks))).aboard.append(len(self.tasks))
            self.spawn(self.passenger(len(self.tasks), key))

    @precondition(lambda self: self.under_way())
    @rule(data=st.data(), fails=st.booleans())
    def answer(self, data: st.DataObject, fails: bool) -> None:
        flight = data.draw(st.sampled_from(self.under_way()))
        gate, answer = self.gates[flight.leader], FlightError() if fails else object()
        self.now(lambda: gate.set_exception(answer) if isinstance(answer, FlightError) else gate.set_result(answer))
        self.settle()
        assert all(self.outcomes.get(number) is answer for number in flight.aboard)
        self.ends(flight)

    def killed(self, flight: Flight) -> None:
        """The leader has that from it, if it is still there; the oldest follower loads."""
        if flight.leader in flight.aboard:
            flight.aboard.remove(flight.leader)
        if flight.aboard:
            flight.leader = flight.aboard[0]
        else:
            self.ends(flight)

    @precondition(lambda self: self.under_way())
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        flight = data.draw(st.sampled_from(self.under_way()))
        leader = flight.leader
        self.now(self.gates[leader].cancel)
        self.settle()
        assert isinstance(self.outcomes.get(leader), asyncio.CancelledError)
        self.killed(flight)

    @precondition(lambda self: self.under_way())
    @rule(
        data=st.data(),
        victims=st.integers(1, 5),
        steps=st.integers(0, 4),
        ends=st.sampled_from(["", "", "kill", "answer"]),
    )
    def cancel_some(self, data: st.DataObject, victims: int, steps: int, ends: str) -> None:
        """Cancel from the first or second on, with so many steps between; before that the load may end in one turn."""
        flight = data.draw(st.sampled_from(self.under_way()))
        first = data.draw(st.integers(0, 1)) if len(flight.aboard) > 1 else 0
        gone, gate = flight.aboard[first : first + victims], self.gates[flight.leader]

        def turn() -> None:
            if ends:
                gate.cancel() if ends == "kill" else gate.set_result("answer")
            self.tasks[gone[0]].cancel()

        self.now(turn)
        for number in gone[1:]:
            for _ in range(steps):
                self.now(lambda: None)
            self.now(self.tasks[number].cancel)
        self.settle()
        assert isinstance(self.outcomes.get(gone[0]), asyncio.CancelledError)
        left = [number for number in flight.aboard if number not in self.outcomes]
        if ends == "answer":
            assert not left
            assert all(number in gone or self.outcomes[number] == "answer" for number in flight.aboard)
            self.ends(flight)
        elif ends == "kill":
            loading = [n for n in flight.aboard if n in self.gates and not self.gates[n].done()]
            assert len(loading) == bool(left), "the rest has a load"
            flight.aboard = left
            if left:
                flight.leader = loading[0]
            else:
                self.ends(flight)
        else:
            assert left == [number for number in flight.aboard if number not in gone]
            assert gate.done() is not bool(left), "the last one took the load along"
            flight.aboard = left
            if not left:
                self.ends(flight)

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
            under_way = self.under_way()
            aboard = {n for flight in under_way for n in flight.aboard}
            assert {flight.leader for flight in under_way} == {n for n, gate in self.gates.items() if not gate.done()}
            assert aboard == {*range(len(self.tasks))} - self.outcomes.keys()
            waiting = sum(len([n for n in flight.aboard if n != flight.leader]) for flight in self.known.values())
            assert self.flights.stats()[:3] == (len(self.known), waiting, len(self.gates))
            assert len(asyncio.all_tasks(self.loop)) == len(under_way) + sum(len(one.aboard) for one in under_way)


def check_flights(flight_type: type[pr.SingleFlight], effort: settings = SETTINGS) -> None:
    machine = type("Machine", (Machine,), {"flight_type": flight_type, "debug": effort is not HUNT})
    run_state_machine_as_test(machine, settings=effort)


def test_does_as_its_model() -> None:
    check_flights(pr.SingleFlight)
