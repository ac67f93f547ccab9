"""The figures as a member of a consumer group: trades from Kafka, windows in processes, rows back into Kafka.

It reads no further than what it has published: offsets are committed after the rows are published, so each trade is
computed at least once. A member that takes over a partition reads the longest window before it again; a row that was
not due yet when a member was killed is told with the symbol's next trade.

All is in one event loop, but the figures. One lock, ``_batch``, is held from when trades are taken until they are
committed: a partition goes to another member between two batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

from market.consumers import Group, Taken
from market.display import lost
from market.flow import MarketOptions, MarketProgram
from runtime.loop import ends_before
from runtime.options import CannotStart
from runtime.processes import WorkerDied


class Analyser(MarketProgram):
    """A member of the consumer group that computes what is in ``trades``. ``run`` once."""

    def __init__(self, options: MarketOptions, *, group_options: Mapping[str, Any] | None = None, **more: Any) -> None:
        super().__init__(options, **more)
        assert options.kafka is not None
        self.group = Group(
            options.kafka,
            options.group,
            prefix=options.prefix,
            look_back=options.windows[-1] + options.lateness,
            revoked=self._revoked,
            security=self._security,
            **(group_options or {}),
        )
        self._batch = asyncio.Lock()  # held from when trades are taken until they are committed
        self._queued = self._skipped = 0

    async def _revoked(self) -> None:
        """The batch in hand is committed, and its rows told, before its partition is another's."""
        async with self._batch:
            await self._tell_all()

    async def _work(self) -> None:
        try:
            await self._read()
        except Exception:  # what was taken is not to be committed with what comes next: read again
            await self.group.stop()
            await self.group.start()
            raise

    async def _read(self) -> None:
        told = True
        while True:
            taken = await self.group.take()
            async with self._batch:
                if taken.trades or taken.again or taken.dead:
                    await self._batch_of(taken)
                    told = False
                elif not told:
                    await self._tell_all()
                    told = True

    async def _batch_of(self, taken: Taken) -> None:
        self._trades += len(taken.trades)
        self._queued = len(taken.trades)
        try:
            for letter in taken.dead:
                await self._bury(letter)
            if taken.again:
                await self.workers.submit(taken.again)
            if taken.trades:
                rows = await self._computed_rows(taken.trades)
                self._queued = 0
                self.board.count(taken.trades)
                await self._tell(rows)
        finally:
            self._skipped += self._queued
            self._queued = 0
        await self.publisher.flush()
        await self.group.commit()

    async def run(self) -> int:
        """Until it is stopped. The exit code: 1 if something was lost."""
        async with contextlib.AsyncExitStack() as stack:
            await self._begin(stack)
            try:
                joined = await ends_before(self._join(), self.stop.stopped)
            except (TimeoutError, WorkerDied) as error:
                raise CannotStart(str(error)) from None
            if joined:
                stack.push_async_callback(self.group.stop)
                self.tasks.start("analytics", self._work)
                await self.stop.stopped.wait()
                self._deadline = time.monotonic() + self.options.stop_limit
                await self._unless_forced(self._finish(), self.options.stop_limit * 0.6)
                await self.tasks.end()
        return int(lost(self.snapshot()) > 0)

    async def _join(self) -> None:
        """Ready to compute before there is anything: a member that is slow holds up the group's rebalancing."""
        await self.workers.start()
        await self.group.start()

    async def _finish(self) -> None:
        """The batch in hand is published and committed, and all rows are told; no further one is begun."""
        async with self._batch:
            self.tasks.running["analytics"].cancel()
            await self._tell_all()

    def _more(self) -> dict[str, Any]:
        counts = {"offered": self._trades, "skipped": self._skipped, "queued": self._queued}
        return super()._more() | counts | self.group.stats()._asdict()
