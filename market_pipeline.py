"""Trades of many exchanges by WebSocket, their rolling figures, and both in Kafka; nothing lost without being counted.

    python market_pipeline.py --symbols BTC-USD,ETH-USD,SOL-USD --kafka broker:9092
    python market_pipeline.py --demo
    python market_pipeline.py analyse --kafka broker:9092     the figures, as a member of a consumer group
    python market_pipeline.py replay --kafka broker:9092      dead letters once more, by a mended parser

This file is the command line and the wiring. What is promised, the way of a trade, every queue and its bound are
told in ``market.flow``; what is shown of it, in ``market.display``.

Threads: that which writes to stderr, and the demo's. All else is in the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from market.analyse import Analyser
from market.demo import Demo
from market.display import last_word, serve
from market.feeds import ADAPTERS
from market.flow import MarketOptions, MarketProgram, Pipeline, feeds_of, security
from market.replay import Replayer
from runtime.serving import SIZES, CannotStart, new_loop, open_http, queue_stderr, size, split_address

log = logging.getLogger("market_pipeline")

COMMANDS = ("run", "analyse", "replay")
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def words(text: str) -> tuple[str, ...]:
    """``A,B`` -> A, B; each once."""
    return tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))


def pairs(text: str) -> tuple[str, ...]:
    return words(text.upper())


def tickers(text: str) -> tuple[str, ...]:
    """``AAPL`` -> AAPL-USD."""
    return tuple(each if "-" in each else f"{each}-USD" for each in pairs(text))


def seconds_of(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole seconds with commas are needed, not {text!r}") from None


def make_parser() -> argparse.ArgumentParser:
    default = MarketOptions()
    parser = argparse.ArgumentParser(
        prog="python market_pipeline.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trades of many exchanges by WebSocket, rolling volatility in a pool of processes, both in Kafka.",
        epilog=f"""examples:
  python market_pipeline.py --demo                     ten simulated exchanges, a broker for development
  python market_pipeline.py --symbols BTC-USD,ETH-EUR --kafka broker:9092 --http 127.0.0.1:9515
  python market_pipeline.py --exchanges kraken,okx --kafka broker:9092      one machine's share of the exchanges
  python market_pipeline.py --stocks AAPL,MSFT --kafka broker:9092          and stocks
  python market_pipeline.py analyse --kafka broker:9092                     any number of machines share the symbols
  python market_pipeline.py replay --kafka broker:9092 --dry-run            what a mended parser would make of them

exchanges: {", ".join(ADAPTERS)}
On Binance, OKX, Bybit and Gate.io, USD means their books in USDT; BitMEX's are perpetual swaps.

Kafka may be away, at the start too: trades go to the spool then, and from there, in order, when it is back.
SIGTERM or Ctrl-C: close the feeds, publish what is there, say what is left; again: put it into the spool and end.

exit codes: 0 nothing was lost; 1 something was, or it could not start; 2 wrong usage""",
    )

    def option(group: Any, name: str, kind: Any, text: str, metavar: str, **more: Any) -> None:
        value = getattr(default, name[2:].replace("-", "_"))
        if kind is size:
            text += f" (default {value >> 20}M)"
        elif isinstance(value, tuple) and value:
            text += f" (default {','.join(map(str, value))})"
        elif isinstance(value, int | float):
            text += f" (default {value:g})"
        elif isinstance(value, str) and value:
            text += f" (default {value})"
        group.add_argument(name, type=kind, default=None, metavar=metavar, help=text, **more)

    parser.add_argument(
        "command", nargs="?", choices=COMMANDS, default="run", help="run: feeds and figures (default); see the examples"
    )
    feeds = parser.add_argument_group("feeds")
    option(feeds, "--symbols", pairs, "BASE-QUOTE", "LIST")
    text = "of which exchanges; several machines share them by this"
    feeds.add_argument("--exchanges", type=words, metavar="LIST", help=f"{text} (default: all that need no key)")
    option(feeds, "--stocks", tickers, "from the stock feeds whose keys are in the environment", "LIST")
    feeds.add_argument(
        "--url", action="append", metavar="EXCHANGE=URL", help="another address of an exchange: a proxy, a simulation"
    )
    kafka = parser.add_argument_group("Kafka")
    option(kafka, "--kafka", str, "the brokers, with commas; or KAFKA_BROKERS", "HOST:PORT")
    option(kafka, "--prefix", str, "of the topics' names", "TEXT")
    option(kafka, "--partitions", int, "of topics that are not there yet", "N")
    option(kafka, "--replication", int, "of topics that are not there yet", "N")
    option(
        kafka,
        "--compression",
        str,
        "zstd, lz4, gzip, snappy, none",
        "KIND",
        choices=("zstd", "lz4", "gzip", "snappy", "none"),
    )
    option(kafka, "--tls", str, "speak TLS; the authorities' certificates, or: system", "FILE")
    option(
        *(kafka, "--sasl", str, "log in with KAFKA_USERNAME and KAFKA_PASSWORD", "KIND"),
        choices=("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
    )
    kafka.add_argument("--group", metavar="NAME", help="consumer group (default market-analyse, or market-replay)")
    away = parser.add_argument_group("Kafka away")
    option(away, "--buffer", int, "trades that wait in memory", "N")
    away.add_argument("--spool", metavar="FOLDER", help="then on disk (default: data/market-spool beside this program)")
    option(away, "--spool-bytes", size, f"of the spool, at most; then the exchanges wait; {SIZES}", "SIZE")
    option(away, "--spool-after", float, "time without an answer after which what waits goes to the spool", "S")
    figures = parser.add_argument_group("figures")
    option(figures, "--windows", seconds_of, "of volatility and VWAP, seconds", "LIST")
    option(figures, "--lateness", float, "of event time: what comes later is counted, not taken", "S")
    option(figures, "--workers", int, "processes (default: all processors but one)", "N")
    run = parser.add_argument_group("running")
    option(run, "--stop-limit", float, "time to publish what is there at a stop", "S")
    option(run, "--http", str, "serve /metrics and /health there", "HOST:PORT")
    run.add_argument("--dry-run", action="store_true", default=None, help="replay: parse and count only")
    demo = parser.add_argument_group("demo")
    demo.add_argument("--demo", action="store_true", help="simulated exchanges, for a while; then what is in Kafka")
    demo.add_argument("--demo-seconds", type=float, default=15.0, metavar="S", help="(default 15)")
    demo.add_argument("--demo-rate", type=float, default=600.0, metavar="N", help="trades a second (default 600)")
    return parser


def parse_arguments(argv: Sequence[str] | None, environ: Mapping[str, str]) -> tuple[argparse.Namespace, MarketOptions]:
    """The options. Ends the program with one line if something is wrong with them."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(MarketOptions)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    given.setdefault("group", f"market-{'replay' if args.command == 'replay' else 'analyse'}")
    if "kafka" not in given and environ.get("KAFKA_BROKERS") and not args.demo:
        given["kafka"] = environ["KAFKA_BROKERS"]
    try:
        given["urls"] = addresses(args.url or ())
        options = MarketOptions(**given)
        check(options, args, environ)
        if not (args.demo_seconds > 0 and 0 < args.demo_rate <= 100_000):
            raise ValueError("--demo-seconds must be above 0, --demo-rate above 0 and at most 100000")
    except ValueError as error:
        parser.error(str(error))
    return args, options


def addresses(texts: Sequence[str]) -> dict[str, str]:
    found = dict[str, str]()
    for text in texts:
        name, equals, url = text.partition("=")
        if name not in ADAPTERS or not equals or not re.match(r"wss?://.", url):
            raise ValueError(f"--url: EXCHANGE=ws://... or wss://... is needed, not {text!r}")
        found[name] = url
    return found


def check(options: MarketOptions, args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """``ValueError`` with one line if an option is wrong."""
    if options.kafka is not None:
        for each in options.kafka.split(","):
            try:
                split_address(each)
            except ValueError as error:
                raise ValueError(f"--kafka: {error}") from None
    elif not args.demo:
        raise ValueError("where to? --kafka HOST:PORT, or KAFKA_BROKERS; or try --demo")
    if args.demo and args.command != "run":
        raise ValueError(f"--demo does not go with {args.command}")
    if options.dry_run and args.command != "replay":
        raise ValueError("--dry-run goes with replay only")
    if args.command != "run" and (args.exchanges or args.symbols or args.stocks or args.url):
        raise ValueError(f"{args.command} has no feeds: no --exchanges, --symbols, --stocks, --url")
    if options.http is not None:
        try:
            split_address(options.http)
        except ValueError as error:
            raise ValueError(f"--http: {error}") from None
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,150}", options.prefix):
        raise ValueError("--prefix: letters, digits and ._- are allowed")
    if not options.symbols or not options.exchanges:
        raise ValueError("--symbols and --exchanges must name one at least")
    for name, least, most in (
        *(("partitions", 1, 10_000), ("replication", 1, 100), ("buffer", 1, 10_000_000), ("workers", 1, 64)),
        *(("spool_bytes", 0, 1 << 50), ("spool_after", 0.1, 3600), ("stop_limit", 0, 3600), ("lateness", 0, 60)),
    ):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be {least:g} to {most:g}")
    windows = options.windows
    if not windows or list(windows) != sorted(set(windows)) or windows[0] < 1 or windows[-1] > 86_400:
        raise ValueError("--windows: ascending whole seconds, at most a day")
    security(options, environ)
    if args.command == "run":
        feeds_of(options, environ)


def main(argv: Sequence[str] | None = None) -> int:
    args, options = parse_arguments(argv, os.environ)
    finish = queue_stderr("market_pipeline")
    try:
        logging.basicConfig(level=logging.WARNING, format="market_pipeline: %(message)s")
        log.setLevel(logging.INFO)
        return run(args, options)
    finally:
        finish()


def run(args: argparse.Namespace, options: MarketOptions) -> int:
    """The program, once what it was told is checked. Returns the exit code."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # thousands of trades wait at any time, and hardly any garbage is cyclic
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the demo's broker does not outlive us
    try:
        with contextlib.ExitStack() as stack:
            demo = None
            if args.demo:
                demo = stack.enter_context(Demo(options, args.demo_seconds, args.demo_rate))
                options = demo.options
            http_sock = open_http(options.http, stack, log)
            with asyncio.Runner(loop_factory=new_loop) as runner:
                code, program = runner.run(run_program(args.command, options, http_sock, demo))
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            counts = program.snapshot()
            if isinstance(program, Replayer):
                print(program.report())
            else:
                print(f"market_pipeline: {last_word(counts)}", file=sys.stderr)
            if demo is not None and not demo.report(counts):
                code = EXIT_FAILED
            return code if not counts.faults else EXIT_FAILED
    except CannotStart as error:
        print(f"market_pipeline: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before signals are listened to
        return EXIT_INTERRUPTED


async def run_program(
    command: str, options: MarketOptions, http_sock: socket.socket | None, demo: Demo | None = None
) -> tuple[int, MarketProgram]:
    kinds: dict[str, type[MarketProgram]] = {"run": Pipeline, "analyse": Analyser, "replay": Replayer}
    program = kinds[command](options)
    playing = None if demo is None else asyncio.create_task(demo.play(program), name="demo")
    try:
        return await serve(program, http_sock), program
    finally:
        if playing is not None:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
