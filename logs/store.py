"""Batches of log events in PostgreSQL: each is stored once, whatever breaks; what no row can hold is a dead letter.

A batch comes sealed (``logs.seal``): what happens to it afterwards (written, spooled, replayed days later, written
again because nobody saw the commit) never changes its rows or its id.

Promised by ``Store``
- A batch is stored once: its id goes to ``log_batches`` in the transaction of its rows. An id that is there already
  writes nothing, and the outcome of the first time is the answer. Two connections that write one id at once: the
  second waits for the first, and then either finds its id or writes the rows itself.
- A row that the database refuses is found by halving its batch (each half in a savepoint) and goes to ``dead_letter``,
  as the bytes that were sent, with the error; every other row of the batch is stored. One bad row in 1,000 costs about
  twenty small COPYs, a thousand bad rows about two thousand.
- A row of a day that has no partition is no bad row: the partition is made, and the batch is written again.
- An error that is no row's fault (disk full, database read-only) is raised, and writes nothing of the batch it met.
  ``Unavailable`` is raised while the database is away; what was under way may have been committed. Either way: write
  the same batches again.
- Partitions come and go under one advisory lock; any number of stores may maintain one database.

Not promised
- That an id is remembered for longer than ``KEEP_IDS_DAYS``: a batch whose commit was not seen has to come again
  within that time.
- More than the server's own ``synchronous_commit`` says: with it off, a crash of the server takes what it had promised.
- That retention happens at once: a long query holds a partition back until the next ``maintain``.
- Room for partitions of others that cover a day which a batch needs, or for a table that somebody detached and left
  under its name: ``write`` raises what PostgreSQL says to that.

Of each day (UTC, by the time of receipt) there is one partition, ``logs_YYYY_MM_DD``. They are made beside the table
and attached to it, which makes no writer wait. To drop one the whole table has to stand still for a moment; that is
waited for ``DROP_LIMIT`` seconds at the most, for the writers wait behind it.

Where what runs: all in the event loop. There is no lock in this process.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import asyncpg

from coordination import Clock, stats_repr
from logs.parse import Metadata
from runtime.postgres import TOO_SLOW, AdvisoryLock, Database, TooSlow, halves, is_a_rows_fault
from runtime.spool import EncodedBatch

if TYPE_CHECKING:
    from runtime.postgres import PooledConnection

log = logging.getLogger("uvicorn.error")

WRITE_LIMIT = 30.0  # seconds that one transaction of batches may take before its connection is broken off
HALVE_LIMIT = 120.0  # the same for a batch with bad rows in it: if all are bad, thousands of statements
DROP_LIMIT = 0.5  # seconds that a drop may wait for the table to stand still
KEEP_IDS_DAYS = 7  # days after which the id of a batch is forgotten
DAYS_AT_ONCE = 8
"""Partitions that one batch may ask for. It spans seconds; more days than these mean that it is rubbish."""
EARLIEST, LATEST = date(1970, 1, 1), date(2199, 12, 31)
"""Days that may get a partition: also those of a clock that was never set."""
MAKE_TRIES = 5  # how often partitions are made for a batch, if others drop them at the same time
PIECE = 1 << 20  # bytes that are handed to the connection at a time
FILL_AT_ONCE = 5000

COLUMNS = (
    *("received_at", "event_at", "service", "host", "severity", "message", "attributes", "parse_error"),
    *("team", "environment", "region", "version", "enrichment"),
)

# CREATE INDEX takes its lock even if there is nothing to do, and would wait for the writers.
SCHEMA = """
DO $do$ BEGIN IF to_regclass('dead_letter') IS NULL THEN
CREATE TABLE IF NOT EXISTS logs (
    received_at timestamptz      NOT NULL,
    event_at    timestamptz      NOT NULL,
    service     text COLLATE "C" NOT NULL,
    host        text             NOT NULL,
    severity    smallint         NOT NULL,  -- 0 (emergency) to 7 (debug)
    message     text             NOT NULL,
    attributes  jsonb            NOT NULL,
    parse_error text,
    team        text,
    environment text,
    region      text,
    version     text,
    enrichment  text             NOT NULL   -- done; unknown (to the API); missing (to be filled in); none (no API)
) PARTITION BY RANGE (received_at);
CREATE INDEX IF NOT EXISTS logs_by_time ON logs USING brin (received_at) WITH (autosummarize = on);
CREATE INDEX IF NOT EXISTS logs_missing ON logs (service) WHERE enrichment = 'missing';
CREATE TABLE IF NOT EXISTS log_batches (
    id     uuid        PRIMARY KEY,
    stored integer     NOT NULL,
    dead   integer     NOT NULL,
    at     timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS log_batches_by_age ON log_batches USING brin (at) WITH (autosummarize = on);
CREATE TABLE IF NOT EXISTS dead_letter (
    batch       uuid        NOT NULL,
    position    integer     NOT NULL,       -- of the row in its batch, from 0
    received_at timestamptz,                -- null if it cannot be read
    line        bytea       NOT NULL,       -- as it was sent, in COPY's text format
    error       text        NOT NULL,
    at          timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (batch, position)
);
CREATE INDEX IF NOT EXISTS dead_letter_by_age ON dead_letter USING brin (at);
END IF; END $do$;
"""


class BatchOutcome(NamedTuple):
    """Rows of a batch in each table."""

    stored: int
    dead: int


class StoreStats(NamedTuple):
    """Counts since the start."""

    batches: int  # that were written, by this store
    stored: int
    dead: int
    repeated: int  # batches that were there already
    halved: int  # batches with bad rows
    filled: int  # rows whose metadata came later
    partitions_made: int
    partitions_dropped: int


class Miscounted(ValueError):
    """COPY took another number of rows than there are lines: one of them ends the data, or is two."""


# ---------------------------------------------------------------------------------------------------------- partitions

_PARTITION = re.compile(r"logs_(\d{4})_(\d\d)_(\d\d)", re.A)


def partition_name(day: date) -> str:
    """The name of a day's partition."""
    return f"logs_{day:%Y_%m_%d}"


def partition_day(name: str) -> date | None:
    """The day of a partition of ours; None if it is none."""
    match = _PARTITION.fullmatch(name)
    with contextlib.suppress(ValueError):
        return date(*map(int, match.groups())) if match else None
    return None


def received(line: bytes) -> datetime | None:
    """The first column of a line, if it is a time that can have a partition."""
    with contextlib.suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(line[: line.index(b"\t")].decode()).astimezone(UTC)
        return when if EARLIEST <= when.date() <= LATEST else None
    return None


def days_of(lines: Sequence[bytes]) -> list[date]:
    """The days that a batch needs, at most ``DAYS_AT_ONCE``: those of the most rows."""
    return [day for day, _ in Counter(map(_day, lines)).most_common(DAYS_AT_ONCE + 1) if day is not None][:DAYS_AT_ONCE]


def _day(line: bytes) -> date | None:
    when = received(line)
    return when.date() if when is not None else None


_ATTACHED = """
SELECT child.relname FROM pg_inherits JOIN pg_class AS child ON child.oid = inhrelid WHERE inhparent = 'logs'::regclass
"""
_LEAVES = "SELECT relid::regclass::text FROM pg_partition_tree('logs') WHERE isleaf AND relid <> 'logs'::regclass"


async def _partitions(connection: PooledConnection) -> dict[date, str]:
    names = [name for (name,) in await connection.fetch(_ATTACHED)]
    return {day: name for name in names if (day := partition_day(name)) is not None}


# ----------------------------------------------------------------------------------------------------------- the store

_RECORD = "INSERT INTO log_batches (id, stored, dead) VALUES {} ON CONFLICT DO NOTHING"
_LETTERS = (
    "INSERT INTO dead_letter (batch, position, line, error, received_at)"
    " SELECT $1, * FROM unnest($2::int[], $3::bytea[], $4::text[], $5::timestamptz[])"
)
# Plans must not depend on what the table was like when it was last analysed, if ever.
_PLANS = "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off"
_MISSING = """
WITH RECURSIVE names AS (
    (SELECT service FROM logs WHERE enrichment = 'missing' AND service > $2 ORDER BY service LIMIT 1)
    UNION ALL SELECT (
        SELECT service FROM logs WHERE enrichment = 'missing' AND service > names.service ORDER BY service LIMIT 1
    ) FROM names WHERE names.service IS NOT NULL
) SELECT service FROM names WHERE service IS NOT NULL LIMIT $1
"""
_FILL = """
UPDATE {} SET team = $2, environment = $3, region = $4, version = $5, enrichment = $6
WHERE enrichment = 'missing' AND ctid = ANY(ARRAY(
    SELECT ctid FROM {} WHERE enrichment = 'missing' AND service = $1 LIMIT $7 FOR UPDATE SKIP LOCKED))
"""
_FORGET = "DELETE FROM {0} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {0} WHERE at < now() - $1::interval LIMIT $2))"


def refuses(error: Exception) -> bool:
    """Whether an error is a row's fault; also one that a trigger of somebody's has raised."""
    return is_a_rows_fault(error) or isinstance(error, asyncpg.PLPGSQLError)


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])


class _Repeated(Exception):
    """Some of the batches are there already."""


class _Dropped(Exception):
    """A partition has gone since it was made."""


class RefusedRow(NamedTuple):
    """A row that was refused."""

    position: int
    line: bytes
    error: str


class Store:
    """The tables of the logs in ``database``, which has ``SCHEMA``.

    ``retain_days``: how many whole days to keep (None: all). ``ahead_days``: how many partitions there are after
    today's. ``clock``: seconds since 1970. Any number of tasks may use it at once.
    """

    def __init__(
        self,
        database: Database,
        *,
        retain_days: int | None = None,
        ahead_days: int = 3,
        clock: Clock = time.time,
    ) -> None:
        if retain_days is not None and retain_days < 1:
            raise ValueError(f"at least one day is kept, not {retain_days}")
        if not 0 <= ahead_days <= 366:
            raise ValueError(f"partitions are made for 0 to 366 days ahead, not {ahead_days}")
        self.retain_days, self.ahead_days = retain_days, ahead_days
        self._database, self._clock = database, clock
        self._batches = self._stored = self._dead = self._repeated = self._halved = self._filled = 0
        self._made = self._dropped = 0

    def stats(self) -> StoreStats:
        """The counts of this moment."""
        return StoreStats(
            self._batches,
            self._stored,
            self._dead,
            self._repeated,
            self._halved,
            self._filled,
            self._made,
            self._dropped,
        )

    __repr__ = stats_repr

    # ------------------------------------------------------------------------------------------------------- writing

    async def write(self, batches: Sequence[EncodedBatch]) -> list[BatchOutcome]:
        """Store ``batches``; the outcome of each, also of those that were stored before.

        All in one transaction as long as nothing is wrong with them, else one after the other. Raises ``Unavailable``
        (at once if the database is away already) and what is no row's fault; batches before the one that met it may be
        stored then.
        """
        if not batches:
            return []
        if await self._write_all(batches):
            return [BatchOutcome(batch.rows, 0) for batch in batches]
        return [await self._write_one(batch) for batch in batches]

    async def _write_all(self, batches: Sequence[EncodedBatch]) -> bool:
        """Write them, if they are new and good: the usual case."""
        rows = sum(batch.rows for batch in batches)
        # in one order everywhere, or two that write the same ids would wait for each other
        records = ", ".join(f"('{id}', {rows:d}, 0)" for id, rows in sorted(batch[:2] for batch in batches))
        try:
            async with self._database.connection(limit=WRITE_LIMIT) as connection, connection.transaction():
                if _count(await connection.execute(_RECORD.format(records))) < len(batches):
                    raise _Repeated
                await _copy(connection, [batch.data for batch in batches], rows)
        except Exception as error:
            if isinstance(error, TooSlow) and rows > 1:
                log.warning("%s: %d rows are halved", error, rows)
            elif not refuses(error) and not isinstance(error, _Repeated):
                raise
            return False
        self._add(len(batches), BatchOutcome(rows, 0))
        return True

    async def _write_one(self, batch: EncodedBatch) -> BatchOutcome:
        """Write a batch that has something wrong with it, or is there already."""
        lines = batch.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        days = days_of(lines)
        async with self._database.connection(limit=HALVE_LIMIT) as connection:
            for _ in range(MAKE_TRIES):
                await self._make(connection, days)
                with contextlib.suppress(_Dropped):
                    async with connection.transaction():
                        outcome, new = await _settle(connection, batch.id, lines, days)
                    if new:
                        self._halved += outcome.dead > 0
                        self._add(1, outcome)
                    else:
                        self._repeated += 1
                    return outcome
        raise RuntimeError("the partitions of a batch are dropped as often as they are made")

    def _add(self, batches: int, outcome: BatchOutcome) -> None:
        self._batches += batches
        self._stored += outcome.stored
        self._dead += outcome.dead

    # --------------------------------------------------------------------------------------------------- maintenance

    async def maintain(self) -> None:
        """Make the partitions of today and of ``ahead_days`` after it, drop what is older than ``retain_days``.

        To be called at the start and every few minutes. Forgets old ids too, and dead letters with the logs of their
        time. Raises ``Unavailable``.
        """
        now = datetime.fromtimestamp(self._clock(), UTC)
        days = [now.date() + timedelta(days=n) for n in range(self.ahead_days + 1)]
        async with self._database.connection(limit=WRITE_LIMIT) as connection:
            await self._make(connection, days)
        if self.retain_days is not None:
            await self._drop(now, timedelta(days=self.retain_days))
            await self._forget("dead_letter", self.retain_days)
        await self._forget("log_batches", KEEP_IDS_DAYS)

    async def _make(self, connection: PooledConnection, days: Sequence[date]) -> None:
        """Make those partitions of ``days`` that are not there."""
        if {*days} <= {*await _partitions(connection)}:
            return
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({AdvisoryLock.PARTITIONS:d})")
            there = await _partitions(connection)
            missing = sorted({*days} - {*there})
            for day in missing:
                name, begin, end = partition_name(day), f"{day} 00:00:00+00", f"{day + timedelta(days=1)} 00:00:00+00"
                await connection.execute(
                    f"CREATE TABLE {name} (LIKE logs INCLUDING ALL);"
                    f"ALTER TABLE logs ATTACH PARTITION {name} FOR VALUES FROM ('{begin}') TO ('{end}')"
                )
        self._made += len(missing)

    async def _drop(self, now: datetime, age: timedelta) -> None:
        """Drop the partitions that ended ``age`` ago, each in a transaction of its own."""
        async with self._database.connection(limit=WRITE_LIMIT) as connection:
            there = await _partitions(connection)
            # a clock that runs ahead, here or there, must not take everything
            before = min(now, await connection.fetchval("SELECT now()")) - age
        for day in sorted(there):
            if datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1) > before:
                return
            try:
                async with self._database.connection(limit=WRITE_LIMIT) as connection, connection.transaction():
                    await connection.execute(
                        f"SELECT pg_advisory_xact_lock({AdvisoryLock.PARTITIONS:d});"
                        f"SET LOCAL lock_timeout = '{DROP_LIMIT * 1000:.0f}ms'"
                    )
                    found = day in await _partitions(connection)
                    if found:
                        await connection.execute(f"DROP TABLE {there[day]}")
            except asyncpg.LockNotAvailableError:
                return
            except asyncpg.DependentObjectsStillExistError as error:  # a view of somebody's
                log.warning("logs: cannot drop %s: %s", there[day], error)
                continue
            self._dropped += found

    async def _forget(self, table: str, days: int, at_once: int = 20_000) -> None:
        while True:
            async with self._database.connection(limit=WRITE_LIMIT) as connection, connection.transaction():
                await connection.execute("SET LOCAL enable_seqscan = off")
                status = await connection.execute(_FORGET.format(table), timedelta(days=days), at_once)
            if _count(status) < at_once:
                return

    # ------------------------------------------------------------------------------------------------------- filling in

    async def missing(self, limit: int, after: str = "") -> list[str]:
        """Services, at most ``limit``, in the order of their names after ``after``, that have rows without metadata."""
        async with self._database.connection() as connection, connection.transaction(readonly=True):
            await connection.execute(_PLANS)
            return [name for (name,) in await connection.fetch(_MISSING, limit, after)]

    async def fill_in(self, service: str, found: Metadata | Enum, at_once: int = FILL_AT_ONCE) -> int:
        """Give the rows of ``service`` that lack it their metadata (or mark them as unknown). How many there were.

        In portions of ``at_once`` rows, each in a transaction of its own; whatever breaks in between is done, and what
        is left is found by the next call.
        """
        values = (*found, "done") if isinstance(found, Metadata) else (None, None, None, None, "unknown")
        async with self._database.connection() as connection:
            names = [name for (name,) in await connection.fetch(_LEAVES)]  # also those that others made
        total = 0
        for name in names:
            count = at_once
            while count >= at_once:
                async with self._database.connection(limit=WRITE_LIMIT) as connection, connection.transaction():
                    await connection.execute(_PLANS)
                    try:
                        status = await connection.execute(_FILL.format(name, name), service, *values, at_once)
                    except asyncpg.UndefinedTableError:  # dropped since
                        break
                count = _count(status)
                total += count
                self._filled += count
        return total


async def _settle(
    connection: PooledConnection, id: UUID, lines: Sequence[bytes], days: Sequence[date]
) -> tuple[BatchOutcome, bool]:
    """Within a transaction: store what can be stored. The outcome, and whether it is new."""
    if not _count(await connection.execute(_RECORD.format(f"('{id}', 0, 0)"))):
        record = await connection.fetchrow("SELECT stored, dead FROM log_batches WHERE id = $1", id)
        assert record is not None, "it was kept for days, and forgotten in this moment"
        return BatchOutcome(*record), False
    await connection.execute(f"SELECT pg_advisory_xact_lock_shared({AdvisoryLock.PARTITIONS:d})")
    if not {*days} <= {*await _partitions(connection)}:  # and nobody drops one from here on
        raise _Dropped
    letters = list[RefusedRow]()
    await _halve(connection, lines, 0, letters)
    outcome = BatchOutcome(len(lines) - len(letters), len(letters))
    await connection.execute("UPDATE log_batches SET stored = $2, dead = $3 WHERE id = $1", id, *outcome)
    if letters:
        times = [received(letter.line) for letter in letters]
        await connection.execute(_LETTERS, id, *map(list, zip(*letters, strict=True)), times)
    return outcome, True


async def _copy(connection: PooledConnection, texts: Sequence[bytes], rows: int) -> None:
    """COPY ``texts``, which are ``rows`` lines. Raises what PostgreSQL says, and ``Miscounted``."""

    async def pieces() -> AsyncIterator[bytes]:
        for text in texts:
            for start in range(0, len(text), PIECE):
                yield text[start : start + PIECE]

    source: Any = pieces() if len(texts) > 1 or len(texts[0]) > PIECE else memoryview(texts[0])  # bytes: a file's name
    status = await connection.copy_to_table("logs", source=source, columns=COLUMNS, timeout=WRITE_LIMIT)
    if _count(status) != rows:
        raise Miscounted(f"COPY took {_count(status)} rows of {rows}")


async def _halve(
    connection: PooledConnection, lines: Sequence[bytes], position: int, letters: list[RefusedRow]
) -> None:
    """Store the good ones of ``lines``, the first of which is the ``position``-th of its batch; collect the others."""
    if not lines:
        return
    try:
        async with connection.transaction():
            await _copy(connection, [b"\n".join(lines) + b"\n"], len(lines))
            return
    except Exception as error:
        if not (refuses(error) or (isinstance(error, TOO_SLOW) and len(lines) > 1)):
            raise
        if len(lines) == 1:
            code = getattr(error, "sqlstate", None) or type(error).__name__
            letters.append(RefusedRow(position, lines[0], f"{code}: {error}".replace("\0", "\\0")[:1000]))
            return
    for half in halves(lines):
        await _halve(connection, half, position, letters)
        position += len(half)
