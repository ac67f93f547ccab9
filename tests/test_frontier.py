"""crawl/frontier.py: what may be asked for, and when."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from crawl import frontier as frontier_module
from crawl import hosts, limits, scheduler
from crawl.errors import Postponed
from crawl.frontier import Frontier
from crawl.hosts import FrontierStats, Question
from crawl.limits import Pace
from crawl.model import Request
from crawl.robots_gate import KEPT_BYTES, ROBOTS_AGAIN
from crawl.scheduler import FAIR
from crawl.urls import host_of
from simulator.checker import Rules
from tests.helpers.crawl import take, taken


def test_links_keep_their_depth_and_flags_at_no_cost_for_each() -> None:
    frontier = Frontier(rate=0, private=lambda host: host == "10.0.0.1")
    assert frontier.add_all(["http://a/", "http://10.0.0.1/", "HTTP://A/x"], 0.0) == 3
    assert frontier.add_links(["http://a/1", "http://a/2", "http://a/"], 1, 0.0) == 2
    assert frontier.add_links(["http://a/3", "http://a/1"], 2, 0.0, private=True) == 1
    assert frontier.add_links(["http://a/s.xml"], 0, 0.0, kind="sitemap") == 1
    frontier.close()
    requests = []
    while not isinstance(decision := take(frontier, 0.0), float):
        requests.append(taken(decision))
        assert not requests[-1].last_of_host  # more links may come
        if len(requests) % 3 == 0:
            frontier.finish(requests[-1], 0.0)
    seen = {request.url: (request.target, request.depth, request.private, request.kind) for request in requests}
    assert seen == {
        "http://a/": ("http://a/", 0, False, "page"),
        "HTTP://A/x": ("http://a/x", 0, False, "page"),
        "http://10.0.0.1/": ("http://10.0.0.1/", 0, True, "page"),
        "http://a/1": ("http://a/1", 1, False, "page"),
        "http://a/2": ("http://a/2", 1, False, "page"),
        "http://a/3": ("http://a/3", 2, True, "page"),
        "http://a/s.xml": ("http://a/s.xml", 0, False, "sitemap"),
    }
    urls = [f"http://a/page/{n:06}" for n in range(50_000)]
    frontier = Frontier()
    tracemalloc.start()
    frontier.add_links(urls, 3, 0.0)
    taken_by_it = tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.Filter(True, str(module.__file__)) for module in (frontier_module, hosts, limits, scheduler)]
    )
    tracemalloc.stop()
    size = sum(trace.size for trace in taken_by_it.traces)
    assert 10 < size / len(urls) < 75  # beside the text itself, of some 70 bytes


def test_takes_links_after_the_list_is_closed_while_something_is_in_flight() -> None:
    frontier = Frontier(rate=0)
    frontier.add_all(["http://a/"], 0.0)
    frontier.close()
    seed = taken(take(frontier, 0.0))
    assert take(frontier, 0.0) == math.inf
    assert frontier.add_links(["http://b/"], 1, 1.0) == 1
    frontier.finish(seed, 1.0)
    page = taken(take(frontier, 1.0))
    assert page.depth == 1
    frontier.finish(page, 2.0)
    assert take(frontier, 2.0) is None
    with pytest.raises(ValueError, match="after the end"):
        frontier.add_links(["http://b/2"], 1, 2.0)


def test_mark_takes_a_url_for_visited() -> None:
    frontier = Frontier(rate=0, host_pages=2)
    assert [frontier.mark("http://a/1", counts=True), frontier.mark("http://a/1", counts=True)] == [True, False]
    assert frontier.mark("http://a/target")
    assert frontier.add_links(["http://a/1", "http://a/target", "http://a/2", "http://a/3"], 1, 0.0) == 1  # 1 counted
    assert taken(take(frontier, 0.0)).url == "http://a/2"
    stats = frontier.stats()
    assert (stats.seen, stats.capped, stats.waiting) == (3, 1, 0)


def test_wakes_a_host_that_had_only_a_retry_or_nothing_left() -> None:
    """Its entry in the heap may say when the retry is due, or when the host can be forgotten."""
    frontier = Frontier(rate=1.0, burst=5)
    frontier.add_all(["http://a/1"], 0.0)
    first = taken(take(frontier, 0.0))
    frontier.put_back(first, 0.0, 60.0)
    frontier.add_links(["http://a/2"], 1, 0.0)
    second = taken(take(frontier, 0.0))
    frontier.finish(second, 0.0)
    other = Frontier(rate=1.0, burst=5)
    other.add_all(["http://a/1"], 0.0)
    other.finish(taken(take(other, 0.0)), 0.1)
    other.add_all(["http://a/2"], 0.2)
    assert taken(take(other, 0.2)).url == "http://a/2"


def goes_at(frontier: Frontier, now: float) -> float:
    """When the next request leaves. A wait may end early, and the answer is then to wait on."""
    while not isinstance(decision := take(frontier, now), Request):
        assert decision is not None
        now += decision
    assert frontier.clear_to_send(decision, now) == 0.0
    return now


FORBIDDEN = "robots: forbidden by robots.txt"


def robots_frontier(*urls: str, **options: Any) -> Frontier:
    frontier = Frontier(robots=True, **options)
    frontier.add_all(urls, 0.0)
    return frontier


def test_asks_for_robots_txt_first_and_once_per_origin_within_its_time() -> None:
    frontier = robots_frontier("http://u:p@a/1", "http://a/2", "http://a:81/3", "http://b/1", rate=0, robots_ttl=100.0)
    asked = [taken(take(frontier, 0.0)) for _ in range(2)]
    assert {(request.kind, request.target, request.host) for request in asked} == {
        ("robots", "http://a/robots.txt", "a"), ("robots", "http://b/robots.txt", "b")}  # fmt: skip
    assert take(frontier, 0.0) == math.inf
    assert (frontier.stats().hosts_blocked, frontier.stats().waiting) == (2, 4)
    frontier.robots_known("http://a", Rules(0, None), 1.0)
    frontier.finish(next(request for request in asked if request.host == "a"), 1.0)
    pages = [taken(take(frontier, 1.0)) for _ in range(3)]
    assert [page.target for page in pages] == ["http://u:p@a/1", "http://a/2", "http://a:81/robots.txt"]
    assert frontier.stats().hosts_blocked == 2
    frontier.robots_known("http://a:81", Rules(0, None), 2.0)
    assert taken(take(frontier, 2.0)).url == "http://a:81/3"
    frontier.add_links(["http://a/4"], 1, 100.9)
    assert taken(take(frontier, 100.9)).url == "http://a/4"
    frontier.add_links(["http://a/5"], 1, 101.0)
    assert taken(take(frontier, 101.0)).kind == "robots"


def test_robots_that_are_not_known_in_the_end_were_unreachable() -> None:
    frontier = robots_frontier("http://a/1", rate=0)
    frontier.finish(taken(take(frontier, 0.0)), 5.0)  # its worker died
    page = taken(take(frontier, 5.0))
    assert str(page.error) == "robots: robots.txt could not be read"
    frontier.finish(page, 5.0)
    frontier.add_links(["http://a/2"], 1, 5.0 + ROBOTS_AGAIN - 0.1)
    frontier.finish(refused := taken(take(frontier, 5.0 + ROBOTS_AGAIN - 0.1)), 305.0)
    assert refused.error
    assert frontier.stats().forbidden == 2
    frontier.add_links(["http://a/3"], 1, 5.0 + ROBOTS_AGAIN)
    assert taken(take(frontier, 5.0 + ROBOTS_AGAIN)).kind == "robots"


def test_robots_go_round_by_other_hosts_while_their_own_waits() -> None:
    frontier = robots_frontier("http://a/1", "http://b/1", rate=0, per_host=1)
    a, b = taken(take(frontier, 0.0)), taken(take(frontier, 0.0))
    frontier.put_back(a, 0.0, 0.0, "http://b/robots.txt", "b")  # each redirects to the other: nobody waits for ever
    frontier.put_back(b, 0.0, 0.0, "http://a/robots.txt", "a")
    hops = [taken(take(frontier, 0.0)), taken(take(frontier, 0.0))]
    assert {(hop.url, hop.host) for hop in hops} == {("http://a/robots.txt", "b"), ("http://b/robots.txt", "a")}
    frontier.put_back(a, 0.0, 9.0)
    assert take(frontier, 1.0) == pytest.approx(8.0)
    assert taken(take(frontier, 9.0)) is a
    frontier.robots_known("http://a", Rules(0, None), 9.5)
    assert take(frontier, 9.5) == math.inf  # a has b's robots.txt in flight, of one
    frontier.finish(b, 9.5)
    assert {taken(take(frontier, 9.5)).url, taken(take(frontier, 9.5)).url} == {"http://a/1", "http://b/1"}


def test_what_robots_forbid_comes_out_as_refused_at_no_cost() -> None:
    frontier = robots_frontier(
        *(f"http://a/{n}" for n in range(200)), "http://b/1", rate=1.0, per_host=1, host_pages=200
    )
    asked = taken(take(frontier, 0.0))
    frontier.robots_known("http://a", Rules(1, None), 0.0)  # all of it
    frontier.finish(asked, 0.0)
    refused = [request for _ in range(201) if (request := taken(take(frontier, 0.0))).kind == "page"]
    assert [request.url for request in refused] == [f"http://a/{n}" for n in range(200)]
    assert {str(request.error) for request in refused} == {"robots: forbidden by robots.txt"}
    for request in refused:
        frontier.finish(request, 0.0)
    assert frontier.stats().forbidden == 200
    frontier.robots_known("http://a", Rules(3, None), 0.0)
    assert frontier.add_links(["http://a/300", "http://a/301"], 1, 0.0) == 2  # they gave their places back
    assert taken(take(frontier, 0.0)).error
    assert take(frontier, 0.0) == pytest.approx(1.0)  # robots.txt itself took the token
    assert taken(take(frontier, 1.0)).url == "http://a/301"


def test_a_redirect_to_a_forbidden_page_and_a_sitemap() -> None:
    frontier = robots_frontier("http://a/1", rate=0)
    frontier.robots_known("http://a", Rules(0, None), 0.0)
    frontier.robots_known("http://b", Rules(3, None), 0.0)
    page = taken(take(frontier, 0.0))
    frontier.put_back(page, 0.0, 0.0, "http://b/3", "b")
    assert str(taken(take(frontier, 0.0)).error) == "robots: forbidden by robots.txt"
    frontier.finish(page, 0.0)
    frontier.add_links(["http://b/6"], 0, 0.0, kind="sitemap")  # robots.txt names it
    assert taken(take(frontier, 0.0)).error is None
    assert (frontier.stats().in_flight, frontier.stats().hosts) == (1, 1)


def test_other_hosts_go_on_while_long_rules_are_asked() -> None:
    frontier = robots_frontier(*(f"http://{host}/{n}" for n in (3, 1) for host in "ab"), rate=0, host_pages=2)
    for asked in [taken(take(frontier, 0.0)) for _ in range(2)]:
        frontier.robots_known(f"http://{asked.host}", Rules(3, None, quick=asked.host == "b"), 0.0)
        frontier.finish(asked, 0.0)
    first, question = frontier.step(0.0), frontier.step(0.0)
    assert isinstance(first, Request) and (first.url, str(first.error)) == ("http://b/3", FORBIDDEN)
    assert isinstance(question, Question) and (question.host, question.target) == ("a", "http://a/3")
    other = frontier.step(0.0)
    assert isinstance(other, Request) and (other.url, other.error) == ("http://b/1", None)
    assert (frontier.step(0.0), frontier.stats().waiting) == (math.inf, 2)  # the question is out, once
    frontier.answer(question, question.rules.allows(question.target), 0.0)
    refused, second = frontier.step(0.0), frontier.step(0.0)
    assert isinstance(refused, Request) and (refused.url, str(refused.error)) == ("http://a/3", FORBIDDEN)
    assert isinstance(second, Question) and second.target == "http://a/1"
    frontier.consult(second, lambda: 0.0)
    allowed = frontier.step(0.0)
    assert isinstance(allowed, Request) and (allowed.url, allowed.error) == ("http://a/1", None)
    assert frontier.add_links(["http://a/2"], 1, 0.0) == 1  # the refused one gave its place back


def test_an_answer_counts_only_for_the_rules_that_hold() -> None:
    frontier = robots_frontier("http://a/1", rate=0)
    asked = taken(take(frontier, 0.0))
    frontier.robots_known("http://a", Rules(1, None, quick=False), 0.0)
    frontier.finish(asked, 0.0)
    question = frontier.step(0.0)
    assert isinstance(question, Question)
    frontier.robots_known("http://a", Rules(0, None), 1.0)  # meanwhile they are others
    frontier.answer(question, False, 1.0)
    frontier.answer(question, False, 1.0)  # and it is answered once
    assert taken(take(frontier, 1.0)).error is None


def test_what_costs_too_much_to_match_is_not_allowed() -> None:
    class Costly(Rules):
        def allows(self, url: str) -> bool | None:
            return None

    for quick in (True, False):
        frontier = robots_frontier("http://a/1", rate=0, host_pages=1)
        frontier.robots_known("http://a", Costly(0, None, quick=quick), 0.0)
        assert frontier.explain("http://a/9", 0.0) == "no: robots.txt is too costly to match"
        refused = taken(take(frontier, 0.0))
        assert (str(refused.error), frontier.stats().forbidden) == ("robots: robots.txt is too costly to match", 1)
        assert frontier.add_links(["http://a/2"], 1, 0.0) == 1


def test_rules_have_a_bound_in_bytes_and_what_was_freed_is_asked_for_again() -> None:
    frontier = robots_frontier(*(f"http://{host}/{n}" for host in "abc" for n in range(2)), rate=0, rules_bytes=100)
    first = {request.host: request for request in (taken(take(frontier, 0.0)) for _ in range(3))}
    for host in "abac":  # of a and b, those of a were asked last
        if host in first:
            frontier.robots_known(f"http://{host}", Rules(0, None, size=45), 0.0)
            frontier.finish(first.pop(host), 0.0)
        else:
            frontier.robots_known(f"http://{host}", Rules(0, None, size=45), 0.0)
    found = Counter((request.host, request.kind) for request in (taken(take(frontier, 0.0)) for _ in range(5)))
    assert found == {("a", "page"): 2, ("c", "page"): 2, ("b", "robots"): 1}
    assert take(frontier, 0.0) == math.inf
    frontier.robots_known("http://b", Rules(1, None, size=1_000), 0.0)  # more than all may have: it alone stays
    assert str(taken(take(frontier, 0.0)).error) == FORBIDDEN


def test_large_rules_are_freed_with_their_host_and_small_ones_stay() -> None:
    frontier = robots_frontier("http://a/1", "http://b/1", rate=0)
    sizes = {"a": KEPT_BYTES + 1, "b": KEPT_BYTES}
    for asked in [taken(take(frontier, 0.0)) for _ in range(2)]:
        frontier.robots_known(f"http://{asked.host}", Rules(0, None, size=sizes[asked.host]), 0.0)
        frontier.finish(asked, 0.0)
    pages = [taken(take(frontier, 0.0)) for _ in range(2)]
    frontier.add_links(["http://a/2"], 1, 0.0)
    assert taken(take(frontier, 0.0)).kind == "page"  # it is in flight yet
    for page in (*pages, dataclasses.replace(pages[0], host="a")):
        frontier.finish(page, 0.0)
    assert frontier.stats().hosts == 0
    frontier.add_links(["http://a/3", "http://b/3"], 1, 1.0)
    found = {request.host: request.kind for request in (taken(take(frontier, 1.0)) for _ in range(2))}
    assert found == {"a": "robots", "b": "page"}


def test_crawl_delay_row_by_row() -> None:
    frontier = robots_frontier(*(f"http://a/{n}" for n in (1, 2, 4, 5, 7, 8)), rate=4.0, burst=2)
    asked = taken(take(frontier, 0.0))
    assert frontier.clear_to_send(asked, 0.0) == 0.0
    frontier.robots_known("http://a", Rules(0, 2.0), 0.25)
    frontier.finish(asked, 0.25)
    assert frontier.rate("a") == 0.5
    assert goes_at(frontier, 0.25) == 0.25  # the bucket was full again: one token is kept
    assert goes_at(frontier, 0.25) == pytest.approx(2.25)
    frontier.robots_known("http://a", Rules(0, 10.0), 3.25)  # half a token is there
    assert goes_at(frontier, 3.25) == pytest.approx(8.25)
    frontier.robots_known("http://a", Rules(0, None), 9.25)  # a tenth
    assert frontier.rate("a") == 4.0
    assert goes_at(frontier, 9.25) == pytest.approx(9.25 + 0.9 / 4)
    free = robots_frontier("http://a/1", rate=0)
    asked = taken(take(free, 0.0))
    free.robots_known("http://a", Rules(0, 5.0), 1.0)
    assert take(free, 1.0) == pytest.approx(5.0)  # there was no limit before: what went before is not known
    free.robots_known("http://a", Rules(0, math.nan), 1.0)
    assert taken(take(free, 1.0)).url == "http://a/1"


def test_caps_of_pages() -> None:
    frontier = Frontier(rate=0, host_pages=2, max_pages=3)
    assert frontier.add_all([f"http://a/{n}" for n in range(5)], 0.0) == 2
    assert frontier.add_links(["http://a/9", "http://b/1", "http://c/1"], 1, 0.0) == 1
    assert frontier.add_links(["http://c/sitemap.xml"], 0, 0.0, kind="sitemap") == 1  # no page
    assert [taken(take(frontier, 0.0)).kind for _ in range(4)].count("page") == 3
    assert frontier.stats().capped == 5
    assert frontier.stats().seen == 4


def test_stats_say_who_waits_for_what() -> None:
    frontier = Frontier(rate=1.0)
    frontier.add_all([f"http://{host}/{n}" for host in "abc" for n in range(2)], 0.0)
    taken(take(frontier, 0.0))
    assert frontier.stats() == FrontierStats(5, 1, 3, 6, 0, False, hosts_ready=2)


def test_adaptive_rate_row_by_row() -> None:
    frontier = Frontier(rate=10.0, adaptive=True)
    assert (frontier.rate("a"), Pace(math.inf).rate) == (5.0, 10.0)
    request = Request("http://a/", "http://a/", "a")
    rows: list[tuple[float, Any, float, float]] = [
        (1.0, "ok", 0.2, 5.1),
        (2.0, "ok", 0.2, 5.2),
        (3.0, "refused", 0.1, 2.6),
        (3.1, "refused", 0.2, 2.6),  # sent before the rate was lowered
        (3.2, "ok", 0.3, 2.6),
        (3.3, "timeout", 0.25, 1.3),
        (4.0, "ok", 0.2, 1.4),
    ]
    for now, outcome, seconds, rate in rows:
        frontier.report(request, outcome, seconds, now)
        assert frontier.rate("a") == pytest.approx(rate), now
    for n in range(100):
        frontier.report(request, "ok", 0.2, 5.0 + n)
    assert frontier.rate("a") == 10.0  # never above --rate
    for n in range(100):
        frontier.report(request, "timeout", 0.5, 200.0 + n)
    assert frontier.rate("a") == Pace.FLOOR
    fixed = Frontier(rate=10.0)
    fixed.report(request, "refused", 0.1, 1.0)
    assert fixed.rate("a") == 10.0


def test_adaptive_rate_falls_when_the_latency_rises() -> None:
    pace = Pace(10.0)
    for n in range(20):
        pace.report("ok", 0.1, n * 0.5, 10.0)
    assert pace.rate == pytest.approx(7.0)
    rates = []
    for n in range(20):
        pace.report("ok", 0.5, 10.0 + n, 10.0)
        rates.append(pace.rate)
    # The mean moves an eighth at a time: 0.15, 0.194, 0.232 > 2 * 0.1; then eight successes are waited for.
    assert rates[:3] == pytest.approx([7.1, 7.2, 3.6])
    assert rates[3:12] == pytest.approx([3.7, 3.8, 3.9, 4.0, 4.1, 4.2, 4.3, 2.15, 2.25])
    noisy = Pace(10.0)
    for n in range(40):
        noisy.report("ok", 0.001 if n < 20 else 0.04, n * 1.0, 10.0)
    assert noisy.rate == pytest.approx(9.0)  # 40 ms are no jam
    settled = Pace(10.0)
    for n in range(400):
        settled.report("ok", 0.1 if n < 50 else 0.5, n * 1.0, 10.0)
    assert settled.rate == 10.0  # after two minutes this is how long it takes


def test_adaptive_obeys_robots_and_spaces_at_the_rate_found() -> None:
    frontier = robots_frontier("http://a/1", "http://a/2", "http://a/4", rate=10.0, adaptive=True)
    asked = taken(take(frontier, 0.0))
    assert frontier.clear_to_send(asked, 0.0) == 0.0
    frontier.robots_known("http://a", Rules(0, 1.0), 1.0)
    frontier.finish(asked, 1.0)
    assert frontier.rate("a") == pytest.approx(0.5)
    assert goes_at(frontier, 1.0) == 1.0
    frontier.report(asked, "refused", 0.5, 2.0)  # half a token is there; the rest comes at a quarter a second
    assert goes_at(frontier, 2.0) == pytest.approx(4.0)
    for n in range(100):
        frontier.report(asked, "ok", 0.5, 5.0 + n)
    assert frontier.rate("a") == 1.0


def test_the_longest_work_goes_first_and_nobody_is_passed_over_for_ever() -> None:
    frontier = Frontier(rate=1.0, per_host=1000)
    big = [f"http://big{h}/{n}" for h in range(20) for n in range(200)]
    frontier.add_all([*(f"http://small/{n}" for n in range(3)), *big, *(f"http://huge/{n}" for n in range(500))], 0.0)
    order = [taken(take(frontier, n * 0.05)).host for n in range(100)]  # 20 a second for 22 hosts of one a second
    assert order[0] == "huge"
    at = [n for n, host in enumerate(order) if host == "huge"]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert max(gaps) <= 21  # when it is due, or a little before; but for one turn by age
    turns = [n for n, host in enumerate(order) if host == "small"]
    assert turns == [FAIR - 1, 4 * FAIR - 1, 7 * FAIR - 1]  # at a turn by age each time, and never at another
    assert frontier.stats().hosts_ready > 0


def test_gives_the_critical_host_its_worker_early_only_where_workers_are_scarce() -> None:
    frontier = Frontier(rate=10.0)
    frontier.add_all([f"http://big/{n}" for n in range(500)] + [f"http://h{n}/1" for n in range(400)], 0.0)
    early, now, at = 0, 0.0, list[float]()
    for n in range(300):
        now = n * 0.012
        request = taken(take(frontier, now))
        wait = frontier.clear_to_send(request, now)
        assert wait <= 3 * 0.012 + 1e-9
        early += wait > 0
        assert not wait or frontier.clear_to_send(request, now + wait) == 0.0
        if request.host == "big":
            at.append(now + wait)
        frontier.finish(request, now + wait)
    assert early > 10
    assert (at[-1] - at[0]) / (len(at) - 1) < 0.101  # it lost a moment at a turn by age only
    alone = Frontier(rate=10.0)
    alone.add_all([f"http://big/{n}" for n in range(9)], 0.0)
    taken(take(alone, 0.0))
    assert take(alone, 0.01) == pytest.approx(0.09)


def test_explains_itself() -> None:
    frontier = Frontier(rate=2.0, per_host=2, robots=True, host_pages=4, private=lambda host: False)
    assert frontier.explain("ftp://a/", 0.0) == "no: only http and https are fetched, not ftp"
    assert frontier.explain("http://a/1", 0.0) == "later: http://a/robots.txt is read first; not found yet"
    frontier.add_all(["http://a/1", "http://a/2", "http://a/4", "http://a/5"], 0.0)
    assert frontier.explain("http://a/1", 0.0) == "later: http://a/robots.txt is read first"
    asked = taken(take(frontier, 0.0))
    frontier.clear_to_send(asked, 0.0)
    assert frontier.explain("http://a/1", 0.5) == "later: http://a/robots.txt is being read"
    frontier.robots_known("http://a", Rules(3, None), 0.5)
    frontier.finish(asked, 0.5)
    assert frontier.explain("http://a/1", 0.5) == "now"
    assert frontier.explain("http://A:80/3#x", 0.5) == "no: forbidden by robots.txt"
    assert frontier.explain("http://a/4", 0.5) == "in 1 s: 2 of its host go first, its host gets 2/s"
    assert frontier.explain("http://a/7", 0.5) == "no: its host's pages reached"
    one = taken(take(frontier, 0.5))
    assert frontier.explain("http://a/1", 0.5) == "no: requested already, or on its way"
    assert frontier.explain("http://a/2", 0.5) == "in 0.5 s: its host gets 2/s"
    two = taken(take(frontier, 1.0))
    assert frontier.explain("http://a/4", 2.0) == "later: 2 of its host are in flight"
    frontier.put_back(one, 2.0, 9.0)
    assert frontier.explain("http://a/1", 2.0) == "in 7 s: it is to be tried again"
    frontier.pause("a", 60.0, 2.0)
    assert frontier.explain("http://a/4", 2.0) == "in 58 s: its host asked for a pause"
    frontier.finish(two, 2.0)
    frontier.add_all(["http://b/1"], 2.0)
    frontier.finish(taken(take(frontier, 2.0)), 2.0)
    assert frontier.explain("http://b/2", 2.0) == "no: robots.txt could not be read"
    frontier.stop()
    assert frontier.explain("http://a/4", 2.0) == "no: the crawl was stopped"
    assert Frontier(rate=0).explain("http://a/", 0.0) == "now; not found yet"


def test_host_of() -> None:
    for url, host in {
        "http://a.example/x": "a.example", "https://a:8443": "a", "http://u:p@a/": "a", "http://[::1]:81/": "[::1]",
    }.items():  # fmt: skip
        assert host_of(url) == host


def test_an_address_has_so_many_requests_at_a_time_whatever_its_hosts() -> None:
    frontier = Frontier(rate=0.0, per_address=2, per_host=2)
    frontier.add_all([f"http://{host}/{n}" for host in ("a", "b", "c", "other") for n in range(5)], 0.0)
    frontier.close()
    where = {"a": "1", "b": "1", "c": "1", "other": "2"}
    under_way: list[Request] = []
    most, done = Counter[str](), 0
    for _ in range(500):
        while isinstance(request := take(frontier, 0.0), Request):
            try:
                frontier.connects(request, where[request.host])
                under_way.append(request)
            except Postponed:
                frontier.put_back(request, 0.0, 0.0)
        if request is None:
            break
        for address, count in Counter(where[each.host] for each in under_way).items():
            most[address] = max(most[address], count)
        frontier.finish(under_way.pop(0), 0.0)
        done += 1
    assert (done, most) == (20, {"1": 2, "2": 2})
    assert request is None
