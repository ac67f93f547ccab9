"""``python aggregate_app.py --check upstreams.toml``: each upstream is called once, as the API would call it.

What came is a table. Nothing is kept, and nothing of a URL, a header or a body is shown: they may hold secrets.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from api.aggregate import Plan
from api.config import ConfigError, Upstream, load_config
from api.parts import Part
from api.upstreams import Source, make_session
from coordination import Semaphore

HEAD = ("source", "answer", "ms", "bytes", "")


class Row(NamedTuple):
    """What came of one call, as text."""

    name: str
    answer: str
    latency: str
    size: str
    begins: str


def row_of(name: str, part: Part) -> Row:
    """A line of the table: what the data begin with, or the error."""
    if part.state != "fresh" or part.data is None:
        return Row(name, "error", "", "", part.error or "")
    text = part.data.encoded.decode()
    shown = "".join(each if each.isprintable() else " " for each in text[:50]) + " …" * (len(text) > 50)
    return Row(name, "ok", f"{(part.latency or 0.0) * 1000:.0f}", f"{len(part.data.encoded):,}", shown)


async def call_each(upstreams: Mapping[str, Upstream]) -> list[Row]:
    """Call each of them once, with the defaults of its parameters."""
    async with make_session(len(upstreams)) as session:
        places = Semaphore(len(upstreams))
        sources = {name: Source(upstream, session, places) for name, upstream in upstreams.items()}
        longest = max(upstream.timeout for upstream in upstreams.values())
        parts = await Plan.of(sources, {}, 2 * longest).gather()
        return [row_of(name, part) for name, part in parts.items()]


def table_of(rows: Sequence[Row]) -> str:
    """The rows below their head, in columns."""
    widths = [max(len(row[column]) for row in (HEAD, *rows)) for column in range(4)]
    lines = [
        f"{name:{widths[0]}}  {answer:{widths[1]}}  {ms:>{widths[2]}}  {size:>{widths[3]}}  {rest}".rstrip()
        for name, answer, ms, size, rest in (HEAD, *rows)
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a configuration; 0 if every upstream answered with data, 1 if one did not, 2 if the file is wrong."""
    parser = argparse.ArgumentParser(
        prog="aggregate_app.py",
        description="The API is served by: uvicorn aggregate_app:app. Here its configuration is checked.",
    )
    parser.add_argument("--check", metavar="FILE", required=True, help="call each upstream of this TOML file once")
    path = parser.parse_args(arguments).check
    try:
        upstreams = load_config(path, os.environ)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        parser.error(f"{path}: {error}")
    rows = asyncio.run(call_each(upstreams))
    print(table_of(rows))
    return int(any(row.answer != "ok" for row in rows))
