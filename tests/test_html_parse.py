"""html_parse.py: bytes to pages."""

from __future__ import annotations

import html
import pickle
import string
from html.parser import HTMLParser
from typing import Any

import ada_url
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import html_parse
from html_parse import Page, parse_page, read_refresh

URL = "http://site.example/dir/page.html?q=1#top"


def html_page(markup: str, content_type: str | None = "text/html; charset=utf-8", url: str = URL) -> Page:
    return parse_page(markup.encode(), url, content_type)


# ------------------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize(
    ("body", "content_type", "encoding", "title"),
    [
        # 1. a byte order mark wins over everything
        (b"\xef\xbb\xbf<title>\xc3\xa9</title>", "text/html; charset=koi8-r", "utf-8", "é"),
        ("\ufeff<title>é</title>".encode("utf-16-le"), "text/html; charset=utf-8", "utf-16le", "é"),
        ("\ufeff<title>é</title>".encode("utf-16-be"), None, "utf-16be", "é"),
        # 2. the header, by any label the encoding standard knows
        (b"<meta charset=utf-8><title>\xe9</title>", "text/html; charset=iso-8859-1", "windows-1252", "é"),
        (b"<title>\x80</title>", "text/html;charset=ASCII", "windows-1252", "€"),
        (b"<title>\xc3\xa9</title>", 'TEXT/HTML; x=y; CHARSET = "UTF8"', "utf-8", "é"),
        (b"<title>\xc3\xa9</title>", "text/html; charset=' utf-8 '", "utf-8", "é"),
        ("<title>日本</title>".encode("shift_jis"), "text/html; charset=x-sjis", "shift_jis", "日本"),
        ("<title>中文</title>".encode("gbk"), "text/html; charset=gb2312", "gbk", "中文"),
        ("<title>é</title>".encode("utf-16-le"), "text/html; charset=utf-16", "utf-16le", "é"),
        # 3. <meta>, where the header says nothing or nothing known
        (b"<meta charset=koi8-r><title>\xc1</title>", "text/html", "koi8-r", "а"),
        (b"<META CHARSET='koi8-r'><title>\xc1</title>", "text/html; charset=nonsense", "koi8-r", "а"),
        (
            b'<meta http-equiv="Content-Type" content="text/html; charset=koi8-r"><title>\xc1</title>',
            "text/html; charset=",
            "koi8-r",
            "а",
        ),
        (b'<meta content="text/html; charset=koi8-r" http-equiv=CONTENT-TYPE><title>\xc1</title>', None, "koi8-r", "а"),
        (b"<meta charset=bogus><meta charset=koi8-r><title>\xc1</title>", None, "koi8-r", "а"),
        (b"<meta charset=utf-16><title>\xc3\xa9</title>", None, "utf-8", "é"),
        (b"<meta charset=x-user-defined><title>\xe9</title>", None, "windows-1252", "é"),
        (b'<meta content="text/html; charset=koi8-r"><title>\xe9</title>', None, "windows-1252", "é"),
        (b'<meta name=x content="charset=koi8-r"><title>\xe9</title>', None, "windows-1252", "é"),
        (b"<!-- <meta charset=koi8-r> --><title>\xe9</title>", None, "windows-1252", "é"),
        (b"<meta charset=koi8-r", None, "utf-8", None),
        (b" " * 1005 + b"<meta charset=koi8-r><title>\xc1</title>", None, "koi8-r", "а"),
        (b" " * 1005 + b"<meta charset=koi8-r><title>\xc3\xa9</title>", None, "utf-8", "é"),
        (b"<script>" + b"x" * 9000 + b"</script><META CHARSET=koi8-r><title>\xc1</title>", None, "koi8-r", "а"),
        (b"<!--" + b"x" * 2000 + b"<meta charset=koi8-r>--><title>\xe9</title>", None, "windows-1252", "é"),
        (b" " * 1000 + b"<meta charset=koi8-r><title>\xc1</title>", None, "koi8-r", "а"),
        # the XML declaration, where no <meta> says another
        (b'<?xml version="1.0" encoding="iso-8859-2"?><title>\xb1</title>', None, "iso-8859-2", "ą"),
        (b"<?xml version='1.0' encoding = 'utf-16'?><title>\xc3\xa9</title>", None, "utf-8", "é"),
        (b'<?xml encoding="koi8-r"?><meta charset=iso-8859-2><title>\xb1</title>', "text/html", "iso-8859-2", "ą"),
        (b'<?xml encoding="koi8-r"?><title>\xe9</title>', "text/html; charset=latin1", "windows-1252", "é"),
        (b' <?xml encoding="koi8-r"?><title>\xe9</title>', None, "windows-1252", "é"),
        ("<?xml?><title>é</title>".encode("utf-16-le"), None, "utf-16le", "é"),
        ("<?xml?><title>é</title>".encode("utf-16-be"), None, "utf-16be", "é"),
        # 4. UTF-8 if it is valid, else windows-1252
        (b"<title>\xc3\xa9</title>", None, "utf-8", "é"),
        (b"<title>\xe9\x93</title>", None, "windows-1252", "é“"),
        (b"", None, "utf-8", None),
        # labels that no header should have; bytes that the encoding does not have
        (b"<title>a</title>", "text/html; charset=\udcff\udcfe", "utf-8", "a"),
        (b"<title>a</title>", "text/html; charset=\u212aoi8-r", "utf-8", "a"),
        (b"<title>a\xff\xc3b</title>", "text/html; charset=utf-8", "utf-8", "a\ufffd\ufffdb"),
        (b"<title>\x81</title>", "text/html; charset=shift_jis", "shift_jis", "\ufffd"),
    ],
)
def test_encoding(body: bytes, content_type: str | None, encoding: str, title: str | None) -> None:
    page = parse_page(body, URL, content_type)
    assert (page.encoding, page.title) == (encoding, title)


def test_queries_are_in_the_encoding_of_the_page_and_paths_in_utf_8() -> None:
    page = parse_page(
        '<a href="/да?q=да&x=€#да">1</a><a href=?ö>'.encode("cp1251", "xmlcharrefreplace"),
        "http://a/",
        "; charset=cp1251",
    )
    assert page.links == ["http://a/%D0%B4%D0%B0?q=%E4%E0&x=%88", "http://a/?%26%23246%3B"]
    assert parse_page("<a href=?да>".encode("utf-16"), "http://a/").links == ["http://a/?%D0%B4%D0%B0"]


# --------------------------------------------------------------------------------------------------------------- title


@pytest.mark.parametrize(
    ("markup", "title"),
    [
        ("<title>Plain</title>", "Plain"),
        ("<TITLE lang=en>\n  A \t B\u00a0 C\r\n</TiTlE >", "A B C"),
        (
            "<title>Fish &amp; Chips &#8212; &eacute;t&eacute; &copy2025 &nosuch;</title>",
            "Fish & Chips — été ©2025 &nosuch;",
        ),
        ("<title>a <b>bold</b> <!-- claim --></title>", "a <b>bold</b> <!-- claim -->"),
        ("<title>first</title><title>second</title>", "first"),
        ("<title> </title><title>second</title>", None),
        ("", None),
        ("<p>no title</p>", None),
        ("<title>cut off by the end", "cut off by the end"),
        ("<title>cut off</titl", "cut off</titl"),
        ("<title>x</titles></title>", "x</titles>"),
        ('<title data-x="a>b">q</title>', "q"),
        ("<titles>no</titles>", None),
        ("<!-- <title>comment</title> --><title>real</title>", "real"),
        ("<script>'<title>script</title>'</script><title>real</title>", "real"),
        ("<script><!-- <script> <title>x</title> </script> --></script><title>real</title>", "real"),
        ("<style><title>style</title></style><title>real</title>", "real"),
        ("<textarea><title>area</title></textarea><title>real</title>", "real"),
        ("<noscript><title>noscript</title></noscript><title>real</title>", "real"),
        ("<template><title>template</title></template><title>real</title>", "real"),
        ("<template><template></template><title>no</title></template><title>real</title>", "real"),
        ("<svg><title>icon</title></svg><title>real</title>", "real"),
        ("<svg><title>icon</title></svg>", None),
        ("<svg><title/></svg><title>real</title>", "real"),
        ("<svg/><title>real</title>", "real"),
        ("<svg><!-- </svg> --><title>icon</title></svg><title>real</title>", "real"),
        ("<body><p>x</p><title>late</title>", "late"),
        ("<title>a\0b</title>", "a\ufffdb"),
        ("<title>&#" + "9" * 5000 + ";&#" + "0" * 5000 + "65;&#0;</title>", "\ufffdA\ufffd"),
    ],
)
def test_title(markup: str, title: str | None) -> None:
    assert html_page(markup).title == title


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    ("markup", "links"),
    [
        ('<a href="/x">', ["http://site.example/x"]),
        ('<a href="x">', ["http://site.example/dir/x"]),
        ('<a href="../x/./y/../z">', ["http://site.example/x/z"]),
        ('<a href="?p=2">', ["http://site.example/dir/page.html?p=2"]),
        ('<a href="//other.example/x">', ["http://other.example/x"]),
        ('<a href="https://Other.Example">', ["https://other.example/"]),
        ('<a href="HTTP://other.example:80/%7ea b">', ["http://other.example/%7ea%20b"]),
        ('<a href="http://127.1:8080/x">', ["http://127.0.0.1:8080/x"]),
        ('<a href="/é?ü=ö">', ["http://site.example/%C3%A9?%C3%BC=%C3%B6"]),
        ('<a href="#part">', ["http://site.example/dir/page.html?q=1"]),
        ('<a href="">', ["http://site.example/dir/page.html?q=1"]),
        ("<a href>", ["http://site.example/dir/page.html?q=1"]),
        (
            '<a href="/x#a"><a href="/x#b"><a href="/y"><a href="/x">',
            ["http://site.example/x", "http://site.example/y"],
        ),
        ("<a href='/1'><a href=\"/2\"><a href='/1'><a href=/3>", [f"http://site.example/{n}" for n in (1, 2, 3)]),
        (
            '<a href="javascript:void(0)"><a href="mailto:a@b.example"><a href="tel:1"><a href="data:,x"><a href="ftp://h/">',
            [],
        ),
        (
            '<a href="http://"><a href="http://a b/"><a href="http://[1/"><a href="https://h%20h/"><a href="/ok">',
            ["http://site.example/ok"],
        ),
        ('<A HREF="/up">', ["http://site.example/up"]),
        ("<a href=/bare class=x>", ["http://site.example/bare"]),
        ("<a href=/bare/>", ["http://site.example/bare/"]),
        ("<a href='/single' title='a > b'>", ["http://site.example/single"]),
        ('<a title="a > b" href="/q">', ["http://site.example/q"]),
        ('<a\nhref = "/spaced"\n>', ["http://site.example/spaced"]),
        ("<a/href=/slash>", ["http://site.example/slash"]),
        ('<a href="/typo"">', ["http://site.example/typo"]),
        ('<a href="/near"class="x">', ["http://site.example/near"]),
        ('<a href="/first" href="/second">', ["http://site.example/first"]),
        ("<a HREF='/first' href='/second'>", ["http://site.example/first"]),
        ('<a data-href="/no" hreflang="de" rel="me" href="/yes">', ["http://site.example/yes"]),
        ('<a href=" /tri\n\tm ">', ["http://site.example/trim"]),
        ('<a href="/?a=1&amp;b=2">', ["http://site.example/?a=1&b=2"]),
        ('<a href="/?a=1&b=2&copy=3&reg;">', ["http://site.example/?a=1&b=2&copy=3%C2%AE"]),
        ("<a href='/?a=1&amp;copy=2&notit;&lt'>", ["http://site.example/?a=1&copy=2&notit;%3C"]),
        ('<a href="&#47;&#x78;">', ["http://site.example/x"]),
        ('<a name="anchor"><a><a class=x><abbr href="/no"><area href="/no"><link href="/no">', []),
        ('<!-- <a href="/no"> --><a href="/yes">', ["http://site.example/yes"]),
        ('<!--><a href="/yes">-->', ["http://site.example/yes"]),
        ('<!-- --!><a href="/yes">', ["http://site.example/yes"]),
        ("<script>s = '<a href=\"/no\">'</script><style><a href='/no'></style>", []),
        ("<textarea><a href='/no'></textarea><iframe><a href='/no'></iframe><xmp><a href='/no'></xmp>", []),
        ("<div title='<a href=\"/no\">' data-x=\"<a href='/no'>\"><a href=/yes>", ["http://site.example/yes"]),
        ("<template><a href=/no><a href='/no2'></template><a href=/yes>", ["http://site.example/yes"]),
        ("<noscript><a href=/yes></noscript>", ["http://site.example/yes"]),
        (
            "<svg><a href='/icon'><path d='M0'/></a><style/><a href=/more></a></svg>",
            ["http://site.example/icon", "http://site.example/more"],
        ),
        ("<plaintext><a href=/no>", []),
        ('<a href="/yes"><a href="/cut', ["http://site.example/yes"]),
        ('<p>1 < 2 <a href="/yes">', ["http://site.example/yes"]),
    ],
)
def test_links(markup: str, links: list[str]) -> None:
    assert html_page(markup).links == links


@pytest.mark.parametrize(
    ("markup", "links"),
    [
        ('<a href="x"><base href="/b/"><base href="/c/">', ["http://site.example/b/x"]),
        ('<base target=_top><base href="https://cdn.example/b/c"><a href="x">', ["https://cdn.example/b/x"]),
        ('<base href=""><a href="x">', ["http://site.example/dir/x"]),
        ('<base href="http://[bad/"><a href="x">', ["http://site.example/dir/x"]),
        ('<base href="data:,x"><a href="x">', ["http://site.example/dir/x"]),
        ('<!-- <base href="/b/"> --><template><base href="/b/"></template><a href="x">', ["http://site.example/dir/x"]),
        ('<base href="/a?b/c#d/e"><a href="x"><a href="#f">', ["http://site.example/x", "http://site.example/a?b/c"]),
    ],
)
def test_base(markup: str, links: list[str]) -> None:
    assert html_page(markup).links == links


def test_url_of_the_page_may_be_anything() -> None:
    for url in ("", "nonsense", "file:///x", "about:blank", "http://", "\ud800"):
        assert html_page('<a href="/x"><a href="http://h.example/y">', url=url).links == ["http://h.example/y"]
    assert html_page('<a href="x">', url="HTTP://User@Site.example:80").links == ["http://User@site.example/x"]


def test_nofollow_is_what_no_anchor_follows() -> None:
    page = html_page(
        '<a rel="nofollow" href="/1"><a href="/2" rel="NoFollow noopener"><a rel=nofollow href="/3"><a href="/3#x">'
        "<a rel='nofollow' href='/4'><a href='/4'><a href=\"/5\" rel=\"nofollowing\"><a href=/6 rel='ugc nofollow'>"
        '<template><a href="/1"></template><a rel="nofollow" href="mailto:x">'
    )
    assert page.links == [f"http://site.example/{n}" for n in range(1, 7)]
    assert page.nofollow == {f"http://site.example/{n}" for n in (1, 2, 6)}


# ------------------------------------------------------------------------------------------------------ words and text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("", ""),
        ("one two  three\n four", "one two three four"),
        ("foo<b>bar</b>baz", "foo bar baz"),
        ("a<!-- comment -->b", "a b"),
        ("<title>not this</title><p>but this", "but this"),
        ("<body><p>x</p><title>in the body</title>", "x\nin the body"),
        ("a&nbsp;b&nbspc&#160;d&#xA0;e&ensp;f&Tab;g&#32;h", "a b c d e f g h"),
        ("a\u00a0b\u2003c\u3000d\x1ce\u0085f", "a b c d e f"),
        ("a\u200bb &#8203; &shy; &#133;", "a\u200bb \u200b \u00ad …"),
        ("&lt;p&gt; &amp;nbsp; R&D &copy2025", "<p> &nbsp; R&D ©2025"),
        ("1 < 2 <3 a<", "1 < 2 <3 a<"),
        ("a</>b", "a b"),
        ("x <?php echo 1 ?> y <!doctype z> <![CDATA[ w ]]>", "x y"),
        (
            "a <script>b</script> c <style>d</style> e <noscript>f <b>g</b></noscript> h <template>i</template> j",
            "a c e h j",
        ),
        ("<noscript>a<noscript>b</noscript>c</noscript>d", "d"),
        ("<SCRIPT>a</script >b", "b"),
        ("<script>a</scripty></script>b", "b"),
        ("<script><!-- <script> </script> c --></script> d", "d"),
        ("<script><!-- </script> d", "d"),
        ("<script><!--><script></script> d", "d"),
        ("a<script>b", "a"),
        ("a<!-- b", "a"),
        ('a<b title="b', "a"),
        ("</noscript></template>a", "a"),
        ("<textarea>a&nbsp;b <i>c</i></textarea>", "a b <i>c</i>"),
        ("<iframe>a&nbsp;b <i>c</i></iframe>d", "a&nbsp;b <i>c</i> d"),
        ("<xmp>a <b></xmp><noembed>c <d></noembed>", "a <b> c <d>"),
        ("<plaintext>a </plaintext> <b>", "a </plaintext> <b>"),
        ("<body><noframes>a</noframes>b", "a b"),
        ("<frameset><frame src=x><noframes>a b</noframes></frameset>", ""),
        ("<p>a<frameset>b", "a b"),
        ("<select><option>a<option>b</select>", "a\nb"),
        ("<svg><title>a</title><text>b</text><style>c</style><script>d</script><style/>e</svg>f", "a b e f"),
        ("<p>a</p><p>b <i>c</i></p>d<br>e<ul><li>f<li>g</ul><table><tr><td>h<td>i", "a\nb c\nd\ne\nf\ng\nh i"),
        ("a\nb<div>c\n\nd</div>", "a b\nc d"),
        ("<div title=\"x > y\">a</div><div title='>'>b</div><div title=>>c", "a\nb\n>c"),
    ],
)
def test_words(markup: str, text: str) -> None:
    page = html_page(markup)
    assert page.text == text
    assert page.word_count == len(text.split())


def test_text_is_made_when_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scans: list[bytes] = []

    class Counted(html_parse._Scan):
        def __init__(self, page: bytes, *, blocks: bool = False) -> None:
            scans.append(page)
            super().__init__(page, blocks=blocks)

    monkeypatch.setattr(html_parse, "_Scan", Counted)
    body = b"<p>caf\xe9"
    page = parse_page(body, URL)
    assert page._body is body
    assert len(scans) == 1
    assert page.text == "café"
    assert page.text is page.text
    assert len(scans) == 2
    assert page._body == b""


def test_page_compares_and_pickles() -> None:
    page = html_page("<title>t</title><a href=x rel=nofollow>y z")
    copy = pickle.loads(pickle.dumps(page))
    assert copy == page
    assert copy.text == page.text == "y z"
    assert "y z" not in repr(page)


# ------------------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize(
    ("content", "refresh"),
    [
        ("0; url=home.html", (0, "home.html")), ("5", None), ("", None), ("x;url=y", None), (".5,'a b'c", (0, "a b")),
        (' 3.7 URL = "q"', (3, "q")), ("1;/z", (1, "/z")), ("0;url=", None), ("0;URL=url", (0, "url")),
        ("1url=x", None),
        ("0;" + " " * 9000, None), ("9" * 50 + ";x", (999999999, "x")),
    ],
)  # fmt: skip
def test_refresh(content: str, refresh: tuple[float, str] | None) -> None:
    assert read_refresh(content) == refresh


def test_frames_areas_and_refresh() -> None:
    page = html_page(
        "<map><area href=a><area><area href=b rel=nofollow></map><iframe src=c><a href=no></iframe><template>"
        "<frame src=no><meta http-equiv=refresh content='0;no'></template>"
        "<noscript><meta http-equiv=refresh content='0;no'></noscript>"
        "<META content='2;URL=d#e' HTTP-EQUIV=' refresh'><frameset><frame src=a\0>"
    )
    urls = [f"http://site.example/dir/{name}" for name in ("a", "c", "a%EF%BF%BD")]
    assert (page.frames, page.links, page.refresh) == (urls, [], (2, "http://site.example/dir/d"))
    assert not page.frameset
    assert html_page("<frameset><frame src=a></frameset><noframes>x</noframes>").frameset


def test_metadata() -> None:
    page = html_page(
        """<!DOCTYPE html><HTML class=no-js LANG=" de-AT "><head>
        <meta property="og:description" content="not this">
        <META NAME="Description" CONTENT="  Fish &amp;
            chips ">
        <meta name=description content="nor that">
        <meta name=robots content="NoIndex, nofollow,"><meta name='ROBOTS' content='max-snippet:10'>
        <meta name="googlebot-robots" content="none">
        <link rel="shortcut Canonical" href="/c?x=1&amp;y=2#z"><link rel=canonical href=/later>
        <link rel=alternate type="application/rss+xml" title="RSS" href="/rss">
        <link type='Application/Atom+XML' rel='alternate home' href='atom'>
        <link rel="alternate" type="application/feed+json" href="https://feeds.example/json">
        <link rel=alternate type="application/rss+xml" href="/rss">
        <link rel=alternate type="application/rss+xml" href="mailto:x"><link rel=alternate type="application/rss+xml">
        <link rel="alternate" hreflang="en" href="/en"><link rel=stylesheet href=s.css>
        <template><meta name=description content=no></template>
        </head><body><html lang=fr>"""
    )
    assert page.language == "de-AT"
    assert page.description == "Fish & chips"
    assert page.robots == ("noindex", "nofollow", "max-snippet:10")
    assert page.canonical == "http://site.example/c?x=1&y=2"
    assert page.feeds == ["http://site.example/rss", "http://site.example/dir/atom"]
    assert page.links == []


def test_metadata_absent() -> None:
    page = html_page('<html lang=""><meta name=description content=" "><link rel=canonical href="javascript:x">')
    assert (page.language, page.description, page.canonical) == (None, None, None)
    assert (page.robots, page.feeds, page.nofollow, page.encoding) == ((), [], frozenset(), "utf-8")


# -------------------------------------------------------------------------------------------------- whatever the bytes


def units(*lines: str) -> list[str]:
    """What stands between the bars."""
    return [unit for line in lines for unit in line.split("|")]


FRAGMENTS = units(
    '<a href=/1>|<a href=\'/2\'>|<a href="/3#x">|<A HREF = /4>|<a href="?&amp;&copy=&#1114112;">|</a>',
    "<a rel=nofollow href=5>",
    "word |x|é|日本|\u00a0|\u3000| |\n|<b>|</b>|<p>|</p>|<br/>|<div title='>'>|<div title=\"<a href=no>\">|</div>",
    "<!--|-->|--!>|<!-->|<!|<?|</|</>|<|>|\"|'|=|/|-|&|&#|&#x|;|&nbsp;|&nbsp|&amp;|&lt|&#160;|&#99999999999;|\x00|<plaintext>",
    "<script>|</script>|<script/>|<style>|</style>|<title>|</title>|<textarea>|</textarea>|<xmp>|</xmp>|<iframe>|</iframe>",
    "<noembed>|</noembed>|<noframes>|</noframes>|<noscript>|</noscript>|<template>|</template>|<svg>|</svg>|<svg/>|<select>",
    "<html lang=x>|<head>|<body>|<frameset>|<base href=/b/>|<meta name=robots content=none>|<meta charset=koi8-r>",
    "<link rel=canonical href=c>|<link rel=alternate type=application/rss+xml href=f>|<![CDATA[|]]>|<math>|<table>",
)


def check_invariants(page: Page) -> None:
    assert len(set(page.links)) == len(page.links)
    assert page.nofollow <= set(page.links)
    for url in [*page.links, *page.feeds, *([page.canonical] if page.canonical else [])]:
        assert url.startswith(("http://", "https://"))
        assert "#" not in url
        assert ada_url.normalize_url(url) == url
    assert page.title is None or page.title == " ".join(page.title.split()) != ""
    assert len(page.text.split()) == page.word_count


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.none() | st.text(max_size=40), st.text(max_size=30))
def test_any_bytes(body: bytes, content_type: str | None, url: str) -> None:
    parse_page(body, url, content_type)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
@example("<svg><svg></svg><title>x</svg><a href=/1>")
@example("<template><noscript></template>x</noscript>y")
def test_any_soup(markup: str) -> None:
    check_invariants(html_page(markup))
    check_invariants(html_page(markup, content_type=None))


def test_long_soup_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pieces end is not to be seen in the result."""
    markup = "<p title='a > b'>one &amp; two <a href=/{0}>three</a> <script>'<a href=/no>' + '</p>'</script></p>\n"
    markup += (
        "<!-- </p> {0} --> <svg><title>four </title><style/><!-- </svg> --></svg> <textarea> </p> five </textarea>\n"
    )
    markup += "<noscript> </p> six <a href='/n{0}'>x</a></noscript> <template> <a href=/no> </p> seven </template>\n"
    markup = "".join(markup.format(i) for i in range(20))
    whole = html_page(markup)
    whole_text = whole.text
    assert (len(whole.links), whole.word_count) == (40, 20 * 7)
    for size in (2, 10, 50, 100, 333, 1000):
        monkeypatch.setattr(html_parse, "_PIECE", size)
        pieces = html_page(markup)
        assert pieces == whole
        assert pieces.text == whole_text


# ------------------------------------------------------------------------------------------------------- hostile pages

HOSTILE = units(
    "<|</|</a|<a|<a |<a href=\"|<a href='x|<a x=\"'|<a b=='|<!--|<!-- -|<!--<|<!-|<!|<?|-->|<script>|<script></script>",
    "<script><!--|<script><!--<script>|<style>|<title>|<title></title>|<textarea>|<xmp>x</xmp>|<iframe>|<plaintext>|<svg>",
    "<svg>x</svg>|<svg><svg></svg>|<svg><title>|<svg><!--|<svg><style>|<template>|<template></template>|<noscript>",
    "<noscript>x</noscript>|<frameset>|x<frameset>|<base>|<meta name=robots content=a>|<meta charset=",
    "<link rel=canonical>|<html>|<body>",
    "&|&#|&#x|&amp|&nbsp|<div>|</div>|<b>x|<a href=x>|<a href = 'x'>|<a =x>|<a rel=\"nofollow\" |\"|'|='|=\"",
    '<x ="| |ab |é |\x00|x|\udcff',
)


GIANTS = {
    "an attribute": b'<a title="%b" href=/x>',
    "an attribute in single quotes": b"<a title='%b' href='/x'>",
    "an href": b'<a href="/%b">',
    "a rel": b'<a rel="%b" href=/x>',
    "an unclosed attribute": b'<a title="%b>',
    "a title": b"<title>%b</title>",
    "a number": b"<title>&#%b;</title>",
    "a comment": b"<!-- %b --><a href=/x>",
    "a script": b"<script>%b</script><a href=/x>",
    "a word": b"%b",
    "a tag name": b"<a%b>",
    "a host": b'<a href="http://%b/">',
    "a description": b'<meta name=description content="%b">',
}


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_repetition_is_read_a_few_times(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is counted in bytes handed to the tokenizer, whose patterns cannot backtrack."""
    handed = 0

    class Counting:
        def __init__(self, pattern: Any) -> None:
            self.pattern = pattern

        def split(self, piece: bytes) -> list[bytes | None]:
            nonlocal handed
            handed += len(piece)
            parts: list[bytes | None] = self.pattern.split(piece)
            return parts

    tokenizer = html_parse._tokenizer
    monkeypatch.setattr(html_parse, "_tokenizer", lambda **options: Counting(tokenizer(**options)))
    monkeypatch.setattr(html_parse, "_PIECE", 500)
    for prefix in (b"", b"<p>x</p> "):
        body = prefix + unit.encode("utf-8", "surrogateescape") * (40_000 // len(unit))
        handed = 0
        page = parse_page(body, URL, "text/html; charset=utf-8")
        assert handed < 6 * len(body)
        check_invariants(page)


@pytest.mark.parametrize("what", GIANTS)
@pytest.mark.parametrize("filling", [b"x", b"9", b"<", b"&", b"' ", b"- ", b"a=b "])
def test_giant_constructs(what: str, filling: bytes) -> None:
    check_invariants(parse_page(GIANTS[what].replace(b"%b", filling * (200_000 // len(filling))), URL))


def test_deep_and_wide_pages() -> None:
    deep = html_page("<div>" * 100_000 + "x" + "</div>" * 100_000)
    assert deep.word_count == 1
    wide = html_page("".join(f'<p><a href="/{n}">word {n}</a></p>\n' for n in range(20_000)))
    assert (len(wide.links), wide.word_count) == (20_000, 40_000)
    assert wide.links[-1] == "http://site.example/19999"


# -------------------------------------------------------------------------- the fast ways give what the slow ones give

names = st.sampled_from(["href", "HREF", "rel", "class", "data-x", "xml:lang", "hidden", "title"])


values = st.text(alphabet="ab/?=&;#.:% \n'<>éamp38", max_size=12)


@st.composite
def tags(draw: st.DrawFn) -> str:
    """An <a> with attributes in any spelling."""
    tag = draw(st.sampled_from(["a", "A"]))
    for name, value in draw(st.lists(st.tuples(names, values), max_size=4)):
        bare = "".join(c for c in value if c not in " \n'<>=") or "x"
        spelling = st.sampled_from(
            [f'="{value}"', "='" + value.replace("'", "") + "'", f"={bare}", f' = "{value}"', ""]
        )
        tag += draw(st.sampled_from([" ", "\n", "  "])) + name + draw(spelling)
    return tag + draw(st.sampled_from([">", " >", " />"]))


@settings(max_examples=500, deadline=None)
@given(tags())
def test_plain_attributes_equal_those_of_html_parser(tag: str) -> None:
    plain = html_parse._plain_attributes(tag.encode())
    assert plain is None or plain == html_parse._read_attributes(tag.encode())


@settings(max_examples=500, deadline=None)
@given(tags())
def test_ordinary_anchors_equal_unusual_ones(tag: str) -> None:
    attributes = html_parse._attributes(tag.encode())
    href = attributes.get("href")
    url = html_parse._join(URL, href) if href is not None else None
    page = html_page(f"<{tag}")
    assert page.links == ([url.partition("#")[0]] if url else [])
    assert bool(page.nofollow) == (bool(page.links) and "nofollow" in attributes.get("rel", "").lower().split())


bases = st.sampled_from(
    [
        "http://h.example/",
        "http://h.example/a/b?c/d",
        "https://u:p@h.example:81/a/../b/",
        "http://127.1/%2e/x?y#z",
        "http://[::1]/a;b/c",
    ]
)


addresses = st.lists(
    st.sampled_from(
        units(
            "/|//|.|..|:|?|#|%|%2e|%2E|%41|@|;|=|&|+|~|!|$|(|)|*|,|'|\"|<|>|\\|^|`|{|}|[|]|a|b|Z|0|1|é|-|_",
            "http:|https://|http://h.example|http://H.example|http://1.2|http://0x7f.1|http://xn--a|http://h.example:80",
            "https://h.example:8080|http://a_b|http://a..b|http://u@h|http://h%41|javascript:|mailto:| |\t|\n|\u00a0",
        )
    ),
    max_size=7,
).map("".join)


@settings(max_examples=1000, deadline=None)
@given(bases, st.lists(addresses, max_size=5))
@example("http://h.example/", ["http://h.example/a/%2e%2e/b"])
@example("http://h.example/a/b", ["c/.%2e/d"])
@example("http://h.example/a/b", ["a:b"])
@example("http://h.example/a/b", ["/x #y"])
@example("http://h.example/a/b", ["http:?x"])
@example("http://h.example/a/b", ["h\ntt\tp:"])
@example("http://h.example/a/b", ["../../../c:d?e"])
@example("http://h.example/a//b/", ["../../..//c"])
@example("http://h.example/a/b/c", ["../..x"])
@example("http://h.example/" + "a/" * 12, ["../" * 11 + "x"])
@example("https://h.example/a/b?c/d", ["../"])
@example("https://h.example/a/b", ["//h.example:443/c"])
@example("http://h.example/a/b", ["x", "", "\0/y", "#\0", "../z"])
def test_resolving_all_equals_joining_each(base: str, hrefs: list[str]) -> None:
    base = ada_url.normalize_url(base)
    for start in (base, None):
        joined = [html_parse._join(start, href.replace("\0", "\ufffd")) for href in hrefs]
        urls = [url and url.partition("#")[0] for url in joined]
        assert html_parse._resolve(start, hrefs) == urls
        assert html_parse._resolve(start, [href.replace("&", "&amp;").encode() for href in hrefs]) == urls


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*string.whitespace, "\x1c", "\x85", "\xa0", "\u2028", "\u200b", "a", "é", "&", "#", "x", ";", "0"]
        )
        | st.sampled_from(
            [
                "&nbsp",
                "&nbsp;",
                "&NewLine;",
                "&ensp;",
                "&#32;",
                "&#0x20;",
                "&#xa0;",
                "&#160",
                "&#1600",
                "&#133;",
                "&amp;",
                "&#x3000;",
            ]
        ),
        max_size=20,
    ).map("".join)
)
def test_words_are_those_of_split(text: str) -> None:
    assert html_parse._count_words(text.encode()) == len(html.unescape(text).split())


class Reference(HTMLParser):
    """The textbook: every tag and every text through html.parser."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.links, self.words = url, dict[str, None](), 0
        self.title: str | None = None
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href is not None:
            url = ada_url.join_url(self.url, href)
            if url.startswith("http"):
                self.links[url.partition("#")[0]] = None
        if tag not in ("br", "img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["title"] and "svg" not in self.open:
            self.title = self.title or " ".join(data.split())
        elif not {"script", "style", "noscript", "head"} & set(self.open):
            self.words += len(data.split())


texts = st.lists(
    st.sampled_from(
        [
            "word",
            " ",
            "\n",
            "été",
            "日本 語",
            "&amp;",
            "&nbsp;",
            "&#160;",
            "&eacute;",
            "&lt;b&gt;",
            "1.5",
            "\u00a0",
            "'",
            '"',
            "--",
        ]
    ),
    max_size=6,
).map("".join)


paths = st.sampled_from(
    ["/", "/a/b?c=d", "x.html", "../up", "#f", "https://h.example/x", "mailto:a", "?q=1&amp;r=2", "é", "//n.example"]
)


leaves = st.one_of(
    texts,
    st.sampled_from(
        [
            "<br>",
            "<br/>",
            '<img alt="a > b">',
            "<!-- <a href='/no'> -->",
            "<script>if (1 < 2) '<p>no</p>'</script>",
            "<style>p > a {}</style>",
        ]
    ),
    st.builds("<a class='x' href='{}'>{}</a>".format, paths, texts),
    st.builds('<a data-x="1" href="{}" rel="nofollow">{}</a>'.format, paths, texts),
    st.builds('<a href="{}" class="y">{}</a>'.format, paths, texts),
    st.builds("<svg viewBox='0 0 1 1'><title>{}</title><path d='M0'/></svg>".format, st.just("icon one")),
)


documents = st.builds(
    "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><title>{}</title></head><body>{}</body></html>\n".format,
    texts,
    st.recursive(
        leaves,
        lambda inner: st.builds(
            "<{0} id='i' title=\"<a href='/no'>\">{1}</{0}>".format,
            st.sampled_from(["div", "p", "b", "SPAN", "noscript", "section"]),
            st.lists(inner, max_size=4).map("".join),
        ),
        max_leaves=25,
    ),
)


@settings(max_examples=200, deadline=None)
@given(documents)
def test_well_formed_pages_as_the_textbook_reads_them(markup: str) -> None:
    reference = Reference(URL)
    reference.feed(markup)
    reference.close()
    page = html_page(markup)
    assert page.title == (reference.title or None)
    assert page.links == list(reference.links)
    assert page.word_count == len(page.text.split()) == reference.words
