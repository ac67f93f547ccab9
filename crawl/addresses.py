"""Which addresses a crawl may connect to: those of the public Internet, and others where they were asked for.

Closed by default: what no table knows is not public, and a private address is gone to only if the list names it, or a
page there does. Pure; the clients ask for the very addresses that their sockets get (``crawl.net.allowed``).
"""

from __future__ import annotations

import functools
import ipaddress

from crawl.errors import FetchError
from crawl.model import Options, Request

_NOT_PUBLIC = (
    "0.0.0.0/8",  # this network (RFC 791)
    "10.0.0.0/8",  # private (RFC 1918)
    "100.64.0.0/10",  # behind a carrier's NAT (RFC 6598); a cloud's metadata at 100.100.100.200
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # Azure's platform (wire server, DNS): a public address that the machine's own host answers
    "169.254.0.0/16",  # link-local; metadata of most clouds at 169.254.169.254
    "172.16.0.0/12",  # private (RFC 1918)
    "192.0.0.0/24",  # IETF protocols; a cloud's metadata at 192.0.0.192
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # the relays of 6to4, withdrawn (RFC 7526)
    "192.168.0.0/16",  # private (RFC 1918)
    "198.18.0.0/15",  # benchmarks (RFC 2544)
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
    "2001::/23",  # IETF protocols: Teredo, benchmarks, ORCHID
    "2001:db8::/32",  # documentation
    "3fff::/20",  # documentation (RFC 9637)
)
_NETWORKS = [ipaddress.ip_network(network) for network in _NOT_PUBLIC]
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")  # all that has been given out for unicast (RFC 4291)


@functools.lru_cache(1 << 14)
def is_public(address: str) -> bool:
    """Whether an IP address, as ``inet_ntop`` writes it, is one of the public internet. Never raises.

    The IANA special-purpose registries decide, from a table of our own, for ``ipaddress.is_global`` differs between
    versions of Python and takes multicast, site-local and several embedded addresses for global. Where an IPv6
    address stands for an IPv4 one (mapped, NAT64, 6to4), the latter counts. Closed: what has a scope, what no table
    knows, and what has other spellings (``010.0.0.1``, ``127.1``), which a socket might read in its own way.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if parsed.version == 6:
        value = int(parsed)
        if value >> 112 == 0x2002:
            parsed = ipaddress.IPv4Address(value >> 80 & 0xFFFF_FFFF)
        elif value >> 32 in (0xFFFF, 0x64_FF9B << 64):
            parsed = ipaddress.IPv4Address(value & 0xFFFF_FFFF)
        if "%" in address or (parsed.version == 6 and parsed not in _PUBLIC_6):
            return False
    return not any(parsed in network for network in _NETWORKS)


def names_private(host: str) -> bool:
    """Whether the host of a normalised URL says itself that it is not public: an address, or ``localhost``.

    Whoever writes such a host into the list means it. A name that only resolves to a private address does not count.
    """
    host = host.rstrip(".")
    if host[:1] == "[":
        return not is_public(host[1:-1])
    if host[-1:].isdecimal():  # in a normalised URL such a host is an IPv4 address
        return not is_public(host)
    return host == "localhost" or host.endswith(".localhost")


def leads_private(private: bool, found_on: str) -> bool:
    """``Request.private`` of what a request led to, by a link or a redirect on the host ``found_on``.

    The list's trust goes as far as the private hosts themselves reach: they may name any host; a public page, or a
    name, passes nothing on, even if a private page led to it.
    """
    return private and names_private(found_on)


def may_go_anywhere(options: Options, request: Request) -> bool:
    """Whether the addresses that the target resolves to need no check.

    Raises FetchError ``blocked`` if they do and the target names a private address itself: then nobody need be asked,
    and no proxy either.
    """
    if request.private or options.allow_private:
        return True
    if names_private(request.host):
        host = request.host.strip("[]")
        raise FetchError("blocked", f"{host} -> {host}")
    return False
