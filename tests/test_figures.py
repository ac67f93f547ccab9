"""The published figures and plots."""

from __future__ import annotations

import json
import re

import pytest

from bench import plot as bench_plot
from bench import runner as bench
from tests.helpers.base import HERE, texts

TEXT = (HERE / "README.md").read_text()


PUBLISHED = {path.stem: json.loads(path.read_text()) for path in (HERE / "bench/results").glob("*.json")}
"""What was measured: the files that git keeps."""


def test_figures_are_of_one_commit() -> None:
    (commit,) = {figures["commit"] for figures in PUBLISHED.values()}
    assert re.fullmatch("[0-9a-f]{7,}", commit) and f"commit `{commit}`" in TEXT
    assert bench.COMMANDS.keys() - {"plot", "million"} <= PUBLISHED.keys()
    assert all(figures["name"] == name for name, figures in PUBLISHED.items())


def test_pictures_are_there_for_light_and_dark_pages() -> None:
    shown = re.findall(r'"(bench/results/[^"]*)"', TEXT)
    assert len(shown) > 20 and all((HERE / path).is_file() for path in shown)
    assert [path.replace("-dark", "-light") for path in shown[::2]] == shown[1::2]


def test_pictures_are_those_of_the_figures() -> None:
    for name, figures in PUBLISHED.items():
        for panel in bench_plot.panels_of(name, figures["results"]):
            wanted = {panel.title}
            if isinstance(panel, bench_plot.Lines):
                wanted |= {panel.x, panel.y} | {line.name for line in panel.lines}
            else:
                for bar in panel.bars:
                    value, more = bench_plot.median(bar.value), f" ({bar.more})" if bar.more else ""
                    wanted |= {bar.name} if value is None else {bar.name, bench_plot.figure_text(value) + more}
            assert wanted <= set(texts((HERE / "bench/results" / f"{name}-light.svg").read_text())), name


def test_commands_of_the_bench_parse() -> None:
    commands = re.findall(r"python -m bench ([a-z][^`\n]*)`", TEXT)
    assert {command.split()[0] for command in commands} >= PUBLISHED.keys() & bench.COMMANDS.keys()
    for command in commands:
        assert bench.make_parser().parse_args(command.split()).command == command.split()[0]


@pytest.mark.parametrize(
    ("name", "row", "column", "said"),
    [
        ("crawl", "scrapy", "pages/s", "fetches {:.0f} pages/s"),
        ("crawl", "scrapy_stripped", "x Scrapy", "on bare lxml, {:.1f} times as many"),
        ("crawl", "crawl_async", "x Scrapy", "`crawl_async.py` {:.1f} times"),
        ("crawl", "crawl_async x2", "x Scrapy", "with `--processes 2` {:.1f} times"),
        ("crawl", "crawl_threads", "x Scrapy", "`crawl_threads.py` {:.1f} times"),
        ("crawl", "crawl_threads", "peak MB", "times, in {:.0f} MB. All found"),
        ("parse", "html_parse", "MB/s", "`html_parse.py` {:.0f} MB/s"),
        ("parse", "html_parse", "x textbook", "{:.1f} times the textbook's way"),
        ("models", "requests/s, at 10,000 in flight", "thread", "| {:,.0f}: never more than"),
        ("models", "requests/s, at 10,000 in flight", "task", "were waiting | {:,.0f} |"),
        ("models", "time to start one, us", "thread", "16 KB, {:.0f} \N{MICRO SIGN}s to start"),
        ("models", "tasks, a call blocks the loop", "request p99 ms", "104 ms | {:.0f} ms; with the call in a thread"),
        ("models", "2 threads", "x in the loop", "a loop that only parses | {:.2f} | 1 |"),
        ("models", "2 processes", "x in the loop", "| 1 | {:.2f}: pages go there by pickle"),
        ("feeds", "feeds: async, as it comes", "x, s", "`crawl_async.py` as it comes {:.1f}"),
        ("simulate", "seed 1", "above bound %", "{:.2f} % above what no schedule can beat"),
        ("aggregate", "ours", "requests/s", "one uvicorn worker each: {:,.0f} requests/s"),
        ("aggregate", "ours", "x usual", "{:.1f} times the usual way"),
        ("aggregate", "ours, assembled", "x bare", "for each request it is {:.2f} and"),
        ("aggregate-only", "breaker closed", "p99 ms", "200 requests/s p99 is {:.0f} ms"),
        ("aggregate-only", "chaos", "answers", "lie: {:,} answers, none wrong"),
        ("ingest", "ingest_logs", "lossless/s", "One receiver takes {:,.0f} events/s"),
        ("ingest", "rsyslog", "lossless/s", "buffers), {:,.0f};"),
        ("ingest-soak", "ingest_logs", "p99 s", "receipt to commit {:.2f} s"),
        ("market", "market_pipeline", "holds/s", "It holds {:,.0f}/s on ten exchanges"),
        ("market", "cryptofeed", "holds/s", "as documented {:,.0f} ("),
        ("market-soak", "market_pipeline", "p99 ms", "in Kafka once, p99 {:.0f} ms"),
        ("primitives", "cachetools.TTLCache[key] = value, locked", "ours / theirs", "`TTLCache.put` ({:.2f})"),
    ],
)
def test_says_what_was_measured(name: str, row: str, column: str, said: str) -> None:
    (value,) = (line[column] for line in PUBLISHED[name]["results"] if str(line[""]).strip() == row and column in line)
    middle = value[0] if isinstance(value, list) else value
    assert said.format(middle) in " ".join(TEXT.split())
