"""bench/crawl.py, parse.py, scale.py, peers.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bench import crawl, measure, runner, scale
from bench.peers import PARSERS, PEERS
from sandbox import sites
from tests.absent import reason


def test_parse_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    assert runner.main(["parse", "--pages", "3", "--size", "3000", "--repeat", "1", "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    whole = json.loads(figures.read_text())
    assert {"html_parse", "textbook"} <= {row[""] for row in whole["results"]} <= PARSERS.keys()
    assert whole["options"]["pages"] == 3 and whole["machine"]["python"]
    for row in whole["results"]:
        assert f"\n{row['']} " in shown
        assert (row["titles"], row["links"], row["words +-2 %"]) == (3, 3, 3)


def test_parse_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"no \*\.html"):
        runner.main(["parse", str(tmp_path)])
    (tmp_path / "one.html").write_text("<title>One</title><body>two words <a href=/x>three</a>")
    assert runner.main(["parse", str(tmp_path), "--repeat", "1", "--no-files"]) == 0
    assert "1 pages, 0.0 MB" in capsys.readouterr().out


PAGE = b"""<!doctype html><html><head><title> A
 title </title><style>p { color: red }</style></head><body><p>two wo<b>rds</b><script>let no = "<a href=/no>";</script>
<noscript>not this</noscript><a href="../up#top">up</a> <a href=/up>again</a> <a href="mailto:a@b.example">mail</a>
<a href="//other.example/x?y=1">other</a></body></html>"""


@pytest.mark.parametrize("name", PARSERS)
def test_parsers_find_the_same(name: str) -> None:
    if not measure.present(name):
        pytest.skip(reason(name, how="pip install -r requirements-bench.txt"))
    facts = PARSERS[name](PAGE, "http://host.example/a/b")
    assert facts == ("A title", 7, ["http://host.example/up", "http://other.example/x?y=1"])


@pytest.mark.parametrize("peer", ["textbook_async", "textbook_threads"])
def test_textbook_crawlers_write_every_row(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    urls, rows = tmp_path / "urls.txt", tmp_path / "rows.jsonl"
    with sites.Sandbox(hosts=2, pages=3, page_bytes=3000) as site:
        urls.write_text("\n".join(site.site_urls()))
        PEERS[peer](str(urls), str(rows), 2)
    found = {row["url"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found.keys() == set(urls.read_text().split())
    assert all(row["title"] and row["word_count"] and row["links_found"] for row in found.values())


def test_site_is_the_sandboxs(tmp_path: Path) -> None:
    urls = tmp_path / "urls.txt"
    crawl.write_site(str(tmp_path / "www"), str(urls), 5, 2, 3000, 8080)
    expected = [(page, host) for page in range(3) for host in range(2)][:5]
    base = "http://{host}:8080"
    assert urls.read_text().split() == [
        base.format(host=sites.address(host)) + sites.page_path(page) for page, host in expected
    ]
    for page, host in expected:
        file = tmp_path / "www" / sites.address(host) / (f"p/{page}.html" if page else "index.html")
        assert file.read_bytes() == sites.make_page(host, page, 3, 3000, base, hosts=2)


def test_tells_what_differs(tmp_path: Path) -> None:
    def rows(name: str, *found: tuple[str, str, int, list[str]]) -> crawl.Digest:
        file = tmp_path / name
        keys = ("url", "title", "word_count", "links_found")
        file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in found))
        return crawl.digest(file)

    ours = rows("a", ("/1", "t", 5, ["x", "y"]), ("/2", "t", 5, []), ("/3", "t", 5, []))
    theirs = rows("b", ("/1", "t", 5, ["y", "x"]), ("/2", "u", 6, ["x"]), ("/4", "t", 5, []))
    assert not any(crawl.differences(ours, ours).values())
    assert crawl.differences(ours, theirs) == {"pages": 3, "titles": 1, "words": 1, "links": 1, "in one only": 2}


def test_arrivals_are_counted_across_pieces() -> None:
    data = b'{"url":"a\\n","error":null}\n' * 19 + b'{"error":"http: 404"}\n'
    arrivals = scale.Arrivals(20)
    for second, start in enumerate(range(0, len(data), 7)):
        arrivals.take(data[start : start + 7], float(second))
    assert (arrivals.rows, arrivals.failed) == (20, 1)
    assert len(arrivals.times) == 11 and arrivals.times == sorted(arrivals.times)
    assert arrivals.rates() == [2 / (b - a) for a, b in zip(arrivals.times, arrivals.times[1:], strict=False)]


def test_arrivals_all_at_once() -> None:
    arrivals = scale.Arrivals(10)
    arrivals.take(b"\n" * 10, 1.0)
    assert arrivals.times == [1.0] * 11 and len(arrivals.rates()) == 10


def test_feeds_distinct_urls() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as lines, open(writer, "wb", buffering=0) as stream:
        scale.feed(stream, 1001, 7, 80)
        urls = lines.read().split()
    assert len(urls) == len(set(urls)) == 1001
    assert urls[1000] == b"http://127.0.1.7:80/tiny?n=1000"


def test_feed_ends_quietly_when_the_reader_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as stream:
        scale.feed(stream, 10, 1, 80)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1, [1]),
        (1000, [1000]),
        (1001, [1000, 1001]),
        (10_000, [1000, 10_000]),
        (25_000, [1000, 10_000, 25_000]),
        (1_000_000, [1000, 10_000, 100_000, 1_000_000]),
    ],
)
def test_scale_sizes(largest: int, expected: list[int]) -> None:
    assert scale.sizes(largest) == expected


def test_scale_rows_are_above_what_starting_costs() -> None:
    megabyte = 1 << 20
    runs = {1000: [measure.Run(3.0, 2.5, 41.0), measure.Run(1.0, 0.5, 41.0)], 10_000: [measure.Run(10.5, 5.5, 50.0)]}
    alone = scale.least([measure.Run(0.5, 0.9, 41.0), measure.Run(0.7, 0.5, 40.0)])
    assert alone == (0.5, 0.5, 40.0)
    small, large = scale.scale_rows("crawl_async.py", alone, runs)
    assert (small["ms/URL"], large["ms/URL"]) == ((1.5, 0.5, 2.5), (1.0, 1.0, 1.0))
    assert (small["x smallest"], large["x smallest"]) == (1.0, pytest.approx(2 / 3))
    assert (small["bytes/URL"], large["bytes/URL"]) == (megabyte / 1000, megabyte / 1000)
    assert (small["more bytes/URL"], large["more bytes/URL"]) == (None, 9 * megabyte / 9000)


@pytest.mark.skipif(
    not shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin"), reason="nginx is not installed"
)
def test_scale_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--scale", "50", "--hosts", "3", "--repeat", "1", "--out", str(tmp_path)]
    assert runner.main(["crawl", *words]) == 0
    whole = json.loads((tmp_path / "crawl-scale.json").read_text())
    assert [(row[""], row["URLs"]) for row in whole["results"]] == [("crawl_async.py", 50), ("crawl_threads.py", 50)]
    assert "\ncrawl_threads.py" in capfd.readouterr().out


def test_scale_may_stand_without_a_number() -> None:
    parse = runner.make_parser().parse_args
    assert [parse(["crawl", *words.split()]).scale for words in ("", "--scale", "--scale 7")] == [None, 100_000, 7]
