"""One datagram, bytes in, events out: RFC 5424, RFC 3164 and what devices make of it, JSON objects, plain text.

Theory.  A sender of logs by UDP cannot be asked again and does not hear a refusal.  So there is no input that is
refused: what cannot be understood becomes an event whose ``message`` is the raw text and whose ``parse_error`` says
why.  What could be understood of it (severity, service, time) fills the other columns all the same.

Promised:
- No bytes make `parse` raise.  Its time is linear in their number, and a datagram gives at most `MAX_LINES` events.
- Every text can be stored by PostgreSQL as text, ``attributes`` as jsonb: no NUL, no half of a surrogate pair, no
  nesting that jsonb refuses.  A NUL and bytes that are no UTF-8 are shown as ``\\x00``, ``\\xff`` and so on.
- With a ``parse_error`` the message is the whole raw text, so nothing that was cut, left out or replaced is lost.

One datagram, how many events (RFC 5426 says: one; senders say otherwise):
- Terminators at its end (NUL, CR, LF) and a byte order mark before it are no part of it.  An empty datagram is one
  event, with a ``parse_error``.
- If it begins as syslog, each line that begins with ``<PRI>`` begins an event; other lines belong to the message
  before, so that a stack trace stays whole.  A sender who lets others write into its lines can be made to lie.
- If it begins with ``{``: a JSON object, pretty-printed or not, is one event; objects line by line are one each.
- Anything else: an event a line.  Blank lines are no events.

Time.  A year that is not given (RFC 3164) is the one that brings the time nearest to ``received_at``.  A time without
a zone is in ``zone``; so is one with a name like CST, which means several zones.  A time more than `AHEAD` in the
future or `BEHIND` in the past is not believed.  Whatever is not taken as it was said is kept in the attribute
``claimed_event_at``.

Attributes: of syslog ``facility`` (0 to 23), ``procid``, ``msgid``, ``structured_data`` ({id: {name: value}}; a name
that comes twice has a list), ``sequence`` (Cisco); of JSON the keys that filled no column, as they were.

Not promised: JSON numbers beyond 64-bit integers and doubles (they become doubles; beyond 1e308 it is no JSON here),
and of a key that comes twice in an object all but the last.  In text without ``<PRI>`` only a BSD time at its beginning
is taken for syslog.  A JSON object inside a syslog message stays text.

Every function is pure; nothing waits or locks.  An event costs 2 to 7 us, so it runs in the event loop.
"""

import itertools
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, NamedTuple

import orjson

AHEAD = timedelta(days=1)  # how far ahead of our clock a sender's may be
BEHIND = timedelta(days=365)  # how old an event may be when it comes
MAX_LINES = 1000
"""Events from one datagram: a bound on the time that one may cost. What follows stays together in the last."""
MAX_NAME = 255  # characters of a service or a host

_HALF_A_YEAR = timedelta(days=182)

UNKNOWN_SERVICE = "unknown"  # the service of an event that names none
INFORMATIONAL = 6  # the severity of an event that names none

EMPTY = "empty"
NOT_UTF8 = "not UTF-8"
NUL = "contains NUL"
BAD_PRIORITY = "priority above 191"
BAD_HEADER = "RFC 5424: header"
BAD_DATA = "RFC 5424: structured data"
BAD_TIME = "time"
TOO_DEEP = "JSON: nested too deep"
TOO_MANY_LINES = f"more than {MAX_LINES} lines"
LONG_SERVICE = f"service longer than {MAX_NAME} characters"
LONG_HOST = f"host longer than {MAX_NAME} characters"


class Event(NamedTuple):
    """One log record. See the head of this file for what its texts may hold."""

    received_at: datetime  # aware, by our clock
    event_at: datetime  # aware, UTC: what the sender says if that can be, else ``received_at``
    service: str
    """APP-NAME, tag, or a key of the JSON object; `UNKNOWN_SERVICE` if there is none. At most `MAX_NAME` characters."""
    host: str  # what the sender says, else the source address. At most `MAX_NAME` characters.
    severity: int  # 0 (emergency) to 7 (debug), as RFC 5424 numbers them; `INFORMATIONAL` if none is given
    message: str
    attributes: str  # a JSON object as text, ``{}`` if there is nothing more to say
    parse_error: str | None  # short reasons, by "; ". If there is one, ``message`` is the raw text.


class Metadata(NamedTuple):
    """What is known of a service."""

    team: str
    environment: str
    region: str
    version: str


# Patterns meet every byte a bounded number of times: what may follow a repetition never begins as it goes on.

_VALUE = r'"(?>[^"\\]*(?:\\.[^"\\]*)*)"'  # `]` unescaped in it is let pass
_ELEMENT = rf'(?>\[[^\s=\]"]+(?:\ +[^\s=\]"]+={_VALUE})*\ *\])'

_RFC5424 = re.compile(
    rf"""<([0-9]{{1,3}})>1
    \ (-|[0-9]{{4}}-[^ \n]+)                        # time
    \ ([^ \n]+)\ ([^ \n]+)\ ([^ \n]+)\ ([^ \n]+)  # host, app, procid, msgid
    \ (?:-|((?:{_ELEMENT})+))
    (?:\ |(?=\n)|\Z)(.*)""",
    re.ASCII | re.DOTALL | re.VERBOSE,
).match

_RFC5424_BROKEN = re.compile(
    r"<([0-9]{1,3})>1 (?:(-|[0-9]{4}-[^ \n]+) ([^ \n]+) ([^ \n]+) ([^ \n]+) ([^ \n]+)(?![^ \n]))?"
).match

_IN_DATA = re.compile(r'\ ([^\s=\]"]+)="([^"\\]*(?:\\.[^"\\]*)*)"|\[([^\s=\]"]+)', re.ASCII | re.DOTALL).findall
_DATA_ESCAPE = re.compile(r'\\(["\\\]])').sub

_MONTHS = {
    name: number
    for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), start=1)  # noqa: SIM905
}
_YEAR = "(?:19|20)[0-9][0-9]"
_WORD = r"""[^\s\[\]"'{}=<>,;]"""
_TAG = rf"(?:(?!:){_WORD}+?(?:\[[^\s\]]*\]:?|:(?=\s|\Z)))"  # name: or name[pid]: or name[pid]

_RFC3164 = re.compile(
    rf"""(?:<(?P<priority>[0-9]{{1,3}})>\ ?)?
    (?:
        (?:(?P<sequence>[0-9]{{1,20}})?:\ )?           # Cisco: 29: or only a colon
        (?:(?P<origin>[^\s:]+):\ ?)?                   # Cisco: a name before the time
        (?P<time>
            [*.]?                                      # Cisco: a clock that was not set
            (?:(?P<year1>{_YEAR})\ )?
            (?P<month>{"|".join(_MONTHS)})\ {{1,2}}(?P<day>[0-9]{{1,2}})
            (?:\ (?P<year2>{_YEAR}))?
            \ (?P<clock>[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}})(?:[.,](?P<fraction>[0-9]{{1,9}}))?
            (?:\ (?P<zone>(?:UTC|GMT)(?=[\s:])|[A-Z]{{2,5}}(?=:\ %|\ {_YEAR}[\s:])))?
            (?:\ (?P<year3>{_YEAR})(?=[\s:]))?
        |   (?P<iso>{_YEAR}-[0-9]{{2}}-[0-9]{{2}}[T ][0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}
                (?:[.,][0-9]{{1,9}})?(?:Z|[+-][0-9]{{2}}:?[0-9]{{2}})?)
        |   (?P<uptime>[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}|(?:[0-9]{{1,4}}[ywdhms]){{1,4}})(?=:)
        )
        (?::?\ +|:?\Z)
        (?:(?!{_TAG})(?P<host>[^\s\[\]"'(){{}}=]+)(?:\ +|\Z)(?::\ +)?)?  # ASA: host : %ASA-...
    )?
    (?:(?P<tag>(?!:){_WORD}+?)(?:\[(?P<pid>[^\s\]]*)\]:?|:(?=\s|\Z))\ ?)?
    (?P<message>.*)""",
    re.ASCII | re.DOTALL | re.VERBOSE,
).match

_SHOWN = {0xDC00 + byte: rf"\x{byte:02x}" for byte in range(0x80, 0x100)}
"""Bytes that are no UTF-8, as the error handler surrogateescape leaves them; backslashreplace would be slower."""

_BEGINS_SYSLOG = re.compile(rb"<[0-9]{1,3}>").match
_JSON_NUL = re.compile(r"(\\\\)|\\u0000").sub

_TIME_KEYS = ("time", "timestamp", "ts", "@timestamp", "datetime", "@t")
_LEVEL_KEYS = ("level", "severity", "log.level", "levelname", "lvl", "@l")
_SERVICE_KEYS = ("service", "app", "service.name", "service_name", "application", "logger")
_HOST_KEYS = ("host", "hostname", "host.name")
_MESSAGE_KEYS = ("message", "msg", "short_message", "@m")

_LEVELS = {
    "emergency": 0, "emerg": 0, "panic": 0, "alert": 1, "critical": 2, "crit": 2, "fatal": 2, "error": 3, "err": 3,
    "warning": 4, "warn": 4, "notice": 5, "informational": 6, "information": 6, "info": 6, "debug": 7, "trace": 7,
    "verbose": 7,
    **{str(number): number for number in range(8)},
    "10": 7, "20": 7, "30": 6, "40": 4, "50": 3, "60": 2,  # pino and bunyan
}  # fmt: skip


def parse(datagram: bytes, source: str, received_at: datetime, zone: tzinfo = UTC) -> list[Event]:
    """The events in ``datagram``, at least one. ``source``: the address it came from; ``received_at``: aware, UTC."""
    datagram = datagram.rstrip(b"\0\r\n")
    if b"\n" not in datagram:
        return [_event(datagram, source, received_at, zone)]
    return [_event(part, source, received_at, zone, error) for part, error in _parts(datagram)]


def _parts(datagram: bytes) -> list[tuple[bytes, str | None]]:
    """A piece for each event of a datagram of several lines, as the head of this file has it, and what is wrong."""
    datagram = datagram.lstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf")
    if datagram.startswith(b"{") and not datagram.partition(b"\n")[0].rstrip().endswith(b"}"):
        return [(datagram, None)]
    lines = datagram.split(b"\n", MAX_LINES - 1)
    error = TOO_MANY_LINES if b"\n" in lines[-1].rstrip() else None
    if _BEGINS_SYSLOG(datagram):
        begins = [number for number, line in enumerate(lines) if _BEGINS_SYSLOG(line)]
        parts = [b"\n".join(lines[begin:end]) for begin, end in itertools.pairwise([*begins, len(lines)])]
    else:
        parts = [line for line in lines if line.strip()] or [datagram]
    return [*((part.rstrip(b"\r\n"), None) for part in parts[:-1]), (parts[-1].rstrip(b"\r\n"), error)]


def _event(line: bytes, source: str, received_at: datetime, zone: tzinfo, error: str | None = None) -> Event:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text, error = line.decode(errors="surrogateescape").translate(_SHOWN), _and(error, NOT_UTF8)
    if "\0" in text:
        text, error = text.replace("\0", r"\x00"), _and(error, NUL)
    if text.startswith("\ufeff"):
        text = text[1:]

    if text.startswith("<") and (found := _RFC5424(text)):
        fields = _rfc5424(found.groups(), received_at, zone)
    elif text.startswith("{"):
        fields = _json(text, received_at, zone)
    else:
        fields = _other(text, received_at, zone)
    at, service, host, severity, message, more, reason = fields

    service, host = service or UNKNOWN_SERVICE, host or source
    attributes = "{}"
    try:
        if more:
            attributes = orjson.dumps(more).decode()
    except TypeError:  # deeper than 254, which only JSON can be
        error = _and(error, TOO_DEEP)
    if reason is not None:
        error = _and(error, reason)
    if len(service) > MAX_NAME:
        service, error = service[:MAX_NAME], _and(error, LONG_SERVICE)
    if len(host) > MAX_NAME:
        host, error = host[:MAX_NAME], _and(error, LONG_HOST)
    return Event(received_at, at, service, host, severity, message if error is None else text, attributes, error)


def _and(error: str | None, reason: str) -> str:
    return reason if error is None else f"{error}; {reason}"


_Fields = tuple[datetime, str | None, str | None, int, str, dict[str, Any], str | None]
"""event_at, service, host, severity, message, attributes, why it could not be understood."""


def _other(text: str, received_at: datetime, zone: tzinfo) -> _Fields:
    """What is neither good RFC 5424 nor JSON."""
    if broken := _RFC5424_BROKEN(text):
        at, service, host, severity, _, more, error = _rfc5424((*broken.groups("-"), None, ""), received_at, zone)
        reason = BAD_HEADER if broken[2] is None else BAD_DATA
        return at, service, host, severity, text, more, _and(error, reason)
    found = _RFC3164(text)
    if found and (found["priority"] or found["month"]):
        return _rfc3164(found, received_at, zone)
    return received_at, None, None, INFORMATIONAL, text, {}, None if text.strip() else EMPTY


def _rfc5424(groups: tuple[str | Any, ...], received_at: datetime, zone: tzinfo) -> _Fields:
    priority, said, host, service, procid, msgid, data, message = groups
    severity, more, error = _priority(priority)
    if procid != "-":
        more["procid"] = procid
    if msgid != "-":
        more["msgid"] = msgid
    if data is not None:
        more["structured_data"] = _structured_data(data)
    at = received_at
    if said != "-":
        claimed = _iso(said, zone)
        if claimed is None:
            error = _and(error, BAD_TIME)
        at = _believed(claimed, said, received_at, more)
    if message.startswith("\ufeff"):
        message = message[1:]
    return at, None if service == "-" else service, None if host == "-" else host, severity, message, more, error


def _priority(digits: str | None) -> tuple[int, dict[str, Any], str | None]:
    """Severity, the attributes to begin with, what is wrong."""
    if digits is None:
        return INFORMATIONAL, {}, None
    number = int(digits)
    if number > 191:
        return INFORMATIONAL, {}, BAD_PRIORITY
    return number & 7, {"facility": number >> 3}, None


def _structured_data(data: str) -> dict[str, dict[str, str | list[str]]]:
    elements: dict[str, dict[str, str | list[str]]] = {}
    element: dict[str, str | list[str]] = {}
    for name, value, identifier in _IN_DATA(data):
        if identifier:
            element = elements.setdefault(identifier, {})
            continue
        if "\\" in value:
            value = _DATA_ESCAPE(r"\1", value)
        before = element.get(name)
        if before is None:
            element[name] = value
        elif isinstance(before, list):
            before.append(value)
        else:
            element[name] = [before, value]
    return elements


def _rfc3164(found: re.Match[str], received_at: datetime, zone: tzinfo) -> _Fields:
    severity, more, error = _priority(found["priority"])
    service, host, said = found["tag"], found["host"] or found["origin"], found["time"]
    if found["sequence"]:
        more["sequence"] = found["sequence"]
    if found["pid"]:
        more["procid"] = found["pid"]
    if service and service.startswith("%"):  # Cisco: %FACILITY-SEVERITY-MNEMONIC
        more["msgid"] = service[1:]
        service = service[1:].partition("-")[0]
    at = received_at
    if said:
        claimed = None
        if found["month"]:
            claimed = _bsd_time(found, received_at, zone)
        elif found["iso"]:
            claimed = _iso(said, zone)
        if claimed is None and not found["uptime"]:
            error = _and(error, BAD_TIME)
        at = _believed(claimed, said, received_at, more)
        if found["zone"] not in (None, "UTC", "GMT"):
            more["claimed_event_at"] = said
    return at, service, host, severity, found["message"], more, error


def _json(text: str, received_at: datetime, zone: tzinfo) -> _Fields:
    """A JSON object. The first key of each kind that can be used fills its column; the others are attributes."""
    error = None
    if r"\u0000" in text:
        shown = _JSON_NUL(lambda found: found[1] or r"\\x00", text)
        if shown != text:  # it may have been a backslash and "u0000"
            text, error = shown, NUL
    try:
        record: dict[str, Any] = orjson.loads(text)
    except orjson.JSONDecodeError as bad:
        return received_at, None, None, INFORMATIONAL, text, {}, f"JSON: {bad.msg}"
    service, host = _text_of(record, _SERVICE_KEYS), _text_of(record, _HOST_KEYS)
    message = _text_of(record, _MESSAGE_KEYS) or ""
    severity = _severity_of(record)
    return _time_of(record, received_at, zone), service, host, severity, message, record, error


def _text_of(record: dict[str, Any], keys: Iterable[str]) -> str | None:
    for key in keys:
        if key in record and isinstance(value := record[key], str) and value:
            del record[key]
            return value
    return None


def _severity_of(record: dict[str, Any]) -> int:
    for key in _LEVEL_KEYS:
        if key in record and isinstance(value := record[key], (str, int)):
            severity = _LEVELS.get(str(value).lower())
            if severity is not None:
                del record[key]
                return severity
    return INFORMATIONAL


def _time_of(record: dict[str, Any], received_at: datetime, zone: tzinfo) -> datetime:
    for key in _TIME_KEYS:
        if key not in record:
            continue
        said = record[key]
        if not isinstance(said, str):
            claimed = _epoch(said)
        elif said.isascii() and said.replace(".", "", 1).isdecimal():
            claimed = _epoch(float(said))
        else:
            claimed = _iso(said, zone)
        if claimed is None:
            continue
        if "claimed_event_at" in record:  # somebody did not believe it before us, and has said so
            return _believed(claimed, said, received_at, {})
        del record[key]
        return _believed(claimed, said, received_at, record)
    return received_at


def _believed(claimed: datetime | None, said: Any, received_at: datetime, more: dict[str, Any]) -> datetime:
    """``claimed`` if that can be; else ``received_at``, and what was said is noted in ``more``."""
    if claimed is not None and -BEHIND <= claimed - received_at <= AHEAD:
        return claimed
    more["claimed_event_at"] = said
    return received_at


def _iso(said: str, zone: tzinfo) -> datetime | None:
    """A time of RFC 3339 or ISO 8601, in UTC."""
    try:
        at = datetime.fromisoformat(said)
        if at.tzinfo is UTC:
            return at
        return (at if at.tzinfo else at.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _epoch(said: Any) -> datetime | None:
    """A number of seconds of the Unix epoch, or of milli-, micro- or nanoseconds: what makes it a time of our days."""
    if type(said) not in (int, float):
        return None
    size = abs(said)
    unit = 1 if size < 1e11 else 1_000 if size < 1e14 else 1_000_000 if size < 1e17 else 1_000_000_000
    try:
        return datetime.fromtimestamp(said / unit, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _bsd_time(found: re.Match[str], received_at: datetime, zone: tzinfo) -> datetime | None:
    """The time in UTC; without a year, in the year that brings it nearest to ``received_at``."""
    month, day, clock = _MONTHS[found["month"]], int(found["day"]), found["clock"]
    hour, minute, second = int(clock[:2]), int(clock[3:5]), int(clock[6:])
    microsecond = int(found["fraction"].ljust(6, "0")[:6]) if found["fraction"] else 0
    zone = UTC if found["zone"] in ("UTC", "GMT") else zone
    year = found["year1"] or found["year2"] or found["year3"]
    this = received_at.year
    nearest = None
    for candidate in (int(year),) if year else (this, this - 1, this + 1):
        try:
            at = datetime(candidate, month, day, hour, minute, second, microsecond, zone)
            at = at if zone is UTC else at.astimezone(UTC)
        except (ValueError, OverflowError):
            continue  # 29 February, say
        if nearest is None or abs(at - received_at) < abs(nearest - received_at):
            nearest = at
        if abs(at - received_at) < _HALF_A_YEAR:
            break
    return nearest
