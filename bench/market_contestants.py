"""The contestants of `bench market`, each as a child that reads from all exchanges when its block is entered.

``market_pipeline`` runs as its user starts it, ten exchanges, figures and all (no option leaves them out);
``market_pipeline-6``, with the exchanges of the peer only, at the same rates in all. The peer is in
bench/market_peer.py. Whoever it is, it is stopped as its user would, when the block is left.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.ladder import cpu_of, wait_for
from bench.measure import HERE, child, free_port, module
from sandbox.exchanges import WIRES

SYMBOLS = ("BTC-USD", "ETH-USD", "SOL-USD")
STOP = 12.0
"""Seconds that a contestant has to end."""
NATIVE: dict[str, tuple[str, str, str]] = {
    "bitstamp": ("BITSTAMP", "{}-USD", "{}usd"),
    "okx": ("OKX", "{}-USDT", "{}-USDT"),
    "bybit": ("BYBIT", "{}-USDT", "{}/USDT"),
    "bitfinex": ("BITFINEX", "{}-USD", "t{}USD"),
    "gemini": ("GEMINI", "{}-USD", "{}USD"),
    "gateio": ("GATEIO", "{}-USDT", "{}_USDT"),
}
"""Of cryptofeed: its name for an exchange, for a symbol there, and what the exchange calls it."""
EVENT_IDS = {"GEMINI": 7}
"""Where it keeps another number than the trade's: by how much that is greater in the simulation."""
OURS = {"market_pipeline": tuple(WIRES), "market_pipeline-6": tuple(NATIVE)}
PEERS = {"cryptofeed": tuple(NATIVE), "cryptofeed-batched": tuple(NATIVE)}


class Contestant:
    """A running one. ``code`` is there when it has ended by itself."""

    def __init__(self, process: subprocess.Popen[bytes], health: Callable[[], Any]) -> None:
        import psutil

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
    http = free_port()
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

    with open(folder / "log", "a+") as log, child(words, stdout=log, stderr=log) as process:
        wait_for(is_there, process, folder / "log")
        with ended(process, Contestant(process, health)) as contestant:
            yield contestant


@contextlib.contextmanager
def theirs(name: str, folder: Path, broker: str, topic: str, urls: Mapping[str, str]) -> Iterator[Contestant]:
    words = [*module("bench.market_peer"), name, broker, topic, json.dumps(urls)]
    said = folder / "said"
    with (
        open(said, "wb") as out,
        open(folder / "log", "a+") as log,
        child(words, stdout=out, stderr=log, cwd=folder) as process,  # its log file goes where it stands
    ):
        wait_for(lambda: b"ready" in said.read_bytes(), process, folder / "log")
        with ended(process, Contestant(process, lambda: None)) as contestant:
            yield contestant
