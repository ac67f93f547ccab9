"""Lines for standard error: queued, bounded, written by a thread, so that nobody who reads them slowly holds the loop.

Promised: what is lost is counted and said at its place. ``Stderr._news`` guards what waits; it is not held while
anything is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

UNREAD = 256 << 10  # bytes that wait to be written
LAST = 1.0  # seconds that the end of the program waits for them to be read


class Stderr(io.TextIOBase):
    """Text for descriptor ``fd``, written by a thread. ``name`` is the program's, for what is said of lost lines.

    What finds ``UNREAD`` bytes waiting is lost, and all after it until these are written: a loss is one gap.
    """

    def __init__(self, fd: int, name: str, encoding: str = "utf-8") -> None:
        self._fd, self._name, self._encoding = fd, name, encoding
        self._waiting, self._status = bytearray(), b""
        self._full, self._gap, self.lost = False, 0, 0
        self._over = False
        self._news = threading.Condition()  # of an RLock: a warning may be written in the middle of this
        self._thread = threading.Thread(target=self._write_all, name="stderr", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Queue ``text``, or count its lines as lost; returns its length in either case."""
        data = text.encode(self._encoding, "backslashreplace")
        with self._news:
            self._full = self._full or len(self._waiting) + len(data) > UNREAD
            if self._full:
                self._gap += data.count(b"\n")
                self.lost += data.count(b"\n")
            else:
                self._waiting += data
            self._news.notify_all()
        return len(text)

    def status(self, text: str) -> None:
        """Show ``text`` below all lines, in place of the last such text: for a terminal."""
        with self._news:
            self._status = text.encode(self._encoding, "replace")
            self._news.notify_all()

    def finish(self) -> bool:
        """Whether all was written within ``LAST`` seconds. If not, nobody reads, and what comes is never written."""
        with self._news:
            self._over, self._status = True, b""
            self._news.notify_all()
        with contextlib.suppress(KeyboardInterrupt):
            self._thread.join(LAST)
        return not self._thread.is_alive()

    def _ready(self) -> int:
        """How many bytes may be written: the status would be in a line that has not ended."""
        return self._waiting.rfind(b"\n") + 1 if self._status and not self._full else len(self._waiting)

    def _write_all(self) -> None:
        shown = b""
        while True:
            with self._news:
                while not (self._ready() or self._full or self._status != shown):
                    if self._over:
                        return
                    self._news.wait()
                end, status = self._ready(), self._status
                text = bytes(self._waiting[:end])
                del self._waiting[:end]
                if self._full:
                    text += f"{self._name}: {self._gap:,} lines are lost here: they were not read in time\n".encode()
                    self._full, self._gap = False, 0
            above = b"\x1b[%dA" % shown.count(b"\n") if b"\n" in shown else b""
            self._put((b"\r" + above + b"\x1b[J" if shown else b"") + text + status)
            shown = status

    def _put(self, data: bytes) -> None:
        while data:
            end = data.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF  # whole, beside those of other processes
            try:
                select.select((), (self._fd,), ())  # somebody may have made it one that does not block
                data = data[os.write(self._fd, data[:end]) :]
            except BlockingIOError:
                continue
            except OSError:  # nobody will ever read it
                with self._news:
                    self.lost += data.count(b"\n")
                return

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def writable(self) -> bool:
        """True."""
        return True


_stderr: Stderr | None = None


def queue_stderr(name: str) -> Callable[[], None]:
    """Have ``sys.stderr``, and what the log writes there, go through ``Stderr``; not if it has no descriptor.

    Returns a function for the end, which waits for what is not written yet."""
    global _stderr
    before = sys.stderr
    try:
        fd = before.fileno()
    except (AttributeError, OSError, ValueError):
        return lambda: None
    before.flush()
    ours = _stderr = Stderr(fd, name, before.encoding)
    _redirect(before, ours)

    def finish() -> None:
        if ours.finish():
            _redirect(ours, before)

    return finish


def _redirect(old: Any, new: Any) -> None:
    if sys.stderr is old:
        sys.stderr = new
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def say(name: str, text: object) -> None:
    """Write a line of program ``name`` to stderr."""
    print(f"{name}: {text}", file=sys.stderr)


@contextlib.contextmanager
def status_shown(picture: Callable[[], str], every: float, stays: bool = False) -> Iterator[None]:
    """Show ``picture()`` on the terminal below the log's lines, anew ``every`` so many seconds, while it is entered; a
    thread draws. No line of it may be too long. The last one ``stays``, or none."""
    over = threading.Event()
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")

    def show() -> None:
        while not over.wait(every):
            if not dumb and _stderr is not None:
                _stderr.status("\n".join(picture().splitlines()[: terminal_size().lines - 1]))
        if _stderr is not None:
            _stderr.status("")
        if stays:
            print(picture(), file=sys.stderr)

    thread = threading.Thread(target=show, name="screen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2.0)


def terminal_size() -> os.terminal_size:
    """The size of the terminal that stderr is; 80 columns and 24 lines if it does not say."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        size = os.get_terminal_size(sys.stderr.fileno())
        if size.columns and size.lines:
            return size
    return os.terminal_size((80, 24))


def lines_lost() -> int:
    """Lines for standard error that were not written: nobody read those before."""
    return 0 if _stderr is None else _stderr.lost
