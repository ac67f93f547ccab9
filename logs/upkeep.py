"""What one worker does for the tables beside storing: partitions ahead, and metadata that came late."""

from __future__ import annotations

import asyncio
import logging

from logs.enrich import Enricher
from logs.store import Store
from runtime.postgres import Database, first_line

log = logging.getLogger("ingest")

FILL_EVERY, FILL_SERVICES = 2.0, 1000
"""Seconds between two looks for rows without metadata; services filled in at a time."""
MAINTAIN_EVERY = 600.0  # seconds between two looks at the partitions


async def maintain(database: Database, store: Store) -> None:
    """Partitions ahead, and none that are too old; for ever."""
    said = ""
    while True:
        await database.ready()
        try:
            await store.maintain()
        except Exception as error:
            if said != (said := f"{type(error).__name__}: {first_line(error)}"):
                log.warning("maintenance: %s", said)
            await asyncio.sleep(FILL_EVERY)
            continue
        said = ""
        await asyncio.sleep(MAINTAIN_EVERY)


async def fill_in(database: Database, store: Store, enricher: Enricher) -> None:
    """Metadata for rows that were stored without; for ever. Services whose metadata never come, however many, must not
    be all that is looked at."""
    after = said = ""
    while enricher.configured:
        await asyncio.sleep(FILL_EVERY)
        await database.ready()
        try:
            services = await store.missing(FILL_SERVICES, after)
            after = services[-1] if len(services) == FILL_SERVICES else ""
            for service in services:
                found = await enricher.load(service)
                if found is not None:
                    await store.fill_in(service, found)
            said = ""
        except Exception as error:
            if said != (said := f"{type(error).__name__}: {first_line(error)}"):
                log.warning("filling in: %s", said)
