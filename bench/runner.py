"""``python -m bench COMMAND``: finds the commands of this room, runs one, and keeps what it measured.

* **Commands are found, not listed**: the files of the room whose names have no underscore are imported, and register
  theirs with `@command`. ``NAME_MORE.py`` is what NAME needs when it runs, and is free to import what is large; the
  other files import the standard library only, and no more of them are imported than it takes to find the command: so
  this process stays small, and ``--help`` is quick.
* **Each run leaves its rows and a plot** in bench/latest/, which git ignores: ``NAME.json`` holds the command line, the
  machine, all versions and the commit beside them. The published ones are in bench/results/, and are replaced by
  ``--out bench/results`` only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench
from bench import plot
from bench.measure import COMMANDS, HERE, Command, OrNone, find_program, present

LIBRARIES = "aiohttp uvloop ada-url orjson scrapy twisted parsel lxml selectolax tenacity stamina aiolimiter cryptofeed"
"""Those whose versions are printed; the figures keep those of all that the requirements name."""
PROGRAMS = {"nginx": "-v", "wrk": "-v", "curl": "--version", "rsyslogd": "-v"}
"""What else may take part, and the flag that makes it tell its version."""
LATEST = HERE / "bench" / "latest"
VARIANTS = ["scale", "soak", "shared", "seeds", "only"]
"""Options that make something else of a subcommand: its files have a name of their own."""


def find_commands(name: str = "") -> dict[str, Command]:
    """All that the files of the room register; or what is known when the one of this name is there."""
    files = [file.name for file in pkgutil.iter_modules(bench.__path__) if "_" not in file.name]
    for file in sorted(files, key=lambda file: file != name):
        importlib.import_module(f"bench.{file}")
        if name in COMMANDS:
            break
    return dict(sorted(COMMANDS.items()))


def describe_machine() -> dict[str, Any]:
    """What a reader of the figures wants to know of where they were made; printed, too."""
    cpu, versions = platform.processor(), {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    named = [line for file in HERE.glob("requirements*.txt") for line in file.read_text().splitlines()]
    names = {match[0] for line in named if (match := re.match(r"[A-Za-z][\w.-]*", line))}
    for name in (*LIBRARIES.split(), *sorted(names.difference(LIBRARIES.split()))):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    for name, flag in PROGRAMS.items():
        with contextlib.suppress(OSError, subprocess.SubprocessError, TypeError):
            said = subprocess.run([find_program(name), flag], capture_output=True, text=True, timeout=10)  # type: ignore[list-item]
            versions[name] = re.search(r"\d+\.[\w.]+", said.stdout + said.stderr)[0]  # type: ignore[index]
    cores, load, python = os.cpu_count(), round(os.getloadavg()[0], 2), platform.python_version()
    print(f"{cores} x {cpu or platform.machine()}, load {load}, {platform.platform()}")
    print(
        f"Python {python}; "
        + ", ".join(f"{name} {versions[name]}" for name in LIBRARIES.split() if name in versions)
        + "\n"
    )
    return {"cpu": cpu, "cores": cores, "load": load, "system": platform.platform(), "python": python} | versions


def describe_commit() -> str | None:
    """What git calls the state of these files; None without git, or outside of a clone."""

    def git(*words: str) -> str:
        words = ("git", "-C", str(HERE), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("describe", "--always") + "-dirty" * bool(changed)
    return None


def name_of(args: argparse.Namespace) -> str:
    """What the files of a run are called."""
    return "-".join((args.command, *(word for word in VARIANTS if getattr(args, word, None))))


def keep(args: argparse.Namespace, argv: Sequence[str], whole: dict[str, Any]) -> None:
    """Write the figures, and their plot if matplotlib is there, as the command line says."""
    name = name_of(args)
    whole = {"name": name, "command": shlex.join(("python", "-m", "bench", *argv))} | whole
    text = json.dumps(whole, indent=1) + "\n"
    if args.json:
        Path(args.json).write_text(text)
    elif not args.no_files:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(text)
        drawn = []
        if present("matplotlib"):
            drawn = plot.draw(json.loads(text), folder)
        print("\nwritten:", *(os.path.relpath(file) for file in (folder / f"{name}.json", *drawn)))


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def make_parser(name: str = "") -> argparse.ArgumentParser:
    """Of all commands; or, if only that of this name will be used, of no more than are known then."""
    found = find_commands(name)
    form = argparse.RawDescriptionHelpFormatter
    listing = "\n".join(f"  {name:12} {command.about}" for name, command in found.items())
    examples = "\n".join(f"  python -m bench {command.examples[0]}" for command in found.values())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        formatter_class=form,
        description=f"Side-by-side measurements, in one run, as ratios.\n\ncommands:\n{listing}",
        epilog=f"examples:\n{examples}\n  python -m bench crawl --help\n\n"
        "The peers: pip install -r requirements-bench.txt; nginx, which serves the pages: from the system's packages.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    for name, command in found.items():
        examples = "examples:\n" + "\n".join(f"  python -m bench {example}" for example in command.examples)
        sub = commands.add_parser(name, description=command.about, epilog=examples, formatter_class=form)
        for option, (default, about) in command.options.items():
            if option.isupper():
                sub.add_argument(option, nargs="*" if default == () else "?", default=default, help=about)
            elif isinstance(default, OrNone):
                about += f" (without a number: {default.value})"
                sub.add_argument(f"--{option}", nargs="?", type=positive, const=default.value, metavar="N", help=about)
            elif default is False:
                sub.add_argument("--" + option.replace("_", "-"), action="store_true", help=about)
            else:
                kind = positive if default is None or isinstance(default, int) else type(default)
                about += "" if default is None else f" (default {default})"
                flag = "--" + option.replace("_", "-")
                sub.add_argument(flag, type=kind, default=default, help=about, metavar="X" if kind is str else "N")
        about = (
            "where NAME.json, with machine and versions, and the plots are; default: bench/latest, which git ignores;"
        )
        about += " the published ones are in bench/results"
        sub.add_argument("--out", metavar="DIR", default=LATEST, type=Path, help=about)
        if name != "plot":
            sub.add_argument("--no-files", action="store_true", help="print the table only")
            sub.add_argument("--json", metavar="FILE", help="write the figures there, and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(argv[0] if argv else "")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "plot":
        COMMANDS["plot"].run(args)
        return 0
    options = {name: value for name, value in vars(args).items() if name not in ("out", "no_files", "json")}
    whole: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": describe_commit()}
    whole |= {"options": options, "machine": describe_machine()}
    keep(args, argv, whole | {"results": COMMANDS[args.command].run(args)})
    return 0
