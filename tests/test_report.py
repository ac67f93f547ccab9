"""api/report.py: figures, and looks at hosts."""

from __future__ import annotations

import contextlib
import math
import pickle
import random
import socket
import ssl
import threading
from array import array
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from api import report
from runtime import processes
from tests.helpers.processes import proc_run


def report_levels(*levels: tuple[int, float], seed: int = 1, noise: float = 0.3, outliers: float = 0.01) -> list[float]:
    """So many latencies about each level, log-normal, with a few timeouts of 2 s."""
    rng = random.Random(seed)
    return [
        2.0 if rng.random() < outliers else level * math.exp(rng.gauss(0, noise))
        for n, level in levels
        for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("levels", "slack"),
    [
        ([(300, 0.05), (300, 0.1)], 4),
        ([(300, 0.1), (300, 0.05)], 4),
        ([(1000, 0.05), (40, 0.2), (1000, 0.05)], 3),  # a short rise in a long quiet time
        ([(200, 0.05), (200, 0.2), (400, 0.03)], 3),
        ([(30, 0.1), (30, 1.0)], 2),
    ],
)
def test_change_points_are_where_they_were_planted(levels: list[tuple[int, float]], slack: int, seed: int) -> None:
    found = report.changes(report_levels(*levels, seed=seed))
    planted = [sum(n for n, _ in levels[: i + 1]) for i in range(len(levels) - 1)]
    assert len(found) == len(planted)
    for (at, before, after), place, (_, old), (_, new) in zip(found, planted, levels, levels[1:], strict=False):
        assert abs(at - place) <= slack
        assert before == pytest.approx(old, rel=0.25)
        assert after == pytest.approx(new, rel=0.25)


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_no_change(seed: int) -> None:
    assert report.changes(report_levels((2000, 0.05), seed=seed, outliers=0.05)) == []


def test_changes_of_special_series() -> None:
    assert report.changes([0.1] * 500 + [0.2] * 500) == [(500, 0.1, 0.2)]
    assert report.changes([0.1] * 500 + [0.1005] * 500) == []
    assert [report.changes([0.1] * n) for n in (0, 1, 2, 15, 16, 1000)] == [[]] * 6
    assert report.changes([0.0] * 100) == []
    drift = report.changes([0.1 * (1 + i / 1500) for i in range(1500)])
    assert 2 <= len(drift) <= report.MOST
    assert all(after > before for _, before, after in drift)
    many = report.changes([0.05 if i // 50 % 2 else 0.2 for i in range(3000)])
    assert len(many) == report.MOST
    assert all(at % 50 == 0 for at, _, _ in many)


def report_columns(seconds: list[float], statuses: list[str] | None = None, start: float = 0.0) -> report.Columns:
    times = array("d", [start + i for i in range(len(seconds))])
    return report.Columns(times, array("d", seconds), statuses or ["ok"] * len(seconds))


def test_summary() -> None:
    nothing: dict[str, Any] = {"results": 0, "availability": None, "latency_ms": {}, "errors": {}, "change_points": []}
    columns = report_columns([0.1] * 20 + [0.2] * 20, ["ok"] * 30 + ["timeout"] * 9 + ["http"], start=1_700_000_000.0)
    sources = {"none": report_columns([]), "some": pickle.loads(pickle.dumps(columns))}
    assert report.summarise(sources) == {
        "none": nothing,
        "some": {
            "results": 40,
            "availability": 0.75,
            "latency_ms": {"p50": 100.0, "p95": 200.0, "p99": 200.0, "max": 200.0},
            "errors": {"timeout": 9, "http": 1},
            "change_points": [{"at": "2023-11-14T22:13:40+00:00", "before_ms": 100.0, "after_ms": 200.0}],
        },
    }
    refused = report.summarise({"a": report_columns([math.nan, math.inf, -1.0], ["connect"] * 3)})["a"]
    assert refused == nothing | {"results": 3, "availability": 0.0, "errors": {"connect": 3}}
    with pytest.raises(ValueError, match="lengths"):
        report.summarise({"a": columns._replace(statuses=["ok"])})


@pytest.mark.parametrize("n", [1, 2, 3, 19, 20, 21, 99, 100, 101, 200])
def test_summary_has_the_percentiles_of_the_upstreams_and_the_most(n: int) -> None:
    values = [float(value) for value in random.Random(n).sample(range(1000), n)]
    shown = report.summarise({"a": report_columns(values, ["ok"] * n)})["a"]["latency_ms"]
    ranks = report.percentiles(values) | {"max": max(values)}
    assert shown == {name: round(value * 1000, 1) for name, value in ranks.items()}


FLOATS = st.floats() | st.floats(0.001, 10) | st.sampled_from([0.1, 5.0])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(), FLOATS, st.sampled_from(["ok", "ok", "timeout", "http"])), max_size=120))
def test_never_raises_and_counts_add_up(rows: list[tuple[float, float, str]]) -> None:
    times, seconds, statuses = ([row[i] for row in rows] for i in range(3))
    columns = report.Columns(array("d", times), array("d", seconds), statuses)  # type: ignore[arg-type]
    (shown,) = report.summarise({"a": columns}).values()
    assert shown["results"] == len(rows)
    counts = Counter(statuses)
    assert shown["errors"] == {kind: n for kind, n in counts.items() if kind != "ok"}
    assert sum(shown["errors"].values()) + counts["ok"] == shown["results"]
    assert len(shown["change_points"]) <= report.MOST
    assert list(shown["latency_ms"].values()) == sorted(shown["latency_ms"].values())
    assert all(math.isfinite(value) for value in shown["latency_ms"].values())


def test_in_a_worker() -> None:
    async def main(pool: processes.Processes) -> None:
        rows = {"a": report_columns(report_levels((500, 0.1), (500, 0.3)))}
        assert await pool.run(report.summarise, rows) == report.summarise(rows)

    proc_run(main)


class Host:
    """A host that shakes hands over TLS with whoever comes, as ``issue`` says, or without ``context`` says nothing."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Host:
        if self._context is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._context is not None:
            socket.create_connection(("127.0.0.1", self.port)).close()
            self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        assert self._context is not None
        for _ in range(2):  # the client, then __exit__
            peer, _ = self._listener.accept()
            with (
                peer,
                contextlib.suppress(OSError),
                self._context.wrap_socket(peer, server_side=True) as secured,
            ):
                secured.recv(1)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.mark.parametrize(
    ("name", "days", "trusted", "error"),
    [
        ("127.0.0.1", 30, True, None),
        ("localhost", 30, True, None),
        ("127.0.0.1", -1, True, "certificate_expired"),
        ("127.0.0.1", 30, False, "certificate_untrusted"),
        ("other.example", 30, True, "certificate_name"),
    ],
)
def test_certificates(name: str, days: int, trusted: bool, error: str | None, authority: Any) -> None:
    until = datetime.now(UTC) + timedelta(days=days)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_before=until - timedelta(days=90), not_after=until).configure_cert(server)
    client = ssl.create_default_context()
    if trusted:
        authority.configure_trust(client)
    host = name if name == "localhost" else "127.0.0.1"
    with Host(server) as served:
        shown = report.inspect_host(f"https://{host}:{served.port}/secret", 10.0, context=client)
    assert shown["error"] == error
    assert error is None or error in report.HOST_ERRORS
    assert (shown["name"], shown["address"]) == (host, "127.0.0.1")
    assert shown["dns_ms"] >= 0
    assert shown["connect_ms"] >= 0
    assert shown["certificate_days"] == (None if error else pytest.approx(days, abs=0.1))


def test_hosts_that_do_not_answer() -> None:
    with Host() as silent:
        shown = report.inspect_host(f"https://127.0.0.1:{silent.port}", 0.05)
        assert (shown["error"], shown["connect_ms"] is None) == ("timeout", False)
        assert report.inspect_host(f"http://127.0.0.1:{silent.port}", 0.0)["error"] == "timeout"
        shown = report.inspect_host(f"http://127.0.0.1:{silent.port}")
        assert (shown["error"], shown["certificate_days"], shown["address"]) == (None, None, "127.0.0.1")
    shown = report.inspect_host(f"http://127.0.0.1:{silent.port}")
    assert (shown["error"], shown["connect_ms"], shown["dns_ms"] is None) == ("refused", None, False)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("", "url"),
        ("127.0.0.1", "url"),
        ("ftp://127.0.0.1/", "url"),
        ("http://", "url"),
        ("http://[::1", "url"),
        ("http://127.0.0.1:99999/", "url"),
        ("http://127.0.0.1:x/", "url"),
        ("http://" + "a" * 70 + ".example/", "dns"),
        ("http://a..b/", "dns"),
    ],
)
def test_urls_that_are_none(url: str, error: str) -> None:
    assert report.inspect_host(url)["error"] == error
    assert error in report.HOST_ERRORS
