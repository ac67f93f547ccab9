"""crawl/processes.py: one crawl in several processes."""

from __future__ import annotations

import contextlib
import csv
import http.client
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crawl import processes as cp
from crawl import wire
from sandbox.faults import FAULTS
from sandbox.sites import Sandbox
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, wait_until


class Web:
    """A web of `hosts` loopback addresses: pages are functions of (host, path); what was asked for, and when."""

    def __init__(self, page: Callable[[int, str], tuple[int, dict[str, str], str]]) -> None:
        self.log: list[tuple[float, str, str]] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                host = self.headers["Host"].partition(":")[0]
                web.log.append((time.monotonic(), host, self.path))
                status, headers, body = page(int(host.rpartition(".")[2]), self.path)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in ({"Content-Type": "text/html"} | headers).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body.encode())))
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *args: Any) -> None: ...

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 256
            block_on_close = False

            def handle_error(self, *args: Any) -> None: ...

        self._server = Server(("0.0.0.0", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def url(self, host: int, path: str) -> str:
        return f"http://127.0.2.{host}:{self.port}{path}"

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def shares_start(*argv: object, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    command = [sys.executable, str(HERE / "crawl_async.py"), *map(str, argv)]
    with subprocess.Popen(command, cwd=HERE, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


def shares_run(*argv: object, input: bytes = b"", **more: Any) -> tuple[int, bytes, str]:
    with shares_start(*argv, **more) as child:
        out, err = child.communicate(input, timeout=PROGRAM_LIMIT)
    return child.returncode, out or b"", err.decode()


def shares_rows(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def shares_workers(program: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(program.pid).children())
    return []


def shares_together(*calls: Callable[[], Any]) -> list[Any]:
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n, call=call: found.__setitem__(n, call())) for n, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[n] for n in range(len(calls))]


def test_shares_a_list_has_the_same_rows_as_in_one_process() -> None:
    """Duplicates, lines that are no URLs, and every way to misbehave; redirects to hosts of another worker."""
    light = [name for name, fault in FAULTS.items() if not fault.heavy and not fault.needs_retry]
    names = [name for name in light if FAULTS[name].expect != ("timeout",)]

    def hanging() -> set[str]:
        with Sandbox(hosts=5) as site:
            urls = [site.fault_url(name, n % 5) for n, name in enumerate(sorted({*light} - {*names}))]
            code, out, err = shares_run(*urls, "--rate", 0, "--timeout", 1, "--retries", 0, "--processes", 3, "-q")
        assert (code, err, len(shares_rows(out))) == (0, "", len(urls))
        return {row["error"].partition(":")[0] for row in shares_rows(out)}

    def crawl(processes: int) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
        with Sandbox(hosts=5, pages=6, page_bytes=3000) as site:
            urls = [*site.site_urls(), *(site.fault_url(name, n % 5) for n, name in enumerate(names))]
            urls += [url + "#again" for url in urls] + [url.replace("http:", "HTTP:") for url in urls[:9]]
            urls += ["no url", "http://", "ftp://a/", "no url", "http://[", "x" * 9000]
            argv = ("-", "--rate", 0, "--timeout", 900, "--retries", 0, "--processes", processes)
            code, out, err = shares_run(*argv, "--stats", "/dev/stderr", "-q", input="\n".join(urls).encode())
            assert code == 0, err
            stats = json.loads(err)
        rows = []
        for row in shares_rows(out):
            kept = {name: value for name, value in row.items() if name not in ("fetched_at", "duration_ms")}
            rows.append(tuple(json.dumps(value).replace(f":{site.port}", "") for value in kept.values()))
        return rows, stats

    (one, of_one), (three, of_three), kinds = shares_together(lambda: crawl(1), lambda: crawl(3), hanging)
    assert kinds == {"timeout"}
    assert Counter(row[0] for row in three) == Counter(row[0] for row in one)
    assert max(Counter(row[0] for row in three).values()) == 1
    unsteady = {f"/fault/{name}" for name, fault in FAULTS.items() if len(fault.expect) > 1} | {
        "redirect_nowhere"
    }  # names its port
    steady = [{row for row in rows if not any(name in row[0] for name in unsteady)} for rows in (one, three)]
    assert steady[0] - steady[1] == set() == steady[1] - steady[0]
    assert len(steady[0]) > 60
    assert (
        of_three["rows"]
        == len(three)
        == of_three["ok"] + of_three["failed"]
        == sum(of_three["errors"].values()) + of_three["ok"]
    )
    assert sum(one["rows"] for one in of_three["processes"]) == len(three)
    assert len([one for one in of_three["processes"] if one["rows"]]) == 3
    assert of_three["duplicates"] == of_one["duplicates"]
    assert of_three["peak_memory_mb"] > max(one["peak_memory_mb"] for one in of_three["processes"]) > 10


def shares_site(host: int, path: str) -> tuple[int, dict[str, str], str]:
    """Nine hosts that link to each other. robots.txt of an even host is at the next one; some pages are moved."""
    if path == "/robots.txt":
        rules = "User-agent: *\nDisallow: /closed\n"
        return (
            (302, {"Location": f"//127.0.2.{host % 9 + 1}:{PORT[0]}/rules"}, "") if host % 2 == 0 else (200, {}, rules)
        )
    if path == "/rules":
        return 200, {"Content-Type": "text/plain"}, "User-agent: *\nDisallow: /closed\n"
    if path.startswith("/moved"):
        return 301, {"Location": f"//127.0.2.{host % 9 + 1}:{PORT[0]}/p{path[-1]}"}, ""
    if path.startswith("/round"):
        return 302, {"Location": f"//127.0.2.{host % 2 + 1}:{PORT[0]}/round"}, ""
    links = [f"/p{n}" for n in range(6)] + ["/closed", f"/moved{host % 6}"]
    links += [
        f"//127.0.2.{other}:{PORT[0]}{path}" for other in (host % 9 + 1, (host * 4) % 9 + 1) for path in ("/", "/p1")
    ]
    return 200, {}, f"<title>{host} {path}</title>" + "".join(f"<a href='{link}'>a link</a>" for link in links)


PORT = [0]


def test_shares_links_redirects_and_rules_go_over_to_the_worker_of_their_host() -> None:
    found = []
    with Web(shares_site) as web:
        PORT[0] = web.port
        for processes in (1, 2, 3):
            web.log.clear()
            argv = (web.url(1, "/"), web.url(2, "/round"), "--depth", 9, "--within", "any", "--rate", 0)
            code, out, err = shares_run(*argv, "--processes", processes, "--max-redirects", 5)
            assert code == 0, err
            rows = shares_rows(out)
            assert max(Counter(row["url"] for row in rows).values()) == 1
            asked = Counter((host, path) for _, host, path in web.log)
            twice = {
                what for what, times in asked.items() if times > 1 and not what[1].startswith(("/round", "/rules"))
            }
            assert twice == set()  # whoever finds it, and however it is reached
            assert not [path for _, path in asked if path == "/closed"]
            assert {(row["error"] or "ok").partition(":")[0] for row in rows} <= {"ok", "robots", "duplicate"}
            # A page that is moved and one that is linked to are one: under which of its URLs is a matter of time.
            urls = {row["url"] for row in rows} | {row["final_url"] for row in rows if row["error"] is None}
            round_ = [(row["status"], row["redirects"], row["error"]) for row in rows if row["url"].endswith("/round")]
            found.append((urls, set(asked), round_))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 9 * 9 + 1 and len(found[0][2]) == 1


def test_shares_bounds_hold_over_all_workers() -> None:
    """--rate for each host (gaps in the server's log), --max-pages in all, --json in one piece, redirects in rounds."""
    with Web(shares_site) as web:
        PORT[0] = web.port
        argv = (web.url(1, "/"), "--depth", 9, "--within", "any", "--rate", 20, "--max-pages", 31, "--json")
        code, out, err = shares_run(*argv, "--processes", 2)
        assert code == 0, err
        rows = json.loads(out)
        fetched = [row for row in rows if not (row["error"] or "").startswith("robots")]  # those give their place back
        assert len({row["url"] for row in rows}) == len(rows) and len(fetched) <= 31 <= len(rows)
        for host in {host for _, host, _ in web.log}:
            times = [at for at, where, _ in web.log if where == host]
            # The first may have been seen late, robots.txt or the rules for another host; a page goes after robots.txt.
            assert max(times) - min(times) >= (len(times) - 3) / 20
        urls = [web.url(1, "/"), web.url(2, "/"), web.url(2, "/round"), "nonsense://"]
        code, out, err = shares_run(*urls, "--csv", "--rate", 0, "--processes", 2)
        table = {row["url"]: row["error"] for row in csv.DictReader(io.StringIO(out.decode(), newline=""))}
        why = "invalid_url: only http and https are fetched, not nonsense"
        assert table == dict(zip(urls, ["", "", "redirects: more than 10", why], strict=True)) and out.count(b"\n") == 5


def test_shares_a_killed_worker_costs_nothing_and_a_killed_parent_leaves_nothing(tmp_path: Path) -> None:
    open_ = threading.Event()

    def page(host: int, path: str) -> tuple[int, dict[str, str], str]:
        if path[-1] in "67" and host > 19:
            open_.wait(HANG_LIMIT)  # in flight when the worker is killed
        return shares_site(host, path) if host < 20 else (200, {}, f"<title>{path}</title>")

    with Web(page) as web:
        PORT[0] = web.port
        urls = [web.url(20 + n % 4, f"/{n}") for n in range(200)]
        command = (
            "-",
            "--rate",
            0,
            "--concurrency",
            8,
            "--per-host",
            4,
            "--processes",
            2,
            "--stats",
            tmp_path / "stats",
        )
        with shares_start(*command, "-o", tmp_path / "rows") as program:
            program.stdin.write("\n".join(urls).encode())  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            wait_until(lambda: len([1 for _, _, path in web.log if path[-1] in "67"]) >= 8)
            wait_until(lambda: (tmp_path / "rows").read_bytes().count(b"\n") >= 10)
            victim = shares_workers(program)[0]
            victim.kill()
            wait_until(lambda: len({one.pid for one in shares_workers(program)} - {victim.pid}) == 2)
            open_.set()
            _, err = program.communicate(timeout=PROGRAM_LIMIT)
        rows = shares_rows((tmp_path / "rows").read_bytes())
        assert program.returncode == 0 and b"died (signal 9)" in err
        assert Counter(row["url"] for row in rows) == Counter(urls)
        asked = Counter(path for _, _, path in web.log)
        assert max(asked.values()) == 2
        assert (
            4 <= sum(times == 2 for times in asked.values()) <= 4 + 30
        )  # those in flight, and rows not handed over yet
        stats = json.loads((tmp_path / "stats").read_text())
        assert (stats["rows"], stats["ok"]) == (200, 200)
        assert sum(one["deaths"] for one in stats["processes"]) == 1

        open_.clear()
        web.log.clear()
        with shares_start(*command) as program:
            program.stdin.write("\n".join(urls).encode())  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            wait_until(lambda: len(shares_workers(program)) == 2 and len(web.log) > 20)
            orphans = shares_workers(program)
            program.kill()
            wait_until(lambda: not any(one.is_running() and one.status() != "zombie" for one in orphans))
        open_.set()


def test_shares_stop_in_two_stages_and_worker_that_always_dies() -> None:
    gate = threading.Event()

    def page(host: int, path: str) -> tuple[int, dict[str, str], str]:
        if path == "/slow":
            gate.wait(HANG_LIMIT)
        return 200, {}, f"<title>{path}</title>"

    with Web(page) as web:
        urls = [web.url(host, path) for host in range(1, 9) for path in ("/slow", "/quick")]

        def stopped(first: int) -> dict[str, Any]:
            with shares_start("-", "--rate", 5, "--json", "--grace", 60, "--processes", 2) as program:
                program.stdin.write(("\n".join(urls) + "\n").encode())  # type: ignore[union-attr]
                program.stdin.flush()  # type: ignore[union-attr]
                wait_until(lambda: sum(path == "/slow" for _, _, path in web.log) == 8)
                workers = shares_workers(program)
                os.kill(program.pid, first)
                for worker in workers:  # as a terminal does
                    worker.send_signal(signal.SIGINT)
                if first == signal.SIGINT:
                    gate.set()  # the grace time is enough
                else:
                    os.kill(program.pid, signal.SIGINT)  # the second
                out, err = program.communicate(timeout=PROGRAM_LIMIT)
            assert not any(worker.is_running() for worker in workers)
            assert program.returncode == 130 and b"interrupted; " in err and b"Traceback" not in err
            rows = json.loads(out)
            assert max(Counter(row["url"] for row in rows).values()) == 1
            return {row["url"]: row["error"] for row in rows if row["url"].endswith("slow")}

        slow = {url for url in urls if url.endswith("slow")}
        why = "interrupted: stopped before the answer was complete"
        assert stopped(signal.SIGTERM) == dict.fromkeys(slow, why)
        web.log.clear()
        assert stopped(signal.SIGINT) == dict.fromkeys(slow)

        gate.clear()
        with shares_start(*urls, "--processes", 2, "-q") as program:
            dead: set[int] = set()
            while len(dead) < cp.DEATHS and program.poll() is None:
                if len(found := shares_workers(program)) == 2 or dead:
                    for worker in [worker for worker in found if worker.pid > max(dead, default=found[0].pid)]:
                        dead.add(worker.pid)
                        worker.kill()
            _, err = program.communicate(timeout=PROGRAM_LIMIT)
        gate.set()
    assert program.returncode == 1 and b"died 3 times in a row" in err and b"Traceback" not in err


def test_shares_a_reader_that_leaves_ends_it() -> None:
    with Sandbox(hosts=4, pages=400, page_bytes=3000) as site:
        urls = "\n".join(site.site_urls()).encode()
        reading, writing = os.pipe()
        with shares_start("-", "--rate", 0, "--processes", 2, stdout=writing) as program:
            os.close(writing)
            program.stdin.write(urls)  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            os.read(reading, 100)
            workers = shares_workers(program)
            os.close(reading)
            _, err = program.communicate(timeout=PROGRAM_LIMIT)
    assert (program.returncode, err) == (141, b"") and len(workers) == 2
    assert not any(worker.is_running() for worker in workers)


# ------------------------------------------------------------------------------------------------------------- the end


def shares_model(tally: type[cp.Tally], workers: int, data: st.DataObject) -> int:
    """A crawl in which messages take their time; every job leads to some more. How often ``over`` was said rightly."""
    end = tally(workers)
    log: list[list[int]] = [[] for _ in range(workers)]  # what was sent to each: jobs, by how deep they go
    to: list[deque[int]] = [deque() for _ in range(workers)]
    back: list[deque[tuple[str, int, int]]] = [deque() for _ in range(workers)]
    jobs: list[list[int]] = [[] for _ in range(workers)]
    received, told = [0] * workers, [-1] * workers
    listed, deaths = data.draw(st.integers(0, 4)), 2

    def send(worker: int, job: int) -> None:
        log[worker].append(job)
        end.sent(worker)
        to[worker].append(job)

    for _ in range(400):
        for w in range(workers):
            if not jobs[w] and told[w] != received[w]:  # nothing to do: it says so, after all else that it said
                told[w] = received[w]
                back[w].append(("idle", received[w], 0))
        moves = [("list", 0)] * (listed >= 0)
        moves += [("deliver", w) for w in range(workers) if to[w]] + [("work", w) for w in range(workers) if jobs[w]]
        moves += [("hear", w) for w in range(workers) if back[w]] + [("die", w) for w in range(workers) if deaths]
        alive = listed >= 0 or any(to) or any(jobs) or any(item[0] == "job" for line in back for item in line)
        assert not (end.over and alive), "it was over too soon"
        moves = [move for move in moves if move[0] != "die" or alive]
        if not moves:
            break
        what, w = data.draw(st.sampled_from(moves))
        if what == "list":
            if listed:
                send(data.draw(st.integers(0, workers - 1)), data.draw(st.integers(0, 2)))
            else:
                end.end_of_list()
            listed -= 1
        elif what == "deliver":
            jobs[w].append(to[w].popleft())
            received[w] += 1
        elif what == "work":
            job = jobs[w].pop()
            for _ in range(data.draw(st.integers(0, 2)) if job else 0):
                back[w].append(("job", data.draw(st.integers(0, workers - 1)), job - 1))
        elif what == "hear":
            kind, number, job = back[w].popleft()
            if kind == "idle":
                end.idle(w, number)
            else:
                send(number, job)
        else:
            deaths -= 1
            for line in (to[w], jobs[w], back[w]):
                line.clear()
            received[w], told[w] = 0, -1
            end.restart(w)
            for job in log[w]:
                end.sent(w)
                to[w].append(job)
    else:
        return 0
    assert end.over, "it never ends"
    return 1


SHARES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@SHARES
@given(st.integers(1, 3), st.data())
def test_shares_the_end_is_seen_when_it_has_come_and_not_before(workers: int, data: st.DataObject) -> None:
    shares_model(cp.Tally, workers, data)


@pytest.mark.parametrize(
    ("does", "over"),
    [
        ("", False), ("e", False), ("e0.0 e1.0", False), ("e0.0 e1.0 L", True), ("L s0 e0.0 e1.0", False),
        ("L s0 e0.1 e1.0", True), ("L s0 s1 e0.1 e1.0", False), ("s0 e0.1 e1.0 L r0", False),
        ("s0 e0.1 e1.0 L r0 s0", False),
        ("s0 e0.1 e1.0 L r0 s0 e0.1", True),
    ],
)  # fmt: skip
def test_shares_tally_in_rows(does: str, over: bool) -> None:
    tally = cp.Tally(2)
    for word in does.split():
        number = int(word[1]) if len(word) > 1 else 0
        if word[0] == "L":
            tally.end_of_list()
        elif word[0] == "e" and len(word) > 1:
            tally.idle(number, int(word[3:]))
        elif word[0] in "sr":
            (tally.sent if word[0] == "s" else tally.restart)(number)
    assert tally.over is over


def test_shares_the_parts_are_whole() -> None:
    for total in range(40):
        for parts in range(1, 9):
            found = [cp.split(total, parts, part) for part in range(parts)]
            assert sum(found) == total and max(found) - min(found) <= 1
    data = b"".join(wire.section(bytes([65 + n]), n, b"x" * n) for n in range(5))
    assert [(kind, bucket, bytes(content)) for kind, bucket, content in wire.sections(data)] == [
        (bytes([65 + n]), n, b"x" * n) for n in range(5)
    ]
    assert wire.bucket_of("example.com") == wire.bucket_of("www.example.com") == 1307
