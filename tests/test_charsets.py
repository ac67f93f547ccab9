"""charsets.py: what bytes mean by the encoding standard. The digests are those of its tables (index-*.txt), read by a
decoder that was written from its text."""

from __future__ import annotations

import hashlib

import pytest

from charsets import escape_query, name_of, transcode


def decode(encoding: str, body: bytes) -> str:
    return transcode(body, encoding).decode()


DIGESTS = {
    "shift_jis": "83ba0ca88eb6db4d",
    "euc-kr": "d630c8add3dc5057",
    "big5": "a480b91e471b817b",
    "euc-jp": "02ebd2168d50e5fc",
    "gbk": "e6bf4aa9fc799144",
    "ibm866": "3c8cc5cb485f93d2",
    "iso-8859-10": "282514fbd01219c4",
    "iso-8859-13": "4426f6d2f1b025cd",
    "iso-8859-14": "f03afb7e01e66cac",
    "iso-8859-15": "9b58b26dbd8fbff2",
    "iso-8859-16": "2de1faef4dc524c9",
    "iso-8859-2": "a5871b0f978b840b",
    "iso-8859-3": "e83895f2b7d7b82b",
    "iso-8859-4": "449076e20ebf45eb",
    "iso-8859-5": "9f31ddc0f7444afa",
    "iso-8859-6": "beba4e6cf97dce83",
    "iso-8859-7": "71069977a6798ab7",
    "iso-8859-8": "b43535e7aaeb7bcf",
    "koi8-r": "fb0243455e64ef70",
    "koi8-u": "896c218aaf12ca1b",
    "macintosh": "54112bce885d7b1a",
    "windows-1250": "03772ed2e875bd12",
    "windows-1251": "b16600cf4e6d1a2d",
    "windows-1252": "cc916e51644a12e8",
    "windows-1253": "e4570135cbc6e3d5",
    "windows-1254": "4a8e99647c3e28e6",
    "windows-1255": "870c5c5e687fabcd",
    "windows-1256": "6f6e8626197b1b6b",
    "windows-1257": "d19a4e888879e36a",
    "windows-1258": "e79b48db126bc71d",
    "windows-874": "6a2c7940c3d68216",
    "x-mac-cyrillic": "784db55e1c90195e",
}


@pytest.mark.parametrize("encoding", DIGESTS)
def test_every_code_is_the_character_of_the_standard(encoding: str) -> None:
    if encoding in ("big5", "euc-jp", "euc-kr", "gbk", "shift_jis"):
        codes = [bytes([lead, trail]) for lead in range(0x81, 0xFF) for trail in range(0x40, 0xFF)]
        text = b"\n".join(codes) + b"\n"
    else:
        text = bytes(range(256))
    assert hashlib.sha256(decode(encoding, text).encode()).hexdigest()[:16] == DIGESTS[encoding]


@pytest.mark.parametrize(
    ("encoding", "body", "text"),
    [
        ("gbk", b"\x80 \x81\x30\x81\x30 \xa6\xd9", "€ \x80 ︐"),
        ("gb18030", b"\x84\x31\xa4\x37\x90\x30\x81\x30\x81\x35\xf4\x37", "\ufffd\U00010000\ue7c7"),
        ("gb18030", b"\x81<a> \x81\x30<", "\ufffd<a> \ufffd0<"),
        ("gbk", b"\xff\x80", "\ufffd€"),
        ("euc-jp", b"\xad\xa1\xad\xea \x8e\xb1 \x8f\xb0\xa1 \x8f\xa2\xb7\xa1\xc1", "①㈱ ｱ 丂 ～～"),
        ("euc-jp", b"\xa4<b>\xa4\xa2\x8f\xa4<\x8f\x8e.", "\ufffd<b>あ\ufffd<\ufffd."),
        ("iso-2022-jp", b"a\x1b$B-!-j\x1b(J\\~\x1b(I1\x1b(Bz", "a①㈱¥‾ｱz"),
        ("iso-2022-jp", b"\x1b$B$\x1b(B<\x1b(B\x1b(B\x1b$x\x80", "\ufffd<\ufffd\ufffd$x\ufffd"),
        ("shift_jis", b"\x87\x40\x81<\xa0\xb1\x80\xfd", "①\ufffd<\ufffdｱ\x80\ufffd"),
        ("big5", b"\x87\x7a\x88\x62\xa1\x45\xa2\x41\xa1\xfe\x88<", "㡵Ê̄‧∕／\ufffd<"),
        ("euc-kr", b"\x81\x41\xb0\xa1\xb0<", "갂가\ufffd<"),
        ("koi8-u", b"\xae\xbe", "ўЎ"),
        ("windows-1255", b"\xca\x81\xd9", "\u05ba\x81\ufffd"),
        ("windows-874", b"\x80\x81\xdb", "€\x81\ufffd"),
        ("x-user-defined", b"a\x80\xff", "a\uf780\uf7ff"),
        ("replacement", b"abc", "\ufffd"),
        ("replacement", b"", ""),
        ("utf-16le", b"a\0\0\xd8", "a\ufffd"),
        ("utf-8", b"\xef\xbb\xbfa", "a"),
    ],
)
def test_what_bytes_stand_for(encoding: str, body: bytes, text: str) -> None:
    assert decode(encoding, body) == text


@pytest.mark.parametrize(
    ("encoding", "query", "escaped"),
    [
        ("windows-1251", "q=да€ü", "q=%E4%E0%88%26%23252%3B"),
        ("gbk", "€日𠀀", "%80%C8%D5%26%23131072%3B"),
        ("gb18030", "€𠀀", "%A2%E3%952%826"),
        ("euc-jp", "日①ü¥", "%C6%FC%AD%A1%26%23252%3B\\"),
        ("shift_jis", "表¢", "%95\\%26%23162%3B"),
        ("big5", "‧䏰", "%A1E%26%2317392%3B"),
        ("iso-2022-jp", "日a①ü", "%1B$BF|%1B(Ba%1B$B-!%1B(B%26%23252%3B"),
        ("euc-kr", "가", "%B0%A1"),
        ("windows-1252", "ok", "ok"),
    ],
)
def test_queries_in_the_encoding_of_their_page(encoding: str, query: str, escaped: str) -> None:
    assert escape_query(query, encoding) == escaped


def test_labels_are_those_of_the_standard() -> None:
    labels = {
        " UTF8\n": "utf-8",
        "latin1": "windows-1252",
        "gb2312": "gbk",
        "x-sjis": "shift_jis",
        "ks_c_5601-1987": "euc-kr",
        "hz-gb-2312": "replacement",
    }
    assert {label: name_of(label) for label in labels} == labels
    assert name_of("\u212aoi8-r") is name_of("nonsense") is None
