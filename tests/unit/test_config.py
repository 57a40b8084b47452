"""The configuration: what a right one becomes, and the exact line for every mistake."""

from __future__ import annotations

import base64
import ipaddress
from pathlib import Path

import pytest

from steerd import config
from steerd.config import ExtensionPool, Limits, Listen, Log, Metrics, Pending, Timeouts, Unextended
from steerd.core.marks import MarkLayout
from steerd.core.pools import Pool
from steerd.core.router import MAX_PROBES
from steerd.errors import ConfigError
from steerd.model import TCP, UDP, Choice, Condition, Endpoint, IPAddress, Match, Outcome, Route, Target
from steerd.wire import quic_lb, wireguard
from steerd.wire.portext import Numbers

FULL = """
[gateway]
state_dir = "/var/lib/other"
run_dir = "/run/other"
user = "agent"
workers = 3
first_queue = 100
mark_bits = "4-27"
queue_length = 1000
receive_buffer = 1000000
access_log = 10
[gateway.limits]
source_rate = 1
source_burst = 2
stranger_rate = 3
stranger_burst = 4
total_rate = 5
total_burst = 6
[gateway.log]
format = "json"
level = "warning"
[gateway.metrics]
listen = "[::1]:9464"
[gateway.timeouts]
syn_sent = 1
syn_recv = 2
time_wait = 3
close = 4
[gateway.pending]
connection_bytes = 40000
source_connections = 7
connections = 8
[gateway.port_extension]
ipv4_option = 0x9F
ipv6_option = 0x3E
tcp_option = 254
exid = 1
[gateway.api]
read_only_group = "monitoring"

[pools.tenants]
prefixes = ["10.64.0.0/15", "fd00:64::/111"]
mode = "anyip"
size = 70000
[pools.spare]
prefixes = ["10.70.0.0/30"]

[services.web]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp", "203.0.113.10:8000-8999/tcp"]
inspect = ["port-extension", "http", "prefix"]
default = ["10.64.0.1:8080", { address = "[fd00:64::1]:same", wildcard = true }]
unmatched = "drop"
unextended = "pass"
extension_pool = { pool = "tenants", by = "extended-port", port = 7000, wildcard = true }
[[services.web.routes]]
when = { "http.host" = "A.example", "portext.src" = 7 }
source = "198.51.100.0/24"
target = "10.64.0.5:8080"
[[services.web.routes]]
when = { http.host = "*.Example", http.header = { X-Shard = "a*" } }
target = { address = "192.0.2.7:443", external = true, wildcard = true }
[[services.web.routes]]
when = { prefix = "hex:1603" }
target = ["10.64.0.6:same", "[fd00:64::6]:9"]
[[services.web.routes]]
when = { prefix = "SSH-*" }
target = "10.64.0.7:22"
[[services.web.routes]]
when = { portext = { dst = "65535", port = 4294967295 } }
target = "10.70.0.3:1"
[[services.web.routes]]
source = "2001:db8:1::7"
target = "[fd00:64::7]:1"

[services.api]
endpoints = ["203.0.113.11:80/tcp"]
default = "10.64.0.2:80"
"""


def ip(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


def lines(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "f.toml")
    return str(caught.value).split("\n")


def test_a_full_configuration_becomes_values() -> None:
    read = config.parse(FULL, "f.toml")
    assert read.file == "f.toml"
    assert read.gateway == config.Gateway(
        state_dir="/var/lib/other",
        run_dir="/run/other",
        user="agent",
        workers=3,
        first_queue=100,
        mark=MarkLayout(4, 27),
        queue_length=1000,
        receive_buffer=1000000,
        access_log=10,
        limits=Limits(1, 2, 3, 4, 5, 6),
        timeouts=Timeouts(1, 2, 3, 4),
        pending=Pending(40000, 7, 8),
        port_extension=Numbers(0x9F, 0x3E, 254, 1),
        api=config.Api("monitoring"),
        log=Log("json", "warning"),
        metrics=Metrics(Listen("::1", 9464, "")),
    )
    tenants = Pool(
        "tenants", (ipaddress.ip_network("10.64.0.0/15"), ipaddress.ip_network("fd00:64::/111")), "anyip", 70000
    )
    assert read.pools == {
        "tenants": tenants,
        "spare": Pool("spare", (ipaddress.ip_network("10.70.0.0/30"),), "addresses", None),
    }
    api, web = read.services
    assert (api.name, api.inspect, api.unextended, api.unmatched) == ("api", (), Unextended.DEFAULT, Outcome.RESET)
    assert (api.default, api.extension_pool, api.routes) == ((Target(ip("10.64.0.2"), 80),), None, ())
    assert web.name == "web"
    assert web.endpoints == (
        Endpoint(ip("203.0.113.10"), 443, 443, TCP),
        Endpoint(ip("2001:db8::10"), 443, 443, TCP),
        Endpoint(ip("203.0.113.10"), 8000, 8999, TCP),
    )
    assert web.default == (Target(ip("10.64.0.1"), 8080), Target(ip("fd00:64::1"), 0))
    assert web.unmatched is Outcome.DROP
    assert web.unextended is Unextended.PASS
    assert web.extension_pool == ExtensionPool(tenants, "extended-port", 65537, 7000, True)
    assert web.key_order == (
        ("portext.dst", "portext.src", "portext.port"),
        ("http.host", "http.path", "http.method", "http.header.*", "http.cookie.*"),
        ("prefix",),
    )
    assert web.routes == (
        Route(
            "services.web.routes[0]",
            (Condition("http.host", Match.EXACT, "a.example"), Condition("portext.src", Match.EXACT, "7")),
            ipaddress.ip_network("198.51.100.0/24"),
            (Target(ip("10.64.0.5"), 8080),),
        ),
        Route(
            "services.web.routes[1]",
            (Condition("http.host", Match.SUFFIX, ".example"), Condition("http.header.x-shard", Match.PREFIX, "a")),
            None,
            (Target(ip("192.0.2.7"), 443),),
        ),
        Route(
            "services.web.routes[2]",
            (Condition("prefix", Match.PREFIX, "\x16\x03"),),
            None,
            (Target(ip("10.64.0.6"), 0), Target(ip("fd00:64::6"), 9)),
        ),
        Route(
            "services.web.routes[3]",
            (Condition("prefix", Match.PREFIX, "SSH-*"),),
            None,
            (Target(ip("10.64.0.7"), 22),),
        ),
        Route(
            "services.web.routes[4]",
            (Condition("portext.dst", Match.EXACT, "65535"), Condition("portext.port", Match.EXACT, "4294967295")),
            None,
            (Target(ip("10.70.0.3"), 1),),
        ),
        Route(
            "services.web.routes[5]",
            (),
            ipaddress.ip_network("2001:db8:1::7/128"),
            (Target(ip("fd00:64::7"), 1),),
        ),
    )
    assert read.wildcard == (Target(ip("fd00:64::1"), 0), Target(ip("192.0.2.7"), 443))


def test_everything_about_the_gateway_has_a_default() -> None:
    read = config.parse("", "f.toml")
    assert read.pools == {}
    assert read.services == ()
    gateway = read.gateway
    assert 1 <= gateway.workers <= 64
    assert (gateway.state_dir, gateway.run_dir) == ("/var/lib/steerd", "/run/steerd")
    assert (gateway.first_queue, gateway.mark, gateway.access_log) == (21300, MarkLayout(8, 31), 0)
    assert (gateway.queue_length, gateway.receive_buffer) == (4096, 8388608)
    assert gateway.limits == Limits(1000, 2000, 2000, 4000, 50000, 50000)
    assert gateway.timeouts == Timeouts(5, 5, 10, 2)
    assert gateway.port_extension == Numbers(0x9E, 0x1E, 253, 0x5354)
    assert (gateway.log, gateway.metrics) == (Log("auto", "info"), Metrics(None))


@pytest.mark.parametrize("text", ["127.0.0.1:9464", "[::1]:9464", "unix:/run/steerd/metrics.sock"])
def test_where_metrics_are_served(text: str) -> None:
    assert str(config.parse(f'[gateway.metrics]\nlisten = "{text}"', "f.toml").gateway.metrics.listen) == text


LATE_SERVICE = """
[pools.p]
prefixes = ["10.64.0.0/24"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
routes = [{ when = { "tls.sni" = "a.example" }, target = "10.64.0.1:443" }]
"""


def test_a_service_that_inspects_payloads_is_late_unless_it_says_otherwise() -> None:
    for more, late in (
        ('inspect = ["tls"]', True),
        ('inspect = ["port-extension", "tls"]', True),
        ('inspect = ["port-extension", "tls"]\nunextended = "inspect"', True),
        ('inspect = ["port-extension", "tls"]\nunextended = "pass"', False),
    ):
        text = LATE_SERVICE.replace("routes =", f"{more}\nroutes =")
        assert config.parse(text, "f.toml").services[0].is_late is late


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            'inspect = ["proxy", "tls"]',
            'trusted_proxies: Is missing; since inspect names "proxy", it must name the proxies: "192.0.2.0/24".',
        ),
        (
            'inspect = ["tls"]\ntrusted_proxies = ["192.0.2.0/24"]',
            'trusted_proxies: Means nothing unless inspect names "proxy".',
        ),
        (
            'inspect = ["tls", "proxy"]\ntrusted_proxies = ["192.0.2.0/24"]',
            'inspect: Names "proxy" behind another parser; its header comes first.',
        ),
        (
            'inspect = ["proxy", "tls"]\ntrusted_proxies = ["192.0.2.1/24"]',
            'trusted_proxies[0]: "192.0.2.1/24" has bits set behind the prefix length; "192.0.2.0/24" would be right.',
        ),
        (
            'inspect = ["port-extension", "tls"]\nunextended = "pass"\non_silence = "10.64.0.2:25"',
            "on_silence: Means nothing unless first payloads are inspected: name a parser.",
        ),
        (
            'inspect = ["port-extension", "tls"]\nunextended = "pass"\nunmatched = "tls-alert"',
            'unmatched: Is "tls-alert", but no first payload is inspected; name "tls" in inspect.',
        ),
        (
            'inspect = ["tls"]\nfirst_payload_timeout = 0',
            "first_payload_timeout: Must be a number from 0.01 to 600, not 0.",
        ),
    ],
)
def test_mistakes_about_first_payloads_are_one_line(more: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(LATE_SERVICE.replace("routes =", f"{more}\nroutes ="), "f.toml")
    assert str(caught.value).splitlines() == [f"f.toml: services.web.{problem}"]


def test_what_a_late_service_says_about_those_who_wait() -> None:
    more = 'inspect = ["tls"]\nunmatched = "tls-alert"\nfirst_payload_timeout = 0.5\non_silence = "10.64.0.2:25"'
    (service,) = config.parse(LATE_SERVICE.replace("routes =", f"{more}\nroutes ="), "f.toml").services
    assert (service.unmatched, service.first_payload_timeout) == (Outcome.ALERT, 0.5)
    assert service.on_silence == (Target(ip("10.64.0.2"), 25),)
    (plain,) = config.parse(LATE_SERVICE.replace("routes =", 'inspect = ["tls"]\nroutes ='), "f.toml").services
    assert (plain.first_payload_timeout, plain.on_silence) == (10.0, ())


PROXIED = """
[pools.p]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
inspect = ["proxy", "tls"]
trusted_proxies = ["192.0.2.0/24"]
routes = [{ when = { "tls.sni" = "a.example" }, source = "2001:db8:1::/48", target = "10.64.0.1:443" }]
"""


def test_behind_a_proxy_a_source_may_be_of_another_family_than_the_connection() -> None:
    """The PROXY header names the client, who came to the proxy by IPv6."""
    ((route,),) = (service.routes for service in config.parse(PROXIED, "f.toml").services)
    assert (route.source, route.targets) == (ipaddress.ip_network("2001:db8:1::/48"), (Target(ip("10.64.0.1"), 443),))
    assert lines(PROXIED.replace("10.64.0.1:443", "[fd00:64::1]:443")) == [
        "f.toml: services.web.routes[0].target: Has addresses of IPv6 only, but what comes here is IPv4."
    ]
    direct = PROXIED.replace('"proxy", ', "").replace('trusted_proxies = ["192.0.2.0/24"]', "")
    assert lines(direct) == [
        "f.toml: services.web.routes[0].source: Has addresses of IPv6 only, but what comes here is IPv4."
    ]


DATAGRAM_SERVICE = """
[pools.p]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.web]
endpoints = [ENDPOINTS]
inspect = [INSPECT]
default = "10.64.0.1:same"
"""


def datagram_service(inspect: str, more: str = "", endpoints: str = '"203.0.113.10:443/udp"') -> str:
    return DATAGRAM_SERVICE.replace("ENDPOINTS", endpoints).replace("INSPECT", inspect) + more


BOTH = '"203.0.113.10:443/tcp", "203.0.113.10:443/udp"'
TCP_ONLY = '"203.0.113.10:443/tcp"'


def connection_ids(*tables: str) -> str:
    return f"[services.web.quic]\nconnection_ids = [{', '.join(f'{{ {table} }}' for table in tables)}]\n"


def to_server_id(text: str) -> str:
    return f'[[services.web.routes]]\nwhen.quic.server-id = "{text}"\ntarget = "10.64.0.1:443"\n'


def test_a_service_of_datagrams() -> None:
    (plain,) = config.parse(datagram_service('"quic"'), "f.toml").services
    assert plain.protocols == {UDP}
    assert (plain.is_late, plain.decides_every_datagram, plain.unextended) == (False, False, Unextended.INSPECT)
    assert (plain.idle_timeout, plain.rebinding, plain.connection_ids) == (120, True, ())
    more = """
idle_timeout = 77
[services.web.quic]
rebinding = false
connection_ids = [
    { config = 0, server_id_length = 3, nonce_length = 4 },
    { config = 6, server_id_length = 8, nonce_length = 8, key = "000102030405060708090A0B0C0D0E0f" },
]
"""
    (full,) = config.parse(datagram_service('"quic", "tls"', more, BOTH), "f.toml").services
    assert full.protocols == {TCP, UDP}
    assert (full.is_late, full.decides_every_datagram) == (True, False)
    assert (full.idle_timeout, full.rebinding) == (77, False)
    assert full.connection_ids == (quic_lb.Config(0, 3, 4, None), quic_lb.Config(6, 8, 8, bytes(range(16))))
    ids = connection_ids("config = 0, server_id_length = 2, nonce_length = 4")
    text = datagram_service('"quic"', ids + to_server_id("0A0b") + to_server_id("0c*"))
    (by_id,) = config.parse(text, "f.toml").services
    assert [route.conditions[0].value for route in by_id.routes] == ["0a0b", "0c"]
    (names,) = config.parse(datagram_service('"dns"', endpoints=BOTH), "f.toml").services
    assert (names.is_late, names.decides_every_datagram, names.rebinding) == (True, True, False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            datagram_service('"quic", "http"'),
            'inspect[1]: "http" reads TCP, and no endpoint is of that kind.',
        ),
        (
            datagram_service('"tls", "quic"', endpoints=TCP_ONLY),
            'inspect[1]: "quic" reads UDP, and no endpoint is of that kind.',
        ),
        (
            datagram_service('"tls"', endpoints=BOTH),
            "inspect: Names no parser that reads UDP, but 203.0.113.10:443/udp is an endpoint; name one, or give the"
            " endpoint a service of its own.",
        ),
        (
            datagram_service('"quic"', endpoints=BOTH),
            "inspect: Names no parser that reads TCP, but 203.0.113.10:443/tcp is an endpoint; name one, or give the"
            " endpoint a service of its own.",
        ),
        (
            datagram_service('"stun", "dns"'),
            'inspect: Names "dns", by which every datagram is decided, and "stun", by which a whole flow is; a UDP'
            " endpoint can have one of the two.",
        ),
        (
            datagram_service('"tls"', "idle_timeout = 60", TCP_ONLY),
            "idle_timeout: Means nothing unless an endpoint is UDP.",
        ),
        (
            datagram_service('"quic"', "idle_timeout = 0"),
            "idle_timeout: Must be a whole number from 1 to 4294967, not 0.",
        ),
        (
            datagram_service('"quic"', 'on_silence = "10.64.0.1:25"'),
            "on_silence: Means nothing unless an endpoint is TCP.",
        ),
        (
            datagram_service("", 'on_silence = "10.64.0.1:25"'),
            "on_silence: Means nothing unless an endpoint is TCP.",
        ),
        (
            datagram_service("", "first_payload_timeout = 1"),
            "first_payload_timeout: Means nothing unless first payloads are inspected: name a parser.",
        ),
        (
            datagram_service('"quic"', 'unmatched = "tls-alert"'),
            'unmatched: Is "tls-alert", but no endpoint is TCP.',
        ),
        (
            datagram_service("", 'unmatched = "tls-alert"'),
            'unmatched: Is "tls-alert", but no endpoint is TCP.',
        ),
        (
            datagram_service('"dtls"', "quic = { rebinding = false }"),
            'quic: Means nothing unless inspect names "quic".',
        ),
        (
            datagram_service(
                '"quic"',
                "quic = { rebinding = true,"
                " connection_ids = [{ config = 0, server_id_length = 8, nonce_length = 4 }] }",
            ),
            "quic.rebinding: Cannot be true beside connection_ids, which tell whose a connection is wherever it moves.",
        ),
        (
            datagram_service('"quic"', "quic = { rebinding = 1 }"),
            "quic.rebinding: Must be true or false, not 1.",
        ),
        (
            datagram_service('"quic"', connection_ids("config = 7, server_id_length = 1, nonce_length = 4")),
            "quic.connection_ids[0].config: Must be a whole number from 0 to 6, not 7.",
        ),
        (
            datagram_service('"quic"', connection_ids("config = 0, server_id_length = 16, nonce_length = 4")),
            "quic.connection_ids[0].server_id_length: Must be a whole number from 1 to 15, not 16.",
        ),
        (
            datagram_service('"quic"', connection_ids("config = 0, server_id_length = 1, nonce_length = 3")),
            "quic.connection_ids[0].nonce_length: Must be a whole number from 4 to 18, not 3.",
        ),
        (
            datagram_service('"quic"', connection_ids("config = 0, server_id_length = 10, nonce_length = 10")),
            "quic.connection_ids[0]: Makes connection ids of 21 bytes; they have at most 20, of which the first is for"
            " the configuration's number.",
        ),
        (
            datagram_service('"quic"', connection_ids(*["config = 1, server_id_length = 1, nonce_length = 4"] * 2)),
            "quic.connection_ids[1].config: Is 1 a second time; each configuration has its own number.",
        ),
        (
            datagram_service(
                '"quic"', connection_ids("config = 0, server_id_length = 1, nonce_length = 4, key = '0001'")
            ),
            "quic.connection_ids[0].key: Must be a key of 16 bytes: 32 hexadecimal digits.",
        ),
        (
            datagram_service('"quic"', to_server_id("0a")),
            "routes[0].when.quic.server-id: Can never match: quic.connection_ids does not say how daemons make theirs.",
        ),
        *(
            (
                datagram_service(
                    '"quic"',
                    connection_ids(
                        "config = 0, server_id_length = 2, nonce_length = 4",
                        "config = 1, server_id_length = 1, nonce_length = 4",
                    )
                    + to_server_id(text),
                ),
                "routes[0].when.quic.server-id: Can never match: server ids have 2 or 4 hexadecimal digits here.",
            )
            for text in ("0a0", "0x", "0a0b0c")
        ),
    ],
)
def test_mistakes_about_datagrams_are_one_line(text: str, problem: str) -> None:
    assert lines(text) == [f"f.toml: services.web.{problem}"]


def test_more_values_than_a_parser_can_take_are_one_line() -> None:
    keys = [base64.b64encode(number.to_bytes(32)).decode() for number in range(wireguard.MAX_KEYS + 1)]

    def tunnels(keys: list[str]) -> str:
        return datagram_service('"wireguard"') + "".join(
            f'[[services.web.routes]]\nwhen.wireguard.public-key = "{key}"\ntarget = "10.64.0.1:51820"\n'
            for key in keys
        )

    assert len(config.parse(tunnels(keys[1:]), "f.toml").services[0].routes) == wireguard.MAX_KEYS
    assert lines(tunnels(keys)) == [
        'f.toml: services.web.routes: Have values that the parser "wireguard" cannot take: 1001 public keys of'
        " WireGuard peers, each of which may have to be tried for every first datagram; at most 1000 are allowed in one"
        " service."
    ]
    assert lines(tunnels(["short", "="])) == [
        f"f.toml: services.web.routes[{index}].when.wireguard.public-key: Must be a WireGuard public key, 32 bytes in"
        f" base64 as `wg pubkey` gives it (44 characters), not '{text}'."
        for index, text in enumerate(("short", "="))
    ]


@pytest.mark.parametrize("key", ["quic.sni", "quic.server-id", "prefix", "portext.dst", "http.host", "http.cookie."])
def test_a_session_is_known_by_what_no_route_decides(key: str) -> None:
    """A session key must be one that parsers give whatever the routes say."""
    text = datagram_service('"http", "prefix", "quic"', f'[services.web.sessions]\nkey = "{key}"\n', BOTH)
    assert lines(text + 'on_new_source = "allow"') == [
        'f.toml: services.web.sessions.key: Must be "rtsp.session", "http.cookie.NAME" or "http.header.NAME", the key'
        f' of an id, not "{key}".'
    ]


def test_without_port_ranges_unextended_is_unmatched() -> None:
    read = config.parse(extension_pool("pool = 't', by = 'extension'"), "f.toml")
    service = read.services[0]
    assert service.unextended is Unextended.UNMATCHED
    assert service.extension_pool == ExtensionPool(read.pools["t"], "extension", 1, 0, False)


POOL = '[pools.t]\nprefixes = ["10.64.0.0/16"]\n'
ENDPOINT = 'endpoints = ["203.0.113.10:443/tcp"]\n'
DEFAULT = 'default = "10.64.0.1:80"\n'
WEB = POOL + "[services.web]\n" + ENDPOINT


def gateway(text: str) -> str:
    return f"[gateway]\n{text}\n"


def pool(text: str) -> str:
    return f"[pools.p]\n{text}\n"


def endpoint(text: str) -> str:
    return POOL + f"[services.web]\n{DEFAULT}endpoints = [{text}]\n"


def service(text: str) -> str:
    return WEB + text + "\n"


def route(text: str, inspect: str = '"port-extension", "http", "prefix"') -> str:
    return WEB + f"inspect = [{inspect}]\n[[services.web.routes]]\n{text}\n"


def when(condition: str) -> str:
    return route(f'when = {{ {condition} }}\ntarget = "10.64.0.1:80"')


def two_routes(one: str, other: str) -> str:
    return route(
        f'when = {{ {one} }}\ntarget = "10.64.0.1:80"\n[[services.web.routes]]\nwhen = {{ {other} }}\n'
        'target = "10.64.0.2:80"'
    )


def extension_pool(text: str, prefixes: str = '"10.64.0.0/20"') -> str:
    return (
        f"[pools.t]\nmode = 'anyip'\nprefixes = [{prefixes}]\n[services.web]\n{ENDPOINT}"
        f'inspect = ["port-extension"]\nextension_pool = {{ {text} }}\n'
    )


ENDPOINT_USAGE = (
    'An endpoint is written "203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp" or with a range of ports, "8000-8999"'
)
STAR = 'A * stands for a beginning, "*.example", or for an end, "/api/*"; '
BYTES = (
    "Is compared with bytes, one character each (U+0000 to U+00FF), so it can never m"
    "atch; text in UTF-8 is written byte by byte: \\u00c3\\u00a9."
)

MISTAKES: list[tuple[str, str]] = [
    (
        "a = ",
        "line 1: Is not TOML: Invalid value.",
    ),
    (
        "[gateway]\nworkers = 1\nworkers = 2\n",
        "line 3: Is not TOML: Cannot overwrite a value.",
    ),
    (
        "gatewy = 1",
        'gatewy: Is not a known key; did you mean "gateway"?',
    ),
    (
        "gateway = 1",
        "gateway: Must be a table, not 1.",
    ),
    (
        "[services]\nweb = 1",
        "services.web: Must be a table, not 1.",
    ),
    (
        "pools = [1]",
        "pools: Must be a table, not a list.",
    ),
    (
        gateway("worker = 1"),
        'gateway.worker: Is not a known key; did you mean "workers"?',
    ),
    (
        gateway('"odd\\nkey" = 1'),
        'gateway."odd\\nkey": Is not a known key; known here: state_dir, run_dir, user, workers, first_queue, '
        "mark_bits, queue_length, receive_buffer, access_log, limits, timeouts, pending, port_extension,"
        " api, log, metrics, relay.",
    ),
    (
        gateway("workers = 0"),
        "gateway.workers: Must be a whole number from 1 to 64, not 0.",
    ),
    (
        gateway("workers = 65"),
        "gateway.workers: Must be a whole number from 1 to 64, not 65.",
    ),
    (
        gateway("workers = '2'"),
        'gateway.workers: Must be a whole number from 1 to 64, not "2".',
    ),
    (
        gateway("workers = 2.0"),
        "gateway.workers: Must be a whole number from 1 to 64, not 2.0.",
    ),
    (
        gateway("workers = true"),
        "gateway.workers: Must be a whole number from 1 to 64, not true.",
    ),
    (
        gateway("workers = 2024-01-01"),
        "gateway.workers: Must be a whole number from 1 to 64, not a date or time.",
    ),
    (
        gateway("state_dir = 1"),
        "gateway.state_dir: Must be text in quotes, not 1.",
    ),
    (
        gateway("state_dir = 'lib'"),
        'gateway.state_dir: Must be an absolute path, not "lib".',
    ),
    (
        gateway("first_queue = 65536"),
        "gateway.first_queue: Must be a whole number from 0 to 65535, not 65536.",
    ),
    (
        gateway("first_queue = 65535\nworkers = 2"),
        "gateway.first_queue: With 2 workers the last queue would be 65536; the highest is 65534.",
    ),
    (
        gateway("api = { read_only_group = 'a b' }"),
        'gateway.api.read_only_group: Must be the name of a group, not "a b".',
    ),
    (
        gateway("mark_bits = '8'"),
        'gateway.mark_bits: Must be a range of bits of the packet mark such as "8-31", not "8".',
    ),
    (
        gateway("mark_bits = '31-8'"),
        'gateway.mark_bits: Must be a range of bits of the packet mark such as "8-31", not "31-8".',
    ),
    (
        gateway("mark_bits = '8-32'"),
        'gateway.mark_bits: Must be a range of bits of the packet mark such as "8-31", not "8-32".',
    ),
    (
        gateway("mark_bits = '8-26'"),
        "gateway.mark_bits: Has 19 bits; steerd needs at least 20.",
    ),
    (
        gateway("queue_length = 1048577"),
        "gateway.queue_length: Must be a whole number from 1 to 1048576, not 1048577.",
    ),
    (
        gateway("receive_buffer = 1"),
        "gateway.receive_buffer: Must be a whole number from 4096 to 1073741823, not 1.",
    ),
    (
        gateway("access_log = -1"),
        "gateway.access_log: Must be a whole number from 0 to 4294967295, not -1.",
    ),
    (
        gateway('log.format = "xml"'),
        'gateway.log.format: Must be "auto" or "json" or "console", not "xml".',
    ),
    (
        gateway('log.level = "INFO"'),
        'gateway.log.level: Must be "debug" or "info" or "warning" or "error", not "INFO".',
    ),
    (
        gateway('metrics.listen = "9464"'),
        'gateway.metrics.listen: Where to listen is written "127.0.0.1:9464", "[::1]:9464" or'
        ' "unix:/run/steerd/metrics.sock"; "9464" is neither.',
    ),
    (
        gateway('metrics.listen = "localhost:9464"'),
        'gateway.metrics.listen: "localhost" is not an IP address; names are not looked up.',
    ),
    (
        gateway('metrics.listen = "127.0.0.1:0"'),
        'gateway.metrics.listen: "0" is not a port; ports are 1 to 65535.',
    ),
    (
        gateway('metrics.listen = "unix:metrics.sock"'),
        'gateway.metrics.listen: Must be an absolute path, not "metrics.sock".',
    ),
    (
        gateway(f'metrics.listen = "unix:/{"x" * 107}"'),
        "gateway.metrics.listen: The path of a unix socket has at most 107 bytes.",
    ),
    (
        gateway("limits.source_rate = 0"),
        "gateway.limits.source_rate: Must be a whole number from 1 to 4294967295, not 0.",
    ),
    (
        gateway("limits.sorce_rate = 1"),
        'gateway.limits.sorce_rate: Is not a known key; did you mean "source_rate"?',
    ),
    (
        gateway("timeouts.close = 0"),
        "gateway.timeouts.close: Must be a whole number from 1 to 4294967, not 0.",
    ),
    (
        gateway("port_extension.ipv4_option = 1"),
        "gateway.port_extension.ipv4_option: Must be a whole number from 2 to 255, not 1.",
    ),
    (
        gateway("port_extension.ipv6_option = 64"),
        "gateway.port_extension.ipv6_option: Must be a whole number from 2 to 63, not 64.",
    ),
    (
        gateway("port_extension.tcp_option = 8"),
        "gateway.port_extension.tcp_option: Must be a whole number from 9 to 255, not 8.",
    ),
    (
        gateway("port_extension.tcp_option = 30"),
        "gateway.port_extension.tcp_option: Is 30, which is taken (MPTCP); 253 and 254 are for experiments.",
    ),
    (
        gateway("port_extension.exid = 65536"),
        "gateway.port_extension.exid: Must be a whole number from 0 to 65535, not 65536.",
    ),
    (
        pool(""),
        "pools.p.prefixes: Is missing; it must be a list of texts in quotes.",
    ),
    (
        pool("prefixes = []"),
        'pools.p.prefixes: Names no prefix; one would be "10.64.0.0/16".',
    ),
    (
        pool("prefixes = '10.64.0.0/16'"),
        'pools.p.prefixes: Must be a list of texts in quotes, not "10.64.0.0/16".',
    ),
    (
        pool("prefixes = ['10.64.0.0/16', 5]"),
        "pools.p.prefixes[1]: Must be text in quotes, not 5.",
    ),
    (
        pool("prefixes = ['10.64.0.1/16']"),
        'pools.p.prefixes[0]: "10.64.0.1/16" has bits set behind the prefix length; "10.64.0.0/16" would be right.',
    ),
    (
        pool("prefixes = ['ten']"),
        'pools.p.prefixes[0]: "ten" is not a prefix such as "198.51.100.0/24".',
    ),
    (
        pool("prefixes = ['127.0.1.0/24']"),
        "pools.p.prefixes[0]: 127.0.1.0/24 is or holds a loopback address; no alias can be there.",
    ),
    (
        pool("prefixes = ['0.0.0.0/1']"),
        "pools.p.prefixes[0]: 0.0.0.0/1 is or holds an unspecified address; no alias can be there.",
    ),
    (
        pool("prefixes = ['224.1.0.0/24']"),
        "pools.p.prefixes[0]: 224.1.0.0/24 is or holds a multicast address; no alias can be there.",
    ),
    (
        pool("prefixes = ['fe80::/64']"),
        "pools.p.prefixes[0]: fe80::/64 is or holds a link-local address; no alias can be there.",
    ),
    (
        pool("prefixes = ['10.64.0.0/16', '10.64.3.0/24']"),
        "pools.p.prefixes[1]: 10.64.3.0/24 overlaps 10.64.0.0/16 (pools.p.prefixes[0]).",
    ),
    (
        pool("prefixes = ['10.64.0.0/16']\nmode = 'any'"),
        'pools.p.mode: Must be "addresses" or "anyip", not "any".',
    ),
    (
        pool("prefixes = ['10.64.0.0/16']\nsize = 0"),
        "pools.p.size: Must be a whole number from 1 to 9223372036854775807, not 0.",
    ),
    (
        pool("prefixes = ['10.64.0.0/16', 'fd00:64::/111']\nsize = 70000\nmode = 'anyip'"),
        "pools.p.size: Is 70000, but the IPv4 prefixes hold 65536 addresses.",
    ),
    (
        pool("prefixes = ['10.0.0.0/11']"),
        'pools.p.mode: Is "addresses", which makes 2097152 IPv4 aliases so far; at most 1048576 can be real addresses. '
        'Set size, or mode = "anyip".',
    ),
    (
        "[pools.p]\nprefixes = ['fd00:64::/115']\n[pools.q]\nprefixes = ['fd00:65::/114']",
        'pools.q.mode: Is "addresses", which makes 24576 IPv6 aliases so far; at most 16384 can be real addresses. '
        'Set size, or mode = "anyip".',
    ),
    (
        "[pools.p]\nprefixes = ['10.64.0.0/16']\n[pools.q]\nprefixes = ['10.64.128.0/17']",
        "pools.q.prefixes[0]: 10.64.128.0/17 overlaps 10.64.0.0/16 (pools.p.prefixes[0]).",
    ),
    (
        "[pools.'a b']\nprefixes = ['10.64.0.0/16']",
        'pools."a b": Is not a usable name; up to 64 of the letters A-Z, a-z, 0-9, _ and - would be.',
    ),
    (
        POOL + "[services.web]\n" + DEFAULT,
        "services.web.endpoints: Is missing; it must be a list of texts in quotes.",
    ),
    (
        endpoint(""),
        'services.web.endpoints: Names no endpoint; one would be "203.0.113.10:443/tcp".',
    ),
    (
        endpoint("'203.0.113.10:443'"),
        f'services.web.endpoints[0]: {ENDPOINT_USAGE}; "203.0.113.10:443" does not end in /tcp or /udp.',
    ),
    (
        endpoint("'203.0.113.10:443/sctp'"),
        f'services.web.endpoints[0]: {ENDPOINT_USAGE}; "sctp" is not a protocol that is steered, only tcp and udp are.',
    ),
    (
        endpoint("'203.0.113.10:0/tcp'"),
        'services.web.endpoints[0]: "0" is not a port; ports are 1 to 65535.',
    ),
    (
        endpoint("'203.0.113.10:65536/tcp'"),
        'services.web.endpoints[0]: "65536" is not a port; ports are 1 to 65535.',
    ),
    (
        endpoint("'203.0.113.10:0-10/tcp'"),
        'services.web.endpoints[0]: "0" is not a port; ports are 1 to 65535.',
    ),
    (
        endpoint("'203.0.113.10:20-10/tcp'"),
        "services.web.endpoints[0]: The port range 20-10 ends before it begins; 10-20 would be right.",
    ),
    (
        endpoint("'203.0.113.10/tcp'"),
        f'services.web.endpoints[0]: {ENDPOINT_USAGE}; "203.0.113.10" is neither.',
    ),
    (
        endpoint("'www.example:443/tcp'"),
        'services.web.endpoints[0]: "www.example" is not an IP address; names are not looked up.',
    ),
    (
        endpoint("'2001:db8::1:443/tcp'"),
        f'services.web.endpoints[0]: {ENDPOINT_USAGE}; "2001:db8::1:443" is neither.',
    ),
    (
        endpoint("'[203.0.113.10]:443/tcp'"),
        f"services.web.endpoints[0]: {ENDPOINT_USAGE}; only an IPv6 address stands in brackets.",
    ),
    (
        endpoint("'0.0.0.0:443/tcp'"),
        "services.web.endpoints[0]: 0.0.0.0 is an unspecified address; an endpoint has an address that "
        "clients connect to.",
    ),
    (
        endpoint("'[fe80::1%eth0]:443/tcp'"),
        'services.web.endpoints[0]: "fe80::1%eth0" names an interface; write the address alone.',
    ),
    (
        endpoint("'203.0.113.10:443/tcp', '203.0.113.10:400-500/tcp'"),
        "services.web.endpoints[1]: 203.0.113.10:400-500/tcp overlaps 203.0.113.10:443/tcp "
        "(services.web.endpoints[0]).",
    ),
    (
        service(DEFAULT + f"[services.api]\n{ENDPOINT}{DEFAULT}"),
        "services.api.endpoints[0]: 203.0.113.10:443/tcp overlaps 203.0.113.10:443/tcp (services.web.endpoints[0]).",
    ),
    (
        pool("prefixes = ['203.0.113.0/24']") + service(DEFAULT),
        "pools.p.prefixes[0]: 203.0.113.0/24 holds 203.0.113.10, the address of an endpoint "
        "(services.web.endpoints[0]).",
    ),
    (
        service(""),
        "services.web: Can never steer anything: it has no inspect, no routes, no default, no extension_pool.",
    ),
    (
        service(DEFAULT + "inspect = ['htp']"),
        'services.web.inspect[0]: "htp" is not a parser; did you mean "http"?',
    ),
    (
        service(DEFAULT + "inspect = ['http', 'http']"),
        'services.web.inspect[1]: "http" is there twice; each parser is asked once.',
    ),
    (
        service(DEFAULT + "unmatched = 'pass'"),
        'services.web.unmatched: Must be "reset" or "drop" or "tls-alert", not "pass".',
    ),
    (
        service(DEFAULT + "unextended = 'pass'"),
        'services.web.unextended: Means nothing unless inspect names "port-extension".',
    ),
    (
        service("default = 5"),
        'services.web.default: Must be a target such as "10.64.0.1:8080", or a table or list of them, not 5.',
    ),
    (
        service("default = []"),
        'services.web.default: Names no target; one would be "10.64.0.1:8080".',
    ),
    (
        service("default = 'x'"),
        'services.web.default: A target is written "10.64.0.1:8080", "[fd00:64::1]:8080", or with the '
        'port "same"; "x" is neither.',
    ),
    (
        service("default = '10.64.0.1:http'"),
        'services.web.default: "http" is not a port; ports are 1 to 65535.',
    ),
    (
        service("default = '10.65.0.1:80'"),
        "services.web.default: 10.65.0.1 is in no pool (t: 10.64.0.0/16); use an alias, or write { address = "
        '"10.65.0.1:80", external = true }.',
    ),
    (
        service("default = {address = '10.64.0.1:80', external = true}"),
        "services.web.default.external: 10.64.0.1 is in the pool t, so it is not external.",
    ),
    (
        service("default = {address = '127.0.0.1:80', external = true}"),
        "services.web.default.address: 127.0.0.1 is a loopback address; nothing can be steered there.",
    ),
    (
        service("default = {address = '203.0.113.10:443', external = true}"),
        "services.web.default.address: 203.0.113.10 is the address of an endpoint "
        "(services.web.endpoints[0]); steering there would be a loop.",
    ),
    (
        service("default = {address = '203.0.113.10:80', external = true}"),
        "services.web.default.address: 203.0.113.10 is the address of an endpoint "
        "(services.web.endpoints[0]); steering there would be a loop.",
    ),
    (
        service("default = {addres = '10.64.0.1:80', address = '10.64.0.1:80'}"),
        'services.web.default.addres: Is not a known key; did you mean "address"?',
    ),
    (
        service("default = {external = true}"),
        "services.web.default.address: Is missing; it must be text in quotes.",
    ),
    (
        service("default = ['10.64.0.1:80', '10.64.0.2:80']"),
        "services.web.default[1]: Is a second IPv4 target; services.web.choose must say how one is chosen:"
        ' "first-alive" or "round-robin" or "hash".',
    ),
    (
        route("when = { prefix = 'a' }\ntarget = ['10.64.0.1:80', '10.64.0.2:80', '10.64.0.3:80']"),
        "services.web.routes[0].target[1]: Is a second IPv4 target; services.web.routes[0].choose must say how one is"
        ' chosen: "first-alive" or "round-robin" or "hash".',
    ),
    (
        route("when = { prefix = 'a' }\nchoose = 'any'\ntarget = ['10.64.0.1:80', '10.64.0.2:80']"),
        'services.web.routes[0].choose: Must be "first-alive" or "round-robin" or "hash", not "any".',
    ),
    (
        route("when = { prefix = 'a' }\nchoose = 'hash'\ntarget = ['10.64.0.1:80', '10.64.0.1:80']"),
        "services.web.routes[0].target[1]: 10.64.0.1:80 is there twice.",
    ),
    (
        route("when = { prefix = 'a' }\nchoose = 'hash'\ntarget = ['10.64.0.1:80', '10.64.0.2:same']"),
        "services.web.routes[0].target: 10.64.0.2:same keeps the client's port; each of several needs its own, to tell"
        " whether it listens.",
    ),
    (
        route(f"when = {{ prefix = 'a' }}\nchoose = 'hash'\ntarget = {[f'10.64.0.1:{n}' for n in range(1, 102)]}"),
        "services.web.routes[0].target[100]: Is IPv4 target number 101; at most 100 are possible.",
    ),
    (
        route("when = { prefix = 'a' }\nchoose = 'hash'\nhash = 'http.hots'\ntarget = '10.64.0.1:80'"),
        'services.web.routes[0].hash: Is not a key of any parser; did you mean "http.host"?',
    ),
    (
        route("when = { prefix = 'a' }\nchoose = 'hash'\nhash = 'tls.sni'\ntarget = '10.64.0.1:80'"),
        'services.web.routes[0].hash: Is a key of the parser "tls", which inspect does not name.',
    ),
    (
        route("when = { prefix = 'a' }\nchoose = 'round-robin'\nhash = 'source'\ntarget = '10.64.0.1:80'"),
        'services.web.routes[0].hash: Means nothing unless choose = "hash".',
    ),
    (
        service("routes = [{source = '198.51.100.0/24', target = '10.64.0.1:80'}]\nchoose = 'hash'"),
        "services.web.choose: Is how a target of default or on_silence is chosen, and there is neither; routes say"
        " theirs.",
    ),
    (
        service("default = {address = '[2001:db8::1]:80', external = true}"),
        "services.web.default: Has addresses of IPv6 only, but what comes here is IPv4.",
    ),
    (
        endpoint("'203.0.113.10:1-9/tcp'") + "inspect = ['port-extension']",
        "services.web.unextended: Is missing; since 203.0.113.10:1-9/tcp is a port range, it must be "
        'written out: "pass", "default" or "unmatched".',
    ),
    (
        service(
            "inspect = ['port-extension']\nunextended = 'default'\n"
            "routes = [{when = {portext.dst = 1}, target = '10.64.0.1:80'}]"
        ),
        'services.web.unextended: Is "default", but the service has no default target.',
    ),
    (
        service("routes = 5"),
        "services.web.routes: Must be a list of tables, not 5.",
    ),
    (
        service("routes = [5]"),
        "services.web.routes[0]: Must be a table, not 5.",
    ),
    (
        route("target = '10.64.0.1:80'"),
        "services.web.routes[0]: Has neither a condition nor a source; what matches everything is default.",
    ),
    (
        route("when = {http.host = 'a'}"),
        'services.web.routes[0].target: Is missing; it must be a target such as "10.64.0.1:8080".',
    ),
    (
        route("when = {http.host = 'a'}\ntarget = '10.64.0.1:80'\nsorce = '10.0.0.0/8'"),
        'services.web.routes[0].sorce: Is not a known key; did you mean "source"?',
    ),
    (
        route("when = {http.host = 'a'}\ntarget = '10.64.0.1:80'\nsource = '10.0.0.1/8'"),
        'services.web.routes[0].source: "10.0.0.1/8" has bits set behind the prefix length; '
        '"10.0.0.0/8" would be right.',
    ),
    (
        route("when = {http.host = 'a'}\ntarget = '10.64.0.1:80'\nsource = '2001:db8::/32'"),
        "services.web.routes[0].source: Has addresses of IPv6 only, but what comes here is IPv4.",
    ),
    (
        route("when = {http.host = 'a'}\ntarget = {address = '[2001:db8::1]:80', external = true}"),
        "services.web.routes[0].target: Has addresses of IPv6 only, but what comes here is IPv4.",
    ),
    (
        route("when = 'http'\ntarget = '10.64.0.1:80'"),
        'services.web.routes[0].when: Must be a table, not "http".',
    ),
    (
        route("when = {http.host = 'a'}\ntarget = '10.64.0.1:80'", "'prefix'"),
        'services.web.routes[0].when.http.host: Is a key of the parser "http", which inspect does not name.',
    ),
    (
        when("http.host = 'a.example:80'"),
        'services.web.routes[0].when.http.host: "a.example:80" can never match: it must be a name without a port.',
    ),
    (
        when("http.host = '*.a.example:80'"),
        'services.web.routes[0].when.http.host: "*.a.example:80" can never match: it must be a name without a port.',
    ),
    (
        when("http.host = '[2001:db8::1]:80'"),
        'services.web.routes[0].when.http.host: "[2001:db8::1]:80" can never match: it must be a name without a port.',
    ),
    (
        when("http.host = 'http://a.example/'"),
        'services.web.routes[0].when.http.host: "http://a.example/" can never match: it must be a name without a port.',
    ),
    (
        when("http.host = '2001:DB8:0::1'"),
        'services.web.routes[0].when.http.host: "2001:DB8:0::1" can never match: an IPv6 address is written'
        ' "[2001:db8::1]" here.',
    ),
    (
        when("http.host = ''"),
        "services.web.routes[0].when.http.host: Is empty and can never match: who names no host has no such key;"
        " use default for that.",
    ),
    (
        route("when = {tls.sni = 'a.example:443'}\ntarget = '10.64.0.1:80'", "'tls'"),
        'services.web.routes[0].when.tls.sni: "a.example:443" can never match: clients say a name without a port'
        " there.",
    ),
    (
        route("when = {tls.sni = ''}\ntarget = '10.64.0.1:80'", "'tls'"),
        "services.web.routes[0].when.tls.sni: Is empty and can never match: who names no host has no such key;"
        " use default for that.",
    ),
    (
        service(
            "inspect = 'http'\nroutes = [{when = {http.host = 'a'}, target = '10.64.0.1:80'}]\n"
            "sessions = {key = 'http.cookie.id', on_new_source = 'move'}"
        ),
        'services.web.inspect: Must be a list of texts in quotes, not "http".',
    ),
    (
        service("inspect = ['htp']\nsessions = {key = 'http.cookie.id', on_new_source = 'move'}"),
        'services.web.inspect[0]: "htp" is not a parser; did you mean "http"?',
    ),
    (
        extension_pool('pool = "t", by = "extension"').replace('["port-extension"]', '"port-extension"'),
        'services.web.inspect: Must be a list of texts in quotes, not "port-extension".',
    ),
    (
        when("http.hots = 'a'"),
        'services.web.routes[0].when.http.hots: Is not a key of any parser; did you mean "http.host"?',
    ),
    (
        when("http.header = 'a'"),
        'services.web.routes[0].when.http.header: Is not a key of any parser; did you mean "http.header.*"?',
    ),
    (
        when("http.host = true"),
        "services.web.routes[0].when.http.host: Must be text in quotes or a whole number, not true.",
    ),
    (
        when("http.host = 1.5"),
        "services.web.routes[0].when.http.host: Must be text in quotes or a whole number, not 1.5.",
    ),
    (
        when("http.host = ['a']"),
        "services.web.routes[0].when.http.host: Must be text in quotes or a whole number, not a list.",
    ),
    (
        when("http.host = 'a*b'"),
        f'services.web.routes[0].when.http.host: {STAR}"a*b" is neither.',
    ),
    (
        when("http.host = '*'"),
        f'services.web.routes[0].when.http.host: {STAR}"*" is neither.',
    ),
    (
        when("http.host = '*example'"),
        f'services.web.routes[0].when.http.host: {STAR}"*example" is neither.',
    ),
    (
        when("http.host = '*.example*'"),
        f'services.web.routes[0].when.http.host: {STAR}"*.example*" is neither.',
    ),
    (
        when("http.path = '/\u0107'"),
        f"services.web.routes[0].when.http.path: {BYTES}",
    ),
    (
        when("http.header.X-A = '1', http.header.x-a = '2'"),
        "services.web.routes[0].when.http.header.x-a: The key http.header.x-a is there twice; a route "
        "compares each key once.",
    ),
    (
        when("portext.dst = 0"),
        'services.web.routes[0].when.portext.dst: Must be a whole number from 1 to 65535, not "0".',
    ),
    (
        when("portext.src = 65536"),
        'services.web.routes[0].when.portext.src: Must be a whole number from 1 to 65535, not "65536".',
    ),
    (
        when("portext.dst = '7*'"),
        'services.web.routes[0].when.portext.dst: Must be a whole number from 1 to 65535, not "7*".',
    ),
    (
        when("portext.port = 443"),
        'services.web.routes[0].when.portext.port: Must be a whole number from 65536 to 4294967295, not "443".',
    ),
    (
        when("portext.port = 131072"),
        "services.web.routes[0].when.portext.port: 131072 is port 0 of extension 2, and port 0 is never used.",
    ),
    (
        when("prefix = ''"),
        "services.web.routes[0].when.prefix: Is empty and would match everything; use default for that.",
    ),
    (
        when("prefix = 'hex:16030'"),
        'services.web.routes[0].when.prefix: Must have two hexadecimal digits a byte, "hex:160301", not "hex:16030".',
    ),
    (
        route("when = {regex = 'USER (a'}\ntarget = '10.64.0.1:80'", '"regex"'),
        "services.web.routes[0].when.regex: Is not a regular expression in the syntax of RE2: missing ): USER (a.",
    ),
    (
        route("when = {regex = ''}\ntarget = '10.64.0.1:80'", '"regex"'),
        "services.web.routes[0].when.regex: Is empty and would match everything; use default for that.",
    ),
    (
        route("when = {regex = '\u0107'}\ntarget = '10.64.0.1:80'", '"regex"'),
        f"services.web.routes[0].when.regex: {BYTES}",
    ),
    (
        when("prefix = '\u0107'"),
        f"services.web.routes[0].when.prefix: {BYTES}",
    ),
    (
        two_routes("http.host = 'a'", "http.host = 'A'"),
        "services.web.routes[1]: Has the same conditions and the same source as services.web.routes[0]; "
        "one of the two must go.",
    ),
    (
        two_routes("http.header.a = '1'", "http.header.b = '2'"),
        "services.web.routes[1]: Ties with services.web.routes[0]: one connection can match both, and "
        "neither comes first; add a condition to one.",
    ),
    (
        extension_pool("by = 'extension'"),
        "services.web.extension_pool.pool: Is missing; it must be text in quotes.",
    ),
    (
        extension_pool("pool = 't'"),
        'services.web.extension_pool.by: Is missing; it must be "extension" or "extended-port".',
    ),
    (
        extension_pool("pool = 't', by = 'port'"),
        'services.web.extension_pool.by: Must be "extension" or "extended-port", not "port".',
    ),
    (
        extension_pool("pool = 'tt', by = 'extension'"),
        'services.web.extension_pool.pool: "tt" is not a pool; did you mean "t"?',
    ),
    (
        extension_pool("pool = 't', by = 'extension', port = 0"),
        'services.web.extension_pool.port: Must be a whole number from 1 to 65535 or "same", not 0.',
    ),
    (
        extension_pool("pool = 't', by = 'extension', first = 65536"),
        "services.web.extension_pool.first: Is 65536, and the highest extension is 65535.",
    ),
    (
        extension_pool("pool = 't', by = 'extended-port'"),
        'services.web.extension_pool.port: Must be a port from 1 to 65535 where by = "extended-port".',
    ),
    (
        extension_pool("pool = 't', by = 'extended-port', port = 80, first = 65536"),
        "services.web.extension_pool.first: Is 65536; an extended port is extension * 65536 + port with "
        "both at least 1, from 65537 on.",
    ),
    (
        extension_pool("pool = 't', by = 'extended-port', port = 80", "'fd00:64::/112'"),
        "services.web.extension_pool.pool: Has addresses of IPv6 only, but what comes here is IPv4.",
    ),
    (
        extension_pool("pool = 't', by = 'extended-port', port = 80", "'10.0.0.0/8'"),
        "gateway.mark_bits: Have room for 8388592 targets, but there are 16777216; use more bits.",
    ),
    (
        service("inspect = ['http']\nextension_pool = {pool = 't', by = 'extended-port', port = 80}"),
        'services.web.extension_pool: Means nothing unless inspect names "port-extension".',
    ),
]


def test_several_targets() -> None:
    text = (
        "default = ['10.64.0.1:80', '10.64.0.2:80', '[2001:db8::1]:80']\nchoose = 'hash'\n"
        "routes = [\n"
        "{source = '198.51.100.0/25', target = ['10.64.0.3:80', '10.64.0.4:81'], choose = 'first-alive'},\n"
        "{source = '198.51.100.128/25', target = '10.64.0.3:80', choose = 'hash', hash = 'http.cookie.sid'},\n]\n"
    ).replace("'[2001:db8::1]:80'", "{address = '[2001:db8::1]:80', external = true}")
    (web,) = config.parse(service(f'inspect = ["http"]\n{text}'), "f.toml").services
    assert [str(target) for target in web.default] == ["10.64.0.1:80", "10.64.0.2:80", "[2001:db8::1]:80"]
    assert web.choice == Choice("hash", "source")
    assert [route.choice for route in web.routes] == [Choice("first-alive"), Choice("hash", "http.cookie.sid")]
    assert [str(target) for target in web.routes[0].targets] == ["10.64.0.3:80", "10.64.0.4:81"]


@pytest.mark.parametrize(("text", "mistake"), MISTAKES, ids=[mistake[:70] for _, mistake in MISTAKES])
def test_a_mistake_is_one_line(text: str, mistake: str) -> None:
    assert lines(text) == [f"f.toml: {mistake}"]


@pytest.mark.parametrize(
    ("parser", "written", "condition"),
    [
        ("http", "http.host = 'A.Example.'", Condition("http.host", Match.EXACT, "a.example")),
        ("http", "http.header.X-Tag = 'A.'", Condition("http.header.x-tag", Match.EXACT, "A.")),
        ("http2", "http.host = '*.Example.'", Condition("http.host", Match.SUFFIX, ".example")),
        ("tls", "tls.sni = 'A.Example.'", Condition("tls.sni", Match.EXACT, "a.example")),
        ("tls", "tls.sni = 'WWW.*'", Condition("tls.sni", Match.PREFIX, "www.")),
        ("tls", "tls.sni = '\u00c4.Example'", Condition("tls.sni", Match.EXACT, "\u00c4.example")),
        ("tls", "tls.alpn.xMPP = 1", Condition("tls.alpn.xMPP", Match.EXACT, "1")),
        ("tls", "'tls.alpn.http/1.1' = 1", Condition("tls.alpn.http/1.1", Match.EXACT, "1")),
        ("rtsp", "rtsp.host = 'Cam.Example.'", Condition("rtsp.host", Match.EXACT, "cam.example")),
        ("sip", "sip.host = 'A.Example.'", Condition("sip.host", Match.EXACT, "a.example")),
        ("dns", "dns.qname = '*.Example.'", Condition("dns.qname", Match.SUFFIX, ".example")),
        ("dns", "dns.qname = '.'", Condition("dns.qname", Match.EXACT, ".")),
        ("dns", r"dns.qname = 'a\.b.Example.'", Condition("dns.qname", Match.EXACT, r"a\046b.example")),
        ("dns", r"dns.qname = '*.a\046b.example'", Condition("dns.qname", Match.SUFFIX, r".a\046b.example")),
        ("dns", r"dns.qname = 'a\.'", Condition("dns.qname", Match.EXACT, r"a\046")),
        ("dns", r"dns.qname = 'a\\.'", Condition("dns.qname", Match.EXACT, r"a\\")),
        ("dns", "dns.qtype = 'aaaa'", Condition("dns.qtype", Match.EXACT, "AAAA")),
        ("dns", "dns.qtype = 'TYPE65'", Condition("dns.qtype", Match.EXACT, "HTTPS")),
        ("dns", "dns.qtype = 28", Condition("dns.qtype", Match.EXACT, "AAAA")),
        ("ssh", "ssh.client = 'OpenSSH_*'", Condition("ssh.client", Match.PREFIX, "OpenSSH_")),
        ("regex", r"regex = 'USER (a|b*)\r?$'", Condition("regex", Match.EXACT, r"USER (a|b*)\r?$")),
        ("regex", "regex = 'GET.*'", Condition("regex", Match.EXACT, "GET.*")),
    ],
)
def test_conditions_are_spelled_as_the_parsers_spell_their_keys(
    parser: str, written: str, condition: Condition
) -> None:
    text = route(f"when = {{ {written} }}\ntarget = '10.64.0.1:80'", f'"{parser}"')
    read = config.parse(text, "f.toml")
    assert read.services[0].routes[0].conditions == (condition,)


def test_nothing_follows_from_a_key_that_is_spelt_wrong() -> None:
    text = """
[pool.t]
prefixes = ["10.64.0.0/16"]
[services.web]
endpoints = ["203.0.113.10:443/tcp"]
inspct = ["tls"]
routes = [
    { when = { tls.sni = "a.example" }, target = "10.64.0.1:443" },
    { when = { tls.sni = "b.example" }, target = "10.64.0.2:443" },
]
"""
    assert lines(text) == [
        'f.toml: services.web.inspct: Is not a known key; did you mean "inspect"?',
        'f.toml: pool: Is not a known key; did you mean "pools"?',
    ]


def test_all_mistakes_are_found_in_one_run() -> None:
    text = """
[gateway]
workers = 0
mark_bits = "8-20"
colour = "red"
[pools.t]
prefixes = ["10.64.0.0/16", "10.65.0.1/16"]
[services.web]
endpoints = ["203.0.113.10:443/tcp", "203.0.113.10:443/tcp"]
inspect = ["http"]
default = "10.64.0.1:0"
[[services.web.routes]]
when = { "http.hots" = "a.example" }
target = "10.64.0.1:80"
[[services.web.routes]]
when = { "http.host" = "b.example" }
"""
    assert lines(text) == [
        f"f.toml: {mistake}"
        for mistake in (
            "gateway.workers: Must be a whole number from 1 to 64, not 0.",
            "gateway.colour: Is not a known key; known here: state_dir, run_dir, user, workers, first_queue, "
            "mark_bits, queue_length, receive_buffer, access_log, limits, timeouts, pending, port_extension,"
            " api, log, metrics, relay.",
            'services.web.routes[1].target: Is missing; it must be a target such as "10.64.0.1:8080".',
            "gateway.mark_bits: Has 13 bits; steerd needs at least 20.",
            'pools.t.prefixes[1]: "10.65.0.1/16" has bits set behind the prefix length; "10.65.0.0/16" would be right.',
            "services.web.endpoints[1]: 203.0.113.10:443/tcp overlaps 203.0.113.10:443/tcp "
            "(services.web.endpoints[0]).",
            'services.web.default: "0" is not a port; ports are 1 to 65535.',
            'services.web.routes[0].when.http.hots: Is not a key of any parser; did you mean "http.host"?',
        )
    ]


def test_the_problems_are_at_hand_one_by_one() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse("[gateway]\nworkers = 0\nfirst_queue = -1\n", "f.toml")
    assert caught.value.file == "f.toml"
    assert [problem.key for problem in caught.value.problems] == ["gateway.workers", "gateway.first_queue"]


def test_every_tie_is_reported_once() -> None:
    routes = "".join(
        f'[[services.web.routes]]\nwhen = {{ "http.header.{name}" = "1" }}\ntarget = "10.64.0.1:80"\n'
        for name in "abcd"
    )
    found = lines(WEB + 'inspect = ["http"]\n' + routes)
    assert [line.split(":")[1] for line in found] == [f" services.web.routes[{i}]" for i in (1, 2, 3)]


def test_too_many_shapes_of_routes_are_refused() -> None:
    routes = "".join(
        f'[[services.web.routes]]\nwhen = {{ "http.host" = "h{i}", "http.header.h{i}" = "1" }}\n'
        'target = "10.64.0.1:80"\n'
        for i in range(MAX_PROBES + 1)
    )
    assert lines(WEB + 'inspect = ["http"]\n' + routes) == [
        "f.toml: services.web.routes: Have 4097 different combinations of keys, pattern lengths and source prefix"
        " lengths; at most 4096 can be looked up for each connection."
    ]


def test_the_size_of_a_pool_is_that_of_each_family() -> None:
    read = config.parse('[pools.p]\nprefixes = ["10.64.0.0/24", "fd00:64::/120"]\nsize = 256\n', "f.toml")
    assert [read.pools["p"].alias_count(version) for version in (4, 6)] == [256, 256]


def test_a_hundred_thousand_exact_routes() -> None:
    count = 100_000
    routes = "".join(
        f'[[services.web.routes]]\nwhen = {{ "http.host" = "h{i}.example" }}\ntarget = "10.64.0.1:80"\n'
        for i in range(count)
    )
    read = config.parse(WEB + 'inspect = ["http"]\n' + routes, "f.toml")
    assert len(read.services[0].routes) == count
    last = read.services[0].routes[-1]
    assert last.name == f"services.web.routes[{count - 1}]"
    assert last.conditions == (Condition("http.host", Match.EXACT, f"h{count - 1}.example"),)


def test_a_file_is_read_as_it_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "steerd.toml"
    file.write_text(FULL, encoding="utf-8")
    assert config.load(file) == config.parse(FULL, str(file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "steerd.toml"
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(caught.value) == f"{file}: file: Cannot be read: No such file or directory."


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "steerd.toml"
    file.write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(caught.value) == f"{file}: file: Is not text in UTF-8: the byte at offset 2 does not belong there."
