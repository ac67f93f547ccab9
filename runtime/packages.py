"""Packages that only some options need: asked for before anything starts, so that what is missing is one line."""

from __future__ import annotations

from importlib.util import find_spec


def missing(option: str, *modules: str, instead: str = "") -> str | None:
    """What to install for ``option``; None if all of ``modules`` is there."""
    names = [module.replace("_", "-") for module in modules if find_spec(module) is None]
    if not names:
        return None
    return f"{option} needs {', '.join(names)}: pip install {' '.join(names)}{instead}"
