"""The encodings of the web: names, bytes to text, and the queries of links (WHATWG encoding standard).

Promised: every label and every code means what it means to a browser; no bytes raise, and ASCII after a broken
character is never part of it, so that markup stays markup. Python's codecs do the work; what they read otherwise, or
not at all, is in tables here. Where a text has none of that it costs what the codec does, else 0.2 us a character.

Every function is pure; nothing is kept but tables and caches of pure functions. A leaf: nothing of ours is imported.
"""

import codecs
import contextlib
import itertools
import re
import urllib.parse
from functools import cache, lru_cache

import webencodings

# Where Python's codecs differ from the encoding standard's tables (index-*.txt there): codes, each with the character
# that it stands for and those of the codes after it.
_PATCHES = {
    "big5": (
        "877a㡵𡵓𣚞𦀡㻬𥣞㫵竼龗𤅡𨤍𣇪𠪊𣉞䌊蒄龖鐯䤰蘓墖靊鈘秐稲晠権袝瑌篅枂稬剏 "
        "87bd遆㓦珄𥶹瓆鿇垳䤯呌䄱𣚎堘穲𧭥讏䚮𦺈䆁𥶙箮𢒼鿈𢓁𢓉𢓌鿉蔄𣖻䂴鿊䓡𪷿拁 87de灮鿋 8e69箸 8e6f簆 8e7e糎 "
        "8eab緒 8eb4縝 8ecd者 8ed0耨 8f57菁 8f69蒨 8f6e萏 8fcb覦覩 8ffe起 906d都 907a銹 90dc靜 90f1響 91bf鼖 "
        "9244蔃 92af兙兛兝兞 92c8鍮 92d1瑹 9447浧 94ca禛 95d9邗 9644靝 96ed瀞 96fc嬨 9b76爁 9b78矗 9b7b纇 9bc6駖 "
        "9bde釔 9bec惞 9bf6澶 9c42輶 9c53侻 9c62營 9c68鄄 9c6b鷰 9c77菏 9cbc尐秣 9cd0婧 9d57輋 9d5a筑 9dc4拐 "
        "9ea9恢 9eef痹 9efd汊 9f60鬮 9f66鼗 9fcb僭 9fd8弌 a063蠏 a077拎 a0d5瑨 a0df煢 a0e4牐 a145‧ a14e﹑ a1c2¯ "
        "a1e3～ a1f2⊕⊙ a241∕﹨ a244￥ a246￠￡ a3c0␀␁␂␃␄␅␆␇␈␉␊␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟␡€ c6cf廴 c6d3无 c6d5癶 c6d7隶 "
        "c6de〃仝 fa5f倩 fa66偽 fabd包 fac5卄 fad5卿 fb48嘅 fbb8婷 fbf3幵 fbf9廐 fc4f彘 fc6c悤 fcb9撐 fce2晴 "
        "fcf1杞 fdb7沜渝 fdbb港 fdf1煮 fe52猪 fe6f瑜 feaa瓩 fedd砉"
    ),
    "euc-jp": "a1c1～ a1c2∥ a1dd－ a1f1￠ a1f2￡ a2cc￢ 8fa2b7～",
    "gb18030": (
        "a3a0\u3000 a6d9︐︒︑︓︔︕︖ a6ec︗︘ a6f3︙ a8bcḿ fe59龴 fe61龵 fe66龶龷 fe6d龸 fe7e龹 fe90龺 fea0龻 "
        "8135f437\ue7c7 80€"
    ),
    "koi8-u": "aeў beЎ",
    "shift_jis": "a0\ufffd fd\ufffd\ufffd\ufffd",
    "windows-1255": "ca\u05ba",
}
_CODECS = {"big5": "big5hkscs", "euc-jp": "euc_jp", "euc-kr": "cp949", "gb18030": "gb18030", "shift_jis": "cp932"}
_SHARED = {"big5": (b"\xa2A", b"\xa2B"), "euc-jp": (b"\x8f\xa2\xb7",)}
"""Codes for which the codec has a character that another code stands for, too."""
_TWO_BYTES = rb"[\x81-\xfe][\0-\xff]?|[\x80-\xff]"
_CODES = {  # what is one character, or begins like one
    "big5": re.compile(_TWO_BYTES),
    "euc-jp": re.compile(rb"(?:\x8f[\xa1-\xfe]|[\x8e\x8f\xa1-\xfe])[\0-\xff]?|[\x80-\xff]"),
    "euc-kr": re.compile(_TWO_BYTES),
    "gb18030": re.compile(rb"[\x81-\xfe](?:[0-9][\x81-\xfe][0-9]|[^0-9])?|[\x80-\xff]"),
    "shift_jis": re.compile(rb"[\x81-\x9f\xe0-\xfc][\0-\xff]?|[\x80-\xff]"),
}
_ESCAPE_2022 = re.compile(rb"\x1b(\([BIJ]|\$[@B])")
_KANJI_2022 = re.compile(rb"[!-~][^\x1b]?|[\0-\xff]")
_ASCII_2022 = [chr(code) if code < 0x80 and code not in (0x0E, 0x0F, 0x1B) else "\ufffd" for code in range(256)]
_TABLES_2022 = {
    b"(B": "".join(_ASCII_2022),
    b"(J": "".join(_ASCII_2022).replace("\\", "¥").replace("~", "‾"),
    b"(I": "".join(chr(code + 0xFF40) if 0x21 <= code < 0x60 else "\ufffd" for code in range(256)),
}
_NOT_ASCII = re.compile(r"[^\0-\x7f]+")
_SAFE = "!$%&()*+,/:;=?@[\\]^`{|}~"  # stays in a query as it is


def name_of(label: str) -> str | None:
    """The name that the encoding standard has for a label; None if it is unknown."""
    encoding = webencodings.lookup(label) if label.isascii() else None
    return encoding.name if encoding else None


@cache
def _patches(encoding: str) -> dict[bytes, str]:
    """The characters of the codes that Python's codec has no characters for, or others."""
    found = {}
    for digits, chars in re.findall("([0-9a-f]+)([^ 0-9a-f]+)", _PATCHES.get(encoding, "")):
        code = bytes.fromhex(digits)
        for char in chars:
            found[code] = char
            code = code[:-1] + (b"\xa1" if code[-1] == 0x7E else bytes([(code[-1] + 1) % 256]))
    return found


@cache
def _misread(encoding: str) -> dict[int, str]:
    """The characters that Python's codec has for codes of others."""
    found = {}
    for code, char in _patches(encoding).items():
        with contextlib.suppress(UnicodeDecodeError):
            if code not in _SHARED.get(encoding, ()):
                found[ord(code.decode(_CODECS[encoding]))] = char
    return found


@cache
def _table(encoding: str) -> str:
    """The characters of the 256 bytes of a single-byte encoding."""
    patches, known = _patches(encoding), webencodings.lookup(encoding)
    assert known
    decode = known.codec_info.decode
    table = [patches.get(byte) or decode(byte, "replace")[0] for byte in (bytes([code]) for code in range(256))]
    return "".join(chr(i) if char == "\ufffd" and i < 0xA0 else char for i, char in enumerate(table))


def _jis(lead: int, trail: int) -> bytes:
    """The code in Shift_JIS of one in EUC-JP."""
    lead, trail = divmod((lead - 0xA1) * 94 + trail - 0xA1, 188)
    return bytes([lead + (0x81 if lead < 31 else 0xC1), trail + (0x40 if trail < 63 else 0x41)])


@lru_cache(1 << 15)
def _character(encoding: str, code: bytes) -> bytes:
    """What bytes that `_CODES` found stand for, in UTF-8."""
    try:
        if char := _patches(encoding).get(code):
            return char.encode()
        if encoding == "euc-jp" and len(code) == 2 and min(code) >= 0xA1 and code[1] != 0xFF:
            return _jis(*code).decode("cp932").encode()  # which has those of NEC and IBM, too
        return code.decode(_CODECS[encoding]).encode()
    except UnicodeDecodeError:  # the ASCII at its end is not part of it
        again = (code[2:] if len(code) == 3 else code[1:]) if code[-1] < 0x80 else b""
        return "\ufffd".encode() + _decode_codes(encoding, again)


def _decode_codes(encoding: str, body: bytes) -> bytes:
    return _CODES[encoding].sub(lambda code: _character(encoding, code[0]), body)


def _decode_2022(body: bytes) -> bytes:
    """ISO-2022-JP in UTF-8."""
    parts = _ESCAPE_2022.split(body)
    found = []
    for state, text in zip([b"(B", *parts[1::2]], parts[::2], strict=True):
        if table := _TABLES_2022.get(state):
            found.append(codecs.charmap_decode(text, "strict", table)[0].encode())
        else:
            high = [bytes(byte | 0x80 for byte in code) for code in _KANJI_2022.findall(text)]
            found.append(b"".join(_character("euc-jp", code if len(code) == 2 else b"\xff") for code in high))
        if not text and 1 < len(found) < len(parts[::2]):
            found.append("\ufffd".encode())  # an escape right after another
    return b"".join(found)


def transcode(body: bytes, encoding: str) -> bytes:
    """The page in UTF-8, without BOM.  What is invalid in UTF-8 itself stays, to be replaced when it is decoded."""
    encoding = "gb18030" if encoding == "gbk" else encoding
    if encoding == "utf-8":
        return body.removeprefix(b"\xef\xbb\xbf")
    if encoding in _CODECS:
        try:
            text = body.decode(_CODECS[encoding])
        except UnicodeDecodeError:
            return _decode_codes(encoding, body)
        if any(code in body for code in _SHARED.get(encoding, ())):
            return _decode_codes(encoding, body)
        misread = _misread(encoding)
        return (text.translate(misread) if any(chr(code) in text for code in misread) else text).encode()
    if encoding == "iso-2022-jp":
        return _decode_2022(body)
    if encoding == "replacement":
        return "\ufffd".encode() if body else b""
    if encoding.startswith("utf-16"):
        return webencodings.decode(body, encoding, "replace")[0].encode("utf-8", "replace")
    return codecs.charmap_decode(body, "strict", _table(encoding))[0].encode()


@cache
def _euc_codes() -> dict[str, bytes]:
    """The codes of the characters of JIS X 0208 in EUC-JP."""
    codes = [bytes([lead, trail]) for lead in range(0xFE, 0xA0, -1) for trail in range(0xFE, 0xA0, -1)]
    return {_jis(*code).decode("cp932", "replace"): code for code in codes}


@lru_cache(4096)
def _encode(encoding: str, char: str) -> bytes:
    """The bytes that a query has for a character outside ASCII; b"" if the encoding has none. Those of ISO-2022-JP are
    without the escapes around them."""
    family = "gb18030" if encoding == "gbk" else encoding
    if encoding == "iso-2022-jp":
        return bytes(byte & 0x7F for byte in _euc_codes().get(char, b""))
    if family not in _CODECS:
        return bytes([code]) if (code := _table(encoding).find(char)) >= 0 else b""
    if encoding == "gbk" and char == "€":
        return b"\x80"
    if family in ("shift_jis", "euc-jp"):
        char = {"¥": "\\", "‾": "~", "−": "－"}.get(char, char)
    patched = {patch: code for code, patch in _patches(family).items() if len(code) > 1}
    known = _euc_codes() if family == "euc-jp" else patched
    found = known.get(char) or char.encode(_CODECS[family], "ignore")
    unused = (family == "big5" and b"\x80" < found < b"\xa1") or (len(found) > 2 and encoding != "gb18030")
    return b"" if unused or transcode(found, encoding).decode() != char else found


def escape_query(query: str, encoding: str) -> str:
    """A query with what is not ASCII percent-encoded in the document's encoding (URL standard, "percent-encode after
    encoding"); a character that this does not have becomes its reference, "&#8364;"."""

    def escape(run: re.Match[str]) -> str:
        parts = []
        for known, chars in itertools.groupby(run[0], lambda char: _encode(encoding, char) != b""):
            if known:
                code = b"".join(_encode(encoding, char) for char in chars)
                code = b"\x1b$B" + code + b"\x1b(B" if encoding == "iso-2022-jp" else code
                parts.append(urllib.parse.quote_from_bytes(code, _SAFE))
            else:
                parts += [f"%26%23{ord(char)}%3B" for char in chars]
        return "".join(parts)

    return _NOT_ASCII.sub(escape, query)
