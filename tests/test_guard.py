"""The guard in both drivers: no page leads to a private address."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal, cast

import pytest

from crawl import http_aiohttp, http_urllib
from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.limits import AddressSlots
from crawl.model import Options, Request, Response
from crawl.urls import normalise
from tests.helpers.crawl import DRIVERS, PUBLIC, Web, guard_errors, guard_scrape


@pytest.mark.parametrize("driver", [*DRIVERS, "crawl_async on uvloop"])
def test_a_public_page_leads_nowhere_private(driver: str, guarded: Web) -> None:
    guarded.names |= {
        "rebind.example": [[PUBLIC], ["10.0.0.1"]],
        "localtest.me": [["127.0.0.1"]],
        "six.example": [["::1", "fe80::1%eth0"]],
        "localhost": [["127.0.0.1"]],
        "localhost..": [["127.0.0.1"]],
    }
    rows = {
        "http://public.example/to/http://169.254.169.254/latest/meta-data/": "169.254.169.254 -> 169.254.169.254",
        "http://public.example/to/http://127.0.0.1/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://[::1]/": "::1 -> ::1",
        "http://public.example/to/http://10.0.0.1/": "10.0.0.1 -> 10.0.0.1",
        "http://rebind.example/to/http://rebind.example/close/secret?/close": "rebind.example -> 10.0.0.1",
        "http://public.example/to/http://2130706433/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://0177.0.0.1/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://127.1:8080/": "127.0.0.1 -> 127.0.0.1",
        "http://public.example/to/http://[::ffff:10.0.0.1]/": "::ffff:a00:1 -> ::ffff:a00:1",
        "http://public.example/to/http://localhost./": "localhost. -> localhost.",
        "http://public.example/to/http://localtest.me/": "localtest.me -> 127.0.0.1",
        "http://public.example/to/https://localtest.me/": "localtest.me -> 127.0.0.1",
        "http://public.example/to/http://six.example/": "six.example -> ::1",
        "http://localtest.me/listed": "localtest.me -> 127.0.0.1",
        "http://public.example/to///localtest.me/": "localtest.me -> 127.0.0.1",
    }
    found = guard_scrape(driver, rows, retries=3)
    assert {url: row.error for url, row in found.items()} == {url: f"blocked: {text}" for url, text in rows.items()}
    assert {(row.status, row.attempts, row.final_url) for row in found.values()} == {(None, 1, None)}
    assert set(guarded.connects) == {PUBLIC}
    assert len(guarded.heads) == len(rows) - 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_name_is_judged_each_time_it_is_connected_to(driver: str, guarded: Web) -> None:
    guarded.names["rebind.example"] = [[PUBLIC], ["10.0.0.1"], [PUBLIC], ["::1"]]
    rows = guard_scrape(driver, [f"http://rebind.example/close/{n}" for n in range(4)])
    assert guard_errors(rows) == [None, "blocked: rebind.example -> 10.0.0.1", None, "blocked: rebind.example -> ::1"]
    assert guarded.connects == [PUBLIC] * 2


@pytest.mark.parametrize("driver", DRIVERS)
def test_of_several_addresses_the_public_ones_are_used(driver: str, guarded: Web) -> None:
    guarded.names |= {
        "mixed.example": [["10.0.0.1", "::1", PUBLIC, "169.254.169.254"]],
        "down.example": [["127.0.0.1", "93.184.215.15", "10.0.0.2"]],
    }
    guarded.refusing = {"93.184.215.15"}
    rows = guard_scrape(driver, ["http://mixed.example/", "http://down.example/"], retries=0)
    assert guard_errors(rows) == [None, "connect: Connection refused"]
    assert guarded.connects == [PUBLIC, "93.184.215.15"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_address_in_the_url_is_judged_when_it_is_connected_to(
    driver: str, guarded: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crawl.addresses.names_private", lambda host: False)
    crawl = Crawl(Options(rate=0))
    crawl.frontier._private = lambda host: False
    for url in ("http://10.0.0.1/", "http://[::1]:8080/", "http://[::ffff:7f00:1]/", "https://169.254.169.254/"):
        outcome = guard_fetch(driver, crawl, Request(url, url, normalise(url)[1]))
        assert isinstance(outcome, FetchError)
        assert outcome.kind == "blocked"
    assert guarded.connects == []


def guard_fetch(driver: str, crawl: Crawl, request: Request) -> Response | FetchError:
    if driver == "crawl_threads":
        with contextlib.closing(http_urllib.Fetcher(crawl)) as threads:
            return threads.fetch(request)

    async def fetch() -> Response | FetchError:
        fetcher = http_aiohttp.Fetcher(crawl)
        try:
            return await fetcher.fetch(request)
        finally:
            await fetcher.close()

    return asyncio.run(fetch())


@pytest.mark.parametrize("kind", ["page", "robots", "sitemap", "feed"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_kind_of_request_is_judged(driver: str, kind: str, guarded: Web) -> None:
    guarded.names["inside.example"] = [["172.16.0.1"]]
    of_kind = cast(Literal["page", "robots", "sitemap", "feed"], kind)
    for host, where in (("inside.example", "172.16.0.1"), ("127.0.0.1", "127.0.0.1")):
        url = f"http://{host}/robots.txt"
        outcome = guard_fetch(driver, Crawl(Options(rate=0)), Request(url, url, host, kind=of_kind))
        assert str(outcome) == f"blocked: {host} -> {where}"
    assert guarded.connects == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_kept_connection_serves_only_those_who_might_have_opened_it(driver: str, guarded: Web) -> None:
    guarded.names["inside.example"] = [["10.0.0.7"]]
    rows = guard_scrape(
        driver,
        ["http://127.0.0.1/to/http://inside.example/a", "http://inside.example/b",
         "http://127.0.0.1/to/http://inside.example/c"],
    )  # fmt: skip
    found = {url.rpartition("/")[2]: row.error for url, row in rows.items()}
    assert found == {"a": None, "b": "blocked: inside.example -> 10.0.0.7", "c": None}
    assert sorted(guarded.connects) == ["10.0.0.7", "127.0.0.1"]  # /a and /c on one connection
    assert [path for path, head in guarded.heads if head["host"] == "inside.example"] == ["/a", "/c"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_kept_connections_to_a_proxy_are_for_the_proxy(
    driver: str, guarded: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = f"proxy.example:{guarded.port}"
    guarded.names["proxy.example"] = [["10.0.0.5"]]
    monkeypatch.setenv("no_proxy", "proxy.example")
    rows = guard_scrape(driver, ["http://far.example/x", f"http://{proxy}/secret"], proxy=f"http://{proxy}")
    assert guard_errors(rows) == [None, "blocked: proxy.example -> 10.0.0.5"]
    assert guarded.connects == ["10.0.0.5"]
    assert [path for path, _ in guarded.heads] == ["http://far.example/x"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_no_proxy_is_asked_for_a_private_address(driver: str, guarded: Web) -> None:
    guarded.names["proxy.example"] = [["10.0.0.5"]]
    targets = ["http://169.254.169.254/", "http://localhost/", "https://10.0.0.1/", "http://[::1]/", "http://0/"]
    listed = "http://10.0.0.9/listed"
    urls = [*(f"http://far.example/to/{target}" for target in targets), listed]
    rows = guard_scrape(driver, urls, proxy=f"http://proxy.example:{guarded.port}")
    assert {row.url for row in rows.values() if (row.error or "").startswith("blocked: ")} == set(urls[:-1])
    assert rows[listed].error is None
    assert sorted(path for path, _ in guarded.heads) == sorted(urls)
    assert set(guarded.connects) == {"10.0.0.5"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_trust_of_the_list_goes_as_far_as_private_hosts_reach(driver: str, guarded: Web) -> None:
    guarded.names |= {"localhost": [["127.0.0.1"]], "inside.example": [["10.0.0.7"]]}
    rows = {
        "http://127.0.0.1/": None,
        "http://localhost/": None,
        "http://[::ffff:127.0.0.1]/": "connect: Connection refused",
        "http://127.0.0.1/to/http://127.0.0.2/": None,
        "http://127.0.0.1/to/http://10.0.0.1/to/http://localhost/2": None,
        "http://localhost/to/http://inside.example/": None,
        "http://127.0.0.1/to/http://public.example/": None,
        "http://127.0.0.1/to/http://public.example/to/http://127.0.0.1/x": "blocked: 127.0.0.1 -> 127.0.0.1",
        "http://127.0.0.1/to/http://inside.example/to/http://10.0.0.1/": "blocked: 10.0.0.1 -> 10.0.0.1",
        "http://inside.example/": "blocked: inside.example -> 10.0.0.7",
    }
    guarded.refusing = {"::ffff:7f00:1"}
    found = {url: row.error for url, row in guard_scrape(driver, rows, retries=0).items()}
    assert found == rows


@pytest.mark.parametrize("driver", DRIVERS)
def test_allow_private_opens_it_for_all(driver: str, guarded: Web) -> None:
    guarded.names["inside.example"] = [["10.0.0.7"]]
    rows = guard_scrape(
        driver,
        ["http://inside.example/", "http://public.example/to/http://10.0.0.1/",
         "http://public.example/to/http://public.example/to/http://inside.example/2"],
        allow_private=True,
    )  # fmt: skip
    assert guard_errors(rows) == [None] * 3
    assert set(guarded.connects) == {PUBLIC, "10.0.0.1", "10.0.0.7"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_public_connections_are_kept(driver: str, guarded: Web) -> None:
    rows = guard_scrape(driver, [f"http://public.example/{n}" for n in range(50)])
    assert guard_errors(rows) == [None] * 50
    assert guarded.connects == [PUBLIC]


@pytest.mark.parametrize("driver", DRIVERS)
def test_hosts_of_one_address_share_its_connections(driver: str, guarded: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded.names = {f"h{n}.example": [[PUBLIC]] for n in range(6)}
    busy: list[int] = []
    take = AddressSlots.learn

    def learn(slots: AddressSlots, request: Request, address: str) -> bool:
        there = take(slots, request, address)
        busy.append(slots._busy[address])
        return there

    monkeypatch.setattr(AddressSlots, "learn", learn)
    urls = [f"http://{name}/{n}" for name in guarded.names for n in range(3)]
    rows = guard_scrape(driver, urls, concurrency=12, per_address=2)
    assert guard_errors(rows) == [None] * 18
    assert max(busy) == 2
    assert {head.get("connection") for _, head in guarded.heads} == {"close"}
