"""When the maps of what the kernel steers by itself are full, on a gateway of its own with small ones. All else about
them: test_offload.py.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.netns.gateway import gateway
from tests.netns.lab import Host
from tests.netns.test_offload import ALIAS, Lab


def test_beyond_what_the_maps_hold_workers_are_asked_until_they_are_emptied(
    new_host: Callable[[str], Host], change_rules: Callable[[str, str], None]
) -> None:
    change_rules("size 131072", "size 2")
    with gateway(new_host) as made:
        lab = Lab(made)
        for version in (4, 6):
            lab.learn(5, version)
            lab.learn(6, version)
            assert [lab.asked(7, version) for _ in range(3)] == [6, 6, 6]
            assert lab.held(version) == {5, 6}
        assert lab.by() == (0, 2 * 5)
        lab.api("PUT", "drains", ALIAS[4].format(99))
        for version in (4, 6):
            lab.learn(7, version)
