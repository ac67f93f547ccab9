"""Servers that are measured, or that others are measured against: started as children, and looked at from outside.

A `Server` serves once `serving` yields it, and is ended, by its id, when the block is left; its CPU time and memory are
its own, from its /proc entry (Linux), and so are steadier than a rate on a shared machine. A `Stage` is what the parts
of `bench aggregate` stand on: a folder, upstreams, and any number of uvicorns before them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.measure import HERE, child, free_port, host_address, module

SETTINGS = {"AGGREGATE_RATE": "0"}
"""The environment of our server in all parts; `DATA_FOLDER` is temporary, too."""
NO_DATABASE, EMBEDDED = {"DATABASE_URL": "none"}, {"DATABASE_URL": ""}
"""More of it, in all parts but `reports`; in `reports`."""
CALM = """
[weather]
url = "{base}/api/weather?city=Berlin"
ttl = {ttl}
[rates]
url = "{base}/api/rates/EUR"
ttl = {ttl}
[news]
url = "{base}/api/news"
ttl = {ttl}
"""


class Server(NamedTuple):
    base: str
    pid: int

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and body."""
        try:
            with urllib.request.urlopen(self.base + path, timeout=10) as answer:
                return answer.status, dict(answer.headers), answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read().decode()

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def used(self) -> tuple[float, float]:
        """Seconds of CPU so far, and those in which its main thread could have run, had there been a core for it."""
        return self.cpu(), int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9

    def rss_mb(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextlib.contextmanager
def serving(name: str, words: Sequence[object], port: int, log: Path, **settings: str) -> Iterator[Server]:
    """A child that serves, once it does. Raises SystemExit with the last line that it said if it does not."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | settings
    with (
        open(log, "wb") as errors,
        child(words, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=HERE) as process,
    ):
        server, limit = Server(f"http://{host_address(0)}:{port}", process.pid), time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                server.get("/health/live")
                break
            if process.poll() is not None or time.monotonic() > limit:
                said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise SystemExit(f"bench: {name} did not start: {said[0]}")
            time.sleep(0.05)
        yield server


class Stage:
    """A folder, the upstreams, and the servers before them: all ended when the stack is."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self._port, self._count = stack, free_port, itertools.count()
        self._host = host_address(0)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        self.upstreams = self._serve("the sandbox", [*module("bench.aggregate_upstreams"), port := self._port()], port)

    def _serve(self, name: str, words: Sequence[object], port: int, **settings: str) -> Server:
        log = self.folder / f"server{next(self._count)}.log"
        return self._stack.enter_context(serving(name, words, port, log, **settings))

    def start(self, target: str, *options: str, **settings: str) -> Server:
        """A uvicorn, the same for all but for these."""
        words = [sys.executable, "-m", "uvicorn", target, "--host", self._host, "--port", port := self._port()]
        words += ["--loop", "uvloop", "--http", "httptools", "--no-server-header", *options]
        return self._serve(target, words, port, **settings)

    def ours(self, config: str, *options: str, database: bool = False) -> Server:
        path = self.folder / f"config{next(self._count)}.toml"
        path.write_text(config)
        settings = SETTINGS | {"AGGREGATE_CONFIG": str(path), "DATA_FOLDER": str(self.folder / "data")}
        settings |= EMBEDDED if database else NO_DATABASE
        return self.start("aggregate_app:app", *(options or ["--no-access-log"]), **settings)

    def calm(self, ttl: float = 600) -> str:
        return CALM.format(base=self.upstreams.base, ttl=ttl)

    def calls(self) -> dict[str, int]:
        """How many requests each upstream got, by path."""
        paths: dict[str, int] = json.loads(self.upstreams.get("/calls")[2])
        return paths
