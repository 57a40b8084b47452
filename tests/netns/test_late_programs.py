"""Late steering with real clients and servers, out of Debian's packages: who answered, and whom it sees.

Topology: tests/netns/gateway.py; the servers: tests/netns/programs.py, numbers 1 to 9 on aliases of the same numbers.
"""

from __future__ import annotations

import itertools
import random
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import pytest

from tests.netns import programs
from tests.netns.gateway import ENDPOINT4, ENDPOINT6, SLOWER, Gateway, gateway
from tests.netns.lab import Host
from tests.netns.programs import answer, target

ENDPOINT = {4: ENDPOINT4, 6: ENDPOINT6}
WITHIN = 60 * SLOWER
"""Seconds that a client may take."""

T = TypeVar("T")

both_families = pytest.mark.parametrize("version", [4, 6])
hello_sizes = pytest.mark.parametrize("size", [300, 2000, 5000])


@pytest.fixture
def lab(new_host: Callable[[str], Host]) -> Iterator[Gateway]:
    with gateway(new_host) as made:
        yield made


def service(name: str, port: int, inspect: str, routes: Iterable[tuple[str, int, int]], *, default: str = "") -> str:
    """A service in TOML, on both endpoints; `routes`: what stands in the route besides the target, and the target's
    number and port."""
    lines = [
        f"[services.{name}]",
        f'endpoints = ["{ENDPOINT4}:{port}/tcp", "[{ENDPOINT6}]:{port}/tcp"]',
        f"inspect = [{inspect}]",
        f"default = {default}" if default else "",
    ]
    for condition, number, target_port in routes:
        lines += [f"[[services.{name}.routes]]", condition, f"target = {target(number, target_port)}"]
    return "\n".join(lines) + "\n"


# ---- TLS ----

TLS = service(
    "tls",
    443,
    '"tls"',
    [
        ('when = { "tls.sni" = "a.example" }', 1, 8443),
        ('when = { "tls.sni" = "b.example" }', 2, 8443),
        ('when = { "tls.sni" = "c.example" }', 3, 8443),
    ],
)


def start_tls(lab: Gateway) -> dict[int, subprocess.Popen[str]]:
    """steerd, two nginx and, for each family, an openssl s_server."""
    lab.configure(programs.POOL + TLS)
    lab.start()
    programs.certificate(lab, "a.example", "b.example", "c.example")
    programs.nginx(lab, "a.example", 1, 8443, how="ssl")
    programs.nginx(lab, "b.example", 2, 8443, how="ssl")
    return {version: programs.s_server(lab, "c.example", version, 3, 8443) for version in (4, 6)}


def curl(lab: Gateway, version: int, url: str, *options: str) -> str:
    """What curl gets for a URL whose host name stands for the endpoint."""
    host = re.match(r"\w+://([^/:]+)(?::(\d+))?", url)
    assert host
    port = host[2] or {"http": "80", "https": "443"}[url.partition(":")[0]]
    address = ENDPOINT4 if version == 4 else f"[{ENDPOINT6}]"
    return lab.client.sh(
        f"curl -sS --max-time {WITHIN} --cacert {lab.directory}/all.pem --resolve {host[1]}:{port}:{address}"
        f" {' '.join(options)} {url}"
    ).strip()


def protocols(hello_size: int) -> list[str]:
    """Names to offer by ALPN that make OpenSSL's hello at least so large; nginx takes the last one."""
    padding = max(0, hello_size - 250)
    return [f"{number:0>200}" for number in range(-(-padding // 201))] + ["http/1.1"]


@both_families
def test_curl_gets_each_nginx_by_its_name(lab: Gateway, version: int) -> None:
    start_tls(lab)
    for number, name in ((1, "a.example"), (2, "b.example"), (1, "A.Example")):
        assert curl(lab, version, f"https://{name}/") == answer(name.lower(), version, number, 8443)
    for option in ("--tls-max 1.2", "--no-alpn", "--ciphers ECDHE-ECDSA-AES128-GCM-SHA256"):
        assert curl(lab, version, "https://b.example/", option) == answer("b.example", version, 2, 8443)
    # No name, no server: nothing is guessed.
    assert "status 35" in lab.client.sh(
        f"curl -sS --max-time {WITHIN} -k https://{'[' + ENDPOINT6 + ']' if version == 6 else ENDPOINT4}/ 2>&1"
        " || echo status $?"
    )


def s_client(lab: Gateway, version: int, name: str, hello_size: int) -> subprocess.Popen[str]:
    address = f"{ENDPOINT4}:443" if version == 4 else f"[{ENDPOINT6}]:443"
    return subprocess.Popen(
        lab.client.command(
            "openssl", "s_client", "-connect", address, "-servername", name, "-alpn", ",".join(protocols(hello_size)),
            "-CAfile", f"{lab.directory}/all.pem", "-verify_return_error", "-verify_hostname", name,
            "-quiet", "-verify_quiet", "-msg", "-msgfile", f"{lab.directory}/messages",
        ),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def hello_said(lab: Gateway) -> int:
    """Bytes of the ClientHello that the last s_client has sent."""
    found = re.search(r">>> .*Handshake \[length (\w+)\], ClientHello", (lab.directory / "messages").read_text())
    assert found
    return int(found[1], 16)


@both_families
@hello_sizes
def test_s_client_gets_nginx_and_s_server_with_hellos_of_any_size(lab: Gateway, version: int, size: int) -> None:
    servers = start_tls(lab)
    for large_segments in (True, False):
        if not large_segments:
            lab.client.sh("ip link set eth0 mtu 1280 gso_max_segs 1")
        for number, name in ((1, "a.example"), (2, "b.example")):
            output, _ = s_client(lab, version, name, size).communicate("GET / HTTP/1.0\r\n\r\n", timeout=WITHIN)
            assert output.splitlines()[-1] == answer(name, version, number, 8443)
            assert size <= hello_said(lab) < size + 300
        with s_client(lab, version, "c.example", size) as client:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write("who is there\n")
            client.stdin.flush()
            assert client.stdout.readline() == "ereht si ohw\n"
            (connection,) = programs.connected(lab, servers[version])
            assert connection == (programs.alias(version, 3), 8443, programs.CLIENT[version])
            client.terminate()


class TlsClient:
    """Python's own TLS client, which writes its hello in pieces."""

    def __init__(self, lab: Gateway, name: str, size: int) -> None:
        self._lab = lab
        context = ssl.create_default_context(cafile=str(lab.directory / "all.pem"))
        context.set_alpn_protocols(protocols(size))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        with pytest.raises(ssl.SSLWantReadError):
            self._tls.do_handshake()
        self.hello = self._outgoing.read()
        assert size <= len(self.hello) < size + 300

    def request(self, version: int, cuts: Iterable[int]) -> str:
        """The answer to an HTTP request over a connection whose hello is cut at these places. Raises if the
        certificate is not that of the name."""
        with self._lab.socket(None, version=version) as connection:
            connection.connect((ENDPOINT[version], 443))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start, end in itertools.pairwise([0, *cuts, len(self.hello)]):
                connection.send(self.hello[start:end])
            self._exchange(connection, self._tls.do_handshake)
            self._tls.write(b"GET / HTTP/1.0\r\n\r\n")
            answer_bytes = self._exchange(connection, self._tls.read)
            return answer_bytes.decode().splitlines()[-1]

    def _exchange(self, connection: socket.socket, step: Callable[[], T]) -> T:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                connection.sendall(self._outgoing.read())
                data = connection.recv(65536)
                assert data, "closed"
                self._incoming.write(data)
            else:
                connection.sendall(self._outgoing.read())
                return result


@both_families
@hello_sizes
def test_a_hello_cut_anywhere(lab: Gateway, version: int, size: int) -> None:
    start_tls(lab)
    chosen = random.Random(size)
    length = len(TlsClient(lab, "a.example", size).hello)
    # In two within the headers of record and message, and before the last byte; into up to eight pieces anywhere.
    cuts = [[at] for at in (*range(1, 12), length - 1)]
    cuts += [sorted(chosen.sample(range(1, length), pieces)) for pieces in (1, 1, 1, 1, 2, 2, 3, 4, 7, 7)]
    for cut in cuts:
        number, name = chosen.choice([(1, "a.example"), (2, "b.example")])
        assert TlsClient(lab, name, size).request(version, cut) == answer(name, version, number, 8443)


@both_families
def test_a_hello_in_more_pieces_than_a_first_window(lab: Gateway, version: int) -> None:
    """The client sends ten and waits until they are acknowledged, which nobody but the worker can do."""
    start_tls(lab)
    for name, number, step in (("a.example", 1, 150), ("b.example", 2, 60)):
        client = TlsClient(lab, name, 5000)
        cuts = range(step, len(client.hello), step)
        assert client.request(version, cuts) == answer(name, version, number, 8443)


# ---- HTTP ----

HTTP = service(
    "http",
    80,
    '"http"',
    [
        ('when = { "http.host" = "a.example" }', 1, 8080),
        ('when = { "http.host" = "*.b.example" }', 2, 8080),
        ('when = { "http.header.x-lane" = "3" }', 3, 8080),
    ],
)


@both_families
def test_curl_gets_each_nginx_by_host_and_header(lab: Gateway, version: int) -> None:
    lab.configure(programs.POOL + HTTP)
    lab.start()
    for number, name in ((1, "a.example"), (2, "b.example"), (3, "lane")):
        programs.nginx(lab, name, number, 8080)
    assert curl(lab, version, "http://a.example/some/path?query") == answer("a.example", version, 1, 8080)
    assert curl(lab, version, "http://www.b.example/") == answer("b.example", version, 2, 8080)
    assert curl(lab, version, "http://c.example/", "-H 'X-Lane: 3'") == answer("lane", version, 3, 8080)
    # A request of two segments, and a body that goes on for longer than the head.
    long = f"-H 'Cookie: {'c' * 3000}' --data-binary @{lab.directory}/body"
    (lab.directory / "body").write_bytes(b"b" * 300_000)
    assert curl(lab, version, "http://www.b.example/", long) == answer("b.example", version, 2, 8080)


@pytest.mark.parametrize("nodelay", [1, 0])
def test_a_client_that_says_one_byte_every_50_ms(lab: Gateway, nodelay: int) -> None:
    """Without TCP_NODELAY it waits behind its first unacknowledged byte, for good if nobody acknowledges it."""
    lab.configure(programs.POOL + HTTP)
    lab.start()
    programs.nginx(lab, "a.example", 1, 8080)
    programs.nginx(lab, "b.example", 2, 8080)
    asked = {
        (4, "a.example"): answer("a.example", 4, 1, 8080), (4, "x.b.example"): answer("b.example", 4, 2, 8080),
        (6, "a.example"): answer("a.example", 6, 1, 8080), (6, "x.b.example"): answer("b.example", 6, 2, 8080),
    }  # fmt: skip
    answers = {}

    def ask(version: int, name: str) -> None:
        with lab.socket(None, version=version) as connection:
            connection.connect((ENDPOINT[version], 80))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
            for byte in f"GET / HTTP/1.0\r\nHost: {name}\r\n\r\n".encode():
                connection.send(bytes([byte]))
                time.sleep(0.05)
            with connection.makefile() as said:
                answers[version, name] = said.read().splitlines()[-1]

    clients = [threading.Thread(target=ask, args=who) for who in asked]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert answers == asked


@both_families
def test_http2_clients_get_each_nginx_by_authority(lab: Gateway, version: int) -> None:
    routes = [('when = { "http.host" = "a.example" }', 1, 8082), ('when = { "http.host" = "b.example" }', 2, 8082)]
    lab.configure(programs.POOL + service("http", 80, '"http2"', routes))
    lab.start()
    programs.nginx(lab, "a.example", 1, 8082, how="http2")
    programs.nginx(lab, "b.example", 2, 8082, how="http2")
    host = ENDPOINT4 if version == 4 else f"[{ENDPOINT6}]"
    for number, name in ((1, "a.example"), (2, "b.example")):
        expected = answer(name, version, number, 8082)
        assert curl(lab, version, f"http://{name}/", "--http2-prior-knowledge") == expected
        said = lab.client.sh(f"nghttp --timeout={WITHIN} --header=':authority: {name}' http://{host}/")
        assert said.strip() == expected


# ---- SSH ----

SSH = service(
    "shared",
    443,
    '"tls", "ssh"',
    [
        ('when = { "tls.sni" = "a.example" }', 1, 8443),
        ('when = { "ssh.version" = "2.0" }', 4, 2222),
        ('when = { "ssh.version" = "2.0" }\nsource = "198.51.100.8/30"', 5, 2222),
        ('when = { "ssh.version" = "2.0" }\nsource = "2001:db8:1::8/125"', 5, 2222),
    ],
)


@both_families
def test_ssh_gets_each_sshd_by_source_on_the_port_of_tls(lab: Gateway, version: int) -> None:
    lab.configure(programs.POOL + SSH)
    lab.start()
    programs.certificate(lab, "a.example")
    programs.nginx(lab, "a.example", 1, 8443, how="ssl")
    programs.sshd(lab, "all", 4, 2222)
    programs.sshd(lab, "some", 5, 2222)
    other = "198.51.100.9" if version == 4 else "2001:db8:1::9"
    lab.client.sh("ip -6 addr add 2001:db8:1::9/64 dev eth0 nodad preferred_lft 0")
    (lab.directory / "sent").write_bytes(random.Random(version).randbytes(1_000_000).hex().encode())
    for name, number, source in (("all", 4, programs.CLIENT[version]), ("some", 5, other)):
        lab.client.sh(
            f"ssh -F none -i {lab.directory}/id -p 443 -b {source} -o HostKeyAlias={name} -o BatchMode=yes"
            f" -o UserKnownHostsFile={lab.directory}/known_hosts -o StrictHostKeyChecking=yes"
            f" -o ConnectTimeout={WITHIN} root@{ENDPOINT[version]} < {lab.directory}/sent > {lab.directory}/received"
        )
        said, _, received = (lab.directory / "received").read_text().partition("\n")
        assert said == answer(name, version, number, 2222, source)
        assert received == (lab.directory / "sent").read_text()
    assert curl(lab, version, "https://a.example/") == answer("a.example", version, 1, 8443)


# ---- PostgreSQL ----

POSTGRES = service(
    "postgres",
    5432,
    '"postgres", "tls"',
    [
        ('when = { "postgres.database" = "left" }', 6, 5432),
        ('when = { "postgres.database" = "right" }', 7, 5432),
        ('when = { "postgres.user" = "right", "postgres.database" = "postgres" }', 7, 5432),
        ('when = { "tls.sni" = "left" }', 6, 5432),
        ('when = { "tls.sni" = "right" }', 7, 5432),
    ],
    default=target(6, 5432),
)
WHO = (
    "select concat_ws(' ', current_setting('cluster_name'), host(inet_server_addr()), inet_server_port(),"
    " host(inet_client_addr()))"
)


def psql(lab: Gateway, version: int, database: str, user: str, *more: str, query: str = WHO) -> str:
    said = lab.client.sh(
        f'psql -XAt -c "{query}" "hostaddr={ENDPOINT[version]} dbname={database} user={user} gssencmode=disable'
        f' connect_timeout={WITHIN} {" ".join(more)}"'
    )
    return said.strip()


def test_psql_gets_each_server_by_database_and_user(lab: Gateway) -> None:
    lab.configure(programs.POOL + POSTGRES)
    lab.start()
    programs.certificate(lab, "left", "right")
    with programs.postgres(lab, "left", 6, 5432), programs.postgres(lab, "right", 7, 5432):
        for version in (4, 6):
            left, right = answer("left", version, 6, 5432), answer("right", version, 7, 5432)
            assert psql(lab, version, "left", "left", "sslmode=disable") == left
            assert psql(lab, version, "right", "right", "sslmode=disable") == right
            assert psql(lab, version, "postgres", "right", "sslmode=disable") == right
            assert psql(lab, version, "postgres", "postgres", "sslmode=disable") == left
            # An answer of some megabytes, and more than one query in a connection.
            rows = psql(lab, version, "right", "right", "sslmode=disable", query="select repeat('x', 3000000)")
            assert rows == "x" * 3_000_000
            # Whoever asks for TLS first says neither database nor user, and goes to the default.
            assert psql(lab, version, "left", "left", "sslmode=require") == left
            encrypted = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
            assert psql(lab, version, "postgres", "postgres", "sslmode=require", query=encrypted) == "t"
            if programs.postgres_version() >= 17:
                for name, expected in (("left", left), ("right", right)):
                    direct = psql(
                        lab, version, name, name,
                        "sslmode=verify-full", f"host={name}", "sslnegotiation=direct",
                        f"sslrootcert={lab.directory}/all.pem",
                    )  # fmt: skip
                    assert direct == expected
