"""The crawl's checkers, tested: bugs are planted, by overriding private methods, and each has to be refused."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest

import coordination as co
import primitives as pr
from bench import runner as bench
from crawl import lease as cs
from crawl import processes as cp
from crawl import sync
from crawl.errors import Postponed
from crawl.frontier import Frontier
from crawl.hosts import HostQueue
from crawl.intake import Intake
from crawl.limits import HostLimits
from crawl.model import Request
from crawl.robots_gate import RobotsGate
from crawl.scheduler import Scheduler
from simulator import crawls as simulate
from simulator import shared_crawls as sim_shared
from simulator.checker import Broken
from tests import test_crawl_processes as processes_tests
from tests.test_core import play


class CarelessFrontier(Frontier):
    """Planted: takes the tokens when a request leaves, not when it is sent."""

    def clear_to_send(self, request: Request, now: float, ahead: float = 0.0) -> float:
        super().clear_to_send(request, now, ahead)
        return 0.0


class ForgetfulVisited(co.Visited[str]):
    def add(self, key: str) -> bool:
        super().add(key)
        return True


class ForgetfulFrontier(Frontier):
    """Planted: a URL that is found while it is in flight is taken for a new one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._intake.visited = ForgetfulVisited()


class LosingScheduler(Scheduler):
    def schedule(self, host: Any, now: float) -> None:
        if not (host.delayed and host.head >= len(host.waiting)):
            super().schedule(host, now)


class LosingFrontier(Frontier):
    """Planted: a request that is put back is forgotten if its host was idle."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._scheduler.__class__ = LosingScheduler


@pytest.mark.parametrize("planted", [CarelessFrontier, ForgetfulFrontier, LosingFrontier])
def test_the_simulation_finds_planted_bugs(planted: type[Frontier]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(200):
            play(seed, planted)


class PlantedUncharged(Frontier):
    """A retry costs no token."""

    def clear_to_send(self, request: Request, now: float, ahead: float = 0.0) -> float:
        return 0.0 if request.attempt > 1 else super().clear_to_send(request, now, ahead)


class PlantedRestless(Frontier):
    """Hands out while a host is paused, and sends."""

    def pause(self, host_name: str, until: float, now: float) -> None:
        super().pause(host_name, now + (until - now) / 2, now)


class AmnesiacScheduler(Scheduler):
    def forget_idle(self, host: HostQueue, now: float) -> None:
        retries, host.delayed = host.delayed, []
        super().forget_idle(host, now)
        host.delayed = retries
        if host.name not in self._hosts:
            self.waiting -= len(retries)


class PlantedAmnesia(Frontier):
    """A host whose bucket is full is forgotten, with its retries."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._scheduler.__class__ = AmnesiacScheduler


class PlantedVisited(co.Visited[str]):
    """Looks before it locks: what another adds meanwhile is not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[str] = []

    def add(self, key: str) -> bool:
        new = key not in self
        self.late.append(key)
        if len(self.late) > 1:
            super().add(self.late.pop(0))
        return new

    def __len__(self) -> int:
        return super().__len__() + (self.late[-1:] != [] and self.late[-1] not in self)


class PlantedRace(Frontier):
    """The visited set is asked outside of the lock."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._intake.visited = PlantedVisited()


class OpenGate(RobotsGate):
    def ask(self, host: HostQueue, now: float) -> Request | None:
        return None if host.delayed_first(now) else super().ask(host, now)


class PlantedOpenGate(Frontier):
    """Robots are not asked for what comes back from a retry or redirect."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._robots.__class__ = OpenGate


class PlantedWedge(Frontier):
    """Robots that were never known keep their host waiting."""

    def finish(self, request: Request, now: float) -> None:
        with self._lock:
            self._leave(request, now)


class PlantedQueuedRobots(Frontier):
    """A retry of robots.txt waits behind the gate that it should open."""

    def put_back(self, request: Request, *more: Any) -> None:
        super().put_back(request, *more)
        host = self._hosts[request.host]
        host.delayed += host.urgent
        host.urgent = []


class LateScheduler(Scheduler):
    def added(self, host: HostQueue, idle: bool, now: float) -> None:
        if host.due == math.inf:
            super().added(host, idle, now)
        else:
            self.waiting += 1


class PlantedLateWakeUp(Frontier):
    """New URLs of a host with an entry in the heap wait for that entry."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._scheduler.__class__ = LateScheduler


class FullBuckets(HostLimits):
    def apply(self, host: HostQueue, now: float) -> None:
        if host.schedule:
            host.schedule = host.gate = None
            rate, burst = self.of(host.name)
            if rate < math.inf:
                host.schedule, host.gate = pr.TokenBucket(rate, burst), pr.TokenBucket(rate, burst)


class PlantedFullBuckets(Frontier):
    """A new rate comes with a new bucket, which is full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._limits.__class__ = FullBuckets


class DeafLimits(HostLimits):
    def _ceiling(self, record: Any) -> float:
        return super()._ceiling(None)


class PlantedDeaf(Frontier):
    """Crawl-delay is not heard."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._limits.__class__ = DeafLimits


class PlantedUnlimited(Frontier):
    """One too many in flight."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"per_host": options["per_host"] + 1})


class EndlessLimits(HostLimits):
    def is_full(self, name: str) -> bool:
        return False


class PlantedGreedy(Frontier):
    """The caps are not asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._limits.__class__ = EndlessLimits


class PlantedImpatient(Frontier):
    """Robots.txt is asked for anew well before its time."""

    def robots_known(self, origin_: str, rules: Any, now: float, *, ttl: float | None = None) -> None:
        super().robots_known(origin_, rules, now, ttl=1.0)


class WideGate(RobotsGate):
    def sift(self, host: HostQueue, now: float) -> bool:
        return False


class PlantedDisobedient(Frontier):
    """What robots.txt forbids is sent all the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._robots.__class__ = WideGate


class PlantedDeafToRules(Frontier):
    """What is answered to a question does not matter."""

    def answer(self, question: Any, allowed: bool | None, now: float) -> None:
        super().answer(question, True, now)


class HastyGate(RobotsGate):
    def sift(self, host: HostQueue, now: float) -> bool:
        return host.question is None and super().sift(host, now)


class PlantedUnasked(Frontier):
    """A host goes on while its rules are asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._robots.__class__ = HastyGate


class PlantedUnanswered(Frontier):
    """An answer wakes nobody up."""

    def answer(self, question: Any, allowed: bool | None, now: float) -> None:
        host = self._hosts.get(question.host)
        super().answer(question, allowed, now)
        if host:
            host.due = math.inf


class FlatIntake(Intake):
    def add(self, text: str, target: str, host_name: str, run: Any, now: float) -> bool:
        host = self._scheduler._hosts.get(host_name)
        return super().add(text, target, host_name, host.last_run if host and host.waiting else run, now)


class PlantedFlat(Frontier):
    """Depth is that of the first of the queue."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._intake.__class__ = FlatIntake


class UnfairScheduler(Scheduler):
    def _pick(self) -> tuple[HostQueue, int]:
        self._picked = 0
        return super()._pick()


class PlantedUnfair(Frontier):
    """The longest work only, never by age."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._scheduler.__class__ = UnfairScheduler


class PlantedHurry(Frontier):
    """What was handed out before a pause is sent in it."""

    def clear_to_send(self, request: Request, now: float, ahead: float = 0.0) -> float:
        try:
            return super().clear_to_send(request, now, ahead)
        except Postponed:
            return 0.0


PLANTED = [
    *(
        PlantedUncharged,
        PlantedRestless,
        PlantedAmnesia,
        PlantedRace,
        PlantedOpenGate,
        PlantedWedge,
        PlantedQueuedRobots,
    ),
    *(PlantedLateWakeUp, PlantedFullBuckets, PlantedDeaf, PlantedUnlimited, PlantedGreedy, PlantedImpatient),
    *(PlantedDisobedient, PlantedDeafToRules, PlantedUnasked, PlantedUnanswered, PlantedFlat, PlantedUnfair),
    PlantedHurry,
]


@pytest.mark.parametrize("planted", PLANTED)
def test_the_checker_catches_planted_bugs_within_100_seeds(planted: type[Frontier]) -> None:
    with pytest.raises(Broken):
        for seed in range(100):
            simulate.simulate(seed, None, planted)


def test_simulate_names_the_seed_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "Frontier", PlantedUnlimited)
    monkeypatch.setattr(simulate.simulate, "__defaults__", (None, PlantedUnlimited))
    options = {name: default for name, (default, _) in bench.find_commands()["simulate"].options.items()}
    with pytest.raises(SystemExit, match=r"seed \d+: Broken: "):
        simulate.run(argparse.Namespace(**options | {"seeds": 50}))
    with pytest.raises(Broken) as caught:
        for seed in range(50):
            simulate.simulate(seed, None, PlantedUnlimited)
    assert caught.value.__notes__[0].startswith("seed ")


class LateLinks(cs.SharedFrontier):
    """Tells of what it found after it told that the page is done."""

    late: tuple[sync.Link, ...] = ()

    def plan(self, now: float) -> sync.SyncBatch:
        batch = super().plan(now)
        found, batch.links = batch.links, list(self.late)
        self.late = tuple(found)
        return batch

    def holds_nothing(self) -> bool:
        return super().holds_nothing() and not self.late


class ReadsOnce(cs.SharedFrontier):
    """What it read of its list is not told again."""

    def answered(self, *about: Any) -> None:
        super().answered(*about)
        self.outbox._kept.clear()


class TellsOnce(cs.SharedFrontier):
    """What it found is not told again, though the tables have forgotten it."""

    def _lose(self, batch: sync.SyncBatch, now: float) -> None:
        told = set(self.outbox._told)
        super()._lose(batch, now)
        self.outbox._told |= told


class KeepsHosts(cs.SharedFrontier):
    """Goes on with the hosts of before when it joins anew."""

    def _lose(self, batch: sync.SyncBatch, now: float) -> None:
        held, self._held = self._held, {}
        super()._lose(batch, now)
        self._held = held


class SilentPauses(cs.SharedFrontier):
    """Nobody else hears of a pause."""

    def pause(self, host_name: str, until: float, now: float) -> None:
        Frontier.pause(self, host_name, until, now)

    def plan(self, now: float) -> sync.SyncBatch:
        batch = super().plan(now)
        batch.notes = {name: note._replace(wait=0.0) for name, note in batch.notes.items()}
        return batch


@pytest.mark.parametrize(
    ("frontier", "tables", "given"),
    [
        (cs.SharedFrontier, {"fence": False}, {}),
        (cs.SharedFrontier, {"keeps_next": False}, {}),
        (cs.SharedFrontier, {}, {"margin": -1.0}),
        (LateLinks, {}, {}),
        (cs.SharedFrontier, {"idle": 1e9}, {}),
        (cs.SharedFrontier, {"notices": False}, {}),
        (cs.SharedFrontier, {"grace": False}, {}),
        (cs.SharedFrontier, {"sequence": True, "notices": False}, {}),
        (cs.SharedFrontier, {"counts": False}, {}),
        (cs.SharedFrontier, {"alone": False}, {}),
        (ReadsOnce, {}, {}),
        (TellsOnce, {}, {}),
        (KeepsHosts, {}, {}),
        (SilentPauses, {}, {}),
    ],
    ids=[
        *("no fence", "no next_at", "no margin", "links lost", "locks for ever", "lost commits", "no grace"),
        *("numbers given again", "deaths not counted", "not alone", "list told once", "links told once", "kept hosts"),
        "silent pauses",
    ],
)
def test_shared_simulation_finds_planted_faults(
    frontier: type[cs.SharedFrontier], tables: dict[str, bool], given: dict[str, float]
) -> None:
    with pytest.raises((Broken, KeyError)):
        for seed in range(200):
            sim_shared.simulate_shared(seed, frontier, sim_shared.Tables(**tables), **given)


class ForgetsTheDead(simulate.CheckedWorker):
    """What a dead helper had is not given back."""

    def accident(self) -> None:
        self.lives.clear()


class BelievesTheDead(simulate.CheckedWorker):
    """What a dead helper had is given back, and yet its outcome counts."""

    def on_way(self, seconds: float, what: Any, request: Request) -> None:
        self.after(seconds, what, request)


class PromisesTwice(Frontier):
    """The token of a moment that is told ahead is not taken."""

    def clear_to_send(self, request: Request, now: float, ahead: float = 0.0) -> float:
        host = self._hosts[request.host]
        wait = host.gate.wait_for(1, now) if host.gate else 0.0
        return wait if 0.0 < wait <= ahead else super().clear_to_send(request, now, ahead)


@pytest.mark.parametrize("planted", [ForgetsTheDead, BelievesTheDead])
def test_the_checker_catches_what_is_done_wrong_with_dead_helpers(
    planted: type[simulate.CheckedWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "CheckedWorker", planted)
    with pytest.raises((Broken, KeyError)):
        for seed in range(100):
            simulate.simulate(seed)


def test_the_checker_catches_a_moment_that_is_promised_twice() -> None:
    with pytest.raises(Broken, match="burst"):
        for seed in range(100):
            simulate.simulate(seed, None, PromisesTwice)


class LosesTheDead(cp.Parent):
    """What a dead helper had is taken for done."""

    def _give_back(self, request: Request) -> None:
        self._crawl.frontier.finish(request, self._crawl.clock())
        self._in_hand -= 1


class BlamesAll(cp.Parent):
    """All that a dead helper had counts as the death of it."""

    def lost(self, helper: cp.Helper) -> None:
        for request in helper.granted.values():
            request.deaths = cp.ALONE
        super().lost(helper)


class ForgetsLinks(cp.Parent):
    """Links that came with a page whose body came before are not followed when another page has them."""

    def _complete(self, request: Request, final: Any) -> Any:
        self._withheld.clear()
        return super()._complete(request, final)


class HearsOldHomes(cp.Parent):
    """What was told before the scope grew counts as told."""

    home = 0


@pytest.mark.parametrize(
    ("planted", "test"),
    [
        (ForgetsLinks, processes_tests.test_shares_equal_bodies_do_not_hide_links_that_others_have),
        (HearsOldHomes, processes_tests.test_shares_links_are_in_scope_from_when_a_redirect_brings_them_there),
    ],
)
def test_planted_in_the_parent(planted: type[cp.Parent], test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "Parent", planted)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("planted", [LosesTheDead, BlamesAll])
def test_planted_in_what_becomes_of_the_dead(planted: type[cp.Parent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "Parent", planted)
    with pytest.raises(AssertionError):
        processes_tests.test_shares_a_page_that_is_the_death_of_its_reader_costs_one_row("crawl_async", monkeypatch)
