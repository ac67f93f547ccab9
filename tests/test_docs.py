"""README.md and docs/: links lead somewhere, commands parse, options and figures are those of the programs."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import itertools
import json
import re
import runpy
import shlex
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from uvicorn.main import main as uvicorn_command

from api import config
from crawl.errors import ERROR_KINDS
from tests.helpers.base import HERE

PAGES = [HERE / "README.md", HERE / "DESIGN.md", *sorted((HERE / "docs").glob("*.md"))]


TEXTS = {path: path.read_text() for path in PAGES}


FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


PUBLISHED = {path.stem: json.loads(path.read_text()) for path in (HERE / "bench/results").glob("*.json")}


def prose(path: Path) -> str:
    return FENCED.sub("", TEXTS[path])


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(path)):
        if re.match("https?://", target):
            continue
        file, _, anchor = target.partition("#")
        where = (path.parent / file).resolve() if file else path
        assert where.exists() and where.is_relative_to(HERE), target
        assert not anchor or anchor in anchors(where), target
    for file in re.findall(r"`([\w./]+/[\w.]+\.(?:py|md|toml|txt|html))`", prose(path)):
        assert (HERE / file).exists(), file


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pictures_are_there_for_light_and_dark_pages(path: Path) -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]*)"', TEXTS[path])
    assert all((path.parent / picture).is_file() for picture in shown)
    assert [picture.replace("-dark", "-light") for picture in shown[::2]] == shown[1::2]


def test_all_plots_are_shown() -> None:
    shown = {Path(picture).name for text in TEXTS.values() for picture in re.findall(r'src="([^"]*)"', text)}
    assert shown == {path.name for path in (HERE / "bench/results").glob("*-light.svg")}


def test_each_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)", TEXTS[HERE / "README.md"]))
    assert {f"docs/{path.name}" for path in PAGES if path.parent.name == "docs"} <= linked


# ----------------------------------------------------------------------------------------------------- commands


def commands(path: Path) -> list[list[str]]:
    """What a reader would type, word by word: lines of code, and code within a line that begins with a program."""
    lines = [line for language, code in FENCED.findall(TEXTS[path]) if not language for line in code.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)", prose(path), re.M)
    within = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(path))]
    lines += [code for code in within if re.match(r"(\w+=\S* )*(python|uvicorn|pytest|pip|py-spy) ", code)]
    found: list[list[str]] = []
    for line in lines:
        try:
            words = shlex.split(line.replace(r"\|", "|"), comments=True)
        except ValueError:  # the output of a program
            continue
        found += [list(part) for ends, part in itertools.groupby(words, lambda word: word in ("|", "&")) if not ends]
    return found


class Caught(BaseException):
    """A program was about to read its command line."""


@functools.cache
def parser_of(*words: str) -> ArgumentParser:
    """The parser of ``python FILE``, or of ``python -m ROOM [PART]``, as the program itself makes it."""

    def caught(parser: ArgumentParser, *_: Any) -> None:
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as program:
        patch.setattr(ArgumentParser, "parse_args", caught)
        patch.setattr(ArgumentParser, "parse_intermixed_args", caught)
        patch.setattr(sys, "argv", list(words))
        if words[0].endswith(".py"):
            runpy.run_path(str(HERE / words[0]), run_name="__main__")
        runpy.run_module(words[0], run_name="__main__")
    (parser,) = program.value.args
    assert isinstance(parser, ArgumentParser)
    return parser


def check_python(words: list[str]) -> None:
    """If ``python`` with these words runs a program of ours, its own parser has to take them."""
    words = ["2" if word == "N" else word for word in words]
    if words[:2] == ["-m", "yappi"]:
        words = words[words.index("-o") + 2 :]
    if words[0] == "…" or words[:2] == ["-m", "pstats"]:
        return
    program, *given = words[1:] if words[0] == "-m" else words
    assert (HERE / program / "__main__.py" if words[0] == "-m" else HERE / program).is_file(), words
    part = given[:1] if program == "sandbox" and given[:1] in (["logs"], ["exchanges"], ["broker"]) else []
    parser = parser_of(program, *part)
    try:
        (parser.parse_args if program == "bench" else parser.parse_intermixed_args)(given[len(part) :])
    except SystemExit as end:
        assert end.code == 0 and "--help" in given, words


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_parse(path: Path) -> None:
    for words in commands(path):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if "python" in words and words[0] in ("python", "py-spy"):
            check_python(words[words.index("python") + 1 :])
        elif words[:2] == ["pip", "install"]:
            assert all((HERE / words[n + 1]).is_file() for n, word in enumerate(words) if word == "-r"), words
        elif words[:1] == ["pytest"]:
            assert all((HERE / word.partition("::")[0]).is_file() for word in words[1:] if ".py" in word), words
        elif words[:2] == ["uvicorn", "aggregate_app:app"]:
            given = ["2" if word == "N" else word for word in words[1:]]
            assert uvicorn_command.make_context("uvicorn", given).params["app"] == "aggregate_app:app"


def test_the_promised_commands_are_there() -> None:
    said = [" ".join(words) for path in PAGES for words in commands(path)]
    for command in (
        "python crawl_threads.py urls.txt",
        "python crawl_async.py urls.txt --csv",
        "uvicorn aggregate_app:app",
        "pytest test_all.py",
        *(re.sub(r".*bench(\.py)? (\w+) .*", r"python -m bench \2", made["command"]) for made in PUBLISHED.values()),
    ):
        assert any(f"{each} ".startswith(f"{command} ") for each in said), command


@pytest.mark.parametrize(
    ("program", "page"), [("crawl_async.py", "crawl"), ("ingest_logs.py", "logs"), ("market_pipeline.py", "market")]
)
def test_the_page_of_a_program_names_its_options(program: str, page: str) -> None:
    text = TEXTS[HERE / f"docs/{page}.md"]
    actions = [action for action in parser_of(program)._actions if action.help != SUPPRESS and action.dest != "help"]
    there = {name for action in actions for name in action.option_strings}
    flags = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
    assert there <= set(flags.findall(text))
    in_tables = "\n".join(re.findall(r"^\|.*", text, re.M))
    assert set(flags.findall(in_tables)) <= there


def test_the_keys_of_an_upstream_are_all_there_with_their_defaults() -> None:
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]*) \|", (HERE / "docs" / "aggregate.md").read_text(), re.M)
    fields = {field.name: field.default for field in dataclasses.fields(config.Upstream)}
    said: dict[str, float | None] = {}
    for names, defaults in table:
        keys = re.findall(r"`(\w+)`", names)
        if keys[0] in fields:
            numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?", defaults.partition(";")[0])
            said.update(zip(keys, map(float, numbers), strict=True) if numbers else dict.fromkeys(keys))
    assert said.keys() == fields.keys() - {"name", "base"}
    assert {key: number for key, number in said.items() if number is not None} == {
        key: float(default) for key, default in fields.items() if isinstance(default, (int, float))
    }


def test_the_kinds_of_errors_are_all_there() -> None:
    (table,) = re.findall(r"### Kinds of errors\n(.*?)\n#", TEXTS[HERE / "docs/crawl.md"], re.S)
    assert re.findall(r"^\| `(\w+)`", table, re.M) == list(ERROR_KINDS)


def test_examples_in_python_compile_and_import_what_is_there() -> None:
    for text in TEXTS.values():
        for code in (code for language, code in FENCED.findall(text) if language == "python"):
            compile(code, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, alias.name) for alias in node.names), node.module


# ------------------------------------------------------------------------------------------------------ figures


def measured(name: str, row: str, column: str) -> list[Any]:
    """A figure that was published: the median, and where there are several runs the smallest and the largest.

    ``row`` is ``group: row`` where the rows stand in groups, each below a line that has nothing but its name.
    """
    group, found = "", []
    for line in PUBLISHED[name]["results"]:
        title = str(line[""]).strip()
        if all(value is None for key, value in line.items() if key):
            group = f"{title}: "
        elif row == f"{group}{title}" and column in line:
            found.append(line[column])
    (value,) = found
    return value if isinstance(value, list) else [value]


CRAWL = "| {:,.0f} ({:,.0f}-{:,.0f}) |"


@pytest.mark.parametrize(
    ("name", "row", "column", "said"),
    [
        *(
            ("crawl", row, "pages/s", CRAWL)
            for row in ("crawl_async", "crawl_async x2", "crawl_threads", "scrapy", "scrapy_stripped", "curl")
        ),
        ("crawl", "textbook_async", "pages/s", CRAWL),
        ("crawl", "textbook_threads", "pages/s", CRAWL),
        ("crawl", "crawl_async", "x Scrapy", "| {:.1f} | 64 |"),
        ("crawl", "crawl_async x2", "x Scrapy", "| {:.1f} | 64 |"),
        ("crawl", "crawl_threads", "x Scrapy", "| {:.1f} | 16 |"),
        ("crawl", "scrapy_stripped", "x Scrapy", "| {:.1f} | 32 |"),
        ("crawl", "curl", "x Scrapy", "| {:.1f} | 64 |"),
        ("crawl", "crawl_async", "peak MB", "| {:.0f} MB |"),
        ("crawl", "crawl_threads", "peak MB", "| {:.0f} MB |"),
        ("crawl", "scrapy", "peak MB", "| {:.0f} MB |"),
        ("parse", "html_parse", "MB/s", "`html_parse.py` | {:.0f} |"),
        ("parse", "html_parse", "x textbook", "| {:.1f} |"),
        ("parse", "selectolax", "MB/s", "| {:.0f} |"),
        ("parse", "textbook", "MB/s", "| {:.0f} |"),
        ("rate", "crawl_async.py", "wall s", "{:.0f} s"),
        ("rate", "crawl_threads.py", "wall s", "{:.0f} s"),
        ("feeds", "whole: one after the other", "s", "| {:.1f} s |"),
        ("feeds", "feeds: threads, 10 workers", "x, s", "| {:.1f} times"),
        ("feeds", "feeds: async, 10 in flight", "x, s", "| {:.1f} times"),
        ("feeds", "feeds: async, as it comes", "x, s", "| {:.1f} times"),
        ("feeds", "whole: async, as it comes", "x, s", "| {:.1f} |"),
        ("simulate", "seed 1", "above bound %", "{:.2f} %"),
        ("simulate", "seed 1", "peak MB", "{:.0f} MB"),
        ("frontier", "1,000,000 rows", "claim p50 ms", "{:.1f} ms"),
        ("frontier", "10,000,000 rows", "claim p99 ms", "(p99 {:.1f})"),
        ("frontier", "8 workers", "URLs/s", "{:,.0f} URLs/s"),
        ("models", "requests/s, at 10,000 in flight", "thread", "{:,.0f}"),
        ("models", "requests/s, at 10,000 in flight", "task", "| {:,.0f} |"),
        ("models", "time to start one, us", "thread", "{:.0f} \N{MICRO SIGN}s"),
        ("models", "tasks, a call blocks the loop", "request p99 ms", "| {:.0f} ms"),
        ("models", "2 threads", "x in the loop", "| {:.2f} |"),
        ("models", "2 processes", "x in the loop", "| {:.2f}"),
        ("aggregate", "ours", "requests/s", CRAWL),
        ("aggregate", "ours", "x usual", "| {:.1f} |"),
        ("aggregate", "ours", "x bare", "| {:.2f} |"),
        ("aggregate", "ours, access log", "requests/s", "| {:,.0f} |"),
        ("aggregate", "ours, assembled", "requests/s", "| {:,.0f} |"),
        ("aggregate", "bare Starlette", "requests/s", "| {:,.0f} |"),
        ("aggregate", "usual way (FastAPI, aiocache)", "requests/s", "| {:,.0f} |"),
        ("aggregate-only", "breaker closed", "p99 ms", "| {:.0f} ms |"),
        ("aggregate-only", "breaker open", "p99 ms", "| {:.1f} ms |"),
        ("aggregate-only", "chaos", "answers", "{:,} answers"),
        ("aggregate-only", "/aggregate beside reports", "p99 ms", "{:.1f} ms"),
        ("ingest", "ingest_logs", "lossless/s", "| {:,.0f} |"),
        ("ingest", "ingest_logs-x2", "lossless/s", "| {:,.0f} |"),
        ("ingest", "rsyslog", "lossless/s", "| {:,.0f} |"),
        ("ingest", "rsyslog-defaults", "lossless/s", "| {:,.0f} |"),
        ("ingest-soak", "ingest_logs", "p99 s", "{:.2f} s"),
        ("ingest-soak", "ingest_logs", "sent", "{:,} events"),
        ("market", "market_pipeline", "holds/s", "| {:,.0f}/s |"),
        ("market", "market_pipeline-7", "holds/s", "| {:,.0f}/s |"),
        ("market", "cryptofeed", "holds/s", "| {:,.0f}/s |"),
        ("market", "cryptofeed-batched", "holds/s", "| {:,.0f}/s |"),
        ("market-soak", "market_pipeline", "p99 ms", "{:.0f} ms"),
        ("market-soak", "market_pipeline", "sent", "{:,} trades"),
        ("primitives", "cache, put: cachetools.TTLCache[key] = value, locked", "ours / theirs", "| {:.2f} |"),
        ("primitives", "cache, hit: cachetools.TTLCache.get, locked", "ours / theirs", "| {:.2f} |"),
        ("primitives", "retry, success at the first try: tenacity.Retrying", "ours / theirs", "| {:.2f} |"),
        ("primitives", "circuit breaker, success: circuitbreaker.circuit (decorated)", "ours / theirs", "| {:.2f} |"),
        ("primitives", "channel, put and get: queue.Queue", "ours / theirs", "| {:.2f} |"),
        ("primitives", "eight calls at once: asyncio.wait_for(gather)", "ours / theirs", "| {:.2f} |"),
    ],
)
def test_figures_are_those_that_were_measured(name: str, row: str, column: str, said: str) -> None:
    text = TEXTS[HERE / ("docs/models.md" if name == "models" else "docs/measured.md")]
    assert said.format(*measured(name, row, column)) in text


def test_figures_are_of_one_commit() -> None:
    (commit,) = {figures["commit"] for figures in PUBLISHED.values()}
    assert f"`{commit}`" in TEXTS[HERE / "docs/measured.md"]
