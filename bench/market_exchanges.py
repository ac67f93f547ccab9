"""The simulated exchanges of `bench market`, in a process of their own: `bench/market_exchanges.py SYMBOLS EXCHANGES`.

They trade when all symbols were asked for at each of them: so many trades at one rate for some seconds, the n-th of a
symbol with number n in its id. They look what is due every 20 ms.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from bench.ladder import READY
from sandbox.exchanges import WIRES
from sandbox.markets import Exchanges

PATIENCE = 4.0
"""Seconds after which nobody waits for them any more."""


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


if __name__ == "__main__":
    exchanges(sys.argv[1].split(","), sys.argv[2].split(","))
