"""The journal: the rows of earlier runs, read back, so that a crawl goes on where it ended, however it ended.

The output file in JSON lines is the journal; nothing else need survive a ``kill -9``. A row is written when its page
is done with, so what is in the file is finished, and what was in flight is asked for again. From the rows follow

- the visited set: their URLs, and where redirects led;
- the frontier: the links in them (with their depth) that have no row yet; of feeds, the articles.

Promised: a torn last line is cut off, and rows that only say ``interrupted`` are taken out (of a copy, which then takes
the file's place), so that in the end each URL has one row. A file that is something else is refused, and not touched.
Only feeds have a row for each run in which they changed or failed; those without articles are taken out when a later
one of the same feed is there, once they are a quarter of all. So the file grows with the articles, not with the runs.
Two runs never write to one file: each holds a lock on it (flock).

Not promised: anything about a file that others write to, or over a network whose file system has no locks. The list
must be given again: what it names and no row has is fetched. What counts for traps is counted anew.

Time and memory: the file is read twice, row by row.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from crawl_core import Crawl, validator
from crawl_rules import CrawlResult, FeedResult, FetchError, names_private, normalise

Row = dict[str, Any]


class JournalError(Exception):
    """The file is no journal, or it is in use."""


def open_journal(path: str) -> BinaryIO:
    """The file, to be read and appended to, locked and mended. Raises ``JournalError``, ``OSError``."""
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            lock(file, path)
            if not mend(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def lock(file: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(f"{path} is being written to by another crawl") from None
    except OSError:
        return  # a pipe, or a file system without locks


def mend(file: BinaryIO, path: str) -> bool:
    """Cut the torn end off. True if the file at ``path`` is another one now: without the rows of what was cut off."""
    good = end = number = 0
    wrong: int | None = None
    interrupted: set[int] = set()
    stale: set[int] = set()
    latest: dict[tuple[str, bool], int] = {}
    for line in lines(file):
        number += 1
        end += len(line)
        row = parsed(line)
        if row is None:
            wrong = wrong or number
            continue
        if wrong is not None:
            raise JournalError(f"line {wrong} of {path} is no row of a crawl")
        if str(row.get("error") or "").startswith("interrupted"):
            interrupted.add(number)
        elif row.get("kind") == "feed" and not row.get("entries"):
            key = row["url"], row["error"] is None
            if key in latest:
                stale.add(latest[key])
            latest[key] = number
        good = end
    if number and not good:
        raise JournalError(f"{path} has no row of a crawl in it; is it JSON lines (--jsonl)?")
    file.truncate(good)
    if not interrupted and len(stale) * 4 <= number:
        return False
    left_out = interrupted | stale
    beside = f"{path}.mended"
    with open(beside, "wb") as copy:
        for number, line in enumerate(lines(file), 1):
            if number not in left_out:
                copy.write(line)
        copy.flush()
        os.fsync(copy.fileno())
    os.chmod(beside, os.stat(path).st_mode)
    os.replace(beside, path)
    return True


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of ``file`` from its beginning, the last one too if it has no end."""
    with open(file.fileno(), "rb", closefd=False) as reader:
        reader.seek(0)
        yield from reader


def parsed(line: bytes) -> Row | None:
    """The row, or None if the line is none, or has no end."""
    with contextlib.suppress(orjson.JSONDecodeError):
        row = orjson.loads(line)
        if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("url"), str) and "error" in row:
            return row
    return None


def rows(file: BinaryIO) -> Iterator[Row]:
    for line in lines(file):
        if (row := parsed(line)) is not None:
            yield row


def target(url: str) -> str:
    """As the frontier knows it."""
    try:
        return normalise(url)[0]
    except FetchError:
        return url


def recall(crawl: Crawl, file: BinaryIO) -> int:
    """Put into ``crawl`` what is known from the rows in ``file``. How many there were."""
    count = 0
    for row in rows(file):
        count += 1
        if row.get("kind") == "feed":  # asked again in each run, to see what is new
            if row["error"] is None:
                known = (
                    row.get("final_url") or row["url"],
                    validator(row.get("etag")),
                    validator(row.get("last_modified")),
                )
                crawl.validators[target(row["url"])] = known
            continue
        crawl.frontier.mark(target(row["url"]), counts=not crawl.options.feeds)  # of feeds, each run may fetch so many
        if row.get("final_url"):
            crawl.frontier.mark(target(row["final_url"]))
        if row.get("digest"):
            crawl.know_body(row["digest"], row["url"])
        if crawl.follows and not row.get("depth"):
            for url in (row["url"], row.get("final_url") or row["url"]):
                crawl.scope.add(target(url))
    for row in rows(file):
        ended = row.get("final_url") or row["url"]
        if row.get("error") is not None:
            continue
        private = crawl.options.allow_private or names_private(host_of(ended))
        if row.get("kind") == "feed":
            crawl.recall_feed(fields(FeedResult, row), private)
        elif crawl.follows and not row.get("duplicate_of"):
            crawl.follow(fields(CrawlResult, row), private)
    return count


def host_of(url: str) -> str:
    try:
        return normalise(url)[1]
    except FetchError:
        return ""


def fields(form: type[Any], row: Row) -> Any:
    known = form.__dataclass_fields__
    usual: Row = {
        "status": None,
        "title": None,
        "word_count": 0,
        "links_found": [],
        "fetched_at": "",
        "duration_ms": 0.0,
    }
    return form(**(usual | {name: value for name, value in row.items() if name in known}))
