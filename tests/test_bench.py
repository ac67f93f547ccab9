"""bench/: contestants, figures, commands."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import aggregate as bench_aggregate
from bench import ingest as bench_ingest
from bench import runner as bench
from bench import scale as bench_scale
from bench import upstreams as bench_upstreams
from bench.peers import PARSERS
from sandbox import sites as sandbox
from tests.absent import reason


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_spread_is_the_median_and_the_range(values: list[float]) -> None:
    spread = bench.Spread.of(iter(values))
    assert spread.median == pytest.approx(statistics.median(values))
    assert (spread.low, spread.high) == (min(values), max(values))


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        bench.Spread.of([])


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
        (bench.Spread(2.0, 2.0, 2.0), "2.00"),
        (bench.Spread(480.2, 469.6, 495.0), "480 (470-495)"),
    ],
)
def test_cell(value: object, text: str) -> None:
    assert bench.cell(value) == text


def test_table_is_aligned() -> None:
    rows: list[dict[str, Any]] = [
        {"": "crawl_async", "pages/s": 1234.0, "x Scrapy": 3.5},
        {"": "curl", "pages/s": bench.Spread(5.0, 4.0, 6.0), "x Scrapy": None},
    ]
    assert bench.table(rows).splitlines() == [
        "                      pages/s  x Scrapy",
        "-----------  ----------------  --------",
        "crawl_async             1,234      3.50",
        "curl         5.00 (4.00-6.00)          ",
    ]


def test_rounds_are_interleaved() -> None:
    assert "".join(name for _, name in bench.interleaved("abc", 4)) == "abcbcacababc"
    assert [number for number, _ in bench.interleaved("ab", 2)] == [0, 0, 1, 1]
    assert list(bench.interleaved("", 3)) == []


def test_without_arguments_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    shown = capsys.readouterr().out
    for name, command in bench.COMMANDS.items():
        assert f"  {name:12} {command.about}\n" in shown
    assert {"crawl", "parse", "primitives", "rate", "million"} <= bench.COMMANDS.keys()


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_command_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for command in bench.COMMANDS[name].examples:
        assert f"python -m bench {command}\n" in shown
        assert bench.make_parser().parse_args(command.split()).command == name


@pytest.mark.parametrize("arguments", [["crawl", "--peers", "nobody"], ["million", "--driver", "nobody"]])
def test_refuses_unknown_names(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="'nobody' is none of crawl_async"):
        bench.main(arguments)


def test_parse_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    assert bench.main(["parse", "--pages", "3", "--size", "3000", "--repeat", "1", "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    whole = json.loads(figures.read_text())
    assert {"html_parse", "textbook"} <= {row[""] for row in whole["results"]} <= PARSERS.keys()
    assert whole["options"]["pages"] == 3 and whole["machine"]["python"]
    for row in whole["results"]:
        assert f"\n{row['']} " in shown
        assert (row["titles"], row["links"], row["words +-2 %"]) == (3, 3, 3)


def test_parse_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"no \*\.html"):
        bench.main(["parse", str(tmp_path)])
    (tmp_path / "one.html").write_text("<title>One</title><body>two words <a href=/x>three</a>")
    assert bench.main(["parse", str(tmp_path), "--repeat", "1", "--no-files"]) == 0
    assert "1 pages, 0.0 MB" in capsys.readouterr().out


def test_primitives_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["primitives", "--calls", "4", "--repeat", "1", "--no-files"]) == 0
    shown = capsys.readouterr().out
    for name in ("primitives.retry", "primitives.retry_async", "TokenBucket.acquire_async", "Semaphore", "Channel",
                 "threading.Semaphore", "asyncio.Semaphore", "queue.Queue", "asyncio.Queue"):  # fmt: skip
        assert f"\n  {name} " in shown


PAGE = b"""<!doctype html><html><head><title> A
 title </title><style>p { color: red }</style></head><body><p>two wo<b>rds</b><script>let no = "<a href=/no>";</script>
<noscript>not this</noscript><a href="../up#top">up</a> <a href=/up>again</a> <a href="mailto:a@b.example">mail</a>
<a href="//other.example/x?y=1">other</a></body></html>"""


@pytest.mark.parametrize("name", PARSERS)
def test_parsers_find_the_same(name: str) -> None:
    if not bench.present(name):
        pytest.skip(reason(name, how="pip install -r requirements-bench.txt"))
    facts = PARSERS[name](PAGE, "http://host.example/a/b")
    assert facts == ("A title", 7, ["http://host.example/up", "http://other.example/x?y=1"])


@pytest.mark.parametrize("peer", ["textbook_async", "textbook_threads"])
def test_textbook_crawlers_write_every_row(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    urls, rows = tmp_path / "urls.txt", tmp_path / "rows.jsonl"
    with sandbox.Sandbox(hosts=2, pages=3, page_bytes=3000) as site:
        urls.write_text("\n".join(site.site_urls()))
        assert bench.main(["_peer", peer, str(urls), str(rows), "2"]) == 0
    found = {row["url"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found.keys() == set(urls.read_text().split())
    assert all(row["title"] and row["word_count"] and row["links_found"] for row in found.values())


def test_site_is_the_sandboxs(tmp_path: Path) -> None:
    urls = tmp_path / "urls.txt"
    assert bench.main(["_site", str(tmp_path / "www"), str(urls), "5", "2", "3000", "8080"]) == 0
    expected = [(page, host) for page in range(3) for host in range(2)][:5]
    base = "http://{host}:8080"
    assert urls.read_text().split() == [
        base.format(host=sandbox.address(host)) + sandbox.page_path(page) for page, host in expected
    ]
    for page, host in expected:
        file = tmp_path / "www" / sandbox.address(host) / (f"p/{page}.html" if page else "index.html")
        assert file.read_bytes() == sandbox.make_page(host, page, 3, 3000, base, hosts=2)


def test_counts_hosts_as_the_sandbox_does() -> None:
    assert [bench.host_address(n) for n in range(600)] == [sandbox.address(n) for n in range(600)]


def test_tells_what_differs(tmp_path: Path) -> None:
    def rows(name: str, *found: tuple[str, str, int, list[str]]) -> bench.Digest:
        file = tmp_path / name
        keys = ("url", "title", "word_count", "links_found")
        file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in found))
        return bench.digest(file)

    ours = rows("a", ("/1", "t", 5, ["x", "y"]), ("/2", "t", 5, []), ("/3", "t", 5, []))
    theirs = rows("b", ("/1", "t", 5, ["y", "x"]), ("/2", "u", 6, ["x"]), ("/4", "t", 5, []))
    assert not any(bench.differences(ours, ours).values())
    assert bench.differences(ours, theirs) == {"pages": 3, "titles": 1, "words": 1, "links": 1, "in one only": 2}


def test_arrivals_are_counted_across_pieces() -> None:
    data = b'{"url":"a\\n","error":null}\n' * 19 + b'{"error":"http: 404"}\n'
    arrivals = bench_scale.Arrivals(20)
    for second, start in enumerate(range(0, len(data), 7)):
        arrivals.take(data[start : start + 7], float(second))
    assert (arrivals.rows, arrivals.failed) == (20, 1)
    assert len(arrivals.times) == 11 and arrivals.times == sorted(arrivals.times)
    assert arrivals.rates() == [2 / (b - a) for a, b in zip(arrivals.times, arrivals.times[1:], strict=False)]


def test_arrivals_all_at_once() -> None:
    arrivals = bench_scale.Arrivals(10)
    arrivals.take(b"\n" * 10, 1.0)
    assert arrivals.times == [1.0] * 11 and len(arrivals.rates()) == 10


def test_feeds_distinct_urls() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as lines, open(writer, "wb", buffering=0) as stream:
        bench_scale.feed(stream, 1001, 7, 80)
        urls = lines.read().split()
    assert len(urls) == len(set(urls)) == 1001
    assert urls[1000] == b"http://127.0.1.7:80/tiny?n=1000"


def test_feed_ends_quietly_when_the_reader_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as stream:
        bench_scale.feed(stream, 10, 1, 80)


def test_children_are_measured_and_ended() -> None:
    run = bench.run_child([sys.executable, "-c", "b'x' * 50_000_000"], "a child")
    assert run.seconds > 0 and run.cpu > 0 and run.peak_mb > 50
    with pytest.raises(SystemExit, match="a child failed with exit code 3"):
        bench.run_child([sys.executable, "-c", "raise SystemExit(3)"], "a child")
    with (
        pytest.raises(KeyError),
        bench.child([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as process,
    ):
        assert process.stdout and process.stdout.readline() == b"1\n"
        raise KeyError
    assert process.returncode == -15


def test_children_get_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9/")
    code = "import os; print(sorted(name for name in os.environ if 'proxy' in name.lower()))"
    with bench.child([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read() == b"[]\n"
        process.wait()


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
    assert bench_aggregate.read_wrk(WRK + lines + WRK_END) == pytest.approx((7001, 6998.15, 0.95, 1050.0, failed))


def aggregate_answer(status: int = 200, state: str = "fresh", **changes: object) -> bench_upstreams.Reply:
    part = {"state": state, "data": 1 if status == 200 else None, "age_s": None, "latency_ms": None, "error": None}
    body = {"partial": False, "generated_at": "", "duration_ms": 1, "sources": {"a": part}}
    if status == 503:
        body |= {"type": "about:blank", "title": "", "status": 503}
    return bench_upstreams.Reply(0.1, status, json.dumps(body | changes).encode())


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
        (bench_upstreams.Reply(0.1, 500, b"Internal Server Error"), "status 500, not the JSON"),
        (bench_upstreams.Reply(0.1, 0, b"ClientOSError()"), "status 0, not the JSON"),
    ],
)
def test_finds_wrong_answers(answer: bench_upstreams.Reply, mistake: str | None) -> None:
    found = bench_upstreams.wrong(answer, ["a"])
    assert found is None if mistake is None else found is not None and found.startswith(mistake)


def test_aggregate_without_wrk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="wrk is needed"):
        bench.main(["aggregate"])


def ingest_step(rate: float, lost: int = 0, *, drained: float | None = 0.5, sent: float = 1.0) -> Any:
    told = bench_ingest.Sent(1000, rate * sent, 0.01)
    return bench_ingest.Step(rate, told, 1000 - lost, 0, 1.0, 0, drained, lost, 0.02, 0.01, 50.0, 0.1, 0.2)


class IngestCourse:
    """Loses what is above so many events a second; ``bad``: steps, by their number, that fail whatever the rate."""

    def __init__(self, most: float, bad: Sequence[int] = ()) -> None:
        self.most, self.bad, self.rates = most, bad, list[float]()

    def run(self, name: str, rate: float, seconds: float) -> Any:
        self.rates.append(rate)
        return ingest_step(rate, 10 if rate > self.most or len(self.rates) in self.bad else 0)


def test_ingest_lossless_is_sustained() -> None:
    assert ingest_step(100).lossless
    assert not ingest_step(100, 1).lossless
    assert not ingest_step(100, drained=None).lossless
    assert ingest_step(100, drained=bench_ingest.DRAIN).lossless
    assert not ingest_step(100, drained=bench_ingest.DRAIN + 0.01).lossless
    assert ingest_step(100, sent=0.89).held_back
    assert not ingest_step(100, sent=0.91).held_back


def test_ingest_climbs_and_halves() -> None:
    course: Any = IngestCourse(330)
    (search,) = bench_ingest.climb(course, ["ingest_logs"], [100, 200, 400, 800, 1600], 3, 1)
    assert course.rates == [100, 200, 400, 400, 800, 300, 350, 350, 325]
    assert (search.low, search.high) == (325, 350)
    assert search.best and search.best.wanted == 325


def test_ingest_a_step_that_fails_has_a_second_chance() -> None:
    course: Any = IngestCourse(1000, bad=(2,))
    (search,) = bench_ingest.climb(course, ["ingest_logs"], [100, 200], 2, 1)
    assert course.rates == [100, 200, 200]
    assert (search.low, search.failures) == (200, 0)


def test_ingest_without_rsyslog_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_ingest, "rsyslogd", lambda: None)
    monkeypatch.setattr(bench_ingest, "course", lambda _: contextlib.nullcontext(IngestCourse(100)))
    assert bench.main(["ingest", "--peers", "ingest_logs,rsyslog", "--rates", "50,100", "--no-files"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert bench_ingest.INSTALL in shown
    assert [line.split()[:2] for line in shown if line.startswith("rsyslog ")] == []
    with pytest.raises(SystemExit, match="'nobody' is none of ingest_logs"):
        bench.main(["ingest", "--peers", "nobody"])


def test_ingest_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    peers = "ingest_logs" + (",rsyslog" if bench_ingest.rsyslogd() else "")
    words = ["--peers", peers, "--rates", "1000", "--seconds", "1", "--options=--flush=0.2 --enrich-wait=60"]
    assert bench.main(["ingest", *words, "--json", str(found)]) == 0
    rows = json.loads(found.read_text())["results"]
    steps = [row for row in rows if "sent" in row]
    assert {row[""] for row in steps} == {*peers.split(",")}
    for row in steps:
        assert (row["sent"], row["lost"], row["twice"]) == (1000, 0, 0)
    assert steps[0]["enriched %"] == 100
