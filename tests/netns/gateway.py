"""A gateway under test: the hosts, the daemon, and what stands behind it.

          client                                   gateway
    198.51.100.1/24  ---- veth ----  198.51.100.254    203.0.113.10  2001:db8::10   (endpoints, on lo)
    2001:db8:1::1/64                 2001:db8:1::fe    steerd, aliases, daemons (responder)

The client has a few more addresses, for tests of many sources: 198.51.100.2 .. .9.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerd.model import Extension
from steerd.wire import portext
from tests.netns.lab import Host, link

ENDPOINT4 = "203.0.113.10"
ENDPOINT6 = "2001:db8::10"
CLIENT4 = "198.51.100.1"
CLIENT6 = "2001:db8:1::1"
ROOT = Path(__file__).resolve().parents[2]
NUMBERS = portext.Numbers()
# What reaches the client though it belongs to nothing that the client began is a packet nobody asked for.
UNASKED = """
table inet unasked {
    counter unasked { }
    chain arriving {
        type filter hook input priority 0
        meta l4proto icmpv6 accept
        iif != lo ct state new,invalid counter name unasked
    }
}
"""
# Under emulation (tests/vm) everything takes so many times longer.
SLOWER = 20 if "STEERD_VM_KERNEL" in os.environ else 1


class Gateway:
    """Client and gateway hosts, and whatever was started on them."""

    def __init__(self, new_host: Callable[[str], Host]) -> None:
        self.client = new_host("client")
        self.host = new_host("gateway")
        link(self.client, "eth0", self.host, "eth0")
        self.client.sh(
            f"ip addr add {CLIENT4}/24 dev eth0; ip -6 addr add {CLIENT6}/64 dev eth0 nodad;"
            + "".join(f"ip addr add 198.51.100.{n}/24 dev eth0;" for n in range(2, 10))
            + "ip route add default via 198.51.100.254; ip -6 route add default via 2001:db8:1::fe;"
            "sysctl -qw net.ipv4.ip_local_port_range='10000 65000' net.ipv4.tcp_syn_retries=6"
        )
        self.host.sh(
            "ip addr add 198.51.100.254/24 dev eth0; ip -6 addr add 2001:db8:1::fe/64 dev eth0 nodad;"
            f"ip addr add {ENDPOINT4}/32 dev lo; ip -6 addr add {ENDPOINT6}/128 dev lo nodad"
        )
        self.client.sh(f"nft -f - <<'RULES'\n{UNASKED}\nRULES")
        self.allow_unasked = False
        self.directory = Path(tempfile.mkdtemp(prefix="steerd-test-"))
        self.config = self.directory / "steerd.toml"
        self.log = self.directory / "log"
        self.expected_warnings: list[str] = []
        self.daemon: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[Any]] = []

    # ---- the daemon ----
    def configure(self, body: str, gateway: str = "") -> None:
        """Write the configuration: `body` in TOML, and more lines for [gateway] (before its sub-tables)."""
        directories = f'state_dir = "{self.directory}/state"\nrun_dir = "{self.directory}/run"\nuser = "root"\n'
        self.config.write_text(f"[gateway]\n{directories}workers = 2\n{gateway}\n{body}")

    def start(self, meanwhile: Callable[[], None] = lambda: None, *, through: Sequence[str] = ()) -> None:
        """Start the daemon, do something else, and wait until every worker is bound. `through`: a command that executes
        what is appended to it."""
        ready = self.count_events("ready")
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                self.host.command(*through, sys.executable, "-m", "steerd", "run", str(self.config)),
                stderr=log, stdout=log, cwd=ROOT,
            )  # fmt: skip
        meanwhile()
        self.wait(lambda: self.count_events("ready") > ready, "the daemon is ready")

    def start_without_a_table(self) -> None:
        """Start the daemon where nft refuses to load anything, and wait until it gives up for that."""
        programs = self.directory / "programs"
        programs.mkdir()
        (programs / "nft").write_text('#!/bin/sh\ncase "$1" in --check) exit 0;; *) exit 1;; esac\n')
        (programs / "nft").chmod(0o755)
        path = f"PATH={programs}:{os.environ['PATH']}"
        start = self.host.command("env", path, sys.executable, "-m", "steerd", "run", str(self.config))
        done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode and "nft -f - failed" in done.stderr, done.stderr

    def stop(self) -> None:
        """SIGTERM, and wait."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        assert self.daemon.wait(120 * SLOWER) == 0, self.log.read_text()
        self.daemon = None

    def kill(self) -> None:
        """SIGKILL to the main process; the workers follow it."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait(120 * SLOWER)
        self.daemon = None

    def events(self) -> list[dict[str, Any]]:
        """The log so far; lines that are no JSON (a traceback, say) fail the test."""
        text = self.log.read_text() if self.log.exists() else ""
        # What comes behind the last line end is being written now.
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def count_events(self, name: str) -> int:
        return sum(event["event"] == name for event in self.events())

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds * SLOWER
        while not condition():
            alive = self.daemon is None or self.daemon.poll() is None
            log = self.log.read_text() if self.log.exists() else ""
            assert alive and time.monotonic() < deadline, f"not reached: {what}\n{log}"
            time.sleep(0.02)

    def counters(self) -> dict[str, int]:
        """The table's named counters."""
        objects = json.loads(self.host.sh("nft -j list counters table inet steerd"))["nftables"]
        return {o["counter"]["name"]: o["counter"]["packets"] for o in objects if "counter" in o}

    def repeated(self, host: Host | None = None) -> int:
        """Segments that a host's kernel (the client's, unless another is named) has sent again so far, SYNs too."""
        with (host or self.client).entered():
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[names.index("RetransSegs")])

    def at_first_sight(self, attempt: Callable[[], object], *named: str) -> int:
        """How far `attempt` moves counters of the table (of what is decided, unless others are named), in a try in
        which the client repeated nothing. That it does where something goes wrong, and when this machine is slow; so of
        several tries one must do without."""

        def counted() -> int:
            counters = self.counters()
            return sum(counters[name] for name in named or ("diverted", "offloaded"))

        for _ in range(8):
            before, repeated = counted(), self.repeated()
            attempt()
            if self.repeated() == repeated:
                return counted() - before
        raise AssertionError("the client had to repeat itself every time")

    # ---- daemons behind it ----
    def respond(self, *runs: tuple[str, int, int], program: str = "responder") -> subprocess.Popen[str]:
        """A responder on the gateway for runs of (first address, count, port); returns once it listens. `program`: or
        "udp_responder"."""
        process = subprocess.Popen(
            self.host.command(sys.executable, "-m", f"tests.netns.{program}"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._processes.append(process)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("".join(f"{first} {count} {port}\n" for first, count, port in runs))
        process.stdin.close()
        assert process.stdout.readline().startswith("listening")
        return process

    def spawn(self, host: Host, *argv: str) -> subprocess.Popen[str]:
        """Another program on one of the hosts; ended with the test."""
        process = subprocess.Popen(host.command(*argv), stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self._processes.append(process)
        return process

    # ---- the client ----
    def socket(
        self, extension: Extension | None, *, version: int = 4, source: tuple[str, int] | None = None
    ) -> socket.socket:
        """A client's socket that will carry an extension in the IP header, not yet connected."""
        with self.client.entered():
            client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        client.settimeout(60 * SLOWER)
        if source:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(source)
        if extension is not None and version == 4:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, portext.encode_ipv4(extension, NUMBERS))
        elif extension is not None:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, portext.encode_ipv6(extension, NUMBERS))
        return client

    def ask(
        self,
        extension: Extension | None,
        port: int,
        *,
        version: int = 4,
        source: tuple[str, int] | None = None,
        linger: bool = True,
    ) -> str:
        """Connect to the endpoint with an extension and return the daemon's line, without its end."""
        with self.socket(extension, version=version, source=source) as client:
            client.connect((ENDPOINT4 if version == 4 else ENDPOINT6, port))
            if not linger:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            line = b""
            while not line.endswith(b"\n"):
                data = client.recv(4096)
                assert data, f"closed after {line!r}"
                line += data
            return line.decode().strip()

    def close(self) -> None:
        if self.daemon is not None:
            self.stop()
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        try:
            unexpected = [
                event
                for event in self.events()
                if event["level"] not in ("info", "debug") and event["event"] not in self.expected_warnings
            ]
            assert unexpected == [], unexpected
            unasked = self.client.sh("nft list counter inet unasked unasked")
            assert self.allow_unasked or "packets 0 " in unasked, unasked
        finally:
            shutil.rmtree(self.directory)


@contextmanager
def gateway(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    """A gateway for one test. A warning in the daemon's log that the test did not expect fails it."""
    made = Gateway(new_host)
    try:
        yield made
    except BaseException:
        print(made.log.read_text()[-5000:] if made.log.exists() else "no log")
        made.expected_warnings = [event["event"] for event in made.events()]
        raise
    finally:
        made.close()
