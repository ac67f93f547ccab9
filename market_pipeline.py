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
import contextlib
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence

from market.analyse import Analyser
from market.demo import MarketDemo
from market.display import METRICS, MarketCounts, draw, health, last_word
from market.feeds import ADAPTERS
from market.flow import MarketOptions, MarketProgram, Pipeline, feeds_of, security
from market.replay import Replayer
from runtime.options import SIZES, Parser, address, missing, size, split_address
from runtime.shell import Wiring, run
from runtime.stderr import say

log = logging.getLogger("market_pipeline")

COMMANDS: dict[str, type[MarketProgram]] = {"run": Pipeline, "analyse": Analyser, "replay": Replayer}
NAME = "market_pipeline"


def words(text: str) -> tuple[str, ...]:
    """``A,B`` -> A, B; each once."""
    return tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))


def _pairs(text: str) -> tuple[str, ...]:
    return words(text.upper())


def tickers(text: str) -> tuple[str, ...]:
    """``AAPL`` -> AAPL-USD."""
    return tuple(each if "-" in each else f"{each}-USD" for each in _pairs(text))


def _seconds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole seconds with commas are needed, not {text!r}") from None


def _address(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if name not in ADAPTERS or not equals or not re.match(r"wss?://.", url):
        raise argparse.ArgumentTypeError(f"EXCHANGE=ws://... or wss://... is needed, not {text!r}")
    return name, url


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "market_pipeline.py",
        MarketOptions(),
        description="Trades of many exchanges by WebSocket, rolling volatility in a pool of processes, both in Kafka.",
        epilog=f"""examples:
  python market_pipeline.py --demo                     ten simulated exchanges, a broker for development
  python market_pipeline.py --symbols BTC-USD,ETH-EUR --kafka broker:9092 --http 127.0.0.1:9515
  python market_pipeline.py --exchanges kraken,okx --kafka broker:9092      one machine's share of the exchanges
  python market_pipeline.py --stocks AAPL,MSFT --kafka broker:9092          and stocks
  python market_pipeline.py analyse --kafka broker:9092                     any number of machines share the symbols
  python market_pipeline.py replay --kafka broker:9092 --dry-run            what a mended parser would make of them

exchanges: {", ".join(ADAPTERS)}
Binance, OKX, Bybit, Gate.io and Bitget have books in USDT only: where BTC-USD is asked for, their trades come as
BTC-USDT, apart from those in USD; with --merge-quotes as BTC-USD.

Kafka may be away, at the start too: trades go to the spool then, and from there, in order, when it is back.
SIGTERM or Ctrl-C: close the feeds, publish what is there, say what is left; again: put it into the spool and end.

exit codes: 0 nothing was lost; 1 something was, or it could not start; 2 wrong usage""",
    )
    option = parser.option
    parser.add_argument(
        "command", nargs="?", choices=COMMANDS, default="run", help="run: feeds and figures (default); see the examples"
    )
    feeds = parser.add_argument_group("feeds")
    option(feeds, "--symbols", _pairs, "BASE-QUOTE", "LIST")
    text = "of which exchanges; several machines share them by this (default: all that need no key)"
    option(feeds, "--exchanges", words, text, "LIST")
    option(feeds, "--stocks", tickers, "from the stock feeds whose keys are in the environment", "LIST")
    text = "tell trades in USDT as USD's, where an exchange has no books in USD"
    feeds.add_argument("--merge-quotes", action="store_true", default=None, help=text)
    text = "another address of an exchange: a proxy, a simulation"
    option(feeds, "--url", _address, text, "EXCHANGE=URL", action="append")
    kafka = parser.add_argument_group("Kafka")
    option(kafka, "--kafka", str, "the brokers, with commas; or KAFKA_BROKERS", "HOST:PORT")
    option(kafka, "--prefix", str, "of the topics' names", "TEXT")
    option(kafka, "--partitions", int, "of topics that are not there yet", within=(1, 10_000))
    option(kafka, "--replication", int, "of topics that are not there yet", within=(1, 100))
    kinds: tuple[str, ...] = ("zstd", "lz4", "gzip", "snappy", "none")
    option(kafka, "--compression", str, ", ".join(kinds), "KIND", choices=kinds)
    option(kafka, "--tls", str, "speak TLS; the authorities' certificates, or: system", "FILE")
    kinds = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
    option(kafka, "--sasl", str, "log in with KAFKA_USERNAME and KAFKA_PASSWORD", "KIND", choices=kinds)
    option(kafka, "--group", str, "consumer group (default market-analyse, or market-replay)", "NAME")
    away = parser.add_argument_group("Kafka away")
    option(away, "--buffer", int, "trades that wait in memory", within=(1, 10_000_000))
    option(away, "--spool", str, "then on disk (default: data/market-spool beside this program)", "FOLDER")
    text = f"of the spool, at most; then the exchanges wait; {SIZES}"
    option(away, "--spool-bytes", size, text, "SIZE", within=(0, 1 << 50))
    text = "time without an answer after which what waits goes to the spool"
    option(away, "--spool-after", float, text, "S", within=(0.1, 3600))
    figures = parser.add_argument_group("figures")
    option(figures, "--windows", _seconds, "of volatility and VWAP, seconds", "LIST")
    text = "of event time: what comes later is counted, not taken"
    option(figures, "--lateness", float, text, "S", within=(0, 60))
    option(figures, "--workers", int, "processes (default: all processors but one)", within=(1, 64))
    running = parser.add_argument_group("running")
    option(running, "--stop-limit", float, "time to publish what is there at a stop", "S", within=(0, 3600))
    option(running, "--http", address, "serve /metrics and /health there", "HOST:PORT")
    running.add_argument("--dry-run", action="store_true", default=None, help="replay: parse and count only")
    text = "simulated exchanges, for a while; then what is in Kafka"
    parser.demo(text, "trades a second", seconds=15, rate=600)
    return parser


def parse_arguments(argv: Sequence[str] | None, environ: Mapping[str, str]) -> tuple[argparse.Namespace, MarketOptions]:
    """The options. Ends the program with one line if something is wrong with them."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = parser.given(args)
    given.setdefault("group", f"market-{'replay' if args.command == 'replay' else 'analyse'}")
    if "kafka" not in given and environ.get("KAFKA_BROKERS") and not args.demo:
        given["kafka"] = environ["KAFKA_BROKERS"]
    try:
        given["urls"] = dict(args.url or ())
        options = MarketOptions(**given)
        check(options, args, environ)
    except ValueError as error:
        parser.error(str(error))
    return args, options


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
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,150}", options.prefix):
        raise ValueError("--prefix: letters, digits and ._- are allowed")
    if not options.symbols or not options.exchanges:
        raise ValueError("--symbols and --exchanges must name one at least")
    windows = options.windows
    if not windows or list(windows) != sorted(set(windows)) or windows[0] < 1 or windows[-1] > 86_400:
        raise ValueError("--windows: ascending whole seconds, at most a day")
    security(options, environ)
    if args.command == "run":
        feeds_of(options, environ)


def tell(program: MarketProgram) -> None:
    """What became of all that came; for ``replay``, what was read, on stdout."""
    if isinstance(program, Replayer):
        print(program.report())
    else:
        say(NAME, last_word(program.snapshot()))


def main(argv: Sequence[str] | None = None) -> int:
    """The whole program. Returns the exit code."""
    args, options = parse_arguments(argv, os.environ)
    demo = MarketDemo(options, args.demo_seconds, args.demo_rate) if args.demo else None

    def wire(options: MarketOptions, _: contextlib.ExitStack) -> Wiring[MarketCounts]:
        return Wiring(
            make=lambda: COMMANDS[args.command](options),
            tell=tell,
            metrics=METRICS,
            health=health,
            draw=None if missing("the table", "rich") else draw,
            stays=True,
        )

    return run(NAME, log, options, wire, demo)


if __name__ == "__main__":
    sys.exit(main())
