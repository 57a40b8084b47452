"""Reload: another configuration is put in force as a difference, and nobody notices but those whom it concerns.

Topology: tests/netns/gateway.py.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.gateway import Gateway, gateway
from tests.netns.lab import Host

CONFIG = """
[pools.tenants]
prefixes = ["10.64.0.0/24", "fd00:64::/120"]
[services.web]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["http"]
routes = [{ when = { "http.host" = "a.example" }, target = ["10.64.0.1:8080", "[fd00:64::1]:8080"] }]
"""


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        made.configure(CONFIG)
        yield made


def test_a_sighup_that_comes_while_the_daemon_starts_is_a_reload(lab: Gateway) -> None:
    def send() -> None:
        assert lab.daemon is not None
        pid = lab.daemon.pid
        # Python's own start, before the first line of ours, can hold nothing back.
        lab.wait(lambda: holds_back_sighup(pid), "the daemon's first line")
        os.kill(pid, signal.SIGHUP)

    lab.start(send)
    lab.wait(lambda: lab.count_events("reloaded") == 1, "the daemon has reloaded")


def holds_back_sighup(pid: int) -> bool:
    blocked = re.search(r"^SigBlk:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert blocked is not None
    return int(blocked[1], 16) >> signal.SIGHUP - 1 & 1 == 1
