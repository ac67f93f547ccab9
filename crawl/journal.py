"""The journal: the rows of earlier runs, read back, so that a crawl goes on where it ended, however it ended.

The output file in JSON lines is the journal; nothing else need survive a ``kill -9``. A row is written when its page
is done with, so what is in the file is finished, and what was in flight is asked for again. Visited are the URLs of
rows, and where redirects led; waiting are the links in them (of feeds, the articles) that have no row yet.

Promised: a torn last line is cut off (what a crash leaves: no line end, or zeros), and rows that only say
``interrupted`` are taken out (of a copy, which then takes the file's place), so that in the end each URL has one row.
Only feeds have a row for each run in which they changed or failed; those without articles are taken out when a later
one of the same feed is there, once they are a quarter of all. A file that is something else is refused, and not
touched. Two runs never write to one file: each holds a lock on it (flock), also one that begins anew.

Not promised: anything about a file that others write to, or over a network whose file system has no locks. The list
must be given again: what it names and no row has is fetched. The file is read twice, row by row.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from crawl.addresses import names_private
from crawl.core import Crawl
from crawl.errors import FetchError
from crawl.model import CrawlResult, FeedResult
from crawl.rows import validator
from crawl.urls import normalise, origin

Row = dict[str, Any]

BEGINNING = b'{"url":'  # of every row
USUAL = {"url", "error", "final_url"}  # what every row has


class JournalError(Exception):
    """The file is no journal, or it is in use."""


def open_journal(path: str) -> BinaryIO:
    """The file, to be read and appended to, locked and mended. Raises ``JournalError``, ``OSError``."""
    while True:
        if os.path.exists(path) and not os.path.isfile(path):
            raise JournalError(f"{path} is no file, which could be read back")
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            _lock(file, path)
            # Since it was opened, another run may have put a mended copy in its place.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)) and not _mend(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def open_anew(path: str) -> BinaryIO:
    """The file, to be written from its beginning; locked, if it is one. Raises ``JournalError``, ``OSError``.

    What it had is lost, but for rows in JSON lines, which took a crawl to get: they are left, and the file refused.
    """
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            _lock(file, path)
            with open(path, "rb") as before:
                if before.read(len(BEGINNING)) == BEGINNING:
                    raise JournalError(f"{path} has the rows of another crawl: go on with --resume, or remove it")
            file.truncate(0)
    except BaseException:
        file.close()
        raise
    return file


def _lock(file: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(f"{path} is being written to by another crawl") from None
    except OSError:
        return  # a pipe, or a file system without locks


def _mend(file: BinaryIO, path: str) -> bool:
    """Cut the torn end off. True if the file at ``path`` is another one now: without the rows of what was cut off."""
    good = end = number = torn = 0
    interrupted: set[int] = set()
    stale: set[int] = set()
    latest: dict[tuple[str, bool], int] = {}
    if not BEGINNING.startswith(os.pread(file.fileno(), len(BEGINNING), 0)):  # it may be one line of gigabytes
        raise _no_journal(path, 1)
    for number, line in enumerate(_lines(file), 1):
        end += len(line)
        row = _parsed(line)
        if row is None:
            torn = torn or number
            if line.endswith(b"\n") and b"\0" not in line:  # that no crash left
                raise _no_journal(path, torn)
            continue
        if torn:
            raise _no_journal(path, torn)
        if str(row.get("error") or "").startswith("interrupted"):
            interrupted.add(number)
        elif row.get("kind") == "feed" and not row.get("entries"):
            key = row["url"], row["error"] is None
            if key in latest:
                stale.add(latest[key])
            latest[key] = number
        good = end
    file.truncate(good)
    if not interrupted and len(stale) * 4 <= number:
        return False
    place = os.path.realpath(path)
    beside = f"{place}.mended"
    try:
        with open(beside, "wb") as copy:
            for number, line in enumerate(_lines(file), 1):
                if number not in interrupted and number not in stale:
                    copy.write(line)
            copy.flush()
            os.fsync(copy.fileno())
        os.chmod(beside, os.stat(place).st_mode)
        os.replace(beside, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    return True


def _no_journal(path: str, line: int) -> JournalError:
    return JournalError(f"line {line} of {path} is no row of a crawl; is it JSON lines (--jsonl)?")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of ``file`` from its beginning, the last one too if it has no end."""
    with open(file.fileno(), "rb", closefd=False) as reader:
        reader.seek(0)
        yield from reader


def _parsed(line: bytes) -> Row | None:
    """The row, or None if the line is none, or has no end."""
    with contextlib.suppress(ValueError):
        row = orjson.loads(line)
        if line.endswith(b"\n") and isinstance(row, dict) and row.keys() >= USUAL and isinstance(row["url"], str):
            return row
    return None


def rows(file: BinaryIO) -> Iterator[Row]:
    """The rows of ``file``."""
    return filter(None, map(_parsed, _lines(file)))


def known_as(url: str) -> tuple[str, str]:
    """(URL as the frontier knows it, its host); of what is no URL the host is empty."""
    try:
        return normalise(url)
    except FetchError:
        return url, ""


def recall(crawl: Crawl, file: BinaryIO) -> int:
    """Put into ``crawl`` what is known from the rows in ``file``. How many there were.

    ``crawl`` knows the origins of the list by then: links to them are in scope. Raises ``JournalError``.
    """
    count = 0
    asked: dict[str, None] = {}
    try:
        for row in rows(file):
            count += 1
            _remember(crawl, row, asked)
        for row in rows(file):
            if row["error"] is None or row.get("entries"):  # a feed with a fault: articles from before it
                _follow(crawl, row)
    except (TypeError, ValueError, AttributeError) as error:
        raise JournalError(f"{file.name} has what is no row of a crawl: {error}") from None
    if crawl.options.sitemaps:
        crawl.sitemaps.ask_again(asked)
    return count


def _remember(crawl: Crawl, row: Row, asked: dict[str, None]) -> None:
    """That it has been visited, and where it led."""
    if row.get("kind") == "feed":  # asked again in each run, to see what is new
        if row["error"] is None:
            ended = row.get("final_url") or row["url"]
            known = ended, validator(row.get("etag")), validator(row.get("last_modified"))
            crawl.feeds.validators[known_as(row["url"])[0]] = known
        return
    try:
        url, ended = normalise(row["url"])[0], normalise(row.get("final_url") or row["url"])[0]
    except FetchError:
        crawl.frontier.mark(row["url"])
        return
    forbidden = str(row["error"]).startswith("robots")  # it has given its place back
    crawl.frontier.mark(url, counts=not forbidden and not crawl.options.feeds)  # of feeds, each run may fetch so many
    crawl.frontier.mark(ended)
    if row.get("digest"):  # of a page whose row is not here, that one is the first again
        crawl.bodies.setdefault(row["digest"], row.get("duplicate_of") or row["url"])
    if crawl.follows:
        if not row.get("depth"):
            crawl.scope.add(url)
            crawl.scope.add(ended)
        asked[origin(url)] = None


def _follow(crawl: Crawl, row: Row) -> None:
    """Add what it led to and has no row yet."""
    private = crawl.options.allow_private or names_private(known_as(row.get("final_url") or row["url"])[1])
    if row.get("kind") == "feed":
        crawl.feeds.recall(_fields(FeedResult, row), private)
    elif crawl.follows and not row.get("duplicate_of"):
        crawl.follow(_fields(CrawlResult, row), private, listed=not row.get("depth"))


def _fields(form: type[Any], row: Row) -> Any:
    """The row as ``form``; what every row has, but this one has not, is empty."""
    known = form.__dataclass_fields__
    usual: Row = {"status": None, "title": None, "word_count": 0, "links_found": []}
    usual |= {"fetched_at": "", "duration_ms": 0.0}
    return form(**(usual | {name: value for name, value in row.items() if name in known}))
