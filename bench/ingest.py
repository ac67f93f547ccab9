"""`bench ingest`: loss against rate of ingest_logs.py, beside rsyslog; and a minute of steady load.

* **Lossless means sustainable**: no event is missing in the end, and `DRAIN` seconds after the last one was sent no
  more are outstanding than a last batch that is not full (`TAIL`), which both may keep for seconds by design.
* **The search** for the highest such rate is in bench/ladder.py, a step of it in bench/ingest_course.py, how either
  contestant is set up in bench/ingest_contestants.py.

Promised: all traffic stays on 127.0.0.0/8, all children are ended by their id, the system's rsyslog is not touched.
Raises SystemExit if the soak does not hold what ingest_logs.py promises.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.ingest_contestants import INSTALL, OURS, VARIANTS, rsyslogd
from bench.ladder import Search, ladder
from bench.measure import Row, Spread, command, known, table, to

if TYPE_CHECKING:
    from bench.ingest_course import Course, Step

SOAK_P99, SOAK_ENRICHED, SOAK_GROWTH = 6.0, 0.999, 1.25
"""What a soak must hold: seconds from receipt to commit; share of rows with metadata; growth of memory after 10 s."""
BRIEF = ("us/row", "PG us/row", "send us", "peak MB", "p50 s", "p99 s", "drain s")
"""What the summary tells of the best step."""


def summary(found: Sequence[Sequence[Search[Step]]]) -> list[Row]:
    """A row for each contestant, of all its searches."""
    rates: dict[str, list[float]] = {}
    for searches in found:
        for search in searches:
            rates.setdefault(search.name, []).append(search.best.sent.rate if search.best else 0.0)
    best = {name: Spread.of(values) for name, values in rates.items()}
    base = max((spread.median for name, spread in best.items() if name in VARIANTS), default=None)
    results: list[Row] = []
    for name, spread in best.items():
        steps = [s.best for searches in found for s in searches if s.name == name and s.best]
        step = max(steps, key=lambda step: step.sent.rate, default=None)
        row: Row = {"": name, "x rsyslog": to(spread.median, base), "lossless/s": spread}
        if step is not None:
            told = step.row(name)
            row |= {key: told[key] for key in BRIEF}
        results.append(row)
    return results


def soak(course: Course, name: str, rate: int, seconds: int) -> list[Row]:
    """Raises SystemExit if something that is promised does not hold."""
    step = course.run(name, rate, seconds, "rfc5424,rfc3164,json")
    begun, ended = step.memory[0], step.memory[-1]
    row = step.row(name) | {"MB at 10 s": begun, "MB at the end": ended}
    print(table([row]))
    broken = [
        *(["events are missing"] if step.lost else []),
        *(["events are there twice"] if step.twice else []),
        *(["metadata are missing"] if (step.enriched or 0) < SOAK_ENRICHED else []),
        *(["commits come late"] if step.p99 is None or step.p99 >= SOAK_P99 else []),
        *(["memory grows"] if ended > begun * SOAK_GROWTH else []),
        *(["the senders were held back"] if step.held_back else []),
    ]
    if broken:
        raise SystemExit(f"bench: ingest: {', '.join(broken)}")
    return [row]


@command(
    "logs by UDP into PostgreSQL, against rsyslog: loss at a ladder of rates, the highest lossless one, CPU, memory",
    "ingest",
    "ingest --peers ingest_logs,ingest_logs-x2 --rates 40000,60000,80000 --halvings 2",
    "ingest --soak 60 --rate 20000",
    peers=("ingest_logs,ingest_logs-x2,rsyslog,rsyslog-defaults", "contestants; x2: two receivers"),
    rates=("5000,10000,20000,30000,45000,60000,80000,100000,130000", "events/s, the ladder"),
    halvings=(3, "steps between the last good and the first bad rate"),
    seconds=(10, "of sending in a step"),
    repeat=(1, "searches of each contestant"),
    options=("", "more options of ingest_logs.py, as in --options=--batch=2000"),
    soak=(None, "instead: so many seconds at --rate; is each event there once, in time, with its metadata?"),
    rate=(20_000, "events/s of --soak"),
)
def ingest(args: argparse.Namespace) -> list[Row]:
    from bench.ingest_course import course

    names = args.peers.split(",")
    for name in names:
        known(name, [*OURS, *VARIANTS])
    if rsyslogd() is None and any(name in VARIANTS for name in names):
        print(INSTALL)
        names = [name for name in names if name not in VARIANTS]
    with course(args.options) as track:
        if args.soak:
            return soak(track, names[0], args.rate, args.soak)
        return ladder(track, names, args, summary)
