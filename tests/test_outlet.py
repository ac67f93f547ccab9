"""runtime/outlet.py: a sink that comes and goes, a disk that refuses, and an end in any turn of the loop."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from coordination import cancel_all
from runtime.backlog import Backlog
from runtime.outlet import Changes, Outlet, SinkAway, TwoStageStop
from runtime.spool import EncodedBatch, Spool
from tests.helpers.base import HANG_LIMIT, run_task, ticks, until_async

LOG = logging.getLogger("outlet")


class FakeSink:
    """Numbers; ``up``: whether it takes them, ``gate``: when it answers."""

    def __init__(self) -> None:
        self.up, self.gate = True, asyncio.Event()
        self.gate.set()
        self.asked = self.failing = 0
        self.bad = set[int]()
        self.stored = list[int]()

    async def write(self, items: list[int]) -> tuple[int, int]:
        self.asked += 1
        await self.gate.wait()
        if self.failing or not self.up:
            self.failing = max(0, self.failing - 1)
            raise SinkAway
        good = [item for item in items if item not in self.bad]
        self.stored += good
        return len(good), len(items) - len(good)

    async def ready(self, _: float) -> bool:
        await asyncio.sleep(0)
        return self.up

    def diverts(self) -> bool:
        return not self.up

    def encode(self, items: Sequence[int]) -> EncodedBatch:
        return EncodedBatch(uuid4(), len(items), 0.0, b"".join(b"%d\n" % item for item in items))

    def decode(self, batch: EncodedBatch) -> list[int]:
        return list(map(int, batch.data.split()))


class Lines:
    """An outlet of numbers, and its tasks."""

    def __init__(self, folder: Path, *, in_order: bool, max_bytes: int = 1 << 20, **options: Any) -> None:
        self.sink, self.changes = FakeSink(), Changes()
        self.backlog = Backlog[int](50, size=lambda _: 1, round_items=3, file_items=2, in_order=in_order)
        spools = [Spool(folder, max_bytes=max_bytes, fsync_every=0.0)]
        options = {"ask_again": 0.001, "replay_files": 2, "rng": lambda: 0.0, **options}
        self.outlet = Outlet(self.backlog, self.sink, spools, log=LOG, changes=self.changes, **options)
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Lines:
        await self.outlet.open()
        writers = 1 if self.backlog.in_order else 2
        self.tasks = [asyncio.create_task(work()) for work in self.outlet.tasks(writers).values()]
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_all(self.tasks)
        dropped = await self.outlet.save(HANG_LIMIT)
        await self.outlet.close()
        assert dropped == self.backlog.dropped["stopped"]
        assert self.backlog.imbalance() == self.backlog.held() == 0
        assert self.backlog.spooled == self.outlet.spools[0].stats().rows
        assert asyncio.all_tasks() == {asyncio.current_task()}
        failed = [task.exception() for task in self.tasks if not task.cancelled()]
        assert failed == []

    def put(self, *items: int) -> None:
        self.outlet.put(items)

    async def until(self, stored: int) -> None:
        def there() -> bool:
            assert self.backlog.imbalance() == 0
            return len(self.sink.stored) == stored and self.backlog.is_empty()

        await until_async(there)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_sink_that_goes_and_comes_back_gets_all_once(tmp_path: Path, in_order: bool) -> None:
    async def main() -> None:
        async with Lines(tmp_path, in_order=in_order) as lines:
            lines.put(*range(10))
            await lines.until(10)
            lines.sink.up = False
            lines.put(*range(10, 25))
            if in_order:
                lines.outlet.press()
            await until_async(lambda: lines.backlog.spooled >= 12)
            lines.put(*range(25, 30))
            lines.sink.up = True
            lines.changes.tell()
            await lines.until(30)
            assert sorted(lines.sink.stored) == list(range(30)) and lines.backlog.spooled == 0
            if in_order:
                assert lines.sink.stored == list(range(30))

    run_task(main())


@pytest.mark.parametrize("in_order", [False, True])
def test_what_failed_is_written_again_and_what_is_refused_is_counted(tmp_path: Path, in_order: bool) -> None:
    async def main() -> None:
        async with Lines(tmp_path, in_order=in_order) as lines:
            lines.sink.failing, lines.sink.bad = 3, {2, 7}
            lines.put(*range(9))
            await lines.until(7)
            assert (lines.backlog.stored, lines.backlog.refused) == (7, 2)

    run_task(main())


@pytest.mark.parametrize("in_order", [False, True])
def test_an_end_in_any_turn_of_the_loop_loses_nothing(tmp_path: Path, in_order: bool) -> None:
    ended = Counter[tuple[bool, bool]]()

    async def main(turns: int) -> None:
        folder = tmp_path / str(turns)
        async with Lines(folder, in_order=in_order, stalls_after=0.0) as lines:
            lines.sink.failing = turns % 3
            lines.put(*range(7))
            await ticks(turns // 2)
            lines.outlet.press()
            lines.put(*range(7, 12))
            await ticks(turns - turns // 2)
            stored = lines.sink.stored
        ended[bool(stored), bool(lines.backlog.spooled)] += 1
        assert lines.backlog.stored + lines.backlog.spooled == 12 and not lines.backlog.dropped["stopped"]
        async with Lines(folder, in_order=in_order) as after:
            await after.until(lines.backlog.spooled)
        found = stored + after.sink.stored
        assert found == list(range(12)) if in_order else sorted(found) == list(range(12))

    for turns in range(60):
        run_task(main(turns))
    assert ended[False, True] and ended[True, True]


def test_a_round_that_is_slow_is_in_the_spool_until_it_is_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with Lines(tmp_path, in_order=True, stalls_after=0.001) as lines:
            lines.sink.gate.clear()
            lines.put(*range(8))
            await until_async(lambda: lines.backlog.spooled == 8 and not lines.backlog.is_spilling())
            assert lines.outlet.stalled and lines.sink.asked == 1 and lines.backlog.held() == 0
            lines.put(8)
            lines.sink.gate.set()
            await lines.until(9)
            assert lines.sink.stored == list(range(9)) and not lines.outlet.stalled

    run_task(main())


def test_without_room_in_the_spool_what_waits_is_written_without_the_detour(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with Lines(tmp_path, in_order=False, max_bytes=300) as lines:
            lines.sink.up = False
            lines.put(*range(20))
            await until_async(lambda: lines.outlet.spools[0].stats().refused >= 3)
            spooled = lines.backlog.spooled
            assert 0 < spooled < 20 and lines.backlog.held() == 20 - spooled
            lines.sink.up = True
            await lines.until(20)

    run_task(main())
    assert caplog.text.count("no room") == 1


def test_owns_up_to_what_the_spool_did_not_take_at_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        lines = Lines(tmp_path, in_order=True, max_bytes=300)
        async with lines:
            lines.sink.gate.clear()
            lines.put(*range(20))
            await ticks()
        assert lines.backlog.spooled > 0 and lines.backlog.dropped["stopped"] == 20 - lines.backlog.spooled

    run_task(main())


def test_a_fault_of_the_sink_is_raised_and_the_items_wait(tmp_path: Path) -> None:
    async def main() -> None:
        async with Lines(tmp_path, in_order=True) as lines:
            lines.sink.bad = None  # type: ignore[assignment]
            lines.put(1, 2)
            await asyncio.wait({lines.tasks[0]})
            assert isinstance(lines.tasks.pop(0).exception(), TypeError)
            assert (list(lines.backlog.waiting), lines.backlog.imbalance()) == ([1, 2], 0)

    run_task(main())


def test_a_stop_has_two_stages() -> None:
    async def main() -> None:
        changes = Changes()
        stop = TwoStageStop(changes)
        told = [asyncio.create_task(changes.wait()) for _ in range(2)]
        await ticks()
        stop()
        await asyncio.wait(told)
        assert (stop.stage, stop.stopped.is_set(), stop.forced.is_set()) == (1, True, False)
        stop()
        stop()
        assert (stop.stage, stop.forced.is_set()) == (3, True)
        await changes.until(stop.forced.is_set)
        await changes.until(lambda: False, 0.001)

    run_task(main())
