"""What the aggregation API keeps of its upstreams: the result of each load, in PostgreSQL.

``keep`` returns at once: rows go through a ``Writer``, whose promises hold here. ``latest``, ``page``, ``outcomes`` and
``forget`` ask the database, and raise ``Unavailable`` while it is away; what they read is bounded in rows and bytes.
All of it runs in the event loop; there is no lock.
"""

from __future__ import annotations

import itertools
import secrets
import sys
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from runtime.postgres import Database
from runtime.writer import Writer

if TYPE_CHECKING:
    from runtime.postgres import PooledConnection

UPSTREAM_RESULTS = """
DO $do$ BEGIN IF to_regclass('upstream_results') IS NULL THEN
CREATE TABLE IF NOT EXISTS upstream_results (
    writer     bigint           NOT NULL,  -- drawn by each process: with serial it makes a row sent twice one row
    serial     bigint           NOT NULL,
    source     text             NOT NULL,
    parameters jsonb            NOT NULL,
    fetched_at timestamptz      NOT NULL,
    latency    double precision NOT NULL,  -- seconds
    status     text             NOT NULL,  -- ok, or the kind of an error
    payload    jsonb,
    configuration text     NOT NULL DEFAULT '',  -- a digest of what was asked for, and how
    PRIMARY KEY (writer, serial)
);
CREATE INDEX IF NOT EXISTS upstream_results_by_time ON upstream_results (source, fetched_at DESC);
CREATE INDEX IF NOT EXISTS upstream_results_by_age ON upstream_results (fetched_at);
ELSIF (SELECT bool_or(attname = 'writer') AND NOT bool_or(attname = 'configuration') FROM pg_attribute
       WHERE attrelid = to_regclass('upstream_results')) THEN  -- of an earlier version
ALTER TABLE upstream_results ADD COLUMN configuration text NOT NULL DEFAULT '';
END IF;
IF to_regclass('invalidations') IS NULL THEN
CREATE TABLE IF NOT EXISTS invalidations (
    told_at timestamptz NOT NULL DEFAULT now(),
    message text        NOT NULL  -- as it was told (api/bus.py): for who had no connection then
);
CREATE INDEX IF NOT EXISTS invalidations_by_time ON invalidations (told_at);
END IF; END $do$;
"""
RECENT = 20_000  # results of one source among which a start looks for the last of each combination of parameters


class Result(NamedTuple):
    """The result of a load."""

    source: str
    parameters: str  # a JSON object
    fetched_at: datetime
    latency: float  # seconds
    status: str
    payload: str | None  # JSON
    configuration: str = ""  # ``Upstream.digest``


class History:
    """The table ``upstream_results``: written by a ``Writer``, read by ``/history``, ``/report`` and at the start."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writer_id, self._serial = secrets.randbits(63), itertools.count()
        self.writer: Writer[tuple[int, Result]] = Writer(database, self._insert)

    def keep(self, result: Result) -> None:
        """Queue ``result`` to be written. Without a database nothing is kept, and nothing counted."""
        if self._database.server is not None:
            size = sys.getsizeof(result.payload) + sys.getsizeof(result.parameters) + 200
            self.writer.offer((next(self._serial), result), size)

    async def _insert(self, connection: PooledConnection, rows: Sequence[tuple[int, Result]]) -> None:
        columns = [list(column) for column in zip(*((serial, *result) for serial, result in rows), strict=True)]
        await connection.execute(
            "INSERT INTO upstream_results SELECT $1, serial, source, parameters::jsonb, fetched_at, latency, status,"
            " payload::jsonb, configuration FROM unnest($2::bigint[], $3::text[], $4::text[], $5::timestamptz[],"
            " $6::float8[], $7::text[], $8::text[], $9::text[])"
            " AS row(serial, source, parameters, fetched_at, latency, status, payload, configuration)"
            " ON CONFLICT DO NOTHING",
            self._writer_id,
            *columns,
        )

    async def latest(
        self, source: str, within: float, limit: int, max_bytes: int = 64_000_000, configuration: str = ""
    ) -> list[Result]:
        """The last good result for each combination of parameters, none older than ``within`` seconds, latest first.

        Of the last ``RECENT`` good ones of this configuration; at most ``limit``, and none after those that hold
        ``max_bytes`` together.
        """
        query = (
            "SELECT source, parameters::text, fetched_at, latency, status, payload::text FROM upstream_results"
            " JOIN (SELECT DISTINCT ON (parameters) writer, serial FROM (SELECT writer, serial, parameters, fetched_at"
            " FROM upstream_results WHERE source = $1 AND fetched_at > $2 AND status = 'ok' AND configuration = $5"
            " ORDER BY fetched_at DESC LIMIT $4) AS recent ORDER BY parameters, fetched_at DESC) AS last"
            " USING (writer, serial) ORDER BY fetched_at DESC LIMIT $3"
        )
        since = datetime.now(UTC) - timedelta(seconds=within)
        return (await self._read(max_bytes, limit, query, source, since, limit, RECENT, configuration))[0]

    async def page(
        self, source: str, parameters: str, before: datetime, limit: int, max_bytes: int
    ) -> tuple[list[Result], bool]:
        """Results before ``before``, the latest first, whose parameters contain ``parameters``; and if there are more.

        At most ``limit``, but for those of the very same time as the last: the next page begins before it. None after
        those that hold ``max_bytes`` together.
        """
        query = (
            "SELECT source, parameters::text, fetched_at, latency, status, payload::text FROM upstream_results"
            " WHERE source = $1 AND fetched_at < $2 AND parameters @> $3::text::jsonb"
            " ORDER BY fetched_at DESC FETCH FIRST $4 ROWS WITH TIES"
        )
        return await self._read(max_bytes, limit, query, source, before, parameters, limit + 1)

    async def _read(self, max_bytes: int, limit: int, query: str, *arguments: object) -> tuple[list[Result], bool]:
        results: list[Result] = []
        size = 0
        async with self._database.connection() as connection, connection.transaction(readonly=True):
            async for row in connection.cursor(query, *arguments, prefetch=20):
                result = Result(*row)
                full = len(results) >= limit or size > max_bytes
                if full and result.fetched_at != results[-1].fetched_at:
                    return results, True
                results.append(result)
                size += len(result.payload or "")
        return results, len(results) > limit  # all at one time at the end: whether there are more was not to be seen

    async def outcomes(self, source: str, since: datetime, limit: int) -> tuple[array[float], array[float], list[str]]:
        """Times (seconds since 1970), latencies (seconds) and statuses of the last ``limit`` results, oldest first."""
        times, latencies, statuses = array("d"), array("d"), list[str]()
        async with self._database.connection() as connection, connection.transaction(readonly=True):
            cursor = await connection.cursor(
                "SELECT extract(epoch FROM fetched_at)::float8, latency, status FROM upstream_results"
                " WHERE source = $1 AND fetched_at >= $2 ORDER BY fetched_at DESC LIMIT $3",
                source,
                since,
                limit,
            )
            while rows := await cursor.fetch(1000):  # in portions, so that the event loop is never held for long
                for when, latency, status in rows:
                    times.append(when)
                    latencies.append(latency)
                    statuses.append(status)
        for column in (times, latencies, statuses):
            column.reverse()
        return times, latencies, statuses

    async def forget(self, older_than: float, batch: int = 5000) -> int:
        """Delete what is older than ``older_than`` seconds, in batches, so that nobody waits long; returns how many."""
        before, deleted = datetime.now(UTC) - timedelta(seconds=older_than), 0
        async with self._database.connection() as connection:
            await connection.execute("DELETE FROM invalidations WHERE told_at < $1", before)
        while True:
            async with self._database.connection() as connection:
                status = await connection.execute(  # by place: a join with the whole table would scan it each time
                    "DELETE FROM upstream_results WHERE ctid = ANY(ARRAY("
                    "SELECT ctid FROM upstream_results WHERE fetched_at < $1 ORDER BY fetched_at LIMIT $2))",
                    before,
                    batch,
                )
            count = int(status.split()[-1])
            deleted += count
            if count < batch:
                return deleted
