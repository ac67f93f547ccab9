"""The server of `bench models`, in a process of its own: `bench/models_server.py PORT`.

A raw protocol on 50 loopback addresses: ``GET /SECONDS/anything`` is answered so much later, on a connection that is
kept. It counts how many requests wait in it at once, because a model that is told to have 10,000 in flight need not
have them.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys
from typing import cast

from bench.measure import host_address

HOSTS = 50
BODY = b"<!doctype html><title>Late</title><p>One <a href=/>link</a>."
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


def allow_files() -> tuple[int, int]:
    """Raise the limit of open files as far as it goes: what it was, and what it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Count:
    """How many requests wait in the server, and the most since that was asked for."""

    def __init__(self) -> None:
        self.now = self.most = 0


class Late(asyncio.Protocol):
    """A connection. ``/SECONDS/...`` is answered with a page so much later, ``/most`` at once, others are cut."""

    def __init__(self, count: Count) -> None:
        self._count, self._rest = count, b""
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        *heads, self._rest = (self._rest + data).split(b"\r\n\r\n")
        for head in heads:
            words = head.split(b" ", 2)
            path = words[1] if len(words) == 3 else b""
            if path == b"/most":
                most, self._count.most = b"%d" % self._count.most, self._count.now
                self._write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(most), most))
                continue
            try:
                latency = float(path.split(b"/")[1])
            except (IndexError, ValueError):
                if self._transport is not None:
                    self._transport.abort()
                return
            self._count.now += 1
            self._count.most = max(self._count.most, self._count.now)
            self._loop.call_later(latency, self._answer)

    def _answer(self) -> None:
        self._count.now -= 1
        self._write(ANSWER)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def serve(port: int) -> None:
    """The server, until SIGTERM. It says "ready" when it listens."""
    from runtime.loop import new_loop

    async def forever() -> None:
        count, addresses = Count(), [host_address(number) for number in range(HOSTS)]
        await asyncio.get_running_loop().create_server(lambda: Late(count), addresses, port, backlog=4096)
        print("ready", flush=True)
        await asyncio.Event().wait()

    allow_files()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(forever())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
