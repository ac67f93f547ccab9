"""runtime/shell.py, demo.py, options.py and loop.py: what all programs have around them."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from runtime import loop as runtime_loop
from runtime.loop import TaskSupervisor, ends_before
from runtime.monitor import Exporter, counter, gauge
from runtime.options import EXIT_USAGE, Parser, shown_size, size
from tests.helpers.base import HERE, PROGRAM_LIMIT, run_task, until_async, wait_until
from tests.helpers.processes import full_pipe


def those_in(folder: Path) -> Iterator[psutil.Process]:
    """The processes that run in ``folder``, or are told of it."""
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        said = [process.info["cwd"] or "", *(process.info["cmdline"] or ())]
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in text for text in said):
            yield process


@pytest.mark.parametrize(
    ("program", "server"), [("ingest_logs.py", "postgres"), ("market_pipeline.py", "noida-db")], ids=["logs", "market"]
)
def test_a_demo_leaves_nothing_when_its_program_is_killed(program: str, server: str, tmp_path: Path) -> None:
    command = [sys.executable, program, "--demo", "--demo-seconds", "600"]
    environ = {**os.environ, "TMPDIR": str(tmp_path), "DATABASE_URL": "", "KAFKA_BROKERS": ""}
    with subprocess.Popen(
        command, cwd=HERE, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: any(server in each.name() for each in those_in(tmp_path)))
            wait_until(lambda: any(tmp_path.glob("*-demo-*/spool")))  # the program runs
        finally:
            process.kill()
    wait_until(lambda: not any(those_in(tmp_path)))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("driver", ["crawl_threads.py", "crawl_async.py"])
def test_a_crawl_ends_while_nobody_reads_its_stderr(driver: str) -> None:
    reading, writing, _ = full_pipe()
    command = [sys.executable, driver, "http://127.0.0.1:9/", "--retries", "0"]
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, cwd=HERE, timeout=PROGRAM_LIMIT)
    os.close(reading)
    os.close(writing)
    assert child.returncode == 0 and b'"connect' in child.stdout


@dataclasses.dataclass(frozen=True)
class Options:
    count: int = 3
    wait: float = 0.5
    room: int = 32 << 20
    names: tuple[str, ...] = ("a", "b")
    nothing: str | None = None


def parser() -> Parser:
    found = Parser("program.py", Options())
    group = found.add_argument_group("all")
    found.option(group, "--count", int, "how many", within=(1, 10_000))
    found.option(group, "--wait", float, "how long", "S", within=(0, 3600, True))
    found.option(group, "--room", size, "of each", "SIZE", within=(1,))
    found.option(group, "--names", str, "which", "NAME", action="append")
    found.option(group, "--nothing", str, "default: none", "TEXT")
    return found


def test_help_shows_the_defaults() -> None:
    said = " ".join(parser().format_help().split())
    for text in ("how many (default 3)", "how long (default 0.5)", "(default 32MiB)", "(default a,b)", "default: none"):
        assert text in said
    assert said.count("default") == 5


def test_options_that_were_given() -> None:
    found = parser()
    given = found.given(found.parse_args(["--room", "1M", "--names", "x", "--names", "y", "--count", "10000"]))
    assert given == {"room": 1_000_000, "names": ("x", "y"), "count": 10_000}
    assert found.given(argparse.Namespace(count=None, wait=None, room=None)) == {}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--count", "0"], "--count must be at least 1 and at most 10,000"),
        (["--count", "10001"], "--count must be at least 1 and at most 10,000"),
        (["--wait", "0"], "--wait must be above 0 s and at most 3,600 s"),
        (["--wait", "nan"], "--wait must be above 0 s and at most 3,600 s"),
        (["--room", "0"], "--room must be at least 1"),
        (["--count", "x"], "argument --count: invalid int value: 'x'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = parser()
    with pytest.raises(SystemExit) as end:
        found.given(found.parse_args(arguments))
    assert end.value.code == EXIT_USAGE
    assert capsys.readouterr().err == f"python program.py: {line} (--help tells more)\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1kiB"), (5_000_000, "5MB"), (32 << 20, "32MiB"), (1 << 30, "1GiB")],
)
def test_a_size_is_shown_as_it_is_read(count: int, text: str) -> None:
    assert shown_size(count) == text and size(text) == count


def test_metrics_are_read_through_their_table() -> None:
    registry = CollectorRegistry()
    table = (
        counter("x_seen", "Seen"),
        gauge("x_ratio", "Of two", lambda counts: counts.seen / 2),
        gauge("x_by_name", "By name", "parts", "name"),
        counter("x_by_two", "By two", lambda counts: {("a", "b"): 3}, "one", "two"),
        gauge("x_absent", "Not there", "absent"),
    )
    counts = SimpleNamespace(seen=5, parts={"p": 1, "q": 2}, absent=None)
    registry.register(cast("Any", Exporter(table, lambda: counts)))
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    assert lines == [
        "x_seen_total 5.0", "x_ratio 2.5", 'x_by_name{name="p"} 1.0', 'x_by_name{name="q"} 2.0',
        'x_by_two_total{one="a",two="b"} 3.0',
    ]  # fmt: skip


def test_ends_before() -> None:
    async def main() -> None:
        event = asyncio.Event()
        assert await ends_before(asyncio.sleep(0), event)
        waiting = asyncio.create_task(ends_before(asyncio.Event().wait(), event))
        await asyncio.sleep(0)
        event.set()
        assert not await waiting
        with pytest.raises(OSError, match="no"):
            await ends_before(failing(), asyncio.Event())
        cancelled = asyncio.create_task(ends_before(asyncio.Event().wait(), asyncio.Event()))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def failing() -> None:
        raise OSError("no")

    run_task(main())


def test_a_task_that_fails_goes_on_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime_loop, "PAUSE", 0.0)
    monkeypatch.setattr(runtime_loop, "SHOWN", 2)
    calls = 0

    async def work() -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise ValueError
        await asyncio.Event().wait()

    async def main() -> None:
        tasks = TaskSupervisor(logging.getLogger("supervised"))
        tasks.start("worker", work)
        await until_async(lambda: calls == 4)
        assert tasks.faults == 3 and caplog.messages == ["worker failed"] * 2
        await tasks.end()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_task(main())
