"""Daemons that are started when a connection comes: who may be woken now, and who waits for it. Pure: asks, news and
`now` (seconds that never go back) go in, actions come out; main.waker carries them out.

**Words.** A *daemon* is what one unit or command line runs; its name is its `Starter`. It has an alias, one address or
one of each family, and a *door* is a target on it: target id, protocol, port. Two targets whose starters are equal are
doors of one daemon, which is started once.

**A daemon's life** (Phase). Somebody asks for a door: STARTING. One of its doors listens: AWAKE. No door listens
within `timeout`, or it ends before: FAILED, and for as long again nobody starts it anew (clients that wait repeat their
SYN after at most as long as they have waited so far). Nobody had a connection to it for `sleep_after`: DROWSY, its
doors are shut, so that a connection that comes now waits; if none was on its way (`DROWSY_SECONDS`), it is STOPPING
until its end is told. A daemon that ends by itself is asleep again.

**Doors** are what workers see. OPEN: it listens, so connections go there. WAITING: it is being started, hold the
connection. REFUSED: it did not come, answer `unmatched`. A door that is not there is shut: hold the connection and ask.

**What a scanner can wake** is bounded by `Limits`. Past them the table is *full*, and a door that was asked for and is
not there is refused.

**No wrong daemon.** An alias has one daemon at a time. If an alias has got another starter (another lease), the former
daemon is stopped, and only when it is gone the new one is started. What was not started here, and listens all the same,
is none of ours to deliver to; only where nothing can be started (no lease) the alias is treated like any other.
"""

from __future__ import annotations

import enum
import re
import shlex
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Generic, NamedTuple, TypeVar

from steerd.model import Flow
from steerd.wire.packet import Packet

MAX_DOORS = 16
"""Of one daemon. A target `same` has as many as ports are asked for; beyond that the oldest shut one goes."""
MAX_STRAYS = 4096
"""Doors of aliases for which nothing can be started."""
STRAY_SECONDS = 3.0
"""How long a door for which nothing can be started stays REFUSED: a client's second SYN comes after one second."""
DROWSY_SECONDS = 0.5
"""From shutting the doors of an idle daemon until it is stopped. A connection that was decided before has long made its
conntrack entry by then."""
MAX_TIMEOUT = 60.0
"""Seconds. The kernel takes a SYN cookie for right for between one and two minutes (net/ipv4/syncookies.c)."""

_REPEATED_SECONDS = 1.0
"""RFC 6298 section 2: a SYN is repeated after one second, then after twice as long each time."""
_MAX_UNIT = 255
"""Characters of a unit's name (UNIT_NAME_MAX in systemd's unit-name.h)."""
_PLACEHOLDER = re.compile(r"\{([a-z]*)\}")
PLACEHOLDERS = ("lease", "alias", "index")


class Limits(NamedTuple):
    """What the machine can run."""

    max_awake: int = 200
    """Daemons that were started and have not ended."""
    starts_per_second: float = 10.0
    burst: int = 20
    """So many may be started at once."""


class Starter(NamedTuple):
    """What is started: a unit, or a command as a user."""

    unit: str = ""
    command: tuple[str, ...] = ()
    user: str = ""

    def __str__(self) -> str:
        return self.unit or shlex.join(self.command)


class Wake(NamedTuple):
    """What the configuration says about waking the daemon of an alias. `unit` and `command` may hold {lease}, {alias}
    and {index}."""

    unit: str
    command: tuple[str, ...]
    user: str
    timeout: float
    """Seconds within which it must listen."""
    sleep_after: float | None
    """Seconds without a connection; None: it is never stopped."""

    @property
    def needs_lease(self) -> bool:
        """Whether there is nothing to start on an alias without a lease."""
        return any("{lease}" in text for text in (self.unit, *self.command))

    def starter(self, lease: str | None, alias: str, index: int) -> Starter | None:
        """What is started for one alias; None if that takes a lease and it has none. Raises ValueError if the unit's
        name becomes too long."""
        if lease is None and self.needs_lease:
            return None
        values = {"lease": lease or "", "alias": alias, "index": str(index)}
        if not self.unit:
            return Starter("", tuple(_filled(word, values) for word in self.command), self.user)
        unit = _filled(self.unit, {name: escaped(value) for name, value in values.items()})
        if len(unit) > _MAX_UNIT:
            raise ValueError(f"{unit} is longer than a unit's name may be, {_MAX_UNIT} characters.")
        return Starter(unit)

    def unit_pattern(self) -> str:
        """A regular expression for all names that `unit` can become: plain enough for Python and JavaScript."""
        literal = [re.sub(r"[.\\]", r"\\\g<0>", text) for text in _PLACEHOLDER.sub("\0", self.unit).split("\0")]
        return "^" + r"[A-Za-z0-9:_.\\]+".join(literal) + "$"


def _filled(text: str, values: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


def check_template(text: str) -> None:
    """Raises ValueError, with a sentence, if a text has braces that are no placeholder."""
    for name in _PLACEHOLDER.findall(text):
        if name not in PLACEHOLDERS:
            raise ValueError(f"{{{name}}} is not a placeholder; known here: {{lease}}, {{alias}}, {{index}}.")
    if "{" in _PLACEHOLDER.sub("", text) or "}" in _PLACEHOLDER.sub("", text):
        raise ValueError("Has a brace that belongs to no placeholder; known here: {lease}, {alias}, {index}.")


def escaped(text: str) -> str:
    """A text as a part of a unit's name: systemd-escape(1), unit_name_escape in systemd's unit-name.c. Only letters,
    digits, `:`, `_` and `.` stay; `/` becomes `-`, all else \\xXX. No two texts become the same."""
    encoded = text.encode()
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:_."
    parts = []
    for place, byte in enumerate(encoded):
        if byte == ord("/"):
            parts.append("-")
        elif byte not in plain or (byte == ord(".") and not place):
            parts.append(f"\\x{byte:02x}")
        else:
            parts.append(chr(byte))
    return "".join(parts)


class Door(NamedTuple):
    """A target of an alias. The port is a real one, where the target says `same`, too."""

    target_id: int
    protocol: int
    port: int


class DoorState(enum.IntEnum):
    """What workers are told of a door."""

    OPEN = 1
    WAITING = 2
    REFUSED = 3


class Phase(enum.Enum):
    """Where a daemon is in its life."""

    STARTING = "starting"
    AWAKE = "awake"
    DROWSY = "drowsy"
    STOPPING = "stopping"
    FAILED = "failed"


class Start(NamedTuple):
    """Start it, unless it runs already; then tell `started` or `ended`."""

    starter: Starter


class Stop(NamedTuple):
    """Stop it, and tell `ended` when it is gone."""

    starter: Starter


Action = Start | Stop


class Look(NamedTuple):
    """A door of which it is of interest whether it listens. `starter` None: nothing can be started there."""

    starter: Starter | None
    door: Door
    address: bytes


class DoorView:
    """A door as it is seen from here."""

    __slots__ = ("address", "state", "until")

    def __init__(self, address: bytes, state: DoorState, until: float) -> None:
        self.address = address
        self.state = state
        self.until = until


class Daemon:
    """One daemon that is not asleep."""

    __slots__ = (
        "addresses",
        "began",
        "busy_at",
        "deadline",
        "doors",
        "is_running",
        "phase",
        "sleep_after",
        "starter",
        "timeout",
    )

    def __init__(self, starter: Starter, timeout: float, sleep_after: float | None) -> None:
        self.starter = starter
        self.timeout = timeout
        self.sleep_after = sleep_after
        self.phase = Phase.STARTING
        self.began = 0.0
        self.deadline = 0.0
        self.busy_at = 0.0
        self.is_running = True
        """It was to be started, and its end was not told."""
        self.doors: dict[Door, DoorView] = {}
        self.addresses: set[bytes] = set()
        """Of all doors that it ever had, packed."""

    def put(self, door: Door, address: bytes, state: DoorState, until: float) -> None:
        """Give it a door."""
        self.doors[door] = DoorView(address, state, until)
        self.addresses.add(address)


class Policy:
    """All daemons that are not asleep. Each method but the views returns what is to be done now."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._daemons: dict[Starter, Daemon] = {}
        self._strays: OrderedDict[Door, DoorView] = OrderedDict()
        self._tokens = float(limits.burst)
        self._counted = 0.0

    # ---- views ----

    @property
    def daemons(self) -> dict[Starter, Daemon]:
        """All that are not asleep."""
        return self._daemons

    @property
    def awake(self) -> int:
        """How many were started and have not ended."""
        return sum(daemon.is_running for daemon in self._daemons.values())

    def is_full(self, now: float) -> bool:
        """Whether nobody else can be started now."""
        self._count(now)
        return self._tokens < 1.0 or self.awake >= self.limits.max_awake

    def doors(self) -> dict[Door, DoorState]:
        """What workers are to see."""
        seen = {
            door: each.state
            for daemon in self._daemons.values()
            if daemon.phase in (Phase.STARTING, Phase.AWAKE, Phase.FAILED)
            for door, each in daemon.doors.items()
        }
        seen.update((door, each.state) for door, each in self._strays.items())
        return seen

    def to_look_at(self, *, waiting: bool) -> list[Look]:
        """The doors that are waited for, or those that are open."""
        wanted = DoorState.WAITING if waiting else DoorState.OPEN
        found = [
            Look(daemon.starter, door, each.address)
            for daemon in self._daemons.values()
            if daemon.phase in (Phase.STARTING, Phase.AWAKE)
            for door, each in daemon.doors.items()
            if each.state is wanted
        ]
        found += [Look(None, door, each.address) for door, each in self._strays.items() if each.state is wanted]
        return found

    def perhaps_idle(self, now: float) -> list[Starter]:
        """Daemons that may be put to sleep unless somebody has a connection to them: say `is_busy` or `is_idle`."""
        return [
            daemon.starter
            for daemon in self._daemons.values()
            if daemon.sleep_after is not None
            and (
                (daemon.phase is Phase.AWAKE and now - daemon.busy_at >= daemon.sleep_after)
                or (daemon.phase is Phase.DROWSY and now >= daemon.deadline)
            )
        ]

    # ---- what is asked, and what has happened ----

    def ask(
        self, door: Door, address: bytes, starter: Starter, timeout: float, sleep_after: float | None, now: float
    ) -> list[Action]:
        """Somebody wants to go to a door of this daemon. Beyond the limits nothing happens: `is_full` says so."""
        daemon = self._daemons.get(starter)
        if daemon is None:
            former = self.stop_at((address,))
            if any(address in other.addresses for other in self._daemons.values()):
                return former
            if self.is_full(now):
                return []
            self._tokens -= 1.0
            daemon = self._daemons[starter] = Daemon(starter, timeout, sleep_after)
            daemon.began, daemon.deadline = now, now + timeout
            daemon.put(door, address, DoorState.WAITING, now + timeout)
            return [Start(starter)]
        if daemon.phase is Phase.DROWSY:
            # It was shut a moment ago, and it still listens.
            daemon.phase, daemon.busy_at = Phase.AWAKE, now
        if daemon.phase is Phase.STOPPING or door in daemon.doors:
            return []
        if len(daemon.doors) >= MAX_DOORS:
            shut = next((old for old, each in daemon.doors.items() if each.state is not DoorState.OPEN), None)
            if shut is None:
                return []
            del daemon.doors[shut]
        if daemon.phase is Phase.FAILED:
            daemon.put(door, address, DoorState.REFUSED, daemon.deadline)
        else:
            daemon.put(door, address, DoorState.WAITING, now + daemon.timeout)
        return []

    def ask_stray(self, door: Door, address: bytes, listens: bool, now: float) -> None:
        """Somebody wants to go to a door for which nothing can be started."""
        state = DoorState.OPEN if listens else DoorState.REFUSED
        self._strays.pop(door, None)
        if len(self._strays) >= MAX_STRAYS:
            self._strays.popitem(last=False)
        self._strays[door] = DoorView(address, state, now + STRAY_SECONDS)

    def restore(
        self, starter: Starter, timeout: float, sleep_after: float | None, doors: dict[Door, bytes], now: float
    ) -> None:
        """A daemon runs, since before this process began; whether it listens is to be seen."""
        daemon = self._daemons[starter] = Daemon(starter, timeout, sleep_after)
        daemon.began, daemon.deadline = now - timeout, now + timeout
        for door, address in doors.items():
            daemon.put(door, address, DoorState.WAITING, now + timeout)

    def seen(self, look: Look, is_listening: bool, now: float) -> None:
        """Whether a door listens that was to be looked at."""
        starter, door, _ = look
        if starter is None:
            if not is_listening:
                self._strays.pop(door, None)
            return
        daemon = self._daemons.get(starter)
        found = None if daemon is None else daemon.doors.get(door)
        if daemon is None or found is None or daemon.phase not in (Phase.STARTING, Phase.AWAKE):
            return
        if is_listening and found.state is not DoorState.OPEN:
            found.state = DoorState.OPEN
            if daemon.phase is Phase.STARTING:
                # Who has waited with it may wait as long again, until the SYN is repeated.
                daemon.phase, daemon.busy_at = Phase.AWAKE, now + (now - daemon.began) + _REPEATED_SECONDS
        elif not is_listening and found.state is DoorState.OPEN:
            del daemon.doors[door]

    def ended(self, starter: Starter, now: float) -> None:
        """A daemon is gone, or could not be started."""
        daemon = self._daemons.get(starter)
        if daemon is None:
            return
        if daemon.phase is Phase.STARTING:
            self._fail(daemon, now)
        daemon.is_running = False
        if daemon.phase is not Phase.FAILED:
            del self._daemons[starter]

    def is_busy(self, starter: Starter, now: float) -> None:
        """A daemon that was `perhaps_idle` has connections."""
        daemon = self._daemons.get(starter)
        if daemon is not None and daemon.phase in (Phase.AWAKE, Phase.DROWSY):
            daemon.phase, daemon.busy_at = Phase.AWAKE, now

    def is_idle(self, starter: Starter, now: float) -> list[Action]:
        """A daemon that was `perhaps_idle` has none."""
        daemon = self._daemons.get(starter)
        if daemon is not None and daemon.phase is Phase.AWAKE:
            daemon.phase, daemon.deadline = Phase.DROWSY, now + DROWSY_SECONDS
        elif daemon is not None and daemon.phase is Phase.DROWSY and now >= daemon.deadline:
            daemon.phase = Phase.STOPPING
            return [Stop(starter)]
        return []

    def stop_at(self, addresses: Collection[bytes]) -> list[Action]:
        """Aliases are to have other daemons, or none: stop those that they have."""
        stopped: list[Action] = []
        for daemon in list(self._daemons.values()):
            if daemon.addresses.isdisjoint(addresses):
                continue
            if daemon.phase in (Phase.STARTING, Phase.AWAKE, Phase.DROWSY):
                stopped.append(Stop(daemon.starter))
            if daemon.is_running:
                daemon.phase = Phase.STOPPING
            else:
                del self._daemons[daemon.starter]
        for door in [door for door, each in self._strays.items() if each.address in addresses]:
            del self._strays[door]
        return stopped

    def tick(self, now: float) -> list[Action]:
        """See to what is over. To be called a few times a second."""
        actions: list[Action] = []
        for daemon in list(self._daemons.values()):
            if daemon.phase is Phase.STARTING and now >= daemon.deadline:
                self._fail(daemon, now)
                actions.append(Stop(daemon.starter))
            elif daemon.phase is Phase.FAILED and now >= daemon.deadline and not daemon.is_running:
                del self._daemons[daemon.starter]
            elif daemon.phase is Phase.AWAKE:
                for door, each in list(daemon.doors.items()):
                    if each.state is DoorState.WAITING and now >= each.until:
                        each.state, each.until = DoorState.REFUSED, now + daemon.timeout
                    elif each.state is DoorState.REFUSED and now >= each.until:
                        del daemon.doors[door]
        for door, each in list(self._strays.items()):
            if each.state is DoorState.REFUSED and now >= each.until:
                del self._strays[door]
        return actions

    # ---- parts ----

    def _fail(self, daemon: Daemon, now: float) -> None:
        daemon.phase, daemon.deadline = Phase.FAILED, now + daemon.timeout
        for door in daemon.doors.values():
            door.state, door.until = DoorState.REFUSED, daemon.deadline

    def _count(self, now: float) -> None:
        self._tokens = min(
            float(self.limits.burst), self._tokens + max(0.0, now - self._counted) * self.limits.starts_per_second
        )
        self._counted = max(now, self._counted)


class Doorbell(NamedTuple):
    """What those who hold connections know of doors."""

    door_of: Callable[[Packet, int], tuple[Door, float]]
    """The door that a packet is for, by the target id that was decided, and for how many seconds it is waited for."""
    look: Callable[[Door], DoorState | None]
    """What is known of a door now; None: it is shut, and nobody is to be refused for that."""
    ask: Callable[[Door, float], None]
    """Have a door opened (now: the seconds); cheap enough for each packet."""


T = TypeVar("T")


class _Sleeper(NamedTuple, Generic[T]):
    door: Door
    source: bytes
    deadline: float
    held: T


class Sleepers(Generic[T]):
    """A worker's connections, or flows, that wait for a door. Where there is no room for one more it is not held, and
    its client's next try comes when the door is open, or not."""

    def __init__(self) -> None:
        self._flows: dict[Flow, _Sleeper[T]] = {}
        self._sources: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._flows)

    def get(self, flow: Flow) -> T | None:
        """What is held of a flow."""
        found = self._flows.get(flow)
        return None if found is None else found.held

    def put(self, flow: Flow, door: Door, source: bytes, deadline: float, held: T, of_source: int, of_all: int) -> bool:
        """Hold a flow; one that is there already is replaced. False: its source has `of_source` already, or there are
        `of_all`."""
        self.pop(flow)
        if len(self._flows) >= of_all or self._sources.get(source, 0) >= of_source:
            return False
        self._flows[flow] = _Sleeper(door, source, deadline, held)
        self._sources[source] = self._sources.get(source, 0) + 1
        return True

    def pop(self, flow: Flow) -> T | None:
        """Hold a flow no longer."""
        found = self._flows.pop(flow, None)
        if found is None:
            return None
        self._sources[found.source] -= 1
        if not self._sources[found.source]:
            del self._sources[found.source]
        return found.held

    def due(self, doorbell: Doorbell, now: float) -> Iterator[tuple[Flow, float, T, bool]]:
        """Those for whom something has changed, which are held no longer: their doors are open or refused, or their
        time is over. Flow, deadline, what was held, and whether the door is open. For shut doors it is asked again."""
        for flow, sleeper in list(self._flows.items()):
            state = doorbell.look(sleeper.door)
            if state in (DoorState.OPEN, DoorState.REFUSED) or now >= sleeper.deadline:
                self.pop(flow)
                yield flow, sleeper.deadline, sleeper.held, state is DoorState.OPEN
            elif state is None:
                doorbell.ask(sleeper.door, now)
