"""`bench rate`: the politeness bound as the server sees it: wall time, and the busiest second of its log.

One host, many URLs, one rate: no crawler can be faster than (URLs - burst) / rate, and none may be. The server is the
sandbox, in a thread of this process; the crawler is a child.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from bench.measure import DRIVER, HERE, Row, command, drivers, note, run_child, table


@command(
    "the politeness bound, as the server sees it: wall time, and the busiest second of its log",
    "rate",
    "rate --concurrency 500 --driver crawl_async.py",
    "rate --urls 1000 --rate 200 --burst 10",
    urls=(10_000, "URLs, all of one host"),
    rate=(100.0, "requests per second"),
    burst=(1, "requests that may go at once"),
    concurrency=(64, "requests in flight"),
    per_host=(None, "requests in flight to one host; default: the crawler's"),
    driver=DRIVER,
)
def rate(args: argparse.Namespace) -> list[Row]:
    from sandbox.sites import Sandbox

    results: list[Row] = []
    options = ["--rate", args.rate, "--burst", args.burst, "--concurrency", args.concurrency, "-q", "-o", os.devnull]
    options += ["--per-host", args.per_host] if args.per_host else []
    for driver in drivers(args.driver):
        note(f"{driver}: {args.urls:,} URLs at {args.rate:g}/s take {args.urls / args.rate:,.0f} s")
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as folder,
            Sandbox(hosts=1, pages=1, page_bytes=2000, log=args.urls * 2) as site,
        ):
            urls, stats = Path(folder, "urls.txt"), Path(folder, "stats.json")
            urls.write_text("".join(f"{site.url('/')}?n={n}\n" for n in range(args.urls)))
            run = run_child([sys.executable, HERE / driver, urls, "--stats", stats, *options], driver)
            seen = [entry.t for entry in site.log]
            results.append(
                {
                    "": driver,
                    "x urls/rate": run.seconds * args.rate / args.urls,
                    "off, %": f"{(run.seconds * args.rate / args.urls - 1) * 100:+.2f}",
                    "wall s": run.seconds,
                    "first to last s": seen[-1] - seen[0],
                    "ideal s": max(0, args.urls - args.burst) / args.rate,
                    "requests": len(seen),
                    "ok": json.loads(stats.read_text())["ok"],
                    "most in 1 s": site.max_in_window(0, 1.0),
                    "bound": args.burst + args.rate,
                    "CPU s": run.cpu,
                }
            )
    print(table(results))
    print("\nmost in 1 s: in any window of a second of the server's log. ideal: (urls - burst) / rate.")
    return results
