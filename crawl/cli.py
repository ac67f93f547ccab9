"""The command line of both crawlers: options, what is wrong with them, and one run from its list to its exit code.

Data goes to stdout (or ``-o``), everything else to stderr; progress only where stderr is a terminal and the rows do
not go there too. What is wrong is said in one line. Rows are written as they complete, each flushed: what was printed
is there, also after a crash.

A program gives its driver as arguments of ``main``; nothing here knows which programs there are.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import stat
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import BinaryIO

from crawl.core import HELPERS_LEAD, Crawl
from crawl.errors import ERROR_KINDS
from crawl.explain import print_explanation
from crawl.journal import JournalError, open_anew, open_journal, recall
from crawl.model import Options
from crawl.net import ProxyRule
from crawl.output import Output, RowWriter, Run
from crawl.progress import describe, progress, serve_metrics, write_stats
from crawl.scope import Scope
from crawl.url_list import read_urls, unpacker
from crawl.urls import as_url
from runtime.options import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_PIPE, SIZES, CannotStart, Parser, missing, size
from runtime.processes import processors
from runtime.stderr import queue_stderr, say


def helpers(text: str) -> int:
    """``auto`` -> as many as there are processors."""
    count = 0 if text == "auto" else int(text)
    if count < 0:
        raise ValueError
    return count or processors()


def header(text: str) -> tuple[str, str]:
    """``NAME: VALUE`` -> name and value; ``ValueError`` without a colon."""
    name, colon, value = text.partition(":")
    if not colon:
        raise ValueError
    return name.strip(), value.strip()


def make_parser(program: str) -> Parser:
    """The options of ``program``."""
    kinds = "\n".join(f"  {kind:12} {text}" for kind, text in ERROR_KINDS.items())
    parser = Parser(
        program,
        Options(),
        description="Fetch the pages of a list of URLs, politely, and write a row for each: title, words, links.",
        epilog=f"""examples:
  python {program} urls.txt                         JSON lines to stdout
  python {program} urls.txt --csv -o pages.csv      a table
  python {program} https://example.com/ --json      URLs as arguments
  zcat list.gz | python {program} - --rate 0.5      one request in 2 s per host
  python {program} https://example.com/ --depth 3 -o site.jsonl --resume    follow links; go on after any stop
  python {program} feeds.txt --feeds -o news.jsonl --resume    new articles of RSS and Atom feeds, run after run
  python {program} --demo                           a small internet on loopback, faults included

kinds of errors (the column "error" is empty, or "kind: detail"):
{kinds}

exit codes: 0 the list was worked through (failed URLs are rows); 1 the list or the output failed;
2 wrong usage; 130 interrupted (Ctrl-C or SIGTERM; what was fetched is written); 141 the reader of the rows left""",
    )
    parser.add_argument("sources", nargs="*", metavar="FILE|URL|-", help="lists of URLs, one a line; - is stdin")
    rows = parser.add_argument_group("rows").add_mutually_exclusive_group()
    for form, text in (
        ("jsonl", "a JSON object a line (default)"),
        ("json", "one JSON array"),
        ("csv", "RFC 4180 with a header line"),
    ):
        rows.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=text)
    parser.set_defaults(form="jsonl")

    option = parser.option
    text = "write the rows there instead of to stdout; what the file had is lost, unless it is rows to --resume"
    parser.add_argument("-o", "--output", metavar="FILE", help=text)
    parser.add_argument("--stats", metavar="FILE", help="write the run's counts there as JSON")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve the counts to Prometheus on 127.0.0.1")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    parser.add_argument("--demo", action="store_true", help="crawl a demo site that this program serves itself")
    shared = parser.add_argument_group("many workers")
    text = "postgresql://...: the frontier and the rows are there; start any number of workers. Or: embedded"
    shared.add_argument("--frontier", metavar="URL", help=text)
    option(shared, "--lease", float, "time after which a dead worker's hosts return", "S", within=(1, 3600))
    shared.add_argument("--status", action="store_true", help="print how far the crawl in --frontier is")
    load = parser.add_argument_group("load and politeness")
    option(load, "--concurrency", int, "requests in flight, all hosts together")
    option(load, "--per-host", int, "requests in flight to one host")
    option(load, "--per-address", int, "connections at a time to one IP address, whatever its hosts; 0: no limit")
    option(load, "--rate", float, "requests per second to one host; 0: no limit")
    option(load, "--burst", int, "requests to one host that may go at once after a rest")
    option(load, "--total-rate", float, "requests per second to all hosts together; 0: no limit")
    text = "that fetch and read pages, for one frontier; 0 or auto: one for each processor (default 1: this one)"
    load.add_argument("--processes", type=helpers, default=1, metavar="N", help=text)
    load.add_argument("--adaptive", action="store_true", default=None, help="find each host's rate, up to --rate")
    crawl = parser.add_argument_group("following links")
    option(crawl, "--depth", int, "links away from the list; 0: the list only")
    text = "links to the same host (default), registrable domain, any"
    crawl.add_argument("--within", choices=("host", "domain", "any"), help=text)
    for name, what in (
        ("--include", "follow only links that match: * is any text, or re:EXPRESSION"),
        ("--exclude", "follow no links that match"),
        ("--drop-params", "free links of these query parameters: utm_*"),
    ):
        option(crawl, name, str, f"{what}; may be repeated", "PATTERN", action="append")
    option(crawl, "--max-pages", int, "pages in all; 0: no limit")
    option(crawl, "--host-pages", int, "pages of one host; 0: no limit")
    option(crawl, "--max-time", float, "time for the whole crawl; 0: no limit", "S")
    text = "obey robots.txt (default: if links are followed)"
    crawl.add_argument("--robots", action=argparse.BooleanOptionalAction, help=text)
    crawl.add_argument("--sitemaps", action="store_true", default=None, help="crawl what the sites' sitemaps name too")
    crawl.add_argument(
        "--dedupe", action="store_true", default=None, help="mark equal bodies; follow the first's links"
    )
    crawl.add_argument("--resume", action="store_true", help="go on with the JSON lines in --output of an earlier run")
    option(crawl, "--explain", str, "would this URL be fetched, why (not), and when? fetches robots.txt", "URL")
    feeds = parser.add_argument_group("feeds")
    feeds.add_argument(
        "--feeds", action="store_true", default=None, help="the list has RSS or Atom feeds: fetch articles"
    )
    text = "no articles from before: 2030-01-31, or with a time and zone (default: UTC)"
    option(feeds, "--since", str, text, "DATE")
    limits = parser.add_argument_group("limits")
    option(limits, "--timeout", float, "time for one attempt, body included", "S")
    option(limits, "--connect-timeout", float, "time to connect within that", "S")
    option(limits, "--retries", int, "further attempts after a fault that may pass")
    option(limits, "--max-bytes", size, f"size of a page after decompression; {SIZES}", "SIZE")
    option(limits, "--max-redirects", int, "redirects followed for one URL")
    option(limits, "--grace", float, "time for requests in flight after Ctrl-C", "S")
    http = parser.add_argument_group("HTTP")
    option(http, "--user-agent", str, "who to say that we are", "TEXT")
    http.add_argument("--header", type=header, action="append", dest="headers", metavar="NAME:VALUE", help="send this")
    option(http, "--proxy", str, "http://[user:password@]host:port; default: the environment's", "URL")
    text = "let any page or name lead to private addresses, not only those that the list names"
    http.add_argument("--allow-private", action="store_true", default=None, help=text)
    http.add_argument("--insecure", action="store_true", default=None, help="accept any certificate")
    return parser


def parse_arguments(program: str, argv: list[str] | None) -> tuple[argparse.Namespace, Options]:
    """What was given, and the options. Ends the program with one line if something is wrong with them."""
    parser = make_parser(program)
    args = parser.parse_intermixed_args(argv)
    args.sources = [source.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for source in args.sources]
    given = parser.given(args)
    if args.demo:
        given = {"rate": 50.0, "timeout": 2.0} | given
    elif not args.sources and not args.frontier:
        parser.error("no URLs: name a file, a URL, or - for stdin; or try --demo")
    if args.frontier and (args.resume or args.explain):
        parser.error("--frontier is without --resume (each worker goes on) and --explain")
    if args.frontier and program != "crawl_async.py" and args.processes == 1:
        parser.error("--frontier is for crawl_async.py, or with --processes")
    if args.status and not args.frontier:
        parser.error("--status needs --frontier")
    if args.resume and (args.output is None or args.form != "jsonl"):
        parser.error("--resume goes on with a file of JSON lines: name it with -o")
    for source in args.sources:
        if source != "-" and "://" not in source:
            try:
                kind = os.stat(source).st_mode
                if stat.S_ISDIR(kind):
                    parser.error(f"{source} is a folder, not a list of URLs")
                with open(source, "rb") as file:
                    unpacks = unpacker(file.read(8)) if stat.S_ISREG(kind) else None
                if unpacks:
                    parser.error(f"{source} is compressed: {unpacks} {source} | python {program} -")
            except OSError as error:
                meant = None if os.path.exists(source) else as_url(source)
                hint = f"; did you mean {meant} ?" if meant else ""
                parser.error(f"cannot read {source}: {error.strerror}{hint}")
    try:
        options = Options(**given)
        Scope(include=options.include, exclude=options.exclude)
        ProxyRule(options.proxy)
        return args, options
    except ValueError as error:
        parser.error(str(error).replace("_", "-"))


def open_output(path: str | None, resume: bool) -> BinaryIO:
    """Where the rows go: stdout, or a file, which ``resume`` continues. ``OSError``, ``JournalError``."""
    if path is None:
        return open(1, "wb", buffering=0, closefd=False)
    return open_journal(path) if resume else open_anew(path)


def more_open_files() -> None:
    """As many sockets as the system allows: its default of 1,024 is too few for a wide crawl."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))


@contextlib.contextmanager
def told(doing: str = "") -> Iterator[None]:
    """What the system refuses meanwhile ends the program with one line: that it cannot be done. Default: reading."""
    try:
        yield
    except JournalError as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        reading = f"read {error.filename or 'the list'}"
        why = (error.strerror or "").partition(" (while ")[0]
        raise CannotStart(f"cannot {doing or reading}: {why}") from error


def main(program: str, run: Run, argv: list[str] | None = None) -> int:
    """A crawler's whole program around ``run``, which crawls in this process, or helps out in others (--processes).
    Returns the exit code."""
    finish = queue_stderr(program)
    try:
        return _main(program, run, argv)
    except CannotStart as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return EXIT_PIPE
        say(program, error)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before the driver listens to signals, or after
        return EXIT_INTERRUPTED
    finally:
        finish()


def _main(program: str, run: Run, argv: list[str] | None) -> int:
    args, options = parse_arguments(program, argv)
    more_open_files()
    gc.set_threshold(10_000, 20, 50)  # of the thousands of objects that a page takes, hardly any are cyclic
    with contextlib.ExitStack() as stack:
        urls = demo_urls(stack) if args.demo else read_urls(args.sources)
        try:
            needs(args, options)
            if args.status:
                from crawl.shared_crawl import status  # it needs asyncpg

                print(status(args.frontier))
                return EXIT_OK
            lead = HELPERS_LEAD if args.processes > 1 else None
            if args.frontier:
                from crawl.shared_crawl import join

                crawl: Crawl = join(options, args.frontier, args.lease, lead)
            else:
                crawl = Crawl(options, lead=lead)
        except (ValueError, RuntimeError) as error:
            raise CannotStart(str(error)) from error
        if args.explain:
            with told():
                print_explanation(args.explain, crawl, urls, args.output if args.resume else None, run)
                return EXIT_OK
        with told(f"write {args.stats}"):
            stats = stack.enter_context(open(args.stats, "a", encoding="utf-8")) if args.stats else None
        if args.metrics_port is not None:
            with told(f"listen on port {args.metrics_port}"):
                stack.enter_context(serve_metrics(crawl, args.metrics_port))
        with told("read the list"):
            if args.resume and crawl.knows_first:
                urls = crawl.listed.know_all(urls)
        with told(f"write {args.output or 'to stdout'}"):
            stream = stack.enter_context(open_output(args.output, args.resume))
            known = recall(crawl, stream) if args.resume else 0
            if known and not args.quiet:
                say(program, f"{known:,} rows from before, {crawl.frontier.waiting:,} URLs to go")
            writer = RowWriter(stream, args.form, crawl.form)
        crawl.say = partial(say, program)
        output = Output(crawl, writer)
        rows_on_screen = args.output is None and sys.stdout.isatty()
        with progress(crawl, sys.stderr.isatty() and not args.quiet and not rows_on_screen):
            if args.processes > 1:
                from crawl.processes import run_processes

                run_processes(crawl, urls, output.emit, args.processes, run)
            else:
                run(crawl, urls, output.emit)
        output.close()
        if not args.quiet and not isinstance(crawl.failure, BrokenPipeError):
            print(describe(crawl), file=sys.stderr)
        if stats:
            with told(f"write {args.stats}"):
                write_stats(crawl, stats)
    if isinstance(crawl.failure, BaseException):
        raise CannotStart(f"stopped: {crawl.failure}") from crawl.failure
    if crawl.interrupted:
        left = crawl.frontier.stats().waiting
        if not args.quiet:
            say(program, f"interrupted; {left:,} URLs not fetched")
        return EXIT_INTERRUPTED
    return EXIT_OK


def needs(args: argparse.Namespace, options: Options) -> None:
    """RuntimeError with one line if a package is not there that only some options need."""
    for wanted, option, *modules in (
        (options.feeds, "--feeds", "feedparser", "trafilatura", "lxml_html_clean"),
        (options.within == "domain", "--within domain", "publicsuffixlist"),
        (args.frontier, "--frontier", "asyncpg"),
        (args.metrics_port is not None, "--metrics-port", "prometheus_client"),
    ):
        if wanted and (line := missing(option, *modules)):
            raise RuntimeError(line)


def demo_urls(stack: contextlib.ExitStack) -> Iterable[str]:
    """Serve the demo's site; its list: every page, and a few of the ways in which the web misbehaves."""
    from sandbox.sites import Sandbox

    site = stack.enter_context(Sandbox(hosts=4, pages=12))
    faults = [
        "flaky", "retry_429_seconds", "redirect_3", "redirect_loop", "never_answers", "closes", "short_body",
        "gzip_bomb", "gzip_broken", "body_drip", "charset_windows_1251", "not_http",
    ]  # fmt: skip
    return [
        *site.site_urls(),
        *(site.fault_url(name) for name in faults),
        site.url("/status/404"),
        "http://no-such-host.invalid/",
        "not a URL",
    ]
