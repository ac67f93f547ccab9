"""sandbox/logs.py: senders and the metadata API."""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import logs as sl
from tests.helpers.base import HANG_LIMIT, HERE, PROGRAM_LIMIT, SETTINGS, wait_until

SANDBOX_5424 = re.compile(
    rb"<(\d{1,3})>1 (\S+Z) (\S+) (\S+) (\d+) REQ \[request@32473 id=\"[0-9a-f]{12}\" ms=\"\d+\"\] [a-z ]+ serial=(\d+)"
)


SANDBOX_3164 = re.compile(rb"<(\d{1,3})>([A-Z][a-z]{2} [ \d]\d [\d:]{8}) (\S+) ([^\s\[]+)\[\d+\]: .* serial=(\d+)")


def logs_sandbox_read(datagram: bytes) -> tuple[str, int]:
    """The service and the serial number, in whatever format."""
    if datagram.startswith(b"{"):
        event = json.loads(datagram)
        datetime.fromisoformat(event["time"])
        return event["service"], int(event["message"].rpartition(" serial=")[2])
    if match := SANDBOX_5424.fullmatch(datagram):
        assert 128 <= int(match[1]) < 136
        datetime.fromisoformat(match[2].decode())
        return match[4].decode(), int(match[6])
    if match := SANDBOX_3164.fullmatch(datagram):
        assert 128 <= int(match[1]) < 136
        return match[4].decode(), int(match[5])
    datetime.fromisoformat(datagram[:23].decode())
    return "unknown", int(datagram.rpartition(b" serial=")[2])


def test_metadata_depends_on_the_name_alone() -> None:
    assert sl.metadata_of("orders-013") == {
        "team": "team-orders",
        "environment": "production",
        "region": "us-east-1",
        "version": "8.2.7",
    }
    assert sl.metadata_of("unknown-orders") is None
    assert sl.metadata_of("unknown") is None
    found = [sl.metadata_of(sl.service_name(n)) for n in range(500)]
    assert None not in found
    for name, least in (("team", 20), ("environment", 3), ("region", 4), ("version", 400)):
        assert len({each[name] for each in found if each}) >= least, name


@pytest.mark.parametrize("format", ["rfc5424", "rfc3164", "json", "text"])
def test_every_event_names_its_service_and_its_serial(format: sl.Format) -> None:
    senders = sl.Senders(("127.0.0.1", 9), services=30, formats=[format])
    written = sl.stamps(datetime(2026, 11, 3, 4, 5, 6, 78, tzinfo=UTC))
    assert written == (b"2026-11-03T04:05:06.000078Z", b"Nov  3 04:05:06", b"2026-11-03 04:05:06.000")
    services: Counter[str] = Counter()
    for serial in range(30 * sl.VARIANTS):
        datagram = senders.datagram(serial, written)
        assert logs_sandbox_read(datagram) == (senders.service_of(serial), serial)
        assert len(datagram) < 600
        services[senders.service_of(serial)] += 1
    wanted = {sl.service_name(n): sl.VARIANTS for n in range(30)}
    assert services == ({"unknown": 30 * sl.VARIANTS} if format == "text" else wanted)


def test_the_seed_makes_the_events() -> None:
    written = sl.stamps(datetime(2026, 11, 3, tzinfo=UTC))
    runs = [
        [senders.datagram(n, written) for n in range(300)]
        for senders in (sl.Senders(("127.0.0.1", 9), services=9, seed=seed) for seed in (1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({re.sub(rb"serial=\d+", b"", each) for each in runs[0]}) == 9 * sl.VARIANTS


@SETTINGS
@given(
    rate=st.floats(1, 1e5),
    total=st.none() | st.integers(0, 2000),
    steps=st.lists(st.sampled_from((0.0, 0.0005, 0.001, 0.02, 0.3)), min_size=1, max_size=50),
)
def test_pace_is_even(rate: float, total: int | None, steps: list[float]) -> None:
    begun = now = 1000.0
    pace, sent, prompt = sl.Pace(rate, total, now), 0, True
    for step in steps:
        now += step
        n = pace.due(now)
        assert 0 <= n <= max(1, math.ceil(rate * sl.ARREARS))
        sent += n
        prompt = prompt and step * rate + 1 <= pace.most
        wanted = (now - begun) * rate
        assert sent <= wanted + 1e-3
        assert sent <= (math.inf if total is None else total)
        if not pace.over:
            assert sent >= (now - begun - pace.late) * rate - 1 - 1e-3, "what is due is sent"
        if prompt:
            assert pace.late == 0
        assert pace.over == (sent == total)
    while total is not None and not pace.over:
        now += sl.ARREARS
        sent += pace.due(now)
    assert total is None or (sent == total and pace.due(now + 1e6) == 0)


def test_pace_refuses_what_is_no_rate() -> None:
    for rate, total in ((0.0, None), (-1.0, None), (math.inf, None), (math.nan, 1), (1.0, -1)):
        with pytest.raises(ValueError, match="rate must be"):
            sl.Pace(rate, total, 0.0)


@contextlib.contextmanager
def sink(address: str = "127.0.0.1") -> Iterator[tuple[tuple[str, int], list[tuple[bytes, str]]]]:
    """A socket that is read in a thread: its address, and what came and whence."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    came: list[tuple[bytes, str]] = []
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((address, 0))

        def read() -> None:
            while (got := sock.recvfrom(65_536))[0] != b"end":
                came.append((got[0], got[1][0]))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield sock.getsockname()[:2], came
        finally:
            with socket.socket(family, socket.SOCK_DGRAM) as last:
                last.sendto(b"end", sock.getsockname())
            reader.join()


def test_every_serial_is_sent_once() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    senders = sl.Senders(("127.0.0.1", 9), rate=20_000, services=7, total=210, first=1000)
    with sink() as (senders.to, came), senders:
        assert senders.wait(HANG_LIMIT)
        wait_until(lambda: len(came) == 210)
    assert sorted(logs_sandbox_read(datagram)[1] for datagram, _ in came) == list(range(1000, 1210))
    services = Counter(logs_sandbox_read(datagram)[0] for datagram, _ in came)
    assert services == senders.sent == {sl.service_name(n): 30 for n in range(7)}
    if sys.platform == "linux":
        pairs = {(source, logs_sandbox_read(datagram)[0]) for datagram, source in came}
        assert pairs == {(f"127.0.2.{n + 1}", sl.service_name(n)) for n in range(7)}
    assert senders.stats()[:3] == (210, 0, 0)
    assert all(map(operator.le, (threading.active_count(), len(os.listdir("/proc/self/fd"))), before))
    with pytest.raises(RuntimeError):
        senders.start()


def test_senders_stop_in_the_middle() -> None:
    with sink("::1") as (to, came), sl.Senders(to, rate=500, services=["one", "two"]) as senders:
        wait_until(lambda: len(came) >= 3)
        assert not senders.wait(0)
        senders.stop()
        senders.stop()
        assert senders.wait(0)
        wait_until(lambda: len(came) == senders.sent.total())
        assert "2 services" in repr(senders)
    assert sorted(logs_sandbox_read(datagram)[1] for datagram, _ in came) == list(range(len(came)))


def test_senders_say_that_nobody_listens() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        to = sock.getsockname()
    with sl.Senders(to, rate=20_000, services=3, total=30) as senders:
        assert senders.wait(HANG_LIMIT)
    assert senders.stats().events == 30
    assert senders.stats().failed == 0
    assert senders.stats().refused == 27  # each sender's next one hears of the one before


def test_senders_count_what_the_kernel_does_not_take() -> None:
    with sink() as (to, came):
        senders = sl.Senders(to, rate=20_000, services=2, total=20, formats=["text"])
        senders._templates[0] = [sl.Template(b"x" * 70_000, 0, b"", b"")] * sl.VARIANTS
        with senders:
            assert senders.wait(HANG_LIMIT)
            wait_until(lambda: len(came) == 10)
    assert senders.stats()[:3] == (10, 10, 0)
    assert senders.sent == {"unknown": 10}


def test_senders_refuse_nonsense() -> None:
    wrong: list[dict[str, Any]] = [{"services": 0}, {"services": ["a", "a"]}, {"formats": []}, {"formats": ["xml"]}]
    for options in [*wrong, {"rate": 0}, {"total": -1}]:
        with pytest.raises(ValueError, match=r"needed|a format is|rate must be"):
            sl.Senders(("127.0.0.1", 9), **options)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="address"):
        sl.Senders(("localhost", 9)).start()
    assert len(os.listdir("/proc/self/fd")) <= before


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=HANG_LIMIT) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


def test_api_answers_and_counts() -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with sl.MetadataApi() as api:
        assert get(api.url("orders-013")) == (
            200,
            {"service": "orders-013", **(sl.metadata_of("orders-013") or {})},
        )
        assert get(api.url("b%C3%BCro%2F1"))[1]["service"] == "büro/1"
        assert get(api.url("unknown-1")) == (404, None)
        assert get(api.url("").replace("services", "other"))[1] == {"team": "stray"}
        api.answers["odd"] = b"[]"
        assert get(api.url("odd")) == (200, [])
        assert api.requests == {"orders-013": 1, "büro/1": 1, "unknown-1": 1, "odd": 1}
        with socket.create_connection((api.host, api.port)) as sock:
            sock.sendall(b"POST /services/x HTTP/1.1\r\n\r\n")
            assert sock.makefile("rb").read().startswith(b"HTTP/1.1 400")
        assert api.stats()[:3] == ("ok", 4, 6)
        assert api.stats().strays == 1
        with pytest.raises(ValueError, match="a mode is one of"):
            api.mode = "lazy"  # type: ignore[assignment]
        with pytest.raises(RuntimeError):
            api.start()
        assert "running" in repr(api)
        idle = socket.create_connection((api.host, api.port))
        wait_until(lambda: api.stats().open == 1)
        port = api.port
        api.stop()
        assert idle.recv(1) == b""
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((api.host, api.port))
        api.start()
        assert api.port == port
        assert get(api.url("a"))[0] == 200
    assert all(map(operator.le, (threading.active_count(), len(os.listdir("/proc/self/fd"))), before))


def test_api_holds_answers_and_closes_what_is_open() -> None:
    with sl.MetadataApi() as api:
        api.mode = "held"
        answers: list[Any] = []
        asker = threading.Thread(target=lambda: answers.append(get(api.url("a"))[0]))
        asker.start()
        wait_until(lambda: api.requests["a"] == 1)
        assert answers == []
        api.mode = "error"
        asker.join()
        assert answers == [500]
        api.mode = "silent"
        with socket.create_connection((api.host, api.port)) as sock:
            sock.sendall(b"GET /services/a HTTP/1.1\r\n\r\n")
            wait_until(lambda: api.requests["a"] == 2)
            api.mode = "down"
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""


def logs_sandbox_command(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sandbox", "logs", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)


def test_command_sends_and_ends() -> None:
    with sink() as (to, came):
        arguments = (
            "--to",
            f"127.0.0.1:{to[1]}",
            "--rate",
            "400",
            "--seconds",
            "0.5",
            "--services",
            "4",
            "--first",
            "7",
        )
        with logs_sandbox_command(*arguments) as command:
            out, err = command.communicate(timeout=PROGRAM_LIMIT)
        assert command.returncode == 0, err
        wait_until(lambda: len(came) == 200)
    assert re.fullmatch(r"sent 200 events in \d+\.\d\d s, \d+/s: 0 failed, 0 refused, \d+\.\d\d s late\n", out)
    assert {logs_sandbox_read(datagram)[1] for datagram, _ in came} == set(range(7, 207))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_ends_by_a_signal(number: signal.Signals) -> None:
    with sink() as (to, came):
        arguments = ("--to", f"127.0.0.1:{to[1]}", "--metadata-port", "0", "--formats", "json", "--mode", "rubbish")
        with logs_sandbox_command(*arguments) as command:
            assert command.stderr is not None
            url = command.stderr.readline().removeprefix("metadata at ").strip()
            with pytest.raises(json.JSONDecodeError):
                get(url.replace("{service}", "a"))
            wait_until(lambda: len(came) > 3)
            command.send_signal(number)
            out, err = command.communicate(timeout=PROGRAM_LIMIT)
        assert (command.returncode, err) == (130, "")
        wait_until(lambda: len(came) == int(out.split()[1].replace(",", "")))
    assert all(datagram.startswith(b"{") for datagram, _ in came)


def test_command_ended_as_it_begins_tells_what_was_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, before = sl.Senders.start, signal.getsignal(signal.SIGTERM)
    with sink() as (to, came):

        def interrupted(self: sl.Senders) -> sl.Senders:
            start(self)
            wait_until(lambda: len(came) > 3)
            raise KeyboardInterrupt

        monkeypatch.setattr(sl.Senders, "start", interrupted)
        try:
            assert sl.main(["--to", f"127.0.0.1:{to[1]}"]) == 130
        finally:
            signal.signal(signal.SIGTERM, before)
        sent = int(capsys.readouterr().out.split()[1].replace(",", ""))
        wait_until(lambda: len(came) == sent)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--to or --metadata-port is needed"),
        (["--to", "127.0.0.1"], 2, "address"),
        (["--to", "127.0.0.1:70000"], 2, "is no port"),
        (["--to", "127.0.0.1:9", "--formats", "xml"], 2, "a format is one of"),
        (["--to", "127.0.0.1:9", "--rate", "-1"], 2, "rate must be"),
        (["--to", "127.0.0.1:9", "--seconds", "inf"], 2, "infinity"),
        (["--metadata-port", "70000"], 2, "a port is"),
        (["--metadata-port", "{taken}"], 1, "in use"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert sl.main([each.replace("{taken}", port) for each in arguments]) == code
    assert says in capsys.readouterr().err


def test_targets() -> None:
    assert sl.parse_target("[::1]:5514") == ("::1", 5514)
    assert sl.parse_target("127.0.0.1:1") == ("127.0.0.1", 1)
    for wrong in ("", ":1", "::1", "1.2.3.4:", "1.2.3.4:0", "1.2.3.4:+1", "host:1"):
        with pytest.raises(ValueError, match=r"address|port"):
            sl.parse_target(wrong)
