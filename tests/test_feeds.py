"""crawl/feeds.py, sitemaps.py, articles.py, dates.py: documents as they come."""

from __future__ import annotations

import gzip
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crawl import feeds as feed_parse
from crawl import sitemaps as sitemaps_module
from crawl import xml as xml_module
from crawl.dates import iso_utc
from crawl.feeds import FeedEntry, parse_feed
from crawl.sitemaps import parse_sitemap
from crawl.urls import normalise
from tests.absent import needs

pytestmark = needs("feedparser", "trafilatura", "lxml_html_clean")

SITEMAP_AT = "https://site.example/sitemap.xml"


def sitemap_of(
    inside: str, root: str = "urlset", ns: str = ' xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"'
) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}{ns}>{inside}</{root}>'


SITEMAP_PLAIN = sitemap_of(
    "<url><loc> https://site.example/1 </loc><lastmod>2024-05-01T12:00:00+02:00</lastmod></url>"
    "<url><lastmod>2024-05</lastmod><loc>https://SITE.example:443/2?a=1&amp;b=2#x</loc></url>"
)


SITEMAP_FOUND = ["https://site.example/1", "https://site.example/2?a=1&b=2"]


@pytest.mark.parametrize(
    "body",
    [
        SITEMAP_PLAIN.encode(),
        b"\xef\xbb\xbf \n" + SITEMAP_PLAIN.encode(),
        gzip.compress(SITEMAP_PLAIN.encode()),
        gzip.compress(SITEMAP_PLAIN.encode()[:99]) + gzip.compress(SITEMAP_PLAIN.encode()[99:]) + b"\0" * 99,
        SITEMAP_PLAIN.encode("utf-16"),
        SITEMAP_PLAIN.encode("utf-16-be"),
        SITEMAP_PLAIN.replace("UTF-8", "windows-1251").encode("cp1251"),
        SITEMAP_PLAIN.replace("UTF-8", "gbk").encode("gbk"),
        SITEMAP_PLAIN.replace("UTF-8", "utf-16").encode(),
        SITEMAP_PLAIN.replace("sitemap/0.9", "nonsense").encode(),
        SITEMAP_PLAIN.replace(' xmlns="http', ' xmlns:x="http').encode(),
        SITEMAP_PLAIN.replace("url>", "sm:url>").replace("loc>", "sm:LOC>").encode(),
        SITEMAP_PLAIN.replace("&amp;", "&").encode(),
        SITEMAP_PLAIN.replace("</loc>", "\x0b</loc>").encode(),
        SITEMAP_PLAIN.replace("https://SITE.example:443/2?a=1&amp;b=2#x", "<![CDATA[/2?a=1&b=2]]>").encode(),
        SITEMAP_PLAIN.replace("https://SITE.example:443/2?a=1&amp;b=2#x", "/2<![CDATA[?a=1&amp;]]>b=2").encode(),
        SITEMAP_PLAIN.replace("</loc>", '</loc><i:image><i:loc>/i.png</i:loc></i:image><x:link href="/de"/>').encode(),
        SITEMAP_PLAIN.replace("</url>", "</url><!-- <url><loc>/no</loc></url> --><url/>").encode(),
    ],
)
def test_sitemap_spellings(body: bytes) -> None:
    sitemap = parse_sitemap(body, SITEMAP_AT)
    assert (sitemap.urls, sitemap.sitemaps, sitemap.error) == (SITEMAP_FOUND, [], None)


@pytest.mark.parametrize(
    ("body", "urls", "sitemaps", "error"),
    [
        (sitemap_of("<sitemap><loc>/a.xml.gz</loc><lastmod>2024</lastmod></sitemap>", "sitemapindex"),
         [], ["https://site.example/a.xml.gz"], None),
        ("https://site.example/1\r\n\r\n  HTTPS://site.example/2\nnot a link\n/3\nhttps://site.example/1",
         ["https://site.example/1", "https://site.example/2"], [], None),
        ("<rss version='2.0'><channel><link>https://site.example/</link><item><title>t</title><link>/r</link>"
         "<pubDate>Mon, 06 May 2024 10:00:00 +0200</pubDate><guid>x</guid></item></channel></rss>",
         ["https://site.example/r"], [], None),
        ("<feed xmlns='http://www.w3.org/2005/Atom'><link href='/'/><entry><link rel='self' href='/s'/>"
         "<link href='/a'/><updated>2024-05-06T10:00:00Z</updated><source><link href='/z'/></source></entry></feed>",
         ["https://site.example/a"], [], None),
        (SITEMAP_PLAIN[:-30], SITEMAP_FOUND[:1], [], "XML: "),
        (SITEMAP_PLAIN.replace("</url>", "</url></oops>", 1), SITEMAP_FOUND[:1], [], "XML: mismatched"),
        ("<!DOCTYPE html><html><body>404", [], [], "an HTML page"),
        ("<!DOCTYPE x [<!ENTITY a 'https://site.example/e'>]>" + sitemap_of("<url><loc>&a;</loc></url>")[39:],
         [], [], "XML: it declares entities"),
        ("<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><urlset><url><loc>&a;</loc></url></urlset>",
         [], [], "XML: it declares entities"),
        ("<!DOCTYPE urlset SYSTEM 'http://127.0.0.1:9/x.dtd'><urlset><url><loc>/&a;</loc></url></urlset>",
         ["https://site.example/&a;"], [], None),
        ("<a>" * 100, [], [], "XML: nested too deep"),
        ("", [], [], None),
        (" \n ", [], [], None),
    ],
)  # fmt: skip
def test_sitemap_kinds(body: str, urls: list[str], sitemaps: list[str], error: str | None) -> None:
    sitemap = parse_sitemap(body.encode(), SITEMAP_AT)
    assert (sitemap.urls, sitemap.sitemaps) == (urls, sitemaps)
    assert sitemap.error == error or (error and sitemap.error and sitemap.error.startswith(error))


def test_sitemap_speaks_for_its_host() -> None:
    named = ["https://site.example/1", "http://site.example:8080/2", "https://other.example/3", "javascript:x"]
    named += ["https://evil.example/4", "http://[bad", "ftp://site.example/5", "https://site.example/" + "x" * 9000]
    body = sitemap_of("".join(f"<url><loc>{url}</loc></url>" for url in named)).encode()
    ours = parse_sitemap(body, SITEMAP_AT)
    assert ours.urls == ["https://site.example/1", "http://site.example:8080/2"]
    assert len(parse_sitemap(body, SITEMAP_AT, hosts=["other.example"]).urls) == 3
    assert len(parse_sitemap(body, SITEMAP_AT, hosts=None).urls) == 4
    assert parse_sitemap(body, "nonsense").error == "sitemap's own address: not a URL; write https:// before it"


def test_sitemap_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "<url><loc>https://site.example/{}</loc></url>"
    many = sitemap_of("".join(entry.format(i) for i in range(50_001))).encode()
    sitemap = parse_sitemap(gzip.compress(many, 1), SITEMAP_AT)
    assert (len(sitemap.urls), sitemap.error) == (50_000, "more than 50000 addresses")
    assert parse_sitemap(many.replace(b"50000<", b"49999<"), SITEMAP_AT).error is None
    torn = parse_sitemap(gzip.compress(many, 1)[:-5000], SITEMAP_AT)
    assert torn.error == "gzip: it ends too soon" and len(torn.urls) > 40_000
    spoilt = parse_sitemap(gzip.compress(SITEMAP_PLAIN.encode())[:-8] + b"\0" * 8, SITEMAP_AT)
    assert "gzip: " in (spoilt.error or "")
    monkeypatch.setattr(sitemaps_module, "MAX_SITEMAP", 3 << 20)
    head = sitemap_of(entry.format(1)).encode()[:-9]
    for bomb in (head + b" " * (4 << 20), gzip.compress(head + b" " * (64 << 20), 1)):
        sitemap = parse_sitemap(bomb, SITEMAP_AT)
        assert (len(sitemap.urls), sitemap.error) == (1, "larger than 3145728 bytes")
    lines = parse_sitemap(b"https://site.example/1\n" + b"https://site.example/" * (1 << 17), SITEMAP_AT)
    assert lines.urls == ["https://site.example/1"]
    same = parse_sitemap(b"https://site.example/1\n" * 1300, SITEMAP_AT)
    assert (len(same.urls), same.error) == (1, None)
    monkeypatch.setattr(sitemaps_module, "MAX_LOCATIONS", 100)
    same = parse_sitemap(b"https://site.example/1\n" * 401, SITEMAP_AT)
    assert len(same.urls) == 1 and same.error == "more than 400 entries, bad and repeated ones counted in"
    token = parse_sitemap(head + b"<url " + b"a='' " * (600_000), SITEMAP_AT)
    assert len(token.urls) == 1 and "single construct" in (token.error or "")


def test_sitemap_gzip_of_many_members() -> None:
    body = b"".join(gzip.compress(b"https://site.example/%d\n" % i) for i in range(3000))
    assert len(parse_sitemap(body, SITEMAP_AT).urls) == 3000


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_sitemap_in_pieces_is_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """References, CDATA, characters and lines that a piece cuts."""
    entries = "<url><loc>/é?a={0}&b&amp;c&#38;d&lt;</loc></url><url><loc><![CDATA[/{0}&x]]></loc></url>"
    text = sitemap_of("".join(entries.format(i) for i in range(9)))
    lines = "\n".join(f"https://site.example/é{i}" for i in range(9))
    bodies = [text.encode(), text.encode("utf-16"), gzip.compress(text.encode()), lines.encode()]
    whole = [parse_sitemap(body, SITEMAP_AT) for body in bodies]
    assert [len(sitemap.urls) for sitemap in whole] == [18, 18, 18, 9]
    assert whole[0].urls[0] == "https://site.example/%C3%A9?a=0&b&c&d%3C"
    monkeypatch.setattr(xml_module, "_PIECE", size * 16)
    assert [parse_sitemap(body, SITEMAP_AT) for body in bodies] == whole


FEED_AT = "https://site.example/blog/feed"


FEED_ITEM = FeedEntry("https://site.example/1", "T & <t>", "Ann", "2024-05-06T08:00:00Z", "Some bold text")


@pytest.mark.parametrize(
    ("body", "entries"),
    [
        ("<rss version='2.0'><channel><item><title>T &amp;amp; &amp;lt;t&amp;gt;</title>"
         "<link>/1</link><author>Ann</author><pubDate>Mon, 06 May 2024 10:00:00 +0200</pubDate>"
         "<description>Some &lt;b&gt;bold&lt;/b&gt; text&lt;script&gt;x&lt;/script&gt;</description></item>"
         "</channel></rss>", [FEED_ITEM]),
        ("<rss version='2.0' xmlns:dc='http://purl.org/dc/elements/1.1/' xmlns:c='http://purl.org/rss/1.0/modules/content/'>"
         "<channel><item><title><![CDATA[T & <t>]]></title><link>https://site.example/1</link><dc:creator>Ann</dc:creator>"
         "<dc:date>2024-05-06T08:00:00Z</dc:date><description>Some</description><c:encoded><![CDATA[<p>Some <b>bold</b>"
         " text</p>]]></c:encoded></item></channel></rss>", [FEED_ITEM]),
        ("<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#' xmlns='http://purl.org/rss/1.0/'>"
         "<item rdf:about='x'><title>One</title><link>/1</link></item></rdf:RDF>",
         [FeedEntry("https://site.example/1", "One", None, None, None)]),
        ("<rss version='0.91'><channel><item><title>One</title><link>1</link><pubDate>soon</pubDate></item>"
         "<item><title>No link</title></item><item><link>1</link></item><item><link>javascript:x</link></item>",
         [FeedEntry("https://site.example/blog/1", "One", None, None, None)]),
        ("<feed xmlns='http://www.w3.org/2005/Atom' xml:base='https://site.example/x/'><entry xml:base='y/'>"
         "<title type='html'>T &amp;amp; &amp;lt;t&amp;gt;</title><link href='../../1'/><link rel='edit' href='/e'/>"
         "<author><name>Ann</name></author><published>2024-05-06T10:00:00+02:00</published><updated>2024-06-01T00:00:00Z</updated>"
         "<content type='xhtml'><div xmlns='http://www.w3.org/1999/xhtml'>Some <b>bold</b> text</div></content></entry>"
         "</feed>",
         [FEED_ITEM]),
        ("<feed xmlns='http://www.w3.org/2005/Atom'><entry><title>a &lt; b</title><id>x</id><link href='/1'/>"
         "<updated>2024-05-06T10:00:00Z</updated><summary type='text'>1 &lt; 2</summary></entry></feed>",
         [FeedEntry("https://site.example/1", "a < b", None, "2024-05-06T10:00:00Z", "1 < 2")]),
        ("<rss><channel><item><title>A & B</title><link>/1?a=1&b=2</link><description><p>unclosed</description></item>"
         "<item><title>C</title><link>/2</link>", [
             FeedEntry("https://site.example/1?a=1&b=2", "A & B", None, None, "unclosed"),
             FeedEntry("https://site.example/2", "C", None, None, None)]),
        ("<!DOCTYPE r [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><rss><channel><item><title>a&x;b</title><link>/1</link>"
         "</item></channel></rss>", [FeedEntry("https://site.example/1", "a&x;b", None, None, None)]),
        ("<html><body>404</body></html>", []),
        ("/etc/passwd", []),
        ("https://site.example/feed", []),
        ("", []),
    ],
)  # fmt: skip
def test_feed_dialects(body: str, entries: list[FeedEntry]) -> None:
    assert parse_feed(body.encode(), FEED_AT).entries == entries


def test_feed_encodings() -> None:
    feed = "<?xml version='1.0' encoding='{}'?><rss><channel><item><title>Zoë</title><link>/1</link></item></channel>"
    latin = {"Content-Type": "text/xml; charset=ISO-8859-1"}
    bodies: list[tuple[bytes, dict[str, str] | None]] = [
        (feed.format("utf-8").encode(), None),
        (feed.format("utf-8").encode("utf-8-sig"), latin),
        (feed.format("iso-8859-1").encode("latin-1"), None),
        (feed.format("utf-8").encode("latin-1"), latin),
        (feed.format("nonsense").encode("latin-1"), None),
        (feed.format("utf-16").encode("utf-16"), None),
        (gzip.compress(b"\n " + feed.format("utf-8").encode()), None),
    ]
    assert {tuple(parse_feed(body, FEED_AT, headers).entries[0])[:2] for body, headers in bodies[:4]} == {
        ("https://site.example/1", "Zoë")
    }
    assert [entry.url for body, headers in bodies for entry in parse_feed(body, FEED_AT, headers).entries] == [
        "https://site.example/1"
    ] * len(bodies)


def test_feed_bombs() -> None:
    """What takes feedparser itself quadratic time and more, or much memory."""
    start, end = "<rss><channel><item><link>/1</link>", "</item></channel></rss>"
    laughs = "".join(f"<!ENTITY l{i + 1} '{f'&l{i};' * 10}'>\n" for i in range(30))
    bombs = {
        f"<?xml version='1.0'?><!DOCTYPE r [\n<!ENTITY l0 'ha'>\n{laughs}]>{start}<title>&l30;</title>{end}": 1,
        start + "<author>" + "a" * 200_000 + "</author></item>": 1,
        start + "".join(f"<category>{i}</category>" for i in range(20_000)) + "</item></channel></rss>": 1,
        "<?xml version='1.0'?>" + "\n" * 200_000 + start[:13] + start[13:] + "</item></channel></rss>": 1,
        "".join(f"<x{i}:y xmlns:x{i}='u{i}'/>" for i in range(20_000)): 0,
    }
    for body, found in bombs.items():
        entries = parse_feed(body.encode(), FEED_AT).entries
        assert len(entries) == found, body[:60]
        assert all(len(entry.title or "") < 1000 for entry in entries)


def test_feed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    item = "<item><title>t</title><link>/{}</link><description>" + "word " * 50 + "</description></item>"
    body = ("<rss><channel>" + "".join(item.format(i) for i in range(400))).encode()
    monkeypatch.setattr(feed_parse, "MAX_FEED", 20_000)
    assert 50 < len(parse_feed(body, FEED_AT).entries) < 70
    monkeypatch.setattr(feed_parse, "_MAX_FEED_ELEMENTS", 20)
    assert 0 < len(parse_feed(body, FEED_AT).entries) <= 7
    monkeypatch.setattr(feed_parse, "MAX_TEXT", 12)
    assert parse_feed(body, FEED_AT).entries[0].summary == "word word wo"


FEED_OWN = "<title>Real</title><link>/1</link><dc:creator>Ann</dc:creator><pubDate>2024-05-06T08:00:00Z</pubDate>"


FEED_HEAD = (
    "<rss version='2.0' xmlns:media='http://search.yahoo.com/mrss/' xmlns:dc='http://purl.org/dc/elements/1.1/' "
    "xmlns:itunes='http://www.itunes.com/dtds/podcast-1.0.dtd' xmlns:atom='http://www.w3.org/2005/Atom'><channel>"
)


@pytest.mark.parametrize(
    ("reference", "stands_for"),
    [
        ("&#55357;&#56832;", "\U0001f600"),
        ("&#xD83D;&#xde00;", "\U0001f600"),
        ("&#xD83D;&#56832;", "\U0001f600"),
        ("&#55357;", "\ufffd"),
        ("&#56832;&#55357;", "\ufffd\ufffd"),
        ("&#xD83D;x&#xDE00;", "\ufffdx\ufffd"),
        ("&#x110000;", "\ufffd"),
        ("&#1114112;", "\ufffd"),
        ("&#99999999999;", "\ufffd"),
        (f"&#{'9' * 5000};", "\ufffd"),
        ("&#0;", "\ufffd"),
        ("&#8;", "\ufffd"),
        ("&#xFFFF;", "\ufffd"),
        ("&#X41;&#000000000066;", "AB"),
        ("& &#xD800;", "& \ufffd"),  # not well-formed for another reason, too
    ],
)
def test_feed_a_bad_reference_costs_no_entry(reference: str, stands_for: str) -> None:
    good = "".join(f"<item><title>{n}</title><link>/{n}</link></item>" for n in range(3))
    last = "<item><title>{0}a</title><link>/l?{0}</link><description>{0}b</description><guid>{0}</guid></item>"
    feed = parse_feed(f"<rss><channel>{good}{last.format(reference)}</channel></rss>".encode(), FEED_AT)
    assert feed.fault is None and len(feed.entries) == 4
    assert feed.entries[3][:2] == (normalise(f"https://site.example/l?{stands_for}")[0], f"{stands_for}a")
    assert feed.entries[3].summary == f"{stands_for}b"
    escaped = reference.replace("&", "&amp;")
    for text in (f"<![CDATA[<b>{reference}</b>]]>", f"&lt;b&gt;{escaped}&lt;/b&gt;"):
        entry = f"<entry><link href='/{reference}'/><title type='html'>{text}</title></entry>"
        feed = parse_feed(f"<feed xmlns='http://www.w3.org/2005/Atom'>{entry}</feed>".encode(), FEED_AT)
        [read] = feed.entries
        assert (read.url, read.title) == (normalise(f"https://site.example/{stands_for}")[0], stands_for)


def feed_many(count: int) -> str:
    return FEED_HEAD + "".join(f"<item><title>{n}</title><link>/{n}</link></item>" for n in range(count))


@pytest.mark.parametrize(
    ("after", "found", "fault"),
    [
        ("</channel></rss>", 400, None),
        ("<item><title>a & b</title><link>/x</link></item></channel></rss>", 401, None),
        ("<item><title>&nbsp;&foo;</title><link>/x</link></item></channel></rss>", 401, None),
        ("<item><title>x</b></title><link>/x</link><y z=<></item></channel></rss>", 401, None),
        ("", 400, "it ends too soon"),
        ("<item><title>x</title><link>/x</link><pubDate>2024-05-0", 401, "it ends too soon"),
        ("<item><title>x</title><link>http://site.exam", 400, "it ends too soon"),
        ("<item><title>x</title><link href='/x", 400, "it ends too soon"),
        ("<item><link>/x</link><title><![CDATA[x", 401, "it ends too soon"),
        ("</channel></rss", 400, "it ends too soon"),
        ("<!-- <item><title>x</title><link>/x</link></item></channel></rss>", 400, "it ends too soon"),
        ("<?x <item><title>x</title><link>/x</link></item></channel></rss>", 400, "not all of it can be read"),
        ("<item><title>x<link>/x</link></item><item><link>/y</link></item></channel></rss>", 401, None),
        ("<y/>" * 2_800, 400, "too many elements"),
        ("".join(f"<y xmlns:n{n}='u{n}'/>" for n in range(300)), 400, "too many namespaces"),
    ],
)  # fmt: skip
def test_feed_what_was_read_before_a_fault_is_kept(
    after: str, found: int, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_parse, "bounds", lambda *_: (1000.0, 0))
    monkeypatch.setattr(feed_parse, "_MAX_FEED_ELEMENTS", 4_000)
    feed = parse_feed((feed_many(400) + after).encode(), FEED_AT)
    assert (len(feed.entries), feed.fault) == (found, fault)
    assert [entry.title for entry in feed.entries[:400]] == [str(n) for n in range(400)]


def test_feed_limits_and_the_end_of_a_body_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    body = (feed_many(400) + "</channel></rss>").encode()
    assert parse_feed(gzip.compress(body)[:-900], FEED_AT).fault == "gzip: it ends too soon"
    monkeypatch.setattr(feed_parse, "bounds", lambda *_: (0.0, 0))
    assert parse_feed(body, FEED_AT) == ([], "it takes too long")
    monkeypatch.undo()
    monkeypatch.setattr(feed_parse, "MAX_FEED", len(body) - 20)
    cut = parse_feed(body, FEED_AT)
    assert (len(cut.entries), cut.fault) == (400, f"larger than {len(body) - 20} bytes")
    for nothing in (b"", b"<html><p>404", b"{}", gzip.compress(b"\xff" * 999)[:-9]):
        feed = parse_feed(nothing, FEED_AT)
        assert feed.entries == [] and (feed.fault or "").startswith(feed_parse.NO_FEED)
    assert parse_feed(b"<rss><channel></channel></rss>", FEED_AT) == ([], None)


@pytest.mark.parametrize("well_formed", [True, False])
@pytest.mark.parametrize(
    "nested",
    [
        "<image><title>Logo</title><url>/u</url><link>/logo</link></image>",
        "<textInput><title>Logo</title><name>Logo</name><link>/logo</link></textInput>",
        "<source url='/logo'>Logo</source>",
        "<atom:source><title>Logo</title><link href='/logo'/><updated>2001-01-01</updated></atom:source>",
        "<media:group><media:title>Logo</media:title><media:description>Logo</media:description></media:group>",
        "<media:content url='/u'><media:title>Logo</media:title><title>Logo</title></media:content>",
        "<itunes:owner><itunes:name>Logo</itunes:name></itunes:owner>",
        "<atom:contributor><atom:name>Logo</atom:name></atom:contributor>",
        "<x><title>Logo</title><link>/logo</link><pubDate>2001-01-01</pubDate><author>Logo</author></x>",
        "<x><y><title>Logo</title></y><link>/logo</link><guid>/logo</guid><dc:creator>Logo</dc:creator></x>",
        "<x><description>Logo</description><atom:author><atom:name>Logo</atom:name></atom:author></x>",
        "<description><title>Text</title><link>/logo</link><pubDate>2001-01-01</pubDate></description>",
        "<atom:content type='application/xml'><entry><title>Text</title><link href='/logo'/></entry></atom:content>",
        "<category>Logo</category><comments>/logo</comments><enclosure url='/logo' length='1' type='a/b'/>",
    ],
)  # fmt: skip
def test_feed_an_entry_has_its_own_children_only(nested: str, well_formed: bool) -> None:
    before, after = f"<item>{nested}{FEED_OWN}</item>", f"<item>{FEED_OWN}{nested}</item>".replace("/1<", "/2<")
    around = "<image><title>Logo</title><link>/logo</link></image>" + ("" if well_formed else " & ")
    feed = parse_feed(f"{FEED_HEAD}{around}{before}{around}{after}{around}</channel></rss>".encode(), FEED_AT)
    assert feed.fault is None
    assert [entry[:4] for entry in feed.entries] == [
        (f"https://site.example/{n}", "Real", "Ann", "2024-05-06T08:00:00Z") for n in (1, 2)
    ]
    assert {entry.summary for entry in feed.entries} <= {None, "Text", "Text /logo 2001-01-01"}


@pytest.mark.parametrize(
    ("written", "published"),
    [
        ("0000-00-00", None),
        ("2024/12/25", "2024-12-25T00:00:00Z"),
        ("2024-13-45", None),
        ("1706900000", None),
        ("1706900000000", None),
        ("12/25/2024", None),
        ("25.12.2024", None),
        ("2024-05", "2024-05-01T00:00:00Z"),
        ("2024-5-6", "2024-05-06T00:00:00Z"),
        ("20240506T100000Z", "2024-05-06T10:00:00Z"),
        ("2024-05-06T24:00:00Z", "2024-05-07T00:00:00Z"),
        ("2024-05-06T23:59:60Z", "2024-05-07T00:00:00Z"),
        ("2024-05-06T10:61:00Z", None),
        ("2024-05-06T10:00:00Z and more", None),
        ("since 2024-05-06", None),
        ("2024-02-30", None),
        ("2024/12/25 10:00:00 +0200", "2024-12-25T08:00:00Z"),
        ("Fri, 2006/09/15 08:19:53 EDT", "2006-09-15T12:19:53Z"),
        ("Fri, 2006/13/15 08:19:53 EDT", None),
        ("Mon, 6 May 24 10:00 EST", "2024-05-06T15:00:00Z"),
        ("Mon, 6 May 2024 10:00:00 GMT+02:00", "2024-05-06T08:00:00Z"),
        ("Mon, 6 May 2024 10:00:00 +0200 (CEST)", "2024-05-06T08:00:00Z"),
        ("Mon, 6 May 2024 10:00:00 XYZ", None),
        ("Mon, 6 May 2024 10:00:00 A", None),
        ("Mon, 6 May 2024 10:00:00 +9900", None),
        ("Mon, 32 May 2024 10:00:00 GMT", None),
        ("Sunday, 06-Nov-94 08:49:37 GMT", "1994-11-06T08:49:37Z"),
        ("Sun Nov  6 08:49:37 1994", "1994-11-06T08:49:37Z"),
        ("Sun Nov  6 08:49:37 UTC 1994", "1994-11-06T08:49:37Z"),
        ("May 6, 2024", "2024-05-06T00:00:00Z"),
        ("Lun, 6 mai 2024 10:00:00 GMT", None),
        ("\\u0662\\u0660\\u0662\\u0664-05-06", None),
    ],
)
def test_feed_a_date_is_read_whole_or_not_at_all(written: str, published: str | None) -> None:
    item = f"<item><title>T</title><link>/1</link><pubDate>{written}</pubDate></item>"
    [entry] = parse_feed(f"<rss><channel>{item}</channel></rss>".encode(), FEED_AT).entries
    assert entry == ("https://site.example/1", "T", None, published, None)
    assert iso_utc(written) == published


@pytest.mark.parametrize("inside", [True, False])
def test_feed_nested_bases_take_linear_time(inside: bool) -> None:
    """Each longer than the one around it: 160 KB took 16 s."""
    nested = "<a xml:base='aaaaaaa/'>" * 5_000 + "</a>" * 5_000
    entry = "<entry><title>x</title><link href='/1'/>{}</entry>".format(nested if inside else "")
    body = f"<feed xmlns='http://www.w3.org/2005/Atom'>{'' if inside else nested}{entry}</feed>"
    began = time.thread_time()
    feed = parse_feed(body.encode(), FEED_AT)
    assert time.thread_time() - began < 2.0
    assert feed == ([FeedEntry("https://site.example/1", "x", None, None, None)], None)


feed_pieces = st.sampled_from(
    """<rss> <channel> <item> </item> <link> </link> /a <title> </title> <feed> <entry> </entry> <link\thref='/b'/>
    <urlset> <url> </url>
    <loc> </loc> https://site.example/ <![CDATA[ ]]> <!-- --> <!DOCTYPE\tx\t[ <!ENTITY\ta\t'b'> ]> &a; &amp;
    &#0; &#xD800;
    <?xml\tversion='1.0'\tencoding='utf-16'?> < > \x00 é <pubDate> </pubDate> 0000-00-00 Mon,\t99\tMay\t99999
    <lastmod> </lastmod> 9999-12-31T23:59:59-23:59 <author> a@b.c <content\ttype='xhtml'><div> </div></content>
    \x1f\x8b \ufeff <sitemapindex> <sitemap> </sitemap>""".replace("\n", " ").split(" ")
)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200) | st.lists(feed_pieces, max_size=30).map("".join).map(str.encode),
    st.booleans(),
    st.booleans(),
)
def test_feed_and_sitemap_never_raise(body: bytes, zipped: bool, torn: bool) -> None:
    if zipped:
        body = gzip.compress(body) if not torn else b"\x1f\x8b" + body
    sitemap = parse_sitemap(body, SITEMAP_AT)
    assert all(url.startswith("http") for url in sitemap.urls)
    feed = parse_feed(body, FEED_AT, {"Content-Type": body.decode("latin-1")})
    assert all(entry.url.startswith("http") for entry in feed.entries)


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("2024-05-06T10:00:00Z", "2024-05-06T10:00:00Z"),
        ("2024-05-06T10:00:00.123-02:30", "2024-05-06T12:30:00Z"),
        ("2024-05-06", "2024-05-06T00:00:00Z"),
        (" 2024-05 ", "2024-05-01T00:00:00Z"),
        ("2024", "2024-01-01T00:00:00Z"),
        ("Mon, 06 May 2024 10:00:00 GMT", "2024-05-06T10:00:00Z"),
        ("06 May 2024 10:00 -0700", "2024-05-06T17:00:00Z"),
        ("0001-01-01T00:00:00+05:00", None),
        ("2024-13", None),
        ("yesterday", None),
        ("", None),
        ("9" * 100, None),
    ],
)
def test_feed_dates(text: str, iso: str | None) -> None:
    assert iso_utc(text) == iso
