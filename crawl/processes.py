"""One crawl in several processes: ``crawl_async.py --processes N``. Each worker has its own event loop and frontier.

The hosts are dealt out: a host falls into one of ``BUCKETS`` by a stable hash, a bucket goes to the worker with the
fewest URLs when its first URL comes, and stays there. So politeness per host, ``--host-pages``, robots.txt and the
visited set hold as in one process. The parent reads the list, writes the rows, and passes on, by host, what one worker
finds for another: links, articles, and requests on their way (a redirect goes on with the worker of its target's host).

The first workers are copies of the parent (fork), made before it has a second thread. Where it has one before (the
display on a terminal, --demo, --metrics-port), and in place of one that died, a worker is a fresh interpreter.

Transport: a socketpair for each worker; frames, length-prefixed, of sections: a type, a bucket (or ``ME``), bytes. Rows
come encoded. A frame has effect as a whole: rows, links of their pages, their keys and the counts, or nothing of it.

The end: all messages go through the parent, in order. A worker with nothing to do tells how many sections it has
received. When the list is read and each worker's last word is "idle, and I received as many as you sent", nothing can
come any more: a worker that received all, and sent all that followed from it before it said so, has nothing on its way.

A worker that dies is replaced. The parent keeps all that it sent to each (compressed, some 10 bytes a URL) and the
keys (8 bytes, hashes) of what is finished; the new one gets both. What was in flight is asked for again, rules of
robots.txt are read anew; rows of unfinished frames were never written, so none comes twice. ``DEATHS`` of a worker with
no row in between end the crawl. Workers do not listen to Ctrl-C; the parent tells them, and kills who is late. They end
when their socket does, so also when the parent is killed.

Shared out evenly: --concurrency (at most as many workers), --total-rate. Exact over all: --max-pages (then every link
goes through the parent). For each worker by itself: ``--dedupe`` (equal bodies are found within a host, but not between
hosts of two workers), traps; an article that feeds of two workers name is in the rows of both feeds, and fetched once.

Not promised: one row only, should a worker die while another follows a redirect for it that leads elsewhere the second
time. A worker that is alive and stuck is not noticed.

Locks in the parent: ``Parent._lines`` (lines not sent yet), below it each ``Worker.lock`` (its socket and log), below
it ``Parent._lock`` (who owns what, the tally, the counts). ``Parent._output``, taken by itself, is for writing.
Threads: one reads the list, one for each worker reads what it sends; the main thread waits for signals and ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import orjson

from coordination import new_lock
from crawl import process_worker
from crawl.core import Crawl
from crawl.frontier import Frontier
from crawl.hosts import FrontierStats
from crawl.output import Output, peak_memory_mb
from crawl.process_worker import AGE, MakeDriver
from crawl.stats import Stats
from crawl.urls import is_secret, origin
from crawl.wire import BUCKETS, ME, bucket_of, exactly, key_of, place, section, sections
from runtime.options import EXIT_INTERRUPTED
from runtime.processes import module_command

LINES = 500
"""Lines of the list in a section."""
DEATHS = 3
LATE = 5.0
"""Seconds beyond the grace time after which a worker is killed."""

# ------------------------------------------------------------------------------------------------------- the end


def split(total: int, parts: int, part: int) -> int:
    """The ``part``-th of ``parts`` whole numbers that differ by one at most and have the sum ``total``."""
    return total // parts + (part < total % parts)


class Tally:
    """Whether all is over: see "The end" above. Pure; calls come in the order in which things happen in the parent."""

    def __init__(self, workers: int) -> None:
        self._sent, self._idle = [0] * workers, [-1] * workers
        self._open = True

    def sent(self, worker: int) -> None:
        self._sent[worker] += 1

    def idle(self, worker: int, received: int) -> None:
        """All that followed from the first ``received`` sections is done, and has been dealt with by the parent."""
        self._idle[worker] = received

    def restart(self, worker: int) -> None:
        """It died; all is sent to another one anew."""
        self._sent[worker], self._idle[worker] = 0, -1

    def end_of_list(self) -> None:
        self._open = False

    @property
    def over(self) -> bool:
        return not self._open and self._sent == self._idle


# ------------------------------------------------------------------------------------------------------- parent


class WholeStats(Stats):
    """The counts of all workers, of dead ones too."""

    def __init__(self, workers: list[Worker], began: float) -> None:
        super().__init__()
        self.started, self._workers = began, workers

    def snapshot(self) -> dict[str, Any]:
        whole = super().snapshot()
        maps: dict[str, Counter[str]] = {"errors": Counter(), "statuses": Counter()}
        for counts in [worker.stats for worker in self._workers] + [worker.retired for worker in self._workers]:
            for name, value in counts.items():
                if name in maps:
                    maps[name].update(value)
                elif name not in ("seconds", "rows_per_second"):
                    whole[name] += value
        whole["errors"] = dict(maps["errors"].most_common())
        whole["statuses"] = dict(sorted(maps["statuses"].items(), key=lambda item: int(item[0])))
        return whole | {"rows_per_second": round(whole["rows"] / max(1e-9, whole["seconds"]), 1)}

    def processes(self) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        own = {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3), "peak_memory_mb": peak_memory_mb()}
        each = [worker.used | {"rows": worker.stats.get("rows", 0), "deaths": worker.died} for worker in self._workers]
        names = ("cpu_seconds", "peak_memory_mb")
        whole = {name: round(own[name] + sum(one.get(name, 0.0) for one in each), 3) for name in names}
        return whole | {"parent": own, "processes": each}


class WholeFrontier(Frontier):
    """What the command line asks of a frontier, for those of all workers."""

    def __init__(self, parent: Parent) -> None:
        super().__init__()
        self._parent = parent

    def stats(self) -> FrontierStats:
        found = [worker.frontier for worker in self._parent.workers if worker.frontier]
        sums: list[Any] = [sum(values) for values in zip(*found, strict=True)]
        return FrontierStats(*sums) if found else super().stats()

    def stop(self) -> None:
        self._parent.events.put("stop")


class Forked:
    """A copy of this process, which runs ``crawl.process_worker.worker``: as much of ``Popen`` as is needed here.

    Only while there is no other thread: one could hold a lock, which nobody would release in the copy.
    """

    def __init__(self, descriptor: int, make_driver: MakeDriver) -> None:
        self.returncode: int | None = None
        self._lock = new_lock("Forked")  # a number is not signalled after its process was reaped: it may be another's
        self.pid = os.fork()
        if self.pid == 0:
            try:
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, 0)
                os.dup2(nothing, 1)
                os.closerange(3, descriptor)  # the other workers' sockets would never be seen to end
                os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
                process_worker.worker(descriptor, make_driver)
            except BaseException:
                sys.excepthook(*cast(Any, sys.exc_info()))
            finally:
                os._exit(1)

    def wait(self) -> int:
        if self.returncode is None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                if self.returncode is None:
                    self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, number)


Process = Forked | subprocess.Popen[bytes]


def start_worker(descriptor: int, make_driver: MakeDriver, module: str) -> Process:
    """A copy has everything imported: it begins a quarter of a second sooner, on each core. Not with other threads."""
    if threading.active_count() == 1 and sys.platform == "linux":
        return Forked(descriptor, make_driver)
    program, pipe = module_command("crawl.process_worker", descriptor, module), subprocess.DEVNULL
    return subprocess.Popen(program, stdin=pipe, stdout=pipe, pass_fds=(descriptor,))


class Worker:
    """What the parent knows of a worker. ``lock`` guards the socket's sending side, and the log."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.lock = new_lock("Worker")
        self.process: Process | None = None
        self.sock: socket.socket | None = None
        self.done = array("Q")
        self.stats: dict[str, Any] = {}
        self.retired: dict[str, Any] = {}
        self.frontier: list[int] = []
        self.used: dict[str, float] = {}
        self.load = self.died = self.in_a_row = 0
        self.over = False
        self._log: list[bytes] = []
        self._recent = bytearray()

    def remember(self, data: bytes) -> None:
        self._recent += data
        if len(self._recent) >= 1 << 18:
            self._log.append(zlib.compress(self._recent, 1))
            self._recent.clear()

    def log(self) -> Iterator[bytes]:
        yield from map(zlib.decompress, self._log)
        yield bytes(self._recent)

    def transmit(self, data: bytes) -> None:
        """What cannot be sent any more is in the log."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.sendall(struct.pack("<I", len(data)) + data)

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            if self.process is not None:
                self.process.send_signal(number)

    def retire(self) -> None:
        """Its counts are kept; what a frame brings has been counted there before."""
        old, self.stats = self.stats, {}
        for name, value in old.items():
            if isinstance(value, dict):
                self.retired[name] = dict(Counter(self.retired.get(name, {})) + Counter(value))
            else:
                self.retired[name] = self.retired.get(name, 0) + value


class Parent:
    """The parent of a crawl in processes. ``run`` once."""

    def __init__(self, crawl: Crawl, output: Output, count: int, make_driver: MakeDriver, program: str) -> None:
        self._crawl, self._into, options = crawl, output, crawl.options
        self._make_driver, self._program = make_driver, program
        count = min(count, options.concurrency)
        self.workers = [Worker(number) for number in range(count)]
        self.events: queue.SimpleQueue[str | int] = queue.SimpleQueue()
        self._lock = new_lock("Parent")
        self._lines = new_lock("Lines")
        self._output = new_lock("Output of processes")
        self._owners = [-1] * BUCKETS
        self._tally = Tally(count)
        self._stopping = False
        self._read_all = threading.Event()
        self._waiting: list[list[str]] = [[] for _ in range(count)]
        guards = crawl.follows or options.feeds or any(is_secret(name) for name, _ in options.headers)
        self._origins: set[str] | None = set() if guards else None
        self._new_origins: list[str] = []
        self._credentials_sent = 0
        self._taken: set[int] = set()
        self._budget = float(options.max_pages or math.inf)
        self._until = crawl.clock() + options.max_time if options.max_time else 0.0

    def run(self, urls: Iterable[str]) -> None:
        crawl = self._crawl
        self._hand_out_recalled(crawl.frontier)
        crawl.stats, crawl.frontier = WholeStats(self.workers, crawl.stats.started), WholeFrontier(self)
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        threads = []
        try:
            for number in before:
                signal.signal(number, lambda number, _: self.events.put(int(number)))
            started = [(worker, *self._start(worker)) for worker in self.workers]  # before there are threads
            for args in started:
                worker = args[0]
                threads.append(threading.Thread(target=self._listen, args=args, name=f"worker {worker.number}"))
                threads[-1].start()
            threading.Thread(target=self._route, args=(urls,), name="list", daemon=True).start()
            threads.append(threading.Thread(target=self._flush_in_time, name="lines"))
            threads[-1].start()
            self._wait()
        finally:
            self._stopping = True
            self._read_all.set()
            for worker in self.workers:
                worker.signal(signal.SIGKILL)
            for thread in threads:
                thread.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> None:
        """Until all workers have ended; meanwhile, for signals."""
        left, stage, late = len(self.workers), 0, math.inf
        while left:
            # The system may give a signal to another thread, and nobody wakes this one for it: look every now and then.
            try:
                event = self.events.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() < late:
                    continue
                event, late = "late", math.inf
            if event == "ended":
                left -= 1
                continue
            self._stopping = True
            if isinstance(event, int):
                self._crawl.interrupted = True
            stage = stage + 1 if isinstance(event, int) else max(stage, 2 if event == "cut off" else 1)
            forced = stage > 1
            late = min(late, time.monotonic() + LATE + (0.0 if forced else self._crawl.options.grace))
            for worker in self.workers:
                if not worker.over:
                    kill = event == "late" or stage > 2
                    worker.signal(signal.SIGKILL if kill else signal.SIGUSR2 if forced else signal.SIGUSR1)
            if stage > 2:
                os._exit(EXIT_INTERRUPTED)

    # ---------------------------------------------------------------- processes

    def _start(self, worker: Worker) -> tuple[Process, socket.socket]:
        options, count = self._crawl.options, len(self.workers)
        part = replace(
            options,
            concurrency=split(options.concurrency, count, worker.number),
            total_rate=options.total_rate / count,
            max_pages=0,
            max_time=0.0,
        )
        config = {
            "options": part,
            "form": self._into.writer.form,
            "until": self._until,
            "central": self._counts(),
            "processes": count,
            "credentials": dict(self._crawl.listed.credentials),
        }
        with worker.lock:
            ours, theirs = socket.socketpair()
            mask = signal.pthread_sigmask(
                signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
            )
            try:
                worker.process = start_worker(theirs.fileno(), self._make_driver, self._program.removesuffix(".py"))
            except BaseException:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                theirs.close()
            worker.sock = ours
            with self._lock:
                self._tally.restart(worker.number)
                done = section(b"D", ME, worker.done.tobytes())
            worker.transmit(pickle.dumps(config))
            for data in (done, *worker.log()):
                with self._lock:
                    for _ in sections(data):
                        self._tally.sent(worker.number)
                worker.transmit(data)
            if self._stopping:
                worker.signal(signal.SIGUSR2)
            return worker.process, ours

    def _listen(self, worker: Worker, process: Process, sock: socket.socket) -> None:
        """A worker's thread: its frames, its death, the next one."""
        try:
            while not worker.over:
                with contextlib.suppress(EOFError, OSError):
                    while not worker.over:
                        self._take_in(worker, exactly(sock, struct.unpack("<I", exactly(sock, 4))[0]))
                process.wait()
                with worker.lock:
                    sock.close()
                    worker.sock = None
                if worker.over or self._stopping:
                    break
                worker.retire()
                worker.died += 1
                worker.in_a_row += 1
                code = process.wait()
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                if worker.in_a_row >= DEATHS:
                    raise RuntimeError(f"a worker process died {DEATHS} times in a row ({how})")
                message = f"{self._program}: worker process {worker.number + 1} died ({how}); another one goes on"
                print(message, file=sys.stderr, flush=True)
                process, sock = self._start(worker)
        except Exception as error:
            self._crawl.fail(error)
            worker.signal(signal.SIGKILL)
            process.wait()
            with worker.lock:
                sock.close()
                worker.sock = None
        finally:
            worker.over = True
            self.events.put("ended")

    # ----------------------------------------------------------------- messages

    def _owner(self, bucket: int, weight: int = 1) -> Worker:
        with self._lock:
            if self._owners[bucket] < 0:
                self._owners[bucket] = min(self.workers, key=lambda worker: worker.load).number
            worker = self.workers[self._owners[bucket]]
            worker.load += weight
            return worker

    def _send(self, worker: Worker, kind: bytes, data: bytes | memoryview, *, known: bool = False) -> None:
        """``known``: the worker said it itself, and need hear it only in another life."""
        whole = section(kind, ME, bytes(data))
        with worker.lock:
            worker.remember(whole)
            if worker.sock is not None and not known:
                with self._lock:
                    self._tally.sent(worker.number)
                worker.transmit(whole)

    def _take_in(self, worker: Worker, frame: bytearray) -> None:
        for kind, bucket, data in sections(frame):
            if kind == b"R":
                worker.in_a_row = 0
                with self._output:
                    written = self._into.emit_encoded(bucket, data)
                if not written:
                    self.events.put("cut off")
            elif kind == b"K":
                whose = [worker] if bucket == ME else [self._owner(bucket, 0)]
                with self._lock:
                    for one in self.workers if self._crawl.options.feeds else whose:
                        one.done.frombytes(data)
            elif kind in (b"S", b"F"):
                counts = orjson.loads(data)
                worker.stats, worker.frontier = counts.pop("stats"), counts.pop("frontier")
                worker.used, worker.over = counts, kind == b"F"
            elif kind == b"G":
                with self._lock:
                    self._budget += int(bytes(data))
            elif kind == b"H":
                for one in self.workers:
                    self._send(one, kind, data)
            elif kind == b"I":
                with self._lock:
                    self._tally.idle(worker.number, int(bytes(data)))
                self._end_if_over()
            elif bucket == ME:
                self._send(worker, kind, data, known=True)
            elif kind == b"L" and self._counts():
                depth, private, link_kind, targets, homes = orjson.loads(data)
                if link_kind == "page":
                    targets = [target for target in targets if self._may_go(target)]
                    homes = [None] * len(targets)
                if targets:
                    whole = orjson.dumps((depth, private, link_kind, targets, homes))
                    self._send(self._owner(bucket, len(targets)), kind, whole)
            elif kind == b"E" and self._counts() and not self._may_go(orjson.loads(data)[0]):
                continue
            else:
                self._send(self._owner(bucket), kind, data)

    def _counts(self) -> bool:
        return self._crawl.options.max_pages > 0

    def _may_go(self, target: str) -> bool:
        """With --max-pages: whether this is a new page, and there is room for it."""
        with self._lock:
            if self._budget < 1 or (key := key_of(target)) in self._taken:
                return False
            self._taken.add(key)
            self._budget -= 1
            return True

    def _end_if_over(self) -> None:
        with self._lock:
            over = self._tally.over
        for worker in self.workers if over else ():
            with worker.lock:
                worker.transmit(section(b"Z", ME, b"null"))

    # ----------------------------------------------------------------- the list

    def _route(self, urls: Iterable[str]) -> None:
        """The list's thread."""
        try:
            if self._crawl.knows_first:
                urls = self._crawl.listed.know_all(urls)
                with self._lines:
                    for url in urls:
                        self._announce(url)
                    self._flush()
            for line in urls:
                url = self._crawl.listed.keep_credentials(line)
                known, bucket, good = place(url)
                if self._stopping:
                    return
                if good and self._counts() and not self._crawl.options.feeds and not self._may_go(known):
                    continue
                worker = self._owner(bucket)
                with self._lines:
                    self._announce(url)
                    self._waiting[worker.number].append(url)
                    if len(self._waiting[worker.number]) >= LINES:
                        self._flush()
        except Exception as error:
            self._crawl.fail(error)
        with self._lines:
            self._flush()
        for worker in self.workers:
            self._send(worker, b"Y", b"null")
        with self._lock:
            self._tally.end_of_list()
        self._read_all.set()
        self._end_if_over()

    def _announce(self, url: str) -> None:
        """A host that is new is told to all, for links and credentials; so is a feed, which is no article then."""
        known, _, good = place(url)
        if good and self._origins is not None:
            name = known if self._crawl.options.feeds else origin(known)
            if name not in self._origins:
                self._origins.add(name)
                self._new_origins.append(name)

    def _flush_in_time(self) -> None:
        """A list may be a pipe that blocks: what came is not to wait for what comes."""
        while not self._read_all.wait(AGE):
            with self._lines:
                self._flush()

    def _flush(self) -> None:
        """Whose hosts are new is told to all, before any line goes."""
        if self._new_origins:
            for worker in self.workers:
                self._send(worker, b"O", orjson.dumps(self._new_origins))
            self._new_origins = []
        if len(credentials := self._crawl.listed.credentials) > self._credentials_sent:
            self._credentials_sent = len(credentials)
            for worker in self.workers:
                self._send(worker, b"U", orjson.dumps(credentials))
        for worker, lines in zip(self.workers, self._waiting, strict=True):
            if lines:
                self._send(worker, b"T", "\n".join(lines).encode("utf-8", "surrogatepass"))
                lines.clear()

    def _hand_out_recalled(self, frontier: Frontier) -> None:
        """What an earlier run left: ``crawl.journal.recall`` has put it into ``frontier``, it goes to its workers."""
        crawl = self._crawl
        known, counted, pages, queues = frontier.contents()
        self._budget -= counted
        self._taken.update(map(key_of, known) if self._counts() else ())
        for home in sorted(crawl.scope.homes):
            for worker in self.workers:
                self._send(worker, b"H", orjson.dumps(f"http://{home}/"))
        for name, found in queues.items():
            for run, targets in found.items():
                known.difference_update(targets)
                pages[name] = pages.get(name, 0) - len(targets) * (run.kind == "page")
                owner = self._owner(bucket_of(name), len(targets))
                for target in targets if crawl.options.feeds else ():
                    feed, article = crawl.feeds.entries[target]
                    self._send(owner, b"E", orjson.dumps((target, feed, article._asdict(), run.private)))
                if not crawl.options.feeds:
                    homes = [crawl.sitemaps.homes.get(target) for target in targets]
                    self._send(owner, b"L", orjson.dumps((run.depth, run.private, run.kind, targets, homes)))
        for url in known:
            for worker in self.workers if crawl.options.feeds else [self._owner(place(url)[1], 0)]:
                worker.done.append(key_of(url))
        for name, count in pages.items() if crawl.options.host_pages else ():
            self._send(self._owner(bucket_of(name), 0), b"P", orjson.dumps({name: max(0, count)}))
        for url, validators in crawl.feeds.validators.items():
            self._send(self._owner(place(url)[1], 0), b"V", orjson.dumps({url: validators}))
        for digest, url in crawl.bodies.items():
            self._send(self._owner(place(url)[1], 0), b"B", orjson.dumps((digest, url)))


def run_processes(
    crawl: Crawl, urls: Iterable[str], output: Output, count: int, make_driver: MakeDriver, program: str
) -> None:
    """Crawl ``urls`` in ``count`` worker processes, each with a driver of its own. A fresh interpreter finds it as
    ``Driver`` in the module ``program``."""
    Parent(crawl, output, count, make_driver, program).run(urls)
