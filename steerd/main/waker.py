"""The part of the main process that wakes daemons: carries out what core.wake decides.

A worker asks for a door (control.doors). Here it is found out whose door that is (the alias, its lease, what the
configuration says of both), the policy is asked, units and commands are started and stopped, listeners are looked at,
and the table that workers see is kept.

**A restart.** RUN_DIR/wake.json says which daemons there may be: each is written down before it is started. The next
main process finds out which of them run, and knows them again; none is started twice, and none is stopped because
steerd is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from structlog.typing import FilteringBoundLogger

from steerd.config import Config
from steerd.control.doors import Porter
from steerd.control.registry import Reader
from steerd.core.wake import Action, Door, Look, Phase, Policy, Start, Starter, Wake
from steerd.errors import KernelError, SteerdError
from steerd.kernel import conntrack, listeners, processes, units
from steerd.kernel.processes import Process, ProcessId
from steerd.model import IPAddress

# While somebody waits; else new questions, and what follows from one of them, are what there is to be done.
_TICK_SECONDS, _REST_SECONDS = 0.02, 0.25
_LOOK_SECONDS = 1.0
_KILL_SECONDS = 10.0
_STOP_AGAIN_SECONDS = 30.0
_UNITS_SECONDS, _UNITS_REST_SECONDS = 0.25, 5.0
_QUESTIONS = 64
"""So many are answered in a row, before something else of the main process has its turn."""
_FULL_REPORT_SECONDS = 60.0
_LEAST_IDLE_LOOK, _MOST_IDLE_LOOK = 0.25, 30.0


class _Note(msgspec.Struct):
    """One daemon in the file."""

    starter: Starter
    timeout: float
    sleep_after: float | None
    doors: list[tuple[Door, bytes]]
    process: ProcessId | None


class _Found(NamedTuple):
    """What there is to wake behind a door."""

    wake: Wake
    starter: Starter | None
    address: IPAddress


class Waker:
    """All daemons that are woken here. For the event loop's thread, but for `stop_at`."""

    def __init__(self, config: Config, reader: Reader, log: FilteringBoundLogger) -> None:
        self._reader = reader
        self._log = log
        self._file = Path(config.gateway.run_dir) / "wake.json"
        self._porter = Porter(config.gateway.run_dir)
        self._policy = Policy(config.waking)
        self._processes: dict[Starter, Process] = {}
        self._notes: dict[Starter, ProcessId] = {}
        self._up: set[Starter] = set()
        """What was started, and its end not seen. What listens on its doors is its own."""
        self._jobs: dict[Starter, asyncio.Task[None]] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._troubles: dict[str, str] = {}
        """What went wrong last time, and was told."""
        self._written = b""
        self._looked = self._asked_units = self._looked_for_idle = 0.0
        self._told_full = -_FULL_REPORT_SECONDS
        self._news = asyncio.Event()
        self._thread = threading.get_ident()
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Another configuration is in force. What is awake stays so, unless its alias is to have another daemon; who
        cannot be woken any more is left to itself. From any thread."""
        self._config = config
        self._policy.limits = config.waking
        for daemon in list(self._policy.daemons.values()):
            wakes = (config.wake_of(ipaddress.ip_address(packed)) for packed in list(daemon.addresses))
            daemon.sleep_after = next((found[0].sleep_after for found in wakes if found is not None), None)
        self._stop_others()

    def _stop_others(self) -> None:
        """Stop who would go on getting the connections to an alias that has become another daemon's."""
        awake = [
            (each.starter, packed) for each in list(self._policy.daemons.values()) for packed in list(each.addresses)
        ]
        lost = [
            address for starter, packed in awake if self._is_anothers(address := ipaddress.ip_address(packed), starter)
        ]
        if lost:
            self.stop_at(lost)

    def _is_anothers(self, address: IPAddress, starter: Starter) -> bool:
        found = self._config.wake_of(address)
        try:
            return found is not None and self._starter(address, *found) != starter
        except ValueError:
            return True

    async def keep(self) -> None:
        """Serve for ever."""
        self._loop.add_reader(self._porter.fileno(), self._news.set)
        try:
            while True:
                self._news.clear()
                try:
                    self._turn(time.monotonic())
                    self._troubles.pop("turn", None)
                except (SteerdError, OSError) as error:
                    if self._troubles.get("turn") != str(error):
                        self._log.error("daemons cannot be woken or put to sleep; trying again", why=str(error))
                    self._troubles["turn"] = str(error)
                    await asyncio.sleep(_LOOK_SECONDS)
                waits = bool(self._policy.to_look_at(waiting=True))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_SECONDS if waits else _REST_SECONDS):
                        await self._news.wait()
        finally:
            self._loop.remove_reader(self._porter.fileno())
            tasks = [*self._jobs.values(), *self._looking.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._porter.close()

    def stop_at(self, addresses: Collection[IPAddress]) -> None:
        """Aliases are to have no daemon any more. From any thread; when it returns, workers send nobody there."""
        if threading.get_ident() == self._thread:
            self._stop_at(addresses)
        else:
            asyncio.run_coroutine_threadsafe(self._stop_at_soon(addresses), self._loop).result()

    async def _stop_at_soon(self, addresses: Collection[IPAddress]) -> None:
        self._stop_at(addresses)

    def _stop_at(self, addresses: Collection[IPAddress]) -> None:
        self._carry_out(self._policy.stop_at({address.packed for address in addresses}))
        self._show(time.monotonic())

    # ---- one turn ----

    def _turn(self, now: float) -> None:
        for door in self._porter.asked(_QUESTIONS):
            self._news.set()
            self._ask(door, now)
        self._carry_out(self._policy.tick(now))
        for look in self._policy.to_look_at(waiting=True):
            if look.starter is None or look.starter in self._up:
                self._see(look, now)
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            for look in self._policy.to_look_at(waiting=False):
                self._see(look, now)
        self._look_at_units(now)
        self._look_for_idle(now)
        self._show(now)
        self._write()

    def _show(self, now: float) -> None:
        self._porter.show(self._policy.doors(), self._policy.is_full(now))

    def _ask(self, door: Door, now: float) -> None:
        try:
            found = self._find(door)
        except ValueError as error:
            self._log.warning("a daemon cannot be woken", why=str(error))
            return
        if found is None:
            return
        address = found.address.packed
        if found.starter is None:
            self._policy.ask_stray(door, address, self._listens(door, address), now)
            return
        wake = found.wake
        is_new = found.starter not in self._policy.daemons
        self._carry_out(self._policy.ask(door, address, found.starter, wake.timeout, wake.sleep_after, now))
        if is_new and found.starter not in self._policy.daemons and self._policy.is_full(now):
            self._tell_full(now)

    def _tell_full(self, now: float) -> None:
        if now - self._told_full >= _FULL_REPORT_SECONDS:
            self._told_full = now
            self._log.info(
                "no more daemons are woken now; who wants to go to another one is answered `unmatched`",
                awake=self._policy.awake,
                max_awake=self._policy.limits.max_awake,
                starts_per_second=self._policy.limits.starts_per_second,
            )

    def _find(self, door: Door) -> _Found | None:
        """None: it is no door of a daemon that can be woken (a configuration that has just gone, say)."""
        target = self._reader.target(door.target_id)
        if target is None or (target.port and target.port != door.port):
            return None
        found = self._config.wake_of(target.address)
        return None if found is None else _Found(found[0], self._starter(target.address, *found), target.address)

    def _starter(self, address: IPAddress, wake: Wake, index: int) -> Starter | None:
        lease = self._reader.lease_of(address.packed) if wake.needs_lease else None
        return wake.starter(lease, str(address), index)

    def _listens(self, door: Door, address: bytes) -> bool:
        target = self._reader.target(door.target_id)
        wildcard = target is not None and self._config.may_be_wildcard(target)
        return listeners.listens(address, door.port, door.protocol, wildcard=wildcard)

    def _see(self, look: Look, now: float) -> None:
        listens = self._listens(look.door, look.address)
        daemon = None if look.starter is None else self._policy.daemons[look.starter]
        was_starting = daemon is not None and daemon.phase is Phase.STARTING
        self._policy.seen(look, listens, now)
        if was_starting and listens:
            self._log.info("daemon listens", daemon=str(look.starter), port=look.door.port)

    # ---- starting and stopping ----

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            starter = action.starter
            work = self._start if isinstance(action, Start) else self._stop
            task = self._loop.create_task(self._after(self._jobs.get(starter), work, starter))
            self._jobs[starter] = task
            task.add_done_callback(partial(self._done, starter))

    async def _after(
        self,
        former: asyncio.Task[None] | None,
        work: Callable[[Starter], Coroutine[None, None, None]],
        starter: Starter,
    ) -> None:
        """One thing after the other for each daemon."""
        if former is not None:
            await asyncio.wait([former])
        await work(starter)

    def _done(self, starter: Starter, task: asyncio.Task[None]) -> None:
        if self._jobs.get(starter) is task:
            del self._jobs[starter]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("fault while waking a daemon", daemon=str(starter), why=repr(error))
        self._news.set()

    async def _start(self, starter: Starter) -> None:
        try:
            foreign = self._foreign(starter)
            if starter.unit:
                self._write()
                is_running = (await units.states([starter.unit])).get(starter.unit) in units.RUNNING
                if foreign and not is_running:
                    raise KernelError(foreign)
                if not is_running:
                    await units.start(starter.unit)
            elif foreign:
                raise KernelError(foreign)
            else:
                self._watch(starter, processes.start(starter, partial(self._note, starter)))
        except (SteerdError, OSError) as error:
            self._log.warning("a daemon cannot be woken", daemon=str(starter), why=str(error))
            self._policy.ended(starter, time.monotonic())
            return
        self._up.add(starter)
        self._log.info("daemon started", daemon=str(starter), awake=self._policy.awake)

    def _foreign(self, starter: Starter) -> str:
        """Says so if somebody else's socket is where the daemon's is to be: connections would go there."""
        for look in self._policy.to_look_at(waiting=True):
            if look.starter == starter and listeners.listens(look.address, look.door.port, look.door.protocol):
                return f"something else listens on {ipaddress.ip_address(look.address)} port {look.door.port} already."
        return ""

    def _note(self, starter: Starter, process: ProcessId) -> None:
        self._notes[starter] = process
        self._write()

    def _watch(self, starter: Starter, process: Process) -> None:
        self._processes[starter] = process
        self._loop.add_reader(process.descriptor, self._on_exit, starter)

    def _on_exit(self, starter: Starter) -> None:
        process = self._processes.pop(starter)
        self._loop.remove_reader(process.descriptor)
        self._notes.pop(starter, None)
        self._ended(starter, process.bury())

    async def _stop(self, starter: Starter) -> None:
        if starter not in self._up:  # it could not be started
            return
        if starter.unit:
            while starter in self._up:  # until `_look_at_units` finds that it has ended
                try:
                    await units.stop(starter.unit)
                except SteerdError as error:
                    self._log.warning("a daemon cannot be put to sleep yet", daemon=str(starter), why=str(error))
                await self._wait_for_end(starter, _STOP_AGAIN_SECONDS)
        else:
            for number in (signal.SIGTERM, signal.SIGKILL):
                process = self._processes.get(starter)
                if process is not None:
                    process.signal(number)
                    await self._wait_for_end(starter, _KILL_SECONDS)

    async def _wait_for_end(self, starter: Starter, seconds: float) -> None:
        until = self._loop.time() + seconds
        while starter in self._up and self._loop.time() < until:
            await asyncio.sleep(_TICK_SECONDS)

    def _ended(self, starter: Starter, status: int | None) -> None:
        daemon = self._policy.daemons.get(starter)
        phase = None if daemon is None else daemon.phase
        self._up.discard(starter)
        self._policy.ended(starter, time.monotonic())
        if phase is Phase.STARTING:
            self._log.warning("daemon ended before it listened", daemon=str(starter), status=status)
        elif phase is Phase.STOPPING:
            self._log.info("daemon put to sleep", daemon=str(starter), awake=self._policy.awake)
        elif phase is not Phase.FAILED:
            self._log.info("daemon ended by itself", daemon=str(starter), status=status)
        self._news.set()

    # ---- what is looked at now and then ----

    def _look_at_units(self, now: float) -> None:
        """Find out which units have ended."""
        ours = [starter for starter in self._policy.daemons if starter.unit and starter in self._up]
        awake = all(self._policy.daemons[starter].phase in (Phase.AWAKE, Phase.DROWSY) for starter in ours)
        if ours and now - self._asked_units >= (_UNITS_REST_SECONDS if awake else _UNITS_SECONDS):
            self._asked_units = now
            self._alone("units", lambda: self._find_ended(ours))

    async def _find_ended(self, asked: Sequence[Starter]) -> None:
        states = await units.states([starter.unit for starter in asked])
        for starter in asked:
            if states.get(starter.unit) in units.ENDED and starter in self._up:
                self._ended(starter, None)

    def _look_for_idle(self, now: float) -> None:
        idle = self._policy.perhaps_idle(now)
        if not idle:
            return
        shortest = min(daemon.sleep_after or _MOST_IDLE_LOOK * 8 for daemon in self._policy.daemons.values())
        if now - self._looked_for_idle >= min(max(shortest / 8, _LEAST_IDLE_LOOK), _MOST_IDLE_LOOK):
            self._looked_for_idle = now
            self._alone("idle", lambda: self._find_idle(idle))

    async def _find_idle(self, idle: Sequence[Starter]) -> None:
        addresses = {each: self._policy.daemons[each].addresses for each in idle}
        busy = await asyncio.to_thread(_busy, set().union(*addresses.values()))
        now = time.monotonic()
        for starter, its in addresses.items():
            if busy.isdisjoint(its):
                self._carry_out(self._policy.is_idle(starter, now))
            else:
                self._policy.is_busy(starter, now)
        self._show(now)

    def _alone(self, name: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Begin something, unless it is still being done."""
        if name in self._looking:
            return

        async def look() -> None:
            try:
                await work()
                self._troubles.pop(name, None)
            except (SteerdError, OSError) as error:
                if self._troubles.get(name) != str(error):
                    self._log.error("daemons that are awake cannot be looked after", why=str(error))
                self._troubles[name] = str(error)

        task = self._loop.create_task(look())
        self._looking[name] = task
        task.add_done_callback(lambda _: self._looking.pop(name, None))

    # ---- the file ----

    def _write(self) -> None:
        notes = [
            _Note(
                starter,
                daemon.timeout,
                daemon.sleep_after,
                [(door, each.address) for door, each in daemon.doors.items()],
                self._notes.get(starter),
            )
            for starter, daemon in self._policy.daemons.items()
            if daemon.is_running
        ]
        text = msgspec.json.encode(notes)
        if text != self._written:
            new = self._file.with_suffix(".new")
            new.write_bytes(text)
            new.replace(self._file)
            self._written = text

    async def recall(self) -> None:
        """Know the daemons again that run since before this process began. To be called once, before `keep`."""
        self._loop = asyncio.get_running_loop()
        try:
            notes = msgspec.json.decode(self._file.read_bytes(), type=list[_Note])
        except FileNotFoundError:
            return
        except msgspec.MsgspecError as error:
            self._log.error("which daemons are awake is not known", file=str(self._file), why=str(error))
            return
        names = [note.starter.unit for note in notes if note.starter.unit]
        try:
            states = await units.states(names)
        except SteerdError as error:
            self._log.error("which units are awake cannot be asked; they are taken for awake", why=str(error))
            states = dict.fromkeys(names, "active")
        now = time.monotonic()
        for starter, timeout, sleep_after, doors, process_id in map(msgspec.structs.astuple, notes):
            if starter.unit:
                if states.get(starter.unit, "inactive") in units.ENDED:
                    continue
            elif process_id is None or (process := processes.find(process_id)) is None:
                continue
            else:
                self._notes[starter] = process_id
                self._watch(starter, process)
            self._up.add(starter)
            self._policy.restore(starter, timeout, sleep_after, dict(doors), now)
        self._stop_others()
        if self._up:
            self._log.info("daemons that were woken before are known again", awake=self._policy.awake)


def _busy(addresses: Collection[bytes]) -> set[bytes]:
    """Those of these addresses that somebody has a connection or flow to."""
    return {entry.delivered.dst for entry in conntrack.entries(translated=True)}.intersection(addresses)
