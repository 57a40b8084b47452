"""HAProxy, nginx stream and sslh as their manuals have them for passing connections on: the systems to compare with.

Each is asked by a `Choice`: the server name of a TLS hello, the Host of an HTTP request, or the port of the endpoint,
which is what remains where a proxy cannot see what steerd reads. What they cannot do: nginx stream reads no Host (its
http module does, which then is an HTTP server, another job); sslh does not choose by port; none reads IP options, and
of datagrams only nginx passes any on (HAProxy 2.6 and sslh 1.20 do not).

They are given what helps them: one thread or process for each worker of ours (sslh-select has one in all: it cannot
share its port), epoll, no logging, a wide range of source ports, and no conntrack, since nothing in their namespaces
asks for it. HAProxy and nginx are told which source address to use: else the kernel walks over all IPv6 addresses of
the gateway for each connection (measured: more than half of their speed). None tells the daemon who the client is.

sslh-select 1.20 loses some connections as soon as there are two at a time: what select(2) has said about a descriptor
is believed after that has been closed and opened anew for the next client. They are counted.
"""

from __future__ import annotations

import enum
import ipaddress
import socket
from collections.abc import Callable

from tests.bench.lab import ALIAS_PORT, ENDPOINT_PORT, FIRST_ALIAS, FIRST_TRANSLATED_PORT, PARTS, Gateway, Lab

_NGINX_STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"


class Choice(enum.Enum):
    """What a connection's daemon is chosen by."""

    TLS = "tls"
    HTTP = "http"
    PORT = "port"


Name = Callable[[int], str]
"""Of daemon i, as clients ask for it: a host name, or a port."""

# defer-accept: a client of TLS or HTTP speaks first. The two tcp-smart options save an ACK each. splice: payload stays
# in the kernel; only for daemons that carry much, since it doubles their speed and costs short connections some.
# maxconn: 6 files for a spliced connection, and 20,000 may be all there are.
_HAPROXY = """\
global
    nbthread {threads}
    maxconn {connections}
    tune.pipesize 1048576
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option tcp-smart-accept
    option tcp-smart-connect
"""
_HAPROXY_FRONTEND = """\
frontend choose_{version}
    bind {endpoint}{listen}
    use_backend %[{key},map({names})]
"""
_HAPROXY_LISTEN = {
    Choice.TLS: " defer-accept\n    tcp-request inspect-delay 5s\n"
    "    tcp-request content accept if { req.ssl_hello_type 1 }",
    Choice.HTTP: " defer-accept\n    tcp-request inspect-delay 5s\n    tcp-request content accept if HTTP",
    Choice.PORT: "",
}
_HAPROXY_KEY = {Choice.TLS: "req.ssl_sni,lower", Choice.HTTP: "req.hdr(host),lower", Choice.PORT: "dst_port"}
_HAPROXY_BACKEND = """\
backend daemon_{version}_{number}
    source {source}
    server daemon {target}
"""
_HAPROXY_BULK = """\
    option splice-request
    option splice-response
"""

# proxy_half_close: a client that has sent everything still wants its answer.
_NGINX = """\
load_module {module};
daemon off;
pid {directory}/pid;
error_log {log} crit;
worker_processes {processes};
worker_rlimit_nofile 20000;
events {{
    worker_connections 8192;
}}
stream {{
    map_hash_max_size 16384;
    map_hash_bucket_size 128;
    {half_close}
    proxy_timeout 60s;
    proxy_buffer_size 256k;
{servers}
}}
"""
_NGINX_SERVER = """\
    map {key} $target{version} {{
{names}
    }}
    server {{
        listen {endpoint} {listen};
        proxy_bind {source};
        proxy_pass $target{version};{more}
    }}
"""


# A regular expression is what sslh has for Host. log_level: a line for each connection otherwise.
_SSLH = """\
foreground: true;
numeric: true;
timeout: 5;
listen: ( {{ host: "{host}"; port: "{port}"; }} );
protocols: (
{protocols}
);
"""
_SSLH_PROTOCOL = {
    Choice.TLS: 'name: "tls"; sni_hostnames: [ "{name}" ]',
    Choice.HTTP: 'name: "regex"; regex_patterns: [ "Host: {name}" ]',
}


def by_port(number: int) -> str:
    """The name of a daemon that has a port of its own: Lab.translate has the same."""
    return str(FIRST_TRANSLATED_PORT + number)


def haproxy(lab: Lab, gateway: Gateway, choice: Choice, name: Name, connections: int = 3000) -> None:
    """HAProxy on a gateway, for so many connections at a time. Returns once it listens."""
    text = _HAPROXY.format(threads=PARTS, connections=connections)
    for version in FIRST_ALIAS:
        names = gateway.directory / f"names{version}"
        names.write_text("".join(f"{name(i)} daemon_{version}_{i}\n" for i in range(lab.size)))
        text += _HAPROXY_FRONTEND.format(
            version=version,
            endpoint=_endpoint(lab, gateway, version, choice),
            listen=_HAPROXY_LISTEN[choice],
            key=_HAPROXY_KEY[choice],
            names=names,
        )
        source = _joined(gateway.endpoint[version], 0)
        for run in lab.runs:
            for i in range(run.first, run.first + run.size):
                text += _HAPROXY_BACKEND.format(version=version, number=i, source=source, target=_target(version, i))
                text += _HAPROXY_BULK if run.what in ("sink", "source") else ""
    _start(lab, gateway, text, "haproxy", "-db", "-q", "-f")
    _listening(lab, gateway, choice)


def nginx(lab: Lab, gateway: Gateway, choice: Choice, name: Name, *, udp: bool = False) -> None:
    """nginx stream on a gateway; `choice`: TLS or PORT. Returns once it listens."""
    servers = "".join(
        _NGINX_SERVER.format(
            version=version,
            key="$ssl_preread_server_name" if choice is Choice.TLS else "$server_port",
            endpoint=_endpoint(lab, gateway, version, choice),
            listen="udp reuseport" if udp else "reuseport backlog=4096",
            source=gateway.endpoint[version],
            # A flow here is one datagram and its answer.
            more=" proxy_responses 1;" if udp else "",
            names="\n".join(f"{name(i)} {_target(version, i)};" for i in range(lab.size)),
        )
        for version in FIRST_ALIAS
    )
    text = _NGINX.format(
        module=_NGINX_STREAM,
        directory=gateway.directory,
        log=gateway.directory / "log",
        processes=PARTS,
        half_close="" if udp else "proxy_half_close on;",
        servers=("ssl_preread on;\n" if choice is Choice.TLS else "") + servers,
    )
    _start(lab, gateway, text, "nginx", "-e", str(gateway.directory / "log"), "-c")
    if not udp:
        _listening(lab, gateway, choice)


def sslh(lab: Lab, gateway: Gateway, choice: Choice, name: Name) -> None:
    """sslh-select on a gateway, for IPv4 only; `choice`: TLS or HTTP. Returns once it listens."""
    protocols = ",\n".join(
        f'{{ {_SSLH_PROTOCOL[choice].format(name=name(i))}; host: "{ipaddress.ip_address(FIRST_ALIAS[4]) + i}";'
        f' port: "{ALIAS_PORT}"; log_level: 0; }}'
        for i in range(lab.size)
    )
    text = _SSLH.format(host=gateway.endpoint[4], port=ENDPOINT_PORT, protocols=protocols)
    _start(lab, gateway, text, "sslh-select", "-F")
    _listening(lab, gateway, choice, version=4)


def _endpoint(lab: Lab, gateway: Gateway, version: int, choice: Choice) -> str:
    if choice is not Choice.PORT:
        return _joined(gateway.endpoint[version], ENDPOINT_PORT)
    return f"{_joined(gateway.endpoint[version], FIRST_TRANSLATED_PORT)}-{FIRST_TRANSLATED_PORT + lab.size - 1}"


def _target(version: int, number: int) -> str:
    return _joined(str(ipaddress.ip_address(FIRST_ALIAS[version]) + number), ALIAS_PORT)


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _start(lab: Lab, gateway: Gateway, text: str, *argv: str) -> None:
    config, log = gateway.directory / "config", gateway.directory / "log"
    config.write_text(text)
    # sslh wants its file in the same word.
    words = (*argv[:-1], argv[-1] + str(config)) if argv[0] == "sslh-select" else (*argv, str(config))
    with log.open("a") as stderr:
        gateway.system = lab.spawn(gateway.host, *words, stderr=stderr)


def _listening(lab: Lab, gateway: Gateway, choice: Choice, version: int = 6) -> None:
    """Until it does."""
    port = FIRST_TRANSLATED_PORT if choice is Choice.PORT else ENDPOINT_PORT

    def answers() -> bool:
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        with gateway.host.entered(), socket.socket(family) as client:
            return client.connect_ex((gateway.endpoint[version], port)) == 0

    lab.wait(gateway, gateway.directory / "log", answers)
