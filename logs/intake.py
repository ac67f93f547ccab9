"""Where log events come in: the UDP socket that is read, and what the kernel dropped.

A ``Receiver`` hands on each datagram that its socket gives, once, in order, or counts it as refused; a wake-up lasts
about 10 ms however fast they come. Not promised: that UDP brought what was sent. ``KernelDrops`` counts what the kernel
dropped at the sockets: sent to a socket = read + dropped + still in its buffer, exactly; what was lost on the way is in
no count.

All of it is callbacks of one event loop, so there is no lock; nothing here awaits, or starts a task, a thread or a
process. ``KernelDrops`` may be asked in another process than the one that reads, as the counter is the socket's.

The socket is drained at each wake-up: 1.5 µs of CPU a datagram of 200 bytes. An ``asyncio.DatagramProtocol`` takes
3.4 (on uvloop 1.5 as well), and says neither how long it holds the loop nor what is still there at the stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

from coordination import Clock, stats_repr

Network = IPv4Network | IPv6Network
Handle = Callable[[list[tuple[bytes, str]]], None]  # is given datagrams and their source addresses

RECEIVE_BUFFER = 4 << 20
"""Bytes asked of the kernel, which doubles them and counts some 600 more for each datagram: twice 4 MiB hold about
10,000 small ones, a pause of 0.16 s at 60,000 a second."""
MAX_DATAGRAM = 65_535  # bytes of a datagram: what UDP's length field can say, so none is cut off
CHUNK, CHUNK_BYTES = 100, 65_536  # datagrams and bytes read before they are handed on and the clock is looked at
MAX_SOURCES = 10_000  # source addresses remembered: they can be invented, so they are forgotten when there are more
MAX_ERRORS, ERROR_PAUSE = 10, 0.01
"""Errors of the socket after which a wake-up ends; seconds until the next, if it brought nothing else."""
MIN_BUFFERED = 256  # bytes that the kernel's buffer counts for a datagram at the very least (Linux 6: 832)

SO_RCVBUFFORCE, SO_MEMINFO = 33, 55  # Linux, asm-generic/socket.h; the socket module does not name them
MEMINFO_DROPS = slice(32, 36)
"""The ninth of the 32-bit numbers that SO_MEMINFO gives (SK_MEMINFO_DROPS, linux/sock_diag.h)."""
COUNTER_RANGE = 1 << 32  # where the kernel's counter begins again


def udp_socket(
    address: str, port: int, *, receive_buffer: int = RECEIVE_BUFFER, reuse_port: bool = False
) -> tuple[socket.socket, str | None]:
    """A socket bound to ``address`` (``0.0.0.0``, ``::`` for IPv6 and IPv4, a name: looked up here) and ``port``; what
    to tell the operator, if its buffer is smaller than was asked for.

    ``receive_buffer`` bytes are asked for by SO_RCVBUFFORCE, which needs CAP_NET_ADMIN, then by SO_RCVBUF, which the
    kernel clamps without a word; so it is read back. With ``reuse_port`` several sockets may be bound to the port; the
    kernel spreads the senders over them (by a hash of the addresses and ports). ``OSError``: what could not be bound.
    """
    sock: socket.socket | None = None
    try:
        flags = socket.AI_PASSIVE
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM, flags=flags)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        granted = _enlarge(sock, receive_buffer)
        sock.bind(where)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(error.errno, f"cannot receive UDP on {address} port {port}: {error.strerror}") from error
    warning = (
        f"the kernel gives a receive buffer of {granted:,} bytes, not {receive_buffer:,}: bursts may be dropped; "
        f"sysctl -w net.core.rmem_max={receive_buffer} allows it"
    )
    return sock, warning if granted < receive_buffer else None


def _enlarge(sock: socket.socket, size: int) -> int:
    """Ask for a receive buffer of so many bytes; what was given, in the same measure."""
    linux = sys.platform == "linux"
    for option in (socket.SO_RCVBUF, SO_RCVBUFFORCE) if linux else (socket.SO_RCVBUF,):
        with contextlib.suppress(OSError):  # not allowed; elsewhere too much is an error, and what was there stays
            sock.setsockopt(socket.SOL_SOCKET, option, size)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // (2 if linux else 1)


class KernelDrops:
    """How many datagrams the kernel dropped at these sockets because their buffer was full (or a checksum wrong).

    Each socket is asked by SO_MEMINFO (Linux 4.12; elsewhere there is no figure, and 0 is told): 0.5 µs, also when no
    datagram comes any more, as SO_RXQ_OVFL would need. A counter belongs to the socket, whoever holds it, and begins
    when it is made. It has 32 bits, so it must be read once in 4 billion drops. Of a closed socket the last figure
    stays: read before you close.
    """

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets, self._counts = list(sockets), [0] * len(sockets)

    def total(self) -> int:
        """The drops of all of them since they were made."""
        for index, sock in enumerate(self._sockets):
            if sock.fileno() >= 0 and (counter := _socket_drops(sock)) is not None:
                self._counts[index] += (counter - self._counts[index]) % COUNTER_RANGE
        return sum(self._counts)


def _socket_drops(sock: socket.socket) -> int | None:
    drops = b""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            drops = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 64)[MEMINFO_DROPS]
    return int.from_bytes(drops, sys.byteorder) if len(drops) == 4 else None


class ReceiverStats(NamedTuple):
    """``datagrams`` read, ``refused`` and ``unhandled`` among them; ``bytes`` are theirs."""

    datagrams: int
    bytes: int
    wakeups: int
    refused: int  # from addresses that are not allowed
    errors: int  # of the socket: what it says instead of giving a datagram
    unhandled: int  # given to a ``handle`` that raised: nobody knows what became of them


class Receiver:
    """Reads a UDP socket, which is its own from now on, and hands what comes to ``handle(datagrams)``.

    ``allow``: networks whose datagrams are wanted; none named: all. An IPv4 sender on an IPv6 socket is an IPv4
    address, here and to ``handle``; the zone of a link-local one is left out. A source address is a claim, no proof.

    A wake-up reads until the socket is empty, but at most ``at_once`` datagrams, and no more after ``seconds``.
    ``handle`` gets portions of at most ``CHUNK`` and about ``CHUNK_BYTES``: what it does with one is how much longer a
    wake-up can last. If it raises, that is logged once, and counted.
    """

    def __init__(
        self,
        sock: socket.socket,
        handle: Handle,
        *,
        allow: Sequence[Network] = (),
        at_once: int = 500,
        seconds: float = 0.01,
        clock: Clock = time.monotonic,
    ) -> None:
        sock.setblocking(False)
        self.at_once, self.seconds = at_once, seconds
        self._sock, self._handle, self._clock = sock, handle, clock
        self._allow = [_unmapped(network) for network in allow]
        self._loop: asyncio.AbstractEventLoop | None = None  # set while it listens
        self._pause: asyncio.TimerHandle | None = None
        self._source_of = functools.lru_cache(MAX_SOURCES)(self._learn)
        """What the socket calls a source -> what we call it; "": refused."""
        self._left: int | None = None  # datagrams that ``drain`` may still read
        self._datagrams = self._bytes = self._wakeups = self._refused = self._errors = self._unhandled = 0

    def start(self) -> None:
        """Listen, in the running loop."""
        if self._loop is None:
            self._left = None
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._sock, self._wake)

    def _stop(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._sock)
        self._loop = self._pause = None

    def drain(self) -> int:
        """Listen no more, read a wake-up's worth of what is there; how much that was, 0 when nothing is left.

        Call it until it says 0, other work in between: ``while receiver.drain(): await asyncio.sleep(0)``. That ends
        also under load: all calls together read no more than the buffer can have held at the first.
        """
        self._stop()
        if self._sock.fileno() < 0:
            return 0
        if self._left is None:
            self._left = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // MIN_BUFFERED + 1
        read = self._turn(min(self._left, self.at_once))
        self._left -= read
        return read

    def close(self) -> None:
        """Listen no more, and close the socket, with what it may hold."""
        self._stop()
        self._sock.close()

    def _wake(self) -> None:
        self._wakeups += 1
        errors = self._errors
        if not self._turn(self.at_once) and self._errors > errors and self._loop is not None:
            self._loop.remove_reader(self._sock)
            self._pause = self._loop.call_later(ERROR_PAUSE, self._resume)

    def _resume(self) -> None:
        self._pause = None
        if self._loop is not None:
            self._loop.add_reader(self._sock, self._wake)

    def _turn(self, most: int) -> int:
        """Read and hand on until nothing is there, ``most`` were read, or the time is up; how many were read."""
        read, until, errors = 0, self._clock() + self.seconds, self._errors
        while read < most and self._sock.fileno() >= 0:
            count, more = self._read(min(CHUNK, most - read))
            read += count
            if not more or self._errors >= errors + MAX_ERRORS or self._clock() >= until:
                break
        return read

    def _read(self, most: int) -> tuple[int, bool]:
        """Read a portion and hand it on; how many datagrams, and whether there may be more."""
        receive, source_of = self._sock.recvfrom, self._source_of
        found: list[tuple[bytes, str]] = []
        size = refused = 0
        more = True
        try:
            for _ in range(most):
                data, address = receive(MAX_DATAGRAM)
                size += len(data)
                source = source_of(address[0])
                if source:
                    found.append((data, source))
                else:
                    refused += 1
                if size >= CHUNK_BYTES:
                    break
        except BlockingIOError:
            more = False
        except OSError:  # an ICMP message, no memory: of no datagram, and the next one may be there
            self._errors += 1
        count = len(found) + refused
        self._datagrams += count
        self._bytes += size
        self._refused += refused
        if found:
            try:
                self._handle(found)
            except Exception:
                if not self._unhandled:
                    logging.getLogger(__name__).exception("datagrams could not be handled (said once)")
                self._unhandled += len(found)
        return count, more

    def _learn(self, name: str) -> str:
        """What we call the source, "" if it is refused."""
        address: IPv4Address | IPv6Address | None = ip_address(name.partition("%")[0])
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        allowed = not self._allow or any(address in network for network in self._allow)
        return str(address) if allowed else ""

    def stats(self) -> ReceiverStats:
        """Counts since the beginning."""
        counts = self._datagrams, self._bytes, self._wakeups, self._refused, self._errors, self._unhandled
        return ReceiverStats(*counts)

    __repr__ = stats_repr


def _unmapped(network: Network) -> Network:
    """The IPv4 network that a network of IPv4-mapped addresses (RFC 4291, section 2.5.5.2) means."""
    if isinstance(network, IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network
