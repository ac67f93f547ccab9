"""Where log events come in: the UDP socket that is read, what the kernel dropped, and the bounded queue behind it.

=================  ===============================================================================================
piece              promise (and what is not promised)
=================  ===============================================================================================
``udp_socket``     a bound socket that does not block, and how large its receive buffer really is.
``Receiver``       each datagram that the socket gives is handed on once, in order, or counted as refused; a wake-up
                   lasts about 10 ms however fast they come. Not promised: that UDP brought what was sent.
``KernelDrops``    how many datagrams the kernel dropped at these sockets since they were made: sent to the socket =
                   read + dropped + still in its buffer, exactly. Not counted there: what was lost on the way.
``EventQueue``     never more than its capacity in events and bytes; first in, first out; what does not fit is dropped
                   by a stated policy and counted by its cause: received = queued + taken + dropped, at every moment.
=================  ===============================================================================================

All of it runs in one event loop and is called from nowhere else, so there is no lock. Nothing here awaits, and nothing
starts a task, a thread or a process: a ``Receiver`` is a callback of the loop, the queue is a container that knows the
time. ``KernelDrops`` may be asked in another process than the one that reads, as the counter is the socket's.

Why the socket is drained at each wake-up, rather than read by an ``asyncio.DatagramProtocol``: that one reads a single
datagram each time round the loop. Measured with datagrams of 200 bytes that wait in the buffer (CPU time of each, one
of two busy cores, least of five runs): ``DatagramProtocol`` 3.4 µs, ``Receiver`` 1.5 µs, of which recvfrom alone is
1.2. On uvloop 1.4 and 1.5 µs: there the protocol is as cheap, but says neither how long it holds the loop nor what is
still there at the stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from coordination import Clock, stats_repr
from logs.parse import Event
from primitives import NANOSECOND

Policy = Literal["drop-newest", "drop-lowest-severity", "spool"]
Cause = Literal["queue full", "queue bytes", "less severe", "too large"]
Network = IPv4Network | IPv6Network
Handle = Callable[[list[tuple[bytes, str]]], None]
"""Is given datagrams and their source addresses."""

POLICIES: tuple[Policy, ...] = get_args(Policy)
CAUSES: tuple[Cause, ...] = get_args(Cause)
"""Of a dropped event: no place, or no bytes, were left for it; it gave way to a more severe one; it alone is larger
than all that the queue may hold."""

EVENT_BYTES = 400
"""What an event takes in memory besides the characters of its message and attributes: the tuple, a datetime, the heads
of four strings, and short names."""
RECEIVE_BUFFER = 4 << 20
"""Bytes asked of the kernel, which doubles them and counts some 600 more for each datagram: twice 4 MiB hold about
10,000 small ones, a pause of 0.16 s at 60,000 a second."""
LARGEST = 65_535
"""Bytes of a datagram: what UDP's length field can say."""
CHUNK, CHUNK_BYTES = 100, 65_536
"""Datagrams and bytes read before they are handed on and the clock is looked at."""
MAX_SOURCES = 10_000
"""Source addresses remembered: they can be invented, so they are forgotten when there are more."""
MAX_ERRORS, ERROR_PAUSE = 10, 0.01
"""Errors of the socket after which a wake-up ends; seconds until the next, if it brought nothing else."""
SMALLEST = 256
"""Bytes that the kernel's buffer counts for a datagram at the very least (Linux 6: 832)."""

SO_RCVBUFFORCE, SO_MEMINFO = 33, 55
"""Linux, asm-generic/socket.h; the socket module does not name them."""
MEMINFO_DROPS = slice(32, 36)
"""The ninth of the 32-bit numbers that SO_MEMINFO gives (SK_MEMINFO_DROPS, linux/sock_diag.h)."""
COUNTER = 1 << 32
"""Where the kernel's counter begins again."""


# ------------------------------------------------------------------------------------------------------------- queue


class EventQueueStats(NamedTuple):
    """``received == queued + taken + sum(dropped.values())``; ``bytes`` as estimated, ``age`` in seconds."""

    received: int
    queued: int
    bytes: int
    taken: int
    dropped: dict[Cause, int]
    age: float
    """Of the oldest event; 0.0 if there is none."""


class EventQueue:
    """Events that wait to be stored: at most ``capacity`` of them and about ``max_bytes`` bytes.

    They leave in the order in which they came, in batches: as soon as there are ``max_items`` or ``batch_bytes``, or
    when the oldest has waited ``max_age`` seconds (never later; earlier by up to a thousandth of it, as times closer
    together than that are taken as one). A batch has at most ``max_items`` and ``batch_bytes``, or one event.

    What comes when there is no room: ``drop-newest`` drops it. ``drop-lowest-severity`` drops the least severe that
    waits, of these the newest, as long as that is less severe than what comes; if not even all of those would make
    room, what comes is dropped and they stay. ``spool`` is ``drop-newest``, with ``over()`` telling in time that
    batches should be put on disk.

    The bytes are an estimate of the memory: ``EVENT_BYTES`` and the strings that a sender can make long.

    Not built on ``primitives.Batch``: that one hands out all it has, has one size and no bytes, and takes items one by
    one under a lock. Measured for each event (500 put at once, 1,000 taken, 90,000 waiting): 0.14 µs, 0.3 for
    ``drop-lowest-severity``; when it is full 0.2 and 1.1; put one by one 0.8 and 1.5.

    Inside: ``_items`` and their ``_sizes``, lists that begin at position ``_base`` of all that was ever admitted. An
    event that gave way leaves None, never at the head; ``_levels`` holds for each severity the positions that wait, for
    the policy that wants them. When there are more None than the capacity they are squeezed out (17 ms for 100,000,
    which is after as many evictions without a batch taken). A batch is cut off the head by ``del``, which moves 8 bytes
    for each that stays. ``_marks``: the position from which on events came at a time, in order; the first is that of
    the head.
    """

    def __init__(
        self,
        capacity: int = 100_000,
        max_bytes: int = 64_000_000,
        policy: Policy = "drop-newest",
        *,
        max_items: int = 1000,
        max_age: float = 5.0,
        batch_bytes: int = 4_000_000,
        clock: Clock = time.monotonic,
    ) -> None:
        if not 1 <= max_items <= capacity:
            raise ValueError(f"a batch holds between 1 event and the queue's capacity of {capacity}, not {max_items}")
        if not 1 <= batch_bytes <= max_bytes / 2:  # or the queue could be too full for what comes, and no batch be due
            raise ValueError(f"a batch holds between 1 byte and half of the queue's {max_bytes}, not {batch_bytes}")
        if not max_age > 0:
            raise ValueError(f"max_age must be above 0 s, not {max_age!r}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
        self.capacity, self.max_bytes, self.policy = capacity, max_bytes, policy
        self.max_items, self.max_age, self.batch_bytes = max_items, max_age, batch_bytes
        self._clock, self._grain = clock, max_age / 1000
        self._items: list[Event | None] = []
        self._sizes: list[int] = []
        self._base = self._queued = self._bytes = self._received = self._taken = 0
        self._marks: deque[tuple[int, float]] = deque()
        self._dropped: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self._levels: list[deque[int]] | None = None
        self._level_bytes = [0] * 8
        if policy == "drop-lowest-severity":
            self._levels = [deque() for _ in range(8)]

    def put(self, events: Sequence[Event]) -> None:
        """Take events, or drop and count what does not fit."""
        sizes = [
            EVENT_BYTES
            + (len(event.message) if event.message.isascii() else sys.getsizeof(event.message))
            + (len(event.attributes) if event.attributes.isascii() else sys.getsizeof(event.attributes))
            for event in events
        ]
        size, now = sum(sizes), self._clock()
        self._received += len(events)
        if self._queued + len(events) <= self.capacity and self._bytes + size <= self.max_bytes:
            self._admit(events, sizes, size, now)
            return
        for event, size in zip(events, sizes, strict=True):
            cause = self._refusal(size)
            if cause is None or (self._levels is not None and self._make_room(event.severity & 7, size)):
                self._admit((event,), (size,), size, now)
            else:
                self._dropped[cause] += 1

    def _refusal(self, size: int) -> Cause | None:
        """Why an event of that size cannot be admitted; None: it can."""
        if size > self.max_bytes:
            return "too large"
        if self._queued >= self.capacity:
            return "queue full"
        return "queue bytes" if self._bytes + size > self.max_bytes else None

    def _admit(self, events: Sequence[Event], sizes: Sequence[int], size: int, now: float) -> None:
        first = self._base + len(self._items)
        if not self._marks or now - self._marks[-1][1] > self._grain:
            self._marks.append((first, now))
        self._items.extend(events)
        self._sizes.extend(sizes)
        self._queued += len(events)
        self._bytes += size
        if self._levels is not None:
            levels, level_bytes = self._levels, self._level_bytes
            for position, (event, one) in enumerate(zip(events, sizes, strict=True), first):
                level = event.severity & 7
                levels[level].append(position)
                level_bytes[level] += one

    def _make_room(self, level: int, size: int) -> bool:
        """Drop what is less severe than ``level`` until ``size`` bytes fit; False, and nothing dropped, if they never
        would."""
        assert self._levels is not None
        needed = self._bytes + size - self.max_bytes
        if needed > sum(self._level_bytes[level + 1 :]) or not any(self._levels[level + 1 :]):
            return False
        for least in range(7, level, -1):
            positions = self._levels[least]
            while positions and self._refusal(size) is not None:
                index = positions.pop() - self._base
                freed = self._sizes[index]
                self._items[index], self._sizes[index] = None, 0
                self._queued -= 1
                self._bytes -= freed
                self._level_bytes[least] -= freed
                self._dropped["less severe"] += 1
        self._trim()
        if len(self._items) - self._queued > self.capacity:
            self._squeeze(self._levels)
        return True

    def _squeeze(self, levels: list[deque[int]]) -> None:
        """Close the gaps: what waits moves to the places before it."""
        base, kept = self._base, [index for index, event in enumerate(self._items) if event is not None]
        marks = {base + bisect_left(kept, place - base): when for place, when in self._marks}  # of a place the last
        self._marks = deque(marks.items())
        self._items = [self._items[index] for index in kept]
        self._sizes = [self._sizes[index] for index in kept]
        for positions in levels:
            positions.clear()
        for position, event in enumerate(self._items, base):
            assert event is not None
            levels[event.severity & 7].append(position)
        self._trim()

    def _trim(self) -> None:
        """Cut off what is None at the head, and the marks of what is gone."""
        items, marks = self._items, self._marks
        if items and items[0] is None:
            gone = next((index for index, event in enumerate(items) if event is not None), len(items))
            del items[:gone], self._sizes[:gone]
            self._base += gone
        if not items:
            marks.clear()
        while len(marks) > 1 and marks[1][0] <= self._base:
            marks.popleft()

    def take(self) -> list[Event] | None:
        """The next batch if one is due, the oldest first; else None."""
        return self.drain() if self.due_in() <= 0.0 else None

    def drain(self) -> list[Event]:
        """The next batch, due or not; empty if nothing waits."""
        places, size = min(len(self._items), self.max_items), 0
        sizes = self._sizes[:places]
        if len(self._items) > self._queued or (size := sum(sizes)) > self.batch_bytes:
            places, size = self._batch()
            sizes = self._sizes[:places]
        events = self._items[:places]
        batch = [event for event in events if event is not None]
        del self._items[:places], self._sizes[:places]
        self._base += places
        self._queued -= len(batch)
        self._taken += len(batch)
        self._bytes -= size
        if self._levels is not None:
            level_bytes = self._level_bytes
            for event, one in zip(events, sizes, strict=True):
                if event is not None:
                    level_bytes[event.severity & 7] -= one
            for positions in self._levels:
                while positions and positions[0] < self._base:
                    positions.popleft()
        self._trim()
        return batch

    def _batch(self) -> tuple[int, int]:
        """How many places, empty ones too, the next batch takes, and its bytes; one by one."""
        places = events = total = 0
        for event, size in zip(self._items, self._sizes, strict=True):
            if events == self.max_items or (events and total + size > self.batch_bytes):
                break
            places, events, total = places + 1, events + (event is not None), total + size
        return places, total

    def due_in(self) -> float:
        """Seconds until ``take`` gives a batch if nothing more comes (0.0: now), infinity if nothing waits."""
        if not self._queued:
            return math.inf
        if self._queued >= self.max_items or self._bytes >= self.batch_bytes:
            return 0.0
        wait = self._marks[0][1] + self.max_age - self._clock()
        return wait if wait > NANOSECOND else 0.0

    def over(self) -> bool:
        """The policy is ``spool`` and the queue is past half of what it may hold: put batches on disk."""
        half = self._queued * 2 > self.capacity or self._bytes * 2 > self.max_bytes
        return half and self.policy == "spool"

    def __len__(self) -> int:
        return self._queued

    def stats(self) -> EventQueueStats:
        age = max(0.0, self._clock() - self._marks[0][1]) if self._queued else 0.0
        return EventQueueStats(self._received, self._queued, self._bytes, self._taken, dict(self._dropped), age)

    __repr__ = stats_repr


# ------------------------------------------------------------------------------------------------------------ socket


class Bound(NamedTuple):
    sock: socket.socket
    receive_buffer: int
    """Bytes, as one asks for them: the half of what Linux then uses."""
    warning: str | None
    """What to tell the operator if that is less than was asked for."""


def udp_socket(address: str, port: int, *, receive_buffer: int = RECEIVE_BUFFER, reuse_port: bool = False) -> Bound:
    """A socket bound to ``address`` (``0.0.0.0``, ``::`` for IPv6 and IPv4, a name: looked up here) and ``port``.

    ``receive_buffer`` bytes are asked for by SO_RCVBUFFORCE, which needs CAP_NET_ADMIN, then by SO_RCVBUF, which the
    kernel clamps to net.core.rmem_max without a word; so it is read back. With ``reuse_port`` several sockets of one
    user may be bound to the port; the kernel spreads the senders over them (by a hash of the addresses and ports). An
    ``OSError`` says what could not be bound.
    """
    if not 0 <= port < 65_536 or not 1 <= receive_buffer < 1 << 30:
        raise ValueError(f"port must be below 65,536, the buffer of 1 byte to 1 GiB, not {port!r}, {receive_buffer!r}")
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
    warning = None
    if granted < receive_buffer:
        warning = (
            f"the kernel gives a receive buffer of {granted:,} bytes, not {receive_buffer:,}: bursts may be dropped; "
            f"sysctl -w net.core.rmem_max={receive_buffer} allows it"
        )
    return Bound(sock, granted, warning)


def _enlarge(sock: socket.socket, size: int) -> int:
    """Ask for a receive buffer of so many bytes; what was given, in the same measure."""
    linux = sys.platform == "linux"
    try:
        if not linux:
            raise OSError
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except OSError:
        with contextlib.suppress(OSError):  # elsewhere too much is an error, and what was there stays
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // (2 if linux else 1)


# ------------------------------------------------------------------------------------------------------ kernel drops


class KernelDropsStats(NamedTuple):
    sockets: int
    dropped: int | None
    """As it was last read."""


class KernelDrops:
    """How many datagrams the kernel dropped at these sockets because their buffer was full (or a checksum wrong).

    It is asked of each socket by SO_MEMINFO (Linux 4.12): 0.5 µs, whenever one likes, also when no datagram comes any
    more. Where that is unknown, the "drops" of the socket's line in /proc/net/udp and udp6 is read: 0.1 to 2 ms, more
    where there are many sockets. (SO_RXQ_OVFL would come with each datagram, but needs recvmsg, 0.25 µs each, and tells
    of a drop only when another datagram follows.) None where the system has neither.

    A counter belongs to the socket, whoever holds it, and begins when it is made. It has 32 bits, so it must be read
    once in 4 billion drops. Of a closed socket the last figure stays: read before you close.
    """

    def __init__(self, sockets: Sequence[socket.socket], folder: Path = Path("/proc/net")) -> None:
        self._sockets, self._folder = list(sockets), folder
        self._counts: list[int | None] = [None] * len(self._sockets)

    def by_socket(self) -> list[int | None]:
        """The drops of each socket since it was made."""
        table: dict[int, int] | None = None
        for index, sock in enumerate(self._sockets):
            if sock.fileno() < 0:
                continue
            counter = _socket_drops(sock)
            if counter is None:
                table = self._table() if table is None else table
                counter = table.get(os.fstat(sock.fileno()).st_ino)
            if counter is not None:
                before = self._counts[index] or 0
                self._counts[index] = before + (counter - before) % COUNTER
        return list(self._counts)

    def total(self) -> int | None:
        """The drops of all of them; None if that of one is not known."""
        self.by_socket()
        return self.stats().dropped

    def _table(self) -> dict[int, int]:
        """Inode of a socket -> its drops."""
        found: dict[int, int] = {}
        for name in ("udp", "udp6"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                for line in (self._folder / name).read_text().splitlines()[1:]:
                    words = line.split()
                    found[int(words[9])] = int(words[12])
        return found

    def stats(self) -> KernelDropsStats:
        known = [count for count in self._counts if count is not None]
        return KernelDropsStats(len(self._sockets), sum(known) if len(known) == len(self._sockets) else None)

    __repr__ = stats_repr


def _socket_drops(sock: socket.socket) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        answer = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 64)
    except OSError:
        return None
    drops = answer[MEMINFO_DROPS]
    return int.from_bytes(drops, sys.byteorder) if len(drops) == 4 else None


# ---------------------------------------------------------------------------------------------------------- receiver


class ReceiverStats(NamedTuple):
    """``datagrams`` read, ``refused`` and ``unhandled`` among them; ``bytes`` are theirs."""

    datagrams: int
    bytes: int
    wakeups: int
    refused: int
    """From addresses that are not allowed."""
    truncated: int
    """Longer than ``largest``: their rest was cut off."""
    errors: int
    """Of the socket: what it says instead of giving a datagram."""
    unhandled: int
    """Given to a ``handle`` that raised: nobody knows what became of them."""


class Receiver:
    """Reads a UDP socket, which is its own from now on, and hands what comes to ``handle(datagrams)``.

    ``allow``: networks whose datagrams are wanted; none named: all. An IPv4 sender on an IPv6 socket is an IPv4
    address, here and to ``handle``; the zone of a link-local one is left out. A source address in UDP is a claim, no
    proof.

    A wake-up reads until the socket is empty, but at most ``at_once`` datagrams, and no more after ``seconds``; then
    the loop's other callbacks have their turn. ``handle`` gets them in portions, at most ``CHUNK`` and about
    ``CHUNK_BYTES``: what it does with one portion is how much longer a wake-up can last. If it raises, that is logged
    once, and counted. The kernel's buffer waits meanwhile; see ``KernelDrops``.
    """

    def __init__(
        self,
        sock: socket.socket,
        handle: Handle,
        *,
        allow: Sequence[Network] = (),
        at_once: int = 500,
        seconds: float = 0.01,
        largest: int = LARGEST,
        clock: Clock = time.monotonic,
    ) -> None:
        if at_once < 1 or not seconds > 0 or not 0 <= largest <= LARGEST:
            raise ValueError(f"at_once must be at least 1, seconds above 0, largest at most {LARGEST}")
        sock.setblocking(False)
        self.at_once, self.seconds, self.largest = at_once, seconds, largest
        self._sock, self._handle, self._clock = sock, handle, clock
        self._allow = [_unmapped(network) for network in allow]
        self._loop: asyncio.AbstractEventLoop | None = None
        """Set while it listens."""
        self._pause: asyncio.TimerHandle | None = None
        self._sources: dict[str, str] = {}
        """What the socket calls a source -> what we call it; "": refused."""
        self._left: int | None = None
        """Datagrams that ``drain`` may still read."""
        self._datagrams = self._bytes = self._wakeups = self._refused = 0
        self._truncated = self._errors = self._unhandled = 0

    def start(self) -> None:
        """Listen, in the running loop."""
        if self._loop is None:
            self._left = None
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._sock, self._wake)

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        pause, self._pause = self._pause, None
        if pause is not None:
            pause.cancel()
        if loop is not None:
            loop.remove_reader(self._sock)

    def drain(self) -> int:
        """Listen no more, read a wake-up's worth of what is there; how much that was, 0 when nothing is left.

        Call it until it says 0, other work in between: ``while receiver.drain(): await asyncio.sleep(0)``. That ends
        also under load: all calls together read no more than the buffer can have held at the first.
        """
        self._stop()
        if self._sock.fileno() < 0:
            return 0
        if self._left is None:
            self._left = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // SMALLEST + 1
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
        receive, sources, largest = self._sock.recvfrom, self._sources, self.largest
        found: list[tuple[bytes, str]] = []
        size = refused = 0
        more = True
        try:
            for _ in range(most):
                data, address = receive(largest + 1)
                length = len(data)
                if length > largest:
                    data, length = data[:largest], largest
                    self._truncated += 1
                size += length
                source = sources.get(address[0])
                if source is None:
                    source = self._learn(address[0])
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
        """What we call the source, "" if it is refused; remembered."""
        address: IPv4Address | IPv6Address | None = ip_address(name.partition("%")[0])
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        allowed = not self._allow or any(address in network for network in self._allow)
        if len(self._sources) >= MAX_SOURCES:
            self._sources.clear()
        source = self._sources[name] = str(address) if allowed else ""
        return source

    def stats(self) -> ReceiverStats:
        return ReceiverStats(
            *(self._datagrams, self._bytes, self._wakeups, self._refused),
            *(self._truncated, self._errors, self._unhandled),
        )

    __repr__ = stats_repr


def _unmapped(network: Network) -> Network:
    """The IPv4 network that a network of IPv4-mapped addresses (RFC 4291, section 2.5.5.2) means."""
    if isinstance(network, IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network
