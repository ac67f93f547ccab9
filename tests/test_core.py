"""crawl/core.py, rows.py, stats.py: from an answer to what is next."""

from __future__ import annotations

import base64
import dataclasses
import heapq
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from crawl.core import Crawl
from crawl.errors import MAX_RETRY_AFTER, FetchError, Postponed
from crawl.frontier import Frontier
from crawl.headers import request_headers
from crawl.hosts import FrontierStats
from crawl.model import Options, Request, Response, ScrapeResult
from crawl.rows import build_row
from crawl.urls import normalise
from tests.helpers.crawl import answer, judged, take, taken


@pytest.mark.parametrize(
    ("text", "url", "host"),
    [
        ("http://example.com", "http://example.com/", "example.com"),
        ("HTTP://EXAMPLE.com:80/a/../b?q#frag", "http://example.com/b?q", "example.com"),
        ("https://example.com:443/%7euser/ü x", "https://example.com/%7euser/%C3%BC%20x", "example.com"),
        ("https://example.com:8443/", "https://example.com:8443/", "example.com"),
        ("http://user:p@example.com/x", "http://user:p@example.com/x", "example.com"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x", "[::1]"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        (" http://a.example/\t", "http://a.example/", "a.example"),
        ("http://0x7f.1/", "http://127.0.0.1/", "127.0.0.1"),
    ],
)
def test_normalise(text: str, url: str, host: str) -> None:
    assert normalise(text) == (url, host)
    assert normalise(url) == (url, host)


@pytest.mark.parametrize(
    "text",
    ["", "example.com", "ftp://example.com/", "javascript:alert(1)", "http://", "http://exa mple/", "//x/", "not a URL",
     "file:///etc/passwd", "http://a/" + "x" * 9000, "\ud800", "http://\ud800/", "http://[::1/"],
)  # fmt: skip
def test_what_is_not_a_url_is_refused(text: str) -> None:
    with pytest.raises(FetchError) as caught:
        normalise(text)
    assert caught.value.kind == "invalid_url"


def test_credentials_and_cookies_stay_with_the_origin_that_the_list_named() -> None:
    options = Options(headers=(("Cookie", "c=1"), ("Authorization", "Bearer t"), ("X-Other", "o"), ("DNT", "1")))
    first = Request("http://u:p%40@a.example/x", "http://u:p%40@a.example/x", "a.example")
    url, headers = request_headers(options, first)
    assert url == "http://a.example/x"
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"u:p@").decode()
    assert headers["Cookie"] == "c=1"
    hop = Request("http://a.example/x", "http://b.example/", "b.example", hops=1)
    assert not {"Cookie", "Authorization", "X-Other"} & set(request_headers(options, hop)[1])
    assert request_headers(options, hop)[1]["DNT"] == "1"
    home = Request("http://a.example/x", "http://a.example/y", "a.example", hops=1)
    assert request_headers(options, home)[1]["Cookie"] == "c=1"


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": 0}, {"per_host": 0}, {"burst": 0}, {"retries": -1}, {"timeout": 0}, {"max_bytes": 0},
     {"rate": -1}, {"rate": math.nan}, {"rate": math.inf}, {"headers": (("a b", "c"),)}, {"headers": (("a", "b\nc"),)},
     {"user_agent": "a\r\nb"}, {"proxy": "socks5://x"}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Options(**wrong)


def test_frontier_one_host_row_by_row() -> None:
    frontier = Frontier(rate=2.0, burst=1)
    assert take(frontier, 0.0) == math.inf
    assert frontier.add_all(["http://a/1", "http://a/2", "http://a/1#again", "http://A:80/2"], 0.0) == 2
    first = taken(take(frontier, 0.0))
    assert (first.url, first.target, first.host) == ("http://a/1", "http://a/1", "a")
    assert take(frontier, 0.1) == pytest.approx(0.4)
    assert frontier.clear_to_send(first, 0.2) == 0.0
    assert take(frontier, 0.2) == pytest.approx(0.3)  # the lower bound that is in the heap
    assert take(frontier, 0.5) == pytest.approx(0.2)  # half a second after it was *sent*
    frontier.close()
    second = taken(take(frontier, 0.7))
    assert (first.last_of_host, second.last_of_host) == (False, True)
    frontier.finish(first, 0.8)
    assert take(frontier, 0.8) == math.inf  # it may come back
    frontier.finish(second, 0.9)
    assert take(frontier, 0.9) is None
    assert frontier.stats() == FrontierStats(waiting=0, in_flight=0, hosts=1, seen=2, duplicates=2, closed=True)
    assert "0 waiting" in repr(frontier)


def test_frontier_holds_back_at_the_moment_of_sending() -> None:
    frontier = Frontier(rate=1.0, burst=1)
    frontier.add_all(["http://a/1", "http://a/2", "http://a/3"], 0.0)
    slow = taken(take(frontier, 0.0))
    quick = taken(take(frontier, 1.0))  # slow is still connecting
    assert frontier.clear_to_send(quick, 1.0) == 0.0
    assert frontier.clear_to_send(slow, 1.4) == pytest.approx(0.6)  # both at once would be two within a second
    assert frontier.clear_to_send(slow, 2.0) == 0.0
    third = taken(take(frontier, 3.0))
    frontier.pause("a", 60.0, 3.0)
    assert frontier.stats().in_flight == 3
    with pytest.raises(Postponed):
        frontier.clear_to_send(third, 3.0)
    frontier.put_back(third, 3.0, 3.0)
    assert take(frontier, 3.0) == pytest.approx(57.0)
    assert taken(take(frontier, 60.0)) is third


def test_frontier_a_paused_or_slow_host_holds_up_no_other() -> None:
    frontier = Frontier(rate=0, per_host=1)
    frontier.add_all([f"http://{host}/{n}" for host in "abc" for n in range(2)], 0.0)
    a = taken(take(frontier, 0.0))
    frontier.pause("a", 100.0, 0.0)
    assert [taken(take(frontier, 0.0)).host for _ in range(2)] == ["b", "c"]
    assert take(frontier, 0.0) == math.inf  # one in flight per host
    frontier.finish(a, 1.0)
    assert take(frontier, 1.0) == 99.0
    assert taken(take(frontier, 100.0)).host == "a"


def test_frontier_retries_wait_in_the_frontier_and_redirects_obey_the_target_host() -> None:
    frontier = Frontier(rate=10.0, burst=1)
    frontier.add_all(["http://a/1", "http://b/1"], 0.0)
    a, b = taken(take(frontier, 0.0)), taken(take(frontier, 0.0))
    assert frontier.clear_to_send(a, 0.0) == frontier.clear_to_send(b, 0.0) == 0.0
    frontier.put_back(a, 0.01, 5.0)
    frontier.put_back(b, 0.02, 0.02, "http://a/target", "a")
    assert take(frontier, 0.02) == pytest.approx(0.08)
    hop = taken(take(frontier, 0.1))
    assert hop is b
    assert (hop.target, hop.host) == ("http://a/target", "a")
    frontier.finish(hop, 0.2)
    assert take(frontier, 0.2) == pytest.approx(4.8)
    assert taken(take(frontier, 5.0)) is a


def test_frontier_total_rate_and_stop_and_refused_urls() -> None:
    frontier = Frontier(rate=0, total_rate=4.0)
    frontier.add_all(["http://a/", "http://b/", "http://c/", "no url", "no url"], 0.0)
    refused = taken(take(frontier, 0.0))
    assert refused.error and refused.error.kind == "invalid_url"
    frontier.finish(refused, 0.0)
    a = taken(take(frontier, 0.0))
    assert frontier.clear_to_send(a, 0.0) == 0.0
    assert take(frontier, 0.0) == pytest.approx(0.25)
    b = taken(take(frontier, 0.25))
    assert frontier.clear_to_send(b, 0.3) == 0.0
    frontier.stop()
    assert take(frontier, 9.0) is None
    frontier.finish(a, 9.0)
    frontier.put_back(b, 9.0, 10.0)
    assert take(frontier, 20.0) is None
    assert frontier.stats().waiting == 2


def test_frontier_forgets_hosts_when_their_bucket_is_full_again() -> None:
    frontier = Frontier(rate=1.0, lead=0.002)
    frontier.add_all([f"http://h{n}/" for n in range(1000)], 0.0)
    requests = [taken(take(frontier, 0.0)) for _ in range(1000)]
    for request in requests:
        assert frontier.clear_to_send(request, 0.0) == 0.0
        frontier.finish(request, 0.1)
    assert frontier.stats().hosts == 1000
    frontier.add_all(["http://late/"], 5.0)
    taken(take(frontier, 5.0))
    frontier.add_all(["http://later/"], 9.0)
    taken(take(frontier, 9.0))
    assert frontier.stats().hosts <= 3


class Played:
    """What a simulated crawl did: every send by host, every URL finished, and the time it all took."""

    def __init__(self) -> None:
        self.sent: dict[str, list[float]] = {}
        self.finished: Counter[str] = Counter()
        self.end = 0.0


def play(seed: int, frontier_class: type[Frontier] = Frontier, **settings: Any) -> Played:
    """A crawl under a simulated clock: random latencies, connect delays, failures, redirects, pauses, workers."""
    rng = random.Random(seed)
    hosts = [f"h{n}" for n in range(rng.randint(1, 6))]
    workers = rng.randint(1, 12)
    settings = {
        "rate": rng.choice([0, 0.5, 3.0, 50.0]),
        "burst": rng.choice([1, 1, 3]),
        "per_host": rng.choice([1, 2, 8]),
        "total_rate": rng.choice([0, 0, 20.0]),
        "lead": rng.choice([0.0, 0.002]),
    } | settings
    frontier = frontier_class(**settings)
    urls = [f"http://{rng.choice(hosts)}/{n}" for n in range(rng.randint(1, 60))]
    played = Played()
    now, serial = 0.0, 0
    events: list[tuple[float, int, str, Request | None]] = []
    paused: dict[str, float] = {}

    def at(when: float, what: str, request: Request | None = None) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (when, serial, what, request))

    cut = rng.randint(0, len(urls))
    frontier.add_all(urls[:cut], now)
    at(rng.random() * 3, "more")
    alarm = math.inf
    busy = steps = 0
    in_flight: Counter[str] = Counter()
    while True:
        steps += 1
        assert steps < 20_000, "the crawl does not end"
        while busy < workers:
            decision = take(frontier, now)
            if not isinstance(decision, Request):
                break
            busy += 1
            in_flight[decision.host] += 1
            assert in_flight[decision.host] <= settings["per_host"]
            at(now + rng.choice([0.0, 0.001, rng.random()]), "ready", decision)
        else:
            decision = math.inf
        if decision is None:
            break
        if isinstance(decision, float) and now + decision < alarm:
            alarm = now + decision
            at(alarm, "tick")
        assert events, f"nothing will happen, but {frontier}"
        now, _, what, request = heapq.heappop(events)
        if what == "more":
            frontier.add_all(urls[cut:] + urls[: cut // 2], now)
            frontier.close()
        elif what == "ready" and request:
            try:
                wait = frontier.clear_to_send(request, now)
            except Postponed:
                busy -= 1
                in_flight[request.host] -= 1
                frontier.put_back(request, now, now)
                continue
            if wait > 0:
                at(now + wait, "ready", request)
            else:
                assert now >= paused.get(request.host, 0.0) - 1e-9
                played.sent.setdefault(request.host, []).append(now)
                at(now + rng.expovariate(5), "answer", request)
        elif what == "answer" and request:
            busy -= 1
            in_flight[request.host] -= 1
            fate = rng.random()
            if request.attempt < 4 and fate < 0.15:
                request.attempt += 1
                frontier.put_back(request, now, now + rng.random() * 2)
            elif request.hops < 3 and fate < 0.3:
                request.hops += 1
                host = rng.choice(hosts)
                frontier.put_back(request, now, now, f"http://{host}/hop", host)
            else:
                if fate < 0.4:
                    frontier.pause(request.host, now + 5.0, now)
                    paused[request.host] = now + 5.0
                frontier.finish(request, now)
                played.finished[request.url] += 1
        elif what == "tick":
            alarm = math.inf
    played.end = now
    assert played.finished == Counter(set(urls)), "each URL once"
    assert busy == 0
    stats = frontier.stats()
    assert (stats.waiting, stats.in_flight) == (0, 0)
    groups = [(settings["rate"], settings["burst"], times) for times in played.sent.values()]
    groups.append((settings["total_rate"], 1, sorted(t for times in played.sent.values() for t in times)))
    for rate, burst, times in groups:
        if rate:
            for i, j in itertools.combinations_with_replacement(range(len(times)), 2):
                assert j - i + 1 <= burst + rate * (times[j] - times[i]) + 1e-6, "any window"
    return played


@pytest.mark.parametrize("block", range(10))
def test_frontier_simulated_crawls_keep_every_promise(block: int) -> None:
    for seed in range(block * 60, block * 60 + 60):
        play(seed)


def test_frontier_a_skewed_list_in_host_order_takes_as_long_as_its_busiest_host() -> None:
    frontier = Frontier(rate=10.0, burst=1)
    urls = [f"http://big/{n}" for n in range(100)] + [f"http://h{h}/{n}" for h in range(30) for n in range(10)]
    frontier.add_all(urls, 0.0)
    frontier.close()
    now = 0.0
    while (decision := take(frontier, now)) is not None:
        if isinstance(decision, Request):
            assert frontier.clear_to_send(decision, now) == 0.0
            frontier.finish(decision, now)
        else:
            now += decision
    assert now == pytest.approx(99 / 10)


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (answer(200), False), (answer(204), False), (answer(304), False), (answer(404), False), (answer(410), False),
        (answer(429), True), (answer(500), True), (answer(501), False), (answer(503), True), (answer(408), True),
        (FetchError("timeout", ""), True), (FetchError("connect", ""), True), (FetchError("reset", ""), True),
        (FetchError("truncated", ""), True), (FetchError("dns", ""), False), (FetchError("dns", "", retry=True), True),
        (FetchError("tls", ""), False), (FetchError("decode", ""), False), (FetchError("too_large", ""), False),
        (FetchError("protocol", ""), False), (FetchError("interrupted", ""), False),
    ],
)  # fmt: skip
def test_what_is_tried_again(outcome: Response | FetchError, again: bool) -> None:
    crawl, request, final = judged(outcome)
    assert (final is None) == again
    assert crawl.frontier.stats().waiting == int(again)
    assert request.attempt == 1 + again
    assert judged(outcome, retries=0)[2] is outcome


def test_a_bare_429_slows_its_host_and_a_bare_503_only_the_request() -> None:
    for status, paused in ((429, True), (503, False)):
        crawl, request, _ = judged(answer(status), rate=0.0)
        crawl.frontier.add_links([request.url + "other"], 0, 100.0)
        wait = take(crawl.frontier, 100.1)
        assert isinstance(wait, float) is paused, status


def test_retry_after_pauses_the_host_and_wins_over_the_back_off() -> None:
    crawl, request, final = judged(answer(429, retry_after="30"))
    assert final is None
    assert take(crawl.frontier, 100.0) == pytest.approx(30.0)
    crawl.frontier.add_all(["http://a.example/other", "http://b.example/"], 100.0)
    assert taken(take(crawl.frontier, 100.0)).host == "b.example"
    assert take(crawl.frontier, 129.9) == pytest.approx(0.1)
    assert taken(take(crawl.frontier, 130.0)) is request
    assert take(judged(answer(503, retry_after="1000000000"))[0].frontier, 100.0) == MAX_RETRY_AFTER
    assert take(judged(answer(503, retry_after="soon"))[0].frontier, 100.0) == pytest.approx(0.5)  # its rate: 2/s


@pytest.mark.parametrize(
    ("location", "leads"),
    [
        ("/y", "http://a.example/y"), ("y?q#f", "http://a.example/y?q"), ("//b.example", "http://b.example/"),
        ("https://b.example/ü", "https://b.example/%C3%BC"), (None, None), ("", None), ("file:///etc/passwd", None),
        ("javascript:1", None), ("http://", None), ("/x", None), ("/x#again", None), ("ftp://b/", None),
    ],
)  # fmt: skip
def test_where_redirects_lead(location: str | None, leads: str | None) -> None:
    headers: dict[str, Any] = {} if location is None else {"location": location}
    crawl, request, final = judged(answer(302, **headers))
    if leads:
        assert final is None
        assert (request.target, request.hops) == (leads, 1)
        assert crawl.stats.snapshot()["redirects"] == 1
    else:
        assert isinstance(final, FetchError)
        assert (final.kind, final.status) == ("redirects", 302)
    assert isinstance(judged(answer(301, location="/y"), max_redirects=0)[2], FetchError)


def test_rows() -> None:
    request = Request("http://a.example", "http://a.example/", "a.example", spent=0.1234)
    html = b"<!doctype html><html lang=en><title> A  b </title><p>one two<a href='/c#d'>three</a>"
    row = build_row(request, answer(200, html, content_type="text/html; charset=utf-8"))
    assert [field.name for field in dataclasses.fields(ScrapeResult)][:8] == [
        "url", "status", "title", "word_count", "links_found", "error", "fetched_at", "duration_ms",
    ]  # fmt: skip
    assert (row.url, row.status, row.title, row.word_count, row.links_found, row.error) == (
        "http://a.example", 200, "A b", 3, ["http://a.example/c"], None,
    )  # fmt: skip
    assert (row.final_url, row.bytes, row.duration_ms, row.language) == ("http://a.example/", len(html), 123.4, "en")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row.fetched_at)
    assert build_row(request, answer(404, html, content_type="text/html")).error == "http: 404 Not Found"
    assert build_row(request, answer(599)).error == "http: 599"
    failed = build_row(request, FetchError("dns", "no such host"))
    assert (failed.status, failed.final_url, failed.error) == (None, None, "dns: no such host")
    image = build_row(request, answer(200, b"<title>x", content_type="image/png"))
    assert (image.title, image.error) == (None, None)
    assert build_row(request, answer(200, b" \n<title>x")).title == "x"
    assert build_row(request, answer(200, b"GIF89a")).title is None


def test_a_list_that_fails_ends_the_run_and_what_came_before_counts() -> None:
    def urls() -> Iterator[str]:
        yield "http://a.example/"
        raise OSError("the disk is gone")

    crawl = Crawl(Options())
    changes: list[int] = []
    crawl.changed = lambda: changes.append(1)
    crawl.feed(urls()).join()
    assert isinstance(crawl.failure, OSError)
    assert take(crawl.frontier, 0.0) is None
    assert changes


@pytest.mark.parametrize(
    ("body", "costly"),
    [
        (b"<p>text</p>" * 1400, False), (b"<a href=x>" * 3001, True), (b"&amp;" * 10_001, True),
        (b"x" * 200_000, False),
        ("\u4e2d".encode("gbk") * 20_000, True), ("\u4e2d".encode() * 50_000, False), (b"\xe9" * 1000, False),
    ],
)  # fmt: skip
def test_no_page_is_parsed_in_the_loop_that_could_hold_it_up(body: bytes, costly: bool) -> None:
    crawl = Crawl(Options())
    request = Request("http://a/", "http://a/", "a")
    assert crawl.is_long(request, answer(body=body), 1 << 18) == costly
