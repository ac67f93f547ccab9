"""``pytest test_all.py`` runs all of tests/; ``test_all.py::NAME`` the tests of that name, in whichever file it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytest_plugins = [f"tests.helpers.{path.stem}" for path in sorted((HERE / "tests/helpers").glob("[a-z]*.py"))]
pytest.register_assert_rewrite(*pytest_plugins)  # some import others before pytest does


def meant(argument: str) -> list[str]:
    """What an argument of pytest's command line stands for."""
    file, _, name = argument.partition("::")
    if Path(file).resolve() != HERE / "test_all.py":
        return [argument]
    if not name:
        return [str(HERE / "tests")]
    defines = re.compile(
        rf"^(?:(?:async )?def|class) {re.escape(re.split('::|[[]', name)[0])}\b|^{re.escape(name)} = ", re.M
    )
    found = [path for path in sorted((HERE / "tests").glob("test_*.py")) if defines.search(path.read_text())]
    return [f"{path}::{name}" for path in found] or [argument]


def pytest_configure(config: pytest.Config) -> None:
    config.args[:] = [each for argument in config.args for each in meant(argument)]
