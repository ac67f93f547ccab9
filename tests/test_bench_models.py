"""bench/models.py, models_units.py, models_server.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from bench import models, models_server, models_units, runner
from bench.measure import Spread


class RecordingTransport:
    def __init__(self) -> None:
        self.written, self.aborted = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


def late_connection(count: models_server.Count) -> tuple[models_server.Late, RecordingTransport]:
    protocol, transport = models_server.Late(count), RecordingTransport()
    protocol.connection_made(cast(asyncio.Transport, transport))
    return protocol, transport


def test_late_server_counts_what_waits() -> None:
    asyncio.run(late_server_counts())


async def late_server_counts() -> None:
    count = models_server.Count()
    (first, one), (second, two) = late_connection(count), late_connection(count)
    first.data_received(b"GET /0/1 HTTP/1.1\r\n")
    assert count.now == 0
    first.data_received(b"\r\nGET /0/2 HTTP/1.1\r\n\r\nGET /0")
    second.data_received(b"GET /0/4 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (count.now, count.most, one.written) == (3, 3, b"")
    first.data_received(b"/3 HTTP/1.1\r\n\r\n")
    second.connection_lost(None)
    await asyncio.sleep(0)  # the loop calls what is due, in the order of its time
    await asyncio.sleep(0)
    assert one.written == 3 * models_server.ANSWER and two.written == b""
    for most in (b"4", b"0"):
        one.written = b""
        first.data_received(b"GET /most HTTP/1.1\r\n\r\n")
        assert one.written.endswith(b"\r\nContent-Length: 1\r\n\r\n" + most)


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1", b"GET /soon/1 HTTP/1.1", b"hello", b""])
def test_late_server_cuts_what_it_does_not_know(head: bytes) -> None:
    async def cut() -> None:
        count = models_server.Count()
        protocol, transport = late_connection(count)
        protocol.data_received(head + b"\r\n\r\nGET /0/1 HTTP/1.1\r\n\r\n")
        assert transport.aborted and not transport.written and count.most == 0

    asyncio.run(cut())


@pytest.mark.parametrize("model", [models_units.bare_threads, models_units.bare_tasks])
def test_bare_units_ask_as_often_as_they_are_to(model: Any) -> None:
    with models.late_server() as port:
        times, errors, there, memory = model(3, 2, port, 0.01)
        assert (len(times), errors, there) == (6, [], 3) and memory["VmRSS"] > 0
        assert 1 <= models.most_in_flight(port) <= 3
        assert models.most_in_flight(port) == 0
        times, errors, _, _ = model(3, 2, port, 1.0, 0.1)
        assert times == [] and errors[0].startswith("ended after 0.1 s with 0 of 6")
    times, errors, there, _ = model(3, 2, port, 0.01)
    assert (times, len(errors), there) == ([], 3, 0) and all(
        error.startswith("ConnectionRefusedError: ") for error in errors
    )


def test_a_crawler_in_flight_and_one_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with models.late_server() as port:
        cell = models.crawl_cell("crawl_async", 2, 4, port, 0.01, tmp_path)
        assert (cell["requests"], cell["failed"], cell["errors"]) == (4, 0, []) and cell["cpu"] > 0
        assert 0 < cell["times"][0] <= cell["times"][1]
        monkeypatch.setattr(models, "LIMIT", 0.5)
        cell = models.crawl_cell("crawl_threads", 2, 4, port, 60.0, tmp_path)
    assert (cell["requests"], cell["times"], cell["errors"]) == (0, [], ["ended after 0.5 s with 0 of 4"])
    row = models.flight_row("crawl_threads", 2, [cell | {"most": 2, "there": 2}], 60.0)
    assert (row["x ideal"], row["first row s"], row["stops"]) == (0.0, None, "ended after 0.5 s with 0 of 4")


def test_flight_row_is_by_units_and_medians() -> None:
    def cell(last: float) -> dict[str, Any]:
        known = {"requests": 40, "cpu": 0.2, "kb": 500, "virtual": 900, "peak": 2048, "errors": [], "failed": 0}
        return known | {"times": [1.0, last], "most": 10, "there": 10}

    row = models.flight_row("bare tasks", 10, [cell(2.5), cell(4.5), cell(8.5)], 0.5)
    assert row["requests/s"] == (10.0, 5.0, 20.0) and row["x ideal"] == 0.5
    assert (row["KB/unit"], row["virtual KB/unit"]) == ((50, 50, 50), (90, 90, 90))
    assert row["CPU ms/request"] == (5, 5, 5) and row["peak MB"] == (2, 2, 2) and row["stops"] is None
    assert list(row)[1] == "x ideal"


@pytest.mark.parametrize(("where", "workers"), [("nowhere", 1), ("loop", 1), ("thread", 2)])
def test_parsing_beside_a_loop(where: str, workers: int) -> None:
    found = models_units.parsing(where, workers, 0.05)
    assert (found["pages/s"] > 0) == (found["MB/s"] > 0) == (where != "nowhere")
    assert found["lags"] and min(found["lags"]) >= 0


def test_a_call_that_blocks_the_loop_makes_all_wait() -> None:
    with models.late_server() as port:
        latencies = models_units.blocking("tasks", "loop", models_units.BEFORE + 1.0, port)
        threads = models_units.blocking("threads", "thread", models_units.BEFORE + 0.2, port)
    blocked = sum(latency >= models_units.BLOCKED for latency in latencies)
    assert blocked >= models_units.CLIENTS, "each had one under way"
    assert len(threads) >= models_units.CLIENTS


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_idle_units_are_counted(kind: str) -> None:
    found = models_units.idle(kind, 20)
    assert found["units"] == 20 and found["error"] is None and found["us"] > 0


def test_usual_table_takes_what_was_measured() -> None:
    rows: list[dict[str, Any]] = [
        {
            "": name,
            "units": 100,
            "requests/s": Spread(rate, rate, rate),
            "KB/unit": Spread(kb, kb, kb),
            "stops": stops,
        }
        for name, rate, kb, stops in (("bare threads", 90.0, 20.0, "5 x too many"), ("bare tasks", 180.0, 5.0, None))
    ]
    alone = {"threads": {"kb": 16.0, "virtual": 8200.0, "us": 50.0}, "tasks": {"kb": 1.0, "virtual": 0.0, "us": 5.0}}
    told = {row[""]: row for row in models.usual(rows, alone, 20_000)}
    assert told["requests/s, at 100 in flight"] == {
        "": "requests/s, at 100 in flight", "thread / task": 0.5, "thread": 90.0, "task": 180.0
    }  # fmt: skip
    assert told["memory of one that only waits, KB"]["thread / task"] == 16.0
    assert told["largest number tried, all answered (100)"]["thread"] == "no: 5 x too many"
    assert told["largest number tried, all answered (100)"]["task"] == "yes"
    assert told["allowed here, at most"]["task"] == "20,000 connections (RLIMIT_NOFILE)"


def test_models_limits_and_rounds() -> None:
    assert all(limit > 0 for limit in models.thread_limits().values())
    assert [models_units.rounds_of(units) for units in (1, 1000, 5000, 10_000, 1_000_000)] == [6, 6, 4, 2, 2]
    before, after = models_server.allow_files()
    assert after >= before
    assert models.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    with pytest.raises(ValueError, match="no values"):
        models.percentile([], 0.5)


def test_models_unknown_contestants_are_refused() -> None:
    with pytest.raises(SystemExit, match="'nobody' is none of bare threads"):
        runner.main(["models", "--peers", "nobody"])
