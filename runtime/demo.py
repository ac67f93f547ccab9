"""A demo beside a program: servers of the sandbox, a temporary folder, and nothing of them left at the end.

A server that is a process (a broker, PostgreSQL) has a guardian: a process of ours, which starts it, and stops it when
its own stdin ends: when the demo is over, or this program is, however it ends. Ctrl-C while it starts is heard when it
can be stopped again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.loop import STOPPING
from runtime.options import CannotStart
from runtime.processes import module_command
from runtime.stderr import say

if TYPE_CHECKING:
    from runtime.shell import Program


class Demo(ABC):
    """While it is entered, ``options`` (a dataclass with a ``spool``) lead to its servers."""

    def __init__(self, program: str, options: Any) -> None:
        self._program, self.options = program, options
        self._stack = contextlib.ExitStack()
        self.folder = Path()

    def __enter__(self) -> Any:
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix=f"{self._program.partition('_')[0]}-demo-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            changes = self.begin(stack)
            if self.options.spool == type(self.options).spool:
                changes["spool"] = str(self.folder / "spool")
            self.options = dataclasses.replace(self.options, **changes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @abstractmethod
    def begin(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        """Start servers, which ``stack`` stops; returns what changes in the options. ``CannotStart``."""

    @abstractmethod
    async def play(self, program: Program[Any]) -> None:
        """Play the demo; then stop the program."""

    @abstractmethod
    def report(self, counts: Any) -> bool:
        """Print what came of it; returns whether it is as it should be."""

    def start(self, stack: contextlib.ExitStack, kind: type, name: str, folder: Path, called: str) -> str:
        """Start ``kind(folder)``, a server with ``start`` and ``stop``; returns what its ``start`` does: the address.

        Messages call it ``name``, or ``called`` if it did not start (``CannotStart``)."""
        where = "a temporary folder" if folder.is_relative_to(self.folder) else folder
        say(self._program, f"starting {name} in {where}")
        command = module_command("runtime.demo", kind.__module__, kind.__name__, folder, self.folder)
        guardian = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert guardian.stdin is not None and guardian.stdout is not None
        stack.enter_context(guardian.stdout)
        stack.callback(guardian.wait)
        stack.callback(guardian.stdin.close)
        answer = json.loads(guardian.stdout.readline() or '["it ended", null]')
        if answer[0] is not None:
            raise CannotStart(f"{called} did not start: {answer[0]}")
        return str(answer[1])


def main() -> None:
    """Run a guardian. Arguments: a module, the name of a class in it, the server's folder, the demo's."""
    module, kind, folder, temporary = sys.argv[1:]
    for number in STOPPING:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the server would inherit
    server = getattr(importlib.import_module(module), kind)(Path(folder))
    try:
        try:
            answer = [None, server.start()]
        except Exception as error:
            answer = [str(error), None]
        with contextlib.suppress(OSError):
            print(json.dumps(answer), flush=True)
        sys.stdin.read()
    finally:
        server.stop()
        shutil.rmtree(temporary, ignore_errors=True)
