"""Readers: the processes in which feeds and articles are read, so that no document holds up, fills or ends the crawl.

What feedparser, trafilatura and lxml do with a hostile document is known to nobody: quadratic time, gigabytes, a crash
in C. So it is done elsewhere, for one document at a time; both drivers call ``Readers.read`` from a thread, which
waits for its reader without the interpreter's lock. So reading is also spread over the processors.

A reader is a copy (fork) of the template, a process with one thread that has imported everything, which takes half a
second. So readers, also those in place of ended ones, start in a millisecond, and share most of their memory.

Promised
- A document may cost its reader ``crawl.feeds.bounds``: seconds of processor time, whoever else needs the processor,
  and bytes of memory. Beyond that the reader ends, in whatever it is, and the row says why; so it does if the reader
  crashes. No other document is lost, and none is tried again.
- Readers are started as they are needed, ``count`` at most. Nobody waits for one longer than those before him may take.
- ``kill`` ends all at once, and who waits for them gets a FetchError of kind ``interrupted``. They end with the process
  that started them, however that ends (but on Linux, one that reads does so when it has read), and do not listen to
  Ctrl-C and SIGTERM: that process does.

Why not ``runtime.processes.Processes``: it is an event loop's, spawn would import the program that called
``scrape_all`` once more, guarded or not, and its time limit is of the clock and covers the wait.

``Readers._lock`` guards which readers there are (and is held while the template is started, once); ``Template.lock`` is
held for an order and its answer. A reader is its thread's, from ``_take`` to ``_give``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from coordination import Semaphore, new_lock, stats_repr
from crawl.articles import read_article
from crawl.errors import FetchError
from crawl.feeds import bounds, feed_parsers
from runtime.loop import STOPPING, blocked
from runtime.processes import end_with, how_it_ended, module_command, processors

MOST = 8  # readers of one program, however many processors there are
STUCK = 120  # seconds that a reader, of which less time of a processor was asked, may keep its thread
SPARE = 16 << 20  # bytes that an idle reader may have more than it began with
PROMPT = 1.0  # seconds that the template gets to end by itself
REAP_LIMIT = 5.0  # seconds that what was killed gets to be gone; the system may hold it while it waits for a disk

_NUMBER = struct.Struct("@i")
_STOPPED = ("interrupted", "stopped before it was read")


def _pair() -> tuple[socket.socket, socket.socket]:
    """Ours and theirs: at ours nobody waits for ever."""
    ours, theirs = socket.socketpair()
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", STUCK, 0))
    return ours, theirs


class Reader(NamedTuple):
    """One process, seen from here."""

    pid: int
    pipe: Connection

    def ask(self, *job: Any) -> tuple[Any, str | None, bool]:
        """(Value, why there is none, whether the reader ends). Raises OSError, EOFError if it has ended."""
        self.pipe.send_bytes(pickle.dumps(job, pickle.HIGHEST_PROTOCOL))
        answer: tuple[Any, str | None, bool] = pickle.loads(self.pipe.recv_bytes())
        return answer


class Template:
    """The process that readers are copies of. Raises OSError where it has ended, or none can be started."""

    def __init__(self) -> None:
        self.lock = new_lock("Template")
        self._control, theirs = _pair()
        # A process inherits the mask of the thread that starts it.
        try:
            with theirs, blocked(*STOPPING):
                command = module_command("crawl.readers", theirs.fileno())
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
                )
        except BaseException:
            self._control.close()
            raise

    def copy(self) -> Reader:
        """Another reader, a copy of this process."""
        ours, theirs = _pair()
        try:
            with self.lock:
                socket.send_fds(self._control, [_NUMBER.pack(0)], [theirs.fileno()])
                pid = self._answer()
            return Reader(pid, Connection(ours.detach()))
        finally:
            theirs.close()
            ours.close()

    def reap(self, reader: Reader) -> int:
        """How it ended: its exit code, or the signal's number below 0."""
        reader.pipe.close()
        with self.lock:
            self._control.sendall(_NUMBER.pack(reader.pid))
            return self._answer()

    def _answer(self) -> int:
        data = self._control.recv(_NUMBER.size)
        if len(data) < _NUMBER.size:
            raise OSError("the template has ended")
        number: int = _NUMBER.unpack(data)[0]
        return number

    def end(self, readers: Iterable[Reader]) -> None:
        """Have ``readers`` ended, and it will reap them and end too. Returns at once, also if they stand still."""
        for reader in readers if self.process.poll() is None else ():  # until it reaps them, their numbers are theirs
            with contextlib.suppress(ProcessLookupError):
                os.kill(reader.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        self.end(())
        for patience in (PROMPT, REAP_LIMIT):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                break
            self.process.kill()
        with self.lock:
            self._control.close()
        if self.process.stdin is not None:
            self.process.stdin.close()


class ReadersStats(NamedTuple):
    """Readers at most, those that run, and those that have nothing to do."""

    most: int
    started: int
    idle: int


class Readers:
    """``read(function, body, *more)`` in one of ``count`` processes. For threads."""

    def __init__(self) -> None:
        self.count = max(2, min(MOST, processors()))  # two: a slow document never has the only one
        self._places = Semaphore(self.count)
        self._lock = new_lock("Readers")
        self._template: Template | None = None
        self._idle: list[Reader] = []
        self._readers: set[Reader] = set()
        self._killed = False

    def start(self) -> None:
        """Have the template started: nobody waits for that yet."""
        with self._lock, contextlib.suppress(OSError):
            if self._template is None and not self._killed:
                self._template = Template()

    def read(self, function: Callable[..., Any], body: bytes, *more: Any) -> Any:
        """``function(body, *more)``. Raises FetchError if that takes too much, or cannot be had any more."""
        with self._places:
            reader = self._take()
            seconds, size = bounds(function, len(body))
            try:
                value, error, ends = reader.ask(seconds, size, function, body, *more)
            except (OSError, EOFError) as failure:
                code = self._reap(reader)
                if self._killed:
                    raise FetchError(*_STOPPED) from None
                if code == -signal.SIGPROF:
                    raise FetchError("decode", f"reading it takes more than {seconds:.1f} s") from None
                stuck = isinstance(failure, BlockingIOError)
                why = f"no answer in {STUCK} s" if stuck else how_it_ended(code)
                raise FetchError("decode", f"its reader died: {why}") from None
            except BaseException:
                self._reap(reader)
                raise
            self._give(reader, ends)
        if error is not None:
            raise FetchError(*error.split(": ", 1))
        return value

    def _take(self) -> Reader:
        """An idle reader, or a new one."""
        with self._lock:
            if self._killed:
                raise FetchError(*_STOPPED)
            reader = self._idle.pop() if self._idle else None
        if reader is not None:
            if not reader.pipe.poll():
                return reader
            self._reap(reader)  # nothing was asked: this is its end
        try:
            return self._begin()
        except OSError as error:
            why = _STOPPED if self._killed else ("internal", f"no process to read it: {error.strerror or error}")
            raise FetchError(*why) from None

    def _begin(self) -> Reader:
        """A new reader; if need be, of a new template."""
        for last in (False, True):
            with self._lock:
                if self._killed:
                    raise FetchError(*_STOPPED)
                template = self._template = self._template or Template()
            try:
                reader = template.copy()
            except OSError:
                with self._lock:
                    if self._template is template and not self._killed:
                        self._template = None
                template.close()
                if last:
                    raise
            else:
                with self._lock:
                    self._readers.add(reader)
                    if not self._killed:
                        return reader
                self._reap(reader)
                raise FetchError(*_STOPPED)
        raise AssertionError

    def _reap(self, reader: Reader) -> int:
        with self._lock:
            template = self._template
            self._readers.discard(reader)
        try:
            return template.reap(reader) if template else -signal.SIGKILL
        except OSError:  # it died with its template
            return -signal.SIGKILL

    def _give(self, reader: Reader, ends: bool) -> None:
        if ends:
            self._reap(reader)
            return
        with self._lock:
            self._idle.append(reader)

    def kill(self) -> None:
        """End all readers, now and for good. Returns at once."""
        with self._lock:
            self._killed = True
            if self._template is not None:
                self._template.end(self._readers)

    def close(self) -> None:
        """``kill``; none is left when this returns."""
        self.kill()
        give_up = time.monotonic() + REAP_LIMIT
        taken = sum(self._places.acquire(give_up - time.monotonic()) for _ in range(self.count))
        with self._lock:
            idle, self._idle = self._idle, []
        for reader in idle:
            self._reap(reader)
        with self._lock:
            template, self._template = self._template, None
        for _ in range(taken):
            self._places.release()
        if template is not None:
            template.close()

    def stats(self) -> ReadersStats:
        """The counts of this moment."""
        in_use = self.count - self._places.stats().available
        with self._lock:
            return ReadersStats(self.count, len(self._idle) + in_use, len(self._idle))

    __repr__ = stats_repr


# -------------------------------------------------------------------------------------- the template, and its copies


def used() -> int:
    """Bytes of memory that this process has mapped; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _read(pipe: Connection) -> None:
    """One document after the other, until the other end is closed, or too much memory is kept."""
    most, hard = resource.getrlimit(resource.RLIMIT_AS)
    base = used()
    ends = False
    while not ends:
        seconds, size, function, *args = pickle.loads(pipe.recv_bytes())
        error: str | None = None
        value: Any = None
        if base:
            limit = base + size if most == resource.RLIM_INFINITY else min(most, base + size)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # the signal ends the process, also in the midst of C
        try:
            value = function(*args)
        except MemoryError:
            error = f"decode: reading it takes more than {size / 1_000_000:.0f} MB"
        except BaseException as failure:
            error = f"internal: {type(failure).__name__}: {failure}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        del args
        ends = used() > base + SPARE
        pipe.send_bytes(pickle.dumps((value, error, ends), pickle.HIGHEST_PROTOCOL))
        del value


def _copy(template: int, descriptor: int) -> None:
    """What a copy of the template does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != template:
            return
    with contextlib.suppress(EOFError, OSError):
        _read(Connection(descriptor))


def main() -> None:
    """The process that readers are copies of."""
    end_with(0)  # its other end closes when the program ends
    gc.set_threshold(10_000, 20, 50)
    feed_parsers()
    read_article(b"<html><body><p>The first of all has much imported.</p></body></html>", "http://example.com/")
    gc.collect()
    gc.freeze()  # what copies do not touch they share
    control, me = socket.socket(fileno=int(sys.argv[1])), os.getpid()
    copies: set[int] = set()

    def reap(pid: int) -> int:
        copies.discard(pid)
        os.kill(pid, signal.SIGKILL)  # it may have ended, but its number is its own until here
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    while True:
        order, descriptors, _, _ = socket.recv_fds(control, _NUMBER.size, 1)
        if not order:
            for pid in list(copies):
                reap(pid)
            os._exit(0)
        if descriptors:
            pid = answer = os.fork()
            if pid == 0:
                control.close()
                try:
                    _copy(me, descriptors[0])
                finally:
                    os._exit(0)
            os.close(descriptors[0])
            copies.add(pid)
        else:
            answer = reap(_NUMBER.unpack(order)[0])
        with contextlib.suppress(OSError):  # nobody waits any more
            control.sendall(_NUMBER.pack(answer))
