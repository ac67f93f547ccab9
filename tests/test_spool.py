"""runtime/spool.py: real files; a process that is killed, a disk that is full, bits that turn."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from runtime import spool as log_spool
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, SETTINGS, World, run_task, until_async
from tests.helpers.logs import (
    NOON,
    logs_spool_open,
    logs_store_batch,
    logs_store_counts,
    logs_store_days,
    logs_store_open,
)
from tests.helpers.postgres import PgServer


def logs_spool_batch(n: int, rows: int = 2) -> log_spool.EncodedBatch:
    return log_spool.EncodedBatch(uuid.UUID(int=n), rows, 1000.5 + n, f"row of {n}\n".encode() * rows)


SIZE = len(log_spool.header(logs_spool_batch(1)) + logs_spool_batch(1).data)


async def logs_spool_all(spool: log_spool.Spool) -> list[log_spool.EncodedBatch]:
    return [batch for _, batch in await spool.first(100_000)]


def logs_spool_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_gives_back_in_order_what_was_put(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "not" / "yet"
        batches = [logs_spool_batch(n, n + 1) for n in range(50)]
        async with logs_spool_open(folder) as spool:
            assert await spool.first(5) == [] and "batches=0" in repr(spool)
            assert all(await asyncio.gather(*(spool.put(batch) for batch in batches)))
            assert await logs_spool_all(spool) == batches
            first = await spool.first(3)
            assert [batch for _, batch in first] == batches[:3] and len(await spool.first(3)) == 3
            await spool.remove([name for name, _ in first] + ["never there"])
            await spool.remove([first[0][0]])
            assert [batch for _, batch in await spool.first(2)] == batches[3:5]
            before = spool.stats()
            assert (before.batches, before.rows, before.recovered) == (47, sum(range(4, 51)), 0)
            assert before.bytes == sum(path.stat().st_size for path in folder.glob("*.batch"))
        async with logs_spool_open(folder) as spool:
            after = spool.stats()
            assert (after.recovered, *after[:3]) == (after.rows, *before[:3])
            with pytest.raises(RuntimeError, match="is open"):
                spool.open()
            assert await spool.put(logs_spool_batch(99))
            assert await logs_spool_all(spool) == [*batches[3:], logs_spool_batch(99)]
            await spool.remove([name for name, _ in await spool.first(48)])
            assert spool.stats()[:3] == (0, 0, 0) and logs_spool_names(folder) == ["lock"]
        with pytest.raises(RuntimeError, match="not open"):
            await spool.put(batches[0])
        await spool.close()
        assert spool.open() == 0 and spool.stats().batches == 0, "another life"
        await spool.close()

    run_task(main())


def test_holds_no_more_than_its_bytes(tmp_path: Path) -> None:
    async def main() -> None:
        async with logs_spool_open(tmp_path, max_bytes=3 * SIZE) as spool:
            done = await asyncio.gather(*(spool.put(logs_spool_batch(n)) for n in range(9)))
            assert list(map(bool, done)) == [True] * 3 + [False] * 6
            assert spool.stats()[:3] == (3, 6, 3 * SIZE) and spool.stats().refused == 6
            await spool.remove([(await spool.first(1))[0][0]])
            assert not await spool.put(logs_spool_batch(8, 3)), "a larger one"
            assert await spool.put(logs_spool_batch(9))
            assert [batch.id.int for batch in await logs_spool_all(spool)] == [1, 2, 9]
        async with logs_spool_open(tmp_path, max_bytes=SIZE) as spool:
            assert spool.stats()[:3] == (3, 6, 3 * SIZE), "less is allowed now, and nothing is thrown away"
            assert not await spool.put(logs_spool_batch(11))

    run_task(main())


class Machine(RuleBasedStateMachine):
    """A spool beside a list, over any number of lives."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        for path in self.folder.iterdir():
            path.unlink()
        self.wanted: list[log_spool.EncodedBatch] = []
        self.refused = self.serial = 0
        self.spool = self.opened()

    def opened(self) -> log_spool.Spool:
        spool = log_spool.Spool(self.folder, max_bytes=8 * SIZE, fsync_every=60.0)
        assert spool.open() == sum(batch.rows for batch in self.wanted)
        return spool

    @rule(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4))
    def put(self, sizes: list[int]) -> None:
        async def put() -> list[str | None]:
            return await asyncio.gather(*(self.spool.put(batch) for batch in batches))

        batches = [logs_spool_batch(self.serial + n, rows) for n, rows in enumerate(sizes)]
        self.serial += len(sizes)
        for batch, done in zip(batches, self.runner.run(put()), strict=True):
            size = sum(len(log_spool.header(each) + each.data) for each in [*self.wanted, batch])
            assert (done is not None) == (size <= self.spool.max_bytes)
            if done:
                self.wanted.append(batch)
            else:
                self.refused += 1

    @rule(n=st.integers(1, 5), places=st.sets(st.integers(0, 4)))
    def remove(self, n: int, places: set[int]) -> None:
        found = self.runner.run(self.spool.first(n))
        assert [batch for _, batch in found] == self.wanted[:n]
        self.runner.run(self.spool.remove([name for place, (name, _) in enumerate(found) if place in places]))
        self.wanted = [batch for place, batch in enumerate(self.wanted) if place >= n or place not in places]

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.wanted) - 1))
        name = list(self.spool._files)[place]
        lost = self.spool.stats().lost
        (self.folder / name).write_bytes(b"{}\n")
        gone = self.wanted.pop(place)
        assert [batch for _, batch in self.runner.run(self.spool.first(99))] == self.wanted
        assert self.spool.stats().lost == lost + gone.rows

    @rule(cleanly=st.booleans())
    def again(self, cleanly: bool) -> None:
        if cleanly:
            self.runner.run(self.spool.close())
        else:
            self.abandon()
        self.refused = 0
        self.spool = self.opened()

    @invariant()
    def counts(self) -> None:
        stats = self.spool.stats()
        assert (stats.batches, stats.rows) == (len(self.wanted), sum(batch.rows for batch in self.wanted))
        assert stats.bytes == sum(path.stat().st_size for path in self.folder.glob("*.batch"))
        assert (stats.refused, stats.errors) == (self.refused, 0)

    def abandon(self) -> None:
        """As a process that dies leaves it."""
        assert self.spool._lock_file is not None and self.spool._thread is not None
        os.close(self.spool._lock_file)
        self.spool._thread.shutdown()
        if self.spool._timer is not None:
            self.spool._timer.cancel()

    def teardown(self) -> None:
        self.runner.run(self.spool.close())
        self.runner.close()


def test_is_a_list_that_outlives_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    Machine.folder = tmp_path
    run_state_machine_as_test(Machine, settings=settings(SETTINGS, max_examples=25))


def logs_spool_program(folder: Path, body: str, **options: Any) -> subprocess.CompletedProcess[str]:
    program = (
        "import asyncio, errno, os, resource, signal, sys, uuid\nfrom pathlib import Path\n"
        "from logs import store as log_store\nfrom runtime import spool as log_spool\n"
        "def batch(n): return log_spool.EncodedBatch(uuid.UUID(int=n), 2, 1000.5 + n, f'row of {n}\\n'.encode() * 2)\n"
        "async def main():\n"
        f"    spool = log_spool.Spool(Path(sys.argv[1]))\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=HERE, timeout=PROGRAM_LIMIT, check=False, **options
    )


@pytest.mark.parametrize(
    "dies",
    [
        "Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
        "log_spool.memoryview = lambda text: os.kill(os.getpid(), signal.SIGKILL) if text == batch(5).data"
        " else memoryview(text)",
        "asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGKILL)",
    ],
    ids=["before the name", "in the text", "anywhere"],
)
def test_what_was_put_outlives_a_kill(tmp_path: Path, dies: str) -> None:
    body = f"""
        spool.open()
        for n in range(100000):
            if n == 5:
                {dies}
            assert await spool.put(batch(n))
            print(n, flush=True)
        """
    done = logs_spool_program(tmp_path, body)
    assert done.returncode == -signal.SIGKILL, done.stderr
    told = len(done.stdout.split())
    assert told >= 5

    async def main() -> None:
        async with logs_spool_open(tmp_path) as spool:
            found = await logs_spool_all(spool)
            assert found == [logs_spool_batch(n) for n in range(len(found))]
            assert told <= len(found) <= told + 1
            assert (spool.stats().recovered, spool.stats().bad) == (2 * len(found), 0)
            assert not any(name.endswith(".part") for name in logs_spool_names(tmp_path))

    asyncio.run(main())


def test_no_bit_can_turn_unseen(tmp_path: Path) -> None:
    """Nor can a byte be missing, or added, anywhere; what is damaged is set aside and the rest goes on."""
    batch = logs_spool_batch(7)
    good = log_spool.header(batch) + batch.data
    wrong = {bytes([*good[:n], good[n] ^ 1 << bit, *good[n + 1 :]]) for n in range(len(good)) for bit in range(8)}
    wrong |= {good[:n] for n in range(len(good))} | {good[:n] + b"x" + good[n:] for n in range(len(good) + 1)}
    wrong |= {good[:n] + good[n + 1 :] for n in range(len(good))} | {good + good, b"\0" * len(good), b"[" * 9999}
    wrong |= {good[:n] + b"\0" * (len(good) - n) for n in range(len(good))}  # what a power cut leaves
    wrong -= {good}
    assert log_spool.decoded(log_spool.header(batch), batch.data) == batch
    for data in wrong:
        line, end, rest = data.partition(b"\n")
        with pytest.raises(log_spool.Damaged):
            log_spool.decoded(line + end, rest)

    async def main() -> None:
        damaged = sorted(wrong)[:: len(wrong) // 40]
        for n, data in enumerate(damaged):
            (tmp_path / f"{2 * n:016d}.batch").write_bytes(data)
            (tmp_path / f"{2 * n + 1:016d}.batch").write_bytes(good)
        (tmp_path / "9999999999999999.batch").write_bytes(b"it uses up no numbers")
        (tmp_path / "notes.txt").write_text("not ours")
        (tmp_path / "0000000000000500.part").write_bytes(good)
        (tmp_path / "0000000000000501.batch").mkdir()
        async with logs_spool_open(tmp_path) as spool:
            stats = spool.stats()
            assert (stats.batches, stats.bad, stats.errors, stats.lost) == (len(damaged), len(damaged) + 1, 1, 0)
            assert await spool.put(logs_spool_batch(8))
            assert await logs_spool_all(spool) == [batch] * len(damaged) + [logs_spool_batch(8)]
            assert "0000000000000502.batch" in logs_spool_names(tmp_path)
        async with logs_spool_open(tmp_path) as spool:
            assert spool.stats().bad == 0 and spool.stats().batches == len(damaged) + 1
            names = logs_spool_names(tmp_path)
            assert sum(name.endswith(".bad") for name in names) == len(damaged) + 1 and "notes.txt" in names

    asyncio.run(main())


def logs_spool_refuses(number: int) -> Callable[..., Any]:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuses


def test_a_file_that_goes_bad_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with logs_spool_open(tmp_path) as spool:
            for n in range(6):
                await spool.put(logs_spool_batch(n, n + 1))
            paths = [tmp_path / name for name in logs_spool_names(tmp_path)]
            paths[0].unlink()
            paths[1].write_bytes(b"")
            assert [batch.id.int for _, batch in await spool.first(2)] == [2, 3], "none only if there are none"
            paths[3].write_bytes(paths[4].read_bytes()[:-1])
            assert [batch.id.int for _, batch in await spool.first(3)] == [2, 4]
            stats = spool.stats()
            assert (stats.batches, stats.rows, stats.bad, stats.lost) == (3, 3 + 5 + 6, 3, 1 + 2 + 4)
            with monkeypatch.context() as patch:
                patch.setattr(log_spool, "open", logs_spool_refuses(errno.EMFILE), raising=False)
                with pytest.raises(OSError, match="Too many open files"):
                    await spool.first(3)
            assert spool.stats() == stats, "that is not the file's fault"

    asyncio.run(main())


def test_a_full_disk_is_an_answer(tmp_path: Path) -> None:
    """A real limit on the size of files in a process of its own; it leaves nothing half behind."""
    body = """
        spool.open()
        assert await spool.put(batch(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        large = log_spool.EncodedBatch(uuid.UUID(int=2), 1000, 1.0, b'ten bytes\\n' * 1000)
        print(await spool.put(large), await spool.put(batch(3)), spool.stats()[:3], spool.stats().refused)
        await spool.close()
        """
    done = logs_spool_program(tmp_path, body.replace("\\\\", "\\"))
    assert done.stdout.split(" ", 2)[:2] == ["None", "0000000000000002.batch"] and done.stdout.endswith(" 1\n"), done
    assert logs_spool_names(tmp_path) == ["0000000000000000.batch", "0000000000000002.batch", "lock"]
    assert "File too large" in done.stderr


@pytest.mark.parametrize("where", ["fsync", "rename", "open"])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    refuses = logs_spool_refuses(errno.ENOSPC)

    async def main() -> None:
        async with logs_spool_open(tmp_path, fsync_every=0) as spool:
            assert await spool.put(logs_spool_batch(1))
            with monkeypatch.context() as patch:
                if where == "open":
                    patch.setattr(log_spool, "open", refuses, raising=False)
                else:
                    patch.setattr(os if where == "fsync" else Path, where, refuses)
                assert not await spool.put(logs_spool_batch(2))
            assert (spool.stats().batches, spool.stats().refused, spool.stats().unsynced) == (1, 1, 0)
            assert await spool.put(logs_spool_batch(3)) and spool._coming == 0
            assert [batch.id.int for batch in await logs_spool_all(spool)] == [1, 3]
            assert len(logs_spool_names(tmp_path)) == 3

    asyncio.run(main())


def test_a_disk_that_refuses_later_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = logs_spool_refuses(errno.EIO)

    async def main() -> None:
        async with logs_spool_open(tmp_path) as spool:
            assert await spool.put(logs_spool_batch(1)) and await spool.put(logs_spool_batch(2))
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", refuses)
                await spool.sync()
                assert spool.stats().errors == 3, "two files and the folder"
                patch.setattr(Path, "unlink", refuses)
                await spool.remove([name for name, _ in await spool.first(1)])
            assert spool.stats().errors == 4 and spool.stats().batches == 1
        async with logs_spool_open(tmp_path) as spool:
            assert spool.stats().batches == 2, "it comes again, and its id makes that harmless"

    asyncio.run(main())


def test_is_made_safe_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(number: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    async def main() -> None:
        monkeypatch.setattr(os, "fsync", watched)
        clock = World()
        names = [f"{n:016d}.batch" for n in range(9)]
        async with logs_spool_open(tmp_path, fsync_every=5.0, clock=clock.clock) as spool:
            for n, later in enumerate([0.0, 4.0, 0.5]):
                clock.now += later
                assert await spool.put(logs_spool_batch(n)) and synced == []
            assert spool.stats().unsynced == 3
            await spool.remove(names[1:2])
            clock.now += 0.5  # the first is five seconds old
            assert await spool.put(logs_spool_batch(3))
            assert synced == [names[0], names[2], names[3], tmp_path.name] and spool.stats().unsynced == 0
            synced.clear()
            await spool.sync()
            assert synced == [] and await spool.put(logs_spool_batch(4)) and synced == []
            assert len([task for task in asyncio.all_tasks() if task is not asyncio.current_task()]) == 1
        assert synced == [names[4], tmp_path.name], "at the end"
        synced.clear()
        async with logs_spool_open(tmp_path, fsync_every=0.01) as spool:  # nobody puts any more
            assert await spool.put(logs_spool_batch(5))
            await until_async(lambda: spool.stats().unsynced == 0 and spool._timer is None)
            assert await spool.put(logs_spool_batch(6))
            await until_async(lambda: spool.stats().unsynced == 0 and spool._timer is None)
            assert synced == [names[5], tmp_path.name, names[6], tmp_path.name]
        synced.clear()
        async with logs_spool_open(tmp_path, fsync_every=0) as spool:
            assert await spool.put(logs_spool_batch(7))
            assert synced == [f"{names[7][:16]}.part", tmp_path.name], "before it is answered"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    async def main() -> None:
        body = """
            try:
                print(spool.open(), flush=True)
                os._exit(0)
            except log_spool.SpoolInUse as error:
                print(error)
            """
        async with logs_spool_open(tmp_path) as spool:
            await spool.put(logs_spool_batch(1))
            (tmp_path / "0000000000000007.part").write_bytes(b"being written")
            done = await asyncio.to_thread(logs_spool_program, tmp_path, body)
            assert done.stdout == f"{tmp_path} is in use by another process\n", done.stderr
            with pytest.raises(log_spool.SpoolInUse):
                log_spool.Spool(tmp_path).open()
            assert (tmp_path / "0000000000000007.part").exists()
        done = await asyncio.to_thread(logs_spool_program, tmp_path, body)
        assert done.stdout == "2\n", done.stderr

    asyncio.run(main())


def test_thousands_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk takes its time to forget

    async def main(tmp_path: Path) -> None:
        async with logs_spool_open(tmp_path) as spool:
            for n in range(0, 2000, 500):
                assert all(await asyncio.gather(*(spool.put(logs_spool_batch(n + i)) for i in range(500))))
        async with logs_spool_open(tmp_path) as spool:
            assert spool.stats().recovered == 4000
            n = 0
            while found := await spool.first(400):
                assert [batch.id.int for _, batch in found] == list(range(n, n + len(found)))
                n += len(found)
                await spool.remove([name for name, _ in found])
            assert n == 2000 and logs_spool_names(tmp_path) == ["lock"]

    with tempfile.TemporaryDirectory(dir=memory) as folder:
        asyncio.run(main(Path(folder)))


def test_a_cancelled_put_is_counted_as_what_it_became(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, rename = threading.Event(), Path.rename

    def gated(self: Path, target: Path) -> Path:
        gate.wait(HANG_LIMIT)
        return rename(self, target)

    async def main() -> None:
        monkeypatch.setattr(Path, "rename", gated)
        async with logs_spool_open(tmp_path) as spool:
            putting = asyncio.create_task(spool.put(logs_spool_batch(1)))
            await until_async(lambda: any(tmp_path.glob("*.part")))
            putting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await putting
            assert spool.stats()[:3] == (0, 0, 0)
            gate.set()
            await until_async(lambda: spool.stats().batches == 1)
            assert await logs_spool_all(spool) == [logs_spool_batch(1)]

    asyncio.run(main())


def test_and_store_nothing_lost_nothing_doubled(logs_pg: PgServer, tmp_path: Path) -> None:
    """A life that dies between the commit and the removal; the next one writes the same again."""

    async def main() -> None:
        batches = [logs_store_batch(n) for n in (10, 20, 30)]
        async with logs_store_open(logs_pg.url) as store:
            async with logs_spool_open(tmp_path) as spool:
                for batch in batches:
                    assert await spool.put(batch)
                found = await spool.first(2)
                assert await store.write([batch for _, batch in found]) == [(10, 0), (20, 0)]
            async with logs_spool_open(tmp_path) as spool:
                assert spool.stats().recovered == 60
                found = await spool.first(99)
                assert [batch for _, batch in found] == batches
                assert await store.write([batch for _, batch in found]) == [(10, 0), (20, 0), (30, 0)]
                await spool.remove([name for name, _ in found])
        assert await logs_store_counts(logs_pg) == (60, 3, 0)

    asyncio.run(main())


def test_store_a_partition_that_others_need_holds_back_no_other(logs_pg: PgServer) -> None:
    async def main() -> None:
        async with logs_store_open(logs_pg.url, retain_days=1, ahead_days=0) as store:
            await store.write([logs_store_batch(1, NOON - timedelta(days=n)) for n in (8, 9)])
            await logs_pg.do("CREATE VIEW logs_viewed AS SELECT * FROM logs_2024_02_19")
            await store.maintain()
            assert await logs_store_days(logs_pg) == ["2024_02_19", "2024_02_28"]
            await logs_pg.do("DROP VIEW logs_viewed")
            await store.maintain()
            assert await logs_store_days(logs_pg) == ["2024_02_28"] and store.stats().partitions_dropped == 2

    asyncio.run(main())
