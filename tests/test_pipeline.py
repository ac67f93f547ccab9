"""logs/pipeline.py: one worker."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from logs import display, sink, upkeep
from logs import parse as log_parse
from logs import pipeline as log_pipeline
from logs import seal as seal_module
from logs.enrich import Enricher
from logs.pipeline import Ingester
from runtime.postgres import Unavailable
from sandbox.logs import MetadataApi, Senders
from tests.helpers.base import HANG_LIMIT, run_task, until_async
from tests.helpers.logs import files, logs_ingest_serials, logs_ingest_up
from tests.helpers.postgres import PgServer, refusing

ROWS = "SELECT {} FROM logs"


@pytest.mark.parametrize("durable", [False, True])
def test_stores_each_event_once_and_enriched(logs_ingest_pg: PgServer, tmp_path: Path, durable: bool) -> None:
    slowest, run = 0.0, asyncio.Handle._run
    gc.collect()
    gc.freeze()  # as the program does; the tests are a larger heap

    def timed(handle: asyncio.Handle) -> None:
        nonlocal slowest
        begun = time.thread_time()  # other work on this machine is none of the loop's
        run(handle)
        slowest = max(slowest, time.thread_time() - begun)

    async def main() -> None:
        with MetadataApi() as api:
            more: dict[str, Any] = {"metadata": api.url(), "durable": durable, "batch": 500}
            more["enrich_wait"] = HANG_LIMIT
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                up.ingester.sealer.enricher.timeout = HANG_LIMIT
                await up.ingester.database.ready()
                patch.setattr(asyncio.Handle, "_run", timed)
                with Senders(up.address, rate=5000, total=3000, services=50) as senders:
                    await asyncio.to_thread(senders.wait, HANG_LIMIT)
                up.sent = senders.stats().events
                counts = await up.stored()
        assert (up.sent, counts.received, counts.datagrams, sum(counts.dropped.values())) == (3000,) * 3 + (0,)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(3000))
        found = await logs_ingest_pg.do(
            "SELECT array_agg(DISTINCT enrichment || ' ' || (team = 'team-' || split_part(service, '-', 1))) FROM logs"
        )
        assert found == ["done true"]
        assert await logs_ingest_pg.do("SELECT count(DISTINCT service) FROM logs") == 50
        await until_async(lambda: files(tmp_path) == [])
        assert up.snapshots > 20

    try:
        with pytest.MonkeyPatch.context() as patch:
            run_task(main())
    finally:
        gc.unfreeze()
    assert 0 < slowest < 0.05


def test_survives_a_database_that_comes_and_goes(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        complain = loop.get_exception_handler()
        assert complain is not None

        def asyncpgs(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            """It complains of itself if the server says goodbye between two statements of a transaction."""
            itself = context["message"].startswith("Resetting connection with an active transaction")
            if not itself and not isinstance(context.get("exception"), asyncpg.InternalClientError):
                complain(loop, context)

        loop.set_exception_handler(asyncpgs)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:

            async def send_during(call: Callable[..., None], *arguments: object) -> None:
                calling = asyncio.create_task(asyncio.to_thread(call, *arguments))

                def sent() -> bool:
                    up.send(7)
                    return calling.done()

                await until_async(sent)
                await calling

            up.send(100)
            await up.stored()
            for number in (signal.SIGINT, signal.SIGQUIT):
                await send_during(logs_ingest_pg.stop, number)
                up.send(200)
                counts = await up.until(lambda counts: counts.held["spool"] > 150)
                assert counts.database != "connected" and counts.dropped == {}
                await send_during(logs_ingest_pg.start)
                await up.stored()
            await until_async(lambda: files(tmp_path) == [])
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(up.sent))

    run_task(main())


def test_health_says_that_nothing_can_be_stored(
    logs_ingest_pg: PgServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            assert await up.ingester.database.ready(HANG_LIMIT)
            async with refusing(logs_ingest_pg, "log_batches", "53100"):
                up.send(20)
                counts = await up.until(lambda counts: counts.database == "refusing")
                code, body = display.health(counts, 1)
                assert (code, body["status"]) == (200, "degraded")
            counts = await up.stored()
            assert display.health(counts, 1)[1]["status"] == "ok" and counts.stored == 20

    run_task(main())
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("database: ")]
    said = [text for text in said if "connected" not in text]
    assert said == ["database: batches go to the spool: DiskFullError: refused", "database: it is stored again"]


def test_stores_once_what_was_committed_unseen(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        failures = 3

        def change(ingester: Ingester) -> None:
            write = ingester.store.write

            async def unseen(batches: Sequence[Any]) -> Any:
                nonlocal failures
                outcomes = await write(batches)
                if failures:
                    failures -= 1
                    raise Unavailable("away: it was committed")
                return outcomes

            ingester.store.write = unseen  # type: ignore[method-assign]

        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, change=change) as up:
            up.send(25)
            await up.stored()
        assert failures == 0
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(25))

    run_task(main())


def test_stopped_without_a_database_leaves_all_to_the_next(
    logs_ingest_pg: PgServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "PATIENCE", 0.05)

    async def main() -> None:
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none", flush=60.0, batch=100) as up:
            up.send(250)
            await up.received()
            await until_async(lambda: "database: not there yet" in caplog.text)
        counts = up.ingester.snapshot()
        assert (up.code, counts.held["spool"], counts.stored) == (0, 250, 0)
        assert display.last_word(counts).endswith("dropped 0 + left in the spool 250")
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            up.send(10)
            counts = await up.stored()
            assert (counts.recovered, counts.stored, counts.held["spool"]) == (250, 260, 0)
        assert await logs_ingest_serials(logs_ingest_pg) == sorted([*range(250), *range(10)])

    run_task(main())


def test_replays_what_a_run_with_more_workers_left(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        def third(ingester: Ingester) -> None:
            ingester.number = 2
            ingester.outlet.spools[0].folder = tmp_path / "spool" / "2"

        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away, change=third) as up:
            up.send(30)
            await up.received()
        assert files(tmp_path / "spool" / "2") != []
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            await up.until(lambda counts: (counts.recovered, counts.stored) == (30, 30))
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(30))

    run_task(main())


@pytest.mark.parametrize("mode", ["down", "silent", "rubbish", "error"])
def test_goes_on_without_metadata_and_fills_them_in(logs_ingest_pg: PgServer, tmp_path: Path, mode: Any) -> None:
    async def main() -> None:
        with MetadataApi() as api:
            api.mode = mode

            def change(ingester: Ingester) -> None:
                limit = 0.1 if mode == "silent" else HANG_LIMIT
                ingester.sealer.enricher = Enricher(
                    api.url(), timeout=limit, failed_for=0.05, reset=0.05, unknown_ttl=0.1
                )

            more: dict[str, Any] = {"metadata": api.url(), "enrich_wait": 0.05, "change": change}
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                await up.ingester.database.ready()
                for n in range(10):
                    up.send(10, service=f"orders-{n}")
                up.send(10, service="unknown-1")
                counts = await up.stored()
                look = "SELECT array_agg(DISTINCT enrichment) FROM logs"
                assert await logs_ingest_pg.do(look) == ["missing"] and counts.filled == 0
                if mode == "down":
                    await up.until(lambda counts: counts.metadata == "open")
                up.ingester.sealer.enricher.timeout = HANG_LIMIT
                api.mode = "ok"
                await up.until(lambda counts: counts.filled > 0)
                await up.until(lambda counts: counts.metadata == "closed")
                missing = "SELECT count(*) FROM logs WHERE enrichment = 'missing'"
                async with asyncio.timeout(HANG_LIMIT):
                    while await logs_ingest_pg.do(missing):
                        pass
                assert await logs_ingest_pg.do(look) == ["done", "unknown"]
                up.send(10, service="orders-11")
                await up.stored()
                async with asyncio.timeout(HANG_LIMIT):
                    while await logs_ingest_pg.do(missing):  # its metadata may be later than `enrich_wait`
                        pass
        assert await logs_ingest_pg.do("SELECT count(*) FROM logs WHERE team = 'team-orders'") == 110

    run_task(main())


class Gate:
    """Before what is written to the database."""

    def __init__(self, ingester: Ingester) -> None:
        self.open, self.waiting = asyncio.Event(), 0
        write = ingester.store.write

        async def gated(batches: Sequence[Any]) -> Any:
            self.waiting += 1
            await self.open.wait()
            return await write(batches)

        ingester.store.write = gated  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", ["drop-newest", "drop-lowest-severity", "spool"])
def test_overload(logs_ingest_pg: PgServer, tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_pipeline, "SEALED", 3)

    async def main() -> None:
        gates: list[Gate] = []
        more: dict[str, Any] = {"overload": policy, "queue": 50, "change": lambda it: gates.append(Gate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            await up.ingester.database.ready()
            for n in (1, 2):
                up.send(10)
                await until_async(lambda n=n: gates[0].waiting == n)  # type: ignore[misc]
            for n in (10, 20, 30):
                up.send(10)
                await up.until(lambda counts, n=n: counts.held["sealed"] == n)  # type: ignore[misc]
            up.send(50)
            full = await up.received()
            up.send(20, severity=3)
            await up.received()
            counts = up.ingester.snapshot()
            if policy == "spool":
                counts = await up.until(lambda counts: counts.held["queue"] <= 25 and not counts.held["spooling"])
                assert counts.held["spool"] >= 50 and counts.dropped == {}
                assert gates[0].waiting == 3  # the replay waits, too
            else:
                assert full.held == {
                    **dict.fromkeys(counts.held, 0),
                    "queue": 50,
                    "writing": 20,
                    "sealed": 30,
                }, full.held
                assert counts.dropped == {"queue full" if policy == "drop-newest" else "less severe": 20}
            gates[0].open.set()
            await up.until(lambda counts: not sum(counts.held.values()))
        serials = await logs_ingest_serials(logs_ingest_pg)
        assert (
            serials
            == {
                "drop-newest": [*range(100)],
                "drop-lowest-severity": [*range(80), *range(100, 120)],
                "spool": [*range(120)],
            }[policy]
        )

    run_task(main())


def test_waits_in_memory_when_the_spool_is_full(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, spool_bytes=2000) as up:
            up.ingester.sink.begun = -1e9
            up.send(100)
            counts = await up.until(lambda counts: counts.spool_refused > 0 and not counts.held["queue"])
            assert 0 < counts.held["spool"] < 100 and counts.held["spool"] + counts.held["spooling"] == 100
            assert counts.dropped == {}
            await asyncio.to_thread(logs_ingest_pg.start)
            await up.stored()

    logs_ingest_pg.stop()
    try:
        run_task(main())
    finally:
        logs_ingest_pg.start()


def test_without_room_in_the_spool_durable_batches_are_written_all_the_same(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, durable=True, spool_bytes=0) as up:
            await up.ingester.database.ready()
            up.send(40)
            counts = await up.stored()
            assert counts.spool_refused > 0 and counts.dropped == {}

    run_task(main())


def test_reads_what_the_socket_holds_before_it_stops(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_pipeline, "DRAIN_LIMIT", HANG_LIMIT)

    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, batch=500, stop_limit=HANG_LIMIT) as up:
            await up.ingester.database.ready()
            up.send(3000)
            up.ingester.stop()
        assert up.ingester.snapshot().stored == 3000

    run_task(main())


def test_owns_up_to_what_it_could_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "PATIENCE", 0.01)

    async def main() -> None:
        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away, spool_bytes=2000, stop_limit=0.1) as up:
            up.send(100)
            await up.until(lambda counts: counts.spool_refused > 0)
        counts = up.ingester.snapshot()
        assert 0 < counts.dropped["stopped"] == 100 - counts.held["spool"] < 100
        assert (up.code, counts.stored) == (1, 0)

    run_task(main())


def test_durable_batches_are_on_disk_before_they_are_written(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        gates: list[Gate] = []
        more: dict[str, Any] = {"durable": True, "change": lambda it: gates.append(Gate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            up.send(30)
            await until_async(lambda: gates[0].waiting == 1)
            counts = await up.until(lambda counts: counts.held["spool"] == 30)
            assert len(files(tmp_path)) >= 3 and counts.stored == 0
            gates[0].open.set()
            await up.stored()
            await until_async(lambda: files(tmp_path) == [])

    run_task(main())


def test_forced_stop_saves_what_is_in_memory(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        gates: list[Gate] = []
        more: dict[str, Any] = {"batch": 20, "flush": 60.0, "change": lambda it: gates.append(Gate(it))}
        more["stop_limit"] = 3600.0
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            await up.ingester.database.ready()
            up.send(50)
            await up.until(lambda counts: counts.held["writing"] == 40 and counts.held["queue"] == 10)
            up.send(5)
            await up.received()
            up.ingester.stop()
            await up.until(lambda counts: counts.held["queue"] == 0)
            up.ingester.stop()
        assert (up.code, up.ingester.snapshot().held["spool"]) == (0, 55)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            await up.until(lambda counts: counts.stored == 55)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(55))

    run_task(main())


def test_ends_though_its_cancellation_is_swallowed(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asyncpg does, when a rollback fails."""
    monkeypatch.setattr(log_pipeline, "CANCEL_LIMIT", 0.01)

    async def main() -> None:
        swallowed = 0

        def change(ingester: Ingester) -> None:
            async def maintain() -> None:
                nonlocal swallowed
                while swallowed < 7:
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        swallowed += 1
                raise Unavailable("away: while it was cancelled")

            ingester.store.maintain = maintain  # type: ignore[method-assign]

        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, change=change) as up:
            up.send(5)
            await up.stored()
        assert swallowed == 7

    monkeypatch.setattr(upkeep, "FILL_EVERY", 60.0)
    run_task(main())


def test_a_fault_costs_the_event_that_causes_it(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, seal = log_parse.parse, seal_module.seal

    def bad_parse(data: bytes, *more: Any) -> Any:
        return [] if b"serial=3" in data and {}["no"] else parse(data, *more)  # type: ignore[index]

    def bad_seal(events: Sequence[Any], *more: Any) -> Any:
        if any("serial=5" in event.message for event in events):
            raise RuntimeError("a fault")
        return seal(events, *more)

    monkeypatch.setattr(log_pipeline, "parse", bad_parse)
    monkeypatch.setattr(seal_module, "seal", bad_seal)

    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, flush=60.0) as up:
            up.faults = 2
            up.send(10)
            counts = await up.until(lambda counts: counts.stored == 9)
            assert counts.dropped == {"cannot be encoded": 1}
            assert display.health(counts, 1)[0] == 503
        assert await logs_ingest_serials(logs_ingest_pg) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        look = "SELECT parse_error FROM logs WHERE message LIKE '%serial=3%'"
        assert await logs_ingest_pg.do(look) == "the parser failed: KeyError"

    run_task(main())


def test_an_imbalance_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none") as up:
            up.faults = 1
            up.ingester._received += 2
            counts = up.ingester.snapshot()
            code, body = display.health(counts, 1)
            assert (code, body["status"], body["imbalance"], body["faults"]) == (503, "error", 2, 1)
            assert "2 events are not accounted for" in caplog.text
            assert display.last_word(counts).endswith("THE COUNTS DO NOT BALANCE: 2")
            up.ingester._received -= 2

    run_task(main())
