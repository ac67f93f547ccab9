"""Each step of `bench market` is a life of its own: a broker, exchanges, a contestant, so many trades at one rate.

* **The broker** is a fresh one for development, which every few seconds writes all that it holds to disk, and holds
  ever more; or topics of their own on that of ``--kafka``, which are deleted.
* **A contestant** connects to all exchanges and waits; when no more records come, trading begins (`Watch`).
* **Processors and memory** are told by process; Linux only, as memory is read from /proc.

Everything is in one thread and one event loop but what waits for children.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bench.ladder import HELD_BACK, memory_of
from bench.market_contestants import NATIVE, OURS, PEERS, SYMBOLS, Contestant, ours, theirs
from bench.market_exchanges import PATIENCE
from bench.market_kafka import Marks, count, listening, read, share
from bench.measure import Row, cell, child, module, note
from market.topics import ANALYTICS, TRADES
from sandbox.broker import CONTROL, Broker

DRAIN = 1.0
"""Seconds after the last trade by which all of them must be in Kafka."""
LOOK = 0.01
"""Seconds between two looks at what can be read."""
STEADY = 0.3
"""Seconds without a new record after which snapshots and greetings are over."""


def topics_of(name: str, prefix: str) -> list[str]:
    """Where a contestant writes trades."""
    if name in OURS:
        return [prefix + TRADES]
    bases = [each.partition("-")[0] for each in SYMBOLS]
    return [f"{prefix}{TRADES}-{who}-{symbol.format(base)}" for who, symbol, _ in NATIVE.values() for base in bases]


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
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        step = self._runner.run(self._life(name, folder, rate, seconds))
        shutil.rmtree(folder, ignore_errors=True)
        verdict = (
            "holds"
            if step.lossless
            else f"{step.missing:,} missing, {step.repeated:,} repeated, "
            + (f"drained in {cell(step.drained) or '-'} s")
        )
        p99 = cell(None if step.whole[1] is None else step.whole[1] * 1000) or "-"
        note(f"{name} at {rate:,.0f}/s: sent {step.rate:,.0f}/s, {verdict}; p99 {p99} ms")
        return step

    async def _life(self, name: str, folder: Path, rate: float, seconds: float) -> Step:
        names, prefix = (OURS | PEERS)[name], f"bench-{os.urandom(4).hex()}-"
        words = [*module("bench.market_exchanges"), ",".join(SYMBOLS), ",".join(names)]
        pairs = len(names) * len(SYMBOLS)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        async with self._broker(folder, prefix, topics_of(name, prefix) if name in PEERS else []) as (address, server):
            with child(words, **pipes) as feeds:
                urls = await said(feeds)
                if name in OURS:
                    running = ours(folder, address, prefix, urls, self._options)
                else:
                    running = theirs(name, folder, address, prefix + TRADES, urls)
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


@contextlib.contextmanager
def course(kafka: str | None, options: str) -> Iterator[Course]:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        with asyncio.Runner() as runner:
            yield Course(runner, folder, kafka, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
