"""How the daemon and the kernel stand, for the API: what control.api.context.Machine asks for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Generator, Sequence
from importlib import metadata

from structlog.typing import FilteringBoundLogger

from steerd.config import Config
from steerd.control.api.context import ConntrackUse, LogSettings, Machinery, WorkerStatus
from steerd.control.states import States
from steerd.errors import ConfigError, KernelError, SteerdError
from steerd.kernel import aliases, conntrack, flows, listeners, queue, statistics
from steerd.kernel.conntrack import Entry
from steerd.kernel.nftables import Nftables
from steerd.main.epochs import Epochs
from steerd.main.reload import Reloader
from steerd.main.workers import Workers
from steerd.model import TCP, UDP, IPAddress, Reason, Target
from steerd.telemetry import logs
from steerd.telemetry.counters import Counters, Extra, Gauge, LogSwitch

_MOST_KEYS = 5


class Machine:
    """Each method as control.api.context.Machine describes it. `config` says what is in force."""

    def __init__(
        self,
        config: Callable[[], Config],
        counters: Counters,
        states: States,
        epochs: Epochs,
        workers: Workers,
        reloader: Reloader,
        log: FilteringBoundLogger,
    ) -> None:
        self._config = config
        self._counters = counters
        self._states = states
        self._epochs = epochs
        self._workers = workers
        self._reloader = reloader
        self._log = log
        self._started = time.time()

    async def reload(self) -> SteerdError | None:
        return await self._reloader.reload()

    def status(self) -> Machinery:
        return Machinery(
            version=metadata.version("steerd"),
            pid=os.getpid(),
            started=self._started,
            refused_reload=None if self._reloader.refused is None else _where(self._reloader.refused),
            workers=self._worker_status(),
            decisions=self._counters.totals(Reason),
            counters=self._counters.totals(Extra),
            gauges=self._counters.totals(Gauge),
            kernel=_table_counters(),
            conntrack=_conntrack_use(),
        )

    def _worker_status(self) -> list[WorkerStatus]:
        first = self._config().gateway.first_queue
        try:
            states = queue.states_from(first, self._workers.count)
        except KernelError:  # this user may not look: the log says so
            states = [None] * self._workers.count
        return [
            WorkerStatus(
                worker=index,
                queue=first + index,
                is_bound=index in self._workers.bound,
                owner=None if state is None else state.owner,
                waiting=None if state is None else state.waiting,
                queue_dropped=None if state is None else state.queue_dropped,
                socket_dropped=None if state is None else state.user_dropped,
            )
            for index, state in enumerate(states)
        ]

    def target_state(self, target_id: int) -> int:
        return self._states.get(target_id) if target_id <= self._states.highest_id else 0

    def listening(self, targets: Sequence[Target]) -> list[list[int]]:
        wildcard = set(self._config().wildcard)
        asked = [listeners.Listener(to.address.packed, to.port, to in wildcard) for to in targets]
        by_protocol = [(protocol, listeners.which_listen(protocol, asked)) for protocol in (TCP, UDP)]
        return [
            [protocol for protocol, listens in by_protocol if to.port and listens[place]]
            for place, to in enumerate(targets)
        ]

    def elsewhere(self, addresses: Collection[IPAddress]) -> set[IPAddress]:
        return aliases.elsewhere(addresses)

    def log_settings(self) -> LogSettings:
        switch = self._counters.log
        return LogSettings(next(name for name, level in logs.LEVELS.items() if level == switch.level), switch.access)

    def put_log_settings(self, settings: LogSettings) -> None:
        self.set_log(LogSwitch(logs.LEVELS[settings.level], settings.access_log))
        self._log.info("logging changed through the API", level=settings.level, access_log=settings.access_log)

    def set_log(self, switch: LogSwitch) -> None:
        """What is logged from now on, by this process and by the workers."""
        logs.set_level(switch.level)
        self._counters.log = switch
        if switch.access:  # what the kernel steers by itself would be in no log
            self._epochs.begin()

    def entries(self, answered_by: bytes) -> Generator[Entry, None, None]:
        return conntrack.entries(translated=True, answered_by=answered_by)

    def end_flows(self, answered_by: bytes, is_wanted: Callable[[Entry], bool]) -> int:
        return flows.end(entry for entry in self.entries(answered_by) if is_wanted(entry))


def _table_counters() -> dict[str, int] | None:
    try:
        with contextlib.closing(Nftables()) as nftables:
            return nftables.counters()
    except (KernelError, OSError):
        return None


def _conntrack_use() -> ConntrackUse | None:
    try:
        return ConntrackUse(*statistics.conntrack())
    except KernelError:
        return None


def _where(refused: SteerdError) -> str:
    """What of a file was refused, without its values: monitors see this, and a value may be a secret."""
    if not isinstance(refused, ConfigError):
        return str(refused)
    keys = list(dict.fromkeys(problem.key for problem in refused.problems))
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return f"{refused.file}: {', '.join(keys[:_MOST_KEYS])}{more}"
