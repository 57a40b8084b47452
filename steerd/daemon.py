"""The main process: makes the machine match the configuration, starts the workers, and keeps both so.

Start, in this order, so that nothing is let through half-done: the lock, the registry (ids and plan), the aliases, the
table, the workers. From then on it repairs what others take away (aliases, the table), keeps the list of ports with
wildcard listeners, restarts workers that die, and reloads when it is asked to (SIGHUP, `Daemon.reload`). On SIGTERM it
stops the workers and leaves table and aliases as they are: established connections go on, new ones are dropped until it
is back (fail closed).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Collection, Generator, Sequence
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec

from steerd import config as configuration
from steerd import privileges
from steerd.config import QUIC, Config, Service, Unextended
from steerd.control.api import Api, Context
from steerd.control.api.context import ConntrackUse, LogSettings, Machinery, WorkerStatus
from steerd.control.claims import Collector
from steerd.control.registry import Registry
from steerd.control.relays import Places
from steerd.control.states import States
from steerd.core.engine import Plan
from steerd.core.pools import Pool
from steerd.errors import ConfigError, KernelError, SteerdError
from steerd.kernel import aliases, conntrack, flows, handshake, listeners, python, queue, ruleset, sysctls
from steerd.kernel.conntrack import Conntrack, Entry
from steerd.kernel.handshake import Handshake
from steerd.kernel.nftables import Nftables, Watcher
from steerd.kernel.notify import Notifier
from steerd.liveness import Liveness
from steerd.model import TCP, UDP, Endpoint, IPAddress, Reason, Target, UnixDaemon
from steerd.privileges import Standing
from steerd.relay.engine import Listen
from steerd.relay.keeper import Keeper
from steerd.telemetry import logs
from steerd.telemetry.counters import Counters, Extra, Gauge, LogSwitch
from steerd.waker import Waker
from steerd.worker import READY, WorkerSettings

if TYPE_CHECKING:
    from steerd.monitor import Monitor

FIXED = (
    "mark",
    "workers",
    "first_queue",
    "state_dir",
    "run_dir",
    "queue_length",
    "receive_buffer",
    "user",
    "api",
    "log.format",
    "metrics.listen",
)
"""Of config.Gateway: what a reload cannot change."""
_WATCH_SECONDS = 1.0
# conntrack's shortest timeout of a connection that its client may not have closed yet is 30 s (last_ack).
_OVER = 20
_MOST_KEYS = 5
_QUEUE_REPORT_SECONDS = 60.0
_STATUS_SECONDS = 10.0
_MAX_SHOWN = 10
# A watchdog that hears of us three times in its time does not bite because one of them was late.
_WATCHDOG_SHARE = 3
# A worker that dies at once is started again after 0.1 s, then 0.2 s, ... 5 s; one that lived longer than this is
# forgiven.
_FIRST_BACK_OFF, _LONGEST_BACK_OFF, _FORGIVEN_SECONDS = 0.1, 5.0, 10.0


def settings_of(config: Config, measured: Handshake) -> ruleset.Settings:
    """What the table's placeholders say under this configuration, on this machine."""
    gateway = config.gateway
    return ruleset.Settings(
        mark=gateway.mark,
        first_queue=gateway.first_queue,
        queues=gateway.workers,
        tcp_option=gateway.port_extension.tcp_option,
        source_rate=gateway.limits.source_rate,
        source_burst=gateway.limits.source_burst,
        stranger_rate=gateway.limits.stranger_rate,
        stranger_burst=gateway.limits.stranger_burst,
        total_rate=gateway.limits.total_rate,
        total_burst=gateway.limits.total_burst,
        syn_sent=gateway.timeouts.syn_sent,
        syn_recv=gateway.timeouts.syn_recv,
        time_wait=gateway.timeouts.time_wait,
        close=gateway.timeouts.close,
        over=min(gateway.timeouts.time_wait, _OVER),
        mss4=measured.mss4,
        mss6=measured.mss6,
        wscale=measured.window_scale,
    )


def contents_of(config: Config) -> ruleset.Contents:
    """What the table's sets hold under this configuration."""

    def of(chosen: Callable[[Service], bool]) -> tuple[Endpoint, ...]:
        return tuple(endpoint for service in config.services if chosen(service) for endpoint in service.endpoints)

    def tcp(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        return tuple(endpoint for endpoint in endpoints if endpoint.protocol == TCP)

    def udp(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        return tuple(endpoint for endpoint in endpoints if endpoint.protocol == UDP)

    unreplied = config.gateway.timeouts.udp_unreplied
    return ruleset.Contents(
        early=tcp(of(lambda _service: True)),
        every_syn=tcp(of(lambda service: service.unextended in (Unextended.DEFAULT, Unextended.UNMATCHED))),
        late=tcp(of(lambda service: service.is_late)),
        silent=tcp(of(lambda service: bool(service.on_silence))),
        datagram=udp(of(lambda service: not service.decides_every_datagram)),
        query=udp(of(lambda service: service.decides_every_datagram)),
        rebinding=udp(of(lambda service: service.rebinding)),
        quic=udp(of(lambda service: QUIC in service.inspect)),
        idle=tuple(
            (endpoint, ruleset.IdleTimeouts(min(unreplied, service.idle_timeout), service.idle_timeout))
            for service in config.services
            for endpoint in udp(service.endpoints)
        ),
        pools=tuple(config.pools.values()),
        wildcard=(
            *((target, target.port) for target in config.wildcard),
            *(
                (service.extension_pool.pool, service.extension_pool.port)
                for service in config.services
                if service.extension_pool is not None and service.extension_pool.wildcard
            ),
        ),
    )


def _log_switch(config: Config) -> LogSwitch:
    return LogSwitch(logs.LEVELS[config.gateway.log.level], config.gateway.access_log)


class Lock(NamedTuple):
    """What only one steerd can hold: the file in its run_dir, which names it, and a queue, of which each network
    namespace has one. Two daemons with different directories would take each other's aliases away."""

    file: IO[str]
    reservation: queue.Reservation

    def release(self) -> None:
        self.reservation.close()
        self.file.close()


def take_lock(run_dir: str) -> Lock:
    """Make sure that no other steerd runs here; raises SteerdError naming the process that does."""
    path = Path(run_dir) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as error:
        raise SteerdError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with handle:
            handle.seek(0)
            raise SteerdError(f"steerd runs already, as process {handle.read().strip()} (it holds {path})") from None
    try:
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
    except OSError as error:
        raise SteerdError(f"{path} cannot be written: {error.strerror}") from error
    try:
        return Lock(handle, queue.Reservation())
    except KernelError as error:
        handle.close()
        raise SteerdError(
            f"{error}: another steerd, with another run_dir, runs in this network namespace already, or this one may"
            " not use queues at all (it takes CAP_NET_ADMIN)"
        ) from None


def down(config: Config) -> aliases.Changes:
    """Remove the table and all aliases, and set sysctls back; raises SteerdError while a daemon runs, which would put
    them back."""
    lock = take_lock(config.gateway.run_dir)
    try:
        ruleset.remove()
        sysctls.restore(Path(config.gateway.run_dir))
        return aliases.remove_all()
    finally:
        lock.release()


class Daemon:
    """One run of the main process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._started = time.time()
        self._lock = take_lock(config.gateway.run_dir)
        self._log = logs.configure(process="main", style=config.gateway.log.format)
        self._states = States.create(config.gateway.run_dir, config.gateway.mark.highest_id)
        self._notifier = Notifier()
        self._registry = Registry(config.gateway.state_dir, _LeaseEffects(self), _RelayEffects(self), self._states)
        if config.relayed:
            # Those that were there before keep their aliases.
            self._config = config = configuration.load(config.file, self._registry.relays.seats())
        self._relay = Keeper(self._log)
        self._liveness = Liveness(self._states)
        self._claims = Collector(config.gateway.run_dir, self._registry.sessions)
        self._api = Api(
            Context(self._registry, self),
            config.gateway.run_dir,
            self._on_api_fault,
            self._on_api_refused,
            config.gateway.api.read_only_group,
        )
        counters = Path(config.gateway.run_dir) / "counters"
        self._counters = Counters.create(counters, config.gateway.workers)
        self.set_log(_log_switch(config))
        self._monitor = self._new_monitor()
        self._waker = Waker(config, self._registry.reader(), self._log)
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        # Indices of the workers whose queues are bound now, and whether all of them were once.
        self._bound: set[int] = set()
        self._is_ready = False
        # What the last reload was refused for.
        self._refused: SteerdError | None = None
        # Of the file that is in force, if a reload has read it.
        self._text: str | None = None
        # Who waits for the next reload.
        self._awaiting_reload: list[asyncio.Future[SteerdError | None]] = []
        # The listeners on the wildcard address, our rules and our elements, as the table had them when we last changed
        # it, or looked.
        self._wildcard_ports: set[tuple[int, int]] = set()
        self._loaded: ruleset.Loaded | None = None
        self._rules: set[tuple[int, str, int]] = set()
        self._elements: dict[str, bytes] = {}
        self._nftables = Nftables()
        self._native_queue = ruleset.has_native_queue()
        self._sysctl_trouble = ""
        # A reload replaces rules and aliases in a thread. Whoever looks at them meanwhile would take that for somebody
        # else's doing, and work against it.
        self._changing_table = asyncio.Lock()
        self._changing_aliases = asyncio.Lock()

    async def run(self, standing: Standing, progress: Callable[[int, int], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT. Raises SteerdError if the start fails; later trouble is logged and mended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        # One that came before has waited (steerd.__main__).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

        self._log.info("privileges given up", **standing._asdict())
        started = time.monotonic()
        self._loop = loop
        relay = asyncio.create_task(self._relay.keep())
        await self._start_relay()
        plan = self._publish(self._config)
        changes = aliases.reconcile(list(self._config.pools.values()), progress)
        with contextlib.closing(self._registry.reader()) as reader:
            known = ruleset.targets_agree(self._nftables, self._config.gateway.mark, reader.target)
        self._load_table(self._config, empty_targets=not known)
        self._log.info(
            "table loaded",
            queue="nft" if self._native_queue else "iptables-nft (this kernel has no nft queue)",
            services=len(plan.services),
            aliases_added=changes.added,
            aliases_removed=changes.removed,
            seconds=round(time.monotonic() - started, 3),
        )
        await self._waker.recall()
        ended = self._registry.leases.reconcile(time.time())
        if ended:
            self._log.info("flows of leases that have ended were ended", flows=ended)
        self._look_at_targets()
        await self._api.start()
        if self._monitor is not None:
            await self._monitor.start()
            self._log.info("metrics served", at=str(self._config.gateway.metrics.listen))
        ready = [asyncio.Event() for _ in range(self._config.gateway.workers)]
        tasks = [asyncio.create_task(self._keep_worker(index, ready[index])) for index in range(len(ready))]
        tasks += [asyncio.create_task(self._keep_table()), asyncio.create_task(self._keep_aliases())]
        tasks += [asyncio.create_task(self._keep_reloading()), asyncio.create_task(self._watch_queues())]
        tasks += [relay, asyncio.create_task(self._keep_leases())]
        tasks.append(asyncio.create_task(self._keep_looking_at_targets()))
        tasks.append(asyncio.create_task(self._waker.keep()))
        tasks.append(asyncio.create_task(self._claims.keep_collecting(self._on_claims_kept)))
        announce = asyncio.create_task(self._announce(ready, started))
        stop = asyncio.create_task(self._stop.wait())
        # A task that ends by itself has failed in a way that nobody foresaw: say so, and end.
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        self._notify(self._notifier.stopping)
        for task in (announce, stop, *tasks):
            task.cancel()
        await asyncio.gather(announce, stop, *tasks, return_exceptions=True)
        await self._api.stop()
        if self._monitor is not None:
            await self._monitor.stop()
        await self._collect_claims()
        for task in done - {stop}:
            task.result()
        self._log.info("stopped", left="table and aliases (remove them with: steerd down)")

    def _new_monitor(self) -> Monitor | None:
        listen = self._config.gateway.metrics.listen
        if listen is None:
            return None
        # What it brings along takes its time, and most of all when the machine is busy at a restart.
        from steerd.monitor import Monitor

        return Monitor(listen, lambda: self._config, self._counters, self._registry, self._on_monitor_fault)

    def _on_monitor_fault(self, text: str) -> None:
        self._log.error("fault in the metrics", why=text)

    def _on_api_fault(self, text: str) -> None:
        self._log.error("fault in the API", why=text)

    def _on_api_refused(self, sentence: str) -> None:
        self._log.warning("refused at the API", why=sentence)

    async def _collect_claims(self) -> None:
        """The last ones, of workers that are gone: who wipes run_dir after the daemon takes none of them away."""
        try:
            await asyncio.to_thread(self._claims.collect)
        except (SteerdError, OSError) as error:
            self._on_claims_kept(str(error))

    def _on_claims_kept(self, why: str) -> None:
        self._log.error("claims of sessions cannot be written down; they are kept", why=why)

    async def _announce(self, ready: list[asyncio.Event], started: float) -> None:
        """Say when every worker is bound for the first time, and from then on how it goes."""
        for event in ready:
            await event.wait()
        self._log.info("ready", workers=len(ready), seconds=round(time.monotonic() - started, 3))
        self._is_ready = True
        self._notify(lambda: self._notifier.ready(self._status()))
        watchdog = self._notifier.watchdog_seconds
        while True:
            # While a worker is away its clients wait. If it does not come back in time, a new start is the last resort.
            if len(self._bound) == len(ready):
                self._notify(self._notifier.alive)
            self._notify(lambda: self._notifier.status(self._status()))
            await asyncio.sleep(watchdog / _WATCHDOG_SHARE if watchdog else _STATUS_SECONDS)

    def _status(self) -> str:
        gateway = self._config.gateway
        decisions = sum(total_decisions(self._counters).values())
        refused = " (the last reload was refused: see the log)" if self._refused else ""
        return (
            f"{len(self._bound)} of {gateway.workers} workers bound, {len(self._config.services)} services,"
            f" {decisions} decisions; by {self._config.file}{refused}"
        )

    def _notify(self, say: Callable[[], None]) -> None:
        try:
            say()
        except OSError as error:
            self._log.error("systemd cannot be told how it goes", why=str(error))

    async def _keep_worker(self, index: int, ready: asyncio.Event) -> None:
        """Start a worker, and again whenever it dies. A cancelled task takes its worker with it."""
        gateway = self._config.gateway
        settings = WorkerSettings(
            index=index,
            queue=gateway.first_queue + index,
            queue_length=gateway.queue_length,
            receive_buffer=gateway.receive_buffer,
            state_dir=gateway.state_dir,
            run_dir=gateway.run_dir,
            counters=str(self._counters.path),
            log_format=gateway.log.format,
            main_pid=os.getpid(),
        )
        argument = msgspec.json.encode(settings).decode()
        back_off = _FIRST_BACK_OFF
        while True:
            born = time.monotonic()
            try:
                process = await asyncio.create_subprocess_exec(
                    *python.command("steerd.worker", argument), stdout=asyncio.subprocess.PIPE
                )
            except OSError as error:  # no memory or no process to be had: that may pass
                self._log.error("worker cannot be started", worker=index, why=str(error))
                await asyncio.sleep(_LONGEST_BACK_OFF)
                continue
            try:
                assert process.stdout is not None
                if await process.stdout.readline() == READY:
                    self._log.info("worker bound", worker=index, queue=settings.queue, pid=process.pid)
                    self._bound.add(index)
                    ready.set()
                status = await process.wait()
            finally:
                self._bound.discard(index)
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            # A killed worker leaves its reader's slot behind, and with it every page that it could still have read.
            self._registry.forget_dead_readers()
            if time.monotonic() - born > _FORGIVEN_SECONDS:
                back_off = _FIRST_BACK_OFF
            self._log.warning("worker died", worker=index, pid=process.pid, status=status, again_in_seconds=back_off)
            await asyncio.sleep(back_off)
            self._counters.slot(index)[Extra.RESTARTS] += 1
            back_off = min(back_off * 2, _LONGEST_BACK_OFF)

    async def _watch_queues(self) -> None:
        """Say so when the kernel dropped packets because a worker did not keep up; once a minute at most."""
        first = self._config.gateway.first_queue
        reported = 0
        while True:
            try:
                states = queue.states()
            except KernelError as error:
                self._log.warning("nobody will say when queues overflow", why=str(error))
                await asyncio.Event().wait()
            ours = [states[n] for n in range(first, first + self._config.gateway.workers) if n in states]
            dropped = sum(state.queue_dropped + state.user_dropped for state in ours)
            if dropped > reported:
                self._log.warning("queues overflowed; the clients will repeat", packets=dropped - reported)
            # A worker that starts again binds its queue anew, and the kernel counts from zero.
            reported = dropped
            await asyncio.sleep(_QUEUE_REPORT_SECONDS)

    async def _keep_table(self) -> None:
        """Put back what somebody removes from the table (rules, elements) or changes in the sysctls; know the wildcard
        listeners."""
        loop = asyncio.get_running_loop()
        deletion = asyncio.Event()
        untranslated = self._nftables.counters().get("untranslated", 0)
        with contextlib.closing(Watcher()) as watcher:
            loop.add_reader(watcher.fileno(), deletion.set)
            try:
                while True:
                    # Not asyncio.wait_for: before Python 3.12 it may swallow a cancellation that comes with the event.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_WATCH_SECONDS):
                            await deletion.wait()
                    deletion.clear()
                    watcher.read()
                    async with self._changing_table:
                        untranslated = self._mend_table(untranslated)
                        self._mend_sysctls()
            finally:
                loop.remove_reader(watcher.fileno())

    def _mend_table(self, untranslated: int) -> int:
        """One look at the table. Takes and returns how many packets the table had counted as untranslated.

        Not in a thread: while our rules are gone, every millisecond may let a packet through.
        """
        try:
            if not self._rules <= ruleset.our_rules(self._nftables):
                self._load_table(self._config)
                self._counters.next_generation()
                self._log.warning("rules of steerd were removed by somebody; they are back")
            counted = self._nftables.counters().get("untranslated", 0)
            if counted > untranslated:
                self._counters.next_generation()
                self._log.warning(
                    "packets were dropped since their target was missing in the kernel's maps; workers load their"
                    " targets again",
                    packets=counted - untranslated,
                )
            self._set_wildcard_ports()
        except (SteerdError, OSError) as error:
            self._log.error("the table cannot be looked after", why=str(error))
            return untranslated
        return counted

    def _load_table(self, config: Config, *, empty_targets: bool = False) -> None:
        """All of the table, whatever is there."""
        settings, contents = self._wanted_of(config)
        self._note(ruleset.load(settings, contents, native=self._native_queue, empty_targets=empty_targets))
        self._forget_unsteered(contents, contents.datagram, contents.pools)
        self._wildcard_ports = set()
        self._set_wildcard_ports()

    def _change_table(self, config: Config) -> None:
        """What another configuration changes in the table, in one transaction."""
        before = self._loaded
        assert before is not None  # the table is loaded before anything else may happen
        is_as_noted = (
            self._rules <= ruleset.our_rules(self._nftables) and ruleset.our_elements(self._nftables) == self._elements
        )
        if not is_as_noted:
            self._load_table(config)
            self._counters.next_generation()
            return
        settings, contents = self._wanted_of(config)
        now = ruleset.change(before, settings, contents, native=self._native_queue)
        if now == before:
            return
        self._note(now)
        if now.rules != before.rules:
            # It may be another handshake that clients are told of.
            self._counters.next_generation()
        datagram = [e for e in contents.datagram if e not in before.contents.datagram]
        pools = [pool for pool in contents.pools if pool not in before.contents.pools]
        self._forget_unsteered(contents, datagram, pools)

    def _wanted_of(self, config: Config) -> tuple[ruleset.Settings, ruleset.Contents]:
        if any(service.is_late for service in config.services):
            self._set_sysctls(config)
        return settings_of(config, handshake.measure()), contents_of(config)

    def _note(self, loaded: ruleset.Loaded) -> None:
        self._loaded = loaded
        self._rules = ruleset.our_rules(self._nftables)
        self._elements = ruleset.our_elements(self._nftables)

    @staticmethod
    def _forget_unsteered(contents: ruleset.Contents, endpoints: Collection[Endpoint], pools: Collection[Pool]) -> None:
        """A client of these endpoints, or a daemon in these pools, that goes on sending from one port would keep alive
        for ever what conntrack noted while the table did not know them."""
        if contents.datagram and (endpoints or pools):
            prefixes = [prefix for pool in pools for prefix in pool.prefixes]
            with contextlib.closing(Conntrack()) as conntrack:
                conntrack.forget_unsteered(endpoints, prefixes)

    def _set_sysctls(self, config: Config) -> None:
        """What late steering needs; told before it is done, since some of it is felt on the whole host."""
        for difference in sysctls.check():
            self._log.info("sysctl", what=str(difference))
        for change in sysctls.apply(Path(config.gateway.run_dir)):
            self._log.info("sysctl", what=str(change))

    def _mend_sysctls(self) -> None:
        """Set back what somebody has changed since `_set_sysctls`. Trouble that stays is told once."""
        if not any(service.is_late for service in self._config.services):
            return
        try:
            found = {difference.sysctl.name: difference for difference in sysctls.check() if difference.settable}
            changes = sysctls.apply(Path(self._config.gateway.run_dir)) if found else []
        except (SteerdError, OSError) as error:
            if str(error) != self._sysctl_trouble:
                self._log.error("sysctls cannot be set back; late steering may go wrong", why=str(error))
            self._sysctl_trouble = str(error)
            return
        self._sysctl_trouble = ""
        for change in changes:
            self._log.warning(
                "a sysctl that late steering needs was changed by somebody; it is set back",
                sysctl=change.name,
                found=change.before,
                set_back_to=change.after,
                why=found[change.name].sysctl.reason,
            )

    def _set_wildcard_ports(self) -> None:
        ports = listeners.wildcard_ports()
        if ports != self._wildcard_ports:
            ruleset.set_wildcard_ports(ports)
            self._wildcard_ports = ports

    async def _keep_aliases(self) -> None:
        """Bring back aliases that somebody else removed."""
        loop = asyncio.get_running_loop()
        with contextlib.closing(aliases.Watcher()) as watcher:
            lost = asyncio.Event()
            loop.add_reader(watcher.fileno(), lost.set)
            try:
                while True:
                    await lost.wait()
                    lost.clear()
                    watcher.read()
                    try:
                        await self._mend_aliases()
                    except (SteerdError, OSError) as error:
                        self._log.error("aliases cannot be mended; trying again", why=str(error))
                        await asyncio.sleep(_LONGEST_BACK_OFF)
                        lost.set()
            finally:
                loop.remove_reader(watcher.fileno())

    async def _mend_aliases(self) -> None:
        async with self._changing_aliases:
            changes = await asyncio.to_thread(aliases.reconcile, list(self._config.pools.values()))
        if changes.added or changes.routes_added:
            self._log.warning(
                "aliases were removed by somebody; they are back",
                aliases=changes.added,
                routes=changes.routes_added,
            )

    def call_mend_aliases(self) -> None:
        """`_mend_aliases`, from another thread than the event loop's, and wait for it."""
        asyncio.run_coroutine_threadsafe(self._mend_aliases(), self._loop).result()

    def call_stop_daemons(self, addresses: Sequence[IPAddress]) -> None:
        """Put the daemons of aliases to sleep. From any thread; when it returns, nobody is sent there any more."""
        self._waker.stop_at(addresses)

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

    def call_listen(self, wanted: Sequence[Listen]) -> None:
        """Have the relay listen on these, from another thread than the event loop's. Raises KernelError."""
        asyncio.run_coroutine_threadsafe(self._relay.listen(wanted), self._loop).result()

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

    async def _keep_leases(self) -> None:
        """End leases when their time has come."""
        leases = self._registry.leases
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            end = leases.next_end()
            if end is None or end > time.time():
                continue
            try:
                for view in await asyncio.to_thread(leases.expire, time.time()):
                    self._log.info("lease ended", lease=view.name, addresses=view.addresses, flows=view.flows)
            except (SteerdError, OSError) as error:
                self._log.error("leases cannot be ended; trying again", why=str(error))

    def status(self) -> Machinery:
        """As control.api.Machine."""
        gateway = self._config.gateway
        try:
            queues = queue.states()
        except KernelError:  # this user may not look: the log says so
            queues = {}
        try:
            with contextlib.closing(Nftables()) as nftables:
                kernel = nftables.counters()
        except (KernelError, OSError):
            kernel = None
        return Machinery(
            version=metadata.version("steerd"),
            pid=os.getpid(),
            started=self._started,
            refused_reload=None if self._refused is None else _where(self._refused),
            workers=[
                self._worker_status(index, queues.get(gateway.first_queue + index)) for index in range(gateway.workers)
            ],
            decisions=total_decisions(self._counters),
            counters={extra.name.lower(): self._counters.total(extra) for extra in Extra},
            gauges={gauge.name.lower(): self._counters.total(gauge) for gauge in Gauge},
            kernel=kernel,
            conntrack=_conntrack_use(),
        )

    def _worker_status(self, index: int, state: queue.QueueState | None) -> WorkerStatus:
        number = self._config.gateway.first_queue + index
        is_bound = index in self._bound
        if state is None:
            return WorkerStatus(index, number, is_bound, None, None, None, None)
        dropped = state.queue_dropped, state.user_dropped
        return WorkerStatus(index, number, is_bound, state.owner, state.waiting, *dropped)

    def target_state(self, target_id: int) -> int:
        """As control.api.Machine."""
        return self._states.get(target_id) if target_id <= self._states.highest_id else 0

    def listening(self, targets: Sequence[Target]) -> list[list[int]]:
        """As control.api.Machine."""
        wildcard = set(self._config.wildcard)
        asked = [listeners.Listener(to.address.packed, to.port, to in wildcard) for to in targets]
        by_protocol = [(protocol, listeners.which_listen(protocol, asked)) for protocol in (TCP, UDP)]
        return [
            [protocol for protocol, listens in by_protocol if to.port and listens[place]]
            for place, to in enumerate(targets)
        ]

    async def reload(self) -> SteerdError | None:
        """Put the configuration file in force, as it is now. Returns None once it is in force; else why it is not, a
        ConfigError with every mistake, or what the kernel or the registry refused, and what was in force still is.

        Reloads come one after the other. Those who ask while one runs share the next one, which reads the file anew.
        """
        done: asyncio.Future[SteerdError | None] = asyncio.get_running_loop().create_future()
        self._awaiting_reload.append(done)
        self._reload.set()
        return await done

    def entries(self, answered_by: bytes) -> Generator[Entry, None, None]:
        """Every connection and flow of datagrams that conntrack translates (control.api.Machine)."""
        return conntrack.entries(translated=True, answered_by=answered_by)

    def end_flows(self, answered_by: bytes, is_wanted: Callable[[Entry], bool]) -> int:
        """End those of `entries` that are wanted; how many were ended (control.api.Machine)."""
        return flows.end(entry for entry in self.entries(answered_by) if is_wanted(entry))

    async def _keep_reloading(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            awaiting, self._awaiting_reload = self._awaiting_reload, []
            if self._is_ready:
                self._notify(self._notifier.reloading)
            self._refused = problem = await self._reload_once()
            if self._is_ready:
                self._notify(lambda: self._notifier.ready(self._status()))
            for done in awaiting:
                if not done.done():  # who asked does not wait any more
                    done.set_result(problem)

    async def _reload_once(self) -> SteerdError | None:
        begun = time.monotonic()
        try:
            new, text = await asyncio.to_thread(self._read)
            async with self._changing_aliases, self._changing_table:
                await asyncio.to_thread(self._apply, new)
        except (SteerdError, OSError) as error:
            self._log.error("not reloaded; the running configuration stays", why=str(error))
            return error if isinstance(error, SteerdError) else SteerdError(f"{self._config.file}: {error}")
        self._text = text
        seconds = round(time.monotonic() - begun, 3)
        self._log.info("reloaded", file=new.file, services=len(new.services), seconds=seconds)
        return None

    def _publish(self, config: Config) -> Plan:
        # Before the workers see the plan, so that they find the names of its services.
        self._counters.name_series((service.name, service.inspect) for service in config.services)
        return self._registry.publish(config)

    def log_settings(self) -> LogSettings:
        """As control.api.Machine."""
        switch = self._counters.log
        return LogSettings(next(name for name, level in logs.LEVELS.items() if level == switch.level), switch.access)

    def put_log_settings(self, settings: LogSettings) -> None:
        """As control.api.Machine."""
        self.set_log(LogSwitch(logs.LEVELS[settings.level], settings.access_log))
        self._log.info("logging changed through the API", level=settings.level, access_log=settings.access_log)

    def set_log(self, switch: LogSwitch) -> None:
        """What is logged from now on, by this process and by the workers."""
        logs.set_level(switch.level)
        self._counters.log = switch

    def _read(self) -> tuple[Config, str]:
        """The configuration file as it is now, and its text."""
        text = configuration.read(self._config.file)
        if text == self._text:
            return self._config, text
        return configuration.parse(text, self._config.file, self._registry.relays.seats()), text

    def _apply(self, new: Config) -> None:
        """Put a new configuration in force: what it adds first, what it takes away last."""
        old = self._config
        for key in FIXED:
            if attrgetter(key)(new.gateway) != attrgetter(key)(old.gateway):
                name = "mark_bits" if key == "mark" else key
                raise SteerdError(f"{new.file}: gateway.{name} changed, which needs a restart of the daemon.")
        if sentence := privileges.lacking(new):
            raise SteerdError(sentence)
        if new.pools != old.pools:
            aliases.reconcile([*new.pools.values(), *old.pools.values()])
        try:
            if new is not old:
                self._registry.relays.reserve(new)
                self._publish(new)
            self._change_table(new)
            self._waker.configure(new)
            self._config = new
        except Exception:
            try:
                self._waker.configure(old)
                self._publish(old)
            finally:
                with contextlib.suppress(SteerdError, OSError):  # what went wrong, then, and has changed nothing
                    self._change_table(old)
            raise
        finally:
            if new.pools != old.pools:
                aliases.reconcile(list(self._config.pools.values()))
            if new is not old:
                self._let_listen()
        if _log_switch(new) != _log_switch(old):
            self.set_log(_log_switch(new))


class _RelayEffects:
    """What `unix:` targets do to the relay (control.relays.Effects)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def listen(self, places: Places, port: int) -> None:
        named = ((UnixDaemon.of_name(name), addresses) for name, addresses in places.items())
        self._daemon.call_listen(
            [Listen(str(address), port, *daemon) for daemon, addresses in named for address in addresses]
        )


class _LeaseEffects:
    """What leases do to the kernel (control.leases.Effects)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def make_ready(self, addresses: Sequence[IPAddress]) -> None:
        if aliases.are_local(addresses):
            return
        self._daemon.call_mend_aliases()
        if not aliases.are_local(addresses):
            text = " and ".join(str(address) for address in addresses)
            raise KernelError(f"{text} cannot be made local: the kernel takes it for an address of somebody else.")

    def end_flows(self, addresses: Sequence[IPAddress]) -> int:
        self._daemon.call_stop_daemons(addresses)
        with contextlib.closing(Nftables()) as nftables:
            ruleset.forget_learned(nftables, addresses)
        with contextlib.closing(Conntrack()) as conntrack:
            return conntrack.end_flows_to([address.packed for address in addresses])


def _where(refused: SteerdError) -> str:
    """What of a file was refused, without its values: monitors see this, and a value may be a secret."""
    if not isinstance(refused, ConfigError):
        return str(refused)
    keys = list(dict.fromkeys(problem.key for problem in refused.problems))
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return f"{refused.file}: {', '.join(keys[:_MOST_KEYS])}{more}"


def _conntrack_use() -> ConntrackUse | None:
    try:
        entries, limit = (
            int(Path(f"/proc/sys/net/netfilter/nf_conntrack_{what}").read_text()) for what in ("count", "max")
        )
    except (OSError, ValueError):
        return None
    return ConntrackUse(entries, limit)


def _few(targets: Sequence[Target]) -> list[str]:
    """For a line of a log."""
    shown = [str(target) for target in targets[:_MAX_SHOWN]]
    return shown if len(shown) == len(targets) else [*shown, f"and {len(targets) - len(shown)} more"]


def total_decisions(counters: Counters) -> dict[str, int]:
    """Decisions by reason, over all workers; for people and monitors."""
    return {reason.name.lower(): counters.total(reason) for reason in Reason}


def run(config: Config, standing: Standing, progress: Callable[[int, int], None] | None = None) -> None:
    """Run the daemon until it is told to stop; raises SteerdError if it cannot start."""
    daemon = Daemon(config)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(daemon.run(standing, progress))
