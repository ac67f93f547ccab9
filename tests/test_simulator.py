"""Whole crawls under a simulated clock, and that the checker refuses what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections import Counter
from typing import Any, cast

import pytest

from bench import runner as bench
from crawl import scheduler, shared_crawl
from crawl.model import USER_AGENT, Options
from crawl.sync import Found, SyncAnswer, SyncBatch
from simulator import crawls as simulate
from simulator import shared_crawls as sim_shared
from simulator.checker import Tokens


@pytest.mark.parametrize("block", range(6))
def test_simulated_crawls_keep_every_promise(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        simulate.simulate(seed)


def test_simulated_crawls_can_be_repeated() -> None:
    first, second = simulate.simulate(5), simulate.simulate(5)
    assert first == second
    assert first.requests > 50


@pytest.mark.parametrize("workers", [64, 30, 20, 5])
def test_simulated_makespan_is_within_two_percent_of_the_bound(workers: int) -> None:
    result = simulate.simulate(1, simulate.plain(20_000, 1_000, workers))
    assert 1.0 <= result.ratio < 1.02


def test_simulated_makespan_suffers_when_hosts_go_by_age_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "FAIR", 1)
    assert simulate.simulate(1, simulate.plain(20_000, 1_000, 20)).ratio > 1.05


def test_simulate_as_a_command() -> None:
    options = {name: default for name, (default, _) in bench.find_commands()["simulate"].options.items()}
    (row,) = simulate.run(argparse.Namespace(**options | {"urls": 300, "hosts": 5}))
    assert row["requests"] >= 300
    (row,) = simulate.run(argparse.Namespace(**options | {"seeds": 2}))
    assert row[""] == "2 crawls"


def test_simulate_tokens_of_the_checker_by_hand() -> None:
    tokens = Tokens(2.0, 2)
    assert [tokens.spend(0.0), tokens.spend(0.0), tokens.spend(0.1)] == [True, True, False]
    tokens = Tokens(1.0, 3)
    tokens.pause(0.0, 5.0)
    assert tokens.next() == 5.0
    assert [tokens.spend(5.0), tokens.spend(5.0)] == [True, False]


# --------------------------------------------------------------------------------------------- under a simulated clock


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_shared_crawls_keep_their_promises(first: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + 25):
        counts += sim_shared.simulate_shared(seed)
    assert counts["lost leases"] and counts["frozen"] and counts["killed"]


def test_shared_rules_of_others_are_read_outside_of_the_loop() -> None:
    found = Found("http://a", 200, b"User-agent: *\nDisallow: /no", "http://a/robots.txt", 100.0)

    class Store:
        async def sync(self, batch: SyncBatch) -> SyncAnswer:
            return SyncAnswer(1, hosts=[("a", None)], robots=[found])

    crawl = shared_crawl.SharedCrawl(Options(depth=1), "postgresql://nowhere")
    readers: list[threading.Thread] = []

    def rules_of(found: Found) -> Any:
        readers.append(threading.current_thread())
        return found.rules(USER_AGENT)

    crawl.mine.rules_of = rules_of
    crawl._wake = asyncio.Event()
    asyncio.run(crawl._exchange(cast(Any, Store())))
    assert len(readers) == 1 and readers[0] is not threading.main_thread()
    assert crawl.mine.explain("http://a/no", crawl.clock()) == "no: forbidden by robots.txt"
