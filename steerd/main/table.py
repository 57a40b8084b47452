"""Keeps the nft table as the configuration in force wants it, and with it the sysctls that late steering needs.

What somebody takes out of the table (rules, elements) or changes in the sysctls is put back, the table of a boot is not
left beside it, and the set of ports with wildcard listeners follows the sockets of this host. What the table says is
kernel.ruleset's and nft/steerd.nft's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from steerd.config import Config, Service, Unextended
from steerd.config.parsers import QUIC
from steerd.control.registry import Registry
from steerd.core.pools import Pool
from steerd.errors import SteerdError
from steerd.kernel import handshake, listeners, ruleset, sysctls
from steerd.kernel.conntrack import Conntrack
from steerd.kernel.handshake import Handshake
from steerd.kernel.nftables import Nftables, Watcher
from steerd.main.epochs import Epochs
from steerd.model import TCP, UDP, Endpoint
from steerd.telemetry.counters import Counters

_LOOK_SECONDS = 1.0
# conntrack's shortest timeout of a connection that its client may not have closed yet is 30 s (last_ack).
_OVER = 20


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


def hold_file(config: Config) -> Path:
    """What steerd-hold.service gives to nft when the machine boots: ruleset.hold."""
    return Path(config.gateway.state_dir) / "hold.nft"


def _keep_hold(file: Path, text: str) -> None:
    if file.exists() and file.read_text() == text:
        return
    new = file.with_suffix(".new")
    with new.open("w") as opened:
        opened.write(text)
        opened.flush()
        # A boot may follow a power failure.
        os.fsync(opened.fileno())
    new.replace(file)


class Table:
    """Our table on this machine. `config` says what is in force. For one thread at a time."""

    def __init__(
        self, config: Callable[[], Config], counters: Counters, epochs: Epochs, log: FilteringBoundLogger
    ) -> None:
        self._config = config
        self._counters = counters
        self._epochs = epochs
        self._log = log
        self._nftables = Nftables()
        self.has_native_queue = ruleset.has_native_queue()
        """Whether this kernel has the nft `queue` statement; else there is xt_NFQUEUE."""
        # The listeners on the wildcard address, our rules and our elements, as the table had them when we last changed
        # it, or looked.
        self._wildcard_ports: set[tuple[int, int]] = set()
        self._loaded: ruleset.Loaded | None = None
        self._rules: set[tuple[str, int]] = set()
        self._elements: dict[str, bytes] = {}
        self._sysctl_trouble = ""
        self.changing = asyncio.Lock()
        """Held by who changes it in a thread. Whoever looks at it meanwhile would take that for somebody else's doing,
        and work against it."""

    def begin(self, registry: Registry) -> None:
        """Load it, whatever is there; the targets in it stay if the registry means the same by their ids. Raises
        SteerdError."""
        with registry.packed_targets() as target:
            known = ruleset.targets_agree(self._nftables, self._config().gateway.mark, target)
        self._load(self._config(), empty_targets=not known)

    def change(self, config: Config) -> None:
        """What another configuration changes in the table, in one transaction. Raises SteerdError or OSError."""
        before = self._loaded
        assert before is not None  # the table is loaded before anything else may happen
        self._let_go()
        is_as_noted = (
            self._rules <= ruleset.our_rules(self._nftables) and ruleset.our_elements(self._nftables) == self._elements
        )
        if not is_as_noted:
            self._load(config)
            self._counters.next_generation()
            return
        settings, contents = self._wanted_of(config)
        now = ruleset.change(before, settings, contents, native=self.has_native_queue)
        if now == before:
            return
        self._note(now, settings)
        if now.rules != before.rules:
            # It may be another handshake that clients are told of.
            self._counters.next_generation()
        datagram = [e for e in contents.datagram if e not in before.contents.datagram]
        pools = [pool for pool in contents.pools if pool not in before.contents.pools]
        self._forget_unsteered(contents, datagram, pools)

    async def keep(self) -> None:
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
                        async with asyncio.timeout(_LOOK_SECONDS):
                            await deletion.wait()
                    deletion.clear()
                    watcher.read()
                    async with self.changing:
                        untranslated = self._mend(untranslated)
                        self._mend_sysctls()
            finally:
                loop.remove_reader(watcher.fileno())

    def _mend(self, untranslated: int) -> int:
        """One look at the table. Takes and returns how many packets the table had counted as untranslated.

        Not in a thread: while our rules are gone, every millisecond may let a packet through.
        """
        self._epochs.make_good()
        try:
            self._let_go()
            if not self._rules <= ruleset.our_rules(self._nftables):
                self._load(self._config())
                self._counters.next_generation()
                self._log.warning("rules of steerd were removed by somebody; they are back")
            counted = self._nftables.counters().get("untranslated", 0)
            if counted > untranslated:
                self._counters.next_generation()
                self._epochs.begin()
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

    def _let_go(self) -> None:
        """What holds clients back while the machine boots would cut them all off now."""
        if ruleset.let_go(self._nftables):
            self._log.warning(
                "the table that holds clients back during a boot was loaded by somebody; it is removed",
                table=f"inet {ruleset.HOLD_TABLE}",
                file=str(hold_file(self._config())),
            )

    def _load(self, config: Config, *, empty_targets: bool = False) -> None:
        """All of it anew."""
        settings, contents = self._wanted_of(config)
        native = self.has_native_queue
        self._note(ruleset.load(settings, contents, native=native, empty_targets=empty_targets), settings)
        self._epochs.begin()
        self._forget_unsteered(contents, contents.datagram, contents.pools)
        self._wildcard_ports = set()
        self._set_wildcard_ports()

    def _wanted_of(self, config: Config) -> tuple[ruleset.Settings, ruleset.Contents]:
        if any(service.is_late for service in config.services):
            self._set_sysctls(config)
        return settings_of(config, handshake.measure()), contents_of(config)

    def _note(self, loaded: ruleset.Loaded, settings: ruleset.Settings) -> None:
        self._loaded = loaded
        self._rules = ruleset.our_rules(self._nftables)
        self._elements = ruleset.our_elements(self._nftables)
        try:
            _keep_hold(hold_file(self._config()), ruleset.hold(loaded.contents, settings.tcp_option))
        except OSError as error:
            self._log.error("a boot will not hold what is for steerd until it is there", why=str(error))

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
        config = self._config()
        if not any(service.is_late for service in config.services):
            return
        try:
            found = {difference.sysctl.name: difference for difference in sysctls.check() if difference.settable}
            changes = sysctls.apply(Path(config.gateway.run_dir)) if found else []
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
