"""The highest rate that holds: the search that `bench ingest` and `bench market` have in common.

All contestants climb the same ladder of rates, taking turns; whoever failed at two of them is out. Then the gap between
the last good and the first bad rate is halved a few times. A step that fails is done once more, for all contestants
alike: the machine is shared, and its bad second is not theirs. What is told is the rate at which the senders really
sent in the best lossless step; if they could not send as fast as they were to, that is the end of the ladder too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from bench.measure import Row, table

if TYPE_CHECKING:
    import psutil

READY = 20.0
"""Seconds that a contestant may take to be there."""
HELD_BACK = 0.9
"""Share of the wanted rate below which the senders did not do it."""


# -------------------------------------------------------------------------------------------------- contestants


def cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process and its children, those that have ended too."""
    import psutil

    seconds = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(each.cpu_times()[:4])
    return seconds


def memory_of(process: psutil.Process, field: str) -> float:
    """MB of a process and its children: "VmHWM" (peak) or "VmRSS" (now)."""
    kilobytes = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
    return kilobytes / 1024


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY
    while not is_there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"bench: a contestant did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------- the search


class Tried(Protocol):
    """A step, as the search sees it."""

    @property
    def rate(self) -> float:
        """At which the senders really sent."""

    @property
    def lossless(self) -> bool: ...

    @property
    def held_back(self) -> bool: ...

    @property
    def wanted(self) -> float: ...

    def row(self, name: str) -> Row: ...


S = TypeVar("S", bound=Tried)


S_co = TypeVar("S_co", bound=Tried, covariant=True)


class Track(Protocol[S_co]):
    """What the contestants climb on."""

    def run(self, name: str, rate: float, seconds: float) -> S_co:
        """One life of a contestant at one rate."""


class Search(Generic[S]):
    """Of one contestant: which rate is next."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: list[S] = []
        self.low, self.high, self.failures = 0.0, math.inf, 0

    @property
    def best(self) -> S | None:
        """The lossless step with the highest rate."""
        return max((step for step in self.steps if step.lossless), key=lambda step: step.rate, default=None)

    def run(self, course: Track[S], rate: float, seconds: float) -> None:
        """A step, once more if it fails for the first time."""
        for _ in range(2 if not self.failures else 1):
            step = course.run(self.name, rate, seconds)
            self.steps.append(step)
            if step.lossless and not step.held_back:
                self.low = max(self.low, rate)
                return
        self.failures += 1
        self.high = min(self.high, rate)

    def halve(self, course: Track[S], seconds: float) -> None:
        if self.low < self.high < math.inf:
            self.failures = 0
            self.run(course, (self.low + self.high) / 2, seconds)


def climb(
    course: Track[S], names: Sequence[str], rates: Sequence[int], halvings: int, seconds: float
) -> list[Search[S]]:
    """The ladder, the contestants taking turns, and then the halvings."""
    searches = [Search[S](name) for name in names]
    for number, rate in enumerate(rates):
        turn = number % len(searches)
        for search in (*searches[turn:], *searches[:turn]):
            if search.failures < 2:
                search.run(course, rate, seconds)
    for _ in range(halvings):
        for search in searches:
            search.halve(course, seconds)
    return searches


def ladder(
    course: Track[S],
    names: Sequence[str],
    args: argparse.Namespace,
    summary: Callable[[Sequence[Sequence[Search[S]]]], list[Row]],
) -> list[Row]:
    """The whole comparison, ``args.repeat`` times: prints every step, and then what it comes to; returns both."""
    rates = [int(rate) for rate in args.rates.split(",")]
    found = [climb(course, names, rates, args.halvings, args.seconds) for _ in range(args.repeat)]
    steps = [
        step.row(search.name)
        for name in names
        for searches in found
        for search in searches
        if search.name == name
        for step in sorted(search.steps, key=lambda step: step.wanted)
    ]
    results = summary(found)
    print(table(steps), end="\n\n")
    print(table(results))
    return results + steps
