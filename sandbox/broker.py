"""A broker that speaks Kafka, for demos and tests: the one of the wheel noida-db, on loopback.

It is a process of its own. The methods of ``Broker`` block: they are for threads, of which one at a time may use it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import orjson

CONTROL = "noida.control.json"
"""Where the broker for development says who it is."""


class Broker:
    """The broker of the wheel noida-db in ``folder``, on loopback.

    It keeps its data in memory and saves it now and then: ``stop`` loses nothing that it had acknowledged
    before, ``kill`` may, and so may what it still acknowledges while it stops. Another life's broker
    that still runs in the folder is stopped first. ``port`` 0: a free one, kept from then on. Unlike Kafka it refuses
    commits from the moment that a group begins to form again, and such a group may hang.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.port = folder, port
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def program() -> Path | None:
        spec = find_spec("noida_db")
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).with_name("noida-db")
        return path if path.is_file() else None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, limit: float = 10.0) -> str:
        """The address, when it takes connections. Raises ``OSError`` (``TimeoutError`` is one)."""
        if self.running:
            return self.address
        program = self.program()
        if program is None:
            raise FileNotFoundError("the wheel noida-db is not installed")
        if not program.stat().st_mode & stat.S_IXUSR:
            program.chmod(0o755)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / CONTROL).exists():
            down = [str(program), "down", "--data-dir", str(self.folder)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(down, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=limit, check=False)
        if not self.port:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                self.port = sock.getsockname()[1]
        command = [str(program), "start", "--data-dir", str(self.folder)]
        command += ["--only", "kafka", "--kafka-port", str(self.port)]
        with open(self.folder / "broker.log", "ab") as out:
            self._process = subprocess.Popen(  # a session of its own: Ctrl-C is for the program, which flushes first
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.monotonic() + limit
        while True:
            if self._ready():
                return self.address
            if self._process.poll() is not None or time.monotonic() > deadline:
                code = self._process.poll()
                self.kill()
                raise OSError(f"the broker did not start (exit code {code}), see {self.folder / 'broker.log'}")
            time.sleep(0.01)

    def _ready(self) -> bool:
        """It has written who it is, and takes connections: by itself the second may be another's port."""
        try:
            said = orjson.loads((self.folder / CONTROL).read_bytes())
            if self._process is None or said["pid"] != self._process.pid:
                return False
            with socket.create_connection(("127.0.0.1", self.port), 1.0):
                return True
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def stop(self, limit: float = 10.0) -> None:
        """Ask it to save and go; kill it if it does not."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Hold it (SIGSTOP): connections stand, nothing answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it until Ctrl-C or SIGTERM (exit code 130); see --help."""
    parser = argparse.ArgumentParser(
        "python -m sandbox broker",
        description="A broker that speaks Kafka, on loopback; its address is printed as one line. Ctrl-C stops it.",
    )
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="its data (default: a temporary folder)")
    parser.add_argument("--port", type=int, default=0, metavar="P", help="0 finds a free one (%(default)s)")
    args = parser.parse_args(argv)
    try:
        with contextlib.ExitStack() as stack:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-broker-")))
            broker = stack.enter_context(Broker(folder, args.port))
            print(broker.address, flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"sandbox: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0
