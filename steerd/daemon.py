"""The main process: makes the machine match the configuration, starts the workers, and keeps both so.

Start, in this order, so that nothing is let through half-done: the lock, the registry (ids and plan; the kernel forgets
what it was told to steer by itself), the table, the aliases, which it guards, the workers. From then on it repairs what
others take away (aliases, the table), keeps the list of ports with wildcard listeners, restarts workers that die, and
reloads when it is asked to (SIGHUP, the API). On SIGTERM it stops the workers and leaves table and aliases as they are:
established connections go on, new ones are dropped until it is back (fail closed), and so are those that the kernel
could steer by itself.

Each part is in steerd.main; here they are put together, and told which configuration is in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from steerd import config as configuration
from steerd.config import Config
from steerd.control import elsewhere
from steerd.control.api import Api, Context
from steerd.control.claims import Collector
from steerd.control.registry import Registry
from steerd.control.relays import Places
from steerd.control.states import States
from steerd.core.engine import Plan
from steerd.errors import KernelError, SteerdError
from steerd.kernel import aliases, ruleset, sysctls
from steerd.kernel.conntrack import Conntrack
from steerd.kernel.nftables import Nftables
from steerd.main.aliases import Aliases
from steerd.main.announcer import Announcer
from steerd.main.epochs import Epochs
from steerd.main.liveness import Liveness
from steerd.main.lock import RunsAlreadyError, take_lock
from steerd.main.machine import Machine
from steerd.main.nursery import Nursery
from steerd.main.relay import Keeper
from steerd.main.reload import Reloader
from steerd.main.table import Table, hold_file
from steerd.main.waker import Waker
from steerd.main.workers import Workers
from steerd.model import IPAddress, Reason, Target, UnixDaemon
from steerd.privileges import Standing
from steerd.relay.engine import Listen
from steerd.telemetry import logs
from steerd.telemetry.counters import Counters, LogSwitch

if TYPE_CHECKING:
    from steerd.main.monitor import Monitor

_LEASE_SECONDS = 1.0
_MAX_SHOWN = 10
_T = TypeVar("_T")


def run(config: Config, standing: Standing, progress: Callable[[int, int], None] | None = None) -> None:
    """Run the daemon until it is told to stop; raises SteerdError if it cannot start."""
    daemon = Daemon(config)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(daemon.run(standing, progress))


def down(config: Config) -> aliases.Changes:
    """Remove the table and all aliases, and set sysctls back; raises SteerdError while a daemon runs, which would put
    them back."""
    try:
        lock = take_lock(config.gateway.run_dir)
    except RunsAlreadyError as error:
        raise SteerdError(f"steerd runs (process {error.process}); stop it first") from error
    try:
        ruleset.remove()
        hold_file(config).unlink(missing_ok=True)
        sysctls.restore(Path(config.gateway.run_dir))
        return aliases.remove_all()
    finally:
        lock.release()


class Daemon:
    """One run of the main process."""

    def __init__(self, config: Config) -> None:
        gateway = config.gateway
        self._config = config
        self._lock = take_lock(gateway.run_dir)
        self._log = logs.configure(process="main", style=gateway.log.format)
        self._announcer = Announcer(self._status, self._log)
        # It takes its time until a worker can be had, and need not take ours.
        self._nursery = Nursery()
        self._states = States.create(gateway.run_dir, gateway.mark.highest_id)
        self._registry = Registry(gateway.state_dir, _LeaseEffects(self), _RelayEffects(self), self._states)
        if config.relayed:
            # Those that were there before keep their aliases.
            self._config = config = configuration.load(config.file, self._registry.relays.seats())
        self._counters = Counters.create(Path(gateway.run_dir) / "counters", gateway.workers)
        self._aliases = Aliases(self._in_force, self._log)
        self._epochs = Epochs(self._counters, self._log)
        self._registry.on_answers_changed(self._epochs.begin)
        self._table = Table(self._in_force, self._counters, self._epochs, self._log)
        self._relay = Keeper(self._log)
        self._liveness = Liveness(self._states)
        self._waker = Waker(config, self._registry.reader(), self._log)
        self._claims = Collector(gateway.run_dir, self._registry.sessions)
        self._workers = Workers(gateway, self._nursery, self._counters, self._registry, self._log)
        self._reloader = Reloader(self._in_force, self._put_in_force, self._registry, self._announcer, self._log)
        self._machine = Machine(
            self._in_force, self._counters, self._states, self._epochs, self._workers, self._reloader, self._log
        )
        self._machine.set_log(_log_switch(config))
        self._api = Api(
            Context(self._registry, self._machine),
            gateway.run_dir,
            lambda text: self._log.error("fault in the API", why=text),
            lambda sentence: self._log.warning("refused at the API", why=sentence),
            gateway.api.read_only_group,
        )
        self._monitor = self._new_monitor()
        self._stop = asyncio.Event()

    def _new_monitor(self) -> Monitor | None:
        listen = self._config.gateway.metrics.listen
        if listen is None:
            return None
        # What it brings along takes its time, and most of all when the machine is busy at a restart.
        from steerd.main.monitor import Monitor

        return Monitor(
            listen,
            self._in_force,
            self._counters,
            self._registry,
            lambda text: self._log.error("fault in the metrics", why=text),
        )

    def _in_force(self) -> Config:
        return self._config

    # ---- a daemon's life ----

    async def run(self, standing: Standing, progress: Callable[[int, int], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT. Raises SteerdError if the start fails; later trouble is logged and mended."""
        self._loop = asyncio.get_running_loop()
        self._listen_to_signals()
        self._log.info("privileges given up", **standing._asdict())
        started = time.monotonic()
        relay = asyncio.create_task(self._relay.keep())
        await self._start_relay()
        self._set_up(progress, started)
        await self._waker.recall()
        self._end_what_is_over()
        self._look_at_targets()
        self._look_at_endpoints()
        await self._api.start()
        if self._monitor is not None:
            await self._monitor.start()
            self._log.info("metrics served", at=str(self._config.gateway.metrics.listen))
        keepers = [
            *(self._workers.keep(index) for index in range(self._workers.count)),
            self._workers.keep_watching_queues(),
            self._table.keep(),
            self._aliases.keep(),
            self._reloader.keep(),
            self._keep_leases(),
            self._keep_looking_at_targets(),
            self._waker.keep(),
            self._claims.keep_collecting(self._on_claims_kept),
        ]
        tasks = [relay, *map(asyncio.create_task, keepers)]
        announcing = asyncio.create_task(self._announcer.keep(self._workers, started))
        stop = asyncio.create_task(self._stop.wait())
        # A task that ends by itself has failed in a way that nobody foresaw: say so, and end.
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        self._announcer.stopping()
        for task in (announcing, stop, *tasks):
            task.cancel()
        await asyncio.gather(announcing, stop, *tasks, return_exceptions=True)
        self._nursery.close()
        await self._api.stop()
        if self._monitor is not None:
            await self._monitor.stop()
        await self._collect_claims()
        # What the kernel could decide by itself waits, too, until somebody looks after the table again.
        self._epochs.begin()
        for task in done - {stop}:
            task.result()
        self._log.info(
            "stopped", left=f"table and aliases (remove them with: steerd down {Path(self._config.file).absolute()})"
        )

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._reloader.ask)
        # One that came before has waited (steerd.__main__).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _set_up(self, progress: Callable[[int, int], None] | None, started: float) -> None:
        """The registry, the table, the aliases."""
        plan = self._publish(self._config)
        self._table.begin(self._registry)
        # Behind the table: without it, whoever has a route here would reach them directly.
        changes = aliases.reconcile(list(self._config.pools.values()), progress)
        self._log.info(
            "table loaded",
            queue="nft" if self._table.has_native_queue else "xt_NFQUEUE (this kernel has no nft queue)",
            services=len(plan.services),
            aliases_added=changes.added,
            aliases_removed=changes.removed,
            seconds=round(time.monotonic() - started, 3),
        )

    def _publish(self, config: Config) -> Plan:
        # Before the workers see the plan, so that they find the names of its services.
        self._counters.name_series((service.name, service.inspect) for service in config.services)
        return self._registry.publish(config)

    def _status(self) -> str:
        """One line for `systemctl status`."""
        config = self._config
        decisions = sum(self._counters.totals(Reason).values())
        refused = " (the last reload was refused: see the log)" if self._reloader.refused else ""
        return (
            f"{len(self._workers.bound)} of {self._workers.count} workers bound, {len(config.services)} services,"
            f" {decisions} decisions; by {config.file}{refused}"
        )

    # ---- another configuration ----

    async def _put_in_force(self, new: Config) -> None:
        async with self._aliases.changing, self._table.changing:
            await asyncio.to_thread(self._apply, new)
        await asyncio.to_thread(self._look_at_endpoints)

    def _apply(self, new: Config) -> None:
        """Put a new configuration in force: what it adds first, what it takes away last. Raises SteerdError or OSError,
        and then what was in force still is."""
        old = self._config
        if new.pools != old.pools:
            aliases.reconcile([*new.pools.values(), *old.pools.values()])
        try:
            if new is not old:
                self._registry.relays.reserve(new)
                self._publish(new)
            self._table.change(new)
            self._waker.configure(new)
            self._config = new
        except Exception:
            try:
                self._waker.configure(old)
                self._publish(old)
            finally:
                with contextlib.suppress(SteerdError, OSError):  # what went wrong, then, and has changed nothing
                    self._table.change(old)
            raise
        finally:
            if new.pools != old.pools:
                aliases.reconcile(list(self._config.pools.values()))
            if new is not old:
                self._let_listen()
        if _log_switch(new) != _log_switch(old):
            self._machine.set_log(_log_switch(new))

    # ---- the relay ----

    async def _start_relay(self) -> None:
        """Before any connection is steered there; if it cannot be, its clients are reset, and others are served."""
        try:
            await asyncio.to_thread(self._registry.relays.reserve, self._config)
        except KernelError as error:
            self._log.error("daemons on unix sockets cannot be reached yet", why=str(error))

    def _let_listen(self) -> None:
        """Have the relay listen where the configuration in force has it stand, and nowhere else."""
        try:
            self._registry.relays.listen(self._config)
        except SteerdError as error:
            self._log.error("daemons on unix sockets cannot all be reached", why=str(error))

    # ---- targets, leases, claims ----

    async def _keep_looking_at_targets(self) -> None:
        """See to it that a dead one of several targets gets no new connection."""
        while True:
            await asyncio.sleep(self._liveness.pause)
            await asyncio.to_thread(self._look_at_targets)

    def _look_at_targets(self) -> None:
        try:
            changes = self._liveness.look(self._registry.groups_in_use(), self._config)
        except (SteerdError, OSError) as error:
            self._log.error("it cannot be seen which targets listen; what was seen last counts", why=str(error))
            return
        if changes.dead or changes.alive:
            self._log.info("targets changed", dead=_few(changes.dead), alive=_few(changes.alive))

    def _look_at_endpoints(self) -> None:
        """Say which ones are at addresses that this machine does not have."""
        try:
            found = elsewhere.sentences(self._config, self._machine.elsewhere)
        except (SteerdError, OSError) as error:
            self._log.error("it cannot be seen which endpoints are here", why=str(error))
            return
        for sentence in found[:_MAX_SHOWN]:
            self._log.warning("endpoint elsewhere", why=sentence)
        if len(found) > _MAX_SHOWN:
            self._log.warning("endpoints elsewhere", more=len(found) - _MAX_SHOWN, see="steerctl endpoints")

    def _end_what_is_over(self) -> None:
        """Flows of leases that ended, and whose flows did not, since the daemon did."""
        ended = self._registry.leases.reconcile(time.time())
        if ended:
            self._log.info("flows of leases that have ended were ended", flows=ended)

    async def _keep_leases(self) -> None:
        """End leases when their time has come."""
        leases = self._registry.leases
        while True:
            await asyncio.sleep(_LEASE_SECONDS)
            end = leases.next_end()
            if end is None or end > time.time():
                continue
            try:
                for view in await asyncio.to_thread(leases.expire, time.time()):
                    self._log.info("lease ended", lease=view.name, addresses=view.addresses, flows=view.flows)
            except (SteerdError, OSError) as error:
                self._log.error("leases cannot be ended; trying again", why=str(error))

    async def _collect_claims(self) -> None:
        """The last ones, of workers that are gone: who wipes run_dir after the daemon takes none of them away."""
        try:
            await asyncio.to_thread(self._claims.collect)
        except (SteerdError, OSError) as error:
            self._on_claims_kept(str(error))

    def _on_claims_kept(self, why: str) -> None:
        self._log.error("claims of sessions cannot be written down; they are kept", why=why)

    # ---- what the registry has done, from its own threads ----

    def mend_aliases(self) -> None:
        """Look whether they are all there, and bring them back. Not from the event loop's thread. Raises SteerdError or
        OSError."""
        self._wait_for(self._aliases.mend())

    def stop_daemons(self, addresses: Sequence[IPAddress]) -> None:
        """Put the daemons of aliases to sleep; when it returns, nobody is sent there any more. From any thread."""
        self._waker.stop_at(addresses)

    def listen(self, wanted: Sequence[Listen]) -> None:
        """Have the relay listen on these. Not from the event loop's thread. Raises KernelError."""
        self._wait_for(self._relay.listen(wanted))

    def _wait_for(self, doing: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result()


class _RelayEffects:
    """What `unix:` targets do to the relay (control.relays.Effects)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def listen(self, places: Places, port: int) -> None:
        named = ((UnixDaemon.of_name(name), addresses) for name, addresses in places.items())
        self._daemon.listen(
            [Listen(str(address), port, *daemon) for daemon, addresses in named for address in addresses]
        )


class _LeaseEffects:
    """What leases do to the kernel (control.leases.Effects)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def make_ready(self, addresses: Sequence[IPAddress]) -> None:
        if aliases.are_local(addresses):
            return
        self._daemon.mend_aliases()
        if not aliases.are_local(addresses):
            text = " and ".join(str(address) for address in addresses)
            raise KernelError(f"{text} cannot be made local: the kernel takes it for an address of somebody else.")

    def end_flows(self, addresses: Sequence[IPAddress]) -> int:
        self._daemon.stop_daemons(addresses)
        with contextlib.closing(Nftables()) as nftables:
            ruleset.forget_learned(nftables, addresses)
        with contextlib.closing(Conntrack()) as conntrack:
            return conntrack.end_flows_to([address.packed for address in addresses])


def _log_switch(config: Config) -> LogSwitch:
    return LogSwitch(logs.LEVELS[config.gateway.log.level], config.gateway.access_log)


def _few(targets: Sequence[Target]) -> list[str]:
    """For a line of a log."""
    shown = [str(target) for target in targets[:_MAX_SHOWN]]
    return shown if len(shown) == len(targets) else [*shown, f"and {len(targets) - len(shown)} more"]
