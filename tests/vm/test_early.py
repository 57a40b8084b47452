"""Early steering on a stock kernel: native `queue`, dummy devices, the whole daemon. Topology: tests/netns/gateway.py.

One gateway serves all of it: to start the daemon is the slow part under emulation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from steerd.model import Extension, Reason
from steerd.telemetry.counters import Counters
from tests.netns.gateway import CLIENT4, ENDPOINT4, ROOT, gateway
from tests.netns.lab import Host

CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/22", "fd00:64::/118"]
[pools.routed]
prefixes = ["10.65.0.0/24", "fd00:65::/120"]
mode = "anyip"

[services.main]
endpoints = ["203.0.113.10:443/tcp", "[2001:db8::10]:443/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = { pool = "tenants", by = "extension", port = 8080 }
[[services.main.routes]]
when = { "portext.dst" = 7, "portext.src" = 3 }
target = ["10.65.0.9:same", "[fd00:65::9]:same"]
"""


def test_early_steering_by_native_queue_and_dummy_devices(new_host: Callable[[str], Host]) -> None:
    with gateway(new_host) as lab:
        lab.configure(CONFIG)
        lab.start()
        lab.respond(
            ("10.64.0.0", 64, 8080), ("fd00:64::", 64, 8080), ("10.65.0.9", 1, 443), ("fd00:65::9", 1, 443)
        )  # fmt: skip
        (loaded,) = (event for event in lab.events() if event["event"] == "table loaded")
        assert loaded["queue"] == "nft"
        assert loaded["aliases_added"] == 2048
        assert "queue to jhash" in lab.host.sh("nft list chain inet steerd queue4")
        assert "dummy" in lab.host.sh("ip -d link show steer0")
        assert "STEERD" not in lab.host.sh("iptables-nft -t mangle -S")

        for extension in range(1, 33):
            assert lab.ask(Extension(extension, 0), 443).startswith(f"10.64.0.{extension - 1} 8080 {CLIENT4} ")
            answer = lab.ask(Extension(extension, 0), 443, version=6)
            assert answer.startswith(f"fd00:64::{extension - 1:x} 8080 ".replace("::0 ", ":: "))
        assert lab.ask(Extension(7, 3), 443).startswith("10.65.0.9 443 ")
        assert lab.ask(Extension(7, 3), 443, version=6).startswith("fd00:65::9 443 ")
        for refused in (None, Extension(100, 0), Extension(5000, 0)):  # no extension; nobody listens; outside the pool
            with pytest.raises(ConnectionRefusedError):
                lab.ask(refused, 443)

        counters = Counters.open(lab.directory / "run" / "counters")
        assert all(counters.slot(worker)[Reason.ARITHMETIC] > 0 for worker in range(2))
        assert counters.total(Reason.FAULT) == 0
        kernel = lab.counters()
        assert kernel["diverted"] == 2 * 32 + 2 + 3
        assert kernel["refused"] == 2

        # A reset connection's 4-tuple, asked for another target: the old translation is found out.
        source = (CLIENT4, 40000)
        with lab.socket(Extension(5, 0), source=source) as connection:
            connection.connect((ENDPOINT4, 443))
            assert connection.recv(256).startswith(b"10.64.0.4 ")
            connection.send(b"reset")
            with pytest.raises(ConnectionResetError):
                connection.recv(256)
        assert lab.ask(Extension(6, 0), 443, source=source).startswith("10.64.0.5 ")

        lab.stop()
        lab.host.sh(f"cd {ROOT}; {sys.executable} -m steerd.cli.main down {lab.config}")
        assert "steer" not in lab.host.sh("nft list ruleset; ip -o link; ip route show table local")
