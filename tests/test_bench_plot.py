"""bench/plot.py and panels.py."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench import panels, plot, runner
from tests.absent import reason
from tests.helpers.base import texts


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows as the subcommand makes them, after JSON."""
    spread = [10.0, 8.0, 13.0]
    steps = {"lost": 0, "lost %": 0.0, "p99 s": 0.1}
    flight = {"requests/s": spread, "first row s": spread, "CPU ms/request": spread, "KB/unit": spread, "x ideal": 0.5}
    tenths = {"first tenth": 100.0, "slowest tenth": 90.0, "last tenth": 110.0, "peak MB": 30.0}
    made: dict[str, list[dict[str, Any]]] = {
        "aggregate": [
            {"": "ours", "x usual": 9.0, "requests/s": spread, "p99 ms": spread},
            {"": "/report", "p99 ms": 7.0},
        ],
        "crawl": [
            {"": who, "x Scrapy": 2.0, "pages/s": spread, "peak MB": spread}
            for who in ("crawl_async", "scrapy", "curl")
        ],
        "crawl-scale": [
            {"": "crawl_async.py", "URLs": n, "ms/URL": spread, "more bytes/URL": None if n == 1000 else spread}
            for n in (1000, 10_000, 100_000)
        ],
        "feeds": [{"": f"{part}: crawl_async", "x, s": 7.0, "s": spread} for part in ("feeds", "articles", "whole")],
        "frontier": [{"": "10 rows", "claim p50 ms": 1.0, "claim p99 ms": 2.0}, {"": "2 workers", "URLs/s": 9.0}],
        "ingest": [{"": "rsyslog", "x rsyslog": 1.0, "lossless/s": spread}]
        + [{"": who, "wanted/s": n, "sent": 9} | steps for who in ("ingest_logs", "rsyslog") for n in (1, 2)],
        "market": [{"": "cryptofeed", "exchanges": 7, "holds/s": spread, "x cryptofeed": 1.0}]
        + [{"": "cryptofeed", "wanted/s": n, "sent": 100, "missing": n // 100, "p99 ms": 90.0} for n in (100, 200)],
        "million": [{"": "crawl_threads.py"} | tenths],
        "models": [{"": who, "units": n} | flight for who in ("bare threads", "bare tasks") for n in (10, 10_000)]
        + [{"": "in the loop", "lag p99 ms": spread}, {"": "tasks, nothing blocks", "request p99 ms": spread}],
        "parse": [{"": "html_parse", "x textbook": 4.0, "MB/s": spread}],
        "primitives": [
            {"": "retry & <more>", "ours / theirs": None, "ns": None},
            {"": "  primitives.retry", "ours / theirs": None, "ns": spread},
            {"": "  tenacity.Retrying", "ours / theirs": 0.0049, "ns": [4000.0, 3900.0, 4100.0]},
        ],
        "rate": [{"": "crawl_async.py", "wall s": 100.5, "ideal s": 99.99}],
        "simulate": [{"": "seed 1", "makespan s": 100.1, "bound s": 100.0}],
        "market-soak": [{"": "market_pipeline", "sent": 9, "p99 ms": 80.0, "peak MB": 100.0, "MB at 10 s": 9.0}],
    }  # fmt: skip
    return made[name]


draws = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason=reason("matplotlib", how="pip install -r requirements-bench.txt"),
)


@draws
@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("aggregate", ["requests/s", "ms"]),
        ("crawl", ["pages/s; curl, which only fetches: 10", "MB"]),
        ("crawl-scale", ["ms a URL", "bytes a URL", "URLs in the crawl"]),
        ("feeds", ["s"]),
        ("frontier", ["ms", "URLs/s"]),
        ("ingest", ["events/s", "rate, events/s", "% of what was sent", "s"]),
        ("market", ["trades/s", "rate, trades/s", "% of what was sent", "ms"]),
        ("million", ["rows/s", "MB"]),
        ("models", ["requests/s", "s", "ms", "KB", "in flight"]),
        ("parse", ["MB/s"]),
        ("primitives", ["ns", "retry & <more>", "4,000 (ours: 0.0049\N{MULTIPLICATION SIGN})"]),
        ("rate", ["s"]),
        ("simulate", ["simulated s"]),
        ("market-soak", ["ms", "MB", "p99", "at 10 s"]),
    ],
)
def test_plots_are_svg_with_units(name: str, units: list[str], tmp_path: Path) -> None:
    figures = {"name": name, "results": rows_of(name)}
    files = plot.draw(figures, tmp_path)
    assert [file.name for file in files] == [f"{name}-light.svg", f"{name}-dark.svg"]
    light, dark = (file.read_text() for file in files)
    assert texts(light) == texts(dark) and set(units) <= set(texts(light))
    for text, paper, accent in ((light, "#ffffff", "#0072b2"), (dark, "#0d1117", "#56b4e9")):
        assert len(text) < 60_000 and f"fill: {paper}" in text
        assert accent in text or name in ("market", "million")
        assert "'DejaVu Sans', Verdana, sans-serif" in text and "date>" not in text


@draws
def test_plots_of_the_same_figures_are_the_same() -> None:
    drawn = panels.panels_of("crawl-scale", rows_of("crawl-scale"))
    first, second = (plot.render("crawl-scale", "a title", drawn, plot.THEMES["dark"]) for _ in "ab")
    assert first == second


def test_plot_of_every_subcommand() -> None:
    assert runner.find_commands().keys() - {"plot"} <= panels.PLOTS.keys()


@draws
def test_plot_names_of_lines_do_not_overlap() -> None:
    lines = [panels.Line(f"line {n}", [(1.0, 5.0), (10.0, 7.0 + n / 100)]) for n in range(6)]
    lines.append(panels.Line("early", [(1.0, 5.0), (1.5, 100.0)]))
    panel = panels.Lines("a title", "x, m", "y, s", lines)
    svg = plot.render("test", "a title", [panel, panel], plot.THEMES["light"])
    found = [
        part for part in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if "line" in (part.text or "")
    ]
    assert len(found) == 12
    for _, group in itertools.groupby(found, key=lambda part: part.get("x")):
        heights = sorted(float(part.get("y") or 0) for part in group)
        assert len(heights) == 6 and all(b - a > 8 for a, b in itertools.pairwise(heights))


@draws
def test_plot_names_of_lines_that_end_early_do_not_overlap() -> None:
    ends = [("line a", 1.5, 0.0), ("line b", 1.6, 0.1), ("line c", 10.0, 0.0)]
    lines = [panels.Line(name, [(1.0, 9.0), (x, y)]) for name, x, y in ends]
    panel = panels.Lines("a title", "x, m", "y, s", lines, log_y=False)
    svg = plot.render("test", "a title", [panel], plot.THEMES["light"])
    found = [
        part for part in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if "line" in (part.text or "")
    ]
    assert len({part.get("x") for part in found}) == 1
    heights = sorted(float(part.get("y") or 0) for part in found)
    assert len(heights) == 3 and all(b - a > 8 for a, b in itertools.pairwise(heights))


def test_plot_of_a_ladder_takes_the_better_try() -> None:
    tries = [(10, 0, 0.1), (20, 5, 0.9), (20, 0, 0.4), (40, 9, 0.8)]
    rows = [{"": "ingest_logs", "wanted/s": rate, "sent": 10, "lost": lost, "p99 s": p99} for rate, lost, p99 in tries]
    lost, late = (panel for panel in panels.panels_of("ingest", rows) if isinstance(panel, panels.Lines))
    assert [line.points for line in lost.lines] == [[(10.0, 0.0), (20.0, 0.0), (40.0, 90.0)]]
    assert [line.points for line in late.lines] == [[(10.0, 0.1), (20.0, 0.4), (40.0, 0.8)]]


def test_plot_of_nothing() -> None:
    assert plot.draw({"name": "parse", "results": []}, Path("nowhere")) == []
    assert panels.panels_of("anything", [{"": "a", "what": "text", "none": None}]) == []
    for figures in ({}, {"name": "parse"}, {"name": 1, "results": []}):
        with pytest.raises(ValueError, match="no figures"):
            plot.draw(figures, Path("nowhere"))


@pytest.mark.parametrize(
    ("value", "text", "ratio"),
    [
        (0.0049, "0.0049", "0.0049"),
        (0.98, "0.98", "0.98"),
        (1.0, "1", "1.0"),
        (9.96, "9.96", "10"),
        (37_681, "37,681", "37681"),
    ],
)
def test_plot_figures(value: float, text: str, ratio: str) -> None:
    assert panels.figure_text(value) == text
    assert panels.ratio_text(value) == ratio + "\N{MULTIPLICATION SIGN}"
