"""The computing behind ``GET /report``: pure statistics of past loads, and a look at an upstream's host.

``summarise`` is for a process, ``inspect_host`` blocks and is for a thread. The standard library only, so that a worker
imports it fast.

Change points of the latency level, on log latencies, for levels differ by factors:
- Noise: the median absolute difference (the larger of lags 1 and ``LEAST``, for neighbours may be alike), which steps
  and outliers hardly move; ``FLOOR`` at least. Samples are clipped to two of it about a running median, so a few
  timeouts make no level.
- Seeded binary segmentation (Kovács, Bühlmann, Li and Munk, Biometrika 2023): the best split of each of O(n) fixed
  intervals, at all scales, each O(1) a position by prefix sums: O(n log n) in all. Plain binary segmentation (Scott and
  Knott 1974) misses a short rise within a long quiet time.
- A split counts if it lowers the squared error by more than ``PENALTY * log n`` noise variances (BIC: 2 to 3;
  neighbours are never quite independent). The best ones are kept, then each is put to the best place between its
  neighbours, and dropped if it does not count there or the medians differ by less than ``RATIO``.

A drift is no step, it is shown as a few in its direction. Not promised: that noise which wanders (an autocorrelation of
0.6, say), or latencies of two kinds mixed one to two, show no change.
"""

from __future__ import annotations

import functools
import math
import socket
import ssl
import statistics
import time
from array import array
from bisect import bisect, bisect_left, insort
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LEAST = 8  # samples of the shortest level
MOST = 20  # change points of one source
PENALTY = 4.0
FLOOR = 0.02  # noise, as a share of the level, that is always assumed
RATIO = 1.1

HOST_ERRORS = (
    "url", "dns", "refused", "unreachable", "timeout", "tls", "certificate",
    "certificate_expired", "certificate_name", "certificate_untrusted",
)  # fmt: skip
"""All that ``inspect_host`` says of what failed: what a library or a host says may reach nobody."""


class Columns(NamedTuple):
    """The fetches of one source, oldest first, one column each: arrays are pickled as fast as they are copied."""

    times: array[float]  # seconds since 1970
    latencies: array[float]  # seconds; NaN where there is none
    statuses: Sequence[str]  # ``ok``, or the kind of the error


def summarise(rows: Mapping[str, Columns]) -> dict[str, dict[str, Any]]:
    """The report of each source, but for its host. ``ValueError`` if columns differ in length."""
    return {name: _summary(columns) for name, columns in rows.items()}


def _summary(columns: Columns) -> dict[str, Any]:
    if not len(columns.times) == len(columns.latencies) == len(columns.statuses):
        raise ValueError("columns of different lengths")
    results = len(columns.statuses)
    errors = Counter(columns.statuses)
    ok = errors.pop("ok", 0)
    known = [pair for pair in zip(columns.times, columns.latencies, strict=True) if 0 <= pair[1] < math.inf]
    seconds = [latency for _, latency in known]
    ranks = percentiles(seconds) | ({"max": max(seconds)} if seconds else {})
    return {
        "results": results,
        "availability": round(ok / results, 4) if results else None,
        "latency_ms": {name: _ms(value) for name, value in ranks.items()},
        "errors": dict(errors.most_common()),
        "change_points": [
            {"at": _iso(known[at][0]), "before_ms": _ms(before), "after_ms": _ms(after)}
            for at, before, after in changes(seconds)
        ],
    }


def _ms(seconds: float) -> float:
    return round(min(seconds, 1e9) * 1000, 1)


def _iso(when: float) -> str:
    known = min(max(0.0, when), 253402300799.0)  # the years that have four digits; 0 for NaN
    return datetime.fromtimestamp(known, UTC).isoformat(timespec="seconds")


def percentiles(values: Collection[float]) -> dict[str, float]:
    """p50, p95 and p99 by the nearest rank; {} of no values."""
    ranked = sorted(values)
    return {f"p{p}": ranked[math.ceil(len(ranked) * p / 100) - 1] for p in (50, 95, 99)} if ranked else {}


# ------------------------------------------------------------------------------------------------- change points


class _Split(NamedTuple):
    gain: float  # what it takes from the squared error
    at: int  # the first sample of the new level


def changes(seconds: Sequence[float]) -> list[tuple[int, float, float]]:
    """The changes of the level of latencies: the index of the first sample of each new level, and the medians before
    and after it."""
    n = len(seconds)
    if n < 2 * LEAST:
        return []
    logs = [math.log(min(max(value, 1e-6), 1e9)) for value in seconds]
    noise = max(FLOOR, _noise(logs, 1), _noise(logs, LEAST))
    sums = [0.0, *accumulate(_clipped(logs, 2 * noise))]
    least_gain = PENALTY * math.log(n) * noise * noise
    splits = [(split, start, end) for start, end in _seeds(n) if (split := _best(sums, start, end)).gain > least_gain]
    kept: list[int] = []
    for split, start, end in sorted(splits, reverse=True):
        place = bisect(kept, start)  # no interval that has a change point in it already
        if len(kept) < MOST and (place == len(kept) or kept[place] >= end):
            kept.insert(bisect(kept, split.at), split.at)
    return _settled(seconds, sums, kept, least_gain)


def _settled(
    seconds: Sequence[float], sums: Sequence[float], kept: list[int], least_gain: float
) -> list[tuple[int, float, float]]:
    """Each change point at the best place between its neighbours; the weakest that does not count goes, in turn."""
    while True:
        for i in range(len(kept)):
            start, end = (kept[i - 1] if i else 0), (kept[i + 1] if i + 1 < len(kept) else len(seconds))
            kept[i] = _best(sums, start, end).at
        bounds = [0, *kept, len(seconds)]
        medians = [statistics.median(seconds[start:end]) for start, end in pairwise(bounds)]
        weak: list[tuple[float, int]] = []
        for i, (before, after) in enumerate(pairwise(medians)):
            gain = _best(sums, bounds[i], bounds[i + 2]).gain
            if gain <= least_gain or max(before, after) < RATIO * max(min(before, after), 1e-6):
                weak.append((gain, i))
        if not weak:
            return list(zip(kept, medians, medians[1:], strict=False))
        del kept[min(weak)[1]]


def _noise(logs: Sequence[float], lag: int) -> float:
    """The standard deviation, were it normal."""
    return statistics.median([abs(b - a) for a, b in zip(logs, logs[lag:], strict=False)]) / (0.6745 * math.sqrt(2))


def _clipped(logs: Sequence[float], width: float) -> list[float]:
    """Each sample within ``width`` of the median of the ``2 * LEAST + 1`` about it (fewer at the ends)."""
    window, shown = sorted(logs[:LEAST]), []
    for i, value in enumerate(logs):
        if i + LEAST < len(logs):
            insort(window, logs[i + LEAST])
        if i > LEAST:
            del window[bisect_left(window, logs[i - LEAST - 1])]
        level = window[len(window) // 2]
        shown.append(min(max(value, level - width), level + width))
    return shown


def _seeds(n: int) -> list[tuple[int, int]]:
    """Intervals of all scales, each scale shorter by a root of two, each interval half over the next."""
    seeds, scale = [(0, n)], 1
    while (length := n / math.sqrt(2) ** scale) >= 2 * LEAST:
        count = 2 * math.ceil(n / length) - 1
        step = (n - length) / (count - 1)
        seeds += [(int(i * step), min(n, math.ceil(i * step + length))) for i in range(count)]
        scale += 1
    return seeds


def _best(sums: Sequence[float], start: int, end: int) -> _Split:
    """The split of the samples from ``start`` to ``end`` into two levels of ``LEAST`` at least."""
    n, base = end - start, sums[start]
    mean = (sums[end] - base) / n
    best, at = -1.0, start + LEAST
    for left in range(LEAST, n - LEAST + 1):
        off = sums[start + left] - base - left * mean
        gain = off * off / (left * (n - left))
        if gain > best:
            best, at = gain, start + left
    return _Split(best * n, at)


# --------------------------------------------------------------------------------------------------------- hosts


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


def inspect_host(url: str, timeout: float = 2.0, *, context: ssl.SSLContext | None = None) -> dict[str, Any]:
    """How an upstream's host is reached, at this moment: blocks, raises nothing; ``error`` is None or of HOST_ERRORS.

    ``timeout`` seconds are for all but the name: ``getaddrinfo`` cannot be interrupted and takes what the resolver's
    own settings allow (often 10 s). ``context`` (None: the system's authorities) checks the certificate.
    """
    shown: dict[str, Any] = dict.fromkeys(("name", "address", "dns_ms", "connect_ms", "certificate_days", "error"))
    began = time.monotonic()
    try:
        parts = urlsplit(url)
        shown["name"], port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("no URL of a host")
        addresses = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        shown["dns_ms"] = _ms(time.monotonic() - began)
        with _connected(addresses, began + timeout, shown) as connection:
            if parts.scheme == "https":
                connection.settimeout(_left(began + timeout))
                with (context or _trusted()).wrap_socket(connection, server_hostname=parts.hostname) as secured:
                    expires = ssl.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"]))
                    shown["certificate_days"] = round((expires - time.time()) / 86400, 2)
    except (OSError, ValueError, KeyError) as error:
        shown["error"] = _kind(error)
    return shown


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _connected(addresses: Sequence[Any], deadline: float, shown: dict[str, Any]) -> socket.socket:
    """The first address that answers; each gets its share of the time that is left, and the last error is raised."""
    for i, (family, kind, protocol, _, address) in enumerate(addresses):
        shown["address"], began = address[0], time.monotonic()
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline) / (len(addresses) - i))
            connection.connect(address)
        except BaseException as error:
            connection.close()
            if i + 1 == len(addresses) or not isinstance(error, OSError):
                raise
        else:
            shown["connect_ms"] = _ms(time.monotonic() - began)
            return connection
    raise socket.gaierror("no address")


def _kind(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):  # the codes of OpenSSL's x509_vfy.h
        codes = {10: "expired", 62: "name", 64: "name"} | dict.fromkeys((18, 19, 20, 21), "untrusted")
        return "_".join(("certificate", *filter(None, [codes.get(error.verify_code)])))
    kinds = {
        socket.gaierror: "dns",
        TimeoutError: "timeout",
        ConnectionRefusedError: "refused",
        ssl.SSLError: "tls",
        ConnectionError: "tls",
        UnicodeError: "dns",
        KeyError: "certificate",
        OSError: "unreachable",
    }
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "url")
