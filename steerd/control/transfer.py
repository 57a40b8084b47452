"""Export and import: what the registry holds beside the configuration, as text. One JSON object a line:

    {"kind":"registry","format":1}
    {"kind":"route","service":"web","when":{"http.host":"a.example"},"target":["10.64.0.7:8080"]}
    {"kind":"lease","name":"a","pool":"tenants","addresses":["10.64.0.8"],"service":"web","when":{...},"port":8080}
    {"kind":"released","name":"b","pool":"tenants","addresses":["10.64.0.9"],"until":1800000000.0}
    {"kind":"drain","target":"10.64.0.7:8080","since":1800000000}

First the dynamic routes that are no lease's, by service, shape and value; then the leases by name; then who had which
alias last, by name; then the drains, by address and port. The order and every character depend on nothing but what
there is: what was exported, imported into an empty registry and exported again is the same text. Values are written as
in the configuration; `source`, `ttl`, `expires` and the like are left out where there is none. Sessions of the API are
not in it.

An import adds and changes, and removes nothing. Lines come in batches (`load`), each one a transaction that is on the
disk before it is acknowledged, or leaves nothing behind if one of its lines cannot be. Lines that say what is there
already change nothing, so an import that broke off is simply made again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import msgspec

from steerd.control.drains import DrainLine
from steerd.control.leases import LeaseLine, ReleasedLine
from steerd.control.route_records import RouteLine
from steerd.errors import RequestError

if TYPE_CHECKING:
    from steerd.control.registry import Registry

FORMAT = 1
_CHUNK_LINES = 1000


class Heading(msgspec.Struct, frozen=True, tag_field="kind", tag="registry"):
    """The first line."""

    format: int


class Loaded(msgspec.Struct):
    """What a batch of lines changed."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0


_decode = msgspec.json.Decoder(Heading | RouteLine | LeaseLine | ReleasedLine | DrainLine).decode
_encode = msgspec.json.Encoder(order="deterministic").encode


def export(registry: Registry) -> Generator[bytes, None, None]:
    """All lines, some thousand at a time, as they were at one moment: the one when the first are asked for."""
    with registry.reading() as txn:
        chunk = [_encode(Heading(FORMAT))]
        for lines in (registry.routes.lines(txn), registry.leases.lines(txn), registry.drains.lines(txn)):
            for line in lines:
                chunk.append(_encode(line))
                if len(chunk) == _CHUNK_LINES:
                    yield b"\n".join([*chunk, b""])
                    chunk.clear()
        yield b"\n".join([*chunk, b""])


def load(registry: Registry, text: bytes, first: int = 1) -> Loaded:
    """Carry out some lines in one transaction. Raises RequestError for the first one that cannot be, with `line N` for
    the field, counted from `first`; then nothing has changed."""
    if b'"unix' in text:
        _prepare_relays(registry, text)
    loaded = Loaded()
    afterwards: list[Callable[[], None]] = []
    with registry.lock:
        with registry.routes.changing() as txn:
            ids = registry.ids(txn)
            for number, line in enumerate(text.splitlines(), first):
                try:
                    if not line.strip():
                        continue
                    parsed = _decode(line)
                    if isinstance(parsed, RouteLine):
                        target: list[object] = [
                            each if isinstance(each, str) else msgspec.to_builtins(each) for each in parsed.target
                        ]
                        route = registry.routes.check(
                            parsed.service, parsed.when, target, parsed.source, parsed.choose, parsed.hash
                        )
                        change, _ = registry.routes.write(txn, ids, parsed.service, route)
                    elif isinstance(parsed, Heading):
                        _check_format(parsed)
                        continue
                    else:
                        took_effect = (
                            registry.drains.restore(txn, parsed)
                            if isinstance(parsed, DrainLine)
                            else registry.leases.restore(txn, parsed)
                        )
                        change = "unchanged" if took_effect is None else "added"
                        if took_effect is not None:
                            afterwards.append(took_effect)
                except msgspec.DecodeError as error:
                    raise RequestError(
                        "invalid", f"line {number}", f"Line {number} cannot be read: {error}."
                    ) from error
                except RequestError as error:
                    what = f" ({error.field})" if error.field else ""
                    raise RequestError(
                        error.code, f"line {number}", f"Line {number} cannot be carried out{what}: {error.message}"
                    ) from error
                setattr(loaded, change, getattr(loaded, change) + 1)
        for call in afterwards:
            call()
    return loaded


def _prepare_relays(registry: Registry, text: bytes) -> None:
    """Before any route leads there. Lines with mistakes are left for those who name them."""
    targets: list[object] = []
    for line in text.splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            if b'"unix' in line and isinstance(parsed := _decode(line), RouteLine):
                targets += map(msgspec.to_builtins, parsed.target)
    registry.relays.prepare(targets)


def _check_format(heading: Heading) -> None:
    if heading.format != FORMAT:
        raise RequestError(
            "invalid", "format", f"This is format {heading.format}, and this steerd reads format {FORMAT}."
        )
