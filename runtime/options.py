"""The command line of a program: options of a dataclass with their defaults and ranges, sizes, addresses, exit codes.

What is wrong, a missing package too, is one line, before anything starts. A size means the same to all programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable
from decimal import Decimal
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141

SIZES = "5M and 5MB are 5,000,000 bytes, 5MiB are 5,242,880"


class CannotStart(Exception):
    """One line for the user: why the program ends before it has begun."""


def size(text: str) -> int:
    """``5M``, ``5MB`` -> 5,000,000 bytes, ``5MiB`` -> 5,242,880 (IEC 80000-13); ``ValueError`` for what is no size."""
    match = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,15})?(?:e[0-9]{1,2})?) ?(?:([kMGT])(i?)B?|B?)", text, re.ASCII | re.IGNORECASE
    )
    if match is None:
        raise ValueError
    power = " kmgt".index((match[2] or " ").lower())
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


def shown_size(count: int) -> str:
    """A text for which ``size`` gives ``count`` bytes, as short as may be."""
    for base, mark in ((1024, "i"), (1000, "")):
        for power in (4, 3, 2, 1):
            if count and count % base**power == 0:
                return f"{count // base**power}{' kMGT'[power]}{mark}B"
    return str(count)


def missing(option: str, *modules: str) -> str | None:
    """What to install for ``option``; None if all of ``modules`` is there."""
    names = [module.replace("_", "-") for module in modules if find_spec(module) is None]
    return f"{option} needs {', '.join(names)}: pip install {' '.join(names)}" if names else None


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPv6]:PORT``; ``ValueError`` for anything else."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65_536) or bracketed == (
        ":" not in host
    ):
        raise ValueError(f"expected HOST:PORT or [IPv6]:PORT, not {text!r}")
    host = host[1:-1] if bracketed else host
    if not host:
        raise ValueError(f"expected an address before the port (0.0.0.0 or [::] for all), not {text!r}")
    return host, int(port)


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """A type for ``Parser.option``: the text as it is, unless ``check`` raises a ``ValueError`` with the reason."""

    def text_of(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return text_of


address = checked(split_address)  # a type for ``Parser.option``: ``HOST:PORT``


class Range(NamedTuple):
    """Which numbers an option may be. ``above``: not ``least`` itself."""

    least: float
    most: float = math.inf
    above: bool = False

    def check(self, name: str, value: float, unit: str = "") -> None:
        """``ValueError`` with one line if ``value`` is outside."""
        if not self.least <= value <= self.most or (self.above and value == self.least):
            limit = f" and at most {self.most:,.15g}{unit}" if self.most < math.inf else ""
            raise ValueError(f"{name} must be {'above' if self.above else 'at least'} {self.least:g}{unit}{limit}")


class Parser(argparse.ArgumentParser):
    """The options of ``program``. Those that are fields of the dataclass ``default`` have its values as defaults."""

    def __init__(self, program: str, default: Any, **more: Any) -> None:
        super().__init__(prog=f"python {program}", formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        self._default = default
        self._ranges: dict[str, tuple[str, Range, str]] = {}

    def error(self, message: str) -> NoReturn:
        """End the program with one line, not below two dozen of usage."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (--help tells more)\n")

    def option(
        self, group: Any, name: str, kind: Any, text: str, metavar: str | None = "N", *, within: Any = None, **more: Any
    ) -> None:
        """Add an option with a value to ``group``; its default is in the help, unless ``text`` has it.

        ``within`` are the arguments of its ``Range``."""
        field = name.lstrip("-").replace("-", "_")
        shown = more.get("default", getattr(self._default, field, None))
        if shown not in (None, "", ()) and "default" not in text:
            if kind is size:
                shown = shown_size(shown)
            elif isinstance(shown, int | float):
                shown = f"{shown:g}"
            elif isinstance(shown, tuple):
                shown = ",".join(map(str, shown))
            text = f"{text} (default {shown})".lstrip()
        group.add_argument(name, type=kind, metavar=metavar, help=text, **more)
        if within is not None:
            self._ranges[field] = name, Range(*within), " s" if metavar == "S" else ""

    def demo(self, text: str, of_rate: str, *, seconds: float, rate: float) -> None:
        """The options of a demo: ``--demo``, ``--demo-seconds``, ``--demo-rate``."""
        group = self.add_argument_group("demo")
        group.add_argument("--demo", action="store_true", help=text)
        self.option(group, "--demo-seconds", float, "", "S", within=(0, 1_000_000, True), default=seconds)
        self.option(group, "--demo-rate", float, of_rate, within=(0, 100_000, True), default=rate)

    def given(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of the dataclass that were given, lists as tuples. Ends the program if one is out of its range."""
        for field, (name, numbers, unit) in self._ranges.items():
            value = getattr(args, field)
            if value is not None:
                try:
                    numbers.check(name, value, unit)
                except ValueError as error:
                    self.error(str(error))
        given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(self._default)}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
