"""`steerd check --live`: every finding is provoked on one host and named in one line; a clean host has none.

gateway: 203.0.113.10 and 2001:db8::10 (endpoints) on lo; nothing else, no link
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.lab import Host

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
[gateway]
mark_bits = "8-31"

[pools.web]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]

[services.web]
endpoints = ["203.0.113.10:443/tcp", "203.0.113.10:8000-8999/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension", "http"]
unextended = "unmatched"
routes = [
    { when = { http.host = "a.example" }, target = ["10.64.0.1:80", "[fd00:64::1]:80"] },
    { when = { http.host = "b.example" }, target = "10.64.0.2:same" },
    { when = { http.host = "c.example" }, target = { address = "10.64.0.3:81", wildcard = true } },
    { when = { http.host = "d.example" }, target = { address = "192.0.2.7:82", external = true } },
]
"""


class Machine:
    """One host, a configuration, and `steerd check --live`."""

    def __init__(self, host: Host, config: Path) -> None:
        self.host = host
        self.config = config
        config.write_text(CONFIG)

    def run(self, prefix: str = "", environment: str = "") -> tuple[int, list[str]]:
        """Exit status and lines of the check, which must not change anything."""
        before = self.state()
        command = f"cd {ROOT} && {environment} {prefix} {sys.executable} -m steerd.cli.main check --live {self.config}"
        done = subprocess.run(
            self.host.command("bash", "-c", command), capture_output=True, text=True, check=False, timeout=120
        )
        assert self.state() == before
        return done.returncode, (done.stdout + done.stderr).splitlines()

    def findings(self) -> list[str]:
        """The lines without the file's name: `dotted.key: sentence`."""
        status, lines = self.run()
        if lines == ["ok"]:
            assert status == 0
            return []
        assert status == 2, lines
        return [line.removeprefix(f"{self.config}: ") for line in lines]

    def only_finding(self) -> str:
        findings = self.findings()
        assert len(findings) == 1, findings
        return findings[0]

    def state(self) -> str:
        return self.host.sh(
            "nft -a list ruleset 2>/dev/null; ip rule; ip -6 rule; ip -br addr; ip route show table all;"
            "ip -6 route show table all; cat /proc/sys/net/netfilter/nf_conntrack_tcp_loose"
        )

    def nft(self, text: str) -> None:
        self.host.sh(f"nft -f - <<'END'\n{text}\nEND")


@pytest.fixture
def machine(new_host: Callable[[str], Host], tmp_path: Path) -> Machine:
    host = new_host("gateway")
    host.sh("ip addr add 203.0.113.10/32 dev lo; ip -6 addr add 2001:db8::10/128 dev lo nodad")
    return Machine(host, tmp_path / "steerd.toml")


@pytest.fixture
def listen(machine: Machine) -> Iterator[Callable[..., None]]:
    """Opens listening sockets on the host, in this process, until the test ends."""
    sockets = []

    def open_socket(address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with machine.host.entered():
            if kind == socket.SOCK_STREAM:
                sockets.append(socket.create_server((address, port), family=family))
            else:
                sockets.append(socket.socket(family, kind))
                sockets[-1].bind((address, port))

    yield open_socket
    for each in sockets:
        each.close()


def base_chain(hook: str, priority: int, rule: str) -> str:
    return f"table inet fw {{\nchain c {{\ntype filter hook {hook} priority {priority}\n{rule}\n}}\n}}"


def test_a_clean_machine(machine: Machine) -> None:
    assert machine.run() == (0, ["ok"])


def test_an_endpoint_that_is_not_here(machine: Machine) -> None:
    machine.host.sh("ip addr del 203.0.113.10/32 dev lo")
    assert machine.only_finding().startswith(
        "services.web.endpoints[0]: 203.0.113.10 is not an address of this machine"
    )
    machine.host.sh("ip -6 addr del 2001:db8::10/128 dev lo")
    keys = [line.split(": ")[0] for line in machine.findings()]
    assert keys == ["services.web.endpoints[0]", "services.web.endpoints[2]"]


def test_a_group_that_is_not_here(machine: Machine) -> None:
    machine.config.write_text(CONFIG.replace("[gateway]", '[gateway]\napi = { read_only_group = "no-such-group" }'))
    assert machine.only_finding() == (
        "gateway.api.read_only_group: There is no group no-such-group on this machine, and without it no read-only"
        " socket; add it (groupadd --system no-such-group), and the monitors to it."
    )


def test_what_cannot_be_woken(machine: Machine) -> None:
    target = '{ address = "10.64.0.1:%d", wake = ["/bin/no-such-program"], user = "no-such-user" }'
    machine.config.write_text(CONFIG.replace('"10.64.0.1:80"', target % 80).replace('"10.64.0.1:443"', target % 443))
    assert machine.findings() == [
        "wake of 10.64.0.1: /bin/no-such-program is no program on this machine.",
        "wake of 10.64.0.1: There is no user no-such-user on this machine to run it; add it, or name another.",
    ]


def test_a_local_route_makes_an_endpoint_local(machine: Machine) -> None:
    machine.host.sh("ip addr del 203.0.113.10/32 dev lo; ip route add local 203.0.113.0/24 dev lo")
    machine.host.sh("ip -6 addr del 2001:db8::10/128 dev lo; ip -6 route add local 2001:db8::/64 dev lo")
    assert machine.findings() == []
    machine.host.sh("ip route del local 203.0.113.0/24 dev lo; ip route add 203.0.113.0/24 dev lo")
    assert "203.0.113.10 is not an address of this machine" in machine.only_finding()


@pytest.mark.parametrize(("command", "named"), [("ip", "`ip rule` 77"), ("ip -6", "`ip -6 rule` 77")])
def test_an_ip_rule_on_our_mark_bits(machine: Machine, command: str, named: str) -> None:
    machine.host.sh(f"{command} rule add pref 77 fwmark 0x5/0xff lookup 100")
    assert machine.findings() == []
    machine.host.sh(f"{command} rule del pref 77; {command} rule add pref 77 fwmark 0x5 lookup 100")
    finding = machine.only_finding()
    assert finding.startswith(f"gateway.mark_bits: The ip rule {named}: fwmark 0x5/0xffffffff lookup 100 compares")
    assert "limit it to the mask 0x000000ff" in finding


@pytest.mark.parametrize(
    ("rule", "harmless"),
    [
        ("meta mark 0x5 accept", "meta mark & 0xff == 0x5 accept"),
        ("meta mark set 0x5", "meta mark set meta mark | 0x5"),
        ("meta mark set ct mark", "ct mark set 0x5"),
    ],
)
def test_an_nft_rule_on_our_mark_bits(machine: Machine, rule: str, harmless: str) -> None:
    machine.nft(f"table inet fw {{\nchain other {{\n{harmless}\n}}\n}}")
    assert machine.findings() == []
    machine.nft(base_chain("forward", 0, rule))
    finding = machine.only_finding()
    assert finding.startswith("gateway.mark_bits: A firewall rule uses bits of 0xffffff00")
    shown = rule.replace("0x5", "0x00000005")
    assert f"table inet fw, chain c (hook forward, priority 0): `{shown}` (handle " in finding


@pytest.mark.parametrize("tool", ["iptables-nft", "ip6tables-nft"])
@pytest.mark.parametrize(
    ("rule", "shown", "harmless"),
    [
        ("-j MARK --set-mark 0x5", "-j MARK --set-xmark 0x5/0xffffffff", "-j MARK --set-mark 0x5/0xff"),
        ("-j CONNMARK --restore-mark", "-j CONNMARK --restore-mark", "-j CONNMARK --restore-mark --mask 0xff"),
        ("-m mark --mark 0x100/0x100 -j RETURN", "0x00000100", "-m connmark --mark 0x100/0x100 -j RETURN"),
    ],
)
def test_an_iptables_rule_on_our_mark_bits(machine: Machine, tool: str, rule: str, shown: str, harmless: str) -> None:
    machine.host.sh(f"{tool} -t mangle -A OUTPUT {harmless}")
    assert machine.findings() == []
    machine.host.sh(f"{tool} -t mangle -N THEIRS; {tool} -t mangle -A THEIRS {rule}; {tool} -t mangle -S THEIRS")
    finding = machine.only_finding()
    family = "ip" if tool == "iptables-nft" else "ip6"
    assert finding.startswith("gateway.mark_bits: ") and f"table {family} mangle, chain THEIRS: `" in finding
    assert shown in finding


@pytest.mark.parametrize(
    ("hook", "priority", "harmless_priority"),
    [("prerouting", -160, -300), ("prerouting", -149, -200), ("input", -10, -9), ("output", 0, -300)],
)
@pytest.mark.parametrize("rule", ["ct state invalid drop", "ct state vmap { invalid : drop, new : accept }"])
def test_a_rule_that_drops_invalid_packets(
    machine: Machine, hook: str, priority: int, harmless_priority: int, rule: str
) -> None:
    machine.nft(base_chain(hook, harmless_priority, rule))
    assert machine.findings() == []
    machine.nft("delete table inet fw\n" + base_chain(hook, priority, rule))
    finding = machine.only_finding()
    assert finding.startswith("services: A firewall rule drops packets that conntrack calls invalid: table inet fw,")
    words = re.escape(rule.partition("{")[0])
    assert re.search(rf"chain c \(hook {hook}, priority {priority}\): `{words}.*` \(handle \d+\)", finding)


def test_a_drop_in_a_chain_that_is_jumped_to(machine: Machine) -> None:
    machine.nft("table ip fw {\nchain bad {\nlog\ndrop\n}\n}\n" + base_chain("forward", 0, "accept"))
    machine.nft("table ip fw {\nchain c {\ntype filter hook input priority -150\nct state invalid goto bad\n}\n}")
    assert (
        "table ip fw, chain bad (reached from chain c, hook input, priority -150): `drop` (handle"
        in machine.only_finding()
    )


def test_an_iptables_rule_that_drops_invalid_packets(machine: Machine) -> None:
    machine.host.sh("iptables-nft -A INPUT -m conntrack --ctstate INVALID -j DROP")
    assert machine.findings() == []
    machine.host.sh("ip6tables-nft -t mangle -A INPUT -m conntrack --ctstate INVALID -j DROP")
    assert (
        "table ip6 mangle, chain INPUT (hook input, priority -150):"
        " `-A INPUT -m conntrack --ctstate INVALID -j DROP` (handle"
    ) in machine.only_finding()


def test_rules_that_cannot_be_read(machine: Machine) -> None:
    # A rule that iptables must show, and one of nft's own that no version of iptables can.
    machine.host.sh(
        "iptables-nft -t mangle -A PREROUTING -m connbytes --connbytes 1 --connbytes-dir both --connbytes-mode bytes"
        " -j MARK --set-mark 0x100"
    )
    machine.nft("add rule ip mangle PREROUTING ct mark set meta mark")
    status, lines = machine.run()
    assert status == 1
    assert lines == [line for line in lines if line.startswith("steerd: ")] and "iptables-nft-save" in lines[0]


def test_a_wildcard_listener_on_a_targets_port(machine: Machine, listen: Callable[[str, int], None]) -> None:
    listen("0.0.0.0", 9999)  # no target's port
    listen("0.0.0.0", 81)  # its target says wildcard = true
    listen("0.0.0.0", 82)  # its target is another machine
    listen("127.0.0.1", 80)  # not the wildcard address
    assert machine.findings() == []
    machine.host.sh("ip addr add 192.0.2.7/32 dev lo")
    assert machine.only_finding().startswith("services.web.routes[3].target: Port 82 of the wildcard address")
    machine.host.sh("ip addr del 192.0.2.7/32 dev lo")
    listen("::", 80)
    findings = machine.findings()
    assert {line.split(": ")[0] for line in findings} == {"services.web.routes[0].target"}
    assert any("Port 80 of the wildcard address (::) is taken by " in line for line in findings)
    assert all(re.search(r"taken by \S+ \(process \d+\), and a target uses this port", line) for line in findings)


def test_a_wildcard_listener_on_a_port_that_clients_keep(machine: Machine, listen: Callable[[str, int], None]) -> None:
    listen("0.0.0.0", 443)
    finding = machine.only_finding()
    assert finding.startswith("services.web.routes[1].target: Port 443 of the wildcard address (0.0.0.0) is taken by ")


def test_a_range_over_a_port_of_the_gateway(machine: Machine, listen: Callable[[str, int], None]) -> None:
    listen("127.0.0.1", 8022)
    listen("203.0.113.10", 443)  # a single port was meant
    assert machine.findings() == []
    listen("203.0.113.10", 8022)
    finding = machine.only_finding()
    assert finding.startswith(
        "services.web.endpoints[1]: The range 203.0.113.10:8000-8999/tcp covers port 8022, on which "
    )
    assert re.search(r"on which \S+ \(process \d+\) listens", finding)
    machine.config.write_text(CONFIG.replace('unextended = "unmatched"', 'unextended = "pass"'))
    assert machine.findings() == []


def test_a_range_over_a_wildcard_listener(machine: Machine, listen: Callable[[str, int], None]) -> None:
    machine.config.write_text(CONFIG.replace("10.64.0.2:same", "10.64.0.2:83"))
    listen("0.0.0.0", 8022)
    assert machine.only_finding().startswith("services.web.endpoints[1]: The range 203.0.113.10:8000-8999/tcp covers")
    machine.config.write_text(CONFIG.replace('"10.64.0.2:same"', '{ address = "10.64.0.2:same", wildcard = true }'))
    assert machine.findings() == []


DATAGRAMS = """
[pools.names]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.names]
endpoints = ["203.0.113.10:53/udp", "[2001:db8::10]:53/udp", "203.0.113.10:53/tcp"]
inspect = ["dns"]
routes = [
    { when.dns.qname = "*.a.example", target = ["10.64.0.1:5300", "[fd00:64::1]:5300"] },
    { when.dns.qname = "*.b.example", target = { address = "10.64.0.2:5301", wildcard = true } },
]
[services.voice]
endpoints = ["203.0.113.10:6000-6999/udp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "names", by = "extension", port = 700 }
"""


def test_a_wildcard_socket_of_datagrams_on_a_targets_port(machine: Machine, listen: Callable[..., None]) -> None:
    machine.config.write_text(DATAGRAMS)
    assert machine.findings() == []
    listen("0.0.0.0", 5301, socket.SOCK_DGRAM)  # its target says wildcard = true
    listen("0.0.0.0", 700)  # TCP, and the service has no endpoint of that
    assert machine.findings() == []
    listen("0.0.0.0", 700, socket.SOCK_DGRAM)
    finding = machine.only_finding()
    assert re.match(
        r"services\.voice\.extension_pool: UDP port 700 of the wildcard address \(0\.0\.0\.0\) is taken by \S+"
        r" \(process \d+\), and a target uses this port: its daemon cannot bind the alias meanwhile, and steerd"
        r" refuses what the other socket would answer in its place",
        finding,
    )
    listen("::", 5300, socket.SOCK_DGRAM)
    assert any(
        line.startswith("services.names.routes[0].target: UDP port 5300 of the wildcard address (::) is taken by ")
        for line in machine.findings()
    )


@pytest.mark.parametrize("address", ["203.0.113.10", "0.0.0.0"])
def test_a_socket_of_the_gateways_own_on_an_endpoint_of_datagrams(
    machine: Machine, listen: Callable[..., None], address: str
) -> None:
    machine.config.write_text(DATAGRAMS)
    listen(address, 53)  # a single TCP port was meant
    assert machine.findings() == []
    listen(address, 53, socket.SOCK_DGRAM)
    finding = machine.only_finding()
    assert re.match(
        r"services\.names\.endpoints\[0\]: On 203\.0\.113\.10:53/udp, \S+ \(process \d+\) listens: datagrams to it are"
        r" steered away and never get there; end it, or bind it to another address\.",
        finding,
    )
    listen(address, 6022, socket.SOCK_DGRAM)
    one, other = sorted(machine.findings())
    assert one == finding
    assert re.match(
        r"services\.voice\.endpoints\[0\]: The range 203\.0\.113\.10:6000-6999/udp covers port 6022, on which \S+"
        r" \(process \d+\) listens: datagrams to it are steered away and never get there; leave port 6022 out of the"
        r' range, or set unextended = "pass"\.',
        other,
    )
    machine.config.write_text(DATAGRAMS.replace('unextended = "unmatched"', 'unextended = "pass"'))
    assert machine.only_finding() == finding


def test_steerds_own_table_is_no_finding(machine: Machine) -> None:
    machine.nft(
        "table inet steerd {\nmap targets4 {\ntype mark : ipv4_addr\n}\nchain divert {\n"
        "type filter hook prerouting priority -151\nct state invalid drop\nmeta mark set 0x100\n}\n}"
    )
    assert machine.findings() == []


def test_a_sysctl_that_late_steering_needs(machine: Machine) -> None:
    loose = "net.netfilter.nf_conntrack_tcp_loose"
    machine.host.sh(f"sysctl -qw {loose}=1")
    machine.config.write_text(CONFIG.replace('unextended = "unmatched"\n', ""))
    assert machine.findings() == [], "the daemon will set it"
    machine.nft("table inet steerd {\ncounter diverted { }\n}")
    finding = machine.only_finding()
    assert finding.startswith(
        f"services.web: Is steered by first payloads, but sysctl {loose} is 1, must be 0: else conntrack takes a"
    )
    machine.config.write_text(CONFIG)
    assert machine.findings() == [], "nothing is late"
    machine.config.write_text(CONFIG.replace('unextended = "unmatched"\n', ""))
    machine.host.sh(f"sysctl -qw {loose}=0")
    assert machine.findings() == []


def test_without_the_right_to_look(machine: Machine) -> None:
    status, lines = machine.run("setpriv --bounding-set -net_admin --inh-caps -net_admin")
    assert (status, len(lines)) == (1, 1)
    assert lines[0] == "steerd: check --live must run as root (it needs CAP_NET_ADMIN to see the firewall's rules)."


def test_without_the_tools(machine: Machine, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    assert machine.run(environment=f"PATH={empty}") == (
        1,
        ["steerd: nft is not installed, and the check needs it: install nftables."],
    )
    nft = machine.host.sh("command -v nft").strip()
    (empty / "nft").symlink_to(nft)
    assert machine.run(environment=f"PATH={empty}") == (0, ["ok"])
    machine.host.sh("iptables-nft -t mangle -A PREROUTING -j MARK --set-mark 1")
    status, lines = machine.run(environment=f"PATH={empty}")
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith("steerd: iptables-nft-save is not installed, and the check needs it: install iptables")


def test_steerds_own_table_is_never_listed(machine: Machine, tmp_path: Path) -> None:
    """Its maps may hold 70,000 elements."""
    machine.nft("table inet steerd {\n}\ntable inet fw {\n}")
    bin_, log = tmp_path / "bin", tmp_path / "log"
    bin_.mkdir()
    nft = machine.host.sh("command -v nft").strip()
    (bin_ / "nft").write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {nft} "$@"\n')
    (bin_ / "nft").chmod(0o755)
    assert machine.run(environment=f"PATH={bin_}:$PATH") == (0, ["ok"])
    assert log.read_text().splitlines() == [
        "-j -t list tables", "-j -t list table inet fw", "-a -t list table inet fw",
    ]  # fmt: skip
