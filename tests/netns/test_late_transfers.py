"""Late steering leaves nothing to be done by hand: the kernel translates sequence numbers, timestamps, SACK blocks and
windows of a connection that synproxy opened, over a path that loses and reorders packets, and not a byte is wrong.

    far                          client                              gateway
    192.0.2.1/24     -- veth --  192.0.2.254    198.51.100.1  -- veth --  tests/netns/gateway.py
    2001:db8:2::1/64             2001:db8:2::fe 2001:db8:1::1

`far` is who connects here; `client` forwards for it, and is what loses every n-th packet (nft) and delays every n-th
one (tests/netns/reorder.py), both ways. Segments are as large as on a wire: no GSO, or a whole burst would be lost at
once. A drop in the sender's own namespace would not do: TCP is told of that, and repeats it at once. Where TCP must
wait for a timeout (without SACK and scaling after nearly every loss), it waits 20 ms instead of 200.

With STEERD_LONG=1 in the environment (`make test-long`) it is 1 GB once for each direction and family, instead of 64 MB
for each combination of TCP's options.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.netns import programs
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, SLOWER, Gateway, gateway
from tests.netns.lab import Host, link
from tests.netns.transfer import transfer

LONG = os.environ.get("STEERD_LONG") == "1"
SIZE = 1 << 30 if LONG else 64 << 20
OPTIONS = ("tcp_timestamps", "tcp_sack", "tcp_window_scaling")
SETTINGS = [(1, 1, 1)] if LONG else list(itertools.product((1, 0), repeat=3))
FAR = {4: "192.0.2.1", 6: "2001:db8:2::1"}
CONFIG = f"""
{programs.POOL}
[services.main]
endpoints = ["{ENDPOINT4}:443/tcp", "[{ENDPOINT6}]:443/tcp"]
inspect = ["prefix"]
[[services.main.routes]]
when = {{ prefix = "left " }}
target = {programs.target(1, 8080)}
[[services.main.routes]]
when = {{ prefix = "right " }}
target = {programs.target(2, 8080)}
"""
NUMBER = {"left": 1, "right": 2}
PATH = """
table inet path {{
    counter lost {{ }}
    counter delayed {{ }}
    chain forward {{
        type filter hook forward priority -200
        meta l4proto != tcp accept
        iif far0 numgen inc mod {lose_up} == 0 counter name lost drop
        iif eth0 numgen inc mod {lose_down} == 0 counter name lost drop
        iif far0 numgen inc mod {delay_up} == 0 counter name delayed meta mark set 1
        iif eth0 numgen inc mod {delay_down} == 0 counter name delayed meta mark set 1
    }}
}}
"""
QUEUE = 7


class Path(NamedTuple):
    """A gateway, and a client of it at the end of a bad path."""

    lab: Gateway
    far: Host

    def use_options(self, setting: tuple[int, int, int]) -> None:
        """Which of OPTIONS, 1 or 0, the client offers from now on."""
        pairs = (f"net.ipv4.{option}={on}" for option, on in zip(OPTIONS, setting, strict=True))
        self.far.sh(f"sysctl -qw {' '.join(pairs)}")

    def spoil(self, *, lose: tuple[int, int], delay: tuple[int, int]) -> None:
        """From now on every n-th packet is lost, and of the others every n-th delayed: up, down. Primes, or it would be
        the same packet of every burst."""
        rules = PATH.format(lose_up=lose[0], lose_down=lose[1], delay_up=delay[0], delay_down=delay[1])
        self.lab.client.sh(f"nft -f - <<'RULES'\n{rules}\nRULES")

    def counters(self) -> dict[str, int]:
        """Packets that the path has lost and delayed so far."""
        listing = self.lab.client.sh("nft list counters table inet path")
        return {name: int(packets) for name, packets in re.findall(r"counter (\w+) {\s+packets (\d+)", listing)}

    def transfer(self, version: int, name: str, direction: str, size: int) -> None:
        """One transfer of `size` bytes; checks them, who answered and whom that daemon saw."""
        with self.far.entered():
            connection = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        with connection:
            connection.settimeout(60 * SLOWER)
            connection.connect((ENDPOINT4 if version == 4 else ENDPOINT6, 443))
            result = transfer(connection, name, direction, size)
        assert result[:3] == (name, programs.alias(version, NUMBER[name]), FAR[version])

    def transfer_all(self, transfers: Sequence[tuple[int, str, str, int]]) -> None:
        """All of them at once; raises what one of them raised."""
        with ThreadPoolExecutor(len(transfers)) as pool:
            for done in [pool.submit(self.transfer, *each) for each in transfers]:
                done.result()


@pytest.fixture
def path(new_host: Callable[[str], Host]) -> Iterator[Path]:
    with gateway(new_host) as lab:
        far = new_host("far")
        link(lab.client, "far0", far, "eth0")
        far.sh(
            f"ip addr add {FAR[4]}/24 dev eth0; ip -6 addr add {FAR[6]}/64 dev eth0 nodad;"
            "ip link set eth0 gso_max_segs 1; ip route add default via 192.0.2.254 rto_min 20ms;"
            "ip -6 route add default via 2001:db8:2::fe rto_min 20ms"
        )
        lab.client.sh(
            "ip addr add 192.0.2.254/24 dev far0; ip -6 addr add 2001:db8:2::fe/64 dev far0 nodad;"
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1;"
            + "".join(
                f"{iptables} -t mangle -A FORWARD -m mark --mark 1 -j NFQUEUE --queue-num {QUEUE};"
                for iptables in ("iptables-nft", "ip6tables-nft")
            )
        )
        lab.host.sh(
            "ip route add 192.0.2.0/24 via 198.51.100.1 rto_min 20ms;"
            "ip -6 route add 2001:db8:2::/64 via 2001:db8:1::1 rto_min 20ms;"
            "ip link set eth0 gso_max_segs 1"
        )
        reorder = lab.spawn(lab.client, sys.executable, "-m", "tests.netns.reorder", f"{QUEUE}")
        assert reorder.stdout is not None and reorder.stdout.readline() == "bound\n"
        lab.configure(CONFIG)
        lab.start()
        for name, number in NUMBER.items():
            addresses = (programs.alias(version, number) for version in (4, 6))
            daemon = lab.spawn(lab.host, sys.executable, "-m", "tests.netns.transfer", name, "8080", *addresses)
            assert daemon.stdout is not None and daemon.stdout.readline() == "listening\n"
        yield Path(lab, far)


def every_way(size: int) -> list[tuple[int, str, str, int]]:
    """Up to one daemon and down from the other, both families."""
    return [(version, *way, size) for version in (4, 6) for way in (("left", "up"), ("right", "down"))]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "timestamps{}-sack{}-scaling{}".format(*setting))
def test_many_bytes_both_ways_over_a_path_that_loses_and_reorders(path: Path, setting: tuple[int, int, int]) -> None:
    path.use_options(setting)
    path.spoil(lose=(251, 241), delay=(61, 59))
    path.transfer_all(every_way(SIZE))
    # 4 * 46,000 full segments and their acknowledgements pass, or 16 times as many.
    counters = path.counters()
    assert counters["lost"] > 400
    assert counters["delayed"] > 2000


def test_many_bytes_both_ways_in_segments_as_large_as_the_kernel_makes_them(path: Path) -> None:
    for host in (path.far, path.lab.host):
        host.sh("ip link set eth0 gso_max_segs 65535")
    path.transfer_all(every_way(SIZE))


@pytest.mark.parametrize("setting", [(1, 1, 1), (0, 0, 0)], ids=["all-options", "no-options"])
def test_handshakes_and_first_payloads_over_a_path_that_loses_and_reorders(
    path: Path, setting: tuple[int, int, int]
) -> None:
    """So many short connections that every packet of one is lost and delayed in some of them."""
    path.use_options(setting)
    path.spoil(lose=(11, 13), delay=(7, 5))
    path.transfer_all(every_way(10_000) * 25)
    counters = path.counters()
    assert counters["lost"] > 100
    assert counters["delayed"] > 200
