"""`[gateway]`: queues, mark bits, the numbers of the port extension, the relay."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from steerd.config import schema
from steerd.config.reader import Reader, instead, join, shown
from steerd.config.texts import parse_directory, parse_group, parse_listen, parse_mark_bits
from steerd.config.values import Gateway, Metrics, Relay, Service
from steerd.core.marks import FIRST_TARGET_ID, MarkLayout
from steerd.core.pools import Pool
from steerd.wire.portext import Numbers

_MAX_QUEUES = 65535  # the last one is kernel.queue.RESERVED
_KERNEL_TCP_OPTIONS = {19: "MD5", 28: "user timeout", 29: "TCP-AO", 30: "MPTCP", 34: "Fast Open", 69: "TCP-ENO"}


def read_gateway(raw: schema.Gateway, reader: Reader) -> Gateway:
    """With something usable in place of what is wrong (and reported)."""
    for name, text in (("state_dir", raw.state_dir), ("run_dir", raw.run_dir)):
        reader.attempt(f"gateway.{name}", parse_directory, text)
    if raw.api.read_only_group is not None:
        reader.attempt("gateway.api.read_only_group", parse_group, raw.api.read_only_group)
    mark = reader.attempt("gateway.mark_bits", parse_mark_bits, raw.mark_bits)
    last_queue = raw.first_queue + raw.workers - 1
    if last_queue >= _MAX_QUEUES and not (reader.is_bad("gateway.first_queue") or reader.is_bad("gateway.workers")):
        reader.problem(
            "gateway.first_queue",
            f"With {raw.workers} workers the last queue would be {last_queue}; the highest is {_MAX_QUEUES - 1}.",
        )
    numbers = Numbers(*msgspec.structs.astuple(raw.port_extension))
    if (use := _KERNEL_TCP_OPTIONS.get(numbers.tcp_option)) is not None:
        reader.problem(
            "gateway.port_extension.tcp_option",
            f"Is {numbers.tcp_option}, which is taken ({use}); 253 and 254 are for experiments.",
        )
    return Gateway(
        state_dir=raw.state_dir,
        run_dir=raw.run_dir,
        user=raw.user,
        workers=raw.workers,
        first_queue=raw.first_queue,
        mark=mark or MarkLayout(8, 31),
        queue_length=raw.queue_length,
        receive_buffer=raw.receive_buffer,
        access_log=raw.access_log,
        limits=raw.limits,
        timeouts=raw.timeouts,
        pending=raw.pending,
        port_extension=numbers,
        api=raw.api,
        log=raw.log,
        metrics=Metrics(reader.attempt("gateway.metrics.listen", parse_listen, raw.metrics.listen)),
        relay=raw.relay,
    )


def check_relay(
    relay: Relay | None, services: Mapping[str, schema.Service], pools: Mapping[str, Pool], reader: Reader
) -> Relay | None:
    """The relay as it is, held against the pools, and the services that use them."""
    if relay is None:
        return None
    if relay.pool not in pools and not reader.is_bad("gateway.relay.pool"):
        message = f"{shown(relay.pool)} is not a pool; {instead(relay.pool, pools)}"
        reader.problem("gateway.relay.pool", message)
    if relay.pool in pools and pools[relay.pool].wake is not None:
        key = f"{join('pools', relay.pool)}.wake"
        reader.problem(key, "Wakes nobody: the aliases of this pool are the relay's (gateway.relay.pool).")
    for name, service in services.items():
        if service.extension_pool is not None and service.extension_pool.pool == relay.pool:
            key = f"{join('services', name)}.extension_pool.pool"
            reader.problem(key, f"Is {shown(relay.pool)}, whose aliases the relay gives away itself.")
    return relay


def check_ids(gateway: Gateway, services: list[Service], reader: Reader) -> None:
    """Whether the mark bits have room for an id of every target and of every alias that arithmetic can reach."""
    if reader.problems:
        return
    singles = {target for service in services for target in service.targets}
    blocks = {(s.extension_pool.pool, s.extension_pool.port) for s in services if s.extension_pool is not None}
    needed = len(singles) + sum(pool.alias_count(4) + pool.alias_count(6) for pool, _ in blocks)
    room = gateway.mark.highest_id - FIRST_TARGET_ID + 1
    if needed > room:
        reader.problem("gateway.mark_bits", f"Have room for {room} targets, but there are {needed}; use more bits.")
