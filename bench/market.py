"""``python -m bench market``: trades of simulated exchanges into Kafka, beside cryptofeed; and a minute of steady load.

Theory
------
* **Each step is a life of its own**: a fresh broker (or topics of their own on that of ``--kafka``), fresh exchanges, a
  fresh contestant, which connects to all of them and waits; then so many trades at one rate for some seconds. The n-th
  trade of a symbol has number n in its id, so which of them are in Kafka, and how often, is counted exactly.
* **A rate holds** if each trade is in Kafka once, and all of them by `DRAIN` seconds after the last: a lag that grows
  does not end with the sending. The ladder and the halvings are those of ``bench_ingest``.
* **End to end** is from the time that the exchange wrote into the trade, when it was due, until a consumer can read it.
  That is seen from the partitions' high watermarks, every `LOOK` seconds, so it is at most that much too long; the
  records themselves are read when all is over, for a consumer of 15,000 records/s would need a processor of its own.
  The exchanges look what is due every 20 ms: 10 ms on average, and their own want of a processor, are in the figure;
  so is the broker for development, which every few seconds writes all that it holds to disk, and holds ever more.
  **From receipt**: likewise, from the time that the contestant noted when the frame came.
* **The contestants**: ``market_pipeline`` as its user starts it, ten exchanges, figures and all (no option leaves them
  out); ``market_pipeline-7``, the same with the exchanges of the next ones only, at the same rates in all;
  ``cryptofeed``, its FeedHandler with its TradeKafka for each feed, as its documentation shows it;
  ``cryptofeed-batched``, the same with the writer that TradeKafka lacks: one for all feeds, which does not wait for the
  answer to each record before it sends the next, and has the settings of ours (acks=all, idempotent, 5 ms, zstd).
* **What cryptofeed does not do** of it: no rolling figures, no dead letters, no labels for gaps and repetitions (at a
  gap of Bitfinex it connects anew), no spool, no bound of its queues (they grow while Kafka is slow or away), no key by
  symbol. Prices become floats in its records.

Seven of the exchanges: cryptofeed's classes speak to the simulation unchanged at Bitstamp, OKX, Bybit, Bitfinex,
Gemini, Gate.io and BitMEX. At the other three they speak another protocol than our adapters and thus the simulation:
aggregate trades, named in the URL, at Binance; the Advanced Trade API, which needs keys, at Coinbase; version 1 of
Kraken's. In its process two things are replaced: the symbols that it would ask the REST interfaces for, and
``wss://`` of its addresses, as the simulation has no TLS.

Promised: all traffic stays on 127.0.0.0/8 (but for ``--kafka``), all children are ended by their id, and topics made on
``--kafka`` are deleted. Raises SystemExit if the soak does not hold what is promised for market_pipeline.py. Everything
is in one thread and one event loop but what waits for children; Linux only, as memory is read from /proc.

`bench/market.py exchanges SYMBOLS EXCHANGES` and `bench/market.py NAME BROKER PREFIX URLS` are the other processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bench.ingest import READY, Search, cpu_of, ladder, memory_of, wait_for
from market.topics import ANALYTICS, TRADES
from sandbox.broker import CONTROL, Broker
from sandbox.exchanges import WIRES
from sandbox.markets import FIRST, Exchanges

HERE = Path(__file__).resolve().parents[1]
Row = dict[str, object]

SYMBOLS = ("BTC-USD", "ETH-USD", "SOL-USD")
DRAIN = 1.0
"""Seconds after the last trade by which all of them must be in Kafka."""
PATIENCE = 4.0
"""Seconds after which nobody waits for them any more."""
LOOK = 0.01
"""Seconds between two looks at what can be read."""
STEADY = 0.3
"""Seconds without a new record after which snapshots and greetings are over."""
HELD_BACK = 0.9
"""Share of the wanted rate below which the exchanges did not do it."""
STOP = 12.0
"""Seconds that a contestant has to end."""
SOAK_P99, SOAK_GROWTH = 0.25, 1.25
"""What a soak must hold: seconds end to end; growth of memory after 10 s."""
SECOND = 1_000_000_000

NATIVE: dict[str, tuple[str, str, str]] = {
    "bitstamp": ("BITSTAMP", "{}-USD", "{}usd"),
    "okx": ("OKX", "{}-USDT", "{}-USDT"),
    "bybit": ("BYBIT", "{}-USDT", "{}/USDT"),
    "bitfinex": ("BITFINEX", "{}-USD", "t{}USD"),
    "gemini": ("GEMINI", "{}-USD", "{}USD"),
    "gateio": ("GATEIO", "{}-USDT", "{}_USDT"),
    "bitmex": ("BITMEX", "{}-USD-PERP", "{}USD"),
}
"""Of cryptofeed: its name for an exchange, for a symbol there, and what the exchange calls it."""
EVENT_IDS = {"GEMINI": 7}
"""Where it keeps another number than the trade's: by how much that is greater in the simulation."""
OURS = {"market_pipeline": tuple(WIRES), "market_pipeline-7": tuple(NATIVE)}
PEERS = {"cryptofeed": tuple(NATIVE), "cryptofeed-batched": tuple(NATIVE)}


# -------------------------------------------------------------------------------------------------- other processes


def exchanges(symbols: Sequence[str], names: Sequence[str]) -> None:
    """The simulated exchanges. A line "RATE SECONDS" starts them once; what happens is printed as JSON."""

    def unasked(them: Exchanges) -> set[str]:
        """Exchanges that nobody asked for all symbols yet."""
        return {
            name
            for name in names
            if len({each for said in them.heard(name) for each in WIRES[name]().symbols_of(said)}) < len(symbols)
        }

    with Exchanges(symbols=symbols, exchanges=names) as them:
        print(json.dumps(them.urls), flush=True)
        rate, seconds = map(float, sys.stdin.readline().split())
        deadline = time.monotonic() + READY
        while missing := unasked(them):
            if time.monotonic() > deadline:
                raise SystemExit(f"bench: market: nobody subscribed at {', '.join(sorted(missing))}")
            time.sleep(0.05)
        each = them.pace(rate, seconds)
        begun, total = time.time(), each * len(names) * len(symbols)
        print(json.dumps({"begun": begun, "each": each}), flush=True)
        while True:
            sent = sum(each.sent for each in them.stats().values())
            took = time.time() - begun
            if (sent >= total and took >= seconds) or took > seconds + PATIENCE:
                break
            time.sleep(0.02)
        print(json.dumps({"sent": sent, "took": took}), flush=True)
        sys.stdin.read()


def cryptofeed(name: str, broker: str, prefix: str, urls: Mapping[str, str]) -> None:
    """The peer; says "ready" when it reads from all exchanges and is connected to Kafka."""
    import cryptofeed.connection as connection
    from cryptofeed import FeedHandler
    from cryptofeed.backends.kafka import TradeKafka
    from cryptofeed.connection import WebsocketEndpoint
    from cryptofeed.defines import TRADES as CHANNEL
    from cryptofeed.exchanges import EXCHANGE_MAP
    from cryptofeed.symbols import Symbols

    class Batched(TradeKafka):
        async def writer(self) -> None:
            await self._connect()
            while self.running:
                async with self.read_queue() as updates:
                    for update in updates:
                        value, key = self._default_serializer(update), self._default_serializer(self.key)
                        await self.producer.send(self.topic(update), value, key)
            await self.producer.stop()

    options = {"key": prefix + TRADES, "bootstrap_servers": broker}
    like_ours = {"acks": "all", "enable_idempotence": True, "linger_ms": 5, "compression_type": "zstd"}
    shared = Batched(**options, **like_ours) if name == "cryptofeed-batched" else None
    open_tls, plain = connection.connect, dict[str, str]()
    connection.connect = lambda address, **more: open_tls(plain[address], **more)
    handler, callbacks = FeedHandler(), []
    for exchange, url in urls.items():
        identity, symbol, native = NATIVE[exchange]
        bases = [each.partition("-")[0] for each in SYMBOLS]
        known = {symbol.format(base): native.format(as_named(exchange, base)) for base in bases}
        Symbols.set(identity, known, {"instrument_type": dict.fromkeys(known, "spot")})
        kind = EXCHANGE_MAP[identity]
        address = (
            "wss" + url.removeprefix("ws") + ("/spot" if exchange == "bybit" else "")
        )  # it takes the market from it
        plain[address] = url
        kept = kind.websocket_endpoints[1 if exchange == "bybit" else 0]
        kind.websocket_endpoints = [
            WebsocketEndpoint(address, channel_filter=kept.channel_filter, options=kept.options)
        ]
        callbacks.append(shared or TradeKafka(**options))
        handler.add_feed(kind(symbols=list(known), channels=[CHANNEL], callbacks={CHANNEL: callbacks[-1]}))

    async def say_ready() -> None:
        while True:
            handlers = [each for feed in handler.feeds for each in feed.connection_handlers]
            reading = len(handlers) == len(urls) and all(each.conn.received for each in handlers)
            if reading and all(callback.running for callback in callbacks):
                print("ready", flush=True)
                return
            await asyncio.sleep(0.05)

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # it takes the thread's, and a newer uvloop makes none by itself
    ready = loop.create_task(say_ready())
    handler.run()
    ready.cancel()


def as_named(exchange: str, base: str) -> str:
    if exchange == "bitmex":
        return "XBT" if base == "BTC" else base
    return base.lower() if exchange == "bitstamp" else base


def topics_of(name: str, prefix: str) -> list[str]:
    """Where a contestant writes trades."""
    if name in OURS:
        return [prefix + TRADES]
    bases = [each.partition("-")[0] for each in SYMBOLS]
    return [f"{prefix}{TRADES}-{who}-{symbol.format(base)}" for who, symbol, _ in NATIVE.values() for base in bases]


# ---------------------------------------------------------------------------------------------------- the contestants


class Contestant:
    """A running one. ``code`` is there when it has ended by itself."""

    def __init__(self, process: subprocess.Popen[bytes], health: Callable[[], Any]) -> None:
        self.process, self.health = psutil.Process(process.pid), health
        self.code: int | None = None

    def cpu(self) -> tuple[float, float]:
        """Seconds: its own, and those of its children."""
        own = sum(self.process.cpu_times()[:2])
        return own, cpu_of(self.process) - own


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes], contestant: Contestant) -> Iterator[Contestant]:
    """Stopped as its user would when the block is left."""
    yield contestant
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        contestant.code = process.wait(STOP)


@contextlib.contextmanager
def ours(folder: Path, broker: str, prefix: str, urls: Mapping[str, str], more: str) -> Iterator[Contestant]:
    from bench import runner as bench

    http = bench.free_port()
    words: list[object] = [sys.executable, HERE / "market_pipeline.py", "--kafka", broker, "--prefix", prefix]
    words += ["--symbols", ",".join(SYMBOLS), "--exchanges", ",".join(urls), "--spool", folder / "spool"]
    words += ["--http", f"127.0.0.1:{http}", *more.split()]
    words += [word for name, url in urls.items() for word in ("--url", f"{name}={url}")]

    def health() -> Any:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{http}/health", timeout=5) as said:
            return json.load(said)
        return None

    def is_there() -> bool:
        found = health()
        if found is None or found["kafka"] != "connected" or not found["workers"]:
            return False
        return all(feed["state"] == "live" for feed in found["feeds"].values())

    with open(folder / "log", "a+") as log, bench.child(words, stdout=log, stderr=log) as process:
        wait_for(is_there, process, folder / "log")
        with ended(process, Contestant(process, health)) as contestant:
            yield contestant


@contextlib.contextmanager
def theirs(name: str, folder: Path, broker: str, prefix: str, urls: Mapping[str, str]) -> Iterator[Contestant]:
    from bench import runner as bench

    words = [*bench.module("bench.market"), name, broker, prefix, json.dumps(urls)]
    said = folder / "said"
    with (
        open(said, "wb") as out,
        open(folder / "log", "a+") as log,
        bench.child(words, stdout=out, stderr=log, cwd=folder) as process,  # its log file goes where it stands
    ):
        wait_for(lambda: b"ready" in said.read_bytes(), process, folder / "log")
        with ended(process, Contestant(process, lambda: None)) as contestant:
            yield contestant


# --------------------------------------------------------------------------------------------------- what is in Kafka


class Marks:
    """From when on the offsets of a partition could be read."""

    def __init__(self) -> None:
        self._ends, self._seen = array("q"), array("q")
        self._at = 0

    def note(self, end: int, now_ns: int) -> None:
        if not self._ends or end > self._ends[-1]:
            self._ends.append(end)
            self._seen.append(now_ns)

    def readable(self, offset: int) -> int:
        """Unix time, ns. Offsets are asked for in ascending order, and none that was not seen."""
        while self._ends[self._at] <= offset:
            self._at += 1
        return self._seen[self._at]


class Ledger:
    """Which trades of those that were sent are there; ``each``: how many of each symbol at each exchange."""

    def __init__(self, each: int, pairs: int) -> None:
        self._each, self._pairs = each, pairs
        self._seen: dict[tuple[str, str], bytearray] = {}
        self.repeated = self.others = 0
        self.whole, self.inside = array("d"), array("d")
        """Seconds end to end, and from receipt."""

    def take(self, exchange: str, symbol: str, trade_id: str, sent: float, received: float, readable: float) -> None:
        seen = self._seen.get((exchange, symbol))
        if seen is None:
            seen = self._seen[exchange, symbol] = bytearray(self._each)
        number = int(trade_id[-12:], 16) if "-" in trade_id else int(trade_id) - EVENT_IDS.get(exchange, 0)
        place = number - FIRST - 1
        if not 0 <= place < self._each:
            self.others += 1  # of a snapshot
        elif seen[place]:
            self.repeated += 1
        else:
            seen[place] = 1
            self.whole.append(readable - sent)
            self.inside.append(readable - received)

    @property
    def missing(self) -> int:
        return self._each * self._pairs - len(self.whole)


def share(values: Sequence[float], part: float) -> float | None:
    """So much of the values is not above it; they are sorted."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else None


# ------------------------------------------------------------------------------------------------------------ a step


class Step(NamedTuple):
    wanted: float
    exchanges: int
    rate: float
    """Trades a second that the exchanges really wrote."""
    sent: int
    missing: int
    repeated: int
    drained: float | None
    """Seconds after the end until all were in Kafka; None if they were not in time."""
    whole: tuple[float | None, ...]
    """Seconds end to end: half of the trades, 99 %, all."""
    inside: tuple[float | None, ...]
    """From receipt: half, 99 %."""
    cpu: Mapping[str, float | None]
    """Seconds of the processors in all, by process; "others": what else ran on this machine, the system included."""
    memory: tuple[float, ...]
    """MB of the contestant's processes: at 10 s, if there was so much time, and at the end of the sending."""
    peak: float
    rows: int | None
    """Of analytics."""
    left_out: int | None
    """Trades in no row."""
    loop_lag: float | None
    """Seconds, the longest."""
    code: int | None

    @property
    def held_back(self) -> bool:
        return self.rate < self.wanted * HELD_BACK

    @property
    def lossless(self) -> bool:
        return not self.missing and not self.repeated and self.drained is not None and self.drained <= DRAIN

    def row(self, name: str) -> Row:
        def ms(seconds: float | None) -> float | None:
            return None if seconds is None else seconds * 1000

        return {
            "": name,
            "wanted/s": round(self.wanted),
            "sent/s": round(self.rate),
            "sent": self.sent,
            "missing": self.missing,
            "repeated": self.repeated,
            "drain s": self.drained,
            "p50 ms": ms(self.whole[0]),
            "p99 ms": ms(self.whole[1]),
            "max ms": ms(self.whole[2]),
            "from receipt p99 ms": ms(self.inside[1]),
            "rows": self.rows,
            "left out": self.left_out,
            **{f"CPU s {who}": seconds for who, seconds in self.cpu.items()},
            "us/trade": 1e6 * sum(self.cpu[who] or 0.0 for who in ("own", "pool")) / max(1, self.sent),
            "loop lag ms": ms(self.loop_lag),
            "peak MB": self.peak,
        }


class Course:
    """A folder, and maybe a broker that is there already."""

    def __init__(self, runner: asyncio.Runner, folder: Path, kafka: str | None, options: str) -> None:
        self._runner, self._folder, self._kafka, self._options = runner, folder, kafka, options
        self._count = 0

    def run(self, name: str, rate: float, seconds: float) -> Step:
        """One life of a contestant at one rate."""
        from bench import runner as bench

        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        step = self._runner.run(self._life(name, folder, rate, seconds))
        shutil.rmtree(folder, ignore_errors=True)
        verdict = (
            "holds"
            if step.lossless
            else f"{step.missing:,} missing, {step.repeated:,} repeated, "
            + (f"drained in {bench.cell(step.drained) or '-'} s")
        )
        p99 = bench.cell(None if step.whole[1] is None else step.whole[1] * 1000) or "-"
        bench.note(f"{name} at {rate:,.0f}/s: sent {step.rate:,.0f}/s, {verdict}; p99 {p99} ms")
        return step

    async def _life(self, name: str, folder: Path, rate: float, seconds: float) -> Step:
        from bench import runner as bench

        names, prefix = (OURS | PEERS)[name], f"bench-{os.urandom(4).hex()}-"
        words, pairs = (
            [*bench.module("bench.market"), "exchanges", ",".join(SYMBOLS), ",".join(names)],
            len(names) * len(SYMBOLS),
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        async with self._broker(folder, prefix, topics_of(name, prefix) if name in PEERS else []) as (address, server):
            with bench.child(words, **pipes) as feeds:
                urls = await said(feeds)
                if name in OURS:
                    running = ours(folder, address, prefix, urls, self._options)
                else:
                    running = theirs(name, folder, address, prefix, urls)
                with running as contestant:
                    async with listening(address, topics_of(name, prefix)) as consumer:
                        watched = await Watch(consumer, contestant, feeds, server, pairs).run(rate, seconds)
            async with listening(address, topics_of(name, prefix)) as consumer:
                ledger = await read(consumer, watched.marks, watched.each, pairs)
            rows = await count(address, prefix + ANALYTICS) if name in OURS else None
        whole, inside = sorted(ledger.whole), sorted(ledger.inside)
        health = watched.health or {}
        left_out = health["skipped"] + health["uncomputed"] if health else None
        return Step(
            *(rate, len(names), watched.sent / watched.took, watched.sent, ledger.missing, ledger.repeated),
            *(watched.drained, (share(whole, 0.5), share(whole, 0.99), whole[-1] if whole else None)),
            (share(inside, 0.5), share(inside, 0.99)),
            watched.cpu,
            tuple(watched.memory),
            watched.peak,
            *(rows, left_out, health.get("loop_lag"), contestant.code),
        )

    @contextlib.asynccontextmanager
    async def _broker(
        self, folder: Path, prefix: str, topics: Sequence[str]
    ) -> AsyncIterator[tuple[str, psutil.Process | None]]:
        """Its address, and its process if it is ours. ``topics``: those that the contestant does not make itself."""
        broker = None if self._kafka else Broker(folder / "broker")
        address = self._kafka or (broker.start() if broker is not None else "")
        try:
            server = None
            if broker is not None:
                server = psutil.Process(orjson.loads((folder / "broker" / CONTROL).read_bytes())["pid"])
            admin = AIOKafkaAdminClient(bootstrap_servers=address)
            await admin.start()
            try:
                if topics:
                    await admin.create_topics([NewTopic(topic, 1, 1) for topic in topics])
                yield address, server
                if broker is None:
                    await admin.delete_topics([each for each in await admin.list_topics() if each.startswith(prefix)])
            finally:
                await admin.close()
        finally:
            if broker is not None:
                broker.stop()


async def said(process: subprocess.Popen[bytes]) -> Any:
    """The next line of a child that speaks JSON. Raises SystemExit if it has ended."""
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    if not line:
        raise SystemExit("bench: market: the exchanges ended")
    return json.loads(line)


@contextlib.asynccontextmanager
async def listening(address: str, topics: Sequence[str]) -> AsyncIterator[Any]:
    """A consumer of all that is in the topics; nothing is fetched before it is resumed."""
    consumer = AIOKafkaConsumer(
        *topics,
        bootstrap_servers=address,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        max_partition_fetch_bytes=4 << 20,
    )
    await consumer.start()
    try:
        consumer.pause(*consumer.assignment())
        yield consumer
    finally:
        await consumer.stop()


async def count(address: str, topic: str) -> int:
    async with listening(address, [topic]) as consumer:
        return sum((await consumer.end_offsets(list(consumer.assignment()))).values())


async def read(consumer: Any, marks: dict[Any, Marks], each: int, pairs: int) -> Ledger:
    """All that is in the topics now. What was not readable while the contestant ran is taken to be from now on."""
    ledger, places = Ledger(each, pairs), list(consumer.assignment())
    ends = await consumer.end_offsets(places)
    for place, end in ends.items():
        marks.setdefault(place, Marks()).note(end, time.time_ns())
    left = {place for place in places if ends[place]}
    consumer.resume(*places)
    while left:
        for place, records in (await consumer.getmany(timeout_ms=1000, max_records=5000)).items():
            readable = marks[place].readable
            for record in records:
                at, found = readable(record.offset) / SECOND, orjson.loads(record.value)
                who = found["exchange"], found["symbol"]
                if "trade_id" in found:
                    times = found["exchange_ts_ns"] / SECOND, found["received_ts_ns"] / SECOND
                    ledger.take(*who, found["trade_id"], *times, at)
                else:
                    ledger.take(*who, found["id"], found["timestamp"], found["receipt_timestamp"], at)
            if records[-1].offset + 1 >= ends[place]:
                left.discard(place)
    return ledger


def busy() -> float:
    """Seconds that the machine's processors worked."""
    machine = psutil.cpu_times()
    return float(sum(machine[:8]) - machine.idle - machine.iowait)  # what comes after these is in them already


class Watch:
    """Over one contestant while the exchanges trade."""

    def __init__(
        self,
        consumer: Any,
        contestant: Contestant,
        feeds: subprocess.Popen[bytes],
        server: psutil.Process | None,
        pairs: int,
    ) -> None:
        self._consumer, self._contestant, self._feeds, self._pairs = consumer, contestant, feeds, pairs
        self._others = {"exchanges": psutil.Process(feeds.pid), "broker": server, "bench": psutil.Process()}
        self._places = list(consumer.assignment())
        self.marks = {place: Marks() for place in self._places}
        self.each = self.sent = 0
        self.took = self.peak = 0.0
        self.drained: float | None = None
        self.cpu: dict[str, float | None] = {}
        self.memory: list[float] = []
        self.health: Any = None

    async def run(self, rate: float, seconds: float) -> Watch:
        base = await self._steady()
        before, busy_before = self._cpu(), busy()
        assert self._feeds.stdin is not None
        self._feeds.stdin.write(f"{rate} {seconds}\n".encode())
        self._feeds.stdin.flush()
        begun, self.each = (await said(self._feeds)).values()
        total = self.each * self._pairs
        last = asyncio.ensure_future(said(self._feeds))
        try:
            await self._look(begun, seconds, base + total)
            self.sent, self.took = (await last).values()
        finally:
            last.cancel()
        after = self._cpu()
        self.cpu = {who: None if spent is None else spent - (before[who] or 0.0) for who, spent in after.items()}
        self.cpu["others"] = busy() - busy_before - sum(spent or 0.0 for spent in self.cpu.values())
        self.peak = memory_of(self._contestant.process, "VmHWM")
        self.health = await asyncio.to_thread(self._contestant.health)
        return self

    async def _ends(self) -> int:
        """How many records there are."""
        ends = await self._consumer.end_offsets(self._places)
        now = time.time_ns()
        for place, end in ends.items():
            self.marks[place].note(end, now)
        return sum(ends.values())

    async def _steady(self) -> int:
        """How many there are when no more come."""
        there, since = await self._ends(), time.monotonic()
        while time.monotonic() - since < STEADY:
            await asyncio.sleep(LOOK)
            if (now := await self._ends()) > there:
                there, since = now, time.monotonic()
        return there

    async def _look(self, begun: float, seconds: float, enough: int) -> None:
        end, due = begun + seconds, time.time()
        while True:
            there, now = await self._ends(), time.time()
            if now >= begun + 10 and not self.memory and seconds > 10:
                self.memory.append(memory_of(self._contestant.process, "VmRSS"))
            if now >= end and (there >= enough or now > end + PATIENCE):
                self.drained = max(0.0, now - end) if there >= enough else None
                self.memory.append(memory_of(self._contestant.process, "VmRSS"))
                return
            due = max(due + LOOK, now)
            await asyncio.sleep(due - now)

    def _cpu(self) -> dict[str, float | None]:
        own, pool = self._contestant.cpu()
        others = {who: None if one is None else float(sum(one.cpu_times()[:2])) for who, one in self._others.items()}
        return {"own": own, "pool": pool, **others}


# ----------------------------------------------------------------------------------------------------------- the runs

BRIEF = ("us/trade", "p50 ms", "p99 ms", "from receipt p99 ms", "peak MB", "loop lag ms")
"""What the summary tells of the best step."""


def summary(found: Sequence[Sequence[Search[Step]]]) -> list[Row]:
    """A row for each contestant, of all its searches."""
    from bench import runner as bench

    searches: dict[str, list[Search[Step]]] = {}
    for search in (search for each in found for search in each):
        searches.setdefault(search.name, []).append(search)
    best = {
        name: bench.Spread.of(search.best.rate if search.best else 0.0 for search in each)
        for name, each in searches.items()
    }
    results: list[Row] = []
    for name, spread in best.items():
        steps = [search.best for search in searches[name] if search.best]
        row: Row = {"": name}
        row |= {f"x {peer}": bench.to(spread.median, best[peer].median) for peer in PEERS if peer in best}
        row |= {"holds/s": spread, "exchanges": len((OURS | PEERS)[name])}
        if steps:
            told = max(steps, key=lambda step: step.rate).row(name)
            row |= {key: told[key] for key in BRIEF}
        results.append(row)
    return results


@contextlib.contextmanager
def course(kafka: str | None, options: str) -> Iterator[Course]:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        with asyncio.Runner() as runner:
            yield Course(runner, folder, kafka, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def soak(course: Course, name: str, rate: int, seconds: int) -> list[Row]:
    """Raises SystemExit if something that is promised does not hold."""
    from bench import runner as bench

    step = course.run(name, rate, seconds)
    begun, over = step.memory[0], step.memory[-1]
    row = step.row(name) | {"MB at 10 s": begun, "MB at the end": over}
    print("\n".join(f"{what:20} {bench.cell(value)}" for what, value in row.items()))
    p99 = step.whole[1]
    broken = [
        *(["trades are missing"] if step.missing else []),
        *(["trades are there twice"] if step.repeated else []),
        *(["trades come late"] if p99 is None or p99 >= SOAK_P99 else []),
        *(["memory grows"] if over > begun * SOAK_GROWTH else []),
        *(["the exchanges were held back"] if step.held_back else []),
        *([f"it ended with {step.code}"] if step.code else []),
    ]
    if broken:
        raise SystemExit(f"bench: market: {', '.join(broken)}")
    return [row]


def run(args: argparse.Namespace) -> list[Row]:
    """The table's rows."""
    from bench import runner as bench

    names = [
        name
        for name in args.peers.split(",")
        if bench.known(name, [*OURS, *PEERS]) and (name in OURS or bench.present(name))
    ]
    with course(args.kafka or None, args.options) as track:
        if args.soak:
            return soak(track, names[0], args.rate, args.soak)
        return ladder(track, names, args, summary)


if __name__ == "__main__":
    if sys.argv[1] == "exchanges":
        exchanges(sys.argv[2].split(","), sys.argv[3].split(","))
    else:
        cryptofeed(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
