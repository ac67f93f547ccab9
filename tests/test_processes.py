"""runtime/processes.py: real processes and real kills."""

from __future__ import annotations

import asyncio
import math
import operator
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from runtime import processes
from tests.helpers.base import HANG_LIMIT, HERE, limits, until_async
from tests.helpers.processes import proc_gone, proc_run, proc_ticks, proc_writer


def test_proc_results_are_exact_and_workers_are_kept() -> None:
    async def main(pool: processes.Processes) -> None:
        await pool.start()
        assert pool.stats() == (2, 0, 0, 0, 0, 0, 0)
        results = await asyncio.gather(*(pool.run(math.factorial, n) for n in range(60)))
        assert results == [math.factorial(n) for n in range(60)]
        pids = set(await asyncio.gather(*(pool.run(os.getpid) for _ in range(20))))
        assert len(pids) <= 2
        assert os.getpid() not in pids
        assert repr(pool) == "<Processes workers=2 running=0 waiting=0 done=80 replaced=0 retried=0 failed=0>"
        assert await pool.run(os.nice, 0) == min(19, os.nice(0) + 7)
        assert await pool.run(signal.getsignal, signal.SIGINT) == signal.SIG_IGN
        assert signal.SIGINT in await pool.run(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        big = bytes(3_000_000)
        assert await pool.run(operator.concat, big, b"x") == big + b"x"

    proc_run(main, 2, nice=7)


def test_proc_a_killed_worker_is_replaced_once_and_only_its_job_begun_again(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")
    os.mkfifo(other := tmp_path / "other")

    async def main(pool: processes.Processes) -> None:
        beside = asyncio.create_task(pool.run(Path.read_text, other))
        held = await proc_writer(other)
        pid = await pool.run(os.getpid)
        job = asyncio.create_task(pool.run(Path.read_text, gate))
        waiting = [asyncio.create_task(pool.run(operator.neg, n)) for n in range(10)]
        first = await proc_writer(gate)
        os.kill(pid, signal.SIGKILL)
        await until_async(lambda: proc_gone(pid))
        os.close(first)
        second = await proc_writer(gate)  # another process has it open
        assert pool.stats() == (2, 2, 10, 1, 1, 1, 0)
        os.write(second, b"done")
        os.close(second)
        os.write(held, b"beside")
        os.close(held)
        assert (await job, await beside) == ("done", "beside")
        assert await asyncio.gather(*waiting) == [-n for n in range(10)]
        assert pool.stats() == (2, 0, 0, 13, 1, 1, 0)

    proc_run(main, 2)


@pytest.mark.parametrize("attempts", [1, 3])
def test_proc_a_function_that_kills_its_worker_is_begun_so_many_times(attempts: int, tmp_path: Path) -> None:
    async def main(pool: processes.Processes) -> None:
        with pytest.raises(processes.WorkerDied, match=f"in each of {attempts} attempts"):
            await pool.run(os._exit, 0)
        assert pool.stats() == (1, 0, 0, 0, attempts, attempts - 1, 1)
        assert await pool.run(operator.add, 1, 2) == 3

    proc_run(main, attempts=attempts)


def test_proc_an_idle_worker_that_was_killed_costs_no_attempt() -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        os.kill(pid, signal.SIGKILL)
        await until_async(lambda: proc_gone(pid))
        assert await pool.run(os.getpid) != pid
        assert pool.stats() == (1, 0, 0, 2, 1, 0, 0)

    proc_run(main, attempts=1)


def test_proc_timeout_kills_the_worker_and_the_pool_goes_on(tmp_path: Path) -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        with limits(0.3) as up:
            beside = asyncio.create_task(pool.run(time.sleep, 1000, timeout=0.3))
            await asyncio.sleep(0)
            with pytest.raises(TimeoutError):  # it waits for the only worker
                await pool.run(os.getpid, timeout=0.01)
            assert not proc_gone(pid)
            up()
            with pytest.raises(TimeoutError):
                await beside
        await until_async(lambda: proc_gone(pid))
        assert await pool.run(operator.add, 1, 2) == 3
        assert pool.stats() == (1, 0, 0, 2, 1, 0, 2)

    proc_run(main)


def test_proc_a_worker_that_takes_nothing_is_ended_with_a_job_half_sent() -> None:
    """More than a pipe holds is on its way to a stopped process."""

    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await pool.run(len, bytes(4_000_000), timeout=0.1)
        await until_async(lambda: proc_gone(pid))
        assert await pool.run(len, bytes(4_000_000)) == 4_000_000

    proc_run(main)


def test_proc_cancellation_gives_the_places_back() -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        running = asyncio.create_task(pool.run(time.sleep, 1000))
        waiting = asyncio.create_task(pool.run(time.sleep, 1000))
        await until_async(lambda: pool.stats()[1:3] == (1, 1))
        with pytest.raises(processes.PoolFull) as full:
            await pool.run(os.getpid)
        assert 0.1 <= full.value.retry_after < HANG_LIMIT
        assert pickle.loads(pickle.dumps(full.value)).retry_after == full.value.retry_after
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (pool.stats()[1:3], proc_gone(pid)) == ((1, 0), False)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled() and waiting.cancelled()
        await until_async(lambda: proc_gone(pid))
        assert await pool.run(os.getpid) != pid
        assert pool.stats() == (1, 0, 0, 2, 1, 0, 2)

    proc_run(main, waiting=2)


def test_proc_errors_come_back_and_break_nothing() -> None:
    async def main(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        with pytest.raises(KeyError) as missing:
            await pool.run(operator.getitem, {}, "x")
        assert missing.value.args == ("x",)
        assert "In a worker process:\nTraceback" in missing.value.__notes__[0]
        with pytest.raises(RuntimeError, match=r"SystemExit\(3\) in a worker"):
            await pool.run(sys.exit, 3)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await pool.run(next, iter(()))
        with pytest.raises((AttributeError, pickle.PicklingError)):
            await pool.run(lambda: 1)
        with pytest.raises(TypeError, match="pickle"):  # the argument
            await pool.run(len, threading.Lock())
        with pytest.raises(TypeError, match="pickle"):  # the result
            await pool.run(threading.Lock)
        with pytest.raises(ValueError, match="no_such"):  # cannot be built in the worker
            await pool.run(len, ProcStrange("no_such"))
        with pytest.raises(pickle.PicklingError, match="cannot be sent back: Local"):
            await pool.run(exec, "class E(Exception): pass\nE.__qualname__ = 'Local'\nraise E")
        assert await pool.run(os.getpid) == pid
        assert pool.stats()[4:6] == (0, 0)

    proc_run(main)


class ProcStrange:
    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return int, (self.name,)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"waiting": 0}, {"attempts": 0}, {"nice": -1}])
def test_proc_misuse(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needed"):
        processes.Processes(**bad)


def test_proc_close_waits_then_kills_and_refuses(tmp_path: Path) -> None:
    os.mkfifo(gate := tmp_path / "gate")

    async def main(pool: processes.Processes) -> None:
        job = asyncio.create_task(pool.run(Path.read_text, gate))
        writer = await proc_writer(gate)
        closing = asyncio.create_task(pool.close(HANG_LIMIT))
        await asyncio.sleep(0)
        with pytest.raises(processes.PoolClosed):
            await pool.run(os.getpid)
        os.write(writer, b"done")
        os.close(writer)
        assert await job == "done"
        await asyncio.gather(closing, pool.close(), pool.close(0.0))

    async def stuck(pool: processes.Processes) -> None:
        pid = await pool.run(os.getpid)
        jobs = [asyncio.create_task(pool.run(time.sleep, 1000)) for _ in range(3)]
        await asyncio.sleep(0)
        await pool.close(0.01)
        assert [type(outcome) for outcome in await asyncio.gather(*jobs, return_exceptions=True)] == (
            [processes.PoolClosed] * 3
        )
        assert proc_gone(pid)

    async def never_used(pool: processes.Processes) -> None:
        await pool.close()

    for case in (main, stuck, never_used):
        proc_run(case)


PROC_ORPHANS = """
import asyncio, os, re, time
from runtime.processes import Processes
async def main():
    pool = Processes(2)
    jobs = [asyncio.create_task(pool.run(os.getpid)) for _ in range(2)]
    print(*[await job for job in jobs], flush=True)
    await asyncio.gather(pool.run(time.sleep, 1000), pool.run(re.match, "(a+)+$", "a" * 64 + "b"))
if __name__ == "__main__":
    asyncio.run(main())
"""


def test_proc_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    """One sleeps; the other never lets go of the GIL."""
    script = tmp_path / "orphans.py"
    script.write_text(PROC_ORPHANS)
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen(
        [sys.executable, script], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(pids) == 2

            async def watch() -> None:
                await until_async(lambda: any(proc_ticks(pid) > 20 for pid in pids))  # the match is under way
                parent.kill()
                await until_async(lambda: all(proc_gone(pid) for pid in pids))

            asyncio.run(watch())
        finally:
            parent.kill()
            for pid in pids:
                if not proc_gone(pid):
                    os.kill(pid, signal.SIGKILL)
