"""Who of several targets listens: what the kernel says of sockets becomes the bits DEAD of states (control.states).

Looked at are the members of the groups that are in use and that lie in a pool; what is elsewhere counts as alive, and
so does what a connection would wake (steerd.main.waker). A target is dead while no socket on this host takes
connections (or datagrams, for services of UDP) on its address and port. A socket that is bound to the wildcard address
counts only where the target says `wildcard = true`: elsewhere the table resets what it would answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from steerd.config import Config
from steerd.control.sessions import Places
from steerd.control.states import States
from steerd.core.choice import Group
from steerd.kernel.listeners import Listener, which_listen
from steerd.model import DEAD, Target

LOOK_SECONDS = 0.3
"""A dead target gets no new connection within a second."""
# Of the time, looking takes no more than this; tens of thousands of members are looked at less often.
_SHARE = 0.2

Ask = Callable[[int, Sequence[Listener]], list[bool]]


class Changes(NamedTuple):
    """What another look has found."""

    dead: list[Target]
    """Nothing listens there any more."""
    alive: list[Target]
    """Something listens there again."""


class Liveness:
    """What was seen of all members that are looked at. For one thread at a time."""

    def __init__(self, states: States, ask: Ask = which_listen) -> None:
        self._states = states
        self._ask = ask
        self._dead: dict[int, set[int]] = {protocol: set() for protocol in DEAD}
        self._places: tuple[Config, Places] | None = None
        self.pause = LOOK_SECONDS
        """Seconds until the next look."""

    def look(self, groups: Iterable[Group], config: Config) -> Changes:
        """Look once, and note it. Raises KernelError."""
        began = time.monotonic()
        if self._places is None or self._places[0] is not config:
            self._places = config, Places(config)
        in_pool = self._places[1].in_pool
        members = {
            member.id: member.target
            for group in groups
            for member in group.members
            if in_pool(member.target.address) and config.wake_of(member.target.address) is None
        }
        protocols = {endpoint.protocol for service in config.services for endpoint in service.endpoints}
        wildcard = set(config.wildcard)
        changes = Changes([], [])
        for protocol, before in self._dead.items():
            asked = members if protocol in protocols else {}
            listeners = [Listener(to.address.packed, to.port, to in wildcard) for to in asked.values()]
            answers = self._ask(protocol, listeners) if listeners else []
            dead = {target_id for target_id, listens in zip(asked, answers, strict=True) if not listens}
            for target_id in before - dead:
                self._states.put(target_id, DEAD[protocol], False)
            for target_id in dead - before:
                self._states.put(target_id, DEAD[protocol], True)
            self._dead[protocol] = dead
            changes.dead.extend(members[target_id] for target_id in sorted(dead - before))
            changes.alive.extend(members[target_id] for target_id in sorted((before - dead) & members.keys()))
        self.pause = max(LOOK_SECONDS, (time.monotonic() - began) / _SHARE)
        return changes
