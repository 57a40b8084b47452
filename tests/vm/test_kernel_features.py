"""A stock kernel has what steerd builds on: native `queue` in nftables, NFQUEUE through Python, dummy devices.

client 192.0.2.1 ---- veth ---- 192.0.2.2 gateway (the queue, and the socket that is written to)
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable

from netfilterqueue import NetfilterQueue, Packet

from tests.netns.lab import Host, link

QUEUE = 7
PORT = 4000
MARK = 0x53
PATIENCE = 120.0  # seconds; an emulated machine on a busy host stalls for longer than one thinks

QUEUE_THEN_DEMAND_MARK = f"""
table inet features {{
    chain divert {{
        type filter hook prerouting priority -151
        udp dport {PORT} queue num {QUEUE}
    }}
    chain after {{
        type filter hook prerouting priority -100
        udp dport {PORT} meta mark != {MARK} drop
    }}
}}
"""


def nft(host: Host, ruleset: str) -> None:
    host.sh(f"nft -f - <<'RULES'\n{ruleset}\nRULES")


def test_the_kernel_is_the_one_asked_for() -> None:
    assert os.uname().release == os.environ["STEERD_VM_KERNEL"]


def test_dummy_devices_carry_addresses(new_host: Callable[[str], Host]) -> None:
    gateway = new_host("gateway")
    gateway.sh("ip link add steer0 type dummy && ip addr add 192.0.2.9/32 dev steer0 && ip link set steer0 up")
    with gateway.entered(), socket.socket() as listener:
        listener.bind(("192.0.2.9", PORT))


def test_nft_spreads_over_queues_by_a_hash(new_host: Callable[[str], Host]) -> None:
    gateway = new_host("gateway")
    spread = "queue to jhash ip saddr . tcp sport mod 4 offset 10"
    nft(gateway, f"table inet features {{ chain divert {{ type filter hook prerouting priority -151; {spread}; }}; }}")
    assert "jhash ip saddr . tcp sport mod 4 offset 10" in gateway.sh("nft list table inet features")


def test_a_verdict_with_a_mark_reaches_the_rules_after_the_queue(new_host: Callable[[str], Host]) -> None:
    client, gateway = new_host("client"), new_host("gateway")
    link(client, "eth0", gateway, "eth0")
    client.sh("ip addr add 192.0.2.1/24 dev eth0")
    gateway.sh("ip addr add 192.0.2.2/24 dev eth0")
    nft(gateway, QUEUE_THEN_DEMAND_MARK)
    seen: list[bytes] = []

    def mark_and_accept(packet: Packet) -> None:
        seen.append(packet.get_payload()[28:])  # behind the IPv4 and the UDP header
        if seen[-1] == b"marked":
            packet.set_mark(MARK)
        packet.accept()

    with gateway.entered():
        queue = NetfilterQueue()  # opens its netlink socket at once, so it has to be made in here
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("192.0.2.2", PORT))
        queue.bind(QUEUE, mark_and_accept)
    with client.entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.settimeout(PATIENCE)
        try:
            for payload in (b"unmarked", b"marked"):
                sender.sendto(payload, ("192.0.2.2", PORT))
            while len(seen) < 2:
                assert select.select([queue.get_fd()], [], [], PATIENCE)[0], f"no packet in the queue after {seen}"
                queue.run(block=False)
            assert receiver.recv(100) == b"marked"
        finally:
            queue.unbind()
    assert seen == [b"unmarked", b"marked"]
