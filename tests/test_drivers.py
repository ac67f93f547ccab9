"""Both drivers, the same tests over each: real servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import ctypes
import errno
import gc
import io
import itertools
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme

import crawl_async
import crawl_threads
from crawl import http_aiohttp, http_urllib
from crawl.core import Crawl
from crawl.errors import ERROR_KINDS, FetchError
from crawl.frontier import Frontier
from crawl.model import Options, Request, ScrapeResult
from crawl.url_list import read_urls
from crawl.urls import normalise
from html_parse import Page, parse_page
from runtime.loop import stopped_by_signals_in_a_thread
from runtime.options import EXIT_INTERRUPTED, EXIT_PIPE
from sandbox.faults import FAULTS, status_expect
from sandbox.sites import Sandbox
from tests.helpers import lock_order
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, holds_the_loop, wait_until
from tests.helpers.crawl import (
    DRIVERS,
    kind,
    run_here,
    run_program,
    scrape,
    start,
    take,
    taken,
    walk,
    walk_crawl,
)
from tests.helpers.web import AnyPage, Web


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_site_row_by_row(driver: str, web: Sandbox) -> None:
    urls = [web.url(f"/p/{page}.html", host=host) for host in range(4) for page in range(1, 20)]
    rows = scrape(driver, [*urls, urls[0], urls[0] + "#again"], concurrency=8)
    assert Counter(row.url for row in rows) == Counter(urls)
    for row in rows:
        assert (row.status, row.error, row.attempts, row.final_url) == (200, None, 1, row.url)
        assert row.bytes == 4000
        assert row.title
        assert row.word_count > 100
        assert len(row.links_found) > 5


def test_both_drivers_find_the_same(web: Sandbox) -> None:
    urls = [web.url(f"/p/{page}.html", host=host) for host in range(2) for page in range(1, 20)]
    urls += [web.fault_url(name) for name, fault in FAULTS.items() if fault.expect == "ok" and not fault.heavy]
    found = [
        {row.url: (row.status, row.title, row.word_count, row.links_found, row.error, row.final_url, row.bytes)
         for row in scrape(driver, urls)}
        for driver in DRIVERS
    ]  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == len(urls)


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_fault_is_one_row_of_the_right_kind_and_hurts_nobody_else(
    driver: str, web: Sandbox, tmp_path: Path
) -> None:
    healthy = [web.url(f"/p/{page}.html" if page else "/", host=host) for host in range(10) for page in range(20)]
    expected = {web.fault_url(name, host=23 if "absurd" in name else 10, run=tmp_path.name): fault.expect
                for name, fault in FAULTS.items()}  # fmt: skip
    expected |= {web.url(f"/status/{code}", host=11): status_expect(code) for code in range(100, 600)}
    hanging = {url for url, kinds in expected.items() if kinds == "timeout"}
    assert len(hanging) == 5
    stats, listed = tmp_path / "stats.json", tmp_path / "urls.txt"
    listed.write_text("\n".join([*expected, *healthy]))
    argv = ["--rate", "0", "--retries", "0", "--concurrency", "100", "--per-host", "100", "--grace", "0.1"]
    with start(driver, str(listed), *argv, "--timeout", "900", "--stats", str(stats)) as child:
        assert child.stdout
        late = threading.Timer(1000, child.kill)
        late.start()
        rows = [json.loads(child.stdout.readline()) for _ in range(len({*expected, *healthy}) - len(hanging))]
        child.send_signal(signal.SIGINT)  # else the others would take their 900 s
        out, err = child.communicate()
        late.cancel()
    assert child.returncode == EXIT_INTERRUPTED
    code, timed_out, more = run_program(driver, *hanging, *argv, "--timeout", "1")
    assert code == 0
    assert "Traceback" not in err.decode() + more
    assert "Warning" not in err.decode() + more
    assert {(row["url"], kind(row)) for row in map(json.loads, out.splitlines())} == {
        (u, "interrupted") for u in hanging
    }
    rows += map(json.loads, timed_out.splitlines())
    assert Counter(row["url"] for row in rows) == Counter([*expected, *healthy])
    assert [row for row in rows if row["url"] in healthy and row["error"]] == []
    wrong = [(row["url"], row["error"]) for row in rows if row["url"] in expected
             and kind(row) != expected[row["url"]]]  # fmt: skip
    assert wrong == []
    assert {kind(row) for row in rows} <= {"ok", *ERROR_KINDS} - {"internal"}
    assert min(row["duration_ms"] for row in rows if row["url"] in hanging) >= 990
    assert json.loads(stats.read_text())["peak_memory_mb"] <= 5 + 100


def holds_the_interpreter(seconds: float) -> None:
    """What a long match or a decoder in C does: nothing else of this process runs, but it takes no processor."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_time_limit_does_not_count_what_holds_us_up(driver: str) -> None:
    """The answer is complete when the limit has long passed, by the clock, and the server was not to blame."""
    body = b"<title>late</title>"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body), b"\r\n", body[:9], body[9:]]
            with contextlib.ExitStack() as stack:
                connections = [stack.enter_context(server.accept()[0]) for _ in range(3)]
                for held, connection in enumerate(connections):  # before the head, in it, before the body
                    connection.recv(1 << 16)
                    connection.sendall(b"".join(pieces[:held]))
                holds_the_interpreter(1.5)
                for held, connection in enumerate(connections):
                    for piece in pieces[held:]:
                        connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        url = "http://127.0.0.1:{1}/".format(*server.getsockname())
        rows = scrape(driver, [f"{url}{n}" for n in range(3)], timeout=1.0, retries=0, per_host=3, concurrency=3)
        thread.join()
    assert [(row.error, row.title) for row in rows] == [(None, "late")] * 3
    assert max(row.duration_ms for row in rows) < 1000


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_passes_is_tried_again_until_it_has_passed(driver: str, web: Sandbox) -> None:
    names = [name for name, fault in FAULTS.items() if fault.needs_retry and "absurd" not in name]
    urls = {web.fault_url(name, host=n, run=f"retry {driver}"): name for n, name in enumerate(names)}
    rows = scrape(driver, urls, retries=3)
    assert {urls[row.url]: kind(row) for row in rows} == dict.fromkeys(names, "ok")
    assert {urls[row.url]: row.attempts for row in rows} == {name: FAULTS[name].needs_retry + 1 for name in names}


@pytest.mark.parametrize("driver", DRIVERS)
def test_at_the_moment_of_sending_the_bound_is_exact(
    driver: str, web: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[float] = []
    lock = threading.Lock()
    real = Frontier.clear_to_send

    def clear_to_send(self: Frontier, request: Request, now: float) -> float:
        wait = real(self, request, now)
        if wait == 0.0:
            with lock:
                sent.append(now)
        return wait

    monkeypatch.setattr(Frontier, "clear_to_send", clear_to_send)
    hop = web.fault_url("redirect_3", host=5)
    urls = [web.url(f"/?n={n}", host=5) for n in range(60)] + [hop]
    rows = scrape(driver, urls, rate=100.0, burst=2, concurrency=30, per_host=30)
    assert [row.error for row in rows] == [None] * 61
    assert len(sent) >= 64  # a request that met a closed connection is sent, and counted, again
    sent.sort()
    for i, j in itertools.combinations_with_replacement(range(len(sent)), 2):
        assert j - i + 1 <= 2 + 100.0 * (sent[j] - sent[i]) + 1e-6


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_are_kept_and_bounded(driver: str) -> None:
    with Sandbox(hosts=1, pages=1, page_bytes=300) as web:
        rows = scrape(driver, [web.url(f"/?n={n}") for n in range(150)], per_host=3)
        assert [row.error for row in rows] == [None] * 150
        assert len({entry.connection for entry in web.log}) <= 4


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_are_kept_while_a_list_goes_round_many_hosts(driver: str) -> None:
    with Sandbox(hosts=40, pages=1, page_bytes=300) as web:
        urls = [web.url(f"/?n={n}", host=host) for n in range(5) for host in range(40)]
        rows = scrape(driver, urls, concurrency=4, per_host=1)
        assert [row.error for row in rows] == [None] * 200
        assert web.stats().connections == 40


def test_the_pool_of_the_threads_forgets_what_is_closed(web: Sandbox) -> None:
    crawl = Crawl(Options(rate=0, timeout=0.3))
    fetcher = http_urllib.Fetcher(crawl)
    paths = ["ok", "http10", "closes_keepalive", "closes", "junk_after", "never_answers"]
    crawl.frontier.add_all([web.fault_url(path, host=9, pool=1) for path in paths], crawl.clock())
    for _ in paths:
        fetcher.fetch(taken(take(crawl.frontier, crawl.clock())))
    assert len(fetcher._pool._in_use) == 0
    assert len(fetcher._pool._idle) <= 2
    fetcher.close()
    assert len(fetcher._pool._idle) == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_with_few_sockets_fewer_are_open_at_a_time(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[socket.socket]] = []
    refused = threading.Event()

    def few(*args: Any) -> socket.socket:
        if sum(one().fileno() >= 0 for one in opened if one()) >= 3:  # type: ignore[union-attr]
            refused.set()
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(weakref.ref(new := socket.socket(*args)))
        return new

    def page(host: int, path: str) -> AnyPage:
        assert refused.wait(HANG_LIMIT)
        return 200, {}, f"<title>{path}</title>"

    for module in (http_urllib, http_aiohttp):
        monkeypatch.setattr(module, "socket", types.SimpleNamespace(**vars(socket) | {"socket": few}))
    said: list[str] = []
    crawl = walk_crawl(depth=0)
    crawl.say = said.append
    rows: list[ScrapeResult] = []
    with Web(page) as web:
        walk(driver, crawl, [web.url(host, "/") for host in range(1, 13)], rows.append)
    assert [row.error for row in rows] == [None] * 12
    assert said == ["goes on with fewer connections at a time: Too many open files"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_is_left_behind(driver: str, web: Sandbox) -> None:
    before = set(threading.enumerate())
    sockets = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    scrape(driver, [web.url("/"), web.fault_url("never_answers"), "http://nowhere.invalid/"], timeout=0.2, retries=0)
    wait_until(lambda: set(threading.enumerate()) <= before)
    gc.collect()
    if sockets:
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= sockets + 2)  # the server's ends close when they notice


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_fault_of_our_own_costs_one_row(driver: str, web: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(body: bytes, url: str, content_type: str | None = None) -> Page:
        if url.endswith("/p/3.html"):
            raise ZeroDivisionError("planted")
        return parse_page(body, url, content_type)

    monkeypatch.setattr("crawl.rows.parse_page", broken)
    rows = scrape(driver, [web.url(f"/p/{n}.html") for n in range(1, 6)])
    assert sorted(kind(row) for row in rows) == ["internal", "ok", "ok", "ok", "ok"]
    assert {row.error for row in rows} == {None, "internal: ZeroDivisionError: planted"}


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_on_result_or_the_list_raises_comes_back(driver: str, web: Sandbox) -> None:
    seen: list[ScrapeResult] = []
    assert scrape(driver, [web.url("/")], on_result=seen.append) == []
    assert [row.status for row in seen] == [200]

    def refuse(row: ScrapeResult) -> None:
        raise LookupError("planted")

    with pytest.raises(LookupError, match="planted"):
        scrape(driver, [web.url(f"/?n={n}") for n in range(50)], on_result=refuse)

    def urls() -> Iterator[str]:
        yield web.url("/")
        raise LookupError("the list")

    with pytest.raises(LookupError, match="the list"):
        scrape(driver, urls())


def test_an_async_on_result_sets_the_pace(web: Sandbox) -> None:
    busy = most = 0

    async def slow(row: ScrapeResult) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0)
        busy -= 1

    options = Options(rate=0, concurrency=3)
    urls = [web.url(f"/?n={n}") for n in range(30)]
    assert asyncio.run(crawl_async.scrape_all(urls, options, on_result=slow)) == []
    assert 1 <= most <= 3


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_crawl_takes_its_locks_in_one_order(web: Sandbox, driver: str) -> None:
    """Only the frontier's nests: below the condition of the workers, above the buckets and the visited set."""
    urls = [web.url(f"/?order={n}", n % 8) for n in range(200)]
    with lock_order.LockOrder() as order:
        assert all(row.status == 200 for row in scrape(driver, urls, rate=10_000))
    nested = {"Frontier": {"TokenBucket", "Visited"}}
    if driver == "crawl_threads":
        nested["WorkQueue"] = {"Frontier", "TokenBucket"}
    assert order.stats() == nested


def test_a_cancelled_crawl_ends_at_once(web: Sandbox) -> None:
    async def main() -> None:
        urls = [web.url("/fault/never_answers?cancelled", host=7)]
        crawl = asyncio.create_task(crawl_async.scrape_all(urls, Options(rate=0)))
        await asyncio.to_thread(wait_until, lambda: bool(web.requests_for("/fault/never_answers?cancelled")))
        crawl.cancel()
        with pytest.raises(asyncio.CancelledError):
            await crawl
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("call", "held"),
    [
        ("await asyncio.to_thread(other.join); time.sleep(0.1)", True),
        ("compute()", True),
        ("other.join()", True),
        ("[time.sleep(0) for _ in range(30)]", False),
    ],
)
def test_what_holds_an_event_loop_is_found(call: str, held: bool) -> None:
    """The last one waits for nothing but the interpreter's lock, which the other thread has each time for a while."""
    program = f"""if True:
        import threading
        def compute():
            end = time.thread_time() + 0.1
            while time.thread_time() < end:
                sum(range(1000))
        async def main():
            watch_the_loop()
            await asyncio.sleep(0)
            other = threading.Thread(target=compute)
            other.start()
            {call}
            await asyncio.sleep(0)
            print("done")
        asyncio.run(main())
    """
    assert holds_the_loop(program, "done") == ({("", "main()")} if held else set())


def test_the_event_loop_is_never_blocked(web: Sandbox) -> None:
    program = """if True:
        import asyncio, sys
        import crawl_async
        from crawl import model
        async def main():
            watch_the_loop()
            options = model.Options(rate=0, timeout=5, retries=0)
            rows = await crawl_async.scrape_all(sys.stdin.read().split(), options)
            print(len(rows))
        asyncio.run(main(), debug=True)
    """
    names = [name for name, fault in FAULTS.items() if not fault.needs_retry and "endless" not in name]
    urls = [web.fault_url(name, host=12) for name in names if name not in ("huge_page", "gzip_bomb")]
    urls += [web.url(f"/p/{page}.html", host=13) for page in range(1, 20)]
    assert holds_the_loop(program, str(len(urls)), "\n".join(urls)) == set()


@pytest.mark.parametrize("driver", DRIVERS)
def test_certificates_are_checked_unless_told_otherwise(driver: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.1.1").configure_cert(context)
    with Sandbox(hosts=1, pages=3, page_bytes=4000, tls=context) as web:
        urls = [web.url("/p/1.html"), web.url("/p/2.html")]
        refused = scrape(driver, urls, retries=0)
        assert [kind(row) for row in refused] == ["tls", "tls"]
        assert "certificate" in str(refused[0].error)
        assert [row.error for row in scrape(driver, urls, insecure=True)] == [None, None]
        trusted = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(trusted))
        _, out, _ = run_program(driver, *urls, "--rate", "0", env=os.environ | {"SSL_CERT_FILE": str(trusted)})
        assert [json.loads(line)["error"] for line in out.splitlines()] == [None, None]
    gc.collect()


class Proxy(threading.Thread):
    """A forward proxy for one test: answers absolute-form requests itself, tunnels CONNECT."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://user:secret@127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with self.listener, contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as lines:
            head = list(iter(lambda: lines.readline().rstrip(b"\r\n"), b""))
            if not head:
                return
            method, target, _ = head[0].decode().split()
            signed = any(line.lower().startswith(b"proxy-authorization: basic ") for line in head)
            self.asked.append(f"{method} {target} {'signed' if signed else 'unsigned'}")
            if method != "CONNECT":
                body = f"<title>{target}</title>".encode()
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                               b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
                return
            host, _, port = target.partition(":")
            if host.endswith(".invalid"):
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=self.copy, args=(server, client), daemon=True)
                back.start()
                self.copy(client, server)
                back.join()

    @staticmethod
    def copy(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_proxy(driver: str) -> None:
    proxy = Proxy()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.1.1").configure_cert(context)
    with Sandbox(hosts=1, pages=1, page_bytes=4000, tls=context) as web:
        rows = scrape(
            driver,
            ["http://far.invalid/x?y", web.url("/"), "https://far.invalid/"],
            proxy=proxy.url,
            insecure=True,
            retries=0,
        )
    shutdown = socket.create_connection(proxy.listener.getsockname())
    proxy.listener.shutdown(socket.SHUT_RDWR)
    shutdown.close()
    found = {row.url.partition(":")[0] + str(row.status): row for row in rows}
    assert found["http200"].title == "http://far.invalid/x?y"
    assert found["https200"].error is None
    assert kind(found["httpsNone"]) == "connect"
    assert sorted(proxy.asked) == sorted(
        ["GET http://far.invalid/x?y signed", f"CONNECT 127.0.1.1:{web.port} signed", "CONNECT far.invalid:443 signed"]
    )
    gc.collect()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_proxy_of_the_environment_may_lack_its_scheme(driver: str) -> None:
    proxy = Proxy()
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment["http_proxy"] = proxy.url.removeprefix("http://")
    code, out, _ = run_program(driver, "http://far.invalid/x", "-q", env=environment)
    socket.create_connection(proxy.listener.getsockname()).close()
    proxy.listener.shutdown(socket.SHUT_RDWR)
    row = json.loads(out)
    assert (code, row["status"], row["title"]) == (0, 200, "http://far.invalid/x")
    assert proxy.asked == ["GET http://far.invalid/x signed"]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("form", ["json", "csv"])
def test_ctrl_c_writes_every_row_that_the_server_completed(driver: str, form: str) -> None:
    with Sandbox(hosts=10, pages=1, page_bytes=300, latency=0.05) as web:
        urls = "\n".join(web.url(f"/?n={n}", host=n % 10) for n in range(5000))
        with start(driver, "-", "--rate", "0", f"--{form}", stdin=subprocess.PIPE) as child:
            assert child.stdin
            child.stdin.write(urls.encode())
            child.stdin.close()
            child.stdin = None
            wait_until(lambda: len(web.log) > 100)
            child.send_signal(signal.SIGINT if form == "json" else signal.SIGTERM)
            out, err = child.communicate(timeout=PROGRAM_LIMIT)
        assert child.returncode == EXIT_INTERRUPTED
        text = out.decode()
        rows = json.loads(text) if form == "json" else list(csv.DictReader(io.StringIO(text, newline="")))
        assert len({row["url"] for row in rows}) == len(rows) == len(web.log)
        assert {row["error"] for row in rows} <= {None, ""}
        assert 100 < len(rows) < 5000
        assert "Traceback" not in err.decode()
        assert "not fetched" in err.decode()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("grace", ["60", "0.1"])
def test_what_does_not_finish_is_cut_off(driver: str, grace: str, web: Sandbox) -> None:
    path = f"/fault/never_answers?{driver}{grace}"
    with start(driver, web.url(path), web.url("/"), "--timeout", "90", "--grace", grace, "--rate", "0") as child:
        assert child.stdout
        first = json.loads(child.stdout.readline())
        assert first["status"] == 200
        wait_until(lambda: bool(web.requests_for(path)))
        child.send_signal(signal.SIGINT)
        if grace == "60":
            child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=PROGRAM_LIMIT)
    assert child.returncode == EXIT_INTERRUPTED
    assert kind(json.loads(out)) == "interrupted"
    assert "Traceback" not in err.decode()


def test_a_signal_that_another_thread_gets_is_an_event_too() -> None:
    """The system chooses a thread; the one that waits for events learns of it all the same."""
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    before, descriptor = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    with stopped_by_signals_in_a_thread(lambda: events.put("stop")):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            other = threading.Timer(0.05, lambda number=number: signal.pthread_kill(threading.get_ident(), number))
            other.start()
            assert events.get(timeout=HANG_LIMIT) == "stop"
            other.join()
    assert events.empty() and signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(descriptor) == descriptor


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_reader_that_leaves_ends_it_quietly(driver: str, web: Sandbox) -> None:
    urls = [web.url(f"/?n={n}") for n in range(500)]
    with start(driver, *urls, "--rate", "0") as child:
        assert child.stdout
        assert child.stderr
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(PROGRAM_LIMIT) == EXIT_PIPE
        assert child.stderr.read() == b""


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_full_disk_is_said_in_one_line(driver: str, web: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full (Linux)")
    code, _, err = run_program(driver, web.url("/"), "-q", "-o", "/dev/full")
    assert (code, err.count("\n")) == (1, 1)
    assert "No space left on device" in err
    code, _, err = run_here(capfd, driver, web.url("/"), "-o", "/no/such/folder/x")
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_cannot_be_written_is_said_before_the_crawl(
    driver: str, web: Sandbox, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "missing" / "stats.json"
    path = f"/?{driver}"
    code, out, err = run_here(capfd, driver, web.url(path), "--stats", str(stats))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert str(stats) in err and not web.requests_for(path)
    rows = tmp_path / "rows.jsonl"
    assert run_here(capfd, driver, web.url(path), "-q", "-o", str(rows)) == (0, "", "")
    written = rows.read_bytes()
    for form in ("--jsonl", "--csv"):
        code, out, err = run_here(capfd, driver, web.url(path), form, "-o", str(rows))
        assert (code, out, err.count("\n"), rows.read_bytes()) == (1, "", 1, written)
    table = tmp_path / "rows.csv"
    for _ in range(2):  # no journal, which could be gone on with
        assert run_here(capfd, driver, web.url(path), "-q", "--csv", "-o", str(table))[0] == 0
    assert len(web.requests_for(path)) == 3


def test_threads_are_started_as_there_is_work_and_where_there_are_none_left_those_go_on(
    web: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [web.url(f"/?threads={n}", host=n % 5) for n in range(40)]
    started: list[str] = []
    real = threading.Thread.start

    def begin(thread: threading.Thread) -> None:
        if thread.name.startswith("worker"):
            if len(started) == 3:
                raise RuntimeError("can't start new thread")
            started.append(thread.name)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", begin)
    rows: list[ScrapeResult] = []
    crawl, said = Crawl(Options(rate=0, concurrency=1_000_000)), list[str]()
    crawl.say = said.append
    crawl_threads.Driver(crawl, rows.append).run(urls)
    assert sorted(row.url for row in rows) == sorted(urls)
    assert [row.error for row in rows] == [None] * 40
    assert (len(started), len(said)) == (3, 1)
    code, out, err = run_program("crawl_threads", *urls[:3], "--concurrency", "1000000", "-q")
    assert (code, len(out.splitlines()), err) == (0, 3, "")


@pytest.mark.parametrize(
    ("line", "hint"),
    [("localhost:8080/x", True), ("a.example:80", True), ("127.0.0.1:8080/x", True), ("a.example/x", True),
     ("mailto:a@b.example", False), ("tel:123", False), ("ftp://a.example/", False)],
)  # fmt: skip
def test_a_line_that_lacks_its_scheme_gets_a_hint(line: str, hint: bool) -> None:
    with pytest.raises(FetchError) as caught:
        normalise(line)
    assert (caught.value.kind, "write http" in caught.value.detail) == ("invalid_url", hint)


@pytest.mark.parametrize("driver", DRIVERS)
def test_rows_come_while_the_list_is_still_being_written(driver: str, web: Sandbox) -> None:
    with start(driver, "-", "--rate", "0", "-q", stdin=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        for n in range(3):
            child.stdin.write(web.url(f"/?slow={n}\n").encode())
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["status"] == 200
        child.stdin.close()
        assert child.wait(PROGRAM_LIMIT) == 0


@pytest.fixture(scope="module")
def demos() -> dict[str, Future[tuple[int, bytes, str]]]:
    """Both at once: each waits for what never answers."""
    with ThreadPoolExecutor(len(DRIVERS)) as pool:
        return {driver: pool.submit(run_program, driver, "--demo", "--csv", "--retries", "1") for driver in DRIVERS}


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_demo_and_the_promised_commands(driver: str, demos: dict[str, Future[tuple[int, bytes, str]]]) -> None:
    code, out, err = demos[driver].result()
    assert (code, "Traceback" in err) == (0, False)
    rows = list(csv.DictReader(io.StringIO(out.decode(), newline="")))
    assert len(rows) == 63
    assert {kind(row) for row in rows if row["error"]} >= {"timeout", "reset", "http", "dns", "invalid_url", "decode"}
    listed = list(read_urls([str(HERE / "urls.txt")]))
    assert len(listed) >= 20
    assert len({normalise(url)[1] for url in listed}) == len(listed)
