"""The HTTP client of the crawler on threads: urllib, with kept connections and one deadline for each request.

A blocking socket's time limit holds for one system call, so a server that drips a byte a second would never meet it.
``_DeadlineSocket`` gives every call only what is left of the attempt, by a ``TimeLimit``.

Everything runs in the calling thread, but DNS, which does in the resolver's. ``_Pool._lock`` guards the idle
connections and the set of those in use.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import math
import os
import select
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from coordination import new_lock
from crawl.addresses import may_go_anywhere
from crawl.core import Crawl, patience
from crawl.errors import CUT_OFF, FetchError
from crawl.headers import read_headers
from crawl.model import Request, Response
from crawl.net import BodyDecoder, ProxyRule, Resolver, TimeLimit, allowed, detail, explained, tls_context, tls_detail

IDLE = 256  # connections kept open for a next request to their host: a list often goes round many hosts


class _DeadlineSocket:
    """A socket whose every call ends, with TimeoutError, when ``limit`` does; what http.client needs of one.

    The socket itself does not block, and poll waits: a time limit set on a socket would cost three system calls more
    a request, each of which gives the interpreter to another thread and waits to get it back.
    """

    def __init__(self, sock: socket.socket, limit: TimeLimit) -> None:
        self.limit = limit
        self.dry = False  # answer "nothing there" instead of reading on
        self.ended = False
        self._readers = 0
        self._closed = False
        self.use(sock)

    def use(self, sock: socket.socket) -> None:
        self.sock: Any = sock
        sock.setblocking(False)
        self._decrypted: Callable[[], int] | None = getattr(sock, "pending", None)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self.sock, event)
        while not poll.poll(self.limit.next_step() * 1000):
            pass

    def connect(self, address: tuple[str, int]) -> None:
        try:
            self.sock.connect(address)
        except BlockingIOError:
            self._wait(select.POLLOUT)
            if error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error)) from None

    def _complete(self, call: Callable[..., int], *args: Any, event: int = select.POLLIN) -> int:
        """What ``call`` returns when it need not wait; ``event``: what it waits for, where TLS wants nothing else."""
        while True:
            try:
                return call(*args)
            except BlockingIOError:
                self._wait(event)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def handshake(self) -> None:
        self._complete(self.sock.do_handshake)

    def sendall(self, data: Any) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._complete(self.sock.send, rest, event=select.POLLOUT) :]

    def recv_into(self, buffer: Any) -> int:
        if not (self._decrypted and self._decrypted()):
            self._wait(select.POLLIN)
        return self._complete(self.sock.recv_into, buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        self._readers += 1
        return io.BufferedReader(_SocketReader(self), 1 << 16)

    def reader_closed(self) -> None:
        self._readers -= 1
        if self._closed and not self._readers:
            self.sock.close()

    def close(self) -> None:
        # http.client closes a connection that ends with its answer before the answer's body is read.
        self._closed = True
        if not self._readers:
            self.sock.close()

    def readable(self) -> bool:
        """Something has come, or the end. On an idle connection either means that it cannot be used again."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))


class _SocketReader(io.RawIOBase):
    def __init__(self, sock: _DeadlineSocket) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._sock.dry:
            return None
        received = self._sock.recv_into(buffer)
        self._sock.ended = not received
        return received

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._sock.reader_closed()


class _Response(http.client.HTTPResponse):
    """http.client's answer, stricter with chunks, and with its connection given back as soon as it is read."""

    release: Callable[[bool], None] | None = None  # told once whether the connection can be used again
    wire: _DeadlineSocket

    def _read_status(self) -> tuple[str, int, str]:
        # http.client skips 100 only; RFC 9110, section 15.2: any number of interim answers may come.
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == 101:
                return version, status, reason
            http.client.parse_headers(self.fp)

    def _read_next_chunk_size(self) -> int:
        line = self.fp.readline(1000)
        if not line.endswith(b"\n"):
            raise FetchError("protocol" if len(line) == 1000 else "truncated", "in a chunk", status=self.status)
        digits = line.partition(b";")[0].strip()
        if not digits or digits.strip(b"0123456789abcdefABCDEF") or len(digits) > 16:
            raise FetchError("protocol", f"not a chunk size: {digits[:20]!r}", status=self.status)
        return int(digits, 16)

    def _close_conn(self) -> None:
        # http.client comes here when the body is complete, and from close(). What has come already beyond the body
        # belongs to no request: such a connection is not used again.
        fp, release, self.release = self.fp, self.release, None
        usable = False
        if release and not self.will_close:
            self.wire.dry = True
            usable = not fp.peek(1)
            self.wire.dry = False
        super()._close_conn()  # type: ignore[misc]
        if release:
            release(usable)

    def close(self) -> None:
        self.will_close = self.will_close or not self.isclosed()
        super().close()


_Key = tuple[str, str, str | None, bool]
"""Scheme, host and port, the host behind a proxy's tunnel, and whether it was opened without a look at its address."""


class _Connection(http.client.HTTPConnection):
    response_class = _Response
    auto_open = 0
    sock: Any


class _SecureConnection(_Connection):
    default_port = 443


class _Pool:
    """The open connections: idle ones by origin, newest first; those in use, so that they can be cut off.

    ``_lock`` guards both. At most ``idle`` connections are kept; the longest idle one goes first.
    """

    def __init__(self, idle: int) -> None:
        self._limit = idle
        self._lock = new_lock("Pool")
        self._idle: dict[_Connection, _Key] = {}
        self._by_key: dict[_Key, list[_Connection]] = {}
        self._in_use: set[socket.socket] = set()
        self.aborted = False

    def take(self, key: _Key) -> _Connection | None:
        """An idle connection that is still good, or None."""
        while True:
            with self._lock:
                connections = self._by_key.get(key)
                if not connections:
                    return None
                connection = connections[-1]
                self._forget(connection)
                self._in_use.add(connection.sock.sock)
            if not connection.sock.readable():
                return connection
            self.unwatch(connection.sock.sock)
            connection.close()

    def give(self, key: _Key, connection: _Connection, sock: socket.socket, usable: bool) -> None:
        oldest = None
        with self._lock:
            self._in_use.discard(sock)
            if usable and not self.aborted:
                self._idle[connection] = key
                self._by_key.setdefault(key, []).append(connection)
                if len(self._idle) > self._limit:
                    oldest = next(iter(self._idle))
                    self._forget(oldest)
        if oldest:
            oldest.close()
        if not usable or self.aborted:
            connection.close()

    def _forget(self, connection: _Connection) -> None:
        key = self._idle.pop(connection)
        self._by_key[key].remove(connection)
        if not self._by_key[key]:
            del self._by_key[key]

    def watch(self, sock: socket.socket) -> None:
        with self._lock:
            if self.aborted:
                sock.close()
                raise OSError("stopped")
            self._in_use.add(sock)

    def unwatch(self, sock: socket.socket) -> None:
        with self._lock:
            self._in_use.discard(sock)

    def close(self) -> None:
        with self._lock:
            idle, self._idle, self._by_key = list(self._idle), {}, {}
        for connection in idle:
            connection.close()

    def abort(self) -> None:
        """Cut off every connection in use: whoever waits for it wakes up with an error."""
        with self._lock:
            self.aborted = True
            for sock in self._in_use:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class _Call(urllib.request.Request):
    """A request with what ``_KeepAliveHandler`` needs to know."""

    anywhere: bool
    limit: TimeLimit
    connect_limit: TimeLimit
    before_send: Callable[[], None]  # called when the connection is open, right before the request goes out
    _tunnel_host: str | None


class _KeepAliveHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Keep-alive for urllib's opener, in which proxies and authentication go on as they do.

    Unless a call may go ``anywhere``, or goes to a proxy, it is connected to public addresses only. A kept connection
    that the server closed while it was idle is replaced once (RFC 9112, section 9.3.1). Raises FetchError of kind dns,
    blocked, connect, tls.
    """

    def __init__(self, pool: _Pool, resolver: Resolver, *, insecure: bool) -> None:
        urllib.request.HTTPHandler.__init__(self)
        self._pool, self._resolver, self._insecure = pool, resolver, insecure

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        assert isinstance(req, _Call)
        tunnel = req._tunnel_host
        anywhere = bool(tunnel or req.has_proxy() or req.anywhere)
        key = (req.type, req.host, tunnel, anywhere)
        headers = {**req.headers, **req.unredirected_hdrs}
        headers.setdefault("Connection", "keep-alive")
        proxy_headers = {name: headers.pop(name) for name in list(headers) if tunnel and name == "Proxy-authorization"}
        while True:
            connection = self._pool.take(key)
            kept = connection is not None
            if connection is None:
                connection = self._connect(key, proxy_headers, req.connect_limit)
            wire = connection.sock
            wire.limit = req.limit
            try:
                req.before_send()
                connection.request(req.get_method(), req.selector, req.data, headers)
                response = connection.getresponse()
            except ConnectionError:
                self._pool.give(key, connection, wire.sock, False)
                # A kept connection may have been closed, or be closing, when the request reached it.
                if not (kept and req.get_method() in ("GET", "HEAD")) or self._pool.aborted:
                    raise
                continue
            except BaseException:
                self._pool.give(key, connection, wire.sock, False)
                raise
            assert isinstance(response, _Response)
            if wire.ended:  # http.client takes the end of the stream for the end of the head
                response.close()
                self._pool.give(key, connection, wire.sock, False)
                raise FetchError("truncated", "in the head")
            response.url, response.msg = req.full_url, response.reason  # type: ignore[assignment]
            if response.isclosed():
                self._pool.give(key, connection, wire.sock, not response.will_close)
            else:
                response.wire = wire
                response.release = functools.partial(self._pool.give, key, connection, wire.sock)
            return response

    https_open = http_open

    def _connect(self, key: _Key, proxy_headers: dict[str, str], limit: TimeLimit) -> _Connection:
        scheme, authority, tunnel, anywhere = key
        connection = (_SecureConnection if scheme == "https" and not tunnel else _Connection)(authority)
        server = connection.host
        if tunnel:
            parts = urllib.parse.urlsplit(f"//{tunnel}")
            server = parts.hostname or ""
            connection.set_tunnel(f"[{server}]" if ":" in server else server, parts.port or 443, proxy_headers)
        wire = connection.sock = self._dial(connection.host, connection.port, limit, anywhere=anywhere)
        try:
            if tunnel:
                connection._tunnel()  # type: ignore[attr-defined]
            if scheme == "https":
                plain, context = wire.sock, tls_context(self._insecure)
                try:
                    wire.use(context.wrap_socket(plain, server_hostname=server, do_handshake_on_connect=False))
                    self._pool.unwatch(plain)
                    self._pool.watch(wire.sock)
                    wire.handshake()
                except (ssl.SSLError, ValueError) as error:
                    raise FetchError("tls", tls_detail(error)) from None
        except BaseException as error:
            self._pool.unwatch(wire.sock)
            wire.sock.close()
            if isinstance(error, TimeoutError):
                raise FetchError("timeout", "no connection in time") from None
            if isinstance(error, OSError) and not self._pool.aborted:
                raise FetchError("connect", error.strerror or str(error)) from None
            raise
        return connection

    def _dial(self, host: str, port: int, limit: TimeLimit, *, anywhere: bool) -> _DeadlineSocket:
        failure: OSError | None = None
        name = host.strip("[]")
        for family, address in allowed(name, self._resolver.lookup(name, limit), anywhere=anywhere):
            sock = socket.socket(family, socket.SOCK_STREAM)
            self._pool.watch(sock)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                wire = _DeadlineSocket(sock, limit)
                wire.connect((address, port))
                return wire
            except OSError as error:
                failure = error
                self._pool.unwatch(sock)
                sock.close()
        if isinstance(failure, TimeoutError):
            raise FetchError("timeout", "no connection in time") from None
        raise FetchError("connect", (failure and (failure.strerror or str(failure))) or "no address") from None


class Fetcher:
    """``fetch(request) -> Response or FetchError``, on one opener for all threads."""

    def __init__(self, crawl: Crawl) -> None:
        options = crawl.options
        self._crawl, self._options = crawl, options
        self._pool = _Pool(idle=max(IDLE, options.concurrency))
        self._resolver = Resolver()
        self._opener = urllib.request.OpenerDirector()
        self._opener.addheaders = []
        self._opener.add_handler(urllib.request.ProxyHandler(ProxyRule(options.proxy).proxies))
        self._opener.add_handler(_KeepAliveHandler(self._pool, self._resolver, insecure=options.insecure))

    def fetch(self, request: Request) -> Response | FetchError:
        """Raises Postponed; all that the network does comes back as a FetchError."""
        started = time.monotonic()
        outcome: Response | FetchError
        request.held, limit = 0.0, TimeLimit(self._crawl.remaining(request))
        try:
            outcome = self._fetch(request, limit)
        except (FetchError, OSError, http.client.HTTPException, ValueError) as error:
            outcome = explained(error, self._options.timeout)
        if self._pool.aborted and isinstance(outcome, FetchError):
            outcome = FetchError("interrupted", CUT_OFF, status=outcome.status)
        outcome.seconds = max(0.0, time.monotonic() - started - request.held - limit.ours())
        return outcome

    def _fetch(self, request: Request, limit: TimeLimit) -> Response:
        anywhere = may_go_anywhere(self._options, request)
        url, headers = self._crawl.headers(request)
        call = _Call(url, headers=headers)
        call.anywhere = anywhere
        call.limit, call.connect_limit = limit, TimeLimit(self._options.connect_timeout, limit)
        call.before_send = lambda: self._wait_for_turn(request, limit)
        response = self._opener.open(call)
        lines = ((name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items())
        answer = Response(response.status, read_headers(lines), b"")
        try:
            answer.body = self._body(request, answer, response)
            return answer
        except http.client.IncompleteRead as error:
            failure = FetchError("truncated", detail(error), status=answer.status)
        except (FetchError, OSError, http.client.HTTPException) as error:
            failure = explained(error, self._options.timeout, answer.status)
        finally:
            response.close()
        failure.answer = answer
        raise failure

    def _body(self, request: Request, answer: Response, response: Any) -> bytes:
        status, length = answer.status, response.length
        if length is None and response.headers.get("Content-Length") and not response.chunked:
            raise FetchError("protocol", "not a Content-Length", status=status)
        limit, cut = self._crawl.max_bytes(request)
        body = BodyDecoder(answer.headers.get("Content-Encoding"), limit, status, cut=cut, length=length)
        if (seconds := patience(request, status)) is not None and not response.isclosed():
            response.wire.limit = TimeLimit(seconds, response.wire.limit)
        received = 0
        while not body.full and (data := response.read(1 << 16)):
            received += len(data)
            for _ in body.feed(data):
                pass
        if length is not None and received < length and not body.full:
            raise FetchError("truncated", f"{received} of {length} bytes", status=status)
        return body.finish()

    def _wait_for_turn(self, request: Request, limit: TimeLimit) -> None:
        began = time.monotonic()
        while (wait := self._crawl.frontier.clear_to_send(request, time.monotonic())) > 0.0:
            # The system wakes a sleeper late, and with a burst of 1 what is late is lost: sleep a little less, yield
            # for most of the rest, and spin at the end, for even sleep(0) takes some 60 microseconds.
            if wait == math.inf and request.told:
                request.told.block(None)
            elif wait > 0.0001:
                time.sleep(wait - 0.0003 if wait > 0.0004 else 0)
        request.held = time.monotonic() - began
        limit.skip()

    @property
    def aborted(self) -> bool:
        """Whether ``abort`` was called."""
        return self._pool.aborted

    def abort(self) -> None:
        """Cut off what is in flight, and what will be: it comes back as ``interrupted``."""
        self._pool.abort()
        self._resolver.close()

    def close(self) -> None:
        """Close the idle connections; look-ups that still run fail."""
        self._pool.close()
        self._resolver.close()
