"""The wire between the processes of a crawl: frames (a length, then sections: a type, a bucket or ``ME``, bytes).

A host falls into one of ``BUCKETS`` by a stable hash; what concerns a host is sent to its bucket. A frame has effect
as a whole, so it brings the rows, the links of their pages, their keys and the counts together. Types of sections:

to the worker: D keys of what is done, T lines of the list, Y all of it is here, Z the end, H a home, U credentials, O
origins of the list (or feeds), V validators of feeds, B a body, P pages of hosts; both ways: L links, Q a request
that is redirected, A an answer about robots.txt, E an article; to the parent: R rows, K keys, G pages given back, I
idle, S counts, F the last counts.

Pure, but for ``exactly``, which reads a socket.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import struct
import sys
from collections.abc import Iterator

from crawl.errors import FetchError
from crawl.urls import normalise

BUCKETS = 4096
ME = 0xFFFF
"""In the place of a bucket: for the worker itself."""

_SECTION = struct.Struct("<cHI")
Section = tuple[bytes, int, memoryview]


@functools.lru_cache(1 << 16)
def bucket_of(host: str) -> int:
    """Stable over processes and runs. ``www.`` makes no difference: most redirects stay with their worker so."""
    text = host.removeprefix("www.").encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") % BUCKETS


def key_of(url: str) -> int:
    """64 bits that stand for a normalised URL (or a text that is none)."""
    return int.from_bytes(hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=8).digest(), sys.byteorder)


def place(text: str) -> tuple[str, int, bool]:
    """(How a line of the list is known, its bucket, whether it is a URL)."""
    try:
        target, host = normalise(text)
    except FetchError:
        return text, bucket_of(text), False
    return target, bucket_of(host), True


def section(kind: bytes, bucket: int, data: bytes) -> bytes:
    return _SECTION.pack(kind, bucket, len(data)) + data


def sections(data: bytes | bytearray) -> Iterator[Section]:
    view, at = memoryview(data), 0
    while at < len(view):
        kind, bucket, size = _SECTION.unpack_from(view, at)
        at += _SECTION.size + size
        yield kind, bucket, view[at - size : at]


def exactly(sock: socket.socket, size: int) -> bytearray:
    """So many bytes. Raises EOFError if there are fewer."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data
