"""The exchanges of `sandbox.exchanges` as servers on loopback: one port, a path for each, with faults on demand.

Theory
------
* **`Market`** is pure: the n-th trade of a symbol at an exchange depends on the seed, the exchange, the symbol and n
  alone. All exchanges of a symbol walk the same closed random walk, each a little beside the others. So nothing need be
  kept: a connection holds, per symbol, the number of its next trade, and what a slow reader has not taken yet costs
  nothing: it is made when there is room, with the time at which it was due.
* **`ExchangeConnection`** plays one: the wire's answers, the trades that are due, and the faults. Frames are written
  to the transport by hand, all that are due in one piece: a WebSocket library would write them one by one, and would
  refuse to send most of the faults.
* **`Exchanges`** owns the port, the thread, the counts, and `fault` and `door`, by which a test makes an exchange
  misbehave.

Promised: what was sent is counted when it is written (`sent`; with `ledger`, by id); trades of a symbol are numbered
without holes while they happen, connected or not, so what an outage or a gap left out shows in the numbers; after
`stop()` no socket, task or thread is left. Not promised: that what was written arrived (a reset takes it back), other
channels than trades, TLS, limits on what a client may ask.

All connections live in one event loop in a thread of its own; the methods for others hand their work to that loop and
wait for it, so there is no lock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import math
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Literal, NamedTuple, TypeVar, get_args

from aiohttp import WSMsgType, web

from sandbox.exchanges import SECOND, WIRES, Wire
from sandbox.serving import InThread

T = TypeVar("T")

Fault = Literal[
    "close",  # a close frame (code=1001), then the end
    "drop",  # the end without a close frame
    "reset",  # RST
    "half",  # half of a trade's frame, then the end
    "stall",  # no frame any more, no answer, not even to a ping or a close
    "deaf",  # trades go on, whatever the client says: no answer, not even to a close
    "unknown",  # a message that no documentation has
    "wrong types",  # a trade whose price is neither number nor text
    "text",  # a trade whose numbers are text, or whose text is a number
    "not json",
    "not utf-8",
    "gap",  # n trades (1) that are never told
    "duplicate",  # the last trade again
    "swap",  # two trades in the wrong order
    "gzip",  # a trade in a binary frame, compressed
    "binary",  # a trade in a binary frame
    "fragments",  # a trade in three fragments with a ping between them
    "error",  # an error message
    "maintenance",  # the announcement, if the exchange has one, then a close frame (code=1012; 0: none)
    "huge",  # a text frame of `size` bytes (8 MiB), and nothing after it
    "reserved",  # a frame with reserved bits set, and nothing after it
    "ping",  # a ping of the protocol
]
Door = Literal[
    "open",
    "503",
    "429",  # each with Retry-After if `retry_after` is given
    "page",  # 200 and an HTML page instead of the handshake
    "slow",  # the handshake takes `seconds`
    "reset",  # the connection is reset in the handshake
    "mute",  # no answer to any subscription
    "deny",  # an error to every subscription
    "close",  # a close frame right after the handshake
]

WALK = 4096  # trades until a symbol's walk begins again
FIRST = 1000  # trades that have happened before the servers start: what snapshots tell of
AT_ONCE = 2000  # trades of a symbol that a connection writes in one turn
BUFFER_LIMIT = 1 << 20  # bytes in a transport's buffer above which nothing more is written
HEARD = 1000  # messages of clients that are kept, the newest
PRICES = {"BTC": 64_000.0, "ETH": 3_200.0, "SOL": 150.0, "BNB": 600.0, "XRP": 0.6, "ADA": 0.4, "DOGE": 0.15}
_CURRENCY = re.compile(r"USD[TC]?")


# ------------------------------------------------------------------------------------------ pure


def frame(payload: bytes, opcode: int = 1, *, fin: bool = True, reserved: int = 0) -> bytes:
    """A WebSocket frame from a server: not masked."""
    first, size = (0x80 if fin else 0) | reserved << 4 | opcode, len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65_536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


class Tape(NamedTuple):
    """What a symbol's trades at one exchange look like: trade n has entry n modulo the length of each."""

    prices: list[str]
    sizes: list[str]
    sides: list[str]


class Market:
    """The trades of all symbols at all exchanges."""

    def __init__(self, seed: int = 1) -> None:
        self.seed = seed
        self._walks: dict[str, list[float]] = {}
        self._tapes: dict[tuple[str, str, str], Tape] = {}

    def _walk(self, base: str) -> list[float]:
        """The price common to all exchanges: a random walk that ends where it began."""
        if base not in self._walks:
            rng = random.Random(f"{self.seed}/{base}")
            at, walk = 0.0, []
            for _ in range(WALK):
                at += rng.gauss(0.0, 1e-4)
                walk.append(at)
            start = PRICES.get(base, 100.0)
            self._walks[base] = [start * math.exp(x - at * (n + 1) / WALK) for n, x in enumerate(walk)]
        return self._walks[base]

    def tape(self, exchange: str, base: str, currency: str) -> Tape:
        key = (exchange, base, currency)
        if key not in self._tapes:
            rng, walk = random.Random(f"{self.seed}/{exchange}/{base}/{currency}"), self._walk(base)
            beside, digits = 1.0 + rng.uniform(-1e-4, 1e-4), 2 if walk[0] >= 10 else 5
            sides = [rng.choice(("buy", "sell")) for _ in range(WALK)]
            prices = [
                f"{price * beside * (1.00002 if side == 'buy' else 0.99998):.{digits}f}"
                for price, side in zip(walk, sides, strict=True)
            ]
            sizes = [f"{max(1e-5, min(rng.lognormvariate(-3.0, 1.5), 90.0)):.5f}" for _ in range(1021)]
            self._tapes[key] = Tape(prices, sizes, sides)
        return self._tapes[key]


Ticks = list[tuple[str, str, str, int, int]]


def ticks(tape: Tape, numbers: range, when: Callable[[int], int]) -> Ticks:
    """Trades by number, from 0. An id is the number plus one."""
    prices, sizes, sides = tape
    return [(prices[n % WALK], sizes[n % 1021], sides[n % WALK], n + 1, when(n)) for n in numbers]


def other_types(text: str, price: str, other: Callable[[bool], str]) -> str:
    """A frame with its price replaced, wherever it stands; `other` is told whether it was in quotation marks."""
    quoted, bare = f'"{price}"', re.compile(rf'(?<![\d."]){re.escape(price)}(?![\d."])')
    if quoted not in text:
        return bare.sub(lambda _: other(False), text)
    return bare.sub("null", text).replace(quoted, other(True))  # Bitstamp has both


# ------------------------------------------------------------------------------------------ servers


class ExchangeStats(NamedTuple):
    """Of one exchange, since the start."""

    open: int  # connections
    accepted: int
    turned_away: int  # handshakes
    frames: int  # written, of any kind
    sent: int  # trades written in whole frames
    cut: int  # trades of which half a frame was written
    heard: int  # messages of clients
    pings: int  # of the protocol, from clients
    pongs: int
    closes: tuple[int, ...]  # the codes of the close frames that clients sent, the newest 1000


class ExchangeState:
    """What the servers know of one exchange."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.door: Door = "open"
        self.seconds = 0.0
        self.retry_after: float | None = None
        self.connections: list[ExchangeConnection] = []
        self.released = FIRST  # trades of each symbol that `emit` made
        self.extra: Counter[str] = Counter()  # trades that faults made, by native symbol
        self.accepted = self.turned_away = self.frames = self.cut = self.pings = self.pongs = self.messages = 0
        self.sent: Counter[str] = Counter()
        self.ledger: dict[str, array[int]] = {}
        self.heard: deque[str | bytes] = deque(maxlen=HEARD)
        self.closes: deque[int] = deque(maxlen=HEARD)
        self.arrivals: deque[float] = deque(maxlen=HEARD)

    def stats(self) -> ExchangeStats:
        return ExchangeStats(
            *(len(self.connections), self.accepted, self.turned_away, self.frames, self.sent.total(), self.cut),
            *(self.messages, self.pings, self.pongs, tuple(self.closes)),
        )


class ExchangeConnection:
    """One client at one exchange."""

    def __init__(
        self, exchanges: Exchanges, place: ExchangeState, ws: web.WebSocketResponse, transport: asyncio.Transport
    ) -> None:
        self._all, self.place, self._ws, self._transport = exchanges, place, ws, transport
        self.wire: Wire = WIRES[place.name]()
        self._next: dict[str, int] = {}  # native symbol -> number of the next trade
        self._tapes: dict[str, Tape] = {}
        self.stalled = self.deaf = False
        self.over = False

    def write(self, *frames: bytes) -> None:
        if not (self.over or self.stalled or self._transport.is_closing()):
            self.place.frames += len(frames)
            self._transport.write(b"".join(frames))

    def say(self, texts: Sequence[str]) -> None:
        if texts:
            self.write(*(frame(text.encode()) for text in texts))

    def hear(self, message: str | bytes) -> None:
        """A client's message: an answer, and for a subscription the snapshot too."""
        place = self.place
        place.messages += 1
        place.heard.append(message)
        natives = self.wire.symbols_of(message)
        if self.deaf or (natives and place.door == "mute"):
            return
        tapes = {native: tape for native in natives if (tape := self._all.tape(self.wire, native)) is not None}
        if place.door == "deny" or len(tapes) < len(natives):
            self.say(self.wire.error("Currency pair not supported" if natives else "not now"))
            return
        self.say(self.wire.acks(message))
        for native, tape in tapes.items():
            if native not in self._next:
                due = self._next[native] = self._all.due(place, native)
                self._tapes[native] = tape
                past = range(max(0, due - self._all.history), due)
                self.say(self.wire.snapshot(native, ticks(tape, past, self._all.when)))

    def pump(self) -> None:
        """Write the trades that are due, if there is room."""
        if self.over or self.stalled or self._transport.get_write_buffer_size() > BUFFER_LIMIT:
            return
        frames: list[str] = []
        for native, number in self._next.items():
            last = min(self._all.due(self.place, native), number + AT_ONCE)
            for at in range(number, last, self.wire.per_frame if self.wire.per_frame > 1 else AT_ONCE):
                end = min(last, at + self.wire.per_frame) if self.wire.per_frame > 1 else last
                frames += self._told(native, range(at, end))
        if frames:
            self.write(*[frame(text.encode()) for text in frames])

    def _told(self, native: str, numbers: range) -> list[str]:
        """The frames of trades that will be written, and counted."""
        made = ticks(self._tapes[native], numbers, self._all.when)
        self._next[native] = max(self._next[native], numbers.stop)
        self.place.sent[native] += len(made)
        if self._all.ledger:
            self.place.ledger.setdefault(native, array("q")).extend(tick[3] for tick in made)
        return self.wire.trades(native, made)

    def _one(self) -> tuple[list[bytes], str]:
        """The next trade of the first symbol: its frames, and its price. It happens in addition to those due."""
        native = next(iter(self._next))
        number = self._next[native]
        self.place.extra[native] += 1
        price = self._tapes[native].prices[number % WALK]
        return [text.encode() for text in self._told(native, range(number, number + 1))], price

    def fault(self, name: Fault, *, code: int | None = None, n: int = 1, size: int = 8 << 20) -> None:
        """Do it, now."""
        if name in ("wrong types", "text", "half", "gzip", "binary", "fragments", "duplicate", "gap", "swap"):
            if not self._next:
                return
            getattr(self, "_" + name.replace(" ", "_"))(n)
        elif name == "close" or name == "maintenance":
            if name == "maintenance":
                self.say(self.wire.maintenance())
            code = (1012 if name == "maintenance" else 1001) if code is None else code
            if code:
                self.write(frame(struct.pack("!H", code), 8))
                self.over = True
        elif name == "drop":
            self.over = True
            self._transport.close()
        elif name == "reset":
            self.over = True
            _reset(self._transport)
        elif name == "stall":
            self.stalled = True
        elif name == "deaf":
            self.deaf = True
        elif name == "unknown":
            self.say(['{"surprise":{"of":[1,2,3]}}'])
        elif name == "not json":
            self.say(["<html>502 Bad Gateway</html>"])
        elif name == "not utf-8":
            self.write(frame(b'{"e":"\xff\xfe"}'))
        elif name == "error":
            self.say(self.wire.error())
        elif name == "huge":
            self.write(frame(b'"' + b"x" * (size - 2) + b'"'))
            self.over = True
        elif name == "reserved":
            self.write(frame(b"{}", reserved=7))
            self.over = True
        else:
            self.write(frame(b"are you there?", 9))

    def _uncount(self) -> None:
        """The trade that `_one` gave was not told as such."""
        native = next(iter(self._next))
        self.place.sent[native] -= 1
        if self._all.ledger:
            self.place.ledger[native].pop()

    def _wrong_types(self, _: int) -> None:
        frames, price = self._one()
        self.write(*(frame(other_types(each.decode(), price, lambda _: "true").encode()) for each in frames))

    def _text(self, _: int) -> None:
        frames, price = self._one()
        turned = (other_types(each.decode(), price, lambda q: price if q else f'"{price}"') for each in frames)
        self.write(*(frame(each.encode()) for each in turned))

    def _half(self, _: int) -> None:
        frames, _price = self._one()
        self._uncount()
        self.place.cut += 1
        whole = frame(frames[0])
        self._transport.write(whole[: len(whole) // 2])
        self.over = True
        self._transport.close()

    def _gzip(self, _: int) -> None:
        self.write(*(frame(gzip.compress(each, mtime=0), 2) for each in self._one()[0]))

    def _binary(self, _: int) -> None:
        self.write(*(frame(each, 2) for each in self._one()[0]))

    def _fragments(self, _: int) -> None:
        parts = []
        for each in self._one()[0]:
            third = len(each) // 3
            parts += [frame(each[:third], 1, fin=False), frame(b"", 9)]
            parts += [frame(each[third : 2 * third], 0, fin=False), frame(each[2 * third :], 0)]
        self.write(*parts)

    def _gap(self, n: int) -> None:
        """For frames that are numbered over the connection, the numbers are used up too."""
        native = next(iter(self._next))
        number = self._next[native]
        self.place.extra[native] += n
        self.wire.trades(native, ticks(self._tapes[native], range(number, number + n), self._all.when))
        self._next[native] = number + n

    def _duplicate(self, _: int) -> None:
        """The last trade, as if it were the next."""
        native = next(iter(self._next))
        number, tape = self._next[native] - 1, self._tapes[native]
        self.say(self.wire.trades(native, ticks(tape, range(number, number + 1), self._all.when)))

    def _swap(self, _: int) -> None:
        native = next(iter(self._next))
        number = self._next[native]
        self.place.extra[native] += 2
        self.say(self._told(native, range(number + 1, number + 2)))
        self.say(self._told(native, range(number, number + 1)))


def _reset(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class Exchanges(InThread):
    """The servers: `with Exchanges(rate=15_000) as them: connect(them.urls["kraken"])`.

    `rate`: trades a second, of all exchanges and symbols together; 0: none but those of `emit`. `exchanges`: which.
    `symbols`: what is traded, BASE-QUOTE; USD stands for USDT and USDC too. `seed`: prices and sizes. `port`: 0 finds
    one. `heartbeat`: seconds between the heartbeats of those that send any; 0: none. `beat`: seconds between two looks
    at what is due. `history`: trades in a snapshot, at most (each wire has its own limit). `ledger`: keep the ids of
    all trades that were sent (8 bytes each). `send_buffer`: bytes of the sockets' (None: the system's).
    Raises ValueError for impossible arguments, OSError from `start`.
    """

    name = "exchanges"

    def __init__(
        self,
        *,
        rate: float = 0.0,
        symbols: Sequence[str] = ("BTC-USD", "ETH-USD", "SOL-USD"),
        exchanges: Sequence[str] = tuple(WIRES),
        seed: int = 1,
        host: str = "127.0.0.1",
        port: int = 0,
        heartbeat: float = 1.0,
        beat: float = 0.02,
        history: int = 20,
        ledger: bool = False,
        send_buffer: int | None = None,
    ) -> None:
        if not (rate >= 0 and symbols and exchanges and 0 <= port <= 65_535 and heartbeat >= 0 and beat > 0):
            raise ValueError("needed: symbols, exchanges, a port up to 65535, no negative rate or heartbeat, a beat")
        if unknown := set(exchanges) - set(WIRES):
            raise ValueError(f"no such exchange: {', '.join(sorted(unknown))}")
        super().__init__()
        self.rate, self.seed, self.host, self.port, self.history = rate, seed, host, port, history
        self.ledger, self._heartbeat, self._beat, self._send_buffer = ledger, heartbeat, beat, send_buffer
        self._pairs = {self._pair(*symbol.split("-")) for symbol in symbols}
        self._each = rate / len(exchanges) / len(self._pairs)
        self._market = Market(seed)
        self._places = {name: ExchangeState(name, number) for number, name in enumerate(exchanges)}
        self._began = 0.0  # of the loop's clock
        self._began_ns = 0
        self._most = sys.maxsize  # trades of a symbol that come by time

    @staticmethod
    def _pair(base: str, currency: str) -> tuple[str, str]:
        return base, _CURRENCY.sub("USD", currency)

    @property
    def urls(self) -> dict[str, str]:
        return {name: f"ws://{self.host}:{self.port}/{name}" for name in self._places}

    def __repr__(self) -> str:
        return f"<Exchanges {'running' if self._thread else 'stopped'} at ws://{self.host}:{self.port}/, {self.rate}/s>"

    # What connections ask.

    def tape(self, wire: Wire, native: str) -> Tape | None:
        """None if it is not traded here."""
        with contextlib.suppress(ValueError):
            base, currency = wire.pair(native)
            if self._pair(base, currency) in self._pairs:
                return self._market.tape(wire.name, base, currency)
        return None

    def due(self, place: ExchangeState, native: str) -> int:
        """How many trades of a symbol have happened."""
        by_time = int((self._loop.time() - self._began) * self._each) if self._each and self._loop is not None else 0
        return place.released + place.extra[native] + min(by_time, self._most)

    def when(self, number: int) -> int:
        """When a trade happened, ns of Unix time. Without a rate they are a millisecond apart."""
        return self._began_ns + int((number + 1 - FIRST) / (self._each or 1e3) * SECOND)

    # What others ask, from any thread.

    def pace(self, rate: float, seconds: float) -> int:
        """So many trades a second from now on, for so many seconds; how many of each symbol at each exchange that is.

        For servers that were made without a rate and told no trade yet. ValueError for impossible arguments.
        """
        if self._each or not (rate > 0 and seconds > 0):
            raise ValueError("needed: servers without a rate, a rate and a time above 0")

        def do() -> int:
            assert self._loop is not None
            self._each = rate / len(self._places) / len(self._pairs)
            self._most = round(self._each * seconds)
            self._began, self._began_ns = self._loop.time(), time.time_ns()
            return self._most

        return self._ask(do)

    def emit(self, n: int = 1, *exchanges: str) -> None:
        """`n` trades of each symbol happen now (at all exchanges unless some are named), and are written."""

        def do() -> None:
            for name in exchanges or self._places:
                place = self._places[name]
                place.released += n
                for connection in place.connections:
                    connection.pump()

        self._ask(do)

    def fault(self, exchange: str, name: Fault, **options: int) -> int:
        """Play a fault on all connections of an exchange; how many there were. Options: `code`, `n`, `size`."""
        if name not in get_args(Fault):
            raise ValueError(f"a fault is one of {', '.join(get_args(Fault))}, not {name!r}")

        def do() -> int:
            found = [each for each in self._places[exchange].connections if not each.over]
            for connection in found:
                connection.fault(name, **options)
            return len(found)

        return self._ask(do)

    def door(self, exchange: str, door: Door, *, seconds: float = 5.0, retry_after: float | None = None) -> None:
        """How new connections are received from now on."""
        if door not in get_args(Door):
            raise ValueError(f"a door is one of {', '.join(get_args(Door))}, not {door!r}")

        def do() -> None:
            place = self._places[exchange]
            place.door, place.seconds, place.retry_after = door, seconds, retry_after

        self._ask(do)

    def sent(self, exchange: str) -> dict[str, int]:
        """Trades written, by the exchange's name for the symbol; not snapshots, gaps, halves, repetitions."""
        return self._ask(lambda: {name: count for name, count in self._places[exchange].sent.items() if count})

    def sent_ids(self, exchange: str) -> dict[str, list[str]]:
        """With `ledger`: the ids of those, as the frames write them."""
        wire = WIRES[exchange]()
        ids = self._ask(lambda: {name: ids.tolist() for name, ids in self._places[exchange].ledger.items()})
        return {name: [wire.trade_id(number) for number in each] for name, each in ids.items()}

    def heard(self, exchange: str) -> list[str | bytes]:
        """What clients said, the newest 1000."""
        return self._ask(lambda: list(self._places[exchange].heard))

    def arrivals(self, exchange: str) -> list[float]:
        """When handshakes began, of `time.monotonic`, the newest 1000."""
        return self._ask(lambda: list(self._places[exchange].arrivals))

    def stats(self) -> dict[str, ExchangeStats]:
        return self._ask(lambda: {name: place.stats() for name, place in self._places.items()})

    def _ask(self, question: Callable[[], T]) -> T:
        loop = self._loop
        if loop is None:
            return question()
        answer: Future[T] = Future()

        def do() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        loop.call_soon_threadsafe(do)
        return answer.result(30.0)

    # The server.

    def _bind(self) -> list[socket.socket]:
        sock = socket.create_server((self.host, self.port), backlog=1024)
        self.port = sock.getsockname()[1]
        if self._send_buffer is not None:  # those of its connections inherit it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        return [sock]

    @contextlib.asynccontextmanager
    async def _serve(self, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/{exchange}", self._receive)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, sockets[0], backlog=1024).start()
        self._began, self._began_ns = asyncio.get_running_loop().time(), time.time_ns()
        beating = asyncio.create_task(self._pulse())
        yield
        beating.cancel()
        for place in self._places.values():
            for connection in place.connections:
                connection.over = True
                connection._transport.abort()
        await runner.cleanup()

    async def _pulse(self) -> None:
        """Trades at every beat, heartbeats now and then."""
        loop = asyncio.get_running_loop()
        beat, hearts = loop.time(), loop.time() + self._heartbeat
        while True:
            beat = max(beat + self._beat, loop.time() + 0.001)
            await asyncio.sleep(beat - loop.time())
            live = [each for place in self._places.values() for each in place.connections if not each.over]
            if self._heartbeat and loop.time() >= hearts:
                hearts += self._heartbeat
                for connection in live:
                    if connection._next:
                        connection.say(connection.wire.heartbeat())
            if self._each:
                for connection in live:
                    connection.pump()
                    await asyncio.sleep(0)

    async def _receive(self, request: web.Request) -> web.StreamResponse:
        place, transport = self._places.get(request.match_info["exchange"]), request.transport
        if place is None or transport is None:
            raise web.HTTPNotFound
        place.arrivals.append(time.monotonic())
        if place.door in ("503", "429", "page", "reset"):
            place.turned_away += 1
            if place.door == "reset":
                _reset(transport)
                return web.Response()
            if place.door == "page":
                return web.Response(text="<h1>We will be back soon</h1>", content_type="text/html")
            after = {} if place.retry_after is None else {"Retry-After": f"{place.retry_after:g}"}
            return web.Response(status=int(place.door), headers=after)
        if place.door == "slow":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._halted.wait(), place.seconds)
        ws = web.WebSocketResponse(autoping=False, autoclose=False, compress=False, timeout=0.5)
        try:
            await ws.prepare(request)
        except (OSError, RuntimeError):
            return ws  # the client has gone
        place.accepted += 1
        connection = ExchangeConnection(self, place, ws, transport)
        place.connections.append(connection)
        try:
            connection.say(connection.wire.welcome())
            if place.door == "close":
                connection.fault("close", code=1013)
            await self._converse(connection, ws, transport)
        finally:
            place.connections.remove(connection)
        return ws

    async def _converse(
        self, connection: ExchangeConnection, ws: web.WebSocketResponse, transport: asyncio.Transport
    ) -> None:
        place = connection.place
        while True:
            message = await ws.receive()
            if message.type is WSMsgType.TEXT or message.type is WSMsgType.BINARY:
                connection.hear(message.data)
            elif message.type is WSMsgType.PING:
                place.pings += 1
                connection.write(frame(bytes(message.data), 10))
            elif message.type is WSMsgType.PONG:
                place.pongs += 1
            else:
                if message.type is WSMsgType.CLOSE:
                    place.closes.append(message.data or 0)
                break
        while (connection.stalled or connection.deaf) and not transport.is_closing():  # noqa: ASYNC110  -- nothing tells us
            await asyncio.sleep(0.02)
        if not connection.over:
            connection.write(frame(struct.pack("!H", ws.close_code or 1000), 8))
        connection.over = True
        transport.close()


def main(argv: Sequence[str] | None = None) -> None:
    description = "Simulated exchanges; their addresses are printed as one line of JSON."
    parser = argparse.ArgumentParser("python -m sandbox exchanges", description=description)
    parser.add_argument("--rate", type=float, default=1000.0, help="trades a second in all (%(default)s)")
    parser.add_argument("--symbols", default="BTC-USD,ETH-USD,SOL-USD", help="BASE-QUOTE, ... (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="0: any (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of prices and sizes (%(default)s)")
    options = parser.parse_args(argv)
    halt = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: halt.set())
    symbols = options.symbols.split(",")
    with Exchanges(rate=options.rate, symbols=symbols, port=options.port, seed=options.seed) as them:
        print(json.dumps(them.urls), flush=True)
        halt.wait()
        print(json.dumps({name: each.sent for name, each in them.stats().items()}), flush=True)
