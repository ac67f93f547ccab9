"""Five hundred simulated services that send their logs by UDP, and the metadata API that says whose they are.

Theory
------
* **`Pace`** is pure: how many events are due by now. It runs evenly and never catches up with more than a twentieth of
  a second of arrears: what is missed beyond that comes later, so that a machine which is too slow sends at a lower
  rate, and says so, instead of in bursts.
* **`Senders`** sends from a socket (and so an address, 127.0.2.1 and up) for each service, from one thread. What an
  event says is made before the start, up to its time and serial number: that leaves 0.7 us an event (measured), and
  the kernel's 3 us.
* **`MetadataApi`** answers `GET /services/NAME` from a thread with an event loop of its own, or misbehaves as `mode`
  says. The right answer is `metadata_of(NAME)`, which depends on the name alone; "unknown" and what begins with
  "unknown-" are not found.

Promised: event number n (from `first` on, without a gap) is sent once, by the service `Senders.service_of(n)`, and its
message ends in " serial=n" whatever the format; `sent` counts what the kernel took. The same seed gives the same
events, but for their times. After `stop()` no socket, task or thread is left. Not promised: that the kernel delivers
what it took, for that is what these senders are there to find out. `refused` counts the times that it told us that
nobody listens there.

Plain text names no service: those who read it must call that "unknown". So `formats` has it only if it is asked for.

Threads: the sender's thread alone writes its counts, others read them (each is one integer). In the API everything
belongs to its loop, but for `mode` and `answers`, which others set, and the counts, which `_lock` guards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import math
import random
import signal
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple, get_args
from urllib.parse import unquote

from sandbox.serving import InThread

Clock = Callable[[], float]
Format = Literal["rfc5424", "rfc3164", "json", "text"]
FORMATS: tuple[Format, ...] = ("rfc5424", "rfc3164", "json")
"""What is sent unless told otherwise: what names its service."""

# fmt: off
Mode = Literal[
    "ok", "held", "down", "silent", "slow", "drip", "error", "busy", "rubbish", "types", "not-utf8", "huge", "redirect",
    "truncated", "refuse",
]
# fmt: on
"""What the metadata API does:

"ok": it answers. "held": it answers when the mode is another one. "down": closes every connection. "silent": never
answers. "slow": answers after `slow` seconds; "drip": a byte in every tenth of that. "error": 500. "busy": 503 with
Retry-After. "rubbish": HTML. "types": JSON, but not of strings. "not-utf8": JSON in Latin-1. "huge": an answer without
an end. "redirect": to a path that would answer. "truncated": closes in the middle of the answer. "refuse": 400, as
if the name were wrong.
"""

TICK = 0.001  # seconds between two looks at what is due
ARREARS = 0.05  # seconds of its rate that a pace catches up with at once
VARIANTS = 8  # events of each service that differ in more than time and serial number
HEAD_LIMIT = 16_384  # bytes of a request's head

KINDS = (
    *("accounts", "billing", "cart", "catalogue", "checkout", "delivery", "fraud", "gateway", "images", "invoices"),
    *("ledger", "login", "mail", "orders", "payments", "prices", "profile", "ratings", "search", "stock"),
)
WORDS = (
    *(
        "accepted",
        "account",
        "after",
        "backend",
        "cache",
        "client",
        "closed",
        "connection",
        "customer",
        "done",
        "entry",
    ),
    *("failed", "for", "from", "in", "item", "key", "lookup", "order", "payment", "pool", "queue", "query", "refused"),
    *(
        "request",
        "response",
        "retry",
        "session",
        "slow",
        "started",
        "stored",
        "timeout",
        "to",
        "token",
        "user",
        "worker",
    ),
)
SEVERITIES = (
    ("debug", 7, 10),
    ("info", 6, 70),
    ("notice", 5, 6),
    ("warning", 4, 9),
    ("error", 3, 4),
    ("critical", 2, 1),
)
"""The name, the number of syslog, and how many of a hundred events."""
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


# --- What is said ----------------------------------------------------------------------------------------------------


def service_name(n: int) -> str:
    """The name of simulated service number `n`: accounts-000, billing-001, ..."""
    return f"{KINDS[n % len(KINDS)]}-{n:03}"


def metadata_of(service: str) -> dict[str, str] | None:
    """What the metadata API knows of a service; None for "unknown", and for names that begin with "unknown-"."""
    if service == "unknown" or service.startswith("unknown-"):
        return None
    number = zlib.crc32(service.encode("utf-8", "surrogateescape"))
    return {
        "team": f"team-{service.partition('-')[0][:100]}",
        "environment": ("production", "production", "staging", "test")[number % 4],
        "region": ("eu-west-1", "eu-central-1", "us-east-1", "ap-south-1")[number // 4 % 4],
        "version": f"{number // 16 % 9 + 1}.{number // 144 % 20}.{number // 2880 % 50}",
    }


class Template(NamedTuple):
    """An event but for its time and serial number: `head`, time, `middle`, serial number, `end`."""

    head: bytes
    stamp: int
    middle: bytes
    end: bytes


def stamps(now: datetime) -> tuple[bytes, bytes, bytes]:
    """The three ways to write a time (UTC) that templates want: ISO with microseconds, RFC 3164, ISO with a blank."""
    iso = now.strftime("%Y-%m-%dT%H:%M:%S.%f").encode()
    old = f"{MONTHS[now.month - 1]} {now.day:2} {now.hour:02}:{now.minute:02}:{now.second:02}".encode()
    return iso + b"Z", old, iso[:10] + b" " + iso[11:23]


def make_template(format: Format, service: str, n: int, rng: random.Random) -> Template:
    """An event of `service`, which is number `n`."""
    level, severity = rng.choices([each[:2] for each in SEVERITIES], [each[2] for each in SEVERITIES])[0]
    text = " ".join(rng.choices(WORDS, k=rng.randrange(4, 24)))
    host, process, duration = f"node-{n % 40:02}.example.net", rng.randrange(300, 32_000), rng.randrange(1, 900)
    request = f"{rng.getrandbits(48):012x}"
    priority = 16 * 8 + severity
    if format == "rfc5424":
        data = f'[request@32473 id="{request}" ms="{duration}"]'
        middle = f" {host} {service} {process} REQ {data} {text} serial="
        return Template(f"<{priority}>1 ".encode(), 0, middle.encode(), b"")
    if format == "rfc3164":
        middle = f" {host} {service}[{process}]: {text} request={request} ms={duration} serial="
        return Template(f"<{priority}>".encode(), 1, middle.encode(), b"")
    if format == "json":
        names = {"level": level, "service": service, "host": host, "request_id": request, "duration_ms": duration}
        middle = f'", {json.dumps(names)[1:-1]}, "message": {json.dumps(text)[:-1]} serial='
        return Template(b'{"time": "', 0, middle.encode(), b'"}')
    if format == "text":
        return Template(b"", 2, f" {level.upper()} {service} {text} serial=".encode(), b"")
    raise ValueError(f"a format is one of {', '.join(get_args(Format))}, not {format!r}")


# --- Sending ---------------------------------------------------------------------------------------------------------


class Pace:
    """How many events are due: `rate` a second, evenly, `total` in all (None: without end)."""

    def __init__(self, rate: float, total: int | None, now: float) -> None:
        if not (rate > 0 and math.isfinite(rate)) or (total is not None and total < 0):
            raise ValueError("rate must be above 0 events a second, total not below 0")
        self.rate, self.total = rate, total
        self.most = max(1, math.ceil(rate * ARREARS))
        self.given = 0
        self.late = 0.0
        """Seconds by which the end comes later than planned."""
        self._begun = now

    def due(self, now: float) -> int:
        """How many to send now; they count as sent."""
        n = max(0, int((now - self._begun - self.late) * self.rate + 1e-6) - self.given)
        if n > self.most:
            self.late += (n - self.most) / self.rate
            n = self.most
        if self.total is not None:
            n = min(n, self.total - self.given)
        self.given += n
        return n

    @property
    def over(self) -> bool:
        return self.given == self.total


class SendersStats(NamedTuple):
    events: int
    """Which the kernel took."""
    failed: int
    """Which it did not take: their serial numbers are missing."""
    refused: int
    """How often it said that nobody listens; the event before was lost."""
    seconds: float
    rate: float
    """Events a second, really."""
    late: float


class Senders:
    """Simulated services that log: `with Senders(("127.0.0.1", 5514), rate=20_000) as senders: senders.wait()`.

    `to`: an IP address and a port. `rate`: events a second in all, `total`: how many (None: until `stop`).
    `services`: how many, or their names. `formats`: service n uses the n-th in turn. `first`: the first serial number.
    Raises ValueError for impossible arguments, OSError if a socket cannot be had.
    """

    def __init__(
        self,
        to: tuple[str, int],
        *,
        rate: float = 1000.0,
        services: int | Sequence[str] = 500,
        total: int | None = None,
        formats: Sequence[Format] = FORMATS,
        seed: int = 1,
        first: int = 0,
        clock: Clock = time.monotonic,
    ) -> None:
        names = [service_name(n) for n in range(services)] if isinstance(services, int) else list(services)
        if not names or not formats or len(set(names)) != len(names):
            raise ValueError("needed: at least one service, each name once, and a format")
        Pace(rate, total, 0.0)
        rng = random.Random(seed)
        kinds = [formats[n % len(formats)] for n in range(len(names))]
        self.to, self.rate, self.total, self.first = to, rate, total, first
        self._order = list(range(len(names)))
        rng.shuffle(self._order)
        self._templates = [
            [make_template(kind, name, n, rng) for _ in range(VARIANTS)]
            for n, (kind, name) in enumerate(zip(kinds, names, strict=True))
        ]
        self._found = ["unknown" if kind == "text" else name for kind, name in zip(kinds, names, strict=True)]
        self._counts = [0] * len(names)
        self._failed = self._refused = 0
        self._clock = clock
        self._begun = self._ended = math.nan
        self._pace: Pace | None = None
        self._halt = threading.Event()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._sockets: list[socket.socket] = []
        self._sends: list[Callable[[bytes], int]] = []

    def service_of(self, serial: int) -> str:
        """Whose event it is, as a reader can tell: "unknown" for plain text."""
        return self._found[self._order[serial % len(self._order)]]

    @property
    def sent(self) -> Counter[str]:
        """How many events of each service the kernel took."""
        counts: Counter[str] = Counter()
        for name, n in zip(self._found, self._counts, strict=True):
            counts[name] += n
        return counts

    def datagram(self, serial: int, written: tuple[bytes, bytes, bytes]) -> bytes:
        """The event of this serial number, with one of these times."""
        turn, place = divmod(serial, len(self._order))
        head, stamp, middle, end = self._templates[self._order[place]][turn % VARIANTS]
        return b"%b%b%b%d%b" % (head, written[stamp], middle, serial, end)

    def start(self) -> Senders:
        if self._thread is not None:
            raise RuntimeError("these senders were started already")
        try:
            for n in range(len(self._order)):
                self._sockets.append(sender_socket(self.to, n))
        except OSError:
            self._close()
            raise
        self._sends = [sock.send for sock in self._sockets]
        self._thread = threading.Thread(target=self._run, name="senders", daemon=True)
        self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Until all are sent (or `stop`); False if that takes longer than `timeout` seconds."""
        return self._done.wait(timeout)

    def stop(self) -> None:
        """Send no more, and wait for the thread. Harmless if nothing runs."""
        self._halt.set()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Senders:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        self._sends.clear()

    def _run(self) -> None:
        try:
            self._begun = self._clock()
            pace = self._pace = Pace(self.rate, self.total, self._begun)
            serial = self.first
            while not pace.over and not self._halt.is_set():
                n = pace.due(self._clock())
                if n:
                    self._send(serial, n)
                    serial += n
                if not pace.over:
                    self._halt.wait(TICK)
        finally:
            self._ended = self._clock()
            self._close()
            self._done.set()

    def _send(self, serial: int, n: int) -> None:
        sends, order, counts, make = self._sends, self._order, self._counts, self.datagram
        size, written = len(order), stamps(datetime.now(UTC))
        for number in range(serial, serial + n):
            place = order[number % size]
            try:
                try:
                    sends[place](make(number, written))
                except ConnectionRefusedError:  # it is about the event before; this one was not tried yet
                    self._refused += 1
                    sends[place](make(number, written))
            except OSError:
                self._failed += 1
            else:
                counts[place] += 1

    def stats(self) -> SendersStats:
        events, late = sum(self._counts), self._pace.late if self._pace else 0.0
        begun, ended = self._begun, self._ended
        seconds = 0.0 if math.isnan(begun) else (self._clock() if math.isnan(ended) else ended) - begun
        rate = events / seconds if seconds > 0 else 0.0
        return SendersStats(events, self._failed, self._refused, seconds, rate, late)

    def __repr__(self) -> str:
        return f"<Senders of {len(self._order)} services to {self.to}, {self.stats()}>"


def sender_socket(to: tuple[str, int], n: int) -> socket.socket:
    """The UDP socket of sender number `n`, with an address of its own if `to` is on IPv4's loopback."""
    target = ipaddress.ip_address(to[0])
    sock = socket.socket(socket.AF_INET if target.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        if target.version == 4 and target.is_loopback:
            with contextlib.suppress(OSError):  # macOS has no 127.0.2.x unless it is told so
                sock.bind((str(ipaddress.IPv4Address("127.0.2.1") + n), 0))
        sock.connect(to)
    except BaseException:
        sock.close()
        raise
    return sock


# --- The metadata API ------------------------------------------------------------------------------------------------


class ApiStats(NamedTuple):
    mode: str
    requests: int
    connections: int
    open: int
    strays: int
    """Requests for anything but a service: those who follow a redirect, say."""


def reply(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} -", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


class MetadataApi(InThread):
    """The API in a thread of its own: `with MetadataApi() as api: ask(api.url("orders-013"))`.

    `port`: 0 finds one, which is kept over `stop()` and `start()`. `slow`: seconds, for the modes that wait. `latency`:
    seconds before each right answer. `answers`: bodies to send for some services instead of the right ones.
    """

    name = "metadata api"

    def __init__(self, port: int = 0, host: str = "127.0.0.1", *, slow: float = 5.0, latency: float = 0.0) -> None:
        if not 0 <= port <= 65_535:
            raise ValueError(f"a port is a number up to 65535, not {port}")
        super().__init__()
        self.host, self.port, self.slow, self.latency = host, port, slow, latency
        self.answers: dict[str, bytes] = {}
        self._mode: Mode = "ok"
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._connections = self._strays = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._turned = asyncio.Event()

    def url(self, service: str = "{service}") -> str:
        """The address of a service, or the template of all."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/services/{service}"

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"a mode is one of {', '.join(get_args(Mode))}, not {mode!r}")
        self._mode = mode
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it was closed just now
                loop.call_soon_threadsafe(self._turn)

    @property
    def requests(self) -> Counter[str]:
        """How many requests each service had: a copy."""
        with self._lock:
            return Counter(self._requests)

    def stats(self) -> ApiStats:
        with self._lock:
            return ApiStats(self._mode, self._requests.total(), self._connections, len(self._open), self._strays)

    def __repr__(self) -> str:
        return f"<MetadataApi {'running' if self._thread else 'stopped'} at {self.url()}, {self.stats()}>"

    def _bind(self) -> list[socket.socket]:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.create_server((self.host, self.port), family=family, backlog=1024)
        self.port = sock.getsockname()[1]
        return [sock]

    @contextlib.asynccontextmanager
    async def _serve(self, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
        self._turned = asyncio.Event()
        server = await asyncio.start_server(self._converse, sock=sockets[0], limit=HEAD_LIMIT, backlog=1024)
        yield
        server.close()
        while self._open or len(asyncio.all_tasks()) > 1:
            for writer in list(self._open):
                writer.transport.abort()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

    def _turn(self) -> None:
        self._turned.set()
        self._turned = asyncio.Event()
        if self._mode == "down":
            for writer in self._open:
                writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._lock:
            self._connections += 1
            self._open.add(writer)
        try:
            going = self._mode != "down"
            while going:
                head = await reader.readuntil(b"\r\n\r\n")
                going = await self._answer(head, reader, writer)
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # cancelled only by our stop, and then this task ends here
        finally:
            writer.close()
            with self._lock:
                self._open.discard(writer)

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer a request as the mode says; False if the connection is to be closed."""
        words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
        if len(words) != 3 or words[0] != "GET":
            writer.write(reply(400, b'{"error": "a GET is needed"}', "Connection: close"))
            await writer.drain()
            return False
        prefix, _, name = words[1].partition("/services/")
        service = unquote(name, errors="surrogateescape")
        with self._lock:
            if prefix or not name:
                self._strays += 1
            else:
                self._requests[service] += 1
        given = b'{"team": "stray"}' if prefix or not name else self.answers.get(service)
        right = self._right(service) if given is None else reply(200, given)
        while self._mode == "held":
            await self._turned.wait()
        return await self._misbehave(self._mode, right, writer, reader)

    def _right(self, service: str) -> bytes:
        metadata = metadata_of(service)
        if metadata is None:
            return reply(404, b'{"error": "no such service"}')
        return reply(200, json.dumps({"service": service, **metadata}).encode("utf-8", "replace"))

    async def _misbehave(
        self, mode: Mode, right: bytes, writer: asyncio.StreamWriter, reader: asyncio.StreamReader
    ) -> bool:
        if mode == "down":
            return False
        if mode == "silent":
            await reader.read()
            return False
        if mode == "drip":
            for n in range(len(right)):
                writer.write(right[n : n + 1])
                await asyncio.sleep(self.slow / 10)
            return True
        if mode == "huge":
            writer.write(b"HTTP/1.1 200 -\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            chunk = b'{"team": "' + b"x" * 65_526
            while not writer.is_closing():
                writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await writer.drain()
                await asyncio.sleep(0)
            return False
        if mode == "truncated":
            writer.write(right[:-9])
            return False
        if delay := self.slow if mode == "slow" else self.latency:
            await asyncio.sleep(delay)
        elsewhere = f"Location: http://{self.host}:{self.port}/elsewhere"
        wrong = {
            "error": lambda: reply(500, b'{"error": "internal"}'),
            "busy": lambda: reply(503, b'{"error": "busy"}', "Retry-After: 1"),
            "refuse": lambda: reply(400, b'{"error": "no such name"}'),
            "rubbish": lambda: reply(200, b"<html><body>It works!</body></html>"),
            "types": lambda: reply(200, b'{"team": 7, "environment": ["test"], "region": {}, "version": 1.5}'),
            "not-utf8": lambda: reply(200, '{"team": "Zürich"}'.encode("latin-1")),
            "redirect": lambda: reply(302, b"", elsewhere),
        }
        writer.write(wrong[mode]() if mode in wrong else right)
        await writer.drain()
        return True


# --- The command line ------------------------------------------------------------------------------------------------


def parse_target(text: str) -> tuple[str, int]:
    """("127.0.0.1", 5514) from "127.0.0.1:5514", ("::1", 5514) from "[::1]:5514"."""
    host, _, port = text.rpartition(":")
    host = str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"{port!r} is no port")
    return host, int(port)


def main(argv: Sequence[str] | None = None) -> int:
    """Send until all is sent, or Ctrl-C or SIGTERM (exit code 130); see --help."""
    description = "Simulated services that send logs by UDP, and their metadata API."
    parser = argparse.ArgumentParser("python -m sandbox logs", description=description)
    parser.add_argument("--to", metavar="HOST:PORT", help="where to send to (default: nowhere, the API alone)")
    parser.add_argument("--rate", type=float, default=1000.0, metavar="R", help="events a second in all (%(default)s)")
    parser.add_argument("--seconds", type=float, metavar="S", help="send R * S events, and end (default: Ctrl-C)")
    parser.add_argument("--services", type=int, default=500, metavar="N", help="(%(default)s)")
    formats = f"of {', '.join(get_args(Format))} (%(default)s)"
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="F,F", help=formats)
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the events (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first serial number (%(default)s)")
    parser.add_argument("--metadata-port", type=int, metavar="P", help="serve the metadata API there (0: a free one)")
    parser.add_argument("--mode", default="ok", choices=get_args(Mode), help="of the API (%(default)s)")
    parser.add_argument("--slow", type=float, default=5.0, metavar="S", help="seconds, for some of these (%(default)s)")
    parser.add_argument("--stay", action="store_true", help="serve the API until Ctrl-C when all is sent")
    args = parser.parse_args(argv)
    senders: Senders | None = None
    try:
        if args.to is None and args.metadata_port is None:
            raise ValueError("--to or --metadata-port is needed")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.ExitStack() as stack:
            if args.metadata_port is not None:
                api = stack.enter_context(MetadataApi(args.metadata_port, slow=args.slow))
                api.mode = args.mode
                print(f"metadata at {api.url()}", file=sys.stderr, flush=True)
            if args.to is not None:
                total = None if args.seconds is None else round(args.rate * args.seconds)
                chosen = args.formats.split(",")
                senders = Senders(
                    parse_target(args.to),
                    rate=args.rate,
                    services=args.services,
                    total=total,
                    formats=chosen,
                    seed=args.seed,
                    first=args.first,
                )
                stack.enter_context(senders)
                senders.wait()
                tell(senders)
                senders = None
            if args.metadata_port is not None and (args.to is None or args.stay):
                threading.Event().wait()
    except KeyboardInterrupt:
        if senders is not None:
            senders.stop()  # it may have come before the stack knew of them
            tell(senders)
        return 130
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    except (ValueError, OverflowError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2
    return 0


def tell(senders: Senders) -> None:
    events, failed, refused, seconds, rate, late = senders.stats()
    print(
        f"sent {events:,} events in {seconds:.2f} s, {rate:,.0f}/s: {failed:,} failed, {refused:,} refused, "
        f"{late:.2f} s late",
        flush=True,
    )
