"""``pytest test_all.py`` runs all of tests/; ``test_all.py::NAME`` the tests of that name, in whichever file it is.

What needs a package that is not installed is skipped, and said once at the end; with ``--complete`` the run has failed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import absent

HERE = Path(__file__).resolve().parent

gc.disable()  # until all is collected: thousands of items, and none is garbage

pytest_plugins = [f"tests.helpers.{path.stem}" for path in sorted((HERE / "tests/helpers").glob("[a-z]*.py"))]
pytest.register_assert_rewrite(*pytest_plugins)  # some import others before pytest does


def meant(argument: str) -> list[str]:
    """What an argument of pytest's command line stands for."""
    file, _, name = argument.partition("::")
    if Path(file).resolve() != HERE / "test_all.py":
        return [argument]
    if not name:
        return [str(HERE / "tests")]
    outer = re.escape(name.partition("::")[0].partition("[")[0])
    defines = re.compile(rf"^(?:(?:async )?def|class) {outer}\b|^{outer} = ", re.M)
    found = [path for path in sorted((HERE / "tests").glob("test_*.py")) if defines.search(path.read_text())]
    return [f"{path}::{name}" for path in found] or [argument]


def wanting(config: pytest.Config) -> dict[str, Counter[str]]:
    """How to get it -> what tests were skipped for want of, and how many."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    found = dict[str, Counter[str]]()
    for report in [] if reporter is None else reporter.stats.get("skipped", []):
        if match := re.match("Skipped: needs ([^:]*): (.*)", report.longrepr[2]):
            found.setdefault(match[2], Counter())[match[1]] += 1
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--complete", action="store_true", help="fail if a test was skipped for want of a package")


def pytest_configure(config: pytest.Config) -> None:
    config.args[:] = [each for argument in config.args for each in meant(argument)]


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Each process imports other files first: their asserts, which take seconds to rewrite, are cached for the rest."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None or sys.dont_write_bytecode or session.config.args != [str(HERE / "tests")]:
        return
    first = int(worker["workerid"][2:])
    for path in sorted((HERE / "tests").glob("test_*.py"))[first :: worker["workercount"]]:
        with contextlib.suppress(Exception):  # which the collection tells
            importlib.import_module(f"tests.{path.stem}")


@pytest.hookimpl(tryfirst=True)  # before xdist, after whose answer nobody is asked
def pytest_runtestloop() -> None:
    absent.testing = True
    gc.freeze()  # it stays: no collection need look at it again
    gc.enable()
    gc.set_threshold(20_000, 20, 50)  # much the same as the programs': a fifth of the tests' time went into it


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--complete") and not session.exitstatus and wanting(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for how, counts in wanting(config).items():
        names = ", ".join(sorted(counts))
        terminalreporter.write_line(f"{counts.total()} skipped for want of {names}: {how}")
