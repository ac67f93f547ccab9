"""PostgreSQL for the programs that keep something: the pool of connections, and what an error means.

A database is away some day. So nothing here ever waits for it without a time limit. One task of ``Database`` connects,
checks, and connects again with back-off for as long as it is open. What is away, full, busy or read-only may be asked
the same later; what is too slow, less at a time; what is misconfigured is told in one line.

PgBouncer may stand between, in transaction mode too: no connection keeps a prepared statement, a setting or a lock from
one transaction to the next.

Where what runs: all in the event loop, but for starting and stopping the embedded server, which is in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import asyncpg

from coordination import Rng, cancel_all, stats_repr, wait_for_event
from primitives import Backoff
from runtime.embedded import CHECK_LIMIT, START_LIMIT, Embedded

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    PooledConnection = PoolConnectionProxy[asyncpg.Record]

R = TypeVar("R")

log = logging.getLogger("uvicorn.error")

CHECK_EVERY = 2.0  # seconds between two checks of a database that answers
CLOSE_LIMIT = 1.0
"""Seconds that the end of a connection may take, and what was asked last with it; then it is broken off."""
BACK_OFF = 0.2, 2.0
"""Seconds before trying again, and at most: no more than two, so that all is well soon after its return."""


class AdvisoryLock(IntEnum):
    """The locks that our programs take in a database, each for a transaction."""

    SCHEMA = 7063611  # tables are made
    SCOPE = 7063612  # the crawl's scope grows
    PARTITIONS = 7063613  # partitions of the logs are made, dropped, or counted on


class Unavailable(RuntimeError):
    """There is no database just now."""

    retry_after = 2.0  # seconds

    def __init__(self, state: str) -> None:
        super().__init__(f"database {state}")


class TooSlow(Unavailable):
    """What was asked took longer than the server or the pool allows: it was broken off."""


class Misconfigured(RuntimeError):
    """The database cannot be used until somebody changes it, or the options: one line."""


TOO_SLOW = asyncpg.QueryCanceledError, TimeoutError
HOPELESS = (
    Misconfigured,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.SyntaxOrAccessError,
)
"""What waiting does not change, when tables are looked for."""
PASSING = (
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.TransactionRollbackError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
"""The database is there, but full, busy, read-only, or has rolled back what was asked."""


def is_away(error: BaseException) -> bool:
    """Whether an error says that the database, or the way to it, is gone; not that it dislikes what was asked."""
    away = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, Unavailable)
    return isinstance(error, away) or (
        isinstance(error, asyncpg.InterfaceError) and not isinstance(error, (asyncpg.DataError, ValueError))
    )


def first_line(error: BaseException) -> str:
    """What an error says, without the lines of a hint or of details."""
    return str(error).partition("\n")[0]


def may_pass(error: BaseException) -> bool:
    """Whether the same may be done later."""
    return is_away(error) or isinstance(error, PASSING)


def is_a_rows_fault(error: BaseException) -> bool:
    """Whether the database refused what is in a row: its text, its size, its depth, a constraint."""
    fault = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
    return isinstance(error, (*fault, ValueError))


def halves(items: Sequence[R]) -> tuple[Sequence[R], Sequence[R]]:
    """What was refused, in two parts, the first of which is no longer."""
    middle = len(items) // 2
    return items[:middle], items[middle:]


def columns_of(schema: str) -> list[tuple[str, str]]:
    """Each table that ``schema`` makes, with each of its columns."""
    found = []
    text = re.sub(r"--.*", "", schema)
    for table, body in re.findall(r"TABLE IF NOT EXISTS (\w+) \((.*?)\)\s*(?:WITH|PARTITION|;)", text, re.DOTALL):
        while body != (body := re.sub(r"\([^()]*\)", "", body)):
            pass
        names = [words[0] for part in body.split(",") if (words := part.split())]
        found += [(table, name) for name in names if name not in ("PRIMARY", "UNIQUE")]
    return found


_LACKING = """
SELECT name, attribute FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS ours (name, attribute, place)
WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass(name) AND attname = attribute AND attnum > 0)
ORDER BY to_regclass(name) IS NULL, place LIMIT 1
"""

_HOST, _PAIR = r"(?:\[[^\[\]@/?#]*\]|[^\[\]@/?#:,]*)(?::[0-9]*)?", "[^=&]+=[^&]*"
_URL = re.compile(rf"postgres(?:ql)?://(?:[^/?#]*@)?{_HOST}(?:,{_HOST})*(?:/[^?#]*)?(?:\?(?:{_PAIR}(?:&{_PAIR})*)?)?")


def check_url(option: str, url: str, instead: str) -> None:
    """``ValueError`` if asyncpg could not read ``url``: its own message would hold parts of the password."""
    if not re.match(r"postgres(ql)?://.", url):
        raise ValueError(f"{option}: postgresql://user:password@host/database is needed, or {instead}")
    with contextlib.suppress(ValueError):
        if _URL.fullmatch(url) and urlsplit(url):
            return
    raise ValueError(f"{option}: the URL cannot be read; in a password, %XX must stand for a special character")


def _cut(connection: Any) -> None:
    """Break a connection off. asyncpg raises if it is just reading what the server said."""
    with contextlib.suppress(Exception):
        connection.terminate()


DatabaseState = Literal["none", "connecting", "connected", "refusing", "down"]
"""``refusing``: there is a connection, but nothing can be stored; the disk is full, say."""


class DatabaseStats(NamedTuple):
    """State of a ``Database``, and since when."""

    state: DatabaseState
    kind: str | None  # ``embedded`` or ``DATABASE_URL``
    since: datetime
    connects: int
    error: str | None  # the type of the last error; its text may hold secrets and is in the log only


class Database:
    """A pool of ``size`` connections to ``server`` (a URL, an embedded server, or None: no database).

    ``schema`` is SQL that may run again (``IF NOT EXISTS``); it runs after each time that the database was away.
    """

    def __init__(
        self, server: str | Embedded | None, schema: str = "", *, size: int = 4, rng: Rng = random.random
    ) -> None:
        self.server, self.schema, self.size = server, schema, size
        self.state: DatabaseState = "none" if server is None else "connecting"
        self._since, self._connects, self._error = datetime.now(UTC), 0, ""
        self._rng = rng
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._probe: asyncpg.Connection[asyncpg.Record] | None = None
        self._look = asyncio.Event()
        self._up = asyncio.Event()
        self._known = asyncio.Event()  # it is up, or will not be
        self._hopeless: Exception | None = None
        self._opening = False  # somebody waits, who is told
        self._trouble = ""
        self._task: asyncio.Task[None] | None = None
        self._held: set[PooledConnection] = set()  # in use: broken off when the database is found away

    @classmethod
    def configured(cls, environ: Mapping[str, str], schema: str) -> Database:
        """That of ``DATABASE_URL`` (``none``: no database), else an embedded server in ``DATA_FOLDER`` (``data``).

        Raises ``ValueError`` with one line, without the URL, if it is no URL of PostgreSQL.
        """
        url = environ.get("DATABASE_URL")
        if url == "none":
            return cls(None)
        if url:
            check_url("DATABASE_URL", url, "none")
            return cls(url, schema)
        if not Embedded.available():
            return cls(None)
        folder = Path(environ.get("DATA_FOLDER") or Path(__file__).parents[1] / "data")
        return cls(Embedded(folder / "postgres"), schema)

    async def open(self, wait: float) -> None:
        """Begin to connect, and wait for that at most ``wait`` seconds. ``Misconfigured`` if that is of no use."""
        if self.server is not None:
            self._opening = wait > 0
            self._task = asyncio.create_task(self._supervise(), name="database")
            await wait_for_event(self._known, wait)
            if self._opening and (error := self._hopeless) is not None:
                await self.close()
                raise Misconfigured(f"database: {first_line(error)}") from error
            self._opening = False

    async def ready(self, wait: float = math.inf) -> bool:
        """Whether there is a connection after ``wait`` seconds at the latest."""
        return await wait_for_event(self._up, wait)

    async def close(self) -> None:
        """Close the connections and stop the embedded server, if it is not used by others."""
        if self._task is not None:
            await cancel_all([self._task])
            self._task = None
        self._enter("none", None)
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(CLOSE_LIMIT):
                    await pool.close()
            except Exception:  # whatever it is: the pool has broken its connections off
                _cut(pool)
        self._drop_probe()
        if isinstance(self.server, Embedded):
            await asyncio.to_thread(self.server.stop)

    @contextlib.asynccontextmanager
    async def connection(self, wait: float = 5.0, limit: float = 10.0) -> AsyncIterator[PooledConnection]:
        """A connection of the pool, after ``wait`` seconds at the latest, for ``limit`` seconds at the most.

        ``Unavailable``: at once if the database is away. What breaks the connection inside comes out as that too, and
        has the database checked at once. After ``limit`` it is broken off: even a rollback may wait for ever.
        """
        if self._pool is None or self.state != "connected":
            raise Unavailable(": ".join(filter(None, ("away", self._error))) if self.server else "not configured")
        pool, over, slow = self._pool, asyncio.get_running_loop().time() + limit, False
        try:
            connection = await pool.acquire(timeout=wait)
            end = asyncio.get_running_loop().call_at(over, _cut, connection)
            self._held.add(connection)
            try:
                yield connection
            except Exception as error:
                slow = isinstance(error, TOO_SLOW) or end.when() <= asyncio.get_running_loop().time()
                raise
            finally:
                self._held.discard(connection)
                end.cancel()
                try:
                    await pool.release(connection, timeout=CLOSE_LIMIT)
                except Exception:  # the pool has broken it off; what was done with it stays done
                    self._look.set()
        except Exception as error:
            if not is_away(error) or isinstance(error, Unavailable):
                raise
            self._look.set()
            if slow:
                raise TooSlow(f"took too long: {type(error).__name__}") from error
            raise Unavailable(f"away: {type(error).__name__}") from error

    def stored(
        self, error: Exception | None = None, then: str = "what is to be stored waits", log: logging.Logger = log
    ) -> None:
        """Take note of an attempt to store something: a line in the log, with what happens ``then``, when that changes.

        Until the next one that succeeds ``stats`` says so too.
        """
        if isinstance(error, asyncpg.TransactionRollbackError):  # the next attempt comes at once
            return
        trouble = type(error).__name__ if error is not None else ""
        if trouble != self._trouble and not (self._trouble and isinstance(error, Unavailable)):
            self._trouble = trouble
            log.warning("database: %s", f"{then}: {trouble}: {first_line(error)}" if error else "it is stored again")

    def stats(self) -> DatabaseStats:
        """The state, the kind of server, connects so far, the type of the last error."""
        kind = None if self.server is None else "embedded" if isinstance(self.server, Embedded) else "DATABASE_URL"
        state = "refusing" if self._trouble and self.state == "connected" else self.state
        return DatabaseStats(state, kind, self._since, self._connects, self._error or self._trouble or None)

    __repr__ = stats_repr

    def _enter(self, state: DatabaseState, error: Exception | None) -> None:
        kind = type(error).__name__ if error is not None else self._error
        self._hopeless = error if isinstance(error, HOPELESS) else None
        news, self._error = state != self.state or (self._hopeless and kind != self._error), kind
        if self._hopeless:
            self._known.set()
        if not news:
            return
        if state == "connected":
            self._connects += 1
            self._error = ""
            self._up.set()
            self._known.set()
            log.info("database: connected")
        else:
            self._up.clear()
            if error is not None and not (self._opening and self._hopeless):
                log.warning("database: %s: %s", kind, first_line(error))
        self.state, self._since = state, datetime.now(UTC)

    async def _supervise(self) -> None:
        backoff = Backoff(*BACK_OFF, self._rng)
        while True:
            self._look.clear()
            try:
                await self._check()
            except Exception as error:  # whatever it is: a database that cannot be used is away
                self._drop_probe()
                self._enter("down", error)
                for connection in list(self._held):
                    _cut(connection)
                await asyncio.sleep(backoff.next())
            else:
                backoff.reset()
                self._enter("connected", None)
                await wait_for_event(self._look, CHECK_EVERY)

    async def _check(self) -> None:
        """Ask on a connection of its own, which is not one of the pool: those may all be busy."""
        if self._probe is not None and self._probe.is_closed():
            raise ConnectionResetError("the connection was lost")
        if self._probe is None:
            url = self.server
            if isinstance(url, Embedded):
                async with asyncio.timeout(START_LIMIT):
                    url = await asyncio.to_thread(url.start)
            options: dict[str, Any] = {"timeout": CHECK_LIMIT, "statement_cache_size": 0}
            self._probe = await asyncpg.connect(url, **options)
            self._probe.add_termination_listener(lambda _: self._look.set())
            if self.schema:
                # one statement, so one transaction; two programs that create one table at once would collide
                async with asyncio.timeout(START_LIMIT):
                    await self._probe.execute(f"SELECT pg_advisory_xact_lock({AdvisoryLock.SCHEMA:d}); {self.schema}")
                    lacking = await self._probe.fetchrow(_LACKING, *zip(*columns_of(self.schema), strict=True))
                if lacking:
                    what = "the table {} is another program's or version's, it lacks the column {}".format(*lacking)
                    raise Misconfigured(f"{what}: rename it, or use another database")
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    url, min_size=0, max_size=self.size, command_timeout=10.0, **options
                )
            else:
                await self._pool.expire_connections()
        async with asyncio.timeout(CHECK_LIMIT):
            await self._probe.execute("SELECT 1")

    def _drop_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            _cut(probe)
