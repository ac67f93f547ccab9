"""TTLCache: rows, a model, loading through it."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import settings
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
from tests.helpers.base import SETTINGS, World, run_task, ticks
from tests.helpers.mechanisms import FlightError

Load = Callable[[pr.TTLCache[Any, Any], Any, Callable[[], Any]], Any]


TICK = 2.0**-20  # exact at these times


BOTH = {"ttl": 10.0, "stale": 5.0, "stale_if_error": 20.0}


WINDOWS: dict[str, tuple[dict[str, float], dict[str, Any], list[tuple[float, str | None]]]] = {
    # what the cache is made with, how the value is put at 0, then (time, state)
    "plain": ({"ttl": 10.0}, {}, [(0.0, "fresh"), (10 - TICK, "fresh"), (10.0, None)]),
    "stale": (
        {"ttl": 10.0, "stale": 5.0},
        {},
        [(10 - TICK, "fresh"), (10.0, "stale"), (15 - TICK, "stale"), (15.0, None)],
    ),
    "expired": (
        {"ttl": 10.0, "stale_if_error": 5.0},
        {},
        [(10 - TICK, "fresh"), (10.0, "expired"), (15 - TICK, "expired"), (15.0, None)],
    ),
    "both begin at ttl": (
        BOTH,
        {},
        [(10.0, "stale"), (15 - TICK, "stale"), (15.0, "expired"), (30 - TICK, "expired"), (30.0, None)],
    ),
    "an error window within the other": (
        {"ttl": 10.0, "stale": 5.0, "stale_if_error": 3.0},
        {},
        [(13.0, "stale"), (15 - TICK, "stale"), (15.0, None)],
    ),
    "ttl of its own": (
        BOTH,
        {"ttl": 1.0},
        [(1 - TICK, "fresh"), (1.0, "stale"), (6.0, "expired"), (21 - TICK, "expired"), (21.0, None)],
    ),
    "for ever": ({"ttl": math.inf}, {}, [(1e12, "fresh")]),
}


@pytest.mark.parametrize("row", WINDOWS)
def test_windows_to_the_tick(row: str) -> None:
    options, how, states = WINDOWS[row]
    world = World(0.0)
    cache: pr.TTLCache[str, str] = pr.TTLCache(**options, clock=world.clock)  # type: ignore[arg-type]
    assert cache.put("key", "value", **how) is True
    for world.now, state in states:
        assert cache.get("key", "none") == ("value" if state == "fresh" else "none")
        hit = pr.Hit("value", world.now, state, state != "fresh") if state else None  # type: ignore[arg-type]
        assert cache.lookup("key", world.now) == cache.lookup("key") == hit
    assert len(cache) == (states[-1][1] is not None)


EVENTS: dict[str, tuple[int, float, list[tuple[str, Any]]]] = {
    # maxsize, maxweight, then (event, expected); "keys" tells what is left, the least recently used first
    "least recently used goes": (2, math.inf, [("put a", True), ("put b", True), ("put c", True), ("keys", "bc")]),
    "get refreshes": (2, math.inf, [("put a", True), ("put b", True), ("get a", "a"), ("put c", True), ("keys", "ac")]),
    "lookup refreshes": (2, 9.0, [("put a", True), ("put b", True), ("look a", "a"), ("put c", True), ("keys", "ac")]),
    "put refreshes": (2, 9.0, [("put a", True), ("put b", True), ("put a", True), ("put c", True), ("keys", "ac")]),
    "a miss does not": (2, 9.0, [("put a", True), ("put b", True), ("get c", None), ("look c", None), ("keys", "ab")]),
    "evicted until it fits": (9, 5.0, [("put a 2", True), ("put b 2", True), ("put c 1", True), ("weight", 5.0),
        ("put d 3", True), ("keys", "cd"), ("weight", 4.0), ("evicted", 2)]),
    "as heavy as the cache": (9, 5.0, [("put a 2", True), ("put b 5", True), ("keys", "b"), ("weight", 5.0)]),
    "too heavy": (9, 5.0, [("put a 2", True), ("put b 3", True), ("put a 6", False), ("get a", None), ("keys", "b"),
        ("weight", 3.0), ("put c 2", True), ("keys", "bc")]),
    "too heavy for a full cache": (1, 5.0, [("put a 2", True), ("put b 6", False), ("keys", "a"), ("weight", 2.0)]),
    "a replacement changes the weight": (9, 5.0, [("put a 4", True), ("put b 1", True), ("put a 1", True),
        ("weight", 2.0), ("put c 3", True), ("keys", "bac"), ("weight", 5.0)]),
    "infinitely heavy": (9, 5.0, [("put a 2", True), ("put b inf", False), ("weight", 2.0), ("put c 4", True),
        ("keys", "c"), ("weight", 4.0)]),
    "too heavy for floats": (9, 5.0, [("put a 3", True), ("put b 1e17", False), ("weight", 3.0)]),
    "fits, but for rounding": (9, 0.3, [("put a 0.1", True), ("put b 0.3", True), ("keys", "b"), ("weight", 0.3)]),
}  # fmt: skip


@pytest.mark.parametrize("row", EVENTS)
def test_keeps_what_was_used_last_within_its_bounds(row: str) -> None:
    maxsize, maxweight, events = EVENTS[row]
    cache: pr.TTLCache[str, str] = pr.TTLCache(maxsize, maxweight=maxweight, clock=lambda: 0.0)
    for event, expected in events:
        verb, key, weight = event.split() + ["", "1"][event.count(" ") :]
        if verb == "put":
            assert cache.put(key, key, weight=float(weight)) is expected, event
        elif verb in ("get", "look"):
            hit = cache.lookup(key) if verb == "look" else None
            assert (hit.value if hit else cache.get(key)) == expected, event
        else:
            assert ("".join(cache._entries) if verb == "keys" else getattr(cache.stats(), verb)) == expected, event
        assert cache.stats().weight <= maxweight and len(cache) == cache.stats().entries <= maxsize


def test_defer_asks_for_no_refresh_meanwhile() -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10.0, stale=20.0, clock=lambda: 12.0)
    cache.put("key", 1, now=0.0)
    cache.defer("key", 5.0)
    cache.defer("other", 5.0)
    hits = [cache.lookup("key", now) for now in (12.0, 17 - TICK, 17.0)]
    assert [(hit.state, hit.needs_refresh) for hit in hits if hit] == [
        ("stale", False),
        ("stale", False),
        ("stale", True),
    ]
    cache.defer("key", 100.0, now=17.0)
    assert cache.lookup("key", 30.0) is None, "deferred is not kept for longer"


def test_defer_brings_no_refresh_forward() -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=100.0, clock=lambda: 0.0)
    cache.put("key", 1)
    cache.defer("key", 5.0)
    assert cache.lookup("key", 5.0) == pr.Hit(1, 5.0, "fresh", False)


def test_what_was_loaded_before_invalidate_is_not_kept() -> None:
    cache: pr.TTLCache[int, str] = pr.TTLCache(clock=lambda: 0.0)
    begun = cache.generation(1), cache.generation(2), cache.generation(65)
    cache.put(1, "old")
    assert [cache.invalidate(1), cache.invalidate(1), cache.get(1)] == [True, False, None]
    assert cache.put(1, "old", generation=begun[0]) is False and cache.get(1) is None
    assert cache.put(2, "other", generation=begun[1]) is True and cache.put(1, "new", generation=cache.generation(1))
    assert cache.put(65, "shares the number of 1", generation=begun[2]) is False
    assert (cache.get(1), cache.get(2), cache.get(65)) == ("new", "other", None)


class Bomb:
    """Its destructor uses the cache, unless that would wait for ever. Equal to its like, as keys are."""

    def __init__(self, cache: pr.TTLCache[Any, Any], log: list[bool]) -> None:
        self.cache, self.log = cache, log

    def __del__(self) -> None:
        self.log.append(not self.cache._lock.locked() and self.cache.put("by", "destructor"))

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bomb)


@pytest.mark.parametrize("place", ["value", "key"])
@pytest.mark.parametrize("way", ["replaced", "evicted", "invalidated", "gone"])
def test_destructors_may_use_the_cache(way: str, place: str) -> None:
    world, log = World(), list[bool]()
    cache: pr.TTLCache[Any, Any] = pr.TTLCache(2, 10.0, clock=world.clock)
    cache.put(*((Bomb(cache, log), 0) if place == "key" else (1, Bomb(cache, log))))
    key = Bomb(cache, []) if place == "key" else 1
    assert log == []
    if way == "gone":
        world.now += 10.0
    if way == "evicted":
        cache.put(2, 2)
        cache.put(3, 3)
    elif way == "replaced":
        cache.put(key, 2)
    else:
        (cache.invalidate if way == "invalidated" else cache.lookup)(key)
    assert log == [True] and cache.get("by") == "destructor"


@pytest.mark.parametrize(
    "options",
    [{"maxsize": 0}, {"maxsize": -1}, {"maxweight": 0.0}, {"maxweight": math.nan}]
    + [{name: bad} for name in ("ttl",) for bad in (0.0, -1.0, math.nan)]
    + [{name: bad} for name in ("stale", "stale_if_error") for bad in (-1.0, math.nan)],
    ids=str,
)
def test_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        pr.TTLCache(**options)


@pytest.mark.parametrize("how", [{"ttl": 0.0}, {"ttl": math.nan}, {"weight": -1.0}, {"weight": math.nan}], ids=str)
def test_put_refuses_nonsense(how: dict[str, Any]) -> None:
    cache: pr.TTLCache[int, int] = pr.TTLCache()
    cache.put(1, 1)
    with pytest.raises(ValueError, match="ttl must be above 0 s, weight not below 0"):
        cache.put(1, 2, **how)
    assert cache.get(1) == 1


def test_and_flight_tell_of_themselves() -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(1)  # the clock is the system's
    cache.put("a", 1, weight=2.5)
    before = cache.stats()
    assert (cache.get("a"), cache.get("b", 7), cache.lookup("c"), cache.put("b", 2)) == (1, 7, None, True)
    assert (before, cache.stats()) == (pr.TTLCacheStats(1, 2.5, 0, 0, 0, 0), pr.TTLCacheStats(1, 1.0, 1, 2, 1, 0))
    assert cache.get_or_load("d", lambda: cache.stats().loading) == 1 and not cache.stats().loading
    with pytest.raises(AttributeError):
        before.hits = 5  # type: ignore[misc]
    assert repr(cache) == "<TTLCache entries=1 weight=1 hits=1 misses=2 evicted=2 loading=0>"
    flights = pr.SingleFlight()
    assert flights.do("key", flights.stats) == pr.SingleFlightStats(1, 0, 1, 0)
    assert repr(flights) == "<SingleFlight flights=0 waiting=0 loads=1 shared=0>"


# ---------------------------------------------------------------------------------------------- cache: against a model

KEYS = st.integers(0, 3)


QUARTERS = st.sampled_from([0, 0, 1, 4, 8])


PUT: dict[str, Any] = {
    "key": KEYS,
    "ttl": st.sampled_from([None, None, 1.0]),
    "weight": st.sampled_from([1.0, 1.0, 5.0, 2.0]),
    "age": st.sampled_from([0.0, 3.0, 4.0, 5.0, 6.0]),
}


class Fact(NamedTuple):
    """One ``put``, as it was said."""

    key: int
    value: int
    at: float
    ttl: float
    stale: float
    error: float
    weight: float

    @property
    def gone_at(self) -> float:
        return self.at + self.ttl + max(self.stale, self.error)


class Machine(RuleBasedStateMachine):
    """A cache and a list of facts, the least recently used first, from which each answer is worked out anew."""

    cache_type: ClassVar[type[pr.TTLCache[int, int]]] = pr.TTLCache

    @initialize(
        maxsize=st.integers(1, 3),
        maxweight=st.sampled_from([math.inf, 4.0, 6.0]),
        windows=st.sampled_from([(0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (1.0, 3.0), (3.0, 1.0)]),
    )
    def start(self, maxsize: int, maxweight: float, windows: tuple[float, float]) -> None:
        self.now, self.windows, self.values = 0.0, windows, itertools.count()
        self.cache = self.cache_type(
            maxsize,
            4.0,
            stale=windows[0],
            stale_if_error=windows[1],
            maxweight=maxweight,
            clock=lambda: self.now,
        )
        self.facts: list[Fact] = []
        self.deferred: dict[int, float] = {}  # value: until
        self.invalidated, self.begun = list[int](), list[tuple[int, int, int]]()
        self.hits = self.misses = self.evicted = 0

    def find(self, key: int) -> Fact | None:
        return next((fact for fact in self.facts if fact.key == key), None)

    def use(self, fact: Fact) -> None:
        self.hits += 1
        self.facts.remove(fact)
        self.facts.append(fact)

    @rule(**PUT, quarters=QUARTERS)
    def put(self, key: int, ttl: float | None, weight: float, age: float, quarters: int, **begun: int) -> None:
        self.now += quarters / 4
        value = next(self.values)
        kept = self.cache.put(key, value, ttl=ttl, weight=weight, now=self.now - age, **begun)
        assert kept is (weight <= self.cache.maxweight)
        self.facts = [other for other in self.facts if other.key != key]
        if not kept:
            return
        fact = Fact(key, value, self.now - age, 4.0 if ttl is None else ttl, *self.windows, weight)
        if not self.fits(fact):  # what is gone goes first, then the least recently used
            self.facts = [other for other in self.facts if self.now - age < other.gone_at]
        while not self.fits(fact):
            del self.facts[0]
            self.evicted += 1
        self.facts.append(fact)

    def fits(self, fact: Fact) -> bool:
        weight = fact.weight + sum(other.weight for other in self.facts)
        return len(self.facts) < self.cache.maxsize and weight <= self.cache.maxweight

    @rule(key=KEYS)
    def begin(self, key: int) -> None:
        self.begun.append((key, self.cache.generation(key), self.invalidated.count(key)))

    @precondition(lambda self: self.begun)
    @rule()
    def fill(self) -> None:
        key, generation, invalidated = self.begun.pop()
        if self.invalidated.count(key) == invalidated:
            self.put(key, None, 1.0, 0.0, 0, generation=generation)
        else:
            assert self.cache.put(key, -1, generation=generation) is False

    @rule(key=KEYS, quarters=QUARTERS)
    def get(self, key: int, quarters: int) -> None:
        self.now += quarters / 4
        fact = self.find(key)
        if fact is not None and self.now < fact.at + fact.ttl:
            assert self.cache.get(key) == fact.value
            self.use(fact)
        else:
            assert self.cache.get(key) is None
            self.misses += 1

    @rule(key=KEYS, quarters=QUARTERS)
    def lookup(self, key: int, quarters: int) -> None:
        self.now += quarters / 4
        fact, hit = self.find(key), self.cache.lookup(key)
        if fact is None or self.now >= fact.gone_at:
            assert hit is None
            self.misses += 1
            self.facts = [other for other in self.facts if other.key != key]
            return
        self.use(fact)
        over = self.now - fact.at - fact.ttl
        state = "fresh" if over < 0 else "stale" if over < fact.stale else "expired"
        refresh = over >= 0 and self.now >= self.deferred.get(fact.value, 0.0)
        assert hit == (fact.value, self.now - fact.at, state, refresh)

    @rule(key=KEYS)
    def invalidate(self, key: int) -> None:
        assert self.cache.invalidate(key) is (self.find(key) is not None)
        self.facts = [other for other in self.facts if other.key != key]
        self.invalidated.append(key)

    @rule(**PUT, seconds=st.sampled_from([0.0, 1.0, 3.0]), quarters=QUARTERS)
    def put_and_defer(self, seconds: float, quarters: int, **how: Any) -> None:
        self.put(**how, quarters=0)
        self.lookup(how["key"], 0)
        self.cache.defer(how["key"], seconds)
        if (fact := self.find(how["key"])) is not None:
            self.deferred[fact.value] = self.now + seconds
        self.lookup(how["key"], quarters)

    @rule(quarters=QUARTERS)
    def count(self, quarters: int) -> None:
        """Who counts finds the living only."""
        self.now += quarters / 4
        self.facts = [fact for fact in self.facts if self.now < fact.gone_at]
        weight = sum(fact.weight for fact in self.facts)
        found = len(self.facts), weight, self.hits, self.misses, self.evicted, 0
        assert (self.cache.stats(), len(self.cache)) == (found, len(self.facts))

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "facts"):
            assert [*self.cache._entries] == [fact.key for fact in self.facts]
            assert self.cache._weight == sum(fact.weight for fact in self.facts)


def check_cache(cache_type: type[pr.TTLCache[int, int]], effort: settings = SETTINGS) -> None:
    run_state_machine_as_test(type("Machine", (Machine,), {"cache_type": cache_type}), settings=effort)


def test_does_as_its_model() -> None:
    check_cache(pr.TTLCache)


# ------------------------------------------------------------------------------------------- cache: loading through it


@pytest.fixture(params=["threads", "tasks"])
def cache_load(request: pytest.FixtureRequest) -> Load:
    """``get_or_load``, or its twin."""

    def load_async(cache: pr.TTLCache[Any, Any], key: Any, load: Callable[[], Any]) -> Any:
        async def aload() -> Any:
            return load()

        return run_task(cache.get_or_load_async(key, aload))

    return pr.TTLCache.get_or_load if request.param == "threads" else load_async


def test_loads_what_is_not_fresh(cache_load: Load) -> None:
    world, loads = World(0.0), list[float]()
    cache: pr.TTLCache[str, int | None] = pr.TTLCache(ttl=10.0, stale=5.0, stale_if_error=9.0, clock=world.clock)

    def load() -> int | None:
        loads.append(world.now)
        assert not cache._lock.locked() and not cache._flights._lock.locked() and repr(cache) and cache.stats().loading
        if len(loads) in (2, 3):
            raise FlightError
        return None if len(loads) == 1 else len(loads)

    for world.now, answer, loaded in [(0.0, None, 1), (9.0, None, 1), (10.0, FlightError, 2), (10.0, FlightError, 3),
                                      (10.0, 4, 4), (19.0, 4, 4), (20.0, 5, 5)]:  # fmt: skip
        if answer is FlightError:
            with pytest.raises(FlightError):
                cache_load(cache, "key", load)
            assert (hit := cache.lookup("key")) is not None and hit.state == "stale"
        else:
            assert cache_load(cache, "key", load) == answer
        assert len(loads) == loaded


def test_loads_anew_what_is_fresh() -> None:
    async def main() -> None:
        cache, gates = pr.TTLCache[str, int](clock=lambda: 0.0), list[asyncio.Future[int]]()

        def load() -> asyncio.Future[int]:
            gates.append(asyncio.get_running_loop().create_future())
            return gates[-1]

        cache.put("key", 1)
        tasks = [asyncio.create_task(cache.get_or_load_async("key", load, anew=True)) for _ in range(3)]
        await ticks()
        assert cache.stats().loading and await cache.get_or_load_async("key", load) == 1
        gates[0].set_result(2)
        assert await asyncio.gather(*tasks) == [2, 2, 2] and len(gates) == 1 and cache.get("key") == 2
        late = asyncio.create_task(cache.get_or_load_async("key", load, anew=True))
        await ticks()
        cache.clear()
        assert not cache.stats().loading
        gates[1].set_result(3)
        assert await late == 3 and "key" not in cache

    run_task(main())


class Gap(pr.SingleFlight):
    """Lets something happen between a caller's lookup and its load."""

    def __init__(self, meanwhile: Callable[[], Any]) -> None:
        super().__init__()
        self.meanwhile = [meanwhile]

    def _join(self, key: Any, loop: Any) -> Any:
        while self.meanwhile:
            self.meanwhile.pop()()
        return super()._join(key, loop)


def flight_failing() -> Any:
    raise FlightError


@pytest.mark.parametrize("now", [0.0, 10.0, 12.0])
def test_nobody_loads_again_in_the_gap(cache_load: Load, now: float) -> None:
    world = World(0.0)
    cache: pr.TTLCache[str, int] = pr.TTLCache(ttl=10.0, stale=1.0, stale_if_error=5.0, clock=world.clock)
    if now:
        cache.put("key", 1)
    world.now = now
    cache._flights = Gap(lambda: cache.get_or_load("key", lambda: 2))
    assert cache_load(cache, "key", flight_failing) == 2


def test_a_load_that_began_before_invalidate_fills_nothing(cache_load: Load) -> None:
    cache: pr.TTLCache[str, int] = pr.TTLCache(clock=lambda: 0.0)
    assert cache_load(cache, "key", lambda: [7, cache.invalidate("key")][0]) == 7 and len(cache) == 0


def test_what_is_gone_makes_room_first() -> None:
    """A thousand places, 400 keys in use, 50 entries a second that live for 5 s and are never asked for again."""
    world, rng = World(0.0), random.Random(1)
    cache: pr.TTLCache[Any, int] = pr.TTLCache(1000, 1e6, clock=world.clock)
    plain: OrderedDict[Any, None] = OrderedDict()  # one that does not look at the time
    hits = plain_hits = asked = 0
    for second in range(200):
        for n in range(50):
            world.now = second + n / 50
            key = rng.randrange(400)
            asked += 1
            hits += cache.get(key) is not None
            cache.put(key, 1)
            plain_hits += key in plain
            for each in (key, ("once", second, n)):
                plain[each] = None
                plain.move_to_end(each)
            cache.put(("once", second, n), 1, ttl=5.0)
            while len(plain) > 1000:
                plain.popitem(last=False)
    assert asked - hits == 400 and plain_hits < 0.85 * asked
    assert cache.stats().evicted == 0 and len(cache) == 400 + 250
    world.now += 5.0
    assert len(cache) == 400


def test_its_heap_stays_small() -> None:
    world = World(0.0)
    cache: pr.TTLCache[int, int] = pr.TTLCache(10, clock=world.clock)
    for n in range(2000):
        world.now += 0.1
        cache.put(n % 12, n, ttl=1.0 + n % 7)
        assert len(cache) <= 10
        assert cache._endings is None or len(cache._endings) <= 2 * 10 + 64


@pytest.mark.parametrize("way", ["replaced", "evicted", "invalidated"])
def test_what_is_removed_is_let_go_though_its_heap_has_it(way: str) -> None:
    world = World(0.0)
    cache: pr.TTLCache[int, Any] = pr.TTLCache(2, 1.0, stale_if_error=3600.0, clock=world.clock)
    cache.put(0, 0)
    world.now += 3601.0
    assert len(cache) == 0 and cache._endings is not None
    kept = []
    for n in range(20):
        value = threading.Event()
        kept.append(weakref.ref(value))
        cache.put(n if way == "evicted" else 0, value)
        if way == "invalidated":
            cache.invalidate(0)
        del value
    assert sum(each() is not None for each in kept) == len(cache) and len(cache._endings) == 20
