"""The list of URLs: its lines, what it names, and the passwords in it.

Whoever writes a URL into the list means it: its host is in scope, its origin may see what only servers of the list may,
its user and password go to it. Nothing else has those: no row, no frontier, no journal. ``UrlList`` is added to by the
thread that reads the list; the others only look things up.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from crawl.errors import FetchError
from crawl.scope import Scope
from crawl.urls import MAX_URL, normalise, origin, split_credentials

_PACKED = {
    b"\x1f\x8b": "zcat", b"BZh": "bzcat", b"\xfd7zXZ": "xzcat", b"(\xb5/\xfd": "zstdcat", b"PK\x03\x04": "unzip -p",
}  # fmt: skip


def unpacker(head: bytes) -> str | None:
    """The command that unpacks a list which begins so; None: it is not compressed."""
    return next((command for magic, command in _PACKED.items() if head.startswith(magic)), None)


def read_lines(stream: BinaryIO) -> Iterator[str]:
    """The lines of a list as they come: any line ending, UTF-8 or (by its BOM) UTF-16, never more than a piece held.

    ``stream`` is read raw, so that a thread blocked in it does not hold a buffer's lock when the program exits.
    A line longer than any URL can be is cut: it is an invalid URL either way. ``ValueError`` for what is compressed.
    """
    data = stream.read(1 << 16) or b""
    if unpacks := unpacker(data):
        raise ValueError(f"the list is compressed: give what `{unpacks} FILE` prints")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    decoder = codecs.getincrementaldecoder("utf-16" if utf16 else "utf-8-sig")(errors="replace")
    rest = ""
    while data:
        text = rest + decoder.decode(data)
        *lines, rest = text.replace("\r", "\n").split("\n")
        yield from lines
        rest = rest[: MAX_URL + 1]
        data = stream.read(1 << 16)
    yield rest + decoder.decode(b"", True)


def read_urls(sources: Iterable[str]) -> Iterator[str]:
    """The URLs of files, of ``-`` (stdin), and of arguments that are URLs themselves; comments and blanks left out."""
    for source in sources:
        if "://" in source:
            yield source
            continue
        is_stdin = source == "-"
        with open(0 if is_stdin else source, "rb", buffering=0, closefd=not is_stdin) as stream:
            for line in read_lines(stream):
                url = line.partition(" #")[0].partition("\t#")[0].strip()
                if url and not url.startswith("#"):
                    yield url[: MAX_URL + 1]


class UrlList:
    """What the list names. ``guarded``: there is something that only the origins of the list may see."""

    def __init__(self, scope: Scope, *, guarded: bool) -> None:
        self._scope, self._fixed = scope, False
        self.credentials: dict[str, str] = {}
        """``user:password`` of the list, by its URLs, and by origin for all others of that: the first that it has."""
        self.origins: set[str] | None = set() if guarded else None

    def borrow(self, other: UrlList) -> None:
        """Take over the credentials and origins of another list, to which no more origins are added."""
        self.credentials, self.origins, self._fixed = other.credentials, other.origins, True

    def keep_credentials(self, line: str) -> str:
        """A line of the list without its user and password, which are kept here."""
        text, userinfo = split_credentials(line)
        if userinfo:
            with contextlib.suppress(FetchError):
                url = normalise(text)[0]
                self.credentials.setdefault(origin(url), userinfo)
                self.credentials.setdefault(url, userinfo)
        return text

    def know_all(self, urls: Iterable[str]) -> list[str]:
        """``urls``, all of them, so that a link is in scope whichever of them names its host; without credentials."""
        known = [self.keep_credentials(url) for url in urls]
        for url in known:
            self.know(url)
        return known

    def know(self, url: str) -> None:
        """The list names ``url``: its host is in scope, its origin may see what only those of the list may."""
        with contextlib.suppress(FetchError):
            target = normalise(url)[0]
            self._scope.add(target)
            if self.origins is not None and not self._fixed:
                self.origins.add(origin(target))
