"""`bench feeds`: the feeds of 26 hosts and their 36 articles, against a loop that takes one by one.

* **Each answer has a latency of its own**, 0.3 to 1.5 s, seeded: the same for all contestants. So what is compared is
  how well they wait. Nobody knows a latency beforehand, so 10 workers do not end together, and the loop is not beaten
  by 10: `s at best` is what the crawlers' own frontier takes under a simulated clock, where nothing costs any time.
* **The parts**: `feeds` alone (dated, and nothing newer is wanted: no article follows); `articles` alone (a journal
  names them, as after a kill: the list is empty); `whole`: what a user runs. All at 0.5 requests per second to a host.
* **The loop** is urllib and the crawlers' own parsing. Its `whole` is the sum of its parts.
* **Times** are of the whole process, start-up included, and from the first request to the last answer, by the server's
  log. By this log, too, the pauses are checked, and a host answers 429 to what comes sooner than `TOO_SOON`.

Promised: all traffic stays on 127.0.0.0/8, all children are ended. Raises SystemExit if a row is missing or wrong, or a
host was asked too soon. About 110 s for one repetition.

`bench/feeds.py serve PORT SEED` is the server, `bench/feeds.py loop feed|article URLS ROWS` the loop.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import itertools
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.measure import (
    HERE,
    Row,
    Spread,
    command,
    free_port,
    host_address,
    interleaved,
    module,
    note,
    require,
    run_child,
    table,
)
from bench.servers import Server, serving

HOSTS, TWICE = 26, 10
"""The hosts, and how many of them have two articles."""
FAST, SLOW = 0.3, 1.5
RATE, WINDOW, TOO_SOON = 0.5, 2.0, 1.9
JITTER = 0.02
"""Seconds by which the machine may bring two requests closer to each other than they were sent."""
PARTS = ("feeds", "articles", "whole")
CONTESTANTS: dict[str, tuple[object, ...]] = {
    "threads, 10 workers": ("crawl_threads.py", "--concurrency", 10),
    "async, 10 in flight": ("crawl_async.py", "--concurrency", 10),
    "async, as it comes": ("crawl_async.py",),
}


def articles_of(host: int) -> int:
    return 2 if host < TWICE else 1


def latency(seed: int, host: int, path: str) -> float:
    """Seconds before an answer."""
    timed = path.startswith(("/feed", "/article"))
    return random.Random(f"{seed}/{host}/{path}").uniform(FAST, SLOW) if timed else 0.0


# -------------------------------------------------------------------------------------------------------- server


def serve(port: int, seed: int) -> None:
    """The sandbox with feeds, articles, and /log: what was asked for them, [time, host, path, status, latency]."""
    from sandbox import sites
    from sandbox.faults import Answer, SiteRequest, reply, route

    asked: dict[int, float] = collections.defaultdict(lambda: -TOO_SOON)

    def slowly(request: SiteRequest, body: bytes, kind: str) -> Answer:
        now = time.monotonic()
        gap, asked[request.host] = now - asked[request.host], now
        return reply(body, 200, kind=kind) if gap >= TOO_SOON else reply(b"too soon", 429, "Retry-After: 2")

    @route("/feed.xml")
    def feed(request: SiteRequest) -> Answer:
        items = "".join(
            f"<item><title>Story {n} of {request.host}</title><link>/article/{n}</link><dc:creator>Ann</dc:creator>"
            f"<pubDate>Mon, 06 May 2024 10:0{n}:00 GMT</pubDate><description>{'words ' * 50}</description></item>"
            for n in range(articles_of(request.host))
        )
        head = "<rss version='2.0' xmlns:dc='http://purl.org/dc/elements/1.1/'><channel><title>News</title>"
        return slowly(request, f"{head}{items}</channel></rss>".encode(), "application/rss+xml")

    @route("/article/")
    def article(request: SiteRequest) -> Answer:
        return slowly(request, sites.make_page(request.host, int(request.name), 25), "text/html; charset=utf-8")

    @route("/log")
    def log(request: SiteRequest) -> Answer:
        entries = [
            (entry.t, entry.host, entry.path, entry.status, pause)
            for entry in request.sandbox.log
            if (pause := latency(seed, request.sandbox.hosts.index(entry.host), entry.path))
        ]
        asked.clear()
        return reply(json.dumps(entries).encode(), kind="application/json")

    with sites.Sandbox(HOSTS, 25, port=port, latency=lambda host, path: latency(seed, host, path)):
        time.sleep(3600)  # ended by its parent, or at last by itself


# ---------------------------------------------------------------------------------------------------------- loop


def loop(kind: str, urls: str, rows: str) -> None:
    """What is written first: one URL after the other."""
    import orjson

    from crawl.feeds import parse_feed
    from crawl.model import FeedResult, Request, Response
    from crawl.rows import build_article, build_row
    from crawl.urls import normalise

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(rows, "wb") as output:
        for url in Path(urls).read_text().split():
            with opener.open(url, timeout=20) as answer:
                response = Response(answer.status, dict(answer.headers), answer.read())
            request = Request(url, *normalise(url))
            if kind == "feed":
                row = build_row(request, response, FeedResult)
                row.links_found = [entry.url for entry in parse_feed(response.body, url, response.headers).entries]
            else:
                row = build_article(request, response, None, None)
            output.write(orjson.dumps(row) + b"\n")


# ---------------------------------------------------------------------------------------------------- the parts


class Course:
    """The server, its log so far, and the files that the contestants read and write."""

    def __init__(self, server: Server, port: int, folder: Path) -> None:
        self._server, self._folder, self._known = server, folder, 0
        self.feeds = [f"http://{host_address(host)}:{port}/feed.xml" for host in range(HOSTS)]
        self.entries = {
            feed: [
                {"url": feed.replace("feed.xml", f"article/{n}"), "title": f"Story {n}", "author": "Ann"}
                for n in range(articles_of(host))
            ]
            for host, feed in enumerate(self.feeds)
        }
        found = [(n, entry["url"]) for entries in self.entries.values() for n, entry in enumerate(entries)]
        self.articles = [url for _, url in sorted(found, key=lambda one: one[0])]
        """The hosts taking turns."""
        for name, urls in (("feeds", self.feeds), ("articles", self.articles), ("none", [])):
            (folder / name).write_text("".join(f"{url}\n" for url in urls))
        self.rows = folder / "rows.jsonl"

    def loop(self, part: str) -> list[object]:
        return [*module("bench.feeds"), "loop", part[:-1], self._folder / part, self.rows]

    def crawl(self, part: str, program: str, *options: object) -> list[object]:
        more: tuple[object, ...] = ()
        self.rows.unlink(missing_ok=True)
        if part == "feeds":
            more = ("--since", "2999-01-01")
        if part == "articles":
            more = ("--resume",)
            with open(self.rows, "w") as journal:
                for feed, entries in self.entries.items():
                    row = {"url": feed, "kind": "feed", "error": None, "final_url": feed, "entries": entries}
                    journal.write(json.dumps(row) + "\n")
        listed = self._folder / ("none" if part == "articles" else "feeds")
        words = [sys.executable, HERE / program, listed, "--feeds", "--rate", RATE, "-q", "-o", self.rows]
        return [*words, *more, *options]

    def is_whole(self, row: dict[str, Any]) -> bool:
        return row["url"] in self.feeds or len(row["text"] or "") > 1000

    def check(self, part: str) -> None:
        """Raises SystemExit unless each feed, and each article with its text, has one row."""
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        wrong = [row for row in rows if row["error"] or not self.is_whole(row)]
        urls = {"feeds": self.feeds, "articles": self.articles, "whole": self.feeds + self.articles}[part]
        got = [row["url"] for row in rows if part != "articles" or row["kind"] == "article"]
        if wrong or sorted(got) != sorted(urls):
            raise SystemExit(f"bench: feeds: {len(got)} rows of {len(urls)}, {len(wrong)} wrong: {wrong[:1]}")

    def measure(self, part: str, name: str, words: Sequence[object]) -> Row:
        """Run a contestant; what it took, by the clock and by the server's log."""
        from sandbox.sites import max_in_window

        time.sleep(TOO_SOON)
        run = run_child(words, name)
        self.check(part)
        log: list[tuple[float, str, str, int, float]] = json.loads(self._server.get("/log")[2])
        log, self._known = log[self._known :], len(log)
        times = collections.defaultdict(list)
        for t, host, *_ in log:
            times[host].append(t)
        gaps = [b - a for asked in times.values() for a, b in itertools.pairwise(asked)]
        note(f"{part}, {name}: {run.seconds:.2f} s")
        return {
            "": f"{part}: {name}",
            "requests": len(log),
            "s": run.seconds,
            "s by the log": max(t + pause for t, *_, pause in log) - min(t for t, *_ in log),
            "CPU s": run.cpu,
            "429": sum(status == 429 for _, _, _, status, _ in log),
            "most in 2 s": max(max_in_window(asked, WINDOW - JITTER) for asked in times.values()),
            "closest s": min(gaps, default=None),
        }


def at_best(seed: int, part: str, workers: int) -> float:
    """Seconds from the first request to the last answer, if nothing but waiting took any time."""
    from crawl.frontier import Frontier
    from crawl.hosts import Question
    from crawl.model import Request

    frontier = Frontier(rate=RATE, burst=1)
    names = [f"http://h{host}.example" for host in range(HOSTS)]
    articles = {name: [f"{name}/article/{n}" for n in range(articles_of(host))] for host, name in enumerate(names)}
    if part == "articles":
        frontier.add_all(itertools.chain.from_iterable(articles.values()), 0.0)
    else:
        frontier.add_all((f"{name}/feed.xml" for name in names), 0.0, kind="feed")
    frontier.close()
    now, serial, waiting = 0.0, itertools.count(), list[tuple[float, int, Request]]()
    while True:
        while waiting and waiting[0][0] <= now:
            done = heapq.heappop(waiting)[2]
            if part == "whole" and done.kind == "feed":
                frontier.add_links(articles[done.target.removesuffix("/feed.xml")], 1, now)
            frontier.finish(done, now)
        decision = frontier.step(now) if len(waiting) < workers else float("inf")
        assert not isinstance(decision, Question)  # robots.txt is not asked
        if isinstance(decision, Request):
            begin = now + frontier.clear_to_send(decision, now)
            pause = latency(seed, int(decision.host[1:].partition(".")[0]), decision.target.partition(".example")[2])
            heapq.heappush(waiting, (begin + pause, next(serial), decision))
        elif decision is None:
            return now
        else:
            now = min(now + decision, *(end for end, *_ in waiting[:1]), float("inf"))


@contextlib.contextmanager
def course(seed: int) -> Iterator[Course]:
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder, port = Path(temporary), free_port()
        words = [*module("bench.feeds"), "serve", port, seed]
        with serving("the server of feeds", words, port, folder / "server.log") as server:
            yield Course(server, port, folder)


@command(
    "26 feeds and their 36 articles, each answer with its own latency: seconds, ratio to one after the other, pauses",
    "feeds",
    "feeds --repeat 3 --seed 2",
    repeat=(1, "runs of each contestant; the loop runs once"),
    seed=(1, "of the latencies"),
)
def feeds(args: argparse.Namespace) -> list[Row]:
    """The table's rows. Raises SystemExit if something was wrong."""
    require("feeds", "feedparser", "trafilatura", "lxml_html_clean")
    results: list[Row] = []
    with course(args.seed) as track:
        alone = {part: track.measure(part, "one after the other", track.loop(part)) for part in PARTS[:2]}
        alone["whole"] = dict(alone["articles"]) | {"": "whole: one after the other"}
        for key in ("requests", "s", "s by the log", "CPU s", "429"):
            alone["whole"][key] += alone["feeds"][key]
        for part in PARTS:
            runs: dict[str, list[Row]] = collections.defaultdict(list)
            for _, name in interleaved(CONTESTANTS, args.repeat):
                runs[name].append(track.measure(part, name, track.crawl(part, *map(str, CONTESTANTS[name]))))
            for made in ([alone[part]], *runs.values()):
                name = str(made[0][""]).partition(": ")[2]
                workers = 1 if made[0] is alone[part] else 10 if "10" in name else 64
                row = dict(made[0])
                row |= {key: Spread.of(one[key] for one in made) for key in ("s", "s by the log", "CPU s")}
                row |= {key: max(one[key] for one in made) for key in ("429", "most in 2 s")}
                row |= {"closest s": min((one["closest s"] for one in made if one["closest s"]), default=None)}
                ratios = {f"x, {key}": alone[part][key] / row[key].median for key in ("s", "s by the log")}
                row = {"": row[""]} | ratios | row
                row["s at best"] = None if workers == 1 else at_best(args.seed, part, workers)
                results.append(row)
    print(table(results))
    hasty = [row[""] for row in results if row["429"] or row["most in 2 s"] != 1]
    if hasty:
        raise SystemExit(f"bench: feeds: a host was asked too soon: {hasty}")
    return results


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), int(sys.argv[3]))
    else:
        loop(*sys.argv[2:])
