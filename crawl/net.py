"""Between the crawlers and the wire: time limits, names to addresses, and bodies out of their Content-Encoding.

Promised: a time limit measures the other side: what holds up the process, its interpreter or its event loop counts for
a twentieth of the limit at most, each time. A look-up of a name takes no longer than its caller waits. A body takes no
more memory than its limit, whatever it claims to be. A request that may not go to private addresses is connected to
public ones only: ``allowed`` judges the very addresses that the socket gets, each time that one is opened; such
connections have a pool of their own in both drivers. Not promised: which of several addresses answers; anything of
names that a proxy resolves.

Threads: ``socket.getaddrinfo`` can neither be awaited nor given a time limit, so it runs in daemon threads of the
``Resolver``, which serve both drivers. Decoding runs in the caller's thread, in pieces of 256 KiB, so that an event
loop is never held up by one piece.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import ipaddress
import math
import select
import socket
import ssl
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import brotli

from coordination import Clock, WorkerPool
from crawl.addresses import is_public as is_public
from crawl.errors import FetchError
from crawl.urls import proxy_url
from primitives import RetryPolicy, TokenBucket, TTLCache, retry

try:
    from compression import zstd  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from backports import zstd


# --------------------------------------------------------------------------------------------------- time limits


class TimeLimit:
    """Seconds that another side may take. Whoever waits for it does so in steps of at most ``step`` seconds, a
    twentieth of the limit, and asks in between what is left. A step that took longer counts as one: the rest of it is
    our own, in which other threads had the interpreter, other tasks the loop, or other programs the processor.

    What is left is never more than what is left of ``within``. For one thread or task at a time.
    """

    def __init__(self, seconds: float, within: TimeLimit | None = None, *, clock: Clock = time.monotonic) -> None:
        self.step: float = min(seconds / 20, within.step if within else math.inf)
        self._left, self._within, self._clock = seconds, within, clock
        self._seen = clock()
        self._ours = 0.0

    def left(self) -> float:
        """Seconds, above 0. Raises TimeoutError when nothing is left."""
        now = self._clock()
        passed, self._seen = now - self._seen, now
        self._left -= min(passed, self.step)
        self._ours += max(0.0, passed - self.step)
        if self._left <= 0:
            raise TimeoutError
        return min(self._left, self._within.left()) if self._within else self._left

    def ours(self) -> float:
        """Seconds so far that did not count."""
        return self._ours + max(0.0, self._clock() - self._seen - self.step)

    def skip(self) -> None:
        """What has passed since the last look was no waiting for the other side."""
        self._seen = self._clock()

    def next_step(self) -> float:
        """Seconds to wait before the next look at what is left. Raises TimeoutError when nothing is left."""
        return min(self.left(), self.step)


def readable(sock: Any) -> bool:
    """Whether something has come on ``sock``, or its end. On an idle connection either means that it is of no more use:
    what comes before a request is no answer to it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


# ----------------------------------------------------------------------------------------------- content coding

_PIECE = 1 << 18  # bytes of output that a coding is asked for at a time; brotli may give twice as many
_STEP = 1 << 14
"""Bytes of input that it is given at a time: what a member or frame leaves of them is copied for the next one."""
_MEMBERS = 10_000  # members or frames of a body, of which the empty ones cost time and nothing else


def _count(members: int) -> int:
    if members >= _MEMBERS:
        raise EOFError(f"more than {_MEMBERS:,} members or frames")
    return members + 1


class Gzip:
    """gzip (RFC 1952), several members included; what follows them and begins like none is no part of the body."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS + 16)
        self._begun, self._members = False, 1
        self._head = b""  # what has come of a next member's magic number

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What ``data`` gives, 256 KiB at a time. Raises ``zlib.error``; EOFError for too many members."""
        while data:
            if self._inflate.eof:
                self._head, data = (self._head + data)[:2], self._head + data
                if self._head != b"\x1f\x8b":
                    return
                self._members = _count(self._members)
                self._head, self._inflate = b"", zlib.decompressobj(zlib.MAX_WBITS + 16)
            self._begun = True
            yield from _inflated(self._inflate, data)
            data = self._inflate.unused_data

    def complete(self) -> bool:
        """Whether it does not end within a member."""
        return not self._begun or (self._inflate.eof and self._head != b"\x1f")


class _Deflate:
    """deflate in its zlib wrapper (RFC 1950), as it should be, or without it (RFC 1951), as some servers send it."""

    def __init__(self) -> None:
        self._head = b""
        self._inflate: Any = None

    def pieces(self, data: bytes) -> Iterator[bytes]:
        if self._inflate is None:
            self._head += data
            if len(self._head) < 2:
                return
            data, wrapped = self._head, self._head[0] & 15 == 8 and int.from_bytes(self._head[:2]) % 31 == 0
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)
        if not self._inflate.eof:
            yield from _inflated(self._inflate, data)

    def complete(self) -> bool:
        return self._inflate.eof if self._inflate else not self._head


def _inflated(inflate: Any, data: bytes) -> Iterator[bytes]:
    """All that ``data`` gives: a full piece may leave some in zlib even where no input is left."""
    while True:
        piece = inflate.decompress(data, _PIECE)
        yield piece
        data = inflate.unconsumed_tail
        if inflate.eof or (not data and len(piece) < _PIECE):
            return


class _Brotli:
    """RFC 7932."""

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()
        self._begun = False

    def pieces(self, data: bytes) -> Iterator[bytes]:
        self._begun = True
        yield self._decoder.process(data, output_buffer_limit=_PIECE)
        # can_accept_more_data() is about input only: it may be all read, and output be left.
        while piece := self._decoder.process(b"", output_buffer_limit=_PIECE):
            yield piece

    def complete(self) -> bool:
        return not self._begun or bool(self._decoder.is_finished())


class _Zstandard:
    """RFC 8878: any number of frames, skippable ones too; with the 8 MB window that RFC 9659 sets for HTTP."""

    def __init__(self) -> None:
        self._decoder, self._frames = self._new(), 1
        self._between = True  # between two frames, or before the first one

    @staticmethod
    def _new() -> Any:
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 23})

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._decoder.eof:
                self._decoder, self._frames = self._new(), _count(self._frames)
            self._between = False
            yield self._decoder.decompress(data, _PIECE)
            while not (self._decoder.eof or self._decoder.needs_input):
                yield self._decoder.decompress(b"", _PIECE)
            self._between, data = self._decoder.eof, self._decoder.unused_data

    def complete(self) -> bool:
        return self._between


_CODINGS: dict[str, Callable[[], Gzip | _Deflate | _Brotli | _Zstandard]] = {
    "gzip": Gzip,
    "x-gzip": Gzip,
    "deflate": _Deflate,
    "br": _Brotli,
    "zstd": _Zstandard,
}


class BodyDecoder:
    """Collects a body and undoes its Content-Encoding, piece by piece: a bomb is noticed at the limit, not after it.

    ``feed`` and ``finish`` raise FetchError ``too_large`` (with ``cut`` they keep what is within instead) or
    ``decode``. Never holds more than ``limit`` bytes and two pieces for each coding. What a coding is made to read is
    bounded too, for a frame may hold nothing, and frames of them no end.
    """

    def __init__(
        self, coding: str | None, limit: int, status: int, *, cut: bool = False, length: int | None = None
    ) -> None:
        """Raises FetchError ``too_large`` if the ``length`` that the answer claims (None: none) is."""
        if length is not None and length > limit and not cut:
            raise FetchError("too_large", f"{length} bytes", status=status)
        names = [part.strip().lower() for part in (coding or "").split(",")]
        names = [name for name in names if name not in ("", "identity", "none")]  # the last is wrong, and frequent
        known = len(names) <= 3 and all(name in _CODINGS for name in names)
        self._unknown = None if known else (coding or "")[:60]
        self._stages = [_CODINGS[name]() for name in reversed(names)] if known else []
        self._read = [0] * len(self._stages)
        self.coded = bool(names)
        self._limit, self._status, self._cut = limit, status, cut
        self.full = False  # nothing more is taken
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[None]:
        """Takes ``data`` in steps of some 256 KiB of output: an event loop can do something else in between."""
        if self._unknown is not None and data:  # of an empty body it is all the same
            raise FetchError("decode", f"unknown Content-Encoding {self._unknown!r}", status=self._status)
        if not self.coded:
            self._keep(data)
            return
        try:
            for piece in self._expand(0, data):
                self._keep(piece)
                if self.full:
                    return
                yield
        except (zlib.error, brotli.error, zstd.ZstdError, EOFError) as error:
            raise FetchError("decode", str(error) or type(error).__name__, status=self._status) from None

    def _expand(self, depth: int, data: bytes) -> Iterator[bytes]:
        if depth == len(self._stages):
            yield data
            return
        self._read[depth] += len(data)
        if self._read[depth] > self._limit + _PIECE:  # no coding makes so much more of a body
            if not self._cut:
                raise self._too_large()
            self.full = True
            return
        for start in range(0, len(data), _STEP):
            for piece in self._stages[depth].pieces(data[start : start + _STEP]):
                yield from self._expand(depth + 1, piece)

    def _keep(self, data: bytes) -> None:
        if self.full:
            return
        self._size += len(data)
        if self._size > self._limit:
            if not self._cut:
                raise self._too_large()
            data = data[: len(data) - (self._size - self._limit)]
            self.full = True
        self._parts.append(data)

    def _too_large(self) -> FetchError:
        self._parts.clear()
        return FetchError("too_large", f"more than {self._limit} bytes", status=self._status)

    def finish(self) -> bytes:
        """The body, when all of it has been fed."""
        if not self.full and not all(stage.complete() for stage in self._stages):
            raise FetchError("decode", "the compressed data ends early", status=self._status)
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


# ----------------------------------------------------------------------------------------------- name resolution

Address = tuple[socket.AddressFamily, str]
Lookup = concurrent.futures.Future[list[Address]]

LOOKUPS = 1000  # look-ups in a second, at most: the name server has other users
AGAIN = RetryPolicy(attempts=2, base=0.1, total=1.0)
"""For a name server that failed for the moment, and said so quickly."""
FAILED_FOR = 5.0  # seconds for which a failed look-up is not made again


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN


class Resolver:
    """Host names to addresses: cached, one look-up at a time for a name, and with a time limit.

    ``socket.getaddrinfo`` blocks as long as the system's resolver likes. It runs here in the daemon threads of a
    ``WorkerPool``; whoever waits, thread or task, stops waiting at its own limit, and a look-up that never returns
    keeps nobody from exiting. What is cached is the look-up itself, running or done.
    """

    def __init__(self, *, threads: int = 32, ttl: float = 300.0) -> None:
        self._cache: TTLCache[str, Lookup] = TTLCache(50_000, ttl)
        self._running: set[Lookup] = set()
        self._pool = WorkerPool(self._ask, threads, 1_000_000, name="resolver").start_threads()
        self._pace = TokenBucket(LOOKUPS, LOOKUPS)

    def submit(self, name: str) -> Lookup:
        """The look-up of ``name``, running or done. Fails with FetchError ``dns``."""
        try:
            literal = ipaddress.ip_address(name)
        except ValueError:
            return self._cache.get_or_load(name, lambda: self._begin(name))
        future: Lookup = concurrent.futures.Future()
        future.set_result([(socket.AF_INET if literal.version == 4 else socket.AF_INET6, name)])
        return future

    def _begin(self, name: str) -> Lookup:
        future: Lookup = concurrent.futures.Future()
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        self._pool.submit((name, future), 0)
        return future

    def _ask(self, look_up: tuple[str, Lookup]) -> None:
        name, future = look_up
        self._pace.acquire()
        try:
            found = retry(lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM), on=_may_pass, policy=AGAIN)
        except (OSError, UnicodeError) as error:
            again = _may_pass(error)
            detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._cache.put(name, future, ttl=FAILED_FOR)
            self._settle(future, FetchError("dns", f"{name}: {detail}", retry=again))
        else:
            self._settle(future, list(dict.fromkeys((family, str(where[0])) for family, _, _, _, where in found)))

    @staticmethod
    def _settle(future: Lookup, outcome: list[Address] | FetchError) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # close() was faster
            if isinstance(outcome, FetchError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def lookup(self, name: str, limit: TimeLimit) -> list[Address]:
        """The addresses of ``name``, in the system's order of preference."""
        future = self.submit(name)
        try:
            while not future.done():
                concurrent.futures.wait((future,), limit.next_step())
        except TimeoutError:
            raise FetchError("timeout", f"the name server did not answer for {name}") from None
        return future.result()

    async def lookup_async(self, name: str) -> list[Address]:
        """``lookup`` for a task; the time limit is the caller's."""
        future = self.submit(name)
        if future.done():
            return future.result()
        waited = asyncio.wrap_future(future)
        waited.add_done_callback(lambda done: done.cancelled() or done.exception())  # its task may have left by then
        return await asyncio.shield(waited)

    def close(self) -> None:
        """Let the threads go; look-ups that still run fail at once."""
        self._pool.close(0)
        for future in list(self._running):
            self._settle(future, FetchError("interrupted", "stopped during the look-up of the name"))


def allowed(name: str, addresses: list[Address], *, anywhere: bool) -> list[Address]:
    """Those of the addresses of ``name`` that may be connected to. Raises FetchError ``blocked`` if none may."""
    if anywhere:
        return addresses
    public = [address for address in addresses if is_public(address[1])]
    if addresses and not public:
        raise FetchError("blocked", f"{name} -> {addresses[0][1]}")
    return public


# ------------------------------------------------------------------------------------------ errors, TLS, proxies


def detail(error: BaseException) -> str:
    """An error in one short line."""
    text = (isinstance(error, OSError) and error.strerror) or getattr(error, "message", None) or str(error)
    text = " ".join(str(text).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def tls_detail(error: BaseException) -> str:
    """Why there is no secure connection, in OpenSSL's words."""
    return getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)


def explained(error: Exception, seconds: float, status: int | None = None) -> FetchError:
    """Why an attempt of at most ``seconds`` failed, by what it raised: before its answer, or in the body of one with
    this ``status``."""
    if isinstance(error, FetchError):
        return error
    if isinstance(error, TimeoutError):
        return FetchError("timeout", f"no complete answer within {seconds:g} s", status=status)
    if isinstance(error, ssl.SSLError) and status is None:
        return FetchError("tls", tls_detail(error))
    kind = "protocol" if not isinstance(error, OSError) else "reset" if status is None else "truncated"
    return FetchError(kind, detail(error), status=status)


@functools.cache
def tls_context(insecure: bool) -> ssl.SSLContext:
    """The system's trust, or (``insecure``) any certificate of any name. Made when it is needed: it takes 0.1 s."""
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class ProxyRule:
    """Which proxy a URL goes through: the one named by the user, else the environment's (``http_proxy`` ...).

    ``no_proxy`` is obeyed for both, as urllib's ProxyHandler does.
    """

    def __init__(self, proxy: str | None) -> None:
        """Raises ValueError if a proxy cannot be used: else a run would go past it, or end in as many errors."""
        schemes = ("http", "https")
        found = dict.fromkeys(schemes, proxy) if proxy is not None else urllib.request.getproxies()
        self.proxies: dict[str, str] = {}  # by the scheme of what is asked for
        for scheme in schemes:
            if named := found.get(scheme):
                try:
                    self.proxies[scheme] = proxy_url(named)
                except ValueError as error:
                    raise ValueError(f"the proxy of the environment for {scheme}: {error}") from None

    def find(self, url: str) -> str | None:
        """The proxy of ``url``; None: it is asked for directly."""
        if not self.proxies:
            return None
        parts = urllib.parse.urlsplit(url)
        if urllib.request.proxy_bypass(parts.netloc):
            return None
        return self.proxies.get(parts.scheme)
