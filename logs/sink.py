"""The database as the sink of sealed batches: when it is asked, and what its answers mean. Files hold one batch each.

A batch keeps its id, in the spool too: one whose commit was not seen is stored once. What a row is refused for is
``logs.store``'s; whatever else it raises is the database's fault, and all is to be written again.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence

from logs.store import Store
from runtime.outlet import SinkAway
from runtime.postgres import Database
from runtime.spool import EncodedBatch

log = logging.getLogger("ingest")

PATIENCE = 5.0  # seconds from the start for which batches wait for the first connection, and are not spooled yet
DISTRUST = 1.0  # seconds for which a database that is there, but could not write, is not asked again


class DatabaseSink:
    """``store``, in ``database``."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database, self._store = database, store
        self.begun = self._distrust = -math.inf
        self.stopping = False
        self.missing = 0  # rows that were stored without the metadata that there should be
        self.lags: deque[float] = deque([0.0], maxlen=100)
        """Seconds from the receipt of a batch's oldest event to its commit."""

    async def write(self, items: list[EncodedBatch]) -> tuple[int, int]:
        """Rows stored, and rows in ``dead_letter``. ``SinkAway``."""
        try:
            outcomes = await self._store.write(items)
        except Exception as error:
            if self._database.state == "connected":
                self._distrust = time.monotonic() + DISTRUST
            self._database.stored(error, "batches go to the spool", log)
            raise SinkAway from error
        now = time.time()
        for batch in items:
            self.missing += batch.data.count(b"\tmissing\n")
            self.lags.append(max(0.0, now - batch.received_at))
        self._database.stored(log=log)
        return sum(outcome.stored for outcome in outcomes), sum(outcome.dead for outcome in outcomes)

    async def ready(self, seconds: float) -> bool:
        """Whether there is a connection, after so many seconds at the most."""
        return await self._database.ready(seconds)

    def diverts(self) -> bool:
        """Whether the database is not to be asked now."""
        now = time.monotonic()
        if self._database.state == "connected":
            return now < self._distrust
        return self.stopping or now >= self.begun + PATIENCE

    def encode(self, items: Sequence[EncodedBatch]) -> EncodedBatch:
        """The one there is."""
        (batch,) = items
        return batch

    def decode(self, batch: EncodedBatch) -> list[EncodedBatch]:
        """The same."""
        return [batch]
