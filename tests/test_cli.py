"""crawl/cli.py, output.py: the command line, and rows on their way out."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import tempfile
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ingest_logs
import market_pipeline
from crawl import cli as crawl_cli
from crawl import journal as crawl_journal
from crawl.cli import make_parser, parse_arguments
from crawl.core import Crawl
from crawl.errors import ERROR_KINDS
from crawl.headers import read_headers
from crawl.model import CrawlResult, Options, Request, Response
from crawl.output import Output, RowWriter
from crawl.rows import build_row
from crawl.url_list import read_lines, read_urls
from crawl.urls import MAX_URL
from runtime import options as runtime_options
from runtime.options import EXIT_USAGE
from tests.helpers.base import HANG_LIMIT, wait_until
from tests.helpers.crawl import a_row, written


class Pieces(io.RawIOBase):
    """A raw stream that gives its bytes in pieces of the given sizes, as a pipe does."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, itertools.cycle(sizes)

    def read(self, size: int = -1) -> bytes:
        n = min(next(self._sizes), size)
        piece, self._data = self._data[:n], self._data[n:]
        return piece


@given(
    lines=st.lists(st.text(st.characters(exclude_characters="\r\n\ufeff", exclude_categories=["Cs"]), max_size=30)),
    sizes=st.lists(st.integers(2, 100), min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    form=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@settings(deadline=None)
def test_lines_are_read_whatever_the_pieces(lines: list[str], sizes: list[int], end: str, form: str) -> None:
    stream: Any = Pieces(end.join(lines).encode(form), sizes)
    assert [line for line in read_lines(stream) if line] == [line for line in lines if line]


def test_a_list_may_look_as_lists_do(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    text = "\ufeff# heading\r\nhttp://a/\r\n\r\n  http://b/#frag # why\r\n\thttp://c/\t# tab\r\nnot a URL"
    path.write_bytes(text.encode())
    assert list(read_urls([str(path), "http://d/"])) == [
        "http://a/",
        "http://b/#frag",
        "http://c/",
        "not a URL",
        "http://d/",
    ]
    path.write_bytes(b"http://a/\n" + b"x" * 5_000_000 + b"\nhttp://b/\n\xff\xfe\n")
    first, long, last, rubbish = read_urls([str(path)])
    assert (first, last, len(long), rubbish) == ("http://a/", "http://b/", MAX_URL + 1, "\ufffd\ufffd")


@pytest.mark.parametrize(
    ("magic", "command"), [(b"\x1f\x8b\x08", "zcat"), (b"(\xb5/\xfd", "zstdcat"), (b"PK\x03\x04", "unzip -p")]
)
def test_a_compressed_list_is_said_to_be_one(
    magic: bytes, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packed := tmp_path / "list").write_bytes(magic + b"...")
    with pytest.raises(SystemExit) as ended:
        parse_arguments("crawl_async.py", [str(packed)])
    assert (ended.value.code, f"{command} {packed} | python" in capsys.readouterr().err) == (2, True)
    with pytest.raises(ValueError, match=command):
        list(read_lines(io.BytesIO(magic + b"...")))


def test_rows_as_json_and_jsonl() -> None:
    rows = [a_row(), a_row(title='"\n\u2028é\x00'), a_row(url="http://\ud800/")]
    lines = [json.loads(line) for line in written("jsonl", *rows).splitlines()]
    rows[2].url = "http://\ufffd/"
    assert lines == json.loads(written("json", *rows)) == [dataclasses.asdict(row) for row in rows]
    assert json.loads(written("json")) == []
    assert written("jsonl") == b""


ANY_TEXT = st.text(st.characters(categories=None))
"""Halves of surrogate pairs, too."""


@given(pages=st.lists(st.tuples(ANY_TEXT, st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=200))))
@example([("http://a/", b"text/html; x=\xe9", b"/\xff", b"<title>\xe9&#xD800;</title><a href='/&#xDC00;'>")])
@example([("http://\ud800/", b"text/html", b"", b"")])
@settings(deadline=None)
def test_what_is_written_can_be_read_back(pages: list[tuple[str, bytes, bytes, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.jsonl"
        with open(path, "wb") as file:
            writer = RowWriter(cast(Any, file), "jsonl", CrawlResult)
            for url, kind, location, body in pages:
                headers = read_headers([(b"Content-Type", kind), (b"Location", location), (b"ETag", kind)])
                request = Request(url, "http://a.example/" + headers["Location"], "a.example")
                writer.write(build_row(request, Response(200, headers, b"<html>" + body), CrawlResult))
        crawl = Crawl(Options(depth=1))
        with crawl_journal.open_journal(path) as journal:
            assert crawl_journal.recall(crawl, journal) == len(pages)


@given(title=st.text(), url=st.text())
@settings(deadline=None)
def test_rows_as_csv_are_rfc_4180_and_no_formulas(title: str, url: str) -> None:
    data = written("csv", a_row(title=title, url=url)).decode("utf-8", "surrogatepass")
    head, cells = csv.reader(io.StringIO(data, newline=""))
    assert data.startswith("url,status,title,word_count,links_found,error,fetched_at,duration_ms,")
    assert data.endswith("\r\n")
    row = dict(zip(head, cells, strict=True))
    assert row["links_found"] == "http://b/ http://c/"
    assert row["error"] == ""
    assert not row["title"].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    expected = title.encode("utf-8", "replace").decode()
    assert row["title"] in (expected, "'" + expected)


class GatedStream(io.BytesIO):
    """Each write says that it began and waits to be let through."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__()
        self.began, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.failure, self.writes = failure, 0

    def write(self, data: Any) -> int:
        self.began.release()
        assert self.gate.acquire(timeout=HANG_LIMIT)
        self.writes += 1
        if self.failure:
            raise self.failure
        return super().write(data)


def test_rows_that_come_during_a_write_are_written_in_one_go() -> None:
    crawl, stream = Crawl(Options()), GatedStream()
    output = Output(crawl, RowWriter(stream, "jsonl"))
    threads = [threading.Thread(target=output.emit, args=(a_row(url=str(number)),)) for number in range(6)]
    threads[0].start()
    assert stream.began.acquire(timeout=HANG_LIMIT)
    for number, thread in enumerate(threads[1:], 1):
        thread.start()
        wait_until(lambda left=number: len(output._left) == left)  # type: ignore[misc]
    assert all(thread.is_alive() for thread in threads), "nobody goes on before its row is written"
    stream.gate.release()
    threads[0].join(HANG_LIMIT)
    assert stream.began.acquire(timeout=HANG_LIMIT) and all(thread.is_alive() for thread in threads[1:])
    stream.gate.release()
    for thread in threads:
        thread.join(HANG_LIMIT)
    assert [json.loads(line)["url"] for line in stream.getvalue().splitlines()] == list("012345")
    assert (stream.writes, crawl.stats.snapshot()["rows"]) == (2, 6)


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("a mistake")])
def test_a_write_that_fails_ends_the_run_and_holds_up_nobody(failure: Exception) -> None:
    crawl, stream = Crawl(Options()), GatedStream(failure)
    output = Output(crawl, RowWriter(stream, "jsonl"))
    stream.gate.release()
    for number in range(3):
        output.emit(a_row(url=str(number)))
    output.close()
    assert (crawl.failure, stream.writes, crawl.stats.snapshot()["rows"]) == (failure, 1, 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no URLs"), (["no.txt"], "cannot read no.txt"), (["a.example"], "did you mean https://a.example"),
        (["localhost:8080/x"], "did you mean http://localhost:8080/x"),
        (["-", "--concurrency", "0"], "concurrency must be at least 1"), (["-", "--rate", "x"], "--rate"),
        (["-", "--header", "x"], "--header"), (["-", "--proxy", "ftp://x"], "proxy must be"), (["."], "is a folder"),
        (["-", "--json", "--csv"], "not allowed with"), (["-", "--max-bytes", "10Q"], "--max-bytes"),
        (["-", "--timeout", "inf"], "timeout must be"), (["-", "--timeout", "1e12"], "timeout must be"),
        (["-", "--connect-timeout", "nan"], "connect-timeout must be"), (["-", "--grace", "1e9"], "grace must be"),
        (["-", "--max-time", "1e300"], "max-time must be"), (["-", "--max-bytes", "inf"], "--max-bytes"),
        (["-", "--max-bytes", "-1"], "--max-bytes"), (["-", "--max-bytes", "0"], "max-bytes must be"),
        (["-", "--rate", "1e-310"], "rate must be"), (["-", "--rate", "inf"], "rate must be"),
        (["-", "--total-rate", "5e-324"], "total-rate must be"), (["-", "--burst", "9" * 400], "burst must be"),
        *((["-", "--header", text], "not a valid header")
          for text in ("X-A: 日本", "X-A: a\x01b", "X-A: a\x7f", "X A: b", ": b", "X-A: b\nX-C: d")),
        (["-", "--user-agent", "бот/1.0"], "not a valid header"), (["-", "--header", "Content-Length: 5"], "header"),
        (["-", "--proxy", "http://"], "proxy must be"), (["-", "--proxy", ""], "proxy must be"),
        (["-", "--proxy", "http://:3128"], "proxy must be"), (["-", "--proxy", "http://a b:1"], "proxy must be"),
        (["-", "--proxy", "http://a:99999"], "proxy must be"), (["-", "--proxy", "http://a:x"], "proxy must be"),
        (["-", "--proxy", "http://a:0"], "proxy must be"), (["-", "--proxy", "http://a:1/path"], "proxy must be"),
        (["-", "--proxy", "socks5://a:1"], "proxy must be"), (["-", "--proxy", "http://[::1:1"], "proxy must be"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments("crawl_async.py", argv)
    said = capsys.readouterr().err
    assert (caught.value.code, said.count("\n")) == (EXIT_USAGE, 1)
    assert message in said


@pytest.mark.parametrize("value", ["http://", "socks5://a:1", "https://a:1", "a:port", "a b"])
@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY"])
def test_a_proxy_of_the_environment_that_cannot_be_right_is_wrong_usage(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        parse_arguments("crawl_threads.py", ["-"])
    assert caught.value.code == EXIT_USAGE
    assert f"environment for {name.lower()[:-6]}:" in capsys.readouterr().err.splitlines()[-1]
    assert parse_arguments("crawl_threads.py", ["-", "--proxy", "p:3128"])[1].proxy == "p:3128"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("500k", 500_000), ("64K", 64_000), ("64KB", 64_000), ("64KiB", 65_536),
        ("5M", 5_000_000), ("5MB", 5_000_000), ("5 MB", 5_000_000), ("5MiB", 5_242_880), ("5Mi", 5_242_880),
        ("1.5M", 1_500_000), ("0.1GiB", 107_374_182), ("2T", 2 * 10**12), ("10B", 10), ("5e6", 5_000_000),
        *((text, None) for text in ("", "M", "inf", "nan", "-1", "1e", "5Q", "5MM", "1.M", ".5M", "5iB", "٥")),
        ("9" * 16, None),
    ],
)  # fmt: skip
def test_a_size_means_the_same_to_all_programs(text: str, size: int | None) -> None:
    programs: list[Any] = [crawl_cli, ingest_logs, market_pipeline]
    assert [program.size for program in programs] == [runtime_options.size] * 3
    if size is None:
        with pytest.raises(ValueError):
            runtime_options.size(text)
    else:
        assert runtime_options.size(text) == size


def test_options_from_the_command_line() -> None:
    args, options = parse_arguments(
        "crawl_async.py",
        ["http://a/", "--csv", "--rate=0", "-", "--max-bytes=10M", "--header", "A: b:c", "--insecure", "--retries=0"],
    )
    assert args.sources == ["http://a/", "-"]
    assert args.form == "csv"
    assert options == Options(rate=0, max_bytes=10_000_000, headers=(("A", "b:c"),), insecure=True, retries=0)
    assert parse_arguments("x", ["-"])[1] == Options()
    assert parse_arguments("x", ["--demo"])[1].rate > 2


def test_help_names_every_kind_of_error_and_exit_code() -> None:
    text = make_parser("crawl_async.py").format_help()
    for word in [*ERROR_KINDS, "examples:", "exit codes:", "--per-host", "(default 64)"]:
        assert word in text
