"""Rows on their way out: JSON lines, JSON or CSV, to a file or a pipe.

Promised: a row is one piece in the output, and written when ``Output.emit`` returns, so a ``kill -9`` costs only what
is in flight. What cannot be written ends the run. No cell of a CSV is taken for a formula.

Threads: any may emit; one of them writes for those that came meanwhile. ``Output._lock`` guards who writes, and what
others have left; it is not held while writing. ``RowBatches`` belongs to an event loop and has one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import dataclasses
import io
import json
import re
import resource
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import BinaryIO, Protocol

import orjson

from coordination import WorkerPool, new_lock
from crawl.core import Crawl
from crawl.model import ScrapeResult
from primitives import Batch
from runtime.loop import Lag, beside, new_loop, stopped_by_signals

Emit = Callable[..., None]  # takes rows; returns when they are written
Run = Callable[[Crawl, Iterable[str], Emit], None]  # crawls a list in this process, with signals
MakeDriver = Callable[[Crawl, Callable[[ScrapeResult], Awaitable[object]]], "LoopDriver"]
FIELDS = [field.name for field in dataclasses.fields(ScrapeResult)]


def encode_json(row: ScrapeResult) -> bytes:
    """A row as JSON, in UTF-8."""
    try:
        return orjson.dumps(row)
    except TypeError:  # half a surrogate pair, in what the caller gave as a URL: no reader of UTF-8 would take it
        text = json.dumps(dataclasses.asdict(row), ensure_ascii=False, separators=(",", ":"))
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


def encode_csv(cells: Iterable[object]) -> bytes:
    """A line of CSV (RFC 4180), which no spreadsheet takes for a formula."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(map(cell, cells))
    return line.getvalue().encode("utf-8", "replace")


def cell(value: object) -> object:
    """A value as a table has it: URLs separated by spaces, what has a structure of its own as JSON; no text that a
    spreadsheet takes for a formula (OWASP, "CSV Injection")."""
    if isinstance(value, list):
        value = " ".join(value) if all(isinstance(item, str) for item in value) else orjson.dumps(value).decode()
    return "'" + value if isinstance(value, str) and value.startswith(tuple("=+-@\t\r\n")) else value


class RowWriter:
    """Rows as ``jsonl``, ``json`` (one array) or ``csv`` (RFC 4180, with a header; links separated by spaces)."""

    def __init__(self, stream: BinaryIO, form: str, row: type[ScrapeResult] = ScrapeResult) -> None:
        self._stream, self.form = stream, form
        self._rows = 0
        self._fields = [field.name for field in dataclasses.fields(row)]
        if form == "csv":
            self._write(encode_csv(self._fields))

    def write(self, *rows: ScrapeResult) -> None:
        """All of them in one write, so that a thread with many rows gives up the interpreter once."""
        self._write(b"".join(map(self.encode, rows)))

    def encode(self, row: ScrapeResult) -> bytes:
        """A row in the form of the output, with what stands before it."""
        first, self._rows = not self._rows, self._rows + 1
        if self.form == "csv":
            return encode_csv(getattr(row, name) for name in self._fields)
        if self.form == "json":
            return (b"[\n" if first else b",\n") + encode_json(row)
        return encode_json(row) + b"\n"

    def close(self) -> None:
        """Write what ends the output."""
        if self.form == "json":
            self._write(b"\n]\n" if self._rows else b"[]\n")

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) or 0 :]


class Output:
    """Where the rows of a run go: counted, written, and, should writing fail, the run stopped. Safe for threads.

    Group commit, as databases do it: who comes while another thread writes leaves its rows, and one of those who left
    some then writes them all in one go. ``emit`` returns when its rows are written, so a ``kill -9`` costs only what is
    in flight. ``_lock`` guards who writes and what is left; rows wait with those who brought them, so they are few.
    """

    def __init__(self, crawl: Crawl, writer: RowWriter) -> None:
        self._crawl, self.writer = crawl, writer
        self._lock = new_lock("Output")
        self._written = threading.Condition(self._lock)
        self._left: list[ScrapeResult] = []
        self._writing = False
        self._batches = 0

    def emit(self, *rows: ScrapeResult) -> None:
        """Returns when ``rows`` are written, or cannot be."""
        with self._lock:
            self._left += rows
            mine = self._batches + 1 + self._writing
            while self._writing and self._batches < mine:
                self._written.wait()
            if self._batches >= mine:
                return
            self._writing = True
            batch, self._left = self._left, []
        try:
            self._write(batch)
        finally:
            with self._lock:
                self._writing = False
                self._batches += 1
                self._written.notify_all()

    def _write(self, rows: list[ScrapeResult]) -> None:
        if self._crawl.failure is not None:
            return
        try:
            self.writer.write(*rows)
        except Exception as error:
            self._crawl.fail(error)
            return
        for row in rows:
            self._crawl.stats.count_row(row)

    def close(self) -> None:
        """End the output. What fails is an error of the crawl."""
        if not isinstance(self._crawl.failure, OSError):
            try:
                self.writer.close()
            except OSError as error:
                self._crawl.fail(error)


class RowBatches:
    """The way of the rows out of an event loop, to a thread that writes them: in batches, since each hand-over makes
    two threads contend for the interpreter. A batch goes when it is full, or ``AGE`` seconds after its first row. The
    permits of its tasks go with it and come back when it is written, so what a ``kill -9`` costs is no more than is in
    flight: a batch is a quarter of that."""

    SIZE, AGE, QUEUED = 100, 0.05, 10

    def __init__(self, emit: Callable[..., None], concurrency: int = 4 * SIZE) -> None:
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._batch: Batch[ScrapeResult] = Batch(max(1, min(self.SIZE, concurrency // 4)), self.AGE)
        self._unsent: list[ScrapeResult] = []  # a batch whose task was cancelled meanwhile
        self._watched = False
        self._writer = WorkerPool(self._write, 1, self.QUEUED, name="writer").start_threads()
        self.written: Callable[[int], None] = lambda rows: None
        """Told, in the loop, how many rows were written (or cannot be)."""

    def _write(self, batch: list[ScrapeResult]) -> None:
        self._emit(*batch)
        self._loop.call_soon_threadsafe(self.written, len(batch))

    async def put(self, row: ScrapeResult) -> bool:
        """Take ``row``: True. Waits while the writer is far behind."""
        rows = self._batch.add(row)
        if rows is not None:
            try:
                await self._writer.submit_async(rows)
            except BaseException:
                self._unsent += rows
                raise
        elif not self._watched:
            self._watch()
        return True

    def _watch(self) -> None:
        self._watched = True
        self._loop.call_later(self._batch.due_in() or self.AGE, self._look)

    def _look(self) -> None:
        """Whether the batch is too old. While the writer is busy it may grow until it is full."""
        self._watched = False
        if self._writer.stats().queued < self.QUEUED and (rows := self._batch.take()):
            self._writer.submit(rows, 0)
        elif len(self._batch):
            self._watch()

    async def close(self) -> None:
        """Every row that was put is written when this returns."""
        self._unsent += self._batch.drain()
        if self._unsent:
            await self._writer.submit_async(self._unsent)
            self._unsent = []
        await asyncio.to_thread(self._writer.close)


class LoopDriver(Protocol):
    """What crawls, in an event loop."""

    async def run(self, urls: Iterable[str], /) -> None:
        """Crawl ``urls`` to the end."""

    def stop(self) -> None:
        """The first call: begin nothing more. The second: cut off what is under way."""

    def give_back(self, rows: int, /) -> None:
        """So many of the rows that it emitted are written."""


async def _run(crawl: Crawl, urls: Iterable[str], emit: Emit, make_driver: MakeDriver) -> None:
    rows, lag = RowBatches(emit, crawl.options.concurrency), Lag()
    crawl.loop_lags = lag.recent
    with contextlib.ExitStack() as stack:
        try:
            async with beside(lag.watch(), "loop lag"), crawl.joined(rows.put) as put:
                driver = make_driver(crawl, put)
                if put == rows.put:
                    rows.written = driver.give_back
                stack.enter_context(stopped_by_signals(driver.stop))
                await driver.run(urls)
        finally:
            await rows.close()


def run_in_loop(crawl: Crawl, urls: Iterable[str], emit: Emit, make_driver: MakeDriver) -> None:
    """The crawl of the command line in an event loop, with signals. ``make_driver`` is called there."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_run(crawl, urls, emit, make_driver))


def peak_memory_mb() -> float:
    """The largest resident size of this process. On Linux ``ru_maxrss`` begins with that of whoever started it."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
