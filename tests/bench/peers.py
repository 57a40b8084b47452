"""HAProxy and nginx as their manuals have them for passing TLS through by server name: the systems to compare with.

Both are given what helps them: one thread or process for each worker of ours, epoll, no logging, a wide range of source
ports, and no conntrack, since nothing in their namespaces asks for it. Both are told which source address to use: else
the kernel walks over all IPv6 addresses of the gateway for each connection (measured: more than half of their speed).
Neither tells the daemon who the client is.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
from collections.abc import Callable

from tests.bench.lab import ALIAS_PORT, ENDPOINT_PORT, FIRST_ALIAS, PARTS, Gateway, Lab

_NGINX_STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"

# defer-accept: a client of TLS speaks first. The two tcp-smart options save an ACK each. splice: payload stays in the
# kernel; only for daemons that carry much, since it doubles their speed and costs short connections some. maxconn: 6
# files for a spliced connection, and 20,000 may be all there are.
_HAPROXY = """\
global
    nbthread {threads}
    maxconn 3000
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
frontend by_name_{version}
    bind {endpoint} defer-accept
    tcp-request inspect-delay 5s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    use_backend %[req.ssl_sni,lower,map({names})]
"""
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
    proxy_half_close on;
    proxy_timeout 60s;
    proxy_buffer_size 256k;
    ssl_preread on;
{servers}
}}
"""
_NGINX_SERVER = """\
    map $ssl_preread_server_name $target{version} {{
{names}
    }}
    server {{
        listen {endpoint} reuseport backlog=4096;
        proxy_bind {source};
        proxy_pass $target{version};
    }}
"""


def haproxy(lab: Lab, gateway: Gateway, name: Callable[[int], str]) -> None:
    """HAProxy on a gateway; `name`: of daemon i, as clients ask for it. Returns once it listens."""
    text = _HAPROXY.format(threads=PARTS)
    for version in FIRST_ALIAS:
        names = gateway.directory / f"names{version}"
        names.write_text("".join(f"{name(i)} daemon_{version}_{i}\n" for i in range(lab.size)))
        text += _HAPROXY_FRONTEND.format(version=version, endpoint=_endpoint(gateway, version), names=names)
        source = _joined(gateway.endpoint[version], 0)
        for run in lab.runs:
            for i in range(run.first, run.first + run.size):
                text += _HAPROXY_BACKEND.format(version=version, number=i, source=source, target=_target(version, i))
                text += _HAPROXY_BULK if run.what in ("sink", "source") else ""
    _start(lab, gateway, text, "haproxy", "-db", "-q", "-f")


def nginx(lab: Lab, gateway: Gateway, name: Callable[[int], str]) -> None:
    """nginx stream on a gateway; `name`: of daemon i, as clients ask for it. Returns once it listens."""
    servers = "".join(
        _NGINX_SERVER.format(
            version=version,
            endpoint=_endpoint(gateway, version),
            source=gateway.endpoint[version],
            names="\n".join(f"{name(i)} {_target(version, i)};" for i in range(lab.size)),
        )
        for version in FIRST_ALIAS
    )
    text = _NGINX.format(
        module=_NGINX_STREAM,
        directory=gateway.directory,
        log=gateway.directory / "log",
        processes=PARTS,
        servers=servers,
    )
    _start(lab, gateway, text, "nginx", "-e", str(gateway.directory / "log"), "-c")


def versions() -> dict[str, str]:
    """Which ones these are."""
    texts = {
        "haproxy": subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=True).stdout,
        "nginx": subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr,
    }
    found = {name: re.search(r"\d+\.\d+\.\d+\S*", text) for name, text in texts.items()}
    return {name: match[0] if match else "unknown" for name, match in found.items()}


def _endpoint(gateway: Gateway, version: int) -> str:
    return _joined(gateway.endpoint[version], ENDPOINT_PORT)


def _target(version: int, number: int) -> str:
    return _joined(str(ipaddress.ip_address(FIRST_ALIAS[version]) + number), ALIAS_PORT)


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _start(lab: Lab, gateway: Gateway, text: str, *argv: str) -> None:
    config, log = gateway.directory / "config", gateway.directory / "log"
    config.write_text(text)
    with log.open("a") as stderr:
        gateway.system = lab.spawn(gateway.host, *argv, str(config), stderr=stderr)
    lab.wait(gateway, log, lambda: _listens(gateway))


def _listens(gateway: Gateway) -> bool:
    with gateway.host.entered(), socket.socket(socket.AF_INET6) as client:
        return client.connect_ex((gateway.endpoint[6], ENDPOINT_PORT)) == 0
