"""core.wake against a model of a machine: whatever is asked and happens, in whatever order, the rules hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steerd.core.wake import Action, Door, DoorState, Limits, Phase, Policy, Start, Starter, Stop
from steerd.model import TCP

ALIASES = 6
LEASES = 3
LIMITS = Limits(max_awake=3, starts_per_second=0.5, burst=4)
TIMEOUT, SLEEP_AFTER = 5.0, 10.0

aliases = st.integers(0, ALIASES - 1)
ports = st.integers(80, 82)


class Machine(RuleBasedStateMachine):
    """`runs`: what is started and has not ended. Each alias has a lease, which changes hands; both name a daemon."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy(LIMITS)
        self.now = 1000.0
        self.runs: set[Starter] = set()
        self.to_stop: set[Starter] = set()
        self.started: list[float] = []
        self.holder = dict.fromkeys(range(ALIASES), 0)
        self.open: set[tuple[int, int]] = set()
        """Alias and port on which the alias's present daemon listens."""

    def starter(self, alias: int) -> Starter:
        return Starter(f"d{alias}@{self.holder[alias]}.service")

    def address(self, alias: int) -> bytes:
        return bytes([10, 64, 0, alias])

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                assert action.starter not in self.runs, "started twice"
                alias = int(action.starter.unit[1])
                assert not any(int(other.unit[1]) == alias for other in self.runs), "two daemons on one alias"
                self.runs.add(action.starter)
                self.started.append(self.now)
            else:
                assert isinstance(action, Stop)
                assert action.starter not in self.to_stop, "stopped twice"
                if action.starter in self.runs:
                    self.to_stop.add(action.starter)

    @rule(alias=aliases, port=ports)
    def ask(self, alias: int, port: int) -> None:
        door = Door(16 + alias, TCP, port)
        was_full = self.policy.is_full(self.now)
        before = len(self.started)
        self.do(self.policy.ask(door, self.address(alias), self.starter(alias), TIMEOUT, SLEEP_AFTER, self.now))
        assert not (was_full and len(self.started) > before), "started beyond the limits"

    @rule(seconds=st.floats(0.01, 12))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.policy.tick(self.now))

    @rule(port=ports, data=st.data())
    @precondition(lambda self: self.runs)
    def listen(self, port: int, data: st.DataObject) -> None:
        starter = data.draw(st.sampled_from(sorted(self.runs)))
        self.open.add((int(starter.unit[1]), port))

    @rule(waiting=st.booleans())
    def look(self, waiting: bool) -> None:
        for look in self.policy.to_look_at(waiting=waiting):
            assert look.starter in self.runs, "looked for what does not run"
            self.policy.seen(look, (look.address[3], look.door.port) in self.open, self.now)

    @rule(data=st.data())
    @precondition(lambda self: self.runs)
    def end(self, data: st.DataObject) -> None:
        """A daemon ends, whether it was told to or not."""
        starter = data.draw(st.sampled_from(sorted(self.runs)))
        self.runs.discard(starter)
        self.to_stop.discard(starter)
        self.open = {each for each in self.open if each[0] != int(starter.unit[1])}
        self.policy.ended(starter, self.now)

    @rule(busy=st.booleans())
    def look_for_idle(self, busy: bool) -> None:
        for starter in self.policy.perhaps_idle(self.now):
            if busy:
                self.policy.is_busy(starter, self.now)
                assert self.policy.daemons[starter].phase is Phase.AWAKE
            else:
                self.do(self.policy.is_idle(starter, self.now))

    @rule(alias=aliases, told=st.booleans())
    def change_hands(self, alias: int, told: bool) -> None:
        """Another lease has the alias; `told`: its end was told as well."""
        self.holder[alias] = (self.holder[alias] + 1) % LEASES
        if told:
            self.do(self.policy.stop_at({self.address(alias)}))
            assert not self.doors_at(alias)

    def doors_at(self, alias: int) -> dict[Door, DoorState]:
        return {door: state for door, state in self.policy.doors().items() if door.target_id == 16 + alias}

    @invariant()
    def no_more_run_than_may(self) -> None:
        assert len(self.runs) <= LIMITS.max_awake
        assert self.policy.awake == len(self.runs)

    @invariant()
    def no_more_are_started_than_may(self) -> None:
        for first, began in enumerate(self.started):
            within = sum(1 for at in self.started[first:] if at - began <= 10)
            assert within <= LIMITS.burst + 10 * LIMITS.starts_per_second + 1

    @invariant()
    def an_open_door_has_a_daemon_that_runs_and_is_not_told_to_stop(self) -> None:
        for door, state in self.policy.doors().items():
            if state is DoorState.OPEN:
                daemons = [each for each in self.runs if int(each.unit[1]) == door.target_id - 16]
                assert len(daemons) == 1 and daemons[0] not in self.to_stop

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        for daemon in self.policy.daemons.values():
            if daemon.phase is Phase.STARTING:
                assert daemon.deadline <= self.now + TIMEOUT


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPolicy = Machine.TestCase
