"""bench/measure.py: figures, tables, children."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import measure
from bench.measure import Spread
from sandbox import sites


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_spread_is_the_median_and_the_range(values: list[float]) -> None:
    spread = Spread.of(iter(values))
    assert spread.median == pytest.approx(statistics.median(values))
    assert (spread.low, spread.high) == (min(values), max(values))


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("", ""),
        ("scrapy", "scrapy"),
        (1234567, "1,234,567"),
        (0.02, "0.02"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (18223.4, "18,223"),
        (Spread(2.0, 2.0, 2.0), "2.00"),
        (Spread(480.2, 469.6, 495.0), "480 (470-495)"),
    ],
)
def test_cell(value: object, text: str) -> None:
    assert measure.cell(value) == text


def test_table_is_aligned() -> None:
    rows: list[dict[str, Any]] = [
        {"": "crawl_async", "pages/s": 1234.0, "x Scrapy": 3.5},
        {"": "curl", "pages/s": Spread(5.0, 4.0, 6.0), "x Scrapy": None},
    ]
    assert measure.table(rows).splitlines() == [
        "                      pages/s  x Scrapy",
        "-----------  ----------------  --------",
        "crawl_async             1,234      3.50",
        "curl         5.00 (4.00-6.00)          ",
    ]


def test_rounds_are_interleaved() -> None:
    assert "".join(name for _, name in measure.interleaved("abc", 4)) == "abcbcacababc"
    assert [number for number, _ in measure.interleaved("ab", 2)] == [0, 0, 1, 1]
    assert list(measure.interleaved("", 3)) == []


def test_counts_hosts_as_the_sandbox_does() -> None:
    assert [measure.host_address(n) for n in range(600)] == [sites.address(n) for n in range(600)]


def test_children_are_measured_and_ended() -> None:
    run = measure.run_child([sys.executable, "-c", "b'x' * 50_000_000"], "a child")
    assert run.seconds > 0 and run.cpu > 0 and run.peak_mb > 50
    with pytest.raises(SystemExit, match="a child failed with exit code 3"):
        measure.run_child([sys.executable, "-c", "raise SystemExit(3)"], "a child")
    with (
        pytest.raises(KeyError),
        measure.child([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as process,
    ):
        assert process.stdout and process.stdout.readline() == b"1\n"
        raise KeyError
    assert process.returncode == -15


def test_children_get_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9/")
    code = "import os; print(sorted(name for name in os.environ if 'proxy' in name.lower()))"
    with measure.child([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read() == b"[]\n"
        process.wait()
