"""Ties: two routes of a service that one connection can match both, while neither comes first (core.router.rivals)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from steerd.config import Service
from steerd.core.router import Shape, can_rank, canonical, rivals, sight
from steerd.model import Route

_View = dict[tuple[object, ...], Route]
"""Routes of one shape, by what those of another shape see of them."""


class Ties:
    """Finds them, one route after the other. What is looked up is remembered until `clear`, since an import asks for a
    million; what changes meanwhile is to be told."""

    def __init__(self) -> None:
        self._rivals: dict[tuple[str, Shape], list[Shape]] = {}
        self._views: dict[tuple[str, Shape, Shape], _View] = {}

    def clear(self) -> None:
        """Remember nothing."""
        self.shapes_changed()
        self.route_gone()

    def find(
        self,
        service: Service,
        shape: Shape,
        route: Route,
        shapes: Callable[[], Iterable[Shape]],
        routes: Callable[[Shape], Iterable[Route]],
    ) -> Route | None:
        """A route that ties with this one, which is of `shape`; None: there is none. `shapes`: those of all routes of
        the service, `routes`: all of its routes that are of a shape."""
        if (service.name, shape) not in self._rivals:
            order = service.key_order
            possible = [other for other in shapes() if can_rank(other, order)]
            self._rivals[service.name, shape] = sorted(rivals(shape, possible, order), key=canonical)
        for rival in self._rivals[service.name, shape]:
            seen = sight(route, rival)
            if seen is None:
                continue
            view = self._views.get((service.name, rival, shape))
            if view is None:
                view = self._views[service.name, rival, shape] = {}
                for each in routes(rival):
                    _see(view, each, shape)
            if (other := view.get((route.source, *seen))) is not None:
                return other
        return None

    def route_added(self, service: str, shape: Shape, route: Route) -> None:
        """There is one more route, of `shape`."""
        for (name, rival, other), view in self._views.items():
            if name == service and rival == shape:
                _see(view, route, other)

    def route_gone(self) -> None:
        """There is one route less."""
        self._views.clear()

    def shapes_changed(self) -> None:
        """A shape has its first route, or no route any more."""
        self._rivals.clear()


def _see(view: _View, route: Route, shape: Shape) -> None:
    seen = sight(route, shape)
    if seen is not None:
        view.setdefault((route.source, *seen), route)
