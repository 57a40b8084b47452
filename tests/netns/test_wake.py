"""Daemons that are started when a connection comes: real commands behind a thousand sleeping aliases.

Topology: tests/netns/gateway.py. Every alias of the pool has a daemon (tests.netns.sleeper), none of which runs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from steerd.model import Extension, Reason
from steerd.telemetry.counters import Counters, Extra
from tests.netns import sleeper
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, ROOT, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.test_late_attacks import spoofed
from tests.netns.test_privileges import with_account

PORT = 8080
NAMES = 16
GREETER = 9
"""Whom silent clients are sent to."""
ENDPOINTS = {4: ENDPOINT4, 6: ENDPOINT6}
ADDRESSES = {4: "10.64.0.0", 6: "fd00:64::"}


class Sleepy:
    """A gateway whose daemons sleep."""

    def __init__(self, lab: Gateway, directory: Path) -> None:
        self.lab = lab
        self.before_end: Callable[[], object] = lambda: None
        """Called by clients that were answered, before they close their connections."""
        self.log = directory / "starts"
        self.log.touch()
        self.log.chmod(0o666)

    def configure(
        self, pool: str = "", limits: str = "", name: str = "{index}", gateway: str = "", wake: str | None = None
    ) -> None:
        """`pool`, `limits`, `gateway`: more lines for these tables. `wake`: as in the file, if not a command."""
        argv = ["/usr/bin/python3", "-I", "-S", sleeper.__file__, str(self.log), str(PORT), "{index}", name]
        wake = f'{argv!r}\nuser = "nobody"' if wake is None else wake
        indices = [*range(NAMES), sleeper.SLOW, sleeper.DEAF]
        routes = {
            key: ",\n".join(
                f'{{ when = {{ {key} = "{value.format(index)}" }}, target = '
                f'["10.64.{index >> 8}.{index & 255}:{PORT}", "[fd00:64::{index:x}]:{PORT}"] }}'
                for index in indices
            )
            for key, value in (("http.host", "h{}.example"), ("prefix", "to {} "))
        }
        self.lab.configure(
            f"""
[wake]
{limits}

[pools.tenants]
prefixes = ["10.64.0.0/22", "fd00:64::/118"]
wake = {wake}
{pool}

[services.early]
endpoints = ["203.0.113.10:80/tcp", "[2001:db8::10]:80/tcp"]
inspect = ["port-extension"]
extension_pool = {{ pool = "tenants", by = "extension", port = {PORT} }}

[services.late]
endpoints = ["203.0.113.10:8000/tcp", "[2001:db8::10]:8000/tcp"]
inspect = ["http"]
routes = [{routes["http.host"]}]

[services.greeted]
endpoints = ["203.0.113.10:25/tcp", "[2001:db8::10]:25/tcp"]
inspect = ["prefix"]
first_payload_timeout = 0.2
on_silence = ["10.64.0.{GREETER}:{PORT}", "[fd00:64::{GREETER}]:{PORT}"]

[services.udp]
endpoints = ["203.0.113.10:9000/udp", "[2001:db8::10]:9000/udp"]
inspect = ["prefix"]
routes = [{routes["prefix"]}]
""",
            gateway,
        )

    def steerctl(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "steerd.cli.ctl", *arguments, "--config", str(self.lab.config)]
        self.lab.host.sh(f"cd {ROOT}; {' '.join(command)}")

    def lease(self, name: str, index: int) -> None:
        """Give an alias to a name, with a route for the host hINDEX.example."""
        route = ("--service", "late", "--key", f"http.host=h{index}.example", "--port", str(PORT))
        self.steerctl("lease", "add", name, "--pool", "tenants", *route)

    def starts(self) -> list[list[str]]:
        """The lines of daemons that were started, in words: index, name, process, ..."""
        return [line.split() for line in self.log.read_text().splitlines()]

    def running(self) -> list[int]:
        """The processes of those that run."""
        return [int(words[2]) for words in self.starts() if Path(f"/proc/{words[2]}/exe").exists()]

    def early(self, index: int, version: int = 4) -> str:
        """Who answers; "reset" if nobody is to."""
        with contextlib.closing(self.lab.socket(Extension(index + 1, 0), version=version)) as client:
            try:
                client.connect((ENDPOINTS[version], 80))
                answer = client.recv(4096).decode()
            except (ConnectionRefusedError, ConnectionResetError):
                return "reset"
            self.before_end()
            return answer

    def late(self, index: int, version: int = 4) -> str:
        with contextlib.closing(self.lab.socket(None, version=version)) as client:
            client.connect((ENDPOINTS[version], 8000))
            try:
                client.sendall(f"GET / HTTP/1.1\r\nHost: h{index}.example\r\n\r\n".encode())
                answer = client.recv(4096).decode()
            except ConnectionResetError:
                return "reset"
            self.before_end()
            return answer

    def silent(self, index: int, version: int = 4) -> str:
        """One who waits for a greeting."""
        assert index == GREETER
        with contextlib.closing(self.lab.socket(None, version=version)) as client:
            client.connect((ENDPOINTS[version], 25))
            return client.recv(4096).decode()

    def udp(self, index: int, version: int = 4) -> str:
        """One datagram, which is never repeated."""
        with self.lab.client.entered():
            client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        with contextlib.closing(client):
            client.settimeout(30)
            client.sendto(f"to {index} ".encode(), (ENDPOINTS[version], 9000))
            return client.recv(4096).decode()

    def decisions(self, reason: Reason) -> int:
        return Counters.open(self.lab.directory / "run" / "counters").total(reason)


def named(index: int, version: int, name: str | None = None) -> str:
    address = f"10.64.{index >> 8}.{index & 255}" if version == 4 else (f"fd00:64::{index:x}" if index else "fd00:64::")
    return f"{index if name is None else name} {address} {PORT}\n"


@pytest.fixture
def sleepy(new_host: Callable[[str], Host]) -> Iterator[Sleepy]:
    with tempfile.TemporaryDirectory(prefix="steerd-wake-") as directory, gateway(new_host) as lab:
        Path(directory).chmod(0o755)
        made = Sleepy(lab, Path(directory))
        try:
            yield made
        finally:
            for pid in made.running():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(pid, signal.SIGKILL)


def test_the_first_packet_wakes_the_daemon_once_and_everybody_is_answered(sleepy: Sleepy) -> None:
    """Early, late and datagram, both families, twenty clients at once for one daemon; of the others none starts. Who
    never listens is refused after the limit, and not started again."""
    sleepy.configure("sleep_after = 60\nwake_timeout = 30")
    sleepy.lab.start()
    nobody_wakes_in_anothers_name(sleepy)
    ways = [(sleepy.early, 1), (sleepy.late, 2), (sleepy.udp, 3), (sleepy.silent, GREETER)]
    for ask, index in ways:
        with ThreadPoolExecutor(20) as clients:
            answers = [clients.submit(ask, index, 6 if n % 2 else 4) for n in range(20)]
        assert [each.result() for each in answers] == [named(index, 6 if n % 2 else 4) for n in range(20)]
    with ThreadPoolExecutor(20) as clients:
        mixed = [clients.submit(ways[n % 3][0], sleeper.SLOW, 4) for n in range(20)]
    assert {each.result() for each in mixed} == {named(sleeper.SLOW, 4)}
    assert sorted(int(words[0]) for words in sleepy.starts()) == [1, 2, 3, GREETER, sleeper.SLOW]
    assert sleepy.decisions(Reason.ASLEEP) > 0
    for facts in sleepy.starts():
        has_nothing_that_root_has(facts)

    sleepy.configure("sleep_after = 60\nwake_timeout = 2")
    assert sleepy.lab.daemon is not None
    sleepy.lab.daemon.send_signal(signal.SIGHUP)
    sleepy.lab.wait(lambda: sleepy.lab.count_events("reloaded"), "it has reloaded")
    began = time.monotonic()
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, sleeper.DEAF, v) for ask in (sleepy.early, sleepy.late) for v in (4, 6)]
    assert [each.result() for each in answers] == ["reset"] * 4
    assert time.monotonic() - began >= 2
    assert [int(words[0]) for words in sleepy.starts()].count(sleeper.DEAF) == 1
    sleepy.lab.wait(lambda: len(sleepy.running()) == 5, "it is stopped")
    assert sleepy.decisions(Reason.NOT_WOKEN) >= 4


def nobody_wakes_in_anothers_name(sleepy: Sleepy) -> None:
    """First payloads of no handshake, whose cookie is wrong."""
    routes = "ip route add 10.128.0.0/9 via 198.51.100.1; ip -6 route add 2001:db8:a::/48 via 2001:db8:1::1"
    sleepy.lab.host.sh(routes)
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with sleepy.lab.client.entered(), socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            for packet in spoofed(version, 8000, b"GET / HTTP/1.1\r\nHost: h8.example\r\n\r\n", 10):
                raw.sendto(packet, (ENDPOINTS[version], 0))
    counters = Counters.open(sleepy.lab.directory / "run" / "counters")
    sleepy.lab.wait(lambda: counters.total(Extra.NOT_GENUINE) == 20, "all were seen")
    assert sleepy.starts() == []


def has_nothing_that_root_has(facts: list[str]) -> None:
    uid = str(pwd.getpwnam("nobody").pw_uid)
    assert facts[3] == ",".join([uid] * 4)
    assert facts[4] == str(pwd.getpwnam("nobody").pw_gid)
    assert facts[5] == "True", "a process group of its own"
    inheritable, permitted, effective, bound, ambient = (int(capabilities, 16) for capabilities in facts[6:11])
    assert (inheritable, permitted, effective, ambient) == (0, 0, 0, 0)
    assert bound == 0x30E0, "no more than steerd's own: kill, setgid, setuid, net_admin, net_raw"
    assert facts[11] == "1", "no_new_privs"
    assert facts[12:] == ["3", "/dev/null"], "no descriptor but the three"


def test_a_scanner_wakes_no_more_than_the_limit(sleepy: Sleepy) -> None:
    """A thousand names; who is beyond the limit is refused, by a reset. Those that are awake are served as ever."""
    sleepy.configure(limits="max_awake = 3\nstarts_per_second = 50\nburst = 10")
    sleepy.lab.start()
    with ThreadPoolExecutor(250) as clients:
        answers = list(clients.map(sleepy.early, range(1000)))
    woken = [index for index, answer in enumerate(answers) if answer == named(index, 4)]
    assert len(woken) == len(sleepy.starts()) == 3
    assert [answer for index, answer in enumerate(answers) if index not in woken] == ["reset"] * 997
    assert [sleepy.early(index, 6) for index in woken] == [named(index, 6) for index in woken]
    assert len(sleepy.starts()) == 3
    assert sleepy.late(next(index for index in range(NAMES) if index not in woken)) == "reset"


def test_idle_daemons_are_put_to_sleep_and_busy_ones_are_not(sleepy: Sleepy) -> None:
    sleepy.configure("sleep_after = 1", gateway="timeouts = { time_wait = 1, close = 1 }")
    sleepy.lab.start()
    assert sleepy.early(1) == named(1, 4)
    busy = sleepy.lab.socket(Extension(3, 0))
    with contextlib.closing(busy):
        busy.connect((ENDPOINT4, 80))
        assert busy.recv(100).decode() == named(2, 4)
        (first, second) = (int(words[2]) for words in sleepy.starts())
        sleepy.lab.wait(lambda: sleepy.running() == [second], "the idle one sleeps")
        assert first != second
        assert sleepy.early(1, 6) == named(1, 6)
        assert [int(words[0]) for words in sleepy.starts()] == [1, 2, 1]
        busy.send(b"still there")
        assert second in sleepy.running()
    sleepy.lab.wait(lambda: not sleepy.running(), "all sleep")
    sleepy.lab.wait(lambda: sleepy.lab.count_events("daemon put to sleep") == 3, "and that is told")


def test_a_killed_steerd_starts_no_daemon_twice(sleepy: Sleepy) -> None:
    sleepy.configure("sleep_after = 1\nwake_timeout = 30", gateway="timeouts = { time_wait = 1, close = 1 }")
    sleepy.lab.start()
    sleepy.before_end = threading.Barrier(4, timeout=240).wait  # else it may sleep before the last one comes again
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(ask, sleeper.SLOW, v) for ask in (sleepy.early, sleepy.late) for v in (4, 6)]
        sleepy.lab.wait(sleepy.starts, "it is being started")
        sleepy.lab.kill()
        sleepy.lab.start()
    assert [each.result() for each in answers] == [named(sleeper.SLOW, v) for v in (4, 6)] * 2
    assert len(sleepy.starts()) == 1
    sleepy.lab.wait(lambda: not sleepy.running(), "what another process has started is put to sleep")


def test_an_alias_that_changes_hands_never_leads_to_the_former_daemon(sleepy: Sleepy) -> None:
    """And all of it by a steerd that is not root."""
    lab = sleepy.lab
    sleepy.configure("quarantine = 0", name="{lease}")
    lab.config.write_text(lab.config.read_text().replace('user = "root"\n', ""))
    lab.directory.chmod(0o755)
    lab.start(through=with_account(lab.directory))
    assert sleepy.early(NAMES) == "reset", "an alias without a lease has nothing to start"

    answers = []
    for name in ("alice", "bob-e.x@y", "alice"):
        sleepy.lease(name, NAMES)
        answers += [sleepy.late(NAMES, version) for version in (4, 6)]
        sleepy.steerctl("lease", "release", name)
        assert sleepy.late(NAMES) == "reset", "there is no route any more"
        assert sleepy.early(NAMES) == "reset", "the extension still leads there, and nobody listens"
    assert answers == [named(NAMES, v, name) for name in ("alice", "bob-e.x@y", "alice") for v in (4, 6)]
    assert [words[:2] for words in sleepy.starts()] == [[str(NAMES), name] for name in ("alice", "bob-e.x@y", "alice")]
    for facts in sleepy.starts():
        has_nothing_that_root_has(facts)
    lab.wait(lambda: not sleepy.running(), "the last one has ended with its lease")


def test_a_configuration_that_gives_an_alias_another_daemon_ends_the_former_one(sleepy: Sleepy) -> None:
    """By a reload, and while steerd was away."""
    lab = sleepy.lab

    def answers(name: str) -> None:
        for version in (4, 6):
            assert [sleepy.early(1, version), sleepy.late(1, version)] == [named(1, version, name)] * 2

    sleepy.configure(name="first{index}")
    lab.start()
    answers("first1")

    sleepy.configure(name="second{index}")
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGHUP)
    lab.wait(lambda: lab.count_events("reloaded"), "it has reloaded")
    answers("second1")

    lab.stop()
    sleepy.configure(name="third{index}")
    lab.start()
    answers("third1")
    lab.wait(lambda: len(sleepy.running()) == 1, "the former ones have ended")


def test_units_are_woken_and_put_to_sleep_through_the_bus(sleepy: Sleepy, tmp_path: Path) -> None:
    lab = sleepy.lab
    bus = lab.spawn(
        lab.host, "dbus-daemon", "--session", "--nofork", "--print-address", f"--address=unix:dir={tmp_path}"
    )
    assert bus.stdout is not None
    env = ["env", f"DBUS_SYSTEM_BUS_ADDRESS={bus.stdout.readline().strip()}"]
    systemd = lab.spawn(lab.host, *env, sys.executable, "-m", "tests.netns.systemd", str(sleepy.log))
    assert systemd.stdout is not None and systemd.stdout.readline() == "ready\n"
    more = "sleep_after = 1\nwake_timeout = 30"
    sleepy.configure(more, wake='"unit:tenant@{index}.service"', gateway="timeouts = { time_wait = 1, close = 1 }")
    lab.start(through=env)
    for _ in range(2):
        sleepy.before_end = threading.Barrier(8, timeout=240).wait
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(sleepy.late, 1, 6 if n % 2 else 4) for n in range(8)]
        assert [each.result() for each in answers] == [named(1, 6 if n % 2 else 4, "unit") for n in range(8)]
        lab.wait(lambda: not sleepy.running(), "it is put to sleep")
    assert len(sleepy.starts()) == 2

    lab.expected_warnings = ["a daemon cannot be woken"]
    lab.config.write_text(lab.config.read_text().replace("unit:tenant@{index}", "unit:stranger@{index}"))
    assert lab.daemon is not None
    lab.daemon.send_signal(signal.SIGHUP)
    lab.wait(lambda: lab.count_events("reloaded"), "it has reloaded")
    assert sleepy.late(2) == "reset"
    assert "Unit stranger@2.service not found." in lab.log.read_text()
