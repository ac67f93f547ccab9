"""bench/runner.py: commands, and the files that they leave."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import runner
from bench.measure import HERE, module
from tests.absent import reason

COMMANDS = runner.find_commands()


def test_without_arguments_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name:12} {command.about}\n" in shown
    assert {"crawl", "parse", "primitives", "rate", "million"} <= COMMANDS.keys()


def test_starts_from_any_folder_with_the_standard_library_alone(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import bench.runner; bench.runner.find_commands();"
        "paths = [getattr(sys.modules[name], '__file__', None) or '' for name in set(sys.modules) - before];"
        "print([path for path in paths if 'site-packages' in path])"
    )
    words, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(HERE)}
    assert subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout == b"[]\n"


def test_children_run_from_any_folder_and_so_do_theirs(tmp_path: Path) -> None:
    words = [*map(str, module("bench.models_units")), "parse", "process", "1", "0.05"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(done.stdout)["pages/s"] > 0


def test_no_part_knows_the_runner() -> None:
    importing = re.compile(r"^ *(from bench import .*\brunner\b|(from|import) bench\.runner\b)", re.M)
    files = [file.name for file in (HERE / "bench").glob("*.py") if importing.search(file.read_text())]
    assert files == ["__main__.py"]


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        runner.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for command in COMMANDS[name].examples:
        assert f"python -m bench {command}\n" in shown
        assert runner.make_parser().parse_args(command.split()).command == name


@pytest.mark.parametrize("arguments", [["crawl", "--peers", "nobody"], ["million", "--driver", "nobody"]])
def test_refuses_unknown_names(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="'nobody' is none of crawl_async"):
        runner.main(arguments)


def test_primitives_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["primitives", "--calls", "4", "--repeat", "1", "--no-files"]) == 0
    shown = capsys.readouterr().out
    for name in ("primitives.retry", "primitives.retry_async", "TokenBucket.acquire_async", "Semaphore", "Channel",
                 "threading.Semaphore", "asyncio.Semaphore", "queue.Queue", "asyncio.Queue"):  # fmt: skip
        assert f"\n  {name} " in shown


draws = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason=reason("matplotlib", how="pip install -r requirements-bench.txt"),
)
PARSE = ["parse", "--pages", "2", "--size", "3000", "--repeat", "2"]


@draws
def test_a_run_leaves_figures_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert runner.main([*PARSE, "--out", str(folder)]) == 0
    names = ["parse-dark.svg", "parse-light.svg", "parse.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    whole = json.loads((folder / "parse.json").read_text())
    assert whole["name"] == "parse" and whole["command"].startswith("python -m bench parse --pages 2 ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", whole["date"]) and whole["options"]["pages"] == 2
    assert {"python", "cpu", "aiohttp", "pytest"} <= whole["machine"].keys() and "commit" in whole
    assert list(whole["results"][0])[1] == "x textbook" and len(whole["results"][0]["MB/s"]) == 3
    before = {name: (folder / name).read_bytes() for name in names}
    (folder / "parse-dark.svg").unlink()
    assert runner.main(["plot", "--out", str(folder)]) == 0
    assert runner.main(["plot", "parse", "--out", str(folder)]) == 0
    assert {name: (folder / name).read_bytes() for name in names} == before


@draws
def test_plot_tells_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"plot: .*nothing\.json: "):
        runner.main(["plot", "nothing", "--out", str(tmp_path)])
    (tmp_path / "torn.json").write_text('{"name": ')
    with pytest.raises(SystemExit, match=r"plot: .*torn\.json: "):
        runner.main(["plot", "--out", str(tmp_path)])


def test_without_matplotlib_has_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name))
    assert runner.main([*PARSE, "--out", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["parse.json"]
    assert "matplotlib: not installed: pip install -r requirements-bench.txt" in capsys.readouterr().out


def test_leaves_nothing_if_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LATEST", tmp_path / "latest")
    assert runner.main([*PARSE, "--no-files"]) == 0
    assert runner.main([*PARSE, "--json", str(tmp_path / "figures.json")]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]
    assert runner.make_parser().parse_args(PARSE).out == tmp_path / "latest"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("ingest", "ingest"),
        ("ingest --soak 3", "ingest-soak"),
        ("crawl --scale 5", "crawl-scale"),
        ("simulate --seeds 2", "simulate-seeds"),
    ],
)
def test_variants_have_files_of_their_own(words: str, name: str, tmp_path: Path) -> None:
    args = runner.make_parser().parse_args([*words.split(), "--out", str(tmp_path)])
    runner.keep(args, words.split(), {"results": []})
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.json"]


def test_commit_is_of_the_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert runner.describe_commit() or not (HERE / ".git").exists()
    monkeypatch.setattr(runner, "HERE", tmp_path)
    assert runner.describe_commit() is None
