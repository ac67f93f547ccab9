"""Batches on disk, for the time that the database is away: a folder with a file for each, in the order of arrival.

A file is a line of JSON (id, rows, received_at, bytes, crc32) and the batch's lines. It is written as ``.part`` and
renamed, so a file with its right name was complete when it got it. The checksum covers both; what is not exactly as it
was written is set aside as ``.bad``, and counted.

Promised
- What ``put`` has taken survives ``kill -9`` at once, and a power cut ``fsync_every`` seconds later (0: at
  once). The files come back in the order of their ``put``, until ``remove``.
- ``max_bytes`` are never passed. A ``put`` for which there is no room, or that the disk refuses, answers None and
  leaves nothing behind.
- One process has a folder: another one's ``open`` raises ``SpoolInUse``.

Not promised: anything about a folder on a network file system without locks; that a file which was removed stays so in
a power cut (the id of its batch makes the second time harmless).

Where what runs: ``open`` blocks, for it reads everything once. All other work with files is done by one thread, in the
order in which it was asked for; what is known of the files changes in the event loop only. There is no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import itertools
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar
from uuid import UUID

from coordination import Clock, cancel_all, stats_repr

T = TypeVar("T")

log = logging.getLogger("uvicorn.error")

LONGEST_HEADER = 300  # bytes of the first line
_PASSES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_NAME = re.compile(r"\d{16}\.batch", re.A)
_NUMBER = re.compile(r"0\d{15}(?=\.)", re.A)  # of a file that this program named: no rubbish may use the numbers up


class EncodedBatch(NamedTuple):
    """A batch as it is written, spooled and replayed: unchanged."""

    id: UUID
    rows: int
    received_at: float  # of the oldest row, in seconds since 1970
    data: bytes  # a line for each row, each with its line end


class SpoolInUse(OSError):
    """Another process has the folder."""


class Damaged(ValueError):
    """A file is not as it was written."""


class SpoolStats(NamedTuple):
    """What is in the folder, and counts since it was opened."""

    batches: int  # in the folder; so are the next two
    rows: int
    bytes: int
    recovered: int  # rows that a previous life left
    bad: int  # files that were not as they had been written
    lost: int  # rows that were in the folder, and could not be read when their turn came
    refused: int  # batches that found no room, or that the disk did not take
    unsynced: int  # files that a power cut may take
    errors: int  # times that the disk refused anything else


class _File(NamedTuple):
    rows: int
    size: int


# ------------------------------------------------------------------------------------------------------------ one file


def header(batch: EncodedBatch) -> bytes:
    """The first line of the file of ``batch``, with its line end."""
    fields = {"id": str(batch.id), "rows": batch.rows, "received_at": batch.received_at, "bytes": len(batch.data)}
    crc = zlib.crc32(batch.data, zlib.crc32(json.dumps(fields).encode()))
    return json.dumps({**fields, "crc32": f"{crc:08x}"}).encode() + b"\n"


def decoded(line: bytes, data: bytes) -> EncodedBatch:
    """The batch of a file. ``Damaged`` if these are not exactly the bytes that were written."""
    try:
        fields = json.loads(line)
        batch = EncodedBatch(UUID(fields["id"]), fields["rows"], fields["received_at"], data)
        if header(batch) == line and data.count(b"\n") == batch.rows:
            return batch
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise Damaged("not as it was written")


def read(path: Path) -> EncodedBatch:
    """The batch in a file. ``Damaged``, ``OSError``."""
    with open(path, "rb") as file:
        line = file.readline(LONGEST_HEADER)
        with contextlib.suppress(ValueError, TypeError, LookupError):  # a file of another's may be of any size
            if len(line) + json.loads(line)["bytes"] == os.fstat(file.fileno()).st_size:
                return decoded(line, file.read())
    raise Damaged("not as it was written")


# ----------------------------------------------------------------------------------------------------------- the folder


class Spool:
    """Batches in ``folder``, at most ``max_bytes`` of them; made safe every ``fsync_every`` seconds (0: each at once).

    ``open`` first, ``close`` at the end. All else is for one event loop; any number of its tasks.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int = 1 << 30, fsync_every: float = 1.0, clock: Clock = time.monotonic
    ) -> None:
        self.folder, self.max_bytes, self.fsync_every = folder, max_bytes, fsync_every
        self._clock = clock
        self._files: dict[str, _File] = {}  # in their order, which is that of their names
        self._next = 0
        self._bytes = self._rows = self._recovered = self._bad = self._lost = self._refused = self._errors = 0
        self._coming = 0  # bytes of what is being written
        self._unsynced: dict[str, None] = {}
        self._unsynced_since = 0.0
        self._timer: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[str | None]] = set()
        self._lock_file: int | None = None
        self._thread: ThreadPoolExecutor | None = None

    def open(self) -> int:
        """Take over what a previous life left. How many rows that is. Raises ``SpoolInUse``, ``OSError``.

        Blocks, about a second for each GiB.
        """
        if self._lock_file is not None:
            raise RuntimeError("the spool is open")
        self._files.clear()
        self._rows = self._bytes = self._bad = self._errors = 0
        self.folder.mkdir(0o700, parents=True, exist_ok=True)  # logs are not for everybody
        lock_file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SpoolInUse(f"{self.folder} is in use by another process") from None
            for path in sorted(self.folder.iterdir()):
                self._take_over(path)
        except BaseException:
            os.close(lock_file)
            raise
        self._lock_file = lock_file
        self._recovered = self._rows
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        return self._recovered

    def _take_over(self, path: Path) -> None:
        if path.name.endswith(".part"):
            with contextlib.suppress(OSError):
                path.unlink()
        if number := _NUMBER.match(path.name):  # also that of a bad one: its name is taken
            self._next = max(self._next, int(number[0]) + 1)
        if not path.name.endswith(".batch"):
            return
        try:
            if not _NAME.fullmatch(path.name):
                raise Damaged("no name of ours")
            batch = read(path)
            self._add(path.name, _File(batch.rows, path.stat().st_size))
        except Damaged as error:
            self._set_aside(path, error)
        except OSError as error:  # the next life may be able to read it
            self._errors += 1
            log.warning("spool: %s: %s", path, error)

    def _set_aside(self, path: Path, error: Exception) -> None:
        log.warning("spool: %s: %s", path, error)
        self._bad += 1
        with contextlib.suppress(OSError):
            path.rename(f"{path}.bad")

    def _add(self, name: str, file: _File) -> None:
        self._files[name] = file
        self._rows += file.rows
        self._bytes += file.size

    def _drop(self, name: str) -> _File | None:
        file = self._files.pop(name, None)
        if file is not None:
            self._rows -= file.rows
            self._bytes -= file.size
        return file

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise RuntimeError("the spool is not open")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # ----------------------------------------------------------------------------------------------------------- verbs

    async def put(self, batch: EncodedBatch) -> str | None:
        """Write ``batch`` to the end. The name of its file; None if there is no room, or the disk refuses.

        Cancelled, it goes on nevertheless, and the batch may be there: ``stats`` counts it then, and its id tells.
        """
        task = asyncio.create_task(self._put(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _put(self, batch: EncodedBatch) -> str | None:
        line = header(batch)
        size = len(line) + len(batch.data)
        if self._bytes + self._coming + size > self.max_bytes or len(line) > LONGEST_HEADER:
            self._refused += 1
            return None
        name = f"{self._next:016d}.batch"
        self._next += 1
        self._coming += size
        try:
            await self._in_thread(lambda: self._write(name, line, batch.data))
        except OSError as error:
            self._refused += 1
            log.warning("spool: %s", error)
            return None
        finally:
            self._coming -= size
        self._add(name, _File(batch.rows, size))
        if self.fsync_every > 0:
            await self._note_unsynced(name)
        return name

    def _write(self, name: str, line: bytes, data: bytes) -> None:
        path = self.folder / name
        part = path.with_suffix(".part")
        try:
            with open(part, "wb", buffering=0) as file:
                for text in (line, data):
                    rest = memoryview(text)
                    while rest:
                        rest = rest[file.write(rest) :]
                if self.fsync_every <= 0:
                    os.fsync(file.fileno())
            part.rename(path)
            if self.fsync_every <= 0:
                self._sync_file(self.folder)
        except BaseException:
            for each in (part, path):
                with contextlib.suppress(OSError):
                    each.unlink()
            raise

    async def first(self, n: int, skip: int = 0) -> list[tuple[str, EncodedBatch]]:
        """The oldest but ``skip``, at most ``n``, in their order; none only if there are none. They stay until
        ``remove``.

        What cannot be read any more is set aside; its rows are lost, and counted. Raises ``OSError`` if the process has
        no files or memory left: that is not the file's fault.
        """
        while names := list(itertools.islice(self._files, skip, skip + n)):
            results = await self._in_thread(functools.partial(self._read, names))
            found = []
            for name, result in zip(names, results, strict=True):
                if isinstance(result, EncodedBatch):
                    found.append((name, result))
                elif (file := self._drop(name)) is not None:
                    self._lost += file.rows
                    self._set_aside(self.folder / name, result)
            if found:
                return found
        return []

    def _read(self, names: Sequence[str]) -> list[EncodedBatch | Exception]:
        results = list[EncodedBatch | Exception]()
        for name in names:
            try:
                results.append(read(self.folder / name))
            except (Damaged, OSError) as error:
                if isinstance(error, OSError) and error.errno in _PASSES:
                    raise
                results.append(error)
        return results

    async def remove(self, names: Iterable[str]) -> None:
        """Forget them: they are where they were to go. Those that are not there are passed over."""
        known = [name for name in names if self._drop(name) is not None]
        for name in known:
            self._unsynced.pop(name, None)
        self._errors += await asyncio.shield(self._in_thread(functools.partial(self._unlink, known)))

    def _unlink(self, names: Sequence[str]) -> int:
        failed = 0
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:  # the next life finds it, and writes it again: its id makes that harmless
                failed += 1
                log.warning("spool: %s", error)
        return failed

    # ------------------------------------------------------------------------------------------------------------ disk

    async def _note_unsynced(self, name: str) -> None:
        now = self._clock()
        if not self._unsynced:
            self._unsynced_since = now
        self._unsynced[name] = None
        if now - self._unsynced_since >= self.fsync_every:
            await self.sync()
        elif self._timer is None:
            self._timer = asyncio.create_task(self._sync_later())

    async def _sync_later(self) -> None:
        while self._unsynced:
            await asyncio.sleep(self.fsync_every)
            await self.sync()
        self._timer = None

    async def sync(self) -> None:
        """Make safe against a power cut what has been written so far. Errors are counted."""
        names = list(self._unsynced)
        if not names:
            return
        self._unsynced_since = self._clock()
        self._errors += await asyncio.to_thread(self._sync, names)
        for name in names:
            self._unsynced.pop(name, None)

    def _sync(self, names: Sequence[str]) -> int:
        failed = 0
        for path in (*(self.folder / name for name in names), self.folder):
            try:
                self._sync_file(path)
            except FileNotFoundError:  # removed since
                continue
            except OSError as error:
                failed += 1
                log.warning("spool: %s: %s", path, error)
        return failed

    def _sync_file(self, path: Path) -> None:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)

    async def close(self) -> None:
        """Wait for what is under way, make all safe, and let the folder go. What is in it stays."""
        if self._thread is None:
            return
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._timer is not None:
            await cancel_all([self._timer])
            self._timer = None
        await self.sync()
        thread, self._thread = self._thread, None
        await asyncio.to_thread(thread.shutdown)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def stats(self) -> SpoolStats:
        """The counts of this moment."""
        there, unsynced = (len(self._files), self._rows, self._bytes), len(self._unsynced)
        return SpoolStats(*there, self._recovered, self._bad, self._lost, self._refused, unsynced, self._errors)

    __repr__ = stats_repr
