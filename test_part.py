from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import psutil  # type: ignore[import-untyped]
import pytest
from prometheus_client.parser import text_string_to_metric_families

import bench
import bench_ingest
import ingest_logs
import log_parse
import log_pipeline
import log_store
import log_workers
from database import Unavailable
from log_enrich import Enricher
from log_intake import udp_socket
from log_pipeline import Ingester, Options
from log_workers import Snapshot
from sandbox_logs import MetadataApi, Senders
from test_all import (  # noqa: F401
    PRIM_PATIENCE,
    PgServer,
    pg,
    pg_module,
    prim_run,
    prim_until,
    prim_until_async,
)

# ------------------------------------------------------------------------------------------- ingest_logs: one worker


@pytest.fixture
def logs_ingest_pg(pg: PgServer, monkeypatch: pytest.MonkeyPatch) -> PgServer:  # noqa: F811
    """The server without tables of logs; what is waited for comes quickly."""
    asyncio.run(pg.do("DROP TABLE IF EXISTS logs, log_batches, dead_letter CASCADE"))
    monkeypatch.setattr(log_pipeline, "FILL_EVERY", 0.02)
    monkeypatch.setattr(log_pipeline, "DISTRUST", 0.02)
    return pg


LOGS_INGEST_ROWS = "SELECT {} FROM logs"
LOGS_INGEST_SERIALS = r"SELECT array_agg(substring(message from 'serial=(\d+)')::int) FROM logs"


class LogsIngestUp:
    """An ingester that runs, and a socket to send to it."""

    def __init__(self, ingester: Ingester, sender: socket.socket, address: tuple[str, int]) -> None:
        self.ingester, self._sender, self.address = ingester, sender, address
        self.sent = 0
        self.snapshots = 0
        self.code: int | None = None
        self.slowest = 0.0
        self.faults = 0
        """How many are expected."""

    def send(self, count: int, severity: int = 6, service: str = "svc") -> None:
        for n in range(self.sent, self.sent + count):
            self._sender.send(f"<{8 + severity}>1 - host {service} - - - serial={n}".encode())
        self.sent += count

    async def until(self, predicate: Callable[[Snapshot], bool]) -> Snapshot:
        await prim_until_async(lambda: predicate(self.ingester.snapshot()))
        return self.ingester.snapshot()

    async def received(self) -> Snapshot:
        return await self.until(lambda counts: counts.received == self.sent)

    async def stored(self) -> Snapshot:
        return await self.until(lambda counts: counts.stored == self.sent + counts.recovered)

    async def watch(self) -> None:
        """Each of thousands of snapshots balances, or is a fault of the ingester's."""
        while True:
            self.ingester.snapshot()
            self.snapshots += 1
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def logs_ingest_up(
    folder: Path, database: str | None, *, change: Callable[[Ingester], object] = lambda _: None, **more: Any
) -> AsyncIterator[LogsIngestUp]:
    """At the end it stops, has lost nothing that it does not own up to, and leaves nothing behind."""
    before = asyncio.all_tasks()
    sock = udp_socket("127.0.0.1", 0, receive_buffer=4 << 20).sock
    options = Options(**{"spool": str(folder / "spool"), "database": database, "batch": 10, "flush": 0.05, **more})
    ingester = Ingester(options, sock)
    change(ingester)
    address = sock.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        up = LogsIngestUp(ingester, sender, address)
        running, watching = asyncio.create_task(ingester.run()), asyncio.create_task(up.watch())
        try:
            yield up
        finally:
            if not ingester.snapshot().stopping:
                ingester.stop()
            try:
                async with asyncio.timeout(PRIM_PATIENCE):
                    up.code = await running
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
    counts = ingester.snapshot()
    assert log_workers.imbalance(counts) == 0 and counts.faults == up.faults
    assert {place: n for place, n in counts.held.items() if n and place != "spool"} == {}
    assert counts.received == up.sent or not up.sent
    assert up.code == (1 if counts.dropped.get("stopped") else 0)
    await prim_until_async(lambda: asyncio.all_tasks() <= before)
    assert sock.fileno() == -1 and ingester.database.state == "none"


async def logs_ingest_serials(server: PgServer) -> list[int]:
    return sorted(await server.do(LOGS_INGEST_SERIALS) or [])


def logs_ingest_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.batch"))


@pytest.mark.parametrize("durable", [False, True])
def test_logs_ingest_stores_each_event_once_and_enriched(
    logs_ingest_pg: PgServer, tmp_path: Path, durable: bool
) -> None:
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
            more: dict[str, Any] = {"metadata": api.url(), "durable": durable, "batch": 500, "enrich_wait": 5.0}
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                await up.ingester.database.ready()
                patch.setattr(asyncio.Handle, "_run", timed)
                with Senders(up.address, rate=5000, total=3000, services=50) as senders:
                    await asyncio.to_thread(senders.wait, PRIM_PATIENCE)
                up.sent = senders.stats().events
                counts = await up.stored()
        assert (up.sent, counts.received, counts.datagrams, sum(counts.dropped.values())) == (3000,) * 3 + (0,)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(3000))
        found = await logs_ingest_pg.do(
            "SELECT array_agg(DISTINCT enrichment || ' ' || (team = 'team-' || split_part(service, '-', 1))) FROM logs"
        )
        assert found == ["done true"]
        assert await logs_ingest_pg.do("SELECT count(DISTINCT service) FROM logs") == 50
        assert logs_ingest_files(tmp_path) == [] and up.snapshots > 20

    try:
        with pytest.MonkeyPatch.context() as patch:
            prim_run(main())
    finally:
        gc.unfreeze()
    assert 0 < slowest < 0.05


def test_logs_ingest_survives_a_database_that_comes_and_goes(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
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
            up.send(100)
            await up.stored()
            for number in (signal.SIGINT, signal.SIGQUIT):
                stopping = asyncio.create_task(asyncio.to_thread(logs_ingest_pg.stop, number))
                while not stopping.done():
                    up.send(7)
                    await asyncio.sleep(0.002)
                up.send(200)
                counts = await up.until(lambda counts: counts.held["spool"] > 150)
                assert counts.database != "connected" and counts.dropped == {}
                starting = asyncio.create_task(asyncio.to_thread(logs_ingest_pg.start))
                while not starting.done():
                    up.send(7)
                    await asyncio.sleep(0.002)
                await up.stored()
            assert logs_ingest_files(tmp_path) == []
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(up.sent))

    prim_run(main())


def test_logs_ingest_stores_once_what_was_committed_unseen(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
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

    prim_run(main())


def test_logs_ingest_stopped_without_a_database_leaves_all_to_the_next(
    logs_ingest_pg: PgServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_pipeline, "PATIENCE", 0.05)

    async def main() -> None:
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none", flush=60.0, batch=100) as up:
            up.send(250)
            await up.received()
            await prim_until_async(lambda: "database: not there yet" in caplog.text)
        counts = up.ingester.snapshot()
        assert (up.code, counts.held["spool"], counts.stored) == (0, 250, 0)
        assert log_workers.last_word(counts).endswith("dropped 0 + left in the spool 250")
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            up.send(10)
            counts = await up.stored()
            assert (counts.recovered, counts.stored, counts.held["spool"]) == (250, 260, 0)
        assert await logs_ingest_serials(logs_ingest_pg) == sorted([*range(250), *range(10)])

    prim_run(main())


def test_logs_ingest_replays_what_a_run_with_more_workers_left(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        def third(ingester: Ingester) -> None:
            ingester.number = 2
            ingester.spools[0].folder = tmp_path / "spool" / "2"

        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away, change=third) as up:
            up.send(30)
            await up.received()
        assert logs_ingest_files(tmp_path / "spool" / "2") != []
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            await up.until(lambda counts: (counts.recovered, counts.stored) == (30, 30))
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(30))

    prim_run(main())


@pytest.mark.parametrize("mode", ["down", "silent", "rubbish", "error"])
def test_logs_ingest_goes_on_without_metadata_and_fills_them_in(
    logs_ingest_pg: PgServer, tmp_path: Path, mode: Any
) -> None:
    async def main() -> None:
        with MetadataApi() as api:
            api.mode = mode

            def change(ingester: Ingester) -> None:
                ingester.enricher = Enricher(api.url(), timeout=0.1, failed_for=0.05, reset=0.05, unknown_ttl=0.1)

            more: dict[str, Any] = {"metadata": api.url(), "enrich_wait": 0.05, "change": change}
            async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
                await up.ingester.database.ready()
                for n in range(10):
                    up.send(10, service=f"orders-{n}")
                up.send(10, service="unknown-1")
                begun = time.monotonic()
                counts = await up.stored()
                assert time.monotonic() - begun < 2.0
                look = "SELECT array_agg(DISTINCT enrichment) FROM logs"
                assert await logs_ingest_pg.do(look) == ["missing"] and counts.filled == 0
                if mode == "down":
                    await up.until(lambda counts: counts.metadata == "open")
                api.mode = "ok"
                await up.until(lambda counts: counts.filled > 0)
                await up.until(lambda counts: counts.metadata == "closed")
                async with asyncio.timeout(PRIM_PATIENCE):
                    while await logs_ingest_pg.do("SELECT count(*) FROM logs WHERE enrichment = 'missing'"):
                        pass
                assert await logs_ingest_pg.do(look) == ["done", "unknown"]
                up.send(10, service="orders-11")
                await up.stored()
        assert await logs_ingest_pg.do("SELECT count(*) FROM logs WHERE team = 'team-orders'") == 110

    prim_run(main())


class LogsIngestGate:
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
def test_logs_ingest_overload(
    logs_ingest_pg: PgServer, tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_pipeline, "SEALED", 3)

    async def main() -> None:
        gates: list[LogsIngestGate] = []
        more: dict[str, Any] = {"overload": policy, "queue": 50, "change": lambda it: gates.append(LogsIngestGate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            await up.ingester.database.ready()
            for n in (1, 2):
                up.send(10)
                await prim_until_async(lambda n=n: gates[0].waiting == n)  # type: ignore[misc]
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

    prim_run(main())


def test_logs_ingest_waits_in_memory_when_the_spool_is_full(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, spool_bytes=2000) as up:
            up.ingester._begun = -1e9
            up.send(100)
            counts = await up.until(lambda counts: counts.spool_refused > 0 and not counts.held["queue"])
            assert 0 < counts.held["spool"] < 100 and counts.held["spool"] + counts.held["spooling"] == 100
            assert counts.dropped == {}
            await asyncio.to_thread(logs_ingest_pg.start)
            await up.stored()

    logs_ingest_pg.stop()
    try:
        prim_run(main())
    finally:
        logs_ingest_pg.start()


def test_logs_ingest_owns_up_to_what_it_could_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_pipeline, "PATIENCE", 0.01)

    async def main() -> None:
        away = "postgresql://nobody@127.0.0.1:1/none"
        async with logs_ingest_up(tmp_path, away, spool_bytes=2000, stop_limit=0.1) as up:
            up.send(100)
            await up.until(lambda counts: counts.spool_refused > 0)
        counts = up.ingester.snapshot()
        assert 0 < counts.dropped["stopped"] == 100 - counts.held["spool"] < 100
        assert (up.code, counts.stored) == (1, 0)

    prim_run(main())


def test_logs_ingest_durable_batches_are_on_disk_before_they_are_written(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    async def main() -> None:
        gates: list[LogsIngestGate] = []
        more: dict[str, Any] = {"durable": True, "change": lambda it: gates.append(LogsIngestGate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            up.send(30)
            await prim_until_async(lambda: gates[0].waiting == 1)
            counts = await up.until(lambda counts: counts.held["spool"] == 30)
            assert len(logs_ingest_files(tmp_path)) >= 3 and counts.stored == 0
            gates[0].open.set()
            await up.stored()
            assert logs_ingest_files(tmp_path) == []

    prim_run(main())


def test_logs_ingest_forced_stop_saves_what_is_in_memory(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    async def main() -> None:
        gates: list[LogsIngestGate] = []
        more: dict[str, Any] = {"batch": 20, "flush": 60.0, "change": lambda it: gates.append(LogsIngestGate(it))}
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, **more) as up:
            await up.ingester.database.ready()
            up.send(50)
            await up.until(lambda counts: counts.held["writing"] == 40 and counts.held["queue"] == 10)
            up.send(5)
            await up.received()
            up.ingester.stop()
            await up.until(lambda counts: counts.held["queue"] == 0)
            begun = time.monotonic()
            up.ingester.stop()
        assert time.monotonic() - begun < 1.0
        assert (up.code, up.ingester.snapshot().held["spool"]) == (0, 55)
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url) as up:
            await up.until(lambda counts: counts.stored == 55)
        assert await logs_ingest_serials(logs_ingest_pg) == list(range(55))

    prim_run(main())


def test_logs_ingest_a_fault_costs_the_event_that_causes_it(
    logs_ingest_pg: PgServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, seal = log_parse.parse, log_store.seal

    def bad_parse(data: bytes, *more: Any) -> Any:
        return [] if b"serial=3" in data and {}["no"] else parse(data, *more)  # type: ignore[index]

    def bad_seal(events: Sequence[Any], *more: Any) -> Any:
        if any("serial=5" in event.message for event in events):
            raise RuntimeError("a fault")
        return seal(events, *more)

    monkeypatch.setattr(log_pipeline, "parse", bad_parse)
    monkeypatch.setattr(log_pipeline, "seal", bad_seal)

    async def main() -> None:
        async with logs_ingest_up(tmp_path, logs_ingest_pg.url, flush=60.0) as up:
            up.faults = 2
            up.send(10)
            counts = await up.until(lambda counts: counts.stored == 9)
            assert counts.dropped == {"cannot be encoded": 1}
            assert log_workers.health(counts, 1)[0] == 503
        assert await logs_ingest_serials(logs_ingest_pg) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        look = "SELECT parse_error FROM logs WHERE message LIKE '%serial=3%'"
        assert await logs_ingest_pg.do(look) == "the parser failed: KeyError"

    prim_run(main())


def test_logs_ingest_an_imbalance_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with logs_ingest_up(tmp_path, "postgresql://nobody@127.0.0.1:1/none") as up:
            up.faults = 1
            up.ingester._received += 2
            counts = up.ingester.snapshot()
            code, body = log_workers.health(counts, 1)
            assert (code, body["status"], body["imbalance"], body["faults"]) == (503, "error", 2, 1)
            assert "2 events are not accounted for" in caplog.text
            assert log_workers.last_word(counts).endswith("THE COUNTS DO NOT BALANCE: 2")
            up.ingester._received -= 2

    prim_run(main())


# --------------------------------------------------------------------------------------- ingest_logs: whole processes


class LogsIngestProcess:
    """``python ingest_logs.py`` with these arguments, and what it says on stderr."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        command = [sys.executable, "-W", "error::ResourceWarning", "ingest_logs.py", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(ingest_logs.__file__).parent,
            env={**{name: value for name, value in os.environ.items() if name != "DATABASE_URL"}, **environ},
        )
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def said(self, pattern: str) -> str:
        """Wait for a line; its group."""
        prim_until(lambda: any(re.search(pattern, line) for line in self.lines) or self.process.poll() is not None)
        found = next((match for line in self.lines if (match := re.search(pattern, line))), None)
        assert found is not None, self.lines
        return found[1] if found.groups() else found[0]

    def end(self) -> int:
        try:
            code = self.process.wait(PRIM_PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.lines) from None
        self._reading.join()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.output = self.process.stdout.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def address(self) -> tuple[str, int]:
        host, _, port = self.said(r"listening on (\S+)").rpartition(":")
        return host, int(port)

    def health(self) -> dict[str, Any]:
        url = self.said(r"(http://\S+)/metrics")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=PRIM_PATIENCE) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
        return found

    def until(self, predicate: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def looked() -> bool:
            nonlocal found
            found = self.health()
            assert found["imbalance"] == found["faults"] == 0, found
            return predicate(found)

        prim_until(looked)
        return found


@contextlib.contextmanager
def logs_ingest_process(*arguments: str, **environ: str) -> Iterator[LogsIngestProcess]:
    process = LogsIngestProcess(*arguments, **environ)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            for child in psutil.Process(process.process.pid).children(recursive=True):
                child.kill()
            process.kill()


def logs_ingest_send(to: tuple[str, int], first: int, count: int, sockets: int = 1) -> None:
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(sockets)]
        for n in range(first, first + count):
            senders[n % sockets].sendto(f"<14>1 - host svc - - - serial={n}".encode(), to)


LOGS_INGEST_ARGUMENTS = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")


def test_logs_ingest_demo() -> None:
    """On a terminal: with a status line."""
    ours, theirs = pty.openpty()
    temporary = Path(tempfile.mkdtemp(prefix="ingest-test-"))
    temporary.chmod(0o755)
    try:
        command = [sys.executable, "ingest_logs.py", "--demo", "--demo-seconds", "1.5", "--demo-rate", "1000"]
        folder = Path(ingest_logs.__file__).parent
        environ = {**os.environ, "TMPDIR": str(temporary), "COLUMNS": "200"}
        environ.pop("DATABASE_URL", None)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, cwd=folder, env=environ) as process:
            output = process.communicate(timeout=PRIM_PATIENCE)[0].decode()
        os.set_blocking(ours, False)
        said = os.read(ours, 1 << 20).decode()
    finally:
        os.close(ours)
        os.close(theirs)
        left = [path.name for path in temporary.iterdir()]
        shutil.rmtree(temporary, ignore_errors=True)
    assert process.returncode == 0, said
    assert re.search(r"sent +1,500\nrows +1,500\nservices +500\nenriched +100.00%\n", output)
    assert len(output.strip().splitlines()) == 11 and "team-" in output
    assert "received 1,500 = stored 1,500 + dead 0 + dropped 0 + left in the spool 0" in said
    assert re.search(
        r"s · received [\d,]+ \([\d,]+/s\) · stored [\d,]+ .* · queue [\d,]+ · dropped 0 · spool 0 · lag", said
    )
    assert left in ([], [".lockfile"])  # that one is of the wheel's


def test_logs_ingest_killed_with_durable_loses_nothing_that_was_sealed(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    more = ("--durable", "--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--batch", "10", "--flush", "0.05")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as first:
        to = first.address()
        first.until(lambda found: found["database"] == "connected")
        logs_ingest_send(to, 0, 3000)
        found = first.until(lambda found: found["stored"] > 0)
        least = found["stored"] + found["held"]["spool"]
        first.kill()  # in the middle of writing
    logs_ingest_pg.stop()
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as second:
        to = second.address()
        logs_ingest_send(to, 3000, 500)
        found = second.until(lambda found: found["held"]["spool"] == 500 + found["recovered"])
        assert least - 3000 <= found["recovered"] <= 3000
        second.kill()
    logs_ingest_pg.start()
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as third:
        found = third.until(lambda found: 0 < found["recovered"] == found["stored"])
        assert found["recovered"] >= 500
        assert third.stop() == 0
    serials = asyncio.run(logs_ingest_serials(logs_ingest_pg))
    assert len(serials) == len(set(serials)) >= least + 500
    assert set(range(3000, 3500)) <= set(serials)
    assert logs_ingest_files(tmp_path) == []


def test_logs_ingest_second_sigterm_forces(logs_ingest_pg: PgServer, tmp_path: Path) -> None:
    more = ("--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--flush", "0.05", "--stop-limit", "60")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["database"] == "connected")
        with logs_ingest_pg.frozen():
            logs_ingest_send(to, 0, 100)
            process.until(lambda found: found["held"]["writing"] + found["held"]["spool"] == 100)
            process.process.send_signal(signal.SIGTERM)
            process.until(lambda found: found["status"] == "stopping")
            begun = time.monotonic()
            assert process.stop() == 0
            assert time.monotonic() - begun < 5.0
    process.said(r"received 100 = stored 0 \+ dead 0 \+ dropped 0 \+ left in the spool 100$")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        process.until(lambda found: found["stored"] == 100)
        assert process.stop() == 0
    assert asyncio.run(logs_ingest_serials(logs_ingest_pg)) == list(range(100))


def test_logs_ingest_a_worker_that_dies_is_replaced_and_loses_nothing_in_the_kernel(
    logs_ingest_pg: PgServer, tmp_path: Path
) -> None:
    more = ("--spool", str(tmp_path), "--database", logs_ingest_pg.url, "--flush", "0.05", "--receivers", "2")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["workers"] == 2 and found["database"] == "connected")
        logs_ingest_send(to, 0, 400, sockets=40)
        process.until(lambda found: found["stored"] == 400)
        workers = psutil.Process(process.process.pid).children()
        assert len(workers) == 2
        workers[1].suspend()
        logs_ingest_send(to, 400, 400, sockets=40)
        found = process.until(lambda found: found["stored"] > 400)
        workers[1].kill()
        found = process.until(lambda found: found["stored"] == 800 and found["workers"] == 2)
        assert found["deaths"] == 1 and found["handed"] == sum(found["dropped"].values()) == 0
        process.said(r"worker \d died \(signal 9\)")
        url = process.said(r"(http://\S+)/metrics")
        with urllib.request.urlopen(f"{url}/metrics", timeout=PRIM_PATIENCE) as answer:
            families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}
        values = {name: family.samples[0].value for name, family in families.items() if family.samples}
        assert values["ingest_received"] == values["ingest_stored"] == 800 and values["ingest_imbalance"] == 0
        assert {sample.labels["place"] for sample in families["ingest_held"].samples} >= {"queue", "spool"}
        assert process.stop() == 0
    process.said(r"received 800 = stored 800 \+ dead 0 \+ dropped 0 \+ left in the spool 0$")
    assert asyncio.run(logs_ingest_serials(logs_ingest_pg)) == list(range(800))


def test_logs_ingest_workers_end_with_their_parent(tmp_path: Path) -> None:
    more = ("--spool", str(tmp_path), "--database", "postgresql://nobody@127.0.0.1:1/none", "--receivers", "2")
    with logs_ingest_process(*LOGS_INGEST_ARGUMENTS, *more) as process:
        to = process.address()
        process.until(lambda found: found["workers"] == 2)
        workers = psutil.Process(process.process.pid).children()
        logs_ingest_send(to, 0, 100, sockets=10)
        process.until(lambda found: found["received"] == 100)
        process.kill()
        prim_until(lambda: not any(worker.is_running() for worker in workers))
    assert len(logs_ingest_files(tmp_path)) >= 2


def logs_ingest_main(*arguments: str) -> int:
    try:
        return ingest_logs.main(arguments)
    except SystemExit as error:
        return int(str(error.code))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "where to? --database postgresql://..., or DATABASE_URL; or try --demo"),
        (("--database", "mysql://u:secret@h/d"), "--database: postgresql://user:password@host/database is needed"),
        (("--listen", "nowhere"), "--listen: expected HOST:PORT or [IPv6]:PORT, not 'nowhere'"),
        (("--http", "127.0.0.1:99999"), "--http: expected HOST:PORT"),
        (("--allow", "10.0.0.0/33"), "--allow: '10.0.0.0/33' does not appear to be an IPv4 or IPv6 network"),
        (("--metadata", "ftp://h/"), "--metadata: the metadata API needs a URL"),
        (("--zone", "Mars/Olympus"), "--zone: there is no time zone 'Mars/Olympus'"),
        (("--batch", "10", "--queue", "9"), "--batch must be at least 1, and at most --queue"),
        (("--receivers", "0"), "--receivers must be at least 1"),
        (("--retain", "0"), "--retain must be at least 1"),
        (("--flush", "0"), "--flush must be above 0 s"),
        (("--spool-bytes", "1X"), "argument --spool-bytes: invalid size value: '1X'"),
        (("--demo", "--demo-rate", "0"), "--demo-seconds and --demo-rate must be above 0"),
    ],
)
def test_logs_ingest_wrong_usage_is_one_line(
    arguments: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    if arguments and "--database" not in arguments and "--demo" not in arguments:
        arguments = ("--database", "postgresql://h/d", *arguments)
    assert logs_ingest_main(*arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said.splitlines()[-1] and "secret" not in said


def test_logs_ingest_says_in_one_line_why_it_cannot_start(tmp_path: Path) -> None:
    other = ("--database", "postgresql://nobody@127.0.0.1:1/none", "--spool", str(tmp_path / "spool"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as busy, socket.create_server(("127.0.0.1", 0)) as served:
        busy.bind(("127.0.0.1", 0))
        port, http = busy.getsockname()[1], served.getsockname()[1]
        with logs_ingest_process("--listen", f"127.0.0.1:{port}", *other) as process:
            assert process.end() == 1
        assert process.lines == [
            f"ingest_logs: cannot receive UDP on 127.0.0.1 port {port}: Address already in use",
        ]
        with logs_ingest_process("--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{http}", *other) as process:
            assert process.end() == 1
        assert process.lines == [f"ingest_logs: cannot serve HTTP on 127.0.0.1:{http}: Address already in use"]
    (tmp_path / "spool").write_text("a file")
    for more in ((), ("--receivers", "2")):
        with logs_ingest_process("--listen", "127.0.0.1:0", *other, *more) as process:
            assert process.end() == 1
        assert process.said(r"the spool .* cannot be used: ") and "Traceback" not in "".join(process.lines)


def test_logs_ingest_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert logs_ingest_main("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in ("(default 0.0.0.0:5514)", "(default 32M)", "(default 1000)", "--demo", "exit codes: 0", "examples:"):
        assert text in said
    assert "--worker" not in said


# -------------------------------------------------------------------------------------------- ingest_logs: the counts


def test_logs_ingest_counts_add_up_over_workers_and_their_deaths() -> None:
    one = Snapshot(
        received=100, recovered=5, stored=60, dead=1, dropped={"queue full": 4}, held={"queue": 10, "spool": 30}
    )
    two = Snapshot(received=7, stored=7, held={"queue": 0}, lag=2.0, database="down", metadata="open", deaths=1)
    assert log_workers.imbalance(one) == log_workers.imbalance(two) == 0
    both = log_workers.add_up([one, two])
    assert (both.received, both.stored, both.dropped, both.held) == (
        107,
        67,
        {"queue full": 4},
        {"queue": 10, "spool": 30},
    )
    assert (both.lag, both.database, both.metadata, both.workers, both.deaths) == (2.0, "down", "open", 2, 1)
    gone = log_workers.buried(one)
    assert (gone.dropped, gone.handed, gone.held) == ({"queue full": 4, "worker died": 10}, 30, {})
    assert log_workers.imbalance(gone) == 0 and (gone.workers, gone.deaths) == (0, 1)
    again = log_workers.add_up([gone, Snapshot(recovered=30, stored=30, database="connected")])
    assert log_workers.imbalance(again) == 0 and again.workers == 1 and again.database == "connected"
    assert log_workers.imbalance(one._replace(stored=61)) == -1
    assert log_workers.add_up([]) == Snapshot(workers=0)


def test_logs_ingest_status_and_last_word() -> None:
    before = Snapshot(received=1000, stored=500)
    now = Snapshot(
        received=3000, stored=2000, dead=2, dropped={"queue full": 5, "less severe": 0},
        held={"queue": 900, "spool": 93}, kernel_drops=7, lag=0.25, database="down", metadata="open", stopping=True,
        refused=3,
    )  # fmt: skip
    assert log_workers.status(now, before, 2.0, 61.0) == (
        "61 s · received 3,000 (1,000/s) · stored 2,000 (750/s) · queue 900 · dropped 5 (queue full 5)"
        " · kernel dropped 7 · dead 2 · spool 93 · lag 0.2 s · database down · metadata open · stopping"
    )
    assert log_workers.last_word(now) == (
        "received 3,000 = stored 2,000 + dead 2 + dropped 5 (queue full 5) + left in the spool 93"
        " + held 900 (queue 900); the kernel dropped 7 datagrams; 3 datagrams came from addresses that are not allowed"
    )


@pytest.mark.parametrize(
    ("counts", "code", "state"),
    [
        (Snapshot(database="connected", metadata="closed"), 200, "ok"),
        (Snapshot(database="connected"), 200, "ok"),
        (Snapshot(database="down"), 200, "degraded"),
        (Snapshot(database="connected", metadata="open"), 200, "degraded"),
        (Snapshot(database="connected", workers=0), 200, "degraded"),
        (Snapshot(database="connected", stopping=True), 503, "stopping"),
        (Snapshot(database="connected", faults=1), 503, "error"),
        (Snapshot(database="connected", received=1), 503, "error"),
    ],
)
def test_logs_ingest_health(counts: Snapshot, code: int, state: str) -> None:
    found = log_workers.health(counts, 1)
    assert (found[0], found[1]["status"]) == (code, state)


# --------------------------------------------------------------------------------------------------- bench.py ingest


def bench_ingest_step(rate: float, lost: int = 0, *, drained: float | None = 0.5, sent: float = 1.0) -> Any:
    told = bench_ingest.Sent(1000, rate * sent, 0.01)
    return bench_ingest.Step(rate, told, 1000 - lost, 0, 1.0, 0, drained, lost, 0.02, 0.01, 50.0, 0.1, 0.2)


class BenchIngestCourse:
    """Loses what is above so many events a second; ``bad``: steps, by their number, that fail whatever the rate."""

    def __init__(self, most: float, bad: Sequence[int] = ()) -> None:
        self.most, self.bad, self.rates = most, bad, list[float]()

    def run(self, name: str, rate: float, seconds: float) -> Any:
        self.rates.append(rate)
        return bench_ingest_step(rate, 10 if rate > self.most or len(self.rates) in self.bad else 0)


def test_bench_ingest_lossless_is_sustained() -> None:
    assert bench_ingest_step(100).lossless
    assert not bench_ingest_step(100, 1).lossless
    assert not bench_ingest_step(100, drained=None).lossless
    assert bench_ingest_step(100, drained=bench_ingest.DRAIN).lossless
    assert not bench_ingest_step(100, drained=bench_ingest.DRAIN + 0.01).lossless
    assert bench_ingest_step(100, sent=0.89).held_back
    assert not bench_ingest_step(100, sent=0.91).held_back


def test_bench_ingest_climbs_and_halves() -> None:
    course: Any = BenchIngestCourse(330)
    (search,) = bench_ingest.climb(course, ["ingest_logs"], [100, 200, 400, 800, 1600], 3, 1)
    assert course.rates == [100, 200, 400, 400, 800, 300, 350, 350, 325]
    assert (search.low, search.high) == (325, 350)
    assert search.best and search.best.wanted == 325


def test_bench_ingest_a_step_that_fails_has_a_second_chance() -> None:
    course: Any = BenchIngestCourse(1000, bad=(2,))
    (search,) = bench_ingest.climb(course, ["ingest_logs"], [100, 200], 2, 1)
    assert course.rates == [100, 200, 200]
    assert (search.low, search.failures) == (200, 0)


def test_bench_ingest_without_rsyslog_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_ingest, "rsyslogd", lambda: None)
    monkeypatch.setattr(bench_ingest, "course", lambda _: contextlib.nullcontext(BenchIngestCourse(100)))
    assert bench.main(["ingest", "--peers", "ingest_logs,rsyslog", "--rates", "50,100"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert bench_ingest.INSTALL in shown
    assert [line.split()[:2] for line in shown if line.startswith("rsyslog ")] == []
    with pytest.raises(SystemExit, match="'nobody' is none of ingest_logs"):
        bench.main(["ingest", "--peers", "nobody"])


def test_bench_ingest_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    peers = "ingest_logs" + (",rsyslog" if bench_ingest.rsyslogd() else "")
    words = ["--peers", peers, "--rates", "1000", "--seconds", "1", "--options=--flush=0.2", "--json", str(found)]
    assert bench.main(["ingest", *words]) == 0
    rows = json.loads(found.read_text())["results"]
    steps = [row for row in rows if "sent" in row]
    assert {row[""] for row in steps} == {*peers.split(",")}
    for row in steps:
        assert (row["sent"], row["lost"], row["twice"]) == (1000, 0, 0)
    assert steps[0]["enriched %"] == 100
