"""More real servers out of Debian's packages (tests/setup.sh), and a real proxy, for tests of the parsers.

As in tests/netns/programs.py, server number N listens on the alias N, IPv4 and IPv6, in the gateway's namespace, and
reads and writes nothing outside of the test's directory. `seen` gives the addresses of those that asked, where the
server's protocol has no words for them and its log does.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.netns.gateway import CLIENT4, CLIENT6, ENDPOINT4, ENDPOINT6, Gateway
from tests.netns.programs import alias, await_listening, socket_name

BEHIND = {4: "198.51.100.2", 6: "2001:db8:1::2"}
"""A client of the proxy."""
STRANGER = {4: "198.51.100.3", 6: "2001:db8:1::3"}
"""The proxy's other address."""
V1, V2, V2_AUTHORITY, V2_STRANGER = 1001, 1002, 1003, 1004
"""Ports of the proxy, by the header that it sends; the last one sends it from its other address."""


def mosquitto(lab: Gateway, name: str, number: int, port: int) -> Path:
    """An MQTT broker that lets everybody in and keeps one message under the topic `who`: its name. Returns its log."""
    file, log = lab.directory / f"mosquitto-{name}.conf", lab.directory / f"mosquitto-{name}.log"
    file.write_text(
        f"user root\nallow_anonymous true\nlog_dest file {log}\n"
        f"listener {port} {alias(4, number)}\nlistener {port} {alias(6, number)}\n"
    )
    process = lab.spawn(lab.host, "mosquitto", "-c", f"{file}")
    await_listening(lab, process, socket_name(4, number, port), socket_name(6, number, port))
    lab.host.sh(f"mosquitto_pub -h {alias(4, number)} -p {port} -t who -m {name} -r")
    return log


def dnsmasq(lab: Gateway, name: str, number: int, port: int, *names: str) -> Path:
    """A DNS server that answers questions for TXT at `names` with its own name. Returns its log."""
    log = lab.directory / f"dnsmasq-{name}.log"
    process = lab.spawn(
        lab.host, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=",
        "--no-resolv", "--no-hosts", "--bind-interfaces", f"--port={port}",
        f"--listen-address={alias(4, number)},{alias(6, number)}",
        "--log-queries", f"--log-facility={log}", *(f"--txt-record={each},{name}" for each in names),
    )  # fmt: skip
    await_listening(lab, process, socket_name(4, number, port), socket_name(6, number, port))
    return log


def seen(log: Path) -> list[str]:
    """The addresses of clients in the log of a mosquitto or a dnsmasq, in the order in which they came."""
    return re.findall(r"(?:New client connected|query\S+ \S+) from (\S+?)(?::\d+ as .*)?\n", log.read_text())


def kamailio(lab: Gateway, name: str, number: int, port: int) -> None:
    """A SIP server over TCP that answers every request with 200 and, for a reason, the line `programs.answer`."""
    file = lab.directory / f"kamailio-{name}.cfg"
    file.write_text(
        f"""
        log_stderror=yes
        debug=-1
        children=1
        tcp_children=1
        listen=tcp:{socket_name(4, number, port)}
        listen=tcp:{socket_name(6, number, port)}
        loadmodule "sl.so"
        loadmodule "pv.so"
        request_route {{ sl_send_reply("200", "{name} $Ri $Rp $si"); }}
        """
    )
    lab.spawn(lab.host, "kamailio", "-DD", "-f", f"{file}", "-m", "8", "-M", "4", "-Y", f"{lab.directory}")
    # It is one of its children that listens.
    sockets = {socket_name(version, number, port) for version in (4, 6)}
    lab.wait(
        lambda: sockets <= {line.split()[3] for line in lab.host.sh("ss -Htln").splitlines()},
        f"kamailio listens on {sockets}",
    )


def haproxy(lab: Gateway, port: int, *names: str) -> None:
    """A HAProxy at the client's own address, in front of `port` of the endpoint; TLS ends there (NAME.pem of each)."""
    secrets = " ".join(f"crt {lab.directory}/{name}.pem" for name in names)
    lines = [
        "global",
        "maxconn 100",
        "defaults",
        "mode tcp",
        "retries 0",
        *(f"timeout {what} 30s" for what in ("connect", "client", "server")),
    ]
    sockets = []
    for version, own, stranger, endpoint in (
        (4, CLIENT4, STRANGER[4], ENDPOINT4),
        (6, f"[{CLIENT6}]", f"[{STRANGER[6]}]", f"[{ENDPOINT6}]"),
    ):
        for listen, bind, options in (
            (V1, "", "send-proxy"),
            (V2, "", "send-proxy-v2"),
            (V2_AUTHORITY, f"ssl {secrets}", "send-proxy-v2 proxy-v2-options authority"),
            (V2_STRANGER, "", f"send-proxy-v2 source {stranger}"),
        ):
            lines += [
                f"listen from-{listen}-{version}",
                f"bind {own}:{listen} {bind}",
                f"server endpoint {endpoint}:{port} {options}",
            ]
            sockets.append(f"{own}:{listen}")
    file = lab.directory / "haproxy.cfg"
    file.write_text("\n".join(lines) + "\n")
    process = lab.spawn(lab.client, "haproxy", "-db", "-q", "-f", f"{file}")
    await_listening(lab, process, *sockets, host=lab.client)
