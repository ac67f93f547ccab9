"""The spool side of a publisher: what Kafka does not take goes to files, the oldest first, and comes back from them.

What is under way is copied, before what waits is moved: so the order of a symbol holds. A copy is removed when the
answer comes. The files hold lines as ``market.topics`` writes them; what one holds can be published by any later life.

``spill`` is called by one task at a time; while it runs, ``spilling`` is true and nothing is taken from the backlog by
others. Files are written and read by the spool's thread, and lines are decoded in threads; all else is in the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from uuid import uuid4

from market.backlog import Backlog
from market.topics import Record, line_of_record, log, records_of
from runtime.spool import EncodedBatch, Spool

FILE = 2500
"""Records of a file of the spool."""


class Overflow:
    """Moves records of ``backlog`` to ``spool``, for the topics of these names. ``changed`` is told of each move."""

    def __init__(self, backlog: Backlog, spool: Spool, topics: tuple[str, str], changed: Callable[[], None]) -> None:
        self.spool = spool
        self.spilling = False
        self._backlog, self._topics, self._changed = backlog, topics, changed

    async def spill(self) -> bool:
        """What is under way, and what waits now, to the end of the spool. False if it would take no more."""
        backlog = self._backlog
        self.spilling = True
        try:
            if backlog.under_way and not backlog.files and not await self._copy_under_way():
                return False
            left = len(backlog.waiting)  # what comes meanwhile has its turn when something was published again
            while backlog.waiting and left > 0:
                records = backlog.take(FILE)
                left -= len(records)
                backlog.moving, batch = len(records), None
                try:
                    batch = await self._put(records)
                finally:
                    backlog.moving = 0
                    if batch is None:
                        backlog.put_back(records)
                if batch is None:
                    return False
                backlog.spooled += len(records)
                self._changed()
            return True
        finally:
            self.spilling = False
            self._changed()

    async def _copy_under_way(self) -> bool:
        backlog, records = self._backlog, self._backlog.under_way
        batch = await self._put(records)
        if batch is None:
            return False
        found = await self.spool.first(1)
        if not found or found[0][1].id != batch.id:
            return False
        name = found[0][0]
        if backlog.under_way is records:
            backlog.copied(name)
        else:  # the answer was quicker
            await self.spool.remove([name])
        return True

    async def _put(self, records: Sequence[Record]) -> EncodedBatch | None:
        data = b"".join(line_of_record(record) + b"\n" for record in records)
        batch = EncodedBatch(uuid4(), len(records), time.time(), data)
        return batch if await self.spool.put(batch) else None

    async def read(self, most: int, skip: int) -> list[tuple[str, list[Record]]]:
        """The oldest files of the spool but ``skip``: their names, and what is in them, ``most`` records in all."""
        found = await self.spool.first(most // FILE, skip)
        gone = self.spool.stats().lost - self._backlog.lost
        if gone:  # set aside: the disk gave back something else
            self._backlog.lose(gone)
            log.error("kafka: %d records of the spool could not be read again", gone)
            self._changed()
        return [(name, await asyncio.to_thread(records_of, batch.data, *self._topics)) for name, batch in found]
