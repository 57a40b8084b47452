"""`make demo`: one public address, 70,000 daemons behind it, every one of them reached and checked.

             client                                  gateway
      198.51.100.1/24  ---- veth ----  198.51.100.254     203.0.113.10 (the one public address, on lo)
      4 client programs                steerd             70,000 listening sockets, each on an alias of its own
      4 curls                                             203.0.113.11 (the second act's, on lo)
                                                          2,000 web servers, each on an alias of its own
      1 QUIC client, 1 resolver                           200 HTTP/3 servers and 1,000 name servers, likewise

The first act steers early, by the port extension of the SYN. The second steers late, by what ordinary clients say
first: 1,000 TLS names and 1,000 HTTP hosts on one address and port, each asked for by curl. The third steers datagrams
on that address: 200 QUIC names, each a whole handshake (both of its ends are Python, and decide how long it takes), and
1,000 DNS names, all asked for from one socket.

Each act prints one line with its figures when all are over, the first act the very last. All of it in two network
namespaces, which are removed at the end, also when interrupted. Needs root.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.netns.gateway import ENDPOINT4 as ENDPOINT
from tests.netns.lab import Host, link, sh

DAEMONS = 70_000
CLIENT = "198.51.100.1"
FIRST_ALIAS = "10.64.0.0"
ALIAS_PORT = 7000
FIRST_EXTENDED = 65537
# Extended port 131,072 is TCP port 0 of extension 2: nobody can connect there, so its alias stays without a daemon.
LAST_EXTENDED = FIRST_EXTENDED + DAEMONS
ALIASES = DAEMONS + 1
RESPONDERS = 5
CLIENTS = 4
SITES_ENDPOINT = "203.0.113.11"
SITES_PORT = 443
NAMES = 1_000
"""... of TLS and as many of HTTP."""
CURLS = 2
"""... for each of the two."""
QUIC_NAMES = 200
DNS_NAMES = 1_000
ROOT = Path(__file__).resolve().parents[2]
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CONFIG = f"""\
[gateway]
state_dir = "{{directory}}/state"
run_dir = "{{directory}}/run"
user = "root"
workers = 2

[gateway.limits]            # all of these connections come from one address
source_rate = 1000000
source_burst = 1000000
stranger_rate = 1000000
stranger_burst = 1000000
total_rate = 1000000
total_burst = 1000000

[gateway.timeouts]          # conntrack may have room for 65,536 connections only
time_wait = 2

[pools.tenants]
prefixes = ["10.64.0.0/15"]
size = {ALIASES}

[services.everything]
endpoints = ["{ENDPOINT}:1-65535/tcp"]
inspect = ["port-extension"]
unextended = "unmatched"
extension_pool = {{{{ pool = "tenants", by = "extended-port", first = {FIRST_EXTENDED}, port = {ALIAS_PORT} }}}}

[pools.sites]
prefixes = ["10.66.0.0/20"]
size = {2 * NAMES + QUIC_NAMES + DNS_NAMES}

[services.sites]
endpoints = ["{SITES_ENDPOINT}:{SITES_PORT}/tcp"]
inspect = ["tls", "http"]
routes = [
{{routes}}
]

[services.quic]
endpoints = ["{SITES_ENDPOINT}:443/udp"]
inspect = ["quic"]
routes = [
{{quic}}
]

[services.names]
endpoints = ["{SITES_ENDPOINT}:53/udp"]
inspect = ["dns"]
routes = [
{{dns}}
]
"""


class Kind(NamedTuple):
    """One half of the second or third act: site n is asked for by the name n, and its daemon is on the n-th alias."""

    scheme: str
    key: str
    domain: str
    first_alias: str
    alias_port: int
    size: int = NAMES

    def name(self, number: int) -> str:
        return f"site{number:04}.{self.domain}"

    def alias(self, number: int) -> str:
        return _alias(self.first_alias, number)

    def url(self, number: int | str) -> str:
        """A site's URL; for "[FIRST-LAST]" the pattern that curl makes the URLs of these sites from."""
        name = self.name(number) if isinstance(number, int) else f"site{number}.{self.domain}"
        return f"{self.scheme}://{name}:{SITES_PORT}/"

    def routes(self) -> str:
        return "\n".join(
            f'{{ when = {{ "{self.key}" = "{self.name(n)}" }}, target = "{self.alias(n)}:{self.alias_port}" }},'
            for n in range(self.size)
        )


KINDS = (
    Kind("https", "tls.sni", "tls.example", "10.66.0.0", 8443),
    Kind("http", "http.host", "http.example", "10.66.3.232", 8080),
)
QUIC = Kind("https", "quic.sni", "quic.example", "10.66.7.208", 8443, QUIC_NAMES)
DNS = Kind("dns", "dns.qname", "dns.example", "10.66.8.152", 5353, DNS_NAMES)


class Demo:
    """The hosts and programs of one run, and how to be rid of them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.hosts: list[Host] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.directory = tempfile.TemporaryDirectory(prefix="steerd-demo-")
        self.log = Path(self.directory.name) / "log"
        self.certificate = Path(self.directory.name) / "sites.pem"

    def close(self) -> None:
        with _uninterrupted():
            for process in self.processes:
                process.kill()
                process.wait()
            for host in self.hosts:
                host.close()
            self.directory.cleanup()

    def host(self, role: str) -> Host:
        with _uninterrupted():  # else there could be a namespace that `close` does not know of
            self.hosts.append(Host(role))
        return self.hosts[-1]

    def spawn(self, host: Host, *argv: str, stderr: IO[str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            host.command(*argv),
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            process_group=0,  # Ctrl-C is for the demo alone; else every program prints a traceback of its own
        )  # fmt: skip
        self.processes.append(process)
        return process

    def topology(self) -> tuple[Host, Host]:
        client, gateway = self.host("client"), self.host("gateway")
        link(client, "eth0", gateway, "eth0")
        client.sh(f"ip addr add {CLIENT}/24 dev eth0; ip route add default via 198.51.100.254")
        gateway.sh(
            "ip addr add 198.51.100.254/24 dev eth0;"
            f"ip addr add {ENDPOINT}/32 dev lo; ip addr add {SITES_ENDPOINT}/32 dev lo"
        )
        return client, gateway

    def start_steerd(self, gateway: Host) -> tuple[subprocess.Popen[str], dict[str, dict[str, float]]]:
        """The daemon's process and its first log events by name, once all workers are bound."""
        config = Path(self.directory.name) / "steerd.toml"
        config.write_text(
            CONFIG.format(
                directory=self.directory.name,
                routes="\n".join(kind.routes() for kind in KINDS),
                quic=QUIC.routes(),
                dns=DNS.routes(),
            )
        )
        with self.log.open("w") as log:
            process = self.spawn(gateway, sys.executable, "-m", "steerd", "run", str(config), stderr=log)
        while True:
            lines = self.log.read_text().splitlines(keepends=True)
            events = {event["event"]: event for event in map(json.loads, filter(_is_event, lines))}
            if "ready" in events:
                return process, events
            if process.poll() is not None:
                raise SystemExit(f"demo: steerd did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def start_daemons(self, gateway: Host) -> None:
        """70,000 listening sockets in a few processes; returns once all of them listen."""
        share = -(-ALIASES // RESPONDERS)
        hole = 131072 - FIRST_EXTENDED
        processes = []
        for first in range(0, ALIASES, share):
            process = self.spawn(gateway, sys.executable, "-m", "tests.netns.responder")
            runs = [(first, min(first + share, ALIASES))]
            if runs[0][0] <= hole < runs[0][1]:
                runs = [(first, hole), (hole + 1, runs[0][1])]
            assert process.stdin is not None
            for start, end in runs:
                if end > start:
                    process.stdin.write(f"{_alias(FIRST_ALIAS, start)} {end - start} {ALIAS_PORT}\n")
            process.stdin.close()
            processes.append(process)
        _await_listening(processes, DAEMONS)

    def connect_all(self, client: Host) -> tuple[int, int, float]:
        """Reach every extended port; returns (reached, wrong, seconds)."""
        started = time.monotonic()
        clients = [
            self.spawn(
                client, sys.executable, "-m", "tests.demo.client", str(FIRST_EXTENDED + number), str(LAST_EXTENDED),
                str(CLIENTS), CLIENT, FIRST_ALIAS, str(ALIAS_PORT), str(FIRST_EXTENDED),
            )
            for number in range(CLIENTS)
        ]  # fmt: skip
        results = [(0, 0, 0)] * CLIENTS
        with self.progress() as progress:
            task = progress.add_task("daemons reached and checked", total=DAEMONS)
            for number, line in _lines(clients):
                tried, reached, wrong = map(int, line.split())
                results[number] = (tried, reached, wrong)
                progress.update(task, completed=sum(result[1] for result in results))
        return sum(r[1] for r in results), sum(r[2] for r in results), time.monotonic() - started

    def start_sites(self, gateway: Host) -> None:
        """The second act's web servers, and a certificate for all names; returns once all of them listen."""
        sh(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=demo"
            f" -addext 'subjectAltName=DNS:*.{KINDS[0].domain},DNS:*.{QUIC.domain}' -keyout {self.certificate}.key"
            f" -out {self.certificate} 2>&1; cat {self.certificate}.key >> {self.certificate}"
        )
        processes = [
            self.spawn(
                gateway, sys.executable, "-m", "tests.demo.sites",
                kind.first_alias, str(NAMES), str(kind.alias_port),
                *([str(self.certificate)] if kind.scheme == "https" else []),
            )
            for kind in KINDS
        ]  # fmt: skip
        _await_listening(processes, len(KINDS) * NAMES)

    def visit_all(self, client: Host) -> tuple[int, int, float]:
        """Ask for every site with curl; returns (sites that answered rightly, sites that another answered for,
        seconds)."""
        started = time.monotonic()
        expected = {
            kind.url(n): f"{kind.alias(n)} {kind.alias_port} {CLIENT} {kind.name(n)}"
            for kind in KINDS
            for n in range(NAMES)
        }
        share = NAMES // CURLS
        curls = [
            self.spawn(
                client, "curl", "-q", "-sS", "--no-buffer", "--noproxy", "*", "--max-time", "15",
                "--cacert", str(self.certificate), "--connect-to", f"::{SITES_ENDPOINT}:{SITES_PORT}",
                "--write-out", r" %{url_effective}\n", kind.url(f"[{first:04}-{first + share - 1:04}]"),
            )
            for kind in KINDS
            for first in range(0, NAMES, share)
        ]  # fmt: skip
        right: set[str] = set()
        wrong = 0
        with self.progress() as progress:
            task = progress.add_task("names asked for by curl    ", total=len(expected))
            for _, line in _lines(curls):
                body, _, url = line.rstrip("\n").rpartition(" ")
                if body == expected[url]:
                    right.add(url)
                    progress.update(task, completed=len(right))
                elif body:
                    wrong += 1
                    print(f"{url}: expected {expected[url]!r}, got {body!r}", file=sys.stderr)
        return len(right), wrong, time.monotonic() - started

    def start_datagram_sites(self, gateway: Host) -> None:
        """The third act's daemons; returns once all of them are bound."""
        processes = [
            self.spawn(
                gateway, sys.executable, "-m", "tests.demo.quic", "daemons", str(self.certificate),
                QUIC.first_alias, str(QUIC.size), str(QUIC.alias_port),
            ),
            self.spawn(
                gateway, sys.executable, "-m", "tests.demo.dns", "daemons",
                DNS.first_alias, str(DNS.size), str(DNS.alias_port),
            ),
        ]  # fmt: skip
        _await_listening(processes, QUIC.size + DNS.size)

    def ask_all(self, client: Host) -> tuple[int, int, float]:
        """Ask for every name by datagrams; returns as `visit_all`."""
        started = time.monotonic()
        expected = {
            QUIC.name(n): f"{QUIC.alias(n)} {QUIC.alias_port} {CLIENT} {QUIC.name(n)}" for n in range(QUIC.size)
        }
        expected |= {DNS.name(n): DNS.alias(n) for n in range(DNS.size)}
        clients = [
            self.spawn(
                client, sys.executable, "-m", "tests.demo.quic", "client", str(self.certificate),
                SITES_ENDPOINT, "443", *map(QUIC.name, range(QUIC.size)),
            ),
            self.spawn(
                client, sys.executable, "-m", "tests.demo.dns", "client",
                SITES_ENDPOINT, "53", *map(DNS.name, range(DNS.size)),
            ),
        ]  # fmt: skip
        right: set[str] = set()
        wrong = 0
        with self.progress() as progress:
            task = progress.add_task("names asked for by datagram", total=len(expected))
            for _, line in _lines(clients):
                name, _, said = line.rstrip("\n").partition(" ")
                if said == expected[name]:
                    right.add(name)
                    progress.update(task, completed=len(right))
                else:
                    wrong += 1
                    print(f"{name}: expected {expected[name]!r}, got {said!r}", file=sys.stderr)
        return len(right), wrong, time.monotonic() - started

    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.console)


def _await_listening(processes: list[subprocess.Popen[str]], wanted: int) -> None:
    """Each of them prints "listening N" once its N sockets listen."""
    listening = 0
    for process in processes:
        assert process.stdout is not None
        listening += int(process.stdout.readline().removeprefix("listening ") or 0)
    if listening != wanted:
        raise SystemExit(f"demo: {listening} sockets listen, not {wanted}")


def _lines(processes: list[subprocess.Popen[str]]) -> Iterator[tuple[int, str]]:
    """What they print, as it comes, with the number of the process, until all have ended."""
    selector = selectors.DefaultSelector()
    for number, process in enumerate(processes):
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ, number)
    while selector.get_map():
        for key, _ in selector.select():
            line = key.fileobj.readline()  # type: ignore[union-attr]
            if line:
                yield key.data, line
            else:
                selector.unregister(key.fileobj)


def _is_event(line: str) -> bool:
    """Whether a line of the log is an event that is written to its end, not a message of Python or half a line."""
    return line.startswith("{") and line.endswith("}\n")


def _alias(first: str, index: int) -> str:
    return str(ipaddress.ip_address(first) + index)


def _memory(process: subprocess.Popen[str]) -> int:
    """Proportional set size of the daemon and its workers, in bytes (`ip netns exec` has become the daemon)."""
    pids = [str(process.pid)]
    for pid in pids:  # grows: workers are the nursery's children
        pids += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def run(console: Console) -> bool:
    """The whole demo; prints its table and its last lines, and returns whether every daemon was reached."""
    demo = Demo(console)
    try:
        client, gateway = demo.topology()
        console.print(f"steerd starts with {ALIASES:,} aliases (one for TCP port 0, which no one can use) ...")
        steerd, events = demo.start_steerd(gateway)
        console.print(f"{DAEMONS:,} daemons start, each with a listening socket on its own alias ...")
        demo.start_daemons(gateway)
        console.print(f"the client connects to {ENDPOINT}, extended ports {FIRST_EXTENDED:,} to {LAST_EXTENDED:,} ...")
        reached, wrong, seconds = demo.connect_all(client)
        demo.start_sites(gateway)
        console.print(f"curl asks {SITES_ENDPOINT}:{SITES_PORT} for {NAMES:,} names in TLS and {NAMES:,} in HTTP ...")
        named, misnamed, visit_seconds = demo.visit_all(client)
        demo.start_datagram_sites(gateway)
        console.print(f"{QUIC.size:,} QUIC names and {DNS.size:,} DNS names are asked for at {SITES_ENDPOINT} ...")
        asked, misled, ask_seconds = demo.ask_all(client)
        memory = _memory(steerd)
    finally:
        demo.close()

    table = Table(show_header=False)
    loaded = events["table loaded"]
    table.add_row("aliases made", f"{loaded['aliases_added']:,}")
    table.add_row("... in, with the table", f"{loaded['seconds']:.2f} s")
    table.add_row("daemons behind one address", f"{DAEMONS:,}")
    table.add_row("reached, and named right", f"{reached:,}")
    table.add_row("connections per second", f"{reached / seconds:,.0f}")
    table.add_row("wrong deliveries", f"{wrong:,}")
    table.add_row("names on one address and port", f"{len(KINDS) * NAMES:,} (half TLS, half HTTP)")
    table.add_row("answered by their own daemon", f"{named:,}")
    table.add_row("... by another", f"{misnamed:,}")
    table.add_row("names asked for by datagram", f"{QUIC.size:,} QUIC, {DNS.size:,} DNS (from one socket)")
    table.add_row("answered by their own daemon", f"{asked:,}")
    table.add_row("... by another", f"{misled:,}")
    table.add_row("memory of the agent", f"{memory / 1e6:,.0f} MB (main process and two workers)")
    console.print(table)
    print(f"demo: datagrams={asked} wrong={misled} seconds={ask_seconds:.1f}")
    print(f"demo: names={named} wrong={misnamed} seconds={visit_seconds:.1f}")
    print(f"demo: reached={reached} wrong={wrong} seconds={seconds:.1f}", flush=True)
    right = (reached, named, asked) == (DAEMONS, len(KINDS) * NAMES, QUIC.size + DNS.size)
    return right and not wrong + misnamed + misled


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and the like wait until the (short) block has ended. Programs that are started inside are deaf to them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupted(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for signal_number in INTERRUPTS:
        signal.signal(signal_number, _interrupted)
    sys.exit(0 if run(Console(highlight=False)) else 1)
