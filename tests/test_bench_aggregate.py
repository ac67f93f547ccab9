"""bench/aggregate.py and aggregate_upstreams.py."""

from __future__ import annotations

import json

import pytest

from bench import aggregate, aggregate_upstreams, runner

WRK = """Running 1s test @ http://127.0.1.1:80/aggregate
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     4.52ms    3.10ms  34.20ms   91.00%
    Req/Sec     7.02k   632.11     7.50k    70.00%
  Latency Distribution
     50%  950.00us
     75%    5.10ms
     90%    8.00ms
     99%    1.05s
  7001 requests in 1.01s, 8.04MB read
"""


WRK_END = "Requests/sec:   6998.15\nTransfer/sec:      7.96MB\n"


@pytest.mark.parametrize(
    ("lines", "failed"),
    [
        ("", 0),
        ("  Non-2xx or 3xx responses: 12\n", 12),
        ("  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 12\n", 22),
    ],
)
def test_reads_what_wrk_prints(lines: str, failed: int) -> None:
    assert aggregate.read_wrk(WRK + lines + WRK_END) == pytest.approx((7001, 6998.15, 0.95, 1050.0, failed))


def aggregate_answer(status: int = 200, state: str = "fresh", **changes: object) -> aggregate_upstreams.Reply:
    part = {"state": state, "data": 1 if status == 200 else None, "age_s": None, "latency_ms": None, "error": None}
    body = {"partial": False, "generated_at": "", "duration_ms": 1, "sources": {"a": part}}
    if status == 503:
        body |= {"type": "about:blank", "title": "", "status": 503, "detail": ""}
    return aggregate_upstreams.Reply(0.1, status, json.dumps(body | changes).encode())


@pytest.mark.parametrize(
    ("answer", "mistake"),
    [
        (aggregate_answer(), None),
        (aggregate_answer(503, "open"), None),
        (aggregate_answer(200, "timeout"), "status 200 for"),
        (aggregate_answer(503, "stale"), "status 503 for"),
        (aggregate_answer(state="fallback", sources={}), "status 200 for"),
        (aggregate_answer(more=1), "the wrong shape"),
        (aggregate_answer(sources={"a": {"state": "fresh"}}), "status 200, not the JSON"),
        (aggregate_upstreams.Reply(0.1, 500, b"Internal Server Error"), "status 500, not the JSON"),
        (aggregate_upstreams.Reply(0.1, 0, b"ClientOSError()"), "status 0, not the JSON"),
    ],
)
def test_finds_wrong_answers(answer: aggregate_upstreams.Reply, mistake: str | None) -> None:
    found = aggregate_upstreams.wrong(answer, ["a"])
    assert found is None if mistake is None else found is not None and found.startswith(mistake)


def test_aggregate_without_wrk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="wrk is needed"):
        runner.main(["aggregate"])
