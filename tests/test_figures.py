"""bench/results/: the published figures, and their plots."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from bench import panels, plot, runner
from tests.helpers.base import HERE, texts

RESULTS = HERE / "bench/results"
PUBLISHED = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def test_are_of_one_commit_and_of_every_command() -> None:
    (commit,) = {figures["commit"] for figures in PUBLISHED.values()}
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    assert runner.find_commands().keys() - {"plot", "million"} <= PUBLISHED.keys()


def test_have_no_plots_that_belong_to_none() -> None:
    drawn = [name for name, figures in PUBLISHED.items() if panels.panels_of(name, figures["results"])]
    assert len(drawn) > 10
    expected = {f"{name}-{theme}.svg" for name in (*drawn, "architecture") for theme in plot.THEMES}
    assert {path.name for path in RESULTS.glob("*.svg")} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_tell_the_command_that_made_them(name: str) -> None:
    figures = PUBLISHED[name]
    command = re.fullmatch(r"python (?:bench\.py|-m bench) (.+)", figures["command"])
    assert command is not None and figures["machine"]["python"] and figures["results"]
    args = runner.make_parser().parse_args(shlex.split(command[1]))
    assert runner.name_of(args) == figures["name"] == name
    assert figures["options"].items() <= vars(args).items()


@pytest.mark.parametrize("name", PUBLISHED)
def test_are_shown_by_their_plots(name: str) -> None:
    wanted = set[str]()
    for panel in panels.panels_of(name, PUBLISHED[name]["results"]):
        wanted.add(panel.title)
        if isinstance(panel, panels.Lines):
            wanted |= {panel.x, panel.y} | {line.name for line in panel.lines}
            continue
        for bar in panel.bars:
            value, more = panels.median(bar.value), f" ({bar.more})" if bar.more else ""
            wanted |= {bar.name} if value is None else {bar.name, panels.figure_text(value) + more}
    if wanted:
        light, dark = (RESULTS / f"{name}-{theme}.svg" for theme in ("light", "dark"))
        assert wanted <= set(texts(light.read_text()))
        assert dark.read_text() == plot.recolour(light.read_text(), "dark")
