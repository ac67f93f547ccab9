"""`bench simulate`: whole crawls under a simulated clock, each step checked; the crawls are in simulator/."""

from __future__ import annotations

import argparse

from bench.measure import Row, command, table


@command(
    "whole crawls under a simulated clock, every step checked: makespan against what no schedule can beat",
    "simulate --urls 1000000 --hosts 10000 --seed 1",
    "simulate --seeds 1000",
    urls=(1_000_000, "URLs"),
    hosts=(10_000, "hosts, of sizes by Zipf's law"),
    seed=(1, "of all randomness; the first of --seeds"),
    seeds=(None, "instead: so many small crawls with robots, redirects, pauses, links"),
    concurrency=(64, "workers"),
    shared=(False, "with --seeds: crawls by up to 16 workers over a model of PostgreSQL's tables"),
)
def simulate(args: argparse.Namespace) -> list[Row]:
    from simulator import crawls, shared_crawls

    results = shared_crawls.run_shared(args.seed, args.seeds or 100) if args.shared else crawls.run(args)
    print(table(results))
    return results
