"""Beside other people's tables: a firewall that would drop steered connections is found and gets the rule that it
lacks; Docker's, kube-proxy's and fail2ban's tables go on working, and so does steerd.

Topology: tests/netns/gateway.py. ufw is Debian's own, with a directory of its own in place of /etc.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steerd.kernel import firewalls
from steerd.kernel import host as kernel
from steerd.model import Extension
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, ROOT, SLOWER, Gateway, gateway
from tests.netns.lab import Host

ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
ALIAS = {4: "10.64.0.1", 6: "fd00:64::1"}
CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/28", "fd00:64::/124"]
[services.early]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
routes = [{ when = { "portext.dst" = 7 }, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] }]
unextended = "unmatched"
[services.late]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
routes = [{ when = { "http.host" = "a.example" }, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] }]
[services.flow]
endpoints = ["203.0.113.10:500/udp", "[2001:db8::10]:500/udp"]
inspect = ["prefix"]
routes = [{ when = { prefix = "a" }, target = ["10.64.0.1:5000", "[fd00:64::1]:5000"] }]
"""
DROPPED = "drops what is steered at the SYN or as a datagram (late steering is not affected)"
# What a careful person writes by hand; and what the same looks like by iptables.
NFT = """
table inet mine {
    chain incoming {
        type filter hook input priority 0; policy drop;
        ct state vmap { established : accept, related : accept, invalid : drop }
        iifname "lo" accept
        meta l4proto icmpv6 accept
        tcp dport { 22, 80, 443 } accept
        udp dport 500 accept
    }
}
"""
IPTABLES = """*filter
:INPUT DROP [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p {icmp} -j ACCEPT
-A INPUT -p tcp -m tcp --dport 443 -j ACCEPT
-A INPUT -p tcp -m tcp --dport 80 -j ACCEPT
-A INPUT -p udp -m udp --dport 500 -j ACCEPT
COMMIT
"""


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(CONFIG)
        yield made


def serve(lab: Gateway) -> None:
    lab.start()
    lab.respond(*((address, 1, 8080) for address in ALIAS.values()))
    lab.respond(*((address, 1, 5000) for address in ALIAS.values()), program="udp_responder")


def early(lab: Gateway, version: int, seconds: float = 15.0) -> str:
    """The address of the daemon that answered."""
    with lab.socket(Extension(7, 0), version=version) as client:
        client.settimeout(seconds * SLOWER)
        client.connect((ENDPOINT[version], 443))
        return client.recv(256).split()[0].decode()


def late(lab: Gateway, version: int, seconds: float = 15.0) -> str:
    with lab.socket(None, version=version) as client:
        client.settimeout(seconds * SLOWER)
        client.connect((ENDPOINT[version], 80))
        client.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        return client.recv(256).split()[0].decode()


def flow(lab: Gateway, version: int) -> str:
    with (
        lab.client.entered(),
        socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(15 * SLOWER)
        client.connect((ENDPOINT[version], 500))
        client.send(b"a")
        return client.recv(256).split()[0].decode()


def everything_works(lab: Gateway) -> None:
    for version, alias in ALIAS.items():
        assert [ask(lab, version) for ask in (early, late, flow)] == [alias] * 3


def install(lab: Gateway, *arguments: str) -> tuple[int, str]:
    command = lab.host.command(
        str(ROOT / "nft" / "install.sh"), "--queues", "2", "--run-dir", str(lab.directory / "run"), *arguments
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.stderr == ""
    return done.returncode, done.stdout


def check_live(lab: Gateway) -> tuple[int, str]:
    command = [sys.executable, "-m", "steerd.cli.main", "check", "--live", str(lab.config)]
    done = subprocess.run(
        lab.host.command(*command), cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


class Ufw:
    """Debian's ufw, with files of its own."""

    def __init__(self, lab: Gateway) -> None:
        self.lab = lab
        self.root = lab.directory / "ufw"
        for name in ("etc/ufw", "etc/default/ufw", "lib/ufw", "usr/share/ufw"):
            place = self.root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if Path("/", name).is_dir():
                shutil.copytree(Path("/", name), place, symlinks=True)
            else:
                shutil.copy(Path("/", name), place)

    def __call__(self, *words: str) -> None:
        self.lab.host.sh(f"ufw --rootdir={self.root} --datadir={self.root} {' '.join(words)}")


def start_firewall(lab: Gateway, kind: str) -> Callable[[str], None]:
    """A firewall that lets in what comes for the endpoints, and drops all else. Returns how rules that --status names
    are added to it."""
    if kind == "nft":
        lab.host.sh(f"nft -f - <<'END'\n{NFT}\nEND")
    elif kind == "iptables":
        for tool, icmp in (("iptables", "icmp"), ("ip6tables", "ipv6-icmp")):
            lab.host.sh(f"{tool}-nft-restore <<'END'\n{IPTABLES.format(icmp=icmp)}END")
    else:
        ufw = Ufw(lab)
        ufw("allow 443/tcp")
        ufw("allow 80/tcp")
        ufw("allow 500/udp")
        ufw("--force enable")

        def add(said: str) -> None:
            for file, rule in re.findall(r"in /etc/ufw/(\S+\.rules), .*:\n +(-A \S+-input .*)", said):
                path = ufw.root / "etc/ufw" / file
                path.write_text(path.read_text().replace("\nCOMMIT\n", f"\n{rule}\nCOMMIT\n"))
            ufw("reload")

        return add

    def run(said: str) -> None:
        for rule in re.findall(r"^    ((?:nft|ip6?tables) .*)$", said, re.MULTILINE):
            lab.host.sh(rule)

    return run


@pytest.mark.parametrize("kind", ["nft", "iptables", "ufw"])
def test_a_firewall_that_drops_steered_connections_is_found_and_gets_its_rule(lab: Gateway, kind: str) -> None:
    serve(lab)
    everything_works(lab)
    assert install(lab, "--status")[0] == 0
    add = start_firewall(lab, kind)
    for version in (4, 6):
        with pytest.raises(TimeoutError):
            early(lab, version, 1.0)
    status, said = install(lab, "--status")
    assert status == 1
    assert DROPPED in said
    for version, alias in ALIAS.items():
        assert late(lab, version) == alias
    status, told = check_live(lab)
    assert status == 2
    assert all(DROPPED in line and "services.early: " in line for line in told.splitlines()), told
    add(said)
    everything_works(lab)
    status, said = install(lab, "--status")
    assert (status, DROPPED in said) == (0, False), said
    assert check_live(lab) == (0, "ok\n")


def test_a_firewall_that_drops_what_comes_from_lo_ends_late_steering_too(lab: Gateway) -> None:
    serve(lab)
    rules = NFT.replace('iifname "lo" accept', "")
    lab.host.sh(f"nft -f - <<'END'\n{rules}\nEND")
    for version in (4, 6):
        with pytest.raises(OSError):
            late(lab, version, 1.0)
    rule = "nft insert rule inet mine incoming ct status dnat accept"
    for status, said in (install(lab, "--status"), check_live(lab)):
        assert status != 0
        assert "drops all that is steered, which it sees as new connections to an alias" in said
        assert rule in said
    lab.host.sh(rule)
    for version, alias in ALIAS.items():
        assert late(lab, version) == alias


@pytest.mark.parametrize(
    ("rules", "drops"),
    [
        ("policy accept; tcp dport 23 drop; ip saddr 192.0.2.1 reject", False),
        ("policy drop; ct status dnat accept", False),
        ("policy drop; ct state new,established ct status dnat counter accept", False),
        ("policy drop; ct state { established, related } accept; ct status != dnat accept", True),
        (
            "policy accept; ct state established accept; iifname lo accept; counter reject with icmpx admin-prohibited",
            True,
        ),
        ("policy accept; ct state new drop", True),
        ("policy accept; ct state invalid drop", False),
        ("policy accept; jump other", True),
        ("policy accept; ct status dnat accept; goto other", False),
        ("policy accept; iifname eth0 jump other", True),
        ("policy accept; ip saddr 192.0.2.1 jump other", False),
        ('policy accept; iifname != "lo" drop', True),
        ('policy drop; iifname "lo" tcp dport 22 drop; iif lo accept', True),
        ("policy drop; jump local", False),
    ],
)
def test_what_status_and_check_live_say_of_a_chain(new_host: Callable[[str], Host], rules: str, drops: bool) -> None:
    host = new_host("gateway")
    host.sh(
        'nft \'table inet mine { chain other { meta l4proto icmp accept; log prefix "no: " drop; };'
        " chain local { fib daddr type local accept; drop; };"
        f" chain incoming {{ type filter hook input priority 0; {rules}; }}; }}'"
    )
    command = host.command(str(ROOT / "nft" / "install.sh"), "--status", "--no-sysctl")
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240).stdout
    assert ("    nft insert rule inet mine incoming ct status dnat accept\n" in said) == drops, said
    with host.entered():
        found = firewalls.drops(kernel.firewall(), "input")
    assert [each.remedy for each in found] == ["`nft insert rule inet mine incoming ct status dnat accept`"] * drops
    assert [each.late for each in found] == ["drops all that is steered" in said] * drops


# ---- tables of others that redirect and mark ----

KUBE_PROXY = """
table ip kube-proxy {
    map service-ips {
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = { 203.0.113.20 . tcp . 8443 : goto service-web }
    }
    chain filter-input { type filter hook input priority -110; ct state new jump firewall-check; }
    chain filter-prerouting { type filter hook prerouting priority -110; ct state new jump firewall-check; }
    chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
    chain nat-output { type nat hook output priority -100; jump services; }
    chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
    chain firewall-check { ip daddr 203.0.113.21 drop; }
    chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
    chain service-web { ip saddr != 10.244.0.0/16 jump mark-for-masquerade; goto endpoint-web; }
    chain endpoint-web { meta l4proto tcp dnat to 10.99.0.1:8443; }
    chain mark-for-masquerade { meta mark set meta mark | 0x00004000; }
    chain masquerading {
        meta mark & 0x00004000 == 0 return
        meta mark set meta mark ^ 0x00004000
        masquerade
    }
}
"""
FAIL2BAN = """
table inet f2b-table {
    set addr-set-sshd { type ipv4_addr; elements = { 198.51.100.9 }; }
    chain f2b-chain {
        type filter hook input priority -1;
        tcp dport { 22 } ip saddr @addr-set-sshd reject with icmp port-unreachable
    }
}
"""
# As dockerd writes it, by iptables-nft; and marks for a routing policy.
DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 10.99.0.2:8081
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
*mangle
-A PREROUTING -p tcp -m tcp --dport 8081 -j MARK --set-xmark 0x1/0xff
COMMIT
"""


def redirected(lab: Gateway, address: str, port: int, source: str = "") -> str:
    with lab.socket(None, source=(source, 0) if source else None) as client:
        client.connect((address, port))
        return client.recv(256).split()[0].decode()


THEIRS = ("ip kube-proxy", "inet f2b-table", "ip nat", "ip filter", "ip mangle")


def theirs(lab: Gateway) -> str:
    """Their tables, without what traffic changes."""
    listed = "".join(lab.host.sh(f"nft list table {table}") for table in THEIRS)
    return " ".join(re.sub(r"packets \d+ bytes \d+", "", listed).split())


def test_beside_docker_kube_proxy_fail2ban_and_whoever_marks_and_redirects_by_iptables(lab: Gateway) -> None:
    lab.host.sh("ip addr add 203.0.113.20/32 dev lo; ip addr add 10.99.0.1/32 dev lo; ip addr add 10.99.0.2/32 dev lo")

    def load() -> None:
        lab.host.sh(f"nft -f - <<'END'\n{KUBE_PROXY}{FAIL2BAN}\nEND")
        lab.host.sh(f"iptables-nft-restore --noflush <<'END'\n{DOCKER}END")

    def all_work() -> None:
        everything_works(lab)
        assert redirected(lab, "203.0.113.20", 8443) == "10.99.0.1"
        assert redirected(lab, ENDPOINT4, 8081) == "10.99.0.2"
        with pytest.raises(ConnectionRefusedError):
            redirected(lab, ENDPOINT4, 22, "198.51.100.9")

    load()
    before = theirs(lab)
    lab.respond(("10.99.0.1", 1, 8443), ("10.99.0.2", 1, 8081), (ENDPOINT4, 1, 22))
    assert install(lab)[0] == install(lab)[0] == 0
    assert theirs(lab) == before
    serve(lab)
    all_work()
    # And the other way round: they begin when steerd runs already.
    lab.host.sh(
        "for table in 'ip kube-proxy' 'inet f2b-table' 'ip nat' 'ip filter'; do nft delete table $table; done;"
        "iptables-nft -t mangle -D PREROUTING -p tcp -m tcp --dport 8081 -j MARK --set-xmark 0x1/0xff"
    )
    load()
    all_work()
    status, said = install(lab, "--status")
    assert (status, "firewall: " in said) == (0, False), said
    assert "chain FORWARD of table ip filter drops what is forwarded" in said
    lab.stop()
    assert install(lab, "--uninstall")[0] == 0
    assert theirs(lab) == before
    assert "steerd" not in lab.host.sh("nft list ruleset").lower()
