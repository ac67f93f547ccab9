"""`bench market`: trades of simulated exchanges into Kafka, beside cryptofeed; and a minute of steady load.

* **A rate holds** if each trade is in Kafka once, and all of them by `DRAIN` seconds after the last: a lag that grows
  does not end with the sending. The search for the highest such rate is in bench/ladder.py, a step of it in
  bench/market_course.py, what is counted and timed in bench/market_kafka.py, the peer in bench/market_peer.py.
* **From receipt** is timed like end to end, but from the time that the contestant noted when the frame came. That the
  exchanges look every 20 ms what is due, and want a processor themselves, is in the figures of all.

Promised: all traffic stays on 127.0.0.0/8 (but for ``--kafka``), all children are ended by their id. Raises SystemExit
if the soak does not hold what is promised for market_pipeline.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.ladder import Search, ladder
from bench.market_contestants import OURS, PEERS
from bench.measure import Row, Spread, cell, command, known, present, to

if TYPE_CHECKING:
    from bench.market_course import Course, Step

SOAK_P99, SOAK_GROWTH = 0.25, 1.25
"""What a soak must hold: seconds end to end; growth of memory after 10 s."""
BRIEF = ("us/trade", "p50 ms", "p99 ms", "from receipt p99 ms", "peak MB", "loop lag ms")
"""What the summary tells of the best step."""


def summary(found: Sequence[Sequence[Search[Step]]]) -> list[Row]:
    """A row for each contestant, of all its searches."""
    searches: dict[str, list[Search[Step]]] = {}
    for search in (search for each in found for search in each):
        searches.setdefault(search.name, []).append(search)
    best = {
        name: Spread.of(search.best.rate if search.best else 0.0 for search in each) for name, each in searches.items()
    }
    results: list[Row] = []
    for name, spread in best.items():
        steps = [search.best for search in searches[name] if search.best]
        row: Row = {"": name}
        row |= {f"x {peer}": to(spread.median, best[peer].median) for peer in PEERS if peer in best}
        row |= {"holds/s": spread, "exchanges": len((OURS | PEERS)[name])}
        if steps:
            told = max(steps, key=lambda step: step.rate).row(name)
            row |= {key: told[key] for key in BRIEF}
        results.append(row)
    return results


def soak(course: Course, name: str, rate: int, seconds: int) -> list[Row]:
    """Raises SystemExit if something that is promised does not hold."""
    step = course.run(name, rate, seconds)
    begun, over = step.memory[0], step.memory[-1]
    row = step.row(name) | {"MB at 10 s": begun, "MB at the end": over}
    print("\n".join(f"{what:20} {cell(value)}" for what, value in row.items()))
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


@command(
    "trades of ten simulated exchanges into Kafka, against cryptofeed: the highest rate without growing lag, ms, CPU",
    "market",
    "market --peers market_pipeline,cryptofeed --rates 1000,2000,4000 --halvings 2",
    "market --soak 60 --rate 15000",
    peers=(
        "market_pipeline,market_pipeline-6,cryptofeed,cryptofeed-batched",
        "contestants; -6: the exchanges of the next",
    ),
    rates=("5000,10000,15000,20000,30000,40000", "trades/s of all exchanges together, the ladder"),
    halvings=(1, "steps between the last good and the first bad rate"),
    seconds=(7, "of trading in a step"),
    repeat=(1, "searches of each contestant"),
    kafka=("", "HOST:PORT of a broker; default: the one for development, a fresh one for each step"),
    options=("", "more options of market_pipeline.py, as in --options=--workers=2"),
    soak=(None, "instead: so many seconds at --rate; is each trade there once and in time, is memory flat?"),
    rate=(15_000, "trades/s of --soak"),
)
def market(args: argparse.Namespace) -> list[Row]:
    from bench.market_course import course

    names = [name for name in args.peers.split(",") if known(name, [*OURS, *PEERS]) and (name in OURS or present(name))]
    with course(args.kafka or None, args.options) as track:
        if args.soak:
            return soak(track, names[0], args.rate, args.soak)
        return ladder(track, names, args, summary)
