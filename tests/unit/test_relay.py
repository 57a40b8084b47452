"""The relay by itself, over the loopback: what comes and goes through it, how connections end, and its limits."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerd.model import Answer
from steerd.wire import proxy
from tests.relay import RelayProcess, wait

ANY = {4: "127.0.0.1", 6: "::1"}
RESET = struct.pack("ii", 1, 0)
MIB = 1 << 20


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes what is put on it."""
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    made = RelayProcess(tmp_path / "log")
    yield made
    made.close()
    assert [event for event in made.events() if event["level"] == "error"] == []


class Behind:
    """One daemon's socket and the address that the relay listens on for it."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        path: str,
        *,
        version: int = 4,
        kind: int = socket.SOCK_STREAM,
        backlog: int = 100,
        is_there: bool = True,
    ) -> None:
        self.path = path
        self.version = version
        self.port = free_port(version)
        self.socket = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        self.socket.settimeout(60)
        self._stack = stack
        self._backlog = backlog
        if is_there:
            self.appear()

    def appear(self) -> None:
        self.socket.bind(f"\0{self.path[1:]}" if self.path.startswith("@") else self.path)
        if self.socket.type != socket.SOCK_DGRAM:
            self.socket.listen(self._backlog)

    def line(self, kind: str = "unix", *, proxy_protocol: bool = False) -> dict[str, object]:
        address = ANY[self.version]
        more = {"proxy_protocol": True} if proxy_protocol else {}
        return {"address": address, "port": self.port, "kind": kind, "path": self.path, **more}

    def connect(self) -> socket.socket:
        family = socket.AF_INET if self.version == 4 else socket.AF_INET6
        client = self._stack.enter_context(socket.socket(family))
        client.settimeout(60)
        client.connect((ANY[self.version], self.port))
        return client

    def accept(self) -> socket.socket:
        daemon = self._stack.enter_context(self.socket.accept()[0])
        daemon.settimeout(60)
        return daemon

    def pair(self) -> tuple[socket.socket, socket.socket]:
        return self.connect(), self.accept()


def free_port(version: int) -> int:
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as probe:
        probe.bind((ANY[version], 0))
        port: int = probe.getsockname()[1]
        return port


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def is_reset(connection: socket.socket) -> bool:
    try:
        connection.recv(100)
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("path", ["/a.sock", "@steerd-test-"])
def test_bytes_go_both_ways(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path, version: int, path: str
) -> None:
    behind = Behind(stack, f"{tmp_path}{path}" if path[0] == "/" else f"{path}{os.getpid()}", version=version)
    assert relay.listen(behind.line()) == {}
    client, daemon = behind.pair()
    for number in range(50):
        client.sendall(b"question %d" % number)
        assert daemon.recv(100) == b"question %d" % number
        daemon.sendall(b"answer %d" % number)
        assert client.recv(100) == b"answer %d" % number


def test_each_direction_ends_by_itself(relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    client, daemon = behind.pair()
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert read_all(daemon) == b"request"
    daemon.sendall(b"a")
    assert client.recv(10) == b"a"
    daemon.sendall(b"nswer")
    daemon.close()
    assert read_all(client) == b"nswer"

    client, daemon = behind.pair()
    daemon.sendall(b"greeting")
    daemon.shutdown(socket.SHUT_WR)
    assert read_all(client) == b"greeting"
    client.sendall(b"o")
    assert daemon.recv(10) == b"o"
    client.sendall(b"k")
    client.close()
    assert read_all(daemon) == b"k"
    before = relay.descriptors()
    daemon.close()
    wait(lambda: relay.descriptors() <= before, "both sides are closed")


def test_a_daemon_that_has_said_all_and_is_gone_ends_its_client(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    idle = relay.descriptors()
    client, daemon = behind.pair()
    # More than fits on its way: the end comes when the client has taken it, long after the daemon went.

    def say_all() -> None:
        daemon.sendall(b"x" * 8 * MIB)
        daemon.close()

    thread = threading.Thread(target=say_all)
    thread.start()
    time.sleep(0.05)
    assert len(read_all(client)) == 8 * MIB
    thread.join()
    wait(lambda: relay.descriptors() == idle, "the relay has closed its ends, though the client has not")


def test_64_mib_each_way_arrive_as_they_were_sent(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    behind = Behind(stack, f"{tmp_path}/a", version=6)
    relay.listen(behind.line())
    client, daemon = behind.pair()
    block = os.urandom(MIB + 13)
    found: dict[str, str] = {}

    def send(connection: socket.socket, name: str) -> None:
        digest = hashlib.sha256()
        for number in range(64):
            part = number.to_bytes(2, "big") + block
            digest.update(part)
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        found[f"{name} sent"] = digest.hexdigest()

    def receive(connection: socket.socket, name: str) -> None:
        digest = hashlib.sha256()
        while data := connection.recv(1 << 18):
            digest.update(data)
        found[f"{name} received"] = digest.hexdigest()

    threads = [
        threading.Thread(target=work, args=(connection, name))
        for work, connection, name in (
            (send, client, "up"), (receive, daemon, "up"), (send, daemon, "down"), (receive, client, "down"),
        )
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert found["up sent"] == found["up received"] == found["down sent"] == found["down received"]


@pytest.mark.parametrize("slow", ["daemon", "client"])
def test_who_does_not_read_stops_the_other_one(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path, slow: str
) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    pairs = [behind.pair() for _ in range(8)]
    resident = relay.resident()
    sent = []
    for client, daemon in pairs:
        writer = client if slow == "daemon" else daemon
        writer.setblocking(False)
        # Until nothing more is taken for a while.
        total, since = 0, time.monotonic()
        while time.monotonic() < since + 0.05:
            with contextlib.suppress(BlockingIOError):
                total, since = total + writer.send(b"%c" % (total % 251) * 65536), time.monotonic()
            assert total < 64 * MIB, "nothing stops it"
        sent.append(total)
    wait(relay.rests, "it spins no more")
    assert relay.resident() - resident < 8 * MIB
    for (client, daemon), total in zip(pairs, sent, strict=True):
        reader, writer = (daemon, client) if slow == "daemon" else (client, daemon)
        writer.close()
        assert len(read_all(reader)) == total


def test_resets_are_passed_on(relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    client, daemon = behind.pair()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    assert daemon.recv(10) == b""
    with pytest.raises(BrokenPipeError):
        daemon.sendall(b"nobody is there")

    client, daemon = behind.pair()
    client.sendall(b"unread")
    assert daemon.recv(1) == b"u"
    daemon.close()
    assert is_reset(client)

    # One that cannot be written to any more because its daemon is stuck.
    client, daemon = behind.pair()
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.sendall(b"x" * 64 * MIB)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    assert read_all(daemon).strip(b"x") == b""
    with pytest.raises(BrokenPipeError):
        daemon.sendall(b"nobody is there")


def test_urgent_data_reset_the_connection(relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    client, daemon = behind.pair()
    client.send(b"!", socket.MSG_OOB)
    assert is_reset(client)
    assert read_all(daemon) == b""


def test_a_daemon_that_is_not_there_resets_its_clients_and_is_told_once(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    behind = Behind(stack, f"{tmp_path}/a", is_there=False)
    other = Behind(stack, f"{tmp_path}/b")
    relay.listen(behind.line(), other.line())
    for _ in range(5):
        with contextlib.suppress(ConnectionResetError):
            assert is_reset(behind.connect())
    other.pair()
    behind.appear()
    client, daemon = behind.pair()
    client.sendall(b"now")
    assert daemon.recv(10) == b"now"
    behind.socket.close()
    for _ in range(3):
        with contextlib.suppress(ConnectionResetError):
            assert is_reset(behind.connect())
    client.sendall(b"goes on")
    assert daemon.recv(10) == b"goes on"
    name = f"unix:{tmp_path}/a"
    told = [(event["event"], event["daemon"], event.get("why")) for event in relay.events()]
    assert told == [
        ("a daemon cannot be connected to; its clients are reset", name, "No such file or directory"),
        ("a daemon can be connected to again", name, None),
        ("a daemon cannot be connected to; its clients are reset", name, "Connection refused"),
    ]


def test_clients_of_a_daemon_with_a_full_backlog_wait(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    behind = Behind(stack, f"{tmp_path}/a", backlog=1)
    relay.listen(behind.line())
    clients = [behind.connect() for _ in range(12)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    time.sleep(0.1)
    assert {behind.accept().recv(10) for _ in clients} == {b"%d" % number for number in range(12)}
    assert relay.events() == []


@pytest.mark.parametrize("version", [4, 6])
def test_the_header_says_who_it_is(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path, version: int
) -> None:
    behind = Behind(stack, f"{tmp_path}/a", version=version)
    relay.listen(behind.line(proxy_protocol=True))
    client, daemon = behind.pair()
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    check_header(read_all(daemon), client, b"hello")


def check_header(data: bytes, client: socket.socket, behind_it: bytes) -> None:
    header = proxy.read(data)
    assert not isinstance(header, Answer)
    assert data[header.length :] == behind_it
    (source, sport), (destination, dport) = client.getsockname()[:2], client.getpeername()[:2]
    assert header.keys == {
        "proxy.version": "2",
        "proxy.source": source,
        "proxy.source-port": str(sport),
        "proxy.destination": destination,
        "proxy.destination-port": str(dport),
    }


KINDS = (socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM)


class Taker:
    """A daemon that takes connections."""

    def __init__(self, stack: contextlib.ExitStack, behind: Behind) -> None:
        self._stack = stack
        self._behind = behind
        self._channel = behind.socket if behind.socket.type == socket.SOCK_DGRAM else None

    def take(self) -> tuple[bytes, socket.socket]:
        """One message: its bytes, and the connection."""
        if self._channel is None:
            self._channel = self._behind.accept()
        data, descriptors, _, _ = socket.recv_fds(self._channel, 4096, 10)
        assert len(descriptors) == 1
        connection = self._stack.enter_context(socket.socket(fileno=descriptors[0]))
        connection.settimeout(60)
        return data, connection


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [4, 6])
def test_the_connection_itself_is_handed_over(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path, kind: int, version: int
) -> None:
    behind = Behind(stack, f"{tmp_path}/a", kind=kind, version=version)
    relay.listen(behind.line("unix-fd"))
    # More than the daemon takes at a time: each one is waiting in its turn.
    clients = {client.getsockname()[1]: client for client in (behind.connect() for _ in range(300))}
    taker = Taker(stack, behind)
    before = relay.descriptors()
    for _ in range(300):
        data, daemon = taker.take()
        client = clients.pop(daemon.getpeername()[1])
        assert daemon.getpeername() == client.getsockname()
        check_header(data, client, b"")
        client.sendall(b"hello")
        assert daemon.recv(10) == b"hello"
        daemon.sendall(b"you")
        assert client.recv(10) == b"you"
    assert relay.descriptors() <= before
    # The relay has no part in it any more.
    relay.close()
    client.sendall(b"still there")
    assert daemon.recv(20) == b"still there"


def test_a_daemon_that_takes_connections_may_start_anew(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    behind = Behind(stack, f"{tmp_path}/a", kind=socket.SOCK_SEQPACKET)
    line = behind.line("unix-fd")
    relay.listen(line)
    with contextlib.ExitStack() as first_life:
        behind.connect()
        channel = first_life.enter_context(behind.socket.accept()[0])
        _, descriptors, _, _ = socket.recv_fds(channel, 100, 1)
        os.close(descriptors[0])
        behind.socket.close()
        Path(behind.path).unlink()
    with contextlib.suppress(ConnectionResetError):
        assert is_reset(behind.connect())
    behind.socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    behind.socket.settimeout(60)
    behind.appear()
    client = behind.connect()
    _, daemon = Taker(stack, behind).take()
    assert daemon.getpeername() == client.getsockname()


def test_a_thousand_daemons(relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard[1], hard[1]))
    port = free_port(4)
    addresses = [f"127.64.{number // 250}.{number % 250 + 1}" for number in range(1000)]
    daemons, lines = [], []
    for number, address in enumerate(addresses):
        kind = "unix" if number % 2 else "unix-fd"
        daemon = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if number % 2 else socket.SOCK_SEQPACKET)
        )
        daemon.bind(f"{tmp_path}/{number}")
        daemon.listen(5)
        daemon.settimeout(60)
        daemons.append(daemon)
        lines.append({"address": address, "port": port, "kind": kind, "path": f"{tmp_path}/{number}"})
    assert relay.listen(*lines) == {}
    clients = []
    for address in addresses:
        client = stack.enter_context(socket.create_connection((address, port), timeout=60))
        client.sendall(f"to {address}".encode())
        clients.append(client)
    for number, (address, daemon) in enumerate(zip(addresses, daemons, strict=True)):
        connection = stack.enter_context(daemon.accept()[0])
        if number % 2 == 0:
            _, descriptors, _, _ = socket.recv_fds(connection, 100, 1)
            connection = stack.enter_context(socket.socket(fileno=descriptors[0]))
        connection.settimeout(60)
        assert connection.recv(100) == f"to {address}".encode()
    # Idle connections: two descriptors each, and no pipe.
    assert relay.descriptors() < 1000 + 500 * 2 + 500 + 100


def test_where_no_descriptor_is_left_clients_wait(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    limit = relay.descriptors() + 20
    resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    clients = [behind.connect() for _ in range(30)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    wait(relay.events, "it has noticed")
    wait(relay.rests, "it spins no more")
    assert relay.descriptors() <= limit
    served = set()
    for _ in clients:
        daemon = behind.accept()
        served.add(daemon.recv(10))
        daemon.close()
    assert served == {b"%d" % number for number in range(30)}
    assert {event["event"] for event in relay.events()} == {
        "no descriptor or memory is left; its clients wait",
        "a daemon can be connected to again",
    }


def test_another_list_changes_only_what_is_different(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    first, second, third = (Behind(stack, f"{tmp_path}/{name}") for name in "abc")
    relay.listen(first.line(), second.line())
    established = [behind.pair() for behind in (first, second)]
    assert relay.listen(second.line(proxy_protocol=True), third.line()) == {}
    for client, daemon in established:
        client.sendall(b"goes on")
        assert daemon.recv(10) == b"goes on"
    with pytest.raises(ConnectionRefusedError):
        first.connect()
    client, daemon = second.pair()
    check_header(daemon.recv(100), client, b"")
    third.pair()
    # One address now stands for another daemon.
    assert relay.listen({**second.line(), "path": third.path}) == {}
    second.connect().sendall(b"to c")
    assert third.accept().recv(10) == b"to c"


def test_an_address_that_cannot_be_had_is_named(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    taken, free = Behind(stack, f"{tmp_path}/a"), Behind(stack, f"{tmp_path}/b")
    listener = stack.enter_context(socket.create_server((ANY[4], taken.port)))
    assert relay.listen(taken.line(), free.line()) == {f"127.0.0.1 {taken.port}": "Address already in use"}
    free.pair()
    listener.close()
    assert relay.listen(taken.line(), free.line()) == {}
    taken.pair()


def test_when_the_main_process_ends_it_ends_with_its_last_connection(
    relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    client, daemon = behind.pair()
    relay.let_go()

    def is_refused() -> bool:
        try:
            behind.connect().close()
        except (ConnectionRefusedError, ConnectionResetError):  # reset: it came while the listener was closed
            return True
        return False

    wait(is_refused, "it listens no more")
    for _ in range(3):
        client.sendall(b"goes on")
        assert daemon.recv(10) == b"goes on"
    assert relay.process.poll() is None
    behind.socket.close()
    client.close()
    daemon.close()
    assert relay.process.wait(60) == 0


def test_it_keeps_no_privilege_but_to_bind(relay: RelayProcess) -> None:
    relay.listen()
    lines = Path(f"/proc/{relay.process.pid}/status").read_text().splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert int(status["CapEff"], 16) | int(status["CapPrm"], 16) | 1 << 10 == 1 << 10
    assert status["NoNewPrivs"] == "1"


def test_many_short_connections(relay: RelayProcess, stack: contextlib.ExitStack, tmp_path: Path) -> None:
    behind = Behind(stack, f"{tmp_path}/a")
    relay.listen(behind.line())
    idle = relay.descriptors()

    def serve() -> None:
        for _ in range(500):
            with behind.socket.accept()[0] as daemon:
                daemon.sendall(daemon.recv(100).upper())

    thread = threading.Thread(target=serve)
    thread.start()
    for number in range(500):
        with socket.create_connection((ANY[4], behind.port), timeout=60) as client:
            client.sendall(b"client %d" % number)
            assert read_all(client) == b"CLIENT %d" % number
    thread.join()
    wait(lambda: relay.descriptors() == idle, "everything is closed")
