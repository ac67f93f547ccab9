"""The HTTP client of the crawler on threads: urllib, with kept connections, one deadline for each request, and our own
reading of what comes (crawl/http1.py).

A blocking socket's time limit holds for one system call, so a server that drips a byte a second would never meet it.
``_Connection`` gives every call only what is left of the attempt, by a ``TimeLimit``.

Everything runs in the calling thread, but DNS, which does in the resolver's. ``_Pool._lock`` guards the idle
connections and the set of those in use.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from coordination import new_lock
from crawl.addresses import may_go_anywhere
from crawl.core import Crawl, patience
from crawl.errors import CUT_OFF, FetchError
from crawl.http1 import Answer, Head
from crawl.model import Request, Response
from crawl.net import BodyDecoder, ProxyRule, Resolver, TimeLimit, allowed, explained, readable, tls_context, tls_detail

IDLE = 256  # connections kept open for a next request to their host: a list often goes round many hosts
_Key = tuple[str, str, str | None, bool]
"""Scheme, host and port, the host behind a proxy's tunnel, and whether it was opened without a look at its address."""


def _request_bytes(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """What is sent. Raises ValueError where a line would be two."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    text = "".join(f"{line}\r\n" for line in lines)
    if text.count("\r") != len(lines) or text.count("\n") != len(lines):
        raise ValueError("a line break in a header")
    return text.encode() + b"\r\n"


class _Connection:
    """A connection, of which every call ends, with TimeoutError, when ``limit`` does.

    The socket itself does not block, and poll waits: a time limit set on a socket would cost three system calls more
    a request, each of which gives the interpreter to another thread and waits to get it back.
    """

    answer: Answer  # to the last request

    def __init__(self, key: _Key, sock: socket.socket, limit: TimeLimit) -> None:
        self.key, self.limit = key, limit
        self._first = b""  # of the body, what came with the head
        self.use(sock)

    def use(self, sock: socket.socket) -> None:
        self.sock: Any = sock
        sock.setblocking(False)
        self._decrypted: Callable[[], int] = getattr(sock, "pending", int)  # bytes that wait in no socket

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

    def _complete(self, call: Callable[..., Any], *args: Any, event: int = select.POLLIN) -> Any:
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

    def begin(self, request: bytes) -> Head:
        """Send ``request``; returns the head of its answer. Raises FetchError if that does not come."""
        rest, answer = memoryview(request), Answer()
        while rest:
            rest = rest[self._complete(self.sock.send, rest, event=select.POLLOUT) :]
        self.answer = answer
        while answer.head is None:
            if answer.fault:
                raise answer.fault
            self._first = self._read()
        return answer.head

    def body(self) -> Iterator[bytes]:
        """The pieces of the body. Raises FetchError in its place where it is faulty."""
        yield self._first
        self._first = b""  # an idle connection needs no memory
        while not self.answer.over:
            yield self._read()
        if self.answer.fault:
            raise self.answer.fault

    def _read(self) -> bytes:
        if self.answer.more:
            return self.answer.feed()
        if not self._decrypted():
            self._wait(select.POLLIN)
        if data := self._complete(self.sock.recv, 1 << 16):
            return self.answer.feed(data)
        self.answer.end()
        return b""

    def readable(self) -> bool:
        """Something has come, or the end."""
        return bool(self._decrypted()) or readable(self.sock)

    def close(self) -> None:
        self.sock.close()


class _Pool:
    """The open connections: idle ones by origin, newest first; those in use, so that they can be cut off.

    ``_lock`` guards both. At most ``idle`` connections are kept; the longest idle one goes first.
    """

    def __init__(self, idle: int) -> None:
        self._limit = idle
        self._lock = new_lock("Pool")
        self._idle: dict[_Connection, None] = {}
        self._by_key: dict[_Key, list[_Connection]] = {}
        self._in_use: set[_Connection] = set()
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
                self._in_use.add(connection)
            if not connection.readable():
                return connection
            self.give(connection, usable=False)

    def give(self, connection: _Connection, *, usable: bool) -> None:
        """It is in use no more, and kept if it is ``usable``."""
        closed = connection
        with self._lock:
            self._in_use.discard(connection)
            if usable and not self.aborted:
                self._idle[connection] = None
                self._by_key.setdefault(connection.key, []).append(connection)
                if len(self._idle) <= self._limit:
                    return
                closed = next(iter(self._idle))
                self._forget(closed)
        closed.close()

    def _forget(self, connection: _Connection) -> None:
        del self._idle[connection]
        self._by_key[connection.key].remove(connection)
        if not self._by_key[connection.key]:
            del self._by_key[connection.key]

    def watch(self, connection: _Connection) -> None:
        """It is in use, from now on or still. Raises OSError if nothing is to be any more."""
        with self._lock:
            self._in_use.add(connection)
            if self.aborted:
                raise OSError("stopped")

    def close(self) -> None:
        with self._lock:
            idle, self._idle, self._by_key = list(self._idle), {}, {}
        for connection in idle:
            connection.close()

    def abort(self) -> None:
        """Cut off every connection in use: whoever waits for it wakes up with an error."""
        with self._lock:
            self.aborted = True
            for connection in self._in_use:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)


class _Call(urllib.request.Request):
    """A request with what ``_KeepAliveHandler`` needs to know."""

    anywhere: bool
    limit: TimeLimit
    connect_limit: TimeLimit
    connects: Callable[[str], None] | None  # called with the address before it is connected to
    before_send: Callable[[], None]  # called when the connection is open, right before the request goes out
    _tunnel_host: str | None


class _KeepAliveHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Keep-alive for urllib's opener, in which proxies and authentication go on as they do.

    Unless a call may go ``anywhere``, or goes to a proxy, it is connected to public addresses only. Where a kept
    connection brings no answer but its end, or rubbish, another one is asked (RFC 9112, section 9.3.1). Raises
    FetchError of kind dns, blocked, connect, tls.
    """

    def __init__(self, crawl: Crawl, pool: _Pool, resolver: Resolver) -> None:
        urllib.request.HTTPHandler.__init__(self)
        self._crawl, self._pool, self._resolver = crawl, pool, resolver

    def http_open(self, req: urllib.request.Request) -> Any:
        """A connection that has brought the head of an answer."""
        assert isinstance(req, _Call)
        tunnel = req._tunnel_host
        key = (req.type, req.host, tunnel, bool(tunnel or req.has_proxy() or req.anywhere))
        headers = {"Connection": "keep-alive", **req.unredirected_hdrs, **req.headers}
        proxy_headers = {name: headers.pop(name) for name in list(headers) if tunnel and name == "Proxy-authorization"}
        request = _request_bytes("GET", req.selector, headers)
        while True:
            kept = self._pool.take(key)
            connection = kept or self._connect(key, proxy_headers, req)
            connection.limit = req.limit
            try:
                req.before_send()
                if kept and kept.readable():
                    raise ConnectionResetError("closed while it was idle")
                connection.begin(request)
                return connection
            except BaseException as error:
                self._pool.give(connection, usable=False)
                lost = isinstance(error, (OSError, FetchError)) and not isinstance(error, TimeoutError)
                if not (kept and lost) or self._pool.aborted:
                    raise

    https_open = http_open

    def _connect(self, key: _Key, proxy_headers: dict[str, str], call: _Call) -> _Connection:
        scheme, authority, tunnel, _ = key
        name, port = _name_and_port(authority, 443 if scheme == "https" and not tunnel else 80)
        connects = None if tunnel or call.has_proxy() else call.connects
        connection = self._dial(key, name, port, call.connect_limit, connects)
        try:
            if tunnel:
                name, port = _name_and_port(tunnel, 443)
                target = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
                head = connection.begin(_request_bytes("CONNECT", target, {"Host": target, **proxy_headers}))
                if head.status != 200:
                    raise FetchError("connect", f"the proxy answered {head.status}")
            if scheme == "https":
                context = tls_context(self._crawl.options.insecure)
                try:
                    connection.use(
                        context.wrap_socket(connection.sock, server_hostname=name, do_handshake_on_connect=False)
                    )
                    self._pool.watch(connection)
                    connection.handshake()
                except (ssl.SSLError, ValueError) as error:
                    raise FetchError("tls", tls_detail(error)) from None
        except BaseException as error:
            self._pool.give(connection, usable=False)
            if isinstance(error, TimeoutError):
                raise FetchError("timeout", "no connection in time") from None
            if isinstance(error, OSError) and not self._pool.aborted:
                raise FetchError("connect", error.strerror or str(error)) from None
            raise
        return connection

    def _socket(self, family: socket.AddressFamily) -> socket.socket:
        try:
            return socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self._pool.close()
            raise self._crawl.no_socket(error) from None

    def _dial(
        self, key: _Key, name: str, port: int, limit: TimeLimit, connects: Callable[[str], None] | None
    ) -> _Connection:
        failure: OSError | None = None
        found = allowed(name, self._resolver.lookup(name, limit), anywhere=key[-1])
        for family, address in found[:1] if connects else found:
            if connects:
                connects(address)
            connection = _Connection(key, self._socket(family), limit)
            try:
                self._pool.watch(connection)
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.connect((address, port))
                return connection
            except OSError as error:
                failure = error
                self._pool.give(connection, usable=False)
        if isinstance(failure, TimeoutError):
            raise FetchError("timeout", "no connection in time") from None
        raise FetchError("connect", (failure and (failure.strerror or str(failure))) or "no address") from None


def _name_and_port(authority: str, default: int) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(f"//{authority}")
    return parts.hostname or "", parts.port or default


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
        self._opener.add_handler(_KeepAliveHandler(crawl, self._pool, self._resolver))

    def fetch(self, request: Request) -> Response | FetchError:
        """Raises Postponed; all that the network does comes back as a FetchError."""
        started = time.monotonic()
        outcome: Response | FetchError
        request.held, limit = 0.0, TimeLimit(self._crawl.remaining(request))
        try:
            outcome = self._fetch(request, limit)
        except (FetchError, OSError, ValueError) as error:
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
        limited = self._options.per_address
        call.connects = (lambda address: self._crawl.frontier.connects(request, address)) if limited else None
        call.before_send = lambda: self._wait_for_turn(request, limit)
        connection: _Connection = self._opener.open(call)
        head = connection.answer.head
        assert head
        answer = Response(head.status, head.headers, b"")
        if (seconds := patience(request, answer.status)) is not None:
            connection.limit = TimeLimit(seconds, limit)
        try:
            answer.body = self._body(request, head, connection)
            return answer
        except (FetchError, OSError) as error:
            failure = explained(error, self._options.timeout, answer.status)
        finally:
            self._pool.give(connection, usable=connection.answer.reusable)
        failure.answer = answer
        raise failure

    def _body(self, request: Request, head: Head, connection: _Connection) -> bytes:
        limit, cut = self._crawl.max_bytes(request)
        coding = head.headers.get("Content-Encoding")
        body = BodyDecoder(coding, limit, head.status, cut=cut, length=head.length)
        for data in connection.body():
            for _ in body.feed(data):
                pass
            if body.full:
                break
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
