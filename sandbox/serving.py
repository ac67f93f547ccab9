"""A server of the sandbox in a thread of its own: `with` it, and it serves.

Promised: after `start` it takes connections; what went wrong before that is raised by `start`, and leaves no thread.
After `stop` no socket, task or thread is left, if what `_serve` left open has ended. Either may be called again.

Threads: all but `start` and `stop`, which are the caller's, runs in the server's event loop. `_loop` is that loop while
it serves, else None; others hand their work to it by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Self


class InThread(ABC):
    """What a server is: its sockets, and what is done with them. `name` is the thread's."""

    name = "sandbox"

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._halted = asyncio.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def _bind(self) -> list[socket.socket]:
        """The sockets. Raises OSError if an address cannot be had."""

    @abstractmethod
    def _serve(self, sockets: Sequence[socket.socket]) -> contextlib.AbstractAsyncContextManager[None]:
        """Serve on them while it is entered, and leave nothing open."""

    def start(self) -> Self:
        """Bind, listen and serve. Raises OSError if an address cannot be had."""
        if self._thread is not None:
            raise RuntimeError(f"{self!r} is running already")
        sockets = self._bind()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(sockets, started), name=self.name, daemon=True)
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Close every connection and wait for the thread. Harmless if nothing runs."""
        loop = self._loop
        if self._thread is not None:
            if loop is not None:
                with contextlib.suppress(RuntimeError):  # it ended by itself
                    loop.call_soon_threadsafe(self._halted.set)
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, sockets: Sequence[socket.socket], started: Future[None]) -> None:
        try:
            asyncio.run(self._until_halted(sockets, started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)
        finally:
            self._loop = None
            for sock in sockets:
                sock.close()

    async def _until_halted(self, sockets: Sequence[socket.socket], started: Future[None]) -> None:
        self._halted = asyncio.Event()
        async with self._serve(sockets):
            self._loop = asyncio.get_running_loop()
            started.set_result(None)
            await self._halted.wait()
            self._loop = None
