"""What monitors read, as Prometheus wants it: names and meanings of all metrics, made from a Snapshot.

Labels are bounded. Services and parsers are those of the configuration (counters.py says how many), reasons, events and
causes are closed sets, pools and workers are the configuration's, and the table's counters are nft/steerd.nft's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from steerd.model import Reason
from steerd.telemetry.counters import BOUNDS, Counters, Extra, Gauge

_NANOSECONDS = 1_000_000_000
_NO_EVENT = (Extra.RESTARTS, Extra.NOT_LOGGED)


class Queue(NamedTuple):
    """One worker's queue; None of `depth`: nobody has bound it."""

    depth: int | None
    dropped: Mapping[str, int]
    """By cause."""


class Pool(NamedTuple):
    """One pool."""

    aliases: Mapping[str, int]
    """By address family: ipv4, ipv6."""
    leases: int
    quarantined: int


class Snapshot(NamedTuple):
    """All that is told at one moment. What could not be found out is None."""

    version: str
    counters: Counters
    queues: Sequence[Queue] | None
    """By worker."""
    pools: Mapping[str, Pool]
    routes: Mapping[str, Mapping[str, int]]
    """By service and origin."""
    sessions: int
    kernel_packets: Mapping[str, int] | None
    """By named counter of the table."""
    synproxy: Mapping[str, int] | None
    conntrack_entries: int | None
    conntrack_max: int | None


def exposition(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """The text of a scrape, and its Content-Type; `accept` is the request's header of that name."""
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(snapshot))
    return encode(registry), content_type


class _Families(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        for about in (_build, _decisions, _workers, _pending, _queues, _registry, _kernel):
            yield from about(self._snapshot)


def _counter(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _build(snapshot: Snapshot) -> Iterator[Metric]:
    yield InfoMetricFamily("steerd_build", "The running version.", value={"version": snapshot.version})


def _decisions(snapshot: Snapshot) -> Iterator[Metric]:
    decisions = CounterMetricFamily(
        "steerd_decisions",
        "Decisions, by service, by the parser that gave the keys (or port-extension, or none), and by reason.",
        labels=("service", "parser", "reason"),
    )
    seconds = HistogramMetricFamily(
        "steerd_decision_seconds",
        "From when a worker takes up the packet that decides until its target is known and loaded.",
        labels=("service",),
    )
    times: dict[str, tuple[list[int], int]] = {}
    for each in snapshot.counters.series():
        for reason in Reason:
            if each.reasons[reason]:
                decisions.add_metric((each.service, each.parser, reason.name.lower()), each.reasons[reason])
        classes, nanoseconds = times.get(each.service, ([0] * (len(BOUNDS) + 1), 0))
        summed = [one + other for one, other in zip(classes, each.times, strict=True)]
        times[each.service] = summed, nanoseconds + each.nanoseconds
    bounds = [*(f"{bound / _NANOSECONDS:g}" for bound in BOUNDS), "+Inf"]
    for service, (classes, nanoseconds) in times.items():
        if any(classes):
            cumulated = [sum(classes[: place + 1]) for place in range(len(classes))]
            seconds.add_metric((service,), list(zip(bounds, cumulated, strict=True)), nanoseconds / _NANOSECONDS)
    yield decisions
    yield seconds


def _workers(snapshot: Snapshot) -> Iterator[Metric]:
    counters = snapshot.counters
    restarts = [counters.slot(worker)[Extra.RESTARTS] for worker in range(counters.workers)]
    yield _counter(
        "steerd_worker_restarts",
        "Times that a worker died and was started again.",
        ("worker",),
        (((str(worker),), count) for worker, count in enumerate(restarts)),
    )
    yield _counter(
        "steerd_worker_events",
        "What workers count beside decisions; `steerctl status --legend` says what each means.",
        ("event",),
        (((extra.name.lower(),), counters.total(extra)) for extra in Extra if extra not in _NO_EVENT),
    )
    yield _counter(
        "steerd_log_suppressed",
        "Failed decisions that were not logged, since too many failed.",
        (),
        [((), counters.total(Extra.NOT_LOGGED))],
    )


def _pending(snapshot: Snapshot) -> Iterator[Metric]:
    total = snapshot.counters.total
    yield _gauge(
        "steerd_pending",
        "Connections and flows that more bytes have to come of before they can be decided.",
        ("kind",),
        [(("connections",), total(Gauge.PENDING_CONNECTIONS)), (("flows",), total(Gauge.PENDING_FLOWS))],
    )
    yield _gauge("steerd_pending_bytes", "Bytes held of these.", (), [((), total(Gauge.PENDING_BYTES))])


def _queues(snapshot: Snapshot) -> Iterator[Metric]:
    if snapshot.queues is None:
        return
    queues = [(str(worker), queue) for worker, queue in enumerate(snapshot.queues)]
    yield _gauge(
        "steerd_worker_up",
        "1 if the worker's queue is bound; while it is 0 the queue's packets are dropped.",
        ("worker",),
        (((worker,), int(queue.depth is not None)) for worker, queue in queues),
    )
    yield _gauge(
        "steerd_queue_depth",
        "Packets that the worker has not decided yet.",
        ("worker",),
        (((worker,), queue.depth) for worker, queue in queues if queue.depth is not None),
    )
    yield _counter(
        "steerd_queue_dropped",
        "Packets that the kernel dropped since the worker did not keep up: its queue or its socket was full.",
        ("worker", "cause"),
        (((worker, cause), count) for worker, queue in queues for cause, count in queue.dropped.items()),
    )


def _registry(snapshot: Snapshot) -> Iterator[Metric]:
    pools = snapshot.pools.items()
    yield _gauge(
        "steerd_aliases",
        "Aliases of a pool.",
        ("pool", "family"),
        (((name, family), count) for name, pool in pools for family, count in pool.aliases.items()),
    )
    yield _gauge("steerd_leases", "Leases of a pool.", ("pool",), (((name,), pool.leases) for name, pool in pools))
    yield _gauge(
        "steerd_quarantined",
        "Aliases of a pool whose lease ended a while ago, and which no other name gets yet.",
        ("pool",),
        (((name,), pool.quarantined) for name, pool in pools),
    )
    yield _gauge(
        "steerd_routes",
        "Routes: static ones are the configuration's, dynamic ones and those of leases come and go.",
        ("service", "origin"),
        (
            ((service, origin), count)
            for service, origins in snapshot.routes.items()
            for origin, count in origins.items()
        ),
    )
    yield _gauge("steerd_sessions", "Sessions of all services.", (), [((), snapshot.sessions)])


def _kernel(snapshot: Snapshot) -> Iterator[Metric]:
    if snapshot.kernel_packets is not None:
        yield _counter(
            "steerd_kernel_packets",
            "Packets that the table's named counters counted; `steerctl status --legend` says what each means.",
            ("counter",),
            (((name,), packets) for name, packets in sorted(snapshot.kernel_packets.items())),
        )
    if snapshot.synproxy is not None:
        yield _counter(
            "steerd_synproxy",
            "What the kernel's synproxy counted in this network namespace.",
            ("counter",),
            (((name,), count) for name, count in snapshot.synproxy.items()),
        )
    if snapshot.conntrack_entries is not None:
        yield _gauge("steerd_conntrack_entries", "Entries of conntrack.", (), [((), snapshot.conntrack_entries)])
    if snapshot.conntrack_max is not None:
        yield _gauge(
            "steerd_conntrack_max",
            "The most entries that conntrack takes; 0: there is no limit.",
            (),
            [((), snapshot.conntrack_max)],
        )
