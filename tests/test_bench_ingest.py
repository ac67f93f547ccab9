"""bench/ingest.py and what it needs; bench/ladder.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import ingest, ingest_contestants, ingest_course, ladder, runner
from bench.ingest_send import Sent


def made_step(rate: float, lost: int = 0, *, drained: float | None = 0.5, sent: float = 1.0) -> Any:
    told = Sent(1000, rate * sent, 0.01)
    return ingest_course.Step(rate, told, 1000 - lost, 0, 1.0, 0, drained, lost, 0.02, 0.01, 50.0, 0.1, 0.2)


class Course:
    """Loses what is above so many events a second; ``bad``: steps, by their number, that fail whatever the rate."""

    def __init__(self, most: float, bad: Sequence[int] = ()) -> None:
        self.most, self.bad, self.rates = most, bad, list[float]()

    def run(self, name: str, rate: float, seconds: float) -> Any:
        self.rates.append(rate)
        return made_step(rate, 10 if rate > self.most or len(self.rates) in self.bad else 0)


def test_lossless_is_sustained() -> None:
    assert made_step(100).lossless
    assert not made_step(100, 1).lossless
    assert not made_step(100, drained=None).lossless
    assert made_step(100, drained=ingest_course.DRAIN).lossless
    assert not made_step(100, drained=ingest_course.DRAIN + 0.01).lossless
    assert made_step(100, sent=0.89).held_back
    assert not made_step(100, sent=0.91).held_back


def test_climbs_and_halves() -> None:
    course: Any = Course(330)
    (search,) = ladder.climb(course, ["ingest_logs"], [100, 200, 400, 800, 1600], 3, 1)
    assert course.rates == [100, 200, 400, 400, 800, 300, 350, 350, 325]
    assert (search.low, search.high) == (325, 350)
    assert search.best and search.best.wanted == 325


def test_a_step_that_fails_has_a_second_chance() -> None:
    course: Any = Course(1000, bad=(2,))
    (search,) = ladder.climb(course, ["ingest_logs"], [100, 200], 2, 1)
    assert course.rates == [100, 200, 200]
    assert (search.low, search.failures) == (200, 0)


def test_without_rsyslog_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ingest, "rsyslogd", lambda: None)
    monkeypatch.setattr(ingest_course, "course", lambda _: contextlib.nullcontext(Course(100)))
    assert runner.main(["ingest", "--peers", "ingest_logs,rsyslog", "--rates", "50,100", "--no-files"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert ingest_contestants.INSTALL in shown
    assert [line.split()[:2] for line in shown if line.startswith("rsyslog ")] == []
    with pytest.raises(SystemExit, match="'nobody' is none of ingest_logs"):
        runner.main(["ingest", "--peers", "nobody"])


def test_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    peers = "ingest_logs" + (",rsyslog" if ingest_contestants.rsyslogd() else "")
    words = ["--peers", peers, "--rates", "1000", "--seconds", "1", "--options=--flush=0.2 --enrich-wait=60"]
    assert runner.main(["ingest", *words, "--json", str(found)]) == 0
    rows = json.loads(found.read_text())["results"]
    steps = [row for row in rows if "sent" in row]
    assert {row[""] for row in steps} == {*peers.split(",")}
    for row in steps:
        assert (row["sent"], row["lost"], row["twice"]) == (1000, 0, 0)
    assert steps[0]["enriched %"] == 100
