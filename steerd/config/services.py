"""`[services.NAME]`: its keys against each other, and against what its endpoints speak."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from steerd.config import schema
from steerd.config.conditions import Conditions
from steerd.config.parsers import PORT_EXTENSION, PROXY, QUIC, is_every
from steerd.config.reader import Reader, check_name, instead, join, shown
from steerd.config.routes import read_routes
from steerd.config.sessions import read_sessions
from steerd.config.targets import Scene, check_families, read_choice, read_targets
from steerd.config.texts import MAX_EXTENDED_PORT, parse_endpoint, parse_network
from steerd.config.values import MAX_PORT, ExtensionPool, Service, Unextended
from steerd.model import PROTOCOL_NAMES, TCP, UDP, Choice, Endpoint, IPNetwork, Match, Outcome, Route, Target
from steerd.wire import quic, quic_lb
from steerd.wire.registry import DATAGRAMS, PARSER_NAMES, transports

_IDLE_TIMEOUT = 120


def read_endpoints(name: str, raw: schema.Service, reader: Reader) -> dict[str, Endpoint]:
    """A service's endpoints by their dotted keys, without those that were reported."""
    check_name("services", name, reader)
    path = join(join("services", name), "endpoints")
    if not raw.endpoints and not reader.is_bad(path):
        reader.problem(path, 'Names no endpoint; one would be "203.0.113.10:443/tcp".')
    found = {f"{path}[{i}]": reader.attempt(f"{path}[{i}]", parse_endpoint, t) for i, t in enumerate(raw.endpoints)}
    return {key: endpoint for key, endpoint in found.items() if endpoint is not None}


def read_service(name: str, raw: schema.Service, scene: Scene) -> Service:
    """A service whose endpoints are in the scene already; mistakes are reported there."""
    reader = scene.reader
    path = join("services", name)
    endpoints = tuple(scene.endpoints[name].values())
    inspect = _read_inspect(raw.inspect, f"{path}.inspect", reader)
    unextended = _read_unextended(raw, inspect, endpoints, path, reader)
    # Where an endpoint is wrong, nothing can be said about the families of them all.
    versions: set[int] = {4, 6} if reader.is_bad(f"{path}.endpoints") else {e.address.version for e in endpoints}
    choice = _read_choice_of_service(raw, path, inspect, reader)
    scene.is_tcp = all(endpoint.protocol == TCP for endpoint in endpoints)
    default: tuple[Target, ...] = ()
    if raw.default is not None:
        default = read_targets(raw.default, f"{path}.default", versions, scene, choice, f"{path}.choose")
    on_silence: tuple[Target, ...] = ()
    if raw.on_silence is not None:
        on_silence = read_targets(raw.on_silence, f"{path}.on_silence", versions, scene, choice, f"{path}.choose")
    if not (reader.is_bad(f"{path}.endpoints") or reader.is_bad(f"{path}.inspect")):
        _check_transports(raw, inspect, endpoints, path, reader)
    if unextended is not Unextended.INSPECT and not reader.is_bad(f"{path}.inspect"):
        _check_nothing_inspected(raw, path, reader)
    extension_pool = _read_extension_pool(raw, path, versions, scene)
    sessions = read_sessions(raw.sessions, path, inspect, versions, scene)
    routes = read_routes(raw.routes, path, inspect, versions, scene)
    connection_ids = _read_connection_ids(raw.quic, f"{path}.quic.connection_ids", reader)
    if not reader.is_bad(f"{path}.quic"):
        _check_server_ids(routes, connection_ids, reader)
    ways = {
        # Routes may come while it runs.
        "inspect": raw.inspect,
        "routes": raw.routes,
        "default": raw.default,
        "extension_pool": raw.extension_pool,
        "sessions": raw.sessions is not None,
    }
    if not any(way or reader.is_bad(f"{path}.{key}") for key, way in ways.items()):
        reader.problem(path, "Can never steer anything: it has no inspect, no routes, no default, no extension_pool.")
    return Service(
        name=name,
        endpoints=endpoints,
        inspect=inspect,
        default=default,
        choice=choice,
        unmatched=Outcome(raw.unmatched),
        unextended=unextended,
        first_payload_timeout=10.0 if raw.first_payload_timeout is None else raw.first_payload_timeout,
        on_silence=on_silence,
        idle_timeout=_IDLE_TIMEOUT if raw.idle_timeout is None else raw.idle_timeout,
        rebinding=QUIC in inspect and _read_rebinding(raw.quic, f"{path}.quic.rebinding", reader),
        connection_ids=connection_ids,
        extension_pool=extension_pool,
        sessions=sessions,
        trusted_proxies=_read_trusted_proxies(raw, inspect, path, reader),
        routes=routes,
    )


def _read_choice_of_service(raw: schema.Service, path: str, inspect: tuple[str, ...], reader: Reader) -> Choice | None:
    key = f"{path}.choose"
    if raw.choose is not None and raw.default is None and raw.on_silence is None and not reader.is_bad(key):
        reader.problem(
            key, "Is how a target of default or on_silence is chosen, and there is neither; routes say theirs."
        )
    conditions = None if reader.is_bad(f"{path}.inspect") else Conditions(inspect, reader)
    return read_choice(raw.choose, raw.hash, f"{path}.", conditions, reader)


def _check_nothing_inspected(raw: schema.Service, path: str, reader: Reader) -> None:
    for key in ("on_silence", "first_payload_timeout"):
        if getattr(raw, key) is not None and not reader.is_bad(f"{path}.{key}"):
            reader.problem(f"{path}.{key}", "Means nothing unless first payloads are inspected: name a parser.")
    if raw.unmatched == "tls-alert" and not reader.is_bad(f"{path}.unmatched"):
        reader.problem(f"{path}.unmatched", 'Is "tls-alert", but no first payload is inspected; name "tls" in inspect.')


def _check_transports(
    raw: schema.Service, inspect: tuple[str, ...], endpoints: tuple[Endpoint, ...], path: str, reader: Reader
) -> None:
    """What is inspected, and other keys, against what the endpoints speak."""
    spoken = {endpoint.protocol: endpoint for endpoint in reversed(endpoints)}
    parsers = [word for word in inspect if word != PORT_EXTENSION]
    for index, word in enumerate(raw.inspect):
        if word in parsers and not any(protocol in spoken for protocol in transports(word)):
            read = " and ".join(PROTOCOL_NAMES[protocol].upper() for protocol in transports(word))
            reader.problem(f"{path}.inspect[{index}]", f"{shown(word)} reads {read}, and no endpoint is of that kind.")
    for protocol, endpoint in spoken.items():
        if parsers and not any(protocol in transports(word) for word in parsers):
            reader.problem(
                f"{path}.inspect",
                f"Names no parser that reads {PROTOCOL_NAMES[protocol].upper()}, but {endpoint} is an endpoint; name"
                " one, or give the endpoint a service of its own.",
            )
    if UDP in spoken:
        every = [word for word in parsers if is_every(word)]
        flows = [
            word for word in parsers if UDP in transports(word) and DATAGRAMS[word].exclusive and word not in every
        ]
        if every and flows:
            reader.problem(
                f"{path}.inspect",
                f"Names {shown(every[0])}, by which every datagram is decided, and {shown(flows[0])}, by which a"
                " whole flow is; a UDP endpoint can have one of the two.",
            )
    elif raw.idle_timeout is not None:
        reader.problem(f"{path}.idle_timeout", "Means nothing unless an endpoint is UDP.")
    if raw.quic is not None and QUIC not in inspect:
        reader.problem(f"{path}.quic", f'Means nothing unless inspect names "{QUIC}".')
    if TCP not in spoken:
        if raw.on_silence is not None:
            reader.problem(f"{path}.on_silence", "Means nothing unless an endpoint is TCP.")
        if raw.unmatched == "tls-alert":
            reader.problem(f"{path}.unmatched", 'Is "tls-alert", but no endpoint is TCP.')


def _read_rebinding(raw: schema.Quic | None, path: str, reader: Reader) -> bool:
    """By default, unless connection ids say themselves where they belong. Then the beginning of one may be that of
    another daemon's, and must not be learnt."""
    if raw is None or raw.rebinding is None:
        return raw is None or not raw.connection_ids
    if raw.rebinding and raw.connection_ids:
        reader.problem(
            path, "Cannot be true beside connection_ids, which tell whose a connection is wherever it moves."
        )
    return raw.rebinding


def _read_connection_ids(raw: schema.Quic | None, path: str, reader: Reader) -> tuple[quic_lb.Config, ...]:
    found: dict[int, quic_lb.Config] = {}
    for index, each in enumerate(raw.connection_ids if raw is not None else []):
        where = f"{path}[{index}]"
        if reader.is_bad(where):
            continue
        if each.config in found:
            reader.problem(f"{where}.config", f"Is {each.config} a second time; each configuration has its own number.")
        if each.server_id_length + each.nonce_length > 19:
            reader.problem(
                where,
                f"Makes connection ids of {1 + each.server_id_length + each.nonce_length} bytes; they have at most 20,"
                " of which the first is for the configuration's number.",
            )
        key = None if each.key is None else reader.attempt(f"{where}.key", _parse_aes_key, each.key)
        found[each.config] = quic_lb.Config(each.config, each.server_id_length, each.nonce_length, key)
    return tuple(found.values())


def _check_server_ids(routes: Iterable[Route], configs: Collection[quic_lb.Config], reader: Reader) -> None:
    digits = sorted({2 * config.server_id_length for config in configs})
    for route in routes:
        for key, match, value in route.conditions:
            if key != quic.SERVER_ID:
                continue
            where = f"{route.name}.when.{key}"
            if not digits:
                reader.problem(where, "Can never match: quic.connection_ids does not say how daemons make theirs.")
            elif match is Match.EXACT and not (len(value) in digits and re.fullmatch("[0-9a-f]*", value)):
                wanted = " or ".join(map(str, digits))
                reader.problem(where, f"Can never match: server ids have {wanted} hexadecimal digits here.")


def _parse_aes_key(text: str) -> bytes:
    if not re.fullmatch(r"[0-9A-Fa-f]{32}", text):
        raise ValueError("Must be a key of 16 bytes: 32 hexadecimal digits.")
    return bytes.fromhex(text)


def _read_trusted_proxies(
    raw: schema.Service, inspect: tuple[str, ...], path: str, reader: Reader
) -> tuple[IPNetwork, ...]:
    key = f"{path}.trusted_proxies"
    if reader.is_bad(f"{path}.inspect") or reader.is_bad(key):
        return ()
    if PROXY not in inspect:
        if raw.trusted_proxies:
            reader.problem(key, f'Means nothing unless inspect names "{PROXY}".')
        return ()
    if not raw.trusted_proxies:
        reader.problem(key, f'Is missing; since inspect names "{PROXY}", it must name the proxies: "192.0.2.0/24".')
    # Where the first payload is not looked at, a daemon would believe the header of anybody.
    if PORT_EXTENSION in inspect:
        reader.problem(
            f"{path}.inspect",
            f'Names "{PROXY}" and "{PORT_EXTENSION}"; a SYN with an extension is steered before a PROXY header.',
        )
    if raw.on_silence is not None:
        reader.problem(
            f"{path}.on_silence", f'Cannot go with "{PROXY}": who was silent may send a PROXY header afterwards.'
        )
    if next(parser for parser in inspect if parser != PORT_EXTENSION) != PROXY:
        reader.problem(f"{path}.inspect", f'Names "{PROXY}" behind another parser; its header comes first.')
    found = [reader.attempt(f"{key}[{index}]", parse_network, text) for index, text in enumerate(raw.trusted_proxies)]
    return tuple(network for network in found if network is not None)


def _read_inspect(words: list[str], path: str, reader: Reader) -> tuple[str, ...]:
    known = [PORT_EXTENSION, *PARSER_NAMES]
    found: list[str] = []
    for index, word in enumerate(words):
        key = f"{path}[{index}]"
        if reader.is_bad(key):
            continue
        if word not in known:
            reader.problem(key, f"{shown(word)} is not a parser; {instead(word, known)}")
        elif word in found:
            reader.problem(key, f"{shown(word)} is there twice; each parser is asked once.")
        else:
            found.append(word)
    return tuple(found)


def _read_unextended(
    raw: schema.Service, inspect: tuple[str, ...], endpoints: tuple[Endpoint, ...], path: str, reader: Reader
) -> Unextended:
    key = f"{path}.unextended"
    inspects_payload = any(parser != PORT_EXTENSION for parser in inspect)
    if raw.unextended is not None and PORT_EXTENSION not in raw.inspect and not reader.is_bad(f"{path}.inspect"):
        reader.problem(key, f'Means nothing unless inspect names "{PORT_EXTENSION}".')
    if raw.unextended == "inspect" and not inspects_payload and not reader.is_bad(f"{path}.inspect"):
        reader.problem(key, 'Is "inspect", but inspect names no parser that reads a first payload.')
    if raw.unextended == "default" and raw.default is None:
        reader.problem(key, 'Is "default", but the service has no default target.')
    if raw.unextended is not None:
        return Unextended(raw.unextended)
    if inspects_payload:
        return Unextended.INSPECT
    if PORT_EXTENSION not in inspect:
        return Unextended.DEFAULT if raw.default is not None else Unextended.UNMATCHED
    ranges = [endpoint for endpoint in endpoints if endpoint.first_port != endpoint.last_port]
    if ranges and not reader.is_bad(key):
        reader.problem(
            key,
            f'Is missing; since {ranges[0]} is a port range, it must be written out: "pass", "default" or "unmatched".',
        )
    return Unextended.UNMATCHED


def _read_extension_pool(raw: schema.Service, path: str, versions: set[int], scene: Scene) -> ExtensionPool | None:
    reader = scene.reader
    inspect = f"{path}.inspect"
    path = f"{path}.extension_pool"
    arithmetic = raw.extension_pool
    if arithmetic is None or reader.is_bad(path):
        return None
    if PORT_EXTENSION not in raw.inspect and not reader.is_bad(inspect):
        reader.problem(path, f'Means nothing unless inspect names "{PORT_EXTENSION}".')
    pool = scene.pools.get(arithmetic.pool)
    if pool is None:
        message = f"{shown(arithmetic.pool)} is not a pool; {instead(arithmetic.pool, scene.pools)}"
        reader.problem(f"{path}.pool", message)
        return None
    counts = {version: pool.alias_count(version) for version in (4, 6)}
    if not reader.is_bad(join("pools", pool.name)):
        check_families((version for version in (4, 6) if counts[version]), versions, f"{path}.pool", reader)

    port = 0 if arithmetic.port == "same" else arithmetic.port
    if arithmetic.by == "extension":
        first, highest, what = arithmetic.first or 1, MAX_PORT, "extension"
    else:
        first, highest, what = arithmetic.first or 65537, MAX_EXTENDED_PORT, "extended port"
        if not port:
            reader.problem(f"{path}.port", 'Must be a port from 1 to 65535 where by = "extended-port".')
        if first <= 65536 or first % 65536 == 0:
            reader.problem(
                f"{path}.first",
                f"Is {first}; an extended port is extension * 65536 + port with both at least 1, from 65537 on.",
            )
            return None
    # A pool may go on behind the last number: what lies there is reached by routes alone.
    if first > highest:
        reader.problem(f"{path}.first", f"Is {first}, and the highest {what} is {highest}.")
    return ExtensionPool(pool, arithmetic.by, first, port, arithmetic.wildcard)
