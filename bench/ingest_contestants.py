"""The contestants of `bench ingest`, each as a child that listens when its block is entered.

ingest_logs.py runs with its defaults, and with metadata from an API on top: 13 columns, an index over the time, a
record of each batch. rsyslog (imudp -> ompgsql) inserts time, time of receipt, service, host, severity and message into
a table without an index.

rsyslog's configuration (`RSYSLOG`, `VARIANTS`): imudp with a receive buffer of 32 MB, as ours, and a thread that takes
512 datagrams in a call; one queue (linked list of 200,000, of the action, before ompgsql) with up to four workers and
batches of 1,000, of each of which ompgsql makes one transaction of so many INSERTs. The other variants (fewer workers,
two threads of imudp, a fixed array, larger batches, a queue of the ruleset) are there to be tried: none was clearly
better, and one worker or batches of 4,000 were worse. `rsyslog-defaults` is what one gets who sets nothing: the
system's receive buffer, rsyslog's own queue, none of the action.

The system's rsyslog is not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.ladder import wait_for
from bench.measure import HERE, child, find_program, free_port

TABLE = """CREATE TABLE logs (received_at timestamptz NOT NULL, event_at timestamptz NOT NULL, service text NOT NULL,
    host text NOT NULL, severity smallint NOT NULL, message text NOT NULL)"""
RSYSLOG = """global(workDirectory="{folder}" internalmsg.ratelimit.interval="1")
module(load="imudp" {module})
module(load="ompgsql")
{main}
template(name="row" type="list" option.stdsql="on") {{
  constant(value="INSERT INTO logs (received_at,event_at,service,host,severity,message) VALUES ('")
  property(name="timegenerated" dateFormat="rfc3339") constant(value="','")
  property(name="timereported" dateFormat="rfc3339") constant(value="','")
  property(name="app-name") constant(value="','")
  property(name="hostname") constant(value="',")
  property(name="syslogseverity") constant(value=",'")
  property(name="msg") constant(value="')")
}}
ruleset(name="in" {ruleset}) {{ action(type="ompgsql" conninfo="{database}" template="row" {action}) }}
input(type="imudp" address="127.0.0.1" port="{port}" ruleset="in" {input})
"""
QUEUE = (
    'queue.type="LinkedList" queue.size="200000" queue.dequeueBatchSize="1000" queue.workerThreads="{}" '
    'queue.workerThreadMinimumMessages="2000" queue.timeoutWorkerThreadShutdown="60000"'
)
TUNED = {"module": 'threads="2" batchSize="128" timeRequery="8"', "input": 'rcvbufSize="32m"'}
ONE = TUNED | {"module": 'threads="1" batchSize="512" timeRequery="8"'}
VARIANTS: dict[str, dict[str, str]] = {
    "rsyslog": ONE | {"action": QUEUE.format(4)},
    "rsyslog-w2": ONE | {"action": QUEUE.format(2)},
    "rsyslog-w1": ONE | {"action": QUEUE.format(1)},
    "rsyslog-i2": TUNED | {"action": QUEUE.format(2)},
    "rsyslog-ruleset": ONE | {"ruleset": QUEUE.format(2)},
    "rsyslog-fixed": ONE | {"action": QUEUE.format(2).replace("LinkedList", "FixedArray")},
    "rsyslog-b4000": ONE | {"action": QUEUE.format(2).replace('Size="1000"', 'Size="4000"')},
    "rsyslog-defaults": {},
}
"""Ways to set up rsyslog: what goes into the gaps of `RSYSLOG`."""
OURS = {"ingest_logs": 1, "ingest_logs-x2": 2, "ingest_logs-x4": 4}
"""Their receivers."""
INSTALL = "rsyslogd with ompgsql: not installed: apt install rsyslog rsyslog-pgsql"


class Contestant(NamedTuple):
    pid: int
    receivers: int


@contextlib.contextmanager
def ours(name: str, folder: Path, url: str, port: int, api: str, more: str) -> Iterator[Contestant]:
    receivers, http = OURS[name], free_port()
    words: list[object] = [sys.executable, HERE / "ingest_logs.py", "--listen", f"127.0.0.1:{port}"]
    words += ["--metadata", api, "--http", f"127.0.0.1:{http}", "--spool", folder / "spool", "--stop-limit", 2]
    words += ["--receivers", receivers, *more.split()]
    environment, address = {**os.environ, "DATABASE_URL": url}, f"http://127.0.0.1:{http}/health"
    with open(folder / "log", "a+") as log, child(words, env=environment, stdout=log, stderr=log) as process:

        def is_there() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=1) as answer:
                found = json.load(answer)
                return bool(found["workers"] == receivers and found["database"] == "connected")
            return False

        wait_for(is_there, process, folder / "log")
        yield Contestant(process.pid, receivers)
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@contextlib.contextmanager
def rsyslog(name: str, folder: Path, ask: Callable[[str], Any], url: str, port: int) -> Iterator[Contestant]:
    """``ask`` puts a statement to the database at ``url``, and returns the first row of the answer."""
    gaps = dict.fromkeys(("module", "main", "ruleset", "action", "input"), "") | VARIANTS[name]
    config = folder / "rsyslog.conf"
    config.write_text(RSYSLOG.format(folder=folder, port=port, database=url.replace(":@", "@"), **gaps))
    words = [rsyslogd(), "-n", "-f", config, "-i", folder / "rsyslog.pid"]
    ask(TABLE)
    with open(folder / "log", "a+") as log, child(words, stdout=log, stderr=log) as process:

        def is_there() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
                probe.connect(("127.0.0.1", port))
                probe.send(b"<14>1 - bench bench - - - are you there?")
                time.sleep(0.2)
            return bool(ask("SELECT count(*) FROM logs")[0])

        wait_for(is_there, process, folder / "log")
        time.sleep(0.3)
        ask("TRUNCATE logs")
        yield Contestant(process.pid, 1)


def rsyslogd() -> str | None:
    """Where it is, if its module for PostgreSQL is there too."""
    program = find_program("rsyslogd")
    folders = [*Path("/usr/lib").glob("*/rsyslog"), Path("/usr/lib/rsyslog"), Path("/usr/lib64/rsyslog")]
    return program if any((folder / "ompgsql.so").exists() for folder in folders) else None
