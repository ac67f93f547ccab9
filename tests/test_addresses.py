"""crawl/addresses.py: which addresses are public."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from crawl import net as crawl_net
from crawl.addresses import is_public, leads_private, may_go_anywhere, names_private
from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.model import Options, Request
from crawl.urls import normalise
from tests.helpers.crawl import take

# The IANA special-purpose address registries of IPv4 and IPv6 (2025), multicast, and what else is not to be reached.
# True: "globally reachable", and nothing speaks against it.
BLOCKS = {
    "0.0.0.0/8": False, "0.0.0.0/32": False, "10.0.0.0/8": False, "100.64.0.0/10": False, "127.0.0.0/8": False,
    "169.254.0.0/16": False, "172.16.0.0/12": False, "192.0.0.0/24": False, "192.0.0.0/29": False,
    "192.0.0.8/32": False, "192.0.0.9/32": False, "192.0.0.10/32": False, "192.0.0.170/31": False,
    "192.0.0.192/32": False, "192.0.2.0/24": False, "192.31.196.0/24": True, "192.52.193.0/24": True,
    "192.88.99.0/24": False, "192.88.99.2/32": False, "192.168.0.0/16": False, "192.175.48.0/24": True,
    "198.18.0.0/15": False, "198.51.100.0/24": False, "203.0.113.0/24": False, "224.0.0.0/4": False,
    "240.0.0.0/4": False, "255.255.255.255/32": False, "168.63.129.16/32": False, "100.100.100.200/32": False,
    "169.254.169.254/32": False,
    "::1/128": False, "::/128": False, "64:ff9b:1::/48": False, "100::/64": False, "100:0:0:1::/64": False,
    "2001::/23": False, "2001::/32": False, "2001:1::1/128": False, "2001:1::2/128": False, "2001:1::3/128": False,
    "2001:2::/48": False, "2001:3::/32": False, "2001:4:112::/48": False, "2001:10::/28": False,
    "2001:20::/28": False, "2001:30::/28": False, "2001:db8::/32": False, "2620:4f:8000::/48": True,
    "3fff::/20": False, "5f00::/16": False, "fc00::/7": False, "fe80::/10": False, "fec0::/10": False,
    "ff00::/8": False, "fd00:ec2::254/128": False, "fd20:ce::254/128": False, "::/96": False,
    "::ffff:0:0:0/96": False, "200::/7": False, "4000::/3": False, "c000::/3": False, "1::/16": False,
}  # fmt: skip


NETWORKS = [(ipaddress.ip_network(block), public) for block, public in BLOCKS.items()]


OPEN = ["8.8.8.8", "1.1.1.1", "93.184.215.14", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0",
              "192.0.1.0", "223.255.255.255", "2606:4700::1111", "2a00:1450:4001::1", "2001:200::1", "2001:4860::8",
              "2003::1", "2000::1", "3ffe:ffff::1"]  # fmt: skip


def guard_rows() -> Iterator[tuple[str, bool]]:
    """Of each block the first, the last and a middle address and both neighbours; of IPv4 also all embeddings."""
    found: dict[str, bool] = dict.fromkeys(OPEN, True)
    for network, _ in NETWORKS:
        first, last = int(network[0]), int(network[-1])
        make: Any = type(network[0])
        for value in (first, last, (first + last) // 2, first - 1, last + 1):
            if 0 <= value < 1 << network.max_prefixlen:
                found[str(make(value))] = True
    for text in found:
        address = ipaddress.ip_address(text)
        embedded = guard_embedded(address)
        inner = embedded or address
        public = all(public for network, public in NETWORKS if inner.version == network.version
                     and inner in network)  # fmt: skip
        if inner.version == 6:
            public = public and address in ipaddress.ip_network("2000::/3")
        found[text] = public
        yield text, public
        if address.version == 4:
            number = int(address)
            for prefix, shift in ((0xFFFF << 32, 0), (0x64FF9B << 96, 0), (0x2002 << 112, 80)):
                yield str(ipaddress.IPv6Address(prefix | number << shift)), public
            yield str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1)), public
            yield f"::ffff:{text}", public
            yield f"64:ff9b::{text}", public
            yield f"::{text}", False
            yield f"2001:0:{number >> 16:x}:{number & 0xFFFF:x}:0:f227:{~number >> 16 & 0xFFFF:x}:1", False


def guard_embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def test_the_registries_decide() -> None:
    rows = list(guard_rows())
    wrong = [(text, public) for text, public in rows if is_public(text) is not public]
    assert wrong == []
    assert len(rows) > 500
    assert {public for _, public in rows} == {True, False}
    assert crawl_net.is_public is is_public


@pytest.mark.parametrize(
    "address",
    [
        # ipaddress.is_global is True for these in one version of Python 3.11 to 3.14 or another
        "224.0.0.1", "239.255.255.250", "ff0e::1", "fec0::1", "64:ff9b::10.0.0.1", "64:ff9b::7f00:1", "::10.0.0.1",
        "::127.0.0.1", "::ffff:0:10.0.0.1", "::ffff:100.64.0.1", "2002:a00:1::", "2002:7f00:1::1", "192.0.0.192",
        "192.88.99.1", "3fff::1", "5f00::1", "4000::1", "64:ff9b:1::1", "2001:20::1", "168.63.129.16",
        # scopes, and other spellings than inet_ntop's
        "fe80::1%eth0", "fe80::1%25eth0", "::1%lo", "2606:4700::1111%eth0", "::ffff:8.8.8.8%1", "8.8.8.8%1",
        "", " ", "localhost", "8.8.8", "8.8.8.08", "010.0.0.1", "0x8.8.8.8", "2130706433", "8.8.8.8.", " 8.8.8.8",
        "8.8.8.8\n", "[::1]", "[2606:4700::1]", "::ffff:8.8.8.256", "1::2::3", "<broadcast>", "８.８.８.８",
        "8.8.8.8/32",
    ],
)  # fmt: skip
def test_what_is_closed_though_it_looks_open(address: str) -> None:
    assert is_public(address) is False


@pytest.mark.parametrize(
    ("text", "private"),
    [
        *((f"http://{host}/", True) for host in (
            "127.0.0.1", "2130706433", "017700000001", "0x7f000001", "0177.0.0.1", "0x7f.0x0.0x0.0x1", "127.1",
            "127.0.1", "１２７.０.０.１", "①②⑦.0.0.1", "127。0。0。1", "%31%32%37.0.0.1", "127.0.0.1.",
            "127.0.0.1:80", "0", "0.0.0.0", "0x", "u:p@127.0.0.1", "8.8.8.8:80@127.0.0.1", "127.0.0.1\\@example.com",
            "[::1]", "[::]", "[0:0::0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::10.0.0.1]",
            "[2002:a00:1::]", "[::127.0.0.1]", "[fd00:ec2::254]", "[fe80::1]:8080", "169.254.169.254", "2852039166",
            "0xa9fea9fe", "0251.0376.0251.0376", "10.0.0.1", "167772161", "100.64.0.1", "224.0.0.1", "localhost",
            "LOCALHOST", "localhost.", "localhost%2e", "ⓛocalhost", "lo\u00adcalhost", "localhost:8080",
            "a.localhost", "a.b.localhost.", "127.0.0.1...",
        )),
        *((f"http://{host}/", False) for host in (
            "example.com", "8.8.8.8", "134744072", "[2606:4700::1111]", "[::ffff:8.8.8.8]", "localhost.example.com",
            "notlocalhost", "localhost.localdomain", "localtest.me", "127.0.0.1.nip.io", "10-0-0-1.example", "metadata",
            "metadata.google.internal", "router.local",
        )),
    ],
)  # fmt: skip
def test_which_hosts_name_a_private_address(text: str, private: bool) -> None:
    url, host = normalise(text)
    assert names_private(host) is private
    again = normalise(url)
    assert again == (url, host)
    request = Request(url, url, host)
    for free in (Request(url, url, host, private=True), request):
        if private and not free.private:
            with pytest.raises(FetchError, match="->") as caught:
                may_go_anywhere(Options(), free)
            assert (caught.value.kind, caught.value.retry) == ("blocked", False)
        else:
            assert may_go_anywhere(Options(), free) is free.private
    assert may_go_anywhere(Options(allow_private=True), request)


@pytest.mark.parametrize("text", ["http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/", "http://127.0.0.1%00.example/",
                                  "http://256.1/", "http://foo.127.0.0.1/", "http://a.0x7f/"])  # fmt: skip
def test_what_is_no_host_at_all(text: str) -> None:
    with pytest.raises(FetchError, match="not a URL"):
        normalise(text)


@pytest.mark.parametrize(
    ("private", "found_on", "leads"),
    [
        (True, "127.0.0.1", True), (True, "10.0.0.1", True), (True, "[::1]", True), (True, "localhost", True),
        (True, "wiki.localhost", True), (True, "example.com", False), (True, "8.8.8.8", False),
        (True, "[2606:4700::1]", False), (True, "intranet", False), (True, "", False), (False, "127.0.0.1", False),
        (False, "localhost", False), (False, "example.com", False), (False, "[fd00::1]", False),
    ],
)  # fmt: skip
def test_who_passes_trust_on(private: bool, found_on: str, leads: bool) -> None:
    assert leads_private(private, found_on) is leads


def test_the_addresses_that_may_be_connected_to() -> None:
    four, six = socket.AF_INET, socket.AF_INET6
    mixed = [(four, "10.0.0.1"), (four, "8.8.8.8"), (six, "::1"), (six, "2606:4700::1"), (six, "fe80::1%eth0")]
    assert crawl_net.allowed("a", mixed, anywhere=False) == [mixed[1], mixed[3]]
    assert crawl_net.allowed("a", mixed, anywhere=True) == mixed
    assert crawl_net.allowed("a", [], anywhere=False) == []
    with pytest.raises(FetchError, match=r"^blocked: a -> fe80::1%eth0$"):
        crawl_net.allowed("a", [mixed[4], mixed[0]], anywhere=False)


def test_the_list_is_what_names() -> None:
    crawl = Crawl(Options(rate=0))
    crawl.frontier.add_all(["http://127.0.0.1/", "http://a.example/", "http://localhost:1/", "http://[::1]/"], 0.0)
    found = {}
    while isinstance(request := take(crawl.frontier, 0.0), Request):
        found[request.host] = request.private
    assert found == {"127.0.0.1": True, "a.example": False, "localhost": True, "[::1]": True}
