"""Who sends the events of `bench ingest`: `bench/ingest_send.py PORT RATE TOTAL FIRST FORMATS`, as many as it takes.

The senders (sandbox/logs.py) are processes of their own: RFC 5424, about 200 bytes, 500 services that have each a
socket and an address. They, PostgreSQL and the contestant share the processors.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from bench.measure import child, module

AT_ONCE = 80_000
"""Events a second of one sending process."""


def send(port: int, rate: float, total: int, first: int, formats: str) -> None:
    """Send, and print what was sent, as JSON."""
    from sandbox.logs import Senders

    with Senders(("127.0.0.1", port), rate=rate, total=total, first=first, formats=formats.split(",")) as senders:  # type: ignore[arg-type]
        senders.wait()
    stats, usage = senders.stats(), resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({**stats._asdict(), "cpu": usage.ru_utime + usage.ru_stime}))


class Sent(NamedTuple):
    events: int
    rate: float
    """Events a second, really."""
    cpu: float


def send_all(
    port: int, rate: float, seconds: float, formats: str, while_waiting: Callable[[], None] = lambda: None
) -> Sent:
    """Have as many processes send as it takes. ``while_waiting`` is called about every 0.1 s."""
    count = math.ceil(rate / AT_ONCE)
    total = round(rate * seconds / count)
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                child(
                    [*module("bench.ingest_send"), port, rate / count, total, n * total, formats],
                    stdout=subprocess.PIPE,
                )
            )
            for n in range(count)
        ]
        while any(child.poll() is None for child in children):
            while_waiting()
            time.sleep(0.05)
        told = [json.loads(child.stdout.read()) for child in children if child.stdout and not child.returncode]
    if len(told) < count or any(each["failed"] for each in told):
        raise SystemExit("bench: ingest: a sender failed")
    return Sent(sum(t["events"] for t in told), sum(t["rate"] for t in told), sum(t["cpu"] for t in told))


if __name__ == "__main__":
    send(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
