"""logs/store.py: bad rows, torn batches, partitions over midnight."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import itertools
import json
import signal
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import seal
from logs import store as log_store
from logs.parse import Event, Metadata
from runtime import postgres as db
from runtime import spool as log_spool
from tests.helpers.base import HANG_LIMIT, SETTINGS, World, run_task, until_async
from tests.helpers.logs import (
    META,
    NOON,
    logs_store_batch,
    logs_store_counts,
    logs_store_days,
    logs_store_event,
    logs_store_open,
)
from tests.helpers.postgres import PgServer, Proxy, bouncer, refusing


class Marker(enum.Enum):
    UNKNOWN = "unknown"


def spoilt(batch: log_spool.EncodedBatch, bad: dict[int, bytes]) -> log_spool.EncodedBatch:
    """With other lines in the place of some."""
    lines = batch.data.split(b"\n")[:-1]
    for position, line in bad.items():
        lines[position] = line
    return batch._replace(data=b"".join(line + b"\n" for line in lines))


def logs_store_line(**columns: str) -> bytes:
    """A line that would be good, but for ``columns``."""
    good = dict(zip(log_store.COLUMNS, logs_store_batch(1).data.decode().rstrip("\n").split("\t"), strict=True))
    assert columns.keys() <= good.keys()
    return "\t".join({**good, **columns}.values()).encode(errors="surrogatepass")


# ---------------------------------------------------------------------------------------------------------------- rows

TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), st.sampled_from("\\\t\n\r.N\x08\x0b")),
    max_size=12,
)


TIME = st.datetimes(
    datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.sampled_from([UTC, timezone(timedelta(hours=5.5))])
)


EVENT = st.builds(
    Event,
    st.datetimes(datetime(2024, 2, 28), datetime(2024, 2, 28, 23, 59, 59, 999_999), timezones=st.just(UTC)),
    TIME,
    TEXT,
    TEXT,
    st.integers(0, 7),
    TEXT,
    st.dictionaries(TEXT, TEXT, max_size=2).map(json.dumps),
    st.none() | TEXT,
)


def test_what_was_sealed_is_what_is_read(logs_pg: PgServer) -> None:
    """Any text that PostgreSQL can hold comes back as it was, be it an escape, the end of data, or a null."""
    samples: list[tuple[Event, Any]] = []

    @SETTINGS
    @given(st.lists(st.tuples(EVENT, st.none() | st.builds(Metadata, *[TEXT] * 4)), max_size=8))
    def gather(some: list[tuple[Event, Any]]) -> None:
        samples.extend(some)

    gather()
    hard = ["\\.", "a\rb", "a\nb", "a\tb", "\\N", "", "\\", "\t", "a\rb\nc\\nd\\\\", "\x7f\x01", "\U0001f600é\u2028"]
    samples += [(logs_store_event(service=x, host=x, message=x, parse_error=x), Metadata(x, x, x, x)) for x in hard]
    samples += [(logs_store_event(message=x), Marker.UNKNOWN) for x in hard]
    names = {event.service: found for event, found in samples}

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            batch = seal.seal([event for event, _ in samples], names.__getitem__)
            assert batch.received_at == min(event.received_at for event, _ in samples).timestamp()
            assert await store.write([batch]) == [log_store.BatchOutcome(len(samples), 0)]
            async with store._database.connection() as connection:
                rows = await connection.fetch("SELECT *, attributes::text AS text FROM logs")
        wanted = []
        for event, _ in samples:
            found = names[event.service]
            known = tuple(found) if isinstance(found, Metadata) else (None,) * 4
            kind = "done" if isinstance(found, Metadata) else "missing" if found is None else "unknown"
            wanted.append(
                (
                    *event[:1],
                    event.event_at.astimezone(UTC),
                    *event[2:6],
                    json.dumps(json.loads(event.attributes), sort_keys=True),
                    event.parse_error,
                    *known,
                    kind,
                )
            )
        stored = [
            (*tuple(row)[:6], json.dumps(json.loads(row["text"]), sort_keys=True), *tuple(row)[7:13]) for row in rows
        ]
        assert sorted(stored, key=repr) == sorted((tuple(each) for each in wanted), key=repr) and len(stored) > 150

    asyncio.run(main())


def test_row_is_the_beginning_of_a_line() -> None:
    event = logs_store_event(message="a\tb", attributes="{}")
    whole = seal.row(event, event.received_at.isoformat()) + "\t" + seal.metadata_columns(META) + "\n"
    assert seal.seal([event], lambda _: META).data.decode() == whole
    assert whole == (
        "2024-02-28T12:00:00+00:00\t2024-02-28T12:00:00+00:00\tservice-0\thost\t6\ta\\tb\t{}\t\\N\t"
        "payments\tproduction\teu-west-1\t1.2.3\tdone\n"
    )
    ends = {
        seal.metadata_columns(found, configured).split("\t")[-1]
        for found, configured in [
            (None, True),
            (None, False),
            (Marker.UNKNOWN, True),
            (Metadata(*"    "), True),
        ]
    }
    assert ends == {"missing", "none", "unknown", "done"}


def test_ids_are_of_version_7_and_sort_by_time() -> None:
    ids = [seal.new_id(now, lambda bits: (1 << bits) - 1) for now in (1.0, 1.001, 1e9, 4e9)]
    assert ids == sorted(ids) and {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}
    assert ids[2].int >> 80 == 10**12 and seal.new_id(1.0, lambda _: 0) != ids[0]
    assert len({seal.new_id(1.0) for _ in range(1000)}) == 1000


# ----------------------------------------------------------------------------------------------- batches, good and bad

BAD = {
    b"\\.": "Miscounted",
    b"": "22P04",
    b"\x00": "22021",
    b"nonsense": "22007",
    logs_store_line(message="a\0b"): "22021",
    logs_store_line(message="\ud800"): "22021",
    logs_store_line() + b"\xff": "22021",
    logs_store_line() + b"\tone more": "22P04",
    logs_store_line().rpartition(b"\t")[0]: "22P04",
    logs_store_line(message="a\rb"): "22P04",
    logs_store_line(attributes="{"): "22P02",
    logs_store_line(attributes='{"a": NaN}'): "22P02",
    logs_store_line(attributes='{"a": "\\\\u0000"}'): "22P05",
    logs_store_line(attributes='{"a": 1e999999}'): "22003",
    logs_store_line(attributes="[" * 50_000 + "]" * 50_000): "54001",
    logs_store_line(severity="99999"): "22003",
    logs_store_line(severity="high"): "22P02",
    logs_store_line(service="\\N"): "23502",
    logs_store_line(received_at="yesterday-ish"): "22007",
    logs_store_line(received_at="9999-12-31T00:00:00+00:00"): "23514",
    logs_store_line(received_at="0001-01-01T00:00:00+00:00"): "23514",
    logs_store_line(received_at="infinity"): "23514",
    logs_store_line(received_at="2024-02-30T00:00:00+00:00"): "22008",
    logs_store_line(event_at="999999-01-01T00:00:00+00:00"): "22008",
}


@pytest.mark.parametrize("position", [0, 437, 999])
def test_one_bad_row_among_a_thousand(logs_pg: PgServer, position: int) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            for n, (line, code) in enumerate(list(BAD.items())[position % 3 :: 3]):
                size, place = (100, position // 10) if n else (1000, position)
                batch = spoilt(logs_store_batch(size), {place: line})
                assert await store.write([batch]) == [log_store.BatchOutcome(size - 1, 1)], line[:300]
                async with store._database.connection() as connection:
                    letter = await connection.fetchrow("DELETE FROM dead_letter RETURNING *")
                    assert letter is not None
                    assert letter["error"].startswith(f"{code}: "), (line[:300], letter["error"])
                    assert (letter["batch"], letter["position"], letter["line"]) == (batch.id, place, line)
                    dated = line.startswith(b"2024-02-28T12:00:00+00:00\t")
                    assert letter["received_at"] == (NOON if dated else None)
                    counts = await connection.fetch("DELETE FROM log_batches RETURNING stored, dead")
                    assert [tuple(each) for each in counts] == [(size - 1, 1)]
                    messages = await connection.fetch("DELETE FROM logs RETURNING message")
                wanted = {f"message {i}" for i in range(size)} - {f"message {place}"}
                assert sorted(message for (message,) in messages) == sorted(wanted)
            assert store.stats()[:5] == (8, 999 + 7 * 99, 8, 0, 8)
        assert await logs_store_days(logs_pg) == ["2024_02_28"]

    asyncio.run(main())


def test_all_rows_bad(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            kinds = itertools.cycle(line for line in BAD if len(line) < 1000)
            batch = spoilt(logs_store_batch(60), {n: next(kinds) for n in range(60)})
            good = logs_store_batch(3)
            assert await store.write([batch, good]) == [(0, 60), (3, 0)]
            assert await store.write([good, batch]) == [(3, 0), (0, 60)]
            assert await logs_store_counts(logs_pg) == (3, 2, 60)
            assert await logs_pg.do("SELECT count(DISTINCT position) FROM dead_letter") == 60
            assert store.stats()[:5] == (2, 3, 60, 2, 1)

    asyncio.run(main())


def test_text_that_nothing_can_hold_costs_its_row_only(logs_pg: PgServer) -> None:
    """No parser lets it through; a lone surrogate or a NUL is kept as bytes nevertheless."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            events = [logs_store_event(n) for n in range(9)]
            events[2] = logs_store_event(message="\ud800 x")
            events[4] = logs_store_event(host="a\0b")
            assert await store.write([seal.seal(events, lambda _: None)]) == [(7, 2)]
            letters = await logs_pg.do("SELECT array_agg(line ORDER BY position) FROM dead_letter")
            assert [b"\xed\xa0\x80 x" in letters[0], b"a\0b" in letters[1]] == [True, True]

    asyncio.run(main())


def test_a_last_line_without_its_end_is_a_row(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            batch = logs_store_batch(5)
            short = [batch._replace(data=batch.data[:-1]), logs_store_batch(2)]
            await store.maintain()
            assert [sum(outcome) for outcome in await store.write(short)] == [5, 2]
            assert await logs_store_counts(logs_pg) == (7, 2, 0)

    run_task(main())


def test_many_batches_are_one_transaction(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            batches = [logs_store_batch(n) for n in (1, 1000, 10)]
            assert await store.write(batches) == [(1, 0), (1000, 0), (10, 0)]
            assert await logs_pg.do("SELECT count(DISTINCT xmin::text) FROM logs") == 1
            empty = log_spool.EncodedBatch(uuid.UUID(int=0), 0, 0.0, b"")
            assert await store.write([empty]) == [(0, 0)] and await store.write([empty, empty]) == [(0, 0), (0, 0)]
            await logs_pg.do("DELETE FROM log_batches WHERE id = '00000000-0000-0000-0000-000000000000'")
            assert await store.write([empty, batches[0]]) == [(0, 0), (1, 0)]
            await logs_pg.do("DELETE FROM log_batches WHERE id = '00000000-0000-0000-0000-000000000000'")
            assert await store.write([]) == [] and await logs_store_counts(logs_pg) == (1011, 3, 0)
            fresh = logs_store_batch(4)
            assert await store.write([batches[2], fresh, fresh, batches[0]]) == [(10, 0), (4, 0), (4, 0), (1, 0)]
            assert await logs_store_counts(logs_pg) == (1015, 4, 0)
            assert store.stats()[:5] == (6, 1015, 0, 6, 0) and "stored=1015" in repr(store)

    run_task(main())


def test_large_data_goes_in_pieces(logs_pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_store, "PIECE", 1000)

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            assert await store.write([logs_store_batch(1000)]) == [(1000, 0)]
            wanted = {f"message {n}" for n in range(1000)}
            assert {*await logs_pg.do("SELECT array_agg(message) FROM logs")} == wanted

    run_task(main())


FAILS = (
    "CREATE OR REPLACE FUNCTION logs_failing() RETURNS trigger LANGUAGE plpgsql AS"
    " $$BEGIN IF NEW.message = 'message 7' THEN RAISE 'it is %' , 'so' USING ERRCODE = '{}'; END IF;"
    " RETURN NEW; END$$",
    "CREATE OR REPLACE TRIGGER failing BEFORE INSERT ON logs FOR EACH ROW EXECUTE FUNCTION logs_failing()",
)


def test_what_is_nobodys_fault_writes_nothing(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            good, bad = logs_store_batch(9), spoilt(logs_store_batch(9), {1: b"nonsense"})
            for code, error in [("53100", asyncpg.DiskFullError), ("25006", asyncpg.ReadOnlySQLTransactionError)]:
                await logs_pg.do(*(each.format(code) for each in FAILS))
                for batches in ([good], [bad], [good, bad]):
                    with pytest.raises(error):
                        await store.write(batches)
                    assert await logs_store_counts(logs_pg) == (0, 0, 0)
            await logs_pg.do(*(each.format("P0001") for each in FAILS))  # a rule of somebody's is the row's fault
            assert await store.write([good, bad]) == [(8, 1), (7, 2)]
            assert await logs_pg.do("SELECT max(error) FROM dead_letter") == "P0001: it is so"
            assert store.stats()[:5] == (2, 15, 3, 0, 2)

    run_task(main())


# ---------------------------------------------------------------------------------------------------------------- torn


@pytest.mark.parametrize("bad", [False, True])
def test_a_batch_whose_answer_is_lost_is_there_once(logs_pg: PgServer, bad: bool) -> None:
    async def main() -> None:
        left = 3

        def cut(data: bytes) -> bool:  # the server has committed: it says so, and that it is ready again
            nonlocal left
            left -= b"COMMIT\0" in data and b"Z\0\0\0\5I" in data and armed
            return armed and left >= 0 and b"COMMIT\0" in data

        armed = False
        proxy = Proxy(logs_pg.port, cut)
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        url = logs_pg.url.replace(f":{logs_pg.port}/", f":{server.sockets[0].getsockname()[1]}/")
        async with server, logs_store_open(url) as store:
            await store.maintain()
            batches = [logs_store_batch(n) for n in (10, 20)]
            outcomes = [log_store.BatchOutcome(10, 0), log_store.BatchOutcome(20, 0)]
            if bad:
                batches[1] = spoilt(batches[1], {3: b"", 19: b"x"})
                outcomes[1] = log_store.BatchOutcome(18, 2)
            armed, failures = True, 0
            while True:
                await store._database.ready(HANG_LIMIT)
                with contextlib.suppress(db.Unavailable):
                    assert await store.write(batches) == outcomes
                    break
                failures += 1
            assert proxy.cuts == failures == 3 and store.stats().repeated > 0
        assert await logs_store_counts(logs_pg) == (28 if bad else 30, 2, 2 if bad else 0)

    asyncio.run(main())


HOLD = (
    "CREATE OR REPLACE FUNCTION logs_held() RETURNS trigger LANGUAGE plpgsql AS"
    " 'BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NEW; END'"
)


AT_COMMIT = (
    "CREATE CONSTRAINT TRIGGER held AFTER INSERT ON log_batches DEFERRABLE INITIALLY DEFERRED"
    " FOR EACH ROW EXECUTE FUNCTION logs_held()"
)


IN_COPY = (
    "CREATE TRIGGER held BEFORE INSERT ON logs FOR EACH ROW WHEN (NEW.message = 'message 500')"
    " EXECUTE FUNCTION logs_held()"
)


HELD = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted"


QUEUED = "SELECT count(*) = $1 FROM pg_locks WHERE NOT granted"


async def lock_holder(server: PgServer, number: int = 42) -> Any:
    """A connection that holds the lock until it is closed."""
    blocker = await asyncpg.connect(server.url)
    await blocker.execute("SELECT pg_advisory_lock($1)", number)
    return blocker


@pytest.mark.parametrize("where", ["in COPY", "before the commit"])
def test_a_batch_whose_backend_dies_is_there_once(logs_pg: PgServer, where: str) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            await logs_pg.do(HOLD, IN_COPY if where == "in COPY" else AT_COMMIT)
            blocker = await lock_holder(logs_pg)
            batches = [logs_store_batch(1000), logs_store_batch(10)]
            for _ in range(3):
                assert await store._database.ready(HANG_LIMIT)
                writing = asyncio.create_task(store.write(batches))
                pid = await until_async(lambda: blocker.fetchval(HELD))
                assert await logs_store_counts(logs_pg) == (0, 0, 0)
                await blocker.execute("SELECT pg_terminate_backend($1)", pid)
                with pytest.raises(db.Unavailable):
                    await writing
            await blocker.close()
            assert await store._database.ready(HANG_LIMIT)
            assert await store.write(batches) == [(1000, 0), (10, 0)]
            assert await logs_store_counts(logs_pg) == (1010, 2, 0)
            assert store.stats()[:5] == (2, 1010, 0, 0, 0)

    asyncio.run(main())


def test_a_server_killed_in_mid_copy(logs_pg: PgServer) -> None:
    """Some batches are committed by then, one waits in its COPY, one before its commit; then all come again."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            batches = [logs_store_batch(n) for n in (100, 1000, 501, 50)]
            await store.write(batches[:1])
            await logs_pg.do(HOLD, IN_COPY)
            blocker = await lock_holder(logs_pg)
            writing = [asyncio.create_task(store.write([batch])) for batch in batches[1:3]]
            await until_async(lambda: blocker.fetchval(QUEUED, 2))
            await store.write(batches[3:])
            await asyncio.to_thread(logs_pg.stop, signal.SIGKILL)
            blocker.terminate()
            for each in writing:
                with pytest.raises(db.Unavailable):
                    await each
            await until_async(lambda: store._database.state == "down")
            with pytest.raises(db.Unavailable):
                await store.write(batches)
            await asyncio.to_thread(logs_pg.start)
            assert await store._database.ready(HANG_LIMIT)
            assert await store.write(batches) == [(100, 0), (1000, 0), (501, 0), (50, 0)]
        assert await logs_store_counts(logs_pg) == (1651, 4, 0)

    asyncio.run(main())


@pytest.mark.parametrize("first_dies", [False, True])
def test_one_id_by_two_connections_at_once(logs_pg: PgServer, first_dies: bool) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as one, logs_store_open(logs_pg.url) as two:
            for store in (one, two):
                await store.maintain()  # and so connect
            await logs_pg.do(HOLD, AT_COMMIT)
            blocker = await lock_holder(logs_pg)
            batches = [logs_store_batch(n) for n in (10, 20, 30)]
            first = asyncio.create_task(one.write(batches))
            pid = await until_async(lambda: blocker.fetchval(HELD))
            second = asyncio.create_task(two.write(batches[::-1]))  # in whatever order they come
            await until_async(lambda: blocker.fetchval(QUEUED, 2))
            if first_dies:
                await blocker.execute("SELECT pg_terminate_backend($1)", pid)
                with pytest.raises(db.Unavailable):
                    await first
            await blocker.close()
            assert await second == [(30, 0), (20, 0), (10, 0)]
            if not first_dies:
                assert await first == [(10, 0), (20, 0), (30, 0)]
            assert (one.stats().batches, two.stats().batches) == ((0, 3) if first_dies else (3, 0))
        assert await logs_store_counts(logs_pg) == (60, 3, 0)

    asyncio.run(main())


def test_the_same_ids_in_opposite_orders_do_not_wait_for_each_other(logs_pg: PgServer) -> None:
    in_the_middle = (
        "CREATE TRIGGER held BEFORE INSERT ON log_batches FOR EACH ROW WHEN (NEW.stored = 20)"
        " EXECUTE FUNCTION logs_held()"
    )

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as one, logs_store_open(logs_pg.url) as two:
            for store in (one, two):
                await store.maintain()  # and so connect
            await logs_pg.do(HOLD, in_the_middle)
            blocker = await lock_holder(logs_pg)
            batches = [logs_store_batch(n)._replace(id=uuid.UUID(int=n)) for n in (10, 20, 30)]
            first = asyncio.create_task(one.write(batches))
            await until_async(lambda: blocker.fetchval(QUEUED, 1))
            second = asyncio.create_task(two.write(batches[::-1]))
            await until_async(lambda: blocker.fetchval(QUEUED, 2))
            await blocker.close()
            assert await first == [(10, 0), (20, 0), (30, 0)] and await second == [(30, 0), (20, 0), (10, 0)]
        assert await logs_store_counts(logs_pg) == (60, 3, 0)

    asyncio.run(main())


def test_many_at_once_with_overlapping_batches(logs_pg: PgServer) -> None:
    """Each batch is written by two of four tasks, in opposite orders: once, and nobody waits for ever."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as one, logs_store_open(logs_pg.url) as two:
            batches = [logs_store_batch(20) for _ in range(40)]
            batches[5] = spoilt(batches[5], {0: b"", 7: b"x"})
            wanted = [log_store.BatchOutcome(18, 2) if n == 5 else log_store.BatchOutcome(20, 0) for n in range(40)]

            async def write(store: log_store.Store, step: int, size: int) -> None:
                order = list(range(40))[::step]
                for some in (order[n : n + size] for n in range(0, 40, size)):
                    assert await store.write([batches[n] for n in some]) == [wanted[n] for n in some]

            await asyncio.gather(write(one, 1, 4), write(two, -1, 4), write(one, 1, 7), write(two, -1, 5))
            assert one.stats().batches + two.stats().batches == 40
            assert one.stats().stored + two.stats().stored == 798
        assert await logs_store_counts(logs_pg) == (798, 40, 2)

    asyncio.run(main())


def test_a_cancelled_write_leaves_nothing_half(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.maintain()
            await logs_pg.do(HOLD, IN_COPY)
            blocker = await lock_holder(logs_pg)
            batch = logs_store_batch(1000)
            writing = asyncio.create_task(store.write([batch]))
            await until_async(lambda: blocker.fetchval(HELD))
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            await blocker.close()
            assert await store.write([batch]) == [(1000, 0)]
        assert await logs_store_counts(logs_pg) == (1000, 1, 0)

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------- partitions


@pytest.mark.parametrize(
    ("now", "days"),
    [
        ("2024-02-28T23:59:59.999999", ["2024_02_28", "2024_02_29", "2024_03_01"]),
        ("2023-02-28T00:00:00", ["2023_02_28", "2023_03_01", "2023_03_02"]),
        ("2023-12-31T12:00:00", ["2023_12_31", "2024_01_01", "2024_01_02"]),
    ],
)
def test_partitions_are_made_ahead(logs_pg: PgServer, now: str, days: list[str]) -> None:
    async def main() -> None:
        clock = World(datetime.fromisoformat(f"{now}+00:00").timestamp())
        async with logs_store_open(logs_pg.url, ahead_days=2, clock=clock.clock) as store:
            await store.maintain()
            await store.maintain()
            assert await logs_store_days(logs_pg) == days and store.stats().partitions_made == 3
            midnight = datetime.strptime(f"{days[1]}+0000", "%Y_%m_%d%z")
            events = [logs_store_event(n, midnight + timedelta(microseconds=n - 1)) for n in range(2)]
            assert await store.write([seal.seal(events, lambda _: None)]) == [(2, 0)]
            assert store.stats().partitions_made == 3, "nothing had to be made"
            for day, n in zip(days, (1, 1, 0), strict=True):
                assert await logs_pg.do(f"SELECT count(*) FROM logs_{day}") == n
            clock.now += 86_400.0
            await store.maintain()
            assert len(await logs_store_days(logs_pg)) == 4 == store.stats().partitions_made
            options = await logs_pg.do("SELECT string_agg(indexdef, ' ') FROM pg_indexes WHERE tablename ~ '^logs_2'")
            assert options.count("USING brin (received_at)") == options.count("enrichment = 'missing'") == 4

    asyncio.run(main())


def test_days_without_a_partition_get_one(logs_pg: PgServer) -> None:
    """A batch that comes days later, or over midnight, or by a clock that was never set, costs no row."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            late = logs_store_batch(10, NOON - timedelta(days=40))
            early = logs_store_batch(10, NOON + timedelta(days=40))
            unset = logs_store_batch(10, datetime(1970, 1, 1, tzinfo=UTC))
            midnight = datetime(2024, 3, 1, tzinfo=UTC)
            events = [logs_store_event(n, midnight + timedelta(seconds=n - 500)) for n in range(1000)]
            over = seal.seal(events, lambda _: None)
            assert await store.write([late, over, early, unset]) == [(10, 0), (1000, 0), (10, 0), (10, 0)]
            wanted = ["1970_01_01", "2024_01_19", "2024_02_29", "2024_03_01", "2024_04_08"]
            assert await logs_store_days(logs_pg) == wanted
            assert await logs_store_counts(logs_pg) == (1030, 4, 0)
            assert store.stats()[:5] == (4, 1030, 0, 0, 0)

    asyncio.run(main())


def test_rubbish_makes_no_more_partitions_than_it_may(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            events = [logs_store_event(n, NOON + timedelta(days=n % 50)) for n in range(100)]
            events += [logs_store_event(n) for n in range(100)]
            outcome = (await store.write([seal.seal(events, lambda _: None)]))[0]
            assert len(await logs_store_days(logs_pg)) == log_store.DAYS_AT_ONCE
            assert outcome == (100 + 2 * log_store.DAYS_AT_ONCE, 100 - 2 * log_store.DAYS_AT_ONCE)

    asyncio.run(main())


def test_retention_drops_whole_days(logs_pg: PgServer) -> None:
    async def main() -> None:
        clock = World(NOON.timestamp())
        async with logs_store_open(logs_pg.url, retain_days=2, ahead_days=0, clock=clock.clock) as store:
            await store.maintain()
            await logs_pg.do(
                "CREATE TABLE logs_of_others PARTITION OF logs FOR VALUES FROM ('2001-01-01') TO ('2001-01-02')",
                "INSERT INTO dead_letter VALUES"
                " ('00000000-0000-0000-0000-000000000000', 0, NULL, '', 'old', now() - '3 days'::interval),"
                " ('00000000-0000-0000-0000-000000000000', 1, NULL, '', 'new', now() - '1 days'::interval)",
                "INSERT INTO log_batches SELECT gen_random_uuid(), 1, 0, now() - n * '6 hours'::interval"
                " FROM generate_series(1, 40) AS n",
            )
            await store.write([logs_store_batch(10, NOON - timedelta(days=n)) for n in range(1, 5)])
            seen = []
            for _ in range(4):
                await store.maintain()
                seen.append([day[-2:] for day in await logs_store_days(logs_pg)])
                clock.now += 43_200.0
            assert seen == [
                ["26", "27", "28", "rs"],  # the 26th ends less than two days ago
                ["27", "28", "29", "rs"],
                ["27", "28", "29", "rs"],
                ["28", "29", "01", "rs"],
            ]
            assert await logs_pg.do("SELECT string_agg(error, ' ') FROM dead_letter") == "new"
            assert await logs_pg.do("SELECT max(at) < now() AND min(at) > now() - '7 days'::interval FROM log_batches")
        with pytest.raises(ValueError, match="at least one day"):
            log_store.Store(store._database, retain_days=0)

    asyncio.run(main())


def test_a_long_query_holds_a_partition_back_and_no_writer(logs_pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_store, "DROP_LIMIT", 0.02)

    async def main() -> None:
        async with logs_store_open(logs_pg.url, retain_days=1, ahead_days=0) as store:
            await store.write([logs_store_batch(5, NOON - timedelta(days=9))])
            reader = await asyncpg.connect(logs_pg.url)
            async with reader.transaction():
                assert await reader.fetchval("SELECT count(*) FROM logs") == 5
                await store.maintain()  # makes today's beside it
                assert await logs_store_days(logs_pg) == ["2024_02_19", "2024_02_28"]
                assert await store.write([logs_store_batch(5)]) == [(5, 0)]
            await reader.close()
            monkeypatch.setattr(log_store, "DROP_LIMIT", HANG_LIMIT)
            await store.maintain()
            assert await logs_store_days(logs_pg) == ["2024_02_28"] and store.stats().partitions_dropped == 1

    asyncio.run(main())


def test_a_clock_that_runs_ahead_drops_nothing(logs_pg: PgServer) -> None:
    async def main() -> None:
        now = datetime.now(UTC)
        async with logs_store_open(logs_pg.url, now + timedelta(days=999), retain_days=2, ahead_days=0) as store:
            await store.write([logs_store_batch(5, now)])
            await store.maintain()
            assert len(await logs_store_days(logs_pg)) == 2 and store.stats().partitions_dropped == 0

    asyncio.run(main())


def test_two_maintain_at_once(logs_pg: PgServer) -> None:
    """Both find that partitions are missing, and that others are too old, and come to the lock."""

    async def main() -> None:
        clock = World(NOON.timestamp())
        options: dict[str, Any] = {"retain_days": 1, "ahead_days": 3, "clock": clock.clock}
        async with logs_store_open(logs_pg.url, **options) as one, logs_store_open(logs_pg.url, **options) as two:
            for made, dropped in [(4, 0), (8, 4)]:
                blocker = await lock_holder(logs_pg, db.AdvisoryLock.PARTITIONS)
                both = asyncio.gather(one.maintain(), two.maintain())
                await until_async(functools.partial(blocker.fetchval, QUEUED, 2))
                await blocker.close()
                await both
                assert one.stats().partitions_made + two.stats().partitions_made == made
                assert one.stats().partitions_dropped + two.stats().partitions_dropped == dropped
                assert len(await logs_store_days(logs_pg)) == 4
                clock.now += 10 * 86_400.0

    asyncio.run(main())


def test_two_drop_at_once(logs_pg: PgServer) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"retain_days": 1, "ahead_days": 0}
        async with logs_store_open(logs_pg.url, **options) as one, logs_store_open(logs_pg.url, **options) as two:
            await one.maintain()
            await one.write([logs_store_batch(1, NOON - timedelta(days=n)) for n in range(5, 8)])
            blocker = await lock_holder(logs_pg, db.AdvisoryLock.PARTITIONS)
            both = asyncio.gather(one.maintain(), two.maintain())
            await until_async(lambda: blocker.fetchval(QUEUED, 2))
            await blocker.close()
            await both
            assert one.stats().partitions_dropped + two.stats().partitions_dropped == 3
            assert await logs_store_days(logs_pg) == ["2024_02_28"]

    asyncio.run(main())


def test_a_partition_that_goes_while_a_batch_asks_for_it(logs_pg: PgServer) -> None:
    """It is old enough to be dropped, again and again; the rows are stored nevertheless, and none is a dead letter."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url, retain_days=1, ahead_days=0) as store:
            await store.maintain()
            make, drops = store._make, 0

            async def make_and_drop(connection: Any, days: Sequence[date]) -> None:
                nonlocal drops
                await make(connection, days)
                if drops < log_store.MAKE_TRIES - 1:
                    drops += 1
                    await logs_pg.do(f"DROP TABLE {log_store.partition_name(days[0])}")

            store._make = make_and_drop  # type: ignore[method-assign]
            batch = logs_store_batch(10, NOON - timedelta(days=40))
            assert await store.write([batch]) == [(10, 0)] and drops == 4
            drops = -99
            with pytest.raises(RuntimeError, match="as often"):
                await store.write([logs_store_batch(10, NOON - timedelta(days=41))])
            assert await logs_store_counts(logs_pg) == (10, 1, 0)

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------- what comes later


async def totals(server: PgServer) -> tuple[int, int, int, int, int, dict[str, int]]:
    """Batches, rows stored and dead by their records; rows and services in the table, and rows by ``enrichment``."""
    kept = [await server.do(f"SELECT {what} FROM log_batches") for what in ("count(*)", "sum(stored)", "sum(dead)")]
    rows, services = [await server.do(f"SELECT {what} FROM logs") for what in ("count(*)", "count(DISTINCT service)")]
    kinds = (
        "SELECT array_agg(ARRAY[enrichment, n::text]) FROM (SELECT enrichment, count(*) n FROM logs GROUP BY 1) AS k"
    )
    return *kept, rows, services, {kind: int(n) for kind, n in await server.do(kinds)}


def test_missing_metadata_is_filled_in(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            days = [NOON, NOON - timedelta(days=1)]
            await store.write([logs_store_batch(17, day, None, name) for day in days for name in ("b", "a", "c")])
            await store.write([logs_store_batch(5, found=Metadata("t", "", "", ""), service="a")])
            assert await store.missing(10) == ["a", "b", "c"] and await store.missing(2) == ["a", "b"]
            assert (await totals(logs_pg))[3:] == (107, 3, {"missing": 102, "done": 5})
            assert await store.fill_in("a", META, at_once=5) == 34
            assert await store.fill_in("a", Metadata("x", "x", "x", "x")) == 0, "once"
            assert await store.fill_in("b", Marker.UNKNOWN, at_once=17) == 34
            assert await store.missing(10) == ["c"] and store.stats().filled == 68
            kinds = {"missing": 34, "done": 39, "unknown": 34}
            assert await totals(logs_pg) == (7, 107, 0, 107, 3, kinds)
            query = "SELECT count(*) FROM logs WHERE service = '{}' AND {}"
            known = "(team, environment, region, version) = ('payments', 'production', 'eu-west-1', '1.2.3')"
            assert await logs_pg.do(query.format("a", known)) == 34
            assert await logs_pg.do(query.format("b", "enrichment = 'unknown' AND team IS NULL")) == 34
            assert await logs_pg.do(query.format("c", "enrichment = 'missing'")) == 34
            assert await logs_pg.do("SELECT count(DISTINCT message) FROM logs WHERE service = 'a'") == 17

    asyncio.run(main())


def test_filling_in_while_rows_come_and_others_fill(logs_pg: PgServer) -> None:
    """Rows that another holds are passed over; those that come in the middle are found by the next."""

    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.write([logs_store_batch(30, found=None, service="a")])
            other = await asyncpg.connect(logs_pg.url)
            async with other.transaction():
                await other.execute("SELECT FROM logs WHERE message IN ('message 3', 'message 29') FOR UPDATE")
                late = other.transaction()
                async with late:
                    await other.execute("INSERT INTO logs SELECT * FROM logs WHERE message = 'message 7'")
                assert await store.fill_in("a", META, at_once=4) == 28
                assert await store.missing(10) == ["a"]
            await other.close()
            assert await store.fill_in("a", META, at_once=4) == 3
            assert await store.missing(10) == []
            await store.write([logs_store_batch(500, found=None, service="a")])
            both = await asyncio.gather(*(store.fill_in("a", META, at_once=20) for _ in range(3)))
            assert sum(both) + await store.fill_in("a", META) == 500
            assert (await totals(logs_pg))[5] == {"done": 531}

    asyncio.run(main())


def test_filling_in_goes_on_though_a_partition_goes(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            days = [NOON - timedelta(days=n) for n in range(3)]
            await store.write([logs_store_batch(5, day, None, "a") for day in days])
            await logs_pg.do(
                HOLD,
                "CREATE TRIGGER held BEFORE UPDATE ON logs FOR EACH ROW EXECUTE FUNCTION logs_held()",
            )
            blocker = await lock_holder(logs_pg)
            names = [name for (name,) in await blocker.fetch(log_store._LEAVES)]
            filling = asyncio.create_task(store.fill_in("a", META))
            await until_async(lambda: blocker.fetchval(QUEUED, 1))
            await blocker.execute(f"DROP TABLE {names[1]}")
            await blocker.close()
            assert await filling == 10 and await store.missing(1) == []

    asyncio.run(main())


def test_looks_for_missing_without_reading_the_table(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            await store.write([logs_store_batch(1000, found=None)])
            async with store._database.connection() as connection, connection.transaction():
                await connection.execute(log_store._PLANS)
                for query, arguments in [
                    (log_store._MISSING, (10, "")),
                    (log_store._FILL.format("logs_2024_02_28", "logs_2024_02_28"), ("a", *META, "done", 10)),
                ]:
                    plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {query}", *arguments))
                    assert "logs_2024_02_28_service_idx" in plan and "Seq Scan" not in plan, plan

    asyncio.run(main())


def test_all_goes_through_pgbouncer(logs_pg: PgServer) -> None:
    async def main(url: str) -> None:
        async with logs_store_open(url, retain_days=1) as store:
            bad = spoilt(logs_store_batch(9, found=Marker.UNKNOWN), {4: b"rubbish"})
            written = [store.write([logs_store_batch(9, service=f"s{n}")]) for n in range(6)]
            assert sum([outcome.dead for (outcome,) in await asyncio.gather(*written, store.write([bad]))]) == 1
            await asyncio.gather(store.maintain(), store.missing(9), store.fill_in("s1", META))
            assert await logs_store_counts(logs_pg) == (62, 7, 1)

    with bouncer(logs_pg) as url:
        asyncio.run(main(url))


def test_what_takes_too_long_is_halved(logs_pg: PgServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url) as store:
            assert await store.write([logs_store_batch(1)]) == [(1, 0)]  # the partition is there
            batches = [logs_store_batch(7), logs_store_batch(20)]
            async with refusing(logs_pg, "logs", "57014", 5):
                assert await store.write(batches) == [(7, 0), (20, 0)]
                assert await store.write(batches) == [(7, 0), (20, 0)]
            assert await logs_store_counts(logs_pg) == (28, 3, 0)
            async with refusing(logs_pg, "logs", "57014"):
                with pytest.raises(db.TooSlow):
                    await store.write([logs_store_batch(2)])
            assert await logs_store_counts(logs_pg) == (28, 3, 0)

    asyncio.run(main())
    assert "database took too long: QueryCanceledError: 27 rows are halved" in caplog.text


def test_without_a_database_says_so_at_once() -> None:
    async def main() -> None:
        store = log_store.Store(db.Database(None))
        for call in (store.write([logs_store_batch(1)]), store.maintain(), store.missing(1)):
            with pytest.raises(db.Unavailable):
                await call

    run_task(main())
