"""What lies in what: endpoints among each other, pool prefixes among each other, and pools over endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from steerd.config.reader import Reader
from steerd.model import Endpoint, IPAddress, IPNetwork


class _Span(NamedTuple):
    """Numbers `first`..`last` of one kind (ports of an address, addresses of a family), and where they are written."""

    kind: tuple[int, ...]
    first: int
    last: int
    place: int
    key: str
    text: str


def _overlapping(spans: Iterable[_Span]) -> Iterator[tuple[_Span, _Span]]:
    """Each span that overlaps another, with one that it overlaps, the one written later first."""
    widest: _Span | None = None
    for span in sorted(spans):
        if widest is None or widest.kind != span.kind:
            widest = span
            continue
        if span.first <= widest.last:
            yield (span, widest) if span.place > widest.place else (widest, span)
        if span.last > widest.last:
            widest = span


def check_overlaps(
    prefixes: Mapping[str, Mapping[str, IPNetwork]], endpoints: Mapping[str, Mapping[str, Endpoint]], reader: Reader
) -> None:
    """Endpoints among each other, pool prefixes among each other, and pools over endpoints. Whole prefixes count, even
    where `size` uses only a part of them: in mode `anyip` the kernel takes all of a prefix for local."""
    all_prefixes = [(key, prefix) for pool in prefixes.values() for key, prefix in pool.items()]
    all_endpoints = [(key, endpoint) for service in endpoints.values() for key, endpoint in service.items()]
    port_spans = [
        _Span((e.protocol, e.address.version, int(e.address)), e.first_port, e.last_port, place, key, str(e))
        for place, (key, e) in enumerate(all_endpoints)
    ]
    address_spans = [
        _Span((p.version,), int(p.network_address), int(p.broadcast_address), place, key, str(p))
        for place, (key, p) in enumerate(all_prefixes)
    ]
    for spans in (port_spans, address_spans):
        for later, earlier in _overlapping(spans):
            reader.problem(later.key, f"{later.text} overlaps {earlier.text} ({earlier.key}).")
    for key, prefix in all_prefixes:
        inside = next(((k, e) for k, e in all_endpoints if _holds(prefix, e.address)), None)
        if inside is not None:
            reader.problem(key, f"{prefix} holds {inside[1].address}, the address of an endpoint ({inside[0]}).")


def _holds(prefix: IPNetwork, address: IPAddress) -> bool:
    return address.version == prefix.version and address in prefix
