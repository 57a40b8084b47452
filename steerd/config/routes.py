"""`[[services.NAME.routes]]`, and routes that come by the API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from steerd.config import schema
from steerd.config.conditions import Conditions
from steerd.config.parsers import PROXY
from steerd.config.reader import Reader, described, shown
from steerd.config.targets import Place, Scene, check_families, read_choice, read_targets
from steerd.config.texts import parse_network
from steerd.config.values import Config, Service
from steerd.core.router import MAX_PROBES, conflicts, count_shapes
from steerd.errors import ConfigError
from steerd.model import UDP, IPNetwork, Policy, Route, Target
from steerd.wire.registry import PATTERNED, check_patterns


class RouteChecker:
    """Checks routes of one service that are not in the file (but in a request, say) as those in it are. Made once for
    many routes."""

    def __init__(self, config: Config, service: Service, place: Place | None = None) -> None:
        """`place` gives aliases to daemons on unix sockets; None: no route can lead there."""
        self._file = config.file
        self._reader = Reader()
        self._scene = Scene.of_request(config, self._reader)
        self._scene.relay = config.gateway.relay
        self._scene.place = place
        self._scene.is_tcp = UDP not in service.protocols
        self._conditions = Conditions(service.inspect, self._reader)
        self._versions: set[int] = {endpoint.address.version for endpoint in service.endpoints}

    def check(
        self,
        when: Mapping[str, object],
        target: object,
        source: str | None,
        choose: str | None = None,
        hash_: str | None = None,
    ) -> Route:
        """The route, without a name. Raises ConfigError, with the keys `when.KEY`, `target`, `source`, `choose` and
        `hash`."""
        route = self.check_match(when, source)
        self._scene.clear()
        coming = _coming(route.source, self._versions, self._conditions)
        policy = next((each for each in get_args(Policy) if each == choose), None)
        if choose is not None and policy is None:
            self._reader.problem("choose", f"Must be {described(Policy)}, not {shown(choose)}.")
        choice = read_choice(policy, hash_, "", self._conditions, self._reader)
        targets = read_targets(target, "target", coming, self._scene, choice, "choose")
        self._scene.check_for_request("target")
        self._give_up()
        return route._replace(targets=targets, choice=choice)

    def check_match(self, when: Mapping[str, object], source: str | None) -> Route:
        """What a route matches, without targets. Raises ConfigError as `check` does."""
        self._reader.clear()
        route = _read_route(schema.Route(None, dict(when), source), "", self._conditions, self._versions, self._scene)
        self._give_up()
        assert route is not None  # there was no mistake
        return route

    def _give_up(self) -> None:
        if self._reader.problems:
            raise ConfigError(self._file, self._reader.problems)


def read_routes(
    raws: list[schema.Route], path: str, inspect: tuple[str, ...], versions: set[int], scene: Scene
) -> tuple[Route, ...]:
    """The routes that are right by themselves; those that contradict each other are reported."""
    reader = scene.reader
    conditions = Conditions(inspect, reader)
    inspect_known = not reader.is_bad(f"{path}.inspect")
    routes = []
    for index, raw in enumerate(raws):
        key = f"{path}.routes[{index}]"
        route = _read_route(raw, key, conditions if inspect_known else None, versions, scene)
        if route is not None:
            routes.append(route)
    if inspect_known:
        _check_routes(routes, path, conditions.key_order, reader)
        _check_patterns(routes, path, inspect, reader)
    return tuple(routes)


def _read_route(
    raw: schema.Route, key: str, conditions: Conditions | None, versions: set[int], scene: Scene
) -> Route | None:
    """One route, or None if it has a mistake; `conditions` None: nothing can be said about those."""
    reader = scene.reader
    # An import may bring a million routes; `join` would look at each key anew.
    beginning = f"{key}." if key else ""
    found = () if conditions is None else conditions.read(raw.when, f"{beginning}when")
    source_key = f"{beginning}source"
    source = None if raw.source is None else reader.attempt(source_key, parse_network, raw.source)
    if conditions is not None and not found and raw.source is None and not reader.is_bad(key):
        reader.problem(key, "Has neither a condition nor a source; what matches everything is default.")
    coming = _coming(source, versions, conditions)
    if source is not None and not coming:
        check_families((source.version,), versions, source_key, reader)
    choice = read_choice(raw.choose, raw.hash, beginning, conditions, reader)
    targets: tuple[Target, ...] = ()
    if raw.target is not None:
        targets = read_targets(raw.target, f"{beginning}target", coming, scene, choice, f"{beginning}choose")
    return None if reader.is_bad(key) else Route(key, found, source, targets, choice)


def _coming(source: IPNetwork | None, versions: set[int], conditions: Conditions | None) -> set[int]:
    """The families of connections that a route with this source can be for; a PROXY header's source is of any."""
    if source is None or conditions is None or PROXY in conditions.inspect:
        return versions
    return versions & {source.version}


def _check_routes(routes: list[Route], path: str, key_order: tuple[tuple[str, ...], ...], reader: Reader) -> None:
    for conflict in conflicts(routes, key_order):
        other = routes[conflict.other].name
        message = (
            f"Has the same conditions and the same source as {other}; one of the two must go."
            if conflict.duplicate
            else f"Ties with {other}: one connection can match both, and neither comes first; add a condition to one."
        )
        reader.problem(routes[conflict.route].name, message)
    shapes = count_shapes(routes)
    if shapes > MAX_PROBES:
        reader.problem(
            f"{path}.routes",
            f"Have {shapes} different combinations of keys, pattern lengths and source prefix lengths; at most"
            f" {MAX_PROBES} can be looked up for each connection.",
        )


def _check_patterns(routes: list[Route], path: str, inspect: tuple[str, ...], reader: Reader) -> None:
    """Whether each parser can work with the values of all routes together; each by itself is checked before."""
    for parser in (word for word in inspect if word in PATTERNED):
        values = {c.value for route in routes for c in route.conditions if c.key == PATTERNED[parser]}
        try:
            check_patterns(parser, values)
        except ValueError as error:
            reader.problem(f"{path}.routes", f"Have values that the parser {shown(parser)} cannot take: {error}")
