"""The main process: makes the machine match the configuration, starts the workers, and keeps both so.

Start, in this order, so that nothing is let through half-done: the lock, the registry (ids and plan), the aliases, the
table, the workers. From then on it repairs what others take away (aliases, the table), keeps the list of ports with
wildcard listeners, restarts workers that die, and reloads on SIGHUP. On SIGTERM it stops the workers and leaves table
and aliases as they are: established connections go on, new ones are dropped until it is back (fail closed).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from steerd import config as configuration
from steerd.config import Config
from steerd.control.registry import Registry
from steerd.errors import SteerdError
from steerd.kernel import aliases, listeners, queue, ruleset
from steerd.kernel.nftables import Nftables
from steerd.model import Reason
from steerd.telemetry import logs
from steerd.telemetry.counters import Counters
from steerd.worker import READY, WorkerSettings

_WATCH_SECONDS = 1.0
_QUEUE_REPORT_SECONDS = 60.0
# A worker that dies at once is started again after 0.1 s, then 0.2 s, ... 5 s; one that lived longer than this is
# forgiven.
_FIRST_BACK_OFF, _LONGEST_BACK_OFF, _FORGIVEN_SECONDS = 0.1, 5.0, 10.0


def settings_of(config: Config) -> ruleset.Settings:
    """What the table's placeholders say under this configuration."""
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
    )


def contents_of(config: Config) -> ruleset.Contents:
    """What the table's sets hold under this configuration."""
    endpoints = tuple(endpoint for service in config.services for endpoint in service.endpoints)
    return ruleset.Contents(
        endpoints=endpoints,
        early=endpoints,
        every_syn=tuple(
            endpoint for service in config.services if service.unextended != "pass" for endpoint in service.endpoints
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


def take_lock(run_dir: str) -> IO[str]:
    """The one lock of this machine's (or namespace's) steerd; raises SteerdError naming the process that holds it."""
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
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def down(config: Config) -> aliases.Changes:
    """Remove the table and all aliases; raises SteerdError while a daemon runs, which would put them back."""
    with take_lock(config.gateway.run_dir):
        ruleset.remove()
        return aliases.remove_all()


class Daemon:
    """One run of the main process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = take_lock(config.gateway.run_dir)
        self._log = logs.configure(process="main")
        self._registry = Registry(config.gateway.state_dir)
        counters = Path(config.gateway.run_dir) / "counters"
        self._counters = Counters.create(counters, config.gateway.workers)
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._wildcard_ports: set[tuple[int, int]] = set()

    async def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT. Raises SteerdError if the start fails; later trouble is logged and mended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)

        started = time.monotonic()
        plan = self._registry.publish(self._config)
        changes = aliases.reconcile(list(self._config.pools.values()), progress)
        native = ruleset.load(settings_of(self._config), contents_of(self._config), empty_targets=True)
        self._set_wildcard_ports()
        self._counters.next_generation()
        self._log.info(
            "table loaded",
            queue="nft" if native else "iptables-nft (this kernel has no nft queue)",
            services=len(plan.services),
            aliases_added=changes.added,
            aliases_removed=changes.removed,
            seconds=round(time.monotonic() - started, 3),
        )
        ready = [asyncio.Event() for _ in range(self._config.gateway.workers)]
        tasks = [asyncio.create_task(self._keep_worker(index, ready[index])) for index in range(len(ready))]
        tasks += [asyncio.create_task(self._keep_table()), asyncio.create_task(self._keep_aliases())]
        tasks += [asyncio.create_task(self._keep_reloading()), asyncio.create_task(self._watch_queues())]
        announce = asyncio.create_task(self._announce(ready, started))
        stop = asyncio.create_task(self._stop.wait())
        # A task that ends by itself has failed in a way that nobody foresaw: say so, and end.
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in (announce, stop, *tasks):
            task.cancel()
        await asyncio.gather(announce, stop, *tasks, return_exceptions=True)
        for task in done - {stop}:
            task.result()
        self._log.info("stopped", left="table and aliases (remove them with: steerd down)")

    async def _announce(self, ready: list[asyncio.Event], started: float) -> None:
        for event in ready:
            await event.wait()
        self._log.info("ready", workers=len(ready), seconds=round(time.monotonic() - started, 3))

    async def _keep_worker(self, index: int, ready: asyncio.Event) -> None:
        """Start a worker, and again whenever it dies. A cancelled task takes its worker with it."""
        gateway = self._config.gateway
        settings = WorkerSettings(
            index=index,
            queue=gateway.first_queue + index,
            queue_length=gateway.queue_length,
            receive_buffer=gateway.receive_buffer,
            state_dir=gateway.state_dir,
            counters=str(self._counters.path),
            access_log=gateway.access_log,
            main_pid=os.getpid(),
        )
        argument = msgspec.json.encode(settings).decode()
        back_off = _FIRST_BACK_OFF
        while True:
            born = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "steerd.worker", argument, stdout=asyncio.subprocess.PIPE
            )
            try:
                assert process.stdout is not None
                if await process.stdout.readline() == READY:
                    self._log.info("worker bound", worker=index, queue=settings.queue, pid=process.pid)
                    ready.set()
                status = await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            # A killed worker leaves its reader's slot behind, and with it every page that it could still have read.
            self._registry.forget_dead_readers()
            if time.monotonic() - born > _FORGIVEN_SECONDS:
                back_off = _FIRST_BACK_OFF
            self._log.warning("worker died", worker=index, pid=process.pid, status=status, again_in_seconds=back_off)
            await asyncio.sleep(back_off)
            back_off = min(back_off * 2, _LONGEST_BACK_OFF)

    async def _watch_queues(self) -> None:
        """Say so when the kernel dropped packets because a worker did not keep up; once a minute at most."""
        first = self._config.gateway.first_queue
        reported = 0
        while True:
            states = queue.states()
            ours = [states[n] for n in range(first, first + self._config.gateway.workers) if n in states]
            dropped = sum(state.queue_dropped + state.user_dropped for state in ours)
            if dropped > reported:
                self._log.warning("queues overflowed; the clients will repeat", packets=dropped - reported)
            # A worker that starts again binds its queue anew, and the kernel counts from zero.
            reported = dropped
            await asyncio.sleep(_QUEUE_REPORT_SECONDS)

    async def _keep_table(self) -> None:
        """Put the table back if somebody flushed it, its elements if somebody deleted them; know wildcard listeners."""
        nftables = Nftables()
        untranslated = nftables.counters().get("untranslated", 0)
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                if not nftables.table_exists():
                    self._log.warning("table inet steerd was removed by somebody; loading it again")
                    await asyncio.to_thread(self._load_table)
                    self._counters.next_generation()
                    self._wildcard_ports = set()
                counted = nftables.counters().get("untranslated", 0)
                if counted > untranslated:
                    self._log.warning(
                        "packets were dropped since their target was missing in the kernel's maps; workers load"
                        " their targets again",
                        packets=counted - untranslated,
                    )
                    self._counters.next_generation()
                untranslated = counted
                self._set_wildcard_ports()
            except (SteerdError, OSError) as error:
                self._log.error("the table cannot be looked after", why=str(error))

    def _load_table(self) -> None:
        ruleset.load(settings_of(self._config), contents_of(self._config), empty_targets=False)

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
                    if not watcher.read():
                        continue
                    changes = await asyncio.to_thread(aliases.reconcile, list(self._config.pools.values()))
                    if changes.added or changes.routes_added:
                        self._log.warning(
                            "aliases were removed by somebody; they are back",
                            aliases=changes.added,
                            routes=changes.routes_added,
                        )
            finally:
                loop.remove_reader(watcher.fileno())

    async def _keep_reloading(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            try:
                await asyncio.to_thread(self._apply, configuration.load(Path(self._config.file)))
            except SteerdError as error:
                self._log.error("not reloaded; the running configuration stays", why=str(error))

    def _publish(self, config: Config) -> None:
        self._registry.publish(config)
        self._counters.next_generation()

    def _apply(self, new: Config) -> None:
        """Put a new configuration in force: what it adds first, what it takes away last."""
        fixed = (
            "mark",
            "workers",
            "first_queue",
            "state_dir",
            "run_dir",
            "queue_length",
            "receive_buffer",
            "access_log",
        )
        for key in fixed:
            if getattr(new.gateway, key) != getattr(self._config.gateway, key):
                raise SteerdError(f"{new.file}: gateway.{key} changed, which needs a restart of the daemon")
        old_pools = {f"old {name}": pool for name, pool in self._config.pools.items()}
        aliases.reconcile([*new.pools.values(), *old_pools.values()])
        try:
            self._publish(new)
            ruleset.load(settings_of(new), contents_of(new), empty_targets=False)
        except SteerdError:
            self._publish(self._config)
            raise
        self._config = new
        aliases.reconcile(list(new.pools.values()))
        self._log.info("reloaded", file=str(new.file), services=len(new.services))


def total_decisions(counters: Counters) -> dict[str, int]:
    """Decisions by reason, over all workers; for people and monitors."""
    return {reason.name.lower(): counters.total(reason) for reason in Reason}


def run(config: Config, progress: Callable[[int, int], None] | None = None) -> None:
    """Run the daemon until it is told to stop; raises SteerdError if it cannot start."""
    daemon = Daemon(config)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(daemon.run(progress))
