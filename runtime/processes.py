"""A pool of processes that computes beside an event loop: what would hold the loop, and the GIL, runs elsewhere.

Each worker is a ``ProcessPoolExecutor`` of one process that gets one job at a time. In one executor of many processes
a death breaks them all and loses every job; here it costs one worker and one job, so it is certain whose job it was.
Start method: spawn, a fresh interpreter (some 100 ms) that imports the main module again: guard that by ``__name__``.
fork copies the locks that threads hold; forkserver is quicker, but keeps a process that has no public end.

Promised
- At most ``waiting`` jobs are accepted at a time, running ones included, first come, first served; else ``PoolFull``.
- A worker that dies (SIGKILL, out of memory) is replaced once. Its job is begun ``attempts`` times at most, then raises
  ``WorkerDied``; what is begun twice should change nothing outside. Jobs beside it lose nothing.
- ``timeout`` covers the wait, the start, every attempt. Who is late or cancelled leaves at once; the worker is killed.
- What a function raises comes back as it is, with the worker's traceback as a note; what is no ``Exception``
  (``SystemExit`` would end the loop) as a ``RuntimeError``. What cannot be pickled, there or here, breaks no worker.
- ``close`` leaves no process, thread or descriptor, but multiprocessing's resource tracker, one per program.
- Workers are nicer, ignore Ctrl-C from their first instruction, and end when the program does, however that ends.

Not promised: that a program which ends without ``close`` does not wait for a job (concurrent.futures joins threads).
All state is one event loop's. A thread, the keeper, starts and buries workers, in order, so the loop waits for neither;
an executor has two more. Arguments are pickled in the loop: send arrays rather than objects.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

from coordination import Semaphore, T, stats_repr
from runtime.loop import STOPPING, blocked
from runtime.stderr import queue_stderr

BURIAL = 5.0  # seconds that a killed worker gets to be gone; the system may hold one that waits for a disk for longer
ROOT = str(Path(__file__).resolve().parents[1])


class PoolFull(Exception):
    """As many jobs as may be are accepted; one of them should have ended in ``retry_after`` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class PoolClosed(RuntimeError):
    """The pool of processes was closed."""


class WorkerDied(Exception):
    """The worker died in each attempt: killed, out of memory, or it could not even start."""


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(descriptor: int) -> None:
    """Have a signal end this process when the other end of a pipe, in which nothing comes, is closed."""
    if hasattr(os, "O_ASYNC"):
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def module_command(module: str, *arguments: object) -> list[str]:
    """The command line that runs ``main`` of a module of this project, whatever the current folder."""
    program = f"import sys; sys.path.insert(0, {ROOT!r}); from {module} import main; main()"
    return [sys.executable, "-P", "-c", program, *map(str, arguments)]


def how_it_ended(code: int) -> str:
    """Of an exit code: "signal 9", or "exit code 1"."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def may_fork() -> bool:
    """Whether a copy of this process works: another thread could hold a lock, which nobody would release in it. That
    which writes our stderr has none but its own, and a copy has a stderr of its own."""
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    return sys.platform == "linux" and all(thread.name == "stderr" for thread in others)


def start_child(function: Callable[..., None], sock: socket.socket, *args: Any) -> BaseProcess:
    """Run ``function(sock, *args)`` in a process that has nothing else of ours but stderr, and does not hear Ctrl-C and
    SIGTERM: a copy of this one, which begins at once, where it has one thread; else a fresh interpreter."""
    fresh = not may_fork()
    if fresh:
        resource_tracker.ensure_running()  # which clears the mask
    make = SpawnProcess if fresh else ForkProcess
    process = make(target=_child, args=(function, sock, *args))
    with blocked(*STOPPING):
        process.start()
    return process


def _child(function: Callable[..., None], sock: socket.socket, *args: Any) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    os.closerange(3, sock.fileno())  # a copy has all: who waits for the end of one, or for its lock, waits for us
    os.closerange(sock.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    function(sock, *args)


def _begin(nice: int) -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit.register(queue_stderr("worker"))
    os.nice(nice)
    parent = cast(Any, parent_process())
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="parent", daemon=True).start()
    end_with(parent.sentinel)  # that thread needs the GIL, which one call into C may hold for long; a signal does not


def as_exception(error: BaseException) -> Exception:
    """``error``, or what stands for one that would end an event loop."""
    return error if isinstance(error, Exception) else RuntimeError(f"{error!r} in a worker")


def _work(job: bytes) -> bytes:
    """``(True, value)`` or ``(False, error)``, pickled here: an executor breaks if it cannot unpickle."""
    try:
        function, args = pickle.loads(job)
        return pickle.dumps((True, function(*args)), pickle.HIGHEST_PROTOCOL)
    except BaseException as error:
        try:
            sent = as_exception(error)
            sent.add_note("In a worker process:\n" + traceback.format_exc().rstrip())
            failed = pickle.dumps((False, sent))
            pickle.loads(failed)  # some cannot be built from the arguments that they keep
        except BaseException:
            failed = pickle.dumps((False, pickle.PicklingError(f"cannot be sent back: {type(error).__qualname__}")))
        return failed


class _Worker:
    """One process. All but ``alive`` is for the keeper's thread."""

    def __init__(self, nice: int) -> None:
        self._nice, self._executor, self._started = nice, cast(Any, None), list[SpawnProcess]()

    def submit(self, job: bytes) -> Future[bytes]:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, get_context("spawn"), _begin, (self._nice,))
        # A process inherits the mask of the thread that starts it. (The tracker, started by now, clears it.)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return cast(Future[bytes], self._executor.submit(_work, job))
        finally:
            self._started = list(self._executor._processes.values())
            # Nobody here writes results. Were this end open, the rest of one that a kill cut off would be waited for.
            self._executor._result_queue._writer.close()

    def alive(self) -> bool:
        return not wait([process.sentinel for process in self._started], 0)

    def bury(self) -> None:
        for process in self._started:
            process.kill()
        gone = all(wait([process.sentinel], BURIAL) for process in self._started)
        if self._executor is not None:
            self._executor.shutdown(wait=gone)
        for process in self._started if gone else ():
            process.close()


class ProcessesStats(NamedTuple):
    """``replaced``: workers that died or were killed, but for ``close``; ``failed``: accepted jobs without a value."""

    workers: int
    running: int
    waiting: int
    done: int
    replaced: int
    retried: int
    failed: int


class Processes:
    """``await run(function, *args)`` in one of ``workers`` processes (None: all processors but one).

    ``waiting`` bounds the jobs accepted at a time, ``attempts`` how often one is begun; ``nice`` is added to niceness.
    """

    def __init__(self, workers: int | None = None, *, waiting: int = 64, attempts: int = 2, nice: int = 10) -> None:
        workers = max(1, (os.cpu_count() or 1) - 1) if workers is None else workers
        if min(workers, waiting, attempts) < 1 or nice < 0:
            raise ValueError(f"{workers=}, {waiting=}, {attempts=}: at least 1 is needed; {nice=}: at least 0")
        self.workers, self.accepts, self.attempts, self.nice = workers, waiting, attempts, nice
        self._places = Semaphore(workers)
        self._idle: list[_Worker] = []
        self._outcomes: set[asyncio.Future[Any]] = set()  # what the running jobs wait for
        self._accepted = self._done = self._replaced = self._retried = self._failed = 0
        self._seconds = 1.0  # that a job takes: an exponential average
        self._closing = self._killing = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._keeper = ThreadPoolExecutor(1, "processes")

    async def start(self, timeout: float = 30.0) -> None:
        """Have the worker processes started. Raises ``WorkerDied``, ``TimeoutError``."""
        job = pickle.dumps((os.getpid, ()))
        await asyncio.gather(*(self._accept(job, timeout) for _ in range(min(self.workers, self.accepts))))

    async def run(self, function: Callable[..., T], *args: Any, timeout: float = 30.0) -> T:
        """``function(*args)``, computed by a worker, which must be able to import it.

        Raises what it raises and what pickling does, ``PoolFull``, ``PoolClosed``, ``WorkerDied``, ``TimeoutError``.
        """
        if self._closing:
            raise PoolClosed
        if self._accepted >= self.accepts:
            raise PoolFull(max(0.1, self._seconds / self.workers))
        job, began = pickle.dumps((function, args), pickle.HIGHEST_PROTOCOL), time.monotonic()
        try:
            value: T = await self._accept(job, timeout)
        except BaseException:
            self._failed += 1
            raise
        self._done += 1
        self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        return value

    async def _accept(self, job: bytes, timeout: float) -> Any:
        self._accepted += 1
        self._empty.clear()
        try:
            async with asyncio.timeout(timeout), self._places:
                ok, value = await self._attempt(job)
        finally:
            self._accepted -= 1
            if not self._accepted:
                self._empty.set()
        if ok:
            return value
        try:
            raise value
        finally:
            del value  # its traceback holds this frame

    async def _attempt(self, job: bytes) -> tuple[bool, Any]:
        for attempt in range(self.attempts):
            if self._killing:
                raise PoolClosed
            self._retried += attempt > 0
            worker = self._worker()
            try:
                outcome = await self._outcome(worker, job)
            except BaseException:  # late, cancelled or closed: nobody waits for this worker any more
                self._bury(worker)
                raise
            if outcome is not None:
                self._idle.append(worker)
                return outcome
            self._bury(worker)
        raise WorkerDied(f"the worker process died in each of {self.attempts} attempts")

    def _worker(self) -> _Worker:
        """An idle one, the last used first, or a new one. To find one dead is nobody's attempt."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive():
                return worker
            self._bury(worker)
        return _Worker(self.nice)

    def _bury(self, worker: _Worker) -> None:
        """Once for each worker: by the job that has it, or by who takes it from ``_idle``."""
        self._replaced += not self._killing
        self._keeper.submit(worker.bury)

    async def _outcome(self, worker: _Worker, job: bytes) -> tuple[bool, Any] | None:
        """What ``_work`` sent; None if the worker died."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[tuple[bool, Any] | None] = loop.create_future()

        def settle(result: tuple[bool, Any] | None) -> None:
            if not outcome.done():
                outcome.set_result(result)

        def tell(result: tuple[bool, Any] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, result)

        def ended(future: Future[bytes]) -> None:  # in a thread of the executor
            try:
                tell(None if future.exception() is not None else pickle.loads(future.result()))
            except BaseException as error:  # it was pickled there, but cannot be built here
                tell((False, as_exception(error)))

        def begin() -> None:  # in the keeper's thread
            try:
                worker.submit(job).add_done_callback(ended)
            except Exception:  # the worker broke since it was looked at, or no process can be started
                tell(None)

        self._outcomes.add(outcome)
        try:
            self._keeper.submit(begin)
            return await outcome
        finally:
            self._outcomes.discard(outcome)

    async def close(self, grace: float = 5.0) -> None:
        """Refuse new jobs, give those accepted ``grace`` seconds, then kill: they raise ``PoolClosed``. Idempotent."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._empty.wait()
        self._killing = True
        for outcome in self._outcomes:
            if not outcome.done():
                outcome.set_exception(PoolClosed)
        await self._empty.wait()
        with contextlib.suppress(RuntimeError):  # another one closed it meanwhile
            while self._idle:
                self._bury(self._idle.pop())
            await asyncio.wrap_future(self._keeper.submit(int))  # after all burials
        self._keeper.shutdown()

    def stats(self) -> ProcessesStats:
        """The counts of this moment."""
        running, counts = len(self._outcomes), (self._done, self._replaced, self._retried, self._failed)
        return ProcessesStats(self.workers, running, self._accepted - running, *counts)

    __repr__ = stats_repr


async def in_daemon(function: Callable[..., T], *args: Any) -> T:
    """``asyncio.to_thread`` for what raises nothing, in a thread for which no program waits when it ends."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        value = function(*args)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if found.done() else found.set_result(value))

    threading.Thread(target=work, name=function.__name__, daemon=True).start()
    return await found
