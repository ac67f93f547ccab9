"""From a bounded backlog to a sink; to the spool when that is away, and back from there. ``runtime.backlog`` decides.

``Sink``     where the items go; who is at fault when they do not: what it refuses for its own sake is counted, and
             ``SinkAway`` says that all is to be written once more.
``Outlet``   one backlog and its tasks: writers, a spooler and, unless the items are in order, a replayer.
``TwoStageStop``   the first call ends the intake, the second forces.

Promised by ``Outlet``
- What ``Backlog`` promises. An item is in one place at every moment, whatever is cancelled: the counts balance.
- What is in the spool stays there until the sink has it, and comes back in its order. A disk that refuses is asked
  again; what it has not taken waits in memory, and is written without the detour if the sink is there.
- ``save``: what is in memory when all else has ended is in the spool, or dropped and counted.

Not promised: that a row is written once. What was under way when a life ended is in the spool, and may be in the sink
as well: the sink knows a batch by its id, or a reader a row by its own.

All is in one event loop but the files, which are in threads (``runtime.spool``), and the decoding of what they hold.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar

from coordination import Clock, Rng, cancel_all, wait_for_event
from primitives import Backoff
from runtime.backlog import Backlog, Round
from runtime.options import CannotStart
from runtime.spool import EncodedBatch, Spool

T = TypeVar("T")

BACK_OFF = 0.1, 5.0  # seconds before the spool is replayed again after a failure, and at most
LOOK = 1.0  # seconds after which somebody who waits for a change looks by himself, for what nobody tells


class SinkAway(Exception):
    """It is not the items' fault that they were not written: the same again, later."""


class Sink(Protocol[T]):
    """Where the items go."""

    async def write(self, items: list[T]) -> tuple[int, int]:
        """How many rows are stored, and how many it refuses for their own sake. ``SinkAway``."""

    async def ready(self, seconds: float) -> bool:
        """Whether it can be asked, after so many seconds at the most."""

    def diverts(self) -> bool:
        """Whether it is not to be asked now, and what waits for it goes to the spool."""

    def encode(self, items: Sequence[T]) -> EncodedBatch:
        """The file of the spool that holds them."""

    def decode(self, batch: EncodedBatch) -> list[T]:
        """What ``encode`` wrote. In a thread."""


def unusable(folder: object, error: Exception) -> CannotStart:
    """What is said of a spool that cannot be opened."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CannotStart(f"the spool {folder} cannot be used: {why}")


class Changes:
    """Wakes all who wait for anything to change."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._event = clock, asyncio.Event()

    def tell(self) -> None:
        """Wake them."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seconds: float = math.inf) -> bool:
        """Until the next ``tell``, at most so many ``seconds``. Whether it came."""
        return await wait_for_event(self._event, seconds)

    async def until(self, condition: Callable[[], bool], seconds: float = math.inf) -> None:
        """Wait for ``condition``, at most so many ``seconds``."""
        deadline = self._clock() + seconds
        while not condition() and (left := deadline - self._clock()) > 0:
            await self.wait(min(LOOK, left))


class TwoStageStop:
    """The two stages of a program's end, which ``changes`` tells."""

    def __init__(self, changes: Changes) -> None:
        self._changes, self.stage = changes, 0
        self.stopped, self.forced = asyncio.Event(), asyncio.Event()

    def __call__(self) -> None:
        """The first call: no more intake, and what is there is written. The second: it goes to the spool at once."""
        self.stage += 1
        (self.stopped if self.stage == 1 else self.forced).set()
        self._changes.tell()


class Outlet(Generic[T]):
    """Items of ``backlog`` on their way to ``sink``, or to the first of ``spools``; the others are only emptied.

    ``linger``: seconds that a round may wait for more. ``stalls_after``: seconds without an answer after which what is
    in memory goes to the spool. ``replay_files``: of the spool, that are written together. ``ask_again``: seconds until
    a disk that refused is asked again.
    """

    def __init__(
        self,
        backlog: Backlog[T],
        sink: Sink[T],
        spools: Sequence[Spool] = (),
        *,
        log: logging.Logger,
        changes: Changes,
        replay_files: int = 1,
        linger: float = 0.0,
        stalls_after: float | None = None,
        ask_again: float = 0.2,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        self.backlog, self.sink, self.spools = backlog, sink, spools
        self._log, self._changes, self._clock, self._rng = log, changes, clock, rng
        self._linger, self._stalls_after = linger, stalls_after
        self._replay_files, self._ask_again = replay_files, ask_again
        self.stopping = self.stalled = self._pressed = self._full = False  # ``stalled``: there was no answer in time
        self._work, self._spoolable = asyncio.Event(), asyncio.Event()
        self._putting: asyncio.Task[bool] | None = None
        self._removing = set[asyncio.Task[None]]()

    async def open(self) -> None:
        """Take over what a previous life left in the spools. ``SpoolInUse``, ``OSError``."""
        for spool in self.spools:
            self.backlog.recover(await asyncio.to_thread(spool.open))

    def put(self, items: Sequence[T], *, divert: bool = False) -> None:
        """Take ``items`` for the sink, or for the spool. Ask ``backlog.room`` first."""
        self.backlog.accept(items, divert=divert)
        (self._spoolable if divert else self._work).set()

    def press(self) -> None:
        """Somebody needs room: what is in memory goes to the spool, if there is one."""
        self._pressed = True
        self._spoolable.set()

    def stop(self) -> None:
        """Nothing more comes: no round waits for more."""
        self.stopping = True
        self._work.set()

    # ------------------------------------------------------------------------------------------------------- the tasks

    def tasks(self, writers: int = 1) -> dict[str, Callable[[], Coroutine[Any, Any, None]]]:
        """What is to run, by name, until it is cancelled."""
        found = dict.fromkeys((f"writer {n}" for n in range(writers)), self.write)
        if self.spools:
            found["spooler"] = self.fill_spool
            if not self.backlog.in_order:
                found["replayer"] = self.replay
        return found

    async def write(self) -> None:
        """A writer of what waits in memory; in order, of what is in the spool before that."""
        backlog, sink, lingered = self.backlog, self.sink, False
        while True:
            step = backlog.next_step(lingered or self.stopping or not self._linger)
            if step == "wait":
                await self._changes.wait()
            elif step == "replay":
                try:
                    await self._replay(self.spools[0])
                except OSError as error:  # neither files nor memory left: that passes
                    self._log.warning("the spool cannot be read: %s", error)
                    await asyncio.sleep(self._ask_again)
            elif step == "idle":
                self._work.clear()
                await self._work.wait()
            elif sink.diverts():
                backlog.divert()
                self._spoolable.set()
            elif step == "linger":
                lingered = True
                await asyncio.sleep(self._linger)
            elif await sink.ready(0.1):
                lingered = False
                await self._write(backlog.take())

    async def _write(self, round: Round[T], spool: Spool | None = None) -> bool:
        """Whether all is there. It is cancelled with the caller, and has then to be written again."""
        self._changes.tell()
        writing = asyncio.create_task(self.sink.write(round.items))
        try:
            while not (await asyncio.wait({writing}, timeout=self._stalls_after))[0]:
                self.stalled = True
                self.press()
        finally:
            try:
                await cancel_all([writing])
            finally:
                away = writing.cancelled() or writing.exception() is not None
                if away:
                    self.backlog.failed(round)
                else:
                    self.stalled = False
                    self._remove(spool, self.backlog.landed(round, *writing.result()))
                self._work.set()
                self._changes.tell()
        if away and not isinstance(writing.exception(), SinkAway):
            writing.result()
        return not away

    def _remove(self, spool: Spool | None, files: Sequence[str]) -> None:
        """Beside all else; the task begins before any that reads is made."""
        if files:
            task = asyncio.create_task((spool or self.spools[0]).remove(files))
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    async def replay(self) -> None:
        """A writer of what is in the spools, whenever there is a sink."""
        backoff = Backoff(*BACK_OFF, self._rng)
        while True:
            spool = next((each for each in self.spools[::-1] if each.stats().batches), None)
            if spool is None:
                await self._changes.wait()
            elif await self.sink.ready(1.0):
                if await self._replay(spool):
                    backoff.reset()
                else:
                    await asyncio.sleep(backoff.next())

    async def _replay(self, spool: Spool) -> bool:
        """What is in ``spool``, the oldest first. The next files are read while those before are under way. False if
        the sink is away."""
        reading = asyncio.create_task(self._read(spool, 0))
        try:
            while found := await reading:
                names, items = [name for name, _ in found], [item for _, items in found for item in items]
                reading = asyncio.create_task(self._read(spool, len(names)))
                if not await self._write(self.backlog.replay(items, names), spool):
                    return False
            return True
        finally:
            await cancel_all([reading])

    async def _read(self, spool: Spool, skip: int) -> list[tuple[str, list[T]]]:
        """The oldest files but ``skip``, and what is in them."""
        try:
            found = await spool.first(self._replay_files, skip)
        finally:  # it may fail, or be cancelled, after it has set some aside
            lost = sum(each.stats().lost for each in self.spools) - self.backlog.lost
            if lost:
                self.backlog.lose(lost)
                self._log.error("%d rows of the spool could not be read again", lost)
                self._changes.tell()
        return await asyncio.to_thread(lambda: [(name, self.sink.decode(batch)) for name, batch in found])

    async def fill_spool(self) -> None:
        """The spooler: what is to go to the spool, in order."""
        backlog = self.backlog
        while True:
            if self._pressed:
                self._pressed = False
                backlog.press()
            if not backlog.is_spilling():
                self._spoolable.clear()
                await self._spoolable.wait()
            elif not await self._put_next():
                if not self.sink.diverts() and await self.sink.ready(0.0):
                    backlog.undivert()
                    self._work.set()
                self._changes.tell()
                await asyncio.sleep(self._ask_again)
                self._changes.tell()

    async def _put_next(self) -> bool:
        """One more file. Cancelled, it goes on nevertheless."""
        self._putting = asyncio.create_task(self._put())
        return await asyncio.shield(self._putting)

    async def _put(self) -> bool:
        items, spool = self.backlog.next_file(), self.spools[0]
        name: str | None = None
        try:
            name = await spool.put(self.sink.encode(items))
        finally:
            if not self.backlog.filed(name):
                self._remove(spool, [name or ""])
            self._work.set()
            self._changes.tell()
        if name is None and not self._full:
            self._log.error("spool: no room, or it cannot be written: what is there waits in memory")
        self._full = name is None
        return name is not None

    # --------------------------------------------------------------------------------------------------------- the end

    async def save(self, seconds: float) -> int:
        """When all tasks have ended: what is in memory goes to the spool, for so many ``seconds``, and is dropped
        otherwise. How many rows that are."""
        deadline = self._clock() + seconds
        if self._putting is not None:
            await asyncio.wait({self._putting})
        self.backlog.divert()
        while self.spools and self.backlog.is_spilling() and self._clock() < deadline and await self._put_next():
            pass
        return self.backlog.drop("stopped")

    async def close(self) -> None:
        """Let the spools go. What is in them stays."""
        if self._removing:
            await asyncio.wait(self._removing)
        for spool in self.spools:
            await spool.close()
