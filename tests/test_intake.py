"""logs/intake.py: the queue, and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import logging
import math
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from logs import event_queue
from logs import intake as li
from logs.parse import Event
from runtime.loop import new_loop
from runtime.options import split_address
from tests.absent import needs
from tests.helpers.base import HANG_LIMIT, SETTINGS, World, run_task, ticks, until_async

INTAKE_EPOCH = datetime(2026, 3, 1, tzinfo=UTC)


def intake_event(number: int, severity: int = 6, message: str = "", attributes: str = "") -> Event:
    return Event(INTAKE_EPOCH, INTAKE_EPOCH, "service", str(number), severity, message, attributes, None)


def intake_numbers(events: Sequence[Event] | None) -> list[int] | None:
    return None if events is None else [int(event.host) for event in events]


def intake_counts(queue: event_queue.EventQueue) -> None:
    stats = queue.stats()
    assert stats.received == stats.queued + stats.taken + sum(stats.dropped.values())
    assert set(stats.dropped) == set(event_queue.CAUSES)


def test_queue_row_by_row() -> None:
    world = World(100.0)
    queue = event_queue.EventQueue(4, 100_000, max_items=3, max_age=5.0, batch_bytes=50_000, clock=world.clock)
    assert (queue.take(), queue.drain(), queue.due_in(), len(queue)) == (None, [], math.inf, 0)
    queue.put([])
    assert queue.due_in() == math.inf
    queue.put([intake_event(1), intake_event(2)])
    world.now = 102.0
    assert (queue.due_in(), queue.take(), queue.stats().age) == (3.0, None, 2.0)
    world.now = math.nextafter(105.0, 0.0)
    assert queue.take() is not None  # less than the clock can tell from due
    queue.put([intake_event(n) for n in (3, 4, 5)])
    assert (queue.due_in(), intake_numbers(queue.take()), queue.take()) == (0.0, [3, 4, 5], None)
    queue.put([intake_event(6)])
    assert (intake_numbers(queue.drain()), queue.drain(), len(queue)) == ([6], [], 0)
    queue.put([intake_event(n) for n in range(7, 12)])  # one more than it holds
    assert (queue.stats().dropped["queue full"], intake_numbers(queue.take()), queue.take()) == (1, [7, 8, 9], None)
    queue.put([intake_event(12)])
    assert (intake_numbers(queue.drain()), queue.stats().received, queue.stats().taken) == ([10, 12], 12, 11)
    intake_counts(queue)
    assert repr(queue).startswith("<EventQueue received=12 queued=0 bytes=0 taken=11 dropped={'queue full': 1,")


def test_queue_is_bounded_in_bytes() -> None:
    queue = event_queue.EventQueue(10, 20_000, max_items=10, batch_bytes=10_000, clock=World().clock)
    queue.put([intake_event(1, message="x" * 6000), intake_event(2, attributes="x" * 6000), intake_event(3)])
    assert (queue.stats().bytes, queue.due_in()) == (12_000 + 3 * event_queue.EVENT_BYTES, 0.0)
    queue.put(
        [
            intake_event(4, message="x" * 7000),
            intake_event(5, message="x" * 6000),
            intake_event(6, message="x" * 20_000),
        ]
    )
    assert queue.stats().dropped == {"queue full": 0, "queue bytes": 1, "less severe": 0, "too large": 1}
    assert [intake_numbers(queue.take()) for _ in range(2)] == [[1], [2, 3]]
    assert (queue.take(), intake_numbers(queue.drain()), queue.stats().bytes) == (None, [5], 0)
    queue.put([intake_event(7, message="x" * 12_000)])  # more than a batch: alone
    assert (intake_numbers(queue.take()), queue.stats().bytes) == ([7], 0)
    wide = event_queue.EventQueue(10, 20_000, max_items=10, batch_bytes=10_000)
    wide.put([intake_event(1, message="\U0001f642" * 1000, attributes="\N{SNOWMAN}" * 1000)])
    assert 6000 <= wide.stats().bytes - event_queue.EVENT_BYTES <= 6000 + 200  # as Python holds them
    intake_counts(queue)


@pytest.mark.parametrize("policy", event_queue.POLICIES)
def test_queue_what_goes_when_it_is_full(policy: event_queue.Policy) -> None:
    queue = event_queue.EventQueue(4, 1_000_000, policy, max_items=4, batch_bytes=100_000)
    queue.put([intake_event(n, severity) for n, severity in enumerate((6, 7, 3, 7))])
    queue.put([intake_event(4, 6), intake_event(5, 7), intake_event(6, 6), intake_event(7, 0), intake_event(8, 0)])
    expected = {0: (2, 4, 7, 8)} if policy == "drop-lowest-severity" else {0: (0, 1, 2, 3)}
    # 4 for 3, 5 is the least severe itself, 6 for 1, 7 for 6 (the newest 6), 8 for 4
    expected = {0: (0, 2, 7, 8)} if policy == "drop-lowest-severity" else expected
    dropped = {"queue full": 1, "less severe": 4} if policy == "drop-lowest-severity" else {"queue full": 5}
    assert intake_numbers(queue.take()) == list(expected[0])
    assert {cause: n for cause, n in queue.stats().dropped.items() if n} == dropped
    intake_counts(queue)


def test_queue_nothing_gives_way_in_vain() -> None:
    queue = event_queue.EventQueue(9, 10_000, "drop-lowest-severity", max_items=9, batch_bytes=5000)
    queue.put([intake_event(1, 7, "x" * 2000), intake_event(2, 7, "x" * 2000), intake_event(3, 4, "x" * 4000)])
    queue.put([intake_event(4, 6, "x" * 6000)])  # would not fit though both went
    assert (len(queue), queue.stats().dropped["queue bytes"], queue.stats().dropped["less severe"]) == (3, 1, 0)
    queue.put([intake_event(5, 6, "x" * 4000)])
    assert queue.stats().dropped == {"queue full": 0, "queue bytes": 1, "less severe": 2, "too large": 0}
    queue.put([intake_event(6, 0, "x" * 10_000)])
    assert (queue.stats().dropped["too large"], len(queue)) == (1, 2)
    assert [intake_numbers(queue.drain()) for _ in range(2)] == [[3], [5]]
    intake_counts(queue)


def test_queue_those_who_went_leave_nothing() -> None:
    queue = event_queue.EventQueue(4, 1_000_000, "drop-lowest-severity", max_items=4, batch_bytes=400_000)
    queue.put([intake_event(0, 0), *(intake_event(n, 7, "x" * 100) for n in (1, 2, 3))])
    queue.put([intake_event(4, 5), intake_event(5, 5)])
    assert (len(queue), queue.stats().bytes) == (4, 4 * event_queue.EVENT_BYTES + 100)
    assert (intake_numbers(queue.drain()), queue.stats().bytes, any(queue._levels)) == ([0, 1, 4, 5], 0, False)
    intake_counts(queue)


def test_queue_says_when_to_spool() -> None:
    for policy, count, size, over in (
        ("spool", 5, 0, False), ("spool", 6, 0, True), ("spool", 2, 5000, True), ("spool", 2, 4000, False),
        ("drop-newest", 10, 0, False), ("drop-lowest-severity", 10, 0, False),
    ):  # fmt: skip
        queue = event_queue.EventQueue(10, 20_000, policy, max_items=10, batch_bytes=10_000)  # type: ignore[arg-type]
        queue.put([intake_event(n, message="x" * size) for n in range(count)])
        assert queue.over() is over, (policy, count, size)


def test_queue_knows_how_old_the_oldest_is() -> None:
    world = World(0.0)
    queue = event_queue.EventQueue(max_age=5.0, clock=world.clock)
    for serial in range(10_000):  # ten seconds, a put each ms, and nobody takes
        world.now = serial / 1000
        queue.put([intake_event(serial)])
    batches = [queue.drain() for _ in range(5)]
    assert sum(map(len, batches)) == 5000
    assert queue.stats().age == world.now - 5.0


def test_queue_takes_all_or_nothing() -> None:
    queue = event_queue.EventQueue()
    with pytest.raises(AttributeError):
        queue.put([intake_event(1), None])  # type: ignore[list-item]
    assert queue.stats() == (0, 0, 0, 0, dict.fromkeys(event_queue.CAUSES, 0), 0.0)


class IntakeWaiting:
    """What the model knows of an event that waits."""

    def __init__(self, event: Event, size: int, since: float) -> None:
        self.event, self.size, self.since = event, size, since
        self.severity = event.severity


class IntakeQueueMachine(RuleBasedStateMachine):
    """A queue, and a list that is searched from end to end for each event."""

    queue_type: ClassVar[type[event_queue.EventQueue]] = event_queue.EventQueue

    @initialize(
        capacity=st.integers(1, 8),
        max_bytes=st.sampled_from([1000, 4000, 10_000, 1_000_000]),
        policy=st.sampled_from([*event_queue.POLICIES, "drop-lowest-severity"]),  # twice: there is more to it
        data=st.data(),
    )
    def start(self, capacity: int, max_bytes: int, policy: event_queue.Policy, data: st.DataObject) -> None:
        self.world = World()
        self.capacity, self.max_bytes, self.policy = capacity, max_bytes, policy
        self.max_items = data.draw(st.integers(1, capacity), label="max_items")
        self.batch_bytes = data.draw(st.integers(1, max_bytes // 2), label="batch_bytes")
        self.queue = self.queue_type(
            *(capacity, max_bytes, policy),
            max_items=self.max_items,
            max_age=4.0,
            batch_bytes=self.batch_bytes,
            clock=self.world.clock,
        )
        self.waiting: list[IntakeWaiting] = []
        self.dropped = dict.fromkeys(event_queue.CAUSES, 0)
        self.received = self.taken = 0

    def bytes(self) -> int:
        return sum(one.size for one in self.waiting)

    def why_not(self, size: int, waiting: list[IntakeWaiting]) -> event_queue.Cause | None:
        if size > self.max_bytes:
            return "too large"
        if len(waiting) == self.capacity:
            return "queue full"
        return "queue bytes" if sum(one.size for one in waiting) + size > self.max_bytes else None

    def model_put(self, event: Event) -> None:
        size = event_queue.EVENT_BYTES + len(event.message) + len(event.attributes)
        cause, remain, gone = self.why_not(size, self.waiting), list(self.waiting), 0
        if cause and self.policy == "drop-lowest-severity":
            least_first = sorted(remain, key=lambda one: one.severity)[::-1]
            for one in itertools.takewhile(lambda one: one.severity > event.severity, least_first):
                remain.remove(one)
                gone += 1
                if self.why_not(size, remain) is None:
                    self.waiting, cause = remain, None
                    self.dropped["less severe"] += gone
                    break
        if cause:
            self.dropped[cause] += 1
        else:
            self.waiting.append(IntakeWaiting(event, size, self.world.now))

    @rule(
        shapes=st.lists(
            st.tuples(st.integers(0, 7), st.sampled_from([0, 0, 0, 100, 500, 3000, 12_000]), st.integers(0, 300)),
            min_size=1,
            max_size=6,
        )
    )
    def put(self, shapes: list[tuple[int, int, int]]) -> None:
        self.put_all(shapes)

    @rule(first=st.integers(0, 7), seconds=st.sampled_from([0.0, 1 / 64]))
    def put_worse_and_worse(self, first: int, seconds: float) -> None:
        """All but the first give way, again and again."""
        self.put_all([(first, 0, 0)])
        for severity in range(7, 0, -1):
            self.world.now += seconds
            self.put_all([(severity, 0, 0)] * self.capacity)

    def put_all(self, shapes: list[tuple[int, int, int]]) -> None:
        events = [
            intake_event(self.received + n, severity, "x" * length, "y" * more)
            for n, (severity, length, more) in enumerate(shapes)
        ]
        self.received += len(events)
        self.queue.put(events)
        for event in events:
            self.model_put(event)

    def age(self) -> float:
        return self.world.now - self.waiting[0].since if self.waiting else 0.0

    def due(self) -> bool:
        enough = len(self.waiting) >= self.max_items or self.bytes() >= self.batch_bytes
        return bool(self.waiting) and (enough or self.age() >= 4.0)

    def batch(self) -> list[Event]:
        events, size = list[Event](), 0
        while self.waiting and len(events) < self.max_items:
            if events and size + self.waiting[0].size > self.batch_bytes:
                break
            size += self.waiting[0].size
            events.append(self.waiting.pop(0).event)
        self.taken += len(events)
        return events

    @rule()
    def take(self) -> None:
        assert self.queue.take() == (self.batch() if self.due() else None)

    @rule()
    def drain(self) -> None:
        assert self.queue.drain() == self.batch()

    @rule(seconds=st.sampled_from([1 / 64, 1.0, 2.0, 4.0]))
    def step(self, seconds: float) -> None:
        self.world.now += seconds

    @rule()
    def take_when_due(self) -> None:
        if self.waiting:
            self.world.now += self.queue.due_in()
            assert self.queue.take() == self.batch()

    @invariant()
    def counts(self) -> None:
        intake_counts(self.queue)
        waiting, size = len(self.waiting), self.bytes()
        assert self.queue.stats() == (self.received, waiting, size, self.taken, self.dropped, self.age())
        assert len(self.queue) == waiting <= self.capacity
        assert size <= self.max_bytes
        wait = 0.0 if self.due() else 4.0 - self.age() if self.waiting else math.inf
        assert self.queue.due_in() == wait
        half = waiting * 2 > self.capacity or size * 2 > self.max_bytes
        assert self.queue.over() == (half and self.policy == "spool")
        assert sum(map(len, self.queue._levels)) == waiting


def intake_check_queue(queue_type: type[event_queue.EventQueue], effort: settings = SETTINGS) -> None:
    """In order, within its bounds, what is dropped is what the policy says, and all of it is counted."""
    machine = type("Machine", (IntakeQueueMachine,), {"queue_type": queue_type})
    run_state_machine_as_test(machine, settings=effort)


def test_queue_keeps_its_promises() -> None:
    intake_check_queue(event_queue.EventQueue, settings(SETTINGS, max_examples=150, stateful_step_count=30))


INTAKE_IPV6 = any(
    line.startswith(f"{1:032x} ") for line in Path("/proc/net/if_inet6").read_text().splitlines()
) if Path("/proc/net/if_inet6").exists() else False  # fmt: skip


INTAKE_LOOPBACKS = [
    "127.0.0.1",
    pytest.param(
        "::1", marks=pytest.mark.skipif(not INTAKE_IPV6, reason="this machine has no ::1 (/proc/net/if_inet6)")
    ),
]


@contextlib.contextmanager
def intake_socket(address: str = "127.0.0.1", **options: Any) -> Iterator[socket.socket]:
    with li.udp_socket(address, 0, **options)[0] as sock:
        yield sock


def intake_port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def intake_send(to: tuple[str, int], datagrams: Sequence[bytes], source: str | None = None) -> None:
    """Send them from one new socket; whatever is sent on loopback is in the receiver's buffer, or dropped, after it."""
    with socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if source is not None:
            sock.bind((source, 0))
        sock.connect(to)
        for datagram in datagrams:
            assert sock.send(datagram) == len(datagram)


class IntakeWorld:
    """A receiver, and what it handed on. However busy the machine is: its wake-ups do not end for want of time."""

    def __init__(self, sock: socket.socket, then: Callable[[], None] = lambda: None, **options: Any) -> None:
        self.got: list[tuple[bytes, str]] = []
        self.portions: list[int] = []
        self.then = then
        self.receiver = li.Receiver(sock, self.handle, **{"seconds": 3600.0, **options})

    def handle(self, datagrams: list[tuple[bytes, str]]) -> None:
        self.got += datagrams
        self.portions.append(len(datagrams))
        self.then()

    def __enter__(self) -> IntakeWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.receiver.close()


def intake_run(loop: str, main: Any) -> None:
    """In the one event loop or the other; neither may complain."""
    options = {} if loop == "asyncio" else {"debug": False, "loop_factory": new_loop}
    run_task(main, lambda _: False, **options)


intake_loops = pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=needs("uvloop"))])


@intake_loops
@pytest.mark.parametrize("address", INTAKE_LOOPBACKS)
def test_datagrams_come_whole_and_in_order(address: str, loop: str) -> None:
    sent = [b"", b"a", b"\0\xff\n", b"", b"z" * 65_507, *(str(n).encode() for n in range(1000))]

    async def main() -> None:
        with intake_socket(address) as sock, IntakeWorld(sock) as world:
            world.receiver.start()
            world.receiver.start()  # nothing more
            intake_send((address, intake_port(sock)), sent)
            await until_async(lambda: len(world.got) == len(sent))
            assert world.got == [(datagram, address) for datagram in sent]
            stats = world.receiver.stats()
            assert stats._replace(wakeups=0) == (len(sent), sum(map(len, sent)), 0, 0, 0, 0)
            assert stats.wakeups == 3  # of 500 and the rest

    intake_run(loop, main())


@pytest.mark.skipif(not INTAKE_IPV6, reason="this machine has no ::1 (/proc/net/if_inet6)")
@pytest.mark.parametrize(
    ("allow", "expected"),
    [
        ([], ["127.0.0.1", "127.0.2.9", "::1", "127.0.0.1"]),
        (["127.0.0.0/8"], ["127.0.0.1", "127.0.2.9", "127.0.0.1"]),
        (["127.0.2.9/32"], ["127.0.2.9"]),
        (["::ffff:127.0.2.0/120"], ["127.0.2.9"]),
        (["::1/128"], ["::1"]),
        (["::/0"], ["::1"]),  # an IPv4 address is in no IPv6 network
        (["10.0.0.0/8", "::1", "127.0.0.1"], ["127.0.0.1", "::1", "127.0.0.1"]),
        (["10.0.0.0/8"], []),
    ],
)
def test_both_families_and_who_is_allowed(allow: list[str], expected: list[str]) -> None:
    sources = ["127.0.0.1", "127.0.2.9", "::1", "127.0.0.1"]
    with (
        intake_socket("::") as sock,
        IntakeWorld(sock, allow=[ipaddress.ip_network(network) for network in allow]) as world,
    ):
        for source in sources:
            to = "::1" if ":" in source else "127.0.0.1"
            intake_send((to, intake_port(sock)), [source.encode()], source)
        assert world.receiver.drain() == 4
        assert world.got == [(source.encode(), source) for source in expected]
        stats = world.receiver.stats()
        assert (stats.datagrams, stats.refused) == (4, 4 - len(expected))
        assert stats.bytes == sum(map(len, sources))


def test_allow_list_of_an_ipv4_socket() -> None:
    with intake_socket("0.0.0.0") as sock, IntakeWorld(sock, allow=[ipaddress.ip_network("127.0.2.0/24")]) as world:
        for number in range(6):
            intake_send(("127.0.0.1", intake_port(sock)), [b"a", b"b"], f"127.0.{number % 3}.7")
        assert world.receiver.drain() == 12
        assert (len(world.got), {source for _, source in world.got}) == (4, {"127.0.2.7"})
        assert world.receiver.stats().refused == 8


def test_sources_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(li, "MAX_SOURCES", 3)
    sources = [f"127.0.3.{number}" for number in (1, 2, 3, 4, 5, 1, 2, 6, 7, 1)]
    with intake_socket("0.0.0.0") as sock, IntakeWorld(sock, allow=[ipaddress.ip_network("127.0.3.0/30")]) as world:
        for source in sources:
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"], source)
            world.receiver.drain()
            assert world.receiver._source_of.cache_info().currsize <= 3
        assert [source for _, source in world.got] == [source for source in sources if source[-1] in "123"]


def test_a_source_keeps_one_string() -> None:
    with intake_socket() as sock, IntakeWorld(sock) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"a", b"b", b"c"])
        world.receiver.drain()
        assert len({id(source) for _, source in world.got}) == 1


@pytest.mark.parametrize("address", INTAKE_LOOPBACKS)
def test_the_kernels_drops_are_exact(address: str) -> None:
    with intake_socket(address, receive_buffer=20_000) as sock, IntakeWorld(sock) as world:
        drops, there, sent = li.KernelDrops([sock]), sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), 0
        assert drops.total() == 0
        assert there == 40_000
        for _ in range(2):
            intake_send((address, intake_port(sock)), [b"x" * 100] * 10_000)
            sent += 10_000
            before = drops.total()
            while world.receiver.drain():
                pass
            world.receiver._left = None
            assert drops.total() == before == sent - len(world.got)  # no datagram has to come to tell of it
            assert sent - 200 < before < sent
        assert li.KernelDrops([sock]).total() == sent - len(world.got)


def test_sent_is_read_and_dropped_while_both_go_on() -> None:
    """A thread sends as fast as it can, the loop reads: what is missing is what the kernel counted."""

    async def main() -> None:
        with intake_socket(receive_buffer=30_000) as sock, IntakeWorld(sock, at_once=50) as world:
            drops, sent = li.KernelDrops([sock]), 20_000
            world.receiver.start()
            to = ("127.0.0.1", intake_port(sock))
            sender = threading.Thread(target=intake_send, args=(to, [b"%d" % n for n in range(sent)]))
            sender.start()
            await until_async(lambda: not sender.is_alive())
            sender.join()
            while world.receiver.drain():
                pass
            assert len(world.got) + drops.total() == sent
            numbers = [int(datagram) for datagram, _ in world.got]
            assert numbers == sorted(set(numbers))

    run_task(main())


def test_drops_are_of_each_socket() -> None:
    with intake_socket(receive_buffer=2000) as one, intake_socket(receive_buffer=2000) as other:
        drops = li.KernelDrops([one, other])
        assert drops.total() == 0
        intake_send(("127.0.0.1", intake_port(other)), [b"x" * 1000] * 50)
        second = drops.total()
        assert 40 < second < 50
        assert drops._counts == [0, second]
        other.close()
        assert drops.total() == second  # the last that was known


def test_drops_counter_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = iter([5, 2**32 - 1, 3, 3, 2])
    monkeypatch.setattr(li, "_socket_drops", lambda _: next(counters))
    with intake_socket() as sock:
        drops = li.KernelDrops([sock])
        assert [drops.total() for _ in range(5)] == [5, 2**32 - 1, 2**32 + 3, 2**32 + 3, 2**33 + 2]


def test_a_look_at_the_drops_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = iter([5, None, 7])
    monkeypatch.setattr(li, "_socket_drops", lambda _: next(counters))
    with intake_socket() as sock:
        drops = li.KernelDrops([sock])
        assert [drops.total() for _ in range(3)] == [5, 5, 7]


def test_drops_where_nothing_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with intake_socket(receive_buffer=2000) as sock:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x" * 1000] * 50)
        monkeypatch.setattr(li, "SO_MEMINFO", 9999)
        assert li.KernelDrops([sock]).total() == 0
        monkeypatch.undo()
        assert li.KernelDrops([sock]).total() > 40
        monkeypatch.setattr(sys, "platform", "darwin")
        assert li.KernelDrops([sock]).total() == 0


@intake_loops
def test_other_callbacks_have_their_turn(loop: str) -> None:
    """At full load, at most ``at_once`` datagrams come between two rounds of the loop."""

    async def main() -> None:
        with intake_socket(receive_buffer=8 << 20) as sock:
            sent, diary = 3000, list[int]()
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * sent)
            with IntakeWorld(sock, lambda: diary.append(world.portions[-1]), at_once=250) as world:
                running = asyncio.get_running_loop()

                def tick() -> None:
                    diary.append(0)
                    if len(world.got) < sent:
                        running.call_soon(tick)

                world.receiver.start()
                tick()
                await until_async(lambda: len(world.got) == sent)
                runs = [sum(run) for some, run in itertools.groupby(diary, bool) if some]
                assert runs == [250] * 12
                assert world.portions == [100, 100, 50] * 12
                assert world.receiver.stats().wakeups in (12, 13)

    intake_run(loop, main())


def test_a_slow_handler_ends_the_wakeup() -> None:
    clock = World()

    def work() -> None:
        clock.now += 0.006

    with intake_socket() as sock, IntakeWorld(sock, work, seconds=0.01, clock=clock.clock) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 450)
        assert [world.receiver.drain() for _ in range(4)] == [200, 200, 50, 0]
        assert world.portions == [100, 100, 100, 100, 50]


def test_large_datagrams_are_handed_on_a_few_at_a_time() -> None:
    with intake_socket() as sock, IntakeWorld(sock) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x" * 30_000] * 8 + [b"x" * 65_507] * 2)
        assert world.receiver.drain() == 10
        assert world.portions == [3, 3, 3, 1]


def test_drain_reads_what_is_there_and_ends() -> None:
    with intake_socket(receive_buffer=8 << 20) as sock, IntakeWorld(sock, at_once=400) as world:
        intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 1000)
        assert [world.receiver.drain() for _ in range(4)] == [400, 400, 200, 0]
        assert world.receiver.stats().datagrams == 1000
        assert world.receiver.stats().wakeups == 0


def test_drain_ends_though_more_comes() -> None:
    """For each datagram another one is sent: no end but the bound."""
    with intake_socket(receive_buffer=10_000) as sock:
        to = ("127.0.0.1", intake_port(sock))
        with IntakeWorld(sock, lambda: intake_send(to, [b"x"] * world.portions[-1])) as world:
            intake_send(to, [b"x"] * 5)
            calls = 0
            while world.receiver.drain():
                calls += 1
                assert calls < 1000
            assert len(world.got) == 20_000 // li.MIN_BUFFERED + 1
            assert world.receiver.drain() == 0


def test_drain_stops_listening_and_start_begins_again() -> None:
    async def main() -> None:
        with intake_socket() as sock, IntakeWorld(sock) as world:
            to = ("127.0.0.1", intake_port(sock))
            world.receiver.start()
            assert world.receiver.drain() == 0
            intake_send(to, [b"late"])
            await ticks()  # each looks at the sockets that are listened to
            assert select.select([sock], [], [], 0)[0] == [sock]
            assert (world.got, world.receiver._left is None) == ([], False)
            world.receiver.start()
            assert world.receiver._left is None  # the next stop may read as much again
            await until_async(lambda: len(world.got) == 1)
            intake_send(to, [b"x"] * 3)
            assert world.receiver.drain() == 3

    run_task(main())


def test_an_icmp_error_ends_nothing() -> None:
    """Only a connected socket is told of them on Linux: nobody listens where it sent to, so its next read fails."""

    async def main() -> None:
        with intake_socket() as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            there = peer.getsockname()
            sock.connect(there)
            peer.close()
            with IntakeWorld(sock) as world:
                sock.send(b"is anybody there?")
                world.receiver.start()
                await until_async(lambda: world.receiver.stats().errors == 1)
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                    again.bind(there)
                    again.connect(sock.getsockname())
                    again.send(b"now")
                    await until_async(lambda: len(world.got) == 1)
                sock.send(b"and now?")
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:  # the error stands before it
                    again.bind(there)
                    again.connect(sock.getsockname())
                    again.send(b"still here")
                    assert world.receiver.drain() == 1
                assert [datagram for datagram, _ in world.got] == [b"now", b"still here"]
                assert world.receiver.stats().errors == 2
                assert world.receiver.stats().datagrams == 2

    run_task(main())


class IntakeBroken(socket.socket):
    """Readable, but each read fails."""

    fails = True

    def recvfrom(self, *arguments: Any) -> Any:
        if self.fails:
            raise OSError(errno.ENOMEM, "no memory")
        return super().recvfrom(*arguments)


def test_a_socket_that_only_fails_does_not_take_the_loop() -> None:
    async def main() -> None:
        loop, pauses, timers = asyncio.get_running_loop(), list[float](), list[asyncio.TimerHandle]()
        later = loop.call_later

        def call_later(delay: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
            timer = later(delay, callback, *arguments)
            if getattr(callback, "__name__", "") == "_resume":
                pauses.append(delay)
                timers.append(timer)
            return timer

        with (
            pytest.MonkeyPatch.context() as patch,
            IntakeBroken(socket.AF_INET, socket.SOCK_DGRAM) as sock,
            IntakeWorld(sock) as world,
        ):
            patch.setattr(loop, "call_later", call_later)
            sock.bind(("127.0.0.1", 0))
            intake_send(sock.getsockname(), [b"x"])
            world.receiver.start()
            await until_async(lambda: world.receiver.stats().wakeups >= 3)
            sock.fails, failed = False, world.receiver.stats()
            assert failed.errors == failed.wakeups * li.MAX_ERRORS
            assert pauses == [li.ERROR_PAUSE] * failed.wakeups
            await until_async(lambda: len(world.got) == 1)
            sock.fails = True
            patch.setattr(li, "ERROR_PAUSE", HANG_LIMIT)
            intake_send(sock.getsockname(), [b"y"])
            await until_async(lambda: len(pauses) == failed.wakeups + 1)
            assert world.receiver.drain() == 0  # in the pause, which it ends
            assert timers[-1].cancelled() and not any(timer.cancelled() for timer in timers[:-1])

    run_task(main())


def test_a_handler_that_raises_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with intake_socket() as sock:
        faults: list[Exception | None] = [ValueError("one"), None, ValueError("two")]

        def fail() -> None:
            fault = faults.pop(0)
            if fault is not None:
                raise fault

        with IntakeWorld(sock, fail) as world, caplog.at_level(logging.ERROR):
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 250)
            assert world.receiver.drain() == 250
            stats = world.receiver.stats()
            assert (stats.datagrams, stats.unhandled) == (250, 150)
            assert [record.getMessage() for record in caplog.records] == ["datagrams could not be handled (said once)"]


def test_closing() -> None:
    async def main() -> None:
        sock = li.udp_socket("127.0.0.1", 0)[0]
        with IntakeWorld(sock, lambda: world.receiver.close()) as world:
            intake_send(("127.0.0.1", intake_port(sock)), [b"x"] * 250)
            world.receiver.start()
            await until_async(lambda: sock.fileno() == -1)  # by its own handler, in the middle of a wake-up
            world.receiver.close()
            assert (len(world.got), world.receiver.drain()) == (100, 0)
            assert repr(world.receiver) == (
                "<Receiver datagrams=100 bytes=100 wakeups=1 refused=0 errors=0 unhandled=0>"
            )

    run_task(main())


def test_buffer_that_the_kernel_clamps(monkeypatch: pytest.MonkeyPatch) -> None:
    most = int(Path("/proc/sys/net/core/rmem_max").read_text())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, 33, most + 1000)
            may_force = True
        except PermissionError:
            may_force = False

    def asked_for(size: int) -> tuple[int, str | None]:
        sock, warning = li.udp_socket("127.0.0.1", 0, receive_buffer=size)
        with sock:
            assert not sock.getblocking()
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2, warning

    granted, warning = asked_for(most + 1000)
    assert (granted, warning) == (most + 1000, None) if may_force else granted == most
    monkeypatch.setattr(li, "SO_RCVBUFFORCE", 9999)
    warning = (
        f"the kernel gives a receive buffer of {most:,} bytes, not {most + 1000:,}: bursts may be dropped; "
        f"sysctl -w net.core.rmem_max={most + 1000} allows it"
    )
    assert asked_for(most + 1000) == (most, warning)
    assert asked_for(most) == (most, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:5514", ("0.0.0.0", 5514)),
        ("[::]:5514", ("::", 5514)),
        ("[fe80::1%lo]:0", ("fe80::1%lo", 0)),
        ("localhost:65535", ("localhost", 65_535)),
        ("a:00001", ("a", 1)),
        *(
            (text, None)
            for text in ("", ":", ":1", "[]:1", "a", "a:", "a:-1", "a:65536", "a:000000999999", "a:x", "a:²")
        ),
        *((text, None) for text in ("::1:5514", "[::1]", "[1.2.3.4]:1", "a:1 ", "[::1:5", "::1]:5", "5514")),
    ],
)
def test_addresses(text: str, expected: tuple[str, int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="expected"):
            split_address(text)
    else:
        assert split_address(text) == expected


def test_what_cannot_be_bound_is_said() -> None:
    with intake_socket() as sock:
        port = intake_port(sock)
        with pytest.raises(
            OSError, match=f"cannot receive UDP on 127.0.0.1 port {port}: Address already in use"
        ) as caught:
            li.udp_socket("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="already in use"):  # the other did not say so
            li.udp_socket("127.0.0.1", port, reuse_port=True)
    with pytest.raises(OSError, match=r"cannot receive UDP on 192\.0\.2\.1 port 0: Cannot assign"):
        li.udp_socket("192.0.2.1", 0)
    with pytest.raises(OSError, match=r"cannot receive UDP on 1\.2\.3\.999 port 0: "):
        li.udp_socket("1.2.3.999", 0)


def test_several_sockets_share_a_port() -> None:
    with (
        intake_socket(reuse_port=True) as one,
        li.udp_socket("127.0.0.1", intake_port(one), reuse_port=True)[0] as two,
        IntakeWorld(one) as first,
        IntakeWorld(two) as second,
    ):
        for number in range(64):  # each from a port of its own
            intake_send(("127.0.0.1", intake_port(one)), [b"%d" % number] * 2)
        read = first.receiver.drain(), second.receiver.drain()
        assert sum(read) == 128
        assert min(read) > 0  # 2 ** -63 that all go to one
        assert not {datagram for datagram, _ in first.got} & {datagram for datagram, _ in second.got}
