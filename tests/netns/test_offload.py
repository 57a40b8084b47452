"""What the kernel steers by itself: the second SYN with an extension needs no worker, and whatever changes the answer
counts for the next one.

Topology: tests/netns/gateway.py; one for all tests, each of which takes extensions of its own. Every answer names the
daemon that gave it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from steerd.control import client as api_client
from steerd.kernel.nftables import Element, Nftables
from steerd.model import Extension
from steerd.wire import portext
from tests.netns.conftest import hosts
from tests.netns.flood import checksum
from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, NUMBERS, SLOWER, Gateway, gateway
from tests.unit.test_systemd import setting

CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.main]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
"""
FROM_ELEVEN = CONFIG.replace('by = "extension",', 'by = "extension", first = 11,')
ALIAS = {4: "10.64.0.{}", 6: "fd00:64::{:x}"}
ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
TCP_OPTIONS = b"\x02\x04\x05\xb4\x04\x02\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x00\x01\x03\x03\x07"
LOST = "packets were dropped since their target was missing in the kernel's maps; workers load their targets again"
VERSIONS = pytest.mark.parametrize("version", [4, 6])


class Lab:
    """The gateway, and daemons behind its aliases."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        gateway.configure(CONFIG)
        gateway.start()
        gateway.respond(("10.64.0.0", 100, 8080), ("fd00:64::", 100, 8080))

    def asked(self, extension: int, version: int, source_extension: int = 0) -> int:
        """The number of the alias that answers."""
        line = self.gateway.ask(Extension(extension, source_extension), 443, version=version)
        return int(ipaddress.ip_address(line.split()[0])) & 0xFF

    def by(self) -> tuple[int, int]:
        """How many SYNs the kernel steered by itself, and how many workers were asked."""
        counters = self.gateway.counters()
        return counters["offloaded"], counters["diverted"]

    def held(self, version: int) -> set[int]:
        """The extensions that the kernel steers by itself."""
        with self.gateway.host.entered():
            nftables = Nftables()
        with contextlib.closing(nftables):
            keys = [element.key for element in nftables.elements(f"offload{version}")]
        return {int.from_bytes(key[-4:-2] if version == 4 else key[-2:], "big") for key in keys}

    def put_back(self, extension: int) -> None:
        """An element of each map, as a worker would add it, to whatever target."""
        tail = extension.to_bytes(2, "big")
        with self.gateway.host.entered():
            nftables = Nftables()
        with contextlib.closing(nftables):
            keys = {4: bytes(12) + tail + b"\0\0", 6: bytes(26) + tail}
            nftables.insert([Element(f"offload{version}", key, bytes(4)) for version, key in keys.items()])
        assert self.held(4) == self.held(6) == {extension}

    def learn(self, extension: int, version: int, alias: int | None = None) -> None:
        """Have a worker decide, and tell the kernel."""
        assert self.asked(extension, version) == (extension - 1 if alias is None else alias)
        self.gateway.wait(lambda: extension in self.held(version), "the kernel was told")

    def api(self, method: str, *path: str, body: Any = None, query: dict[str, str] | None = None) -> Any:
        return api_client.request(str(self.gateway.directory / "run"), method, *path, body=body, query=query)

    def workers(self) -> list[int]:
        return [event["pid"] for event in self.gateway.events() if event["event"] == "worker bound"]

    def send_syn(self, version: int, extension: int, *, damaged: bool) -> None:
        """A SYN of the layout that the kernel knows, from a port of chance."""
        source, destination = (
            ipaddress.ip_address(text).packed
            for text in ((CLIENT4, ENDPOINT4) if version == 4 else (CLIENT6, ENDPOINT6))
        )
        port = random.Random().randrange(1024, 9000)
        tcp = struct.pack("!HHIIBBHHH", port, 443, random.getrandbits(32), 0, 0xA0, 2, 64240, 0, 0) + TCP_OPTIONS
        total = checksum(source + destination + struct.pack("!II", len(tcp), socket.IPPROTO_TCP) + tcp)
        tcp = tcp[:16] + struct.pack("!H", total ^ (0x1234 if damaged else 0)) + tcp[18:]
        if version == 4:
            options = portext.encode_ipv4(Extension(extension, 0), NUMBERS)
            head = struct.pack("!BBHHHBBH4s4s", 0x47, 0, 68, 0, 0, 64, socket.IPPROTO_TCP, 0, source, destination)
        else:
            options = b"\x06" + portext.encode_ipv6(Extension(extension, 0), NUMBERS)[1:]
            head = struct.pack("!IHBB16s16s", 6 << 28, 56, 60, 64, source, destination)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with self.gateway.client.entered(), socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(head + options + tcp, (ENDPOINT[version], 0))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with hosts() as new_host, gateway(new_host) as made:
        made.expected_warnings = ["worker died", LOST]
        yield Lab(made)


@VERSIONS
def test_the_second_syn_needs_no_worker_and_what_is_not_known_does(lab: Lab, version: int) -> None:
    begun = lab.api("GET", "status")["machine"]
    offloaded, diverted = lab.by()
    lab.learn(5, version)
    assert lab.by() == (offloaded, diverted + 1)
    assert [lab.asked(5, version) for _ in range(3)] == [4, 4, 4]
    assert lab.asked(5, version, source_extension=9) == 4  # nothing asks for it
    assert lab.by() == (offloaded + 4, diverted + 1)
    lab.learn(6, version)
    assert lab.by() == (offloaded + 4, diverted + 2)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            lab.asked(300, version)
    assert lab.by() == (offloaded + 4, diverted + 4)
    status = lab.api("GET", "status")["machine"]
    assert status["kernel"]["offloaded"] == offloaded + 4
    assert status["counters"]["offloaded"] == begun["counters"]["offloaded"] + 2
    assert status["decisions"]["arithmetic"] == begun["decisions"]["arithmetic"] + 2


@VERSIONS
def test_what_is_laid_out_otherwise_goes_to_a_worker(lab: Lab, version: int) -> None:
    lab.learn(15, version)
    offloaded, diverted = lab.by()
    one = (
        portext.encode_ipv4(Extension(15, 0), NUMBERS)
        if version == 4
        else portext.encode_ipv6(Extension(15, 0), NUMBERS)
    )
    if version == 4:
        right = [b"\1\1\1\1" + one, one + b"\0\0\0\0"]
        wrong = [one + one, one[:1] + b"\6" + one[2:6], one[:2] + b"\0\0" + one[4:]]
        where = (socket.IPPROTO_IP, socket.IP_OPTIONS)
    else:
        right = [b"\0\1\1\4\0\0\0\0" + one[2:10], b"\0\1" + one[2:10] + b"\x1c\4" + bytes(4)]
        wrong = [
            b"\0\2" + one[2:10] + one[2:10] + b"\1\4\0\0\0\0",
            b"\0\1" + one[2:3] + b"\4" + one[4:8] + b"\x1c\6" + bytes(6),
        ]
        where = (socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS)

    def connected(options: bytes) -> str:
        with lab.gateway.socket(None, version=version) as client:
            client.setsockopt(*where, options)
            client.connect((ENDPOINT[version], 443))
            return client.recv(4096).decode()

    for options in right:
        assert connected(options).startswith(ALIAS[version].format(14) + " ")
    for options in wrong:
        with pytest.raises(ConnectionRefusedError):
            connected(options)
    assert lab.by() == (offloaded, diverted + len(right) + len(wrong))


@VERSIONS
def test_a_damaged_syn_is_dropped_and_a_whole_one_is_steered_by_the_kernel(lab: Lab, version: int) -> None:
    lab.learn(25, version)
    offloaded, diverted = lab.by()
    invalid = lab.gateway.counters()["invalid"]
    # The client resets what answers it.
    lab.gateway.allow_unasked = True
    lab.send_syn(version, 25, damaged=True)
    lab.gateway.wait(lambda: lab.gateway.counters()["invalid"] == invalid + 1, "the damaged one was seen")
    lab.send_syn(version, 25, damaged=False)
    lab.gateway.wait(lambda: lab.by() == (offloaded + 1, diverted), "the whole one was steered")


@VERSIONS
def test_a_mark_of_others_stays_and_goes_to_a_worker(lab: Lab, version: int) -> None:
    lab.learn(35, version)
    offloaded, diverted = lab.by()
    lab.gateway.host.sh(
        "nft 'table inet other { chain c { type filter hook prerouting priority -200; meta mark set 0x41; };"
        " chain d { type filter hook input priority 10; tcp dport 8080 tcp flags syn meta mark 0x41 counter; }; }'"
    )
    assert [lab.asked(35, version) for _ in range(3)] == [34, 34, 34]
    assert lab.by() == (offloaded, diverted + 3)
    assert "packets 3 " in lab.gateway.host.sh("nft list chain inet other d; nft delete table inet other")


def test_drains_routes_and_the_access_log_count_for_the_next_connection(lab: Lab) -> None:
    for version in (4, 6):
        alias = ALIAS[version].format(4)
        lab.learn(5, version)
        lab.api("PUT", "drains", alias)
        assert not lab.held(version)
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                lab.asked(5, version)
        lab.api("DELETE", "drains", alias)
        lab.learn(5, version)

        def put(number: int, source: str | None = None) -> None:
            target = f"[{ALIAS[6].format(number)}]:8080" if version == 6 else f"{ALIAS[4].format(number)}:8080"  # noqa: B023
            body = {"when": {"portext.dst": 5}, "target": target, "source": source}
            lab.api("PUT", "services", "main", "routes", body=body)

        def remove(**query: str) -> None:
            lab.api("DELETE", "services", "main", "routes", query={"when": '{"portext.dst": "5"}'} | query)

        put(9)
        lab.learn(5, version, alias=9)
        put(7)
        assert not lab.held(version)
        lab.learn(5, version, alias=7)
        assert lab.asked(5, version) == 7
        source = {4: "198.51.100.0/24", 6: "2001:db8:1::/64"}[version]
        put(9, source)
        assert [lab.asked(5, version), lab.asked(5, version)] == [9, 9]
        assert not lab.held(version)
        remove(source=source)
        remove()
        lab.learn(5, version)
        logged = lab.gateway.count_events("decision")
        lab.api("PUT", "log", body={"level": "info", "access_log": 1})
        assert [lab.asked(5, version), lab.asked(5, version)] == [4, 4]
        lab.gateway.wait(lambda: lab.gateway.count_events("decision") == logged + 2, "both are in the log")  # noqa: B023
        lab.api("PUT", "log", body={"level": "info", "access_log": 0})


def test_a_reload_that_maps_extensions_otherwise_counts_once_it_has_answered(lab: Lab) -> None:
    extensions = range(11, 31)
    for first in (11, 1, 11, 1):
        lab.gateway.configure(FROM_ELEVEN if first == 11 else CONFIG)
        lab.api("POST", "reload")
        for version in (4, 6):
            assert not lab.held(version)
            expected = [extension - first for extension in extensions]
            assert [lab.asked(extension, version) for extension in extensions] == expected
            lab.gateway.wait(lambda: lab.held(version) == set(extensions), "the kernel was told")  # noqa: B023
            offloaded, diverted = lab.by()
            assert [lab.asked(extension, version) for extension in extensions] == expected
            assert lab.by() == (offloaded + len(extensions), diverted)


def test_without_workers_what_the_kernel_knows_goes_on_and_a_stop_ends_that(lab: Lab) -> None:
    for version in (4, 6):
        lab.learn(5, version)
    assert lab.gateway.daemon is not None
    # It would start others.
    lab.gateway.daemon.send_signal(signal.SIGSTOP)
    killed = lab.workers()
    for pid in killed[-2:]:
        os.kill(pid, signal.SIGKILL)
    for version in (4, 6):
        assert [lab.asked(5, version) for _ in range(5)] == [4] * 5
    lab.gateway.daemon.send_signal(signal.SIGCONT)
    lab.gateway.wait(lambda: len(lab.workers()) == len(killed) + 2, "other workers are bound")
    for version in (4, 6):
        assert [lab.asked(5, version), lab.asked(6, version)] == [4, 5]
    lab.gateway.stop()
    assert not lab.held(4) and not lab.held(6)
    lab.gateway.start()
    for version in (4, 6):
        lab.learn(5, version)


def test_what_was_killed_goes_on_until_the_service_has_ended_or_begins_again(lab: Lab) -> None:
    for version in (4, 6):
        lab.learn(5, version)
    lab.gateway.kill()
    for version in (4, 6):
        assert [lab.asked(5, version) for _ in range(3)] == [4, 4, 4]
    (service_ended,) = setting("ExecStopPost")
    lab.gateway.host.sh(service_ended.removeprefix("-"))
    assert not lab.held(4) and not lab.held(6)
    lab.put_back(5)
    lab.gateway.start_without_a_table()
    assert not lab.held(4) and not lab.held(6)
    lab.gateway.start()


def test_when_the_kernel_lost_a_target_the_workers_put_it_back(lab: Lab) -> None:
    for version in (4, 6):
        lab.learn(5, version)
        lab.gateway.host.sh(
            f"nft flush map inet steerd targets{version}; nft flush set inet steerd translated{version}"
        )
        # The client's first SYN is dropped, and repeated until a worker is asked again.
        assert lab.asked(5, version) == 4
        lab.gateway.wait(lambda: 5 in lab.held(version) or lab.asked(5, version) != 4, "told again", 30 * SLOWER)  # noqa: B023
