"""XML as it comes from the web, on its way to a parser: inflated, decoded and mended, a piece at a time.

A document is a stranger's: it is never held as a whole but streamed, 256 KiB at a time. Promised: no more than the
caller's limit comes out, whatever was compressed; what cannot go on ends with `StopReading`, nothing else is raised.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterator

import webencodings

from crawl.net import Gzip

NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]+")  # characters that XML cannot have
XML_DECLARATION = re.compile(r"\A<\?xml\b[^>]*>\s*")

_PIECE = 1 << 18
_REFERENCES = re.compile(r"(?:&#(?:[0-9]+|[xX][0-9a-fA-F]+);)+")
_REFERENCE = re.compile(r"&#(?:([0-9]+)|[xX]([0-9a-fA-F]+));")
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([a-zA-Z0-9._:-]{1,40})["']""")
_CHARSET = re.compile(r"""charset\s*=\s*["']?([a-zA-Z0-9._:-]{1,40})""", re.IGNORECASE)
_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_MARKS |= {b"<\0": "utf-16-le", b"\0<": "utf-16-be"}  # no BOM, but the beginning of XML


class StopReading(Exception):
    """Nothing more of this document is read: its argument says why."""


def local_name(tag: str) -> str:
    """A tag without its namespace prefix."""
    return tag.rpartition(":")[2]


def mend_references(text: str) -> str:
    """Numeric references to what is no character of XML become U+FFFD, and those to two surrogates one character."""
    return _REFERENCES.sub(_mended, text) if "&#" in text else text


def _mended(run: re.Match[str]) -> str:
    mended: list[str] = []
    high = 0
    for one in _REFERENCE.finditer(run[0]):
        digits, base = (one[1], 10) if one[1] else (one[2], 16)
        code = int(digits, base) if len(digits.lstrip("0")) <= 7 else 0
        if high and 0xDC00 <= code <= 0xDFFF:
            mended[-1] = chr(0x10000 + (high - 0xD800 << 10) + code - 0xDC00)
            high = 0
            continue
        high = code if 0xD800 <= code <= 0xDBFF else 0
        good = code in (9, 10, 13) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or 0x10000 <= code <= 0x10FFFF
        mended.append(f"&#{code};" if good else "\ufffd")
    return "".join(mended)


def inflate_pieces(body: bytes, limit: int) -> Iterator[bytes]:
    """The body in pieces, without its gzip if it begins like one; StopReading past ``limit``, or where it is torn."""
    gzip = Gzip() if body.startswith(b"\x1f\x8b") else None
    step, total = _PIECE >> 4 if gzip else _PIECE, 0  # what is left of it is copied after each member
    try:
        for start in range(0, len(body), step):
            data = body[start : start + step]
            for piece in gzip.pieces(data) if gzip else [data]:
                if piece:
                    yield piece[: max(0, limit - total)]
                total += len(piece)
                if total > limit:
                    raise StopReading(f"larger than {limit} bytes")
    except (zlib.error, EOFError) as error:
        raise StopReading(f"gzip: {error}") from None
    if gzip and not gzip.complete():
        raise StopReading("gzip: it ends too soon")


def decode_pieces(pieces: Iterator[bytes], content_type: str | None = None) -> Iterator[str]:
    """The text of the pieces: by BOM, then HTTP's charset, then the XML declaration (RFC 7303, section 3)."""
    decoder: codecs.IncrementalDecoder | None = None
    for piece in pieces:
        if decoder is None:
            decoder = _codec(piece, content_type).incrementaldecoder("replace")
        yield decoder.decode(piece)
    if decoder:
        yield decoder.decode(b"", True)


def _codec(head: bytes, content_type: str | None) -> codecs.CodecInfo:
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return codecs.lookup(name)
    told = _CHARSET.search(content_type or "")
    declared = _DECLARED.match(head[:1024])
    for label in (told[1] if told else None, declared[1].decode() if declared else None):
        encoding = webencodings.lookup(label) if label else None
        if encoding and not encoding.name.startswith("utf-16"):  # the declaration was read as ASCII: it is none
            return encoding.codec_info
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return codecs.lookup("cp1252")
    return codecs.lookup("utf-8")
