"""The lab: a gateway that was installed as a user does it, asked from two clients over a network; then restarted,
upgraded and rebooted. vagrant/Vagrantfile has the machines, vagrant/steerd.toml the configuration, vagrant/provision
the daemons.

The tests run on the first client, as root, in their order: each goes on where the one before has ended. A daemon that
listens on the wildcard address (tests.lab.trap) must never be reached in all that time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerd import client
from tests.lab import load
from tests.lab.load import NAMES, TENANTS, Answer

GATEWAY, SECOND = "10.77.0.10", "10.77.0.12"
ROOT = Path(__file__).resolve().parents[2]
# Emulated, everything takes so many times longer.
SLOWER = 20 if os.environ.get("LAB_EMULATED") else 1
QUIC_CONNECTIONS = 12
LONG_LIVED = 10


class Machine:
    """Another machine of the lab, by ssh."""

    def __init__(self, address: str) -> None:
        self.address = address

    def command(self, command: str) -> list[str]:
        return ["ssh", f"root@{self.address}", f"cd /vagrant; {command}"]

    def try_run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(command), capture_output=True, text=True, check=False, timeout=800)

    def run(self, command: str) -> str:
        """A shell command that must succeed; its standard output."""
        done = self.try_run(command)
        assert done.returncode == 0, f"exit {done.returncode}: {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, command: str, expected: str, seconds: float = 30) -> None:
        """Until a command says so; meanwhile the machine need not be there."""
        deadline = time.monotonic() + seconds * SLOWER
        while True:
            done = self.try_run(command)
            if done.stdout.strip() == expected:
                return
            assert time.monotonic() < deadline, f"{command}: not {expected!r} but {done.stdout!r} {done.stderr!r}"
            time.sleep(1)


class Gateway(Machine):
    def status_of(self, unit: str = "steerd") -> dict[str, str]:
        said = self.run(f"systemctl show --property=MainPID,NRestarts,ActiveState,Result {unit}")
        return dict(line.split("=", 1) for line in said.splitlines())

    def wait_active(self) -> None:
        """steerd and all daemons behind it run, and listen."""
        self.wait("systemctl is-active steerd 'lab-*' --all | sort -u", "active")
        # Of tenants, of TLS, leased, and QUIC, for both families where there are both.
        self.wait("ss -Hltn sport = 8080 | wc -l", str(2 * TENANTS))
        self.wait("ss -Hltn sport = 8443 | wc -l", str(3 * 16))
        self.wait("ss -Hlun sport = 8443 | wc -l", str(2 * 16))

    def trapped(self) -> str:
        """Whom the daemon that nobody asks for has seen, since the gateway booted."""
        return self.run("journalctl --boot --unit=lab-trap --output=cat --no-pager | grep reached || true")


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    made = Gateway(GATEWAY)
    made.wait_active()
    return made


@pytest.fixture(scope="module")
def second() -> Machine:
    made = Machine(SECOND)
    made.wait("systemctl is-active lab-network", "active")
    return made


@pytest.fixture(scope="module")
def certificate(gateway: Gateway, second: Machine) -> Path:
    """What the daemons' certificate is trusted by, on both clients at the same path."""
    path = Path("/root/lab.pem")
    text = gateway.run("cat /etc/lab/public.pem")
    path.write_text(text)
    second.run(f"cat >{path} <<'PEM'\n{text}PEM")
    return path


@pytest.fixture(scope="module")
def trusted(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


@pytest.fixture(autouse=True)
def nobody_is_trapped(gateway: Gateway) -> Iterator[None]:
    yield
    assert gateway.trapped() == ""


def check(answers: Iterator[Answer]) -> None:
    wrong = [answer for answer in answers if not answer.is_right]
    assert wrong == []


def quic(certificate: Path, version: int, numbers: Iterator[int]) -> None:
    """Whole connections of HTTP/3, each to its name, its certificate checked."""
    names = [f"s{number}.example" for number in numbers]
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo.quic", "client", certificate, load.endpoint(version), "443", *names],
        env={**os.environ, "STEERD_PATIENCE": str(15 * SLOWER)},
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    own = load.own_address(version)
    expected = Counter(f"{name} {load.site(version, int(name[1]))} 8443 {own} {name}" for name in names)
    assert Counter(done.stdout.splitlines()) == expected, done.stderr


def steers(trusted: ssl.SSLContext, certificate: Path) -> None:
    """Each way in, by both address families, to some of the daemons."""
    for version in (4, 6):
        check(load.early(version, extension) for extension in range(1, TENANTS + 1, 16))
        check(load.late(version, 1 + n % (NAMES - 1)) for n in range(8))
        check(load.tls(version, "s2.example", load.site(version, 2), trusted) for _ in range(4))
        quic(certificate, version, iter((1, 2)))


class Load:
    """tests.lab.load on both clients, until `end`."""

    def __init__(self, second: Machine, certificate: Path) -> None:
        program = f"-m tests.lab.load {certificate}"
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for command in ([sys.executable, *program.split()], second.command(f"/opt/lab/bin/python {program}"))
        ]

    def end(self) -> list[dict[str, int]]:
        """Of each client: how many answers were right, wrong, and failed."""
        said = [process.communicate("", timeout=2 * load.PATIENCE + 60)[0] for process in self._processes]
        return [json.loads(text) for text in said]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def loaded(second: Machine, certificate: Path) -> Iterator[Load]:
    made = Load(second, certificate)
    yield made
    made.kill()


@contextlib.contextmanager
def connections() -> Iterator[None]:
    """Some, early and late, that must still be there, and at the same daemon, when the block ends."""
    with contextlib.ExitStack() as closing:
        opened: list[socket.socket] = []
        for n in range(LONG_LIVED):
            version = (4, 6)[n % 2]
            if n < LONG_LIVED // 2:
                opened.append(client.connect((load.endpoint(version), 80), extension=n + 1, timeout=load.PATIENCE))
            else:
                opened.append(socket.create_connection((load.endpoint(version), 80), load.PATIENCE))
                opened[-1].sendall(b"GET / HTTP/1.1\r\nHost: s1.example\r\n\r\n")
            closing.enter_context(opened[-1])
            assert load.line(opened[-1]).startswith(load.tenant(version, n if n < LONG_LIVED // 2 else 1))
        for n, connection in enumerate(opened):
            if n >= LONG_LIVED // 2:
                assert connection.recv(100).startswith(b"GET / ")  # what the daemon was sent, it sends back
        yield
        for n, connection in enumerate(opened):
            connection.sendall(b"%d is still there" % n)
            assert connection.recv(100) == b"%d is still there" % n


def all_right(counts: list[dict[str, int]], least: int) -> None:
    print("load:", counts)
    for count in counts:
        assert (count["wrong"], count["failed"]) == (0, 0)
        assert count["right"] >= least


def test_the_gateway_is_as_the_package_has_made_it(gateway: Gateway) -> None:
    assert gateway.run("systemctl is-enabled steerd").strip() == "enabled"
    assert gateway.run("steerd check") == "ok\n"
    assert gateway.run("ps -o user= -p $(systemctl show --value --property=MainPID steerd)").strip() == "steerd"
    status = gateway.run("/opt/steerd/share/steerd/nft/install.sh --status --queues 2")
    print(status)
    assert "queue to jhash" in gateway.run("nft list chain inet steerd queue4"), "it is a stock kernel"


def test_early_each_extension_leads_to_its_daemon() -> None:
    check(load.early(version, extension) for extension in range(1, TENANTS + 1) for version in (4, 6))
    check(load.early(version, extension, "tcp") for version in (4, 6) for extension in range(1, 17))


def test_late_each_name_leads_to_its_daemon(trusted: ssl.SSLContext) -> None:
    check(load.late(version, 1 + n % NAMES) for version in (4, 6) for n in range(50))
    names = [(version, 1 + n % NAMES) for version in (4, 6) for n in range(20)]
    check(load.tls(version, f"s{n}.example", load.site(version, n), trusted) for version, n in names)


@pytest.mark.parametrize("version", [4, 6])
def test_quic_each_name_leads_to_its_daemon(certificate: Path, version: int) -> None:
    quic(certificate, version, (1 + n % NAMES for n in range(QUIC_CONNECTIONS)))


@pytest.mark.parametrize("version", [4, 6])
def test_the_second_client_is_led_to_another_daemon(second: Machine, version: int) -> None:
    asked = f"from tests.lab import load; print(load.late({version}, 4, 104).is_right)"
    assert second.run(f"/opt/lab/bin/python -c {shlex.quote(asked)}") == "True\n"


def test_an_alias_is_reached_by_no_other_way() -> None:
    for address in ("10.64.0.1", "fd00:64::1"):
        with pytest.raises(TimeoutError):
            socket.create_connection((address, 8080), timeout=4)
    for refused in (TENANTS + 1, 65535):
        with pytest.raises(ConnectionRefusedError):
            load.early(4, refused)


def test_restarts_under_load_lose_no_connection(gateway: Gateway, loaded: Load) -> None:
    before = gateway.status_of()["MainPID"]
    with connections():
        gateway.run("systemctl restart steerd")
        gateway.run("systemctl restart steerd")
    assert gateway.status_of()["MainPID"] != before
    time.sleep(5)
    all_right(loaded.end(), 20)
    assert gateway.status_of()["Result"] == "success"


def test_a_worker_that_is_killed_under_load_is_replaced(gateway: Gateway, loaded: Load) -> None:
    main = gateway.status_of()["MainPID"]
    with connections():
        gateway.run(f"pkill -KILL --parent {main}")
        gateway.wait("steerctl status --json | grep -o '\"is_bound\": true' | wc -l", "2")
    all_right(loaded.end(), 5)
    assert gateway.status_of()["MainPID"] == main


def test_an_upgrade_under_load_loses_no_connection(gateway: Gateway, loaded: Load) -> None:
    before = gateway.status_of()["MainPID"]
    with connections():
        gateway.run(
            "set -e; cd $(mktemp -d); dpkg-deb -R /root/steerd.deb tree;"
            "sed -i 's/^Version: .*/&+1/' tree/DEBIAN/control;"
            "echo '# Of the newer version.' >>tree/etc/steerd/steerd.toml;"
            "dpkg-deb --root-owner-group -Znone --build tree newer.deb;"
            "DEBIAN_FRONTEND=noninteractive dpkg --force-confold -i newer.deb"
        )
    gateway.wait_active()
    assert gateway.status_of()["MainPID"] != before
    assert gateway.run("dpkg-query -W -f '${Version}' steerd").endswith("+1")
    assert gateway.run("cmp /etc/steerd/steerd.toml vagrant/steerd.toml") == "", "it is the operator's"
    time.sleep(5)
    all_right(loaded.end(), 20)


def test_all_is_back_after_a_reboot_of_the_gateway(
    gateway: Gateway, loaded: Load, certificate: Path, trusted: ssl.SSLContext
) -> None:
    for name in ("alice", "bob"):
        gateway.run(f"steerctl lease add {name} --pool leased --service tls --key tls.sni={name}.example --port 8443")
    gateway.run("steerctl route add tls 10.65.0.9:8443 --key tls.sni=added.example")
    gateway.run("steerctl drain 10.64.0.200:8080")
    before = gateway.run("steerctl export")
    leased = {lease["name"]: lease["addresses"][0] for lease in json.loads(gateway.run("steerctl lease list --json"))}
    assert len(set(leased.values())) == 2

    def also_these() -> None:
        for name in ("alice", "bob"):
            check(iter([load.tls(4, f"{name}.example", leased[name], trusted)]))
        check(iter([load.tls(4, "added.example", "10.65.0.9", trusted)]))
        with pytest.raises(ConnectionRefusedError):
            load.early(4, 201)

    also_these()
    boot = gateway.run("cat /proc/sys/kernel/random/boot_id").strip()
    gateway.try_run("systemctl reboot")
    gateway.wait(f"grep -c -v {boot} /proc/sys/kernel/random/boot_id", "1", 60)
    gateway.wait_active()
    assert gateway.run("steerctl export") == before
    also_these()
    steers(trusted, certificate)
    counts = loaded.end()
    print("load:", counts)
    assert [count["wrong"] for count in counts] == [0, 0]


def test_a_gateway_that_loses_its_power_comes_back(
    gateway: Gateway, certificate: Path, trusted: ssl.SSLContext
) -> None:
    before = gateway.run("steerctl export")
    boot = gateway.run("cat /proc/sys/kernel/random/boot_id").strip()
    gateway.run("echo 1 >/proc/sys/kernel/sysrq; (sleep 5; echo b >/proc/sysrq-trigger) </dev/null >/dev/null 2>&1 &")
    gateway.wait(f"grep -c -v {boot} /proc/sys/kernel/random/boot_id", "1", 60)
    gateway.wait_active()
    assert gateway.run("steerctl export") == before
    steers(trusted, certificate)


@pytest.fixture(scope="module", autouse=True)
def journal_of_failures(gateway: Gateway, request: pytest.FixtureRequest) -> Iterator[None]:
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        print(gateway.try_run("journalctl --no-pager --output=short-monotonic | tail -n 300").stdout)
