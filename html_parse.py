"""One HTML page, bytes in, facts out: title, links, words, metadata.

A page is not parsed into a tree but *split*: one regular expression knows the token grammar of the WHATWG tokenizer
(tags with quoted attributes, comments, raw-text elements, escapes in scripts) and cuts the page at every token.  What
lies between two cuts is text.  Ordinary tags, comments, scripts and styles vanish inside the C code of `re`; an
ordinary `<a href="...">` leaves its address on the way; only the few constructs that carry meaning here (title, meta,
base, unusual anchors, ...) come back to Python, where html.parser reads their attributes.

A page is scanned as UTF-8 bytes, since every byte that matters to the grammar is ASCII; others are transcoded first
(charsets.py).

Promised:
- No bytes make `parse_page` raise, and its time and memory are linear in their number: all repetition in the
  patterns is possessive, so nothing backtracks.
- A page is worked through in pieces of 64 KiB, longer only where a single construct is longer, so that other
  threads get their turn every few milliseconds.
- Title, links and words are those of a browser with scripting disabled, wherever they follow from the tokens.

Not promised:
- Where a browser moves text out of a table, ignores a stray tag between two words or closes an open <noscript> with
  its parent, the words at the seam may be counted differently.  An <svg> runs to the next </svg> even if HTML inside it
  should have ended it; a CDATA section in it is taken for a comment.
- A <meta>, <link> or unusually written <a> of more than 256 KiB is passed over.

Every function is pure.  Nothing waits or locks, and nothing is kept between pages but caches of pure functions.
"""

import html
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from html.entities import html5
from html.parser import HTMLParser
from itertools import compress
from typing import Any

import ada_url

from charsets import escape_query, name_of, transcode

_PRESCAN = 1024  # bytes in which a <meta charset> counts (HTML standard, section 13.2.3.2)
_PIECE = 1 << 16  # bytes of a page that are split in one go
_TAG_LIMIT = 1 << 18  # bytes of a tag whose attributes are read
_FEED_TYPES = frozenset({"application/rss+xml", "application/atom+xml"})
_REFUSALS = frozenset({"noindex", "nofollow", "none"})  # what a <meta> may ask of one crawler, by its name
_AGENT = re.compile(r"[a-z0-9_-]+", re.ASCII)
_BREAK = b"\x1e"  # stands for a line end in extracted text; white space, so it separates words as well


# ------------------------------------------------------------------------------------------------- the tokenizer

_BLOCKS = """address article aside blockquote br caption center dd details dialog dir div dl dt fieldset figcaption
    figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr legend li main menu nav ol optgroup option p pre search
    section select summary table tbody tfoot thead tr ul"""
_POSSESSIVE = re.fullmatch("(?:ab?c)*+a", "aca") is not None  # not so before CPython 3.11.5 (gh-106052)


def _many(pattern: str) -> str:
    """A pattern for any number of repetitions, of which none is given back: a possessive group, else an atomic one."""
    return f"(?:{pattern})*+" if _POSSESSIVE else f"(?>(?:{pattern})*)"


_WS = r"[ \t\n\f\r]"
_END = r"(?=[ \t\n\f\r/>])"  # what ends the name of a tag
# From the name of a tag to its ">" as the tokenizer's attribute states have it: quotes count after "=" only.
_VALUE = rf"""={_WS}*+(?:"[^"]*+"|'[^']*+'|(?!["'])[^ \t\n\f\r>]*+)"""
_TAIL = rf"[^>=]*+{_many(rf'{_VALUE}[^>=]*+')}>"
_COMMENT = rf"!--(?:-?>|[^-]*+{_many('-(?!-!?>)[^-]*+')}--!?>)"
# The other attributes of an ordinary anchor; other spellings, and nofollow, make it an unusual one.
_BARE = r"""[^ \t\n\f\r"'=<>`]++"""
_OTHER = rf"""(?!(?:href|rel)[^a-z0-9:_-])[a-z0-9:_-]++(?:="[^"]*+"|={_BARE}(?=[ \t\n\f\r>])|(?!=))"""
_BESIDE = _many(rf'{_WS}++(?:{_OTHER}|rel="(?![^"]*(?i:nofollow))[^"]*+")')
# In a script, "<!--" hides "<script>...</script>" until "-->" (script data double escaped state).
_SCRIPT = rf"(?i:script){_END}"
_HIDDEN = rf"<{_SCRIPT}[^<-]*+{_many(rf'(?:-(?!->)|<(?!/{_SCRIPT}))[^<-]*+')}(?:</{_SCRIPT})?"
_ESCAPED = rf"!--(?:-*+>|[^<-]*+{_many(rf'(?:-(?!->)|<(?!/?{_SCRIPT})|{_HIDDEN})[^<-]*+')})"


def _named(names: Iterable[str]) -> str:
    """A pattern for any of the tag names in any case; by first letters, so that other names fail at once."""
    tails: dict[str, list[str]] = {}
    for name in names:
        tails.setdefault(name[0], []).append(name[1:])
    return "(?:" + "|".join(f"[{a}{a.upper()}](?i:{'|'.join(tails[a])})" for a in tails) + ")" + _END


def _element(name: str, opaque: str = "(?!)", *, closable: bool = False) -> str:
    """A pattern for an element that runs to the next end tag of its name, except within `opaque` markup, or to "/>"."""
    rest = rf"[^<]*+{_many(rf'<(?:{opaque}|(?!/(?i:{name}){_END}))[^<]*+')}</{_TAIL}"
    return rf"{_named([name])}{_TAIL}(?:{'(?<=/>)|' * closable}{rest})"


@cache
def _tokenizer(*, foreign: bool = False, blocks: bool = False) -> re.Pattern[bytes]:
    """The pattern to split a page by, which gives text, href, special, text, href, special, ..., text.

    href is the address of an ordinary anchor, special a construct that Python has to see, without its "<"; both
    are None for other tokens.  A construct that is not finished is a special to the end of the input.  `foreign`
    is the grammar within <svg>, where only scripts and styles are raw text, and "/>" ends them; with `blocks`,
    the tags of blocks are specials too.
    """
    closers = ["noscript", "template", *(_BLOCKS.split() if blocks else ())]
    tags = ["a", "area", "base", "body", "frame", "frameset", "html", "link", "meta", *closers]
    texts = [] if foreign else ["title", "textarea", "xmp", "iframe", "noembed", "noframes"]
    others = ["script", "style"] if foreign else ["script", "style", "svg", "plaintext"]
    vanishing = [_element("script", _ESCAPED, closable=foreign), _element("style", closable=foreign)]
    specials = [rf"{_named(tags)}{_TAIL}", rf"/{_named(closers)}{_TAIL}", *map(_element, texts)]
    if not foreign:
        specials.append(_element("svg", rf"{_COMMENT}|!--(?s:.*+)", closable=True))
    ordinary = rf"""(?: /(?!{_named(closers)}) (?: [a-zA-Z]{_TAIL} | [^a-zA-Z>][^>]*+> | > )
        | (?!{_named([*tags, *texts, *others])}) [a-zA-Z]{_TAIL}
        | {_COMMENT} | (?: !(?!--) | \? )[^>]*+>
        | {" | ".join(vanishing)} )"""
    pattern = rf"""
    < (?=[a-zA-Z/!?]) (?: a{_BESIDE} (?: {_WS}++href="([^"]*+)"{_BESIDE} )? {_WS}*+>
        | {ordinary} {_many(f"{_WS}*+<{ordinary}")}
        | ( {" | ".join(specials)} | (?: [a-zA-Z!?] | /. ) (?s:.*+) ) )"""
    return re.compile(pattern.encode(), re.VERBOSE)


_tokenizer(), _tokenizer(foreign=True)  # compiled on import: the first page should cost what the others do

_TAG = re.compile(f"/?[a-zA-Z]{_TAIL}".encode())
_NAME = re.compile(rb"[!?/]?[a-zA-Z0-9]*")
_SPEAKING = re.compile(rf">{_WS}*+(?:[^<]|<[aA]{_END})".encode())  # finds text or an anchor in an element
_ATTRIBUTE = rf"""{_WS}++[a-zA-Z0-9:_-]++(?:=(?:"[^"]*+"|'[^']*+'|{_BARE}))?"""
_PLAIN_TAG = re.compile(rf"[a-zA-Z]++{_many(_ATTRIBUTE)}{_WS}*+/?>".encode())
_PLAIN_ATTRIBUTE = re.compile(rf"""{_WS}([a-zA-Z0-9:_-]++)(?:=(?:"([^"]*+)"|'([^']*+)'|({_BARE})))?""".encode())


class _TagReader(HTMLParser):
    """Keeps the attributes of the last start tag fed to it."""

    attributes: dict[str, str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes = {name: value or "" for name, value in reversed(attrs)}


def _read_attributes(tag: bytes) -> dict[str, str]:
    """The undecoded attributes of a start tag without its "<", by html.parser."""
    reader = _TagReader()
    reader.attributes = {}
    # how it reads references depends on the version of Python
    reader.feed("<" + tag.decode("utf-8", "replace").replace("&", "&amp;"))
    return reader.attributes


def _plain_attributes(tag: bytes) -> dict[str, str] | None:
    """The same for the usual ways to write a tag, in a third of the time; None for any other."""
    if not _PLAIN_TAG.fullmatch(tag):
        return None
    matches = reversed(_PLAIN_ATTRIBUTE.findall(tag))
    return {name.lower().decode(): (a or b or c).decode("utf-8", "replace") for name, a, b, c in matches}


def _attributes(tag: bytes) -> dict[str, str]:
    """A start tag's attributes, the first of each name, names in lower case; {} if it is unfinished or too long."""
    if len(tag) > _TAG_LIMIT:
        return {}
    attributes = _plain_attributes(tag)
    if attributes is None:
        attributes = _read_attributes(tag.replace(b"\0", _REPLACEMENT)) if _TAG.fullmatch(tag) else {}
    return {name: _unescape_attribute(value) for name, value in attributes.items()} if b"&" in tag else attributes


def _name(tag: bytes) -> bytes:
    """The name of a special in lower case, after a "/" if it is an end tag."""
    return match[0].lower() if (match := _NAME.match(tag)) else b""


def _content(tag: bytes) -> bytes:
    """What stands between the tags of an element, or after its start tag if the page ends within it."""
    opened = _TAG.match(tag)
    content = tag[opened.end() :] if opened else b""
    close = content.rfind(b"</")
    name = _name(tag)
    finished = close >= 0 and name != b"plaintext" and content[close + 2 :].lower().startswith(name)
    return content[:close] if finished else content


# ------------------------------------------------------------------------------------- characters and encodings

_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xfe\xff", "utf-16be"), (b"\xff\xfe", "utf-16le"))
_UTF_16_XML = ((b"<\0?\0x\0", "utf-16le"), (b"\0<\0?\0x", "utf-16be"))
_XML_ENCODING = re.compile(rb"""<\?xml[^>]*?encoding[\0- ]*=[\0- ]*(["'])([!-=?-~]+)\1[^>]*>""")
_LATE_META = re.compile(rb"<meta[^>]*charset[^>]*>", re.IGNORECASE)
_CHARSET = re.compile(r"""(?i:charset)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s;"']+))""", re.ASCII)
# What <meta> cannot mean: it was read as ASCII, so the page is no UTF-16 (HTML standard, section 13.2.3.2).
_META_MEANS = {"utf-16be": "utf-8", "utf-16le": "utf-8", "x-user-defined": "windows-1252"}

_REFRESH = re.compile(
    r"""\s*(?:([0-9]{1,9})|(?=\.))[0-9.]*(?:\s*[;,]\s*|\s+)(?>(?:url\s*=\s*)?)(?:"([^"]*+).*|'([^']*+).*|([^"'].*))""",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)
_REPLACEMENT = "\ufffd".encode()  # what stands for NUL in raw text and attributes; elsewhere it is dropped

_SPACES = [code for code in range(0x3001) if chr(code).isspace()]
_WORD_MAP = bytes(0x20 if code in _SPACES and code < 0x80 else 0x78 for code in range(256))
_NARROW = bytes(set(range(256)) - {chr(code).encode()[0] for code in _SPACES if code >= 0x80})  # begin no white space
# References that stand for white space; not 0x85, which numeric references take from windows-1252.
_SPACE_REFERENCE = re.compile(
    "&(?:{}|#0*+(?:{})(?![0-9]);?|#[xX]0*+(?i:{})(?![0-9a-fA-F]);?)".format(
        "|".join(sorted((name for name, text in html5.items() if text.isspace()), reverse=True)),
        "|".join(str(code) for code in _SPACES if code != 0x85),
        "|".join(f"{code:x}" for code in _SPACES if code != 0x85),
    ).encode()
)
_LONG_NUMBER = re.compile(r"&#0*(?=[0-9])([0-9]{1,8})[0-9]*")
_ATTRIBUTE_REFERENCE = re.compile(r"&(?:#[xX]?[0-9a-fA-F]+;?|[a-zA-Z][a-zA-Z0-9]*[;=]?)")


def _unescape(text: str) -> str:
    """`html.unescape`, also for numbers that int() refuses: their first eight digits say that they are invalid."""
    if "&#" in text:
        text = _LONG_NUMBER.sub(r"&#\1", text)
    return html.unescape(text)


def _unescape_attribute(value: str) -> str:
    """Decode references, of which "&copy=" and "&copyist" in an attribute are none (HTML standard, 13.2.5.73)."""

    def decode(match: re.Match[str]) -> str:
        reference = match[0]
        return _unescape(reference) if reference[1] == "#" else html5.get(reference[1:], reference)

    return _ATTRIBUTE_REFERENCE.sub(decode, value)


def _fold(text: str) -> str | None:
    """Trim and collapse white space; None if nothing is left."""
    return " ".join(text.split()) or None


def _count_words(text: bytes) -> int:
    """`len(text.split())` of the decoded text; where all white space is ASCII, without making the words."""
    if b"&" in text:
        text = _SPACE_REFERENCE.sub(b" ", text)
    if not text.translate(None, _NARROW):
        return (b" " + text).translate(_WORD_MAP).count(b" x")
    return len(text.decode("utf-8", "replace").split())


def _content_charset(content_type: str) -> str | None:
    """The charset of a Content-Type, by its standard name; None if there is none or it is unknown."""
    match = _CHARSET.search(content_type)
    return name_of(match[1] or match[2] or match[3] or "") if match else None


def _meta_charset(head: bytes) -> str | None:
    """The first known charset that a <meta> declares, by its standard name."""
    for tag in filter(None, _tokenizer().split(head)[2::3]):
        attributes = _attributes(tag) if _name(tag) == b"meta" else {}
        name = name_of(attributes.get("charset", ""))
        if not name and attributes.get("http-equiv", "").lower() == "content-type":
            name = _content_charset(attributes.get("content", ""))
        if name:
            return _META_MEANS.get(name, name)
    return None


def sniff(body: bytes, content_type: str | None) -> str:
    """The standard name of the page's encoding (HTML standard, section 13.2.3)."""
    for mark, encoding in _BOMS:
        if body.startswith(mark):
            return encoding
    if name := _content_charset(content_type or ""):
        return name
    for start, encoding in _UTF_16_XML:
        if body.startswith(start):
            return encoding
    if name := _meta_charset(body[:_PRESCAN]):
        return name
    if (declared := _XML_ENCODING.match(body)) and (name := name_of(declared[2].decode("latin-1"))):
        return _META_MEANS.get(name, name)
    try:
        body.decode()
    except UnicodeDecodeError:  # a browser begins anew when it comes to a <meta> further down
        late = _LATE_META.search(body, 0, _TAG_LIMIT)
        return (_meta_charset(body[: late.end()]) if late else None) or "windows-1252"
    return "utf-8"


# ----------------------------------------------------------------------------------------------------------- links

# Addresses that joining only puts a prefix to: nothing to drop or to encode, no dot segments but leading "../".
_SEGMENT = r"[a-zA-Z0-9_~!$&()*+,;=:@.%-]*+"
_PLAIN = (
    r"(?:((?:https?:)?//[^/?#\\@%\x00-\x20]{1,255}+)?/(?![/.%])|([a-zA-Z0-9_](?![^/?\0]*:)|(?:\.\./){1,9}(?![/.%])))"
    rf"{_SEGMENT}{_many(rf'/(?![.%]){_SEGMENT}')}(?:\?[a-zA-Z0-9_~!$&()*+,;=:@./?%-]*+)?"
)
_PLAIN_URL = re.compile(_PLAIN, re.ASCII)
_ADDRESSES = re.compile(rf"({_PLAIN})(?:#[^\0]*+)?\0|([^\0]*+)\0", re.ASCII)
_QUERY = re.compile(r"(?<![^\0])([^?#\0]*+\?)([^#\0]*+)")
_FOREIGN = re.compile(r"(?!https?:)[a-z][a-z0-9+.-]*+:", re.ASCII | re.IGNORECASE)  # no http(s) URL


def _join(base: str | None, href: str) -> str | None:
    """The absolute URL of `href`, if there is one and it is http(s) (URL standard, section 4.4)."""
    try:
        url = ada_url.join_url(base, href) if base else ada_url.normalize_url(href)
    except ValueError:
        return None
    return url if url.startswith(("http://", "https://")) else None


@lru_cache(maxsize=4096)
def _is_canonical(origin: str) -> bool:
    """Whether "scheme://host:port" is what the URL standard makes of it."""
    return _join(None, origin + "/") == origin + "/"


def is_normal(url: str) -> bool:
    """Whether an http(s) URL is sure to be as the URL standard writes it, so that normalising it changes nothing."""
    plain = _PLAIN_URL.fullmatch(url)
    return plain is not None and plain[1] is not None and _is_canonical(plain[1])


def _resolve(base: str | None, hrefs: Collection[bytes | str], encoding: str = "utf-8") -> list[str | None]:
    """The http(s) URLs without fragment, or None, that the hrefs mean: raw bytes, or strings decoded already.

    What `_join` returns for each, but in one search for all: for the usual addresses a prefix is all that it takes.
    Between them stands the one character that none can have, for the HTML standard replaces it.
    """
    if not hrefs:
        return []
    raw = [href if isinstance(href, bytes) else href.replace("&", "&amp;").encode("utf-8", "replace") for href in hrefs]
    text = b"\0".join(raw).decode("utf-8", "replace")
    if text.count("\0") >= len(raw):
        text = b"\0".join([href.replace(b"\0", "\ufffd".encode()) for href in raw]).decode("utf-8", "replace")
    if "&" in text:
        text = _unescape_attribute(text)
    if not (text.isascii() or encoding.startswith("utf-") or encoding == "replacement"):
        text = _QUERY.sub(lambda found: found[1] + escape_query(found[2], encoding), text)
    scheme = root = folder = ""
    if base:
        base = base.partition("#")[0]
        scheme = base[: base.index("/")]
        root = base[: base.index("/", 8)]
        folder = base[: base.rindex("/", 0, (base + "?").index("?")) + 1]
    urls: list[str | None] = []
    for address, origin, relative, other in _ADDRESSES.findall(text + "\0"):
        if origin and origin[0] != "/" and _is_canonical(origin):
            urls.append(address)
        elif origin and base and _is_canonical(scheme + origin):
            urls.append(scheme + address)
        elif base and other.startswith("#"):
            urls.append(base)
        elif origin or other or not base:
            url = None if _FOREIGN.match(other) else _join(base, address or other)
            urls.append(url and url.partition("#")[0])
        elif not relative:
            urls.append((root if address else base) + address)
        elif relative[0] != ".":
            urls.append(folder + address)
        else:
            above = folder
            for _ in range(0, len(relative), 3):
                above = above[: max(above.rindex("/", 0, -1), len(root)) + 1]
            urls.append(above + address[len(relative) :])
    return urls


# --------------------------------------------------------------------------------------------------------- the scan


class _Scan:
    """What one pass over a page finds, before any address is resolved.

    `hrefs` has the raw bytes of ordinary anchors and the decoded strings of unusual ones, in order.  Of the latter,
    `followed` and `unfollowed` are those without and with rel=nofollow; ordinary anchors never have it.
    """

    def __init__(self, page: bytes, *, blocks: bool = False) -> None:
        self.texts: list[bytes] = []
        self.hrefs: dict[bytes | str, None] = {}
        self.followed: set[str] = set()
        self.unfollowed: set[str] = set()
        self.title: str | None = None
        self.base: str | None = None
        self.language: str | None = None
        self.description: str | None = None
        self.robots: list[str] = []
        self.agent_robots: list[str] = []
        self.canonical: list[str] = []
        self.feeds: list[str] = []
        self.frames: dict[str, None] = {}
        self.refresh: tuple[float, str] | None = None
        self._blocks = blocks
        self._in_body = self.in_frames = False
        self._open = {b"noscript": 0, b"template": 0}
        self._split(page)
        if self.in_frames:
            self.texts.clear()

    def _split(self, page: bytes, *, foreign: bool = False) -> None:
        """Tokenize the page piece by piece.

        A construct that is open at the end of a piece comes out unfinished, as the last special, and the next piece
        begins with it; if this one did so too, the next may be twice as long, so that the work stays linear.
        """
        split = _tokenizer(foreign=foreign, blocks=self._blocks).split
        start, size = 0, _PIECE
        while start < len(page):
            end = _cut(page, start, size)
            parts = split(page[start:end])
            if end < len(page) and len(parts) > 1 and parts[-2] and not parts[-1]:
                end -= len(parts[-2]) + 1
                del parts[-3:]
            self._take(parts)
            size = _PIECE if end > start else 2 * size
            start = end

    def _take(self, parts: list[Any]) -> None:
        """Read the specials of a split page; what they mean as text or href takes the place of the part beside."""
        start = 0
        for i in compress(range(2, len(parts), 3), parts[2::3]):
            tag: bytes = parts[i]
            match name := _name(tag):
                case b"a":
                    parts[i - 1] = self._anchor(tag)
                case b"meta" | b"link" | b"html" | b"base":
                    if not self._open[b"template"]:
                        self._metadata(name, tag)
                case b"noscript" | b"template" | b"/noscript" | b"/template":
                    self._gather(parts[start:i])
                    start = i + 1
                    element = name.removeprefix(b"/")
                    self._open[element] = max(0, self._open[element] + (1 if name == element else -1))
                case b"svg" if _SPEAKING.search(tag):
                    self._gather(parts[start:i])
                    start = i + 1
                    self._split(_content(tag).replace(b"\0", _REPLACEMENT), foreign=True)
                case b"frame" | b"area":
                    self._frame(tag, "href" if name == b"area" else "src")
                case b"title" | b"textarea" | b"xmp" | b"iframe" | b"noembed" | b"noframes" | b"plaintext":
                    if name == b"iframe" and (opened := _TAG.match(tag)):
                        self._frame(opened[0], "src")
                    content = _content(tag).replace(b"\0", _REPLACEMENT)
                    if name == b"title" and self.title is None and not any(self._open.values()):
                        self.title = _fold(_unescape(content.decode("utf-8", "replace"))) or ""
                    if name not in (b"title", b"textarea"):
                        content = content.replace(b"&", b"&amp;")  # there are no references in raw text
                    if self._in_body or name not in (b"title", b"noframes"):
                        parts[i + 1] = content + b" " + parts[i + 1]
                case b"body":
                    self._in_body = True
                case b"frameset" if not (self._in_body or self.in_frames):
                    self._in_body = _count_words(b" ".join([*self.texts, *parts[:i:3]])) > 0
                    self.in_frames = not self._in_body
                case _ if self._blocks:
                    parts[i + 1] = _BREAK + parts[i + 1]
        self._gather(parts[start:])

    def _gather(self, parts: list[Any]) -> None:
        """Keep the texts and hrefs of a stretch of parts, as far as no open element hides them."""
        if not self._open[b"template"]:
            self.hrefs.update(dict.fromkeys(href for href in parts[1::3] if href is not None))
            if not self._open[b"noscript"]:
                self.texts.append(b" ".join(parts[::3]).replace(b"\0", b""))

    def _anchor(self, tag: bytes) -> str | None:
        if b"href" not in tag.lower():
            return None
        attributes = _attributes(tag)
        href = attributes.get("href")
        if href is not None and not self._open[b"template"]:
            nofollow = "nofollow" in attributes.get("rel", "").lower().split()
            (self.unfollowed if nofollow else self.followed).add(href)
        return href

    def _frame(self, tag: bytes, attribute: str) -> None:
        attributes = {} if self._open[b"template"] else _attributes(tag)
        if attribute in attributes and "nofollow" not in attributes.get("rel", "").lower().split():
            self.frames[attributes[attribute]] = None

    def _metadata(self, name: bytes, tag: bytes) -> None:
        lower = tag.lower()
        if name == b"meta" and b"refresh" in lower and self.refresh is None and not self._open[b"noscript"]:
            attributes = _attributes(tag)
            if attributes.get("http-equiv", "").strip().lower() == "refresh":
                self.refresh = read_refresh(attributes.get("content", ""))
        refusing = b"no" in lower and (b"noindex" in lower or b"nofollow" in lower or b"none" in lower)
        if name == b"meta" and (refusing or b"description" in lower or b"robots" in lower):
            attributes = _attributes(tag)
            content = attributes.get("content", "")
            match attributes.get("name", "").strip().lower():
                case "description":
                    self.description = self.description or _fold(content)
                case "robots":
                    self.robots += filter(None, map(str.strip, content.lower().split(",")))
                case agent if refusing and _AGENT.fullmatch(agent):
                    asked = map(str.strip, content.lower().split(","))
                    self.agent_robots += [f"{agent}: {directive}" for directive in asked if directive in _REFUSALS]
        elif name == b"link" and (b"canonical" in lower or b"alternate" in lower):
            attributes = _attributes(tag)
            rel = attributes.get("rel", "").lower().split()
            if href := attributes.get("href"):
                if "canonical" in rel:
                    self.canonical.append(href)
                if "alternate" in rel and attributes.get("type", "").strip().lower() in _FEED_TYPES:
                    self.feeds.append(href)
        elif name == b"base" and self.base is None:
            self.base = _attributes(tag).get("href")
        elif name == b"html" and self.language is None:
            self.language = _fold(_attributes(tag).get("lang", ""))


def read_refresh(content: str) -> tuple[float, str] | None:
    """(Seconds, address) that a refresh names (HTML standard, "shared declarative refresh steps"); None: it has no
    address, or is none."""
    found = _REFRESH.fullmatch(content)
    address = found and (found[2] or found[3] or found[4] or "").strip()
    return (float(found[1] or 0), address) if found and address else None


def _cut(page: bytes, start: int, size: int) -> int:
    """Where a piece of about `size` bytes from `start` ends: before a token or a new word."""
    if len(page) - start <= size:
        return len(page)
    for mark in (b"</", b" ", b"\n", b"<"):
        end = page.rfind(mark, start + 1, start + size)
        if end > 0 and (mark != b"<" or page[end + 1 : end + 2].isalpha()):
            return end
    end = page.find(b"</", start + size)
    return end if end > 0 else len(page)


# --------------------------------------------------------------------------------------------------------- the page


@dataclass(slots=True)
class Page:
    """What `parse_page` returns.  URLs are absolute, http or https, without fragment.

    A page holds on to the body that it was made from until `text` has been read: keep fields, not pages.
    """

    title: str | None  # of the first <title> of the document, white space folded; None if absent or empty
    links: list[str]  # targets of <a href>, each once, in order of first appearance
    word_count: int  # white-space separated tokens in the text nodes of the body
    canonical: str | None  # <link rel=canonical>
    description: str | None  # <meta name=description>, white space folded
    language: str | None  # <html lang>, as written
    robots: tuple[str, ...]  # directives of <meta name=robots>, lower-cased: ("noindex", "nofollow")
    agent_robots: tuple[str, ...]  # refusals of one crawler, by its name, as X-Robots-Tag has them: ("abot: noindex",)
    feeds: list[str]  # <link rel=alternate> to RSS or Atom
    frames: list[str]  # <frame>, <iframe> and <area>, each once
    refresh: tuple[float, str] | None  # <meta http-equiv=refresh>: seconds, URL
    frameset: bool  # the page is a frameset: it has no body
    encoding: str  # name in the WHATWG encoding standard, lower-cased
    nofollow: frozenset[str]  # those of `links` of which every <a> carries rel=nofollow
    _body: bytes = field(repr=False, compare=False)
    _text: str | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def text(self) -> str:
        """The visible text, extracted when first asked for: words between blanks, blocks on lines of their own.

        It has the words that `word_count` counts: each text node's for itself, so "foo<b>bar</b>" is two words.
        """
        body = self._body  # read before `_text`, since another thread may set this one and then drop that one
        if self._text is None:
            texts = _Scan(transcode(body, self.encoding), blocks=True).texts
            marked = _SPACE_REFERENCE.sub(b" ", b" ".join(texts)).decode("utf-8", "replace")
            self._text = "\n".join(filter(None, map(_fold, _unescape(marked).split(_BREAK.decode()))))
            self._body = b""
        return self._text


def parse_page(body: bytes, url: str, content_type: str | None = None) -> Page:
    """The facts of one HTML page; never raises, whatever the bytes.

    `url` is where the page came from, redirects followed; if it is no http(s) URL, only absolute links are found.
    `content_type` is the HTTP header, read for its charset.
    """
    encoding = sniff(body, content_type)
    scan = _Scan(transcode(body, encoding))
    base = url if is_normal(url) else _join(None, url)
    if base and scan.base is not None:
        base = _join(base, scan.base) or base
    urls = _resolve(base, scan.hrefs, encoding)
    links = list(dict.fromkeys(filter(None, urls)))
    nofollow: frozenset[str] = frozenset()
    if unfollowed := scan.unfollowed - scan.followed:
        followed = {url for href, url in zip(scan.hrefs, urls, strict=True) if href not in unfollowed}
        nofollow = frozenset(links) - followed
    leads = _resolve(base, [scan.refresh[1]], encoding)[0] if scan.refresh else None
    return Page(
        title=scan.title or None,
        links=links,
        word_count=sum(map(_count_words, scan.texts)),
        canonical=next(filter(None, _resolve(base, scan.canonical, encoding)), None),
        description=scan.description,
        language=scan.language,
        robots=tuple(scan.robots),
        agent_robots=tuple(scan.agent_robots),
        feeds=list(dict.fromkeys(filter(None, _resolve(base, scan.feeds, encoding)))),
        frames=list(dict.fromkeys(filter(None, _resolve(base, scan.frames, encoding)))),
        refresh=(scan.refresh[0], leads) if leads and scan.refresh else None,
        frameset=scan.in_frames,
        encoding=encoding,
        nofollow=nofollow,
        _body=body,
    )
