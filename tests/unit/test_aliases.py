"""The difference between wanted and held aliases: examples, and properties over arbitrary states."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from steerd.core.plan import AddressPlan, Held, plan_addresses, wanted_addresses, wanted_routes
from steerd.core.pools import Pool
from steerd.kernel.rtnetlink import attributes, errno_text

CAPACITY = {4: 3, 6: 5}
NOTHING = Held({}, [], set(), set(), {"lo"})


def a4(number: int) -> bytes:
    return bytes([10, 0, number >> 8, number & 255])


def a6(number: int) -> bytes:
    return bytes(14) + number.to_bytes(2, "big")


def carried_out(plan: AddressPlan, held: Held) -> Held:
    """What a kernel would hold after the plan's steps."""
    fresh = max([*held.devices, 1]) + 1
    devices = {**held.devices, **{fresh + place: name for place, name in enumerate(plan.new_devices)}}
    index = {name: device for device, name in devices.items()}
    removed = {(device, address) for device, addresses in plan.remove for address in addresses}
    # One removal takes one address off, even where a test's state holds it twice on one device.
    ours = [(index[name], address) for name, addresses in plan.add for address in addresses]
    ours += [placed for placed in held.ours if placed not in removed and placed[0] not in plan.drop_devices]
    left = {device: name for device, name in devices.items() if device not in plan.drop_devices}
    gone = set(devices.values()) - set(left.values())
    return Held(left, ours, held.foreign, held.occupied, (held.names | set(plan.new_devices)) - gone)


def test_from_nothing_devices_are_filled_one_after_the_other() -> None:
    plan = plan_addresses([*map(a4, range(7)), a6(1)], NOTHING, CAPACITY)
    assert plan.new_devices == ["steer0", "steer1", "steer2"]
    assert plan.add == [
        ("steer0", [a4(0), a4(1), a4(2)]),
        ("steer1", [a4(3), a4(4), a4(5)]),
        ("steer2", [a4(6)]),
        ("steer0", [a6(1)]),
    ]
    assert (plan.remove, plan.drop_devices, plan.added, plan.removed) == ([], [], 8, 0)


def test_gaps_are_filled_before_new_devices_are_made() -> None:
    held = Held({5: "steer0"}, [(5, a4(1))], set(), set(), {"lo", "steer0"})
    plan = plan_addresses(map(a4, range(5)), held, CAPACITY)
    assert plan.new_devices == ["steer1"]
    assert plan.add == [("steer0", [a4(0), a4(2)]), ("steer1", [a4(3), a4(4)])]


def test_names_in_use_are_passed_over() -> None:
    held = Held({}, [], set(), set(), {"lo", "steer0", "steer2"})
    assert plan_addresses(map(a4, range(4)), held, CAPACITY).new_devices == ["steer1", "steer3"]


def test_foreign_addresses_count_as_present_and_keep_their_device() -> None:
    held = Held({5: "steer0"}, [(5, a4(1))], {a4(0), a4(9)}, {5}, {"lo", "steer0"})
    plan = plan_addresses([a4(0)], held, CAPACITY)
    assert plan == AddressPlan([], [], [(5, [a4(1)])], [], [])


def test_a_second_copy_of_ours_goes() -> None:
    held = Held({5: "steer0", 6: "steer1"}, [(5, a4(0)), (6, a4(0))], set(), set(), {"steer0", "steer1"})
    plan = plan_addresses([a4(0)], held, CAPACITY)
    assert (plan.add, plan.remove, plan.drop_devices, plan.dropped) == ([], [], [6], [(6, a4(0))])


numbers = st.sets(st.integers(0, 40), max_size=20)


@st.composite
def states(draw: st.DrawFn) -> Held:
    """Some steer devices, each with some of our addresses, and foreign addresses on and off them."""
    devices = {10 + number: f"steer{number}" for number in draw(st.sets(st.integers(0, 6), max_size=5))}
    ours = [(device, make(n)) for device in devices for make in (a4, a6) for n in sorted(draw(numbers))[:3]]
    occupied = draw(st.sets(st.sampled_from(sorted(devices)))) if devices else set()
    foreign = {make(n) for make in (a4, a6) for n in draw(numbers)}
    return Held(devices, ours, foreign, occupied, {"lo", *devices.values()})


@given(states(), numbers, numbers)
def test_a_plan_leads_to_what_is_wanted_and_a_second_one_is_empty(held: Held, four: set[int], six: set[int]) -> None:
    want = [*map(a4, sorted(four)), *map(a6, sorted(six))]
    plan = plan_addresses(want, held, CAPACITY)
    after = carried_out(plan, held)
    mine = [address for _, address in after.ours]
    assert set(want) <= set(mine) | held.foreign
    assert set(mine) <= set(want)
    assert len(mine) == len(set(mine))
    assert held.occupied <= set(after.devices)
    used = {device for device, _ in after.ours} | held.occupied
    assert set(after.devices) == used
    assert not {address for _, addresses in plan.add for address in addresses} & held.foreign
    for device in after.devices:
        for width, version in ((4, 4), (16, 6)):
            count = sum(1 for d, address in after.ours if d == device and len(address) == width)
            assert count <= CAPACITY[version]
    assert plan_addresses(want, after, CAPACITY) == AddressPlan([], [], [], [], [])


def test_wanted_addresses_are_the_aliases_of_both_families_in_index_order() -> None:
    pools = [
        Pool("a", (ipaddress.ip_network("10.0.0.0/30"), ipaddress.ip_network("fd00::/127")), size=3),
        Pool("b", (ipaddress.ip_network("10.9.0.0/16"),), "anyip"),
    ]
    assert list(wanted_addresses(pools)) == [
        *(bytes([10, 0, 0, last]) for last in range(3)),
        *(b"\xfd" + bytes(14) + bytes([last]) for last in range(2)),
    ]


def test_wanted_routes_cover_exactly_the_aliases() -> None:
    pool = Pool("b", (ipaddress.ip_network("10.9.0.0/29"), ipaddress.ip_network("fd00::/112")), "anyip", size=6)
    routes = wanted_routes([pool, Pool("a", (ipaddress.ip_network("10.0.0.0/30"),))])
    assert routes == {
        ipaddress.ip_network(text) for text in ("10.9.0.0/30", "10.9.0.4/31", "fd00::/126", "fd00::4/127")
    }


def test_attributes_stop_at_a_length_that_cannot_be() -> None:
    good = b"\x05\x00\x0b\x80S\0\0\0"
    assert list(attributes(good + b"\x03\x00\x01\x00", 0, 12)) == [(11, b"S")]


def test_errno_text_names_the_symbol() -> None:
    assert errno_text(28) == "No space left on device (ENOSPC)"
