"""HTTP/1.1 as both crawlers read it: bytes in, as they come; an answer's head and the pieces of its body out. Pure.

Promised: what becomes of any bytes is decided here, and in no HTTP client; into which segments they were cut makes no
difference. Time is linear in them, and one call reads STEPS chunks at most, so that no loop is held up. At most
MAX_HEAD bytes are held of a head or trailer, and MAX_LINE of a chunk's. A fault of how the body is framed is one of the
body: status and headers count.

Lenient where browsers are, strict where two readers could take different bytes for the body; where the end of a body is
in doubt, its connection is not used again. 9110, 9112: RFCs; Fetch: the standard, with its table of tests for lengths.

===================================================== ================================== =============================
what comes                                            is                                 as
===================================================== ================================== =============================
heads above 256 KiB, interim ones included            protocol                           Chromium; 9110, 5.4
any number of lines, each of any length, within that  read                               Chromium
empty lines before the status line                    skipped                            Chromium: 4 bytes
HTTP/2, 1.2, http/1.1, more blanks before the status  HTTP/1.1                           Chromium; curl: some
a status that is no three digits, or below 100        protocol                           9110, 15; curl
LF without CR, in a head or around chunks             the end of a line                  9112, 2.2; Chromium, curl
CR without LF                                         a space                            9112, 2.2
NUL in a head                                         protocol                           9110, 5.5; Chromium, curl
a line that begins with a blank                       more of the line before            9112, 5.2; Chromium, curl
a line without a colon                                skipped                            Chromium
blanks before the colon                               no part of the name                9112, 5.1; Chromium
Content-Length more than once, or a list, all equal   that length                        9112, 6.3; Fetch; Chromium
the same, not all equal, as ``30,`` or ``030, 30``    protocol                           9112, 6.3; Fetch; Chromium
``+``, ``_`` among a length's digits                  protocol                           9112, 6.3
any other Content-Length that is no number            none                               Fetch; Chromium
chunked beside a Content-Length                       chunked; the connection is closed  9112, 6.3; Chromium, curl
chunked in HTTP/1.0                                   undone; the connection is closed    9112, 6.1; curl
gzip or deflate before chunked, or alone              undone before Content-Encoding     9112, 6.1, 6.3; curl
chunked more than once at the end                     once                               Chromium, curl
identity, or nothing, as a Transfer-Encoding          none                               Chromium
any other Transfer-Encoding                           protocol                           9112, 6.1; curl
a chunk's size with blanks or an extension behind it  that size                          9112, 7.1; Chromium, curl
signs, ``0x``, blanks before it, more than 15 digits  protocol                           Chromium, curl
a line with a chunk's size above 16 KiB               protocol                           Chromium
a trailer, of whatever lines                          skipped                            9112, 7.1.2; Chromium
the connection's end behind the line of the last one  the body's end                     9112, 8
the connection's end before that, or a given length   truncated                          9112, 8; Chromium, curl
the connection's end in a head                        reset                              9112, 8
no head on a connection that was kept                 another connection is asked        9112, 9.3.1
more bytes than the body has                          ignored; the connection is closed  Chromium, curl
204 and 304                                           no body; if they have a length, or  9112, 6.3; Chromium
                                                      a coding, the connection is closed
101                                                   no body; the connection is closed  9110, 15.2.2
===================================================== ================================== =============================
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from crawl.errors import FetchError
from crawl.headers import read_headers
from crawl.model import RESPONSE_HEADERS

MAX_HEAD = 1 << 18  # bytes
MAX_LINE = 1 << 14  # bytes of a line with a chunk's size
STEPS = 1000  # heads, sizes and pieces that one call reads, at most

_STATUS_LINE = re.compile(
    rb"HTTP/([0-9]{1,3})(?:\.([0-9]{1,3}))?[ \t]+([1-9][0-9][0-9])(?:[ \t].*)?", re.IGNORECASE | re.DOTALL
)
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_NAMES = ("Content-Length", "Transfer-Encoding", "Connection", *RESPONSE_HEADERS)
_LINE = re.compile(rb"\n(%b)[ \t]*:([^\n]*)" % "|".join(_NAMES).encode(), re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"0*([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?", re.DOTALL)
_ALMOST_A_NUMBER = re.compile(rb"[0-9]*[+_][0-9+_]*")  # to some readers it is one
_TOO_LONG = f"more than {MAX_HEAD} bytes of headers"
_TO_THE_END = sys.maxsize  # bytes of a body that ends with its connection
_TRANSFER_CODINGS = {b"gzip", b"x-gzip", b"deflate", b"chunked"}

Lines = list[tuple[bytes, bytes]]
"""Those lines of a head that mean something here: names in lower case, and values."""


class Head(NamedTuple):
    """What a driver needs of an answer's head."""

    status: int
    headers: dict[str, str]  # those of RESPONSE_HEADERS that came
    length: int | None  # bytes of its body, if it says so


class Answer:
    """The answer to one request. ``feed`` it what comes, nothing where there is ``more``, and tell it the ``end``."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.over = False
        self.more = False  # what was fed has not all been read
        self.fault: FetchError | None = None  # why it is over before it was complete
        self._keep = False  # whether its connection is to be kept
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer in which no end was found
        self._room = MAX_HEAD  # bytes that heads and trailer may have yet
        self._version, self._status = (0, 0), 0  # of the head that comes
        self._left = 0  # bytes of the body, or of the present chunk
        self._chunked = False
        self._read: Callable[[list[bytes]], bool] = self._read_head  # takes from the buffer; False: there is too little

    def feed(self, data: bytes = b"") -> bytes:
        """What is of the body in ``data``; if there is a fault, what comes before it."""
        pieces: list[bytes] = []
        self._buffer += data
        try:
            steps = STEPS
            while steps and self._buffer and not self.over and self._read(pieces):
                steps -= 1
            self.more = not steps and not self.over
        except FetchError as fault:
            self.end(fault)
        return b"".join(pieces)

    def end(self, fault: FetchError | None = None) -> None:
        """Nothing more comes: the connection was closed, or ``fault`` befell it."""
        if not self.over:
            self.fault = fault or self._cut_off()
            if self.fault and self.head:
                self.fault.status = self.head.status
        self.over, self.more, self._keep = True, False, False

    @property
    def reusable(self) -> bool:
        """Whether its connection can be used for another request: it is over, and nothing came behind it."""
        return self.over and self._keep and not self._buffer

    def _cut_off(self) -> FetchError | None:
        if self.head is None:
            return FetchError("reset", "closed in the head" if self._buffer else "closed without an answer")
        if self._chunked and self._read != self._read_trailer:
            return FetchError("truncated", "more chunks were to come")
        if self.head.length is not None:
            return FetchError("truncated", f"{self._left} more bytes were to come")
        return None

    def _read_head(self, pieces: list[bytes]) -> bool:
        buffer = self._buffer
        if not self._status:
            if buffer[:1] in b"\r\n":
                self._room -= len(buffer)
                buffer[:] = buffer.lstrip(b"\r\n")
                self._room += len(buffer)
            if not b"http/".startswith(buffer[:5].lower()):
                raise FetchError("protocol", "not HTTP")
            if (end := buffer.find(b"\n", self._searched, max(0, self._room))) >= 0:
                self._version, self._status = _read_status(bytes(buffer[:end]).rstrip(b"\r"))
        found = _END_OF_HEAD.search(buffer, max(0, self._searched - 2), max(0, self._room))
        if found is None:
            if len(buffer) >= self._room:
                raise FetchError("protocol", _TOO_LONG)
            self._searched = len(buffer)
            return False
        head = bytes(buffer[: found.end()])
        del buffer[: len(head)]
        self._searched, self._room = 0, self._room - len(head)
        status, self._status = self._status, 0
        if not 100 <= status < 200 or status == 101:
            self._begin(status, _read_lines(head))
        return True

    def _begin(self, status: int, lines: Lines) -> None:
        lengths, codings = _values(lines, b"content-length"), _values(lines, b"transfer-encoding")
        length, fault = 0, None
        if status in (101, 204, 304):
            certain = status != 101 and not codings and not any(value.strip(b"0") for value in lengths)
            codings = []
        else:
            try:
                codings = _read_codings(codings)
                length = _TO_THE_END if codings else _read_length(lengths)
            except FetchError as error:
                codings, fault = [], error
            self._chunked = codings[-1:] == [b"chunked"]
            certain = self._version >= (1, 1) and not lengths if self._chunked else length < _TO_THE_END
        self._keep = certain and _is_persistent(self._version, lines)
        lines += ((b"content-encoding", coding) for coding in codings if coding != b"chunked")
        self.head = Head(status, read_headers(lines), length if length < _TO_THE_END else None)
        if fault:
            self.end(fault)  # of the body: what status and headers say is known all the same
        elif self._chunked:
            self._read = self._read_size
        else:
            self._read, self._left, self.over = self._read_data, length, length == 0

    def _read_data(self, pieces: list[bytes]) -> bool:
        buffer = self._buffer
        pieces.append(bytes(buffer if len(buffer) <= self._left else buffer[: self._left]))
        del buffer[: len(pieces[-1])]
        self._left -= len(pieces[-1])
        if self._left == 0:
            self._read, self.over = self._read_end_of_chunk, not self._chunked
        return True

    def _read_size(self, pieces: list[bytes]) -> bool:
        line = self._line(MAX_LINE, f"a chunk's line of more than {MAX_LINE} bytes")
        if line is None:
            return False
        size = _CHUNK_SIZE.fullmatch(line)
        if size is None:
            raise FetchError("protocol", f"not a chunk's size: {_quoted(line)}")
        self._left = int(size[1], 16)
        self._read = self._read_data if self._left else self._read_trailer
        return True

    def _read_end_of_chunk(self, pieces: list[bytes]) -> bool:
        end = bytes(self._buffer[:2])
        if end == b"\r":
            return False
        if end != b"\r\n" and end[:1] != b"\n":
            raise FetchError("protocol", "a chunk is longer than its size")
        del self._buffer[: end.index(b"\n") + 1]
        self._read = self._read_size
        return True

    def _read_trailer(self, pieces: list[bytes]) -> bool:
        before = len(self._buffer)
        line = self._line(self._room, _TOO_LONG)
        self._room -= before - len(self._buffer)
        self.over = line == b""
        return line is not None

    def _line(self, most: int, fault: str) -> bytes | None:
        """The next line, without its end; None: it is not here yet. ``fault``: it has more than ``most`` bytes."""
        end = self._buffer.find(b"\n", self._searched, max(0, most))
        if end < 0:
            if len(self._buffer) >= most:
                raise FetchError("protocol", fault)
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line.removesuffix(b"\r")


def _quoted(data: bytes) -> str:
    return repr(data[:60])[1:]


def _read_status(line: bytes) -> tuple[tuple[int, int], int]:
    """(HTTP's version, status)."""
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise FetchError("protocol", f"not a status line: {_quoted(line)}")
    return (int(found[1]), int(found[2] or 0)), int(found[3])


def _read_lines(head: bytes) -> Lines:
    if b"\0" in head:
        raise FetchError("protocol", "NUL in the head")
    return [
        (name.lower(), value.strip(b" \t\r").replace(b"\r", b" "))
        for name, value in _LINE.findall(_FOLD.sub(b" ", head))
    ]


def _values(lines: Lines, name: bytes) -> list[bytes]:
    """The members of all lists of that name, in lower case."""
    return [part.strip(b" \t").lower() for own, value in lines if own == name for part in value.split(b",")]


def _read_codings(values: list[bytes]) -> list[bytes]:
    """The transfer codings, ``chunked`` once at the end if it is one."""
    codings = [coding for coding in values if coding not in (b"", b"identity")]
    while codings[-2:] == [b"chunked"] * 2:
        del codings[-1]
    if b"chunked" in codings[:-1] or not _TRANSFER_CODINGS.issuperset(codings):
        raise FetchError("protocol", f"Transfer-Encoding: {_quoted(b', '.join(codings))}")
    return codings


def _read_length(values: list[bytes]) -> int:
    """The Content-Length, or _TO_THE_END if there is none."""
    text = values[0] if values else b""
    if len(set(values)) > 1 or _ALMOST_A_NUMBER.fullmatch(text):
        raise FetchError("protocol", f"Content-Length: {_quoted(b', '.join(values))}")
    if not text.isdigit():
        return _TO_THE_END
    digits = text.lstrip(b"0")
    return int(digits or b"0") if len(digits) <= 18 else 10**18


def _is_persistent(version: tuple[int, int], lines: Lines) -> bool:
    """Whether the connection is kept by both sides (RFC 9112, section 9.3)."""
    options = _values(lines, b"connection")
    if (1, 1) <= version < (2, 0):
        return b"close" not in options
    return version < (2, 0) and b"keep-alive" in options
