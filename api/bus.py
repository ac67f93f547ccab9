"""What the workers and machines that serve the same upstreams tell each other, over PostgreSQL (LISTEN and NOTIFY).

Told: an invalidation, a circuit that opened, a pause that an upstream wants. One connection listens and tells; whoever
has something to tell never waits for it.

Promised: an invalidation reaches all. It waits for the teller's connection, and is kept in the table ``invalidations``,
where who had no connection finds it. Not so the rest, which would be over by then. PgBouncer has to be in session mode:
in transaction mode nobody hears anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import orjson

from api.config import Key
from coordination import wait_for_event
from primitives import Backoff
from runtime.postgres import BACK_OFF, Database, Unavailable

if TYPE_CHECKING:
    from runtime.postgres import PooledConnection

CHANNEL = "aggregate"
LONGEST = 7900  # bytes of a message: PostgreSQL takes fewer than 8,000
CHECK_EVERY = 10.0  # seconds between two checks of a connection on which nothing is told
WAITING = 1000  # messages that may wait for the connection, the oldest are lost; and of those missed that are read
OVERLAP = 5.0  # seconds for which what was told is read again: an invalidation is dated before it is committed
TELL = "SELECT pg_notify($1, $2)"
KEEP = f"WITH kept AS (INSERT INTO invalidations (message) VALUES ($2)) {TELL}"
MISSED = """SELECT message FROM invalidations WHERE told_at > now() - make_interval(secs => $1)
ORDER BY told_at DESC LIMIT $2"""


class News(NamedTuple):
    """What happened to a source ("": to all); ``key``: to that one only; ``seconds``: for so long."""

    kind: str  # "invalidate", "open" or "pause"
    source: str
    key: Key | None = None
    seconds: float = 0.0


class Bus:
    """Hands what others tell to ``hear``, in the event loop, and tells them what it is given."""

    def __init__(self, database: Database, hear: Callable[[News], object]) -> None:
        self._database, self._hear, self._sender = database, hear, secrets.token_hex(8)
        self._waiting: deque[tuple[str, str]] = deque(maxlen=WAITING)  # SQL, message
        self._heard_until = time.monotonic()
        self._wake = asyncio.Event()
        self.listening = False

    def tell(self, news: News) -> None:
        """Have the others told. Without a connection, only an invalidation waits for one."""
        if self._database.server is None or not (self.listening or news.kind == "invalidate"):
            return
        message = json.dumps([self._sender, *news])  # in ASCII, which each database takes
        if len(message) > LONGEST:
            if news.kind != "invalidate":
                return
            message = json.dumps([self._sender, *news._replace(key=None)])  # all keys: more, not less
        self._waiting.append((KEEP if news.kind == "invalidate" else TELL, message))
        self._wake.set()

    async def run(self) -> None:
        """Listen and tell, for ever."""
        backoff = Backoff(*BACK_OFF)
        while True:
            await self._database.ready()
            with contextlib.suppress(Unavailable, asyncpg.PostgresError, asyncpg.InterfaceError):
                async with self._database.connection(limit=math.inf) as connection:
                    await connection.add_listener(CHANNEL, self._heard)
                    try:
                        await self._catch_up(connection)
                        self.listening = True
                        backoff.reset()
                        await self._serve(connection)
                    finally:
                        self.listening = False
                        with contextlib.suppress(Exception):  # it is closed
                            await connection.remove_listener(CHANNEL, self._heard)
            await asyncio.sleep(backoff.next())

    async def _catch_up(self, connection: PooledConnection) -> None:
        """Hear the invalidations that were told since there was a connection."""
        since = time.monotonic() - self._heard_until + OVERLAP
        missed = [message for (message,) in await connection.fetch(MISSED, since, WAITING)]
        if len(missed) == WAITING:
            self._hear(News("invalidate", ""))
        for message in missed:
            self._heard(None, 0, CHANNEL, message)
        self._heard_until = time.monotonic()

    async def _serve(self, connection: PooledConnection) -> None:
        """Tell what waits, until the connection is lost."""

        def lost(_: object) -> None:
            self._wake.set()

        connection.add_termination_listener(lost)
        try:
            while not connection.is_closed():
                self._wake.clear()
                while self._waiting:
                    told = query, message = self._waiting[0]
                    await connection.execute(query, CHANNEL, message)
                    if self._waiting[0] is told:  # it may have been lost meanwhile, as the oldest of too many
                        self._waiting.popleft()
                self._heard_until = time.monotonic()
                if not await wait_for_event(self._wake, CHECK_EVERY):
                    await connection.execute("SELECT 1")  # a way that was cut somewhere else would not be noticed
        finally:
            connection.remove_termination_listener(lost)

    def _heard(self, _: object, pid: int, channel: str, message: Any) -> None:
        """What is not of our form is somebody else's."""
        with contextlib.suppress(ValueError, TypeError):
            sender, kind, source, key, seconds = orjson.loads(message)
            news = News(kind, source, None if key is None else tuple(map(str, key)), float(seconds))
            if sender != self._sender:
                self._hear(news)
