"""A worker without a kernel: queue and nf_tables are stand-ins, registry, counters and engine are real."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from steerd import config, late
from steerd import worker as worker_module
from steerd.control.doors import Porter
from steerd.control.registry import Registry
from steerd.control.states import States
from steerd.core.engine import Decision
from steerd.core.marks import FIRST_TARGET_ID, PASS_ID, RESET_ID, MarkLayout
from steerd.errors import KernelError, RegistryError
from steerd.kernel import handshake
from steerd.kernel.handshake import Handshake
from steerd.kernel.nftables import Element
from steerd.kernel.queue import Ruling
from steerd.kernel.ruleset import datagram_elements, target_elements
from steerd.model import DRAINED, Extension, Flow, Reason, Target
from steerd.orders import WorkerSettings
from steerd.telemetry.counters import Counters, Extra, LogSwitch
from steerd.wire import portext
from steerd.worker import Worker
from tests import initials

MARK = MarkLayout(8, 27)
THEIRS = 0xA000005A
"""Bits of the mark that are not ours."""
CONFIG = """
[gateway]
mark_bits = "8-27"
[pools.p]
prefixes = ["10.64.0.0/30"]
[services.refusing]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["port-extension"]
extension_pool = { pool = "p", by = "extension", port = 8080 }
[services.passing]
endpoints = ["203.0.113.10:22/tcp"]
inspect = ["port-extension"]
unextended = "pass"
unmatched = "drop"
extension_pool = { pool = "p", by = "extension", port = 22 }
"""
PUBLISH = """
import sys
from steerd import config
from steerd.control.registry import Registry
Registry(sys.argv[1]).publish(config.parse(sys.stdin.read(), "steerd.toml"))
"""


class Packet:
    """A queued packet; says what was done with it."""

    def __init__(self, id_: int, payload: bytes, mark: int) -> None:
        self.id = id_
        self._payload = payload
        self.mark = mark
        self.verdicts: list[str] = []

    def get_payload(self) -> bytes:
        return self._payload

    def rule(self, ruling: Ruling) -> None:
        self.verdicts.append("drop" if ruling.mark is None else "accept")
        self.mark = self.mark if ruling.mark is None else ruling.mark


class StandInNftables:
    """Remembers what was inserted; refuses while `error` is set."""

    def __init__(self) -> None:
        self.inserted: list[Element] = []
        self.error: Exception | None = None

    def insert(self, elements: list[Element]) -> None:
        if self.error is not None:
            raise self.error
        self.inserted += elements

    def contains(self, name: str, key: bytes) -> bool:
        return any((name, key) == (element.name, element.key) for element in self.inserted)


class StandInInjector:
    """Remembers what was sent."""

    def __init__(self, sent: list[tuple[bytes, int | None]]) -> None:
        self._sent = sent

    def send(self, packet: bytes, mark: int | None = None) -> None:
        self._sent.append((packet, mark))

    def close(self) -> None:
        pass


class StandInConntrack:
    """Knows no entry."""

    def is_answered(self, _flow: Flow) -> bool:
        return False


class StandInQueue:
    """Gives packets to the worker, all that wait at once, and its rulings to them."""

    def __init__(self, on_packet: Callable[[Packet], None]) -> None:
        self.on_packet = on_packet
        self.given: list[int] = []
        self.error: OSError | None = None
        self._packets: dict[int, Packet] = {}

    def wait_at_most(self, seconds: float) -> None:
        self.seconds = seconds

    def arrive(self, payload: bytes, mark: int) -> Packet:
        packet = self._packets[len(self._packets)] = Packet(len(self._packets), payload, mark)
        self.on_packet(packet)
        return packet

    def give(self, rulings: list[Ruling]) -> None:
        if self.error is not None:
            raise self.error
        for ruling in rulings:
            self.given.append(ruling.id)
            self._packets[ruling.id].rule(ruling)


class Lab:
    """A worker, and everything around it."""

    def __init__(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, access_log: int = 0, text: str = CONFIG
    ) -> None:
        self.directory = directory
        registry = Registry(str(directory))
        registry.publish(config.parse(text, "steerd.toml"))
        registry.close()
        self.counters = Counters.create(directory / "counters", 1)
        self.states = States.create(str(directory), MARK.highest_id)
        self.porter = Porter(str(directory))
        self.nftables = StandInNftables()
        self._log = directory / "log"
        self._stderr = self._log.open("w")
        self.queue: StandInQueue
        monkeypatch.setattr(worker_module, "Nftables", lambda: self.nftables)
        monkeypatch.setattr(worker_module, "Queue", self._bind)
        monkeypatch.setattr(handshake, "measure", lambda: Handshake(1460, 1440, 7))
        self.injected: list[tuple[bytes, int | None]] = []
        monkeypatch.setattr(late, "Injector", lambda _mark: StandInInjector(self.injected))
        monkeypatch.setattr(late, "Conntrack", StandInConntrack)
        self.bind_errors: list[Exception] = []
        self.settings = WorkerSettings(
            0, 100, 1000, 100000, str(directory), str(directory), str(directory / "counters"), "json"
        )
        self.counters.log = LogSwitch(logging.INFO, access_log)

    def _bind(self, number: int, on_packet: Callable[[Packet], None], **options: object) -> object:
        assert (number, options["length"], options["receive_buffer"]) == (100, 1000, 100000)
        if self.bind_errors:
            raise self.bind_errors.pop()
        self.queue = StandInQueue(on_packet)
        return self.queue

    def start(self) -> None:
        with contextlib.redirect_stderr(self._stderr):
            self.worker = Worker(self.settings)

    def close(self) -> None:
        self._stderr.close()
        self.porter.close()
        if hasattr(self, "worker"):
            self.worker._visitor.close()

    def events(self) -> list[dict[str, Any]]:
        """The worker's log."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def faults(self) -> list[dict[str, Any]]:
        """What went wrong, without the decisions that failed by it."""
        return [event for event in self.events() if event["event"] != "decision"]

    def publish(self, text: str) -> None:
        """Another plan, from another process: LMDB lets a process open an environment once."""
        subprocess.run([sys.executable, "-c", PUBLISH, str(self.directory)], input=text, text=True, check=True)

    def deliver(self, payload: bytes, mark: int = 0) -> Packet:
        packet = self.queue.arrive(payload, mark)
        self.worker._give()
        assert len(packet.verdicts) == 1, "one packet, one verdict"
        return packet

    def outcome(self, payload: bytes, mark: int = 0) -> tuple[str, int]:
        packet = self.deliver(payload, mark)
        return packet.verdicts[0], packet.mark

    def counted(self) -> dict[str, int]:
        words = {word.name: self.counters.total(word) for kind in (Reason, Extra) for word in kind}
        return {name: count for name, count in words.items() if count}


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Ready, but for the worker itself."""
    lab = Lab(tmp_path, monkeypatch)
    yield lab
    lab.close()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def lab(stopped: Lab) -> Lab:
    stopped.start()
    return stopped


def syn(extension: int | None, port: int = 443, *, options: bytes = b"") -> bytes:
    """An IPv4 SYN to the endpoint, as it lies in the queue."""
    if extension is not None:
        options = portext.encode_ipv4(Extension(extension, 0), portext.Numbers())
    tcp = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, 0x02, 64240, 0, 0)
    src, dst = (ipaddress.ip_address(text).packed for text in ("198.51.100.1", "203.0.113.10"))
    length = 20 + len(options) + len(tcp)
    head = struct.pack("!BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, length, 0, 0, 64, 6, 0, src, dst)
    return head + options + tcp


def elements(target_id: int, text: str) -> list[Element]:
    host, _, port = text.rpartition(":")
    return target_elements(MARK.field(target_id), Target(ipaddress.ip_address(host), int(port)))


# Ids are given service by service, in the order of their names: passing first.
PASSING, REFUSING = FIRST_TARGET_ID, FIRST_TARGET_ID + 4


def test_a_decision_is_a_mark_and_other_bits_stay(lab: Lab) -> None:
    assert lab.outcome(syn(2), THEIRS) == ("accept", THEIRS | MARK.field(REFUSING + 1))
    # What was in our bits is gone.
    assert lab.outcome(syn(2), THEIRS | MARK.mask) == ("accept", THEIRS | MARK.field(REFUSING + 1))
    assert lab.counted() == {"ARITHMETIC": 2, "LOADED": 1}


def test_a_drained_target_takes_nobody_from_the_next_packet_on(lab: Lab) -> None:
    lab.states.put(REFUSING + 1, DRAINED, True)
    assert lab.outcome(syn(2)) == ("accept", MARK.field(RESET_ID))
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING))
    lab.states.put(REFUSING + 1, DRAINED, False)
    assert lab.outcome(syn(2)) == ("accept", MARK.field(REFUSING + 1))
    assert lab.counted() == {"ARITHMETIC": 2, "DRAINED": 1, "LOADED": 2}


def test_the_other_outcomes(lab: Lab) -> None:
    assert lab.outcome(syn(None), THEIRS | MARK.mask) == ("accept", THEIRS | MARK.field(RESET_ID))
    assert lab.outcome(syn(99), THEIRS) == ("accept", THEIRS | MARK.field(RESET_ID))
    assert lab.outcome(syn(None, 22), THEIRS | MARK.mask) == ("accept", THEIRS | MARK.field(PASS_ID))
    assert lab.outcome(syn(99, 22), THEIRS) == ("drop", THEIRS)
    assert lab.outcome(syn(1, 80), THEIRS) == ("drop", THEIRS)
    assert lab.counted() == {"UNEXTENDED_UNMATCHED": 1, "UNMATCHED": 2, "UNEXTENDED_PASS": 1, "NO_ENDPOINT": 1}
    assert lab.nftables.inserted == []


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x45", b"rubbish" * 10, syn(1)[:-1], b"\x60" + bytes(59)],
    ids=["empty", "one byte", "rubbish", "cut", "zeros"],
)
def test_what_cannot_be_read_is_dropped(lab: Lab, payload: bytes) -> None:
    assert lab.outcome(payload, THEIRS) == ("drop", THEIRS)
    assert lab.counted() == {"NOT_READABLE": 1}


def test_a_malformed_extension_is_counted_beside_the_decision(lab: Lab) -> None:
    lab.deliver(syn(None, options=bytes.fromhex("9e0a53540007000000000101")))
    assert lab.counted() == {"UNEXTENDED_UNMATCHED": 1, "MALFORMED_EXTENSION": 1}


# ---- many packets at once ----


def test_verdicts_are_given_in_the_order_of_arrival_many_at_a_time(lab: Lab) -> None:
    packets = [lab.queue.arrive(syn(extension), THEIRS) for extension in (1, 99, 2) * 30]
    assert lab.queue.given == list(range(64)), "not one by one, and not first when all are decided"
    lab.worker._give()
    assert lab.queue.given == list(range(90))
    assert [p.mark for p in packets[:3]] == [THEIRS | MARK.field(i) for i in (REFUSING, RESET_ID, REFUSING + 1)]
    assert {tuple(p.verdicts) for p in packets} == {("accept",)}


def test_a_fault_costs_one_packet_of_many(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = lab.worker._engine.decide_syn

    def faulty(packet: Any) -> Decision:
        if packet.dport == 22:
            raise RuntimeError("a mistake in a parser")
        return decide(packet)

    monkeypatch.setattr(lab.worker._engine, "decide_syn", faulty)
    packets = [lab.queue.arrive(syn(1, port), 0) for port in (443, 22, 443)]
    lab.worker._give()
    assert [p.verdicts for p in packets] == [["accept"], ["drop"], ["accept"]]


def test_verdicts_that_the_kernel_does_not_take_are_a_fault_and_not_the_end(lab: Lab) -> None:
    lab.queue.error = OSError(105, "No buffer space")
    lab.queue.arrive(syn(1), 0)
    lab.worker._give()
    lab.queue.error = None
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING))
    assert lab.counted() == {"ARITHMETIC": 2, "LOADED": 1, "FAULT": 1}


# ---- targets ----


def test_a_target_is_put_into_the_kernel_when_it_is_first_used(lab: Lab) -> None:
    for extension in (1, 2, 1, 1, 2):
        assert lab.deliver(syn(extension)).verdicts == ["accept"]
    assert lab.nftables.inserted == elements(REFUSING, "10.64.0.0:8080") + elements(REFUSING + 1, "10.64.0.1:8080")
    assert lab.counted() == {"ARITHMETIC": 5, "LOADED": 2}


@pytest.mark.parametrize("error", [KernelError("nf_tables took no element"), OSError(105, "No buffer space")])
def test_a_target_that_the_kernel_refuses_costs_the_packet_and_is_tried_again(lab: Lab, error: Exception) -> None:
    lab.nftables.error = error
    for _ in range(3):
        assert lab.outcome(syn(1), THEIRS) == ("drop", THEIRS)
    assert lab.counted() == {"NOT_LOADED": 3}
    (event,) = lab.faults()
    assert (event["level"], event["event"], event["process"]) == ("error", "packet dropped", "worker-0")
    assert str(error) in event["why"]
    lab.nftables.error = None
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING))
    assert lab.counted() == {"NOT_LOADED": 3, "ARITHMETIC": 1, "LOADED": 1}


def test_a_target_that_the_registry_does_not_know_costs_the_packet(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.worker._reader, "target", lambda _: None)
    assert lab.outcome(syn(1)) == ("drop", 0)
    assert lab.counted() == {"NOT_LOADED": 1}
    assert f"target id {REFUSING} is in the plan, but not among the registry's targets" in lab.faults()[0]["why"]


# ---- faults ----


def test_an_exception_costs_one_packet_and_is_logged_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = lab.worker._engine.decide_syn

    def faulty(packet: Any) -> Decision:
        if packet.dport == 22:
            raise RuntimeError("a mistake in a parser")
        if packet.dport == 80:
            raise ZeroDivisionError("another one")
        return decide(packet)

    monkeypatch.setattr(lab.worker._engine, "decide_syn", faulty)
    for _ in range(3):
        assert lab.outcome(syn(1, 22), THEIRS) == ("drop", THEIRS)
        assert lab.outcome(syn(1, 443)) == ("accept", MARK.field(REFUSING))
    assert lab.outcome(syn(1, 80)) == ("drop", 0)
    assert lab.counted() == {"FAULT": 4, "ARITHMETIC": 3, "LOADED": 1}
    first, second = lab.faults()
    assert "RuntimeError: a mistake in a parser" in first["why"]
    assert "test_worker.py" in first["why"], "the traceback says where"
    assert "ZeroDivisionError: another one" in second["why"]


def test_a_client_that_can_provoke_many_faults_does_not_fill_the_log(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(packet: Any) -> Decision:
        raise ValueError(f"port {packet.dport}")

    monkeypatch.setattr(lab.worker._engine, "decide_syn", faulty)
    monkeypatch.setattr(lab.worker._record._failures, "_rate", 0.0)
    for port in range(1, 501):
        assert lab.outcome(syn(1, port)) == ("drop", 0)
    assert lab.counted() == {"FAULT": 500, "NOT_LOGGED": 480}
    assert len(lab.faults()) == 100
    assert len(lab.events()) == 120


# ---- a new generation ----


def test_a_new_plan_is_taken_up_with_the_next_packet_and_targets_are_loaded_again(lab: Lab) -> None:
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING))
    lab.publish(CONFIG.replace("port = 8080", "port = 9090").replace("8-27", "0-27"))
    lab.nftables.inserted.clear()
    wider = MarkLayout(0, 27)
    new = REFUSING + 4
    assert lab.outcome(syn(1), THEIRS) == ("accept", THEIRS & ~wider.mask | wider.field(new))
    expected = target_elements(wider.field(new), Target(ipaddress.ip_address("10.64.0.0"), 9090))
    assert lab.nftables.inserted == expected
    assert lab.counted() == {"ARITHMETIC": 2, "LOADED": 2}


def test_a_generation_without_a_new_plan_loads_targets_again(lab: Lab) -> None:
    for _ in range(3):
        lab.deliver(syn(1))
        lab.deliver(syn(1))
        lab.counters.next_generation()
    assert lab.nftables.inserted == elements(REFUSING, "10.64.0.0:8080") * 3


def test_a_plan_that_cannot_be_read_leaves_no_decision_to_the_old_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old probes against new routes could steer to the wrong daemon."""
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING))
    refresh = lab.worker._reader.refresh

    def unreadable() -> None:
        raise RegistryError("the registry holds no plan")

    monkeypatch.setattr(lab.worker._reader, "refresh", unreadable)
    lab.counters.next_generation()
    for _ in range(3):
        assert lab.outcome(syn(1)) == ("drop", 0)
    monkeypatch.setattr(lab.worker._reader, "refresh", refresh)
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING))
    assert lab.counted() == {"ARITHMETIC": 2, "LOADED": 2, "FAULT": 3}
    assert len(lab.faults()) == 1


def test_a_plan_that_cannot_be_carried_out_leaves_no_decision_to_the_old_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read, but then something failed: the next packets must not be decided by the plan before it."""
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING))

    def no_engine(*_: object) -> None:
        raise ValueError("a pattern that does not compile")

    lab.publish(CONFIG.replace("port = 8080", "port = 9090"))
    with monkeypatch.context() as broken:
        broken.setattr(worker_module, "Engine", no_engine)
        for _ in range(2):
            assert lab.outcome(syn(1)) == ("drop", 0)
    assert lab.outcome(syn(1)) == ("accept", MARK.field(REFUSING + 4))


# ---- the access log, and the start ----


@pytest.mark.parametrize(("access_log", "logged"), [(0, []), (1, [1, 2, 3, 4, 1]), (2, [2, 4])])
def test_one_of_so_many_decisions_is_logged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    access_log: int,
    logged: list[int],
) -> None:
    lab = Lab(tmp_path, monkeypatch, access_log)
    lab.start()
    for extension in (1, 2, 3, 4, 1):
        lab.deliver(syn(extension))
    lab.close()
    found = lab.events()
    assert [int(event["keys"]["portext.dst"]) for event in found] == logged
    for event in found:
        assert event["event"] == "decision"
        assert event["target"] == f"10.64.0.{int(event['keys']['portext.dst']) - 1}:8080"
        assert (event["client"], event["endpoint"]) == ("198.51.100.1:40000", "203.0.113.10:443")
        assert (event["service"], event["outcome"], event["reason"]) == ("refusing", "steer", "arithmetic")


def test_a_queue_whose_owner_is_still_on_its_way_out_is_waited_for(stopped: Lab) -> None:
    stopped.bind_errors = [KernelError("taken"), KernelError("taken")]
    stopped.start()
    assert stopped.bind_errors == []
    assert stopped.outcome(syn(1)) == ("accept", MARK.field(REFUSING))


def test_a_queue_that_stays_taken_is_given_up(stopped: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_BIND_SECONDS", 0.1)
    stopped.bind_errors = [KernelError("NFQUEUE 100 cannot be bound")] * 100
    with pytest.raises(KernelError, match=r"^NFQUEUE 100 cannot be bound$"):
        stopped.start()
    assert 1 < 100 - len(stopped.bind_errors) < 10


# ---- datagrams ----

DATAGRAM_CONFIG = """
[gateway]
mark_bits = "8-27"
[gateway.pending]
source_connections = 2
connections = 3
[pools.p]
prefixes = ["10.64.0.0/24"]
[services.a-prefixes]
endpoints = ["203.0.113.10:500-599/udp"]
inspect = ["prefix"]
routes = [
    { when.prefix = "a", target = "10.64.0.1:500" },
    { when.prefix = "b", target = "10.64.0.2:500" },
    { when.prefix = "same", target = "10.64.0.1:same" },
]
[services.b-quic]
endpoints = ["203.0.113.10:443/udp"]
inspect = ["quic"]
first_payload_timeout = 3
routes = [{ when.quic.sni = "a.example", target = "10.64.0.1:443" }]
[services.c-names]
endpoints = ["203.0.113.10:53/udp"]
inspect = ["dns"]
routes = [
    { when.dns.qname = "a.example", target = "10.64.0.1:53" },
    { when.dns.qname = "b.example", target = "10.64.0.2:53" },
]
[services.d-passing]
endpoints = ["203.0.113.10:22/udp"]
inspect = ["port-extension"]
unextended = "pass"
extension_pool = { pool = "p", by = "extension", port = 22 }
"""
TO_A, TO_B, TO_SAME, TO_QUIC, TO_NAME_A, TO_NAME_B = range(FIRST_TARGET_ID, FIRST_TARGET_ID + 6)


@pytest.fixture
def udp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch, text=DATAGRAM_CONFIG)
    lab.start()
    yield lab
    lab.close()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def datagram(payload: bytes, port: int = 500, *, sport: int = 40000, source: str = "198.51.100.1") -> bytes:
    """An IPv4 datagram to the endpoint, as it lies in the queue."""
    src, dst = (ipaddress.ip_address(text).packed for text in (source, "203.0.113.10"))
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(payload), 0, 0, 64, 17, 0, src, dst)
    return head + struct.pack("!HHHH", sport, port, 8 + len(payload), 0) + payload


def query(name: bytes, sport: int = 40000) -> bytes:
    labels = b"".join(bytes([len(label)]) + label for label in name.split(b"."))
    return datagram(bytes.fromhex("000701000001000000000000") + labels + b"\0\0\1\0\1", 53, sport=sport)


def hello(parts: int, name: bytes = b"a.example", sport: int = 40000) -> list[bytes]:
    """A QUIC hello of so many datagrams."""
    flight = initials.flight(initials.client_hello(name, b"h3", size=1000 * parts - 300))
    assert len(flight) == parts
    return [datagram(each, 443, sport=sport) for each in flight]


def rest(lab: Lab) -> None:
    """The queue is found empty, twice: what was decided is forgotten."""
    for _ in range(2):
        lab.worker._datagram.rest()


def steered(target_id: int) -> tuple[str, int]:
    return "accept", THEIRS | MARK.field(target_id)


DROPPED = ("drop", THEIRS)


def udp_elements(target_id: int, text: str, dport: int) -> list[Element]:
    host, _, port = text.rpartition(":")
    target = Target(ipaddress.ip_address(host), int(port))
    field = MARK.field(target_id)
    return target_elements(field, target) + datagram_elements(field, target_id, target, dport)


def test_a_datagram_that_suffices_goes_on_with_the_decision_as_its_mark(udp: Lab) -> None:
    assert udp.outcome(datagram(b"a1"), THEIRS) == steered(TO_A)
    assert udp.nftables.inserted == udp_elements(TO_A, "10.64.0.1:500", 500)
    assert udp.outcome(datagram(b"a2", sport=40001), THEIRS) == steered(TO_A)
    assert udp.injected == []
    assert udp.counted() == {"ROUTE": 2, "LOADED": 1}


def test_the_other_outcomes_of_datagrams(udp: Lab) -> None:
    assert udp.outcome(datagram(b"x"), THEIRS) == DROPPED
    assert udp.outcome(datagram(b"x", 22), THEIRS) == ("accept", THEIRS | MARK.field(PASS_ID))
    assert udp.outcome(datagram(b"x", 80), THEIRS) == DROPPED
    assert udp.counted() == {"UNMATCHED": 1, "UNEXTENDED_PASS": 1, "NO_ENDPOINT": 1}
    assert udp.nftables.inserted == []


def test_a_hello_of_several_datagrams_is_sent_whole_and_in_order_once_it_is_decided(udp: Lab) -> None:
    first, second, third = hello(3)
    assert udp.outcome(third, THEIRS) == udp.outcome(first, THEIRS) == DROPPED
    assert udp.injected == []
    udp.worker._watch_the_time()
    assert udp.queue.seconds > 0, "somebody waits"
    assert udp.outcome(second, THEIRS) == DROPPED
    assert udp.injected == [(part, MARK.field(TO_QUIC)) for part in (third, first, second)]
    assert udp.counted() == {"HELD_DATAGRAMS": 2, "ROUTE": 1, "LOADED": 1}


def test_what_waited_behind_a_decided_flow_follows_it_whatever_it_says(udp: Lab) -> None:
    packets = [udp.queue.arrive(datagram(payload), THEIRS) for payload in (b"a", b"b", b"x")]
    udp.worker._give()
    assert [(packet.verdicts, packet.mark) for packet in packets] == [(["accept"], steered(TO_A)[1])] * 3
    parts = [*hello(2), datagram(b"behind", 443)]
    for part in parts:
        assert udp.outcome(part, THEIRS) == DROPPED
    assert udp.injected == [(part, MARK.field(TO_QUIC)) for part in parts]
    assert udp.counted() == {"ROUTE": 2, "LOADED": 2, "FORWARDED": 3, "HELD_DATAGRAMS": 1}
    rest(udp)
    assert udp.outcome(datagram(b"b"), THEIRS) == steered(TO_B), "the kernel has forgotten the flow: it is a new one"


def test_of_a_refused_flow_nothing_is_remembered(udp: Lab) -> None:
    assert udp.outcome(datagram(b"x"), THEIRS) == DROPPED
    assert udp.outcome(datagram(b"a"), THEIRS) == steered(TO_A)


def test_each_query_is_decided_by_itself(udp: Lab) -> None:
    asked = [(b"a.example", TO_NAME_A), (b"b.example", TO_NAME_B)] * 3
    packets = [udp.queue.arrive(query(name), THEIRS) for name, _ in asked]
    udp.worker._give()
    assert [packet.mark for packet in packets] == [steered(target_id)[1] for _, target_id in asked]
    assert udp.outcome(query(b"c.example"), THEIRS) == DROPPED
    assert udp.counted() == {"ROUTE": 6, "UNMATCHED": 1, "LOADED": 2}


def test_one_daemon_under_two_ids_is_known_by_the_first(udp: Lab) -> None:
    """`same` and the number are one address and port; its answers have one mark."""
    assert udp.outcome(datagram(b"a"), THEIRS) == steered(TO_A)
    assert udp.outcome(datagram(b"same", sport=40001), THEIRS) == steered(TO_SAME)
    daemons = [element for element in udp.nftables.inserted if element.name == "daemons4"]
    assert daemons == [element for element in udp_elements(TO_A, "10.64.0.1:500", 500) if element.name == "daemons4"]
    assert udp.outcome(datagram(b"same", 501, sport=40001), THEIRS) == steered(TO_SAME)
    assert len([element for element in udp.nftables.inserted if element.name == "daemons4"]) == 2


def test_a_flow_whose_target_the_kernel_refuses_is_dropped_and_tried_again(udp: Lab) -> None:
    udp.nftables.error = KernelError("nf_tables took no element")
    first, second = hello(2)
    assert udp.outcome(first, THEIRS) == udp.outcome(second, THEIRS) == DROPPED
    assert udp.injected == []
    udp.nftables.error = None
    assert udp.outcome(first, THEIRS) == udp.outcome(second, THEIRS) == DROPPED
    assert udp.injected == [(first, MARK.field(TO_QUIC)), (second, MARK.field(TO_QUIC))]
    assert udp.counted() == {"HELD_DATAGRAMS": 2, "NOT_LOADED": 1, "ROUTE": 1, "LOADED": 1}


def test_flows_that_never_suffice(udp: Lab) -> None:
    first, _ = hello(2)
    longer = datagram(first[28:] + bytes(4000), 443)
    assert udp.outcome(longer[:4016], THEIRS) == DROPPED, "it could not be sent again"
    assert udp.counted() == {"CUT_DATAGRAMS": 1}
    for _ in range(16):
        assert udp.outcome(first, THEIRS) == DROPPED
    assert udp.counted() == {"CUT_DATAGRAMS": 1, "HELD_DATAGRAMS": 15, "TOO_LONG": 1}
    before = time.monotonic()
    udp.outcome(first, THEIRS)
    udp.worker._datagram.expire(before + 2.9)
    assert "TOO_SLOW" not in udp.counted()
    udp.worker._datagram.expire(time.monotonic() + 3.2)
    assert udp.counted()["TOO_SLOW"] == 1
    assert len(udp.worker._datagram) == 0
    assert udp.injected == []


def test_who_pushes_out_whom_is_counted(udp: Lab) -> None:
    for sport in (1, 2, 3):
        udp.outcome(hello(2, sport=sport)[0], THEIRS)
    assert udp.counted() == {"HELD_DATAGRAMS": 3, "EVICTED_SOURCE": 1}
    for number in (2, 3):
        flight = initials.flight(initials.client_hello(b"a.example", b"h3", size=1700))
        udp.outcome(datagram(flight[0], 443, source=f"198.51.100.{number}"), THEIRS)
    assert udp.counted() == {"HELD_DATAGRAMS": 5, "EVICTED_SOURCE": 1, "EVICTED_TOTAL": 1}


def test_a_reload_decides_what_is_held_by_the_new_plan(udp: Lab) -> None:
    first, second = hello(2)
    assert udp.outcome(first, THEIRS) == DROPPED
    assert udp.outcome(datagram(b"a"), THEIRS) == steered(TO_A)
    other = DATAGRAM_CONFIG.replace("10.64.0.1:443", "10.64.0.7:443")
    # A new plan, and not just another route in the table.
    udp.publish(other.replace("first_payload_timeout = 3", "first_payload_timeout = 4"))
    assert udp.outcome(second, THEIRS) == DROPPED
    moved = udp.injected[0][1]
    assert udp.injected == [(first, moved), (second, moved)]
    assert moved not in (None, MARK.field(TO_QUIC))
    new = [element for element in udp.nftables.inserted if element.name == "targets4"][-1]
    assert new.data == ipaddress.ip_address("10.64.0.7").packed + (443).to_bytes(2) + bytes(2)
    assert udp.outcome(datagram(b"b"), THEIRS) == steered(TO_B), "nothing is decided by the old plan any more"
