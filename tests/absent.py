"""Packages of requirements-test.txt that are not there: each test that uses one is skipped, and no other."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

import pytest

OF = {"jsonschema_rs": "schemathesis"}
"""What comes with another package."""
testing = False
"""Whether all is collected."""
STOOD_IN = ("hypothesis", "jsonschema_rs", "protego", "schemathesis", "trustme")


def reason(*names: str, how: str = "pip install -r requirements-test.txt") -> str:
    return f"needs {', '.join(names)}: {how}"


def needs(*modules: str) -> pytest.MarkDecorator:
    """The mark of tests that need these packages."""
    absent = [module.replace("_", "-") for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(absent), reason=reason(*absent))


class StandIn:
    """What a file takes from an absent package at its head, and makes of it there. To call it in a test skips that."""

    def __init__(self, path: str) -> None:
        self._path, self._package = path, path.partition(".")[0]

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._path}.{name}")

    def __call__(self, *given: Any, **_: Any) -> Any:
        why = reason(OF.get(self._package, self._package))
        if testing:
            pytest.skip(why)
        if self._path.endswith("()") and len(given) == 1 and isinstance(given[0], FunctionType):  # it decorates
            return pytest.mark.skip(reason=why)(given[0])
        return StandIn(f"{self._path}()")

    def __or__(self, _: object) -> StandIn:
        return self

    def __rmul__(self, _: object) -> StandIn:
        return self

    def __getitem__(self, _: object) -> StandIn:
        return self

    def __mro_entries__(self, _: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


class Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in STOOD_IN else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = StandIn(module.__name__).__getattr__  # type: ignore[method-assign]


sys.meta_path.append(Finder())  # the last: asked for what nobody else has
