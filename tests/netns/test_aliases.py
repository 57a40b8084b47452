"""Aliases in a namespace of their own: one host, no neighbour.

[ aliases ]  lo, steer0 .. steerN (made by what is tested), sometimes a device of "somebody else"
"""

from __future__ import annotations

import ipaddress
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from steerd.core.pools import Mode, Pool
from steerd.errors import KernelError
from steerd.kernel.aliases import KINDS, Changes, Watcher, missing, reconcile, remove_all
from tests.netns.lab import Host

FOUR = ipaddress.ip_network("10.77.0.0/16")
SIX = ipaddress.ip_network("fd77::/112")


def pool(size: int | None, mode: Mode = "addresses", *prefixes: str) -> Pool:
    networks = tuple(ipaddress.ip_network(prefix) for prefix in prefixes) or (FOUR, SIX)
    return Pool("test", networks, mode, size)


def counts(changes: Changes) -> tuple[int, int, int, int]:
    return changes[:4]


@pytest.fixture
def host(new_host: Callable[[str], Host]) -> Iterator[Host]:
    """The namespace, entered; everything of ours is taken out again before it is deleted (see the costs of IPv6)."""
    made = new_host("aliases")
    with made.entered():
        yield made
        remove_all()


def answers(address: str) -> bool:
    """Whether a daemon can bind the alias, and a client reaches it from there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 8080))
        listener.listen()
        with socket.create_connection((address, 8080), 5, source_address=(address, 0)) as client:
            accepted, peer = listener.accept()
            accepted.close()
            return bool(peer[0] == address and client.getpeername()[0] == address)


def leftovers(host: Host) -> str:
    """What of ours is there: devices, routes, addresses."""
    return host.sh(
        "ip -br link show group 21332; ip -br link show group 21333;"
        "ip route show table local proto 83; ip -6 route show table local proto 83;"
        "ip -o addr show | grep -E '10\\.77\\.|fd77:' || true"
    )


def test_two_thousand_in_both_families(host: Host) -> None:
    pools = [pool(2000)]
    assert missing(pools) == 4000
    assert counts(reconcile(pools)) == (4000, 0, 0, 0)
    assert missing(pools) == 0
    for address in ("10.77.0.0", "10.77.3.255", "10.77.7.207", "fd77::", "fd77::3ff", "fd77::7cf"):
        assert answers(address)
    with socket.socket() as beyond, pytest.raises(OSError, match="assign requested"):
        beyond.bind(("10.77.7.208", 8080))
    # Host addresses without a prefix route, and no link-local address that nobody asked for.
    assert "10.77.0.0/32" in host.sh("ip -o -4 addr show steer0")
    assert "fe80" not in host.sh("ip -6 addr show")
    assert host.sh("ip -6 route show table main; ip route show table main") == ""

    assert not reconcile(pools)
    assert counts(remove_all()) == (0, 4000, 0, 0)
    assert leftovers(host) == ""
    assert not remove_all()


def test_growing_and_shrinking(host: Host) -> None:
    assert counts(reconcile([pool(600)])) == (1200, 0, 0, 0)
    assert counts(reconcile([pool(1000)])) == (800, 0, 0, 0)
    assert host.sh("ip -br link show group 21332").count("steer") == 4
    assert counts(reconcile([pool(300)])) == (0, 1400, 0, 0)
    assert host.sh("ip -br link show group 21332").count("steer") == 2
    assert answers("10.77.1.43")
    assert answers("fd77::12b")
    assert not reconcile([pool(300)])
    moved = [pool(300, "addresses", "10.78.0.0/16")]
    assert counts(reconcile(moved)) == (300, 600, 0, 0)
    assert answers("10.78.1.43")
    assert not reconcile(moved)


def test_what_somebody_removed_comes_back(host: Host) -> None:
    pools = [pool(1000)]
    reconcile(pools)
    host.sh("ip addr del 10.77.0.5/32 dev steer0; ip addr del fd77::5/128 dev steer0; ip link del steer2")
    assert missing(pools) == 2 + 256
    assert counts(reconcile(pools)) == (258, 0, 0, 0)
    # The kernel takes IPv6 addresses off a device that is switched down.
    host.sh("ip link set steer0 down")
    assert counts(reconcile(pools)) == (1000, 0, 0, 0)
    assert answers("10.77.0.5")
    assert answers("fd77::5")
    assert not reconcile(pools)


def test_what_is_foreign_stays(host: Host) -> None:
    """Somebody's addresses: on a device of ours, on his own, and one that is an alias too."""
    pools = [pool(512)]
    reconcile(pools)
    host.sh("ip link add mine type bridge; ip link set mine up; ip addr add 192.0.2.9/24 dev mine;"
            "ip addr add 192.0.2.10/32 dev steer1; ip -6 addr add 2001:db8::9/64 dev steer0 nodad;"
            "ip link add steer7 type bridge; ip addr add 192.0.2.11/32 dev steer7;"
            "ip route add local 198.51.100.0/24 dev lo")  # fmt: skip
    assert not reconcile(pools)
    assert counts(remove_all()) == (0, 1024, 0, 0)
    left = host.sh("ip -o addr show; ip -br link; ip route show table local")
    for foreign in ("192.0.2.9/24", "192.0.2.10/32", "2001:db8::9/64", "192.0.2.11/32", "198.51.100.0/24"):
        assert foreign in left
    assert "10.77." not in left
    assert "fd77:" not in left
    assert counts(reconcile(pools)) == (1024, 0, 0, 0)
    assert host.sh("ip -br link show group 21332").count("steer") == 2


def test_an_alias_that_somebody_else_holds_is_not_added_twice(host: Host) -> None:
    host.sh("ip link add mine type bridge; ip link set mine up; ip addr add 10.77.0.1/24 dev mine;"
            "ip addr add fd77::1/64 dev mine nodad")  # fmt: skip
    pools = [pool(4)]
    assert counts(reconcile(pools)) == (6, 0, 0, 0)
    assert not reconcile(pools)
    host.sh("ip link del mine")
    assert counts(reconcile(pools)) == (2, 0, 0, 0)
    assert answers("10.77.0.1")
    assert answers("fd77::1")


def test_anyip_and_switching_modes(host: Host) -> None:
    """300 aliases are 256 + 32 + 8 + 4: four prefixes in each family."""
    any_pools, address_pools = [pool(300, "anyip")], [pool(300)]
    assert missing(any_pools) == 8
    assert counts(reconcile(any_pools)) == (0, 0, 8, 0)
    assert "local 10.77.1.0/27 dev lo scope host" in host.sh("ip route show table local proto 83")
    assert not reconcile(any_pools)
    host.sh("sysctl -qw net.ipv6.ip_nonlocal_bind=1")
    assert answers("10.77.1.43")
    assert answers("fd77::12b")

    assert counts(reconcile(address_pools)) == (600, 0, 0, 8)
    assert leftovers(host).count("10.77.") == 300
    assert answers("10.77.1.43")
    assert counts(reconcile(any_pools)) == (0, 600, 8, 0)
    assert answers("10.77.1.43")
    host.sh("ip route del local 10.77.1.0/27 dev lo table local")
    assert counts(reconcile(any_pools)) == (0, 0, 1, 0)
    assert counts(remove_all()) == (0, 0, 0, 8)
    assert leftovers(host) == ""


@pytest.mark.usefixtures("host")
def test_a_single_address_changes_its_mode_in_place() -> None:
    """The kernel's own route to the address equals the one that is wanted: ours must be there when that one goes."""
    prefixes = ("10.77.0.9/32", "fd77::9/128")
    reconcile([pool(None, "addresses", *prefixes)])
    assert counts(reconcile([pool(None, "anyip", *prefixes)])) == (0, 2, 2, 0)
    assert answers("10.77.0.9")
    assert not reconcile([pool(None, "anyip", *prefixes)])
    assert counts(reconcile([pool(None, "addresses", *prefixes)])) == (2, 0, 0, 2)
    assert answers("10.77.0.9")
    assert answers("fd77::9")


def test_every_kind_of_device_that_the_kernel_has_will_do(host: Host) -> None:
    pools = [pool(300)]
    tried = 0
    for kind in KINDS:
        if kind in host.sh(
            f"ip link add probe type {kind} && ip -o -d link show probe; ip link del probe", check=False
        ):
            assert counts(reconcile(pools, kinds=["no-such-kind", kind])) == (600, 0, 0, 0)
            assert host.sh(f"ip -br link show type {kind} group 21332").count("steer") == 2
            assert answers("10.77.1.43")
            assert answers("fd77::12b")
            assert counts(remove_all()) == (0, 600, 0, 0)
            tried += 1
    assert tried >= 1
    with pytest.raises(KernelError, match="none of the kinds of device that can carry aliases: no-such-kind"):
        reconcile(pools, kinds=["no-such-kind"])
    assert leftovers(host) == ""


def test_a_device_that_vanishes_in_the_middle(host: Host) -> None:
    pools = [pool(2000, "addresses", "10.77.0.0/16")]

    def pull_the_rug(done: int, _: int) -> None:
        if done == 1024:
            host.sh("ip link del steer5")

    with pytest.raises(KernelError, match=r"refused to add the alias 10\.77\.5\.\d+ to steer5: .*ENODEV"):
        reconcile(pools, pull_the_rug)
    assert missing(pools) == 2000 - 5 * 256
    assert counts(reconcile(pools)) == (2000 - 5 * 256, 0, 0, 0)
    assert not reconcile(pools)


def test_a_refusal_names_the_address_and_the_errno(host: Host) -> None:
    host.sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1")
    with pytest.raises(KernelError, match=r"refused to add the alias fd77:: to steer0: Permission denied \(EACCES\)"):
        reconcile([pool(10)])
    host.sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=0 net.ipv6.conf.steer0.disable_ipv6=0")
    assert counts(reconcile([pool(10)])) == (10, 0, 0, 0)
    assert answers("fd77::9")


def test_an_interrupted_removal_is_taken_back(host: Host) -> None:
    """Devices were already marked as leaving when the process died: they are in use again, and survive the next one."""
    pools = [pool(512, "addresses", "10.77.0.0/16")]
    reconcile(pools)
    host.sh("ip link set steer0 group 21333")
    assert not reconcile(pools)
    reconcile([pool(256, "addresses", "10.77.0.0/16")])
    assert answers("10.77.0.9")


def test_somebody_elses_device_in_the_leaving_group_is_spared(host: Host) -> None:
    host.sh("ip link add mine group 21333 type bridge")
    reconcile([pool(300)])
    assert counts(remove_all()) == (0, 600, 0, 0)
    assert "mine" in host.sh("ip -br link")
    assert "steer" not in host.sh("ip -br link")


def test_others_change_addresses_meanwhile(host: Host) -> None:
    host.sh("ip link add mine type bridge; ip link set mine up")
    loop = (
        "while :; do ip addr add 192.0.2.1/24 dev mine; ip addr add 10.77.9.9/32 dev mine; ip addr flush dev mine; done"
    )
    with subprocess.Popen(host.command("bash", "-c", loop), stderr=subprocess.DEVNULL) as other:
        try:
            for size in (5000, 1000, 4000, 0, 3000):
                reconcile([pool(size, "addresses", "10.77.0.0/16")])
        finally:
            other.kill()
    host.sh("ip link del mine")
    assert counts(reconcile([pool(3000, "addresses", "10.77.0.0/16")])) in {(0, 0, 0, 0), (1, 0, 0, 0)}
    assert missing([pool(3000, "addresses", "10.77.0.0/16")]) == 0


@pytest.mark.usefixtures("host")
def test_progress_begins_at_nothing_and_ends_at_everything() -> None:
    for pools, total in (([pool(1500)], 3000), ([pool(700)], 1600), ([], 1400)):
        seen: list[tuple[int, int]] = []
        reconcile(pools, lambda done, total, seen=seen: seen.append((done, total)))  # type: ignore[misc]
        assert seen[0] == (0, total)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)


def test_the_watcher_fires_for_removals_of_ours_only(host: Host) -> None:
    pools = [pool(300), pool(16, "anyip", "10.78.0.0/24")]
    with closing(Watcher()) as watcher:

        def fired() -> bool:
            readable = bool(select.select([watcher], [], [], 0.2)[0])
            assert watcher.read() == readable
            return readable

        reconcile(pools)
        assert not fired()
        host.sh("ip link add mine type bridge; ip link set mine up; ip addr add 192.0.2.9/24 dev mine;"
                "ip addr add 192.0.2.10/32 dev steer1; ip addr del 192.0.2.10/32 dev steer1;"
                "ip route add local 198.51.100.0/24 dev lo; ip route del local 198.51.100.0/24 dev lo table local;"
                "ip link del mine")  # fmt: skip
        assert not fired()
        for harm in (
            "ip addr del 10.77.0.7/32 dev steer0",
            "ip addr del fd77::7/128 dev steer0",
            "ip route del local 10.78.0.0/28 dev lo table local",
            "ip link del steer1",
            "ip link set steer0 down",
        ):
            host.sh(harm)
            assert fired(), harm
            assert reconcile(pools)
            assert not fired()
        remove_all()
        assert watcher.read()


@pytest.mark.usefixtures("host")
def test_lost_notifications_count_as_a_removal() -> None:
    pools = [pool(4096, "addresses", "10.77.0.0/16")]
    reconcile(pools)
    with closing(Watcher()) as watcher:
        remove_all()
        assert watcher.read()
        assert not watcher.read()


def test_all_of_ipv4s_sixty_five_thousand(host: Host) -> None:
    pools = [pool(None, "addresses", "10.77.0.0/16")]
    seen: list[int] = []
    assert counts(reconcile(pools, lambda done, _: seen.append(done))) == (65536, 0, 0, 0)
    assert len(seen) > 100
    assert not reconcile(pools)
    for address in ("10.77.0.0", "10.77.128.1", "10.77.255.255"):
        assert answers(address)
    assert counts(remove_all()) == (0, 65536, 0, 0)
    assert leftovers(host) == ""


def test_sixty_five_thousand_of_ipv6_by_route(host: Host) -> None:
    pools = [pool(None, "anyip", "fd77::/112")]
    assert counts(reconcile(pools)) == (0, 0, 1, 0)
    host.sh("sysctl -qw net.ipv6.ip_nonlocal_bind=1")
    assert answers("fd77::")
    assert answers("fd77::ffff")
    assert counts(remove_all()) == (0, 0, 0, 1)


def test_eight_thousand_of_ipv6_as_addresses(host: Host) -> None:
    """As many as stay quick in spite of the kernel's quadratic cost; two devices' worth."""
    pools = [pool(8192, "addresses", "fd77::/112")]
    assert counts(reconcile(pools)) == (8192, 0, 0, 0)
    assert host.sh("ip -br link show group 21332").count("steer") == 2
    assert answers("fd77::1fff")
    assert counts(remove_all()) == (0, 8192, 0, 0)
    assert leftovers(host) == ""
