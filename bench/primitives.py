"""`python -m bench primitives`: a call of each mechanism, beside one of the library that it replaces.

A call takes nanoseconds, so a loop of many is timed; the loop is the same for all. Contended cases run in threads.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

from bench.measure import Row, Spread, command, interleaved, present, table

Timed = Callable[[int], float]
"""Makes so many calls and returns the seconds that they took."""
Case = tuple[str, dict[str, Timed]]
"""What is done, and who does it: ours first."""


def calling(*calls: Callable[[], object]) -> Timed:
    """The calls in turn, n times."""

    def timed(n: int) -> float:
        started = time.perf_counter()
        for _ in repeat(None, n):
            for call in calls:
                call()
        return time.perf_counter() - started

    return timed


def awaiting(make: Callable[[], Sequence[Callable[[], Any]]]) -> Timed:
    """The same for async calls, made in the event loop that runs them."""

    async def timed(n: int) -> float:
        calls = make()
        started = time.perf_counter()
        for _ in repeat(None, n):
            for call in calls:
                await call()
        return time.perf_counter() - started

    return lambda n: asyncio.run(timed(n))


def contending(*loops: Timed) -> Timed:
    """The loops in a thread each, all at once, n times each; the time of all is shared out, as for one loop."""

    def timed(n: int) -> float:
        barrier = threading.Barrier(len(loops) + 1)

        def run(loop: Timed) -> None:
            barrier.wait()
            loop(n)

        threads = [threading.Thread(target=run, args=(loop,)) for loop in loops]
        for thread in threads:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        return (time.perf_counter() - started) / len(loops)

    return timed


def succeed() -> int:
    return 1


async def succeed_async() -> int:
    return 1


def retry_cases() -> Iterator[Case]:
    from primitives import retry, retry_async

    sync = {"primitives.retry": calling(lambda: retry(succeed, on=OSError))}
    tasks = {"primitives.retry_async": awaiting(lambda: [lambda: retry_async(succeed_async, on=OSError)])}
    if present("tenacity"):
        tenacity = importlib.import_module("tenacity")
        stop, wait = tenacity.stop_after_attempt(3), tenacity.wait_exponential_jitter()
        rules = {"stop": stop, "wait": wait, "retry": tenacity.retry_if_exception_type(OSError), "reraise": True}
        retrying, retrying_async = tenacity.Retrying(**rules), tenacity.AsyncRetrying(**rules)
        sync["tenacity.Retrying"] = calling(lambda: retrying(succeed))
        sync["tenacity.retry (decorated)"] = calling(tenacity.retry(**rules)(succeed))
        tasks["tenacity.AsyncRetrying"] = awaiting(lambda: [lambda: retrying_async(succeed_async)])
        tasks["tenacity.retry (decorated)"] = awaiting(lambda: [tenacity.retry(**rules)(succeed_async)])
    if present("stamina"):
        stamina = importlib.import_module("stamina")
        sync["stamina.retry (decorated)"] = calling(stamina.retry(on=OSError)(succeed))
        tasks["stamina.retry (decorated)"] = awaiting(lambda: [stamina.retry(on=OSError)(succeed_async)])
    yield "retry, success at the first try", sync
    yield "retry, the same async", tasks


def bucket_cases() -> Iterator[Case]:
    from primitives import TokenBucket

    bucket = TokenBucket(1e9, 1e9)
    attempt = calling(bucket.try_acquire)
    tasks = {"TokenBucket.acquire_async": awaiting(lambda: [bucket.acquire_async])}
    if present("aiolimiter"):
        aiolimiter = importlib.import_module("aiolimiter")
        tasks["aiolimiter.AsyncLimiter.acquire"] = awaiting(lambda: [aiolimiter.AsyncLimiter(1e9, 1).acquire])
    yield "rate limit, nobody waits, async", tasks
    yield "rate limit, acquire", {"TokenBucket.acquire": calling(bucket.acquire)}
    yield "rate limit, try_acquire", {"TokenBucket.try_acquire": attempt}
    yield "rate limit, try_acquire in 8 threads", {"TokenBucket.try_acquire": contending(*[attempt] * 8)}


def waiting_cases() -> Iterator[Case]:
    import queue

    from coordination import Channel, Semaphore

    async def release(semaphore: Semaphore | asyncio.Semaphore) -> None:
        semaphore.release()

    permits = awaiting(lambda: [(own := Semaphore(4)).acquire_async, lambda: release(own)])
    their_permits = awaiting(lambda: [(other := asyncio.Semaphore(4)).acquire, lambda: release(other)])
    items = awaiting(lambda: [lambda: own.put_async(1), (own := Channel[int](100)).get_async])
    their_items = awaiting(lambda: [lambda: other.put(1), (other := asyncio.Queue[int](100)).get])

    ours, theirs = Semaphore(4), threading.Semaphore(4)
    use, use_theirs = calling(ours.acquire, ours.release), calling(theirs.acquire, theirs.release)
    many, many_theirs = contending(*[use] * 8), contending(*[use_theirs] * 8)
    yield "semaphore, acquire and release", {"Semaphore": use, "threading.Semaphore": use_theirs}
    yield "semaphore, the same async", {"Semaphore": permits, "asyncio.Semaphore": their_permits}
    yield "semaphore, 8 threads for 4 permits", {"Semaphore": many, "threading.Semaphore": many_theirs}

    channel: Channel[int] = Channel(100)
    fifo: queue.Queue[int] = queue.Queue(100)
    put, get = (lambda: channel.put(1)), channel.get
    put_theirs, get_theirs = (lambda: fifo.put(1)), fifo.get
    pass_on, pass_on_theirs = calling(put, get), calling(put_theirs, get_theirs)
    many = contending(*[calling(put), calling(get)] * 4)
    many_theirs = contending(*[calling(put_theirs), calling(get_theirs)] * 4)
    yield "channel, put and get", {"Channel": pass_on, "queue.Queue": pass_on_theirs}
    yield "channel, the same async", {"Channel": items, "asyncio.Queue": their_items}
    yield "channel, 4 threads put and 4 get", {"Channel": many, "queue.Queue": many_theirs}


def cache_cases() -> Iterator[Case]:
    from primitives import SingleFlight, TTLCache

    ours: TTLCache[str, int] = TTLCache(1000, 3600)
    for n in range(1000):
        ours.put(f"key {n}", n)
    hit, put = calling(lambda: ours.get("key 500")), calling(lambda: ours.put("key 500", 1))
    load = calling(lambda: ours.get_or_load("key 500", succeed))
    hits, puts = {"TTLCache.get": hit, "TTLCache.get_or_load": load}, {"TTLCache.put": put}
    many = {"TTLCache.get": contending(*[hit] * 8)}
    if present("cachetools"):
        cachetools = importlib.import_module("cachetools")
        theirs, lock = cachetools.TTLCache(1000, 3600), threading.Lock()
        for n in range(1000):
            theirs[f"key {n}"] = n

        def read() -> int | None:
            with lock:
                return theirs.get("key 500")  # type: ignore[no-any-return]

        def write() -> None:
            with lock:
                theirs["key 500"] = 1

        hits["cachetools.TTLCache.get, locked"] = calling(read)
        puts["cachetools.TTLCache[key] = value, locked"] = calling(write)
        many["cachetools.TTLCache.get, locked"] = contending(*[calling(read)] * 8)
    yield "cache, hit", hits
    yield "cache, put", puts
    yield "cache, hit in 8 threads", many
    flight = SingleFlight()
    yield "single flight, alone", {"SingleFlight.do": calling(lambda: flight.do("key", succeed))}


def breaker_cases() -> Iterator[Case]:
    from primitives import CircuitBreaker

    plain, shared, theirs = CircuitBreaker("a"), CircuitBreaker("b", ratio=0.5), dict[str, Timed]()

    def ask(breaker: CircuitBreaker) -> Callable[[], None]:
        def permitted() -> None:
            with breaker.permit():
                succeed()

        return permitted

    sync = {"CircuitBreaker.permit": calling(ask(plain)), "CircuitBreaker.permit (ratio)": calling(ask(shared))}
    tasks = {"CircuitBreaker.call_async": awaiting(lambda: [lambda: plain.call_async(succeed_async)])}
    if present("circuitbreaker"):
        circuit = importlib.import_module("circuitbreaker").circuit
        theirs["circuitbreaker.circuit (decorated)"] = calling(circuit(succeed))
        tasks["circuitbreaker.circuit (decorated)"] = awaiting(lambda: [circuit(succeed_async)])
    if present("pybreaker"):
        pybreaker = importlib.import_module("pybreaker")
        theirs["pybreaker.CircuitBreaker (decorated)"] = calling(pybreaker.CircuitBreaker()(succeed))
    sync |= theirs
    yield "circuit breaker, success", sync
    yield "circuit breaker, success, async", tasks
    yield "circuit breaker, success, in 8 threads", {n: contending(*[case] * 8) for n, case in sync.items()}


def gathering_cases() -> Iterator[Case]:
    from coordination import fan_out

    async def gather() -> None:
        await asyncio.wait_for(asyncio.gather(*[succeed_async() for _ in range(8)]), 10)

    async def fan() -> None:
        await fan_out({n: succeed_async() for n in range(8)}, 10)

    ours, theirs = awaiting(lambda: [fan]), awaiting(lambda: [gather])
    yield "eight calls at once", {"fan_out": ours, "asyncio.wait_for(gather)": theirs}


@command(
    "a call of each mechanism, against the library that it replaces: nanoseconds",
    "primitives",
    "primitives --calls 100000 --repeat 5",
    calls=(20_000, "calls in a run"),
    repeat=(15, "runs of each"),
)
def primitives(args: argparse.Namespace) -> list[Row]:
    """Print the table of all cases, and return its rows."""
    results: list[Row] = []
    cases = retry_cases, bucket_cases, cache_cases, breaker_cases, waiting_cases, gathering_cases
    for title, case in (pair for make in cases for pair in make()):
        spent: dict[str, list[float]] = {name: [] for name in case}
        for _, name in interleaved(case, args.repeat):
            spent[name].append(case[name](args.calls) / args.calls * 1e9)
        ours = Spread.of(spent[next(iter(case))])
        results.append({"": title, "ours / theirs": None, "best / best": None, "ns": None})
        for name in case:
            taken = Spread.of(spent[name])
            medians, best = (None, None) if taken == ours else (ours.median / taken.median, ours.low / taken.low)
            results.append({"": f"  {name}", "ours / theirs": medians, "best / best": best, "ns": taken})
    print(table(results))
    return results
