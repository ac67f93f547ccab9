"""The tables of a shared crawl in PostgreSQL, and one worker's transactions on them: the protocol is ``crawl.lease``'s.

Tables: ``crawl_seen`` only grows (16 bytes a URL: the primary key is the duplicate detection). ``crawl_queue`` holds
what waits; a row is inserted once and deleted once, and a claim does not touch it. ``crawl_hosts.due`` is when a host
can be claimed, and null while it has no work or an owner: an index on it is all that a claim looks at, so a claim costs
the same whatever the number of rows. ``crawl_workers`` has a row for each worker: its lease, and the number of the last
batch that was applied. ``crawl_results`` are the rows, by the hash of their URL.

All transactions lock in one order: their worker, URLs by hash, hosts by name; claims skip what is locked, and none of
them lasts longer than its statements.
"""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from crawl.lease import PORTION
from crawl.model import ScrapeResult
from crawl.sync import Done, Found, Move, Note, Queued, SyncAnswer, SyncBatch, clean, hashed
from crawl.urls import host_of
from runtime.postgres import TOO_SLOW, AdvisoryLock, Database, TooSlow

if TYPE_CHECKING:
    from runtime.postgres import PooledConnection


def encoded(row: ScrapeResult) -> str:
    """The row as JSON that PostgreSQL takes."""
    try:
        data = orjson.dumps(row)
    except TypeError:
        data = b"\\u0000"
    return (orjson.dumps(clean(dataclasses.asdict(row))) if b"\\u0000" in data else data).decode()


# CREATE INDEX takes its lock even if there is nothing to do, and would wait for the workers in each other's way.
SCHEMA = """
DO $do$ BEGIN IF to_regclass('crawl_server') IS NULL THEN
CREATE TABLE IF NOT EXISTS crawl_settings (one boolean PRIMARY KEY DEFAULT true CHECK (one), options jsonb NOT NULL);
CREATE TABLE IF NOT EXISTS crawl_workers (
    id bigint PRIMARY KEY, batch bigint NOT NULL DEFAULT 0, name text NOT NULL,
    joined_at timestamptz NOT NULL DEFAULT now(), renewed_at timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz NOT NULL, held int NOT NULL DEFAULT 0, hungry boolean NOT NULL DEFAULT false,
    reading boolean NOT NULL DEFAULT false
) WITH (fillfactor = 10);
CREATE TABLE IF NOT EXISTS crawl_hosts (
    host text COLLATE "C" PRIMARY KEY, owner bigint, due timestamptz, next_at timestamptz, spacing float8,
    waiting int NOT NULL DEFAULT 0, done int NOT NULL DEFAULT 0, failed int NOT NULL DEFAULT 0
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX IF NOT EXISTS crawl_hosts_due ON crawl_hosts (due) WHERE due IS NOT NULL;
CREATE INDEX IF NOT EXISTS crawl_hosts_owner ON crawl_hosts (owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS crawl_seen (hash uuid PRIMARY KEY);
CREATE TABLE IF NOT EXISTS crawl_queue (
    host text COLLATE "C" NOT NULL, id bigserial NOT NULL, url text NOT NULL, target text, depth int NOT NULL,
    kind text NOT NULL, private boolean NOT NULL, strayed boolean NOT NULL DEFAULT false,
    hops int NOT NULL DEFAULT 0, attempt int NOT NULL DEFAULT 1, not_before timestamptz, PRIMARY KEY (host, id)
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX IF NOT EXISTS crawl_queue_robots ON crawl_queue (host) WHERE kind = 'robots';
CREATE TABLE IF NOT EXISTS crawl_results (
    hash uuid PRIMARY KEY, url text NOT NULL, row jsonb NOT NULL, stored_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS crawl_robots (
    origin text COLLATE "C" PRIMARY KEY, host text COLLATE "C" NOT NULL, status int, body bytea NOT NULL,
    target text NOT NULL, until timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS crawl_robots_host ON crawl_robots (host);
CREATE TABLE IF NOT EXISTS crawl_scope (serial bigserial PRIMARY KEY, url text COLLATE "C" NOT NULL UNIQUE);
ALTER TABLE crawl_hosts ADD COLUMN IF NOT EXISTS careful int NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS suspect boolean NOT NULL DEFAULT false;
ALTER TABLE crawl_queue ADD COLUMN IF NOT EXISTS deaths int NOT NULL DEFAULT 0;
CREATE INDEX IF NOT EXISTS crawl_hosts_suspect ON crawl_hosts (due) WHERE suspect;
CREATE TABLE IF NOT EXISTS crawl_server (
    one boolean PRIMARY KEY DEFAULT true CHECK (one), started timestamptz NOT NULL DEFAULT 'epoch',
    grace_until timestamptz NOT NULL DEFAULT 'epoch'
);
INSERT INTO crawl_server DEFAULT VALUES ON CONFLICT DO NOTHING;
END IF; END $do$;
"""

# Plans must not depend on how large the tables were when a statement was first planned. And whoever stands still, or is
# cut off, holds its locks for a quarter of its lease at most: others wait for them, whose leases go on.
BEGIN = """
SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
SET LOCAL idle_in_transaction_session_timeout = {0}; SET LOCAL tcp_user_timeout = {0}
"""

# No sequence: a promoted replica might give a number again.
JOIN = """
INSERT INTO crawl_workers (id, lease_until, name, reading)
VALUES (floor(random() * 9e15)::bigint, now() + $1 * interval '1 s', $2, $3) RETURNING id
"""
RENEW = """
UPDATE crawl_workers w SET renewed_at = now(), batch = $3, held = $4, hungry = $5, reading = $6,
    lease_until = CASE WHEN old.batch + 1 < $3 THEN now() ELSE now() + $2 * interval '1 s' END
FROM (SELECT id, batch FROM crawl_workers WHERE id = $1 FOR UPDATE) AS old
WHERE w.id = old.id RETURNING old.batch
"""
# It was started anew, or is another one, which may lack the last commits: no host is given out until all leases that it
# does not know of have ended. A first worker need not wait.
SERVER = """
UPDATE crawl_server SET started = pg_postmaster_start_time(), grace_until = CASE
    WHEN $2 OR EXISTS (SELECT FROM crawl_workers WHERE id <> $1) THEN now() + $3 * interval '1 s' ELSE grace_until END
WHERE started <> pg_postmaster_start_time()
"""
SEE = "INSERT INTO crawl_seen SELECT unnest($1::uuid[]) ON CONFLICT DO NOTHING RETURNING hash"
# No COPY: whoever stands still in one is waited for without end.
ENTER = """
INSERT INTO crawl_queue (host, url, target, depth, kind, private, hops)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::text[], $6::bool[], $7::int[])
"""
STORE = """
INSERT INTO crawl_results (hash, url, row) SELECT * FROM unnest($1::uuid[], $2::text[], $3::jsonb[])
"""
DELETE = """
DELETE FROM crawl_queue q USING unnest($1::text[], $2::bigint[]) AS d(host, id) WHERE q.host = d.host AND q.id = d.id
RETURNING q.id, q.kind <> 'robots'
"""
MOVE = """
UPDATE crawl_queue q SET host = m.to_host, id = nextval('crawl_queue_id_seq'), target = m.target, hops = m.hops,
    deaths = 0, attempt = m.attempt, private = m.private, strayed = m.strayed, not_before = NULL
FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::int[], $6::int[], $7::bool[], $8::bool[])
    AS m(host, id, to_host, target, hops, attempt, private, strayed)
WHERE q.host = m.host AND q.id = m.id
"""
AGAIN = """
UPDATE crawl_queue q SET attempt = a.attempt, not_before = now() + a.wait * interval '1 s'
FROM unnest($1::text[], $2::bigint[], $3::int[], $4::float8[]) AS a(host, id, attempt, wait)
WHERE q.host = a.host AND q.id = a.id
"""
NEW_HOSTS = "INSERT INTO crawl_hosts (host) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING"
LOCK_HOSTS = "SELECT FROM crawl_hosts WHERE host = ANY($1::text[]) ORDER BY host FOR NO KEY UPDATE"
HOSTS = """
UPDATE crawl_hosts h SET waiting = h.waiting + n.more, done = h.done + n.done, failed = h.failed + n.failed,
    careful = greatest(0, h.careful - n.ended), suspect = h.suspect AND n.ended = 0,
    spacing = coalesce(n.spacing, h.spacing), owner = CASE WHEN n.back AND h.owner = $1 THEN NULL ELSE h.owner END,
    next_at = greatest(h.next_at, now() + n.wait * interval '1 s'),
    due = CASE WHEN h.waiting + n.more = 0 OR (h.owner IS NOT NULL AND NOT (n.back AND h.owner = $1)) THEN NULL
        ELSE greatest(coalesce(h.due, h.next_at, now()), now() + n.wait * interval '1 s') END
FROM unnest($2::text[], $3::int[], $4::int[], $5::int[], $6::int[], $7::float8[], $8::float8[], $9::bool[])
    AS n(host, more, done, failed, ended, wait, spacing, back)
WHERE h.host = n.host
"""
ROBOTS = """
INSERT INTO crawl_robots SELECT origin, host, status, body, target, now() + ttl * interval '1 s'
FROM unnest($1::text[], $2::text[], $3::int[], $4::bytea[], $5::text[], $6::float8[])
    AS r(origin, host, status, body, target, ttl) ORDER BY origin
ON CONFLICT (origin) DO UPDATE SET status = excluded.status, body = excluded.body, target = excluded.target,
    until = excluded.until
"""
SCOPE_LOCK = f"SELECT pg_advisory_xact_lock({AdvisoryLock.SCOPE:d})"  # so that serials become visible in their order
SCOPE = "INSERT INTO crawl_scope (url) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING"
CLAIM = """
WITH d AS (
    SELECT host FROM crawl_hosts WHERE due <= now() + interval '1 s' AND suspect = $4
        AND (SELECT grace_until FROM crawl_server) < now() ORDER BY due LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE crawl_hosts h SET owner = $1, due = NULL, spacing = coalesce(h.spacing, $3)
FROM d, (SELECT nullif(grace_until, 'epoch') AS until FROM crawl_server) AS grace WHERE h.host = d.host
RETURNING h.host, h.careful, h.suspect,
    extract(epoch FROM greatest(h.next_at, grace.until + coalesce(h.spacing, $3) * interval '1 s') - now())::float8
"""
HELD = """
SELECT host, careful, suspect, extract(epoch FROM next_at - now())::float8 FROM crawl_hosts
WHERE owner = $1 AND host <> ALL($2::text[])
"""
FIELDS = """
q.host, q.id, q.url, coalesce(q.target, q.url), q.depth, q.kind, q.private, q.strayed, q.hops, q.attempt,
extract(epoch FROM q.not_before - now())::float8, q.deaths
"""
URLS = f"""
SELECT {FIELDS} FROM unnest($1::text[], $2::bigint[], $3::int[]) AS w(host, after, portion) CROSS JOIN LATERAL (
    SELECT * FROM crawl_queue c WHERE c.host = w.host AND c.id > w.after ORDER BY c.id LIMIT w.portion
) AS q
"""
DELEGATES = f"SELECT {FIELDS} FROM crawl_queue q WHERE q.kind = 'robots' AND q.host = ANY($1::text[])"
KNOWN_ROBOTS = """
SELECT origin, status, body, target, extract(epoch FROM until - now())::float8 FROM crawl_robots
WHERE (host = ANY($1::text[]) OR origin = ANY($2::text[])) AND until > now()
"""
OTHERS = """
SELECT count(*), coalesce(sum(held), 0), coalesce(bool_or(hungry) FILTER (WHERE id <> $1), false),
    coalesce(bool_or(lease_until < now()), false) AND (SELECT grace_until FROM crawl_server) < now(),
    coalesce(bool_or(reading AND lease_until > now()), false),
    min(id) FILTER (WHERE lease_until > now()) = $1
        AND EXISTS (SELECT FROM crawl_hosts WHERE suspect AND due <= now() + interval '1 s')
FROM crawl_workers
"""
FINISHED = """
SELECT NOT EXISTS (SELECT FROM crawl_hosts WHERE due IS NOT NULL)
    AND NOT EXISTS (SELECT FROM crawl_hosts WHERE owner IS NOT NULL AND waiting > 0)
    AND NOT EXISTS (SELECT FROM crawl_workers WHERE reading AND lease_until > now())
"""
LEAVE = """
DELETE FROM crawl_workers w WHERE id = $1 AND NOT EXISTS (SELECT FROM crawl_hosts WHERE owner = w.id)
"""
# What a dead worker had is tried one at a time; if that is the death of another, by a worker that has nothing else.
REAP = f"""
WITH dead AS (
    DELETE FROM crawl_workers WHERE id IN (
        SELECT w.id FROM crawl_workers w, crawl_server s WHERE w.lease_until < now()
            AND s.started = pg_postmaster_start_time() AND s.grace_until < now() FOR UPDATE OF w SKIP LOCKED
    ) RETURNING id, lease_until
), left_over AS (
    SELECT h.host, h.careful > 0 AS was_careful, greatest(
        h.next_at, greatest(d.lease_until, s.grace_until) + coalesce(h.spacing, 0) * interval '1 s'
    ) AS next_at FROM dead d JOIN crawl_hosts h ON h.owner = d.id, crawl_server s
), blamed AS (
    UPDATE crawl_queue q SET deaths = q.deaths + 1 FROM left_over l WHERE l.was_careful AND q.host = l.host
        AND q.id = (SELECT min(id) FROM crawl_queue c WHERE c.host = l.host AND c.kind <> 'robots') RETURNING q.host
)
UPDATE crawl_hosts h SET owner = NULL, next_at = l.next_at, due = CASE WHEN h.waiting > 0 THEN l.next_at END,
    careful = CASE WHEN h.waiting > 0 THEN {PORTION} ELSE 0 END, suspect = h.suspect OR h.host IN (TABLE blamed)
FROM left_over l WHERE h.host = l.host
"""


class NotApplied(TooSlow):
    """What a batch tells took too long, and was rolled back for sure."""


class PgStore:
    """The tables in PostgreSQL."""

    def __init__(self, database: Database, name: str = "") -> None:
        self._database, self._name = database, name

    async def sync(self, batch: SyncBatch) -> SyncAnswer:
        """One transaction. Raises what asyncpg raises; then nothing, or all, was done."""
        async with self._database.connection(limit=60.0) as connection, connection.transaction():
            await connection.execute(BEGIN.format(max(500, int(batch.lease * 250))))
            token, known = batch.token, batch.serial - 1
            if token is None:
                token = int(await connection.fetchval(JOIN, batch.lease, self._name, batch.reading))
            else:
                known = await connection.fetchval(
                    RENEW, token, batch.lease, batch.serial, len(batch.held), batch.hungry, batch.reading
                )
            await connection.execute(SERVER, token, batch.rejoins or batch.token is not None, batch.lease)
            if known is None or known < batch.serial - 1:
                return SyncAnswer()
            answer = SyncAnswer(token)
            if known < batch.serial:
                try:
                    await self._apply(connection, token, batch, answer)
                except TOO_SLOW as error:
                    raise NotApplied(f"took too long: {type(error).__name__}") from error
            else:
                rows = {hashed(done.url): done.row for done in batch.done if done.row is not None}
                rows |= {hashed(move.to.url): move.instead for move in batch.moves if move.instead is not None}
                found = await connection.fetch("SELECT hash FROM crawl_results WHERE hash = ANY($1)", list(rows))
                answer.stored = [rows[row[0]] for row in found]
            await self._read(connection, token, batch, answer, known == batch.serial)
        return answer

    async def _apply(self, connection: PooledConnection, token: int, batch: SyncBatch, answer: SyncAnswer) -> None:
        links = {link.key: link for link in batch.links}
        checked = {hashed(move.to.target) for move in batch.moves if move.instead is not None}
        new: set[Any] = set()
        if keys := sorted({*links, *checked}):
            new = {row[0] for row in await connection.fetch(SEE, keys)}
        enter = [
            (link.host, link.url, None if link.target == link.url else link.target, *link[4:])
            for key, link in links.items()
            if key in new
        ]
        count: dict[str, list[int]] = {name: [0] * 4 for name in batch.notes}

        def change(host: str, *more: int) -> None:
            for i, n in enumerate(more):
                count.setdefault(host, [0] * 4)[i] += n

        for host, *_ in enter:
            change(host, 1)
        moves: list[Move] = []
        done = list(batch.done)
        claimed: set[uuid.UUID] = set(links)  # a link of this batch goes before a redirect to the same
        for move in batch.moves:
            key = hashed(move.to.target)
            if move.instead is not None and (key not in new or key in claimed):
                done.append(Done(move.host, move.id, move.to.url, move.instead))
                continue
            claimed.add(key)
            moves.append(move)
            change(move.host, -1, 0, 0, 1)
            change(move.to.host, 1)
        for queued in batch.delegated:
            enter.append((queued.host, queued.url, *queued[3:7], queued.hops))
            change(queued.host, 1)
        gone: dict[int, bool] = {}
        if done:
            found = await connection.fetch(DELETE, [one.host for one in done], [one.id for one in done])
            gone = {row[0]: row[1] for row in found}
        done = [one for one in done if one.id in gone]
        for one in done:
            failed = one.row is not None and one.row.error is not None
            change(one.host, -1, one.row is not None and not failed, failed, gone[one.id])
        if enter:
            await connection.execute(ENTER, *map(list, zip(*enter, strict=True)))
        if moves:
            to = [move.to for move in moves]
            columns: list[list[Any]] = [[move.host for move in moves], [move.id for move in moves]]
            names = ("host", "target", "hops", "attempt", "private", "strayed")
            columns += [[getattr(one, name) for one in to] for name in names]
            await connection.execute(MOVE, *columns)
        if again := batch.again:
            columns = [[getattr(one, name) for one in again] for name in ("host", "id", "attempt", "wait")]
            await connection.execute(AGAIN, *columns)
        if rows := {hashed(one.url): one.row for one in done if one.row is not None}:
            urls = [row.url for row in rows.values()]
            await connection.execute(STORE, list(rows), urls, [encoded(row) for row in rows.values()])
            answer.stored = list(rows.values())
        if count:
            hosts = sorted(count)
            await connection.execute(NEW_HOSTS, hosts)
            await connection.execute(LOCK_HOSTS, hosts)
            notes = [batch.notes.get(name, Note(None, None, False)) for name in hosts]
            await connection.execute(
                HOSTS,
                token,
                hosts,
                *([count[name][i] for name in hosts] for i in range(4)),
                *([note[i] for note in notes] for i in range(3)),
            )
        if batch.robots:
            robots = {found.origin: found for found in batch.robots}
            hosts = [host_of(name) for name in robots]
            rest = [[getattr(one, name) for one in robots.values()] for name in ("status", "body", "target", "ttl")]
            await connection.execute(ROBOTS, list(robots), hosts, *rest)
        if batch.scope:
            await connection.execute(SCOPE_LOCK)
            await connection.execute(SCOPE, sorted(set(batch.scope)))

    async def _read(
        self, connection: PooledConnection, token: int, batch: SyncBatch, answer: SyncAnswer, again: bool
    ) -> None:
        """``again``: the last answer was lost, so what was claimed then is told again."""
        claimed = await connection.fetch(HELD, token, batch.held) if again else []
        if batch.claim and not batch.held and not claimed:
            claimed = await connection.fetch(CLAIM, token, 1, batch.spacing, True)
        answer.alone = any(suspect for _, _, suspect, _ in claimed)
        if batch.claim and not answer.alone:
            claimed += await connection.fetch(CLAIM, token, batch.claim, batch.spacing, False)
        answer.hosts = [(host, wait) for host, _, _, wait in claimed]
        answer.careful = {host: careful for host, careful, _, _ in claimed if careful}
        wanted = [*((host, 0, 1 if careful else batch.limit) for host, careful, _, _ in claimed), *batch.refill]
        if wanted:
            columns = [list(column) for column in zip(*wanted, strict=True)]
            answer.urls = [Queued(*row) for row in await connection.fetch(URLS, *columns)]
        names = [host for host, _ in answer.hosts]
        if here := [*names, *batch.held]:
            answer.urls[:0] = [Queued(*row) for row in await connection.fetch(DELEGATES, here)]
        if claimed or batch.asked:
            answer.robots = [Found(*row) for row in await connection.fetch(KNOWN_ROBOTS, names, batch.asked)]
        answer.scope = [
            (serial, url)
            for serial, url in await connection.fetch(
                "SELECT serial, url FROM crawl_scope WHERE serial > $1 ORDER BY serial", batch.scope_after
            )
        ]
        workers, held, hungry, *rest = await connection.fetchrow(OTHERS, token)  # type: ignore[misc]
        answer.workers, answer.all_held, answer.hungry = workers, held + len(claimed), hungry
        answer.dead, answer.reading, answer.try_alone = rest
        if not answer.urls and not batch.reading:
            answer.finished = await connection.fetchval(FINISHED)

    async def reap(self) -> None:
        """Give back what workers hold whose lease has ended."""
        async with self._database.connection() as connection:
            await connection.execute(REAP)

    async def leave(self, token: int) -> None:
        """The worker holds nothing any more, and is none."""
        async with self._database.connection() as connection:
            await connection.execute(LEAVE, token)
