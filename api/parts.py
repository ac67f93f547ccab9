"""What the API knows of its upstreams' answers: data, errors, refusals, and the part that an answer shows.

JSON is checked, and passed on as it came: numbers keep their digits. What an upstream says when it fails is told in a
closed list of words. Values only; nothing here waits.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import NamedTuple

import orjson

DEPTH = 200  # brackets in a body below which it is not nested too deeply, whatever it is


class UpstreamError(Exception):
    """Why a call failed, in words that may reach a client: ``kind`` is one of KINDS."""

    KINDS = ("connect", "timeout", "http", "too_large", "not_json", "missing")

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.retry_after = retry_after  # seconds
        # whether to try again at once makes sense, and the circuit counts it
        self.is_transient = kind in ("connect", "timeout") or detail in ("500", "502", "503", "504")
        self.is_pause = detail == "429"  # for all keys
        self.is_for_later = not self.is_pause and (bool(retry_after) or not self.is_transient)  # for its key


class Refused(Exception):
    """No call was made; ``state`` is that of the part: "open", "paused" or "busy". Ask again in ``retry_after`` s."""

    STATES = ("open", "paused", "busy")

    def __init__(self, state: str, why: str, retry_after: float) -> None:
        super().__init__(why)
        self.state, self.retry_after = state, retry_after


class Data:
    """The answer of an upstream as JSON: each of our answers copies it and hashes ``digest``."""

    __slots__ = ("digest", "encoded")

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded
        self.digest = hashlib.blake2b(encoded, digest_size=12).hexdigest()


def read_data(body: bytes, keep: str) -> Data:
    """The data in an answer: all of it as it came, or the part that ``keep`` names (``a.b``), encoded anew.

    ``UpstreamError`` if it is no JSON, or has no such part.
    """
    body = body.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n")
    try:
        part = orjson.loads(body)
        for name in filter(None, keep.split(".")):
            if not isinstance(part, dict) or name not in part:
                raise UpstreamError("missing", keep)
            part = part[name]
        # encoding fails on what is nested too deeply for others
        anew = orjson.dumps(part) if keep or body.count(b"[") + body.count(b"{") > DEPTH else b""
        return Data(anew if keep else body)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        raise UpstreamError("not_json") from None


class Part(NamedTuple):
    """One source in one answer."""

    state: str
    data: Data | None = None
    age: float | None = None
    latency: float | None = None
    error: str | None = None
    expires_in: float = 0.0  # seconds for which the data may be said to be in this state
    retry_after: float = 1.0

    def encoded(self) -> bytes:
        """The part as JSON."""
        return b'{"state":"%b","data":%b,"age_s":%b,"latency_ms":%b,"error":%b}' % (
            self.state.encode(),
            b"null" if self.data is None else self.data.encoded,
            b"null" if self.age is None else b"%.3f" % self.age,
            b"null" if self.latency is None else b"%.1f" % (self.latency * 1000),
            b"null" if self.error is None else orjson.dumps(self.error),
        )


class Loaded(NamedTuple):
    """What the cache keeps of a load."""

    data: Data
    latency: float
    at: float  # by the clock of the source


class Load(NamedTuple):
    """The result of a load, for listeners; ``latency`` in seconds."""

    source: str
    parameters: dict[str, str]
    at: datetime
    latency: float
    data: Data | None
    error: UpstreamError | None
