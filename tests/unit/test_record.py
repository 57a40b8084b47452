"""What a worker counts and logs of its decisions: one reason, one count, one line that says why."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from steerd.model import Reason
from steerd.telemetry.counters import Extra, LogSwitch
from tests.unit.test_worker import CONFIG, Lab, syn

ROUTED = (
    CONFIG
    + """
[services.web]
endpoints = ["203.0.113.10:80/tcp"]
inspect = ["proxy", "http"]
trusted_proxies = ["198.51.100.1/32"]
routes = [
    { when = { "http.host" = "a.example" }, target = "10.64.0.1:80" },
    { when = { "http.host" = "a.example" }, source = "192.0.2.0/24", target = "10.64.0.2:80" },
]
"""
)
MORE = """
import sys
from steerd import config
from steerd.control.registry import Registry
registry = Registry(sys.argv[1])
registry.publish(config.parse(sys.stdin.read(), "steerd.toml"))
registry.routes.put("web", {"http.host": "b.example"}, "10.64.0.2:81", None)
when = {"http.host": "c.example"}
registry.leases.add("tenant-1", "p", service="web", when=when, source=None, port=0, ttl=None, now=0)
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Lab]]:
    """Makes the lab, with its access log. 1.5 ms pass between two looks at the clock, and never a second."""
    ticks = itertools.count(0, 1_500_000)
    monkeypatch.setattr("steerd.record.monotonic_ns", lambda: next(ticks))
    monkeypatch.setattr("steerd.record.monotonic", lambda: 1000.0)
    labs: list[Lab] = []

    def make(access: int) -> Lab:
        labs.append(Lab(tmp_path, monkeypatch, access, ROUTED))
        return labs[0]

    yield make
    labs[0].close()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def request(host: str, header: bytes = b"") -> bytes:
    """A SYN of 198.51.100.1 with a request in it (Fast Open)."""
    payload = header + f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    raw = syn(None, 80) + payload
    return raw[:2] + len(raw).to_bytes(2, "big") + raw[4:]


def test_a_line_has_everything_that_explains_the_decision(made: Callable[[int], Lab]) -> None:
    lab = made(1)
    subprocess.run([sys.executable, "-c", MORE, str(lab.directory)], input=ROUTED, text=True, check=True)
    lab.start()
    for host in ("a.example", "b.example", "c.example"):
        lab.deliver(request(host))
    lab.deliver(request("a.example", b"PROXY TCP4 192.0.2.9 203.0.113.10 1 80\r\n"))
    lab.deliver(syn(1))
    found = lab.events()
    assert [(e["parser"], e["route"], e["target"]) for e in found] == [
        ("http", "services.web.routes[0]", "10.64.0.1:80"),
        ("http", "dynamic", "10.64.0.2:81"),
        ("http", "lease tenant-1", "10.64.0.0:same"),
        ("http", "services.web.routes[1]", "10.64.0.2:80"),
        ("port-extension", None, "10.64.0.0:8080"),
    ]
    first = found[0]
    assert (first["level"], first["event"], first["process"]) == ("info", "decision", "worker-0")
    assert (first["client"], first["endpoint"], first["service"]) == ("198.51.100.1:40000", "203.0.113.10:80", "web")
    assert (first["outcome"], first["reason"], first["microseconds"]) == ("steer", "route", 1500)
    assert first["keys"]["http.host"] == "a.example"


@pytest.mark.parametrize(("access", "lines"), [(0, 3), (1, 6), (3, 4)])
def test_failed_decisions_are_logged_whatever_the_sample(made: Callable[[int], Lab], access: int, lines: int) -> None:
    lab = made(access)
    lab.start()
    for number in range(3):
        lab.deliver(request("a.example"))
        lab.deliver(request(f"no-{number}.example"))
    found = lab.events()
    failed = [event for event in found if event["reason"] == "unmatched"]
    assert [event["keys"]["http.host"] for event in failed] == ["no-0.example", "no-1.example", "no-2.example"]
    assert {(event["outcome"], event["route"], event["target"]) for event in failed} == {("reset", None, None)}
    assert len(found) == lines


def test_what_cannot_be_read_and_what_ends_in_a_fault_is_logged_with_its_bytes(
    made: Callable[[int], Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = made(0)
    lab.start()
    lab.deliver(b"\x45" + bytes(100))

    def fail(_packet: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(lab.worker._engine, "decide_syn", fail)
    lab.deliver(request("a.example"))
    unreadable, fault, _ = lab.events()
    assert (unreadable["reason"], unreadable["client"], unreadable["packet"]) == (
        "not_readable",
        None,
        "45" + "00" * 63,
    )
    assert (fault["reason"], fault["client"]) == ("fault", "198.51.100.1:40000")
    assert bytes.fromhex(fault["payload"]) == b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
    series = {(each.service, each.parser): each for each in lab.counters.series()}
    assert series["", ""].reasons[Reason.NOT_READABLE] == series["", ""].reasons[Reason.FAULT] == 1


def test_too_many_failures_are_told_by_their_number_once_there_is_room(made: Callable[[int], Lab]) -> None:
    lab = made(0)
    lab.start()
    for number in range(50):
        lab.deliver(request(f"no-{number}.example"))
    assert len(lab.events()) == 20
    assert lab.counters.total(Extra.NOT_LOGGED) == 30
    told = lab.worker._record
    told.settle_up(1000.1)
    assert (told.owes, len(lab.events())) == (True, 20)
    told.settle_up(1000.25)
    assert (told.owes, len(lab.events())) == (False, 21)
    assert {key: lab.events()[-1][key] for key in ("event", "level", "decisions")} == {
        "event": "failed decisions that were not logged", "level": "info", "decisions": 30,
    }  # fmt: skip


def test_switches_count_from_the_next_packet_on(made: Callable[[int], Lab]) -> None:
    lab = made(0)
    lab.start()
    for level, access in ((logging.INFO, 0), (logging.INFO, 1), (logging.WARNING, 1), (logging.INFO, 2)):
        lab.counters.log = LogSwitch(level, access)
        for number in range(1, 5):
            lab.deliver(syn(number))
    lab.counters.log = LogSwitch(logging.DEBUG, 0)
    lab.deliver(request("a.example"))
    assert [event.get("target") for event in lab.events() if event["event"] == "decision"] == [
        "10.64.0.0:8080", "10.64.0.1:8080", "10.64.0.2:8080", "10.64.0.3:8080", "10.64.0.1:8080", "10.64.0.3:8080",
    ]  # fmt: skip
