"""Services of the configuration in force, and their endpoints. Both change with a reload only."""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from typing import Literal

from msgspec import Struct

from steerd.config import Service
from steerd.config.texts import parse_endpoint
from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Page, Request
from steerd.errors import RequestError
from steerd.model import PROTOCOL_NAMES, TCP, Endpoint

Decides = Literal["syn", "first payload", "first datagrams", "every datagram"]


class ServiceName(Struct, frozen=True):
    """Which service."""

    service: str


class ServiceView(Struct, frozen=True):
    """One service for people and programs outside."""

    name: str
    endpoints: list[str]
    inspect: list[str]
    default: list[str]
    """Empty: who matches nothing is answered as `unmatched` says."""
    choose: str | None
    """How one of several targets of `default` or `on_silence` is chosen."""
    unmatched: str
    unextended: str
    on_silence: list[str]
    extension_pool: str | None
    sessions: str | None
    """The key whose value is the session id."""
    static_routes: int
    dynamic_routes: int


class EndpointView(Struct, frozen=True):
    """One endpoint for people and programs outside."""

    endpoint: str
    service: str
    address: str
    first_port: int
    last_port: int
    protocol: str
    decides: Decides
    """What decides where a connection goes; of `first payload`, an extension in the SYN where `inspect` asks for it."""
    is_here: bool
    """Its address is one of this machine now; else no connection to it is steered."""


class ServicePage(Struct, frozen=True):
    """A part of the services; `next` is the `after` of the next part."""

    services: list[ServiceView]
    next: str | None


class EndpointPage(Struct, frozen=True):
    """A part of the endpoints; `next` is the `after` of the next part."""

    endpoints: list[EndpointView]
    next: str | None


def list_services(context: Context, request: Request[Nothing, Page, Nothing]) -> Answer:
    services = context.config.services
    start = bisect_right(services, request.query.after, key=attrgetter("name"))
    page = services[start : start + request.query.limit]
    more = start + len(page) < len(services)
    return Answer(200, ServicePage([_service(context, each) for each in page], page[-1].name if more else None))


def get_service(context: Context, request: Request[ServiceName, Nothing, Nothing]) -> Answer:
    _, service = context.registry.routes.of(request.path.service)
    return Answer(200, _service(context, service))


def list_endpoints(context: Context, request: Request[Nothing, Page, Nothing]) -> Answer:
    found = [(endpoint, service) for service in context.config.services for endpoint in service.endpoints]
    found.sort(key=lambda each: _order(each[0]))
    start = 0
    if request.query.after:
        try:
            after = _order(parse_endpoint(request.query.after))
        except ValueError as error:
            raise RequestError("invalid", "after", "Must be the `next` of the page before.") from error
        start = bisect_right(found, after, key=lambda each: _order(each[0]))
    page = found[start : start + request.query.limit]
    more = start + len(page) < len(found)
    elsewhere = context.machine.elsewhere({endpoint.address for endpoint, _ in page})
    views = [_endpoint(*each, is_here=each[0].address not in elsewhere) for each in page]
    return Answer(200, EndpointPage(views, str(page[-1][0]) if more else None))


def _service(context: Context, service: Service) -> ServiceView:
    static, dynamic = context.registry.routes.count(service.name)
    return ServiceView(
        name=service.name,
        endpoints=[str(endpoint) for endpoint in service.endpoints],
        inspect=list(service.inspect),
        default=context.registry.written(service.default),
        choose=None if service.choice is None else service.choice.policy,
        unmatched=service.unmatched.value,
        unextended=service.unextended.value,
        on_silence=context.registry.written(service.on_silence),
        extension_pool=None if service.extension_pool is None else service.extension_pool.pool.name,
        sessions=None if service.sessions is None else service.sessions.key,
        static_routes=static,
        dynamic_routes=dynamic,
    )


def _endpoint(endpoint: Endpoint, service: Service, *, is_here: bool) -> EndpointView:
    decides: Decides = "first payload" if service.is_late else "syn"
    if endpoint.protocol != TCP:
        decides = "every datagram" if service.decides_every_datagram else "first datagrams"
    return EndpointView(
        endpoint=str(endpoint),
        service=service.name,
        address=str(endpoint.address),
        first_port=endpoint.first_port,
        last_port=endpoint.last_port,
        protocol=PROTOCOL_NAMES[endpoint.protocol],
        decides=decides,
        is_here=is_here,
    )


def _order(endpoint: Endpoint) -> tuple[int, int, int, int]:
    """By address, port and protocol; no two endpoints have all the same."""
    return endpoint.address.version, int(endpoint.address), endpoint.first_port, endpoint.protocol


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "listServices",
        "GET",
        "/v1/services",
        "The services, by name.",
        handle=list_services,
        parameters=Nothing,
        query=Page,
        body=Nothing,
        answers={200: ServicePage},
    ),
    Operation(
        "getService",
        "GET",
        "/v1/services/{service}",
        "One service.",
        handle=get_service,
        parameters=ServiceName,
        query=Nothing,
        body=Nothing,
        answers={200: ServiceView},
        errors=("not_found",),
    ),
    Operation(
        "listEndpoints",
        "GET",
        "/v1/endpoints",
        "The endpoints of all services, by address.",
        handle=list_endpoints,
        parameters=Nothing,
        query=Page,
        body=Nothing,
        answers={200: EndpointPage},
        errors=("kernel",),
    ),
)
